//! Replay of the logs in the bucket with their records unchanged: the replica becomes, or stays, a
//! member of its shard.
//!
//! **Invariants**
//! - A record keeps its origin and own sequence and is taken once; a record that is here already is
//!   skipped.
//! - The records of an origin are taken in order: a record missing from every log is an error.

use vasto_core::ids::{Lsn, PlanId, ReplicaId, covers};
use vasto_core::record::{Body, RECORD_HEADER_BYTES, Record};
use vasto_shipping::archive;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout::Owner;

use super::bootstrap::{Bootstrap, tail_cursor};
use super::chunks::ChunkReader;
use super::error::BuildError;
use super::filter::ShardFilter;
use super::groups::{Groups, apply_in_groups};
use super::sources::{Ended, Reading, RestoreSource, RestoreSources};
use crate::replica::Replica;
use crate::replica::command::ReplicaError;

impl Bootstrap {
    /// Applies the log after the first candidate's checkpoint as it is, up to its last chunk. The
    /// logs of the other candidates follow when the first one is not the replaced replica, or
    /// continues what others have shipped.
    ///
    /// # Errors
    /// When a chunk before the last listed one is missing, of the replaced replica or of the
    /// replicas whose archives its log continues.
    pub(crate) async fn join_all(
        &self,
        replica: &Replica,
        sources: &RestoreSources,
        replaced: ReplicaId,
        shards: u32,
    ) -> Result<(), BuildError> {
        let Some((first, others)) = sources.all.split_first() else { return Ok(()) };
        let held = first.base.as_ref().and_then(|base| base.manifest.ingested);
        let ingests = Ingests { filter: ShardFilter { shard: replica.shard, shards }, held };
        let is_needed = |source: &RestoreSource| {
            source.owner == first.owner || sources.chain.contains(&source.owner.replica)
        };
        let mut logs = vec![Reading::after(
            first,
            tail_cursor(replica, first.owner.replica)?.unwrap_or_default(),
        )];
        // The log of the replaced replica may begin where another replica's log ends. A gap in any
        // other log does not affect it.
        let mut needs_others = first.owner.replica != replaced;
        let mut others = Some(others).filter(|all| !all.is_empty());
        let mut may_take_up_set_aside = !sources.set_aside.is_empty();
        while !logs.is_empty() {
            let (mut waiting, mut moved, mut gap) = (Vec::new(), false, None);
            for mut reading in logs {
                let from = reading.log.at;
                match self.join_log(replica, &mut reading.log, ingests, &mut needs_others).await? {
                    Ended::AtEnd => {
                        reading.check_end()?;
                        moved = true;
                        self.progress
                            .lock()
                            .reached
                            .push((reading.log.owner.replica, reading.log.at));
                    }
                    Ended::Gap(chunk) => {
                        moved |= reading.log.at > from;
                        needs_others = true;
                        gap =
                            gap.or(is_needed(reading.source).then_some((reading.log.owner, chunk)));
                        waiting.push(reading);
                    }
                }
            }
            logs = waiting;
            if let Some(others) = others.take_if(|_| needs_others) {
                for source in others {
                    let base = source
                        .base
                        .as_ref()
                        .filter(|base| covers(&replica.vector(), &base.manifest.vector));
                    logs.push(Reading::after(
                        source,
                        base.map_or(Lsn(0), |base| base.manifest.lsn),
                    ));
                }
            } else if !moved {
                let Some((owner, chunk)) = gap else { break };
                if !std::mem::take(&mut may_take_up_set_aside) {
                    return Err(BuildError::gap(owner, chunk));
                }
                logs.extend(
                    sources.take_up_set_aside(chunk).map(|source| Reading::after(source, Lsn(0))),
                );
            }
        }
        // Own sequences begin anew with each opening of their origin: records that a checkpoint
        // covers and no log has brought show up as missing only in its vector.
        let held = replica.vector();
        let needed = sources
            .all
            .iter()
            .filter(|source| is_needed(source))
            .filter_map(|source| source.base.as_ref());
        if let Some(base) = { needed }.find(|base| !covers(&held, &base.manifest.vector)) {
            return Err(BuildError::Gap { shard: replica.shard, chunk: base.key.clone() });
        }
        self.count_rows_of_logs(replica, sources).await
    }

