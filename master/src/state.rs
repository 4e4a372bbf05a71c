//! The state of the master: nodes, their reports, and the last catalog version of each keyspace.
//!
//! **Invariant:** all state here is synchronous, soft, and rebuilt after a restart from the
//! catalog and the nodes. A catalog is replaced only by a higher version. A session that was
//! replaced can change nothing any more. Time is an argument: microseconds of a monotonic
//! clock, from the master's start.
//!
//! Other modules write versions (`driver`) and speak gRPC (`session`, `service`).

mod absence;
mod balance;
#[cfg(test)]
mod balance_tests;
mod change;
mod decide;
mod keyspace;
mod node;
mod presence;
mod revisions;
#[cfg(test)]
mod scale_tests;
mod sessions;
mod speed;
mod targets;
#[cfg(test)]
pub(crate) mod tests;
mod trouble;
mod versions;
mod watch;
mod whole_watch;
mod wholes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use vasto_core::catalog::KeyspaceState;
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_shipping::ClusterSettings;

pub(crate) use self::balance::RebalanceLook;
pub(crate) use self::change::{CANCELLED, CatalogChange, ChangeRequest};
pub(crate) use self::keyspace::{Delivery, Keyspace};
pub(crate) use self::node::{Done, Node};
use self::revisions::Revisions;
pub(crate) use self::sessions::{Odd, Registration, Sent};
pub(crate) use self::trouble::Trouble;
pub(crate) use self::watch::{PlanWatch, StepBytes, sources, targets};
use self::whole_watch::WholeWatch;
use crate::loads::Loads;

/// Writes of catalog versions whose times are kept.
const WRITES_KEPT: usize = 5;

/// The whole state of the master.
#[derive(Default)]
pub(crate) struct ClusterState {
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) keyspaces: BTreeMap<KeyspaceId, Keyspace>,
    /// Raised when a node appears or its address changes.
    nodes_revision: u64,
    /// The order in which keyspaces have changed.
    revisions: Revisions,
    /// How many of the times that rules wait for each node has been away.
    absences: BTreeMap<NodeId, usize>,
    /// Keyspaces that have not all their replicas.
    lacking: BTreeSet<KeyspaceId>,
    last_session: u64,
    last_command: u64,
    /// How long a node may be away before its replicas are replaced elsewhere, microseconds.
    pub(crate) replace_after_us: Option<u64>,
    /// How long a node that was placed before the master started may take to register;
    /// [`NODE_SILENCE`](vasto_core::limits::NODE_SILENCE) when `None`.
    pub(crate) node_silence: Option<Duration>,
    /// The load of each node.
    pub(crate) loads: Loads,
    /// Decisions about nodes, not about keyspaces.
    pub(crate) settings: Arc<ClusterSettings>,
    /// How far the running rebalance has come.
    pub(crate) rebalance: RebalanceLook,
    /// Whether the running rebalance goes on.
    pub(crate) rebalance_watch: WholeWatch,
    /// Seconds of the last writes of catalog versions, the newest last.
    writes: VecDeque<f64>,
    /// Nodes examined for decisions, so that a test can count the work.
    #[cfg(test)]
    pub(crate) examined: std::cell::Cell<u64>,
    /// Keyspaces examined for sessions, the same.
    #[cfg(test)]
    pub(crate) offered: std::cell::Cell<u64>,
}

impl ClusterState {
    /// Returns the serving keyspace of that name.
    pub(crate) fn named(&self, name: &str) -> Option<&Keyspace> {
        self.active().find(|keyspace| keyspace.catalog.name == name)
    }

    /// Returns the serving keyspaces.
    pub(crate) fn active(&self) -> impl Iterator<Item = &Keyspace> {
        self.keyspaces.values().filter(|keyspace| keyspace.catalog.state == KeyspaceState::Active)
    }

    /// Returns the nodes with a live session.
    pub(crate) fn live(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().filter(|(_, node)| node.is_live()).map(|(id, node)| (*id, node))
    }

    /// Returns true while the node has a live session.
    pub(crate) fn is_live(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(Node::is_live)
    }

    /// Notes how long the write of a catalog version took.
    pub(crate) fn note_write(&mut self, took: Duration) {
        if self.writes.len() >= WRITES_KEPT {
            self.writes.pop_front();
        }
        self.writes.push_back(took.as_secs_f64());
    }

    /// Returns how long the last writes of catalog versions took, seconds; `None` before the first
    /// one. One of them that an outage held up, or a process that stood still, makes no difference.
    pub(crate) fn write_seconds(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.writes.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len().saturating_sub(1) / 2).copied()
    }

    /// Returns every node that registered, and every node that only the catalogs name.
    pub(crate) fn node_ids(&self) -> BTreeSet<NodeId> {
        let placed = self.active().flat_map(|keyspace| keyspace.catalog.placement.iter());
        let placed = placed.flat_map(|shard| &shard.replicas).map(|replica| replica.node);
        self.nodes.keys().copied().chain(placed).collect()
    }
}
