//! Quarantines: removal of bands that were given away, once a manifest of their new owner covers
//! them.
//!
//! **Invariant:** whole SSTs are deleted while the range is still `Leaving`; the range delete and
//! the state `Clearing` are one record; a range is `Empty` only after nothing of it is left.

use std::sync::Arc;

use vasto_core::catalog::Catalog;
use vasto_core::ids::CatalogVersion;
use vasto_core::record::{BandRange, RangeState};
use vasto_failpoint::{Point, points};

use super::hosted::Hosted;
use super::shared::{RETRY, RETRY_MAX};
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};
use crate::ship::{self, blocking};

impl Hosted {
    /// Removes the bands that the version names, and ships what this replica took over from others'
    /// quarantines.
    pub(super) fn reconcile_quarantines(self: &Arc<Self>, catalog: &Catalog) {
        let mine: Vec<_> = catalog
            .quarantines
            .iter()
            .filter(|quarantine| quarantine.replicas.contains(&self.replica.id))
            .cloned()
            .collect();
        self.shared
            .status
            .lock()
            .cleaned
            .retain(|plan| mine.iter().any(|quarantine| quarantine.plan == *plan));
        for quarantine in mine.into_iter().filter(|quarantine| quarantine.dropping) {
            if !self.background.lock().cleaning.insert(quarantine.plan) {
                continue;
            }
            let (this, version) = (self.clone(), catalog.version);
            tokio::spawn(async move {
                let replica = &this.replica;
                let mut pause = RETRY;
                while let Err(error) = clean_up(replica, quarantine.range, version).await {
                    if this.shared.cancel.is_cancelled() || replica.closed().is_some() {
                        this.background.lock().cleaning.remove(&quarantine.plan);
                        return;
                    }
                    tracing::warn!(%error, "removing moved bands failed; it is tried again");
                    // An export may still read the rows.
                    this.shared.pause(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                tracing::info!(
                    keyspace = replica.keyspace.0,
                    shard = replica.shard.0,
                    "removed the bands that it gave away"
                );
                this.shared.status.lock().cleaned.insert(quarantine.plan);
                this.shared.notify();
            });
        }
        // The moved bands are removed only once a manifest of the new owner covers what it took
        // over.
        let wanted = catalog
            .quarantines
            .iter()
            .flat_map(|quarantine| &quarantine.targets)
            .filter(|(id, _)| *id == self.replica.id)
            .map(|(_, lsn)| *lsn)
            .max();
        if let Some(lsn) = wanted {
            self.cover_by_a_manifest(lsn);
        }
    }
}

async fn passes(replica: &Replica, point: Point) -> Result<(), ReplicaError> {
    Ok(vasto_failpoint::at(point, replica.keyspace, replica.id).await?)
}

/// Removes a range that was given away, or that arrived for a plan that was undone.
///
/// Whole files first; then one record with the range delete and the state; then a flush and a
/// forced compaction; only then is the range empty. After the range delete whole files are never
/// dropped again, because that could uncover what the delete hides.
pub(crate) async fn clean_up(
    replica: &Replica,
    range: BandRange,
    version: CatalogVersion,
) -> Result<(), ship::ShipError> {
    let refused = |error: ReplicaError| ship::ShipError::Checkpoint(error.to_string());
    let (ranges, epoch) = (replica.ranges(), replica.epoch());
    if ranges.all_are(range, RangeState::Empty) {
        return Ok(());
    }
    if range
        .bands()
        .all(|band| matches!(ranges.state(band), RangeState::Leaving | RangeState::Arriving))
    {
        let files = replica.clone();
        blocking(move || files.engine().delete_files_in(range)).await?;
        passes(replica, points::CLEANUP_FILES).await?;
        replica
            .control(Control::SetRange { epoch, version, range, state: RangeState::Clearing })
            .await
            .map_err(refused)?;
    } else if !ranges.all_are(range, RangeState::Clearing) {
        return Err(ship::ShipError::Checkpoint(
            "the range to remove is neither one that was given away nor one that arrives".into(),
        ));
    }
    passes(replica, points::CLEANUP_CLEARING).await?;
    let compacted = replica.clone();
    blocking(move || {
        compacted.engine().flush()?;
        compacted.engine().compact_bands(range);
        // An interrupted compaction reports nothing: check.
        let (inside, _) = compacted.engine().band_bytes(range)?;
        if inside > 0 || compacted.engine().any_in(range)? || compacted.closed().is_some() {
            return Err(ship::ShipError::Checkpoint(
                "something is left in the removed range".into(),
            ));
        }
        Ok(())
    })
    .await?;
    passes(replica, points::CLEANUP_COMPACTED).await?;
    replica
        .control(Control::SetRange { epoch, version, range, state: RangeState::Empty })
        .await
        .map_err(refused)?;
    Ok(())
}
