//! Liveness of nodes, as failover and repair see it: here, away, or gone (until it comes back).
//!
//! **Invariant:** a node is gone after `FAILOVER_AWAY` without a session. One that has not
//! registered since the master started may still come: its time away counts from that start, and it
//! is gone only after `master.node_silence`.
//!
//! All times (`mono_us`) are microseconds since the master started.

use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::limits::{FAILOVER_AWAY, NODE_FORGOTTEN_AFTER, NODE_SILENCE};
use vasto_core::reconcile::{Presence, is_unsettled};

use super::ClusterState;

impl ClusterState {
    /// Returns how long a node has been unreachable, microseconds; 0 for a live node. The time of a
    /// node that has not come back since the master started counts from that start.
    pub(crate) fn away_us(&self, node: NodeId, mono_us: u64) -> u64 {
        match self.nodes.get(&node) {
            Some(node) if node.is_live() => 0,
            Some(node) => mono_us.saturating_sub(node.away_since_us).max(1),
            None => mono_us.max(1),
        }
    }

    /// Returns the presence of a node. A node that has not registered since the master started may
    /// still come: it counts as gone only after `master.node_silence`.
    pub(crate) fn presence(&self, node: NodeId, mono_us: u64) -> Presence {
        let (away_us, timeout) = match self.nodes.get(&node) {
            Some(node) if node.is_live() => {
                return Presence::Here(mono_us.saturating_sub(node.here_since_us));
            }
            Some(node) => (mono_us.saturating_sub(node.away_since_us), FAILOVER_AWAY),
            None => (mono_us, self.node_silence.unwrap_or(NODE_SILENCE)),
        };
        if away_us >= timeout.as_micros() as u64 { Presence::Gone } else { Presence::Away }
    }

    /// Returns the nodes besides this one that are gone. Asked at every report of every node: it looks
    /// at nodes, and not at the keyspaces that they may share.
    pub(crate) fn gone_besides(&self, node: NodeId, mono_us: u64) -> Vec<NodeId> {
        let others = self.known_nodes().into_iter().filter(|other| *other != node);
        others.filter(|other| self.presence(*other, mono_us) == Presence::Gone).collect()
    }

    /// Returns true when the primaries of the keyspace must be checked soon.
    pub(crate) fn is_unsettled(&self, keyspace: KeyspaceId, mono_us: u64) -> bool {
        let keyspace = self.keyspaces.get(&keyspace);
        keyspace.is_some_and(|keyspace| {
            is_unsettled(&keyspace.catalog, |node| self.presence(node, mono_us))
        })
    }

    /// Forgets nodes that have been away for long, unless a catalog refers to them.
    pub(super) fn forget_nodes(&mut self, mono_us: u64) {
        let timeout = NODE_FORGOTTEN_AFTER.as_micros() as u64;
        let is_referenced = |id: NodeId| {
            self.loads.of(id).replicas > 0
                || self.active().any(|keyspace| {
                    keyspace.catalog.draining_nodes.iter().any(|drain| drain.node == id)
                })
        };
        let forgotten: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(_, node)| {
                !node.is_live() && mono_us.saturating_sub(node.away_since_us) >= timeout
            })
            .map(|(id, _)| *id)
            .filter(|id| !is_referenced(*id))
            .collect();
        for id in forgotten {
            self.nodes.remove(&id);
            for keyspace in self.keyspaces.values_mut() {
                keyspace.forget_reports_of(id);
            }
            self.nodes_revision += 1;
        }
    }
}
