//! The one table of errors at the wire: what each code means for the caller.
//!
//! **Invariant:** every code says whether a retry can help and whether the operation may have
//! taken effect; "it may have" is [`Effect::Unknown`] and never reported as a plain failure.

use serde::{Deserialize, Serialize};

/// Did the operation change anything?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Certainly not.
    None,
    /// Perhaps; only reading it back can tell.
    Unknown,
}

/// What may be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails again.
    Never,
    /// The same request may succeed after a pause, at the same place.
    Later,
    /// The same request may succeed with a newer topology.
    WithNewTopology,
    /// Another replica of the shard can do it now.
    Elsewhere,
}

/// Wire codes. The numbers are on the wire and in client libraries: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum ErrorCode {
    /// The request is malformed or over a limit.
    InvalidArgument = 1,
    /// No such keyspace, node or operation.
    NotFound = 2,
    /// A keyspace of that name exists.
    AlreadyExists = 3,
    /// The node does not own the key at this epoch.
    WrongEpoch = 4,
    /// The node has not heard of the epoch yet, or not of the outcome of a seal.
    NodeBehind = 5,
    /// A queue is full; back off.
    Overloaded = 6,
    /// The server, replica or bucket cannot be used now.
    Unavailable = 7,
    /// The stored value has another type.
    WrongType = 8,
    /// The write may or may not have taken effect.
    Unknown = 9,
    /// Not possible in the present state; the message says what to do first.
    FailedPrecondition = 10,
    /// Data failed a check; the replica has stopped.
    Corrupt = 11,
    /// The deadline passed before anything was done.
    DeadlineExceeded = 12,
    /// A defect in Vasto.
    Internal = 13,
    /// Only the primary of the shard does this, and this replica is not primary, or not yet. Also the
    /// answer of a replica that is out of service to what any other one can do.
    NotPrimary = 14,
    /// The replica has not caught up with the others since it was opened; ask one of them.
    CatchingUp = 15,
    /// The number given, or the result, is none that its type holds: not finite, or over its range.
    OutOfRange = 16,
    /// The disk of the replica is full, or another resource of its node is used up. It passes by itself
    /// once there is room again.
    NoSpace = 17,
}

impl ErrorCode {
    /// All codes, for tables and tests.
    pub const ALL: [ErrorCode; 17] = [
        ErrorCode::InvalidArgument,
        ErrorCode::NotFound,
        ErrorCode::AlreadyExists,
        ErrorCode::WrongEpoch,
        ErrorCode::NodeBehind,
        ErrorCode::Overloaded,
        ErrorCode::Unavailable,
        ErrorCode::WrongType,
        ErrorCode::Unknown,
        ErrorCode::FailedPrecondition,
        ErrorCode::Corrupt,
        ErrorCode::DeadlineExceeded,
        ErrorCode::Internal,
        ErrorCode::NotPrimary,
        ErrorCode::CatchingUp,
        ErrorCode::OutOfRange,
        ErrorCode::NoSpace,
    ];

    /// Reads the number on the wire; a number of a newer version is `Internal`.
    pub fn from_number(number: u32) -> Self {
        Self::ALL.into_iter().find(|code| *code as u32 == number).unwrap_or(ErrorCode::Internal)
    }

    /// May the operation have taken effect?
    pub fn effect(self) -> Effect {
        match self {
            ErrorCode::Unknown | ErrorCode::Internal => Effect::Unknown,
            ErrorCode::InvalidArgument
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::WrongEpoch
            | ErrorCode::NodeBehind
            | ErrorCode::Overloaded
            | ErrorCode::Unavailable
            | ErrorCode::WrongType
            | ErrorCode::FailedPrecondition
            | ErrorCode::Corrupt
            | ErrorCode::DeadlineExceeded
            | ErrorCode::NotPrimary
            | ErrorCode::CatchingUp
            | ErrorCode::OutOfRange
            | ErrorCode::NoSpace => Effect::None,
        }
    }

    /// Can a retry help?
    pub fn retry(self) -> Retry {
        match self {
            ErrorCode::WrongEpoch | ErrorCode::NotPrimary => Retry::WithNewTopology,
            ErrorCode::CatchingUp => Retry::Elsewhere,
            ErrorCode::NodeBehind | ErrorCode::Overloaded | ErrorCode::Unavailable => Retry::Later,
            ErrorCode::InvalidArgument
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::WrongType
            | ErrorCode::Unknown
            | ErrorCode::FailedPrecondition
            | ErrorCode::Corrupt
            | ErrorCode::DeadlineExceeded
            | ErrorCode::OutOfRange
            | ErrorCode::NoSpace
            | ErrorCode::Internal => Retry::Never,
        }
    }
}

/// A code and a sentence that tells a person what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct VastoError {
    /// What happened.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
    /// How long to wait before a retry, milliseconds; 0 is the caller's choice.
    pub retry_after_ms: u32,
}

impl VastoError {
    /// An error without a retry hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: 0 }
    }

    /// Adds how long to wait.
    pub fn retry_after_ms(mut self, ms: u32) -> Self {
        self.retry_after_ms = ms;
        self
    }
}

impl From<crate::limits::LimitError> for VastoError {
    fn from(error: crate::limits::LimitError) -> Self {
        VastoError::new(ErrorCode::InvalidArgument, error.to_string())
    }
}

impl From<crate::limits::BadKeyspaceName> for VastoError {
    fn from(error: crate::limits::BadKeyspaceName) -> Self {
        VastoError::new(ErrorCode::InvalidArgument, error.to_string())
    }
}

impl From<crate::band::ShardCountError> for VastoError {
    fn from(error: crate::band::ShardCountError) -> Self {
        VastoError::new(ErrorCode::InvalidArgument, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_stay() {
        for (index, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(code as u32, index as u32 + 1);
            assert_eq!(ErrorCode::from_number(code as u32), code);
        }
        assert_eq!(ErrorCode::from_number(999), ErrorCode::Internal);
    }
}
