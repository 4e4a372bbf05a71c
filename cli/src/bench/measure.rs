//! Measurement of a run: counts, latency percentiles, and the report.
//!
//! Invariant: an operation counts once, as done or as failed; latencies are of done operations
//! only. A client calls [`Run::begin`] before each operation, so that a run ends by itself.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;

use crate::output::{format_count, format_duration};

/// Significant figures of each recorded latency.
const FIGURES: u8 = 3;
/// The largest latency recorded; a greater latency counts as this. No operation has a deadline near
/// it.
const LATENCY_MAX: Duration = Duration::from_secs(3_600);
/// Recorders that clients share: enough to avoid lock contention, few enough that thousands of
/// clients need no memory for them.
const RECORDERS: usize = 32;

/// The end condition of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// After this number of operations was begun.
    Requests(u64),
    /// After this time has passed.
    Elapsed(Duration),
}

/// The outcome of an operation that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The key read exists, or the key was written.
    Yes,
    /// The key read does not exist.
    No,
}

/// A run: shared by all of its clients.
#[derive(Debug)]
pub(super) struct Run {
    started: Instant,
    until: Until,
    begun: AtomicU64,
    done: AtomicU64,
    stopped: AtomicBool,
    recorders: Vec<Mutex<Recorder>>,
}

#[derive(Debug)]
struct Recorder {
    nanoseconds: Histogram<u64>,
    errors: u64,
    not_found: u64,
    first_error: Option<String>,
}

impl Recorder {
    fn new() -> Recorder {
        let most = LATENCY_MAX.as_nanos() as u64;
        let nanoseconds =
            Histogram::new_with_max(most, FIGURES).expect("the constants make a histogram");
        Recorder { nanoseconds, errors: 0, not_found: 0, first_error: None }
    }

    fn add(&mut self, other: &Recorder) {
        self.nanoseconds.add(&other.nanoseconds).expect("all have the same bounds");
        self.errors += other.errors;
        self.not_found += other.not_found;
        if self.first_error.is_none() {
            self.first_error.clone_from(&other.first_error);
        }
    }
}

impl Run {
    /// Starts the clock of a run.
    pub(super) fn start(until: Until) -> Run {
        Run {
            started: Instant::now(),
            until,
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            recorders: (0..RECORDERS).map(|_| Mutex::new(Recorder::new())).collect(),
        }
    }

    /// Returns whether another operation may begin.
    pub(super) fn begin(&self) -> bool {
        if self.stopped.load(Ordering::Relaxed) {
            return false;
        }
        match self.until {
            Until::Requests(requests) => self.begun.fetch_add(1, Ordering::Relaxed) < requests,
            Until::Elapsed(limit) => self.started.elapsed() < limit,
        }
    }

    /// Ends the run: no further operation begins.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Records that an operation of this client was done.
    pub(super) fn record(&self, client: usize, latency: Duration, found: Found) {
        let mut recorder = self.recorders[client % RECORDERS].lock();
        recorder
            .nanoseconds
            .saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(1));
        recorder.not_found += u64::from(found == Found::No);
        drop(recorder);
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that an operation of this client failed; a hopeless failure ends the run.
    pub(super) fn fail(&self, client: usize, error: impl ToString, hopeless: bool) {
        let mut recorder = self.recorders[client % RECORDERS].lock();
        recorder.errors += 1;
        recorder.first_error.get_or_insert_with(|| error.to_string());
        drop(recorder);
        if hopeless {
            self.stop();
        }
    }

    /// Returns the number of operations done so far.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns the total number of operations, when it is known in advance.
    pub(super) fn total(&self) -> Option<u64> {
        match self.until {
            Until::Requests(requests) => Some(requests),
            Until::Elapsed(_) => None,
        }
    }

    /// Returns the figures, and the text of the first error.
    pub(super) fn finish(&self, elapsed: Duration) -> (Figures, Option<String>) {
        let mut all = Recorder::new();
        self.recorders.iter().for_each(|recorder| all.add(&recorder.lock()));
        let ops = all.nanoseconds.len();
        let seconds = elapsed.as_secs_f64();
        let at = |quantile: f64| micros(all.nanoseconds.value_at_quantile(quantile));
        let latency_us = Latency {
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            max: micros(all.nanoseconds.max()),
        };
        let ops_per_sec = (ops as f64 / seconds.max(1e-9)).round();
        let figures = Figures {
            ops,
            errors: all.errors,
            not_found: all.not_found,
            seconds: (seconds * 1e3).round() / 1e3,
            ops_per_sec,
            latency_us,
        };
        (figures, all.first_error)
    }

