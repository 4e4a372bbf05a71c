//! Clients that read and write a few keys; every outcome is recorded as what it means for the key.

use std::sync::atomic::{AtomicU64, Ordering};

use vasto_client::{Ack, ErrorKind, Keyspace, Outcome};
use vasto_testkit::Numbers;

use super::entry::Recorder;
use super::model::{Did, Held};

/// Clients that read and write a few keys, and record the outcomes.
#[derive(Debug)]
pub struct Workload {
    /// The names of the keys; those that end in `c` are counters.
    pub keys: Vec<String>,
    /// The acknowledgement level of writes.
    pub ack: Ack,
    /// The recorder of all operations.
    pub recorder: Recorder,
    next: AtomicU64,
}

impl Workload {
    /// Creates a workload on keys that were never written.
    pub fn new(keys: Vec<String>, ack: Ack) -> Self {
        Self { keys, ack, recorder: Recorder::default(), next: AtomicU64::new(1) }
    }

    /// Executes one random operation.
    pub async fn act(&self, client: u32, keyspace: &Keyspace, numbers: &mut Numbers) {
        let key = self.keys[numbers.below(self.keys.len() as u64) as usize].as_str();
        let counter = key.ends_with('c');
        match (numbers.below(10), counter) {
            (0..4, _) => drop(self.get(client, keyspace, key).await),
            (4..6, true) | (4, false) => self.delete(client, keyspace, key).await,
            (_, true) => self.add(client, keyspace, key, 1 + numbers.below(1_000) as i64).await,
            (5..7, false) => self.put(client, keyspace, key).await,
            (7, false) => self.if_absent(client, keyspace, key).await,
            (_, false) => self.if_version(client, keyspace, key).await,
        }
    }

    /// Reads a key; returns its version too, for a conditional write.
    pub async fn get(
        &self,
        client: u32,
        keyspace: &Keyspace,
        key: &str,
    ) -> Option<((Held, u64), u64)> {
        let call = self.recorder.now();
        let read = keyspace.get(key).await.ok()?;
        let seen = read.as_ref().map(|value| {
            let held = match value.as_i64() {
                Some(count) => Held::Count(count),
                None => Held::Value(number(&value.bytes())),
            };
            (held, value.event_time)
        });
        self.recorder.add(key, client, call, Did::Get(seen));
        seen.zip(read.map(|value| value.version))
    }

    fn value(&self) -> (u64, String) {
        let value = self.next.fetch_add(1, Ordering::Relaxed);
        (value, format!("v{value}"))
    }

    async fn put(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let (value, text) = self.value();
        let call = self.recorder.now();
        match keyspace.put(key, text).ack(self.ack).await {
            Ok(Outcome::Applied { event_time }) => {
                self.recorder.add(key, client, call, Did::Put(value, Some(event_time)));
            }
            // The key already held a write with a later time: this put took effect and was
            // overwritten at once.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Put(value, None));
            }
            Err(_) => {}
        }
    }

    async fn delete(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let call = self.recorder.now();
        match keyspace.delete(key).ack(self.ack).await {
            Ok(Outcome::Applied { event_time }) => {
                self.recorder.add(key, client, call, Did::Delete(Some(event_time)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Delete(None));
            }
            Err(_) => {}
        }
    }

    async fn if_absent(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let (value, text) = self.value();
        let call = self.recorder.now();
        let outcome = keyspace.put(key, text).if_absent().ack(self.ack).await;
        if let Some(outcome) = conditional(outcome) {
            self.recorder.add(key, client, call, Did::IfAbsent(value, outcome));
        }
    }

    async fn if_version(&self, client: u32, keyspace: &Keyspace, key: &str) {
        let Some((seen, version)) = self.get(client, keyspace, key).await else { return };
        let (value, text) = self.value();
        let call = self.recorder.now();
        let outcome = keyspace.put(key, text).if_version(version).ack(self.ack).await;
        if let Some(outcome) = conditional(outcome) {
            self.recorder.add(key, client, call, Did::IfVersion(seen, value, outcome));
        }
    }

    async fn add(&self, client: u32, keyspace: &Keyspace, key: &str, by: i64) {
        let call = self.recorder.now();
        match keyspace.add_i64(key, by).ack(self.ack).await {
            Ok(sum) => self.recorder.add(key, client, call, Did::Add(by, Some(sum))),
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.recorder.add(key, client, call, Did::Add(by, None));
            }
            Err(_) => {}
        }
    }
}

/// Returns the outcome of a conditional write: `None` when it was refused, no outcome when it is
/// unknown.
fn conditional(outcome: Result<Outcome, vasto_client::Error>) -> Option<Option<Option<u64>>> {
    match outcome {
        Ok(Outcome::Applied { event_time }) => Some(Some(Some(event_time))),
        Ok(_) => Some(Some(None)),
        Err(error) if error.kind() == ErrorKind::Unknown => Some(None),
        Err(_) => None,
    }
}

/// Parses the number of a value; 0 for a value that no operation put.
fn number(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.strip_prefix('v')?.parse().ok())
        .unwrap_or(0)
}
