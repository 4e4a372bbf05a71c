//! The write of a catalog version: a conditional put that only one master wins.
//!
//! **Invariant:** a version is installed (used here and sent to nodes and clients) only after its
//! write is known to have won. A write that lost, or whose outcome is not known, is settled by
//! reading the tip, the newest version in the bucket, for as long as that takes.

use std::error::Error;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::RngExt;
use tracing::Instrument;
use vasto_core::catalog::{Catalog, ReplicaMove};
use vasto_core::ids::{CatalogVersion, ReplicaId};
use vasto_core::operation::operation_id;
use vasto_core::plan::Step;
use vasto_core::reconcile::{LeadershipChanges, leadership_changes_between, sealing_write_max};
use vasto_failpoint::{Point, points};
use vasto_shipping::catalog::encode_catalog;
use vasto_shipping::{CatalogError, CatalogWrite};
use vasto_trace::{OpenSpan, OperationTrace};

use super::KeyspaceDriver;
use super::entry::{adopt, install, install_and_look};
use crate::state::{ClusterState, Delivery};
use crate::trace::{Ended, concerned, drain_ended};

/// First and longest pause between attempts at a bucket that fails.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The outcome of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// The version is the catalog.
    Won,
    /// Another version won; the state holds the tip, so decide again.
    Overtaken,
    /// The master stops.
    Stopping,
}

impl KeyspaceDriver {
    /// Writes a version, then installs it or the one that won instead. Retries a failing bucket
    /// until the outcome is known or the master stops.
    pub(super) async fn write(&mut self, next: Catalog) -> Written {
        let traces = self.traces_of(&next);
        let log = traces.first().map_or_else(tracing::Span::none, OperationTrace::log_span);
        Box::pin(self.write_traced(next, &traces)).instrument(log).await
    }

    /// Returns the traces of the operations that a version begins, changes or ends.
    fn traces_of(&self, next: &Catalog) -> Vec<OperationTrace> {
        let before = self.known();
        let cluster = self.cluster.cluster_id();
        let ids = concerned(before.as_deref(), next);
        ids.iter().map(|id| OperationTrace::new(&cluster, id)).collect()
    }

    /// Returns the last version that this master knows.
    fn known(&self) -> Option<Arc<Catalog>> {
        let state = self.cluster.state();
        state.keyspaces.get(&self.keyspace).map(|keyspace| keyspace.catalog.clone())
    }

    /// Returns what the last version that this master knows has waited for.
    fn waited_for(&self) -> Option<String> {
        let state = self.cluster.state();
        state.keyspaces.get(&self.keyspace)?.waiting_for.clone()
    }

    async fn write_traced(&mut self, next: Catalog, traces: &[OperationTrace]) -> Written {
        let started = Instant::now();
        let version = next.version;
        let body = encode_catalog(&next);
        let spans = begin_put(&next, body.len() as u64, traces);
        let put = self.cluster.shutdown.run_until_cancelled(self.put(&next, body)).await;
        end_put(spans, put.as_ref());
        match put {
            None => Written::Stopping,
            Some(Ok(CatalogWrite::Won)) => {
                self.cluster.metrics.catalog_write("won");
                self.cluster.state().note_write(started.elapsed());
                self.won(next, started.elapsed());
                Written::Won
            }
            Some(Ok(CatalogWrite::Lost(other))) => {
                self.cluster.metrics.catalog_write("lost");
                tracing::info!(
                    keyspace = next.name, %version, winner = %other.version,
                    "another master wrote first, or a node undid a seal; going on from that version"
                );
                // The hint is a version that this master knows for certain; the tip may be higher.
                self.settle(&next, *other, started).await
            }
            Some(Err(error)) => {
                self.cluster.metrics.catalog_write("failed");
                tracing::warn!(keyspace = next.name, %version, %error, "a catalog write failed; reading the tip");
                self.read_tip(&next, started).await
            }
        }
    }

    /// Puts a version into the bucket, between the failpoints of its step.
    async fn put(
        &self,
        next: &Catalog,
        body: Bytes,
    ) -> Result<CatalogWrite, Box<dyn Error + Send + Sync>> {
        let known = self.known();
        let (before, after) = failpoints_of(known.as_deref(), next);
        vasto_failpoint::at(before, next.keyspace, ReplicaId(0)).await?;
        let written = self.cluster.store.write_body(next, body).await?;
        vasto_failpoint::at(after, next.keyspace, ReplicaId(0)).await?;
        Ok(written)
    }

