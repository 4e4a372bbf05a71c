//! The rebalance of the cluster: its plan, its begin and its end.
//!
//! **Invariant:** that a rebalance runs is in the cluster settings in the bucket, and nowhere else,
//! so any master goes on with it. A plan changes nothing.

use std::sync::Arc;

use tokio::time::timeout;
use vasto_core::balance::{Move, all_moves};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::KeyspaceId;
use vasto_core::reconcile::{Pace, check_rate, pace_moves};
use vasto_proto::v1;
use vasto_shipping::{ClusterSettings, Rebalance};

use super::answer::{ANSWER_WITHIN, Answer, no_operation, unavailable, unknown};
use super::ask;
use crate::cluster::{Cluster, nonce, now_us};
use crate::driver::{has_ended, pace_error};
use crate::state::{CatalogChange, RebalanceLook};
use crate::trace::rebalance_ended;
use crate::view::rebalance::{balanced, of_id, plan};
use crate::view::{Sorted, json};

/// Begins a rebalance, or only plans it; answers the one that runs already, if one does, with the
/// bound of the rate that is asked for, if one is.
pub(crate) async fn rebalance(cluster: &Arc<Cluster>, request: v1::RebalanceRequest) -> Answer {
    let max_rate = check_rate(request.max_rate).map_err(pace_error)?;
    cluster.refresh_settings().await;
    let running = cluster.state().settings.running_rebalance();
    if let Some(running) = running.filter(|_| !request.plan_only) {
        let id = running.operation_id();
        return match max_rate {
            Some(_) => pace(cluster, &id, Pace::Rate(max_rate)).await,
            None => show(cluster, &id),
        };
    }
    let moves = moves(cluster).await?;
    if request.plan_only {
        let settings = &cluster.settings;
        let (at_once, prices) = (settings.moves_at_once, &settings.prices);
        return Ok(json(&plan(&cluster.state(), &moves, at_once, max_rate, prices)));
    }
    if moves.is_empty() {
        return Ok(json(&Sorted(balanced(now_us()))));
    }
    let begun = begin(cluster, max_rate).await?;
    cluster.request_rebalance();
    let id = begun.map(|begun| begun.operation_id()).unwrap_or_default();
    show(cluster, &id)
}

/// Returns all moves that would be made now.
async fn moves(cluster: &Cluster) -> Result<Vec<Move>, VastoError> {
    let picture = {
        let (state, mono_us) = (cluster.state(), cluster.mono_us());
        if !state.has_heard_of_all(mono_us) {
            let message =
                "not all nodes have reported to this master yet; try again in some seconds";
            return Err(unavailable(message));
        }
        state.balance(mono_us, now_us())
    };
    // Of a large cluster this takes a while.
    let moves = tokio::task::spawn_blocking(move || all_moves(&picture)).await;
    moves.map_err(|error| VastoError::new(ErrorCode::Internal, error.to_string()))
}

/// Returns the document of a rebalance.
pub(super) fn show(cluster: &Cluster, id: &str) -> Answer {
    of_id(&cluster.state(), id, now_us())
        .map(|document| json(&Sorted(document)))
        .ok_or_else(|| no_operation(id))
}

