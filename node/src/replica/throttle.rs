//! The writes of moving keys: how many bytes of them a replica takes, and to what rate its host
//! slows them down.
//!
//! **Invariant:** without a plan that moves keys away nothing is counted and nothing slowed down.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use vasto_core::ids::ReplicaId;
use vasto_core::record::BandRange;

/// The moving keys of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moving {
    /// Their bands.
    pub range: BandRange,
    /// Bytes of keys and values that are taken in a second; `None`: all that come.
    pub bytes_per_s: Option<u64>,
}

/// Time for which the rate that a peer has named counts: it names it again with every frame.
const HEARD_FOR: Duration = Duration::from_secs(1);

/// What a peer has said about its own writers.
#[derive(Debug, Clone, Copy)]
struct Heard {
    peer: ReplicaId,
    bytes_per_s: u64,
    at: Instant,
}

/// What the writer counts, and obeys.
#[derive(Default)]
pub(crate) struct WriteThrottle {
    moving: ArcSwapOption<Moving>,
    /// Rate that a peer has named last, and when.
    peer: Mutex<Option<Heard>>,
    taken: AtomicU64,
    held_back_us: AtomicU64,
}

impl WriteThrottle {
    /// Sets the moving keys and their rate.
    pub(crate) fn set(&self, moving: Option<Moving>) {
        if self.moving() != moving {
            self.moving.store(moving.map(Into::into));
        }
    }

    /// Returns the moving keys and their rate.
    pub(crate) fn moving(&self) -> Option<Moving> {
        self.moving.load().as_deref().copied()
    }

    /// Returns the rate to which writes of moving keys are slowed down.
    pub(crate) fn bytes_per_s(&self) -> Option<u64> {
        self.moving()?.bytes_per_s
    }

    /// Returns true while writes of moving keys are slowed down.
    pub(crate) fn slows(&self) -> bool {
        self.bytes_per_s().is_some()
    }

    /// Notes the rate that a peer has named for its own writers of moving keys.
    pub(crate) fn heard(&self, peer: ReplicaId, bytes_per_s: Option<u64>) {
        let mut last = self.peer.lock();
        match bytes_per_s {
            Some(bytes_per_s) => *last = Some(Heard { peer, bytes_per_s, at: Instant::now() }),
            None => drop(last.take_if(|heard| heard.peer == peer)),
        }
    }

    /// Returns the rate that this peer named a moment ago.
    pub(crate) fn rate_of(&self, peer: ReplicaId) -> Option<u64> {
        let heard = (*self.peer.lock())?;
        (heard.peer == peer && heard.at.elapsed() < HEARD_FOR).then_some(heard.bytes_per_s)
    }

    /// Returns the bytes of keys and values of moving keys that were ever taken, from writers and
    /// from peers.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Returns the time for which writes were ever held back, all together.
    pub(crate) fn held_back(&self) -> Duration {
        Duration::from_micros(self.held_back_us.load(Ordering::Relaxed))
    }

    pub(super) fn note_taken(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn note_held_back(&self, time: Duration) {
        self.held_back_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use vasto_core::Band;

    use super::*;

    #[test]
    fn the_rate_of_a_peer_counts_until_it_takes_it_back() {
        let throttle = WriteThrottle::default();
        throttle.heard(ReplicaId(1), Some(7));
        assert_eq!(throttle.rate_of(ReplicaId(1)), Some(7));
        assert_eq!(throttle.rate_of(ReplicaId(2)), None, "it is not the source");
        throttle.heard(ReplicaId(2), None);
        assert_eq!(throttle.rate_of(ReplicaId(1)), Some(7));
        throttle.heard(ReplicaId(1), None);
        assert_eq!(throttle.rate_of(ReplicaId(1)), None);
    }

    #[test]
    fn moving_keys_without_a_rate_are_not_slowed_down() {
        let throttle = WriteThrottle::default();
        assert!(!throttle.slows());
        let range = (Band(1)..=Band(2)).into();
        throttle.set(Some(Moving { range, bytes_per_s: None }));
        assert!(!throttle.slows() && throttle.moving().is_some());
        throttle.set(Some(Moving { range, bytes_per_s: Some(1) }));
        assert!(throttle.slows());
        throttle.set(None);
        assert!(!throttle.slows() && throttle.moving().is_none());
    }
}
