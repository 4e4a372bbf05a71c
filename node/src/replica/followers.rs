//! Followers that pull a replica's log, their positions, and the writes that wait for them.
//!
//! **Invariants**
//! - A write that requires another replica's sync is answered exactly once: after a *placed*
//!   replica has synced it, or as `Unknown` when none did in time.
//! - A read-modify-write counts only when the other replica took it before it knew of a newer
//!   epoch, and only when it won there: neither a new primary that goes on without it, nor one that
//!   went on without this replica, may make it look replicated.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use parking_lot::Mutex;
use vasto_core::ids::{Epoch, Lsn, OwnSeq, ReplicaId};
use vasto_core::limits::REPLICA_ACK_TIMEOUT;
use vasto_core::{ErrorCode, VastoError};

use super::command::{OpOutcome, WriteCommand};

/// Maximum number of records noted to have lost an entry elsewhere: more than can wait for
/// acknowledgement at once.
const LOST_MAX: usize = 65_536;

/// Position of a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Follower {
    /// LSN of this log up to which everything is durable there.
    covered: Lsn,
    /// Last record of this incarnation that is durable there.
    own_seq: OwnSeq,
    /// Highest epoch that the follower has reported.
    epoch: Epoch,
}

struct Waiting {
    command: WriteCommand,
    outcomes: Vec<OpOutcome>,
    own_seq: OwnSeq,
    epoch: Epoch,
    until: Instant,
}

impl Waiting {
    /// Decides whether the record counts as replicated, when a placed replica took it at this
    /// epoch.
    fn judge(&self, taken: Epoch, lost: &BTreeSet<OwnSeq>) -> Result<(), VastoError> {
        if self.command.modifies() && lost.contains(&self.own_seq) {
            return Err(VastoError::new(
                ErrorCode::Unknown,
                "another replica holds a later value, which this was not done on; read the value back",
            ));
        }
        if self.command.modifies() && taken > self.epoch {
            return Err(VastoError::new(
                ErrorCode::Unknown,
                "another replica became primary while this was replicated; read the value back",
            ));
        }
        Ok(())
    }

    fn answer(self, verdict: Result<(), VastoError>) {
        self.command.answer(verdict.map(|()| self.outcomes));
    }
}

#[derive(Default)]
struct Inner {
    /// Replicas that the catalog names, for which the log is kept.
    wanted: BTreeSet<ReplicaId>,
    /// Replicas whose sync counts.
    placed: BTreeSet<ReplicaId>,
    positions: BTreeMap<ReplicaId, Follower>,
    /// Records of this incarnation of which an entry lost at a follower; the most recent ones.
    lost: BTreeSet<OwnSeq>,
    waiting: VecDeque<Waiting>,
}

/// The followers of one replica.
#[derive(Default)]
pub(crate) struct Followers {
    inner: Mutex<Inner>,
}

/// Returns the error for a write that no other replica has synced in time.
fn not_in_time() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "the write is durable here, but no other replica has confirmed it in time; read it back, or see `vasto cluster status`",
    )
}

impl Followers {
    /// Sets the replicas for which the log is kept, and those whose sync counts, from the catalog.
    pub(crate) fn expect(
        &self,
        wanted: impl IntoIterator<Item = ReplicaId>,
        placed: impl IntoIterator<Item = ReplicaId>,
    ) {
        let mut inner = self.inner.lock();
        inner.wanted = wanted.into_iter().collect();
        inner.placed = placed.into_iter().collect();
        let Inner { wanted, positions, .. } = &mut *inner;
        positions.retain(|id, _| wanted.contains(id));
    }

    /// Returns true when the shard has other placed replicas.
    pub(crate) fn has_peers(&self) -> bool {
        !self.inner.lock().placed.is_empty()
    }

