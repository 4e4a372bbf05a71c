//! The spec of a keyspace: the settings that its owner chooses.
//!
//! **Invariant:** the JSON of a spec is persisted in the catalog: its names never change.

use serde::{Deserialize, Serialize};

/// Acknowledgement level: the condition under which a write is acknowledged.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Ack {
    /// The operating system has the write: it survives a crash of the process, not a power loss.
    Os,
    /// The write is synced to the disk (group commit).
    #[default]
    Fsync,
    /// One more replica has synced the write.
    Replica,
    /// A chunk in the bucket covers the write.
    Bucket,
}

/// Error for text that names no acknowledgement level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an acknowledgement level; use os, fsync, replica or bucket")]
pub struct NotAnAck(pub String);

impl std::str::FromStr for Ack {
    type Err = NotAnAck;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "os" => Ack::Os,
            "fsync" => Ack::Fsync,
            "replica" => Ack::Replica,
            "bucket" => Ack::Bucket,
            other => return Err(NotAnAck(other.to_owned())),
        })
    }
}

impl std::fmt::Display for Ack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Ack::Os => "os",
            Ack::Fsync => "fsync",
            Ack::Replica => "replica",
            Ack::Bucket => "bucket",
        })
    }
}

/// Settings of a keyspace, chosen by its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyspaceSpec {
    /// Number of shards; a legal count.
    pub shards: u32,
    /// Replication factor: number of replicas of each shard.
    pub replicas: u32,
    /// Default acknowledgement level.
    pub ack: Ack,
    /// Default time to live of values, milliseconds.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
    /// Time for which a moved range stays on its old shard, milliseconds.
    pub quarantine_ms: u64,
    /// Minimum time for which tombstones are kept, milliseconds; `None` is
    /// [`TOMBSTONE_GRACE`](crate::limits::TOMBSTONE_GRACE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tombstone_grace_ms: Option<u64>,
}

impl Default for KeyspaceSpec {
    fn default() -> Self {
        Self {
            shards: 1,
            replicas: 1,
            ack: Ack::Fsync,
            ttl_ms: None,
            quarantine_ms: crate::limits::QUARANTINE.as_millis() as u64,
            tombstone_grace_ms: None,
        }
    }
}

impl KeyspaceSpec {
    /// Returns the minimum time for which tombstones are kept, milliseconds.
    pub fn grace_ms(&self) -> u64 {
        self.tombstone_grace_ms.unwrap_or(crate::limits::TOMBSTONE_GRACE.as_millis() as u64)
    }
}
