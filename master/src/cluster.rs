//! The handle that all tasks of a master share: state, catalog store, clock, shutdown.
//!
//! **Invariant:** the state's lock is held for synchronous work only, never across an await.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_shipping::gc::Retention;
use vasto_shipping::{Bucket, CatalogStore, ClusterSettings, Prices};

use crate::metrics::Metrics;
use crate::state::ClusterState;

/// The shortest interval between look-ups of a keyspace that nodes name and this master does not
/// know.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(10);
/// How long the bucket has to return new settings of nodes.
const SETTINGS_PATIENCE: Duration = Duration::from_secs(2);
/// The most look-ups of unknown keyspaces that are remembered.
const LOOK_UPS_MAX: usize = 1024;

/// The configuration of a master that its tasks use.
pub(crate) struct Settings {
    pub(crate) dial_back: bool,
    pub(crate) node_silence: Duration,
    pub(crate) retention: Retention,
    pub(crate) prices: Prices,
    /// Begin a rebalance without a request when the cluster is out of balance.
    pub(crate) rebalance: bool,
    /// The most replicas that a rebalance moves at a time.
    pub(crate) moves_at_once: usize,
}

/// The result of a listing of the whole bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) bytes: u64,
    /// The time of the listing, by the master's own clock.
    pub(crate) at_us: u64,
}

/// State that the tasks of one master share.
pub(crate) struct Cluster {
    /// Empty while the owner of the prefix is not known.
    cluster_id: Mutex<String>,
    /// Why this master serves nothing but the repair: the prefix belongs to a cluster whose id is
    /// missing.
    restricted: watch::Sender<Option<String>>,
    /// Nodes of other clusters that asked to join, with the cluster that they name.
    refused: Mutex<BTreeMap<NodeId, String>>,
    /// Oddities of the catalog.
    odd_catalogs: Mutex<Vec<String>>,
    /// The findings of the last check of the bucket.
    findings: Mutex<Vec<String>>,
    pub(crate) bucket: Bucket,
    pub(crate) store: CatalogStore,
    pub(crate) settings: Settings,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) metrics: Metrics,
    state: Mutex<ClusterState>,
    stored: Mutex<Option<Stored>>,
    looked_up: Mutex<HashMap<KeyspaceId, Instant>>,
    /// Raised by every request for a rebalance.
    rebalance_requests: watch::Sender<u64>,
    started: Instant,
}

