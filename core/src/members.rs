//! Who belongs to a shard: replicas that leave their placement, are drained, and are made anew.
//!
//! **Invariant:** pure. A shard keeps at least one replica. A replica that leaves is recorded until
//! another member holds everything it has, or until its loss is accepted; only then may its files go.
//! Nothing of this happens while another plan runs.

use crate::catalog::{Catalog, KeyspaceState, Unsealed};
use crate::ids::{Epoch, NodeId, PlanId, ReplicaId, ShardId};
use crate::plan::{Outcome, Plan, PlanKind, Reports, Source, Step, Target, operation_id};
use crate::primaries::Presence;

/// After a copy that failed the next is begun no sooner than this, microseconds.
pub const COPY_AGAIN_US: u64 = 10_000_000;

/// Why a replica is not taken out of its placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// It is not there.
    #[error("replica {0} is not placed and not waiting to be drained; see `vasto keyspace describe`")]
    NotThere(ReplicaId),
    /// It is the only one.
    #[error("replica {0} is the only one of shard {1}: nothing would be left of the shard")]
    Last(ReplicaId, ShardId),
    /// Another change runs.
    #[error("operation {0} is running on this keyspace; wait for it or cancel it (`vasto operation cancel {0}`)")]
    Busy(String),
    /// It was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
}

