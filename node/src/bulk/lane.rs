//! A lane of bulk work: how fast one kind of it goes when nothing holds it back, and the part of
//! that which the foreground leaves to it.
//!
//! **Invariants**
//! - A bound never stops a lane: it is at least [`BULK_YIELD_RATE_MIN`], but for the moments in
//!   which all lanes are held so that the foreground is measured alone.
//! - The full speed is learned only from work that the bound does not hold back, so that a bound
//!   does not make the next one smaller.

use std::time::{Duration, Instant};

use vasto_core::limits::BULK_YIELD_RATE_MIN;

use super::debt::{Debt, LOOK_AGAIN};

/// Full speed that is assumed before any was measured, bytes a second.
const FULL_GUESS: f64 = (64 << 20) as f64;
/// Time over which a rate is averaged, seconds.
const AVERAGED_S: f64 = 4.0;
/// Time from which on a rate is believed, seconds: one piece alone says nothing.
const BELIEVED_S: f64 = 1.0;
/// Part of a new measurement in the full speed.
const NEW_PART: f64 = 0.2;
/// Growth of a full speed that has turned out too low: all of it is used, and more would be.
const GROWTH: f64 = 1.125;
/// Longest time between two steps of a piece that is under way.
const STEP_MAX: Duration = Duration::from_millis(1_500);
/// Time without any bytes after which a rate begins anew.
const OVER: Duration = Duration::from_secs(2);

/// What the foreground leaves to bulk work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Bound {
    /// Everything.
    Free,
    /// This part of the full speed, up to 1.
    Share(f64),
    /// Nothing, for a moment.
    Held,
}

/// What a lane has done since it was asked last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Bytes have passed, have waited, or are on their way a step at a time.
    pub moved: bool,
    /// Bytes have waited because of the bound.
    pub held_back: bool,
}

impl Activity {
    /// Returns what two lanes together have done.
    pub(super) fn and(self, other: Self) -> Self {
        Self { moved: self.moved || other.moved, held_back: self.held_back || other.held_back }
    }
}

/// A lane of bulk work.
#[derive(Debug)]
pub(crate) struct Lane {
    bound: Bound,
    debt: Debt,
    /// Bytes that have passed, and whether any have waited, since the last look.
    passed: u64,
    waited: bool,
    /// Until when those who wait look again.
    waits_until: Option<Instant>,
    /// Until when pieces that have passed are at least under way.
    goes_on_until: Option<Instant>,
    /// The last look, and the last one that saw any bytes.
    looked: Instant,
    seen: Option<Instant>,
    /// Bytes a second of late, and the seconds from which that comes.
    rate: f64,
    rate_s: f64,
    /// Bytes a second that it does when nothing holds it back.
    full: f64,
}

