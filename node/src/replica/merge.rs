//! Decides whether an entry is blind or must be compared with the stored one, and merges the
//! entries of other logs.
//!
//! **Invariants**
//! - An entry that is no read-modify-write and whose event time is above the slot of its key wins
//!   without a read. Every other one is compared with the entry under its key: of the group under
//!   construction, else of the database.
//! - Every entry that enters a group raises the slot of its key.

use vasto_core::entry::Entry;
use vasto_core::limits::BATCH_BYTES_MAX;
use vasto_core::merge::supersedes;
use vasto_core::record::KeyEntry;
use vasto_core::stored_key::data_key;

use super::apply::band_of;
use super::command::ReplicaError;
use super::store::Store;
use super::write_group::WriteGroup;
use crate::engine::EngineError;

/// Result of merging an entry of another log.
pub(super) struct Merged {
    pub wins: bool,
    /// True when a different entry was stored under the key; always false for a blind entry, which
    /// was not compared.
    pub conflicts: bool,
}

impl Store {
    /// Returns true when an entry of this event time wins without a read.
    pub(super) fn is_blind(&self, user_key: &[u8], event_time: u64) -> bool {
        event_time > self.max_event_times.max_of(user_key)
    }

    /// Returns the entry under a key, as the next write of a group sees it: the first of `groups`
    /// that has one precedes the database.
    pub(super) fn current_entry<'a>(
        &self,
        stored_key: &[u8],
        groups: impl IntoIterator<Item = &'a WriteGroup>,
    ) -> Result<Option<Vec<u8>>, EngineError> {
        match groups.into_iter().find_map(|group| group.get(stored_key)) {
            Some(entry) => Ok(Some(entry.to_vec())),
            None => self.shared.engine.get(stored_key),
        }
    }

    /// Adds an entry that has won to the group.
    pub(super) fn keep(
        &mut self,
        stored_key: Vec<u8>,
        user_key: &[u8],
        event_time: u64,
        entry: Vec<u8>,
        group: &mut WriteGroup,
    ) {
        self.max_event_times.raise(user_key, event_time);
        group.set(stored_key, user_key, entry);
    }

    /// Adds an entry of another log to the group, if it wins.
    pub(super) fn merge(
        &mut self,
        stored_key: Vec<u8>,
        incoming: &KeyEntry,
        event_time: u64,
        group: &mut WriteGroup,
    ) -> Result<Merged, EngineError> {
        let merged = if self.is_blind(&incoming.key, event_time) {
            Merged { wins: true, conflicts: false }
        } else {
            let current = self.current_entry(&stored_key, [&*group])?;
            Merged {
                wins: supersedes(self.meta.head.floor, current.as_deref(), &incoming.entry),
                conflicts: current.is_some_and(|current| current != incoming.entry),
            }
        };
        if merged.wins {
            self.keep(stored_key, &incoming.key, event_time, incoming.entry.clone(), group);
        }
        Ok(merged)
    }

    /// Merges entries of another shard's log into the group; when an entry is refused, the group
    /// has none of them.
    pub(super) fn merge_all(
        &mut self,
        entries: &[KeyEntry],
        group: &mut WriteGroup,
    ) -> Result<(), ReplicaError> {
        self.shared.check_open()?;
        let bytes: usize = entries.iter().map(key_entry_bytes).sum();
        if bytes > BATCH_BYTES_MAX {
            return Err(ReplicaError::Refused(format!(
                "{bytes} bytes of entries do not fit into one record"
            )));
        }
        group.ops += entries.len() + 1;
        let mut checked = Vec::with_capacity(entries.len());
        for incoming in entries {
            let entry = decode_streamed(incoming)?;
            let band = band_of(self.meta.identity.shard, &incoming.key, entry.partition_hash)
                .filter(|band| self.meta.ranges.takes(*band))
                .ok_or_else(|| {
                    ReplicaError::Refused("a streamed entry belongs to another shard".into())
                })?;
            checked.push((data_key(band, &incoming.key), incoming, entry.event_time));
        }
        for (stored_key, incoming, event_time) in checked {
            self.merge(stored_key, incoming, event_time, group)?;
        }
        Ok(())
    }
}

/// Returns the bytes of the key and the entry.
pub(super) fn key_entry_bytes(entry: &KeyEntry) -> usize {
    entry.key.len() + entry.entry.len()
}

/// Decodes an entry that another replica has sent.
pub(super) fn decode_streamed(incoming: &KeyEntry) -> Result<Entry<'_>, ReplicaError> {
    Entry::decode(&incoming.entry)
        .map_err(|error| ReplicaError::Refused(format!("a streamed entry is damaged: {error}")))
}
