//! The write-ahead log of one replica: numbered files of checksummed records.
//!
//! Owns the files `<20-digit first LSN>.log` in one directory and nothing else. [`Binlog`] is the
//! writing end and belongs to the replica's writer thread; [`LogShared`] is what every other thread
//! may use (positions, sync before a flush, truncation); [`LogReader`] reads synced records.
//!
//! **Invariants**
//! - LSNs are contiguous, in a file and from file to file; only the front is ever truncated.
//! - A file is created only after everything before it is synced, and no record is written to it
//!   before its header and its directory entry are durable. Recovery relies on it (`recover`).
//! - `synced_lsn` never passes what an fdatasync has confirmed, and after one failure nothing is
//!   confirmed any more: the kernel drops the dirty pages of a failed sync, so that a retry would
//!   succeed over lost data.
//!
//! The replica decides what the records mean, what `applied_lsn` is and how far to truncate.

mod file;
mod reader;
mod recover;
mod shared;
impl Drop for Binlog {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vasto_core::record::{FILE_HEADER_BYTES, FileHeader, RECORD_HEADER_BYTES, positions_at};
use vasto_core::{ErrorCode, Incarnation, KeyspaceId, Lsn, ReplicaId, ShardId, VastoError};

pub(crate) use reader::LogReader;
pub(crate) use shared::LogShared;
use shared::Segment;

/// Directory, owner and file size of a log.
#[derive(Debug, Clone)]
pub(crate) struct BinlogConfig {
    /// The directory; it holds nothing but this log. Created if it is missing.
    pub dir: PathBuf,
    /// The keyspace of the replica.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica itself.
    pub replica: ReplicaId,
    /// A file that would grow beyond this many bytes is closed and a new one begun.
    pub file_bytes: u64,
}

/// Reason why a log operation failed.
#[derive(Debug, thiserror::Error)]
pub enum BinlogError {
    /// The file system returned an error.
    #[error("cannot {action} {}: {source}; check the disk, its free space and the permissions", path.display())]
    Io {
        /// The failed operation.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The IO error.
        source: std::io::Error,
    },
    /// The file does not belong to this log. Nothing was changed.
    #[error("{} is not a file of this log ({reason}); move it out of the directory, it was not changed", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// The mismatch.
        reason: String,
    },
    /// A newer version wrote the file. Nothing was changed.
    #[error("{} has binlog format {format}, which this version does not read; use the version that wrote it or a newer one", file.display())]
    NewerFormat {
        /// The file.
        file: PathBuf,
        /// The format it names.
        format: u64,
    },
    /// A record that was durable is damaged or gone. Nothing was changed.
    #[error(
        "{} is damaged at byte {offset}: record {lsn} was synced and cannot be read ({evidence}); \
         the log was not changed and the replica must be rebuilt from its peers or the bucket",
        file.display()
    )]
    Rot {
        /// The damaged file.
        file: PathBuf,
        /// Offset of the damage, bytes from the start of the file.
        offset: u64,
        /// The first record that is lost.
        lsn: Lsn,
        /// Evidence that the damage is not an unfinished write.
        evidence: String,
    },
    /// The reader asked for records that truncation has removed.
    #[error(
        "record {asked} is no longer in the log, which starts at {first}; start over from a checkpoint"
    )]
    TooOld {
        /// The first record that was wanted.
        asked: Lsn,
        /// The oldest record in the log.
        first: Lsn,
    },
    /// The reader claims to have read records that were never written here.
    #[error(
        "the log ends at record {last} and a reader claims to hold {after}; start over from a checkpoint"
    )]
    Ahead {
        /// The position that the reader claims.
        after: Lsn,
        /// The last record.
        last: Lsn,
    },
    /// An earlier write or sync failed, and the state that it left on disk is unknown.
    #[error(
        "the log takes no more writes since it failed ({reason}); reopen the replica, which verifies what is on disk"
    )]
    Poisoned {
        /// The first failure.
        reason: String,
    },
}

impl BinlogError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BinlogError {
        let path = path.to_owned();
        move |source| BinlogError::Io { action, path, source }
    }
}

impl From<BinlogError> for VastoError {
    fn from(error: BinlogError) -> Self {
        let code = match &error {
            BinlogError::TooOld { .. } => ErrorCode::FailedPrecondition,
            _ => ErrorCode::Unavailable,
        };
        VastoError::new(code, error.to_string())
    }
}

/// The writing end of a replica's log.
#[derive(Debug)]
pub(crate) struct Binlog {
    config: BinlogConfig,
    incarnation: Incarnation,
    active: Option<Active>,
    shared: Arc<LogShared>,
}