    /// Takes a log until its end or a gap. `needs_others`: set when one of its chunks continues the
    /// archive of another replica.
    async fn join_log(
        &self,
        replica: &Replica,
        log: &mut ChunkReader,
        ingests: Ingests,
        needs_others: &mut bool,
    ) -> Result<Ended, BuildError> {
        while let Some(chunk) = self.next_listed(log).await? {
            *needs_others |= archive::goes_on_behind_another(&chunk);
            for record in log.records(&chunk) {
                ingests.filter.check_ingest(&record, ingests.held)?;
            }
            match join(replica, log, &chunk).await {
                Err(ReplicaError::Gap { .. }) => return Ok(Ended::Gap(chunk.first_lsn)),
                other => other?,
            }
            self.note_followed(replica, &chunk, |source| source).await?;
            log.at = chunk.last_lsn;
            self.registry.report.notify_one();
        }
        Ok(Ended::AtEnd)
    }

    /// Applies the records that another member of the shard has shipped and this replica does not
    /// hold.
    ///
    /// # Errors
    /// When preceding records are missing both here and in the bucket: nothing after them is
    /// applied.
    pub(crate) async fn join_what_was_shipped(
        &self,
        replica: &Replica,
        source: ReplicaId,
        shards: u32,
    ) -> Result<Lsn, BuildError> {
        let archived =
            archive::archives(&self.bucket, replica.keyspace, replica.shard).await?.remove(&source);
        let archived = archived.unwrap_or_default();
        let owner = Owner { keyspace: replica.keyspace, shard: replica.shard, replica: source };
        let newest = archive::newest_checkpoint(&self.bucket, owner, &archived, None).await?.base;
        let pulled = tail_cursor(replica, source)?.unwrap_or_default();
        let first = archived.chunks.first().copied().unwrap_or_default();
        // Rows that only a checkpoint holds have no records to join: they are merged, and so is the
        // log after them.
        let to_merge = newest.filter(|base| {
            !covers(&replica.vector(), &base.manifest.vector) && pulled < base.manifest.lsn
        });
        let reaches_back = !archived.chunks.is_empty() && first <= pulled.next();
        let to_merge = to_merge.filter(|_| !reaches_back);
        let at = match &to_merge {
            Some(base) => {
                self.merge_rows(replica, base, shards).await?;
                base.manifest.lsn
            }
            None => pulled.max(Lsn(first.0.saturating_sub(1))),
        };
        let filter = ShardFilter { shard: replica.shard, shards };
        let mut log = ChunkReader::after(owner, archived.chunks, at);
        while let Some(chunk) = log.next(&self.reader()).await? {
            if to_merge.is_some() {
                apply_in_groups(replica, log.entries(&chunk, filter), Vec::new()).await?;
            } else {
                join(replica, &log, &chunk).await?;
            }
            log.at = chunk.last_lsn;
        }
        Ok(log.at)
    }
}

/// What the rows of a shard's ingests are checked against.
#[derive(Clone, Copy)]
struct Ingests {
    filter: ShardFilter,
    /// The last plan whose ingest the first checkpoint contains.
    held: Option<PlanId>,
}

/// Takes the records of a chunk after the position of its log.
async fn join(replica: &Replica, log: &ChunkReader, chunk: &Chunk) -> Result<(), ReplicaError> {
    let source = log.owner.replica;
    let mut groups = Groups::new();
    // Records without an own sequence concern only the source replica.
    for record in log.records(chunk).filter(|record| record.own_seq.0 > 0) {
        let (covered, bytes) = (record.lsn, bytes_of(&record));
        if let Some(group) = groups.push(record, bytes) {
            replica.replicate(source, group, covered).await?;
        }
    }
    replica.replicate(source, groups.rest(), chunk.last_lsn).await
}

fn bytes_of(record: &Record) -> usize {
    let Body::Data { entries, .. } = &record.body else { return RECORD_HEADER_BYTES };
    RECORD_HEADER_BYTES + entries.iter().map(|row| row.key.len() + row.entry.len()).sum::<usize>()
}
