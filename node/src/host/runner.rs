//! The task of a host: opens the replica, applies each catalog version, and keeps house in between.
//!
//! **Invariant:** a version that fails is applied again until it succeeds or a newer one comes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, PlanId, ReplicaId};
use vasto_core::report::{ReplicaPhase, ReplicationReport, TargetProgress};

use super::status::HostStatus;
use super::target::copy_lag;
use super::{HostContext, LAST_CHUNK_PATIENCE, ReplicaSpec};
use crate::clock::with_others;
use crate::replica::Replica;
use crate::replica::authority::Standing;
use crate::replica::command::Control;
use crate::replication::replicator::Replicator;
use crate::ship::{self, ShipContext, ShipHandle};

/// First pause between attempts of work that may succeed later.
pub(super) const RETRY: Duration = Duration::from_millis(500);

/// Longest pause between attempts that keep failing: each checks the files that were downloaded before.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(15);

/// Interval of polls for state that sends no event.
pub(super) const HOUSEKEEPING: Duration = Duration::from_millis(100);

/// The same for an idle replica.
pub(super) const HOUSEKEEPING_AT_REST: Duration = Duration::from_secs(4);

pub(super) struct Runner {
    pub(super) context: Arc<HostContext>,
    pub(super) spec: ReplicaSpec,
    pub(super) status: Arc<Mutex<HostStatus>>,
    pub(super) target: Arc<Mutex<Option<Arc<Mutex<TargetProgress>>>>>,
    pub(super) ship: Arc<Mutex<Option<ShipHandle>>>,
    pub(super) replicator: Arc<Mutex<Option<Arc<Replicator>>>>,
    pub(super) cancel: CancellationToken,
    pub(super) discard: Arc<AtomicBool>,
}

/// Background work of one host, at most one task of each kind.
#[derive(Default)]
pub(super) struct Background {
    pub(super) build: Option<(PlanId, CancellationToken)>,
    pub(super) checkpoint: Option<PlanId>,
    pub(super) cleaning: BTreeSet<PlanId>,
    pub(super) covering: Option<Lsn>,
    pub(super) drained: BTreeSet<ReplicaId>,
    /// Replicas whose loss was accepted: what they have shipped since they left is read once more.
    pub(super) accepted: BTreeSet<ReplicaId>,
}

/// Returns true when the replica is idle, apart from changes that it announces itself: no request waits for peers or
/// for the bucket, no plan runs, and there is nothing to catch up.
pub(super) fn is_at_rest(catalog: &Catalog, replica: &Replica, ship: &ShipHandle) -> bool {
    catalog.plan.is_none()
        && catalog.draining.is_empty()
        && replica.is_ready()
        // The duration of acting changes all the time.
        && replica.authority().acting_ms() == 0
        && !replica.followers().has_waiting()
        && replica.bucket_acks().last().is_none()
        && !ship.positions.held_back.load(Ordering::Acquire)
}

/// Returns true for the one replica of a shard that ships, and for the target that will.
pub(super) fn ships(catalog: &Catalog, replica: &Replica) -> bool {
    match catalog.shard(replica.shard).and_then(|shard| shard.shipper()) {
        Some(shipper) => shipper.replica == replica.id,
        None => {
            let first = catalog.plan.iter().flat_map(|plan| &plan.targets).find(|one| one.shard == replica.shard);
            first.is_some_and(|one| one.replica == replica.id)
        }
    }
}

/// Stops a replica's writer and engine from a blocking thread.
pub(super) fn drop_blocking(replica: Replica) {
    tokio::runtime::Handle::current().block_on(replica.stop());
}

