//! Latencies of the requests of one phase: of all of them, and of each short window.
//!
//! **Invariant:** a request belongs to the phase and to the window in which it was due, whenever it is
//! answered: one that waits is not missing where it hurt. The figures of a phase are read only once all
//! of its requests were answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;
use vasto_testkit::until;

/// Length of a window.
const WINDOW: Duration = Duration::from_millis(500);
/// The largest latency told apart, microseconds: no request has so much time.
const MICROS_MAX: u64 = 60_000_000;
/// Significant figures of the latencies of a phase, and of a window.
const FIGURES: (u8, u8) = (3, 2);
/// Time in which the last requests of a phase are answered: clients give up after 10 s.
const ANSWERED_WITHIN: Duration = Duration::from_secs(40);

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Put,
    Get,
}

/// A stretch of time whose requests are measured together.
#[derive(Debug)]
pub(super) struct Phase {
    began: Instant,
    in_flight: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    puts: Histogram<u64>,
    gets: Histogram<u64>,
    windows: Vec<Histogram<u32>>,
    errors: u64,
    first_error: Option<String>,
}

/// The figures of a phase.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) seconds: f64,
    pub(super) requests: u64,
    pub(super) requests_per_s: f64,
    pub(super) errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first_error: Option<String>,
    pub(super) puts: Percentiles,
    pub(super) gets: Percentiles,
    /// The p99 of all requests of each window, and its length, seconds.
    #[serde(skip)]
    pub(super) windows: Vec<WindowFigure>,
}

/// Latencies, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) p999_ms: f64,
    pub(super) max_ms: f64,
}

/// A window: the p99 of the requests that were due in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct WindowFigure {
    pub(super) p99_ms: f64,
    pub(super) seconds: f64,
}

impl Phase {
    pub(super) fn start() -> Arc<Self> {
        let whole = || histogram::<u64>(FIGURES.0);
        let seen = Seen {
            puts: whole(),
            gets: whole(),
            windows: Vec::new(),
            errors: 0,
            first_error: None,
        };
        Arc::new(Self {
            began: Instant::now(),
            in_flight: AtomicU64::new(0),
            seen: Mutex::new(seen),
        })
    }

    /// Notes that a request is due.
    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a request was answered, with the text of its error if it failed.
    pub(super) fn end(&self, kind: Kind, due: Instant, error: Option<String>) {
        let micros = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        let window = window_of(due.saturating_duration_since(self.began));
        let mut seen = self.seen.lock();
        match kind {
            Kind::Put => seen.puts.saturating_record(micros),
            Kind::Get => seen.gets.saturating_record(micros),
        }
        while seen.windows.len() <= window {
            seen.windows.push(histogram::<u32>(FIGURES.1));
        }
        seen.windows[window].saturating_record(micros);
        if let Some(error) = error {
            seen.errors += 1;
            seen.first_error.get_or_insert(error);
        }
        drop(seen);
        self.in_flight.fetch_sub(1, Ordering::Release);
    }

    /// Returns the number of requests that wait for their answer.
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Waits for the answers to all requests, none of which begins after `ended`.
    ///
    /// # Errors
    /// When some are not answered in time.
    pub(super) async fn figures(&self, ended: Instant) -> Result<Figures> {
        let answered = async || (self.in_flight() == 0).then_some(());
        until("the last requests to be answered", ANSWERED_WITHIN, answered).await?;
        Ok(self.figures_after(ended.saturating_duration_since(self.began)))
    }

    fn figures_after(&self, lasted: Duration) -> Figures {
        let seen = self.seen.lock();
        let requests = seen.puts.len() + seen.gets.len();
        let seconds = lasted.as_secs_f64();
        Figures {
            seconds,
            requests,
            requests_per_s: requests as f64 / seconds.max(1e-9),
            errors: seen.errors,
            first_error: seen.first_error.clone(),
            puts: percentiles(&seen.puts),
            gets: percentiles(&seen.gets),
            windows: windows(&seen.windows, lasted),
        }
    }
}

fn histogram<T: hdrhistogram::Counter>(figures: u8) -> Histogram<T> {
    Histogram::new_with_max(MICROS_MAX, figures).expect("the constants make a histogram")
}

fn window_of(after: Duration) -> usize {
    (after.as_micros() / WINDOW.as_micros()) as usize
}

