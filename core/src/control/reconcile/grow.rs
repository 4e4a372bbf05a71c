//! Growing a keyspace, step by step up to its commit.
//!
//! **Invariant:** only a source whose seal names the running plan and the sealing version counts as
//! sealed.

use super::commit::commit;
use super::copy::begun;
use super::progress::{
    Advance, Running, others_of_sources, shipping_targets, source_progress, target_progress,
};
use crate::band::{ShardCountError, check_shard_count};
use crate::catalog::{Catalog, KeyspaceState};
use crate::control::operation::operation_id;
use crate::control::plan::{Plan, PlanKind, Source, Step, Target};
use crate::control::report::TargetStage;
use crate::ids::{NodeId, PlanId, ReplicaId, ShardId};
use crate::limits::{SEAL_TIMEOUT, SHARDS_SERVED_MAX, TAIL_LAG_LSNS_MAX};

/// Reasons why a grow is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The count is not legal.
    #[error(transparent)]
    Count(#[from] ShardCountError),
    /// The keyspace already has this count.
    #[error("the keyspace already has {0} shards")]
    SameCount(u32),
    /// Shrinking is not supported yet.
    #[error(
        "shrinking from {from} to {to} shards is not supported yet; ask for more shards, not fewer"
    )]
    Shrink {
        /// Shards now.
        from: u32,
        /// Shards asked for.
        to: u32,
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

/// Returns the version that starts growing `catalog` to `to` shards. `target_nodes` has the nodes
/// for the replicas of each new shard, in the order of the shards, the preferred primary first.
pub fn start_grow(
    catalog: &Catalog,
    to: u32,
    target_nodes: &[Vec<NodeId>],
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, PlanError> {
    if catalog.state == KeyspaceState::Deleted {
        return Err(PlanError::Deleted);
    }
    check_shard_count(to)?;
    let from = catalog.spec.shards;
    if to == from {
        return Err(PlanError::SameCount(from));
    }
    if to < from {
        return Err(PlanError::Shrink { from, to });
    }
    if let Some(plan) = &catalog.plan {
        return Err(PlanError::Busy(operation_id(catalog.keyspace, plan.id)));
    }
    if to > SHARDS_SERVED_MAX {
        return Err(PlanError::Above64);
    }
    if let Some(draining) = catalog.draining.first() {
        return Err(PlanError::DrainingReplica(draining.replica, draining.shard, draining.node));
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
        .map(|(shard, member)| Source {
            shard,
            replica: member.replica,
            node: member.node,
            manifest: None,
        })
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
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    Ok(next)
}

pub(super) fn advance_prepare(running: Running<'_>) -> Advance {
    let Running { catalog, plan, reports, now_us, nonce } = running;
    let mut next_plan = plan.clone();
    for source in &mut next_plan.sources {
        match source_progress(plan, source.replica, reports)
            .and_then(|progress| progress.manifest.clone())
        {
            Some(manifest) => source.manifest = Some(manifest),
            None => return Advance::Wait(format!("the checkpoint of shard {}", source.shard)),
        }
    }
    next_plan.step = Step::Tail;
    let mut next = catalog.next(now_us, nonce);
    next.pins = next_plan
        .sources
        .iter()
        .filter_map(|source| Some(source.manifest.as_ref()?.key.clone()))
        .collect();
    next.plan = Some(next_plan);
    Advance::Write(Box::new(next))
}

pub(super) fn advance_tail(running: Running<'_>, here_us: impl Fn(NodeId) -> u64) -> Advance {
    let Running { catalog, plan, now_us, nonce, .. } = running;
    for target in &plan.targets {
        let progress = match begun(running, target, "target", &here_us) {
            Ok(progress) => progress,
            Err(decision) => return decision,
        };
        if progress.stage != TargetStage::Tailing {
            return Advance::Wait(format!("shard {} to load its bands", target.shard));
        }
        if !progress.manifest_shipped
            && shipping_targets(plan).any(|shipping| shipping.replica == target.replica)
        {
            return Advance::Wait(format!("the first manifest of shard {}", target.shard));
        }
        if progress.lag_lsns > TAIL_LAG_LSNS_MAX {
            return Advance::Wait(format!(
                "shard {} to catch up ({} records behind)",
                target.shard, progress.lag_lsns
            ));
        }
    }
    // After an undone seal the next one waits a little longer each time.
    let pause_us = u64::from(plan.seals_undone) * 250_000;
    if now_us < catalog.written_at_us + pause_us {
        return Advance::Wait("the pause after an undone seal".into());
    }
    let mut next = catalog.next(now_us, nonce);
    next.plan = Some(Plan { step: Step::Sealing, ..plan.clone() });
    Advance::Write(Box::new(next))
}

/// Advances the step `sealing`; `None` when the seal took too long.
pub(super) fn advance_sealing(running: Running<'_>) -> Option<Advance> {
    match sealed_and_caught_up(running) {
        Ok(()) => Some(Advance::Write(Box::new(commit(running)))),
        Err(_)
            if running.now_us.saturating_sub(running.catalog.written_at_us)
                > SEAL_TIMEOUT.as_micros() as u64 =>
        {
            None
        }
        Err(missing) => Some(Advance::Wait(missing)),
    }
}

/// Checks that every placed replica of the sources' shards has sealed under this very version, and
/// that every target holds each source's log up to the seal, where it holds everything that these
/// replicas had accepted.
fn sealed_and_caught_up(running: Running<'_>) -> Result<(), String> {
    let Running { catalog, plan, reports, .. } = running;
    let seal_of = |shard: ShardId, replica: ReplicaId| {
        source_progress(plan, replica, reports)
            .and_then(|progress| progress.sealed)
            .filter(|sealed| sealed.version == catalog.version)
            .ok_or_else(|| format!("replica {replica} of shard {shard} to seal"))
    };
    for (shard, member) in others_of_sources(catalog, plan) {
        seal_of(shard, member.replica)?;
    }
    for source in &plan.sources {
        let sealed = seal_of(source.shard, source.replica)?;
        for target in &plan.targets {
            let cursor = target_progress(plan, target.replica, reports)
                .and_then(|progress| progress.cursors.get(&source.replica).copied())
                .unwrap_or_default();
            if cursor < sealed.lsn {
                return Err(format!(
                    "shard {} to reach the seal of shard {}",
                    target.shard, source.shard
                ));
            }
        }
    }
    Ok(())
}

/// Returns the version that goes back from `sealing` to `tail`: the seal did not complete in time,
/// or its version took too long to write for writers to be paused under it.
pub fn undo_seal(catalog: &Catalog, plan: &Plan, now_us: u64, nonce: u64) -> Catalog {
    let mut next = catalog.next(now_us, nonce);
    next.plan =
        Some(Plan { step: Step::Tail, seals_undone: plan.seals_undone + 1, ..plan.clone() });
    next
}
