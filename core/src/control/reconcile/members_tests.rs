//! Membership of a shard: its replicas, those that leave it and those that join it.
#![allow(clippy::unwrap_used)]

use super::drain::{cancel_drain, drain_node, end_of};
use super::evict::{EvictError, evict, evict_on_request};
use super::failover::{Presence, successor, transfer_leadership};
use super::members::{advance_members, is_incomplete};
use super::placement::remove_from_placement;
use super::repair::{COPY_AGAIN_US, copy_not_before, may_copy, nodes_to_avoid};
use super::view::{Around, Site};
use super::waits::waits_for;
use crate::catalog::{Catalog, KeyspaceSpec, NodeDrain, Placed, Quarantine, REMOVED_KEPT};
use crate::control::operation::{OperationKind, OperationOutcome, OperationReport};
use crate::control::plan::{PlanKind, Step};
use crate::control::report::{ReplicaPhase, ReplicaReport, ReplicationReport, Reports};
use crate::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};

const NOW: u64 = 1_000_000_000;
const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);
const ANYWHERE: fn(NodeId) -> Site = |_| Site::default();
const NOWHERE: fn(&Catalog, ShardId) -> Option<NodeId> = |_, _| None;

fn next(
    catalog: &Catalog,
    reports: &Reports,
    presence: impl Fn(NodeId) -> Presence,
    room: impl Fn(&Catalog, ShardId) -> Option<NodeId>,
) -> Option<Catalog> {
    let around = Around {
        presence: &presence,
        long_gone: &|node| presence(node) == Presence::Gone,
        lost: &|_| false,
        room: &room,
        site: &ANYWHERE,
    };
    advance_members(catalog, reports, &around, NOW, 3)
}

fn catalog() -> Catalog {
    let spec = KeyspaceSpec { replicas: 3, ..KeyspaceSpec::default() };
    Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1), NodeId(2), NodeId(3)]], NOW, 1)
}

fn reports(change: impl Fn(u64, &mut ReplicationReport)) -> Reports {
    let report = |replica: u64| {
        let mut replication = ReplicationReport { ready: true, ..Default::default() };
        change(replica, &mut replication);
        let (keyspace, shard, replica) = (KeyspaceId(1), ShardId(0), ReplicaId(replica));
        let report = ReplicaReport::new(keyspace, shard, replica, ReplicaPhase::Serving);
        let report = ReplicaReport { version: CatalogVersion(1_000), replication, ..report };
        (replica, report)
    };
    (1..=4).map(report).collect()
}

fn ids(catalog: &Catalog) -> Vec<u64> {
    catalog.placement[0].replicas.iter().map(|member| member.replica.0).collect()
}

#[test]
fn a_replica_that_leaves_is_drained_removed_and_made_anew() {
    let calm = reports(|_, _| {});
    assert_eq!(next(&catalog(), &calm, HERE, NOWHERE), None);
    let left = evict(&catalog(), ReplicaId(1), false, NOW, 2).unwrap();
    assert_eq!((ids(&left), left.epoch), (vec![2, 3], Epoch(2)));
    assert_eq!(left.draining[0].replica, ReplicaId(1));
    assert_eq!(left.placement[0].primary().unwrap().replica, ReplicaId(2));
    assert_eq!(left.sources_of(ShardId(0), ReplicaId(2)).len(), 2, "the others still pull its log");
    assert_eq!(left.members_on(NodeId(1)), [(ShardId(0), ReplicaId(1), false)]);
    assert!(is_incomplete(&left, |_| true) && is_incomplete(&left, |_| false));
    let mut whole = left.clone();
    whole.spec.replicas = 2;
    assert!(is_incomplete(&whole, |_| true), "it may be drained at any time");
    assert!(!is_incomplete(&whole, |_| false), "its node may be gone for ever");
    assert_eq!(next(&left, &calm, HERE, NOWHERE), None);
    let drained = reports(|id, report| report.drained = id == 1);
    let gone = next(&left, &drained, HERE, NOWHERE).unwrap();
    assert_eq!((gone.draining.len(), &gone.removed[..]), (0, &[ReplicaId(1)][..]));
    let copying = next(&gone, &calm, HERE, |_, _| Some(NodeId(1))).unwrap();
    let plan = copying.plan.unwrap();
    assert_eq!(plan.kind, PlanKind::AddReplica { shard: ShardId(0) });
    assert_eq!((plan.sources[0].replica, plan.targets[0].replica), (ReplicaId(2), ReplicaId(4)));
}

