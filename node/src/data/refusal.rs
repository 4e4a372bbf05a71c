//! Errors by which a node refuses a request, each with the remedy for the client.

use vasto_core::{ErrorCode, VastoError};

use crate::shortage;

pub(super) fn no_authority() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "another replica serves this shard now, and sees what was acknowledged; ask it, or read by choice from any replica",
    )
    .retry_after_ms(20)
}

pub(super) fn catching_up() -> VastoError {
    VastoError::new(
        ErrorCode::CatchingUp,
        "this replica is catching up with its peers; ask another one",
    )
    .retry_after_ms(50)
}

/// Returns `NotPrimary`: the node is healthy, and clients keep asking it for its other shards.
pub(super) fn out_of_service(why: Option<String>) -> VastoError {
    let why = why.unwrap_or_else(|| "it is not open".into());
    let message = format!("this replica does not serve; ask another one: {why}");
    VastoError::new(ErrorCode::NotPrimary, message).retry_after_ms(20)
}

/// Returns the error of a shard whose only replica could not be opened.
pub(super) fn failed(why: &str) -> VastoError {
    let code = if shortage::shortage_of(why).is_some() {
        ErrorCode::NoSpace
    } else {
        ErrorCode::Unavailable
    };
    VastoError::new(code, format!("the replica could not be opened: {why}")).retry_after_ms(500)
}

/// Returns the refusal of a write: the free space of the disk is needed for data written already.
pub(super) fn disk_is_low() -> VastoError {
    let message = "no space left on the disk of the node but its reserve, so it takes no writes; free some space, or add a node";
    VastoError::new(ErrorCode::NoSpace, message).retry_after_ms(1_000)
}

pub(super) fn not_here() -> VastoError {
    VastoError::new(
        ErrorCode::WrongEpoch,
        "this node does not hold the shard; fetch the topology and go to its owner",
    )
}
