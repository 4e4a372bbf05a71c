//! A seal that nobody decides: what a node does about it without a master.
//!
//! **Invariants**
//! - A node undoes a seal only under the version that sealed a replica of its own, only when that
//!   version is the last one in the bucket, and by the very rule by which a master undoes it. The
//!   create-only name of the next version decides between all who write it.
//! - Whoever is alone for longer does not do more: a node reads first, however long it stood still.

use std::time::Duration;

use super::resize::undo_seal;
use crate::catalog::{Catalog, KeyspaceState};
use crate::control::plan::Step;
use crate::ids::{CatalogVersion, NodeId, PlanId};
use crate::limits::SEAL_UNDECIDED;

/// What a node knows of the version that it has applied last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undecided {
    /// Time since the node learned of the version, by a clock that is never set.
    pub known: Duration,
    /// Time since the node had a session with a master; `None` while it has one.
    pub alone: Option<Duration>,
    /// A replica of the node is sealed under the version.
    pub sealed: bool,
}

/// What the node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing before so much time has passed.
    After(Duration),
    /// It looks for a later version in the bucket, and applies that.
    Read,
    /// The same; when there is none, it writes the version that undoes the seal.
    Undo,
}

/// Returns what a node does under this version; `None` when it waits for nothing that a later
/// version would tell: it has no part in a resize, or the resize is not in a step that keeps
/// anybody waiting.
///
/// In `sealing` all who take part look: the sources wait for the decision, and so do the targets,
/// whose clients are sent to them by the sources. A target that still believes in `tail` looks when
/// it has lost the master: the plan may have sealed and committed without its knowledge.
pub fn look(catalog: &Catalog, node: NodeId, undecided: Undecided) -> Option<Look> {
    let plan = catalog.plan.as_ref().filter(|_| catalog.state == KeyspaceState::Active)?;
    plan.resize()?;
    let waited = match plan.step {
        Step::Sealing if !catalog.members_on(node).is_empty() => undecided.known,
        Step::Tail if plan.targets.iter().any(|target| target.node == node) => {
            undecided.alone.unwrap_or_default()
        }
        _ => return None,
    };
    Some(match SEAL_UNDECIDED.checked_sub(waited) {
        Some(left) if !left.is_zero() => Look::After(left),
        _ if plan.step == Step::Sealing && undecided.sealed => Look::Undo,
        _ => Look::Read,
    })
}

/// Returns true when a node that has applied `known` applies the last version in the bucket without
/// being told. One that still believes in `tail` does not begin to seal by itself: those who have
/// sealed wait for the decision, and undo the seal when there is none.
pub fn is_decided(known: &Catalog, last: &Catalog) -> bool {
    let step = |catalog: &Catalog| catalog.plan.as_ref().map(|plan| plan.step);
    last.version > known.version
        && (step(known), step(last)) != (Some(Step::Tail), Some(Step::Sealing))
}

