//! One task per keyspace: the only writer of its catalog in this master.
//!
//! Reports, requests, and a tick while a plan runs wake the task; it asks the pure state machine
//! (`vasto_core::reconcile::advance`) for the next version and writes it, create-only.
//!
//! **Invariant:** a version is installed, and with that shown to nodes and clients, only after its
//! write is known to have won. After a write with an unknown outcome the driver reads the tip
//! before anything else. A version that lost is discarded, the winner's tip is adopted, and
//! the decision is made again. A `sealing` version that was slow to write is never shown: it is
//! undone, so a slow bucket does not pause writers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::{Notify, mpsc, oneshot};
use vasto_core::catalog::{Catalog, KeyspaceState, NodeDrain, Placed};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{Epoch, KeyspaceId, PlanId, ReplicaId};
use vasto_core::limits::SEALING_WRITE_MAX;
use vasto_core::operation::operation_id;
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::reconcile::{
    Advance, EvictError, LeadershipChanges, PlanError, Presence, abort, cancel_drain, drain_node, evict_on_request,
    leadership_changes_between, start_grow, transfer_leadership,
};
use vasto_shipping::CatalogWrite;

use crate::cluster::{Cluster, nonce, now_us};
use crate::state::{ClusterState, Delivery, Keyspace};

/// The interval at which a running plan or a due quarantine is checked when nothing is reported.
const TICK: Duration = Duration::from_millis(100);
/// The same for a keyspace that lacks members: all that ends this state is reported, except the passing of time.
const LOOK_INCOMPLETE: Duration = Duration::from_millis(500);
/// The interval at which a deleted keyspace is checked for whether it can be forgotten.
const LOOK_DELETED: Duration = Duration::from_secs(3_600);
/// The shortest time that a deleted keyspace is known: nodes that hold replicas of it must learn of the deletion,
/// and people must be able to undo it.
const DELETED_KEPT_MIN: Duration = Duration::from_secs(48 * 3_600);
/// How long the deletion of a keyspace is sent to nodes after this master learned of it.
const DELETED_TOLD_FOR: Duration = Duration::from_secs(600);
/// The longest sleep until a quarantine ends, so that a stepped clock is noticed.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// First and longest pause between attempts at a bucket that fails.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The shortest interval between reads of the tip that reports of nodes cause.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// The most lost races before a request is given up.
const ATTEMPTS_MAX: usize = 16;

/// The reason of an operation that an administrator cancelled.
const CANCELLED: &str = "cancelled by an administrator";

/// A change that an administrator can request of a keyspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CatalogChange {
    /// Add shards.
    Grow { to: u32 },
    /// Undo the running plan.
    Cancel { plan: PlanId },
    /// Transfer leadership to another replica of the shard.
    TransferLeadership { from: ReplicaId, to: ReplicaId },
    /// Evict a replica from its placement; with `accept_loss`, for good.
    Evict { replica: ReplicaId, accept_loss: bool },
    /// Move a node's replicas elsewhere.
    DrainNode(NodeDrain),
    /// Cancel the operation that drains a node: the node keeps the replicas that it still has.
    Stay { operation: String },
    /// Drop the keyspace.
    Delete,
}

/// A change, and the channel that waits for its version.
pub(crate) struct Request {
    pub(crate) change: CatalogChange,
    pub(crate) reply: oneshot::Sender<Result<Arc<Catalog>, VastoError>>,
}

/// The outcome of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// The version is the catalog.
    Won,
    /// Another version won; the state holds the tip, so decide again.
    Overtaken,
    /// The master stops.
    Stopping,
}

/// The driver of one keyspace, which owns its catalog.
pub(crate) struct KeyspaceDriver {
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

impl KeyspaceDriver {
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

    /// Returns true when a deleted keyspace was forgotten: there is nothing to drive any more.
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

    /// Reads the tip when a node has applied a version that this master does not know.
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

