//! Keyspaces: `keyspace describe` and the lines of `keyspace list`.

use serde::Serialize;
use vasto_core::catalog::{Ack, Catalog, KeyspaceState, Quarantine, RetiredReplica};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, ReplicaId, ShardId};
use vasto_core::operation::operation_id;
use vasto_core::reconcile::in_the_way;
use vasto_core::report::{ReplicaPhase, ReplicaReport};

use super::plan::{RunningDoc, moving, running};
use crate::state::{ClusterState, Keyspace};

/// `keyspace describe`.
#[derive(Serialize)]
pub(crate) struct KeyspaceDoc {
    name: String,
    shards: u32,
    replicas: u32,
    epoch: Epoch,
    ack: Ack,
    state: KeyspaceState,
    placement: Vec<ShardDoc>,
    operation: Option<RunningDoc>,
    keyspace_id: KeyspaceId,
    version: CatalogVersion,
    ttl_ms: Option<u64>,
    quarantines: Vec<Quarantine>,
    /// Replicas of shards that have retired, while there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    retired: Vec<RetiredDoc>,
}

/// A replica of a shard that a shrink has retired.
#[derive(Serialize)]
struct RetiredDoc {
    shard: ShardId,
    replica_id: ReplicaId,
    node_id: NodeId,
    bytes: Option<u64>,
    /// When its quarantine ends, microseconds since 1970.
    until_us: Option<u64>,
}

/// The quarantines that keep a keyspace from shrinking.
#[derive(Serialize)]
pub(crate) struct QuarantinesDoc {
    keyspace: String,
    /// The count that it is to shrink to.
    shards: u32,
    quarantines: Vec<Quarantine>,
    waiting_for: Option<String>,
}

#[derive(Serialize)]
struct ShardDoc {
    shard: ShardId,
    replicas: Vec<ReplicaDoc>,
}

