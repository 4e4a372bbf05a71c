//! Retirements: which replicas were made for a shard that a shrink has retired since.
//!
//! **Invariant:** ids of replicas ascend and are given out once, so that a shard that exists again
//! after its retirement has only replicas with higher ids: what the earlier ones shipped was never
//! part of it.

use serde::{Deserialize, Serialize};

use crate::ids::{CatalogVersion, ReplicaId, ShardId};

/// The shrink that retired all shards from one on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retirement {
    /// The first of the shards.
    pub first: ShardId,
    /// The replicas that one of these shards ever had until then have lower ids.
    pub below: ReplicaId,
    /// The catalog version that committed the shrink.
    pub version: CatalogVersion,
    /// Time of writing it, microseconds since 1970.
    pub at_us: u64,
}

impl Retirement {
    /// Returns true when the replica was made for one of these shards before they retired.
    pub fn concerns(&self, shard: ShardId, replica: ReplicaId) -> bool {
        shard >= self.first && replica < self.below
    }

    /// Adds this retirement, the last one so far, to those before it. An earlier retirement of some
    /// of these shards and of no others is forgotten: this one concerns the same replicas and more.
    pub(super) fn add_to(self, retirements: &mut Vec<Self>) {
        retirements.retain(|earlier| earlier.first < self.first);
        retirements.push(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // After any sequence of shrinks, exactly the replicas that one of them retired are found,
        // the earliest retirement that is still known first, and the list holds at most one entry
        // for each number of shards.
        #[test]
        fn no_retirement_of_a_replica_is_forgotten(
            shrinks in proptest::collection::vec((1u32..6, 1u64..4), 0..12),
        ) {
            let (mut known, mut all) = (Vec::new(), Vec::new());
            let mut below = ReplicaId(1);
            for (n, (first, replicas)) in shrinks.into_iter().enumerate() {
                below.0 += replicas;
                let (version, at_us) = (CatalogVersion(n as u64), n as u64);
                let retirement = Retirement { first: ShardId(first), below, version, at_us };
                retirement.add_to(&mut known);
                all.push(retirement);
            }
            prop_assert!(known.len() <= 5);
            prop_assert!(known.is_sorted_by(|a, b| a.first < b.first && a.version < b.version));
            for shard in (0..7).map(ShardId) {
                for replica in (1..=below.0).map(ReplicaId) {
                    let concerns = |retirement: &Retirement| retirement.concerns(shard, replica);
                    prop_assert_eq!(known.iter().any(concerns), all.iter().any(concerns));
                }
            }
        }
    }
}
