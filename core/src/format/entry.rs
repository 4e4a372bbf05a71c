//! Encoding of a stored entry: one version of a value, or a tombstone.
//!
//! Encoding (persisted, frozen by `testdata/v1/entries.txt`):
//!
//! | bytes | field |
//! |---|---|
//! | 8 | event_time, microseconds since 1970, big-endian; never 0 |
//! | 1 | kind: 1 value, 2 tombstone |
//! | 1 | payload type (low 4 bits: 0 none, 1 bytes, 2 i64, 3 f64), 0x10 has expires_at, 0x20 has partition_hash |
//! | 8 | expires_at, microseconds since 1970, big-endian, if flagged |
//! | 8 | partition_hash, big-endian, if flagged |
//! | 8 | commit_time, microseconds, big-endian: tombstones and expiring values only |
//! | … | payload |
//!
//! **Invariant:** comparing two encodings as bytes compares `(event_time, kind, the rest)`, which
//! is the order of the merge rule; and there is exactly one encoding of an entry.

use crate::codec::{DecodeError, Reader};

/// A payload and its type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Payload<'a> {
    /// Opaque bytes.
    Bytes(&'a [u8]),
    /// A 64-bit integer, written by `add_i64`.
    I64(i64),
    /// A 64-bit float, written by `add_f64`, `max_f64` and `min_f64`.
    F64(f64),
}

/// Value or tombstone. Persisted: never reuse a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// The key has a value.
    Value = 1,
    /// The key was deleted.
    Tombstone = 2,
}

/// Bytes before the payload, with every optional field.
pub const ENTRY_HEADER_BYTES_MAX: usize = 8 + 1 + 1 + 3 * 8;

const TYPE_MASK: u8 = 0x0f;
const HAS_EXPIRES_AT: u8 = 0x10;
const HAS_PARTITION_HASH: u8 = 0x20;
const TYPE_NONE: u8 = 0;
const TYPE_BYTES: u8 = 1;
const TYPE_I64: u8 = 2;
const TYPE_F64: u8 = 3;

/// A decoded entry that borrows its payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry<'a> {
    /// Hybrid logical clock or the caller's own time, microseconds since 1970; never 0.
    pub event_time: u64,
    /// Expiry time of a value, microseconds since 1970.
    pub expires_at: Option<u64>,
    /// Hash of the partition key, when it is not the hash of the key itself.
    pub partition_hash: Option<u64>,
    /// Commit time of the record that carried the entry; kept for tombstones and expiring values
    /// only.
    pub commit_time: Option<u64>,
    /// Payload; `None` is a tombstone.
    pub payload: Option<Payload<'a>>,
}

impl<'a> Entry<'a> {
    /// Returns whether the entry is a value or a tombstone.
    pub fn kind(&self) -> Kind {
        if self.payload.is_some() { Kind::Value } else { Kind::Tombstone }
    }

    /// Returns the encoding.
    ///
    /// # Panics
    /// When `event_time` is 0, or `commit_time` is present exactly where it must not be: faults of
    /// the caller, never of the data.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.event_time > 0, "event time 0 is reserved");
        let keeps_commit_time = self.payload.is_none() || self.expires_at.is_some();
        assert_eq!(
            keeps_commit_time,
            self.commit_time.is_some(),
            "tombstones and expiring values keep their commit time"
        );
        assert!(self.payload.is_some() || self.expires_at.is_none(), "a tombstone does not expire");
        let payload_len = match self.payload {
            None => 0,
            Some(Payload::Bytes(bytes)) => bytes.len(),
            Some(_) => 8,
        };
        let mut out = Vec::with_capacity(ENTRY_HEADER_BYTES_MAX + payload_len);
        out.extend_from_slice(&self.event_time.to_be_bytes());
        out.push(self.kind() as u8);
        let mut flags = match self.payload {
            None => TYPE_NONE,
            Some(Payload::Bytes(_)) => TYPE_BYTES,
            Some(Payload::I64(_)) => TYPE_I64,
            Some(Payload::F64(_)) => TYPE_F64,
        };
        if self.expires_at.is_some() {
            flags |= HAS_EXPIRES_AT;
        }
        if self.partition_hash.is_some() {
            flags |= HAS_PARTITION_HASH;
        }
        out.push(flags);
        for field in [self.expires_at, self.partition_hash, self.commit_time].into_iter().flatten()
        {
            out.extend_from_slice(&field.to_be_bytes());
        }
        match self.payload {
            None => {}
            Some(Payload::Bytes(bytes)) => out.extend_from_slice(bytes),
            Some(Payload::I64(number)) => out.extend_from_slice(&number.to_le_bytes()),
            Some(Payload::F64(number)) => out.extend_from_slice(&number.to_le_bytes()),
        }
        out
    }

    /// Decodes an encoding by [`encode`](Self::encode). Total: any bytes give an entry or an error.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, "entry");
        let event_time = reader.u64_be()?;
        if event_time == 0 {
            return Err(DecodeError::Malformed { what: "entry event time" });
        }
        let kind = reader.u8()?;
        let flags = reader.u8()?;
        if flags & !(TYPE_MASK | HAS_EXPIRES_AT | HAS_PARTITION_HASH) != 0 {
            return Err(DecodeError::Unknown { what: "entry flags", value: flags.into() });
        }
        let expires_at = if flags & HAS_EXPIRES_AT != 0 { Some(reader.u64_be()?) } else { None };
        let partition_hash =
            if flags & HAS_PARTITION_HASH != 0 { Some(reader.u64_be()?) } else { None };
        let tombstone = match kind {
            1 => false,
            2 => true,
            other => return Err(DecodeError::Unknown { what: "entry kind", value: other.into() }),
        };
        let commit_time =
            if tombstone || expires_at.is_some() { Some(reader.u64_be()?) } else { None };
        let number = |rest: &[u8]| {
            <[u8; 8]>::try_from(rest).map_err(|_| DecodeError::Malformed { what: "entry number" })
        };
        let rest = reader.rest();
        let payload = match (tombstone, flags & TYPE_MASK) {
            (true, TYPE_NONE) if rest.is_empty() && expires_at.is_none() => None,
            (true, _) => return Err(DecodeError::Malformed { what: "tombstone" }),
            (false, TYPE_BYTES) => Some(Payload::Bytes(rest)),
            (false, TYPE_I64) => Some(Payload::I64(i64::from_le_bytes(number(rest)?))),
            (false, TYPE_F64) => Some(Payload::F64(f64::from_le_bytes(number(rest)?))),
            (false, other) => {
                return Err(DecodeError::Unknown { what: "payload type", value: other.into() });
            }
        };
        Ok(Entry { event_time, expires_at, partition_hash, commit_time, payload })
    }

    /// Returns true once a reader must not see the value any more.
    pub fn is_expired(&self, now_us: u64) -> bool {
        self.expires_at.is_some_and(|at| at <= now_us)
    }

    /// Returns the commit time from which on collection may drop this entry: that of a tombstone,
    /// or for an expiring value the later of commit and expiry (an expired value is a tombstone).
    pub fn collectable_at(&self) -> Option<u64> {
        let commit_time = self.commit_time?;
        Some(self.expires_at.map_or(commit_time, |at| at.max(commit_time)))
    }
}

