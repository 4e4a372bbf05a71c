//! The task of a host: opens the replica, applies each catalog version, and runs periodic
//! housekeeping in between.
//!
//! **Invariant:** a version that fails is applied again until it succeeds or a newer one comes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn};
use vasto_core::report::{ReplicaPhase, ReplicationReport};

use super::hosted::Hosted;
use super::shared::{RETRY, RETRY_MAX, Shared};
use crate::clock::with_others;
use crate::replica::Replica;
use crate::replica::command::Control;
use crate::replication::replicator::Replicator;
use crate::ship::{self, ShipContext};

/// Interval of polls for state that sends no event.
const HOUSEKEEPING: Duration = Duration::from_millis(100);

/// Housekeeping interval of an idle replica.
const HOUSEKEEPING_WHILE_IDLE: Duration = Duration::from_secs(4);

/// How long a stopping node waits for the bucket to accept the last chunks.
const LAST_CHUNK_PATIENCE: Duration = Duration::from_secs(5);

/// Runs until the host is cancelled.
pub(super) async fn run(
    shared: Arc<Shared>,
    mut catalogs: watch::Receiver<Arc<Catalog>>,
    mut announced: watch::Receiver<Option<Arc<Catalog>>>,
) {
    let (replica, first) = match Box::pin(shared.open(&mut catalogs)).await {
        Ok(Some(opened)) => opened,
        Ok(None) => return,
        Err(reason) => return stay_closed(&shared, reason).await,
    };
    let mut pauses = shared.context.registry.stall.pauses();
    let (hosted, tasks) = start(shared, replica, &first).await;
    reconcile(&hosted, &mut catalogs, &mut announced, &mut pauses).await;
    tasks.end(&hosted).await;
}

/// Reports why the replica does not open, until the host is cancelled.
async fn stay_closed(shared: &Shared, reason: String) {
    let (registry, spec) = (&shared.context.registry, &shared.spec);
    tracing::error!(
        keyspace = spec.keyspace.0,
        shard = spec.shard.0,
        reason,
        "the replica does not open"
    );
    shared.status.lock().phase = Some(ReplicaPhase::Failed(reason.clone()));
    registry.set_not_open(spec.keyspace, spec.shard, Some(reason));
    shared.notify();
    shared.cancel.cancelled().await;
    registry.set_not_open(spec.keyspace, spec.shard, None);
}

/// Starts shipping and replication of a replica that was just opened, then serves it.
async fn start(shared: Arc<Shared>, replica: Replica, first: &Catalog) -> (Arc<Hosted>, Tasks) {
    let context = &shared.context;
    let shipping = CancellationToken::new();
    // While a plan makes the replica, its files go up for the plan alone.
    let uploads = context.registry.bulk.uploads_of(replica.keyspace, replica.id);
    let ship_context = ShipContext {
        replica: replica.clone(),
        bucket: context.bucket.with_pacer(uploads),
        dir: shared.spec.dir.clone(),
        tmp: shared.spec.tmp.clone(),
        engines: context.engines.clone(),
        clock: context.clock.clone(),
        interval: context.ship_interval,
        log_cap: context.log_cap,
        pace: context.pace.clone(),
    };
    let (ship, shipper) = ship::start(ship_context, shipping.clone());
    let shipper = tokio::spawn(shipper);
    let replicating = shared.cancel.child_token();
    let (registry, peers) = (context.registry.clone(), context.peers.clone());
    let replicator = Replicator::new(registry, peers, replica.clone(), replicating.clone());
    {
        let mut status = shared.status.lock();
        (status.ship, status.replicator) = (Some(ship.clone()), Some(replicator.clone()));
    }
    let hosted = Arc::new(Hosted {
        shared,
        replica,
        ship,
        replicator,
        background: Mutex::default(),
        throttle: Mutex::default(),
        filling: tokio::sync::Mutex::default(),
    });
    let Hosted { shared, replica, replicator, .. } = &*hosted;
    replicator.begin_to_catch_up(first);
    // The role is set first, so that the replica never acts as primary by mistake. The writer keeps
    // the maximum of epoch and version, so 0 changes neither. An error is ignored: a writer that
    // has ended refuses everything.
    let role = replicator.role(first);
    let _ = replica
        .control(Control::ApplyCatalog { epoch: Epoch(0), version: CatalogVersion(0), role })
        .await;
    hosted.tell_leases(first).await;
    shared.context.registry.add_replica(replica.clone());
    (hosted, Tasks { replicating, shipping, shipper })
}

