//! The clocks of a node, injected so that tests can set them.
//!
//! **Invariant:** this is the only place in the node that reads a clock for event and commit times. Intervals that
//! decide safety are measured by the boot-time clock, which continues while the machine sleeps.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

/// Wall clock for event and commit times.
pub trait Clock: Send + Sync + 'static {
    /// Microseconds since 1970.
    fn now_us(&self) -> u64;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock {
    /// Offset, milliseconds; 0 except in tests of wrong clocks.
    pub shift_ms: i64,
}

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now_us(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_micros() as u64).saturating_add_signed(self.shift_ms.saturating_mul(1000))
    }
}

/// A shared clock.
pub type SharedClock = Arc<dyn Clock>;

/// Returns the next whole second after `at`, the same for all callers: work that can be delayed a little wakes
/// together, which costs an idle node one wake-up instead of hundreds.
pub fn with_others(at: Instant) -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(Instant::now);
    began + Duration::from_secs(at.saturating_duration_since(began).as_secs() + 1)
}

/// Skips polls while idle: of the idle polls one in `every` is taken.
#[derive(Debug)]
pub struct Sparse {
    every: u32,
    left_out: u32,
}

impl Sparse {
    /// Creates a filter that takes the first poll.
    pub fn one_in(every: u32) -> Self {
        Self { every, left_out: every }
    }

    /// Makes the next poll be taken.
    pub fn wake(&mut self) {
        self.left_out = self.every;
    }

    /// Returns true when this poll is skipped.
    pub fn leaves_out(&mut self, rests: bool) -> bool {
        self.left_out = self.left_out.saturating_add(1);
        let leaves_out = rests && self.left_out < self.every;
        if !leaves_out {
            self.left_out = 0;
        }
        leaves_out
    }
}

/// Returns the time since the machine booted, suspension included.
pub fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_in_so_many_is_taken_at_rest_and_each_one_while_something_goes_on() {
        let mut sparse = Sparse::one_in(3);
        let taken = |sparse: &mut Sparse, rests| !sparse.leaves_out(rests);
        let at_rest: Vec<bool> = (0..7).map(|_| taken(&mut sparse, true)).collect();
        assert_eq!(at_rest, [true, false, false, true, false, false, true]);
        assert!((0..5).all(|_| taken(&mut sparse, false)));
        assert!(!taken(&mut sparse, true));
        sparse.wake();
        assert!(taken(&mut sparse, true) && !taken(&mut sparse, true));
    }
}
