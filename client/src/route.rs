//! The routing of operations: the topology in force, and pure functions on it.
//!
//! **Invariant:** the topology of a handle only moves forward by (version, epoch), and it keeps the
//! address of a node that has not registered with the master yet: a restart of the master disturbs
//! no client.

use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::{ReplicaId, ShardId};
use vasto_core::topology::Topology;

use crate::node::{Node, Pool};

/// The replica that answers reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ReadFrom {
    /// The replica that serves the shard: the primary, or the acting primary. Reads see every write
    /// that was acknowledged before them.
    #[default]
    Primary,
    /// Any replica: *eventual*, reads may lag behind by the replication delay.
    Any,
    /// A replica in this zone where there is one, else the primary: *eventual*, reads may lag
    /// behind.
    Zone(String),
}

/// The replica that takes puts and deletes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WriteTo {
    /// The replica that serves the shard: every later read at the primary sees the write.
    #[default]
    Primary,
    /// A replica in this zone where there is one that answers, else another one: *eventual*. The
    /// later event time wins everywhere, and readers elsewhere see the write once it is replicated.
    Zone(String),
}

impl WriteTo {
    /// Returns the replica to ask first.
    pub(crate) fn replica(&self) -> ReadFrom {
        match self {
            WriteTo::Primary => ReadFrom::Primary,
            WriteTo::Zone(zone) => ReadFrom::Zone(zone.clone()),
        }
    }
}

/// A topology with the nodes that it names.
pub(crate) struct Table {
    /// The known topology of the keyspace.
    pub topology: Topology,
    /// Number of this table among those of a handle.
    pub generation: u64,
    /// In the order of `topology.shards`; `None` where no address is known.
    nodes: Vec<Vec<Option<Arc<Node>>>>,
}

impl Table {
    fn new(topology: Topology, generation: u64, pool: &Pool) -> Self {
        let nodes = topology
            .shards
            .iter()
            .map(|routes| {
                routes
                    .iter()
                    .map(|route| route.address.as_deref().map(|at| pool.node(at)))
                    .collect()
            })
            .collect();
        Self { topology, generation, nodes }
    }

    /// Returns the node to ask for a shard: the first in the order of preference that is not
    /// suspect. When all are suspect, another one after each failure. Nodes in `but` are asked only
    /// when there is no other.
    pub(crate) fn node(
        &self,
        shard: ShardId,
        from: ReadFrom,
        unreachable: u32,
        but: &[Arc<Node>],
    ) -> Option<&Arc<Node>> {
        let replicas = self.nodes.get(shard.0 as usize)?;
        let routes = self.topology.routes(shard);
        let mut candidates: Vec<(usize, &Arc<Node>)> = replicas
            .iter()
            .enumerate()
            .filter_map(|(at, node)| Some((at, node.as_ref()?)))
            .collect();
        if candidates.iter().any(|(_, node)| !is_among(but, node)) {
            candidates.retain(|(_, node)| !is_among(but, node));
        }
        let preferred = match &from {
            ReadFrom::Primary => None,
            ReadFrom::Any => Some(rand::random_range(0..candidates.len().max(1))),
            ReadFrom::Zone(zone) => candidates
                .iter()
                .position(|(at, _)| routes.get(*at).is_some_and(|route| route.zone == *zone)),
        };
        let ordered = preferred.and_then(|at| candidates.get(at)).into_iter().chain(&candidates);
        let well = ordered.map(|(_, node)| *node).find(|node| !node.is_suspect());
        well.or_else(|| {
            candidates.get(unreachable as usize % candidates.len().max(1)).map(|(_, node)| *node)
        })
    }

    /// Returns the primary of a shard.
    pub(crate) fn primary(&self, shard: ShardId) -> Option<(ReplicaId, &Arc<Node>)> {
        let node = self.nodes.get(shard.0 as usize)?.first()?.as_ref()?;
        Some((self.topology.routes(shard).first()?.replica, node))
    }

    /// Returns true when a node other than `node`, and not in `but`, can be asked for the shard.
    pub(crate) fn has_other(&self, shard: ShardId, node: &Arc<Node>, but: &[Arc<Node>]) -> bool {
        let replicas = self.nodes.get(shard.0 as usize).map_or(&[][..], Vec::as_slice);
        let is_other = |other: &Arc<Node>| !Arc::ptr_eq(other, node) && !is_among(but, other);
        replicas.iter().flatten().any(|other| is_other(other) && !other.is_suspect())
    }

    /// Returns true when `other` names the same owners: cursors and groups stay valid.
    pub(crate) fn same_owners(&self, other: &Table) -> bool {
        self.topology.epoch == other.topology.epoch
            && self.topology.shards.len() == other.topology.shards.len()
    }
}

fn is_among(nodes: &[Arc<Node>], node: &Arc<Node>) -> bool {
    nodes.iter().any(|other| Arc::ptr_eq(other, node))
}

/// The sender of a topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The master, which also knows the current addresses of nodes.
    Master,
    /// A node, in a refusal: trusted for newer versions only.
    Node,
}

/// Returns the topology that follows `current` when `offered` arrives; `None` when nothing changes.
pub(crate) fn follow(
    current: &Topology,
    mut offered: Topology,
    source: Source,
) -> Option<Topology> {
    if offered.keyspace != current.keyspace {
        // The name belongs to another keyspace now: the keyspace of this handle is gone. Only the
        // master can know.
        let gone = source == Source::Master && current.active;
        return gone.then(|| Topology { active: false, ..current.clone() });
    }
    let (new, old) = ((offered.version, offered.epoch), (current.version, current.epoch));
    if new < old || (new == old && source == Source::Node) {
        return None;
    }
    let last_address = |node| {
        let mut routes = current.shards.iter().flatten();
        routes
            .find(|route| route.node == node && route.address.is_some())
            .and_then(|route| route.address.clone())
    };
    for route in offered.shards.iter_mut().flatten() {
        if route.address.is_none() {
            route.address = last_address(route.node);
        }
    }
    (offered != *current).then_some(offered)
}

