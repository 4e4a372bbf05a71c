//! Every kind of key in a replica's RocksDB, in one place.
//!
//! User data is `[band][user key]` with bands 1..=98; the replica's own metadata is `[0xFF][name]`.
//! Metadata sorts above the data because below it every compaction would span the key space and
//! ingests would miss the bottom level. 0 and 99..=254 are unused.
//!
//! **Invariant:** a user key can never reach metadata, whatever its bytes: the first byte decides.

use crate::band::Band;
use crate::codec::{DecodeError, Reader};
use crate::ids::{Incarnation, Origin, ReplicaId};

/// First byte of all metadata keys.
pub const META_PREFIX: u8 = 0xFF;

/// Returns `[band][user key]`.
pub fn data_key(band: Band, user_key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + user_key.len());
    out.push(band.0);
    out.extend_from_slice(user_key);
    out
}

/// Splits a stored key into band and user key; `None` for metadata and unused prefixes.
pub fn split_data_key(stored: &[u8]) -> Option<(Band, &[u8])> {
    let (first, user_key) = stored.split_first()?;
    (1..=Band::LAST.0).contains(first).then_some((Band(*first), user_key))
}

/// Key of a replica's own metadata. The second byte is persisted: never reuse a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaKey {
    /// Identity of the replica (`Identity`).
    Identity,
    /// The fixed-size state that every record changes (`Head`).
    Head,
    /// The vector's entry for one origin: own sequence, little-endian u64.
    Vector(Origin),
    /// State of all bands, seals included.
    RangeStates,
    /// Highest catalog version applied, little-endian u64.
    CatalogVersion,
    /// Entry of the dedup table: client id and sequence.
    Result(u64, u64),
    /// Cursor of a tail from another shard's replica: the LSN up to which the tail was applied.
    TailCursor(ReplicaId),
    /// Cursor of forwarding to another shard.
    ForwardCursor(u32),
}

impl MetaKey {
    /// Returns the stored key.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![META_PREFIX];
        match self {
            MetaKey::Identity => out.push(1),
            MetaKey::Head => out.push(2),
            MetaKey::Vector(origin) => {
                out.push(3);
                out.extend_from_slice(&origin.replica.0.to_be_bytes());
                out.extend_from_slice(&origin.incarnation.0.to_be_bytes());
            }
            MetaKey::RangeStates => out.push(4),
            MetaKey::CatalogVersion => out.push(5),
            MetaKey::Result(client, sequence) => {
                out.push(6);
                out.extend_from_slice(&client.to_be_bytes());
                out.extend_from_slice(&sequence.to_be_bytes());
            }
            MetaKey::TailCursor(replica) => {
                out.push(7);
                out.extend_from_slice(&replica.0.to_be_bytes());
            }
            MetaKey::ForwardCursor(shard) => {
                out.push(8);
                out.extend_from_slice(&shard.to_be_bytes());
            }
        }
        out
    }

    /// Reads a stored metadata key.
    pub fn decode(stored: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(stored, "metadata key");
        if reader.u8()? != META_PREFIX {
            return Err(DecodeError::Malformed { what: "metadata key" });
        }
        let key = match reader.u8()? {
            1 => MetaKey::Identity,
            2 => MetaKey::Head,
            3 => MetaKey::Vector(Origin {
                replica: ReplicaId(reader.u64_be()?),
                incarnation: Incarnation(reader.u64_be()?),
            }),
            4 => MetaKey::RangeStates,
            5 => MetaKey::CatalogVersion,
            6 => MetaKey::Result(reader.u64_be()?, reader.u64_be()?),
            7 => MetaKey::TailCursor(ReplicaId(reader.u64_be()?)),
            8 => MetaKey::ForwardCursor(u32::from_be_bytes(
                reader.take(4)?.try_into().expect("take answers exactly 4 bytes"),
            )),
            other => {
                return Err(DecodeError::Unknown {
                    what: "metadata key kind",
                    value: other.into(),
                });
            }
        };
        reader.finish()?;
        Ok(key)
    }

    /// Returns the common prefix of all vector entries.
    pub fn vector_prefix() -> [u8; 2] {
        [META_PREFIX, 3]
    }

    /// Returns the common prefix of all forward cursors.
    pub fn forward_cursor_prefix() -> [u8; 2] {
        [META_PREFIX, 8]
    }

    /// Returns the common prefix of all stored results.
    pub fn result_prefix() -> [u8; 2] {
        [META_PREFIX, 6]
    }

    /// Returns the common prefix of all tail cursors.
    pub fn tail_cursor_prefix() -> [u8; 2] {
        [META_PREFIX, 7]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn metadata_keys_round_trip() {
        let origin = Origin { replica: ReplicaId(7), incarnation: Incarnation(9) };
        for key in [
            MetaKey::Identity,
            MetaKey::Head,
            MetaKey::Vector(origin),
            MetaKey::RangeStates,
            MetaKey::CatalogVersion,
            MetaKey::Result(1, 2),
            MetaKey::TailCursor(ReplicaId(3)),
            MetaKey::ForwardCursor(4),
        ] {
            assert_eq!(MetaKey::decode(&key.encode()).unwrap(), key);
        }
    }

    proptest! {
        #[test]
        fn user_keys_never_reach_metadata(band in 1u8..=98, key in proptest::collection::vec(any::<u8>(), 0..20)) {
            let stored = data_key(Band(band), &key);
            prop_assert!(MetaKey::decode(&stored).is_err());
            prop_assert_eq!(split_data_key(&stored), Some((Band(band), key.as_slice())));
        }

        #[test]
        fn decoders_are_total(bytes in proptest::collection::vec(any::<u8>(), 0..32)) {
            let _ = MetaKey::decode(&bytes);
            let _ = split_data_key(&bytes);
        }
    }
}
