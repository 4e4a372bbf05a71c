//! The clocks of a node, injected so that tests can set them.
//!
//! **Invariant:** this is the only place in the node that reads a clock for event and commit times.
//! Intervals that decide safety are measured by the boot-time clock, which continues while the
//! machine sleeps.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

/// Wall clock for event and commit times.
pub(crate) trait Clock: Send + Sync + 'static {
    /// Microseconds since 1970.
    fn now_us(&self) -> u64;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SystemClock {
    /// Offset, milliseconds; 0 except in tests of wrong clocks.
    pub shift_ms: i64,
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now_us(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_micros() as u64)
            .saturating_add_signed(self.shift_ms.saturating_mul(1000))
    }
}

/// A shared clock.
pub(crate) type SharedClock = Arc<dyn Clock>;

/// Returns the next whole second after `at`, the same for all callers: work that can be delayed a
/// little wakes together, which costs an idle node one wake-up instead of hundreds.
pub(crate) fn with_others(at: Instant) -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(Instant::now);
    began + Duration::from_secs(at.saturating_duration_since(began).as_secs() + 1)
}

/// Skips polls while idle: of the idle polls one in `every` is taken.
#[derive(Debug)]
pub(crate) struct Sparse {
    every: u32,
    skipped: u32,
}

impl Sparse {
    /// Creates a filter that takes the first poll.
    pub(crate) fn one_in(every: u32) -> Self {
        Self { every, skipped: every }
    }

    /// Makes the next poll be taken.
    pub(crate) fn wake(&mut self) {
        self.skipped = self.every;
    }

    /// Returns true when this poll is skipped.
    pub(crate) fn skips(&mut self, idle: bool) -> bool {
        self.skipped = self.skipped.saturating_add(1);
        let skips = idle && self.skipped < self.every;
        if !skips {
            self.skipped = 0;
        }
        skips
    }
}

/// Returns the time since the machine booted, suspension included.
pub(crate) fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Returns [`since_boot`] in milliseconds.
pub(crate) fn now_ms() -> u64 {
    since_boot().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_poll_in_three_is_taken_while_idle_and_each_one_otherwise() {
        let mut sparse = Sparse::one_in(3);
        let taken = |sparse: &mut Sparse, idle| !sparse.skips(idle);
        let while_idle: Vec<bool> = (0..7).map(|_| taken(&mut sparse, true)).collect();
        assert_eq!(while_idle, [true, false, false, true, false, false, true]);
        assert!((0..5).all(|_| taken(&mut sparse, false)));
        assert!(!taken(&mut sparse, true));
        sparse.wake();
        assert!(taken(&mut sparse, true) && !taken(&mut sparse, true));
    }
}
