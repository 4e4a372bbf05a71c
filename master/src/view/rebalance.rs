//! The rebalance of the cluster: `cluster rebalance`, its plan, and its part of
//! `operation list|show`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use vasto_core::balance::Move;
use vasto_core::catalog::Rebalanced;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::report::PauseMs;
use vasto_shipping::{Prices, Rebalance};

use super::estimate::{AmountDoc, DiskDoc, RequestsDoc};
use super::plan::moving;
use crate::forecast::moves::moves as forecast_of;
use crate::forecast::time::Paces;
use crate::state::ClusterState;

const KIND: &str = "rebalance";
/// What the ids of rebalances begin with.
const PREFIX: &str = "rebalance-";

/// A rebalance.
#[derive(Serialize)]
pub(crate) struct RebalanceDoc {
    pub(super) id: String,
    kind: &'static str,
    /// The names of the keyspaces in which something has moved, or moves.
    keyspace: String,
    #[serde(flatten)]
    progress: Progress,
    /// The nodes were even when it was asked for: nothing moves.
    balanced: bool,
    replicas_moved: u64,
    /// Shards that got another preferred primary.
    primaries_moved: u64,
    moves_failed: u64,
    replicas_left: usize,
    primaries_left: usize,
    keys_moved: u64,
    bytes_moved: u64,
    bytes_from_bucket: u64,
    bytes_from_peers: u64,
    objects_read: u64,
    /// No write waits for a move.
    write_pause_ms: PauseMs,
    duration_ms: u64,
    pub(super) started_at_us: u64,
}

#[derive(Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Progress {
    Running { step: String, waiting_for: Option<String>, bytes_done: u64, bytes_total: u64 },
    Aborted { reason: Option<String> },
    Done,
}

/// Returns true for ids of rebalances.
pub(crate) fn is_rebalance(id: &str) -> bool {
    id.starts_with(PREFIX)
}

/// Returns the rebalance that runs, or the last one that ran.
pub(crate) fn last(state: &ClusterState, now_us: u64) -> Option<RebalanceDoc> {
    state.settings.rebalance.map(|rebalance| document(state, rebalance, now_us))
}

/// Returns the rebalance of that id; `None` unless it is the last one.
pub(crate) fn of_id(state: &ClusterState, id: &str, now_us: u64) -> Option<RebalanceDoc> {
    let rebalance = state.settings.rebalance.filter(|last| last.operation_id() == id)?;
    Some(document(state, rebalance, now_us))
}

/// Returns the answer for a cluster that is in balance.
pub(crate) fn balanced(now_us: u64) -> RebalanceDoc {
    let none = Rebalance { since_us: now_us, ended_us: Some(now_us), cancelled: false };
    let document = document(&ClusterState::default(), none, now_us);
    RebalanceDoc { balanced: true, ..document }
}

fn document(state: &ClusterState, rebalance: Rebalance, now_us: u64) -> RebalanceDoc {
    let since_us = rebalance.since_us;
    let catalogs = || state.keyspaces.values().map(|keyspace| &keyspace.catalog);
    let totals: Vec<&Rebalanced> = catalogs()
        .filter_map(|catalog| catalog.rebalanced.as_ref())
        .filter(|totals| totals.since_us == since_us)
        .collect();
    let sum = |figure: fn(&Rebalanced) -> u64| totals.iter().map(|one| figure(one)).sum::<u64>();
    let concerned = catalogs().filter(|catalog| {
        let counted = catalog.rebalanced.as_ref().is_some_and(|one| one.since_us == since_us);
        counted || catalog.moves.iter().any(|moving| moving.rebalance_us == since_us)
    });
    let names: BTreeSet<&str> = concerned.map(|catalog| catalog.name.as_str()).collect();
    let runs = rebalance.ended_us.is_none();
    let look = &state.rebalance;
    RebalanceDoc {
        id: rebalance.operation_id(),
        kind: KIND,
        keyspace: names.into_iter().collect::<Vec<_>>().join(","),
        progress: match (runs, rebalance.cancelled) {
            (true, _) => running(state),
            (false, true) => {
                Progress::Aborted { reason: Some("cancelled by an administrator".into()) }
            }
            (false, false) => Progress::Done,
        },
        balanced: false,
        replicas_moved: sum(|one| one.moved.copies),
        primaries_moved: sum(|one| one.primaries),
        moves_failed: sum(|one| one.failed),
        replicas_left: if runs { look.replicas_left } else { 0 },
        primaries_left: if runs { look.primaries_left } else { 0 },
        keys_moved: sum(|one| one.moved.keys),
        bytes_moved: sum(|one| one.moved.bytes),
        bytes_from_bucket: sum(|one| one.moved.bytes_from_bucket),
        bytes_from_peers: sum(|one| one.moved.bytes_from_peers),
        objects_read: sum(|one| one.moved.objects_read),
        write_pause_ms: PauseMs::default(),
        duration_ms: rebalance.ended_us.unwrap_or(now_us).saturating_sub(since_us) / 1000,
        started_at_us: since_us,
    }
}

