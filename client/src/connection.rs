//! A connection to a node: a bidirectional stream that carries frames of operations with ids.
//!
//! **Invariant:** every request gets exactly one [`NodeReply`], which says whether the node may have
//! received the request. One task owns all state ([`ConnectionDriver`]); its steps are synchronous.
//!
//! Callers take byte permits before they enqueue, so the queue is bounded in bytes and a slow node
//! makes callers wait. A frame takes every request that is queued when it can be sent: concurrent
//! single operations become batches by themselves.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Streaming;
use tonic::transport::Endpoint;
use vasto_core::limits::{CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_proto::v1;
use vasto_proto::v1::data_client::DataClient;

use crate::retry::server_deadline_ms;
use crate::tuning::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES, FRAME_REQUESTS_MAX, FRAMES_AHEAD, IN_FLIGHT_BYTES_MAX,
    REQUEST_OVERHEAD_BYTES, STREAM_WINDOW_BYTES,
};

/// The end of a request.
#[derive(Debug)]
pub(crate) enum NodeReply {
    /// The node answered.
    Reply(v1::reply::Result),
    /// The connection ended first.
    Lost {
        /// The node may have received the request.
        sent: bool,
    },
    /// The deadline passed first.
    Expired {
        /// The node may have received the request.
        sent: bool,
    },
}

struct PendingRequest {
    request: v1::Request,
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<NodeReply>,
    permit: OwnedSemaphorePermit,
}

struct Pending {
    deadline: Instant,
    answer: oneshot::Sender<NodeReply>,
    /// Released when the request is answered or given up.
    _permit: OwnedSemaphorePermit,
}

/// The callers' side of a connection.
pub(crate) struct Connection {
    queue: mpsc::UnboundedSender<PendingRequest>,
    in_flight: Arc<Semaphore>,
    opened: Instant,
    /// When the last reply arrived, milliseconds since `opened`.
    heard_ms: Arc<AtomicU64>,
}

impl Connection {
    /// Connects and opens the stream; the task that serves the stream ends with the connection, with
    /// `cancel`, or once the handle is dropped and nothing is in flight.
    pub async fn open(address: &str, tasks: &TaskTracker, cancel: CancellationToken) -> Result<Self, String> {
        let told = |error: &dyn std::error::Error| format!("cannot reach the node at {address}: {}", deepest(error));
        let endpoint = endpoint(format!("http://{address}")).map_err(|error| told(&error))?;
        let (frames, outgoing) = mpsc::channel(FRAMES_AHEAD);
        let opening = async {
            let channel = endpoint.connect().await.map_err(|error| told(&error))?;
            let mut client = DataClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let replies = client.stream(ReceiverStream::new(outgoing)).await;
            replies.map_err(|status| format!("the node at {address} refused the stream: {}", status.message()))
        };
        let replies = tokio::time::timeout(CONNECT_TIMEOUT, opening)
            .await
            .map_err(|_| format!("the node at {address} did not answer within {CONNECT_TIMEOUT:?}"))??
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
            tracing::debug!(%address, reason, unanswered = driver.pending.len(), "connection ended");
            driver.lose_all();
        });
        Ok(Self { queue, in_flight, opened, heard_ms })
    }

    /// Returns true when no reply has arrived for `time`.
    pub fn is_silent_for(&self, time: Duration) -> bool {
        let heard = self.opened + Duration::from_millis(self.heard_ms.load(Ordering::Acquire));
        heard.elapsed() >= time
    }

    /// Returns false once the connection has ended.
    pub fn is_open(&self) -> bool {
        !self.queue.is_closed()
    }

    /// Sends a request of about `bytes` and waits for its answer. Waits for byte permits first.
    pub async fn call(&self, mut request: v1::Request, bytes: usize, deadline: Instant) -> NodeReply {
        let bytes = bytes + REQUEST_OVERHEAD_BYTES;
        let cost = u32::try_from(bytes.min(IN_FLIGHT_BYTES_MAX)).unwrap_or(u32::MAX);
        let permit = match self.in_flight.clone().try_acquire_many_owned(cost) {
            Ok(permit) => permit,
            Err(TryAcquireError::Closed) => return NodeReply::Lost { sent: false },
            Err(TryAcquireError::NoPermits) => {
                match tokio::time::timeout_at(deadline, self.in_flight.clone().acquire_many_owned(cost)).await {
                    Ok(Ok(permit)) => permit,
                    Ok(Err(_closed)) => return NodeReply::Lost { sent: false },
                    Err(_elapsed) => return NodeReply::Expired { sent: false },
                }
            }
        };
        request.id = 0;
        let (answer, answered) = oneshot::channel();
        if self.queue.send(PendingRequest { request, bytes, deadline, answer, permit }).is_err() {
            return NodeReply::Lost { sent: false };
        }
        // The task answers every request that it took; without an answer the request may have been sent.
        answered.await.unwrap_or(NodeReply::Lost { sent: true })
    }
}

