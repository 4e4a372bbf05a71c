//! Documents of structural changes: the plan of one, its progress, and its report.

use std::fmt;

use serde::Deserialize;

/// The state of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OperationState {
    /// The operation is in progress.
    Running,
    /// The operation stands still at somebody's request.
    Paused,
    /// The operation is done.
    Done,
    /// The operation was aborted; nothing has changed.
    Aborted,
    /// A state that only a later version of the master has; its name is kept.
    #[serde(untagged)]
    Other(String),
}

impl OperationState {
    /// Returns true before the end of an operation.
    pub fn is_under_way(&self) -> bool {
        matches!(self, OperationState::Running | OperationState::Paused)
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OperationState::Running => "running",
            OperationState::Paused => "paused",
            OperationState::Done => "done",
            OperationState::Aborted => "aborted",
            OperationState::Other(name) => name,
        })
    }
}

/// A snapshot of a structural change. Figures that are not known at that time are `None`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Operation {
    /// For [`Vasto::show_operation`](crate::Vasto::show_operation) and
    /// [`Vasto::cancel_operation`](crate::Vasto::cancel_operation).
    pub id: String,
    /// Its state.
    pub state: OperationState,
    /// `grow`, `shrink`, `restore`, `replace`, `rebalance` and others.
    pub kind: Option<String>,
    /// The name of the keyspace; several, separated by commas, of an operation on a node.
    pub keyspace: Option<String>,
    /// The number of shards before, or the node that is emptied.
    pub from: Option<ShardsOrNode>,
    /// The number of shards after, or the node that takes the replicas, if it was named.
    pub to: Option<ShardsOrNode>,
    /// The current step, while it runs.
    pub step: Option<String>,
    /// Cause of the step's wait.
    pub waiting_for: Option<String>,
    /// Bytes that the step has moved, while it runs: those that the sources export, or those that
    /// the targets read.
    pub bytes_done: Option<u64>,
    /// Bytes that the step has to move, as far as that is known; while it runs.
    pub bytes_total: Option<u64>,
    /// Bytes a second of the last seconds, while it runs.
    pub rate: Option<u64>,
    /// Seconds until the bytes of the step are done, at that rate.
    pub seconds_left: Option<u64>,
    /// Upper bound of the rate, bytes a second.
    pub max_rate: Option<u64>,
    /// Attempts of its parts that failed and were repeated, and seals that were undone.
    pub retries: Option<u64>,
    /// Why the last attempt failed, while it is repeated.
    pub last_error: Option<String>,
    /// Why it does not go on, and what to do.
    pub trouble: Option<OperationTrouble>,
    /// Nodes on which it is held back because requests would take longer than they should.
    #[serde(default)]
    pub yields_on: Vec<String>,
    /// The replicas that give, while it runs.
    #[serde(default)]
    pub sources: Vec<OperationSource>,
    /// The replicas that receive, while it runs.
    #[serde(default)]
    pub targets: Vec<OperationTarget>,
    /// Why it was aborted.
    pub reason: Option<String>,
    /// When it started, microseconds since 1970.
    pub started_at_us: Option<u64>,
    /// Time from start to end, milliseconds.
    pub duration_ms: Option<u64>,
    /// Keys that have moved, not counting the tail.
    pub keys_moved: Option<u64>,
    /// Bytes of the SSTs that the targets hold for the moved keys, compressed.
    pub bytes_moved: Option<u64>,
    /// Body bytes of all GETs.
    pub bytes_from_bucket: Option<u64>,
    /// Bytes of log records that nodes streamed.
    pub bytes_from_peers: Option<u64>,
    /// Number of GETs.
    pub objects_read: Option<u64>,
    /// Time for which writes of moving keys waited.
    pub write_pause_ms: Option<WritePauseMs>,
    /// Number of replicas that have left the node that is emptied, or that a rebalance has moved.
    pub replicas_moved: Option<u64>,
    /// Number of replicas that are still on it, or are still to move.
    pub replicas_left: Option<u64>,
    /// Number of shards to which a rebalance gave another preferred primary.
    pub primaries_moved: Option<u64>,
    /// Number of moves of a rebalance that failed.
    pub moves_failed: Option<u64>,
    /// The cluster was in balance when the rebalance was asked for: nothing moves.
    pub balanced: Option<bool>,
    /// Of a restore: nodes that could not ship what they alone hold.
    #[serde(default)]
    pub without: Vec<AbsentNode>,
    /// Ends of the logs that were read from the bucket; later records are missing from the result.
    #[serde(default)]
    pub reached: Vec<ReachedLog>,
    /// What was estimated before it began.
    pub estimate: Option<OperationEstimate>,
}

