//! A change of the shard count: its start, and its steps up to the commit.
//!
//! **Invariants**
//! - Only a source whose seal names the running plan and the sealing version counts as sealed.
//! - A plan goes on only with the placement that it started with: each shard that gives has its
//!   source, and each placed replica of a shard that stays in a shrink is a target.

use std::cmp::Ordering;

use super::commit::commit;
use super::copy::begun;
use super::grow::start_grow;
use super::progress::{
    Advance, Running, others_of_sources, shipping_targets, source_progress, target_progress,
};
use super::refusal::PlanError;
use super::seal::is_overdue;
use super::shrink::{agree_on_floor, start_shrink};
use crate::band::check_shard_count;
use crate::catalog::{Catalog, KeyspaceState};
use crate::control::plan::{Plan, Step, Target};
use crate::control::report::{TargetProgress, TargetStage};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits::{TAIL_LAG_BYTES_MAX, TAIL_LAG_LSNS_MAX};

/// Returns the version that starts changing `catalog` to `to` shards. `target_nodes` has the nodes
/// for the replicas of each new shard of a grow, in the order of the shards, the preferred primary
/// first.
pub fn start_resize(
    catalog: &Catalog,
    to: u32,
    target_nodes: &[Vec<NodeId>],
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PlanError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(PlanError::Deleted);
    }
    check_shard_count(to)?;
    match to.cmp(&catalog.spec.shards) {
        Ordering::Equal => Err(PlanError::SameCount(to)),
        Ordering::Less => start_shrink(catalog, to, now_us, nonce),
        Ordering::Greater => start_grow(catalog, to, target_nodes, now_us, nonce),
    }
}

pub(super) fn advance_prepare(running: Running<'_>) -> Advance {
    let Running { catalog, plan, reports, now_us, nonce, .. } = running;
    if plan.shrinks()
        && let Some(decision) = agree_on_floor(running)
    {
        return decision;
    }
    let mut next_plan = plan.clone();
    for source in &mut next_plan.sources {
        let progress = source_progress(plan, source.replica, reports);
        let Some(manifest) = progress.and_then(|progress| progress.manifest.clone()) else {
            return Advance::Wait(format!("the checkpoint of shard {}", source.shard));
        };
        source.manifest = Some(manifest);
        source.export = progress.and_then(|progress| progress.export.clone());
        if plan.exports() && source.export.is_none() {
            return Advance::Wait(format!("the export of shard {}", source.shard));
        }
    }
    next_plan.step = Step::Tail;
    let mut next = catalog.next(now_us, nonce);
    next.pins = next_plan
        .sources
        .iter()
        .flat_map(|source| source.manifest.iter().map(|pinned| &pinned.key).chain(&source.export))
        .cloned()
        .collect();
    next.plan = Some(next_plan);
    Advance::Write(Box::new(next))
}

pub(super) fn advance_tail(running: Running<'_>, here_us: impl Fn(NodeId) -> u64) -> Advance {
    let Running { catalog, plan, now_us, nonce, .. } = running;
    for target in &plan.targets {
        let progress = match begun(running, target, "target", &here_us) {
            Ok(progress) => progress,
            Err(decision) => return decision,
        };
        if progress.stage != TargetStage::Tailing {
            return Advance::Wait(format!("shard {} to load its bands", target.shard));
        }
        if !progress.manifest_shipped
            && shipping_targets(plan).any(|shipping| shipping.replica == target.replica)
        {
            return Advance::Wait(match plan.shrinks() {
                true => format!("a manifest of shard {} that holds what it received", target.shard),
                false => format!("the first manifest of shard {}", target.shard),
            });
        }
        if !is_close(plan, progress) {
            return Advance::Wait(catching_up(running, target, progress));
        }
    }
    // After an undone seal the next one waits a little longer each time.
    let pause_us = u64::from(plan.seals_undone) * 250_000;
    if now_us < catalog.written_at_us + pause_us {
        return Advance::Wait("the pause after an undone seal".into());
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan { step: Step::Sealing, ..plan.clone() });
    Advance::Write(Box::new(next))
}

/// Returns true when the rest of the tails is taken within a moment once the sources have sealed.
/// Records may be of any length: their number counts only where their bytes are not told.
fn is_close(plan: &Plan, progress: &TargetProgress) -> bool {
    match progress.lag_bytes {
        Some(bytes) => {
            let close = TAIL_LAG_BYTES_MAX * plan.sources.len() as u64;
            progress.lag_lsns != u64::MAX && bytes <= close
        }
        None => progress.lag_lsns <= TAIL_LAG_LSNS_MAX,
    }
}