/// Returns the transport settings of every connection of the client.
pub(crate) fn endpoint(uri: String) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(uri)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// Returns the innermost cause: "Connection refused" rather than "transport error".
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Runs the loop of a connection; returns why it ended.
async fn drive(
    driver: &mut ConnectionDriver,
    mut jobs: mpsc::UnboundedReceiver<PendingRequest>,
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
                    // Callers that were woken together are still enqueueing their requests: let them, so that
                    // they share a frame.
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

/// The state of a connection.
struct ConnectionDriver {
    /// Taken after the node had answered: an age counted from it looks greater to the node than it is, never smaller.
    opened: Instant,
    /// Requests that are not in a frame yet.
    waiting: VecDeque<PendingRequest>,
    /// Requests that were sent in a frame and are not answered yet.
    pending: HashMap<u64, Pending>,
    last_id: u64,
    /// A lower bound of the deadlines of all requests here; may be earlier than all of them.
    expiry: Option<Instant>,
}

impl ConnectionDriver {
    fn new(opened: Instant) -> Self {
        Self { opened, waiting: VecDeque::new(), pending: HashMap::new(), last_id: 0, expiry: None }
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.pending.is_empty()
    }

    fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn enqueue(&mut self, job: PendingRequest) {
        self.expiry = Some(self.expiry.map_or(job.deadline, |at| at.min(job.deadline)));
        self.waiting.push_back(job);
    }

    /// Fills a frame from the queue. Requests whose caller is gone or whose deadline has passed are never
    /// sent; `None` if nothing is left.
    fn next_frame(&mut self, now: Instant) -> Option<v1::RequestFrame> {
        let mut requests = Vec::with_capacity(self.waiting.len().min(FRAME_REQUESTS_MAX));
        let mut bytes = 0;
        while let Some(next) = self.waiting.front() {
            let full = requests.len() >= FRAME_REQUESTS_MAX || bytes + next.bytes > FRAME_BYTES;
            if full && !requests.is_empty() {
                break;
            }
            let Some(mut job) = self.waiting.pop_front() else { break };
            if job.answer.is_closed() {
                continue;
            }
            if job.deadline <= now {
                let _ = job.answer.send(NodeReply::Expired { sent: false });
                continue;
            }
            bytes += job.bytes;
            self.last_id += 1;
            job.request.id = self.last_id;
            job.request.deadline_ms = server_deadline_ms(job.deadline - now);
            requests.push(job.request);
            let pending = Pending { deadline: job.deadline, answer: job.answer, _permit: job.permit };
            self.pending.insert(self.last_id, pending);
        }
        let sent_us = ((now - self.opened).as_micros() as u64).max(1);
        (!requests.is_empty()).then_some(v1::RequestFrame { requests, sent_us })
    }

    fn take_replies(&mut self, frame: v1::ReplyFrame) {
        for reply in frame.replies {
            // A reply without a pending request: the request expired here.
            let Some(pending) = self.pending.remove(&reply.id) else { continue };
            let result = reply.result.unwrap_or_else(|| {
                v1::reply::Result::Error(v1::Error {
                    code: vasto_core::ErrorCode::Internal as u32,
                    message: "the node sent a reply that this client does not know; use a newer client".into(),
                    ..v1::Error::default()
                })
            });
            // The caller may be gone and need no reply.
            let _ = pending.answer.send(NodeReply::Reply(result));
        }
    }

    /// Expires the requests whose deadline has passed and finds the next deadline.
    fn expire(&mut self, now: Instant) {
        let over = |deadline: Instant| deadline <= now;
        let late: Vec<u64> = self.pending.iter().filter(|(_, one)| over(one.deadline)).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(pending) = self.pending.remove(&id) {
                let _ = pending.answer.send(NodeReply::Expired { sent: true });
            }
        }
        for job in std::mem::take(&mut self.waiting) {
            if over(job.deadline) {
                let _ = job.answer.send(NodeReply::Expired { sent: false });
            } else {
                self.waiting.push_back(job);
            }
        }
        let pending = self.pending.values().map(|one| one.deadline);
        self.expiry = pending.chain(self.waiting.iter().map(|job| job.deadline)).min();
    }

    /// Answers every request as lost: the connection has ended.
    fn lose_all(&mut self) {
        for (_, pending) in self.pending.drain() {
            let _ = pending.answer.send(NodeReply::Lost { sent: true });
        }
        for job in self.waiting.drain(..) {
            let _ = job.answer.send(NodeReply::Lost { sent: false });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Bench {
        driver: ConnectionDriver,
        room: Arc<Semaphore>,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            let room = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX));
            let now = Instant::now();
            Self { driver: ConnectionDriver::new(now), room, now }
        }

        fn enqueue(&mut self, bytes: usize, seconds: u64) -> oneshot::Receiver<NodeReply> {
            let (answer, answered) = oneshot::channel();
            let permit = self.room.clone().try_acquire_many_owned(bytes as u32).unwrap();
            let deadline = self.now + Duration::from_secs(seconds);
            self.driver.enqueue(PendingRequest { request: v1::Request::default(), bytes, deadline, answer, permit });
            answered
        }

        fn reply(&mut self, id: u64) {
            let result = Some(v1::reply::Result::Get(v1::GetReply::default()));
            self.driver.take_replies(v1::ReplyFrame { replies: vec![v1::Reply { id, result }] });
        }
    }

    #[test]
    fn what_waits_shares_a_frame_up_to_its_bounds() {
        let mut bench = Bench::new();
        let _small: Vec<_> = (0..10).map(|_| bench.enqueue(100, 5)).collect();
        let _large = bench.enqueue(FRAME_BYTES * 3, 5);
        let _after = bench.enqueue(100, 5);
        let now = bench.now;
        let mut frames = std::iter::from_fn(|| bench.driver.next_frame(now));
        let sizes: Vec<usize> = frames.by_ref().map(|frame| frame.requests.len()).collect();
        assert_eq!(sizes, [10, 1, 1]);
        assert_eq!(bench.driver.pending.len(), 12);
    }

    #[test]
    fn replies_come_in_any_order_and_give_the_room_back() {
        let mut bench = Bench::new();
        let (mut a, mut b) = (bench.enqueue(100, 5), bench.enqueue(100, 5));
        bench.driver.next_frame(bench.now).unwrap();
        bench.reply(2);
        assert!(matches!(b.try_recv().unwrap(), NodeReply::Reply(_)));
        assert!(a.try_recv().is_err());
        bench.reply(1);
        bench.reply(1);
        assert!(matches!(a.try_recv().unwrap(), NodeReply::Reply(_)));
        assert_eq!(bench.room.available_permits(), IN_FLIGHT_BYTES_MAX);
    }

    #[test]
    fn an_ended_connection_tells_what_was_sent() {
        let mut bench = Bench::new();
        let mut sent = bench.enqueue(100, 5);
        bench.driver.next_frame(bench.now).unwrap();
        let mut unsent = bench.enqueue(100, 5);
        bench.driver.lose_all();
        assert!(matches!(sent.try_recv().unwrap(), NodeReply::Lost { sent: true }));
        assert!(matches!(unsent.try_recv().unwrap(), NodeReply::Lost { sent: false }));
    }

    #[test]
    fn deadlines_tell_what_was_sent_and_later_ones_stay() {
        let mut bench = Bench::new();
        let (mut early, mut late) = (bench.enqueue(100, 1), bench.enqueue(100, 9));
        bench.driver.next_frame(bench.now).unwrap();
        let mut queued = bench.enqueue(100, 1);
        let after = bench.now + Duration::from_secs(2);
        bench.driver.expire(after);
        assert!(matches!(early.try_recv().unwrap(), NodeReply::Expired { sent: true }));
        assert!(matches!(queued.try_recv().unwrap(), NodeReply::Expired { sent: false }));
        assert!(late.try_recv().is_err());
        assert_eq!(bench.driver.expiry, Some(bench.now + Duration::from_secs(9)));
        let mut overdue = bench.enqueue(100, 1);
        assert!(bench.driver.next_frame(after).is_none());
        assert!(matches!(overdue.try_recv().unwrap(), NodeReply::Expired { sent: false }));
    }

    #[test]
    fn a_frame_tells_when_it_was_sent() {
        let mut bench = Bench::new();
        let _waits = bench.enqueue(100, 5);
        let frame = bench.driver.next_frame(bench.now + Duration::from_millis(7)).unwrap();
        assert_eq!(frame.sent_us, 7_000);
    }

    #[test]
    fn a_request_whose_caller_has_gone_is_never_sent() {
        let mut bench = Bench::new();
        drop(bench.enqueue(100, 5));
        assert!(bench.driver.next_frame(bench.now).is_none());
        assert_eq!(bench.room.available_permits(), IN_FLIGHT_BYTES_MAX);
    }
}
