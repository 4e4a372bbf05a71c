//! Choice of the primary of a shard: failover when its node is gone or the replica itself has
//! failed, leadership transfer when its preferred primary has returned.
//!
//! A failover costs an epoch and nothing else: every replica takes puts and deletes, so only
//! read-modify-writes wait for it. A leadership transfer is planned: the primary stops taking
//! read-modify-writes under one version, its successor catches up to everything that the primary
//! holds, and a second version changes the primary.
//!
//! A primary that does not serve is replaced by the replica that has been serving in its place.
//!
//! **Invariant:** pure, and at each epoch a shard has one primary. A replica that has not caught up
//! since it was opened never becomes primary; the successor of a primary that is gone is a replica
//! that has authority. A leadership transfer that does not end in time is undone.

use crate::catalog::{Catalog, KeyspaceState, Placed, ShardPlacement};
use crate::control::plan::Step;
use crate::control::report::Reports;
use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::limits::{ACTING_PRIMARY_AFTER, HANDOVER_TIMEOUT, TAIL_LAG_LSNS_MAX};

/// Presence of a node, as the master knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// The node has a session, for so many microseconds.
    Here(u64),
    /// The node has no session, but may come back at once.
    Away,
    /// The node is away for so long that others must do its work.
    Gone,
}

/// Time for which its node must have been back before leadership returns to the preferred primary,
/// microseconds.
pub const HOME_FOR_US: u64 = 1_000_000;

/// Time after a change of its catalog for which a keyspace is left alone, microseconds: after a
/// failover or an undone transfer, leadership does not return at once.
pub const QUIET_US: u64 = 3_000_000;

/// Changes of primaries in a version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeadershipChanges {
    /// Primaries that were replaced because their node is gone or they have failed.
    pub failovers: u64,
    /// Leadership transfers that ended.
    pub handovers: u64,
}

/// Returns the version that corrects the primaries, if one is due, and its changes.
pub fn advance_primaries(
    catalog: &Catalog,
    reports: &Reports,
    presence: impl Fn(NodeId) -> Presence,
    now_us: u64,
    nonce: u64,
) -> Option<(Catalog, LeadershipChanges)> {
    let step = catalog.plan.as_ref().map(|plan| plan.step);
    // A seal is decided first: a version in between would undo it. After the decision no node is
    // waited for.
    if catalog.state != KeyspaceState::Active || step == Some(Step::Sealing) {
        return None;
    }
    let age_us = now_us.saturating_sub(catalog.written_at_us);
    let mut changes = LeadershipChanges::default();
    // Most looks change nothing, and a copy of the catalog costs more than the look.
    let mut next: Option<Catalog> = None;
    for (at, shard) in catalog.placement.iter().enumerate() {
        if shard.replicas.len() < 2 {
            continue;
        }
        let ready = |id: ReplicaId| {
            reports.get(&id).is_some_and(|report| {
                report.replication.ready
                    && !report.has_failed()
                    && report.version <= catalog.version
            })
        };
        let decision = decide(shard, catalog, reports, &presence, ready, age_us);
        let may_begin = step.is_none() && !catalog.is_moving(shard.shard);
        if matches!(decision, Decision::Keep)
            || (matches!(decision, Decision::Begin(_)) && !may_begin)
        {
            continue;
        }
        let written = next.get_or_insert_with(|| catalog.next(now_us, nonce));
        let shard = &mut written.placement[at];
        match decision {
            Decision::Keep => {}
            Decision::Replace(by) => {
                set_primary(shard, by);
                changes.failovers += 1;
            }
            Decision::Begin(to) => shard.transferring_to = Some(to),
            Decision::End(to) => {
                set_primary(shard, to);
                changes.handovers += 1;
            }
            Decision::Undo => shard.transferring_to = None,
        }
    }
    let mut next = next?;
    if changes != LeadershipChanges::default() {
        next.epoch = Epoch(catalog.epoch.0 + 1);
    }
    Some((next, changes))
}

/// Returns the changes of primaries from one version to the next.
pub fn leadership_changes_between(before: &Catalog, after: &Catalog) -> LeadershipChanges {
    let mut changes = LeadershipChanges::default();
    for (old, new) in before.placement.iter().zip(&after.placement) {
        let Some(primary) = new.primary().filter(|primary| Some(*primary) != old.primary()) else {
            continue;
        };
        if old.transferring_to == Some(primary.replica) {
            changes.handovers += 1;
        } else {
            changes.failovers += 1;
        }
    }
    changes
}

