//! The progress of a merge of logs: which records it takes, and whether it has reached the target
//! time.
//!
//! **Invariants**
//! - A record is taken once: a record that a checkpoint or another log has brought already is
//!   skipped, even if its entries were deleted and the tombstones purged since.
//! - The records of an origin are taken in order; a record that comes too early is a gap.
//! - Two clocks decide whether a record precedes the target time: its replica's, by the commit
//!   time, and the object store's. Every record whose object the store had received by the target
//!   time precedes it, whatever the commit time. Example: a replica whose clock is a minute ahead
//!   commits at 12:01:00 by its clock, the store receives the chunk at 12:00:05, the target is
//!   12:00:30: the record is applied. A commit time more than [`CLOCK_AHEAD_TRUSTED`] ahead of the
//!   store's time is not trusted to be after the target time.

use std::collections::BTreeMap;

use vasto_core::ids::{Incarnation, Origin, OwnSeq, PlanId, ReplicaId, ShardId, Vector, join};
use vasto_core::limits::CLOCK_AHEAD_TRUSTED;
use vasto_core::record::KeyEntry;
use vasto_shipping::archive::{self, ArchivedCheckpoint, Later, STORE_TIME_GRAIN_US};
use vasto_shipping::chunk::Chunk;

use super::error::BuildError;
use super::filter::ShardFilter;

/// Progress of a merge of logs.
pub(super) struct Taken {
    pub filter: ShardFilter,
    /// The target time, microseconds; `None` applies everything.
    until_us: Option<u64>,
    /// Upper bound of the time at which any record that is read was written, microseconds.
    now_us: u64,
    /// Per origin, the last record that is applied or contained in a merged checkpoint.
    pub seen: Vector,
    /// The last plan whose ingest is contained in a merged checkpoint.
    held: Option<PlanId>,
    /// Commit time of the newest applied record.
    newest_us: u64,
    /// A log without a gap reached the target time.
    pub passed: bool,
    /// The least commit time at or after the target time that is known otherwise: from a newer
    /// checkpoint, or from a log after a gap. Without `passed`, records between it and the newest
    /// applied one may be missing: `NotReached`.
    later_us: Option<u64>,
    /// Per replica, its first known record that is not applied because it was committed after the
    /// target time. Commit times of a replica never fall: all its later records were committed
    /// after the target time too.
    after_target: BTreeMap<ReplicaId, (Incarnation, OwnSeq)>,
    /// Per origin, the last record whose commit time is after the target time, but not trusted
    /// (clock ahead).
    doubtful: BTreeMap<Origin, Doubt>,
}

/// A record of which it is unknown whether it was written before or after the target time.
struct Doubt {
    own_seq: OwnSeq,
    commit_time: u64,
    /// Upper bound of the time at which it was written, microseconds, by the object store's clock.
    held_by_us: u64,
}

impl Taken {
    /// Creates the progress of a merge that begins with a checkpoint, or empty. `now_us`: upper
    /// bound of the time at which any record was written; `later_us`: the commit time of a
    /// checkpoint that is newer than the target time.
    pub(super) fn after(
        base: Option<&ArchivedCheckpoint>,
        filter: ShardFilter,
        until_us: Option<u64>,
        now_us: u64,
        later_us: Option<u64>,
    ) -> Self {
        Self {
            filter,
            until_us,
            now_us: now_us.max(until_us.unwrap_or_default()),
            seen: base.map(|base| base.manifest.vector.clone()).unwrap_or_default(),
            held: base.and_then(|base| base.manifest.ingested),
            newest_us: base.map_or(0, |base| base.manifest.commit_time_max),
            passed: false,
            later_us,
            after_target: BTreeMap::new(),
            doubtful: BTreeMap::new(),
        }
    }

    /// Notes that the rows of another checkpoint are here.
    pub(super) fn add_checkpoint(&mut self, base: &ArchivedCheckpoint) {
        self.seen = join(&self.seen, &base.manifest.vector);
        self.held = self.held.max(base.manifest.ingested);
        self.newest_us = self.newest_us.max(base.manifest.commit_time_max);
    }

    /// Returns the new entries of a chunk; `None` when a record before it is missing. Fails at an
    /// ingest that no merged checkpoint contains. `gapless`:
    /// nothing is missing from the log before it. `held_by_us`: time, microseconds by the object
    /// store's clock, by which the chunk was in the object store, so that none of its records was
    /// written later.
    pub(super) fn new_entries(
        &mut self,
        chunk: &Chunk,
        gapless: bool,
        held_by_us: u64,
    ) -> Result<Option<Vec<KeyEntry>>, BuildError> {
        let mut seen = self.seen.clone();
        let mut newest_us = self.newest_us;
        let mut entries = Vec::new();
        let mut later = Vec::new();
        // A decoded chunk holds whole records only.
        for record in chunk.records().map_while(Result::ok) {
            if let Some(until) = self.until_us {
                // Proven: the object store had the record by the target time, so the clock that
                // assigned a later commit time was ahead.
                let is_later = record.commit_time > until && !archive::is_proven(held_by_us, until);
                if is_later || record.commit_time == until {
                    later.push((record.origin, record.own_seq, record.commit_time));
                }
                if is_later {
                    continue;
                }
            }
            self.filter.check_ingest(&record, self.held)?;
            // Records without an own sequence (seals and other control records that peers do not
            // replicate) concern only the replica that wrote them.
            if record.own_seq.0 > 0 {
                let last = seen.get(&record.origin).copied().unwrap_or_default();
                if record.own_seq <= last {
                    continue;
                }
                if record.own_seq > OwnSeq(last.0 + 1) {
                    return Ok(None);
                }
                seen.insert(record.origin, record.own_seq);
            }
            newest_us = newest_us.max(record.commit_time);
            entries.extend(self.filter.pick(record));
        }
        (self.seen, self.newest_us) = (seen, newest_us);
        for (origin, own_seq, commit_time) in later {
            self.note_later(origin, own_seq, commit_time, gapless, held_by_us);
        }
        Ok(Some(entries))
    }