/// What was estimated of an operation before it began, beside what has happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct OperationEstimate {
    /// Of [`Operation::bytes_moved`].
    pub bytes_moved: u64,
    /// Of [`Operation::bytes_from_bucket`].
    pub bytes_from_bucket: u64,
    /// Of [`Operation::objects_read`].
    pub objects_read: u64,
    /// Number of PUTs.
    pub objects_written: u64,
    /// Of [`Operation::duration_ms`], milliseconds.
    pub duration_ms: u64,
}

/// Why an operation does not go on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct OperationTrouble {
    /// How long that has lasted, milliseconds.
    pub since_ms: u64,
    /// What holds it up.
    pub what: String,
    /// What to do.
    pub next: String,
}

/// A replica that gives in a running operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct OperationSource {
    /// Its shard.
    pub shard: u32,
    /// Its node, `n-…`.
    pub node_id: String,
    /// It has made what the targets take.
    pub prepared: bool,
    /// Bytes of its export that are in the bucket.
    pub bytes_done: u64,
    /// Bytes of its export, as far as they are known; 0 when there is none.
    pub bytes_total: u64,
    /// Attempts that failed and were repeated.
    pub retries: u64,
    /// Why the last attempt failed, while it is repeated.
    pub last_error: Option<String>,
}

/// A replica that receives in a running operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct OperationTarget {
    /// Its shard.
    pub shard: u32,
    /// Its node, `n-…`.
    pub node_id: String,
    /// What it does: `downloading`, `rewriting`, `tailing`, `open`; `None` before it begins.
    pub stage: Option<String>,
    /// Bytes that it has taken from the bucket.
    pub bytes_done: u64,
    /// Bytes that it takes, as far as they are known.
    pub bytes_total: u64,
    /// Attempts that failed and were repeated.
    pub retries: u64,
    /// Why the last attempt failed, while it is repeated.
    pub last_error: Option<String>,
}

/// Subject of an operation: the number of shards of a keyspace, or the node whose replicas move or
/// that takes them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum ShardsOrNode {
    /// A number of shards.
    Shards(u32),
    /// The id of a node, `n-…`.
    Node(String),
}

impl fmt::Display for ShardsOrNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShardsOrNode::Shards(shards) => shards.fmt(f),
            ShardsOrNode::Node(id) => id.fmt(f),
        }
    }
}

/// Percentiles of the time for which writes of moving keys waited, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct WritePauseMs {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

/// A node that did not get a command, or whose replica has failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AbsentNode {
    /// Its id, `n-…`.
    pub node_id: String,
    /// The shards of which it holds replicas.
    pub shards: Vec<u32>,
}

/// The end of a log in the bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ReachedLog {
    /// The shard.
    pub shard: u32,
    /// The replica that wrote the log.
    pub replica: u64,
    /// The last record of it that was read.
    pub lsn: u64,
}

/// What a structural change would move and take, by estimates.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ChangePlan {
    /// The name of the keyspace; several, separated by commas, of a change of a node.
    pub keyspace: String,
    /// `grow`, `shrink`, `restore` or `replace`.
    pub kind: String,
    /// The number of shards before, or the node that is emptied.
    pub from: Option<ShardsOrNode>,
    /// The number of shards after, or the node that takes the replicas, if it was named.
    pub to: Option<ShardsOrNode>,
    /// Of a resize: the share of the keys that move, in `0.0..=1.0`.
    pub moving_fraction: f64,
    /// The shards that bytes come from.
    pub sources: Vec<ChangeSource>,
    /// Compressed bytes that the targets hold of what moves.
    pub bytes_moved: u64,
    /// Bytes that are read from the bucket.
    pub bytes_from_bucket: u64,
    /// Requests to the bucket.
    pub requests: ChangeRequests,
    /// Disk that nodes need while it runs.
    pub disk_needed: Vec<NodeDisk>,
    /// How long it takes.
    pub seconds: f64,
    /// What the bucket's provider charges for it, at the configured prices.
    pub cost: ChangeCost,
    /// Why the change would be refused now; `None` when it would begin.
    pub refused: Option<String>,
}

