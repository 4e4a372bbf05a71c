//! The restore of a keyspace from the bucket.
//!
//! **Invariant:** a restore is a plan of the new keyspace; nothing of the old one is changed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{timeout, timeout_at};
use vasto_core::catalog::{Catalog, KeyspaceState, Placed};
use vasto_core::error::VastoError;
use vasto_core::ids::{KeyspaceId, NodeId, PlanId};
use vasto_core::limits::{ADMIN_DEADLINE, check_keyspace_name};
use vasto_core::operation::{OperationKind, OperationOutcome};
use vasto_core::plan::{Plan, PlanKind, Step, Target};
use vasto_core::reconcile::check_rate;
use vasto_proto::v1;
use vasto_shipping::weight::{Reading, weigh};

use super::answer::{Answer, invalid, not_found, refused, taken, unavailable};
use super::ship::{Absent, Shipped};
use super::{ask, ship};
use crate::cluster::{Cluster, nonce, now_us};
use crate::driver::{install, pace_error};
use crate::forecast::Forecast;
use crate::forecast::copies::Weighed;
use crate::forecast::restore::{Restored, restore as forecast_of};
use crate::forecast::time::Paces;
use crate::placement::place;
use crate::state::{ClusterState, Delivery};
use crate::view::estimate::{Asked, ShardsOrNode, estimate};
use crate::view::outcome::RestoreDoc;
use crate::view::plan::running_of;
use crate::view::{Sorted, json};

/// How long nodes have to make a checkpoint of what they have shipped, before a restore.
const CHECKPOINT_FIRST: Duration = Duration::from_secs(20);
/// The age of a restore time from which no node needs to ship first.
const SHIPPED_AFTER: Duration = Duration::from_secs(600);

/// How long the bucket has to list and read what a forecast needs.
const WEIGHING_PATIENCE: Duration = Duration::from_secs(10);

/// Starts a new keyspace from the archive of another one, or only plans it.
pub(crate) async fn restore(cluster: &Arc<Cluster>, request: v1::RestoreRequest) -> Answer {
    check_keyspace_name(&request.into)?;
    check_rate(request.max_rate).map_err(pace_error)?;
    if cluster.state().named(&request.into).is_some() {
        return Err(taken(&request.into));
    }
    let tip = last_of(&cluster.state(), &request.name)?;
    if let Some(at_us) = request.at_us.filter(|at| *at > now_us()) {
        let ahead_s = (at_us - now_us().min(at_us)).div_ceil(1_000_000);
        let message = format!(
            "that time is {ahead_s} s in the future; leave out --at to restore what is there now"
        );
        return Err(invalid(message));
    }
    if request.plan_only {
        return plan_restore(cluster, &request, &tip).await;
    }
    let mut absent = Absent::default();
    if tip.state == KeyspaceState::Active && !request.from_bucket {
        absent = ship_first(cluster, &request).await?;
    }
    let then = catalog_then(cluster, &tip, &request).await?;
    cluster.refresh_settings().await;
    // The restore may need objects that count as garbage by now.
    let interrupted = vasto_shipping::gc::interrupt(cluster.store.bucket()).await;
    interrupted.map_err(|cause| unavailable(cause.to_string()))?;
    // One replica of each shard from the bucket; more are copied from it once it serves.
    let (nodes, held) = ask::places(cluster, then.spec.shards, 1)?;
    let forecast = forecast(cluster, &request, &tip, &then, &nodes).await;
    let estimate = forecast.estimate();
    let disk = {
        let mut state = cluster.state();
        forecast.check_room(&state)?;
        state.loads.hold_with_disk([], false, &estimate.disk)
    };
    let held_disk = cluster.hold_places(disk);
    let (started_at_us, drawn) = (now_us(), nonce());
    let build = |id: KeyspaceId| {
        let mut first = restoring(id, &request, &then, &nodes, started_at_us, drawn);
        if let Some(plan) = &mut first.plan {
            plan.estimate = Some(estimate.clone());
        }
        first
    };
    let what = format!("restoring {} into {}", request.name, request.into);
    let created = ask::first_version(cluster, &request.into, &what, ADMIN_DEADLINE, build).await?;
    tracing::info!(
        keyspace = request.into,
        of = request.name,
        version = then.version.0,
        "restoring a keyspace"
    );
    let started = RestoreDoc { operation: running_of(&created), without: absent.document() };
    install(cluster, created, Delivery::Push);
    drop((held, held_disk));
    Ok(json(&Sorted(started)))
}

