//! Repair: plans that add the replicas that a shard lacks.
//!
//! **Invariant:** failed attempts are repeated after growing pauses, on other nodes first.

use super::view::View;
use crate::catalog::{Catalog, Placed, ShardPlacement};
use crate::control::operation::{OperationOutcome, OperationReport};
use crate::control::plan::{Plan, PlanKind, Source, Step, Target};
use crate::ids::{NodeId, PlanId, ReplicaId, ShardId};

/// Shortest pause before a new replica of a shard is begun after one failed, microseconds; doubled
/// by each further failure.
pub const COPY_AGAIN_US: u64 = 10_000_000;

/// Longest such pause, as long as a node can take the replica.
pub const COPY_AGAIN_MAX_US: u64 = 600_000_000;

/// Time for which a node on which a new replica failed is the last choice, microseconds.
pub const AVOID_NODE_US: u64 = 600_000_000;

/// Returns the operations that failed to add a replica to a shard since the last success, newest
/// first.
fn failures(catalog: &Catalog, shard: ShardId) -> impl Iterator<Item = &OperationReport> {
    let of_shard = move |report: &&OperationReport| {
        report.is_copy() && report.shard.is_none_or(|of| of == shard)
    };
    let newest_first = catalog.operations.iter().rev().filter(of_shard);
    newest_first.take_while(|report| report.outcome == OperationOutcome::Aborted)
}

/// Returns the time, microseconds since 1970, before which no new replica of a shard is begun after
/// one failed. Other shards do not wait for it.
pub(super) fn copy_not_before(catalog: &Catalog, shard: ShardId) -> u64 {
    let failed = u32::try_from(failures(catalog, shard).count()).unwrap_or(u32::MAX);
    let Some(last) = failures(catalog, shard).next() else { return 0 };
    let pause_us = COPY_AGAIN_US.saturating_mul(1u64.checked_shl(failed - 1).unwrap_or(u64::MAX));
    last.ended_at_us().saturating_add(pause_us.min(COPY_AGAIN_MAX_US))
}

pub(super) fn may_copy(catalog: &Catalog, shard: ShardId, now_us: u64) -> bool {
    now_us >= copy_not_before(catalog, shard)
}

/// Returns the nodes on which a new replica of this keyspace has failed lately: they are chosen
/// only when no other node can take the next one.
pub fn nodes_to_avoid(catalog: &Catalog, now_us: u64) -> Vec<NodeId> {
    let copies = catalog.operations.iter().filter(|report| report.is_copy() || report.is_move());
    let lately =
        copies.filter(|report| now_us < report.ended_at_us().saturating_add(AVOID_NODE_US));
    lately.flat_map(|report| report.failed_on.iter().copied()).collect()
}

/// Returns the version that begins one more replica of a shard that has too few on nodes that stay;
/// a shard whose last attempt failed comes after the others.
pub(super) fn start_copy(view: &View<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    let catalog = view.catalog;
    let lacks = |shard: &&ShardPlacement| {
        view.staying(shard) < catalog.spec.replicas as usize
            && may_copy(catalog, shard.shard, now_us)
    };
    let mut shards: Vec<&ShardPlacement> = catalog.placement.iter().filter(lacks).collect();
    shards.sort_by_key(|shard| {
        failures(catalog, shard.shard).next().map(OperationReport::ended_at_us)
    });
    shards.into_iter().find_map(|shard| {
        // The shipper has most of its files in the bucket already.
        let shipper = shard.shipper().filter(|shipper| view.is_ready(shipper));
        let source = shipper
            .or_else(|| shard.primary_first().into_iter().find(|member| view.is_ready(member)))?;
        let node = (view.around.room)(catalog, shard.shard)?;
        let kind = PlanKind::AddReplica { shard: shard.shard };
        Some(begin(catalog, kind, shard.shard, &[source], node, now_us, nonce))
    })
}

/// Returns the version that begins a plan with one target.
pub(super) fn begin(
    catalog: &Catalog,
    kind: PlanKind,
    shard: ShardId,
    sources: &[Placed],
    node: NodeId,
    now_us: u64,
    nonce: u64,
) -> Catalog {
    let source = |member: &Placed| Source::new(shard, member.replica, member.node);
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind,
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        // No replica is there that could make a checkpoint for a recovery: it takes the last one.
        step: if matches!(kind, PlanKind::RecoverReplica { .. }) {
            Step::Tail
        } else {
            Step::Prepare
        },
        sources: sources.iter().map(source).collect(),
        targets: vec![Target { shard, replica: catalog.next_replica, node }],
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    next.next_replica = ReplicaId(catalog.next_replica.0 + 1);
    next
}
