//! The data service: batches of operations over one bidirectional stream per connection.
//!
//! **Invariants**
//! - Bytes are bounded before anything is queued: a connection that has too much in flight is not
//!   read from until it drains.
//! - Limits are checked before anything is written.
//! - A request is answered exactly once, in any order.

mod decode;
mod dispatch;
mod lateness;
mod reply;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use prost::Message;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedReceiver;
use tonic::{Request, Response, Status, Streaming};
use vasto_core::limits::{CONNECTION_BYTES_MAX, CONNECTIONS_MAX};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1;
use vasto_proto::v1::data_server::Data;

use crate::clock::since_boot;
use crate::core::NodeCore;
use lateness::Lateness;
use reply::{Queued, ReplyQueue, ReplySink};

/// Serves `vasto.v1.Data`.
#[derive(Clone)]
pub struct DataService {
    core: Arc<NodeCore>,
    connections: Arc<Semaphore>,
}

impl DataService {
    /// The service over the node's replicas.
    pub fn new(core: Arc<NodeCore>) -> Self {
        Self { core, connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }
}

/// A reply frame is closed at this size.
const FRAME_BYTES: usize = 4 << 20;
/// And at this many replies.
const FRAME_REPLIES: usize = 1024;

#[tonic::async_trait]
impl Data for DataService {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<v1::ReplyFrame, Status>> + Send>>;

    async fn stream(
        &self,
        request: Request<Streaming<v1::RequestFrame>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let connection = self.connections.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("this node has {CONNECTIONS_MAX} connections, its limit; use fewer clients, or share one");
            status_of(&VastoError::new(ErrorCode::Overloaded, message).retry_after_ms(1_000))
        })?;
        let mut frames = request.into_inner();
        let (queue, receiver) = ReplyQueue::new();
        let core = self.core.clone();
        let room = Arc::new(Semaphore::new(CONNECTION_BYTES_MAX));
        let replies = queue.clone();
        let (opened, mut lateness) = (since_boot(), Lateness::default());
        // Ends with the connection: the stream of frames ends or fails when the peer is gone.
        tokio::spawn(async move {
            let _connection = connection;
            while let Ok(Some(frame)) = frames.message().await {
                let now = since_boot();
                let late = lateness.of(now - opened, Duration::from_micros(frame.sent_us));
                let sent = (frame.sent_us > 0).then(|| now.saturating_sub(late));
                for request in frame.requests {
                    let weight = (request.encoded_len() + 256).min(CONNECTION_BYTES_MAX) as u32;
                    let Ok(permit) = room.clone().acquire_many_owned(weight).await else { return };
                    replies.room().await;
                    dispatch::dispatch(&core, request, sent, ReplySink::new(replies.clone(), Some(permit)));
                }
            }
        });
        Ok(Response::new(Box::pin(frames_of(queue, receiver))))
    }

    async fn execute(&self, request: Request<v1::Request>) -> Result<Response<v1::Reply>, Status> {
        let (queue, mut receiver) = ReplyQueue::new();
        dispatch::dispatch(&self.core, request.into_inner(), None, ReplySink::new(queue, None));
        let queued = receiver.recv().await.ok_or_else(|| Status::internal("the request was dropped"))?;
        Ok(Response::new(queued.reply))
    }
}

/// Gathers what is ready into frames.
fn frames_of(
    queue: Arc<ReplyQueue>,
    receiver: UnboundedReceiver<Queued>,
) -> impl Stream<Item = Result<v1::ReplyFrame, Status>> {
    futures::stream::unfold((queue, receiver, None), |(queue, mut receiver, carried)| async move {
        let first: Queued = match carried {
            Some(queued) => queued,
            None => receiver.recv().await?,
        };
        let mut bytes = first.bytes;
        let mut replies = vec![first.reply];
        let mut carried = None;
        while replies.len() < FRAME_REPLIES {
            let Ok(queued) = receiver.try_recv() else { break };
            if bytes + queued.bytes > FRAME_BYTES {
                carried = Some(queued);
                break;
            }
            bytes += queued.bytes;
            replies.push(queued.reply);
        }
        queue.sent(bytes);
        Some((Ok(v1::ReplyFrame { replies }), (queue, receiver, carried)))
    })
}