impl Lane {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            bound: Bound::Free,
            debt: Debt::new(None, now),
            passed: 0,
            waited: false,
            waits_until: None,
            goes_on_until: None,
            looked: now,
            seen: None,
            rate: 0.0,
            rate_s: 0.0,
            full: FULL_GUESS,
        }
    }

    /// Returns how long the next piece waits, zero when it may pass.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        let wait = match self.bound {
            Bound::Held => LOOK_AGAIN,
            Bound::Free | Bound::Share(_) => self.debt.wait(now),
        };
        if !wait.is_zero() {
            self.waited = true;
            // They may be late.
            self.waits_until = Some(now + wait.min(LOOK_AGAIN) + LOOK_AGAIN);
        }
        wait
    }

    /// Counts bytes that pass.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.debt.add(bytes);
        self.passed += bytes;
    }

    /// Returns the bytes a second at which a piece that has passed is spread; `None`: as fast as it
    /// goes. Asked again and again while it is under way: that is bulk work, too.
    pub(super) fn spread(&mut self, now: Instant) -> Option<u64> {
        self.goes_on_until = Some(now + STEP_MAX);
        self.rate_left()
    }

    /// Returns what has happened since the last look, and learns from it.
    pub(crate) fn look(&mut self, now: Instant) -> Activity {
        let passed = std::mem::take(&mut self.passed);
        let lasts = |until: Option<Instant>| until.is_some_and(|until| now < until);
        let waited = std::mem::take(&mut self.waited) || lasts(self.waits_until);
        let goes_on = lasts(self.goes_on_until);
        let elapsed = now.saturating_duration_since(self.looked).as_secs_f64();
        self.looked = self.looked.max(now);
        let activity = Activity { moved: passed > 0 || waited || goes_on, held_back: waited };
        if activity.moved {
            self.seen = Some(now);
        }
        let is_over = self.seen.is_none_or(|at| now.saturating_duration_since(at) >= OVER);
        if is_over || elapsed <= 0.0 {
            (self.rate, self.rate_s) = (0.0, 0.0);
            return activity;
        }
        self.rate_s += elapsed;
        let part = elapsed / self.rate_s.min(AVERAGED_S).max(elapsed);
        self.rate += (passed as f64 / elapsed - self.rate) * part;
        if waited {
            if matches!(self.bound, Bound::Share(share) if share >= 1.0) {
                self.full *= GROWTH;
            }
        } else if passed > 0 && self.rate_s >= BELIEVED_S {
            self.full += (self.rate - self.full) * NEW_PART;
        }
        self.full = self.full.max(BULK_YIELD_RATE_MIN as f64);
        activity
    }

    /// Sets what the foreground leaves to the lane.
    pub(crate) fn set_bound(&mut self, bound: Bound, now: Instant) {
        self.bound = bound;
        if bound == Bound::Free {
            self.waits_until = None;
        }
        self.debt.set_rate(self.rate_left(), now);
    }

    /// Returns the bytes a second that the foreground leaves to the lane; `None`: all there is.
    pub(super) fn rate_left(&self) -> Option<u64> {
        match self.bound {
            Bound::Free => None,
            Bound::Share(share) => Some(((self.full * share) as u64).max(BULK_YIELD_RATE_MIN)),
            // What is owed is paid meanwhile.
            Bound::Held => Some(BULK_YIELD_RATE_MIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const TICK: Duration = Duration::from_millis(250);

    /// Passes pieces of 1 MiB for so many ticks, at most `speed` MiB in each; returns the MiB that
    /// have passed in the last tick.
    fn run(lane: &mut Lane, now: &mut Instant, ticks: u32, speed: u64) -> u64 {
        let mut passed = 0;
        for _ in 0..ticks {
            passed = 0;
            for _ in 0..25 {
                *now += TICK / 25;
                while passed < speed && lane.wait(*now).is_zero() {
                    lane.add(MIB);
                    passed += 1;
                }
            }
            lane.look(*now);
        }
        passed
    }

    #[test]
    fn a_share_is_a_part_of_what_the_lane_did_when_it_was_free() {
        let mut now = Instant::now();
        let mut lane = Lane::new(now);
        assert_eq!(run(&mut lane, &mut now, 80, 100), 100);
        assert!((lane.full / MIB as f64 - 400.0).abs() < 4.0, "{}", lane.full);
        lane.set_bound(Bound::Share(0.25), now);
        let passed = run(&mut lane, &mut now, 80, 100);
        assert!((23..=27).contains(&passed), "{passed}");
        assert!((lane.full / MIB as f64 - 400.0).abs() < 4.0, "a bound does not lower it");
        lane.set_bound(Bound::Held, now);
        assert_eq!(run(&mut lane, &mut now, 4, 100), 0);
        lane.set_bound(Bound::Free, now);
        assert_eq!(run(&mut lane, &mut now, 1, 100), 100);
    }

    #[test]
    fn a_full_speed_that_is_too_low_grows_and_one_that_is_too_high_falls() {
        let mut now = Instant::now();
        let mut lane = Lane::new(now);
        lane.full = MIB as f64;
        lane.set_bound(Bound::Share(1.0), now);
        for _ in 0..120 {
            run(&mut lane, &mut now, 1, 100);
            lane.set_bound(Bound::Share(1.0), now);
        }
        assert!(lane.full / MIB as f64 > 300.0, "{}", lane.full);
        // Somebody else holds the work back.
        run(&mut lane, &mut now, 160, 2);
        assert!((lane.full / MIB as f64 - 8.0).abs() < 1.0, "{}", lane.full);
    }

    #[test]
    fn a_piece_on_its_way_is_bulk_work_until_it_is_over() {
        let now = Instant::now();
        let mut lane = Lane::new(now);
        assert_eq!(lane.spread(now), None);
        assert!(lane.look(now + TICK).moved, "no time of calm, though nothing is spread");
        assert_eq!(lane.look(now + STEP_MAX), Activity::default());
        lane.set_bound(Bound::Share(0.5), now);
        assert_eq!(lane.spread(now), Some(32 * MIB));
        let activity = lane.look(now + TICK);
        assert!(activity.moved && !activity.held_back);
        assert_eq!(lane.look(now + STEP_MAX), Activity::default());
    }

    #[test]
    fn no_share_is_below_the_least_rate() {
        let now = Instant::now();
        let mut lane = Lane::new(now);
        lane.set_bound(Bound::Share(0.0), now);
        assert_eq!(lane.rate_left(), Some(BULK_YIELD_RATE_MIN));
        assert_eq!(lane.look(now + TICK), Activity::default());
    }
}
