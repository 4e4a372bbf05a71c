//! What each report, version and look costs must not grow with the number of keyspaces, and what the
//! master remembers must not grow for ever.

#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;
use std::time::Duration;

use futures::FutureExt;
use vasto_core::catalog::{Catalog, KeyspaceSpec, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn, NodeId, ReplicaId, ShardId};
use vasto_core::limits::{COPIES_PER_NODE_MAX, FAILOVER_AWAY};
use vasto_core::reconcile::{Advance, start_resize};
use vasto_core::report::{ReplicaPhase, ReplicaReport, ReplicationReport};
use vasto_proto::v1;

use super::tests::{hello, replica_report, two_nodes};
use super::{ClusterState, Delivery, Sent};

const KS: KeyspaceId = KeyspaceId(1);
const NODES: u64 = 20;
const SECOND: u64 = 1_000_000;

/// Returns the nodes of a keyspace of [`many`].
fn nodes_of(id: u64) -> Vec<NodeId> {
    (0..3).map(|n| NodeId(1 + (id + n) % NODES)).collect()
}

/// Returns so many keyspaces of one shard with three replicas that serve, over 20 nodes, and the
/// session of each node.
fn many(keyspaces: u64) -> (ClusterState, BTreeMap<NodeId, u64>) {
    let mut state = ClusterState::default();
    let mut sessions = BTreeMap::new();
    for node in 1..=NODES {
        let joined = state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap();
        sessions.insert(NodeId(node), joined.session);
    }
    let spec = KeyspaceSpec { replicas: 3, ..KeyspaceSpec::default() };
    for id in 1..=keyspaces {
        let (keyspace, nodes) = (KeyspaceId(id), nodes_of(id));
        let name = format!("ks{id}");
        let shards = [nodes.clone()];
        let catalog = Catalog::first(keyspace, &name, spec.clone(), &shards, 1_000, 1);
        state.install(catalog, Delivery::Push);
        for (replica, node) in (1..).zip(nodes) {
            let report =
                ReplicaReport { keyspace, shard: ShardId(0), ..replica_report(replica, 1) };
            let session = sessions[&node];
            let odd = state.report(node, session, &v1::Report::default(), vec![report], 20);
            assert!(odd.is_empty(), "{odd:?}");
        }
    }
    (state, sessions)
}

/// Returns true when the driver of a keyspace has been woken since the last time.
fn woken(state: &ClusterState, keyspace: KeyspaceId) -> bool {
    state.keyspaces[&keyspace].wake.notified().now_or_never().is_some()
}

#[test]
fn a_new_version_is_all_that_a_session_looks_at() {
    let (mut state, sessions) = many(1_000);
    let mut sent: BTreeMap<NodeId, Sent> = BTreeMap::new();
    for (node, session) in &sessions {
        let first = state.outstanding(*node, *session, sent.entry(*node).or_default());
        assert_eq!(first.len(), 1_001, "the addresses and every keyspace");
    }
    state.offered.set(0);
    for nonce in 2..12 {
        let next = state.keyspaces[&KeyspaceId(7)].catalog.next(2_000, nonce);
        state.install(next, Delivery::Push);
        for (node, session) in &sessions {
            let sent = sent.get_mut(node).unwrap();
            assert_eq!(state.outstanding(*node, *session, sent).len(), 1);
        }
    }
    assert_eq!(state.offered.get(), 10 * NODES);
    // Of several versions that a slow session has missed it gets the newest.
    for nonce in 20..23 {
        let next = state.keyspaces[&KeyspaceId(7)].catalog.next(2_000, nonce);
        state.install(next, Delivery::Push);
    }
    let node = NodeId(1);
    let missed = state.outstanding(node, sessions[&node], sent.get_mut(&node).unwrap());
    assert_eq!(missed.len(), 1);
    let Some(v1::master_message::Message::Keyspace(version)) = &missed[0].message else {
        panic!("{missed:?}")
    };
    assert_eq!(version.version, 14);
    let catalog: Catalog = serde_json::from_str(&version.catalog_json).unwrap();
    assert_eq!(catalog, *state.keyspaces[&KeyspaceId(7)].catalog);
}

#[test]
fn whoever_is_gone_is_named_to_every_other_node() {
    let (mut state, first, _) = two_nodes();
    let gone_us = 100 + FAILOVER_AWAY.as_micros() as u64;
    state.disconnect(NodeId(1), first, 100);
    assert!(state.gone_besides(NodeId(2), gone_us - 1).is_empty());
    assert_eq!(state.gone_besides(NodeId(2), gone_us), [NodeId(1)]);
    assert!(state.gone_besides(NodeId(1), gone_us).is_empty());
    // One that has replicas, and has not come since this master started.
    let (id, spec, nodes) = (KeyspaceId(2), KeyspaceSpec::default(), [vec![NodeId(9)]]);
    state.install(Catalog::first(id, "ks2", spec, &nodes, 1_000, 1), Delivery::Push);
    assert_eq!(state.gone_besides(NodeId(2), gone_us), [NodeId(1)], "it may still come");
    assert_eq!(state.gone_besides(NodeId(2), 10 * SECOND), [NodeId(1), NodeId(9)]);
}

