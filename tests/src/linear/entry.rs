//! The operations of a history with the times of their calls and answers, recorded by key.

use std::collections::BTreeMap;
use std::time::Instant;

use parking_lot::Mutex;

use super::model::Did;

/// An operation of a history.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The client that called.
    pub client: u32,
    /// Time of the call, nanoseconds.
    pub call: i64,
    /// Time of the answer.
    pub answer: i64,
    /// The operation and its outcome.
    pub did: Did,
}

impl Entry {
    pub(super) fn unknown(&self) -> bool {
        matches!(
            self.did,
            Did::Put(_, None)
                | Did::Delete(None)
                | Did::IfAbsent(_, None)
                | Did::IfVersion(_, _, None)
                | Did::Add(_, None)
                | Did::Effect(..)
        )
    }

    pub(super) fn is_read(&self) -> bool {
        matches!(self.did, Did::Get(_))
    }
}

/// Recorder of all operations of a round, by key.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    entries: Mutex<BTreeMap<String, Vec<Entry>>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { began: Instant::now(), entries: Mutex::default() }
    }
}

impl Recorder {
    /// Returns the nanoseconds since the start.
    pub fn now(&self) -> i64 {
        self.began.elapsed().as_nanos() as i64
    }

    /// Records an operation that answers now.
    pub fn add(&self, key: &str, client: u32, call: i64, did: Did) {
        let entry = Entry { client, call, answer: self.now(), did };
        self.entries.lock().entry(key.to_owned()).or_default().push(entry);
    }

    /// Takes the recorded operations.
    pub fn take(&self) -> BTreeMap<String, Vec<Entry>> {
        std::mem::take(&mut self.entries.lock())
    }
}
