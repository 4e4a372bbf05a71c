//! Checked downloads of many objects into a directory.
//!
//! **Invariant:** a file under its final name is whole: every byte was checked against the wanted
//! checksum and synced before the rename. An interrupted download leaves `<name>.part` files
//! (discarded) and finished files (kept, after another check).
//!
//! Each buffer of a body waits for the handle's throttle before it counts as received.
//!
//! Memory is bounded by `parallel` times [`BUFFER_BYTES`], whatever the objects' sizes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::GetResultPayload;
use object_store::path::Path as ObjectPath;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::disk::{blocking, write_behind};
use super::error::BucketError;
use super::failure::{Failure, Kind};
use super::handle::Bucket;
use super::retry::Retry;

/// Size of the ranges in which larger objects are fetched, in parallel.
pub const PART_BYTES: u64 = 8 << 20;
/// Bytes gathered in memory before a write.
pub const BUFFER_BYTES: usize = 1 << 20;
/// A body that stalls for this long is requested again.
const STALL: Duration = Duration::from_secs(10);

/// An object and the file that it is downloaded to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Object key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// CRC-32C of the whole object.
    pub crc32c: u32,
    /// Name in the directory; no path.
    pub file_name: String,
}

/// Bytes and requests of a running download so far.
#[derive(Debug, Default)]
pub struct DownloadProgress {
    /// Body bytes received, those of repeated requests included.
    pub bytes: AtomicU64,
    /// Requests sent.
    pub requests: AtomicU64,
    /// Requests that failed and were repeated.
    pub repeated: AtomicU64,
    /// Time that the slowest request took, its body included, microseconds.
    pub slowest_us: AtomicU64,
}

impl DownloadProgress {
    fn took(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.slowest_us.fetch_max(us, Ordering::Relaxed);
    }
}

/// Why a download ended early. Finished files stay; another call continues from there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DownloadError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// An object is missing.
    #[error("object {key} is missing from the bucket; run `vasto bucket fsck` to see what else is")]
    Missing {
        /// The key.
        key: String,
    },
    /// An object differs from its upload, twice in a row.
    #[error(
        "object {key} is corrupt: {detail}; use an older checkpoint, and run `vasto bucket fsck`"
    )]
    Corrupt {
        /// The key.
        key: String,
        /// The difference.
        detail: String,
    },
    /// A file could not be written.
    #[error("{path} cannot be written: {detail}; check the disk's free space and health")]
    LocalFile {
        /// The file.
        path: String,
        /// The system's error.
        detail: String,
    },
    /// A name in the caller's list is not usable.
    #[error("`{file_name}` is not a file name of its own in the directory")]
    BadFileName {
        /// The name.
        file_name: String,
    },
    /// The caller cancelled the download.
    #[error("the download was cancelled")]
    Cancelled,
}

/// Fetches all wanted objects into `dir` (created if missing) with at most `parallel` requests at
/// once. A body that is short, long or fails its checksum is fetched once more before it counts.
///
/// # Errors
/// The first error; the other objects are left as they are.
pub async fn download(
    bucket: &Bucket,
    wanted: &[Wanted],
    dir: &Path,
    parallel: usize,
    progress: &DownloadProgress,
    cancel: &CancellationToken,
) -> Result<(), DownloadError> {
    check_names(wanted)?;
    let parallel = parallel.max(1);
    let task = Arc::new(Task {
        bucket: bucket.clone(),
        dir: dir.to_owned(),
        parallel,
        permits: Semaphore::new(parallel),
        progress,
    });
    let directory = dir.to_owned();
    blocking(move || std::fs::create_dir_all(directory))
        .await
        .map_err(|error| local(dir, &error))?;
    let work = futures::stream::iter(wanted.to_vec())
        .map(|file| Arc::clone(&task).fetch(file))
        .buffer_unordered(parallel)
        .try_for_each(|()| std::future::ready(Ok(())));
    tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(DownloadError::Cancelled),
        done = work => done?,
    }
    let directory = dir.to_owned();
    blocking(move || File::open(directory)?.sync_all()).await.map_err(|error| local(dir, &error))
}