    /// Settles a lost race: the tip is at or beyond `other`.
    async fn settle(&mut self, ours: &Catalog, other: Catalog, started: Instant) -> Written {
        let hint = other.version;
        match self.tip(hint).await {
            None => Written::Stopping,
            Some(Ok(tip)) => {
                self.adopt(tip.filter(|tip| tip.version >= hint).unwrap_or(other));
                Written::Overtaken
            }
            Some(Err(error)) => {
                tracing::warn!(keyspace = ours.name, %error, "cannot read the tip of the catalog");
                self.read_tip(ours, started).await
            }
        }
    }

    /// Reads the tip after a write with an unknown outcome, for as long as that takes.
    async fn read_tip(&mut self, ours: &Catalog, started: Instant) -> Written {
        let (mut pause, pause_max) = BACKOFF;
        let hint = self
            .cluster
            .state()
            .keyspaces
            .get(&self.keyspace)
            .map_or(ours.version, |keyspace| keyspace.catalog.version);
        loop {
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            if self
                .cluster
                .shutdown
                .run_until_cancelled(tokio::time::sleep(jittered))
                .await
                .is_none()
            {
                return Written::Stopping;
            }
            pause = (pause * 2).min(pause_max);
            match self.tip(hint).await {
                None => return Written::Stopping,
                Some(Ok(Some(tip))) if tip.version == ours.version && tip.nonce == ours.nonce => {
                    self.won(tip, started.elapsed());
                    return Written::Won;
                }
                Some(Ok(Some(tip))) => {
                    self.adopt(tip);
                    return Written::Overtaken;
                }
                Some(Ok(None)) => {
                    tracing::warn!(
                        keyspace = ours.name,
                        "the bucket has no catalog of this keyspace; was its prefix deleted?"
                    );
                }
                Some(Err(error)) => {
                    tracing::warn!(keyspace = ours.name, %error, "cannot read the tip of the catalog; trying again");
                    let what = format!("the bucket to answer about the catalog: {error}");
                    self.note_waiting(&mut self.cluster.state(), Some(what));
                }
            }
        }
    }

    /// Reads the tip at or beyond `hint`; `None` when the master stops.
    pub(super) async fn tip(
        &self,
        hint: CatalogVersion,
    ) -> Option<Result<Option<Catalog>, CatalogError>> {
        let tip = self.cluster.store.tip(self.keyspace, hint);
        self.cluster.shutdown.run_until_cancelled(tip).await
    }

    fn won(&mut self, next: Catalog, took: Duration) {
        let delivery = delivery_of(&next, took);
        log_version(&next, delivery, took);
        let before = self.known();
        let ended = before.as_ref().map(|before| self.steps.follow(before, &next));
        let mut ended = ended.unwrap_or_default();
        if let Some(what) = self.waited_for() {
            ended.iter_mut().for_each(|one| one.note_waiting(&what));
        }
        let changes =
            before.map(|before| leadership_changes_between(&before, &next)).unwrap_or_default();
        if changes != LeadershipChanges::default() {
            tracing::info!(
                keyspace = next.name,
                failovers = changes.failovers,
                handovers = changes.handovers,
                "primaries have changed"
            );
            self.cluster.metrics.primaries_moved(changes);
        }
        if !vasto_trace::is_enabled() {
            install(&self.cluster, next, delivery);
            return;
        }
        let (_, wholes) =
            install_and_look(&self.cluster, next, delivery, |state| drains_ended(state, &ended));
        let cluster = self.cluster.cluster_id();
        ended.into_iter().chain(wholes).for_each(|one| one.export(&cluster));
    }

    pub(super) fn adopt(&self, tip: Catalog) {
        let (name, version) = (tip.name.clone(), tip.version);
        if adopt(&self.cluster, tip) {
            tracing::info!(keyspace = name, %version, "adopted the tip of the catalog");
        }
    }
}

