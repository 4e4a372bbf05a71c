//! Decision whether this node answers a request: by the state of its shard's replica, the epochs,
//! and authority.
//!
//! **Invariant:** a strict request is admitted only under a term of authority, which its answer is
//! checked against.

use std::time::Duration;

use tokio::sync::watch;
use vasto_core::ids::ShardId;
use vasto_core::limits::{AUTHORITY_WAIT, EPOCH_WAIT};
use vasto_core::{ErrorCode, VastoError};

use super::caller::Caller;
use super::refusal::{catching_up, failed, no_authority, not_here, out_of_service};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::authority::Refusal;
use crate::replica::command::Role;

/// Interval between two checks whether authority was renewed.
const RENEWAL_POLL: Duration = Duration::from_millis(10);

/// The replica that executes a request, and the term of authority of a strict one.
pub(super) type Executor = (Replica, Option<u64>);

/// Where a request can be answered.
pub(super) enum Place {
    Here(Replica),
    /// Like `Here`, under this term of authority.
    Serving(Replica, u64),
    /// The replica may gain authority shortly.
    Waiting,
    /// The replica may be the isolated one: a probe that begins now decides.
    Probing(Replica),
    /// Another replica has authority.
    NotServing,
    CatchingUp,
    /// The replica does not serve; other replicas of its shard may.
    OutOfService(Option<String>),
    /// The shard's only replica could not be opened.
    Failed(String),
    NotYet,
    Elsewhere,
}

/// Returns where the request can be answered now.
pub(super) fn place(registry: &NodeRegistry, caller: Caller, shard: ShardId) -> Place {
    let placed = || registry.is_placed_here(caller.keyspace, shard);
    match registry.replica_of(caller.keyspace, shard) {
        // A closed replica applies and accepts nothing. The only replica of its shard still serves
        // reads, and answers writes with the remedy.
        Some(replica)
            if replica.is_closed()
                && !(placed() && registry.is_the_only_one(caller.keyspace, shard)) =>
        {
            if placed() {
                Place::OutOfService(replica.closed())
            } else {
                Place::Elsewhere
            }
        }
        Some(replica) if replica.epoch() >= caller.epoch => match replica.view().role {
            Role::Detached => Place::Elsewhere,
            _ if caller.strict => match replica.authority().admit() {
                Ok(term) => Place::Serving(replica, term),
                Err(Refusal::Elsewhere) => Place::NotServing,
                Err(Refusal::Wait) => Place::Waiting,
                Err(Refusal::Probe) => Place::Probing(replica),
            },
            _ if replica.is_ready()
                && !(registry.stall.is_standing() && replica.followers().has_peers()) =>
            {
                Place::Here(replica)
            }
            _ => Place::CatchingUp,
        },
        Some(_) => Place::NotYet,
        None if placed() => match registry.not_open(caller.keyspace, shard) {
            why if !registry.is_the_only_one(caller.keyspace, shard) => Place::OutOfService(why),
            Some(why) => Place::Failed(why),
            None => Place::NotYet,
        },
        None if registry.known_epoch(caller.keyspace) >= caller.epoch => Place::Elsewhere,
        None => Place::NotYet,
    }
}

/// Returns the replica that executes the request, or the refusal; `None` when that may be known
/// shortly.
pub(super) fn settled(place: Place) -> Option<Result<Executor, VastoError>> {
    match place {
        Place::Here(replica) => Some(Ok((replica, None))),
        Place::Serving(replica, term) => Some(Ok((replica, Some(term)))),
        Place::NotServing => Some(Err(no_authority())),
        Place::Elsewhere => Some(Err(not_here())),
        Place::CatchingUp => Some(Err(catching_up())),
        Place::OutOfService(why) => Some(Err(out_of_service(why))),
        Place::Failed(why) => Some(Err(failed(&why))),
        Place::NotYet | Place::Waiting | Place::Probing(_) => None,
    }
}

/// Waits for the topology of the caller's epoch, or for authority.
///
/// `probing`: the peers were silent already when the request arrived. Only that proves that its
/// client reaches this node. Ends within [`EPOCH_WAIT`] or [`AUTHORITY_WAIT`], whichever is longer.
pub(super) async fn wait_for_place(
    registry: &NodeRegistry,
    caller: Caller,
    shard: ShardId,
    probing: bool,
) -> Result<Executor, VastoError> {
    let deadline = tokio::time::Instant::now() + EPOCH_WAIT.max(AUTHORITY_WAIT);
    let mut node_changes = registry.changes();
    let mut probed = false;
    loop {
        node_changes.borrow_and_update();
        let mut replica_changes =
            registry.replica_of(caller.keyspace, shard).map(|replica| replica.changes());
        let mut authority_changes = registry
            .replica_of(caller.keyspace, shard)
            .map(|replica| replica.authority().changes());
        let mut place = place(registry, caller, shard);
        if let Place::Probing(replica) = &place {
            if !probing {
                return Err(catching_up());
            }
            if !probed {
                // No probe runs for a replica whose authority has ended meanwhile.
                tokio::select! {
                    () = replica.authority().probed() => probed = true,
                    () = changed(&mut authority_changes) => continue,
                    () = tokio::time::sleep_until(deadline) => {}
                }
            }
            if probed {
                match replica.authority().admit_probed() {
                    Ok(term) => place = Place::Serving(replica.clone(), term),
                    // Authority that is based on silence again has another reason: probe again.
                    Err(_) => probed = false,
                }
            }
        }
        let waits_for_authority = matches!(place, Place::Waiting | Place::Probing(_));
        if let Some(settled) = settled(place) {
            return settled;
        }
        tokio::select! {
            _ = node_changes.changed() => {}
            () = changed(&mut replica_changes) => {}
            () = changed(&mut authority_changes) => {}
            // Beliefs are renewed without a notification.
            () = tokio::time::sleep(RENEWAL_POLL), if waits_for_authority => {}
            () = tokio::time::sleep_until(deadline) => {
                return Err(match waits_for_authority {
                    true => catching_up(),
                    false => VastoError::new(
                        ErrorCode::NodeBehind,
                        "the node has not heard of this epoch yet; try again",
                    )
                    .retry_after_ms(50),
                });
            }
        }
    }
}

/// Waits for a change; without a source of changes, forever.
async fn changed<T>(changes: &mut Option<watch::Receiver<T>>) {
    match changes {
        // An error means that the sender is gone: the caller checks again.
        Some(changes) => drop(changes.changed().await),
        None => std::future::pending().await,
    }
}
