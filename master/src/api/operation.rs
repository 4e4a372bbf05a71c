//! Operations: list, show, cancel. A drain of a node is one operation across all keyspaces, and so is
//! a rebalance.

use std::sync::Arc;

use vasto_core::operation::operation_id;
use vasto_core::plan::Plan;

use super::answer::{Answer, no_operation};
use super::{ask, drain, rebalance};
use crate::cluster::{Cluster, now_us};
use crate::driver::has_ended;
use crate::state::CatalogChange;
use crate::view::drain::is_drain;
use crate::view::operation::{all_operations, finished, operations};
use crate::view::rebalance::is_rebalance;
use crate::view::{Sorted, json};

pub(crate) fn list(cluster: &Cluster) -> String {
    json(&Sorted(all_operations(&cluster.state(), now_us())))
}

pub(crate) fn show(cluster: &Cluster, id: &str) -> Answer {
    if is_drain(id) {
        return drain::show(cluster, id);
    }
    if is_rebalance(id) {
        return rebalance::show(cluster, id);
    }
    let state = cluster.state();
    let mut all = state.keyspaces.values().flat_map(operations);
    all.find(|operation| operation.id() == id)
        .map(|operation| json(&operation))
        .ok_or_else(|| no_operation(id))
}

/// Undoes a running operation that has not changed ownership.
pub(crate) async fn cancel(cluster: &Arc<Cluster>, id: &str) -> Answer {
    if is_drain(id) {
        return drain::cancel(cluster, id).await;
    }
    if is_rebalance(id) {
        return rebalance::cancel(cluster, id).await;
    }
    let (keyspace, plan) = {
        let state = cluster.state();
        let running = state.keyspaces.values().find_map(|keyspace| {
            let catalog = &keyspace.catalog;
            let has_id = |plan: &&Plan| operation_id(catalog.keyspace, plan.id) == id;
            catalog.plans().find(has_id).map(|plan| (catalog.keyspace, plan.id))
        });
        match running {
            Some(running) => running,
            None => {
                let mut ended =
                    state.keyspaces.values().flat_map(|keyspace| &keyspace.catalog.operations);
                return Err(match ended.any(|report| report.id == id) {
                    true => has_ended(id),
                    false => no_operation(id),
                });
            }
        }
    };
    let cancelled = ask::change(cluster, keyspace, CatalogChange::Cancel { plan }).await?;
    tracing::info!(operation = id, "cancelled an operation");
    let report = cancelled.operations.iter().rev().find(|report| report.id == id);
    Ok(json(&report.map(finished)))
}
