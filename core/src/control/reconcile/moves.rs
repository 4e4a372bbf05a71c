//! Moves of replicas to other nodes: a plan adds the new replica, leadership is transferred when the
//! old one has it, and the old one leaves.
//!
//! **Invariants**
//! - Pure. A shard never has fewer replicas because one of them moves: the old one leaves its
//!   placement only while the new one serves, and while no other one of the shard is lost or away;
//!   nothing moves into a shard that the node has a replica of already.
//! - Moves of distinct shards do not touch each other. Where replicas lack or a node drains, moves
//!   that have not placed their new replica yet are given up: that comes first.

use super::advance::advance_plan;
use super::copy::give_up_on;
use super::outcome::{abort, report_of};
use super::progress::{Advance, Running, source_progress};
use super::repair::begin;
use super::view::{Around, View};
use crate::catalog::{Catalog, KeyspaceState, Placed, ReplicaMove, ShardPlacement};
use crate::control::operation::{OperationKind, OperationOutcome, OperationReport, operation_id};
use crate::control::plan::{NODE_AWAY_MAX_US, PlanKind, Source, Step};
use crate::control::report::{ReplicaPhase, Reports};
use crate::ids::{Epoch, NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::TARGET_SILENT_MAX;

/// Pause before a replica of a shard moves again after a move failed, microseconds; doubled by each
/// further failure in a row.
pub(super) const MOVE_AGAIN_US: u64 = 10_000_000;

/// Longest such pause, microseconds.
const MOVE_AGAIN_MAX_US: u64 = 600_000_000;

/// A move that is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveOrder {
    /// The shard.
    pub shard: ShardId,
    /// The replica that leaves.
    pub replica: ReplicaId,
    /// The node that it moves to.
    pub to: NodeId,
}

/// Reasons why moves do not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// The keyspace was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
    /// Something else runs on the keyspace that comes first.
    #[error("{0} comes first; the replicas move afterwards")]
    Busy(String),
    /// Nothing of what was asked for fits the placement any more.
    #[error("the placement has changed meanwhile, so that none of these replicas can move")]
    Outdated,
}

/// Returns what keeps replicas of a keyspace from moving; `None` when nothing does.
pub fn in_the_way_of_moves(catalog: &Catalog) -> Option<String> {
    if let Some(plan) = &catalog.plan {
        let id = operation_id(catalog.keyspace, plan.id);
        return Some(format!("operation {id} of keyspace {}", catalog.name));
    }
    if !catalog.draining_nodes.is_empty() {
        return Some(format!("the drain of a node of keyspace {}", catalog.name));
    }
    lacks_replicas(catalog).then(|| format!("the repair of keyspace {}", catalog.name))
}

/// Returns true when a shard has too few replicas.
fn lacks_replicas(catalog: &Catalog) -> bool {
    let wanted = catalog.spec.replicas as usize;
    catalog.placement.iter().any(|shard| shard.replicas.len() < wanted)
}

/// Returns the time, microseconds since 1970, before which no replica of a shard moves after a move
/// failed.
pub fn move_not_before(catalog: &Catalog, shard: ShardId) -> u64 {
    let of_shard = |report: &&OperationReport| report.is_move() && report.shard == Some(shard);
    let newest_first = catalog.operations.iter().rev().filter(of_shard);
    let failed: Vec<u64> = newest_first
        .take_while(|report| report.outcome == OperationOutcome::Aborted)
        .map(OperationReport::ended_at_us)
        .collect();
    let Some(last) = failed.first() else { return 0 };
    let doubled = 1u64.checked_shl(failed.len() as u32 - 1).unwrap_or(u64::MAX);
    last.saturating_add(MOVE_AGAIN_US.saturating_mul(doubled).min(MOVE_AGAIN_MAX_US))
}

/// Returns the version that begins moves, one of each shard at most; those that do not fit the
/// placement are passed over.
///
/// # Errors
/// [`MoveError`]: nothing begins.
pub fn start_moves(
    catalog: &Catalog,
    orders: &[MoveOrder],
    rebalance_us: u64,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, MoveError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(MoveError::Deleted);
    }
    if let Some(what) = in_the_way_of_moves(catalog) {
        return Err(MoveError::Busy(what));
    }
    let mut next = catalog.clone();
    for order in orders {
        let Some(source) = source_of(&next, order) else { continue };
        let kind = PlanKind::AddReplica { shard: order.shard };
        let mut begun = begin(&next, kind, order.shard, &[source], order.to, now_us, nonce);
        let Some(plan) = begun.plan.take() else { continue };
        begun.moves.push(ReplicaMove { plan, replaces: order.replica, rebalance_us });
        next = begun;
    }
    if next.moves.len() == catalog.moves.len() {
        return Err(MoveError::Outdated);
    }
    next.version = catalog.next(now_us, nonce).version;
    Ok(next)
}

