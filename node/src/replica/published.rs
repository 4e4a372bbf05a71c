//! Published state of a replica, which other modules read and set without the writer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, Lsn, Origin, OwnSeq, ReplicaId, Vector, covers,
};
use vasto_core::stored_key::MetaKey;

use super::authority::Authority;
use super::bucket_acks::BucketAcks;
use super::command::Position;
use super::followers::Followers;
use super::handle::Replica;
use super::held::Pause;
use super::shared::View;
use super::state::{Head, Ranges};
use super::tails::Tails;
use super::throttle::WriteThrottle;
use crate::binlog::LogShared;
use crate::engine::{Engine, EngineError};

impl Replica {
    /// Returns the database.
    pub(crate) fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Returns the log, for readers.
    pub(crate) fn log(&self) -> &Arc<LogShared> {
        &self.shared.log
    }

    /// Returns the ranges that the replica serves, and since which epoch.
    pub(crate) fn view(&self) -> Arc<View> {
        self.shared.view.load_full()
    }

    /// Returns the state of its bands.
    pub(crate) fn ranges(&self) -> Ranges {
        self.shared.view.load().ranges.clone()
    }

    /// Returns the epoch that the replica has applied.
    pub(crate) fn epoch(&self) -> Epoch {
        self.shared.view.load().epoch
    }

    /// Returns the catalog version that the replica has applied.
    pub(crate) fn version(&self) -> CatalogVersion {
        self.shared.view.load().version
    }

