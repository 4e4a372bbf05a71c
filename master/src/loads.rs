//! The load of every node, updated with every catalog version instead of counted for each decision.
//!
//! **Invariant:** a load is the sum of what the last known version of every keyspace puts on the
//! node, and of the places held by decisions whose version is not known yet: two decisions that are
//! made before either is written do not both count the same capacity.

use std::collections::BTreeMap;

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::estimate::DiskNeed;
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::plan::Step;
use vasto_core::report::Reports;

/// The load of one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Replicas: placed, under construction, to be drained.
    pub(crate) replicas: usize,
    /// Replicas under construction among them.
    pub(crate) copying: usize,
    /// Upper bound of the bytes that running plans will take there.
    pub(crate) promised: u64,
}

/// The part of a load that one replica causes, or the disk that a plan takes meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    node: NodeId,
    replicas: usize,
    copying: bool,
    promised: u64,
}

impl Share {
    fn of_disk(need: &DiskNeed) -> Self {
        Self { node: need.node, replicas: 0, copying: false, promised: need.bytes }
    }
}

/// The loads of all nodes.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    nodes: BTreeMap<NodeId, Load>,
    shares: BTreeMap<KeyspaceId, Vec<Share>>,
    held: BTreeMap<u64, Vec<Share>>,
    last_hold: u64,
}

impl Loads {
    /// Returns the load of a node.
    pub(crate) fn of(&self, node: NodeId) -> Load {
        self.nodes.get(&node).copied().unwrap_or_default()
    }

    /// Returns the nodes that have a load.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.keys().copied()
    }

    /// Counts a keyspace's newest version instead of the previous one.
    pub(crate) fn count(&mut self, catalog: &Catalog, reports: &Reports) {
        let shares = shares_of(catalog, reports);
        shares.iter().for_each(|share| self.add(*share));
        let before = self.shares.insert(catalog.keyspace, shares);
        before.into_iter().flatten().for_each(|share| self.subtract(share));
    }

    /// Subtracts a keyspace that is not known any more.
    pub(crate) fn forget(&mut self, keyspace: KeyspaceId) {
        self.shares.remove(&keyspace).into_iter().flatten().for_each(|share| self.subtract(share));
    }

    /// Holds places on these nodes, with the bytes that are promised there, until they are given
    /// back; returns the id of the hold.
    pub(crate) fn hold(
        &mut self,
        places: impl IntoIterator<Item = (NodeId, u64)>,
        copying: bool,
    ) -> u64 {
        self.hold_with_disk(places, copying, &[])
    }

    /// Holds places as [`Self::hold`] does, and the disk that a plan takes while it runs.
    pub(crate) fn hold_with_disk(
        &mut self,
        places: impl IntoIterator<Item = (NodeId, u64)>,
        copying: bool,
        disk: &[DiskNeed],
    ) -> u64 {
        let places = places.into_iter();
        let places = places.map(|(node, promised)| Share { node, replicas: 1, copying, promised });
        let shares: Vec<Share> = places.chain(disk.iter().map(Share::of_disk)).collect();
        shares.iter().for_each(|share| self.add(*share));
        self.last_hold += 1;
        self.held.insert(self.last_hold, shares);
        self.last_hold
    }

    /// Gives held places back: the version is known now, or will never be.
    pub(crate) fn give_back(&mut self, hold: u64) {
        self.held.remove(&hold).into_iter().flatten().for_each(|share| self.subtract(share));
    }

    fn add(&mut self, share: Share) {
        let load = self.nodes.entry(share.node).or_default();
        load.replicas += share.replicas;
        load.copying += usize::from(share.copying);
        load.promised = load.promised.saturating_add(share.promised);
    }

    fn subtract(&mut self, share: Share) {
        let Some(load) = self.nodes.get_mut(&share.node) else { return };
        load.replicas -= share.replicas;
        load.copying -= usize::from(share.copying);
        load.promised = load.promised.saturating_sub(share.promised);
        if *load == Load::default() {
            self.nodes.remove(&share.node);
        }
    }
}

