//! Structural changes as data: what a plan is, how it is born, and the one function that says
//! which catalog version comes next.
//!
//! `prepare -> tail -> sealing -> committed -> finished`, with `sealing -> tail` when a seal does
//! not complete in time, and abort from every step before `committed`.
//!
//! **Invariant:** [`advance`] is a pure function of the last catalog version, the nodes' reports
//! and the time, so any master can continue at any step; a commit is decided by one create-only
//! version, and only reports that name the running plan and the sealing version count.
//! Silence is never a reason to go forward: it makes the plan wait, unseal or abort. Once it has
//! committed there is nothing left to decide, and nobody who does not come back is waited for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::band::{Band, ShardCountError, check_shard_count};
use crate::catalog::{Catalog, KeyspaceState, Placed, Quarantine, ShardPlacement};
use crate::ids::{CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::{SEAL_TIMEOUT, TAIL_LAG_LSNS_MAX, TARGET_SILENT_MAX};
use crate::members::{leave, leave_quarantines};
use crate::record::BandRange;

/// What a plan does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanKind {
    /// More shards.
    Grow {
        /// Shards before.
        from: u32,
        /// Shards after.
        to: u32,
    },
    /// One more replica of a shard: the checkpoint of another one from the bucket, then its log.
    Replica {
        /// The shard.
        shard: ShardId,
    },
    /// A replica in the place of all of its shard, which have failed or whose nodes are gone: from the
    /// bucket alone.
    Takeover {
        /// The shard.
        shard: ShardId,
    },
    /// A new keyspace from what the bucket holds of another one.
    Restore {
        /// Whose data.
        keyspace: KeyspaceId,
        /// The version of its catalog that was in force at that time.
        version: CatalogVersion,
        /// The time, microseconds since 1970; `None` takes everything.
        #[serde(default)]
        at_us: Option<u64>,
    },
}

/// How far a plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Sources make the checkpoint that every target will take its bytes from.
    Prepare,
    /// Targets load the moving bands, then follow the sources' logs.
    Tail,
    /// Sources refuse writes to the moving bands; targets catch up to the seals.
    Sealing,
    /// Ownership has changed; targets open, sources release what waited.
    Committed,
}

/// The one manifest that a source's targets use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedManifest {
    /// Full object key.
    pub key: String,
    /// The LSN it covers; tails start after it.
    pub lsn: Lsn,
}

/// A replica that gives keys away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Known from the step `tail` on.
    #[serde(default)]
    pub manifest: Option<PinnedManifest>,
}

/// A replica under construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its shard.
    pub shard: ShardId,
    /// The replica; its id was given out by the version that started the plan.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
}

/// A running structural change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Unique in the keyspace.
    pub id: PlanId,
    /// What it does.
    pub kind: PlanKind,
    /// The epoch it started from.
    pub from_epoch: Epoch,
    /// Microseconds since 1970.
    pub started_at_us: u64,
    /// How far it is.
    pub step: Step,
    /// Who gives.
    pub sources: Vec<Source>,
    /// Who receives.
    pub targets: Vec<Target>,
    /// Seals that did not complete in time.
    #[serde(default)]
    pub seals_undone: u32,
}

impl Plan {
    /// The bands that change hands, if any do.
    pub fn moving(&self) -> Option<BandRange> {
        let (from, to) = self.growth()?;
        Some(Band::leaving(from, to).into())
    }

    /// The nodes that take part. The sources of a take-over do not.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        let gone = matches!(self.kind, PlanKind::Takeover { .. });
        let sources = self.sources.iter().filter(move |_| !gone).map(|source| source.node);
        sources.chain(self.targets.iter().map(|target| target.node))
    }

    /// The replicas that take part, with their shards. The sources of a take-over do not: they have failed,
    /// or their nodes are gone.
    pub fn members(&self) -> impl Iterator<Item = (ShardId, ReplicaId)> + '_ {
        let gone = matches!(self.kind, PlanKind::Takeover { .. });
        let sources = self.sources.iter().filter(move |_| !gone).map(|source| (source.shard, source.replica));
        sources.chain(self.targets.iter().map(|target| (target.shard, target.replica)))
    }

    /// Shards before and after, of a plan that changes their number.
    pub fn growth(&self) -> Option<(u32, u32)> {
        match self.kind {
            PlanKind::Grow { from, to } => Some((from, to)),
            PlanKind::Replica { .. } | PlanKind::Takeover { .. } | PlanKind::Restore { .. } => None,
        }
    }

    /// True when a target becomes one more member of a shard that exists: it follows the others.
    pub fn adds_member(&self) -> bool {
        matches!(self.kind, PlanKind::Replica { .. } | PlanKind::Takeover { .. })
    }

    /// What the operation is called.
    pub fn name(&self) -> &'static str {
        match self.kind {
            PlanKind::Grow { .. } => "grow",
            PlanKind::Replica { .. } => "replica",
            PlanKind::Takeover { .. } => "takeover",
            PlanKind::Restore { .. } => "restore",
        }
    }
}

