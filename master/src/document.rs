//! The JSON documents for scripts, exactly as the interface promises them.
//!
//! **Invariant:** pure views of the state; fields are added, never renamed or removed. A figure that no
//! node has reported is `null`, never made up.

use std::collections::BTreeSet;

use serde::Serialize;
use vasto_core::catalog::{Ack, Catalog, KeyspaceState, Quarantine};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, ReplicaId, ShardId};
use vasto_core::operation::{OperationOutcome, OperationReport, operation_id};
use vasto_core::plan::{Plan, Step};
use vasto_core::report::{ReplicaPhase, ReplicaReport, TargetProgress, TargetStage};
use vasto_shipping::Usage;

use crate::cost::{CostDoc, usage_of};
use crate::state::{ClusterState, Keyspace, Node};

/// The assumed rate at which objects of one source are read, rewritten and ingested, bytes a second.
const ASSUMED_BYTES_PER_SECOND: u64 = 50 << 20;
/// Fixed costs of a resize: checkpoint, tail, seal.
const ASSUMED_SECONDS: f64 = 2.0;
/// The most bytes of an object that one GET takes.
const BYTES_PER_GET: u64 = 8 << 20;
/// A node with less free disk than this gets a warning.
const DISK_FREE_MIN: u64 = 1 << 30;

/// `keyspace describe`.
#[derive(Serialize)]
pub(crate) struct KeyspaceDoc {
    name: String,
    shards: u32,
    replicas: u32,
    epoch: Epoch,
    ack: Ack,
    state: KeyspaceState,
    placement: Vec<ShardDoc>,
    operation: Option<RunningDoc>,
    keyspace_id: KeyspaceId,
    version: CatalogVersion,
    ttl_ms: Option<u64>,
    quarantines: Vec<Quarantine>,
}

#[derive(Serialize)]
struct ShardDoc {
    shard: ShardId,
    replicas: Vec<ReplicaDoc>,
}

#[derive(Serialize)]
struct ReplicaDoc {
    node_id: NodeId,
    replica_id: ReplicaId,
    role: &'static str,
    state: &'static str,
    lsn: Option<Lsn>,
    shipped_lsn: Option<Lsn>,
    lag_ms: Option<u64>,
    keys: Option<u64>,
    /// The same number under its accurate name.
    keys_estimate: Option<u64>,
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// One line of `keyspace list`.
#[derive(Serialize)]
pub(crate) struct KeyspaceSummary {
    name: String,
    keyspace_id: KeyspaceId,
    shards: u32,
    replicas: u32,
    epoch: Epoch,
    ack: Ack,
    state: KeyspaceState,
    version: CatalogVersion,
    keys: u64,
    /// The same number under its accurate name.
    keys_estimate: u64,
    bytes: u64,
    operation: Option<String>,
}

/// A running operation.
#[derive(Serialize)]
pub(crate) struct RunningDoc {
    id: String,
    kind: &'static str,
    keyspace: String,
    from: u32,
    to: u32,
    state: &'static str,
    step: Step,
    waiting_for: Option<String>,
    bytes_done: u64,
    bytes_total: u64,
    keys_moved: u64,
    started_at_us: u64,
    targets: Vec<TargetDoc>,
}

#[derive(Serialize)]
struct TargetDoc {
    shard: ShardId,
    replica_id: ReplicaId,
    node_id: NodeId,
    stage: Option<TargetStage>,
}

/// A finished operation.
#[derive(Serialize)]
pub(crate) struct FinishedDoc {
    #[serde(flatten)]
    report: OperationReport,
    state: &'static str,
}

/// A running or finished operation, newest first in lists.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum OperationDoc {
    Running(Box<RunningDoc>),
    Finished(Box<FinishedDoc>),
}

