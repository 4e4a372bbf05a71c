//! Ships one replica to the bucket: chunks of its log, and checkpoints.
//!
//! Order: SSTs, verified, then the manifest. One task does chunks and checkpoints in turn, so the
//! chunk after a manifest begins exactly behind the manifest's LSN.
//!
//! **Invariants**
//! - Only settled records (synced and applied) are shipped; names are never reused: what exists
//!   under a chunk's name is compared, not overwritten.
//! - An SST is uploaded again unless the last manifest of this very replica names it.
//! - The log is truncated only behind what is persisted in the database **and** covered by the
//!   bucket **and** not needed by a running plan; at the byte cap the bucket's cover is given up.
//! - An outage of the bucket never stops serving. An idle replica makes no requests.
//!
//! What leaks: SSTs of a checkpoint that did not reach its manifest (garbage collection's work).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::Lsn;
use vasto_core::limits::{CHECKPOINT_LOG_BYTES, CHUNK_BYTES_MAX};
use vasto_core::plan::PinnedManifest;
use vasto_core::record::BandRange;
use vasto_core::stored_key::MetaKey;
use vasto_shipping::bucket::{Bucket, BucketError, Create};
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout;
use vasto_shipping::manifest::{DatabaseFile, Manifest, ManifestFile};

use crate::binlog::BinlogError;
use crate::clock::SharedClock;
use crate::engine::{CheckpointView, EngineError, EngineShared};
use crate::node_dir::{DirError, read_json, write_json};
use crate::replica::state::{Head, Ranges};
use crate::replica::{Replica, parse_vector};

/// Uploads of one checkpoint at a time.
const UPLOADS: usize = 4;
/// Between two looks at whether something is due.
const TICK: Duration = Duration::from_millis(500);
/// Longest pause after failures.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Why shipping failed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] BinlogError),
    /// A local file failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// Something else is in the bucket under this replica's name.
    #[error(
        "object {0} exists with other content: does another process use a copy of this data directory? Stop one of them"
    )]
    Foreign(String),
    /// A file of the checkpoint cannot be understood.
    #[error("the checkpoint cannot be described: {0}")]
    Checkpoint(String),
    /// The shipper has ended.
    #[error("the node is stopping")]
    Stopped,
}

/// What the bucket covers, for reports and truncation.
#[derive(Debug, Default)]
pub struct Positions {
    /// Chunks and manifests cover the log up to here.
    pub shipped: AtomicU64,
    /// The last manifest covers the log up to here.
    pub manifest: AtomicU64,
    /// A running plan needs the log after here; `u64::MAX` when none does, 0 until that is known.
    pub needed_after: AtomicU64,
    /// The log is at its cap and only a running plan keeps it: the plan has to end.
    pub over_cap: AtomicBool,
    /// The log is at its cap and only a follower keeps it: that one has to go.
    pub held_back: AtomicBool,
    /// This replica is the one of its shard that ships.
    pub ships: AtomicBool,
}

/// Persisted in `ship.json`; only a hint: what the bucket holds decides.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct ShipState {
    shipped_lsn: Lsn,
    manifest: Option<PinnedManifest>,
    previous: Option<String>,
    /// The log does not hold what the replica began with: a checkpoint comes before the first chunk.
    #[serde(default)]
    began_full: bool,
}

/// Notes for a replica that is not open yet that its log does not hold everything.
pub(crate) fn begin_with_a_checkpoint(dir: &Path) -> Result<(), DirError> {
    write_json(&dir.join("ship.json"), &ShipState { began_full: true, ..ShipState::default() })
}

/// What a shipper is asked for.
pub enum ShipRequest {
    /// A checkpoint of now. With `compact`, these bands are rewritten first when that saves readers
    /// more than it costs.
    Checkpoint {
        /// Bands that somebody is about to read.
        compact: Option<BandRange>,
        /// Answers with the manifest.
        done: oneshot::Sender<Result<PinnedManifest, ShipError>>,
    },
}

/// A handle to a replica's shipper.
#[derive(Clone)]
pub struct ShipHandle {
    requests: mpsc::UnboundedSender<ShipRequest>,
    /// What the bucket covers.
    pub positions: Arc<Positions>,
}