/// Seals that may be undone before the plan gives up.
pub const SEALS_UNDONE_MAX: u32 = 20;

/// A node that is away for longer than this aborts a plan that has not committed, and is not waited
/// for by one that has, microseconds.
pub const NODE_AWAY_MAX_US: u64 = 60_000_000;

/// Is the replica in service?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaPhase {
    /// Opening or replaying its log.
    Opening,
    /// A target that is not open yet.
    Building,
    /// Serving what it owns.
    Serving,
    /// Stopped, with the reason.
    Failed(String),
}

/// What a node reports of one of its replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Which opening of it.
    pub incarnation: Incarnation,
    /// The highest catalog version it has obeyed.
    pub version: CatalogVersion,
    /// In service?
    pub phase: ReplicaPhase,
    /// Last synced LSN.
    pub lsn: Lsn,
    /// The bucket's manifests and chunks cover the log up to here.
    pub shipped_lsn: Lsn,
    /// The last manifest in the bucket covers the log up to here.
    pub manifest_lsn: Lsn,
    /// Estimated number of keys.
    pub keys: u64,
    /// Bytes of its SSTs.
    pub bytes: u64,
    /// Its part in the running plan as a source.
    #[serde(default)]
    pub source: Option<SourceProgress>,
    /// Its part in the running plan as a target.
    #[serde(default)]
    pub target: Option<TargetProgress>,
    /// Plans whose quarantined range it has removed.
    #[serde(default)]
    pub cleaned: Vec<PlanId>,
    /// How it stands beside the other replicas of its shard.
    #[serde(default)]
    pub replication: ReplicationReport,
}

impl ReplicaReport {
    /// It answered strict requests when it had obeyed this version or a later one: it holds what the others of its
    /// shard have acknowledged. A node that knows of no authority is taken at its word.
    pub fn has_authority(&self, version: CatalogVersion) -> bool {
        self.version >= version && self.replication.serving != Some(false)
    }

    /// True when it serves nothing any more until somebody acts.
    pub fn has_failed(&self) -> bool {
        matches!(self.phase, ReplicaPhase::Failed(_))
    }
}

/// How a replica stands beside the others of its shard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicationReport {
    /// It has caught up since it was opened and takes requests.
    pub ready: bool,
    /// Synced records of its peers that it has not applied, of the peer where that is most.
    pub lag_lsns: u64,
    /// Age of the oldest of these, milliseconds.
    pub lag_ms: u64,
    /// The version of the hand-over to it under which it holds all that the old primary named.
    pub took_over: Option<CatalogVersion>,
    /// It takes no writes any more, and another member holds everything it has.
    pub drained: bool,
    /// Who those are; a node of an older version does not say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drained_by: Vec<ReplicaId>,
    /// Replicas that left the placement, of which it has taken over what the bucket holds, as far as that
    /// is possible.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub took_from_bucket: Vec<ReplicaId>,
    /// No peer's log reaches back to where it stands: it must be rebuilt.
    pub too_old: bool,
    /// Its log is at the cap because this member does not read it.
    pub evict: Option<ReplicaId>,
    /// It has authority: it answers strict requests. `None` from a node that knows of no such thing.
    #[serde(default)]
    pub serving: Option<bool>,
    /// Its writer does not come back from the disk, or did not a moment ago.
    #[serde(default)]
    pub stalled: bool,
    /// For how long it has been serving in the place of the primary, milliseconds.
    #[serde(default)]
    pub acting_ms: u64,
    /// It has failed for want of disk or descriptors, a moment ago: it may open again by itself.
    pub passing: bool,
}

/// A durable seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The version that asked for it.
    pub version: CatalogVersion,
    /// The LSN of the seal record: no record after it touches the range.
    pub lsn: Lsn,
}

/// What a source has done for a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceProgress {
    /// Which plan.
    pub plan: PlanId,
    /// The checkpoint it made.
    #[serde(default)]
    pub manifest: Option<PinnedManifest>,
    /// The seal, once durable.
    #[serde(default)]
    pub sealed: Option<Sealed>,
    /// It has obeyed the commit: what waited was sent on.
    #[serde(default)]
    pub released: bool,
    /// How long writes of the moving range waited, microseconds; the pause itself first.
    #[serde(default)]
    pub pauses_us: Vec<u64>,
    /// It cannot go on.
    #[serde(default)]
    pub failed: Option<String>,
}

/// What a target is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetStage {
    /// Taking objects from the bucket.
    Downloading,
    /// Rewriting and ingesting.
    Rewriting,
    /// Following the sources' logs.
    Tailing,
    /// Serving.
    Open,
}