/// `keyspace resize --plan`.
#[derive(Serialize)]
pub(crate) struct EstimateDoc {
    keyspace: String,
    from: u32,
    to: u32,
    moving_fraction: f64,
    sources: Vec<SourceDoc>,
    requests: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct SourceDoc {
    shard: ShardId,
    keys: u64,
    bytes: u64,
    bytes_to_read: u64,
}

/// One node, in `node list` and `cluster status`.
#[derive(Serialize)]
pub(crate) struct NodeDoc {
    node_id: NodeId,
    address: Option<String>,
    zone: Option<String>,
    state: &'static str,
    disk_used: Option<u64>,
    disk_free: Option<u64>,
    pid: Option<u32>,
    replicas: usize,
    away_ms: u64,
    cordoned: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreachable: Option<String>,
    bucket_requests: Option<RequestsDoc>,
    /// The fault that keeps the node from shipping.
    bucket_trouble: Option<String>,
}

/// Requests to the bucket since the process opened it.
#[derive(Serialize)]
struct RequestsDoc {
    get: u64,
    put: u64,
    list: u64,
    head: u64,
    delete: u64,
    bytes_read: u64,
    bytes_written: u64,
    elapsed_s: u64,
}

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

impl ClusterDoc {
    /// Puts these warnings before the others.
    pub(crate) fn with_warnings(mut self, first: Vec<String>) -> Self {
        self.warnings.splice(0..0, first);
        self
    }
}

/// Serializes a document.
pub(crate) fn json(document: &impl Serialize) -> String {
    serde_json::to_string(document).expect("documents have only string keys")
}

/// Returns the document of `keyspace describe`.
pub(crate) fn keyspace(state: &ClusterState, known: &Keyspace) -> KeyspaceDoc {
    let catalog = &known.catalog;
    let placement = catalog.placement.iter().map(|shard| ShardDoc {
        shard: shard.shard,
        replicas: shard
            .replicas
            .iter()
            .map(|one| {
                let primary = shard.primary() == Some(*one);
                replica(state, known.reports.get(&one.replica), one.replica, one.node, primary)
            })
            .chain(catalog.draining.iter().filter(|one| one.shard == shard.shard).map(|one| ReplicaDoc {
                role: "leaving",
                state: "draining",
                ..replica(state, known.reports.get(&one.replica), one.replica, one.node, false)
            }))
            .collect(),
    });
    KeyspaceDoc {
        name: catalog.name.clone(),
        shards: catalog.spec.shards,
        replicas: catalog.spec.replicas,
        epoch: catalog.epoch,
        ack: catalog.spec.ack,
        state: catalog.state,
        placement: placement.collect(),
        operation: running(known).map(|doc| *doc),
        keyspace_id: catalog.keyspace,
        version: catalog.version,
        ttl_ms: catalog.spec.ttl_ms,
        quarantines: catalog.quarantines.clone(),
    }
}

fn replica(
    state: &ClusterState,
    report: Option<&ReplicaReport>,
    id: ReplicaId,
    node: NodeId,
    primary: bool,
) -> ReplicaDoc {
    let (phase, reason) = replica_state(state, report, node);
    ReplicaDoc {
        node_id: node,
        replica_id: id,
        role: if primary { "primary" } else { "replica" },
        state: phase,
        lsn: report.map(|report| report.lsn),
        shipped_lsn: report.map(|report| report.shipped_lsn),
        lag_ms: report.map(|report| report.replication.lag_ms),
        keys: report.map(|report| report.keys),
        keys_estimate: report.map(|report| report.keys),
        bytes: report.map(|report| report.bytes),
        reason,
    }
}

fn replica_state(state: &ClusterState, report: Option<&ReplicaReport>, node: NodeId) -> (&'static str, Option<String>) {
    if state.nodes.get(&node).is_none_or(|node| node.session.is_none()) {
        return ("away", None);
    }
    match report.map(|report| &report.phase) {
        None => ("unknown", None),
        Some(ReplicaPhase::Opening) => ("opening", None),
        Some(ReplicaPhase::Building) => ("building", None),
        Some(ReplicaPhase::Serving) if report.is_some_and(|report| report.replication.stalled) => {
            let reason = "its disk does not answer writes, or did not a moment ago; another replica serves where there is \
                          one: look at the disk of the node";
            ("stalled", Some(reason.to_owned()))
        }
        Some(ReplicaPhase::Serving) if report.is_some_and(|report| !report.replication.ready) => ("catching_up", None),
        Some(ReplicaPhase::Serving) => ("serving", None),
        Some(ReplicaPhase::Failed(reason)) => ("failed", Some(reason.clone())),
    }
}

/// Returns what keeps a keyspace from serving; empty when every replica serves.
pub(crate) fn not_serving(state: &ClusterState, known: &Keyspace) -> Vec<String> {
    let catalog = &known.catalog;
    let all = catalog.placement.iter().flat_map(|shard| shard.replicas.iter().map(move |one| (shard.shard, one)));
    all.filter_map(|(shard, one)| match replica_state(state, known.reports.get(&one.replica), one.node) {
        ("serving", _) => None,
        (phase, None) => Some(format!("shard {shard} of {} on {} is {phase}", catalog.name, one.node)),
        (phase, Some(reason)) => {
            Some(format!("shard {shard} of {} on {} has {phase}: {reason}", catalog.name, one.node))
        }
    })
    .collect()
}

/// Returns one line of `keyspace list`.
pub(crate) fn summary(known: &Keyspace) -> KeyspaceSummary {
    let catalog = &known.catalog;
    let placed = catalog.placement.iter().filter_map(|shard| known.reports.get(&shard.replicas.first()?.replica));
    let (keys, bytes) = placed.fold((0, 0), |(keys, bytes), one| (keys + one.keys, bytes + one.bytes));
    KeyspaceSummary {
        name: catalog.name.clone(),
        keyspace_id: catalog.keyspace,
        shards: catalog.spec.shards,
        replicas: catalog.spec.replicas,
        epoch: catalog.epoch,
        ack: catalog.spec.ack,
        state: catalog.state,
        version: catalog.version,
        keys,
        keys_estimate: keys,
        bytes,
        operation: catalog.plan.as_ref().map(|plan| operation_id(catalog.keyspace, plan.id)),
    }
}

/// Returns the running operation of a keyspace.
pub(crate) fn running(known: &Keyspace) -> Option<Box<RunningDoc>> {
    let mut doc = running_of(&known.catalog)?;
    doc.waiting_for = known.waiting_for.clone();
    let plan = known.catalog.plan.as_ref()?;
    for (target, described) in plan.targets.iter().zip(&mut doc.targets) {
        if let Some(progress) = progress_of(known, plan, target.replica) {
            described.stage = Some(progress.stage);
            doc.bytes_done += progress.bytes_done;
            doc.bytes_total += progress.bytes_total;
            doc.keys_moved += progress.keys_moved;
        }
    }
    Some(doc)
}

/// Returns the running operation from a catalog alone, before anything is reported.
pub(crate) fn running_of(catalog: &Catalog) -> Option<Box<RunningDoc>> {
    let plan = catalog.plan.as_ref()?;
    let (from, to) = plan.growth().unwrap_or((catalog.spec.shards, catalog.spec.shards));
    let target = |target: &vasto_core::plan::Target| TargetDoc {
        shard: target.shard,
        replica_id: target.replica,
        node_id: target.node,
        stage: None,
    };
    Some(Box::new(RunningDoc {
        id: operation_id(catalog.keyspace, plan.id),
        kind: plan.name(),
        keyspace: catalog.name.clone(),
        from,
        to,
        state: "running",
        step: plan.step,
        waiting_for: None,
        bytes_done: 0,
        bytes_total: 0,
        keys_moved: 0,
        started_at_us: plan.started_at_us,
        targets: plan.targets.iter().map(target).collect(),
    }))
}

fn progress_of<'a>(known: &'a Keyspace, plan: &Plan, replica: ReplicaId) -> Option<&'a TargetProgress> {
    known.reports.get(&replica)?.target.as_ref().filter(|progress| progress.plan == plan.id)
}

