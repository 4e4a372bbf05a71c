//! What the bucket holds of a shard's past: which replicas shipped it, with which one to begin, and how
//! the logs of all of them come together in a new keyspace.
//!
//! **Invariants**
//! - A record is taken over once: one that a checkpoint or another log has brought already is passed by,
//!   also when what it did was deleted and forgotten since.
//! - Nothing is passed over in silence. The records of an origin are taken in order; one that is missing
//!   from every log, a moment that no log reaches, and a past that was collected are errors that say so.
//! - The choice of what to begin with is made once and kept, whatever is shipped meanwhile.

use std::path::Path;

use serde::{Deserialize, Serialize};
use vasto_core::ids::{KeyspaceId, Lsn, OwnSeq, ReplicaId, ShardId, Vector, covers, join};
use vasto_core::limits::GROUP_BYTES_MAX;
use vasto_core::record::{KeyEntry, Progress};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::history::{self, Base, HistoryError, Newest};
use vasto_shipping::layout::{self, Owner};

use crate::bootstrap::{Bootstrap, BootstrapError, Log, cursor_of};
use crate::node_dir::{read_json, write_json};
use crate::replica::Replica;
use crate::tail::Filter;

/// What one replica has shipped of a shard.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Whose objects.
    pub owner: Owner,
    /// The checkpoint to begin with; `None` begins with nothing, and the first chunk.
    pub base: Option<Base>,
    /// First LSNs of the chunks that were listed, rising.
    pub chunks: Vec<Lsn>,
    /// The log that was shipped reaches at least to here.
    pub end: Lsn,
}

impl Candidate {
    /// Where its log begins to matter.
    pub(crate) fn start(&self) -> Lsn {
        self.base.as_ref().map_or(Lsn(0), |base| base.manifest.lsn)
    }

    /// Nothing was listed behind this LSN, or it is an error that names the first thing that is missing.
    pub(crate) fn ends_at(&self, at: Lsn) -> Result<(), HistoryError> {
        if at >= self.end {
            return Ok(());
        }
        Err(HistoryError::Missing(layout::chunk(self.owner.keyspace, self.owner.shard, self.owner.replica, at.next())))
    }

    /// The first chunk that was listed behind an LSN.
    fn next_listed(&self, at: Lsn) -> Option<Lsn> {
        self.chunks.get(self.chunks.partition_point(|first| *first <= at)).copied()
    }
}

/// All replicas whose objects can bring back a shard, the best one first.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    /// They.
    pub all: Vec<Candidate>,
    /// The greatest commit time in the oldest checkpoint that is newer than the wanted time.
    pub later_us: Option<u64>,
}

/// Looks at everything that was shipped of a shard.
///
/// # Errors
/// `NotRetained` when there is something, but nothing that reaches back to the time.
pub async fn candidates(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
    preferred: &[ReplicaId],
    discarded: &[ReplicaId],
    until_us: Option<u64>,
) -> Result<Candidates, BootstrapError> {
    let mut found = Candidates::default();
    let mut anything = false;
    for (replica, folder) in history::folders(bucket, keyspace, shard).await? {
        if discarded.contains(&replica) {
            continue;
        }
        let owner = Owner { keyspace, shard, replica };
        let from_the_start = folder.chunks.first() == Some(&Lsn(1));
        let newest = match history::newest_base(bucket, owner, &folder.manifests, until_us).await {
            Err(error) if from_the_start && !matches!(error, HistoryError::Bucket(_)) => {
                tracing::warn!(%error, "no checkpoint can be read; the log is read from its beginning");
                Newest::default()
            }
            other => other?,
        };
        anything |= !folder.manifests.is_empty() || !folder.chunks.is_empty();
        found.later_us = found.later_us.into_iter().chain(newest.later_us).min();
        // A log whose beginning is not there means nothing without a checkpoint.
        if newest.base.is_some() || from_the_start {
            let end = folder.manifests.last().into_iter().chain(folder.chunks.last()).max();
            let end = end.copied().unwrap_or_default();
            found.all.push(Candidate { owner, base: newest.base, chunks: folder.chunks, end });
        }
    }
    if anything && found.all.is_empty() {
        return Err(BootstrapError::NotRetained { shard, oldest: found.later_us.map(time_text) });
    }
    let rank = |one: &Candidate| preferred.iter().position(|id| *id == one.owner.replica).unwrap_or(preferred.len());
    let commit_time = |one: &Candidate| one.base.as_ref().map_or(0, |base| base.manifest.commit_time_max);
    found.all.sort_by_key(|one| (rank(one), one.base.is_none(), std::cmp::Reverse(commit_time(one))));
    Ok(found)
}

