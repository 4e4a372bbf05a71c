//! One hosted replica: opens it, reconciles it with the catalog, reports on it.
//!
//! **Invariants**
//! - Level-triggered: every action depends on the newest catalog version and the replica's own
//!   durable state, never on which messages arrived. Repeating an action changes nothing.
//! - No action follows a version lower than one already applied.
//! - Data is removed only under a version that names it (`dropping`), after the range state records
//!   that the range was given away.

mod cleanup;
mod drain;
mod open;
mod reconcile;
mod runner;
mod status;
mod target;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_core::report::TargetProgress;
use vasto_shipping::bucket::Bucket;

#[cfg(test)]
pub(crate) use self::cleanup::clean_up;
#[cfg(test)]
pub(crate) use self::open::open_or_begin_again;
use self::runner::Runner;
use self::status::{HostStatus, KnownSize};
use crate::clock::SharedClock;
use crate::engine::EngineShared;
use crate::registry::NodeRegistry;
use crate::replication::peers::Peers;
use crate::replication::replicator::Replicator;
use crate::ship::{Pace, ShipHandle};

/// How long a stopping node waits for the bucket to accept the last chunks.
pub(super) const LAST_CHUNK_PATIENCE: Duration = Duration::from_secs(5);

/// Context that all hosts of a node share.
pub struct HostContext {
    /// Shared state.
    pub registry: Arc<NodeRegistry>,
    /// Engine budget.
    pub engines: EngineShared,
    /// The bucket to ship to.
    pub bucket: Bucket,
    /// Interval between two chunks.
    pub ship_interval: Duration,
    /// Clock for event and commit times.
    pub clock: SharedClock,
    /// Connections to the other nodes.
    pub peers: Arc<Peers>,
    /// Upper bound of the log bytes that a replica keeps for others.
    pub log_cap: u64,
    /// Limits that all uploads share.
    pub pace: Arc<Pace>,
}

/// Identity and location of a hosted replica.
#[derive(Clone)]
pub struct ReplicaSpec {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its directory.
    pub dir: PathBuf,
    /// Temporary files on the same file system.
    pub tmp: PathBuf,
}

/// A running host.
pub struct Host {
    /// The hosted replica.
    pub spec: ReplicaSpec,
    catalogs: watch::Sender<Arc<Catalog>>,
    status: Arc<Mutex<HostStatus>>,
    target: Arc<Mutex<Option<Arc<Mutex<TargetProgress>>>>>,
    ship: Arc<Mutex<Option<ShipHandle>>>,
    replicator: Arc<Mutex<Option<Arc<Replicator>>>>,
    cancel: CancellationToken,
    discard: Arc<AtomicBool>,
    size: Mutex<Option<KnownSize>>,
    task: Option<JoinHandle<()>>,
}

impl Host {
    /// Starts hosting; the replica is opened (or created) in the background.
    pub fn start(context: Arc<HostContext>, spec: ReplicaSpec, catalog: Arc<Catalog>) -> Self {
        let (catalogs, receiver) = watch::channel(catalog);
        let cancel = CancellationToken::new();
        let mut host = Self {
            spec: spec.clone(),
            catalogs,
            status: Arc::default(),
            target: Arc::default(),
            ship: Arc::default(),
            replicator: Arc::default(),
            cancel: cancel.clone(),
            discard: Arc::default(),
            size: Mutex::default(),
            task: None,
        };
        let runner = Runner {
            context,
            spec,
            status: host.status.clone(),
            target: host.target.clone(),
            ship: host.ship.clone(),
            replicator: host.replicator.clone(),
            cancel,
            discard: host.discard.clone(),
        };
        host.task = Some(tokio::spawn(runner.run(receiver)));
        host
    }

    /// Passes a newer version of the keyspace's catalog to the host.
    pub fn apply_catalog(&self, catalog: Arc<Catalog>) {
        self.catalogs.send_replace(catalog);
    }

    /// Hands authority over to another replica of the shard, because the replica is about to stop.
    pub async fn hand_over_authority(registry: &NodeRegistry, keyspace: KeyspaceId, replica: ReplicaId) {
        if let (Some(leases), Some(replica)) = (registry.leases.get(), registry.replica(keyspace, replica)) {
            leases.hand_over_authority(&replica).await;
        }
    }

    /// Stops the replica: ships the pending log, flushes.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }

    /// Stops a replica whose files are about to be removed: nothing more is shipped.
    pub async fn stop_to_discard(self) {
        self.discard.store(true, Ordering::Release);
        self.stop().await;
    }

    /// Returns the shipper, once the replica is open and if this replica ships for its shard.
    pub fn shipper(&self) -> Option<ShipHandle> {
        self.any_shipper().filter(|ship| ship.positions.ships.load(Ordering::Acquire))
    }

    /// Returns the shipper, whichever replica ships for the shard.
    pub fn any_shipper(&self) -> Option<ShipHandle> {
        self.ship.lock().clone()
    }
}
