//! A replica under construction: it takes its bytes from the bucket and follows its sources.
//!
//! **Invariant:** it serves nothing before it is placed; the target of a grow owns nothing until
//! then, the target of a shrink nothing of what arrives before the commit.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use vasto_core::ids::Lsn;
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::report::{TargetProgress, TargetStage};

use super::hosted::Hosted;
use super::shared::RETRY;
use crate::build::resize::Build;
use crate::target_trace::TargetTrace;

impl Hosted {
    pub(super) fn reconcile_target(self: &Arc<Self>, plan: Option<&Plan>, placed: bool) {
        // A replica that receives more bands in a shrink is placed all the time.
        let open =
            placed && plan.is_none_or(|plan| !plan.shrinks() || plan.step == Step::Committed);
        let mut work = self.background.lock();
        if open || plan.is_none() {
            if let Some((_, cancel)) = work.build.take() {
                cancel.cancel();
            }
            // Dropped, and with that cut off, when the plan was undone.
            if let Some((_, Some(span))) = work.catching_up.take()
                && open
            {
                span.done();
            }
        }
        let Some(plan) = plan else {
            self.shared.status.lock().target = None;
            return;
        };
        let progress = self.shared.status.lock().target_of(plan);
        if open {
            progress.lock().stage = TargetStage::Open;
            if matches!(plan.kind, PlanKind::Restore { .. }) {
                drop(work);
                self.cover_by_a_manifest(Lsn(1));
            }
            return;
        }
        if plan.adds_member() {
            // The replica pulls from its peers like any other; `housekeeping` reports its lag.
            progress.lock().stage = TargetStage::Tailing;
            progress.lock().lag_lsns = u64::MAX;
            if work.catching_up.as_ref().is_none_or(|(id, _)| *id != plan.id) {
                let span = self.shared.trace(plan.id).begin("target catch up");
                work.catching_up = Some((plan.id, Some(span)));
            }
            return;
        }
        // A replica may be the target of one plan after the other.
        if let Some((_, cancel)) = work.build.take_if(|(id, _)| *id != plan.id) {
            cancel.cancel();
        }
        if plan.step == Step::Prepare || work.build.is_some() {
            return;
        }
        let cancel = self.shared.cancel.child_token();
        work.build = Some((plan.id, cancel.clone()));
        let log = self.shared.trace(plan.id).log_span();
        let (this, plan) = (self.clone(), plan.clone());
        let building = async move {
            this.build(plan, progress, cancel).await;
            // The plan may have been undone while bands began to arrive.
            this.reconcile_arrivals();
        };
        tokio::spawn(building.instrument(log));
    }

    async fn build(
        self: &Arc<Self>,
        plan: Plan,
        progress: Arc<Mutex<TargetProgress>>,
        cancel: CancellationToken,
    ) {
        let bulk = self.shared.context.registry.bulk.of(self.replica.keyspace, plan.id);
        // One for all attempts: however often the bucket fails, few spans tell of it.
        let trace = TargetTrace::new(self.shared.trace(plan.id), progress.clone());
        while !cancel.is_cancelled() {
            let build = Build {
                replica: self.replica.clone(),
                ship: self.ship.clone(),
                bucket: self.shared.context.bucket.with_pacer(bulk.clone()),
                registry: self.shared.context.registry.clone(),
                tmp: self.shared.spec.tmp.clone(),
                progress: progress.clone(),
                cancel: cancel.clone(),
                trace: trace.clone(),
            };
            let built = match self.make_room(&plan, &cancel).await {
                Ok(()) => build.run(plan.clone()).await,
                Err(error) => Err(error),
            };
            let Err(error) = built else { return };
            if cancel.is_cancelled() {
                return;
            }
            if error.is_transient() {
                tracing::warn!(%error, plan = plan.id.0, "building the target is interrupted; it goes on");
                progress.lock().failed_for_now(&error);
                self.shared.notify();
                let _ = cancel.run_until_cancelled(tokio::time::sleep(RETRY)).await;
            } else {
                tracing::error!(%error, plan = plan.id.0, "the target cannot be built");
                progress.lock().failed = Some(error.to_string());
                self.shared.notify();
                return;
            }
        }
    }
}
