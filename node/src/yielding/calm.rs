//! The calm of one class of requests: its 99th percentile while no bulk work passes, and what bulk
//! work makes of it.
//!
//! **Invariants**
//! - Pure: no clock, no lock.
//! - The calm is learned from times without bulk work alone; beside bulk work it can only fall,
//!   because that makes no request faster.
//! - Few requests say nothing: neither that the class is slow nor what its calm is. Where some are
//!   slow and few, they count together with those that follow, so that neither a single client is
//!   overrun nor bulk work waits for one that asks now and then.

use std::time::Duration;

use crate::foreground::Counts;

/// Requests from which on a window is judged at once.
const ENOUGH: u64 = 100;
/// Requests from which on one is judged that has lasted for [`WINDOW_MAX`].
const FEW: u64 = 20;
/// Longest window.
pub(super) const WINDOW_MAX: Duration = Duration::from_secs(2);
/// Longest window of requests that are few and slow: perhaps hardly any ends because of that.
const WINDOW_OF_FEW: Duration = Duration::from_secs(10);
/// Requests of moments without bulk work, all together, from which on the calm is learned of them.
const ASKED: u64 = 8;
/// Requests above the limit without which nothing is slow: one or two are an accident.
const SLOW_MIN: u64 = 3;
/// Time without enough requests after which nobody is there.
const PRESENT: Duration = Duration::from_secs(4);
/// Limits below this are not told apart: nobody notices.
const LIMIT_MIN: Duration = Duration::from_micros(250);
/// Windows over which the calm is averaged, and the same when it is old or measured on purpose.
const WINDOWS: f64 = 32.0;
/// See [`WINDOWS`].
const WINDOWS_QUICKLY: f64 = 4.0;
/// Age at which a calm is old.
const OLD: Duration = Duration::from_secs(10);
/// How far above the calm a window counts at most: a flush makes a window many times as long.
const OUTLIER: f64 = 4.0;
/// How far below the calm requests beside bulk work must be, so that the calm falls: windows differ.
const LESS: f64 = 1.5;

/// What a window is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// No bulk work passes: the calm is learned.
    Learn,
    /// The same, for a moment, because the calm may have changed.
    LearnQuickly,
    /// Bulk work that is held for that moment may still be in flight.
    Pass,
    /// Bulk work passes: requests are compared with their calm.
    Compare,
}

/// What a window says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Verdict {
    /// Nothing yet.
    Open,
    /// The requests are as they should be.
    Fine,
    /// They exceed their limit; by which factor the 99th percentile does.
    Slow(f64),
}

/// The class with its present window; times are on any clock that does not go back.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// The counts at the beginning of the window, and when that was.
    before: Counts,
    began: Duration,
    /// Logarithm of the calm in microseconds.
    ln_calm: Option<f64>,
    /// Windows from which it comes, up to [`WINDOWS`], and the last one.
    learned: f64,
    learned_at: Duration,
    /// Requests of moments without bulk work that were too few to learn from.
    asked: Counts,
    /// The 99th percentile of the last window.
    p99: Option<Duration>,
    present_until: Duration,
    /// Windows in a row that were slow.
    slow: u32,
}

impl Watched {
    /// Begins a window.
    pub(super) fn begin(&mut self, counts: &Counts, now: Duration) {
        (self.before, self.began) = (counts.clone(), now);
    }

    pub(super) fn is_present(&self, now: Duration) -> bool {
        now < self.present_until
    }

    /// Returns how many windows in a row were slow.
    pub(super) fn slow(&self) -> u32 {
        self.slow
    }

    /// Returns the calm, once it is known.
    pub(super) fn calm(&self) -> Option<Duration> {
        self.ln_calm.map(|ln| Duration::from_micros(ln.exp().round() as u64))
    }

    /// Returns the 99th percentile of late; `None` without enough requests.
    pub(super) fn p99(&self) -> Option<Duration> {
        self.p99
    }

