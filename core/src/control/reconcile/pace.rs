//! Requests to pause, resume or slow down what runs; each is a version of the catalog.
//!
//! A paused plan does no bulk work and goes no further than `tail`; the targets that have loaded
//! follow the logs of their sources. It is cancelled like any other, and it still ends when a
//! member fails, but no time-out of it runs out.
//!
//! A drain of a node and a rebalance are wholes, whose parts are plans: the copies of the one, the
//! moves of the other. What is asked of a whole holds for its parts: a paused one begins none and
//! keeps those that run paused; the bound of its rate is divided among those that run. A repair is
//! no part of a whole.
//!
//! **Invariant:** nothing is written while a plan is sealed or after it has committed: a version
//! in between would void the seals, and the rest takes moments. The parts of a whole together have
//! no greater rate than the whole.

use super::refusal::PaceError;
use crate::catalog::{Catalog, NodeDrain};
use crate::control::operation::operation_id;
use crate::control::plan::{Plan, PlanKind, Step};
use crate::ids::{NodeId, PlanId};
use crate::limits::BULK_RATE_MIN;

/// A request about the pace of what runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Stop bulk work, and neither seal nor commit.
    Pause,
    /// Go on.
    Resume,
    /// Bound the bulk bytes of all nodes together, bytes a second; `None` lifts the bound.
    Rate(Option<u64>),
}

/// The pace of an operation as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WholePace {
    /// It stands still.
    pub paused: bool,
    /// Upper bound of the bulk bytes of all its parts together, bytes a second.
    pub max_rate: Option<u64>,
}

/// An operation whose parts are plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// The drain of this node that began then, microseconds since 1970.
    Drain(NodeId, u64),
    /// The rebalance that began then, microseconds since 1970.
    Rebalance(u64),
}

impl Pace {
    /// Returns true when the plan has this pace already.
    pub fn is_of(self, plan: &Plan) -> bool {
        self.is_so(WholePace { paused: plan.paused, max_rate: plan.max_rate })
    }

    /// Returns true when this is so already.
    pub fn is_so(self, now: WholePace) -> bool {
        match self {
            Pace::Pause => now.paused,
            Pace::Resume => !now.paused,
            Pace::Rate(rate) => now.max_rate == rate,
        }
    }

    /// Returns the pace that something has after this request.
    ///
    /// # Errors
    /// `TooSlow` for a rate at which nothing ends.
    pub fn applied_to(self, now: WholePace) -> Result<WholePace, PaceError> {
        Ok(match self {
            Pace::Pause => WholePace { paused: true, ..now },
            Pace::Resume => WholePace { paused: false, ..now },
            Pace::Rate(rate) => WholePace { max_rate: check_rate(rate)?, ..now },
        })
    }

    /// Changes a part as the whole is changed. The bound of its rate is its part of the new one, and
    /// set by [`follow_wholes`].
    fn apply_to_part(self, part: &mut Plan) {
        match self {
            Pace::Pause => part.paused = true,
            Pace::Resume => part.paused = false,
            Pace::Rate(None) => part.max_rate = None,
            Pace::Rate(Some(_)) => {}
        }
    }
}

impl From<&NodeDrain> for WholePace {
    fn from(drain: &NodeDrain) -> Self {
        Self { paused: drain.paused, max_rate: drain.max_rate }
    }
}

/// Checks a bound of a rate, bytes a second.
///
/// # Errors
/// `TooSlow` for a rate at which nothing ends.
pub fn check_rate(rate: Option<u64>) -> Result<Option<u64>, PaceError> {
    match rate {
        Some(rate) if rate < BULK_RATE_MIN => Err(PaceError::TooSlow(rate)),
        rate => Ok(rate),
    }
}

