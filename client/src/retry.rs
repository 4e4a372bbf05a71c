//! The decision after a failed attempt: whether to retry, when, and which error ends the operation.
//!
//! **Invariant:** [`decide`] is a pure function. Once a write may have been applied, giving up is
//! always [`ErrorKind::Unknown`], whatever the error of the last attempt.
//!
//! Puts and deletes are repeated after a lost reply (one may then take effect twice, the second
//! time with a later event time). Retries that load a server which answered, or may have, are paid
//! from a [`Budget`]; waiting for a node to come back is not, since connection attempts are shared.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vasto_core::error::{Effect, ErrorCode, Retry};

use crate::error::{ErrorKind, kind_of};
use crate::tuning::{BACKOFF_FIRST, BACKOFF_MAX, RETRY_BUDGET, RETRY_SHARE};

/// How one attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The topology knows no address for the shard, or the connection could not be made.
    Unreachable,
    /// The connection ended before the reply; `sent` when the request may have reached the node.
    Lost {
        /// The node may have received the request.
        sent: bool,
    },
    /// The deadline passed; `sent` as above.
    Expired {
        /// The node may have received the request.
        sent: bool,
    },
    /// The node answered with an error.
    Refused {
        /// The error code.
        code: ErrorCode,
        /// The pause that the node asked for, zero if none.
        retry_after: Duration,
    },
}

/// The known state of the operation after a failed attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Situation {
    /// The operation changes something.
    pub write: bool,
    /// An earlier attempt may have been applied.
    pub maybe_applied: bool,
    /// Failed attempts so far, this one included.
    pub attempts: u32,
    /// Requests of this operation that were lost after they had been sent, this one included.
    pub losses: u32,
    /// Time until the deadline.
    pub time_left: Duration,
    /// The topology is newer than the one that the attempt used.
    pub newer_topology: bool,
    /// Another replica can be asked that is not known to have a fault.
    pub elsewhere: bool,
}

/// The next action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Try again now, with the current topology.
    Now,
    /// Try again after the pause, or as soon as a newer topology arrives.
    After {
        /// The pause, before jitter.
        pause: Duration,
        /// The retry must be paid from the budget; an empty budget means giving up.
        paid: bool,
        /// A server named the pause: jitter may only lengthen it, and a new topology does not
        /// shorten it.
        at_least: bool,
    },
    /// Give up.
    Fail(ErrorKind),
}

/// Returns true when the failed attempt may have been applied.
pub(crate) fn maybe_applied(failure: Failure) -> bool {
    match failure {
        Failure::Unreachable => false,
        Failure::Lost { sent } | Failure::Expired { sent } => sent,
        Failure::Refused { code, .. } => code.effect() == Effect::Unknown,
    }
}

/// Returns the kind of error if this failure ends the operation.
fn kind_of_failure(failure: Failure) -> ErrorKind {
    match failure {
        Failure::Unreachable | Failure::Lost { .. } => ErrorKind::Unavailable,
        Failure::Expired { .. } => ErrorKind::DeadlineExceeded,
        Failure::Refused { code, .. } => kind_of(code),
    }
}

/// Returns the kind of error if the operation ends with this failure.
pub(crate) fn give_up(failure: Failure, now: Situation) -> ErrorKind {
    if now.write && (now.maybe_applied || maybe_applied(failure)) {
        ErrorKind::Unknown
    } else {
        kind_of_failure(failure)
    }
}

/// How often an operation goes to another replica without a pause.
const HOPS_MAX: u32 = 8;

/// Returns the action after a failed attempt.
pub(crate) fn decide(failure: Failure, now: Situation) -> Action {
    let give_up = Action::Fail(give_up(failure, now));
    if now.time_left.is_zero() {
        return give_up;
    }
    let pause = backoff(now.attempts);
    // The first loss of an operation is a node that went away: the next replica is asked at once.
    let moves_on = match failure {
        Failure::Unreachable => true,
        Failure::Lost { sent } => !sent || now.losses <= 1,
        // An operation that any replica can execute goes to the next one while this one is out of
        // service.
        Failure::Refused { code, .. } => {
            code.retry() == Retry::Elsewhere
                || matches!(code, ErrorCode::NotPrimary | ErrorCode::NoSpace)
        }
        Failure::Expired { .. } => false,
    };
    if moves_on && now.elsewhere && now.attempts <= HOPS_MAX {
        return Action::Now;
    }
    match failure {
        Failure::Expired { .. } => give_up,
        Failure::Unreachable | Failure::Lost { sent: false } => {
            Action::After { pause, paid: false, at_least: false }
        }
        // The first loss is a node that went away; later losses may be caused by this very request.
        Failure::Lost { sent: true } => {
            Action::After { pause, paid: now.losses > 1, at_least: false }
        }
        Failure::Refused { code, retry_after } => match code.retry() {
            Retry::Never => give_up,
            Retry::WithNewTopology if now.newer_topology => Action::Now,
            Retry::WithNewTopology | Retry::Elsewhere => {
                Action::After { pause, paid: false, at_least: false }
            }
            Retry::Later if retry_after >= now.time_left => give_up,
            Retry::Later => Action::After {
                pause: pause.max(retry_after),
                paid: code == ErrorCode::Overloaded,
                at_least: retry_after >= pause,
            },
        },
    }
}

