//! Clients whose latency is measured while a cluster changes: puts and gets of a few small rows.
//!
//! Requests that are *paced* begin at times that were fixed before, and their latency counts from
//! then: a request that begins late because another one waits has waited, too. At saturation there is
//! no such schedule; a fixed number of clients send their next request as soon as the last one was
//! answered (*closed*).
//!
//! **Invariant:** paced requests wait for nothing of each other; beyond a number in flight that only a
//! stand-still of many seconds reaches, requests fail without being sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use vasto_client::{Batch, Keyspace};
use vasto_testkit::Numbers;

use super::phase::{Figures, Kind, Phase};
use super::table::note;
use super::values::Values;

/// Rows that clients work on.
const ROWS: u64 = 100_000;
/// Rows in a request: one request for many rows keeps the clients cheap.
const ROWS_IN_REQUEST: u64 = 10;
/// Bytes of a value.
const VALUE_BYTES: usize = 100;
/// Paced requests that may be in flight.
const IN_FLIGHT_MAX: u64 = 50_000;
/// Pause of a closed client after an error.
const AFTER_ERROR: Duration = Duration::from_millis(20);
/// Clients with which the peak is looked for.
const CLIENTS: [u64; 3] = [8, 32, 128];
/// Time before each of these measurements.
const WARM_UP: Duration = Duration::from_secs(2);

/// When requests begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Arrivals {
    /// Evenly spaced, so many a second.
    Paced(f64),
    /// So many clients, each with one request after the other.
    Closed(u64),
}

/// The most that the machine gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peak {
    pub(super) clients: u64,
    pub(super) requests_per_s: f64,
}

/// The running clients.
pub(super) struct Foreground {
    shared: Arc<Shared>,
    /// Closed clients, which end when this is dropped.
    _closed: JoinSet<()>,
}

struct Shared {
    keyspace: Keyspace,
    values: Values,
    stop: AtomicBool,
    phase: Mutex<Arc<Phase>>,
}

fn key(row: u64) -> String {
    format!("front{row:07}")
}

/// Writes the rows that clients work on.
///
/// # Errors
/// When a write fails.
pub(super) async fn fill(keyspace: &Keyspace, values: &Values) -> Result<()> {
    for first in (0..ROWS).step_by(1_000) {
        let batch = (first..first + 1_000)
            .fold(Batch::new(), |batch, row| batch.put(key(row), values.cut(row, VALUE_BYTES)));
        keyspace.write(batch).await?;
    }
    Ok(())
}

impl Shared {
    /// Notes that a request is due, in the phase that runs.
    fn begin(&self) -> Arc<Phase> {
        let phase = self.phase.lock();
        phase.begin();
        Arc::clone(&phase)
    }

    /// Executes the request of a number; returns the text of its error.
    async fn request(&self, number: u64) -> (Kind, Option<String>) {
        let mut numbers = Numbers::new(number);
        let kind = if numbers.below(2) == 0 { Kind::Put } else { Kind::Get };
        let rows: Vec<u64> = (0..ROWS_IN_REQUEST).map(|_| numbers.below(ROWS)).collect();
        let error = match kind {
            Kind::Put => {
                let put = |batch: Batch, row: &u64| {
                    batch.put(key(*row), self.values.cut(numbers.draw(), VALUE_BYTES))
                };
                let batch = rows.iter().fold(Batch::new(), put);
                self.keyspace.write(batch).await.err()
            }
            Kind::Get => self.keyspace.get_many(rows.into_iter().map(key)).await.err(),
        };
        (kind, error.map(|error| error.to_string()))
    }