/// Returns the version that changes the pace of a running plan, or of that of a move.
///
/// # Errors
/// `Ended` when no such plan runs; `Sealed` and `Committed` from the seal on; `TooSlow`.
pub fn set_pace(
    catalog: &Catalog,
    plan: PlanId,
    pace: Pace,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PaceError> {
    let id = || operation_id(catalog.keyspace, plan);
    let mut next = catalog.next(now_us, nonce);
    let running = plans_mut(&mut next).find(|running| running.id == plan);
    let changed = running.ok_or_else(|| PaceError::Ended(id()))?;
    match changed.step {
        Step::Prepare | Step::Tail => {}
        Step::Sealing => return Err(PaceError::Sealed(id())),
        Step::Committed => return Err(PaceError::Committed(id())),
    }
    let now = WholePace { paused: changed.paused, max_rate: changed.max_rate };
    let WholePace { paused, max_rate } = pace.applied_to(now)?;
    (changed.paused, changed.max_rate) = (paused, max_rate);
    Ok(next)
}

/// Returns the version that changes the pace of the drain of a node in this keyspace.
///
/// # Errors
/// `Ended` when the operation drains no node here; `Sealed` while the keyspace is in the cutover of
/// another operation, which it names; `TooSlow`.
pub fn pace_drain(
    catalog: &Catalog,
    operation: &str,
    pace: Pace,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PaceError> {
    let mut next = catalog.next(now_us, nonce);
    let mut drains = next.draining_nodes.iter_mut();
    let drain = drains.find(|drain| drain.operation_id() == operation);
    let drain = drain.ok_or_else(|| PaceError::Ended(operation.to_owned()))?;
    if let Some(plan) = catalog.plan.as_ref().filter(|plan| plan.step == Step::Sealing) {
        return Err(PaceError::Sealed(operation_id(catalog.keyspace, plan.id)));
    }
    let WholePace { paused, max_rate } = pace.applied_to(WholePace::from(&*drain))?;
    (drain.paused, drain.max_rate) = (paused, max_rate);
    let whole = Whole::Drain(drain.node, drain.since_us);
    pace_copy(catalog, &mut next, whole, pace);
    Ok(next)
}

/// Gives the copy that was a part of the drain, or is one now, the pace of the drain that has it now:
/// of two that need it, the other one may.
fn pace_copy(before: &Catalog, next: &mut Catalog, drain: Whole, pace: Pace) {
    let Some((now, paused)) = drain_of_copy(next) else { return };
    let was = drain_of_copy(before).map(|(was, _)| was);
    let Some(copy) = next.plan.as_mut().filter(|_| now == drain || was == Some(drain)) else {
        return;
    };
    match pace {
        Pace::Pause => copy.paused |= paused,
        Pace::Resume => copy.paused = paused,
        Pace::Rate(_) => {}
    }
    // Its part of another rate is set by `follow_wholes`.
    if pace == Pace::Rate(None) || was != Some(now) {
        copy.max_rate = None;
    }
}

/// Returns the drain that the running copy is a part of, and whether it is paused.
fn drain_of_copy(catalog: &Catalog) -> Option<(Whole, bool)> {
    let copy = catalog.plan.as_ref().filter(|plan| moves_bytes(plan))?;
    let drain = drain_of_plan(catalog, copy)?;
    Some((Whole::Drain(drain.node, drain.since_us), drain.paused))
}

fn moves_bytes(plan: &Plan) -> bool {
    matches!(plan.step, Step::Prepare | Step::Tail)
}

/// Returns the version that changes the moves of a rebalance as the rebalance is changed; `None`
/// when none of them is to change.
pub fn pace_moves(
    catalog: &Catalog,
    rebalance_us: u64,
    pace: Pace,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let mut next = catalog.next(now_us, nonce);
    pace_parts(&mut next, Whole::Rebalance(rebalance_us), pace);
    (next.moves != catalog.moves).then_some(next)
}

fn pace_parts(next: &mut Catalog, whole: Whole, pace: Pace) {
    let parts = parts_of_wholes(next);
    let is_part = |id: PlanId| parts.contains(&(id, whole));
    plans_mut(next).filter(|plan| is_part(plan.id)).for_each(|plan| pace.apply_to_part(plan));
}

fn plans_mut(catalog: &mut Catalog) -> impl Iterator<Item = &mut Plan> {
    catalog.plan.iter_mut().chain(catalog.moves.iter_mut().map(|moving| &mut moving.plan))
}

/// Returns the drain that a running plan is a part of: it makes one more replica of a shard of which
/// one is on the node that is drained, or was taken from the node that is replaced. Of several drains
/// one that goes on has it, since it needs the replica as well; one that is paused has it when the
/// replica takes the place of all others.
///
/// A replica that the shard would lack without any drain is a repair and no part of one: a pause of a
/// drain holds no repair up.
pub fn drain_of_plan<'a>(catalog: &'a Catalog, plan: &Plan) -> Option<&'a NodeDrain> {
    let runs = catalog.plan.as_ref().is_some_and(|running| running.id == plan.id);
    let target = plan.targets.first().filter(|_| runs && plan.adds_member())?;
    let shard = catalog.shard(target.shard)?;
    let took = |drain: &NodeDrain| catalog.has_taken(drain, target.shard);
    let taken = catalog.draining_nodes.iter().filter(|drain| took(drain)).count();
    let replaces_all = matches!(plan.kind, PlanKind::RecoverReplica { .. });
    if !replaces_all && shard.replicas.len() + taken < catalog.spec.replicas as usize {
        return None;
    }
    let is_of = |drain: &&NodeDrain| {
        took(drain) || shard.replicas.iter().any(|member| member.node == drain.node)
    };
    let drains: Vec<&NodeDrain> = catalog.draining_nodes.iter().filter(is_of).collect();
    let has_it = drains.iter().find(|drain| drain.paused == replaces_all);
    has_it.or(drains.first()).copied()
}

