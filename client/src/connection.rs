//! A connection to a node: a bidirectional stream that carries frames of operations with ids.
//!
//! **Invariant:** every request gets exactly one [`NodeReply`], which says whether the node may
//! have received the request. One task owns all state ([`ConnectionDriver`]).
//!
//! Callers take byte permits before they enqueue, so the queue is bounded in bytes and a slow node
//! makes callers wait. A frame takes every request that is queued when it can be sent: concurrent
//! single operations become batches by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, TryAcquireError, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Streaming;
use vasto_core::limits::{CONNECT_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_proto::v1;
use vasto_proto::v1::data_client::DataClient;

use crate::transport::{deepest, endpoint};
use crate::tuning::{FRAMES_AHEAD, IN_FLIGHT_BYTES_MAX, REQUEST_OVERHEAD_BYTES};

mod driver;

pub(crate) use driver::NodeReply;
use driver::{ConnectionDriver, QueuedRequest};

/// The callers' side of a connection.
pub(crate) struct Connection {
    queue: mpsc::UnboundedSender<QueuedRequest>,
    in_flight: Arc<Semaphore>,
    opened: Instant,
    /// When the last reply arrived, milliseconds since `opened`.
    heard_ms: Arc<AtomicU64>,
}

impl Connection {
    /// Connects and opens the stream; the task that serves the stream ends with the connection,
    /// with `cancel`, or once the handle is dropped and nothing is in flight.
    pub(crate) async fn open(
        address: &str,
        tasks: &TaskTracker,
        cancel: CancellationToken,
    ) -> Result<Self, String> {
        let unreachable = |error: &dyn std::error::Error| {
            format!("cannot reach the node at {address}: {}", deepest(error))
        };
        let endpoint =
            endpoint(format!("http://{address}")).map_err(|error| unreachable(&error))?;
        let (frames, outgoing) = mpsc::channel(FRAMES_AHEAD);
        let opening = async {
            let channel = endpoint.connect().await.map_err(|error| unreachable(&error))?;
            let mut client = DataClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let replies = client.stream(ReceiverStream::new(outgoing)).await;
            replies.map_err(|status| {
                format!("the node at {address} refused the stream: {}", status.message())
            })
        };
        let replies = tokio::time::timeout(CONNECT_TIMEOUT, opening)
            .await
            .map_err(|_| {
                format!("the node at {address} did not answer within {CONNECT_TIMEOUT:?}")
            })??
            .into_inner();
        // Unbounded in number, bounded in bytes: every sender holds permits for its request.
        let (queue, jobs) = mpsc::unbounded_channel();
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX));
        let address = address.to_owned();
        let permits = in_flight.clone();
        let (opened, heard_ms) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let heard = Heard { opened, ms: heard_ms.clone() };
        tasks.spawn(async move {
            let mut driver = ConnectionDriver::new(opened);
            let reason = drive(&mut driver, jobs, frames, replies, heard, cancel).await;
            permits.close();
            tracing::debug!(%address, reason, unanswered = driver.unanswered(), "connection ended");
            driver.lose_all();
        });
        Ok(Self { queue, in_flight, opened, heard_ms })
    }

    /// Returns true when no reply has arrived for `time`.
    pub(crate) fn is_silent_for(&self, time: Duration) -> bool {
        let heard = self.opened + Duration::from_millis(self.heard_ms.load(Ordering::Acquire));
        heard.elapsed() >= time
    }

    /// Returns false once the connection has ended.
    pub(crate) fn is_open(&self) -> bool {
        !self.queue.is_closed()
    }

    /// Sends a request of about `bytes` and waits for its answer. Waits for byte permits first.
    pub(crate) async fn call(
        &self,
        mut request: v1::Request,
        bytes: usize,
        deadline: Instant,
    ) -> NodeReply {
        let bytes = bytes + REQUEST_OVERHEAD_BYTES;
        let cost = u32::try_from(bytes.min(IN_FLIGHT_BYTES_MAX)).unwrap_or(u32::MAX);
        let permit = match self.in_flight.clone().try_acquire_many_owned(cost) {
            Ok(permit) => permit,
            Err(TryAcquireError::Closed) => return NodeReply::Lost { sent: false },
            Err(TryAcquireError::NoPermits) => {
                match tokio::time::timeout_at(
                    deadline,
                    self.in_flight.clone().acquire_many_owned(cost),
                )
                .await
                {
                    Ok(Ok(permit)) => permit,
                    Ok(Err(_closed)) => return NodeReply::Lost { sent: false },
                    Err(_elapsed) => return NodeReply::Expired { sent: false },
                }
            }
        };
        request.id = 0;
        let (answer, answered) = oneshot::channel();
        if self.queue.send(QueuedRequest { request, bytes, deadline, answer, permit }).is_err() {
            return NodeReply::Lost { sent: false };
        }
        // The task answers every request that it took; without an answer the request may have been
        // sent.
        answered.await.unwrap_or(NodeReply::Lost { sent: true })
    }
}

/// Runs the loop of a connection; returns why it ended.
async fn drive(
    driver: &mut ConnectionDriver,
    mut jobs: mpsc::UnboundedReceiver<QueuedRequest>,
    frames: mpsc::Sender<v1::RequestFrame>,
    mut replies: Streaming<v1::ReplyFrame>,
    heard: Heard,
    cancel: CancellationToken,
) -> String {
    let mut handles_left = true;
    let expiry = tokio::time::sleep(Duration::ZERO);
    tokio::pin!(expiry);
    let reason = loop {
        if !handles_left && driver.is_idle() {
            break "no longer used".to_owned();
        }
        if let Some(at) = driver.expiry.filter(|at| *at != expiry.deadline()) {
            expiry.as_mut().reset(at);
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => break "client closed".to_owned(),
            frame = replies.message() => match frame {
                Ok(Some(frame)) => {
                    heard.ms.store(heard.opened.elapsed().as_millis() as u64, Ordering::Release);
                    driver.take_replies(frame);
                }
                Ok(None) => break "closed by the node".to_owned(),
                Err(status) => break status.message().to_owned(),
            },
            job = jobs.recv(), if handles_left => match job {
                Some(job) => {
                    driver.enqueue(job);
                    // Callers that were woken together are still enqueueing their requests: let
                    // them, so that they share a frame.
                    tokio::task::yield_now().await;
                    while let Ok(job) = jobs.try_recv() {
                        driver.enqueue(job);
                    }
                }
                None => handles_left = false,
            },
            room = frames.reserve(), if driver.has_waiting() => match room {
                Ok(room) => {
                    if let Some(frame) = driver.next_frame(Instant::now()) {
                        room.send(frame);
                    }
                }
                Err(_) => break "the transport ended".to_owned(),
            },
            () = &mut expiry, if driver.expiry.is_some() => driver.expire(Instant::now()),
        }
    };
    // From here on the queue takes no request; `lose_all` answers those that it took.
    jobs.close();
    while let Ok(job) = jobs.try_recv() {
        driver.enqueue(job);
    }
    reason
}

/// Where the loop of a connection records that the node is alive.
struct Heard {
    opened: Instant,
    ms: Arc<AtomicU64>,
}
