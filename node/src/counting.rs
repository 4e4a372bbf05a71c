//! How many keys each replica holds: an estimate that is kept fresh beside everything else.
//!
//! **Invariant:** looking costs a bounded part of one core, however many replicas there are, and nothing for
//! those in which nothing changes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Sparse;
use crate::core::NodeCore;

/// Between two turns.
const TURN: Duration = Duration::from_secs(1);
/// While nothing goes on one turn in so many is taken.
const TURNS_AT_REST: u32 = 4;
/// Looking takes at most about this much of a turn.
const TURN_SHARE: Duration = Duration::from_millis(50);
/// A replica that changes all the time is looked at this often.
const AGE_MIN: Duration = Duration::from_secs(5);

/// Runs until `cancel` fires.
pub async fn run(core: Arc<NodeCore>, cancel: CancellationToken) {
    let mut sparse = Sparse::one_in(TURNS_AT_REST);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(TURN) => {}
        }
        if sparse.leaves_out(core.is_at_rest()) {
            continue;
        }
        let began = Instant::now();
        let mut stale: Vec<_> =
            core.replicas().into_iter().filter(|replica| replica.key_count_is_stale(AGE_MIN)).collect();
        stale.sort_by_key(|replica| std::cmp::Reverse(replica.key_count_age()));
        for replica in stale {
            // A replica that has just closed cannot be counted, and is not asked again.
            let _ = tokio::task::spawn_blocking(move || replica.count_keys()).await;
            if began.elapsed() > TURN_SHARE || cancel.is_cancelled() {
                break;
            }
        }
    }
}
