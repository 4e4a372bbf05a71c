//! What a node of a crowd has and knows, and what it reports of that.
//!
//! **Invariant:** pure: time is an argument, and nothing is sent or waited for here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{Incarnation, KeyspaceId, Lsn, NodeId, ReplicaId, ShardId};
use vasto_core::plan::{PinnedManifest, Plan, Step};
use vasto_core::report::{
    ReplicaPhase, ReplicaReport, ReplicationReport, SourceProgress, TargetProgress, TargetStage,
};

use super::Traffic;

/// Time that a replica takes to open.
const OPENS_WITHIN: Duration = Duration::from_millis(30);
/// Bytes of every replica.
const BYTES: u64 = 64 << 20;

type Key = (KeyspaceId, ReplicaId);

/// A replica that the node has.
#[derive(Debug, Clone, Copy)]
struct Hosted {
    since: Instant,
    /// When it has loaded what a plan gives it; `None` of one that nothing was given, or not yet.
    loaded_at: Option<Instant>,
    /// It has been placed: only a version that removes it takes it away.
    placed: bool,
}

/// A node's memory.
#[derive(Debug)]
pub(super) struct Known {
    node: NodeId,
    copy_takes: Duration,
    pub(super) catalogs: BTreeMap<KeyspaceId, Arc<Catalog>>,
    hosted: BTreeMap<Key, Hosted>,
    /// Keyspaces of which something may have to be reported.
    dirty: BTreeSet<KeyspaceId>,
    /// When something of a keyspace is over: an opening, a load.
    due: BTreeSet<(Instant, KeyspaceId)>,
    /// The reports of this session.
    last: HashMap<Key, ReplicaReport>,
    /// By keyspace, the replicas that plans make here now.
    copies: BTreeMap<KeyspaceId, usize>,
    pub(super) most_copies: usize,
    pub(super) traffic: Traffic,
}

impl Known {
    pub(super) fn new(node: NodeId, copy_takes: Duration) -> Self {
        Self {
            node,
            copy_takes,
            catalogs: BTreeMap::new(),
            hosted: BTreeMap::new(),
            dirty: BTreeSet::new(),
            due: BTreeSet::new(),
            last: HashMap::new(),
            copies: BTreeMap::new(),
            most_copies: 0,
            traffic: Traffic::default(),
        }
    }

    /// Begins a session: everything is reported again.
    pub(super) fn begin_session(&mut self) {
        self.last.clear();
        self.look_at_all();
    }

    /// Looks at all keyspaces again: other nodes were lost.
    pub(super) fn look_at_all(&mut self) {
        self.dirty.extend(self.catalogs.keys().copied());
    }

    /// Looks at what is under construction again: it may have come further.
    pub(super) fn look_at_copies(&mut self) {
        self.dirty.extend(self.copies.keys().copied());
    }

    /// Returns the replicas that the node has.
    pub(super) fn replicas(&self) -> BTreeSet<Key> {
        self.hosted.keys().copied().collect()
    }

    /// Takes a version, unless a higher one is known.
    pub(super) fn learn(&mut self, catalog: Arc<Catalog>, now: Instant) {
        let id = catalog.keyspace;
        if self.catalogs.get(&id).is_some_and(|known| known.version > catalog.version) {
            return;
        }
        let members = catalog.members_on(self.node);
        self.hosted.retain(|(keyspace, replica), hosted| {
            let is_member = || members.iter().any(|(_, member, _)| member == replica);
            let stays = || {
                let active = catalog.state == KeyspaceState::Active;
                hosted.placed && active && !catalog.is_removed(*replica)
            };
            *keyspace != id || is_member() || stays()
        });
        let mut copies = 0;
        for (_, replica, placed) in members {
            let key = (id, replica);
            if !self.hosted.contains_key(&key) {
                self.due.insert((now + OPENS_WITHIN, id));
            }
            let new = Hosted { since: now, loaded_at: None, placed: false };
            let hosted = self.hosted.entry(key).or_insert(new);
            hosted.placed |= placed;
            let Some(plan) = making(&catalog, replica) else { continue };
            copies += usize::from(matches!(plan.step, Step::Prepare | Step::Tail));
            if plan.step == Step::Tail && hosted.loaded_at.is_none() {
                let loaded_at = now + self.copy_takes;
                hosted.loaded_at = Some(loaded_at);
                self.due.insert((loaded_at, id));
            }
        }
        match copies {
            0 => self.copies.remove(&id),
            _ => self.copies.insert(id, copies),
        };
        let all_copies: usize = self.copies.values().sum();
        self.most_copies = self.most_copies.max(all_copies);
        self.catalogs.insert(id, catalog);
        self.dirty.insert(id);
    }

    /// Returns when something is over that has to be reported.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Returns the JSON of the replicas of which there is something new; `lost` are the nodes that
    /// cannot be reached.
    pub(super) fn due_reports(&mut self, lost: &BTreeSet<NodeId>, now: Instant) -> Vec<String> {
        while let Some((at, keyspace)) = self.due.first().copied().filter(|(at, _)| *at <= now) {
            self.due.remove(&(at, keyspace));
            self.dirty.insert(keyspace);
        }
        let mut texts = Vec::new();
        for id in std::mem::take(&mut self.dirty) {
            let Some(catalog) = self.catalogs.get(&id).cloned() else { continue };
            for (shard, replica, placed) in catalog.members_on(self.node) {
                let report = self.report_of(&catalog, shard, (replica, placed), lost, now);
                let key = (id, replica);
                if self.last.get(&key) != Some(&report) {
                    texts.push(serde_json::to_string(&report).expect("it is plain data"));
                    self.last.insert(key, report);
                }
            }
        }
        self.traffic.sent += texts.iter().map(|text| text.len() as u64).sum::<u64>();
        texts
    }

