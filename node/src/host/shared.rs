//! State that a host shares with its tasks, above all its status, from which every report is made.
//!
//! **Invariant:** the lock of the status is taken after that of the background work and before that
//! of a progress, and is never held across an `await`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::{PlanId, ReplicaId};
use vasto_core::plan::Plan;
use vasto_core::report::{ReplicaPhase, Sealed, SourceProgress, TargetProgress};
use vasto_failpoint::{Injected, Point};
use vasto_trace::OperationTrace;

use super::{HostContext, ReplicaSpec};
use crate::replication::replicator::Replicator;
use crate::ship::ShipHandle;

/// First pause between attempts of work that may succeed later.
pub(super) const RETRY: Duration = Duration::from_millis(500);

/// Longest pause between attempts that keep failing: each checks the files that were downloaded
/// before.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(15);

/// State that a host and its tasks share.
pub(super) struct Shared {
    pub(super) context: Arc<HostContext>,
    pub(super) spec: ReplicaSpec,
    pub(super) status: Mutex<HostStatus>,
    pub(super) cancel: CancellationToken,
    /// The replica is stopped to be deleted: its last records need not reach another replica or the
    /// bucket.
    pub(super) discard: AtomicBool,
}

/// State that a host publishes for reports.
#[derive(Default)]
pub(super) struct HostStatus {
    /// `None` until the first version was applied.
    pub(super) phase: Option<ReplicaPhase>,
    /// Shipping of the replica, once it is open.
    pub(super) ship: Option<ShipHandle>,
    /// Replication of the replica, once it is open.
    pub(super) replicator: Option<Arc<Replicator>>,
    /// Progress of the running plan that takes from this replica.
    pub(super) source: Option<SourceProgress>,
    /// Progress of the running plan that makes this replica; the build writes it.
    pub(super) target: Option<Arc<Mutex<TargetProgress>>>,
    pub(super) cleaned: BTreeSet<PlanId>,
    /// Replicas that left, whose archive has been applied as far as that is possible.
    pub(super) took_from_bucket: BTreeSet<ReplicaId>,
}

impl HostStatus {
    /// Returns the progress of a plan as its source; progress of an earlier plan is dropped.
    pub(super) fn source_of(&mut self, plan: PlanId) -> &mut SourceProgress {
        let current = self.source.take().filter(|source| source.plan == plan);
        self.source.insert(current.unwrap_or_else(|| SourceProgress::new(plan)))
    }

    /// Returns the progress of a plan as its target; progress of an earlier plan is dropped.
    pub(super) fn target_of(&mut self, plan: &Plan) -> Arc<Mutex<TargetProgress>> {
        let current = self.target.take().filter(|progress| progress.lock().plan == plan.id);
        self.target
            .insert(current.unwrap_or_else(|| Arc::new(Mutex::new(TargetProgress::new(plan.id)))))
            .clone()
    }

    /// Records a complete seal. A seal of a plan that has ended meanwhile is ignored.
    pub(super) fn seal(&mut self, plan: PlanId, sealed: Sealed) {
        if let Some(source) = self.source.as_mut().filter(|source| source.plan == plan) {
            let later = source.sealed.is_some_and(|held| held.version > sealed.version);
            if !later {
                source.sealed = Some(sealed);
            }
        }
    }
}

impl Shared {
    pub(super) fn new(context: Arc<HostContext>, spec: ReplicaSpec) -> Self {
        Self {
            context,
            spec,
            status: Mutex::default(),
            cancel: CancellationToken::new(),
            discard: AtomicBool::new(false),
        }
    }

    /// Passes a failpoint.
    pub(super) async fn passes(&self, point: Point) -> Result<(), Injected> {
        vasto_failpoint::at(point, self.spec.keyspace, self.spec.replica).await
    }

    /// Returns the trace of a plan, for the spans of this replica.
    pub(super) fn trace(&self, plan: PlanId) -> OperationTrace {
        let ReplicaSpec { keyspace, shard, replica, .. } = self.spec;
        let trace = self.context.registry.trace(keyspace, plan);
        trace.with_count("vasto.shard", shard.0.into()).with_count("vasto.replica", replica.0)
    }

    /// Wakes the reporter: something that the master waits for has happened.
    pub(super) fn notify(&self) {
        self.context.registry.report.notify_one();
    }

    /// Waits before another attempt; not longer than the host lives, so that a stopped host lets go
    /// of its database.
    pub(super) async fn pause(&self, time: Duration) {
        let _ = self.cancel.run_until_cancelled(tokio::time::sleep(time)).await;
    }
}

#[cfg(test)]
mod tests {
    use vasto_core::ids::{CatalogVersion, Lsn};

    use super::*;

    #[test]
    fn a_seal_that_is_complete_after_its_plan_has_ended_changes_nothing() {
        let mut status = HostStatus::default();
        let sealed = Sealed { version: CatalogVersion(3), lsn: Lsn(9) };
        status.source_of(PlanId(1));
        status.seal(PlanId(1), sealed);
        assert_eq!(status.source_of(PlanId(1)).sealed, Some(sealed));
        status.source_of(PlanId(2)).released = true;
        status.seal(PlanId(1), sealed);
        let source = status.source_of(PlanId(2));
        assert!(source.released && source.sealed.is_none());
    }
}