    async fn run_closed(self: Arc<Self>, seed: u64) {
        let mut numbers = Numbers::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let (phase, due) = (self.begin(), Instant::now());
            let (kind, error) = self.request(numbers.draw()).await;
            let failed = error.is_some();
            phase.end(kind, due, error);
            if failed {
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
    }

    /// Begins requests at their times; on a thread of its own, since timers of the runtime are exact
    /// to a millisecond only.
    fn pace(self: &Arc<Self>, runtime: &Handle, per_second: f64, seed: u64) {
        let mut numbers = Numbers::new(seed);
        let began = Instant::now();
        let mut begun = 0u64;
        while !self.stop.load(Ordering::Relaxed) {
            let due = began + Duration::from_secs_f64(begun as f64 / per_second);
            let early = due.saturating_duration_since(Instant::now());
            if !early.is_zero() {
                std::thread::park_timeout(early);
                continue;
            }
            begun += 1;
            let (phase, number) = (self.begin(), numbers.draw());
            if phase.in_flight() > IN_FLIGHT_MAX {
                phase.end(Kind::Put, due, Some("too many requests wait".to_owned()));
                continue;
            }
            let this = Arc::clone(self);
            runtime.spawn(async move {
                let (kind, error) = this.request(number).await;
                phase.end(kind, due, error);
            });
        }
    }
}

impl Foreground {
    /// Starts the clients.
    pub(super) fn start(
        keyspace: &Keyspace,
        values: &Values,
        arrivals: Arrivals,
        seed: u64,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            keyspace: keyspace.clone(),
            values: values.clone(),
            stop: AtomicBool::new(false),
            phase: Mutex::new(Phase::start()),
        });
        let mut closed = JoinSet::new();
        match arrivals {
            Arrivals::Closed(clients) => {
                for client in 0..clients {
                    let seed = seed.wrapping_mul(1_000_003).wrapping_add(client);
                    closed.spawn(Arc::clone(&shared).run_closed(seed));
                }
            }
            Arrivals::Paced(per_second) => {
                let (shared, runtime) = (Arc::clone(&shared), Handle::current());
                // It ends within a moment once the clients are told to stop.
                std::thread::Builder::new()
                    .name("pacer".to_owned())
                    .spawn(move || shared.pace(&runtime, per_second, seed))?;
            }
        }
        Ok(Self { shared, _closed: closed })
    }

    /// Begins a phase; what begins from now on belongs to it.
    pub(super) fn begin(&self) -> Arc<Phase> {
        let phase = Phase::start();
        *self.shared.phase.lock() = Arc::clone(&phase);
        phase
    }

    /// Ends a phase; returns its figures once all of its requests were answered.
    ///
    /// # Errors
    /// When some are not answered in time.
    pub(super) async fn end(&self, phase: &Phase) -> Result<Figures> {
        let ended = Instant::now();
        self.begin();
        phase.figures(ended).await
    }

    /// Measures for a while.
    ///
    /// # Errors
    /// As of [`Self::end`].
    pub(super) async fn measure(&self, time: Duration) -> Result<Figures> {
        let phase = self.begin();
        tokio::time::sleep(time).await;
        self.end(&phase).await
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Finds the most requests a second that the cluster and its clients give on this machine.
///
/// # Errors
/// As of [`Foreground::end`]; when no request is answered at all.
pub(super) async fn peak(
    keyspace: &Keyspace,
    values: &Values,
    time: Duration,
    seed: u64,
) -> Result<Peak> {
    let mut best = Peak { clients: 0, requests_per_s: 0.0 };
    for clients in CLIENTS {
        let foreground = Foreground::start(keyspace, values, Arrivals::Closed(clients), seed)?;
        tokio::time::sleep(WARM_UP).await;
        let figures = foreground.measure(time).await?;
        let requests_per_s = figures.requests_per_s;
        note(&format!(
            "{clients} clients: {requests_per_s:.0} requests of {ROWS_IN_REQUEST} rows a second"
        ));
        if requests_per_s > best.requests_per_s {
            best = Peak { clients, requests_per_s };
        }
    }
    ensure!(best.clients > 0, "no request was answered: there is no load to measure at");
    Ok(best)
}
