//! A resize of a round: asked for again and again until the keyspace has the shard count.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vasto_tests::{CatalogDir, Cluster, Numbers, Ran};

/// The greatest shard count of a walk.
pub(super) const SHARDS: u64 = 16;
/// Time between two requests for the same resize.
const ASK_EVERY: Duration = Duration::from_millis(300);

/// Returns another shard count than this one.
pub(super) fn other_than(from: u32, numbers: &mut Numbers) -> u32 {
    let drawn = 1 + numbers.below(SHARDS - 1) as u32;
    if drawn >= from { drawn + 1 } else { drawn }
}

/// A resize of a round.
pub(super) struct Goal {
    pub(super) name: &'static str,
    catalog: CatalogDir,
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) asked: u64,
    asked_at: Option<Instant>,
    /// Why it was refused the last time.
    refused: Option<Ran>,
}

impl Goal {
    /// Chooses the next shard count of a keyspace.
    pub(super) async fn of(
        cluster: &Cluster,
        name: &'static str,
        numbers: &mut Numbers,
    ) -> Result<Self> {
        let catalog = cluster.catalog(name).await?;
        let from = catalog.tip()?.spec.shards;
        let to = other_than(from, numbers);
        Ok(Self { name, catalog, from, to, asked: 0, asked_at: None, refused: None })
    }

    /// Returns true when the keyspace has the shard count; asks for it when nothing is under way.
    pub(super) async fn look(&mut self, cluster: &Cluster) -> Result<bool> {
        let tip = self.catalog.tip()?;
        if tip.plan.is_some() {
            return Ok(false);
        }
        if tip.spec.shards == self.to {
            return Ok(true);
        }
        ensure!(tip.spec.shards == self.from, "half a resize: {tip:?}");
        if self.asked_at.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
            let shards = self.to.to_string();
            let ask = ["keyspace", "resize", self.name, "--shards", &shards, "--no-wait"];
            let ran = cluster.vasto(&ask).await?;
            self.asked += 1;
            self.asked_at = Some(Instant::now());
            self.refused = (ran.code != 0).then_some(ran);
        }
        Ok(false)
    }

    /// Describes a resize that does not end.
    pub(super) fn says(&self) -> String {
        let plan = self.catalog.tip().map(|tip| tip.plan);
        let Self { name, from, to, asked, refused, .. } = self;
        format!("{name} {from} -> {to}, asked {asked} times, {refused:?}, the plan is {plan:?}")
    }
}
