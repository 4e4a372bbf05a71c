//! The archives of a shard: which replicas shipped them, which one a restore or a recovered replica starts from,
//! and how the logs of all of them are merged into a new keyspace up to a target time.
//!
//! **Invariants**
//! - A record is applied once: a record that a checkpoint or another log has brought already is skipped,
//!   even if its entries were deleted and the tombstones purged since.
//! - Nothing is skipped in silence. The records of an origin are applied in order. Errors report a record that is
//!   missing from every log, a target time after the end of every log, and an archive that was garbage-collected.
//! - Two clocks decide whether a record precedes the target time: its replica's, by the commit time, and the object
//!   store's. Every record whose object the store had received by the target time precedes it, whatever the commit
//!   time. Example: a replica whose clock is a minute ahead commits at 12:01:00 by its clock, the store receives the
//!   chunk at 12:00:05, the target is 12:00:30: the record is applied. A commit time more than
//!   [`CLOCK_AHEAD_TRUSTED`] ahead of the store's time is not trusted to be after the target time.
//! - The sources are chosen once and the choice is stored on disk, whatever is shipped meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use vasto_core::catalog::GivenUp;
use vasto_core::entry::Entry;
use vasto_core::ids::{Incarnation, KeyspaceId, Lsn, Origin, OwnSeq, ReplicaId, ShardId, Vector, covers, join};
use vasto_core::limits::{CLOCK_AHEAD_TRUSTED, GROUP_BYTES_MAX};
use vasto_core::record::{FeedProgress, KeyEntry};
use vasto_shipping::archive::{self, ArchiveError, ArchivedCheckpoint, Later, Newest, STORE_TIME_GRAIN_US, Times};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout::{self, Owner};

use crate::bootstrap::{Bootstrap, BootstrapError, Log, cursor_of};
use crate::engine::EngineError;
use crate::node_dir::{read_json, write_json};
use crate::replica::Replica;
use crate::tail::Filter;

/// The archive of one replica of a shard.
#[derive(Debug, Clone)]
pub struct RestoreSource {
    /// The replica that owns the objects.
    pub owner: Owner,
    /// The checkpoint to begin with; `None` begins empty, with the first chunk.
    pub base: Option<ArchivedCheckpoint>,
    /// First LSNs of the listed chunks, ascending.
    pub chunks: Vec<Lsn>,
    /// Lower bound of the end of the shipped log.
    pub end: Lsn,
    /// Times at which the object store received the listed objects.
    pub times: Times,
    /// Checkpoints that hold something newer than the target time, ascending.
    pub later: Vec<Later>,
}

impl RestoreSource {
    /// Creates a source from a checkpoint alone, without a listing.
    pub(crate) fn of_base(owner: Owner, base: ArchivedCheckpoint) -> Self {
        Self { base: Some(base), ..Self::of_chunks(owner, Vec::new()) }
    }

    /// Creates a source from some of its chunks.
    pub(crate) fn of_chunks(owner: Owner, chunks: Vec<Lsn>) -> Self {
        Self { owner, base: None, chunks, end: Lsn(0), times: Times::default(), later: Vec::new() }
    }

    /// Returns the LSN after which the log is read: that of the base checkpoint, which covers everything before.
    pub(crate) fn start(&self) -> Lsn {
        self.base.as_ref().map_or(Lsn(0), |base| base.manifest.lsn)
    }

    /// Returns an error that names the first missing chunk when objects after this LSN were listed.
    pub(crate) fn ends_at(&self, at: Lsn) -> Result<(), ArchiveError> {
        if at >= self.end {
            return Ok(());
        }
        Err(ArchiveError::Missing(layout::chunk(self.owner.keyspace, self.owner.shard, self.owner.replica, at.next())))
    }

    /// Returns the first listed chunk that begins after an LSN.
    pub(crate) fn next_listed(&self, at: Lsn) -> Option<Lsn> {
        self.chunks.get(self.chunks.partition_point(|first| *first <= at)).copied()
    }
}

