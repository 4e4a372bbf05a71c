//! Replicas that leave a keyspace, and the nodes that are drained of them, as data of a catalog.
//!
//! **Invariant:** the JSON is persisted in the catalog: its names never change.

use serde::{Deserialize, Serialize};

use crate::control::estimate::Estimate;
use crate::control::moving::Moved;
use crate::ids::{CatalogVersion, NodeId, PlanId, ReplicaId, ShardId};

/// A replica that left the placement while it may hold writes that no other member has: it is
/// drained once its node is there, and nothing is collected before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingReplica {
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Time at which the replica left, microseconds since 1970.
    pub since_us: u64,
}

/// A replica of a shard that a shrink has retired. It serves nothing any more; from the end of the
/// plan to the end of its quarantine only its files are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetiredReplica {
    /// Its former shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// The plan that retired the shard.
    pub plan: PlanId,
}

/// A node that is drained of all its replicas of the keyspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDrain {
    /// The node.
    pub node: NodeId,
    /// Node that receives the replicas; `None` for any node with room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<NodeId>,
    /// The node may be gone: data that it alone holds is taken from the bucket, without waiting for
    /// the node.
    #[serde(default)]
    pub replace: bool,
    /// Start time, microseconds since 1970; forms the operation id together with the node.
    pub since_us: u64,
    /// If the node is gone, data that it alone holds is given up once everything that it had
    /// shipped was recovered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_loss: bool,
    /// Totals moved since the start. Not derived from the finished operations: the catalog forgets
    /// those in time.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub moved: Moved,
    /// What was estimated of the drain in this keyspace when it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// The drain stands still at an administrator's request: nothing more of it begins, and it
    /// changes no placement.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Upper bound of the bulk bytes of all copies of the drain together, in every keyspace, bytes
    /// a second; `None` sets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u64>,
}

fn is_nothing(moved: &Moved) -> bool {
    *moved == Moved::default()
}

impl NodeDrain {
    /// Creates the drain of a node, beginning at `since_us`.
    pub fn new(node: NodeId, replace: bool, since_us: u64) -> Self {
        Self {
            node,
            to: None,
            replace,
            since_us,
            accept_loss: false,
            moved: Moved::default(),
            estimate: None,
            paused: false,
            max_rate: None,
        }
    }

    /// Returns the id of the operation that drains the node, the same in every keyspace.
    pub fn operation_id(&self) -> String {
        format!("node-{}-{}", self.node, self.since_us)
    }
}

/// A replica whose loss was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// The replica.
    pub replica: ReplicaId,
    /// Catalog version that accepted the loss: anything made under it or a later version needs
    /// nothing of the replica.
    pub version: CatalogVersion,
}
