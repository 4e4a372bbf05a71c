//! Store of a replica: its log and its database, which change together.
//!
//! **Invariants**
//! - append, then sync (where the caller needs it), then apply: no batch is written before its
//!   record is in the log. Only the SSTs of an ingest come before their record, into a range that
//!   is not served yet.
//! - What a record changes in the metadata is in its batch, and is published once the batch is
//!   written.
//! - A failed append, sync or apply closes the replica to writes; nothing is retried as if it had
//!   not happened.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vasto_core::clock::HybridClock;
use vasto_core::ids::{Lsn, OwnSeq};
use vasto_core::limits::{GROUP_BYTES_MAX, OS_SYNC_INTERVAL, TAILED_SYNC_INTERVAL};
use vasto_core::record::{Body, FeedProgress, OpResult, Record};
use vasto_core::stored_key::MetaKey;

use super::apply::{Meta, apply_record, put_entry, put_head, put_progress, put_results};
use super::command::{OpOutcome, Position, ReplicaError, Role};
use super::dedup::{self, DedupTable, StoredResult};
use super::max_event_times::MaxEventTimes;
use super::metrics;
use super::shared::Shared;
use super::write_group::WriteGroup;
use crate::binlog::Binlog;
use crate::clock::{now_ms, since_boot};
use crate::engine::Batch;

/// Log and database of a replica, and what is kept in memory of them.
pub(super) struct Store {
    pub shared: Arc<Shared>,
    pub log: Binlog,
    pub meta: Meta,
    pub role: Role,
    pub max_event_times: MaxEventTimes,
    /// Clock of the event times that this replica assigns. A stored entry raises the event times of
    /// its own key alone, not this clock.
    pub clock: HybridClock,
    pub dedup: DedupTable,
    unsynced_since: Option<Instant>,
    encoded: Vec<u8>,
}

impl Store {
    pub(super) fn new(shared: Arc<Shared>, log: Binlog, meta: Meta, dedup: DedupTable) -> Self {
        shared.results.store(dedup.len(), Ordering::Relaxed);
        Self {
            shared,
            log,
            max_event_times: MaxEventTimes::starting_at(meta.head.event_time_max),
            meta,
            role: Role::default(),
            clock: HybridClock::default(),
            dedup,
            unsynced_since: None,
            encoded: Vec::new(),
        }
    }

    pub(super) fn now_us(&self) -> u64 {
        self.shared.clock.now_us()
    }

    /// Returns the commit time of the next record: above every one that was assigned here, and
    /// above the gc floor.
    pub(super) fn commit_time(&self) -> u64 {
        self.now_us().max(self.meta.head.commit_time + 1).max(self.meta.head.floor + 1)
    }

    /// Makes everything durable and returns the position of the replica.
    pub(super) fn position(&mut self) -> Result<Position, ReplicaError> {
        self.shared.check_open()?;
        self.sync_rest()?;
        Ok(Position {
            lsn: self.meta.head.applied_lsn,
            vector: self.meta.vector.clone(),
            floor: self.meta.head.floor,
            incarnation: self.meta.identity.incarnation,
        })
    }

