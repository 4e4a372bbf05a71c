//! Who belongs to a shard: replicas that leave their placement, are drained, and are made anew.
//!
//! **Invariant:** pure. A shard keeps at least one replica. A replica leaves its placement only while
//! another one has authority that has heard of everything that was decided, and it is recorded until one that
//! serves holds everything it has, or until its loss is accepted; only then may its files go. What stands
//! still serves nobody. Nothing of this happens while another plan runs.
//!
//! What cannot go on says what it waits for, and the way out ([`waits_for`]).

use crate::catalog::{Catalog, GivenUp, KeyspaceState, Leaving, Placed, Quarantine, ShardPlacement, Unsealed};
use crate::ids::{Epoch, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::{COPIES_PER_NODE_MAX, TAIL_LAG_LSNS_MAX};
use crate::plan::{
    OperationReport, Outcome, PauseMs, Plan, PlanKind, ReplicaReport, ReplicationReport, Reports, Source, Step, Target,
    abort, operation_id,
};
use crate::primaries::Presence;

/// After a copy of a shard that failed the next is begun no sooner than this, microseconds; twice as long
/// after each further one.
pub const COPY_AGAIN_US: u64 = 10_000_000;

/// And no later than this, as long as there is somebody to copy to.
pub const COPY_AGAIN_MAX_US: u64 = 600_000_000;

/// A node on which a copy failed is the last choice for so long, microseconds.
pub const AVOID_NODE_US: u64 = 600_000_000;

/// Replicas that are gone for good and named one by one; earlier ones are named together, by
/// [`Catalog::removed_below`].
pub const REMOVED_KEPT: usize = 64;

/// Why a replica is not taken out of its placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// It is not there.
    #[error("replica {0} is not placed and not waiting to be drained; see `vasto keyspace describe`")]
    NotThere(ReplicaId),
    /// It is the only one.
    #[error("replica {0} is the only one of shard {1}: nothing would be left of the shard")]
    Last(ReplicaId, ShardId),
    /// It is the only one that serves.
    #[error(
        "replica {0} is the only one of shard {1} that serves: nothing could be read any more; start the nodes of the others first"
    )]
    OnlyOneServes(ReplicaId, ShardId),
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
        next.remove_for_good([replica]);
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
        next.remove_for_good([replica]);
        next.given_up.push(GivenUp { replica, version: next.version });
    } else {
        next.unsealed.push(Unsealed { shard, replica, node, since_us: now_us });
    }
    Ok(next)
}

