//! The choice of nodes for the replicas of a new keyspace and for the new shard of a grow.
//!
//! **Invariant:** pure and deterministic; the replicas of a shard are on distinct nodes, and in
//! distinct zones while there are enough. No node gets more replicas than its maximum; a cordoned
//! node gets none, and neither does a node whose free disk is down to the reserve.

use std::collections::BTreeMap;

use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::NodeId;
use vasto_core::limits::disk_reserve;

/// A live node that could take a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeCandidate {
    pub(crate) node: NodeId,
    pub(crate) zone: String,
    /// Replicas on the node, of all keyspaces.
    pub(crate) replicas: usize,
    /// The most replicas that the node takes.
    pub(crate) replicas_max: usize,
    /// Replicas on the node of the keyspace in question.
    pub(crate) of_keyspace: usize,
    /// Replicas under construction there.
    pub(crate) copying: usize,
    /// The node gets no replicas.
    pub(crate) cordoned: bool,
    /// Its disk.
    pub(crate) disk: Disk,
}

/// The reported disk of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Total bytes; 0 when nothing was reported yet.
    pub(crate) bytes: u64,
    /// Free bytes.
    pub(crate) free: u64,
    /// Upper bound of the free bytes that replicas under construction will take.
    pub(crate) promised: u64,
}

impl Disk {
    /// Returns the bytes that may still be placed there; unlimited while nothing is known.
    pub(crate) fn room(&self) -> u64 {
        match self.bytes {
            0 => u64::MAX,
            bytes => self.free.saturating_sub(self.promised).saturating_sub(disk_reserve(bytes)),
        }
    }

    /// Returns true when so little is left that a replica under construction there cannot be
    /// completed.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.bytes > 0 && self.free < disk_reserve(self.bytes) / 4
    }
}

impl NodeCandidate {
    /// Returns true when the node takes one more replica of so many bytes: it is not cordoned, and
    /// has a place and the disk for it.
    pub(crate) fn takes(&self, bytes: u64) -> bool {
        self.room() > 0 && self.disk.room() > bytes
    }

    /// Returns how many more replicas the node takes.
    pub(crate) fn room(&self) -> usize {
        match self.cordoned || self.disk.room() == 0 {
            true => 0,
            false => self.replicas_max.saturating_sub(self.replicas),
        }
    }
}

/// Live nodes that get no replicas, with the reasons.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Shut(Vec<String>);

impl Shut {
    pub(crate) fn of(candidates: &[NodeCandidate]) -> Self {
        let why = |node: &NodeCandidate| match (node.cordoned, node.disk.room()) {
            (true, _) => Some(format!("{0} is cordoned (`vasto node uncordon {0}`)", node.node)),
            (false, 0) => {
                Some(format!("{} has only {} MiB of disk left", node.node, node.disk.free >> 20))
            }
            _ => None,
        };
        Self(candidates.iter().filter_map(why).collect())
    }
}

impl std::fmt::Display for Shut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMED: usize = 5;
        let Self(all) = self;
        match all.len() {
            0 => Ok(()),
            n if n > NAMED => {
                write!(f, "; not counted: {} and {} more", all[..NAMED].join(", "), n - NAMED)
            }
            _ => write!(f, "; not counted: {}", all.join(", ")),
        }
    }
}

/// Why no node can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlacementError {
    #[error(
        "no live node; start one with `vasto serve node --master URL --dir DIR`, then try again"
    )]
    NoNode,
    #[error(
        "{replicas} copies of a shard need {replicas} live nodes, and there are {nodes}; start more nodes{shut}"
    )]
    TooFewNodes { replicas: u32, nodes: usize, shut: Shut },
    #[error(
        "the live nodes have room for {room} more replicas, and {needed} are needed; start more nodes, raise their \
         node.max_replicas, or use fewer shards{shut}"
    )]
    Full { room: usize, needed: usize, shut: Shut },
}

impl From<PlacementError> for VastoError {
    fn from(error: PlacementError) -> Self {
        VastoError::new(ErrorCode::FailedPrecondition, error.to_string())
    }
}

