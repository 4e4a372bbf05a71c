//! The writes that were promised for each key: the pure part of the checks.
//!
//! Every write of a key carries a number that grows by one; every eighth write of a key that is
//! overwritten is a delete. One task writes a key, one write at a time, so after an acknowledged
//! write the key holds that number, or that of a later attempt of unknown outcome.
//!
//! **Invariant:** a refused write ("nothing was changed") must never be visible, an acknowledged
//! write never be missing; only an attempt of unknown outcome allows both.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;
use vasto_client::Key;

/// Bytes of a value.
const VALUE_BYTES: usize = 100;

/// The observed state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The value of a write.
    Number(u64),
    /// The key is absent.
    Absent,
}

/// Returns whether the write of this number deletes the key.
pub fn is_delete(number: u64) -> bool {
    number % 8 == 7
}

/// Returns the key of a name: a name `p<partition>/<rest>` has the partition key `p<partition>`.
pub fn key_of(name: &str) -> Key {
    match name.split_once('/') {
        Some((partition, _)) if partition.starts_with('p') => Key::new(name).partition(partition),
        _ => Key::new(name),
    }
}

/// Returns the value of a write, which names the key and the number of the write.
pub fn value_of(name: &str, number: u64) -> Bytes {
    let mut value = format!("{number}|{name}|");
    while value.len() < VALUE_BYTES {
        value.push((b'a' + (value.len() as u64 + number) as u8 % 26) as char);
    }
    value.into()
}

/// Returns the number in a value, if it is exactly the value of some write of this key.
pub fn number_of(name: &str, value: &[u8]) -> Option<u64> {
    let number = std::str::from_utf8(value).ok()?.split_once('|')?.0.parse().ok()?;
    (value_of(name, number) == value).then_some(number)
}

/// The recorded writes of one key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyHistory {
    /// The last acknowledged number; 0 when there is none.
    pub acked: u64,
    /// The last number that was attempted.
    pub tried: u64,
    /// Later numbers of unknown outcome, and the number in flight.
    pub open: Vec<u64>,
}

fn state_after(number: u64) -> Seen {
    if number == 0 || is_delete(number) { Seen::Absent } else { Seen::Number(number) }
}

impl KeyHistory {
    fn allowed(&self) -> impl Iterator<Item = u64> {
        std::iter::once(self.acked).chain(self.open.iter().copied())
    }

    /// Returns whether the promises allow this state, with no write in flight.
    pub fn allows(&self, seen: Seen) -> bool {
        self.allowed().any(|number| state_after(number) == seen)
    }
}

/// All keys that were ever written.
#[derive(Debug, Default)]
pub struct History {
    keys: Mutex<BTreeMap<String, KeyHistory>>,
}

impl History {
    /// Begins a write; returns its number.
    pub fn begin(&self, name: &str) -> u64 {
        let mut keys = self.keys.lock();
        let kept = keys.entry(name.to_owned()).or_default();
        kept.tried += 1;
        kept.open.push(kept.tried);
        kept.tried
    }

    /// Records that a write was acknowledged.
    pub fn acked(&self, name: &str, number: u64) {
        self.change(name, |kept| {
            kept.acked = number;
            kept.open.retain(|open| *open > number);
        });
    }

    /// Records that a write was refused: nothing was changed.
    pub fn refused(&self, name: &str, number: u64) {
        self.change(name, |kept| kept.open.retain(|open| *open != number));
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut KeyHistory)) {
        if let Some(kept) = self.keys.lock().get_mut(name) {
            change(kept);
        }
    }

    /// Returns the recorded writes of a key.
    pub fn get(&self, name: &str) -> KeyHistory {
        self.keys.lock().get(name).cloned().unwrap_or_default()
    }

    /// Returns a copy of the whole history.
    pub fn all(&self) -> BTreeMap<String, KeyHistory> {
        self.keys.lock().clone()
    }

    /// Returns the numbers of keys and of acknowledged writes.
    pub fn counts(&self) -> (usize, u64) {
        let keys = self.keys.lock();
        (keys.len(), keys.values().map(|kept| kept.acked).sum())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_acknowledged_write_must_be_there() {
        let history = History::default();
        assert!(history.get("k").allows(Seen::Absent));
        let one = history.begin("k");
        assert!(history.get("k").allows(Seen::Absent) && history.get("k").allows(Seen::Number(1)));
        history.acked("k", one);
        assert!(!history.get("k").allows(Seen::Absent));
        assert!(history.get("k").allows(Seen::Number(1)));
        let two = history.begin("k");
        assert_eq!(two, 2);
        assert!(
            history.get("k").allows(Seen::Number(1)) && history.get("k").allows(Seen::Number(2))
        );
        history.refused("k", two);
        assert!(!history.get("k").allows(Seen::Number(2)), "a refused write was seen");
    }

    #[test]
    fn an_unknown_write_is_forgotten_when_a_later_one_is_acknowledged() {
        let history = History::default();
        let unknown = history.begin("k");
        let acked = history.begin("k");
        history.acked("k", acked);
        assert!(!history.get("k").allows(Seen::Number(unknown)));
        assert_eq!(history.get("k"), KeyHistory { acked: 2, tried: 2, open: Vec::new() });
    }

    #[test]
    fn the_seventh_write_is_a_delete() {
        let history = History::default();
        for _ in 0..7 {
            let number = history.begin("k");
            history.acked("k", number);
        }
        assert!(history.get("k").allows(Seen::Absent));
        assert!(!history.get("k").allows(Seen::Number(6)));
    }

    #[test]
    fn values_name_their_key_and_number() {
        let value = value_of("a/b", 12);
        assert_eq!(number_of("a/b", &value), Some(12));
        assert_eq!(number_of("a/c", &value), None, "the value of another key is a phantom");
        assert_eq!(number_of("a/b", &value[..99]), None);
        assert_eq!(number_of("a/b", b""), None);
    }
}