/// Returns running and finished operations of a keyspace, newest first.
pub(crate) fn operations(known: &Keyspace) -> Vec<OperationDoc> {
    let finished = known.catalog.operations.iter().rev().map(|report| OperationDoc::Finished(finished(report)));
    running(known).map(OperationDoc::Running).into_iter().chain(finished).collect()
}

/// Returns the document of a finished operation.
pub(crate) fn finished(report: &OperationReport) -> Box<FinishedDoc> {
    let state = match report.outcome {
        OperationOutcome::Done => "done",
        OperationOutcome::Aborted => "aborted",
    };
    Box::new(FinishedDoc { report: report.clone(), state })
}

impl OperationDoc {
    /// Returns the id of the operation.
    pub(crate) fn id(&self) -> &str {
        match self {
            OperationDoc::Running(doc) => &doc.id,
            OperationDoc::Finished(doc) => &doc.report.id,
        }
    }

    /// Returns when the operation started, microseconds since 1970.
    pub(crate) fn started_at_us(&self) -> u64 {
        match self {
            OperationDoc::Running(doc) => doc.started_at_us,
            OperationDoc::Finished(doc) => doc.report.started_at_us,
        }
    }
}

/// Estimates from the reports what growing to `to` shards would read and how long it would take.
pub(crate) fn estimate(known: &Keyspace, to: u32) -> EstimateDoc {
    let catalog = &known.catalog;
    let from = catalog.spec.shards;
    let moving_fraction = f64::from(to.saturating_sub(from)) / f64::from(to.max(1));
    let sources: Vec<SourceDoc> = catalog
        .placement
        .iter()
        .map(|shard| {
            let report = shard.replicas.first().and_then(|one| known.reports.get(&one.replica));
            let (keys, bytes) = report.map_or((0, 0), |report| (report.keys, report.bytes));
            // Banded SSTs: only the moving keys must be read.
            SourceDoc { shard: shard.shard, keys, bytes, bytes_to_read: (bytes as f64 * moving_fraction) as u64 }
        })
        .collect();
    let bytes: u64 = sources.iter().map(|source| source.bytes_to_read).sum();
    // A manifest each, then the bytes in parts; sources and target ship with about as many requests
    // again.
    let gets: u64 = sources.iter().map(|source| 1 + source.bytes_to_read.div_ceil(BYTES_PER_GET)).sum();
    EstimateDoc {
        keyspace: catalog.name.clone(),
        from,
        to,
        moving_fraction,
        requests: 2 * gets,
        seconds: ASSUMED_SECONDS + bytes as f64 / ASSUMED_BYTES_PER_SECOND as f64,
        sources,
    }
}

