//! State of a replica that its writer shares with all other threads: the position that the writer
//! publishes, and what others set for the writer to obey.
//!
//! **Invariants**
//! - The position changes after the database. The vector is published before the LSN, so a reader
//!   that loads the LSN first finds every applied record in the vector.
//! - A closed replica stays closed until it is opened again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::sync::watch;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, Vector};

use super::apply::Meta;
use super::authority::Authority;
use super::bucket_acks::BucketAcks;
use super::command::{Position, ReplicaError, Role};
use super::followers::Followers;
use super::held::Pause;
use super::state::Ranges;
use super::superseded::SupersededRecords;
use super::tails::Tails;
use super::throttle::WriteThrottle;
use crate::binlog::LogShared;
use crate::clock::SharedClock;
use crate::engine::Engine;

/// Pause samples that are kept for a report.
const PAUSES_MAX: usize = 4_096;

/// Served ranges and their epoch, published together: a comparison of an epoch with a range state
/// must never see one without the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    /// State of its bands.
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
        Self {
            ranges: meta.ranges.clone(),
            epoch: meta.head.epoch,
            version: meta.head.version,
            role,
        }
    }

    fn shows(&self, meta: &Meta, role: Role) -> bool {
        self.role == role
            && self.epoch == meta.head.epoch
            && self.version == meta.head.version
            && self.ranges == meta.ranges
    }
}

/// Last count of the keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyCount {
    pub at: Instant,
    /// Last record applied before the count.
    pub applied: Lsn,
    pub keys: u64,
    /// Stored entries at that time, one for each version of a key that is not compacted away yet.
    pub stored: u64,
}

/// What rows of the replica take in tables, by the last trial.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    pub at: Instant,
    /// Stored entries at that time, as [`KeyCount::stored`].
    pub entries: u64,
    /// Entries among them that an export would hold.
    pub kept: f64,
    /// Bytes of a table beside its rows.
    pub table: u64,
    /// Bytes of a row in a table of the bottom level.
    pub settled: f64,
    /// Bytes of a row in a table that a flush writes.
    pub flushed: f64,
}

/// The last trial, and the state for which it was found good enough.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Trials {
    pub last: Option<Trial>,
    /// Last applied record, and version of the files.
    pub checked: Option<(Lsn, u64)>,
}

/// State of one replica that all threads share.
pub(super) struct Shared {
    pub(super) engine: Engine,
    pub(super) log: Arc<LogShared>,
    pub(super) clock: SharedClock,
    pub(super) view: ArcSwap<View>,
    pub(super) applied: AtomicU64,
    pub(super) incarnation: AtomicU64,
    closed: ArcSwapOption<String>,
    pub(super) changed: watch::Sender<u64>,
    /// Per origin, the last applied record; durable or about to be.
    pub(super) vector: Mutex<Vector>,
    /// Raised with every change of the vector.
    pub(super) vector_changes: watch::Sender<u64>,
    pub(super) floor: AtomicU64,
    pub(super) data_commit_time: AtomicU64,
    pub(super) followers: Followers,
    pub(super) bucket_acks: BucketAcks,
    pub(super) superseded: SupersededRecords,
    /// False until the replica has caught up with its peers since it was opened.
    pub(super) ready: AtomicBool,
    /// The replica is not primary before it has applied this version, whatever an older one said.
    pub(super) primary_from: AtomicU64,
    /// Nor before it has applied this epoch, which a follower has reported.
    pub(super) followers_epoch: AtomicU64,
    /// The log is far over its cap: writes are refused.
    pub(super) shed: AtomicBool,
    pub(super) pauses_us: Mutex<Vec<u64>>,
    /// The last pause of a seal.
    pub(super) pause: Mutex<Option<Pause>>,
    /// What the replica held when it sealed last, all of it durable, and the version that sealed it.
    pub(super) at_seal: Mutex<Option<(CatalogVersion, Position)>>,
    /// Readers of the log for other shards.
    pub(super) tails: Arc<Tails>,
    /// Writes of moving keys.
    pub(super) throttle: WriteThrottle,
    /// Number of stored results of read-modify-writes.
    pub(super) results: AtomicU64,
    /// Last count of the keys.
    pub(super) key_count: Mutex<Option<KeyCount>>,
    /// What its rows take in tables.
    pub(super) trials: Mutex<Trials>,
    pub(super) ended: AtomicBool,
    /// Requests of clients since the opening.
    pub(super) requests: AtomicU64,
    pub(super) authority: Arc<Authority>,
    /// Boot time since which the writer waits for its disk, milliseconds; 0 while it does not.
    pub(super) busy_since_ms: AtomicU64,
    /// Last own record in the log, applied or not.
    pub(super) logged_own_seq: AtomicU64,
    /// Last own record of which the writer knows that it is applied and durable: none that was
    /// acknowledged as durable is behind it.
    pub(super) settled_own_seq: AtomicU64,
}

impl Shared {
    /// Creates the state of a replica that has been read and replayed, and has no role yet.
    pub(super) fn new(
        engine: Engine,
        log: Arc<LogShared>,
        clock: SharedClock,
        meta: &Meta,
    ) -> Self {
        Self {
            engine,
            log,
            clock,
            view: ArcSwap::from_pointee(View::of(meta, Role::default())),
            applied: AtomicU64::new(meta.head.applied_lsn.0),
            incarnation: AtomicU64::new(meta.identity.incarnation.0),
            closed: ArcSwapOption::empty(),
            changed: watch::channel(0).0,
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
            pauses_us: Mutex::default(),
            pause: Mutex::default(),
            at_seal: Mutex::default(),
            tails: Arc::default(),
            throttle: WriteThrottle::default(),
            results: AtomicU64::new(0),
            key_count: Mutex::default(),
            trials: Mutex::default(),
            ended: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            authority: Arc::default(),
            busy_since_ms: AtomicU64::new(0),
            logged_own_seq: AtomicU64::new(0),
            settled_own_seq: AtomicU64::new(0),
        }
    }

    /// Publishes what the metadata say, and the news of the vector, which are taken out of them.
    pub(super) fn publish(&self, meta: &mut Meta, role: Role) {
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

    /// Returns the reason why the replica takes no writes, if it is closed.
    pub(super) fn closed(&self) -> Option<String> {
        self.closed.load().as_ref().map(|reason| reason.as_ref().clone())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load().is_some()
    }

    /// Fails with [`ReplicaError::Closed`] when the replica takes no writes.
    pub(super) fn check_open(&self) -> Result<(), ReplicaError> {
        self.closed().map_or(Ok(()), |reason| Err(ReplicaError::Closed(reason)))
    }

    /// Closes the replica to writes until it is opened again.
    pub(super) fn close(&self, reason: String) {
        if !self.is_closed() {
            self.closed.store(Some(Arc::new(reason)));
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// Answers all writes that wait for an acknowledgement, because the writer ends: none comes any
    /// more.
    pub(super) fn abandon_acknowledgements(&self) {
        self.followers.abandon();
        self.bucket_acks.abandon();
        self.authority.abandon();
    }

    /// Adds pauses of writes to sealed ranges, microseconds, and the moments of that of a seal.
    pub(super) fn add_pauses(&self, samples: Vec<u64>, pause: Option<Pause>) {
        if pause.is_some() {
            *self.pause.lock() = pause;
        }
        let mut pauses = self.pauses_us.lock();
        let room = PAUSES_MAX.saturating_sub(pauses.len());
        pauses.extend(samples.into_iter().take(room));
    }
}
