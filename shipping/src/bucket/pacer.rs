//! What holds back the bulk bytes of one handle of the bucket: a pause, or a bound of the rate.
//!
//! Downloads wait by themselves, piece by piece. Whoever uploads a file asks before, with
//! `Bucket::pass`, so that nobody waits here while he holds what others need. Work on rows that
//! come from the bucket or go to it asks with `Bucket::work`.
//!
//! **Invariant:** requests for small objects (catalog, manifests, chunks of the log) never wait.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

/// Longest wait between two steps of a piece.
const SPREAD_MAX: Duration = Duration::from_secs(1);

/// Holds back bulk bytes.
#[async_trait]
pub trait Pacer: Send + Sync {
    /// Waits until so many bytes may pass; returns true when it has waited for the end of a pause.
    async fn pass(&self, bytes: u64) -> bool;

    /// Returns true while nothing passes.
    fn is_paused(&self) -> bool;

    /// Waits like [`Pacer::pass`], but for no request of a client: all other bulk bytes wait the
    /// longer.
    async fn pass_without_yielding(&self, bytes: u64) {
        self.pass(bytes).await;
    }

    /// Returns the bytes a second at which a piece that has passed is best spread, where that costs
    /// nobody anything; `None`: as fast as it goes. Asked again and again while the piece is under
    /// way, also where it is not spread.
    fn rate(&self) -> Option<u64> {
        None
    }

    /// Takes so many bytes of work on rows; false when they have to wait.
    fn try_work(&self, _bytes: u64) -> bool {
        !self.is_paused()
    }

    /// Waits until so many bytes of work on rows may be done.
    async fn work(&self, _bytes: u64) {
        self.pass(0).await;
    }
}

/// The pacer of a handle; without one everything passes at once.
#[derive(Clone, Default)]
pub(super) struct Paced(Option<Arc<dyn Pacer>>);

impl fmt::Debug for Paced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Paced").field(&self.0.is_some()).finish()
    }
}

impl Paced {
    pub(super) fn by(pacer: Arc<dyn Pacer>) -> Self {
        Self(Some(pacer))
    }

    pub(super) fn is_paused(&self) -> bool {
        self.0.as_ref().is_some_and(|pacer| pacer.is_paused())
    }

    pub(super) async fn pass(&self, bytes: u64) -> bool {
        match &self.0 {
            Some(pacer) => pacer.pass(bytes).await,
            None => false,
        }
    }

    pub(super) async fn pass_without_yielding(&self, bytes: u64) {
        if let Some(pacer) = &self.0 {
            pacer.pass_without_yielding(bytes).await;
        }
    }

    /// Waits for the time that so many bytes of a piece take when it is spread.
    pub(super) async fn spread(&self, bytes: u64) {
        if let Some(rate) = self.0.as_ref().and_then(|pacer| pacer.rate()) {
            let time = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            tokio::time::sleep(time.min(SPREAD_MAX)).await;
        }
    }

    /// Does work that moves bytes that have passed; says meanwhile that they are still under way.
    pub(super) async fn while_under_way<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(SPREAD_MAX) => {
                    if let Some(pacer) = &self.0 {
                        pacer.rate();
                    }
                }
            }
        }
    }

    pub(super) fn try_work(&self, bytes: u64) -> bool {
        self.0.as_ref().is_none_or(|pacer| pacer.try_work(bytes))
    }

    pub(super) async fn work(&self, bytes: u64) {
        if let Some(pacer) = &self.0 {
            pacer.work(bytes).await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicU64, Ordering};

    use object_store::memory::InMemory;
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::bucket::Bucket;
    use crate::bucket::download::{DownloadProgress, Wanted, download};

    /// Lets so many bytes pass, and no more until that is raised.
    struct Upto {
        most: watch::Sender<u64>,
        passed: watch::Sender<u64>,
    }

    #[async_trait]
    impl Pacer for Upto {
        async fn pass(&self, bytes: u64) -> bool {
            let mut most = self.most.subscribe();
            let waits = *self.passed.borrow() + bytes > *most.borrow_and_update();
            let _ = most.wait_for(|most| *self.passed.borrow() + bytes <= *most).await;
            self.passed.send_modify(|passed| *passed += bytes);
            waits
        }

        fn is_paused(&self) -> bool {
            *self.passed.borrow() >= *self.most.borrow()
        }
    }

    /// Counts how often it is asked for a rate.
    #[derive(Default)]
    struct Asked(AtomicU64);

    #[async_trait]
    impl Pacer for Asked {
        async fn pass(&self, _bytes: u64) -> bool {
            false
        }

        fn is_paused(&self) -> bool {
            false
        }

        fn rate(&self) -> Option<u64> {
            self.0.fetch_add(1, Ordering::Relaxed);
            None
        }
    }

    #[tokio::test]
    async fn what_is_under_way_is_told_of_until_it_ends() {
        let asked = Arc::new(Asked::default());
        let paced = Paced::by(asked.clone());
        let transfer = async {
            while asked.0.load(Ordering::Relaxed) < 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let told = tokio::time::timeout(Duration::from_secs(60), paced.while_under_way(transfer));
        told.await.unwrap();
        assert_eq!(asked.0.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_download_takes_what_passes_and_goes_on_where_it_stood() {
        let open = Bucket::from_store("memory://b", Arc::new(InMemory::new()));
        let body: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let crc32c = crc32c::crc32c(&body);
        open.create("data/one", body.clone().into()).await.unwrap();
        open.create("data/two", body.clone().into()).await.unwrap();
        let wanted = ["one", "two"].map(|name| Wanted {
            key: format!("data/{name}"),
            bytes: 3_000_000,
            crc32c,
            file_name: format!("{name}.sst"),
        });
        let gate =
            Arc::new(Upto { most: watch::Sender::new(3_000_000), passed: watch::Sender::new(0) });
        let bucket = open.with_pacer(gate.clone());
        let dir = vasto_testkit::memory_dir();
        let (progress, cancel) = (DownloadProgress::default(), CancellationToken::new());
        let mut fetch =
            std::pin::pin!(download(&bucket, &wanted, dir.path(), 1, &progress, &cancel));
        let held = tokio::time::timeout(Duration::from_millis(300), &mut fetch).await;
        assert!(held.is_err(), "half of it has passed");
        assert!(bucket.is_paused() && !open.is_paused());
        assert_eq!(progress.bytes.load(Ordering::Relaxed), 3_000_000, "and is counted, no more");
        assert_eq!(progress.requests.load(Ordering::Relaxed), 1, "what waits is not asked for");
        gate.most.send_replace(u64::MAX);
        fetch.await.unwrap();
        assert_eq!(std::fs::read(dir.path().join("two.sst")).unwrap(), body);
        assert_eq!(progress.bytes.load(Ordering::Relaxed), 6_000_000);
    }
}