/// What a rebalance would move and take, by estimates.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RebalancePlan {
    /// `rebalance`.
    pub kind: String,
    /// The cluster is in balance: nothing would move.
    pub balanced: bool,
    /// The replicas that move, in their order.
    pub moves: Vec<PlannedMove>,
    /// The replicas that become preferred primaries.
    pub primaries: Vec<PlannedMove>,
    /// What is read of each shard.
    pub sources: Vec<RebalanceSource>,
    /// Bytes of the replicas that move, compressed.
    pub bytes_moved: u64,
    /// Bytes that are read from the bucket.
    pub bytes_from_bucket: u64,
    /// Requests to the bucket.
    pub requests: ChangeRequests,
    /// Disk that nodes need for it.
    pub disk_needed: Vec<NodeDisk>,
    /// How long it takes.
    pub seconds: f64,
    /// What the bucket's provider charges for it, at the configured prices.
    pub cost: ChangeCost,
    /// Why it would be refused now; `None` when it would begin.
    pub refused: Option<String>,
}

/// A step of a rebalance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PlannedMove {
    /// The name of the keyspace.
    pub keyspace: String,
    /// The shard.
    pub shard: u32,
    /// The replica that moves, or becomes the preferred primary.
    pub replica_id: u64,
    /// The node that gives it, or the role, away, `n-…`.
    pub from: String,
    /// The node that gets it, `n-…`.
    pub to: String,
    /// The bytes of the replica.
    pub bytes: u64,
}

/// What a rebalance reads of one shard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RebalanceSource {
    /// The name of the keyspace.
    pub keyspace: String,
    /// The shard.
    pub shard: u32,
    /// The node that has shipped it, `n-…`.
    pub node_id: String,
    /// The bytes that are read.
    pub bytes: u64,
}

/// Requests to the bucket that a change sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ChangeRequests {
    /// Requests that read.
    pub get: u64,
    /// Requests that write.
    pub put: u64,
}

/// Disk that a node needs while a change runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeDisk {
    /// Its id, `n-…`.
    pub node_id: String,
    /// The bytes that it needs.
    pub bytes: u64,
    /// The bytes that are free there, as far as that is known.
    pub free: Option<u64>,
}

/// What a change costs.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ChangeCost {
    /// The currency, as configured.
    pub currency: String,
    /// The amount.
    pub amount: f64,
}

/// Share of one shard in a change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ChangeSource {
    /// The name of its keyspace.
    pub keyspace: String,
    /// Its number.
    pub shard: u32,
    /// The node that gives the bytes, `n-…`; `None` when the bucket alone has them.
    pub node_id: Option<String>,
    /// The estimated number of its keys.
    pub keys: u64,
    /// Its bytes on disk.
    pub bytes: u64,
    /// Bytes that must be read of it.
    pub bytes_to_read: u64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn documents_of_the_master() {
        let read = |json: &str| serde_json::from_str::<Operation>(json);
        let aborted =
            read(r#"{"id":"op-1-1","state":"aborted","reason":"cancelled","more":[1]}"#).unwrap();
        assert_eq!((aborted.id.as_str(), aborted.state), ("op-1-1", OperationState::Aborted));
        assert_eq!(aborted.reason.as_deref(), Some("cancelled"));
        let paused = read(r#"{"id":"a","state":"paused"}"#).unwrap();
        assert_eq!(paused.state, OperationState::Paused);
        let later = read(r#"{"id":"a","state":"resting"}"#).unwrap();
        assert_eq!(
            (later.state.to_string().as_str(), later.state),
            ("resting", OperationState::Other("resting".into()))
        );
        for bad in ["", "{}", r#"{"id":"a"}"#, r#"{"id":"a","state":1}"#, "[]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_operation_is_on_shards_or_on_a_node() {
        let read = |json: &str| serde_json::from_str::<Operation>(json).unwrap();
        let grow = read(r#"{"id":"op-1-1","state":"running","from":2,"to":3,"step":"tail"}"#);
        assert_eq!(
            (grow.from, grow.to),
            (Some(ShardsOrNode::Shards(2)), Some(ShardsOrNode::Shards(3)))
        );
        let replace = read(r#"{"id":"node-n-1-2","state":"running","from":"n-1","to":null}"#);
        assert_eq!((replace.from, replace.to), (Some(ShardsOrNode::Node("n-1".to_owned())), None));
    }
}
