//! The settings of a cluster's nodes: numbered create-only objects like the catalog, of which
//! the last is in force.
//!
//! **Invariant:** a version is written after the version before it was seen, and never changed. A
//! change is made to the newest version, however many masters make changes at once.

use serde::{Deserialize, Serialize};
use vasto_core::NodeId;
use vasto_core::limits::CORDONED_MAX;
use vasto_core::reconcile::WholePace;

use super::error::CatalogError;
use super::store::{CatalogStore, decode};
use crate::layout;

const SETTINGS: &str = "cluster-settings";

/// One version of the settings; version 0 is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSettings {
    /// The number of this version, the same as in its object name; 0 when there is none.
    pub version: u64,
    /// Drawn by the writer: distinguishes its own object from a rival's after a lost reply.
    pub nonce: u64,
    /// Time of the write, microseconds since 1970.
    pub written_at_us: u64,
    /// Nodes that get no new replicas, in the order in which they were cordoned.
    #[serde(default)]
    pub cordoned: Vec<NodeId>,
    /// The rebalance that runs, or the last one that ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<Rebalance>,
}

/// A rebalance of the cluster: replicas move until the nodes are even.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebalance {
    /// Start time, microseconds since 1970; forms its operation id.
    pub since_us: u64,
    /// End time, microseconds since 1970; `None` while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_us: Option<u64>,
    /// It was cancelled.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancelled: bool,
    /// It stands still at an administrator's request: no further move begins, and those that run are
    /// paused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Upper bound of the bulk bytes of all its moves together, bytes a second; `None` sets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u64>,
}

impl Rebalance {
    /// Returns its operation id.
    pub fn operation_id(&self) -> String {
        format!("rebalance-{}", self.since_us)
    }

    /// Returns its pace.
    pub fn pace(&self) -> WholePace {
        WholePace { paused: self.paused, max_rate: self.max_rate }
    }
}

impl ClusterSettings {
    /// Returns true when the node is to get no replicas.
    pub fn is_cordoned(&self, node: NodeId) -> bool {
        self.cordoned.contains(&node)
    }

    /// Returns the rebalance that runs.
    pub fn running_rebalance(&self) -> Option<Rebalance> {
        self.rebalance.filter(|rebalance| rebalance.ended_us.is_none())
    }

    /// Returns the next version, in which a rebalance has begun, with no bound of its rate; `None`
    /// while one runs.
    pub fn with_rebalance(&self, now_us: u64, nonce: u64) -> Option<Self> {
        self.with_rebalance_at(None, now_us, nonce)
    }

    /// Returns the next version, in which a rebalance has begun whose moves read and write at most
    /// so many bytes a second together; `None` while one runs.
    pub fn with_rebalance_at(
        &self,
        max_rate: Option<u64>,
        now_us: u64,
        nonce: u64,
    ) -> Option<Self> {
        if self.running_rebalance().is_some() {
            return None;
        }
        // Two of them never have the same id.
        let last = self.rebalance.map_or(0, |rebalance| rebalance.since_us);
        let since_us = now_us.max(last + 1);
        let rebalance = Some(Rebalance { since_us, max_rate, ..Rebalance::default() });
        Some(Self { rebalance, ..self.next(now_us, nonce) })
    }

    /// Returns the next version, in which a rebalance has another pace; `None` when it does not run,
    /// or has that pace.
    pub fn with_pace(
        &self,
        since_us: u64,
        pace: WholePace,
        now_us: u64,
        nonce: u64,
    ) -> Option<Self> {
        let running = self.running_rebalance().filter(|running| running.since_us == since_us)?;
        let WholePace { paused, max_rate } = pace;
        let changes = running.pace() != pace;
        let rebalance = Some(Rebalance { paused, max_rate, ..running });
        changes.then(|| Self { rebalance, ..self.next(now_us, nonce) })
    }

    /// Returns the next version, in which a rebalance has ended; `None` when it does not run.
    pub fn without_rebalance(
        &self,
        since_us: u64,
        cancelled: bool,
        now_us: u64,
        nonce: u64,
    ) -> Option<Self> {
        let running = self.running_rebalance().filter(|running| running.since_us == since_us)?;
        let ended_us = Some(now_us.max(since_us));
        let rebalance = Some(Rebalance { ended_us, cancelled, ..running });
        Some(Self { rebalance, ..self.next(now_us, nonce) })
    }

    fn next(&self, now_us: u64, nonce: u64) -> Self {
        Self { version: self.version + 1, nonce, written_at_us: now_us, ..self.clone() }
    }

    /// Returns the next version, with the node cordoned or not; `None` when nothing changes. Above
    /// `CORDONED_MAX` the earliest are dropped: nodes that left long ago.
    pub fn with_cordon(
        &self,
        node: NodeId,
        cordoned: bool,
        now_us: u64,
        nonce: u64,
    ) -> Option<Self> {
        if self.is_cordoned(node) == cordoned {
            return None;
        }
        let mut next = self.next(now_us, nonce);
        next.cordoned.retain(|cordoned| *cordoned != node);
        if cordoned {
            next.cordoned.push(node);
        }
        let excess = next.cordoned.len().saturating_sub(CORDONED_MAX);
        next.cordoned.drain(..excess);
        Some(next)
    }
}

impl CatalogStore {
    /// Returns the newest settings, found upward from `known`. Sends one request when `known` is
    /// the newest.
    ///
    /// # Errors
    /// When the bucket does not answer, or an object in it cannot be read.
    pub async fn settings(&self, known: &ClusterSettings) -> Result<ClusterSettings, CatalogError> {
        let last = self.last(known.version, layout::cluster_settings).await?;
        if last == known.version {
            return Ok(known.clone());
        }
        let key = layout::cluster_settings(last);
        let found = self.bucket().get(&key).await?;
        found.map_or_else(|| Ok(known.clone()), |bytes| decode(SETTINGS, &key, &bytes))
    }