/// Groups items by the shard that their hash belongs to; positions keep their order within a group.
pub(crate) fn group_by_shard(
    topology: &Topology,
    positions: &[usize],
    hash_of: impl Fn(usize) -> u64,
) -> Vec<(ShardId, Vec<usize>)> {
    let mut groups: Vec<(ShardId, Vec<usize>)> = Vec::new();
    let mut group_of = vec![usize::MAX; topology.shards.len().max(1)];
    for &position in positions {
        let shard = topology.shard_of(hash_of(position));
        let slot = &mut group_of[shard.0 as usize];
        if *slot == usize::MAX {
            *slot = groups.len();
            groups.push((shard, Vec::new()));
        }
        groups[*slot].1.push(position);
    }
    groups
}

/// The table in force and the notification of its changes.
pub(crate) struct Routing {
    table: ArcSwap<Table>,
    generation: watch::Sender<u64>,
    changing: Mutex<()>,
    pool: Arc<Pool>,
}

impl Routing {
    pub(crate) fn new(topology: Topology, pool: Arc<Pool>) -> Self {
        let table = Table::new(topology, 1, &pool);
        Self {
            table: ArcSwap::from_pointee(table),
            generation: watch::Sender::new(1),
            changing: Mutex::new(()),
            pool,
        }
    }

    /// Returns the token that is cancelled when the client is closed.
    pub(crate) fn closed(&self) -> &CancellationToken {
        self.pool.closed()
    }

    /// Returns the table in force.
    pub(crate) fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// Adopts a topology if it is newer.
    pub(crate) fn offer(&self, offered: Topology, source: Source) {
        let _one_at_a_time = self.changing.lock();
        let current = self.table.load();
        if let Some(next) = follow(&current.topology, offered, source) {
            tracing::debug!(keyspace = %next.name, version = %next.version, epoch = %next.epoch,
                shards = next.shards.len(), active = next.active, "topology");
            let generation = current.generation + 1;
            self.table.store(Arc::new(Table::new(next, generation, &self.pool)));
            self.generation.send_replace(generation);
        }
    }

    /// Waits until the table is newer than `generation`.
    pub(crate) async fn newer_than(&self, generation: u64) {
        let mut changes = self.generation.subscribe();
        // An error would mean that the sender was dropped, and `self` holds it.
        let _ = changes.wait_for(|now| *now > generation).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use vasto_core::catalog::Ack;
    use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, NodeId, ReplicaId};
    use vasto_core::topology::Route;

    fn topology(version: u64, epoch: u64, addresses: &[Option<&str>]) -> Topology {
        Topology {
            keyspace: KeyspaceId(1),
            name: "ks".into(),
            version: CatalogVersion(version),
            epoch: Epoch(epoch),
            active: true,
            ack: Ack::Fsync,
            ttl_ms: None,
            shards: addresses
                .iter()
                .enumerate()
                .map(|(shard, address)| {
                    vec![Route {
                        replica: ReplicaId(shard as u64 + 1),
                        node: NodeId(shard as u64 + 1),
                        address: address.map(str::to_owned),
                        zone: String::new(),
                    }]
                })
                .collect(),
        }
    }

    #[test]
    fn only_news_is_followed() {
        let now = topology(5, 3, &[Some("a")]);
        for source in [Source::Master, Source::Node] {
            assert_eq!(follow(&now, topology(4, 3, &[Some("b")]), source), None);
            assert_eq!(follow(&now, now.clone(), source), None);
            let next = topology(6, 4, &[Some("b")]);
            assert_eq!(follow(&now, next.clone(), source), Some(next));
        }
        let moved = topology(5, 3, &[Some("b")]);
        assert_eq!(follow(&now, moved.clone(), Source::Master), Some(moved.clone()));
        assert_eq!(follow(&now, moved, Source::Node), None);
    }

    #[test]
    fn a_restarted_master_takes_no_address_away() {
        let now = topology(5, 3, &[Some("a"), Some("b")]);
        assert_eq!(follow(&now, topology(5, 3, &[None, None]), Source::Master), None);
        let partly = follow(&now, topology(6, 4, &[None, Some("c")]), Source::Master).unwrap();
        assert_eq!(partly, topology(6, 4, &[Some("a"), Some("c")]));
    }

    #[test]
    fn another_keyspace_of_the_same_name_ends_the_handle() {
        let now = topology(5, 3, &[Some("a")]);
        let other = Topology { keyspace: KeyspaceId(2), ..topology(1, 1, &[Some("a")]) };
        assert_eq!(follow(&now, other.clone(), Source::Node), None);
        assert!(!follow(&now, other, Source::Master).unwrap().active);
    }

    proptest! {
        #[test]
        fn groups_hold_every_position_once_in_order(hashes: Vec<u64>, shards in 1usize..20) {
            let topology = topology(1, 1, &vec![None; shards]);
            let positions: Vec<usize> = (0..hashes.len()).collect();
            let groups = group_by_shard(&topology, &positions, |at| hashes[at]);
            let mut seen = Vec::new();
            for (shard, group) in groups {
                prop_assert!(group.is_sorted());
                for at in group {
                    prop_assert_eq!(topology.shard_of(hashes[at]), shard);
                    seen.push(at);
                }
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, positions);
        }
    }
}