    /// Logs a write group as one record, durably with `must_sync`, and applies it.
    pub(super) fn log_group(
        &mut self,
        group: WriteGroup,
        progress: Vec<FeedProgress>,
        commit_time: u64,
        must_sync: bool,
    ) -> Result<(), ReplicaError> {
        let (own_seq, epoch) = (OwnSeq(self.meta.head.own_seq.0 + 1), self.meta.head.epoch);
        let WriteGroup { entries, stored_keys, results: outcomes, .. } = group;
        let result = |((client, sequence), outcomes): &((u64, u64), Vec<OpOutcome>)| OpResult {
            client: *client,
            sequence: *sequence,
            outcome: dedup::encode(commit_time, epoch, outcomes),
        };
        let results = outcomes.iter().map(result).collect();
        let record = self.record(Body::Data { entries, results, progress }, own_seq, commit_time);
        self.append(&record)?;
        if must_sync {
            self.sync()?;
        }
        let Body::Data { entries, results, progress } = &record.body else {
            unreachable!("it was built as data")
        };
        let mut batch = Batch::default();
        for (stored_key, entry) in stored_keys.iter().zip(entries) {
            put_entry(&mut batch, &mut self.meta, stored_key, &entry.entry);
        }
        put_results(&mut batch, results);
        if !results.is_empty() {
            for (client, sequence) in self.dedup.forget(self.now_us()) {
                batch.delete_meta(MetaKey::Result(client, sequence));
            }
        }
        put_progress(&mut batch, progress);
        put_head(&mut batch, &mut self.meta, &record);
        self.write_batch(batch)?;
        for (id, outcomes) in outcomes {
            self.dedup.keep(
                id,
                commit_time,
                StoredResult { outcomes, epoch, own_seq: Some(own_seq) },
            );
        }
        self.shared.results.store(self.dedup.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Logs a control record durably and applies it.
    pub(super) fn log_control(&mut self, body: Body) -> Result<Lsn, ReplicaError> {
        self.log_control_at(body, self.commit_time())
    }

    /// Does the same with this commit time.
    pub(super) fn log_control_at(
        &mut self,
        body: Body,
        commit_time: u64,
    ) -> Result<Lsn, ReplicaError> {
        self.log_control_as(body, commit_time, true)
    }

    /// Logs a control record and applies it. What it changes is visible before it is durable: for
    /// changes that a crash may take back. The caller syncs it before it answers.
    pub(super) fn log_control_visibly(&mut self, body: Body) -> Result<Lsn, ReplicaError> {
        self.log_control_as(body, self.commit_time(), false)
    }

    fn log_control_as(
        &mut self,
        body: Body,
        commit_time: u64,
        durably: bool,
    ) -> Result<Lsn, ReplicaError> {
        self.shared.check_open()?;
        let own_seq =
            if body.is_streamed() { OwnSeq(self.meta.head.own_seq.0 + 1) } else { OwnSeq(0) };
        let mut record = self.record(body, own_seq, commit_time);
        if let Body::Adopt { .. } = record.body {
            // The first record of the next incarnation.
            record.origin.incarnation.0 += 1;
            record.own_seq = OwnSeq(1);
            self.shared.logged_own_seq.store(1, Ordering::Release);
            self.log.set_incarnation(record.origin.incarnation);
        }
        self.append(&record)?;
        if durably {
            self.sync()?;
        }
        let batch =
            apply_record(&mut self.meta, &record).map_err(|error| self.close(error.to_string()))?;
        if let (Body::Seal { .. }, Some(seal)) = (&record.body, &mut self.meta.ranges.seal) {
            seal.since = Some(since_boot());
        }
        self.write_batch(batch)?;
        Ok(record.lsn)
    }

    fn record(&self, body: Body, own_seq: OwnSeq, commit_time: u64) -> Record {
        Record {
            lsn: self.log.last_lsn().next(),
            synced_lsn: self.shared.log.synced_lsn(),
            commit_time,
            floor: self.meta.head.floor,
            epoch: self.meta.head.epoch,
            origin: self.meta.identity.origin(),
            own_seq,
            body,
        }
    }

    /// Appends a record to the log.
    pub(super) fn append(&mut self, record: &Record) -> Result<(), ReplicaError> {
        self.encoded.clear();
        record.encode_into(&mut self.encoded);
        if record.origin == self.meta.identity.origin() && record.own_seq.0 > 0 {
            // Stored before any reader can see the record.
            self.shared.logged_own_seq.store(record.own_seq.0, Ordering::Release);
        }
        let _waits = self.wait_for_disk();
        self.log
            .append(record.lsn, &self.encoded)
            .map_err(|error| self.close(error.to_string()))?;
        self.unsynced_since.get_or_insert_with(Instant::now);
        if self.encoded.capacity() > GROUP_BYTES_MAX * 2 {
            self.encoded = Vec::new();
        }
        Ok(())
    }

    /// Makes the log durable.
    pub(super) fn sync(&mut self) -> Result<(), ReplicaError> {
        let started = Instant::now();
        let _waits = self.wait_for_disk();
        self.log.sync().map_err(|error| {
            metrics::sync_error();
            self.close(error.to_string())
        })?;
        self.unsynced_since = None;
        metrics::sync(started.elapsed());
        self.note_settled();
        Ok(())
    }

    /// Notes that the own records that are applied are durable.
    fn note_settled(&self) {
        self.shared.settled_own_seq.store(self.meta.head.own_seq.0, Ordering::Release);
    }

    pub(super) fn is_synced(&self) -> bool {
        self.unsynced_since.is_none()
    }

    /// Makes durable what is not yet.
    pub(super) fn sync_rest(&mut self) -> Result<(), ReplicaError> {
        if self.is_synced() { Ok(()) } else { self.sync() }
    }

    /// Makes durable what has waited for long enough. A failure closes the replica.
    pub(super) fn sync_overdue(&mut self) {
        let Some(waited) = self.unsynced_since.map(|since| since.elapsed()) else { return };
        if waited >= OS_SYNC_INTERVAL
            || (waited >= TAILED_SYNC_INTERVAL && self.shared.tails.slowest().is_some())
        {
            let _ = self.sync();
        }
    }

    /// Writes the batch of a logged record to the database, and publishes the metadata.
    pub(super) fn write_batch(&mut self, batch: Batch) -> Result<(), ReplicaError> {
        if let Some(why) = self.shared.engine.failure() {
            return Err(self.close(format!("the database could not write to its disk: {why}")));
        }
        let _waits = self.wait_for_disk();
        self.shared.engine.write(batch).map_err(|error| self.close(error.to_string()))?;
        self.shared.engine.raise_floor(self.meta.head.floor);
        if self.is_synced() {
            self.note_settled();
        }
        self.publish();
        Ok(())
    }

    /// Publishes the metadata and the role.
    pub(super) fn publish(&mut self) {
        self.shared.publish(&mut self.meta, self.role);
    }

    /// Closes the replica to writes for good (until it is opened again).
    pub(super) fn close(&self, reason: String) -> ReplicaError {
        self.shared.close(reason.clone());
        ReplicaError::Closed(reason)
    }

    /// Publishes that the writer waits for its disk, until the guard is dropped.
    fn wait_for_disk(&self) -> WaitsForDisk {
        self.shared.busy_since_ms.store(now_ms().max(1), Ordering::Release);
        WaitsForDisk(self.shared.clone())
    }
}

/// Guard: the writer waits for its disk as long as this lives.
struct WaitsForDisk(Arc<Shared>);

impl Drop for WaitsForDisk {
    fn drop(&mut self) {
        self.0.busy_since_ms.store(0, Ordering::Release);
    }
}
