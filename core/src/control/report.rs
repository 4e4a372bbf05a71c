//! Reports of replicas: the state of each, and its part in a plan.
//!
//! **Invariant:** a report names the catalog version that the replica has applied; rules count no
//! report that has not reached the version they wait for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::control::plan::PinnedManifest;
use crate::control::stored::Stored;
use crate::ids::{CatalogVersion, Incarnation, KeyspaceId, Lsn, PlanId, ReplicaId, ShardId};
use crate::limits::{ACTING_PRIMARY_AFTER, TAIL_LAG_LSNS_MAX};

/// Phase of a replica.
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

/// What is in the bucket of a replica's log before its own objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShipsBehind {
    /// Nothing: its own objects reach back to its beginning, or to a checkpoint of its own.
    Nobody,
    /// What other replicas of its shard have shipped.
    Others(Continues),
}

/// The place behind which a replica ships.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continues {
    /// The replica whose object was the last one then.
    pub replica: ReplicaId,
    /// That object, by LSNs of that replica: the first record of a chunk, or the last one that a
    /// checkpoint holds.
    pub object: Lsn,
    /// LSN of the reporting replica up to which the others' archives cover its log.
    pub lsn: Lsn,
}

/// Report of a node on one of its replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The highest catalog version it has applied.
    pub version: CatalogVersion,
    /// Its phase.
    pub phase: ReplicaPhase,
    /// Last synced LSN.
    pub lsn: Lsn,
    /// LSN up to which the bucket's manifests and chunks cover the log.
    pub shipped_lsn: Lsn,
    /// LSN up to which the last manifest in the bucket covers the log.
    pub manifest_lsn: Lsn,
    /// Whose archive its own one continues; `None` from a node that does not say, or does not know
    /// any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ships_behind: Option<ShipsBehind>,
    /// Estimated number of keys.
    pub keys: u64,
    /// Bytes of its SSTs.
    pub bytes: u64,
    /// Requests that it answers and records that it takes from others, a second, rounded and
    /// averaged over some time; 0 from a node that does not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub load: u64,
    /// The load is not known yet: the replica was opened a moment ago. False from a node that does
    /// not say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub load_unknown: bool,
    /// Its progress as a source of the running plan.
    #[serde(default)]
    pub source: Option<SourceProgress>,
    /// Its progress as a target of the running plan.
    #[serde(default)]
    pub target: Option<TargetProgress>,
    /// Plans whose quarantined range it has removed.
    #[serde(default)]
    pub cleaned: Vec<PlanId>,
    /// Its replication state among the replicas of its shard.
    #[serde(default)]
    pub replication: ReplicationReport,
    /// Its contents by band, for forecasts. `None` when nothing was measured yet, and in a report
    /// that follows another one with the same contents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
}

impl ReplicaReport {
    /// Creates the report of a replica that has done nothing yet: every figure is 0, every list is
    /// empty.
    pub fn new(
        keyspace: KeyspaceId,
        shard: ShardId,
        replica: ReplicaId,
        phase: ReplicaPhase,
    ) -> Self {
        Self {
            keyspace,
            shard,
            replica,
            incarnation: Incarnation(0),
            version: CatalogVersion(0),
            phase,
            lsn: Lsn(0),
            shipped_lsn: Lsn(0),
            manifest_lsn: Lsn(0),
            ships_behind: None,
            keys: 0,
            bytes: 0,
            load: 0,
            load_unknown: false,
            source: None,
            target: None,
            cleaned: Vec::new(),
            replication: ReplicationReport::default(),
            stored: None,
        }
    }

    /// Returns true when the replica answered strict requests while it had applied this version or
    /// a later one: it holds everything that the others of its shard have acknowledged. A node that
    /// does not know authority is trusted.
    pub fn has_authority(&self, version: CatalogVersion) -> bool {
        self.version >= version && self.replication.serving != Some(false)
    }

    /// Returns true when the replica has failed and serves nothing any more.
    pub fn has_failed(&self) -> bool {
        matches!(self.phase, ReplicaPhase::Failed(_))
    }

