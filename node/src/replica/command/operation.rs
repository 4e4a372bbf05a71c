//! Operations of a write, and their outcomes.

use bytes::Bytes;
use vasto_core::ids::ReplicaId;

/// One operation of a write.
#[derive(Debug, Clone)]
pub(crate) struct WriteOp {
    /// The user key.
    pub key: Bytes,
    /// Hash of the partition key when it is not the key itself.
    pub partition_hash: Option<u64>,
    /// Event time of the caller, microseconds since 1970; the writer assigns one for `None`.
    pub event_time: Option<u64>,
    /// The change to make.
    pub change: OpKind,
    /// Time to live of the keyspace for a value that a read-modify-write creates, milliseconds.
    pub created_ttl_ms: Option<u64>,
}

impl WriteOp {
    /// Returns the bytes of the key and of the value; a number counts as 8.
    pub(crate) fn bytes(&self) -> usize {
        self.key.len()
            + match &self.change {
                OpKind::Put { value, .. } => value.len(),
                OpKind::Append(more) => more.len(),
                OpKind::Delete { .. }
                | OpKind::AddI64(_)
                | OpKind::AddF64(_)
                | OpKind::MaxF64(_)
                | OpKind::MinF64(_) => 8,
            }
    }
}

/// Change that an operation makes to its key.
#[derive(Debug, Clone)]
pub(crate) enum OpKind {
    /// Store a value.
    Put {
        /// The value.
        value: Bytes,
        /// Time to live, milliseconds.
        ttl_ms: Option<u64>,
        /// Condition that must hold; makes the put a read-modify-write.
        condition: Option<Condition>,
    },
    /// Store a tombstone.
    Delete {
        /// Condition, as of a put.
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

impl OpKind {
    /// Returns true for a read-modify-write, which only the primary does.
    pub(crate) fn modifies(&self) -> bool {
        match self {
            OpKind::Put { condition, .. } | OpKind::Delete { condition } => condition.is_some(),
            OpKind::AddI64(_)
            | OpKind::AddF64(_)
            | OpKind::MaxF64(_)
            | OpKind::MinF64(_)
            | OpKind::Append(_) => true,
        }
    }
}

/// Condition of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// The key does not exist.
    Absent,
    /// The stored entry has this version.
    Version(u64),
}

/// A number that was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Number {
    /// An integer.
    I64(i64),
    /// The bits of a float.
    F64(u64),
}

/// Identity of a read-modify-write: client and sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpId {
    /// The client.
    pub client: u64,
    /// Number that the client gave it.
    pub sequence: u64,
    /// Replica that received an earlier attempt.
    pub tried: Option<ReplicaId>,
    /// Time since the first attempt, milliseconds.
    pub age_ms: u64,
}

/// Outcome of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpOutcome {
    /// The entry is stored with this event time.
    Applied(u64),
    /// The stored entry has this later event time.
    Superseded(u64),
    /// The read-modify-write is stored.
    Modified {
        /// Its event time.
        event_time: u64,
        /// Version of the entry that is now stored.
        version: u64,
        /// The number that is now stored.
        number: Option<Number>,
    },
    /// The condition does not hold.
    NotApplied {
        /// Event time of the stored entry; 0 without one.
        event_time: u64,
        /// Version of the stored entry; 0 without one.
        version: u64,
    },
}
