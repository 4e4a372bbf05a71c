//! The pace of wholes: drains of nodes with their copies, rebalances with their moves.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::advance::advance;
use super::drain::{cancel_drain, drain_node};
use super::failover::Presence;
use super::members::advance_members;
use super::moves::{MoveOrder, advance_moves, start_moves};
use super::pace::{
    Pace, Whole, WholePace, check_part, drain_of_plan, follow_wholes, pace_drain, pace_moves,
    parts_of_wholes, set_pace,
};
use super::progress::Advance;
use super::refusal::PaceError;
use super::resize::start_resize;
use super::view::{Around, Site};
use crate::catalog::{Catalog, KeyspaceSpec, NodeDrain};
use crate::control::plan::{Plan, PlanKind, Step};
use crate::control::report::{
    ReplicaPhase, ReplicaReport, ReplicationReport, Reports, TargetProgress, TargetStage,
};
use crate::ids::{KeyspaceId, NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::{BULK_RATE_MIN, TARGET_SILENT_MAX};

const NOW: u64 = 1_000_000_000;
const SINCE: u64 = 77;
const MIB: u64 = 1 << 20;
const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);
const NONE: fn(NodeId) -> bool = |_| false;
const TO_NINE: fn(&Catalog, ShardId) -> Option<NodeId> = |_, _| Some(NodeId(9));
const ANYWHERE: fn(NodeId) -> Site = |_| Site::default();

/// Two shards on nodes 1 and 2.
fn catalog() -> Catalog {
    let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
    Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1)], vec![NodeId(2)]], NOW, 1)
}

fn drain() -> NodeDrain {
    NodeDrain::new(NodeId(1), false, SINCE)
}

fn draining() -> Catalog {
    drain_node(&catalog(), drain(), NOW, 2).unwrap()
}

/// Both shards move to nodes 3 and 4.
fn moving() -> Catalog {
    let order = |shard: u32| MoveOrder {
        shard: ShardId(shard),
        replica: ReplicaId(u64::from(shard) + 1),
        to: NodeId(u64::from(shard) + 3),
    };
    start_moves(&catalog(), &[order(0), order(1)], SINCE, NOW, 2).unwrap()
}

fn all_serve(catalog: &Catalog) -> Reports {
    let members = catalog.members().into_iter();
    members
        .map(|(shard, member, placed)| {
            let report = ReplicaReport {
                version: catalog.version,
                replication: ReplicationReport { ready: placed, ..Default::default() },
                ..ReplicaReport::new(catalog.keyspace, shard, member.replica, ReplicaPhase::Serving)
            };
            (member.replica, report)
        })
        .collect()
}

fn around() -> Around<'static> {
    Around { presence: &HERE, long_gone: &NONE, lost: &NONE, room: &TO_NINE, site: &ANYWHERE }
}

fn members(catalog: &Catalog) -> Option<Catalog> {
    advance_members(catalog, &all_serve(catalog), &around(), NOW, 3)
}

/// The drain with its first copy under way.
fn copying() -> Catalog {
    members(&draining()).unwrap()
}

fn plan(catalog: &Catalog) -> &Plan {
    catalog.plan.as_ref().unwrap()
}

#[test]
fn a_paused_drain_begins_nothing_and_its_copy_stands_still() {
    let id = drain().operation_id();
    let pace = |catalog: &Catalog, pace: Pace| pace_drain(catalog, &id, pace, NOW, 4).unwrap();
    let paused = pace(&draining(), Pace::Pause);
    assert_eq!(members(&paused), None);
    let resumed = pace(&paused, Pace::Resume);
    assert_eq!(resumed.draining_nodes, draining().draining_nodes);
    assert!(members(&resumed).unwrap().plan.is_some());

    let paused = pace(&copying(), Pace::Pause);
    assert!(plan(&paused).paused && paused.draining_nodes[0].paused);
    assert_eq!(drain_of_plan(&paused, plan(&paused)), paused.draining_nodes.first());
    let mut tail = paused.clone();
    tail.plan.as_mut().unwrap().step = Step::Tail;
    let reports = all_serve(&tail);
    let waits = advance(&tail, &reports, |_| 0, |_| u64::MAX, NOW + 1, 5);
    assert!(matches!(&waits, Advance::Wait(what) if what.contains(&id)), "{waits:?}");
    assert!(!plan(&pace(&tail, Pace::Resume)).paused);
    // The copy is placed: the old replica stays until the drain goes on.
    let mut placed = Catalog { plan: None, ..paused };
    let target = plan(&tail).targets[0];
    let member = crate::catalog::Placed { replica: target.replica, node: target.node };
    placed.placement[0].replicas.push(member);
    assert_eq!(members(&placed), None);
    let goes_on = members(&pace(&placed, Pace::Resume)).unwrap();
    assert_eq!(goes_on.placement[0].transferring_to, Some(target.replica));
}

