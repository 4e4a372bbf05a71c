//! One checkpoint: made in the background, uploaded in the background, published by its shipper.
//!
//! **Invariants**
//! - Everything in a manifest is read from the checkpoint, and is in the bucket before the manifest.
//! - All records in a checkpoint have been synced in the log.
//! - Files that an attempt uploaded serve the next one, unless they are so old that they may be collected.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use vasto_core::ids::Lsn;
use vasto_core::limits::UPLOAD_STALL_MAX;
use vasto_core::plan::PinnedManifest;
use vasto_core::record::{BandRange, FeedProgress};
use vasto_core::stored_key::MetaKey;
use vasto_shipping::bucket::{Bucket, Create};
use vasto_shipping::layout;
use vasto_shipping::manifest::{DatabaseFile, Manifest, ManifestFile};

use super::{BACKOFF_MAX, Pace, ShipError, Shipper, TICK, Waiter, blocking};
use crate::binlog::BinlogError;
use crate::clock::since_boot;
use crate::engine::{CheckpointView, EngineError, EngineShared};
use crate::replica::state::{Head, Ranges};
use crate::replica::{Replica, parse_vector};

/// Files of one checkpoint that wait for an upload turn concurrently.
const UPLOADS: usize = 4;

/// A checkpoint under way.
pub(super) struct Making {
    task: AbortOnDropHandle<Made>,
    waiters: Vec<Waiter>,
    /// Number of chunks that it supersedes.
    chunks: u64,
    /// True while its LSN is being fixed: no chunk may go beyond what was settled before.
    fixing: Arc<AtomicBool>,
    /// True when it trusts nothing in the bucket.
    anew: bool,
}

impl Making {
    /// Returns true when it trusts nothing in the bucket.
    pub(super) fn is_anew(&self) -> bool {
        self.anew
    }
}

/// Progress of a checkpoint.
pub(super) enum Made {
    /// The checkpoint is on the disk.
    Described(Folder, Box<Described>),
    /// Its files are in the bucket.
    Uploaded(Box<Described>, Vec<ManifestFile>, DatabaseFile),
    /// The checkpoint failed.
    Failed(ShipError),
}

/// Waits for the next step of the checkpoint under way; for ever when there is none.
pub(super) async fn made(making: &mut Option<Making>) -> Made {
    match making {
        Some(making) => (&mut making.task)
            .await
            .unwrap_or_else(|error| Made::Failed(ShipError::Checkpoint(format!("a background task failed: {error}")))),
        None => std::future::pending().await,
    }
}