/// Returns the replica whose checkpoint a move takes; `None` when the move does not fit the
/// placement. The shipper has most of its files in the bucket already.
fn source_of(catalog: &Catalog, order: &MoveOrder) -> Option<Placed> {
    let shard = catalog.shard(order.shard)?;
    let has = |node: NodeId| {
        let mut of_shard = catalog
            .members()
            .into_iter()
            .filter(|(of, member, _)| *of == order.shard && !catalog.is_retired(member.replica));
        of_shard.any(|(_, member, _)| member.node == node)
    };
    let is_placed = shard.replicas.iter().any(|member| member.replica == order.replica);
    let fits = is_placed
        && !catalog.is_moving(order.shard)
        && shard.transferring_to.is_none()
        && shard.replicas.len() == catalog.spec.replicas as usize
        && !has(order.to);
    shard.shipper().filter(|_| fits)
}

/// Returns the version that makes another replica of a shard the preferred primary; leadership is
/// then transferred to it as to any preferred primary that is back. `None` when the replica cannot
/// be that now.
///
/// The preferred primary ships: what it has not shipped goes up as a checkpoint. Moved bands of which
/// the old one's manifests are to cover the move would wait for ever, so none is preferred while a
/// quarantine runs.
pub fn prefer(
    catalog: &Catalog,
    replica: ReplicaId,
    rebalance_us: u64,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let is_calm = catalog.state == KeyspaceState::Active
        && in_the_way_of_moves(catalog).is_none()
        && catalog.quarantines.is_empty();
    let found = catalog.placement.iter().find(|shard| position(shard, replica).is_some())?;
    let may = is_calm
        && !catalog.is_moving(found.shard)
        && found.transferring_to.is_none()
        && found.primary.is_none();
    let mut next = catalog.next(now_us, nonce);
    let shard = next.placement.iter_mut().find(|shard| shard.shard == found.shard)?;
    let at = position(shard, replica).filter(|at| may && *at > 0)?;
    shard.primary = shard.shipper().map(|acting| acting.replica);
    shard.replicas.swap(0, at);
    next.rebalanced.get_or_insert_default().count_primary(rebalance_us);
    next.epoch = Epoch(catalog.epoch.0 + 1);
    Some(next)
}

/// Returns the place of a replica in its shard's order of preference.
fn position(shard: &ShardPlacement, replica: ReplicaId) -> Option<usize> {
    shard.replicas.iter().position(|member| member.replica == replica)
}

/// Decides the next catalog version of a keyspace of which replicas move.
///
/// `away_us` returns how long a node has been unreachable (0 for a live one), `here_us` how long a
/// live one has been there.
pub fn advance_moves(
    catalog: &Catalog,
    reports: &Reports,
    around: &Around<'_>,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    if catalog.state != KeyspaceState::Active || catalog.plan.is_some() {
        return Advance::Idle;
    }
    let view = View { catalog, reports, around };
    let first = in_the_way_of_moves(catalog);
    let mut waits = None;
    for moving in &catalog.moves {
        let decision = match (moving.plan.step, &first) {
            (Step::Committed, _) => replace(&view, moving, &away_us, now_us, nonce),
            (_, Some(what)) => undo(&view, moving, &format!("{what} comes first"), now_us, nonce),
            _ if has_lost_one(&view, moving) => {
                let reason = "a replica of the shard was lost; its repair comes first";
                undo(&view, moving, reason, now_us, nonce)
            }
            _ => add(catalog, moving, reports, (&away_us, &here_us), now_us, nonce),
        };
        match decision {
            Advance::Write(next) => return Advance::Write(next),
            Advance::Wait(what) => waits = waits.or(Some(what)),
            Advance::Idle => {}
        }
    }
    waits.map_or(Advance::Idle, Advance::Wait)
}

/// Gives up a move whose new replica is not placed.
fn undo(view: &View<'_>, moving: &ReplicaMove, reason: &str, now_us: u64, nonce: u64) -> Advance {
    let undone = cancel_move(view.catalog, moving.id(), reason, view.reports, now_us, nonce);
    undone.map_or(Advance::Idle, |next| Advance::Write(Box::new(next)))
}

/// Returns true when a replica of the shard is not expected to serve again: it is to be evicted and
/// replaced.
fn is_broken(view: &View<'_>, member: &Placed) -> bool {
    view.has_failed_for_good(member.replica)
        || view.is_given_up(member)
        || (view.around.lost)(member.node)
        || view.is_too_old(member.replica)
}

