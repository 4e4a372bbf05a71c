//! The handle of a keyspace: its options, and the state that its requests share. The requests
//! themselves are in [`crate::request`].

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::execute::{Executor, RequestProgress};
use crate::route::{ReadFrom, WriteTo};

/// A keyspace to read and write. Cheap to clone; follows its topology by itself, and continues
/// while the master is away.
#[derive(Clone)]
pub struct Keyspace {
    executor: Arc<Executor>,
    time: Duration,
    read_from: ReadFrom,
    write_to: WriteTo,
    /// Ends the watch of the topology with the last clone.
    _watch: Arc<DropGuard>,
    /// Keeps the connections open.
    _client: Arc<DropGuard>,
}

impl Keyspace {
    pub(crate) fn new(
        executor: Executor,
        time: Duration,
        watch: DropGuard,
        client: Arc<DropGuard>,
    ) -> Self {
        Self {
            executor: Arc::new(executor),
            time,
            read_from: ReadFrom::Primary,
            write_to: WriteTo::Primary,
            _watch: Arc::new(watch),
            _client: client,
        }
    }

    /// Sets the replica that reads ask first; the primary unless set.
    pub fn read_from(mut self, from: ReadFrom) -> Self {
        self.read_from = from;
        self
    }

    /// Sets the replica that puts, deletes and batches go to; the primary unless set.
    ///
    /// Writes by choice ([`WriteTo::Zone`]) are *eventual*: every replica takes them, the later
    /// event time wins everywhere, also for deletes, and a reader at the primary sees them once
    /// they are replicated. Conditional writes, counters and appends go to the primary regardless.
    pub fn write_to(mut self, to: WriteTo) -> Self {
        self.write_to = to;
        self
    }

    /// Sets the deadline of operations, retries included (10 s unless set).
    pub fn with_deadline(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }

    /// Returns the name of the keyspace.
    pub fn name(&self) -> String {
        self.executor.routing.table().topology.name.clone()
    }

    /// Returns the number of shards that this handle knows.
    pub fn shards(&self) -> u32 {
        self.executor.routing.table().topology.shards.len() as u32
    }

    /// Returns the epoch of the topology that this handle knows: raised by each change of
    /// ownership.
    pub fn epoch(&self) -> u64 {
        self.executor.routing.table().topology.epoch.0
    }

    pub(crate) fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Returns the progress of a read that begins now, at the replica of choice.
    pub(crate) fn begin_read(&self) -> RequestProgress {
        RequestProgress::new(false, self.time).from(self.read_from.clone())
    }

    /// Returns the progress of a put, delete or batch that begins now, at the replica of choice.
    pub(crate) fn begin_write(&self) -> RequestProgress {
        RequestProgress::new(true, self.time).from(self.write_to.replica())
    }

    /// Returns the progress of a read-modify-write that begins now: always at the primary.
    pub(crate) fn begin_modify(&self) -> RequestProgress {
        RequestProgress::new(true, self.time)
    }
}