fn check_names(wanted: &[Wanted]) -> Result<(), DownloadError> {
    let mut seen = std::collections::HashSet::new();
    for file in wanted {
        let name = file.file_name.as_str();
        let plain = Path::new(name).file_name().is_some_and(|only| only == name);
        if !plain || name.contains(['/', '\0']) || name.ends_with(".part") || !seen.insert(name) {
            return Err(DownloadError::BadFileName { file_name: name.to_owned() });
        }
    }
    Ok(())
}

fn local(path: &Path, error: &std::io::Error) -> DownloadError {
    DownloadError::LocalFile { path: path.display().to_string(), detail: error.to_string() }
}

struct Task<'a> {
    bucket: Bucket,
    dir: PathBuf,
    parallel: usize,
    permits: Semaphore,
    progress: &'a DownloadProgress,
}

impl Task<'_> {
    async fn fetch(self: Arc<Self>, wanted: Wanted) -> Result<(), DownloadError> {
        let target = self.dir.join(&wanted.file_name);
        let (path, bytes, crc) = (target.clone(), wanted.bytes, wanted.crc32c);
        if blocking(move || is_whole(&path, bytes, crc))
            .await
            .map_err(|error| local(&target, &error))?
        {
            return Ok(());
        }
        match Arc::clone(&self).fetch_once(&wanted, &target).await {
            Err(DownloadError::Corrupt { key, detail }) => {
                tracing::info!(key, detail, "a corrupt body is fetched once more");
                self.fetch_once(&wanted, &target).await
            }
            other => other,
        }
    }

    async fn fetch_once(
        self: Arc<Self>,
        wanted: &Wanted,
        target: &Path,
    ) -> Result<(), DownloadError> {
        let part = self.dir.join(format!("{}.part", wanted.file_name));
        let path = part.clone();
        // Each attempt has a new file: a late write of an abandoned attempt goes to the old file.
        let file = blocking(move || {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(error);
            }
            File::options().write(true).create_new(true).open(&path)
        });
        let file = Arc::new(file.await.map_err(|error| local(&part, &error))?);
        let object = Arc::new(Object {
            path: self.bucket.path(&wanted.key)?,
            wanted: wanted.clone(),
            file: Arc::clone(&file),
            part: part.clone(),
        });
        let parts: Vec<(u32, u64)> = futures::stream::iter(ranges(wanted.bytes))
            .map(|range| Arc::clone(&self).fetch_part(Arc::clone(&object), range))
            .buffered(self.parallel)
            .try_collect()
            .await?;
        let crc = parts
            .iter()
            .fold(0, |crc, (next, length)| crc32c::crc32c_combine(crc, *next, *length as usize));
        if crc != wanted.crc32c {
            return Err(object
                .corrupt(format!("its checksum is {crc:08x} instead of {:08x}", wanted.crc32c)));
        }
        let to = target.to_owned();
        let from = part.clone();
        blocking(move || {
            file.sync_all()?;
            std::fs::rename(from, to)
        })
        .await
        .map_err(|error| local(&part, &error))
    }

    /// Fetches one range; returns its checksum and length.
    async fn fetch_part(
        self: Arc<Self>,
        object: Arc<Object>,
        range: Range<u64>,
    ) -> Result<(u32, u64), DownloadError> {
        let _permit = self.permits.acquire().await.map_err(|_| DownloadError::Cancelled)?;
        // Waited for before the request: a body that stands open meanwhile runs into the time-outs of
        // the store and of the client.
        self.bucket.pass(range.end - range.start).await;
        let mut retry = Retry::new(self.bucket.budget);
        loop {
            // Nothing is asked for in a pause; that takes no patience.
            if self.bucket.pass(0).await {
                retry = Retry::new(self.bucket.budget);
            }
            let began = Instant::now();
            let part = Box::pin(self.try_part(&retry, &object, range.clone()));
            let tried = self.bucket.paced.while_under_way(part).await;
            self.progress.took(began.elapsed());
            let failure = match tried {
                Ok(crc) => return Ok((crc, range.end - range.start)),
                Err(Attempt::Failed(failure)) => failure,
                Err(Attempt::Ended(error)) => return Err(error),
            };
            if failure.transient && retry.pause().await {
                self.progress.repeated.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let key = &object.wanted.key;
            if failure.kind == Kind::NotFound {
                return Err(DownloadError::Missing { key: key.clone() });
            }
            // Each store refuses a range beyond the end of the object in its own way.
            if !failure.transient
                && let Some(found) = self.bucket.head(key).await?
                && found != object.wanted.bytes
            {
                return Err(object.wrong_size(found));
            }
            return Err(failure.into_error(self.bucket.url(), key).into());
        }
    }

    async fn try_part(
        &self,
        retry: &Retry,
        object: &Object,
        range: Range<u64>,
    ) -> Result<u32, Attempt> {
        self.progress.requests.fetch_add(1, Ordering::Relaxed);
        let whole = range == (0..object.wanted.bytes);
        let asked = (!whole).then(|| range.clone());
        let asking = self.bucket.get_once(&object.path, asked);
        let result = self.bucket.once(retry, self.bucket.budget.attempt, 0, asking).await?;
        if result.meta.size != object.wanted.bytes {
            return Err(Attempt::Ended(object.wrong_size(result.meta.size)));
        }
        if result.range != range {
            let detail = format!("asked for bytes {range:?}, the store sent {:?}", result.range);
            return Err(Attempt::Ended(object.corrupt(detail)));
        }
        match result.payload {
            GetResultPayload::File(source, _) => self.copy_file(object, source, range).await,
            GetResultPayload::Stream(body) => self.copy_stream(object, body, range).await,
        }
    }

    /// Copies from a bucket in a local directory: plain reads, off the runtime's threads.
    async fn copy_file(
        &self,
        object: &Object,
        source: File,
        range: Range<u64>,
    ) -> Result<u32, Attempt> {
        let source = Arc::new(source);
        let (mut crc, mut at) = (0, range.start);
        while at < range.end {
            let (source, file) = (Arc::clone(&source), Arc::clone(&object.file));
            let length = (range.end - at).min(BUFFER_BYTES as u64) as usize;
            let copied = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; length];
                source.read_exact_at(&mut buffer, at).map_err(CopyError::Read)?;
                file.write_all_at(&buffer, at).map_err(CopyError::Write)?;
                write_behind(&file, at, length as u64);
                Ok(crc32c::crc32c_append(crc, &buffer))
            });
            crc = match copied
                .await
                .unwrap_or_else(|error| Err(CopyError::Write(std::io::Error::other(error))))
            {
                Ok(crc) => crc,
                Err(CopyError::Read(error)) => {
                    return Err(Attempt::Ended(
                        object.corrupt(format!("it cannot be read: {error}")),
                    ));
                }
                Err(CopyError::Write(error)) => {
                    return Err(Attempt::Ended(local(&object.part, &error)));
                }
            };
            self.received(length);
            at += length as u64;
            // No request stands open meanwhile.
            self.bucket.paced.spread(length as u64).await;
        }
        Ok(crc)
    }

    async fn copy_stream(
        &self,
        object: &Object,
        mut body: futures::stream::BoxStream<'static, object_store::Result<Bytes>>,
        range: Range<u64>,
    ) -> Result<u32, Attempt> {
        let (mut crc, mut written) = (0, range.start);
        let mut buffer: Vec<u8> = Vec::new();
        loop {
            let chunk = match tokio::time::timeout(STALL, body.next()).await {
                Err(_) => return Err(Failure::timed_out(STALL).into()),
                Ok(None) => None,
                Ok(Some(chunk)) => Some(chunk.map_err(Failure::from)?),
            };
            if let Some(chunk) = &chunk {
                self.received(chunk.len());
                crc = crc32c::crc32c_append(crc, chunk);
                buffer.extend_from_slice(chunk);
            }
            let arrived = written + buffer.len() as u64;
            if arrived > range.end {
                let detail = format!("the body of bytes {range:?} is longer than that");
                return Err(Attempt::Ended(object.corrupt(detail)));
            }
            if !buffer.is_empty() && (chunk.is_none() || buffer.len() >= BUFFER_BYTES) {
                let file = Arc::clone(&object.file);
                let bytes = std::mem::take(&mut buffer);
                let stored = blocking(move || {
                    file.write_all_at(&bytes, written)?;
                    write_behind(&file, written, bytes.len() as u64);
                    Ok(())
                });
                let stored = stored.await;
                stored.map_err(|error| Attempt::Ended(local(&object.part, &error)))?;
                written = arrived;
            }
            if chunk.is_none() {
                break;
            }
        }
        if written != range.end {
            let detail = format!("the body of bytes {range:?} ends at {written}");
            return Err(Attempt::Ended(object.corrupt(detail)));
        }
        Ok(crc)
    }

    fn received(&self, bytes: usize) {
        self.progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.bucket.inner.counters.received(bytes as u64);
    }
}

