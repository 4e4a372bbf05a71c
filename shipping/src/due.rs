//! When a checkpoint is due: before reading the log behind the last one would take too long.
//!
//! **Invariant:** an idle replica is never due: what is compared is work, not time. A busy one is due by
//! the bytes of its log, a slow one by the number of its chunks, each of which is a request.

use std::time::Duration;

use vasto_core::limits::{CHECKPOINT_LOG_BYTES, REPLAY_MAX};

/// A replica applies about so many bytes of log in a second ...
const BYTES_PER_SECOND: f64 = (20 << 20) as f64;
/// ... of at most so many records ...
const RECORDS_PER_SECOND: f64 = 50_000.0;
/// ... and waits so long for each chunk.
const SECONDS_PER_CHUNK: f64 = 0.05;

/// The log behind the last checkpoint.
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
    /// About how long it takes to make a replica out of it.
    pub fn takes(self) -> Duration {
        let seconds = (self.bytes as f64 / BYTES_PER_SECOND).max(self.records as f64 / RECORDS_PER_SECOND)
            + self.chunks as f64 * SECONDS_PER_CHUNK;
        Duration::from_secs_f64(seconds)
    }
}

/// Is a checkpoint due with so much log behind the last one?
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
        // Tiny records: replaying them takes longer than their bytes say.
        assert!(due(100 << 20, 3_000_000, 10));
        // One record every ten seconds: a checkpoint in three hours and a half, not every minute.
        assert!(!due(100_000, 1_000, 1_000));
        assert!(due(100_000, 1_200, 1_200));
    }
}
