//! The state of one keyspace: its last catalog version, the reports of its replicas, and the
//! channels of those that wait for either.
//!
//! **Invariant:** a report of a replica that the catalog places on another node is refused. A
//! replica that the catalog does not place is reported by whichever node has it.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{NodeId, PlanId, ReplicaId};
use vasto_core::operation::operation_id;
use vasto_core::plan::{Plan, Step};
use vasto_core::report::{ReplicaReport, Reports};
use vasto_proto::v1;

use super::change::ChangeRequest;
use super::watch::PlanWatch;
use super::whole_watch::WholeWatch;

/// The most requests that may wait for one driver.
const REQUESTS_MAX: usize = 16;
/// The most replicas of which a report is kept although the catalog has no part for them: targets of
/// plans that were undone.
const STRANGERS_MAX: usize = 64;

/// How nodes may receive a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Nodes receive it at once.
    Push,
    /// A `sealing` version that this master did not write just now (loaded at start, or another
    /// master's): it is decided or undone, but not sent to further nodes.
    Hold,
    /// A `sealing` version that took too long to write: it is undone at once and never shown.
    Undo,
}

/// The state of one keyspace.
pub(crate) struct Keyspace {
    pub(crate) catalog: Arc<Catalog>,
    /// The catalog as JSON, once a session has been sent it.
    text: OnceCell<String>,
    /// When this master learned of this version.
    pub(super) installed: Instant,
    pub(crate) delivery: Delivery,
    pub(crate) reports: Reports,
    pub(super) reporters: BTreeMap<ReplicaId, NodeId>,
    /// A node has applied a version that this master does not know.
    pub(crate) behind: bool,
    /// The condition that the plan waits for.
    pub(crate) waiting_for: Option<String>,
    /// What is observed of each running plan.
    pub(crate) watches: BTreeMap<PlanId, PlanWatch>,
    /// Whether the drains of nodes go on, by their operations.
    pub(crate) drains: BTreeMap<String, WholeWatch>,
    pub(super) topology: watch::Sender<v1::Topology>,
    /// Raised by every change; for tasks that wait for a condition.
    changed: watch::Sender<u64>,
    /// Wakes the driver.
    pub(crate) wake: Arc<Notify>,
    pub(crate) requests: mpsc::Sender<ChangeRequest>,
}

impl Keyspace {
    /// Creates the state of a new keyspace, and the receiver of its requests, which its driver must
    /// own.
    pub(super) fn new(
        catalog: Arc<Catalog>,
        delivery: Delivery,
        topology: v1::Topology,
    ) -> (Self, mpsc::Receiver<ChangeRequest>) {
        let (requests, waiting) = mpsc::channel(REQUESTS_MAX);
        let keyspace = Self {
            catalog,
            text: OnceCell::new(),
            installed: Instant::now(),
            delivery,
            reports: Reports::new(),
            reporters: BTreeMap::new(),
            behind: false,
            waiting_for: None,
            watches: BTreeMap::new(),
            drains: BTreeMap::new(),
            topology: watch::Sender::new(topology),
            changed: watch::Sender::new(0),
            wake: Arc::new(Notify::new()),
            requests,
        };
        (keyspace, waiting)
    }

    /// Replaces the catalog by a higher version.
    pub(super) fn replace(
        &mut self,
        catalog: Arc<Catalog>,
        delivery: Delivery,
        topology: v1::Topology,
    ) {
        // No node reports a removed replica again.
        let is_gone = |replica: &ReplicaId| catalog.is_removed(*replica);
        self.reports.retain(|replica, _| !is_gone(replica));
        self.reporters.retain(|replica, _| !is_gone(replica));
        // Whoever has one of a deleted keyspace is still to be told so.
        let is_stranger = |replica: &ReplicaId| {
            catalog.state == KeyspaceState::Active && catalog.node_of(*replica).is_none()
        };
        let strangers: Vec<ReplicaId> = self.reports.keys().copied().filter(is_stranger).collect();
        for replica in &strangers[..strangers.len().saturating_sub(STRANGERS_MAX)] {
            self.reports.remove(replica);
            self.reporters.remove(replica);
        }
        self.catalog = catalog;
        self.text = OnceCell::new();
        self.installed = Instant::now();
        self.delivery = delivery;
        self.behind = false;
        self.waiting_for = None;
        self.topology.send_replace(topology);
        self.notify();
    }

