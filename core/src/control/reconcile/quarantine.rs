//! Moved bands: kept on their old shard until they are safe to remove.
//!
//! The quarantine of a shrink keeps whole replicas: those of the shards that have retired.
//!
//! **Invariants**
//! - Moved bands are removed only after a manifest of each shipping target, or of the replica that
//!   ships in its place, covers them; to end a quarantine early moves its time and nothing else.
//! - No replica is waited for that has left the keyspace, and none whose shard has retired: a node
//!   that does not come back keeps nothing from ending.

use super::progress::Advance;
use super::refusal::PlanError;
use crate::band::{Band, check_shard_count, is_legal_shard_count};
use crate::catalog::{Catalog, KeyspaceState, Quarantine, RetiredReplica};
use crate::control::operation::operation_id;
use crate::control::report::Reports;
use crate::ids::{Lsn, PlanId, ReplicaId};
use crate::record::BandRange;

pub(super) fn advance_quarantines(
    catalog: &Catalog,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Advance {
    // Asked at each look at a keyspace: most have none, and a copy of the catalog costs more.
    if catalog.quarantines.is_empty() {
        return Advance::Idle;
    }
    let mut next = catalog.next(now_us, nonce);
    let mut changed = false;
    let mut waiting = None;
    let mut gone: Vec<PlanId> = Vec::new();
    next.quarantines.retain_mut(|quarantine| {
        if quarantine.dropping {
            let cleaned = |replica: &ReplicaId| {
                reports.get(replica).is_some_and(|report| report.cleaned.contains(&quarantine.plan))
            };
            if quarantine.replicas.iter().all(cleaned) {
                changed = true;
                return false;
            }
            waiting = Some("moved ranges to be removed");
        } else if now_us >= quarantine.until_us {
            let covered = |(replica, lsn): &(ReplicaId, Lsn)| {
                reports.get(replica).is_some_and(|report| report.manifest_lsn >= *lsn)
            };
            if quarantine.targets.iter().all(covered) {
                changed = true;
                if catalog.has_retired(quarantine.plan) {
                    gone.push(quarantine.plan);
                    return false;
                }
                quarantine.dropping = true;
            } else {
                waiting = Some("a manifest that covers the moved range");
            }
        }
        true
    });
    let (retired, kept) = std::mem::take(&mut next.retired)
        .into_iter()
        .partition(|retired: &RetiredReplica| gone.contains(&retired.plan));
    next.retired = kept;
    let retired: Vec<RetiredReplica> = retired;
    next.remove_for_good(retired.iter().map(|retired| retired.replica));
    match waiting {
        _ if changed => Advance::Write(Box::new(next)),
        Some(what) => Advance::Wait(what.into()),
        None => Advance::Idle,
    }
}

/// Returns the quarantines that keep a keyspace from shrinking to `to` shards: those of bands that
/// would arrive, on replicas of shards that stay.
pub fn in_the_way(catalog: &Catalog, to: u32) -> impl Iterator<Item = &Quarantine> {
    let from = catalog.spec.shards;
    let shrinks = is_legal_shard_count(to) && to < from;
    let arriving: Option<BandRange> = shrinks.then(|| Band::leaving(to, from).into());
    let stays = move |replica: &ReplicaId| {
        let mut staying = catalog.placement.iter().filter(|shard| shard.shard.0 < to);
        staying.any(|shard| shard.replicas.iter().any(|member| member.replica == *replica))
    };
    catalog.quarantines.iter().filter(move |quarantine| {
        arriving.is_some_and(|range| range.overlaps(quarantine.range))
            && quarantine.replicas.iter().any(&stays)
    })
}

/// Returns the version that ends the quarantines that keep a keyspace from shrinking to `to`
/// shards; `None` when all of them have ended already. The bands are removed as at any other end.
///
/// # Errors
/// For a count that is not legal, a deleted keyspace, and while a plan runs: no quarantine ends
/// meanwhile.
pub fn end_quarantines(
    catalog: &Catalog,
    to: u32,
    now_us: u64,
    nonce: u64,
) -> Result<Option<Catalog>, PlanError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(PlanError::Deleted);
    }
    check_shard_count(to)?;
    let running: Vec<PlanId> = in_the_way(catalog, to)
        .filter(|quarantine| quarantine.until_us > now_us)
        .map(|quarantine| quarantine.plan)
        .collect();
    if running.is_empty() {
        return Ok(None);
    }
    if let Some(plan) = &catalog.plan {
        return Err(PlanError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    let mut next = catalog.next(now_us, nonce);
    for quarantine in &mut next.quarantines {
        if running.contains(&quarantine.plan) {
            quarantine.until_us = now_us;
        }
    }
    Ok(Some(next))
}

/// Takes a removed replica out of the quarantines: its range is not waited for, and a manifest of
/// the replica that ships in its place covers what its own manifest was to cover. As a source it
/// stays: its log is in the bucket.
pub(crate) fn remove_from_quarantines(
    quarantines: &mut [Quarantine],
    gone: ReplicaId,
    successor: Option<ReplicaId>,
) {
    for quarantine in quarantines {
        quarantine.replicas.retain(|replica| *replica != gone);
        quarantine.others.retain(|(replica, _)| *replica != gone);
        let Some(at) = quarantine.targets.iter().position(|(target, _)| *target == gone) else {
            continue;
        };
        let successor = successor
            .filter(|successor| quarantine.targets.iter().all(|(target, _)| target != successor));
        let Some(successor) = successor else {
            quarantine.targets.remove(at);
            continue;
        };
        // A successor that took part in the plan covers the range from a certain LSN on: it may
        // have shipped manifests before. Any other began to exist after the range had moved: each
        // of its manifests covers the whole range.
        let lsn = quarantine.others.iter().find(|(other, _)| *other == successor);
        quarantine.targets[at] = (successor, lsn.map_or(Quarantine::ANY_MANIFEST, |(_, lsn)| *lsn));
    }
}

/// Takes the replicas of retired shards out of the earlier quarantines. What had moved to them has
/// moved on to the targets of the shrink, so manifests of those cover it from now on.
pub(super) fn retire_from_quarantines(
    quarantines: &mut [Quarantine],
    retired: &[ReplicaId],
    targets: &[(ReplicaId, Lsn)],
    others: &[(ReplicaId, Lsn)],
) {
    let stays = |replica: &ReplicaId| !retired.contains(replica);
    for quarantine in quarantines {
        quarantine.replicas.retain(stays);
        quarantine.others.retain(|(replica, _)| stays(replica));
        let before = quarantine.targets.len();
        quarantine.targets.retain(|(replica, _)| stays(replica));
        if quarantine.targets.len() < before {
            raise(&mut quarantine.targets, targets);
            raise(&mut quarantine.others, others);
        }
    }
}

/// Adds LSNs to cover; of two for one replica the greater counts.
fn raise(covered: &mut Vec<(ReplicaId, Lsn)>, by: &[(ReplicaId, Lsn)]) {
    for (replica, lsn) in by {
        match covered.iter_mut().find(|(other, _)| other == replica) {
            Some((_, held)) => *held = (*held).max(*lsn),
            None => covered.push((*replica, *lsn)),
        }
    }
}