    /// Returns true when a rule may decide otherwise by this report than by an earlier one of the
    /// same replica. What changes with every write does not count: positions in logs, sizes and
    /// rates. Only plans and quarantines wait for these. Nor does what only the check of the bucket
    /// asks for.
    pub fn is_news_after(&self, earlier: &Self) -> bool {
        let Self {
            keyspace,
            shard,
            replica,
            incarnation,
            version,
            phase,
            lsn: _,
            shipped_lsn: _,
            manifest_lsn: _,
            ships_behind: _,
            keys: _,
            bytes: _,
            load: _,
            load_unknown: _,
            source,
            target,
            cleaned,
            replication,
            stored: _,
        } = self;
        *keyspace != earlier.keyspace
            || *shard != earlier.shard
            || *replica != earlier.replica
            || *incarnation != earlier.incarnation
            || *version != earlier.version
            || *phase != earlier.phase
            || *source != earlier.source
            || *target != earlier.target
            || *cleaned != earlier.cleaned
            || replication.is_news_after(&earlier.replication)
    }
}

/// Replication state of a replica among the others of its shard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicationReport {
    /// The replica has caught up since it was opened and takes requests.
    pub ready: bool,
    /// Synced records of a peer that the replica has not applied; the maximum over its peers.
    pub lag_lsns: u64,
    /// Age of the oldest of these records, milliseconds.
    pub lag_ms: u64,
    /// Version of the transfer to the replica under which it holds everything that the old primary
    /// named.
    pub took_over: Option<CatalogVersion>,
    /// The replica takes no writes any more, and another member holds everything it has.
    pub drained: bool,
    /// The members that hold it; empty from a node of an older version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drained_by: Vec<ReplicaId>,
    /// Replicas that left the placement and whose archive the replica has recovered, as far as that
    /// is possible.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub took_from_bucket: Vec<ReplicaId>,
    /// No peer's log reaches back to the replica's position: it must be rebuilt.
    pub too_old: bool,
    /// The member that does not read the replica's log, which is at the cap because of that.
    pub evict: Option<ReplicaId>,
    /// The replica has authority: it answers strict requests. `None` from a node that does not know
    /// authority.
    #[serde(default)]
    pub serving: Option<bool>,
    /// The replica's writer is stalled at the disk, or was shortly before.
    #[serde(default)]
    pub stalled: bool,
    /// Time for which the replica has been serving in place of the primary, milliseconds.
    #[serde(default)]
    pub acting_ms: u64,
    /// The replica failed shortly before for lack of disk or descriptors: it may open again by
    /// itself.
    pub passing: bool,
    /// The replica's gc floor, a commit time in microseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub floor: u64,
}

impl ReplicationReport {
    /// Returns true when a rule may decide otherwise by this report than by an earlier one; see
    /// [`ReplicaReport::is_news_after`]. How far the replica is behind counts only as whether it is
    /// close, and how long it has been acting only as whether that is long enough.
    fn is_news_after(&self, earlier: &Self) -> bool {
        let Self {
            ready,
            lag_lsns: _,
            lag_ms: _,
            took_over,
            drained,
            drained_by,
            took_from_bucket,
            too_old,
            evict,
            serving,
            stalled,
            acting_ms: _,
            passing,
            floor,
        } = self;
        let is_close = |report: &Self| report.lag_lsns <= TAIL_LAG_LSNS_MAX;
        let acts = |report: &Self| report.acting_ms >= ACTING_PRIMARY_AFTER.as_millis() as u64;
        *ready != earlier.ready
            || is_close(self) != is_close(earlier)
            || *took_over != earlier.took_over
            || *drained != earlier.drained
            || *drained_by != earlier.drained_by
            || *took_from_bucket != earlier.took_from_bucket
            || *too_old != earlier.too_old
            || *evict != earlier.evict
            || *serving != earlier.serving
            || *stalled != earlier.stalled
            || acts(self) != acts(earlier)
            || *passing != earlier.passing
            || *floor != earlier.floor
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A durable seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The version that asked for the seal.
    pub version: CatalogVersion,
    /// The LSN of the seal record: no record after it touches the range.
    pub lsn: Lsn,
}

/// How a source slows the writers of moving keys down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleReport {
    /// Bytes of keys and values of moving keys that it takes in a second.
    pub bytes_per_s: u64,
    /// Time for which writes have been held back since the replica was opened, all together,
    /// milliseconds.
    pub held_back_ms: u64,
}

