//! One task per keyspace: the only writer of its catalog in this master.
//!
//! It is woken by reports, requests, and a tick while a plan runs; it asks the pure state machine
//! (`vasto_core::plan::advance`) what comes next and writes it, create-only.
//!
//! **Invariant:** a version is installed, and with that shown to nodes and clients, only after its
//! write is known to have won. A write whose outcome is unknown is followed by reading the tip
//! before anything else. A version that lost is thrown away, the winner's tip is adopted, and
//! the decision is made again. A `sealing` version that was slow to write is never shown: it is
//! undone, so a slow bucket does not pause writers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::{Notify, mpsc, oneshot};
use vasto_core::catalog::{Catalog, KeyspaceState, Leaving, Placed};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{Epoch, KeyspaceId, PlanId, ReplicaId};
use vasto_core::limits::SEALING_WRITE_MAX;
use vasto_core::members::{EvictError, empty_node, evict_on_request, hand_over, stay};
use vasto_core::plan::{Advance, Plan, PlanError, PlanKind, Step, abort, operation_id, start_grow};
use vasto_core::primaries::{Moves, Presence, moves_between};
use vasto_shipping::CatalogWrite;

use crate::cluster::{Cluster, nonce, now_us};
use crate::state::{Delivery, Keyspace, State};

/// How often a running plan or a due quarantine is looked at when nothing is reported.
const TICK: Duration = Duration::from_millis(100);
/// And how often a keyspace whose members are not complete: what ends that is reported, but for time.
const LOOK_INCOMPLETE: Duration = Duration::from_millis(500);
/// How often it is looked whether a deleted keyspace can be forgotten.
const LOOK_DELETED: Duration = Duration::from_secs(3_600);
/// A deleted keyspace is known for so long at least: the nodes that hold something of it are to hear of it,
/// and people to undo it.
const DELETED_KEPT_MIN: Duration = Duration::from_secs(48 * 3_600);
/// What a deleted keyspace's nodes have to hear is told for so long after it was learned.
const DELETED_TOLD_FOR: Duration = Duration::from_secs(600);
/// A sleep until a quarantine ends is cut here, so that a stepped clock is noticed.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// First and longest pause between attempts at a bucket that fails.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The tip is read again at most this often because of what nodes say.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// Lost races after which a request is given up.
const ATTEMPTS_MAX: usize = 16;

/// Why an operation was aborted that somebody cancelled.
const CANCELLED: &str = "cancelled by an administrator";

/// What a person can ask of a keyspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// More shards.
    Grow { to: u32 },
    /// Undo the running plan.
    Cancel { plan: PlanId },
    /// Have a primary hand over to another replica of its shard.
    HandOver { from: ReplicaId, to: ReplicaId },
    /// Take a replica out of its placement; with `accept_loss`, for good.
    Evict { replica: ReplicaId, accept_loss: bool },
    /// Move a node's replicas elsewhere.
    Empty(Leaving),
    /// Let a node keep the replicas that it still has: undo the operation that empties it.
    Stay { operation: String },
    /// Drop the keyspace.
    Delete,
}

/// A change and who waits for the version that makes it.
pub(crate) struct Request {
    pub(crate) change: Change,
    pub(crate) reply: oneshot::Sender<Result<Arc<Catalog>, VastoError>>,
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// It is the catalog.
    Won,
    /// It is not; the state holds the tip, so decide again.
    Overtaken,
    /// The master stops.
    Stopping,
}

/// The owner of one keyspace's catalog.
pub(crate) struct Driver {
    cluster: Arc<Cluster>,
    keyspace: KeyspaceId,
    wake: Arc<Notify>,
    requests: mpsc::Receiver<Request>,
    refreshed: Option<Instant>,
}

enum Event {
    Stop,
    Look,
    Request(Request),
}

