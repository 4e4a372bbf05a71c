//! The rebalance of the cluster: `cluster rebalance`, its plan, and its part of
//! `operation list|show`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use vasto_core::balance::Move;
use vasto_core::catalog::Rebalanced;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::report::PauseMs;
use vasto_shipping::{Prices, Rebalance};

use super::estimate::TakesDoc;
use super::plan::{RunningDoc, TroubleDoc, moving};
use super::whole::{ProgressDoc, TotalsDoc, UnderWayDoc};
use crate::forecast::moves::moves as forecast_of;
use crate::forecast::time::Paces;
use crate::state::{CANCELLED, ClusterState};

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
    progress: ProgressDoc,
    /// The nodes were even when it was asked for: nothing moves.
    balanced: bool,
    replicas_moved: u64,
    /// Shards that got another preferred primary.
    primaries_moved: u64,
    moves_failed: u64,
    replicas_left: usize,
    primaries_left: usize,
    #[serde(flatten)]
    pub(super) totals: TotalsDoc,
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
    let none = Rebalance { since_us: now_us, ended_us: Some(now_us), ..Rebalance::default() };
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
            (true, _) => running(state, rebalance),
            (false, true) => ProgressDoc::Aborted { reason: Some(CANCELLED.into()) },
            (false, false) => ProgressDoc::Done,
        },
        balanced: false,
        replicas_moved: sum(|one| one.moved.copies),
        primaries_moved: sum(|one| one.primaries),
        moves_failed: sum(|one| one.failed),
        replicas_left: if runs { look.replicas_left } else { 0 },
        primaries_left: if runs { look.primaries_left } else { 0 },
        totals: TotalsDoc {
            keys_moved: sum(|one| one.moved.keys),
            bytes_moved: sum(|one| one.moved.bytes),
            bytes_from_bucket: sum(|one| one.moved.bytes_from_bucket),
            bytes_from_peers: sum(|one| one.moved.bytes_from_peers),
            objects_read: sum(|one| one.moved.objects_read),
            write_pause_ms: PauseMs::default(),
            duration_ms: rebalance.ended_us.unwrap_or(now_us).saturating_sub(since_us) / 1000,
            started_at_us: since_us,
        },
    }
}

fn running(state: &ClusterState, rebalance: Rebalance) -> ProgressDoc {
    let parts: Vec<RunningDoc> = state.active().flat_map(moving).collect();
    let look = &state.rebalance;
    let waiting_for = match rebalance.paused {
        true => {
            let id = rebalance.operation_id();
            Some(format!("`vasto operation resume {id}`: it is paused"))
        }
        false => look.waiting_for.clone(),
    };
    let step = format!("{} replicas moving, {} left", parts.len(), look.replicas_left);
    let trouble = state.rebalance_watch.trouble.as_ref().map(TroubleDoc::from);
    UnderWayDoc::of(step, waiting_for, &parts, rebalance.max_rate, trouble)
        .progress(rebalance.paused)
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
    #[serde(flatten)]
    takes: TakesDoc,
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

/// Returns the plan of a rebalance that makes these moves, so many at a time, at this bound of its
/// rate.
pub(crate) fn plan(
    state: &ClusterState,
    moves: &[Move],
    at_once: usize,
    max_rate: Option<u64>,
    prices: &Prices,
) -> RebalancePlanDoc {
    let forecast = forecast_of(moves, at_once, &Paces::of(state).at_most(max_rate));
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
    RebalancePlanDoc {
        kind: KIND,
        from: None,
        to: None,
        balanced: moves.is_empty(),
        moves: replicas,
        primaries,
        sources: sources.into_iter().filter_map(source).collect(),
        takes: TakesDoc::of(state, &forecast, None, prices),
    }
}