/// Returns the nodes of each shard, primary first: spread evenly, nodes with the fewest replicas
/// first.
pub(crate) fn place(
    shards: u32,
    replicas: u32,
    candidates: &[NodeCandidate],
) -> Result<Vec<Vec<NodeId>>, PlacementError> {
    if candidates.is_empty() {
        return Err(PlacementError::NoNode);
    }
    let shut = Shut::of(candidates);
    let open = |node: &&NodeCandidate| !node.cordoned && node.disk.room() > 0;
    let mut pool: Vec<NodeCandidate> = candidates.iter().filter(open).cloned().collect();
    if pool.len() < replicas as usize {
        return Err(PlacementError::TooFewNodes { replicas, nodes: pool.len(), shut });
    }
    let needed = shards as usize * replicas as usize;
    let room = pool.iter().map(NodeCandidate::room).sum();
    let full = PlacementError::Full { room, needed, shut };
    if room < needed {
        return Err(full);
    }
    // Primaries of this keyspace on each node: they do the most work, so they are spread too.
    let mut primaries: BTreeMap<NodeId, usize> = BTreeMap::new();
    (0..shards)
        .map(|_| {
            let mut chosen: Vec<(NodeId, String)> = Vec::new();
            for _ in 0..replicas {
                let best = pool
                    .iter_mut()
                    .filter(|node| {
                        node.room() > 0 && !chosen.iter().any(|(id, _)| *id == node.node)
                    })
                    // Evenly within this keyspace first: its load must spread.
                    .min_by_key(|node| {
                        let zone_used = chosen.iter().any(|(_, zone)| *zone == node.zone);
                        (zone_used, node.of_keyspace, node.replicas, node.node)
                    })
                    .ok_or_else(|| full.clone())?;
                best.replicas += 1;
                best.of_keyspace += 1;
                chosen.push((best.node, best.zone.clone()));
            }
            let mut nodes: Vec<NodeId> = chosen.into_iter().map(|(node, _)| node).collect();
            let fewest = (0..nodes.len())
                .min_by_key(|at| (primaries.get(&nodes[*at]).copied().unwrap_or(0), *at));
            if let Some(fewest) = fewest {
                nodes.swap(0, fewest);
                *primaries.entry(nodes[0]).or_default() += 1;
            }
            Ok(nodes)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const MOST: usize = 256;

    fn node(id: u64, zone: &str, replicas: usize, of_keyspace: usize) -> NodeCandidate {
        NodeCandidate {
            node: NodeId(id),
            zone: zone.into(),
            replicas,
            replicas_max: MOST,
            of_keyspace,
            copying: 0,
            cordoned: false,
            disk: Disk::default(),
        }
    }

    #[test]
    fn shards_spread_and_the_emptiest_node_comes_first() {
        let nodes = [node(1, "", 5, 0), node(2, "", 0, 0), node(3, "", 1, 0)];
        let placed = place(4, 1, &nodes).unwrap();
        assert_eq!(placed, [[NodeId(2)], [NodeId(3)], [NodeId(1)], [NodeId(2)]]);
    }

    #[test]
    fn copies_prefer_other_zones_and_never_share_a_node() {
        let nodes = [node(1, "a", 0, 0), node(2, "a", 0, 0), node(3, "b", 9, 0)];
        assert_eq!(place(1, 2, &nodes).unwrap(), [[NodeId(1), NodeId(3)]]);
        assert_eq!(
            place(1, 4, &nodes),
            Err(PlacementError::TooFewNodes { replicas: 4, nodes: 3, shut: Shut::default() })
        );
    }

    #[test]
    fn too_few_nodes_and_full_nodes_are_errors() {
        assert_eq!(place(1, 1, &[]), Err(PlacementError::NoNode));
        let full = [node(1, "", MOST - 1, 0)];
        assert_eq!(
            place(2, 1, &full),
            Err(PlacementError::Full { room: 1, needed: 2, shut: Shut::default() })
        );
        assert_eq!(place(1, 1, &full).unwrap(), [[NodeId(1)]]);
        let small = [NodeCandidate { replicas_max: 2, ..node(1, "", 0, 0) }, node(2, "", 50, 0)];
        let placed = place(5, 1, &small).unwrap();
        assert_eq!(
            placed.iter().filter(|nodes| nodes[0] == NodeId(1)).count(),
            2,
            "each by its own limit"
        );
    }

    #[test]
    fn a_grow_goes_to_the_node_with_the_least_of_the_keyspace() {
        let nodes = [node(1, "", 1, 1), node(2, "", 9, 0), node(3, "", 2, 0)];
        assert_eq!(place(1, 1, &nodes).unwrap(), [[NodeId(3)]]);
        assert_eq!(place(1, 2, &nodes).unwrap(), [[NodeId(3), NodeId(2)]]);
        assert!(place(1, 1, &[node(1, "", MOST, 0)]).is_err());
    }

    #[test]
    fn a_node_without_disk_and_one_that_is_cordoned_get_nothing_and_are_named() {
        let gib = 1 << 30;
        let disk = |free: u64, promised: u64| Disk { bytes: 100 * gib, free, promised };
        let full = NodeCandidate { disk: disk(gib, 0), ..node(1, "", 0, 0) };
        let cordoned = NodeCandidate { cordoned: true, ..node(2, "", 0, 0) };
        let good = NodeCandidate { disk: disk(gib + 1, 0), ..node(3, "", 50, 0) };
        let all = [full.clone(), cordoned, good];
        assert_eq!(place(2, 1, &all).unwrap(), [[NodeId(3)], [NodeId(3)]]);
        let error = place(1, 2, &all).unwrap_err().to_string();
        for part in [
            "need 2 live nodes, and there are 1",
            "has only 1024 MiB of disk left",
            "vasto node uncordon",
        ] {
            assert!(error.contains(part), "{error}");
        }
        // Bytes promised to replicas under construction are not free; a small disk has a small
        // reserve.
        let promised = NodeCandidate { disk: disk(3 * gib, 2 * gib), ..node(4, "", 0, 0) };
        assert_eq!((full.room(), promised.room(), promised.disk.room()), (0, 0, 0));
        let small = Disk { bytes: 40 << 20, free: 3 << 20, promised: 0 };
        assert_eq!((small.room(), small.is_exhausted()), (1 << 20, false));
        assert!(
            Disk { free: 100 << 10, ..small }.is_exhausted() && !Disk::default().is_exhausted()
        );
    }

    proptest! {
        #[test]
        fn copies_are_apart_and_primaries_are_spread(
            shards in 1u32..65, replicas in 1u32..8, count in 1usize..12, zones in 1usize..5,
        ) {
            let names = ["a", "b", "c", "d"];
            let nodes: Vec<NodeCandidate> = (0..count).map(|i| node(i as u64 + 1, names[i % zones], 0, 0)).collect();
            let placed = place(shards, replicas, &nodes);
            prop_assert_eq!(placed.is_ok(), count >= replicas as usize);
            let mut primaries: BTreeMap<NodeId, usize> = nodes.iter().map(|candidate| (candidate.node, 0)).collect();
            for shard in placed.unwrap_or_default() {
                let mut distinct = shard.clone();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(distinct.len(), replicas as usize);
                let zones_of = |nodes: &[NodeId]| nodes.iter().map(|id| (id.0 as usize - 1) % zones).collect::<std::collections::BTreeSet<_>>();
                prop_assert_eq!(zones_of(&shard).len(), zones.min(replicas as usize).min(count));
                *primaries.get_mut(&shard[0]).unwrap() += 1;
            }
            let (min, max) = (primaries.values().min().unwrap(), primaries.values().max().unwrap());
            // With several zones a node may be needed for its zone more often than as a primary.
            prop_assert!(zones > 1 || max - min <= 1, "{:?}", primaries);
        }

        #[test]
        fn a_keyspace_is_spread_within_one(shards in 1u32..65, count in 1usize..12, loads in prop::collection::vec(0usize..90, 12)) {
            let nodes: Vec<NodeCandidate> = (0..count).map(|i| node(i as u64 + 1, "", loads[i], 0)).collect();
            let placed = place(shards, 1, &nodes).unwrap();
            prop_assert_eq!(placed.len(), shards as usize);
            let mut per_node: BTreeMap<NodeId, usize> = nodes.iter().map(|candidate| (candidate.node, 0)).collect();
            for shard in &placed {
                *per_node.get_mut(&shard[0]).unwrap() += 1;
            }
            let (min, max) = (per_node.values().min().unwrap(), per_node.values().max().unwrap());
            prop_assert!(max - min <= 1, "{:?}", per_node);
        }
    }
}