/// Returns true when a placed replica of the shard of a move is broken: members of the shard do not
/// change while it runs, and a copy may take hours.
fn has_lost_one(view: &View<'_>, moving: &ReplicaMove) -> bool {
    let shard = moving.shard().and_then(|shard| view.catalog.shard(shard));
    let mut members = shard.into_iter().flat_map(|shard| &shard.replicas);
    members.any(|member| is_broken(view, member))
}

/// Returns the catalog as the rules for a single plan see it: with the plan of this move only.
fn alone(catalog: &Catalog, moving: &ReplicaMove) -> Catalog {
    let mut alone = catalog.clone();
    alone.moves.retain(|other| other.id() != moving.id());
    alone.plan = Some(moving.plan.clone());
    alone
}

/// Puts the plan of a move back beside the others, or the move's end into its report.
fn beside(mut next: Catalog, moving: &ReplicaMove) -> Catalog {
    match next.plan.take() {
        Some(plan) => next.moves.push(ReplicaMove { plan, ..moving.clone() }),
        None => {
            if let Some(report) = next.operations.last_mut() {
                report.kind = OperationKind::Move;
            }
            count(&mut next, moving, false);
        }
    }
    next.moves.sort_by_key(ReplicaMove::id);
    pin(&mut next);
    next
}

/// Counts the move whose report the version ends with.
fn count(next: &mut Catalog, moving: &ReplicaMove, done: bool) {
    let Some(report) = next.operations.last().cloned() else { return };
    let totals = next.rebalanced.get_or_insert_default();
    totals.count(moving.rebalance_us, &report, done);
}

/// Pins the checkpoints that the running moves take, and no others.
fn pin(next: &mut Catalog) {
    let sources = next.moves.iter().flat_map(|moving| &moving.plan.sources);
    let pinned = sources.filter_map(|source| source.manifest.as_ref());
    next.pins = pinned.map(|manifest| manifest.key.clone()).collect();
}

/// Advances a move until its new replica is placed, as any plan that adds a replica.
fn add(
    catalog: &Catalog,
    moving: &ReplicaMove,
    reports: &Reports,
    (away_us, here_us): (&dyn Fn(NodeId) -> u64, &dyn Fn(NodeId) -> u64),
    now_us: u64,
    nonce: u64,
) -> Advance {
    let alone = alone(catalog, moving);
    // A move seals nothing, so nothing is counted from when the nodes were told.
    let shown_us = catalog.written_at_us;
    let running = Running { catalog: &alone, plan: &moving.plan, reports, shown_us, now_us, nonce };
    if let Some(node) = silent_source(&running, here_us) {
        let silent_s = TARGET_SILENT_MAX.as_secs();
        let reason = format!("{node} has not begun its checkpoint within {silent_s} s");
        if let Some(next) = give_up_on(&alone, &reason, node, reports, now_us, nonce) {
            return Advance::Write(Box::new(beside(next, moving)));
        }
    }
    match advance_plan(running, away_us, here_us) {
        Advance::Write(next) => Advance::Write(Box::new(beside(*next, moving))),
        other => other,
    }
}

/// Returns the node of a source that is there and does not begin its checkpoint. A node of an
/// earlier version passes moves over, so it is not waited for without limit; one that has only just
/// come back, or opens the replica, is.
fn silent_source(running: &Running<'_>, here_us: &dyn Fn(NodeId) -> u64) -> Option<NodeId> {
    let Running { plan, reports, now_us, .. } = *running;
    let is_silent = |source: &&Source| {
        let report = reports.get(&source.replica);
        let opens = report.is_some_and(|report| report.phase == ReplicaPhase::Opening);
        let silent_us = now_us.saturating_sub(plan.started_at_us).min(here_us(source.node));
        !opens
            && source_progress(plan, source.replica, reports).is_none()
            && silent_us > TARGET_SILENT_MAX.as_micros() as u64
    };
    // No time-out of a paused plan runs out.
    let mut sources = plan.sources.iter().filter(|_| plan.step == Step::Prepare && !plan.paused);
    sources.find(is_silent).map(|source| source.node)
}

/// What the other replicas of a shard decide of the old one, before it leaves.
enum Others {
    /// They are there.
    AreThere,
    /// One is away, and may come back.
    Away(Placed),
    /// One does not come back: the old one stays in its place.
    Lost,
}

/// Returns the state of the replicas of a shard other than the old and the new one. One of them may
/// have been evicted on request meanwhile.
fn others(view: &View<'_>, shard: &ShardPlacement, new: &Placed, old: &Placed) -> Others {
    let others = || shard.replicas.iter().filter(|member| *member != new && *member != old);
    let lacks = shard.replicas.len() <= view.catalog.spec.replicas as usize;
    if lacks || others().any(|member| is_broken(view, member)) {
        return Others::Lost;
    }
    let away = others().find(|member| !view.around.is_here(member.node));
    away.map_or(Others::AreThere, |member| Others::Away(*member))
}