#[test]
fn a_primary_that_is_to_leave_hands_over_to_one_that_is_there_and_ready() {
    let catalog = catalog();
    let shard = &catalog.placement[0];
    let here = |node: NodeId| node != NodeId(2);
    assert_eq!(successor(shard, ReplicaId(1), here, |_| true), Some(ReplicaId(3)));
    assert_eq!(successor(shard, ReplicaId(1), here, |member| member.replica != ReplicaId(3)), None);
    assert_eq!(successor(shard, ReplicaId(3), here, |_| true), None, "it is not primary");
    assert_eq!(
        successor(shard, ReplicaId(1), |node| node != NodeId(1), |_| true),
        None,
        "it is replaced"
    );
    let handing = transfer_leadership(&catalog, ReplicaId(1), ReplicaId(3), NOW, 2).unwrap();
    assert_eq!(
        (handing.placement[0].transferring_to, handing.epoch),
        (Some(ReplicaId(3)), catalog.epoch)
    );
    assert_eq!(
        transfer_leadership(&handing, ReplicaId(1), ReplicaId(2), NOW, 3),
        None,
        "one runs already"
    );
    assert_eq!(transfer_leadership(&catalog, ReplicaId(3), ReplicaId(1), NOW, 3), None);
    assert_eq!(transfer_leadership(&catalog, ReplicaId(1), ReplicaId(9), NOW, 3), None);
    assert_eq!(transfer_leadership(&catalog, ReplicaId(1), ReplicaId(1), NOW, 3), None);
}

#[test]
fn who_cannot_catch_up_or_is_in_the_way_leaves_and_the_last_one_never() {
    let old = reports(|id, report| report.too_old = id == 2);
    assert_eq!(ids(&next(&catalog(), &old, HERE, NOWHERE).unwrap()), [1, 3]);
    let slow = reports(|id, report| report.evict = (id == 1).then_some(ReplicaId(3)));
    assert_eq!(ids(&next(&catalog(), &slow, HERE, NOWHERE).unwrap()), [1, 2]);
    let answers = reports(|id, report| (report.too_old, report.serving) = (id <= 2, Some(id == 2)));
    assert_eq!(
        next(&catalog(), &answers, HERE, NOWHERE).unwrap().placement[0].transferring_to,
        Some(ReplicaId(2))
    );
    let answers = reports(|id, report| (report.too_old, report.serving) = (id == 2, Some(id == 2)));
    assert_eq!(next(&catalog(), &answers, HERE, NOWHERE), None, "it has what nobody else may hold");
    // A replica that does not read its log cannot follow it.
    let slow = reports(|id, report| {
        report.evict = (id == 2).then_some(ReplicaId(1));
        report.serving = Some(id == 1);
    });
    assert_eq!(
        next(&catalog(), &slow, HERE, NOWHERE).unwrap().placement[0].transferring_to,
        Some(ReplicaId(3))
    );
    let nobody = reports(|id, report| {
        report.too_old = id == 2;
        report.ready = id == 2;
    });
    assert_eq!(next(&catalog(), &nobody, HERE, NOWHERE), None, "nobody else serves");
    let two = evict(&catalog(), ReplicaId(1), true, NOW, 2).unwrap();
    assert_eq!(two.removed, [ReplicaId(1)]);
    let alone = evict(&two, ReplicaId(2), false, NOW, 3).unwrap();
    assert_eq!(
        evict(&alone, ReplicaId(3), true, NOW, 4),
        Err(EvictError::Last(ReplicaId(3), ShardId(0)))
    );
    assert_eq!(evict(&alone, ReplicaId(9), true, NOW, 4), Err(EvictError::NotThere(ReplicaId(9))));
    let again = evict(&alone, ReplicaId(2), false, NOW, 4).unwrap_err();
    assert_eq!(again, EvictError::Draining(ReplicaId(2)));
    assert!(again.to_string().contains("--accept-loss"), "{again}");
    // The loss of a draining replica may still be accepted.
    let lost = evict(&alone, ReplicaId(2), true, NOW, 4).unwrap();
    assert_eq!((lost.draining.len(), lost.removed.len()), (0, 2));
}

