//! One hosted replica: opens it, reconciles it with the catalog, reports on it.
//!
//! **Invariants**
//! - Level-triggered: every action depends on the newest catalog version and the replica's own
//!   durable state, never on which messages arrived. Repeating an action changes nothing.
//! - No action follows a version lower than one already applied.
//! - Data is removed only under a version that names it (`dropping`), after the range state records
//!   that the range was given away.

mod arrivals;
mod cleanup;
mod decided;
mod drain;
mod hosted;
mod housekeeping;
mod load;
mod open;
mod reconcile;
mod report;
mod runner;
mod shared;
mod source;
mod target;
mod throttle;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_shipping::bucket::Bucket;

#[cfg(test)]
pub(crate) use self::cleanup::clean_up;
use self::load::Load;
#[cfg(test)]
pub(crate) use self::open::open_or_begin_again;
use self::report::KnownSize;
use self::shared::Shared;
use crate::clock::SharedClock;
use crate::engine::EngineShared;
use crate::lease::Leases;
use crate::registry::NodeRegistry;
use crate::replication::peers::Peers;
use crate::ship::{Pace, ShipHandle};

/// Context that all hosts of a node share.
pub(crate) struct HostContext {
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
    /// The leases of the node; without them a replica serves whether it has peers or not.
    pub leases: Option<Leases>,
    /// Upper bound of the log bytes that a replica keeps for others.
    pub log_cap: u64,
    /// Limits that all uploads share.
    pub pace: Arc<Pace>,
}

/// Identity and location of a hosted replica.
#[derive(Clone)]
pub(crate) struct ReplicaSpec {
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
pub(crate) struct Host {
    shared: Arc<Shared>,
    catalogs: watch::Sender<Arc<Catalog>>,
    /// A version that the node does not remember yet.
    announced: watch::Sender<Option<Arc<Catalog>>>,
    size: Mutex<Option<KnownSize>>,
    load: Mutex<Load>,
    task: JoinHandle<()>,
}

impl Host {
    /// Starts hosting; the replica is opened (or created) in the background.
    pub(crate) fn start(
        context: Arc<HostContext>,
        spec: ReplicaSpec,
        catalog: Arc<Catalog>,
    ) -> Self {
        let (catalogs, receiver) = watch::channel(catalog);
        let (announced, heard) = watch::channel(None);
        let shared = Arc::new(Shared::new(context, spec));
        let task = tokio::spawn(runner::run(shared.clone(), receiver, heard));
        Self { shared, catalogs, announced, size: Mutex::default(), load: Mutex::default(), task }
    }

    /// Returns the hosted replica.
    pub(crate) fn spec(&self) -> &ReplicaSpec {
        &self.shared.spec
    }

    /// Passes a newer version of the keyspace's catalog to the host.
    pub(crate) fn apply_catalog(&self, catalog: Arc<Catalog>) {
        self.catalogs.send_replace(catalog);
    }

    /// Tells the host of a version that seals or decides a seal, before the node remembers it.
    pub(crate) fn announce(&self, catalog: Arc<Catalog>) {
        self.announced.send_replace(Some(catalog));
    }

    /// Stops the replica: ships the pending log, flushes.
    pub(crate) async fn stop(self) {
        self.shared.cancel.cancel();
        let _ = self.task.await;
    }

    /// Stops a replica whose files are about to be removed: nothing more is shipped.
    pub(crate) async fn stop_to_discard(self) {
        self.shared.discard.store(true, Ordering::Release);
        self.stop().await;
    }

    /// Returns the shipper, once the replica is open and if this replica ships for its shard.
    pub(crate) fn shipper(&self) -> Option<ShipHandle> {
        self.any_shipper().filter(ShipHandle::ships)
    }

    /// Returns the shipper, whichever replica ships for the shard.
    pub(crate) fn any_shipper(&self) -> Option<ShipHandle> {
        self.shared.status.lock().ship.clone()
    }
}