/// Returns every node that registered, and every node that only the catalogs name.
pub(crate) fn node_ids(state: &ClusterState) -> BTreeSet<NodeId> {
    let mut ids: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
    for known in state.active() {
        ids.extend(known.catalog.placement.iter().flat_map(|shard| &shard.replicas).map(|one| one.node));
    }
    ids
}

/// Returns the documents of all nodes.
pub(crate) fn nodes(state: &ClusterState, mono_us: u64) -> Vec<NodeDoc> {
    node_ids(state).into_iter().map(|id| node(state, id, state.nodes.get(&id), mono_us)).collect()
}

/// Returns the document of one node.
pub(crate) fn one_node(state: &ClusterState, id: NodeId, mono_us: u64) -> NodeDoc {
    node(state, id, state.nodes.get(&id), mono_us)
}

fn node(state: &ClusterState, id: NodeId, known: Option<&Node>, mono_us: u64) -> NodeDoc {
    let away_us = state.away_us(id, mono_us);
    NodeDoc {
        node_id: id,
        address: known.map(|node| node.address.clone()),
        zone: known.map(|node| node.zone.clone()),
        state: if away_us == 0 { "live" } else { "away" },
        disk_used: known.map(|node| node.disk_used),
        disk_free: known.map(|node| node.disk_free),
        pid: known.map(|node| node.pid),
        replicas: state.active().map(|known| known.catalog.members_on(id).len()).sum(),
        away_ms: away_us / 1000,
        cordoned: state.settings.is_cordoned(id),
        unreachable: known.and_then(|node| node.unreachable.clone()),
        bucket_requests: known.map(|node| requests(usage_of(&node.bucket))),
        bucket_trouble: known.map(|node| node.bucket_trouble.clone()).filter(|trouble| !trouble.is_empty()),
    }
}

