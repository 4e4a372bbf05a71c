//! The drain of a node: all of its replicas move elsewhere.
//!
//! **Invariant:** the drain is in the catalogs of the keyspaces, and nowhere else, so any master
//! continues it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use vasto_core::catalog::{Catalog, NodeDrain};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::KeyspaceId;
use vasto_core::operation::OperationKind;
use vasto_core::reconcile::{Pace, check_rate, concerns, pace_drain};
use vasto_proto::v1;
use vasto_shipping::weight::{Reading, weigh};

use super::answer::{Answer, no_operation, not_found, refused};
use super::ask;
use super::node::{cordon, node_of};
use crate::cluster::{Cluster, now_us};
use crate::driver::{has_ended, pace_error};
use crate::forecast::Forecast;
use crate::forecast::copies::{DrainForecast, Weighed, drain as forecast_of, from_the_bucket};
use crate::forecast::time::Paces;
use crate::state::{CatalogChange, ClusterState};
use crate::view::drain::drain_by;
use crate::view::estimate::{Asked, ShardsOrNode, estimate};
use crate::view::{self, Sorted, json};

/// How long the bucket has to list and read what a forecast needs.
const WEIGHING_PATIENCE: Duration = Duration::from_secs(3);

/// Begins to move all replicas of a node elsewhere, or only plans it.
pub(crate) async fn drain(cluster: &Arc<Cluster>, request: v1::EmptyNodeRequest) -> Answer {
    let node = node_of(&request.node_id)?;
    let to =
        Some(request.to_node_id.as_str()).filter(|id| !id.is_empty()).map(node_of).transpose()?;
    let accept_loss = request.accept_loss && request.replace;
    let max_rate = check_rate(request.max_rate).map_err(pace_error)?;
    let drain = NodeDrain::new(node, request.replace, now_us());
    let drain = NodeDrain { to, accept_loss, max_rate, ..drain };
    cluster.refresh_settings().await;
    let possible = check(&cluster.state(), &drain);
    if !request.plan_only {
        possible.clone()?;
    }
    let DrainForecast { parts, refused } = forecast(cluster, &drain).await;
    if parts.is_empty() {
        let message = format!(
            "node {node} has no replicas; there is nothing to move; keep it so with `vasto node cordon {node}`"
        );
        return Err(not_found(message));
    }
    let mut all = Forecast::default();
    parts.values().cloned().for_each(|part| all.add(part));
    let room = || all.check_room(&cluster.state()).map_err(VastoError::from);
    let possible = possible.and_then(|()| refused.map_or(Ok(()), Err)).and_then(|()| room());
    if request.plan_only {
        let refused = possible.err().map(|error| error.message);
        return Ok(planned(cluster, &drain, &parts, &all, refused));
    }
    possible?;
    // The drained node must not get new replicas: neither of new keyspaces nor copies of others.
    cordon(cluster, node, true).await?;
    let changes = parts.into_iter().map(|(keyspace, part)| {
        let drain = NodeDrain { estimate: Some(part.estimate()), ..drain.clone() };
        (keyspace, CatalogChange::DrainNode(drain))
    });
    ask::change_all(cluster, changes.collect(), |catalog| concerns(catalog, &drain)).await?;
    tracing::info!(%node, ?to, "moving all replicas of a node");
    let id = drain.operation_id();
    document(cluster, &id)
        .ok_or_else(|| VastoError::new(ErrorCode::Internal, "the operation is not known any more"))
}

/// Checks the nodes that a drain names.
fn check(state: &ClusterState, drain: &NodeDrain) -> Result<(), VastoError> {
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
    Ok(())
}

/// Returns the forecast of a drain. What no replica can give is weighed in the bucket; when that
/// does not answer in time, it counts as nothing.
async fn forecast(cluster: &Cluster, drain: &NodeDrain) -> DrainForecast {
    let lost = from_the_bucket(&cluster.state(), drain);
    let deadline = Instant::now() + WEIGHING_PATIENCE;
    let mut weighed = Weighed::new();
    for (keyspace, shard, shipper) in lost {
        let discarded = {
            let state = cluster.state();
            state.keyspaces.get(&keyspace).map(|keyspace| keyspace.catalog.discarded.clone())
        };
        let reading = Reading {
            preferred: shipper.map(|placed| placed.replica),
            discarded: discarded.as_deref().unwrap_or_default(),
            ..Reading::default()
        };
        let weight = weigh(cluster.store.bucket(), keyspace, shard, reading);
        match timeout_at(deadline, weight).await {
            Ok(Ok(weight)) => drop(weighed.insert((keyspace, shard), weight)),
            Ok(Err(error)) => tracing::info!(%error, %keyspace, "an archive cannot be weighed"),
            Err(_) => {
                tracing::info!(%keyspace, "the bucket is too slow to weigh archives");
                break;
            }
        }
    }
    let state = cluster.state();
    forecast_of(&state, drain, &weighed, now_us(), &Paces::of(&state).at_most(drain.max_rate))
}

