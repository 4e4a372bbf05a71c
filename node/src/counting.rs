//! Key counts of the replicas, and trials of what their rows take in tables: estimates that are
//! refreshed in the background.
//!
//! **Invariant:** counting costs a bounded part of one core, however many replicas there are, and
//! nothing for replicas that do not change.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Sparse;
use crate::registry::NodeRegistry;
use crate::replica::Replica;

/// Interval between two turns.
const TURN: Duration = Duration::from_secs(1);
/// While the node is idle one turn in this many is taken.
const TURNS_WHILE_IDLE: u32 = 4;
/// Upper bound of the counting time in a turn, approximately.
const TURN_SHARE: Duration = Duration::from_millis(50);
/// Interval between two counts of a replica that changes all the time.
const AGE_MIN: Duration = Duration::from_secs(5);

/// Runs until `cancel` fires.
pub(crate) async fn run(registry: Arc<NodeRegistry>, cancel: CancellationToken) {
    let mut sparse = Sparse::one_in(TURNS_WHILE_IDLE);
    let mut first = 0usize;
    while cancel.run_until_cancelled(tokio::time::sleep(TURN)).await.is_some() {
        if sparse.skips(registry.is_at_rest()) {
            continue;
        }
        let began = Instant::now();
        let mut stale: Vec<_> = registry
            .replicas()
            .into_iter()
            .filter(|replica| replica.key_count_is_stale(AGE_MIN))
            .collect();
        stale.sort_by_key(|replica| std::cmp::Reverse(replica.key_count_age()));
        for replica in stale {
            // A replica that has just closed cannot be counted, and is skipped from then on.
            let _ = tokio::task::spawn_blocking(move || replica.count_keys()).await;
            if began.elapsed() > TURN_SHARE || cancel.is_cancelled() {
                break;
            }
        }
        let outgrown = |replica: &Replica| replica.may_have_outgrown_its_trial();
        let mut changed: Vec<_> = registry.replicas().into_iter().filter(outgrown).collect();
        // Every one has its turn, however many change all the time.
        let count = changed.len().max(1);
        changed.rotate_left(first % count);
        for replica in changed {
            let _ = tokio::task::spawn_blocking(move || replica.try_tables()).await;
            first = first.wrapping_add(1);
            if began.elapsed() > 2 * TURN_SHARE || cancel.is_cancelled() {
                break;
            }
        }
    }
}
