//! Maximum event times per slot of keys, which decide whether a write may be blind.
//!
//! **Invariant:** the slot of a key is never below the event time of the entry stored under the
//! key, so an event time above the slot wins over the stored entry without a read. Every path that
//! stores an entry raises its slot; at open all slots stand at the replica's persisted maximum.

use xxhash_rust::xxh3::xxh3_64;

const SMALL: usize = 4_096;
const LARGE: usize = 65_536;

/// Table of the slots.
pub(super) struct MaxEventTimes {
    slots: Vec<u64>,
    raised: usize,
}

impl MaxEventTimes {
    /// Creates a table with all slots at the maximum that the data can hold.
    pub(super) fn starting_at(event_time_max: u64) -> Self {
        Self { slots: vec![event_time_max; SMALL], raised: 0 }
    }

    fn slot(&self, user_key: &[u8]) -> usize {
        xxh3_64(user_key) as usize & (self.slots.len() - 1)
    }

    /// Returns an upper bound of the stored event time of the key, microseconds.
    pub(super) fn max_of(&self, user_key: &[u8]) -> u64 {
        self.slots[self.slot(user_key)]
    }

    /// Raises the slot of a key under which an entry with this event time is now stored.
    pub(super) fn raise(&mut self, user_key: &[u8], event_time: u64) {
        let slot = self.slot(user_key);
        self.slots[slot] = self.slots[slot].max(event_time);
        self.raised += 1;
        if self.raised > LARGE && self.slots.len() == SMALL {
            // Each small slot becomes the large slots that share its low bits.
            self.slots = (0..LARGE).map(|large| self.slots[large & (SMALL - 1)]).collect();
        }
    }

    /// Raises all slots: entries up to this event time are now stored somewhere.
    pub(super) fn raise_all(&mut self, event_time: u64) {
        for slot in &mut self.slots {
            *slot = (*slot).max(event_time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_slot_ever_falls_below_its_keys_also_when_the_table_grows() {
        let mut table = MaxEventTimes::starting_at(10);
        let key = |i: u64| (i % 70_000).to_le_bytes();
        for i in 0..200_000u64 {
            table.raise(&key(i), 10 + i);
            assert!(table.max_of(&key(i)) >= 10 + i);
        }
        for i in 130_000..200_000u64 {
            assert!(table.max_of(&key(i)) >= 10 + i, "key {i}");
        }
        table.raise_all(1_000_000);
        assert!(table.max_of(b"anything") >= 1_000_000);
    }
}
