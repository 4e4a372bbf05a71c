//! The target's side of a grow: loads the moving bands from the bucket, then follows the sources.
//!
//! **Invariants**
//! - All inputs of the arriving range are merged by the merge rule into files that do not overlap,
//!   and enter in ONE ingest, into a range recorded as arriving; the `ingest` record follows it. A
//!   restart that finds an arriving range without that record deletes the replica and begins
//!   again.
//! - A tail starts exactly at the LSN of the pinned manifest, and its cursor is durable with the records
//!   that it brought; repetition is harmless because of the merge.
//! - Bulk bytes come from the bucket; nodes stream only log records.

mod follow;
mod load;
mod rewrite;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Catalog;
use vasto_core::plan::Plan;
use vasto_core::record::BandRange;
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_shipping::bucket::{Bucket, BucketError};
use vasto_shipping::download::DownloadError;

use crate::engine::EngineError;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::ReplicaError;
use crate::ship::{ShipError, ShipHandle};

/// Why a target cannot be built; the plan is aborted when a retry does not help.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// A download failed.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The replica refused.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// Shipping the first manifest failed.
    #[error(transparent)]
    Ship(#[from] ShipError),
    /// The bucket does not hold the objects that the plan names.
    #[error("{0}")]
    Bad(String),
    /// A local file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: std::io::Error,
    },
    /// The plan is over.
    #[error("the build was cancelled")]
    Cancelled,
}

impl BuildError {
    /// Returns true when a retry can succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            BuildError::Bucket(_) | BuildError::Ship(_) => true,
            BuildError::Download(error) => matches!(error, DownloadError::Bucket(_)),
            BuildError::Engine(_)
            | BuildError::Replica(_)
            | BuildError::Bad(_)
            | BuildError::Io { .. }
            | BuildError::Cancelled => false,
        }
    }
}

/// The inputs of a build.
pub struct Build {
    /// The target.
    pub replica: Replica,
    /// Its shipper, for the first manifest.
    pub ship: ShipHandle,
    /// The bucket to read from.
    pub bucket: Bucket,
    /// The registry, for the addresses of the sources.
    pub registry: Arc<NodeRegistry>,
    /// Download directory on the data file system.
    pub tmp: PathBuf,
    /// The progress that is reported to the master.
    pub progress: Arc<Mutex<TargetProgress>>,
    /// Fires when the plan is over.
    pub cancel: CancellationToken,
}

/// Returns the progress of a target that has just begun.
pub fn fresh_progress(plan: &Plan) -> TargetProgress {
    TargetProgress::new(plan.id)
}

/// The layout that a grow creates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Shard count afterwards.
    pub shards: u32,
    /// The bands that move.
    pub moving: BandRange,
}

impl Shape {
    fn of(plan: &Plan) -> Result<Self, BuildError> {
        let shape = plan.growth().zip(plan.moving()).map(|((_, shards), moving)| Self { shards, moving });
        shape.ok_or_else(|| BuildError::Bad("the plan moves no bands".into()))
    }
}

impl Build {
    /// Runs until the plan is over: loads, ships the first manifest, follows the sources.
    pub async fn run(self, catalog: Arc<Catalog>, plan: Plan) -> Result<(), BuildError> {
        if self.replica.ranges().ingested != Some(plan.id) {
            load::load(&self, &catalog, &plan).await?;
        }
        // One target of a shard ships; the others take part without a manifest of their own.
        let ships = self.ship.positions.ships.load(Ordering::Acquire);
        if ships {
            self.ship.checkpoint(None).await?;
        }
        {
            let mut progress = self.progress.lock();
            progress.manifest_shipped = ships;
            progress.stage = TargetStage::Tailing;
            // Not caught up until the followers report so.
            progress.lag_lsns = u64::MAX;
        }
        self.registry.report.notify_one();
        follow::follow_all(&self, &plan).await
    }
}
