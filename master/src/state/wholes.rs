//! The pace of operations whose parts are plans: the drains of nodes, in the catalogs, and the
//! rebalance, in the cluster settings.
//!
//! **Invariant:** whatever version a driver writes, and whenever it looks, the parts in it have the
//! pace of their whole, so that any master keeps it; those of other keyspaces share its rate.

use vasto_core::catalog::{Catalog, KeyspaceState, NodeDrain};
use vasto_core::ids::{KeyspaceId, NodeId, PlanId};
use vasto_core::operation::operation_id;
use vasto_core::reconcile::{
    Pace, PaceError, Site, Whole, WholePace, check_part, follow_wholes, parts_of_wholes,
};

use super::ClusterState;

impl ClusterState {
    /// Gives the parts of drains and of the rebalance in a version their pace; returns true when
    /// that changes anything.
    pub(crate) fn follow_wholes(&self, next: &mut Catalog) -> bool {
        let here = parts_of_wholes(next);
        if here.is_empty() {
            return false;
        }
        let own = next.keyspace;
        let running = |whole: Whole| {
            let others = self.active().filter(|keyspace| keyspace.catalog.keyspace != own);
            let parts = others.flat_map(|keyspace| parts_of_wholes(&keyspace.catalog));
            parts.chain(here.iter().copied()).filter(|(_, other)| *other == whole).count()
        };
        let rebalance = |since_us: u64| {
            let running = self.settings.running_rebalance();
            let running = running.filter(|running| running.since_us == since_us);
            running.map(|running| running.pace()).unwrap_or_default()
        };
        follow_wholes(next, rebalance, running)
    }

    /// Returns true when a version pauses moves that are not paused yet.
    pub(crate) fn pauses_moves(&self, next: &Catalog) -> bool {
        let paused =
            |catalog: &Catalog| catalog.moves.iter().filter(|moving| moving.plan.paused).count();
        let before = self.keyspaces.get(&next.keyspace);
        before.is_some_and(|before| paused(next) > paused(&before.catalog))
    }

    /// Returns the version that a keyspace needs for nothing but the pace of wholes.
    pub(super) fn with_pace_of_wholes(
        &self,
        keyspace: KeyspaceId,
        now_us: u64,
        nonce: u64,
    ) -> Option<Catalog> {
        let catalog = &self.keyspaces.get(&keyspace)?.catalog;
        // Without any live node another master may be driving.
        if catalog.state != KeyspaceState::Active || self.live().next().is_none() {
            return None;
        }
        let is_asked = |whole: Whole| {
            let asked = self.asked_of(catalog, whole);
            asked.is_some_and(|(_, pace)| pace != WholePace::default())
        };
        if !parts_of_wholes(catalog).into_iter().any(|(_, whole)| is_asked(whole)) {
            return None;
        }
        let mut next = catalog.next(now_us.max(catalog.written_at_us), nonce);
        self.follow_wholes(&mut next).then_some(next)
    }

    /// Checks that a running plan may get this pace by itself.
    ///
    /// # Errors
    /// When it is a part of a whole that has another pace: that decides.
    pub(crate) fn check_part(
        &self,
        catalog: &Catalog,
        plan: PlanId,
        pace: Pace,
    ) -> Result<(), PaceError> {
        let part = parts_of_wholes(catalog).into_iter().find(|(id, _)| *id == plan);
        let asked = part.and_then(|(_, whole)| self.asked_of(catalog, whole));
        let id = operation_id(catalog.keyspace, plan);
        asked.map_or(Ok(()), |(whole_id, whole)| check_part(pace, id, whole_id, whole))
    }

    /// Returns the operation that is a whole, and its pace; `None` when it does not run.
    fn asked_of(&self, catalog: &Catalog, whole: Whole) -> Option<(String, WholePace)> {
        match whole {
            Whole::Rebalance(since_us) => {
                let running = self.settings.running_rebalance();
                let running = running.filter(|running| running.since_us == since_us)?;
                Some((running.operation_id(), running.pace()))
            }
            Whole::Drain(node, since_us) => {
                let mut drains = catalog.draining_nodes.iter();
                let is_it = |drain: &&NodeDrain| (drain.node, drain.since_us) == (node, since_us);
                let drain = drains.find(is_it)?;
                Some((drain.operation_id(), WholePace::from(drain)))
            }
        }
    }

