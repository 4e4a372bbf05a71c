//! Clients that write and read while a fault is injected into the cluster.
//!
//! Each writer owns its keys and writes one at a time, so that the order of the writes of a key is
//! known: new keys, keys in partitions, and keys that it overwrites and deletes repeatedly. Readers
//! read the overwritten keys and check that no key ever goes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use vasto_client::{Batch, ErrorKind, Keyspace, Vasto};
use vasto_testkit::{DEADLINE, Numbers, until};

use crate::history::{History, is_delete, key_of, number_of, value_of};

/// The size of a load.
#[derive(Debug, Clone)]
pub struct LoadSpec {
    /// Prefix of the names of all keys of this load.
    pub name: String,
    /// Tasks that write.
    pub writers: usize,
    /// Tasks that read.
    pub readers: usize,
    /// Keys that each writer overwrites.
    pub overwritten: u64,
    /// Pause of every client between two operations; zero: as fast as the cluster allows.
    pub pace: Duration,
}

impl Default for LoadSpec {
    fn default() -> Self {
        Self { name: "l".to_owned(), writers: 8, readers: 2, overwritten: 40, pace: Duration::ZERO }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acks: Vec<AtomicU64>,
    reads: Vec<AtomicU64>,
    unknown: AtomicU64,
    refused: AtomicU64,
    read_errors: AtomicU64,
    stale_reads: AtomicU64,
    longest_write_us: AtomicU64,
    longest_read_us: AtomicU64,
    errors: Mutex<Vec<String>>,
    violations: Mutex<Vec<String>>,
}

/// Results of the clients.
#[derive(Debug, Clone, Default)]
pub struct LoadSummary {
    /// Acknowledged writes.
    pub acked: u64,
    /// Writes of unknown outcome.
    pub unknown: u64,
    /// Writes that were refused.
    pub refused: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// Reads that returned an older state than was acknowledged to another client when they began.
    pub stale_reads: u64,
    /// Duration of the longest write, since the last [`Load::reset_longest`].
    pub longest_write: Duration,
    /// Duration of the longest read, since the last [`Load::reset_longest`].
    pub longest_read: Duration,
    /// The first errors.
    pub errors: Vec<String>,
}

/// Running clients.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    history: Arc<History>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Starts the clients; writers and readers are separate clients, each with its own topology.
    ///
    /// # Errors
    /// When the cluster or the keyspace cannot be reached.
    pub async fn start(
        master: &str,
        keyspace: &str,
        history: &Arc<History>,
        spec: LoadSpec,
    ) -> Result<Self> {
        let counters = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared {
            acks: counters(spec.writers),
            reads: counters(spec.readers),
            ..Shared::default()
        });
        let mut tasks = JoinSet::new();
        let writing = Vasto::connect(master).await?.keyspace(keyspace).await?;
        let reading = Vasto::connect(master).await?.keyspace(keyspace).await?;
        for index in 0..spec.writers {
            tasks.spawn(write(
                index,
                spec.clone(),
                writing.clone(),
                Arc::clone(history),
                Arc::clone(&shared),
            ));
        }
        for index in 0..spec.readers {
            tasks.spawn(read(
                index,
                spec.clone(),
                reading.clone(),
                Arc::clone(history),
                Arc::clone(&shared),
            ));
        }
        Ok(Self { shared, history: Arc::clone(history), tasks })
    }

    /// Returns the history of the writers so far.
    pub fn history(&self) -> &Arc<History> {
        &self.history
    }

    /// Waits until every writer has had `writes` more acknowledgements and every reader as many
    /// more answers.
    ///
    /// # Errors
    /// When that takes too long: a client makes no progress.
    pub async fn goes_on(&self, writes: u64) -> Result<()> {
        let aim = |counters: &[AtomicU64]| -> Vec<u64> {
            counters.iter().map(|counter| counter.load(Ordering::Relaxed) + writes).collect()
        };
        let reached = |counters: &[AtomicU64], aims: &[u64]| {
            counters.iter().zip(aims).all(|(counter, aim)| counter.load(Ordering::Relaxed) >= *aim)
        };
        let (acks, reads) = (aim(&self.shared.acks), aim(&self.shared.reads));
        until("writes and reads to go on", DEADLINE, async || {
            (reached(&self.shared.acks, &acks) && reached(&self.shared.reads, &reads)).then_some(())
        })
        .await
        .with_context(|| format!("{:?}", self.summary()))
    }

    /// Waits for `count` more acknowledged writes, of any writer.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn acks(&self, count: u64) -> Result<()> {
        let aim = self.summary().acked + count;
        until("acknowledged writes", DEADLINE, async || (self.summary().acked >= aim).then_some(()))
            .await
            .with_context(|| format!("{:?}", self.summary()))
    }

    /// Resets the longest write and read.
    pub fn reset_longest(&self) {
        self.shared.longest_write_us.store(0, Ordering::Relaxed);
        self.shared.longest_read_us.store(0, Ordering::Relaxed);
    }

    /// Returns the results of the clients so far.
    pub fn summary(&self) -> LoadSummary {
        let shared = &*self.shared;
        let sum = |counters: &[AtomicU64]| {
            counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum()
        };
        LoadSummary {
            acked: sum(&shared.acks),
            unknown: shared.unknown.load(Ordering::Relaxed),
            refused: shared.refused.load(Ordering::Relaxed),
            reads: sum(&shared.reads),
            read_errors: shared.read_errors.load(Ordering::Relaxed),
            stale_reads: shared.stale_reads.load(Ordering::Relaxed),
            longest_write: Duration::from_micros(shared.longest_write_us.load(Ordering::Relaxed)),
            longest_read: Duration::from_micros(shared.longest_read_us.load(Ordering::Relaxed)),
            errors: shared.errors.lock().clone(),
        }
    }

    /// Stops as [`Load::stop`] does; returns the history too.
    ///
    /// # Errors
    /// As [`Load::stop`].
    pub async fn stop_with_history(self) -> Result<(LoadSummary, Arc<History>)> {
        let history = Arc::clone(&self.history);
        Ok((self.stop().await?, history))
    }

    /// Stops the clients, each after its operation in flight.
    ///
    /// # Errors
    /// When a reader saw a value that was never written, or a value that went back.
    pub async fn stop(mut self) -> Result<LoadSummary> {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.context("a client panicked")?;
        }
        let violations = self.shared.violations.lock();
        ensure!(violations.is_empty(), "readers saw what must not be:\n{}", violations.join("\n"));
        Ok(self.summary())
    }
}

