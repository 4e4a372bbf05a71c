//! GC floor rounds: all replicas of a shard agree on the commit time up to which tombstones may be
//! purged.
//!
//! The primary proposes a candidate, one grace before now, and waits twice until all replicas hold
//! the same records:
//! 1. Each replica durably promises a commit-time fence: it never assigns a commit time at or below
//!    the candidate again. Then it reports its vector. The pointwise maximum of these vectors
//!    contains every record that is committed at or below the candidate. When all replicas hold it,
//!    each has all tombstones that the floor will purge, and each reports its vector again.
//! 2. The fence does not cover records with a later commit time: a replica that did not hold a
//!    tombstone yet may have written one with an older event time, which must lose to the tombstone
//!    everywhere. All such records are in the pointwise maximum of the second vectors; later ones
//!    are written by replicas that hold all those tombstones. When all replicas hold this maximum
//!    too, no record is under way that a purged tombstone would have to defeat.
//!
//! The primary then logs the floor, and it is replicated like a write.
//!
//! **Invariant:** no floor is raised without the answers of every placed replica, or while a replica
//! that left the placement is still draining; while a plan runs, none but that which the plan names;
//! none in a shard of which a replica moves.
//! A missing answer only delays the purge.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tonic::Status;
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{Vector, covers, join};
use vasto_core::plan::Step;
use vasto_proto::convert::{status_of, vector_from_wire, vector_to_wire};
use vasto_proto::v1;

use super::peers::Peers;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, Role};

/// Time after which a round fails when a replica still lags; the next round starts anew.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval between two polls of the replicas' vectors.
const POLL: Duration = Duration::from_millis(50);
/// Shortest and longest interval between rounds.
const INTERVALS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3_600));

/// Returns the interval between the rounds of a keyspace: 1/24 of the grace (an hour for a grace of
/// a day), so that waiting for the next round adds little to the grace.
pub(crate) fn interval(grace_ms: u64) -> Duration {
    Duration::from_millis(grace_ms / 24).clamp(INTERVALS.0, INTERVALS.1)
}

/// A gc floor round of a primary.
pub(super) struct FloorRound {
    pub registry: Arc<NodeRegistry>,
    pub peers: Arc<Peers>,
    pub replica: Replica,
}

impl FloorRound {
    /// Returns the floor that a round would propose, microseconds; `None` when no round is due at
    /// this replica.
    pub(super) fn candidate(&self, catalog: &Catalog) -> Option<u64> {
        let replica = &self.replica;
        let may = replica.is_ready()
            && replica.closed().is_none()
            && replica.view().role == Role::Primary
            && catalog.draining.is_empty();
        if let Some(floor) = Self::floor_of_plan(catalog) {
            return (may && floor > replica.floor()).then_some(floor);
        }
        // A replica that is being made for the shard is not asked.
        let due = may && catalog.plan.is_none() && !catalog.is_moving(replica.shard);
        let candidate = self.registry.clock.now_us().saturating_sub(catalog.spec.grace_ms() * 1000);
        // `data_commit_time` is that of the last record with entries. Once it is at or below the
        // floor, a greater floor would purge nothing more: an idle replica logs none and stays
        // idle.
        (due && candidate > replica.floor() && replica.data_commit_time() > replica.floor())
            .then_some(candidate)
    }

    /// Returns the floor that the running plan brings every replica to before anything is exported.
    pub(super) fn floor_of_plan(catalog: &Catalog) -> Option<u64> {
        let preparing = catalog.plan.as_ref().filter(|plan| plan.step == Step::Prepare);
        preparing.and_then(|plan| plan.floor)
    }

    /// Runs one round. A round that fails leaves the floor as it is.
    pub(super) async fn agree(&self, catalog: &Catalog, floor: u64) -> Result<(), Status> {
        let members = catalog
            .shard(self.replica.shard)
            .map(|shard| shard.replicas.clone())
            .unwrap_or_default();
        let until = Instant::now() + PATIENCE;
        let promised =
            try_join_all(members.iter().map(|member| self.promise(*member, floor))).await?;
        let held = self.until_all_hold(&members, &joined(&promised), until).await?;
        self.until_all_hold(&members, &joined(&held), until).await?;
        // The conditions of [`Self::candidate`] must still hold, under the same epoch.
        let now = self.registry.catalog(catalog.keyspace);
        let holds = |now: &Catalog| {
            now.epoch == catalog.epoch
                && self.candidate(now).is_some()
                && Self::floor_of_plan(now).is_none_or(|of_plan| of_plan == floor)
        };
        if !now.is_some_and(|now| holds(&now)) {
            return Err(Status::aborted("the keyspace has changed meanwhile"));
        }
        self.replica
            .control(Control::GcFloor { floor })
            .await
            .map_err(|error| status_of(&error.into()))?;
        tracing::debug!(
            keyspace = catalog.keyspace.0,
            shard = self.replica.shard.0,
            floor,
            "the collection floor was raised"
        );
        Ok(())
    }

    /// Obtains the fence of a replica; returns the vector that the replica holds after that.
    async fn promise(&self, member: Placed, commit_time: u64) -> Result<Vector, Status> {
        if member.replica == self.replica.id {
            let order = Control::FenceCommitTime { commit_time };
            self.replica.control(order).await.map_err(|error| status_of(&error.into()))?;
            return self.position(member).await;
        }
        let request = v1::PromiseRequest {
            keyspace_id: self.replica.keyspace.0,
            replica_id: member.replica.0,
            commit_time,
        };
        let reply = self.peers.promise(&self.registry, member.node, request).await?;
        Ok(vector_from_wire(&reply.vector))
    }

    /// Returns the durable vector of a replica. The own one is converted to the wire form and back,
    /// like a peer's.
    async fn position(&self, member: Placed) -> Result<Vector, Status> {
        if member.replica == self.replica.id {
            let position =
                self.replica.position().await.map_err(|error| status_of(&error.into()))?;
            return Ok(vector_from_wire(&vector_to_wire(&position.vector)));
        }
        let request = v1::PositionRequest {
            keyspace_id: self.replica.keyspace.0,
            replica_id: member.replica.0,
            ..v1::PositionRequest::default()
        };
        let reply = self.peers.position(&self.registry, member.node, request).await?;
        Ok(vector_from_wire(&reply.vector))
    }

    /// Polls until every member's vector covers `needed`; returns the vectors of that poll.
    async fn until_all_hold(
        &self,
        members: &[Placed],
        needed: &Vector,
        until: Instant,
    ) -> Result<Vec<Vector>, Status> {
        loop {
            let held = try_join_all(members.iter().map(|member| self.position(*member))).await?;
            if held.iter().all(|held| covers(held, needed)) {
                return Ok(held);
            }
            if Instant::now() > until {
                return Err(Status::deadline_exceeded("a replica lags behind"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Returns the pointwise maximum of the vectors.
fn joined(vectors: &[Vector]) -> Vector {
    vectors.iter().fold(Vector::new(), |all, vector| join(&all, vector))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_a_share_of_the_grace_apart() {
        assert_eq!(interval(86_400_000), Duration::from_secs(3_600));
        assert_eq!(interval(1_000), Duration::from_secs(1));
        assert_eq!(interval(240_000), Duration::from_secs(10));
    }
}
