//! Errors of a build, and the consequence of each: another attempt, or the end of the plan.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use vasto_core::ids::{Lsn, ReplicaId, ShardId};
use vasto_failpoint::Injected;
use vasto_shipping::CatalogError;
use vasto_shipping::archive::{ArchiveError, ArchivedCheckpoint};
use vasto_shipping::bucket::BucketError;
use vasto_shipping::download::DownloadError;
use vasto_shipping::layout::{self, Owner};

use crate::engine::EngineError;
use crate::node_dir::DirError;
use crate::replica::command::ReplicaError;
use crate::ship::ShipError;

/// Why a replica cannot be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// A downloaded object is missing or damaged, or its file cannot be written.
    #[error(transparent)]
    Download(DownloadError),
    /// An archive in the bucket cannot be read.
    #[error(transparent)]
    Archive(ArchiveError),
    /// The catalog of the source cannot be read.
    #[error(transparent)]
    Catalog(CatalogError),
    /// The checkpoint does not match its manifest, or the manifest the plan.
    #[error("the checkpoint {key} cannot be used: {reason}")]
    Unusable {
        /// Key of the manifest.
        key: String,
        /// The mismatch.
        reason: String,
    },
    /// The bucket holds an archive of the shard, but none that reaches back far enough.
    #[error(
        "the bucket does not hold shard {shard} as of that time any more (see bucket.keep_for){}",
        oldest_us.map(|us| format!("; the oldest moment that can be restored is about {}", time_text(us))).unwrap_or_default()
    )]
    NotRetained {
        /// The shard.
        shard: ShardId,
        /// The earliest time that can be restored, microseconds.
        oldest_us: Option<u64>,
    },
    /// Records are missing, and no replica has shipped them elsewhere.
    #[error(
        "records of shard {shard} before {chunk} are missing from the bucket; run `vasto bucket fsck`, or restore to an earlier time with --at"
    )]
    Gap {
        /// The shard.
        shard: ShardId,
        /// Key of the first object after the gap.
        chunk: String,
    },
    /// The time lies in a part of the archive that was not shipped record by record.
    #[error(
        "shard {shard} cannot be restored to that very time: its log in the bucket ends at {}, and the next checkpoint holds everything until {}; restore to one of these with --at",
        time_text(*reached_us), time_text(*next_us)
    )]
    NotReached {
        /// The shard.
        shard: ShardId,
        /// The end of the record-by-record log, microseconds.
        reached_us: u64,
        /// The first time after the gap that can be restored, microseconds.
        next_us: u64,
    },
    /// The clock that assigned the commit times was ahead: whether the writes precede the time is
    /// unknown.
    #[error(
        "shard {shard} cannot be restored to that time: the clock of its replica {replica} was {ahead_s} s ahead when it took writes that it stamped with {}, and the bucket does not tell whether they came before or after; restore to {} or later, when the bucket had them, or leave out --at",
        time_text(*stamped_us), time_text(*from_us)
    )]
    ClockAhead {
        /// The shard.
        shard: ShardId,
        /// The replica whose clock was ahead.
        replica: ReplicaId,
        /// Lower bound of the clock's lead.
        ahead_s: u64,
        /// The commit time that it assigned, microseconds.
        stamped_us: u64,
        /// From this time on a restore includes the writes, microseconds.
        from_us: u64,
    },
    /// The log holds an ingest behind the checkpoint that the replica begins with: the rows that
    /// arrived in a resize are in no record.
    #[error(
        "shard {shard} cannot be made from what replica {replica} has shipped: rows arrived there in a resize at {}, and no readable checkpoint holds them; restore to a moment before that, or to a later one with another checkpoint, with --at; `vasto bucket fsck` names what is missing",
        time_text(*at_us)
    )]
    CrossesIngest {
        /// The shard.
        shard: ShardId,
        /// The replica that wrote the log.
        replica: ReplicaId,
        /// Commit time of the ingest, microseconds.
        at_us: u64,
    },
    /// The log of a source neither reaches back to the cursor nor is in the bucket.
    #[error("the tail of shard {shard} is lost: {reason}")]
    TailLost {
        /// The source's shard.
        shard: ShardId,
        /// Error text of the source.
        reason: String,
    },
    /// The plan, the state of the target and what a source has shipped or streamed do not fit
    /// together.
    #[error("{0}")]
    Mismatch(String),
    /// A local file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// A local document failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The replica under construction refused a request.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// Shipping the first manifest failed.
    #[error(transparent)]
    Ship(#[from] ShipError),
    /// The thread that worked on the disk ended early.
    #[error("the work on the disk ended early: {0}")]
    Worker(#[from] tokio::task::JoinError),
    /// A test lets the step fail.
    #[error(transparent)]
    Injected(#[from] Injected),
    /// The node is stopping, or the plan is over.
    #[error("the build was cancelled")]
    Cancelled,
}

impl From<DownloadError> for BuildError {
    fn from(error: DownloadError) -> Self {
        match error {
            DownloadError::Bucket(error) => BuildError::Bucket(error),
            DownloadError::Cancelled => BuildError::Cancelled,
            other => BuildError::Download(other),
        }
    }
}

impl From<ArchiveError> for BuildError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Bucket(error) => BuildError::Bucket(error),
            other => BuildError::Archive(other),
        }
    }
}

