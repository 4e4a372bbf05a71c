//! Application of log records to the database: the one function for replay and control records.
//!
//! **Invariant:** applying a record is a pure function of the record and the metadata before it,
//! so a replay after a crash gives the same database as the first application did.

use vasto_core::Band;
use vasto_core::codec::DecodeError;
use vasto_core::entry::{Entry, event_time_of};
use vasto_core::hash::partition_hash;
use vasto_core::ids::{Origin, OwnSeq, ShardId, Vector};
use vasto_core::record::{Body, FeedProgress, KeyEntry, OpResult, RangeState, Record};
use vasto_core::stored_key::{MetaKey, data_key};

use super::state::{Head, Identity, Ranges, Seal};
use crate::engine::Batch;

/// The metadata that records change.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    /// Identity of the replica.
    pub identity: Identity,
    /// Head of the replica: LSN, times, floor, epoch.
    pub head: Head,
    /// State of its bands.
    pub ranges: Ranges,
    /// Per origin, the last record that is applied.
    pub vector: Vector,
    /// Commit time of the last record that stored something.
    pub data_commit_time: u64,
    /// Changed entries of the vector that are not published yet.
    pub news: Vec<(Origin, OwnSeq)>,
}

impl Meta {
    /// Returns true when this replica first accepted the record, in any incarnation.
    pub(super) fn is_own(&self, record: &Record) -> bool {
        record.origin.replica == self.identity.replica
    }
}

/// A record that cannot be applied.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ApplyError {
    /// An entry does not decode.
    #[error("an entry of record {lsn} is damaged: {source}")]
    Entry {
        /// LSN of the record.
        lsn: u64,
        /// The decode error.
        source: DecodeError,
    },
    /// A key can never belong to this shard.
    #[error("record {lsn} holds a key that can never live in shard {shard}")]
    Foreign {
        /// LSN of the record.
        lsn: u64,
        /// This shard.
        shard: ShardId,
    },
}

/// Returns the band of an entry inside a shard; `None` when the key can never belong to the shard.
pub(super) fn band_of(shard: ShardId, user_key: &[u8], own_partition: Option<u64>) -> Option<Band> {
    Band::in_shard(own_partition.unwrap_or_else(|| partition_hash(user_key)), shard)
}

/// Adds an entry to the batch.
pub(super) fn put_entry(batch: &mut Batch, meta: &mut Meta, stored_key: &[u8], encoded: &[u8]) {
    batch.put(stored_key, encoded);
    let event_time = event_time_of(encoded).unwrap_or(0);
    meta.head.event_time_max = meta.head.event_time_max.max(event_time);
}

/// Adds results of read-modify-writes to the batch.
pub(super) fn put_results(batch: &mut Batch, results: &[OpResult]) {
    for result in results {
        batch.put_meta(MetaKey::Result(result.client, result.sequence), &result.outcome);
    }
}

/// Adds the cursor changes of a record to the batch.
pub(super) fn put_progress(batch: &mut Batch, progress: &[FeedProgress]) {
    for cursor in progress {
        match cursor {
            FeedProgress::Tail(replica, lsn) => {
                batch.put_meta(MetaKey::TailCursor(*replica), &lsn.0.to_le_bytes())
            }
            FeedProgress::Forward(shard, lsn) => {
                batch.put_meta(MetaKey::ForwardCursor(shard.0), &lsn.0.to_le_bytes())
            }
        }
    }
}

