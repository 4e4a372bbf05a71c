//! How far the writers of moving keys are slowed down so that the tails of a plan catch up.
//!
//! **Invariants**
//! - Pure: no clock, no lock; samples in, a rate out.
//! - Nothing is slowed down while the tails are close, or catch up soon by themselves, and nothing
//!   once no plan tails.
//! - While the tails do not catch up the rate only falls, by a part at a time: whatever writers want,
//!   it ends below what the tails take.

use std::time::Duration;

use vasto_core::limits::{TAIL_BACKLOG_BYTES, THROTTLED_BYTES_PER_S_MIN};

/// Time over which rates are measured, and between two decisions.
const WINDOW: Duration = Duration::from_millis(500);
/// Windows without progress before writers are slowed down.
const PATIENCE: u32 = 2;
/// A backlog that is gone within this time is no reason to slow anybody down.
const SOON_SECONDS: f64 = 10.0;
/// Factor of one step down, and the greatest one.
const DOWN: f64 = 0.8;
/// See [`DOWN`].
const DOWN_MAX: f64 = 0.5;
/// Factor of one step up, once the tails are close.
const UP: f64 = 1.1;
/// Share of the tails' own speed that is left to writers while a backlog is worked off.
const LEFT_TO_WRITERS: f64 = 0.5;
/// Share of the rate below which writers are not held back by it, so that it can be dropped.
const NOT_USED: f64 = 0.5;

/// What is known at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// The moment, on any clock that does not go back.
    pub at: Duration,
    /// Bytes of log that the slowest reader has not been sent.
    pub backlog: u64,
    /// Bytes of log ever written.
    pub written: u64,
    /// Bytes of keys and values of moving keys ever taken, here and at the other replicas.
    pub taken: u64,
}

/// What happened between two samples, bytes a second.
#[derive(Debug, Clone, Copy)]
struct Seen {
    backlog: f64,
    /// By how much the backlog became less.
    falls: f64,
    /// What the slowest reader was sent.
    drained: f64,
    written: f64,
    taken: f64,
}

impl Seen {
    fn between(from: Sample, to: Sample, seconds: f64) -> Self {
        let falls = (from.backlog as f64 - to.backlog as f64) / seconds;
        let written = to.written.saturating_sub(from.written) as f64 / seconds;
        Self {
            backlog: to.backlog as f64,
            falls,
            drained: (written + falls).max(0.0),
            written,
            taken: to.taken.saturating_sub(from.taken) as f64 / seconds,
        }
    }

    fn catches_up_soon(&self) -> bool {
        self.falls > 0.0 && self.backlog / self.falls <= SOON_SECONDS
    }
}

/// The controller of one source.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    /// Where the window began, with the least backlog of the one before.
    since: Option<Sample>,
    /// Least backlog in the window: log becomes readable in bursts, and what is left between them is
    /// what a reader is behind.
    least: Option<u64>,
    /// Windows in a row without enough progress.
    stuck: u32,
    /// Bytes of keys and values a second.
    rate: Option<f64>,
}

impl Throttle {
    /// Takes a sample, `None` while no tail is open; returns the rate to which the writers of moving
    /// keys are slowed down, bytes of keys and values a second. `None` lets them write as they want.
    pub(crate) fn next(&mut self, sample: Option<Sample>) -> Option<u64> {
        let Some(sample) = sample else {
            *self = Self::default();
            return None;
        };
        let since = *self.since.get_or_insert(sample);
        let elapsed = sample.at.saturating_sub(since.at);
        let least = self.least.map_or(sample.backlog, |least| least.min(sample.backlog));
        self.least = Some(least);
        if elapsed >= WINDOW {
            let sample = Sample { backlog: least, ..sample };
            (self.since, self.least) = (Some(sample), None);
            self.rate = self.decide(Seen::between(since, sample, elapsed.as_secs_f64()));
        }
        self.rate.map(|rate| rate as u64)
    }

