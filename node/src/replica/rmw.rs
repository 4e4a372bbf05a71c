//! What a read-modify-write makes of the value that stands.
//!
//! **Invariant:** pure. A key that is deleted or expired has no value. Nothing is stored that is no
//! number where a number is promised, or that is over a limit.

use bytes::Bytes;
use vasto_core::entry::{Entry, Payload, version_of};
use vasto_core::limits::check_value;
use vasto_core::{ErrorCode, VastoError};

use super::job::{Change, Condition, Number};

/// What is to be stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// These bytes.
    Bytes(Bytes),
    /// This number.
    Number(Number),
    /// Nothing: the key is deleted.
    Nothing,
}

/// What a change leads to.
#[derive(Debug, Clone, PartialEq)]
pub enum Modified {
    /// Store this; it expires at this time, microseconds since 1970.
    Store(Content, Option<u64>),
    /// The condition does not hold.
    NotApplied,
}

fn wrong_type(stands: &Payload<'_>) -> VastoError {
    let what = match stands {
        Payload::Bytes(_) => "bytes",
        Payload::I64(_) => "a counter (i64)",
        Payload::F64(_) => "a number (f64)",
    };
    VastoError::new(
        ErrorCode::WrongType,
        format!("the key holds {what}, which this operation cannot change; delete it first, or use another key"),
    )
}

fn overflow(what: &str) -> VastoError {
    VastoError::new(ErrorCode::OutOfRange, format!("{what}; nothing was changed"))
}

/// A live value: the entry and its encoding.
pub type Standing<'a> = Option<(Entry<'a>, &'a [u8])>;

fn expiry(ttl_ms: Option<u64>, now_us: u64) -> Option<u64> {
    ttl_ms.map(|ms| now_us.saturating_add(ms.saturating_mul(1000)))
}

/// Applies a change to the value that stands; `None` when there is none. What stands keeps its expiry;
/// a number or bytes that the change creates get `created_ttl_ms`.
///
/// # Errors
/// `WrongType` when the value has another type; `OutOfRange` when the operand is not finite, or the result
/// is no number of its type; `InvalidArgument` when the result is over a limit.
pub fn modify(
    change: &Change,
    standing: Standing<'_>,
    created_ttl_ms: Option<u64>,
    now_us: u64,
) -> Result<Modified, VastoError> {
    let expires_at = match &standing {
        Some((entry, _)) => entry.expires_at,
        None => expiry(created_ttl_ms, now_us),
    };
    let payload = standing.as_ref().and_then(|(entry, _)| entry.payload);
    let float = |fold: fn(f64, f64) -> f64, operand: f64, nothing: f64| {
        let before = match payload {
            None => nothing,
            Some(Payload::F64(number)) => number,
            Some(other) => return Err(wrong_type(&other)),
        };
        // The larger of a number and of none is the number: the caller would not hear of its mistake.
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
        Change::AddI64(addend) => {
            let before = match payload {
                None => 0,
                Some(Payload::I64(number)) => number,
                Some(other) => return Err(wrong_type(&other)),
            };
            let sum =
                before.checked_add(*addend).ok_or_else(|| overflow("the sum is over the range of a counter (i64)"))?;
            Ok(Modified::Store(Content::Number(Number::I64(sum)), expires_at))
        }
        Change::AddF64(addend) => float(|a, b| a + b, *addend, 0.0),
        Change::MaxF64(least) => float(f64::max, *least, *least),
        Change::MinF64(most) => float(f64::min, *most, *most),
        Change::Append(more) => {
            let mut bytes = match payload {
                None => Vec::with_capacity(more.len()),
                Some(Payload::Bytes(bytes)) => bytes.to_vec(),
                Some(other) => return Err(wrong_type(&other)),
            };
            bytes.extend_from_slice(more);
            check_value(&bytes)?;
            Ok(Modified::Store(Content::Bytes(bytes.into()), expires_at))
        }
        Change::Put { value, ttl_ms, condition } => {
            if !holds(*condition, standing) {
                return Ok(Modified::NotApplied);
            }
            Ok(Modified::Store(Content::Bytes(value.clone()), expiry(*ttl_ms, now_us)))
        }
        Change::Delete { condition } => match holds(*condition, standing) {
            true => Ok(Modified::Store(Content::Nothing, None)),
            false => Ok(Modified::NotApplied),
        },
    }
}

