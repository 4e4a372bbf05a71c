//! Who pulls a replica's log, how far they are, and the writes that wait for them.
//!
//! **Invariants**
//! - A write that wants another replica's sync is answered once a *placed* replica has synced it, or
//!   as `Unknown` when none did in time; exactly once.
//! - A read-modify-write counts only when the other replica took it before it knew of a newer epoch:
//!   a new primary that works on without it must not make it look replicated.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vasto_core::ids::{Epoch, Lsn, OwnSeq, ReplicaId};
use vasto_core::limits::REPLICA_ACK_TIMEOUT;
use vasto_core::{ErrorCode, VastoError};

use super::job::{Outcome, WriteJob};

/// How far a follower is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Follower {
    /// Everything of this log up to here is durable there.
    pub covered: Lsn,
    /// The last of this incarnation's records that is durable there.
    pub own_seq: OwnSeq,
    /// The epoch that it knew of when it took that one.
    pub epoch: Epoch,
    /// When it was heard last.
    pub heard: Instant,
}

struct Waiting {
    job: WriteJob,
    outcomes: Vec<Outcome>,
    own_seq: OwnSeq,
    epoch: Epoch,
    until: Instant,
}

#[derive(Default)]
struct Inner {
    /// The replicas that the catalog names, for which the log is kept.
    wanted: BTreeSet<ReplicaId>,
    /// Those whose sync counts.
    placed: BTreeSet<ReplicaId>,
    known: BTreeMap<ReplicaId, Follower>,
    waiting: VecDeque<Waiting>,
}

/// The followers of one replica.
#[derive(Default)]
pub struct Followers {
    inner: Mutex<Inner>,
}

/// The answer to a write that nobody else has synced in time.
fn not_in_time() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "the write is durable here, but no other replica has confirmed it in time; read it back, or see `vasto cluster status`",
    )
}

/// Answers a write of `epoch` that a follower has taken when it knew of `known_of`.
fn confirm(job: WriteJob, outcomes: Vec<Outcome>, epoch: Epoch, known_of: Epoch) {
    if job.modifies() && known_of > epoch {
        job.answer(Err(VastoError::new(
            ErrorCode::Unknown,
            "another replica became primary while this was replicated; read the value back",
        )));
    } else {
        job.answer(Ok(outcomes));
    }
}

impl Followers {
    /// What the catalog says: for whom the log is kept, and whose sync counts.
    pub fn expect(&self, wanted: impl IntoIterator<Item = ReplicaId>, placed: impl IntoIterator<Item = ReplicaId>) {
        let mut inner = self.inner.lock();
        inner.wanted = wanted.into_iter().collect();
        inner.placed = placed.into_iter().collect();
        let Inner { wanted, known, .. } = &mut *inner;
        known.retain(|id, _| wanted.contains(id));
    }

    /// True when the shard has other placed replicas.
    pub fn has_peers(&self) -> bool {
        !self.inner.lock().placed.is_empty()
    }

    /// A write that is durable here waits for another replica.
    pub fn wait(&self, job: WriteJob, outcomes: Vec<Outcome>, own_seq: OwnSeq, epoch: Epoch) {
        let mut inner = self.inner.lock();
        // The record was synced before this call: a follower may have been quicker.
        let taken = |id: &ReplicaId| inner.known.get(id).filter(|follower| follower.own_seq >= own_seq);
        let known_of = match own_seq.0 {
            0 => Some(epoch),
            _ => inner.placed.iter().filter_map(taken).map(|follower| follower.epoch).min(),
        };
        if let Some(known_of) = known_of {
            drop(inner);
            return confirm(job, outcomes, epoch, known_of);
        }
        let until = Instant::now() + REPLICA_ACK_TIMEOUT;
        inner.waiting.push_back(Waiting { job, outcomes, own_seq, epoch, until });
    }

    /// A follower says what is durable there: this log up to `covered`, this incarnation up to
    /// `own_seq`, taken at its `epoch`.
    pub fn progress(&self, follower: ReplicaId, covered: Lsn, own_seq: OwnSeq, epoch: Epoch) {
        let mut ready = Vec::new();
        {
            let mut inner = self.inner.lock();
            let heard = Instant::now();
            let known = inner.known.entry(follower).or_insert(Follower { covered, own_seq, epoch, heard });
            known.covered = known.covered.max(covered);
            if own_seq > known.own_seq {
                (known.own_seq, known.epoch) = (own_seq, epoch);
            }
            known.heard = heard;
            if inner.placed.contains(&follower) {
                while inner.waiting.front().is_some_and(|one| one.own_seq <= own_seq) {
                    ready.extend(inner.waiting.pop_front());
                }
            }
        }
        for one in ready {
            confirm(one.job, one.outcomes, one.epoch, epoch);
        }
    }

    /// Answers what has waited too long.
    pub fn expire(&self) {
        let now = Instant::now();
        let mut late = Vec::new();
        {
            let mut inner = self.inner.lock();
            while inner.waiting.front().is_some_and(|one| one.until <= now) {
                late.extend(inner.waiting.pop_front());
            }
        }
        for one in late {
            one.job.answer(Err(not_in_time()));
        }
    }

    /// The replica stops: nothing that waits will be confirmed any more.
    pub fn abandon(&self) {
        let waiting = std::mem::take(&mut self.inner.lock().waiting);
        for one in waiting {
            one.job.answer(Err(not_in_time()));
        }
    }