/// A directory that is removed with its owner.
pub(super) struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Shipper {
    /// Returns true while the LSN of the checkpoint under way is unknown. Records that were settled before this
    /// call are in it.
    pub(super) fn is_fixing(&self) -> bool {
        self.making.as_ref().is_some_and(|making| making.fixing.load(Ordering::SeqCst))
    }

    /// Returns true from the start or request of an upload of everything until it has succeeded.
    pub(super) fn is_anew(&self) -> bool {
        self.anew || self.making.as_ref().is_some_and(|making| making.anew)
    }

    /// Begins a checkpoint of the current state unless one is under way.
    pub(super) fn begin_checkpoint(&mut self) {
        if self.making.is_none() && Instant::now() >= self.checkpoint_not_before {
            self.start(Vec::new(), Vec::new());
        }
    }

    /// Begins the requested checkpoint: a checkpoint that was begun before the request may not hold everything.
    pub(super) fn make_what_is_wanted(&mut self) {
        if self.making.is_none() && !self.wanted.is_empty() {
            let (compact, waiters): (Vec<_>, Vec<_>) = std::mem::take(&mut self.wanted).into_iter().unzip();
            self.start(compact.into_iter().flatten().collect(), waiters);
        }
    }

    fn start(&mut self, compact: Vec<BandRange>, waiters: Vec<Waiter>) {
        let (replica, engines) = (self.context.replica.clone(), self.context.engines.clone());
        let folder = Folder(self.context.tmp.join(format!("checkpoint-{:016x}", rand::random::<u64>())));
        let last = self.state.manifest.as_ref().map(|manifest| manifest.lsn);
        let fixing = Arc::new(AtomicBool::new(false));
        let fixes = fixing.clone();
        let anew = std::mem::take(&mut self.anew);
        if anew {
            self.last = None;
        }
        let task = tokio::spawn(async move {
            match make(replica, engines, &folder.0, compact, last, anew, fixes).await {
                Ok(described) => Made::Described(folder, Box::new(described)),
                Err(error) => Made::Failed(error),
            }
        });
        let task = AbortOnDropHandle::new(task);
        self.making = Some(Making { task, waiters, chunks: self.state.chunks, fixing, anew });
    }

    /// Advances the checkpoint under way.
    pub(super) async fn go_on(&mut self, made: Made) {
        let done = match made {
            Made::Described(folder, described) => match self.upload(folder, described).await {
                Ok(None) => return,
                Ok(Some(known)) => Ok(known),
                Err(error) => Err(error),
            },
            Made::Uploaded(described, files, database) => self.publish(*described, files, database).await,
            Made::Failed(error) => Err(error),
        };
        let (waiters, anew) = self.making.take().map(|making| (making.waiters, making.anew)).unwrap_or_default();
        match &done {
            Ok(_) => (self.checkpoint_pause, self.checkpoint_trouble) = (TICK, None),
            Err(error) => {
                if let ShipError::Foreign(key) = error {
                    self.give_up(key);
                }
                self.anew |= anew;
                let passes = matches!(error, ShipError::Filling | ShipError::Stopped);
                self.checkpoint_trouble = (!passes).then(|| error.to_string());
                self.checkpoint_pause = (self.checkpoint_pause * 2).min(BACKOFF_MAX);
                self.checkpoint_not_before = Instant::now() + self.checkpoint_pause;
                if waiters.is_empty() {
                    self.fail(error);
                }
            }
        }
        let text = done.as_ref().err().map(ToString::to_string);
        let mut first = Some(done);
        for waiter in waiters {
            let answer = first.take().unwrap_or_else(|| Err(ShipError::Checkpoint(text.clone().unwrap_or_default())));
            if let (Ok(pinned), None) = (&answer, &first) {
                first = Some(Ok(pinned.clone()));
            }
            let _ = waiter.send(answer);
        }
        if let Err(error) = self.cover().await {
            self.fail(&error);
        }
        self.make_what_is_wanted();
    }

    /// Starts the upload of the files; returns the last manifest when nothing has changed since.
    async fn upload(&mut self, folder: Folder, described: Box<Described>) -> Result<Option<PinnedManifest>, ShipError> {
        if let Some(making) = &self.making {
            making.fixing.store(false, Ordering::SeqCst);
        }
        let replica = self.context.replica.clone();
        let lsn = described.head.applied_lsn;
        if let Some(manifest) = self.state.manifest.as_ref().filter(|manifest| manifest.lsn == lsn) {
            return Ok(Some(manifest.clone()));
        }
        if lsn > replica.log().synced_lsn() {
            return Err(ShipError::Checkpoint("it holds records that the log has not synced".into()));
        }
        if !self.making.as_ref().is_some_and(|making| making.anew) {
            self.load_last().await?;
        }
        if self.ships() {
            self.go_on_behind_others().await?;
        }
        // The log up to here is shipped too, so that every time in between can be restored; not for the first
        // checkpoint of a replica that began with more than its log holds.
        let chained = self.ships() && self.may_ship_chunks();
        while chained && self.state.shipped_lsn < lsn {
            let before = self.state.shipped_lsn;
            match self.ship_chunk(lsn).await {
                // The checkpoint supersedes the chunk.
                Err(ShipError::Log(BinlogError::TooOld { .. }) | ShipError::InTheWay { .. }) => break,
                other => other?,
            }
            if self.state.shipped_lsn == before {
                return Err(ShipError::Checkpoint("its log cannot be read up to it".into()));
            }
        }
        let upload = Upload {
            replica,
            bucket: self.context.bucket.clone(),
            pace: self.context.pace.clone(),
            last: self.last.as_ref().map(|last| last.files.clone()).unwrap_or_default(),
            uploaded: self.uploaded.clone(),
        };
        let task = tokio::spawn(async move {
            let files = async {
                let files = upload.files(&folder.0, &described).await?;
                Ok::<_, ShipError>((files, upload.database(&folder.0, lsn).await?))
            };
            match files.await {
                Ok((files, database)) => Made::Uploaded(described, files, database),
                Err(error) => Made::Failed(error),
            }
        });
        if let Some(making) = &mut self.making {
            making.chunks = self.state.chunks;
            making.task = AbortOnDropHandle::new(task);
        }
        Ok(None)
    }

    /// Loads the last manifest, which names the SSTs that need no second upload.
    async fn load_last(&mut self) -> Result<(), ShipError> {
        let known = self.state.manifest.as_ref().map(|pinned| &pinned.key).or(self.state.inherited.as_ref());
        if let (None, Some(key)) = (&self.last, known) {
            let bytes = self.context.bucket.get(key).await?;
            // A missing or damaged manifest is no help: everything is uploaded.
            self.last = bytes.and_then(|bytes| Manifest::decode(&bytes).ok());
        }
        Ok(())
    }

    #[tracing::instrument(name = "publish a checkpoint", skip_all, fields(keyspace = self.context.replica.keyspace.0, shard = self.context.replica.shard.0))]
    async fn publish(
        &mut self,
        described: Described,
        files: Vec<ManifestFile>,
        database: DatabaseFile,
    ) -> Result<PinnedManifest, ShipError> {
        let replica = &self.context.replica;
        let lsn = described.head.applied_lsn;
        let superseded = self.making.as_ref().map_or(0, |making| making.chunks);
        let age = self.uploaded.age_of(&files);
        if age > UPLOAD_STALL_MAX {
            self.last = None; // what it names may have gone with the manifests that named it before
            self.uploaded.forget();
            return Err(ShipError::Stalled(age));
        }
        let key = layout::manifest(replica.keyspace, replica.shard, replica.id, lsn);
        let mut manifest = Manifest {
            keyspace: replica.keyspace,
            shard: replica.shard,
            replica: replica.id,
            incarnation: replica.incarnation(),
            epoch: described.head.epoch,
            version: described.head.version,
            lsn,
            vector: described.vector,
            event_time_max: described.head.event_time_max,
            commit_time_max: described.head.commit_time_max,
            floor: described.head.floor,
            created_at_us: self.context.clock.now_us(),
            nonce: rand::random(),
            previous: self.state.manifest.as_ref().map(|manifest| manifest.key.clone()),
            range_states: described.ranges.runs(),
            files,
            database: Some(database),
        };
        if let Create::Exists(found) = self.context.bucket.create(&key, manifest.encode()).await? {
            // Written by this very opening before ship.json was: the same state, with its own objects.
            // Another state is another history of this replica, and must not stand for this one.
            // An unreadable object, or one that belongs elsewhere, is no history of this replica at all.
            let in_the_way = |what: String| ShipError::InTheWay { key: key.clone(), what };
            let found = Manifest::decode(&found).map_err(|error| in_the_way(error.to_string()))?;
            let place = |one: &Manifest| (one.keyspace, one.shard, one.replica, one.lsn);
            if place(&found) != place(&manifest) {
                return Err(in_the_way("it belongs elsewhere".to_owned()));
            }
            if !same_state(&found, &manifest) {
                return Err(ShipError::Foreign(key));
            }
            manifest = found;
        }
        let pinned = PinnedManifest { key: key.clone(), lsn };
        tracing::info!(
            keyspace = replica.keyspace.0,
            shard = replica.shard.0,
            lsn = lsn.0,
            files = manifest.files.len(),
            bytes = manifest.bytes(),
            "checkpoint shipped"
        );
        self.state.manifest = Some(pinned.clone());
        self.state.inherited = None;
        self.published = Some(Instant::now());
        self.uploaded.forget();
        self.state.chunks = self.state.chunks.saturating_sub(superseded);
        if lsn > self.state.shipped_lsn {
            // Records in between are in no chunk.
            self.state.chained_from = Some(lsn);
            self.state.shipped_lsn = lsn;
            self.state.previous = Some(key);
        }
        self.last = Some(manifest);
        self.save()?;
        Ok(pinned)
    }
}

