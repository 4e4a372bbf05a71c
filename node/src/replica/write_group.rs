//! Write group under construction: the entries of one log record.
//!
//! **Invariants**
//! - A group holds one entry per stored key.
//! - A group tracks the length of its record: stored bytes count, that is the whole value even when
//!   an operation brings only a byte of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;

use vasto_core::entry::ENTRY_HEADER_BYTES_MAX;
use vasto_core::limits::{GROUP_BYTES_MAX, GROUP_OPS_MAX};
use vasto_core::record::KeyEntry;

use super::command::OpOutcome;

/// The entries of a group under construction, one per stored key.
#[derive(Default)]
pub(super) struct WriteGroup {
    index: HashMap<Vec<u8>, usize>,
    /// Bytes of keys and entries.
    bytes: usize,
    /// Operations that were assigned to the group, including those that stored nothing.
    pub ops: usize,
    pub entries: Vec<KeyEntry>,
    pub stored_keys: Vec<Vec<u8>>,
    /// Results of the read-modify-writes in the group, by client and sequence.
    pub results: Vec<((u64, u64), Vec<OpOutcome>)>,
}

impl WriteGroup {
    pub(super) fn get(&self, stored_key: &[u8]) -> Option<&[u8]> {
        self.index.get(stored_key).map(|at| self.entries[*at].entry.as_slice())
    }

    /// Returns true when the group has nothing to log.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.results.is_empty()
    }

    /// Returns true when the group takes no further request. Until then it has room for the
    /// largest.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= GROUP_BYTES_MAX || self.ops >= GROUP_OPS_MAX
    }

    /// Returns the bytes of keys and values: entry headers do not count, as in the check of
    /// requests.
    pub(super) fn payload_bytes(&self) -> usize {
        self.bytes.saturating_sub(self.entries.len() * ENTRY_HEADER_BYTES_MAX)
    }

    pub(super) fn set(&mut self, stored_key: Vec<u8>, user_key: &[u8], entry: Vec<u8>) {
        self.bytes += entry.len();
        match self.index.entry(stored_key) {
            MapEntry::Occupied(at) => {
                let before = std::mem::replace(&mut self.entries[*at.get()].entry, entry);
                self.bytes -= before.len();
            }
            MapEntry::Vacant(slot) => {
                self.bytes += user_key.len();
                self.stored_keys.push(slot.key().clone());
                slot.insert(self.entries.len());
                self.entries.push(KeyEntry { key: user_key.to_vec(), entry });
            }
        }
    }

    /// Sets the entries of another group.
    pub(super) fn set_all(&mut self, other: WriteGroup) {
        for (stored_key, staged) in other.stored_keys.into_iter().zip(other.entries) {
            self.set(stored_key, &staged.key, staged.entry);
        }
    }
}
