//! One replica of a shard: its engine, log, writer, and the handle that other modules use.
//!
//! **Invariants**
//! - Only the writer changes a replica; readers see the state that it has published.
//! - Every open is a new incarnation, whose `adopt` record is synced before the first own write.
//! - Opening replays the log after `applied_lsn`; a log that ends before what the database holds,
//!   or that has a hole, stops the replica with a named error instead of serving less than was
//!   acknowledged.

pub mod apply;
mod assign;
pub mod authority;
pub mod bucket_acks;
pub mod command;
mod dedup;
pub mod followers;
mod max_event_times;
pub(crate) mod metrics;
mod queue;
pub mod read;
mod replicate;
mod rmw;
pub mod size;
pub mod state;
mod superseded;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot, watch};
use vasto_core::catalog::Ack;
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, Origin, OwnSeq, ReplicaId, ShardId, Vector, covers,
};
use vasto_core::limits::{BINLOG_FILE_BYTES, WRITE_QUEUE_BYTES_MAX};
use vasto_core::record::{BandRange, FeedProgress, KeyEntry, RangeState, Record};
use vasto_core::stored_key::MetaKey;
use vasto_core::{ErrorCode, VastoError};

use crate::binlog::{Binlog, BinlogConfig, BinlogError, LogShared};
use crate::clock::SharedClock;
use crate::engine::{Engine, EngineError, EngineShared, FlushGuard};
use crate::node_dir::sync_dir;
use apply::{ApplyError, Meta, apply_record};
use authority::Authority;
use bucket_acks::BucketAcks;
use command::{
    ApplyCommand, Command, Completion, Control, Position, ReplicaError, ReplicateCommand, Role, WriteCommand,
    WriteContext, WriteOp,
};
use dedup::DedupTable;
use followers::Followers;
use queue::Queue;
use size::KeyCount;
use state::{Head, Identity, Ranges};
use superseded::SupersededRecords;
use writer::Writer;

/// Reason why a replica does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
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
pub struct OpenOptions {
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

/// Served ranges and their epoch, published together: a comparison of an epoch with a range state must never see one
/// without the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The state of its bands.
    pub ranges: Ranges,
    /// Epoch that the replica has applied.
    pub epoch: Epoch,
    /// Catalog version that the replica has applied.
    pub version: CatalogVersion,
    /// Role of the replica in its shard under that version.
    pub role: Role,
}

impl View {
    fn of(meta: &Meta, role: Role) -> Self {
        Self { ranges: meta.ranges.clone(), epoch: meta.head.epoch, version: meta.head.version, role }
    }

    fn shows(&self, meta: &Meta, role: Role) -> bool {
        self.role == role
            && self.epoch == meta.head.epoch
            && self.version == meta.head.version
            && self.ranges == meta.ranges
    }
}

/// State that the writer shares with all other threads.
pub struct Shared {
    pub(crate) engine: Engine,
    pub(crate) log: Arc<LogShared>,
    pub(crate) clock: SharedClock,
    view: ArcSwap<View>,
    applied: AtomicU64,
    incarnation: AtomicU64,
    closed: ArcSwapOption<String>,
    changed: watch::Sender<u64>,
    /// Per origin, the last applied record; durable or about to be.
    vector: Mutex<Vector>,
    /// Raised with every change of the vector.
    vector_changes: watch::Sender<u64>,
    floor: AtomicU64,
    data_commit_time: AtomicU64,
    pub(crate) followers: Followers,
    pub(crate) bucket_acks: BucketAcks,
    superseded: SupersededRecords,
    /// False until the replica has caught up with its peers since it was opened.
    ready: AtomicBool,
    /// The replica is not primary before it has applied this version, whatever an older one said.
    primary_from: AtomicU64,
    /// Nor before it has applied this epoch, which a follower has reported.
    followers_epoch: AtomicU64,
    /// The log is far over its cap: writes are refused.
    shed: AtomicBool,
    pauses_us: Mutex<Vec<u64>>,
    /// Number of stored results of read-modify-writes.
    results: AtomicU64,
    /// Last count of the keys.
    key_count: Mutex<Option<KeyCount>>,
    ended: AtomicBool,
    authority: Arc<Authority>,
    /// Boot time since which the writer waits for its disk, milliseconds; 0 while it does not.
    busy_since_ms: AtomicU64,
    /// Last own record in the log, applied or not.
    logged_own_seq: AtomicU64,
}

