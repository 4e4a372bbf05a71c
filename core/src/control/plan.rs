//! The running structural change of a keyspace, as data of its catalog.
//!
//! **Invariant:** the JSON of a plan is persisted in the bucket: its names never change.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::band::Band;
use crate::control::estimate::Estimate;
use crate::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::record::BandRange;

/// Kind of a plan.
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
    /// Fewer shards: the shards from `to` on retire, and the replicas of the others, the survivors,
    /// receive their rows.
    Shrink {
        /// Shards before.
        from: u32,
        /// Shards after.
        to: u32,
    },
    /// One more replica of a shard: from the checkpoint of another replica in the bucket, then from
    /// its log.
    #[serde(rename = "replica")]
    AddReplica {
        /// The shard.
        shard: ShardId,
    },
    /// A replica that replaces all replicas of its shard, which have failed or whose nodes are
    /// gone: from the bucket alone.
    #[serde(rename = "takeover")]
    RecoverReplica {
        /// The shard.
        shard: ShardId,
    },
    /// A new keyspace from what the bucket holds of another one.
    Restore {
        /// The source keyspace, whose data is restored.
        keyspace: KeyspaceId,
        /// The version of its catalog that was in force at that time.
        version: CatalogVersion,
        /// The point in time, microseconds since 1970; `None` takes everything.
        #[serde(default)]
        at_us: Option<u64>,
    },
}

/// Step of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Sources make the checkpoint from which every target takes its bytes.
    Prepare,
    /// Targets load the moving bands, then follow the sources' logs.
    Tail,
    /// Sources refuse writes to the moving bands; targets catch up to the seals.
    Sealing,
    /// Ownership has changed; targets open, sources release the waiting requests.
    Committed,
}

/// The manifest that all targets of a source use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedManifest {
    /// Full object key.
    pub key: String,
    /// The LSN that the manifest covers; tails start after it.
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
    /// The manifest, known from the step `tail` on.
    #[serde(default)]
    pub manifest: Option<PinnedManifest>,
    /// Full object key of its export, of a plan that exports; known from the step `tail` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
}

impl Source {
    /// Creates a source that has prepared nothing yet.
    pub fn new(shard: ShardId, replica: ReplicaId, node: NodeId) -> Self {
        Self { shard, replica, node, manifest: None, export: None }
    }
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
    /// Kind of the change.
    pub kind: PlanKind,
    /// The epoch from which the plan started.
    pub from_epoch: Epoch,
    /// Start time, microseconds since 1970.
    pub started_at_us: u64,
    /// The step that it has reached.
    pub step: Step,
    /// Replicas that give.
    pub sources: Vec<Source>,
    /// Replicas that receive.
    pub targets: Vec<Target>,
    /// Seals that did not complete in time.
    #[serde(default)]
    pub seals_undone: u32,
    /// The gc floor, a commit time in microseconds, that every shard raises its own to before a
    /// shrink exports; `None` until the present ones are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<u64>,
    /// The plan stands still at an administrator's request: no bulk work, no seal, no commit.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
    /// Upper bound of the bulk bytes that all its nodes together read from the bucket and write to
    /// it for the plan, bytes a second; `None` sets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u64>,
    /// What was estimated when the plan began; `None` of a plan that began by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

impl Plan {
    /// Returns the bands that a source gives away, of a plan that changes the shard count: in a
    /// shrink, everything that a retiring shard owns.
    pub fn leaving(&self) -> Option<BandRange> {
        match self.kind {
            PlanKind::Grow { from, to } => Some(Band::leaving(from, to).into()),
            PlanKind::Shrink { from, .. } => Some(Band::owned(from).into()),
            PlanKind::AddReplica { .. }
            | PlanKind::RecoverReplica { .. }
            | PlanKind::Restore { .. } => None,
        }
    }

    /// Returns the bands that a target fills, of a plan that changes the shard count: everything
    /// that a new shard owns; in a shrink, the bands that left the survivors when the retiring
    /// shards were new.
    pub fn arriving(&self) -> Option<BandRange> {
        match self.kind {
            PlanKind::Grow { to, .. } => Some(Band::owned(to).into()),
            PlanKind::Shrink { from, to } => Some(Band::leaving(to, from).into()),
            PlanKind::AddReplica { .. }
            | PlanKind::RecoverReplica { .. }
            | PlanKind::Restore { .. } => None,
        }
    }

    /// Returns true when every source exports its leaving rows for each target shard. The targets
    /// of a grow by one shard take the files of the sources as they are instead.
    pub fn exports(&self) -> bool {
        match self.kind {
            PlanKind::Grow { from, to } => to > from + 1,
            PlanKind::Shrink { .. } => true,
            PlanKind::AddReplica { .. }
            | PlanKind::RecoverReplica { .. }
            | PlanKind::Restore { .. } => false,
        }
    }

