//! The checkpoints of one replica: made in the background (`make`), uploaded in the background
//! (`upload`), published here.
//!
//! **Invariants**
//! - Everything that a manifest names is in the bucket before the manifest.
//! - All records in a checkpoint have been synced in the log.
//! - A chunk ends at the LSN of a checkpoint, so that the next one begins exactly after it; where
//!   chunks cannot reach that LSN, the checkpoint supersedes them and their chain begins anew
//!   there.
//!
//! Leaks: SSTs of a checkpoint that did not reach its manifest (removed by garbage collection).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use vasto_core::limits::UPLOAD_STALL_MAX;
use vasto_core::plan::PinnedManifest;
use vasto_core::record::BandRange;
use vasto_shipping::bucket::Create;
use vasto_shipping::layout;
use vasto_shipping::manifest::{DatabaseFile, Manifest, ManifestFile};

use super::backoff::Backoff;
use super::chunks::{Chunks, UnderWay};
use super::context::ShipContext;
use super::error::ShipError;
use super::existing::take_existing;
use super::handle::{Uploads, Waiter};
use crate::binlog::BinlogError;

mod make;
mod upload;

use make::{Described, Folder, Order, make};
use upload::{Upload, Uploaded};

/// A checkpoint under way.
struct Making {
    task: AbortOnDropHandle<Step>,
    waiters: Vec<Waiter<PinnedManifest>>,
    /// Number of chunks that it supersedes.
    chunks: u64,
    under_way: UnderWay,
}

/// The result of a background task of a checkpoint.
pub(super) enum Step {
    /// The checkpoint is on the disk.
    Described(Folder, Box<Described>),
    /// Its files are in the bucket.
    Uploaded(Box<Described>, Vec<ManifestFile>, DatabaseFile),
    /// The checkpoint failed.
    Failed(ShipError),
}

/// A checkpoint that has ended, and the requests that wait for it.
pub(super) struct Ended {
    pub(super) result: Result<PinnedManifest, ShipError>,
    waiters: Vec<Waiter<PinnedManifest>>,
}

impl Ended {
    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// Answers the requests: the first one with the error itself, the others with its text.
    pub(super) fn answer(self) {
        let mut waiters = self.waiters.into_iter();
        let Some(first) = waiters.next() else { return };
        for waiter in waiters {
            let error = |error: &ShipError| ShipError::Checkpoint(error.to_string());
            let _ = waiter.send(self.result.as_ref().map(PinnedManifest::clone).map_err(error));
        }
        let _ = first.send(self.result);
    }
}

/// The checkpoints of one replica: at most one is under way.
pub(super) struct Checkpoints {
    context: Arc<ShipContext>,
    making: Option<Making>,
    /// Requests for the following checkpoint.
    requests: Vec<(Option<BandRange>, Waiter<PinnedManifest>)>,
    /// The last manifest, once it is loaded: it names the SSTs that need no second upload.
    last: Option<Manifest>,
    /// When the last checkpoint was published.
    published: Option<Instant>,
    /// Delays unrequested checkpoints after failures.
    pub(super) backoff: Backoff,
    /// Files uploaded by attempts that did not reach their manifest.
    uploaded: Arc<Uploaded>,
    /// Counts what is uploaded.
    uploads: Arc<Uploads>,
    /// The next checkpoint trusts nothing in the bucket.
    anew: bool,
    /// Why the last checkpoint failed.
    trouble: Option<String>,
}

impl Checkpoints {
    pub(super) fn new(context: Arc<ShipContext>, uploads: Arc<Uploads>) -> Self {
        Self {
            context,
            making: None,
            requests: Vec::new(),
            last: None,
            published: None,
            backoff: Backoff::new(),
            uploaded: Arc::default(),
            uploads,
            anew: false,
            trouble: None,
        }
    }

    /// Returns the checkpoint under way.
    pub(super) fn under_way(&self) -> Option<&UnderWay> {
        self.making.as_ref().map(|making| &making.under_way)
    }

    /// Returns true when the next checkpoint is to upload everything.
    pub(super) fn is_anew_next(&self) -> bool {
        self.anew
    }

    /// Returns true from the start or request of an upload of everything until it has succeeded.
    pub(super) fn is_anew(&self) -> bool {
        self.anew || self.under_way().is_some_and(|under_way| under_way.anew)
    }

    /// Returns true when no checkpoint is under way, or owed.
    pub(super) fn is_idle(&self) -> bool {
        self.making.is_none() && !self.anew && self.trouble.is_none()
    }

    /// Returns why the last checkpoint failed.
    pub(super) fn trouble(&self) -> Option<&String> {
        self.trouble.as_ref()
    }

