//! Partition hash and jump consistent hash with its *next jump*.
//!
//! Source: J. Lamping, E. Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm",
//! arXiv:1406.2294. The algorithm walks a key's ascending sequence of buckets
//! `b0 = 0 < b1 < b2 < …`; for `n` shards the key lives in the greatest `bi < n`. The element after
//! it, the **next jump** `j`, is the shard to which the key moves once there are more than `j`
//! shards: `shard == b` holds for every `n` in `b+1..=j`.
//!
//! **Invariant:** the f64 arithmetic is one division and one product, both correctly rounded by
//! IEEE 754, so every platform computes the same sequence; golden vectors pin it.

use xxhash_rust::xxh3::xxh3_64;

use crate::ids::ShardId;

/// Returns the 64-bit XXH3 hash of a partition key. Persisted in placement: never change it.
pub fn partition_hash(partition_key: &[u8]) -> u64 {
    xxh3_64(partition_key)
}

/// A position in a key's jump sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// The bucket that holds the key.
    pub shard: ShardId,
    /// The bucket that takes the key once there are more than this many shards.
    pub next: u64,
}

/// The ascending bucket sequence of one hash.
struct Sequence {
    state: u64,
    bucket: u64,
}

impl Sequence {
    fn new(hash: u64) -> Self {
        Self { state: hash, bucket: 0 }
    }

    /// Returns the bucket after the current one. At most 2^43 for buckets below 4096.
    fn next_jump(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        let divisor = ((self.state >> 33) + 1) as f64;
        ((self.bucket + 1) as f64 * ((1u64 << 31) as f64 / divisor)) as u64
    }
}

/// Returns the shard of a hash among `shards` shards, and the shard count above which the hash
/// leaves it.
///
/// # Panics
/// When `shards` is 0.
pub fn jump(hash: u64, shards: u32) -> Jump {
    assert!(shards > 0, "a keyspace has at least one shard");
    let mut sequence = Sequence::new(hash);
    loop {
        let next = sequence.next_jump();
        if next >= u64::from(shards) {
            return Jump { shard: ShardId(sequence.bucket as u32), next };
        }
        sequence.bucket = next;
    }
}

/// Returns the next jump of a hash from `shard`, or `None` if its sequence never visits that shard.
///
/// The result does not depend on the number of shards, so where a key is stored inside a shard is a
/// pure function of the key and the shard.
pub fn next_jump_from(hash: u64, shard: ShardId) -> Option<u64> {
    let mut sequence = Sequence::new(hash);
    loop {
        let next = sequence.next_jump();
        match sequence.bucket.cmp(&u64::from(shard.0)) {
            std::cmp::Ordering::Equal => return Some(next),
            std::cmp::Ordering::Greater => return None,
            std::cmp::Ordering::Less => sequence.bucket = next,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn published_vectors_of_the_paper_hold() {
        // Known answers of the reference implementation (hash, buckets) -> bucket.
        for (hash, n, want) in
            [(0u64, 1u32, 0u32), (0xdead_10cc, 666, 361), (256, 1024, 520), (1, 1, 0)]
        {
            assert_eq!(jump(hash, n).shard.0, want, "jump({hash:#x}, {n})");
        }
    }

    #[test]
    fn load_is_balanced() {
        for n in [2u32, 3, 7, 64, 80] {
            let keys = 200_000u64;
            let mut counts = vec![0u64; n as usize];
            for i in 0..keys {
                counts[jump(partition_hash(&i.to_le_bytes()), n).shard.0 as usize] += 1;
            }
            let mean = keys as f64 / f64::from(n);
            let tolerance = 6.0 * mean.sqrt();
            for (shard, count) in counts.iter().enumerate() {
                assert!(
                    (*count as f64 - mean).abs() < tolerance,
                    "shard {shard} of {n}: {count}, mean {mean}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn the_bucket_holds_up_to_the_next_jump_and_changes_after_it(hash: u64, n in 1u32..4096) {
            let here = jump(hash, n);
            prop_assert!(here.shard.0 < n && here.next >= u64::from(n));
            for m in [here.shard.0 + 1, n, here.next.min(5000) as u32] {
                prop_assert_eq!(jump(hash, m).shard, here.shard);
            }
            if here.next < 5000 {
                prop_assert_eq!(u64::from(jump(hash, here.next as u32 + 1).shard.0), here.next);
            }
            prop_assert_eq!(next_jump_from(hash, here.shard), Some(here.next));
        }

        #[test]
        fn growth_moves_keys_only_to_new_shards(hash: u64, m in 1u32..300, more in 1u32..300) {
            let before = jump(hash, m).shard;
            let after = jump(hash, m + more).shard;
            prop_assert!(after == before || after.0 >= m);
        }

        #[test]
        fn shards_off_the_sequence_answer_none(hash: u64, shard in 0u32..500) {
            let on_it = (shard + 1..600).any(|n| jump(hash, n).shard.0 == shard);
            prop_assert_eq!(next_jump_from(hash, ShardId(shard)).is_some(), on_it);
        }
    }
}
