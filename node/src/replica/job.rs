//! What a replica's writer is asked to do.

use std::path::PathBuf;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, PlanId};
use vasto_core::record::{BandRange, IngestedObject, KeyEntry, Progress, RangeState};
use vasto_core::{ErrorCode, VastoError};

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
    },
    /// Store a tombstone.
    Delete,
}

/// What became of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is stored with this event time.
    Applied(u64),
    /// An entry with this later event time stands.
    Superseded(u64),
}

/// Called exactly once with the result.
pub type Completion = Box<dyn FnOnce(Result<Vec<Outcome>, VastoError>) + Send>;

/// A request of a client: all its operations become durable together.
pub struct WriteJob {
    /// In order.
    pub ops: Vec<WriteOp>,
    /// When to answer.
    pub ack: Ack,
    done: Option<Completion>,
    /// Room in the queue, given back when the job is dropped.
    _permit: Option<OwnedSemaphorePermit>,
}

impl WriteJob {
    /// A write that answers through `done`, exactly once: also when the job is dropped, which
    /// happens before it was begun, or when the writer dies.
    pub fn new(ops: Vec<WriteOp>, ack: Ack, done: Completion, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self { ops, ack, done: Some(done), _permit: permit }
    }

    /// Answers the caller.
    pub fn answer(mut self, result: Result<Vec<Outcome>, VastoError>) {
        if let Some(done) = self.done.take() {
            done(result);
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
    },
    /// Make everything appended so far durable.
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
            ReplicaError::Stopped | ReplicaError::Closed(_) => ErrorCode::Unavailable,
            ReplicaError::Refused(_) => ErrorCode::FailedPrecondition,
            ReplicaError::Engine(_) => ErrorCode::Unavailable,
        };
        VastoError::new(code, error.to_string()).retry_after_ms(100)
    }
}