/// What a target has done for a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetProgress {
    /// Which plan.
    pub plan: PlanId,
    /// What it is busy with.
    pub stage: TargetStage,
    /// Per source replica: everything that concerns this target up to the LSN is durable here.
    #[serde(default)]
    pub cursors: BTreeMap<ReplicaId, Lsn>,
    /// Log records that the sources had and it had not, at the last look.
    pub lag_lsns: u64,
    /// Bytes to take from the bucket.
    pub bytes_total: u64,
    /// Bytes taken so far.
    pub bytes_done: u64,
    /// Keys that moved, the tail's not counted.
    pub keys_moved: u64,
    /// Bytes of the ingested SSTs.
    pub bytes_moved: u64,
    /// Body bytes of every GET.
    pub bytes_from_bucket: u64,
    /// Number of GETs.
    pub objects_read: u64,
    /// Bytes of log records streamed by nodes.
    pub bytes_from_peers: u64,
    /// Its own first manifest is in the bucket and covers the ingest.
    pub manifest_shipped: bool,
    /// Whose log it has read out of the bucket, and up to where.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<(ReplicaId, Lsn)>,
    /// It cannot go on.
    #[serde(default)]
    pub failed: Option<String>,
}

impl TargetProgress {
    /// Nothing done yet.
    pub fn new(plan: PlanId) -> Self {
        Self {
            plan,
            stage: TargetStage::Downloading,
            cursors: BTreeMap::new(),
            lag_lsns: 0,
            bytes_total: 0,
            bytes_done: 0,
            keys_moved: 0,
            bytes_moved: 0,
            bytes_from_bucket: 0,
            objects_read: 0,
            bytes_from_peers: 0,
            manifest_shipped: false,
            reached: Vec::new(),
            failed: None,
        }
    }
}

/// Percentiles of how long writes of moving keys waited, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PauseMs {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Longest.
    pub max: f64,
}

impl PauseMs {
    /// Percentiles of microsecond samples; all zero when there are none.
    pub fn of(mut samples_us: Vec<u64>) -> Self {
        samples_us.sort_unstable();
        let at = |fraction: f64| match samples_us.len() {
            0 => 0.0,
            n => samples_us[((n as f64 * fraction).ceil() as usize).clamp(1, n) - 1] as f64 / 1000.0,
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It took effect.
    Done,
    /// It was undone; nothing changed.
    Aborted,
}

/// A finished operation, as `vasto keyspace resize` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationReport {
    /// `op-<keyspace id>-<plan id>`.
    pub id: String,
    /// `grow`.
    pub kind: String,
    /// Name of the keyspace.
    pub keyspace: String,
    /// Shards before.
    pub from: u32,
    /// Shards after.
    pub to: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was aborted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Keys that moved, the tail's not counted.
    pub keys_moved: u64,
    /// Compressed bytes of the SSTs that the targets hold for them.
    pub bytes_moved: u64,
    /// Body bytes of every GET of the operation.
    pub bytes_from_bucket: u64,
    /// Bytes of log records streamed by nodes.
    pub bytes_from_peers: u64,
    /// GETs of the operation.
    pub objects_read: u64,
    /// How long writes of moving keys waited.
    pub write_pause_ms: PauseMs,
    /// From start to finish.
    pub duration_ms: u64,
    /// Microseconds since 1970.
    pub started_at_us: u64,
    /// Up to where the bucket held the log of what was taken over from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<Reached>,
    /// Copies that were placed, of an operation that consists of several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub copies: u64,
    /// The shard, of an operation that concerns one alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardId>,
    /// The nodes on which it failed: the next attempt is made elsewhere, if there is somebody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_on: Vec<NodeId>,
}

impl Eq for OperationReport {}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl OperationReport {
    /// True when it made, or was to make, one more member of a shard.
    pub fn is_copy(&self) -> bool {
        matches!(self.kind.as_str(), "replica" | "takeover")
    }

    /// When it ended, microseconds since 1970.
    pub fn ended_at_us(&self) -> u64 {
        self.started_at_us.saturating_add(self.duration_ms.saturating_mul(1000))
    }
}

/// The end of a log in the bucket: what came behind it is not in what was made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The shard.
    pub shard: ShardId,
    /// Whose log.
    pub replica: ReplicaId,
    /// Its last record that was read.
    pub lsn: Lsn,
}

/// The id of an operation, as people and scripts see it.
pub fn operation_id(keyspace: KeyspaceId, plan: PlanId) -> String {
    format!("op-{keyspace}-{plan}")
}