fn requests(usage: Usage) -> RequestsDoc {
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

/// Returns one warning that names the shards without a live node, and the remedy.
fn lost_shards(state: &ClusterState) -> Option<String> {
    const NAMED: usize = 5;
    let is_gone = |node: NodeId| state.nodes.get(&node).is_none_or(|node| node.session.is_none());
    let mut shards = Vec::new();
    let mut nodes = BTreeSet::new();
    for known in state.active() {
        for shard in &known.catalog.placement {
            if shard.replicas.iter().all(|one| is_gone(one.node)) {
                shards.push(format!("shard {} of {}", shard.shard, known.catalog.name));
                nodes.extend(shard.replicas.iter().map(|one| one.node));
            }
        }
    }
    if shards.is_empty() {
        return None;
    }
    let more = shards.len().saturating_sub(NAMED);
    shards.truncate(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    Some(format!(
        "nothing of {}{more} can be read: no node that holds it is there; start {}, or `vasto node replace` each that \
         is lost for good: what the bucket holds is taken over then",
        shards.join(", "),
        nodes.join(" or ")
    ))
}

/// Returns the document of `cluster status`.
pub(crate) fn cluster(
    state: &ClusterState,
    cluster_id: &str,
    bucket: &str,
    own: Usage,
    bill: CostDoc,
    mono_us: u64,
) -> ClusterDoc {
    let nodes = nodes(state, mono_us);
    let mut warnings = Vec::new();
    for node in &nodes {
        if node.state == "away" {
            let seconds = node.away_ms / 1000;
            warnings
                .push(format!("{} has been away for {seconds} s; it holds {} replicas", node.node_id, node.replicas));
        }
        if let (Some(cause), "live") = (&node.unreachable, node.state) {
            warnings.push(format!(
                "{} cannot be reached at {}, where it says that others do: {cause}; clients may fail there; restart it \
                 with --advertise HOST:PORT that they can connect to",
                node.node_id,
                node.address.as_deref().unwrap_or("-")
            ));
        }
        if let (Some(used), Some(free)) = (node.disk_used, node.disk_free)
            && used + free > 0
            && (free < DISK_FREE_MIN || free < (used + free) / 20)
        {
            warnings.push(format!("{} has only {} MiB of disk left", node.node_id, free >> 20));
        }
    }
    warnings.extend(lost_shards(state));
    for node in nodes.iter().filter(|node| node.state == "live") {
        warnings.extend(node.bucket_trouble.iter().map(|trouble| format!("{} does not ship: {trouble}", node.node_id)));
    }
    // A node that is away is reported once, not once per replica.
    let replicas = state.active().flat_map(|known| not_serving(state, known));
    warnings.extend(replicas.filter(|text| !text.ends_with(" is away")));
    for known in state.active() {
        let catalog = &known.catalog;
        warnings.extend(catalog.draining.iter().map(|one| {
            format!(
                "replica {} of shard {} of {} has left and may hold writes that nobody else has: start {} so that it \
                 is drained, or give them up with `vasto keyspace evict {} --replica {} --accept-loss --yes`, or all of \
                 its node with `vasto node replace {} --accept-loss --yes`; deletes are remembered until then",
                one.replica, one.shard, catalog.name, one.node, catalog.name, one.replica, one.node
            )
        }));
        let few = catalog.placement.iter().filter(|shard| shard.replicas.len() < catalog.spec.replicas as usize);
        warnings.extend(few.map(|shard| {
            format!(
                "shard {} of {} has {} of {} replicas; a live node without one of it gets a copy",
                shard.shard,
                catalog.name,
                shard.replicas.len(),
                catalog.spec.replicas
            )
        }));
    }
    ClusterDoc {
        cluster_id: cluster_id.to_owned(),
        term: 0,
        nodes,
        keyspaces: state.active().map(summary).collect(),
        warnings,
        master: MasterDoc { pid: std::process::id(), bucket: bucket.to_owned(), bucket_requests: requests(own) },
        bill,
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
