//! Where the replicas of a shard are, in their order of preference, and which one is primary.
//!
//! **Invariant:** the JSON is persisted in the catalog: its names never change.

use serde::{Deserialize, Serialize};

use crate::ids::{NodeId, ReplicaId, ShardId};

/// A replica and its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
}

/// The placed replicas of one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlacement {
    /// The shard.
    pub shard: ShardId,
    /// Its replicas in the order of preference. The first is the preferred primary, and it ships.
    pub replicas: Vec<Placed>,
    /// The current primary, when it is not the first replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<ReplicaId>,
    /// Target of a running leadership transfer: the primary takes no read-modify-writes any more,
    /// and this replica becomes primary once it holds everything that the primary held.
    #[serde(rename = "handing_to", default, skip_serializing_if = "Option::is_none")]
    pub transferring_to: Option<ReplicaId>,
}

impl ShardPlacement {
    /// Creates a placement whose primary is the first replica.
    pub fn new(shard: ShardId, replicas: Vec<Placed>) -> Self {
        Self { shard, replicas, primary: None, transferring_to: None }
    }

    /// Returns the current primary.
    pub fn primary(&self) -> Option<Placed> {
        let acting = self.replicas.iter().find(|member| Some(member.replica) == self.primary);
        acting.or(self.replicas.first()).copied()
    }

    /// Returns the replica that ships: the preferred primary, whichever replica is primary now.
    pub fn shipper(&self) -> Option<Placed> {
        self.replicas.first().copied()
    }

    /// Returns all replicas: the current primary first, the others in the order of preference.
    pub fn primary_first(&self) -> Vec<Placed> {
        let primary = self.primary();
        let others = self.replicas.iter().copied().filter(|member| Some(*member) != primary);
        primary.into_iter().chain(others).collect()
    }
}
