//! How much the foreground leaves to bulk work.
//!
//! Bulk work has a share of its full speed. While requests take longer than `factor` times their
//! calm, the share falls by a part at a time; while they do not, it grows, the faster the longer
//! that lasts, until there is no bound any more. It begins with a small one, because what is slow in
//! the first second is slow for somebody.
//!
//! **Invariants**
//! - Pure: no clock, no lock; samples in, a bound out.
//! - The share never falls below [`SHARE_MIN`]: a change ends. Bulk work is held altogether only for
//!   [`PROBE`] in [`PROBE_EVERY`], to learn what the calm is under the present load.
//! - Without requests there is no bound.

use std::time::Duration;

use super::calm::{Use, Verdict, WINDOW_MAX, Watched};
use crate::bulk::{Activity, Bound};
use crate::foreground::{CLASSES, Counts};

/// Interval of the samples.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// Time between two samples after which the process has stood still: requests have too.
const STOOD_STILL: Duration = Duration::from_secs(3);
/// Time without bulk work after which requests are calm.
const QUIET: Duration = Duration::from_secs(2);
/// Share with which bulk work begins while there are requests.
const SHARE_FIRST: f64 = 1.0 / 8.0;
/// Smallest share.
const SHARE_MIN: f64 = 1.0 / 16.0;
/// Growth of the share in a tick, and the time after which it doubles, this many times.
const STEP: f64 = 1.0 / 128.0;
/// See [`STEP`].
const STEP_DOUBLES: Duration = Duration::from_secs(2);
/// See [`STEP`].
const STEP_DOUBLES_MAX: i32 = 4;
/// Factor of the first step down, and the greatest one of those that follow at once.
const DOWN: f64 = 0.75;
/// See [`DOWN`].
const DOWN_MAX: f64 = 0.25;
/// Age of the calm at which it is learned anew, while requests are slow.
const PROBE_EVERY: Duration = Duration::from_secs(20);
/// Time for which bulk work is held for that, and the part of it in which what is in flight ends.
const PROBE: Duration = Duration::from_millis(1_500);
/// See [`PROBE`].
const SETTLES: Duration = Duration::from_millis(500);

/// What is known at a moment.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    /// The moment, on any clock that does not go back.
    pub at: Duration,
    /// The requests so far, by class.
    pub requests: [Counts; CLASSES],
    /// What bulk work has done since the last sample.
    pub bulk: Activity,
}

/// The controller of one process.
#[derive(Debug)]
pub(super) struct Control {
    /// Times the calm, what requests may take.
    factor: f64,
    pub(super) classes: [Watched; CLASSES],
    at: Option<Duration>,
    used: Use,
    /// When bulk work passed last, or waited.
    bulk_at: Option<Duration>,
    share: f64,
    /// The whole share is more than bulk work takes.
    is_free: bool,
    /// When the share grew last or fell last, and when it fell last.
    changed_at: Duration,
    fell_at: Duration,
    /// Requests were slow since the calm was learned last.
    was_slow: bool,
    learned_at: Option<Duration>,
    /// Since when bulk work is held to learn the calm, and when that happened last.
    probe: Option<Duration>,
    probed_at: Option<Duration>,
}

impl Control {
    pub(super) fn new(factor: f64) -> Self {
        Self {
            factor,
            classes: Default::default(),
            at: None,
            used: Use::Pass,
            bulk_at: None,
            share: SHARE_FIRST,
            is_free: false,
            changed_at: Duration::ZERO,
            fell_at: Duration::ZERO,
            was_slow: false,
            learned_at: None,
            probe: None,
            probed_at: None,
        }
    }

