//! Result of a read-modify-write on the stored value.
//!
//! **Invariant:** pure. A deleted or expired key has no value. A change never stores a non-number
//! where a number is promised, or a value over a limit.

use bytes::Bytes;
use vasto_core::entry::{Entry, Payload, version_of};
use vasto_core::limits::check_value;
use vasto_core::{ErrorCode, VastoError};

use super::command::{Condition, Number, OpKind};

/// Content to store.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// These bytes.
    Bytes(Bytes),
    /// This number.
    Number(Number),
    /// Nothing: the key is deleted.
    Nothing,
}

/// Result of a change.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Modified {
    /// Content to store, and its expiry, microseconds since 1970.
    Store(Content, Option<u64>),
    /// The condition does not hold.
    NotApplied,
}

fn wrong_type(stored: &Payload<'_>) -> VastoError {
    let what = match stored {
        Payload::Bytes(_) => "bytes",
        Payload::I64(_) => "a counter (i64)",
        Payload::F64(_) => "a number (f64)",
    };
    VastoError::new(
        ErrorCode::WrongType,
        format!(
            "the key holds {what}, which this operation cannot change; delete it first, or use another key"
        ),
    )
}

fn overflow(what: &str) -> VastoError {
    VastoError::new(ErrorCode::OutOfRange, format!("{what}; nothing was changed"))
}

/// Live stored value: the entry and its encoding.
pub(super) type LiveEntry<'a> = Option<(Entry<'a>, &'a [u8])>;

fn expiry(ttl_ms: Option<u64>, now_us: u64) -> Option<u64> {
    ttl_ms.map(|ms| now_us.saturating_add(ms.saturating_mul(1000)))
}

/// Applies a change to the stored live value; `None` when there is none. A stored value keeps its
/// expiry; a number or bytes that the change creates get `created_ttl_ms`.
///
/// # Errors
/// `WrongType` when the value has another type; `OutOfRange` when the operand is not finite, or the
/// result is no number of its type; `InvalidArgument` when the result is over a limit.
pub(super) fn modify(
    change: &OpKind,
    live: LiveEntry<'_>,
    created_ttl_ms: Option<u64>,
    now_us: u64,
) -> Result<Modified, VastoError> {
    let expires_at = match &live {
        Some((entry, _)) => entry.expires_at,
        None => expiry(created_ttl_ms, now_us),
    };
    let payload = live.as_ref().and_then(|(entry, _)| entry.payload);
    let float = |fold: fn(f64, f64) -> f64, operand: f64, nothing: f64| {
        let before = match payload {
            None => nothing,
            Some(Payload::F64(number)) => number,
            Some(other) => return Err(wrong_type(&other)),
        };
        // The larger of a number and NaN is the number: the caller would not notice its mistake.
        if !operand.is_finite() {
            return Err(overflow("the operand is not a finite number"));
        }
        let number = fold(before, operand);
        if !number.is_finite() {
            return Err(overflow("the sum is over the range of an f64"));
        }
        Ok(Modified::Store(Content::Number(Number::F64(number.to_bits())), expires_at))
    };
    match change {
        OpKind::AddI64(addend) => {
            let before = match payload {
                None => 0,
                Some(Payload::I64(number)) => number,
                Some(other) => return Err(wrong_type(&other)),
            };
            let sum = before
                .checked_add(*addend)
                .ok_or_else(|| overflow("the sum is over the range of a counter (i64)"))?;
            Ok(Modified::Store(Content::Number(Number::I64(sum)), expires_at))
        }
        OpKind::AddF64(addend) => float(|a, b| a + b, *addend, 0.0),
        OpKind::MaxF64(least) => float(f64::max, *least, *least),
        OpKind::MinF64(most) => float(f64::min, *most, *most),
        OpKind::Append(more) => {
            let mut bytes = match payload {
                None => Vec::with_capacity(more.len()),
                Some(Payload::Bytes(bytes)) => bytes.to_vec(),
                Some(other) => return Err(wrong_type(&other)),
            };
            bytes.extend_from_slice(more);
            check_value(&bytes)?;
            Ok(Modified::Store(Content::Bytes(bytes.into()), expires_at))
        }
        OpKind::Put { value, ttl_ms, condition } => {
            if !holds(*condition, live) {
                return Ok(Modified::NotApplied);
            }
            Ok(Modified::Store(Content::Bytes(value.clone()), expiry(*ttl_ms, now_us)))
        }
        OpKind::Delete { condition } => match holds(*condition, live) {
            true => Ok(Modified::Store(Content::Nothing, None)),
            false => Ok(Modified::NotApplied),
        },
    }
}

