//! The catalog, the reports and the presence of nodes together, as the rules about members see
//! them.
//!
//! **Invariant:** a replica is taken out of its shard only while another one has authority.

use super::evict::evict;
use super::failover::{Presence, successor, transfer_leadership};
use crate::catalog::{Catalog, DrainingReplica, NodeDrain, Placed, ShardPlacement};
use crate::control::report::{ReplicaReport, ReplicationReport, Reports};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits::TAIL_LAG_LSNS_MAX;

/// State of the nodes around a keyspace.
pub struct Around<'a> {
    /// Presence of a node.
    pub presence: &'a dyn Fn(NodeId) -> Presence,
    /// Whether a node is away for so long that it is not expected back at once.
    pub long_gone: &'a dyn Fn(NodeId) -> bool,
    /// Whether a node is away for so long that its replicas are rebuilt elsewhere without a
    /// request.
    pub lost: &'a dyn Fn(NodeId) -> bool,
    /// Live node that could take one more replica of a shard.
    pub room: &'a dyn Fn(&Catalog, ShardId) -> Option<NodeId>,
    /// What a node is like, for the choice of the replica that a shard does without.
    pub site: &'a dyn Fn(NodeId) -> Site,
}

/// A node as a place for a replica.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Site {
    /// It is to get no more replicas.
    pub cordoned: bool,
    /// Its zone; empty when it names none.
    pub zone: String,
    /// The used part of its disk, thousandths; 0 while that is not known.
    pub used: u64,
}

impl Around<'_> {
    pub(super) fn is_here(&self, node: NodeId) -> bool {
        matches!((self.presence)(node), Presence::Here(_))
    }
}

/// A keyspace with its reports, for decisions about its members.
pub(super) struct View<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) reports: &'a Reports,
    pub(super) around: &'a Around<'a>,
}

