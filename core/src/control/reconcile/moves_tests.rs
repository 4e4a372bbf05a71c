//! Moves of replicas: their start, side by side, their end, and what comes before them.
#![allow(clippy::unwrap_used)]

use super::failover::{Presence, advance_primaries};
use super::members::{advance_members, is_incomplete};
use super::moves::{
    MOVE_AGAIN_US, MoveError, MoveOrder, advance_moves, cancel_move, cancel_moves,
    give_up_moves_to, in_the_way_of_moves, move_not_before, prefer, start_moves,
};
use super::progress::Advance;
use super::repair::nodes_to_avoid;
use super::resize::start_resize;
use super::view::{Around, Site};
use super::{EvictError, PlanError, QUIET_US, evict, evict_on_request};
use crate::catalog::{Catalog, KeyspaceSpec, KeyspaceState, NodeDrain, Placed, Quarantine};
use crate::control::operation::{OperationKind, OperationOutcome};
use crate::control::plan::{NODE_AWAY_MAX_US, PinnedManifest, Step};
use crate::control::report::{
    ReplicaPhase, ReplicaReport, ReplicationReport, Reports, SourceProgress, TargetProgress,
    TargetStage,
};
use crate::ids::{CatalogVersion, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::TARGET_SILENT_MAX;

const NOW: u64 = 1_000_000_000;
const SINCE: u64 = 77;
const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);
const LIVE: fn(NodeId) -> u64 = |_| 0;
const ANYWHERE: fn(NodeId) -> Site = |_| Site::default();

/// Three shards on nodes 1, 2 and 3; with two replicas each on the next node too.
fn catalog(replicas: u32) -> Catalog {
    let spec = KeyspaceSpec { shards: 3, replicas, ..KeyspaceSpec::default() };
    let nodes = |shard: u64| (0..u64::from(replicas)).map(move |n| NodeId(1 + (shard + n) % 3));
    let nodes: Vec<Vec<NodeId>> = (0..3).map(|shard| nodes(shard).collect()).collect();
    Catalog::first(KeyspaceId(1), "ks", spec, &nodes, NOW, 1)
}

fn order(shard: u32, replica: u64, to: u64) -> MoveOrder {
    MoveOrder { shard: ShardId(shard), replica: ReplicaId(replica), to: NodeId(to) }
}

fn started(catalog: &Catalog, orders: &[MoveOrder]) -> Catalog {
    start_moves(catalog, orders, SINCE, NOW, 2).unwrap()
}

/// All members serve, and have done what the running moves ask of them.
fn perfect(catalog: &Catalog) -> Reports {
    let members = catalog.members().into_iter();
    members
        .map(|(shard, member, placed)| {
            let id = member.replica;
            let phase = if placed { ReplicaPhase::Serving } else { ReplicaPhase::Building };
            let plan = catalog.plan_of(id);
            let source = plan.filter(|plan| plan.sources.iter().any(|one| one.replica == id));
            let target = plan.filter(|plan| plan.targets.iter().any(|one| one.replica == id));
            let report = ReplicaReport {
                version: catalog.version,
                replication: ReplicationReport { ready: placed, ..Default::default() },
                source: source.map(|plan| SourceProgress {
                    manifest: Some(PinnedManifest { key: format!("m{id}"), lsn: Lsn(5) }),
                    ..SourceProgress::new(plan.id)
                }),
                target: target.map(|plan| TargetProgress {
                    stage: if placed { TargetStage::Open } else { TargetStage::Tailing },
                    bytes_moved: 10,
                    bytes_from_bucket: 11,
                    ..TargetProgress::new(plan.id)
                }),
                ..ReplicaReport::new(catalog.keyspace, shard, id, phase)
            };
            (id, report)
        })
        .collect()
}

fn advance(catalog: &Catalog, reports: &Reports, away_us: fn(NodeId) -> u64) -> Advance {
    advance_around(catalog, reports, HERE, |_| false, away_us)
}

fn advance_around(
    catalog: &Catalog,
    reports: &Reports,
    presence: fn(NodeId) -> Presence,
    lost: fn(NodeId) -> bool,
    away_us: fn(NodeId) -> u64,
) -> Advance {
    let around = Around {
        presence: &presence,
        long_gone: &|_| false,
        lost: &lost,
        room: &|_, _| Some(NodeId(9)),
        site: &ANYWHERE,
    };
    advance_moves(catalog, reports, &around, away_us, |_| u64::MAX, NOW + 1, 3)
}

