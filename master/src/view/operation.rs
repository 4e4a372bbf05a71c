//! Operations of every kind: `operation list` and `operation show`.

use std::cmp::Reverse;

use serde::Serialize;
use vasto_core::operation::{OperationOutcome, OperationReport};

use super::drain::{DrainDoc, drains, is_drain};
use super::plan::{RunningDoc, moving, running};
use super::rebalance::{RebalanceDoc, last};
use crate::state::{ClusterState, Keyspace};

/// A finished operation.
#[derive(Serialize)]
pub(crate) struct FinishedDoc {
    #[serde(flatten)]
    report: OperationReport,
    state: &'static str,
}

/// Any operation.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum OperationDoc {
    Running(RunningDoc),
    Finished(FinishedDoc),
    Drain(DrainDoc),
    Rebalance(RebalanceDoc),
}

/// Returns all operations, newest first. A drain of a node, and a rebalance, is a
/// single one, across all keyspaces.
pub(crate) fn all_operations(state: &ClusterState, now_us: u64) -> Vec<OperationDoc> {
    let of_keyspaces =
        state.keyspaces.values().flat_map(operations).filter(|operation| !is_drain(operation.id()));
    let of_nodes = drains(state, now_us).into_iter().map(OperationDoc::Drain);
    let of_cluster = last(state, now_us).map(OperationDoc::Rebalance);
    let mut all: Vec<OperationDoc> = of_keyspaces.chain(of_nodes).chain(of_cluster).collect();
    all.sort_by_key(|operation| Reverse(operation.started_at_us()));
    all
}

/// Returns running and finished operations of a keyspace, newest first.
pub(crate) fn operations(keyspace: &Keyspace) -> Vec<OperationDoc> {
    let finished = keyspace
        .catalog
        .operations
        .iter()
        .rev()
        .map(|report| OperationDoc::Finished(finished(report)));
    let running = running(keyspace).into_iter().chain(moving(keyspace));
    running.map(OperationDoc::Running).chain(finished).collect()
}

/// Returns the document of a finished operation.
pub(crate) fn finished(report: &OperationReport) -> FinishedDoc {
    let state = match report.outcome {
        OperationOutcome::Done => "done",
        OperationOutcome::Aborted => "aborted",
    };
    FinishedDoc { report: report.clone(), state }
}

impl OperationDoc {
    /// Returns the id of the operation.
    pub(crate) fn id(&self) -> &str {
        match self {
            OperationDoc::Running(doc) => &doc.id,
            OperationDoc::Finished(doc) => &doc.report.id,
            OperationDoc::Drain(doc) => &doc.id,
            OperationDoc::Rebalance(doc) => &doc.id,
        }
    }

    /// Returns when the operation started, microseconds since 1970.
    pub(crate) fn started_at_us(&self) -> u64 {
        match self {
            OperationDoc::Running(doc) => doc.started_at_us,
            OperationDoc::Finished(doc) => doc.report.started_at_us,
            OperationDoc::Drain(doc) => doc.totals.started_at_us,
            OperationDoc::Rebalance(doc) => doc.totals.started_at_us,
        }
    }
}