#[test]
fn a_drain_is_paced_where_it_runs_and_not_in_a_cutover() {
    let ask = |catalog: &Catalog, id: &str, pace: Pace| pace_drain(catalog, id, pace, NOW, 4);
    let id = drain().operation_id();
    let ended = Err(PaceError::Ended("node-9-9".into()));
    assert_eq!(ask(&draining(), "node-9-9", Pace::Pause), ended);
    let slow = Pace::Rate(Some(BULK_RATE_MIN - 1));
    assert_eq!(ask(&draining(), &id, slow), Err(PaceError::TooSlow(BULK_RATE_MIN - 1)));
    let mut sealing = start_resize(&draining(), 3, &[vec![NodeId(3)]], NOW, 3).unwrap();
    assert!(ask(&sealing, &id, Pace::Pause).is_ok());
    sealing.plan.as_mut().unwrap().step = Step::Sealing;
    assert_eq!(ask(&sealing, &id, Pace::Pause), Err(PaceError::Sealed("op-1-1".into())));
    // A resize beside a drain is no part of it.
    sealing.plan.as_mut().unwrap().step = Step::Tail;
    assert!(parts_of_wholes(&sealing).is_empty());
    assert!(!plan(&ask(&sealing, &id, Pace::Pause).unwrap()).paused);
}

#[test]
fn a_move_has_a_pace_of_its_own_and_that_of_its_rebalance() {
    let begun = moving();
    let first = begun.moves[0].id();
    let one = set_pace(&begun, first, Pace::Pause, NOW, 3).unwrap();
    assert_eq!((one.moves[0].plan.paused, one.moves[1].plan.paused), (true, false));
    let slow = set_pace(&one, first, Pace::Rate(Some(MIB)), NOW, 4).unwrap();
    assert_eq!(slow.moves[0].plan.max_rate, Some(MIB));
    let mut placed = begun.clone();
    placed.moves[0].plan.step = Step::Committed;
    let committed = set_pace(&placed, first, Pace::Pause, NOW, 3);
    assert_eq!(committed, Err(PaceError::Committed("op-1-1".into())));
    assert_eq!(
        set_pace(&begun, PlanId(99), Pace::Pause, NOW, 3).unwrap_err(),
        PaceError::Ended("op-1-99".into())
    );

    let all = pace_moves(&placed, SINCE, Pace::Pause, NOW, 3).unwrap();
    assert_eq!((all.moves[0].plan.paused, all.moves[1].plan.paused), (false, true));
    assert_eq!(pace_moves(&all, SINCE, Pace::Pause, NOW, 3), None, "it is so");
    assert_eq!(pace_moves(&placed, SINCE + 1, Pace::Pause, NOW, 3), None, "another rebalance");
    let resumed = pace_moves(&all, SINCE, Pace::Resume, NOW, 3).unwrap();
    assert_eq!(resumed.moves, placed.moves);
    let free = pace_moves(&slow, SINCE, Pace::Rate(None), NOW, 5).unwrap();
    assert_eq!(free.moves[0].plan.max_rate, None);
}

#[test]
fn a_paused_move_goes_no_further_and_none_of_its_times_runs_out() {
    let paused = pace_moves(&moving(), SINCE, Pace::Pause, NOW, 3).unwrap();
    let late = NOW + 100 * TARGET_SILENT_MAX.as_micros() as u64;
    let at = |catalog: &Catalog, reports: &Reports| {
        advance_moves(catalog, reports, &around(), |_| 0, |_| u64::MAX, late, 4)
    };
    assert!(matches!(at(&paused, &all_serve(&paused)), Advance::Wait(_)), "no checkpoint begins");
    let mut tail = paused.clone();
    tail.moves.iter_mut().for_each(|moving| moving.plan.step = Step::Tail);
    let mut reports = all_serve(&tail);
    assert!(matches!(at(&tail, &reports), Advance::Wait(_)), "its target is silent");
    for moving in &tail.moves {
        let report = reports.get_mut(&moving.plan.targets[0].replica).unwrap();
        let stage = TargetStage::Tailing;
        report.target = Some(TargetProgress { stage, ..TargetProgress::new(moving.id()) });
    }
    let waits = at(&tail, &reports);
    assert!(matches!(&waits, Advance::Wait(what) if what.contains("is paused")), "{waits:?}");
    let resumed = pace_moves(&tail, SINCE, Pace::Resume, late, 5).unwrap();
    assert!(matches!(at(&resumed, &reports), Advance::Write(_)));
}

