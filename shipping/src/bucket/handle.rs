//! An open bucket: the store, the prefix in it, and what all clones of a handle share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use object_store::list::PaginatedListStore;
use object_store::path::Path as ObjectPath;

use super::breaker::Breaker;
use super::counts::{Counters, RequestCounts, Usage};
use super::error::BucketError;
use super::pacer::{Paced, Pacer};
use super::retry::RetryBudget;
use super::wire::Learned;

/// A handle to one bucket prefix; cheap to clone, all clones share the counts.
#[derive(Clone)]
pub struct Bucket {
    pub(super) inner: Arc<Inner>,
    pub(super) budget: RetryBudget,
    pub(super) paced: Paced,
}

pub(super) struct Inner {
    pub(super) url: String,
    pub(super) store: Arc<dyn ObjectStore>,
    /// Without slashes at the ends; may be empty.
    pub(super) root: String,
    pub(super) counters: Arc<Counters>,
    pub(super) opened: Instant,
    pub(super) source: Source,
    pub(super) learned: Arc<Learned>,
    pub(super) breaker: Breaker,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Bucket").field(&self.inner.url).finish()
    }
}

/// The source of a store's pages.
#[derive(Clone)]
pub(super) enum Source {
    /// Local directories.
    Local(PathBuf),
    /// S3 and compatible stores.
    Pages(Arc<dyn PaginatedListStore>),
    /// One stream, taken as a single page.
    Stream,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Local(root) => f.debug_tuple("Local").field(root).finish(),
            Source::Pages(_) => f.write_str("Pages"),
            Source::Stream => f.write_str("Stream"),
        }
    }
}

/// Result of opening a URL; no request was sent yet.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) url: String,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) root: String,
    pub(super) source: Source,
    pub(super) learned: Arc<Learned>,
}

impl Bucket {
    /// A bucket over any object store, its root at the store's own; for stores that wrap another.
    pub fn from_store(url: &str, store: Arc<dyn ObjectStore>) -> Bucket {
        Self::over(url.to_owned(), store, String::new())
    }

    pub(super) fn over(url: String, store: Arc<dyn ObjectStore>, root: String) -> Bucket {
        Self::from_opened(Opened {
            url,
            store,
            root,
            source: Source::Stream,
            learned: Arc::default(),
        })
    }

    pub(super) fn from_opened(opened: Opened) -> Bucket {
        let Opened { url, store, root, source, learned } = opened;
        let (counters, breaker) = (Arc::default(), Breaker::default());
        let inner =
            Inner { url, store, root, counters, opened: Instant::now(), source, learned, breaker };
        Bucket { inner: Arc::new(inner), budget: RetryBudget::default(), paced: Paced::default() }
    }

    /// Returns the same bucket (and counts) with another retry budget.
    pub fn with_retry(&self, budget: RetryBudget) -> Bucket {
        Bucket { budget, ..self.clone() }
    }

    /// Returns the underlying store, which bypasses all checks and counts and expects the prefix
    /// before each key; for tests that damage objects.
    pub fn raw_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner.store)
    }

    /// Returns the URL it was opened with; it holds no secrets.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Returns the requests and bytes so far.
    pub fn counts(&self) -> RequestCounts {
        self.inner.counters.snapshot()
    }

    /// Returns the same counts, with the time since the bucket was opened.
    pub fn usage(&self) -> Usage {
        Usage { counts: self.counts(), elapsed: self.inner.opened.elapsed() }
    }

    /// Returns the duration of the current outage and the last error; `None` while the bucket
    /// answers.
    pub fn outage(&self) -> Option<(Duration, String)> {
        self.inner.breaker.outage()
    }

    /// Returns the number of outages that have ended: when it rises, a caller in backoff may retry
    /// at once.
    pub fn outages_ended(&self) -> u64 {
        self.inner.breaker.ended()
    }

    /// Returns the foreign objects that listings have found since the last call.
    pub fn take_strangers(&self) -> Vec<String> {
        self.inner.learned.strangers.take()
    }

    /// Returns the seconds that the store's clock is ahead of this machine's; 0 while that is
    /// unknown.
    pub fn clock_ahead_s(&self) -> i64 {
        self.inner.learned.ahead_s()
    }

    /// Returns a source of the counts that works while the bucket is open, and does not keep it
    /// open.
    pub(crate) fn counts_while_open(
        &self,
    ) -> impl Fn() -> Option<RequestCounts> + Send + Sync + use<> {
        let inner = Arc::downgrade(&self.inner);
        move || inner.upgrade().map(|inner| inner.counters.snapshot())
    }

    pub(super) fn path(&self, key: &str) -> Result<ObjectPath, BucketError> {
        match (self.inner.root.as_str(), key) {
            (_, "") => {
                Err(BucketError::BadKey { key: String::new(), reason: "it is empty".to_owned() })
            }
            ("", key) => parse_path(key),
            (root, key) => parse_path(&format!("{root}/{key}")),
        }
    }

    /// Returns the same bucket (and counts) with its downloads held back.
    pub fn with_pacer(&self, pacer: Arc<dyn Pacer>) -> Bucket {
        Bucket { paced: Paced::by(pacer), ..self.clone() }
    }

    /// Returns true while no bulk bytes pass.
    pub fn is_paused(&self) -> bool {
        self.paced.is_paused()
    }

    /// Waits until so many bulk bytes may pass, besides those of downloads, which wait by
    /// themselves; returns true when it has waited for the end of a pause.
    pub async fn pass(&self, bytes: u64) -> bool {
        self.paced.pass(bytes).await
    }

    /// Waits until so many bulk bytes may pass that yield to no request of a client; returns the same
    /// bucket (and counts), to which they go as fast as they can.
    pub async fn pass_without_yielding(&self, bytes: u64) -> Bucket {
        self.paced.pass_without_yielding(bytes).await;
        Bucket { paced: Paced::default(), ..self.clone() }
    }

    /// Takes so many bytes of work on rows that come from the bucket or go to it; false when they
    /// have to wait, with [`Bucket::work`].
    pub fn try_work(&self, bytes: u64) -> bool {
        self.paced.try_work(bytes)
    }

    /// Waits until so many bytes of work on rows may be done.
    pub async fn work(&self, bytes: u64) {
        self.paced.work(bytes).await;
    }
}

pub(super) fn parse_path(key: &str) -> Result<ObjectPath, BucketError> {
    ObjectPath::parse(key)
        .map_err(|error| BucketError::BadKey { key: key.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cannot_leave_the_root() {
        let store = Arc::new(object_store::memory::InMemory::new());
        let bucket = Bucket::over("memory://x/root".into(), store, "root".into());
        for bad in ["", "..", "a/../b", "a//b", "./a"] {
            assert!(matches!(bucket.path(bad), Err(BucketError::BadKey { .. })), "{bad}");
        }
        assert!(bucket.path("names/a/1").is_ok_and(|path| path.as_ref() == "root/names/a/1"));
    }
}
