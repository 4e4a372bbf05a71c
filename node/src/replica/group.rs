//! Group commit: executes the commands that wait together, as few log records as they need.
//!
//! **Invariants**
//! - append, then sync (if a request needs it), then apply, then answer; no request is answered
//!   before it is as durable as requested.
//! - A full group is committed before the next request is assigned, so that no record is over its
//!   limit, whatever waits in the queue.
//! - After a failed append, sync or apply the outcome of requests in flight is `Unknown`, and none
//!   is retried as if it had not happened.

use tokio::sync::oneshot;
use vasto_core::catalog::Ack;
use vasto_core::ids::{Epoch, Lsn, OwnSeq};
use vasto_core::limits::{GROUP_BYTES_MAX, GROUP_OPS_MAX};
use vasto_core::record::FeedProgress;
use vasto_core::{ErrorCode, VastoError};

use super::admission::Admission;
use super::assign::Times;
use super::command::{ApplyCommand, Command, OpOutcome, ReplicaError, WriteCommand, WriteOp};
use super::held::{HeldWrites, Released};
use super::merge::key_entry_bytes;
use super::metrics;
use super::slowed::SlowedWrites;
use super::store::Store;
use super::write_group::WriteGroup;
use crate::clock::since_boot;
use crate::foreground::{Class, FOREGROUND};

/// Commands that are executed together.
#[derive(Default)]
pub(super) struct CommandGroup {
    writes: Vec<WriteCommand>,
    applies: Vec<ApplyCommand>,
    ops: usize,
    bytes: usize,
}

impl CommandGroup {
    /// Creates a group of writes that were queued before.
    pub(super) fn of(writes: Vec<WriteCommand>) -> Self {
        Self { writes, ..Self::default() }
    }

    /// Adds a command; returns it when it is executed alone.
    pub(super) fn add(&mut self, command: Command) -> Option<Command> {
        match command {
            Command::Write(command) => {
                self.ops += command.ops.len();
                self.bytes += command.ops.iter().map(WriteOp::bytes).sum::<usize>();
                self.writes.push(command);
            }
            Command::Apply(command) => {
                self.ops += command.entries.len() + 1;
                self.bytes += command.entries.iter().map(key_entry_bytes).sum::<usize>();
                self.applies.push(command);
            }
            alone @ (Command::Replicate(_) | Command::Position(_) | Command::Control(..)) => {
                return Some(alone);
            }
        }
        None
    }

    pub(super) fn is_full(&self) -> bool {
        self.ops >= GROUP_OPS_MAX || self.bytes >= GROUP_BYTES_MAX
    }
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

/// Executes commands on the store of a replica, and answers them.
pub(super) struct Committer {
    pub store: Store,
    pub held: HeldWrites,
    pub slowed: SlowedWrites,
}

impl Committer {
    pub(super) fn new(store: Store) -> Self {
        Self { store, held: HeldWrites::default(), slowed: SlowedWrites::default() }
    }

    /// Executes the commands, in as many group commits as they need.
    pub(super) fn commit(&mut self, commands: CommandGroup) {
        let CommandGroup { writes, applies, .. } = commands;
        let mut open = self.begin();
        for mut command in writes {
            open = self.with_room(open);
            let times = Times { now_us: self.store.now_us(), commit_time: open.commit_time };
            match self.store.admit(&mut command) {
                Err(error) => command.answer(Err(error)),
                Ok(Admission::Wait) => self.held.hold(command),
                Ok(Admission::Ready) => {
                    let Some(command) = self.slowed.pass(command, &self.store) else { continue };
                    match self.do_once(&command, &mut open.group, times) {
                        Ok(done) => {
                            open.must_sync |= command.ack != Ack::Os;
                            open.answers.push((command, done));
                        }
                        Err(error) => command.answer(Err(error)),
                    }
                }
            }
        }
        for command in applies {
            open = self.with_room(open);
            match self.store.merge_all(&command.entries, &mut open.group) {
                Ok(()) => {
                    open.must_sync |= command.sync;
                    open.progress.extend(&command.progress);
                    open.applied.push(command.done);
                }
                Err(error) => drop(command.done.send(Err(error))),
            }
        }
        self.finish(open);
    }

    /// Retries the held writes once the seal is decided, which applies or redirects them.
    pub(super) fn retry_held(&mut self) {
        if self.store.meta.ranges.seal.is_some() {
            return;
        }
        let Released { commands, pauses_us, pause } = self.held.release();
        self.store.shared.add_pauses(pauses_us, pause);
        self.commit(CommandGroup::of(commands));
    }

