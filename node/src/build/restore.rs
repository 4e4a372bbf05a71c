//! The logs of all archives of a shard are merged into a new keyspace, up to a target time.
//!
//! **Invariants**
//! - A record is applied once, whichever archives hold it (see [`Taken`]).
//! - Nothing is skipped in silence: a record that is missing from every log is an error, and so is
//!   a target time after the end of every log.

use vasto_core::entry::Entry;
use vasto_core::ids::covers;
use vasto_core::record::FeedProgress;

use super::bootstrap::{Bootstrap, fork_cursor, tail_cursor};
use super::error::BuildError;
use super::filter::ShardFilter;
use super::groups::apply_in_groups;
use super::sources::{Ended, Reading, RestoreSource, RestoreSources};
use super::taken::Taken;
use crate::engine::EngineError;
use crate::replica::Replica;

impl Bootstrap {
    /// Applies everything that was shipped of a shard until the target time to a replica of a new
    /// keyspace, which takes over neither vector nor cursors. The first source's checkpoint is its
    /// database already.
    ///
    /// # Errors
    /// `Gap` when a record is missing from every log, `NotReached` when the logs end before the
    /// target time, `ClockAhead` when it cannot be decided whether a record precedes the target
    /// time.
    pub(crate) async fn merge_all(
        &self,
        replica: &Replica,
        sources: &RestoreSources,
        shards: u32,
        until_us: Option<u64>,
    ) -> Result<(), BuildError> {
        let first = sources.all.first().and_then(|source| source.base.as_ref());
        let filter = ShardFilter { shard: replica.shard, shards };
        let mut taken =
            Taken::after(first, filter, until_us, self.registry.clock.now_us(), sources.later_us);
        for source in sources.all.iter().skip(1) {
            self.merge_base(replica, source, &mut taken).await?;
        }
        let mut logs: Vec<_> =
            sources.all.iter().map(|source| Reading::after(source, source.start())).collect();
        let mut may_take_up_set_aside = !sources.set_aside.is_empty();
        // A log with a gap waits for the records of the others.
        while !logs.is_empty() {
            let (mut waiting, mut moved, mut gap) = (Vec::new(), false, None);
            for mut reading in logs {
                let from = reading.log.at;
                let ended = self.merge_log(replica, &mut reading, &mut taken).await?;
                moved |= reading.log.at > from;
                match ended {
                    Ended::AtEnd => {
                        moved = true;
                        self.progress
                            .lock()
                            .reached
                            .push((reading.log.owner.replica, reading.log.at));
                        // A newer manifest may have been skipped because it could not be read: the
                        // log must reach its LSN, or the records between would be lost in silence.
                        if until_us.is_none() {
                            reading.check_end()?;
                        }
                    }
                    Ended::Gap(chunk) => {
                        gap = Some((reading.log.owner, chunk));
                        waiting.push(reading);
                    }
                }
            }
            logs = waiting;
            if let (false, Some((owner, chunk))) = (moved, gap) {
                if !std::mem::take(&mut may_take_up_set_aside) {
                    return Err(BuildError::gap(owner, chunk));
                }
                for source in sources.take_up_set_aside(chunk) {
                    self.merge_base(replica, source, &mut taken).await?;
                    logs.push(Reading::after(source, source.start()));
                }
            }
        }
        taken.check_end(replica.shard)?;
        self.count_rows_of_logs(replica, sources).await
    }

    /// Merges the rows of another replica's checkpoint, unless `taken.seen` covers its vector.
    /// Stores its LSN as a cursor, so that it is not merged again after a restart.
    async fn merge_base(
        &self,
        replica: &Replica,
        source: &RestoreSource,
        taken: &mut Taken,
    ) -> Result<(), BuildError> {
        let Some(base) = &source.base else { return Ok(()) };
        let cursor = fork_cursor(source.owner.replica);
        let merged_before_a_restart =
            tail_cursor(replica, cursor)?.is_some_and(|lsn| lsn >= base.manifest.lsn);
        if !merged_before_a_restart {
            if !covers(&taken.seen, &base.manifest.vector) {
                self.merge_rows(replica, base, taken.filter.shards).await?;
            }
            replica.apply(Vec::new(), vec![FeedProgress::Tail(cursor, base.manifest.lsn)]).await?;
        }
        taken.add_checkpoint(base);
        Ok(())
    }

    /// Reads and applies a log until its end or a gap; skips to a newer checkpoint where nothing
    /// before it is needed.
    async fn merge_log(
        &self,
        replica: &Replica,
        reading: &mut Reading<'_>,
        taken: &mut Taken,
    ) -> Result<Ended, BuildError> {
        let (source, log) = (reading.source, &mut reading.log);
        loop {
            let newest_unneeded = source
                .later
                .iter()
                .rev()
                .find(|later| later.lsn > log.at && taken.needs_nothing_before(later));
            if let Some(later) = newest_unneeded {
                taken.passed |= log.gapless;
                log.at = later.lsn;
            }
            let Some(chunk) = self.next_listed(log).await? else {
                // The log is complete up to a checkpoint that is newer than the target time: the
                // target is reached.
                taken.passed |=
                    log.gapless && source.later.first().is_some_and(|later| log.at >= later.lsn);
                return Ok(Ended::AtEnd);
            };
            let held_by_us = source.times.chunk_held_by(chunk.first_lsn, chunk.last_lsn);
            let Some(entries) = taken.new_entries(&chunk, log.gapless, held_by_us)? else {
                return Ok(Ended::Gap(chunk.first_lsn));
            };
            apply_in_groups(replica, entries, Vec::new()).await?;
            self.note_followed(replica, &chunk, fork_cursor).await?;
            log.at = chunk.last_lsn;
            self.registry.report.notify_one();
        }
    }

    /// Counts the rows when only logs have brought them: without a checkpoint no manifest states
    /// their number.
    pub(super) async fn count_rows_of_logs(
        &self,
        replica: &Replica,
        sources: &RestoreSources,
    ) -> Result<(), BuildError> {
        if sources.all.iter().any(|source| source.base.is_some()) {
            return Ok(());
        }
        let target = replica.clone();
        let counting = tokio::task::spawn_blocking(move || {
            target.engine().flush()?;
            Ok::<_, EngineError>((count_values(&target)?, target.size().1))
        });
        let (keys, bytes) = counting.await??;
        let mut progress = self.progress.lock();
        (progress.keys_moved, progress.bytes_moved) = (keys, bytes);
        (progress.bytes_total, progress.bytes_done) = (bytes, bytes);
        Ok(())
    }
}

/// Counts the values that a replica holds.
fn count_values(replica: &Replica) -> Result<u64, EngineError> {
    let view = replica.engine().view();
    let mut count = 0;
    for band in replica.ranges().owned() {
        let mut rows = view.cursor(&[band.0], vec![band.0 + 1]);
        while let Some((_, entry)) = rows.current()? {
            count += u64::from(Entry::decode(entry).is_ok_and(|entry| entry.payload.is_some()));
            rows.advance();
        }
    }
    Ok(count)
}
