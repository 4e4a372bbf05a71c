//! Replies of a connection: their queue, their byte budgets, and the sink that answers a request.
//!
//! **Invariants**
//! - Replies that wait for a slow reader are bounded: while a connection's queue is over its limit,
//!   none of its requests is begun, so only replies to requests already in execution are added.
//! - Replies and requests in flight of all connections together are bounded: over a budget of the
//!   node, only a connection without waiting replies gets another request begun, and a connection
//!   whose peer takes nothing is closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prost::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use vasto_core::ids::{Epoch, KeyspaceId};
use vasto_core::limits::{CONNECTION_BYTES_MAX, NODE_REPLY_BYTES_MAX, NODE_REQUEST_BYTES_MAX};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::{error_to_wire, topology_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Answer;

use crate::clock::since_boot;
use crate::registry::NodeRegistry;

/// A reply with its size, and its request's share of the connection's budget.
pub(super) struct Queued {
    pub reply: v1::Reply,
    pub bytes: usize,
    _permits: Permits,
}

/// Shares of a request budget, released when the request's reply is on its way.
pub(super) type Permits = Vec<OwnedSemaphorePermit>;

/// Memory that all connections of a node may hold together.
pub(super) struct NodeBudget {
    /// Bytes of requests in flight.
    pub requests: Arc<Semaphore>,
    /// Bytes of replies that wait.
    waiting_bytes: AtomicUsize,
    most_waiting: usize,
    freed: Notify,
}

impl Default for NodeBudget {
    fn default() -> Self {
        Self::of(NODE_REQUEST_BYTES_MAX, NODE_REPLY_BYTES_MAX)
    }
}

impl NodeBudget {
    fn of(requests: usize, most_waiting: usize) -> Self {
        let requests = Arc::new(Semaphore::new(requests));
        Self { requests, waiting_bytes: AtomicUsize::new(0), most_waiting, freed: Notify::new() }
    }

    fn is_full(&self) -> bool {
        self.waiting_bytes.load(Ordering::Acquire) >= self.most_waiting
    }

    /// Returns true when a connection has to wait for memory that others hold.
    fn is_short(&self) -> bool {
        self.is_full() || self.requests.available_permits() == 0
    }
}

/// The replies of one connection that wait to be sent.
pub(super) struct ReplyQueue {
    sender: UnboundedSender<Queued>,
    waiting_bytes: AtomicUsize,
    sent: Notify,
    /// Milliseconds since boot when the peer last took a reply, or when its empty queue got one.
    moved_ms: AtomicU64,
    node: Arc<NodeBudget>,
}

impl Drop for ReplyQueue {
    fn drop(&mut self) {
        self.node.waiting_bytes.fetch_sub(*self.waiting_bytes.get_mut(), Ordering::AcqRel);
        self.node.freed.notify_waiters();
    }
}

impl ReplyQueue {
    pub(super) fn new(node: Arc<NodeBudget>) -> (Arc<Self>, UnboundedReceiver<Queued>) {
        let (sender, receiver) = unbounded_channel();
        let (waiting_bytes, moved_ms) = (AtomicUsize::new(0), AtomicU64::new(0));
        (Arc::new(Self { sender, waiting_bytes, sent: Notify::new(), moved_ms, node }), receiver)
    }

    /// Waits until the peer has taken nothing for `patience` while replies wait here and the node
    /// is short of memory.
    pub(super) async fn stalled(&self, patience: Duration) {
        loop {
            tokio::time::sleep(patience / 4).await;
            let idle = since_boot().as_millis() as u64 - self.moved_ms.load(Ordering::Acquire);
            let owes = self.waiting_bytes.load(Ordering::Acquire) > 0;
            if owes && idle >= patience.as_millis() as u64 && self.node.is_short() {
                return;
            }
        }
    }

    fn moved(&self) {
        self.moved_ms.store(since_boot().as_millis() as u64, Ordering::Release);
    }

    /// Waits until the queue is below its limit.
    pub(super) async fn room(&self) {
        loop {
            let (sent, freed) = (self.sent.notified(), self.node.freed.notified());
            if self.has_room() {
                return;
            }
            tokio::select! {
                () = sent => {}
                () = freed => {}
                () = self.sender.closed() => return,
            }
        }
    }

    /// Returns true while the queue is below its limits, or when its reader is gone.
    pub(super) fn has_room(&self) -> bool {
        let waiting = self.waiting_bytes.load(Ordering::Acquire);
        waiting < CONNECTION_BYTES_MAX && (waiting == 0 || !self.node.is_full())
            || self.sender.is_closed()
    }

    /// Releases bytes that have left.
    pub(super) fn sent(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.moved();
        self.waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.sent.notify_waiters();
        if self.node.waiting_bytes.fetch_sub(bytes, Ordering::AcqRel) >= self.node.most_waiting {
            self.node.freed.notify_waiters();
        }
    }

    fn add(&self, bytes: usize) {
        if self.waiting_bytes.fetch_add(bytes, Ordering::AcqRel) == 0 {
            self.moved();
        }
        self.node.waiting_bytes.fetch_add(bytes, Ordering::AcqRel);
    }
}

/// Sink for the reply to one request.
pub(super) struct ReplySink {
    queue: Arc<ReplyQueue>,
    permits: Permits,
}

impl ReplySink {
    pub(super) fn new(queue: Arc<ReplyQueue>, permits: Permits) -> Self {
        Self { queue, permits }
    }

    /// Waits until the connection has room for another reply.
    pub(super) async fn room(&self) {
        self.queue.room().await;
    }

    /// Returns true while the connection has room for another reply.
    pub(super) fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    pub(super) fn answer(self, id: u64, answer: Answer) {
        let reply = v1::Reply { id, result: Some(answer) };
        let bytes = reply.encoded_len();
        self.queue.add(bytes);
        // A closed channel means that the caller is gone.
        let _ = self.queue.sender.send(Queued { reply, bytes, _permits: self.permits });
    }

    /// Answers with an error. `WrongEpoch` and `NotPrimary` carry the topology when it is newer
    /// than the caller's.
    pub(super) fn fail(
        self,
        registry: &NodeRegistry,
        id: u64,
        keyspace: KeyspaceId,
        epoch: Epoch,
        error: &VastoError,
    ) {
        let mut wire = error_to_wire(error, None);
        let elsewhere = matches!(error.code, ErrorCode::WrongEpoch | ErrorCode::NotPrimary);
        if elsewhere && registry.known_epoch(keyspace) > epoch {
            wire.topology = registry.topology(keyspace).map(|topology| topology_to_wire(&topology));
        }
        self.answer(id, Answer::Error(wire));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MIB: usize = 1 << 20;

    fn reply(queue: &Arc<ReplyQueue>, bytes: usize) {
        let row = v1::Row { key: vec![0; bytes].into(), ..v1::Row::default() };
        let answer = Answer::Scan(v1::ScanReply { rows: vec![row], ..v1::ScanReply::default() });
        ReplySink::new(queue.clone(), Permits::new()).answer(1, answer);
    }

    /// Without the shared budget forty connections would hold 64 MiB each.
    #[tokio::test]
    async fn all_connections_together_hold_one_budget_of_replies() {
        let node = Arc::new(NodeBudget::of(MIB, 16 * MIB));
        let queues: Vec<_> = (0..40).map(|_| ReplyQueue::new(node.clone())).collect();
        for (queue, _) in &queues {
            for _ in 0..10 {
                if queue.has_room() {
                    reply(queue, 4 * MIB);
                }
            }
        }
        let waiting = node.waiting_bytes.load(Ordering::Acquire);
        // A connection without waiting replies may begin one request.
        assert!(waiting <= (16 + 41 * 4) * MIB + 40 * 64, "{waiting}");
        let (fresh, _receiver) = ReplyQueue::new(node.clone());
        assert!(fresh.has_room(), "whoever reads is served");
        reply(&fresh, MIB);
        assert!(!fresh.has_room());
        // The peers of the other connections disconnect.
        let room = fresh.clone();
        let waits = tokio::spawn(async move { room.room().await });
        drop(queues);
        tokio::time::timeout(Duration::from_secs(20), waits)
            .await
            .expect("there is room again")
            .unwrap();
        assert!(node.waiting_bytes.load(Ordering::Acquire) < 2 * MIB);
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_noticed_when_others_need_the_room() {
        let node = Arc::new(NodeBudget::of(MIB, 2 * MIB));
        let (patience, short) = (Duration::from_millis(80), Duration::from_millis(400));
        let (idle, _idle) = ReplyQueue::new(node.clone());
        let (slow, _slow) = ReplyQueue::new(node.clone());
        reply(&slow, MIB / 2);
        assert!(
            tokio::time::timeout(short, slow.stalled(patience)).await.is_err(),
            "nobody needs the room"
        );
        reply(&slow, 2 * MIB);
        tokio::time::timeout(Duration::from_secs(20), slow.stalled(patience))
            .await
            .expect("it takes nothing");
        assert!(
            tokio::time::timeout(short, idle.stalled(patience)).await.is_err(),
            "one that is owed nothing may be idle"
        );
    }
}
