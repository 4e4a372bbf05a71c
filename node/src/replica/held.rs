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

/// The moments of a pause of the writes to a sealed range.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pause {
    /// The seal began: no write of the range was taken any more.
    pub began: Instant,
    /// It was durable.
    pub sealed: Instant,
    /// What waited was released.
    pub released: Instant,
}

/// Writes whose outcome is decided.
pub(super) struct Released {
    /// The writes, to be checked anew.
    pub commands: Vec<WriteCommand>,
    /// The pauses that end with their release, that of the seal first, microseconds.
    pub pauses_us: Vec<u64>,
    /// The pause of the seal, if there was one.
    pub pause: Option<Pause>,
}

/// The held writes of a replica, in the order in which they came.
#[derive(Default)]
pub(super) struct HeldWrites {
    held: Vec<Held>,
    /// When the seal began, and when it was durable.
    sealed: Option<(Instant, Instant)>,
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

    /// Notes when a seal began, and when it was durable.
    pub(super) fn sealed(&mut self, began: Instant, durable: Instant) {
        self.sealed = Some((began, durable));
    }

    /// Returns all writes, and the pauses that end with their release.
    pub(super) fn release(&mut self) -> Released {
        let (held, released) = (std::mem::take(&mut self.held), Instant::now());
        let sealed = self.sealed.take();
        let pause = sealed.map(|(began, sealed)| Pause { began, sealed, released });
        let of_seal = pause.map(|pause| pause.began).into_iter();
        let begun = of_seal.chain(held.iter().map(|held| held.since));
        let waited = |at: Instant| released.saturating_duration_since(at).as_micros() as u64;
        Released {
            pauses_us: begun.map(waited).collect(),
            commands: held.into_iter().map(|held| held.command).collect(),
            pause,
        }
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