    /// Looks at the counts; at the end of a window learns or judges, and begins the next one. `ends`:
    /// the window ends now, whatever it holds. `factor`: times the calm is the limit.
    pub(super) fn look(
        &mut self,
        counts: &Counts,
        now: Duration,
        factor: f64,
        (used, ends): (Use, bool),
    ) -> Verdict {
        let window = counts.since(&self.before);
        let total = window.total();
        let limit = self.calm().map(|calm| times(calm, factor).max(LIMIT_MIN));
        let above = limit.map_or(0, |limit| window.above(limit));
        let compared = used == Use::Compare;
        let is_slow = compared && above >= SLOW_MIN && above * 100 > total;
        // Requests that are so slow that hardly any ends are there too.
        let is_few = compared && total < FEW && above > 0 && self.is_present(now);
        if is_few {
            self.present_until = now + PRESENT;
        }
        let longest = if is_few { WINDOW_OF_FEW } else { WINDOW_MAX };
        let is_old = now.saturating_sub(self.began) >= longest;
        if !(is_slow || is_old || ends || total >= ENOUGH) {
            return Verdict::Open;
        }
        self.begin(counts, now);
        if total >= FEW {
            self.present_until = now + PRESENT;
        } else if is_few && !is_slow {
            self.present_until = now;
        }
        self.p99 = window.p99().filter(|_| total >= FEW);
        match (used, self.p99) {
            (Use::Learn, Some(p99)) => self.learn(p99, now, WINDOWS),
            (Use::LearnQuickly, _) => self.ask(&window, now),
            (Use::Compare, Some(p99)) => self.fall(p99),
            (Use::Learn | Use::Compare, None) | (Use::Pass, _) => {}
        }
        self.slow = if is_slow { self.slow.saturating_add(1) } else { 0 };
        match (is_slow, window.p99().zip(limit)) {
            (true, Some((p99, limit))) => {
                Verdict::Slow((p99.as_secs_f64() / limit.as_secs_f64()).max(1.0))
            }
            _ if total >= FEW => Verdict::Fine,
            _ => Verdict::Open,
        }
    }

    /// Learns from a moment without bulk work; what is too little for that counts together with the
    /// next one.
    fn ask(&mut self, window: &Counts, now: Duration) {
        let asked = self.asked.and(window);
        match asked.p99().filter(|_| asked.total() >= ASKED) {
            Some(p99) => self.learn(p99, now, WINDOWS_QUICKLY),
            None => self.asked = asked,
        }
    }

    fn learn(&mut self, p99: Duration, now: Duration, windows: f64) {
        self.asked = Counts::default();
        let seen = ln_us(p99.as_secs_f64());
        let is_old = now.saturating_sub(self.learned_at) >= OLD;
        self.learned_at = now;
        let Some(calm) = self.ln_calm else {
            (self.ln_calm, self.learned) = (Some(seen), 1.0);
            return;
        };
        self.learned = (self.learned + 1.0).min(WINDOWS);
        let windows = if is_old { WINDOWS_QUICKLY } else { windows };
        let part = 1.0 / self.learned.min(windows);
        self.ln_calm = Some(calm + (seen.min(calm + OUTLIER.ln()) - calm) * part);
    }

    /// The calm is not above what requests take beside bulk work.
    fn fall(&mut self, p99: Duration) {
        let most = ln_us(p99.as_secs_f64() * LESS);
        self.ln_calm = self.ln_calm.map(|calm| calm + (most - calm).min(0.0) / WINDOWS);
    }
}

/// Returns so many times the time, however many.
fn times(time: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(time.as_secs_f64() * factor).unwrap_or(Duration::MAX)
}

