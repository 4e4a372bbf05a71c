//! What the bucket holds of a shard's past: which replicas shipped it, with which one to begin, and how
//! the logs of all of them come together in a new keyspace.
//!
//! **Invariants**
//! - A record is taken over once: one that a checkpoint or another log has brought already is passed by,
//!   also when what it did was deleted and forgotten since.
//! - Nothing is passed over in silence. The records of an origin are taken in order; one that is missing
//!   from every log, a moment that no log reaches, and a past that was collected are errors that say so.
//! - What comes before a moment is told by the stamps of who took the writes, and by the store: what it had
//!   by then came before, whatever the stamp says. A stamp that is ahead of the store is not believed.
//! - The choice of what to begin with is made once and kept, whatever is shipped meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use vasto_core::catalog::GivenUp;
use vasto_core::entry::Entry;
use vasto_core::ids::{Incarnation, KeyspaceId, Lsn, Origin, OwnSeq, ReplicaId, ShardId, Vector, covers, join};
use vasto_core::limits::{CLOCK_AHEAD_TRUSTED, GROUP_BYTES_MAX};
use vasto_core::record::{KeyEntry, Progress};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::history::{self, Base, HistoryError, Later, Newest, STORE_TIME_GRAIN_US, Times};
use vasto_shipping::layout::{self, Owner};

use crate::bootstrap::{Bootstrap, BootstrapError, Log, cursor_of};
use crate::engine::EngineError;
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
    /// When the store got what was listed.
    pub times: Times,
    /// Its checkpoints that are newer than the wanted time, rising.
    pub later: Vec<Later>,
}

impl Candidate {
    /// What is known of it without a listing: its checkpoint.
    pub(crate) fn of_base(owner: Owner, base: Base) -> Self {
        Self { base: Some(base), ..Self::of_chunks(owner, Vec::new()) }
    }

    /// Only some of its chunks.
    pub(crate) fn of_chunks(owner: Owner, chunks: Vec<Lsn>) -> Self {
        Self { owner, base: None, chunks, end: Lsn(0), times: Times::default(), later: Vec::new() }
    }

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
    pub(crate) fn next_listed(&self, at: Lsn) -> Option<Lsn> {
        self.chunks.get(self.chunks.partition_point(|first| *first <= at)).copied()
    }
}

/// All replicas whose objects can bring back a shard, the best one first.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    /// They.
    pub all: Vec<Candidate>,
    /// The preferred ones, those behind whose objects their logs go on, and so on.
    pub chain: Vec<ReplicaId>,
    /// What was shipped by replicas whose loss was accepted, and should be in the checkpoint of the first
    /// one. It is read only when records are missing without it: when another log goes on behind it.
    pub set_aside: Vec<Candidate>,
    /// The greatest commit time in the oldest checkpoint that is newer than the wanted time.
    pub later_us: Option<u64>,
}

