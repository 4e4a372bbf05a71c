//! Plans, from their start to their end.
#![allow(clippy::unwrap_used)]

use super::commit::commit;
use super::outcome::abort;
use super::pace::{Pace, set_pace};
use super::progress::{Advance, Running};
use super::refusal::PlanError;
use super::resize::start_resize;
use crate::band::Band;
use crate::catalog::{
    Catalog, KeyspaceSpec, Quarantine, QuarantineSource, RetiredReplica, Retirement,
};
use crate::control::operation::{OperationOutcome, Reached};
use crate::control::plan::{
    NODE_AWAY_MAX_US, PinnedManifest, Plan, PlanKind, SEALS_UNDONE_MAX, Source, Step, Target,
};
use crate::control::report::{
    PauseMs, ReplicaPhase, ReplicaReport, ReplicationReport, Reports, Sealed, SourceProgress,
    TargetProgress, TargetStage, ThrottleReport,
};
use crate::ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId,
};
use crate::limits::{SEAL_TIMEOUT, TAIL_LAG_BYTES_MAX, TAIL_LAG_LSNS_MAX, TARGET_SILENT_MAX};

const NODE: fn(u64) -> NodeId = NodeId;

/// Calls the real function, for nodes that have always been there.
fn advance(
    catalog: &Catalog,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    super::advance(catalog, reports, away_us, |_| u64::MAX, now_us, nonce)
}

fn two_shards() -> Catalog {
    let spec = KeyspaceSpec { shards: 2, quarantine_ms: 1000, ..KeyspaceSpec::default() };
    Catalog::first(KeyspaceId(7), "ks1", spec, &[vec![NODE(1)], vec![NODE(2)]], 1_000, 1)
}

fn report(replica: u64) -> ReplicaReport {
    let shard = ShardId(replica as u32 - 1);
    ReplicaReport {
        incarnation: Incarnation(1),
        version: CatalogVersion(1),
        lsn: Lsn(100),
        shipped_lsn: Lsn(100),
        manifest_lsn: Lsn(100),
        replication: ReplicationReport { ready: true, ..Default::default() },
        ..ReplicaReport::new(KeyspaceId(7), shard, ReplicaId(replica), ReplicaPhase::Serving)
    }
}

fn source(replica: u64, progress: SourceProgress) -> (ReplicaId, ReplicaReport) {
    (ReplicaId(replica), ReplicaReport { source: Some(progress), ..report(replica) })
}

fn source_progress_of(sealed: Option<Sealed>) -> SourceProgress {
    SourceProgress {
        plan: PlanId(1),
        export: None,
        manifest: Some(PinnedManifest { key: "m".into(), lsn: Lsn(10) }),
        sealed,
        released: false,
        pauses_us: vec![5_000],
        ..SourceProgress::new(PlanId(1))
    }
}

fn target(stage: TargetStage, cursors: &[(u64, u64)]) -> (ReplicaId, ReplicaReport) {
    let progress = TargetProgress {
        plan: PlanId(1),
        stage,
        cursors: cursors.iter().map(|(r, l)| (ReplicaId(*r), Lsn(*l))).collect(),
        lag_lsns: 0,
        lag_bytes: None,
        bytes_total: 10,
        bytes_done: 10,
        keys_moved: 3,
        bytes_moved: 10,
        bytes_from_bucket: 11,
        objects_read: 2,
        bytes_from_peers: 1,
        manifest_shipped: true,
        ..TargetProgress::new(PlanId(1))
    };
    (ReplicaId(3), ReplicaReport { target: Some(progress), ..report(3) })
}

fn write(advance: Advance) -> Catalog {
    match advance {
        Advance::Write(next) => *next,
        other => panic!("expected a version, got {other:?}"),
    }
}

fn at(step: Step) -> Catalog {
    let mut catalog = start_resize(&two_shards(), 3, &[vec![NODE(3)]], 2_000, 2).unwrap();
    catalog.plan.as_mut().unwrap().step = step;
    catalog
}

