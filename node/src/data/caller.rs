//! Sender and send time of a request, and the conditions under which it may be answered.

use std::time::Duration;

use vasto_core::VastoError;
use vasto_core::ids::{Epoch, KeyspaceId};

use super::refusal::no_authority;
use crate::clock::since_boot;
use crate::replica::Replica;
use crate::replica::command::too_late;

/// Send and receive time of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    /// Boot time of the send, if the caller reports one.
    pub sent: Option<Duration>,
    /// Boot time of the receipt.
    pub received: Duration,
}

/// Identity and conditions of a request.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub id: u64,
    pub keyspace: KeyspaceId,
    pub epoch: Epoch,
    /// Boot time of the send, if the caller reports one.
    pub sent: Option<Duration>,
    /// Boot time from which on the client does not wait for the answer.
    pub until: Option<Duration>,
    /// Only the replica that has authority may answer.
    pub strict: bool,
    /// The term of authority under which a strict request was admitted.
    pub term: Option<u64>,
}

impl Caller {
    /// Returns an error when the authority under which a strict read began has ended: its result
    /// may be stale.
    pub(super) fn check_term(&self, replica: &Replica) -> Result<(), VastoError> {
        match self.term {
            Some(term) if !replica.authority().holds(term) => Err(no_authority()),
            _ => Ok(()),
        }
    }

    /// Returns an error once the client does not wait any more: work not begun by then is not
    /// begun.
    pub(super) fn check_time(&self) -> Result<(), VastoError> {
        match self.until {
            Some(until) if since_boot() >= until => Err(too_late()),
            _ => Ok(()),
        }
    }
}
