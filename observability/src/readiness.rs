//! Whether a server may be sent work, and if not, why not.
//!
//! The flag says what the process knows about itself; it starts as not ready. Probes read it,
//! and so does whoever starts several roles in one process and waits for all of them.

use std::sync::Arc;

use tokio::sync::watch;

/// A cheap handle: clones share one flag.
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
    /// Not ready, with the reason `starting`.
    pub fn new() -> Readiness {
        Readiness { state: Arc::new(watch::Sender::new(Some("starting".to_owned()))) }
    }

    /// From now on `/readyz` answers 200.
    pub fn set_ready(&self) {
        self.state.send_replace(None);
    }

    /// From now on `/readyz` answers 503 with this reason.
    pub fn set_not_ready(&self, reason: impl Into<String>) {
        self.state.send_replace(Some(reason.into()));
    }

    /// True when ready.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_none()
    }

    /// Why it is not ready; `None` when it is.
    pub fn reason(&self) -> Option<String> {
        self.state.borrow().clone()
    }

    /// Waits until it is ready. Cancel-safe; callers bring their own deadline.
    pub async fn wait_ready(&self) {
        let mut changes = self.state.subscribe();
        changes.wait_for(Option::is_none).await.expect("the sender lives in `self`, which this borrows");
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
