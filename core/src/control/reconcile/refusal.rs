//! Reasons why a resize, the early end of a quarantine, or a change of the pace of a plan is
//! refused; each text names the remedy.
//!
//! **Invariant:** a resize never begins while another plan runs or a replica is draining.

use crate::band::ShardCountError;
use crate::catalog::Catalog;
use crate::control::operation::operation_id;
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits::{BULK_RATE_MIN, SHARDS_SERVED_MAX};

/// Reasons why a resize is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The count is not legal.
    #[error(transparent)]
    Count(#[from] ShardCountError),
    /// The keyspace already has this count.
    #[error("the keyspace already has {0} shards")]
    SameCount(u32),
    /// Bands that would arrive are in quarantine on the shards that they left.
    #[error(
        "the shards that stay still keep rows that left them in an earlier grow, {}", remedy_in(*seconds)
    )]
    Quarantined {
        /// Seconds until the last of these quarantines ends; 0 when the rows are being removed.
        seconds: u64,
    },
    /// Growing above 64 shards is not supported yet.
    #[error("growing above {SHARDS_SERVED_MAX} shards is not supported yet")]
    Above64,
    /// Another plan is running.
    #[error(
        "operation {0} is running on this keyspace; wait for it (`vasto operation show {0}`) or cancel it (`vasto operation cancel {0}`)"
    )]
    Busy(String),
    /// The keyspace was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
    /// Too few nodes could take the new shards.
    #[error(
        "each new shard needs {0} live nodes with room for it; start more with `vasto serve node`"
    )]
    NoNode(u32),
    /// A replica has not been drained.
    #[error(
        "replica {0} of shard {1} has left its placement and may hold writes that nobody else has; start its node so that it is drained, or give up what {2} alone holds with `vasto node replace {2} --accept-loss --yes`"
    )]
    DrainingReplica(ReplicaId, ShardId, NodeId),
}

/// Reasons why the pace of an operation is not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PaceError {
    /// The plan does not run any more.
    #[error("operation {0} has ended already")]
    Ended(String),
    /// The sources are sealed.
    #[error(
        "operation {0} is in its cutover, which takes a moment and cannot be held up; try again, or see `vasto operation show {0}`"
    )]
    Sealed(String),
    /// The plan has committed.
    #[error("operation {0} has changed ownership already; it ends by itself")]
    Committed(String),
    /// The plan is a part of an operation that is paused.
    #[error(
        "operation {0} is a part of {1}, which is paused; let that go on (`vasto operation resume {1}`)"
    )]
    PartOfPaused(String, String),
    /// The plan is a part of an operation whose rate is bounded.
    #[error(
        "operation {0} is a part of {1}, whose rate is bounded for all its parts together; change that (`vasto operation rate {1}`)"
    )]
    PartOfBounded(String, String),
    /// Nothing would end at this rate, bytes a second.
    #[error(
        "a rate of {0} bytes a second is too low; use at least {BULK_RATE_MIN}, or stop the operation for a while with `vasto operation pause`"
    )]
    TooSlow(u64),
}

fn remedy_in(seconds: u64) -> String {
    match seconds {
        0 => "and are removing them; try again in a moment".to_owned(),
        seconds => format!(
            "for {seconds} s more; wait for that, or end it now with `vasto keyspace resize --end-quarantine`"
        ),
    }
}

/// Checks what every resize needs: no plan is running, no replica moves
/// or is draining.
pub(super) fn check_start(catalog: &Catalog) -> Result<(), PlanError> {
    if let Some(plan) = &catalog.plan {
        return Err(PlanError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    if let Some(moving) = catalog.moves.first() {
        return Err(PlanError::Busy(operation_id(catalog.keyspace, moving.id())));
    }
    match catalog.draining.first() {
        Some(held) => Err(PlanError::DrainingReplica(held.replica, held.shard, held.node)),
        None => Ok(()),
    }
}
