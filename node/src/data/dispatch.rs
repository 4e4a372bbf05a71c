//! Routes a request to its replica, or refuses it.
//!
//! Requests carry keyspace and epoch. An epoch below the node's is served while the data is still
//! owned here. Data that is not owned here: `WrongEpoch` with the topology. An epoch above the
//! node's: the node waits for the topology, then answers `NodeBehind`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use vasto_core::ids::{Epoch, KeyspaceId, ShardId};
use vasto_core::limits::{ATTEMPT_PATIENCE, check_key};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Answer;
use vasto_proto::v1::request::Op;

use super::caller::{Arrival, Caller};
use super::decode;
use super::place::{Place, place, settled, wait_for_place};
use super::refusal::{disk_is_low, not_here};
use super::reply::ReplySink;
use crate::clock::since_boot;
use crate::foreground::{Class, FOREGROUND};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Number, OpOutcome, WriteContext};
use crate::replica::read::{GetResult, KeyRef, ScanPage};

/// Answers a request, at once or later.
pub(super) fn dispatch(
    registry: &Arc<NodeRegistry>,
    request: v1::Request,
    arrival: Arrival,
    sink: ReplySink,
) {
    let keyspace = KeyspaceId(request.keyspace_id);
    let time = (request.deadline_ms > 0).then(|| Duration::from_millis(request.deadline_ms.into()));
    let caller = Caller {
        id: request.id,
        keyspace,
        epoch: Epoch(request.epoch),
        sent: arrival.sent,
        until: time.map(|time| arrival.received + time),
        strict: request.strict,
        term: None,
        begun: arrival.begun(since_boot()),
    };
    let shard = ShardId(request.shard);
    let Some(op) = request.op else {
        let error = VastoError::new(ErrorCode::InvalidArgument, "the request names no operation");
        return sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &error);
    };
    if let Some(error) = held_back(arrival, &op, caller.strict) {
        return sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &error);
    }
    let place = place(registry, caller, shard);
    let probing = matches!(place, Place::Probing(_));
    match settled(place) {
        Some(Ok((replica, term))) => {
            execute(registry, Caller { term, ..caller }, &replica, op, sink)
        }
        Some(Err(error)) => sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &error),
        None => {
            let registry = registry.clone();
            // Bounded by the connection's byte budget, which the sink holds, and in time.
            tokio::spawn(async move {
                match wait_for_place(&registry, caller, shard, probing).await {
                    Ok((replica, term)) => {
                        sink.room().await;
                        let caller = Caller { term, begun: None, ..caller };
                        execute(&registry, caller, &replica, op, sink);
                    }
                    Err(error) => {
                        sink.fail(&registry, caller.id, caller.keyspace, caller.epoch, &error)
                    }
                }
            });
        }
    }
}

/// Returns the refusal of a strict write that the network held back for longer than its client
/// waits: the client has repeated it over another connection, and an event time assigned now would
/// be above those of later writes.
fn held_back(arrival: Arrival, op: &Op, strict: bool) -> Option<VastoError> {
    let late = arrival.late() >= ATTEMPT_PATIENCE;
    (late && strict && matches!(op, Op::Write(_))).then(|| {
        let message = "the request was under way for too long and may have been repeated since; send it again";
        VastoError::new(ErrorCode::Overloaded, message).retry_after_ms(20)
    })
}

fn execute(
    registry: &Arc<NodeRegistry>,
    caller: Caller,
    replica: &Replica,
    op: Op,
    sink: ReplySink,
) {
    if let Err(error) = caller.check_time() {
        return answer(registry, caller, Err(error), sink);
    }
    replica.count_request();
    let result = match op {
        Op::Get(get) => match decode::keys(get) {
            Ok(keys) => return execute_get(registry, caller, replica, keys, sink),
            Err(error) => Err(error),
        },
        Op::Write(_) if registry.is_disk_low() => Err(disk_is_low()),
        Op::Write(write) => {
            let Some(catalog) = registry.catalog(caller.keyspace) else {
                return sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &not_here());
            };
            match decode::write(write, &catalog.spec, registry.clock.now_us()) {
                Ok(checked) => return execute_write(registry, caller, replica, checked, sink),
                Err(error) => Err(error),
            }
        }
        Op::Scan(scan) => match scan_page(scan) {
            Ok(page) => return execute_scan(registry, caller, replica, page, sink),
            Err(error) => Err(error),
        },
    };
    answer(registry, caller, result, sink);
}

