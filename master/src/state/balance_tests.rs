//! The picture of the cluster that the balance gets, and how moves of one keyspace go on.

#![allow(clippy::unwrap_used)]
use vasto_core::balance::{Move, When, is_balanced, next_moves};
use vasto_core::catalog::{Catalog, DrainingReplica, KeyspaceSpec, NodeDrain};
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::limits::COPIES_PER_NODE_MAX;
use vasto_core::reconcile::{Advance, MoveOrder, start_moves};
use vasto_core::report::ReplicaReport;
use vasto_proto::v1;
use vasto_shipping::ClusterSettings;

use super::tests::{hello, replica_report};
use super::{ClusterState, Delivery};

const KS: KeyspaceId = KeyspaceId(1);
const MIB: u64 = 1 << 20;
/// Time of all looks, by the master's own clock, microseconds.
const MONO: u64 = 5_000_000;
const NOW: u64 = 1_000_000;

/// Nodes 1 to 4 are live; six shards are on nodes 1 and 2, each of 64 MiB.
fn uneven() -> (ClusterState, Vec<u64>) {
    let mut state = ClusterState::default();
    let sessions: Vec<u64> = (1..=4u64)
        .map(|node| state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap().session)
        .collect();
    let spec = KeyspaceSpec { shards: 6, ..KeyspaceSpec::default() };
    let nodes: Vec<Vec<NodeId>> = (0..6).map(|shard| vec![NodeId(1 + shard % 2)]).collect();
    state.install(Catalog::first(KS, "ks1", spec, &nodes, 1_000, 1), Delivery::Push);
    (state, sessions)
}

fn reported(state: &mut ClusterState, sessions: &[u64]) {
    reported_with(state, sessions, |_| {});
}

fn reported_with(state: &mut ClusterState, sessions: &[u64], change: impl Fn(&mut ReplicaReport)) {
    let catalog = state.keyspaces[&KS].catalog.clone();
    for (node, session) in (1..).zip(sessions) {
        let members = catalog.members_on(NodeId(node)).into_iter();
        let replicas: Vec<ReplicaReport> = members
            .map(|(shard, replica, _)| ReplicaReport {
                shard,
                bytes: 64 * MIB,
                load: 8,
                ..replica_report(replica.0, catalog.version.0)
            })
            .map(|mut report| {
                change(&mut report);
                report
            })
            .collect();
        let disk = v1::Report { disk_used: 1 << 30, disk_free: 99 << 30, ..Default::default() };
        state.report(NodeId(node), *session, &disk, replicas, 20);
    }
}

fn picture(state: &ClusterState) -> vasto_core::balance::Balance {
    state.balance(MONO, NOW)
}

#[test]
fn nothing_is_told_before_the_nodes_have_reported() {
    let (mut state, sessions) = uneven();
    assert!(!state.has_heard_of_all(MONO));
    reported(&mut state, &sessions);
    assert!(state.has_heard_of_all(MONO));
    let picture = picture(&state);
    assert_eq!((picture.nodes.len(), picture.shards.len()), (4, 6));
    assert!(picture.nodes.iter().all(|node| node.takes_part && node.capacity == 100 << 30));
    let replica = picture.shards[0].replicas[0];
    assert_eq!((replica.bytes, replica.load, replica.node), (64 * MIB, 8, NodeId(1)));
    assert!(!is_balanced(&picture) && state.moving(MONO) == 0);
    // A node that is gone is not waited for, and nothing of it moves.
    state.disconnect(NodeId(2), sessions[1], 30);
    let gone = state.balance(MONO, NOW);
    assert!(state.has_heard_of_all(MONO) && !gone.nodes[1].takes_part);
    assert_eq!((gone.shards[0].moves, gone.shards[1].moves), (When::Now, When::Never));
    assert_eq!(gone.nodes[1].capacity, 100 << 30, "the parts of the others stay");
}

