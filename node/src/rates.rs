//! The rates at which this process moved bytes lately: for the master's forecasts.
//!
//! **Invariant:** a rate counts the time in which any work of its kind was under way, so that work
//! side by side counts as what it moves together, and a measurement counts by its bytes: a small one
//! says more of the requests than of the rate. Work that a pause or a bound of its plan held up says
//! nothing of the node, and counts as none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Fewer bytes say more of the requests than of the rate.
const BYTES_MIN: u64 = 1 << 20;
/// Bytes after which what was measured before counts half: the newest large transfer decides.
const REMEMBERED: f64 = (256 << 20) as f64;
/// Fewer bytes than this in all are no rate yet: what is assumed without one is nearer.
const BYTES_KNOWN: f64 = (8 << 20) as f64;

/// Downloads from the bucket.
pub(crate) static DOWNLOADS: Meter = Meter::new();
/// The rewriting of downloaded rows into tables of a target.
pub(crate) static REWRITES: Meter = Meter::new();
/// Exports: the reading of leaving rows, and their way into the bucket.
pub(crate) static EXPORTS: Meter = Meter::new();
/// Uploads of the files of checkpoints.
pub(crate) static UPLOADS: Meter = Meter::new();

/// How often a plan's pause, or the bound of its rate, held work up.
static HELD_UP: AtomicU64 = AtomicU64::new(0);

/// Notes that a plan's pause, or the bound of its rate, holds work up.
pub(crate) fn held_up() {
    HELD_UP.fetch_add(1, Ordering::Relaxed);
}

/// Measures one kind of work.
pub(crate) struct Meter(Mutex<State>);

#[derive(Debug, Clone, Copy)]
struct State {
    /// Work under way, since when some has been, and what has ended since then.
    running: u32,
    since: Option<Instant>,
    bytes: u64,
    /// Some of it failed or was held up, so that its time says nothing.
    spoiled: bool,
    /// Bytes that were measured, and the seconds that they took; less of both the longer ago.
    moved: f64,
    took: f64,
}

/// Work under way; what is dropped without an end moved nothing.
pub(crate) struct Work<'a> {
    meter: &'a Meter,
    /// `None` until it has ended without being held up.
    bytes: Option<u64>,
    /// How often work had been held up when this began.
    held_up: u64,
}

impl State {
    const NEW: Self =
        Self { running: 0, since: None, bytes: 0, spoiled: false, moved: 0.0, took: 0.0 };

    fn begin(&mut self, now: Instant) {
        self.running += 1;
        self.since.get_or_insert(now);
    }

    fn end(&mut self, bytes: Option<u64>, now: Instant) {
        self.bytes += bytes.unwrap_or_default();
        self.spoiled |= bytes.is_none();
        self.running -= 1;
        if self.running > 0 {
            return;
        }
        let took = self.since.take().map_or(Duration::ZERO, |since| now - since);
        let bytes = std::mem::take(&mut self.bytes);
        let spoiled = std::mem::take(&mut self.spoiled);
        if bytes >= BYTES_MIN && !took.is_zero() && !spoiled {
            let kept = 0.5f64.powf(bytes as f64 / REMEMBERED);
            self.moved = self.moved * kept + bytes as f64;
            self.took = self.took * kept + took.as_secs_f64();
        }
    }

    /// Returns the rate, bytes a second; `None` while too little was measured.
    fn rate(&self) -> Option<f64> {
        (self.moved >= BYTES_KNOWN).then(|| self.moved / self.took)
    }
}

impl Meter {
    const fn new() -> Self {
        Self(Mutex::new(State::NEW))
    }

    /// Begins some work.
    pub(crate) fn begin(&self) -> Work<'_> {
        self.0.lock().begin(Instant::now());
        Work { meter: self, bytes: None, held_up: HELD_UP.load(Ordering::Relaxed) }
    }

    /// Returns the rate, bytes a second; 0 while nothing was measured.
    pub(crate) fn rate(&self) -> u64 {
        self.0.lock().rate().map_or(0, |rate| rate.round() as u64)
    }
}

impl Work<'_> {
    /// Ends the work, which has moved so many bytes.
    pub(crate) fn end(mut self, bytes: u64) {
        if HELD_UP.load(Ordering::Relaxed) == self.held_up {
            self.bytes = Some(bytes);
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.meter.0.lock().end(self.bytes, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn work_side_by_side_counts_together_and_a_little_work_not_at_all() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut state = State::NEW;
        let rate = |state: &State| state.rate().map(|rate| rate as u64 / MIB);
        state.begin(at(0));
        state.begin(at(0));
        state.end(Some(10 * MIB), at(1));
        assert_eq!(rate(&state), None, "the other one goes on");
        state.end(Some(30 * MIB), at(2));
        assert_eq!(rate(&state), Some(20));
        for bytes in [MIB - 1, 0] {
            state.begin(at(3));
            state.end(Some(bytes), at(4));
        }
        assert_eq!(rate(&state), Some(20));
        // As much as is remembered, three times as fast.
        state.begin(at(5));
        state.end(Some(60 * MIB), at(6));
        assert!(matches!(rate(&state), Some(30..=34)), "{:?}", rate(&state));
    }

    #[test]
    fn a_small_transfer_is_no_rate_and_hardly_changes_that_of_a_large_one() {
        let began = Instant::now();
        let mut state = State::NEW;
        let mut at = began;
        let mut measure = |state: &mut State, mib: u64, ms: u64| {
            state.begin(at);
            at += Duration::from_millis(ms);
            state.end(Some(mib * MIB), at);
            state.rate().map(|rate| (rate / MIB as f64).round() as u64)
        };
        // Requests of 100 ms each, whatever they carry.
        assert_eq!(measure(&mut state, 2, 100), None);
        assert_eq!(measure(&mut state, 2, 100), None);
        let large = measure(&mut state, 1_024, 5_120);
        assert!(matches!(large, Some(198..=200)), "{large:?}");
        let after = measure(&mut state, 2, 100);
        assert!(matches!(after, Some(195..=200)), "{after:?}");
        // The next large one is all that counts.
        let slow = measure(&mut state, 2_048, 20_480);
        assert!(matches!(slow, Some(100)), "{slow:?}");
    }

    #[test]
    fn work_that_was_held_up_measures_nothing() {
        let meter = Meter::new();
        let work = meter.begin();
        held_up();
        work.end(64 * MIB);
        assert_eq!((meter.rate(), meter.0.lock().running), (0, 0));
    }

    #[test]
    fn the_time_of_work_that_was_held_up_counts_for_nobody_beside_it() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut state = State::NEW;
        state.begin(at(0));
        state.begin(at(1));
        state.end(Some(100 * MIB), at(2));
        state.end(None, at(3_600));
        assert_eq!((state.rate(), state.bytes), (None, 0));
        state.begin(at(4_000));
        state.end(Some(100 * MIB), at(4_001));
        assert_eq!(state.rate(), Some((100 * MIB) as f64));
    }

    #[test]
    fn work_that_is_given_up_moves_nothing() {
        let meter = Meter::new();
        drop(meter.begin());
        meter.begin().end(0);
        assert_eq!((meter.rate(), meter.0.lock().running), (0, 0));
    }
}