fn holds(condition: Option<Condition>, live: LiveEntry<'_>) -> bool {
    match condition {
        None => true,
        Some(Condition::Absent) => live.is_none(),
        Some(Condition::Version(version)) => {
            live.is_some_and(|(_, encoded)| version_of(encoded) == version)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::limits::VALUE_BYTES_MAX;

    fn encoded(payload: Payload<'_>, expires_at: Option<u64>) -> Vec<u8> {
        let commit_time = expires_at.map(|_| 1);
        Entry {
            event_time: 5,
            expires_at,
            partition_hash: None,
            commit_time,
            payload: Some(payload),
        }
        .encode()
    }

    fn on(encoded_value: Option<&[u8]>, change: OpKind) -> Result<Modified, VastoError> {
        modify(
            &change,
            encoded_value.map(|bytes| (Entry::decode(bytes).unwrap(), bytes)),
            None,
            1_000,
        )
    }

    fn i64_of(number: i64) -> Modified {
        Modified::Store(Content::Number(Number::I64(number)), None)
    }

    fn f64_of(number: f64) -> Modified {
        Modified::Store(Content::Number(Number::F64(number.to_bits())), None)
    }

    #[test]
    fn numbers() {
        let seven = encoded(Payload::I64(7), None);
        assert_eq!(on(None, OpKind::AddI64(-3)).unwrap(), i64_of(-3));
        assert_eq!(on(Some(&seven), OpKind::AddI64(-3)).unwrap(), i64_of(4));
        let most = encoded(Payload::I64(i64::MAX), None);
        assert_eq!(on(Some(&most), OpKind::AddI64(1)).unwrap_err().code, ErrorCode::OutOfRange);
        let half = encoded(Payload::F64(0.5), None);
        assert_eq!(on(Some(&half), OpKind::AddF64(1.0)).unwrap(), f64_of(1.5));
        assert_eq!(on(Some(&half), OpKind::MaxF64(0.25)).unwrap(), f64_of(0.5));
        assert_eq!(on(Some(&half), OpKind::MinF64(0.25)).unwrap(), f64_of(0.25));
        assert_eq!(on(None, OpKind::MinF64(9.0)).unwrap(), f64_of(9.0));
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(
                on(Some(&half), OpKind::AddF64(bad)).unwrap_err().code,
                ErrorCode::OutOfRange
            );
            for encoded_value in [None, Some(half.as_slice())] {
                assert_eq!(
                    on(encoded_value, OpKind::MaxF64(bad)).unwrap_err().code,
                    ErrorCode::OutOfRange
                );
                assert_eq!(
                    on(encoded_value, OpKind::MinF64(bad)).unwrap_err().code,
                    ErrorCode::OutOfRange
                );
            }
        }
        let most = encoded(Payload::F64(f64::MAX), None);
        assert_eq!(
            on(Some(&most), OpKind::AddF64(f64::MAX)).unwrap_err().code,
            ErrorCode::OutOfRange
        );
    }

    #[test]
    fn other_types_are_refused_and_named() {
        let text = encoded(Payload::Bytes(b"x"), None);
        let seven = encoded(Payload::I64(7), None);
        for (encoded_value, change) in [
            (&text, OpKind::AddI64(1)),
            (&text, OpKind::AddF64(1.0)),
            (&seven, OpKind::MaxF64(1.0)),
            (&seven, OpKind::Append(Bytes::from_static(b"y"))),
        ] {
            let error = on(Some(encoded_value), change).unwrap_err();
            assert_eq!(error.code, ErrorCode::WrongType);
            assert!(error.message.contains("the key holds"), "{error}");
        }
    }

    #[test]
    fn appends_end_at_the_limit_and_keep_the_time_to_live() {
        let text = encoded(Payload::Bytes(b"ab"), Some(9_000));
        let joined = on(Some(&text), OpKind::Append(Bytes::from_static(b"c"))).unwrap();
        assert_eq!(
            joined,
            Modified::Store(Content::Bytes(Bytes::from_static(b"abc")), Some(9_000))
        );
        let most = Bytes::from(vec![0; VALUE_BYTES_MAX - 2]);
        assert!(on(Some(&text), OpKind::Append(most)).is_ok());
        let over = Bytes::from(vec![0; VALUE_BYTES_MAX - 1]);
        assert_eq!(
            on(Some(&text), OpKind::Append(over)).unwrap_err().code,
            ErrorCode::InvalidArgument
        );
    }

    #[test]
    fn what_a_change_creates_lives_as_long_as_the_keyspace_says() {
        let create = |change: OpKind| modify(&change, None, Some(5), 1_000).unwrap();
        for change in [
            OpKind::AddI64(1),
            OpKind::AddF64(1.0),
            OpKind::MaxF64(1.0),
            OpKind::MinF64(1.0),
            OpKind::Append(Bytes::from_static(b"x")),
        ] {
            assert!(matches!(create(change), Modified::Store(_, Some(6_000))));
        }
        // A put brings its own expiry, and a stored value keeps its own, even none.
        let put = OpKind::Put { value: Bytes::new(), ttl_ms: None, condition: None };
        assert!(matches!(create(put), Modified::Store(_, None)));
        for expires_at in [None, Some(9_000)] {
            let seven = encoded(Payload::I64(7), expires_at);
            let live = Some((Entry::decode(&seven).unwrap(), seven.as_slice()));
            let changed = modify(&OpKind::AddI64(1), live, Some(5), 1_000).unwrap();
            assert!(matches!(changed, Modified::Store(_, at) if at == expires_at));
        }
    }

    #[test]
    fn conditions() {
        let text = encoded(Payload::Bytes(b"ab"), None);
        let version = Some(Condition::Version(version_of(&text)));
        let put =
            |condition| OpKind::Put { value: Bytes::from_static(b"n"), ttl_ms: None, condition };
        let stored = Modified::Store(Content::Bytes(Bytes::from_static(b"n")), None);
        assert_eq!(on(None, put(Some(Condition::Absent))).unwrap(), stored);
        assert_eq!(on(Some(&text), put(Some(Condition::Absent))).unwrap(), Modified::NotApplied);
        assert_eq!(on(Some(&text), put(version)).unwrap(), stored);
        assert_eq!(on(None, put(version)).unwrap(), Modified::NotApplied);
        let other = Some(Condition::Version(1));
        assert_eq!(on(Some(&text), put(other)).unwrap(), Modified::NotApplied);
        assert_eq!(
            on(Some(&text), OpKind::Delete { condition: other }).unwrap(),
            Modified::NotApplied
        );
        let gone = Modified::Store(Content::Nothing, None);
        assert_eq!(on(Some(&text), OpKind::Delete { condition: version }).unwrap(), gone);
    }
}
