//! The cluster as the balance sees it, from the catalogs, the reports and the presence of nodes.
//!
//! **Invariant:** what moves counts on the node that it moves to, by the catalogs and by the
//! decisions that are not written yet, so any master rebuilds the same picture.

use std::collections::BTreeSet;

use vasto_core::balance::{Balance, BalanceNode, BalanceReplica, BalanceShard, When};
use vasto_core::catalog::{Catalog, Placed, ShardPlacement};
use vasto_core::ids::NodeId;
use vasto_core::limits::COPIES_PER_NODE_MAX;
use vasto_core::plan::Step;
use vasto_core::reconcile::{
    MoveOrder, Presence, in_the_way_of_moves, move_not_before, nodes_to_avoid,
};
use vasto_core::report::ReplicaReport;

use super::ClusterState;
use super::keyspace::Keyspace;
use crate::loads::shard_bytes;
use crate::placement::NodeCandidate;

/// How far the running rebalance has come, by the last look at it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RebalanceLook {
    /// Replicas that are still to move, those that are moving included.
    pub(crate) replicas_left: usize,
    /// Shards that are still to get another preferred primary.
    pub(crate) primaries_left: usize,
    /// The condition that it waits for.
    pub(crate) waiting_for: Option<String>,
}

/// Returns the load of a replica, if it is known.
fn known_load(report: &ReplicaReport) -> Option<u64> {
    (!report.load_unknown).then_some(report.load)
}

/// The mean of the known loads of a keyspace: what a replica counts for while its own is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct UsualLoad {
    /// Of the first replica of a shard.
    first: u64,
    /// Of the others.
    further: u64,
}

impl UsualLoad {
    fn of(keyspace: &Keyspace) -> Self {
        let mean = |is_first: bool| {
            let placement = keyspace.catalog.placement.iter();
            let placed = placement.flat_map(|shard| shard.replicas.iter().enumerate());
            let known = placed.filter(|(place, _)| (*place == 0) == is_first);
            let known = known.filter_map(|(_, placed)| keyspace.reports.get(&placed.replica));
            let known: Vec<u64> = known.filter_map(known_load).collect();
            known.iter().sum::<u64>() / known.len().max(1) as u64
        };
        Self { first: mean(true), further: mean(false) }
    }

    fn at(self, place: usize) -> u64 {
        if place == 0 { self.first } else { self.further }
    }
}

impl ClusterState {
    /// Returns the nodes and shards of the cluster, with what is on its way where it goes to.
    pub(crate) fn balance(&self, mono_us: u64, now_us: u64) -> Balance {
        let draining = self.draining();
        let candidates = self.candidates(None);
        let node = |id: NodeId| {
            let candidate = candidates.iter().find(|candidate| candidate.node == id);
            let takes_part = candidate.is_some_and(|candidate| !candidate.cordoned)
                && !draining.contains(&id)
                && matches!(self.presence(id, mono_us), Presence::Here(_));
            BalanceNode {
                node: id,
                zone: self.nodes.get(&id).map(|node| node.zone.clone()).unwrap_or_default(),
                // Of a node that is away, by its last report: the parts of the others stay.
                capacity: self.disk_of(id).map_or(0, |disk| disk.bytes),
                room: candidate.map_or(0, |candidate| candidate.disk.room()),
                places: candidate.map_or(0, NodeCandidate::room),
                permits: candidate
                    .map_or(0, |candidate| COPIES_PER_NODE_MAX.saturating_sub(candidate.copying)),
                takes_part,
            }
        };
        let shards = self.active().flat_map(|keyspace| {
            let placement = keyspace.catalog.placement.iter();
            let usual = UsualLoad::of(keyspace);
            placement
                .map(move |shard| self.shard_in_balance(keyspace, shard, usual, (mono_us, now_us)))
        });
        Balance { nodes: self.node_ids().into_iter().map(node).collect(), shards: shards.collect() }
    }

