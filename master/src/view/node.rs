//! Nodes, and the requests that a process has sent to the bucket.

use std::collections::BTreeMap;

use serde::Serialize;
use vasto_core::ids::NodeId;
use vasto_shipping::Usage;

use super::cost::usage_of;
use crate::state::ClusterState;

/// One node, in `node list` and `cluster status`.
#[derive(Serialize)]
pub(crate) struct NodeDoc {
    pub(super) node_id: NodeId,
    pub(super) address: Option<String>,
    zone: Option<String>,
    pub(super) state: &'static str,
    pub(super) disk_used: Option<u64>,
    pub(super) disk_free: Option<u64>,
    pid: Option<u32>,
    pub(super) replicas: usize,
    pub(super) away_ms: u64,
    cordoned: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unreachable: Option<String>,
    bucket_requests: Option<RequestsDoc>,
    /// The fault that keeps the node from shipping.
    pub(super) bucket_trouble: Option<String>,
}

/// Requests to the bucket since the process opened it.
#[derive(Serialize)]
pub(super) struct RequestsDoc {
    get: u64,
    put: u64,
    list: u64,
    head: u64,
    delete: u64,
    bytes_read: u64,
    bytes_written: u64,
    elapsed_s: u64,
}

/// Returns the documents of all nodes.
pub(crate) fn nodes(state: &ClusterState, mono_us: u64) -> Vec<NodeDoc> {
    // In one pass: a cluster may have thousands of keyspaces.
    let mut replicas: BTreeMap<NodeId, usize> = BTreeMap::new();
    for (_, member, _) in state.active().flat_map(|keyspace| keyspace.catalog.members()) {
        *replicas.entry(member.node).or_default() += 1;
    }
    let of = |id: NodeId| replicas.get(&id).copied().unwrap_or_default();
    state.node_ids().into_iter().map(|id| described(state, id, of(id), mono_us)).collect()
}

/// Returns the document of one node.
pub(crate) fn node(state: &ClusterState, id: NodeId, mono_us: u64) -> NodeDoc {
    let replicas = state.active().map(|keyspace| keyspace.catalog.members_on(id).len()).sum();
    described(state, id, replicas, mono_us)
}

fn described(state: &ClusterState, id: NodeId, replicas: usize, mono_us: u64) -> NodeDoc {
    let node = state.nodes.get(&id);
    let away_us = state.away_us(id, mono_us);
    NodeDoc {
        node_id: id,
        address: node.map(|node| node.address.clone()),
        zone: node.map(|node| node.zone.clone()),
        state: if away_us == 0 { "live" } else { "away" },
        disk_used: node.map(|node| node.disk_used),
        disk_free: node.map(|node| node.disk_free),
        pid: node.map(|node| node.pid),
        replicas,
        away_ms: away_us / 1000,
        cordoned: state.settings.is_cordoned(id),
        unreachable: node.and_then(|node| node.unreachable.clone()),
        bucket_requests: node.map(|node| requests(usage_of(&node.bucket))),
        bucket_trouble: node
            .map(|node| node.bucket_trouble.clone())
            .filter(|trouble| !trouble.is_empty()),
    }
}

/// Returns the requests of a process.
pub(super) fn requests(usage: Usage) -> RequestsDoc {
    let Usage { counts, elapsed } = usage;
    RequestsDoc {
        get: counts.get,
        put: counts.put,
        list: counts.list,
        head: counts.head,
        delete: counts.delete,
        bytes_read: counts.bytes_read,
        bytes_written: counts.bytes_written,
        elapsed_s: elapsed.as_secs(),
    }
}
