//! Writes that are answered once a chunk in the bucket covers them.
//!
//! **Invariant:** each write is answered exactly once: with success when the bucket holds the log
//! up to its record, with `Unknown` when the bucket does not in time. A waiting write wakes the
//! shipper, and all writes that arrive while a chunk is being uploaded share the next one.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;
use vasto_core::ids::Lsn;
use vasto_core::limits::BUCKET_ACK_TIMEOUT;
use vasto_core::{ErrorCode, VastoError};

use super::command::{OpOutcome, WriteCommand};

struct Waiting {
    command: WriteCommand,
    outcomes: Vec<OpOutcome>,
    lsn: Lsn,
    until: Instant,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Waiting>,
    covered: Lsn,
}

/// Writes of one replica that wait for the bucket.
#[derive(Default)]
pub(crate) struct BucketAcks {
    inner: Mutex<Inner>,
    wanted: Notify,
}

fn not_in_time() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "the write is durable here, but the bucket has not confirmed it in time; read it back, or see `vasto cluster status`",
    )
}

impl BucketAcks {
    /// Adds a write that is durable here, with the LSN that covers it.
    pub(crate) fn wait(&self, command: WriteCommand, outcomes: Vec<OpOutcome>, lsn: Lsn) {
        let mut inner = self.inner.lock();
        if inner.covered >= lsn {
            drop(inner);
            return command.answer(Ok(outcomes));
        }
        let until = Instant::now() + BUCKET_ACK_TIMEOUT;
        inner.waiting.push_back(Waiting { command, outcomes, lsn, until });
        drop(inner);
        self.wanted.notify_one();
    }

    /// Answers the writes up to `lsn`, which the bucket now holds.
    pub(crate) fn covered(&self, lsn: Lsn) {
        let mut done = Vec::new();
        {
            let mut inner = self.inner.lock();
            inner.covered = inner.covered.max(lsn);
            while inner.waiting.front().is_some_and(|write| write.lsn <= lsn) {
                done.extend(inner.waiting.pop_front());
            }
        }
        for write in done {
            write.command.answer(Ok(write.outcomes));
        }
    }

    /// Returns the first record that a write waits for.
    pub(crate) fn first(&self) -> Option<Lsn> {
        self.inner.lock().waiting.front().map(|write| write.lsn)
    }

    /// Returns the last record that a write waits for.
    pub(crate) fn last(&self) -> Option<Lsn> {
        self.inner.lock().waiting.back().map(|write| write.lsn)
    }

    /// Waits until a write waits for the bucket.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Answers the writes that have waited too long.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        let mut late = Vec::new();
        {
            let mut inner = self.inner.lock();
            while inner.waiting.front().is_some_and(|write| write.until <= now) {
                late.extend(inner.waiting.pop_front());
            }
        }
        for write in late {
            write.command.answer(Err(not_in_time()));
        }
    }

    /// Answers all waiting writes: the replica has stopped, and so has its shipper.
    pub(crate) fn abandon(&self) {
        let waiting = std::mem::take(&mut self.inner.lock().waiting);
        for write in waiting {
            write.command.answer(Err(not_in_time()));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bytes::Bytes;
    use std::sync::mpsc::{Receiver, TryRecvError, channel};
    use vasto_core::catalog::Ack;

    use crate::replica::command::{OpKind, WriteOp};

    fn put() -> (WriteCommand, Receiver<Result<Vec<OpOutcome>, VastoError>>) {
        let (sender, receiver) = channel();
        let op = WriteOp {
            key: Bytes::from_static(b"k"),
            partition_hash: None,
            event_time: None,
            change: OpKind::Delete { condition: None },
            created_ttl_ms: None,
        };
        let done = Box::new(move |answer| sender.send(answer).unwrap());
        (WriteCommand::new(vec![op], Ack::Bucket, done, None), receiver)
    }

    #[test]
    fn a_write_is_answered_once_the_bucket_covers_it() {
        let acks = BucketAcks::default();
        let ((first, first_answer), (second, second_answer), (third, third_answer)) =
            (put(), put(), put());
        acks.wait(first, Vec::new(), Lsn(5));
        acks.wait(second, Vec::new(), Lsn(6));
        acks.covered(Lsn(5));
        assert!(first_answer.try_recv().unwrap().is_ok());
        assert_eq!(second_answer.try_recv(), Err(TryRecvError::Empty));
        acks.expire();
        assert_eq!(
            (second_answer.try_recv(), acks.last()),
            (Err(TryRecvError::Empty), Some(Lsn(6)))
        );
        acks.wait(third, Vec::new(), Lsn(4));
        assert!(third_answer.try_recv().unwrap().is_ok(), "the bucket holds its record already");
        acks.abandon();
        assert_eq!(second_answer.try_recv().unwrap().unwrap_err().code, ErrorCode::Unknown);
    }
}
