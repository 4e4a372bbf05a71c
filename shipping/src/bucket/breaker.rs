//! The circuit breaker of the process: whether the bucket answers.
//!
//! When several requests in a row went unanswered, all others wait and one at a time tries, with
//! growing pauses. So an outage costs a request every few seconds, however many replicas wait, and
//! a single request detects its end for all. A store that throttles still answers and serves some
//! requests: an outage takes far more refusals in a row, and until then each request backs off by
//! itself.
//!
//! **Invariant:** no request waits here longer than its own patience: the time that is left for its
//! retries.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::failure::{Failure, Kind};

/// Weight of failures in a row that makes an outage.
const OUTAGE: u32 = 20;
/// Weight of an unanswered request, and of one whose signing time the store refuses (`Skewed`):
/// that is no throttling, since the same clock signs all other requests ...
const UNANSWERED: u32 = 4;
/// ... and of an answer that asks for a retry. Where nine of ten requests are throttled, one in
/// eight runs of this length is refused throughout; where half are, one in a million.
const REFUSED: u32 = 1;
/// Pause before the first trial request of an outage ...
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// ... and the longest pause, which bounds how late the end of an outage is noticed.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Larger bodies are not sent as trial requests.
pub(super) const PROBE_BYTES_MAX: u64 = 256 << 10;

/// The breaker of one bucket.
#[derive(Debug)]
pub(super) struct Breaker {
    state: Mutex<BreakerState>,
    /// Wakes the waiting requests to check the state again: when the breaker closes, and, while it
    /// stays open, when a trial request has ended.
    closed: Notify,
    pause_first: Duration,
    pause_max: Duration,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::with_pauses(PAUSE_FIRST, PAUSE_MAX)
    }
}

#[derive(Debug, Default)]
struct BreakerState {
    /// Total weight of the failures in a row.
    failures: u32,
    /// The current outage; the breaker is open while there is one.
    outage: Option<Outage>,
    /// Number of outages that have ended.
    ended: u64,
}

#[derive(Debug, Clone)]
struct Outage {
    since: Instant,
    /// Earliest time of the next trial request.
    next: Instant,
    /// Pause before that trial request; doubled after each failed one.
    pause: Duration,
    /// A trial request is in flight.
    tried: bool,
    last: Failure,
}

/// The right to send one request; a pass that is dropped without a report counts as a request never
/// sent.
pub(super) struct Pass<'a> {
    breaker: &'a Breaker,
    /// The request is the trial request of an outage.
    is_trial: bool,
    /// The outcome was reported.
    is_reported: bool,
}

impl Breaker {
    fn with_pauses(pause_first: Duration, pause_max: Duration) -> Self {
        Self { state: Mutex::default(), closed: Notify::new(), pause_first, pause_max }
    }

    fn state(&self) -> MutexGuard<'_, BreakerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to send a request, at most for `patience`; fails with the last failure
    /// of the outage.
    pub(super) async fn pass(&self, patience: Duration) -> Result<Pass<'_>, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            let mut closed = std::pin::pin!(self.closed.notified());
            closed.as_mut().enable();
            let until = {
                let mut state = self.state();
                let now = Instant::now();
                match &mut state.outage {
                    None => return Ok(Pass { breaker: self, is_trial: false, is_reported: false }),
                    Some(outage) if !outage.tried && outage.next <= now => {
                        outage.tried = true;
                        return Ok(Pass { breaker: self, is_trial: true, is_reported: false });
                    }
                    Some(outage) if now >= deadline => return Err(outage.last.clone()),
                    Some(outage) => {
                        let turn = if outage.tried { now + self.pause_max } else { outage.next };
                        turn.min(deadline)
                    }
                }
            };
            tokio::select! {
                () = closed => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// Returns true during an outage, while requests wait.
    pub(super) fn is_open(&self) -> bool {
        self.state().outage.is_some()
    }

    /// Returns the number of outages that have ended.
    pub(super) fn ended(&self) -> u64 {
        self.state().ended
    }

    /// Returns the duration of the current outage and the error of the last request.
    pub(super) fn outage(&self) -> Option<(Duration, String)> {
        self.state()
            .outage
            .as_ref()
            .map(|outage| (outage.since.elapsed(), outage.last.detail.clone()))
    }
}

impl Pass<'_> {
    /// Reports the outcome of the request.
    pub(super) fn report(mut self, failure: Option<&Failure>) {
        self.is_reported = true;
        let mut state = self.breaker.state();
        let weight = match failure.map(|failure| failure.kind) {
            Some(Kind::Unreachable | Kind::Skewed) => UNANSWERED,
            Some(Kind::Busy) => REFUSED,
            _ => 0,
        };
        let Some(failure) = failure.filter(|_| weight > 0) else {
            state.failures = 0;
            if state.outage.take().is_some() {
                state.ended += 1;
                tracing::info!("the bucket answers again");
            }
            drop(state);
            self.breaker.closed.notify_waiters();
            return;
        };
        let now = Instant::now();
        match &mut state.outage {
            Some(outage) if self.is_trial => {
                outage.pause = (outage.pause * 2).min(self.breaker.pause_max);
                outage.next = now + outage.pause.mul_f64(0.75 + 0.25 * rand::random::<f64>());
                outage.tried = false;
                outage.last = failure.clone();
                drop(state);
                self.breaker.closed.notify_waiters();
            }
            // Sent before the outage began.
            Some(_) => {}
            None => {
                state.failures += weight;
                if state.failures >= OUTAGE {
                    tracing::info!(
                        error = failure.detail,
                        "the bucket does not answer; one request at a time tries"
                    );
                    let pause = self.breaker.pause_first;
                    let last = failure.clone();
                    state.outage =
                        Some(Outage { since: now, next: now + pause, pause, tried: false, last });
                }
            }
        }
    }

