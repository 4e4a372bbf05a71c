//! What a replica's writer is asked to do.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Epoch, Incarnation, Lsn, Origin, OwnSeq, PlanId, ReplicaId, Vector};
use vasto_core::record::{BandRange, IngestedObject, KeyEntry, Progress, RangeState, Record};
use vasto_core::{ErrorCode, VastoError};

use super::authority::Authority;
use crate::clock::since_boot;
use crate::shortage;

/// One operation of a write.
#[derive(Debug, Clone)]
pub struct WriteOp {
    /// The user key.
    pub key: Bytes,
    /// Hash of the partition key when it is not the key itself.
    pub partition_hash: Option<u64>,
    /// The caller's event time, microseconds since 1970; `None` is stamped.
    pub event_time: Option<u64>,
    /// What to do.
    pub change: Change,
    /// Time to live of a value that a read-modify-write creates, milliseconds: the keyspace's.
    pub created_ttl_ms: Option<u64>,
}

/// Put or delete.
#[derive(Debug, Clone)]
pub enum Change {
    /// Store a value.
    Put {
        /// The value.
        value: Bytes,
        /// Time to live, milliseconds.
        ttl_ms: Option<u64>,
        /// What must hold; makes it a read-modify-write.
        condition: Option<Condition>,
    },
    /// Store a tombstone.
    Delete {
        /// As of a put.
        condition: Option<Condition>,
    },
    /// Add to a counter.
    AddI64(i64),
    /// Add to a number.
    AddF64(f64),
    /// Raise a number to at least this.
    MaxF64(f64),
    /// Lower a number to at most this.
    MinF64(f64),
    /// Append to bytes.
    Append(Bytes),
}

/// What must hold for a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    Absent,
    /// This version stands.
    Version(u64),
}

/// A number that was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// An integer.
    I64(i64),
    /// The bits of a float.
    F64(u64),
}

/// Which operation of which client a read-modify-write is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpId {
    /// The client.
    pub client: u64,
    /// Its own number for it.
    pub sequence: u64,
    /// The replica that was asked before.
    pub tried: Option<ReplicaId>,
    /// Time since the first attempt, milliseconds.
    pub age_ms: u64,
}

/// What the sender of a write tells of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Told {
    /// Which operation it is, of read-modify-writes: done at most once.
    pub id: Option<OpId>,
    /// Boot time when the sender let go of it.
    pub sent: Option<Duration>,
    /// Boot time from which on the sender does not wait for it any more.
    pub until: Option<Duration>,
    /// The term of authority under which it was admitted; `None` when the sender chose this replica.
    pub term: Option<u64>,
}

/// The answer to what was not begun because nobody waits for it any more.
pub(crate) fn too_late() -> VastoError {
    VastoError::new(ErrorCode::DeadlineExceeded, "the time for the operation ended before the node came to it")
}

impl Change {
    /// True for a read-modify-write, which only the primary does.
    pub fn modifies(&self) -> bool {
        match self {
            Change::Put { condition, .. } | Change::Delete { condition } => condition.is_some(),
            Change::AddI64(_) | Change::AddF64(_) | Change::MaxF64(_) | Change::MinF64(_) | Change::Append(_) => true,
        }
    }
}

/// What became of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is stored with this event time.
    Applied(u64),
    /// An entry with this later event time stands.
    Superseded(u64),
    /// A read-modify-write is stored.
    Modified {
        /// Its event time.
        event_time: u64,
        /// The version of what stands now.
        version: u64,
        /// The number that stands now.
        number: Option<Number>,
    },
    /// The condition does not hold.
    NotApplied {
        /// Event time of what stands; 0 when nothing does.
        event_time: u64,
        /// Its version; 0 when nothing stands.
        version: u64,
    },
}

/// Called exactly once with the result.
pub type Completion = Box<dyn FnOnce(Result<Vec<Outcome>, VastoError>) + Send>;

/// A request of a client: all its operations become durable together.
pub struct WriteJob {
    /// In order.
    pub ops: Vec<WriteOp>,
    /// When to answer.
    pub ack: Ack,
    /// Which operation it is, of read-modify-writes.
    pub id: Option<OpId>,
    /// Boot time when its sender let go of it, or when it came.
    pub sent: Duration,
    /// Boot time from which on nobody waits for it any more.
    pub until: Option<Duration>,
    /// The term of authority under which it was admitted; `None` when its sender chose this replica.
    pub term: Option<u64>,
    /// Whose authority decides, once it is done, whether it may be acknowledged.
    pub(super) authority: Option<Arc<Authority>>,
    done: Option<Completion>,
    /// Room in the queue, given back when the job is dropped.
    _permit: Option<OwnedSemaphorePermit>,
}

impl WriteJob {
    /// A write that answers through `done`, exactly once: also when the job is dropped, which
    /// happens before it was begun, or when the writer dies.
    pub fn new(ops: Vec<WriteOp>, ack: Ack, done: Completion, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self {
            ops,
            ack,
            id: None,
            sent: since_boot(),
            until: None,
            term: None,
            authority: None,
            done: Some(done),
            _permit: permit,
        }
    }

    /// Says what the sender told of it.
    pub fn told(mut self, told: Told) -> Self {
        self.id = told.id;
        self.sent = told.sent.unwrap_or(self.sent);
        self.until = told.until;
        self.term = told.term;
        self
    }

    /// True when it holds a read-modify-write.
    pub fn modifies(&self) -> bool {
        self.ops.iter().any(|op| op.change.modifies())
    }

