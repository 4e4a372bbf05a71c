//! A running operation on a keyspace: its plan, with the progress that the targets have reported.

use serde::Serialize;
use vasto_core::catalog::Catalog;
use vasto_core::estimate::Estimate;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::operation::{OperationKind, operation_id};
use vasto_core::plan::{Plan, Step, Target};
use vasto_core::report::{TargetProgress, TargetStage};

use crate::state::Keyspace;

/// A running operation.
#[derive(Serialize)]
pub(crate) struct RunningDoc {
    pub(super) id: String,
    kind: OperationKind,
    keyspace: String,
    from: u32,
    to: u32,
    state: &'static str,
    step: Step,
    waiting_for: Option<String>,
    pub(super) bytes_done: u64,
    pub(super) bytes_total: u64,
    keys_moved: u64,
    pub(super) started_at_us: u64,
    targets: Vec<TargetDoc>,
    /// What was estimated before it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<Estimate>,
}

#[derive(Serialize)]
struct TargetDoc {
    shard: ShardId,
    replica_id: ReplicaId,
    node_id: NodeId,
    stage: Option<TargetStage>,
}

/// Returns the running operation of a keyspace.
pub(crate) fn running(keyspace: &Keyspace) -> Option<RunningDoc> {
    let mut doc = running_of(&keyspace.catalog)?;
    doc.waiting_for = keyspace.waiting_for.clone();
    let plan = keyspace.catalog.plan.as_ref()?;
    for (target, described) in plan.targets.iter().zip(&mut doc.targets) {
        if let Some(progress) = progress_of(keyspace, plan, target.replica) {
            described.stage = Some(progress.stage);
            doc.bytes_done += progress.bytes_done;
            doc.bytes_total += progress.bytes_total;
            doc.keys_moved += progress.keys_moved;
        }
    }
    Some(doc)
}

/// Returns the running operation from a catalog alone, before anything is reported.
pub(crate) fn running_of(catalog: &Catalog) -> Option<RunningDoc> {
    let plan = catalog.plan.as_ref()?;
    let (from, to) = plan.resize().unwrap_or((catalog.spec.shards, catalog.spec.shards));
    let target = |target: &Target| TargetDoc {
        shard: target.shard,
        replica_id: target.replica,
        node_id: target.node,
        stage: None,
    };
    Some(RunningDoc {
        id: operation_id(catalog.keyspace, plan.id),
        kind: plan.kind.into(),
        keyspace: catalog.name.clone(),
        from,
        to,
        state: "running",
        step: plan.step,
        waiting_for: None,
        bytes_done: 0,
        bytes_total: 0,
        keys_moved: 0,
        started_at_us: plan.started_at_us,
        targets: plan.targets.iter().map(target).collect(),
        estimate: plan.estimate.clone(),
    })
}

fn progress_of<'a>(
    keyspace: &'a Keyspace,
    plan: &Plan,
    replica: ReplicaId,
) -> Option<&'a TargetProgress> {
    keyspace.reports.get(&replica)?.target.as_ref().filter(|progress| progress.plan == plan.id)
}
