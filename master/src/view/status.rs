//! The cluster as a whole, with warnings for the operator: `cluster status`.

use std::collections::BTreeSet;

use serde::Serialize;
use vasto_core::ids::NodeId;
use vasto_shipping::Usage;

use super::cost::CostDoc;
use super::keyspace::{KeyspaceSummary, not_serving, summary};
use super::node::{NodeDoc, RequestsDoc, nodes, requests};
use crate::state::{ClusterState, Keyspace};

/// A node with less free disk than this gets a warning.
const DISK_FREE_MIN: u64 = 1 << 30;
/// The most shards that a warning names.
const SHARDS_NAMED: usize = 5;

/// `cluster status`.
#[derive(Serialize)]
pub(crate) struct ClusterDoc {
    cluster_id: String,
    term: u64,
    nodes: Vec<NodeDoc>,
    keyspaces: Vec<KeyspaceSummary>,
    warnings: Vec<String>,
    master: MasterDoc,
    bill: CostDoc,
}

#[derive(Serialize)]
struct MasterDoc {
    pid: u32,
    bucket: String,
    bucket_requests: RequestsDoc,
}

/// Returns the document of `cluster status`; the warnings `first` come before those that the state
/// gives.
pub(crate) fn cluster(
    state: &ClusterState,
    cluster_id: String,
    bucket: &str,
    own: Usage,
    bill: CostDoc,
    first: Vec<String>,
    mono_us: u64,
) -> ClusterDoc {
    let nodes = nodes(state, mono_us);
    let warnings = first.into_iter().chain(warnings(state, &nodes)).collect();
    ClusterDoc {
        cluster_id,
        term: 0,
        nodes,
        keyspaces: state.active().map(summary).collect(),
        warnings,
        master: MasterDoc {
            pid: std::process::id(),
            bucket: bucket.to_owned(),
            bucket_requests: requests(own),
        },
        bill,
    }
}

fn warnings(state: &ClusterState, nodes: &[NodeDoc]) -> Vec<String> {
    let mut warnings: Vec<String> = nodes.iter().flat_map(of_node).collect();
    warnings.extend(lost_shards(state));
    for node in nodes.iter().filter(|node| node.state == "live") {
        warnings.extend(
            node.bucket_trouble
                .iter()
                .map(|trouble| format!("{} does not ship: {trouble}", node.node_id)),
        );
    }
    // A node that is away is reported once, not once per replica.
    let replicas = state.active().flat_map(|keyspace| not_serving(state, keyspace));
    warnings.extend(replicas.filter(|text| !text.ends_with(" is away")));
    warnings.extend(state.active().flat_map(of_members));
    warnings
}

/// Returns the warnings about a node itself.
fn of_node(node: &NodeDoc) -> Vec<String> {
    let id = node.node_id;
    let mut warnings = Vec::new();
    if node.state == "away" {
        let seconds = node.away_ms / 1000;
        warnings.push(format!(
            "{id} has been away for {seconds} s; it holds {} replicas",
            node.replicas
        ));
    }
    if let (Some(cause), "live") = (&node.unreachable, node.state) {
        warnings.push(format!(
            "{id} cannot be reached at {}, where it says that others do: {cause}; clients may fail there; restart it \
             with --advertise HOST:PORT that they can connect to",
            node.address.as_deref().unwrap_or("-")
        ));
    }
    if let (Some(used), Some(free)) = (node.disk_used, node.disk_free)
        && used + free > 0
        && (free < DISK_FREE_MIN || free < (used + free) / 20)
    {
        warnings.push(format!("{id} has only {} MiB of disk left", free >> 20));
    }
    warnings
}

/// Returns one warning that names the shards without a live node, and the remedy.
fn lost_shards(state: &ClusterState) -> Option<String> {
    let mut shards = Vec::new();
    let mut nodes = BTreeSet::new();
    for keyspace in state.active() {
        for shard in &keyspace.catalog.placement {
            if !shard.replicas.iter().any(|placed| state.is_live(placed.node)) {
                shards.push(format!("shard {} of {}", shard.shard, keyspace.catalog.name));
                nodes.extend(shard.replicas.iter().map(|placed| placed.node));
            }
        }
    }
    if shards.is_empty() {
        return None;
    }
    let more = shards.len().saturating_sub(SHARDS_NAMED);
    shards.truncate(SHARDS_NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    Some(format!(
        "nothing of {}{more} can be read: no node that holds it is there; start {}, or `vasto node replace` each that \
         is lost for good: what the bucket holds is taken over then",
        shards.join(", "),
        nodes.join(" or ")
    ))
}

/// Returns the warnings about draining replicas of a keyspace, and shards with too few replicas.
fn of_members(keyspace: &Keyspace) -> Vec<String> {
    let catalog = &keyspace.catalog;
    let name = &catalog.name;
    let draining = catalog.draining.iter().map(|draining| {
        let (replica, shard, node) = (draining.replica, draining.shard, draining.node);
        format!(
            "replica {replica} of shard {shard} of {name} has left and may hold writes that nobody else has: start \
             {node} so that it is drained, or give them up with `vasto keyspace evict {name} --replica {replica} \
             --accept-loss --yes`, or all of its node with `vasto node replace {node} --accept-loss --yes`; deletes \
             are remembered until then"
        )
    });
    let wanted = catalog.spec.replicas as usize;
    let few = catalog.placement.iter().filter(|shard| shard.replicas.len() < wanted).map(|shard| {
        let (shard, there) = (shard.shard, shard.replicas.len());
        format!("shard {shard} of {name} has {there} of {wanted} replicas; a live node without one of it gets a copy")
    });
    draining.chain(few).collect()
}