#[test]
fn a_replica_that_has_failed_leaves_when_another_serves_and_a_copy_has_room() {
    let mut failed = reports(|id, report| report.ready = id != 2);
    failed.get_mut(&ReplicaId(2)).unwrap().phase = ReplicaPhase::Failed("rot".into());
    let to_four = |_: &Catalog, _: ShardId| Some(NodeId(4));
    assert_eq!(next(&catalog(), &failed, HERE, NOWHERE), None, "nothing is gained by it");
    failed.get_mut(&ReplicaId(2)).unwrap().replication.passing = true;
    assert_eq!(next(&catalog(), &failed, HERE, to_four), None, "it may open again by itself");
    failed.get_mut(&ReplicaId(2)).unwrap().replication.passing = false;
    let left = next(&catalog(), &failed, HERE, to_four).unwrap();
    assert_eq!((ids(&left), left.draining[0].replica), (vec![1, 3], ReplicaId(2)));
    // The same version begins the copy.
    assert_eq!((left.version, left.epoch), (CatalogVersion(2), Epoch(2)));
    let plan = left.plan.as_ref().unwrap();
    assert_eq!((plan.targets[0].node, plan.from_epoch), (NodeId(4), Epoch(2)));
    assert_eq!(next(&left, &failed, HERE, to_four), None, "one plan at a time");
    for report in failed.values_mut() {
        report.replication.ready = false;
    }
    assert_eq!(next(&catalog(), &failed, HERE, to_four), None, "nobody else serves");
}

#[test]
fn a_quarantine_without_its_target_waits_for_the_one_that_ships_now() {
    let mut catalog = catalog();
    catalog.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: catalog.owned_bands(),
        replicas: vec![ReplicaId(9)],
        targets: vec![(ReplicaId(1), Lsn(70))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 0,
        dropping: false,
    });
    let left = evict(&catalog, ReplicaId(1), false, NOW, 2).unwrap();
    assert_eq!(left.quarantines[0].targets, [(ReplicaId(2), Lsn(1))]);
    let left = evict(&catalog, ReplicaId(3), false, NOW, 2).unwrap();
    assert_eq!(left.quarantines[0].targets, [(ReplicaId(1), Lsn(70))]);
}

