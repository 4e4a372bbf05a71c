//! Who belongs to a shard: replicas that leave their placement, are drained, and are made anew.
//!
//! **Invariant:** pure. A shard keeps at least one replica. A replica that leaves is recorded until
//! another member holds everything it has, or until its loss is accepted; only then may its files go.
//! Nothing of this happens while another plan runs.

use crate::catalog::{Catalog, GivenUp, KeyspaceState, Leaving, Placed, Quarantine, ShardPlacement, Unsealed};
use crate::ids::{Epoch, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::plan::{
    OperationReport, Outcome, PauseMs, Plan, PlanKind, ReplicaReport, Reports, Source, Step, Target, abort,
    operation_id,
};
use crate::primaries::Presence;

/// A node that is to be replaced and is gone is not waited for; one that is only to be emptied is.
fn is_given_up(catalog: &Catalog, around: &Around<'_>, node: NodeId) -> bool {
    let replaced = catalog.leaving.iter().any(|leaving| leaving.node == node && leaving.replace);
    replaced && (around.presence)(node) == Presence::Gone
}

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
        next.given_up.push(GivenUp { replica, version: next.version });
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
    let heir = shard.shipper().map(|one| one.replica);
    let shard = shard.shard;
    next.epoch = Epoch(catalog.epoch.0 + 1);
    leave_quarantines(&mut next.quarantines, replica, heir);
    if accept_loss {
        next.removed.push(replica);
        next.given_up.push(GivenUp { replica, version: next.version });
    } else {
        next.unsealed.push(Unsealed { shard, replica, node, since_us: now_us });
    }
    Ok(next)
}

/// Takes a replica that is gone out of the quarantines: its range is not waited for, and what its
/// manifest was to cover is covered by one of the replica that ships in its place.
pub(crate) fn leave_quarantines(quarantines: &mut [Quarantine], gone: ReplicaId, heir: Option<ReplicaId>) {
    for quarantine in quarantines {
        quarantine.replicas.retain(|one| *one != gone);
        let Some(at) = quarantine.targets.iter().position(|(one, _)| *one == gone) else { continue };
        match heir.filter(|heir| quarantine.targets.iter().all(|(one, _)| one != heir)) {
            // It began to ship after the range had moved: each of its manifests covers all of it.
            Some(heir) => quarantine.targets[at] = (heir, Lsn(1)),
            None => drop(quarantine.targets.remove(at)),
        }
    }
}

/// Who takes over from a replica before it leaves: a primary that is there hands over first, because
/// what it alone has just counted must not be missed. `None` when it is not primary, or nobody can.
pub fn heir(
    shard: &ShardPlacement,
    replica: ReplicaId,
    here: impl Fn(NodeId) -> bool,
    may: impl Fn(&Placed) -> bool,
) -> Option<ReplicaId> {
    shard.primary().filter(|primary| primary.replica == replica && here(primary.node))?;
    let heir = shard.replicas.iter().find(|one| one.replica != replica && here(one.node) && may(one));
    heir.map(|one| one.replica)
}

/// The version in which a primary begins to hand over to another replica of its shard.
pub fn hand_over(catalog: &Catalog, from: ReplicaId, to: ReplicaId, now_us: u64, nonce: u64) -> Option<Catalog> {
    let may = catalog.state == KeyspaceState::Active && catalog.plan.is_none();
    let mut next = catalog.next(now_us, nonce);
    let shard = next.placement.iter_mut().find(|shard| shard.primary().is_some_and(|one| one.replica == from));
    let shard = shard.filter(|shard| shard.handing_to.is_none() && shard.replicas.iter().any(|one| one.replica == to));
    shard.filter(|_| may && from != to)?.handing_to = Some(to);
    Some(next)
}

/// What is known around a keyspace.
pub struct Around<'a> {
    /// Is a node there?
    pub presence: &'a dyn Fn(NodeId) -> Presence,
    /// Is a node away for so long that its replicas are made anew elsewhere without being asked?
    pub lost: &'a dyn Fn(NodeId) -> bool,
    /// Which live node could take one more replica of a shard?
    pub room: &'a dyn Fn(&Catalog, ShardId) -> Option<NodeId>,
}

