//! What a catalog version ends, as spans of the traces of operations: a step of a plan, a plan, the
//! drain of a node in a keyspace. A rebalance, and a drain of several keyspaces, end as a whole.
//!
//! **Invariants**
//! - The writer of a version exports what that version has ended, and nobody else does: a master
//!   that adopts a version exports nothing.
//! - Nothing is needed but the two versions. What a master remembers beside them, when steps began,
//!   only spares it a later beginning: of the version that it has found.

use std::borrow::Cow;
use std::collections::BTreeMap;

use opentelemetry::KeyValue;
use vasto_core::catalog::{Catalog, KeyspaceState, NodeDrain};
use vasto_core::ids::PlanId;
use vasto_core::operation::{OperationKind, OperationOutcome, OperationReport, operation_id};
use vasto_core::plan::{Plan, Step};
use vasto_shipping::Rebalance;
use vasto_trace::{OperationTrace, Past, step_ended};

use crate::state::ClusterState;

/// Returns why an operation has ended of which the version that ended it has no report.
fn without_report(next: &Catalog) -> String {
    match next.state {
        KeyspaceState::Deleted => "the keyspace was deleted".to_owned(),
        KeyspaceState::Active => "it was replaced, or its report is forgotten".to_owned(),
    }
}

/// Part of an operation that has ended, or all of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ended {
    /// A step of the operation with this id.
    Step(String, Past),
    /// The part in one keyspace of the drain with this id.
    Drain(String, Past),
    /// The operation with this id, and those that it is a part of.
    Whole(String, Past, Vec<String>),
}

impl Ended {
    /// Says what a step has waited for at last.
    pub(crate) fn note_waiting(&mut self, what: &str) {
        if let Ended::Step(_, past) = self {
            past.attributes.push(KeyValue::new("vasto.waited_for", what.to_owned()));
        }
    }

    /// Exports the span.
    pub(crate) fn export(self, cluster: &str) {
        match self {
            Ended::Step(id, past) | Ended::Drain(id, past) => {
                OperationTrace::new(cluster, &id).add(past);
            }
            Ended::Whole(id, past, part_of) => {
                let part_of: Vec<OperationTrace> =
                    part_of.iter().map(|id| OperationTrace::new(cluster, id)).collect();
                OperationTrace::new(cluster, &id).end(past, &part_of);
            }
        }
    }
}

/// What stays the same as long as a plan is in one step, and how often it was there.
type Stay = (Step, bool, u32);

fn stay_of(plan: &Plan) -> Stay {
    (plan.step, plan.paused, plan.seals_undone)
}

/// When the running plans of a keyspace began their present steps, as far as this master knows.
#[derive(Debug, Default)]
pub(crate) struct Steps(BTreeMap<PlanId, (Stay, u64)>);

impl Steps {
    /// Takes over the version that this master has written behind `before`; returns what it has
    /// ended.
    pub(crate) fn follow(&mut self, before: &Catalog, next: &Catalog) -> Vec<Ended> {
        let mut ended = Vec::new();
        let mut stays = BTreeMap::new();
        for plan in before.plans().filter(|_| before.state == KeyspaceState::Active) {
            let stay = stay_of(plan);
            // Unknown of a plan that another master has brought here.
            let known = self.0.get(&plan.id).filter(|(of, _)| *of == stay);
            let since_us = known.map_or(before.written_at_us, |(_, since_us)| *since_us);
            let later = running(next, plan.id);
            if later.is_some_and(|later| stay_of(later) == stay) {
                stays.insert(plan.id, (stay, since_us));
                continue;
            }
            let id = operation_id(before.keyspace, plan.id);
            let step = step_ended(before, plan, since_us, next.written_at_us);
            ended.push(Ended::Step(id.clone(), step));
            if later.is_none() {
                ended.push(Ended::Whole(id, end_of(before, plan, next), wholes(before, plan)));
            }
        }
        for plan in next.plans() {
            stays.entry(plan.id).or_insert((stay_of(plan), next.written_at_us));
        }
        self.0 = stays;
        ended.extend(drains_ended(before, next));
        ended
    }
}