#[derive(Serialize)]
struct ReplicaDoc {
    node_id: NodeId,
    replica_id: ReplicaId,
    role: &'static str,
    state: &'static str,
    lsn: Option<Lsn>,
    shipped_lsn: Option<Lsn>,
    lag_ms: Option<u64>,
    keys: Option<u64>,
    /// The same number under its accurate name.
    keys_estimate: Option<u64>,
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// One line of `keyspace list`.
#[derive(Serialize)]
pub(crate) struct KeyspaceSummary {
    name: String,
    keyspace_id: KeyspaceId,
    shards: u32,
    replicas: u32,
    epoch: Epoch,
    ack: Ack,
    state: KeyspaceState,
    version: CatalogVersion,
    keys: u64,
    /// The same number under its accurate name.
    keys_estimate: u64,
    bytes: u64,
    operation: Option<String>,
    /// Replicas of shards that have retired, while there are any.
    #[serde(skip_serializing_if = "is_zero")]
    retired_replicas: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Returns the document of `keyspace describe`.
pub(crate) fn describe(state: &ClusterState, keyspace: &Keyspace) -> KeyspaceDoc {
    let catalog = &keyspace.catalog;
    let report = |replica: ReplicaId| keyspace.reports.get(&replica);
    let placement = catalog.placement.iter().map(|shard| ShardDoc {
        shard: shard.shard,
        replicas: shard
            .replicas
            .iter()
            .map(|placed| {
                let role = if shard.primary() == Some(*placed) { "primary" } else { "replica" };
                replica(state, report(placed.replica), placed.replica, placed.node, role)
            })
            .chain(catalog.draining.iter().filter(|draining| draining.shard == shard.shard).map(
                |draining| ReplicaDoc {
                    state: "draining",
                    ..replica(
                        state,
                        report(draining.replica),
                        draining.replica,
                        draining.node,
                        "leaving",
                    )
                },
            ))
            .collect(),
    });
    KeyspaceDoc {
        name: catalog.name.clone(),
        shards: catalog.spec.shards,
        replicas: catalog.spec.replicas,
        epoch: catalog.epoch,
        ack: catalog.spec.ack,
        state: catalog.state,
        placement: placement.collect(),
        operation: running(keyspace).or_else(|| moving(keyspace).into_iter().next()),
        keyspace_id: catalog.keyspace,
        version: catalog.version,
        ttl_ms: catalog.spec.ttl_ms,
        quarantines: catalog.quarantines.clone(),
        retired: catalog.retired.iter().map(|retired| retired_replica(keyspace, retired)).collect(),
    }
}

fn retired_replica(keyspace: &Keyspace, retired: &RetiredReplica) -> RetiredDoc {
    let kept = keyspace.catalog.quarantines.iter().find(|kept| kept.plan == retired.plan);
    RetiredDoc {
        shard: retired.shard,
        replica_id: retired.replica,
        node_id: retired.node,
        bytes: keyspace.reports.get(&retired.replica).map(|report| report.bytes),
        until_us: kept.map(|kept| kept.until_us),
    }
}

/// Returns the quarantines that keep a keyspace from shrinking to `to` shards.
pub(crate) fn quarantines_left(keyspace: &Keyspace, to: u32) -> QuarantinesDoc {
    QuarantinesDoc {
        keyspace: keyspace.catalog.name.clone(),
        shards: to,
        quarantines: in_the_way(&keyspace.catalog, to).cloned().collect(),
        waiting_for: keyspace.waiting_for.clone(),
    }
}

fn replica(
    state: &ClusterState,
    report: Option<&ReplicaReport>,
    id: ReplicaId,
    node: NodeId,
    role: &'static str,
) -> ReplicaDoc {
    let (phase, reason) = replica_state(state, report, node);
    ReplicaDoc {
        node_id: node,
        replica_id: id,
        role,
        state: phase,
        lsn: report.map(|report| report.lsn),
        shipped_lsn: report.map(|report| report.shipped_lsn),
        lag_ms: report.map(|report| report.replication.lag_ms),
        keys: report.map(|report| report.keys),
        keys_estimate: report.map(|report| report.keys),
        bytes: report.map(|report| report.bytes),
        reason,
    }
}

fn replica_state(
    state: &ClusterState,
    report: Option<&ReplicaReport>,
    node: NodeId,
) -> (&'static str, Option<String>) {
    if !state.is_live(node) {
        return ("away", None);
    }
    match report.map(|report| &report.phase) {
        None => ("unknown", None),
        Some(ReplicaPhase::Opening) => ("opening", None),
        Some(ReplicaPhase::Building) => ("building", None),
        Some(ReplicaPhase::Serving) if report.is_some_and(|report| report.replication.stalled) => {
            let reason = "its disk does not answer writes, or did not a moment ago; another replica serves where there is \
                          one: look at the disk of the node";
            ("stalled", Some(reason.to_owned()))
        }
        Some(ReplicaPhase::Serving) if report.is_some_and(|report| !report.replication.ready) => {
            ("catching_up", None)
        }
        Some(ReplicaPhase::Serving) => ("serving", None),
        Some(ReplicaPhase::Failed(reason)) => ("failed", Some(reason.clone())),
    }
}

/// Returns what keeps a keyspace from serving; empty when every replica serves.
pub(crate) fn not_serving(state: &ClusterState, keyspace: &Keyspace) -> Vec<String> {
    let Catalog { name, placement, .. } = &*keyspace.catalog;
    let all = placement
        .iter()
        .flat_map(|shard| shard.replicas.iter().map(move |placed| (shard.shard, placed)));
    all.filter_map(|(shard, placed)| {
        let node = placed.node;
        match replica_state(state, keyspace.reports.get(&placed.replica), node) {
            ("serving", _) => None,
            (phase, None) => Some(format!("shard {shard} of {name} on {node} is {phase}")),
            (phase, Some(reason)) => {
                Some(format!("shard {shard} of {name} on {node} has {phase}: {reason}"))
            }
        }
    })
    .collect()
}

/// Returns one line of `keyspace list`.
pub(crate) fn summary(keyspace: &Keyspace) -> KeyspaceSummary {
    let catalog = &keyspace.catalog;
    let first = catalog
        .placement
        .iter()
        .filter_map(|shard| keyspace.reports.get(&shard.replicas.first()?.replica));
    let (keys, bytes) =
        first.fold((0, 0), |(keys, bytes), report| (keys + report.keys, bytes + report.bytes));
    KeyspaceSummary {
        name: catalog.name.clone(),
        keyspace_id: catalog.keyspace,
        shards: catalog.spec.shards,
        replicas: catalog.spec.replicas,
        epoch: catalog.epoch,
        ack: catalog.spec.ack,
        state: catalog.state,
        version: catalog.version,
        keys,
        keys_estimate: keys,
        bytes,
        operation: catalog.plans().next().map(|plan| operation_id(catalog.keyspace, plan.id)),
        retired_replicas: catalog.retired.len(),
    }
}
