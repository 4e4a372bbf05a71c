//! The drain of a node across all keyspaces: `node drain`, `node replace`, and its part of
//! `operation list|show`.

use std::collections::BTreeSet;

use serde::Serialize;
use vasto_core::catalog::{Catalog, KeyspaceState, NodeDrain};
use vasto_core::estimate::Estimate;
use vasto_core::ids::{Lsn, NodeId, ReplicaId, ShardId};
use vasto_core::operation::{OperationOutcome, OperationReport};
use vasto_core::reconcile::{drain_of_plan, so_far};
use vasto_core::report::PauseMs;

use super::plan::{RunningDoc, TroubleDoc, running};
use super::whole::{ProgressDoc, TotalsDoc, UnderWayDoc};
use crate::state::{ClusterState, Keyspace};

/// The drain of a node.
#[derive(Serialize)]
pub(crate) struct DrainDoc {
    pub(super) id: String,
    kind: &'static str,
    /// The names of all keyspaces that have, or had, a part in it.
    keyspace: String,
    from: NodeId,
    to: Option<NodeId>,
    #[serde(flatten)]
    progress: ProgressDoc,
    replicas_moved: u64,
    replicas_left: usize,
    #[serde(flatten)]
    pub(super) totals: TotalsDoc,
    reached: Vec<ReachedDoc>,
    /// What was estimated before it began, of all keyspaces together.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<Estimate>,
}

/// The end of a log that was read from the bucket.
#[derive(Serialize)]
struct ReachedDoc {
    keyspace: String,
    shard: ShardId,
    replica: ReplicaId,
    lsn: Lsn,
}

/// Returns true for ids of operations that drain a node.
pub(crate) fn is_drain(id: &str) -> bool {
    id.starts_with("node-")
}

/// Returns the drain that runs in a keyspace under this id.
pub(crate) fn drain_by<'a>(catalog: &'a Catalog, id: &str) -> Option<&'a NodeDrain> {
    catalog.draining_nodes.iter().find(|drain| drain.operation_id() == id)
}

/// Returns the drains that run or are remembered.
pub(crate) fn drains(state: &ClusterState, now_us: u64) -> Vec<DrainDoc> {
    let catalogs = || state.keyspaces.values().map(|keyspace| &keyspace.catalog);
    let running =
        catalogs().flat_map(|catalog| &catalog.draining_nodes).map(NodeDrain::operation_id);
    let ended = catalogs().flat_map(|catalog| &catalog.operations).map(|report| report.id.clone());
    let ids: BTreeSet<String> = running.chain(ended.filter(|id| is_drain(id))).collect();
    ids.iter().filter_map(|id| drain(state, id, now_us)).collect()
}

