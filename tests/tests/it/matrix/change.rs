//! A structural change of a cell: its start, its plan, who is its source, target and follower, and
//! the check of what it alone leaves.

use anyhow::{Context, Result, ensure};
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::NodeId;
use vasto_core::plan::{Plan, Step as PlanStep};
use vasto_tests::{CatalogDir, Cluster, DEADLINE};

use super::cells::{Change, Victim};

/// The keyspace of all cells.
pub(super) const KEYSPACE: &str = "matrix";

/// A change that was started.
pub(super) struct Running {
    /// The catalog of the keyspace that it is a plan of.
    pub(super) catalog: CatalogDir,
    before: Catalog,
    /// Its first plan.
    plan: Plan,
    /// The replica that leaves, of a copy.
    leaves: Option<Placed>,
    /// The keyspace that it makes.
    pub(super) made: Option<String>,
}

impl Running {
    /// Starts a change; `number` tells its names from those of other cells.
    pub(super) async fn start(cluster: &Cluster, change: Change, number: u64) -> Result<Self> {
        let catalog = cluster.catalog(KEYSPACE).await?;
        let before = catalog.tip()?;
        let shards = before.spec.shards;
        let first = before.placement[0].replicas[0];
        let leaves = matches!(change, Change::Replace | Change::Drain).then_some(first);
        match change {
            Change::GrowOne => resize(cluster, shards + 1).await?,
            Change::GrowMany => resize(cluster, shards + 2).await?,
            Change::Shrink => resize(cluster, shards / 2).await?,
            Change::Replace => {
                let replica = first.replica.to_string();
                cluster.json(&["keyspace", "evict", KEYSPACE, "--replica", &replica]).await?;
            }
            Change::Drain => {
                cluster.json(&["node", "drain", &first.node.to_string(), "--no-wait"]).await?;
            }
            Change::Restore => return Self::restore(cluster, before, number).await,
        }
        let began = catalog.step(&before, PlanStep::Prepare, DEADLINE).await?;
        let plan = began.and_then(|began| began.plan).context("the change has no plan")?;
        Ok(Self { catalog, before, plan, leaves, made: None })
    }

    async fn restore(cluster: &Cluster, before: Catalog, number: u64) -> Result<Self> {
        let name = format!("made{number}");
        let args = ["keyspace", "restore", KEYSPACE, "--into", &name, "--no-wait"];
        cluster.json(&args).await?;
        let catalog = cluster.catalog(&name).await?;
        let plan = catalog.tip()?.plan.context("the restore is over already")?;
        Ok(Self { catalog, before, plan, leaves: None, made: Some(name) })
    }

    /// Returns the node that a victim is; `None` for one that is no node.
    pub(super) fn node(&self, victim: Victim) -> Result<Option<NodeId>> {
        let source = self.plan.sources.first().map(|source| source.node);
        let node = match victim {
            Victim::Master | Victim::Client | Victim::Bucket => return Ok(None),
            Victim::Source => source.context("no source")?,
            Victim::Target => {
                let elsewhere = self.plan.targets.iter().find(|one| Some(one.node) != source);
                elsewhere.or(self.plan.targets.first()).context("no target")?.node
            }
            Victim::Follower => match self.leaves {
                Some(leaves) => leaves.node,
                None => self.follower().context("no follower")?,
            },
        };
        Ok(Some(node))
    }

    fn follower(&self) -> Option<NodeId> {
        let source = self.plan.sources.first()?;
        let shard = self.before.shard(source.shard)?;
        let follows = |one: &&Placed| one.replica != source.replica;
        shard.replicas.iter().find(follows).map(|one| one.node)
    }

    /// Returns how it has ended: nothing is half done.
    pub(super) fn outcome(&self, change: Change) -> Result<String> {
        let tip = self.catalog.tip()?;
        if change.is_resize() {
            let (from, to) = self.plan.resize().context("no resize")?;
            let shards = tip.spec.shards;
            ensure!(shards == from || shards == to, "{from} -> {to} has ended with {shards}");
            ensure!(tip.placement.len() == shards as usize, "{tip:?}");
        }
        let mut reports = tip.operations.iter().rev();
        let report = reports.find(|report| {
            tip.keyspace != self.before.keyspace || {
                report.id == vasto_core::operation::operation_id(tip.keyspace, self.plan.id)
            }
        });
        Ok(report.map_or("ended".to_owned(), |report| format!("{:?}", report.outcome)))
    }
}

async fn resize(cluster: &Cluster, to: u32) -> Result<()> {
    let to = to.to_string();
    cluster.json(&["keyspace", "resize", KEYSPACE, "--shards", &to, "--no-wait"]).await.map(drop)
}