fn single() -> Catalog {
    Catalog::first(KeyspaceId(1), "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], NOW, 1)
}

fn committed(catalog: &Catalog) -> Catalog {
    let target = catalog.plan.as_ref().unwrap().targets[0];
    let mut done = catalog.next(NOW, 9);
    done.plan = None;
    done.placement[0].replicas.push(Placed { replica: target.replica, node: target.node });
    done
}

#[test]
fn a_live_node_that_leaves_is_copied_first_and_a_dead_one_is_drained_later() {
    let calm = reports(|_, _| {});
    let to_four = |_: &Catalog, _: ShardId| Some(NodeId(4));
    let leaving = drain_node(
        &catalog(),
        NodeDrain { to: Some(NodeId(4)), ..NodeDrain::new(NodeId(1), true, NOW) },
        NOW,
        2,
    )
    .unwrap();
    assert_eq!(drain_node(&catalog(), NodeDrain::new(NodeId(9), true, NOW), NOW, 2), None);
    let copying = next(&leaving, &calm, HERE, to_four).unwrap();
    assert_eq!(copying.plan.as_ref().unwrap().kind, PlanKind::AddReplica { shard: ShardId(0) });
    let four = committed(&copying);
    let behind = reports(|id, report| {
        report.lag_lsns = if id == 1 { 0 } else { u64::MAX };
        report.serving = Some(id == 1);
    });
    assert_eq!(next(&four, &behind, HERE, NOWHERE), None, "none of them is able to serve");
    let mut handing = next(&four, &calm, HERE, NOWHERE).unwrap();
    assert_eq!(
        (handing.placement[0].transferring_to, ids(&handing)),
        (Some(ReplicaId(2)), vec![1, 2, 3, 4])
    );
    assert_eq!(next(&handing, &calm, HERE, NOWHERE), None, "it is waited for");
    handing.placement[0].primary = handing.placement[0].transferring_to.take();
    // By the catalog another replica is primary; requests may still be answered by the one that
    // leaves.
    let answers = |who: u64| reports(move |id, report| report.serving = Some(id == who));
    assert_eq!(
        next(&handing, &answers(1), HERE, NOWHERE),
        None,
        "what it acknowledges is held by it alone"
    );
    let away = |node: NodeId| if node == NodeId(1) { Presence::Away } else { HERE(node) };
    assert_eq!(
        next(&handing, &answers(1), away, NOWHERE),
        None,
        "the master does not hear it, its clients may"
    );
    let left = next(&handing, &answers(2), HERE, NOWHERE).unwrap();
    assert_eq!((ids(&left), left.draining[0].replica), (vec![2, 3, 4], ReplicaId(1)));
    let drained = reports(|id, report| report.drained = id == 1);
    let gone = next(&left, &drained, HERE, NOWHERE).unwrap();
    let ended = next(&gone, &calm, HERE, NOWHERE).unwrap();
    assert!(ended.draining_nodes.is_empty() && ended.removed == [ReplicaId(1)]);
    let report = ended.operations.last().unwrap();
    assert_eq!(
        (report.id.clone(), report.outcome),
        (leaving.draining_nodes[0].operation_id(), OperationOutcome::Done)
    );
    // The same with a dead node: the others go on without it at once.
    let dead = |node: NodeId| if node == NodeId(1) { Presence::Gone } else { Presence::Here(0) };
    let left = next(&leaving, &calm, dead, to_four).unwrap();
    assert_eq!((ids(&left), left.draining.len()), (vec![2, 3], 1));
    assert_eq!(left.plan.unwrap().targets[0].node, NodeId(4), "and a copy begins at once");
    // Without room the dead one leaves all the same, and the copy comes later.
    let left = next(&leaving, &calm, dead, NOWHERE).unwrap();
    assert_eq!((ids(&left), left.plan.is_none()), (vec![2, 3], true));
    let copying = next(&left, &calm, dead, to_four).unwrap();
    assert_eq!(copying.plan.unwrap().targets[0].node, NodeId(4));
}

#[test]
fn a_node_that_is_to_stay_keeps_its_replicas_and_a_copy_is_given_up() {
    let calm = reports(|_, _| {});
    let leaving = NodeDrain::new(NodeId(1), false, NOW);
    let begun = drain_node(&catalog(), leaving.clone(), NOW, 2).unwrap();
    let copying = next(&begun, &calm, HERE, |_, _| Some(NodeId(4))).unwrap();
    let id = leaving.operation_id();
    assert_eq!(cancel_drain(&copying, "node-9-9", "cancelled", &calm, NOW, 3), None);
    for from in [&begun, &copying] {
        let stays = cancel_drain(from, &id, "cancelled", &calm, NOW + 5_000, 3).unwrap();
        assert!(stays.draining_nodes.is_empty() && stays.plan.is_none());
        assert_eq!(ids(&stays), [1, 2, 3]);
        let report = stays.operations.last().unwrap();
        assert_eq!(
            (&report.id, report.outcome, report.duration_ms),
            (&id, OperationOutcome::Aborted, 5)
        );
        assert_eq!(next(&stays, &calm, HERE, |_, _| Some(NodeId(4))), None, "nothing begins again");
    }
}

#[test]
fn the_only_replica_is_taken_over_from_the_bucket_only_when_its_node_is_gone() {
    let calm = reports(|_, _| {});
    let to_two = |_: &Catalog, _: ShardId| Some(NodeId(2));
    let dead = |node: NodeId| if node == NodeId(1) { Presence::Gone } else { Presence::Here(0) };
    assert_eq!(
        next(&single(), &calm, dead, to_two),
        None,
        "nobody said that it does not come back"
    );
    let drained = NodeDrain::new(NodeId(1), false, NOW);
    let drained = drain_node(&single(), drained, NOW, 2).unwrap();
    assert_eq!(
        next(&drained, &calm, dead, to_two),
        None,
        "a node that is only emptied is waited for"
    );
    let leaving = drain_node(&single(), NodeDrain::new(NodeId(1), true, NOW), NOW, 2).unwrap();
    let live = next(&leaving, &calm, HERE, to_two).unwrap().plan.unwrap();
    assert_eq!((live.kind, live.step), (PlanKind::AddReplica { shard: ShardId(0) }, Step::Prepare));
    let plan = next(&leaving, &calm, dead, to_two).unwrap().plan.unwrap();
    assert_eq!(
        (plan.kind, plan.step),
        (PlanKind::RecoverReplica { shard: ShardId(0) }, Step::Tail)
    );
    assert_eq!(plan.nodes().collect::<Vec<_>>(), [NodeId(2)], "the dead one is not waited for");
    let (mut shard, mut draining) =
        (committed(&next(&leaving, &calm, dead, to_two).unwrap()), Vec::new());
    remove_from_placement(&mut shard.placement[0], &mut draining, [ReplicaId(1)].into_iter(), NOW);
    assert_eq!((ids(&shard), draining[0].node), (vec![2], NodeId(1)));
}

#[test]
fn a_node_that_is_lost_for_long_is_replaced_when_there_is_room() {
    let calm = reports(|_, _| {});
    let dead = |node: NodeId| if node == NodeId(3) { Presence::Gone } else { Presence::Here(0) };
    let room: &dyn Fn(&Catalog, ShardId) -> Option<NodeId> = &|_, _| Some(NodeId(4));
    for (room, placed) in [(room, Some(vec![1, 2])), (&NOWHERE, None)] {
        let around = Around {
            presence: &dead,
            long_gone: &|node| dead(node) == Presence::Gone,
            lost: &|node| node == NodeId(3),
            room,
            site: &ANYWHERE,
        };
        let next = advance_members(&catalog(), &calm, &around, NOW, 3);
        assert_eq!(next.as_ref().map(ids), placed);
    }
}

fn of_two() -> Catalog {
    let spec = KeyspaceSpec { replicas: 1, ..KeyspaceSpec::default() };
    let mut catalog =
        Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1), NodeId(2)]], NOW, 1);
    catalog.draining_nodes.push(NodeDrain::new(NodeId(1), false, 1));
    catalog
}

