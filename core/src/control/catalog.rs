//! The content of one catalog version: a keyspace's spec, placement and running plan.
//!
//! **Invariant:** the catalog object with the greatest number is the only truth about ownership.
//! A version is written once, create-only, and never changed; nodes apply no version lower than one
//! they have applied. Unknown fields of newer versions are tolerated.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::band::Band;
use crate::control::estimate::Estimate;
use crate::control::operation::{OperationOutcome, OperationReport};
use crate::control::plan::Plan;
use crate::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use crate::record::BandRange;

pub use crate::control::moving::{Moved, Rebalanced, ReplicaMove};
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

/// A replica and its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
}

/// The placed replicas of one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlacement {
    /// The shard.
    pub shard: ShardId,
    /// Its replicas in the order of preference. The first is the preferred primary, and it ships.
    pub replicas: Vec<Placed>,
    /// The current primary, when it is not the first replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<ReplicaId>,
    /// Target of a running leadership transfer: the primary takes no read-modify-writes any more,
    /// and this replica becomes primary once it holds everything that the primary held.
    #[serde(rename = "handing_to", default, skip_serializing_if = "Option::is_none")]
    pub transferring_to: Option<ReplicaId>,
}

impl ShardPlacement {
    /// Creates a placement whose primary is the first replica.
    pub fn new(shard: ShardId, replicas: Vec<Placed>) -> Self {
        Self { shard, replicas, primary: None, transferring_to: None }
    }

    /// Returns the current primary.
    pub fn primary(&self) -> Option<Placed> {
        let acting = self.replicas.iter().find(|member| Some(member.replica) == self.primary);
        acting.or(self.replicas.first()).copied()
    }

    /// Returns the replica that ships: the preferred primary, whichever replica is primary now.
    pub fn shipper(&self) -> Option<Placed> {
        self.replicas.first().copied()
    }

    /// Returns all replicas: the current primary first, the others in the order of preference.
    pub fn primary_first(&self) -> Vec<Placed> {
        let primary = self.primary();
        let others = self.replicas.iter().copied().filter(|member| Some(*member) != primary);
        primary.into_iter().chain(others).collect()
    }
}

/// A replica that left the placement while it may hold writes that no other member has: it is
/// drained once its node is there, and nothing is collected before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingReplica {
    /// Its shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Time at which the replica left, microseconds since 1970.
    pub since_us: u64,
}

/// A replica of a shard that a shrink has retired. It serves nothing any more; from the end of the
/// plan to the end of its quarantine only its files are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetiredReplica {
    /// Its former shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// The plan that retired the shard.
    pub plan: PlanId,
}

/// A node that is drained of all its replicas of the keyspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDrain {
    /// The node.
    pub node: NodeId,
    /// Node that receives the replicas; `None` for any node with room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<NodeId>,
    /// The node may be gone: data that it alone holds is taken from the bucket, without waiting for
    /// the node.
    #[serde(default)]
    pub replace: bool,
    /// Start time, microseconds since 1970; forms the operation id together with the node.
    pub since_us: u64,
    /// If the node is gone, data that it alone holds is given up once everything that it had
    /// shipped was recovered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_loss: bool,
    /// Totals moved since the start. Not derived from the finished operations: the catalog forgets
    /// those in time.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub moved: Moved,
    /// What was estimated of the drain in this keyspace when it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
}

fn is_zero(replica: &ReplicaId) -> bool {
    replica.0 == 0
}

fn is_nothing(moved: &Moved) -> bool {
    *moved == Moved::default()
}

impl NodeDrain {
    /// Creates the drain of a node, beginning at `since_us`.
    pub fn new(node: NodeId, replace: bool, since_us: u64) -> Self {
        Self {
            node,
            to: None,
            replace,
            since_us,
            accept_loss: false,
            moved: Moved::default(),
            estimate: None,
        }
    }

    /// Returns the id of the operation that drains the node, the same in every keyspace.
    pub fn operation_id(&self) -> String {
        format!("node-{}-{}", self.node, self.since_us)
    }
}

