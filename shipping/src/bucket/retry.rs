//! One retry policy for every request: jittered backoff inside a total budget.
//!
//! object_store's own retries are set to none (`RetryConfig`): they do not cover a conditional
//! create whose reply was lost, they would hide attempts from the request counts, and a credential
//! or a signature is rebuilt only by a new attempt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::retry::{RetryContext, RetryFailure, RetryPolicy};

use super::counts::Counters;
use super::failure::is_transient_status;

/// Time limits of requests to the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Time since the first attempt after which no further attempt begins.
    pub total: Duration,
    /// Timeout of a request without a large body.
    pub attempt: Duration,
    /// Timeout of a request that reads or completes something large; a request with a body gets
    /// more, by its size.
    pub transfer: Duration,
    /// The first pause between attempts.
    pub backoff_first: Duration,
    /// The longest pause between attempts.
    pub backoff_max: Duration,
}

/// Slowest accepted rate of a body, bytes a second: the least that several uploads at once over a
/// slow link leave for each.
pub(super) const SLOWEST_BODY: u64 = 128 << 10;

impl Default for RetryBudget {
    /// Outlasts a server's restart (30 s); callers that can wait longer begin again themselves.
    fn default() -> Self {
        Self {
            total: Duration::from_secs(30),
            attempt: Duration::from_secs(10),
            transfer: Duration::from_secs(60),
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(3),
        }
    }
}

impl RetryBudget {
    /// Returns the budget of the start-up probe: an unreachable bucket is reported within about 5
    /// s.
    pub fn probe() -> Self {
        Self {
            total: Duration::from_secs(3),
            attempt: Duration::from_secs(4),
            backoff_max: Duration::from_millis(500),
            ..Self::default()
        }
    }

    /// Returns the timeout of a request with a body of this size.
    pub(super) fn limit_for(&self, bytes: u64) -> Duration {
        self.attempt + Duration::from_secs_f64(bytes as f64 / SLOWEST_BODY as f64)
    }
}

/// Number of times a part answered with 400 is sent again, with new credentials.
const UNEXPLAINED_MAX: usize = 5;

/// The remaining budget of one operation.
#[derive(Debug)]
pub(super) struct Retry {
    budget: RetryBudget,
    began: Instant,
    last: Duration,
}

impl Retry {
    pub(super) fn new(budget: RetryBudget) -> Self {
        Self { budget, began: Instant::now(), last: Duration::ZERO }
    }

    /// Returns the pause before the next attempt, or `None` when the budget ends before it.
    ///
    /// `random` is uniform in `0.0..1.0`: each pause lies between the first one and three times the
    /// last ("decorrelated jitter").
    fn next_pause(&mut self, elapsed: Duration, random: f64) -> Option<Duration> {
        let first = self.budget.backoff_first;
        let high = (self.last * 3).clamp(first * 2, self.budget.backoff_max.max(first * 2));
        let pause = (first + (high - first).mul_f64(random)).min(self.budget.backoff_max);
        self.last = pause;
        (elapsed + pause < self.budget.total).then_some(pause)
    }

    /// Returns the time that this operation may still wait.
    pub(super) fn left(&self) -> Duration {
        self.budget.total.saturating_sub(self.began.elapsed())
    }

    /// Waits before the next attempt; returns `false` when the budget is used up.
    pub(super) async fn pause(&mut self) -> bool {
        match self.next_pause(self.began.elapsed(), rand::random()) {
            Some(pause) => {
                tokio::time::sleep(pause).await;
                true
            }
            None => false,
        }
    }
}

/// Repeats single parts of a multipart upload under the same budget.
#[derive(Debug)]
pub(super) struct PartRetry {
    pub(super) budget: RetryBudget,
    pub(super) counts: Arc<Counters>,
}

#[async_trait::async_trait]
impl RetryPolicy for PartRetry {
    async fn retry(&self, context: RetryContext) -> bool {
        let transient = match context.failure {
            RetryFailure::Transport(_) => true,
            // S3 answers 400 to expired credentials and to a body that arrived slowly. Only the
            // body of the answer distinguishes the two, and object_store does not pass it on.
            RetryFailure::Status(status) if status.as_u16() == 400 => {
                context.attempt <= UNEXPLAINED_MAX
            }
            RetryFailure::Status(status) => is_transient_status(status.as_u16()),
            _ => false,
        };
        // Elapsed counts from the part's first attempt; the exponent is bounded by the budget's
        // cap.
        let factor = 1u32 << context.attempt.min(10);
        let pause = (self.budget.backoff_first * factor)
            .min(self.budget.backoff_max)
            .mul_f64(0.5 + 0.5 * rand::random::<f64>());
        if !transient || context.elapsed + pause >= self.budget.total {
            return false;
        }
        tokio::time::sleep(pause).await;
        self.counts.put();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_the_time_that_a_slow_link_needs() {
        let budget = RetryBudget::default();
        assert_eq!(budget.limit_for(0), budget.attempt);
        // Four bodies of 8 MiB share a megabyte a second.
        assert!(budget.limit_for(8 << 20) > Duration::from_secs(34));
        assert!(budget.limit_for(64 << 20) > Duration::from_secs(256));
    }

    #[test]
    fn pauses_grow_stay_below_the_cap_and_end_with_the_budget() {
        for random in [0.0, 0.5, 0.999] {
            let budget = RetryBudget::default();
            let mut retry = Retry::new(budget);
            let mut elapsed = Duration::ZERO;
            let mut pauses = 0;
            while let Some(pause) = retry.next_pause(elapsed, random) {
                assert!(pause >= budget.backoff_first && pause <= budget.backoff_max, "{pause:?}");
                elapsed += pause;
                pauses += 1;
            }
            assert!(elapsed < budget.total);
            assert!((10..=600).contains(&pauses), "{pauses} pauses at {random}");
        }
    }
}