    /// Evaluates a record whose commit time is the target time, or is later and left it unapplied:
    /// is it evidence that the log reaches the target time?
    /// - local: the record has no own sequence (peers do not replicate it);
    /// - applied: it is applied already, from this log, another one or a checkpoint;
    /// - trusted: its commit time is at most [`CLOCK_AHEAD_TRUSTED`] after `held_by_us`, so its
    ///   clock was not ahead;
    /// - after: `after_target` holds this record or an earlier one of the same replica.
    ///
    /// | local | applied | trusted | after | result |
    /// |---|---|---|---|---|
    /// | yes | – | yes | – | evidence |
    /// | yes | – | no | – | ignored |
    /// | no | yes | – | – | evidence |
    /// | no | no | yes | – | evidence; enters `after_target` if it is the first of its replica |
    /// | no | no | no | yes | evidence |
    /// | no | no | no | no | enters `doubtful`: an error in the end unless it was applied |
    ///
    /// Evidence in a log that is `gapless` sets `passed`; after a gap it lowers `later_us`.
    fn note_later(
        &mut self,
        origin: Origin,
        own_seq: OwnSeq,
        commit_time: u64,
        gapless: bool,
        held_by_us: u64,
    ) {
        let is_local = own_seq.0 == 0;
        let is_applied = !is_local && self.seen.get(&origin).is_some_and(|seen| *seen >= own_seq);
        let held_by_us = held_by_us.min(self.now_us);
        let trusted =
            commit_time <= held_by_us.saturating_add(CLOCK_AHEAD_TRUSTED.as_micros() as u64);
        let point = (origin.incarnation, own_seq);
        let is_after_target =
            self.after_target.get(&origin.replica).is_some_and(|first| point >= *first);
        if is_local && !trusted {
            return;
        }
        if !is_applied && !trusted && !is_after_target {
            let doubt = Doubt { own_seq, commit_time, held_by_us };
            let last = self.doubtful.entry(origin).or_insert(Doubt { ..doubt });
            if last.own_seq < own_seq {
                *last = doubt;
            }
            return;
        }
        if !is_applied && !is_local && trusted {
            let first = self.after_target.entry(origin.replica).or_insert(point);
            *first = point.min(*first);
        }
        self.passed |= gapless;
        if !gapless {
            self.later_us = self.later_us.into_iter().chain([commit_time]).min();
        }
    }

    /// Returns true when the log up to this newer checkpoint need not be read: for each origin,
    /// every record that the checkpoint contains is applied already, or was committed after the
    /// target time (`after_target`).
    pub(super) fn needs_nothing_before(&self, later: &Later) -> bool {
        self.until_us.is_some()
            // The log before it may hold an ingest, which is no record of any origin.
            && later.ingested <= self.held
            && later.vector.iter().all(|(origin, seq)| {
                let next = OwnSeq(self.seen.get(origin).copied().unwrap_or_default().0 + 1);
                let is_after_target =
                    |first: &(Incarnation, OwnSeq)| (origin.incarnation, next) >= *first;
                *seq < next || self.after_target.get(&origin.replica).is_some_and(is_after_target)
            })
    }

    /// Checks, when every log has been read, that nothing before the target time can be missing.
    ///
    /// # Errors
    /// `ClockAhead` when a doubtful record was not applied: it may have preceded the target time.
    /// `NotReached` when the logs end before it.
    pub(super) fn check_end(&self, shard: ShardId) -> Result<(), BuildError> {
        self.check_doubtful(shard)?;
        match self.later_us {
            Some(next_us) if !self.passed && self.until_us.is_some() => {
                Err(BuildError::NotReached { shard, reached_us: self.newest_us, next_us })
            }
            _ => Ok(()),
        }
    }

    fn check_doubtful(&self, shard: ShardId) -> Result<(), BuildError> {
        let open = |(origin, doubt): &(&Origin, &Doubt)| {
            self.seen.get(origin).is_none_or(|seen| *seen < doubt.own_seq)
        };
        let Some((origin, doubt)) = self.doubtful.iter().find(open) else { return Ok(()) };
        Err(BuildError::ClockAhead {
            shard,
            replica: origin.replica,
            ahead_s: doubt.commit_time.saturating_sub(doubt.held_by_us).div_ceil(1_000_000),
            stamped_us: doubt.commit_time,
            from_us: doubt.held_by_us.saturating_add(STORE_TIME_GRAIN_US),
        })
    }
}