/// Why a grow is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The count is not legal.
    #[error(transparent)]
    Count(#[from] ShardCountError),
    /// Nothing to do.
    #[error("the keyspace already has {0} shards")]
    SameCount(u32),
    /// Shrinking is not there yet.
    #[error("shrinking from {from} to {to} shards is not supported yet; ask for more shards, not fewer")]
    Shrink {
        /// Shards now.
        from: u32,
        /// Shards asked for.
        to: u32,
    },
    /// Only one-step grows so far.
    #[error("growing from {from} to {to} shards at once is not supported yet; grow to {next} first")]
    ManySteps {
        /// Shards now.
        from: u32,
        /// Shards asked for.
        to: u32,
        /// What is possible.
        next: u32,
    },
    /// Growing above 64 is not there yet.
    #[error("growing above 64 shards is not supported yet")]
    Above64,
    /// One plan at a time.
    #[error(
        "operation {0} is running on this keyspace; wait for it (`vasto operation show {0}`) or cancel it (`vasto operation cancel {0}`)"
    )]
    Busy(String),
    /// It was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
    /// Nobody could take the new shard.
    #[error("the new shard needs {0} live nodes with room for it; start more with `vasto serve node`")]
    NoNode(u32),
    /// A replica has not been drained.
    #[error(
        "replica {0} of shard {1} has left its placement and may hold writes that nobody else has; start its node so that it is drained, or give up what {2} alone holds with `vasto node replace {2} --accept-loss --yes`"
    )]
    Unsealed(ReplicaId, ShardId, NodeId),
}

/// The version that starts growing `catalog` to `to` shards with the replicas of the new shard on
/// `target_nodes`, the home of its primary first.
pub fn start_grow(
    catalog: &Catalog,
    to: u32,
    target_nodes: &[NodeId],
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PlanError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(PlanError::Deleted);
    }
    check_shard_count(to)?;
    let from = catalog.spec.shards;
    if to == from {
        return Err(PlanError::SameCount(from));
    }
    if to < from {
        return Err(PlanError::Shrink { from, to });
    }
    if let Some(plan) = &catalog.plan {
        return Err(PlanError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    if from >= 64 {
        return Err(PlanError::Above64);
    }
    if to != from + 1 {
        return Err(PlanError::ManySteps { from, to, next: from + 1 });
    }
    if let Some(one) = catalog.unsealed.first() {
        return Err(PlanError::Unsealed(one.replica, one.shard, one.node));
    }
    if target_nodes.len() != catalog.spec.replicas as usize {
        return Err(PlanError::NoNode(catalog.spec.replicas));
    }
    let mut next = catalog.next(now_us, nonce);
    let sources = catalog
        .placement
        .iter()
        .filter_map(|shard| Some((shard.shard, shard.shipper()?)))
        .map(|(shard, one)| Source { shard, replica: one.replica, node: one.node, manifest: None })
        .collect();
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind: PlanKind::Grow { from, to },
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        step: Step::Prepare,
        sources,
        targets: target_nodes
            .iter()
            .zip(catalog.next_replica.0..)
            .map(|(node, id)| Target { shard: ShardId(from), replica: ReplicaId(id), node: *node })
            .collect(),
        seals_undone: 0,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    next.next_replica = ReplicaId(catalog.next_replica.0 + target_nodes.len() as u64);
    Ok(next)
}

/// The version that undoes a plan that has not committed.
pub fn abort(catalog: &Catalog, reason: &str, reports: &Reports, now_us: u64, nonce: u64) -> Option<Catalog> {
    let plan = catalog.plan.as_ref().filter(|plan| plan.step != Step::Committed)?;
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.pins.clear();
    next.remember(report_of(catalog, plan, reports, Outcome::Aborted, Some(reason.to_owned()), now_us));
    if plan.moving().is_some() {
        // Their stale copies of somebody else's rows must not come back with a restore.
        next.discarded.extend(plan.targets.iter().map(|target| target.replica));
    }
    if matches!(plan.kind, PlanKind::Restore { .. }) {
        // Half a keyspace must never be taken for a whole one.
        next.state = KeyspaceState::Deleted;
        next.epoch = Epoch(catalog.epoch.0 + 1);
    }
    Some(next)
}

/// The newest report of each replica of the keyspace.
pub type Reports = BTreeMap<ReplicaId, ReplicaReport>;

/// What the driver does now.
#[derive(Debug, Clone, PartialEq)]
pub enum Advance {
    /// There is nothing to do.
    Idle,
    /// Nothing can be decided yet; the text says what is missing.
    Wait(String),
    /// This version comes next.
    Write(Box<Catalog>),
}

/// Decides the next catalog version of a keyspace.
///
/// `away_us` answers how long a node has been unreachable (0 for a live one), `here_us` how long a live one
/// has been there.
pub fn advance(
    catalog: &Catalog,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    match &catalog.plan {
        Some(plan) => advance_plan(catalog, plan, reports, away_us, here_us, now_us, nonce),
        None => advance_quarantines(catalog, reports, now_us, nonce),
    }
}

/// The placed replicas of the sources' shards that are no sources themselves: they seal too.
fn others_of_sources(catalog: &Catalog, plan: &Plan) -> Vec<(ShardId, Placed)> {
    if plan.moving().is_none() {
        return Vec::new();
    }
    let is_source = |id: ReplicaId| plan.sources.iter().any(|source| source.replica == id);
    let shards = catalog.placement.iter().filter(|shard| plan.sources.iter().any(|one| one.shard == shard.shard));
    shards
        .flat_map(|shard| shard.replicas.iter().map(|one| (shard.shard, *one)))
        .filter(|(_, one)| !is_source(one.replica))
        .collect()
}

/// The one target of each shard that ships: the first.
fn shipping_targets(plan: &Plan) -> impl Iterator<Item = &Target> {
    plan.targets.iter().enumerate().filter_map(|(index, target)| {
        let first = plan.targets.iter().position(|one| one.shard == target.shard);
        (first == Some(index)).then_some(target)
    })
}

fn source_progress<'a>(plan: &Plan, replica: ReplicaId, reports: &'a Reports) -> Option<&'a SourceProgress> {
    reports.get(&replica)?.source.as_ref().filter(|progress| progress.plan == plan.id)
}

