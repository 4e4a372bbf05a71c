//! A replica under construction: it takes its bytes from the bucket and follows its sources.
//!
//! **Invariant:** it serves nothing before it is placed; the target of a grow owns nothing until then.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::Lsn;
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::report::{TargetProgress, TargetStage};

use super::runner::{Background, RETRY, Runner};
use crate::grow::{Build, fresh_progress};
use crate::replica::Replica;
use crate::replication::replicator::Replicator;
use crate::ship::ShipHandle;

/// Returns the number of records that an added replica lacks; `None` while that is not known.
pub(super) fn copy_lag(plan: &Plan, replicator: &Replicator) -> Option<u64> {
    match plan.kind {
        // There is no live source to be behind: the log in the bucket has been read.
        PlanKind::RecoverReplica { .. } => Some(0),
        _ => plan.sources.first().and_then(|source| replicator.lag_behind(source.replica)),
    }
}

impl Runner {
    pub(super) fn reconcile_target(
        self: &Arc<Self>,
        replica: &Replica,
        ship: &ShipHandle,
        catalog: &Arc<Catalog>,
        plan: Option<&Plan>,
        placed: bool,
        background: &Arc<Mutex<Background>>,
    ) {
        let mut work = background.lock();
        if (placed || plan.is_none())
            && let Some((_, cancel)) = work.build.take()
        {
            cancel.cancel();
        }
        let Some(plan) = plan else {
            *self.target.lock() = None;
            return;
        };
        let progress = {
            let mut target = self.target.lock();
            match &*target {
                Some(progress) if progress.lock().plan == plan.id => progress.clone(),
                _ => {
                    let progress = Arc::new(Mutex::new(fresh_progress(plan)));
                    *target = Some(progress.clone());
                    progress
                }
            }
        };
        if placed {
            progress.lock().stage = TargetStage::Open;
            if matches!(plan.kind, PlanKind::Restore { .. }) {
                drop(work);
                self.cover_by_a_manifest(ship, background, Lsn(1));
            }
            return;
        }
        if plan.adds_member() {
            // The replica pulls from its peers like any other; `housekeeping` reports its lag.
            progress.lock().stage = TargetStage::Tailing;
            progress.lock().lag_lsns = u64::MAX;
            return;
        }
        if plan.step == Step::Prepare || work.build.is_some() {
            return;
        }
        let cancel = self.cancel.child_token();
        work.build = Some((plan.id, cancel.clone()));
        let (this, replica, ship, catalog, plan) =
            (self.clone(), replica.clone(), ship.clone(), catalog.clone(), plan.clone());
        tokio::spawn(async move { this.build(replica, ship, catalog, plan, progress, cancel).await });
    }

    pub(super) async fn build(
        &self,
        replica: Replica,
        ship: ShipHandle,
        catalog: Arc<Catalog>,
        plan: Plan,
        progress: Arc<Mutex<TargetProgress>>,
        cancel: CancellationToken,
    ) {
        while !cancel.is_cancelled() {
            let build = Build {
                replica: replica.clone(),
                ship: ship.clone(),
                bucket: self.context.bucket.clone(),
                registry: self.context.registry.clone(),
                tmp: self.spec.tmp.clone(),
                progress: progress.clone(),
                cancel: cancel.clone(),
            };
            let Err(error) = build.run(catalog.clone(), plan.clone()).await else { return };
            if cancel.is_cancelled() {
                return;
            }
            if error.is_transient() {
                tracing::warn!(%error, plan = plan.id.0, "building the target is interrupted; it goes on");
                tokio::time::sleep(RETRY).await;
            } else {
                tracing::error!(%error, plan = plan.id.0, "the target cannot be built");
                progress.lock().failed = Some(error.to_string());
                self.context.registry.report.notify_one();
                return;
            }
        }
    }
}
