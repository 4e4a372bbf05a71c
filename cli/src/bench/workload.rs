//! The operations of each workload: a pure function of a seed.
//!
//! The YCSB mixes are core workloads A to F (Cooper et al., "Benchmarking cloud serving systems
//! with YCSB", 2010): ranks by Zipf's law with a skew of 0.99, spread over the keys by a hash, so
//! that popular keys are not adjacent.
//!
//! Not here: executing the operations, on a cluster or on an embedded database.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::zipf::{YCSB_THETA, Zipf};
use crate::args::Workload;

/// Maximum rows of a scan; scans ask for 1 to this many, uniformly, as in YCSB.
pub(super) const SCAN_ROWS_MAX: usize = 100;
/// Prefix of all keys.
pub(super) const KEY_PREFIX: &str = "bench:";
/// Bytes of the pool that values are cut from.
const POOL_BYTES: usize = 1 << 20;

/// One operation; the number is that of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Read a key.
    Get(u64),
    /// Write a key, old or new.
    Put(u64),
    /// Read this many rows near a key.
    Scan(u64, usize),
    /// Read a key, then write it.
    Modify(u64),
}

/// The distribution that keys are chosen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Uniform,
    Popular,
    Latest,
}

/// Shares of the operations in percent; the remainder to 100 is gets.
#[derive(Debug, Clone, Copy)]
struct Mix {
    choice: Choice,
    update: u32,
    insert: u32,
    scan: u32,
    modify: u32,
}

fn mix(workload: Workload) -> Mix {
    let none = Mix { choice: Choice::Popular, update: 0, insert: 0, scan: 0, modify: 0 };
    match workload {
        Workload::Put => Mix { choice: Choice::Uniform, update: 100, ..none },
        Workload::Get => Mix { choice: Choice::Uniform, ..none },
        Workload::Mixed => Mix { choice: Choice::Uniform, update: 50, ..none },
        Workload::YcsbA => Mix { update: 50, ..none },
        Workload::YcsbB => Mix { update: 5, ..none },
        Workload::YcsbC => none,
        Workload::YcsbD => Mix { choice: Choice::Latest, insert: 5, ..none },
        Workload::YcsbE => Mix { insert: 5, scan: 95, ..none },
        Workload::YcsbF => Mix { modify: 50, ..none },
    }
}

/// Returns whether the workload expects the keys to exist.
pub(super) fn reads(workload: Workload) -> bool {
    mix(workload).update < 100
}

/// Number of keys, shared by all clients of a run: inserts raise it.
#[derive(Debug)]
pub(super) struct Population {
    keys: AtomicU64,
    /// The last keys, as many as there are clients, may still be in flight.
    clients: u64,
}

impl Population {
    /// Creates a population of `keys` existing keys, for `clients` inserting clients.
    pub(super) fn new(keys: u64, clients: u32) -> Arc<Population> {
        Arc::new(Population { keys: AtomicU64::new(keys), clients: clients.into() })
    }

    /// Returns the number of keys that may have been written.
    pub(super) fn all(&self) -> u64 {
        self.keys.load(Ordering::Relaxed)
    }

    fn insert(&self) -> u64 {
        self.keys.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the number of keys whose inserts have most likely ended, at least `least`.
    fn settled(&self, least: u64) -> u64 {
        self.keys.load(Ordering::Relaxed).saturating_sub(self.clients).max(least)
    }
}

/// Generator of the operations of one client.
#[derive(Debug)]
pub(super) struct Generator {
    mix: Mix,
    keys: u64,
    population: Arc<Population>,
    zipf: Zipf,
    rng: SmallRng,
}

impl Generator {
    /// Creates a generator; the same seed gives the same operations as long as no other client
    /// inserts.
    pub(super) fn new(
        workload: Workload,
        keys: u64,
        population: Arc<Population>,
        seed: u64,
    ) -> Generator {
        Generator {
            mix: mix(workload),
            keys,
            population,
            zipf: Zipf::new(keys.max(1), YCSB_THETA),
            rng: SmallRng::seed_from_u64(spread(seed)),
        }
    }

