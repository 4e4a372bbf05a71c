//! The drain of a node: all of its replicas move elsewhere.
//!
//! **Invariant:** the drain is in the catalogs of the keyspaces, and nowhere else, so any master
//! continues it.

use std::sync::Arc;

use vasto_core::catalog::{Catalog, NodeDrain};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::KeyspaceId;
use vasto_core::reconcile::concerns;
use vasto_proto::v1;

use super::answer::{Answer, no_operation, not_found, refused};
use super::ask;
use super::node::{cordon, node_of};
use crate::cluster::{Cluster, now_us};
use crate::driver::has_ended;
use crate::placement::Shut;
use crate::state::{CatalogChange, ClusterState};
use crate::view::drain::drain_by;
use crate::view::{self, Sorted, json};

/// Begins to move all replicas of a node elsewhere.
pub(crate) async fn drain(cluster: &Arc<Cluster>, request: v1::EmptyNodeRequest) -> Answer {
    let node = node_of(&request.node_id)?;
    let to =
        Some(request.to_node_id.as_str()).filter(|id| !id.is_empty()).map(node_of).transpose()?;
    let accept_loss = request.accept_loss && request.replace;
    let drain = NodeDrain { to, accept_loss, ..NodeDrain::new(node, request.replace, now_us()) };
    cluster.refresh_settings().await;
    let concerned = check(&cluster.state(), &drain, now_us())?;
    if concerned.is_empty() {
        let message = format!(
            "node {node} has no replicas; there is nothing to move; keep it so with `vasto node cordon {node}`"
        );
        return Err(not_found(message));
    }
    // The drained node must not get new replicas: neither of new keyspaces nor copies of others.
    cordon(cluster, node, true).await?;
    for keyspace in concerned {
        ask::change(cluster, keyspace, CatalogChange::DrainNode(drain.clone())).await?;
    }
    tracing::info!(%node, ?to, "moving all replicas of a node");
    let id = drain.operation_id();
    document(cluster, &id)
        .ok_or_else(|| VastoError::new(ErrorCode::Internal, "the operation is not known any more"))
}

/// Returns the keyspaces with replicas on the node, when there is a target for each of them.
fn check(
    state: &ClusterState,
    drain: &NodeDrain,
    now_us: u64,
) -> Result<Vec<KeyspaceId>, VastoError> {
    let NodeDrain { node, to, replace, .. } = *drain;
    if !replace && !state.is_live(node) {
        return Err(refused(format!(
            "node {node} is away; replace it with `vasto node replace {node}`"
        )));
    }
    if let Some(to) = to
        && (to == node || !state.is_live(to))
    {
        let why = if to == node { "the same" } else { "away" };
        return Err(refused(format!("node {to} cannot take over: it is {why}")));
    }
    if let Some(to) = to.filter(|to| state.settings.is_cordoned(*to)) {
        let message = format!(
            "node {to} is cordoned; let it get replicas with `vasto node uncordon {to}` first"
        );
        return Err(refused(message));
    }
    let mut concerned = Vec::new();
    for keyspace in state.active() {
        let catalog = &keyspace.catalog;
        let mut then = Catalog::clone(catalog);
        then.draining_nodes.push(drain.clone());
        for shard in &catalog.placement {
            let staying = shard.replicas.iter().filter(|placed| placed.node != node).count();
            let needs_copy =
                staying < shard.replicas.len() && staying < then.spec.replicas as usize;
            if needs_copy && state.copy_target(&then, shard.shard, now_us).is_none() {
                return Err(refused(format!(
                    "no other live node has room for shard {} of {}; start one with `vasto serve node`{}",
                    shard.shard,
                    then.name,
                    Shut::of(&state.candidates(Some(&then)))
                )));
            }
        }
        if concerns(catalog, drain) {
            concerned.push(catalog.keyspace);
        }
    }
    Ok(concerned)
}

/// Cancels a drain: the node keeps the replicas that it still has.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> Answer {
    let concerned: Vec<KeyspaceId> = {
        let state = cluster.state();
        let catalogs = state.active().map(|keyspace| &keyspace.catalog);
        catalogs
            .filter(|catalog| drain_by(catalog, id).is_some())
            .map(|catalog| catalog.keyspace)
            .collect()
    };
    if concerned.is_empty() {
        show(cluster, id)?;
        return Err(has_ended(id));
    }
    for keyspace in concerned {
        ask::change(cluster, keyspace, CatalogChange::CancelDrain { operation: id.to_owned() })
            .await?;
    }
    tracing::info!(operation = id, "cancelled an operation");
    show(cluster, id)
}

/// Returns the progress of a drain.
pub(super) fn show(cluster: &Cluster, id: &str) -> Answer {
    document(cluster, id).ok_or_else(|| no_operation(id))
}

fn document(cluster: &Cluster, id: &str) -> Option<String> {
    view::drain::drain(&cluster.state(), id, now_us()).map(|drain| json(&Sorted(drain)))
}