/// The uploads of one checkpoint.
struct Upload {
    replica: Replica,
    bucket: Bucket,
    pace: Arc<Pace>,
    /// Files that are in the bucket already.
    last: Vec<ManifestFile>,
    uploaded: Arc<Uploaded>,
}

/// Key, checksum and upload time of an uploaded file, by the clock that continues while the machine sleeps.
type UploadedFile = (String, u32, Duration);

/// Files that were uploaded and that no manifest names yet, by number and size.
#[derive(Default)]
pub(super) struct Uploaded(Mutex<HashMap<(u64, u64), UploadedFile>>);

impl Uploaded {
    fn find(&self, file: &ManifestFile) -> Option<(String, u32)> {
        self.0.lock().get(&(file.file_number, file.bytes)).map(|(key, crc32c, _)| (key.clone(), *crc32c))
    }

    fn add(&self, file: &ManifestFile, key: String, crc32c: u32) {
        self.0.lock().insert((file.file_number, file.bytes), (key, crc32c, since_boot()));
    }

    /// Returns how long ago the first of these files was uploaded, of those that no manifest names.
    fn age_of(&self, files: &[ManifestFile]) -> Duration {
        let known = self.0.lock();
        let times = files.iter().filter_map(|file| Some(known.get(&(file.file_number, file.bytes))?.2));
        times.min().map_or(Duration::ZERO, |first| since_boot().saturating_sub(first))
    }

    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }
}