    /// Returns what a node is like as a place for a replica.
    pub(super) fn site(&self, node: NodeId) -> Site {
        let disk = self.disk_of(node).filter(|disk| disk.bytes > 0);
        let used = disk.map_or(0, |disk| {
            let used = u128::from(disk.bytes.saturating_sub(disk.free));
            (used * 1000 / u128::from(disk.bytes)) as u64
        });
        Site {
            cordoned: self.settings.is_cordoned(node),
            zone: self.nodes.get(&node).map(|node| node.zone.clone()).unwrap_or_default(),
            used,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::{ReplicaId, ShardId};
    use vasto_core::reconcile::{Advance, MoveOrder, drain_node, pace_drain, start_moves};
    use vasto_core::report::ReplicaReport;
    use vasto_proto::v1;
    use vasto_shipping::ClusterSettings;

    use super::*;
    use crate::state::Delivery;
    use crate::state::tests::{hello, replica_report};

    const NOW: u64 = 1_000_000;
    const MONO: u64 = 5_000_000;
    const MIB: u64 = 1 << 20;
    const KEYSPACES: [KeyspaceId; 3] = [KeyspaceId(1), KeyspaceId(2), KeyspaceId(3)];

    /// Nodes 1 and 2 are live; three keyspaces have their only replica on node 1.
    fn three_keyspaces() -> (ClusterState, u64, u64) {
        let mut state = ClusterState::default();
        let session = state.connect(&hello(1, "a:1"), false, 10).unwrap().session;
        let second = state.connect(&hello(2, "a:2"), false, 10).unwrap().session;
        for id in KEYSPACES {
            let name = format!("ks{id}");
            let spec = KeyspaceSpec::default();
            let first = Catalog::first(id, &name, spec, &[vec![NodeId(1)]], 1_000, 1);
            state.install(first, Delivery::Push);
        }
        reported(&mut state, session);
        (state, session, second)
    }

    /// Node 1 has applied the newest versions.
    fn reported(state: &mut ClusterState, session: u64) {
        let report = |id: KeyspaceId| ReplicaReport {
            keyspace: id,
            ..replica_report(1, state.keyspaces[&id].catalog.version.0)
        };
        let replicas = KEYSPACES.map(report).to_vec();
        state.report(NodeId(1), session, &v1::Report::default(), replicas, 20);
    }

    /// Lets the drivers write until nothing is left to write.
    fn drive(state: &mut ClusterState, session: u64) {
        for _ in 0..20 {
            let mut written = false;
            for id in KEYSPACES {
                if let Advance::Write(next) = state.decide(id, MONO, NOW, 9) {
                    state.install(*next, Delivery::Push);
                    written = true;
                }
            }
            reported(state, session);
            if !written {
                return;
            }
        }
        panic!("they do not come to rest");
    }

    fn rates(state: &ClusterState) -> Vec<Option<u64>> {
        let plans = state.active().flat_map(|keyspace| keyspace.catalog.plans());
        plans.map(|plan| plan.max_rate).collect()
    }

    fn paused(state: &ClusterState) -> Vec<bool> {
        let plans = state.active().flat_map(|keyspace| keyspace.catalog.plans());
        plans.map(|plan| plan.paused).collect()
    }

    #[test]
    fn the_copies_of_a_drain_share_its_rate_across_keyspaces_from_their_begin() {
        let (mut state, session, _) = three_keyspaces();
        let drain = NodeDrain { max_rate: Some(8 * MIB), ..NodeDrain::new(NodeId(1), false, 7) };
        for id in KEYSPACES {
            let catalog = state.keyspaces[&id].catalog.clone();
            let next = drain_node(&catalog, drain.clone(), NOW, 2).unwrap();
            state.install(next, Delivery::Push);
        }
        reported(&mut state, session);
        let Advance::Write(first) = state.decide(KEYSPACES[0], MONO, NOW, 3) else { panic!() };
        assert_eq!(first.plan.as_ref().unwrap().max_rate, Some(8 * MIB), "it is alone");
        drive(&mut state, session);
        assert_eq!(rates(&state), [Some(2 * MIB); 3]);
        // Each keyspace is asked to change the pace; the parts follow.
        let id = drain.operation_id();
        let ask = |state: &mut ClusterState, pace: Pace| {
            for keyspace in KEYSPACES {
                let catalog = state.keyspaces[&keyspace].catalog.clone();
                let next = pace_drain(&catalog, &id, pace, NOW, 4).unwrap();
                state.install(next, Delivery::Push);
            }
            drive(state, session);
        };
        ask(&mut state, Pace::Rate(None));
        assert_eq!(rates(&state), [None; 3]);
        ask(&mut state, Pace::Rate(Some(4 * MIB)));
        assert_eq!(rates(&state), [Some(MIB); 3]);
        ask(&mut state, Pace::Pause);
        assert_eq!(paused(&state), [true; 3]);
        let catalog = state.keyspaces[&KEYSPACES[0]].catalog.clone();
        let plan = catalog.plan.as_ref().unwrap().id;
        let refused = state.check_part(&catalog, plan, Pace::Resume).unwrap_err().to_string();
        assert!(refused.contains(&id), "{refused}");
        assert!(state.check_part(&catalog, plan, Pace::Rate(None)).is_err());
        assert_eq!(state.check_part(&catalog, plan, Pace::Pause), Ok(()));
        // The part of one that is alone grows again.
        ask(&mut state, Pace::Resume);
        for id in [KEYSPACES[0], KEYSPACES[1]] {
            let mut next = state.keyspaces[&id].catalog.next(NOW, 5);
            next.state = KeyspaceState::Deleted;
            state.install(next, Delivery::Push);
        }
        drive(&mut state, session);
        assert_eq!(rates(&state), [Some(4 * MIB)]);
    }

    #[test]
    fn a_move_has_the_pace_of_the_rebalance_that_runs() {
        let (mut state, session, second) = three_keyspaces();
        let begun = ClusterSettings::default().with_rebalance_at(Some(MIB), 7, 1).unwrap();
        state.settings = Arc::new(begun.clone());
        let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(2) };
        for id in [KEYSPACES[0], KEYSPACES[1]] {
            let catalog = state.keyspaces[&id].catalog.clone();
            let mut next = start_moves(&catalog, &[order], 7, NOW, 2).unwrap();
            assert!(state.follow_wholes(&mut next));
            state.install(next, Delivery::Push);
        }
        drive(&mut state, session);
        assert_eq!((rates(&state), paused(&state)), (vec![Some(MIB / 2); 2], vec![false; 2]));
        let asked = WholePace { paused: true, max_rate: Some(MIB) };
        state.settings = Arc::new(begun.with_pace(7, asked, 8, 2).unwrap());
        let Advance::Write(next) = state.decide(KEYSPACES[0], MONO, NOW, 9) else { panic!() };
        assert!(state.pauses_moves(&next), "the newest settings are asked for first");
        drive(&mut state, session);
        assert_eq!(paused(&state), [true; 2]);
        let catalog = state.keyspaces[&KEYSPACES[0]].catalog.clone();
        let refused = state.check_part(&catalog, catalog.moves[0].id(), Pace::Resume);
        assert!(refused.unwrap_err().to_string().contains("rebalance-7"));
        // Nothing is written while no node is there: another master may be driving.
        let faster = WholePace { paused: true, max_rate: Some(8 * MIB) };
        state.settings = Arc::new(state.settings.with_pace(7, faster, 9, 3).unwrap());
        assert!(state.with_pace_of_wholes(KEYSPACES[0], NOW, 3).is_some());
        for (node, session) in [(1, session), (2, second)] {
            state.disconnect(NodeId(node), session, 40);
        }
        assert_eq!(state.with_pace_of_wholes(KEYSPACES[0], NOW, 3), None);
        // What was asked of a rebalance that has ended holds for nothing.
        let ended = state.settings.without_rebalance(7, false, 10, 4).unwrap();
        state.settings = Arc::new(ended);
        assert_eq!(state.check_part(&catalog, catalog.moves[0].id(), Pace::Resume), Ok(()));
    }

    #[test]
    fn a_site_is_what_the_node_and_the_settings_say() {
        let (mut state, session, _) = three_keyspaces();
        assert_eq!(state.site(NodeId(9)), Site::default());
        let disk = v1::Report { disk_used: 300, disk_free: 100, ..v1::Report::default() };
        state.report(NodeId(1), session, &disk, Vec::new(), 30);
        let cordoned = ClusterSettings::default().with_cordon(NodeId(1), true, 1, 1).unwrap();
        state.settings = Arc::new(cordoned);
        let site = Site { cordoned: true, zone: "z1".into(), used: 750 };
        assert_eq!(state.site(NodeId(1)), site);
    }
}
