//! The data service: batches of operations over one bidirectional stream per connection.
//!
//! **Invariants**
//! - Bytes are bounded before anything is queued, for each connection and for all of them together:
//!   a connection that has too much in flight is not read until it drains.
//! - Limits are checked before anything is written.
//! - A request whose client does not wait any more is not begun: it is answered `DeadlineExceeded`.
//! - A request is answered exactly once, in any order.

mod caller;
mod decode;
mod dispatch;
mod place;
mod refusal;
mod reply;
mod request_age;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use prost::Message;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedReceiver;
use tonic::{Request, Response, Status, Streaming};
use vasto_core::limits::{
    CONNECTION_BYTES_MAX, CONNECTIONS_MAX, REPLY_STALL_MAX, UNARY_REQUESTS_MAX,
};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::incoming::Hangup;
use vasto_proto::v1;
use vasto_proto::v1::data_server::Data;

use crate::clock::since_boot;
use crate::registry::NodeRegistry;
use caller::Arrival;
use reply::{NodeBudget, Queued, ReplyQueue, ReplySink};
use request_age::RequestAge;

/// Serves `vasto.v1.Data`.
#[derive(Clone)]
pub(crate) struct DataService {
    registry: Arc<NodeRegistry>,
    connections: Arc<Semaphore>,
    unary: Arc<Semaphore>,
    budget: Arc<NodeBudget>,
}

impl DataService {
    /// Creates the service over the node's replicas.
    pub(crate) fn new(registry: Arc<NodeRegistry>) -> Self {
        let (connections, unary) =
            (Semaphore::new(CONNECTIONS_MAX), Semaphore::new(UNARY_REQUESTS_MAX));
        Self {
            registry,
            connections: Arc::new(connections),
            unary: Arc::new(unary),
            budget: Arc::default(),
        }
    }
}

/// Size at which a reply frame is closed.
const FRAME_BYTES: usize = 4 << 20;
/// Number of replies at which a reply frame is closed.
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
        let hangup = request.extensions().get::<Hangup>().cloned().unwrap_or_default();
        let mut frames = request.into_inner();
        let (queue, receiver) = ReplyQueue::new(self.budget.clone());
        let registry = self.registry.clone();
        let room = Arc::new(Semaphore::new(CONNECTION_BYTES_MAX));
        let (replies, owed) = (queue.clone(), queue.clone());
        let requests = self.budget.requests.clone();
        let (opened, mut request_age) = (since_boot(), RequestAge::default());
        // Ends with the connection: the stream of frames ends or fails when the peer is gone.
        let serving = async move {
            while let Ok(Some(frame)) = frames.message().await {
                let now = since_boot();
                let late = request_age.of(now - opened, Duration::from_micros(frame.sent_us));
                let sent = (frame.sent_us > 0).then(|| now.saturating_sub(late));
                for request in frame.requests {
                    let weight = (request.encoded_len() + 256).min(CONNECTION_BYTES_MAX) as u32;
                    let Ok(permit) = room.clone().acquire_many_owned(weight).await else { return };
                    let Ok(of_node) = requests.clone().acquire_many_owned(weight).await else {
                        return;
                    };
                    replies.room().await;
                    let arrival = Arrival { sent, received: now };
                    let sink = ReplySink::new(replies.clone(), vec![permit, of_node]);
                    dispatch::dispatch(&registry, request, arrival, sink);
                }
            }
        };
        tokio::spawn(async move {
            let _connection = connection;
            tokio::select! {
                () = serving => {}
                () = owed.stalled(REPLY_STALL_MAX) => {
                    tracing::info!("ending a connection whose peer takes no replies, others need the memory");
                    hangup.hang_up();
                }
            }
        });
        Ok(Response::new(Box::pin(frames_of(queue, receiver))))
    }

    async fn execute(&self, request: Request<v1::Request>) -> Result<Response<v1::Reply>, Status> {
        let permit = self.unary.clone().try_acquire_owned().map_err(|_| {
            let message = format!(
                "this node answers {UNARY_REQUESTS_MAX} single requests at a time; open a stream"
            );
            status_of(&VastoError::new(ErrorCode::Overloaded, message).retry_after_ms(20))
        })?;
        let (queue, mut receiver) = ReplyQueue::new(self.budget.clone());
        let arrival = Arrival { sent: None, received: since_boot() };
        dispatch::dispatch(
            &self.registry,
            request.into_inner(),
            arrival,
            ReplySink::new(queue, vec![permit]),
        );
        let queued =
            receiver.recv().await.ok_or_else(|| Status::internal("the request was dropped"))?;
        Ok(Response::new(queued.reply))
    }
}

/// Packs ready replies into frames.
fn frames_of(
    queue: Arc<ReplyQueue>,
    receiver: UnboundedReceiver<Queued>,
) -> impl Stream<Item = Result<v1::ReplyFrame, Status>> {
    futures::stream::unfold(
        (queue, receiver, None, 0),
        |(queue, mut receiver, carried, before)| async move {
            // A transport that asks for the next frame has released the previous one.
            queue.sent(before);
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
            Some((Ok(v1::ReplyFrame { replies }), (queue, receiver, carried, bytes)))
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::clock::SystemClock;
    use vasto_core::ids::NodeId;

    #[tokio::test]
    async fn single_requests_are_few_at_a_time() {
        let registry = Arc::new(NodeRegistry::new(NodeId(1), Arc::new(SystemClock::default()), 1));
        let service = DataService::new(registry);
        // The node does not know this epoch yet: the request waits.
        let ask = || {
            let op = Some(v1::request::Op::Get(v1::GetRequest::default()));
            service.execute(Request::new(v1::Request {
                keyspace_id: 1,
                epoch: 1,
                op,
                ..v1::Request::default()
            }))
        };
        let mut waiting: Vec<_> = (0..UNARY_REQUESTS_MAX).map(|_| ask()).collect();
        for request in &mut waiting {
            assert!(futures::poll!(request).is_pending());
        }
        assert_eq!(ask().await.unwrap_err().code(), tonic::Code::ResourceExhausted);
        futures::future::try_join_all(waiting).await.unwrap();
        assert!(ask().await.is_ok());
    }
}
