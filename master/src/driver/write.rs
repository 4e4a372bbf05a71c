//! The write of a catalog version: a conditional put that only one master wins.
//!
//! **Invariant:** a version is installed (used here and sent to nodes and clients) only after its
//! write is known to have won. A write that lost, or whose outcome is not known, is settled by
//! reading the tip, the newest version in the bucket, for as long as that takes.

use std::time::{Duration, Instant};

use rand::RngExt;
use vasto_core::catalog::Catalog;
use vasto_core::ids::CatalogVersion;
use vasto_core::limits::SEALING_WRITE_MAX;
use vasto_core::operation::operation_id;
use vasto_core::plan::Step;
use vasto_core::reconcile::{LeadershipChanges, leadership_changes_between};
use vasto_shipping::{CatalogError, CatalogWrite};

use super::KeyspaceDriver;
use super::entry::{adopt, install};
use crate::state::Delivery;

/// First and longest pause between attempts at a bucket that fails.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The outcome of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// The version is the catalog.
    Won,
    /// Another version won; the state holds the tip, so decide again.
    Overtaken,
    /// The master stops.
    Stopping,
}

impl KeyspaceDriver {
    /// Writes a version, then installs it or the one that won instead. Retries a failing bucket
    /// until the outcome is known or the master stops.
    pub(super) async fn write(&mut self, next: Catalog) -> Written {
        let started = Instant::now();
        let version = next.version;
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
                    keyspace = next.name, %version, winner = %other.version,
                    "another master wrote first; going on from its version"
                );
                // The hint is a version that this master knows for certain; the tip may be higher.
                self.settle(&next, *other, started).await
            }
            Some(Err(error)) => {
                self.cluster.metrics.catalog_write("failed");
                tracing::warn!(keyspace = next.name, %version, %error, "a catalog write failed; reading the tip");
                self.read_tip(&next, started).await
            }
        }
    }

    /// Settles a lost race: the tip is at or beyond `other`.
    async fn settle(&mut self, ours: &Catalog, other: Catalog, started: Instant) -> Written {
        let hint = other.version;
        match self.tip(hint).await {
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
        let hint = self
            .cluster
            .state()
            .keyspaces
            .get(&self.keyspace)
            .map_or(ours.version, |keyspace| keyspace.catalog.version);
        loop {
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            if self
                .cluster
                .shutdown
                .run_until_cancelled(tokio::time::sleep(jittered))
                .await
                .is_none()
            {
                return Written::Stopping;
            }
            pause = (pause * 2).min(pause_max);
            match self.tip(hint).await {
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
                    let what = format!("the bucket to answer about the catalog: {error}");
                    self.note_waiting(&mut self.cluster.state(), Some(what));
                }
            }
        }
    }

    /// Reads the tip at or beyond `hint`; `None` when the master stops.
    pub(super) async fn tip(
        &self,
        hint: CatalogVersion,
    ) -> Option<Result<Option<Catalog>, CatalogError>> {
        let tip = self.cluster.store.tip(self.keyspace, hint);
        self.cluster.shutdown.run_until_cancelled(tip).await
    }

    fn won(&self, next: Catalog, took: Duration) {
        let delivery = delivery_of(&next, took);
        log_version(&next, delivery, took);
        let before = self
            .cluster
            .state()
            .keyspaces
            .get(&next.keyspace)
            .map(|keyspace| keyspace.catalog.clone());
        let changes =
            before.map(|before| leadership_changes_between(&before, &next)).unwrap_or_default();
        if changes != LeadershipChanges::default() {
            tracing::info!(
                keyspace = next.name,
                failovers = changes.failovers,
                handovers = changes.handovers,
                "primaries have changed"
            );
            self.cluster.metrics.primaries_moved(changes);
        }
        install(&self.cluster, next, delivery);
    }

    pub(super) fn adopt(&self, tip: Catalog) {
        let (name, version) = (tip.name.clone(), tip.version);
        if adopt(&self.cluster, tip) {
            tracing::info!(keyspace = name, %version, "adopted the tip of the catalog");
        }
    }
}

/// Returns how a version that this master wrote is delivered: one that seals and took too long to
/// write is undone instead, since writes would wait for longer than was promised.
pub(super) fn delivery_of(next: &Catalog, took: Duration) -> Delivery {
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