/// Returns true when the primaries must be checked again soon although no report arrives. An acting
/// primary alone is no reason: leadership returns to a node that has been back for some time, and one
/// that is gone reports when it is back.
pub fn is_unsettled(catalog: &Catalog, presence: impl Fn(NodeId) -> Presence) -> bool {
    let may_return = |shard: &ShardPlacement| {
        shard.primary.is_some()
            && shard.shipper().is_some_and(|home| presence(home.node) != Presence::Gone)
    };
    catalog.state == KeyspaceState::Active
        && catalog.placement.iter().filter(|shard| shard.replicas.len() > 1).any(|shard| {
            shard.transferring_to.is_some()
                || may_return(shard)
                || shard.primary().is_some_and(|primary| presence(primary.node) == Presence::Away)
        })
}

fn set_primary(shard: &mut ShardPlacement, id: ReplicaId) {
    let home = shard.replicas.first().map(|member| member.replica);
    shard.primary = Some(id).filter(|id| Some(*id) != home);
    shard.transferring_to = None;
}

enum Decision {
    Keep,
    Replace(ReplicaId),
    Begin(ReplicaId),
    End(ReplicaId),
    Undo,
}

fn decide(
    shard: &ShardPlacement,
    catalog: &Catalog,
    reports: &Reports,
    presence: impl Fn(NodeId) -> Presence,
    ready: impl Fn(ReplicaId) -> bool,
    age_us: u64,
) -> Decision {
    let (Some(primary), Some(home)) = (shard.primary(), shard.replicas.first().copied()) else {
        return Decision::Keep;
    };
    let here = |node| matches!(presence(node), Presence::Here(_));
    let failed = |id: ReplicaId| reports.get(&id).is_some_and(|report| report.has_failed());
    let serving = |id: ReplicaId| reports.get(&id).and_then(|report| report.replication.serving);
    if presence(primary.node) == Presence::Gone || failed(primary.replica) {
        // Only a replica that has authority holds everything that any reachable replica holds.
        let serves = |id: ReplicaId| serving(id).unwrap_or(true);
        let successor = shard
            .replicas
            .iter()
            .find(|member| here(member.node) && ready(member.replica) && serves(member.replica));
        return successor.map_or(Decision::Keep, |successor| Decision::Replace(successor.replica));
    }
    if serving(primary.replica) == Some(false) && shard.transferring_to.is_none() {
        let acting = |id: ReplicaId| {
            reports.get(&id).is_some_and(|report| {
                report.replication.acting_ms >= ACTING_PRIMARY_AFTER.as_millis() as u64
                    && report.replication.serving == Some(true)
            })
        };
        let instead = shard
            .replicas
            .iter()
            .find(|member| here(member.node) && ready(member.replica) && acting(member.replica));
        if let Some(instead) = instead {
            return Decision::Replace(instead.replica);
        }
    }
    if let Some(to) = shard.transferring_to {
        let took_over = reports.get(&to).and_then(|report| report.replication.took_over);
        let node =
            shard.replicas.iter().find(|member| member.replica == to).map(|member| member.node);
        return match took_over {
            _ if failed(to) => Decision::Undo,
            Some(version) if version == catalog.version => Decision::End(to),
            _ if node.is_none_or(|node| !here(node)) => Decision::Undo,
            _ if age_us > HANDOVER_TIMEOUT.as_micros() as u64 => Decision::Undo,
            _ => Decision::Keep,
        };
    }
    let at_home = primary == home;
    let back = matches!(presence(home.node), Presence::Here(since_us) if since_us >= HOME_FOR_US);
    let close = reports
        .get(&home.replica)
        .is_some_and(|report| report.replication.lag_lsns <= TAIL_LAG_LSNS_MAX);
    match !at_home
        && back
        && close
        && ready(home.replica)
        && here(primary.node)
        && age_us >= QUIET_US
    {
        true => Decision::Begin(home.replica),
        false => Decision::Keep,
    }
}

/// Returns the successor of a replica that is about to leave: a primary that is there transfers
/// leadership first, because increments that it alone has just applied must not be missed. `None`
/// when the replica is not primary, or no other can take over.
pub fn successor(
    shard: &ShardPlacement,
    replica: ReplicaId,
    here: impl Fn(NodeId) -> bool,
    may: impl Fn(&Placed) -> bool,
) -> Option<ReplicaId> {
    shard.primary().filter(|primary| primary.replica == replica && here(primary.node))?;
    let successor = shard
        .replicas
        .iter()
        .find(|member| member.replica != replica && here(member.node) && may(member));
    successor.map(|successor| successor.replica)
}

