//! Whether a server is ready for work, and the reason when it is not.
//!
//! The flag holds the process's own view; it starts as not ready. Probes read the flag, and so does
//! a caller that starts several roles in one process and waits for all of them.

use std::sync::Arc;

use tokio::sync::watch;

/// Handle to the readiness flag, cheap to clone: clones share one flag.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// `None` when ready, else the reason.
    state: Arc<watch::Sender<Option<String>>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Readiness::new()
    }
}

impl Readiness {
    /// Creates a flag that is not ready, with the reason `starting`.
    pub fn new() -> Readiness {
        Readiness { state: Arc::new(watch::Sender::new(Some("starting".to_owned()))) }
    }

    /// Makes `/readyz` answer 200 from now on.
    pub fn set_ready(&self) {
        self.state.send_replace(None);
    }

    /// Makes `/readyz` answer 503 with this reason from now on.
    pub fn set_not_ready(&self, reason: impl Into<String>) {
        self.state.send_replace(Some(reason.into()));
    }

    /// Returns whether the flag is ready.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_none()
    }

    /// Returns why the flag is not ready; `None` when it is.
    pub fn reason(&self) -> Option<String> {
        self.state.borrow().clone()
    }

    /// Waits until the flag is ready. Cancel-safe; callers set their own deadline.
    pub async fn wait_ready(&self) {
        let mut changes = self.state.subscribe();
        changes
            .wait_for(Option::is_none)
            .await
            .expect("the sender lives in `self`, which this borrows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn clones_share_the_flag_and_waiters_wake() {
        let readiness = Readiness::new();
        assert_eq!(readiness.reason().as_deref(), Some("starting"));
        let clone = readiness.clone();
        let waiter = tokio::spawn(async move { clone.wait_ready().await });
        readiness.set_not_ready("no topology yet");
        assert!(!readiness.is_ready());
        readiness.set_ready();
        waiter.await.expect("the waiter does not panic");
        assert_eq!(readiness.reason(), None);
    }
}