/// Answers what a restore would move and take. No node ships anything for it, so that the log which
/// is not in the bucket yet counts as its nodes report it, or not at all of a time that is past.
async fn plan_restore(
    cluster: &Arc<Cluster>,
    request: &v1::RestoreRequest,
    tip: &Arc<Catalog>,
) -> Answer {
    let then = catalog_then(cluster, tip, request).await?;
    cluster.refresh_settings().await;
    let placed = place(then.spec.shards, 1, &cluster.state().candidates(None));
    let nodes = placed.as_deref().unwrap_or_default();
    let forecast = forecast(cluster, request, tip, &then, nodes).await;
    let state = cluster.state();
    let room = || forecast.check_room(&state).map_err(VastoError::from);
    let possible =
        placed.as_ref().map_err(|error| VastoError::from(error.clone())).and_then(|_| room());
    let shards = then.spec.shards;
    let asked = Asked {
        keyspace: request.into.clone(),
        kind: OperationKind::Restore,
        from: Some(ShardsOrNode::Shards(shards)),
        to: Some(ShardsOrNode::Shards(shards)),
        refused: possible.err().map(|error| error.message),
    };
    Ok(json(&estimate(&state, asked, &forecast, &cluster.settings.prices)))
}

/// Returns the forecast of a restore. What only the bucket holds is weighed there; when that does
/// not answer in time, it counts as nothing.
async fn forecast(
    cluster: &Cluster,
    request: &v1::RestoreRequest,
    tip: &Catalog,
    then: &Catalog,
    nodes: &[Vec<NodeId>],
) -> Forecast {
    let as_it_is = request.from_bucket || request.at_us.is_some();
    let restored = Restored { tip, then, nodes, as_it_is };
    let shards = restored.known_by_the_bucket(&cluster.state());
    let deadline = tokio::time::Instant::now() + WEIGHING_PATIENCE;
    let mut weighed = Weighed::new();
    for shard in shards {
        let reading = Reading {
            preferred: None,
            discarded: &tip.discarded,
            retirements: &then.retirements,
            until_us: request.at_us,
        };
        let weight = weigh(cluster.store.bucket(), then.keyspace, shard, reading);
        match timeout_at(deadline, weight).await {
            Ok(Ok(weight)) => drop(weighed.insert((then.keyspace, shard), weight)),
            Ok(Err(error)) => {
                tracing::info!(%error, keyspace = then.name, "an archive cannot be weighed");
            }
            Err(_) => {
                tracing::info!(keyspace = then.name, "the bucket is too slow to weigh archives");
                break;
            }
        }
    }
    let state = cluster.state();
    forecast_of(&state, &restored, &weighed, &Paces::of(&state).at_most(request.max_rate))
}

/// Returns the catalog of the keyspace at the time of the restore.
async fn catalog_then(
    cluster: &Cluster,
    tip: &Arc<Catalog>,
    request: &v1::RestoreRequest,
) -> Result<Catalog, VastoError> {
    let then = match request.at_us {
        None => before_its_end(cluster, tip).await?,
        Some(at_us) => {
            let found = cluster
                .store
                .at(tip, at_us)
                .await
                .map_err(|cause| unavailable(cause.to_string()))?;
            let missing =
                || not_found(format!("keyspace {} did not exist at that time", request.name));
            found.filter(|then| then.state == KeyspaceState::Active).ok_or_else(missing)?
        }
    };
    if then.plan.as_ref().is_some_and(|plan| matches!(plan.kind, PlanKind::Restore { .. })) {
        let message = format!(
            "keyspace {} was itself being restored at that time; choose a later one",
            request.name
        );
        return Err(refused(message));
    }
    if tip.state == KeyspaceState::Deleted {
        still_there(cluster, &then).await?;
    }
    Ok(then)
}

/// Returns the first version of the new keyspace, with the plan that restores its data.
fn restoring(
    id: KeyspaceId,
    request: &v1::RestoreRequest,
    then: &Catalog,
    nodes: &[Vec<NodeId>],
    started_at_us: u64,
    nonce: u64,
) -> Catalog {
    let mut catalog =
        Catalog::first(id, &request.into, then.spec.clone(), nodes, started_at_us, nonce);
    let targets = catalog.placement.iter().flat_map(|shard| {
        let target = |placed: &Placed| Target {
            shard: shard.shard,
            replica: placed.replica,
            node: placed.node,
        };
        shard.replicas.iter().map(target)
    });
    catalog.plan = Some(Plan {
        id: catalog.next_plan,
        kind: PlanKind::Restore {
            keyspace: then.keyspace,
            version: then.version,
            at_us: request.at_us,
        },
        from_epoch: catalog.epoch,
        started_at_us,
        step: Step::Tail,
        sources: Vec::new(),
        targets: targets.collect(),
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: request.max_rate,
        estimate: None,
    });
    catalog.next_plan = PlanId(catalog.next_plan.0 + 1);
    catalog
}

