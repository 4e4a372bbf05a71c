//! The state of a connection: requests that wait for a frame, and requests that wait for their
//! reply.
//!
//! **Invariant:** every request that is enqueued here is answered exactly once. Every step is
//! synchronous; the clock is an argument.

use std::collections::{HashMap, VecDeque};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;
use vasto_proto::v1;

use crate::retry::server_deadline_ms;
use crate::tuning::{FRAME_BYTES, FRAME_REQUESTS_MAX};

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

/// A request that is not in a frame yet.
pub(super) struct QueuedRequest {
    pub(super) request: v1::Request,
    pub(super) bytes: usize,
    pub(super) deadline: Instant,
    pub(super) answer: oneshot::Sender<NodeReply>,
    pub(super) permit: OwnedSemaphorePermit,
}

/// A request that was sent in a frame.
struct SentRequest {
    deadline: Instant,
    answer: oneshot::Sender<NodeReply>,
    /// Released when the request is answered or given up.
    _permit: OwnedSemaphorePermit,
}

/// The state of a connection.
pub(super) struct ConnectionDriver {
    /// Taken after the node had answered: an age counted from it looks greater to the node than it
    /// is, never smaller.
    opened: Instant,
    /// Requests that are not in a frame yet.
    waiting: VecDeque<QueuedRequest>,
    /// Requests that were sent in a frame and are not answered yet.
    pending: HashMap<u64, SentRequest>,
    last_id: u64,
    /// A lower bound of the deadlines of all requests here; may be earlier than all of them.
    pub(super) expiry: Option<Instant>,
}

impl ConnectionDriver {
    pub(super) fn new(opened: Instant) -> Self {
        Self { opened, waiting: VecDeque::new(), pending: HashMap::new(), last_id: 0, expiry: None }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.pending.is_empty()
    }

    /// Returns the number of requests that were sent and not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn enqueue(&mut self, job: QueuedRequest) {
        self.expiry = Some(self.expiry.map_or(job.deadline, |at| at.min(job.deadline)));
        self.waiting.push_back(job);
    }

    /// Fills a frame from the queue. Requests whose caller is gone or whose deadline has passed are
    /// never sent; `None` if nothing is left.
    pub(super) fn next_frame(&mut self, now: Instant) -> Option<v1::RequestFrame> {
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
            let pending =
                SentRequest { deadline: job.deadline, answer: job.answer, _permit: job.permit };
            self.pending.insert(self.last_id, pending);
        }
        let sent_us = ((now - self.opened).as_micros() as u64).max(1);
        (!requests.is_empty()).then_some(v1::RequestFrame { requests, sent_us })
    }

    pub(super) fn take_replies(&mut self, frame: v1::ReplyFrame) {
        for reply in frame.replies {
            // A reply without a pending request: the request expired here.
            let Some(pending) = self.pending.remove(&reply.id) else { continue };
            let result = reply.result.unwrap_or_else(|| {
                v1::reply::Result::Error(v1::Error {
                    code: vasto_core::ErrorCode::Internal as u32,
                    message:
                        "the node sent a reply that this client does not know; use a newer client"
                            .into(),
                    ..v1::Error::default()
                })
            });
            // The caller may be gone and need no reply.
            let _ = pending.answer.send(NodeReply::Reply(result));
        }
    }

    /// Expires the requests whose deadline has passed and finds the next deadline.
    pub(super) fn expire(&mut self, now: Instant) {
        let over = |deadline: Instant| deadline <= now;
        let late: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, sent)| over(sent.deadline))
            .map(|(id, _)| *id)
            .collect();
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
        let pending = self.pending.values().map(|sent| sent.deadline);
        self.expiry = pending.chain(self.waiting.iter().map(|job| job.deadline)).min();
    }

    /// Answers every request as lost: the connection has ended.
    pub(super) fn lose_all(&mut self) {
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
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::tuning::IN_FLIGHT_BYTES_MAX;

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
            self.driver.enqueue(QueuedRequest {
                request: v1::Request::default(),
                bytes,
                deadline,
                answer,
                permit,
            });
            answered
        }

        fn reply(&mut self, id: u64) {
            let result = Some(v1::reply::Result::Get(v1::GetReply::default()));
            self.driver.take_replies(v1::ReplyFrame { replies: vec![v1::Reply { id, result }] });
        }
    }

    #[test]
    fn queued_requests_share_a_frame_up_to_its_bounds() {
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