fn written(advance: Advance) -> Catalog {
    match advance {
        Advance::Write(next) => *next,
        other => panic!("{other:?}"),
    }
}

fn members(catalog: &Catalog) -> Option<Catalog> {
    let around = Around {
        presence: &HERE,
        long_gone: &|_| false,
        lost: &|_| false,
        room: &|_, _| Some(NodeId(9)),
        site: &ANYWHERE,
    };
    advance_members(catalog, &perfect(catalog), &around, NOW, 3)
}

/// Runs the rules as a driver does, with nodes that do everything at once, until nothing is left.
fn settle(mut catalog: Catalog) -> Catalog {
    let mut idle = 0;
    for n in 0..100 {
        let mut reports = perfect(&catalog);
        for shard in &catalog.placement {
            if let Some(to) = shard.transferring_to {
                reports.get_mut(&to).unwrap().replication.took_over = Some(catalog.version);
            }
        }
        for draining in &catalog.draining {
            reports.get_mut(&draining.replica).unwrap().replication.drained = true;
        }
        let at = NOW + n * QUIET_US;
        let around = Around {
            presence: &HERE,
            long_gone: &|_| false,
            lost: &|_| false,
            room: &|_, _| None,
            site: &ANYWHERE,
        };
        let next = advance_primaries(&catalog, &reports, HERE, at, 5).map(|(next, _)| next);
        let next = next.or_else(|| advance_members(&catalog, &reports, &around, at, 5));
        let next = next.or_else(|| match advance(&catalog, &reports, LIVE) {
            Advance::Write(next) => Some(*next),
            _ => None,
        });
        match next {
            Some(next) => {
                assert_eq!(next.version.0, catalog.version.0 + 1);
                for (was, is) in catalog.placement.iter().zip(&next.placement) {
                    let wanted = catalog.spec.replicas as usize;
                    assert!(is.replicas.len() >= wanted, "{was:?} {is:?}");
                }
                (catalog, idle) = (next, 0);
            }
            // Some rules leave a keyspace alone for a while.
            None if idle == 3 => return catalog,
            None => idle += 1,
        }
    }
    panic!("it does not come to rest: {catalog:?}");
}

#[test]
fn moves_of_several_shards_run_side_by_side_and_replace_what_moves() {
    for replicas in [1, 2] {
        let before = catalog(replicas);
        let first = |shard: usize| before.placement[shard].replicas[0].replica.0;
        let orders = [order(0, first(0), 4), order(1, first(1), 5)];
        let begun = started(&before, &orders);
        assert_eq!((begun.moves.len(), begun.version), (2, CatalogVersion(2)));
        assert!(begun.plan.is_none() && is_incomplete(&begun, |_| false));
        assert_eq!(begun.members_on(NodeId(4)).len(), 1, "its node makes the replica");
        let new = begun.moves[1].plan.targets[0].replica;
        assert_eq!(begun.plan_of(new).unwrap().id, begun.moves[1].id());
        assert_eq!(begun.sources_of(ShardId(1), new).len(), replicas as usize);
        assert!(begun.followers_of(ShardId(1), ReplicaId(first(1))).contains(&new));
        // Each has a checkpoint of its own pinned, until its end.
        let one = written(advance(&begun, &perfect(&begun), LIVE));
        let mut slow = perfect(&one);
        let filled = one.moves[0].plan.targets[0].replica;
        slow.get_mut(&filled).unwrap().target.as_mut().unwrap().lag_lsns = 65;
        let two = written(advance(&one, &slow, LIVE));
        let steps = |catalog: &Catalog| -> Vec<Step> {
            catalog.moves.iter().map(|moving| moving.plan.step).collect()
        };
        assert_eq!((steps(&one), one.pins.len()), (vec![Step::Tail, Step::Prepare], 1));
        assert_eq!((steps(&two), two.pins.len()), (vec![Step::Tail, Step::Tail], 2));
        let done = settle(two);
        assert!(done.moves.is_empty() && done.pins.is_empty() && done.draining.is_empty());
        for (shard, to) in [(0, 4), (1, 5)] {
            let nodes: Vec<NodeId> =
                done.placement[shard].replicas.iter().map(|member| member.node).collect();
            assert_eq!(nodes.len(), replicas as usize);
            assert!(nodes.contains(&NodeId(to)), "{nodes:?}");
            assert!(!done.is_placed(ReplicaId(first(shard))));
            assert!(done.is_removed(ReplicaId(first(shard))));
        }
        assert_eq!(done.placement[2], before.placement[2]);
        assert!(done.operations.iter().all(|report| {
            report.kind == OperationKind::Move && report.outcome == OperationOutcome::Done
        }));
        let totals = done.rebalanced.as_ref().unwrap();
        assert_eq!((totals.since_us, totals.moved.copies, totals.failed), (SINCE, 2, 0));
        assert_eq!((totals.moved.bytes, totals.moved.bytes_from_bucket), (20, 22));
        // The totals are those of one rebalance.
        let again = order(2, before.placement[2].replicas[0].replica.0, 5);
        let again = settle(start_moves(&done, &[again], SINCE + 1, NOW, 2).unwrap());
        let totals = again.rebalanced.as_ref().unwrap();
        assert_eq!((totals.since_us, totals.moved.copies), (SINCE + 1, 1));
    }
}

