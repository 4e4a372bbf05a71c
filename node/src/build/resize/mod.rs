//! A resize: what the sources export, what the targets load, and the tails of the logs that they
//! follow.
//!
//! A target of a grow is a new replica; a target of a shrink is a replica that serves, and receives
//! more bands. Both take the same way.
//!
//! **Invariants**
//! - All inputs of the arriving range are merged by the merge rule into files that do not overlap,
//!   and enter in ONE ingest, into an empty range recorded as arriving; the `ingest` record follows
//!   it. A restart that finds an arriving range without that record deletes a new replica and
//!   begins again; a replica that serves clears the range first.
//! - A tail starts exactly at the LSN of the pinned manifest, and its cursor is durable with the
//!   records that it brought; repetition is harmless because of the merge.
//! - Bulk bytes come from the bucket; nodes stream only log records.

pub(crate) mod export;
mod follow;
mod load;
mod rewrite;
mod syncs;
pub(crate) mod tail;

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::plan::Plan;
use vasto_core::record::BandRange;
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_failpoint::{Injected, Point, points};
use vasto_shipping::bucket::Bucket;

use super::error::BuildError;
use super::reader::BucketReader;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::ship::ShipHandle;
use crate::target_trace::TargetTrace;

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
    /// The spans of the target.
    pub trace: TargetTrace,
}

/// What one target takes in a resize.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Shard count afterwards.
    pub shards: u32,
    /// The bands that leave the sources.
    pub bands: BandRange,
    /// The bands that they fill here.
    pub arriving: BandRange,
}

impl Shape {
    fn of(plan: &Plan) -> Result<Self, BuildError> {
        let bands = plan.leaving().zip(plan.arriving());
        let shape = plan.resize().zip(bands).map(|((_, shards), (bands, arriving))| Self {
            shards,
            bands,
            arriving,
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
            trace: &self.trace,
        }
    }

    async fn passes(&self, point: Point) -> Result<(), Injected> {
        vasto_failpoint::at(point, self.replica.keyspace, self.replica.id).await
    }

    /// Waits until the plan is not paused: what comes next makes the disk or the bucket busy.
    ///
    /// # Errors
    /// `Cancelled`.
    async fn unless_paused(&self) -> Result<(), BuildError> {
        let pass = self.cancel.run_until_cancelled(self.bucket.pass(0)).await;
        match self.cancel.is_cancelled() {
            true => Err(BuildError::Cancelled),
            false => pass.map(drop).ok_or(BuildError::Cancelled),
        }
    }

    /// Runs until the plan is over: loads, ships the first manifest, follows the sources.
    pub(crate) async fn run(self, plan: Plan) -> Result<(), BuildError> {
        if self.replica.ranges().filled_by() != Some(plan.id) {
            load::load(&self, &plan).await?;
        }
        // One target of a shard ships; the others take part without a manifest of their own.
        let ships = self.ship.ships();
        if ships {
            self.unless_paused().await?;
            let mut span = self.trace.begin("target checkpoint");
            let before = self.ship.uploaded();
            let checkpoint = self.ship.checkpoint(None).await;
            let after = self.ship.uploaded();
            span.count("vasto.bytes_to_bucket", after.0 - before.0);
            span.count("vasto.objects", after.1 - before.1);
            span.end(&checkpoint);
            checkpoint?;
        }
        {
            let mut progress = self.progress.lock();
            progress.manifest_shipped = ships;
            progress.last_error = None;
            progress.stage = TargetStage::Tailing;
            // Not caught up until the followers report so.
            progress.lag_lsns = u64::MAX;
        }
        self.registry.report.notify_one();
        self.passes(points::TARGET_MANIFEST_SHIPPED).await?;
        follow::follow_all(&self, &plan).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use vasto_core::Band;
    use vasto_core::hash::jump;
    use vasto_core::ids::{Epoch, PlanId};
    use vasto_core::plan::{PlanKind, Step};

    use super::*;

    fn plan(from: u32, to: u32) -> Plan {
        Plan {
            id: PlanId(1),
            kind: match from < to {
                true => PlanKind::Grow { from, to },
                false => PlanKind::Shrink { from, to },
            },
            from_epoch: Epoch(1),
            started_at_us: 0,
            step: Step::Tail,
            sources: Vec::new(),
            targets: Vec::new(),
            seals_undone: 0,
            floor: None,
            paused: false,
            max_rate: None,
            estimate: None,
        }
    }

    proptest! {
        /// Exactly the keys whose shard changes are in the bands that leave it, and in those that
        /// arrive at the other one; of a shrink, at a shard that had nothing in them.
        #[test]
        fn a_key_moves_between_the_bands_of_the_plan(hash: u64, from in 1u32..=64, to in 1u32..=64) {
            prop_assume!(from != to);
            let shape = Shape::of(&plan(from, to)).unwrap();
            let (before, after) = (jump(hash, from), jump(hash, to));
            let band = Band::of_next_jump(before.next);
            let leaves = shape.bands.contains(band) && (from < to || before.shard.0 >= to);
            prop_assert_eq!(leaves, before.shard != after.shard);
            if leaves {
                let arrives = Band::of_next_jump(after.next);
                prop_assert!(shape.arriving.contains(arrives), "{} {}", arrives, band);
                prop_assert!(from < to || !BandRange::from(Band::owned(from)).contains(arrives));
            }
        }
    }
}
