//! Schedule by which replicas that a passing shortage has closed are opened again.
//!
//! **Invariant:** a replica that keeps failing is tried less and less often, and after
//! [`PASSING_MAX`] no longer counts as one that opens again by itself.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use vasto_core::ids::{KeyspaceId, ReplicaId};
use vasto_core::limits::{PASSING_MAX, REOPEN_AFTER, REOPEN_AFTER_MAX};

/// Identity of a replica on a node.
pub(crate) type ReplicaKey = (KeyspaceId, ReplicaId);

/// The next attempt for each replica that a shortage has closed.
#[derive(Default)]
pub(crate) struct ReopenSchedule(HashMap<ReplicaKey, Attempt>);

struct Attempt {
    /// When the replica was first found closed.
    since: Instant,
    not_before: Instant,
    /// Pause between this attempt and the following one.
    pause: Duration,
}

impl ReopenSchedule {
    /// Forgets replicas that have been open for a while. One that is closed again before that keeps
    /// its growing pause.
    pub(crate) fn keep(&mut self, closed: &HashSet<ReplicaKey>, now: Instant) {
        self.0.retain(|key, attempt| {
            closed.contains(key) || now < attempt.not_before + REOPEN_AFTER_MAX
        });
    }

    /// Returns true when the replica may be tried now; the first call, with the reason of its
    /// closing, only schedules it.
    pub(crate) fn is_due(&mut self, key: ReplicaKey, reason: &str, now: Instant) -> bool {
        let first = || {
            tracing::warn!(
                keyspace = key.0.0,
                replica = key.1.0,
                reason,
                "a replica is closed for want of something; it opens again by itself"
            );
            Attempt { since: now, not_before: now + REOPEN_AFTER, pause: REOPEN_AFTER }
        };
        now >= self.0.entry(key).or_insert_with(first).not_before
    }

    /// Records an attempt.
    pub(crate) fn attempt(&mut self, key: ReplicaKey, now: Instant) {
        if let Some(attempt) = self.0.get_mut(&key) {
            attempt.pause = (attempt.pause * 2).min(REOPEN_AFTER_MAX);
            attempt.not_before = now + attempt.pause;
        }
    }

    /// Returns true while a closed replica may still open again by itself.
    pub(crate) fn is_passing(&self, key: ReplicaKey) -> bool {
        self.0.get(&key).is_none_or(|attempt| attempt.since.elapsed() < PASSING_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_keeps_failing_is_tried_less_and_less_often() {
        let (key, mut schedule, mut now) =
            ((KeyspaceId(1), ReplicaId(2)), ReopenSchedule::default(), Instant::now());
        assert!(!schedule.is_due(key, "full", now), "not at once");
        let mut pause = REOPEN_AFTER;
        for _ in 0..10 {
            now += pause;
            assert!(schedule.is_due(key, "full", now));
            schedule.attempt(key, now);
            pause = (pause * 2).min(REOPEN_AFTER_MAX);
            assert!(!schedule.is_due(key, "full", now + pause - Duration::from_millis(1)));
        }
        assert_eq!(pause, REOPEN_AFTER_MAX);
        schedule.keep(&HashSet::new(), now);
        assert!(
            schedule.is_due(key, "full", now + pause),
            "open for a moment only: its pause stays"
        );
        schedule.keep(&HashSet::new(), now + pause + REOPEN_AFTER_MAX);
        assert!(
            !schedule.is_due(key, "full", now + pause + REOPEN_AFTER_MAX),
            "open for long: it begins anew"
        );
    }
}