#[test]
fn only_what_fits_the_placement_begins() {
    let two = catalog(2);
    let refused = |catalog: &Catalog, order: MoveOrder| {
        start_moves(catalog, &[order], SINCE, NOW, 2).unwrap_err()
    };
    for outdated in [order(0, 1, 2), order(0, 3, 4), order(7, 1, 4), order(0, 99, 4)] {
        assert_eq!(refused(&two, outdated), MoveError::Outdated, "{outdated:?}");
    }
    // What fits begins, one move of each shard.
    let some = started(&two, &[order(0, 1, 2), order(0, 1, 4), order(0, 2, 5)]);
    assert_eq!(some.moves.len(), 1);
    assert_eq!(refused(&some, order(0, 2, 5)), MoveError::Outdated);
    assert_eq!(started(&some, &[order(1, 3, 4)]).moves.len(), 2);
    let plan = start_resize(&two, 4, &[vec![NodeId(4), NodeId(5)]], NOW, 2).unwrap();
    assert!(matches!(refused(&plan, order(0, 1, 4)), MoveError::Busy(_)));
    let mut drains = two.clone();
    drains.draining_nodes.push(NodeDrain::new(NodeId(3), false, NOW));
    assert!(matches!(refused(&drains, order(0, 1, 4)), MoveError::Busy(_)));
    let lacks = evict(&two, ReplicaId(6), true, NOW, 2).unwrap();
    assert!(in_the_way_of_moves(&lacks).unwrap().contains("the repair of keyspace ks"));
    let deleted = Catalog { state: KeyspaceState::Deleted, ..two.clone() };
    assert_eq!(refused(&deleted, order(0, 1, 4)), MoveError::Deleted);
    // Nothing else begins beside a move; an eviction waits in its shard only.
    assert!(
        matches!(start_resize(&some, 2, &[], NOW, 2), Err(PlanError::Busy(id)) if id == "op-1-1")
    );
    let serves = |_: &Placed| true;
    let busy = evict_on_request(&some, ReplicaId(2), false, serves, NOW, 2);
    assert_eq!(busy, Err(EvictError::Busy("op-1-1".into())));
    assert!(evict_on_request(&some, ReplicaId(4), false, serves, NOW, 2).is_ok());
}

#[test]
fn moves_give_way_to_what_comes_first_unless_their_replica_is_placed() {
    let begun = started(&catalog(2), &[order(0, 1, 4), order(1, 3, 4)]);
    let mut placed = begun.clone();
    let new = placed.moves[1].plan.targets[0];
    placed.moves[1].plan.step = Step::Committed;
    placed.placement[1].replicas.push(Placed { replica: new.replica, node: new.node });
    placed.draining_nodes.push(NodeDrain::new(NodeId(3), false, NOW));
    assert_eq!(members(&placed), None, "the drain waits for the moves");
    let next = written(advance(&placed, &perfect(&placed), LIVE));
    assert_eq!((next.moves.len(), next.moves[0].id()), (1, placed.moves[1].id()));
    let report = next.operations.last().unwrap();
    assert_eq!((&report.kind, report.outcome), (&OperationKind::Move, OperationOutcome::Aborted));
    assert!(report.reason.as_ref().unwrap().contains("the drain of a node"), "{report:?}");
    let done = settle(next);
    assert!(done.moves.is_empty() && !done.is_placed(ReplicaId(3)));
}