fn target_progress<'a>(plan: &Plan, replica: ReplicaId, reports: &'a Reports) -> Option<&'a TargetProgress> {
    reports.get(&replica)?.target.as_ref().filter(|progress| progress.plan == plan.id)
}

fn advance_plan(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    let abort_with = |reason: String| match abort(catalog, &reason, reports, now_us, nonce) {
        Some(next) => Advance::Write(Box::new(next)),
        None => Advance::Wait(reason),
    };
    if plan.step != Step::Committed {
        let failed = plan
            .sources
            .iter()
            .filter_map(|source| source_progress(plan, source.replica, reports)?.failed.clone())
            .chain(
                plan.targets.iter().filter_map(|target| target_progress(plan, target.replica, reports)?.failed.clone()),
            )
            .next();
        if let Some(reason) = failed {
            return abort_with(reason);
        }
        match returned(plan, reports, &away_us) {
            Some(Returned::Serves(replica, node)) => {
                return abort_with(format!("replica {replica} is back on {node} and serves; it is copied instead"));
            }
            Some(Returned::NotYet(replica, node)) => {
                return Advance::Wait(format!("{node}, which is back, to open replica {replica} or to fail to"));
            }
            None => {}
        }
        let others = others_of_sources(catalog, plan);
        for (shard, replica) in plan.members().chain(others.iter().map(|(shard, one)| (*shard, one.replica))) {
            if let Some(ReplicaPhase::Failed(reason)) = reports.get(&replica).map(|report| &report.phase) {
                return abort_with(format!("the replica of shard {shard} has failed: {reason}"));
            }
        }
        let nodes: Vec<NodeId> = plan.nodes().chain(others.iter().map(|(_, one)| one.node)).collect();
        for node in nodes.iter().copied() {
            if away_us(node) > NODE_AWAY_MAX_US {
                return abort_with(format!("node {node} has been away for {} s", away_us(node) / 1_000_000));
            }
        }
        // The last report of a node that is away says nothing about now.
        if plan.step == Step::Tail
            && let Some(node) = nodes.into_iter().find(|node| away_us(*node) > 0)
        {
            return Advance::Wait(format!("node {node} to come back"));
        }
    }
    match plan.step {
        Step::Tail if plan.adds_member() => advance_copy(catalog, plan, reports, here_us, now_us, nonce),
        Step::Tail if matches!(plan.kind, PlanKind::Restore { .. }) => {
            advance_restore(catalog, plan, reports, now_us, nonce)
        }
        Step::Prepare => advance_prepare(catalog, plan, reports, now_us, nonce),
        Step::Tail => advance_tail(catalog, plan, reports, here_us, now_us, nonce),
        Step::Sealing => advance_sealing(catalog, plan, reports, now_us, nonce).unwrap_or_else(|| {
            if plan.seals_undone >= SEALS_UNDONE_MAX {
                return abort_with(format!(
                    "the seal did not complete within {SEAL_TIMEOUT:?}, {SEALS_UNDONE_MAX} times"
                ));
            }
            Advance::Write(Box::new(undo_seal(catalog, plan, now_us, nonce)))
        }),
        Step::Committed => advance_committed(catalog, plan, reports, away_us, now_us, nonce),
    }
}

/// A replica that a take-over was to take the place of, and whose node is back.
enum Returned {
    Serves(ReplicaId, NodeId),
    NotYet(ReplicaId, NodeId),
}