/// Returns the root spans of the drains of which the last keyspace is among what has ended.
fn drains_ended(state: &ClusterState, ended: &[Ended]) -> Vec<Ended> {
    let whole = |one: &Ended| match one {
        Ended::Drain(id, _) => drain_ended(state, id),
        Ended::Step(..) | Ended::Whole(..) => None,
    };
    ended.iter().filter_map(whole).collect()
}

/// Begins the spans of the write of a version, of so many bytes, one for each operation that it
/// concerns.
fn begin_put(next: &Catalog, bytes: u64, traces: &[OperationTrace]) -> Vec<OpenSpan> {
    let begin = |trace: &OperationTrace| {
        let mut span = trace.begin("bucket put");
        span.set("vasto.what", "catalog version");
        span.set("vasto.keyspace", next.name.clone());
        span.count("vasto.version", next.version.0);
        span.count("vasto.bytes_to_bucket", bytes);
        span
    };
    traces.iter().filter(|_| vasto_trace::is_enabled()).map(begin).collect()
}

/// Ends these spans. A write that is cut off when the master stops cuts them off, too.
fn end_put<E: Display>(spans: Vec<OpenSpan>, put: Option<&Result<CatalogWrite, E>>) {
    let Some(put) = put else { return };
    for mut span in spans {
        if let Ok(outcome) = put {
            let won = matches!(outcome, CatalogWrite::Won);
            span.set("vasto.outcome", if won { "won" } else { "lost" });
        }
        span.end(put);
    }
}

/// Returns the failpoints before and after the write of a version that follows `known`.
pub(super) fn failpoints_of(known: Option<&Catalog>, next: &Catalog) -> (Point, Point) {
    let of_plan = next.plan.as_ref().map(|plan| plan.step);
    match of_plan.or_else(|| step_of_moves(known?, next)) {
        Some(Step::Prepare) => (points::MASTER_PREPARE_BEFORE, points::MASTER_PREPARE_AFTER),
        Some(Step::Tail) => (points::MASTER_TAIL_BEFORE, points::MASTER_TAIL_AFTER),
        Some(Step::Sealing) => (points::MASTER_SEALING_BEFORE, points::MASTER_SEALING_AFTER),
        Some(Step::Committed) => (points::MASTER_COMMITTED_BEFORE, points::MASTER_COMMITTED_AFTER),
        None if next.quarantines.iter().any(|quarantine| quarantine.dropping) => {
            (points::MASTER_DROPPING_BEFORE, points::MASTER_DROPPING_AFTER)
        }
        None => (points::MASTER_REST_BEFORE, points::MASTER_REST_AFTER),
    }
}

/// Returns the step that a version brings the plan of a replica's move to; `None` when it leaves all
/// of them as they are, or ends one.
fn step_of_moves(known: &Catalog, next: &Catalog) -> Option<Step> {
    let is_known = |moving: &ReplicaMove| {
        let mut all = known.moves.iter();
        all.any(|other| other.id() == moving.id() && other.plan.step == moving.plan.step)
    };
    next.moves.iter().find(|moving| !is_known(moving)).map(|moving| moving.plan.step)
}

/// Returns how a version that this master wrote is delivered: one that seals and took too long to
/// write is undone instead, since writes would wait for longer than was promised.
pub(super) fn delivery_of(next: &Catalog, took: Duration) -> Delivery {
    let sealing = next.plan.as_ref().filter(|plan| plan.step == Step::Sealing);
    match sealing {
        Some(plan) if took > sealing_write_max(plan.seals_undone) => Delivery::Undo,
        Some(_) | None => Delivery::Push,
    }
}

fn log_version(next: &Catalog, delivery: Delivery, took: Duration) {
    let took_ms = took.as_millis() as u64;
    match &next.plan {
        Some(plan) => tracing::info!(
            keyspace = next.name, version = %next.version, epoch = %next.epoch,
            operation = operation_id(next.keyspace, plan.id), step = ?plan.step, took_ms,
            "{}",
            if delivery == Delivery::Undo { "the bucket was too slow to seal; undoing" } else { "plan goes on" }
        ),
        None => tracing::info!(
            keyspace = next.name, version = %next.version, epoch = %next.epoch, took_ms, "wrote a catalog version"
        ),
    }
}