/// Returns the plans that a version begins, changes or ends, by their operations.
pub(crate) fn concerned(before: Option<&Catalog>, next: &Catalog) -> Vec<String> {
    let find = |catalog: &Catalog, id: PlanId| catalog.plans().find(|plan| plan.id == id).cloned();
    let earlier = before.into_iter().flat_map(Catalog::plans);
    let mut ids: Vec<PlanId> = earlier.chain(next.plans()).map(|plan| plan.id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.retain(|id| before.and_then(|before| find(before, *id)) != find(next, *id));
    ids.into_iter().map(|id| operation_id(next.keyspace, id)).collect()
}

/// Returns the plan while it runs.
fn running(catalog: &Catalog, id: PlanId) -> Option<&Plan> {
    let mut plans = catalog.plans().filter(|_| catalog.state == KeyspaceState::Active);
    plans.find(|plan| plan.id == id)
}

/// Returns the operations that a plan is a part of: its rebalance, and the drains that it serves.
fn wholes(catalog: &Catalog, plan: &Plan) -> Vec<String> {
    let moving = catalog.moves.iter().filter(|moving| moving.plan.id == plan.id);
    let rebalances = moving.map(|moving| {
        let since_us = moving.rebalance_us;
        Rebalance { since_us, ..Rebalance::default() }.operation_id()
    });
    let serves = |drain: &&NodeDrain| plan.adds_member() && drain.since_us <= plan.started_at_us;
    let is_plan = catalog.plan.as_ref().is_some_and(|running| running.id == plan.id);
    let drains = catalog.draining_nodes.iter().filter(|drain| is_plan && serves(drain));
    rebalances.chain(drains.map(NodeDrain::operation_id)).collect()
}

fn report_in<'a>(catalog: &'a Catalog, id: &str) -> Option<&'a OperationReport> {
    catalog.operations.iter().rev().find(|report| report.id == id)
}

/// Returns the root span of a plan that a version has ended.
fn end_of(before: &Catalog, plan: &Plan, next: &Catalog) -> Past {
    let id = operation_id(before.keyspace, plan.id);
    match report_in(next, &id) {
        Some(report) => Past { to_us: next.written_at_us, ..past_of(report) },
        None => Past {
            name: operation(&plan.kind.into()),
            from_us: plan.started_at_us,
            to_us: next.written_at_us,
            attributes: vec![KeyValue::new("vasto.keyspace", before.name.clone())],
            error: Some(without_report(next)),
        },
    }
}

/// Returns the parts of drained nodes in this keyspace that a version has ended.
fn drains_ended(before: &Catalog, next: &Catalog) -> Vec<Ended> {
    let goes_on = |drain: &&NodeDrain| {
        let mut later = next.draining_nodes.iter();
        next.state == KeyspaceState::Active
            && later.any(|other| other.operation_id() == drain.operation_id())
    };
    let drains = before.draining_nodes.iter();
    let drains = drains.filter(|drain| before.state == KeyspaceState::Active && !goes_on(drain));
    let part = |drain: &NodeDrain| {
        let id = drain.operation_id();
        let past = match report_in(next, &id) {
            Some(report) => Past { to_us: next.written_at_us, ..past_of(report) },
            None => Past {
                name: Cow::Borrowed(""),
                from_us: drain.since_us,
                to_us: next.written_at_us,
                attributes: vec![KeyValue::new("vasto.keyspace", before.name.clone())],
                error: Some(without_report(next)),
            },
        };
        Ended::Drain(id, Past { name: "drain of a keyspace".into(), ..past })
    };
    drains.map(part).collect()
}

