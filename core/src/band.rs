//! Bands: the one byte in front of a stored key that says when the key leaves its shard.
//!
//! `band = quantize(next_jump)`: exact for 1..=63, then eight bands an octave up to 1024, then
//! [1024, 2048), [2048, 4096) and one last band for everything from 4096 on, which can never move.
//!
//! **Invariant:** the numbers are persisted in every SST: never change them. For two legal shard
//! counts `m < n` the keys that leave a shard are exactly those in the bands [`Band::leaving`]
//! names, and no band holds both leaving and staying keys.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::hash::next_jump_from;
use crate::ids::ShardId;

/// Quantized next jump, `1..=98`. Persisted: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Band(pub u8);

/// Number of bands: `Band(1)..=Band(98)`.
pub const BANDS: usize = 98;

/// Greatest shard count of a keyspace.
pub const SHARDS_MAX: u32 = 4096;

impl Band {
    /// The first band.
    pub const FIRST: Band = Band(1);
    /// The band whose keys never move.
    pub const LAST: Band = Band(98);

    /// Returns the band of a next jump (which is at least 1).
    pub fn of_next_jump(next: u64) -> Band {
        match next {
            0..=63 => Band(next.max(1) as u8),
            64..=1023 => {
                let octave = next.ilog2() - 6; // 0 for [64, 128)
                let within = (next >> (octave + 3)) - 8; // eighths of the octave
                Band(64 + octave as u8 * 8 + within as u8)
            }
            1024..=2047 => Band(96),
            2048..=4095 => Band(97),
            _ => Band(98),
        }
    }

    /// Returns the smallest next jump in this band.
    pub fn low_edge(self) -> u32 {
        match self.0 {
            0..=63 => u32::from(self.0),
            64..=95 => {
                let octave = u32::from((self.0 - 64) / 8);
                let within = u32::from((self.0 - 64) % 8);
                (8 + within) << (octave + 3)
            }
            96 => 1024,
            97 => 2048,
            _ => 4096,
        }
    }

    /// Returns the band of a key inside `shard`, or `None` when the key can never be stored there.
    pub fn in_shard(partition_hash: u64, shard: ShardId) -> Option<Band> {
        next_jump_from(partition_hash, shard).map(Band::of_next_jump)
    }

    /// Returns the share of a shard's keys that lie in this band while the keyspace has `shards`
    /// shards; 0 of a band whose keys have left. A key leaves at the count `n` with a probability
    /// of `1/n`, so `shards/n` of them are still there at `n` shards.
    pub fn share(self, shards: u32) -> f64 {
        let first = Band::of_next_jump(u64::from(shards));
        let left = |edge: u32| f64::from(shards.max(1)) / f64::from(edge.max(shards).max(1));
        match self {
            band if band < first => 0.0,
            Band::LAST => left(Band::LAST.low_edge()),
            band => left(band.low_edge()) - left(Band(band.0 + 1).low_edge()),
        }
    }

    /// Iterates over all bands, in order.
    pub fn all() -> impl DoubleEndedIterator<Item = Band> {
        (Self::FIRST.0..=Self::LAST.0).map(Band)
    }

    /// Returns the bands whose keys stay in their shard while the keyspace has `shards` shards.
    ///
    /// # Panics
    /// When `shards` is not legal.
    pub fn owned(shards: u32) -> RangeInclusive<Band> {
        assert!(is_legal_shard_count(shards), "{shards} is not a legal shard count");
        Band::of_next_jump(u64::from(shards))..=Band::LAST
    }

    /// Returns the bands whose keys leave their shard when a keyspace grows from `from` to `to`
    /// shards.
    ///
    /// # Panics
    /// When a count is not legal or `from >= to`.
    pub fn leaving(from: u32, to: u32) -> RangeInclusive<Band> {
        assert!(from < to, "a grow goes from fewer to more shards");
        assert!(
            is_legal_shard_count(from) && is_legal_shard_count(to),
            "{from} -> {to} are not legal shard counts"
        );
        Band::of_next_jump(u64::from(from))..=Band(Band::of_next_jump(u64::from(to)).0 - 1)
    }
}

