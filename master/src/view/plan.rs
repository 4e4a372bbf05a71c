//! A running operation on a keyspace: its plan, with the progress that its sources and targets have
//! reported, how fast it moves, and what holds it up.

use serde::Serialize;
use vasto_core::catalog::Catalog;
use vasto_core::estimate::Estimate;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::operation::{OperationKind, OperationOutcome, operation_id};
use vasto_core::plan::{Plan, Source, Step, Target};
use vasto_core::reconcile::report_of;
use vasto_core::report::{PauseMs, SourceProgress, TargetProgress, TargetStage, ThrottleReport};

use crate::state::{Keyspace, PlanWatch, StepBytes, Trouble, sources, targets};

/// A running operation.
#[derive(Serialize)]
pub(crate) struct RunningDoc {
    pub(super) id: String,
    kind: OperationKind,
    keyspace: String,
    from: u32,
    to: u32,
    /// `running` or `paused`.
    state: &'static str,
    step: Step,
    waiting_for: Option<String>,
    /// Bytes of the present step.
    pub(super) bytes_done: u64,
    pub(super) bytes_total: u64,
    keys_moved: u64,
    pub(super) started_at_us: u64,
    targets: Vec<TargetDoc>,
    sources: Vec<SourceDoc>,
    /// Bytes a second of the last seconds.
    pub(super) rate: Option<u64>,
    seconds_left: Option<u64>,
    /// The bound of the rate, bytes a second.
    max_rate: Option<u64>,
    /// Attempts of its parts that failed and were repeated, and seals that were undone.
    retries: u64,
    last_error: Option<String>,
    bytes_moved: u64,
    bytes_from_bucket: u64,
    bytes_from_peers: u64,
    objects_read: u64,
    write_pause_ms: PauseMs,
    pub(super) trouble: Option<TroubleDoc>,
    /// Nodes on which it is held back because requests would take longer than they should.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    yields_on: Vec<NodeId>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    throttled: Vec<ThrottledDoc>,
    /// What was estimated before it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<Estimate>,
}

/// A source that slows the writers of moving keys down so that the targets catch up.
#[derive(Serialize)]
struct ThrottledDoc {
    shard: ShardId,
    node_id: NodeId,
    /// Bytes of keys and values of moving keys that it takes in a second.
    bytes_per_s: u64,
    /// Time for which writes were held back, all together.
    held_back_ms: u64,
}

#[derive(Serialize)]
struct TargetDoc {
    shard: ShardId,
    replica_id: ReplicaId,
    node_id: NodeId,
    stage: Option<TargetStage>,
    bytes_done: u64,
    bytes_total: u64,
    retries: u32,
    last_error: Option<String>,
}

#[derive(Serialize)]
struct SourceDoc {
    shard: ShardId,
    replica_id: ReplicaId,
    node_id: NodeId,
    /// It has made what the targets take: its checkpoint, and its export if there is one.
    prepared: bool,
    /// Bytes of its export; 0 when there is none.
    bytes_done: u64,
    bytes_total: u64,
    retries: u32,
    last_error: Option<String>,
}

/// Why the operation does not go on, and what to do.
#[derive(Serialize, Clone)]
pub(crate) struct TroubleDoc {
    /// How long that has lasted, milliseconds.
    pub(super) since_ms: u64,
    pub(super) what: String,
    pub(super) next: String,
}

impl From<&Trouble> for TroubleDoc {
    fn from(trouble: &Trouble) -> Self {
        let Trouble { what, next, for_us } = trouble.clone();
        Self { since_ms: for_us / 1000, what, next }
    }
}

/// Returns the running operation of a keyspace.
pub(crate) fn running(keyspace: &Keyspace) -> Option<RunningDoc> {
    let doc = running_of(&keyspace.catalog)?;
    Some(with_progress(keyspace, keyspace.catalog.plan.as_ref()?, doc))
}

/// Returns the replicas of a keyspace that move, each an operation of its own.
pub(crate) fn moving(keyspace: &Keyspace) -> Vec<RunningDoc> {
    let moves = keyspace.catalog.moves.iter().map(|moving| {
        let doc = RunningDoc {
            kind: OperationKind::Move,
            ..running_plan(&keyspace.catalog, &moving.plan)
        };
        with_progress(keyspace, &moving.plan, doc)
    });
    moves.collect()
}