/// Lifts what a whole has asked of its parts in the version before: another one takes its place.
pub(super) fn release_parts(before: &Catalog, whole: Whole, next: &mut Catalog) {
    let parts = parts_of_wholes(before);
    for plan in plans_mut(next).filter(|plan| parts.contains(&(plan.id, whole))) {
        (plan.paused, plan.max_rate) = (false, None);
    }
}

/// Returns the plans that move bytes and are parts of a whole, each with the whole.
pub fn parts_of_wholes(catalog: &Catalog) -> Vec<(PlanId, Whole)> {
    let copy = catalog.plan.iter().filter_map(|plan| Some((plan.id, drain_of_copy(catalog)?.0)));
    let moves = catalog.moves.iter().filter(|moving| moves_bytes(&moving.plan));
    copy.chain(moves.map(|moving| (moving.id(), Whole::Rebalance(moving.rebalance_us)))).collect()
}

/// Gives the parts of wholes in a version the pace of their wholes. `rebalance` returns that of a
/// rebalance, by its start; `running` the number of plans that share the rate of a whole. Returns
/// true when that changes anything.
pub fn follow_wholes(
    next: &mut Catalog,
    rebalance: impl Fn(u64) -> WholePace,
    running: impl Fn(Whole) -> usize,
) -> bool {
    let mut changed = false;
    for (id, whole) in parts_of_wholes(next) {
        let asked = match whole {
            Whole::Rebalance(since_us) => rebalance(since_us),
            Whole::Drain(node, since_us) => {
                let is_it = |drain: &&NodeDrain| (drain.node, drain.since_us) == (node, since_us);
                next.draining_nodes.iter().find(is_it).map(WholePace::from).unwrap_or_default()
            }
        };
        let Some(plan) = plans_mut(next).find(|plan| plan.id == id) else { continue };
        let now = (plan.paused, plan.max_rate);
        let max_rate = match asked.max_rate {
            Some(max_rate) => Some(part_of_rate(plan.max_rate, max_rate, running(whole))),
            // A bound of its own.
            None => plan.max_rate,
        };
        (plan.paused, plan.max_rate) = (plan.paused || asked.paused, max_rate);
        changed |= now != (plan.paused, plan.max_rate);
    }
    changed
}

