//! Shrinks, from their start to the end of their quarantine.
#![allow(clippy::unwrap_used)]

use super::drain::drain_node;
use super::evict::{EvictError, evict};
use super::outcome::abort;
use super::progress::Advance;
use super::quarantine::{end_quarantines, in_the_way};
use super::refusal::PlanError;
use super::resize::start_resize;
use crate::band::{Band, ShardCountError};
use crate::catalog::{
    Catalog, DrainingReplica, KeyspaceSpec, NodeDrain, Placed, QuarantineSource, RetiredReplica,
};
use crate::control::operation::{OperationKind, OperationOutcome};
use crate::control::plan::{NODE_AWAY_MAX_US, PinnedManifest, Step};
use crate::control::report::{
    ReplicaPhase, ReplicaReport, ReplicationReport, Reports, Sealed, SourceProgress,
    TargetProgress, TargetStage,
};
use crate::ids::{KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::record::BandRange;

/// Where the seal of every source is.
const SEAL: Lsn = Lsn(20);
/// The length of a quarantine, microseconds.
pub(super) const QUARANTINE_US: u64 = 1_000_000;

fn nodes_of(shard: u32, replicas: u32) -> Vec<NodeId> {
    (0..replicas).map(|copy| NodeId(u64::from((shard + copy) % 5 + 1))).collect()
}

/// Returns a keyspace on five nodes; the replicas of shard `i` are `i * replicas + 1` and on.
pub(super) fn keyspace(shards: u32, replicas: u32) -> Catalog {
    let spec = KeyspaceSpec {
        shards,
        replicas,
        quarantine_ms: QUARANTINE_US / 1000,
        ..KeyspaceSpec::default()
    };
    let nodes: Vec<Vec<NodeId>> = (0..shards).map(|shard| nodes_of(shard, replicas)).collect();
    Catalog::first(KeyspaceId(7), "ks1", spec, &nodes, 1_000, 1)
}

pub(super) fn resized(catalog: &Catalog, to: u32, now_us: u64) -> Result<Catalog, PlanError> {
    let added = catalog.spec.shards..to;
    let nodes: Vec<Vec<NodeId>> =
        added.map(|shard| nodes_of(shard, catalog.spec.replicas)).collect();
    start_resize(catalog, to, &nodes, now_us, 2)
}

/// Returns the reports of nodes that have done all that `catalog` asks of them.
pub(super) fn done(catalog: &Catalog) -> Reports {
    let plan = catalog.plan.as_ref();
    let of = |shard: ShardId, replica: ReplicaId| {
        let mut report = ReplicaReport {
            version: catalog.version,
            lsn: Lsn(100 + replica.0),
            shipped_lsn: Lsn(100 + replica.0),
            manifest_lsn: Lsn(100 + replica.0),
            replication: ReplicationReport { ready: true, ..ReplicationReport::default() },
            ..ReplicaReport::new(catalog.keyspace, shard, replica, ReplicaPhase::Serving)
        };
        report.replication.floor = 10 * replica.0;
        let dropping = catalog.quarantines.iter().filter(|quarantine| quarantine.dropping);
        report.cleaned = dropping.map(|quarantine| quarantine.plan).collect();
        let Some(plan) = plan else { return report };
        report.replication.floor = plan.floor.unwrap_or(10 * replica.0);
        let key = |what: &str| format!("{what}-{replica}");
        let is_source = plan.sources.iter().any(|source| source.replica == replica);
        let exported = plan.exports() && (plan.floor.is_some() || !plan.shrinks());
        let gives = plan.sources.iter().any(|source| source.shard == shard);
        report.source = gives.then(|| SourceProgress {
            plan: plan.id,
            manifest: is_source.then(|| PinnedManifest { key: key("manifest"), lsn: Lsn(10) }),
            export: (is_source && exported).then(|| key("export")),
            sealed: (plan.step == Step::Sealing)
                .then_some(Sealed { version: catalog.version, lsn: SEAL }),
            released: plan.step == Step::Committed,
            pauses_us: vec![5_000],
            ..SourceProgress::new(plan.id)
        });
        let receives = plan.targets.iter().any(|target| target.replica == replica);
        report.target = receives.then(|| TargetProgress {
            stage: match plan.step {
                Step::Prepare => TargetStage::Downloading,
                Step::Tail | Step::Sealing => TargetStage::Tailing,
                Step::Committed => TargetStage::Open,
            },
            cursors: plan.sources.iter().map(|source| (source.replica, SEAL)).collect(),
            keys_moved: 3,
            manifest_shipped: true,
            ..TargetProgress::new(plan.id)
        });
        report
    };
    let members = catalog.members().into_iter().map(|(shard, member, _)| (shard, member.replica));
    let retired = catalog.retired.iter().map(|retired| (retired.shard, retired.replica));
    members.chain(retired).map(|(shard, replica)| (replica, of(shard, replica))).collect()
}

pub(super) fn decided(catalog: &Catalog, reports: &Reports, now_us: u64) -> Advance {
    super::advance(catalog, reports, |_| 0, |_| u64::MAX, now_us, now_us)
}

fn write(advance: Advance) -> Catalog {
    match advance {
        Advance::Write(next) => *next,
        other => panic!("expected a version, got {other:?}"),
    }
}

fn waits(advance: Advance) -> String {
    match advance {
        Advance::Wait(what) => what,
        other => panic!("expected a wait, got {other:?}"),
    }
}

/// Advances by the reports of nodes that do everything until the plan is at `step`.
fn until(mut catalog: Catalog, step: Step) -> Catalog {
    while catalog.plan.as_ref().is_some_and(|plan| plan.step != step) {
        catalog = write(decided(&catalog, &done(&catalog), catalog.written_at_us + 1));
    }
    assert!(catalog.plan.is_some(), "the plan has ended before {step:?}");
    catalog
}

/// Advances until the plan has ended.
fn ended(mut catalog: Catalog) -> Catalog {
    while catalog.plan.is_some() {
        catalog = write(decided(&catalog, &done(&catalog), catalog.written_at_us + 1));
    }
    catalog
}

pub(super) fn placed(catalog: &Catalog) -> Vec<u64> {
    let placed = catalog.placement.iter().flat_map(|shard| &shard.replicas);
    placed.map(|member| member.replica.0).collect()
}

fn retired(catalog: &Catalog) -> Vec<(u32, u64)> {
    catalog.retired.iter().map(|retired| (retired.shard.0, retired.replica.0)).collect()
}

#[test]
fn a_shrink_goes_through_every_step_and_retires_its_shards() {
    let five = keyspace(5, 2);
    let prepare = resized(&five, 2, 2_000).unwrap();
    let plan = prepare.plan.as_ref().unwrap();
    let sources: Vec<u64> = plan.sources.iter().map(|source| source.replica.0).collect();
    let targets: Vec<u64> = plan.targets.iter().map(|target| target.replica.0).collect();
    assert_eq!((sources, targets), (vec![5, 7, 9], vec![1, 2, 3, 4]));
    assert_eq!(plan.arriving(), Some(Band::leaving(2, 5).into()));
    assert_eq!(plan.leaving(), Some(Band::owned(5).into()));
    assert!(plan.exports() && prepare.next_replica == five.next_replica, "no replica is made");

    let tail = until(prepare, Step::Tail);
    let plan = tail.plan.as_ref().unwrap();
    assert_eq!(plan.floor, Some(101), "one above the greatest of all floors");
    let exports: Vec<_> = plan.sources.iter().filter_map(|source| source.export.clone()).collect();
    assert_eq!(exports, ["export-5", "export-7", "export-9"]);
    assert_eq!(tail.pins.len(), 6, "three manifests, three exports");

    let mut reports = done(&tail);
    reports.get_mut(&ReplicaId(3)).unwrap().target.as_mut().unwrap().manifest_shipped = false;
    assert_eq!(
        waits(decided(&tail, &reports, 3_000)),
        "a manifest of shard 1 that holds what it received"
    );
    let mut reports = done(&tail);
    reports.get_mut(&ReplicaId(4)).unwrap().target.as_mut().unwrap().manifest_shipped = false;
    let sealing = write(decided(&tail, &reports, 3_000));
    assert_eq!(sealing.plan.as_ref().unwrap().step, Step::Sealing);
    assert_eq!((sealing.epoch, placed(&sealing)), (five.epoch, (1..=10).collect()));

    // Every replica of a retiring shard seals, and every survivor reaches every seal.
    let mut reports = done(&sealing);
    reports.get_mut(&ReplicaId(10)).unwrap().source.as_mut().unwrap().sealed = None;
    assert_eq!(waits(decided(&sealing, &reports, 3_000)), "replica 10 of shard 4 to seal");
    let mut reports = done(&sealing);
    let behind = reports.get_mut(&ReplicaId(2)).unwrap().target.as_mut().unwrap();
    behind.cursors.insert(ReplicaId(9), Lsn(19));
    assert_eq!(waits(decided(&sealing, &reports, 3_000)), "shard 0 to reach the seal of shard 4");

    let committed = write(decided(&sealing, &done(&sealing), 3_000));
    assert_eq!((committed.spec.shards, committed.epoch.0), (2, five.epoch.0 + 1));
    assert_eq!(placed(&committed), [1, 2, 3, 4]);
    assert_eq!(retired(&committed), [(2, 5), (2, 6), (3, 7), (3, 8), (4, 9), (4, 10)]);
    let quarantine = &committed.quarantines[0];
    assert_eq!(quarantine.range, BandRange::from(Band::owned(5)));
    assert_eq!(quarantine.replicas.len(), 6);
    assert_eq!(quarantine.targets, [(ReplicaId(1), Lsn(101)), (ReplicaId(3), Lsn(103))]);
    assert_eq!(quarantine.others, [(ReplicaId(2), Lsn(102)), (ReplicaId(4), Lsn(104))]);
    let sources = [(2, 5), (3, 7), (4, 9)].map(|(shard, replica)| QuarantineSource {
        shard: ShardId(shard),
        replica: ReplicaId(replica),
        sealed: SEAL,
    });
    assert_eq!(quarantine.sources, sources);
    assert_eq!(committed.node_of(ReplicaId(9)), five.node_of(ReplicaId(9)));

    let mut reports = done(&committed);
    reports.get_mut(&ReplicaId(8)).unwrap().source.as_mut().unwrap().released = false;
    assert_eq!(
        waits(decided(&committed, &reports, 3_000)),
        "replica 8 of shard 3 to release its writers"
    );
    reports.get_mut(&ReplicaId(2)).unwrap().target.as_mut().unwrap().stage = TargetStage::Tailing;
    assert_eq!(waits(decided(&committed, &reports, 3_000)), "shard 0 to open");

    let finished = ended(committed);
    let operation = finished.operations.last().unwrap();
    assert_eq!(
        (&operation.kind, operation.outcome, operation.from, operation.to, operation.keys_moved),
        (&OperationKind::Shrink, OperationOutcome::Done, 5, 2, 12)
    );
    assert_eq!((finished.pins.len(), retired(&finished).len()), (0, 6));
}

#[test]
fn all_replicas_of_all_shards_agree_on_one_floor_before_anything_is_exported() {
    let first = resized(&keyspace(3, 2), 1, 2_000).unwrap();
    let mut reports = done(&first);
    reports.get_mut(&ReplicaId(2)).unwrap().version.0 -= 1;
    assert_eq!(
        waits(decided(&first, &reports, 2_001)),
        "replica 2 of shard 0 to take part in the shrink"
    );
    reports.remove(&ReplicaId(2));
    assert!(waits(decided(&first, &reports, 2_001)).contains("replica 2 of shard 0"));
    // It is not waited for without limit, unless the plan is paused.
    let late_us = 2_001 + 121_000_000;
    assert_eq!(write(decided(&first, &reports, late_us)).plan, None);
    let mut paused = first.clone();
    paused.plan.as_mut().unwrap().paused = true;
    assert!(waits(decided(&paused, &reports, late_us)).contains("replica 2 of shard 0"));
    let named = write(decided(&first, &done(&first), 2_001));
    assert_eq!(named.plan.as_ref().unwrap().floor, Some(61));
    assert_eq!(named.plan.as_ref().unwrap().step, Step::Prepare);

    // A survivor lags, whatever the sources have done.
    let mut reports = done(&named);
    reports.get_mut(&ReplicaId(1)).unwrap().replication.floor = 60;
    assert_eq!(
        waits(decided(&named, &reports, 2_002)),
        "the replicas of shard 0 to hold the same records"
    );
    // A floor that rises meanwhile is the floor of a new version, which counts anew.
    let without_exports = |catalog: &Catalog| -> Reports {
        let mut reports = done(catalog);
        reports.values_mut().for_each(|report| report.source = None);
        reports
    };
    let mut reports = without_exports(&named);
    reports.get_mut(&ReplicaId(4)).unwrap().replication.floor = 75;
    let raised = write(decided(&named, &reports, 2_002));
    assert_eq!(raised.plan.as_ref().unwrap().floor, Some(76));
    assert!(waits(decided(&raised, &reports, 2_003)).contains("take part"), "of the last version");
    assert_eq!(until(raised, Step::Tail).plan.unwrap().floor, Some(76));
    // What was exported under the lower floor must not be used.
    let mut reports = done(&named);
    reports.get_mut(&ReplicaId(4)).unwrap().replication.floor = 75;
    let undone = write(decided(&named, &reports, 2_002));
    let reason = undone.operations[0].reason.as_deref().unwrap();
    assert!(undone.plan.is_none() && reason.contains("start the shrink again"), "{reason}");
}

#[test]
fn shrinks_that_cannot_be_are_refused_with_what_to_do() {
    let four = keyspace(4, 1);
    assert_eq!(resized(&four, 0, 1), Err(PlanError::Count(ShardCountError::Zero)));
    assert_eq!(resized(&four, 4, 1), Err(PlanError::SameCount(4)));
    let running = resized(&four, 2, 1).unwrap();
    assert_eq!(resized(&running, 3, 2), Err(PlanError::Busy("op-7-1".into())));
    let mut draining = four.clone();
    let (shard, replica, node) = (ShardId(3), ReplicaId(9), NodeId(1));
    draining.draining.push(DrainingReplica { shard, replica, node, since_us: 1 });
    assert_eq!(
        resized(&draining, 2, 1),
        Err(PlanError::DrainingReplica(ReplicaId(9), ShardId(3), NodeId(1)))
    );
    let deleted = Catalog { state: crate::catalog::KeyspaceState::Deleted, ..four };
    assert_eq!(resized(&deleted, 2, 1), Err(PlanError::Deleted));
}

#[test]
fn a_shrink_waits_for_quarantines_of_the_arriving_bands_on_survivors_alone() {
    let grown = ended(resized(&keyspace(2, 1), 4, 2_000).unwrap());
    let until_us = grown.quarantines[0].until_us;
    let refused = resized(&grown, 3, until_us - 500_000).unwrap_err();
    assert_eq!(refused, PlanError::Quarantined { seconds: 1 });
    for part in ["for 1 s more", "--end-quarantine"] {
        assert!(refused.to_string().contains(part), "{refused}");
    }
    let over = resized(&grown, 3, until_us + 1).unwrap_err();
    assert!(over.to_string().contains("try again in a moment"), "{over}");
    // An earlier shrink keeps the bands of replicas that have retired: nothing of them is on a
    // survivor. The quarantine of the grow behind it still counts.
    let eight = keyspace(8, 1);
    let four = ended(resized(&eight, 4, 2_000).unwrap());
    assert!(resized(&four, 3, 3_000).is_ok(), "only retired replicas hold anything");
    let ten = ended(resized(&four, 10, 3_000).unwrap());
    assert_eq!(ten.quarantines.len(), 2);
    assert!(matches!(resized(&ten, 4, 4_000), Err(PlanError::Quarantined { .. })));
    // Bands that a replica gave away and whose own shard retires arrive nowhere.
    let mut elsewhere = ten;
    elsewhere.quarantines[1].replicas = vec![ReplicaId(99)];
    assert!(resized(&elsewhere, 4, 4_000).is_ok());
}

#[test]
fn a_quarantine_that_is_in_the_way_ends_at_once_and_is_cleared_as_any_other() {
    let grown = ended(resized(&keyspace(2, 1), 4, 2_000).unwrap());
    assert_eq!(end_quarantines(&grown, 5, 3_000, 9), Ok(None), "a grow needs none to end");
    assert_eq!(end_quarantines(&grown, 0, 3_000, 9), Err(PlanError::Count(ShardCountError::Zero)));
    assert_eq!(in_the_way(&grown, 0).count(), 0);
    let next = end_quarantines(&grown, 3, 3_000, 9).unwrap().unwrap();
    assert_eq!((next.quarantines[0].until_us, next.quarantines[0].dropping), (3_000, false));
    assert_eq!(end_quarantines(&next, 3, 3_001, 9), Ok(None), "it has ended already");
    let mut reports = done(&next);
    reports.get_mut(&ReplicaId(3)).unwrap().manifest_lsn = Lsn(102);
    assert!(waits(decided(&next, &reports, 3_001)).contains("manifest"), "not before it is safe");
    let dropping = write(decided(&next, &done(&next), 3_001));
    assert!(dropping.quarantines[0].dropping);
    assert!(matches!(resized(&dropping, 3, 3_002), Err(PlanError::Quarantined { seconds: 0 })));
    let clear = write(decided(&dropping, &done(&dropping), 3_003));
    assert!(clear.quarantines.is_empty() && resized(&clear, 3, 3_004).is_ok());
    let busy = resized(&grown, 5, 3_000).unwrap();
    assert!(matches!(end_quarantines(&busy, 3, 3_000, 9), Err(PlanError::Busy(_))));
}

/// A replica that cannot be reached has not sealed: it may accept what nobody else has.
#[test]
fn nothing_commits_while_a_replica_of_a_source_has_not_sealed() {
    for (to, count) in [(2, 2), (4, 6)] {
        let sealing = until(resized(&keyspace(3, 2), to, 2_000).unwrap(), Step::Sealing);
        let (all, soon) = (done(&sealing), sealing.written_at_us + 1);
        let gives = all.iter().filter(|(_, report)| report.source.is_some());
        let givers: Vec<ReplicaId> = gives.map(|(id, _)| *id).collect();
        assert_eq!(givers.len(), count, "sources and their followers");
        for giver in givers {
            let missing = format!("replica {giver} of shard");
            let mut reports = all.clone();
            reports.get_mut(&giver).unwrap().source.as_mut().unwrap().sealed = None;
            assert!(waits(decided(&sealing, &reports, soon)).contains(&missing), "not sealed");
            reports.remove(&giver);
            assert!(waits(decided(&sealing, &reports, soon)).contains(&missing), "never heard of");
        }
        let committed = write(decided(&sealing, &all, soon));
        assert_eq!(committed.plan.unwrap().step, Step::Committed);
    }
}

#[test]
fn an_abort_at_any_step_before_the_commit_restores_everything() {
    let five = keyspace(5, 2);
    for step in [Step::Prepare, Step::Tail, Step::Sealing] {
        let at = until(resized(&five, 2, 2_000).unwrap(), step);
        let undone = abort(&at, "cancelled", &done(&at), 9_000, 9).unwrap();
        assert_eq!(undone.plan, None);
        assert_eq!((&undone.placement, undone.spec.shards), (&five.placement, 5), "{step:?}");
        assert_eq!((undone.epoch, undone.next_replica), (five.epoch, five.next_replica));
        assert!(undone.pins.is_empty() && undone.quarantines.is_empty());
        assert!(undone.retired.is_empty() && undone.removed.is_empty());
        assert_eq!(undone.discarded, [], "the survivors' archives are part of the keyspace");
        assert!(resized(&undone, 2, 9_001).is_ok());
        let gone = |node| if node == NodeId(3) { NODE_AWAY_MAX_US + 1 } else { 0 };
        let lost = super::advance(&at, &done(&at), gone, |_| u64::MAX, 9_000, 9);
        assert_eq!(write(lost).placement, five.placement, "{step:?}");
    }
    let committed = until(resized(&five, 2, 2_000).unwrap(), Step::Committed);
    assert_eq!(abort(&committed, "cancelled", &Reports::new(), 9_000, 9), None);
}

#[test]
fn a_plan_whose_placement_has_changed_is_aborted() {
    let new = Placed { replica: ReplicaId(50), node: NodeId(5) };
    type Change = fn(&mut Catalog, Placed);
    let changes: [(&str, Change); 4] = [
        ("replica 50 was placed in shard 1", |catalog, new| {
            catalog.placement[1].replicas.push(new);
        }),
        ("replica 5 is not placed in shard 2 any more", |catalog, new| {
            catalog.placement[2].replicas[0] = new;
        }),
        ("replica 2 is not placed in shard 0 any more", |catalog, _| {
            catalog.placement[0].replicas.pop();
        }),
        ("shard 2 gives keys away and has no source", |catalog, _| {
            catalog.plan.as_mut().unwrap().sources.clear();
        }),
    ];
    for (reason, change) in changes {
        for step in [Step::Prepare, Step::Tail, Step::Sealing] {
            let mut changed = until(resized(&keyspace(3, 2), 2, 2_000).unwrap(), step);
            change(&mut changed, new);
            let aborted = write(decided(&changed, &done(&changed), 3_000));
            let said = aborted.operations[0].reason.as_deref().unwrap();
            assert!(aborted.plan.is_none() && said.contains(reason), "{step:?}: {said}");
        }
    }
}

#[test]
fn retired_replicas_are_kept_until_survivors_have_shipped_and_go_without_an_answer() {
    let two = ended(resized(&keyspace(3, 2), 2, 2_000).unwrap());
    let until_us = two.quarantines[0].until_us;
    assert_eq!(decided(&two, &done(&two), until_us - 1), Advance::Idle);
    let mut reports = done(&two);
    reports.get_mut(&ReplicaId(3)).unwrap().manifest_lsn = Lsn(102);
    assert_eq!(waits(decided(&two, &reports, until_us)), "a manifest that covers the moved range");
    // The nodes of the retired replicas never answer again.
    let mut reports = done(&two);
    reports.retain(|replica, _| !two.is_retired(*replica));
    let gone = write(decided(&two, &reports, until_us));
    assert!(gone.quarantines.is_empty() && gone.retired.is_empty());
    assert_eq!(gone.removed, [ReplicaId(5), ReplicaId(6)]);
    assert!(gone.is_removed(ReplicaId(5)) && !gone.is_removed(ReplicaId(4)));
    assert_eq!(gone.node_of(ReplicaId(5)), None);
    assert_eq!(decided(&gone, &reports, until_us + 1), Advance::Idle);
}

#[test]
fn a_survivor_that_ships_in_the_place_of_another_covers_what_it_holds_from_the_commit_on() {
    let two = ended(resized(&keyspace(3, 2), 2, 2_000).unwrap());
    // The stand-in has shipped a manifest long before the shrink.
    let left = evict(&two, ReplicaId(3), true, 3_000, 9).unwrap();
    assert_eq!(left.quarantines[0].targets, [(ReplicaId(1), Lsn(101)), (ReplicaId(4), Lsn(104))]);
    let mut reports = done(&left);
    reports.get_mut(&ReplicaId(4)).unwrap().manifest_lsn = Lsn(50);
    let until_us = left.quarantines[0].until_us;
    assert!(waits(decided(&left, &reports, until_us)).contains("manifest"));
    assert!(write(decided(&left, &done(&left), until_us)).retired.is_empty());
    // Eviction concerns placed replicas.
    assert_eq!(evict(&two, ReplicaId(5), true, 3_000, 9), Err(EvictError::Retired(ReplicaId(5))));
    // A node that holds nothing else has nothing to drain.
    let only_retired = NodeDrain { accept_loss: true, ..NodeDrain::new(NodeId(4), true, 3_000) };
    assert_eq!(two.retired[1].node, NodeId(4));
    assert!(
        two.placement
            .iter()
            .flat_map(|shard| &shard.replicas)
            .all(|member| member.node != NodeId(4))
    );
    assert_eq!(drain_node(&two, only_retired, 3_000, 9), None);
}

#[test]
fn what_had_moved_to_a_retired_shard_is_covered_by_the_survivors_of_the_next_shrink() {
    let five = ended(resized(&keyspace(6, 1), 5, 2_000).unwrap());
    assert_eq!(five.quarantines[0].targets.len(), 5);
    let two = ended(resized(&five, 2, 3_000).unwrap());
    let earlier = &two.quarantines[0];
    assert_eq!(earlier.targets, [(ReplicaId(1), Lsn(101)), (ReplicaId(2), Lsn(102))]);
    // The nodes of all retired replicas are lost: both quarantines end.
    let mut reports = done(&two);
    reports.retain(|replica, _| !two.is_retired(*replica));
    let late = two.quarantines[1].until_us;
    let gone = write(decided(&two, &reports, late));
    assert!(gone.quarantines.is_empty() && gone.retired.is_empty());
    assert_eq!(gone.removed.len(), 4);
}

#[test]
fn new_shards_with_the_numbers_of_retired_ones_have_nothing_of_theirs() {
    let one = ended(resized(&keyspace(2, 1), 1, 2_000).unwrap());
    let again = ended(resized(&one, 2, 3_000).unwrap());
    assert_eq!((placed(&again), retired(&again)), (vec![1, 3], vec![(1, 2)]));
    assert_eq!(again.followers_of(ShardId(1), ReplicaId(2)), [], "nobody pulls its log");
    assert_eq!(again.sources_of(ShardId(1), ReplicaId(3)), []);
    // The bands of the grow are in quarantine on the survivor; those of the shrink are not.
    assert!(matches!(resized(&again, 1, 4_000), Err(PlanError::Quarantined { .. })));
    let mut clear = again;
    clear.quarantines.retain(|quarantine| quarantine.plan == PlanId(1));
    let last = ended(resized(&clear, 1, 4_000).unwrap());
    let expected = [(2, 1), (3, 3)].map(|(replica, plan)| RetiredReplica {
        shard: ShardId(1),
        replica: ReplicaId(replica),
        node: NodeId(2),
        plan: PlanId(plan),
    });
    assert_eq!(last.retired, expected, "each until the quarantine of its own plan ends");
}
