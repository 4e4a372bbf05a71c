//! The writes of moving keys: how many bytes of them a replica takes, and to what rate its host
//! slows them down.
//!
//! **Invariant:** without a plan that moves keys away nothing is counted and nothing slowed down.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use vasto_core::record::BandRange;

/// The moving keys of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moving {
    /// Their bands.
    pub range: BandRange,
    /// Bytes of keys and values that are taken in a second; `None`: all that come.
    pub bytes_per_s: Option<u64>,
}

/// What the writer counts, and obeys.
#[derive(Default)]
pub(crate) struct WriteThrottle {
    moving: ArcSwapOption<Moving>,
    taken: AtomicU64,
    held_back_us: AtomicU64,
}

impl WriteThrottle {
    /// Sets the moving keys and their rate.
    pub(crate) fn set(&self, moving: Option<Moving>) {
        if self.moving() != moving {
            self.moving.store(moving.map(Into::into));
        }
    }

    /// Returns the moving keys and their rate.
    pub(crate) fn moving(&self) -> Option<Moving> {
        self.moving.load().as_deref().copied()
    }

    /// Returns true while writes of moving keys are slowed down.
    pub(crate) fn slows(&self) -> bool {
        self.moving().is_some_and(|moving| moving.bytes_per_s.is_some())
    }

    /// Returns the bytes of keys and values of moving keys that were ever taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Returns the time for which writes were ever held back, all together.
    pub(crate) fn held_back(&self) -> Duration {
        Duration::from_micros(self.held_back_us.load(Ordering::Relaxed))
    }

    pub(super) fn note_taken(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn note_held_back(&self, time: Duration) {
        self.held_back_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }
}