/// The version that takes a replica out because somebody asks for it: never the only one that serves,
/// whatever else may be given up.
pub fn evict_on_request(
    catalog: &Catalog,
    replica: ReplicaId,
    accept_loss: bool,
    serves: impl Fn(&Placed) -> bool,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, EvictError> {
    let next = evict(catalog, replica, accept_loss, now_us, nonce)?;
    let shard = catalog.placement.iter().find(|shard| shard.replicas.iter().any(|one| one.replica == replica));
    let serving: Vec<ReplicaId> =
        shard.into_iter().flat_map(|shard| &shard.replicas).filter(|one| serves(one)).map(|one| one.replica).collect();
    match (shard, &serving[..]) {
        (Some(shard), [only]) if *only == replica => Err(EvictError::OnlyOneServes(replica, shard.shard)),
        _ => Ok(next),
    }
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
    /// Is a node away for so long that it does not come back in a moment?
    pub long_gone: &'a dyn Fn(NodeId) -> bool,
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

/// A keyspace as it is reported, for decisions about its members.
struct View<'a> {
    catalog: &'a Catalog,
    reports: &'a Reports,
    around: &'a Around<'a>,
}

impl View<'_> {
    fn replication(&self, replica: ReplicaId) -> Option<&ReplicationReport> {
        self.reports.get(&replica).map(|report| &report.replication)
    }

    fn has_failed(&self, replica: ReplicaId) -> bool {
        self.reports.get(&replica).is_some_and(ReplicaReport::has_failed)
    }

    /// It has failed, and does not open again by itself.
    fn has_failed_for_good(&self, replica: ReplicaId) -> bool {
        self.has_failed(replica) && !self.replication(replica).is_some_and(|report| report.passing)
    }

    /// It serves, by its last report.
    fn is_ready(&self, one: &Placed) -> bool {
        self.around.is_here(one.node)
            && !self.has_failed(one.replica)
            && self.replication(one.replica).is_some_and(|report| report.ready)
    }

    /// It serves, and not only by a report from before it stood still or was cut off: it has obeyed the
    /// version that is in force.
    fn serves(&self, one: &Placed) -> bool {
        let has_heard = |report: &ReplicaReport| report.version >= self.catalog.version;
        self.is_ready(one) && self.reports.get(&one.replica).is_some_and(has_heard)
    }

    /// It answers strict requests: it holds what the others have acknowledged.
    fn has_authority(&self, one: &Placed) -> bool {
        let has_authority = |report: &ReplicaReport| report.has_authority(self.catalog.version);
        self.is_ready(one) && self.reports.get(&one.replica).is_some_and(has_authority)
    }

    /// The version that takes a replica out, or hands over first; `None` while it may be the only one that holds what
    /// it has acknowledged. Of one that is away the others find out themselves whether they may serve.
    fn take_out(
        &self,
        shard: &ShardPlacement,
        one: &Placed,
        stays: impl Fn(&Placed) -> bool,
        now_us: u64,
        nonce: u64,
    ) -> Option<Catalog> {
        // One that lags is not able to serve yet.
        let is_close =
            |other: &Placed| self.replication(other.replica).is_some_and(|report| report.lag_lsns <= TAIL_LAG_LSNS_MAX);
        let may = |other: &Placed| stays(other) && is_close(other);
        let heir = heir(shard, one.replica, |node| self.around.is_here(node), may);
        if let Some(heir) = heir.filter(|_| !self.has_failed(one.replica)) {
            return hand_over(self.catalog, one.replica, heir, now_us, nonce);
        }
        let mut others = shard.replicas.iter().filter(|other| other.replica != one.replica);
        others
            .any(|other| self.has_authority(other))
            .then(|| evict(self.catalog, one.replica, false, now_us, nonce).ok())
            .flatten()
    }

    fn leaving_of(&self, node: NodeId) -> Option<&Leaving> {
        self.catalog.leaving.iter().find(|leaving| leaving.node == node)
    }

    fn leaves(&self, one: &Placed) -> bool {
        self.leaving_of(one.node).is_some()
    }

    /// It is not waited for: its node is to be replaced and is gone, or is there and the replica has failed.
    fn is_given_up(&self, one: &Placed) -> bool {
        let replaced = self.leaving_of(one.node).is_some_and(|leaving| leaving.replace);
        replaced
            && match (self.around.presence)(one.node) {
                Presence::Gone => true,
                Presence::Here(_) => self.has_failed_for_good(one.replica),
                Presence::Away => false,
            }
    }

    fn is_drained(&self, replica: ReplicaId) -> bool {
        self.replication(replica).is_some_and(|report| report.drained)
    }

    /// Nothing is lost when its files go: another one serves and holds everything it has, or its loss was
    /// accepted and what it had shipped was taken over.
    fn may_go(&self, one: &Unsealed) -> bool {
        let others = || self.catalog.shard(one.shard).into_iter().flat_map(|shard| &shard.replicas);
        if let Some(report) = self.replication(one.replica).filter(|_| self.is_drained(one.replica)) {
            // A node of an older version does not say who holds it.
            let holds = |id: ReplicaId| report.drained_by.is_empty() || report.drained_by.contains(&id);
            return others().any(|other| holds(other.replica) && self.serves(other));
        }
        let gone = Placed { replica: one.replica, node: one.node };
        let accepted = self.leaving_of(one.node).is_some_and(|leaving| leaving.accept_loss);
        // One that is cut off for a moment goes on to be drained when it is back.
        let is_over = (self.around.long_gone)(one.node) || (self.around.is_here(one.node) && self.is_given_up(&gone));
        accepted
            && is_over
            && others().any(|other| {
                self.serves(other)
                    && self
                        .replication(other.replica)
                        .is_some_and(|report| report.took_from_bucket.contains(&one.replica))
            })
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
    let view = View { catalog, reports, around };
    if catalog.unsealed.iter().any(|one| view.may_go(one)) {
        let mut next = catalog.next(now_us, nonce);
        let going: Vec<&Unsealed> = catalog.unsealed.iter().filter(|one| view.may_go(one)).collect();
        next.unsealed.retain(|one| !going.contains(&one));
        next.remove_for_good(going.iter().map(|one| one.replica));
        // Of what nobody has drained, what nobody took over is given up.
        let lost = going.iter().filter(|one| !view.is_drained(one.replica));
        let version = next.version;
        next.given_up.extend(lost.map(|one| GivenUp { replica: one.replica, version }));
        return Some(next);
    }
    for shard in &catalog.placement {
        for one in &shard.replicas {
            let another_serves = shard.replicas.iter().any(|other| other.replica != one.replica && view.serves(other));
            if !another_serves {
                continue;
            }
            // What cannot catch up, or keeps others' logs from ending, leaves; what does not serve any
            // more does when a copy can take its place.
            let has_room = || (around.room)(catalog, shard.shard).is_some();
            let failed = view.has_failed_for_good(one.replica) && has_room();
            let too_old = view.replication(one.replica).is_some_and(|report| report.too_old);
            let has_it_in_the_way = |other: &Placed| {
                other.replica != one.replica
                    && view.replication(other.replica).is_some_and(|report| report.evict == Some(one.replica))
            };
            let in_the_way = shard.replicas.iter().any(has_it_in_the_way);
            // Whoever is not read by it cannot read it either, as likely as not.
            let may_follow = |other: &Placed| view.serves(other) && !has_it_in_the_way(other);
            let lost = (around.lost)(one.node) && has_room();
            if (failed || too_old || in_the_way || lost || view.is_given_up(one))
                && let Some(next) = view.take_out(shard, one, may_follow, now_us, nonce)
            {
                return Some(next);
            }
        }
    }
    if let Some(next) = start_copy(&view, now_us, nonce) {
        return Some(next);
    }
    empty_leaving(&view, now_us, nonce)
}

/// The version that takes the next replica from a leaving node, or says that nothing is left there.
fn empty_leaving(view: &View<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    let View { catalog, around, .. } = *view;
    for shard in &catalog.placement {
        let staying = shard.replicas.iter().filter(|one| !view.leaves(one)).count();
        let Some(one) = shard.replicas.iter().find(|one| view.leaves(one)) else { continue };
        if staying >= catalog.spec.replicas as usize {
            // Not before one that stays has taken over: this one may be all that can be read.
            let stays = |other: &Placed| !view.leaves(other) && view.serves(other);
            if !shard.replicas.iter().any(stays) {
                continue;
            }
            match view.take_out(shard, one, stays, now_us, nonce) {
                Some(next) => return Some(next),
                None => continue,
            }
        }
        if shard.replicas.iter().all(|one| view.is_given_up(one))
            && may_copy(catalog, shard.shard, now_us)
            && let Some(node) = (around.room)(catalog, shard.shard)
        {
            let kind = PlanKind::Takeover { shard: shard.shard };
            return Some(begin(catalog, kind, shard.shard, &shard.replicas, node, now_us, nonce));
        }
    }
    let complete = catalog.placement.iter().all(|shard| shard.replicas.len() >= catalog.spec.replicas as usize);
    let ended = |leaving: &Leaving| complete && is_empty_of(catalog, leaving);
    if catalog.leaving.iter().any(ended) {
        let mut next = catalog.next(now_us, nonce);
        next.leaving.retain(|leaving| !ended(leaving));
        for leaving in catalog.leaving.iter().filter(|leaving| ended(leaving)) {
            next.remember(end_of(catalog, leaving, Outcome::Done, None, now_us));
        }
        return Some(next);
    }
    None
}

/// Nothing is left on a leaving node, and when what it alone holds is given up, nothing waits for it either.
fn is_empty_of(catalog: &Catalog, leaving: &Leaving) -> bool {
    let waits = catalog.unsealed.iter().any(|one| one.node == leaving.node);
    let holds = catalog.placement.iter().any(|shard| shard.replicas.iter().any(|one| one.node == leaving.node));
    !(holds || (leaving.accept_loss && waits))
}

/// What keeps the members of a keyspace from being as many as they should be, and what can be done about
/// it; `None` when nothing does.
pub fn waits_for(catalog: &Catalog, reports: &Reports, around: &Around<'_>, now_us: u64) -> Option<String> {
    if catalog.state != KeyspaceState::Active || catalog.plan.is_some() {
        return None;
    }
    let view = View { catalog, reports, around };
    let mut of_shards = catalog.placement.iter().filter_map(|shard| {
        let leaves = shard.replicas.iter().any(|one| view.leaves(one));
        let staying = shard.replicas.iter().filter(|one| !view.leaves(one)).count();
        let lacks = staying < catalog.spec.replicas as usize;
        if !leaves && !lacks {
            return None;
        }
        if !shard.replicas.iter().any(|one| view.is_ready(one)) {
            return Some(nobody_serves(&view, shard));
        }
        if !lacks {
            let waits = shard.replicas.iter().filter(|one| !view.leaves(one) && !view.serves(one));
            let who = waits.map(|one| format!("replica {} on {}", one.replica, one.node)).collect::<Vec<_>>();
            let stays = shard.replicas.iter().any(|one| !view.leaves(one) && view.serves(one));
            return Some(match stays {
                true => format!("shard {} of {} to be handed over", shard.shard, catalog.name),
                false => format!(
                    "{} to serve shard {} of {}: start its node, or undo with `vasto operation cancel`",
                    who.join(" or "),
                    shard.shard,
                    catalog.name
                ),
            });
        }
        let again_us = copy_not_before(catalog, shard.shard);
        if now_us < again_us {
            let seconds = (again_us - now_us).div_ceil(1_000_000);
            return Some(format!(
                "{seconds} s to pass until shard {} of {} is copied again; `vasto operation list` says why the last copy failed",
                shard.shard, catalog.name
            ));
        }
        Some(format!(
            "a node that can take a copy of shard {} of {}: live, without one of it, not cordoned, with room for a \
             replica and its files, and fewer than {COPIES_PER_NODE_MAX} copies under way; start one with `vasto \
             serve node`",
            shard.shard, catalog.name
        ))
    });
    of_shards.next().or_else(|| {
        let waits = |one: &&Unsealed| view.leaving_of(one.node).is_some_and(|leaving| leaving.accept_loss);
        catalog.unsealed.iter().find(waits).map(|one| match around.is_here(one.node) {
            true => format!("replica {} on {} to be drained", one.replica, one.node),
            false => format!("what replica {} had shipped to be taken over from the bucket", one.replica),
        })
    })
}

/// Why no replica of a shard serves, and what brings one back.
fn nobody_serves(view: &View<'_>, shard: &ShardPlacement) -> String {
    let mut ways: Vec<String> = Vec::new();
    let of_one = |one: &Placed| {
        let replaced = view.leaving_of(one.node).is_some_and(|leaving| leaving.replace);
        let state = match ((view.around.presence)(one.node), view.has_failed(one.replica)) {
            (Presence::Here(_), true) => "has failed",
            (Presence::Here(_), false) => "does not serve yet",
            _ => "is away",
        };
        if !replaced && state == "is away" {
            ways.push(format!("start {0} or give it up with `vasto node replace {0}`", one.node));
        } else if !replaced && state == "has failed" {
            ways.push(format!("put the files of {0} back or give it up with `vasto node replace {0}`", one.node));
        }
        format!("replica {} on {} {state}{}", one.replica, one.node, if replaced { " and is replaced" } else { "" })
    };
    let states: Vec<String> = shard.replicas.iter().map(of_one).collect();
    let ways = match ways.is_empty() {
        // Everybody is given up: only somebody who could take over is missing.
        true if shard.replicas.iter().all(|one| view.is_given_up(one)) => {
            "it is taken over from the bucket as soon as a live node has room: start one with `vasto serve node`"
                .to_owned()
        }
        true => "it is waited for".to_owned(),
        false => ways.join("; "),
    };
    format!("a replica of shard {} of {} that serves: {}; {ways}", shard.shard, view.catalog.name, states.join(", "))
}

/// What the emptying of a node has cost in this keyspace so far.
pub fn so_far(catalog: &Catalog, leaving: &Leaving, now_us: u64) -> OperationReport {
    end_of(catalog, leaving, Outcome::Done, None, now_us)
}

/// What is remembered of the emptying of a node in this keyspace.
fn end_of(
    catalog: &Catalog,
    leaving: &Leaving,
    outcome: Outcome,
    reason: Option<String>,
    now_us: u64,
) -> OperationReport {
    let moved = &leaving.moved;
    OperationReport {
        id: leaving.operation_id(),
        kind: "replace".into(),
        keyspace: catalog.name.clone(),
        from: catalog.spec.shards,
        to: catalog.spec.shards,
        outcome,
        reason,
        keys_moved: moved.keys,
        bytes_moved: moved.bytes,
        bytes_from_bucket: moved.bytes_from_bucket,
        bytes_from_peers: moved.bytes_from_peers,
        objects_read: moved.objects_read,
        write_pause_ms: PauseMs::default(),
        duration_ms: now_us.saturating_sub(leaving.since_us) / 1000,
        started_at_us: leaving.since_us,
        reached: moved.reached.clone(),
        copies: moved.copies,
        shard: None,
        failed_on: Vec::new(),
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

/// The copies of a shard that failed since the last one that did not, newest first.
fn failures(catalog: &Catalog, shard: ShardId) -> impl Iterator<Item = &OperationReport> {
    let of_shard = move |one: &&OperationReport| one.is_copy() && one.shard.is_none_or(|of| of == shard);
    let newest_first = catalog.operations.iter().rev().filter(of_shard);
    newest_first.take_while(|one| one.outcome == Outcome::Aborted)
}

/// After a copy of a shard that failed the next waits: before this time, microseconds since 1970, none is
/// begun. Other shards do not wait for it.
fn copy_not_before(catalog: &Catalog, shard: ShardId) -> u64 {
    let failed = u32::try_from(failures(catalog, shard).count()).unwrap_or(u32::MAX);
    let Some(last) = failures(catalog, shard).next() else { return 0 };
    let pause_us = COPY_AGAIN_US.saturating_mul(1u64.checked_shl(failed - 1).unwrap_or(u64::MAX));
    last.ended_at_us().saturating_add(pause_us.min(COPY_AGAIN_MAX_US))
}

fn may_copy(catalog: &Catalog, shard: ShardId, now_us: u64) -> bool {
    now_us >= copy_not_before(catalog, shard)
}

/// The nodes on which a copy of this keyspace has failed lately: there the next is made only when there
/// is nobody else.
pub fn nodes_to_avoid(catalog: &Catalog, now_us: u64) -> Vec<NodeId> {
    let copies = catalog.operations.iter().filter(|one| one.is_copy());
    let lately = copies.filter(|one| now_us < one.ended_at_us().saturating_add(AVOID_NODE_US));
    lately.flat_map(|one| one.failed_on.iter().copied()).collect()
}

/// The version that begins one more replica of a shard that has too few on nodes that stay; one whose last
/// copy failed comes after the others.
fn start_copy(view: &View<'_>, now_us: u64, nonce: u64) -> Option<Catalog> {
    let catalog = view.catalog;
    let lacks = |shard: &&ShardPlacement| {
        let staying = shard.replicas.iter().filter(|one| !view.leaves(one)).count();
        staying < catalog.spec.replicas as usize && may_copy(catalog, shard.shard, now_us)
    };
    let mut shards: Vec<&ShardPlacement> = catalog.placement.iter().filter(lacks).collect();
    shards.sort_by_key(|shard| failures(catalog, shard.shard).next().map(OperationReport::ended_at_us));
    shards.into_iter().find_map(|shard| {
        // The one that ships has most of its files in the bucket already.
        let shipper = shard.shipper().filter(|one| view.is_ready(one));
        let source = shipper.or_else(|| shard.primary_first().into_iter().find(|one| view.is_ready(one)))?;
        let node = (view.around.room)(catalog, shard.shard)?;
        let kind = PlanKind::Replica { shard: shard.shard };
        Some(begin(catalog, kind, shard.shard, &[source], node, now_us, nonce))
    })
}

/// The version that begins a plan with one target.
fn begin(
    catalog: &Catalog,
    kind: PlanKind,
    shard: ShardId,
    sources: &[Placed],
    node: NodeId,
    now_us: u64,
    nonce: u64,
) -> Catalog {
    let source = |one: &Placed| Source { shard, replica: one.replica, node: one.node, manifest: None };
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind,
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        // Nobody is there who could make a checkpoint for a take-over: it takes the last one.
        step: if matches!(kind, PlanKind::Takeover { .. }) { Step::Tail } else { Step::Prepare },
        sources: sources.iter().map(source).collect(),
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

/// Notes that a node is to have no replicas any more; `None` when it has none, and when nothing of it is
/// waited for that is to be given up.
pub fn empty_node(catalog: &Catalog, leaving: Leaving, now_us: u64, nonce: u64) -> Option<Catalog> {
    let node = leaving.node;
    if !concerns(catalog, &leaving) || catalog.state == KeyspaceState::Deleted {
        return None;
    }
    let mut next = catalog.next(now_us, nonce);
    next.leaving.retain(|leaving| leaving.node != node);
    next.leaving.push(leaving);
    Some(next)
}

/// Has the keyspace anything on the node that leaves, or anything left of it that is to be given up?
pub fn concerns(catalog: &Catalog, leaving: &Leaving) -> bool {
    let placed = catalog.placement.iter().any(|shard| shard.replicas.iter().any(|one| one.node == leaving.node));
    placed || (leaving.accept_loss && catalog.unsealed.iter().any(|one| one.node == leaving.node))
}

/// True when a shard has too few replicas, or one waits to be drained.
pub fn is_incomplete(catalog: &Catalog) -> bool {
    catalog.state == KeyspaceState::Active
        && (!catalog.unsealed.is_empty()
            || !catalog.leaving.is_empty()
            || catalog.placement.iter().any(|shard| shard.replicas.len() < catalog.spec.replicas as usize))
}

#[cfg(test)]
#[path = "members_tests.rs"]
mod tests;
