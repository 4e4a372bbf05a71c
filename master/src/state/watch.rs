//! What is observed of the running plans of a keyspace, those of its moves included: how fast they
//! move, and what holds them up.
//!
//! **Invariant:** an observation belongs to one plan; another plan, or a restart of the master,
//! begins anew. Nothing here decides anything.

use std::collections::BTreeMap;

use vasto_core::catalog::{Catalog, ShardPlacement};
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::operation::operation_id;
use vasto_core::plan::{Plan, Step};
use vasto_core::report::{Reports, SourceProgress, TargetProgress};

use super::ClusterState;
use super::speed::Speed;
use super::trouble::{Facts, Trouble, trouble};

/// The observations of one plan.
#[derive(Debug)]
pub(crate) struct PlanWatch {
    marks: Vec<u64>,
    /// When the marks changed last, or a pause ended.
    moved_us: u64,
    speed: Speed,
    /// Why the plan does not go on.
    pub(crate) trouble: Option<Trouble>,
    /// Its nodes on which it waits for requests.
    pub(crate) yields_on: Vec<NodeId>,
}

/// The bytes of the present step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StepBytes {
    pub(crate) done: u64,
    /// 0 while that is not known.
    pub(crate) total: u64,
}

impl StepBytes {
    /// Returns the bytes that the sources export, in `prepare`, or else those that the targets take
    /// from the bucket.
    pub(crate) fn of(plan: &Plan, reports: &Reports) -> Self {
        let sum = |of: Self, (done, total): (u64, u64)| Self {
            done: of.done.saturating_add(done),
            total: of.total.saturating_add(total),
        };
        let exported = sources(plan, reports)
            .map(|progress| (progress.bytes_done, progress.bytes_total))
            .fold(Self::default(), sum);
        if plan.step == Step::Prepare && exported.total > 0 {
            return exported;
        }
        targets(plan, reports)
            .map(|progress| (progress.bytes_done, progress.bytes_total))
            .fold(Self::default(), sum)
    }

    /// Returns the bytes that are not done.
    pub(crate) fn left(self) -> u64 {
        self.total.saturating_sub(self.done)
    }
}

/// Returns what the sources of a plan have reported of it.
pub(crate) fn sources<'a>(
    plan: &'a Plan,
    reports: &'a Reports,
) -> impl Iterator<Item = &'a SourceProgress> {
    let reported = plan.sources.iter().filter_map(move |source| reports.get(&source.replica));
    reported.filter_map(move |report| report.source.as_ref().filter(|found| found.plan == plan.id))
}

/// Returns what the targets of a plan have reported of it.
pub(crate) fn targets<'a>(
    plan: &'a Plan,
    reports: &'a Reports,
) -> impl Iterator<Item = &'a TargetProgress> {
    let reported = plan.targets.iter().filter_map(move |target| reports.get(&target.replica));
    reported.filter_map(move |report| report.target.as_ref().filter(|found| found.plan == plan.id))
}

/// Returns numbers of which some change while a plan goes on.
fn marks(catalog: &Catalog, plan: &Plan, reports: &Reports) -> Vec<u64> {
    let mut marks = vec![plan.step as u64, plan.seals_undone.into(), plan.floor.unwrap_or(0)];
    for progress in sources(plan, reports) {
        let done = [progress.manifest.is_some(), progress.export.is_some(), progress.released];
        marks.extend(done.map(u64::from));
        marks.extend([progress.bytes_done, progress.rows_done]);
        marks.push(progress.sealed.map_or(0, |sealed| sealed.version.0));
    }
    for progress in targets(plan, reports) {
        marks.extend([progress.stage as u64, u64::from(progress.manifest_shipped)]);
        marks.extend([progress.bytes_done, progress.rows_done]);
        marks.extend(progress.cursors.values().map(|lsn| lsn.0));
    }
    if plan.adds_member() {
        // It reads the log like any other; once it is placed, that says nothing of the plan. What
        // the other shards do never does.
        let copying = plan.targets.iter().filter(|_| plan.step != Step::Committed);
        let made = copying.filter_map(|target| reports.get(&target.replica));
        marks.extend(made.map(|report| report.lsn.0));
        let shard = plan.targets.first().and_then(|target| catalog.shard(target.shard));
        marks.extend(shard.map(|shard| shard.replicas.len() as u64));
        marks.extend(shard.and_then(ShardPlacement::primary).map(|primary| primary.replica.0));
        return marks;
    }
    // Every replica takes over the versions.
    let placed = catalog.placement.iter().flat_map(|shard| &shard.replicas);
    let placed = placed.filter_map(|member| reports.get(&member.replica));
    marks.extend(placed.flat_map(|report| [report.version.0, report.replication.floor]));
    marks
}

impl PlanWatch {
    fn new(now_us: u64) -> Self {
        Self {
            marks: Vec::new(),
            moved_us: now_us,
            speed: Speed::default(),
            trouble: None,
            yields_on: Vec::new(),
        }
    }

