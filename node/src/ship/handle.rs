//! Handle to a replica's shipper, for the other modules of the node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use vasto_core::ids::Lsn;
use vasto_core::plan::PinnedManifest;
use vasto_core::record::BandRange;
use vasto_shipping::manifest::ManifestFile;

use super::error::ShipError;
use super::status::{Assignment, Duty, LogNeed, ShipStatus};
use crate::engine::Tables;

/// Receives the outcome of a request.
pub(super) type Waiter<T> = oneshot::Sender<Result<T, ShipError>>;

/// A request to a shipper.
pub(super) enum ShipRequest {
    /// A checkpoint of the current state.
    Checkpoint {
        /// Bands that a plan is about to read: they are rewritten first when that saves readers
        /// more than it costs.
        compact: Option<BandRange>,
        /// True when everything is uploaded, whatever is in the bucket already.
        anew: bool,
        /// Receives the manifest.
        done: Waiter<PinnedManifest>,
    },
    /// The log up to its current end, whichever replica ships otherwise.
    Log {
        /// Notified once the bucket covers it.
        done: Waiter<()>,
    },
}

/// What the checkpoints of a replica have uploaded since it was opened: their files, without the
/// manifests.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    bytes: AtomicU64,
    objects: AtomicU64,
    /// The files that the last manifest names; `None` while that is not known.
    named: Mutex<Option<Arc<Tables>>>,
}

impl Uploads {
    /// Counts an uploaded file.
    pub(super) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.objects.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the files that the last manifest names; `None` when it is not known, or not trusted.
    pub(super) fn name(&self, files: Option<&[ManifestFile]>) {
        let tables = |files: &[ManifestFile]| -> Tables {
            files.iter().map(|file| (file.file_number, file.bytes)).collect()
        };
        *self.named.lock() = files.map(|files| Arc::new(tables(files)));
    }
}

/// A handle to a replica's shipper.
#[derive(Clone)]
pub(crate) struct ShipHandle {
    requests: mpsc::UnboundedSender<ShipRequest>,
    duty: watch::Sender<Duty>,
    status: watch::Receiver<ShipStatus>,
    uploads: Arc<Uploads>,
}

/// The shipper's ends of its handle.
pub(super) struct ShipperEnds {
    pub(super) requests: mpsc::UnboundedReceiver<ShipRequest>,
    pub(super) duty: watch::Receiver<Duty>,
    pub(super) status: watch::Sender<ShipStatus>,
    pub(super) uploads: Arc<Uploads>,
}

/// Creates a handle with the ends that the shipper keeps.
pub(super) fn handle() -> (ShipHandle, ShipperEnds) {
    let (sender, requests) = mpsc::unbounded_channel();
    let (duty, duties) = watch::channel(Duty::default());
    let (publisher, status) = watch::channel(ShipStatus::default());
    let uploads = Arc::new(Uploads::default());
    (
        ShipHandle { requests: sender, duty, status, uploads: uploads.clone() },
        ShipperEnds { requests, duty: duties, status: publisher, uploads },
    )
}

impl ShipHandle {
    /// Makes a checkpoint and waits for its manifest.
    pub(crate) async fn checkpoint(
        &self,
        compact: Option<BandRange>,
    ) -> Result<PinnedManifest, ShipError> {
        self.ask(|done| ShipRequest::Checkpoint { compact, anew: false, done }).await
    }

    /// Uploads everything again, when this replica ships or has shipped; `None` when it has not.
    pub(crate) async fn checkpoint_anew(&self) -> Result<Option<PinnedManifest>, ShipError> {
        if !self.ships() && !self.status().has_own_objects() {
            return Ok(None);
        }
        self.ask(|done| ShipRequest::Checkpoint { compact: None, anew: true, done }).await.map(Some)
    }

    /// Waits until the bucket covers the log up to its current end; this replica ships it if no
    /// other does.
    pub(crate) async fn log(&self) -> Result<(), ShipError> {
        self.ask(|done| ShipRequest::Log { done }).await
    }

    /// Decides whether this replica ships. On a change the shipper checks its work at once.
    pub(crate) fn assign(&self, assignment: Assignment) {
        self.set(|duty| duty.assignment = assignment);
    }

    /// Sets which part of the log a running plan needs.
    pub(crate) fn set_need(&self, need: LogNeed) {
        self.set(|duty| duty.need = need);
    }

    /// Returns true when this replica ships for its shard.
    pub(crate) fn ships(&self) -> bool {
        self.duty.borrow().ships()
    }

    /// Returns the last published status.
    pub(crate) fn status(&self) -> ShipStatus {
        *self.status.borrow()
    }

    /// Returns the bytes and the number of the files that checkpoints have uploaded since the
    /// replica was opened.
    pub(crate) fn uploaded(&self) -> (u64, u64) {
        let Uploads { bytes, objects, .. } = &*self.uploads;
        (bytes.load(Ordering::Relaxed), objects.load(Ordering::Relaxed))
    }

    /// Returns the files that need no second upload: those that the last manifest names; `None` while
    /// that is not known.
    pub(crate) fn named(&self) -> Option<Arc<Tables>> {
        self.uploads.named.lock().clone()
    }

    /// Returns the LSN after which a running plan needs the log and the bucket does not hold it;
    /// `u64::MAX` when no plan needs it.
    pub(crate) fn plan_needs_after(&self) -> Lsn {
        let (need, status) = (self.duty.borrow().need, self.status());
        need.here(true, status.chained_from, status.shipped)
    }

    fn set(&self, change: impl FnOnce(&mut Duty)) {
        self.duty.send_if_modified(|duty| {
            let before = *duty;
            change(duty);
            *duty != before
        });
    }

    async fn ask<T>(&self, request: impl FnOnce(Waiter<T>) -> ShipRequest) -> Result<T, ShipError> {
        let (done, answer) = oneshot::channel();
        self.requests.send(request(done)).map_err(|_| ShipError::Stopped)?;
        answer.await.map_err(|_| ShipError::Stopped)?
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_duty_that_stays_the_same_wakes_no_shipper() {
        let (handle, mut ends) = handle();
        handle.set_need(LogNeed::NONE);
        handle.assign(Assignment::StandIn);
        assert!(handle.ships() && ends.duty.has_changed().unwrap());
        ends.duty.mark_unchanged();
        handle.set_need(LogNeed::NONE);
        handle.assign(Assignment::StandIn);
        assert!(!ends.duty.has_changed().unwrap());
        handle.assign(Assignment::Idle);
        assert!(!handle.ships() && ends.duty.has_changed().unwrap());
    }
}