fn answer(
    registry: &NodeRegistry,
    caller: Caller,
    result: Result<Answer, VastoError>,
    sink: ReplySink,
) {
    match result {
        Ok(answer) => sink.answer(caller.id, answer),
        Err(error) => sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &error),
    }
}

fn execute_write(
    registry: &Arc<NodeRegistry>,
    caller: Caller,
    replica: &Replica,
    write: decode::Write,
    sink: ReplySink,
) {
    let registry = registry.clone();
    let done = Box::new(move |result: Result<Vec<OpOutcome>, VastoError>| {
        let result = result.map(|outcomes| {
            Answer::Write(v1::WriteReply { outcomes: outcomes.into_iter().map(outcome).collect() })
        });
        answer(&registry, caller, result, sink);
    });
    replica.write_as(
        write.ops,
        write.ack,
        write.bytes,
        WriteContext {
            id: write.id,
            sent: caller.sent,
            until: caller.until,
            term: caller.term,
            begun: caller.begun,
        },
        done,
    );
}

fn outcome(outcome: OpOutcome) -> v1::WriteOutcome {
    let value = |event_time, version, number| {
        let payload = match number {
            Some(Number::I64(number)) => v1::value::Payload::I64(number),
            Some(Number::F64(bits)) => v1::value::Payload::F64(f64::from_bits(bits)),
            None => v1::value::Payload::Data(bytes::Bytes::new()),
        };
        Some(v1::Value { payload: Some(payload), event_time, expires_at: None, version })
    };
    let (kind, event_time, value) = match outcome {
        OpOutcome::Applied(event_time) => (v1::write_outcome::Kind::Applied, event_time, None),
        OpOutcome::Superseded(event_time) => {
            (v1::write_outcome::Kind::Superseded, event_time, None)
        }
        OpOutcome::Modified { event_time, version, number } => {
            (v1::write_outcome::Kind::Applied, event_time, value(event_time, version, number))
        }
        OpOutcome::NotApplied { event_time, version } => {
            (v1::write_outcome::Kind::NotApplied, event_time, value(event_time, version, None))
        }
    };
    v1::WriteOutcome { kind: kind as i32, event_time, value }
}

fn execute_get(
    registry: &Arc<NodeRegistry>,
    caller: Caller,
    replica: &Replica,
    keys: Vec<KeyRef>,
    sink: ReplySink,
) {
    match replica.get_many(&keys, false) {
        Ok(GetResult::Values(values)) => {
            FOREGROUND.note(Class::Reads, caller.begun, since_boot());
            answer(registry, caller, caller.check_term(replica).map(|()| get_reply(values)), sink);
        }
        Err(error) => answer(registry, caller, Err(error), sink),
        Ok(GetResult::WouldBlock) => {
            let replica = replica.clone();
            // A connection that does not take its replies is not the machine.
            let begun = caller.begun.filter(|_| sink.has_room());
            blocking(registry, caller, sink, move || match replica.get_many(&keys, true)? {
                GetResult::Values(values) => {
                    FOREGROUND.note(Class::Reads, begun, since_boot());
                    caller.check_term(&replica).map(|()| get_reply(values))
                }
                GetResult::WouldBlock => {
                    Err(VastoError::new(ErrorCode::Internal, "a blocking read did not block"))
                }
            });
        }
    }
}

fn get_reply(values: Vec<Option<v1::Value>>) -> Answer {
    Answer::Get(v1::GetReply {
        values: values.into_iter().map(|value| v1::MaybeValue { value }).collect(),
    })
}

fn scan_page(scan: v1::ScanRequest) -> Result<ScanPage, VastoError> {
    if !scan.prefix.is_empty() {
        check_key(&scan.prefix)?;
    }
    if let Some(after) = &scan.after {
        check_key(after)?;
    }
    Ok(ScanPage {
        prefix: scan.prefix,
        after: scan.after,
        after_partition_hash: scan.after_partition_hash,
        partition_hash: scan.partition_hash,
        limit: scan.limit as usize,
        keys_only: scan.keys_only,
    })
}

fn execute_scan(
    registry: &Arc<NodeRegistry>,
    caller: Caller,
    replica: &Replica,
    page: ScanPage,
    sink: ReplySink,
) {
    let replica = replica.clone();
    blocking(registry, caller, sink, move || {
        let reply = replica.scan(caller.epoch, &page)?;
        caller.check_term(&replica).map(|()| Answer::Scan(reply))
    });
}

