//! How long a seal may take: the write of its version, and the answers to it.
//!
//! **Invariant:** nodes are told to seal only by a version whose write took no longer than writers
//! may wait for the next one, since the bucket is as slow for the commit. A bucket that is always
//! slow is waited for longer with each seal that was undone for it, within a bound.

use std::time::Duration;

use super::progress::Running;
use crate::limits::{SEAL_TIMEOUT, SEALING_WRITE_MAX, SEALING_WRITE_MAX_LAST};

/// Undone seals after which the bucket may take as much longer as at the first seal.
const UNDONE_STEP: u32 = 4;

/// Returns the longest time that the write of a `sealing` version may have taken for the nodes to be
/// told to seal, after so many undone seals.
pub fn sealing_write_max(seals_undone: u32) -> Duration {
    SEALING_WRITE_MAX.saturating_mul(1 + seals_undone / UNDONE_STEP).min(SEALING_WRITE_MAX_LAST)
}

/// Returns true when the nodes were told to seal longer ago than a seal may take.
pub(super) fn is_overdue(running: Running<'_>) -> bool {
    running.now_us.saturating_sub(running.shown_us) > SEAL_TIMEOUT.as_micros() as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::plan::SEALS_UNDONE_MAX;
    use crate::limits::SEALED_WRITES_WAIT;

    #[test]
    fn a_bucket_of_two_seconds_a_write_seals_before_the_plan_is_given_up() {
        assert_eq!(sealing_write_max(0), SEALING_WRITE_MAX);
        assert_eq!(sealing_write_max(SEALS_UNDONE_MAX - 1), SEALING_WRITE_MAX_LAST);
    }

    #[test]
    fn a_bucket_of_300_ms_a_request_seals_at_once() {
        // The write may fail once, and is looked at then.
        assert!(Duration::from_millis(3 * 300) < sealing_write_max(0));
    }

    proptest! {
        #[test]
        fn the_bound_never_falls_and_stays_below_the_patience_of_waiting_writes(undone: u32) {
            prop_assert!(sealing_write_max(undone) <= sealing_write_max(undone.saturating_add(1)));
            prop_assert!(sealing_write_max(undone) < SEALED_WRITES_WAIT);
        }
    }
}
