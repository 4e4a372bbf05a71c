//! The queue of a replica's writer, and the thread that serves it: a node has hundreds of replicas, most of which
//! have nothing to do, so a writer gives its thread back after a while and gets another one with its next job.
//!
//! **Invariants**
//! - There is at most one thread at a time.
//! - No job stays in the queue without a thread: a writer rests only when it has seen the queue empty after it had
//!   said that it rests, and whoever sends looks at that after it has sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::Shared;
use super::job::{Job, ReplicaError};
use super::writer::Writer;
use crate::shortage::NO_THREAD;

/// A writer without a job for so long gives its thread back.
const REST_AFTER: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(1) };

/// See the top of this file.
pub(super) struct Queue {
    jobs: Sender<Job>,
    seat: Arc<Seat>,
}

/// Where a writer rests.
struct Seat {
    name: String,
    span: tracing::Span,
    shared: Arc<Shared>,
    /// It has no thread. Written only with the lock held.
    rests: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Until a thread takes it.
    writer: Option<Writer>,
    /// The last one that was started.
    thread: Option<JoinHandle<()>>,
    /// Every handle is gone.
    is_over: bool,
}

/// A writer that dies leaves a replica that says so.
struct CloseOnPanic(Arc<Shared>);

impl Drop for CloseOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close("its writer died; restart the node, and report this defect with the log".into());
        }
    }
}

impl Queue {
    /// The queue of a writer that rests; its threads get this name and log in the current span.
    pub(super) fn new(jobs: Sender<Job>, writer: Writer, name: String) -> Self {
        let (shared, span) = (writer.shared.clone(), tracing::Span::current());
        let state = Mutex::new(State { writer: Some(writer), ..State::default() });
        Self { jobs, seat: Arc::new(Seat { name, span, shared, rests: AtomicBool::new(true), state }) }
    }

    /// Queues a job.
    ///
    /// # Errors
    /// When the writer has ended; the job is dropped.
    pub(super) fn send(&self, job: Job) -> Result<(), ReplicaError> {
        self.jobs.send(job).map_err(|_| ReplicaError::Stopped)?;
        // The job is in the queue before the look; see `Seat::rest`.
        fence(Ordering::SeqCst);
        if self.seat.rests.load(Ordering::SeqCst) {
            Seat::wake(&self.seat);
        }
        Ok(())
    }

    /// The thread in which the writer ends.
    pub(super) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.seat.state.lock().thread.take()
    }

    /// True while the writer has no thread.
    #[cfg(test)]
    pub(super) fn rests(&self) -> bool {
        self.seat.rests.load(Ordering::SeqCst)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let resting = {
            let mut state = self.seat.state.lock();
            state.is_over = true;
            // One that was just woken ends by itself.
            state.writer.take_if(|_| self.seat.rests.load(Ordering::SeqCst))
        };
        let Some(mut writer) = resting else { return };
        // It would meet the end of the queue. Where no thread is to be had the log keeps what it has.
        let _ = std::thread::Builder::new().name(self.seat.name.clone()).spawn(move || writer.stop());
    }
}

impl Seat {
    fn wake(seat: &Arc<Self>) {
        let mut state = seat.state.lock();
        if !seat.rests.load(Ordering::SeqCst) || state.writer.is_none() {
            return;
        }
        let taken = seat.clone();
        match std::thread::Builder::new().name(seat.name.clone()).spawn(move || taken.serve()) {
            Ok(thread) => {
                seat.rests.store(false, Ordering::SeqCst);
                // The thread before has let go of the writer, and ends.
                state.thread = Some(thread);
            }
            Err(error) => {
                seat.shared.close(format!("{NO_THREAD}: {error}"));
                let writer = state.writer.take();
                drop(state);
                seat.shared.followers.abandon();
                seat.shared.bucket_acks.abandon();
                seat.shared.authority.abandon();
                // What is queued was not begun, and says so as it is dropped.
                drop(writer);
            }
        }
    }

    /// The life of a thread.
    fn serve(&self) {
        let _named = self.span.enter();
        let _guard = CloseOnPanic(self.shared.clone());
        let mut writer = self.state.lock().writer.take();
        while let Some(taken) = writer {
            writer = taken.run(REST_AFTER).and_then(|idle| self.rest(idle));
        }
    }

    /// The writer rests, unless a job has come meanwhile.
    fn rest(&self, mut writer: Writer) -> Option<Writer> {
        let mut state = self.state.lock();
        if state.is_over {
            return Some(writer); // it meets the end of its queue
        }
        self.rests.store(true, Ordering::SeqCst);
        // Either the job of a sender is seen here, or that one sees that nobody serves the queue.
        fence(Ordering::SeqCst);
        match writer.jobs.try_recv() {
            Ok(job) => {
                self.rests.store(false, Ordering::SeqCst);
                drop(state);
                (!writer.take(job)).then_some(writer)
            }
            Err(_) => {
                state.writer = Some(writer);
                None
            }
        }
    }
}