/// Returns the version of a stored entry that compare-and-set names: a hash of its encoding.
pub fn version_of(encoded: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(encoded, 0x7661_7374_6f00_0001)
}

/// Returns the event time of an encoding without decoding the rest; `None` when it is too short.
pub fn event_time_of(encoded: &[u8]) -> Option<u64> {
    encoded.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// An owned entry for generators.
    #[derive(Debug, Clone)]
    pub(crate) struct Made {
        pub event_time: u64,
        pub expires_at: Option<u64>,
        pub partition_hash: Option<u64>,
        pub commit_time: u64,
        pub payload: Option<(u8, Vec<u8>)>,
    }

    impl Made {
        pub(crate) fn encode(&self) -> Vec<u8> {
            let payload = self.payload.as_ref().map(|(kind, bytes)| {
                let mut eight = [0u8; 8];
                for (to, from) in eight.iter_mut().zip(bytes) {
                    *to = *from;
                }
                match kind % 3 {
                    0 => Payload::Bytes(bytes),
                    1 => Payload::I64(i64::from_le_bytes(eight)),
                    _ => Payload::F64(f64::from_le_bytes(eight)),
                }
            });
            let expires_at = self.expires_at.filter(|_| payload.is_some());
            Entry {
                event_time: self.event_time,
                expires_at,
                partition_hash: self.partition_hash,
                commit_time: (payload.is_none() || expires_at.is_some())
                    .then_some(self.commit_time),
                payload,
            }
            .encode()
        }
    }

    pub(crate) fn any_entry(times: std::ops::Range<u64>) -> impl Strategy<Value = Made> {
        let t = times.clone();
        (
            times.clone(),
            proptest::option::of(times.clone()),
            proptest::option::of(any::<u64>()),
            t,
            proptest::option::of((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..20))),
        )
            .prop_map(|(event_time, expires_at, partition_hash, commit_time, payload)| {
                Made {
                    event_time: event_time.max(1),
                    expires_at,
                    partition_hash,
                    commit_time,
                    payload,
                }
            })
    }

    proptest! {
        #[test]
        fn round_trip(made in any_entry(1..u64::MAX)) {
            let bytes = made.encode();
            let entry = Entry::decode(&bytes).unwrap();
            prop_assert_eq!(entry.encode(), bytes);
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(entry) = Entry::decode(&bytes) {
                prop_assert_eq!(entry.encode(), bytes);
            }
        }
    }

    #[test]
    fn every_short_length_is_an_error_or_an_entry() {
        // The original crashed on an empty value: lengths 0..64 of several fillings must not.
        for fill in [0u8, 1, 2, 0x10, 0x20, 0x30, 0xff] {
            for len in 0..64 {
                let _ = Entry::decode(&vec![fill; len]);
            }
        }
        let empty = Entry {
            event_time: 1,
            expires_at: None,
            partition_hash: None,
            commit_time: None,
            payload: Some(Payload::Bytes(b"")),
        };
        assert_eq!(Entry::decode(&empty.encode()), Ok(empty));
    }
}