/// All archives from which a shard can be made, the best one first.
#[derive(Debug, Clone, Default)]
pub struct RestoreSources {
    /// The archives.
    pub all: Vec<RestoreSource>,
    /// The preferred replicas, then the replicas whose archives their logs continue, then those that these continue,
    /// and so on: their archives together hold the complete logs of the preferred replicas.
    pub chain: Vec<ReplicaId>,
    /// Archives of replicas whose loss was accepted before the checkpoint of the first source was made: that
    /// checkpoint should contain them. Read only when records are missing without them, because another log
    /// continues one of these archives.
    pub set_aside: Vec<RestoreSource>,
    /// The greatest commit time in the oldest checkpoint that is newer than the target time, microseconds.
    pub later_us: Option<u64>,
}

/// Replicas whose archives are ignored or treated apart.
#[derive(Debug, Clone, Copy, Default)]
pub struct Without<'a> {
    /// Targets of plans that were undone: their records were never part of the keyspace; the archives are ignored.
    pub discarded: &'a [ReplicaId],
    /// Replicas whose loss was accepted, each with the catalog version that did so. Shipped records that no other
    /// replica had taken over by then are given up. The archives come later in the order or are set aside.
    pub given_up: &'a [GivenUp],
}

/// Selects and orders the archives to restore from, among everything that was shipped of a shard. `until_us` is the
/// target time, microseconds; `None` selects everything.
///
/// # Errors
/// `NotRetained` when there are archives, but none that reaches back to the target time.
pub async fn candidates(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
    preferred: &[ReplicaId],
    without: Without<'_>,
    until_us: Option<u64>,
) -> Result<RestoreSources, BootstrapError> {
    let mut found = RestoreSources::default();
    let mut anything = false;
    let mut leaning = BTreeSet::new();
    for (replica, archived) in archive::archives(bucket, keyspace, shard).await? {
        if without.discarded.contains(&replica) {
            continue;
        }
        let owner = Owner { keyspace, shard, replica };
        let newest = archive::newest_checkpoint(bucket, owner, &archived, until_us).await;
        if let Err(ArchiveError::Bucket(error)) = newest {
            return Err(error.into());
        }
        // A checkpoint covers the log before it. Without one, the log may lean on another archive: the replica was made
        // from what another one had shipped, and even its record with LSN 1 continues that archive.
        let has_base = newest.as_ref().is_ok_and(|newest| newest.base.is_some());
        let leans = !has_base && archive::begins_behind_another(bucket, owner, &archived).await?;
        let from_the_start = !has_base && !leans && archived.chunks.first() == Some(&Lsn(1));
        let newest = match newest {
            Err(error) if from_the_start => {
                tracing::warn!(%error, "no checkpoint can be read; the log is read from its beginning");
                Newest::default()
            }
            other => other?,
        };
        anything |= !archived.manifests.is_empty() || !archived.chunks.is_empty();
        let later_us = newest.later.first().map(|later| later.commit_time_max);
        found.later_us = found.later_us.into_iter().chain(later_us).min();
        // A log without its beginning is useless without a checkpoint, unless it continues another replica's archive.
        if leans {
            leaning.insert(replica);
        }
        if has_base || from_the_start || leans {
            let end = archived.manifests.last().into_iter().chain(archived.chunks.last()).max();
            found.all.push(RestoreSource {
                owner,
                base: newest.base,
                end: end.copied().unwrap_or_default(),
                chunks: archived.chunks,
                times: archived.times,
                later: newest.later,
            });
        }
    }
    // The archive can be read without any other: it has a checkpoint, or its log begins at LSN 1.
    let stands_alone = |one: &RestoreSource| !leaning.contains(&one.owner.replica);
    if anything && !found.all.iter().any(stands_alone) {
        return Err(BootstrapError::NotRetained { shard, oldest: found.later_us.map(time_text) });
    }
    // The logs of preferred replicas continue the archives of others, these again others, and so on.
    let mut chain = preferred.to_vec();
    let mut next = 0;
    while let Some(replica) = chain.get(next).copied() {
        next += 1;
        let Some(one) = found.all.iter().find(|one| one.owner.replica == replica) else { continue };
        let behind = one.chunks.partition_point(|first| *first <= one.start());
        let others = archive::goes_on_behind(bucket, one.owner, &one.chunks[behind..]).await?;
        chain.extend(others.into_iter().filter(|other| !chain.contains(other)).collect::<Vec<_>>());
    }
    let given_up = |one: &RestoreSource| without.given_up.iter().find(|lost| lost.replica == one.owner.replica);
    let rank = |one: &RestoreSource| chain.iter().position(|id| *id == one.owner.replica).unwrap_or(chain.len());
    // Sort order: archives that stand alone, then those of the chain in its order, then those with a checkpoint, then
    // those whose loss was not accepted, then the greatest gc floor. The first checkpoint becomes the database. The one
    // with the greatest floor has purged the most tombstones, with the values under them; an older checkpoint may
    // still hold such a value without its tombstone. The rows of another checkpoint are merged only when the first
    // lacks some of its records (see `merge_base`), so a covered one cannot bring the deleted value back. In the
    // other order the old value would be in the database, and the rows of the newer one would have no tombstone for it.
    let forgot =
        |one: &RestoreSource| one.base.as_ref().map_or((0, 0), |b| (b.manifest.floor, b.manifest.commit_time_max));
    found.all.sort_by_key(|one| {
        let last = std::cmp::Reverse(forgot(one));
        (!stands_alone(one), rank(one), one.base.is_none(), given_up(one).is_some(), last)
    });
    // An archive is set aside when the first checkpoint was made under the catalog version that accepted the loss of
    // its replica, or a later one: the checkpoint contains what was taken over from that replica. The archive may also
    // hold entries that were deleted since and whose tombstones were purged.
    let first = found.all.first().map(|one| one.owner);
    let version = found.all.first().and_then(|one| one.base.as_ref()).map(|base| base.manifest.version);
    let is_over = |one: &RestoreSource| {
        let is_over = given_up(one).zip(version).is_some_and(|(lost, version)| lost.version <= version);
        Some(one.owner) != first && !chain.contains(&one.owner.replica) && is_over
    };
    (found.set_aside, found.all) = found.all.into_iter().partition(is_over);
    found.chain = chain;
    Ok(found)
}