#[test]
fn parts_follow_their_whole_and_keep_what_was_asked_of_them_alone() {
    let whole = |paused: bool, max_rate: Option<u64>| move |_: u64| WholePace { paused, max_rate };
    let mut next = moving();
    assert!(!follow_wholes(&mut next, whole(false, None), |_| 2));
    assert!(follow_wholes(&mut next, whole(true, Some(8 * MIB)), |_| 2));
    assert!(next.moves.iter().all(|moving| moving.plan.paused));
    assert!(next.moves.iter().all(|moving| moving.plan.max_rate == Some(4 * MIB)));
    assert!(!follow_wholes(&mut next, whole(true, Some(8 * MIB)), |_| 2), "it is so");
    assert!(!follow_wholes(&mut next, whole(false, None), |_| 2), "a part may be paused alone");
    // What has placed its replica moves no bytes any more.
    let mut placed = moving();
    placed.moves[0].plan.step = Step::Committed;
    assert_eq!(parts_of_wholes(&placed), [(placed.moves[1].id(), Whole::Rebalance(SINCE))]);

    let mut copy = copying();
    copy.draining_nodes[0].max_rate = Some(MIB);
    let of_drain = Whole::Drain(NodeId(1), SINCE);
    assert_eq!(parts_of_wholes(&copy), [(plan(&copy).id, of_drain)]);
    let share = |asked: Whole| if asked == of_drain { 4 } else { 1 };
    assert!(follow_wholes(&mut copy, whole(false, None), share));
    assert_eq!((plan(&copy).paused, plan(&copy).max_rate), (false, Some(MIB / 4)));
}

#[test]
fn the_whole_decides_of_what_is_asked_of_it() {
    let check = |pace: Pace, paused: bool, max_rate: Option<u64>| {
        let whole = WholePace { paused, max_rate };
        check_part(pace, "op-1-1".into(), "rebalance-7".into(), whole)
    };
    let names = |refused: Result<(), PaceError>, command: &str| {
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("op-1-1") && text.contains(command), "{text}");
    };
    names(check(Pace::Resume, true, None), "vasto operation resume rebalance-7");
    names(check(Pace::Rate(None), false, Some(MIB)), "vasto operation rate rebalance-7");
    for (pace, paused, max_rate) in [
        (Pace::Pause, false, Some(MIB)),
        (Pace::Resume, false, Some(MIB)),
        (Pace::Rate(Some(MIB)), true, None),
    ] {
        assert_eq!(check(pace, paused, max_rate), Ok(()));
    }
}

/// One shard on the nodes 1, 2 and 3.
fn three_replicas() -> Catalog {
    let spec = KeyspaceSpec { replicas: 3, ..KeyspaceSpec::default() };
    let nodes = [vec![NodeId(1), NodeId(2), NodeId(3)]];
    Catalog::first(KeyspaceId(1), "ks", spec, &nodes, NOW, 1)
}

/// The next version while a node is gone; `lost` says whether it is replaced without a request.
fn without(node: u64, lost: bool, room: Option<NodeId>, catalog: &Catalog) -> Option<Catalog> {
    let presence = |other: NodeId| match other == NodeId(node) {
        true => Presence::Gone,
        false => Presence::Here(u64::MAX),
    };
    let is_lost = |other: NodeId| lost && other == NodeId(node);
    let has_room = |_: &Catalog, _: ShardId| room;
    let around = Around {
        presence: &presence,
        long_gone: &NONE,
        lost: &is_lost,
        room: &has_room,
        site: &ANYWHERE,
    };
    advance_members(catalog, &all_serve(catalog), &around, NOW, 3)
}