impl Upload {
    async fn files(&self, dir: &Path, described: &Described) -> Result<Vec<ManifestFile>, ShipError> {
        let replica = &self.replica;
        let attempt = format!("{:08x}", rand::random::<u32>());
        let mut uploads = Vec::with_capacity(described.files.len());
        for file in described.files.iter().cloned() {
            let known =
                self.last.iter().find(|known| known.file_number == file.file_number && known.bytes == file.bytes);
            let known = known.map(|known| (known.key.clone(), known.crc32c)).or_else(|| self.uploaded.find(&file));
            let key = layout::sst(replica.keyspace, replica.shard, replica.id, file.file_number, &attempt);
            let path = dir.join(format!("{:06}.sst", file.file_number));
            uploads.push(async move {
                let (key, crc32c) = match known {
                    Some(known) => known,
                    None => {
                        let _turn = self.pace.turn(file.bytes).await;
                        let uploaded = self.bucket.upload_file(&key, &path).await?;
                        self.uploaded.add(&file, key.clone(), uploaded.crc32c);
                        (key, uploaded.crc32c)
                    }
                };
                Ok::<_, ShipError>(ManifestFile { key, crc32c, ..file })
            });
        }
        futures::stream::iter(uploads).buffered(UPLOADS).try_collect().await
    }

    /// Uploads the database's own list of its files, with which the files open as they are.
    async fn database(&self, dir: &Path, lsn: Lsn) -> Result<DatabaseFile, ShipError> {
        let odd = |what: String| ShipError::Checkpoint(what);
        let current = tokio::fs::read_to_string(dir.join("CURRENT")).await;
        let name = current.map_err(|error| odd(format!("its CURRENT cannot be read: {error}")))?.trim().to_owned();
        let replica = &self.replica;
        let attempt = format!("{:08x}", rand::random::<u32>());
        let key = layout::database(replica.keyspace, replica.shard, replica.id, lsn, &attempt);
        let path = dir.join(&name);
        let bytes = tokio::fs::metadata(&path).await.map_or(0, |found| found.len());
        let _turn = self.pace.turn(bytes).await;
        let uploaded = self.bucket.upload_file(&key, &path).await?;
        Ok(DatabaseFile { key, name, bytes: uploaded.bytes, crc32c: uploaded.crc32c })
    }
}