impl Cluster {
    pub(crate) fn new(
        cluster_id: String,
        bucket: Bucket,
        settings: Settings,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            cluster_id: Mutex::new(cluster_id),
            restricted: watch::Sender::new(None),
            refused: Mutex::default(),
            odd_catalogs: Mutex::default(),
            findings: Mutex::default(),
            store: CatalogStore::new(bucket.clone()),
            bucket,
            settings,
            shutdown,
            tasks: TaskTracker::new(),
            metrics: Metrics::new(),
            state: Mutex::new(ClusterState::default()),
            stored: Mutex::new(None),
            looked_up: Mutex::new(HashMap::new()),
            rebalance_requests: watch::Sender::new(0),
            started: Instant::now(),
        })
    }

    /// Locks the state, for synchronous work.
    pub(crate) fn state(&self) -> MutexGuard<'_, ClusterState> {
        self.state.lock()
    }

    /// Returns the cluster that owns the prefix; empty while it is not known.
    pub(crate) fn cluster_id(&self) -> String {
        self.cluster_id.lock().clone()
    }

    /// Stops serving everything but the repair, for this reason.
    pub(crate) fn restrict(&self, why: String) {
        tracing::error!(why, "the bucket has to be repaired before this master serves");
        self.restricted.send_replace(Some(why));
    }

    /// Returns why only the repair is served, while that is so.
    pub(crate) fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.restricted.subscribe()
    }

    /// Records the cluster that owns the prefix; the master serves again.
    pub(crate) fn owned_by(&self, cluster_id: String) {
        *self.cluster_id.lock() = cluster_id;
        self.restricted.send_replace(None);
        self.refused.lock().clear();
    }

    /// Refuses a call that needs more than the repair: a retry would not help.
    pub(crate) fn check_unrestricted(&self) -> Result<(), VastoError> {
        match &*self.restricted.borrow() {
            None => Ok(()),
            Some(why) => {
                let message = format!("{why}; start the nodes, then run `vasto bucket repair`");
                Err(VastoError::new(ErrorCode::FailedPrecondition, message))
            }
        }
    }

    /// Returns true while only the repair is served.
    pub(crate) fn is_restricted(&self) -> bool {
        self.restricted.borrow().is_some()
    }

    /// Records a refused node of another cluster; returns true the first time.
    pub(crate) fn note_refused(&self, node: NodeId, cluster_id: &str) -> bool {
        let mut refused = self.refused.lock();
        let may = refused.len() < LOOK_UPS_MAX || refused.contains_key(&node);
        may && refused.insert(node, cluster_id.to_owned()).is_none_or(|before| before != cluster_id)
    }

    /// Returns the nodes of other clusters that have asked to join.
    pub(crate) fn refused(&self) -> BTreeMap<NodeId, String> {
        self.refused.lock().clone()
    }

    /// Records the oddities of the catalog.
    pub(crate) fn note_odd_catalogs(&self, odd: Vec<String>) {
        *self.odd_catalogs.lock() = odd;
    }

    /// Records the findings of the last check of the bucket.
    pub(crate) fn note_findings(&self, findings: Vec<String>) {
        *self.findings.lock() = findings;
    }

    /// Returns the warnings about the bucket.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let restricted = self.check_unrestricted().err().map(|error| error.message);
        let outage = self.bucket.outage().map(|(since, why)| {
            format!("the bucket has not answered this master for {} s: {why}", since.as_secs())
        });
        let refused = self.refused().into_iter().map(|(node, cluster)| {
            format!(
                "{node} belongs to cluster {cluster} and is not taken in: if the bucket of that cluster was emptied, \
                 `vasto bucket repair` puts back what its nodes know"
            )
        });
        let catalogs = self.odd_catalogs.lock().clone();
        let findings = self.findings.lock().clone();
        restricted
            .into_iter()
            .chain(outage)
            .chain(refused)
            .chain(catalogs)
            .chain(findings)
            .collect()
    }

    /// Returns the microseconds since this master started; never goes back.
    pub(crate) fn mono_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Records the size that a listing of the whole bucket found. Nothing is listed for this alone.
    pub(crate) fn bucket_holds(&self, bytes: u64) {
        *self.stored.lock() = Some(Stored { bytes, at_us: self.mono_us() });
    }

    /// Returns the size that the last listing of the whole bucket found, if there was one.
    pub(crate) fn stored(&self) -> Option<Stored> {
        *self.stored.lock()
    }

    /// Returns a guard for the places that a version assigns, held until the outcome of its write
    /// is known.
    pub(crate) fn hold_places(self: &Arc<Self>, hold: u64) -> Held {
        Held { cluster: self.clone(), hold }
    }

    /// Reads what other masters have decided about nodes; returns true when that is new. While the
    /// bucket does not answer nothing is decided either: the next write waits for the bucket.
    pub(crate) async fn refresh_settings(&self) -> bool {
        let before = self.state().settings.clone();
        match tokio::time::timeout(SETTINGS_PATIENCE, self.store.settings(&before)).await {
            Ok(Ok(newest)) => self.learn_settings(newest),
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot read what was decided about the nodes");
                false
            }
            Err(_) => false,
        }
    }

    /// Adopts settings of nodes; returns true when they are new.
    pub(crate) fn learn_settings(&self, settings: ClusterSettings) -> bool {
        let mut state = self.state();
        let is_news = settings.version > state.settings.version;
        if is_news {
            state.settings = Arc::new(settings);
            state.keyspaces.values().for_each(|keyspace| keyspace.notify());
        }
        is_news
    }

    /// Subscribes to requests for a rebalance.
    pub(crate) fn rebalance_requests(&self) -> watch::Receiver<u64> {
        self.rebalance_requests.subscribe()
    }

    /// Wakes the task that rebalances.
    pub(crate) fn request_rebalance(&self) {
        self.rebalance_requests.send_modify(|count| *count += 1);
    }

    /// Returns true when a keyspace that this master does not know may be looked up now; the next
    /// look-up of it waits.
    pub(crate) fn may_look_up(&self, keyspace: KeyspaceId) -> bool {
        let mut looked_up = self.looked_up.lock();
        looked_up.retain(|_, at| at.elapsed() < LOOK_UP_INTERVAL);
        let may = !looked_up.contains_key(&keyspace) && looked_up.len() < LOOK_UPS_MAX;
        if may {
            looked_up.insert(keyspace, Instant::now());
        }
        may
    }
}

/// Places that other decisions do not count on while this guard lives.
pub(crate) struct Held {
    cluster: Arc<Cluster>,
    hold: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.cluster.state().loads.give_back(self.hold);
    }
}

/// Returns the wall clock in microseconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where this service reads the wall clock"
)]
pub(crate) fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}

/// Returns a number that distinguishes the object of one writer from a rival's.
pub(crate) fn nonce() -> u64 {
    rand::random()
}
