//! The handle of a keyspace: reads and writes of keys.
//!
//! **Invariant:** answers come in the order of the request, whatever shards they came from. A
//! batch that took effect in part is reported as [`ErrorKind::Unknown`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio_util::sync::DropGuard;
use vasto_core::catalog::Ack;
use vasto_proto::convert::ack_to_wire;
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use crate::batch::{Batch, Write, WriteOptions};
use crate::error::{Error, ErrorKind};
use crate::execute::{Executor, GroupResult, RequestProgress, strange_reply};
use crate::key::{IntoBytes, Key};
use crate::requests::{Delete, Put, WriteBatch};
use crate::route::{ReadFrom, WriteTo};
use crate::scan::Scan;
use crate::tuning::{GET_KEY_BYTES_MAX, GET_KEYS_MAX};
use crate::value::{Outcome, Value};
use crate::vasto::Client;

/// A keyspace to read and write. Cheap to clone; follows its topology by itself, and continues
/// while the master is away.
#[derive(Clone)]
pub struct Keyspace {
    executor: Arc<Executor>,
    time: Duration,
    from: ReadFrom,
    write_to: WriteTo,
    /// Ends the watch of the topology with the last clone.
    _watch: Arc<DropGuard>,
    /// Keeps the connections open.
    _client: Arc<Client>,
}

impl Keyspace {
    pub(crate) fn new(executor: Executor, time: Duration, watch: DropGuard, client: Arc<Client>) -> Self {
        Self {
            executor: Arc::new(executor),
            time,
            from: ReadFrom::Primary,
            write_to: WriteTo::Primary,
            _watch: Arc::new(watch),
            _client: client,
        }
    }

    pub(crate) fn parts(&self) -> (Arc<Executor>, Duration) {
        (self.executor.clone(), self.time)
    }

    /// Sets the replica that reads ask first; the primary unless set.
    pub fn read_from(mut self, from: ReadFrom) -> Self {
        self.from = from;
        self
    }

    /// Sets the replica that puts, deletes and batches go to; the primary unless set.
    ///
    /// Writes by choice ([`WriteTo::Zone`]) are *eventual*: every replica takes them, the later event time wins
    /// everywhere, also for deletes, and a reader at the primary sees them once they are replicated. Conditional
    /// writes, counters and appends go to the primary regardless.
    pub fn write_to(mut self, to: WriteTo) -> Self {
        self.write_to = to;
        self
    }

    pub(crate) fn reads(&self) -> ReadFrom {
        self.from.clone()
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

    /// Returns the epoch of the topology that this handle knows: raised by each change of ownership.
    pub fn epoch(&self) -> u64 {
        self.executor.routing.table().topology.epoch.0
    }

    /// Reads a key; `None` if it does not exist.
    ///
    /// # Errors
    /// `InvalidArgument` for a key over the limit, `NotFound` for a deleted keyspace, `Unavailable`,
    /// `Overloaded` or `DeadlineExceeded` when no answer came in time.
    pub async fn get(&self, key: impl Into<Key>) -> Result<Option<Value>, Error> {
        let key = key.into();
        key.check()?;
        let op = || Op::Get(v1::GetRequest { keys: vec![key.to_wire()] });
        let reply = self
            .executor
            .run(key.hash(), RequestProgress::new(false, self.time).from(self.reads()), key.key.len(), op)
            .await?;
        match reply {
            Reply::Get(v1::GetReply { mut values }) if values.len() == 1 => {
                values.pop().and_then(|one| one.value).map(Value::from_wire).transpose()
            }
            _ => Err(strange_reply(false)),
        }
    }

    /// Reads many keys, all shards in parallel; the answers are in the order of the keys.
    ///
    /// # Errors
    /// As of [`Keyspace::get`]; one key that could not be read fails the whole call.
    pub async fn get_many<K: Into<Key>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Vec<Option<Value>>, Error> {
        let keys: Vec<Key> = keys.into_iter().map(Into::into).collect();
        keys.iter().try_for_each(Key::check)?;
        let hashes: Vec<u64> = keys.iter().map(Key::hash).collect();
        let mut values: Vec<Option<Value>> = vec![None; keys.len()];
        let mut failed: Option<Error> = None;
        let split = |positions: Vec<usize>, progress: &RequestProgress| {
            let most = GET_KEYS_MAX.min(progress.group_most);
            split_gets(positions, most, |at| keys[at].key.len())
        };
        let op = |positions: &[usize]| {
            let bytes = positions.iter().map(|at| keys[*at].key.len()).sum();
            (Op::Get(v1::GetRequest { keys: positions.iter().map(|at| keys[*at].to_wire()).collect() }), bytes)
        };
        let done = |group| match group {
            GroupResult::Done(positions, Reply::Get(reply)) if reply.values.len() == positions.len() => {
                for (at, value) in positions.into_iter().zip(reply.values) {
                    match value.value.map(Value::from_wire).transpose() {
                        Ok(value) => values[at] = value,
                        Err(error) => failed = Some(error),
                    }
                }
            }
            GroupResult::Failed(error) => failed = Some(error),
            GroupResult::Done(..) | GroupResult::Again(..) => failed = Some(strange_reply(false)),
        };
        let progress = RequestProgress::new(false, self.time).from(self.reads());
        self.executor.run_many(keys.len(), progress, |at| hashes[at], split, op, done).await;
        failed.map_or(Ok(values), Err)
    }

    /// Writes a key; await it, after setting options if need be:
    /// `ks.put("k", "v").ttl(Duration::from_secs(60)).await?`.
    ///
    /// A put whose reply was lost is sent again. It may then take effect twice, the second time with a
    /// later event time; give an [`event_time`](Put::event_time) where that matters.
    ///
    /// # Errors
    /// Of the await: `InvalidArgument` over a limit, `NotFound` for a deleted keyspace,
    /// `Unavailable`, `Overloaded` or `DeadlineExceeded` when nothing was written in time, and
    /// `Unknown` when it may have been written.
    pub fn put(&self, key: impl Into<Key>, value: impl IntoBytes) -> Put<'_> {
        let write = Write { key: key.into(), value: Some(value.into_bytes()), options: WriteOptions::default() };
        Put { keyspace: self, write, ack: None, condition: None }
    }

