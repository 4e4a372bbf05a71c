//! Size of a replica, for placement, planning and status.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vasto_core::entry::Entry;
use vasto_core::ids::Lsn;
use vasto_core::record::RangeState;
use vasto_core::stored_key::split_data_key;

use super::handle::Replica;
use super::shared::KeyCount;
use crate::engine::EngineError;

/// Identity, head and range states.
const META_ROWS: u64 = 3;

/// Rows that a count examines: a few milliseconds.
const ROWS_WALKED: usize = 5_000;

/// Inputs of a size: the last record, the files of the database, the last count and trial.
pub(crate) type SizeVersion = (Lsn, u64, Option<Instant>, Option<Instant>);

impl Replica {
    /// Returns `(keys, bytes of SSTs)`. The number of keys is exact for a small replica without
    /// writes, and an estimate otherwise: the last count, and all that was stored since.
    pub(crate) fn size(&self) -> (u64, u64) {
        let (stored, bytes) = self.stored();
        let count = *self.shared.key_count.lock();
        let keys = match count {
            None => stored,
            Some(count) if count.applied == self.applied_lsn() => count.keys,
            Some(count) => stored.min(count.keys + stored.saturating_sub(count.stored)),
        };
        (keys, bytes)
    }

    /// Returns a version that changes whenever something was written, compacted or counted.
    pub(crate) fn size_version(&self) -> SizeVersion {
        let counted = self.shared.key_count.lock().map(|count| count.at);
        let tried = self.shared.trials.lock().last.map(|trial| trial.at);
        (self.applied_lsn(), self.shared.engine.files_version(), counted, tried)
    }

    /// Returns `(stored entries, bytes of SSTs)`: an entry counts once for each version that is not
    /// compacted away yet.
    fn stored(&self) -> (u64, u64) {
        let (keys, apart, bytes) = self.shared.engine.size();
        // Counted, not read: every report requests it.
        let origins = self.shared.vector.lock().len() as u64;
        let metadata = META_ROWS + origins + self.shared.results.load(Ordering::Relaxed);
        let among_data = metadata.saturating_sub(apart);
        (keys.saturating_sub(self.metadata_in_memory()).saturating_sub(among_data), bytes)
    }

    /// Returns the entries of the memtables that are metadata: the head and the vector entry that
    /// every unflushed record has written.
    pub(super) fn metadata_in_memory(&self) -> u64 {
        let persisted = self.persisted_lsn().unwrap_or_default();
        2 * self.applied_lsn().0.saturating_sub(persisted.0)
    }

    /// Returns true when a record was applied since the last count, which is at least `age` old.
    pub(crate) fn key_count_is_stale(&self, age: Duration) -> bool {
        let count = *self.shared.key_count.lock();
        self.closed().is_none()
            && count.is_none_or(|count| {
                count.at.elapsed() >= age && count.applied != self.applied_lsn()
            })
    }

    /// Returns the age of the last count.
    pub(crate) fn key_count_age(&self) -> Duration {
        self.shared.key_count.lock().map_or(Duration::MAX, |count| count.at.elapsed())
    }

    /// Counts the keys. Blocks on the disk.
    pub(crate) fn count_keys(&self) -> Result<(), EngineError> {
        let applied = self.applied_lsn();
        let now_us = self.shared.clock.now_us();
        let view = self.view();
        let is_live = |stored_key: &[u8], encoded: &[u8]| {
            split_data_key(stored_key)
                .is_some_and(|(band, _)| view.ranges.state(band) == RangeState::Owned)
                && Entry::decode(encoded)
                    .is_ok_and(|entry| entry.payload.is_some() && !entry.is_expired(now_us))
        };
        let walk = self.shared.engine.walk(ROWS_WALKED, is_live)?;
        let (stored, _) = self.stored();
        let keys = match walk.complete {
            true => walk.live,
            false => (stored as f64 * walk.live as f64 / walk.entries.max(1) as f64).round() as u64,
        };
        *self.shared.key_count.lock() =
            Some(KeyCount { at: Instant::now(), applied, keys, stored });
        Ok(())
    }
}