/// Returns the root span of the drain of a node, once it has ended in all keyspaces of the state.
pub(crate) fn drain_ended(state: &ClusterState, id: &str) -> Option<Ended> {
    let catalogs = || state.keyspaces.values().map(|keyspace| &keyspace.catalog);
    let is_it = |drain: &NodeDrain| drain.operation_id() == id;
    let mut active = catalogs().filter(|catalog| catalog.state == KeyspaceState::Active);
    if active.any(|catalog| catalog.draining_nodes.iter().any(is_it)) {
        return None;
    }
    let parts: Vec<&OperationReport> =
        catalogs().filter_map(|catalog| report_in(catalog, id)).collect();
    let (first, rest) = parts.split_first()?;
    let mut all = OperationReport::clone(first);
    for part in rest {
        all.keyspace = format!("{},{}", all.keyspace, part.keyspace);
        all.keys_moved += part.keys_moved;
        all.bytes_moved += part.bytes_moved;
        all.bytes_from_bucket += part.bytes_from_bucket;
        all.bytes_from_peers += part.bytes_from_peers;
        all.objects_read += part.objects_read;
        all.copies += part.copies;
        if part.outcome == OperationOutcome::Aborted {
            (all.outcome, all.reason) = (part.outcome, part.reason.clone());
        }
    }
    let to_us = parts.iter().map(|report| report.ended_at_us()).max().unwrap_or_default();
    Some(Ended::Whole(id.to_owned(), Past { to_us, ..past_of(&all) }, Vec::new()))
}

/// Returns the root span of a rebalance that has ended.
pub(crate) fn rebalance_ended(
    state: &ClusterState,
    rebalance: Rebalance,
    cancelled: bool,
    now_us: u64,
) -> Ended {
    let of_it = state.active().filter_map(|keyspace| keyspace.catalog.rebalanced.as_ref());
    let of_it: Vec<_> = of_it.filter(|one| one.since_us == rebalance.since_us).collect();
    let sum = |figure: fn(&vasto_core::catalog::Rebalanced) -> u64| {
        of_it.iter().map(|one| figure(one)).fold(0, u64::saturating_add)
    };
    let attributes = vec![
        count("vasto.copies", sum(|one| one.moved.copies)),
        count("vasto.failed", sum(|one| one.failed)),
        count("vasto.primaries", sum(|one| one.primaries)),
        count("vasto.keys_moved", sum(|one| one.moved.keys)),
        count("vasto.bytes_moved", sum(|one| one.moved.bytes)),
        count("vasto.bytes_from_bucket", sum(|one| one.moved.bytes_from_bucket)),
        count("vasto.bytes_from_peers", sum(|one| one.moved.bytes_from_peers)),
        count("vasto.requests", sum(|one| one.moved.objects_read)),
    ];
    let past = Past {
        name: "operation rebalance".into(),
        from_us: rebalance.since_us,
        to_us: now_us,
        attributes,
        error: cancelled.then(|| crate::state::CANCELLED.to_owned()),
    };
    Ended::Whole(rebalance.operation_id(), past, Vec::new())
}

fn count(key: &'static str, value: u64) -> KeyValue {
    KeyValue::new(key, i64::try_from(value).unwrap_or(i64::MAX))
}

/// Returns the name of the root span of an operation of this kind.
fn operation(kind: &OperationKind) -> Cow<'static, str> {
    match kind {
        OperationKind::Grow => "operation grow".into(),
        OperationKind::Shrink => "operation shrink".into(),
        OperationKind::AddReplica => "operation replica".into(),
        OperationKind::RecoverReplica => "operation takeover".into(),
        OperationKind::Restore => "operation restore".into(),
        OperationKind::DrainNode => "operation replace".into(),
        OperationKind::Move => "operation move".into(),
        OperationKind::Other(name) => format!("operation {name}").into(),
    }
}