fn ln_us(seconds: f64) -> f64 {
    (seconds * 1e6).max(1.0).ln()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::foreground::{Class, Latencies};

    const TICK: Duration = Duration::from_millis(250);

    struct Rig {
        latencies: Latencies,
        watched: Watched,
        now: Duration,
    }

    impl Rig {
        fn new() -> Self {
            let now = Duration::from_secs(1_000);
            let mut watched = Watched::default();
            watched.begin(&Counts::default(), now);
            Self { latencies: Latencies::new(), watched, now }
        }

        /// One tick with so many requests of so many microseconds each.
        fn tick(&mut self, used: Use, requests: &[(u64, u64)]) -> Verdict {
            self.now += TICK;
            for (count, us) in requests {
                for _ in 0..*count {
                    let begun = self.now - Duration::from_micros(*us);
                    self.latencies.note(Class::Reads, Some(begun), self.now);
                }
            }
            let [counts, ..] = self.latencies.counts();
            self.watched.look(&counts, self.now, 2.0, (used, false))
        }

        fn calm_us(&self) -> u64 {
            self.watched.calm().unwrap().as_micros() as u64
        }
    }

    #[test]
    fn what_is_slow_exceeds_a_multiple_of_its_calm() {
        let mut rig = Rig::new();
        for _ in 0..40 {
            assert_eq!(rig.tick(Use::Learn, &[(500, 1_000)]), Verdict::Fine);
        }
        assert!((1_000..1_125).contains(&rig.calm_us()), "{}", rig.calm_us());
        let compare = |rig: &mut Rig, requests: &[(u64, u64)]| rig.tick(Use::Compare, requests);
        assert_eq!(compare(&mut rig, &[(496, 1_000), (4, 90_000)]), Verdict::Fine, "1 in 100");
        let slow = compare(&mut rig, &[(450, 1_000), (50, 20_000)]);
        assert!(matches!(slow, Verdict::Slow(by) if by > 8.0 && by < 12.0), "{slow:?}");
        assert_eq!(rig.watched.slow(), 1);
        // A dozen are enough, when they are this slow; of two nobody knows.
        assert_eq!(compare(&mut rig, &[(2, 50_000)]), Verdict::Open);
        assert!(matches!(compare(&mut rig, &[(12, 50_000)]), Verdict::Slow(_)));
        assert_eq!(rig.watched.slow(), 2);
        assert_eq!(compare(&mut rig, &[(500, 1_900)]), Verdict::Fine);
        assert_eq!(rig.watched.slow(), 0);
    }

    #[test]
    fn nobody_notices_a_fraction_of_a_millisecond() {
        let mut rig = Rig::new();
        for _ in 0..40 {
            rig.tick(Use::Learn, &[(500, 10)]);
        }
        assert_eq!(rig.tick(Use::Compare, &[(500, 200)]), Verdict::Fine);
        assert!(matches!(rig.tick(Use::Compare, &[(500, 600)]), Verdict::Slow(_)));
    }

    #[test]
    fn few_requests_say_nothing_and_after_a_while_nobody_is_there() {
        let mut rig = Rig::new();
        assert!(!rig.watched.is_present(rig.now));
        for _ in 0..40 {
            rig.tick(Use::Learn, &[(1, 1_000)]);
        }
        assert_eq!((rig.watched.calm(), rig.watched.p99()), (None, None));
        assert!(!rig.watched.is_present(rig.now));
        for _ in 0..16 {
            rig.tick(Use::Learn, &[(4, 1_000)]);
        }
        assert!(rig.watched.calm().is_some() && rig.watched.is_present(rig.now));
        for _ in 0..24 {
            rig.tick(Use::Learn, &[]);
        }
        assert!(!rig.watched.is_present(rig.now) && rig.watched.calm().is_some());
    }

    #[test]
    fn requests_that_are_few_and_slow_count_together_for_a_while() {
        let mut rig = Rig::new();
        for _ in 0..40 {
            rig.tick(Use::Learn, &[(500, 1_000)]);
        }
        // One a second: the third one tells.
        for n in 0..8 {
            let requests: &[(u64, u64)] = if n % 4 == 0 { &[(1, 800_000)] } else { &[] };
            assert_eq!(rig.tick(Use::Compare, requests), Verdict::Open, "{n}");
        }
        assert!(matches!(rig.tick(Use::Compare, &[(1, 800_000)]), Verdict::Slow(_)));
        assert!(rig.watched.is_present(rig.now));
        // One in five seconds is nobody, after a while.
        for n in 0..80 {
            let requests: &[(u64, u64)] = if n % 20 == 0 { &[(1, 800_000)] } else { &[] };
            assert_eq!(rig.tick(Use::Compare, requests), Verdict::Open, "{n}");
        }
        assert!(!rig.watched.is_present(rig.now));
    }

    #[test]
    fn moments_with_few_requests_say_together_what_the_calm_is() {
        let mut rig = Rig::new();
        for _ in 0..40 {
            rig.tick(Use::Learn, &[(500, 1_000)]);
        }
        let known = rig.calm_us();
        let moment = |rig: &mut Rig| {
            for n in 0..8u64 {
                rig.tick(Use::LearnQuickly, &[(u64::from(n == 0), 9_000)]);
            }
        };
        (1..ASKED).for_each(|_| moment(&mut rig));
        assert_eq!(rig.calm_us(), known, "too little");
        moment(&mut rig);
        let then = rig.calm_us();
        assert!(then > known * 5 / 4, "{then}");
        // Those have counted.
        moment(&mut rig);
        assert_eq!(rig.calm_us(), then);
    }

    #[test]
    fn no_factor_is_too_large() {
        let mut rig = Rig::new();
        for _ in 0..40 {
            rig.tick(Use::Learn, &[(500, 1_000)]);
        }
        rig.latencies.note(Class::Reads, Some(Duration::ZERO), Duration::from_secs(60));
        let [counts, ..] = rig.latencies.counts();
        let verdict = rig.watched.look(&counts, rig.now + TICK, 1e300, (Use::Compare, true));
        assert_eq!(verdict, Verdict::Open);
    }

    #[test]
    fn the_calm_is_robust_and_follows_the_load() {
        let mut rig = Rig::new();
        for n in 0..400 {
            // One window in twenty has a flush in it.
            let us = if n % 20 == 7 { 30_000 } else { 1_000 };
            rig.tick(Use::Learn, &[(500, us)]);
        }
        assert!((900..1_600).contains(&rig.calm_us()), "{}", rig.calm_us());
        // Beside bulk work it does not rise, however long that takes, but falls with the load.
        for _ in 0..4_000 {
            rig.tick(Use::Compare, &[(500, 9_000)]);
        }
        assert!(rig.calm_us() < 1_600, "{}", rig.calm_us());
        for _ in 0..400 {
            rig.tick(Use::Compare, &[(500, 100)]);
        }
        assert!(rig.calm_us() < 200, "{}", rig.calm_us());
        // An old one is replaced within a few windows.
        for _ in 0..16 {
            rig.tick(Use::LearnQuickly, &[(500, 9_000)]);
        }
        assert!(rig.calm_us() > 5_000, "{}", rig.calm_us());
    }
}