impl ShipHandle {
    /// Makes a checkpoint and waits for its manifest.
    pub async fn checkpoint(&self, compact: Option<BandRange>) -> Result<PinnedManifest, ShipError> {
        let (done, answer) = oneshot::channel();
        self.requests.send(ShipRequest::Checkpoint { compact, done }).map_err(|_| ShipError::Stopped)?;
        answer.await.map_err(|_| ShipError::Stopped)?
    }
}

/// What a shipper works with.
pub struct ShipContext {
    /// The replica.
    pub replica: Replica,
    /// Where to.
    pub bucket: Bucket,
    /// Its directory, for `ship.json`.
    pub dir: PathBuf,
    /// A place for checkpoints on the same file system.
    pub tmp: PathBuf,
    /// To open checkpoints.
    pub engines: EngineShared,
    /// For the time in manifests.
    pub clock: SharedClock,
    /// Between two chunks.
    pub interval: Duration,
    /// Bytes of log that are kept, at most.
    pub log_cap: u64,
}

struct Shipper {
    context: ShipContext,
    positions: Arc<Positions>,
    state: ShipState,
    last: Option<Manifest>,
    dirty_since: Option<Instant>,
    /// Somebody has wanted the bucket's confirmation from here: from then on it ships too.
    for_acks: bool,
    pause: Duration,
    not_before: Instant,
}

/// Starts a shipper; it ends when `cancel` fires, after it has shipped what is due.
pub fn start(context: ShipContext, cancel: CancellationToken) -> (ShipHandle, impl Future<Output = ()> + Send) {
    let positions = Arc::new(Positions::default());
    let (requests, receiver) = mpsc::unbounded_channel();
    let handle = ShipHandle { requests, positions: positions.clone() };
    let shipper = async move {
        let state: ShipState = match read_json(&context.dir.join("ship.json")) {
            Ok(state) => state.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "the shipping position is lost; the next checkpoint replaces it");
                ShipState::default()
            }
        };
        positions.shipped.store(state.shipped_lsn.0, Ordering::Release);
        positions.manifest.store(state.manifest.as_ref().map_or(0, |manifest| manifest.lsn.0), Ordering::Release);
        let now = Instant::now();
        let shipper = Shipper {
            context,
            positions,
            state,
            last: None,
            dirty_since: None,
            for_acks: false,
            pause: TICK,
            not_before: now,
        };
        shipper.run(receiver, cancel).await;
    };
    (handle, shipper)
}

