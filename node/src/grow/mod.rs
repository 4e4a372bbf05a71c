//! The target's side of a grow: load the moving bands from the bucket, then follow the sources.
//!
//! **Invariants**
//! - All inputs of the arriving range are merged by the merge rule into files that do not overlap,
//!   and enter in ONE ingest, into a range recorded as arriving; the `ingest` record follows it. A
//!   restart that finds an arriving range without that record throws the replica away and begins
//!   again.
//! - A tail starts exactly at the LSN of the pinned manifest, and its cursor is durable with what
//!   it brought; repetition is harmless because of the merge.
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
use vasto_core::plan::{Plan, TargetProgress, TargetStage};
use vasto_core::record::BandRange;
use vasto_shipping::bucket::{Bucket, BucketError};
use vasto_shipping::download::DownloadError;

use crate::core::NodeCore;
use crate::engine::EngineError;
use crate::replica::Replica;
use crate::replica::job::ReplicaError;
use crate::ship::{ShipError, ShipHandle};

/// Why a target cannot be built; the plan is aborted when it does not help to try again.
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
    /// What the bucket holds is not what the plan names.
    #[error("{0}")]
    Bad(String),
    /// A local file failed.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The plan is over.
    #[error("the build was cancelled")]
    Cancelled,
}

impl BuildError {
    /// True when trying again can help.
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

/// What a build works with.
pub struct Build {
    /// The target.
    pub replica: Replica,
    /// Its shipper, for the first manifest.
    pub ship: ShipHandle,
    /// Where the bytes come from.
    pub bucket: Bucket,
    /// For the addresses of the sources.
    pub core: Arc<NodeCore>,
    /// A place for downloads on the data file system.
    pub tmp: PathBuf,
    /// What the master is told.
    pub progress: Arc<Mutex<TargetProgress>>,
    /// The plan is over.
    pub cancel: CancellationToken,
}

/// Progress of a target that has just begun.
pub fn fresh_progress(plan: &Plan) -> TargetProgress {
    TargetProgress::new(plan.id)
}

/// What a grow changes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Shards afterwards.
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
        // Of the targets of a shard one ships; the others take part without a manifest of their own.
        let ships = self.ship.positions.ships.load(Ordering::Acquire);
        if ships {
            self.ship.checkpoint(None).await?;
        }
        {
            let mut progress = self.progress.lock();
            progress.manifest_shipped = ships;
            progress.stage = TargetStage::Tailing;
            // Not caught up until the followers say so.
            progress.lag_lsns = u64::MAX;
        }
        self.core.report.notify_one();
        follow::follow_all(&self, &plan).await
    }
}
