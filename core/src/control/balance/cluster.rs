//! The cluster as the balance sees it: nodes with their room, shards with the sizes of their
//! replicas; and what a move changes.
//!
//! **Invariant:** a replica that is on its way counts on the node that it moves to, and nowhere
//! else, so a move that has been decided is not decided again.

use std::collections::BTreeSet;

use crate::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalanceNode {
    /// The node.
    pub node: NodeId,
    /// Its failure domain.
    pub zone: String,
    /// Bytes of its disk; 0 while they are not known.
    pub capacity: u64,
    /// Bytes that it can still take.
    pub room: u64,
    /// Replicas that it can still take.
    pub places: usize,
    /// Replicas whose making may begin there now.
    pub permits: usize,
    /// The node takes part: it is live, not cordoned and not draining. One that does not neither
    /// gives nor takes.
    pub takes_part: bool,
}

/// A replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalanceReplica {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node, or the one that it is moving to.
    pub node: NodeId,
    /// Its bytes on disk.
    pub bytes: u64,
    /// What it does: requests and records a second.
    pub load: u64,
}

/// When something may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Now.
    Now,
    /// Once what is under way has ended: it belongs to the moves that are still to be made.
    Later,
    /// Nobody knows when: no move of it is waited for.
    Never,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalanceShard {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The shard.
    pub shard: ShardId,
    /// Its replicas in the order of preference.
    pub replicas: Vec<BalanceReplica>,
    /// Further nodes that hold, or are getting, something of it: nothing of it moves there.
    pub elsewhere: Vec<NodeId>,
    /// When its replicas may move.
    pub moves: When,
    /// When another of its replicas may become the preferred primary.
    pub prefers: When,
}

/// The nodes and shards of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Balance {
    /// All nodes that hold replicas or could.
    pub nodes: Vec<BalanceNode>,
    /// All shards of all keyspaces.
    pub shards: Vec<BalanceShard>,
}

/// One step towards the balance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// A replica moves to another node.
    Replica {
        /// The keyspace.
        keyspace: KeyspaceId,
        /// The shard.
        shard: ShardId,
        /// The replica that leaves.
        replica: ReplicaId,
        /// Its node.
        from: NodeId,
        /// The node that gets the new one.
        to: NodeId,
        /// Its bytes.
        bytes: u64,
    },
    /// Another replica of a shard becomes the preferred primary; nothing moves, but it ships from
    /// then on, beginning with a checkpoint.
    Primary {
        /// The keyspace.
        keyspace: KeyspaceId,
        /// The shard.
        shard: ShardId,
        /// The replica that becomes the preferred primary.
        replica: ReplicaId,
        /// The node of the present one.
        from: NodeId,
        /// Its own node.
        to: NodeId,
        /// The bytes of the checkpoint.
        bytes: u64,
    },
}

impl Balance {
    /// Returns the position of a node.
    pub(super) fn position(&self, node: NodeId) -> Option<usize> {
        self.nodes.iter().position(|other| other.node == node)
    }

    /// Returns the zone of a node; `None` of one that is not known.
    pub(super) fn zone(&self, node: NodeId) -> Option<&str> {
        self.nodes.iter().find(|other| other.node == node).map(|node| node.zone.as_str())
    }

    /// Returns the number of zones that these nodes are in. A node that is not known is in a zone of
    /// its own.
    pub(super) fn zones(&self, nodes: impl Iterator<Item = NodeId>) -> usize {
        let mut zones: BTreeSet<&str> = BTreeSet::new();
        let mut unknown = 0;
        for node in nodes {
            match self.zone(node) {
                Some(zone) => {
                    zones.insert(zone);
                }
                None => unknown += 1,
            }
        }
        zones.len() + unknown
    }

    /// Carries out a move in this picture, as if it had ended.
    pub(super) fn apply(&mut self, made: &Move) {
        let (keyspace, number) = match *made {
            Move::Replica { keyspace, shard, .. } | Move::Primary { keyspace, shard, .. } => {
                (keyspace, shard)
            }
        };
        let shard = self
            .shards
            .iter_mut()
            .find(|shard| (shard.keyspace, shard.shard) == (keyspace, number));
        let Some(shard) = shard else { return };
        match *made {
            Move::Replica { replica, from, to, bytes, .. } => {
                let Some(at) = shard.replicas.iter().position(|one| one.replica == replica) else {
                    return;
                };
                // The new replica comes last in the order of preference; what the primary alone does
                // goes with the role.
                let loads = shard.replicas.iter().map(|one| one.load);
                let loads: Vec<u64> = loads.collect();
                let moved = shard.replicas.remove(at);
                shard.replicas.push(BalanceReplica { node: to, ..moved });
                if at == 0 && loads.len() > 1 {
                    let last = shard.replicas.len() - 1;
                    (shard.replicas[0].load, shard.replicas[last].load) = (loads[0], loads[1]);
                }
                for node in &mut self.nodes {
                    if node.node == to {
                        node.room = node.room.saturating_sub(bytes);
                        node.places = node.places.saturating_sub(1);
                        node.permits = node.permits.saturating_sub(1);
                    } else if node.node == from {
                        node.room = node.room.saturating_add(bytes);
                        node.places += 1;
                    }
                }
            }
            Move::Primary { replica, .. } => {
                let Some(at) = shard.replicas.iter().position(|one| one.replica == replica) else {
                    return;
                };
                let (first, second) = (shard.replicas[0].load, shard.replicas[at].load);
                shard.replicas.swap(0, at);
                // What the primary alone does goes with the role.
                (shard.replicas[0].load, shard.replicas[at].load) = (first, second);
            }
        }
    }
}
