//! The time that a part of a run has.
//!
//! **Invariant:** whatever a part waits for ends with its time; what it has measured until then is kept.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// When a part has to have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    began: Instant,
    whole: Duration,
}

impl Limit {
    /// Begins a part that has so many minutes.
    pub(super) fn of_minutes(minutes: u64) -> Self {
        Self { began: Instant::now(), whole: Duration::from_secs(minutes * 60) }
    }

    pub(super) fn left(self) -> Duration {
        self.whole.saturating_sub(self.began.elapsed())
    }

    /// Runs some work, and drops it when the time is over.
    ///
    /// # Errors
    /// Those of the work, or that the time is over.
    pub(super) async fn run<T>(self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.left(), work).await {
            Ok(done) => done,
            Err(_) => bail!(
                "its {} minutes are over (`--minutes` gives it more)",
                self.whole.as_secs() / 60
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_end_is_ended_and_what_ends_is_not() {
        let limit = Limit { began: Instant::now(), whole: Duration::from_millis(200) };
        assert_eq!(limit.run(async { Ok(7) }).await.ok(), Some(7));
        let over = limit.run(std::future::pending::<Result<()>>()).await;
        assert!(over.is_err_and(|error| error.to_string().contains("--minutes")));
        assert!(Limit::of_minutes(1).left() > Duration::from_secs(50));
    }
}