impl From<CatalogError> for BuildError {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Bucket(error) => BuildError::Bucket(error),
            other => BuildError::Catalog(other),
        }
    }
}

impl BuildError {
    /// Returns true when a retry can succeed.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, BuildError::Bucket(_) | BuildError::Ship(_) | BuildError::Injected(_))
    }

    /// Returns true when objects in the bucket are missing or damaged and nothing is wrong on this
    /// node.
    pub(crate) fn is_about_objects(&self) -> bool {
        match self {
            BuildError::Download(error) => {
                matches!(error, DownloadError::Missing { .. } | DownloadError::Corrupt { .. })
            }
            BuildError::Archive(_)
            | BuildError::Unusable { .. }
            | BuildError::NotRetained { .. }
            | BuildError::Gap { .. }
            | BuildError::Replica(ReplicaError::Gap { .. })
            | BuildError::NotReached { .. }
            | BuildError::CrossesIngest { .. }
            | BuildError::ClockAhead { .. } => true,
            BuildError::Bucket(_)
            | BuildError::Catalog(_)
            | BuildError::TailLost { .. }
            | BuildError::Mismatch(_)
            | BuildError::Io { .. }
            | BuildError::Dir(_)
            | BuildError::Engine(_)
            | BuildError::Replica(_)
            | BuildError::Ship(_)
            | BuildError::Worker(_)
            | BuildError::Injected(_)
            | BuildError::Cancelled => false,
        }
    }

    /// The error of a checkpoint that cannot become a database.
    pub(super) fn unusable(base: &ArchivedCheckpoint, reason: impl Display) -> Self {
        BuildError::Unusable { key: base.key.clone(), reason: reason.to_string() }
    }

    /// The error of an owner's log whose records before the chunk that begins with `first` are
    /// missing.
    pub(super) fn gap(owner: Owner, first: Lsn) -> Self {
        BuildError::Gap { shard: owner.shard, chunk: chunk_key(owner, first) }
    }

    /// The error of a listed chunk that is gone.
    pub(super) fn chunk_gone(owner: Owner, first: Lsn) -> Self {
        BuildError::Archive(ArchiveError::Missing(chunk_key(owner, first)))
    }
}

fn chunk_key(Owner { keyspace, shard, replica }: Owner, first: Lsn) -> String {
    layout::chunk(keyspace, shard, replica, first)
}

/// Wraps the error of an operation on a file.
pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> BuildError + '_ {
    move |source| BuildError::Io { path: path.to_owned(), source }
}

/// Formats a time, microseconds, as RFC 3339.
fn time_text(us: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_micros(us);
    humantime::format_rfc3339_micros(time).to_string()
}