#[test]
fn the_old_replica_leaves_only_while_the_new_one_serves() {
    let begun = started(&catalog(1), &[order(0, 1, 4)]);
    let tail = written(advance(&begun, &perfect(&begun), LIVE));
    let mut behind = perfect(&tail);
    let new = tail.moves[0].plan.targets[0].replica;
    behind.get_mut(&new).unwrap().target.as_mut().unwrap().lag_lsns = 65;
    assert!(matches!(advance(&tail, &behind, LIVE), Advance::Wait(_)));
    let placed = written(advance(&tail, &perfect(&tail), LIVE));
    assert_eq!(placed.placement[0].replicas.len(), 2);
    let mut opening = perfect(&placed);
    opening.get_mut(&new).unwrap().replication.ready = false;
    assert!(
        matches!(advance(&placed, &opening, LIVE), Advance::Wait(what) if what.contains("to serve"))
    );
    // The one that moves is primary: it hands over first.
    let handing = written(advance(&placed, &perfect(&placed), LIVE));
    assert_eq!(handing.placement[0].transferring_to, Some(new));
    assert!(handing.is_placed(ReplicaId(1)) && handing.moves.len() == 1);
    assert!(matches!(advance(&handing, &perfect(&handing), LIVE), Advance::Wait(_)));
    // One that does not come back is taken out again, and the old one stays.
    let away: fn(NodeId) -> u64 = |node| if node == NodeId(4) { NODE_AWAY_MAX_US + 1 } else { 0 };
    let back = written(advance(&placed, &perfect(&placed), away));
    assert_eq!((back.placement[0].replicas.len(), back.moves.len()), (1, 0));
    assert!(back.is_placed(ReplicaId(1)) && back.draining[0].replica == new);
    assert_eq!(back.operations[0].outcome, OperationOutcome::Aborted);
    assert_eq!(back.rebalanced.as_ref().unwrap().failed, 1);
    // While a replica moves, leadership does not return to where it was.
    let mut acting = placed.clone();
    acting.placement[0].primary = Some(new);
    let reports = perfect(&acting);
    assert_eq!(advance_primaries(&acting, &reports, HERE, NOW + QUIET_US + 1, 4), None);
}

#[test]
fn a_move_that_fails_is_undone_by_itself_and_put_off() {
    let begun = started(&catalog(1), &[order(0, 1, 4), order(1, 2, 4)]);
    let mut reports = perfect(&begun);
    let failed = begun.moves[0].plan.targets[0].replica;
    let progress = reports.get_mut(&failed).unwrap().target.as_mut().unwrap();
    progress.failed = Some("no disk".into());
    let next = written(advance(&begun, &reports, LIVE));
    assert_eq!((next.moves.len(), next.moves[0].replaces), (1, ReplicaId(2)));
    let report = &next.operations[0];
    assert_eq!((&report.kind, &report.failed_on[..]), (&OperationKind::Move, &[NodeId(4)][..]));
    assert_eq!(nodes_to_avoid(&next, NOW), [NodeId(4)]);
    assert_eq!(move_not_before(&next, ShardId(0)), report.ended_at_us() + MOVE_AGAIN_US);
    assert_eq!(move_not_before(&next, ShardId(1)), 0);
    // Cancelled one by one, by their node, or all at once.
    let one = cancel_move(&begun, begun.moves[1].id(), "enough", &reports, NOW, 3).unwrap();
    assert_eq!((one.moves.len(), one.moves[0].replaces), (1, ReplicaId(1)));
    assert_eq!(cancel_move(&one, PlanId(99), "enough", &reports, NOW, 3), None);
    let all = cancel_moves(&begun, "enough", &reports, NOW, 3).unwrap();
    assert_eq!((all.moves.len(), all.version), (0, CatalogVersion(begun.version.0 + 1)));
    assert_eq!(all.rebalanced.as_ref().unwrap().failed, 2);
    let given_up = give_up_moves_to(&begun, "full", NodeId(4), &reports, NOW, 3).unwrap();
    assert_eq!(given_up.operations[0].failed_on, [NodeId(4)]);
    assert_eq!(give_up_moves_to(&begun, "full", NodeId(5), &reports, NOW, 3), None);
}