    /// Returns the time since the start.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

fn micros(nanoseconds: u64) -> f64 {
    (nanoseconds as f64 / 100.0).round() / 10.0
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Latency {
    p50: f64,
    p95: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// The measurements of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figures {
    /// Operations done, without failed ones.
    pub ops: u64,
    /// Operations that failed.
    pub errors: u64,
    seconds: f64,
    ops_per_sec: f64,
    latency_us: Latency,
    /// Reads of keys that did not exist; these count as done.
    not_found: u64,
}

/// The JSON of `vasto bench`: the fields that are a contract come first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    /// Name of the workload on the command line.
    pub workload: String,
    /// Number of concurrent clients.
    pub clients: u32,
    /// The measurements.
    #[serde(flatten)]
    pub figures: Figures,
    /// `cluster` or `embedded`.
    pub target: &'static str,
    /// The requested acknowledgement level; `null`: that of the keyspace.
    pub ack: Option<String>,
    /// Bytes of a value.
    pub value_size: usize,
    /// Distinct keys at the start.
    pub keys: u64,
}

impl Report {
    /// Formats the report for people.
    pub(super) fn text(&self) -> String {
        let Figures { ops, errors, seconds, ops_per_sec, latency_us, not_found } = self.figures;
        let time = |micros: f64| format_duration(Duration::from_nanos((micros * 1e3) as u64));
        let mut text = format!(
            "{workload}: {ops} operations in {seconds}, {rate}/s, {clients} clients\n\
             latency: p50 {p50}, p95 {p95}, p99 {p99}, p99.9 {p999}, max {max}\n",
            workload = self.workload,
            ops = format_count(ops),
            seconds = format_duration(Duration::from_secs_f64(seconds)),
            rate = format_count(ops_per_sec as u64),
            clients = self.clients,
            p50 = time(latency_us.p50),
            p95 = time(latency_us.p95),
            p99 = time(latency_us.p99),
            p999 = time(latency_us.p999),
            max = time(latency_us.max),
        );
        if not_found > 0 {
            text += &format!("{} reads found no key\n", format_count(not_found));
        }
        if errors > 0 {
            text += &format!("{} operations failed\n", format_count(errors));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn run_of_a_thousand() -> Run {
        let run = Run::start(Until::Requests(1_001));
        for micros in 1..=1_000u64 {
            assert!(run.begin());
            let found = if micros == 1 { Found::No } else { Found::Yes };
            run.record(micros as usize, Duration::from_micros(micros), found);
        }
        run.fail(3, "gone", false);
        run
    }

    fn report() -> Report {
        let (figures, first_error) = run_of_a_thousand().finish(Duration::from_millis(500));
        assert_eq!(first_error.as_deref(), Some("gone"));
        Report {
            workload: "put".to_owned(),
            clients: 16,
            figures,
            target: "cluster",
            ack: None,
            value_size: 100,
            keys: 1_000,
        }
    }

    #[test]
    fn the_json_is_that_of_the_contract() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["workload"], "put");
        assert_eq!(json["clients"], 16);
        assert_eq!(json["ops"], 1_000);
        assert_eq!(json["errors"], 1);
        assert_eq!(json["not_found"], 1);
        assert_eq!(json["seconds"], 0.5);
        assert_eq!(json["ops_per_sec"], 2_000.0);
        let names: Vec<&String> = json["latency_us"].as_object().unwrap().keys().collect();
        assert_eq!(names.len(), 5);
        for (name, micros) in
            [("p50", 500.0), ("p95", 950.0), ("p99", 990.0), ("p999", 999.0), ("max", 1_000.0)]
        {
            let found = json["latency_us"][name].as_f64().unwrap();
            assert!((found - micros).abs() <= micros * 0.002, "{name}: {found}");
        }
    }

    #[test]
    fn the_text_names_what_failed() {
        let text = report().text();
        for part in [
            "put: 1,000 operations in 500 ms, 2,000/s, 16 clients",
            "p50 500 µs",
            "1 operations failed",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }

    #[test]
    fn a_run_ends_by_number_by_time_and_by_a_hopeless_error() {
        let run = Run::start(Until::Requests(2));
        assert_eq!([run.begin(), run.begin(), run.begin()], [true, true, false]);
        assert!(!Run::start(Until::Elapsed(Duration::ZERO)).begin());
        let run = Run::start(Until::Elapsed(Duration::from_secs(3_600)));
        run.fail(0, "again", false);
        assert!(run.begin());
        run.fail(0, "no such keyspace", true);
        assert!(!run.begin());
        assert_eq!(run.finish(Duration::from_secs(1)).1.as_deref(), Some("again"));
    }

    #[test]
    fn nothing_done_is_no_division_by_zero() {
        let (figures, _) = Run::start(Until::Requests(1)).finish(Duration::ZERO);
        assert_eq!((figures.ops, figures.ops_per_sec, figures.latency_us.max), (0, 0.0, 0.0));
    }
}