    /// Draws the next operation.
    pub(super) fn next_op(&mut self) -> Op {
        let Mix { update, insert, scan, modify, .. } = self.mix;
        let roll = self.rng.random_range(0..100u32);
        if roll < update {
            Op::Put(self.key())
        } else if roll < update + insert {
            Op::Put(self.population.insert())
        } else if roll < update + insert + scan {
            let key = self.key();
            Op::Scan(key, self.rng.random_range(1..=SCAN_ROWS_MAX))
        } else if roll < update + insert + scan + modify {
            Op::Modify(self.key())
        } else {
            Op::Get(self.key())
        }
    }

    /// Draws a number that selects a value.
    pub(super) fn random(&mut self) -> u64 {
        self.rng.random()
    }

    fn key(&mut self) -> u64 {
        match self.mix.choice {
            Choice::Uniform => self.rng.random_range(0..self.keys),
            Choice::Popular => spread(self.rank()) % self.keys,
            Choice::Latest => {
                let settled = self.population.settled(self.keys);
                // Rebuilt only when the population has grown noticeably: a rebuild computes several
                // powers.
                if settled > self.zipf.ranks() + self.zipf.ranks() / 1_000 {
                    self.zipf = Zipf::new(settled, YCSB_THETA);
                }
                settled.saturating_sub(self.rank())
            }
        }
    }

