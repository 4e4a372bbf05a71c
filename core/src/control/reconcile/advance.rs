//! The function that decides the next catalog version of a running plan.
//!
//! `prepare -> tail -> sealing -> committed -> finished`, with `sealing -> tail` when a seal does
//! not complete in time, and abort from every step before `committed`.
//!
//! **Invariant:** [`advance`] is a pure function of the last catalog version, the nodes' reports
//! and the time, so any master can continue at any step; a commit is decided by one create-only
//! version, and only reports that name the running plan and the sealing version count. A paused
//! plan goes no further than `tail`, and none of its time-outs runs out. Before
//! the commit a missing report never advances a plan: the plan waits, unseals or is aborted. After
//! the commit nothing is left to decide, and a node that does not come back is not waited for.

use super::commit::advance_committed;
use super::copy::{advance_copy, advance_restore};
use super::outcome::abort;
use super::pace::drain_of_plan;
use super::progress::{Advance, Running, others_of_sources, source_progress, target_progress};
use super::quarantine::advance_quarantines;
use super::resize::{advance_prepare, advance_sealing, advance_tail, placement_change, undo_seal};
use crate::catalog::Catalog;
use crate::control::operation::operation_id;
use crate::control::plan::{
    NODE_AWAY_MAX_US, Plan, PlanKind, SEALS_UNDONE_MAX, Source, Step, Target,
};
use crate::control::report::{ReplicaPhase, Reports};
use crate::ids::{NodeId, ReplicaId};
use crate::limits::SEAL_TIMEOUT;

/// Decides the next catalog version of a keyspace whose last one was shown when it was decided on.
/// See [`advance_shown`].
pub fn advance(
    catalog: &Catalog,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    advance_shown(catalog, catalog.written_at_us, reports, away_us, here_us, now_us, nonce)
}

/// Decides the next catalog version of a keyspace.
///
/// `shown_us` is when the nodes were told of the last version: its write may have taken a while.
/// `away_us` returns how long a node has been unreachable (0 for a live one), `here_us` how long a
/// live one has been there.
pub fn advance_shown(
    catalog: &Catalog,
    shown_us: u64,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    match &catalog.plan {
        Some(plan) => {
            let running = Running { catalog, plan, reports, shown_us, now_us, nonce };
            advance_plan(running, away_us, here_us)
        }
        None => advance_quarantines(catalog, reports, now_us, nonce),
    }
}

pub(super) fn advance_plan(
    running: Running<'_>,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
) -> Advance {
    let Running { catalog, plan, now_us, nonce, .. } = running;
    if plan.step != Step::Committed
        && let Some(decision) = obstacle(running, &away_us)
    {
        return decision;
    }
    if plan.paused && plan.step == Step::Tail {
        return Advance::Wait(resume_of(running));
    }
    match plan.step {
        Step::Tail if plan.adds_member() => advance_copy(running, here_us),
        Step::Tail if matches!(plan.kind, PlanKind::Restore { .. }) => advance_restore(running),
        Step::Prepare => advance_prepare(running),
        Step::Tail => advance_tail(running, here_us),
        Step::Sealing => advance_sealing(running).unwrap_or_else(|| {
            if plan.seals_undone >= SEALS_UNDONE_MAX {
                let reason = format!(
                    "the seal did not complete within {SEAL_TIMEOUT:?}, {SEALS_UNDONE_MAX} times"
                );
                return abort_with(running, reason);
            }
            Advance::Write(Box::new(undo_seal(catalog, plan, now_us, nonce)))
        }),
        Step::Committed => advance_committed(running, away_us),
    }
}

/// Returns what a paused plan waits for.
fn resume_of(running: Running<'_>) -> String {
    let Running { catalog, plan, .. } = running;
    let drain = drain_of_plan(catalog, plan).filter(|drain| drain.paused);
    let id =
        drain.map_or_else(|| operation_id(catalog.keyspace, plan.id), |drain| drain.operation_id());
    format!("`vasto operation resume {id}`: it is paused")
}