    /// Up to where everybody who must read this log has it; `None` when nobody must.
    pub fn covered_by_all(&self) -> Option<Lsn> {
        let inner = self.inner.lock();
        let covered = |id| inner.known.get(id).map_or(Lsn(0), |follower| follower.covered);
        inner.wanted.iter().map(covered).min()
    }

    /// The wanted follower that holds the log back most, and where it is.
    pub fn last(&self) -> Option<(ReplicaId, Lsn)> {
        let inner = self.inner.lock();
        let covered = |id: &ReplicaId| (*id, inner.known.get(id).map_or(Lsn(0), |follower| follower.covered));
        inner.wanted.iter().map(covered).min_by_key(|(_, covered)| *covered)
    }

    /// True when a placed replica holds this log up to the LSN.
    pub fn anybody_covers(&self, lsn: Lsn) -> bool {
        let inner = self.inner.lock();
        inner.placed.iter().any(|id| inner.known.get(id).is_some_and(|follower| follower.covered >= lsn))
    }

    /// The followers that were heard, for metrics.
    pub fn known(&self) -> Vec<(ReplicaId, Follower)> {
        self.inner.lock().known.iter().map(|(id, follower)| (*id, *follower)).collect()
    }

    /// Nobody was heard from since `patience` ago: `(replica, silence)`.
    pub fn silent(&self, patience: Duration) -> Vec<ReplicaId> {
        let inner = self.inner.lock();
        let silent = |id: &ReplicaId| inner.known.get(id).is_none_or(|follower| follower.heard.elapsed() > patience);
        inner.wanted.iter().copied().filter(silent).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bytes::Bytes;
    use std::sync::mpsc::{Receiver, TryRecvError, channel};
    use vasto_core::catalog::Ack;

    use crate::replica::job::{Change, WriteOp};

    type Answer = Result<Vec<Outcome>, VastoError>;

    fn put() -> (WriteJob, Receiver<Answer>) {
        of(Change::Delete { condition: None })
    }

    fn of(change: Change) -> (WriteJob, Receiver<Answer>) {
        let (sender, receiver) = channel();
        let op = WriteOp {
            key: Bytes::from_static(b"k"),
            partition_hash: None,
            event_time: None,
            change,
            created_ttl_ms: None,
        };
        let done = Box::new(move |answer| sender.send(answer).unwrap());
        (WriteJob::new(vec![op], Ack::Replica, done, None), receiver)
    }

    fn followers() -> Followers {
        let followers = Followers::default();
        followers.expect([ReplicaId(2), ReplicaId(3), ReplicaId(9)], [ReplicaId(2), ReplicaId(3)]);
        followers
    }

    #[test]
    fn a_write_waits_for_a_placed_replica() {
        let followers = followers();
        let (job, answer) = put();
        followers.wait(job, Vec::new(), OwnSeq(5), Epoch(1));
        followers.progress(ReplicaId(2), Lsn(4), OwnSeq(4), Epoch(1));
        followers.progress(ReplicaId(9), Lsn(9), OwnSeq(9), Epoch(1));
        followers.expire();
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        followers.progress(ReplicaId(3), Lsn(6), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
        // What is known to be there already needs no waiting.
        let (job, answer) = put();
        followers.wait(job, Vec::new(), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
    }

    /// The record is synced, pulled and confirmed before the writer comes to wait for that.
    #[test]
    fn a_confirmation_that_is_quicker_than_the_writer_counts() {
        let followers = followers();
        followers.progress(ReplicaId(2), Lsn(6), OwnSeq(5), Epoch(1));
        let (job, answer) = of(Change::AddI64(1));
        followers.wait(job, Vec::new(), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
        // The follower heard of the next epoch later: it had taken the record before.
        followers.progress(ReplicaId(2), Lsn(7), OwnSeq(5), Epoch(2));
        let (job, answer) = of(Change::AddI64(1));
        followers.wait(job, Vec::new(), OwnSeq(5), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
        // One that it took when it knew of a newer primary does not count, unless another took it before.
        followers.progress(ReplicaId(2), Lsn(8), OwnSeq(6), Epoch(2));
        let (job, answer) = of(Change::AddI64(1));
        followers.wait(job, Vec::new(), OwnSeq(6), Epoch(1));
        assert_eq!(answer.try_recv().unwrap().unwrap_err().code, ErrorCode::Unknown);
        followers.progress(ReplicaId(3), Lsn(8), OwnSeq(6), Epoch(1));
        let (job, answer) = of(Change::AddI64(1));
        followers.wait(job, Vec::new(), OwnSeq(6), Epoch(1));
        assert!(answer.try_recv().unwrap().is_ok());
    }

    #[test]
    fn who_stops_waiting_leaves_the_outcome_open() {
        let followers = followers();
        let (job, answer) = put();
        followers.wait(job, Vec::new(), OwnSeq(5), Epoch(1));
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
        followers.expect([ReplicaId(2), ReplicaId(3)], [ReplicaId(2), ReplicaId(3)]);
        assert_eq!(followers.covered_by_all(), Some(Lsn(4)));
        followers.expect([], []);
        assert_eq!(followers.covered_by_all(), None);
    }
}
