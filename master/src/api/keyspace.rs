//! Keyspaces: create, list, describe, delete, resize, the early end of a quarantine.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use vasto_core::band::check_shard_count;
use vasto_core::catalog::{Ack, Catalog, KeyspaceSpec, KeyspaceState};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::KeyspaceId;
use vasto_core::limits::{
    KEPT_MS_MAX, REPLICAS_MAX, SHARDS_SERVED_MAX, check_keyspace_name, check_ttl_ms,
};
use vasto_core::operation::OperationKind;
use vasto_core::reconcile::in_the_way;
use vasto_core::report::ReplicaPhase;
use vasto_proto::convert::ack_from_wire;
use vasto_proto::v1;

use super::answer::{ANSWER_WITHIN, Answer, find, invalid, not_found, refused, taken, unknown};
use super::{ask, ship};
use crate::cluster::{Cluster, nonce, now_us};
use crate::driver::{changed, install, start};
use crate::forecast::resize::resize as forecast_of;
use crate::forecast::time::Paces;
use crate::state::{CatalogChange, Delivery};
use crate::view::estimate::{Asked, ShardsOrNode, estimate};
use crate::view::keyspace::{not_serving, summary};
use crate::view::outcome::DeletedDoc;
use crate::view::plan::running_of;
use crate::view::{self, json};

/// How long the nodes of a keyspace have to ship what they have before it is deleted.
const SHIP_BEFORE_DELETE: Duration = Duration::from_secs(5);

/// Creates a keyspace and waits until every replica serves.
pub(crate) async fn create(cluster: &Arc<Cluster>, request: v1::CreateKeyspaceRequest) -> Answer {
    let spec = spec_of(&request)?;
    cluster.refresh_settings().await;
    let name = request.name;
    if cluster.state().named(&name).is_some() {
        return Err(taken(&name));
    }
    let (nodes, held) = ask::places(cluster, spec.shards, spec.replicas)?;
    let (now_us, nonce) = (now_us(), nonce());
    let build = |id: KeyspaceId| Catalog::first(id, &name, spec.clone(), &nodes, now_us, nonce);
    let created = ask::first_version(
        cluster,
        &name,
        &format!("creating keyspace {name}"),
        ANSWER_WITHIN,
        build,
    )
    .await?;
    let keyspace = created.keyspace;
    tracing::info!(
        keyspace = name,
        id = keyspace.0,
        shards = spec.shards,
        ?nodes,
        "created a keyspace"
    );
    cluster.metrics.catalog_write("won");
    install(cluster, created, Delivery::Push);
    drop(held);
    let Ok(served) = timeout(ANSWER_WITHIN, serving(cluster, keyspace)).await else {
        let missing = {
            let state = cluster.state();
            state
                .keyspaces
                .get(&keyspace)
                .map(|keyspace| not_serving(&state, keyspace))
                .unwrap_or_default()
        };
        let message = format!(
            "keyspace {name} was created, but does not serve after {} s: {}; see `vasto keyspace describe {name}`",
            ANSWER_WITHIN.as_secs(),
            missing.join(", ")
        );
        return Err(unknown(message));
    };
    served?;
    describe(cluster, &name)
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
        return Err(refused(message));
    }
    if request.replicas == 0 || request.replicas > REPLICAS_MAX {
        let message =
            format!("{} replicas are not possible; use 1 to {REPLICAS_MAX}", request.replicas);
        return Err(invalid(message));
    }
    let ack = ack_from_wire(request.ack).unwrap_or_default();
    if ack == Ack::Replica && request.replicas == 1 {
        let message = "acknowledgement `replica` needs a second replica; use --replicas 2 or more, or --ack fsync";
        return Err(refused(message));
    }
    request.ttl_ms.map_or(Ok(()), check_ttl_ms)?;
    let most_days = KEPT_MS_MAX / 86_400_000;
    if let Some(grace_ms) = request.tombstone_grace_ms.filter(|ms| *ms < 1_000 || *ms > KEPT_MS_MAX)
    {
        let message = format!(
            "a tombstone grace of {grace_ms} ms is not possible; use 1 s to {most_days} days"
        );
        return Err(invalid(message));
    }
    let defaults = KeyspaceSpec::default();
    let quarantine_ms = request.quarantine_ms.unwrap_or(defaults.quarantine_ms);
    if quarantine_ms > KEPT_MS_MAX {
        let message =
            format!("a quarantine of {quarantine_ms} ms is too long; at most {most_days} days");
        return Err(invalid(message));
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

/// Waits until every replica serves; a failed replica ends the wait with its reason.
async fn serving(cluster: &Arc<Cluster>, keyspace: KeyspaceId) -> Result<(), VastoError> {
    let gone = || not_found("the keyspace was deleted meanwhile");
    let changes = cluster.state().keyspaces.get(&keyspace).map(|keyspace| keyspace.changes());
    let mut changes = changes.ok_or_else(gone)?;
    loop {
        changes.borrow_and_update();
        {
            let state = cluster.state();
            let keyspace = state.keyspaces.get(&keyspace).ok_or_else(gone)?;
            if keyspace.catalog.state == KeyspaceState::Deleted {
                return Err(gone());
            }
            let failed = keyspace.reports.values().find_map(|report| match &report.phase {
                ReplicaPhase::Failed(reason) => Some((report.shard, reason)),
                _ => None,
            });
            if let Some((shard, reason)) = failed {
                let name = &keyspace.catalog.name;
                let message =
                    format!("keyspace {name} was created, but its shard {shard} failed: {reason}");
                return Err(unknown(message));
            }
            if not_serving(&state, keyspace).is_empty() {
                return Ok(());
            }
        }
        if changes.changed().await.is_err() {
            return Err(gone());
        }
    }
}

pub(crate) fn list(cluster: &Cluster) -> String {
    let lines: Vec<_> = {
        let state = cluster.state();
        let mut all: Vec<_> = state.active().collect();
        all.sort_by(|a, b| a.catalog.name.cmp(&b.catalog.name));
        all.into_iter().map(summary).collect()
    };
    json(&lines)
}

pub(crate) fn describe(cluster: &Cluster, name: &str) -> Answer {
    let state = cluster.state();
    let keyspace = find(&state, name)?;
    Ok(json(&view::keyspace::describe(&state, keyspace)))
}

/// Deletes a keyspace; its name is free afterwards.
pub(crate) async fn delete(cluster: &Arc<Cluster>, name: &str) -> Answer {
    let keyspace = find(&cluster.state(), name)?.catalog.keyspace;
    // A deleted keyspace can be restored: the bucket is to hold the last acknowledged writes too.
    let shipped = timeout(SHIP_BEFORE_DELETE, ship::everything(cluster, name)).await;
    let shipped = matches!(shipped, Ok(Ok(_)));
    if !shipped {
        tracing::info!(
            keyspace = name,
            "not everything of a keyspace that is deleted is in the bucket"
        );
    }
    let deleted = ask::change(cluster, keyspace, CatalogChange::Delete).await?;
    tracing::info!(keyspace = name, id = %keyspace, "deleted a keyspace");
    // The version alone frees the name; the release only makes its next look-up cheaper.
    match timeout(ANSWER_WITHIN, cluster.store.release_name(name, keyspace)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::info!(keyspace = name, %error, "the name of a deleted keyspace is not released yet")
        }
        Err(_) => {
            tracing::info!(keyspace = name, "the name of a deleted keyspace is not released yet")
        }
    }
    Ok(json(&DeletedDoc {
        keyspace_id: keyspace,
        name: name.to_owned(),
        shipped,
        state: "deleted",
        version: deleted.version,
    }))
}