impl fmt::Display for Band {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns true for 1..=64 and, above that, for the band edges up to 4096.
pub fn is_legal_shard_count(shards: u32) -> bool {
    (1..=SHARDS_MAX).contains(&shards) && Band::of_next_jump(u64::from(shards)).low_edge() == shards
}

/// Reasons why a shard count is refused, with the nearest legal counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardCountError {
    /// Below 1.
    #[error("a keyspace needs at least 1 shard")]
    Zero,
    /// Above [`SHARDS_MAX`].
    #[error("{0} shards are more than the limit of {SHARDS_MAX}; use at most {SHARDS_MAX}")]
    TooMany(u32),
    /// Between two band edges.
    #[error("{asked} is not a legal shard count; the nearest legal ones are {below} and {above}")]
    NotABandEdge {
        /// The refused count.
        asked: u32,
        /// The greatest legal count below it.
        below: u32,
        /// The least legal count above it.
        above: u32,
    },
}

/// Checks a shard count that a user asked for.
pub fn check_shard_count(shards: u32) -> Result<u32, ShardCountError> {
    match shards {
        0 => Err(ShardCountError::Zero),
        n if n > SHARDS_MAX => Err(ShardCountError::TooMany(n)),
        n if is_legal_shard_count(n) => Ok(n),
        n => {
            let band = Band::of_next_jump(u64::from(n));
            Err(ShardCountError::NotABandEdge {
                asked: n,
                below: band.low_edge(),
                above: Band(band.0 + 1).low_edge(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::hash::jump;
    use proptest::prelude::*;

    fn legal_counts() -> Vec<u32> {
        (1..=SHARDS_MAX).filter(|n| is_legal_shard_count(*n)).collect()
    }

    #[test]
    fn legal_counts_are_the_documented_ones() {
        let mut want: Vec<u32> = (1..=64).collect();
        want.extend((72..=128).step_by(8));
        want.extend((144..=256).step_by(16));
        want.extend((288..=512).step_by(32));
        want.extend((576..=1024).step_by(64));
        want.extend([2048, 4096]);
        assert_eq!(legal_counts(), want);
    }

    #[test]
    fn bands_are_contiguous_and_their_edges_round_trip() {
        let mut last = Band(1);
        for next in 1..=10_000u64 {
            let band = Band::of_next_jump(next);
            assert!(band == last || band.0 == last.0 + 1, "gap at {next}");
            if band != last {
                assert_eq!(u64::from(band.low_edge()), next);
            }
            last = band;
        }
        assert_eq!(last, Band::LAST);
        assert_eq!(Band::of_next_jump(1 << 43), Band::LAST);
        assert_eq!(Band::all().count(), BANDS);
    }

    #[test]
    fn refused_counts_name_their_neighbours() {
        assert_eq!(check_shard_count(0), Err(ShardCountError::Zero));
        assert_eq!(check_shard_count(5000), Err(ShardCountError::TooMany(5000)));
        assert_eq!(
            check_shard_count(73),
            Err(ShardCountError::NotABandEdge { asked: 73, below: 72, above: 80 })
        );
        assert_eq!(
            check_shard_count(3000),
            Err(ShardCountError::NotABandEdge { asked: 3000, below: 2048, above: 4096 })
        );
        assert_eq!(check_shard_count(80), Ok(80));
    }

    #[test]
    fn the_shares_of_a_shard_add_up_and_hold_for_real_keys() {
        for shards in [1, 3, 5, 16, 64, 128] {
            let sum: f64 = Band::all().map(|band| band.share(shards)).sum();
            assert!((sum - 1.0).abs() < 1e-9, "{shards}: {sum}");
        }
        assert!((Band(5).share(5) - 1.0 / 6.0).abs() < 1e-12);
        assert_eq!(Band(4).share(5), 0.0);
        let hashes = (0..40_000u64).map(|n| crate::hash::partition_hash(&n.to_le_bytes()));
        let bands: Vec<Band> = hashes.map(|hash| Band::of_next_jump(jump(hash, 5).next)).collect();
        for band in [5, 6, 9, 20, 70, 98] {
            let found = bands.iter().filter(|of| of.0 == band).count() as f64 / bands.len() as f64;
            let share = Band(band).share(5);
            assert!((found - share).abs() < 0.01, "band {band}: {found} for {share}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn the_keys_that_leave_are_exactly_the_bands_from_m_to_n(hash: u64, a in 0usize..98, b in 0usize..98) {
            let counts = legal_counts();
            let (a, b) = (a % (counts.len() - 1), b % (counts.len() - 1));
            let (m, n) = (counts[a.min(b)], counts[a.max(b) + 1]);
            let before = jump(hash, m);
            let leaves = jump(hash, n).shard != before.shard;
            let band = Band::in_shard(hash, before.shard).unwrap();
            prop_assert_eq!(leaves, Band::leaving(m, n).contains(&band));
            prop_assert_eq!(!leaves, Band::owned(n).contains(&band));
            prop_assert!(Band::owned(m).contains(&band));
        }
    }
}
