//! A grow: the target loads the moving bands from the bucket, then follows the logs of the sources.
//!
//! **Invariants**
//! - All inputs of the arriving range are merged by the merge rule into files that do not overlap,
//!   and enter in ONE ingest, into a range recorded as arriving; the `ingest` record follows it. A
//!   restart that finds an arriving range without that record deletes the replica and begins
//!   again.
//! - A tail starts exactly at the LSN of the pinned manifest, and its cursor is durable with the
//!   records that it brought; repetition is harmless because of the merge.
//! - Bulk bytes come from the bucket; nodes stream only log records.

mod follow;
mod load;
mod rewrite;
pub(crate) mod tail;

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::plan::Plan;
use vasto_core::record::BandRange;
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_core::{Band, ShardId};
use vasto_shipping::bucket::Bucket;

use super::error::BuildError;
use super::reader::BucketReader;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::ship::ShipHandle;

/// The inputs of a build.
pub(crate) struct Build {
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

/// What one target takes in a grow.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Shard count before.
    pub shards_before: u32,
    /// Shard count afterwards.
    pub shards: u32,
    /// The bands of the sources that may hold keys of the target's shard: of those that move, the
    /// ones whose keys leave for this shard or an earlier one.
    pub bands: BandRange,
}

impl Shape {
    fn of(plan: &Plan, shard: ShardId) -> Result<Self, BuildError> {
        let shape = plan.growth().zip(plan.moving()).map(|((shards_before, shards), moving)| {
            let last = Band::of_next_jump(u64::from(shard.0)).min(moving.last);
            Self { shards_before, shards, bands: BandRange { last, ..moving } }
        });
        shape.ok_or_else(|| BuildError::Mismatch("the plan moves no bands".into()))
    }
}

impl Build {
    fn reader(&self) -> BucketReader<'_> {
        BucketReader {
            bucket: &self.bucket,
            progress: &self.progress,
            registry: &self.registry,
            cancel: &self.cancel,
        }
    }

    /// Runs until the plan is over: loads, ships the first manifest, follows the sources.
    pub(crate) async fn run(self, plan: Plan) -> Result<(), BuildError> {
        if self.replica.ranges().ingested != Some(plan.id) {
            load::load(&self, &plan).await?;
        }
        // One target of a shard ships; the others take part without a manifest of their own.
        let ships = self.ship.ships();
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use vasto_core::hash::{jump, next_jump_from};
    use vasto_core::ids::{Epoch, NodeId, PlanId, ReplicaId};
    use vasto_core::plan::{PlanKind, Step, Target};

    use super::*;

    fn plan(from: u32, to: u32) -> Plan {
        let target = |shard| Target {
            shard: ShardId(shard),
            replica: ReplicaId(u64::from(shard) + 1),
            node: NodeId(1),
        };
        Plan {
            id: PlanId(1),
            kind: PlanKind::Grow { from, to },
            from_epoch: Epoch(1),
            started_at_us: 0,
            step: Step::Tail,
            sources: Vec::new(),
            targets: (from..to).map(target).collect(),
            seals_undone: 0,
        }
    }

    proptest! {
        /// Each key that leaves its shard is in the bands that exactly one target reads it from and
        /// keeps.
        #[test]
        fn each_moving_key_is_taken_by_one_target(hash: u64, from in 1u32..64, more in 1u32..63) {
            let to = (from + more).min(64);
            let source = jump(hash, from).shard;
            let band = Band::in_shard(hash, source).unwrap();
            let plan = plan(from, to);
            let home = jump(hash, to).shard;
            prop_assert_eq!(plan.moving().unwrap().contains(band), home != source);
            let takes = |target: &&Target| {
                let shape = Shape::of(&plan, target.shard).unwrap();
                shape.bands.contains(band) && target.shard == home
            };
            let taken: Vec<_> = plan.targets.iter().filter(takes).collect();
            prop_assert_eq!(taken.len(), usize::from(home != source), "{} {}", band, home);
            prop_assert!(next_jump_from(hash, source).is_some());
        }
    }
}
