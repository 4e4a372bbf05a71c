//! A running resize, followed in the catalog itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vasto_core::catalog::Catalog;
use vasto_core::operation::{OperationOutcome, OperationReport};
use vasto_core::plan::{Plan, Step};
use vasto_testkit::{DEADLINE, until};

use crate::catalog::CatalogDir;
use crate::cluster::Cluster;

/// Time within which a resize ends, also when processes are killed and started again meanwhile.
const ENDS_WITHIN: Duration = Duration::from_secs(90);

/// A resize that was started.
#[derive(Debug)]
pub struct Resizing {
    /// The id of the operation.
    pub id: String,
    /// The last version before it.
    pub before: Catalog,
    /// The first version of its plan.
    pub began: Catalog,
    /// The plan in that version.
    pub plan: Plan,
    catalog: CatalogDir,
    to: u32,
}

impl Resizing {
    /// Starts a resize and returns once its first version is there.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn start(cluster: &Cluster, name: &str, to: u32) -> Result<Self> {
        Self::start_with(cluster, name, to, &[]).await
    }

    /// Starts a resize as [`Self::start`] does, with more options.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn start_with(cluster: &Cluster, name: &str, to: u32, more: &[&str]) -> Result<Self> {
        let catalog = cluster.catalog(name).await?;
        let before = catalog.tip()?;
        let shards = to.to_string();
        let asked = ["keyspace", "resize", name, "--shards", &shards, "--no-wait"];
        let started = cluster
            .json(&[&asked[..], more].concat())
            .await
            .with_context(|| format!("{name}: {} -> {to}", before.spec.shards))?;
        let id = started["id"].as_str().with_context(|| format!("no id: {started}"))?.to_owned();
        let began = catalog.step(&before, Step::Prepare, DEADLINE).await?.context("no plan")?;
        let plan = began.plan.clone().context("no plan")?;
        Ok(Self { id, before, began, plan, catalog, to })
    }

    /// Returns the last version of the catalog.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tip(&self) -> Result<Catalog> {
        self.catalog.tip()
    }

    /// Returns the step in which the plan is now; `None` when it has ended.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn step(&self) -> Result<Option<Step>> {
        let plan = self.tip()?.plan.filter(|plan| plan.id == self.plan.id);
        Ok(plan.map(|plan| plan.step))
    }

    /// Waits for the first version in this step.
    ///
    /// # Errors
    /// When the plan ends before, or too much time passes.
    pub async fn reaches(&self, step: Step) -> Result<Catalog> {
        if step == Step::Prepare {
            return Ok(self.began.clone());
        }
        let reached = self.catalog.step(&self.began, step, DEADLINE).await?;
        reached.with_context(|| format!("{} was never in {step:?}: {:?}", self.id, self.tip()))
    }

    /// Waits until the sources have exported; returns the keys of their exports.
    ///
    /// # Errors
    /// When a source has none.
    pub async fn exports(&self) -> Result<Vec<String>> {
        let plan = self.reaches(Step::Tail).await?.plan.context("no plan")?;
        let exports: Option<Vec<String>> =
            plan.sources.iter().map(|source| source.export.clone()).collect();
        exports.with_context(|| format!("a source has no export: {:?}", plan.sources))
    }

    /// Waits for the end; returns the report. Either everything has changed or nothing.
    ///
    /// # Errors
    /// When it does not end in time, or has ended halfway.
    pub async fn ended(&self) -> Result<OperationReport> {
        let what = format!("the end of {}", self.id);
        let ended = until(&what, ENDS_WITHIN, async || {
            let tip = self.tip().ok()?;
            let report = tip.operations.iter().find(|report| report.id == self.id)?.clone();
            Some((tip, report))
        });
        let (tip, report) =
            ended.await.with_context(|| format!("the plan is {:?}", self.tip().map(|t| t.plan)))?;
        let done = report.outcome == OperationOutcome::Done;
        let shards = if done { self.to } else { self.before.spec.shards };
        ensure!(
            tip.spec.shards == shards && tip.placement.len() == shards as usize,
            "{} shards in {} placements, yet {report:?}",
            tip.spec.shards,
            tip.placement.len()
        );
        Ok(report)
    }

    /// Asks for the resize to be cancelled and waits for its end; returns whether it was. The
    /// request may lose the race against the commit, and has failed then.
    ///
    /// # Errors
    /// When the outcome is not what the request was told.
    pub async fn cancelled(&self, cluster: &Cluster) -> Result<bool> {
        let ran = cluster.vasto(&["operation", "cancel", &self.id]).await?;
        let report = self.ended().await?;
        let aborted = report.outcome == OperationOutcome::Aborted;
        ensure!((ran.code == 0) == aborted, "{ran:?}, yet {report:?}");
        Ok(aborted)
    }

    /// Waits for the end as [`Self::ended`] does, and checks that it took effect.
    ///
    /// # Errors
    /// The reason when it was aborted.
    pub async fn done(&self) -> Result<OperationReport> {
        let report = self.ended().await?;
        ensure!(report.outcome == OperationOutcome::Done, "it was undone: {report:?}");
        Ok(report)
    }
}
