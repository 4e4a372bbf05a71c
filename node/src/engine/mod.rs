//! The only code that knows RocksDB: one instance per replica, one column family, no WAL.
//!
//! **Invariants**
//! - All writes go through [`Engine::write`], one batch per log record, with the replica's `Head`
//!   in the same batch: because there is one column family, whatever RocksDB has flushed is an
//!   exact prefix of the log.
//! - Before a flush starts, everything appended to the log so far is synced, so the database on
//!   disk never runs ahead of the log on disk.
//! - Compaction outputs do not cross bands (fixed-prefix partitioner, one byte).

mod batch;
mod cursor;
mod entries;
mod sample;
mod scratch;
mod tables;
mod trial;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rocksdb::checkpoint::Checkpoint;
use rocksdb::compaction_filter::Decision;
use rocksdb::event_listener::{EventListener, FlushJobInfo};
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, CompactOptions, DB, DBCompressionType,
    DBRawIterator, ErrorKind, FlushOptions, IngestExternalFileOptions, LiveFile, Options,
    ReadOptions, ReadTier, SstPartitionerFactory, WriteBufferManager, WriteOptions,
};
use tokio::sync::Semaphore;
use vasto_core::Band;
use vasto_core::limits::TABLES_OPEN_MAX;
use vasto_core::merge::is_collected;
use vasto_core::record::BandRange;
use vasto_core::stored_key::{META_PREFIX, split_data_key};

pub(crate) use batch::Batch;
#[cfg(test)]
pub(crate) use cursor::cursors_opened;
pub(crate) use cursor::{Cursor, View};
use entries::EntryBytes;
pub(crate) use scratch::{BandRows, ImportFile, Scratch};
pub(crate) use tables::{TableRun, TableSet, WrittenTable};
#[cfg(test)]
pub(crate) use trial::BandFiles;
pub(crate) use trial::{Files, Tables};

/// Error of the database.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// A RocksDB call failed.
    #[error("{doing}: {message}")]
    Rocks {
        /// The failed operation.
        doing: &'static str,
        /// Message of RocksDB.
        message: String,
    },
    /// Another process has the directory open.
    #[error("{0} is open in another process; stop it first, or choose another --dir")]
    Locked(PathBuf),
}

pub(crate) fn failed(doing: &'static str) -> impl Fn(rocksdb::Error) -> EngineError {
    move |error| EngineError::Rocks { doing, message: error.to_string() }
}

/// Memory and background budget of a node, shared by all its replicas.
#[derive(Clone)]
pub(crate) struct EngineShared {
    buffers: WriteBufferManager,
    base: Options,
    /// Replicas being opened, about one for each CPU core: each reads its log in files of 64 MiB,
    /// and a node that restarts opens all it has.
    pub(crate) opening: Arc<Semaphore>,
}

/// Share of the machine that the engines of a node may use together.
#[derive(Debug, Clone, Copy)]
pub struct EngineBudget {
    /// Block cache, bytes.
    pub cache_bytes: usize,
    /// All memtables together, bytes.
    pub write_buffer_bytes: usize,
    /// Maximum number of concurrent flushes and compactions.
    pub background_jobs: u32,
    /// Flush and compaction bytes per second; 0 is no limit.
    pub rate_limit: u64,
}

impl Default for EngineBudget {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            write_buffer_bytes: 128 << 20,
            background_jobs: 2,
            rate_limit: 0,
        }
    }
}

/// RocksDB's message for a lock that another process holds; other failures to open the lock file,
/// such as a lack of descriptors, have other messages.
const LOCK_REFUSED: &str = "While lock file";

/// Step by which a MANIFEST grows.
const MANIFEST_PREALLOCATION: usize = 64 << 10;

/// Bytes of an SST after which the system begins to write them to the disk: what gathers until the
/// table is synced delays the syncs of logs.
const BYTES_PER_SYNC: u64 = 256 << 10;

/// Target size of an SST file.
const TABLE_BYTES: u64 = 32 << 20;

