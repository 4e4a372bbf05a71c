//! Progress of a plan by the reports of its sources and targets, and the decision that follows.
//!
//! **Invariant:** progress counts only when it names the running plan.

use crate::catalog::{Catalog, Placed};
use crate::control::plan::{Plan, Target};
use crate::control::report::{Reports, SourceProgress, TargetProgress};
use crate::ids::{ReplicaId, ShardId};

/// A running plan as its rules see it.
#[derive(Clone, Copy)]
pub(super) struct Running<'a> {
    /// The last version.
    pub(super) catalog: &'a Catalog,
    /// The plan in it.
    pub(super) plan: &'a Plan,
    /// Newest reports of the keyspace's replicas.
    pub(super) reports: &'a Reports,
    /// When the nodes were told of the last version, microseconds since 1970.
    pub(super) shown_us: u64,
    /// Microseconds since 1970.
    pub(super) now_us: u64,
    /// Nonce of the next version.
    pub(super) nonce: u64,
}

/// Decision of the driver.
#[derive(Debug, Clone, PartialEq)]
pub enum Advance {
    /// There is nothing to do.
    Idle,
    /// Nothing can be decided yet; the text says what is missing.
    Wait(String),
    /// This version comes next.
    Write(Box<Catalog>),
}

/// Returns true when the plan failed because of this target.
pub(super) fn failed_at(plan: &Plan, target: &Target, reports: &Reports) -> bool {
    let Some(report) = reports.get(&target.replica) else { return false };
    report.has_failed()
        || target_progress(plan, target.replica, reports)
            .is_some_and(|progress| progress.failed.is_some())
}

/// Returns the replicas of the sources' shards, placed or retired by this very plan, that are not
/// sources themselves: they seal too.
pub(super) fn others_of_sources(catalog: &Catalog, plan: &Plan) -> Vec<(ShardId, Placed)> {
    if plan.leaving().is_none() {
        return Vec::new();
    }
    let is_source = |id: ReplicaId| plan.sources.iter().any(|source| source.replica == id);
    let shards = catalog
        .placement
        .iter()
        .filter(|shard| plan.sources.iter().any(|source| source.shard == shard.shard));
    let retired =
        catalog.retired.iter().filter(|retired| retired.plan == plan.id).map(|retired| {
            (retired.shard, Placed { replica: retired.replica, node: retired.node })
        });
    shards
        .flat_map(|shard| shard.replicas.iter().map(|member| (shard.shard, *member)))
        .chain(retired)
        .filter(|(_, member)| !is_source(member.replica))
        .collect()
}

/// Returns the one target of each shard that ships: the first.
pub(super) fn shipping_targets(plan: &Plan) -> impl Iterator<Item = &Target> {
    plan.targets.iter().enumerate().filter_map(|(index, target)| {
        let first = plan.targets.iter().position(|other| other.shard == target.shard);
        (first == Some(index)).then_some(target)
    })
}

pub(super) fn source_progress<'a>(
    plan: &Plan,
    replica: ReplicaId,
    reports: &'a Reports,
) -> Option<&'a SourceProgress> {
    reports.get(&replica)?.source.as_ref().filter(|progress| progress.plan == plan.id)
}

pub(super) fn target_progress<'a>(
    plan: &Plan,
    replica: ReplicaId,
    reports: &'a Reports,
) -> Option<&'a TargetProgress> {
    reports.get(&replica)?.target.as_ref().filter(|progress| progress.plan == plan.id)
}