#[test]
fn a_repair_is_no_part_of_a_drain_and_goes_on_while_that_is_paused() {
    let mut drains = drain_node(&three_replicas(), drain(), NOW, 2).unwrap();
    for paused in [true, false] {
        drains.draining_nodes[0].paused = paused;
        drains.draining_nodes[0].max_rate = Some(MIB);
        let mut repaired = without(3, true, Some(NodeId(9)), &drains).unwrap();
        assert_eq!(repaired.draining[0].replica, ReplicaId(3));
        assert!(parts_of_wholes(&repaired).is_empty());
        assert!(!follow_wholes(&mut repaired, |_| WholePace::default(), |_| 1));
        assert_eq!((plan(&repaired).paused, plan(&repaired).max_rate), (false, None));
    }
    // The drained node itself is lost while its drain is paused.
    drains.draining_nodes[0].paused = true;
    let repaired = without(1, true, Some(NodeId(9)), &drains).unwrap();
    assert_eq!(repaired.draining[0].replica, ReplicaId(1));
    assert_eq!((plan(&repaired).paused, parts_of_wholes(&repaired)), (false, vec![]));
}

#[test]
fn the_copies_for_a_node_that_is_gone_have_the_pace_of_its_replacement() {
    let asked = NodeDrain { max_rate: Some(MIB), ..NodeDrain::new(NodeId(1), true, SINCE) };
    let id = asked.operation_id();
    let pace = |catalog: &Catalog, pace: Pace| pace_drain(catalog, &id, pace, NOW, 4).unwrap();
    let replaced = drain_node(&three_replicas(), asked, NOW, 2).unwrap();
    let room = Some(NodeId(9));
    let mut begun = without(1, true, room, &replaced).unwrap();
    assert!(!begun.is_placed(ReplicaId(1)), "it has left its shard");
    assert_eq!(parts_of_wholes(&begun), [(plan(&begun).id, Whole::Drain(NodeId(1), SINCE))]);
    assert!(follow_wholes(&mut begun, |_| WholePace::default(), |_| 1));
    assert_eq!(plan(&begun).max_rate, Some(MIB));
    let paused = pace(&begun, Pace::Pause);
    assert!(plan(&paused).paused && !plan(&pace(&paused, Pace::Resume)).paused);

    // While it is paused nothing leaves, also when the node is lost, and nothing begins.
    assert_eq!(without(1, true, room, &pace(&replaced, Pace::Pause)), None);
    let left = without(1, true, None, &replaced).unwrap();
    assert!(left.plan.is_none() && left.placement[0].replicas.len() == 2, "no node has room");
    let paused = pace(&left, Pace::Pause);
    assert_eq!(without(1, true, room, &paused), None);
    assert!(without(1, true, room, &pace(&paused, Pace::Resume)).unwrap().plan.is_some());
    // Another one of the shard is repaired meanwhile.
    let repaired = without(3, true, room, &paused).unwrap();
    assert_eq!((plan(&repaired).paused, parts_of_wholes(&repaired)), (false, vec![]));
}

#[test]
fn a_copy_that_two_drains_need_goes_on_with_either() {
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    let nodes = [vec![NodeId(1), NodeId(2)]];
    let whole = Catalog::first(KeyspaceId(1), "ks", spec, &nodes, NOW, 1);
    let other = NodeDrain::new(NodeId(2), false, SINCE);
    let both = drain_node(&drain_node(&whole, drain(), NOW, 2).unwrap(), other.clone(), NOW, 3);
    let begun = members(&both.unwrap()).unwrap();
    let ids = [drain(), other].map(|drain| drain.operation_id());
    let pace = |catalog: &Catalog, at: usize, pace: Pace| {
        pace_drain(catalog, &ids[at], pace, NOW, 4).unwrap()
    };
    let node = |catalog: &Catalog| drain_of_plan(catalog, plan(catalog)).unwrap().node;
    assert_eq!(node(&begun), NodeId(1));
    let one = pace(&begun, 0, Pace::Pause);
    assert_eq!((node(&one), plan(&one).paused), (NodeId(2), false));
    let none = pace(&one, 1, Pace::Pause);
    assert!(plan(&none).paused);
    assert!(
        !plan(&pace(&none, 1, Pace::Resume)).paused && !plan(&pace(&none, 0, Pace::Resume)).paused
    );
}