    /// Returns when the nodes were told of the last version, microseconds since 1970. Another
    /// master may have told them as soon as it was written.
    pub(super) fn shown_us(&self, now_us: u64, in_force_us: u64) -> u64 {
        let written_at_us = self.catalog.written_at_us;
        match self.delivery {
            Delivery::Push => now_us.saturating_sub(in_force_us).max(written_at_us),
            Delivery::Hold | Delivery::Undo => written_at_us,
        }
    }

    /// Returns what a running plan waits for. The rules say that of one plan of the keyspace; of
    /// several replicas that move, each waits for the end of its step.
    pub(crate) fn waiting_for_of(&self, plan: &Plan) -> Option<String> {
        let moving = self.catalog.moves.iter().find(|moving| moving.id() == plan.id);
        let Some(moving) = moving.filter(|_| self.catalog.moves.len() > 1) else {
            return self.waiting_for.clone();
        };
        let to = moving.to().map(|node| format!(" on {node}")).unwrap_or_default();
        Some(match plan.step {
            Step::Prepare | Step::Tail if plan.paused => {
                let id = operation_id(self.catalog.keyspace, plan.id);
                format!("`vasto operation resume {id}`: it is paused")
            }
            Step::Prepare => "the checkpoint that it copies".to_owned(),
            Step::Tail => format!("the copy{to} to catch up"),
            Step::Sealing | Step::Committed => {
                format!("replica {} to leave, once the new one{to} serves", moving.replaces)
            }
        })
    }

    /// Subscribes to the newest topology, and every later one.
    pub(crate) fn topology(&self) -> watch::Receiver<v1::Topology> {
        self.topology.subscribe()
    }

    /// Subscribes to changes: every report and every version.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Wakes the driver and the tasks that wait for a condition.
    pub(crate) fn notify(&self) {
        self.wake.notify_one();
        self.tell();
    }

    /// Wakes the tasks that wait for a condition, and not the driver: no rule decides otherwise.
    pub(super) fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Returns the catalog as JSON, the same text for every session.
    pub(super) fn text(&self) -> &str {
        self.text.get_or_init(|| {
            serde_json::to_string(&*self.catalog)
                .expect("a catalog has only string keys and finite numbers")
        })
    }

    /// Returns true while rules wait for positions in logs, or a plan shows how far it is.
    fn needs_figures(&self) -> bool {
        self.catalog.plans().next().is_some() || !self.catalog.quarantines.is_empty()
    }

    /// Returns true when the keyspace concerns the node. A serving keyspace concerns every node
    /// (routing and tails need it); a deleted one only the nodes of its last placement and those
    /// that report replicas of it.
    pub(super) fn concerns(&self, node: NodeId) -> bool {
        let mut placed = self.catalog.placement.iter().flat_map(|shard| &shard.replicas);
        self.catalog.state == KeyspaceState::Active
            || placed.any(|replica| replica.node == node)
            || self.reporters.values().any(|reporter| *reporter == node)
    }

    /// Takes a report; returns true when a rule may decide otherwise by it. Fails with the replica
    /// when the catalog places it on another node.
    pub(super) fn take(
        &mut self,
        node: NodeId,
        mut report: ReplicaReport,
    ) -> Result<bool, ReplicaId> {
        let replica = report.replica;
        if self.catalog.node_of(replica).is_some_and(|placed| placed != node) {
            return Err(replica);
        }
        self.behind |= report.version > self.catalog.version;
        let before = self.reporters.insert(replica, node);
        let earlier = self.reports.get_mut(&replica).filter(|_| before == Some(node));
        let mut is_news = true;
        if let Some(earlier) = earlier {
            is_news = report.is_news_after(earlier);
            // What is left out is what the same node said before.
            if report.stored.is_none() {
                report.stored = earlier.stored.take();
            }
        }
        self.reports.insert(replica, report);
        Ok(is_news || self.needs_figures())
    }

    /// Forgets what a node has reported.
    pub(super) fn forget_reports_of(&mut self, node: NodeId) {
        let reports = &mut self.reports;
        self.reporters.retain(|replica, reporter| {
            let keep = *reporter != node;
            if !keep {
                reports.remove(replica);
            }
            keep
        });
    }
}