/// Runs a read that may block on the bounded pool.
fn blocking(
    registry: &Arc<NodeRegistry>,
    caller: Caller,
    sink: ReplySink,
    read: impl FnOnce() -> Result<Answer, VastoError> + Send + 'static,
) {
    let registry = registry.clone();
    tokio::spawn(async move {
        let permit = reader(&registry, &sink).await;
        if let Err(error) = caller.check_time() {
            return answer(&registry, caller, Err(error), sink);
        }
        // The reader is free once its reply counts: the next read must see how much waits.
        let (result, _permit) = match tokio::task::spawn_blocking(move || (read(), permit)).await {
            Ok(done) => done,
            Err(error) => {
                (Err(VastoError::new(ErrorCode::Internal, format!("a read failed: {error}"))), None)
            }
        };
        answer(&registry, caller, result, sink);
    });
}

/// Acquires one of the node's readers, for a connection that has room for its reply. A request that
/// waits for room holds no reader: one client that does not read would stop the reads of all
/// others.
async fn reader(registry: &NodeRegistry, sink: &ReplySink) -> Option<OwnedSemaphorePermit> {
    loop {
        sink.room().await;
        // The semaphore is never closed.
        let permit = registry.readers.clone().acquire_owned().await.ok();
        if sink.has_room() {
            return permit;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::oneshot;
    use vasto_core::ids::NodeId;
    use vasto_core::limits::CONNECTION_BYTES_MAX;

    use super::super::reply::ReplyQueue;
    use super::*;
    use crate::clock::SystemClock;

    const REPLY_BYTES: usize = 1 << 20;

    fn node() -> Arc<NodeRegistry> {
        Arc::new(NodeRegistry::new(NodeId(1), Arc::new(SystemClock::default()), 1))
    }

    fn caller(until: Option<Duration>) -> Caller {
        Caller {
            id: 1,
            keyspace: KeyspaceId(1),
            epoch: Epoch(1),
            sent: None,
            until,
            strict: false,
            term: None,
            begun: None,
        }
    }

    fn long_read() -> Result<Answer, VastoError> {
        let row = v1::Row { key: vec![0; REPLY_BYTES].into(), ..v1::Row::default() };
        Ok(Answer::Scan(v1::ScanReply { rows: vec![row], ..v1::ScanReply::default() }))
    }

    /// The queue for the only reader is fair: when the other connection is served, every earlier
    /// read has been done, or waits for its own connection.
    #[tokio::test]
    async fn a_client_that_does_not_read_holds_one_queue_of_replies_and_no_reader() {
        let registry = node();
        let (queue, mut replies) = ReplyQueue::new(Arc::default());
        let asked = CONNECTION_BYTES_MAX / REPLY_BYTES + 16;
        for _ in 0..asked {
            blocking(&registry, caller(None), ReplySink::new(queue.clone(), Vec::new()), long_read);
        }
        let (other, mut other_replies) = ReplyQueue::new(Arc::default());
        blocking(&registry, caller(None), ReplySink::new(other, Vec::new()), long_read);
        other_replies.recv().await.unwrap();
        let waiting = replies.len();
        assert!(
            waiting * REPLY_BYTES <= CONNECTION_BYTES_MAX + REPLY_BYTES,
            "{waiting} replies wait"
        );
        // A client that reads again receives all replies.
        for _ in 0..asked {
            let reply = replies.recv().await.unwrap();
            queue.sent(reply.bytes);
        }
    }

    #[tokio::test]
    async fn a_read_whose_client_gave_up_is_not_begun() {
        let registry = node();
        let (queue, mut replies) = ReplyQueue::new(Arc::default());
        let (release, held) = oneshot::channel::<()>();
        let begun = Arc::new(AtomicU64::new(0));
        let first = move || {
            held.blocking_recv().unwrap();
            long_read()
        };
        blocking(&registry, caller(None), ReplySink::new(queue.clone(), Vec::new()), first);
        let until = since_boot() + Duration::from_millis(20);
        let count = begun.clone();
        blocking(
            &registry,
            caller(Some(until)),
            ReplySink::new(queue.clone(), Vec::new()),
            move || {
                count.fetch_add(1, Ordering::Relaxed);
                long_read()
            },
        );
        while since_boot() < until {
            tokio::task::yield_now().await;
        }
        release.send(()).unwrap();
        // Replies may arrive in any order.
        let mut errors = Vec::new();
        for _ in 0..2 {
            if let Some(Answer::Error(error)) = replies.recv().await.unwrap().reply.result {
                errors.push(error.code);
            }
        }
        assert_eq!(errors, [ErrorCode::DeadlineExceeded as u32]);
        assert_eq!(begun.load(Ordering::Relaxed), 0);
    }
}