/// Progress of a source in a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceProgress {
    /// The plan.
    pub plan: PlanId,
    /// The checkpoint that the source made.
    #[serde(default)]
    pub manifest: Option<PinnedManifest>,
    /// Full object key of its export, of a plan that exports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// The seal, once durable.
    #[serde(default)]
    pub sealed: Option<Sealed>,
    /// The source has applied the commit and sent on the waiting requests.
    #[serde(default)]
    pub released: bool,
    /// Times for which writes of the moving range waited, microseconds; the pause itself first.
    #[serde(default)]
    pub pauses_us: Vec<u64>,
    /// The writers of moving keys are slowed down so that the targets catch up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleReport>,
    /// Reason why the source cannot go on.
    #[serde(default)]
    pub failed: Option<String>,
    /// Bytes of its export, as far as they are known; 0 of a source that exports nothing.
    #[serde(default)]
    pub bytes_total: u64,
    /// Bytes of the export that are in the bucket.
    #[serde(default)]
    pub bytes_done: u64,
    /// Rows that the export has written to local tables: they tell that it goes on.
    #[serde(default)]
    pub rows_done: u64,
    /// Attempts that failed and were repeated.
    #[serde(default)]
    pub failures: u32,
    /// Why the last attempt failed, while it is repeated.
    #[serde(default)]
    pub last_error: Option<String>,
}

impl SourceProgress {
    /// Creates a progress with nothing done yet.
    pub fn new(plan: PlanId) -> Self {
        Self {
            plan,
            manifest: None,
            export: None,
            sealed: None,
            released: false,
            pauses_us: Vec::new(),
            throttle: None,
            failed: None,
            bytes_total: 0,
            bytes_done: 0,
            rows_done: 0,
            failures: 0,
            last_error: None,
        }
    }

    /// Records a failed attempt that is repeated.
    pub fn failed_for_now(&mut self, error: &impl ToString) {
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some(error.to_string());
    }
}

/// Stage of a target.
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

/// Progress of a target in a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetProgress {
    /// The plan.
    pub plan: PlanId,
    /// Its stage.
    pub stage: TargetStage,
    /// Per source replica the LSN up to which everything that concerns this target is durable here.
    #[serde(default)]
    pub cursors: BTreeMap<ReplicaId, Lsn>,
    /// Log records that the sources had and the target had not, at the last check.
    pub lag_lsns: u64,
    /// Bytes of log that the sources had and had not sent, at the last check; `None` when they do
    /// not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// Bytes to take from the bucket.
    pub bytes_total: u64,
    /// Bytes taken so far.
    pub bytes_done: u64,
    /// Keys that moved, not counting the tail.
    pub keys_moved: u64,
    /// Bytes of the ingested SSTs.
    pub bytes_moved: u64,
    /// Body bytes of all GETs.
    pub bytes_from_bucket: u64,
    /// Number of GETs.
    pub objects_read: u64,
    /// Bytes of log records streamed by nodes.
    pub bytes_from_peers: u64,
    /// The target's own first manifest is in the bucket and covers the ingest.
    pub manifest_shipped: bool,
    /// Replicas whose logs were read from the bucket, and the LSN reached in each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reached: Vec<(ReplicaId, Lsn)>,
    /// Reason why the target cannot go on.
    #[serde(default)]
    pub failed: Option<String>,
    /// Rows that it has rewritten so far: they tell that it goes on.
    #[serde(default)]
    pub rows_done: u64,
    /// Attempts that failed and were repeated.
    #[serde(default)]
    pub failures: u32,
    /// Why the last attempt failed, while it is repeated.
    #[serde(default)]
    pub last_error: Option<String>,
}

