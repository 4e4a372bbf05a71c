//! Bytes that have passed ahead of a rate: a debt that time pays back.
//!
//! **Invariant:** the rate holds for pieces of any size, however large, and a new rate counts at
//! once, also for what is owed.

use std::time::{Duration, Instant};

/// Part of a second for which bytes may pass ahead of the rate: pieces are smaller than a timer is
/// exact.
const AHEAD: f64 = 0.05;
/// Longest sleep of a waiting piece, after which it looks at the shared bounds again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Bytes that have passed ahead of a rate.
#[derive(Debug)]
pub(super) struct Debt {
    /// Bytes a second; `None` sets no bound.
    rate: Option<u64>,
    bytes: f64,
    at: Instant,
}

impl Debt {
    pub(super) fn new(rate: Option<u64>, now: Instant) -> Self {
        Self { rate, bytes: 0.0, at: now }
    }

    /// Changes the rate; what was owed under the old one is paid at the new one.
    pub(super) fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        self.pay(now);
        self.rate = rate;
    }

    fn pay(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.bytes = match self.rate {
            Some(rate) => (self.bytes - elapsed * rate as f64).max(0.0),
            None => 0.0,
        };
    }

    /// Returns how long the next piece waits, zero when it may pass.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        self.pay(now);
        let Some(rate) = self.rate else { return Duration::ZERO };
        let rate = rate.max(1) as f64;
        Duration::try_from_secs_f64((self.bytes / rate - AHEAD).max(0.0)).unwrap_or(LOOK_AGAIN)
    }

    pub(super) fn add(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.bytes += bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_holds_the_rate_for_pieces_of_any_size() {
        let start = Instant::now();
        for piece in [1_000, 50_000, 1_000_000] {
            let mut debt = Debt::new(Some(100_000), start);
            let (mut now, mut moved) = (start, 0);
            while now < start + Duration::from_secs(60) {
                let wait = debt.wait(now);
                now += wait;
                if wait.is_zero() {
                    debt.add(piece);
                    moved += piece;
                }
            }
            // The first piece passes at once.
            let most = 100_000 * 60 + piece + 10_000;
            assert!(moved <= most && moved >= 100_000 * 59, "{piece}: {moved}");
        }
    }

    #[test]
    fn a_new_rate_counts_at_once_for_what_is_owed() {
        let start = Instant::now();
        let mut debt = Debt::new(Some(1_000), start);
        debt.add(1_000_000);
        assert!(debt.wait(start) > Duration::from_secs(900));
        debt.set_rate(Some(1_000_000), start);
        assert!(debt.wait(start) <= Duration::from_secs(1));
        debt.set_rate(None, start);
        assert_eq!(debt.wait(start), Duration::ZERO);
    }
}
