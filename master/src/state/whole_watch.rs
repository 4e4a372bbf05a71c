//! What is observed of the drains of nodes and of the rebalance: whether they go on while none of
//! the plans that are their parts runs. What runs is observed by itself (`watch`).
//!
//! **Invariant:** nothing here decides anything. What is paused, or waits for another operation to
//! end, is in no trouble.

use std::collections::BTreeMap;

use vasto_core::catalog::{Catalog, KeyspaceState, NodeDrain, ShardPlacement};
use vasto_core::ids::KeyspaceId;
use vasto_core::plan::Plan;

use super::ClusterState;
use super::trouble::{Trouble, trouble_of_whole};
use super::watch::log_change;

/// The observations of a drain in one keyspace, or of the rebalance.
#[derive(Debug, Default)]
pub(crate) struct WholeWatch {
    marks: Vec<u64>,
    /// When the marks changed last, or something ran that tells of itself.
    moved_us: u64,
    /// Why it does not go on.
    pub(crate) trouble: Option<Trouble>,
}

impl WholeWatch {
    /// Takes one observation; `is_calm` says that this time does not count. Returns how long nothing
    /// has moved, microseconds.
    fn note(&mut self, marks: Vec<u64>, is_calm: bool, now_us: u64) -> u64 {
        if is_calm || self.marks != marks {
            (self.marks, self.moved_us) = (marks, now_us);
        }
        now_us.saturating_sub(self.moved_us)
    }

    fn found(&mut self, operation: &str, found: Option<Trouble>) {
        log_change(operation, self.trouble.as_ref(), found.as_ref());
        self.trouble = found;
    }
}

/// Returns numbers of which some change while a drain goes on in a keyspace.
fn marks_of_drain(catalog: &Catalog, drain: &NodeDrain) -> Vec<u64> {
    let is_on =
        |shard: &&ShardPlacement| shard.replicas.iter().any(|member| member.node == drain.node);
    let shards = catalog.placement.iter().filter(is_on);
    let replicas = shards.clone().map(|shard| shard.replicas.len() as u64).sum();
    let waiting = catalog.draining.iter().filter(|one| one.node == drain.node).count() as u64;
    vec![shards.count() as u64, replicas, waiting]
}

impl ClusterState {
    /// Returns the drains that do not go on, each once, and why in the first keyspace where that is
    /// so.
    pub(crate) fn stuck_drains(&self) -> BTreeMap<&str, &Trouble> {
        let drains = self.active().flat_map(|keyspace| &keyspace.drains);
        let stuck = drains.filter_map(|(id, watch)| Some((id.as_str(), watch.trouble.as_ref()?)));
        let mut first = BTreeMap::new();
        for (id, trouble) in stuck {
            first.entry(id).or_insert(trouble);
        }
        first
    }

    /// Returns the number of operations that do not go on.
    pub(crate) fn stuck(&self) -> usize {
        let plans = self.active().flat_map(|keyspace| keyspace.watches.values());
        let plans = plans.filter(|watch| watch.trouble.is_some()).count();
        plans + self.stuck_drains().len() + usize::from(self.rebalance_watch.trouble.is_some())
    }

    /// Observes the drains of a keyspace. While a replica is copied anywhere (`copies`), the others
    /// may wait for their turn; a paused copy has no end for which they could.
    pub(super) fn observe_drains(
        &mut self,
        id: KeyspaceId,
        copies: bool,
        mono_us: u64,
        outage: Option<&str>,
    ) {
        let Some(keyspace) = self.keyspaces.get_mut(&id) else { return };
        let mut before = std::mem::take(&mut keyspace.drains);
        let catalog = keyspace.catalog.clone();
        if catalog.state != KeyspaceState::Active {
            return;
        }
        let waiting_for = keyspace.waiting_for.as_deref();
        for drain in &catalog.draining_nodes {
            let operation = drain.operation_id();
            let mut watch = before.remove(&operation).unwrap_or_default();
            let is_calm = drain.paused || copies || catalog.plan.is_some();
            let still_us = watch.note(marks_of_drain(&catalog, drain), is_calm, mono_us);
            let found = match is_calm {
                true => None,
                false => trouble_of_whole(&operation, waiting_for, still_us, outage),
            };
            watch.found(&operation, found);
            keyspace.drains.insert(operation, watch);
        }
    }

