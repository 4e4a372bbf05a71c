//! The manifest of a checkpoint: everything that is needed to open a copy of a replica.
//!
//! **Invariant:** a manifest is written after every object that it names was uploaded and verified,
//! and never changed. Levels and sequence ranges are correctness data: an import with wrong values
//! returns wrong results without an error, so they come from the checkpoint itself.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vasto_core::ids::Vector;
use vasto_core::record::BandRange;
use vasto_core::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};

use crate::envelope::{self, EnvelopeError};

const KIND: &str = "manifest";

/// A checkpoint of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// The replica that shipped it.
    pub replica: ReplicaId,
    /// Its incarnation at that time.
    pub incarnation: Incarnation,
    /// The epoch that it had seen.
    pub epoch: Epoch,
    /// The catalog version that it had seen.
    pub version: CatalogVersion,
    /// LSN up to which the files cover the log.
    pub lsn: Lsn,
    /// The vector that the files cover.
    #[serde(with = "pairs")]
    pub vector: Vector,
    /// Greatest event time in the checkpoint, microseconds.
    pub event_time_max: u64,
    /// Greatest commit time in the checkpoint, microseconds.
    pub commit_time_max: u64,
    /// The gc floor, a commit time.
    pub floor: u64,
    /// Time of the write, microseconds since 1970.
    pub created_at_us: u64,
    /// Drawn by the writer, to recognize its own object.
    pub nonce: u64,
    /// Key of the manifest before this one.
    pub previous: Option<String>,
    /// The recorded states of band ranges ([`vasto_core::record::RangeState`] as its number).
    pub range_states: Vec<(BandRange, u8)>,
    /// The plan whose ingest the files hold, if bands have arrived in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingested: Option<PlanId>,
    /// The SSTs.
    pub files: Vec<ManifestFile>,
    /// The database's own list of its files, with which they are opened as they are; older
    /// manifests, written before it was shipped, have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<DatabaseFile>,
}

/// The database's own list of its files at the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseFile {
    /// Full object key.
    pub key: String,
    /// Its file name.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// CRC-32C of the whole.
    pub crc32c: u32,
}

/// One SST of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Full object key.
    pub key: String,
    /// File number in the source database.
    pub file_number: u64,
    /// Size.
    pub bytes: u64,
    /// CRC-32C of the whole.
    pub crc32c: u32,
    /// Level in the LSM tree.
    pub level: i32,
    /// Smallest sequence number.
    pub smallest_seqno: u64,
    /// Largest sequence number.
    pub largest_seqno: u64,
    /// First stored key (its first byte is the band; 0xFF is the replica's metadata).
    #[serde(with = "hex")]
    pub first_key: Vec<u8>,
    /// Last stored key.
    #[serde(with = "hex")]
    pub last_key: Vec<u8>,
    /// Entries, older versions and tombstones included.
    pub entries: u64,
}

impl ManifestFile {
    /// Returns true when a stored key of these bands can be in the file.
    pub fn overlaps(&self, range: BandRange) -> bool {
        // A file without known keys could hold any.
        let first = self.first_key.first().copied().unwrap_or(u8::MIN);
        let last = self.last_key.first().copied().unwrap_or(u8::MAX);
        first <= range.last.0 && last >= range.first.0
    }
}

impl Manifest {
    /// Encodes the object's bytes.
    pub fn encode(&self) -> Bytes {
        envelope::encode(KIND, self)
    }

    /// Decodes and checks an object's bytes.
    ///
    /// # Errors
    /// Damage, another kind of document, or one of a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        envelope::decode(KIND, bytes)
    }

    /// Returns the files that can hold keys of these bands, in the manifest's order.
    pub fn files_overlapping(&self, range: BandRange) -> Vec<&ManifestFile> {
        self.files.iter().filter(|file| file.overlaps(range)).collect()
    }

    /// Returns the keys of all named objects.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.files
            .iter()
            .map(|file| file.key.as_str())
            .chain(self.database.iter().map(|list| list.key.as_str()))
    }

    /// Returns the total size of the SSTs.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// A map with structured keys as a list of pairs.
mod pairs {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use vasto_core::ids::Vector;
    use vasto_core::{Origin, OwnSeq};

