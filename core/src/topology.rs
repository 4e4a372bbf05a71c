//! The routing table of a client: which node serves which shard, at which epoch.
//!
//! **Invariant:** a topology is derived from one catalog version and the nodes' present addresses,
//! never edited. Routing is a pure function of it and a partition hash.

use crate::catalog::{Ack, Catalog, KeyspaceState, Placed};
use crate::hash::jump;
use crate::ids::{CatalogVersion, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};

/// One replica as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// `host:port` of the node's data service; `None` while the master does not know the node.
    pub address: Option<String>,
    /// Zone of the node; empty when none is set.
    pub zone: String,
}

/// Address and zone of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeAddress {
    /// `host:port` of its data service.
    pub address: String,
    /// Its zone; empty when none is set.
    pub zone: String,
}

/// Places of the shards of a keyspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// Its name.
    pub name: String,
    /// The catalog version it is derived from.
    pub version: CatalogVersion,
    /// The epoch that requests carry.
    pub epoch: Epoch,
    /// False once the keyspace was deleted.
    pub active: bool,
    /// Default acknowledgement.
    pub ack: Ack,
    /// Default time to live, milliseconds.
    pub ttl_ms: Option<u64>,
    /// Replicas of each shard, primary first; the index is the shard.
    pub shards: Vec<Vec<Route>>,
}

impl Topology {
    /// Derives the topology; `address_of` returns the present address of a node.
    pub fn derive(catalog: &Catalog, address_of: impl Fn(NodeId) -> Option<NodeAddress>) -> Self {
        Self {
            keyspace: catalog.keyspace,
            name: catalog.name.clone(),
            version: catalog.version,
            epoch: catalog.epoch,
            active: catalog.state == KeyspaceState::Active,
            ack: catalog.spec.ack,
            ttl_ms: catalog.spec.ttl_ms,
            shards: catalog
                .placement
                .iter()
                .map(|shard| {
                    let route = |member: Placed| {
                        let (address, zone) = match address_of(member.node) {
                            Some(listed) => (Some(listed.address), listed.zone),
                            None => (None, String::new()),
                        };
                        Route { replica: member.replica, node: member.node, address, zone }
                    };
                    shard.primary_first().into_iter().map(route).collect()
                })
                .collect(),
        }
    }

    /// Returns the shard of a partition hash.
    pub fn shard_of(&self, partition_hash: u64) -> ShardId {
        jump(partition_hash, self.shards.len().max(1) as u32).shard
    }

    /// Returns the replicas of a shard, primary first; empty for a shard that does not exist.
    pub fn routes(&self, shard: ShardId) -> &[Route] {
        self.shards.get(shard.0 as usize).map_or(&[], Vec::as_slice)
    }
}
