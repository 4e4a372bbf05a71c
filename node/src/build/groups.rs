//! Cuts what a build takes over into groups that fit into one record or one batch.
//!
//! **Invariant:** a group holds less than [`GROUP_BYTES_MAX`] and one item more; the order is kept
//! and nothing is left out.

use vasto_core::ids::Lsn;
use vasto_core::limits::GROUP_BYTES_MAX;
use vasto_core::record::{FeedProgress, KeyEntry};

use crate::replica::Replica;
use crate::replica::command::ReplicaError;

/// The group that is being filled.
pub(super) struct Groups<T> {
    items: Vec<T>,
    bytes: usize,
}

impl<T> Groups<T> {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), bytes: 0 }
    }

    /// Adds an item; returns the group when it is full.
    pub(super) fn push(&mut self, item: T, bytes: usize) -> Option<Vec<T>> {
        self.items.push(item);
        self.bytes += bytes;
        if self.bytes < GROUP_BYTES_MAX {
            return None;
        }
        self.bytes = 0;
        Some(std::mem::take(&mut self.items))
    }

    /// Returns the last group, which may be empty.
    pub(super) fn rest(self) -> Vec<T> {
        self.items
    }
}

/// Applies entries group by group. The progress is stored with the last group: groups that a crash
/// leaves without it are merged again, which changes nothing.
pub(super) async fn apply_in_groups(
    replica: &Replica,
    entries: Vec<KeyEntry>,
    progress: Vec<FeedProgress>,
) -> Result<(), ReplicaError> {
    let rest = apply_full_groups(replica, entries, true).await?;
    if !rest.is_empty() || !progress.is_empty() {
        replica.apply(rest, progress).await?;
    }
    Ok(())
}

/// Applies entries group by group, and the progress with the last group; returns the LSN that covers
/// all of it once it is visible. `sync` is asked when the last group is queued: true waits until
/// everything is durable. All of it is durable once the log has synced that LSN.
pub(super) async fn apply_visibly(
    replica: &Replica,
    entries: Vec<KeyEntry>,
    progress: Vec<FeedProgress>,
    sync: impl FnOnce() -> bool,
) -> Result<Lsn, ReplicaError> {
    let rest = apply_full_groups(replica, entries, false).await?;
    replica.apply_as(rest, progress, sync()).await
}

/// Applies all groups but the last, which is returned.
async fn apply_full_groups(
    replica: &Replica,
    entries: Vec<KeyEntry>,
    sync: bool,
) -> Result<Vec<KeyEntry>, ReplicaError> {
    let mut groups = Groups::new();
    for row in entries {
        let bytes = row.key.len() + row.entry.len();
        if let Some(group) = groups.push(row, bytes) {
            replica.apply_as(group, Vec::new(), sync).await?;
        }
    }
    Ok(groups.rest())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_and_hold_everything_in_order() {
        let mut groups = Groups::new();
        let mut all = Vec::new();
        for item in 0..10 {
            all.extend(groups.push(item, GROUP_BYTES_MAX / 4).into_iter().flatten());
            if item == 3 {
                assert_eq!(all, [0, 1, 2, 3], "four quarters are a group");
            }
        }
        assert_eq!(all.len(), 8);
        all.extend(groups.push(10, GROUP_BYTES_MAX * 2).into_iter().flatten());
        assert_eq!(all, (0..=10).collect::<Vec<_>>());
        assert!(groups.rest().is_empty());
    }
}