    pub(super) fn serialize<S: Serializer>(
        vector: &Vector,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        vector.iter().collect::<Vec<(&Origin, &OwnSeq)>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vector, D::Error> {
        let pairs = Vec::<(Origin, OwnSeq)>::deserialize(deserializer)?;
        let count = pairs.len();
        let vector: Vector = pairs.into_iter().collect();
        if vector.len() != count {
            return Err(serde::de::Error::custom("an origin stands twice in the vector"));
        }
        Ok(vector)
    }
}

/// Bytes as lower-case hexadecimal text.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let text: String = bytes
            .iter()
            .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
            .map(char::from)
            .collect();
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        decode(text.as_bytes())
            .ok_or_else(|| serde::de::Error::custom("a key is not lower-case hexadecimal text"))
    }

    fn decode(text: &[u8]) -> Option<Vec<u8>> {
        let digit = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let pairs = text.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return None;
        }
        pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use vasto_core::{Band, Origin, OwnSeq};

    fn any_file() -> impl Strategy<Value = ManifestFile> {
        let key = || proptest::collection::vec(any::<u8>(), 0..6);
        ("[a-z0-9/]{1,12}", any::<[u64; 5]>(), any::<u32>(), -1i32..8, key(), key()).prop_map(
            |(name, n, crc32c, level, first_key, last_key)| ManifestFile {
                key: name,
                file_number: n[0],
                bytes: n[1],
                crc32c,
                level,
                smallest_seqno: n[2],
                largest_seqno: n[3],
                first_key,
                last_key,
                entries: n[4],
            },
        )
    }

    fn any_manifest() -> impl Strategy<Value = Manifest> {
        let origin = (any::<u64>(), any::<u64>())
            .prop_map(|(r, i)| Origin { replica: ReplicaId(r), incarnation: Incarnation(i) });
        let vector = proptest::collection::btree_map(origin, any::<u64>().prop_map(OwnSeq), 0..4);
        let states = proptest::collection::vec(
            (1u8..=98, 1u8..=98, 0u8..4).prop_map(|(a, b, state)| {
                (BandRange { first: Band(a.min(b)), last: Band(a.max(b)) }, state)
            }),
            0..4,
        );
        let previous = proptest::option::of("[a-z0-9/.]{1,20}");
        let files = proptest::collection::vec(any_file(), 0..4);
        (any::<[u64; 11]>(), any::<u32>(), vector, states, previous, files).prop_map(
            |(n, shard, vector, range_states, previous, files)| Manifest {
                keyspace: KeyspaceId(n[0]),
                shard: ShardId(shard),
                replica: ReplicaId(n[1]),
                incarnation: Incarnation(n[2]),
                epoch: Epoch(n[3]),
                version: CatalogVersion(n[4]),
                lsn: Lsn(n[5]),
                vector,
                event_time_max: n[6],
                commit_time_max: n[7],
                floor: n[8],
                created_at_us: n[9],
                nonce: n[10],
                previous,
                range_states,
                ingested: Some(PlanId(n[1])).filter(|plan| plan.0 % 2 == 1),
                database: files.first().map(|file| DatabaseFile {
                    key: file.key.clone(),
                    name: "MANIFEST-000001".into(),
                    bytes: file.bytes,
                    crc32c: file.crc32c,
                }),
                files,
            },
        )
    }

    proptest! {
        #[test]
        fn round_trip(manifest in any_manifest()) {
            prop_assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        }

        #[test]
        fn any_altered_bit_is_found(manifest in any_manifest(), position: usize, bit in 0u8..8) {
            let mut bytes = manifest.encode().to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(Manifest::decode(&bytes).is_err());
        }

        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Manifest::decode(&bytes).is_err());
        }

        // The checksum hides the body from random bytes: the test feeds it random values directly.
        #[test]
        fn the_body_decoder_is_total(text in r#"[\[\]{}",:a-z0-9]{0,60}"#) {
            let _ = serde_json::from_str::<Manifest>(&text);
            let _ = serde_json::from_str::<ManifestFile>(&text);
        }

        // The answer must be exactly the files whose span of bands meets the range.
        #[test]
        fn overlap_is_by_the_first_byte(first in any::<u8>(), last in any::<u8>(), a in 1u8..=98, b in 1u8..=98) {
            let (first, last) = (first.min(last), first.max(last));
            let range = BandRange { first: Band(a.min(b)), last: Band(a.max(b)) };
            let file = ManifestFile { first_key: vec![first, 0xff], last_key: vec![last], ..sample() };
            prop_assert_eq!(file.overlaps(range), range.bands().any(|band| (first..=last).contains(&band.0)));
        }
    }

    fn sample() -> ManifestFile {
        ManifestFile {
            key: "k".into(),
            file_number: 1,
            bytes: 1,
            crc32c: 1,
            level: 6,
            smallest_seqno: 0,
            largest_seqno: 0,
            first_key: vec![],
            last_key: vec![],
            entries: 1,
        }
    }

    #[test]
    fn metadata_overlaps_no_band_and_unknown_keys_overlap_all() {
        let all = BandRange { first: Band::FIRST, last: Band::LAST };
        let metadata =
            ManifestFile { first_key: vec![0xff, 1], last_key: vec![0xff, 9], ..sample() };
        assert!(!metadata.overlaps(all));
        assert!(sample().overlaps(BandRange { first: Band(40), last: Band(40) }));
    }
}