impl View<'_> {
    pub(super) fn replication(&self, replica: ReplicaId) -> Option<&ReplicationReport> {
        self.reports.get(&replica).map(|report| &report.replication)
    }

    pub(super) fn has_failed(&self, replica: ReplicaId) -> bool {
        self.reports.get(&replica).is_some_and(ReplicaReport::has_failed)
    }

    /// Returns true when the replica has failed and does not open again by itself.
    pub(super) fn has_failed_for_good(&self, replica: ReplicaId) -> bool {
        self.has_failed(replica) && !self.replication(replica).is_some_and(|report| report.passing)
    }

    /// Returns true when the replica cannot catch up with the others any more.
    pub(super) fn is_too_old(&self, replica: ReplicaId) -> bool {
        self.replication(replica).is_some_and(|report| report.too_old)
    }

    /// Returns true when the replica serves, by its last report.
    pub(super) fn is_ready(&self, member: &Placed) -> bool {
        self.around.is_here(member.node)
            && !self.has_failed(member.replica)
            && self.replication(member.replica).is_some_and(|report| report.ready)
    }

    /// Returns true when the replica serves, and not only by a report from before it stood still or
    /// was cut off: it has applied the version that is in force.
    pub(super) fn serves(&self, member: &Placed) -> bool {
        let has_heard = |report: &ReplicaReport| report.version >= self.catalog.version;
        self.is_ready(member) && self.reports.get(&member.replica).is_some_and(has_heard)
    }

    /// Returns true when the replica answers strict requests: it holds everything that the others
    /// have acknowledged.
    pub(super) fn has_authority(&self, member: &Placed) -> bool {
        let has_authority = |report: &ReplicaReport| report.has_authority(self.catalog.version);
        self.is_ready(member) && self.reports.get(&member.replica).is_some_and(has_authority)
    }

    /// Returns the version that evicts a replica, or transfers leadership first; `None` while the
    /// replica may be the only one that holds what it has acknowledged. If it is away, the others
    /// find out themselves whether they may serve.
    pub(super) fn take_out(
        &self,
        shard: &ShardPlacement,
        member: &Placed,
        stays: impl Fn(&Placed) -> bool,
        now_us: u64,
        nonce: u64,
    ) -> Option<Catalog> {
        // A lagging replica is not able to serve yet.
        let is_close = |other: &Placed| {
            self.replication(other.replica)
                .is_some_and(|report| report.lag_lsns <= TAIL_LAG_LSNS_MAX)
        };
        let may = |other: &Placed| stays(other) && is_close(other);
        let successor = successor(shard, member.replica, |node| self.around.is_here(node), may);
        if let Some(successor) = successor.filter(|_| !self.has_failed(member.replica)) {
            return transfer_leadership(self.catalog, member.replica, successor, now_us, nonce);
        }
        let mut others = shard.replicas.iter().filter(|other| other.replica != member.replica);
        others
            .any(|other| self.has_authority(other))
            .then(|| evict(self.catalog, member.replica, false, now_us, nonce).ok())
            .flatten()
    }

    /// Returns the drain of a node that goes on: one that is paused changes nothing.
    pub(super) fn drain_of(&self, node: NodeId) -> Option<&NodeDrain> {
        self.catalog.draining_nodes.iter().find(|drain| drain.node == node && !drain.paused)
    }

    pub(super) fn leaves(&self, member: &Placed) -> bool {
        self.drain_of(member.node).is_some()
    }

    /// Returns the number of replicas that a shard will have when those on drained nodes have left.
    /// One that was taken from a node whose replacement is paused counts, too: another one is made
    /// when that goes on.
    pub(super) fn staying(&self, shard: &ShardPlacement) -> usize {
        let here = shard.replicas.iter().filter(|member| !self.leaves(member)).count();
        let paused = self.catalog.draining_nodes.iter().filter(|drain| drain.paused);
        here + paused.filter(|drain| self.catalog.has_taken(drain, shard.shard)).count()
    }

    /// Returns true while the replacement of the node is paused: it keeps its replicas, however long
    /// it is away.
    pub(super) fn is_held_back(&self, node: NodeId) -> bool {
        let mut drains = self.catalog.draining_nodes.iter();
        drains.any(|drain| drain.node == node && drain.paused && drain.replace)
    }

    /// Returns true when the replica is not waited for: its node is to be replaced and is gone, or
    /// is there and the replica has failed.
    pub(super) fn is_given_up(&self, member: &Placed) -> bool {
        let replaced = self.drain_of(member.node).is_some_and(|drain| drain.replace);
        replaced
            && match (self.around.presence)(member.node) {
                Presence::Gone => true,
                Presence::Here(_) => self.has_failed_for_good(member.replica),
                Presence::Away => false,
            }
    }

    pub(super) fn is_drained(&self, replica: ReplicaId) -> bool {
        self.replication(replica).is_some_and(|report| report.drained)
    }

    /// Returns true when deleting its files loses nothing and hides nothing: the primary serves and
    /// holds everything it has, or its loss was accepted and everything that it had shipped was
    /// recovered.
    pub(super) fn may_go(&self, draining: &DrainingReplica) -> bool {
        if let Some(report) =
            self.replication(draining.replica).filter(|_| self.is_drained(draining.replica))
        {
            // A node of an older version does not report which replicas hold the data.
            let holds =
                |id: ReplicaId| report.drained_by.is_empty() || report.drained_by.contains(&id);
            // A follower that holds it is not enough: reads go to the primary.
            let primary = self.catalog.shard(draining.shard).and_then(ShardPlacement::primary);
            return primary.is_some_and(|other| holds(other.replica) && self.serves(&other));
        }
        let gone = Placed { replica: draining.replica, node: draining.node };
        let accepted = self.drain_of(draining.node).is_some_and(|drain| drain.accept_loss);
        // A replica that is cut off only briefly is still drained when it is back.
        let is_over = (self.around.long_gone)(draining.node)
            || (self.around.is_here(draining.node) && self.is_given_up(&gone));
        let mut others =
            self.catalog.shard(draining.shard).into_iter().flat_map(|shard| &shard.replicas);
        accepted
            && is_over
            && others.any(|other| {
                self.serves(other)
                    && self
                        .replication(other.replica)
                        .is_some_and(|report| report.took_from_bucket.contains(&draining.replica))
            })
    }
}