/// A moment as people write it.
fn time_text(us: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_micros(us);
    humantime::format_rfc3339_micros(time).to_string()
}

/// [`Candidates`] by name, as they are kept for the next attempt.
#[derive(Serialize, Deserialize)]
struct Kept {
    all: Vec<KeptOne>,
    later_us: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct KeptOne {
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
    base: Option<String>,
    chunks: Vec<Lsn>,
    end: Lsn,
}

/// The choice that an earlier attempt made, or the one that `choose` makes now.
pub async fn chosen(
    bucket: &Bucket,
    path: &Path,
    choose: impl Future<Output = Result<Candidates, BootstrapError>>,
) -> Result<Candidates, BootstrapError> {
    if let Some(kept) = read_json::<Kept>(path)? {
        let mut all = Vec::with_capacity(kept.all.len());
        for one in kept.all {
            let base = match &one.base {
                Some(key) => Some(history::manifest_at(bucket, key).await?),
                None => None,
            };
            let owner = Owner { keyspace: one.keyspace, shard: one.shard, replica: one.replica };
            all.push(Candidate { owner, base, chunks: one.chunks, end: one.end });
        }
        return Ok(Candidates { all, later_us: kept.later_us });
    }
    let found = choose.await?;
    let all = found.all.iter().map(|one| KeptOne {
        keyspace: one.owner.keyspace,
        shard: one.owner.shard,
        replica: one.owner.replica,
        base: one.base.as_ref().map(|base| base.key.clone()),
        chunks: one.chunks.clone(),
        end: one.end,
    });
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|source| BootstrapError::Io { path: dir.to_owned(), source })?;
    }
    write_json(path, &Kept { all: all.collect(), later_us: found.later_us })?;
    Ok(found)
}

/// How far the logs were taken over.
struct Taken {
    filter: Filter,
    until_us: Option<u64>,
    /// Per origin, the last record that is in.
    seen: Vector,
    /// Commit time of the newest record that is in.
    newest_us: u64,
    /// A log went on beyond the wanted time, without a hole.
    passed: bool,
    /// The first moment behind the wanted time that something else knows of.
    later_us: Option<u64>,
}

/// Why the reading of a log ended.
enum Ended {
    /// There is no more of it.
    There,
    /// A record of an origin is missing before this chunk; another log may have it.
    Gap(Lsn),
}

impl Taken {
    /// What of a chunk is new; `None` when a record before it is missing. `whole`: nothing is missing from
    /// the log before it.
    fn news(&mut self, chunk: &Chunk, whole: bool) -> Option<Vec<KeyEntry>> {
        let mut seen = self.seen.clone();
        let (mut newest_us, mut passed, mut later_us) = (self.newest_us, self.passed, self.later_us);
        let mut entries = Vec::new();
        // A chunk that was decoded holds whole records only.
        for record in chunk.records().map_while(Result::ok) {
            if let Some(until) = self.until_us {
                if record.commit_time >= until {
                    passed |= whole;
                    later_us = later_us.into_iter().chain((!whole).then_some(record.commit_time)).min();
                }
                if record.commit_time > until {
                    continue;
                }
            }
            // Those without a number concern the other replica alone.
            if record.own_seq.0 > 0 {
                let have = seen.get(&record.origin).copied().unwrap_or_default();
                if record.own_seq <= have {
                    continue;
                }
                if record.own_seq > OwnSeq(have.0 + 1) {
                    return None;
                }
                seen.insert(record.origin, record.own_seq);
            }
            newest_us = newest_us.max(record.commit_time);
            entries.extend(self.filter.pick(record));
        }
        (self.seen, self.newest_us, self.passed, self.later_us) = (seen, newest_us, passed, later_us);
        Some(entries)
    }
}

