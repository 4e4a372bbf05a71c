//! Hybrid logical clock: physical microseconds that never go back and never repeat.
//!
//! **Invariant:** every assigned time is greater than every time assigned before it and than every
//! time that was observed. The clock is pure: the physical time is an argument.

/// The state of one clock.
#[derive(Debug, Clone, Default)]
pub struct HybridClock {
    last_us: u64,
}

impl HybridClock {
    /// Creates a clock that continues after `floor_us`, the highest time that was ever persisted.
    pub fn starting_after(floor_us: u64) -> Self {
        Self { last_us: floor_us }
    }

    /// Assigns a new time, microseconds since 1970: the greater of the physical time and the last
    /// time plus one.
    pub fn stamp(&mut self, physical_us: u64) -> u64 {
        self.last_us = physical_us.max(self.last_us + 1);
        self.last_us
    }

    /// Makes later times greater than a time seen elsewhere.
    pub fn observe(&mut self, time_us: u64) {
        self.last_us = self.last_us.max(time_us);
    }

    /// Returns the highest time assigned or observed.
    pub fn last(&self) -> u64 {
        self.last_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_rise_through_pauses_and_backward_steps() {
        let mut clock = HybridClock::starting_after(100);
        assert_eq!(clock.stamp(50), 101);
        assert_eq!(clock.stamp(500), 500);
        assert_eq!(clock.stamp(500), 501);
        clock.observe(1_000);
        assert_eq!(clock.stamp(600), 1_001);
        assert_eq!(clock.last(), 1_001);
    }
}
