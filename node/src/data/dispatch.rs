//! Routes a request to its replica, or refuses it.
//!
//! Requests carry keyspace and epoch. An epoch below the node's is served while the data is still owned here. Data that
//! is not owned here: `WrongEpoch` with the topology. An epoch above the node's: the node waits for the topology, then
//! answers `NodeBehind`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, watch};
use vasto_core::ids::{Epoch, KeyspaceId, ShardId};
use vasto_core::limits::{ATTEMPT_PATIENCE, AUTHORITY_WAIT, EPOCH_WAIT, check_key};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Answer;
use vasto_proto::v1::request::Op;

use super::decode;
use super::reply::ReplySink;
use crate::clock::since_boot;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::authority::Refusal;
use crate::replica::command::{Number, OpOutcome, Role, WriteContext, too_late};
use crate::replica::read::{GetResult, KeyRef, ScanPage};
use crate::shortage;

/// Send and receive time of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    /// Boot time of the send, if the caller reports one.
    pub sent: Option<Duration>,
    /// Boot time of the receipt.
    pub received: Duration,
}

/// Interval between two checks whether authority was renewed.
const RENEWAL_LOOK: Duration = Duration::from_millis(10);

/// Identity and conditions of a request.
#[derive(Clone, Copy)]
struct Caller {
    id: u64,
    keyspace: KeyspaceId,
    epoch: Epoch,
    /// Boot time of the send, if the caller reports one.
    sent: Option<Duration>,
    /// Boot time from which on the client does not wait for the answer.
    until: Option<Duration>,
    /// Only the replica that has authority may answer.
    strict: bool,
    /// The term of authority under which a strict request was admitted.
    term: Option<u64>,
}

impl Caller {
    /// Returns an error when the authority under which a strict read began has ended: its result may be stale.
    fn check_term(&self, replica: &Replica) -> Result<(), VastoError> {
        match self.term {
            Some(term) if !replica.authority().holds(term) => Err(no_authority()),
            _ => Ok(()),
        }
    }

    /// Returns an error once the client does not wait any more: work not begun by then is not begun.
    fn check_time(&self) -> Result<(), VastoError> {
        match self.until {
            Some(until) if since_boot() >= until => Err(too_late()),
            _ => Ok(()),
        }
    }
}

enum Place {
    Here(Replica),
    /// Like `Here`, under this term of authority.
    Serving(Replica, u64),
    /// The replica may gain authority shortly.
    Waiting,
    /// The replica may be the isolated one: a probe that begins now decides.
    Probing(Replica),
    /// Another replica has authority.
    NotServing,
    CatchingUp,
    /// The replica does not serve; other replicas of its shard may.
    OutOfService(Option<String>),
    /// The shard's only replica could not be opened.
    Failed(String),
    NotYet,
    Elsewhere,
}

fn place(registry: &NodeRegistry, caller: Caller, shard: ShardId) -> Place {
    let placed = || registry.is_placed_here(caller.keyspace, shard);
    match registry.replica_of(caller.keyspace, shard) {
        // A closed replica applies and accepts nothing. The only replica of its shard still serves reads, and answers
        // writes with the remedy.
        Some(replica) if replica.is_closed() && !(placed() && registry.is_the_only_one(caller.keyspace, shard)) => {
            if placed() {
                Place::OutOfService(replica.closed())
            } else {
                Place::Elsewhere
            }
        }
        Some(replica) if replica.epoch() >= caller.epoch => match replica.view().role {
            Role::Detached => Place::Elsewhere,
            _ if caller.strict => match replica.authority().admit() {
                Ok(term) => Place::Serving(replica, term),
                Err(Refusal::Elsewhere) => Place::NotServing,
                Err(Refusal::Wait) => Place::Waiting,
                Err(Refusal::Probe) => Place::Probing(replica),
            },
            _ if replica.is_ready() && !(registry.stall.is_standing() && replica.followers().has_peers()) => {
                Place::Here(replica)
            }
            _ => Place::CatchingUp,
        },
        Some(_) => Place::NotYet,
        None if placed() => match registry.not_open(caller.keyspace, shard) {
            why if !registry.is_the_only_one(caller.keyspace, shard) => Place::OutOfService(why),
            Some(why) => Place::Failed(why),
            None => Place::NotYet,
        },
        None if registry.known_epoch(caller.keyspace) >= caller.epoch => Place::Elsewhere,
        None => Place::NotYet,
    }
}

/// Answers a request, at once or later.
pub(super) fn dispatch(registry: &Arc<NodeRegistry>, request: v1::Request, arrival: Arrival, sink: ReplySink) {
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
    // Only a request that arrives while the peers are already silent proves that its client reaches this node.
    let probing = matches!(place, Place::Probing(_));
    match settled(place) {
        Some(Ok((replica, term))) => execute(registry, Caller { term, ..caller }, &replica, op, sink),
        Some(Err(error)) => sink.fail(registry, caller.id, caller.keyspace, caller.epoch, &error),
        None => {
            let registry = registry.clone();
            // Bounded by the connection's byte budget, which the sink holds; ends within EPOCH_WAIT.
            tokio::spawn(async move { wait_for_place(registry, caller, shard, op, sink, probing).await });
        }
    }
}

