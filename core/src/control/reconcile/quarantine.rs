//! Moved bands: kept on their old shard until they are safe to remove.
//!
//! **Invariant:** moved bands are removed only after a manifest of each shipping target, or of its
//! successor, covers them.

use super::progress::Advance;
use crate::catalog::{Catalog, Quarantine};
use crate::control::report::Reports;
use crate::ids::{Lsn, ReplicaId};

pub(super) fn advance_quarantines(
    catalog: &Catalog,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Advance {
    let mut next = catalog.next(now_us, nonce);
    let mut changed = false;
    let mut waiting = None;
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
                quarantine.dropping = true;
                changed = true;
            } else {
                waiting = Some("a manifest that covers the moved range");
            }
        }
        true
    });
    match waiting {
        _ if changed => Advance::Write(Box::new(next)),
        Some(what) => Advance::Wait(what.into()),
        None => Advance::Idle,
    }
}

/// Takes a removed replica out of the quarantines: its range is not waited for, and a manifest of
/// the replica that ships in its place covers what its own manifest was to cover.
pub(crate) fn remove_from_quarantines(
    quarantines: &mut [Quarantine],
    gone: ReplicaId,
    successor: Option<ReplicaId>,
) {
    for quarantine in quarantines {
        quarantine.replicas.retain(|replica| *replica != gone);
        let Some(at) = quarantine.targets.iter().position(|(target, _)| *target == gone) else {
            continue;
        };
        match successor
            .filter(|successor| quarantine.targets.iter().all(|(target, _)| target != successor))
        {
            // The successor began to ship after the range had moved: each of its manifests covers
            // the whole range.
            Some(successor) => quarantine.targets[at] = (successor, Lsn(1)),
            None => drop(quarantine.targets.remove(at)),
        }
    }
}