impl Around<'_> {
    fn is_here(&self, node: NodeId) -> bool {
        matches!((self.presence)(node), Presence::Here(_))
    }
}

/// The version that is due because of what the replicas report, or because a node is leaving.
pub fn advance_members(
    catalog: &Catalog,
    reports: &Reports,
    around: &Around<'_>,
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
    let ready = |one: &Placed| around.is_here(one.node) && replication(one.replica).is_some_and(|report| report.ready);
    for shard in &catalog.placement {
        for one in &shard.replicas {
            let another_serves = shard.replicas.iter().any(|other| other.replica != one.replica && ready(other));
            if !another_serves {
                continue;
            }
            // What cannot catch up, or keeps others' logs from ending, leaves; what does not serve any
            // more does when a copy can take its place.
            let has_room = || (around.room)(catalog, shard.shard).is_some();
            let for_good = |report: &ReplicaReport| report.has_failed() && !report.replication.passing;
            let failed = reports.get(&one.replica).is_some_and(for_good) && has_room();
            let too_old = replication(one.replica).is_some_and(|report| report.too_old);
            let in_the_way = shard.replicas.iter().any(|other| {
                other.replica != one.replica
                    && replication(other.replica).is_some_and(|report| report.evict == Some(one.replica))
            });
            let lost = (around.lost)(one.node) && has_room();
            let given_up = is_given_up(catalog, around, one.node);
            if failed || too_old || in_the_way || lost || given_up {
                return evict(catalog, one.replica, false, now_us, nonce).ok();
            }
        }
    }
    if let Some(next) = start_copy(catalog, reports, around, now_us, nonce) {
        return Some(next);
    }
    empty_leaving(catalog, reports, around, now_us, nonce)
}

/// The version that takes the next replica from a leaving node, or says that nothing is left there.
fn empty_leaving(
    catalog: &Catalog,
    reports: &Reports,
    around: &Around<'_>,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let ready = |one: &Placed| {
        around.is_here(one.node) && reports.get(&one.replica).is_some_and(|report| report.replication.ready)
    };
    let leaves = |one: &Placed| catalog.leaving.iter().any(|leaving| leaving.node == one.node);
    for shard in &catalog.placement {
        let staying = shard.replicas.iter().filter(|one| !leaves(one)).count();
        let Some(one) = shard.replicas.iter().find(|one| leaves(one)) else { continue };
        if staying >= catalog.spec.replicas as usize {
            let here = |node| around.is_here(node);
            return match heir(shard, one.replica, here, |other| !leaves(other) && ready(other)) {
                Some(heir) => hand_over(catalog, one.replica, heir, now_us, nonce),
                None => evict(catalog, one.replica, false, now_us, nonce).ok(),
            };
        }
        if shard.replicas.len() == 1 && is_given_up(catalog, around, one.node) && may_copy(catalog, now_us) {
            let node = (around.room)(catalog, shard.shard)?;
            let kind = PlanKind::Takeover { shard: shard.shard };
            return Some(begin(catalog, kind, shard.shard, *one, node, now_us, nonce));
        }
    }
    let is_empty = |leaving: &Leaving| {
        catalog.placement.iter().all(|shard| shard.replicas.iter().all(|one| one.node != leaving.node))
    };
    let complete = catalog.placement.iter().all(|shard| shard.replicas.len() >= catalog.spec.replicas as usize);
    if complete && catalog.leaving.iter().any(is_empty) {
        let mut next = catalog.next(now_us, nonce);
        next.leaving.retain(|leaving| !is_empty(leaving));
        for leaving in catalog.leaving.iter().filter(|leaving| is_empty(leaving)) {
            next.remember(end_of(catalog, leaving, Outcome::Done, None, now_us));
        }
        return Some(next);
    }
    None
}

