//! Handle to an open replica: queues what changes the replica.
//!
//! **Invariant:** a request that cannot be queued is answered at once, and was not begun.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Semaphore, oneshot};
use vasto_core::catalog::Ack;
use vasto_core::ids::{KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_core::limits::WRITE_QUEUE_BYTES_MAX;
use vasto_core::record::{FeedProgress, KeyEntry, Record};
use vasto_core::{ErrorCode, VastoError};

use super::command::{
    ApplyCommand, Command, Completion, Control, Position, ReplicaError, ReplicateCommand,
    WriteCommand, WriteContext, WriteOp,
};
use super::queue::Queue;
use super::shared::Shared;

/// A handle to an open replica.
#[derive(Clone)]
pub(crate) struct Replica {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub id: ReplicaId,
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Arc<Queue>,
    queue_bytes: Arc<Semaphore>,
}

impl Replica {
    pub(super) fn new(
        keyspace: KeyspaceId,
        shard: ShardId,
        id: ReplicaId,
        shared: Arc<Shared>,
        commands: Queue,
    ) -> Self {
        let queue_bytes = Arc::new(Semaphore::new(WRITE_QUEUE_BYTES_MAX));
        Self { keyspace, shard, id, shared, commands: Arc::new(commands), queue_bytes }
    }

    /// For tests: queues a write without a context from its sender.
    #[cfg(test)]
    pub(crate) fn write(&self, ops: Vec<WriteOp>, ack: Ack, bytes: usize, done: Completion) {
        self.write_as(ops, ack, bytes, WriteContext::default(), done);
    }

    /// Queues a client's write with the context that its sender reported; calls `done` exactly
    /// once. Refuses the write at once when the queue is full.
    pub(crate) fn write_as(
        &self,
        ops: Vec<WriteOp>,
        ack: Ack,
        bytes: usize,
        context: WriteContext,
        done: Completion,
    ) {
        if self.shared.shed.load(Ordering::Relaxed) {
            done(Err(VastoError::new(
                ErrorCode::Overloaded,
                "the replica's log is full because another replica does not read it; see `vasto cluster status`",
            )
            .retry_after_ms(1_000)));
            return;
        }
        let weight = (bytes + 64).min(WRITE_QUEUE_BYTES_MAX) as u32;
        let Ok(permit) = self.queue_bytes.clone().try_acquire_many_owned(weight) else {
            done(Err(self.queue_is_full()));
            return;
        };
        // A command that is refused because the writer has ended answers itself when it is dropped.
        let _ = self.commands.send(Command::Write(
            WriteCommand::new(ops, ack, done, Some(permit)).with_context(context),
        ));
    }

    /// Returns the refusal of a write for which the queue has no room. What fills it because writes
    /// wait for a change of shards costs a client no budget of retries: it only waits, too.
    fn queue_is_full(&self) -> VastoError {
        let waits = self.shared.view.load().ranges.seal.is_some() || self.shared.throttle.slows();
        match waits {
            true => VastoError::new(
                ErrorCode::NodeBehind,
                "keys of the replica are changing their shard, and as many writes wait for that as may; try again",
            )
            .retry_after_ms(50),
            false => VastoError::new(
                ErrorCode::Overloaded,
                "the replica's write queue is full; slow down",
            )
            .retry_after_ms(20),
        }
    }

    /// Merges entries of another log, at most a batch; returns once they are durable here.
    pub(crate) async fn apply(
        &self,
        entries: Vec<KeyEntry>,
        progress: Vec<FeedProgress>,
    ) -> Result<Lsn, ReplicaError> {
        self.apply_as(entries, progress, true).await
    }

    /// Merges entries of another log, at most a batch; returns the LSN that covers them once they
    /// are visible, with `sync` once they are durable. Without it they are durable when the log has
    /// synced that LSN.
    pub(crate) async fn apply_as(
        &self,
        entries: Vec<KeyEntry>,
        progress: Vec<FeedProgress>,
        sync: bool,
    ) -> Result<Lsn, ReplicaError> {
        self.ask(|done| Command::Apply(ApplyCommand { entries, progress, sync, done })).await
    }

    /// Takes records of another replica's log; returns once they are durable here.
    ///
    /// # Errors
    /// [`ReplicaError::Gap`] when a record before them is missing: no record after the gap is
    /// taken.
    pub(crate) async fn replicate(
        &self,
        source: ReplicaId,
        records: Vec<Record>,
        covered: Lsn,
    ) -> Result<(), ReplicaError> {
        self.ask(|done| Command::Replicate(ReplicateCommand { source, records, covered, done }))
            .await
    }

    /// Returns the position of the replica, with everything durable. A closed replica returns what
    /// it settled before.
    pub(crate) async fn position(&self) -> Result<Position, ReplicaError> {
        match self.ask(Command::Position).await {
            Err(_) if self.is_closed() && !self.shared.ended.load(Ordering::Acquire) => {
                Ok(self.settled())
            }
            answer => answer,
        }
    }

    /// Changes the replica itself; returns once the change is durable.
    pub(crate) async fn control(&self, order: Control) -> Result<Lsn, ReplicaError> {
        self.ask(|done| Command::Control(order, done)).await
    }

    /// Queues a command and waits for its result.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, ReplicaError>>) -> Command,
    ) -> Result<T, ReplicaError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(command(done))?;
        answer.await.map_err(|_| ReplicaError::Stopped)?
    }

    /// Syncs, flushes and ends the writer, then stops the engine's background work.
    pub(crate) async fn stop(&self) {
        let _ = self.control(Control::Stop).await;
        let (shared, thread) = (self.shared.clone(), self.commands.take_thread());
        let end = move || {
            if let Some(thread) = thread {
                let _ = thread.join();
            }
            shared.engine.close();
        };
        let _ = tokio::task::spawn_blocking(end).await;
    }
}