impl Shared {
    fn note(list: &Mutex<Vec<String>>, text: String) {
        let mut list = list.lock();
        if list.len() < 20 {
            list.push(text);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn overwritten_key(spec: &LoadSpec, writer: usize, index: u64) -> String {
    format!("{}:o{writer}:{index}", spec.name)
}

async fn write(
    writer: usize,
    spec: LoadSpec,
    keyspace: Keyspace,
    history: Arc<History>,
    shared: Arc<Shared>,
) {
    let mut numbers = Numbers::new(writer as u64);
    for turn in 0u64.. {
        if shared.stopped() {
            return;
        }
        let name = match turn % 4 {
            0 => format!("{}:n{writer}:{turn}", spec.name),
            1 => format!("p{}{writer}.{}/{turn}", spec.name, turn % 50),
            _ => overwritten_key(&spec, writer, numbers.below(spec.overwritten)),
        };
        let number = history.begin(&name);
        let start = Instant::now();
        let outcome = if is_delete(number) {
            keyspace.delete(key_of(&name)).await
        } else {
            keyspace.put(key_of(&name), value_of(&name, number)).await
        };
        shared.longest_write_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        match outcome {
            Ok(_) => {
                history.acked(&name, number);
                shared.acks[writer].fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                if error.kind() == ErrorKind::Unknown {
                    shared.unknown.fetch_add(1, Ordering::Relaxed);
                } else {
                    history.refused(&name, number);
                    shared.refused.fetch_add(1, Ordering::Relaxed);
                }
                Shared::note(
                    &shared.errors,
                    format!("write of {name}: {:?}: {error}", error.kind()),
                );
            }
        }
        if !spec.pace.is_zero() {
            tokio::time::sleep(spec.pace).await;
        }
    }
}

async fn read(
    reader: usize,
    spec: LoadSpec,
    keyspace: Keyspace,
    history: Arc<History>,
    shared: Arc<Shared>,
) {
    let mut numbers = Numbers::new(1_000 + reader as u64);
    let mut last_seen: HashMap<String, u64> = HashMap::new();
    while !shared.stopped() {
        if !spec.pace.is_zero() {
            tokio::time::sleep(spec.pace).await;
        }
        let writer = numbers.below(spec.writers.max(1) as u64) as usize;
        let name = overwritten_key(&spec, writer, numbers.below(spec.overwritten));
        let promised = history.get(&name).acked;
        let start = Instant::now();
        let answer = keyspace.get(key_of(&name)).await;
        shared.longest_read_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        let value = match answer {
            Ok(value) => value,
            Err(error) => {
                shared.read_errors.fetch_add(1, Ordering::Relaxed);
                Shared::note(
                    &shared.errors,
                    format!("read of {name}: {:?}: {error}", error.kind()),
                );
                continue;
            }
        };
        shared.reads[reader].fetch_add(1, Ordering::Relaxed);
        let tried = history.get(&name).tried;
        let before = last_seen.get(&name).copied().unwrap_or_default();
        let Some(value) = value else {
            // Absent: before the first write, or after a delete that is not older than the value
            // seen last.
            if before > 0 && !(before..=tried).any(is_delete) {
                Shared::note(&shared.violations, format!("{name}: {before} was there and is gone"));
            }
            let deleted = (promised..=tried).any(|number| number == 0 || is_delete(number));
            shared.stale_reads.fetch_add(u64::from(!deleted), Ordering::Relaxed);
            continue;
        };
        match number_of(&name, &value.bytes()) {
            Some(number) if number < before => {
                Shared::note(
                    &shared.violations,
                    format!("{name}: went back from {before} to {number}"),
                );
            }
            Some(number) if number > tried || is_delete(number) => {
                Shared::note(
                    &shared.violations,
                    format!("{name}: holds {number}, which nobody wrote"),
                );
            }
            Some(number) => {
                shared.stale_reads.fetch_add(u64::from(number < promised), Ordering::Relaxed);
                last_seen.insert(name, number);
            }
            None => {
                Shared::note(
                    &shared.violations,
                    format!("{name}: holds {:?}, which nobody wrote", value.bytes()),
                );
            }
        }
    }
}

/// Writes `<prefix><0..count>` in batches, each key once.
///
/// # Errors
/// When a write fails.
pub async fn preload(
    keyspace: &Keyspace,
    history: &History,
    prefix: &str,
    count: u64,
) -> Result<()> {
    const BATCH: u64 = 500;
    let load = |first: u64| async move {
        let names: Vec<String> =
            (first..count.min(first + BATCH)).map(|index| format!("{prefix}{index:07}")).collect();
        let mut batch = Batch::new();
        let mut begun = Vec::with_capacity(names.len());
        for name in &names {
            let number = history.begin(name);
            batch = batch.put(key_of(name), value_of(name, number));
            begun.push(number);
        }
        keyspace.write(batch).await?;
        for (name, number) in names.iter().zip(begun) {
            history.acked(name, number);
        }
        anyhow::Ok(())
    };
    use futures::{StreamExt, TryStreamExt};
    futures::stream::iter((0..count).step_by(BATCH as usize))
        .map(load)
        .buffer_unordered(8)
        .try_collect()
        .await
}
