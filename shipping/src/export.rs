//! The manifest of an export: the rows that a source of a resize gives away, in one table or more
//! for each shard that receives them.
//!
//! **Invariant:** the manifest is written after every table that it names was uploaded and verified,
//! and never changed. A decoded manifest names tables of its own export only, none of them twice.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vasto_core::{KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};

use crate::envelope::{self, EnvelopeError};
use crate::layout::{self, Exported};

const KIND: &str = "export";

/// What one source of a plan exports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportManifest {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The plan.
    pub plan: PlanId,
    /// The source's shard.
    pub shard: ShardId,
    /// The source.
    pub replica: ReplicaId,
    /// LSN up to which the tables cover the source's log: tails start after it.
    pub lsn: Lsn,
    /// The source's gc floor, a commit time in microseconds.
    pub floor: u64,
    /// Greatest event time in the tables, microseconds.
    pub event_time_max: u64,
    /// The tables; those for one shard in the order of their keys within each band.
    pub files: Vec<ExportedTable>,
}

/// One SST of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedTable {
    /// The shard that receives its rows. They keep the stored keys of the source: the targets give them
    /// their new bands.
    pub to: ShardId,
    /// Full object key.
    pub key: String,
    /// Size.
    pub bytes: u64,
    /// CRC-32C of the whole.
    pub crc32c: u32,
    /// Rows, tombstones included.
    pub rows: u64,
}

impl ExportManifest {
    /// Encodes the object's bytes.
    pub fn encode(&self) -> Bytes {
        envelope::encode(KIND, self)
    }

