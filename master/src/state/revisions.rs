//! The order in which keyspaces have changed, so that a session looks only at what is new to it.
//!
//! **Invariant:** a keyspace has one revision, that of its last change, and revisions only rise:
//! whoever has seen everything up to one misses nothing by looking at the later ones alone.

use std::collections::BTreeMap;

use vasto_core::ids::KeyspaceId;

/// The last change of each keyspace.
#[derive(Debug, Default)]
pub(super) struct Revisions {
    last: u64,
    of: BTreeMap<KeyspaceId, u64>,
    order: BTreeMap<u64, KeyspaceId>,
}

impl Revisions {
    /// Records a change of a keyspace.
    pub(super) fn touch(&mut self, keyspace: KeyspaceId) {
        self.forget(keyspace);
        self.last += 1;
        self.of.insert(keyspace, self.last);
        self.order.insert(self.last, keyspace);
    }

    /// Forgets a keyspace that is not known any more.
    pub(super) fn forget(&mut self, keyspace: KeyspaceId) {
        if let Some(before) = self.of.remove(&keyspace) {
            self.order.remove(&before);
        }
    }

    /// Returns the revision of the last change of all.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Returns the keyspaces that have changed after this revision, in that order.
    pub(super) fn after(&self, revision: u64) -> impl Iterator<Item = KeyspaceId> {
        self.order.range(revision.saturating_add(1)..).map(|(_, keyspace)| *keyspace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyspace_that_changes_often_is_one_entry() {
        let mut revisions = Revisions::default();
        let after = |revisions: &Revisions, revision: u64| -> Vec<u64> {
            revisions.after(revision).map(|keyspace| keyspace.0).collect()
        };
        for _ in 0..100 {
            revisions.touch(KeyspaceId(1));
            revisions.touch(KeyspaceId(2));
        }
        assert_eq!((revisions.last(), revisions.order.len()), (200, 2));
        assert_eq!(after(&revisions, 0), [1, 2]);
        revisions.touch(KeyspaceId(1));
        assert_eq!((after(&revisions, 0), after(&revisions, 200)), (vec![2, 1], vec![1]));
        assert!(after(&revisions, 201).is_empty() && after(&revisions, u64::MAX).is_empty());
        revisions.forget(KeyspaceId(1));
        revisions.forget(KeyspaceId(7));
        assert_eq!((after(&revisions, 0), revisions.of.len()), (vec![2], 1));
    }
}