impl EngineShared {
    /// Creates the shared parts.
    pub(crate) fn new(budget: EngineBudget) -> Self {
        let cache = Cache::new_lru_cache(budget.cache_bytes);
        let buffers =
            WriteBufferManager::new_write_buffer_manager(budget.write_buffer_bytes, false);
        let mut base = Options::default();
        base.create_if_missing(true);
        base.set_write_buffer_manager(&buffers);
        base.set_write_buffer_size((budget.write_buffer_bytes / 2).clamp(1 << 20, 64 << 20));
        base.set_max_write_buffer_number(4);
        base.set_max_background_jobs(budget.background_jobs.max(2) as i32);
        base.set_compression_type(DBCompressionType::Lz4);
        base.set_bottommost_compression_type(DBCompressionType::Zstd);
        base.set_target_file_size_base(TABLE_BYTES);
        base.set_bytes_per_sync(BYTES_PER_SYNC);
        base.set_max_open_files(TABLES_OPEN_MAX as i32);
        base.set_sst_partitioner_factory(&SstPartitionerFactory::fixed_prefix(1));
        base.set_keep_log_file_num(2);
        base.set_max_log_file_size(4 << 20);
        base.set_stats_dump_period_sec(0);
        base.set_stats_persist_period_sec(0);
        // The default takes 4 MiB of disk for each replica, and a node has hundreds.
        base.set_manifest_preallocation_size(MANIFEST_PREALLOCATION);
        base.set_allow_concurrent_memtable_write(false); // one writer per instance
        base.set_avoid_flush_during_shutdown(true); // the log has it; shutdown flushes explicitly
        base.set_block_based_table_factory(&table_options(&cache));
        if budget.rate_limit > 0 {
            base.set_ratelimiter(budget.rate_limit as i64, 100_000, 10);
        }
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self { buffers, base, opening: Arc::new(Semaphore::new(cores)) }
    }

    /// Sets the number of tables that each instance keeps open.
    pub(crate) fn with_tables_open(mut self, each: usize) -> Self {
        self.base.set_max_open_files(each.min(TABLES_OPEN_MAX) as i32);
        self
    }

    /// Returns the used part of the memtables' budget; can exceed 1.
    pub(crate) fn memtables_used(&self) -> f64 {
        self.buffers.get_mutable_memtable_memory_usage() as f64
            / self.buffers.get_buffer_size().max(1) as f64
    }
}

fn table_options(cache: &Cache) -> BlockBasedOptions {
    let mut table = table_format();
    table.set_block_cache(cache);
    table
}

/// Returns the format of all tables.
fn table_format() -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(10.0, false);
    table.set_block_size(8 << 10);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(6);
    table
}

/// Hook that RocksDB calls before a flush; must make the log durable.
pub(crate) trait FlushGuard: Send + Sync + 'static {
    /// Syncs everything appended to the log so far. A failure poisons the log by itself.
    fn before_flush(&self);
}

struct Listener {
    guard: Arc<dyn FlushGuard>,
    failed: Arc<OnceLock<String>>,
}

impl EventListener for Listener {
    fn on_flush_begin(&self, _: &FlushJobInfo) {
        // A panic must not cross into C++.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.guard.before_flush()))
            .is_err()
        {
            std::process::abort();
        }
    }

    fn on_background_error(
        &self,
        _: rocksdb::event_listener::DBBackgroundErrorReason,
        status: rocksdb::event_listener::MutableStatus,
    ) {
        let error = status.result().as_ref().err().map(ToString::to_string);
        // The first error shows what happened.
        let _ = self.failed.set(error.unwrap_or_else(|| "RocksDB does not say why".to_owned()));
    }
}

/// A stored key and its value.
pub(crate) type Row = (Vec<u8>, Vec<u8>);

/// A stored key and its value, borrowed from a cursor.
pub(crate) type RowRef<'a> = (&'a [u8], &'a [u8]);

/// Result of a point lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// The stored bytes.
    Found(Vec<u8>),
    /// Certainly not stored.
    Missing,
    /// Not in memory; retry from a thread that may block.
    NotCached,
}

/// One replica's database.
pub(crate) struct Engine {
    db: Arc<DB>,
    options: Options,
    floor: Arc<AtomicU64>,
    failed: Arc<OnceLock<String>>,
    write_options: WriteOptions,
    cached_only: ReadOptions,
}

