//! Counters that clients increment during a fault, and what became of the increments.
//!
//! **Invariant:** an increment that was refused is not counted: applied, it would be one too many.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use vasto_client::{ErrorKind, Keyspace};
use vasto_testkit::Numbers;

/// What the names of all counters begin with.
pub(crate) const COUNTER: &str = "counter:";
/// Counters that all clients share.
const COUNTERS: u64 = 20;

/// Increments of one counter: acknowledged, and of unknown outcome.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    acked: i64,
    unknown: i64,
}

/// Clients that increment counters until stopped.
#[derive(Debug)]
pub struct Counters {
    stop: Arc<AtomicBool>,
    counted: Arc<Mutex<BTreeMap<String, Counted>>>,
    tasks: JoinSet<()>,
}

/// Recorded increments.
#[derive(Debug, Clone)]
pub struct Increments(BTreeMap<String, Counted>);

/// What became of the increments, over all counters.
#[derive(Debug, Clone, Default)]
pub struct Compared {
    /// Acknowledged increments.
    pub acked: i64,
    /// Increments of unknown outcome.
    pub unknown: i64,
    /// Acknowledged increments that are missing.
    pub lost: i64,
    /// Increments that were applied twice, or although they were refused.
    pub over: i64,
    /// The counters that are wrong, with what they hold and what was promised.
    pub wrong: Vec<String>,
}

impl Counters {
    /// Starts the clients; each pauses between two increments.
    pub fn start(keyspace: &Keyspace, clients: u64, pace: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let counted = Arc::new(Mutex::new(BTreeMap::new()));
        let mut tasks = JoinSet::new();
        for client in 0..clients {
            let (stop, counted, keyspace) = (stop.clone(), counted.clone(), keyspace.clone());
            tasks.spawn(async move {
                let mut numbers = Numbers::new(client);
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("{COUNTER}{}", numbers.below(COUNTERS));
                    let outcome = keyspace.add_i64(key.as_str(), 1).await;
                    {
                        let mut counted = counted.lock();
                        let one: &mut Counted = counted.entry(key).or_default();
                        match outcome {
                            Ok(_) => one.acked += 1,
                            Err(error) if error.kind() == ErrorKind::Unknown => one.unknown += 1,
                            Err(_) => {}
                        }
                    }
                    if !pace.is_zero() {
                        tokio::time::sleep(pace).await;
                    }
                }
            });
        }
        Self { stop, counted, tasks }
    }

    /// Stops the clients, each after its increment in flight.
    ///
    /// # Errors
    /// When a client panicked.
    pub async fn stop(mut self) -> Result<Increments> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended?;
        }
        Ok(Increments(self.counted.lock().clone()))
    }
}

impl Increments {
    /// Compares the increments with what the counters hold.
    ///
    /// # Errors
    /// When a counter cannot be read.
    pub async fn compare(&self, keyspace: &Keyspace) -> Result<Compared> {
        let mut compared = Compared::default();
        for (key, one) in &self.0 {
            let value = keyspace.get(key.as_str()).await?;
            let holds = value.and_then(|value| value.as_i64()).unwrap_or(0);
            let (lost, over) =
                ((one.acked - holds).max(0), (holds - one.acked - one.unknown).max(0));
            compared.acked += one.acked;
            compared.unknown += one.unknown;
            compared.lost += lost;
            compared.over += over;
            if lost + over > 0 {
                compared.wrong.push(format!("{key} holds {holds}, promised was {one:?}"));
            }
        }
        Ok(compared)
    }
}
