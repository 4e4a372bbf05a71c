//! Plans that make one replica, or one keyspace, from the bucket: add replica, recover replica,
//! restore.
//!
//! **Invariant:** a plan that waits for a replica that does not return is aborted, not committed.

use super::commit::commit;
use super::outcome::{abort, report_of};
use super::progress::{Advance, Running, target_progress};
use crate::catalog::Catalog;
use crate::control::operation::OperationOutcome;
use crate::control::plan::Target;
use crate::control::report::{ReplicaPhase, Reports, TargetProgress, TargetStage};
use crate::ids::NodeId;
use crate::limits::{TAIL_LAG_LSNS_MAX, TARGET_SILENT_MAX};

/// Advances a plan that adds a member. Such a plan has no seal: the target is placed once it
/// follows the others closely.
pub(super) fn advance_copy(running: Running<'_>, here_us: impl Fn(NodeId) -> u64) -> Advance {
    for target in &running.plan.targets {
        let progress = match begun(running, target, "copy", &here_us) {
            Ok(progress) => progress,
            Err(decision) => return decision,
        };
        if progress.stage != TargetStage::Tailing || progress.lag_lsns > TAIL_LAG_LSNS_MAX {
            return Advance::Wait(format!("the copy of shard {} to catch up", target.shard));
        }
    }
    Advance::Write(Box::new(commit(running)))
}

/// Returns the progress of a target (`role` names it in texts), or the decision while it has not
/// begun.
///
/// A target is not waited for without limit: a node that is there and begins nothing cannot, since
/// its disk may not even take the version. The silence of a node that has only just come back, or
/// opens the replica, does not count yet.
pub(super) fn begun<'a>(
    running: Running<'a>,
    target: &Target,
    role: &str,
    here_us: impl Fn(NodeId) -> u64,
) -> Result<&'a TargetProgress, Advance> {
    let Running { catalog, plan, reports, now_us, nonce, .. } = running;
    if let Some(progress) = target_progress(plan, target.replica, reports) {
        return Ok(progress);
    }
    let wait = Advance::Wait(format!("the {role} on {}", target.node));
    let opens =
        reports.get(&target.replica).is_some_and(|report| report.phase == ReplicaPhase::Opening);
    let silent_us = now_us.saturating_sub(catalog.written_at_us).min(here_us(target.node));
    if opens || silent_us <= TARGET_SILENT_MAX.as_micros() as u64 {
        return Err(wait);
    }
    let reason = format!(
        "{} has not begun within {} s; its log says why",
        target.node,
        TARGET_SILENT_MAX.as_secs()
    );
    let next = give_up_on(catalog, &reason, target.node, reports, now_us, nonce);
    Err(next.map_or(wait, |next| Advance::Write(Box::new(next))))
}

/// Aborts as [`abort`] does, because of one node: the next attempt is made elsewhere, if possible.
pub fn give_up_on(
    catalog: &Catalog,
    reason: &str,
    node: NodeId,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let mut next = abort(catalog, reason, reports, now_us, nonce)?;
    if let Some(report) = next.operations.last_mut() {
        report.failed_on = vec![node];
    }
    Some(next)
}

/// Advances a restore, which is done when every shard is open and has a checkpoint of its own in
/// the bucket: until then garbage collection keeps all of the source keyspace, whose objects these
/// checkpoints name.
pub(super) fn advance_restore(running: Running<'_>) -> Advance {
    let Running { catalog, plan, reports, now_us, nonce, .. } = running;
    for target in &plan.targets {
        let Some(progress) = target_progress(plan, target.replica, reports) else {
            return Advance::Wait(format!("shard {} to be restored", target.shard));
        };
        if progress.stage != TargetStage::Open {
            return Advance::Wait(format!("shard {} to be restored", target.shard));
        }
        if !progress.manifest_shipped {
            return Advance::Wait(format!("the first manifest of shard {}", target.shard));
        }
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.remember(report_of(catalog, plan, reports, OperationOutcome::Done, None, now_us));
    Advance::Write(Box::new(next))
}