/// Returns the refusal of a strict write that the network held back for longer than its client waits: the client has
/// repeated it over another connection, and an event time assigned now would be above those of later writes.
fn held_back(arrival: Arrival, op: &Op, strict: bool) -> Option<VastoError> {
    let late = arrival.sent.is_some_and(|sent| arrival.received.saturating_sub(sent) >= ATTEMPT_PATIENCE);
    (late && strict && matches!(op, Op::Write(_))).then(|| {
        let message = "the request was under way for too long and may have been repeated since; send it again";
        VastoError::new(ErrorCode::Overloaded, message).retry_after_ms(20)
    })
}

/// Returns the replica that executes the request, or the refusal; `None` when that may be known shortly.
fn settled(place: Place) -> Option<Result<(Replica, Option<u64>), VastoError>> {
    match place {
        Place::Here(replica) => Some(Ok((replica, None))),
        Place::Serving(replica, term) => Some(Ok((replica, Some(term)))),
        Place::NotServing => Some(Err(no_authority())),
        Place::Elsewhere => Some(Err(not_here())),
        Place::CatchingUp => Some(Err(catching_up())),
        Place::OutOfService(why) => Some(Err(out_of_service(why))),
        Place::Failed(why) => Some(Err(failed(&why))),
        Place::NotYet | Place::Waiting | Place::Probing(_) => None,
    }
}

/// Waits for the topology of the caller's epoch, or for authority.
async fn wait_for_place(
    registry: Arc<NodeRegistry>,
    caller: Caller,
    shard: ShardId,
    op: Op,
    sink: ReplySink,
    probing: bool,
) {
    let deadline = tokio::time::Instant::now() + EPOCH_WAIT.max(AUTHORITY_WAIT);
    let mut node_changes = registry.changes();
    let mut probed = false;
    loop {
        node_changes.borrow_and_update();
        let mut replica_changes = registry.replica_of(caller.keyspace, shard).map(|replica| replica.changes());
        let mut authority_changes =
            registry.replica_of(caller.keyspace, shard).map(|replica| replica.authority().changes());
        let mut place = place(&registry, caller, shard);
        if let Place::Probing(replica) = &place {
            if !probing {
                return sink.fail(&registry, caller.id, caller.keyspace, caller.epoch, &catching_up());
            }
            if !probed {
                // No probe runs for a replica whose authority has ended meanwhile.
                tokio::select! {
                    () = replica.authority().probed() => probed = true,
                    () = changed(&mut authority_changes) => continue,
                    () = tokio::time::sleep_until(deadline) => {}
                }
            }
            if probed {
                match replica.authority().admit_probed() {
                    Ok(term) => place = Place::Serving(replica.clone(), term),
                    // Authority that rests on silence again does so for another reason: probe again.
                    Err(_) => probed = false,
                }
            }
        }
        let waits_for_authority = matches!(place, Place::Waiting | Place::Probing(_));
        match settled(place) {
            Some(Ok((replica, term))) => {
                sink.room().await;
                return execute(&registry, Caller { term, ..caller }, &replica, op, sink);
            }
            Some(Err(error)) => return sink.fail(&registry, caller.id, caller.keyspace, caller.epoch, &error),
            None => {}
        }
        tokio::select! {
            _ = node_changes.changed() => {}
            () = changed(&mut replica_changes) => {}
            () = changed(&mut authority_changes) => {}
            // Beliefs are renewed without a notification.
            () = tokio::time::sleep(RENEWAL_LOOK), if waits_for_authority => {}
            () = tokio::time::sleep_until(deadline) => {
                let error = match waits_for_authority {
                    true => catching_up(),
                    false => VastoError::new(
                        ErrorCode::NodeBehind,
                        "the node has not heard of this epoch yet; try again",
                    )
                    .retry_after_ms(50),
                };
                return sink.fail(&registry, caller.id, caller.keyspace, caller.epoch, &error);
            }
        }
    }
}

/// Waits for a change; without a source of changes, forever.
async fn changed<T>(changes: &mut Option<watch::Receiver<T>>) {
    match changes {
        // An error means that the sender is gone: the caller checks again.
        Some(changes) => drop(changes.changed().await),
        None => std::future::pending().await,
    }
}

fn no_authority() -> VastoError {
    VastoError::new(
        ErrorCode::NotPrimary,
        "another replica serves this shard now, and sees what was acknowledged; ask it, or read by choice from any replica",
    )
    .retry_after_ms(20)
}

fn catching_up() -> VastoError {
    VastoError::new(ErrorCode::CatchingUp, "this replica is catching up with its peers; ask another one")
        .retry_after_ms(50)
}

