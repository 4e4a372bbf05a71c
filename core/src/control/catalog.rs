//! The content of one catalog version: a keyspace's spec, placement and running plan.
//!
//! **Invariant:** the catalog object with the greatest number is the only truth about ownership.
//! A version is written once, create-only, and never changed; nodes apply no version lower than one
//! they have applied. Unknown fields of newer versions are tolerated.

use serde::{Deserialize, Serialize};

use crate::band::Band;
use crate::control::operation::{OperationOutcome, OperationReport};
use crate::control::plan::Plan;
use crate::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::record::BandRange;

pub use crate::control::leaving::{DrainingReplica, GivenUp, NodeDrain, RetiredReplica};
pub use crate::control::moving::{Moved, Rebalanced, ReplicaMove};
pub use crate::control::placement::{Placed, ShardPlacement};
pub use crate::control::retirement::Retirement;
pub use crate::control::spec::{Ack, KeyspaceSpec, NotAnAck};

/// Number of removed replicas that are named one by one; earlier ones are named together, by
/// [`Catalog::removed_below`].
pub const REMOVED_KEPT: usize = 64;

/// Lifecycle state of a keyspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyspaceState {
    /// The keyspace serves.
    Active,
    /// The keyspace was deleted: nodes drop their replicas. The objects in the bucket stay.
    Deleted,
}

fn is_zero(replica: &ReplicaId) -> bool {
    replica.0 == 0
}

/// A range that has moved to another shard and is not removed from its sources yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The plan that moved it.
    pub plan: PlanId,
    /// The bands, the same on every source.
    pub range: BandRange,
    /// Replicas that still hold the range.
    pub replicas: Vec<ReplicaId>,
    /// Each target and the LSN of its log that covers everything up to the seals: a source removes
    /// the range only after a manifest of the target covers this LSN.
    pub targets: Vec<(ReplicaId, Lsn)>,
    /// The targets of a shrink that do not ship, with the same LSN of their logs: should one of
    /// them ship in the place of a target, its manifests count from there on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<(ReplicaId, Lsn)>,
    /// The replicas whose logs the targets followed. Those that have left since stay: what they
    /// shipped may be nowhere else. Empty in versions of older releases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<QuarantineSource>,
    /// End of the quarantine, microseconds since 1970.
    pub until_us: u64,
    /// Removal is allowed: nodes remove the range under the version that sets this.
    pub dropping: bool,
}

/// A replica that gave a range in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineSource {
    /// Its shard then.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// LSN of its log behind which no record touches the range; 0 when it is not known.
    pub sealed: Lsn,
}

impl Quarantine {
    /// Stands for the LSN of a replica that ships in the place of a target and was not one of those
    /// with an LSN: each of its manifests covers the range. How far its log does is not known.
    pub const ANY_MANIFEST: Lsn = Lsn(1);

    /// Returns true when the range may have been taken from the replica's log.
    pub fn took_from(&self, replica: ReplicaId) -> bool {
        self.sources.iter().any(|source| source.replica == replica)
            || self.sources.is_empty() && self.replicas.contains(&replica)
    }
}

/// One catalog version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    /// The keyspace; never reused.
    pub keyspace: KeyspaceId,
    /// Its name.
    pub name: String,
    /// The number of this version, the same as in its object name.
    pub version: CatalogVersion,
    /// Random number of the writer: distinguishes its own object from a rival's after a lost reply.
    pub nonce: u64,
    /// Time of writing, microseconds since 1970.
    pub written_at_us: u64,
    /// Raised by each version that changes ownership or placement.
    pub epoch: Epoch,
    /// Active or deleted.
    pub state: KeyspaceState,
    /// Settings that the owner asked for.
    pub spec: KeyspaceSpec,
    /// One entry per shard, in order.
    pub placement: Vec<ShardPlacement>,
    /// Draining replicas: they left the placement and are not drained yet.
    #[serde(rename = "unsealed", default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<DrainingReplica>,
    /// Replicas of shards that a shrink has retired, until the quarantine of its plan ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<RetiredReplica>,
    /// Shrinks that have committed, by their shard counts, ascending: they tell replicas of shards
    /// that have retired from those of later shards with the same numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retirements: Vec<Retirement>,
    /// Replicas that are removed for good: any node that holds their files deletes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<ReplicaId>,
    /// All replicas with a lower id that are neither placed, nor targets, nor draining, nor retired
    /// are removed for good too.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub removed_below: ReplicaId,
    /// Removed replicas whose loss was accepted: records that they shipped are not recovered again
    /// once a later checkpoint of another replica exists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<GivenUp>,
    /// Targets of plans that were undone: nothing that they shipped was ever part of the keyspace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub discarded: Vec<ReplicaId>,
    /// Nodes that are being drained.
    #[serde(rename = "leaving", default, skip_serializing_if = "Vec::is_empty")]
    pub draining_nodes: Vec<NodeDrain>,
    /// The running structural change.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// Replicas that move to other nodes, of distinct shards; none while `plan` runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<ReplicaMove>,
    /// What the last rebalance has moved in this keyspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebalanced: Option<Rebalanced>,
    /// Moved ranges in quarantine, until their removal.
    #[serde(default)]
    pub quarantines: Vec<Quarantine>,
    /// Object keys that garbage collection must keep.
    #[serde(default)]
    pub pins: Vec<String>,
    /// The next replica id to give out.
    pub next_replica: ReplicaId,
    /// The next plan id to give out.
    pub next_plan: PlanId,
    /// The last finished operations, newest last, at most [`OPERATIONS_KEPT`].
    #[serde(default)]
    pub operations: Vec<OperationReport>,
}