/// The version that takes a replica out of its placement. With `accept_loss`, also what nobody else
/// holds is given up, and its files go when its node is back.
pub fn evict(
    catalog: &Catalog,
    replica: ReplicaId,
    accept_loss: bool,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, EvictError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(EvictError::Deleted);
    }
    if let Some(plan) = &catalog.plan {
        return Err(EvictError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    let mut next = catalog.next(now_us, nonce);
    if accept_loss && catalog.unsealed.iter().any(|one| one.replica == replica) {
        next.unsealed.retain(|one| one.replica != replica);
        next.removed.push(replica);
        return Ok(next);
    }
    let shard = next.placement.iter_mut().find(|shard| shard.replicas.iter().any(|one| one.replica == replica));
    let shard = shard.ok_or(EvictError::NotThere(replica))?;
    if shard.replicas.len() < 2 {
        return Err(EvictError::Last(replica, shard.shard));
    }
    let node = shard.replicas.iter().find(|one| one.replica == replica).map(|one| one.node).unwrap_or_default();
    shard.replicas.retain(|one| one.replica != replica);
    if shard.primary == Some(replica) || shard.primary == shard.replicas.first().map(|one| one.replica) {
        shard.primary = None;
    }
    shard.handing_to = None;
    let shard = shard.shard;
    next.epoch = Epoch(catalog.epoch.0 + 1);
    for quarantine in &mut next.quarantines {
        quarantine.replicas.retain(|one| *one != replica);
        quarantine.targets.retain(|(one, _)| *one != replica);
    }
    if accept_loss {
        next.removed.push(replica);
    } else {
        next.unsealed.push(Unsealed { shard, replica, node, since_us: now_us });
    }
    Ok(next)
}

/// The version that is due because of what the replicas report, if one is.
///
/// `room` says which live node could take one more replica of a shard.
pub fn advance_members(
    catalog: &Catalog,
    reports: &Reports,
    presence: impl Fn(NodeId) -> Presence,
    room: impl Fn(&Catalog, ShardId) -> Option<NodeId>,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    if catalog.state != KeyspaceState::Active || catalog.plan.is_some() {
        return None;
    }
    let replication = |id: ReplicaId| reports.get(&id).map(|report| &report.replication);
    // What is drained may go.
    let drained = |one: &Unsealed| replication(one.replica).is_some_and(|report| report.drained);
    if catalog.unsealed.iter().any(drained) {
        let mut next = catalog.next(now_us, nonce);
        next.removed.extend(catalog.unsealed.iter().filter(|one| drained(one)).map(|one| one.replica));
        next.unsealed.retain(|one| !drained(one));
        return Some(next);
    }
    // What cannot catch up, or keeps others' logs from ending, leaves.
    for shard in &catalog.placement {
        let ready = |id: ReplicaId| replication(id).is_some_and(|report| report.ready);
        for one in &shard.replicas {
            let too_old = replication(one.replica).is_some_and(|report| report.too_old);
            let in_the_way = shard.replicas.iter().any(|other| {
                other.replica != one.replica
                    && replication(other.replica).is_some_and(|report| report.evict == Some(one.replica))
            });
            let others = shard.replicas.iter().any(|other| other.replica != one.replica && ready(other.replica));
            if (too_old || in_the_way) && others {
                return evict(catalog, one.replica, false, now_us, nonce).ok();
            }
        }
    }
    start_copy(catalog, reports, presence, room, now_us, nonce)
}

/// The version that begins one more replica of a shard that has too few.
fn start_copy(
    catalog: &Catalog,
    reports: &Reports,
    presence: impl Fn(NodeId) -> Presence,
    room: impl Fn(&Catalog, ShardId) -> Option<NodeId>,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let last = catalog.operations.last().filter(|last| last.kind == "replica" && last.outcome == Outcome::Aborted);
    if last.is_some_and(|last| now_us < last.started_at_us + last.duration_ms * 1000 + COPY_AGAIN_US) {
        return None;
    }
    let shard = catalog.placement.iter().find(|shard| shard.replicas.len() < catalog.spec.replicas as usize)?;
    let here = |node| matches!(presence(node), Presence::Here(_));
    let ready = |id: ReplicaId| reports.get(&id).is_some_and(|report| report.replication.ready);
    let source = shard.primary_first().into_iter().find(|one| here(one.node) && ready(one.replica))?;
    let node = room(catalog, shard.shard)?;
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind: PlanKind::Replica { shard: shard.shard },
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        step: Step::Prepare,
        sources: vec![Source { shard: shard.shard, replica: source.replica, node: source.node, manifest: None }],
        targets: vec![Target { shard: shard.shard, replica: catalog.next_replica, node }],
        seals_undone: 0,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    next.next_replica = ReplicaId(catalog.next_replica.0 + 1);
    Some(next)
}

/// True when a shard has too few replicas, or one waits to be drained.
pub fn is_incomplete(catalog: &Catalog) -> bool {
    catalog.state == KeyspaceState::Active
        && (!catalog.unsealed.is_empty()
            || catalog.placement.iter().any(|shard| shard.replicas.len() < catalog.spec.replicas as usize))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::ids::KeyspaceId;
    use crate::plan::{ReplicaPhase, ReplicaReport, ReplicationReport};

    const NOW: u64 = 1_000_000_000;
    const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);

    fn catalog() -> Catalog {
        let spec = KeyspaceSpec { replicas: 3, ..KeyspaceSpec::default() };
        Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1), NodeId(2), NodeId(3)]], NOW, 1)
    }

    fn reports(change: impl Fn(u64, &mut ReplicationReport)) -> Reports {
        let report = |replica: u64| {
            let mut replication = ReplicationReport { ready: true, ..Default::default() };
            change(replica, &mut replication);
            let report = ReplicaReport {
                keyspace: KeyspaceId(1),
                shard: ShardId(0),
                replica: ReplicaId(replica),
                incarnation: Default::default(),
                version: Default::default(),
                phase: ReplicaPhase::Serving,
                lsn: Default::default(),
                shipped_lsn: Default::default(),
                manifest_lsn: Default::default(),
                keys: 0,
                bytes: 0,
                source: None,
                target: None,
                cleaned: Vec::new(),
                replication,
            };
            (ReplicaId(replica), report)
        };
        (1..=4).map(report).collect()
    }

    fn ids(catalog: &Catalog) -> Vec<u64> {
        catalog.placement[0].replicas.iter().map(|one| one.replica.0).collect()
    }

    #[test]
    fn a_replica_that_leaves_is_drained_removed_and_made_anew() {
        let calm = reports(|_, _| {});
        let nowhere = |_: &Catalog, _| None;
        assert_eq!(advance_members(&catalog(), &calm, HERE, nowhere, NOW, 2), None);
        let left = evict(&catalog(), ReplicaId(1), false, NOW, 2).unwrap();
        assert_eq!((ids(&left), left.epoch), (vec![2, 3], Epoch(2)));
        assert_eq!(left.unsealed[0].replica, ReplicaId(1));
        assert_eq!(left.placement[0].primary().unwrap().replica, ReplicaId(2));
        assert_eq!(left.sources_of(ShardId(0), ReplicaId(2)).len(), 2, "the others still pull its log");
        assert_eq!(left.members_on(NodeId(1)), [(ShardId(0), ReplicaId(1), false)]);
        assert!(is_incomplete(&left));
        assert_eq!(advance_members(&left, &calm, HERE, nowhere, NOW, 3), None);
        let drained = reports(|id, report| report.drained = id == 1);
        let gone = advance_members(&left, &drained, HERE, nowhere, NOW, 3).unwrap();
        assert_eq!((gone.unsealed.len(), &gone.removed[..]), (0, &[ReplicaId(1)][..]));
        let copying = advance_members(&gone, &calm, HERE, |_, _| Some(NodeId(1)), NOW, 4).unwrap();
        let plan = copying.plan.unwrap();
        assert_eq!(plan.kind, PlanKind::Replica { shard: ShardId(0) });
        assert_eq!((plan.sources[0].replica, plan.targets[0].replica), (ReplicaId(2), ReplicaId(4)));
    }

    #[test]
    fn who_cannot_catch_up_or_is_in_the_way_leaves_and_the_last_one_never() {
        let nowhere = |_: &Catalog, _| None;
        let old = reports(|id, report| report.too_old = id == 2);
        assert_eq!(ids(&advance_members(&catalog(), &old, HERE, nowhere, NOW, 2).unwrap()), [1, 3]);
        let slow = reports(|id, report| report.evict = (id == 1).then_some(ReplicaId(3)));
        assert_eq!(ids(&advance_members(&catalog(), &slow, HERE, nowhere, NOW, 2).unwrap()), [1, 2]);
        let nobody = reports(|id, report| {
            report.too_old = id == 2;
            report.ready = id == 2;
        });
        assert_eq!(advance_members(&catalog(), &nobody, HERE, nowhere, NOW, 2), None, "nobody else serves");
        let two = evict(&catalog(), ReplicaId(1), true, NOW, 2).unwrap();
        assert_eq!(two.removed, [ReplicaId(1)]);
        let one = evict(&two, ReplicaId(2), false, NOW, 3).unwrap();
        assert_eq!(evict(&one, ReplicaId(3), true, NOW, 4), Err(EvictError::Last(ReplicaId(3), ShardId(0))));
        assert_eq!(evict(&one, ReplicaId(9), true, NOW, 4), Err(EvictError::NotThere(ReplicaId(9))));
        // The loss of one that waits to be drained may still be accepted.
        let lost = evict(&one, ReplicaId(2), true, NOW, 4).unwrap();
        assert_eq!((lost.unsealed.len(), lost.removed.len()), (0, 2));
    }
}
