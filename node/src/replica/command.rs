//! Commands of a replica's writer: what it is asked to do, and how each command is answered.
//!
//! **Invariant:** a command that waits for an answer gets exactly one, also when it is dropped
//! before it was begun.

mod operation;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use vasto_core::catalog::Ack;
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, Lsn, Origin, OwnSeq, PlanId, ReplicaId, Vector,
};
use vasto_core::record::{BandRange, FeedProgress, IngestedObject, KeyEntry, RangeState, Record};
use vasto_core::{ErrorCode, VastoError};

pub(crate) use operation::{Condition, Number, OpId, OpKind, OpOutcome, WriteOp};

use super::authority::Authority;
use crate::clock::since_boot;
use crate::shortage;

/// Facts that the sender of a write reports.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WriteContext {
    /// Identity of a read-modify-write, which is done at most once.
    pub id: Option<OpId>,
    /// Boot time when the sender sent it.
    pub sent: Option<Duration>,
    /// Boot time from which on the sender no longer waits.
    pub until: Option<Duration>,
    /// Term of authority under which it was admitted; `None` when the sender chose this replica.
    pub term: Option<u64>,
    /// Boot time from which on nothing but the machine has held it up.
    pub begun: Option<Duration>,
}

/// Returns the error for a write that was not begun because its sender no longer waits.
pub(crate) fn too_late() -> VastoError {
    VastoError::new(
        ErrorCode::DeadlineExceeded,
        "the time for the operation ended before the node came to it",
    )
}

/// Returns the error for a key outside the owned bands.
pub(super) fn wrong_epoch() -> VastoError {
    VastoError::new(
        ErrorCode::WrongEpoch,
        "this node does not own the key; fetch the topology and go to its owner",
    )
}

/// Callback that is called exactly once with the result.
pub(crate) type Completion = Box<dyn FnOnce(Result<Vec<OpOutcome>, VastoError>) + Send>;

/// Request of a client: all its operations become durable together.
pub(crate) struct WriteCommand {
    /// Operations in order.
    pub ops: Vec<WriteOp>,
    /// Durability at which to answer.
    pub ack: Ack,
    /// Identity of a read-modify-write.
    pub id: Option<OpId>,
    /// Boot time when its sender sent it, or when it arrived.
    pub sent: Duration,
    /// Boot time from which on its sender no longer waits.
    pub until: Option<Duration>,
    /// Term of authority under which it was admitted; `None` when its sender chose this replica.
    pub term: Option<u64>,
    /// It has been held back so that the tails of a plan catch up; once is enough.
    pub(super) was_slowed: bool,
    /// Boot time from which on nothing but the machine has held it up; `None` when its time says
    /// nothing of the machine.
    pub(super) begun: Option<Duration>,
    /// Authority that decides, once the write is done, whether it may be acknowledged.
    pub(super) authority: Option<Arc<Authority>>,
    done: Option<Completion>,
    /// Space in the queue, released when the command is dropped.
    _permit: Option<OwnedSemaphorePermit>,
}

impl WriteCommand {
    /// Creates a write that answers through `done` exactly once: also when the command is dropped,
    /// which happens before it was begun, or when the writer dies.
    pub(crate) fn new(
        ops: Vec<WriteOp>,
        ack: Ack,
        done: Completion,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            ops,
            ack,
            id: None,
            sent: since_boot(),
            until: None,
            term: None,
            was_slowed: false,
            begun: None,
            authority: None,
            done: Some(done),
            _permit: permit,
        }
    }

    /// Adds the facts that the sender reported.
    pub(crate) fn with_context(mut self, context: WriteContext) -> Self {
        self.id = context.id;
        self.sent = context.sent.unwrap_or(self.sent);
        self.until = context.until;
        self.term = context.term;
        self.begun = context.begun;
        self
    }

    /// Returns true when the command holds a read-modify-write.
    pub(crate) fn modifies(&self) -> bool {
        self.ops.iter().any(|op| op.change.modifies())
    }

    /// Answers the caller.
    pub(crate) fn answer(mut self, result: Result<Vec<OpOutcome>, VastoError>) {
        let modifies = self.modifies();
        let Some(done) = self.done.take() else { return };
        match (result, self.authority.take().zip(self.term)) {
            (Ok(outcomes), Some((authority, term))) => {
                authority
                    .acknowledge(term, modifies, move |verdict| done(verdict.map(|()| outcomes)));
            }
            (result, _) => done(result),
        }
    }
}

impl Drop for WriteCommand {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            // A writer that dies inside a group leaves the outcome unknown.
            let error = if std::thread::panicking() {
                VastoError::new(
                    ErrorCode::Unknown,
                    "the replica's writer died; the outcome is not known",
                )
            } else {
                ReplicaError::Stopped.into()
            };
            done(Err(error));
        }
    }
}

