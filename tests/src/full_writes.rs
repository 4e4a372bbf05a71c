//! Writers that overwrite moving keys alone, as fast as they can or at a rate, and what they were
//! promised.
//!
//! **Invariant:** a key has one writer, which writes all of its keys in one batch and begins a round
//! when the one before was answered: a key that holds an older round than the last acknowledged one
//! has lost a write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval_at};
use vasto_client::{Batch, Key, Keyspace};
use vasto_core::hash::{jump, partition_hash};
use vasto_testkit::{DEADLINE, until};

/// Shards of the keyspace while it is small, and while it is large.
pub const SHARDS: (u32, u32) = (2, 4);
/// Batches that are in flight at a time.
const WRITERS: u64 = 48;
/// Keys in a batch.
const BATCH: usize = 200;
/// Pause of a writer after an error.
const AFTER_ERROR: Duration = Duration::from_millis(20);
/// Errors whose text is kept.
const ERRORS_KEPT: usize = 5;

/// How much is written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullLoad {
    /// Bytes of a value, at least 20.
    pub value_bytes: usize,
    /// Keys that all writers together write in a second, at most; `None`: as many as they can. What
    /// was not written in its time is not made up for.
    pub writes_per_s: Option<f64>,
}

impl Default for FullLoad {
    /// Values of 100 bytes, as fast as they go.
    fn default() -> Self {
        Self { value_bytes: 100, writes_per_s: None }
    }
}

impl FullLoad {
    /// Returns the times at which a writer begins its batches, spread among the writers; `None` when
    /// each begins as soon as the one before was answered.
    fn beats(&self, writer: u64) -> Option<Interval> {
        let per_s = self.writes_per_s.filter(|per_s| *per_s > 0.0)?;
        let period = Duration::from_secs_f64(WRITERS as f64 * BATCH as f64 / per_s);
        let first = tokio::time::Instant::now() + period.mul_f64(writer as f64 / WRITERS as f64);
        let mut beats = interval_at(first, period);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Some(beats)
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acked: AtomicU64,
    failed: AtomicU64,
    longest_us: AtomicU64,
    errors: Mutex<Vec<String>>,
}

impl Shared {
    fn note(&self, error: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut errors = self.errors.lock();
        if errors.len() < ERRORS_KEPT {
            errors.push(error);
        }
    }
}

/// The running writers.
#[derive(Debug)]
pub struct FullWrites {
    load: FullLoad,
    shared: Arc<Shared>,
    writers: JoinSet<Rounds>,
}

/// What one writer was promised.
#[derive(Debug, Clone, Copy)]
struct Rounds {
    writer: u64,
    /// The last round that was acknowledged; 0 when none was.
    acked: u64,
    /// The last round that was sent.
    tried: u64,
}

/// What the writers were promised, once they have stopped.
#[derive(Debug)]
pub struct FullWritten {
    load: FullLoad,
    rounds: Vec<Rounds>,
    /// Batches that were answered with an error.
    pub failed: u64,
    /// The first errors.
    pub errors: Vec<String>,
}

/// What is left of the writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FullLosses {
    /// Keys that were looked at.
    pub keys: u64,
    /// Keys without their last acknowledged write.
    pub lost: u64,
    /// Keys with what nobody wrote.
    pub strange: u64,
    /// One of these keys, and what it holds.
    pub first: Option<String>,
}

/// Returns whether a key changes its shard whenever the keyspace changes its size.
fn moves(key: &str) -> bool {
    jump(partition_hash(key.as_bytes()), SHARDS.1).shard.0 >= SHARDS.0
}

/// Returns the moving keys of a writer.
fn keys_of(writer: u64) -> Vec<String> {
    let keys = (0u64..).map(|n| format!("full-{writer}-{n}"));
    keys.filter(|key| moves(key)).take(BATCH).collect()
}

fn value_of(round: u64, bytes: usize) -> String {
    format!("{round:0bytes$}")
}