fn with_progress(keyspace: &Keyspace, plan: &Plan, mut doc: RunningDoc) -> RunningDoc {
    let (catalog, reports) = (&keyspace.catalog, &keyspace.reports);
    doc.waiting_for = keyspace.waiting_for_of(plan);
    for (target, described) in plan.targets.iter().zip(&mut doc.targets) {
        let report = reports.get(&target.replica).and_then(|report| report.target.as_ref());
        if let Some(progress) = report.filter(|progress| progress.plan == plan.id) {
            described.show(progress);
        }
    }
    doc.throttled =
        plan.sources.iter().filter_map(|source| throttled(keyspace, plan, source)).collect();
    for (source, described) in plan.sources.iter().zip(&mut doc.sources) {
        let report = reports.get(&source.replica).and_then(|report| report.source.as_ref());
        if let Some(progress) = report.filter(|progress| progress.plan == plan.id) {
            described.show(plan, progress);
        }
    }
    let bytes = StepBytes::of(plan, reports);
    (doc.bytes_done, doc.bytes_total) = (bytes.done, bytes.total);
    // The figures so far; the outcome and the times are of no use yet.
    let figures = report_of(catalog, plan, reports, OperationOutcome::Done, None, 0);
    doc.keys_moved = figures.keys_moved;
    doc.bytes_moved = figures.bytes_moved;
    doc.bytes_from_bucket = figures.bytes_from_bucket;
    doc.bytes_from_peers = figures.bytes_from_peers;
    doc.objects_read = figures.objects_read;
    doc.write_pause_ms = figures.write_pause_ms;
    let of_sources = sources(plan, reports).map(|one| (one.failures, one.last_error.as_ref()));
    let of_targets = targets(plan, reports).map(|one| (one.failures, one.last_error.as_ref()));
    for (failures, error) in of_sources.chain(of_targets) {
        doc.retries += u64::from(failures);
        doc.last_error = doc.last_error.or_else(|| error.cloned());
    }
    if let Some(watch) = keyspace.watches.get(&plan.id) {
        doc.observe(watch, bytes);
    }
    doc
}

/// Returns the running operation from a catalog alone, before anything is reported.
pub(crate) fn running_of(catalog: &Catalog) -> Option<RunningDoc> {
    catalog.plan.as_ref().map(|plan| running_plan(catalog, plan))
}

fn running_plan(catalog: &Catalog, plan: &Plan) -> RunningDoc {
    let (from, to) = plan.resize().unwrap_or((catalog.spec.shards, catalog.spec.shards));
    RunningDoc {
        id: operation_id(catalog.keyspace, plan.id),
        kind: plan.kind.into(),
        keyspace: catalog.name.clone(),
        from,
        to,
        state: if plan.paused { "paused" } else { "running" },
        step: plan.step,
        waiting_for: None,
        bytes_done: 0,
        bytes_total: 0,
        keys_moved: 0,
        started_at_us: plan.started_at_us,
        targets: plan.targets.iter().map(TargetDoc::of).collect(),
        sources: plan.sources.iter().map(SourceDoc::of).collect(),
        rate: None,
        seconds_left: None,
        max_rate: plan.max_rate,
        retries: plan.seals_undone.into(),
        last_error: None,
        bytes_moved: 0,
        bytes_from_bucket: 0,
        bytes_from_peers: 0,
        objects_read: 0,
        write_pause_ms: PauseMs::default(),
        trouble: None,
        yields_on: Vec::new(),
        throttled: Vec::new(),
        estimate: plan.estimate.clone(),
    }
}

fn throttled(keyspace: &Keyspace, plan: &Plan, source: &Source) -> Option<ThrottledDoc> {
    let progress = keyspace.reports.get(&source.replica)?.source.as_ref();
    let ThrottleReport { bytes_per_s, held_back_ms } =
        progress.filter(|progress| progress.plan == plan.id)?.throttle?;
    Some(ThrottledDoc { shard: source.shard, node_id: source.node, bytes_per_s, held_back_ms })
}

impl RunningDoc {
    /// Adds what was observed over time.
    fn observe(&mut self, watch: &PlanWatch, bytes: StepBytes) {
        self.rate = watch.rate();
        self.seconds_left = watch.seconds_for(bytes.left()).filter(|_| bytes.total > 0);
        self.trouble = watch.trouble.as_ref().map(TroubleDoc::from);
        self.yields_on = watch.yields_on.clone();
    }
}

impl TargetDoc {
    fn of(target: &Target) -> Self {
        Self {
            shard: target.shard,
            replica_id: target.replica,
            node_id: target.node,
            stage: None,
            bytes_done: 0,
            bytes_total: 0,
            retries: 0,
            last_error: None,
        }
    }

    fn show(&mut self, progress: &TargetProgress) {
        self.stage = Some(progress.stage);
        (self.bytes_done, self.bytes_total) = (progress.bytes_done, progress.bytes_total);
        (self.retries, self.last_error) = (progress.failures, progress.last_error.clone());
    }
}

impl SourceDoc {
    fn of(source: &Source) -> Self {
        Self {
            shard: source.shard,
            replica_id: source.replica,
            node_id: source.node,
            prepared: source.manifest.is_some(),
            bytes_done: 0,
            bytes_total: 0,
            retries: 0,
            last_error: None,
        }
    }

    fn show(&mut self, plan: &Plan, progress: &SourceProgress) {
        let exported = progress.export.is_some() || !plan.exports();
        self.prepared |= progress.manifest.is_some() && exported;
        (self.bytes_done, self.bytes_total) = (progress.bytes_done, progress.bytes_total);
        (self.retries, self.last_error) = (progress.failures, progress.last_error.clone());
    }
}