/// Identity, head and range states.
const META_ROWS: u64 = 3;

/// Reason for closing a replica of whose records others hold more than it has ever written.
pub const OLD_COPY: &str = "others hold records of this replica that it has never written: its directory is an old \
                            copy; evict the replica (`vasto keyspace evict`), it is rebuilt from the others";

/// Pause samples that are kept for a report.
const PAUSES_MAX: usize = 4_096;

impl Shared {
    fn publish(&self, meta: &mut Meta, role: Role) {
        if !self.view.load().shows(meta, role) {
            self.view.store(Arc::new(View::of(meta, role)));
            self.changed.send_modify(|count| *count += 1);
        }
        if !meta.news.is_empty() {
            self.vector.lock().extend(meta.news.drain(..));
            self.vector_changes.send_modify(|count| *count += 1);
        }
        self.floor.store(meta.head.floor, Ordering::Release);
        self.data_commit_time.store(meta.data_commit_time, Ordering::Release);
        self.incarnation.store(meta.identity.incarnation.0, Ordering::Release);
        self.applied.store(meta.head.applied_lsn.0, Ordering::Release);
    }

    fn closed(&self) -> Option<String> {
        self.closed.load().as_ref().map(|reason| reason.as_ref().clone())
    }

    fn close(&self, reason: String) {
        if self.closed.load().is_none() {
            self.closed.store(Some(Arc::new(reason)));
            self.changed.send_modify(|count| *count += 1);
        }
    }