/// Ends a rebalance: what has moved stays where it is, what is on its way is undone.
pub(super) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> Answer {
    cluster.refresh_settings().await;
    let running = cluster.state().settings.running_rebalance();
    let Some(running) = running.filter(|running| running.operation_id() == id) else {
        show(cluster, id)?;
        return Err(has_ended(id));
    };
    end(cluster, running, true).await?;
    let concerned: Vec<KeyspaceId> = {
        let state = cluster.state();
        let moving = state.active().filter(|keyspace| !keyspace.catalog.moves.is_empty());
        moving.map(|keyspace| keyspace.catalog.keyspace).collect()
    };
    // What cannot be undone at once is undone by the drivers: the settings say that it is to be.
    let mut failed = None;
    for keyspace in concerned {
        match ask::change(cluster, keyspace, CatalogChange::CancelMoves).await {
            Ok(_) => {}
            // The new replicas are placed: these moves end by themselves.
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        Some(error) => Err(error),
        None => show(cluster, id),
    }
}

/// Pauses, resumes or slows down the rebalance that runs, with its moves.
///
/// # Errors
/// The first one, after the moves of all keyspaces have been asked for it: the request can be
/// repeated.
pub(super) async fn pace(cluster: &Arc<Cluster>, id: &str, pace: Pace) -> Answer {
    if let Pace::Rate(rate) = pace {
        check_rate(rate).map_err(pace_error)?;
    }
    cluster.refresh_settings().await;
    let running = cluster.state().settings.running_rebalance();
    let Some(running) = running.filter(|running| running.operation_id() == id) else {
        show(cluster, id)?;
        return Err(has_ended(id));
    };
    let (now_us, nonce) = (now_us(), nonce());
    let since_us = running.since_us;
    // Another master may change the other half of the pace at the same time.
    let change = |now: &ClusterSettings| {
        let asked = pace.applied_to(now.running_rebalance()?.pace()).ok()?;
        now.with_pace(since_us, asked, now_us, nonce)
    };
    let settings = changed(cluster, change).await?;
    if settings.running_rebalance().is_none_or(|running| running.since_us != since_us) {
        return Err(has_ended(id));
    }
    tracing::info!(operation = id, ?pace, "changed the pace of an operation");
    cluster.request_rebalance();
    // What follows from the settings alone, the drivers do by themselves.
    let concerned: Vec<KeyspaceId> = {
        let state = cluster.state();
        let catalogs = state.active().map(|keyspace| &keyspace.catalog);
        let changes = catalogs.filter(|one| pace_moves(one, since_us, pace, 0, 0).is_some());
        changes.map(|catalog| catalog.keyspace).collect()
    };
    let changes = concerned.into_iter().map(|keyspace| {
        let change = CatalogChange::PaceMoves { rebalance_us: since_us, pace };
        ask::change(cluster, keyspace, change)
    });
    for changed in futures::future::join_all(changes).await {
        match changed {
            Ok(_) => {}
            // They have ended, or their drivers were faster.
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    show(cluster, id)
}

/// Begins a rebalance, unless one runs; returns the one that runs then.
///
/// # Errors
/// When the bucket does not take it in time: it may have begun all the same.
pub(crate) async fn begin(
    cluster: &Cluster,
    max_rate: Option<u64>,
) -> Result<Option<Rebalance>, VastoError> {
    let (now_us, nonce) = (now_us(), nonce());
    let change = |now: &ClusterSettings| now.with_rebalance_at(max_rate, now_us, nonce);
    let settings = changed(cluster, change).await?;
    let running = settings.running_rebalance();
    tracing::info!(operation = running.map(|one| one.operation_id()), "a rebalance runs");
    cluster.state().rebalance = RebalanceLook::default();
    Ok(running)
}

/// Ends a rebalance.
///
/// # Errors
/// When the bucket does not take it in time: it may have ended all the same.
pub(crate) async fn end(
    cluster: &Cluster,
    running: Rebalance,
    cancelled: bool,
) -> Result<(), VastoError> {
    let (now_us, nonce) = (now_us(), nonce());
    let change =
        |now: &ClusterSettings| now.without_rebalance(running.since_us, cancelled, now_us, nonce);
    let newest = changed(cluster, change).await?;
    tracing::info!(operation = running.operation_id(), cancelled, "a rebalance has ended");
    cluster.state().rebalance = RebalanceLook::default();
    // Another master may have ended it, and exports that.
    if newest.nonce == nonce {
        let ended = rebalance_ended(&cluster.state(), running, cancelled, now_us);
        ended.export(&cluster.cluster_id());
    }
    Ok(())
}

async fn changed(
    cluster: &Cluster,
    change: impl Fn(&ClusterSettings) -> Option<ClusterSettings>,
) -> Result<ClusterSettings, VastoError> {
    let before = cluster.state().settings.clone();
    let unsure = |cause: String| {
        let message = format!(
            "writing the settings of the cluster: {cause}; it may or may not have taken effect: check with `vasto \
             operation list`"
        );
        unknown(message)
    };
    match timeout(ANSWER_WITHIN, cluster.store.change_settings(&before, change)).await {
        Ok(Ok(newest)) => {
            cluster.learn_settings(newest.clone());
            Ok(newest)
        }
        Ok(Err(error)) => Err(unsure(error.to_string())),
        Err(_) => Err(unsure("the bucket did not answer in time".into())),
    }
}
