//! Superseded records: records of other replicas of which an entry lost here, reported to their
//! origins.
//!
//! A read-modify-write that loses at the replica that acknowledges it was done on a value that did
//! not win: its sender must not be answered that it is replicated.
//!
//! **Invariant:** a superseded record is noted before the vector covers it, and kept for longer
//! than any write waits for the record's acknowledgement. So the report reaches the origin no later
//! than the acknowledgement, also over a new stream.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vasto_core::ids::{Origin, OwnSeq, ReplicaId};
use vasto_core::limits::REPLICA_ACK_TIMEOUT;

/// Longer than any write waits for the acknowledgement of a record.
const KEPT: Duration = Duration::from_secs(2 * REPLICA_ACK_TIMEOUT.as_secs());
/// Several frames full of superseded records.
const KEPT_MAX: usize = 65_536;

#[derive(Debug, Clone, Copy)]
struct SupersededRecord {
    number: u64,
    at: Instant,
    origin: Origin,
    own_seq: OwnSeq,
}

#[derive(Default)]
struct Inner {
    last: u64,
    kept: VecDeque<SupersededRecord>,
}

/// The last superseded records of a replica.
#[derive(Default)]
pub(super) struct SupersededRecords {
    inner: Mutex<Inner>,
}

impl SupersededRecords {
    /// Notes that an entry of this record lost here.
    pub(super) fn note(&self, origin: Origin, own_seq: OwnSeq) {
        let mut inner = self.inner.lock();
        let now = Instant::now();
        while inner.kept.front().is_some_and(|loss| now - loss.at > KEPT)
            || inner.kept.len() >= KEPT_MAX
        {
            inner.kept.pop_front();
        }
        inner.last += 1;
        let number = inner.last;
        inner.kept.push_back(SupersededRecord { number, at: now, origin, own_seq });
    }

    /// Returns the superseded records of a replica that were noted after the number `after`, and
    /// the last number.
    pub(super) fn of(&self, replica: ReplicaId, after: u64) -> (Vec<(Origin, OwnSeq)>, u64) {
        let inner = self.inner.lock();
        if inner.last == after {
            return (Vec::new(), after);
        }
        let first = inner.kept.partition_point(|loss| loss.number <= after);
        let news = inner.kept.range(first..).filter(|loss| loss.origin.replica == replica);
        (news.map(|loss| (loss.origin, loss.own_seq)).collect(), inner.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_core::ids::Incarnation;

    #[test]
    fn each_replica_gets_its_own_records_and_gets_them_again_over_a_new_stream() {
        let superseded = SupersededRecords::default();
        let origin = |replica| Origin { replica: ReplicaId(replica), incarnation: Incarnation(1) };
        superseded.note(origin(1), OwnSeq(5));
        superseded.note(origin(2), OwnSeq(7));
        let (first, last) = superseded.of(ReplicaId(1), 0);
        assert_eq!(first, [(origin(1), OwnSeq(5))]);
        assert_eq!(superseded.of(ReplicaId(1), last), (Vec::new(), last));
        superseded.note(origin(1), OwnSeq(6));
        assert_eq!(superseded.of(ReplicaId(1), last).0, [(origin(1), OwnSeq(6))]);
        assert_eq!(superseded.of(ReplicaId(1), 0).0.len(), 2);
    }
}
