//! Single attempts and their repetition.
//!
//! **Invariant:** an attempt of [`Bucket::once`] passes the breaker, ends within a limit, and
//! reports to the breaker how it ended, except for a large upload that timed out. What runs inside
//! another operation is only limited: [`within`].

use std::future::Future;
use std::time::Duration;

use object_store::ObjectStoreExt;

use super::breaker::PROBE_BYTES_MAX;
use super::failure::Failure;
use super::handle::Bucket;
use super::retry::Retry;
use crate::layout;

impl Bucket {
    /// Makes one attempt, cut off after `limit`, when the breaker lets it pass. `sends` is its
    /// upload size: large uploads are not used as trial requests, and a slow large upload says
    /// nothing about other requests.
    pub(super) async fn once<T, E: Into<Failure>>(
        &self,
        retry: &Retry,
        limit: Duration,
        sends: u64,
        attempt: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let breaker = &self.inner.breaker;
        let is_large = sends > PROBE_BYTES_MAX;
        while is_large && breaker.is_open() {
            let pass = breaker.pass(retry.left()).await?;
            self.inner.counters.head();
            let path = self.path(&layout::cluster()).map_err(|error| Failure::of_name(&error))?;
            let answer = within(self.budget.attempt, self.inner.store.head(&path)).await;
            pass.report(
                answer.err().map(|failure| failure.with_clock(self.clock_ahead_s())).as_ref(),
            );
        }
        let pass = breaker.pass(retry.left()).await?;
        match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(value)) => {
                pass.report(None);
                Ok(value)
            }
            Ok(Err(error)) => {
                let failure = error.into().with_clock(self.clock_ahead_s());
                pass.report(Some(&failure));
                Err(failure)
            }
            Err(_) => {
                let failure = Failure::timed_out(limit);
                if is_large {
                    pass.discard()
                } else {
                    pass.report(Some(&failure))
                }
                Err(failure)
            }
        }
    }

    /// Repeats attempts until one succeeds, one fails for good, or the budget is used up.
    pub(super) async fn retrying<T, F, Fut>(
        &self,
        limit: Duration,
        attempt: F,
    ) -> Result<T, Failure>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let mut retry = Retry::new(self.budget);
        loop {
            let failure = match self.once(&retry, limit, 0, attempt()).await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !failure.transient || !retry.pause().await {
                return Err(failure);
            }
        }
    }
}

/// Makes one attempt, cut off after `limit`.
pub(super) async fn within<T, E: Into<Failure>>(
    limit: Duration,
    attempt: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Failure::timed_out(limit)),
    }
}
