//! The start of a grow.
//!
//! **Invariant:** every replica of every new shard is a target of the plan, with an id that was
//! never given out; the sources are the shippers of all shards.

use super::refusal::{PlanError, check_start};
use crate::catalog::Catalog;
use crate::control::plan::{Plan, PlanKind, Source, Step, Target};
use crate::ids::{NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::SHARDS_SERVED_MAX;

/// Returns the version that starts growing `catalog` to `to` shards.
pub(super) fn start_grow(
    catalog: &Catalog,
    to: u32,
    target_nodes: &[Vec<NodeId>],
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PlanError> {
    check_start(catalog)?;
    let from = catalog.spec.shards;
    if to > SHARDS_SERVED_MAX {
        return Err(PlanError::Above64);
    }
    let replicas = catalog.spec.replicas as usize;
    let is_whole = |nodes: &Vec<NodeId>| nodes.len() == replicas;
    if target_nodes.len() != (to - from) as usize || !target_nodes.iter().all(is_whole) {
        return Err(PlanError::NoNode(catalog.spec.replicas));
    }
    let mut next = catalog.next(now_us, nonce);
    let sources = catalog
        .placement
        .iter()
        .filter_map(|shard| Some((shard.shard, shard.shipper()?)))
        .map(|(shard, member)| Source::new(shard, member.replica, member.node))
        .collect();
    let of_shards = target_nodes.iter().zip(from..);
    let targets: Vec<Target> = of_shards
        .flat_map(|(nodes, shard)| nodes.iter().map(move |node| (ShardId(shard), *node)))
        .zip(catalog.next_replica.0..)
        .map(|((shard, node), id)| Target { shard, replica: ReplicaId(id), node })
        .collect();
    next.next_replica = ReplicaId(catalog.next_replica.0 + targets.len() as u64);
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind: PlanKind::Grow { from, to },
        from_epoch: catalog.epoch,
        started_at_us: now_us,
        step: Step::Prepare,
        sources,
        targets,
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    Ok(next)
}