#[test]
fn a_drain_does_not_take_the_only_replica_out_that_serves() {
    let catalog = of_two();
    let away = |node: NodeId| if node == NodeId(2) { Presence::Gone } else { HERE(node) };
    let not_ready = reports(|id, report| report.ready = id == 1);
    assert_eq!(next(&catalog, &reports(|_, _| {}), away, NOWHERE), None, "the copy's node is away");
    assert_eq!(next(&catalog, &not_ready, HERE, NOWHERE), None, "the copy has not caught up");
    let mut silent = reports(|_, _| {});
    silent.remove(&ReplicaId(2));
    assert_eq!(
        next(&catalog, &silent, HERE, NOWHERE),
        None,
        "the copy has said nothing since its node came back"
    );
    // The new replica stands still: its last report is good, and older than the last version.
    let mut still = reports(|_, _| {});
    still.get_mut(&ReplicaId(2)).unwrap().version = CatalogVersion(0);
    assert_eq!(
        next(&catalog, &still, HERE, NOWHERE),
        None,
        "the copy has not heard of this version"
    );
    let begun = next(&catalog, &reports(|_, _| {}), HERE, NOWHERE).unwrap();
    assert_eq!((begun.placement[0].transferring_to, ids(&begun)), (Some(ReplicaId(2)), vec![1, 2]));
    // The same when another replica is primary: a replica leaves while one that stays serves, and
    // only then.
    let mut acting = catalog.clone();
    acting.placement[0].primary = Some(ReplicaId(2));
    assert_eq!(next(&acting, &reports(|_, _| {}), away, NOWHERE), None);
    assert_eq!(ids(&next(&acting, &reports(|_, _| {}), HERE, NOWHERE).unwrap()), [2]);
}

#[test]
fn what_is_drained_goes_only_while_the_primary_serves_and_holds_everything() {
    let left = evict(&catalog(), ReplicaId(1), false, NOW, 2).unwrap();
    let drained = |by: &[u64]| {
        let by: Vec<ReplicaId> = by.iter().map(|id| ReplicaId(*id)).collect();
        reports(move |id, report| {
            report.drained = id == 1;
            report.drained_by = if id == 1 { by.clone() } else { Vec::new() };
        })
    };
    let goes = |reports: &Reports, presence: &dyn Fn(NodeId) -> Presence| {
        next(&left, reports, presence, NOWHERE).is_some_and(|next| next.is_removed(ReplicaId(1)))
    };
    let without_two = |node: NodeId| if node == NodeId(2) { Presence::Gone } else { HERE(node) };
    assert!(goes(&drained(&[2]), &HERE));
    assert!(!goes(&drained(&[3]), &HERE), "the primary would answer reads without it");
    assert!(!goes(&drained(&[2]), &without_two), "only the one that is away holds everything");
    assert!(!goes(&drained(&[2, 3]), &without_two), "nobody has taken the place of the primary");
    let mut acting = left.clone();
    acting.placement[0].primary = Some(ReplicaId(3));
    let next = next(&acting, &drained(&[2, 3]), without_two, NOWHERE).unwrap();
    assert!(next.is_removed(ReplicaId(1)));
    assert!(!goes(&drained(&[9]), &HERE), "one that is not placed counts for nothing");
    assert!(goes(&drained(&[]), &HERE), "an older node does not say who");
    let mut still = drained(&[2]);
    still.get_mut(&ReplicaId(2)).unwrap().version = left.version.max(CatalogVersion(1));
    assert!(goes(&still, &HERE));
    still.get_mut(&ReplicaId(2)).unwrap().version = CatalogVersion(left.version.0 - 1);
    assert!(!goes(&still, &HERE), "it stands still since before the other one left");
}

#[test]
fn nobody_is_evicted_on_request_who_alone_serves() {
    let catalog = catalog();
    let ask = |replica: u64, accept_loss: bool, serving: &[u64]| {
        let serves = |member: &Placed| serving.contains(&member.replica.0);
        evict_on_request(&catalog, ReplicaId(replica), accept_loss, serves, NOW, 2)
    };
    assert_eq!(ask(1, false, &[1]), Err(EvictError::OnlyOneServes(ReplicaId(1), ShardId(0))));
    assert_eq!(ask(1, true, &[1]), Err(EvictError::OnlyOneServes(ReplicaId(1), ShardId(0))));
    assert!(ask(2, false, &[1]).is_ok() && ask(1, false, &[1, 3]).is_ok());
    assert!(ask(1, true, &[]).is_ok(), "nobody serves: its loss may be the way out");
}