    /// Executes the writes that were held back long enough.
    pub(super) fn release_slowed(&mut self) {
        let due = self.slowed.take_due(&self.store.shared.throttle);
        if !due.is_empty() {
            self.commit(CommandGroup::of(due));
        }
    }

    /// Lets the writes that are held back for the sake of the tails wait for the outcome of a seal
    /// instead.
    pub(super) fn hold_slowed(&mut self) {
        let slowed = self.slowed.take_all(&self.store.shared.throttle);
        self.commit(CommandGroup::of(slowed));
    }

    /// Returns an empty group commit.
    fn begin(&self) -> OpenGroup {
        OpenGroup { commit_time: self.store.commit_time(), ..OpenGroup::default() }
    }

    /// Returns the group, or a new one once it is full and committed.
    fn with_room(&mut self, open: OpenGroup) -> OpenGroup {
        if !open.group.is_full() {
            return open;
        }
        self.finish(open);
        self.begin()
    }

    /// Assigns the operations of a request, unless it is a repetition whose result is known; then
    /// also returns the record of the first execution, and its epoch.
    fn do_once(
        &mut self,
        command: &WriteCommand,
        group: &mut WriteGroup,
        times: Times,
    ) -> Result<Done, VastoError> {
        let store = &mut self.store;
        let Some(id) = command.id.filter(|_| command.modifies()) else {
            return Ok((store.assign_all(&command.ops, group, times)?, None));
        };
        let key = (id.client, id.sequence);
        if let Some((_, outcomes)) = group.results.iter().find(|(id, _)| *id == key) {
            return Ok((outcomes.clone(), None));
        }
        if let Some(kept) = store.dedup.recall(&id, store.meta.identity.replica, store.now_us())? {
            // A result of an earlier incarnation precedes all records of this one.
            let own_seq = kept.own_seq.unwrap_or(store.meta.head.own_seq);
            return Ok((kept.outcomes.clone(), Some((own_seq, kept.epoch))));
        }
        let outcomes = store.assign_all(&command.ops, group, times)?;
        group.results.push((key, outcomes.clone()));
        Ok((outcomes, None))
    }

    /// Makes a group as durable as requested, and answers.
    fn finish(&mut self, open: OpenGroup) {
        let OpenGroup { commit_time, group, must_sync, answers, progress, applied } = open;
        let result = if !group.is_empty() || !progress.is_empty() {
            self.store.log_group(group, progress, commit_time, must_sync)
        } else if must_sync {
            // Nothing new to store, but stored entries may have been acknowledged as `os` only.
            self.store.sync_rest()
        } else {
            Ok(())
        };
        match &result {
            Ok(()) => {
                metrics::group(answers.len());
                let now = since_boot();
                for (command, done) in answers {
                    // Until it is durable here: other replicas and the bucket take their own time.
                    let class = Class::of_write(command.ack);
                    FOREGROUND.note(class, command.begun, now);
                    self.acknowledge(command, done);
                }
            }
            Err(error) => {
                let unknown = VastoError::new(
                    ErrorCode::Unknown,
                    format!("the outcome is not known: {error}"),
                );
                for (command, _) in answers {
                    command.answer(Err(unknown.clone()));
                }
            }
        }
        let result = result.map(|()| self.store.meta.head.applied_lsn);
        for done in applied {
            let _ = done.send(result.clone());
        }
    }

    /// Answers a write that is durable here, once it is as durable as its sender requested.
    fn acknowledge(&self, mut command: WriteCommand, (outcomes, first): Done) {
        let (shared, head) = (&self.store.shared, &self.store.meta.head);
        command.authority = Some(shared.authority.clone());
        match command.ack {
            Ack::Os | Ack::Fsync => command.answer(Ok(outcomes)),
            Ack::Replica => {
                let (own_seq, epoch) = first.unwrap_or((head.own_seq, head.epoch));
                match epoch < head.epoch {
                    true => command.answer(Err(done_at_an_earlier_epoch())),
                    false => shared.followers.wait(command, outcomes, own_seq, epoch),
                }
            }
            Ack::Bucket => shared.bucket_acks.wait(command, outcomes, head.applied_lsn),
        }
    }
}

/// Returns the error for a repetition of a write done before another replica may have been primary.
fn done_at_an_earlier_epoch() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "this was done before the placement changed, and is not known to be replicated; read the value back",
    )
}
