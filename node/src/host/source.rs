//! The part of a replica as a source of a plan: its checkpoint, its export, its release.
//!
//! **Invariants**
//! - The sources of a shrink export only under the gc floor that the plan names.
//! - A retired source is released once the bucket has its whole log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use vasto_core::ids::{Lsn, PlanId};
use vasto_core::plan::{PinnedManifest, Plan, Step};
use vasto_core::report::{PauseMs, SourceProgress};
use vasto_failpoint::points;

use super::hosted::{Hosted, Preparation};
use super::shared::{RETRY, RETRY_MAX};
use crate::build::BuildError;
use crate::build::resize::export::{Export, Exported};
use crate::replica::Pause;
use crate::ship::LogNeed;

/// Interval of polls until the replica has the floor of the plan.
const POLL: Duration = Duration::from_millis(20);

/// Number of exports that may fail because of the bucket before the plan is given up.
const EXPORTS_FAILED_MAX: u32 = 10;

impl Hosted {
    pub(super) fn reconcile_source(self: &Arc<Self>, plan: Option<&Plan>) {
        let Hosted { shared, replica, ship, .. } = &**self;
        let Some(plan) = plan else {
            shared.status.lock().source = None;
            self.end_preparation();
            ship.set_need(LogNeed::NONE);
            return;
        };
        let source = plan.sources.iter().find(|source| source.replica == replica.id);
        let ships_to_the_end = source.is_some() && plan.shrinks() && plan.step == Step::Committed;
        let told = self.background.lock().told.filter(|(id, _)| *id == plan.id);
        {
            let mut status = shared.status.lock();
            let progress = status.source_of(plan.id);
            if plan.step == Step::Prepare {
                let _ = (replica.take_pauses(), replica.take_pause()); // those of an earlier plan
            }
            if plan.step == Step::Committed && !progress.released {
                let pauses = replica.take_pauses();
                self.trace_pauses(plan.id, &pauses, told.map(|(_, at)| at));
                progress.pauses_us.extend(pauses);
                progress.released = !ships_to_the_end;
            }
        }
        let Some(source) = source else { return };
        if ships_to_the_end {
            self.ship_to_the_end(plan);
        }
        // The targets read the log from the pinned manifest on; before that exists, from anywhere.
        let pinned = source.manifest.as_ref();
        let after = pinned.map_or(Lsn(0), |manifest| manifest.lsn);
        // An added replica follows its source like any other replica; the targets of a resize read
        // the bucket.
        ship.set_need(LogNeed { after, from_bucket: plan.leaving().is_some() });
        if plan.step == Step::Prepare && (!plan.shrinks() || plan.floor.is_some()) {
            self.prepare_source(plan);
        }
    }

    /// Exports how long writes of the moving keys waited, the pause itself first, and where the pause
    /// went. `told` is when the replica heard of the decision.
    fn trace_pauses(&self, plan: PlanId, pauses_us: &[u64], told: Option<Instant>) {
        let Some(pause) = self.replica.take_pause().filter(|_| !pauses_us.is_empty()) else {
            return;
        };
        let Pause { began, sealed, released } = pause;
        let mut span = self.shared.trace(plan).began("source pause", began);
        let PauseMs { p50, p99, max } = PauseMs::of(pauses_us.to_vec());
        span.count("vasto.writes_waited", pauses_us.len() as u64 - 1);
        span.set("vasto.p50_ms", p50);
        span.set("vasto.p99_ms", p99);
        span.set("vasto.max_ms", max);
        let told = told.unwrap_or(released).clamp(sealed, released);
        let ms = |from: Instant, to: Instant| {
            to.saturating_duration_since(from).as_micros() as f64 / 1000.0
        };
        span.set("vasto.seal_ms", ms(began, sealed));
        span.set("vasto.decision_ms", ms(sealed, told));
        span.set("vasto.release_ms", ms(told, released));
        span.done_at(released);
    }

    /// Ships the log of a retired shard to its end, then releases: a restore to the last moments of
    /// the shard needs it, and nobody ships it later.
    fn ship_to_the_end(self: &Arc<Self>, plan: &Plan) {
        if self.background.lock().shipping_end.replace(plan.id) == Some(plan.id) {
            return;
        }
        let (this, id) = (self.clone(), plan.id);
        tokio::spawn(async move {
            let failed = "the last log of a retired shard is not shipped yet; it is tried again";
            if !this.until_shipped(failed, || this.ship.log()).await {
                return;
            }
            // Nothing can fail any more: an injected error is passed over.
            let _ = this.passes(points::SOURCE_SHIPPED).await;
            if let Some(source) =
                this.shared.status.lock().source.as_mut().filter(|source| source.plan == id)
            {
                source.released = true;
            }
            this.shared.notify();
        });
    }

