//! Rows of a cell that are there before its change, and are deleted one by one while it runs.
//!
//! **Invariant:** a row is deleted once, and never written again: whoever finds it later has
//! undone the delete.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use vasto_client::{ErrorKind, Keyspace};
use vasto_tests::put_all;

use super::fault::Lasting;

/// What the names of all such rows begin with.
pub(super) const PREFIX: &str = "x:";
const ROWS: u64 = 400;

/// What became of a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    Acknowledged,
    Refused,
    Unknown,
}

/// A client that deletes such rows.
pub(super) struct Deletes {
    prefix: String,
    stop: Arc<AtomicBool>,
    /// The deletes so far; row `n` by the one at `n`.
    tried: Arc<Mutex<Vec<Tried>>>,
    task: JoinHandle<()>,
}

impl Deletes {
    /// Writes the rows, and begins to delete them.
    pub(super) async fn start(keyspace: &Keyspace, cell: u64, lasting: Lasting) -> Result<Self> {
        let prefix = format!("{PREFIX}{cell}:");
        put_all(keyspace, &prefix, ROWS).await?;
        let pace = match lasting {
            Lasting::Short => Duration::from_millis(30),
            Lasting::Long => Duration::from_millis(120),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let tried = Arc::new(Mutex::new(Vec::new()));
        let (of_task, told) = (stop.clone(), tried.clone());
        let all = delete_all(keyspace.clone(), prefix.clone(), of_task, told, pace);
        let task = tokio::spawn(all);
        Ok(Self { prefix, stop, tried, task })
    }

    /// Returns the rows whose deletes were acknowledged so far.
    pub(super) fn acknowledged(&self) -> Vec<String> {
        let tried = self.tried.lock();
        let acknowledged = tried.iter().enumerate().filter(|(_, one)| **one == Tried::Acknowledged);
        acknowledged.map(|(n, _)| format!("{}{n}", self.prefix)).collect()
    }

    /// Stops the client after its delete in flight.
    pub(super) async fn stop(self) -> Result<Deleted> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.context("the client that deletes panicked")?;
        let tried = self.tried.lock().clone();
        Ok(Deleted { prefix: self.prefix, tried })
    }
}

async fn delete_all(
    keyspace: Keyspace,
    prefix: String,
    stop: Arc<AtomicBool>,
    tried: Arc<Mutex<Vec<Tried>>>,
    pace: Duration,
) {
    for n in 0..ROWS {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let outcome = match keyspace.delete(format!("{prefix}{n}")).await {
            Ok(_) => Tried::Acknowledged,
            Err(error) if error.kind() == ErrorKind::Unknown => Tried::Unknown,
            Err(_) => Tried::Refused,
        };
        tried.lock().push(outcome);
        tokio::time::sleep(pace).await;
    }
}

/// The deletes of a cell.
pub(super) struct Deleted {
    prefix: String,
    tried: Vec<Tried>,
}

impl Deleted {
    /// Checks that each row is there or gone as promised, by a get and by a scan; returns the number
    /// of acknowledged deletes, which is not 0.
    pub(super) async fn is_kept(&self, keyspace: &Keyspace) -> Result<usize> {
        let names: Vec<String> = (0..ROWS).map(|n| format!("{}{n}", self.prefix)).collect();
        let found = keyspace.get_many(&names).await?;
        for ((n, name), value) in names.iter().enumerate().zip(&found) {
            let tried = self.tried.get(n);
            let is_right = match tried {
                Some(Tried::Acknowledged) => value.is_none(),
                Some(Tried::Unknown) => true,
                Some(Tried::Refused) | None => value.is_some(),
            };
            ensure!(is_right, "{name} is {value:?}, and its delete was {tried:?}");
        }
        let there = found.iter().flatten().count();
        let scan = keyspace.scan().prefix(&self.prefix).keys_only().stream();
        let scanned = scan.count().await;
        ensure!(scanned == there, "a scan of {} gives {scanned} rows, gets {there}", self.prefix);
        let acknowledged = self.tried.iter().filter(|one| **one == Tried::Acknowledged).count();
        ensure!(acknowledged > 0, "no delete was acknowledged: {:?}", self.tried);
        Ok(acknowledged)
    }
}
