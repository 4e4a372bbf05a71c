//! Removal of bands that were given away.
//!
//! **Invariant:** whole files go while the range is still `Leaving`; the range delete enters together with `Clearing`;
//! a range is `Empty` only after nothing of it is left.

use vasto_core::ids::CatalogVersion;
use vasto_core::record::{BandRange, RangeState};

use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};
use crate::ship::{self, blocking};

/// Removes a range that was given away (DESIGN: clean-up).
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
    if ranges.all_are(range, RangeState::Leaving) {
        let files = replica.clone();
        blocking(move || files.engine().delete_files_in(range)).await?;
        replica
            .control(Control::SetRange { epoch, version, range, state: RangeState::Clearing })
            .await
            .map_err(refused)?;
    } else if !ranges.all_are(range, RangeState::Clearing) {
        return Err(ship::ShipError::Checkpoint("the range to remove is not one that was given away".into()));
    }
    let compacted = replica.clone();
    blocking(move || {
        compacted.engine().flush()?;
        compacted.engine().compact_bands(range);
        // An interrupted compaction reports nothing: check.
        let (inside, _) = compacted.engine().band_bytes(range)?;
        if inside > 0 || compacted.engine().any_in(range)? || compacted.closed().is_some() {
            return Err(ship::ShipError::Checkpoint("something is left in the removed range".into()));
        }
        Ok(())
    })
    .await?;
    replica.control(Control::SetRange { epoch, version, range, state: RangeState::Empty }).await.map_err(refused)?;
    Ok(())
}