    fn add_pauses(&self, samples: Vec<u64>) {
        let mut pauses = self.pauses_us.lock();
        let room = PAUSES_MAX.saturating_sub(pauses.len());
        pauses.extend(samples.into_iter().take(room));
    }
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

/// A handle to an open replica.
#[derive(Clone)]
pub struct Replica {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub id: ReplicaId,
    shared: Arc<Shared>,
    commands: Arc<Queue>,
    queue_bytes: Arc<Semaphore>,
}

/// Returns the directory of the database below a replica's directory.
pub fn database_dir(dir: &Path) -> PathBuf {
    dir.join("db")
}

/// Returns the directory of the log below a replica's directory.
pub fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// Creates the directories of a replica and makes their names durable before their contents are promised. Syncs
/// existing directories too: their creator may have died in between.
fn create_dirs(dir: &Path, below: [&Path; 2], sync: impl Fn(&Path) -> std::io::Result<()>) -> Result<(), OpenError> {
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

impl Replica {
    /// Opens (or, with `initial`, creates) a replica: recovers its log, replays, begins a new incarnation. Blocks on
    /// the disk; callers limit how many replicas open at a time ([`EngineShared::opening`]).
    pub fn open(options: OpenOptions) -> Result<Self, OpenError> {
        let OpenOptions { dir, keyspace, shard, replica, shared, clock, initial } = options;
        let engines = shared;
        let (db_dir, log_dir) = (database_dir(&dir), log_dir(&dir));
        create_dirs(&dir, [&db_dir, &log_dir], sync_dir)?;
        let mut log =
            Binlog::open(BinlogConfig { dir: log_dir, keyspace, shard, replica, file_bytes: BINLOG_FILE_BYTES })?;
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
        let (changed, _) = watch::channel(0);
        engine.raise_floor(meta.head.floor);
        meta.news.clear();
        let shared = Arc::new(Shared {
            log: log.shared(),
            clock,
            view: ArcSwap::from_pointee(View::of(&meta, Role::default())),
            vector: Mutex::new(meta.vector.clone()),
            vector_changes: watch::channel(0).0,
            floor: AtomicU64::new(meta.head.floor),
            data_commit_time: AtomicU64::new(meta.data_commit_time),
            followers: Followers::default(),
            bucket_acks: BucketAcks::default(),
            superseded: SupersededRecords::default(),
            ready: AtomicBool::new(true),
            primary_from: AtomicU64::new(0),
            followers_epoch: AtomicU64::new(0),
            shed: AtomicBool::new(false),
            applied: AtomicU64::new(meta.head.applied_lsn.0),
            incarnation: AtomicU64::new(meta.identity.incarnation.0),
            closed: ArcSwapOption::empty(),
            changed,
            pauses_us: Mutex::default(),
            results: AtomicU64::new(0),
            key_count: Mutex::default(),
            ended: AtomicBool::new(false),
            authority: Arc::default(),
            busy_since_ms: AtomicU64::new(0),
            logged_own_seq: AtomicU64::new(0),
            engine,
        });
        let dedup = DedupTable::load(&shared.engine.with_prefix(&MetaKey::result_prefix())?);
        let (commands, receiver) = std::sync::mpsc::channel();
        let mut writer = Writer::new(shared.clone(), log, meta, dedup, receiver);
        writer.adopt()?;
        if let Some((version, range, state)) = initial
            && shared.view.load().ranges.state(range.first) != state
        {
            writer.set_range(Epoch(0), version, range, state)?;
        }
        let commands = Queue::new(commands, writer, format!("writer-{keyspace}-{shard}-{replica}"));
        let queue_bytes = Arc::new(Semaphore::new(WRITE_QUEUE_BYTES_MAX));
        Ok(Self { keyspace, shard, id: replica, shared, commands: Arc::new(commands), queue_bytes })
    }

    /// For tests: queues a write without a context from its sender.
    #[cfg(test)]
    pub fn write(&self, ops: Vec<WriteOp>, ack: Ack, bytes: usize, done: Completion) {
        self.write_as(ops, ack, bytes, WriteContext::default(), done);
    }

    /// Queues a client's write with the context that its sender reported; calls `done` exactly once. Refuses the write
    /// at once when the queue is full.
    pub fn write_as(&self, ops: Vec<WriteOp>, ack: Ack, bytes: usize, context: WriteContext, done: Completion) {
        if self.shared.shed.load(Ordering::Relaxed) {
            done(Err(VastoError::new(
                ErrorCode::Overloaded,
                "the replica's log is full because another replica does not read it; see `vasto cluster status`",
            )
            .retry_after_ms(1_000)));
            return;
        }
        let weight = (bytes + 64).min(WRITE_QUEUE_BYTES_MAX) as u32;
        let Ok(permit) = self.queue_bytes.clone().try_acquire_many_owned(weight) else {
            done(Err(VastoError::new(ErrorCode::Overloaded, "the replica's write queue is full; slow down")
                .retry_after_ms(20)));
            return;
        };
        // A command that is refused because the writer has ended answers itself when it is dropped.
        let _ =
            self.commands.send(Command::Write(WriteCommand::new(ops, ack, done, Some(permit)).with_context(context)));
    }

    /// Merges entries of another log, at most a batch; returns once they are durable here.
    pub async fn apply(&self, entries: Vec<KeyEntry>, progress: Vec<FeedProgress>) -> Result<Lsn, ReplicaError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(Command::Apply(ApplyCommand { entries, progress, done }))?;
        answer.await.map_err(|_| ReplicaError::Stopped)?
    }

    /// Takes records of another replica's log; returns once they are durable here.
    ///
    /// # Errors
    /// [`ReplicaError::Gap`] when a record before them is missing: no record after the gap is taken.
    pub async fn replicate(&self, source: ReplicaId, records: Vec<Record>, covered: Lsn) -> Result<(), ReplicaError> {
        let (done, answer) = oneshot::channel();
        let command = ReplicateCommand { source, records, covered, done };
        self.commands.send(Command::Replicate(command))?;
        answer.await.map_err(|_| ReplicaError::Stopped)?
    }

    /// Returns the position of the replica, with everything durable. A closed replica returns what it settled before.
    pub async fn position(&self) -> Result<Position, ReplicaError> {
        let (done, answer) = oneshot::channel();
        let asked = self.commands.send(Command::Look(done)).is_ok();
        match if asked { answer.await.ok() } else { None } {
            Some(Ok(position)) => Ok(position),
            _ if self.closed().is_some() && !self.shared.ended.load(Ordering::Acquire) => Ok(self.settled()),
            Some(Err(error)) => Err(error),
            None => Err(ReplicaError::Stopped),
        }
    }

    /// Returns the position that is durable and visible, without the writer.
    pub(crate) fn settled(&self) -> Position {
        // Read in this order: every applied record is in the vector.
        let synced = self.shared.log.synced_lsn();
        let applied = self.applied_lsn();
        let mut vector = self.vector();
        // Only own records with entries are ever applied before they are synced.
        let unsynced = applied.0.saturating_sub(synced.0);
        let own = Origin { replica: self.id, incarnation: self.incarnation() };
        if let Some(own_seq) = vector.get_mut(&own) {
            own_seq.0 = own_seq.0.saturating_sub(unsynced);
        }
        Position { lsn: applied.min(synced), vector, floor: self.floor(), incarnation: own.incarnation }
    }

    /// Changes the replica itself; returns once the change is durable.
    pub async fn control(&self, order: Control) -> Result<Lsn, ReplicaError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(Command::Control(order, done))?;
        answer.await.map_err(|_| ReplicaError::Stopped)?
    }

