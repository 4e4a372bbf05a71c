//! Sender and send time of a request, and the conditions under which it may be answered.

use std::time::Duration;

use vasto_core::VastoError;
use vasto_core::ids::{Epoch, KeyspaceId};
use vasto_core::limits::ATTEMPT_PATIENCE;

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

impl Arrival {
    /// Returns for how much longer than usual the request was under way; 0 while that is not known.
    pub(super) fn late(self) -> Duration {
        self.sent.map_or(Duration::ZERO, |sent| self.received.saturating_sub(sent))
    }

    /// Returns the boot time from which on the request would have been here, had it come as fast as
    /// usual: a busy machine reads its requests late. `None` when the network has held it back for
    /// longer than its client waits.
    pub(super) fn begun(self, now: Duration) -> Option<Duration> {
        (self.late() < ATTEMPT_PATIENCE).then(|| now.saturating_sub(self.late()))
    }
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
    /// Boot time from which on nothing but the machine has held the request up; `None` when
    /// something else has.
    pub begun: Option<Duration>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_request_begins_when_it_should_have_come() {
        let ms = Duration::from_millis;
        let arrival = |sent: Option<u64>| Arrival { sent: sent.map(ms), received: ms(5_000) };
        assert_eq!(arrival(None).begun(ms(5_003)), Some(ms(5_003)));
        assert_eq!(arrival(Some(4_990)).begun(ms(5_003)), Some(ms(4_993)));
        assert_eq!(arrival(Some(4_000)).begun(ms(5_003)), None, "a broken network has healed");
    }
}