/// Returns the next version that is announced before the node remembers it.
async fn announcement(announced: &mut watch::Receiver<Option<Arc<Catalog>>>) -> Arc<Catalog> {
    loop {
        if announced.changed().await.is_err() {
            // Nobody has the host any more: its task ends.
            std::future::pending::<()>().await;
        }
        let catalog = announced.borrow_and_update().clone();
        if let Some(catalog) = catalog {
            return catalog;
        }
    }
}

/// Applies each catalog version, with housekeeping in between, until the host is cancelled.
async fn reconcile(
    hosted: &Arc<Hosted>,
    catalogs: &mut watch::Receiver<Arc<Catalog>>,
    announced: &mut watch::Receiver<Option<Arc<Catalog>>>,
    pauses: &mut watch::Receiver<u64>,
) {
    let Hosted { shared, replica, replicator, .. } = &**hosted;
    let registry = &shared.context.registry;
    let (mut own, mut standing) = (replica.changes(), replica.authority().changes());
    let mut last_housekeeping = Instant::now();
    // Guard that counts the replica as active at the registry; `None` while the replica is idle.
    let mut active = Some(registry.activity());
    let mut seen = Lsn(0);
    let mut reported = ReplicationReport::default();
    let mut pause = RETRY;
    loop {
        // Each pass applies the newest version; the inner loop waits for the next one, or for the
        // retry.
        let catalog = catalogs.borrow_and_update().clone();
        let plan = catalog.plan_of(replica.id);
        let log = plan.map_or_else(Span::none, |plan| shared.trace(plan.id).log_span());
        let applied = hosted.apply_catalog(&catalog).instrument(log).await;
        let again = applied.is_err();
        if let Err(error) = applied {
            let spec = &shared.spec;
            tracing::error!(%error, keyspace = spec.keyspace.0, shard = spec.shard.0, "a version could not be applied");
        } else {
            pause = RETRY;
        }
        shared.notify();
        let retry = tokio::time::sleep(pause);
        tokio::pin!(retry);
        if again {
            pause = (pause * 2).min(RETRY_MAX);
        }
        active.get_or_insert_with(|| registry.activity());
        loop {
            let idle = active.is_none();
            // Idle replicas wake together: `with_others` rounds up to a whole second, the same for
            // all.
            let due = match idle {
                true => with_others(last_housekeeping + HOUSEKEEPING_WHILE_IDLE),
                false => last_housekeeping + HOUSEKEEPING,
            };
            tokio::select! {
                () = shared.cancel.cancelled() => break,
                _ = catalogs.changed() => break,
                heard = announcement(announced) => hosted.hear(&heard).await,
                () = &mut retry, if again => break,
                // The process stood still: peers may have taken over and acknowledged writes that
                // are not here.
                _ = pauses.changed() => replicator.begin_to_catch_up(&catalog),
                _ = own.changed(), if idle => active = Some(registry.activity()),
                _ = standing.changed(), if idle => active = Some(registry.activity()),
                () = tokio::time::sleep_until(due) => {
                    // Begins a gc floor round when one is due.
                    replicator.collect(&catalog);
                    hosted.housekeeping(&catalog, &mut reported);
                    let lsn = replica.applied_lsn();
                    let quiet = std::mem::replace(&mut seen, lsn) == lsn;
                    match quiet && hosted.is_idle(&catalog) {
                        true => active = None,
                        false => drop(active.get_or_insert_with(|| registry.activity())),
                    }
                    last_housekeeping = Instant::now();
                }
            }
        }
        if shared.cancel.is_cancelled() || catalogs.has_changed().is_err() {
            return;
        }
    }
}

/// The tasks of an open replica.
struct Tasks {
    replicating: CancellationToken,
    shipping: CancellationToken,
    shipper: JoinHandle<()>,
}

impl Tasks {
    /// Ends the tasks in order, and closes the replica: its last records go to another replica and
    /// to the bucket.
    async fn end(self, hosted: &Hosted) {
        let Hosted { shared, replica, .. } = hosted;
        let discard = shared.discard.load(Ordering::Acquire);
        if !discard {
            hosted.replicator.hand_on().await;
        }
        if let Some(leases) = &shared.context.leases {
            leases.leave(replica.keyspace, replica.shard, replica.id).await;
        }
        self.replicating.cancel();
        if let Some((_, build)) = hosted.background.lock().build.take() {
            build.cancel();
        }
        self.shipping.cancel();
        let patience = if discard { Duration::ZERO } else { LAST_CHUNK_PATIENCE };
        let stopper = self.shipper.abort_handle();
        if tokio::time::timeout(patience, self.shipper).await.is_err() {
            stopper.abort();
        }
        shared.context.registry.remove_replica(replica.keyspace, replica.id);
        replica.stop().await;
    }
}
