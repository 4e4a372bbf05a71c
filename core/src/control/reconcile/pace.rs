//! Requests to pause, resume or slow down a running plan; each is a version of the catalog.
//!
//! A paused plan does no bulk work and goes no further than `tail`; the targets that have loaded
//! follow the logs of their sources. It is cancelled like any other, and it still ends when a
//! member fails, but no time-out of it runs out.
//!
//! **Invariant:** nothing is written while a plan is sealed or after it has committed: a version
//! in between would void the seals, and the rest takes moments.

use super::refusal::PaceError;
use crate::catalog::Catalog;
use crate::control::operation::operation_id;
use crate::control::plan::{Plan, Step};
use crate::ids::PlanId;
use crate::limits::BULK_RATE_MIN;

/// A request about the pace of a running plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Stop bulk work, and neither seal nor commit.
    Pause,
    /// Go on.
    Resume,
    /// Bound the bulk bytes of all nodes together, bytes a second; `None` lifts the bound.
    Rate(Option<u64>),
}

impl Pace {
    /// Returns true when the plan has this pace already.
    pub fn is_of(self, plan: &Plan) -> bool {
        match self {
            Pace::Pause => plan.paused,
            Pace::Resume => !plan.paused,
            Pace::Rate(rate) => plan.max_rate == rate,
        }
    }
}

/// Checks a bound of the rate of a plan, bytes a second.
///
/// # Errors
/// `TooSlow` for a rate at which nothing ends.
pub fn check_rate(rate: Option<u64>) -> Result<Option<u64>, PaceError> {
    match rate {
        Some(rate) if rate < BULK_RATE_MIN => Err(PaceError::TooSlow(rate)),
        rate => Ok(rate),
    }
}

/// Returns the version that changes the pace of a running plan.
///
/// # Errors
/// `Ended` when another plan or none runs; `Sealed` and `Committed` from the seal on; `TooSlow`.
pub fn set_pace(
    catalog: &Catalog,
    plan: PlanId,
    pace: Pace,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PaceError> {
    let id = || operation_id(catalog.keyspace, plan);
    let running = catalog.plan.as_ref().filter(|running| running.id == plan);
    let mut changed = running.ok_or_else(|| PaceError::Ended(id()))?.clone();
    match changed.step {
        Step::Prepare | Step::Tail => {}
        Step::Sealing => return Err(PaceError::Sealed(id())),
        Step::Committed => return Err(PaceError::Committed(id())),
    }
    match pace {
        Pace::Pause => changed.paused = true,
        Pace::Resume => changed.paused = false,
        Pace::Rate(rate) => changed.max_rate = check_rate(rate)?,
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(changed);
    Ok(next)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::catalog::KeyspaceSpec;
    use crate::control::reconcile::start_resize;
    use crate::ids::{KeyspaceId, NodeId};

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
