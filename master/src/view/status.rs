//! The cluster as a whole, with warnings for the operator: `cluster status` and `cluster check`.
//!
//! **Invariant:** both say the same: a check fails exactly when the status warns.

use std::collections::BTreeSet;

use serde::Serialize;
use vasto_core::ids::NodeId;
use vasto_shipping::Usage;

use super::cost::CostDoc;
use super::keyspace::{KeyspaceSummary, not_serving, summary};
use super::node::{NodeDoc, RequestsDoc, nodes, requests};
use super::plan::{TroubleDoc, moving, running};
use crate::state::{ClusterState, Keyspace};

/// A node with less free disk than this gets a warning.
const DISK_FREE_MIN: u64 = 1 << 30;
/// The most shards that a warning names.
const SHARDS_NAMED: usize = 5;
/// The most warnings of one kind that are told one by one: the loss of a node concerns hundreds of
/// replicas.
const TOLD_OF_A_KIND: usize = 20;

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

/// What a warning is about.
#[derive(Serialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Check {
    /// The bucket, as this master sees it.
    Bucket,
    /// Nodes: here, reachable, with disk.
    Nodes,
    /// Every shard has a live node.
    Shards,
    /// The nodes reach the bucket.
    Shipping,
    /// Every replica serves, and every shard has all of its replicas.
    Replicas,
    /// Running operations go on.
    Operations,
}

impl Check {
    const ALL: [Check; 6] = [
        Check::Bucket,
        Check::Nodes,
        Check::Shards,
        Check::Shipping,
        Check::Replicas,
        Check::Operations,
    ];
}

/// `cluster check`.
#[derive(Serialize)]
pub(crate) struct CheckDoc {
    ok: bool,
    findings: Vec<FindingDoc>,
}

/// One warning, or a check that found none.
#[derive(Serialize)]
struct FindingDoc {
    check: Check,
    ok: bool,
    message: String,
}

/// Returns the document of `cluster check`: every warning of `cluster status`, check by check.
/// `of_bucket`: the warnings that do not come from the state.
pub(crate) fn check(state: &ClusterState, of_bucket: Vec<String>, mono_us: u64) -> CheckDoc {
    let of_bucket = of_bucket.into_iter().map(|text| (Check::Bucket, text));
    let found: Vec<(Check, String)> =
        of_bucket.chain(warnings(state, &nodes(state, mono_us))).collect();
    let findings = Check::ALL.into_iter().flat_map(|check| {
        let of_check = found.iter().filter(|(of, _)| *of == check);
        let mut findings: Vec<FindingDoc> = of_check
            .map(|(_, message)| FindingDoc { check, ok: false, message: message.clone() })
            .collect();
        if findings.is_empty() {
            findings.push(FindingDoc { check, ok: true, message: "nothing to warn of".into() });
        }
        findings
    });
    CheckDoc { ok: found.is_empty(), findings: findings.collect() }
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
    let of_state = warnings(state, &nodes).into_iter().map(|(_, text)| text);
    let warnings = first.into_iter().chain(of_state).collect();
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

/// Returns the warnings that the state gives, each with its check.
fn warnings(state: &ClusterState, nodes: &[NodeDoc]) -> Vec<(Check, String)> {
    let mut warnings: Vec<(Check, String)> = Vec::new();
    let mut add = |check: Check, texts: Vec<String>| {
        warnings.extend(few_of(texts).into_iter().map(|text| (check, text)));
    };
    add(Check::Nodes, nodes.iter().flat_map(of_node).collect());
    add(Check::Shards, lost_shards(state).into_iter().collect());
    let live = nodes.iter().filter(|node| node.state == "live");
    let cut_off = live.filter_map(|node| {
        let trouble = node.bucket_trouble.as_ref()?;
        Some(format!("{} does not ship: {trouble}", node.node_id))
    });
    add(Check::Shipping, cut_off.collect());
    // A node that is away is reported once, not once per replica.
    let replicas = state.active().flat_map(|keyspace| not_serving(state, keyspace));
    add(Check::Replicas, replicas.filter(|text| !text.ends_with(" is away")).collect());
    add(Check::Replicas, state.active().flat_map(of_draining).collect());
    add(Check::Replicas, state.active().flat_map(of_shards).collect());
    add(Check::Operations, state.active().flat_map(of_plans).collect());
    add(Check::Operations, of_wholes(state));
    warnings
}

/// Returns the first warnings of a kind, and one that says how many more there are.
fn few_of(mut texts: Vec<String>) -> Vec<String> {
    let more = texts.len().saturating_sub(TOLD_OF_A_KIND);
    if more > 0 {
        texts.truncate(TOLD_OF_A_KIND);
        texts.push(format!(
            "and {more} more warnings like the last one; `vasto keyspace describe` tells those of a keyspace"
        ));
    }
    texts
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

/// Returns the warnings about running operations of a keyspace that do not go on.
fn of_plans(keyspace: &Keyspace) -> Vec<String> {
    let name = &keyspace.catalog.name;
    let docs = running(keyspace).into_iter().chain(moving(keyspace));
    let held_up = docs.filter_map(|doc| {
        let trouble = doc.trouble.as_ref()?;
        Some(not_gone_on(&format!("operation {} on {name}", doc.id), trouble))
    });
    held_up.collect()
}

/// Returns the warnings about drains and the rebalance that do not go on while no part of them runs.
fn of_wholes(state: &ClusterState) -> Vec<String> {
    let drains = state.stuck_drains().into_iter();
    let drains = drains.map(|(id, trouble)| (id.to_owned(), TroubleDoc::from(trouble)));
    let rebalance = state.settings.running_rebalance().and_then(|running| {
        let trouble = state.rebalance_watch.trouble.as_ref()?;
        Some((running.operation_id(), TroubleDoc::from(trouble)))
    });
    let held_up = drains.chain(rebalance);
    held_up.map(|(id, trouble)| not_gone_on(&format!("operation {id}"), &trouble)).collect()
}

fn not_gone_on(who: &str, trouble: &TroubleDoc) -> String {
    let TroubleDoc { since_ms, what, next } = trouble;
    format!("{who} has not gone on for {} s: {what}; {next}", since_ms / 1000)
}

/// Returns the warnings about draining replicas of a keyspace.
fn of_draining(keyspace: &Keyspace) -> Vec<String> {
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
    draining.collect()
}

/// Returns the warnings about shards of a keyspace with too few replicas.
fn of_shards(keyspace: &Keyspace) -> Vec<String> {
    let catalog = &keyspace.catalog;
    let name = &catalog.name;
    let wanted = catalog.spec.replicas as usize;
    let few = catalog.placement.iter().filter(|shard| shard.replicas.len() < wanted).map(|shard| {
        let (shard, there) = (shard.shard, shard.replicas.len());
        format!("shard {shard} of {name} has {there} of {wanted} replicas; a live node without one of it gets a copy")
    });
    few.collect()
}
