//! Builds a replica from the archive of another one: the files of a checkpoint as they are, then the
//! chunks of the log behind it.
//!
//! **Invariants**
//! - The database is assembled in a directory of its own on the same file system, verified, given its
//!   new identity, and renamed into place whole. Files downloaded before a crash are kept.
//! - The new replica drops the source's identity, seals, cursors and dedup table; its ranges are those of
//!   the catalog, and rows outside of them are gone before it serves.
//! - Its archive begins with a checkpoint of its own: its log does not hold the records that it began with.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::ids::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, OwnSeq, ReplicaId, ShardId, covers};
use vasto_core::limits::GROUP_BYTES_MAX;
use vasto_core::record::{BandRange, KeyEntry, RangeState, frame_at};
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_core::stored_key::MetaKey;
use vasto_shipping::CatalogError;
use vasto_shipping::archive::{self, ArchiveError, ArchivedCheckpoint};
use vasto_shipping::bucket::{Bucket, BucketError};
use vasto_shipping::chunk::Chunk;
use vasto_shipping::download::{DownloadError, DownloadProgress, Wanted, download};
use vasto_shipping::layout::{self, Owner};
use vasto_shipping::manifest::Manifest;

use crate::engine::{Batch, Engine, EngineError, EngineShared, FlushGuard, ImportFile, Scratch};
use crate::node_dir::DirError;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::ReplicaError;
use crate::replica::state::{Head, Identity, Ranges};
use crate::restore::{Reading, RestoreSource, RestoreSources, apply_all, log_restored};
use crate::ship;
use crate::tail::Filter;

/// Parallel ranged requests.
const PARALLEL: usize = 8;

/// Why a replica cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// A download failed.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// An archive in the bucket cannot be read.
    #[error(transparent)]
    History(#[from] ArchiveError),
    /// The catalog of the source cannot be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The downloaded files do not match the manifest.
    #[error("the checkpoint {key} cannot be used: {reason}")]
    Unusable {
        /// Key of the manifest.
        key: String,
        /// The mismatch.
        reason: String,
    },
    /// The bucket holds an archive of the shard, but none that reaches back far enough.
    #[error(
        "the bucket does not hold shard {shard} as of that time any more (see bucket.keep_for){}",
        oldest.as_ref().map(|oldest| format!("; the oldest moment that can be restored is about {oldest}")).unwrap_or_default()
    )]
    NotRetained {
        /// The shard.
        shard: ShardId,
        /// The earliest point in time that can be restored.
        oldest: Option<String>,
    },
    /// Records are missing, and no replica has shipped them elsewhere.
    #[error(
        "records of shard {shard} before {chunk} are missing from the bucket; run `vasto bucket fsck`, or restore to an earlier time with --at"
    )]
    Gap {
        /// The shard.
        shard: ShardId,
        /// Key of the first object behind the gap.
        chunk: String,
    },
    /// The time lies in a part of the archive that was not shipped record by record.
    #[error(
        "shard {shard} cannot be restored to that very time: its log in the bucket ends at {reached}, and the next checkpoint holds everything until {next}; restore to one of these with --at"
    )]
    NotReached {
        /// The shard.
        shard: ShardId,
        /// The end of the record-by-record log.
        reached: String,
        /// The first point in time behind the gap that can be restored.
        next: String,
    },
    /// The clock that assigned the commit times was ahead: whether the writes precede the time is unknown.
    #[error(
        "shard {shard} cannot be restored to that time: the clock of its replica {replica} was {ahead_s} s ahead when it took writes that it stamped with {stamped}, and the bucket does not tell whether they came before or after; restore to {from} or later, when the bucket had them, or leave out --at"
    )]
    ClockAhead {
        /// The shard.
        shard: ShardId,
        /// The replica whose clock was ahead.
        replica: ReplicaId,
        /// Lower bound of the clock's lead.
        ahead_s: u64,
        /// The commit time that it assigned.
        stamped: String,
        /// From this time on a restore includes the writes.
        from: String,
    },
    /// A local file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// A local document failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The new replica refused a request.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The node is stopping, or the plan is over.
    #[error("the node is stopping")]
    Cancelled,
}