#[test]
fn a_drain_that_takes_the_place_of_a_paused_one_goes_on_with_its_copy() {
    let id = drain().operation_id();
    let slow = pace_drain(&copying(), &id, Pace::Rate(Some(MIB)), NOW, 4).unwrap();
    let mut paused = pace_drain(&slow, &id, Pace::Pause, NOW, 5).unwrap();
    follow_wholes(&mut paused, |_| WholePace::default(), |_| 1);
    assert_eq!((plan(&paused).paused, plan(&paused).max_rate), (true, Some(MIB)));
    let again = drain_node(&paused, NodeDrain::new(NodeId(1), true, SINCE + 1), NOW, 6).unwrap();
    assert_eq!((plan(&again).paused, plan(&again).max_rate), (false, None));
    assert_eq!(drain_of_plan(&again, plan(&again)).unwrap().since_us, SINCE + 1);
}

#[test]
fn whoever_cancels_a_drain_gives_up_no_copy_but_its_own() {
    let cancel = |catalog: &Catalog, drain: &NodeDrain| {
        let id = drain.operation_id();
        cancel_drain(catalog, &id, "cancelled", &Reports::new(), NOW, 9).unwrap()
    };
    assert!(cancel(&copying(), &drain()).plan.is_none());
    let drains = drain_node(&three_replicas(), drain(), NOW, 2).unwrap();
    let repaired = without(3, true, Some(NodeId(9)), &drains).unwrap();
    assert_eq!(cancel(&repaired, &drain()).plan, repaired.plan);
    let other = NodeDrain::new(NodeId(2), false, SINCE);
    let both = drain_node(&drains, other.clone(), NOW, 3).unwrap();
    let begun = members(&both).unwrap();
    assert_eq!(cancel(&begun, &other).plan, begun.plan, "it is that of node 1");
    assert!(cancel(&begun, &drain()).plan.is_none());
}

#[test]
fn what_replaces_all_replicas_of_a_shard_waits_for_each_that_is_held_back() {
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    let nodes = [vec![NodeId(1), NodeId(2)]];
    let mut lost = Catalog::first(KeyspaceId(1), "ks", spec, &nodes, NOW, 1);
    let drains = [1, 2].map(|node| NodeDrain::new(NodeId(node), true, SINCE));
    lost.draining_nodes = drains.to_vec();
    let gone = |_: NodeId| Presence::Gone;
    let around = Around { presence: &gone, ..around() };
    let recovers = advance_members(&lost, &all_serve(&lost), &around, NOW, 3).unwrap();
    assert!(matches!(plan(&recovers).kind, PlanKind::RecoverReplica { .. }));
    for drain in &drains {
        let id = drain.operation_id();
        let paused = pace_drain(&recovers, &id, Pace::Pause, NOW, 4).unwrap();
        assert!(plan(&paused).paused);
        assert!(!plan(&pace_drain(&paused, &id, Pace::Resume, NOW, 5).unwrap()).paused);
        let stays = cancel_drain(&recovers, &id, "cancelled", &Reports::new(), NOW, 9).unwrap();
        assert!(stays.plan.is_none(), "it may be the only one that holds something");
    }
}

proptest! {
    // Parts begin and end; each is given its part when it is looked at.
    #[test]
    fn parts_never_have_more_than_the_whole_and_come_to_rest(
        max_rate in 1_000u64..1_000_000,
        counts in proptest::collection::vec(1usize..100, 1..30),
    ) {
        let rate_of = |catalog: &Catalog| catalog.moves[0].plan.max_rate.unwrap();
        let whole = |_: u64| WholePace { paused: false, max_rate: Some(max_rate) };
        let mut next = moving();
        for running in counts.iter().copied() {
            follow_wholes(&mut next, whole, |_| running);
            prop_assert!(rate_of(&next) * running as u64 <= max_rate);
            let used = rate_of(&next) * running as u64;
            prop_assert!(used * 5 >= max_rate * 2, "{} of {} for {}", used, max_rate, running);
            prop_assert!(running > 1 || rate_of(&next) == max_rate);
            let mut again = next.clone();
            prop_assert!(!follow_wholes(&mut again, whole, |_| running));
        }
    }

    #[test]
    fn one_more_or_less_of_many_is_no_reason_for_a_version(running in 3usize..200) {
        let whole = |_: u64| WholePace { paused: false, max_rate: Some(64 * MIB) };
        let mut next = moving();
        follow_wholes(&mut next, whole, |_| running + 1);
        prop_assert!(!follow_wholes(&mut next, whole, |_| running), "it has enough");
        prop_assert!(!follow_wholes(&mut next, whole, |_| running + 1), "and not too much");
    }
}
