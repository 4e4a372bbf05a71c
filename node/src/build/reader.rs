//! The bucket as a build reads it.
//!
//! **Invariants**
//! - Every byte and request of an object that is read here is counted in the progress that the
//!   master receives.
//! - A read ends when the build is cancelled.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::Lsn;
use vasto_core::report::TargetProgress;
use vasto_shipping::archive::{self, ArchiveError, ArchivedCheckpoint};
use vasto_shipping::bucket::Bucket;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::download::{DownloadProgress, Wanted, download};
use vasto_shipping::export::ExportManifest;
use vasto_shipping::layout::Owner;

use super::error::BuildError;
use crate::rates;
use crate::registry::NodeRegistry;
use crate::target_trace::TargetTrace;

/// Parallel ranged requests of a download.
const PARALLEL: usize = 8;
/// Interval at which a running download is reported.
const REPORT: Duration = Duration::from_millis(200);

/// The bucket, where its reads are counted, and what ends them.
#[derive(Clone, Copy)]
pub(super) struct BucketReader<'a> {
    /// The bucket to read from.
    pub bucket: &'a Bucket,
    /// The progress that is reported to the master.
    pub progress: &'a Mutex<TargetProgress>,
    /// The registry that sends the report.
    pub registry: &'a NodeRegistry,
    /// Cancels the build.
    pub cancel: &'a CancellationToken,
    /// The spans of the target.
    pub trace: &'a TargetTrace,
}

impl BucketReader<'_> {
    /// Reads a manifest.
    pub(super) async fn manifest(&self, key: &str) -> Result<ArchivedCheckpoint, BuildError> {
        let base = self.read(archive::manifest_at(self.bucket, key)).await?;
        // Its size as this version encodes it.
        self.count(base.manifest.encode().len() as u64);
        Ok(base)
    }

    /// Reads the manifest of an export.
    pub(super) async fn export(&self, key: &str) -> Result<ExportManifest, BuildError> {
        let read = self.cancel.run_until_cancelled(self.bucket.get(key)).await;
        let bytes = read.ok_or(BuildError::Cancelled)??;
        let bytes = bytes.ok_or_else(|| ArchiveError::Missing(key.to_owned()))?;
        self.count(bytes.len() as u64);
        ExportManifest::decode(&bytes).map_err(|error| BuildError::Unusable {
            key: key.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Reads the chunk that holds the record after an LSN. `listed`: first LSNs of the chunks known
    /// by a listing, ascending.
    pub(super) async fn chunk_after(
        &self,
        owner: Owner,
        listed: &[Lsn],
        at: Lsn,
    ) -> Result<Option<Chunk>, BuildError> {
        let chunk = self.read(archive::chunk_after(self.bucket, owner, listed, at)).await?;
        Ok(chunk.map(|(chunk, bytes)| {
            self.count(bytes);
            chunk
        }))
    }

    /// Downloads objects; files that an earlier attempt has downloaded are kept and count as done.
    pub(super) async fn download(&self, wanted: &[Wanted], dir: &Path) -> Result<(), BuildError> {
        let mut span = self.trace.begin("bucket get");
        span.set("vasto.what", "files");
        span.count("vasto.objects", wanted.len() as u64);
        if let Some(first) = wanted.first() {
            span.set("vasto.first_key", first.key.clone());
        }
        let fetched = DownloadProgress::default();
        let result = self.fetch(wanted, dir, &fetched).await;
        span.count("vasto.slowest_ms", fetched.slowest_us.load(Ordering::Relaxed) / 1_000);
        span.count("vasto.repeated", fetched.repeated.load(Ordering::Relaxed));
        span.end(&result);
        result
    }

    async fn fetch(
        &self,
        wanted: &[Wanted],
        dir: &Path,
        fetched: &DownloadProgress,
    ) -> Result<(), BuildError> {
        let work = rates::DOWNLOADS.begin();
        let before = self.progress.lock().clone();
        let show = || {
            let mut progress = self.progress.lock();
            let bytes = fetched.bytes.load(Ordering::Relaxed);
            progress.bytes_done = (before.bytes_done + bytes).min(progress.bytes_total);
            progress.bytes_from_bucket = before.bytes_from_bucket + bytes;
            progress.objects_read = before.objects_read + fetched.requests.load(Ordering::Relaxed);
        };
        let result = {
            let fetch = download(self.bucket, wanted, dir, PARALLEL, fetched, self.cancel);
            tokio::pin!(fetch);
            let mut tick = tokio::time::interval(REPORT);
            loop {
                tokio::select! {
                    result = &mut fetch => break result,
                    _ = tick.tick() => {
                        show();
                        self.registry.report.notify_one();
                    }
                }
            }
        };
        show();
        result?;
        work.end(fetched.bytes.load(Ordering::Relaxed));
        let total: u64 = wanted.iter().map(|object| object.bytes).sum();
        let mut progress = self.progress.lock();
        progress.bytes_done = (before.bytes_done + total).min(progress.bytes_total);
        Ok(())
    }

    async fn read<T>(
        &self,
        read: impl Future<Output = Result<T, ArchiveError>>,
    ) -> Result<T, BuildError> {
        Ok(self.cancel.run_until_cancelled(read).await.ok_or(BuildError::Cancelled)??)
    }

    fn count(&self, bytes: u64) {
        let mut progress = self.progress.lock();
        progress.bytes_from_bucket += bytes;
        progress.objects_read += 1;
    }
}