fn fail(reports: &mut Reports, replica: u64) {
    reports.get_mut(&ReplicaId(replica)).unwrap().phase =
        ReplicaPhase::Failed("log files are missing".into());
}

#[test]
fn the_only_replica_that_has_failed_on_a_live_node_is_taken_over() {
    let mut failed = reports(|_, report| report.ready = false);
    fail(&mut failed, 1);
    let to_two = |_: &Catalog, _: ShardId| Some(NodeId(2));
    assert_eq!(next(&single(), &failed, HERE, to_two), None, "nobody gave it up");
    let drained = drain_node(&single(), NodeDrain::new(NodeId(1), false, NOW), NOW, 2).unwrap();
    assert_eq!(next(&drained, &failed, HERE, to_two), None, "it may be repaired");
    let replaced = drain_node(&single(), NodeDrain::new(NodeId(1), true, NOW), NOW, 2).unwrap();
    let away = |node: NodeId| if node == NodeId(1) { Presence::Away } else { HERE(node) };
    assert_eq!(next(&replaced, &failed, away, to_two), None, "it may come back at once, repaired");
    let plan = next(&replaced, &failed, HERE, to_two).unwrap().plan.unwrap();
    assert_eq!(
        (plan.kind, plan.sources[0].replica),
        (PlanKind::RecoverReplica { shard: ShardId(0) }, ReplicaId(1))
    );
}

/// Both replicas are gone for good, and both nodes were reported as such.
#[test]
fn a_shard_that_lost_all_its_replicas_is_taken_over_once_all_of_them_are_given_up() {
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    let catalog = Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1), NodeId(2)]], NOW, 1);
    let dead = |node: NodeId| if node.0 <= 2 { Presence::Gone } else { HERE(node) };
    let to_three = |_: &Catalog, _: ShardId| Some(NodeId(3));
    let first = drain_node(&catalog, NodeDrain::new(NodeId(1), true, NOW), NOW, 2).unwrap();
    assert_eq!(next(&first, &Reports::new(), dead, to_three), None, "nobody gave the other one up");
    let around = Around {
        presence: &dead,
        long_gone: &|node| dead(node) == Presence::Gone,
        lost: &|_| false,
        room: &to_three,
        site: &ANYWHERE,
    };
    let waits = waits_for(&first, &Reports::new(), &around, NOW).unwrap();
    let way_out = format!("start {0} or give it up with `vasto node replace {0}`", NodeId(2));
    assert!(waits.contains("shard 0 of ks") && waits.contains(&way_out), "{waits}");
    assert!(
        !waits.contains(&format!("node replace {}", NodeId(1))),
        "that was said already: {waits}"
    );
    let both = drain_node(&first, NodeDrain::new(NodeId(2), true, NOW), NOW, 3).unwrap();
    let taking = next(&both, &Reports::new(), dead, to_three).unwrap();
    let plan = taking.plan.as_ref().unwrap();
    assert_eq!(
        (plan.kind, plan.sources.len()),
        (PlanKind::RecoverReplica { shard: ShardId(0) }, 2)
    );
    let mut progress = crate::report::TargetProgress::new(plan.id);
    progress.stage = crate::report::TargetStage::Tailing;
    let mut target = reports(|_, _| {})[&ReplicaId(3)].clone();
    target.target = Some(progress);
    let reports = Reports::from([(ReplicaId(3), target)]);
    let away = |node: NodeId| if node.0 <= 2 { 90_000_000 } else { 0 };
    let crate::reconcile::Advance::Write(done) =
        crate::reconcile::advance(&taking, &reports, away, |_| u64::MAX, NOW, 5)
    else {
        panic!("the take-over does not go on");
    };
    assert_eq!(
        (ids(&done), done.draining.len()),
        (vec![3], 2),
        "both are drained should they return"
    );
    // Without a node that has room, the text says so.
    let around = Around {
        presence: &dead,
        long_gone: &|node| dead(node) == Presence::Gone,
        lost: &|_| false,
        room: &NOWHERE,
        site: &ANYWHERE,
    };
    let waits = waits_for(&both, &Reports::new(), &around, NOW).unwrap();
    assert!(waits.contains("vasto serve node"), "{waits}");
}