fn holds(condition: Option<Condition>, standing: Standing<'_>) -> bool {
    match condition {
        None => true,
        Some(Condition::Absent) => standing.is_none(),
        Some(Condition::Version(version)) => standing.is_some_and(|(_, encoded)| version_of(encoded) == version),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::limits::VALUE_BYTES_MAX;

    fn encoded(payload: Payload<'_>, expires_at: Option<u64>) -> Vec<u8> {
        let commit_time = expires_at.map(|_| 1);
        Entry { event_time: 5, expires_at, partition_hash: None, commit_time, payload: Some(payload) }.encode()
    }

    fn on(stands: Option<&[u8]>, change: Change) -> Result<Modified, VastoError> {
        modify(&change, stands.map(|bytes| (Entry::decode(bytes).unwrap(), bytes)), None, 1_000)
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
        assert_eq!(on(None, Change::AddI64(-3)).unwrap(), i64_of(-3));
        assert_eq!(on(Some(&seven), Change::AddI64(-3)).unwrap(), i64_of(4));
        let most = encoded(Payload::I64(i64::MAX), None);
        assert_eq!(on(Some(&most), Change::AddI64(1)).unwrap_err().code, ErrorCode::OutOfRange);
        let half = encoded(Payload::F64(0.5), None);
        assert_eq!(on(Some(&half), Change::AddF64(1.0)).unwrap(), f64_of(1.5));
        assert_eq!(on(Some(&half), Change::MaxF64(0.25)).unwrap(), f64_of(0.5));
        assert_eq!(on(Some(&half), Change::MinF64(0.25)).unwrap(), f64_of(0.25));
        assert_eq!(on(None, Change::MinF64(9.0)).unwrap(), f64_of(9.0));
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(on(Some(&half), Change::AddF64(bad)).unwrap_err().code, ErrorCode::OutOfRange);
            for stands in [None, Some(half.as_slice())] {
                assert_eq!(on(stands, Change::MaxF64(bad)).unwrap_err().code, ErrorCode::OutOfRange);
                assert_eq!(on(stands, Change::MinF64(bad)).unwrap_err().code, ErrorCode::OutOfRange);
            }
        }
        let most = encoded(Payload::F64(f64::MAX), None);
        assert_eq!(on(Some(&most), Change::AddF64(f64::MAX)).unwrap_err().code, ErrorCode::OutOfRange);
    }

    #[test]
    fn other_types_are_refused_and_named() {
        let text = encoded(Payload::Bytes(b"x"), None);
        let seven = encoded(Payload::I64(7), None);
        for (stands, change) in [
            (&text, Change::AddI64(1)),
            (&text, Change::AddF64(1.0)),
            (&seven, Change::MaxF64(1.0)),
            (&seven, Change::Append(Bytes::from_static(b"y"))),
        ] {
            let error = on(Some(stands), change).unwrap_err();
            assert_eq!(error.code, ErrorCode::WrongType);
            assert!(error.message.contains("the key holds"), "{error}");
        }
    }

    #[test]
    fn appends_end_at_the_limit_and_keep_the_time_to_live() {
        let text = encoded(Payload::Bytes(b"ab"), Some(9_000));
        let joined = on(Some(&text), Change::Append(Bytes::from_static(b"c"))).unwrap();
        assert_eq!(joined, Modified::Store(Content::Bytes(Bytes::from_static(b"abc")), Some(9_000)));
        let most = Bytes::from(vec![0; VALUE_BYTES_MAX - 2]);
        assert!(on(Some(&text), Change::Append(most)).is_ok());
        let over = Bytes::from(vec![0; VALUE_BYTES_MAX - 1]);
        assert_eq!(on(Some(&text), Change::Append(over)).unwrap_err().code, ErrorCode::InvalidArgument);
    }

    #[test]
    fn what_a_change_creates_lives_as_long_as_the_keyspace_says() {
        let create = |change: Change| modify(&change, None, Some(5), 1_000).unwrap();
        for change in [
            Change::AddI64(1),
            Change::AddF64(1.0),
            Change::MaxF64(1.0),
            Change::MinF64(1.0),
            Change::Append(Bytes::from_static(b"x")),
        ] {
            assert!(matches!(create(change), Modified::Store(_, Some(6_000))));
        }
        // A put brings its own, and what stands keeps its own, also for ever.
        let put = Change::Put { value: Bytes::new(), ttl_ms: None, condition: None };
        assert!(matches!(create(put), Modified::Store(_, None)));
        for expires_at in [None, Some(9_000)] {
            let seven = encoded(Payload::I64(7), expires_at);
            let standing = Some((Entry::decode(&seven).unwrap(), seven.as_slice()));
            let changed = modify(&Change::AddI64(1), standing, Some(5), 1_000).unwrap();
            assert!(matches!(changed, Modified::Store(_, at) if at == expires_at));
        }
    }

    #[test]
    fn conditions() {
        let text = encoded(Payload::Bytes(b"ab"), None);
        let version = Some(Condition::Version(version_of(&text)));
        let put = |condition| Change::Put { value: Bytes::from_static(b"n"), ttl_ms: None, condition };
        let stored = Modified::Store(Content::Bytes(Bytes::from_static(b"n")), None);
        assert_eq!(on(None, put(Some(Condition::Absent))).unwrap(), stored);
        assert_eq!(on(Some(&text), put(Some(Condition::Absent))).unwrap(), Modified::NotApplied);
        assert_eq!(on(Some(&text), put(version)).unwrap(), stored);
        assert_eq!(on(None, put(version)).unwrap(), Modified::NotApplied);
        let other = Some(Condition::Version(1));
        assert_eq!(on(Some(&text), put(other)).unwrap(), Modified::NotApplied);
        assert_eq!(on(Some(&text), Change::Delete { condition: other }).unwrap(), Modified::NotApplied);
        let gone = Modified::Store(Content::Nothing, None);
        assert_eq!(on(Some(&text), Change::Delete { condition: version }).unwrap(), gone);
    }
}