/// Says how far a target is behind, and which sources slow their writers down for it.
fn catching_up(running: Running<'_>, target: &Target, progress: &TargetProgress) -> String {
    let Running { plan, reports, .. } = running;
    let behind = match (progress.lag_lsns, progress.lag_bytes) {
        (u64::MAX, _) => "it reads what the bucket has".to_owned(),
        (lsns, Some(bytes)) => format!("{lsns} records, {bytes} bytes behind"),
        (lsns, None) => format!("{lsns} records behind"),
    };
    let slowed = plan.sources.iter().filter_map(|source| {
        let throttle = source_progress(plan, source.replica, reports)?.throttle?;
        Some(format!("shard {} to {} KiB/s", source.shard, throttle.bytes_per_s / 1024))
    });
    let slowed: Vec<String> = slowed.collect();
    let slowed = match slowed.is_empty() {
        true => String::new(),
        false => format!("; the writers of moving keys are slowed down: {}", slowed.join(", ")),
    };
    format!("shard {} to catch up ({behind}){slowed}", target.shard)
}

/// Advances the step `sealing`; `None` when the seal took too long.
pub(super) fn advance_sealing(running: Running<'_>) -> Option<Advance> {
    match sealed_and_caught_up(running) {
        Ok(()) => Some(Advance::Write(Box::new(commit(running)))),
        Err(_) if is_overdue(running) => None,
        Err(missing) => Some(Advance::Wait(missing)),
    }
}

/// Checks that every placed replica of the sources' shards has sealed under this very version, and
/// that every target holds each source's log up to the seal, where it holds everything that these
/// replicas had accepted.
fn sealed_and_caught_up(running: Running<'_>) -> Result<(), String> {
    let Running { catalog, plan, reports, .. } = running;
    let seal_of = |shard: ShardId, replica: ReplicaId| {
        source_progress(plan, replica, reports)
            .and_then(|progress| progress.sealed)
            .filter(|sealed| sealed.version == catalog.version)
            .ok_or_else(|| format!("replica {replica} of shard {shard} to seal"))
    };
    for (shard, member) in others_of_sources(catalog, plan) {
        seal_of(shard, member.replica)?;
    }
    for source in &plan.sources {
        let sealed = seal_of(source.shard, source.replica)?;
        for target in &plan.targets {
            let cursor = target_progress(plan, target.replica, reports)
                .and_then(|progress| progress.cursors.get(&source.replica).copied())
                .unwrap_or_default();
            if cursor < sealed.lsn {
                return Err(format!(
                    "shard {} to reach the seal of shard {}",
                    target.shard, source.shard
                ));
            }
        }
    }
    Ok(())
}

/// Returns the version that goes back from `sealing` to `tail`: the seal did not complete in time,
/// or its version took too long to write for writers to be paused under it.
pub fn undo_seal(catalog: &Catalog, plan: &Plan, now_us: u64, nonce: u64) -> Catalog {
    let mut next = catalog.next(now_us, nonce);
    next.plan =
        Some(Plan { step: Step::Tail, seals_undone: plan.seals_undone + 1, ..plan.clone() });
    next
}

/// Returns how the placement differs from the one that a running resize started with.
///
/// No membership changes while a plan runs. Should a version of another writer break that rule, a
/// commit would open a replica that has received nothing, or would take bands from a shard of which
/// a replica has not sealed: the plan is aborted instead.
pub(super) fn placement_change(catalog: &Catalog, plan: &Plan) -> Option<String> {
    let (_, to) = plan.resize()?;
    let is_placed = |shard: ShardId, replica: ReplicaId| {
        catalog
            .shard(shard)
            .is_some_and(|shard| shard.replicas.iter().any(|member| member.replica == replica))
    };
    let left = plan.sources.iter().find(|source| !is_placed(source.shard, source.replica));
    if let Some(source) = left {
        return Some(format!(
            "replica {} is not placed in shard {} any more, whose keys it was to give away",
            source.replica, source.shard
        ));
    }
    let gives = |shard: ShardId| !plan.shrinks() || shard.0 >= to;
    for shard in &catalog.placement {
        let number = shard.shard;
        if gives(number) {
            if !plan.sources.iter().any(|source| source.shard == number) {
                return Some(format!(
                    "shard {number} gives keys away and has no source in the plan"
                ));
            }
            continue;
        }
        let receives = |replica| plan.targets.iter().any(|target| target.replica == replica);
        let new = shard.replicas.iter().find(|member| !receives(member.replica));
        if let Some(member) = new {
            return Some(format!(
                "replica {} was placed in shard {number} meanwhile and has not received its keys",
                member.replica
            ));
        }
    }
    let gone = plan.targets.iter().filter(|_| plan.shrinks());
    gone.into_iter().find(|target| !is_placed(target.shard, target.replica)).map(|target| {
        format!("replica {} is not placed in shard {} any more", target.replica, target.shard)
    })
}
