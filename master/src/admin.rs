//! Administrative calls, as functions that return JSON or one error that says what to do.
//!
//! **Invariant:** nothing here writes a catalog version of an existing keyspace; that goes through
//! the keyspace's driver. A call that only plans changes nothing.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::timeout;
use vasto_core::band::check_shard_count;
use vasto_core::catalog::{Ack, Catalog, KeyspaceSpec, KeyspaceState, Placed};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
use vasto_core::limits::{
    ADMIN_DEADLINE, HANDOVER_TIMEOUT, KEPT_MS_MAX, REPLICAS_MAX, SHARDS_SERVED_MAX, check_keyspace_name, check_ttl_ms,
};
use vasto_core::operation::operation_id;
use vasto_core::reconcile::{Presence, successor};
use vasto_core::report::ReplicaPhase;
use vasto_proto::convert::ack_from_wire;
use vasto_proto::v1;
use vasto_shipping::{CatalogError, ClusterSettings};

use crate::cluster::{Cluster, nonce, now_us};
use crate::driver::{CatalogChange, Request, changed, has_ended};
use crate::placement::place;
use crate::state::{ClusterState, Delivery, Keyspace};
use crate::{cost, document, relocation, shipped};

/// The longest wait before an answer: the caller's own deadline is [`ADMIN_DEADLINE`].
const ANSWER_WITHIN: Duration = ADMIN_DEADLINE.saturating_sub(Duration::from_secs(1));
/// How long the nodes of a keyspace have to ship what they have before it is deleted.
const SHIP_BEFORE_DELETE: Duration = Duration::from_secs(5);
/// The most names that a NotFound lists.
const NAMES_LISTED: usize = 10;

pub(crate) type JsonResult = Result<String, VastoError>;

fn error(code: ErrorCode, message: impl Into<String>) -> VastoError {
    VastoError::new(code, message)
}

/// Returns the keyspace of that name, or an error that helps to find it.
pub(crate) fn find<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Keyspace, VastoError> {
    state.named(name).ok_or_else(|| {
        let mut names: Vec<&str> = state.active().map(|known| known.catalog.name.as_str()).collect();
        names.sort_unstable();
        let more = if names.len() > NAMES_LISTED { ", …" } else { "" };
        names.truncate(NAMES_LISTED);
        let shown: String = name.chars().take(80).collect();
        let known = match names.len() {
            0 => "there is none yet; create one with `vasto keyspace create NAME`".to_owned(),
            _ => format!("there are: {}{more}", names.join(", ")),
        };
        error(ErrorCode::NotFound, format!("no keyspace is called `{shown}`; {known}"))
    })
}