#[test]
fn what_moves_counts_where_it_goes_to_and_holds_its_place() {
    let (mut state, sessions) = uneven();
    reported(&mut state, &sessions);
    let moves = next_moves(&picture(&state), 2);
    let orders: Vec<MoveOrder> = moves
        .iter()
        .map(|one| match *one {
            Move::Replica { shard, replica, to, .. } => MoveOrder { shard, replica, to },
            Move::Primary { .. } => panic!("{one:?}"),
        })
        .collect();
    assert_eq!([orders[0].to, orders[1].to], [NodeId(3), NodeId(4)]);
    let catalog = state.keyspaces[&KS].catalog.clone();
    let next = start_moves(&catalog, &orders, 7, NOW, 2).unwrap();
    // Not written yet: the places and the disk are held.
    let hold = state.hold_places(&next).unwrap();
    let held = picture(&state);
    let node = |id: usize| &held.nodes[id - 1];
    assert_eq!((node(3).permits, node(4).permits), (COPIES_PER_NODE_MAX - 1, 3));
    assert_eq!(node(1).room - node(3).room, 64 * MIB);
    state.loads.give_back(hold);
    state.install(next, Delivery::Push);
    let moving = picture(&state);
    assert_eq!((moving.nodes[2].permits, state.moving(MONO)), (COPIES_PER_NODE_MAX - 1, 2));
    let at = |order: &MoveOrder| &moving.shards[order.shard.0 as usize];
    for order in &orders {
        let shard = at(order);
        assert_eq!(shard.replicas.iter().map(|one| one.node).collect::<Vec<_>>(), [order.to]);
        assert_eq!((shard.replicas[0].bytes, shard.moves), (64 * MIB, When::Later));
        assert!(shard.elsewhere.contains(&NodeId(1)) || shard.elsewhere.contains(&NodeId(2)));
    }
    assert!(is_balanced(&moving), "two replicas are on each of two nodes, one on each other");
    let waits = state.rebalance_waits(MONO).unwrap();
    assert!(waits.contains("to be copied to"), "{waits}");
    // The driver asks for the checkpoints of both; nothing is due before they are reported.
    let decided = state.decide(KS, MONO, NOW, 3);
    assert!(matches!(&decided, Advance::Wait(what) if what.contains("checkpoint")), "{decided:?}");
}

/// Taken for idle, it would draw further replicas to its node, which go back later.
#[test]
fn a_new_replica_counts_like_the_others_of_its_keyspace_until_its_load_is_known() {
    let (mut state, sessions) = uneven();
    let is_new = |report: &mut ReplicaReport| {
        (report.load, report.load_unknown) = match report.shard {
            ShardId(0) => (0, true),
            _ => (400, false),
        };
    };
    reported_with(&mut state, &sessions, is_new);
    let young = picture(&state);
    let (new, old) = (&young.shards[0], &young.shards[1]);
    assert_eq!((new.replicas[0].load, old.replicas[0].load), (400, 400));
    assert_eq!((new.moves, old.moves), (When::Later, When::Now));
    assert!(next_moves(&young, 6).iter().all(|one| match one {
        Move::Replica { shard, .. } | Move::Primary { shard, .. } => *shard != ShardId(0),
    }));
    reported_with(&mut state, &sessions, |report| report.load = 5 + u64::from(report.shard.0));
    let known = picture(&state);
    assert_eq!((known.shards[0].replicas[0].load, known.shards[0].moves), (5, When::Now));
}

#[test]
fn cordoned_and_draining_nodes_and_shards_in_repair_take_no_part() {
    let (mut state, sessions) = uneven();
    reported(&mut state, &sessions);
    let cordoned = ClusterSettings::default().with_cordon(NodeId(3), true, 1, 1).unwrap();
    state.settings = std::sync::Arc::new(cordoned);
    assert!(!picture(&state).nodes[2].takes_part);
    let moves = next_moves(&picture(&state), 9);
    assert!(!moves.is_empty());
    assert!(
        moves.iter().all(|one| matches!(one, Move::Replica { to: NodeId(4), .. })),
        "{moves:?}"
    );

    let mut next = state.keyspaces[&KS].catalog.next(2_000, 2);
    next.draining.push(DrainingReplica {
        shard: ShardId(0),
        replica: ReplicaId(99),
        node: NodeId(4),
        since_us: 1,
    });
    state.install(next.clone(), Delivery::Push);
    let drains = picture(&state);
    assert_eq!((drains.shards[0].moves, drains.shards[1].moves), (When::Never, When::Now));
    assert_eq!(drains.shards[0].elsewhere, [NodeId(4)]);
    assert!(state.rebalance_waits(MONO).unwrap().contains("to be drained"));
    next.version = CatalogVersion(3);
    next.draining_nodes.push(NodeDrain::new(NodeId(1), false, 1));
    state.install(next, Delivery::Push);
    let drains = picture(&state);
    assert!(!drains.nodes[0].takes_part && next_moves(&drains, 9).is_empty());
}

#[test]
fn moves_of_a_cancelled_rebalance_are_undone_whenever_they_began() {
    let (mut state, sessions) = uneven();
    reported(&mut state, &sessions);
    let running = ClusterSettings::default().with_rebalance(7, 1).unwrap();
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(3) };
    let begun = start_moves(&state.keyspaces[&KS].catalog, &[order], 7, NOW, 2).unwrap();
    state.install(begun, Delivery::Push);
    let cancelled = running.without_rebalance(7, true, 8, 2).unwrap();
    let later = cancelled.with_rebalance(9, 3).unwrap();
    for goes_on in [running, later] {
        state.settings = std::sync::Arc::new(goes_on);
        assert!(matches!(state.decide(KS, MONO, NOW, 3), Advance::Wait(_)));
    }
    state.settings = std::sync::Arc::new(cancelled);
    let Advance::Write(next) = state.decide(KS, MONO, NOW, 3) else { panic!("it goes on") };
    assert!(next.moves.is_empty());
    let reason = next.operations[0].reason.as_ref().unwrap();
    assert!(reason.contains("cancelled"), "{reason}");
}