/// Number of finished operations that a catalog version remembers.
pub const OPERATIONS_KEPT: usize = 16;

impl Catalog {
    /// Creates the first version of a keyspace.
    pub fn first(
        keyspace: KeyspaceId,
        name: &str,
        spec: KeyspaceSpec,
        nodes_of_shards: &[Vec<NodeId>],
        now_us: u64,
        nonce: u64,
    ) -> Self {
        let mut next_replica = 1;
        let placement = nodes_of_shards
            .iter()
            .enumerate()
            .map(|(shard, nodes)| {
                let replicas = nodes.iter().map(|node| {
                    next_replica += 1;
                    Placed { replica: ReplicaId(next_replica - 1), node: *node }
                });
                ShardPlacement::new(ShardId(shard as u32), replicas.collect())
            })
            .collect();
        Self {
            keyspace,
            name: name.to_owned(),
            version: CatalogVersion(1),
            nonce,
            written_at_us: now_us,
            epoch: Epoch(1),
            state: KeyspaceState::Active,
            spec,
            placement,
            draining: Vec::new(),
            retired: Vec::new(),
            retirements: Vec::new(),
            removed: Vec::new(),
            removed_below: ReplicaId(0),
            given_up: Vec::new(),
            discarded: Vec::new(),
            draining_nodes: Vec::new(),
            plan: None,
            moves: Vec::new(),
            rebalanced: None,
            quarantines: Vec::new(),
            pins: Vec::new(),
            next_replica: ReplicaId(next_replica),
            next_plan: PlanId(1),
            operations: Vec::new(),
        }
    }

    /// Returns a copy that will be the next version.
    pub fn next(&self, now_us: u64, nonce: u64) -> Self {
        Self {
            version: CatalogVersion(self.version.0 + 1),
            nonce,
            written_at_us: now_us,
            ..self.clone()
        }
    }

    /// Returns the bands that a placed replica of any shard owns under this version.
    pub fn owned_bands(&self) -> BandRange {
        Band::owned(self.spec.shards).into()
    }

    /// Returns the running plans: that of the keyspace, or those of the replicas that move.
    pub fn plans(&self) -> impl Iterator<Item = &Plan> {
        self.plan.iter().chain(self.moves.iter().map(|moving| &moving.plan))
    }

    /// Returns the running plan that concerns a replica: that of the keyspace, or that of the move
    /// in which the replica gives or receives.
    pub fn plan_of(&self, replica: ReplicaId) -> Option<&Plan> {
        let takes_part = |plan: &&Plan| plan.members().any(|(_, member)| member == replica);
        let moving = || self.moves.iter().map(|moving| &moving.plan).find(takes_part);
        self.plan.as_ref().or_else(moving)
    }

    /// Returns true while a replica of the shard moves to another node.
    pub fn is_moving(&self, shard: ShardId) -> bool {
        self.moves.iter().any(|moving| moving.shard() == Some(shard))
    }

    /// Records a finished operation and forgets the oldest beyond [`OPERATIONS_KEPT`]. Adds the
    /// figures of a finished replica-adding plan to the totals of the draining nodes.
    pub fn remember(&mut self, report: OperationReport) {
        if report.is_copy() && report.outcome == OperationOutcome::Done {
            let leaving = self
                .draining_nodes
                .iter_mut()
                .filter(|drain| drain.since_us <= report.started_at_us);
            leaving.for_each(|drain| drain.moved.add(&report));
        }
        self.operations.push(report);
        let excess = self.operations.len().saturating_sub(OPERATIONS_KEPT);
        self.operations.drain(..excess);
    }
}
