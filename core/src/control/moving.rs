//! Moves of replicas as data of a catalog, and the totals of what has moved.
//!
//! **Invariant:** the JSON is persisted in the bucket: its names never change. An older program that
//! only reads a catalog passes the moves over and makes nothing. An older master that writes one
//! leaves the moves out: what they replace goes on serving, copies that are not placed are lost, and
//! a shard whose new replica is placed has one replica more than it is to have, until one is taken
//! out (`reconcile::trim`).

use serde::{Deserialize, Serialize};

use crate::control::operation::{OperationReport, Reached};
use crate::control::plan::Plan;
use crate::ids::{NodeId, PlanId, ReplicaId, ShardId};

/// A replica that moves to another node: a plan makes one more replica of its shard there, and the
/// replica itself leaves once the new one serves.
///
/// Moves of distinct shards of a keyspace run side by side; none runs beside [`Plan`]s of the
/// keyspace itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaMove {
    /// The plan that adds the new replica. It stays in the step `committed` until the replica that
    /// moves has left.
    pub plan: Plan,
    /// The replica that leaves.
    pub replaces: ReplicaId,
    /// Start time of the rebalance that this move is a part of, microseconds since 1970.
    pub rebalance_us: u64,
}

impl ReplicaMove {
    /// Returns the shard of the replica.
    pub fn shard(&self) -> Option<ShardId> {
        self.plan.targets.first().map(|target| target.shard)
    }

    /// Returns the node that the replica moves to.
    pub fn to(&self) -> Option<NodeId> {
        self.plan.targets.first().map(|target| target.node)
    }

    /// Returns the id of its plan.
    pub fn id(&self) -> PlanId {
        self.plan.id
    }
}

/// Totals of what the last rebalance has moved in a keyspace. Not derived from the finished
/// operations: the catalog forgets those in time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebalanced {
    /// Start time of the rebalance, microseconds since 1970.
    pub since_us: u64,
    /// What has moved.
    #[serde(default)]
    pub moved: Moved,
    /// Moves that failed.
    #[serde(default)]
    pub failed: u64,
    /// Shards that got another preferred primary.
    #[serde(default)]
    pub primaries: u64,
}

impl Rebalanced {
    /// Replaces the totals of an earlier rebalance.
    fn begin(&mut self, rebalance_us: u64) {
        if self.since_us != rebalance_us {
            *self = Self { since_us: rebalance_us, ..Self::default() };
        }
    }

    /// Counts another preferred primary.
    pub(crate) fn count_primary(&mut self, rebalance_us: u64) {
        self.begin(rebalance_us);
        self.primaries += 1;
    }

    /// Counts the end of a move.
    pub(crate) fn count(&mut self, rebalance_us: u64, report: &OperationReport, done: bool) {
        self.begin(rebalance_us);
        match done {
            true => self.moved.add(report),
            false => self.failed += 1,
        }
        // Only restores and recoveries have an end of a log to tell of.
        self.moved.reached.clear();
    }
}

/// Totals of the finished plans that added, moved or recovered a replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Moved {
    /// Replicas that were placed.
    pub copies: u64,
    /// Keys that moved.
    pub keys: u64,
    /// Compressed bytes of the SSTs that these replicas hold for the keys.
    pub bytes: u64,
    /// Body bytes of every GET.
    pub bytes_from_bucket: u64,
    /// Bytes of log records streamed by nodes.
    pub bytes_from_peers: u64,
    /// Number of GETs.
    pub objects_read: u64,
    /// Ends of the logs that were read from the bucket.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<Reached>,
}

impl Moved {
    pub(crate) fn add(&mut self, report: &OperationReport) {
        self.copies += 1;
        self.keys += report.keys_moved;
        self.bytes += report.bytes_moved;
        self.bytes_from_bucket += report.bytes_from_bucket;
        self.bytes_from_peers += report.bytes_from_peers;
        self.objects_read += report.objects_read;
        self.reached.extend(report.reached.iter().copied());
    }
}
