//! Puts, deletes and batches, which take options before they are awaited.
//!
//! **Invariant:** nothing is checked or sent before the `await`. A batch that took effect in part
//! is [`ErrorKind::Unknown`].

use std::future::IntoFuture;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use vasto_core::catalog::Ack;
use vasto_proto::convert::ack_to_wire;
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_proto::v1::write_op::Op as Change;

use crate::batch::{Batch, Write, WriteOptions};
use crate::error::{Error, ErrorKind, strange_reply};
use crate::execute::GroupResult;
use crate::key::{IntoBytes, Key};
use crate::keyspace::Keyspace;
use crate::value::Outcome;

impl Keyspace {
    /// Writes a key; await it, after setting options if need be:
    /// `ks.put("k", "v").ttl(Duration::from_secs(60)).await?`.
    ///
    /// A put whose reply was lost is sent again. It may then take effect twice, the second time
    /// with a later event time; give an [`event_time`](Put::event_time) where that matters.
    ///
    /// # Errors
    /// Of the await: `InvalidArgument` over a limit, `NotFound` for a deleted keyspace,
    /// `Unavailable`, `Overloaded` or `DeadlineExceeded` when nothing was written in time, and
    /// `Unknown` when it may have been written.
    pub fn put(&self, key: impl Into<Key>, value: impl IntoBytes) -> Put<'_> {
        let write = Write {
            key: key.into(),
            value: Some(value.into_bytes()),
            options: WriteOptions::default(),
        };
        Put(SingleWrite { keyspace: self, write, ack: None, condition: None })
    }

    /// Deletes a key, whether or not it exists; await it.
    ///
    /// # Errors
    /// As of [`Keyspace::put`].
    pub fn delete(&self, key: impl Into<Key>) -> Delete<'_> {
        let write = Write { key: key.into(), value: None, options: WriteOptions::default() };
        Delete(SingleWrite { keyspace: self, write, ack: None, condition: None })
    }

    /// Writes a batch; await it. It is atomic for each partition key; a batch over several shards
    /// is split and sent in parallel. The outcomes are in the order of the batch.
    ///
    /// # Errors
    /// As of [`Keyspace::put`]; `Unknown` also when the batch took effect in part. No part of a
    /// batch that exceeds a limit is sent.
    pub fn write(&self, batch: Batch) -> WriteBatch<'_> {
        WriteBatch { keyspace: self, batch, ack: None }
    }
}

/// A put that is sent when it is awaited; see [`Keyspace::put`].
#[must_use = "a put does nothing until it is awaited"]
pub struct Put<'a>(SingleWrite<'a>);

impl Put<'_> {
    /// Sets the time to live, at least 1 ms. The keyspace's default if not given.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.0.write.options = self.0.write.options.ttl(ttl);
        self
    }

    /// Sets the event time in microseconds since 1970, not 0 and at most a minute ahead of the
    /// clock. The later event time wins; repeating a put with its own event time has no effect.
    pub fn event_time(mut self, micros: u64) -> Self {
        self.0.write.options = self.0.write.options.event_time(micros);
        self
    }

    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.0.ack = Some(ack);
        self
    }

    /// Writes only when the key does not exist; else the outcome is [`Outcome::NotApplied`].
    pub fn if_absent(mut self) -> Self {
        self.0.condition = Some(Condition::Absent);
        self
    }

    /// Writes only when the stored value has this version
    /// ([`Value::version`](crate::Value::version)); else the outcome is [`Outcome::NotApplied`].
    pub fn if_version(mut self, version: u64) -> Self {
        self.0.condition = Some(Condition::Version(version));
        self
    }
}

impl<'a> IntoFuture for Put<'a> {
    type Output = Result<Outcome, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        self.0.send().boxed()
    }
}

/// A delete that is sent when it is awaited; see [`Keyspace::delete`].
#[must_use = "a delete does nothing until it is awaited"]
pub struct Delete<'a>(SingleWrite<'a>);

impl Delete<'_> {
    /// Sets the event time; as [`Put::event_time`].
    pub fn event_time(mut self, micros: u64) -> Self {
        self.0.write.options = self.0.write.options.event_time(micros);
        self
    }

    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.0.ack = Some(ack);
        self
    }

    /// Deletes only when the stored value has this version; as of a put.
    pub fn if_version(mut self, version: u64) -> Self {
        self.0.condition = Some(Condition::Version(version));
        self
    }
}

impl<'a> IntoFuture for Delete<'a> {
    type Output = Result<Outcome, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        self.0.send().boxed()
    }
}

/// The condition of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    /// The key does not exist.
    Absent,
    /// The stored value has this version ([`Value::version`](crate::Value::version)).
    Version(u64),
}

/// A put or a delete with its options.
struct SingleWrite<'a> {
    keyspace: &'a Keyspace,
    write: Write,
    ack: Option<Ack>,
    condition: Option<Condition>,
}