#[test]
fn a_grow_goes_through_every_step_and_ends_with_its_figures() {
    let catalog = at(Step::Prepare);
    assert_eq!(catalog.members_on(NODE(3)), vec![(ShardId(2), ReplicaId(3), false)]);
    let mut reports =
        Reports::from([source(1, source_progress_of(None)), source(2, source_progress_of(None))]);
    let tail = write(advance(&catalog, &reports, |_| 0, 3_000, 3));
    assert_eq!(tail.plan.as_ref().unwrap().step, Step::Tail);
    assert_eq!(tail.pins.len(), 2);
    assert!(matches!(advance(&tail, &reports, |_| 0, 3_000, 3), Advance::Wait(_)));

    reports.extend([target(TargetStage::Tailing, &[(1, 10), (2, 10)])]);
    let sealing = write(advance(&tail, &reports, |_| 0, 4_000, 4));
    assert_eq!(sealing.plan.as_ref().unwrap().step, Step::Sealing);
    assert_eq!(sealing.epoch, catalog.epoch, "no epoch before the commit");

    let sealed = Some(Sealed { version: sealing.version, lsn: Lsn(20) });
    reports.extend([source(1, source_progress_of(sealed)), source(2, source_progress_of(sealed))]);
    assert!(
        matches!(advance(&sealing, &reports, |_| 0, 5_000, 5), Advance::Wait(_)),
        "the target is behind the seal"
    );
    reports.extend([target(TargetStage::Tailing, &[(1, 20), (2, 19)])]);
    assert!(
        matches!(advance(&sealing, &reports, |_| 0, 5_000, 5), Advance::Wait(_)),
        "one source is not reached"
    );
    reports.extend([target(TargetStage::Tailing, &[(1, 20), (2, 20)])]);
    let committed = write(advance(&sealing, &reports, |_| 0, 5_000, 5));
    assert_eq!(
        (committed.epoch, committed.spec.shards, committed.placement.len()),
        (Epoch(2), 3, 3)
    );
    assert_eq!(committed.quarantines.len(), 1);

    assert!(matches!(advance(&committed, &reports, |_| 0, 6_000, 6), Advance::Wait(_)));
    reports.extend([target(TargetStage::Open, &[(1, 20), (2, 20)])]);
    for replica in [1, 2] {
        let released = SourceProgress { released: true, ..source_progress_of(sealed) };
        reports.extend([source(replica, released)]);
    }
    let finished = write(advance(&committed, &reports, |_| 0, 7_000, 7));
    assert!(finished.plan.is_none() && finished.pins.is_empty());
    let operation = finished.operations.last().unwrap();
    assert_eq!(
        (operation.outcome, operation.keys_moved, operation.write_pause_ms.p50),
        (OperationOutcome::Done, 3, 5.0)
    );

    assert_eq!(advance(&finished, &reports, |_| 0, 8_000, 8), Advance::Idle, "the quarantine runs");
    let dropping = write(advance(&finished, &reports, |_| 0, 2_000_000, 9));
    assert!(dropping.quarantines[0].dropping);
    assert!(matches!(advance(&dropping, &reports, |_| 0, 2_000_000, 9), Advance::Wait(_)));
    for replica in [1, 2] {
        reports.get_mut(&ReplicaId(replica)).unwrap().cleaned = vec![PlanId(1)];
    }
    let clean = write(advance(&dropping, &reports, |_| 0, 2_000_001, 10));
    assert!(clean.quarantines.is_empty());
}

#[test]
fn seals_of_another_version_or_plan_do_not_count() {
    let sealing = at(Step::Sealing);
    let old = Some(Sealed { version: CatalogVersion(sealing.version.0 - 1), lsn: Lsn(20) });
    let reports = Reports::from([
        source(1, source_progress_of(old)),
        source(2, source_progress_of(old)),
        target(TargetStage::Tailing, &[(1, 99), (2, 99)]),
    ]);
    assert!(matches!(advance(&sealing, &reports, |_| 0, 2_001, 3), Advance::Wait(_)));
    let mut foreign = reports.clone();
    for report in foreign.values_mut() {
        if let Some(progress) = &mut report.source {
            progress.plan = PlanId(99);
        }
    }
    assert!(matches!(advance(&sealing, &foreign, |_| 0, 2_001, 3), Advance::Wait(_)));
}

#[test]
fn the_time_of_a_seal_counts_from_when_the_nodes_were_told() {
    let sealing = at(Step::Sealing);
    let timeout_us = SEAL_TIMEOUT.as_micros() as u64;
    // The bucket took a second for the version.
    let shown_us = sealing.written_at_us + 1_000_000;
    let decided = |now_us| {
        let reports = Reports::new();
        super::advance_shown(&sealing, shown_us, &reports, |_| 0, |_| u64::MAX, now_us, 3)
    };
    assert!(matches!(decided(shown_us + timeout_us), Advance::Wait(_)));
    let back = write(decided(shown_us + timeout_us + 1));
    assert_eq!(back.plan.unwrap().step, Step::Tail);
}

