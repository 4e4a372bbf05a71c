//! Convergence: replicas that apply the same writes in any order, any number of times, by any path,
//! hold the same bytes, whatever the clocks of the accepting replicas said.
//!
//! A history is a few origins that accept writes (with clocks off by up to an hour), each with its
//! own log; records travel directly and through third replicas, late and repeatedly, in the order
//! of each origin. 100,000 histories are tried; a failure names its seed.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use vasto_core::clock::HybridClock;
use vasto_core::entry::{Entry, Payload};
use vasto_core::ids::{Incarnation, Origin, OwnSeq, ReplicaId, Vector, covers};
use vasto_core::merge::{is_collected, supersedes};

const HISTORIES: u64 = 100_000;
const START_US: u64 = 1_700_000_000_000_000;
const HOUR_US: u64 = 3_600_000_000;

/// splitmix64.
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}

#[derive(Clone)]
struct Record {
    origin: Origin,
    own_seq: OwnSeq,
    key: u8,
    entry: Vec<u8>,
}

struct Replica {
    origin: Origin,
    skew_us: u64,
    clock: HybridClock,
    last_commit: u64,
    rows: BTreeMap<u8, Vec<u8>>,
    vector: Vector,
    log: Vec<Record>,
}

/// Decides which of two entries wins: the merge rule, or the planted bug.
type Rule = fn(Option<&[u8]>, &[u8]) -> bool;

fn the_rule(stored: Option<&[u8]>, incoming: &[u8]) -> bool {
    supersedes(0, stored, incoming)
}

/// Lets the later arrival win when event times are equal.
fn by_arrival(stored: Option<&[u8]>, incoming: &[u8]) -> bool {
    stored.is_none_or(|stored| incoming[..8] >= stored[..8])
}

impl Replica {
    fn new(id: u64, skew_us: u64) -> Self {
        let origin = Origin { replica: ReplicaId(id), incarnation: Incarnation(1) };
        Self {
            origin,
            skew_us,
            clock: HybridClock::starting_after(0),
            last_commit: 0,
            rows: BTreeMap::new(),
            vector: Vector::new(),
            log: Vec::new(),
        }
    }

    fn accept(&mut self, numbers: &mut Numbers, now_us: u64, rule: Rule) {
        let now_us = now_us + self.skew_us;
        let key = numbers.below(4) as u8;
        // Some callers set an event time of their own, and some of these are equal.
        let event_time = match numbers.below(4) {
            0 => START_US + numbers.below(4),
            _ => {
                let standing = self
                    .rows
                    .get(&key)
                    .and_then(|row| Entry::decode(row).ok())
                    .map_or(0, |row| row.event_time);
                self.clock.stamp(now_us).max(standing + 1)
            }
        };
        self.last_commit = self.last_commit.max(now_us) + 1;
        let bytes = [numbers.below(3) as u8];
        let payload = (numbers.below(3) > 0).then_some(Payload::Bytes(&bytes));
        let expires_at =
            (payload.is_some() && numbers.below(4) == 0).then(|| now_us + numbers.below(HOUR_US));
        let commit_time = (payload.is_none() || expires_at.is_some()).then_some(self.last_commit);
        let entry =
            Entry { event_time, expires_at, partition_hash: None, commit_time, payload }.encode();
        let own_seq = OwnSeq(self.vector.get(&self.origin).map_or(0, |seq| seq.0) + 1);
        self.take(Record { origin: self.origin, own_seq, key, entry }, rule);
    }

    /// Applies a record as a follower does: in order, each once, logged again for others.
    fn take(&mut self, record: Record, rule: Rule) {
        let have = self.vector.get(&record.origin).copied().unwrap_or_default();
        if record.own_seq <= have {
            return;
        }
        assert_eq!(record.own_seq.0, have.0 + 1, "a gap");
        self.vector.insert(record.origin, record.own_seq);
        if rule(self.rows.get(&record.key).map(Vec::as_slice), &record.entry) {
            self.rows.insert(record.key, record.entry.clone());
        }
        self.log.push(record);
    }
}

/// Runs one history to its end; returns the replicas' rows.
fn history(seed: u64, rule: Rule) -> Vec<BTreeMap<u8, Vec<u8>>> {
    let mut numbers = Numbers(seed);
    let count = 2 + numbers.below(3) as usize;
    let mut replicas: Vec<Replica> =
        (0..count).map(|id| Replica::new(id as u64 + 1, numbers.below(2 * HOUR_US))).collect();
    // Positions up to which each replica has read each other's log; a cursor may fall back, which
    // repeats records.
    let mut cursors = vec![vec![0usize; count]; count];
    let mut now_us = START_US;
    for _ in 0..(8 + numbers.below(24)) {
        now_us += numbers.below(1_000_000);
        let one = numbers.below(count as u64) as usize;
        if numbers.below(2) == 0 {
            replicas[one].accept(&mut numbers, now_us, rule);
        } else {
            pull(&mut replicas, &mut cursors, &mut numbers, one, None, rule);
        }
    }
    // The network heals: every replica reads everything.
    for _ in 0..count {
        for one in 0..count {
            pull(&mut replicas, &mut cursors, &mut numbers, one, Some(usize::MAX), rule);
        }
    }
    for one in &replicas {
        assert!(
            covers(&one.vector, &replicas[0].vector) && covers(&replicas[0].vector, &one.vector),
            "seed {seed}"
        );
    }
    replicas.into_iter().map(|replica| replica.rows).collect()
}

fn pull(
    replicas: &mut [Replica],
    cursors: &mut [Vec<usize>],
    numbers: &mut Numbers,
    follower: usize,
    most: Option<usize>,
    rule: Rule,
) {
    for source in 0..replicas.len() {
        if source == follower || (most.is_none() && numbers.below(2) == 0) {
            continue;
        }
        let cursor = &mut cursors[follower][source];
        *cursor -= (numbers.below(3) as usize).min(*cursor);
        let most = most.unwrap_or_else(|| numbers.below(4) as usize);
        let records: Vec<Record> =
            replicas[source].log.iter().skip(*cursor).take(most).cloned().collect();
        *cursor += records.len();
        for record in records {
            replicas[follower].take(record, rule);
        }
    }
}

fn differ(rows: &[BTreeMap<u8, Vec<u8>>]) -> bool {
    rows.iter().any(|one| *one != rows[0])
}

/// Hazards 15, 16, 19: one rule on every path, a total order without a clock, skew without harm.
#[test]
fn a_hundred_thousand_histories_converge_byte_for_byte() {
    for seed in 0..HISTORIES {
        let rows = history(seed, the_rule);
        assert!(!differ(&rows), "seed {seed}: {rows:?}");
        // The same above any floor that all replicas have reached.
        let floor = START_US + seed % (2 * HOUR_US);
        let above = |rows: &BTreeMap<u8, Vec<u8>>| -> BTreeMap<u8, Vec<u8>> {
            rows.iter()
                .filter(|(_, row)| !is_collected(row, floor))
                .map(|(key, row)| (*key, row.clone()))
                .collect()
        };
        assert!(rows.iter().all(|one| above(one) == above(&rows[0])), "seed {seed}");
    }
}

/// The histories are hard enough to catch a rule that is only almost right.
#[test]
fn a_tie_that_is_won_by_arrival_is_noticed() {
    let noticed = (0..2_000).filter(|seed| differ(&history(*seed, by_arrival))).count();
    assert!(noticed > 20, "only {noticed} of 2,000 histories noticed the planted bug");
}
