//! Bands that arrive at a replica that serves, in a shrink: the range is made empty before they
//! come, and cleared when they are not wanted any more.
//!
//! **Invariant:** a range is cleared only while no running plan fills it, or before the ingest of
//! the plan that does; clearing and filling exclude each other by [`Hosted::filling`].

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::plan::Plan;
use vasto_core::record::{BandRange, RangeState};
use vasto_failpoint::points;

use super::cleanup::clean_up;
use super::hosted::Hosted;
use super::reconcile::range_of;
use super::shared::{RETRY, RETRY_MAX};
use crate::build::BuildError;
use crate::replica::command::Control;

impl Hosted {
    /// Clears bands that arrive here for no running plan: it was undone.
    pub(super) fn reconcile_arrivals(self: &Arc<Self>) {
        if self.unwanted().is_none() || !self.background.lock().begin_to_clear() {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            let mut pause = RETRY;
            loop {
                let result = {
                    let _filling = this.filling.lock().await;
                    match this.unwanted() {
                        Some(range) => clean_up(&this.replica, range, this.replica.version()).await,
                        None => Ok(()),
                    }
                };
                // Before the last look: a version that comes later begins anew.
                this.background.lock().clearing = false;
                let Err(error) = result else {
                    if this.unwanted().is_none() || !this.background.lock().begin_to_clear() {
                        return;
                    }
                    continue;
                };
                if this.shared.cancel.is_cancelled() || this.replica.is_closed() {
                    return;
                }
                tracing::warn!(%error, "removing the bands of a shrink that was undone failed; it is tried again");
                this.shared.pause(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
                if !this.background.lock().begin_to_clear() {
                    return;
                }
            }
        });
    }

    /// Returns the bands that arrive here, or are being cleared after that, while no plan fills
    /// them.
    fn unwanted(&self) -> Option<BandRange> {
        let catalog = self.shared.context.registry.catalog(self.replica.keyspace)?;
        let is_target =
            |plan: &Plan| plan.targets.iter().any(|target| target.replica == self.replica.id);
        if !catalog.is_placed(self.replica.id) || catalog.plan.as_ref().is_some_and(is_target) {
            return None;
        }
        let ranges = self.replica.ranges();
        let owned = catalog.owned_bands();
        let in_quarantine = |band: Band| {
            let mut quarantines = catalog.quarantines.iter();
            quarantines.any(|quarantine| quarantine.range.contains(band))
        };
        let left = |state: RangeState| {
            range_of(Band::all().filter(|band| {
                ranges.state(*band) == state && !owned.contains(*band) && !in_quarantine(*band)
            }))
        };
        left(RangeState::Clearing).or_else(|| left(RangeState::Arriving))
    }

    /// Makes the range that a shrink fills empty and arriving, unless it is filled already.
    ///
    /// # Errors
    /// `Mismatch` when the replica still holds bands of the range that it gave away.
    pub(super) async fn make_room(
        &self,
        plan: &Plan,
        cancel: &CancellationToken,
    ) -> Result<(), BuildError> {
        let Some(range) = plan.arriving().filter(|_| plan.shrinks()) else { return Ok(()) };
        let replica = &self.replica;
        let _filling = self.filling.lock().await;
        let ranges = replica.ranges();
        if ranges.filled_by() == Some(plan.id) {
            return Ok(());
        }
        let kept =
            |band: &Band| matches!(ranges.state(*band), RangeState::Owned | RangeState::Leaving);
        if let Some(band) = range.bands().find(kept) {
            return Err(BuildError::Mismatch(format!(
                "replica {} still holds band {band}, which it gave away before; wait for the end of \
                 the quarantine",
                replica.id
            )));
        }
        let is_empty = ranges.all_are(range, RangeState::Empty)
            || (ranges.all_are(range, RangeState::Arriving)
                && ranges.filled_by().is_none()
                && !replica.engine().any_in(range)?);
        if !is_empty {
            // A build of this plan or of an earlier one was interrupted.
            self.clear_stale(range).await?;
        }
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        if !replica.ranges().all_are(range, RangeState::Arriving) {
            let (epoch, version) = (replica.epoch(), replica.version());
            let state = RangeState::Arriving;
            replica.control(Control::SetRange { epoch, version, range, state }).await?;
            self.passes(points::TARGET_ARRIVING).await?;
        }
        Ok(())
    }

    /// Clears what is left of an interrupted build: of an earlier plan it may be another range.
    async fn clear_stale(&self, range: BandRange) -> Result<(), BuildError> {
        let ranges = self.replica.ranges();
        for state in [RangeState::Clearing, RangeState::Arriving] {
            let stale = range_of(range.bands().filter(|band| ranges.state(*band) == state));
            if let Some(stale) = stale {
                clean_up(&self.replica, stale, self.replica.version()).await?;
            }
        }
        Ok(())
    }
}