/// Whether a read of many keys may succeed with fewer of them in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fewer {
    /// The number of keys is not the cause.
    No,
    /// The number may be the cause: retry with fewer keys after the usual pause.
    AfterPause,
    /// The number is the cause: each key by itself is within the limits.
    Now,
}

/// Returns whether half as many keys may succeed: nodes refuse a read whose values do not fit into
/// one reply, which the client cannot know before.
pub(crate) fn fewer_may_do(failure: Failure, write: bool, keys: usize) -> Fewer {
    match failure {
        _ if write || keys < 2 => Fewer::No,
        Failure::Refused { code: ErrorCode::InvalidArgument, .. } => Fewer::Now,
        Failure::Refused { code: ErrorCode::Overloaded, .. } | Failure::Lost { sent: true } => {
            Fewer::AfterPause
        }
        Failure::Refused { .. }
        | Failure::Lost { .. }
        | Failure::Expired { .. }
        | Failure::Unreachable => Fewer::No,
    }
}

/// Returns the pause after so many failed attempts, before jitter: doubled each time, bounded.
pub(crate) fn backoff(attempts: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(BACKOFF_MAX)
}

/// Spreads callers that failed together: over the second half of the pause, or over an additional
/// half pause when the pause is the minimum that a server named. `random` is in `0.0..1.0`.
pub(crate) fn with_jitter(pause: Duration, at_least: bool, random: f64) -> Duration {
    let low = if at_least { 1.0 } else { 0.5 };
    pause.mul_f64(low + random.clamp(0.0, 1.0) / 2.0)
}

/// Returns the server's deadline: slightly less than the client's, so that a definite answer still
/// arrives. Milliseconds, at least 1.
pub(crate) fn server_deadline_ms(time_left: Duration) -> u32 {
    let margin = (time_left / 10).min(Duration::from_millis(100));
    u32::try_from((time_left - margin).as_millis()).unwrap_or(u32::MAX).max(1)
}

/// A retry budget, refilled by a share of the successes.
#[derive(Debug)]
pub(crate) struct Budget {
    /// In shares of a retry: one success adds 1, one retry takes [`RETRY_SHARE`].
    shares: AtomicU32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { shares: AtomicU32::new(RETRY_BUDGET * RETRY_SHARE) }
    }
}