/// File being written. The shared state holds the same handle, for syncing.
#[derive(Debug)]
struct Active {
    file: Arc<File>,
    path: PathBuf,
    first: Lsn,
    bytes: u64,
}

impl Active {
    fn holds_records(&self) -> bool {
        self.bytes > FILE_HEADER_BYTES as u64
    }
}

impl Binlog {
    /// Opens the log of a directory, cuts off a write that a crash left unfinished, and makes the
    /// rest durable.
    ///
    /// Creates no file: an empty directory is an empty log. Reads every file once.
    ///
    /// # Errors
    /// [`BinlogError::Rot`], [`BinlogError::Foreign`] and [`BinlogError::NewerFormat`] leave every
    /// file as it was.
    pub(crate) fn open(config: BinlogConfig) -> Result<Binlog, BinlogError> {
        let recovered = recover::recover(&config)?;
        let active = recovered.active.map(|file| {
            let segment = recovered.segments.back().expect("the active file is the last segment");
            Active {
                file: Arc::new(file),
                path: file::path(&config.dir, segment.first),
                first: segment.first,
                bytes: segment.bytes,
            }
        });
        let handle = active.as_ref().map(|active| active.file.clone());
        let shared = Arc::new(LogShared::new(
            config.dir.clone(),
            recovered.segments,
            handle,
            recovered.last,
        ));
        Ok(Binlog { config, incarnation: Incarnation(0), active, shared })
    }

    /// Returns the last appended record; 0 when the log is empty and was given no other start.
    pub(crate) fn last_lsn(&self) -> Lsn {
        self.shared.appended_lsn()
    }

    /// Sets the incarnation in the headers of files created from now on.
    pub(crate) fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// Writes one encoded record after the last one. The record is durable after the next
    /// [`Self::sync`].
    ///
    /// # Errors
    /// Any failure poisons the log: how much of the record is in the file is not known.
    ///
    /// # Panics
    /// When `lsn` is not the one after [`Self::last_lsn`] or not the one in the record.
    pub(crate) fn append(&mut self, lsn: Lsn, record: &[u8]) -> Result<(), BinlogError> {
        self.shared.check_failed()?;
        assert_eq!(lsn, self.last_lsn().next(), "records are appended in order, without gaps");
        assert!(
            record.len() >= RECORD_HEADER_BYTES
                && positions_at(record).is_some_and(|(own, _)| own == lsn),
            "the bytes to append are not record {lsn}"
        );
        self.ready_active(lsn, record.len() as u64)?;
        let active = self.active.as_mut().expect("ready_active answers with an active file");
        if let Err(source) = active.file.write_all_at(record, active.bytes) {
            return Err(self.shared.poison(BinlogError::io("append to", &active.path)(source)));
        }
        let offset = active.bytes;
        active.bytes += record.len() as u64;
        self.shared.appended(lsn, offset, active.bytes);
        Ok(())
    }

    /// Makes everything appended durable and returns the LSN up to which it is.
    ///
    /// # Errors
    /// A failure poisons the log; it is not retried.
    pub(crate) fn sync(&mut self) -> Result<Lsn, BinlogError> {
        self.shared.sync_appended()
    }

    /// Returns the part that other threads may use.
    pub(crate) fn shared(&self) -> Arc<LogShared> {
        self.shared.clone()
    }

    /// Ensures that the active file can take a record of this length as record `lsn`.
    fn ready_active(&mut self, lsn: Lsn, record_bytes: u64) -> Result<(), BinlogError> {
        match &self.active {
            Some(active) if active.holds_records() => {
                if active.bytes + record_bytes <= self.config.file_bytes {
                    return Ok(());
                }
                self.shared.sync_appended()?;
            }
            Some(active) => {
                assert_eq!(active.first, lsn, "a file without records is named after the next one");
                return Ok(());
            }
            None => {}
        }
        let header = FileHeader {
            keyspace: self.config.keyspace,
            shard: self.config.shard,
            replica: self.config.replica,
            incarnation: self.incarnation,
            first_lsn: lsn,
        };
        let file =
            Arc::new(file::create(&self.config.dir, &header).map_err(|e| self.shared.poison(e))?);
        let bytes = FILE_HEADER_BYTES as u64;
        self.shared.rotated(Segment::empty(lsn), file.clone());
        self.active =
            Some(Active { file, path: file::path(&self.config.dir, lsn), first: lsn, bytes });
        Ok(())
    }

    /// Replaces the active file, so that a test sees real IO errors.
    #[cfg(test)]
    fn replace_active(&mut self, file: File) {
        let active = self.active.as_mut().expect("only for logs with records");
        active.file = Arc::new(file);
        self.shared.replace_active(active.file.clone());
    }
}
