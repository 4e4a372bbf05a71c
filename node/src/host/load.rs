//! What a replica does, for the balance of the cluster: requests and records a second.
//!
//! **Invariants**
//! - The figure changes at most once in [`WINDOW`], and in steps of an eighth: a load that stays the
//!   same causes no reports.
//! - A load that was not counted for a whole window is not known. It is no small load: whoever took
//!   it for one would move further replicas to the node that has just got this one.

use std::time::{Duration, Instant};

/// Time over which the work is counted.
const WINDOW: Duration = Duration::from_secs(5);

/// The load of a replica.
#[derive(Debug, Default)]
pub(super) struct Load {
    counted: Option<(Instant, u64)>,
    /// Averaged, not rounded; `None` before the first window is over.
    per_second: Option<f64>,
}

impl Load {
    /// Returns the load, requests and records a second, rounded; `None` while it is not known.
    /// `done` counts them since the replica was opened; a smaller count than before begins anew.
    pub(super) fn at(&mut self, now: Instant, done: u64) -> Option<u64> {
        match self.counted {
            Some((since, before)) if done >= before => {
                let elapsed = now.saturating_duration_since(since);
                if elapsed >= WINDOW {
                    let latest = (done - before) as f64 / elapsed.as_secs_f64();
                    // A longer silence says more than a short one.
                    let windows = elapsed.as_secs_f64() / WINDOW.as_secs_f64();
                    let kept = 0.5f64.powf(windows);
                    let average = |earlier| kept * earlier + (1.0 - kept) * latest;
                    self.per_second = Some(self.per_second.map_or(latest, average));
                    self.counted = Some((now, done));
                }
            }
            _ => self.counted = Some((now, done)),
        }
        self.per_second.map(rounded)
    }
}

/// Rounds down to three binary digits.
fn rounded(per_second: f64) -> u64 {
    let whole = per_second as u64;
    let dropped = (64 - whole.leading_zeros()).saturating_sub(3);
    (whole >> dropped) << dropped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_averaged_rounded_and_forgotten() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut load = Load::default();
        assert_eq!(load.at(at(0), 500), None, "what was done before is not known in time");
        assert_eq!(load.at(at(4), 90_000), None, "the window is not over");
        assert_eq!(load.at(at(5), 5_500), Some(896), "1,000 a second, in steps of 128");
        assert_eq!(load.at(at(10), 5_500), Some(448), "half of it: 500");
        assert_eq!(load.at(at(15), 10_500), Some(640), "three quarters: 750");
        let mut done = 10_500;
        for n in 4..20 {
            done += 5_000;
            load.at(at(n * 5), done);
        }
        assert_eq!(load.at(at(95), done), Some(896));
        assert_eq!(load.at(at(400), done), Some(0));
        // The replica was opened again.
        assert_eq!(load.at(at(405), 3), Some(0));
        assert_eq!(load.at(at(410), 5_003), Some(448));
        assert_eq!([0.0, 1.9, 7.0, 8.0, 9.9, 1_023.0].map(rounded), [0, 1, 7, 8, 8, 896]);
    }
}
