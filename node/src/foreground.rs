//! How long requests take in this process: what background work must not change.
//!
//! Times are counted in buckets that only grow, so that every reader takes differences of its own;
//! to count one costs an atomic addition.
//!
//! **Invariants**
//! - A time counts when nothing but the machine has held the request up: not the seal of a resize,
//!   nor a transfer of leadership, a throttled writer, another replica, the bucket, a client that
//!   takes no replies, or an epoch that the node has not heard of.
//! - Scans do not count: how long one takes depends on what it asks for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vasto_core::catalog::Ack;

/// Buckets for each doubling of the time: a time is known to an eighth.
const PER_DOUBLING: usize = 8;
/// The longest time that is told apart, microseconds: 67 s.
const LONGEST_US: u64 = (1 << 26) - 1;
/// Number of buckets.
const BUCKETS: usize = 24 * PER_DOUBLING;
/// Number of classes.
pub(crate) const CLASSES: usize = 3;

/// The times of all requests of this process.
pub(crate) static FOREGROUND: Latencies = Latencies::new();

/// Requests that take about as long as each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Lookups.
    Reads,
    /// Writes that are answered before they are synced.
    Writes,
    /// Writes that are synced here; their time ends with that.
    SyncedWrites,
}

impl Class {
    pub(crate) const ALL: [Class; CLASSES] = [Class::Reads, Class::Writes, Class::SyncedWrites];

    /// Returns the class of a write.
    pub(crate) fn of_write(ack: Ack) -> Self {
        match ack {
            Ack::Os => Class::Writes,
            Ack::Fsync | Ack::Replica | Ack::Bucket => Class::SyncedWrites,
        }
    }

    /// Returns its name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Class::Reads => "reads",
            Class::Writes => "writes",
            Class::SyncedWrites => "synced_writes",
        }
    }
}

/// Counters of requests, by class and time.
pub(crate) struct Latencies([[AtomicU64; BUCKETS]; CLASSES]);

impl Latencies {
    pub(crate) const fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; BUCKETS] }; CLASSES])
    }

    /// Counts a request that has ended now, unless something else than the machine has held it up.
    pub(crate) fn note(&self, class: Class, begun: Option<Duration>, now: Duration) {
        if let Some(begun) = begun {
            let bucket = bucket_of(now.saturating_sub(begun));
            self.0[class as usize][bucket].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the counts so far, by class.
    pub(crate) fn counts(&self) -> [Counts; CLASSES] {
        Class::ALL.map(|class| {
            let counters = self.0[class as usize].iter();
            Counts(counters.map(|counter| counter.load(Ordering::Relaxed)).collect())
        })
    }
}

/// Numbers of requests, by time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counts(Vec<u64>);

impl Default for Counts {
    fn default() -> Self {
        Self(vec![0; BUCKETS])
    }
}

impl Counts {
    /// Returns the requests since an earlier count.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let pairs = self.0.iter().zip(&earlier.0);
        Self(pairs.map(|(now, before)| now.saturating_sub(*before)).collect())
    }

    /// Returns the requests of both counts.
    pub(crate) fn and(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(one, other)| one + other).collect())
    }

    /// Returns the number of requests.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Returns the number of requests that took longer for certain.
    pub(crate) fn above(&self, limit: Duration) -> u64 {
        self.0[bucket_of(limit) + 1..].iter().sum()
    }

    /// Returns the time that 99 of 100 requests do not exceed, an eighth too long at most; `None`
    /// without any.
    pub(crate) fn p99(&self) -> Option<Duration> {
        let total = self.total();
        let rank = (total > 0).then(|| total - total / 100)?;
        let mut passed = 0;
        let bucket = self.0.iter().position(|count| {
            passed += count;
            passed >= rank
        })?;
        Some(Duration::from_micros(end_of(bucket)))
    }
}

/// Returns the bucket of a time.
fn bucket_of(time: Duration) -> usize {
    let us = time.as_micros().min(u128::from(LONGEST_US)) as u64;
    if us < PER_DOUBLING as u64 {
        return us as usize;
    }
    let shift = us.ilog2() as usize - 3;
    shift * PER_DOUBLING + (us >> shift) as usize
}

/// Returns the longest time of a bucket, microseconds.
fn end_of(bucket: usize) -> u64 {
    if bucket < PER_DOUBLING {
        return bucket as u64;
    }
    let shift = bucket / PER_DOUBLING - 1;
    let first = (bucket % PER_DOUBLING + PER_DOUBLING) as u64;
    ((first + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    proptest! {
        #[test]
        fn every_time_is_in_the_bucket_that_ends_close_above_it(time in 0u64..=LONGEST_US) {
            let bucket = bucket_of(us(time));
            prop_assert!(bucket < BUCKETS);
            prop_assert!(time <= end_of(bucket) && end_of(bucket) <= time + time / 8);
            prop_assert!(bucket == 0 || end_of(bucket - 1) < time);
        }
    }

    #[test]
    fn a_reader_sees_what_was_counted_since_it_looked_last() {
        let latencies = Latencies::new();
        let note = |class, time: u64| latencies.note(class, Some(us(1_000)), us(1_000 + time));
        note(Class::Writes, 5);
        let [_, before, _] = latencies.counts();
        assert_eq!((before.total(), before.p99()), (1, Some(us(5))));
        (0..980).for_each(|_| note(Class::Writes, 100));
        (0..20).for_each(|_| note(Class::Writes, 50_000));
        note(Class::Reads, 70);
        latencies.note(Class::Writes, None, us(9));
        let [reads, writes, synced] = latencies.counts();
        assert_eq!((reads.total(), synced.total(), synced.p99()), (1, 0, None));
        let writes = writes.since(&before);
        assert_eq!(
            (writes.total(), writes.above(us(200)), writes.above(us(60_000))),
            (1_000, 20, 0)
        );
        assert!(writes.p99().unwrap() >= us(50_000));
        // 1 in 100 may take longer.
        (0..1_000).for_each(|_| note(Class::Writes, 100));
        let [_, writes, _] = latencies.counts();
        let writes = writes.since(&before);
        assert!(writes.p99().unwrap() < us(120), "{:?}", writes.p99());
        assert_eq!(Counts::default().since(&writes).total(), 0);
        assert_eq!(bucket_of(Duration::MAX), BUCKETS - 1);
        assert_eq!(Counts::default().above(Duration::MAX), 0);
    }
}
