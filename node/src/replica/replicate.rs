//! Replication: takes records from another replica's log.
//!
//! **Invariants**
//! - The records of an origin are taken in order, each once: a record that is here already is
//!   skipped, a record that comes too early is an error, never a skip.
//! - A record keeps its origin, number, commit time and floor; it is logged here, synced, and
//!   applied in one batch with the vector. Only its entries that win here are logged, so that a
//!   replay needs no comparison. A follower of this log receives the winners first, because they
//!   precede the record.
//! - The floor that a record carries is raised before its entries are compared.

use std::time::Duration;

use vasto_core::ids::{Lsn, OwnSeq, ReplicaId};
use vasto_core::limits::MAX_CLOCK_AHEAD;
use vasto_core::record::{Body, FeedProgress, KeyEntry, Record};
use vasto_core::stored_key::data_key;

use super::apply::{add_record, band_of};
use super::command::ReplicaError;
use super::merge::{decode_streamed, key_entry_bytes};
use super::metrics;
use super::store::Store;
use super::write_group::WriteGroup;
use crate::engine::Batch;

/// Reason for closing a replica of whose records others hold more than it has ever written.
pub(crate) const OLD_COPY: &str = "others hold records of this replica that it has never written: its directory is an old \
                            copy; evict the replica (`vasto keyspace evict`), it is rebuilt from the others";

impl Store {
    /// Takes the records; afterwards everything is durable and visible.
    pub(super) fn take_records(
        &mut self,
        source: ReplicaId,
        records: Vec<Record>,
        covered: Lsn,
    ) -> Result<(), ReplicaError> {
        self.shared.check_open()?;
        let mut batch = Batch::default();
        let mut group = WriteGroup::default();
        let mut taken = 0u64;
        let mut failed = None;
        let last_data = records.iter().rposition(|record| matches!(record.body, Body::Data { .. }));
        for (index, record) in records.into_iter().enumerate() {
            let have = self.meta.vector.get(&record.origin).copied().unwrap_or_default();
            if record.own_seq <= have {
                continue;
            }
            if self.meta.is_own(&record)
                && record.origin.incarnation >= self.meta.identity.incarnation
            {
                failed = Some(self.close(OLD_COPY.into()));
                break;
            }
            let next = OwnSeq(have.0 + 1);
            if record.own_seq > next {
                failed =
                    Some(ReplicaError::Gap { origin: record.origin, next, got: record.own_seq });
                break;
            }
            let progress = if Some(index) == last_data {
                vec![FeedProgress::Tail(source, covered)]
            } else {
                Vec::new()
            };
            match self.add_foreign(record, progress, &mut group, &mut batch) {
                Ok(()) => taken += 1,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if taken > 0 {
            self.sync()?;
            self.write_batch(batch)?;
            metrics::replicated(taken);
        } else {
            // Records that are here already may have arrived another way just before.
            self.sync_rest()?;
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Logs one record as this replica's next record and adds it to the batch.
    fn add_foreign(
        &mut self,
        record: Record,
        progress: Vec<FeedProgress>,
        group: &mut WriteGroup,
        batch: &mut Batch,
    ) -> Result<(), ReplicaError> {
        self.meta.head.floor = self.meta.head.floor.max(record.floor);
        let body = match record.body {
            Body::Data { entries, .. } => {
                let (entries, lost) = self.winners(entries, group)?;
                if lost {
                    self.shared.superseded.note(record.origin, record.own_seq);
                }
                Body::Data { entries, results: Vec::new(), progress }
            }
            body @ (Body::Adopt { .. } | Body::GcFloor { .. }) => body,
            Body::Seal { .. }
            | Body::Unseal { .. }
            | Body::Ingest { .. }
            | Body::RangeState { .. } => {
                return Err(ReplicaError::Refused(
                    "a record that concerns another replica alone was streamed".into(),
                ));
            }
        };
        let logged = Record {
            lsn: self.log.last_lsn().next(),
            synced_lsn: self.shared.log.synced_lsn(),
            body,
            ..record
        };
        self.append(&logged)?;
        add_record(batch, &mut self.meta, &logged).map_err(|error| self.close(error.to_string()))
    }

    /// Returns the entries that win over the stored ones, and whether another one lost against a
    /// different entry.
    fn winners(
        &mut self,
        entries: Vec<KeyEntry>,
        group: &mut WriteGroup,
    ) -> Result<(Vec<KeyEntry>, bool), ReplicaError> {
        let ahead = self.now_us().saturating_add(MAX_CLOCK_AHEAD.as_micros() as u64);
        let moving = self.shared.throttle.moving();
        let mut winners = Vec::with_capacity(entries.len());
        let mut lost = false;
        for incoming in entries {
            let entry = decode_streamed(&incoming)?;
            let event_time = entry.event_time;
            if event_time > ahead {
                alarm_ahead(event_time - ahead);
            }
            let band = band_of(self.meta.identity.shard, &incoming.key, entry.partition_hash)
                .ok_or_else(|| {
                    ReplicaError::Refused("a streamed entry can never live in this shard".into())
                })?;
            if moving.is_some_and(|moving| moving.range.contains(band)) {
                self.shared.throttle.note_taken(key_entry_bytes(&incoming) as u64);
            }
            if !self.meta.ranges.takes(band) {
                // Given away: before that was decided, the new owner had everything that any
                // replica of this shard had accepted. Or arriving and not ingested yet: this
                // replica reads the sources' logs itself, behind its ingest.
                metrics::given_away();
                continue;
            }
            let merged = self.merge(data_key(band, &incoming.key), &incoming, event_time, group)?;
            if merged.conflicts {
                metrics::conflict(merged.wins);
                lost |= !merged.wins;
            }
            if merged.wins {
                winners.push(incoming);
            }
        }
        Ok((winners, lost))
    }
}

/// Warns of a wrong clock. Replication never skips a record: its origin has checked the time.
fn alarm_ahead(by_us: u64) {
    metrics::event_time_ahead();
    static LAST: parking_lot::Mutex<Option<std::time::Instant>> = parking_lot::Mutex::new(None);
    let mut last = LAST.lock();
    if last.is_none_or(|at| at.elapsed() > Duration::from_secs(60)) {
        *last = Some(std::time::Instant::now());
        tracing::warn!(
            ahead_ms = by_us / 1000,
            "a peer sends event times that are too far ahead of this node's clock; check the clocks of both"
        );
    }
}
