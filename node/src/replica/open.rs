//! Opening of a replica: recovers its log, replays it, begins a new incarnation.
//!
//! **Invariants**
//! - Every open is a new incarnation, whose `adopt` record is synced before the first own write.
//! - Opening replays the log after `applied_lsn`; a log that ends before what the database holds,
//!   or that has a hole, stops the replica with a named error instead of serving less than was
//!   acknowledged.
//! - The log is synced before a flush of the database begins.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vasto_core::ids::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_core::limits::BINLOG_FILE_BYTES;
use vasto_core::record::{BandRange, RangeState, Record};
use vasto_core::stored_key::MetaKey;

use super::apply::{ApplyError, Meta, apply_record};
use super::command::ReplicaError;
use super::dedup::DedupTable;
use super::handle::Replica;
use super::queue::Queue;
use super::shared::Shared;
use super::state::{Head, Identity, Ranges, parse_vector};
use super::store::Store;
use super::writer::Writer;
use crate::binlog::{Binlog, BinlogConfig, BinlogError, LogShared};
use crate::clock::SharedClock;
use crate::engine::{Engine, EngineError, EngineShared, FlushGuard};
use crate::node_dir::sync_dir;

/// Reason why a replica does not open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The log is damaged, foreign or cannot be read.
    #[error(transparent)]
    Log(#[from] BinlogError),
    /// The database cannot be opened or read.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A record cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A metadata value cannot be read.
    #[error("the replica's metadata cannot be read: {0}")]
    Meta(#[from] vasto_core::codec::DecodeError),
    /// The directory belongs to another replica.
    #[error(
        "{path} holds replica {found} of keyspace {keyspace}, not replica {wanted}; it was moved or copied by hand: put it back"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Replica that it belongs to.
        found: ReplicaId,
        /// Keyspace of that replica.
        keyspace: KeyspaceId,
        /// Replica that was to be opened.
        wanted: ReplicaId,
    },
    /// The log lacks records that the database holds.
    #[error(
        "the log ends at LSN {log} but the database holds LSN {database}: log files are missing; restore {path} or replace the node"
    )]
    LogBehind {
        /// Last LSN of the log.
        log: Lsn,
        /// LSN that the database holds.
        database: Lsn,
        /// The directory.
        path: PathBuf,
    },
    /// The log does not reach back to what the database holds.
    #[error(
        "the log begins at LSN {first} but the database holds only LSN {database}: log files are missing; restore {path} or replace the node"
    )]
    LogAhead {
        /// First LSN of the log.
        first: Lsn,
        /// LSN that the database holds.
        database: Lsn,
        /// The directory.
        path: PathBuf,
    },
    /// The first records could not be written.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A directory cannot be created.
    #[error("{path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The IO error.
        source: std::io::Error,
    },
}

/// Options for opening a replica.
pub(crate) struct OpenOptions {
    /// Its directory; `db` and `log` live below it.
    pub dir: PathBuf,
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// The node's engine budget.
    pub shared: EngineShared,
    /// Clock for event times and commit times.
    pub clock: SharedClock,
    /// For a new replica: its first range and state, and the catalog version that demands them.
    pub initial: Option<(CatalogVersion, BandRange, RangeState)>,
}