impl BootstrapError {
    /// Returns true when objects in the bucket are missing or damaged and nothing is wrong on this node.
    pub fn is_about_objects(&self) -> bool {
        match self {
            BootstrapError::Download(error) => {
                matches!(error, DownloadError::Missing { .. } | DownloadError::Corrupt { .. })
            }
            BootstrapError::History(error) => !matches!(error, ArchiveError::Bucket(_)),
            BootstrapError::Unusable { .. }
            | BootstrapError::NotRetained { .. }
            | BootstrapError::Gap { .. }
            | BootstrapError::Replica(ReplicaError::Gap { .. })
            | BootstrapError::NotReached { .. }
            | BootstrapError::ClockAhead { .. } => true,
            BootstrapError::Bucket(_)
            | BootstrapError::Catalog(_)
            | BootstrapError::Io { .. }
            | BootstrapError::Dir(_)
            | BootstrapError::Engine(_)
            | BootstrapError::Replica(_)
            | BootstrapError::Cancelled => false,
        }
    }

    /// Returns true when a retry can succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            BootstrapError::Bucket(_) => true,
            BootstrapError::Download(error) => matches!(error, DownloadError::Bucket(_)),
            BootstrapError::History(error) => matches!(error, ArchiveError::Bucket(_)),
            BootstrapError::Catalog(error) => matches!(error, CatalogError::Bucket(_)),
            BootstrapError::Unusable { .. }
            | BootstrapError::NotRetained { .. }
            | BootstrapError::Gap { .. }
            | BootstrapError::NotReached { .. }
            | BootstrapError::ClockAhead { .. }
            | BootstrapError::Io { .. }
            | BootstrapError::Dir(_)
            | BootstrapError::Engine(_)
            | BootstrapError::Replica(_)
            | BootstrapError::Cancelled => false,
        }
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> BootstrapError + '_ {
    move |source| BootstrapError::Io { path: path.to_owned(), source }
}

/// The identity that the replica under construction takes.
#[derive(Debug, Clone, Copy)]
pub struct Adoption {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The replica.
    pub replica: ReplicaId,
    /// The bands that it owns.
    pub owned: BandRange,
    /// The catalog version that assigns them.
    pub version: CatalogVersion,
    /// The epoch of that version.
    pub epoch: Epoch,
}

/// How the log behind the checkpoint is applied.
#[derive(Debug, Clone, Copy)]
pub enum Log {
    /// The replica joins its shard: it keeps every record as it is, with origin and own sequence.
    Replicate,
    /// The replica begins a new history: it takes the entries that belong to its shard.
    Fork {
        /// Shards of the keyspace.
        shards: u32,
        /// Upper bound of the commit time, microseconds; later records are skipped.
        until_us: Option<u64>,
    },
}

/// Returns the id that keys the cursor of an archive. Replica ids of another keyspace mean other replicas here.
pub(crate) fn cursor_of(log: Log, replica: ReplicaId) -> ReplicaId {
    match log {
        Log::Replicate => replica,
        Log::Fork { .. } => ReplicaId(replica.0 | 1 << 63),
    }
}

/// The inputs of a bootstrap.
pub struct Bootstrap {
    /// The bucket to read from.
    pub bucket: Bucket,
    /// Shared engine state, to open the database.
    pub engines: EngineShared,
    /// The new replica's directory.
    pub dir: PathBuf,
    /// Download directory on the same file system; the same after a restart.
    pub side: PathBuf,
    /// The progress that is reported to the master.
    pub progress: Arc<Mutex<TargetProgress>>,
    /// The registry that sends the report.
    pub registry: Arc<NodeRegistry>,
    /// Cancels the bootstrap.
    pub cancel: CancellationToken,
}

