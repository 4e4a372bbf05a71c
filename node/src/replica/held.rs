//! Writes that wait for the outcome of a seal or of a leadership transfer.
//!
//! **Invariant:** a held write has changed nothing. It is released to be checked anew, or answered
//! so that the client retries; none is refused as "not applied" and applied later.

use std::time::Instant;

use vasto_core::limits::SEALED_WRITES_WAIT;
use vasto_core::{ErrorCode, VastoError};

use super::command::WriteCommand;

struct Held {
    command: WriteCommand,
    since: Instant,
}

/// The held writes of a replica, in the order in which they came.
#[derive(Default)]
pub(super) struct HeldWrites {
    held: Vec<Held>,
    /// Time at which the seal began.
    sealed_at: Option<Instant>,
}

impl HeldWrites {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Holds a write from now on.
    pub(super) fn hold(&mut self, mut command: WriteCommand) {
        command.begun = None; // its time does not tell how busy the machine is
        self.held.push(Held { command, since: Instant::now() });
    }

    /// Notes when a seal began.
    pub(super) fn sealed_at(&mut self, at: Instant) {
        self.sealed_at = Some(at);
    }

    /// Returns all writes, and the pauses that end with their release, microseconds.
    pub(super) fn release(&mut self) -> (Vec<WriteCommand>, Vec<u64>) {
        let held = std::mem::take(&mut self.held);
        let begun = self.sealed_at.take().into_iter().chain(held.iter().map(|held| held.since));
        let pauses = begun.map(|at| at.elapsed().as_micros() as u64).collect();
        (held.into_iter().map(|held| held.command).collect(), pauses)
    }

    /// Answers the writes that have waited too long; the client retries.
    pub(super) fn answer_overdue(&mut self) {
        for held in self.held.extract_if(.., |held| held.since.elapsed() >= SEALED_WRITES_WAIT) {
            held.command.answer(Err(VastoError::new(
                ErrorCode::NodeBehind,
                "the key is changing its shard and the outcome is not known yet; try again",
            )
            .retry_after_ms(50)));
        }
    }

    /// Drops all writes, which answers that the replica is stopped.
    pub(super) fn clear(&mut self) {
        self.held.clear();
    }
}
