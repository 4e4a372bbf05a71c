//! The commit of a plan, and its end.
//!
//! **Invariant:** a commit is one catalog version; a committed plan is finished, never aborted.

use super::outcome::report_of;
use super::placement::remove_from_placement;
use super::progress::{
    Advance, Running, others_of_sources, shipping_targets, source_progress, target_progress,
};
use super::quarantine::{remove_from_quarantines, retire_from_quarantines};
use crate::catalog::{
    Catalog, Placed, Quarantine, QuarantineSource, RetiredReplica, ShardPlacement,
};
use crate::control::operation::OperationOutcome;
use crate::control::plan::{NODE_AWAY_MAX_US, Plan, PlanKind, Source, Step, Target};
use crate::control::report::{ReplicaReport, TargetStage};
use crate::ids::{Epoch, NodeId, ReplicaId, ShardId};

pub(super) fn commit(running: Running<'_>) -> Catalog {
    let Running { catalog, plan, now_us, nonce, .. } = running;
    let mut next = catalog.next(now_us, nonce);
    next.epoch = Epoch(catalog.epoch.0 + 1);
    if let Some((_, to)) = plan.resize() {
        next.spec.shards = to;
    }
    // The targets of a shrink are placed already.
    for target in plan.targets.iter().filter(|_| !plan.shrinks()) {
        let placed = Placed { replica: target.replica, node: target.node };
        match next.placement.iter_mut().find(|shard| shard.shard == target.shard) {
            Some(shard) => {
                shard.replicas.push(placed);
                if matches!(plan.kind, PlanKind::RecoverReplica { .. }) {
                    let gone = plan.sources.iter().map(|source| source.replica);
                    for gone in gone.clone() {
                        remove_from_quarantines(&mut next.quarantines, gone, Some(target.replica));
                    }
                    remove_from_placement(shard, &mut next.draining, gone, now_us);
                }
            }
            None => next.placement.push(ShardPlacement::new(target.shard, vec![placed])),
        }
    }
    next.placement.sort_by_key(|shard| shard.shard);
    if let Some(quarantine) = quarantine_of(running) {
        if let PlanKind::Shrink { to, .. } = plan.kind {
            retire(&mut next, to, plan, &quarantine);
        }
        next.quarantines.push(quarantine);
    }
    next.plan = Some(Plan { step: Step::Committed, ..plan.clone() });
    next
}

/// Returns the quarantine of the bands that a plan moves.
fn quarantine_of(running: Running<'_>) -> Option<Quarantine> {
    let Running { catalog, plan, reports, now_us, .. } = running;
    let range = plan.leaving()?;
    let others = others_of_sources(catalog, plan).into_iter().map(|(_, member)| member.replica);
    let replicas = plan.sources.iter().map(|source| source.replica).chain(others).collect();
    let is_shipping =
        |target: &Target| shipping_targets(plan).any(|other| other.replica == target.replica);
    let held = |target: &Target| {
        let lsn = reports.get(&target.replica).map(|report| report.lsn).unwrap_or_default();
        (target.replica, lsn)
    };
    let sealed = |source: &Source| {
        let seal = source_progress(plan, source.replica, reports).and_then(|at| at.sealed);
        let sealed = seal.map(|seal| seal.lsn).unwrap_or_default();
        QuarantineSource { shard: source.shard, replica: source.replica, sealed }
    };
    let (targets, others): (Vec<&Target>, Vec<&Target>) =
        plan.targets.iter().partition(|target| is_shipping(target));
    // A replica of a new shard has shipped nothing before it held the bands.
    let others = others.into_iter().filter(|_| plan.shrinks());
    Some(Quarantine {
        plan: plan.id,
        range,
        replicas,
        targets: targets.into_iter().map(held).collect(),
        others: others.map(held).collect(),
        sources: plan.sources.iter().map(sealed).collect(),
        until_us: now_us + catalog.spec.quarantine_ms * 1000,
        dropping: false,
    })
}

/// Takes the shards from `to` on out of the placement, and their replicas out of the earlier
/// quarantines.
fn retire(next: &mut Catalog, to: u32, plan: &Plan, quarantine: &Quarantine) {
    next.record_retirement(ShardId(to));
    let (stay, retire): (Vec<ShardPlacement>, Vec<ShardPlacement>) =
        next.placement.drain(..).partition(|shard| shard.shard.0 < to);
    next.placement = stay;
    for shard in &retire {
        next.retired.extend(shard.replicas.iter().map(|member| RetiredReplica {
            shard: shard.shard,
            replica: member.replica,
            node: member.node,
            plan: plan.id,
        }));
    }
    let retired: Vec<ReplicaId> =
        retire.iter().flat_map(|shard| &shard.replicas).map(|member| member.replica).collect();
    let Quarantine { targets, others, .. } = quarantine;
    retire_from_quarantines(&mut next.quarantines, &retired, targets, others);
}

/// Ends a plan that has committed. A replica that is away for long, or has failed, applies the
/// newest version once it is back: it opens or gives away then, and sends on the waiting requests.
pub(super) fn advance_committed(running: Running<'_>, away_us: impl Fn(NodeId) -> u64) -> Advance {
    let Running { catalog, plan, reports, now_us, nonce, .. } = running;
    let is_out = |replica: ReplicaId, node: NodeId| {
        away_us(node) > NODE_AWAY_MAX_US
            || reports.get(&replica).is_some_and(ReplicaReport::has_failed)
    };
    for target in plan.targets.iter().filter(|target| !is_out(target.replica, target.node)) {
        if target_progress(plan, target.replica, reports)
            .is_none_or(|progress| progress.stage != TargetStage::Open)
        {
            return Advance::Wait(format!("shard {} to open", target.shard));
        }
    }
    let giving = plan.sources.iter().filter(|_| plan.leaving().is_some());
    let sources = giving.map(|source| (source.shard, source.replica, source.node));
    let others = others_of_sources(catalog, plan)
        .into_iter()
        .map(|(shard, member)| (shard, member.replica, member.node));
    for (shard, replica, _) in
        sources.chain(others).filter(|(_, replica, node)| !is_out(*replica, *node))
    {
        if source_progress(plan, replica, reports).is_none_or(|progress| !progress.released) {
            return Advance::Wait(format!(
                "replica {replica} of shard {shard} to release its writers"
            ));
        }
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.pins.clear();
    next.remember(report_of(catalog, plan, reports, OperationOutcome::Done, None, now_us));
    Advance::Write(Box::new(next))
}