#[test]
fn another_preferred_primary_gets_the_leadership_by_a_transfer() {
    let two = catalog(2);
    let asked = prefer(&two, ReplicaId(2), SINCE, NOW, 2).unwrap();
    let shard = &asked.placement[0];
    assert_eq!(shard.shipper().unwrap().replica, ReplicaId(2));
    assert_eq!(shard.primary().unwrap().replica, ReplicaId(1), "it acts until then");
    assert!(asked.epoch > two.epoch);
    let done = settle(asked.clone());
    assert_eq!(done.placement[0].primary().unwrap().replica, ReplicaId(2));
    assert_eq!(done.placement[0].primary, None);
    assert_eq!(done.rebalanced.as_ref().unwrap().primaries, 1);
    // Not for the one that is it, an unknown one, or while something else is under way.
    assert_eq!(prefer(&two, ReplicaId(1), SINCE, NOW, 2), None);
    assert_eq!(prefer(&two, ReplicaId(99), SINCE, NOW, 2), None);
    assert_eq!(prefer(&asked, ReplicaId(1), SINCE, NOW, 2), None);
    let moving = started(&two, &[order(0, 1, 4)]);
    assert_eq!(prefer(&moving, ReplicaId(2), SINCE, NOW, 2), None);
    assert!(prefer(&moving, ReplicaId(4), SINCE, NOW, 2).is_some(), "another shard");
    let mut kept = two.clone();
    kept.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: kept.owned_bands(),
        replicas: vec![ReplicaId(9)],
        targets: vec![(ReplicaId(1), Lsn(7))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 0,
        dropping: false,
    });
    assert_eq!(prefer(&kept, ReplicaId(2), SINCE, NOW, 2), None);
}

#[test]
fn a_catalog_with_moves_survives_json_and_is_read_without_them() {
    let begun = started(&catalog(1), &[order(0, 1, 4)]);
    let text = serde_json::to_string(&begun).unwrap();
    assert_eq!(serde_json::from_str::<Catalog>(&text).unwrap(), begun);
    let plain = serde_json::to_string(&catalog(1)).unwrap();
    assert!(!plain.contains("moves") && !plain.contains("rebalanced"), "{plain}");
}

/// Replica 1 of shard 0 moves from node 1 to node 4; with `committed` its new replica is placed.
fn one_moving(replicas: u32, committed: bool) -> Catalog {
    let mut moving = started(&catalog(replicas), &[order(0, 1, 4)]);
    for _ in 0..if committed { 2 } else { 1 } {
        moving = written(advance(&moving, &perfect(&moving), LIVE));
    }
    let step = if committed { Step::Committed } else { Step::Tail };
    assert_eq!(moving.moves[0].plan.step, step);
    moving
}

fn reason(next: &Catalog) -> &str {
    next.operations.last().unwrap().reason.as_deref().unwrap()
}

#[test]
fn a_shard_that_loses_another_replica_keeps_the_one_that_was_to_move() {
    type Broken = fn(&mut ReplicaReport);
    type Lost = fn(NodeId) -> bool;
    let failed: Broken = |report| report.phase = ReplicaPhase::Failed("no disk".into());
    let too_old: Broken = |report| report.replication.too_old = true;
    // Of shard 0, replica 2 is on node 2.
    let on_2: Lost = |node| node == NodeId(2);
    let cases: [(Broken, Lost); 3] = [(failed, |_| false), (too_old, |_| false), (|_| {}, on_2)];
    for (breaks, lost) in cases {
        let copying = one_moving(2, false);
        let mut reports = perfect(&copying);
        breaks(reports.get_mut(&ReplicaId(2)).unwrap());
        reports.values_mut().for_each(|report| {
            report.target.iter_mut().for_each(|target| target.lag_lsns = 1 << 40);
        });
        let undone = written(advance_around(&copying, &reports, HERE, lost, LIVE));
        assert!(undone.moves.is_empty() && reason(&undone).contains("its repair comes first"));

        let placed = one_moving(2, true);
        let mut reports = perfect(&placed);
        breaks(reports.get_mut(&ReplicaId(2)).unwrap());
        let ended = written(advance_around(&placed, &reports, HERE, lost, LIVE));
        assert!(ended.moves.is_empty() && reason(&ended).contains("the old one stays"));
        assert_eq!(ended.placement[0].replicas.len(), 3);
        // Two are left, although there is room for no further one.
        reports.values_mut().for_each(|report| report.version = ended.version);
        let around = Around {
            presence: &HERE,
            long_gone: &|_| false,
            lost: &lost,
            room: &|_, _| None,
            site: &ANYWHERE,
        };
        let left = advance_members(&ended, &reports, &around, NOW, 3).unwrap();
        assert!(!left.is_placed(ReplicaId(2)) && left.is_placed(ReplicaId(1)));
        assert_eq!(left.placement[0].replicas.len(), 2);
    }
}