    /// Writes the next version until there is none.
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
            // The newest settings decide which nodes may get a replica.
            if held.is_some() && self.cluster.refresh_settings().await {
                continue;
            }
            if self.write(*next).await == Written::Stopping {
                return Written::Stopping;
            }
        }
    }

    fn note_waiting(&self, state: &mut ClusterState, what: Option<String>) {
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
            if matches!(request.change, CatalogChange::Grow { .. }) {
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

    /// Writes a version and installs the tip of afterwards. Retries a failing bucket until the outcome is
    /// known or the master stops.
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
                // The hint is a version that this master knows for certain; the tip may be higher.
                self.settle(&next, *other, started).await
            }
            Some(Err(error)) => {
                self.cluster.metrics.catalog_write("failed");
                tracing::warn!(keyspace = next.name, version = %base, %error, "a catalog write failed; reading the tip");
                self.read_tip(&next, started).await
            }
        }
    }

    /// Settles a lost race: the tip is at or beyond `other`.
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

    /// Reads the tip after a write with an unknown outcome, for as long as that takes.
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
        let changes = before.map(|before| leadership_changes_between(&before, &next)).unwrap_or_default();
        if changes != LeadershipChanges::default() {
            tracing::info!(
                keyspace = next.name,
                failovers = changes.failovers,
                handovers = changes.handovers,
                "primaries have changed"
            );
            self.cluster.metrics.primaries_moved(changes);
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

/// Returns how a version that this master wrote may be shown.
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

/// Returns when the keyspace must be checked although nothing is reported.
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

/// Returns the version that makes a change.
pub(crate) fn changed(
    state: &ClusterState,
    known: &Keyspace,
    change: &CatalogChange,
    mono_us: u64,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let (catalog, reports) = (&*known.catalog, &known.reports);
    let refuse = |message: String| Err(VastoError::new(ErrorCode::FailedPrecondition, message));
    match *change {
        CatalogChange::Grow { to } => {
            let (targets, missing) = match state.grow_targets(known) {
                Ok(targets) => (targets, None),
                Err(missing) => (Vec::new(), Some(missing)),
            };
            start_grow(catalog, to, &targets, now_us, nonce).map_err(|error| match (error, missing) {
                // The error names live nodes that get no replica.
                (PlanError::NoNode(_), Some(missing)) => missing.into(),
                (error, _) => plan_error(error),
            })
        }
        CatalogChange::Cancel { plan } => {
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
        CatalogChange::Evict { replica, accept_loss } => {
            let serves = |one: &Placed| {
                let report = reports.get(&one.replica);
                matches!(state.presence(one.node, mono_us), Presence::Here(_))
                    && report.is_some_and(|report| report.replication.ready && !report.has_failed())
            };
            evict_on_request(catalog, replica, accept_loss, serves, now_us, nonce).map_err(|error| {
                let code = match &error {
                    EvictError::NotThere(_) | EvictError::Deleted => ErrorCode::NotFound,
                    EvictError::Draining(_)
                    | EvictError::Last(..)
                    | EvictError::OnlyOneServes(..)
                    | EvictError::Busy(_) => ErrorCode::FailedPrecondition,
                };
                VastoError::new(code, error.to_string())
            })
        }
        CatalogChange::TransferLeadership { from, to } => transfer_leadership(catalog, from, to, now_us, nonce)
            .map_or_else(
                || {
                    refuse(format!(
                        "replica {from} cannot hand over to replica {to} now; see `vasto keyspace describe`"
                    ))
                },
                Ok,
            ),
        CatalogChange::DrainNode(ref drain) => drain_node(catalog, drain.clone(), now_us, nonce).ok_or_else(|| {
            let message = format!("node {} has no replica of keyspace {}", drain.node, catalog.name);
            VastoError::new(ErrorCode::NotFound, message)
        }),
        CatalogChange::Stay { ref operation } => {
            cancel_drain(catalog, operation, CANCELLED, reports, now_us, nonce).ok_or_else(|| has_ended(operation))
        }
        CatalogChange::Delete => {
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
        PlanError::Busy(_) | PlanError::NoNode(_) | PlanError::DrainingReplica(..) => ErrorCode::FailedPrecondition,
        PlanError::Deleted => ErrorCode::NotFound,
    };
    VastoError::new(code, error.to_string())
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