    /// Returns the nodes that any keyspace drains.
    fn draining(&self) -> BTreeSet<NodeId> {
        let drains = self.active().flat_map(|keyspace| &keyspace.catalog.draining_nodes);
        drains.map(|drain| drain.node).collect()
    }

    /// Returns the orders whose nodes can take the replicas by what is known now: since they were
    /// decided, another master may have given the same places away.
    pub(crate) fn orders_that_fit(
        &self,
        keyspace: &Keyspace,
        orders: &[MoveOrder],
    ) -> Vec<MoveOrder> {
        let (catalog, reports) = (&*keyspace.catalog, &keyspace.reports);
        let draining = self.draining();
        let mut candidates = self.candidates(None);
        let mut fits = |order: &&MoveOrder| {
            let report = reports.get(&order.replica).filter(|report| report.bytes > 0);
            let bytes = report
                .map_or_else(|| shard_bytes(catalog, order.shard, reports), |report| report.bytes);
            let takes = |node: &&mut NodeCandidate| {
                node.node == order.to
                    && !draining.contains(&node.node)
                    && node.copying < COPIES_PER_NODE_MAX
                    && node.takes(bytes)
            };
            let Some(node) = candidates.iter_mut().find(takes) else { return false };
            node.replicas += 1;
            node.copying += 1;
            node.disk.promised = node.disk.promised.saturating_add(bytes);
            true
        };
        orders.iter().filter(|order| fits(order)).copied().collect()
    }

    fn shard_in_balance(
        &self,
        keyspace: &Keyspace,
        shard: &ShardPlacement,
        usual: UsualLoad,
        (mono_us, now_us): (u64, u64),
    ) -> BalanceShard {
        let (catalog, reports) = (&*keyspace.catalog, &keyspace.reports);
        let bytes = shard_bytes(catalog, shard.shard, reports);
        let of = |(place, placed): (usize, &Placed)| {
            let report = reports.get(&placed.replica).filter(|report| report.bytes > 0);
            BalanceReplica {
                replica: placed.replica,
                node: placed.node,
                bytes: report.map_or(bytes, |report| report.bytes),
                load: report.and_then(known_load).unwrap_or_else(|| usual.at(place)),
            }
        };
        let leaves = |placed: &&Placed| {
            !catalog.moves.iter().any(|moving| moving.replaces == placed.replica)
        };
        let targets = catalog.plans().filter(|plan| plan.adds_member());
        let coming: Vec<Placed> = targets
            .flat_map(|plan| &plan.targets)
            .filter(|target| target.shard == shard.shard && !catalog.is_placed(target.replica))
            .map(|target| Placed { replica: target.replica, node: target.node })
            .collect();
        let replicas: Vec<BalanceReplica> =
            shard.replicas.iter().filter(leaves).chain(&coming).enumerate().map(of).collect();
        let members = catalog.members().into_iter();
        let elsewhere = members
            .filter(|(of, member, _)| *of == shard.shard && !catalog.is_retired(member.replica))
            .map(|(_, member, _)| member.node)
            .filter(|node| !replicas.iter().any(|replica| replica.node == *node))
            .chain(nodes_to_avoid(catalog, now_us));
        let (moves, prefers) = self.when(keyspace, shard, mono_us, now_us);
        BalanceShard {
            keyspace: catalog.keyspace,
            shard: shard.shard,
            elsewhere: elsewhere.collect(),
            replicas,
            moves,
            prefers,
        }
    }

