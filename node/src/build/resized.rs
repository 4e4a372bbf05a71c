//! The resizes that a shard received rows in, as far as their sources still keep these.
//!
//! **Invariant:** read from the catalog alone: a quarantine ends only once a manifest of each target
//! covers what has moved, and with it the need for the sources. A source that was lost counts too:
//! its archive outlives it.

use vasto_core::catalog::{Catalog, Quarantine};
use vasto_core::ids::{Lsn, ReplicaId, ShardId};
use vasto_shipping::layout::Owner;

/// A resize in quarantine, as a shard sees it that received rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resized {
    /// Replicas of the shard, each with the LSN of its log that covers everything up to the seals.
    pub targets: Vec<(ReplicaId, Lsn)>,
    /// The replicas whose logs the shard followed, each with the LSN behind which its log has nothing
    /// more for the shard; `None` when an older release committed the resize.
    pub sources: Vec<(Owner, Option<Lsn>)>,
}

impl Resized {
    /// Returns those of a shard.
    pub(crate) fn all(catalog: &Catalog, shard: ShardId) -> Vec<Self> {
        let of_shard = |quarantine: &Quarantine| Self::of(catalog, shard, quarantine);
        let all = catalog.quarantines.iter().map(of_shard);
        all.filter(|resized| !resized.targets.is_empty()).collect()
    }

    fn of(catalog: &Catalog, shard: ShardId, quarantine: &Quarantine) -> Self {
        let placed = catalog.placement.iter().flat_map(|placed| {
            placed.replicas.iter().map(move |member| (member.replica, placed.shard))
        });
        let retired = catalog.retired.iter().map(|retired| (retired.replica, retired.shard));
        let shards: Vec<(ReplicaId, ShardId)> = placed.chain(retired).collect();
        let shard_of = |replica: ReplicaId| {
            shards.iter().find(|(other, _)| *other == replica).map(|(_, shard)| *shard)
        };
        let targets = quarantine.targets.iter().chain(&quarantine.others);
        let keyspace = catalog.keyspace;
        let mut sources: Vec<(Owner, Option<Lsn>)> = Vec::new();
        for source in &quarantine.sources {
            let owner = Owner { keyspace, shard: source.shard, replica: source.replica };
            sources.push((owner, Some(source.sealed).filter(|sealed| *sealed > Lsn(0))));
        }
        if sources.is_empty() {
            // Of an older release: those that are still there.
            sources.extend(quarantine.replicas.iter().filter_map(|replica| {
                Some((Owner { keyspace, shard: shard_of(*replica)?, replica: *replica }, None))
            }));
        }
        sources.retain(|(source, _)| source.shard != shard);
        Self {
            targets: targets
                .filter(|(replica, _)| shard_of(*replica) == Some(shard))
                .copied()
                .collect(),
            sources,
        }
    }
}

#[cfg(test)]
mod tests {
    use vasto_core::Band;
    use vasto_core::catalog::{KeyspaceSpec, QuarantineSource};
    use vasto_core::ids::{KeyspaceId, NodeId, PlanId};

    use super::*;

    #[test]
    fn a_shard_that_received_rows_knows_its_targets_and_their_sources() {
        let spec = KeyspaceSpec { shards: 3, replicas: 1, ..KeyspaceSpec::default() };
        let nodes = [vec![NodeId(1)], vec![NodeId(2)], vec![NodeId(3)]];
        let mut catalog = Catalog::first(KeyspaceId(4), "ks", spec, &nodes, 1, 1);
        catalog.quarantines.push(Quarantine {
            plan: PlanId(1),
            range: Band::leaving(2, 3).into(),
            replicas: vec![ReplicaId(1), ReplicaId(2), ReplicaId(99)],
            targets: vec![(ReplicaId(3), Lsn(40))],
            others: Vec::new(),
            sources: Vec::new(),
            until_us: 9,
            dropping: false,
        });
        assert_eq!(Resized::all(&catalog, ShardId(1)), []);
        let source = |replica: u64, shard: u32| Owner {
            keyspace: KeyspaceId(4),
            shard: ShardId(shard),
            replica: ReplicaId(replica),
        };
        let resized = Resized {
            targets: vec![(ReplicaId(3), Lsn(40))],
            sources: vec![(source(1, 0), None), (source(2, 1), None)],
        };
        assert_eq!(Resized::all(&catalog, ShardId(2)), [resized]);
        // A source that was lost, and made again as another replica, is none that is waited for.
        catalog.quarantines[0].replicas = vec![ReplicaId(2)];
        let gave = |shard: u32, replica: u64, sealed: u64| QuarantineSource {
            shard: ShardId(shard),
            replica: ReplicaId(replica),
            sealed: Lsn(sealed),
        };
        catalog.quarantines[0].sources = vec![gave(0, 50, 7), gave(1, 2, 0)];
        let sources = [(source(50, 0), Some(Lsn(7))), (source(2, 1), None)];
        assert_eq!(Resized::all(&catalog, ShardId(2))[0].sources, sources);
    }
}
