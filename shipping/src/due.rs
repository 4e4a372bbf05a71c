//! The rule by which a checkpoint is due: before replaying the log after the last checkpoint would
//! take too long.
//!
//! **Invariant:** an idle replica is never due: the rule compares work, not time. A busy replica is
//! due by the bytes of its log, a slow replica by the number of its chunks, each of which is a
//! request.

use std::time::Duration;

use vasto_core::limits::{CHECKPOINT_LOG_BYTES, REPLAY_MAX};

/// Log bytes that a replica applies in a second, about ...
const BYTES_PER_SECOND: f64 = (20 << 20) as f64;
/// ... in at most this many records ...
const RECORDS_PER_SECOND: f64 = 50_000.0;
/// ... and the wait for each chunk.
const SECONDS_PER_CHUNK: f64 = 0.05;

/// The log after the last checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replay {
    /// Its bytes.
    pub bytes: u64,
    /// Its records.
    pub records: u64,
    /// The objects that hold it.
    pub chunks: u64,
}

impl Replay {
    /// Estimates the time to rebuild a replica from this log.
    pub fn takes(self) -> Duration {
        let seconds = (self.bytes as f64 / BYTES_PER_SECOND)
            .max(self.records as f64 / RECORDS_PER_SECOND)
            + self.chunks as f64 * SECONDS_PER_CHUNK;
        Duration::from_secs_f64(seconds)
    }
}

/// Returns true when this much log after the last checkpoint makes a new one due.
pub fn checkpoint_is_due(since: Replay) -> bool {
    since.bytes >= CHECKPOINT_LOG_BYTES || since.takes() >= REPLAY_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_replicas_are_due_by_bytes_slow_ones_by_chunks_idle_ones_never() {
        let due = |bytes, records, chunks| checkpoint_is_due(Replay { bytes, records, chunks });
        assert!(!due(0, 0, 0));
        assert!(!due(511 << 20, 100_000, 50));
        assert!(due(512 << 20, 1, 1));
        // Tiny records: the number of records decides, not their bytes.
        assert!(due(100 << 20, 3_000_000, 10));
        // One record every ten seconds: a checkpoint in three hours and a half, not every minute.
        assert!(!due(100_000, 1_000, 1_000));
        assert!(due(100_000, 1_200, 1_200));
    }
}
