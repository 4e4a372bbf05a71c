//! The writer of a replica: the only thread that changes it, started when there are commands (see [`super::queue`]).
//!
//! The writer drains its queue, builds one log record and one batch from the waiting commands (group commit), appends,
//! syncs once, applies, answers.
//!
//! **Invariants**
//! - append, then sync (if a request needs it), then apply, then answer; no request is answered before it is as durable
//!   as requested.
//! - A record holds at most one entry per stored key; the second write of a key in one group sees
//!   the first.
//! - A full group is committed before the next request is assigned, so that no record is over its limit, whatever waits
//!   in the queue.
//! - A failed append, sync or apply closes the replica to writes; the outcome of requests in flight is `Unknown`, and
//!   none is retried as if it had not happened.
//! - Writes to a sealed range wait for the plan's outcome and are then applied or redirected; none is refused as "not
//!   applied" and applied later.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vasto_core::catalog::Ack;
use vasto_core::clock::HybridClock;
use vasto_core::entry::event_time_of;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, Origin, OwnSeq};
use vasto_core::limits::{ATTEMPT_PATIENCE, GROUP_BYTES_MAX, GROUP_OPS_MAX, OS_SYNC_INTERVAL, SEALED_WRITES_WAIT};
use vasto_core::record::{Body, FeedProgress, OpResult, RangeState, Record};
use vasto_core::stored_key::MetaKey;
use vasto_core::{ErrorCode, VastoError};

use super::apply::{Meta, apply_record, band_of, put_head, put_progress};
use super::assign::{WriteGroup, op_bytes};
use super::authority::now_ms;
use super::command::{ApplyCommand, Command, Control, OpOutcome, Position, ReplicaError, Role, WriteCommand, too_late};
use super::dedup::{self, DedupTable, StoredResult};
use super::max_event_times::MaxEventTimes;
use super::{Shared, metrics};
use crate::binlog::Binlog;
use crate::clock::since_boot;
use crate::engine::Batch;

/// A write that waits for the outcome of a seal.
struct Held {
    command: WriteCommand,
    since: Instant,
}

/// State that the writer thread owns.
pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub log: Binlog,
    pub meta: Meta,
    pub max_event_times: MaxEventTimes,
    pub clock: HybridClock,
    /// Clock reading just before the request is checked, microseconds: an assigned time belongs to a point in time at
    /// which authority held, however long the thread then stalls.
    pub stamp_us: u64,
    pub commands: Receiver<Command>,
    role: Role,
    dedup: DedupTable,
    held: Vec<Held>,
    sealed_at: Option<Instant>,
    pub(super) unsynced_since: Option<Instant>,
    encoded: Vec<u8>,
}

/// Outcomes of a write; for a repetition also the record of the first execution, and its epoch.
type Done = (Vec<OpOutcome>, Option<(OwnSeq, Epoch)>);

/// Group commit under construction, and the requests that wait for it.
#[derive(Default)]
struct OpenGroup {
    commit_time: u64,
    group: WriteGroup,
    must_sync: bool,
    answers: Vec<(WriteCommand, Done)>,
    progress: Vec<FeedProgress>,
    applied: Vec<oneshot::Sender<Result<Lsn, ReplicaError>>>,
}