    /// Adds a write that is durable here and waits for another replica.
    pub(crate) fn wait(
        &self,
        command: WriteCommand,
        outcomes: Vec<OpOutcome>,
        own_seq: OwnSeq,
        epoch: Epoch,
    ) {
        let write = Waiting {
            command,
            outcomes,
            own_seq,
            epoch,
            until: Instant::now() + REPLICA_ACK_TIMEOUT,
        };
        if own_seq.0 == 0 {
            return write.answer(Ok(()));
        }
        let mut inner = self.inner.lock();
        let placed = inner.placed.iter().filter_map(|id| inner.positions.get(id));
        // The epoch at which a follower took the record is not known here: its last one counts.
        let taken = placed
            .filter(|follower| follower.own_seq >= own_seq)
            .map(|follower| follower.epoch)
            .min();
        let Some(taken) = taken else { return inner.waiting.push_back(write) };
        let verdict = write.judge(taken, &inner.lost);
        drop(inner);
        write.answer(verdict);
    }

    /// Records what a follower reports as durable there: this log up to `covered`, this incarnation
    /// up to `own_seq`, taken at its `epoch`.
    pub(crate) fn progress(
        &self,
        follower: ReplicaId,
        covered: Lsn,
        own_seq: OwnSeq,
        epoch: Epoch,
    ) {
        let mut ready = Vec::new();
        {
            let mut inner = self.inner.lock();
            let position =
                inner.positions.entry(follower).or_insert(Follower { covered, own_seq, epoch });
            position.covered = position.covered.max(covered);
            position.own_seq = position.own_seq.max(own_seq);
            position.epoch = position.epoch.max(epoch);
            if inner.placed.contains(&follower) {
                while let Some(write) = inner.waiting.pop_front_if(|write| write.own_seq <= own_seq)
                {
                    let verdict = write.judge(epoch, &inner.lost);
                    ready.push((write, verdict));
                }
            }
        }
        for (write, verdict) in ready {
            write.answer(verdict);
        }
    }

    /// Notes that an entry of each of these records lost at a follower, which is about to
    /// acknowledge them.
    pub(crate) fn lost(&self, own_seqs: impl IntoIterator<Item = OwnSeq>) {
        let mut inner = self.inner.lock();
        inner.lost.extend(own_seqs);
        while inner.lost.len() > LOST_MAX {
            inner.lost.pop_first();
        }
    }

