//! GC floor rounds: agreement of all replicas that could still have older writes on when tombstones may be forgotten.
//!
//! The primary asks twice. First every replica durably promises a commit-time fence at the candidate, and names what it
//! holds; when all hold the join of that, they name what they hold once more; when all hold that join too, the floor is
//! logged and replicated like a write.
//!
//! **Invariant:** no floor without the answer of every placed replica, while a plan runs, or while a replica that left
//! its placement is not drained. Silence only keeps tombstones longer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tonic::Status;
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{Vector, covers, join};
use vasto_proto::convert::{status_of, vector_from_wire, vector_to_wire};
use vasto_proto::v1;

use super::peers::Peers;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, Role};

/// Time after which a round is given up; the next round begins anew.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval between two checks of what the members hold.
const LOOK: Duration = Duration::from_millis(50);
/// Shortest interval between rounds, and the longest for long graces.
const INTERVALS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3_600));

/// Returns the interval between the rounds of a keyspace: a share of the grace, so that collection is late by little.
pub fn interval(grace_ms: u64) -> Duration {
    Duration::from_millis(grace_ms / 24).clamp(INTERVALS.0, INTERVALS.1)
}

/// A gc floor round of a primary.
pub(super) struct FloorRound {
    pub registry: Arc<NodeRegistry>,
    pub peers: Arc<Peers>,
    pub replica: Replica,
}

impl FloorRound {
    /// Returns the floor that a round would propose; `None` when no round is due at this replica.
    pub fn candidate(&self, catalog: &Catalog) -> Option<u64> {
        let replica = &self.replica;
        let due = replica.is_ready()
            && replica.closed().is_none()
            && replica.view().role == Role::Primary
            && catalog.plan.is_none()
            && catalog.draining.is_empty();
        let candidate = self.registry.clock.now_us().saturating_sub(catalog.spec.grace_ms() * 1000);
        // Once everything that was written is at or below the floor, an idle replica stays idle.
        (due && candidate > replica.floor() && replica.data_commit_time() > replica.floor()).then_some(candidate)
    }

    /// Runs one whole round.
    pub async fn agree(&self, catalog: &Catalog, floor: u64) -> Result<(), Status> {
        let members = catalog.shard(self.replica.shard).map(|shard| shard.replicas.clone()).unwrap_or_default();
        let until = Instant::now() + PATIENCE;
        let promised = try_join_all(members.iter().map(|one| self.promise(*one, floor))).await?;
        let held = self.until_all_hold(&members, &joined(&promised), until).await?;
        self.until_all_hold(&members, &joined(&held), until).await?;
        // The conditions of the beginning must still hold.
        let now = self.registry.catalog(catalog.keyspace);
        if now.is_none_or(|now| now.epoch != catalog.epoch || self.candidate(&now).is_none()) {
            return Err(Status::aborted("the keyspace has changed meanwhile"));
        }
        self.replica.control(Control::GcFloor { floor }).await.map_err(|error| status_of(&error.into()))?;
        tracing::debug!(
            keyspace = catalog.keyspace.0,
            shard = self.replica.shard.0,
            floor,
            "the collection floor was raised"
        );
        Ok(())
    }

    async fn promise(&self, member: Placed, commit_time: u64) -> Result<Vector, Status> {
        if member.replica == self.replica.id {
            let order = Control::FenceCommitTime { commit_time };
            self.replica.control(order).await.map_err(|error| status_of(&error.into()))?;
            return self.position(member).await;
        }
        let request =
            v1::PromiseRequest { keyspace_id: self.replica.keyspace.0, replica_id: member.replica.0, commit_time };
        let reply = self.peers.promise(&self.registry, member.node, request).await?;
        Ok(vector_from_wire(&reply.vector))
    }

    async fn position(&self, member: Placed) -> Result<Vector, Status> {
        if member.replica == self.replica.id {
            let position = self.replica.position().await.map_err(|error| status_of(&error.into()))?;
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

    /// Waits until every member holds `needed`; returns what each holds then.
    async fn until_all_hold(&self, members: &[Placed], needed: &Vector, until: Instant) -> Result<Vec<Vector>, Status> {
        loop {
            let held = try_join_all(members.iter().map(|one| self.position(*one))).await?;
            if held.iter().all(|held| covers(held, needed)) {
                return Ok(held);
            }
            if Instant::now() > until {
                return Err(Status::deadline_exceeded("a replica lags behind"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn joined(vectors: &[Vector]) -> Vector {
    vectors.iter().fold(Vector::new(), |all, one| join(&all, one))
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