    /// Answers the caller.
    pub fn answer(mut self, result: Result<Vec<Outcome>, VastoError>) {
        let modifies = self.modifies();
        let Some(done) = self.done.take() else { return };
        match (result, self.authority.take().zip(self.term)) {
            (Ok(outcomes), Some((authority, term))) => {
                authority.acknowledge(term, modifies, move |verdict| done(verdict.map(|()| outcomes)));
            }
            (result, _) => done(result),
        }
    }
}

impl Drop for WriteJob {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            // A writer that dies in the middle of a group leaves the outcome open.
            let error = if std::thread::panicking() {
                VastoError::new(ErrorCode::Unknown, "the replica's writer died; the outcome is not known")
            } else {
                ReplicaError::Stopped.into()
            };
            done(Err(error));
        }
    }
}

/// Entries that come from another replica's log.
pub struct ApplyJob {
    /// User keys and encoded entries.
    pub entries: Vec<KeyEntry>,
    /// Progress that becomes durable with them.
    pub progress: Vec<Progress>,
    /// Answers with the LSN that covers them, synced.
    pub done: oneshot::Sender<Result<Lsn, ReplicaError>>,
}

/// Records of another replica of the shard, in the order of its log.
pub struct ReplicateJob {
    /// Whose log they come from.
    pub source: ReplicaId,
    /// Streamed kinds only; those that are here already are skipped.
    pub records: Vec<Record>,
    /// Of the source's log: the follower lacks nothing up to here afterwards.
    pub covered: Lsn,
    /// Answers once they are durable here.
    pub done: oneshot::Sender<Result<(), ReplicaError>>,
}

/// What a replica is to its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Not placed: a target under construction, or one to be drained. It takes nothing from clients.
    Detached,
    /// It takes everything but read-modify-writes.
    Secondary,
    /// It hands over: read-modify-writes wait for the outcome.
    HandingOver,
    /// It takes everything.
    #[default]
    Primary,
}

/// A consistent look at a replica, everything in it durable.
#[derive(Debug, Clone)]
pub struct Position {
    /// The last record.
    pub lsn: Lsn,
    /// Per origin, the last record.
    pub vector: Vector,
    /// The collection floor.
    pub floor: u64,
    /// This opening.
    pub incarnation: Incarnation,
}

/// A change of the replica itself, derived from a catalog version.
pub enum Control {
    /// Stop accepting writes for the range.
    Seal {
        /// The plan.
        plan: PlanId,
        /// The version that says so.
        version: CatalogVersion,
        /// The bands.
        range: BandRange,
    },
    /// Lift the seal of an undone plan.
    Unseal {
        /// The version that says so.
        version: CatalogVersion,
    },
    /// Give the range a state, and serve at this epoch from the same moment on.
    SetRange {
        /// The epoch of the version.
        epoch: Epoch,
        /// The version that says so.
        version: CatalogVersion,
        /// The bands.
        range: BandRange,
        /// The state; `Clearing` also removes what is stored there.
        state: RangeState,
    },
    /// Add finished SSTs to an arriving range.
    Ingest {
        /// The plan.
        plan: PlanId,
        /// The bands.
        range: BandRange,
        /// The SSTs, removed from their place.
        files: Vec<PathBuf>,
        /// Where the bytes came from.
        objects: Vec<IngestedObject>,
        /// Greatest event time in them.
        event_time_max: u64,
        /// Where the tails start.
        progress: Vec<Progress>,
    },
    /// The version was obeyed: requests may carry its epoch.
    Obey {
        /// Its epoch.
        epoch: Epoch,
        /// Its number.
        version: CatalogVersion,
        /// What the replica is under it.
        role: Role,
    },
    /// Never stamp a commit time at or below this one again.
    Promise {
        /// Microseconds.
        commit_time: u64,
    },
    /// The collection floor was agreed.
    GcFloor {
        /// Commit time, microseconds.
        floor: u64,
    },
    /// For tests: make everything appended so far durable.
    #[cfg(test)]
    Sync,
    /// Sync, flush the memtables, end the writer.
    Stop,
}

/// What the writer takes from its queue.
pub enum Job {
    /// A client's write.
    Write(WriteJob),
    /// Another log's entries.
    Apply(ApplyJob),
    /// Another replica's records.
    Replicate(ReplicateJob),
    /// A look at where the replica stands.
    Look(oneshot::Sender<Result<Position, ReplicaError>>),
    /// A change of the replica.
    Control(Control, oneshot::Sender<Result<Lsn, ReplicaError>>),
}

/// Why a replica cannot do what it is asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReplicaError {
    /// The writer ended.
    #[error("the replica is stopped")]
    Stopped,
    /// A sync, an append or an apply failed: nothing is written until it is opened again.
    #[error("the replica is closed to writes: {0}")]
    Closed(String),
    /// A record is missing before this one: the source's log does not reach back far enough.
    #[error("record {next} of origin {origin} was expected, and {got} came: the log of the source begins too late")]
    Gap {
        /// Whose record.
        origin: Origin,
        /// The one that is missing.
        next: OwnSeq,
        /// The one that came.
        got: OwnSeq,
    },
    /// The order contradicts the state of the replica.
    #[error("{0}")]
    Refused(String),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
}

impl From<ReplicaError> for VastoError {
    fn from(error: ReplicaError) -> Self {
        let code = match &error {
            ReplicaError::Closed(reason) if shortage::told_by(reason).is_some() => ErrorCode::NoSpace,
            ReplicaError::Stopped | ReplicaError::Closed(_) => ErrorCode::Unavailable,
            ReplicaError::Refused(_) | ReplicaError::Gap { .. } => ErrorCode::FailedPrecondition,
            ReplicaError::Engine(_) => ErrorCode::Unavailable,
        };
        VastoError::new(code, error.to_string()).retry_after_ms(100)
    }
}