impl Budget {
    /// Adds the share of a successful operation.
    pub(crate) fn succeeded(&self) {
        // The plain load keeps the common case (a full budget) free of contended writes.
        if self.shares.load(Ordering::Relaxed) < RETRY_BUDGET * RETRY_SHARE {
            self.shares.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes one retry; returns false when none is left.
    pub(crate) fn take(&self) -> bool {
        self.shares
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |shares| {
                shares.checked_sub(RETRY_SHARE)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRESH: Situation = Situation {
        write: true,
        maybe_applied: false,
        attempts: 1,
        losses: 0,
        time_left: Duration::from_secs(5),
        newer_topology: false,
        elsewhere: false,
    };

    fn refused(code: ErrorCode) -> Failure {
        Failure::Refused { code, retry_after: Duration::ZERO }
    }

    fn failures() -> Vec<Failure> {
        let mut all = vec![Failure::Unreachable];
        for sent in [false, true] {
            all.extend([Failure::Lost { sent }, Failure::Expired { sent }]);
        }
        all.extend(ErrorCode::ALL.map(refused));
        all
    }

    #[test]
    fn the_table() {
        for failure in failures() {
            let action = decide(failure, FRESH);
            let want_retry = matches!(
                failure,
                Failure::Unreachable
                    | Failure::Lost { .. }
                    | Failure::Refused {
                        code: ErrorCode::WrongEpoch
                            | ErrorCode::NodeBehind
                            | ErrorCode::Overloaded
                            | ErrorCode::Unavailable
                            | ErrorCode::NotPrimary
                            | ErrorCode::CatchingUp,
                        ..
                    }
            );
            assert_eq!(!matches!(action, Action::Fail(_)), want_retry, "{failure:?} -> {action:?}");
        }
        assert_eq!(
            decide(refused(ErrorCode::WrongEpoch), Situation { newer_topology: true, ..FRESH }),
            Action::Now
        );
        assert_eq!(
            decide(refused(ErrorCode::InvalidArgument), FRESH),
            Action::Fail(ErrorKind::InvalidArgument)
        );
        assert_eq!(decide(refused(ErrorCode::Unknown), FRESH), Action::Fail(ErrorKind::Unknown));
        assert_eq!(
            decide(Failure::Expired { sent: true }, FRESH),
            Action::Fail(ErrorKind::Unknown)
        );
        assert_eq!(
            decide(Failure::Expired { sent: false }, FRESH),
            Action::Fail(ErrorKind::DeadlineExceeded)
        );
    }

    #[test]
    fn another_replica_takes_over_at_once() {
        let now = Situation { losses: 1, elsewhere: true, ..FRESH };
        for failure in [
            Failure::Unreachable,
            Failure::Lost { sent: true },
            refused(ErrorCode::CatchingUp),
            refused(ErrorCode::NotPrimary),
        ] {
            assert_eq!(decide(failure, now), Action::Now, "{failure:?}");
        }
        assert!(matches!(
            decide(Failure::Lost { sent: true }, Situation { losses: 2, ..now }),
            Action::After { .. }
        ));
        assert!(matches!(
            decide(Failure::Unreachable, Situation { attempts: 9, ..now }),
            Action::After { .. }
        ));
        assert!(matches!(decide(refused(ErrorCode::Overloaded), now), Action::After { .. }));
    }

    #[test]
    fn the_server_names_the_least_pause() {
        let overloaded = Failure::Refused {
            code: ErrorCode::Overloaded,
            retry_after: Duration::from_millis(300),
        };
        let want = Action::After { pause: Duration::from_millis(300), paid: true, at_least: true };
        assert_eq!(decide(overloaded, FRESH), want);
        let too_late = Situation { time_left: Duration::from_millis(200), ..FRESH };
        assert_eq!(decide(overloaded, too_late), Action::Fail(ErrorKind::Overloaded));
    }

    #[test]
    fn a_write_that_may_have_been_applied_never_fails_plainly() {
        for failure in failures() {
            for time_left in [Duration::ZERO, Duration::from_secs(1)] {
                let now = Situation { maybe_applied: true, time_left, ..FRESH };
                if let Action::Fail(kind) = decide(failure, now) {
                    assert_eq!(kind, ErrorKind::Unknown, "{failure:?}");
                }
            }
        }
    }

    #[test]
    fn a_read_is_never_unknown_because_of_the_transport() {
        for failure in
            [Failure::Unreachable, Failure::Lost { sent: true }, Failure::Expired { sent: true }]
        {
            let now =
                Situation { write: false, maybe_applied: true, time_left: Duration::ZERO, ..FRESH };
            assert!(
                !matches!(decide(failure, now), Action::Fail(ErrorKind::Unknown)),
                "{failure:?}"
            );
        }
    }

    #[test]
    fn the_second_loss_is_paid() {
        let lost = Failure::Lost { sent: true };
        assert!(matches!(
            decide(lost, Situation { losses: 1, ..FRESH }),
            Action::After { paid: false, .. }
        ));
        assert!(matches!(
            decide(lost, Situation { losses: 2, ..FRESH }),
            Action::After { paid: true, .. }
        ));
    }

    #[test]
    fn only_reads_of_many_keys_are_halved() {
        let refusal = refused(ErrorCode::InvalidArgument);
        assert_eq!(fewer_may_do(refusal, false, 2), Fewer::Now);
        assert_eq!(fewer_may_do(refusal, false, 1), Fewer::No);
        assert_eq!(fewer_may_do(refusal, true, 2), Fewer::No);
        assert_eq!(fewer_may_do(refused(ErrorCode::Overloaded), false, 2), Fewer::AfterPause);
        assert_eq!(fewer_may_do(refused(ErrorCode::WrongEpoch), false, 2), Fewer::No);
    }

    #[test]
    fn the_budget_runs_out_and_is_refilled_by_successes() {
        let budget = Budget::default();
        for _ in 0..RETRY_BUDGET {
            assert!(budget.take());
        }
        assert!(!budget.take());
        for _ in 0..RETRY_SHARE {
            budget.succeeded();
        }
        assert!(budget.take());
        assert!(!budget.take());
    }

    proptest! {
        #[test]
        fn pauses_are_bounded_and_jitter_keeps_the_least_time(attempts: u32, random in 0.0f64..1.0) {
            let pause = backoff(attempts);
            prop_assert!(pause >= BACKOFF_FIRST && pause <= BACKOFF_MAX);
            let spread = with_jitter(pause, false, random);
            prop_assert!(spread <= pause && spread >= pause / 2);
            let spread = with_jitter(pause, true, random);
            prop_assert!(spread >= pause && spread <= pause * 3 / 2);
        }

        #[test]
        fn the_server_gets_less_time_than_the_client(ms in 1u64..100_000_000) {
            let left = Duration::from_millis(ms);
            prop_assert!(u64::from(server_deadline_ms(left)) <= ms.max(1));
        }
    }
}