    /// Returns true when the last checkpoint was published less than `apart` ago.
    pub(super) fn is_recent(&self, apart: Duration) -> bool {
        self.published.is_some_and(|at| at.elapsed() < apart)
    }

    /// Ends the checkpoint under way; what failed before is no fault of a shipper that ends. An
    /// upload of everything that is cut off stays owed: no write is acknowledged on top of what it
    /// was to replace.
    pub(super) fn end(&mut self) {
        self.anew = self.is_anew();
        (self.making, self.trouble) = (None, None);
    }

    /// Makes the next checkpoint upload everything.
    pub(super) fn distrust(&mut self) {
        self.anew = true;
        self.uploaded.forget();
    }

    /// Adds a request for a checkpoint of the current state. The `compact` bands are rewritten
    /// first if that pays.
    pub(super) fn request(&mut self, compact: Option<BandRange>, done: Waiter<PinnedManifest>) {
        self.requests.push((compact, done));
    }

    /// Begins a checkpoint of the current state unless one is under way.
    pub(super) fn begin(&mut self, chunks: &Chunks) {
        if self.making.is_none() && self.backoff.is_over() {
            self.start(Vec::new(), Vec::new(), chunks);
        }
    }

    /// Begins the requested checkpoint: a checkpoint that was begun before the request may not hold
    /// everything.
    pub(super) fn begin_requested(&mut self, chunks: &Chunks) {
        if self.making.is_none() && !self.requests.is_empty() {
            let (compact, waiters): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.requests).into_iter().unzip();
            self.start(compact.into_iter().flatten().collect(), waiters, chunks);
        }
    }

    fn start(
        &mut self,
        compact: Vec<BandRange>,
        waiters: Vec<Waiter<PinnedManifest>>,
        chunks: &Chunks,
    ) {
        let (replica, engines) = (self.context.replica.clone(), self.context.engines.clone());
        let folder = Folder::new_in(&self.context.tmp);
        let under_way = UnderWay::new(std::mem::take(&mut self.anew));
        if under_way.anew {
            self.keep(None);
        }
        let order =
            Order { compact, last: chunks.state().manifest_lsn(), under_way: under_way.clone() };
        let task = tokio::spawn(async move {
            match make(replica, engines, folder.path(), order).await {
                Ok(described) => Step::Described(folder, Box::new(described)),
                Err(error) => Step::Failed(error),
            }
        });
        let task = AbortOnDropHandle::new(task);
        self.making = Some(Making { task, waiters, chunks: chunks.state().chunks, under_way });
    }

    /// Waits for the next step of the checkpoint under way; for ever when there is none.
    pub(super) async fn next(&mut self) -> Step {
        match &mut self.making {
            Some(making) => (&mut making.task).await.unwrap_or_else(|error| {
                Step::Failed(ShipError::Checkpoint(format!("a background task failed: {error}")))
            }),
            None => std::future::pending().await,
        }
    }

    /// Advances the checkpoint under way; returns it once it has ended.
    pub(super) async fn advance(&mut self, step: Step, chunks: &mut Chunks) -> Option<Ended> {
        let mut making = self.making.take()?;
        let result = match step {
            Step::Described(folder, described) => {
                match self.upload(&mut making, folder, described, chunks).await.transpose() {
                    Some(result) => result,
                    None => {
                        self.making = Some(making);
                        return None;
                    }
                }
            }
            Step::Uploaded(described, files, database) => {
                self.publish(making.chunks, *described, files, database, chunks).await
            }
            Step::Failed(error) => Err(error),
        };
        match &result {
            Ok(_) => {
                self.backoff.succeeded();
                self.trouble = None;
            }
            Err(error) => {
                self.anew |= making.under_way.anew;
                let passes = matches!(error, ShipError::Filling | ShipError::Stopped);
                self.trouble = (!passes).then(|| error.to_string());
                self.backoff.failed(1.0);
            }
        }
        Some(Ended { result, waiters: making.waiters })
    }

    /// Starts the upload of the files; returns the last manifest when nothing has changed since.
    async fn upload(
        &mut self,
        making: &mut Making,
        folder: Folder,
        described: Box<Described>,
        chunks: &mut Chunks,
    ) -> Result<Option<PinnedManifest>, ShipError> {
        making.under_way.set_fixing(false);
        let lsn = described.head.applied_lsn;
        if let Some(manifest) =
            chunks.state().manifest.as_ref().filter(|manifest| manifest.lsn == lsn)
        {
            return Ok(Some(manifest.clone()));
        }
        if lsn > self.context.replica.log().synced_lsn() {
            return Err(ShipError::Checkpoint(
                "it holds records that the log has not synced".into(),
            ));
        }
        if !making.under_way.anew {
            self.load_last(chunks).await?;
        }
        if chunks.ships() {
            chunks.continue_after_others().await?;
        }
        // The log up to here is shipped too, so that every time in between can be restored; not for
        // the first checkpoint of a replica that began with more than its log holds.
        let chained = chunks.ships() && chunks.are_usable();
        while chained && chunks.state().shipped_lsn < lsn {
            match chunks.ship_chunk(lsn, Some(&making.under_way)).await {
                // The checkpoint supersedes the chunk.
                Err(ShipError::Log(BinlogError::TooOld { .. }) | ShipError::InTheWay { .. }) => {
                    break;
                }
                Ok(false) => {
                    return Err(ShipError::Checkpoint("its log cannot be read up to it".into()));
                }
                shipped => shipped?,
            };
        }
        let is_covered = chained && chunks.state().shipped_lsn >= lsn;
        let upload = Upload {
            context: self.context.clone(),
            acknowledges: making.under_way.anew || !is_covered,
            last: self.last.as_ref().map(|last| last.files.clone()).unwrap_or_default(),
            uploaded: self.uploaded.clone(),
            uploads: self.uploads.clone(),
        };
        let task = tokio::spawn(async move {
            let files = async {
                let files = upload.files(folder.path(), &described.files).await?;
                Ok::<_, ShipError>((files, upload.database(folder.path(), lsn).await?))
            };
            match files.await {
                Ok((files, database)) => Step::Uploaded(described, files, database),
                Err(error) => Step::Failed(error),
            }
        });
        making.chunks = chunks.state().chunks;
        making.task = AbortOnDropHandle::new(task);
        Ok(None)
    }

    /// Loads the last manifest, which names the SSTs that need no second upload.
    async fn load_last(&mut self, chunks: &Chunks) -> Result<(), ShipError> {
        let state = chunks.state();
        let key = state.manifest.as_ref().map(|pinned| &pinned.key).or(state.inherited.as_ref());
        if let (None, Some(key)) = (&self.last, key) {
            let bytes = self.context.bucket.get(key).await?;
            // A missing or damaged manifest is no help: everything is uploaded.
            self.keep(bytes.and_then(|bytes| Manifest::decode(&bytes).ok()));
        }
        Ok(())
    }

    /// Keeps the last manifest, whose files need no second upload.
    fn keep(&mut self, last: Option<Manifest>) {
        self.uploads.name(last.as_ref().map(|last| last.files.as_slice()));
        self.last = last;
    }

    #[tracing::instrument(name = "publish a checkpoint", skip_all, fields(keyspace = self.context.replica.keyspace.0, shard = self.context.replica.shard.0))]
    async fn publish(
        &mut self,
        superseded: u64,
        described: Described,
        files: Vec<ManifestFile>,
        database: DatabaseFile,
        chunks: &mut Chunks,
    ) -> Result<PinnedManifest, ShipError> {
        let age = self.uploaded.age_of(&files);
        if age > UPLOAD_STALL_MAX {
            // What it names may have gone with the manifests that named it before.
            self.keep(None);
            self.uploaded.forget();
            return Err(ShipError::Stalled(age));
        }
        let previous = chunks.state().manifest.as_ref().map(|manifest| manifest.key.clone());
        let mut manifest = described.manifest(&self.context, files, database, previous);
        let key =
            layout::manifest(manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn);
        if let Create::Exists(existing) =
            self.context.bucket.create(&key, manifest.encode()).await?
        {
            let place = |manifest: &Manifest| {
                (manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn)
            };
            // The same state, with its own objects: written by this very opening before ship.json
            // was.
            manifest =
                take_existing(&key, Manifest::decode(&existing), &manifest, place, same_state)?;
        }
        let pinned = PinnedManifest { key, lsn: manifest.lsn };
        tracing::info!(
            keyspace = manifest.keyspace.0,
            shard = manifest.shard.0,
            lsn = manifest.lsn.0,
            files = manifest.files.len(),
            bytes = manifest.bytes(),
            "checkpoint shipped"
        );
        self.published = Some(Instant::now());
        self.uploaded.forget();
        self.keep(Some(manifest));
        chunks.add_manifest(pinned.clone(), superseded)?;
        Ok(pinned)
    }
}

/// Returns true when two manifests describe the same records of the same opening of a replica.
fn same_state(a: &Manifest, b: &Manifest) -> bool {
    let state = |manifest: &Manifest| {
        (
            manifest.replica,
            manifest.incarnation,
            manifest.lsn,
            manifest.commit_time_max,
            manifest.event_time_max,
        )
    };
    state(a) == state(b) && a.vector == b.vector
}