async fn write(writer: u64, keyspace: Keyspace, load: FullLoad, shared: Arc<Shared>) -> Rounds {
    let mut beats = load.beats(writer);
    let keys: Vec<Key> = keys_of(writer).into_iter().map(Key::new).collect();
    let mut rounds = Rounds { writer, acked: 0, tried: 0 };
    while !shared.stop.load(Ordering::Relaxed) {
        if let Some(beats) = &mut beats {
            beats.tick().await;
        }
        rounds.tried += 1;
        let value = Bytes::from(value_of(rounds.tried, load.value_bytes));
        let batch = keys.iter().fold(Batch::new(), |batch, key| batch.put(key.clone(), &value));
        let began = Instant::now();
        match keyspace.write(batch).await {
            Ok(_) => {
                rounds.acked = rounds.tried;
                shared.acked.fetch_add(keys.len() as u64, Ordering::Relaxed);
                let took_us = began.elapsed().as_micros() as u64;
                shared.longest_us.fetch_max(took_us, Ordering::Relaxed);
            }
            Err(error) => {
                let (round, after) = (rounds.tried, began.elapsed());
                shared.note(format!("round {round} of writer {writer}, after {after:?}: {error}"));
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
    }
    rounds
}

impl FullWrites {
    /// Starts the writers, as fast as they go.
    pub fn start(keyspace: &Keyspace) -> Self {
        Self::with(keyspace, FullLoad::default())
    }

    /// Starts the writers of a load.
    pub fn with(keyspace: &Keyspace, load: FullLoad) -> Self {
        let shared = Arc::new(Shared::default());
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            writers.spawn(write(writer, keyspace.clone(), load, Arc::clone(&shared)));
        }
        Self { load, shared, writers }
    }

    /// Returns the number of keys that were written so far.
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Relaxed)
    }

    /// Returns the number of batches that failed so far.
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Returns how long the longest batch took that was acknowledged since the last call.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.shared.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Waits until so many more keys were written.
    ///
    /// # Errors
    /// When that takes too long; the text has the first errors of the writers.
    pub async fn goes_on(&self, keys: u64) -> Result<()> {
        let aim = self.acked() + keys;
        until("the writers to go on", DEADLINE, async || (self.acked() >= aim).then_some(()))
            .await
            .with_context(|| format!("errors of the writers: {:?}", self.shared.errors.lock()))
    }

    /// Stops the writers, each after its batch in flight.
    pub async fn stop(self) -> FullWritten {
        self.shared.stop.store(true, Ordering::Relaxed);
        let rounds = self.writers.join_all().await;
        let errors = std::mem::take(&mut *self.shared.errors.lock());
        let failed = self.shared.failed.load(Ordering::Relaxed);
        FullWritten { load: self.load, rounds, failed, errors }
    }
}

impl FullWritten {
    /// Returns the number of writers that nothing was acknowledged to.
    pub fn idle(&self) -> usize {
        self.rounds.iter().filter(|rounds| rounds.acked == 0).count()
    }

    /// Reads all keys and counts those without their last acknowledged write.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn losses(&self, keyspace: &Keyspace) -> Result<FullLosses> {
        let mut losses = FullLosses::default();
        for rounds in &self.rounds {
            let keys = keys_of(rounds.writer);
            for (key, value) in keys.iter().zip(keyspace.get_many(&keys).await?) {
                losses.keys += 1;
                let bytes = value.map(|value| value.bytes());
                let verdict = verdict_of(rounds, self.load.value_bytes, bytes.as_deref());
                losses.lost += u64::from(verdict == Verdict::Lost);
                losses.strange += u64::from(verdict == Verdict::Strange);
                if verdict != Verdict::Kept && losses.first.is_none() {
                    losses.first = Some(format!("{key} holds {bytes:?}, after {rounds:?}"));
                }
            }
        }
        Ok(losses)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Kept,
    Lost,
    Strange,
}

/// Compares what a key holds with what its writer was promised, in values of so many bytes. A round
/// that was not acknowledged may have been written.
fn verdict_of(rounds: &Rounds, bytes: usize, value: Option<&[u8]>) -> Verdict {
    let Some(value) = value else {
        return if rounds.acked == 0 { Verdict::Kept } else { Verdict::Lost };
    };
    let text = std::str::from_utf8(value).ok().filter(|text| text.len() == bytes);
    match text.and_then(|text| text.parse::<u64>().ok()) {
        Some(round) if round == 0 || round > rounds.tried => Verdict::Strange,
        Some(round) if round < rounds.acked => Verdict::Lost,
        Some(_) => Verdict::Kept,
        None => Verdict::Strange,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_round_than_the_acknowledged_one_is_a_loss() {
        let rounds = Rounds { writer: 0, acked: 7, tried: 9 };
        let of = |round: u64| verdict_of(&rounds, 20, Some(value_of(round, 20).as_bytes()));
        assert_eq!(
            [of(6), of(7), of(9), of(10)].map(|verdict| verdict == Verdict::Kept),
            [false, true, true, false]
        );
        assert_eq!((of(6), of(10)), (Verdict::Lost, Verdict::Strange));
        assert_eq!(verdict_of(&rounds, 20, None), Verdict::Lost);
        assert_eq!(verdict_of(&rounds, 20, Some(b"else")), Verdict::Strange);
        let long = value_of(9, 30);
        assert_eq!(verdict_of(&rounds, 20, Some(long.as_bytes())), Verdict::Strange);
        let none = Rounds { writer: 0, acked: 0, tried: 1 };
        assert_eq!(verdict_of(&none, 20, None), Verdict::Kept);
    }

    #[tokio::test]
    async fn all_writers_together_write_at_the_rate_that_was_asked_for() {
        let at = |writes_per_s| FullLoad { writes_per_s, ..FullLoad::default() }.beats(3);
        let period = at(Some(96_000.0)).map(|beats| beats.period());
        assert_eq!(period, Some(Duration::from_millis(100)));
        assert!(at(None).is_none() && at(Some(0.0)).is_none());
    }

    #[test]
    fn all_keys_of_a_writer_move_and_none_is_another_ones() {
        let (one, other) = (keys_of(0), keys_of(1));
        assert_eq!((one.len(), other.len()), (BATCH, BATCH));
        assert!(one.iter().chain(&other).all(|key| moves(key)));
        assert!(one.iter().all(|key| !other.contains(key)));
    }
}
