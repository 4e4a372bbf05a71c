//! Operation reports: how structural changes ended, as `vasto operation show` prints it.
//!
//! **Invariant:** the JSON of a report is persisted in the catalog and is part of the interface:
//! its names never change.

use serde::{Deserialize, Serialize};

use crate::control::estimate::Estimate;
use crate::control::plan::PlanKind;
use crate::control::report::PauseMs;
use crate::ids::{KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};

/// Kind of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// More shards.
    Grow,
    /// Fewer shards.
    Shrink,
    /// One more replica of a shard, from a live one.
    #[serde(rename = "replica")]
    AddReplica,
    /// One more replica of a shard, from the bucket alone.
    #[serde(rename = "takeover")]
    RecoverReplica,
    /// A new keyspace from what the bucket holds of another one.
    Restore,
    /// A node is drained of its replicas.
    #[serde(rename = "replace")]
    DrainNode,
    /// A replica moves to another node.
    Move,
    /// A kind that only a later version knows; its name is kept.
    #[serde(untagged)]
    Other(String),
}

impl From<PlanKind> for OperationKind {
    fn from(kind: PlanKind) -> Self {
        match kind {
            PlanKind::Grow { .. } => OperationKind::Grow,
            PlanKind::Shrink { .. } => OperationKind::Shrink,
            PlanKind::AddReplica { .. } => OperationKind::AddReplica,
            PlanKind::RecoverReplica { .. } => OperationKind::RecoverReplica,
            PlanKind::Restore { .. } => OperationKind::Restore,
        }
    }
}

/// Outcome of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationOutcome {
    /// The operation took effect.
    Done,
    /// The operation was undone; nothing changed.
    Aborted,
}

/// A finished operation, as `vasto keyspace resize` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationReport {
    /// `op-<keyspace id>-<plan id>`.
    pub id: String,
    /// Its kind.
    pub kind: OperationKind,
    /// Name of the keyspace.
    pub keyspace: String,
    /// Shards before.
    pub from: u32,
    /// Shards after.
    pub to: u32,
    /// Its outcome.
    pub outcome: OperationOutcome,
    /// Reason of the abort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Keys that moved, not counting the tail.
    pub keys_moved: u64,
    /// Compressed bytes of the SSTs that the targets hold for them.
    pub bytes_moved: u64,
    /// Body bytes of all GETs of the operation.
    pub bytes_from_bucket: u64,
    /// Bytes of log records streamed by nodes.
    pub bytes_from_peers: u64,
    /// GETs of the operation.
    pub objects_read: u64,
    /// Time for which writes of moving keys waited.
    pub write_pause_ms: PauseMs,
    /// Time from start to finish, milliseconds.
    pub duration_ms: u64,
    /// Start time, microseconds since 1970.
    pub started_at_us: u64,
    /// Ends of the logs that were read from the bucket.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<Reached>,
    /// Replicas that were placed, of an operation that places several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub copies: u64,
    /// The shard, of an operation on a single one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardId>,
    /// Nodes on which the operation failed: the next attempt is made elsewhere, if possible.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_on: Vec<NodeId>,
    /// What was estimated before it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
}

impl Eq for OperationReport {}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl OperationReport {
    /// Returns true when the operation made, or was to make, one more member of a shard.
    pub fn is_copy(&self) -> bool {
        matches!(self.kind, OperationKind::AddReplica | OperationKind::RecoverReplica)
    }

    /// Returns true when the operation moved, or was to move, a replica to another node.
    pub fn is_move(&self) -> bool {
        self.kind == OperationKind::Move
    }

    /// Returns the end time, microseconds since 1970.
    pub fn ended_at_us(&self) -> u64 {
        self.started_at_us.saturating_add(self.duration_ms.saturating_mul(1000))
    }
}

/// The end of a log in the bucket: later records are not in the replica that was made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The shard.
    pub shard: ShardId,
    /// The replica that wrote the log.
    pub replica: ReplicaId,
    /// The last record of it that was read.
    pub lsn: Lsn,
}

/// Returns the id of an operation, as people and scripts see it.
pub fn operation_id(keyspace: KeyspaceId, plan: PlanId) -> String {
    format!("op-{keyspace}-{plan}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn kinds_keep_their_persisted_names_and_those_of_later_versions() {
        for (kind, name) in [
            (OperationKind::Grow, "grow"),
            (OperationKind::Shrink, "shrink"),
            (OperationKind::AddReplica, "replica"),
            (OperationKind::RecoverReplica, "takeover"),
            (OperationKind::Restore, "restore"),
            (OperationKind::DrainNode, "replace"),
            (OperationKind::Move, "move"),
            (OperationKind::Other("of_a_later_version".into()), "of_a_later_version"),
        ] {
            let text = serde_json::to_string(name).unwrap();
            assert_eq!(serde_json::to_string(&kind).unwrap(), text);
            assert_eq!(serde_json::from_str::<OperationKind>(&text).unwrap(), kind);
        }
    }
}
