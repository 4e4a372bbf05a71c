//! Answers of calls: a document, or one error with the remedy.

use std::time::Duration;

use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::NodeId;
use vasto_core::limits::ADMIN_DEADLINE;

use crate::state::{ClusterState, Keyspace};

/// The longest wait before an answer: the caller's own deadline is [`ADMIN_DEADLINE`].
pub(super) const ANSWER_WITHIN: Duration = ADMIN_DEADLINE.saturating_sub(Duration::from_secs(1));
/// The most names that a NotFound lists.
const NAMES_LISTED: usize = 10;

/// The answer to a call: the text of a document, or an error.
pub(crate) type Answer = Result<String, VastoError>;

pub(super) fn invalid(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::InvalidArgument, message)
}

pub(super) fn not_found(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::NotFound, message)
}

pub(super) fn refused(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::FailedPrecondition, message)
}

pub(super) fn unavailable(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::Unavailable, message)
}

pub(super) fn unknown(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::Unknown, message)
}

/// The error of a call that a stopping master has not begun.
pub(crate) fn stopping() -> VastoError {
    unavailable("this master is stopping; try again")
}

/// Why the outcome of a call that was begun is not known.
pub(crate) const STOPPED_MEANWHILE: &str = "this master stopped meanwhile";

/// The error of a write to the catalog whose outcome is not known.
pub(crate) fn unsure(what: &str, cause: &str) -> VastoError {
    unknown(format!(
        "{what}: {cause}; it may or may not have taken effect: check with `vasto keyspace list`"
    ))
}

pub(super) fn taken(name: &str) -> VastoError {
    let message =
        format!("a keyspace called {name} exists; use it, choose another name, or delete it first");
    VastoError::new(ErrorCode::AlreadyExists, message)
}

pub(super) fn no_operation(id: &str) -> VastoError {
    let shown: String = id.chars().take(80).collect();
    not_found(format!("no operation `{shown}` is known; see `vasto operation list`"))
}

pub(super) fn too_busy(node: NodeId) -> VastoError {
    let message = format!("{node} has too many commands to do; try again later");
    VastoError::new(ErrorCode::Overloaded, message).retry_after_ms(1000)
}

/// Returns the keyspace of that name, or an error that helps to find it.
pub(crate) fn find<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Keyspace, VastoError> {
    state.named(name).ok_or_else(|| {
        let mut names: Vec<&str> =
            state.active().map(|keyspace| keyspace.catalog.name.as_str()).collect();
        names.sort_unstable();
        let more = if names.len() > NAMES_LISTED { ", …" } else { "" };
        names.truncate(NAMES_LISTED);
        let shown: String = name.chars().take(80).collect();
        let others = match names.len() {
            0 => "there is none yet; create one with `vasto keyspace create NAME`".to_owned(),
            _ => format!("there are: {}{more}", names.join(", ")),
        };
        not_found(format!("no keyspace is called `{shown}`; {others}"))
    })
}
