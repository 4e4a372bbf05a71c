//! The rates at which this process moved bytes lately: for the master's forecasts.
//!
//! **Invariant:** a rate counts the time in which any work of its kind was under way, so that work
//! side by side counts as what it moves together.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Fewer bytes say more of the requests than of the rate.
const BYTES_MIN: u64 = 1 << 20;
/// The part of a new measurement in the rate.
const NEW_PART: f64 = 0.5;

/// Downloads from the bucket.
pub(crate) static DOWNLOADS: Meter = Meter::new();
/// The rewriting of downloaded rows into tables of a target.
pub(crate) static REWRITES: Meter = Meter::new();
/// Exports: the reading of leaving rows, and their way into the bucket.
pub(crate) static EXPORTS: Meter = Meter::new();
/// Uploads of the files of checkpoints.
pub(crate) static UPLOADS: Meter = Meter::new();

/// Measures one kind of work.
pub(crate) struct Meter(Mutex<State>);

#[derive(Debug, Clone, Copy)]
struct State {
    /// Work under way, since when some has been, and what has ended since then.
    running: u32,
    since: Option<Instant>,
    bytes: u64,
    /// Bytes a second.
    rate: Option<f64>,
}

/// Work under way; what is dropped without an end moved nothing.
pub(crate) struct Work<'a> {
    meter: &'a Meter,
    bytes: u64,
}

impl Meter {
    const fn new() -> Self {
        Self(Mutex::new(State { running: 0, since: None, bytes: 0, rate: None }))
    }

    /// Begins some work.
    pub(crate) fn begin(&self) -> Work<'_> {
        let mut state = self.0.lock();
        state.running += 1;
        state.since.get_or_insert_with(Instant::now);
        Work { meter: self, bytes: 0 }
    }

    /// Returns the rate, bytes a second; 0 while nothing was measured.
    pub(crate) fn rate(&self) -> u64 {
        self.0.lock().rate.map_or(0, |rate| rate.round() as u64)
    }
}

impl Work<'_> {
    /// Ends the work, which has moved so many bytes.
    pub(crate) fn end(mut self, bytes: u64) {
        self.bytes = bytes;
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        let mut state = self.meter.0.lock();
        state.bytes += self.bytes;
        state.running -= 1;
        if state.running > 0 {
            return;
        }
        let took = state.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        let bytes = std::mem::take(&mut state.bytes);
        if bytes >= BYTES_MIN && !took.is_zero() {
            let now = bytes as f64 / took.as_secs_f64();
            let before = state.rate.unwrap_or(now);
            state.rate = Some(before + (now - before) * NEW_PART);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn work_side_by_side_counts_together_and_a_little_work_not_at_all() {
        let meter = Meter::new();
        let second = Duration::from_secs(1);
        let (one, two) = (meter.begin(), meter.begin());
        tokio::time::advance(second).await;
        one.end(10 * MIB);
        assert_eq!(meter.rate(), 0, "the other one goes on");
        tokio::time::advance(second).await;
        two.end(30 * MIB);
        assert_eq!(meter.rate(), 20 * MIB);
        let little = meter.begin();
        tokio::time::advance(second).await;
        little.end(MIB - 1);
        let given_up = meter.begin();
        tokio::time::advance(second).await;
        drop(given_up);
        assert_eq!(meter.rate(), 20 * MIB);
        let faster = meter.begin();
        tokio::time::advance(second).await;
        faster.end(40 * MIB);
        assert_eq!(meter.rate(), 30 * MIB);
    }
}
