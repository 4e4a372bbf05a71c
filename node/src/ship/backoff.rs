//! The growing pause between attempts that keep failing.

use std::time::Duration;

use tokio::time::Instant;

/// Pause while nothing fails; the first failure doubles it.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Maximum pause after failures.
const PAUSE_MAX: Duration = Duration::from_secs(30);

pub(super) struct Backoff {
    pause: Duration,
    not_before: Instant,
}

impl Backoff {
    /// Creates a backoff without failures.
    pub(super) fn new() -> Self {
        Self { pause: PAUSE_MIN, not_before: Instant::now() }
    }

    /// Doubles the pause; the next attempt waits for this share of it.
    pub(super) fn failed(&mut self, share: f64) {
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.not_before = Instant::now() + self.pause.mul_f64(share);
    }

    pub(super) fn succeeded(&mut self) {
        self.pause = PAUSE_MIN;
    }

    /// Returns true when the next attempt may begin.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.not_before
    }

    /// Returns true between a failure and the next success.
    pub(super) fn is_failing(&self) -> bool {
        self.pause > PAUSE_MIN
    }

    pub(super) fn pause(&self) -> Duration {
        self.pause
    }
}
