//! Who has a part in a keyspace: its replicas by shard and by node, whose logs they pull, and which
//! are gone for good.
//!
//! **Invariant:** each id of a replica is given out once, so a replica that has no part in the
//! keyspace any more, and is older than the last one that was named, is removed.

use std::collections::BTreeSet;

use crate::control::catalog::{
    Catalog, KeyspaceState, NodeDrain, Placed, REMOVED_KEPT, RetiredReplica, ShardPlacement,
};
use crate::control::retirement::Retirement;
use crate::ids::{NodeId, PlanId, ReplicaId, ShardId};

impl Catalog {
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

    /// Returns true when the node is replaced and its replica of the shard has left the placement: a
    /// node that may be gone is not waited for. Any other drain has its replica copied first.
    pub(crate) fn has_taken(&self, drain: &NodeDrain, shard: ShardId) -> bool {
        let mut left = self.draining.iter().filter(|draining| draining.shard == shard);
        drain.replace && left.any(|draining| draining.node == drain.node)
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
}
