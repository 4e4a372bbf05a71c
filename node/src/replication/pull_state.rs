//! Progress of one pull, as its task writes it and reports read it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::clock::since_boot;

/// Progress of one pull.
#[derive(Debug, Default)]
pub(super) struct PullState {
    /// A stream is open.
    pub(super) connected: AtomicBool,
    /// Synced records of the peer that this replica lacks.
    pub(super) lag_lsns: AtomicU64,
    /// Age of the last record received, while there are more, milliseconds.
    pub(super) lag_ms: AtomicU64,
    /// Boot time since which no stream is open, milliseconds; meaningless while a stream is open.
    pub(super) broken_ms: AtomicU64,
    /// The peer's log does not reach back to this replica's position.
    pub(super) too_old: AtomicBool,
}

impl PullState {
    /// Notes that no stream is open.
    pub(super) fn broken(&self) {
        self.broken_ms.store(since_boot().as_millis() as u64, Ordering::Release);
        self.connected.store(false, Ordering::Release);
    }

    /// Returns the lag in milliseconds. The position of a peer is unknown while no stream is open:
    /// then the lag is at least as old as that.
    pub(super) fn lag_ms(&self) -> u64 {
        let lag = self.lag_ms.load(Ordering::Acquire);
        if self.connected.load(Ordering::Acquire) {
            return lag;
        }
        lag.max(
            (since_boot().as_millis() as u64)
                .saturating_sub(self.broken_ms.load(Ordering::Acquire)),
        )
    }
}