    /// Returns when replicas of a shard may move, and when another may be its preferred primary.
    fn when(
        &self,
        keyspace: &Keyspace,
        shard: &ShardPlacement,
        mono_us: u64,
        now_us: u64,
    ) -> (When, When) {
        let catalog = &keyspace.catalog;
        let serves = |placed: &Placed| {
            let report = keyspace.reports.get(&placed.replica);
            matches!(self.presence(placed.node, mono_us), Presence::Here(_))
                && report.is_some_and(|report| report.replication.ready && !report.has_failed())
        };
        let waits = catalog.draining.iter().any(|draining| draining.shard == shard.shard);
        let moving = catalog.is_moving(shard.shard);
        let runs = catalog.plan.is_some();
        if runs || moving {
            return (When::Later, When::Later);
        }
        let is_whole = shard.replicas.len() == catalog.spec.replicas as usize;
        let all_serve = shard.replicas.iter().all(serves);
        if in_the_way_of_moves(catalog).is_some() || waits || !is_whole || !all_serve {
            return (When::Never, When::Never);
        }
        if shard.transferring_to.is_some() || shard.primary.is_some() {
            return (When::Later, When::Later);
        }
        // What was decided by a guess of its load might be taken back.
        let is_new = |placed: &Placed| {
            keyspace.reports.get(&placed.replica).is_some_and(|report| report.load_unknown)
        };
        let is_early =
            now_us < move_not_before(catalog, shard.shard) || shard.replicas.iter().any(is_new);
        let moves = match is_early {
            true => When::Later,
            false => When::Now,
        };
        let prefers = if catalog.quarantines.is_empty() { When::Now } else { When::Never };
        (moves, prefers)
    }

    /// Returns the number of replicas whose move has not ended, and of shards that are handed over
    /// to their preferred primary.
    pub(crate) fn moving(&self, mono_us: u64) -> usize {
        let of_keyspace = |keyspace: &Keyspace| {
            let shards = keyspace.catalog.placement.iter();
            let handed = shards.filter(|shard| {
                !keyspace.catalog.is_moving(shard.shard) && self.is_handed_over(shard, mono_us)
            });
            keyspace.catalog.moves.len() + handed.count()
        };
        self.active().map(of_keyspace).sum()
    }

    /// Returns true while a shard is handed over to its preferred primary, whose node is there.
    fn is_handed_over(&self, shard: &ShardPlacement, mono_us: u64) -> bool {
        let home = shard.shipper().map(|home| self.presence(home.node, mono_us));
        shard.transferring_to.is_some()
            || (shard.primary.is_some() && matches!(home, Some(Presence::Here(_))))
    }

    /// Returns what a rebalance waits for although it has no more moves to begin.
    pub(crate) fn rebalance_waits(&self, mono_us: u64) -> Option<String> {
        let here = |node: NodeId| matches!(self.presence(node, mono_us), Presence::Here(_));
        self.active().find_map(|keyspace| {
            let catalog: &Catalog = &keyspace.catalog;
            let name = &catalog.name;
            if let Some(moving) = catalog.moves.first() {
                let replica = moving.replaces;
                let place = match (moving.plan.step, moving.to()) {
                    (Step::Committed, _) => "to hand over".to_owned(),
                    (_, Some(to)) => format!("to be copied to {to}"),
                    (_, None) => "to be copied".to_owned(),
                };
                let what = format!("replica {replica} of {name} {place}");
                return Some(keyspace.waiting_for.clone().unwrap_or(what));
            }
            if let Some(draining) = catalog.draining.iter().find(|one| here(one.node)) {
                return Some(format!("replica {} of {name} to be drained", draining.replica));
            }
            let mut shards = catalog.placement.iter();
            let shard = shards.find(|shard| self.is_handed_over(shard, mono_us))?;
            Some(format!("shard {} of {name} to be handed over", shard.shard))
        })
    }

    /// Returns true when every replica on a node that is not gone has been reported: the balance
    /// can be told.
    pub(crate) fn has_heard_of_all(&self, mono_us: u64) -> bool {
        self.active().all(|keyspace| {
            let mut placed = keyspace.catalog.placement.iter().flat_map(|shard| &shard.replicas);
            placed.all(|placed| {
                keyspace.reports.contains_key(&placed.replica)
                    || self.presence(placed.node, mono_us) == Presence::Gone
            })
        })
    }
}