/// Returns the version that undoes the seal of a plan that `sealing` wrote; `None` when `last`, the
/// last version in the bucket, is another one: that one is applied instead.
///
/// Its time is that of the seal and what has passed since a node has known it. The clock of the
/// node may be wrong, and a restore finds versions by their times.
pub fn undo_undecided(
    last: &Catalog,
    sealing: (PlanId, CatalogVersion),
    known: Duration,
    nonce: u64,
) -> Option<Catalog> {
    let plan = last.plan.as_ref().filter(|plan| plan.step == Step::Sealing)?;
    if (plan.id, last.version) != sealing {
        return None;
    }
    let known_us = u64::try_from(known.as_micros()).unwrap_or(u64::MAX);
    Some(undo_seal(last, plan, last.written_at_us.saturating_add(known_us), nonce))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::control::plan::PlanKind;
    use crate::control::reconcile::{Advance, advance, start_resize};
    use crate::control::report::Reports;
    use crate::ids::{KeyspaceId, ShardId};
    use crate::limits::SEAL_TIMEOUT;
    use proptest::prelude::*;

    const NODE: fn(u64) -> NodeId = NodeId;

    /// Returns a keyspace on the nodes 1 and 2 that changes to `to` shards, new ones on node 3.
    fn resizing(to: u32, step: Step) -> Catalog {
        let spec = KeyspaceSpec { shards: 2, ..KeyspaceSpec::default() };
        let nodes = [vec![NODE(1)], vec![NODE(2)]];
        let catalog = Catalog::first(KeyspaceId(7), "ks1", spec, &nodes, 1_000_000, 1);
        let targets: Vec<Vec<NodeId>> = (2..to).map(|_| vec![NODE(3)]).collect();
        let mut next = start_resize(&catalog, to, &targets, 2_000_000, 2).unwrap();
        next.plan.as_mut().unwrap().step = step;
        next
    }

    fn after(known: Duration, sealed: bool) -> Undecided {
        Undecided { known, alone: None, sealed }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn who_takes_part_in_a_seal_looks_and_only_who_is_sealed_undoes_it() {
        for to in [1, 3, 5] {
            let catalog = resizing(to, Step::Sealing);
            for node in [1, 2] {
                assert_eq!(look(&catalog, NODE(node), after(LONG, true)), Some(Look::Undo));
                assert_eq!(look(&catalog, NODE(node), after(LONG, false)), Some(Look::Read));
            }
            let target = (to > 2).then_some(Look::Read);
            assert_eq!(look(&catalog, NODE(3), after(LONG, false)), target, "{to}");
            assert_eq!(look(&catalog, NODE(4), after(LONG, false)), None, "it has no part");
        }
    }

    #[test]
    fn nobody_looks_before_a_master_has_had_its_time() {
        let catalog = resizing(3, Step::Sealing);
        assert_eq!(
            look(&catalog, NODE(1), after(SEAL_TIMEOUT, true)),
            Some(Look::After(SEAL_UNDECIDED - SEAL_TIMEOUT))
        );
        let almost = SEAL_UNDECIDED - Duration::from_millis(1);
        assert_eq!(
            look(&catalog, NODE(1), after(almost, true)),
            Some(Look::After(Duration::from_millis(1)))
        );
        assert_eq!(look(&catalog, NODE(1), after(SEAL_UNDECIDED, true)), Some(Look::Undo));
        // A session says nothing: the master may stand still behind it.
        let alone = Undecided { alone: Some(LONG), ..after(almost, true) };
        assert_ne!(look(&catalog, NODE(1), alone), Some(Look::Undo));
    }

    #[test]
    fn a_target_that_has_lost_the_master_asks_whether_the_plan_went_on() {
        let tail = resizing(3, Step::Tail);
        let alone = |alone| Undecided { known: LONG, alone, sealed: false };
        let wait = Some(Look::After(SEAL_UNDECIDED));
        assert_eq!(look(&tail, NODE(3), alone(None)), wait, "the master tells it");
        assert_eq!(look(&tail, NODE(3), alone(Some(Duration::ZERO))), wait);
        assert_eq!(look(&tail, NODE(3), alone(Some(LONG))), Some(Look::Read));
        assert_eq!(look(&tail, NODE(1), alone(Some(LONG))), None, "it is not sealed");
    }

    #[test]
    fn no_other_step_and_no_other_plan_is_looked_after() {
        for step in [Step::Prepare, Step::Committed] {
            for node in [1, 2, 3] {
                assert_eq!(look(&resizing(3, step), NODE(node), after(LONG, true)), None);
            }
        }
        let mut copy = resizing(3, Step::Sealing);
        copy.plan.as_mut().unwrap().kind = PlanKind::AddReplica { shard: ShardId(0) };
        assert_eq!(look(&copy, NODE(1), after(LONG, true)), None);
        let mut deleted = resizing(3, Step::Sealing);
        deleted.state = KeyspaceState::Deleted;
        assert_eq!(look(&deleted, NODE(1), after(LONG, true)), None);
        let idle = Catalog { plan: None, ..resizing(3, Step::Sealing) };
        assert_eq!(look(&idle, NODE(1), after(LONG, true)), None);
    }

    #[test]
    fn a_node_undoes_a_seal_as_a_master_does_and_only_the_one_it_knows() {
        let sealing = resizing(3, Step::Sealing);
        let id = (sealing.plan.as_ref().unwrap().id, sealing.version);
        let known = Duration::from_secs(3);
        let undone = undo_undecided(&sealing, id, known, 9).unwrap();
        let at_us = sealing.written_at_us + 3_000_000;
        let of_master = advance(&sealing, &Reports::new(), |_| 0, |_| u64::MAX, at_us, 9);
        assert_eq!(of_master, Advance::Write(Box::new(undone.clone())));
        assert_eq!(undone.plan.as_ref().unwrap().step, Step::Tail);
        // The bucket has gone on: that version counts, whatever is in it.
        let again = Catalog { plan: sealing.plan.clone(), ..undone.next(5_000_000, 10) };
        for last in [&undone, &again] {
            assert_eq!(undo_undecided(last, id, known, 11), None);
        }
        let other = (PlanId(id.0.0 + 1), id.1);
        assert_eq!(undo_undecided(&sealing, other, known, 11), None);
        for step in [Step::Prepare, Step::Tail, Step::Committed] {
            assert_eq!(undo_undecided(&resizing(3, step), id, known, 11), None, "{step:?}");
        }
    }

    #[test]
    fn nothing_but_the_step_changes_and_the_time_does_not_go_back() {
        let sealing = resizing(1, Step::Sealing);
        let id = (sealing.plan.as_ref().unwrap().id, sealing.version);
        for known in [Duration::ZERO, LONG, Duration::MAX] {
            let undone = undo_undecided(&sealing, id, known, 9).unwrap();
            assert!(undone.written_at_us >= sealing.written_at_us);
            let mut back = Catalog {
                version: sealing.version,
                nonce: sealing.nonce,
                written_at_us: sealing.written_at_us,
                ..undone
            };
            let plan = back.plan.as_mut().unwrap();
            assert_eq!((plan.step, plan.seals_undone), (Step::Tail, 1));
            (plan.step, plan.seals_undone) = (Step::Sealing, 0);
            assert_eq!(back, sealing);
        }
    }

    #[test]
    fn a_seal_is_never_found_but_everything_else_is() {
        let next = |known: &Catalog, step: Option<Step>| {
            let mut next = known.next(3_000_000, 3);
            next.plan = next.plan.filter(|_| step.is_some());
            if let (Some(plan), Some(step)) = (&mut next.plan, step) {
                plan.step = step;
            }
            next
        };
        let (tail, sealing) = (resizing(3, Step::Tail), resizing(3, Step::Sealing));
        assert!(!is_decided(&tail, &next(&tail, Some(Step::Sealing))), "it would seal late");
        assert!(is_decided(&sealing, &next(&sealing, Some(Step::Sealing))), "it is sealed anyway");
        for known in [&tail, &sealing] {
            for step in [Some(Step::Tail), Some(Step::Committed), None] {
                assert!(is_decided(known, &next(known, step)), "{step:?}");
            }
            assert!(!is_decided(known, known));
        }
    }

    fn times() -> impl Strategy<Value = Duration> {
        (0..10_000u64).prop_map(Duration::from_millis)
    }

    proptest! {
        /// Time alone brings every node that waits to a look, and no node to more than it may do.
        #[test]
        fn every_wait_ends_in_a_look(
            (to, node) in (prop_oneof![Just(1u32), Just(3), Just(5)], 1..4u64),
            known in times(), alone in proptest::option::of(times()), sealed: bool,
        ) {
            for step in [Step::Prepare, Step::Tail, Step::Sealing, Step::Committed] {
                let catalog = resizing(to, step);
                let now = Undecided { known, alone, sealed };
                match look(&catalog, NODE(node), now) {
                    Some(Look::After(left)) => {
                        prop_assert!(!left.is_zero() && left <= SEAL_UNDECIDED);
                        let later = Undecided {
                            known: known + left,
                            alone: Some(alone.unwrap_or_default() + left),
                            sealed,
                        };
                        let then = look(&catalog, NODE(node), later);
                        prop_assert!(matches!(then, Some(Look::Read | Look::Undo)), "{then:?}");
                    }
                    Some(Look::Undo) => {
                        prop_assert!(sealed && step == Step::Sealing && known >= SEAL_UNDECIDED);
                    }
                    Some(Look::Read) => prop_assert!(!sealed || step == Step::Tail),
                    None => prop_assert!(
                        step != Step::Sealing || (node == 3 && to == 1),
                        "{step:?}"
                    ),
                }
            }
        }
    }
}