    /// Decodes and checks an object's bytes.
    ///
    /// # Errors
    /// Damage, another kind of document, one of a newer version, or tables that are not of this
    /// export.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let manifest: Self = envelope::decode(KIND, bytes)?;
        match manifest.odd_table() {
            None => Ok(manifest),
            Some(detail) => Err(EnvelopeError::Malformed { kind: KIND, detail }),
        }
    }

    /// Returns true when this is the content of the object under this key.
    pub fn is_at(&self, key: &str) -> bool {
        let own = Exported::Manifest { from: self.shard };
        layout::parse_exported(key) == Some((self.keyspace, self.plan, own))
    }

    /// Returns the tables for a shard, in the manifest's order.
    pub fn tables_for(&self, to: ShardId) -> impl Iterator<Item = &ExportedTable> {
        self.files.iter().filter(move |table| table.to == to)
    }

    /// Returns what is wrong with the first table that is not of this export, or named twice.
    fn odd_table(&self) -> Option<String> {
        let mut seen = BTreeSet::new();
        self.files.iter().find_map(|table| {
            let own = Exported::Table { from: self.shard, to: table.to };
            if layout::parse_exported(&table.key) != Some((self.keyspace, self.plan, own)) {
                let key: String = table.key.chars().take(200).collect();
                return Some(format!("{key} is no table of this export for shard {}", table.to));
            }
            (!seen.insert(table.key.as_str())).then(|| format!("{} is named twice", table.key))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn any_manifest() -> impl Strategy<Value = ExportManifest> {
        let table = (any::<[u64; 2]>(), 0u32..3, any::<u32>(), "[0-9a-f]{1,16}");
        (any::<[u64; 6]>(), any::<u32>(), proptest::collection::vec(table, 0..5)).prop_map(
            |(n, shard, tables)| {
                let (keyspace, plan, shard) = (KeyspaceId(n[0]), PlanId(n[1]), ShardId(shard));
                let mut files = Vec::new();
                for ([bytes, rows], to, crc32c, attempt) in tables {
                    let (to, at) = (ShardId(to), files.len() as u64);
                    let key = layout::export_table(keyspace, plan, shard, to, at, &attempt);
                    files.push(ExportedTable { to, key, bytes, crc32c, rows });
                }
                ExportManifest {
                    keyspace,
                    plan,
                    shard,
                    replica: ReplicaId(n[2]),
                    lsn: Lsn(n[3]),
                    floor: n[4],
                    event_time_max: n[5],
                    files,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn round_trip(manifest in any_manifest()) {
            prop_assert_eq!(ExportManifest::decode(&manifest.encode()).unwrap(), manifest);
        }

        #[test]
        fn any_altered_bit_is_found(manifest in any_manifest(), position: usize, bit in 0u8..8) {
            let mut bytes = manifest.encode().to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(ExportManifest::decode(&bytes).is_err());
        }

        #[test]
        fn decoding_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(ExportManifest::decode(&bytes).is_err());
        }

        // The checksum hides the body from random bytes: the test puts random bodies behind a right
        // one.
        #[test]
        fn the_body_decoder_is_total(text in r#"[\[\]{}",:a-z0-9]{0,60}"#, key in "[-/.a-z0-9é]{0,300}") {
            if let Ok(body) = serde_json::from_str::<serde_json::Value>(&text) {
                prop_assert!(ExportManifest::decode(&envelope::encode(KIND, &body)).is_err());
            }
            let mut manifest = sample();
            manifest.files[0].key = key;
            prop_assert!(ExportManifest::decode(&manifest.encode()).is_err());
        }

        // Every table is for exactly one shard, and the order is kept.
        #[test]
        fn tables_are_sorted_by_the_shard_that_receives_them(manifest in any_manifest()) {
            let mut count = 0;
            for to in (0..3).map(ShardId) {
                let tables: Vec<&ExportedTable> = manifest.tables_for(to).collect();
                prop_assert!(tables.iter().all(|table| table.to == to));
                prop_assert!(tables.iter().map(|table| number_in(&table.key)).is_sorted());
                count += tables.len();
            }
            prop_assert_eq!(count, manifest.files.len());
        }
    }

    /// The number that a table has in its key.
    fn number_in(key: &str) -> String {
        key.rsplit('/').next().unwrap().split('-').next().unwrap().to_owned()
    }

    fn sample() -> ExportManifest {
        let (keyspace, plan, shard, to) = (KeyspaceId(1), PlanId(2), ShardId(3), ShardId(4));
        let table = |n| ExportedTable {
            to,
            key: layout::export_table(keyspace, plan, shard, to, n, "ab"),
            bytes: 1,
            crc32c: 2,
            rows: 3,
        };
        ExportManifest {
            keyspace,
            plan,
            shard,
            replica: ReplicaId(5),
            lsn: Lsn(6),
            floor: 7,
            event_time_max: 8,
            files: vec![table(1), table(2)],
        }
    }

    #[test]
    fn tables_of_another_export_and_tables_named_twice_are_refused() {
        let refused = |alter: fn(&mut ExportManifest)| {
            let mut manifest = sample();
            alter(&mut manifest);
            ExportManifest::decode(&manifest.encode()).unwrap_err().to_string()
        };
        assert!(ExportManifest::decode(&sample().encode()).is_ok());
        for alter in [
            (|manifest| manifest.keyspace = KeyspaceId(9)) as fn(&mut ExportManifest),
            |manifest| manifest.plan = PlanId(9),
            |manifest| manifest.shard = ShardId(9),
            |manifest| manifest.files[1].to = ShardId(9),
            |manifest| {
                let (keyspace, plan, shard) = (manifest.keyspace, manifest.plan, manifest.shard);
                manifest.files[1].key = layout::export_manifest(keyspace, plan, shard, "ab");
            },
        ] {
            let error = refused(alter);
            assert!(error.contains("is no table of this export"), "{error}");
        }
        let error = refused(|manifest| manifest.files[1].key = manifest.files[0].key.clone());
        assert!(error.contains("is named twice"), "{error}");
    }

    #[test]
    fn a_manifest_knows_its_own_key() {
        let manifest = sample();
        let at = |keyspace, plan, shard| {
            manifest.is_at(&layout::export_manifest(
                KeyspaceId(keyspace),
                PlanId(plan),
                ShardId(shard),
                "cd",
            ))
        };
        assert!(at(1, 2, 3));
        assert!(!at(9, 2, 3) && !at(1, 9, 3) && !at(1, 2, 9));
        assert!(!manifest.is_at(&manifest.files[0].key) && !manifest.is_at(""));
    }
}