impl Bootstrap {
    /// Installs the files of a checkpoint as the database of the new replica.
    ///
    /// # Errors
    /// Downloaded files stay for the next attempt.
    pub async fn take(&self, base: &ArchivedCheckpoint, adoption: Adoption, log: Log) -> Result<(), BootstrapError> {
        let wanted = wanted(base)?;
        let total: u64 = wanted.iter().map(|one| one.bytes).sum();
        self.progress.lock().bytes_total = total;
        let progress = DownloadProgress::default();
        let before = {
            let shown = self.progress.lock();
            (shown.bytes_from_bucket, shown.objects_read)
        };
        let show = || {
            let mut shown = self.progress.lock();
            let bytes = progress.bytes.load(Ordering::Relaxed);
            shown.bytes_done = bytes.min(total);
            shown.bytes_from_bucket = before.0 + bytes;
            shown.objects_read = before.1 + progress.requests.load(Ordering::Relaxed);
        };
        {
            let fetch = download(&self.bucket, &wanted, &self.side, PARALLEL, &progress, &self.cancel);
            tokio::pin!(fetch);
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            loop {
                tokio::select! {
                    result = &mut fetch => break result?,
                    _ = tick.tick() => {
                        show();
                        self.registry.report.notify_one();
                    }
                }
            }
        }
        show();
        {
            let mut shown = self.progress.lock();
            (shown.bytes_done, shown.bytes_moved) = (total, total);
            shown.keys_moved = base.manifest.files.iter().map(|file| file.entries).sum();
            shown.stage = TargetStage::Rewriting;
        }
        self.registry.report.notify_one();
        let (engines, dir, side, base) = (self.engines.clone(), self.dir.clone(), self.side.clone(), base.clone());
        let work = move || install(&engines, &dir, &side, &base, adoption, log);
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => Err(io(&self.side)(std::io::Error::other(error))),
        }
    }

    /// Applies the log behind the first candidate's checkpoint as it is, up to its last chunk. The logs of the other
    /// candidates follow when the first one is not the replaced replica, or continues behind what others have shipped.
    ///
    /// # Errors
    /// When a chunk before the last listed one is missing, of the replaced replica or of the replicas behind whose
    /// objects its log continues.
    pub async fn join_all(
        &self,
        replica: &Replica,
        found: &RestoreSources,
        whose: ReplicaId,
    ) -> Result<(), BootstrapError> {
        let Some((first, others)) = found.all.split_first() else { return Ok(()) };
        let is_needed = |one: &RestoreSource| one.owner == first.owner || found.chain.contains(&one.owner.replica);
        let cursors = replica.tail_cursors()?;
        let at = cursors.into_iter().find(|(id, _)| *id == first.owner.replica).map_or(Lsn(0), |(_, lsn)| lsn);
        let mut logs = vec![Reading::behind(first, at)];
        // The log of the replaced replica may begin where another replica's log ends. A gap in any other log does
        // not affect it.
        let mut others = Some(others).filter(|all| !all.is_empty());
        let mut set_aside = Some(&found.set_aside).filter(|all| !all.is_empty());
        while !logs.is_empty() {
            let (mut waiting, mut moved, mut gap) = (Vec::new(), false, None);
            let mut leans = first.owner.replica != whose;
            for mut log in logs {
                let (from, owner) = (log.at, log.one.owner);
                match self.join_on(replica, &mut log).await? {
                    ReplicateEnd::There { leans_on_others } => {
                        log.one.ends_at(log.at)?;
                        (moved, leans) = (true, leans || leans_on_others);
                        self.progress.lock().reached.push((owner.replica, log.at));
                    }
                    ReplicateEnd::Gap(chunk) => {
                        moved |= log.at > from;
                        leans = true;
                        gap = gap.or(is_needed(log.one).then_some((owner, chunk)));
                        waiting.push(log);
                    }
                }
            }
            logs = waiting;
            if let Some(others) = others.take_if(|_| leans) {
                for one in others {
                    let base = one.base.as_ref().filter(|base| covers(&replica.vector(), &base.manifest.vector));
                    logs.push(Reading::behind(one, base.map_or(Lsn(0), |base| base.manifest.lsn)));
                }
            } else if !moved {
                let Some((owner, first)) = gap else { break };
                let Some(more) = set_aside.take() else {
                    let chunk = layout::chunk(owner.keyspace, owner.shard, owner.replica, first);
                    return Err(BootstrapError::Gap { shard: replica.shard, chunk });
                };
                for one in more {
                    log_restored(one, first);
                    logs.push(Reading::behind(one, Lsn(0)));
                }
            }
        }
        // Own sequences begin anew with each opening of their origin: records that a checkpoint covers and no log
        // has brought show up as missing only in its vector.
        let held = replica.vector();
        for one in found.all.iter().filter(|one| is_needed(one)) {
            if let Some(base) = one.base.as_ref().filter(|base| !covers(&held, &base.manifest.vector)) {
                return Err(BootstrapError::Gap { shard: replica.shard, chunk: base.key.clone() });
            }
        }
        self.count_what_logs_brought(replica, found).await
    }

    async fn join_on(&self, replica: &Replica, log: &mut Reading<'_>) -> Result<ReplicateEnd, BootstrapError> {
        let mut leans_on_others = false;
        while let Some(chunk) = log.next(self).await? {
            let (first, last) = (chunk.first_lsn, chunk.last_lsn);
            leans_on_others |= archive::goes_on_behind_another(&chunk);
            match join(replica, log.one.owner.replica, chunk).await {
                Err(ReplicaError::Gap { .. }) => return Ok(ReplicateEnd::Gap(first)),
                other => other?,
            }
            log.at = last;
            self.registry.report.notify_one();
        }
        Ok(ReplicateEnd::There { leans_on_others })
    }

    /// Applies the records that another member of the shard has shipped and this replica does not hold.
    ///
    /// # Errors
    /// When preceding records are missing both here and in the bucket: nothing behind them is applied.
    pub async fn join_what_was_shipped(
        &self,
        replica: &Replica,
        source: ReplicaId,
        shards: u32,
    ) -> Result<Lsn, BootstrapError> {
        let found = archive::archives(&self.bucket, replica.keyspace, replica.shard).await?.remove(&source);
        let found = found.unwrap_or_default();
        let owner = Owner { keyspace: replica.keyspace, shard: replica.shard, replica: source };
        let newest = archive::newest_checkpoint(&self.bucket, owner, &found, None).await?.base;
        let of = RestoreSource::of_chunks(owner, found.chunks);
        let cursors = replica.tail_cursors()?;
        let pulled = cursors.into_iter().find(|(id, _)| *id == source).map_or(Lsn(0), |(_, lsn)| lsn);
        let first = of.chunks.first().map_or(Lsn(0), |first| Lsn(first.0.saturating_sub(1)));
        let mut at = pulled.max(first);
        // Rows that only a checkpoint holds have no records to join: they are merged, and so is the log behind them.
        let rows =
            newest.filter(|base| !covers(&replica.vector(), &base.manifest.vector) && pulled < base.manifest.lsn);
        let merged = match &rows {
            Some(base) if !of.chunks.iter().any(|first| *first <= pulled.next()) => {
                self.merge_rows(replica, base, shards).await?;
                at = base.manifest.lsn;
                true
            }
            _ => false,
        };
        while let Some((chunk, _)) = self.next_chunk(&of, at).await? {
            at = chunk.last_lsn;
            if merged {
                let filter = Filter { shard: replica.shard, shards };
                let entries = chunk.records().map_while(Result::ok).flat_map(|record| filter.pick(record)).collect();
                apply_all(replica, entries).await?;
            } else {
                join(replica, source, chunk).await?;
            }
        }
        Ok(at)
    }

    /// Returns the chunk behind an LSN, and the bytes that were read for it.
    pub(crate) async fn next_chunk(&self, of: &RestoreSource, at: Lsn) -> Result<Option<(Chunk, u64)>, BootstrapError> {
        let next = archive::chunk_after(&self.bucket, of.owner, &of.chunks, at);
        let next = self.cancel.run_until_cancelled(next).await.ok_or(BootstrapError::Cancelled)??;
        if let Some((_, bytes)) = &next {
            let mut shown = self.progress.lock();
            shown.bytes_from_bucket += bytes;
            shown.objects_read += 1;
        }
        Ok(next)
    }

    /// Merges the rows of a checkpoint that belong to the shard.
    pub(crate) async fn merge_rows(
        &self,
        replica: &Replica,
        base: &ArchivedCheckpoint,
        shards: u32,
    ) -> Result<(), BootstrapError> {
        let side = self.side.with_extension(base.manifest.replica.to_string());
        let progress = DownloadProgress::default();
        let files = wanted(base)?;
        download(&self.bucket, &files, &side, PARALLEL, &progress, &self.cancel).await?;
        {
            let mut shown = self.progress.lock();
            shown.bytes_from_bucket += progress.bytes.load(Ordering::Relaxed);
            shown.objects_read += progress.requests.load(Ordering::Relaxed);
        }
        let imported: Vec<ImportFile> = base
            .manifest
            .files
            .iter()
            .map(|file| ImportFile {
                name: format!("{:06}.sst", file.file_number),
                bytes: file.bytes,
                level: file.level,
                smallest_seqno: file.smallest_seqno,
                largest_seqno: file.largest_seqno,
                first_key: file.first_key.clone(),
                last_key: file.last_key.clone(),
                entries: file.entries,
            })
            .collect();
        // Left over from an interrupted attempt; the downloaded files are still beside it.
        let scratch = side.join("scratch");
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch).map_err(io(&scratch))?;
        }
        let (slices, mut received) = tokio::sync::mpsc::channel(2);
        let from = side.clone();
        let reading = tokio::task::spawn_blocking(move || read_rows(&from, &imported, shards, &slices));
        while let Some(slice) = received.recv().await {
            replica.apply(slice, Vec::new()).await?;
        }
        let read = reading
            .await
            .unwrap_or_else(|error| Err(EngineError::Rocks { doing: "read a checkpoint", message: error.to_string() }));
        let _ = tokio::fs::remove_dir_all(&side).await;
        Ok(read?)
    }
}

