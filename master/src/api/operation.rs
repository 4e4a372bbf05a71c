//! Operations: list, show, cancel, pause, slow down. A drain of a node is one operation across all
//! keyspaces, and so is a rebalance.

use std::sync::Arc;

use vasto_core::error::VastoError;
use vasto_core::ids::{KeyspaceId, PlanId};
use vasto_core::operation::operation_id;
use vasto_core::plan::Plan;
use vasto_core::reconcile::Pace;
use vasto_proto::v1::{self, pace_operation_request::Pace as Wanted};

use super::answer::{Answer, invalid, no_operation};
use super::{ask, drain, rebalance};
use crate::cluster::{Cluster, now_us};
use crate::driver::has_ended;
use crate::state::CatalogChange;
use crate::view::drain::is_drain;
use crate::view::operation::{all_operations, finished, operations};
use crate::view::rebalance::is_rebalance;
use crate::view::{Sorted, json};

pub(crate) fn list(cluster: &Cluster) -> String {
    let all = all_operations(&cluster.state(), now_us());
    json(&Sorted(all))
}

pub(crate) fn show(cluster: &Cluster, id: &str) -> Answer {
    if is_drain(id) {
        return drain::show(cluster, id);
    }
    if is_rebalance(id) {
        return rebalance::show(cluster, id);
    }
    let state = cluster.state();
    // Whoever waits for an operation asks again and again: only its keyspace is looked at.
    let keyspace = keyspace_of(id).and_then(|keyspace| state.keyspaces.get(&keyspace));
    let mut all = keyspace.into_iter().flat_map(operations);
    all.find(|operation| operation.id() == id)
        .map(|operation| json(&operation))
        .ok_or_else(|| no_operation(id))
}

/// Returns the keyspace of an operation by the id that [`operation_id`] makes.
fn keyspace_of(id: &str) -> Option<KeyspaceId> {
    let (keyspace, _) = id.strip_prefix("op-")?.split_once('-')?;
    keyspace.parse().ok().map(KeyspaceId)
}

/// Undoes a running operation that has not changed ownership.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> Answer {
    if is_drain(id) {
        return drain::cancel(cluster, id).await;
    }
    if is_rebalance(id) {
        return rebalance::cancel(cluster, id).await;
    }
    let (keyspace, plan) = running_plan(cluster, id)?;
    let cancelled = ask::change(cluster, keyspace, CatalogChange::Cancel { plan }).await?;
    tracing::info!(operation = id, "cancelled an operation");
    let report = cancelled.operations.iter().rev().find(|report| report.id == id);
    Ok(json(&report.map(finished)))
}

/// Returns the keyspace and the plan of a running operation.
fn running_plan(cluster: &Cluster, id: &str) -> Result<(KeyspaceId, PlanId), VastoError> {
    let state = cluster.state();
    let running = state.keyspaces.values().find_map(|keyspace| {
        let catalog = &keyspace.catalog;
        let has_id = |plan: &&Plan| operation_id(catalog.keyspace, plan.id) == id;
        catalog.plans().find(has_id).map(|plan| (catalog.keyspace, plan.id))
    });
    running.ok_or_else(|| {
        let mut ended = state.keyspaces.values().flat_map(|keyspace| &keyspace.catalog.operations);
        match ended.any(|report| report.id == id) {
            true => has_ended(id),
            false => no_operation(id),
        }
    })
}

/// Pauses, resumes or slows down a running operation; answers the operation. What is so already is
/// not written again.
pub(crate) async fn pace(cluster: &Arc<Cluster>, request: v1::PaceOperationRequest) -> Answer {
    let id = request.id.as_str();
    let pace = match request.pace {
        Some(Wanted::Paused(true)) => Pace::Pause,
        Some(Wanted::Paused(false)) => Pace::Resume,
        Some(Wanted::MaxRate(rate)) => Pace::Rate((rate > 0).then_some(rate)),
        None => return Err(invalid("the request says neither a pause nor a rate")),
    };
    if is_drain(id) {
        return drain::pace(cluster, id, pace).await;
    }
    if is_rebalance(id) {
        return rebalance::pace(cluster, id, pace).await;
    }
    let (keyspace, plan) = running_plan(cluster, id)?;
    let is_so = {
        let state = cluster.state();
        let catalog = state.keyspaces.get(&keyspace).map(|keyspace| keyspace.catalog.clone());
        catalog.is_some_and(|catalog| {
            catalog.plans().any(|running| running.id == plan && pace.is_of(running))
        })
    };
    if !is_so {
        ask::change(cluster, keyspace, CatalogChange::Pace { plan, pace }).await?;
        tracing::info!(operation = id, ?pace, "changed the pace of an operation");
    }
    show(cluster, id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_looked_for_in_its_keyspace() {
        assert_eq!(keyspace_of(&operation_id(KeyspaceId(17), PlanId(4))), Some(KeyspaceId(17)));
        for other in ["", "op-", "op-17", "op-x-4", "node-n-0000000000000001-5", "rebalance-7"] {
            assert_eq!(keyspace_of(other), None, "{other}");
        }
    }
}