/// Returns the version in which a primary begins to transfer leadership to another replica of its
/// shard.
pub fn transfer_leadership(
    catalog: &Catalog,
    from: ReplicaId,
    to: ReplicaId,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let may = catalog.state == KeyspaceState::Active && catalog.plan.is_none();
    let mut next = catalog.next(now_us, nonce);
    let shard = next
        .placement
        .iter_mut()
        .find(|shard| shard.primary().is_some_and(|primary| primary.replica == from));
    let shard = shard.filter(|shard| {
        shard.transferring_to.is_none() && shard.replicas.iter().any(|member| member.replica == to)
    });
    shard.filter(|_| may && from != to)?.transferring_to = Some(to);
    Some(next)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::control::reconcile::start_resize;
    use crate::control::report::{ReplicaPhase, ReplicaReport, ReplicationReport};
    use crate::ids::{CatalogVersion, KeyspaceId, ShardId};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const NOW: u64 = 1_000_000_000;

    fn catalog() -> Catalog {
        let spec = KeyspaceSpec { shards: 2, replicas: 3, ..KeyspaceSpec::default() };
        let nodes = [NodeId(1), NodeId(2), NodeId(3)];
        let shifted = [NodeId(2), NodeId(3), NodeId(1)];
        Catalog::first(KeyspaceId(1), "ks", spec, &[nodes.to_vec(), shifted.to_vec()], NOW, 1)
    }

    fn report(replica: u64, replication: ReplicationReport) -> (ReplicaId, ReplicaReport) {
        let (keyspace, shard, replica) = (KeyspaceId(1), ShardId(0), ReplicaId(replica));
        let report = ReplicaReport::new(keyspace, shard, replica, ReplicaPhase::Serving);
        let report = ReplicaReport { version: CatalogVersion(1), replication, ..report };
        (replica, report)
    }

    fn all_ready() -> Reports {
        (1..=6)
            .map(|id| report(id, ReplicationReport { ready: true, ..Default::default() }))
            .collect()
    }

    fn presence(gone: &[u64]) -> impl Fn(NodeId) -> Presence + '_ {
        |node| if gone.contains(&node.0) { Presence::Gone } else { Presence::Here(u64::MAX) }
    }

    const HERE: fn(NodeId) -> Presence = |_| Presence::Here(u64::MAX);

    #[test]
    fn the_next_ready_replica_takes_the_place_of_a_primary_that_is_gone() {
        let catalog = catalog();
        assert_eq!(advance_primaries(&catalog, &all_ready(), HERE, NOW + QUIET_US, 2), None);
        let (next, changes) =
            advance_primaries(&catalog, &all_ready(), presence(&[1]), NOW, 2).unwrap();
        assert_eq!(changes, LeadershipChanges { failovers: 1, handovers: 0 });
        assert_eq!(leadership_changes_between(&catalog, &next), changes);
        assert_eq!(next.epoch, Epoch(2));
        assert_eq!(next.placement[0].primary, Some(ReplicaId(2)));
        assert_eq!(
            next.placement[0].replicas, catalog.placement[0].replicas,
            "the order of preference stays"
        );
        assert_eq!(next.placement[1], catalog.placement[1]);
        // A replica that has not caught up is passed over; without a candidate, nothing happens.
        let mut reports = all_ready();
        reports.get_mut(&ReplicaId(2)).unwrap().replication.ready = false;
        let (next, _) = advance_primaries(&catalog, &reports, presence(&[1]), NOW, 2).unwrap();
        assert_eq!(next.placement[0].primary, Some(ReplicaId(3)));
        assert_eq!(advance_primaries(&catalog, &BTreeMap::new(), presence(&[1]), NOW, 2), None);
        assert_eq!(advance_primaries(&catalog, &all_ready(), |_| Presence::Away, NOW, 2), None);
    }

    #[test]
    fn the_successor_is_the_replica_that_serves_and_not_the_first_that_is_ready() {
        let catalog = catalog();
        let mut reports = all_ready();
        for report in reports.values_mut() {
            report.replication.serving = Some(false);
        }
        assert_eq!(
            advance_primaries(&catalog, &reports, presence(&[1]), NOW, 2),
            None,
            "nobody serves yet"
        );
        reports.get_mut(&ReplicaId(3)).unwrap().replication.serving = Some(true);
        let (next, _) = advance_primaries(&catalog, &reports, presence(&[1]), NOW, 2).unwrap();
        assert_eq!(next.placement[0].primary, Some(ReplicaId(3)));
    }

    #[test]
    fn a_primary_that_does_not_serve_is_replaced_by_the_one_that_does_in_its_place() {
        let catalog = catalog();
        let mut reports = all_ready();
        let primary = &mut reports.get_mut(&ReplicaId(1)).unwrap().replication;
        (primary.ready, primary.serving) = (false, Some(false));
        let acting = &mut reports.get_mut(&ReplicaId(2)).unwrap().replication;
        (acting.serving, acting.acting_ms) = (Some(true), 499);
        assert_eq!(
            advance_primaries(&catalog, &reports, HERE, NOW, 2),
            None,
            "it may be back in a moment"
        );
        reports.get_mut(&ReplicaId(2)).unwrap().replication.acting_ms = 500;
        let (next, changes) = advance_primaries(&catalog, &reports, HERE, NOW, 2).unwrap();
        assert_eq!((next.placement[0].primary, changes.failovers), (Some(ReplicaId(2)), 1));
        // While the preferred primary does not serve, leadership does not return to it.
        let at = next.written_at_us + QUIET_US;
        assert_eq!(advance_primaries(&next, &reports, HERE, at, 3), None);
    }

    fn fail(reports: &mut Reports, replica: u64) {
        reports.get_mut(&ReplicaId(replica)).unwrap().phase = ReplicaPhase::Failed("rot".into());
    }

    #[test]
    fn a_primary_that_has_failed_is_replaced_although_its_node_is_there_and_gets_nothing_back() {
        let (catalog, mut reports) = (catalog(), all_ready());
        fail(&mut reports, 1);
        let (next, changes) = advance_primaries(&catalog, &reports, HERE, NOW, 2).unwrap();
        assert_eq!(
            (changes, next.placement[0].primary),
            (LeadershipChanges { failovers: 1, handovers: 0 }, Some(ReplicaId(2)))
        );
        let at = next.written_at_us;
        assert_eq!(
            advance_primaries(&next, &reports, HERE, at + QUIET_US, 3),
            None,
            "its home has failed"
        );
        // A preferred primary that fails during the transfer does not get leadership either.
        let (handing, _) = advance_primaries(&next, &all_ready(), HERE, at + QUIET_US, 3).unwrap();
        let (undone, _) =
            advance_primaries(&handing, &reports, HERE, handing.written_at_us, 4).unwrap();
        assert_eq!(
            (undone.placement[0].transferring_to, undone.placement[0].primary),
            (None, Some(ReplicaId(2)))
        );
        // A failed replica is no successor either.
        fail(&mut reports, 2);
        let (next, _) = advance_primaries(&catalog, &reports, HERE, NOW, 2).unwrap();
        assert_eq!(next.placement[0].primary, Some(ReplicaId(3)));
        fail(&mut reports, 3);
        assert_eq!(
            advance_primaries(&catalog, &reports, HERE, NOW, 2),
            None,
            "there is nobody else"
        );
    }

    #[test]
    fn a_primary_is_replaced_while_a_plan_is_committed_and_not_while_it_seals() {
        let nodes = [NodeId(1), NodeId(2), NodeId(3)];
        let mut running = start_resize(&catalog(), 3, &[nodes.to_vec()], NOW, 2).unwrap();
        for (step, replaced) in
            [(Step::Tail, true), (Step::Sealing, false), (Step::Committed, true)]
        {
            running.plan.as_mut().unwrap().step = step;
            let next = advance_primaries(&running, &all_ready(), presence(&[1]), NOW, 3);
            assert_eq!(next.is_some(), replaced, "{step:?}");
            assert!(
                next.is_none_or(|(next, _)| next.plan == running.plan),
                "the plan goes on as it was"
            );
        }
    }

    #[test]
    fn home_gets_the_primary_back_in_two_versions() {
        let (away, _) =
            advance_primaries(&catalog(), &all_ready(), presence(&[1]), NOW, 2).unwrap();
        assert!(is_unsettled(&away, HERE) && is_unsettled(&away, |_| Presence::Away));
        assert!(!is_unsettled(&away, presence(&[1])), "its node may be gone for ever");
        let mut reports = all_ready();
        assert_eq!(
            advance_primaries(&away, &reports, HERE, NOW + QUIET_US - 1, 3),
            None,
            "too soon"
        );
        let (handing, changes) =
            advance_primaries(&away, &reports, HERE, NOW + QUIET_US, 3).unwrap();
        assert_eq!((changes, handing.epoch), (LeadershipChanges::default(), away.epoch));
        assert_eq!(handing.placement[0].transferring_to, Some(ReplicaId(1)));
        assert_eq!(handing.placement[0].primary().unwrap().replica, ReplicaId(2), "not yet");
        let at = handing.written_at_us;
        assert_eq!(advance_primaries(&handing, &reports, HERE, at, 4), None);
        // A transfer that was completed under an earlier version does not count.
        reports.get_mut(&ReplicaId(1)).unwrap().replication.took_over = Some(away.version);
        assert_eq!(advance_primaries(&handing, &reports, HERE, at, 4), None);
        reports.get_mut(&ReplicaId(1)).unwrap().replication.took_over = Some(handing.version);
        let (home, changes) = advance_primaries(&handing, &reports, HERE, at, 4).unwrap();
        assert_eq!(changes, LeadershipChanges { failovers: 0, handovers: 1 });
        assert_eq!(leadership_changes_between(&handing, &home), changes);
        assert_eq!(
            (home.epoch, home.placement[0].primary, home.placement[0].transferring_to),
            (Epoch(3), None, None)
        );
        assert!(!is_unsettled(&home, HERE));
    }

    #[test]
    fn a_hand_over_that_does_not_end_is_undone() {
        let (away, _) =
            advance_primaries(&catalog(), &all_ready(), presence(&[1]), NOW, 2).unwrap();
        let (handing, _) = advance_primaries(&away, &all_ready(), HERE, NOW + QUIET_US, 3).unwrap();
        let late = handing.written_at_us + HANDOVER_TIMEOUT.as_micros() as u64 + 1;
        for (at, presence) in [(late, presence(&[])), (handing.written_at_us, presence(&[1]))] {
            let (undone, changes) =
                advance_primaries(&handing, &all_ready(), presence, at, 4).unwrap();
            assert_eq!((changes, undone.epoch), (LeadershipChanges::default(), handing.epoch));
            assert_eq!(undone.placement[0].transferring_to, None);
            assert_eq!(undone.placement[0].primary, Some(ReplicaId(2)));
        }
        // The acting primary dies during the transfer: any ready replica goes on.
        let (next, _) =
            advance_primaries(&handing, &all_ready(), presence(&[2]), handing.written_at_us, 4)
                .unwrap();
        assert_eq!((next.placement[0].primary, next.placement[0].transferring_to), (None, None));
    }

    proptest! {
        // In every version, whatever the nodes do, each shard has one primary among its replicas,
        // and a change of a primary raises the epoch.
        #[test]
        fn one_primary_at_each_epoch(steps in proptest::collection::vec((0u8..8, 0u8..8, 0u64..4_000_000, any::<bool>()), 1..40)) {
            let mut catalog = catalog();
            let mut now = NOW;
            for (gone, ready, passed, took) in steps {
                now += passed;
                let mut reports = all_ready();
                for (id, report) in &mut reports {
                    report.replication.ready = ready & (1 << (id.0 % 3)) != 0;
                    report.replication.took_over = took.then_some(catalog.version);
                }
                let presence = |node: NodeId| match gone & (1 << (node.0 - 1)) {
                    0 => Presence::Here(u64::MAX),
                    _ => Presence::Gone,
                };
                let Some((next, _)) = advance_primaries(&catalog, &reports, presence, now, 1) else { continue };
                prop_assert_eq!(next.version.0, catalog.version.0 + 1);
                let mut moved = false;
                for (before, after) in catalog.placement.iter().zip(&next.placement) {
                    prop_assert_eq!(&before.replicas, &after.replicas);
                    prop_assert!(after.replicas.contains(&after.primary().unwrap()));
                    prop_assert!(after.transferring_to.is_none() || after.transferring_to != after.primary().map(|primary| primary.replica));
                    moved |= before.primary() != after.primary();
                }
                prop_assert_eq!(moved, next.epoch != catalog.epoch);
                catalog = next;
            }
        }
    }
}