fn percentiles(micros: &Histogram<u64>) -> Percentiles {
    let at = |quantile: f64| micros.value_at_quantile(quantile) as f64 / 1_000.0;
    Percentiles {
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        p999_ms: at(0.999),
        max_ms: micros.max() as f64 / 1_000.0,
    }
}

/// Returns the figure of each window. A window in which nothing was due is like the one before: all
/// clients of a closed loop were waiting then.
fn windows(seen: &[Histogram<u32>], lasted: Duration) -> Vec<WindowFigure> {
    let mut figures = Vec::new();
    let (mut left, mut p99_ms, mut at) = (lasted, 0.0, 0);
    while !left.is_zero() {
        let length = left.min(WINDOW);
        if let Some(micros) = seen.get(at).filter(|micros| !micros.is_empty()) {
            p99_ms = micros.value_at_quantile(0.99) as f64 / 1_000.0;
        }
        figures.push(WindowFigure { p99_ms, seconds: length.as_secs_f64() });
        left -= length;
        at += 1;
    }
    figures
}

/// Returns the mean of the windows' p99, milliseconds.
pub(super) fn mean_p99_ms(windows: &[WindowFigure]) -> f64 {
    let seconds: f64 = windows.iter().map(|window| window.seconds).sum();
    let sum: f64 = windows.iter().map(|window| window.p99_ms * window.seconds).sum();
    if seconds > 0.0 { sum / seconds } else { 0.0 }
}

/// Returns the excess latency integral over these windows, milliseconds times seconds: by how much
/// the p99 of each window exceeds what it is in calm, times its length. Windows below count against
/// it, so that a calm phase has none on average.
pub(super) fn excess_ms_s(windows: &[WindowFigure], calm_ms: f64) -> f64 {
    windows.iter().map(|window| (window.p99_ms - calm_ms) * window.seconds).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_in_the_window_in_which_it_was_due() {
        let phase = Phase::start();
        for after in [10, 20, 1_200] {
            phase.begin();
            let due = phase.began + Duration::from_millis(after);
            phase.end(if after == 20 { Kind::Put } else { Kind::Get }, due, None);
        }
        let figures = phase.figures_after(Duration::from_millis(1_250));
        assert_eq!((figures.requests, figures.errors, phase.in_flight()), (3, 0, 0));
        let lengths: Vec<f64> = figures.windows.iter().map(|window| window.seconds).collect();
        assert_eq!(lengths, [0.5, 0.5, 0.25]);
        assert_eq!(figures.windows[1].p99_ms, figures.windows[0].p99_ms, "nothing was due in it");
    }

    #[test]
    fn an_error_has_a_latency_too() {
        let phase = Phase::start();
        phase.begin();
        phase.end(Kind::Put, phase.began, Some("gone".to_owned()));
        let figures = phase.figures_after(Duration::from_secs(1));
        assert_eq!((figures.requests, figures.errors), (1, 1));
        assert_eq!(figures.first_error.as_deref(), Some("gone"));
    }

    #[test]
    fn the_excess_of_calm_is_nothing_and_that_of_a_second_100_ms_longer_is_100() {
        let window = |p99_ms: f64, seconds: f64| WindowFigure { p99_ms, seconds };
        let calm = [window(1.0, 0.5), window(3.0, 0.5)];
        assert_eq!(mean_p99_ms(&calm), 2.0);
        assert_eq!(excess_ms_s(&calm, 2.0), 0.0);
        let during = [window(102.0, 0.5), window(102.0, 0.5), window(2.0, 7.0)];
        assert_eq!(excess_ms_s(&during, 2.0), 100.0);
        assert_eq!(mean_p99_ms(&[]), 0.0);
    }

    #[test]
    fn percentiles_are_those_of_the_latencies() {
        let mut micros = histogram::<u64>(FIGURES.0);
        (1..=1_000u64).for_each(|ms| micros.saturating_record(ms * 1_000));
        let found = percentiles(&micros);
        for (figure, wanted) in
            [(found.p50_ms, 500.0), (found.p99_ms, 990.0), (found.p999_ms, 999.0)]
        {
            assert!((figure - wanted).abs() <= wanted * 0.002, "{found:?}");
        }
    }
}