impl Replica {
    /// Opens (or, with `initial`, creates) a replica: recovers its log, replays, begins a new
    /// incarnation. Blocks on the disk; callers limit how many replicas open at a time
    /// ([`EngineShared::opening`]).
    pub(crate) fn open(options: OpenOptions) -> Result<Self, OpenError> {
        let OpenOptions { dir, keyspace, shard, replica, shared: engines, clock, initial } =
            options;
        let (db_dir, log_dir) = (database_dir(&dir), log_dir(&dir));
        create_dirs(&dir, [&db_dir, &log_dir], sync_dir)?;
        let mut log = Binlog::open(BinlogConfig {
            dir: log_dir,
            keyspace,
            shard,
            replica,
            file_bytes: BINLOG_FILE_BYTES,
        })?;
        let floor = Arc::new(AtomicU64::new(0));
        let engine = Engine::open(&engines, &db_dir, floor, Arc::new(LogGuard(log.shared())))?;
        let mut meta = read_meta(&engine, keyspace, shard, replica)?;
        if (meta.identity.keyspace, meta.identity.replica) != (keyspace, replica) {
            let Identity { keyspace, replica: found, .. } = meta.identity;
            return Err(OpenError::Foreign { path: dir, found, keyspace, wanted: replica });
        }
        engine.raise_floor(meta.head.floor);
        replay(&engine, &log, &mut meta, &dir)?;
        log.set_incarnation(meta.identity.incarnation);
        engine.raise_floor(meta.head.floor);
        meta.news.clear();
        let shared = Arc::new(Shared::new(engine, log.shared(), clock, &meta));
        let dedup = DedupTable::load(&shared.engine.with_prefix(&MetaKey::result_prefix())?);
        let mut store = Store::new(shared.clone(), log, meta, dedup);
        store.adopt()?;
        if let Some((version, range, state)) = initial
            && shared.view.load().ranges.state(range.first) != state
        {
            store.set_range(Epoch(0), version, range, state)?;
            store.sync_rest()?;
        }
        let (commands, receiver) = std::sync::mpsc::channel();
        let name = format!("writer-{keyspace}-{shard}-{replica}");
        let queue = Queue::new(commands, Writer::new(store, receiver), name);
        Ok(Self::new(keyspace, shard, replica, shared, queue))
    }
}

/// Returns the directory of the database below a replica's directory.
pub(crate) fn database_dir(dir: &Path) -> PathBuf {
    dir.join("db")
}

/// Returns the directory of the log below a replica's directory.
pub(super) fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// Creates the directories of a replica and makes their names durable before their contents are
/// promised. Syncs existing directories too: their creator may have died in between.
pub(super) fn create_dirs(
    dir: &Path,
    below: [&Path; 2],
    sync: impl Fn(&Path) -> std::io::Result<()>,
) -> Result<(), OpenError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, source }
    };
    for path in below {
        std::fs::create_dir_all(path).map_err(io(path))?;
    }
    for path in [Some(dir), dir.parent()].into_iter().flatten() {
        sync(path).map_err(io(path))?;
    }
    Ok(())
}

struct LogGuard(Arc<LogShared>);

impl FlushGuard for LogGuard {
    fn before_flush(&self) {
        // A failure poisons the log, which closes the replica at its next append.
        if let Err(error) = self.0.sync_appended() {
            tracing::error!(%error, "the log could not be synced before a flush");
        }
    }
}

fn read_meta(
    engine: &Engine,
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
) -> Result<Meta, OpenError> {
    let value = |key: MetaKey| engine.get(&key.encode());
    let identity = match value(MetaKey::Identity)? {
        Some(bytes) => Identity::decode(&bytes)?,
        None => Identity { keyspace, shard, replica, incarnation: Incarnation(0) },
    };
    let head = match value(MetaKey::Head)? {
        Some(bytes) => Head::decode(&bytes)?,
        None => Head::default(),
    };
    let ranges = match value(MetaKey::RangeStates)? {
        Some(bytes) => Ranges::decode(&bytes)?,
        None => Ranges::all(RangeState::Empty),
    };
    let vector = parse_vector(&engine.with_prefix(&MetaKey::vector_prefix())?);
    // The flushed data may hold deletes up to this commit time.
    let data_commit_time = head.commit_time_max;
    Ok(Meta { identity, head, ranges, vector, data_commit_time, news: Vec::new() })
}

fn replay(engine: &Engine, log: &Binlog, meta: &mut Meta, dir: &Path) -> Result<(), OpenError> {
    let applied = meta.head.applied_lsn;
    if applied > log.last_lsn() {
        return Err(OpenError::LogBehind {
            log: log.last_lsn(),
            database: applied,
            path: dir.to_owned(),
        });
    }
    let first = log.shared().first_lsn();
    if first > applied.next() {
        return Err(OpenError::LogAhead { first, database: applied, path: dir.to_owned() });
    }
    let mut reader = log.shared().reader(applied)?;
    let mut replayed = 0u64;
    loop {
        let records = reader.next_batch(4 << 20)?;
        if records.is_empty() {
            break;
        }
        for (_, bytes) in &records {
            let record = Record::decode(bytes)?;
            let batch = apply_record(meta, &record)?;
            engine.write(batch)?;
            replayed += 1;
        }
    }
    if replayed > 0 {
        tracing::info!(
            replayed,
            from = applied.0 + 1,
            to = meta.head.applied_lsn.0,
            "replayed the log"
        );
    }
    Ok(())
}