impl SingleWrite<'_> {
    async fn send(self) -> Result<Outcome, Error> {
        self.write.check(now_us())?;
        match self.condition {
            None => self.send_plain().await,
            Some(condition) => self.send_if(condition).await,
        }
    }

    async fn send_plain(self) -> Result<Outcome, Error> {
        let request = || {
            let ops = vec![self.write.to_wire()];
            Op::Write(v1::WriteRequest { ops, ack: ack_to_wire(self.ack), ..Default::default() })
        };
        let (executor, progress) = (self.keyspace.executor(), self.keyspace.begin_write());
        match executor.run(self.write.key.hash(), progress, self.write.bytes(), request).await? {
            Reply::Write(v1::WriteReply { outcomes }) if outcomes.len() == 1 => {
                Outcome::from_wire(&outcomes[0])
            }
            _ => Err(strange_reply(true)),
        }
    }

    /// Executes the write with a condition, at the primary.
    async fn send_if(self, condition: Condition) -> Result<Outcome, Error> {
        if self.write.options.event_time.is_some() {
            let message = "a conditional write is stamped by the primary; leave the event time out";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let mut op = self.write.to_wire();
        match (&mut op.op, condition) {
            (Some(Change::Put(put)), Condition::Absent) => put.if_absent = true,
            (Some(Change::Put(put)), Condition::Version(version)) => put.if_version = Some(version),
            (Some(Change::Delete(delete)), Condition::Version(version)) => {
                delete.if_version = Some(version)
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "a delete of an absent key does nothing",
                ));
            }
        }
        let outcome =
            self.keyspace.modify(&self.write.key, op, self.write.bytes(), self.ack).await?;
        Outcome::from_wire(&outcome)
    }
}

/// A batch that is sent when it is awaited; see [`Keyspace::write`].
#[must_use = "a batch does nothing until it is awaited"]
pub struct WriteBatch<'a> {
    keyspace: &'a Keyspace,
    batch: Batch,
    ack: Option<Ack>,
}

impl WriteBatch<'_> {
    /// Asks for a stronger acknowledgement than the keyspace's.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = Some(ack);
        self
    }

    async fn send(self) -> Result<Vec<Outcome>, Error> {
        self.batch.check(now_us())?;
        let writes = &self.batch.writes;
        let hashes: Vec<u64> = writes.iter().map(|write| write.key.hash()).collect();
        let mut outcomes: Vec<Option<Outcome>> = vec![None; writes.len()];
        let mut errors: Vec<Error> = Vec::new();
        let op = |positions: &[usize]| {
            let bytes = positions.iter().map(|at| writes[*at].bytes()).sum();
            let ops = positions.iter().map(|at| writes[*at].to_wire()).collect();
            (
                Op::Write(v1::WriteRequest {
                    ops,
                    ack: ack_to_wire(self.ack),
                    ..Default::default()
                }),
                bytes,
            )
        };
        let done = |group: GroupResult| match group {
            Ok((positions, Reply::Write(reply))) if reply.outcomes.len() == positions.len() => {
                for (at, outcome) in positions.into_iter().zip(&reply.outcomes) {
                    match Outcome::from_wire(outcome) {
                        Ok(outcome) => outcomes[at] = Some(outcome),
                        Err(error) => errors.push(error),
                    }
                }
            }
            Err(error) => errors.push(error),
            Ok(_) => errors.push(strange_reply(true)),
        };
        let (executor, progress) = (self.keyspace.executor(), self.keyspace.begin_write());
        executor
            .run_many(writes.len(), progress, |at| hashes[at], |all, _| vec![all], op, done)
            .await;
        all_or_error(outcomes, errors)
    }
}

impl<'a> IntoFuture for WriteBatch<'a> {
    type Output = Result<Vec<Outcome>, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        self.send().boxed()
    }
}

/// Returns the outcomes of a batch, or the most informative error.
fn all_or_error(outcomes: Vec<Option<Outcome>>, errors: Vec<Error>) -> Result<Vec<Outcome>, Error> {
    let total = outcomes.len();
    let taken: Vec<Outcome> = outcomes.into_iter().flatten().collect();
    let unknown = errors.iter().find(|error| error.kind() == ErrorKind::Unknown).cloned();
    match unknown.or_else(|| errors.into_iter().next()) {
        None if taken.len() == total => Ok(taken),
        None => Err(strange_reply(true)),
        Some(error) if taken.is_empty() => Err(error),
        Some(error) => {
            let message = format!(
                "the batch took effect in part ({} of {total} writes): {error}",
                taken.len()
            );
            Err(Error::new(ErrorKind::Unknown, message))
        }
    }
}

/// Returns the wall clock in microseconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the client reads the wall clock"
)]
fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_batch_in_part_is_unknown() {
        let applied = Some(Outcome::Applied { event_time: 1 });
        let refused = Error::new(ErrorKind::Overloaded, "full");
        let kind = |outcomes, errors| all_or_error(outcomes, errors).unwrap_err().kind();
        assert_eq!(all_or_error(vec![applied, applied], vec![]).unwrap().len(), 2);
        assert_eq!(all_or_error(vec![], vec![]).unwrap(), []);
        assert_eq!(kind(vec![None, None], vec![refused.clone()]), ErrorKind::Overloaded);
        assert_eq!(kind(vec![applied, None], vec![refused.clone()]), ErrorKind::Unknown);
        let lost = refused.clone().with_kind(ErrorKind::Unknown);
        assert_eq!(kind(vec![None, None], vec![refused, lost]), ErrorKind::Unknown);
    }
}