#[test]
fn figures_wake_no_driver_unless_a_plan_or_a_quarantine_waits_for_them() {
    let (mut state, first, _) = two_nodes();
    let take = |state: &mut ClusterState, report: ReplicaReport| {
        let odd = state.report(NodeId(1), first, &v1::Report::default(), vec![report], 20);
        assert!(odd.is_empty(), "{odd:?}");
        woken(state, KS)
    };
    assert!(take(&mut state, replica_report(1, 1)), "the first report of a session");
    let mut changes = state.keyspaces[&KS].changes();
    changes.mark_unchanged();
    let busy = ReplicaReport { lsn: Lsn(101), keys: 1_001, load: 7, ..replica_report(1, 1) };
    assert!(!take(&mut state, busy.clone()));
    assert!(changes.has_changed().unwrap(), "who waits for a figure is told");
    assert_eq!(state.keyspaces[&KS].reports[&ReplicaId(1)], busy);
    let replication = ReplicationReport { ready: false, ..busy.replication.clone() };
    assert!(take(&mut state, ReplicaReport { replication, ..busy.clone() }));
    assert!(take(&mut state, busy.clone()));
    let before = state.keyspaces[&KS].catalog.clone();
    let growing = start_resize(&before, 3, &[vec![NodeId(1)]], 5_000, 2).unwrap();
    state.install(growing, Delivery::Push);
    assert!(woken(&state, KS));
    assert!(take(&mut state, ReplicaReport { lsn: Lsn(102), ..busy }));
}

#[test]
fn drivers_are_woken_when_a_node_has_been_away_for_as_long_as_rules_wait_and_when_it_is_back() {
    let (mut state, first, _) = two_nodes();
    state.replace_after_us = Some(100 * SECOND);
    let look = |state: &mut ClusterState, at_us: u64| {
        state.note_absences(at_us);
        woken(state, KS)
    };
    assert!(!look(&mut state, 20) && !look(&mut state, SECOND), "all are here");
    state.disconnect(NodeId(1), first, SECOND);
    assert!(woken(&state, KS), "it is away");
    look(&mut state, SECOND + 1);
    let seconds = (1..200).filter(|second| look(&mut state, (1 + second) * SECOND));
    // Failover, the silence of a node, the loss that was accepted, the patience of plans, the repair.
    assert_eq!(seconds.collect::<Vec<u64>>(), [1, 11, 16, 61, 101]);
    state.connect(&hello(1, "a:1"), false, 300 * SECOND).unwrap();
    assert!(look(&mut state, 300 * SECOND + 1) && !look(&mut state, 301 * SECOND));
}

#[test]
fn however_many_keyspaces_lack_replicas_as_many_are_looked_at_in_a_second() {
    let (mut state, sessions) = many(600);
    let lost = NodeId(3);
    state.replace_after_us = Some(SECOND);
    assert_eq!(state.look_again(KS, 20), None);
    state.disconnect(lost, sessions[&lost], 100);
    let (with, without): (Vec<u64>, Vec<u64>) =
        (1..=600).partition(|id| nodes_of(*id).contains(&lost));
    assert_eq!(state.look_again(KeyspaceId(with[0]), SECOND), None, "it may come back");
    let look = |state: &mut ClusterState, id: u64, at_us: u64| {
        state.look_again(KeyspaceId(id), at_us).map(|pause| pause.as_millis())
    };
    let pauses: Vec<_> = with.iter().map(|id| look(&mut state, *id, 2 * SECOND)).collect();
    assert_eq!((pauses.len(), pauses[0], pauses[89]), (90, Some(500), Some(900)));
    assert_eq!(look(&mut state, with[0], 2 * SECOND), Some(900));
    assert_eq!(look(&mut state, without[0], 2 * SECOND), None);
    // One that has failed is replaced when there is room, too.
    let failed = ReplicaPhase::Failed("rot".into());
    let (keyspace, node) = (KeyspaceId(without[0]), nodes_of(without[0])[0]);
    let report = ReplicaReport { keyspace, phase: failed, ..replica_report(1, 1) };
    let session = sessions[&node];
    assert!(state.report(node, session, &v1::Report::default(), vec![report], 20).is_empty());
    assert_eq!(look(&mut state, without[0], 2 * SECOND), Some(910));
    let report = ReplicaReport { keyspace, ..replica_report(1, 1) };
    assert!(state.report(node, session, &v1::Report::default(), vec![report], 20).is_empty());
    assert_eq!(look(&mut state, without[0], 2 * SECOND), None);
    state.connect(&hello(3, "a:3"), false, 2 * SECOND).unwrap();
    assert!(with.iter().all(|id| look(&mut state, *id, 3 * SECOND).is_none()));
    assert!(state.lacking.is_empty());
}