    /// Returns true when a write waits.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.inner.lock().waiting.is_empty()
    }

    /// Answers the writes that have waited too long.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        let mut late = Vec::new();
        {
            let mut inner = self.inner.lock();
            while inner.waiting.front().is_some_and(|write| write.until <= now) {
                late.extend(inner.waiting.pop_front());
            }
        }
        for write in late {
            write.answer(Err(not_in_time()));
        }
    }

    /// Answers all waiting writes, because the replica stops: none will be acknowledged any more.
    pub(crate) fn abandon(&self) {
        let waiting = std::mem::take(&mut self.inner.lock().waiting);
        for write in waiting {
            write.answer(Err(not_in_time()));
        }
    }

    /// Returns the LSN up to which all wanted followers hold this log; `None` without wanted
    /// followers.
    pub(crate) fn covered_by_all(&self) -> Option<Lsn> {
        let inner = self.inner.lock();
        let covered = |id| inner.positions.get(id).map_or(Lsn(0), |follower| follower.covered);
        inner.wanted.iter().map(covered).min()
    }

    /// Returns the wanted follower that holds the log back most, and its LSN.
    pub(crate) fn last(&self) -> Option<(ReplicaId, Lsn)> {
        let inner = self.inner.lock();
        let covered = |id: &ReplicaId| {
            (*id, inner.positions.get(id).map_or(Lsn(0), |follower| follower.covered))
        };
        inner.wanted.iter().map(covered).min_by_key(|(_, covered)| *covered)
    }

    /// Returns true when a placed replica holds this log up to the LSN.
    pub(crate) fn anybody_covers(&self, lsn: Lsn) -> bool {
        let inner = self.inner.lock();
        inner
            .placed
            .iter()
            .any(|id| inner.positions.get(id).is_some_and(|follower| follower.covered >= lsn))
    }

    /// Returns the placed replicas that hold this log up to the LSN.
    pub(crate) fn covered_by(&self, lsn: Lsn) -> Vec<ReplicaId> {
        let inner = self.inner.lock();
        let covers = |id: &&ReplicaId| {
            inner.positions.get(id).is_some_and(|follower| follower.covered >= lsn)
        };
        inner.placed.iter().filter(covers).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bytes::Bytes;
    use std::sync::mpsc::{Receiver, TryRecvError, channel};
    use vasto_core::catalog::Ack;

    use crate::replica::command::{OpKind, WriteOp};

    type Answer = Result<Vec<OpOutcome>, VastoError>;

    fn put() -> (WriteCommand, Receiver<Answer>) {
        let (sender, receiver) = channel();
        let op = WriteOp {
            key: Bytes::from_static(b"k"),
            partition_hash: None,
            event_time: None,
            change: OpKind::Delete { condition: None },
            created_ttl_ms: None,
        };
        let done = Box::new(move |answer| sender.send(answer).unwrap());
        (WriteCommand::new(vec![op], Ack::Replica, done, None), receiver)
    }

    fn add() -> (WriteCommand, Receiver<Answer>) {
        let (mut command, answer) = put();
        command.ops[0].change = OpKind::AddI64(1);
        (command, answer)
    }

    fn followers() -> Followers {
        let followers = Followers::default();
        followers.expect([ReplicaId(2), ReplicaId(3), ReplicaId(9)], [ReplicaId(2), ReplicaId(3)]);
        followers
    }

    #[test]
    fn a_write_waits_for_a_placed_replica() {
        let followers = followers();
        let (command, answer) = put();
        followers.wait(command, Vec::new(), OwnSeq(5), Epoch(1));
        followers.progress(ReplicaId(2), Lsn(4), OwnSeq(4), Epoch(1));
        followers.progress(ReplicaId(9), Lsn(9), OwnSeq(9), Epoch(1));
        followers.expire();
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        followers.progress(ReplicaId(3), Lsn(6), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
        // A record that a follower already holds needs no wait.
        let (command, answer) = put();
        followers.wait(command, Vec::new(), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
    }

    /// The follower acknowledges before the write begins to wait, and then everything is idle.
    #[test]
    fn a_modification_that_is_confirmed_before_it_waits_is_answered_at_once() {
        let followers = followers();
        followers.progress(ReplicaId(2), Lsn(5), OwnSeq(5), Epoch(1));
        let (command, answer) = add();
        followers.wait(command, Vec::new(), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
        // The follower may have taken this record after it learned of the next primary.
        followers.progress(ReplicaId(2), Lsn(6), OwnSeq(6), Epoch(2));
        let (command, answer) = add();
        followers.wait(command, Vec::new(), OwnSeq(6), Epoch(1));
        assert_eq!(answer.try_recv().unwrap().unwrap_err().code, ErrorCode::Unknown);
    }

    #[test]
    fn a_write_that_is_abandoned_has_an_unknown_outcome() {
        let followers = followers();
        let (command, answer) = put();
        followers.wait(command, Vec::new(), OwnSeq(5), Epoch(1));
        followers.abandon();
        assert_eq!(answer.try_recv().unwrap().unwrap_err().code, ErrorCode::Unknown);
    }

    #[test]
    fn the_log_is_kept_for_everybody_who_is_wanted() {
        let followers = followers();
        assert_eq!(followers.covered_by_all(), Some(Lsn(0)));
        followers.progress(ReplicaId(2), Lsn(4), OwnSeq(4), Epoch(1));
        followers.progress(ReplicaId(3), Lsn(7), OwnSeq(7), Epoch(1));
        assert_eq!(followers.last(), Some((ReplicaId(9), Lsn(0))));
        assert!(followers.anybody_covers(Lsn(7)) && !followers.anybody_covers(Lsn(8)));
        assert_eq!(followers.covered_by(Lsn(7)), [ReplicaId(3)]);
        followers.expect([ReplicaId(2), ReplicaId(3)], [ReplicaId(2), ReplicaId(3)]);
        assert_eq!(followers.covered_by_all(), Some(Lsn(4)));
        followers.expect([], []);
        assert_eq!(followers.covered_by_all(), None);
    }
}