/// Makes the checkpoint, after rewriting the bands that a plan is about to read.
async fn make(
    replica: Replica,
    engines: EngineShared,
    dir: &Path,
    compact: Vec<BandRange>,
    last: Option<Lsn>,
    anew: bool,
    fixing: Arc<AtomicBool>,
) -> Result<Described, ShipError> {
    if replica.ranges().is_being_filled() {
        return Err(ShipError::Filling); // it may be begun again, under the same names
    }
    let mut compacted = false;
    for range in compact {
        let replica = replica.clone();
        compacted |= blocking(move || compact_if_it_pays(&replica, range)).await?;
    }
    if (compacted && last == Some(replica.settled_lsn())) || anew {
        // The same records in other files, or under other names: a manifest of their own needs an LSN of its own.
        replica.apply(Vec::new(), vec![FeedProgress::Tail(replica.id, replica.settled_lsn())]).await?;
    }
    let path = dir.to_owned();
    fixing.store(true, Ordering::SeqCst);
    blocking(move || {
        replica.engine().checkpoint(&path)?;
        describe(&engines, &path)
    })
    .await
}

/// Returns true when two manifests describe the same records of the same opening of a replica.
fn same_state(a: &Manifest, b: &Manifest) -> bool {
    let state = |manifest: &Manifest| {
        (manifest.replica, manifest.incarnation, manifest.lsn, manifest.commit_time_max, manifest.event_time_max)
    };
    state(a) == state(b) && a.vector == b.vector
}

/// Contents of a checkpoint, read from the checkpoint itself.
pub(super) struct Described {
    head: Head,
    ranges: Ranges,
    vector: vasto_core::ids::Vector,
    files: Vec<ManifestFile>,
}

fn describe(engines: &EngineShared, dir: &Path) -> Result<Described, ShipError> {
    let odd = |what: &str| ShipError::Checkpoint(what.to_owned());
    let view = CheckpointView::open(engines, dir)?;
    let head = view.get(&MetaKey::Head.encode())?.ok_or_else(|| odd("it has no head"))?;
    let ranges = view.get(&MetaKey::RangeStates.encode())?.ok_or_else(|| odd("it has no range states"))?;
    let files = view
        .files()?
        .into_iter()
        .map(|file| {
            let number = file.name.trim_start_matches('/').trim_end_matches(".sst");
            Ok(ManifestFile {
                key: String::new(),
                file_number: number.parse().map_err(|_| odd(&format!("{} is not an SST", file.name)))?,
                bytes: file.size as u64,
                crc32c: 0,
                level: file.level,
                smallest_seqno: file.smallest_seqno,
                largest_seqno: file.largest_seqno,
                first_key: file.start_key.ok_or_else(|| odd("an SST without a first key"))?,
                last_key: file.end_key.ok_or_else(|| odd("an SST without a last key"))?,
                entries: file.num_entries,
            })
        })
        .collect::<Result<Vec<_>, ShipError>>()?;
    Ok(Described {
        head: Head::decode(&head).map_err(|error| odd(&error.to_string()))?,
        ranges: Ranges::decode(&ranges).map_err(|error| odd(&error.to_string()))?,
        vector: parse_vector(&view.with_prefix(&MetaKey::vector_prefix())?),
        files,
    })
}

/// Rewrites the bands if that pays. A reader of the bands must fetch every file that touches them: when files that
/// reach beyond the bands are more than a tenth of it, rewriting the bands first is cheaper than shipping them.
fn compact_if_it_pays(replica: &Replica, range: BandRange) -> Result<bool, EngineError> {
    let engine = replica.engine();
    engine.flush()?;
    let (inside, crossing) = engine.band_bytes(range)?;
    let pays = crossing > inside / 10;
    if pays {
        engine.compact_bands(range);
    }
    Ok(pays)
}