/// Formats a time as RFC 3339.
fn time_text(us: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_micros(us);
    humantime::format_rfc3339_micros(time).to_string()
}

/// [`RestoreSources`] as stored on disk for the next attempt: object keys and LSNs in place of decoded manifests.
#[derive(Serialize, Deserialize)]
struct StoredCandidates {
    all: Vec<StoredCandidate>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chain: Vec<ReplicaId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    set_aside: Vec<StoredCandidate>,
    later_us: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct StoredCandidate {
    keyspace: KeyspaceId,
    shard: ShardId,
    replica: ReplicaId,
    base: Option<String>,
    chunks: Vec<Lsn>,
    end: Lsn,
    #[serde(default)]
    manifest_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    chunk_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    later: Vec<Lsn>,
}

impl StoredCandidate {
    fn of(one: &RestoreSource) -> Self {
        Self {
            keyspace: one.owner.keyspace,
            shard: one.owner.shard,
            replica: one.owner.replica,
            base: one.base.as_ref().map(|base| base.key.clone()),
            chunks: one.chunks.clone(),
            end: one.end,
            manifest_times: one.times.manifests.iter().map(|(lsn, at)| (*lsn, *at)).collect(),
            chunk_times: one.times.chunks.iter().map(|(lsn, at)| (*lsn, *at)).collect(),
            later: one.later.iter().map(|later| later.lsn).collect(),
        }
    }