/// What was given up may come back before its place is taken: it holds what the bucket does not, and may
/// have taken writes since. That it has failed is why it was given up.
fn returned(plan: &Plan, reports: &Reports, away_us: impl Fn(NodeId) -> u64) -> Option<Returned> {
    let given_up = plan.sources.iter().filter(|_| matches!(plan.kind, PlanKind::Takeover { .. }));
    let live = given_up.filter(|source| away_us(source.node) == 0);
    let states = live.filter_map(|source| match reports.get(&source.replica) {
        Some(report) if report.has_failed() => None,
        Some(report) if report.replication.ready => Some(Returned::Serves(source.replica, source.node)),
        _ => Some(Returned::NotYet(source.replica, source.node)),
    });
    // One that serves decides, whatever the others do.
    states.min_by_key(|state| matches!(state, Returned::NotYet(..)))
}

/// A copy has no seal: it is placed once it follows the others closely.
fn advance_copy(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    for target in &plan.targets {
        let Some(progress) = target_progress(plan, target.replica, reports) else {
            let what = format!("the copy on {}", target.node);
            return wait_to_begin(catalog, target, reports, what, here_us(target.node), now_us, nonce);
        };
        if progress.stage != TargetStage::Tailing || progress.lag_lsns > TAIL_LAG_LSNS_MAX {
            return Advance::Wait(format!("the copy of shard {} to catch up", target.shard));
        }
    }
    Advance::Write(Box::new(commit(catalog, plan, reports, now_us, nonce)))
}

/// A node that is there and begins nothing cannot: its disk may not even take the version. One that has only
/// just come back, or opens what it has, says nothing of it yet.
fn wait_to_begin(
    catalog: &Catalog,
    target: &Target,
    reports: &Reports,
    what: String,
    here_us: u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    let opens = reports.get(&target.replica).is_some_and(|report| report.phase == ReplicaPhase::Opening);
    let silent_us = now_us.saturating_sub(catalog.written_at_us).min(here_us);
    if opens || silent_us <= TARGET_SILENT_MAX.as_micros() as u64 {
        return Advance::Wait(what);
    }
    let reason = format!("{} has not begun within {} s; its log says why", target.node, TARGET_SILENT_MAX.as_secs());
    match give_up_on(catalog, &reason, target.node, reports, now_us, nonce) {
        Some(next) => Advance::Write(Box::new(next)),
        None => Advance::Wait(what),
    }
}

/// As [`abort`], because of one node: the next attempt is made elsewhere, if there is somebody.
pub fn give_up_on(
    catalog: &Catalog,
    reason: &str,
    node: NodeId,
    reports: &Reports,
    now_us: u64,
    nonce: u64,
) -> Option<Catalog> {
    let mut next = abort(catalog, reason, reports, now_us, nonce)?;
    if let Some(report) = next.operations.last_mut() {
        report.failed_on = vec![node];
    }
    Some(next)
}

