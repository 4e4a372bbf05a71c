//! Queue of a replica's writer, and the thread that serves it. A node has hundreds of replicas,
//! most of them idle: an idle writer gives its thread back after a while and gets another with its
//! next command.
//!
//! **Invariants**
//! - A writer has at most one thread at a time.
//! - No command stays in the queue without a thread: a writer becomes idle only when it has found
//!   the queue empty after setting `is_parked`, and a sender checks `is_parked` after it has sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::command::{Command, ReplicaError};
use super::shared::Shared;
use super::writer::Writer;
use crate::shortage::NO_THREAD;

/// Time without a command after which a writer gives its thread back.
const IDLE_AFTER: Duration =
    if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(1) };

/// Queue of a writer; see the top of this file.
pub(super) struct Queue {
    commands: Sender<Command>,
    worker: Arc<Worker>,
}

/// State that senders and the writer's thread share.
struct Worker {
    name: String,
    span: tracing::Span,
    shared: Arc<Shared>,
    /// True while the writer has no thread. Written only with the lock held.
    is_parked: AtomicBool,
    state: Mutex<QueueState>,
}

#[derive(Default)]
struct QueueState {
    /// The writer, until a thread takes it.
    writer: Option<Writer>,
    /// The last thread that was started.
    thread: Option<JoinHandle<()>>,
    /// True once every handle is gone.
    is_over: bool,
}

/// Closes the replica when its writer panics.
struct CloseOnPanic(Arc<Shared>);

impl Drop for CloseOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close(
                "its writer died; restart the node, and report this defect with the log".into(),
            );
        }
    }
}

impl Queue {
    /// Creates the queue of an idle writer; its threads get this name and log in the current span.
    pub(super) fn new(commands: Sender<Command>, writer: Writer, name: String) -> Self {
        let (shared, span) = (writer.shared().clone(), tracing::Span::current());
        let state = Mutex::new(QueueState { writer: Some(writer), ..QueueState::default() });
        Self {
            commands,
            worker: Arc::new(Worker {
                name,
                span,
                shared,
                is_parked: AtomicBool::new(true),
                state,
            }),
        }
    }

    /// Queues a command.
    ///
    /// # Errors
    /// When the writer has ended; the command is dropped.
    pub(super) fn send(&self, command: Command) -> Result<(), ReplicaError> {
        self.commands.send(command).map_err(|_| ReplicaError::Stopped)?;
        // The command is queued before `is_parked` is read; see `Worker::park`.
        fence(Ordering::SeqCst);
        if self.worker.is_parked.load(Ordering::SeqCst) {
            Worker::wake(&self.worker);
        }
        Ok(())
    }

    /// Takes the thread in which the writer ends.
    pub(super) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.worker.state.lock().thread.take()
    }

    /// Returns true while the writer has no thread.
    #[cfg(test)]
    pub(super) fn is_parked(&self) -> bool {
        self.worker.is_parked.load(Ordering::SeqCst)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let parked = {
            let mut state = self.worker.state.lock();
            state.is_over = true;
            // A writer that was just woken ends by itself.
            state.writer.take_if(|_| self.worker.is_parked.load(Ordering::SeqCst))
        };
        let Some(mut writer) = parked else { return };
        // An idle writer would meet the end of the queue. If no thread can be started, the log
        // keeps its records.
        let _ =
            std::thread::Builder::new().name(self.worker.name.clone()).spawn(move || writer.stop());
    }
}

impl Worker {
    fn wake(worker: &Arc<Self>) {
        let mut state = worker.state.lock();
        if !worker.is_parked.load(Ordering::SeqCst) || state.writer.is_none() {
            return;
        }
        let served = worker.clone();
        match std::thread::Builder::new().name(worker.name.clone()).spawn(move || served.serve()) {
            Ok(thread) => {
                worker.is_parked.store(false, Ordering::SeqCst);
                // The previous thread has released the writer, and ends.
                state.thread = Some(thread);
            }
            Err(error) => {
                worker.shared.close(format!("{NO_THREAD}: {error}"));
                let writer = state.writer.take();
                drop(state);
                worker.shared.abandon_acknowledgements();
                // Queued commands were not begun, and answer so when they are dropped.
                drop(writer);
            }
        }
    }

    /// Runs the writer on its thread until it is idle or ends.
    fn serve(&self) {
        let _named = self.span.enter();
        let _guard = CloseOnPanic(self.shared.clone());
        let mut writer = self.state.lock().writer.take();
        while let Some(taken) = writer {
            writer = taken.run(IDLE_AFTER).and_then(|idle| self.park(idle));
        }
    }

    /// Makes the writer idle, unless a command has arrived meanwhile.
    fn park(&self, mut writer: Writer) -> Option<Writer> {
        let mut state = self.state.lock();
        if state.is_over {
            return Some(writer); // the writer meets the end of its queue
        }
        self.is_parked.store(true, Ordering::SeqCst);
        // Either the sender's command is seen here, or the sender sees that the writer has no
        // thread.
        fence(Ordering::SeqCst);
        match writer.waiting() {
            Some(command) => {
                self.is_parked.store(false, Ordering::SeqCst);
                drop(state);
                (!writer.take(command)).then_some(writer)
            }
            None => {
                state.writer = Some(writer);
                None
            }
        }
    }
}