impl Runner {
    pub(super) async fn run(self, mut catalogs: watch::Receiver<Arc<Catalog>>) {
        let (replica, first) = match self.open(&mut catalogs).await {
            Ok(Some(opened)) => opened,
            Ok(None) => return,
            Err(reason) => {
                tracing::error!(
                    keyspace = self.spec.keyspace.0,
                    shard = self.spec.shard.0,
                    reason,
                    "the replica does not open"
                );
                self.status.lock().phase = Some(ReplicaPhase::Failed(reason.clone()));
                let (registry, spec) = (&self.context.registry, &self.spec);
                registry.set_not_open(spec.keyspace, spec.shard, Some(reason));
                registry.report.notify_one();
                self.cancel.cancelled().await;
                registry.set_not_open(spec.keyspace, spec.shard, None);
                return;
            }
        };
        let shipping = CancellationToken::new();
        let context = ShipContext {
            replica: replica.clone(),
            bucket: self.context.bucket.clone(),
            dir: self.spec.dir.clone(),
            tmp: self.spec.tmp.clone(),
            engines: self.context.engines.clone(),
            clock: self.context.clock.clone(),
            interval: self.context.ship_interval,
            log_cap: self.context.log_cap,
            pace: self.context.pace.clone(),
        };
        let (ship, shipper) = ship::start(context, shipping.clone());
        let shipper = tokio::spawn(shipper);
        *self.ship.lock() = Some(ship.clone());
        let replicating = self.cancel.child_token();
        let replicator = Replicator::new(
            self.context.registry.clone(),
            self.context.peers.clone(),
            replica.clone(),
            replicating.clone(),
        );
        *self.replicator.lock() = Some(replicator.clone());
        let mut pauses = self.context.registry.stall.pauses();
        replicator.begin_to_catch_up(&first);
        // The role is set first: the replica is never primary by mistake. A writer that has ended refuses everything.
        let role = replicator.role(&first);
        let _ = replica.control(Control::ApplyCatalog { epoch: Epoch(0), version: CatalogVersion(0), role }).await;
        self.take_seat(&replica, &replicator, &first).await;
        self.context.registry.add_replica(replica.clone());
        let this = Arc::new(self);
        let (mut own, mut standing) = (replica.changes(), replica.authority().changes());
        let mut last_housekeeping = tokio::time::Instant::now();
        // Held while the replica is not idle.
        let mut active = Some(this.context.registry.activity());
        let mut seen = Lsn(0);
        let mut reported = ReplicationReport::default();
        let background = Arc::new(Mutex::new(Background::default()));
        let mut pause = RETRY;
        loop {
            let catalog = catalogs.borrow_and_update().clone();
            let again = match this.apply_catalog(&replica, &ship, &replicator, &catalog, &background).await {
                Ok(()) => {
                    pause = RETRY;
                    false
                }
                Err(error) => {
                    tracing::error!(%error, keyspace = this.spec.keyspace.0, shard = this.spec.shard.0, "a version could not be applied");
                    pause = (pause * 2).min(RETRY_MAX);
                    true
                }
            };
            this.context.registry.report.notify_one();
            let retry = tokio::time::sleep(pause);
            tokio::pin!(retry);
            active.get_or_insert_with(|| this.context.registry.activity());
            loop {
                let rests = active.is_none();
                let due = match rests {
                    true => with_others(last_housekeeping + HOUSEKEEPING_AT_REST),
                    false => last_housekeeping + HOUSEKEEPING,
                };
                tokio::select! {
                    () = this.cancel.cancelled() => break,
                    _ = catalogs.changed() => break,
                    () = &mut retry, if again => break,
                    _ = pauses.changed() => replicator.begin_to_catch_up(&catalog),
                    _ = own.changed(), if rests => active = Some(this.context.registry.activity()),
                    _ = standing.changed(), if rests => active = Some(this.context.registry.activity()),
                    () = tokio::time::sleep_until(due) => {
                        replicator.collect(&catalog);
                        this.housekeeping(&catalog, &replica, &ship, &replicator, &mut reported);
                        let lsn = replica.applied_lsn();
                        let quiet = std::mem::replace(&mut seen, lsn) == lsn;
                        match quiet && is_at_rest(&catalog, &replica, &ship) {
                            true => active = None,
                            false => drop(active.get_or_insert_with(|| this.context.registry.activity())),
                        }
                        last_housekeeping = tokio::time::Instant::now();
                    }
                }
            }
            if this.cancel.is_cancelled() || catalogs.has_changed().is_err() {
                break;
            }
        }
        if !this.discard.load(Ordering::Acquire) {
            replicator.hand_on().await;
        }
        if let Some(leases) = this.context.registry.leases.get() {
            leases.leave(replica.keyspace, replica.shard, replica.id).await;
        }
        replicating.cancel();
        if let Some((_, build)) = background.lock().build.take() {
            build.cancel();
        }
        shipping.cancel();
        let patience = if this.discard.load(Ordering::Acquire) { Duration::ZERO } else { LAST_CHUNK_PATIENCE };
        let stopper = shipper.abort_handle();
        if tokio::time::timeout(patience, shipper).await.is_err() {
            stopper.abort();
        }
        this.context.registry.remove_replica(replica.keyspace, replica.id);
        replica.stop().await;
    }

    /// Passes the placement of the replica to the leases. A replica with peers serves nothing before they allow it.
    pub(super) async fn take_seat(&self, replica: &Replica, replicator: &Arc<Replicator>, catalog: &Catalog) {
        let Some(leases) = self.context.registry.leases.get() else { return };
        if self.context.registry.replica(replica.keyspace, replica.id).is_none() {
            replica.authority().publish(Standing::Out { elsewhere: false });
        }
        leases.seat(replica, replicator, catalog).await;
    }

    /// Polls the state that sends no event.
    pub(super) fn housekeeping(
        &self,
        catalog: &Catalog,
        replica: &Replica,
        ship: &ShipHandle,
        replicator: &Replicator,
        reported: &mut ReplicationReport,
    ) {
        if let Some(plan) = self.copy_plan(catalog)
            && let Some(progress) = &*self.target.lock()
            && let Some(lag) = copy_lag(plan, replicator)
        {
            let mut progress = progress.lock();
            if progress.plan == plan.id && progress.lag_lsns != lag {
                progress.lag_lsns = lag;
                self.context.registry.report.notify_one();
            }
        }
        replica.followers().expire();
        replica.bucket_acks().expire();
        replicator.measure();
        let over_cap = ship.positions.held_back.load(Ordering::Acquire);
        replicator.set_evict(replica.followers().last().filter(|_| over_cap).map(|(follower, _)| follower));
        let report = replicator.report();
        // The lag changes all the time; the regular reports carry it.
        let told = |report: &ReplicationReport| ReplicationReport { lag_lsns: 0, lag_ms: 0, ..report.clone() };
        if told(&report) != told(reported) {
            self.context.registry.report.notify_one();
        }
        *reported = report;
    }

    /// Decides whether this replica ships: the preferred primary does, and the acting primary while that is away.
    pub(super) fn set_shipper(&self, catalog: &Catalog, replica: &Replica, ship: &ShipHandle) {
        let home = ships(catalog, replica);
        let acts = catalog.shard(replica.shard).is_some_and(|shard| shard.primary == Some(replica.id));
        ship.positions.stands_in.store(acts && !home, Ordering::Release);
        let before = ship.positions.ships.swap(acts || home, Ordering::AcqRel);
        if before != (acts || home) {
            ship.look();
        }
    }

    pub(super) fn set_phase(&self, placed: bool) {
        self.status.lock().phase = Some(if placed { ReplicaPhase::Serving } else { ReplicaPhase::Building });
    }
}