    /// Takes one observation; returns how long nothing has moved, microseconds.
    fn note(&mut self, plan: &Plan, marks: Vec<u64>, bytes: StepBytes, now_us: u64) -> u64 {
        if plan.paused || self.marks != marks {
            (self.marks, self.moved_us) = (marks, now_us);
        }
        self.speed.note(now_us, bytes.done);
        now_us.saturating_sub(self.moved_us)
    }

    /// Returns the bytes a second of the last seconds.
    pub(crate) fn rate(&self) -> Option<u64> {
        self.speed.rate()
    }

    /// Returns the seconds that so many bytes will take.
    pub(crate) fn seconds_for(&self, bytes: u64) -> Option<u64> {
        self.speed.seconds_for(bytes)
    }
}

impl ClusterState {
    /// Observes everything that runs. `outage`: why the bucket does not answer this master.
    pub(crate) fn observe(&mut self, mono_us: u64, outage: Option<&str>) {
        let ids: Vec<KeyspaceId> = self.keyspaces.keys().copied().collect();
        let goes_on = |plan: &Plan| plan.adds_member() && !plan.paused;
        let copies = self.active().any(|one| one.catalog.plans().any(goes_on));
        for id in ids {
            self.observe_plans(id, mono_us, outage);
            self.observe_drains(id, copies, mono_us, outage);
        }
        self.observe_rebalance(mono_us, outage);
    }

    fn observe_plans(&mut self, id: KeyspaceId, mono_us: u64, outage: Option<&str>) {
        let Some(keyspace) = self.keyspaces.get_mut(&id) else { return };
        let mut before = std::mem::take(&mut keyspace.watches);
        let catalog = keyspace.catalog.clone();
        let yields =
            |node: NodeId| self.nodes.get(&node).is_some_and(|node| node.is_live() && node.yields);
        let mut watches = BTreeMap::new();
        for plan in catalog.plans() {
            let Some(keyspace) = self.keyspaces.get(&id) else { return };
            let mut watch = before.remove(&plan.id).unwrap_or_else(|| PlanWatch::new(mono_us));
            let bytes = StepBytes::of(plan, &keyspace.reports);
            let marks = marks(&catalog, plan, &keyspace.reports);
            let still_us = watch.note(plan, marks, bytes, mono_us);
            let waiting_for = keyspace.waiting_for_of(plan);
            let facts = Facts {
                catalog: &catalog,
                plan,
                reports: &keyspace.reports,
                waiting_for: waiting_for.as_deref(),
                still_us,
                away_us: &|node| self.away_us(node, mono_us),
                bucket_trouble: &|node| self.bucket_trouble(node),
                yields: &yields,
                outage,
            };
            let found = trouble(&facts);
            let yields_on = facts.nodes().into_iter().filter(|node| yields(*node)).collect();
            log_change(&operation_id(id, plan.id), watch.trouble.as_ref(), found.as_ref());
            (watch.trouble, watch.yields_on) = (found, yields_on);
            watches.insert(plan.id, watch);
        }
        if let Some(keyspace) = self.keyspaces.get_mut(&id) {
            keyspace.watches = watches;
        }
    }

    /// Returns the fault that keeps a node from the bucket.
    fn bucket_trouble(&self, node: NodeId) -> Option<String> {
        let trouble = self.nodes.get(&node)?.bucket_trouble.clone();
        (!trouble.is_empty()).then_some(trouble)
    }
}