    /// Drops the pass of a request whose failure says nothing about other requests.
    pub(super) fn discard(self) {}
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.is_reported || !self.is_trial {
            return;
        }
        if let Some(outage) = &mut self.breaker.state().outage {
            outage.tried = false;
        }
        self.breaker.closed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn slow_down() -> Failure {
        Failure { kind: Kind::Busy, transient: true, detail: "503".to_owned() }
    }

    fn unanswered() -> Failure {
        Failure {
            kind: Kind::Unreachable,
            transient: true,
            detail: "connection refused".to_owned(),
        }
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    /// The usual pauses, fifty times as fast.
    fn fast() -> Breaker {
        Breaker::with_pauses(PAUSE_FIRST / 50, PAUSE_MAX / 50)
    }

    #[tokio::test]
    async fn an_outage_costs_few_requests_however_many_wait() {
        const WANT: u32 = 80;
        let breaker = fast();
        let sent = std::sync::atomic::AtomicU32::new(0);
        let began = Instant::now();
        let outage = Duration::from_millis(1_200);
        let work = (0..WANT).map(|_| async {
            loop {
                let Ok(pass) = breaker.pass(PATIENCE).await else { continue };
                let well = began.elapsed() > outage;
                if !well {
                    sent.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
                pass.report((!well).then(unanswered).as_ref());
                if well {
                    return;
                }
            }
        });
        futures::future::join_all(work).await;
        // Each task may have had one request under way when the outage began.
        let sent = sent.into_inner();
        assert!(
            (WANT..WANT + 30).contains(&sent),
            "{sent} requests, like {} in a minute",
            sent - WANT
        );
    }

    #[tokio::test]
    async fn no_request_waits_longer_than_its_patience_and_a_dropped_trial_lets_others_try() {
        let breaker = fast();
        for _ in 0..OUTAGE / UNANSWERED {
            assert!(!breaker.is_open());
            breaker.pass(PATIENCE).await.ok().unwrap().report(Some(&unanswered()));
        }
        assert!(breaker.is_open() && breaker.outage().unwrap().1 == "connection refused");
        let trying = breaker.pass(PATIENCE).await.ok().unwrap();
        let began = Instant::now();
        let patience = Duration::from_millis(100);
        let failure = breaker.pass(patience).await.err().unwrap();
        assert_eq!(failure.detail, "connection refused");
        assert!(
            began.elapsed() >= patience && began.elapsed() < patience * 20,
            "{:?}",
            began.elapsed()
        );
        drop(trying);
        let trying = breaker.pass(Duration::ZERO).await.ok().unwrap();
        // "No such object" is an answer.
        let answer = Failure { kind: Kind::NotFound, transient: false, detail: String::new() };
        trying.report(Some(&answer));
        assert!(!breaker.is_open());
    }

    #[tokio::test]
    async fn failures_between_answers_are_no_outage() {
        let breaker = fast();
        for (failure, weight) in [(unanswered(), UNANSWERED), (slow_down(), REFUSED)] {
            for _ in 0..20 {
                for _ in 1..OUTAGE / weight {
                    breaker.pass(PATIENCE).await.ok().unwrap().report(Some(&failure));
                }
                assert!(!breaker.is_open(), "{failure:?}");
                breaker.pass(PATIENCE).await.ok().unwrap().report(None);
            }
        }
    }
}
