//! The only error type of the library: a kind that says what to do, and a sentence for people.
//!
//! **Invariant:** an operation that may have taken effect is [`ErrorKind::Unknown`], never a plain
//! failure; every other kind of a *write* promises that nothing was changed.

use std::time::Duration;

use vasto_core::error::{ErrorCode, VastoError};

/// The kind of an [`Error`]: what the caller should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is malformed or over a limit. Change it; the same request fails again.
    InvalidArgument,
    /// No such keyspace, node or operation (a missing *key* is not an error). Check the name.
    NotFound,
    /// The object to create exists already. Use it, or take another name.
    AlreadyExists,
    /// Nodes or the master could not be reached in time; nothing was changed. Try again later.
    Unavailable,
    /// The cluster applies back pressure; nothing was changed. Slow down, then try again after
    /// [`Error::retry_after`].
    Overloaded,
    /// The deadline passed before anything was done. Try again, perhaps with more time.
    DeadlineExceeded,
    /// The write may or may not have taken effect, or took effect in part. Read it back, or repeat
    /// it if that does no harm (a put or a delete).
    Unknown,
    /// The current state does not allow the operation. The message says what to do first.
    FailedPrecondition,
    /// The stored value has another type. Read it with the accessor of its type.
    WrongType,
    /// The number given is not finite, or the result would exceed the range of its type; nothing
    /// was changed. The same request fails again.
    OutOfRange,
    /// The disk of a node is full, or the node has run out of another resource; nothing was
    /// changed. The node recovers by itself once there is room: free some, or add a node.
    NoSpace,
    /// The client was closed by [`Vasto::close`](crate::Vasto::close). Connect anew.
    Closed,
    /// Stored data failed a check and the replica stopped. An operator must inspect the node.
    Corrupt,
    /// A defect in Vasto. Please report it with the message.
    Internal,
}

/// Why an operation failed. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    retry_after: Option<Duration>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None }
    }

    /// Returns the kind, which says what to do.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the sentence for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns how long an overloaded server asked to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    pub(crate) fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = (!wait.is_zero()).then_some(wait);
        self
    }

    #[cfg(test)]
    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }
}

/// Returns the error of every call after the client was closed.
pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "this client was closed; connect anew")
}

/// Returns the error for a reply of another type than the request's.
pub(crate) fn strange_reply(write: bool) -> Error {
    let kind = if write { ErrorKind::Unknown } else { ErrorKind::Internal };
    Error::new(kind, "the node answered with something else than was asked; please report it")
}

/// Maps a wire code to the kind that the caller of this library sees.
pub(crate) fn kind_of(code: ErrorCode) -> ErrorKind {
    match code {
        ErrorCode::InvalidArgument => ErrorKind::InvalidArgument,
        ErrorCode::NotFound => ErrorKind::NotFound,
        ErrorCode::AlreadyExists => ErrorKind::AlreadyExists,
        // Each of these means that the cluster did not reach agreement in time.
        ErrorCode::WrongEpoch
        | ErrorCode::NodeBehind
        | ErrorCode::Unavailable
        | ErrorCode::NotPrimary
        | ErrorCode::CatchingUp => ErrorKind::Unavailable,
        ErrorCode::Overloaded => ErrorKind::Overloaded,
        ErrorCode::WrongType => ErrorKind::WrongType,
        ErrorCode::OutOfRange => ErrorKind::OutOfRange,
        ErrorCode::NoSpace => ErrorKind::NoSpace,
        ErrorCode::Unknown => ErrorKind::Unknown,
        ErrorCode::FailedPrecondition => ErrorKind::FailedPrecondition,
        ErrorCode::Corrupt => ErrorKind::Corrupt,
        ErrorCode::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        ErrorCode::Internal => ErrorKind::Internal,
    }
}

impl From<VastoError> for Error {
    fn from(error: VastoError) -> Self {
        Error::new(kind_of(error.code), error.message)
            .with_retry_after(Duration::from_millis(error.retry_after_ms.into()))
    }
}

impl From<vasto_core::limits::LimitError> for Error {
    fn from(error: vasto_core::limits::LimitError) -> Self {
        VastoError::from(error).into()
    }
}

impl From<vasto_core::limits::BadKeyspaceName> for Error {
    fn from(error: vasto_core::limits::BadKeyspaceName) -> Self {
        VastoError::from(error).into()
    }
}

impl From<vasto_core::band::ShardCountError> for Error {
    fn from(error: vasto_core::band::ShardCountError) -> Self {
        VastoError::from(error).into()
    }
}