#[test]
fn a_tail_is_close_by_its_bytes_where_they_are_told() {
    let tail = at(Step::Tail);
    let decided = |lag_lsns, lag_bytes| {
        let (id, mut of_target) = target(TargetStage::Tailing, &[]);
        let progress = of_target.target.as_mut().unwrap();
        (progress.lag_lsns, progress.lag_bytes) = (lag_lsns, lag_bytes);
        let reports = Reports::from([
            source(1, source_progress_of(None)),
            source(2, source_progress_of(None)),
            (id, of_target),
        ]);
        advance(&tail, &reports, |_| 0, 9_000, 3)
    };
    let seals = |lag_lsns, lag_bytes| matches!(decided(lag_lsns, lag_bytes), Advance::Write(_));
    assert!(seals(TAIL_LAG_LSNS_MAX, None) && !seals(TAIL_LAG_LSNS_MAX + 1, None));
    assert!(seals(9_999, Some(2 * TAIL_LAG_BYTES_MAX)), "many records of few bytes");
    assert!(!seals(1, Some(2 * TAIL_LAG_BYTES_MAX + 1)), "one long record");
    assert!(!seals(u64::MAX, Some(0)), "another source is not followed yet");
}

#[test]
fn a_plan_that_slows_writers_down_says_so() {
    let tail = at(Step::Tail);
    let throttle = Some(ThrottleReport { bytes_per_s: 2 << 20, held_back_ms: 7 });
    let (id, mut of_target) = target(TargetStage::Tailing, &[]);
    of_target.target.as_mut().unwrap().lag_bytes = Some(1 << 30);
    let reports = Reports::from([
        source(1, SourceProgress { throttle, ..source_progress_of(None) }),
        source(2, source_progress_of(None)),
        (id, of_target),
    ]);
    let Advance::Wait(what) = advance(&tail, &reports, |_| 0, 9_000, 3) else { panic!("it seals") };
    assert!(what.contains("slowed down: shard 0 to 2048 KiB/s"), "{what}");
}

#[test]
fn a_seal_that_takes_too_long_is_undone_and_in_the_end_the_plan_is_aborted() {
    let mut sealing = at(Step::Sealing);
    let late = sealing.written_at_us + 1_000_001;
    let back = write(advance(&sealing, &Reports::new(), |_| 0, late, 3));
    let plan = back.plan.as_ref().unwrap();
    assert_eq!((plan.step, plan.seals_undone, back.epoch), (Step::Tail, 1, sealing.epoch));
    sealing.plan.as_mut().unwrap().seals_undone = SEALS_UNDONE_MAX;
    let gone = write(advance(&sealing, &Reports::new(), |_| 0, late, 3));
    assert!(gone.plan.is_none());
    assert_eq!(gone.operations.last().unwrap().outcome, OperationOutcome::Aborted);
}

#[test]
fn a_failure_or_a_lost_node_aborts_before_the_commit_and_never_after_it() {
    for step in [Step::Prepare, Step::Tail, Step::Sealing] {
        let catalog = at(step);
        let gone = write(advance(&catalog, &Reports::new(), |_| NODE_AWAY_MAX_US + 1, 2_001, 3));
        assert_eq!((gone.spec.shards, gone.plan.is_none()), (2, true), "{step:?}");
        let failed =
            SourceProgress { failed: Some("disk full".into()), ..source_progress_of(None) };
        let gone = write(advance(&catalog, &Reports::from([source(1, failed)]), |_| 0, 2_001, 3));
        assert_eq!(gone.operations.last().unwrap().reason.as_deref(), Some("disk full"));
    }
    let committed = at(Step::Committed);
    assert!(matches!(
        advance(&committed, &Reports::new(), |_| NODE_AWAY_MAX_US, 2_001, 3),
        Advance::Wait(_)
    ));
    assert_eq!(abort(&committed, "cancelled", &Reports::new(), 1, 1), None);
}