    async fn read(self, bucket: &Bucket) -> Result<RestoreSource, BootstrapError> {
        let base = match &self.base {
            Some(key) => Some(archive::manifest_at(bucket, key).await?),
            None => None,
        };
        let owner = Owner { keyspace: self.keyspace, shard: self.shard, replica: self.replica };
        let times = Times {
            manifests: self.manifest_times.into_iter().collect(),
            chunks: self.chunk_times.into_iter().collect(),
        };
        let mut later = Vec::with_capacity(self.later.len());
        for lsn in self.later {
            let key = layout::manifest(owner.keyspace, owner.shard, owner.replica, lsn);
            later.push(Later::of(archive::manifest_at(bucket, &key).await?.manifest));
        }
        Ok(RestoreSource { owner, base, chunks: self.chunks, end: self.end, times, later })
    }
}

/// Returns the choice that an earlier attempt stored in `path`; otherwise the one that `choose` makes, and stores it.
pub async fn chosen(
    bucket: &Bucket,
    path: &Path,
    choose: impl Future<Output = Result<RestoreSources, BootstrapError>>,
) -> Result<RestoreSources, BootstrapError> {
    if let Some(kept) = read_json::<StoredCandidates>(path)? {
        let mut found = RestoreSources { chain: kept.chain, later_us: kept.later_us, ..RestoreSources::default() };
        for one in kept.all {
            found.all.push(one.read(bucket).await?);
        }
        for one in kept.set_aside {
            found.set_aside.push(one.read(bucket).await?);
        }
        return Ok(found);
    }
    let found = choose.await?;
    let kept = |all: &[RestoreSource]| all.iter().map(StoredCandidate::of).collect();
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|source| BootstrapError::Io { path: dir.to_owned(), source })?;
    }
    let (chain, later_us) = (found.chain.clone(), found.later_us);
    write_json(path, &StoredCandidates { all: kept(&found.all), chain, set_aside: kept(&found.set_aside), later_us })?;
    Ok(found)
}

/// Progress of a merge of logs.
struct Taken {
    filter: Filter,
    /// The target time, microseconds; `None` applies everything.
    until_us: Option<u64>,
    /// Upper bound of the time at which any record that is read was written, microseconds.
    now_us: u64,
    /// Per origin, the last record that is applied or contained in a merged checkpoint.
    seen: Vector,
    /// Commit time of the newest applied record.
    newest_us: u64,
    /// A log without a gap reached the target time.
    passed: bool,
    /// The least commit time at or after the target time that is known otherwise: from a newer checkpoint, or from a
    /// log after a gap. Without `passed`, records between it and the newest applied one may be missing: `NotReached`.
    later_us: Option<u64>,
    /// Per replica, its first known record that is not applied because it was committed after the target time. Commit
    /// times of a replica never fall: all its later records were committed after the target time too.
    over: BTreeMap<ReplicaId, (Incarnation, OwnSeq)>,
    /// Per origin, the last record whose commit time is after the target time, but not trusted (clock ahead).
    doubtful: BTreeMap<Origin, Doubt>,
}

/// A record of which it is unknown whether it was written before or after the target time.
struct Doubt {
    own_seq: OwnSeq,
    commit_time: u64,
    /// Upper bound of the time at which it was written, microseconds, by the object store's clock.
    held_by_us: u64,
}

/// Why the reading of a log ended.
enum Ended {
    /// The reader reached the end of the log.
    There,
    /// A record of an origin is missing before this chunk; another log may have it.
    Gap(Lsn),
}

/// A log that is being read.
pub(crate) struct Reading<'a> {
    pub(crate) one: &'a RestoreSource,
    /// LSN of the last record that was read or skipped.
    pub(crate) at: Lsn,
    /// No chunk is missing before this position, except where the log continues another replica's archive.
    whole: bool,
    /// The next chunk does not begin directly after the last one.
    apart: bool,
}

impl<'a> Reading<'a> {
    /// Creates a reader whose first record is the one after an LSN.
    pub(crate) fn behind(one: &'a RestoreSource, at: Lsn) -> Self {
        Self { one, at, whole: true, apart: false }
    }

    /// Returns the next chunk, also after a gap; `None` at the end of the log.
    pub(crate) async fn next(&mut self, bootstrap: &Bootstrap) -> Result<Option<Chunk>, BootstrapError> {
        loop {
            if let Some((chunk, _)) = bootstrap.next_chunk(self.one, self.at).await? {
                if std::mem::take(&mut self.apart) {
                    // The log continues another replica's archive here, or has a gap. Other logs may hold the records
                    // of the gap; the own sequences of the records after it will show whether they do.
                    self.whole &= archive::goes_on_behind_another(&chunk);
                }
                return Ok(Some(chunk));
            }
            let Some(first) = self.one.next_listed(self.at) else { return Ok(None) };
            (self.at, self.apart) = (Lsn(first.0 - 1), true);
        }
    }
}

