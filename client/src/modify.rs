//! Read-modify-writes: counters, maxima, appends and conditional writes, executed by the primary.
//!
//! **Invariant:** each carries the client's id and its own number, so that the replica which may have
//! executed it answers a repetition with the first result. Once that replica is no longer primary, the
//! outcome is [`ErrorKind::Unknown`]; nothing is repeated elsewhere.

use std::future::IntoFuture;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;
use vasto_core::catalog::Ack;
use vasto_core::ids::ReplicaId;
use vasto_core::limits::check_value;
use vasto_proto::convert::ack_to_wire;
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_proto::v1::write_op::Op as Change;

use crate::batch::Write;
use crate::error::{Error, ErrorKind};
use crate::execute::{Executor, Failed, RequestProgress, strange_reply};
use crate::key::{IntoBytes, Key};
use crate::keyspace::{Keyspace, now_us};
use crate::retry::{Failure, maybe_applied};
use crate::value::{Outcome, Value};

/// The condition of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// The key does not exist.
    Absent,
    /// The stored value has this version ([`Value::version`]).
    Version(u64),
}

/// A read-modify-write that is sent when it is awaited, for instance [`Keyspace::add_i64`].
#[must_use = "nothing happens until it is awaited"]
pub struct Modify<'a, T> {
    keyspace: &'a Keyspace,
    key: Key,
    change: Change,
    ack: Option<Ack>,
    read: fn(v1::WriteOutcome) -> Result<T, Error>,
}

impl<T> Modify<'_, T> {
    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = Some(ack);
        self
    }
}

impl<'a, T: Send + 'a> IntoFuture for Modify<'a, T> {
    type Output = Result<T, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            self.key.check()?;
            let bytes = match &self.change {
                Change::Append(bytes) => {
                    check_value(bytes)?;
                    bytes.len()
                }
                _ => 8,
            };
            let op = v1::WriteOp { key: Some(self.key.to_wire()), event_time: None, op: Some(self.change) };
            let outcome = self.keyspace.modify(&self.key, op, bytes, self.ack).await?;
            (self.read)(outcome)
        }
        .boxed()
    }
}

fn number(outcome: v1::WriteOutcome) -> Result<Value, Error> {
    outcome.value.map(Value::from_wire).transpose()?.ok_or_else(|| strange_reply(true))
}

fn as_i64(outcome: v1::WriteOutcome) -> Result<i64, Error> {
    number(outcome)?.as_i64().ok_or_else(|| strange_reply(true))
}

fn as_f64(outcome: v1::WriteOutcome) -> Result<f64, Error> {
    number(outcome)?.as_f64().ok_or_else(|| strange_reply(true))
}

fn as_outcome(outcome: v1::WriteOutcome) -> Result<Outcome, Error> {
    Outcome::from_wire(&outcome)
}

