//! The handle that all tasks of a master share: state, catalog store, clock, shutdown.
//!
//! **Invariant:** the state's lock is held for synchronous work only, never across an await.
//! [`Cluster::install`] is the one way in for a catalog version, and it starts the one driver
//! that a keyspace has.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_core::catalog::Catalog;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId};
use vasto_core::plan::Step;
use vasto_shipping::garbage::Retention;
use vasto_shipping::{Bucket, CatalogStore, ClusterSettings, Prices};

use crate::bill::Stored;
use crate::driver::Driver;
use crate::metrics::Metrics;
use crate::state::{Delivery, State};

/// A keyspace that nodes name and nobody knows is looked for this often at most.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(10);
/// The bucket is given so long to say whether anything was decided about the nodes.
const SETTINGS_PATIENCE: Duration = Duration::from_secs(2);
/// Unknown keyspaces that are remembered as looked for.
const LOOK_UPS_MAX: usize = 1024;

/// What a master is told and its tasks go by.
pub(crate) struct Settings {
    pub(crate) dial_back: bool,
    pub(crate) node_silence: Duration,
    pub(crate) retention: Retention,
    pub(crate) prices: Prices,
}

/// What the tasks of one master share.
pub(crate) struct Cluster {
    /// Empty while nobody knows whose the prefix is.
    cluster_id: Mutex<String>,
    /// Why this master serves nothing but its own repair: the prefix is somebody's, and does not say whose.
    lost: watch::Sender<Option<String>>,
    /// Nodes of other clusters that asked to be taken in, with the cluster that they name.
    refused: Mutex<BTreeMap<NodeId, String>>,
    /// What is odd in the catalog, and what the last look through the bucket has found.
    odd: Mutex<(Vec<String>, Vec<String>)>,
    pub(crate) bucket: Bucket,
    pub(crate) store: CatalogStore,
    pub(crate) settings: Settings,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) metrics: Metrics,
    state: Mutex<State>,
    stored: Mutex<Option<Stored>>,
    looked_up: Mutex<HashMap<KeyspaceId, Instant>>,
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
            lost: watch::Sender::new(None),
            refused: Mutex::default(),
            odd: Mutex::default(),
            store: CatalogStore::new(bucket.clone()),
            bucket,
            settings,
            shutdown,
            tasks: TaskTracker::new(),
            metrics: Metrics::new(),
            state: Mutex::new(State::default()),
            stored: Mutex::new(None),
            looked_up: Mutex::new(HashMap::new()),
            started: Instant::now(),
        })
    }

    /// The state, for synchronous work.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Whose the prefix is; empty while nobody knows.
    pub(crate) fn cluster_id(&self) -> String {
        self.cluster_id.lock().clone()
    }

    /// Serves nothing any more but the repair, for this reason.
    pub(crate) fn lose(&self, why: String) {
        tracing::error!(why, "the bucket has to be repaired before this master serves");
        self.lost.send_replace(Some(why));
    }

    /// Why only the repair is served, while that is so.
    pub(crate) fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.lost.subscribe()
    }

    /// Whose the prefix is, is known again.
    pub(crate) fn found(&self, cluster_id: String) {
        *self.cluster_id.lock() = cluster_id;
        self.lost.send_replace(None);
        self.refused.lock().clear();
    }

    /// Refuses whoever needs more than the repair: nothing is found out by trying again.
    pub(crate) fn check_found(&self) -> Result<(), VastoError> {
        match &*self.lost.borrow() {
            None => Ok(()),
            Some(why) => {
                let message = format!("{why}; start the nodes, then run `vasto bucket repair`");
                Err(VastoError::new(ErrorCode::FailedPrecondition, message))
            }
        }
    }

    /// True while only the repair is served.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.borrow().is_some()
    }

    /// A node of another cluster was refused; true the first time.
    pub(crate) fn note_refused(&self, node: NodeId, cluster_id: &str) -> bool {
        let mut refused = self.refused.lock();
        let may = refused.len() < LOOK_UPS_MAX || refused.contains_key(&node);
        may && refused.insert(node, cluster_id.to_owned()).is_none_or(|before| before != cluster_id)
    }

    /// Nodes of other clusters that have asked to be taken in.
    pub(crate) fn refused(&self) -> BTreeMap<NodeId, String> {
        self.refused.lock().clone()
    }

    /// What is odd in the catalog.
    pub(crate) fn note_odd_catalogs(&self, odd: Vec<String>) {
        self.odd.lock().0 = odd;
    }

    /// What the last look through the bucket has found.
    pub(crate) fn note_findings(&self, findings: Vec<String>) {
        self.odd.lock().1 = findings;
    }

    /// What somebody should look at, of the bucket.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let lost = self.check_found().err().map(|error| error.message);
        let outage = self
            .bucket
            .outage()
            .map(|(since, why)| format!("the bucket has not answered this master for {} s: {why}", since.as_secs()));
        let refused = self.refused().into_iter().map(|(node, cluster)| {
            format!(
                "{node} belongs to cluster {cluster} and is not taken in: if the bucket of that cluster was emptied, \
                 `vasto bucket repair` puts back what its nodes know"
            )
        });
        let (catalogs, findings) = self.odd.lock().clone();
        lost.into_iter().chain(outage).chain(refused).chain(catalogs).chain(findings).collect()
    }

    /// Microseconds since this master started; never goes back.
    pub(crate) fn mono_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Remembers what a look through the whole bucket found. Nothing is listed for this alone.
    pub(crate) fn bucket_holds(&self, bytes: u64) {
        *self.stored.lock() = Some(Stored { bytes, at_us: self.mono_us() });
    }

    /// What the last look through the bucket found, if there was one.
    pub(crate) fn stored(&self) -> Option<Stored> {
        *self.stored.lock()
    }

    /// Takes a catalog version that is in the bucket, shows it as `delivery` says, and starts the
    /// driver of a new keyspace. False when a higher version is known already.
    pub(crate) fn install(self: &Arc<Self>, catalog: Catalog, delivery: Delivery) -> bool {
        let keyspace = catalog.keyspace;
        self.store.note_used(keyspace);
        let mut state = self.state();
        let (taken, requests) = state.install(catalog, delivery);
        if let Some(requests) = requests {
            let wake = state.keyspaces[&keyspace].wake.clone();
            drop(state);
            self.tasks.spawn(Driver::new(self.clone(), keyspace, wake, requests).run());
        }
        taken
    }

    /// Holds the places that a version gives away until its fate is known.
    pub(crate) fn hold_places(self: &Arc<Self>, hold: u64) -> Held {
        Held { cluster: self.clone(), hold }
    }

    /// Learns what other masters have decided about nodes; true when that is news. A bucket that does not
    /// answer decides nothing either: what is written next waits for it.
    pub(crate) async fn refresh_settings(&self) -> bool {
        let known = self.state().settings.clone();
        match tokio::time::timeout(SETTINGS_PATIENCE, self.store.settings(&known)).await {
            Ok(Ok(newest)) => self.learn_settings(newest),
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot read what was decided about the nodes");
                false
            }
            Err(_) => false,
        }
    }

    /// Takes what was decided about nodes; true when that is news.
    pub(crate) fn learn_settings(&self, settings: ClusterSettings) -> bool {
        let mut state = self.state();
        let is_news = settings.version > state.settings.version;
        if is_news {
            state.settings = Arc::new(settings);
            state.keyspaces.values().for_each(|known| known.poke());
        }
        is_news
    }

    /// Takes a version that another master wrote, or that was found at the start.
    pub(crate) fn adopt(self: &Arc<Self>, catalog: Catalog) -> bool {
        let sealing = catalog.plan.as_ref().is_some_and(|plan| plan.step == Step::Sealing);
        self.install(catalog, if sealing { Delivery::Hold } else { Delivery::Push })
    }

    /// Looks for a keyspace that a node knows and this master does not: another master made it.
    pub(crate) fn look_up(self: &Arc<Self>, keyspace: KeyspaceId) {
        if self.is_lost() {
            return; // what the bucket says is not believed yet
        }
        {
            let mut looked_up = self.looked_up.lock();
            looked_up.retain(|_, at| at.elapsed() < LOOK_UP_INTERVAL);
            if looked_up.contains_key(&keyspace) || looked_up.len() >= LOOK_UPS_MAX {
                return;
            }
            looked_up.insert(keyspace, Instant::now());
        }
        let cluster = self.clone();
        self.tasks.spawn(async move {
            let tip = cluster.store.tip(keyspace, CatalogVersion(1));
            match cluster.shutdown.run_until_cancelled(tip).await {
                None => {}
                Some(Ok(Some(catalog))) => {
                    tracing::info!(%keyspace, name = catalog.name, version = %catalog.version, "learned of a keyspace from a node");
                    cluster.adopt(catalog);
                }
                Some(Ok(None)) => {
                    tracing::warn!(%keyspace, "a node reports a keyspace that the bucket does not know")
                }
                Some(Err(error)) => tracing::warn!(%keyspace, %error, "cannot look for a keyspace that a node reports"),
            }
        });
    }
}

/// Places that nobody else counts on as long as this lives.
pub(crate) struct Held {
    cluster: Arc<Cluster>,
    hold: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.cluster.state().loads.give_back(self.hold);
    }
}

/// Microseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "the one place where this service reads the wall clock")]
pub(crate) fn now_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// A number that tells one writer's object from a rival's.
pub(crate) fn nonce() -> u64 {
    rand::random()
}
