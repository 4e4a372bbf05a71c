//! Uploads of files to a bucket in a local directory: copied in small steps, each on its way to the
//! disk before the next one, at the rate that the pacer says.
//!
//! What gathers until it is synced delays everybody who syncs on the same disk, logs above all.
//!
//! **Invariants**
//! - The object is there whole and synced, under a name that was not taken, or not at all. An
//!   interrupted copy leaves a staged file, like every write to a local directory.
//! - A disk that hangs holds no thread of the async runtime, and few others: each step passes the
//!   breaker, like every request.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Result as IoResult};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directory::staged_for;
use super::disk::{LocalFile, blocking, write_behind};
use super::error::BucketError;
use super::failure::Failure;
use super::handle::Bucket;
use super::object::Uploaded;
use super::retry::Retry;

/// Bytes of one step.
const STEP_BYTES: usize = 1 << 20;

impl Bucket {
    /// Copies a file to a key below `root`, the directory of the bucket.
    pub(super) async fn upload_copy(
        &self,
        key: &str,
        mut file: LocalFile,
        root: &Path,
    ) -> Result<Uploaded, BucketError> {
        self.path(key)?;
        if staged_for(key).is_some() {
            let reason = "it is the name of a staged file".to_owned();
            return Err(BucketError::BadKey { key: key.to_owned(), reason });
        }
        self.inner.counters.put();
        self.inner.counters.sent(file.bytes);
        let target = root.join(key);
        let beside = target.clone();
        let staged = self.on_disk(key, 0, move || Staged::beside(&beside)).await?;
        let (mut crc32c, mut bytes) = (0, 0u64);
        loop {
            let part = file.next(STEP_BYTES).await?;
            if part.is_empty() {
                break;
            }
            let (out, length) = (Arc::clone(&staged.file), part.len() as u64);
            let written = self.on_disk(key, length, move || {
                out.write_all_at(&part, bytes)?;
                write_behind(&out, bytes, length);
                Ok(crc32c::crc32c_append(crc32c, &part))
            });
            crc32c = written.await?;
            bytes += length;
            self.paced.spread(length).await;
        }
        if bytes != file.bytes {
            return Err(file.changed());
        }
        match self.on_disk(key, bytes, move || staged.publish(&target)).await? {
            true => Ok(Uploaded { bytes, crc32c }),
            false => Err(BucketError::Exists { key: key.to_owned() }),
        }
    }

    /// Works on the disk, for as long as a request with so many bytes may take.
    async fn on_disk<T: Send + 'static>(
        &self,
        key: &str,
        bytes: u64,
        work: impl FnOnce() -> IoResult<T> + Send + 'static,
    ) -> Result<T, BucketError> {
        let attempt = async { blocking(work).await.map_err(|error| Failure::of_disk(&error)) };
        let limit = self.budget.limit_for(bytes);
        let done = self.once(&Retry::new(self.budget), limit, bytes, attempt).await;
        done.map_err(|failure| failure.into_error(self.url(), key))
    }
}

/// A file beside its future place; removed when it is dropped.
struct Staged {
    file: Arc<File>,
    /// `None` once it is removed.
    path: Option<PathBuf>,
}

