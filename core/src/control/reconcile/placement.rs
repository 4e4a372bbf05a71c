//! Removal of replicas from the placement of a shard.
//!
//! **Invariant:** a replica that leaves a placement here is draining.

use crate::catalog::{DrainingReplica, ShardPlacement};
use crate::ids::ReplicaId;

/// Takes replicas out of a shard's placement, to be drained; the last replica takes the place of
/// the removed one.
pub(crate) fn remove_from_placement(
    shard: &mut ShardPlacement,
    draining: &mut Vec<DrainingReplica>,
    gone: impl Iterator<Item = ReplicaId>,
    now_us: u64,
) {
    for replica in gone {
        let Some(at) = shard.replicas.iter().position(|member| member.replica == replica) else {
            continue;
        };
        let member = shard.replicas.swap_remove(at);
        draining.push(DrainingReplica {
            shard: shard.shard,
            replica,
            node: member.node,
            since_us: now_us,
        });
    }
    shard.primary = None;
    shard.transferring_to = None;
}