pub(super) fn log_change(operation: &str, before: Option<&Trouble>, now: Option<&Trouble>) {
    match (before, now) {
        (None, Some(now)) => {
            tracing::info!(operation, what = now.what, next = now.next, "the operation is held up");
        }
        (Some(_), None) => tracing::info!(operation, "the operation goes on"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::ids::{Lsn, PlanId, ReplicaId, ShardId};
    use vasto_core::reconcile::{MoveOrder, Pace, set_pace, start_moves, start_resize};
    use vasto_core::report::{ReplicaReport, TargetStage};
    use vasto_proto::v1;

    use super::*;
    use crate::state::tests::{hello, replica_report, two_nodes};
    use crate::state::{Delivery, Keyspace};

    const KS: KeyspaceId = KeyspaceId(1);
    const SECOND: u64 = 1_000_000;

    fn grown(state: &ClusterState) -> Catalog {
        let before = &state.keyspaces[&KS].catalog;
        let mut growing = start_resize(before, 3, &[vec![NodeId(1)]], 5_000, 2).unwrap();
        growing.plan.as_mut().unwrap().step = Step::Tail;
        growing
    }

    fn downloaded(state: &mut ClusterState, session: u64, bytes_done: u64, now_us: u64) {
        let progress = TargetProgress {
            stage: TargetStage::Downloading,
            bytes_total: 100_000,
            bytes_done,
            ..TargetProgress::new(PlanId(1))
        };
        let report = ReplicaReport { target: Some(progress), ..replica_report(3, 2) };
        let odd = state.report(NodeId(1), session, &v1::Report::default(), vec![report], now_us);
        assert_eq!(odd, []);
    }

    fn watch(state: &ClusterState) -> &PlanWatch {
        state.keyspaces[&KS].watches.values().next().unwrap()
    }

    #[test]
    fn a_plan_that_moves_has_a_rate_and_one_that_stands_still_is_in_trouble() {
        let (mut state, session, _) = two_nodes();
        state.install(grown(&state), Delivery::Push);
        for second in 0..5 {
            downloaded(&mut state, session, second * 10_000, second * SECOND);
            state.observe(second * SECOND, None);
        }
        let Keyspace { catalog, reports, .. } = &state.keyspaces[&KS];
        let bytes = StepBytes::of(catalog.plan.as_ref().unwrap(), reports);
        assert_eq!((bytes, bytes.left()), (StepBytes { done: 40_000, total: 100_000 }, 60_000));
        assert_eq!(
            (watch(&state).rate(), watch(&state).seconds_for(60_000)),
            (Some(10_000), Some(6))
        );
        assert_eq!(watch(&state).trouble, None);
        state.observe(11 * SECOND, None);
        assert_eq!(watch(&state).trouble, None, "seven seconds are no trouble yet");
        state.observe(13 * SECOND, None);
        assert!(watch(&state).trouble.as_ref().unwrap().what.contains("nothing moves"));
        // A cause that is known is named instead, and at once.
        state.observe(13 * SECOND, Some("refused"));
        assert!(watch(&state).trouble.as_ref().unwrap().what.contains("refused"));
        downloaded(&mut state, session, 50_000, 14 * SECOND);
        state.observe(14 * SECOND, None);
        assert_eq!(watch(&state).trouble, None);
    }

    #[test]
    fn the_time_of_a_pause_does_not_count() {
        let (mut state, session, _) = two_nodes();
        state.install(grown(&state), Delivery::Push);
        downloaded(&mut state, session, 1, 0);
        state.observe(0, None);
        let paused = set_pace(&state.keyspaces[&KS].catalog, PlanId(1), Pace::Pause, 6_000, 3);
        state.install(paused.unwrap(), Delivery::Push);
        state.observe(SECOND, None);
        state.observe(1_000 * SECOND, Some("refused"));
        assert_eq!(watch(&state).trouble, None);
        let resumed = set_pace(&state.keyspaces[&KS].catalog, PlanId(1), Pace::Resume, 7_000, 4);
        state.install(resumed.unwrap(), Delivery::Push);
        state.observe(1_001 * SECOND, None);
        assert_eq!(watch(&state).trouble, None);
        state.observe(1_012 * SECOND, None);
        assert!(watch(&state).trouble.is_some());
        let ended = Catalog { plan: None, ..state.keyspaces[&KS].catalog.next(8_000, 5) };
        state.install(ended, Delivery::Push);
        state.observe(1_013 * SECOND, None);
        assert!(state.keyspaces[&KS].watches.is_empty());
    }

    #[test]
    fn each_move_has_a_watch_and_what_others_do_does_not_hide_that_it_stands_still() {
        let (mut state, session, _) = two_nodes();
        state.connect(&hello(3, "a:3"), false, 10).unwrap();
        let order = |replica: u64| MoveOrder {
            shard: ShardId(replica as u32 - 1),
            replica: ReplicaId(replica),
            to: NodeId(3),
        };
        let before = state.keyspaces[&KS].catalog.clone();
        let mut moving = start_moves(&before, &[order(1), order(2)], 7, 5_000, 2).unwrap();
        moving.moves.iter_mut().for_each(|one| one.plan.step = Step::Tail);
        let ids: Vec<_> = moving.moves.iter().map(|one| one.id()).collect();
        state.install(moving.clone(), Delivery::Push);
        state.keyspaces.get_mut(&KS).unwrap().waiting_for = Some("the first of them".into());
        for second in 0..12 {
            // Shard 0, which gives, goes on taking writes; its floor rises, and versions are applied.
            let mut report = replica_report(1, second);
            report.lsn = Lsn(100 + second);
            report.replication.floor = second;
            let replicas = vec![report];
            state.report(NodeId(1), session, &v1::Report::default(), replicas, second * SECOND);
            state.observe(second * SECOND, None);
        }
        for id in &ids {
            let trouble = state.keyspaces[&KS].watches[id].trouble.clone().unwrap();
            assert!(trouble.what.contains("the copy on"), "{trouble:?}");
            let cancel = format!("vasto operation cancel {}", operation_id(KS, *id));
            assert!(trouble.next.contains(&cancel), "{trouble:?}");
        }
        // One of them is paused, the other ends.
        let paused = set_pace(&moving, ids[0], Pace::Pause, 6_000, 3).unwrap();
        state.install(paused.clone(), Delivery::Push);
        state.observe(13 * SECOND, None);
        assert_eq!(state.keyspaces[&KS].watches[&ids[0]].trouble, None);
        let mut one = paused.next(7_000, 4);
        one.moves.truncate(1);
        state.install(one, Delivery::Push);
        state.observe(14 * SECOND, None);
        assert!(state.keyspaces[&KS].watches.keys().eq(&ids[..1]));
    }
}
