//! Read-modify-writes, executed by the primary: counters, maxima, appends, and the execution of
//! conditional writes.
//!
//! **Invariant:** each carries the client's id and its own number, so that the replica which may
//! have executed it answers a repetition with the first result. Once that replica is no longer
//! primary, the outcome is [`ErrorKind::Unknown`]; nothing is repeated elsewhere.

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

use crate::attempt::{Attempt, Failed};
use crate::error::{Error, ErrorKind, strange_reply};
use crate::execute::{Executor, RequestProgress};
use crate::key::{IntoBytes, Key};
use crate::keyspace::Keyspace;
use crate::retry::{Failure, maybe_applied};
use crate::value::{Outcome, Value};

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
                _ => size_of::<u64>(),
            };
            let op = v1::WriteOp {
                key: Some(self.key.to_wire()),
                event_time: None,
                op: Some(self.change),
            };
            let outcome =
                self.keyspace.modify(&self.key, op, self.key.key.len() + bytes, self.ack).await?;
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
    /// Counters are exact while one primary serves, through restarts and leadership transfers. When
    /// a primary is lost for good, increments that no other replica had are lost with it, unless a
    /// second replica acknowledged them.
    ///
    /// # Errors
    /// As of [`Keyspace::put`]; `WrongType` when the value is no counter, `OutOfRange` when the sum
    /// overflows. `Unknown` when the primary was replaced before it answered.
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

    /// Has the primary execute one operation of about `bytes`, once.
    pub(super) async fn modify(
        &self,
        key: &Key,
        op: v1::WriteOp,
        bytes: usize,
        ack: Option<Ack>,
    ) -> Result<v1::WriteOutcome, Error> {
        let executor = self.executor();
        let (client_id, sequence) = executor.next_operation();
        let request = v1::WriteRequest {
            ops: vec![op],
            ack: ack_to_wire(ack),
            client_id,
            sequence,
            tried_replica: 0,
            age_ms: 0,
        };
        match executor.run_at_primary(key.hash(), self.begin_modify(), bytes, request).await? {
            Reply::Write(v1::WriteReply { mut outcomes }) if outcomes.len() == 1 => {
                outcomes.pop().ok_or_else(|| strange_reply(true))
            }
            _ => Err(strange_reply(true)),
        }
    }
}

impl Executor {
    /// Has the primary execute the request once: repeats it only at the same replica, marked as a
    /// repetition.
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
                None => Failed::new(
                    Failure::Unreachable,
                    format!("the primary of shard {shard} is not known"),
                ),
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
                        request.age_ms =
                            u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX);
                    }
                    let began = Instant::now();
                    let attempt = Attempt {
                        table: &table,
                        shard,
                        node,
                        deadline: progress.deadline,
                        strict: true,
                    };
                    match self.attempt_at(attempt, Op::Write(request), bytes).await {
                        Ok(reply) => return Ok(reply),
                        Err(failed) => {
                            if maybe_applied(failed.failure) && tried.is_none() {
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