/// Returns `NotPrimary`: the node is healthy, and clients keep asking it for its other shards.
fn out_of_service(why: Option<String>) -> VastoError {
    let why = why.unwrap_or_else(|| "it is not open".into());
    let message = format!("this replica does not serve; ask another one: {why}");
    VastoError::new(ErrorCode::NotPrimary, message).retry_after_ms(20)
}

/// Returns the error of a shard whose only replica could not be opened.
fn failed(why: &str) -> VastoError {
    let code = if shortage::shortage_of(why).is_some() { ErrorCode::NoSpace } else { ErrorCode::Unavailable };
    VastoError::new(code, format!("the replica could not be opened: {why}")).retry_after_ms(500)
}

/// Returns the refusal of a write: the free space of the disk is needed for data written already.
fn disk_is_low() -> VastoError {
    let message =
        "no space left on the disk of the node but its reserve, so it takes no writes; free some space, or add a node";
    VastoError::new(ErrorCode::NoSpace, message).retry_after_ms(1_000)
}

fn not_here() -> VastoError {
    VastoError::new(ErrorCode::WrongEpoch, "this node does not hold the shard; fetch the topology and go to its owner")
}

fn execute(registry: &Arc<NodeRegistry>, caller: Caller, replica: &Replica, op: Op, sink: ReplySink) {
    if let Err(error) = caller.check_time() {
        return answer(registry, caller, Err(error), sink);
    }
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

fn answer(registry: &NodeRegistry, caller: Caller, result: Result<Answer, VastoError>, sink: ReplySink) {
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
        let result = result
            .map(|outcomes| Answer::Write(v1::WriteReply { outcomes: outcomes.into_iter().map(outcome).collect() }));
        answer(&registry, caller, result, sink);
    });
    replica.write_as(
        write.ops,
        write.ack,
        write.bytes,
        WriteContext { id: write.id, sent: caller.sent, until: caller.until, term: caller.term },
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
        OpOutcome::Superseded(event_time) => (v1::write_outcome::Kind::Superseded, event_time, None),
        OpOutcome::Modified { event_time, version, number } => {
            (v1::write_outcome::Kind::Applied, event_time, value(event_time, version, number))
        }
        OpOutcome::NotApplied { event_time, version } => {
            (v1::write_outcome::Kind::NotApplied, event_time, value(event_time, version, None))
        }
    };
    v1::WriteOutcome { kind: kind as i32, event_time, value }
}

fn execute_get(registry: &Arc<NodeRegistry>, caller: Caller, replica: &Replica, keys: Vec<KeyRef>, sink: ReplySink) {
    match replica.get_many(&keys, false) {
        Ok(GetResult::Values(values)) => {
            answer(registry, caller, caller.check_term(replica).map(|()| get_reply(values)), sink);
        }
        Err(error) => answer(registry, caller, Err(error), sink),
        Ok(GetResult::WouldBlock) => {
            let replica = replica.clone();
            blocking(registry, caller, sink, move || match replica.get_many(&keys, true)? {
                GetResult::Values(values) => caller.check_term(&replica).map(|()| get_reply(values)),
                GetResult::WouldBlock => Err(VastoError::new(ErrorCode::Internal, "a blocking read did not block")),
            });
        }
    }
}

fn get_reply(values: Vec<Option<v1::Value>>) -> Answer {
    Answer::Get(v1::GetReply { values: values.into_iter().map(|value| v1::MaybeValue { value }).collect() })
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

fn execute_scan(registry: &Arc<NodeRegistry>, caller: Caller, replica: &Replica, page: ScanPage, sink: ReplySink) {
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
            Err(error) => (Err(VastoError::new(ErrorCode::Internal, format!("a read failed: {error}"))), None),
        };
        answer(&registry, caller, result, sink);
    });
}

/// Acquires one of the node's readers, for a connection that has room for its reply. A request that waits for room
/// holds no reader: one client that does not read would stop the reads of all others.
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
        Caller { id: 1, keyspace: KeyspaceId(1), epoch: Epoch(1), sent: None, until, strict: false, term: None }
    }

    fn long_read() -> Result<Answer, VastoError> {
        let row = v1::Row { key: vec![0; REPLY_BYTES].into(), ..v1::Row::default() };
        Ok(Answer::Scan(v1::ScanReply { rows: vec![row], ..v1::ScanReply::default() }))
    }

    /// The queue for the only reader is fair: when the other connection is served, every earlier read has been done, or
    /// waits for its own connection.
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
        assert!(waiting * REPLY_BYTES <= CONNECTION_BYTES_MAX + REPLY_BYTES, "{waiting} replies wait");
        // A client that reads again receives all replies.
        for _ in 0..asked {
            let reply = replies.recv().await.unwrap();
            queue.sent(reply.bytes);
        }
    }

    #[tokio::test]
    async fn a_read_that_nobody_waits_for_any_more_is_not_begun() {
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
        blocking(&registry, caller(Some(until)), ReplySink::new(queue.clone(), Vec::new()), move || {
            count.fetch_add(1, Ordering::Relaxed);
            long_read()
        });
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