/// Has the nodes ship what only they hold, also for a restore to an earlier time, since older
/// writes may not be shipped yet. Returns the absent replicas: what only they hold is missing.
async fn ship_first(
    cluster: &Arc<Cluster>,
    request: &v1::RestoreRequest,
) -> Result<Absent, VastoError> {
    let now_us = now_us();
    // Older writes were shipped when they were new, unless the bucket was away for long.
    let is_recent =
        request.at_us.is_none_or(|at| at.saturating_add(SHIPPED_AFTER.as_micros() as u64) > now_us);
    let absent = match ship::everything(cluster, &request.name).await {
        Ok(Shipped::All(absent)) => absent,
        // No replica is live: only the bucket is left.
        Ok(Shipped::NoLiveReplica) => return Ok(Absent::default()),
        Err(cause) if is_recent => {
            let message = format!(
                "{}; what was acknowledged last could be missing: start the node, or take what the bucket holds with `vasto keyspace restore {} --into {} --from-bucket`",
                cause.message, request.name, request.into
            );
            return Err(VastoError::new(cause.code, message));
        }
        Err(cause) => {
            tracing::info!(keyspace = request.name, %cause, "not every node shipped what it has; the time is long past");
            Absent::default()
        }
    };
    // A new checkpoint leaves less log to read.
    if !matches!(
        timeout(CHECKPOINT_FIRST, ship::checkpoint(cluster, &request.name)).await,
        Ok(Ok(_))
    ) {
        tracing::info!(
            keyspace = request.name,
            "no new checkpoint of every shard; the log behind the last one is read"
        );
    }
    Ok(absent)
}

/// Returns the keyspace of that name: the one that serves, or the one that was deleted last.
fn last_of(state: &ClusterState, name: &str) -> Result<Arc<Catalog>, VastoError> {
    let all = state.keyspaces.values().map(|keyspace| &keyspace.catalog);
    let all = all.filter(|catalog| catalog.name == name && !never_was(catalog)).cloned();
    all.max_by_key(|catalog| (catalog.state == KeyspaceState::Active, catalog.keyspace)).ok_or_else(
        || {
            let names: Vec<&str> =
                state.active().map(|keyspace| keyspace.catalog.name.as_str()).collect();
            let others = if names.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there is {}", names.join(", "))
            };
            not_found(format!("no keyspace `{name}` is in the bucket; {others}"))
        },
    )
}

/// Returns true for a restore that did not end: the keyspace never existed.
fn never_was(catalog: &Catalog) -> bool {
    let ended = catalog.operations.last();
    catalog.state == KeyspaceState::Deleted
        && ended.is_some_and(|last| {
            last.kind == OperationKind::Restore && last.outcome == OperationOutcome::Aborted
        })
}

/// Checks that the archive of a deleted keyspace was not collected since. Lists.
async fn still_there(cluster: &Cluster, then: &Catalog) -> Result<(), VastoError> {
    for shard in &then.placement {
        let prefix = vasto_shipping::layout::shard_prefix(then.keyspace, shard.shard);
        let found = cluster.store.bucket().list(&prefix).await;
        if found.map_err(|cause| unavailable(cause.to_string()))?.is_empty() {
            let message = format!(
                "keyspace {} was deleted, and the bucket holds nothing of shard {} any more (see bucket.keep_for)",
                then.name, shard.shard
            );
            return Err(not_found(message));
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
    let found = found.map_err(|cause| unavailable(cause.to_string()))?;
    found.ok_or_else(|| not_found(format!("keyspace {} never held anything", tip.name)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::reconcile::abort;
    use vasto_core::report::Reports;

    #[test]
    fn a_restore_that_was_given_up_is_not_the_keyspace_that_was_deleted() {
        let mut half = Catalog::first(
            KeyspaceId(2),
            "orders",
            KeyspaceSpec::default(),
            &[vec![NodeId(1)]],
            1_000,
            1,
        );
        let whole = Catalog { state: KeyspaceState::Deleted, ..half.clone() };
        half.plan = Some(Plan {
            id: PlanId(1),
            kind: PlanKind::Restore {
                keyspace: KeyspaceId(1),
                version: vasto_core::CatalogVersion(3),
                at_us: None,
            },
            from_epoch: half.epoch,
            started_at_us: 1_000,
            step: Step::Tail,
            sources: Vec::new(),
            targets: Vec::new(),
            seals_undone: 0,
            floor: None,
            paused: false,
            max_rate: None,
            estimate: None,
        });
        let undone = abort(&half, "a node is away", &Reports::new(), 2_000, 2).unwrap();
        assert_eq!(undone.state, KeyspaceState::Deleted);
        assert!(never_was(&undone) && !never_was(&whole));
    }
}