    fn decide(&mut self, seen: Seen) -> Option<f64> {
        if seen.backlog <= TAIL_BACKLOG_BYTES as f64 {
            self.stuck = 0;
            return self.rate.filter(|rate| seen.taken > rate * NOT_USED).map(|rate| rate * UP);
        }
        if seen.catches_up_soon() {
            self.stuck = 0;
            return self.rate;
        }
        self.stuck += 1;
        let least = THROTTLED_BYTES_PER_S_MIN as f64;
        if self.stuck < PATIENCE || (self.rate.is_none() && seen.taken <= least) {
            return self.rate;
        }
        let present = self.rate.map_or(seen.taken, |rate| rate.min(seen.taken.max(least)));
        // What the readers take, as keys and values: the log has other keys and framing as well.
        let matching = seen.drained * (seen.taken / seen.written.max(1.0)).min(1.0);
        let next = match seen.falls > 0.0 {
            true => (present * DOWN).max(present.min(matching * LEFT_TO_WRITERS)),
            false => (present * DOWN).min(matching).max(present * DOWN_MAX),
        };
        Some(next.max(least))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;
    /// Interval of the samples.
    const TICK: f64 = 0.1;

    /// A log with writers who want to write, and a reader: all in bytes a second.
    struct Model {
        wanted: f64,
        others: f64,
        framing: f64,
        reader: f64,
        backlog: f64,
        written: f64,
        taken: f64,
        at: f64,
        throttle: Throttle,
        rate: Option<u64>,
    }

    impl Model {
        fn new(wanted: f64, reader: f64, backlog: f64) -> Self {
            Self {
                wanted,
                others: 0.0,
                framing: 1.0,
                reader,
                backlog,
                written: backlog,
                taken: 0.0,
                at: 0.0,
                throttle: Throttle::default(),
                rate: None,
            }
        }

        fn tick(&mut self) {
            let taken = self.rate.map_or(self.wanted, |rate| self.wanted.min(rate as f64)) * TICK;
            let logged = taken * self.framing + self.others * TICK;
            self.taken += taken;
            self.written += logged;
            self.backlog = (self.backlog + logged - self.reader * TICK).max(0.0);
            self.at += TICK;
            self.rate = self.throttle.next(Some(Sample {
                at: Duration::from_secs_f64(self.at),
                backlog: self.backlog as u64,
                written: self.written as u64,
                taken: self.taken as u64,
            }));
        }

        fn is_close(&self) -> bool {
            self.backlog <= TAIL_BACKLOG_BYTES as f64
        }
    }

    proptest! {
        /// However much faster writers are than the reader, the tail is close within a time that
        /// depends on the backlog alone.
        #[test]
        fn a_tail_converges_for_any_rate_of_writes(
            wanted in 0.1f64..1_000.0,
            reader in 2.0f64..300.0,
            backlog in 0.0f64..2_048.0,
            others in 0.0f64..0.4,
            framing in 1.0f64..3.0,
        ) {
            let mut model = Model::new(wanted * MIB, reader * MIB, backlog * MIB);
            (model.others, model.framing) = (others * model.reader, framing);
            let free = reader * (1.0 - others);
            let grows = 5.0 * framing * wanted;
            let within = 15.0 + 3.0 * (backlog + grows) / free;
            while !(model.is_close() && model.at > 2.0) {
                model.tick();
                prop_assert!(
                    model.at < within,
                    "after {:.0} s {:.0} MiB behind at {:?}",
                    model.at, model.backlog / MIB, model.rate
                );
            }
            // And so again and again, for as long as the plan waits for other things.
            let mut apart = 0;
            for _ in 0..1_200 {
                model.tick();
                apart = if model.is_close() { 0 } else { apart + 1 };
                prop_assert!(apart < 300, "{:.0} MiB behind at {:?}", model.backlog / MIB, model.rate);
            }
        }

        /// A reader that is faster than the writers catches up without anybody being slowed down,
        /// when that takes a moment.
        #[test]
        fn nobody_is_slowed_down_for_a_tail_that_catches_up_soon(
            wanted in 0.1f64..100.0,
            faster in 1.5f64..10.0,
            seconds in 0.0f64..8.0,
        ) {
            let reader = wanted * faster;
            let backlog = (reader - wanted) * seconds;
            let mut model = Model::new(wanted * MIB, reader * MIB, backlog * MIB);
            for _ in 0..200 {
                model.tick();
                prop_assert_eq!(model.rate, None);
            }
        }

        /// Once the writers want less than the reader takes, they are let go.
        #[test]
        fn writers_that_slow_down_by_themselves_are_let_go(
            wanted in 20.0f64..500.0,
            reader in 4.0f64..10.0,
        ) {
            let mut model = Model::new(wanted * MIB, reader * MIB, 0.0);
            while model.rate.is_none() {
                model.tick();
            }
            model.wanted = 0.1 * MIB;
            for _ in 0..6_000 {
                model.tick();
            }
            prop_assert_eq!(model.rate, None, "{:.0} MiB behind", model.backlog / MIB);
        }
    }

    /// Log becomes readable with each sync: a reader that takes all of it before the next one is
    /// not behind, however much it is.
    #[test]
    fn bursts_that_a_reader_takes_in_time_slow_nobody_down() {
        let mut throttle = Throttle::default();
        for tick in 0..600u32 {
            let burst = [40.0 * MIB, 20.0 * MIB, 0.0][tick as usize % 3];
            let written = (f64::from(tick) * 20.0 * MIB) as u64;
            let rate = throttle.next(Some(Sample {
                at: Duration::from_secs_f64(f64::from(tick) * TICK),
                backlog: burst as u64,
                written,
                taken: written,
            }));
            assert_eq!(rate, None);
        }
    }

    #[test]
    fn the_first_steps_are_gentle_and_the_end_of_the_tails_lets_everybody_go() {
        let mut model = Model::new(100.0 * MIB, 95.0 * MIB, 0.0);
        let mut rates = Vec::new();
        while model.at < 30.0 {
            model.tick();
            rates.extend(model.rate);
        }
        let least = *rates.iter().min().unwrap() as f64;
        assert!(least > 40.0 * MIB, "{:.1} MiB/s for a reader of 95", least / MIB);
        let first = rates[0] as f64;
        assert!((70.0 * MIB..100.0 * MIB).contains(&first), "{:.1} MiB/s", first / MIB);
        assert_eq!(model.throttle.next(None), None);
        assert!(model.throttle.since.is_none() && model.throttle.rate.is_none());
    }

    #[test]
    fn other_keys_that_keep_a_tail_behind_are_no_reason_to_slow_down_moving_ones() {
        let mut model = Model::new(0.0, 10.0 * MIB, 0.0);
        model.others = 50.0 * MIB;
        for _ in 0..100 {
            model.tick();
            assert_eq!(model.rate, None);
        }
    }
}
