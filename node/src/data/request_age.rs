//! Request age: how long the network held a frame back, measured without comparing clocks.
//!
//! Bytes that a broken network holds back arrive when it heals, seconds later. A write among them
//! was repeated at another replica long ago; applied now it would hide later writes.
//!
//! **Invariant:** a frame that was held back longer than its predecessors shows by how much; clocks
//! that drift, or stand still while a machine sleeps, count for [`WINDOW`] at most.

use std::time::Duration;

/// Window whose fastest frame is the reference for later frames.
const WINDOW: Duration = Duration::from_secs(5);

/// Estimator of the request age of one stream's frames.
#[derive(Debug, Default)]
pub(super) struct RequestAge {
    /// Transit time of the fastest frame of the last full window; the opening of the stream is the
    /// first reference.
    usual: Duration,
    /// Start of the current window, and its fastest frame.
    window: Option<(Duration, Duration)>,
}

impl RequestAge {
    /// Returns how much later than usual a frame arrives: `received` by this clock, `sent` by the
    /// sender's, both since the stream was opened.
    pub(super) fn of(&mut self, received: Duration, sent: Duration) -> Duration {
        let taken = received.saturating_sub(sent);
        match &mut self.window {
            Some((began, fastest)) if received.saturating_sub(*began) < WINDOW => {
                *fastest = taken.min(*fastest)
            }
            window => {
                if let Some((_, fastest)) = *window {
                    self.usual = fastest;
                }
                *window = Some((received, taken));
            }
        }
        self.usual = self.usual.min(taken);
        taken - self.usual
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_was_held_back_shows_by_how_much() {
        let mut request_age = RequestAge::default();
        assert_eq!(
            request_age.of(ms(3_000), ms(10)),
            ms(2_990),
            "the first frame of a stream counts too"
        );
        assert_eq!(request_age.of(ms(3_010), ms(3_008)), ms(2));
        assert_eq!(
            request_age.of(ms(60_000), ms(58_500)),
            ms(1_498),
            "also after a long time without any"
        );
        assert_eq!(request_age.of(ms(60_001), ms(59_990)), ms(9));
    }

    #[test]
    fn a_clock_that_stood_still_is_believed_again_after_a_window() {
        let mut request_age = RequestAge::default();
        request_age.of(ms(5), ms(5));
        let slept = 7_000;
        let late: Vec<Duration> =
            (1..200).map(|n| request_age.of(ms(slept + n * 100), ms(n * 100))).collect();
        assert_eq!((late[0], late[198]), (ms(slept), ms(0)));
        let refused = late.iter().filter(|late| **late >= ms(1_000)).count();
        assert!((40..=101).contains(&refused), "{refused}");
    }
}
