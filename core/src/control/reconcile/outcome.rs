//! The end of a plan: the operation report that its last version carries, and the undoing of it.
//!
//! **Invariant:** a plan that has committed is not aborted.

use super::progress::{failed_at, source_progress, target_progress};
use crate::catalog::{Catalog, KeyspaceState};
use crate::control::operation::{OperationOutcome, OperationReport, Reached, operation_id};
use crate::control::plan::{Plan, PlanKind, Step};
use crate::control::report::{PauseMs, Reports, TargetProgress};
use crate::ids::Epoch;

/// Returns the version that undoes a plan that has not committed.
pub fn abort(
    catalog: &Catalog,
    reason: &str,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let plan = catalog.plan.as_ref().filter(|plan| plan.step != Step::Committed)?;
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.pins.clear();
    next.remember(report_of(
        catalog,
        plan,
        reports,
        OperationOutcome::Aborted,
        Some(reason.to_owned()),
        now_us,
    ));
    if matches!(plan.kind, PlanKind::Grow { .. }) {
        // The targets' stale versions of rows of other shards must not come back with a restore.
        next.discarded.extend(plan.targets.iter().map(|target| target.replica));
    }
    if matches!(plan.kind, PlanKind::Restore { .. }) {
        // A partial keyspace must never be taken for a whole one.
        next.state = KeyspaceState::Deleted;
        next.epoch = Epoch(catalog.epoch.0 + 1);
    }
    Some(next)
}

/// Returns the figures of a plan so far.
pub fn report_of(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    outcome: OperationOutcome,
    reason: Option<String>,
    now_us: u64,
) -> OperationReport {
    let (from, to) = plan.resize().unwrap_or((catalog.spec.shards, catalog.spec.shards));
    let targets: Vec<&TargetProgress> = plan
        .targets
        .iter()
        .filter_map(|target| target_progress(plan, target.replica, reports))
        .collect();
    let sum =
        |field: fn(&TargetProgress) -> u64| targets.iter().map(|progress| field(progress)).sum();
    let pauses = plan
        .sources
        .iter()
        .filter_map(|source| source_progress(plan, source.replica, reports))
        .flat_map(|progress| progress.pauses_us.iter().copied())
        .collect();
    OperationReport {
        id: operation_id(catalog.keyspace, plan.id),
        kind: plan.kind.into(),
        keyspace: catalog.name.clone(),
        from,
        to,
        outcome,
        reason,
        keys_moved: sum(|progress| progress.keys_moved),
        bytes_moved: sum(|progress| progress.bytes_moved),
        bytes_from_bucket: sum(|progress| progress.bytes_from_bucket),
        bytes_from_peers: sum(|progress| progress.bytes_from_peers),
        objects_read: sum(|progress| progress.objects_read),
        write_pause_ms: PauseMs::of(pauses),
        duration_ms: now_us.saturating_sub(plan.started_at_us) / 1000,
        started_at_us: plan.started_at_us,
        reached: plan
            .targets
            .iter()
            .filter_map(|target| {
                Some((target.shard, target_progress(plan, target.replica, reports)?))
            })
            .flat_map(|(shard, progress)| {
                progress.reached.iter().map(move |reached| (shard, *reached))
            })
            .map(|(shard, (replica, lsn))| Reached { shard, replica, lsn })
            .collect(),
        copies: 0,
        shard: match plan.kind {
            PlanKind::AddReplica { shard } | PlanKind::RecoverReplica { shard } => Some(shard),
            PlanKind::Grow { .. } | PlanKind::Shrink { .. } | PlanKind::Restore { .. } => None,
        },
        failed_on: plan
            .targets
            .iter()
            .filter(|target| {
                outcome == OperationOutcome::Aborted && failed_at(plan, target, reports)
            })
            .map(|target| target.node)
            .collect(),
        estimate: plan.estimate.clone(),
    }
}