/// Entries from another replica's log.
pub(crate) struct ApplyCommand {
    /// User keys and encoded entries.
    pub entries: Vec<KeyEntry>,
    /// Cursors that become durable with the entries.
    pub progress: Vec<FeedProgress>,
    /// The answer waits until the entries are durable.
    pub sync: bool,
    /// Receives the LSN that covers the entries.
    pub done: oneshot::Sender<Result<Lsn, ReplicaError>>,
}

/// Records of another replica of the shard, in the order of its log.
pub(crate) struct ReplicateCommand {
    /// Replica whose log the records come from.
    pub source: ReplicaId,
    /// Records of streamed kinds only; those that are here already are skipped.
    pub records: Vec<Record>,
    /// LSN of the source's log up to which the follower lacks nothing afterwards.
    pub covered: Lsn,
    /// Receives the result once the records are durable here.
    pub done: oneshot::Sender<Result<(), ReplicaError>>,
}

/// Role of a replica in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Role {
    /// Not placed: a target under construction, or a draining replica. Accepts nothing from
    /// clients.
    Detached,
    /// Accepts everything but read-modify-writes.
    Secondary,
    /// Transfers leadership: read-modify-writes wait for the outcome.
    TransferringLeadership,
    /// Accepts everything.
    #[default]
    Primary,
}

/// Consistent position of a replica, all of it durable.
#[derive(Debug, Clone)]
pub(crate) struct Position {
    /// LSN of the last record.
    pub lsn: Lsn,
    /// Per origin, the last record.
    pub vector: Vector,
    /// The gc floor.
    pub floor: u64,
    /// Incarnation of this opening.
    pub incarnation: Incarnation,
}

/// A change of the replica itself, derived from a catalog version.
pub(crate) enum Control {
    /// Stop accepting writes for the range.
    Seal {
        /// The plan.
        plan: PlanId,
        /// The catalog version that demands it.
        version: CatalogVersion,
        /// The bands.
        range: BandRange,
    },
    /// Lift the seal of an undone plan.
    Unseal {
        /// The catalog version that demands it.
        version: CatalogVersion,
    },
    /// Give the range a state, and atomically with it serve at this epoch.
    SetRange {
        /// The epoch of the version.
        epoch: Epoch,
        /// The catalog version that demands it.
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
        /// Objects that the bytes came from.
        objects: Vec<IngestedObject>,
        /// Greatest event time in them.
        event_time_max: u64,
        /// Positions at which the tails start.
        progress: Vec<FeedProgress>,
    },
    /// The version was applied: requests may carry its epoch.
    ApplyCatalog {
        /// Its epoch.
        epoch: Epoch,
        /// Its number.
        version: CatalogVersion,
        /// Role of the replica under it.
        role: Role,
    },
    /// Never assign a commit time at or below this one again.
    FenceCommitTime {
        /// Microseconds.
        commit_time: u64,
    },
    /// Raise the gc floor to the agreed one.
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

/// Command that the writer takes from its queue.
pub(crate) enum Command {
    /// A client's write.
    Write(WriteCommand),
    /// Entries of another log.
    Apply(ApplyCommand),
    /// Records of another replica.
    Replicate(ReplicateCommand),
    /// A read of the replica's position.
    Position(oneshot::Sender<Result<Position, ReplicaError>>),
    /// A change of the replica.
    Control(Control, oneshot::Sender<Result<Lsn, ReplicaError>>),
}

/// Reason why a replica cannot execute a command.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReplicaError {
    /// The writer has ended.
    #[error("the replica is stopped")]
    Stopped,
    /// A sync, an append or an apply failed: the replica takes no writes until it is opened again.
    #[error("the replica is closed to writes: {0}")]
    Closed(String),
    /// A record is missing before this one: the source's log does not reach back far enough.
    #[error(
        "record {next} of origin {origin} was expected, and {got} came: the log of the source begins too late"
    )]
    Gap {
        /// Origin of the record.
        origin: Origin,
        /// The missing record.
        next: OwnSeq,
        /// The record that arrived.
        got: OwnSeq,
    },
    /// The command contradicts the state of the replica.
    #[error("{0}")]
    Refused(String),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    /// A test lets the step fail.
    #[error(transparent)]
    Injected(#[from] vasto_failpoint::Injected),
}

impl From<ReplicaError> for VastoError {
    fn from(error: ReplicaError) -> Self {
        let code = match &error {
            ReplicaError::Closed(reason) if shortage::shortage_of(reason).is_some() => {
                ErrorCode::NoSpace
            }
            ReplicaError::Stopped | ReplicaError::Closed(_) => ErrorCode::Unavailable,
            ReplicaError::Refused(_) | ReplicaError::Gap { .. } => ErrorCode::FailedPrecondition,
            ReplicaError::Engine(_) | ReplicaError::Injected(_) => ErrorCode::Unavailable,
        };
        VastoError::new(code, error.to_string()).retry_after_ms(100)
    }
}