fn running(state: &ClusterState) -> Progress {
    let plans: Vec<_> = state.active().flat_map(moving).collect();
    let look = &state.rebalance;
    Progress::Running {
        step: format!("{} replicas moving, {} left", plans.len(), look.replicas_left),
        waiting_for: look.waiting_for.clone(),
        bytes_done: plans.iter().map(|plan| plan.bytes_done).sum(),
        bytes_total: plans.iter().map(|plan| plan.bytes_total).sum(),
    }
}

/// `cluster rebalance --plan`.
#[derive(Serialize)]
pub(crate) struct RebalancePlanDoc {
    kind: &'static str,
    /// As of a resize; a rebalance changes no number of shards.
    from: Option<u32>,
    to: Option<u32>,
    /// The nodes are even: nothing would move.
    balanced: bool,
    moves: Vec<MoveDoc>,
    /// Shards that get another preferred primary.
    primaries: Vec<MoveDoc>,
    sources: Vec<SourceDoc>,
    bytes_moved: u64,
    bytes_from_bucket: u64,
    requests: RequestsDoc,
    disk_needed: Vec<DiskDoc>,
    seconds: f64,
    cost: AmountDoc,
    refused: Option<String>,
}

#[derive(Serialize)]
struct MoveDoc {
    keyspace: String,
    shard: ShardId,
    replica_id: ReplicaId,
    from: NodeId,
    to: NodeId,
    bytes: u64,
}

/// What is read of one shard, and the node that has shipped it.
#[derive(Serialize)]
struct SourceDoc {
    keyspace: String,
    shard: ShardId,
    node_id: NodeId,
    bytes: u64,
}

/// Returns the plan of a rebalance that makes these moves.
pub(crate) fn plan(state: &ClusterState, moves: &[Move], prices: &Prices) -> RebalancePlanDoc {
    let forecast = forecast_of(moves, &Paces::of(state));
    let name = |keyspace: KeyspaceId| {
        state.keyspaces.get(&keyspace).map(|keyspace| keyspace.catalog.name.clone())
    };
    let mut sources: BTreeMap<(KeyspaceId, ShardId), u64> = BTreeMap::new();
    let (mut replicas, mut primaries) = (Vec::new(), Vec::new());
    for made in moves {
        match *made {
            Move::Replica { keyspace, shard, replica, from, to, bytes } => {
                let keyspace_name = name(keyspace).unwrap_or_default();
                *sources.entry((keyspace, shard)).or_default() += bytes;
                replicas.push(MoveDoc {
                    keyspace: keyspace_name,
                    shard,
                    replica_id: replica,
                    from,
                    to,
                    bytes,
                });
            }
            Move::Primary { keyspace, shard, replica, from, to, bytes } => {
                let keyspace = name(keyspace).unwrap_or_default();
                primaries.push(MoveDoc { keyspace, shard, replica_id: replica, from, to, bytes });
            }
        }
    }
    let source = |((keyspace, shard), bytes): ((KeyspaceId, ShardId), u64)| {
        let catalog = &state.keyspaces.get(&keyspace)?.catalog;
        let node_id = catalog.shard(shard)?.shipper()?.node;
        Some(SourceDoc { keyspace: catalog.name.clone(), shard, node_id, bytes })
    };
    let disk = forecast.disk.iter().map(|(node, bytes)| {
        let free = state.disk_of(*node).filter(|disk| disk.bytes > 0).map(|disk| disk.free);
        DiskDoc { node_id: *node, bytes: *bytes, free }
    });
    let (get, put) = (forecast.gets, forecast.puts);
    RebalancePlanDoc {
        kind: KIND,
        from: None,
        to: None,
        balanced: moves.is_empty(),
        moves: replicas,
        primaries,
        sources: sources.into_iter().filter_map(source).collect(),
        bytes_moved: forecast.bytes_moved,
        bytes_from_bucket: forecast.bytes_from_bucket,
        requests: RequestsDoc { get, put },
        disk_needed: disk.collect(),
        seconds: (forecast.seconds * 1000.0).round() / 1000.0,
        cost: AmountDoc::of(get, put, forecast.bytes_from_bucket, prices),
        refused: None,
    }
}