    fn report_of(
        &self,
        catalog: &Catalog,
        shard: ShardId,
        (replica, placed): (ReplicaId, bool),
        lost: &BTreeSet<NodeId>,
        now: Instant,
    ) -> ReplicaReport {
        let hosted = self.hosted.get(&(catalog.keyspace, replica));
        let is_open = hosted.is_some_and(|hosted| now >= hosted.since + OPENS_WITHIN);
        let phase = match (placed, is_open) {
            (true, true) => ReplicaPhase::Serving,
            (true, false) => ReplicaPhase::Opening,
            (false, _) => ReplicaPhase::Building,
        };
        let is_ready = phase == ReplicaPhase::Serving;
        let loaded_at = hosted.and_then(|hosted| hosted.loaded_at);
        let report = ReplicaReport::new(catalog.keyspace, shard, replica, phase);
        ReplicaReport {
            incarnation: Incarnation(1),
            version: catalog.version,
            lsn: Lsn(100),
            shipped_lsn: Lsn(100),
            manifest_lsn: Lsn(100),
            keys: 1_000,
            bytes: BYTES,
            source: giving(catalog, replica).map(source_of),
            target: making(catalog, replica)
                .map(|plan| target_of(plan, loaded_at, self.copy_takes, now)),
            replication: replication_of(catalog, shard, replica, is_ready, lost),
            ..report
        }
    }
}

/// Returns the plan that makes a replica.
fn making(catalog: &Catalog, replica: ReplicaId) -> Option<&Plan> {
    let plan = catalog.plan_of(replica).filter(|plan| plan.adds_member());
    plan.filter(|plan| plan.targets.iter().any(|target| target.replica == replica))
}

/// Returns the plan that takes the checkpoint of a replica.
fn giving(catalog: &Catalog, replica: ReplicaId) -> Option<&Plan> {
    let plan = catalog.plan_of(replica).filter(|plan| plan.adds_member());
    plan.filter(|plan| plan.sources.iter().any(|source| source.replica == replica))
}

fn source_of(plan: &Plan) -> SourceProgress {
    let manifest = PinnedManifest { key: format!("checkpoint-of-{}", plan.id), lsn: Lsn(100) };
    SourceProgress { manifest: Some(manifest), ..SourceProgress::new(plan.id) }
}

fn target_of(
    plan: &Plan,
    loaded_at: Option<Instant>,
    takes: Duration,
    now: Instant,
) -> TargetProgress {
    let left = loaded_at.map(|at| at.saturating_duration_since(now));
    let (stage, done) = match (plan.step, left) {
        (Step::Committed, _) => (TargetStage::Open, BYTES),
        (Step::Prepare, _) | (_, None) => (TargetStage::Downloading, 0),
        (_, Some(left)) if left.is_zero() => (TargetStage::Tailing, BYTES),
        (_, Some(left)) => {
            let part = 1.0 - left.as_secs_f64() / takes.as_secs_f64();
            (TargetStage::Downloading, (BYTES as f64 * part.clamp(0.0, 1.0)) as u64)
        }
    };
    TargetProgress {
        stage,
        bytes_total: BYTES,
        bytes_done: done,
        keys_moved: 1_000,
        bytes_moved: BYTES,
        bytes_from_bucket: done,
        objects_read: 8,
        manifest_shipped: true,
        ..TargetProgress::new(plan.id)
    }
}

/// Returns what a replica says of the others of its shard: the first that can be reached serves, and
/// what a lost one had shipped was read.
fn replication_of(
    catalog: &Catalog,
    shard: ShardId,
    replica: ReplicaId,
    is_ready: bool,
    lost: &BTreeSet<NodeId>,
) -> ReplicationReport {
    let placement = catalog.shard(shard);
    let order = placement.map(|placement| placement.primary_first()).unwrap_or_default();
    let first = order.iter().find(|member| !lost.contains(&member.node));
    let serves = is_ready && first.is_some_and(|member| member.replica == replica);
    let is_primary = order.first().is_some_and(|member| member.replica == replica);
    let drains = catalog.draining.iter().any(|draining| draining.replica == replica);
    let is_asked = placement.is_some_and(|placement| placement.transferring_to == Some(replica));
    let of_shard = catalog.draining.iter().filter(|draining| draining.shard == shard);
    let read = of_shard.filter(|draining| lost.contains(&draining.node));
    ReplicationReport {
        ready: is_ready,
        serving: Some(serves),
        acting_ms: if serves && !is_primary { 1_000 } else { 0 },
        took_over: is_asked.then_some(catalog.version),
        drained: drains,
        drained_by: match drains {
            true => order.iter().map(|member| member.replica).collect(),
            false => Vec::new(),
        },
        took_from_bucket: match is_ready {
            true => read.map(|draining| draining.replica).collect(),
            false => Vec::new(),
        },
        ..ReplicationReport::default()
    }
}