/// A replica whose loss was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// The replica.
    pub replica: ReplicaId,
    /// Catalog version that accepted the loss: anything made under it or a later version needs
    /// nothing of the replica.
    pub version: CatalogVersion,
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
    /// End of the quarantine, microseconds since 1970.
    pub until_us: u64,
    /// Removal is allowed: nodes remove the range under the version that sets this.
    pub dropping: bool,
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

    /// Returns the placed replicas, the targets under construction, the draining replicas and those
    /// that the running plan has retired, each once, as `(shard, replica, placed)`. A deleted keyspace has none.
    pub fn members(&self) -> Vec<(ShardId, Placed, bool)> {
        if self.state != KeyspaceState::Active {
            return Vec::new();
        }
        let placed = self.placement.iter().flat_map(|shard| {
            shard.replicas.iter().map(move |member| (shard.shard, *member, true))
        });
        let targets = self.plans().flat_map(|plan| &plan.targets).map(|target| {
            (target.shard, Placed { replica: target.replica, node: target.node }, false)
        });
        let draining = self.draining.iter().map(|draining| {
            (draining.shard, Placed { replica: draining.replica, node: draining.node }, false)
        });
        // Until the plan that retired their shard has ended, they give away what they hold.
        let giving = |retired: &&RetiredReplica| {
            self.plan.as_ref().is_some_and(|plan| plan.id == retired.plan)
        };
        let retired = self.retired.iter().filter(giving).map(|retired| {
            (retired.shard, Placed { replica: retired.replica, node: retired.node }, false)
        });
        let mut seen = BTreeSet::new();
        placed
            .chain(targets)
            .chain(draining)
            .chain(retired)
            .filter(|(_, member, _)| seen.insert(member.replica))
            .collect()
    }

    /// Returns the members on one node: `(shard, replica, placed)`.
    pub fn members_on(&self, node: NodeId) -> Vec<(ShardId, ReplicaId, bool)> {
        let here = self.members().into_iter().filter(|(_, member, _)| member.node == node);
        here.map(|(shard, member, placed)| (shard, member.replica, placed)).collect()
    }

    /// Returns the node of a placed replica, a target, a draining or a retired replica.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        let placed = self
            .placement
            .iter()
            .flat_map(|shard| &shard.replicas)
            .map(|member| (member.replica, member.node));
        let targets =
            self.plans().flat_map(|plan| &plan.targets).map(|target| (target.replica, target.node));
        let draining = self.draining.iter().map(|draining| (draining.replica, draining.node));
        let retired = self.retired.iter().map(|retired| (retired.replica, retired.node));
        placed
            .chain(targets)
            .chain(draining)
            .chain(retired)
            .find(|(id, _)| *id == replica)
            .map(|(_, node)| node)
    }

    /// Returns true when the plan has retired replicas that are kept still.
    pub fn has_retired(&self, plan: PlanId) -> bool {
        self.retired.iter().any(|retired| retired.plan == plan)
    }

    /// Returns true when the replica belongs to a shard that has retired.
    pub fn is_retired(&self, replica: ReplicaId) -> bool {
        self.retired.iter().any(|retired| retired.replica == replica)
    }

    /// Returns the retirement of the shard for which a replica was made; `None` while that shard
    /// exists, and for a replica of a later shard with the same number.
    pub fn retirement_of(&self, shard: ShardId, replica: ReplicaId) -> Option<&Retirement> {
        self.retirements.iter().find(|retirement| retirement.concerns(shard, replica))
    }

    /// Records that this version retires the shards from `first` on.
    pub(crate) fn record_retirement(&mut self, first: ShardId) {
        let (below, version, at_us) = (self.next_replica, self.version, self.written_at_us);
        Retirement { first, below, version, at_us }.add_to(&mut self.retirements);
    }

    /// Returns the placement of a shard.
    pub fn shard(&self, shard: ShardId) -> Option<&ShardPlacement> {
        self.placement.iter().find(|placement| placement.shard == shard)
    }

    /// Returns true when the replica serves under this version.
    pub fn is_placed(&self, replica: ReplicaId) -> bool {
        self.placement
            .iter()
            .flat_map(|shard| &shard.replicas)
            .any(|member| member.replica == replica)
    }

    /// Returns true when the replica is primary of its shard under this version.
    pub fn is_primary(&self, replica: ReplicaId) -> bool {
        self.placement
            .iter()
            .any(|shard| shard.primary().is_some_and(|primary| primary.replica == replica))
    }

    /// Returns the replicas whose logs a replica of the shard pulls: the other placed ones and the
    /// draining ones. A replica that is not placed pulls only while a plan builds it from other
    /// replicas of its own shard.
    pub fn sources_of(&self, shard: ShardId, replica: ReplicaId) -> Vec<Placed> {
        let rebuilt = self.plans().any(|plan| {
            plan.adds_member() && plan.targets.iter().any(|target| target.replica == replica)
        });
        if !self.is_placed(replica) && !rebuilt {
            return Vec::new();
        }
        let placed =
            self.shard(shard).into_iter().flat_map(|placement| placement.replicas.iter().copied());
        let draining = self.draining.iter().filter(|draining| draining.shard == shard);
        let draining =
            draining.map(|draining| Placed { replica: draining.replica, node: draining.node });
        placed.chain(draining).filter(|member| member.replica != replica).collect()
    }

    /// Returns the replicas that pull a replica's log, and for which the log is kept. None pulls the
    /// log of a retired replica: a new shard may have the number of its own.
    pub fn followers_of(&self, shard: ShardId, replica: ReplicaId) -> Vec<ReplicaId> {
        if self.is_retired(replica) {
            return Vec::new();
        }
        let placed = self
            .shard(shard)
            .into_iter()
            .flat_map(|placement| &placement.replicas)
            .map(|member| member.replica);
        let rebuilt = self.plans().filter(|plan| plan.adds_member());
        let rebuilt = rebuilt
            .flat_map(|plan| &plan.targets)
            .filter(|target| target.shard == shard)
            .map(|target| target.replica);
        placed.chain(rebuilt).filter(|follower| *follower != replica).collect()
    }

    /// Returns true when the replica is removed for good: any node that holds its files deletes
    /// them.
    pub fn is_removed(&self, replica: ReplicaId) -> bool {
        self.removed.contains(&replica)
            || (replica < self.removed_below && self.node_of(replica).is_none())
    }

    /// Marks replicas as removed for good. Keeps the list short: each id is given out once, so
    /// every earlier replica that has no part in the keyspace any more is removed.
    pub(crate) fn remove_for_good(&mut self, replicas: impl IntoIterator<Item = ReplicaId>) {
        self.removed.extend(replicas);
        let excess = self.removed.len().saturating_sub(REMOVED_KEPT);
        for replica in self.removed.drain(..excess) {
            self.removed_below = self.removed_below.max(ReplicaId(replica.0 + 1));
        }
        let below = self.removed_below;
        self.removed.retain(|removed| *removed >= below);
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
