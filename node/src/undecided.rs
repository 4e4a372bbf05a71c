//! Seals that nobody decides: the node looks for the decision in the bucket itself, and undoes the
//! seal when there is none. Without this, the keys of a resize whose master died between seal and
//! decision would wait for the next master.
//!
//! **Invariants**
//! - What is applied was read from the bucket, or is known to have been written: after a write with
//!   an unknown outcome the node looks again.
//! - What the node writes follows the version in the bucket, not the one in its memory.
//! - While a sealed node cannot look, its warning says so; it stays sealed, and looks again at least
//!   every few seconds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Counter;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, KeyspaceId};
use vasto_core::limits::SEAL_LOOK_AGAIN;
use vasto_core::plan::Plan;
use vasto_core::reconcile::{Look, Undecided, is_decided, look, undo_undecided};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::{CatalogError, CatalogStore, CatalogWrite, RetryBudget};
use vasto_trace::step_ended;

use crate::clock::since_boot;
use crate::manager::Manager;
use crate::registry::NodeRegistry;
use crate::replica::state::Seal;

/// How long one request is waited for and repeated before the look has failed, so that the warning
/// comes soon.
const PATIENCE: RetryBudget = RetryBudget {
    total: Duration::from_secs(2),
    attempt: Duration::from_secs(10),
    transfer: Duration::from_secs(10),
    backoff_first: Duration::from_millis(50),
    backoff_max: Duration::from_millis(500),
};

/// Why a look has failed.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(
        "the bucket does not have version {0} of the catalog, which this node has applied; give the cluster its own \
         bucket back, or put the object back"
    )]
    Missing(CatalogVersion),
}

/// A version that follows, and whether this node wrote it to undo a seal.
struct Found {
    later: Catalog,
    undone: bool,
}

/// The looks of one node.
struct Looks {
    registry: Arc<NodeRegistry>,
    manager: Arc<Manager>,
    store: CatalogStore,
    cancel: CancellationToken,
    outcomes: Counter<u64>,
}

/// Runs until `cancel` fires: one task for each keyspace whose resize may wait for a decision.
pub(crate) async fn run(
    registry: Arc<NodeRegistry>,
    manager: Arc<Manager>,
    bucket: Bucket,
    cancel: CancellationToken,
) {
    let outcomes = opentelemetry::global::meter("vasto-node")
        .u64_counter("vasto_undecided_seals")
        .with_description(
            "Looks for the decision of a seal, by result: decided, undone, none or failed",
        )
        .build();
    let store = CatalogStore::new(bucket.with_retry(PATIENCE));
    let mut changes = registry.changes();
    let looks = Arc::new(Looks { registry, manager, store, cancel, outcomes });
    let mut followed: HashMap<KeyspaceId, CatalogVersion> = HashMap::new();
    // What the node remembers of its last run may be long over.
    let mut remembered = true;
    loop {
        changes.borrow_and_update();
        let resizing = looks.registry.resizing();
        followed.retain(|keyspace, _| resizing.iter().any(|other| other.keyspace == *keyspace));
        for catalog in resizing {
            if followed.insert(catalog.keyspace, catalog.version) != Some(catalog.version) {
                // Ends with the version.
                tokio::spawn(looks.clone().follow(catalog, remembered));
            }
        }
        remembered = false;
        if !matches!(looks.cancel.run_until_cancelled(changes.changed()).await, Some(Ok(()))) {
            return;
        }
    }
}