/// Advances the head past a record and adds it to the batch.
pub(super) fn put_head(batch: &mut Batch, meta: &mut Meta, record: &Record) {
    let head = &mut meta.head;
    head.applied_lsn = record.lsn;
    if matches!(&record.body, Body::Data { entries, .. } if !entries.is_empty()) {
        meta.data_commit_time = meta.data_commit_time.max(record.commit_time);
    }
    head.commit_time_max = head.commit_time_max.max(record.commit_time);
    head.floor = head.floor.max(record.floor);
    // Epochs applied and commit times assigned by another replica say nothing about this one.
    if record.origin.replica == meta.identity.replica {
        head.commit_time = head.commit_time.max(record.commit_time);
        head.epoch = head.epoch.max(record.epoch);
    }
    if record.own_seq.0 > 0 {
        if record.origin == meta.identity.origin() {
            head.own_seq = record.own_seq;
        }
        meta.vector.insert(record.origin, record.own_seq);
        meta.news.push((record.origin, record.own_seq));
        batch.put_meta(MetaKey::Vector(record.origin), &record.own_seq.0.to_le_bytes());
    }
    batch.put_meta(MetaKey::Head, &head.encode());
}

/// Builds the batch of a record and advances `meta` past it.
pub(super) fn apply_record(meta: &mut Meta, record: &Record) -> Result<Batch, ApplyError> {
    let mut batch = Batch::default();
    add_record(&mut batch, meta, record)?;
    Ok(batch)
}

/// Adds the changes of a record to the batch and advances `meta` past it.
pub(super) fn add_record(
    batch: &mut Batch,
    meta: &mut Meta,
    record: &Record,
) -> Result<(), ApplyError> {
    match &record.body {
        Body::Data { entries, results, progress } => {
            for KeyEntry { key, entry: encoded } in entries {
                let entry = Entry::decode(encoded)
                    .map_err(|source| ApplyError::Entry { lsn: record.lsn.0, source })?;
                let band = band_of(meta.identity.shard, key, entry.partition_hash)
                    .ok_or(ApplyError::Foreign { lsn: record.lsn.0, shard: meta.identity.shard })?;
                put_entry(batch, meta, &data_key(band, key), encoded);
            }
            put_results(batch, results);
            put_progress(batch, progress);
        }
        Body::GcFloor { floor } => meta.head.floor = meta.head.floor.max(*floor),
        // An adopt record of a peer, or an own one that was pulled back, changes nothing here.
        Body::Adopt { .. }
            if !meta.is_own(record) || record.origin.incarnation <= meta.identity.incarnation => {}
        Body::Adopt { .. } => {
            meta.identity.incarnation = record.origin.incarnation;
            meta.head.own_seq = OwnSeq(0);
            batch.put_meta(MetaKey::Identity, &meta.identity.encode());
        }
        Body::Seal { plan, version, range } => {
            meta.ranges.seal = Some(Seal {
                plan: *plan,
                version: *version,
                range: *range,
                lsn: record.lsn,
                since: None,
            });
            meta.head.version = meta.head.version.max(*version);
        }
        Body::Unseal { version, .. } => {
            meta.ranges.seal = None;
            meta.head.version = meta.head.version.max(*version);
        }
        Body::Ingest { plan, event_time_max, progress, .. } => {
            meta.ranges.ingested = Some(*plan);
            meta.ranges.arrives_anew = false;
            meta.head.event_time_max = meta.head.event_time_max.max(*event_time_max);
            put_progress(batch, progress);
        }
        Body::RangeState { version, range, state } => {
            meta.ranges.set(*range, *state);
            if *state == RangeState::Arriving {
                meta.ranges.arrives_anew = true;
            }
            meta.head.version = meta.head.version.max(*version);
            if *state == RangeState::Clearing {
                batch.delete_bands(*range);
            }
            // Ownership is decided: a seal that overlaps this range is no longer needed.
            if meta.ranges.seal.is_some_and(|seal| seal.range.overlaps(*range)) {
                meta.ranges.seal = None;
            }
        }
    }
    if matches!(
        record.body,
        Body::Seal { .. } | Body::Unseal { .. } | Body::Ingest { .. } | Body::RangeState { .. }
    ) {
        batch.put_meta(MetaKey::RangeStates, &meta.ranges.encode());
    }
    put_head(batch, meta, record);
    Ok(())
}