impl Bootstrap {
    /// Takes over all that was shipped of a shard until a time, into a replica with a history of its own.
    /// The first candidate's checkpoint is its database already.
    ///
    /// # Errors
    /// `Gap` and `NotReached` when the bucket does not hold all of it.
    pub async fn merge_all(
        &self,
        replica: &Replica,
        found: &Candidates,
        shards: u32,
        until_us: Option<u64>,
    ) -> Result<(), BootstrapError> {
        let filter = Filter { shard: replica.shard, shards };
        let first = found.all.first().and_then(|one| one.base.as_ref());
        let mut taken = Taken {
            filter,
            until_us,
            seen: first.map(|base| base.manifest.vector.clone()).unwrap_or_default(),
            newest_us: first.map_or(0, |base| base.manifest.commit_time_max),
            passed: false,
            later_us: found.later_us,
        };
        for one in found.all.iter().skip(1) {
            self.merge_base(replica, one, &mut taken, shards).await?;
        }
        let mut logs: Vec<(&Candidate, Lsn)> = found.all.iter().map(|one| (one, one.start())).collect();
        // A log with a gap waits for what the others bring.
        while !logs.is_empty() {
            let (mut waiting, mut moved) = (Vec::new(), false);
            let mut gap = None;
            for (one, from) in logs {
                let mut at = from;
                let ended = self.read_on(replica, one, &mut at, &mut taken).await?;
                moved |= at > from;
                match ended {
                    Ended::There => {
                        moved = true;
                        self.progress.lock().reached.push((one.owner.replica, at));
                        // The end of a manifest that could not be read must have been reached by the log.
                        if until_us.is_none() {
                            one.ends_at(at)?;
                        }
                    }
                    Ended::Gap(first) => {
                        gap = Some((one.owner, first));
                        waiting.push((one, at));
                    }
                }
            }
            if let (false, Some((owner, first))) = (moved, gap) {
                let chunk = layout::chunk(owner.keyspace, owner.shard, owner.replica, first);
                return Err(BootstrapError::Gap { shard: replica.shard, chunk });
            }
            logs = waiting;
        }
        match taken.later_us {
            Some(later_us) if !taken.passed && until_us.is_some() => Err(BootstrapError::NotReached {
                shard: replica.shard,
                reached: time_text(taken.newest_us),
                next: time_text(later_us),
            }),
            _ => Ok(()),
        }
    }

    /// Merges the rows of another replica's checkpoint when what is in does not cover it.
    async fn merge_base(
        &self,
        replica: &Replica,
        other: &Candidate,
        taken: &mut Taken,
        shards: u32,
    ) -> Result<(), BootstrapError> {
        let Some(base) = &other.base else { return Ok(()) };
        let log = Log::Past { shards, until_us: taken.until_us };
        let cursor = cursor_of(log, other.owner.replica);
        // Merged before a restart.
        let merged = replica.tail_cursors()?.iter().any(|(id, lsn)| *id == cursor && *lsn >= base.manifest.lsn);
        if !merged {
            if !covers(&taken.seen, &base.manifest.vector) {
                self.merge_rows(replica, base, shards).await?;
            }
            replica.apply(Vec::new(), vec![Progress::Tail(cursor, base.manifest.lsn)]).await?;
        }
        taken.seen = join(&taken.seen, &base.manifest.vector);
        taken.newest_us = taken.newest_us.max(base.manifest.commit_time_max);
        Ok(())
    }

    async fn read_on(
        &self,
        replica: &Replica,
        one: &Candidate,
        at: &mut Lsn,
        taken: &mut Taken,
    ) -> Result<Ended, BootstrapError> {
        let mut whole = true;
        loop {
            let Some((chunk, _)) = self.next_chunk(one, *at).await? else {
                match one.next_listed(*at) {
                    // What is missing may be known from elsewhere: the records behind the hole will tell.
                    Some(first) => (*at, whole) = (Lsn(first.0 - 1), false),
                    None => return Ok(Ended::There),
                }
                continue;
            };
            let Some(entries) = taken.news(&chunk, whole) else { return Ok(Ended::Gap(chunk.first_lsn)) };
            apply_all(replica, entries).await?;
            *at = chunk.last_lsn;
            self.core.report.notify_one();
        }
    }
}

pub(crate) async fn apply_all(replica: &Replica, entries: Vec<KeyEntry>) -> Result<(), BootstrapError> {
    let (mut slice, mut bytes) = (Vec::new(), 0);
    for one in entries {
        bytes += one.key.len() + one.entry.len();
        slice.push(one);
        if bytes >= GROUP_BYTES_MAX {
            replica.apply(std::mem::take(&mut slice), Vec::new()).await?;
            bytes = 0;
        }
    }
    if !slice.is_empty() {
        replica.apply(slice, Vec::new()).await?;
    }
    Ok(())
}