#[test]
fn a_placed_move_waits_for_another_replica_that_is_away_until_it_is_evicted() {
    let placed = one_moving(2, true);
    let away: fn(NodeId) -> Presence = |node| match node {
        NodeId(2) => Presence::Away,
        _ => Presence::Here(u64::MAX),
    };
    let waits = advance_around(&placed, &perfect(&placed), away, |_| false, LIVE);
    assert!(
        matches!(&waits, Advance::Wait(what) if what.contains("replica 2 on") && what.contains("to come back")),
        "{waits:?}"
    );
    let serves = |_: &Placed| true;
    let new = placed.moves[0].plan.targets[0].replica;
    for of_move in [ReplicaId(1), new] {
        let refused = evict_on_request(&placed, of_move, false, serves, NOW, 4);
        assert!(matches!(refused, Err(EvictError::Busy(_))), "{refused:?}");
    }
    let evicted = evict_on_request(&placed, ReplicaId(2), false, serves, NOW, 4).unwrap();
    let ended = written(advance(&evicted, &perfect(&evicted), LIVE));
    assert!(ended.moves.is_empty() && ended.is_placed(ReplicaId(1)) && ended.is_placed(new));
}

#[test]
fn a_placed_move_ends_when_its_replicas_are_given_up_or_the_new_one_is_too_old() {
    let mut placed = one_moving(1, true);
    for node in [1, 4] {
        placed.draining_nodes.push(NodeDrain::new(NodeId(node), true, NOW));
    }
    let gone: fn(NodeId) -> Presence = |_| Presence::Gone;
    let away: fn(NodeId) -> u64 = |_| NODE_AWAY_MAX_US + 1;
    let ended = written(advance_around(&placed, &Reports::new(), gone, |_| false, away));
    assert!(ended.moves.is_empty() && reason(&ended).contains("given up"));
    assert_eq!(ended.placement[0].replicas.len(), 2, "the recovery replaces both");

    let placed = one_moving(2, true);
    let new = placed.moves[0].plan.targets[0].replica;
    let mut reports = perfect(&placed);
    let of_new = &mut reports.get_mut(&new).unwrap().replication;
    (of_new.ready, of_new.too_old) = (false, true);
    let back = written(advance(&placed, &reports, LIVE));
    assert!(back.moves.is_empty() && back.is_placed(ReplicaId(1)) && !back.is_placed(new));
}

#[test]
fn a_source_that_passes_the_move_over_is_not_waited_for_without_limit() {
    let begun = started(&catalog(1), &[order(0, 1, 4)]);
    let around = Around {
        presence: &HERE,
        long_gone: &|_| false,
        lost: &|_| false,
        room: &|_, _| Some(NodeId(9)),
        site: &ANYWHERE,
    };
    let at = |reports: &Reports, here_us: u64, silent_us: u64| {
        let started_at_us = begun.moves[0].plan.started_at_us;
        advance_moves(&begun, reports, &around, LIVE, |_| here_us, started_at_us + silent_us, 3)
    };
    let silent_us = TARGET_SILENT_MAX.as_micros() as u64;
    let mut silent = perfect(&begun);
    silent.values_mut().for_each(|report| report.source = None);
    assert!(matches!(at(&silent, u64::MAX, silent_us), Advance::Wait(_)));
    assert!(matches!(at(&silent, silent_us, silent_us + 1), Advance::Wait(_)), "it is just back");
    let undone = written(at(&silent, u64::MAX, silent_us + 1));
    assert!(undone.moves.is_empty() && reason(&undone).contains("has not begun its checkpoint"));
    assert_eq!(undone.operations[0].failed_on, [NodeId(1)]);
    silent.get_mut(&ReplicaId(1)).unwrap().phase = ReplicaPhase::Opening;
    assert!(matches!(at(&silent, u64::MAX, silent_us + 1), Advance::Wait(_)), "it opens");
    let mut slow = perfect(&begun);
    let of_source = slow.get_mut(&ReplicaId(1)).unwrap().source.as_mut().unwrap();
    of_source.manifest = None;
    assert!(matches!(at(&slow, u64::MAX, silent_us + 1), Advance::Wait(_)), "it uploads");
}