/// Returns the bytes of a shard, by the reports of its replicas.
pub(crate) fn shard_bytes(
    catalog: &Catalog,
    shard: vasto_core::ids::ShardId,
    reports: &Reports,
) -> u64 {
    let placed = catalog.shard(shard).into_iter().flat_map(|shard| &shard.replicas);
    placed.filter_map(|placed| Some(reports.get(&placed.replica)?.bytes)).max().unwrap_or_default()
}

fn shares_of(catalog: &Catalog, reports: &Reports) -> Vec<Share> {
    let adding =
        || catalog.plans().filter(|plan| plan.adds_member() && plan.step != Step::Committed);
    let is_target = |id| adding().flat_map(|plan| &plan.targets).any(|target| target.replica == id);
    // In the catalog, so that it counts before any node has reported to this master.
    let runs = catalog
        .plan
        .iter()
        .filter(|plan| catalog.state == KeyspaceState::Active && plan.step != Step::Committed);
    let disk = runs.filter_map(|plan| plan.estimate.as_ref()).flat_map(|estimate| &estimate.disk);
    let members = catalog.members().into_iter();
    members
        .map(|(shard, member, _)| match is_target(member.replica) {
            true => Share {
                node: member.node,
                replicas: 1,
                copying: true,
                promised: shard_bytes(catalog, shard, reports),
            },
            false => Share { node: member.node, replicas: 1, copying: false, promised: 0 },
        })
        .chain(disk.map(Share::of_disk))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::estimate::Estimate;
    use vasto_core::reconcile::start_resize;

    fn catalog(id: u64, nodes: &[u64]) -> Catalog {
        let nodes: Vec<NodeId> = nodes.iter().map(|id| NodeId(*id)).collect();
        Catalog::first(KeyspaceId(id), "ks", KeyspaceSpec::default(), &[nodes], 1_000, 1)
    }

    #[test]
    fn loads_follow_versions_and_holds() {
        let mut loads = Loads::default();
        let replicas = |loads: &Loads| [1, 2, 3].map(|node| loads.of(NodeId(node)).replicas);
        loads.count(&catalog(1, &[1, 2]), &Reports::new());
        loads.count(&catalog(2, &[2]), &Reports::new());
        assert_eq!(replicas(&loads), [1, 2, 0]);
        let hold = loads.hold([(NodeId(3), 7), (NodeId(2), 7)], true);
        assert_eq!(loads.of(NodeId(3)), Load { replicas: 1, copying: 1, promised: 7 });
        loads.count(&catalog(1, &[1, 3]), &Reports::new());
        assert_eq!(replicas(&loads), [1, 2, 2]);
        loads.give_back(hold);
        loads.give_back(hold);
        assert_eq!(replicas(&loads), [1, 1, 1]);
        loads.count(
            &Catalog { state: KeyspaceState::Deleted, ..catalog(1, &[1, 3]) },
            &Reports::new(),
        );
        loads.forget(KeyspaceId(2));
        assert!(loads.nodes.is_empty());
    }

    #[test]
    fn the_disk_of_a_running_resize_is_promised_until_it_has_committed() {
        let mut loads = Loads::default();
        let disk = |bytes| DiskNeed { node: NodeId(1), bytes };
        let mut growing =
            start_resize(&catalog(1, &[1]), 2, &[vec![NodeId(2)]], 9, 9).expect("it may grow");
        let plan = growing.plan.as_mut().expect("it has begun");
        plan.estimate = Some(Estimate { disk: vec![disk(70)], ..Estimate::default() });
        let hold = loads.hold_with_disk([(NodeId(2), 0)], false, &[disk(70)]);
        assert_eq!((loads.of(NodeId(1)).promised, loads.of(NodeId(1)).replicas), (70, 0));
        loads.count(&growing, &Reports::new());
        loads.give_back(hold);
        assert_eq!(loads.of(NodeId(1)), Load { replicas: 1, copying: 0, promised: 70 });
        if let Some(plan) = &mut growing.plan {
            plan.step = Step::Committed;
        }
        loads.count(&growing, &Reports::new());
        assert_eq!(loads.of(NodeId(1)).promised, 0);
        loads.forget(KeyspaceId(1));
        assert!(loads.nodes.is_empty());
    }
}