struct Object {
    path: ObjectPath,
    wanted: Wanted,
    file: Arc<File>,
    part: PathBuf,
}

impl Object {
    fn corrupt(&self, detail: String) -> DownloadError {
        DownloadError::Corrupt { key: self.wanted.key.clone(), detail }
    }

    fn wrong_size(&self, found: u64) -> DownloadError {
        self.corrupt(format!("it has {found} bytes instead of {}", self.wanted.bytes))
    }
}

/// Outcome of a failed attempt: retryable, or final.
enum Attempt {
    Failed(Failure),
    Ended(DownloadError),
}

impl From<Failure> for Attempt {
    fn from(failure: Failure) -> Self {
        Attempt::Failed(failure)
    }
}

enum CopyError {
    Read(std::io::Error),
    Write(std::io::Error),
}

/// Returns the ranges of an object's requests; the empty object has one too.
fn ranges(bytes: u64) -> Vec<Range<u64>> {
    (0..bytes.div_ceil(PART_BYTES).max(1))
        .map(|n| n * PART_BYTES..((n + 1) * PART_BYTES).min(bytes))
        .collect()
}

/// Returns true when the file exists with exactly these bytes.
fn is_whole(path: &Path, bytes: u64, crc: u32) -> std::io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if file.metadata()?.len() != bytes {
        return Ok(false);
    }
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut checksum, mut at) = (0, 0);
    while at < bytes {
        let length = (bytes - at).min(BUFFER_BYTES as u64) as usize;
        file.read_exact_at(&mut buffer[..length], at)?;
        checksum = crc32c::crc32c_append(checksum, &buffer[..length]);
        at += length as u64;
    }
    Ok(checksum == crc)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges_cover_every_byte_once() {
        for bytes in
            [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES, 3 * PART_BYTES + 7]
        {
            let ranges = ranges(bytes);
            assert_eq!(ranges.first().unwrap().start, 0);
            assert_eq!(ranges.last().unwrap().end, bytes);
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(ranges.iter().all(|range| range.end - range.start <= PART_BYTES));
        }
    }

    #[test]
    fn names_stay_in_the_directory() {
        let named =
            |name: &str| Wanted { key: "k".into(), bytes: 0, crc32c: 0, file_name: name.into() };
        for bad in ["", ".", "..", "a/b", "/a", "a/", "../a", "a.part", "a\0"] {
            assert!(check_names(&[named(bad)]).is_err(), "{bad}");
        }
        assert!(check_names(&[named("000001.sst"), named("000001.sst")]).is_err());
        assert!(check_names(&[named("000001.sst"), named("000002.sst")]).is_ok());
    }

    #[test]
    fn downloads_can_be_spawned() {
        fn is_send<T: Send>(_: T) {}
        let bucket =
            Bucket::from_store("memory://t", Arc::new(object_store::memory::InMemory::new()));
        let (progress, cancel) = (DownloadProgress::default(), CancellationToken::new());
        is_send(download(&bucket, &[], Path::new("/x"), 1, &progress, &cancel));
    }
}
