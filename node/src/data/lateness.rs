//! How long a frame was under way, without comparing clocks.
//!
//! Bytes that a silent network holds back arrive when it is whole again, seconds later. A write among
//! them was repeated at another replica long ago; applied now it would hide what was written since.
//!
//! **Invariant:** a frame that was held back longer than its predecessors shows by how much; clocks
//! that drift, or stand still while a machine sleeps, count for [`WINDOW`] at most.

use std::time::Duration;

/// The fastest frame of so long a time is the measure of the next ones.
const WINDOW: Duration = Duration::from_secs(5);

/// The lateness of the frames of one stream.
#[derive(Debug, Default)]
pub(super) struct Lateness {
    /// Of the fastest frame of the last full window; the opening of the stream is the first.
    usual: Duration,
    /// When the present window began, and the fastest frame in it.
    window: Option<(Duration, Duration)>,
}

impl Lateness {
    /// How much later than usual a frame comes: `received` by this clock, `sent` by the sender's, both
    /// since the stream was opened.
    pub fn of(&mut self, received: Duration, sent: Duration) -> Duration {
        let taken = received.saturating_sub(sent);
        match &mut self.window {
            Some((began, fastest)) if received.saturating_sub(*began) < WINDOW => *fastest = taken.min(*fastest),
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
        let mut lateness = Lateness::default();
        assert_eq!(lateness.of(ms(3_000), ms(10)), ms(2_990), "the first frame of a stream counts too");
        assert_eq!(lateness.of(ms(3_010), ms(3_008)), ms(2));
        assert_eq!(lateness.of(ms(60_000), ms(58_500)), ms(1_498), "also after a long time without any");
        assert_eq!(lateness.of(ms(60_001), ms(59_990)), ms(9));
    }

    #[test]
    fn a_clock_that_stood_still_is_believed_again_after_a_window() {
        let mut lateness = Lateness::default();
        lateness.of(ms(5), ms(5));
        let slept = 7_000;
        let late: Vec<Duration> = (1..200).map(|n| lateness.of(ms(slept + n * 100), ms(n * 100))).collect();
        assert_eq!((late[0], late[198]), (ms(slept), ms(0)));
        let refused = late.iter().filter(|late| **late >= ms(1_000)).count();
        assert!((40..=101).contains(&refused), "{refused}");
    }
}