    /// Observes the rebalance that runs.
    pub(super) fn observe_rebalance(&mut self, mono_us: u64, outage: Option<&str>) {
        let Some(running) = self.settings.running_rebalance() else {
            self.rebalance_watch = WholeWatch::default();
            return;
        };
        let totals = self.active().filter_map(|keyspace| keyspace.catalog.rebalanced.as_ref());
        let totals = totals.filter(|totals| totals.since_us == running.since_us);
        let moved = totals.map(|totals| totals.moved.copies + totals.primaries).sum();
        let runs = |of: fn(&Catalog) -> Option<&Plan>| {
            self.active().any(|keyspace| of(&keyspace.catalog).is_some())
        };
        let is_calm = running.paused || runs(|catalog| catalog.plan.as_ref());
        let tells_itself = is_calm || runs(|catalog| catalog.moves.first().map(|one| &one.plan));
        let waiting_for = self.rebalance.waiting_for.clone();
        let operation = running.operation_id();
        let watch = &mut self.rebalance_watch;
        let still_us = watch.note(vec![running.since_us, moved], is_calm, mono_us);
        let found = match tells_itself {
            true => None,
            false => trouble_of_whole(&operation, waiting_for.as_deref(), still_us, outage),
        };
        watch.found(&operation, found);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::{NodeId, ReplicaId, ShardId};
    use vasto_core::reconcile::{
        MoveOrder, Pace, drain_node, pace_drain, pace_moves, start_moves, start_resize,
    };
    use vasto_shipping::ClusterSettings;

    use super::*;
    use crate::state::Delivery;
    use crate::state::tests::two_nodes;

    const KS: KeyspaceId = KeyspaceId(1);
    const SECOND: u64 = 1_000_000;

    fn next(state: &mut ClusterState, catalog: Catalog) {
        assert!(state.install(catalog, Delivery::Push).0);
    }

    #[test]
    fn a_drain_that_finds_no_node_is_told_within_ten_seconds_and_a_paused_one_is_not() {
        let (mut state, ..) = two_nodes();
        let drain = NodeDrain::new(NodeId(1), false, 7);
        let id = drain.operation_id();
        let catalog = state.keyspaces[&KS].catalog.clone();
        next(&mut state, drain_node(&catalog, drain, 2_000, 2).unwrap());
        let waits = "a node that can take a copy";
        state.keyspaces.get_mut(&KS).unwrap().waiting_for = Some(waits.into());
        let told = |state: &ClusterState| state.keyspaces[&KS].drains[&id].trouble.clone();
        state.observe(SECOND, None);
        state.observe(4 * SECOND, Some("refused"));
        assert!(told(&state).unwrap().what.contains("refused"), "a known cause is told at once");
        state.observe(8 * SECOND, None);
        assert_eq!(told(&state), None);
        state.observe(10 * SECOND, None);
        let trouble = told(&state).unwrap();
        assert!(trouble.what.contains(waits) && trouble.next.contains(&id), "{trouble:?}");

        let catalog = state.keyspaces[&KS].catalog.clone();
        let paused = pace_drain(&catalog, &id, Pace::Pause, 3_000, 3).unwrap();
        next(&mut state, paused.clone());
        state.observe(1_000 * SECOND, Some("refused"));
        assert_eq!(told(&state), None);
        let resumed = pace_drain(&paused, &id, Pace::Resume, 4_000, 4).unwrap();
        next(&mut state, resumed.clone());
        state.observe(1_001 * SECOND, None);
        assert_eq!(told(&state), None, "the time of the pause does not count");
        // It waits until a resize has ended.
        let resize = start_resize(&resumed, 3, &[vec![NodeId(2)]], 5_000, 5).unwrap();
        next(&mut state, resize.clone());
        state.observe(2_000 * SECOND, None);
        assert_eq!(told(&state), None);
        let ended = Catalog { plan: None, draining_nodes: Vec::new(), ..resize.next(6_000, 6) };
        next(&mut state, ended);
        state.observe(2_001 * SECOND, None);
        assert!(state.keyspaces[&KS].drains.is_empty());
    }

    #[test]
    fn a_keyspace_whose_turn_has_not_come_is_in_no_trouble() {
        let (mut state, ..) = two_nodes();
        let catalog = state.keyspaces[&KS].catalog.clone();
        let drain = NodeDrain::new(NodeId(1), false, 7);
        let id = drain.operation_id();
        next(&mut state, drain_node(&catalog, drain, 2_000, 2).unwrap());
        let spec = KeyspaceSpec::default();
        let other = Catalog::first(KeyspaceId(2), "ks2", spec, &[vec![NodeId(1)]], 1_000, 1);
        let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
        next(&mut state, start_moves(&other, &[order], 7, 2_000, 2).unwrap());
        for second in [1, 100, 200] {
            state.observe(second * SECOND, None);
            assert_eq!(state.keyspaces[&KS].drains[&id].trouble, None);
        }
        // Neither a copy that has ended nor one that is paused lets it have its turn.
        let moving = state.keyspaces[&KeyspaceId(2)].catalog.clone();
        let paused = pace_moves(&moving, 7, Pace::Pause, 3_000, 3).unwrap();
        next(&mut state, paused.clone());
        state.observe(209 * SECOND, None);
        assert!(state.keyspaces[&KS].drains[&id].trouble.is_some());
        next(&mut state, pace_moves(&paused, 7, Pace::Resume, 4_000, 4).unwrap());
        state.observe(210 * SECOND, None);
        assert_eq!(state.keyspaces[&KS].drains[&id].trouble, None);
        let mut ended = state.keyspaces[&KeyspaceId(2)].catalog.next(5_000, 5);
        ended.moves.clear();
        next(&mut state, ended);
        state.observe(219 * SECOND, None);
        assert!(state.keyspaces[&KS].drains[&id].trouble.is_some());
    }

    #[test]
    fn a_rebalance_that_begins_nothing_is_told_and_its_moves_tell_for_themselves() {
        let (mut state, ..) = two_nodes();
        let begun = ClusterSettings::default().with_rebalance(7, 1).unwrap();
        state.settings = Arc::new(begun.clone());
        state.rebalance.waiting_for = Some("a node to have room".into());
        state.observe(SECOND, None);
        state.observe(10 * SECOND, None);
        let trouble = state.rebalance_watch.trouble.clone().unwrap();
        assert!(trouble.what.contains("a node to have room"), "{trouble:?}");
        assert!(trouble.next.contains("vasto operation cancel rebalance-7"), "{trouble:?}");
        let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
        let catalog = state.keyspaces[&KS].catalog.clone();
        next(&mut state, start_moves(&catalog, &[order], 7, 2_000, 2).unwrap());
        state.observe(11 * SECOND, None);
        assert_eq!(state.rebalance_watch.trouble, None);
        assert_eq!(state.keyspaces[&KS].watches.len(), 1);
        let asked = vasto_core::reconcile::WholePace { paused: true, max_rate: None };
        state.settings = Arc::new(begun.with_pace(7, asked, 8, 2).unwrap());
        let none = Catalog { moves: Vec::new(), ..state.keyspaces[&KS].catalog.next(3_000, 3) };
        next(&mut state, none);
        state.observe(1_000 * SECOND, None);
        assert_eq!(state.rebalance_watch.trouble, None, "it is paused");
        state.settings = Arc::new(begun.without_rebalance(7, false, 9, 2).unwrap());
        state.observe(2_000 * SECOND, None);
        assert!(state.rebalance_watch.marks.is_empty());
    }
}