/// Starts a resize, or only plans it: the plan says what the resize itself would be answered.
pub(crate) async fn resize(cluster: &Arc<Cluster>, request: v1::ResizeRequest) -> Answer {
    let change = CatalogChange::Resize { to: request.shards, max_rate: request.max_rate };
    if request.plan_only {
        return plan_resize(cluster, &request, &change);
    }
    let keyspace = find(&cluster.state(), &request.name)?.catalog.keyspace;
    let started = ask::change(cluster, keyspace, change).await?;
    Ok(json(&running_of(&started)))
}

fn plan_resize(cluster: &Cluster, request: &v1::ResizeRequest, change: &CatalogChange) -> Answer {
    let state = cluster.state();
    let keyspace = find(&state, &request.name)?;
    let now_us = now_us();
    let refused = match changed(&state, keyspace, change, cluster.mono_us(), now_us, 0) {
        Ok(_) => None,
        // Nothing can be said of a resize to a count that is not legal, or is there already.
        Err(error) if error.code != ErrorCode::FailedPrecondition => return Err(error),
        Err(error) => Some(error.message),
    };
    let next = start(&state, keyspace, request.shards, now_us, 0).ok();
    let plan = next.as_ref().and_then(|next| next.plan.as_ref());
    let (catalog, to) = (&keyspace.catalog, request.shards);
    let paces = Paces::of(&state).at_most(request.max_rate);
    let forecast = forecast_of(catalog, &keyspace.reports, to, plan, &paces);
    let asked = Asked {
        keyspace: catalog.name.clone(),
        kind: match to < catalog.spec.shards {
            true => OperationKind::Shrink,
            false => OperationKind::Grow,
        },
        from: Some(ShardsOrNode::Shards(catalog.spec.shards)),
        to: Some(ShardsOrNode::Shards(to)),
        refused,
    };
    Ok(json(&estimate(&state, asked, &forecast, &cluster.settings.prices)))
}

/// Ends the quarantines that keep a keyspace from shrinking, and answers those that are still
/// there: asked again, it answers fewer, in the end none.
pub(crate) async fn end_quarantine(
    cluster: &Arc<Cluster>,
    request: v1::EndQuarantineRequest,
) -> Answer {
    let to = check_shard_count(request.shards)?;
    let running = {
        let state = cluster.state();
        let catalog = &find(&state, &request.name)?.catalog;
        let now_us = now_us();
        let runs = in_the_way(catalog, to).any(|quarantine| quarantine.until_us > now_us);
        runs.then_some(catalog.keyspace)
    };
    if let Some(keyspace) = running {
        ask::change(cluster, keyspace, CatalogChange::EndQuarantines { to }).await?;
        tracing::info!(keyspace = request.name, shards = to, "ended quarantines");
    }
    let state = cluster.state();
    Ok(json(&view::keyspace::quarantines_left(find(&state, &request.name)?, to)))
}
