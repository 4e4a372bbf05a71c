//! Membership of a shard: replicas that leave the placement, are drained, and are replaced by new
//! ones.
//!
//! **Invariant:** pure. A shard keeps at least one replica. A replica leaves its placement only
//! while another one has authority and has received everything that was decided, and it stays
//! recorded until a serving replica holds everything it has, or until its loss is accepted; only
//! then may its files be deleted. A replica that is stalled does not count as serving. No
//! membership change happens while another plan runs, none but its own in a shard of which a replica
//! moves.
//!
//! A shard that has more replicas than it is to have loses one (`trim`).
//!
//! For a change that cannot go on, [`waits_for`](super::waits_for) returns the cause and the
//! remedy.

use super::drain::drain_nodes;
use super::repair::start_copy;
use super::trim::trim;
use super::view::{Around, View};
use crate::catalog::{Catalog, DrainingReplica, GivenUp, KeyspaceState, Placed};
use crate::control::report::Reports;
use crate::ids::NodeId;

/// Returns the version that is due because of the replicas' reports, or because a node is draining.
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
    let view = View { catalog, reports, around };
    let may_go =
        |draining: &DrainingReplica| !catalog.is_moving(draining.shard) && view.may_go(draining);
    if catalog.draining.iter().any(may_go) {
        let mut next = catalog.next(now_us, nonce);
        let going: Vec<&DrainingReplica> =
            catalog.draining.iter().filter(|draining| may_go(draining)).collect();
        next.draining.retain(|draining| !going.contains(&draining));
        next.remove_for_good(going.iter().map(|draining| draining.replica));
        // Data of undrained replicas that no other replica took over is given up.
        let lost = going.iter().filter(|draining| !view.is_drained(draining.replica));
        let version = next.version;
        next.given_up.extend(lost.map(|draining| GivenUp { replica: draining.replica, version }));
        return Some(next);
    }
    for shard in catalog.placement.iter().filter(|shard| !catalog.is_moving(shard.shard)) {
        for member in &shard.replicas {
            let another_serves = shard
                .replicas
                .iter()
                .any(|other| other.replica != member.replica && view.serves(other));
            if !another_serves {
                continue;
            }
            // A replica that cannot catch up, or keeps others' logs from being truncated, is
            // evicted; one that does not serve any more is evicted when a new replica can take its
            // place, or has: a move leaves one replica more when it ends for the loss of another.
            let staying = || shard.replicas.iter().filter(|other| !view.leaves(other)).count();
            let has_room = || {
                staying() > catalog.spec.replicas as usize
                    || (around.room)(catalog, shard.shard).is_some()
            };
            let is_held_back = view.is_held_back(member.node);
            let failed = !is_held_back && view.has_failed_for_good(member.replica) && has_room();
            let too_old = view.is_too_old(member.replica);
            let asks_to_evict = |other: &Placed| {
                other.replica != member.replica
                    && view
                        .replication(other.replica)
                        .is_some_and(|report| report.evict == Some(member.replica))
            };
            let asked_to_evict = shard.replicas.iter().any(asks_to_evict);
            // A replica whose log this one does not read probably cannot read this one's log
            // either.
            let may_follow = |other: &Placed| view.serves(other) && !asks_to_evict(other);
            let lost = !is_held_back && (around.lost)(member.node) && has_room();
            if (failed || too_old || asked_to_evict || lost || view.is_given_up(member))
                && let Some(next) = view.take_out(shard, member, may_follow, now_us, nonce)
            {
                return Some(with_copy(&view, member, next, now_us, nonce));
            }
        }
    }
    if let Some(next) = trim(&view, now_us, nonce) {
        return Some(next);
    }
    // Moves that have not placed their replica give way; the others end soon.
    if !catalog.moves.is_empty() {
        return None;
    }
    if let Some(next) = start_copy(&view, now_us, nonce) {
        return Some(next);
    }
    drain_nodes(&view, now_us, nonce)
}

/// Adds the begin of a copy to the version that evicts a replica. One version does both: of the many
/// keyspaces of a lost node no more lose their replica than nodes make copies, and each costs a write
/// less.
fn with_copy(view: &View<'_>, member: &Placed, next: Catalog, now_us: u64, nonce: u64) -> Catalog {
    // Leadership is transferred first.
    if next.is_placed(member.replica) || !next.moves.is_empty() {
        return next;
    }
    let after = View { catalog: &next, reports: view.reports, around: view.around };
    match start_copy(&after, now_us, nonce) {
        Some(copying) => Catalog { version: next.version, ..copying },
        None => next,
    }
}

/// Returns true when time alone may bring a keyspace further that has not all its replicas: a shard
/// has too few or too many, a node is draining, a replica moves, or one drains on a node that is
/// here. What drains on a node that is away waits for its return, which is reported.
pub fn is_incomplete(catalog: &Catalog, is_here: impl Fn(NodeId) -> bool) -> bool {
    catalog.state == KeyspaceState::Active
        && (catalog.draining.iter().any(|draining| is_here(draining.node))
            || !catalog.moves.is_empty()
            || !catalog.draining_nodes.is_empty()
            || catalog
                .placement
                .iter()
                .any(|shard| shard.replicas.len() != catalog.spec.replicas as usize))
}
