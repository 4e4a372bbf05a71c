//! A structural change of a cell: its start, its plan, the step that it is at, who is its source,
//! target and follower, and the check of what it alone leaves.

use anyhow::{Context, Result, ensure};
use vasto_core::catalog::{Catalog, Placed, ReplicaMove};
use vasto_core::ids::{NodeId, ReplicaId};
use vasto_core::operation::{OperationOutcome, operation_id};
use vasto_core::plan::{Plan, Step as PlanStep};
use vasto_tests::{CatalogDir, Cluster, DEADLINE, until};

use super::cells::{Change, Step, Victim};

/// The keyspace of all cells.
pub(super) const KEYSPACE: &str = "matrix";

/// The outcome of a change that took effect, and nothing of it failed on the way.
pub(super) const DONE: &str = "Done";

/// A change that was started.
pub(super) struct Running {
    /// The catalog of the keyspace that it is a plan of.
    pub(super) catalog: CatalogDir,
    before: Catalog,
    /// Its first plan.
    plan: Plan,
    /// The replica that leaves, of a copy or a move.
    leaves: Option<Placed>,
    /// The keyspace that it makes.
    pub(super) made: Option<String>,
    /// The id of the rebalance.
    rebalance: Option<String>,
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
            Change::Rebalance => return Self::rebalance(cluster, catalog, before).await,
            Change::Restore => return Self::restore(cluster, before, number).await,
        }
        let began = catalog.step(&before, PlanStep::Prepare, DEADLINE).await?;
        let plan = began.and_then(|began| began.plan).context("the change has no plan")?;
        Ok(Self { catalog, before, plan, leaves, made: None, rebalance: None })
    }

    async fn rebalance(cluster: &Cluster, catalog: CatalogDir, before: Catalog) -> Result<Self> {
        let begun = cluster.json(&["cluster", "rebalance", "--no-wait"]).await?;
        ensure!(begun["state"] == "running", "no replica moves: {begun}");
        let id = begun["id"].as_str().context("no id")?.to_owned();
        let first = until("a replica to be on its way", DEADLINE, async || {
            catalog.tip().ok()?.moves.first().cloned()
        });
        let first = first.await?;
        let leaves = placed(&before, first.replaces);
        let plan = first.plan;
        Ok(Self { catalog, before, plan, leaves, made: None, rebalance: Some(id) })
    }

    async fn restore(cluster: &Cluster, before: Catalog, number: u64) -> Result<Self> {
        let name = format!("made{number}");
        let args = ["keyspace", "restore", KEYSPACE, "--into", &name, "--no-wait"];
        cluster.json(&args).await?;
        let catalog = cluster.catalog(&name).await?;
        let plan = catalog.tip()?.plan.context("the restore is over already")?;
        Ok(Self { catalog, before, plan, leaves: None, made: Some(name), rebalance: None })
    }

    /// Turns to the move that is held on this node: others are on their way beside it.
    pub(super) fn turn_to(&mut self, held: NodeId) -> Result<()> {
        let tip = self.catalog.tip()?;
        let is_there = |moving: &&ReplicaMove| moving.plan.nodes().any(|node| node == held);
        if let Some(moving) = tip.moves.iter().find(is_there) {
            self.leaves = placed(&self.before, moving.replaces).or(self.leaves);
            self.plan = moving.plan.clone();
        }
        Ok(())
    }

    /// Checks that the change is at this step, at whose failpoint it is held: neither before it nor
    /// past it.
    pub(super) fn is_at(&self, change: Change, step: Step) -> Result<()> {
        use Change::{Drain, GrowMany, GrowOne, Rebalance, Replace};
        let tip = self.catalog.tip()?;
        let is_its_own = |plan: &&Plan| change == Rebalance || plan.id == self.plan.id;
        let plans: Vec<&Plan> = tip.plans().filter(is_its_own).collect();
        let one_is_in = |step: PlanStep| plans.iter().any(|plan| plan.step == step);
        let is_at = match (change, step) {
            (_, Step::Prepare | Step::Export) => one_is_in(PlanStep::Prepare),
            (_, Step::Load) => one_is_in(PlanStep::Tail),
            // A target that is nearly there lets the sources seal.
            (_, Step::Tail) => one_is_in(PlanStep::Tail) || one_is_in(PlanStep::Sealing),
            // On a busy machine the time of the seal may be over.
            (_, Step::Seal) => {
                one_is_in(PlanStep::Sealing) || plans.iter().any(|plan| plan.seals_undone > 0)
            }
            // The commit is decided, and not written.
            (Replace | Drain | Rebalance, Step::Commit) => one_is_in(PlanStep::Tail),
            (_, Step::Commit) => one_is_in(PlanStep::Committed),
            (GrowOne | GrowMany, Step::CleanUp) => {
                plans.is_empty() && tip.quarantines.iter().any(|quarantine| quarantine.dropping)
            }
            // A replica goes only under a version that names it.
            (_, Step::CleanUp) => {
                let mut before = self.before.placement.iter().flat_map(|shard| &shard.replicas);
                before.any(|member| tip.is_removed(member.replica))
            }
        };
        ensure!(is_at, "{change:?} is held at {step:?}, and the catalog is elsewhere: {tip:?}");
        Ok(())
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

    /// Returns what of the change still runs beside the plans of the catalog.
    pub(super) async fn runs_on(&self, cluster: &Cluster) -> Result<Option<String>> {
        let Some(id) = &self.rebalance else { return Ok(None) };
        let shown = cluster.json(&["operation", "show", id]).await?;
        Ok((shown["state"] == "running").then(|| shown.to_string()))
    }

    /// Checks, once nothing runs any more and before anything else changes, that the nodes have
    /// what the change is to leave on them.
    pub(super) fn is_carried_out(&self, change: Change) -> Result<()> {
        let tip = self.catalog.tip()?;
        match (change, self.leaves) {
            (Change::Replace, Some(leaves)) => {
                ensure!(!tip.is_placed(leaves.replica), "the evicted replica is back: {tip:?}");
            }
            (Change::Drain, Some(leaves)) => {
                let left = tip.members_on(leaves.node);
                ensure!(left.is_empty(), "{left:?} are left on the node that was drained");
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns how it has ended: nothing is half done.
    pub(super) async fn outcome(&self, cluster: &Cluster, change: Change) -> Result<String> {
        let tip = self.catalog.tip()?;
        if let Some(id) = &self.rebalance {
            let ended = cluster.json(&["operation", "show", id]).await?;
            let moved = ended["replicas_moved"].as_u64().context("no replicas_moved")?;
            let failed = ended["moves_failed"].as_u64().context("no moves_failed")?;
            ensure!(ended["state"] == "done" && moved + failed > 0, "{ended}");
            return Ok(match failed {
                0 => DONE.to_owned(),
                _ => format!("Done, {moved} replicas moved and {failed} moves failed"),
            });
        }
        if change.is_resize() {
            let (from, to) = self.plan.resize().context("no resize")?;
            let shards = tip.spec.shards;
            ensure!(shards == from || shards == to, "{from} -> {to} has ended with {shards}");
            ensure!(tip.placement.len() == shards as usize, "{tip:?}");
        }
        let mut reports = tip.operations.iter().rev();
        let report = reports.find(|report| {
            tip.keyspace != self.before.keyspace
                || report.id == operation_id(tip.keyspace, self.plan.id)
        });
        let report = report.with_context(|| format!("its end is in no report: {tip:?}"))?;
        if let (true, Some((from, to))) = (change.is_resize(), self.plan.resize()) {
            let wanted = if report.outcome == OperationOutcome::Done { to } else { from };
            ensure!(tip.spec.shards == wanted, "{from} -> {to}: {tip:?}, yet {report:?}");
        }
        Ok(format!("{:?}", report.outcome))
    }
}

/// Returns the replica of this id, with its node, while it is placed.
fn placed(catalog: &Catalog, replica: ReplicaId) -> Option<Placed> {
    let mut all = catalog.placement.iter().flat_map(|shard| &shard.replicas);
    all.find(|member| member.replica == replica).copied()
}

async fn resize(cluster: &Cluster, to: u32) -> Result<()> {
    let to = to.to_string();
    cluster.json(&["keyspace", "resize", KEYSPACE, "--shards", &to, "--no-wait"]).await.map(drop)
}
