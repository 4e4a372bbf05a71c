//! Looks after what can run short: refuses clients' writes before the disk is full, opens again what a shortage has
//! closed, and says what is wrong.
//!
//! **Invariant:** whatever keeps a replica here from serving is in the node's trouble, which its readiness shows,
//! for as long as it lasts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vasto_core::limits::WRITER_STALL;

use crate::clock::Sparse;
use crate::core::NodeCore;
use crate::host::Tenant;
use crate::manager::Manager;
use crate::replica::Replica;
use crate::replica::authority::now_ms;
use crate::shortage::DiskRoom;

/// Between two looks: a disk that fills with 100 MB/s loses a fraction of its reserve in between.
const LOOK: Duration = Duration::from_millis(250);
/// While all is well, so many looks at the disk come with one at the replicas.
const LOOKS_EACH: u32 = 4;

/// Runs until `cancel` fires.
pub async fn run(core: Arc<NodeCore>, manager: Arc<Manager>, dir: PathBuf, cancel: CancellationToken) {
    let (mut sparse, mut troubled) = (Sparse::one_in(LOOKS_EACH), true);
    loop {
        let place = dir.join("replicas");
        let room = tokio::task::spawn_blocking(move || DiskRoom::of(&place)).await.ok().flatten();
        let was_low = core.is_disk_low();
        look_at_disk(&core, room);
        if !sparse.leaves_out(!troubled && core.is_disk_low() == was_low) {
            for replica in core.replicas() {
                // Also one that nobody writes to.
                if let (None, Some(why)) = (replica.closed(), replica.engine().failure()) {
                    replica.close(format!("the database could not write to its disk: {why}"));
                }
            }
            let failures = manager.failures();
            let fails = |(tenant, reason): &(Tenant, String)| {
                format!("shard {} of keyspace {} does not serve: {reason}", tenant.shard, tenant.keyspace)
            };
            let told = trouble(core.is_disk_low(), failures.iter().map(fails).chain(waits_for_disk(&core, now_ms())));
            troubled = told.is_some();
            core.set_trouble(told);
            if cancel.run_until_cancelled(manager.reopen(failures)).await.is_none() {
                return;
            }
        }
        if cancel.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
            return;
        }
    }
}

/// The replicas here whose writer does not come back from its disk.
pub(crate) fn waits_for_disk(core: &NodeCore, now_ms: u64) -> impl Iterator<Item = String> {
    let stalled = move |replica: &Replica| replica.busy_ms(now_ms) >= WRITER_STALL.as_millis() as u64;
    core.replicas()
        .into_iter()
        .filter(stalled)
        .map(|replica| format!("shard {} of keyspace {} waits for its disk", replica.shard, replica.keyspace))
}

fn look_at_disk(core: &NodeCore, room: Option<DiskRoom>) {
    let Some(room) = room else { return };
    match core.is_disk_low() {
        false if room.is_low() => {
            tracing::warn!(free = room.free, total = room.total, "the disk is almost full: writes are refused");
            core.set_disk_low(true);
        }
        true if room.is_comfortable() => {
            tracing::info!(free = room.free, total = room.total, "there is room on the disk again: writes are taken");
            core.set_disk_low(false);
        }
        _ => {}
    }
}

fn trouble(disk_low: bool, failures: impl Iterator<Item = String>) -> Option<String> {
    let disk =
        disk_low.then(|| "the disk is almost full, writes are refused; free some space or add a node".to_owned());
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
        let core = NodeCore::new(NodeId(1), Arc::new(SystemClock::default()), 1);
        const MIB: u64 = 1 << 20;
        let look = |free: u64| {
            look_at_disk(&core, Some(DiskRoom { free: free * MIB, total: 256 * MIB }));
            core.is_disk_low()
        };
        assert_eq!(
            [look(100), look(17), look(15), look(17), look(19), look(21), look(17)],
            [false, false, true, true, true, false, false]
        );
        look_at_disk(&core, None);
        assert!(!core.is_disk_low());
    }

    #[test]
    fn trouble_is_told_and_ends() {
        let failures = |reasons: &[&str]| reasons.iter().map(|reason| (*reason).to_owned()).collect::<Vec<_>>();
        assert_eq!(trouble(false, failures(&[]).into_iter()), None);
        assert_eq!(trouble(false, failures(&["a"]).into_iter()).unwrap(), "a");
        let all = trouble(true, failures(&["a", "b"]).into_iter()).unwrap();
        assert!(all.contains("almost full") && all.ends_with("(and 2 more)"), "{all}");
    }
}