    /// Syncs, flushes and ends the writer, then stops the engine's background work.
    pub async fn stop(&self) {
        let _ = self.control(Control::Stop).await;
        let (shared, thread) = (self.shared.clone(), self.commands.take_thread());
        let end = move || {
            if let Some(thread) = thread {
                let _ = thread.join();
            }
            shared.engine.close();
        };
        let _ = tokio::task::spawn_blocking(end).await;
    }

    /// Returns the database.
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Returns the log, for readers.
    pub fn log(&self) -> &Arc<LogShared> {
        &self.shared.log
    }

    /// Returns the ranges that the replica serves, and since which epoch.
    pub fn view(&self) -> Arc<View> {
        self.shared.view.load_full()
    }

    /// Returns the state of its bands.
    pub fn ranges(&self) -> Ranges {
        self.shared.view.load().ranges.clone()
    }

    /// Returns the epoch that the replica has applied.
    pub fn epoch(&self) -> Epoch {
        self.shared.view.load().epoch
    }

    /// Returns the catalog version that the replica has applied.
    pub fn version(&self) -> CatalogVersion {
        self.shared.view.load().version
    }

    /// Returns the incarnation of this opening.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(self.shared.incarnation.load(Ordering::Acquire))
    }

    /// Returns the last record that readers see.
    pub fn applied_lsn(&self) -> Lsn {
        Lsn(self.shared.applied.load(Ordering::Acquire))
    }

    /// Returns the last record that is both durable and visible: it may be streamed and shipped.
    pub fn settled_lsn(&self) -> Lsn {
        self.applied_lsn().min(self.shared.log.synced_lsn())
    }

    /// Returns the position of the database on disk, without its memtables.
    pub fn persisted_lsn(&self) -> Result<Lsn, EngineError> {
        let bytes = self.shared.engine.get_persisted(&writer::head_key())?;
        Ok(bytes.and_then(|bytes| Head::decode(&bytes).ok()).map(|head| head.applied_lsn).unwrap_or_default())
    }

    /// Returns, per origin, the last record that is applied.
    pub fn vector(&self) -> Vector {
        self.shared.vector.lock().clone()
    }

    /// Subscribes to a number that rises with every change of the vector.
    pub fn vector_changes(&self) -> watch::Receiver<u64> {
        self.shared.vector_changes.subscribe()
    }

    /// Returns true when the replica holds at least the records of the vector.
    pub fn covers(&self, vector: &Vector) -> bool {
        covers(&self.shared.vector.lock(), vector)
    }

    /// Returns the gc floor, a commit time.
    pub fn floor(&self) -> u64 {
        self.shared.floor.load(Ordering::Acquire)
    }

    /// Returns the commit time of the last record that stored something.
    pub fn data_commit_time(&self) -> u64 {
        self.shared.data_commit_time.load(Ordering::Acquire)
    }

    /// Returns the followers that pull its log.
    pub fn followers(&self) -> &Followers {
        &self.shared.followers
    }

    /// Returns the writes that wait for the bucket.
    pub fn bucket_acks(&self) -> &BucketAcks {
        &self.shared.bucket_acks
    }

    /// Returns false while the replica has not caught up with its peers since it was opened.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
    }

    /// Sets whether the replica has caught up; notifies the receivers of [`Self::changes`].
    pub fn set_ready(&self, ready: bool) {
        if self.shared.ready.swap(ready, Ordering::AcqRel) != ready {
            self.shared.changed.send_modify(|count| *count += 1);
        }
    }

    /// Keeps the replica from being primary before it has applied this version.
    pub fn primary_from(&self, version: CatalogVersion) {
        self.shared.primary_from.fetch_max(version.0, Ordering::AcqRel);
    }

    /// Records that a follower has applied this epoch, under which another replica may be primary.
    pub fn follower_at(&self, epoch: Epoch) {
        self.shared.followers_epoch.fetch_max(epoch.0, Ordering::AcqRel);
    }

    /// Returns the authority that decides on strict requests.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.shared.authority
    }

    /// Returns for how long the writer has been waiting for the disk, milliseconds.
    pub fn busy_ms(&self, now_ms: u64) -> u64 {
        match self.shared.busy_since_ms.load(Ordering::Acquire) {
            0 => 0,
            since => now_ms.saturating_sub(since),
        }
    }

    /// Returns the last record of this opening that is in the log. A peer may hold it before it is visible here.
    pub fn logged_own_seq(&self) -> OwnSeq {
        OwnSeq(self.shared.logged_own_seq.load(Ordering::Acquire))
    }

    /// Returns whether another replica holds records of this one that it never wrote: its directory is an old copy.
    pub fn is_behind_itself(&self, others: &Vector) -> bool {
        let (me, incarnation) = (self.id, self.incarnation());
        others.iter().any(|(origin, seq)| {
            origin.replica == me
                && match origin.incarnation.cmp(&incarnation) {
                    std::cmp::Ordering::Less => false,
                    std::cmp::Ordering::Equal => *seq > self.logged_own_seq(),
                    std::cmp::Ordering::Greater => true,
                }
        })
    }

    /// Returns records of another replica that lost an entry here; see [`SupersededRecords::of`].
    pub fn losses_of(&self, replica: ReplicaId, after: u64) -> (Vec<(Origin, OwnSeq)>, u64) {
        self.shared.superseded.of(replica, after)
    }

    /// Sets whether writes are refused because the log is far over its cap.
    pub fn set_shed(&self, shed: bool) {
        self.shared.shed.store(shed, Ordering::Relaxed);
    }

    /// Closes the replica to writes: it must not go on.
    pub fn close(&self, reason: String) {
        self.shared.close(reason);
    }

    /// Returns the reason why the replica takes no writes, if it is closed.
    pub fn closed(&self) -> Option<String> {
        self.shared.closed()
    }

    /// Returns true when the replica takes no more writes.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load().is_some()
    }

    /// Subscribes to changes of ranges, epoch, version and closure.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Takes the pauses of writes to sealed ranges, microseconds.
    pub fn take_pauses(&self) -> Vec<u64> {
        std::mem::take(&mut *self.shared.pauses_us.lock())
    }

    /// Returns the durable cursors of the tails that feed the replica.
    pub fn tail_cursors(&self) -> Result<Vec<(ReplicaId, Lsn)>, EngineError> {
        let rows = self.shared.engine.with_prefix(&MetaKey::tail_cursor_prefix())?;
        Ok(rows.iter().filter_map(|(key, value)| parse_cursor(key, value)).collect())
    }
}

fn parse_cursor(key: &[u8], value: &[u8]) -> Option<(ReplicaId, Lsn)> {
    let MetaKey::TailCursor(replica) = MetaKey::decode(key).ok()? else { return None };
    Some((replica, Lsn(u64::from_le_bytes(value.try_into().ok()?))))
}

/// Reads a vector out of stored metadata rows.
pub fn parse_vector(rows: &[(Vec<u8>, Vec<u8>)]) -> Vector {
    rows.iter()
        .filter_map(|(key, value)| {
            let MetaKey::Vector(origin) = MetaKey::decode(key).ok()? else { return None };
            Some((origin, OwnSeq(u64::from_le_bytes(value.as_slice().try_into().ok()?))))
        })
        .collect()
}

fn read_meta(engine: &Engine, keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId) -> Result<Meta, OpenError> {
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
        return Err(OpenError::LogBehind { log: log.last_lsn(), database: applied, path: dir.to_owned() });
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
        tracing::info!(replayed, from = applied.0 + 1, to = meta.head.applied_lsn.0, "replayed the log");
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