    /// Deletes a key, whether or not it exists; await it.
    ///
    /// # Errors
    /// As of [`Keyspace::put`].
    pub fn delete(&self, key: impl Into<Key>) -> Delete<'_> {
        let write = Write { key: key.into(), value: None, options: WriteOptions::default() };
        Delete { keyspace: self, write, ack: None, condition: None }
    }

    /// Writes a batch; await it. It is atomic for each partition key; a batch over several shards is
    /// split and sent in parallel. The outcomes are in the order of the batch.
    ///
    /// # Errors
    /// As of [`Keyspace::put`]; `Unknown` also when the batch took effect in part. No part of a batch
    /// that exceeds a limit is sent.
    pub fn write(&self, batch: Batch) -> WriteBatch<'_> {
        WriteBatch { keyspace: self, batch, ack: None }
    }

    /// Returns a scan in the order of user keys, of everything unless narrowed.
    pub fn scan(&self) -> Scan {
        Scan::new(self.clone())
    }

    pub(crate) async fn write_one(&self, write: Write, ack: Option<Ack>) -> Result<Outcome, Error> {
        write.check(now_us())?;
        let op =
            || Op::Write(v1::WriteRequest { ops: vec![write.to_wire()], ack: ack_to_wire(ack), ..Default::default() });
        let progress = RequestProgress::new(true, self.time).from(self.write_to.replica());
        match self.executor.run(write.key.hash(), progress, write.bytes(), op).await? {
            Reply::Write(v1::WriteReply { outcomes }) if outcomes.len() == 1 => Outcome::from_wire(&outcomes[0]),
            _ => Err(strange_reply(true)),
        }
    }

    pub(crate) async fn write_batch(&self, batch: Batch, ack: Option<Ack>) -> Result<Vec<Outcome>, Error> {
        batch.check(now_us())?;
        let writes = &batch.writes;
        let hashes: Vec<u64> = writes.iter().map(|write| write.key.hash()).collect();
        let mut outcomes: Vec<Option<Outcome>> = vec![None; writes.len()];
        let mut errors: Vec<Error> = Vec::new();
        let op = |positions: &[usize]| {
            let bytes = positions.iter().map(|at| writes[*at].bytes()).sum();
            let ops = positions.iter().map(|at| writes[*at].to_wire()).collect();
            (Op::Write(v1::WriteRequest { ops, ack: ack_to_wire(ack), ..Default::default() }), bytes)
        };
        let done = |group| match group {
            GroupResult::Done(positions, Reply::Write(reply)) if reply.outcomes.len() == positions.len() => {
                for (at, outcome) in positions.into_iter().zip(&reply.outcomes) {
                    match Outcome::from_wire(outcome) {
                        Ok(outcome) => outcomes[at] = Some(outcome),
                        Err(error) => errors.push(error),
                    }
                }
            }
            GroupResult::Failed(error) => errors.push(error),
            GroupResult::Done(..) | GroupResult::Again(..) => errors.push(strange_reply(true)),
        };
        let progress = RequestProgress::new(true, self.time).from(self.write_to.replica());
        self.executor.run_many(writes.len(), progress, |at| hashes[at], |all, _| vec![all], op, done).await;
        all_or_error(outcomes, errors)
    }
}

/// Returns the outcomes of a batch, or the most informative error.
fn all_or_error(outcomes: Vec<Option<Outcome>>, errors: Vec<Error>) -> Result<Vec<Outcome>, Error> {
    let total = outcomes.len();
    let known: Vec<Outcome> = outcomes.into_iter().flatten().collect();
    let unknown = errors.iter().find(|error| error.kind() == ErrorKind::Unknown).cloned();
    match unknown.or_else(|| errors.into_iter().next()) {
        None if known.len() == total => Ok(known),
        None => Err(strange_reply(true)),
        Some(error) if known.is_empty() => Err(error),
        Some(error) => {
            let message = format!("the batch took effect in part ({} of {total} writes): {error}", known.len());
            Err(Error::new(ErrorKind::Unknown, message))
        }
    }
}

/// Splits the keys of one shard into requests of at most `most` keys and a bounded size.
fn split_gets(positions: Vec<usize>, most: usize, bytes_of: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
    let mut requests: Vec<Vec<usize>> = Vec::new();
    let mut bytes = 0;
    for at in positions {
        bytes += bytes_of(at);
        match requests.last_mut() {
            Some(last) if last.len() < most && bytes <= GET_KEY_BYTES_MAX => last.push(at),
            _ => {
                bytes = bytes_of(at);
                requests.push(vec![at]);
            }
        }
    }
    requests
}

/// Returns the wall clock in microseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "the one place where the client reads the wall clock")]
pub(crate) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn gets_are_cut_by_number_and_by_bytes() {
        assert_eq!(split_gets(vec![0, 1, 2, 3, 4], 2, |_| 1), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(split_gets(vec![0, 1, 2], 9, |_| GET_KEY_BYTES_MAX / 2), [vec![0, 1], vec![2]]);
        assert_eq!(split_gets(vec![7], 1, |_| GET_KEY_BYTES_MAX * 2), [vec![7]]);
        assert!(split_gets(vec![], 5, |_| 1).is_empty());
    }

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
