//! Commands that read data from the bucket: restoring a keyspace, draining a node.
//!
//! **Invariant:** nothing is remembered here. A restore is a plan of the new keyspace, and the drain of a
//! node is in the catalogs, so any master continues both.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use vasto_core::catalog::{Catalog, KeyspaceSpec, KeyspaceState, NodeDrain};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId, PlanId};
use vasto_core::limits::{ADMIN_DEADLINE, check_keyspace_name};
use vasto_core::operation::{OperationOutcome, OperationReport, Reached};
use vasto_core::plan::{Plan, PlanKind, Step, Target};
use vasto_core::reconcile::{concerns, so_far};
use vasto_proto::v1;
use vasto_shipping::CatalogError;

use crate::admin::{self, JsonResult, ask, learn_all, taken, unsure};
use crate::cluster::{Cluster, nonce, now_us};
use crate::document;
use crate::driver::{CatalogChange, has_ended};
use crate::placement::{Shut, place};
use crate::shipped::{self, Absent, Shipped};
use crate::state::{ClusterState, Delivery, Keyspace};

/// How long nodes have to make a checkpoint of what they have shipped, before a restore.
const CHECKPOINT_FIRST: Duration = Duration::from_secs(20);
/// The age of a restore time from which no node needs to ship first.
const SHIPPED_AFTER: Duration = Duration::from_secs(600);

fn error(code: ErrorCode, message: impl Into<String>) -> VastoError {
    VastoError::new(code, message)
}