/// Whose objects are not to be used as they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Without<'a> {
    /// Nothing that these shipped was ever part of the keyspace.
    pub discarded: &'a [ReplicaId],
    /// What these shipped, and nobody had taken over by then, was given up.
    pub given_up: &'a [GivenUp],
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
    without: Without<'_>,
    until_us: Option<u64>,
) -> Result<Candidates, BootstrapError> {
    let mut found = Candidates::default();
    let mut anything = false;
    let mut leaning = BTreeSet::new();
    for (replica, folder) in history::folders(bucket, keyspace, shard).await? {
        if without.discarded.contains(&replica) {
            continue;
        }
        let owner = Owner { keyspace, shard, replica };
        let newest = history::newest_base(bucket, owner, &folder, until_us).await;
        if let Err(HistoryError::Bucket(error)) = newest {
            return Err(error.into());
        }
        // A checkpoint covers what comes before it. Without one the first record of its log, also the one with LSN
        // 1, may follow what another replica has shipped, which it began with.
        let has_base = newest.as_ref().is_ok_and(|newest| newest.base.is_some());
        let leans = !has_base && history::begins_behind_another(bucket, owner, &folder).await?;
        let from_the_start = !has_base && !leans && folder.chunks.first() == Some(&Lsn(1));
        let newest = match newest {
            Err(error) if from_the_start => {
                tracing::warn!(%error, "no checkpoint can be read; the log is read from its beginning");
                Newest::default()
            }
            other => other?,
        };
        anything |= !folder.manifests.is_empty() || !folder.chunks.is_empty();
        let later_us = newest.later.first().map(|later| later.commit_time_max);
        found.later_us = found.later_us.into_iter().chain(later_us).min();
        // A log whose beginning is not there means nothing without a checkpoint, unless it goes on behind
        // what another replica has shipped.
        if leans {
            leaning.insert(replica);
        }
        if has_base || from_the_start || leans {
            let end = folder.manifests.last().into_iter().chain(folder.chunks.last()).max();
            found.all.push(Candidate {
                owner,
                base: newest.base,
                end: end.copied().unwrap_or_default(),
                chunks: folder.chunks,
                times: folder.times,
                later: newest.later,
            });
        }
    }
    // Nobody but itself is needed to read its log from the beginning.
    let stands_alone = |one: &Candidate| !leaning.contains(&one.owner.replica);
    if anything && !found.all.iter().any(stands_alone) {
        return Err(BootstrapError::NotRetained { shard, oldest: found.later_us.map(time_text) });
    }
    // Behind whose objects the logs of the preferred ones go on, theirs too, and so on: these belong together.
    let mut chain = preferred.to_vec();
    let mut next = 0;
    while let Some(replica) = chain.get(next).copied() {
        next += 1;
        let Some(one) = found.all.iter().find(|one| one.owner.replica == replica) else { continue };
        let behind = one.chunks.partition_point(|first| *first <= one.start());
        let others = history::goes_on_behind(bucket, one.owner, &one.chunks[behind..]).await?;
        chain.extend(others.into_iter().filter(|other| !chain.contains(other)).collect::<Vec<_>>());
    }
    let given_up = |one: &Candidate| without.given_up.iter().find(|lost| lost.replica == one.owner.replica);
    let rank = |one: &Candidate| chain.iter().position(|id| *id == one.owner.replica).unwrap_or(chain.len());
    // The one that has forgotten most deletes comes first: what it has forgotten is in the rows of others,
    // and theirs are merged only when it lacks something of them.
    let forgot = |one: &Candidate| one.base.as_ref().map_or((0, 0), |b| (b.manifest.floor, b.manifest.commit_time_max));
    found.all.sort_by_key(|one| {
        let last = std::cmp::Reverse(forgot(one));
        (!stands_alone(one), rank(one), one.base.is_none(), given_up(one).is_some(), last)
    });
    // A checkpoint that was made after the loss of a replica was accepted holds what was taken over from it.
    // In what that one shipped there is more: what was deleted and forgotten since.
    let first = found.all.first().map(|one| one.owner);
    let version = found.all.first().and_then(|one| one.base.as_ref()).map(|base| base.manifest.version);
    let is_over = |one: &Candidate| {
        let is_over = given_up(one).zip(version).is_some_and(|(lost, version)| lost.version <= version);
        Some(one.owner) != first && !chain.contains(&one.owner.replica) && is_over
    };
    (found.set_aside, found.all) = found.all.into_iter().partition(is_over);
    found.chain = chain;
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chain: Vec<ReplicaId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    set_aside: Vec<KeptOne>,
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
    #[serde(default)]
    manifest_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    chunk_times: Vec<(Lsn, u64)>,
    #[serde(default)]
    later: Vec<Lsn>,
}

impl KeptOne {
    fn of(one: &Candidate) -> Self {
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

    async fn read(self, bucket: &Bucket) -> Result<Candidate, BootstrapError> {
        let base = match &self.base {
            Some(key) => Some(history::manifest_at(bucket, key).await?),
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
            later.push(Later::of(history::manifest_at(bucket, &key).await?.manifest));
        }
        Ok(Candidate { owner, base, chunks: self.chunks, end: self.end, times, later })
    }
}

/// The choice that an earlier attempt made, or the one that `choose` makes now.
pub async fn chosen(
    bucket: &Bucket,
    path: &Path,
    choose: impl Future<Output = Result<Candidates, BootstrapError>>,
) -> Result<Candidates, BootstrapError> {
    if let Some(kept) = read_json::<Kept>(path)? {
        let mut found = Candidates { chain: kept.chain, later_us: kept.later_us, ..Candidates::default() };
        for one in kept.all {
            found.all.push(one.read(bucket).await?);
        }
        for one in kept.set_aside {
            found.set_aside.push(one.read(bucket).await?);
        }
        return Ok(found);
    }
    let found = choose.await?;
    let kept = |all: &[Candidate]| all.iter().map(KeptOne::of).collect();
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|source| BootstrapError::Io { path: dir.to_owned(), source })?;
    }
    let (chain, later_us) = (found.chain.clone(), found.later_us);
    write_json(path, &Kept { all: kept(&found.all), chain, set_aside: kept(&found.set_aside), later_us })?;
    Ok(found)
}

/// How far the logs were taken over.
struct Taken {
    filter: Filter,
    until_us: Option<u64>,
    /// Nothing that was read can have been written later than this.
    now_us: u64,
    /// Per origin, the last record that is in.
    seen: Vector,
    /// Commit time of the newest record that is in.
    newest_us: u64,
    /// A log went on beyond the wanted time, without a hole.
    passed: bool,
    /// The first moment behind the wanted time that something else knows of.
    later_us: Option<u64>,
    /// Per replica, the first of its records that came after the wanted time: so did all behind it.
    over: BTreeMap<ReplicaId, (Incarnation, OwnSeq)>,
    /// Per origin, the last record that is stamped with a later time, but by a clock that was ahead.
    doubtful: BTreeMap<Origin, Doubt>,
}

/// A record that may have come before the wanted time or after it.
struct Doubt {
    own_seq: OwnSeq,
    commit_time: u64,
    held_by_us: u64,
}