/// The copies that were made since a node has been leaving: what its emptying has cost so far.
pub fn copies_for<'a>(catalog: &'a Catalog, leaving: &Leaving) -> impl Iterator<Item = &'a OperationReport> + use<'a> {
    let since_us = leaving.since_us;
    catalog.operations.iter().filter(move |report| {
        report.started_at_us >= since_us
            && report.outcome == Outcome::Done
            && matches!(report.kind.as_str(), "replica" | "takeover")
    })
}

/// What is remembered of the emptying of a node in this keyspace.
fn end_of(
    catalog: &Catalog,
    leaving: &Leaving,
    outcome: Outcome,
    reason: Option<String>,
    now_us: u64,
) -> OperationReport {
    let sum = |field: fn(&OperationReport) -> u64| copies_for(catalog, leaving).map(field).sum();
    OperationReport {
        id: leaving.operation_id(),
        kind: "replace".into(),
        keyspace: catalog.name.clone(),
        from: catalog.spec.shards,
        to: catalog.spec.shards,
        outcome,
        reason,
        keys_moved: sum(|report| report.keys_moved),
        bytes_moved: sum(|report| report.bytes_moved),
        bytes_from_bucket: sum(|report| report.bytes_from_bucket),
        bytes_from_peers: sum(|report| report.bytes_from_peers),
        objects_read: sum(|report| report.objects_read),
        write_pause_ms: PauseMs::default(),
        duration_ms: now_us.saturating_sub(leaving.since_us) / 1000,
        started_at_us: leaving.since_us,
        reached: copies_for(catalog, leaving).flat_map(|report| report.reached.iter().copied()).collect(),
    }
}

/// The version under which a node that was leaving stays; `None` when it does not leave by that operation.
/// A copy under way is given up; what has moved already stays where it is.
pub fn stay(
    catalog: &Catalog,
    operation: &str,
    reason: &str,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let leaving = catalog.leaving.iter().find(|leaving| leaving.operation_id() == operation)?;
    let copying = catalog.plan.as_ref().is_some_and(Plan::adds_member);
    let aborted = if copying { abort(catalog, reason, reports, now_us, nonce) } else { None };
    let mut next = aborted.unwrap_or_else(|| catalog.next(now_us, nonce));
    next.leaving.retain(|one| one != leaving);
    next.remember(end_of(catalog, leaving, Outcome::Aborted, Some(reason.to_owned()), now_us));
    Some(next)
}

/// After a copy that failed the next waits a little.
fn may_copy(catalog: &Catalog, now_us: u64) -> bool {
    let failed = |last: &&OperationReport| {
        matches!(last.kind.as_str(), "replica" | "takeover") && last.outcome == Outcome::Aborted
    };
    let last = catalog.operations.last().filter(failed);
    last.is_none_or(|last| now_us >= last.started_at_us + last.duration_ms * 1000 + COPY_AGAIN_US)
}

/// The version that begins one more replica of a shard that has too few on nodes that stay.
fn start_copy(catalog: &Catalog, reports: &Reports, around: &Around<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    if !may_copy(catalog, now_us) {
        return None;
    }
    let ready = |one: &Placed| {
        around.is_here(one.node) && reports.get(&one.replica).is_some_and(|report| report.replication.ready)
    };
    let leaves = |one: &Placed| catalog.leaving.iter().any(|leaving| leaving.node == one.node);
    catalog.placement.iter().find_map(|shard| {
        let staying = shard.replicas.iter().filter(|one| !leaves(one)).count();
        if staying >= catalog.spec.replicas as usize {
            return None;
        }
        // The one that ships has most of its files in the bucket already.
        let shipper = shard.shipper().filter(ready);
        let source = shipper.or_else(|| shard.primary_first().into_iter().find(ready))?;
        let node = (around.room)(catalog, shard.shard)?;
        let kind = PlanKind::Replica { shard: shard.shard };
        Some(begin(catalog, kind, shard.shard, source, node, now_us, nonce))
    })
}