    /// Returns true when shards retire.
    pub fn shrinks(&self) -> bool {
        matches!(self.kind, PlanKind::Shrink { .. })
    }

    /// Returns the nodes that take part. The sources of a recovery do not.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        let gone = matches!(self.kind, PlanKind::RecoverReplica { .. });
        let sources = self.sources.iter().filter(move |_| !gone).map(|source| source.node);
        sources.chain(self.targets.iter().map(|target| target.node))
    }

    /// Returns the replicas that take part, with their shards. The sources of a recovery do not:
    /// they have failed, or their nodes are gone.
    pub fn members(&self) -> impl Iterator<Item = (ShardId, ReplicaId)> + '_ {
        let gone = matches!(self.kind, PlanKind::RecoverReplica { .. });
        let sources =
            self.sources.iter().filter(move |_| !gone).map(|source| (source.shard, source.replica));
        sources.chain(self.targets.iter().map(|target| (target.shard, target.replica)))
    }

    /// Returns the part of the plan's [`max_rate`](Self::max_rate) that each node has which does
    /// bulk work in the present step: the nodes of the sources in `prepare`, those of the targets
    /// later. Bytes a second, at least 1.
    pub fn rate_of_each_node(&self) -> Option<u64> {
        let max_rate = self.max_rate?;
        let nodes: BTreeSet<NodeId> = match self.step {
            Step::Prepare => self.sources.iter().map(|source| source.node).collect(),
            Step::Tail | Step::Sealing | Step::Committed => {
                self.targets.iter().map(|target| target.node).collect()
            }
        };
        Some((max_rate / nodes.len().max(1) as u64).max(1))
    }

    /// Returns the shard counts before and after, of a plan that changes them.
    pub fn resize(&self) -> Option<(u32, u32)> {
        match self.kind {
            PlanKind::Grow { from, to } | PlanKind::Shrink { from, to } => Some((from, to)),
            PlanKind::AddReplica { .. }
            | PlanKind::RecoverReplica { .. }
            | PlanKind::Restore { .. } => None,
        }
    }

    /// Returns true when a target becomes one more member of an existing shard: it follows the
    /// others.
    pub fn adds_member(&self) -> bool {
        matches!(self.kind, PlanKind::AddReplica { .. } | PlanKind::RecoverReplica { .. })
    }
}

/// Number of undone seals after which the plan aborts.
pub const SEALS_UNDONE_MAX: u32 = 20;

/// Time away after which a node aborts a plan that has not committed, and is not waited for by one
/// that has, microseconds.
pub const NODE_AWAY_MAX_US: u64 = 60_000_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn plan(step: Step) -> Plan {
        let source = |shard: u32, node: u64| {
            Source::new(ShardId(shard), ReplicaId(u64::from(shard) + 1), NodeId(node))
        };
        let target = |replica: u64| Target {
            shard: ShardId(3),
            replica: ReplicaId(replica),
            node: NodeId(9),
        };
        Plan {
            id: PlanId(1),
            kind: PlanKind::Grow { from: 3, to: 4 },
            from_epoch: Epoch(1),
            started_at_us: 1,
            step,
            sources: vec![source(0, 1), source(1, 2), source(2, 2)],
            targets: vec![target(7), target(8)],
            seals_undone: 0,
            floor: None,
            paused: false,
            max_rate: Some(1_000),
            estimate: None,
        }
    }

    #[test]
    fn the_nodes_of_a_step_share_the_rate_of_the_plan() {
        assert_eq!(plan(Step::Prepare).rate_of_each_node(), Some(500), "two nodes have sources");
        assert_eq!(plan(Step::Tail).rate_of_each_node(), Some(1_000), "one node has both targets");
        let alone = Plan { targets: Vec::new(), max_rate: Some(0), ..plan(Step::Tail) };
        assert_eq!(alone.rate_of_each_node(), Some(1), "never a division by nothing, never none");
        assert_eq!(Plan { max_rate: None, ..alone }.rate_of_each_node(), None);
    }

    #[test]
    fn a_plan_that_runs_freely_has_the_bytes_of_older_versions_and_they_are_read() {
        let free = Plan { max_rate: None, ..plan(Step::Tail) };
        let text = serde_json::to_string(&free).unwrap();
        assert!(!text.contains("paused") && !text.contains("max_rate"), "{text}");
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), free);
        let held = Plan { paused: true, ..plan(Step::Tail) };
        let text = serde_json::to_string(&held).unwrap();
        assert!(text.ends_with(r#""paused":true,"max_rate":1000}"#), "{text}");
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), held);
    }
}
