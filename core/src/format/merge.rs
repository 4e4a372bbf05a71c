//! The one merge rule, used on every path: local write, follower, replay, bootstrap, ingest,
//! restore.
//!
//! The greater `(event_time, kind, all remaining encoded bytes)` wins, which is the greater
//! encoding. Before comparing, a tombstone whose commit time is at or below the **gc floor** counts
//! as absent, wherever it comes from; an expired value is a tombstone with commit time
//! `max(commit_time, expires_at)`.
//!
//! **Invariant:** for one floor the rule is commutative, associative and idempotent, and it reads
//! no clock; so replicas that saw the same records in any order, any number of times, hold the
//! same bytes above the floor.

use crate::entry::Entry;

/// Returns true when collection at `floor` (a commit time, microseconds) treats this entry as
/// absent. An entry that does not decode is kept: collection never deletes what it does not
/// understand.
pub fn is_collected(encoded: &[u8], floor: u64) -> bool {
    floor > 0
        && Entry::decode(encoded).is_ok_and(|entry| {
            entry.collectable_at().is_some_and(|commit_time| commit_time <= floor)
        })
}

/// Returns the winner of two encodings of one key, or `None` when neither is present above the
/// floor.
pub fn merge<'a>(floor: u64, a: Option<&'a [u8]>, b: Option<&'a [u8]>) -> Option<&'a [u8]> {
    let a = a.filter(|entry| !is_collected(entry, floor));
    let b = b.filter(|entry| !is_collected(entry, floor));
    match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    }
}

/// Returns true when `incoming` must replace `stored`. An equal entry replaces nothing.
pub fn supersedes(floor: u64, stored: Option<&[u8]>, incoming: &[u8]) -> bool {
    let stored = stored.filter(|entry| !is_collected(entry, floor));
    !is_collected(incoming, floor) && stored.is_none_or(|stored| incoming > stored)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::entry::Payload;
    use crate::entry::tests::{Made, any_entry};
    use proptest::prelude::*;

    fn fold(floor: u64, entries: &[Vec<u8>]) -> Option<Vec<u8>> {
        entries.iter().fold(None, |held: Option<Vec<u8>>, next| {
            merge(floor, held.as_deref(), Some(next)).map(<[u8]>::to_vec)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]
        #[test]
        fn commutative_associative_idempotent(
            a in any_entry(1..6), b in any_entry(1..6), c in any_entry(1..6), floor in 0u64..6,
        ) {
            let (a, b, c) = (a.encode(), b.encode(), c.encode());
            let m = |x: Option<&[u8]>, y: Option<&[u8]>| merge(floor, x, y).map(<[u8]>::to_vec);
            prop_assert_eq!(m(Some(&a), Some(&b)), m(Some(&b), Some(&a)));
            prop_assert_eq!(m(Some(&a), Some(&a)), m(Some(&a), None));
            let left = m(m(Some(&a), Some(&b)).as_deref(), Some(&c));
            let right = m(Some(&a), m(Some(&b), Some(&c)).as_deref());
            prop_assert_eq!(left, right);
            prop_assert_eq!(supersedes(floor, Some(&a), &b), m(Some(&a), Some(&b)) != m(Some(&a), None));
        }

        // The floor rises only after every replica holds every record at or below it: from then on
        // replicas that raise it at different times, and receive repetitions, agree above it.
        #[test]
        fn replicas_agree_when_floors_rise_at_random(
            made in proptest::collection::vec(any_entry(1..8), 1..8),
            order in any::<u64>(), floor in 0u64..8, raise_first: bool,
        ) {
            let entries: Vec<Vec<u8>> = made.iter().map(Made::encode).collect();
            let mut shuffled = entries.clone();
            let len = shuffled.len();
            for i in 0..len {
                shuffled.swap(i, (order.rotate_left(i as u32 * 7) % len as u64) as usize);
            }
            // Replica one receives everything under floor 0, then its floor rises.
            let first = merge(floor, fold(0, &entries).as_deref(), None).map(<[u8]>::to_vec);
            // Replica two receives everything shuffled and doubled, then its floor rises; a late
            // repetition of an entry that it already holds arrives before or after that.
            let held = fold(0, &shuffled);
            let last = held.clone();
            let second = if raise_first {
                let risen = merge(floor, held.as_deref(), None).map(<[u8]>::to_vec);
                merge(floor, risen.as_deref(), last.as_deref()).map(<[u8]>::to_vec)
            } else {
                let doubled = merge(0, held.as_deref(), last.as_deref()).map(<[u8]>::to_vec);
                merge(floor, doubled.as_deref(), None).map(<[u8]>::to_vec)
            };
            prop_assert_eq!(first, second);
        }
    }

    fn value(event_time: u64, payload: &[u8]) -> Vec<u8> {
        Entry {
            event_time,
            expires_at: None,
            partition_hash: None,
            commit_time: None,
            payload: Some(Payload::Bytes(payload)),
        }
        .encode()
    }

    fn tombstone(event_time: u64, commit_time: u64) -> Vec<u8> {
        Entry {
            event_time,
            expires_at: None,
            partition_hash: None,
            commit_time: Some(commit_time),
            payload: None,
        }
        .encode()
    }

    #[test]
    fn ties_are_broken_by_kind_and_then_by_bytes_not_by_arrival() {
        let (a, b, dead) = (value(5, b"a"), value(5, b"b"), tombstone(5, 9));
        for (x, y, winner) in [(&a, &b, &b), (&b, &a, &b), (&a, &dead, &dead), (&dead, &b, &dead)] {
            assert_eq!(merge(0, Some(x), Some(y)), Some(winner.as_slice()));
        }
        assert!(!supersedes(0, Some(&b), &a));
        assert!(supersedes(0, Some(&a), &b));
        assert!(!supersedes(0, Some(&a), &a));
    }

    #[test]
    fn the_floor_hides_tombstones_and_expired_values_stored_or_incoming() {
        let old = value(3, b"old");
        let dead = tombstone(5, 10);
        assert_eq!(merge(9, Some(&dead), Some(&old)), Some(dead.as_slice()));
        assert_eq!(merge(10, Some(&dead), Some(&old)), Some(old.as_slice()));
        assert_eq!(merge(10, Some(&old), Some(&dead)), Some(old.as_slice()));
        assert_eq!(merge(10, Some(&dead), None), None);
        let expiring = Entry {
            event_time: 5,
            expires_at: Some(20),
            partition_hash: None,
            commit_time: Some(10),
            payload: Some(Payload::Bytes(b"x")),
        }
        .encode();
        assert_eq!(merge(19, Some(&expiring), Some(&old)), Some(expiring.as_slice()));
        assert_eq!(merge(20, Some(&expiring), Some(&old)), Some(old.as_slice()));
    }
}
