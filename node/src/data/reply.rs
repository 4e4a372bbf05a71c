//! The way back to a caller.
//!
//! **Invariant:** replies that wait for a slow reader are bounded: a connection whose queue is over
//! its limit gets no further request begun, so at most what was already being answered is added.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use vasto_core::ids::{Epoch, KeyspaceId};
use vasto_core::limits::CONNECTION_BYTES_MAX;
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::{error_to_wire, topology_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Answer;

use crate::core::NodeCore;

/// A reply with its size, and its request's share of the connection's budget.
pub(super) struct Queued {
    pub reply: v1::Reply,
    pub bytes: usize,
    _permit: Option<OwnedSemaphorePermit>,
}

/// The replies of one connection that wait to be sent.
pub(super) struct ReplyQueue {
    sender: UnboundedSender<Queued>,
    waiting_bytes: AtomicUsize,
    sent: Notify,
}

impl ReplyQueue {
    pub(super) fn new() -> (Arc<Self>, UnboundedReceiver<Queued>) {
        let (sender, receiver) = unbounded_channel();
        (Arc::new(Self { sender, waiting_bytes: AtomicUsize::new(0), sent: Notify::new() }), receiver)
    }

    /// Waits until the queue is below its limit.
    pub(super) async fn room(&self) {
        loop {
            let sent = self.sent.notified();
            if self.has_room() {
                return;
            }
            tokio::select! {
                () = sent => {}
                () = self.sender.closed() => return,
            }
        }
    }

    /// True while the queue is below its limit, or nobody reads it any more.
    pub(super) fn has_room(&self) -> bool {
        self.waiting_bytes.load(Ordering::Acquire) < CONNECTION_BYTES_MAX || self.sender.is_closed()
    }

    /// These bytes have left.
    pub(super) fn sent(&self, bytes: usize) {
        self.waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.sent.notify_waiters();
    }
}

/// Answers one request.
pub(super) struct ReplySink {
    queue: Arc<ReplyQueue>,
    permit: Option<OwnedSemaphorePermit>,
}

impl ReplySink {
    pub(super) fn new(queue: Arc<ReplyQueue>, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self { queue, permit }
    }

    /// Waits until the connection has room for another reply.
    pub(super) async fn room(&self) {
        self.queue.room().await;
    }

    /// True while the connection has room for another reply.
    pub(super) fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    pub(super) fn answer(self, id: u64, answer: Answer) {
        let reply = v1::Reply { id, result: Some(answer) };
        let bytes = reply.encoded_len();
        self.queue.waiting_bytes.fetch_add(bytes, Ordering::AcqRel);
        // A closed channel means that the caller is gone.
        let _ = self.queue.sender.send(Queued { reply, bytes, _permit: self.permit });
    }

    /// Answers with an error; one that sends the caller elsewhere carries the topology when it is newer
    /// than the caller's.
    pub(super) fn fail(self, core: &NodeCore, id: u64, keyspace: KeyspaceId, epoch: Epoch, error: &VastoError) {
        let mut wire = error_to_wire(error, None);
        let elsewhere = matches!(error.code, ErrorCode::WrongEpoch | ErrorCode::NotPrimary);
        if elsewhere && core.known_epoch(keyspace) > epoch {
            wire.topology = core.topology(keyspace).map(|topology| topology_to_wire(&topology));
        }
        self.answer(id, Answer::Error(wire));
    }
}