impl Taken {
    /// Returns the new entries of a chunk; `None` when a record before it is missing. `whole`: nothing is missing from
    /// the log before it. `held_by_us`: time, microseconds by the object store's clock, by which the chunk was in the
    /// object store, so that none of its records was written later.
    fn news(&mut self, chunk: &Chunk, whole: bool, held_by_us: u64) -> Option<Vec<KeyEntry>> {
        let mut seen = self.seen.clone();
        let mut newest_us = self.newest_us;
        let mut entries = Vec::new();
        let mut after = Vec::new();
        // A decoded chunk holds whole records only.
        for record in chunk.records().map_while(Result::ok) {
            if let Some(until) = self.until_us {
                // Proven: the object store had the record by the target time, so the clock that assigned a later commit
                // time was ahead.
                let is_later = record.commit_time > until && !archive::is_proven(held_by_us, until);
                if is_later || record.commit_time == until {
                    after.push((record.origin, record.own_seq, record.commit_time));
                }
                if is_later {
                    continue;
                }
            }
            // Records without an own sequence (seals and other control records that peers do not replicate) concern
            // only the replica that wrote them.
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
        (self.seen, self.newest_us) = (seen, newest_us);
        for (origin, own_seq, commit_time) in after {
            self.note_later(origin, own_seq, commit_time, whole, held_by_us);
        }
        Some(entries)
    }

    /// Evaluates a record whose commit time is the target time, or is later and left it unapplied: is it evidence that
    /// the log reaches the target time?
    /// - local: the record has no own sequence (peers do not replicate it);
    /// - in: it is applied already, from this log, another one or a checkpoint;
    /// - trusted: its commit time is at most [`CLOCK_AHEAD_TRUSTED`] after `held_by_us`, so its clock was not ahead;
    /// - over: `over` holds this record or an earlier one of the same replica.
    ///
    /// | local | in | trusted | over | result |
    /// |---|---|---|---|---|
    /// | yes | – | yes | – | evidence |
    /// | yes | – | no | – | ignored |
    /// | no | yes | – | – | evidence |
    /// | no | no | yes | – | evidence; enters `over` if it is the first of its replica |
    /// | no | no | no | yes | evidence |
    /// | no | no | no | no | enters `doubtful`: an error in the end unless it was applied |
    ///
    /// Evidence in a log that is `whole` sets `passed`; after a gap it lowers `later_us`.
    fn note_later(&mut self, origin: Origin, own_seq: OwnSeq, commit_time: u64, whole: bool, held_by_us: u64) {
        let is_local = own_seq.0 == 0;
        let is_in = !is_local && self.seen.get(&origin).is_some_and(|seen| *seen >= own_seq);
        let held_by_us = held_by_us.min(self.now_us);
        let trusted = commit_time <= held_by_us.saturating_add(CLOCK_AHEAD_TRUSTED.as_micros() as u64);
        let point = (origin.incarnation, own_seq);
        let is_over = self.over.get(&origin.replica).is_some_and(|first| point >= *first);
        if is_local && !trusted {
            return;
        }
        if !is_in && !trusted && !is_over {
            let doubt = Doubt { own_seq, commit_time, held_by_us };
            let known = self.doubtful.entry(origin).or_insert(Doubt { ..doubt });
            if known.own_seq < own_seq {
                *known = doubt;
            }
            return;
        }
        if !is_in && !is_local && trusted {
            let first = self.over.entry(origin.replica).or_insert(point);
            *first = point.min(*first);
        }
        self.passed |= whole;
        if !whole {
            self.later_us = self.later_us.into_iter().chain([commit_time]).min();
        }
    }

    /// Returns true when the log up to this newer checkpoint need not be read: for each origin, every record that the
    /// checkpoint contains is applied already, or was committed after the target time (`over`).
    fn needs_nothing_before(&self, later: &Later) -> bool {
        self.until_us.is_some()
            && later.vector.iter().all(|(origin, seq)| {
                let next = OwnSeq(self.seen.get(origin).copied().unwrap_or_default().0 + 1);
                let is_over = |first: &(Incarnation, OwnSeq)| (origin.incarnation, next) >= *first;
                *seq < next || self.over.get(&origin.replica).is_some_and(is_over)
            })
    }

    /// Returns `ClockAhead` when a doubtful record was not applied in the end: it may have preceded the target time.
    fn doubt(&self, shard: ShardId) -> Result<(), BootstrapError> {
        let open = |(origin, doubt): &(&Origin, &Doubt)| self.seen.get(origin).is_none_or(|seen| *seen < doubt.own_seq);
        let Some((origin, doubt)) = self.doubtful.iter().find(open) else { return Ok(()) };
        Err(BootstrapError::ClockAhead {
            shard,
            replica: origin.replica,
            ahead_s: doubt.commit_time.saturating_sub(doubt.held_by_us).div_ceil(1_000_000),
            stamped: time_text(doubt.commit_time),
            from: time_text(doubt.held_by_us.saturating_add(STORE_TIME_GRAIN_US)),
        })
    }
}

impl Bootstrap {
    /// Applies everything that was shipped of a shard until the target time to a replica of a new keyspace, which
    /// takes over neither vector nor cursors. The first source's checkpoint is its database already.
    ///
    /// # Errors
    /// `Gap` when a record is missing from every log, `NotReached` when the logs end before the target time,
    /// `ClockAhead` when it cannot be decided whether a record precedes the target time.
    pub async fn merge_all(
        &self,
        replica: &Replica,
        found: &RestoreSources,
        shards: u32,
        until_us: Option<u64>,
    ) -> Result<(), BootstrapError> {
        let filter = Filter { shard: replica.shard, shards };
        let first = found.all.first().and_then(|one| one.base.as_ref());
        let mut taken = Taken {
            filter,
            until_us,
            now_us: self.registry.clock.now_us().max(until_us.unwrap_or_default()),
            seen: first.map(|base| base.manifest.vector.clone()).unwrap_or_default(),
            newest_us: first.map_or(0, |base| base.manifest.commit_time_max),
            passed: false,
            later_us: found.later_us,
            over: BTreeMap::new(),
            doubtful: BTreeMap::new(),
        };
        for one in found.all.iter().skip(1) {
            self.merge_base(replica, one, &mut taken, shards).await?;
        }
        let mut logs: Vec<Reading<'_>> = found.all.iter().map(|one| Reading::behind(one, one.start())).collect();
        let mut set_aside = Some(&found.set_aside).filter(|all| !all.is_empty());
        // A log with a gap waits for the records of the others.
        while !logs.is_empty() {
            let (mut waiting, mut moved) = (Vec::new(), false);
            let mut gap = None;
            for mut log in logs {
                let (from, owner) = (log.at, log.one.owner);
                let ended = self.read_on(replica, &mut log, &mut taken).await?;
                moved |= log.at > from;
                match ended {
                    Ended::There => {
                        moved = true;
                        self.progress.lock().reached.push((owner.replica, log.at));
                        // A newer manifest may have been skipped because it could not be read: the log must reach its
                        // LSN, or the records between would be lost in silence.
                        if until_us.is_none() {
                            log.one.ends_at(log.at)?;
                        }
                    }
                    Ended::Gap(first) => {
                        gap = Some((owner, first));
                        waiting.push(log);
                    }
                }
            }
            logs = waiting;
            if let (false, Some((owner, first))) = (moved, gap) {
                let Some(more) = set_aside.take() else {
                    let chunk = layout::chunk(owner.keyspace, owner.shard, owner.replica, first);
                    return Err(BootstrapError::Gap { shard: replica.shard, chunk });
                };
                for one in more {
                    log_restored(one, first);
                    self.merge_base(replica, one, &mut taken, shards).await?;
                    logs.push(Reading::behind(one, one.start()));
                }
            }
        }
        taken.doubt(replica.shard)?;
        match taken.later_us {
            Some(later_us) if !taken.passed && until_us.is_some() => {
                return Err(BootstrapError::NotReached {
                    shard: replica.shard,
                    reached: time_text(taken.newest_us),
                    next: time_text(later_us),
                });
            }
            _ => {}
        }
        self.count_what_logs_brought(replica, found).await
    }

