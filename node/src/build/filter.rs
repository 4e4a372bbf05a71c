//! The entries of another shard's log that belong to a shard.

use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_core::record::{Body, KeyEntry, Record};

/// The shard whose entries are taken from a log.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShardFilter {
    /// The shard ...
    pub shard: ShardId,
    /// ... of this many.
    pub shards: u32,
}

impl ShardFilter {
    /// Returns the entries of a record that belong to the shard.
    pub(super) fn pick(&self, record: Record) -> Vec<KeyEntry> {
        let Body::Data { entries, .. } = record.body else { return Vec::new() };
        entries
            .into_iter()
            .filter(|row| {
                let own = Entry::decode(&row.entry).ok().and_then(|entry| entry.partition_hash);
                jump(own.unwrap_or_else(|| partition_hash(&row.key)), self.shards).shard
                    == self.shard
            })
            .collect()
    }
}
