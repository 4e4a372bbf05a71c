//! The writer of a replica: the only thread that changes it, started when there are commands (see
//! [`super::queue`]).
//!
//! **Invariants**
//! - Commands are executed in the order of the queue. Those of clients and of other shards' logs
//!   that wait together are one group; any other command ends the group and is executed alone after
//!   it.
//! - What was acknowledged as `os` is synced soon: a writer becomes idle only once nothing waits
//!   and all is synced.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use super::command::{Command, Control};
use super::group::{CommandGroup, Committer};
use super::shared::Shared;
use super::store::Store;

/// Longest wait for a command while something else waits.
const LOOK: Duration = Duration::from_millis(50);

/// State that the writer thread owns.
pub(super) struct Writer {
    committer: Committer,
    commands: Receiver<Command>,
}

impl Writer {
    pub(super) fn new(store: Store, commands: Receiver<Command>) -> Self {
        Self { committer: Committer::new(store), commands }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.committer.store.shared
    }

    /// Returns the next command, if one waits.
    pub(super) fn waiting(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Runs until the writer is stopped, every handle is gone, or no command has come for
    /// `patience`: then it returns itself.
    pub(super) fn run(mut self, patience: Duration) -> Option<Self> {
        loop {
            let Committer { store, held, slowed } = &self.committer;
            let is_idle = held.is_empty() && slowed.is_empty() && store.is_synced();
            let wait = match (is_idle, slowed.first_due_in()) {
                (true, _) => patience,
                (false, Some(due)) => due.min(LOOK),
                (false, None) => LOOK,
            };
            let first = match self.commands.recv_timeout(wait) {
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
            self.committer.release_slowed();
            self.committer.held.answer_overdue();
            self.committer.store.sync_overdue();
        }
        self.stop();
        None
    }

    /// Executes one command and those queued after it; returns true when the writer has ended.
    pub(super) fn take(&mut self, first: Command) -> bool {
        let mut group = CommandGroup::default();
        let mut alone = None;
        let mut next = Some(first);
        while let Some(command) = next {
            alone = group.add(command);
            if alone.is_some() || group.is_full() {
                break;
            }
            next = self.waiting();
        }
        self.committer.commit(group);
        match alone {
            Some(Command::Control(order, done)) => {
                let is_end = matches!(order, Control::Stop);
                let _ = done.send(self.committer.control(order));
                return is_end;
            }
            Some(Command::Replicate(command)) => {
                let result = self.committer.store.take_records(
                    command.source,
                    command.records,
                    command.covered,
                );
                let _ = command.done.send(result);
            }
            Some(Command::Position(done)) => {
                let _ = done.send(self.committer.store.position());
            }
            Some(Command::Write(_) | Command::Apply(_)) | None => {}
        }
        false
    }

    /// Ends the writer; queued commands are not executed any more.
    pub(super) fn stop(&mut self) {
        self.committer.stop();
    }
}
