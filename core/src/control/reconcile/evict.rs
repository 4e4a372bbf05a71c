//! Taking a replica out of its shard.
//!
//! **Invariant:** a replica whose records nobody else holds stays draining, unless its loss is accepted.

use super::quarantine::remove_from_quarantines;
use crate::catalog::{Catalog, DrainingReplica, GivenUp, KeyspaceState, Placed};
use crate::control::operation::operation_id;
use crate::ids::{Epoch, ReplicaId, ShardId};

/// Reasons why a replica is not evicted from its placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// The replica is neither placed nor draining.
    #[error("replica {0} is not placed and not waiting to be drained; see `vasto keyspace describe`")]
    NotThere(ReplicaId),
    /// The replica is the only one of its shard.
    #[error("replica {0} is the only one of shard {1}: nothing would be left of the shard")]
    Last(ReplicaId, ShardId),
    /// The replica is the only one of its shard that serves.
    #[error(
        "replica {0} is the only one of shard {1} that serves: nothing could be read any more; start the nodes of the others first"
    )]
    OnlyOneServes(ReplicaId, ShardId),
    /// Another plan runs.
    #[error("operation {0} is running on this keyspace; wait for it or cancel it (`vasto operation cancel {0}`)")]
    Busy(String),
    /// The keyspace was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
}

/// Returns the version that evicts a replica from its placement. With `accept_loss`, data that no other replica holds
/// is given up too, and the files are deleted when the node is back.
pub fn evict(
    catalog: &Catalog,
    replica: ReplicaId,
    accept_loss: bool,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, EvictError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(EvictError::Deleted);
    }
    if let Some(plan) = &catalog.plan {
        return Err(EvictError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    let mut next = catalog.next(now_us, nonce);
    if accept_loss && catalog.draining.iter().any(|one| one.replica == replica) {
        next.draining.retain(|one| one.replica != replica);
        next.remove_for_good([replica]);
        next.given_up.push(GivenUp { replica, version: next.version });
        return Ok(next);
    }
    let shard = next.placement.iter_mut().find(|shard| shard.replicas.iter().any(|one| one.replica == replica));
    let shard = shard.ok_or(EvictError::NotThere(replica))?;
    if shard.replicas.len() < 2 {
        return Err(EvictError::Last(replica, shard.shard));
    }
    let node = shard.replicas.iter().find(|one| one.replica == replica).map(|one| one.node).unwrap_or_default();
    shard.replicas.retain(|one| one.replica != replica);
    if shard.primary == Some(replica) || shard.primary == shard.replicas.first().map(|one| one.replica) {
        shard.primary = None;
    }
    shard.transferring_to = None;
    let successor = shard.shipper().map(|one| one.replica);
    let shard = shard.shard;
    next.epoch = Epoch(catalog.epoch.0 + 1);
    remove_from_quarantines(&mut next.quarantines, replica, successor);
    if accept_loss {
        next.remove_for_good([replica]);
        next.given_up.push(GivenUp { replica, version: next.version });
    } else {
        next.draining.push(DrainingReplica { shard, replica, node, since_us: now_us });
    }
    Ok(next)
}

/// Returns the version that evicts a replica on request: never the only one that serves, whatever else may be given
/// up.
pub fn evict_on_request(
    catalog: &Catalog,
    replica: ReplicaId,
    accept_loss: bool,
    serves: impl Fn(&Placed) -> bool,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, EvictError> {
    let next = evict(catalog, replica, accept_loss, now_us, nonce)?;
    let shard = catalog.placement.iter().find(|shard| shard.replicas.iter().any(|one| one.replica == replica));
    let serving: Vec<ReplicaId> =
        shard.into_iter().flat_map(|shard| &shard.replicas).filter(|one| serves(one)).map(|one| one.replica).collect();
    match (shard, &serving[..]) {
        (Some(shard), [only]) if *only == replica => Err(EvictError::OnlyOneServes(replica, shard.shard)),
        _ => Ok(next),
    }
}