/// A restored keyspace is done when every shard is open and has a checkpoint of its own in the bucket:
/// until then garbage collection keeps all of the source, whose objects these checkpoints name.
fn advance_restore(catalog: &Catalog, plan: &Plan, reports: &Reports, now_us: u64, nonce: u64) -> Advance {
    for target in &plan.targets {
        let Some(progress) = target_progress(plan, target.replica, reports) else {
            return Advance::Wait(format!("shard {} to be restored", target.shard));
        };
        if progress.stage != TargetStage::Open {
            return Advance::Wait(format!("shard {} to be restored", target.shard));
        }
        if !progress.manifest_shipped {
            return Advance::Wait(format!("the first manifest of shard {}", target.shard));
        }
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.remember(report_of(catalog, plan, reports, Outcome::Done, None, now_us));
    Advance::Write(Box::new(next))
}

fn advance_prepare(catalog: &Catalog, plan: &Plan, reports: &Reports, now_us: u64, nonce: u64) -> Advance {
    let mut next_plan = plan.clone();
    for source in &mut next_plan.sources {
        match source_progress(plan, source.replica, reports).and_then(|progress| progress.manifest.clone()) {
            Some(manifest) => source.manifest = Some(manifest),
            None => return Advance::Wait(format!("the checkpoint of shard {}", source.shard)),
        }
    }
    next_plan.step = Step::Tail;
    let mut next = catalog.next(now_us, nonce);
    next.pins = next_plan.sources.iter().filter_map(|source| Some(source.manifest.as_ref()?.key.clone())).collect();
    next.plan = Some(next_plan);
    Advance::Write(Box::new(next))
}

fn advance_tail(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    here_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    for target in &plan.targets {
        let Some(progress) = target_progress(plan, target.replica, reports) else {
            let what = format!("the target on {}", target.node);
            return wait_to_begin(catalog, target, reports, what, here_us(target.node), now_us, nonce);
        };
        if progress.stage != TargetStage::Tailing {
            return Advance::Wait(format!("shard {} to load its bands", target.shard));
        }
        if !progress.manifest_shipped && shipping_targets(plan).any(|one| one.replica == target.replica) {
            return Advance::Wait(format!("the first manifest of shard {}", target.shard));
        }
        if progress.lag_lsns > TAIL_LAG_LSNS_MAX {
            return Advance::Wait(format!("shard {} to catch up ({} records behind)", target.shard, progress.lag_lsns));
        }
    }
    // After an undone seal the next one waits a little longer each time.
    let pause_us = u64::from(plan.seals_undone) * 250_000;
    if now_us < catalog.written_at_us + pause_us {
        return Advance::Wait("the pause after an undone seal".into());
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan { step: Step::Sealing, ..plan.clone() });
    Advance::Write(Box::new(next))
}

/// `None` when the seal took too long.
fn advance_sealing(catalog: &Catalog, plan: &Plan, reports: &Reports, now_us: u64, nonce: u64) -> Option<Advance> {
    match sealed_and_caught_up(catalog, plan, reports) {
        Ok(()) => Some(Advance::Write(Box::new(commit(catalog, plan, reports, now_us, nonce)))),
        Err(_) if now_us.saturating_sub(catalog.written_at_us) > SEAL_TIMEOUT.as_micros() as u64 => None,
        Err(missing) => Some(Advance::Wait(missing)),
    }
}

/// Every placed replica of the sources' shards has sealed under this very version, and every target
/// holds each source's log up to where it holds all that they had accepted.
fn sealed_and_caught_up(catalog: &Catalog, plan: &Plan, reports: &Reports) -> Result<(), String> {
    let seal_of = |shard: ShardId, replica: ReplicaId| {
        source_progress(plan, replica, reports)
            .and_then(|progress| progress.sealed)
            .filter(|sealed| sealed.version == catalog.version)
            .ok_or_else(|| format!("replica {replica} of shard {shard} to seal"))
    };
    for (shard, one) in others_of_sources(catalog, plan) {
        seal_of(shard, one.replica)?;
    }
    for source in &plan.sources {
        let sealed = seal_of(source.shard, source.replica)?;
        for target in &plan.targets {
            let cursor = target_progress(plan, target.replica, reports)
                .and_then(|progress| progress.cursors.get(&source.replica).copied())
                .unwrap_or_default();
            if cursor < sealed.lsn {
                return Err(format!("shard {} to reach the seal of shard {}", target.shard, source.shard));
            }
        }
    }
    Ok(())
}

/// The version that goes back from `sealing` to `tail`: the seal did not complete in time, or its
/// version took too long to write for writers to be paused under it.
pub fn undo_seal(catalog: &Catalog, plan: &Plan, now_us: u64, nonce: u64) -> Catalog {
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan { step: Step::Tail, seals_undone: plan.seals_undone + 1, ..plan.clone() });
    next
}

fn commit(catalog: &Catalog, plan: &Plan, reports: &Reports, now_us: u64, nonce: u64) -> Catalog {
    let mut next = catalog.next(now_us, nonce);
    next.epoch = Epoch(catalog.epoch.0 + 1);
    if let Some((_, to)) = plan.growth() {
        next.spec.shards = to;
    }
    for target in &plan.targets {
        let placed = Placed { replica: target.replica, node: target.node };
        match next.placement.iter_mut().find(|shard| shard.shard == target.shard) {
            Some(shard) => {
                shard.replicas.push(placed);
                if matches!(plan.kind, PlanKind::Takeover { .. }) {
                    let gone = plan.sources.iter().map(|source| source.replica);
                    for gone in gone.clone() {
                        leave_quarantines(&mut next.quarantines, gone, Some(target.replica));
                    }
                    leave(shard, &mut next.unsealed, gone, now_us);
                }
            }
            None => next.placement.push(ShardPlacement::new(target.shard, vec![placed])),
        }
    }
    next.placement.sort_by_key(|shard| shard.shard);
    next.quarantines.extend(plan.moving().map(|range| {
        Quarantine {
            plan: plan.id,
            range,
            replicas: plan
                .sources
                .iter()
                .map(|source| source.replica)
                .chain(others_of_sources(catalog, plan).into_iter().map(|(_, one)| one.replica))
                .collect(),
            targets: shipping_targets(plan)
                .map(|target| {
                    (target.replica, reports.get(&target.replica).map(|report| report.lsn).unwrap_or_default())
                })
                .collect(),
            until_us: now_us + catalog.spec.quarantine_ms * 1000,
            dropping: false,
        }
    }));
    next.plan = Some(Plan { step: Step::Committed, ..plan.clone() });
    next
}