impl Staged {
    /// Creates the file, and the directories that are missing.
    fn beside(target: &Path) -> IoResult<Self> {
        let mut number = 1u64;
        loop {
            let mut name = OsString::from(target);
            name.push(format!("#{number}"));
            let path = PathBuf::from(name);
            match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { file: Arc::new(file), path: Some(path) }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) if error.kind() == ErrorKind::NotFound => make_parents(target)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Syncs the file and gives it its name; false when that is taken.
    fn publish(mut self, target: &Path) -> IoResult<bool> {
        self.file.sync_all()?;
        let Some(path) = self.path.take() else { return Ok(false) };
        let linked = std::fs::hard_link(&path, target);
        let _ = std::fs::remove_file(&path);
        match linked {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Some(parent) = target.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(true)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        let remove = move || drop(std::fs::remove_file(path));
        // An upload that was cut off is dropped on a thread of the runtime.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// Creates the directories above a path, synced.
fn make_parents(path: &Path) -> IoResult<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let existing = parent.ancestors().find(|dir| dir.exists()).map(Path::to_path_buf);
    std::fs::create_dir_all(parent)?;
    for dir in parent.ancestors() {
        File::open(dir)?.sync_all()?;
        if existing.as_deref() == Some(dir) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::{Duration, Instant};

    use async_trait::async_trait;

    use super::*;
    use crate::bucket::{BucketOptions, Pacer, RetryBudget};

    /// Spreads what passes at 4 MiB/s.
    struct Slowly;

    #[async_trait]
    impl Pacer for Slowly {
        async fn pass(&self, _bytes: u64) -> bool {
            false
        }

        fn is_paused(&self) -> bool {
            false
        }

        fn rate(&self) -> Option<u64> {
            Some(4 << 20)
        }
    }

    fn files(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_file_is_copied_in_steps_and_never_over_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let url = Bucket::url_of_directory(&dir.path().join("bucket")).unwrap();
        let open = Bucket::open(&url, &BucketOptions::default()).unwrap();
        let body: Vec<u8> = (0..3 * STEP_BYTES + 5).map(|n| (n % 251) as u8).collect();
        let source = dir.path().join("source");
        std::fs::write(&source, &body).unwrap();
        // A crash has left a staged file.
        let data = dir.path().join("bucket/data/new");
        std::fs::create_dir_all(&data).unwrap();
        std::fs::write(data.join("1.sst#1"), b"half").unwrap();
        let began = Instant::now();
        let bucket = open.with_pacer(Arc::new(Slowly));
        let uploaded = bucket.upload_file("data/new/1.sst", &source).await.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
        let wanted = Uploaded { bytes: body.len() as u64, crc32c: crc32c::crc32c(&body) };
        assert_eq!(uploaded, wanted);
        assert_eq!(std::fs::read(data.join("1.sst")).unwrap(), body);
        assert_eq!(files(&data), ["1.sst", "1.sst#1"]);
        std::fs::write(&source, b"another").unwrap();
        let error = open.upload_file("data/new/1.sst", &source).await.unwrap_err();
        assert_eq!(error, BucketError::Exists { key: "data/new/1.sst".to_owned() });
        assert_eq!(std::fs::read(data.join("1.sst")).unwrap(), body);
        open.upload_file("data/other/1.sst", &source).await.unwrap();
        assert_eq!(files(&dir.path().join("bucket/data/other")), ["1.sst"]);
        for bad in ["data/../1.sst", "data/1.sst#3"] {
            let error = open.upload_file(bad, &source).await.unwrap_err();
            assert!(matches!(error, BucketError::BadKey { .. }), "{error:?}");
        }
    }

    /// A disk that hangs answers no request: it gets no copies of files either.
    #[tokio::test]
    async fn nothing_is_copied_while_the_bucket_does_not_answer() {
        let dir = tempfile::tempdir().unwrap();
        let url = Bucket::url_of_directory(&dir.path().join("bucket")).unwrap();
        let bucket = Bucket::open(&url, &BucketOptions::default()).unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, b"body").unwrap();
        let silence = Failure::timed_out(Duration::from_secs(1));
        let breaker = &bucket.inner.breaker;
        while bucket.outage().is_none() {
            breaker.pass(Duration::ZERO).await.ok().unwrap().report(Some(&silence));
        }
        // The one request that tries is under way.
        let trial = breaker.pass(Duration::from_secs(60)).await.ok().unwrap();
        let budget = RetryBudget { total: Duration::ZERO, ..RetryBudget::default() };
        let error = bucket.with_retry(budget).upload_file("data/1.sst", &source).await.unwrap_err();
        assert!(matches!(error, BucketError::Unreachable { .. }), "{error:?}");
        assert!(!dir.path().join("bucket/data").exists());
        trial.report(None);
        bucket.upload_file("data/1.sst", &source).await.unwrap();
    }

    #[tokio::test]
    async fn an_upload_that_is_cut_off_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let url = Bucket::url_of_directory(&dir.path().join("bucket")).unwrap();
        let open = Bucket::open(&url, &BucketOptions::default()).unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, vec![7u8; 16 * STEP_BYTES]).unwrap();
        let data = dir.path().join("bucket/data");
        let bucket = open.with_pacer(Arc::new(Slowly));
        let upload = async { drop(bucket.upload_file("data/1.sst", &source).await) };
        let begun = async {
            while !data.join("1.sst#1").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = upload => panic!("16 MiB at 4 MiB/s"),
            () = begun => {}
        }
        let began = Instant::now();
        while !files(&data).is_empty() {
            assert!(began.elapsed() < Duration::from_secs(30), "{:?}", files(&data));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
