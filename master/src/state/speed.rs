//! The speed of a running plan, from successive observations of the bytes that it has moved.
//!
//! **Invariant:** a figure is told only from observations of the last seconds; bytes that begin
//! anew (another step, another attempt) are another measurement.

use std::collections::VecDeque;

/// Time over which the speed is averaged, microseconds.
const WINDOW_US: u64 = 10_000_000;
/// Shortest time from which a speed is told, microseconds.
const LEAST_US: u64 = 1_000_000;
/// Shortest time between two observations that are kept, microseconds.
const APART_US: u64 = 250_000;

/// Observations of one plan: when, and the bytes that had moved by then.
#[derive(Debug, Default)]
pub(crate) struct Speed {
    seen: VecDeque<(u64, u64)>,
}

impl Speed {
    /// Adds an observation; `now_us` never goes back.
    pub(crate) fn note(&mut self, now_us: u64, bytes: u64) {
        if self.seen.back().is_some_and(|(_, before)| bytes < *before) {
            self.seen.clear();
        }
        // The last one is replaced until it is far enough from the one before.
        let before_last = self.seen.len().checked_sub(2).map(|at| self.seen[at].0);
        if before_last.is_some_and(|at_us| now_us.saturating_sub(at_us) < APART_US) {
            self.seen.pop_back();
        }
        self.seen.push_back((now_us, bytes));
        let is_old = |at_us: u64| now_us.saturating_sub(at_us) >= WINDOW_US;
        // One observation from before the window stays: it is where the window begins.
        while self.seen.get(1).is_some_and(|(at_us, _)| is_old(*at_us)) {
            self.seen.pop_front();
        }
    }

    /// Returns the bytes a second over the window; `None` when too little was observed.
    pub(crate) fn rate(&self) -> Option<u64> {
        let ((began_us, first), (now_us, last)) = (*self.seen.front()?, *self.seen.back()?);
        let elapsed_us = now_us.saturating_sub(began_us);
        (elapsed_us >= LEAST_US)
            .then(|| (u128::from(last - first) * 1_000_000 / u128::from(elapsed_us)) as u64)
    }

    /// Returns the seconds that so many bytes take at this rate; `None` while that is not known,
    /// or nothing moves.
    pub(crate) fn seconds_for(&self, bytes: u64) -> Option<u64> {
        match self.rate()? {
            _ if bytes == 0 => Some(0),
            0 => None,
            rate => Some(bytes.div_ceil(rate)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(samples: impl IntoIterator<Item = (u64, u64)>) -> Speed {
        let mut speed = Speed::default();
        samples.into_iter().for_each(|(ms, bytes)| speed.note(ms * 1_000, bytes));
        speed
    }

    #[test]
    fn a_steady_plan_has_its_rate_and_the_time_that_is_left() {
        let speed = observed((0..100).map(|n| (n * 100, n * 1_000)));
        assert_eq!(speed.rate(), Some(10_000));
        assert_eq!((speed.seconds_for(25_000), speed.seconds_for(0)), (Some(3), Some(0)));
        assert!(speed.seen.len() < 60, "{}", speed.seen.len());
    }

    #[test]
    fn nothing_is_told_of_a_moment_and_a_stop_shows_within_the_window() {
        assert_eq!(observed([]).rate(), None);
        assert_eq!(observed([(0, 0), (900, 1 << 20)]).rate(), None);
        let stopped = (0..40).map(|n| (5_000 + n * 500, 5_000_000));
        let speed = observed([(0, 0), (5_000, 5_000_000)].into_iter().chain(stopped));
        assert_eq!((speed.rate(), speed.seconds_for(1)), (Some(0), None));
    }

    #[test]
    fn bytes_that_begin_anew_are_measured_anew() {
        let speed = observed([(0, 0), (2_000, 9_000_000), (2_500, 0), (4_500, 2_000)]);
        assert_eq!(speed.rate(), Some(1_000));
    }
}