/// Ends a plan that has committed. Who is away for long, or has failed, obeys the newest version once
/// it is there again: it opens or gives away then, and sends on what waited.
fn advance_committed(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    away_us: impl Fn(NodeId) -> u64,
    now_us: u64,
    nonce: u64,
) -> Advance {
    let is_out = |replica: ReplicaId, node: NodeId| {
        away_us(node) > NODE_AWAY_MAX_US || reports.get(&replica).is_some_and(ReplicaReport::has_failed)
    };
    for target in plan.targets.iter().filter(|target| !is_out(target.replica, target.node)) {
        if target_progress(plan, target.replica, reports).is_none_or(|progress| progress.stage != TargetStage::Open) {
            return Advance::Wait(format!("shard {} to open", target.shard));
        }
    }
    let giving = plan.sources.iter().filter(|_| plan.moving().is_some());
    let sources = giving.map(|source| (source.shard, source.replica, source.node));
    let others = others_of_sources(catalog, plan).into_iter().map(|(shard, one)| (shard, one.replica, one.node));
    for (shard, replica, _) in sources.chain(others).filter(|(_, replica, node)| !is_out(*replica, *node)) {
        if source_progress(plan, replica, reports).is_none_or(|progress| !progress.released) {
            return Advance::Wait(format!("replica {replica} of shard {shard} to release its writers"));
        }
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = None;
    next.pins.clear();
    next.remember(report_of(catalog, plan, reports, Outcome::Done, None, now_us));
    Advance::Write(Box::new(next))
}

fn advance_quarantines(catalog: &Catalog, reports: &Reports, now_us: u64, nonce: u64) -> Advance {
    let mut next = catalog.next(now_us, nonce);
    let mut changed = false;
    let mut waiting = None;
    next.quarantines.retain_mut(|quarantine| {
        if quarantine.dropping {
            let cleaned = |replica: &ReplicaId| {
                reports.get(replica).is_some_and(|report| report.cleaned.contains(&quarantine.plan))
            };
            if quarantine.replicas.iter().all(cleaned) {
                changed = true;
                return false;
            }
            waiting = Some("moved ranges to be removed");
        } else if now_us >= quarantine.until_us {
            let covered = |(replica, lsn): &(ReplicaId, Lsn)| {
                reports.get(replica).is_some_and(|report| report.manifest_lsn >= *lsn)
            };
            if quarantine.targets.iter().all(covered) {
                quarantine.dropping = true;
                changed = true;
            } else {
                waiting = Some("a manifest that covers the moved range");
            }
        }
        true
    });
    match waiting {
        _ if changed => Advance::Write(Box::new(next)),
        Some(what) => Advance::Wait(what.into()),
        None => Advance::Idle,
    }
}

/// Did the plan fail because of this target?
fn failed_at(plan: &Plan, target: &Target, reports: &Reports) -> bool {
    let Some(report) = reports.get(&target.replica) else { return false };
    report.has_failed()
        || target_progress(plan, target.replica, reports).is_some_and(|progress| progress.failed.is_some())
}

/// The figures of a plan so far.
pub fn report_of(
    catalog: &Catalog,
    plan: &Plan,
    reports: &Reports,
    outcome: Outcome,
    reason: Option<String>,
    now_us: u64,
) -> OperationReport {
    let (from, to) = plan.growth().unwrap_or((catalog.spec.shards, catalog.spec.shards));
    let targets: Vec<&TargetProgress> =
        plan.targets.iter().filter_map(|target| target_progress(plan, target.replica, reports)).collect();
    let sum = |field: fn(&TargetProgress) -> u64| targets.iter().map(|progress| field(progress)).sum();
    let pauses = plan
        .sources
        .iter()
        .filter_map(|source| source_progress(plan, source.replica, reports))
        .flat_map(|progress| progress.pauses_us.iter().copied())
        .collect();
    OperationReport {
        id: operation_id(catalog.keyspace, plan.id),
        kind: plan.name().into(),
        keyspace: catalog.name.clone(),
        from,
        to,
        outcome,
        reason,
        keys_moved: sum(|progress| progress.keys_moved),
        bytes_moved: sum(|progress| progress.bytes_moved),
        bytes_from_bucket: sum(|progress| progress.bytes_from_bucket),
        bytes_from_peers: sum(|progress| progress.bytes_from_peers),
        objects_read: sum(|progress| progress.objects_read),
        write_pause_ms: PauseMs::of(pauses),
        duration_ms: now_us.saturating_sub(plan.started_at_us) / 1000,
        started_at_us: plan.started_at_us,
        reached: plan
            .targets
            .iter()
            .filter_map(|target| Some((target.shard, target_progress(plan, target.replica, reports)?)))
            .flat_map(|(shard, progress)| progress.reached.iter().map(move |one| (shard, *one)))
            .map(|(shard, (replica, lsn))| Reached { shard, replica, lsn })
            .collect(),
        copies: 0,
        shard: match plan.kind {
            PlanKind::Replica { shard } | PlanKind::Takeover { shard } => Some(shard),
            PlanKind::Grow { .. } | PlanKind::Restore { .. } => None,
        },
        failed_on: plan
            .targets
            .iter()
            .filter(|one| outcome == Outcome::Aborted && failed_at(plan, one, reports))
            .map(|one| one.node)
            .collect(),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