/// Why the replay of a log ended.
enum ReplicateEnd {
    /// The end of the log is reached.
    There {
        /// The log begins, somewhere, behind what another replica has shipped.
        leans_on_others: bool,
    },
    /// Records before this chunk are missing.
    Gap(Lsn),
}

/// Sends the rows of the owned bands of a downloaded checkpoint, in slices that fit into one record.
fn read_rows(
    dir: &Path,
    files: &[ImportFile],
    shards: u32,
    slices: &tokio::sync::mpsc::Sender<Vec<KeyEntry>>,
) -> Result<(), EngineError> {
    let scratch = Scratch::import(&dir.join("scratch"), dir, files)?;
    let owned: BandRange = Band::owned(shards).into();
    let (mut slice, mut bytes) = (Vec::new(), 0);
    for band in Band::all().filter(|band| owned.contains(*band)) {
        let mut rows = scratch.rows(band);
        while let Some((key, entry)) = rows.current()? {
            bytes += key.len() + entry.len();
            slice.push(KeyEntry { key: key.to_vec(), entry: entry.to_vec() });
            rows.advance();
            if bytes >= GROUP_BYTES_MAX {
                bytes = 0;
                if slices.blocking_send(std::mem::take(&mut slice)).is_err() {
                    return Ok(());
                }
            }
        }
    }
    let _ = slices.blocking_send(slice);
    Ok(())
}