/// Returns the span of an operation, from its report.
fn past_of(report: &OperationReport) -> Past {
    let mut attributes = vec![
        KeyValue::new("vasto.keyspace", report.keyspace.clone()),
        count("vasto.from", report.from.into()),
        count("vasto.to", report.to.into()),
        count("vasto.keys_moved", report.keys_moved),
        count("vasto.bytes_moved", report.bytes_moved),
        count("vasto.bytes_from_bucket", report.bytes_from_bucket),
        count("vasto.bytes_from_peers", report.bytes_from_peers),
        count("vasto.requests", report.objects_read),
        KeyValue::new("vasto.write_pause_p50_ms", report.write_pause_ms.p50),
        KeyValue::new("vasto.write_pause_p99_ms", report.write_pause_ms.p99),
        KeyValue::new("vasto.write_pause_max_ms", report.write_pause_ms.max),
    ];
    attributes.extend(report.shard.map(|shard| count("vasto.shard", shard.0.into())));
    attributes.extend((report.copies > 0).then(|| count("vasto.copies", report.copies)));
    let aborted = report.outcome == OperationOutcome::Aborted;
    let reason = || report.reason.clone().unwrap_or_else(|| "it was undone".to_owned());
    Past {
        name: operation(&report.kind),
        from_us: report.started_at_us,
        to_us: report.ended_at_us(),
        attributes,
        error: aborted.then(reason),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::catalog::{KeyspaceSpec, Moved, Rebalanced, ReplicaMove};
    use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
    use vasto_core::reconcile::{Pace, abort, cancel_drain, drain_node, set_pace, start_resize};
    use vasto_core::report::Reports;

    use super::*;
    use crate::state::Delivery;

    fn first(keyspace: u64) -> Catalog {
        let name = format!("ks{keyspace}");
        let spec = KeyspaceSpec::default();
        Catalog::first(KeyspaceId(keyspace), &name, spec, &[vec![NodeId(1)]], 1, 1)
    }

    /// Begins at 20.
    fn growing() -> Catalog {
        start_resize(&first(1), 2, &[vec![NodeId(2)]], 20, 2).unwrap()
    }

    /// Returns name, start, end and error of each span.
    fn told(ended: &[Ended]) -> Vec<(String, u64, u64, Option<String>)> {
        let of =
            |past: &Past| (past.name.to_string(), past.from_us, past.to_us, past.error.clone());
        let past = |one: &Ended| match one {
            Ended::Step(_, past) | Ended::Drain(_, past) | Ended::Whole(_, past, _) => of(past),
        };
        ended.iter().map(past).collect()
    }

    fn span(
        name: &str,
        from: u64,
        to: u64,
        error: Option<&str>,
    ) -> (String, u64, u64, Option<String>) {
        (name.to_owned(), from, to, error.map(str::to_owned))
    }

    #[test]
    fn a_step_lasts_until_the_plan_leaves_it_and_the_plan_until_its_report() {
        let (id, nothing) = (PlanId(1), Reports::new());
        let mut steps = Steps::default();
        let begun = growing();
        assert!(steps.follow(&first(1), &begun).is_empty());
        assert_eq!(concerned(Some(&first(1)), &begun), ["op-1-1"]);
        let slow = set_pace(&begun, id, Pace::Rate(Some(1 << 20)), 30, 3).unwrap();
        assert!(steps.follow(&begun, &slow).is_empty(), "it is in the same step");
        assert_eq!(concerned(Some(&begun), &slow), ["op-1-1"]);
        let other = slow.next(35, 4);
        assert!(steps.follow(&slow, &other).is_empty());
        assert!(concerned(Some(&slow), &other).is_empty(), "a version that is not about it");
        let paused = set_pace(&other, id, Pace::Pause, 40, 5).unwrap();
        assert_eq!(told(&steps.follow(&other, &paused)), [span("step prepare", 20, 40, None)]);

        // Another master goes on, which knows the last version alone.
        let mut steps = Steps::default();
        let undone = abort(&paused, "cancelled", &nothing, 50, 6).unwrap();
        let ended = steps.follow(&paused, &undone);
        let whole = span("operation grow", 20, 50, Some("cancelled"));
        assert_eq!(told(&ended), [span("step prepare, paused", 40, 50, None), whole]);
        assert!(
            matches!(&ended[1], Ended::Whole(id, _, wholes) if id == "op-1-1" && wholes.is_empty())
        );
        assert!(steps.follow(&undone, &undone.next(60, 7)).is_empty(), "it has ended once");
    }

    #[test]
    fn a_plan_ends_with_its_keyspace() {
        let begun = growing();
        let mut deleted = begun.next(50, 3);
        deleted.state = KeyspaceState::Deleted;
        let mut steps = Steps::default();
        let why = Some("the keyspace was deleted");
        let spans = [span("step prepare", 20, 50, None), span("operation grow", 20, 50, why)];
        assert_eq!(told(&steps.follow(&begun, &deleted)), spans);
        assert!(steps.follow(&deleted, &deleted.next(60, 4)).is_empty());
    }

    #[test]
    fn moves_are_told_apart_and_belong_to_their_rebalance() {
        let plan = growing().plan.unwrap();
        let of = |id: u64, step: Step| ReplicaMove {
            plan: Plan { id: PlanId(id), step, ..plan.clone() },
            replaces: ReplicaId(1),
            rebalance_us: 7,
        };
        let mut before = first(1);
        before.moves = vec![of(1, Step::Tail), of(2, Step::Tail)];
        let mut next = before.next(90, 2);
        next.moves = vec![of(1, Step::Committed), of(2, Step::Tail)];
        let mut steps = Steps::default();
        assert_eq!(told(&steps.follow(&before, &next)), [span("step tail", 1, 90, None)]);
        assert_eq!(concerned(Some(&before), &next), ["op-1-1"]);
        let mut last = next.next(95, 3);
        last.moves = vec![of(2, Step::Tail)];
        let ended = steps.follow(&next, &last);
        assert!(
            matches!(&ended[..], [Ended::Step(..), Ended::Whole(id, _, wholes)]
                if id == "op-1-1" && *wholes == ["rebalance-7"]),
            "{ended:?}"
        );
    }

    #[test]
    fn a_rebalance_ends_with_what_has_moved_for_it() {
        let mut state = ClusterState::default();
        for (keyspace, since_us) in [(1, 7), (2, 7), (3, 6)] {
            let moved = Moved { copies: 2, bytes: 10, ..Moved::default() };
            let rebalanced = Rebalanced { since_us, moved, failed: 1, primaries: 0 };
            let catalog = Catalog { rebalanced: Some(rebalanced), ..first(keyspace) };
            state.install(catalog, Delivery::Push);
        }
        let running = Rebalance { since_us: 7, ..Rebalance::default() };
        let ended = rebalance_ended(&state, running, true, 90);
        let want = span("operation rebalance", 7, 90, Some(crate::state::CANCELLED));
        assert_eq!(told(std::slice::from_ref(&ended)), [want]);
        let Ended::Whole(id, past, _) = ended else { panic!("it is no part of anything") };
        assert_eq!(id, "rebalance-7");
        for attribute in
            [count("vasto.copies", 4), count("vasto.bytes_moved", 20), count("vasto.failed", 2)]
        {
            assert!(past.attributes.contains(&attribute), "{attribute:?}: {past:?}");
        }
    }

    #[test]
    fn a_drain_ends_with_its_last_keyspace() {
        let drain = NodeDrain::new(NodeId(1), false, 10);
        let id = drain.operation_id();
        let mut state = ClusterState::default();
        let mut draining = Vec::new();
        for keyspace in [1, 2] {
            let catalog = drain_node(&first(keyspace), drain.clone(), 10, 2).unwrap();
            state.install(catalog.clone(), Delivery::Push);
            draining.push(catalog);
        }
        for (catalog, ends) in draining.iter().zip([false, true]) {
            let next = cancel_drain(catalog, &id, "cancelled", &Reports::new(), 3_010, 3).unwrap();
            let ended = Steps::default().follow(catalog, &next);
            let part = span("drain of a keyspace", 10, 3_010, Some("cancelled"));
            assert_eq!(told(&ended), [part]);
            state.install(next, Delivery::Push);
            let whole = drain_ended(&state, &id);
            assert_eq!(whole.is_some(), ends);
            if let Some(whole) = whole {
                let want = span("operation replace", 10, 3_010, Some("cancelled"));
                assert_eq!(told(std::slice::from_ref(&whole)), [want]);
            }
        }
        assert_eq!(drain_ended(&state, "node-of-nobody"), None);
    }
}