fn abort_with(running: Running<'_>, reason: String) -> Advance {
    match abort(running.catalog, &reason, running.reports, running.now_us, running.nonce) {
        Some(next) => Advance::Write(Box::new(next)),
        None => Advance::Wait(reason),
    }
}

/// Returns the decision that a failed or absent member, or a placement that has changed, forces on
/// a plan that has not committed.
fn obstacle(running: Running<'_>, away_us: impl Fn(NodeId) -> u64) -> Option<Advance> {
    let Running { catalog, plan, reports, .. } = running;
    if let Some(reason) = placement_change(catalog, plan) {
        return Some(abort_with(running, reason));
    }
    let of_source =
        |source: &Source| source_progress(plan, source.replica, reports)?.failed.clone();
    let of_target =
        |target: &Target| target_progress(plan, target.replica, reports)?.failed.clone();
    let failed =
        plan.sources.iter().find_map(of_source).or_else(|| plan.targets.iter().find_map(of_target));
    if let Some(reason) = failed {
        return Some(abort_with(running, reason));
    }
    match returned(plan, reports, &away_us) {
        Some(Returned::Serves(replica, node)) => {
            let reason =
                format!("replica {replica} is back on {node} and serves; it is copied instead");
            return Some(abort_with(running, reason));
        }
        Some(Returned::NotYet(replica, node)) => {
            let what = format!("{node}, which is back, to open replica {replica} or to fail to");
            return Some(Advance::Wait(what));
        }
        None => {}
    }
    let others = others_of_sources(catalog, plan);
    for (shard, replica) in
        plan.members().chain(others.iter().map(|(shard, member)| (*shard, member.replica)))
    {
        if let Some(ReplicaPhase::Failed(reason)) =
            reports.get(&replica).map(|report| &report.phase)
        {
            return Some(abort_with(
                running,
                format!("the replica of shard {shard} has failed: {reason}"),
            ));
        }
    }
    let nodes: Vec<NodeId> =
        plan.nodes().chain(others.iter().map(|(_, member)| member.node)).collect();
    // A paused plan loses no time: it waits for a node as long as it is paused.
    let too_long = |node: &NodeId| !plan.paused && away_us(*node) > NODE_AWAY_MAX_US;
    if let Some(node) = nodes.iter().copied().find(too_long) {
        let reason = format!("node {node} has been away for {} s", away_us(node) / 1_000_000);
        return Some(abort_with(running, reason));
    }
    // The last report of a node that is away says nothing about its present state.
    let waits = plan.step == Step::Tail && !plan.paused;
    let away = nodes.into_iter().find(|node| waits && away_us(*node) > 0)?;
    Some(Advance::Wait(format!("node {away} to come back")))
}

/// A replica that a recovery was to replace, and whose node is back.
enum Returned {
    Serves(ReplicaId, NodeId),
    NotYet(ReplicaId, NodeId),
}

/// Finds a replica that was given up and is back before it was replaced: it holds records that the
/// bucket does not, and may have taken writes since. A failed replica does not count: its failure
/// is why it was given up.
fn returned(plan: &Plan, reports: &Reports, away_us: impl Fn(NodeId) -> u64) -> Option<Returned> {
    let given_up =
        plan.sources.iter().filter(|_| matches!(plan.kind, PlanKind::RecoverReplica { .. }));
    let live = given_up.filter(|source| away_us(source.node) == 0);
    let states = live.filter_map(|source| match reports.get(&source.replica) {
        Some(report) if report.has_failed() => None,
        Some(report) if report.replication.ready => {
            Some(Returned::Serves(source.replica, source.node))
        }
        _ => Some(Returned::NotYet(source.replica, source.node)),
    });
    // A serving replica decides, whatever the others do.
    states.min_by_key(|state| matches!(state, Returned::NotYet(..)))
}