async fn join(replica: &Replica, source: ReplicaId, chunk: Chunk) -> Result<(), ReplicaError> {
    let mut rest = &chunk.records[..];
    let mut records = Vec::new();
    let mut bytes = 0;
    let mut covered = Lsn(chunk.first_lsn.0 - 1);
    for record in chunk.records() {
        let Ok(record) = record else { break }; // a decoded chunk holds whole records only
        covered = record.lsn;
        let length = frame_at(rest).unwrap_or(rest.len());
        rest = &rest[length..];
        bytes += length;
        // Records without an own sequence concern only the source replica.
        if record.own_seq.0 > 0 {
            records.push(record);
        }
        if bytes >= GROUP_BYTES_MAX {
            replica.replicate(source, std::mem::take(&mut records), covered).await?;
            bytes = 0;
        }
    }
    replica.replicate(source, records, covered).await
}

fn wanted(base: &ArchivedCheckpoint) -> Result<Vec<Wanted>, BootstrapError> {
    let unusable = |reason: &str| BootstrapError::Unusable { key: base.key.clone(), reason: reason.to_owned() };
    let database = base.manifest.database.as_ref();
    let database = database.ok_or_else(|| unusable("it was shipped by an older version; make a new checkpoint"))?;
    let files = base.manifest.files.iter().map(|file| Wanted {
        key: file.key.clone(),
        bytes: file.bytes,
        crc32c: file.crc32c,
        file_name: format!("{:06}.sst", file.file_number),
    });
    let list = Wanted {
        key: database.key.clone(),
        bytes: database.bytes,
        crc32c: database.crc32c,
        file_name: database.name.clone(),
    };
    Ok(files.chain([list]).collect())
}

struct NoGuard;

impl FlushGuard for NoGuard {
    fn before_flush(&self) {}
}

/// Installs the downloaded files as the database of the new replica. Blocks on the disk.
fn install(
    engines: &EngineShared,
    dir: &Path,
    side: &Path,
    base: &ArchivedCheckpoint,
    adoption: Adoption,
    log: Log,
) -> Result<(), BootstrapError> {
    let manifest = &base.manifest;
    let name = manifest.database.as_ref().map(|database| database.name.as_str()).unwrap_or_default();
    let current = side.join("CURRENT");
    std::fs::write(&current, format!("{name}\n")).map_err(io(&current))?;
    let engine = Engine::open(engines, side, Arc::new(AtomicU64::new(0)), Arc::new(NoGuard))?;
    let adopted = adopt(&engine, manifest, adoption, log);
    engine.close();
    drop(engine);
    adopted.map_err(|error| match error {
        AdoptError::Engine(error) => error.into(),
        AdoptError::Odd(reason) => BootstrapError::Unusable { key: base.key.clone(), reason },
    })?;
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    match log {
        Log::Replicate => ship::begin_with_a_checkpoint(dir)?,
        Log::Fork { .. } => ship::begin_with_files_of(dir, &base.key)?,
    }
    let database = crate::replica::database_dir(dir);
    let _ = std::fs::remove_dir_all(&database);
    std::fs::rename(side, &database).map_err(io(&database))?;
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io(dir))
}