/// The version that begins a plan with one source and one target.
fn begin(
    catalog: &Catalog,
    kind: PlanKind,
    shard: ShardId,
    source: Placed,
    node: NodeId,
    now_us: u64,
    nonce: u64,
) -> Catalog {
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind,
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        // Nobody is there who could make a checkpoint for a take-over: it takes the last one.
        step: if matches!(kind, PlanKind::Takeover { .. }) { Step::Tail } else { Step::Prepare },
        sources: vec![Source { shard, replica: source.replica, node: source.node, manifest: None }],
        targets: vec![Target { shard, replica: catalog.next_replica, node }],
        seals_undone: 0,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    next.next_replica = ReplicaId(catalog.next_replica.0 + 1);
    next
}

/// Takes replicas out of a shard's placement, to be drained; the last one takes the first one's place.
pub(crate) fn leave(
    shard: &mut ShardPlacement,
    unsealed: &mut Vec<Unsealed>,
    gone: impl Iterator<Item = ReplicaId>,
    now_us: u64,
) {
    for replica in gone {
        let Some(at) = shard.replicas.iter().position(|one| one.replica == replica) else { continue };
        let one = shard.replicas.swap_remove(at);
        unsealed.push(Unsealed { shard: shard.shard, replica, node: one.node, since_us: now_us });
    }
    shard.primary = None;
    shard.handing_to = None;
}

/// Notes that a node is to have no replicas any more; `None` when it has none.
pub fn empty_node(catalog: &Catalog, leaving: Leaving, now_us: u64, nonce: u64) -> Option<Catalog> {
    let node = leaving.node;
    let has = catalog.placement.iter().any(|shard| shard.replicas.iter().any(|one| one.node == node));
    if !has || catalog.state == KeyspaceState::Deleted {
        return None;
    }
    let mut next = catalog.next(now_us, nonce);
    next.leaving.retain(|leaving| leaving.node != node);
    next.leaving.push(leaving);
    Some(next)
}