/// Checks the specification of a new keyspace.
fn spec_of(request: &v1::CreateKeyspaceRequest) -> Result<KeyspaceSpec, VastoError> {
    check_keyspace_name(&request.name)?;
    let shards = check_shard_count(request.shards)?;
    if shards > SHARDS_SERVED_MAX {
        let message = format!(
            "a keyspace of more than {SHARDS_SERVED_MAX} shards could not grow: growing above {SHARDS_SERVED_MAX} is not \
             supported yet; use 1 to {SHARDS_SERVED_MAX}"
        );
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    if request.replicas == 0 || request.replicas > REPLICAS_MAX {
        let message = format!("{} replicas are not possible; use 1 to {REPLICAS_MAX}", request.replicas);
        return Err(error(ErrorCode::InvalidArgument, message));
    }
    let ack = ack_from_wire(request.ack).unwrap_or_default();
    if ack == Ack::Replica && request.replicas == 1 {
        let message = "acknowledgement `replica` needs a second replica; use --replicas 2 or more, or --ack fsync";
        return Err(error(ErrorCode::FailedPrecondition, message));
    }
    request.ttl_ms.map_or(Ok(()), check_ttl_ms)?;
    let most_days = KEPT_MS_MAX / 86_400_000;
    if let Some(grace_ms) = request.tombstone_grace_ms.filter(|ms| *ms < 1_000 || *ms > KEPT_MS_MAX) {
        let message = format!("a tombstone grace of {grace_ms} ms is not possible; use 1 s to {most_days} days");
        return Err(error(ErrorCode::InvalidArgument, message));
    }
    let defaults = KeyspaceSpec::default();
    let quarantine_ms = request.quarantine_ms.unwrap_or(defaults.quarantine_ms);
    if quarantine_ms > KEPT_MS_MAX {
        let message = format!("a quarantine of {quarantine_ms} ms is too long; at most {most_days} days");
        return Err(error(ErrorCode::InvalidArgument, message));
    }
    Ok(KeyspaceSpec {
        shards,
        replicas: request.replicas,
        ack,
        ttl_ms: request.ttl_ms,
        quarantine_ms,
        tombstone_grace_ms: request.tombstone_grace_ms,
    })
}

/// Creates a keyspace and waits until every replica serves.
pub(crate) async fn create(cluster: &Arc<Cluster>, request: v1::CreateKeyspaceRequest) -> JsonResult {
    let spec = spec_of(&request)?;
    cluster.refresh_settings().await;
    let (nodes, held) = {
        let mut state = cluster.state();
        if state.named(&request.name).is_some() {
            return Err(taken(&request.name));
        }
        let nodes = place(spec.shards, spec.replicas, &state.candidates(None))?;
        let hold = state.loads.hold(nodes.iter().flatten().copied(), false, 0);
        (nodes, cluster.hold_places(hold))
    };
    let (now_us, nonce) = (now_us(), nonce());
    let name = request.name.clone();
    let build = |id: KeyspaceId| Catalog::first(id, &name, spec.clone(), &nodes, now_us, nonce);
    let created = match timeout(ANSWER_WITHIN, cluster.store.create_keyspace(build)).await {
        Ok(Ok(catalog)) => catalog,
        Ok(Err(CatalogError::NameTaken { .. })) => {
            learn_all(cluster).await;
            return Err(taken(&request.name));
        }
        Ok(Err(cause)) => return Err(unsure(&format!("creating keyspace {name}"), &cause.to_string())),
        Err(_) => return Err(unsure(&format!("creating keyspace {name}"), "the bucket did not answer in time")),
    };
    let keyspace = created.keyspace;
    tracing::info!(keyspace = name, id = keyspace.0, shards = spec.shards, ?nodes, "created a keyspace");
    cluster.metrics.catalog_write("won");
    cluster.install(created, Delivery::Push);
    drop(held);
    let Ok(served) = timeout(ANSWER_WITHIN, serving(cluster, keyspace)).await else {
        let missing = {
            let state = cluster.state();
            state.keyspaces.get(&keyspace).map(|known| document::not_serving(&state, known)).unwrap_or_default()
        };
        let message = format!(
            "keyspace {name} was created, but does not serve after {} s: {}; see `vasto keyspace describe {name}`",
            ANSWER_WITHIN.as_secs(),
            missing.join(", ")
        );
        return Err(error(ErrorCode::Unknown, message));
    };
    served?;
    describe(cluster, &name)
}

pub(crate) fn taken(name: &str) -> VastoError {
    let message = format!("a keyspace called {name} exists; use it, choose another name, or delete it first");
    error(ErrorCode::AlreadyExists, message)
}

pub(crate) fn unsure(what: &str, cause: &str) -> VastoError {
    let message = format!("{what}: {cause}; it may or may not have taken effect: check with `vasto keyspace list`");
    error(ErrorCode::Unknown, message)
}

/// Waits until every replica serves; a failed replica ends the wait with its reason.
async fn serving(cluster: &Arc<Cluster>, keyspace: KeyspaceId) -> Result<(), VastoError> {
    let gone = || error(ErrorCode::NotFound, "the keyspace was deleted meanwhile");
    let mut changes = cluster.state().keyspaces.get(&keyspace).map(|known| known.changes()).ok_or_else(gone)?;
    loop {
        changes.borrow_and_update();
        {
            let state = cluster.state();
            let known = state.keyspaces.get(&keyspace).ok_or_else(gone)?;
            if known.catalog.state == KeyspaceState::Deleted {
                return Err(gone());
            }
            let failed = known.reports.values().find_map(|report| match &report.phase {
                ReplicaPhase::Failed(reason) => Some((report.shard, reason)),
                _ => None,
            });
            if let Some((shard, reason)) = failed {
                let name = &known.catalog.name;
                let message = format!("keyspace {name} was created, but its shard {shard} failed: {reason}");
                return Err(error(ErrorCode::Unknown, message));
            }
            if document::not_serving(&state, known).is_empty() {
                return Ok(());
            }
        }
        if changes.changed().await.is_err() {
            return Err(gone());
        }
    }
}

/// Learns what other masters have created; lists the bucket, so only when something is known to be missing.
pub(crate) async fn learn_all(cluster: &Arc<Cluster>) {
    if cluster.is_lost() {
        return;
    }
    match cluster.store.load_all().await {
        Ok(catalogs) => {
            for catalog in catalogs {
                cluster.adopt(catalog);
            }
        }
        Err(error) => tracing::warn!(%error, "cannot read the catalogs of other masters"),
    }
}

pub(crate) fn list(cluster: &Cluster) -> String {
    let state = cluster.state();
    let mut all: Vec<_> = state.active().collect();
    all.sort_by(|a, b| a.catalog.name.cmp(&b.catalog.name));
    document::json(&all.into_iter().map(document::summary).collect::<Vec<_>>())
}

pub(crate) fn describe(cluster: &Cluster, name: &str) -> JsonResult {
    let state = cluster.state();
    let known = find(&state, name)?;
    Ok(document::json(&document::keyspace(&state, known)))
}

/// Deletes a keyspace; its name is free afterwards.
pub(crate) async fn delete(cluster: &Arc<Cluster>, name: &str) -> JsonResult {
    let keyspace = find(&cluster.state(), name)?.catalog.keyspace;
    // A deleted keyspace can be restored: the bucket is to hold the last acknowledged writes too.
    let shipped = timeout(SHIP_BEFORE_DELETE, shipped::everything(cluster, name)).await;
    let shipped = matches!(shipped, Ok(Ok(_)));
    if !shipped {
        tracing::info!(keyspace = name, "not everything of a keyspace that is deleted is in the bucket");
    }
    let deleted = ask(cluster, keyspace, CatalogChange::Delete).await?;
    tracing::info!(keyspace = name, id = %keyspace, "deleted a keyspace");
    // The version alone frees the name; the release only makes its next look-up cheaper.
    match timeout(ANSWER_WITHIN, cluster.store.release_name(name, keyspace)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::info!(keyspace = name, %error, "the name of a deleted keyspace is not released yet"),
        Err(_) => tracing::info!(keyspace = name, "the name of a deleted keyspace is not released yet"),
    }
    Ok(document::json(&serde_json::json!({
        "name": name, "keyspace_id": keyspace.0, "version": deleted.version.0, "state": "deleted",
        "shipped": shipped,
    })))
}

/// Sends a change to the keyspace's driver and waits for its version.
pub(crate) async fn ask(
    cluster: &Arc<Cluster>,
    keyspace: KeyspaceId,
    change: CatalogChange,
) -> Result<Arc<Catalog>, VastoError> {
    let stopping = || error(ErrorCode::Unavailable, "this master is stopping; try again");
    let requests = cluster.state().keyspaces.get(&keyspace).map(|known| known.requests.clone()).ok_or_else(stopping)?;
    let (reply, answer) = oneshot::channel();
    let asked = async {
        requests.send(Request { change, reply }).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    };
    timeout(ANSWER_WITHIN, asked)
        .await
        .unwrap_or_else(|_| Err(unsure("writing the catalog", "the bucket did not answer in time")))
}

/// Starts a grow, or only estimates it.
pub(crate) async fn resize(cluster: &Arc<Cluster>, request: v1::ResizeRequest) -> JsonResult {
    let (keyspace, change) = {
        let state = cluster.state();
        let known = find(&state, &request.name)?;
        let change = CatalogChange::Grow { to: request.shards };
        if request.plan_only {
            changed(&state, known, &change, cluster.mono_us(), now_us(), 0)?;
            return Ok(document::json(&document::estimate(known, request.shards)));
        }
        (known.catalog.keyspace, change)
    };
    let started = ask(cluster, keyspace, change).await?;
    Ok(document::json(&document::running_of(&started)))
}

pub(crate) fn operations(cluster: &Cluster) -> String {
    let state = cluster.state();
    let of_nodes = relocation::node_operations(&state);
    let documents = state.keyspaces.values().flat_map(document::operations);
    let of_keyspaces = documents.filter(|one| !relocation::is_of_node(one.id()));
    let mut all: Vec<(u64, Value)> = of_keyspaces.map(|one| (one.started_at_us(), json!(one))).collect();
    all.extend(of_nodes);
    all.sort_by_key(|(started_at_us, _)| std::cmp::Reverse(*started_at_us));
    document::json(&all.into_iter().map(|(_, one)| one).collect::<Vec<_>>())
}

pub(crate) fn no_operation(id: &str) -> VastoError {
    let shown: String = id.chars().take(80).collect();
    error(ErrorCode::NotFound, format!("no operation `{shown}` is known; see `vasto operation list`"))
}

pub(crate) fn operation(cluster: &Cluster, id: &str) -> JsonResult {
    if relocation::is_of_node(id) {
        return relocation::node_operation(cluster, id).ok_or_else(|| no_operation(id));
    }
    let state = cluster.state();
    let mut all = state.keyspaces.values().flat_map(document::operations);
    all.find(|one| one.id() == id).map(|one| document::json(&one)).ok_or_else(|| no_operation(id))
}

/// Undoes a running operation that has not changed ownership.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> JsonResult {
    if relocation::is_of_node(id) {
        return relocation::cancel(cluster, id).await;
    }
    let (keyspace, plan) = {
        let state = cluster.state();
        let running = state.keyspaces.values().find_map(|known| {
            let plan = known.catalog.plan.as_ref()?;
            (operation_id(known.catalog.keyspace, plan.id) == id).then_some((known.catalog.keyspace, plan.id))
        });
        match running {
            Some(running) => running,
            None => {
                let mut ended = state.keyspaces.values().flat_map(|known| &known.catalog.operations);
                return Err(match ended.any(|one| one.id == id) {
                    true => has_ended(id),
                    false => no_operation(id),
                });
            }
        }
    };
    let cancelled = ask(cluster, keyspace, CatalogChange::Cancel { plan }).await?;
    tracing::info!(operation = id, "cancelled an operation");
    let report = cancelled.operations.iter().rev().find(|one| one.id == id);
    Ok(document::json(&report.map(document::finished)))
}