impl Engine {
    /// Opens or creates the database in `path`. Compactions apply the gc floor in `floor`; `guard`
    /// is called before every flush.
    pub(crate) fn open(
        shared: &EngineShared,
        path: &Path,
        floor: Arc<AtomicU64>,
        guard: Arc<dyn FlushGuard>,
    ) -> Result<Self, EngineError> {
        let failed_flag = Arc::new(OnceLock::new());
        let mut options = shared.base.clone();
        let filter_floor = floor.clone();
        options.set_compaction_filter(
            "vasto-collect",
            move |_level: u32, key: &[u8], value: &[u8]| {
                let floor = filter_floor.load(Ordering::Acquire);
                if floor > 0 && split_data_key(key).is_some() && is_collected(value, floor) {
                    Decision::Remove
                } else {
                    Decision::Keep
                }
            },
        );
        options.add_event_listener(Listener { guard, failed: failed_flag.clone() });
        let db = DB::open(&options, path).map_err(|error| match error.kind() {
            ErrorKind::IOError if error.to_string().contains(LOCK_REFUSED) => {
                EngineError::Locked(path.to_owned())
            }
            _ => EngineError::Rocks { doing: "open the database", message: error.to_string() },
        })?;
        let mut write_options = WriteOptions::default();
        write_options.disable_wal(true);
        let mut cached_only = ReadOptions::default();
        cached_only.set_read_tier(ReadTier::BlockCache);
        Ok(Self {
            db: Arc::new(db),
            options,
            floor,
            failed: failed_flag,
            write_options,
            cached_only,
        })
    }

    /// Returns why a flush or a compaction failed, once one has: the replica must be closed to
    /// writes.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Raises the floor that compactions apply.
    pub(crate) fn raise_floor(&self, floor: u64) {
        self.floor.fetch_max(floor, Ordering::AcqRel);
    }

    /// Applies a batch to the memtable.
    pub(crate) fn write(&self, batch: Batch) -> Result<(), EngineError> {
        self.db.write_opt(&batch.inner, &self.write_options).map_err(failed("apply a record"))
    }

    /// Looks a key up without blocking on the disk.
    pub(crate) fn get_cached(&self, key: &[u8]) -> Result<Lookup, EngineError> {
        match self.db.get_pinned_opt(key, &self.cached_only) {
            Ok(Some(value)) => Ok(Lookup::Found(value.to_vec())),
            Ok(None) => Ok(Lookup::Missing),
            Err(error) if error.kind() == ErrorKind::Incomplete => Ok(Lookup::NotCached),
            Err(error) => Err(failed("read")(error)),
        }
    }

    /// Looks a key up; may block.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.db.get(key).map_err(failed("read"))
    }

    /// Returns the value without the memtables: the one that would be there if the process died
    /// now.
    pub(crate) fn get_persisted(&self, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::Persisted);
        self.db.get_opt(key, &options).map_err(failed("read"))
    }

    /// Writes the memtables to SSTs and waits for it.
    pub(crate) fn flush(&self) -> Result<(), EngineError> {
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.db.flush_opt(&options).map_err(failed("flush"))
    }

    /// Hard-links a checkpoint into `dir`, which must not exist.
    pub(crate) fn checkpoint(&self, dir: &Path) -> Result<(), EngineError> {
        Checkpoint::new(&self.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(dir))
            .map_err(failed("make a checkpoint"))
    }

    /// Returns all SSTs.
    pub(crate) fn live_files(&self) -> Result<Vec<LiveFile>, EngineError> {
        self.db.live_files().map_err(failed("list the SSTs"))
    }

    /// Adds finished SSTs in one step; the range they cover must be empty.
    pub(crate) fn ingest(&self, files: Vec<PathBuf>) -> Result<(), EngineError> {
        if files.is_empty() {
            return Ok(());
        }
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        options.set_verify_checksums_before_ingest(true);
        options.set_fail_if_not_bottommost_level(true);
        self.db.ingest_external_file_opts(&options, files).map_err(failed("ingest SSTs"))
    }

    /// Drops whole SSTs inside the bands. On its own this is **not** a removal: it skips the
    /// memtable, L0 and files that cross the edge, and can uncover older versions.
    pub(crate) fn delete_files_in(&self, range: BandRange) -> Result<(), EngineError> {
        self.db
            .delete_file_in_range([range.first.0], [range.last.0 + 1])
            .map_err(failed("drop SSTs"))
    }

    /// Rewrites the bands down to the bottom level, removing what was deleted.
    pub(crate) fn compact_bands(&self, range: BandRange) {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        options.set_exclusive_manual_compaction(false);
        self.db.compact_range_opt(Some([range.first.0]), Some([range.last.0 + 1]), &options);
    }

    /// Rewrites everything.
    pub(crate) fn compact_all(&self) {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        options.set_exclusive_manual_compaction(false);
        self.db.compact_range_opt::<&[u8], &[u8]>(None, None, &options);
    }

    /// Returns `(files wholly inside the bands, files that reach beyond them)`, bytes.
    pub(crate) fn band_bytes(&self, range: BandRange) -> Result<(u64, u64), EngineError> {
        let mut inside = 0;
        let mut crossing = 0;
        for file in self.live_files()? {
            let (Some(first), Some(last)) =
                (first_byte(file.start_key.as_deref()), first_byte(file.end_key.as_deref()))
            else {
                continue;
            };
            if first <= range.last.0 && last >= range.first.0 {
                if first >= range.first.0 && last <= range.last.0 && file.level > 0 {
                    inside += file.size as u64;
                } else {
                    crossing += file.size as u64;
                }
            }
        }
        Ok((inside, crossing))
    }

    /// Returns `(stored entries, those of SSTs with nothing but metadata, bytes of SSTs)`; an entry
    /// counts once for each version that is not compacted away yet. The first number excludes the
    /// second, and includes metadata that is stored among data.
    pub(crate) fn size(&self) -> (u64, u64, u64) {
        let in_memory = self.entries_in_memory();
        let files = self.db.live_files().unwrap_or_default();
        let each = EntryBytes::of(&files);
        let (mut stored, mut metadata) = (0, 0);
        for file in &files {
            match first_byte(file.start_key.as_deref()) {
                Some(first) if first < META_PREFIX => stored += each.entries(file),
                _ => metadata += file.num_entries.saturating_sub(2 * file.num_deletions),
            }
        }
        (stored + in_memory, metadata, self.number("rocksdb.total-sst-files-size"))
    }

    fn entries_in_memory(&self) -> u64 {
        self.number("rocksdb.num-entries-active-mem-table")
            + self.number("rocksdb.num-entries-imm-mem-tables")
    }

    fn number(&self, name: &'static str) -> u64 {
        self.db.property_int_value(name).ok().flatten().unwrap_or(0)
    }

    /// Returns true when a data key exists in the bands.
    pub(crate) fn any_in(&self, range: BandRange) -> Result<bool, EngineError> {
        let view = self.view();
        let cursor = view.cursor(&[range.first.0], vec![range.last.0 + 1]);
        Ok(cursor.current()?.is_some())
    }

    /// Stops compactions and flushes; call before dropping the last handle.
    pub(crate) fn close(&self) {
        self.db.cancel_all_background_work(true);
    }

    /// Returns the options for new SSTs, so that they match this database's own.
    pub(crate) fn options(&self) -> &Options {
        &self.options
    }
}

