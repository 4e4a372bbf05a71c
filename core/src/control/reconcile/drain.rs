//! Draining nodes: every replica moves elsewhere, one per shard at a time.
//!
//! **Invariant:** a node is drained when no placement names it and, where its loss is accepted, no
//! replica on it waits to be drained.

use super::outcome::abort;
use super::pace::{Whole, drain_of_plan, release_parts};
use super::repair::{begin, may_copy};
use super::view::View;
use crate::catalog::{Catalog, KeyspaceState, NodeDrain, Placed};
use crate::control::operation::{OperationKind, OperationOutcome, OperationReport};
use crate::control::plan::{Plan, PlanKind};
use crate::control::report::{PauseMs, Reports};

/// Returns the version that takes the next replica from a draining node, or ends the drain when
/// nothing is left there.
pub(super) fn drain_nodes(view: &View<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    let View { catalog, around, .. } = *view;
    for shard in &catalog.placement {
        let staying = shard.replicas.iter().filter(|member| !view.leaves(member)).count();
        let Some(member) = shard.replicas.iter().find(|member| view.leaves(member)) else {
            continue;
        };
        if staying >= catalog.spec.replicas as usize {
            // Not before a replica that stays has taken over: the leaving one may be the only one
            // that can be read.
            let stays = |other: &Placed| !view.leaves(other) && view.serves(other);
            if !shard.replicas.iter().any(stays) {
                continue;
            }
            match view.take_out(shard, member, stays, now_us, nonce) {
                Some(next) => return Some(next),
                None => continue,
            }
        }
        if shard.replicas.iter().all(|member| view.is_given_up(member))
            && may_copy(catalog, shard.shard, now_us)
            && let Some(node) = (around.room)(catalog, shard.shard)
        {
            let kind = PlanKind::RecoverReplica { shard: shard.shard };
            return Some(begin(catalog, kind, shard.shard, &shard.replicas, node, now_us, nonce));
        }
    }
    let complete = catalog
        .placement
        .iter()
        .all(|shard| shard.replicas.len() >= catalog.spec.replicas as usize);
    let ended = |drain: &NodeDrain| complete && is_drained(catalog, drain);
    if catalog.draining_nodes.iter().any(ended) {
        let mut next = catalog.next(now_us, nonce);
        next.draining_nodes.retain(|drain| !ended(drain));
        for drain in catalog.draining_nodes.iter().filter(|drain| ended(drain)) {
            next.remember(end_of(catalog, drain, OperationOutcome::Done, None, now_us));
        }
        return Some(next);
    }
    None
}

/// Returns true when nothing is left on a draining node and, if its data is given up, no replica of
/// it waits to be drained.
pub(super) fn is_drained(catalog: &Catalog, drain: &NodeDrain) -> bool {
    let waits = catalog.draining.iter().any(|draining| draining.node == drain.node);
    let holds = catalog
        .placement
        .iter()
        .any(|shard| shard.replicas.iter().any(|member| member.node == drain.node));
    !(holds || (drain.accept_loss && waits))
}

/// Returns the figures of a node drain in this keyspace so far.
pub fn so_far(catalog: &Catalog, drain: &NodeDrain, now_us: u64) -> OperationReport {
    end_of(catalog, drain, OperationOutcome::Done, None, now_us)
}

/// Builds the report of a node drain in this keyspace.
pub(super) fn end_of(
    catalog: &Catalog,
    drain: &NodeDrain,
    outcome: OperationOutcome,
    reason: Option<String>,
    now_us: u64,
) -> OperationReport {
    let moved = &drain.moved;
    OperationReport {
        id: drain.operation_id(),
        kind: OperationKind::DrainNode,
        keyspace: catalog.name.clone(),
        from: catalog.spec.shards,
        to: catalog.spec.shards,
        outcome,
        reason,
        keys_moved: moved.keys,
        bytes_moved: moved.bytes,
        bytes_from_bucket: moved.bytes_from_bucket,
        bytes_from_peers: moved.bytes_from_peers,
        objects_read: moved.objects_read,
        write_pause_ms: PauseMs::default(),
        duration_ms: now_us.saturating_sub(drain.since_us) / 1000,
        started_at_us: drain.since_us,
        reached: moved.reached.clone(),
        copies: moved.copies,
        shard: None,
        failed_on: Vec::new(),
        estimate: drain.estimate.clone(),
    }
}

/// Returns the version that cancels the drain of a node; `None` when the operation drains none. The
/// replica under construction for it is given up; replicas that have moved already stay where they
/// are.
pub fn cancel_drain(
    catalog: &Catalog,
    operation: &str,
    reason: &str,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let drain = catalog.draining_nodes.iter().find(|drain| drain.operation_id() == operation)?;
    let is_for_it = |plan: &Plan| match plan.kind {
        // It takes the place of the replica that is to stay.
        PlanKind::RecoverReplica { .. } => {
            plan.sources.iter().any(|source| source.node == drain.node)
        }
        _ => drain_of_plan(catalog, plan) == Some(drain),
    };
    let copying = catalog.plan.as_ref().is_some_and(is_for_it);
    let aborted = if copying { abort(catalog, reason, reports, now_us, nonce) } else { None };
    let mut next = aborted.unwrap_or_else(|| catalog.next(now_us, nonce));
    next.draining_nodes.retain(|other| other != drain);
    next.remember(end_of(
        catalog,
        drain,
        OperationOutcome::Aborted,
        Some(reason.to_owned()),
        now_us,
    ));
    Some(next)
}

/// Returns the version that begins to drain a node; `None` when the node has no replicas, and none
/// that waits to be drained and is to be given up. It takes the place of an earlier drain of the
/// node, whose pace ends with it.
pub fn drain_node(catalog: &Catalog, drain: NodeDrain, now_us: u64, nonce: u64) -> Option<Catalog> {
    let node = drain.node;
    if !concerns(catalog, &drain) || catalog.state == KeyspaceState::Deleted {
        return None;
    }
    let mut next = catalog.next(now_us, nonce);
    for earlier in catalog.draining_nodes.iter().filter(|drain| drain.node == node) {
        release_parts(catalog, Whole::Drain(node, earlier.since_us), &mut next);
    }
    next.draining_nodes.retain(|drain| drain.node != node);
    next.draining_nodes.push(drain);
    Some(next)
}

/// Returns true when the node has replicas of the keyspace, or draining ones that are to be given
/// up.
pub fn concerns(catalog: &Catalog, drain: &NodeDrain) -> bool {
    let placed = catalog
        .placement
        .iter()
        .any(|shard| shard.replicas.iter().any(|member| member.node == drain.node));
    placed
        || (drain.accept_loss
            && catalog.draining.iter().any(|draining| draining.node == drain.node))
}