#[test]
fn a_paused_plan_pins_what_was_prepared_and_goes_no_further() {
    let pause = |mut catalog: Catalog| {
        catalog.plan.as_mut().unwrap().paused = true;
        catalog
    };
    let mut reports =
        Reports::from([source(1, source_progress_of(None)), source(2, source_progress_of(None))]);
    let tail = write(advance(&pause(at(Step::Prepare)), &reports, |_| 0, 3_000, 3));
    let plan = tail.plan.clone().unwrap();
    assert_eq!((plan.step, plan.paused, tail.pins.len()), (Step::Tail, true, 2));
    reports.extend([target(TargetStage::Tailing, &[(1, 10), (2, 10)])]);
    // No time-out runs out: neither that of a silent target nor that of an absent node.
    let late_us = 3_000 + 1_000 * NODE_AWAY_MAX_US;
    for (reports, away_us) in [(&reports, 0), (&Reports::new(), 0)] {
        let Advance::Wait(what) = advance(&tail, reports, |_| away_us, late_us, 4) else {
            panic!("a paused plan went on")
        };
        assert!(what.contains("vasto operation resume op-7-1"), "{what}");
    }
    let away = advance(&tail, &reports, |_| 1_000 * NODE_AWAY_MAX_US, late_us, 4);
    assert!(matches!(away, Advance::Wait(_)), "{away:?}");
    let failed = SourceProgress { failed: Some("disk full".into()), ..source_progress_of(None) };
    let mut broken = reports.clone();
    broken.extend([source(1, failed)]);
    assert_eq!(write(advance(&tail, &broken, |_| 0, late_us, 4)).plan, None);
    assert!(abort(&tail, "cancelled", &reports, late_us, 4).is_some());
    let resumed = set_pace(&tail, PlanId(1), Pace::Resume, late_us, 4).unwrap();
    let sealing = write(advance(&resumed, &reports, |_| 0, late_us + 1, 5));
    assert_eq!(sealing.plan.as_ref().unwrap().step, Step::Sealing);
}

#[test]
fn a_committed_plan_finishes_without_those_who_do_not_come_back() {
    let committed = at(Step::Committed);
    let released = |id| source(id, SourceProgress { released: true, ..source_progress_of(None) });
    let open = target(TargetStage::Open, &[]);
    let away = |gone: u64| move |node| if node == NODE(gone) { NODE_AWAY_MAX_US + 1 } else { 0 };
    let finished = |next: &Catalog| {
        next.plan.is_none() && next.operations[0].outcome == OperationOutcome::Done
    };
    // The target is away, then a source.
    let reports = Reports::from([released(1), released(2), target(TargetStage::Tailing, &[])]);
    assert!(
        matches!(advance(&committed, &reports, away(2), 3_000, 3), Advance::Wait(_)),
        "the target is there"
    );
    assert!(finished(&write(advance(&committed, &reports, away(3), 3_000, 3))));
    let reports = Reports::from([source(1, source_progress_of(None)), released(2), open.clone()]);
    assert!(
        matches!(advance(&committed, &reports, away(3), 3_000, 3), Advance::Wait(_)),
        "the source is there"
    );
    assert!(finished(&write(advance(&committed, &reports, away(1), 3_000, 3))));
    // A failed replica applies the version when it is opened again.
    let failed = ReplicaReport { phase: ReplicaPhase::Failed("rot".into()), ..report(1) };
    let reports = Reports::from([(ReplicaId(1), failed), released(2), open]);
    assert!(finished(&write(advance(&committed, &reports, |_| 0, 3_000, 3))));
}