/// Why the reading of a log ended.
enum Ended {
    /// There is no more of it.
    There,
    /// A record of an origin is missing before this chunk; another log may have it.
    Gap(Lsn),
}

/// A log that is being read.
pub(crate) struct Reading<'a> {
    pub(crate) one: &'a Candidate,
    pub(crate) at: Lsn,
    /// Nothing is missing before here.
    whole: bool,
    /// The chunk that comes next does not begin where the last one ended.
    apart: bool,
}

impl<'a> Reading<'a> {
    /// Begins behind an LSN.
    pub(crate) fn behind(one: &'a Candidate, at: Lsn) -> Self {
        Self { one, at, whole: true, apart: false }
    }

    /// The next chunk, whatever is missing before it.
    pub(crate) async fn next(&mut self, bootstrap: &Bootstrap) -> Result<Option<Chunk>, BootstrapError> {
        loop {
            if let Some((chunk, _)) = bootstrap.next_chunk(self.one, self.at).await? {
                if std::mem::take(&mut self.apart) {
                    // What another replica has shipped lies before it, or it is a hole: what is missing may be
                    // known from elsewhere, and the records behind the hole will tell.
                    self.whole &= history::goes_on_behind_another(&chunk);
                }
                return Ok(Some(chunk));
            }
            let Some(first) = self.one.next_listed(self.at) else { return Ok(None) };
            (self.at, self.apart) = (Lsn(first.0 - 1), true);
        }
    }
}

impl Taken {
    /// What of a chunk is new; `None` when a record before it is missing. `whole`: nothing is missing from
    /// the log before it. Everything in it was written by `held_by_us`, by the store's clock.
    fn news(&mut self, chunk: &Chunk, whole: bool, held_by_us: u64) -> Option<Vec<KeyEntry>> {
        let mut seen = self.seen.clone();
        let mut newest_us = self.newest_us;
        let mut entries = Vec::new();
        let mut after = Vec::new();
        // A chunk that was decoded holds whole records only.
        for record in chunk.records().map_while(Result::ok) {
            if let Some(until) = self.until_us {
                let is_later = record.commit_time > until && !history::is_proven(held_by_us, until);
                if is_later || record.commit_time == until {
                    after.push((record.origin, record.own_seq, record.commit_time));
                }
                if is_later {
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
        (self.seen, self.newest_us) = (seen, newest_us);
        for (origin, own_seq, commit_time) in after {
            self.note_later(origin, own_seq, commit_time, whole, held_by_us);
        }
        Some(entries)
    }

    /// A record is stamped with the wanted time, or with a later one.
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

    /// Nothing in the log up to this checkpoint comes before the wanted time and is not in: what its origins
    /// stamped since they passed that time need not be read.
    fn needs_nothing_before(&self, later: &Later) -> bool {
        self.until_us.is_some()
            && later.vector.iter().all(|(origin, seq)| {
                let next = OwnSeq(self.seen.get(origin).copied().unwrap_or_default().0 + 1);
                let is_over = |first: &(Incarnation, OwnSeq)| (origin.incarnation, next) >= *first;
                *seq < next || self.over.get(&origin.replica).is_some_and(is_over)
            })
    }

    /// The record of which nobody knows whether it belongs to the wanted time.
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
    /// Takes over all that was shipped of a shard until a time, into a replica with a history of its own.
    /// The first candidate's checkpoint is its database already.
    ///
    /// # Errors
    /// `Gap`, `NotReached` and `ClockAhead` when the bucket does not hold all of it, or does not tell.
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
            now_us: self.core.clock.now_us().max(until_us.unwrap_or_default()),
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
        // A log with a gap waits for what the others bring.
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
                        // The end of a manifest that could not be read must have been reached by the log.
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
                    told_of(one, first);
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

    /// What the logs alone have brought is counted at the end: no checkpoint says how much it is.
    pub(crate) async fn count_what_logs_brought(
        &self,
        replica: &Replica,
        found: &Candidates,
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
                // Record by record up to a checkpoint that is newer: there is no moment before it that is lost.
                taken.passed |= log.whole && log.one.later.first().is_some_and(|later| log.at >= later.lsn);
                return Ok(Ended::There);
            };
            let held_by_us = log.one.times.chunk_held_by(chunk.first_lsn, chunk.last_lsn);
            let Some(entries) = taken.news(&chunk, log.whole, held_by_us) else {
                return Ok(Ended::Gap(chunk.first_lsn));
            };
            apply_all(replica, entries).await?;
            log.at = chunk.last_lsn;
            self.core.report.notify_one();
        }
    }
}

/// Says that what a lost replica has shipped is needed after all.
pub(crate) fn told_of(one: &Candidate, first: Lsn) {
    let (keyspace, shard, replica) = (one.owner.keyspace.0, one.owner.shard.0, one.owner.replica.0);
    tracing::info!(
        keyspace,
        shard,
        replica,
        before = first.0,
        "what a replica has shipped whose loss was accepted is read: another log goes on behind it"
    );
}

/// The values that a replica holds, one by one.
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
