//! Download of a checkpoint from the bucket: it becomes the database of the replica, or its rows
//! are merged into the database.
//!
//! **Invariant:** files that were downloaded before an interruption are kept for the next attempt.

use std::path::Path;

use tokio::sync::mpsc::{Sender, channel};
use vasto_core::Band;
use vasto_core::record::{BandRange, KeyEntry};
use vasto_core::report::TargetStage;
use vasto_shipping::archive::ArchivedCheckpoint;
use vasto_shipping::download::Wanted;

use super::adopt::install;
use super::bootstrap::{Adoption, Bootstrap, Log};
use super::error::{BuildError, io};
use super::files;
use super::groups::Groups;
use crate::bulk::wait_for_work;
use crate::engine::{EngineError, ImportFile, Scratch};
use crate::replica::Replica;

impl Bootstrap {
    /// Installs the files of a checkpoint as the database of the new replica.
    ///
    /// # Errors
    /// Downloaded files stay for the next attempt.
    pub(crate) async fn take(
        &self,
        base: &ArchivedCheckpoint,
        adoption: Adoption,
        log: Log,
    ) -> Result<(), BuildError> {
        let wanted = wanted(base)?;
        let total = wanted.iter().map(|object| object.bytes).sum();
        {
            let mut progress = self.progress.lock();
            (progress.bytes_total, progress.bytes_done) = (total, 0);
        }
        self.reader().download(&wanted, &self.side).await?;
        {
            let mut progress = self.progress.lock();
            progress.bytes_moved = total;
            progress.keys_moved = base.manifest.files.iter().map(|file| file.entries).sum();
            progress.stage = TargetStage::Rewriting;
        }
        self.registry.report.notify_one();
        let (engines, dir, side, base) =
            (self.engines.clone(), self.dir.clone(), self.side.clone(), base.clone());
        let followed = self.followed();
        let work = move || install(&engines, &dir, &side, &base, adoption, log, &followed);
        let mut span = self.trace.begin("target adopt");
        span.count("vasto.bytes_moved", total);
        let installed = tokio::task::spawn_blocking(work).await?;
        span.end(&installed);
        installed
    }

    /// Merges the rows of a checkpoint that belong to the shard.
    pub(super) async fn merge_rows(
        &self,
        replica: &Replica,
        base: &ArchivedCheckpoint,
        shards: u32,
    ) -> Result<(), BuildError> {
        let side = self.side.with_extension(base.manifest.replica.to_string());
        self.reader().download(&wanted(base)?, &side).await?;
        let imported: Vec<ImportFile> = base.manifest.files.iter().map(files::imported).collect();
        // Left over from an interrupted attempt; the downloaded files are still beside it.
        let scratch = side.join("scratch");
        if scratch.exists() {
            std::fs::remove_dir_all(&scratch).map_err(io(&scratch))?;
        }
        let (groups, mut received) = channel(2);
        let (dir, bucket, cancel) = (side.clone(), self.bucket.clone(), self.cancel.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let yields = |bytes| wait_for_work(&bucket, &cancel, bytes);
            read_rows(&dir, &imported, shards, yields, &groups)
        });
        while let Some(group) = received.recv().await {
            replica.apply(group, Vec::new()).await?;
        }
        let read = reading.await;
        let _ = tokio::fs::remove_dir_all(&side).await;
        Ok(read??)
    }
}

/// Returns the files of a checkpoint and the database's list of them.
fn wanted(base: &ArchivedCheckpoint) -> Result<Vec<Wanted>, BuildError> {
    let too_old =
        || BuildError::unusable(base, "it was shipped by an older version; make a new checkpoint");
    let database = base.manifest.database.as_ref().ok_or_else(too_old)?;
    let list = Wanted {
        key: database.key.clone(),
        bytes: database.bytes,
        crc32c: database.crc32c,
        file_name: database.name.clone(),
    };
    Ok(base.manifest.files.iter().map(files::wanted).chain([list]).collect())
}

/// Sends the rows of the owned bands of a downloaded checkpoint, in groups that fit into one
/// record; before each of them it waits in `yields` for so many bytes of work.
fn read_rows(
    dir: &Path,
    files: &[ImportFile],
    shards: u32,
    yields: impl Fn(u64),
    send: &Sender<Vec<KeyEntry>>,
) -> Result<(), EngineError> {
    let scratch = Scratch::import(&dir.join("scratch"), dir, files)?;
    let owned: BandRange = Band::owned(shards).into();
    let (mut groups, mut read) = (Groups::new(), 0u64);
    for band in owned.bands() {
        let mut rows = scratch.rows(band, 2 << 20);
        while let Some((key, entry)) = rows.current()? {
            let bytes = key.len() + entry.len();
            let full = groups.push(KeyEntry { key: key.to_vec(), entry: entry.to_vec() }, bytes);
            rows.advance();
            read += bytes as u64;
            let Some(group) = full else { continue };
            yields(std::mem::take(&mut read));
            if send.blocking_send(group).is_err() {
                return Ok(());
            }
        }
    }
    let _ = send.blocking_send(groups.rest());
    Ok(())
}