#[test]
fn what_cannot_go_on_says_what_it_waits_for_and_the_way_out() {
    let around = |presence| Around {
        presence,
        long_gone: &|_| false,
        lost: &|_| false,
        room: &NOWHERE,
        site: &ANYWHERE,
    };
    let waits = |catalog: &Catalog, reports: &Reports, presence| {
        waits_for(catalog, reports, &around(presence), NOW).unwrap_or_default()
    };
    let calm = reports(|_, _| {});
    assert_eq!(waits(&catalog(), &calm, &HERE), "");
    // Too few nodes.
    let mut few = catalog();
    few.placement[0].replicas.pop();
    assert!(waits(&few, &calm, &HERE).contains("start one with `vasto serve node`"));
    // The only replica has failed on a node that is only to be drained.
    let mut failed = calm.clone();
    fail(&mut failed, 1);
    let drained = drain_node(&single(), NodeDrain::new(NodeId(1), false, NOW), NOW, 2).unwrap();
    let text = waits(&drained, &failed, &HERE);
    assert!(text.contains("has failed") && text.contains("vasto node replace"), "{text}");
    // The new replica stands still.
    let mut still = calm.clone();
    still.get_mut(&ReplicaId(2)).unwrap().version = CatalogVersion(0);
    let text = waits(&of_two(), &still, &HERE);
    assert!(text.contains(&format!("replica 2 on {} to serve shard 0 of ks", NodeId(2))), "{text}");
}

/// The disk of node 2 is full.
#[test]
fn a_copy_that_failed_is_made_elsewhere_and_other_shards_have_their_turn() {
    let spec = KeyspaceSpec { shards: 2, replicas: 2, ..KeyspaceSpec::default() };
    let mut catalog =
        Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1)], vec![NodeId(1)]], NOW, 1);
    let calm = reports(|_, _| {});
    let begin = |catalog: &Catalog, now_us: u64| {
        let avoided = nodes_to_avoid(catalog, now_us);
        let room = move |_: &Catalog, _: ShardId| {
            Some(if avoided.contains(&NodeId(2)) { NodeId(3) } else { NodeId(2) })
        };
        let around = Around {
            presence: &HERE,
            long_gone: &|_| false,
            lost: &|_| false,
            room: &room,
            site: &ANYWHERE,
        };
        advance_members(catalog, &calm, &around, now_us, 3)
    };
    let failing = |started: &Catalog, now_us: u64| {
        let plan = started.plan.as_ref().unwrap();
        let mut progress = crate::report::TargetProgress::new(plan.id);
        progress.failed = Some("No space left on device".into());
        let mut report = calm[&ReplicaId(1)].clone();
        report.target = Some(progress);
        let crate::reconcile::Advance::Write(next) = crate::reconcile::advance(
            started,
            &Reports::from([(plan.targets[0].replica, report)]),
            |_| 0,
            |_| u64::MAX,
            now_us,
            4,
        ) else {
            panic!("it does not end");
        };
        *next
    };
    let mut tried = Vec::new();
    let mut now = NOW;
    for _ in 0..2 {
        let started = begin(&catalog, now).expect("a copy begins");
        let target = started.plan.as_ref().unwrap().targets[0];
        tried.push((target.shard.0, target.node.0));
        catalog = match target.node {
            NodeId(2) => failing(&started, now),
            _ => committed_of(&started),
        };
        now += 1;
    }
    // The other shard does not wait for the first one's pause, and no second attempt goes to the
    // full disk.
    assert_eq!(tried, [(0, 2), (1, 3)]);
    assert_eq!(begin(&catalog, now), None, "the first one waits");
    let later = begin(&catalog, now + COPY_AGAIN_US).expect("a copy begins");
    assert_eq!(later.plan.unwrap().targets[0].node, NodeId(3));
}

fn committed_of(catalog: &Catalog) -> Catalog {
    let target = catalog.plan.as_ref().unwrap().targets[0];
    let mut done = catalog.next(NOW, 9);
    done.plan = None;
    let shard = done.placement.iter_mut().find(|shard| shard.shard == target.shard).unwrap();
    shard.replicas.push(Placed { replica: target.replica, node: target.node });
    done
}

