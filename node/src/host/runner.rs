//! The task of a host: opens the replica, applies each catalog version, and runs periodic housekeeping in between.
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

/// Housekeeping interval of an idle replica.
pub(super) const HOUSEKEEPING_AT_REST: Duration = Duration::from_secs(4);

/// Task of one host. The shared fields are also read by its [`Host`](super::Host).
pub(super) struct Runner {
    pub(super) context: Arc<HostContext>,
    pub(super) spec: ReplicaSpec,
    pub(super) status: Arc<Mutex<HostStatus>>,
    /// Progress of the plan that makes this replica, while one runs.
    pub(super) target: Arc<Mutex<Option<Arc<Mutex<TargetProgress>>>>>,
    pub(super) ship: Arc<Mutex<Option<ShipHandle>>>,
    pub(super) replicator: Arc<Mutex<Option<Arc<Replicator>>>>,
    pub(super) cancel: CancellationToken,
    /// The replica is stopped to be deleted: its last records need not reach another replica or the bucket.
    pub(super) discard: Arc<AtomicBool>,
}

/// Background work of one host, at most one task of each kind.
#[derive(Default)]
pub(super) struct Background {
    /// Plan whose target this replica is, and the token that cancels its build.
    pub(super) build: Option<(PlanId, CancellationToken)>,
    /// Plan for which this replica, as a source, has begun its checkpoint.
    pub(super) checkpoint: Option<PlanId>,
    /// Plans whose quarantined bands are being removed here, or have been.
    pub(super) cleaning: BTreeSet<PlanId>,
    /// LSN for which a running checkpoint is to make a manifest that covers it.
    pub(super) covering: Option<Lsn>,
    /// Draining replicas whose archive is being applied from the bucket, or has been.
    pub(super) drained: BTreeSet<ReplicaId>,
    /// Draining replicas whose loss the operator has accepted: each one's archive is applied once more.
    pub(super) accepted: BTreeSet<ReplicaId>,
}

/// Returns true when the replica needs no short housekeeping interval: no plan runs, no replica drains, no write waits
/// for peers or for the bucket, nothing is to be caught up, and no follower holds the log back. Events still wake the
/// runner: changes of the replica (ranges, epoch, version, closure, readiness) and of its authority.
pub(super) fn is_at_rest(catalog: &Catalog, replica: &Replica, ship: &ShipHandle) -> bool {
    catalog.plan.is_none()
        && catalog.draining.is_empty()
        && replica.is_ready()
        // An acting primary reports for how long it has acted, and only housekeeping reads that.
        && replica.authority().acting_ms() == 0
        && !replica.followers().has_waiting()
        && replica.bucket_acks().last().is_none()
        && !ship.positions.held_back.load(Ordering::Acquire)
}

/// Returns true for the one replica of a shard that ships while all are well: the preferred primary, or the plan's
/// first target for the shard while the shard has no placement.
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
        // The role is set first, so that the replica never acts as primary by mistake. The writer keeps the maximum of
        // epoch and version, so 0 changes neither. An error is ignored: a writer that has ended refuses everything.
        let role = replicator.role(&first);
        let _ = replica.control(Control::ApplyCatalog { epoch: Epoch(0), version: CatalogVersion(0), role }).await;
        self.take_seat(&replica, &replicator, &first).await;
        self.context.registry.add_replica(replica.clone());
        let this = Arc::new(self);
        let (mut own, mut standing) = (replica.changes(), replica.authority().changes());
        let mut last_housekeeping = tokio::time::Instant::now();
        // Guard that counts the replica as active at the registry; `None` while the replica is idle.
        let mut active = Some(this.context.registry.activity());
        let mut seen = Lsn(0);
        let mut reported = ReplicationReport::default();
        let background = Arc::new(Mutex::new(Background::default()));
        let mut pause = RETRY;
        loop {
            // Each pass applies the newest version; the inner loop waits for the next one, or for the retry.
            let catalog = catalogs.borrow_and_update().clone();
            let again = match this.apply_catalog(&replica, &ship, &replicator, &catalog, &background).await {
                Ok(()) => {
                    pause = RETRY;
                    false
                }
                Err(error) => {
                    tracing::error!(%error, keyspace = this.spec.keyspace.0, shard = this.spec.shard.0, "a version could not be applied");
                    true
                }
            };
            this.context.registry.report.notify_one();
            let retry = tokio::time::sleep(pause);
            tokio::pin!(retry);
            if again {
                pause = (pause * 2).min(RETRY_MAX);
            }
            active.get_or_insert_with(|| this.context.registry.activity());
            loop {
                let rests = active.is_none();
                // Idle replicas wake together: `with_others` rounds up to a whole second, the same for all.
                let due = match rests {
                    true => with_others(last_housekeeping + HOUSEKEEPING_AT_REST),
                    false => last_housekeeping + HOUSEKEEPING,
                };
                tokio::select! {
                    () = this.cancel.cancelled() => break,
                    _ = catalogs.changed() => break,
                    () = &mut retry, if again => break,
                    // The process stood still: peers may have taken over and acknowledged writes that are not here.
                    _ = pauses.changed() => replicator.begin_to_catch_up(&catalog),
                    _ = own.changed(), if rests => active = Some(this.context.registry.activity()),
                    _ = standing.changed(), if rests => active = Some(this.context.registry.activity()),
                    () = tokio::time::sleep_until(due) => {
                        // Begins a gc floor round when one is due.
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

    /// Passes the placement of the replica to the leases. A replica that is not registered yet is published as not
    /// serving first: with peers, it serves nothing before the leases grant it authority.
    pub(super) async fn take_seat(&self, replica: &Replica, replicator: &Arc<Replicator>, catalog: &Catalog) {
        let Some(leases) = self.context.registry.leases.get() else { return };
        if self.context.registry.replica(replica.keyspace, replica.id).is_none() {
            replica.authority().publish(Standing::Out { elsewhere: false });
        }
        leases.seat(replica, replicator, catalog).await;
    }

    /// Polls the state that sends no event: expires waiting writes, reports changes to the master, and names the
    /// follower to evict.
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
        // The log is over its cap because a follower does not read it: the follower that is furthest behind is reported
        // to the master for eviction.
        let over_cap = ship.positions.held_back.load(Ordering::Acquire);
        replicator.set_evict(replica.followers().last().filter(|_| over_cap).map(|(follower, _)| follower));
        let report = replicator.report();
        // A change of the lag alone triggers no report: it changes all the time, and the regular reports carry it.
        let told = |report: &ReplicationReport| ReplicationReport { lag_lsns: 0, lag_ms: 0, ..report.clone() };
        if told(&report) != told(reported) {
            self.context.registry.report.notify_one();
        }
        *reported = report;
    }

    /// Decides whether this replica ships: the preferred primary does (`home`), and a replica that the catalog names as
    /// primary (`acts`). An acting primary is not `home`: it ships as a substitute (`stands_in`) while the preferred
    /// primary is away. When the decision changes, the shipper checks its work at once.
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