/// Result of the check of a write before its commit.
enum Checked {
    Ready,
    Sealed,
    Refused(VastoError),
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        log: Binlog,
        meta: Meta,
        dedup: DedupTable,
        commands: Receiver<Command>,
    ) -> Self {
        let event_time_max = meta.head.event_time_max;
        shared.results.store(dedup.len(), Ordering::Relaxed);
        Self {
            shared,
            log,
            max_event_times: MaxEventTimes::starting_at(event_time_max),
            // A stored entry raises the event times of its own key alone.
            clock: HybridClock::default(),
            stamp_us: 0,
            meta,
            commands,
            role: Role::default(),
            dedup,
            held: Vec::new(),
            sealed_at: None,
            unsynced_since: None,
            encoded: Vec::new(),
        }
    }

    /// Runs until the writer is stopped, every handle is gone, or no command has come for `patience`: then it returns
    /// itself.
    pub(super) fn run(mut self, patience: Duration) -> Option<Self> {
        loop {
            let is_idle = self.held.is_empty() && self.unsynced_since.is_none();
            let first = match self.commands.recv_timeout(if is_idle { patience } else { Duration::from_millis(50) }) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) if is_idle => return Some(self),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Some(first) = first
                && self.take(first)
            {
                return None;
            }
            self.release_overdue();
            if self.unsynced_since.is_some_and(|since| since.elapsed() >= OS_SYNC_INTERVAL) {
                let _ = self.sync();
            }
        }
        self.stop();
        None
    }

    /// Executes one command and those queued behind it; returns true when the writer has ended.
    pub(super) fn take(&mut self, first: Command) -> bool {
        let mut writes = Vec::new();
        let mut applies = Vec::new();
        let mut weight = 0;
        let mut count = 0;
        let mut next = Some(first);
        let mut last = None;
        while let Some(command) = next.take() {
            match command {
                Command::Write(command) => {
                    count += command.ops.len();
                    weight += command.ops.iter().map(op_bytes).sum::<usize>();
                    writes.push(command);
                }
                Command::Apply(command) => {
                    count += command.entries.len() + 1;
                    weight += command.entries.iter().map(|one| one.key.len() + one.entry.len()).sum::<usize>();
                    applies.push(command);
                }
                other => {
                    last = Some(other);
                    break;
                }
            }
            if count >= GROUP_OPS_MAX || weight >= GROUP_BYTES_MAX {
                break;
            }
            next = self.commands.try_recv().ok();
        }
        self.commit(writes, applies);
        match last {
            Some(Command::Control(order, done)) => return self.control(order, done),
            Some(Command::Replicate(command)) => {
                let result = self.take_records(command.source, command.records, command.covered);
                let _ = command.done.send(result);
            }
            Some(Command::Look(done)) => {
                let _ = done.send(self.look());
            }
            Some(Command::Write(_) | Command::Apply(_)) | None => {}
        }
        false
    }

    /// Makes everything durable and returns the position of the replica.
    fn look(&mut self) -> Result<Position, ReplicaError> {
        if let Some(reason) = self.shared.closed() {
            return Err(ReplicaError::Closed(reason));
        }
        if self.unsynced_since.is_some() {
            self.sync()?;
        }
        Ok(Position {
            lsn: self.meta.head.applied_lsn,
            vector: self.meta.vector.clone(),
            floor: self.meta.head.floor,
            incarnation: self.meta.identity.incarnation,
        })
    }

    pub(super) fn now_us(&self) -> u64 {
        self.shared.clock.now_us()
    }

    fn commit_time(&self) -> u64 {
        self.now_us().max(self.meta.head.commit_time + 1).max(self.meta.head.floor + 1)
    }

    fn check(&self, command: &mut WriteCommand) -> Checked {
        if let Some(reason) = self.shared.closed() {
            return Checked::Refused(ReplicaError::Closed(reason).into());
        }
        if self.role == Role::Detached {
            return Checked::Refused(wrong_epoch());
        }
        let now = since_boot();
        if command.until.is_some_and(|until| now >= until) {
            return Checked::Refused(too_late());
        }
        let modifies = command.modifies();
        match (command.term, modifies) {
            // Another replica may have taken over since the admission: applied now, the write would get an event time
            // above those written there since.
            (Some(term), _) if self.shared.authority.term() != Some(term) => {
                return Checked::Refused(without_authority());
            }
            (Some(_), _) => {}
            (None, true) => match self.shared.authority.term() {
                Some(term) => command.term = Some(term),
                None => return Checked::Refused(without_authority()),
            },
            // The sender that chose this replica has long gone to another one.
            (None, false)
                if now.saturating_sub(command.sent) >= ATTEMPT_PATIENCE && self.shared.followers.has_peers() =>
            {
                let message =
                    "the request was under way for too long, its sender has gone to another replica; send it again";
                return Checked::Refused(VastoError::new(ErrorCode::CatchingUp, message).retry_after_ms(50));
            }
            (None, false) => {}
        }
        let mut sealed = false;
        if modifies {
            let known = self.meta.head.version.0 >= self.shared.primary_from.load(Ordering::Acquire)
                && self.meta.head.epoch.0 >= self.shared.followers_epoch.load(Ordering::Acquire);
            match self.role {
                Role::Primary if known => {}
                Role::TransferringLeadership => sealed = true,
                Role::Primary | Role::Secondary | Role::Detached => return Checked::Refused(not_primary()),
            }
        }
        for op in &command.ops {
            let Some(band) = band_of(self.meta.identity.shard, &op.key, op.partition_hash) else {
                return Checked::Refused(wrong_epoch());
            };
            match self.meta.ranges.state(band) {
                RangeState::Owned if self.meta.ranges.is_sealed(band) => sealed = true,
                RangeState::Owned => {}
                RangeState::Arriving | RangeState::Empty | RangeState::Leaving | RangeState::Clearing => {
                    return Checked::Refused(wrong_epoch());
                }
            }
        }
        if sealed { Checked::Sealed } else { Checked::Ready }
    }

    /// Executes the commands, in as many group commits as they need.
    fn commit(&mut self, writes: Vec<WriteCommand>, applies: Vec<ApplyCommand>) {
        let mut open = self.begin();
        for mut command in writes {
            if open.group.is_full() {
                self.finish(open);
                open = self.begin();
            }
            self.stamp_us = self.now_us();
            match self.check(&mut command) {
                Checked::Refused(error) => command.answer(Err(error)),
                Checked::Sealed => self.held.push(Held { command, since: Instant::now() }),
                Checked::Ready => match self.do_once(&command, &mut open.group, open.commit_time) {
                    Ok(done) => {
                        open.must_sync |= command.ack != Ack::Os;
                        open.answers.push((command, done));
                    }
                    Err(error) => command.answer(Err(error)),
                },
            }
        }
        for command in applies {
            if open.group.is_full() {
                self.finish(open);
                open = self.begin();
            }
            match self.merge_all(&command.entries, &mut open.group) {
                Ok(()) => {
                    open.must_sync = true;
                    open.progress.extend(&command.progress);
                    open.applied.push(command.done);
                }
                Err(error) => drop(command.done.send(Err(error))),
            }
        }
        self.finish(open);
    }

    /// Returns an empty group commit.
    fn begin(&self) -> OpenGroup {
        OpenGroup { commit_time: self.commit_time(), ..OpenGroup::default() }
    }

    /// Makes a group as durable as requested, and answers.
    fn finish(&mut self, open: OpenGroup) {
        let OpenGroup { commit_time, group, must_sync, answers, progress, applied } = open;
        let ops = answers.len();
        let result = if group.entries.is_empty() && group.results.is_empty() && progress.is_empty() {
            // Nothing new to store, but stored entries may have been acknowledged as `os` only.
            if must_sync && self.unsynced_since.is_some() { self.sync() } else { Ok(()) }
        } else {
            self.log_and_apply(group, progress, commit_time, must_sync)
        };
        match result {
            Ok(()) => {
                metrics::group(ops);
                for (mut command, (outcomes, done_before)) in answers {
                    command.authority = Some(self.shared.authority.clone());
                    match command.ack {
                        Ack::Os | Ack::Fsync => command.answer(Ok(outcomes)),
                        Ack::Replica => {
                            let (own_seq, epoch) = (self.meta.head.own_seq, self.meta.head.epoch);
                            let stands = done_before.unwrap_or((own_seq, epoch));
                            match stands.1 < epoch {
                                true => command.answer(Err(worked_on_without())),
                                false => self.shared.followers.wait(command, outcomes, stands.0, stands.1),
                            }
                        }
                        Ack::Bucket => self.shared.bucket_acks.wait(command, outcomes, self.meta.head.applied_lsn),
                    }
                }
                for done in applied {
                    let _ = done.send(Ok(self.meta.head.applied_lsn));
                }
            }
            Err(error) => {
                for (command, _) in answers {
                    command
                        .answer(Err(VastoError::new(ErrorCode::Unknown, format!("the outcome is not known: {error}"))));
                }
                for done in applied {
                    let _ = done.send(Err(error.clone()));
                }
            }
        }
    }

    fn log_and_apply(
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
        let Body::Data { entries, results, progress } = &record.body else { unreachable!("it was built as data") };
        let mut batch = Batch::default();
        for (stored_key, one) in stored_keys.iter().zip(entries) {
            batch.put(stored_key, &one.entry);
            let event_time = event_time_of(&one.entry).unwrap_or(0);
            self.meta.head.event_time_max = self.meta.head.event_time_max.max(event_time);
        }
        for one in results {
            batch.put_meta(MetaKey::Result(one.client, one.sequence), &one.outcome);
        }
        if !results.is_empty() {
            for (client, sequence) in self.dedup.forget(self.now_us()) {
                batch.delete_meta(MetaKey::Result(client, sequence));
            }
        }
        put_progress(&mut batch, progress);
        put_head(&mut batch, &mut self.meta, &record);
        self.write_batch(batch)?;
        for (id, outcomes) in outcomes {
            self.dedup.keep(id, commit_time, StoredResult { outcomes, epoch, own_seq: Some(own_seq) });
        }
        self.shared.results.store(self.dedup.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Assigns the operations of a request, unless it is a repetition whose result is known; then also returns the
    /// record of the first execution, and its epoch.
    fn do_once(
        &mut self,
        command: &WriteCommand,
        group: &mut WriteGroup,
        commit_time: u64,
    ) -> Result<Done, VastoError> {
        let Some(id) = command.id.filter(|_| command.modifies()) else {
            return Ok((self.assign_all(&command.ops, group, commit_time)?, None));
        };
        let key = (id.client, id.sequence);
        if let Some((_, outcomes)) = group.results.iter().find(|(known, _)| *known == key) {
            return Ok((outcomes.clone(), None));
        }
        if let Some(kept) = self.dedup.recall(&id, self.meta.identity.replica, self.now_us())? {
            // A result of an earlier incarnation precedes all records of this one.
            let own_seq = kept.own_seq.unwrap_or(self.meta.head.own_seq);
            return Ok((kept.outcomes.clone(), Some((own_seq, kept.epoch))));
        }
        let outcomes = self.assign_all(&command.ops, group, commit_time)?;
        group.results.push((key, outcomes.clone()));
        Ok((outcomes, None))
    }

    pub(super) fn record(&self, body: Body, own_seq: OwnSeq, commit_time: u64) -> Record {
        Record {
            lsn: self.log.last_lsn().next(),
            synced_lsn: self.shared.log.synced_lsn(),
            commit_time,
            floor: self.meta.head.floor,
            epoch: self.meta.head.epoch,
            origin: Origin { replica: self.meta.identity.replica, incarnation: self.meta.identity.incarnation },
            own_seq,
            body,
        }
    }

    pub(super) fn append(&mut self, record: &Record) -> Result<(), ReplicaError> {
        self.encoded.clear();
        record.encode_into(&mut self.encoded);
        let own = Origin { replica: self.meta.identity.replica, incarnation: self.meta.identity.incarnation };
        if record.origin == own && record.own_seq.0 > 0 {
            // Stored before any reader can see the record.
            self.shared.logged_own_seq.store(record.own_seq.0, Ordering::Release);
        }
        let _waits = self.wait_for_disk();
        self.log.append(record.lsn, &self.encoded).map_err(|error| self.close(error.to_string()))?;
        self.unsynced_since.get_or_insert_with(Instant::now);
        if self.encoded.capacity() > GROUP_BYTES_MAX * 2 {
            self.encoded = Vec::new();
        }
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), ReplicaError> {
        let started = Instant::now();
        let _waits = self.wait_for_disk();
        self.log.sync().map_err(|error| {
            metrics::sync_error();
            self.close(error.to_string())
        })?;
        self.unsynced_since = None;
        metrics::sync(started.elapsed());
        Ok(())
    }

    pub(super) fn write_batch(&mut self, batch: Batch) -> Result<(), ReplicaError> {
        if let Some(why) = self.shared.engine.failure() {
            return Err(self.close(format!("the database could not write to its disk: {why}")));
        }
        let _waits = self.wait_for_disk();
        self.shared.engine.write(batch).map_err(|error| self.close(error.to_string()))?;
        self.shared.engine.raise_floor(self.meta.head.floor);
        self.shared.publish(&mut self.meta, self.role);
        Ok(())
    }

    /// Publishes that the writer waits for its disk, until the guard is dropped.
    fn wait_for_disk(&self) -> WaitsForDisk {
        self.shared.busy_since_ms.store(now_ms().max(1), Ordering::Release);
        WaitsForDisk(self.shared.clone())
    }

    /// Closes the replica to writes for good (until it is opened again).
    pub(super) fn close(&self, reason: String) -> ReplicaError {
        self.shared.close(reason.clone());
        ReplicaError::Closed(reason)
    }

    /// Logs a control record durably and applies it.
    fn log_control(&mut self, body: Body) -> Result<Lsn, ReplicaError> {
        self.log_control_at(body, self.commit_time())
    }

    fn log_control_at(&mut self, body: Body, commit_time: u64) -> Result<Lsn, ReplicaError> {
        if let Some(reason) = self.shared.closed() {
            return Err(ReplicaError::Closed(reason));
        }
        let own_seq = if body.is_streamed() { OwnSeq(self.meta.head.own_seq.0 + 1) } else { OwnSeq(0) };
        let mut record = self.record(body, own_seq, commit_time);
        if let Body::Adopt { .. } = record.body {
            // The first record of the next incarnation.
            record.origin.incarnation.0 += 1;
            record.own_seq = OwnSeq(1);
            self.shared.logged_own_seq.store(1, Ordering::Release);
            self.log.set_incarnation(record.origin.incarnation);
        }
        self.append(&record)?;
        self.sync()?;
        let batch = apply_record(&mut self.meta, &record).map_err(|error| self.close(error.to_string()))?;
        if let (Body::Seal { .. }, Some(seal)) = (&record.body, &mut self.meta.ranges.seal) {
            seal.since = Some(since_boot());
        }
        self.write_batch(batch)?;
        Ok(record.lsn)
    }

    /// Begins this incarnation, and ends the previous one where this disk has it.
    pub(super) fn adopt(&mut self) -> Result<Lsn, ReplicaError> {
        let body = Body::Adopt { previous: self.meta.identity.incarnation, head: self.meta.head.own_seq };
        self.log_control(body)
    }

    /// Gives a range a state, durably; the epoch is published with it.
    pub(super) fn set_range(
        &mut self,
        epoch: Epoch,
        version: CatalogVersion,
        range: vasto_core::record::BandRange,
        state: RangeState,
    ) -> Result<Lsn, ReplicaError> {
        self.meta.head.epoch = self.meta.head.epoch.max(epoch);
        self.log_control(Body::RangeState { version, range, state })
    }

    fn control(&mut self, order: Control, done: oneshot::Sender<Result<Lsn, ReplicaError>>) -> bool {
        let result = match order {
            Control::Seal { plan, version, range } => self.seal(plan, version, range),
            Control::Unseal { version } => self.unseal(version),
            Control::SetRange { epoch, version, range, state } => {
                let result = self.set_range(epoch, version, range, state);
                self.outcome_known();
                result
            }
            Control::Ingest { plan, range, files, objects, event_time_max, progress } => {
                self.ingest(plan, range, files, objects, event_time_max, progress)
            }
            Control::ApplyCatalog { epoch, version, role } => {
                self.meta.head.epoch = self.meta.head.epoch.max(epoch);
                self.meta.head.version = self.meta.head.version.max(version);
                self.role = role;
                self.shared.publish(&mut self.meta, role);
                if role != Role::TransferringLeadership {
                    self.outcome_known();
                }
                Ok(self.meta.head.applied_lsn)
            }
            Control::FenceCommitTime { commit_time } => self.promise(commit_time),
            Control::GcFloor { floor } => self.raise_floor(floor),
            #[cfg(test)]
            Control::Sync => self.sync().map(|()| self.meta.head.applied_lsn),
            Control::Stop => {
                self.stop();
                let _ = done.send(Ok(self.meta.head.applied_lsn));
                return true;
            }
        };
        let _ = done.send(result);
        false
    }

    /// Makes a commit time above this one durable: no later one can be at or below it.
    fn promise(&mut self, commit_time: u64) -> Result<Lsn, ReplicaError> {
        if self.meta.head.commit_time > commit_time {
            if self.unsynced_since.is_some() {
                self.sync()?;
            }
            return Ok(self.meta.head.applied_lsn);
        }
        self.log_control_at(Body::data(Vec::new()), self.commit_time().max(commit_time + 1))
    }

    fn raise_floor(&mut self, floor: u64) -> Result<Lsn, ReplicaError> {
        if floor <= self.meta.head.floor {
            return Ok(self.meta.head.applied_lsn);
        }
        self.log_control(Body::GcFloor { floor })
    }

    fn seal(
        &mut self,
        plan: vasto_core::PlanId,
        version: CatalogVersion,
        range: vasto_core::record::BandRange,
    ) -> Result<Lsn, ReplicaError> {
        if let Some(seal) = self.meta.ranges.seal
            && seal.plan == plan
            && seal.version == version
        {
            return Ok(seal.lsn); // asked again, for instance after a restart
        }
        let sealed_at = Instant::now();
        let lsn = self.log_control(Body::Seal { plan, version, range })?;
        self.sealed_at = Some(sealed_at);
        Ok(lsn)
    }

    fn unseal(&mut self, version: CatalogVersion) -> Result<Lsn, ReplicaError> {
        let Some(seal) = self.meta.ranges.seal else { return Ok(self.meta.head.applied_lsn) };
        let result = self.log_control(Body::Unseal { plan: seal.plan, version });
        self.outcome_known();
        result
    }

    /// Retries the held writes once the seal is decided, which applies or redirects them.
    fn outcome_known(&mut self) {
        if self.meta.ranges.seal.is_some() {
            return;
        }
        let mut pauses: Vec<u64> = Vec::new();
        pauses.extend(self.sealed_at.take().map(|at| at.elapsed().as_micros() as u64));
        let held = std::mem::take(&mut self.held);
        pauses.extend(held.iter().map(|held| held.since.elapsed().as_micros() as u64));
        self.shared.add_pauses(pauses);
        self.commit(held.into_iter().map(|held| held.command).collect(), Vec::new());
    }

    /// Answers held writes that have waited too long; the client retries.
    fn release_overdue(&mut self) {
        if self.held.iter().all(|held| held.since.elapsed() < SEALED_WRITES_WAIT) {
            return;
        }
        let (overdue, held) =
            std::mem::take(&mut self.held).into_iter().partition(|held| held.since.elapsed() >= SEALED_WRITES_WAIT);
        self.held = held;
        let overdue: Vec<Held> = overdue;
        for held in overdue {
            held.command.answer(Err(VastoError::new(
                ErrorCode::NodeBehind,
                "the key is changing its shard and the outcome is not known yet; try again",
            )
            .retry_after_ms(50)));
        }
    }

    fn ingest(
        &mut self,
        plan: vasto_core::PlanId,
        range: vasto_core::record::BandRange,
        files: Vec<std::path::PathBuf>,
        objects: Vec<vasto_core::record::IngestedObject>,
        event_time_max: u64,
        progress: Vec<FeedProgress>,
    ) -> Result<Lsn, ReplicaError> {
        if self.meta.ranges.ingested == Some(plan) {
            return Ok(self.meta.head.applied_lsn);
        }
        if !self.meta.ranges.all_are(range, RangeState::Arriving) {
            return Err(ReplicaError::Refused("only an arriving range can be filled".into()));
        }
        // Flushed first: an ingested file is durable at once, and no older write may become durable after it.
        self.sync()?;
        self.shared.engine.flush()?;
        self.shared.engine.ingest(files)?;
        self.max_event_times.raise_all(event_time_max);
        self.log_control(Body::Ingest { plan, range, objects, event_time_max, progress })
    }

    /// Ends the writer; queued commands are not executed any more.
    pub(super) fn stop(&mut self) {
        self.held.clear();
        self.shared.followers.abandon();
        self.shared.bucket_acks.abandon();
        self.shared.authority.abandon();
        if self.shared.closed().is_none() {
            let _ = self.sync();
            if let Err(error) = self.shared.engine.flush() {
                tracing::warn!(%error, "the memtable was not flushed at the stop; the log has it");
            }
        }
        self.shared.close("the node is stopping".into());
        self.shared.ended.store(true, Ordering::Release);
    }
}

/// Guard: the writer waits for its disk as long as this lives.
struct WaitsForDisk(Arc<Shared>);

impl Drop for WaitsForDisk {
    fn drop(&mut self) {
        self.0.busy_since_ms.store(0, Ordering::Release);
    }
}

fn wrong_epoch() -> VastoError {
    VastoError::new(ErrorCode::WrongEpoch, "this node does not own the key; fetch the topology and go to its owner")
}

/// Returns the error for a repetition of a write done before another replica may have been primary.
fn worked_on_without() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "this was done before the placement changed, and is not known to be replicated; read the value back",
    )
}

fn without_authority() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "this replica does not serve its shard now, another one does or will in a moment; nothing was written, ask again",
    )
    .retry_after_ms(20)
}

fn not_primary() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "only the primary of the shard does this, and this replica is not primary now; fetch the topology",
    )
    .retry_after_ms(20)
}

/// Returns the stored key of the head, for the persisted-position read.
pub(super) fn head_key() -> Vec<u8> {
    MetaKey::Head.encode()
}