impl Looks {
    /// Looks for what follows this version until the node has applied a later one.
    async fn follow(self: Arc<Self>, catalog: Arc<Catalog>, mut at_once: bool) {
        let known_since = since_boot();
        let (mut changes, mut stalls) = (self.registry.changes(), self.registry.stall.pauses());
        let warning = Warning { registry: &self.registry, keyspace: catalog.keyspace };
        let mut pause = SEAL_LOOK_AGAIN.0;
        loop {
            if self.is_over(&catalog) {
                return;
            }
            let known = since_boot().saturating_sub(known_since);
            let sealed = self.is_sealed(&catalog);
            let state = Undecided { known, alone: self.registry.without_master(), sealed };
            let Some(next) = look(&catalog, self.registry.node_id, state) else { return };
            let wait = match next {
                Look::After(wait) if !at_once => wait,
                _ => {
                    at_once = false;
                    let undo = next == Look::Undo;
                    let Some(found) = self
                        .cancel
                        .run_until_cancelled(Box::pin(self.look(&catalog, undo, known)))
                        .await
                    else {
                        return;
                    };
                    self.take(&catalog, sealed.then_some(known), found, &warning).await;
                    let jittered = pause.mul_f64(rand::random_range(0.7..1.0));
                    pause = (pause * 2).min(SEAL_LOOK_AGAIN.1);
                    jittered
                }
            };
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = self.superseded(&catalog, &mut changes) => return,
                // After the process stood still everything may have been decided.
                _ = stalls.changed() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn is_over(&self, catalog: &Catalog) -> bool {
        let newest = self.registry.catalog(catalog.keyspace);
        newest.is_none_or(|newest| newest.version > catalog.version)
    }

    async fn superseded(&self, catalog: &Catalog, changes: &mut watch::Receiver<u64>) {
        while !self.is_over(catalog) && changes.changed().await.is_ok() {}
    }

    /// Returns true when a replica of this node is sealed under this very version.
    fn is_sealed(&self, catalog: &Catalog) -> bool {
        let Some(plan) = &catalog.plan else { return false };
        let is_of_it = |seal: Seal| (seal.plan, seal.version) == (plan.id, catalog.version);
        self.registry.replicas().iter().any(|replica| {
            replica.keyspace == catalog.keyspace && replica.ranges().seal.is_some_and(is_of_it)
        })
    }

    /// Returns the version that follows in the bucket. When there is none and the node may `undo`,
    /// it writes the version that undoes the seal and returns that one, or the one that was quicker.
    async fn look(
        &self,
        catalog: &Catalog,
        undo: bool,
        known: Duration,
    ) -> Result<Option<Found>, LookError> {
        let found = |later| Some(Found { later, undone: false });
        let stored = self.store.stored(catalog.keyspace, catalog.version).await?;
        // A bucket that was rolled back, or is another cluster's, may have a version of this number.
        let stored = stored.filter(|stored| stored.catalog().nonce == catalog.nonce);
        let stored = stored.ok_or(LookError::Missing(catalog.version))?;
        if let Some(later) = self.store.later_than(stored.catalog()).await? {
            return Ok(is_decided(catalog, &later).then_some(later).and_then(found));
        }
        let Some(plan) = catalog.plan.as_ref().filter(|_| undo) else { return Ok(None) };
        let sealing = (plan.id, catalog.version);
        let undone = undo_undecided(stored.catalog(), sealing, known, rand::random());
        let Some(undone) = undone else { return Ok(None) };
        match self.store.write_behind(&stored, &undone).await? {
            CatalogWrite::Won => {
                self.trace(stored.catalog(), plan, &undone);
                Ok(Some(Found { later: undone, undone: true }))
            }
            CatalogWrite::Lost(other) => {
                let later = self.store.later_than(&other).await?;
                Ok(found(later.unwrap_or(*other)))
            }
        }
    }

    /// Exports the step that this node has ended: whoever writes a version does that.
    fn trace(&self, sealed: &Catalog, plan: &Plan, undone: &Catalog) {
        let step = step_ended(sealed, plan, sealed.written_at_us, undone.written_at_us);
        self.registry.trace(sealed.keyspace, plan.id).add(step);
    }

    /// Applies what was found; warns while a sealed node finds nothing out. `sealed` is the time of
    /// the seal.
    async fn take(
        &self,
        catalog: &Catalog,
        sealed: Option<Duration>,
        found: Result<Option<Found>, LookError>,
        warning: &Warning<'_>,
    ) {
        match found {
            Ok(Some(Found { later, undone })) => {
                self.count(if undone { "undone" } else { "decided" });
                let step = later.plan.as_ref().map(|plan| plan.step);
                let waited_ms = sealed.map(|waited| waited.as_millis() as u64);
                tracing::info!(
                    keyspace = later.name, version = %later.version, ?step, waited_ms,
                    "{}",
                    if undone { "nobody decided a seal; this node has undone it" } else { "took a version from the bucket" }
                );
                warning.set(None);
                Box::pin(self.manager.apply_catalog_at_last(Arc::new(later))).await;
            }
            Ok(None) => {
                self.count("none");
                warning.set(None);
            }
            Err(error) => {
                self.count("failed");
                let Some(waited) = sealed else {
                    tracing::debug!(keyspace = catalog.name, %error, "cannot look for a later version");
                    return;
                };
                tracing::warn!(
                    keyspace = catalog.name,
                    version = %catalog.version,
                    waited_ms = waited.as_millis() as u64,
                    %error,
                    "a seal is not decided, and the bucket does not say more; looking again"
                );
                warning.set(Some(format!(
                    "the moving keys of keyspace {} wait for the decision of version {} and are not served: no master \
                     has told it, and the bucket cannot be asked: {error}",
                    catalog.name, catalog.version
                )));
            }
        }
    }

    fn count(&self, result: &'static str) {
        self.outcomes.add(1, &[KeyValue::new("result", result)]);
    }
}

/// The part of the node's warning that is about the seal of one keyspace; it ends with the look.
struct Warning<'a> {
    registry: &'a NodeRegistry,
    keyspace: KeyspaceId,
}

impl Warning<'_> {
    fn set(&self, text: Option<String>) {
        self.registry.set_undecided(self.keyspace, text);
    }
}

impl Drop for Warning<'_> {
    fn drop(&mut self) {
        self.set(None);
    }
}