/// Lets the old replica leave once the new one serves. A new replica that does not come back leaves
/// instead: it may have taken writes, and is drained should it return.
fn replace(
    view: &View<'_>,
    moving: &ReplicaMove,
    away_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    let catalog = view.catalog;
    let shard = moving.shard().and_then(|shard| catalog.shard(shard));
    let member = |replica: Option<ReplicaId>| {
        let replicas = shard.into_iter().flat_map(|shard| &shard.replicas);
        replicas.copied().find(|member| Some(member.replica) == replica)
    };
    let new = member(moving.plan.targets.first().map(|target| target.replica));
    let old = member(Some(moving.replaces));
    let next = || catalog.next(now_us, nonce);
    let end = |next: Catalog, why: Option<&str>| {
        Advance::Write(Box::new(ended(view, next, moving, why, now_us)))
    };
    let (shard, new, old) = match (shard, new, old) {
        (Some(shard), Some(new), Some(old)) => (shard, new, old),
        (Some(_), Some(_), None) => return end(next(), None),
        _ => return end(next(), Some("its new replica has left the shard")),
    };
    if shard.replicas.iter().all(|member| view.is_given_up(member)) {
        return end(next(), Some("all replicas of the shard are given up"));
    }
    let is_lost = away_us(new.node) > NODE_AWAY_MAX_US
        || view.has_failed_for_good(new.replica)
        || view.is_given_up(&new)
        || view.is_too_old(new.replica);
    let (leaves, why) = match is_lost {
        true => (new, Some("its new replica does not serve any more")),
        false if !view.serves(&new) => {
            let Placed { replica, node } = new;
            return Advance::Wait(format!("replica {replica} on {node} to serve"));
        }
        false => match others(view, shard, &new, &old) {
            Others::AreThere => (old, None),
            Others::Away(Placed { replica, node }) => {
                return Advance::Wait(format!("replica {replica} on {node} to come back"));
            }
            Others::Lost => {
                return end(next(), Some("another replica was lost; the old one stays"));
            }
        },
    };
    let stays = |other: &Placed| other.replica != leaves.replica && view.serves(other);
    match view.take_out(shard, &leaves, stays, now_us, nonce) {
        // Leadership is transferred first.
        Some(next) if next.is_placed(leaves.replica) => Advance::Write(Box::new(next)),
        Some(next) => end(next, why),
        None => {
            Advance::Wait(format!("shard {} of {} to be handed over", shard.shard, catalog.name))
        }
    }
}

/// Completes the version in which a move ends; `why` says why it failed, if it did.
fn ended(
    view: &View<'_>,
    mut next: Catalog,
    moving: &ReplicaMove,
    why: Option<&str>,
    now_us: u64,
) -> Catalog {
    let outcome = if why.is_none() { OperationOutcome::Done } else { OperationOutcome::Aborted };
    let why = why.map(str::to_owned);
    let report = report_of(view.catalog, &moving.plan, view.reports, outcome, why, now_us);
    next.moves.retain(|other| other.id() != moving.id());
    next.remember(OperationReport { kind: OperationKind::Move, ..report });
    count(&mut next, moving, outcome == OperationOutcome::Done);
    pin(&mut next);
    next
}

/// Returns the version that undoes the move with this plan; `None` when there is no such move, or
/// its new replica is placed already.
pub fn cancel_move(
    catalog: &Catalog,
    plan: PlanId,
    reason: &str,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let moving = catalog.moves.iter().find(|moving| moving.id() == plan)?;
    let undone = abort(&alone(catalog, moving), reason, reports, now_us, nonce)?;
    Some(beside(undone, moving))
}

/// Returns the version that undoes all moves of a rebalance whose new replicas are not placed yet;
/// `None` when there is none.
pub fn cancel_moves(
    catalog: &Catalog,
    reason: &str,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let mut next: Option<Catalog> = None;
    for moving in catalog.moves.iter().filter(|moving| moving.plan.step != Step::Committed) {
        let before = next.as_ref().unwrap_or(catalog);
        let mut undone = cancel_move(before, moving.id(), reason, reports, now_us, nonce)?;
        undone.version = catalog.next(now_us, nonce).version;
        next = Some(undone);
    }
    next
}

/// Gives up the moves to a node, as [`give_up_on`] does for a plan; `None` when there is none that
/// has not placed its new replica.
pub fn give_up_moves_to(
    catalog: &Catalog,
    reason: &str,
    node: NodeId,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let to_it =
        |moving: &&ReplicaMove| moving.to() == Some(node) && moving.plan.step != Step::Committed;
    let moving = catalog.moves.iter().find(to_it)?;
    let undone = give_up_on(&alone(catalog, moving), reason, node, reports, now_us, nonce)?;
    Some(beside(undone, moving))
}