/// Returns the part of a rate that a plan has, bytes a second, when so many share it. A part that it
/// has already stays while it is not too large, and at least half of an equal one: each change is a
/// version, and with hundreds of parts another one begins or ends all the time. One that is alone has
/// all of it.
fn part_of_rate(now: Option<u64>, max_rate: u64, running: usize) -> u64 {
    let running = running.max(1) as u64;
    let equal = (max_rate / running).max(1);
    let least = if running == 1 { equal } else { equal / 2 };
    match now {
        Some(now) if (least..=equal).contains(&now) => now,
        _ => (max_rate / running.next_power_of_two()).max(1),
    }
}

/// Checks that a part may be changed by itself; `id` and `whole_id` are the operations.
///
/// # Errors
/// `PartOfPaused` for the part of a paused whole that is to go on; `PartOfBounded` for another rate
/// of the part of a whole whose rate is bounded: the whole decides.
pub fn check_part(
    pace: Pace,
    id: String,
    whole_id: String,
    whole: WholePace,
) -> Result<(), PaceError> {
    match pace {
        Pace::Resume if whole.paused => Err(PaceError::PartOfPaused(id, whole_id)),
        Pace::Rate(_) if whole.max_rate.is_some() => Err(PaceError::PartOfBounded(id, whole_id)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::control::reconcile::start_resize;
    use crate::ids::KeyspaceId;

    fn growing(step: Step) -> Catalog {
        let spec = KeyspaceSpec::default();
        let first = Catalog::first(KeyspaceId(1), "ks", spec, &[vec![NodeId(1)]], 1, 1);
        let mut growing = start_resize(&first, 2, &[vec![NodeId(2)]], 2, 2).unwrap();
        growing.plan.as_mut().unwrap().step = step;
        growing
    }

    fn asked(catalog: &Catalog, pace: Pace) -> Result<Catalog, PaceError> {
        set_pace(catalog, PlanId(1), pace, 9, 9)
    }

    #[test]
    fn a_pace_is_a_version_that_changes_nothing_else() {
        for step in [Step::Prepare, Step::Tail] {
            let running = growing(step);
            let paused = asked(&running, Pace::Pause).unwrap();
            let slow = asked(&paused, Pace::Rate(Some(1 << 20))).unwrap();
            assert!(Pace::Pause.is_of(slow.plan.as_ref().unwrap()));
            assert!(Pace::Rate(Some(1 << 20)).is_of(slow.plan.as_ref().unwrap()));
            let resumed = asked(&slow, Pace::Resume).unwrap();
            assert!(Pace::Resume.is_of(resumed.plan.as_ref().unwrap()));
            let free = asked(&resumed, Pace::Rate(None)).unwrap();
            assert_eq!((&free.plan, free.epoch), (&running.plan, running.epoch));
            assert_eq!(free.version.0, running.version.0 + 4);
        }
    }

    #[test]
    fn a_pace_is_refused_for_what_does_not_run_or_is_in_its_cutover() {
        let id = || "op-1-1".to_owned();
        for pace in [Pace::Pause, Pace::Resume, Pace::Rate(None)] {
            assert_eq!(asked(&growing(Step::Sealing), pace), Err(PaceError::Sealed(id())));
            assert_eq!(asked(&growing(Step::Committed), pace), Err(PaceError::Committed(id())));
            let ended = Catalog { plan: None, ..growing(Step::Tail) };
            assert_eq!(asked(&ended, pace), Err(PaceError::Ended(id())));
            let other = set_pace(&growing(Step::Tail), PlanId(7), pace, 9, 9);
            assert_eq!(other, Err(PaceError::Ended("op-1-7".into())));
        }
        let slow = asked(&growing(Step::Tail), Pace::Rate(Some(BULK_RATE_MIN - 1)));
        assert_eq!(slow, Err(PaceError::TooSlow(BULK_RATE_MIN - 1)));
        assert!(asked(&growing(Step::Tail), Pace::Rate(Some(BULK_RATE_MIN))).is_ok());
    }
}
