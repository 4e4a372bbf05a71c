//! Documents of `vasto keyspace`, except for those of operations.

use serde::Deserialize;

use super::operation::Operation;

/// A keyspace with its placement.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct KeyspaceDescription {
    /// Its name.
    pub name: String,
    /// Number of its shards.
    pub shards: u32,
    /// Number of replicas that a shard should have.
    pub replicas: u32,
    /// Raised by each change of ownership or placement.
    pub epoch: u64,
    /// When a write is acknowledged unless it asks for more: `os`, `fsync`, `replica` or `bucket`.
    pub ack: String,
    /// `active` while it serves.
    pub state: String,
    /// The shards, in their order.
    pub placement: Vec<ShardPlacement>,
    /// The running structural change.
    pub operation: Option<Operation>,
    /// Its id, never reused.
    pub keyspace_id: u64,
    /// Its catalog version.
    pub version: u64,
    /// The time to live of what is written without one, milliseconds.
    pub ttl_ms: Option<u64>,
    /// Moved keys that are kept, unserved, until they are safe to remove.
    pub quarantines: Vec<Quarantine>,
    /// Replicas of shards that have retired; each is kept as long as its quarantine.
    pub retired: Vec<RetiredReplica>,
}

/// A replica of a shard that a shrink has retired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RetiredReplica {
    /// The number of its former shard.
    pub shard: u32,
    /// Its id, unique within the keyspace.
    pub replica_id: u64,
    /// Its node, `n-…`.
    pub node_id: String,
    /// Bytes on disk.
    pub bytes: Option<u64>,
    /// When its quarantine ends, microseconds since 1970.
    pub until_us: Option<u64>,
}

/// The quarantines that keep a keyspace from shrinking.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct QuarantinesLeft {
    /// The name of the keyspace.
    pub keyspace: String,
    /// The number of shards that it is to shrink to.
    pub shards: u32,
    /// Those that are still there; empty once it can shrink.
    pub quarantines: Vec<Quarantine>,
    /// What their end waits for.
    pub waiting_for: Option<String>,
}

/// A shard with its replicas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ShardPlacement {
    /// Its number, from 0.
    pub shard: u32,
    /// Its replicas, in the order of preference, and those that leave.
    pub replicas: Vec<ReplicaStatus>,
}

/// A replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ReplicaStatus {
    /// Its node, `n-…`.
    pub node_id: String,
    /// Its id, unique within the keyspace.
    pub replica_id: u64,
    /// `primary`, `replica` or `leaving`.
    pub role: String,
    /// `serving`, or what keeps it from serving.
    pub state: String,
    /// The last record of its log.
    pub lsn: Option<u64>,
    /// The last record that the bucket holds.
    pub shipped_lsn: Option<u64>,
    /// Its replication lag, milliseconds.
    pub lag_ms: Option<u64>,
    /// As `keys_estimate`: the name of older versions.
    pub keys: Option<u64>,
    /// The estimated number of keys.
    pub keys_estimate: Option<u64>,
    /// Bytes on disk.
    pub bytes: Option<u64>,
    /// Why it is in this state.
    pub reason: Option<String>,
}

/// Moved keys that their sources still keep.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Quarantine {
    /// Ids of the replicas that keep them.
    pub replicas: Vec<u64>,
    /// When it ends, microseconds since 1970.
    pub until_us: Option<u64>,
    /// It has ended, and the replicas remove the keys.
    pub dropping: bool,
}

/// A keyspace in a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct KeyspaceSummary {
    /// Its name.
    pub name: String,
    /// Its id, never reused.
    pub keyspace_id: u64,
    /// Number of its shards.
    pub shards: u32,
    /// Number of replicas that a shard should have.
    pub replicas: u32,
    /// Raised by each change of ownership or placement.
    pub epoch: u64,
    /// When a write is acknowledged unless it asks for more: `os`, `fsync`, `replica` or `bucket`.
    pub ack: String,
    /// `active` while it serves.
    pub state: String,
    /// Its catalog version.
    pub version: u64,
    /// As `keys_estimate`: the name of older versions.
    pub keys: Option<u64>,
    /// The estimated number of keys.
    pub keys_estimate: Option<u64>,
    /// Bytes on disk of one replica of each shard.
    pub bytes: u64,
    /// The id of the running structural change.
    pub operation: Option<String>,
    /// Number of replicas of shards that have retired and are kept for a while.
    pub retired_replicas: u64,
}

/// A keyspace that was deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeletedKeyspace {
    /// Its name, free again.
    pub name: String,
    /// Its id, never reused.
    pub keyspace_id: u64,
    /// Its catalog version.
    pub version: u64,
    /// `deleted`.
    pub state: String,
    /// Everything that was acknowledged is in the bucket.
    pub shipped: bool,
}

/// A replica that was evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EvictedReplica {
    /// The name of the keyspace.
    pub name: String,
    /// The id of the replica.
    pub replica_id: u64,
    /// `draining` or `removed`.
    pub state: String,
    /// The catalog version that says so.
    pub version: u64,
}

/// The nodes that have executed a command for a keyspace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CommandedNodes {
    /// The name of the keyspace.
    pub keyspace: String,
    /// Their ids, `n-…`.
    pub nodes: Vec<String>,
}