    /// Returns the incarnation of this opening.
    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation(self.shared.incarnation.load(Ordering::Acquire))
    }

    /// Returns the last record that readers see.
    pub(crate) fn applied_lsn(&self) -> Lsn {
        Lsn(self.shared.applied.load(Ordering::Acquire))
    }

    /// Returns the last record that is both durable and visible: it may be streamed and shipped.
    pub(crate) fn settled_lsn(&self) -> Lsn {
        self.applied_lsn().min(self.shared.log.synced_lsn())
    }

    /// Returns the position that is durable and visible, without the writer. It names all that was
    /// acknowledged as durable.
    pub(crate) fn settled(&self) -> Position {
        // Read in this order: every applied record is in the vector.
        let synced = self.shared.log.synced_lsn();
        let applied = self.applied_lsn();
        let mut vector = self.vector();
        // Not all of them are numbered own records: a range that is given away or opened is so
        // before its record is synced. Without what the writer knows the count would leave out an
        // own record that was acknowledged.
        let unsynced = applied.0.saturating_sub(synced.0);
        let known = self.shared.settled_own_seq.load(Ordering::Acquire);
        let own = Origin { replica: self.id, incarnation: self.incarnation() };
        if let Some(own_seq) = vector.get_mut(&own) {
            own_seq.0 = own_seq.0.saturating_sub(unsynced).max(known);
        }
        Position {
            lsn: applied.min(synced),
            vector,
            floor: self.floor(),
            incarnation: own.incarnation,
        }
    }

    /// Returns the position of the database on disk, without its memtables.
    pub(crate) fn persisted_lsn(&self) -> Result<Lsn, EngineError> {
        let bytes = self.shared.engine.get_persisted(&MetaKey::Head.encode())?;
        Ok(bytes
            .and_then(|bytes| Head::decode(&bytes).ok())
            .map(|head| head.applied_lsn)
            .unwrap_or_default())
    }

    /// Returns, per origin, the last record that is applied.
    pub(crate) fn vector(&self) -> Vector {
        self.shared.vector.lock().clone()
    }

    /// Subscribes to a number that rises with every change of the vector.
    pub(crate) fn vector_changes(&self) -> watch::Receiver<u64> {
        self.shared.vector_changes.subscribe()
    }

    /// Returns true when the replica holds at least the records of the vector.
    pub(crate) fn covers(&self, vector: &Vector) -> bool {
        covers(&self.shared.vector.lock(), vector)
    }

    /// Counts a request of a client.
    pub(crate) fn count_request(&self) {
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of requests of clients since the opening.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Returns the gc floor, a commit time.
    pub(crate) fn floor(&self) -> u64 {
        self.shared.floor.load(Ordering::Acquire)
    }

    /// Returns the commit time of the last record that stored something.
    pub(crate) fn data_commit_time(&self) -> u64 {
        self.shared.data_commit_time.load(Ordering::Acquire)
    }

    /// Returns the followers that pull its log.
    pub(crate) fn followers(&self) -> &Followers {
        &self.shared.followers
    }

    /// Returns the open tails of its log.
    pub(crate) fn tails(&self) -> &Arc<Tails> {
        &self.shared.tails
    }

    /// Returns the throttle of its writes of moving keys.
    pub(crate) fn throttle(&self) -> &WriteThrottle {
        &self.shared.throttle
    }

    /// Returns the writes that wait for the bucket.
    pub(crate) fn bucket_acks(&self) -> &BucketAcks {
        &self.shared.bucket_acks
    }

    /// Returns false while the replica has not caught up with its peers since it was opened.
    pub(crate) fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
    }

    /// Sets whether the replica has caught up; notifies the receivers of [`Self::changes`].
    pub(crate) fn set_ready(&self, ready: bool) {
        if self.shared.ready.swap(ready, Ordering::AcqRel) != ready {
            self.shared.changed.send_modify(|count| *count += 1);
        }
    }

    /// Keeps the replica from being primary before it has applied this version.
    pub(crate) fn primary_from(&self, version: CatalogVersion) {
        self.shared.primary_from.fetch_max(version.0, Ordering::AcqRel);
    }

    /// Records that a follower has applied this epoch, under which another replica may be primary.
    pub(crate) fn follower_at(&self, epoch: Epoch) {
        self.shared.followers_epoch.fetch_max(epoch.0, Ordering::AcqRel);
    }

    /// Returns the authority that decides on strict requests.
    pub(crate) fn authority(&self) -> &Arc<Authority> {
        &self.shared.authority
    }

    /// Returns for how long the writer has been waiting for the disk, milliseconds.
    pub(crate) fn busy_ms(&self, now_ms: u64) -> u64 {
        match self.shared.busy_since_ms.load(Ordering::Acquire) {
            0 => 0,
            since => now_ms.saturating_sub(since),
        }
    }

    /// Returns the last record of this opening that is in the log. A peer may hold it before it is
    /// visible here.
    pub(crate) fn logged_own_seq(&self) -> OwnSeq {
        OwnSeq(self.shared.logged_own_seq.load(Ordering::Acquire))
    }

    /// Returns whether another replica holds records of this one that it never wrote: its directory
    /// is an old copy.
    pub(crate) fn is_behind_itself(&self, others: &Vector) -> bool {
        let (me, incarnation) = (self.id, self.incarnation());
        others.iter().any(|(origin, seq)| {
            origin.replica == me
                && match origin.incarnation.cmp(&incarnation) {
                    std::cmp::Ordering::Less => false,
                    std::cmp::Ordering::Equal => *seq > self.logged_own_seq(),
                    std::cmp::Ordering::Greater => true,
                }
        })
    }

    /// Returns records of another replica that lost an entry here; see [`SupersededRecords::of`].
    pub(crate) fn losses_of(&self, replica: ReplicaId, after: u64) -> (Vec<(Origin, OwnSeq)>, u64) {
        self.shared.superseded.of(replica, after)
    }

    /// Sets whether writes are refused because the log is far over its cap.
    pub(crate) fn set_shed(&self, shed: bool) {
        self.shared.shed.store(shed, Ordering::Relaxed);
    }

    /// Closes the replica to writes: it must not go on.
    pub(crate) fn close(&self, reason: String) {
        self.shared.close(reason);
    }

    /// Returns the reason why the replica takes no writes, if it is closed.
    pub(crate) fn closed(&self) -> Option<String> {
        self.shared.closed()
    }

    /// Returns true when the replica takes no more writes.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// Subscribes to changes of ranges, epoch, version and closure.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Takes the pauses of writes to sealed ranges, microseconds.
    pub(crate) fn take_pauses(&self) -> Vec<u64> {
        std::mem::take(&mut *self.shared.pauses_us.lock())
    }

    /// Takes the moments of the last pause of a seal.
    pub(crate) fn take_pause(&self) -> Option<Pause> {
        self.shared.pause.lock().take()
    }

    /// Returns what the replica held when it sealed under this version, all of it durable; `None`
    /// when it has not, or was opened since.
    pub(crate) fn position_at_seal(&self, version: CatalogVersion) -> Option<Position> {
        let at_seal = self.shared.at_seal.lock();
        at_seal.as_ref().filter(|(sealed, _)| *sealed == version).map(|(_, held)| held.clone())
    }

    /// Returns the durable cursors of the tails that feed the replica.
    pub(crate) fn tail_cursors(&self) -> Result<Vec<(ReplicaId, Lsn)>, EngineError> {
        let rows = self.shared.engine.with_prefix(&MetaKey::tail_cursor_prefix())?;
        Ok(rows.iter().filter_map(|(key, value)| parse_cursor(key, value)).collect())
    }
}

fn parse_cursor(key: &[u8], value: &[u8]) -> Option<(ReplicaId, Lsn)> {
    let MetaKey::TailCursor(replica) = MetaKey::decode(key).ok()? else { return None };
    Some((replica, Lsn(u64::from_le_bytes(value.try_into().ok()?))))
}