impl TargetProgress {
    /// Creates a progress with nothing done yet.
    pub fn new(plan: PlanId) -> Self {
        Self {
            plan,
            stage: TargetStage::Downloading,
            cursors: BTreeMap::new(),
            lag_lsns: 0,
            lag_bytes: None,
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
            rows_done: 0,
            failures: 0,
            last_error: None,
        }
    }

    /// Records a failed attempt that is repeated.
    pub fn failed_for_now(&mut self, error: &impl ToString) {
        self.failures = self.failures.saturating_add(1);
        self.last_error = Some(error.to_string());
    }
}

/// Percentiles of the time for which writes of moving keys waited, milliseconds.
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
    /// Returns the percentiles of microsecond samples; all zero when there are none.
    pub fn of(mut samples_us: Vec<u64>) -> Self {
        samples_us.sort_unstable();
        let at = |fraction: f64| match samples_us.len() {
            0 => 0.0,
            n => {
                samples_us[((n as f64 * fraction).ceil() as usize).clamp(1, n) - 1] as f64 / 1000.0
            }
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// Newest report of each replica of the keyspace.
pub type Reports = BTreeMap<ReplicaId, ReplicaReport>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_no_news_and_what_rules_ask_for_is() {
        let (keyspace, shard, replica) = (KeyspaceId(1), ShardId(0), ReplicaId(1));
        let calm = ReplicaReport::new(keyspace, shard, replica, ReplicaPhase::Serving);
        assert!(!calm.is_news_after(&calm));
        let figures: [fn(&mut ReplicaReport); 11] = [
            |report| report.ships_behind = Some(ShipsBehind::Nobody),
            |report| report.lsn = Lsn(9),
            |report| report.shipped_lsn = Lsn(9),
            |report| report.manifest_lsn = Lsn(9),
            |report| report.keys = 9,
            |report| report.bytes = 9,
            |report| report.load = 9,
            |report| report.load_unknown = true,
            |report| report.replication.lag_lsns = TAIL_LAG_LSNS_MAX,
            |report| report.replication.lag_ms = 9,
            |report| report.replication.acting_ms = 9,
        ];
        for (n, change) in figures.iter().enumerate() {
            let mut busy = calm.clone();
            change(&mut busy);
            assert!(busy != calm && !busy.is_news_after(&calm), "figure {n}");
        }
        let news: [fn(&mut ReplicaReport); 19] = [
            |report| report.incarnation = Incarnation(9),
            |report| report.version = CatalogVersion(9),
            |report| report.phase = ReplicaPhase::Failed("rot".into()),
            |report| report.source = Some(SourceProgress::new(PlanId(1))),
            |report| report.target = Some(TargetProgress::new(PlanId(1))),
            |report| report.cleaned.push(PlanId(1)),
            |report| report.replication.ready = true,
            |report| report.replication.lag_lsns = TAIL_LAG_LSNS_MAX + 1,
            |report| report.replication.took_over = Some(CatalogVersion(9)),
            |report| report.replication.drained = true,
            |report| report.replication.drained_by.push(ReplicaId(2)),
            |report| report.replication.took_from_bucket.push(ReplicaId(2)),
            |report| report.replication.too_old = true,
            |report| report.replication.evict = Some(ReplicaId(2)),
            |report| report.replication.serving = Some(true),
            |report| report.replication.stalled = true,
            |report| report.replication.acting_ms = ACTING_PRIMARY_AFTER.as_millis() as u64,
            |report| report.replication.passing = true,
            |report| report.replication.floor = 9,
        ];
        for (n, change) in news.iter().enumerate() {
            let mut now = calm.clone();
            change(&mut now);
            assert!(now.is_news_after(&calm) && calm.is_news_after(&now), "news {n}");
        }
    }
}
