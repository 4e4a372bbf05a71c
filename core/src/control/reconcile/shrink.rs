//! The start of a shrink, and the gc floor on which its shards agree.
//!
//! **Invariants**
//! - The bands that arrive are empty on every survivor: none of them is in quarantine.
//! - Nothing is exported before every replica of the keyspace has the floor of the plan: from then
//!   on no record is under way in any shard that a purged tombstone would have to defeat, neither
//!   one of a retiring shard nor one of an earlier attempt that a survivor has taken.

use super::outcome::abort;
use super::progress::{Advance, Running, source_progress};
use super::quarantine::in_the_way;
use super::refusal::{PlanError, check_start};
use crate::catalog::{Catalog, Placed};
use crate::control::plan::{Plan, PlanKind, Source, Step, Target};
use crate::control::report::Reports;
use crate::ids::{PlanId, ReplicaId, ShardId};

/// Time for which a shrink waits until all replicas have its floor, microseconds.
const FLOOR_PATIENCE_US: u64 = 120_000_000;

/// Returns the version that starts shrinking `catalog` to `to` shards.
pub(super) fn start_shrink(
    catalog: &Catalog,
    to: u32,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PlanError> {
    check_start(catalog)?;
    let from = catalog.spec.shards;
    let mut plan = Plan {
        id: catalog.next_plan,
        kind: PlanKind::Shrink { from, to },
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        step: Step::Prepare,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    };
    let until_us = in_the_way(catalog, to).map(|quarantine| quarantine.until_us).max();
    if let Some(until_us) = until_us {
        let seconds = until_us.saturating_sub(now_us).div_ceil(1_000_000);
        return Err(PlanError::Quarantined { seconds });
    }
    for shard in &catalog.placement {
        if shard.shard.0 < to {
            let target = |member: &Placed| Target {
                shard: shard.shard,
                replica: member.replica,
                node: member.node,
            };
            plan.targets.extend(shard.replicas.iter().map(target));
        } else {
            let source = |member: Placed| Source::new(shard.shard, member.replica, member.node);
            plan.sources.extend(shard.shipper().map(source));
        }
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(plan);
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    Ok(next)
}

/// Brings every replica to one gc floor, the floor of the plan; `None` once all have it.
///
/// No floor rises by itself while a plan runs; a round that was already past its last check when
/// the plan began may still end. Its floor makes a new version, and an export that was made under
/// the lower one must not be used.
///
/// It is not waited for without limit: a replica that cannot follow the others is made anew, and
/// that waits for the end of the plan.
pub(super) fn agree_on_floor(running: Running<'_>) -> Option<Advance> {
    let Running { catalog, plan, reports, now_us, nonce, .. } = running;
    let give_up = |reason: String| {
        abort(catalog, &reason, reports, now_us, nonce).map(|next| Advance::Write(Box::new(next)))
    };
    let waits = |what: String| {
        let waited_us = now_us.saturating_sub(catalog.written_at_us);
        if !plan.paused && waited_us > FLOOR_PATIENCE_US {
            let seconds = FLOOR_PATIENCE_US / 1_000_000;
            return give_up(format!("waited {seconds} s for {what}; see `vasto cluster status`"));
        }
        Some(Advance::Wait(what))
    };
    if let Some((shard, replica)) = cannot_follow(catalog, reports) {
        return give_up(format!(
            "replica {replica} of shard {shard} cannot follow the others and is replaced first; \
             start the shrink again then"
        ));
    }
    let mut floors: Vec<(ShardId, u64)> = Vec::new();
    for shard in &catalog.placement {
        for member in &shard.replicas {
            let report =
                reports.get(&member.replica).filter(|report| report.version >= catalog.version);
            let Some(report) = report else {
                let what = format!("replica {} of shard {}", member.replica, shard.shard);
                return waits(format!("{what} to take part in the shrink"));
            };
            floors.push((shard.shard, report.replication.floor));
        }
    }
    let highest = floors.iter().map(|(_, floor)| *floor).max().unwrap_or_default();
    if let Some(floor) = plan.floor.filter(|floor| highest <= *floor) {
        let (shard, _) = floors.iter().find(|(_, held)| *held < floor)?;
        return waits(format!("the replicas of shard {shard} to hold the same records"));
    }
    let began = plan.sources.iter().find(|source| {
        source_progress(plan, source.replica, reports)
            .is_some_and(|progress| progress.manifest.is_some() || progress.export.is_some())
    });
    if let Some(source) = began.filter(|_| plan.floor.is_some()) {
        let reason = format!(
            "deletes were forgotten while shard {} exported its keys; start the shrink again",
            source.shard
        );
        return give_up(reason);
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan { floor: Some(highest + 1), ..plan.clone() });
    Some(Advance::Write(Box::new(next)))
}

/// Returns a placed replica that is too old for the logs of the others, or whose absence keeps the
/// log of another one at its cap.
fn cannot_follow(catalog: &Catalog, reports: &Reports) -> Option<(ShardId, ReplicaId)> {
    let mut placed = catalog
        .placement
        .iter()
        .flat_map(|shard| shard.replicas.iter().map(move |member| (shard, member.replica)));
    let replication = |replica: ReplicaId| reports.get(&replica).map(|report| &report.replication);
    let stuck = placed.find(|(shard, replica)| {
        let asked = |other: &Placed| {
            replication(other.replica).is_some_and(|other| other.evict == Some(*replica))
        };
        replication(*replica).is_some_and(|report| report.too_old)
            || shard.replicas.iter().any(asked)
    });
    stuck.map(|(shard, replica)| (shard.shard, replica))
}
