//! The table of wire error codes: the meaning of each code for the caller.
//!
//! **Invariant:** every code says whether a retry can help and whether the operation may have
//! taken effect; "it may have" is [`Effect::Unknown`] and never reported as a plain failure.

use serde::{Deserialize, Serialize};

/// Whether the operation took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// No effect, certainly.
    None,
    /// Unknown; only reading the data back can tell.
    Unknown,
}

/// Whether, and how, a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails again.
    Never,
    /// The same request may succeed after a pause, at the same place.
    Later,
    /// The same request may succeed with a newer topology.
    WithNewTopology,
    /// Another replica of the shard can serve the request now.
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
    /// The node has not received the epoch yet, or the outcome of a seal.
    NodeBehind = 5,
    /// A queue is full; back off.
    Overloaded = 6,
    /// The server, replica or bucket cannot be used now.
    Unavailable = 7,
    /// The stored value has another type.
    WrongType = 8,
    /// The write may or may not have taken effect.
    Unknown = 9,
    /// The operation is not possible in the present state; the message says what to do first.
    FailedPrecondition = 10,
    /// Data failed a check; the replica has stopped.
    Corrupt = 11,
    /// The deadline passed before anything was done.
    DeadlineExceeded = 12,
    /// A defect in Vasto.
    Internal = 13,
    /// Only the primary of the shard does this, and this replica is not primary, or not yet. A
    /// replica that is out of service also returns this code for requests that any other replica
    /// can serve.
    NotPrimary = 14,
    /// The replica has not caught up with the others since it was opened; ask another replica.
    CatchingUp = 15,
    /// The given number, or the result, does not fit its type: not finite, or out of its range.
    OutOfRange = 16,
    /// The disk of the replica is full, or another resource of its node is used up. The condition
    /// clears by itself once there is room again.
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

    /// Reads a wire number; the number of a newer version is `Internal`.
    pub fn from_number(number: u32) -> Self {
        Self::ALL.into_iter().find(|code| *code as u32 == number).unwrap_or(ErrorCode::Internal)
    }

    /// Returns whether the operation may have taken effect.
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

    /// Returns whether a retry can help.
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

/// An error code and a message that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct VastoError {
    /// Code of the error.
    pub code: ErrorCode,
    /// Message for people.
    pub message: String,
    /// Pause before a retry, milliseconds; 0 leaves it to the caller.
    pub retry_after_ms: u32,
}

impl VastoError {
    /// Creates an error without a retry hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: 0 }
    }

    /// Sets the pause before a retry.
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
