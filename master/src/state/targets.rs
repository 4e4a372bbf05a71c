//! The nodes that could take a replica: candidates for placements, copies and grows.
//!
//! **Invariant:** places that a decision assigns are held until its write is known, so that no
//! other decision counts on them.

use std::collections::{BTreeMap, HashMap};

use vasto_core::catalog::Catalog;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::plan::Plan;
use vasto_core::reconcile::nodes_to_avoid;

use super::ClusterState;
use super::keyspace::Keyspace;
use crate::loads::shard_bytes;
use crate::placement::{Disk, NodeCandidate, PlacementError, place};

impl ClusterState {
    /// Returns the live nodes as candidates for a replica, of that keyspace if there is one.
    pub(crate) fn candidates(&self, catalog: Option<&Catalog>) -> Vec<NodeCandidate> {
        let mut of_keyspace: HashMap<NodeId, usize> = HashMap::new();
        for (_, member, _) in catalog.map(Catalog::members).unwrap_or_default() {
            // A retired replica serves nothing, so it counts as disk and not as load.
            if !catalog.is_some_and(|catalog| catalog.is_retired(member.replica)) {
                *of_keyspace.entry(member.node).or_default() += 1;
            }
        }
        let reachable = self.live().filter(|(_, node)| node.unreachable.is_none());
        let candidates = reachable.map(|(id, node)| {
            let load = self.loads.of(id);
            NodeCandidate {
                node: id,
                zone: node.zone.clone(),
                replicas: load.replicas,
                replicas_max: node.max_replicas,
                of_keyspace: of_keyspace.get(&id).copied().unwrap_or_default(),
                copying: load.copying,
                cordoned: self.settings.is_cordoned(id),
                disk: Disk { promised: load.promised, ..node.disk() },
            }
        });
        let candidates: Vec<NodeCandidate> = candidates.collect();
        #[cfg(test)]
        self.examined.set(self.examined.get() + candidates.len() as u64);
        candidates
    }

    /// Returns the disk of a node with what other decisions have promised of it; `None` of a node
    /// that has not registered.
    pub(crate) fn disk_of(&self, node: NodeId) -> Option<Disk> {
        let promised = self.loads.of(node).promised;
        self.nodes.get(&node).map(|node| Disk { promised, ..node.disk() })
    }

    /// Returns the live node that could take one more replica of a shard, even if other copies to
    /// it come first; `taken` are the replicas and bytes that each node is to get before.
    pub(crate) fn copy_target(
        &self,
        catalog: &Catalog,
        shard: ShardId,
        taken: &BTreeMap<NodeId, (usize, u64)>,
        now_us: u64,
    ) -> Option<NodeId> {
        let mut candidates = self.candidates(Some(catalog));
        for candidate in &mut candidates {
            if let Some((replicas, bytes)) = taken.get(&candidate.node) {
                candidate.replicas += replicas;
                candidate.disk.promised = candidate.disk.promised.saturating_add(*bytes);
            }
        }
        self.best(candidates.iter(), catalog, shard, now_us)
    }

    /// Returns the best candidate for one more replica of a shard: a node that has none of it, has
    /// room for its files, did not fail at it lately, and is in a zone that has none if possible.
    pub(super) fn best<'a>(
        &self,
        candidates: impl Iterator<Item = &'a NodeCandidate>,
        catalog: &Catalog,
        shard: ShardId,
        now_us: u64,
    ) -> Option<NodeId> {
        let leaves = |node: NodeId| catalog.draining_nodes.iter().any(|drain| drain.node == node);
        let asked =
            |node: NodeId| catalog.draining_nodes.iter().any(|drain| drain.to == Some(node));
        let members = catalog.members();
        // A retired replica belonged to another shard, whatever its number.
        let has = |node: NodeId| {
            let of_shard = members
                .iter()
                .filter(|(of, member, _)| *of == shard && !catalog.is_retired(member.replica));
            of_shard.into_iter().any(|(_, member, _)| member.node == node)
        };
        let zone_of = |node: NodeId| self.nodes.get(&node).map(|node| node.zone.as_str());
        let placed =
            catalog.shard(shard).map(|placed| placed.replicas.as_slice()).unwrap_or_default();
        let reports = self.keyspaces.get(&catalog.keyspace).map(|keyspace| &keyspace.reports);
        let bytes = reports.map(|reports| shard_bytes(catalog, shard, reports)).unwrap_or_default();
        let avoided = nodes_to_avoid(catalog, now_us);
        candidates
            .filter(|node| node.takes(bytes) && !has(node.node) && !leaves(node.node))
            .min_by_key(|node| {
                let zone_used =
                    placed.iter().any(|other| zone_of(other.node) == Some(node.zone.as_str()));
                let failed = avoided.contains(&node.node);
                (failed, !asked(node.node), zone_used, node.of_keyspace, node.replicas, node.node)
            })
            .map(|node| node.node)
    }

    /// Returns the nodes for the replicas of each shard that is added up to `to`; an error when
    /// there are too few.
    pub(crate) fn grow_targets(
        &self,
        keyspace: &Keyspace,
        to: u32,
    ) -> Result<Vec<Vec<NodeId>>, PlacementError> {
        let catalog = &keyspace.catalog;
        let added = to.saturating_sub(catalog.spec.shards);
        place(added, catalog.spec.replicas, &self.candidates(Some(catalog)))
    }

    /// Holds the places and the disk that the next version assigns: until its write is known, other
    /// decisions must not count on them. Returns `None` when it assigns none.
    pub(crate) fn hold_places(&mut self, next: &Catalog) -> Option<u64> {
        let keyspace = self.keyspaces.get(&next.keyspace)?;
        let before: Vec<ReplicaId> =
            keyspace.catalog.members().iter().map(|(_, member, _)| member.replica).collect();
        let copying = next.plans().any(Plan::adds_member);
        let promised = |shard| match copying {
            true => shard_bytes(next, shard, &keyspace.reports),
            false => 0,
        };
        let new: Vec<(NodeId, u64)> = next
            .members()
            .into_iter()
            .filter(|(_, member, _)| !before.contains(&member.replica))
            .map(|(shard, member, _)| (member.node, promised(shard)))
            .collect();
        let id_of = |catalog: &Catalog| catalog.plan.as_ref().map(|plan| plan.id);
        let begins = id_of(next) != id_of(&keyspace.catalog);
        let begun = next.plan.as_ref().filter(|_| begins);
        let disk = begun.and_then(|plan| plan.estimate.as_ref());
        let disk = disk.map(|estimate| estimate.disk.as_slice()).unwrap_or_default();
        let holds = !new.is_empty() || !disk.is_empty();
        holds.then(|| self.loads.hold_with_disk(new, copying, disk))
    }
}