#[test]
fn a_take_over_takes_the_quarantines_of_the_lost_replica_too() {
    let mut catalog = two_shards();
    let leaving = crate::catalog::NodeDrain::new(NODE(1), true, 1);
    catalog.draining_nodes.push(leaving);
    let gave = QuarantineSource { shard: ShardId(0), replica: ReplicaId(1), sealed: Lsn(6) };
    for (plan, replicas, targets) in
        [(1, vec![1, 2], vec![(2, 7)]), (2, vec![2], vec![(1, 9), (2, 7)])]
    {
        catalog.quarantines.push(Quarantine {
            plan: PlanId(plan),
            range: Band::leaving(2, 3).into(),
            replicas: replicas.into_iter().map(ReplicaId).collect(),
            targets: targets.into_iter().map(|(id, lsn)| (ReplicaId(id), Lsn(lsn))).collect(),
            others: Vec::new(),
            sources: vec![gave],
            until_us: u64::MAX,
            dropping: false,
        });
    }
    catalog.plan = Some(Plan {
        id: PlanId(1),
        kind: PlanKind::RecoverReplica { shard: ShardId(0) },
        from_epoch: catalog.epoch,
        started_at_us: 1,
        step: Step::Tail,
        sources: vec![Source {
            shard: ShardId(0),
            replica: ReplicaId(1),
            node: NODE(1),
            manifest: None,
            export: None,
        }],
        targets: vec![Target { shard: ShardId(0), replica: ReplicaId(3), node: NODE(3) }],
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    let gone = |node| if node == NODE(1) { NODE_AWAY_MAX_US + 1 } else { 0 };
    let taken = write(advance(
        &catalog,
        &Reports::from([target(TargetStage::Tailing, &[])]),
        gone,
        5_000,
        3,
    ));
    assert_eq!(
        (taken.placement[0].replicas[0].replica, taken.draining[0].replica),
        (ReplicaId(3), ReplicaId(1))
    );
    assert_eq!(
        (&taken.quarantines[0].replicas[..], taken.quarantines[0].targets.len()),
        (&[ReplicaId(2)][..], 1)
    );
    assert_eq!(taken.quarantines[1].targets, [(ReplicaId(3), Lsn(1)), (ReplicaId(2), Lsn(7))]);
    // What it shipped may be what a target lacks that is lost as well.
    assert_eq!(taken.quarantines[0].sources, [gave]);
    assert!(taken.quarantines[0].took_from(ReplicaId(1)));
}

#[test]
fn a_grow_by_several_shards_has_the_targets_of_each_and_one_cutover() {
    let mut two = two_shards();
    two.spec.replicas = 2;
    let nodes = [vec![NODE(3), NODE(1)], vec![NODE(1), NODE(2)], vec![NODE(2), NODE(3)]];
    let mut tail = start_resize(&two, 5, &nodes, 2_000, 2).unwrap();
    let first = two.next_replica.0;
    let plan = tail.plan.as_mut().unwrap();
    plan.step = Step::Tail;
    let targets: Vec<_> = plan.targets.iter().map(|t| (t.shard.0, t.replica.0, t.node)).collect();
    let expected: Vec<_> = (2..5)
        .zip(&nodes)
        .flat_map(|(shard, nodes)| nodes.iter().map(move |node| (shard, *node)))
        .zip(first..)
        .map(|((shard, node), replica)| (shard, replica, node))
        .collect();
    assert_eq!(targets, expected);
    assert_eq!(tail.next_replica.0, first + 6);
    let mut reports =
        Reports::from([source(1, source_progress_of(None)), source(2, source_progress_of(None))]);
    let caught_up = |replica: u64| {
        let (_, of_three) = target(TargetStage::Tailing, &[(1, 20), (2, 20)]);
        (ReplicaId(replica), ReplicaReport { target: of_three.target, ..report(replica) })
    };
    // All targets of all shards are waited for; then one version seals, one commits.
    for replica in first..first + 5 {
        reports.extend([caught_up(replica)]);
        assert!(matches!(advance(&tail, &reports, |_| 0, 4_000, 3), Advance::Wait(_)));
    }
    reports.extend([caught_up(first + 5)]);
    let sealing = write(advance(&tail, &reports, |_| 0, 4_000, 3));
    let sealed = Some(Sealed { version: sealing.version, lsn: Lsn(20) });
    reports.extend([source(1, source_progress_of(sealed)), source(2, source_progress_of(sealed))]);
    let committed = write(advance(&sealing, &reports, |_| 0, 5_000, 4));
    assert_eq!((committed.spec.shards, committed.placement.len()), (5, 5));
    assert!(committed.placement[2..].iter().all(|shard| shard.replicas.len() == 2));
    assert_eq!(committed.quarantines[0].targets.len(), 3, "the shipping target of each new shard");
    assert_eq!(committed.epoch.0, two.epoch.0 + 1);
}

#[test]
fn the_commit_of_a_shrink_tells_the_replicas_of_its_retired_shards_from_later_ones() {
    let first = two_shards();
    assert!(!serde_json::to_string(&first).unwrap().contains("retirements"));
    let mut sealing = start_resize(&first, 1, &[], 2_000, 2).unwrap();
    sealing.plan.as_mut().unwrap().step = Step::Sealing;
    let (plan, reports) = (sealing.plan.as_ref().unwrap(), Reports::new());
    let committed = commit(Running {
        catalog: &sealing,
        plan,
        reports: &reports,
        shown_us: 3_000,
        now_us: 3_000,
        nonce: 3,
    });
    assert!(committed.is_retired(ReplicaId(2)) && !committed.is_placed(ReplicaId(2)));
    let retirement = Retirement {
        first: ShardId(1),
        below: ReplicaId(3),
        version: committed.version,
        at_us: 3_000,
    };
    assert_eq!(committed.retirement_of(ShardId(1), ReplicaId(2)), Some(&retirement));
    let text = format!(r#"{{"first":1,"below":3,"version":{},"at_us":3000}}"#, committed.version);
    assert_eq!(serde_json::to_string(&retirement).unwrap(), text, "the field is persisted");
    assert_eq!(committed.retirement_of(ShardId(0), ReplicaId(1)), None, "its shard survived");
    // The shard exists again.
    let again = Catalog { plan: None, quarantines: Vec::new(), ..committed };
    let again = start_resize(&again, 2, &[vec![NODE(2)]], 4_000, 4).unwrap();
    let target = again.plan.as_ref().unwrap().targets[0];
    assert_eq!((target.shard, target.replica), (ShardId(1), ReplicaId(3)));
    assert_eq!(again.retirement_of(ShardId(1), ReplicaId(2)), Some(&retirement));
    assert_eq!(again.retirement_of(ShardId(1), ReplicaId(3)), None, "it is of the later shard");
}

#[test]
fn grows_that_cannot_be_are_refused_with_what_to_do() {
    let catalog = two_shards();
    let grow = |to| start_resize(&catalog, to, &[vec![NODE(3)]], 1, 1);
    assert_eq!(grow(2), Err(PlanError::SameCount(2)));
    assert_eq!(grow(5), Err(PlanError::NoNode(1)), "one shard of three has a node");
    assert_eq!(grow(72), Err(PlanError::Above64));
    assert!(matches!(grow(5000), Err(PlanError::Count(_))));
    assert_eq!(start_resize(&catalog, 3, &[], 1, 1), Err(PlanError::NoNode(1)));
    let running = at(Step::Tail);
    assert!(matches!(start_resize(&running, 3, &[vec![NODE(3)]], 1, 1), Err(PlanError::Busy(_))));
}

#[test]
fn a_shrink_waits_for_the_quarantine_of_a_grow_and_not_for_that_of_a_shrink() {
    let held = |plan, range, replica, until_us| Quarantine {
        plan: PlanId(plan),
        range,
        replicas: vec![ReplicaId(replica)],
        targets: Vec::new(),
        until_us,
        others: Vec::new(),
        sources: Vec::new(),
        dropping: false,
    };
    let mut catalog = two_shards();
    catalog.retired.push(RetiredReplica {
        shard: ShardId(2),
        replica: ReplicaId(9),
        node: NODE(3),
        plan: PlanId(7),
    });
    catalog.quarantines.push(held(7, Band::owned(3).into(), 9, 9_000_000));
    let shrink = |catalog: &Catalog| start_resize(catalog, 1, &[], 1_000_000, 1);
    assert!(shrink(&catalog).is_ok(), "the replicas that have retired are not touched");
    // A grow came after the shrink.
    catalog.quarantines.push(held(8, Band::leaving(1, 2).into(), 1, 3_500_000));
    assert_eq!(shrink(&catalog), Err(PlanError::Quarantined { seconds: 3 }));
}

#[test]
fn a_quarantine_waits_for_a_manifest_of_the_target() {
    let mut catalog = two_shards();
    catalog.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: Band::leaving(2, 3).into(),
        replicas: vec![ReplicaId(1)],
        targets: vec![(ReplicaId(3), Lsn(101))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: 10,
        dropping: false,
    });
    let mut reports = Reports::from([target(TargetStage::Open, &[])]);
    assert!(matches!(advance(&catalog, &reports, |_| 0, 11, 3), Advance::Wait(_)));
    reports.get_mut(&ReplicaId(3)).unwrap().manifest_lsn = Lsn(101);
    assert!(write(advance(&catalog, &reports, |_| 0, 11, 3)).quarantines[0].dropping);
}

#[test]
fn catalogs_survive_unknown_fields_and_round_trip() {
    let catalog = at(Step::Tail);
    let mut json: serde_json::Value = serde_json::to_value(&catalog).unwrap();
    json["from_the_future"] = serde_json::json!({"x": 1});
    assert_eq!(serde_json::from_value::<Catalog>(json).unwrap(), catalog);
}

#[test]
fn pause_percentiles() {
    assert_eq!(PauseMs::of(vec![]), PauseMs::default());
    assert_eq!(PauseMs::of(vec![3_000, 1_000, 2_000]), PauseMs { p50: 2.0, p99: 3.0, max: 3.0 });
}

#[test]
fn a_member_that_has_failed_aborts_the_plan_and_an_away_node_keeps_it_from_sealing() {
    let tail = at(Step::Tail);
    let ready = Reports::from([target(TargetStage::Tailing, &[(1, 10), (2, 10)])]);
    assert!(matches!(advance(&tail, &ready, |_| 0, 9_000, 3), Advance::Write(_)));
    let away = |node| if node == NODE(3) { 1 } else { 0 };
    assert!(
        matches!(advance(&tail, &ready, away, 9_000, 3), Advance::Wait(_)),
        "its last report is old"
    );
    let mut failed = ready.clone();
    failed.insert(
        ReplicaId(1),
        ReplicaReport { phase: ReplicaPhase::Failed("rot".into()), ..report(1) },
    );
    let gone = write(advance(&tail, &failed, |_| 0, 9_000, 3));
    assert!(
        gone.plan.is_none()
            && gone.operations[0].reason.as_deref().is_some_and(|reason| reason.contains("rot"))
    );
}

#[test]
fn what_the_targets_of_an_aborted_grow_shipped_is_discarded() {
    let catalog = at(Step::Tail);
    let undone = abort(&catalog, "cancelled", &Reports::new(), 3_000, 3).unwrap();
    assert_eq!(undone.discarded, [ReplicaId(3)]);
    // The next attempt has a target of its own, which counts.
    let again = start_resize(&undone, 3, &[vec![NODE(3)]], 4_000, 4).unwrap();
    let targets: Vec<ReplicaId> =
        again.plan.as_ref().unwrap().targets.iter().map(|target| target.replica).collect();
    assert_eq!((targets, again.discarded), (vec![ReplicaId(4)], vec![ReplicaId(3)]));
}

#[test]
fn a_restore_ends_when_the_bucket_holds_what_was_restored() {
    let mut catalog = two_shards();
    let kind =
        PlanKind::Restore { keyspace: KeyspaceId(1), version: CatalogVersion(9), at_us: None };
    let target = |replica: u64| Target {
        shard: ShardId(replica as u32 - 1),
        replica: ReplicaId(replica),
        node: NODE(replica),
    };
    catalog.plan = Some(Plan {
        id: PlanId(1),
        kind,
        from_epoch: Epoch(1),
        started_at_us: 1_000,
        step: Step::Tail,
        sources: Vec::new(),
        targets: vec![target(1), target(2)],
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    let reports = |shipped: bool| -> Reports {
        let progress = TargetProgress {
            stage: TargetStage::Open,
            manifest_shipped: shipped,
            reached: vec![(ReplicaId(5), Lsn(77))],
            ..TargetProgress::new(PlanId(1))
        };
        let of = |replica: u64| ReplicaReport { target: Some(progress.clone()), ..report(replica) };
        Reports::from([(ReplicaId(1), of(1)), (ReplicaId(2), of(2))])
    };
    assert!(matches!(advance(&catalog, &reports(false), |_| 0, 2_000, 2), Advance::Wait(_)));
    let done = write(advance(&catalog, &reports(true), |_| 0, 2_000, 2));
    assert_eq!(done.plan, None);
    let reached = &done.operations.last().unwrap().reached;
    assert_eq!(reached.len(), 2);
    assert_eq!(reached[1], Reached { shard: ShardId(1), replica: ReplicaId(5), lsn: Lsn(77) });
}

fn taking_over() -> Catalog {
    let mut catalog = two_shards();
    catalog.plan = Some(Plan {
        id: PlanId(1),
        kind: PlanKind::RecoverReplica { shard: ShardId(0) },
        from_epoch: catalog.epoch,
        started_at_us: 1,
        step: Step::Tail,
        sources: vec![Source {
            shard: ShardId(0),
            replica: ReplicaId(1),
            node: NODE(1),
            manifest: None,
            export: None,
        }],
        targets: vec![Target { shard: ShardId(0), replica: ReplicaId(3), node: NODE(3) }],
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    catalog
}

#[test]
fn a_take_over_goes_on_although_its_source_reports_that_it_has_failed() {
    let failed =
        ReplicaReport { phase: ReplicaPhase::Failed("log files are missing".into()), ..report(1) };
    let reports = Reports::from([(ReplicaId(1), failed), target(TargetStage::Tailing, &[])]);
    for away_us in [0, NODE_AWAY_MAX_US + 1] {
        let away = |node| if node == NODE(1) { away_us } else { 0 };
        let taken = write(advance(&taking_over(), &reports, away, 5_000, 3));
        assert_eq!(taken.placement[0].replicas[0].replica, ReplicaId(3), "away for {away_us}");
    }
    // A failure of the target counts.
    let failed = ReplicaReport { phase: ReplicaPhase::Failed("rot".into()), ..report(3) };
    let gone = |node| if node == NODE(1) { NODE_AWAY_MAX_US + 1 } else { 0 };
    let undone =
        write(advance(&taking_over(), &Reports::from([(ReplicaId(3), failed)]), gone, 5_000, 3));
    assert_eq!(
        (undone.operations[0].outcome, &undone.operations[0].failed_on[..]),
        (OperationOutcome::Aborted, &[NODE(3)][..])
    );
}

#[test]
fn a_take_over_does_not_commit_over_a_source_that_is_back() {
    let reports = Reports::from([(ReplicaId(1), report(1)), target(TargetStage::Tailing, &[])]);
    let undone = write(advance(&taking_over(), &reports, |_| 0, 5_000, 3));
    assert_eq!(undone.placement[0].replicas[0].replica, ReplicaId(1));
    assert!(undone.operations[0].reason.as_ref().is_some_and(|reason| reason.contains("is back")));
    assert!(undone.operations[0].failed_on.is_empty(), "that is not the target's fault");
    // A replica that is being opened is waited for: it may serve soon.
    let opening = ReplicaReport {
        phase: ReplicaPhase::Opening,
        replication: ReplicationReport::default(),
        ..report(1)
    };
    let reports = Reports::from([(ReplicaId(1), opening), target(TargetStage::Tailing, &[])]);
    assert!(
        matches!(advance(&taking_over(), &reports, |_| 0, 5_000, 3), Advance::Wait(what) if what.contains("open"))
    );
    let silent = Reports::from([target(TargetStage::Tailing, &[])]);
    assert!(matches!(advance(&taking_over(), &silent, |_| 0, 5_000, 3), Advance::Wait(_)));
}

#[test]
fn a_target_whose_node_is_there_and_begins_nothing_is_given_up() {
    let mut copying = taking_over();
    copying.plan.as_mut().unwrap().kind = PlanKind::AddReplica { shard: ShardId(0) };
    let silent_us = TARGET_SILENT_MAX.as_micros() as u64;
    for catalog in [copying, at(Step::Tail)] {
        let late = catalog.written_at_us + silent_us;
        assert!(matches!(advance(&catalog, &Reports::new(), |_| 0, late, 3), Advance::Wait(_)));
        let undone = write(advance(&catalog, &Reports::new(), |_| 0, late + 1, 3));
        assert_eq!((undone.plan, &undone.operations[0].failed_on[..]), (None, &[NODE(3)][..]));
        let away = |node| if node == NODE(3) { 1 } else { 0 };
        assert!(
            matches!(advance(&catalog, &Reports::new(), away, late + 1, 3), Advance::Wait(_)),
            "it may come back"
        );
        let back = super::advance(&catalog, &Reports::new(), |_| 0, |_| silent_us, late + 1, 3);
        assert!(matches!(back, Advance::Wait(_)), "it has only just come back");
        let target = catalog.plan.as_ref().unwrap().targets[0].replica;
        let mut opening = report(target.0);
        opening.phase = ReplicaPhase::Opening;
        let opening = Reports::from([(target, opening)]);
        assert!(
            matches!(advance(&catalog, &opening, |_| 0, late + 1, 3), Advance::Wait(_)),
            "it opens what it has"
        );
    }
}
