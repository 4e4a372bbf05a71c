//! Detects that the process stood still: stopped, swapped out, or its machine suspended.
//!
//! Peers consider a node that is silent for [`ATTEMPT_PATIENCE`] dead and serve in its place.
//! When such a node continues, requests that clients have repeated elsewhere still wait in its
//! sockets and queues, and its data is old.
//!
//! **Invariant:** after a pause no replica with peers serves anything before it has caught up
//! again, and no request from before the pause is applied with an event time from after it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use vasto_core::limits::ATTEMPT_PATIENCE;

use crate::clock::now_ms;

/// Interval between two heartbeats.
const TICK: Duration = Duration::from_millis(100);

/// When the process was last seen to run.
#[derive(Debug)]
pub(crate) struct StallDetector {
    seen_ms: AtomicU64,
    pauses: watch::Sender<u64>,
}

impl Default for StallDetector {
    fn default() -> Self {
        Self { seen_ms: AtomicU64::new(now_ms()), pauses: watch::channel(0).0 }
    }
}

impl StallDetector {
    /// Returns true while the process stands still, or has just continued and the pause is not
    /// detected yet.
    pub(crate) fn is_standing(&self) -> bool {
        now_ms().saturating_sub(self.seen_ms.load(Ordering::Acquire))
            >= ATTEMPT_PATIENCE.as_millis() as u64
    }

    /// Returns a receiver of the number of pauses.
    pub(crate) fn pauses(&self) -> watch::Receiver<u64> {
        self.pauses.subscribe()
    }

    /// Records a heartbeat; `after_pause` runs before any other code sees that the process is back.
    pub(crate) fn tick(&self, after_pause: impl FnOnce(Duration)) {
        let since = now_ms().saturating_sub(self.seen_ms.load(Ordering::Acquire));
        if since >= ATTEMPT_PATIENCE.as_millis() as u64 {
            after_pause(Duration::from_millis(since));
            self.pauses.send_modify(|count| *count += 1);
        }
        self.seen_ms.store(now_ms(), Ordering::Release);
    }
}

/// Records heartbeats until `ended` returns true; runs on its own thread.
// The thread does nothing else.
#[allow(clippy::disallowed_methods)]
pub(crate) fn watch(
    detector: &StallDetector,
    after_pause: impl Fn(Duration),
    ended: impl Fn() -> bool,
) {
    while !ended() {
        detector.tick(&after_pause);
        std::thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_noticed_before_the_process_counts_as_running() {
        let detector = StallDetector::default();
        detector.tick(|_| panic!("there was no pause"));
        assert!(!detector.is_standing());
        detector.seen_ms.fetch_sub(5_000, Ordering::AcqRel);
        assert!(detector.is_standing());
        let mut noticed = None;
        detector.tick(|pause| {
            assert!(detector.is_standing(), "not before what follows from it is done");
            noticed = Some(pause);
        });
        assert!(noticed.is_some_and(|pause| pause >= Duration::from_secs(5)));
        assert!(!detector.is_standing());
        assert_eq!(*detector.pauses().borrow(), 1);
    }
}