impl Keyspace {
    fn change<T>(
        &self,
        key: impl Into<Key>,
        change: Change,
        read: fn(v1::WriteOutcome) -> Result<T, Error>,
    ) -> Modify<'_, T> {
        Modify { keyspace: self, key: key.into(), change, ack: None, read }
    }

    /// Adds to a counter, which is 0 when the key does not exist; returns the sum.
    ///
    /// Counters are exact while one primary serves, through restarts and leadership transfers. When a
    /// primary is lost for good, increments that no other replica had are lost with it, unless a second
    /// replica acknowledged them.
    ///
    /// # Errors
    /// As of [`Keyspace::put`]; `WrongType` when the value is no counter, `OutOfRange` when the sum overflows.
    /// `Unknown` when the primary was replaced before it answered.
    pub fn add_i64(&self, key: impl Into<Key>, addend: i64) -> Modify<'_, i64> {
        self.change(key, Change::AddI64(addend), as_i64)
    }

    /// Adds to a number, which is 0 when the key does not exist; returns the sum.
    ///
    /// # Errors
    /// As of [`Keyspace::add_i64`]; `OutOfRange` when the addend or the sum is not finite.
    pub fn add_f64(&self, key: impl Into<Key>, addend: f64) -> Modify<'_, f64> {
        self.change(key, Change::AddF64(addend), as_f64)
    }

    /// Raises a number to at least `least`; returns the stored number.
    ///
    /// # Errors
    /// As of [`Keyspace::add_f64`].
    pub fn max_f64(&self, key: impl Into<Key>, least: f64) -> Modify<'_, f64> {
        self.change(key, Change::MaxF64(least), as_f64)
    }

    /// Lowers a number to at most `most`; returns the stored number.
    ///
    /// # Errors
    /// As of [`Keyspace::add_f64`].
    pub fn min_f64(&self, key: impl Into<Key>, most: f64) -> Modify<'_, f64> {
        self.change(key, Change::MinF64(most), as_f64)
    }

    /// Appends to the bytes of a value, which is empty when the key does not exist.
    ///
    /// # Errors
    /// As of [`Keyspace::add_i64`]; `InvalidArgument` when the value would be over its limit.
    pub fn append(&self, key: impl Into<Key>, bytes: impl IntoBytes) -> Modify<'_, Outcome> {
        self.change(key, Change::Append(bytes.into_bytes()), as_outcome)
    }

    /// Executes a put or delete with a condition.
    pub(crate) async fn write_if(
        &self,
        write: Write,
        condition: Condition,
        ack: Option<Ack>,
    ) -> Result<Outcome, Error> {
        write.check(now_us())?;
        if write.options.event_time.is_some() {
            let message = "a conditional write is stamped by the primary; leave the event time out";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let mut op = write.to_wire();
        match (&mut op.op, condition) {
            (Some(Change::Put(put)), Condition::Absent) => put.if_absent = true,
            (Some(Change::Put(put)), Condition::Version(version)) => put.if_version = Some(version),
            (Some(Change::Delete(delete)), Condition::Version(version)) => delete.if_version = Some(version),
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "a delete of an absent key does nothing")),
        }
        as_outcome(self.modify(&write.key, op, write.bytes(), ack).await?)
    }

    async fn modify(
        &self,
        key: &Key,
        op: v1::WriteOp,
        bytes: usize,
        ack: Option<Ack>,
    ) -> Result<v1::WriteOutcome, Error> {
        let (executor, time) = self.parts();
        let (client_id, sequence) = executor.next_operation();
        let request =
            v1::WriteRequest { ops: vec![op], ack: ack_to_wire(ack), client_id, sequence, tried_replica: 0, age_ms: 0 };
        match executor
            .run_at_primary(key.hash(), RequestProgress::new(true, time), key.key.len() + bytes, request)
            .await?
        {
            Reply::Write(v1::WriteReply { mut outcomes }) if outcomes.len() == 1 => {
                outcomes.pop().ok_or_else(|| strange_reply(true))
            }
            _ => Err(strange_reply(true)),
        }
    }
}

impl Executor {
    /// Has the primary execute the request once: repeats it only at the same replica, marked as a repetition.
    async fn run_at_primary(
        &self,
        hash: u64,
        mut progress: RequestProgress,
        bytes: usize,
        request: v1::WriteRequest,
    ) -> Result<Reply, Error> {
        // The replica that may have executed the request, and since when.
        let mut tried: Option<(ReplicaId, Instant)> = None;
        loop {
            let table = self.table(&progress)?;
            let shard = table.topology.shard_of(hash);
            let failed = match table.primary(shard) {
                None => Failed::new(Failure::Unreachable, format!("the primary of shard {shard} is not known")),
                Some((replica, node)) => {
                    if tried.is_some_and(|(before, _)| before != replica) {
                        return Err(Error::new(
                            ErrorKind::Unknown,
                            "the primary was replaced before it answered: the operation may or may not have taken \
                             effect; read the value back",
                        ));
                    }
                    let mut request = request.clone();
                    if let Some((before, since)) = tried {
                        request.tried_replica = before.0;
                        request.age_ms = u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX);
                    }
                    let began = Instant::now();
                    let op = Op::Write(request);
                    match self.attempt_at(&table, shard, node, progress.deadline, op, bytes, true).await {
                        Ok(reply) => return Ok(reply),
                        Err(failed) => {
                            if maybe_applied(failed.failure()) && tried.is_none() {
                                tried = Some((replica, began));
                            }
                            failed
                        }
                    }
                }
            };
            // The refusal of a repetition says nothing about the first attempt.
            self.recover(&table, &mut progress, failed).await?;
        }
    }
}

/// Conditions of a put.
impl crate::requests::Put<'_> {
    /// Writes only when the key does not exist; else the outcome is [`Outcome::NotApplied`].
    pub fn if_absent(mut self) -> Self {
        self.condition = Some(Condition::Absent);
        self
    }

    /// Writes only when the stored value has this version ([`Value::version`]); else the outcome is
    /// [`Outcome::NotApplied`].
    pub fn if_version(mut self, version: u64) -> Self {
        self.condition = Some(Condition::Version(version));
        self
    }
}

/// Conditions of a delete.
impl crate::requests::Delete<'_> {
    /// Deletes only when the stored value has this version; as of a put.
    pub fn if_version(mut self, version: u64) -> Self {
        self.condition = Some(Condition::Version(version));
        self
    }
}