/// Transfers leadership of a primary that is to be evicted, if there is a successor, and waits until another replica
/// has authority. Waits at most twice as long as a transfer may take: an eviction may have its reason.
async fn transfer_leadership_first(cluster: &Arc<Cluster>, keyspace: KeyspaceId, replica: ReplicaId) {
    let (change, mut changes) = {
        let (state, mono_us) = (cluster.state(), cluster.mono_us());
        let Some(known) = state.keyspaces.get(&keyspace) else { return };
        let here = |node| matches!(state.presence(node, mono_us), Presence::Here(_));
        let ready = |one: &Placed| known.reports.get(&one.replica).is_some_and(|report| report.replication.ready);
        let placement = &known.catalog.placement;
        let found = placement.iter().find_map(|shard| successor(shard, replica, here, ready));
        (found.map(|to| CatalogChange::TransferLeadership { from: replica, to }), known.changes())
    };
    if let Some(change) = change
        && ask(cluster, keyspace, change).await.is_err()
    {
        return;
    }
    let ended = async {
        loop {
            changes.borrow_and_update();
            let hands_over = cluster.state().keyspaces.get(&keyspace).is_some_and(|known| {
                let version = known.catalog.version;
                // The replica with authority holds what the evicted one has acknowledged.
                let has_authority =
                    |one: &Placed| known.reports.get(&one.replica).is_some_and(|report| report.has_authority(version));
                let mut shards = known.catalog.placement.iter();
                let shard = shards.find(|shard| shard.replicas.iter().any(|one| one.replica == replica));
                shard.filter(|shard| shard.replicas.len() > 1).is_some_and(|shard| {
                    let mut others = shard.replicas.iter().filter(|one| one.replica != replica);
                    shard.transferring_to.is_some() || !others.any(has_authority)
                })
            });
            if !hands_over || changes.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = timeout(HANDOVER_TIMEOUT * 2, ended).await;
}

/// Evicts a replica from its placement: it is drained when its node is there, or given up.
pub(crate) async fn evict(cluster: &Arc<Cluster>, request: v1::EvictRequest) -> JsonResult {
    let keyspace = find(&cluster.state(), &request.name)?.catalog.keyspace;
    let replica = ReplicaId(request.replica_id);
    transfer_leadership_first(cluster, keyspace, replica).await;
    let change = CatalogChange::Evict { replica, accept_loss: request.accept_loss };
    let catalog = ask(cluster, keyspace, change).await?;
    tracing::info!(keyspace = request.name, %replica, accept_loss = request.accept_loss, "evicted a replica");
    Ok(document::json(&serde_json::json!({
        "name": request.name,
        "replica_id": replica.0,
        "state": if request.accept_loss { "removed" } else { "draining" },
        "version": catalog.version.0,
    })))
}

/// Sends a command to every node with replicas of a keyspace and waits for all of them, as long as
/// their sessions live.
pub(crate) async fn command(cluster: &Arc<Cluster>, name: &str, kind: v1::command::Kind) -> JsonResult {
    let waiting: Vec<(NodeId, _)> = {
        let mut state = cluster.state();
        let known = find(&state, name)?;
        let keyspace = known.catalog.keyspace;
        let mut nodes: Vec<NodeId> =
            known.catalog.placement.iter().flat_map(|shard| &shard.replicas).map(|one| one.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let away: Vec<String> =
            nodes.iter().filter(|node| state.away_us(**node, u64::MAX) > 0).map(NodeId::to_string).collect();
        if !away.is_empty() {
            let message = format!("{} of keyspace {name} is away; start it, then try again", away.join(", "));
            return Err(error(ErrorCode::Unavailable, message));
        }
        let mut waiting = Vec::new();
        for node in nodes {
            let Some(done) = state.command(node, kind, keyspace) else {
                let message = format!("{node} has too many commands to do; try again later");
                return Err(error(ErrorCode::Overloaded, message).retry_after_ms(1000));
            };
            waiting.push((node, done));
        }
        waiting
    };
    let mut nodes = Vec::new();
    for (node, done) in waiting {
        match done.await {
            Ok(Ok(_)) => nodes.push(node),
            Ok(Err(reason)) => {
                return Err(error(ErrorCode::Unavailable, format!("{node} could not do it: {reason}")));
            }
            Err(_) => {
                let message = format!("{node} was lost before it was done; try again when it is back");
                return Err(error(ErrorCode::Unavailable, message));
            }
        }
    }
    Ok(document::json(&serde_json::json!({ "keyspace": name, "nodes": nodes })))
}

/// Cordons a node, so that it gets no new replicas, or uncordons it. Its present replicas stay.
pub(crate) async fn cordon(cluster: &Arc<Cluster>, node: NodeId, cordoned: bool) -> Result<(), VastoError> {
    let known = cluster.state().settings.clone();
    let (now_us, nonce) = (now_us(), nonce());
    let change = |now: &ClusterSettings| now.with_cordon(node, cordoned, now_us, nonce);
    let what = format!("{} {node}", if cordoned { "cordoning" } else { "uncordoning" });
    let unsure = |cause: String| {
        let message = format!("{what}: {cause}; it may or may not have taken effect: check with `vasto node list`");
        error(ErrorCode::Unknown, message)
    };
    match timeout(ANSWER_WITHIN, cluster.store.change_settings(&known, change)).await {
        Ok(Ok(newest)) => {
            if cluster.learn_settings(newest) {
                tracing::info!(%node, cordoned, "a node is to get replicas or not");
            }
            Ok(())
        }
        Ok(Err(cause)) => Err(unsure(cause.to_string())),
        Err(_) => Err(unsure("the bucket did not answer in time".into())),
    }
}

/// Cordons or uncordons a node on request; returns the node.
pub(crate) async fn cordon_node(cluster: &Arc<Cluster>, request: v1::CordonNodeRequest) -> JsonResult {
    let node = relocation::node_of(&request.node_id)?;
    let is_known = document::node_ids(&cluster.state()).contains(&node);
    // A node that was forgotten may still be uncordoned.
    if !is_known && request.cordoned {
        return Err(error(ErrorCode::NotFound, format!("no node {node} is known; see `vasto node list`")));
    }
    cordon(cluster, node, request.cordoned).await?;
    Ok(document::json(&document::one_node(&cluster.state(), node, cluster.mono_us())))
}

pub(crate) fn nodes(cluster: &Cluster) -> String {
    document::json(&document::nodes(&cluster.state(), cluster.mono_us()))
}

pub(crate) fn status(cluster: &Cluster) -> String {
    let own = cluster.bucket.usage();
    let bucket = cluster.bucket.url();
    let mono_us = cluster.mono_us();
    let stored = cluster.stored();
    let state = cluster.state();
    let bill = cost::cost(&state, own, stored, &cluster.settings.prices, bucket, mono_us);
    let document = document::cluster(&state, &cluster.cluster_id(), bucket, own, bill, mono_us);
    document::json(&document.with_warnings(cluster.warnings()))
}
