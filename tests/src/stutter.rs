//! A process that runs for a small part of the time only: slow, and not away.
//!
//! **Invariant:** the process runs again once its [`Stutter`] is dropped.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinHandle;

/// A process that is stopped again and again.
#[derive(Debug)]
pub struct Stutter {
    /// The process, until it may run.
    pid: Arc<Mutex<Option<Pid>>>,
    task: JoinHandle<()>,
}

impl Stutter {
    /// Lets a process, whose owner has not waited for it, stand still and run in turn.
    pub fn start(pid: u32, stands: Duration, runs: Duration) -> Self {
        let pid = Arc::new(Mutex::new(i32::try_from(pid).ok().and_then(Pid::from_raw)));
        let of_task = Arc::clone(&pid);
        let task = tokio::spawn(async move {
            loop {
                for (signal, lasts) in [(Signal::STOP, stands), (Signal::CONT, runs)] {
                    if !send(&of_task, signal) {
                        return;
                    }
                    tokio::time::sleep(lasts).await;
                }
            }
        });
        Self { pid, task }
    }
}

/// Sends a signal unless the process may run; the lock ensures that no stop follows the last
/// continuation.
fn send(pid: &Mutex<Option<Pid>>, signal: Signal) -> bool {
    let pid = pid.lock();
    pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
}

impl Drop for Stutter {
    fn drop(&mut self) {
        if let Some(pid) = self.pid.lock().take() {
            let _ = kill_process(pid, Signal::CONT);
        }
        self.task.abort();
    }
}