/// Returns the plan of a drain.
fn planned(
    cluster: &Cluster,
    drain: &NodeDrain,
    parts: &BTreeMap<KeyspaceId, Forecast>,
    all: &Forecast,
    refused: Option<String>,
) -> String {
    let state = cluster.state();
    let concerned = parts.keys().filter_map(|keyspace| state.keyspaces.get(keyspace));
    let mut names: Vec<&str> = concerned.map(|keyspace| keyspace.catalog.name.as_str()).collect();
    names.sort_unstable();
    let asked = Asked {
        keyspace: names.join(","),
        kind: OperationKind::DrainNode,
        from: Some(ShardsOrNode::Node(drain.node)),
        to: drain.to.map(ShardsOrNode::Node),
        refused,
    };
    json(&estimate(&state, asked, all, &cluster.settings.prices))
}

/// Cancels a drain: the node keeps the replicas that it still has.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> Answer {
    let cancel = |keyspace| (keyspace, CatalogChange::CancelDrain { operation: id.to_owned() });
    let changes = concerned(cluster, id)?.into_iter().map(cancel).collect();
    ask::change_all(cluster, changes, |catalog| drain_by(catalog, id).is_some()).await?;
    tracing::info!(operation = id, "cancelled an operation");
    show(cluster, id)
}

/// Returns the keyspaces in which a drain runs; an error when there is none.
fn concerned(cluster: &Cluster, id: &str) -> Result<Vec<KeyspaceId>, VastoError> {
    let concerned: Vec<KeyspaceId> = {
        let state = cluster.state();
        let catalogs = state.active().map(|keyspace| &keyspace.catalog);
        let drains = catalogs.filter(|catalog| drain_by(catalog, id).is_some());
        drains.map(|catalog| catalog.keyspace).collect()
    };
    if concerned.is_empty() {
        show(cluster, id)?;
        return Err(has_ended(id));
    }
    Ok(concerned)
}

/// Pauses, resumes or slows down a drain, with its copies, in all its keyspaces. A keyspace in which
/// it ends meanwhile has no part in it any more.
///
/// # Errors
/// The first one, after all others have been asked: the request can be repeated.
pub(super) async fn pace(cluster: &Arc<Cluster>, id: &str, pace: Pace) -> Answer {
    if let Pace::Rate(rate) = pace {
        check_rate(rate).map_err(pace_error)?;
    }
    let is_so = |catalog: &Catalog| {
        pace_drain(catalog, id, pace, 0, 0).is_ok_and(|next| {
            next.draining_nodes == catalog.draining_nodes && next.plan == catalog.plan
        })
    };
    let mut asked = concerned(cluster, id)?;
    asked.retain(|keyspace| {
        cluster.state().keyspaces.get(keyspace).is_some_and(|one| !is_so(&one.catalog))
    });
    let changes = asked.into_iter().map(|keyspace| {
        let change = CatalogChange::PaceDrain { operation: id.to_owned(), pace };
        ask::change_if(cluster, keyspace, change, move |catalog| drain_by(catalog, id).is_some())
    });
    let changed = futures::future::join_all(changes).await;
    changed.into_iter().collect::<Result<(), VastoError>>()?;
    tracing::info!(operation = id, ?pace, "changed the pace of an operation");
    show(cluster, id)
}

/// Returns the progress of a drain.
pub(super) fn show(cluster: &Cluster, id: &str) -> Answer {
    document(cluster, id).ok_or_else(|| no_operation(id))
}

fn document(cluster: &Cluster, id: &str) -> Option<String> {
    view::drain::drain(&cluster.state(), id, now_us()).map(|drain| json(&Sorted(drain)))
}
