//! Which frames of the tails wait until they are durable at the target.
//!
//! A target applies what its sources send at once, and syncs its log now and then: a sync that is
//! under way when the last source seals is waited for in the pause of its writers. With the last of
//! the seals comes one sync for all of them.
//!
//! **Invariants**
//! - What waits for no sync here does not count as durable before the log has said so.
//! - The frame by which all sources are sealed is synced, and each one behind it.
//! - A frame is kept waiting only for a source that is known to be open: never for one that does not
//!   tell, because it is older or cannot be reached.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vasto_core::ids::ReplicaId;

/// Interval of syncs while not all sources are sealed. Without frames the writer syncs by itself.
const INTERVAL: Duration = Duration::from_millis(100);

/// What the followers of one target share.
#[derive(Default)]
pub(super) struct Syncs {
    /// Whether each source that tells was sealed at its last frame.
    sealed: BTreeMap<ReplicaId, bool>,
    /// When a frame has waited for a sync last.
    asked: Option<Instant>,
}

impl Syncs {
    /// Notes whether a source is sealed at what was taken from it last; `None`: it does not tell.
    pub(super) fn note(&mut self, source: ReplicaId, sealed: Option<bool>) {
        match sealed {
            Some(sealed) => self.sealed.insert(source, sealed),
            None => self.sealed.remove(&source),
        };
    }

    /// Notes the same of a frame that is applied now; returns true when it waits for a sync. So does
    /// every frame of a source that does not tell.
    pub(super) fn wants(&mut self, source: ReplicaId, sealed: Option<bool>, now: Instant) -> bool {
        self.note(source, sealed);
        let is_due =
            self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= INTERVAL);
        let any = |wanted: bool| self.sealed.values().any(|sealed| *sealed == wanted);
        // Once one is sealed the others will be in a moment.
        let wants = sealed.is_none() || !any(false) || (is_due && !any(true));
        if wants {
            self.asked = Some(now);
        }
        wants
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ReplicaId = ReplicaId(1);
    const OTHER: ReplicaId = ReplicaId(2);

    #[test]
    fn tails_are_synced_now_and_then_and_once_when_the_last_source_has_sealed() {
        let (mut syncs, began) = (Syncs::default(), Instant::now());
        let at = |ms| began + Duration::from_millis(ms);
        syncs.note(OTHER, Some(false));
        assert!(syncs.wants(ONE, Some(false), at(0)), "the first one");
        assert!(!syncs.wants(OTHER, Some(false), at(40)));
        assert!(!syncs.wants(ONE, Some(false), at(99)));
        assert!(syncs.wants(OTHER, Some(false), at(100)), "it is due");
        assert!(!syncs.wants(ONE, Some(true), at(300)), "the other one is about to seal");
        assert!(syncs.wants(OTHER, Some(true), at(301)), "one sync for both");
        assert!(syncs.wants(ONE, Some(true), at(302)), "records of its peers came behind its seal");
        // The seals are undone.
        assert!(!syncs.wants(ONE, Some(false), at(303)));
        assert!(!syncs.wants(OTHER, Some(false), at(304)));
        assert!(syncs.wants(OTHER, Some(false), at(402)));
    }

    /// Nothing says when it seals: the others would be waited for until the writer syncs by itself.
    #[test]
    fn a_source_that_does_not_tell_is_synced_always_and_keeps_nobody_waiting() {
        let (mut syncs, now) = (Syncs::default(), Instant::now());
        for _ in 0..3 {
            assert!(syncs.wants(ONE, None, now));
        }
        assert!(!syncs.wants(OTHER, Some(false), now), "it is open itself, and none is due");
        assert!(syncs.wants(OTHER, Some(true), now));
        assert!(syncs.wants(ONE, None, now));
    }

    #[test]
    fn a_source_whose_stream_has_broken_keeps_nobody_waiting_before_it_is_back() {
        let (mut syncs, now) = (Syncs::default(), Instant::now());
        syncs.note(OTHER, Some(false));
        assert!(!syncs.wants(ONE, Some(true), now));
        syncs.note(OTHER, None);
        assert!(syncs.wants(ONE, Some(true), now));
        syncs.note(OTHER, Some(false));
        assert!(!syncs.wants(ONE, Some(true), now));
        // Nothing is new behind its seal, but that it is there.
        syncs.note(OTHER, Some(true));
        assert!(syncs.wants(ONE, Some(true), now));
    }
}