    /// Makes a change to the newest settings; returns the settings in force, which hold the change.
    /// `change` returns `None` when there is nothing to do.
    ///
    /// # Errors
    /// After an error the outcome is unknown; the change can be made again.
    pub async fn change_settings(
        &self,
        known: &ClusterSettings,
        change: impl Fn(&ClusterSettings) -> Option<ClusterSettings>,
    ) -> Result<ClusterSettings, CatalogError> {
        let mut newest = self.settings(known).await?;
        loop {
            let Some(next) = change(&newest) else { return Ok(newest) };
            let key = layout::cluster_settings(next.version);
            let Some(existing) = self.create(&key, SETTINGS, &next).await? else { return Ok(next) };
            let existing: ClusterSettings = decode(SETTINGS, &key, &existing)?;
            if existing.nonce == next.nonce {
                return Ok(next);
            }
            newest = self.settings(&existing).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::bucket::Bucket;

    #[tokio::test]
    async fn changes_of_several_masters_are_all_kept() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().display());
        let bucket = Bucket::open(&url, &crate::BucketOptions::default()).unwrap();
        let (store, rival) = (CatalogStore::new(bucket.clone()), CatalogStore::new(bucket));
        let nothing = ClusterSettings::default();
        assert_eq!(store.settings(&nothing).await.unwrap(), nothing);
        let cordon = |node: u64, nonce: u64| {
            move |now: &ClusterSettings| now.with_cordon(NodeId(node), true, 1, nonce)
        };
        let (first, second) = futures::join!(
            store.change_settings(&nothing, cordon(1, 11)),
            rival.change_settings(&nothing, cordon(2, 22))
        );
        let newest = store.settings(&nothing).await.unwrap();
        assert_eq!(newest.version, 2);
        assert!(newest.is_cordoned(NodeId(1)) && newest.is_cordoned(NodeId(2)));
        assert!(first.unwrap().is_cordoned(NodeId(1)) && second.unwrap().is_cordoned(NodeId(2)));
        // A change already in force is not written again.
        assert_eq!(store.change_settings(&nothing, cordon(1, 33)).await.unwrap(), newest);
        let free = |now: &ClusterSettings| now.with_cordon(NodeId(1), false, 1, 44);
        let free = rival.change_settings(&newest, free).await.unwrap();
        assert_eq!((free.version, &free.cordoned[..]), (3, &[NodeId(2)][..]));
        let checked = crate::gc::fsck(store.bucket(), false).await.unwrap();
        assert!(checked.orphans.is_empty(), "{:?}", checked.orphans);
    }

    #[test]
    fn one_rebalance_runs_at_a_time_and_the_last_one_is_remembered() {
        let nothing = ClusterSettings::default().with_cordon(NodeId(7), true, 1, 1).unwrap();
        let begun = nothing.with_rebalance(100, 2).unwrap();
        assert_eq!((begun.version, begun.is_cordoned(NodeId(7))), (2, true));
        assert_eq!(begun.running_rebalance().unwrap().operation_id(), "rebalance-100");
        assert_eq!(begun.with_rebalance(101, 3), None);
        assert_eq!(begun.without_rebalance(99, false, 200, 3), None, "another one");
        let ended = begun.without_rebalance(100, true, 200, 3).unwrap();
        assert_eq!(ended.running_rebalance(), None);
        assert_eq!(ended.rebalance.unwrap().ended_us, Some(200));
        assert_eq!(ended.without_rebalance(100, false, 201, 4), None);
        // Also after the clock was set back.
        assert_eq!(ended.with_rebalance(50, 4).unwrap().rebalance.unwrap().since_us, 101);
        let text = serde_json::to_string(&nothing).unwrap();
        assert!(!text.contains("rebalance"), "{text}");
    }

    #[test]
    fn a_rebalance_that_runs_has_a_pace_and_an_older_one_is_read() {
        let begun = ClusterSettings::default().with_rebalance_at(Some(9_000), 100, 1).unwrap();
        let now = begun.running_rebalance().unwrap().pace();
        assert_eq!(now, WholePace { paused: false, max_rate: Some(9_000) });
        let paused = WholePace { paused: true, ..now };
        assert_eq!(begun.with_pace(99, paused, 101, 2), None, "another one");
        let stands = begun.with_pace(100, paused, 101, 2).unwrap();
        assert_eq!((stands.version, stands.running_rebalance().unwrap().pace()), (2, paused));
        assert_eq!(stands.with_pace(100, paused, 102, 3), None, "it is so");
        let ended = stands.without_rebalance(100, true, 103, 3).unwrap();
        assert_eq!(ended.with_pace(100, now, 104, 4), None);
        let text = serde_json::to_string(&stands).unwrap();
        assert_eq!(serde_json::from_str::<ClusterSettings>(&text).unwrap(), stands);
        let free = ClusterSettings::default().with_rebalance(100, 1).unwrap();
        let text = serde_json::to_string(&free).unwrap();
        assert!(text.ends_with(r#""rebalance":{"since_us":100}}"#), "{text}");
        assert_eq!(serde_json::from_str::<ClusterSettings>(&text).unwrap(), free);
    }

    #[test]
    fn cordons_are_bounded() {
        let mut settings = ClusterSettings::default();
        for node in 0..=CORDONED_MAX as u64 {
            settings = settings.with_cordon(NodeId(node), true, 1, node).unwrap();
        }
        assert_eq!(
            (settings.cordoned.len(), settings.is_cordoned(NodeId(0))),
            (CORDONED_MAX, false)
        );
    }
}
