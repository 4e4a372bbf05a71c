//! Uploads the files of one checkpoint.
//!
//! **Invariants**
//! - An SST is uploaded again unless the last manifest of this very replica names it, or, before
//!   there is one, the manifest that a restored keyspace was begun with, or an attempt that did not
//!   reach its manifest.
//! - Files that an attempt uploaded serve the next one, unless they are so old that they may be
//!   collected.
//! - A checkpoint ends: it yields to the foreground for as long as it has time, and no longer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use vasto_core::ids::Lsn;
use vasto_core::limits::UPLOAD_STALL_MAX;
use vasto_shipping::bucket::Bucket;
use vasto_shipping::layout;
use vasto_shipping::manifest::{DatabaseFile, ManifestFile};

use super::super::context::ShipContext;
use super::super::error::ShipError;
use super::super::handle::Uploads;
use crate::clock::since_boot;
use crate::rates;

/// Files of one checkpoint that wait for an upload turn concurrently.
const UPLOADS: usize = 4;

/// Age of the first file at which the others yield to nobody any more: at [`UPLOAD_STALL_MAX`] all of
/// them would be uploaded once more.
const WAITS_FOR_AT_MOST: Duration = Duration::from_secs(UPLOAD_STALL_MAX.as_secs() / 4);
/// Interval at which a file that waits looks whether it still may.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Key, checksum and upload time of an uploaded file, by the clock that continues while the machine
/// sleeps.
type UploadedFile = (String, u32, Duration);

/// Files that were uploaded and that no manifest names yet, by number and size.
#[derive(Default)]
pub(super) struct Uploaded(Mutex<HashMap<(u64, u64), UploadedFile>>);

impl Uploaded {
    fn find(&self, file: &ManifestFile) -> Option<(String, u32)> {
        self.0
            .lock()
            .get(&(file.file_number, file.bytes))
            .map(|(key, crc32c, _)| (key.clone(), *crc32c))
    }

    fn add(&self, file: &ManifestFile, key: String, crc32c: u32) {
        self.0.lock().insert((file.file_number, file.bytes), (key, crc32c, since_boot()));
    }

    /// Returns how long ago the first of these files was uploaded, of those that no manifest names.
    pub(super) fn age_of(&self, files: &[ManifestFile]) -> Duration {
        let uploaded = self.0.lock();
        let times =
            files.iter().filter_map(|file| Some(uploaded.get(&(file.file_number, file.bytes))?.2));
        times.min().map_or(Duration::ZERO, |first| since_boot().saturating_sub(first))
    }

    /// Returns how long ago the first file was uploaded that no manifest names.
    fn oldest(&self) -> Duration {
        let first = self.0.lock().values().map(|(_, _, at)| *at).min();
        first.map_or(Duration::ZERO, |first| since_boot().saturating_sub(first))
    }

    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }
}

/// The uploads of one checkpoint.
pub(super) struct Upload {
    pub(super) context: Arc<ShipContext>,
    /// Writes that wait for the bucket wait for this checkpoint: chunks alone do not cover them.
    pub(super) acknowledges: bool,
    /// Files that are in the bucket already.
    pub(super) last: Vec<ManifestFile>,
    pub(super) uploaded: Arc<Uploaded>,
    /// Counts what is uploaded.
    pub(super) uploads: Arc<Uploads>,
}

impl Upload {
    /// Uploads the SSTs; returns them with their keys and checksums.
    pub(super) async fn files(
        &self,
        dir: &Path,
        files: &[ManifestFile],
    ) -> Result<Vec<ManifestFile>, ShipError> {
        let replica = &self.context.replica;
        let attempt = attempt();
        let mut uploads = Vec::with_capacity(files.len());
        for file in files.iter().cloned() {
            let is_same = |last: &&ManifestFile| {
                last.file_number == file.file_number && last.bytes == file.bytes
            };
            let last = self.last.iter().find(is_same).map(|last| (last.key.clone(), last.crc32c));
            let in_the_bucket = last.or_else(|| self.uploaded.find(&file));
            let key = layout::sst(
                replica.keyspace,
                replica.shard,
                replica.id,
                file.file_number,
                &attempt,
            );
            let path = dir.join(format!("{:06}.sst", file.file_number));
            uploads.push(async move {
                let (key, crc32c) = match in_the_bucket {
                    Some(uploaded) => uploaded,
                    None => {
                        // Whoever waits here has no turn yet: others go on.
                        let bucket = self.bucket_for(file.bytes).await;
                        let _turn = self.context.pace.turn(file.bytes).await;
                        let work = rates::UPLOADS.begin();
                        let uploaded = bucket.upload_file(&key, &path).await?;
                        work.end(uploaded.bytes);
                        self.uploads.add(uploaded.bytes);
                        self.uploaded.add(&file, key.clone(), uploaded.crc32c);
                        (key, uploaded.crc32c)
                    }
                };
                Ok::<_, ShipError>(ManifestFile { key, crc32c, ..file })
            });
        }
        futures::stream::iter(uploads).buffered(UPLOADS).try_collect().await
    }

    /// Waits until a file may pass; returns the bucket to upload it to.
    async fn bucket_for(&self, bytes: u64) -> Bucket {
        let bucket = &self.context.bucket;
        let mut passes = std::pin::pin!(bucket.pass(bytes));
        while self.has_time() {
            tokio::select! {
                _ = &mut passes => return bucket.clone(),
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
        bucket.pass_without_yielding(bytes).await
    }

    /// Returns false when writes wait for the checkpoint, the log fills up that is cut behind it, or
    /// its first file comes of age: then it yields to nobody, also where it has begun to wait.
    fn has_time(&self) -> bool {
        let ShipContext { replica, log_cap, .. } = &*self.context;
        let is_waited_for = self.acknowledges && replica.bucket_acks().first().is_some();
        !is_waited_for
            && replica.log().bytes() < log_cap / 2
            && self.uploaded.oldest() < WAITS_FOR_AT_MOST
    }

    /// Uploads the database's own list of its files, with which the files open as they are.
    pub(super) async fn database(&self, dir: &Path, lsn: Lsn) -> Result<DatabaseFile, ShipError> {
        let current = tokio::fs::read_to_string(dir.join("CURRENT")).await;
        let current = current.map_err(|error| {
            ShipError::Checkpoint(format!("its CURRENT cannot be read: {error}"))
        })?;
        let name = current.trim().to_owned();
        let replica = &self.context.replica;
        let key = layout::database(replica.keyspace, replica.shard, replica.id, lsn, &attempt());
        let path = dir.join(&name);
        let bytes = tokio::fs::metadata(&path).await.map_or(0, |metadata| metadata.len());
        let _turn = self.context.pace.turn(bytes).await;
        let uploaded = self.context.bucket.upload_file(&key, &path).await?;
        self.uploads.add(uploaded.bytes);
        Ok(DatabaseFile { key, name, bytes: uploaded.bytes, crc32c: uploaded.crc32c })
    }
}

/// Returns the part of a key that tells the attempts of an upload apart.
fn attempt() -> String {
    format!("{:08x}", rand::random::<u32>())
}