impl Driver {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        keyspace: KeyspaceId,
        wake: Arc<Notify>,
        requests: mpsc::Receiver<Request>,
    ) -> Self {
        Self { cluster, keyspace, wake, requests, refreshed: None }
    }

    /// Runs until the master stops.
    pub(crate) async fn run(mut self) {
        loop {
            if self.refresh().await == Written::Stopping || self.drive().await == Written::Stopping {
                return;
            }
            if self.is_over() {
                return;
            }
            match self.select().await {
                Event::Stop => return,
                Event::Look => {}
                Event::Request(request) => self.change(request).await,
            }
        }
    }

    /// True when a deleted keyspace was forgotten: there is nothing to drive any more.
    fn is_over(&self) -> bool {
        let kept = self.cluster.settings.retention.keep_for.max(DELETED_KEPT_MIN);
        let kept_us = kept.as_micros() as u64;
        self.cluster.state().forget_deleted(self.keyspace, now_us(), kept_us, DELETED_TOLD_FOR)
    }

    async fn select(&mut self) -> Event {
        let look_in = {
            let state = self.cluster.state();
            let unsettled = state.is_unsettled(self.keyspace, self.cluster.mono_us());
            let incomplete = state.is_incomplete(self.keyspace);
            state.keyspaces.get(&self.keyspace).and_then(|known| match known.behind {
                true => Some(REFRESH_INTERVAL),
                false if unsettled => Some(TICK),
                false => {
                    let looks = [next_look(&known.catalog, now_us()), incomplete.then_some(LOOK_INCOMPLETE)];
                    looks.into_iter().flatten().min()
                }
            })
        };
        let look = async {
            match look_in {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.cluster.shutdown.cancelled() => Event::Stop,
            Some(request) = self.requests.recv() => Event::Request(request),
            () = self.wake.notified() => Event::Look,
            () = look => Event::Look,
        }
    }

    /// Reads the tip when a node has obeyed a version that this master does not know.
    async fn refresh(&mut self) -> Written {
        let hint = match self.cluster.state().keyspaces.get(&self.keyspace) {
            Some(known) if known.behind => known.catalog.version,
            _ => return Written::Overtaken,
        };
        if self.refreshed.is_some_and(|at| at.elapsed() < REFRESH_INTERVAL) {
            return Written::Overtaken;
        }
        self.refreshed = Some(Instant::now());
        match self.cluster.shutdown.run_until_cancelled(self.cluster.store.tip(self.keyspace, hint)).await {
            None => return Written::Stopping,
            Some(Ok(Some(tip))) if tip.version > hint => self.adopt(tip),
            Some(Ok(_)) => {
                tracing::warn!(keyspace = %self.keyspace, version = %hint, "a node claims a catalog version that is not in the bucket");
            }
            Some(Err(error)) => {
                tracing::warn!(keyspace = %self.keyspace, %error, "cannot read the catalog that a node is ahead with");
                return Written::Overtaken;
            }
        }
        if let Some(known) = self.cluster.state().keyspaces.get_mut(&self.keyspace) {
            known.behind = false;
        }
        Written::Overtaken
    }

    /// Writes what comes next until nothing does.
    async fn drive(&mut self) -> Written {
        loop {
            let (next, hold) = {
                let mut state = self.cluster.state();
                match state.decide(self.keyspace, self.cluster.mono_us(), now_us(), nonce()) {
                    Advance::Write(next) => {
                        let hold = state.hold_places(&next);
                        (next, hold)
                    }
                    Advance::Idle => {
                        self.note_waiting(&mut state, None);
                        return Written::Won;
                    }
                    Advance::Wait(what) => {
                        self.note_waiting(&mut state, Some(what));
                        return Written::Won;
                    }
                }
            };
            let held = hold.map(|hold| self.cluster.hold_places(hold));
            // Who gets something is decided by the newest word on who may.
            if held.is_some() && self.cluster.refresh_settings().await {
                continue;
            }
            if self.write(*next).await == Written::Stopping {
                return Written::Stopping;
            }
        }
    }

    fn note_waiting(&self, state: &mut State, what: Option<String>) {
        let Some(known) = state.keyspaces.get_mut(&self.keyspace).filter(|known| known.waiting_for != what) else {
            return;
        };
        if let Some(what) = &what {
            tracing::debug!(keyspace = known.catalog.name, what, "waiting for");
        }
        known.waiting_for = what;
    }

    async fn change(&mut self, request: Request) {
        for _ in 0..ATTEMPTS_MAX {
            if request.reply.is_closed() {
                return;
            }
            if matches!(request.change, Change::Grow { .. }) {
                self.cluster.refresh_settings().await;
            }
            let next = {
                let mut state = self.cluster.state();
                let Some(known) = state.keyspaces.get(&self.keyspace) else { return };
                let next = changed(&state, known, &request.change, self.cluster.mono_us(), now_us(), nonce());
                next.map(|next| {
                    let hold = state.hold_places(&next);
                    (next, hold)
                })
            };
            let (next, _held) = match next {
                Ok((next, hold)) => (next, hold.map(|hold| self.cluster.hold_places(hold))),
                Err(error) => {
                    let _ = request.reply.send(Err(error));
                    return;
                }
            };
            match self.write(next.clone()).await {
                Written::Won => {
                    let _ = request.reply.send(Ok(Arc::new(next)));
                    return;
                }
                Written::Overtaken => {}
                Written::Stopping => return,
            }
        }
        let busy = "other masters keep changing this keyspace; try again";
        let _ = request.reply.send(Err(VastoError::new(ErrorCode::Unavailable, busy)));
    }

    /// Writes a version and installs whatever is the tip afterwards. A bucket that fails is tried
    /// again until the outcome is known or the master stops.
    async fn write(&mut self, next: Catalog) -> Written {
        let started = Instant::now();
        let base = next.version;
        match self.cluster.shutdown.run_until_cancelled(self.cluster.store.write(&next)).await {
            None => Written::Stopping,
            Some(Ok(CatalogWrite::Won)) => {
                self.cluster.metrics.catalog_write("won");
                self.won(next, started.elapsed());
                Written::Won
            }
            Some(Ok(CatalogWrite::Lost(other))) => {
                self.cluster.metrics.catalog_write("lost");
                tracing::info!(
                    keyspace = next.name, version = %base, winner = %other.version,
                    "another master wrote first; going on from its version"
                );
                // The hint is what this master knows for certain; the other's may be beyond it.
                self.settle(&next, *other, started).await
            }
            Some(Err(error)) => {
                self.cluster.metrics.catalog_write("failed");
                tracing::warn!(keyspace = next.name, version = %base, %error, "a catalog write failed; reading the tip");
                self.read_tip(&next, started).await
            }
        }
    }

    /// After a lost race: the tip is at or beyond `other`.
    async fn settle(&mut self, ours: &Catalog, other: Catalog, started: Instant) -> Written {
        let hint = other.version;
        let tip = self.cluster.store.tip(self.keyspace, hint);
        match self.cluster.shutdown.run_until_cancelled(tip).await {
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

    /// The outcome of a write is unknown: reads the tip, as long as that takes.
    async fn read_tip(&mut self, ours: &Catalog, started: Instant) -> Written {
        let (mut pause, pause_max) = BACKOFF;
        let hint = self.cluster.state().keyspaces.get(&self.keyspace).map_or(ours.version, |k| k.catalog.version);
        loop {
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            if self.cluster.shutdown.run_until_cancelled(tokio::time::sleep(jittered)).await.is_none() {
                return Written::Stopping;
            }
            pause = (pause * 2).min(pause_max);
            match self.cluster.shutdown.run_until_cancelled(self.cluster.store.tip(self.keyspace, hint)).await {
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
                }
            }
        }
    }

    fn won(&self, next: Catalog, took: Duration) {
        let delivery = delivery_of(&next, took);
        log_version(&next, delivery, took);
        let before = self.cluster.state().keyspaces.get(&next.keyspace).map(|known| known.catalog.clone());
        let moves = before.map(|before| moves_between(&before, &next)).unwrap_or_default();
        if moves != Moves::default() {
            tracing::info!(
                keyspace = next.name,
                failovers = moves.failovers,
                handovers = moves.handovers,
                "primaries have changed"
            );
            self.cluster.metrics.primaries_moved(moves);
        }
        self.cluster.install(next, delivery);
    }

    fn adopt(&self, tip: Catalog) {
        let (name, version) = (tip.name.clone(), tip.version);
        if self.cluster.adopt(tip) {
            tracing::info!(keyspace = name, %version, "adopted the tip of the catalog");
        }
    }
}

/// How a version that this master wrote may be shown.
fn delivery_of(next: &Catalog, took: Duration) -> Delivery {
    let sealing = next.plan.as_ref().is_some_and(|plan| plan.step == Step::Sealing);
    if sealing && took > SEALING_WRITE_MAX { Delivery::Undo } else { Delivery::Push }
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

/// When the keyspace must be looked at although nobody reports anything.
fn next_look(catalog: &Catalog, now_us: u64) -> Option<Duration> {
    if catalog.state == KeyspaceState::Deleted {
        return Some(LOOK_DELETED);
    }
    if catalog.plan.is_some() {
        return Some(TICK);
    }
    let waits = catalog.quarantines.iter().map(|one| match one.dropping {
        true => TICK,
        false => Duration::from_micros(one.until_us.saturating_sub(now_us)).clamp(TICK, LOOK_MAX),
    });
    waits.min()
}

/// The version that makes a change.
pub(crate) fn changed(
    state: &State,
    known: &Keyspace,
    change: &Change,
    mono_us: u64,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let (catalog, reports) = (&*known.catalog, &known.reports);
    let refuse = |message: String| Err(VastoError::new(ErrorCode::FailedPrecondition, message));
    match *change {
        Change::Grow { to } => {
            let (targets, missing) = match state.grow_targets(known) {
                Ok(targets) => (targets, None),
                Err(missing) => (Vec::new(), Some(missing)),
            };
            start_grow(catalog, to, &targets, now_us, nonce).map_err(|error| match (error, missing) {
                // Who is there and gets nothing is worth knowing.
                (PlanError::NoNode(_), Some(missing)) => missing.into(),
                (error, _) => plan_error(error),
            })
        }
        Change::Cancel { plan } => {
            let id = operation_id(catalog.keyspace, plan);
            match catalog.plan.as_ref().filter(|running| running.id == plan) {
                None => Err(has_ended(&id)),
                Some(_) => abort(catalog, CANCELLED, reports, now_us, nonce).map_or_else(
                    || {
                        refuse(format!(
                            "operation {id} has changed ownership already and cannot be cancelled; it ends by itself"
                        ))
                    },
                    Ok,
                ),
            }
        }
        Change::Evict { replica, accept_loss } => {
            let serves = |one: &Placed| {
                let report = reports.get(&one.replica);
                matches!(state.presence(one.node, mono_us), Presence::Here(_))
                    && report.is_some_and(|report| report.replication.ready && !report.has_failed())
            };
            evict_on_request(catalog, replica, accept_loss, serves, now_us, nonce).map_err(|error| {
                let code = match &error {
                    EvictError::NotThere(_) | EvictError::Deleted => ErrorCode::NotFound,
                    EvictError::Last(..) | EvictError::OnlyOneServes(..) | EvictError::Busy(_) => {
                        ErrorCode::FailedPrecondition
                    }
                };
                VastoError::new(code, error.to_string())
            })
        }
        Change::HandOver { from, to } => hand_over(catalog, from, to, now_us, nonce).map_or_else(
            || refuse(format!("replica {from} cannot hand over to replica {to} now; see `vasto keyspace describe`")),
            Ok,
        ),
        Change::Empty(ref leaving) => empty_node(catalog, leaving.clone(), now_us, nonce).ok_or_else(|| {
            let message = format!("node {} has no replica of keyspace {}", leaving.node, catalog.name);
            VastoError::new(ErrorCode::NotFound, message)
        }),
        Change::Stay { ref operation } => {
            stay(catalog, operation, CANCELLED, reports, now_us, nonce).ok_or_else(|| has_ended(operation))
        }
        Change::Delete => {
            let ends = |plan: &&Plan| !matches!(plan.kind, PlanKind::Restore { .. });
            if let Some(plan) = catalog.plan.as_ref().filter(ends) {
                return Err(plan_error(PlanError::Busy(operation_id(catalog.keyspace, plan.id))));
            }
            if catalog.state == KeyspaceState::Deleted {
                return Err(plan_error(PlanError::Deleted));
            }
            let mut next = catalog.next(now_us, nonce);
            next.state = KeyspaceState::Deleted;
            next.epoch = Epoch(catalog.epoch.0 + 1);
            next.quarantines.clear();
            next.pins.clear();
            Ok(next)
        }
    }
}

pub(crate) fn has_ended(id: &str) -> VastoError {
    VastoError::new(ErrorCode::FailedPrecondition, format!("operation {id} has ended already"))
}

fn plan_error(error: PlanError) -> VastoError {
    let code = match &error {
        PlanError::Count(_) | PlanError::SameCount(_) => ErrorCode::InvalidArgument,
        PlanError::Shrink { .. } | PlanError::ManySteps { .. } | PlanError::Above64 => ErrorCode::FailedPrecondition,
        PlanError::Busy(_) | PlanError::NoNode(_) | PlanError::Unsealed(..) => ErrorCode::FailedPrecondition,
        PlanError::Deleted => ErrorCode::NotFound,
    };
    VastoError::new(code, error.to_string())
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