impl Shipper {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<ShipRequest>, cancel: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let wanted = self.context.replica.clone();
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                request = requests.recv() => match request {
                    Some(ShipRequest::Checkpoint { compact, done }) => {
                        let result = self.checkpoint(compact).await;
                        let _ = done.send(result);
                    }
                    None => break,
                },
                () = wanted.bucket_acks().wanted() => {
                    self.for_acks = true;
                    if Instant::now() >= self.not_before
                        && let Err(error) = self.ship_for_acks().await
                    {
                        self.fail(&error);
                    }
                }
                _ = tick.tick() => {
                    if Instant::now() >= self.not_before
                        && let Err(error) = self.ship_what_is_due().await
                    {
                        self.fail(&error);
                    }
                }
            }
        }
        // The rest of the log goes out with the node, if the bucket answers.
        while self.ships()
            && !self.context.replica.ranges().is_being_filled()
            && (self.state.manifest.is_some() || !self.began_full())
            && self.state.shipped_lsn < self.context.replica.settled_lsn()
        {
            if let Err(error) = self.ship_chunk(Lsn(u64::MAX)).await {
                tracing::warn!(%error, "the last chunk was not shipped");
                break;
            }
        }
    }

    /// The next attempt is made a little later each time.
    fn fail(&mut self, error: &ShipError) {
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        self.not_before = Instant::now() + self.pause.mul_f64(rand::random_range(0.5..1.0));
        tracing::warn!(
            %error,
            keyspace = self.context.replica.keyspace.0,
            shard = self.context.replica.shard.0,
            retry_in_ms = self.pause.as_millis() as u64,
            "shipping failed"
        );
    }

    /// Ships until everybody who waits for the bucket is covered.
    async fn ship_for_acks(&mut self) -> Result<(), ShipError> {
        while let Some(wanted) = self.context.replica.bucket_acks().last() {
            if self.state.shipped_lsn >= wanted {
                self.context.replica.bucket_acks().covered(self.state.shipped_lsn);
                break;
            }
            self.ship_the_log().await?;
            if self.state.shipped_lsn < wanted {
                tokio::time::sleep(Duration::from_millis(1)).await; // its record is about to be settled
            }
        }
        self.pause = TICK;
        Ok(())
    }

    async fn ship_what_is_due(&mut self) -> Result<(), ShipError> {
        let shipped = self.ship_log().await;
        // Also while the bucket is away: the log stays bounded.
        self.truncate().await?;
        shipped?;
        self.pause = TICK;
        Ok(())
    }

    /// The replica began with more than its log holds.
    fn began_full(&self) -> bool {
        self.state.began_full || self.context.replica.ranges().ingested.is_some()
    }

    fn ships(&self) -> bool {
        self.positions.ships.load(Ordering::Acquire) || self.for_acks
    }

    async fn ship_log(&mut self) -> Result<(), ShipError> {
        let replica = self.context.replica.clone();
        if !self.ships() {
            return Ok(()); // another replica of the shard does
        }
        if replica.ranges().is_being_filled() {
            return Ok(()); // it may be begun again, under the same names
        }
        let settled = replica.settled_lsn();
        if settled > self.state.shipped_lsn {
            let since = *self.dirty_since.get_or_insert_with(Instant::now);
            let backlog = replica.log().bytes_after(self.state.shipped_lsn);
            let waited_for = replica.bucket_acks().last().is_some();
            if since.elapsed() >= self.context.interval || backlog >= CHUNK_BYTES_MAX as u64 || waited_for {
                self.ship_the_log().await?;
                self.dirty_since = None;
            }
        }
        let manifest = Lsn(self.positions.manifest.load(Ordering::Acquire));
        if replica.log().bytes_after(manifest) >= CHECKPOINT_LOG_BYTES {
            self.checkpoint(None).await?;
        }
        Ok(())
    }

    /// Ships everything that is settled now.
    async fn ship_the_log(&mut self) -> Result<(), ShipError> {
        if self.began_full() && self.state.manifest.is_none() {
            self.checkpoint(None).await?;
        }
        let settled = self.context.replica.settled_lsn();
        while self.state.shipped_lsn < settled {
            match self.ship_chunk(Lsn(u64::MAX)).await {
                Err(ShipError::Log(BinlogError::TooOld { .. })) => {
                    // The log was given up here: a checkpoint supersedes what is missing.
                    self.checkpoint(None).await?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// Ships the next chunk, nothing of it behind `limit`.
    async fn ship_chunk(&mut self, limit: Lsn) -> Result<(), ShipError> {
        let replica = &self.context.replica;
        let after = self.state.shipped_lsn;
        let settled = replica.settled_lsn().min(limit);
        let log = replica.log().clone();
        let records = blocking(move || log.reader(after)?.next_batch(CHUNK_BYTES_MAX)).await?;
        let mut body = Vec::new();
        let mut last = after;
        for (lsn, bytes) in &records {
            if *lsn > settled {
                break;
            }
            body.extend_from_slice(bytes);
            last = *lsn;
        }
        if last == after {
            return Ok(());
        }
        let chunk = Chunk {
            keyspace: replica.keyspace,
            shard: replica.shard,
            replica: replica.id,
            first_lsn: after.next(),
            last_lsn: last,
            previous: self.state.previous.clone(),
            records: body,
        };
        let key = layout::chunk(replica.keyspace, replica.shard, replica.id, after.next());
        if let Create::Exists(found) = self.context.bucket.create(&key, chunk.encode()).await? {
            // Shipped before a crash that came before ship.json: the same records, perhaps fewer or more.
            let found = Chunk::decode(&found).map_err(|_| ShipError::Foreign(key.clone()))?;
            let common = found.records.len().min(chunk.records.len());
            if found.replica != chunk.replica || found.records[..common] != chunk.records[..common] {
                return Err(ShipError::Foreign(key));
            }
            last = found.last_lsn;
        }
        self.state.shipped_lsn = last;
        self.state.previous = Some(key);
        self.save()
    }

    fn save(&self) -> Result<(), ShipError> {
        write_json(&self.context.dir.join("ship.json"), &self.state)?;
        self.positions.shipped.store(self.state.shipped_lsn.0, Ordering::Release);
        self.context.replica.bucket_acks().covered(self.state.shipped_lsn);
        if let Some(manifest) = &self.state.manifest {
            self.positions.manifest.store(manifest.lsn.0, Ordering::Release);
        }
        Ok(())
    }

    async fn truncate(&self) -> Result<(), ShipError> {
        let replica = self.context.replica.clone();
        let shipped = self.state.shipped_lsn;
        let needed = Lsn(self.positions.needed_after.load(Ordering::Acquire));
        let positions = self.positions.clone();
        let (cap, ships) = (self.context.log_cap, self.ships());
        blocking(move || {
            let log = replica.log();
            let full = log.bytes() > cap;
            let followed = replica.followers().covered_by_all().unwrap_or(Lsn(u64::MAX));
            if full {
                if ships && shipped < needed.min(followed) {
                    tracing::warn!(bytes = log.bytes(), "the log is at its cap: what the bucket does not cover is given up; the next checkpoint supersedes it");
                }
                replica.engine().flush()?;
            }
            let persisted = replica.persisted_lsn()?;
            positions.over_cap.store(full && needed < persisted, Ordering::Release);
            // Not what the log holds: the file that is written to stays even when everybody has read it.
            let unread = if full { log.bytes_after(followed) } else { 0 };
            positions.held_back.store(unread > cap, Ordering::Release);
            replica.set_shed(unread > cap.saturating_mul(2));
            let limit = persisted.min(needed).min(followed);
            let limit = if full || !ships { limit } else { limit.min(shipped) };
            log.truncate_to(limit)?;
            Ok::<(), ShipError>(())
        })
        .await
    }

    async fn checkpoint(&mut self, compact: Option<BandRange>) -> Result<PinnedManifest, ShipError> {
        let dir = self.context.tmp.join(format!("checkpoint-{:016x}", rand::random::<u64>()));
        let result = self.checkpoint_in(&dir, compact).await;
        let _ = tokio::fs::remove_dir_all(&dir).await;
        result
    }

    async fn checkpoint_in(&mut self, dir: &Path, compact: Option<BandRange>) -> Result<PinnedManifest, ShipError> {
        let replica = self.context.replica.clone();
        let engines = self.context.engines.clone();
        let path = dir.to_owned();
        let described = blocking(move || {
            if let Some(range) = compact {
                compact_if_it_pays(&replica, range)?;
            }
            replica.engine().checkpoint(&path)?;
            describe(&engines, &path)
        })
        .await?;
        if let Some(manifest) = &self.state.manifest
            && manifest.lsn == described.head.applied_lsn
        {
            return Ok(manifest.clone());
        }
        self.load_last().await;
        // The log up to here too, so that every moment in between can be restored; not what came before
        // a beginning that the log does not hold.
        let chained = self.ships() && (self.state.manifest.is_some() || !self.began_full());
        while chained && self.state.shipped_lsn < described.head.applied_lsn {
            match self.ship_chunk(described.head.applied_lsn).await {
                Err(ShipError::Log(BinlogError::TooOld { .. })) => break, // the checkpoint supersedes it
                other => other?,
            }
        }
        let files = self.upload(dir, &described).await?;
        let database = self.upload_database(dir, described.head.applied_lsn).await?;
        self.publish(described, files, database).await
    }

    /// The last manifest names the SSTs that need no second upload.
    async fn load_last(&mut self) {
        if self.last.is_none()
            && let Some(pinned) = &self.state.manifest
            && let Ok(Some(bytes)) = self.context.bucket.get(&pinned.key).await
        {
            self.last = Manifest::decode(&bytes).ok();
        }
    }

    async fn upload(&self, dir: &Path, described: &Described) -> Result<Vec<ManifestFile>, ShipError> {
        let replica = &self.context.replica;
        let attempt = format!("{:08x}", rand::random::<u32>());
        let mut uploads = Vec::with_capacity(described.files.len());
        for file in described.files.iter().cloned() {
            let known = self.last.as_ref().and_then(|last| {
                last.files.iter().find(|known| known.file_number == file.file_number && known.bytes == file.bytes)
            });
            let known = known.map(|known| (known.key.clone(), known.crc32c));
            let key = layout::sst(replica.keyspace, replica.shard, replica.id, file.file_number, &attempt);
            let path = dir.join(format!("{:06}.sst", file.file_number));
            let bucket = self.context.bucket.clone();
            uploads.push(async move {
                let (key, crc32c) = match known {
                    Some(known) => known,
                    None => {
                        let uploaded = bucket.upload_file(&key, &path).await?;
                        (key, uploaded.crc32c)
                    }
                };
                Ok::<_, ShipError>(ManifestFile { key, crc32c, ..file })
            });
        }
        futures::stream::iter(uploads).buffered(UPLOADS).try_collect().await
    }

    /// The database's own list of its files: with it they open as they are.
    async fn upload_database(&self, dir: &Path, lsn: Lsn) -> Result<DatabaseFile, ShipError> {
        let odd = |what: String| ShipError::Checkpoint(what);
        let current = tokio::fs::read_to_string(dir.join("CURRENT")).await;
        let name = current.map_err(|error| odd(format!("its CURRENT cannot be read: {error}")))?.trim().to_owned();
        let replica = &self.context.replica;
        let attempt = format!("{:08x}", rand::random::<u32>());
        let key = layout::database(replica.keyspace, replica.shard, replica.id, lsn, &attempt);
        let uploaded = self.context.bucket.upload_file(&key, &dir.join(&name)).await?;
        Ok(DatabaseFile { key, name, bytes: uploaded.bytes, crc32c: uploaded.crc32c })
    }

    async fn publish(
        &mut self,
        described: Described,
        files: Vec<ManifestFile>,
        database: DatabaseFile,
    ) -> Result<PinnedManifest, ShipError> {
        let replica = &self.context.replica;
        let lsn = described.head.applied_lsn;
        if lsn > replica.log().synced_lsn() {
            return Err(ShipError::Checkpoint("it holds records that the log has not synced".into()));
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
            // Anything else is another history of this replica, and must not stand for this one.
            let found = Manifest::decode(&found).map_err(|_| ShipError::Foreign(key.clone()))?;
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
        if lsn > self.state.shipped_lsn {
            self.state.shipped_lsn = lsn;
            self.state.previous = Some(key);
        }
        self.last = Some(manifest);
        self.save()?;
        Ok(pinned)
    }
}

/// True when two manifests describe the same records of the same opening of a replica.
fn same_state(a: &Manifest, b: &Manifest) -> bool {
    let state = |manifest: &Manifest| {
        (manifest.replica, manifest.incarnation, manifest.lsn, manifest.commit_time_max, manifest.event_time_max)
    };
    state(a) == state(b) && a.vector == b.vector
}

/// What a checkpoint holds, read from the checkpoint itself.
struct Described {
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

/// A reader of the bands must fetch every file that touches them. When files that reach beyond the
/// bands are more than a tenth of it, rewriting the bands first is cheaper than shipping them.
fn compact_if_it_pays(replica: &Replica, range: BandRange) -> Result<(), EngineError> {
    let engine = replica.engine();
    engine.flush()?;
    let (inside, crossing) = engine.band_bytes(range)?;
    if crossing > inside / 10 {
        engine.compact_bands(range);
    }
    Ok(())
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ShipError>
where
    T: Send + 'static,
    E: Send + 'static,
    ShipError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ShipError::Checkpoint(format!("a background task failed: {error}"))),
    }
}