/// Starts a new keyspace from the archive of another one.
pub(crate) async fn restore(cluster: &Arc<Cluster>, request: v1::RestoreRequest) -> JsonResult {
    check_keyspace_name(&request.into).map_err(|cause| error(ErrorCode::InvalidArgument, cause.to_string()))?;
    if cluster.state().named(&request.into).is_some() {
        return Err(taken(&request.into));
    }
    let tip = last_of(&cluster.state(), &request.name)?;
    if let Some(at_us) = request.at_us.filter(|at| *at > now_us()) {
        let ahead_s = (at_us - now_us().min(at_us)).div_ceil(1_000_000);
        let message = format!("that time is {ahead_s} s in the future; leave out --at to restore what is there now");
        return Err(error(ErrorCode::InvalidArgument, message));
    }
    let mut absent = Absent::default();
    if tip.state == KeyspaceState::Active && !request.from_bucket {
        absent = ship_first(cluster, &request).await?;
    }
    let then = match request.at_us {
        None => before_its_end(cluster, &tip).await?,
        Some(at_us) => {
            let found = cluster.store.at(&tip, at_us).await;
            let found = found.map_err(|cause| error(ErrorCode::Unavailable, cause.to_string()))?;
            let missing =
                || error(ErrorCode::NotFound, format!("keyspace {} did not exist at that time", request.name));
            found.filter(|then| then.state == KeyspaceState::Active).ok_or_else(missing)?
        }
    };
    if then.plan.as_ref().is_some_and(|plan| matches!(plan.kind, PlanKind::Restore { .. })) {
        let message = format!("keyspace {} was itself being restored at that time; choose a later one", request.name);
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    if tip.state == KeyspaceState::Deleted {
        still_there(cluster, &then).await?;
    }
    cluster.refresh_settings().await;
    // The restore may need objects that count as garbage by now.
    let interrupted = vasto_shipping::garbage::interrupt(cluster.store.bucket()).await;
    interrupted.map_err(|cause| error(ErrorCode::Unavailable, cause.to_string()))?;
    let (nodes, held) = {
        let mut state = cluster.state();
        // One replica of each shard from the bucket; more are copied from it once it serves.
        let nodes = place(then.spec.shards, 1, &state.candidates(None))?;
        let hold = state.loads.hold(nodes.iter().flatten().copied(), false, 0);
        (nodes, cluster.hold_places(hold))
    };
    let spec = KeyspaceSpec { ..then.spec.clone() };
    let kind = PlanKind::Restore { keyspace: then.keyspace, version: then.version, at_us: request.at_us };
    let (started_at_us, drawn) = (now_us(), nonce());
    let build = |id: KeyspaceId| {
        let mut catalog = Catalog::first(id, &request.into, spec.clone(), &nodes, started_at_us, drawn);
        let targets = catalog.placement.iter().flat_map(|shard| {
            shard.replicas.iter().map(|one| Target { shard: shard.shard, replica: one.replica, node: one.node })
        });
        catalog.plan = Some(Plan {
            id: catalog.next_plan,
            kind,
            from_epoch: catalog.epoch,
            started_at_us,
            step: Step::Tail,
            sources: Vec::new(),
            targets: targets.collect(),
            seals_undone: 0,
        });
        catalog.next_plan = PlanId(catalog.next_plan.0 + 1);
        catalog
    };
    let what = format!("restoring {} into {}", request.name, request.into);
    let created = match timeout(ADMIN_DEADLINE, cluster.store.create_keyspace(build)).await {
        Ok(Ok(catalog)) => catalog,
        Ok(Err(CatalogError::NameTaken { .. })) => {
            learn_all(cluster).await;
            return Err(taken(&request.into));
        }
        Ok(Err(cause)) => return Err(unsure(&what, &cause.to_string())),
        Err(_) => return Err(unsure(&what, "the bucket did not answer in time")),
    };
    tracing::info!(keyspace = request.into, of = request.name, version = then.version.0, "restoring a keyspace");
    let mut started = json!(document::running_of(&created));
    if let Value::Object(fields) = &mut started {
        fields.insert("without".into(), absent.document());
    }
    cluster.install(created, Delivery::Push);
    drop(held);
    Ok(document::json(&started))
}

/// Has the nodes ship what only they hold, also for a restore to an earlier time, since older writes may not be
/// shipped yet. Returns the absent replicas: what only they hold is missing.
async fn ship_first(cluster: &Arc<Cluster>, request: &v1::RestoreRequest) -> Result<Absent, VastoError> {
    let now_us = now_us();
    // Older writes were shipped when they were new, unless the bucket was away for long.
    let is_recent = request.at_us.is_none_or(|at| at.saturating_add(SHIPPED_AFTER.as_micros() as u64) > now_us);
    let absent = match shipped::everything(cluster, &request.name).await {
        Ok(Shipped::All(absent)) => absent,
        // No replica is live: only the bucket is left.
        Ok(Shipped::NobodyIsThere) => return Ok(Absent::default()),
        Err(cause) if is_recent => {
            let message = format!(
                "{}; what was acknowledged last could be missing: start the node, or take what the bucket holds with `vasto keyspace restore {} --into {} --from-bucket`",
                cause.message, request.name, request.into
            );
            return Err(error(cause.code, message));
        }
        Err(cause) => {
            tracing::info!(keyspace = request.name, %cause, "not every node shipped what it has; the time is long past");
            Absent::default()
        }
    };
    // A new checkpoint leaves less log to read.
    if !matches!(timeout(CHECKPOINT_FIRST, shipped::checkpoint(cluster, &request.name)).await, Ok(Ok(_))) {
        tracing::info!(
            keyspace = request.name,
            "no new checkpoint of every shard; the log behind the last one is read"
        );
    }
    Ok(absent)
}

/// Returns the keyspace of that name: the one that serves, or the one that was deleted last.
fn last_of(state: &ClusterState, name: &str) -> Result<Arc<Catalog>, VastoError> {
    let all = state.keyspaces.values().filter(|known| known.catalog.name == name).map(|known| known.catalog.clone());
    let all = all.filter(|catalog| !never_was(catalog));
    all.max_by_key(|catalog| (catalog.state == KeyspaceState::Active, catalog.keyspace)).ok_or_else(|| {
        let known: Vec<&str> = state.active().map(|known| known.catalog.name.as_str()).collect();
        let known =
            if known.is_empty() { "there is none".to_owned() } else { format!("there is {}", known.join(", ")) };
        error(ErrorCode::NotFound, format!("no keyspace `{name}` is in the bucket; {known}"))
    })
}

/// Returns true for a restore that did not end: the keyspace never existed.
fn never_was(catalog: &Catalog) -> bool {
    let ended = catalog.operations.last();
    catalog.state == KeyspaceState::Deleted
        && ended.is_some_and(|last| last.kind == "restore" && last.outcome == OperationOutcome::Aborted)
}

/// Checks that the archive of a deleted keyspace was not collected since. Lists.
async fn still_there(cluster: &Cluster, then: &Catalog) -> Result<(), VastoError> {
    for shard in &then.placement {
        let prefix = vasto_shipping::layout::shard_prefix(then.keyspace, shard.shard);
        let found = cluster.store.bucket().list(&prefix).await;
        if found.map_err(|cause| error(ErrorCode::Unavailable, cause.to_string()))?.is_empty() {
            let message = format!(
                "keyspace {} was deleted, and the bucket holds nothing of shard {} any more (see bucket.keep_for)",
                then.name, shard.shard
            );
            return Err(error(ErrorCode::NotFound, message));
        }
    }
    Ok(())
}

/// Returns the last version of a keyspace before its deletion.
async fn before_its_end(cluster: &Cluster, tip: &Arc<Catalog>) -> Result<Catalog, VastoError> {
    if tip.state == KeyspaceState::Active {
        return Ok(Catalog::clone(tip));
    }
    let found = cluster.store.at(tip, tip.written_at_us.saturating_sub(1)).await;
    let found = found.map_err(|cause| error(ErrorCode::Unavailable, cause.to_string()))?;
    found.ok_or_else(|| error(ErrorCode::NotFound, format!("keyspace {} never held anything", tip.name)))
}

pub(crate) fn node_of(text: &str) -> Result<NodeId, VastoError> {
    text.parse()
        .map_err(|_| error(ErrorCode::InvalidArgument, format!("`{text}` is not a node id; see `vasto node list`")))
}

/// Begins to move all replicas of a node elsewhere.
pub(crate) async fn drain(cluster: &Arc<Cluster>, request: v1::EmptyNodeRequest) -> JsonResult {
    let node = node_of(&request.node_id)?;
    let to = Some(request.to_node_id.as_str()).filter(|id| !id.is_empty()).map(node_of).transpose()?;
    let accept_loss = request.accept_loss && request.replace;
    let drain = NodeDrain { to, accept_loss, ..NodeDrain::new(node, request.replace, now_us()) };
    cluster.refresh_settings().await;
    let concerned = check(&cluster.state(), &drain, now_us())?;
    if concerned.is_empty() {
        let message = format!(
            "node {node} has no replicas; there is nothing to move; keep it so with `vasto node cordon {node}`"
        );
        return Err(error(ErrorCode::NotFound, message));
    }
    // The drained node must not get new replicas: neither of new keyspaces nor copies of others.
    admin::cordon(cluster, node, true).await?;
    for keyspace in concerned {
        ask(cluster, keyspace, CatalogChange::DrainNode(drain.clone())).await?;
    }
    tracing::info!(%node, ?to, "moving all replicas of a node");
    node_operation(cluster, &drain.operation_id())
        .ok_or_else(|| error(ErrorCode::Internal, "the operation is not known any more"))
}

/// Returns the keyspaces with replicas on the node, when there is a target for each of them.
fn check(state: &ClusterState, drain: &NodeDrain, now_us: u64) -> Result<Vec<KeyspaceId>, VastoError> {
    let NodeDrain { node, to, replace, .. } = *drain;
    let live = |id: NodeId| state.nodes.get(&id).is_some_and(|known| known.session.is_some());
    if !replace && !live(node) {
        let message = format!("node {node} is away; replace it with `vasto node replace {node}`");
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    if let Some(to) = to
        && (to == node || !live(to))
    {
        let message = format!("node {to} cannot take over: it is {}", if to == node { "the same" } else { "away" });
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    if let Some(to) = to.filter(|to| state.settings.is_cordoned(*to)) {
        let message = format!("node {to} is cordoned; let it get replicas with `vasto node uncordon {to}` first");
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    let mut concerned = Vec::new();
    for known in state.active() {
        let mut then = Catalog::clone(&known.catalog);
        then.draining_nodes.push(drain.clone());
        let here: Vec<_> =
            known.catalog.placement.iter().filter(|shard| shard.replicas.iter().any(|one| one.node == node)).collect();
        for shard in &here {
            let staying = shard.replicas.iter().filter(|one| one.node != node).count();
            if staying < then.spec.replicas as usize && state.copy_target(&then, shard.shard, now_us).is_none() {
                let message = format!(
                    "no other live node has room for shard {} of {}; start one with `vasto serve node`{}",
                    shard.shard,
                    then.name,
                    Shut::of(&state.candidates(Some(&then)))
                );
                return Err(error(ErrorCode::FailedPrecondition, message));
            }
        }
        if concerns(&known.catalog, drain) {
            concerned.push(known.catalog.keyspace);
        }
    }
    Ok(concerned)
}

/// Returns true for ids of operations that drain a node.
pub(crate) fn is_of_node(id: &str) -> bool {
    id.starts_with("node-")
}

/// Cancels a drain: the node keeps the replicas that it still has.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> JsonResult {
    let concerned: Vec<KeyspaceId> = {
        let state = cluster.state();
        state.active().filter(|known| drain_by(&known.catalog, id).is_some()).map(|one| one.catalog.keyspace).collect()
    };
    if concerned.is_empty() {
        return Err(match node_operation(cluster, id) {
            Some(_) => has_ended(id),
            None => admin::no_operation(id),
        });
    }
    for keyspace in concerned {
        ask(cluster, keyspace, CatalogChange::Stay { operation: id.to_owned() }).await?;
    }
    tracing::info!(operation = id, "cancelled an operation");
    node_operation(cluster, id).ok_or_else(|| admin::no_operation(id))
}

/// Returns the progress of the drain of a node; `None` when no catalog knows of it.
pub(crate) fn node_operation(cluster: &Cluster, id: &str) -> Option<String> {
    describe(&cluster.state(), id).map(|(_, answer)| answer.to_string())
}

/// Returns the drains that run or are remembered, each with the time at which it began.
pub(crate) fn node_operations(state: &ClusterState) -> Vec<(u64, Value)> {
    let catalogs = || state.keyspaces.values().map(|known| &known.catalog);
    let drain = catalogs().flat_map(|catalog| &catalog.draining_nodes).map(NodeDrain::operation_id);
    let ended = catalogs().flat_map(|catalog| &catalog.operations).map(|report| report.id.clone());
    let ids: BTreeSet<String> = drain.chain(ended.filter(|id| is_of_node(id))).collect();
    ids.iter().filter_map(|id| describe(state, id)).collect()
}

fn drain_by(catalog: &Catalog, id: &str) -> Option<NodeDrain> {
    catalog.draining_nodes.iter().find(|drain| drain.operation_id() == id).cloned()
}

/// Returns one document for the operation across all keyspaces.
fn describe(state: &ClusterState, id: &str) -> Option<(u64, Value)> {
    let (node, since) = id.strip_prefix("node-")?.rsplit_once('-')?;
    let (node, since_us): (NodeId, u64) = (node.parse().ok()?, since.parse().ok()?);
    let ended_in = |catalog: &Catalog| catalog.operations.iter().rev().find(|report| report.id == id).cloned();
    let mut known: Vec<&Keyspace> = state.keyspaces.values().collect();
    known.retain(|one| drain_by(&one.catalog, id).is_some() || ended_in(&one.catalog).is_some());
    if known.is_empty() {
        return None;
    }
    let running: Vec<&Keyspace> = known
        .iter()
        .copied()
        .filter(|one| one.catalog.state == KeyspaceState::Active && drain_by(&one.catalog, id).is_some())
        .collect();
    let ended: Vec<OperationReport> = known.iter().filter_map(|one| ended_in(&one.catalog)).collect();
    // A finished part has its figures in its own report, a running part with the draining node.
    let figures: Vec<OperationReport> = known
        .iter()
        .filter_map(|one| {
            let running = drain_by(&one.catalog, id).map(|drain| so_far(&one.catalog, &drain, now_us()));
            running.or_else(|| ended_in(&one.catalog))
        })
        .collect();
    let sum = |field: fn(&OperationReport) -> u64| figures.iter().map(field).sum::<u64>();
    let moved = sum(|report| report.copies);
    let ended_us = OperationReport::ended_at_us;
    let until_us = if running.is_empty() { ended.iter().map(ended_us).max().unwrap_or(since_us) } else { now_us() };
    let aborted = ended.iter().find(|report| report.outcome == OperationOutcome::Aborted);
    let mut names: Vec<&str> = known.iter().map(|one| one.catalog.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let left: usize = running
        .iter()
        .flat_map(|known| &known.catalog.placement)
        .map(|shard| shard.replicas.iter().filter(|one| one.node == node).count())
        .sum();
    let plans: Vec<_> = running.iter().filter_map(|known| document::running(known)).collect();
    let progress = |field: &str| plans.iter().filter_map(|plan| json!(plan)[field].as_u64()).sum::<u64>();
    let waiting = running.iter().find_map(|known| known.waiting_for.clone());
    let to = running.iter().filter_map(|known| drain_by(&known.catalog, id)).find_map(|one| one.to);
    let reached = |report: &OperationReport| {
        let of = |one: &Reached| json!({"keyspace": report.keyspace, "shard": one.shard, "replica": one.replica, "lsn": one.lsn});
        report.reached.iter().map(of).collect::<Vec<_>>()
    };
    let reached: Vec<Value> = figures.iter().flat_map(reached).collect();
    let mut answer = json!({
        "id": id,
        "kind": "replace",
        "keyspace": names.join(","),
        "from": node.to_string(),
        "to": to.map(|to| to.to_string()),
        "state": match (running.is_empty(), aborted) {
            (false, _) => "running",
            (true, Some(_)) => "aborted",
            (true, None) => "done",
        },
        "replicas_moved": moved,
        "replicas_left": left,
        "keys_moved": sum(|report| report.keys_moved),
        "bytes_moved": sum(|report| report.bytes_moved),
        "bytes_from_bucket": sum(|report| report.bytes_from_bucket),
        "bytes_from_peers": sum(|report| report.bytes_from_peers),
        "objects_read": sum(|report| report.objects_read),
        "write_pause_ms": {"p50": 0.0, "p99": 0.0, "max": 0.0},
        "duration_ms": until_us.saturating_sub(since_us) / 1000,
        "started_at_us": since_us,
        "reached": reached,
    });
    let Value::Object(fields) = &mut answer else { return None };
    if !running.is_empty() {
        fields.insert("step".into(), json!(format!("{left} replicas left")));
        fields.insert("waiting_for".into(), json!(waiting));
        fields.insert("bytes_done".into(), json!(progress("bytes_done")));
        fields.insert("bytes_total".into(), json!(progress("bytes_total")));
    } else if let Some(aborted) = aborted {
        fields.insert("reason".into(), json!(aborted.reason));
    }
    Some((since_us, answer))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::reconcile::abort;
    use vasto_core::report::Reports;

    #[test]
    fn a_restore_that_was_given_up_is_not_the_keyspace_that_was_deleted() {
        let mut half = Catalog::first(KeyspaceId(2), "orders", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1_000, 1);
        let whole = Catalog { state: KeyspaceState::Deleted, ..half.clone() };
        half.plan = Some(Plan {
            id: PlanId(1),
            kind: PlanKind::Restore { keyspace: KeyspaceId(1), version: vasto_core::CatalogVersion(3), at_us: None },
            from_epoch: half.epoch,
            started_at_us: 1_000,
            step: Step::Tail,
            sources: Vec::new(),
            targets: Vec::new(),
            seals_undone: 0,
        });
        let undone = abort(&half, "a node is away", &Reports::new(), 2_000, 2).unwrap();
        assert_eq!(undone.state, KeyspaceState::Deleted);
        assert!(never_was(&undone) && !never_was(&whole));
    }
}