    /// Begins the checkpoint and the export of a plan, unless that was begun already.
    fn prepare_source(self: &Arc<Self>, plan: &Plan) {
        let cancel = self.shared.cancel.child_token();
        {
            let mut background = self.background.lock();
            let now = Preparation { plan: plan.id, floor: plan.floor, cancel: cancel.clone() };
            match &background.preparing {
                Some(before) if (before.plan, before.floor) == (now.plan, now.floor) => return,
                Some(before) => before.cancel.cancel(),
                None => {}
            }
            background.preparing = Some(now);
        }
        {
            // What was made under a lower floor does not count.
            let mut status = self.shared.status.lock();
            let source = status.source_of(plan.id);
            (source.manifest, source.export) = (None, None);
            (source.bytes_total, source.bytes_done, source.rows_done) = (0, 0, 0);
        }
        let log = self.shared.trace(plan.id).log_span();
        let (this, plan) = (self.clone(), plan.clone());
        let preparing = async move {
            let Some(result) = cancel.run_until_cancelled(this.prepare(&plan, &cancel)).await
            else {
                return;
            };
            if let Some(source) =
                this.shared.status.lock().source.as_mut().filter(|source| source.plan == plan.id)
                && !cancel.is_cancelled()
            {
                match result {
                    Ok((manifest, export)) => {
                        (source.manifest, source.export) = (Some(manifest), export);
                        source.last_error = None;
                    }
                    Err(reason) => source.failed = Some(reason),
                }
            }
            this.shared.notify();
        };
        tokio::spawn(preparing.instrument(log));
    }

    /// Reports how far the export of a plan is.
    fn exported(&self, plan: PlanId, done: Exported) {
        self.progress_of(plan, |source| {
            (source.bytes_total, source.bytes_done) = (done.bytes_total, done.bytes_done);
            source.rows_done = done.rows;
        });
    }

    /// Changes the progress of a plan as its source, unless the plan has ended.
    fn progress_of(&self, plan: PlanId, change: impl FnOnce(&mut SourceProgress)) {
        if let Some(source) =
            self.shared.status.lock().source.as_mut().filter(|source| source.plan == plan)
        {
            change(source);
        }
        self.shared.notify();
    }

    /// Ends the checkpoint and the export of a plan that is over.
    fn end_preparation(&self) {
        if let Some(preparing) = self.background.lock().preparing.take() {
            preparing.cancel.cancel();
        }
    }

    /// Makes the checkpoint and the export of a plan.
    async fn prepare(
        &self,
        plan: &Plan,
        cancel: &CancellationToken,
    ) -> Result<(PinnedManifest, Option<String>), String> {
        while plan.floor.is_some_and(|floor| self.replica.floor() < floor) {
            tokio::time::sleep(POLL).await;
        }
        let bulk = self.shared.context.registry.bulk.of(self.replica.keyspace, plan.id);
        let bucket = self.shared.context.bucket.with_pacer(bulk);
        // A checkpoint that is under way goes on in a pause: the log is cut behind it.
        bucket.pass(0).await;
        // The files of the checkpoint are what the targets read, unless there is an export.
        let read = plan.leaving().filter(|_| !plan.exports());
        let trace = self.shared.trace(plan.id);
        let mut span = trace.begin("source checkpoint");
        let before = self.ship.uploaded();
        let checkpoint = self.ship.checkpoint(read).await;
        if let Ok(manifest) = &checkpoint {
            span.count("vasto.lsn", manifest.lsn.0);
        }
        let after = self.ship.uploaded();
        span.count("vasto.bytes_to_bucket", after.0 - before.0);
        span.count("vasto.objects", after.1 - before.1);
        span.end(&checkpoint);
        let manifest = checkpoint.map_err(|error| format!("the checkpoint failed: {error}"))?;
        self.passes(points::SOURCE_CHECKPOINT_MADE).await.map_err(|error| error.to_string())?;
        if !plan.exports() {
            return Ok((manifest, None));
        }
        let export = Export {
            replica: self.replica.clone(),
            bucket,
            pace: self.shared.context.pace.clone(),
            tmp: self.shared.spec.tmp.clone(),
            cancel: cancel.clone(),
            trace,
        };
        let report = |done: Exported| self.exported(plan.id, done);
        let (mut pause, mut failed) = (RETRY, 0);
        loop {
            match export.run(plan, manifest.lsn, &report).await {
                Ok(key) => return Ok((manifest, Some(key))),
                // Each upload was repeated for as long as the bucket's own patience lasts.
                Err(error @ BuildError::Bucket(_)) if failed < EXPORTS_FAILED_MAX => {
                    failed += 1;
                    tracing::warn!(%error, plan = plan.id.0, "the export is interrupted; it begins again");
                    self.progress_of(plan.id, |source| source.failed_for_now(&error));
                    self.shared.pause(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                Err(error) => return Err(format!("the export failed: {error}")),
            }
        }
    }
}