    fn rank(&mut self) -> u64 {
        let Generator { zipf, rng, .. } = self;
        zipf.rank(|| rng.random())
    }
}

/// Permutes the numbers without a visible pattern (the finalizer of SplitMix64).
pub(super) fn spread(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The key of a number: 16 bytes up to ten thousand million keys.
pub(super) fn key(number: u64) -> String {
    format!("{KEY_PREFIX}{number:010}")
}

/// Parses the number out of a key made by [`key`].
pub(super) fn number_of(key: &[u8]) -> Option<u64> {
    let number = std::str::from_utf8(key).ok()?.strip_prefix(KEY_PREFIX)?.parse().ok()?;
    (self::key(number).as_bytes() == key).then_some(number)
}

/// Returns the prefix of a hundred keys around this one.
pub(super) fn neighbourhood(number: u64) -> String {
    let mut prefix = key(number);
    prefix.truncate(prefix.len() - 2);
    prefix
}

/// Values of one size that do not compress, cut from one pool without copying.
#[derive(Debug, Clone)]
pub(super) struct Values {
    pool: Bytes,
    size: usize,
}

impl Values {
    /// Creates values of `size` bytes; the same seed gives the same values.
    pub(super) fn new(size: usize, seed: u64) -> Values {
        let mut rng = SmallRng::seed_from_u64(spread(seed));
        let mut pool = vec![0; POOL_BYTES + size];
        rng.fill(&mut pool[..]);
        Values { pool: pool.into(), size }
    }

    /// Returns one of about a million values; values of adjacent numbers do not overlap in the
    /// pool.
    pub(super) fn at(&self, number: u64) -> Bytes {
        let start = (spread(number) % POOL_BYTES as u64) as usize;
        self.pool.slice(start..start + self.size)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use super::*;

    const KEYS: u64 = 1_000;

    fn ops(workload: Workload, count: usize) -> Vec<Op> {
        let mut generator = Generator::new(workload, KEYS, Population::new(KEYS, 1), 7);
        (0..count).map(|_| generator.next_op()).collect()
    }

    /// Percent of gets, puts, scans, modifications.
    fn shares(workload: Workload) -> [usize; 4] {
        let ops = ops(workload, 10_000);
        let share =
            |wanted: fn(&Op) -> bool| ops.iter().filter(|op| wanted(op)).count().div_ceil(100);
        [
            share(|op| matches!(op, Op::Get(_))),
            share(|op| matches!(op, Op::Put(_))),
            share(|op| matches!(op, Op::Scan(..))),
            share(|op| matches!(op, Op::Modify(_))),
        ]
    }

    #[test]
    fn the_mixes_are_those_of_the_workloads() {
        for (workload, expected) in [
            (Workload::Put, [0, 100, 0, 0]),
            (Workload::Get, [100, 0, 0, 0]),
            (Workload::Mixed, [50, 50, 0, 0]),
            (Workload::YcsbA, [50, 50, 0, 0]),
            (Workload::YcsbB, [95, 5, 0, 0]),
            (Workload::YcsbC, [100, 0, 0, 0]),
            (Workload::YcsbD, [95, 5, 0, 0]),
            (Workload::YcsbE, [0, 5, 95, 0]),
            (Workload::YcsbF, [50, 0, 0, 50]),
        ] {
            for (found, expected) in shares(workload).into_iter().zip(expected) {
                assert!(
                    found.abs_diff(expected) <= 2,
                    "{workload:?}: {found} % instead of {expected} %"
                );
            }
        }
    }

    #[test]
    fn the_same_seed_does_the_same() {
        for workload in [Workload::Mixed, Workload::YcsbD, Workload::YcsbE] {
            assert_eq!(ops(workload, 500), ops(workload, 500));
        }
    }

    #[test]
    fn updates_stay_among_the_keys_and_inserts_continue_them() {
        for op in ops(Workload::YcsbA, 10_000) {
            assert!(matches!(op, Op::Get(key) | Op::Put(key) if key < KEYS), "{op:?}");
        }
        let inserted = ops(Workload::YcsbD, 10_000).into_iter().filter_map(|op| match op {
            Op::Put(key) => Some(key),
            _ => None,
        });
        for (index, key) in inserted.enumerate() {
            assert_eq!(key, KEYS + index as u64);
        }
    }

    #[test]
    fn few_keys_are_popular_and_the_latest_are_read_most() {
        let mut reads: HashMap<u64, u32> = HashMap::new();
        for op in ops(Workload::YcsbC, 10_000) {
            let Op::Get(key) = op else { panic!("{op:?}") };
            *reads.entry(key).or_default() += 1;
        }
        let mut counts: Vec<u32> = reads.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        assert!(counts[..10].iter().sum::<u32>() > 3_000, "{:?}", &counts[..10]);

        let mut next = KEYS;
        let mut recent = 0;
        for op in ops(Workload::YcsbD, 10_000) {
            match op {
                Op::Put(key) => next = key + 1,
                Op::Get(key) => {
                    assert!(key < next, "{key} is read before it is written");
                    recent += u32::from(next - key <= 20);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(recent > 3_000, "{recent}");
    }

    #[test]
    fn keys_sort_like_their_numbers_and_have_neighbours() {
        assert_eq!((key(7).as_str(), key(7).len()), ("bench:0000000007", 16));
        assert!(key(9) < key(10));
        assert_eq!(
            (number_of(key(7).as_bytes()), number_of(key(u64::MAX).as_bytes())),
            (Some(7), Some(u64::MAX))
        );
        for foreign in
            ["bench:7", "bench:000000000a", "bench:", "bench:+000000007", "other:0000000007"]
        {
            assert_eq!(number_of(foreign.as_bytes()), None, "{foreign}");
        }
        assert_eq!(neighbourhood(1_234), "bench:00000012");
        assert!(key(1_299).starts_with(&neighbourhood(1_234)));
    }

    #[test]
    fn values_have_their_size_and_differ() {
        let values = Values::new(100, 1);
        assert_eq!(values.at(u64::MAX).len(), 100);
        assert_ne!(values.at(1), values.at(2));
        assert_eq!(values.at(3), Values::new(100, 1).at(3));
        assert!(Values::new(0, 1).at(5).is_empty());
    }
}
