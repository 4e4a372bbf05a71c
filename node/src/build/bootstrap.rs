//! Parameters of a bootstrap from the bucket: its inputs, the identity that the replica takes, and
//! how the log is applied.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, ReplicaId};
use vasto_core::record::BandRange;
use vasto_core::report::TargetProgress;
use vasto_shipping::bucket::Bucket;
use vasto_shipping::chunk::Chunk;

use super::chunks::ChunkReader;
use super::error::BuildError;
use super::reader::BucketReader;
use super::resized::Resized;
use crate::engine::{EngineError, EngineShared};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::target_trace::TargetTrace;

/// The inputs of a bootstrap.
pub(crate) struct Bootstrap {
    /// The bucket to read from.
    pub bucket: Bucket,
    /// Shared engine state, to open the database.
    pub engines: EngineShared,
    /// The new replica's directory.
    pub dir: PathBuf,
    /// Download directory on the same file system; the same after a restart.
    pub side: PathBuf,
    /// The progress that is reported to the master.
    pub progress: Arc<Mutex<TargetProgress>>,
    /// The registry that sends the report.
    pub registry: Arc<NodeRegistry>,
    /// Cancels the bootstrap.
    pub cancel: CancellationToken,
    /// The spans of the target.
    pub trace: TargetTrace,
    /// The resizes whose sources may have shipped what the archives of the shard lack.
    pub resized: Vec<Resized>,
}

impl Bootstrap {
    /// Reads the next listed chunk of a log, once the plan is not paused.
    ///
    /// # Errors
    /// `Cancelled`; those of the read.
    pub(super) async fn next_listed(
        &self,
        log: &mut ChunkReader,
    ) -> Result<Option<Chunk>, BuildError> {
        let pass = self.cancel.run_until_cancelled(self.bucket.pass(0)).await;
        pass.ok_or(BuildError::Cancelled)?;
        log.next_listed(&self.reader()).await
    }

    pub(super) fn reader(&self) -> BucketReader<'_> {
        BucketReader {
            bucket: &self.bucket,
            progress: &self.progress,
            registry: &self.registry,
            cancel: &self.cancel,
            trace: &self.trace,
        }
    }
}

/// The identity that the replica under construction takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adoption {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The replica.
    pub replica: ReplicaId,
    /// The bands that it owns.
    pub owned: BandRange,
    /// The catalog version that assigns them.
    pub version: CatalogVersion,
    /// The epoch of that version.
    pub epoch: Epoch,
}

/// How the log after the checkpoint is applied.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Log {
    /// The replica joins its shard: it keeps every record as it is, with origin and own sequence.
    Replicate,
    /// The replica begins a new history: it takes the entries that belong to its shard.
    Fork {
        /// Shards of the keyspace.
        shards: u32,
        /// Upper bound of the commit time, microseconds; later records are skipped.
        until_us: Option<u64>,
    },
}

impl Log {
    /// Returns the id that keys the cursor of an archive.
    pub(super) fn cursor_of(self, replica: ReplicaId) -> ReplicaId {
        match self {
            Log::Replicate => replica,
            Log::Fork { .. } => fork_cursor(replica),
        }
    }
}

/// Returns the id that keys the cursor of another keyspace's archive: its replica ids mean other
/// replicas here.
pub(super) fn fork_cursor(replica: ReplicaId) -> ReplicaId {
    ReplicaId(replica.0 | 1 << 63)
}

/// Returns the LSN up to which a replica has taken a log, by the id that keys its cursor.
pub(super) fn tail_cursor(replica: &Replica, id: ReplicaId) -> Result<Option<Lsn>, EngineError> {
    Ok(replica.tail_cursors()?.into_iter().find(|(source, _)| *source == id).map(|(_, lsn)| lsn))
}