/// True when a shard has too few replicas, or one waits to be drained.
pub fn is_incomplete(catalog: &Catalog) -> bool {
    catalog.state == KeyspaceState::Active
        && (!catalog.unsealed.is_empty()
            || !catalog.leaving.is_empty()
            || catalog.placement.iter().any(|shard| shard.replicas.len() < catalog.spec.replicas as usize))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::ids::KeyspaceId;
    use crate::plan::{ReplicaPhase, ReplicationReport};

    const NOW: u64 = 1_000_000_000;
    const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);
    const NOWHERE: fn(&Catalog, ShardId) -> Option<NodeId> = |_, _| None;

    fn next(
        catalog: &Catalog,
        reports: &Reports,
        presence: impl Fn(NodeId) -> Presence,
        room: impl Fn(&Catalog, ShardId) -> Option<NodeId>,
    ) -> Option<Catalog> {
        let around = Around { presence: &presence, lost: &|_| false, room: &room };
        advance_members(catalog, reports, &around, NOW, 3)
    }

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
        assert_eq!(next(&catalog(), &calm, HERE, NOWHERE), None);
        let left = evict(&catalog(), ReplicaId(1), false, NOW, 2).unwrap();
        assert_eq!((ids(&left), left.epoch), (vec![2, 3], Epoch(2)));
        assert_eq!(left.unsealed[0].replica, ReplicaId(1));
        assert_eq!(left.placement[0].primary().unwrap().replica, ReplicaId(2));
        assert_eq!(left.sources_of(ShardId(0), ReplicaId(2)).len(), 2, "the others still pull its log");
        assert_eq!(left.members_on(NodeId(1)), [(ShardId(0), ReplicaId(1), false)]);
        assert!(is_incomplete(&left));
        assert_eq!(next(&left, &calm, HERE, NOWHERE), None);
        let drained = reports(|id, report| report.drained = id == 1);
        let gone = next(&left, &drained, HERE, NOWHERE).unwrap();
        assert_eq!((gone.unsealed.len(), &gone.removed[..]), (0, &[ReplicaId(1)][..]));
        let copying = next(&gone, &calm, HERE, |_, _| Some(NodeId(1))).unwrap();
        let plan = copying.plan.unwrap();
        assert_eq!(plan.kind, PlanKind::Replica { shard: ShardId(0) });
        assert_eq!((plan.sources[0].replica, plan.targets[0].replica), (ReplicaId(2), ReplicaId(4)));
    }

    #[test]
    fn a_primary_that_is_to_leave_hands_over_to_one_that_is_there_and_ready() {
        let catalog = catalog();
        let shard = &catalog.placement[0];
        let here = |node: NodeId| node != NodeId(2);
        assert_eq!(heir(shard, ReplicaId(1), here, |_| true), Some(ReplicaId(3)));
        assert_eq!(heir(shard, ReplicaId(1), here, |one| one.replica != ReplicaId(3)), None);
        assert_eq!(heir(shard, ReplicaId(3), here, |_| true), None, "it is not primary");
        assert_eq!(heir(shard, ReplicaId(1), |node| node != NodeId(1), |_| true), None, "it is replaced");
        let handing = hand_over(&catalog, ReplicaId(1), ReplicaId(3), NOW, 2).unwrap();
        assert_eq!((handing.placement[0].handing_to, handing.epoch), (Some(ReplicaId(3)), catalog.epoch));
        assert_eq!(hand_over(&handing, ReplicaId(1), ReplicaId(2), NOW, 3), None, "one runs already");
        assert_eq!(hand_over(&catalog, ReplicaId(3), ReplicaId(1), NOW, 3), None);
        assert_eq!(hand_over(&catalog, ReplicaId(1), ReplicaId(9), NOW, 3), None);
        assert_eq!(hand_over(&catalog, ReplicaId(1), ReplicaId(1), NOW, 3), None);
    }

    #[test]
    fn who_cannot_catch_up_or_is_in_the_way_leaves_and_the_last_one_never() {
        let old = reports(|id, report| report.too_old = id == 2);
        assert_eq!(ids(&next(&catalog(), &old, HERE, NOWHERE).unwrap()), [1, 3]);
        let slow = reports(|id, report| report.evict = (id == 1).then_some(ReplicaId(3)));
        assert_eq!(ids(&next(&catalog(), &slow, HERE, NOWHERE).unwrap()), [1, 2]);
        let nobody = reports(|id, report| {
            report.too_old = id == 2;
            report.ready = id == 2;
        });
        assert_eq!(next(&catalog(), &nobody, HERE, NOWHERE), None, "nobody else serves");
        let two = evict(&catalog(), ReplicaId(1), true, NOW, 2).unwrap();
        assert_eq!(two.removed, [ReplicaId(1)]);
        let one = evict(&two, ReplicaId(2), false, NOW, 3).unwrap();
        assert_eq!(evict(&one, ReplicaId(3), true, NOW, 4), Err(EvictError::Last(ReplicaId(3), ShardId(0))));
        assert_eq!(evict(&one, ReplicaId(9), true, NOW, 4), Err(EvictError::NotThere(ReplicaId(9))));
        // The loss of one that waits to be drained may still be accepted.
        let lost = evict(&one, ReplicaId(2), true, NOW, 4).unwrap();
        assert_eq!((lost.unsealed.len(), lost.removed.len()), (0, 2));
    }

    #[test]
    fn a_replica_that_has_failed_leaves_when_another_serves_and_a_copy_has_room() {
        let mut failed = reports(|id, report| report.ready = id != 2);
        failed.get_mut(&ReplicaId(2)).unwrap().phase = ReplicaPhase::Failed("rot".into());
        let to_four = |_: &Catalog, _: ShardId| Some(NodeId(4));
        assert_eq!(next(&catalog(), &failed, HERE, NOWHERE), None, "nothing is gained by it");
        failed.get_mut(&ReplicaId(2)).unwrap().replication.passing = true;
        assert_eq!(next(&catalog(), &failed, HERE, to_four), None, "it may open again by itself");
        failed.get_mut(&ReplicaId(2)).unwrap().replication.passing = false;
        let left = next(&catalog(), &failed, HERE, to_four).unwrap();
        assert_eq!((ids(&left), left.unsealed[0].replica), (vec![1, 3], ReplicaId(2)));
        let copying = next(&left, &failed, HERE, to_four).unwrap();
        assert_eq!(copying.plan.unwrap().targets[0].node, NodeId(4));
        for report in failed.values_mut() {
            report.replication.ready = false;
        }
        assert_eq!(next(&catalog(), &failed, HERE, to_four), None, "nobody else serves");
    }

    #[test]
    fn a_quarantine_without_its_target_waits_for_the_one_that_ships_now() {
        let mut catalog = catalog();
        catalog.quarantines.push(Quarantine {
            plan: PlanId(1),
            range: catalog.owned_bands(),
            replicas: vec![ReplicaId(9)],
            targets: vec![(ReplicaId(1), Lsn(70))],
            until_us: 0,
            dropping: false,
        });
        let left = evict(&catalog, ReplicaId(1), false, NOW, 2).unwrap();
        assert_eq!(left.quarantines[0].targets, [(ReplicaId(2), Lsn(1))]);
        let left = evict(&catalog, ReplicaId(3), false, NOW, 2).unwrap();
        assert_eq!(left.quarantines[0].targets, [(ReplicaId(1), Lsn(70))]);
    }

    fn single() -> Catalog {
        Catalog::first(KeyspaceId(1), "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], NOW, 1)
    }

    fn committed(catalog: &Catalog) -> Catalog {
        let target = catalog.plan.as_ref().unwrap().targets[0];
        let mut done = catalog.next(NOW, 9);
        done.plan = None;
        done.placement[0].replicas.push(Placed { replica: target.replica, node: target.node });
        done
    }

    #[test]
    fn a_live_node_that_leaves_is_copied_first_and_a_dead_one_is_drained_later() {
        let calm = reports(|_, _| {});
        let to_four = |_: &Catalog, _: ShardId| Some(NodeId(4));
        let leaving = empty_node(
            &catalog(),
            Leaving { node: NodeId(1), to: Some(NodeId(4)), replace: true, since_us: NOW },
            NOW,
            2,
        )
        .unwrap();
        assert_eq!(
            empty_node(&catalog(), Leaving { node: NodeId(9), to: None, replace: true, since_us: NOW }, NOW, 2),
            None
        );
        let copying = next(&leaving, &calm, HERE, to_four).unwrap();
        assert_eq!(copying.plan.as_ref().unwrap().kind, PlanKind::Replica { shard: ShardId(0) });
        let four = committed(&copying);
        let mut handing = next(&four, &calm, HERE, NOWHERE).unwrap();
        assert_eq!((handing.placement[0].handing_to, ids(&handing)), (Some(ReplicaId(2)), vec![1, 2, 3, 4]));
        assert_eq!(next(&handing, &calm, HERE, NOWHERE), None, "it is waited for");
        handing.placement[0].primary = handing.placement[0].handing_to.take();
        let left = next(&handing, &calm, HERE, NOWHERE).unwrap();
        assert_eq!((ids(&left), left.unsealed[0].replica), (vec![2, 3, 4], ReplicaId(1)));
        let drained = reports(|id, report| report.drained = id == 1);
        let gone = next(&left, &drained, HERE, NOWHERE).unwrap();
        let ended = next(&gone, &calm, HERE, NOWHERE).unwrap();
        assert!(ended.leaving.is_empty() && ended.removed == [ReplicaId(1)]);
        let report = ended.operations.last().unwrap();
        assert_eq!((report.id.clone(), report.outcome), (leaving.leaving[0].operation_id(), Outcome::Done));
        // The same of a dead node: the others go on without it at once.
        let dead = |node: NodeId| if node == NodeId(1) { Presence::Gone } else { Presence::Here(0) };
        let left = next(&leaving, &calm, dead, to_four).unwrap();
        assert_eq!((ids(&left), left.unsealed.len()), (vec![2, 3], 1));
        let copying = next(&left, &calm, dead, to_four).unwrap();
        assert_eq!(copying.plan.unwrap().targets[0].node, NodeId(4));
    }

    #[test]
    fn a_node_that_is_to_stay_keeps_its_replicas_and_a_copy_is_given_up() {
        let calm = reports(|_, _| {});
        let leaving = Leaving { node: NodeId(1), to: None, replace: false, since_us: NOW };
        let begun = empty_node(&catalog(), leaving, NOW, 2).unwrap();
        let copying = next(&begun, &calm, HERE, |_, _| Some(NodeId(4))).unwrap();
        let id = leaving.operation_id();
        assert_eq!(stay(&copying, "node-9-9", "cancelled", &calm, NOW, 3), None);
        for from in [&begun, &copying] {
            let stays = stay(from, &id, "cancelled", &calm, NOW + 5_000, 3).unwrap();
            assert!(stays.leaving.is_empty() && stays.plan.is_none());
            assert_eq!(ids(&stays), [1, 2, 3]);
            let report = stays.operations.last().unwrap();
            assert_eq!((&report.id, report.outcome, report.duration_ms), (&id, Outcome::Aborted, 5));
            assert_eq!(next(&stays, &calm, HERE, |_, _| Some(NodeId(4))), None, "nothing begins again");
        }
    }

    #[test]
    fn the_only_replica_is_taken_over_from_the_bucket_only_when_its_node_is_gone() {
        let calm = reports(|_, _| {});
        let to_two = |_: &Catalog, _: ShardId| Some(NodeId(2));
        let dead = |node: NodeId| if node == NodeId(1) { Presence::Gone } else { Presence::Here(0) };
        assert_eq!(next(&single(), &calm, dead, to_two), None, "nobody said that it does not come back");
        let drained = Leaving { node: NodeId(1), to: None, replace: false, since_us: NOW };
        let drained = empty_node(&single(), drained, NOW, 2).unwrap();
        assert_eq!(next(&drained, &calm, dead, to_two), None, "a node that is only emptied is waited for");
        let leaving =
            empty_node(&single(), Leaving { node: NodeId(1), to: None, replace: true, since_us: NOW }, NOW, 2).unwrap();
        let live = next(&leaving, &calm, HERE, to_two).unwrap().plan.unwrap();
        assert_eq!((live.kind, live.step), (PlanKind::Replica { shard: ShardId(0) }, Step::Prepare));
        let plan = next(&leaving, &calm, dead, to_two).unwrap().plan.unwrap();
        assert_eq!((plan.kind, plan.step), (PlanKind::Takeover { shard: ShardId(0) }, Step::Tail));
        assert_eq!(plan.nodes().collect::<Vec<_>>(), [NodeId(2)], "the dead one is not waited for");
        let (mut shard, mut unsealed) = (committed(&next(&leaving, &calm, dead, to_two).unwrap()), Vec::new());
        leave(&mut shard.placement[0], &mut unsealed, [ReplicaId(1)].into_iter(), NOW);
        assert_eq!((ids(&shard), unsealed[0].node), (vec![2], NodeId(1)));
    }

    #[test]
    fn a_node_that_is_lost_for_long_is_replaced_when_there_is_room() {
        let calm = reports(|_, _| {});
        let dead = |node: NodeId| if node == NodeId(3) { Presence::Gone } else { Presence::Here(0) };
        let room: &dyn Fn(&Catalog, ShardId) -> Option<NodeId> = &|_, _| Some(NodeId(4));
        for (room, placed) in [(room, Some(vec![1, 2])), (&NOWHERE, None)] {
            let around = Around { presence: &dead, lost: &|node| node == NodeId(3), room };
            let next = advance_members(&catalog(), &calm, &around, NOW, 3);
            assert_eq!(next.as_ref().map(ids), placed);
        }
    }
}
