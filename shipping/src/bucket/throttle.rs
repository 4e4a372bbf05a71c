//! What holds back the bulk bytes of one handle of the bucket: a pause, or a bound of the rate.
//!
//! **Invariant:** only the bytes of files pass here, in downloads and uploads; requests for small
//! objects (catalog, manifests, chunks of the log) never wait.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use super::handle::Bucket;

/// Holds back bulk bytes.
#[async_trait]
pub trait Throttle: Send + Sync {
    /// Waits until so many bytes may pass; returns true when it has waited for the end of a pause.
    async fn pass(&self, bytes: u64) -> bool;

    /// Returns true while nothing passes.
    fn is_paused(&self) -> bool;
}

/// The throttle of a handle; without one everything passes at once.
#[derive(Clone, Default)]
pub(super) struct Throttled(Option<Arc<dyn Throttle>>);

impl fmt::Debug for Throttled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Throttled").field(&self.0.is_some()).finish()
    }
}

impl Bucket {
    /// Returns the same bucket (and counts) with its downloads and its uploads of files held back.
    pub fn with_throttle(&self, throttle: Arc<dyn Throttle>) -> Bucket {
        Bucket { throttled: Throttled(Some(throttle)), ..self.clone() }
    }

    /// Returns true while no bulk bytes pass.
    pub fn is_paused(&self) -> bool {
        self.throttled.0.as_ref().is_some_and(|throttle| throttle.is_paused())
    }

    /// Waits until so many bulk bytes may pass, besides those of downloads and uploads, which wait
    /// by themselves; returns true when it has waited for the end of a pause.
    pub async fn pass(&self, bytes: u64) -> bool {
        match &self.throttled.0 {
            Some(throttle) => throttle.pass(bytes).await,
            None => false,
        }
    }
}