enum AdoptError {
    Engine(EngineError),
    Odd(String),
}

impl From<EngineError> for AdoptError {
    fn from(error: EngineError) -> Self {
        AdoptError::Engine(error)
    }
}

/// Gives a database the identity of another replica.
fn adopt(engine: &Engine, manifest: &Manifest, adoption: Adoption, log: Log) -> Result<(), AdoptError> {
    let odd = |what: &str| AdoptError::Odd(what.to_owned());
    let read = |key: MetaKey| engine.get(&key.encode());
    let identity = read(MetaKey::Identity)?.ok_or_else(|| odd("it has no identity"))?;
    let identity = Identity::decode(&identity).map_err(|error| odd(&error.to_string()))?;
    // A crash may have come between the rewrite and the rename.
    if (identity.keyspace, identity.replica) != (adoption.keyspace, adoption.replica) {
        rewrite_metadata(engine, manifest, identity, adoption, log)?;
    }
    for bands in foreign_bands(adoption.owned) {
        if engine.band_bytes(bands)? != (0, 0) {
            engine.compact_bands(bands);
        }
        if engine.any_in(bands)? {
            return Err(odd("something is left of bands that it does not own"));
        }
    }
    Ok(())
}

fn rewrite_metadata(
    engine: &Engine,
    manifest: &Manifest,
    identity: Identity,
    adoption: Adoption,
    log: Log,
) -> Result<(), AdoptError> {
    let odd = |what: &str| AdoptError::Odd(what.to_owned());
    let read = |key: MetaKey| engine.get(&key.encode());
    if (identity.keyspace, identity.shard, identity.replica) != (manifest.keyspace, manifest.shard, manifest.replica) {
        return Err(odd(&format!("it is of replica {} of keyspace {}", identity.replica, identity.keyspace)));
    }
    let head = read(MetaKey::Head)?.ok_or_else(|| odd("it has no head"))?;
    let head = Head::decode(&head).map_err(|error| odd(&error.to_string()))?;
    if head.applied_lsn != manifest.lsn {
        return Err(odd(&format!("it ends at {} instead of {}", head.applied_lsn, manifest.lsn)));
    }
    let foreign = foreign_bands(adoption.owned);
    for bands in &foreign {
        // Whole files first; the range delete below hides the remaining rows, and is compacted away.
        engine.delete_files_in(*bands)?;
    }
    let mut batch = Batch::default();
    for bands in &foreign {
        batch.delete_bands(*bands);
    }
    let mut forgotten = vec![MetaKey::result_prefix(), MetaKey::tail_cursor_prefix(), MetaKey::forward_cursor_prefix()];
    if matches!(log, Log::Fork { .. }) {
        forgotten.push(MetaKey::vector_prefix());
    }
    for prefix in forgotten {
        for (key, _) in engine.with_prefix(&prefix)? {
            if let Ok(key) = MetaKey::decode(&key) {
                batch.delete_meta(key);
            }
        }
    }
    let identity =
        Identity { keyspace: adoption.keyspace, replica: adoption.replica, incarnation: Incarnation(0), ..identity };
    batch.put_meta(MetaKey::Identity, &identity.encode());
    let head =
        Head { applied_lsn: Lsn(0), own_seq: OwnSeq(0), epoch: adoption.epoch, version: adoption.version, ..head };
    batch.put_meta(MetaKey::Head, &head.encode());
    let mut ranges = Ranges::all(RangeState::Empty);
    ranges.set(adoption.owned, RangeState::Owned);
    batch.put_meta(MetaKey::RangeStates, &ranges.encode());
    batch.put_meta(MetaKey::TailCursor(cursor_of(log, manifest.replica)), &manifest.lsn.0.to_le_bytes());
    engine.write(batch)?;
    Ok(engine.flush()?)
}

fn foreign_bands(owned: BandRange) -> Vec<BandRange> {
    let mut foreign = Vec::new();
    if owned.first > Band::FIRST {
        foreign.push(BandRange { first: Band::FIRST, last: Band(owned.first.0 - 1) });
    }
    if owned.last < Band::LAST {
        foreign.push(BandRange { first: Band(owned.last.0 + 1), last: Band::LAST });
    }
    foreign
}
