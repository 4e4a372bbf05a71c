//! Monitors resources that can run short: refuses client writes before the disk is full, reopens
//! replicas that a shortage has closed, and publishes warnings.
//!
//! **Invariant:** whatever keeps a replica of this node from serving is in the node's warning,
//! which `/readyz` shows, for as long as it lasts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vasto_core::limits::WRITER_STALL;

use crate::clock::{Sparse, now_ms};
use crate::host::ReplicaSpec;
use crate::manager::Manager;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::shortage::DiskRoom;

/// Interval between two polls: a disk that fills at 100 MB/s loses a fraction of its reserve in
/// between.
const POLL: Duration = Duration::from_millis(250);
/// While there is no warning, the replicas are polled once in this many polls of the disk.
const POLLS_EACH: u32 = 4;

/// Runs until `cancel` fires.
pub(crate) async fn run(
    registry: Arc<NodeRegistry>,
    manager: Arc<Manager>,
    dir: PathBuf,
    cancel: CancellationToken,
) {
    let (mut sparse, mut troubled) = (Sparse::one_in(POLLS_EACH), true);
    loop {
        let place = dir.join("replicas");
        let room = tokio::task::spawn_blocking(move || DiskRoom::of(&place)).await.ok().flatten();
        let was_low = registry.is_disk_low();
        poll_disk(&registry, room);
        if !sparse.skips(!troubled && registry.is_disk_low() == was_low) {
            for replica in registry.replicas() {
                // Includes replicas without writes.
                if let (None, Some(why)) = (replica.closed(), replica.engine().failure()) {
                    replica.close(format!("the database could not write to its disk: {why}"));
                }
            }
            let failures = manager.failures();
            let fails = |(spec, reason): &(ReplicaSpec, String)| {
                format!(
                    "shard {} of keyspace {} does not serve: {reason}",
                    spec.shard, spec.keyspace
                )
            };
            let warning = trouble(
                registry.is_disk_low(),
                failures
                    .iter()
                    .map(fails)
                    .chain(waits_for_disk(&registry, now_ms()))
                    .chain(registry.undecided()),
            );
            troubled = warning.is_some();
            registry.set_trouble(warning);
            if cancel.run_until_cancelled(manager.reopen(failures)).await.is_none() {
                return;
            }
        }
        if cancel.run_until_cancelled(tokio::time::sleep(POLL)).await.is_none() {
            return;
        }
    }
}

/// Returns the replicas of this node whose writer is stalled at its disk.
pub(crate) fn waits_for_disk(registry: &NodeRegistry, now_ms: u64) -> impl Iterator<Item = String> {
    let stalled =
        move |replica: &Replica| replica.busy_ms(now_ms) >= WRITER_STALL.as_millis() as u64;
    registry.replicas().into_iter().filter(stalled).map(|replica| {
        format!("shard {} of keyspace {} waits for its disk", replica.shard, replica.keyspace)
    })
}

fn poll_disk(registry: &NodeRegistry, room: Option<DiskRoom>) {
    let Some(room) = room else { return };
    match registry.is_disk_low() {
        false if room.is_low() => {
            tracing::warn!(
                free = room.free,
                total = room.total,
                "the disk is almost full: writes are refused"
            );
            registry.set_disk_low(true);
        }
        true if room.is_comfortable() => {
            tracing::info!(
                free = room.free,
                total = room.total,
                "there is room on the disk again: writes are taken"
            );
            registry.set_disk_low(false);
        }
        _ => {}
    }
}

fn trouble(disk_low: bool, failures: impl Iterator<Item = String>) -> Option<String> {
    let disk = disk_low.then(|| {
        "the disk is almost full, writes are refused; free some space or add a node".to_owned()
    });
    let mut all = disk.into_iter().chain(failures);
    let first = all.next()?;
    Some(match all.count() {
        0 => first,
        more => format!("{first} (and {more} more)"),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::clock::SystemClock;
    use vasto_core::ids::NodeId;

    #[test]
    fn writes_are_refused_before_the_disk_is_full_and_taken_again_with_room_to_spare() {
        let registry = NodeRegistry::new(NodeId(1), Arc::new(SystemClock::default()), 1);
        const MIB: u64 = 1 << 20;
        let is_low_at = |free: u64| {
            poll_disk(&registry, Some(DiskRoom { free: free * MIB, total: 256 * MIB }));
            registry.is_disk_low()
        };
        assert_eq!(
            [100, 17, 15, 17, 19, 21, 17].map(is_low_at),
            [false, false, true, true, true, false, false]
        );
        poll_disk(&registry, None);
        assert!(!registry.is_disk_low());
    }

    #[test]
    fn the_warning_names_the_first_trouble_and_counts_the_others() {
        let failures = |reasons: &[&str]| {
            reasons.iter().map(|reason| (*reason).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(trouble(false, failures(&[]).into_iter()), None);
        assert_eq!(trouble(false, failures(&["a"]).into_iter()).unwrap(), "a");
        let all = trouble(true, failures(&["a", "b"]).into_iter()).unwrap();
        assert!(all.contains("almost full") && all.ends_with("(and 2 more)"), "{all}");
    }
}
