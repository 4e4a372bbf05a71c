//! Reads and writes of local files, on blocking threads instead of those of the async runtime.

use std::fs::File;
use std::io::{Read, Seek};
use std::num::NonZeroU64;
use std::path::Path;

use bytes::Bytes;

use super::error::BucketError;

/// A file that is read from front to back, off the runtime's threads.
pub(super) struct LocalFile {
    file: Option<File>,
    shown: String,
    /// Its size when it was opened.
    pub(super) bytes: u64,
}

impl LocalFile {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// `LocalFile`, as of each other method.
    pub(super) async fn open(path: &Path) -> Result<Self, BucketError> {
        let shown = path.display().to_string();
        let path = path.to_owned();
        let opened = blocking(move || {
            let file = File::open(path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        });
        match opened.await {
            Ok((file, bytes)) => Ok(Self { file: Some(file), shown, bytes }),
            Err(error) => Err(BucketError::LocalFile { path: shown, detail: error.to_string() }),
        }
    }

    /// Reads up to `length` bytes; fewer only at the end.
    pub(super) async fn next(&mut self, length: usize) -> Result<Bytes, BucketError> {
        let Some(mut file) = self.file.take() else { return Err(self.changed()) };
        let read = blocking(move || {
            let mut out = Vec::with_capacity(length);
            (&mut file).take(length as u64).read_to_end(&mut out)?;
            Ok((file, out))
        });
        match read.await {
            Ok((file, out)) => {
                self.file = Some(file);
                Ok(Bytes::from(out))
            }
            Err(error) => {
                Err(BucketError::LocalFile { path: self.shown.clone(), detail: error.to_string() })
            }
        }
    }

    /// Seeks to the beginning.
    pub(super) async fn rewind(&mut self) -> Result<(), BucketError> {
        let Some(mut file) = self.file.take() else { return Err(self.changed()) };
        match blocking(move || file.rewind().map(|()| file)).await {
            Ok(file) => {
                self.file = Some(file);
                Ok(())
            }
            Err(error) => {
                Err(BucketError::LocalFile { path: self.shown.clone(), detail: error.to_string() })
            }
        }
    }

    /// The error of a file that is still being written.
    pub(super) fn changed(&self) -> BucketError {
        BucketError::LocalFile {
            path: self.shown.clone(),
            detail: "its size changed while it was read; only finished files can be uploaded"
                .to_owned(),
        }
    }
}

/// Lets the system write what was just written to a file to the disk, without waiting for it: what
/// gathers until the file is synced delays the syncs of others. A failure costs nothing but that.
pub(super) fn write_behind(file: &File, at: u64, bytes: u64) {
    // Of pages that are not on the disk yet it drops none.
    let _ = rustix::fs::fadvise(file, at, NonZeroU64::new(bytes), rustix::fs::Advice::DontNeed);
}

/// Runs blocking file operations off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
}