pub(crate) fn first_byte(key: Option<&[u8]>) -> Option<u8> {
    key?.first().copied()
}

/// Returns the bounds of a band's stored keys: `[band]..[band + 1]`.
pub(crate) fn band_bounds(band: Band) -> ([u8; 1], [u8; 1]) {
    ([band.0], [band.0 + 1])
}

/// Checkpoint opened read-only, to read what it really holds.
pub(crate) struct CheckpointView {
    db: DB,
}

impl CheckpointView {
    /// Opens the directory that [`Engine::checkpoint`] made.
    pub(crate) fn open(shared: &EngineShared, dir: &Path) -> Result<Self, EngineError> {
        let mut options = shared.base.clone();
        options.create_if_missing(false);
        DB::open_for_read_only(&options, dir, false)
            .map(|db| Self { db })
            .map_err(failed("open the checkpoint"))
    }

    /// Returns a stored value.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.db.get(key).map_err(failed("read the checkpoint"))
    }

    /// Returns all stored keys with a prefix.
    pub(crate) fn with_prefix(&self, prefix: &[u8]) -> Result<Vec<Row>, EngineError> {
        collect_prefix(self.db.raw_iterator(), prefix)
    }

    /// Returns its SSTs.
    pub(crate) fn files(&self) -> Result<Vec<LiveFile>, EngineError> {
        self.db.live_files().map_err(failed("list the SSTs of the checkpoint"))
    }
}

impl Engine {
    /// Returns all stored keys with a prefix; for metadata.
    pub(crate) fn with_prefix(&self, prefix: &[u8]) -> Result<Vec<Row>, EngineError> {
        collect_prefix(self.db.raw_iterator(), prefix)
    }
}

fn collect_prefix(mut iterator: DBRawIterator<'_>, prefix: &[u8]) -> Result<Vec<Row>, EngineError> {
    let mut out = Vec::new();
    iterator.seek(prefix);
    while let Some((key, value)) = iterator.item() {
        if !key.starts_with(prefix) {
            break;
        }
        out.push((key.to_vec(), value.to_vec()));
        iterator.next();
    }
    iterator.status().map_err(failed("read"))?;
    Ok(out)
}