    /// Counts the rows when only logs have brought them: without a checkpoint no manifest states their number.
    pub(crate) async fn count_what_logs_brought(
        &self,
        replica: &Replica,
        found: &RestoreSources,
    ) -> Result<(), BootstrapError> {
        if found.all.iter().any(|one| one.base.is_some()) {
            return Ok(());
        }
        let counted = replica.clone();
        let counting = tokio::task::spawn_blocking(move || {
            counted.engine().flush()?;
            Ok::<_, EngineError>((count_values(&counted)?, counted.size().1))
        });
        let failed = |error: tokio::task::JoinError| EngineError::Rocks { doing: "count", message: error.to_string() };
        let (keys, bytes) = counting.await.map_err(failed)??;
        let mut shown = self.progress.lock();
        (shown.keys_moved, shown.bytes_moved) = (keys, bytes);
        (shown.bytes_total, shown.bytes_done) = (bytes, bytes);
        Ok(())
    }

    /// Merges the rows of another replica's checkpoint, unless `taken.seen` covers its vector. Stores its LSN as a
    /// cursor, so that it is not merged again after a restart.
    async fn merge_base(
        &self,
        replica: &Replica,
        other: &RestoreSource,
        taken: &mut Taken,
        shards: u32,
    ) -> Result<(), BootstrapError> {
        let Some(base) = &other.base else { return Ok(()) };
        let log = Log::Fork { shards, until_us: taken.until_us };
        let cursor = cursor_of(log, other.owner.replica);
        // True when it was merged before a restart.
        let merged = replica.tail_cursors()?.iter().any(|(id, lsn)| *id == cursor && *lsn >= base.manifest.lsn);
        if !merged {
            if !covers(&taken.seen, &base.manifest.vector) {
                self.merge_rows(replica, base, shards).await?;
            }
            replica.apply(Vec::new(), vec![FeedProgress::Tail(cursor, base.manifest.lsn)]).await?;
        }
        taken.seen = join(&taken.seen, &base.manifest.vector);
        taken.newest_us = taken.newest_us.max(base.manifest.commit_time_max);
        Ok(())
    }