#[test]
fn no_more_replicas_of_a_lost_node_are_given_up_than_others_make_at_a_time() {
    let (mut state, sessions) = many(2_000);
    let lost = NodeId(3);
    state.replace_after_us = Some(SECOND);
    state.disconnect(lost, sessions[&lost], 100);
    let mut made: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut wait = Vec::new();
    // The keyspaces of which it had a replica that was not primary; each has one on node 2.
    let concerned = |id: &u64| nodes_of(*id)[1..].contains(&lost);
    for id in (1..=2_000).filter(concerned) {
        match state.decide(KeyspaceId(id), 2 * SECOND, 5_000, 3) {
            Advance::Write(next) => {
                assert_eq!((next.version.0, next.draining.len()), (2, 1));
                assert!(state.hold_places(&next).is_some());
                let plan = next.plan.as_ref().unwrap();
                *made.entry(plan.targets[0].node).or_default() += 1;
            }
            Advance::Idle | Advance::Wait(_) => wait.push(id),
        }
    }
    assert!(made.values().all(|copies| *copies == COPIES_PER_NODE_MAX), "{made:?}");
    assert_eq!((made.len(), wait.len()), (18, 200 - 18 * COPIES_PER_NODE_MAX), "{made:?}");
    assert!(!made.contains_key(&NodeId(2)) && !made.contains_key(&lost));
    // Those that wait have not lost anything yet, and are looked at.
    let waits = KeyspaceId(wait[0]);
    assert!(state.keyspaces[&waits].catalog.draining.is_empty());
    assert!(
        state.look_again(waits, 2 * SECOND).is_some_and(|pause| pause < Duration::from_secs(1))
    );
}

#[test]
fn whoever_reports_a_replica_of_a_deleted_keyspace_is_sent_the_deletion() {
    let (mut state, ..) = two_nodes();
    let third = state.connect(&hello(3, "a:3"), false, 20).unwrap().session;
    let next = state.keyspaces[&KS].catalog.next(2_000, 2);
    state.install(Catalog { state: KeyspaceState::Deleted, ..next }, Delivery::Push);
    let mut sent = Sent::default();
    assert_eq!(state.outstanding(NodeId(3), third, &mut sent).len(), 1, "the addresses");
    let left = vec![replica_report(77, 1)];
    assert!(state.report(NodeId(3), third, &v1::Report::default(), left, 30).is_empty());
    assert_eq!(state.outstanding(NodeId(3), third, &mut sent).len(), 1);
    assert!(state.outstanding(NodeId(3), third, &mut sent).is_empty());
}

#[test]
fn reports_of_replicas_without_a_part_are_kept_in_bounded_number() {
    let (mut state, first, _) = two_nodes();
    let odd: Vec<ReplicaReport> = (101..=300).map(|replica| replica_report(replica, 1)).collect();
    state.report(NodeId(1), first, &v1::Report::default(), odd, 20);
    state.report(NodeId(1), first, &v1::Report::default(), vec![replica_report(1, 1)], 20);
    let next = state.keyspaces[&KS].catalog.next(2_000, 2);
    state.install(next, Delivery::Push);
    let reports = &state.keyspaces[&KS].reports;
    assert_eq!(reports.len(), 65);
    assert!(reports.contains_key(&ReplicaId(1)) && reports.contains_key(&ReplicaId(300)));
    assert_eq!(state.keyspaces[&KS].reporters.len(), 65);
    // A deletion is sent to all that have some.
    let odd: Vec<ReplicaReport> = (101..=300).map(|replica| replica_report(replica, 2)).collect();
    let third = state.connect(&hello(3, "a:3"), false, 20).unwrap().session;
    state.report(NodeId(3), third, &v1::Report::default(), odd[..1].to_vec(), 20);
    state.report(NodeId(1), first, &v1::Report::default(), odd[1..].to_vec(), 20);
    let next = state.keyspaces[&KS].catalog.next(3_000, 3);
    state.install(Catalog { state: KeyspaceState::Deleted, ..next }, Delivery::Push);
    let messages = state.outstanding(NodeId(3), third, &mut Sent::default());
    assert_eq!(messages.len(), 2, "the addresses and the deletion");
}