/// Returns the drain of that id; `None` when no catalog knows of it.
pub(crate) fn drain(state: &ClusterState, id: &str, now_us: u64) -> Option<DrainDoc> {
    let (node, since) = id.strip_prefix("node-")?.rsplit_once('-')?;
    let (node, since_us): (NodeId, u64) = (node.parse().ok()?, since.parse().ok()?);
    let mut keyspaces: Vec<&Keyspace> = state.keyspaces.values().collect();
    keyspaces.retain(|keyspace| {
        drain_by(&keyspace.catalog, id).is_some() || ended_in(&keyspace.catalog, id).is_some()
    });
    if keyspaces.is_empty() {
        return None;
    }
    let is_running = |catalog: &Catalog| {
        catalog.state == KeyspaceState::Active && drain_by(catalog, id).is_some()
    };
    let running: Vec<&Keyspace> =
        keyspaces.iter().copied().filter(|keyspace| is_running(&keyspace.catalog)).collect();
    let ended: Vec<&OperationReport> =
        keyspaces.iter().filter_map(|keyspace| ended_in(&keyspace.catalog, id)).collect();
    // A finished part has its figures in its own report, a running part with the draining node.
    let figures = keyspaces.iter().filter_map(|keyspace| {
        let catalog = &keyspace.catalog;
        let running = drain_by(catalog, id).map(|drain| so_far(catalog, drain, now_us));
        running.or_else(|| ended_in(catalog, id).cloned())
    });
    let figures: Vec<OperationReport> = figures.collect();
    let sum = |figure: fn(&OperationReport) -> u64| figures.iter().map(figure).sum();
    let ended_at_us = ended.iter().map(|report| report.ended_at_us()).max();
    let until_us = if running.is_empty() { ended_at_us.unwrap_or(since_us) } else { now_us };
    let mut names: Vec<&str> =
        keyspaces.iter().map(|keyspace| keyspace.catalog.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let placed = running
        .iter()
        .flat_map(|keyspace| &keyspace.catalog.placement)
        .flat_map(|shard| &shard.replicas);
    let replicas_left = placed.filter(|placed| placed.node == node).count();
    Some(DrainDoc {
        id: id.to_owned(),
        kind: "replace",
        keyspace: names.join(","),
        from: node,
        to: running
            .iter()
            .filter_map(|keyspace| drain_by(&keyspace.catalog, id))
            .find_map(|drain| drain.to),
        progress: progress(id, &running, &ended, replicas_left),
        replicas_moved: sum(|report| report.copies),
        replicas_left,
        totals: TotalsDoc {
            keys_moved: sum(|report| report.keys_moved),
            bytes_moved: sum(|report| report.bytes_moved),
            bytes_from_bucket: sum(|report| report.bytes_from_bucket),
            bytes_from_peers: sum(|report| report.bytes_from_peers),
            objects_read: sum(|report| report.objects_read),
            write_pause_ms: PauseMs::default(),
            duration_ms: until_us.saturating_sub(since_us) / 1000,
            started_at_us: since_us,
        },
        reached: figures.iter().flat_map(reached).collect(),
        estimate: estimate_of(&figures),
    })
}

fn progress(
    id: &str,
    running_in: &[&Keyspace],
    ended: &[&OperationReport],
    replicas_left: usize,
) -> ProgressDoc {
    if !running_in.is_empty() {
        let drains: Vec<&NodeDrain> =
            running_in.iter().filter_map(|keyspace| drain_by(&keyspace.catalog, id)).collect();
        // It goes on where it goes on.
        let paused = drains.iter().all(|drain| drain.paused);
        let waits = running_in.iter().find_map(|keyspace| keyspace.waiting_for.clone());
        let waiting_for = match paused {
            true => Some(format!("`vasto operation resume {id}`: it is paused")),
            false => waits,
        };
        // What changes the number of shards is no part of it, nor is a repair.
        let copies = running_in.iter().filter(|keyspace| copies_for(&keyspace.catalog, id));
        let parts: Vec<RunningDoc> = copies.filter_map(|keyspace| running(keyspace)).collect();
        let max_rate = drains.iter().find_map(|drain| drain.max_rate);
        let mut watches = running_in.iter().filter_map(|keyspace| keyspace.drains.get(id));
        let trouble = watches.find_map(|watch| watch.trouble.as_ref());
        let trouble = trouble.map(TroubleDoc::from);
        let step = format!("{replicas_left} replicas left");
        let doc = UnderWayDoc::of(step, waiting_for, &parts, max_rate, trouble);
        return doc.progress(paused);
    }
    match ended.iter().find(|report| report.outcome == OperationOutcome::Aborted) {
        Some(aborted) => ProgressDoc::Aborted { reason: aborted.reason.clone() },
        None => ProgressDoc::Done,
    }
}

/// Returns true when the running plan of a keyspace makes a replica for this drain.
fn copies_for(catalog: &Catalog, id: &str) -> bool {
    let drain = catalog.plan.as_ref().and_then(|plan| drain_of_plan(catalog, plan));
    drain.is_some_and(|drain| drain.operation_id() == id)
}

/// Adds the estimates of the keyspaces; they are drained side by side.
fn estimate_of(figures: &[OperationReport]) -> Option<Estimate> {
    let mut parts = figures.iter().filter_map(|report| report.estimate.clone());
    let first = parts.next()?;
    Some(parts.fold(first, |mut all, part| {
        all.bytes_moved += part.bytes_moved;
        all.bytes_from_bucket += part.bytes_from_bucket;
        all.objects_read += part.objects_read;
        all.objects_written += part.objects_written;
        all.duration_ms = all.duration_ms.max(part.duration_ms);
        for need in part.disk {
            match all.disk.iter_mut().find(|other| other.node == need.node) {
                Some(other) => other.bytes += need.bytes,
                None => all.disk.push(need),
            }
        }
        all
    }))
}

fn ended_in<'a>(catalog: &'a Catalog, id: &str) -> Option<&'a OperationReport> {
    catalog.operations.iter().rev().find(|report| report.id == id)
}

fn reached(report: &OperationReport) -> Vec<ReachedDoc> {
    let ends = report.reached.iter().map(|end| ReachedDoc {
        keyspace: report.keyspace.clone(),
        shard: end.shard,
        replica: end.replica,
        lsn: end.lsn,
    });
    ends.collect()
}