    /// Takes a sample; returns what is left to bulk work until the next one.
    pub(super) fn next(&mut self, sample: &Sample) -> Bound {
        let now = sample.at;
        let before = self.at.replace(now);
        if sample.bulk.moved {
            self.bulk_at = Some(now);
        }
        let used = self.use_at(now);
        let stood_still = before.is_none_or(|before| now.saturating_sub(before) > STOOD_STILL);
        if stood_still || used != self.used {
            self.used = used;
            for (class, counts) in self.classes.iter_mut().zip(&sample.requests) {
                class.begin(counts, now);
            }
        }
        let probed = self.probe.is_some_and(|since| now.saturating_sub(since) >= PROBE);
        let factor = self.factor;
        let verdicts: Vec<Verdict> = self
            .classes
            .iter_mut()
            .zip(&sample.requests)
            .map(|(class, counts)| class.look(counts, now, factor, (used, probed)))
            .collect();
        match used {
            Use::Learn => self.rest(now),
            Use::Compare => self.steer(&verdicts, sample.bulk.held_back, now),
            Use::Pass | Use::LearnQuickly => {}
        }
        if probed {
            self.probe = None;
            (self.probed_at, self.learned_at) = (Some(now), Some(now));
            self.was_slow = false;
            self.changed_at = now;
        }
        self.bound(now)
    }

    fn use_at(&self, now: Duration) -> Use {
        let since = |at: Duration| now.saturating_sub(at);
        match (self.probe, self.bulk_at) {
            (Some(probe), _) if since(probe) <= SETTLES => Use::Pass,
            (Some(_), _) => Use::LearnQuickly,
            (None, Some(at)) if since(at) < QUIET => Use::Compare,
            (None, _) => Use::Learn,
        }
    }

    fn is_present(&self, now: Duration) -> bool {
        self.classes.iter().any(|class| class.is_present(now))
    }

    fn bound(&self, now: Duration) -> Bound {
        match self.probe {
            Some(_) => Bound::Held,
            None if self.is_free || !self.is_present(now) => Bound::Free,
            None => Bound::Share(self.share),
        }
    }

    /// No bulk work passes, or nobody is there: what comes next begins with a small share.
    fn rest(&mut self, now: Duration) {
        (self.share, self.is_free, self.was_slow) = (SHARE_FIRST, false, false);
        (self.changed_at, self.fell_at) = (now, now);
        self.learned_at = Some(now);
    }

    fn steer(&mut self, verdicts: &[Verdict], held_back: bool, now: Duration) {
        if !self.is_present(now) {
            let learned_at = self.learned_at;
            self.rest(now);
            self.learned_at = learned_at;
            return;
        }
        let classes = || self.classes.iter().filter(move |class| class.is_present(now));
        let slow_for = classes().map(Watched::slow).max().unwrap_or(0);
        let is_unknown = classes().any(|class| class.calm().is_none());
        let worst = verdicts.iter().filter_map(|verdict| match verdict {
            Verdict::Slow(by) => Some(*by),
            Verdict::Open | Verdict::Fine => None,
        });
        match worst.reduce(f64::max) {
            Some(by) => self.fall(by, slow_for, now),
            // A class that was slow is asked first.
            None if slow_for == 0 && verdicts.contains(&Verdict::Fine) => self.grow(held_back, now),
            None => {}
        }
        let is_over =
            |at: Option<Duration>| at.is_none_or(|at| now.saturating_sub(at) >= PROBE_EVERY);
        if is_over(self.probed_at) && (is_unknown || (self.was_slow && is_over(self.learned_at))) {
            self.probe = Some(now);
        }
    }

    /// The first slow window costs little, it may be an accident; those that follow cost the more
    /// the slower they are.
    fn fall(&mut self, by: f64, slow_for: u32, now: Duration) {
        let factor = match slow_for {
            0 | 1 => DOWN,
            _ => (1.0 / by).sqrt().clamp(DOWN_MAX, DOWN),
        };
        self.share = (self.share * factor).max(SHARE_MIN);
        (self.is_free, self.was_slow) = (false, true);
        (self.changed_at, self.fell_at) = (now, now);
    }

    fn grow(&mut self, held_back: bool, now: Duration) {
        let judged = now.saturating_sub(self.changed_at).min(WINDOW_MAX);
        let ticks = judged.as_secs_f64() / TICK.as_secs_f64();
        let fine_for = now.saturating_sub(self.fell_at).as_secs_f64();
        let doubled = (fine_for / STEP_DOUBLES.as_secs_f64()) as i32;
        let step = STEP * 2f64.powi(doubled.min(STEP_DOUBLES_MAX));
        self.is_free |= self.share >= 1.0 && !held_back;
        self.share = (self.share + step * ticks).min(1.0);
        self.changed_at = now;
    }
}