    /// Reads and applies a log until its end or a gap; skips to a newer checkpoint where nothing before it is needed.
    async fn read_on(
        &self,
        replica: &Replica,
        log: &mut Reading<'_>,
        taken: &mut Taken,
    ) -> Result<Ended, BootstrapError> {
        loop {
            let behind = |later: &&Later| later.lsn > log.at && taken.needs_nothing_before(later);
            if let Some(later) = log.one.later.iter().rev().find(behind) {
                taken.passed |= log.whole;
                log.at = later.lsn;
            }
            let Some(chunk) = log.next(self).await? else {
                // The log is complete up to a checkpoint that is newer than the target time: the target is reached.
                taken.passed |= log.whole && log.one.later.first().is_some_and(|later| log.at >= later.lsn);
                return Ok(Ended::There);
            };
            let held_by_us = log.one.times.chunk_held_by(chunk.first_lsn, chunk.last_lsn);
            let Some(entries) = taken.news(&chunk, log.whole, held_by_us) else {
                return Ok(Ended::Gap(chunk.first_lsn));
            };
            apply_all(replica, entries).await?;
            log.at = chunk.last_lsn;
            self.registry.report.notify_one();
        }
    }
}

/// Logs that an archive that was set aside is needed: another log continues it.
pub(crate) fn log_restored(one: &RestoreSource, first: Lsn) {
    let (keyspace, shard, replica) = (one.owner.keyspace.0, one.owner.shard.0, one.owner.replica.0);
    tracing::info!(
        keyspace,
        shard,
        replica,
        before = first.0,
        "what a replica has shipped whose loss was accepted is read: another log goes on behind it"
    );
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

/// Applies entries in groups of about [`GROUP_BYTES_MAX`].
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
