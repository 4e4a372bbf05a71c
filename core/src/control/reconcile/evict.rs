//! Eviction of a replica from the placement of its shard.
//!
//! Without `accept_loss` an evicted replica is draining: the others pull the records that they
//! lack. The reconciler (`members`) ends that with a version that names the replica removed, once a
//! serving replica holds everything that it holds; an eviction with `accept_loss` ends it at once.
//!
//! **Invariant:** a replica whose records no other replica holds stays draining, unless its loss is
//! accepted.

use super::quarantine::remove_from_quarantines;
use crate::catalog::{Catalog, DrainingReplica, GivenUp, KeyspaceState, Placed, ReplicaMove};
use crate::control::operation::operation_id;
use crate::control::plan::Step;
use crate::ids::{Epoch, ReplicaId, ShardId};

/// Reasons why a replica is not evicted from its placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// The replica is neither placed nor draining.
    #[error(
        "replica {0} is not placed and not waiting to be drained; see `vasto keyspace describe`"
    )]
    NotThere(ReplicaId),
    /// The replica has left its placement and is draining.
    #[error(
        "replica {0} has left its shard already and is being drained; wait for that, or give up what it alone holds \
         with --accept-loss"
    )]
    Draining(ReplicaId),
    /// The shard of the replica has retired.
    #[error(
        "replica {0} belongs to a shard that has retired; it serves nothing, and goes when its quarantine ends: see \
         `vasto keyspace describe`"
    )]
    Retired(ReplicaId),
    /// The replica is the only one of its shard.
    #[error("replica {0} is the only one of shard {1}: nothing would be left of the shard")]
    Last(ReplicaId, ShardId),
    /// The replica is the only one of its shard that serves.
    #[error(
        "replica {0} is the only one of shard {1} that serves: nothing could be read any more; start the nodes of the others first"
    )]
    OnlyOneServes(ReplicaId, ShardId),
    /// Another plan runs.
    #[error(
        "operation {0} is running on this keyspace; wait for it or cancel it (`vasto operation cancel {0}`)"
    )]
    Busy(String),
    /// The keyspace was deleted.
    #[error("the keyspace was deleted")]
    Deleted,
}

/// Returns the catalog version that evicts a replica from its placement. With `accept_loss`, data
/// that no other replica holds is given up too, also that of a replica that is draining already,
/// and the files are deleted when the node is back. `nonce` is the random number that distinguishes
/// this version from a rival writer's with the same number.
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
    if catalog.is_retired(replica) {
        return Err(EvictError::Retired(replica));
    }
    let mut next = catalog.next(now_us, nonce);
    // A draining replica is not placed: its removal changes neither ownership nor placement, so the
    // epoch stays.
    if catalog.draining.iter().any(|draining| draining.replica == replica) {
        if !accept_loss {
            return Err(EvictError::Draining(replica));
        }
        next.draining.retain(|draining| draining.replica != replica);
        next.remove_for_good([replica]);
        next.given_up.push(GivenUp { replica, version: next.version });
        return Ok(next);
    }
    let shard = next
        .placement
        .iter_mut()
        .find(|shard| shard.replicas.iter().any(|member| member.replica == replica));
    let shard = shard.ok_or(EvictError::NotThere(replica))?;
    if shard.replicas.len() < 2 {
        return Err(EvictError::Last(replica, shard.shard));
    }
    let node = shard
        .replicas
        .iter()
        .find(|member| member.replica == replica)
        .map(|member| member.node)
        .unwrap_or_default();
    shard.replicas.retain(|member| member.replica != replica);
    // `None` means that the first replica is primary: it takes over from an evicted primary, and
    // needs no mention when it is the acting primary and the eviction made it the first.
    if shard.primary == Some(replica)
        || shard.primary == shard.replicas.first().map(|member| member.replica)
    {
        shard.primary = None;
    }
    shard.transferring_to = None;
    // Moved bands stay in quarantine until a manifest of each shipping target covers them. If the
    // evicted replica is such a target, the replica that ships from now on (the first) takes its
    // place there.
    let successor = shard.shipper().map(|shipper| shipper.replica);
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

/// Returns the catalog version that evicts a replica on an operator's request. Refuses to evict the
/// only replica of its shard that serves, even with `accept_loss`.
pub fn evict_on_request(
    catalog: &Catalog,
    replica: ReplicaId,
    accept_loss: bool,
    serves: impl Fn(&Placed) -> bool,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, EvictError> {
    // A move that has placed its new replica waits for the others of its shard; with one of them
    // evicted it ends, and the one that was to move stays.
    let is_third = |moving: &ReplicaMove| {
        moving.plan.step == Step::Committed
            && moving.replaces != replica
            && !moving.plan.targets.iter().any(|target| target.replica == replica)
    };
    let touches = |moving: &&ReplicaMove| {
        if is_third(moving) {
            return false;
        }
        let shard = moving.shard().and_then(|shard| catalog.shard(shard));
        let mut members = shard.into_iter().flat_map(|shard| &shard.replicas);
        members.any(|member| member.replica == replica)
    };
    if let Some(moving) = catalog.moves.iter().find(touches) {
        return Err(EvictError::Busy(operation_id(catalog.keyspace, moving.id())));
    }
    let next = evict(catalog, replica, accept_loss, now_us, nonce)?;
    let shard = catalog
        .placement
        .iter()
        .find(|shard| shard.replicas.iter().any(|member| member.replica == replica));
    let serving: Vec<ReplicaId> = shard
        .into_iter()
        .flat_map(|shard| &shard.replicas)
        .filter(|member| serves(member))
        .map(|member| member.replica)
        .collect();
    match (shard, &serving[..]) {
        (Some(shard), [only]) if *only == replica => {
            Err(EvictError::OnlyOneServes(replica, shard.shard))
        }
        _ => Ok(next),
    }
}