#[test]
fn a_shard_whose_copies_keep_failing_is_tried_less_and_less_often() {
    let mut catalog = single();
    let mut pauses = Vec::new();
    for n in 0..9 {
        let report =
            OperationReport { started_at_us: NOW + n, ..copy(&catalog, OperationOutcome::Aborted) };
        catalog.remember(report);
        pauses.push((copy_not_before(&catalog, ShardId(0)) - NOW - n) / 1_000_000);
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
    assert!(may_copy(&catalog, ShardId(1), NOW), "another shard is not concerned");
    catalog.remember(copy(&catalog, OperationOutcome::Done));
    assert!(may_copy(&catalog, ShardId(0), NOW));
}

fn copy(catalog: &Catalog, outcome: OperationOutcome) -> OperationReport {
    let mut report = end_of(catalog, &NodeDrain::new(NodeId(9), false, 1), outcome, None, NOW);
    (report.kind, report.shard) = (OperationKind::AddReplica, Some(ShardId(0)));
    (report.bytes_moved, report.duration_ms, report.started_at_us) = (100, 0, NOW);
    report
}

#[test]
fn the_report_of_an_emptied_node_counts_all_copies() {
    let mut catalog = single();
    catalog.draining_nodes.push(NodeDrain::new(NodeId(9), false, NOW));
    catalog.draining_nodes.push(NodeDrain::new(NodeId(8), false, NOW + 30));
    for n in 0..40 {
        let report =
            OperationReport { started_at_us: NOW + n, ..copy(&catalog, OperationOutcome::Done) };
        catalog.remember(report);
    }
    catalog.remember(copy(&catalog, OperationOutcome::Aborted));
    let ended = next(&catalog, &reports(|_, _| {}), HERE, NOWHERE).unwrap();
    let figures: Vec<u64> =
        ended.operations.iter().rev().take(2).map(|report| report.bytes_moved).collect();
    assert_eq!(figures, [1_000, 4_000]);
}

/// An operator does not want to give up replica by replica what a dead node alone holds.
#[test]
fn what_a_replaced_node_alone_holds_is_given_up_once_the_bucket_was_read() {
    let leaving = NodeDrain { accept_loss: true, ..NodeDrain::new(NodeId(1), true, NOW) };
    let dead = |node: NodeId| if node == NodeId(1) { Presence::Gone } else { HERE(node) };
    let begun = drain_node(&catalog(), leaving.clone(), NOW, 2).unwrap();
    let left = next(&begun, &reports(|_, _| {}), dead, NOWHERE).unwrap();
    assert_eq!((ids(&left), left.draining[0].replica), (vec![2, 3], ReplicaId(1)));
    assert_eq!(
        next(&left, &reports(|_, _| {}), dead, NOWHERE),
        None,
        "the bucket has not been read"
    );
    let read = reports(|id, report| {
        report.took_from_bucket = if id == 2 { vec![ReplicaId(1)] } else { Vec::new() }
    });
    let back = |node: NodeId| HERE(node);
    assert_eq!(next(&left, &read, back, NOWHERE), None, "it is back: it is drained");
    let gone = next(&left, &read, dead, NOWHERE).unwrap();
    assert!(gone.draining.is_empty() && gone.is_removed(ReplicaId(1)));
    // The same when the loss is accepted after the node was replaced; if it is not, nothing of the
    // node is left to move.
    let mut replaced = left.clone();
    replaced.draining_nodes.clear();
    assert_eq!(drain_node(&replaced, NodeDrain::new(NodeId(1), true, NOW), NOW, 2), None);
    let again = drain_node(&replaced, leaving, NOW, 2).unwrap();
    assert!(next(&again, &read, dead, NOWHERE).unwrap().draining.is_empty());
    // The drain does not end before.
    let mut whole = left;
    whole.spec.replicas = 2;
    assert_eq!(next(&whole, &reports(|_, _| {}), dead, NOWHERE), None);
    let around = Around {
        presence: &dead,
        long_gone: &|node| dead(node) == Presence::Gone,
        lost: &|_| false,
        room: &NOWHERE,
        site: &ANYWHERE,
    };
    let waits = waits_for(&whole, &reports(|_, _| {}), &around, NOW).unwrap();
    assert!(waits.contains("taken over from the bucket"), "{waits}");
}

#[test]
fn replicas_that_are_gone_for_good_are_named_in_bounded_space_and_none_is_forgotten() {
    let mut catalog = catalog();
    let mut gone = Vec::new();
    // One replica leaves late: it must not count as removed because later ones are.
    let late = evict(&catalog, ReplicaId(1), false, NOW, 2).unwrap().draining.remove(0);
    catalog.draining.push(late);
    catalog.placement[0].replicas.remove(0);
    for n in 4..1_000 {
        catalog.next_replica = ReplicaId(n + 1);
        catalog.remove_for_good([ReplicaId(n)]);
        gone.push(ReplicaId(n));
        assert!(catalog.removed.len() <= REMOVED_KEPT);
    }
    assert!(gone.iter().all(|replica| catalog.is_removed(*replica)));
    for stays in [1, 2, 3, 1_000] {
        assert!(!catalog.is_removed(ReplicaId(stays)), "{stays}");
    }
    catalog.draining.clear();
    catalog.remove_for_good([ReplicaId(1)]);
    assert!(catalog.is_removed(ReplicaId(1)));
}
