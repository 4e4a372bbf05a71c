//! Administrative changes of a keyspace: the catalog version that makes a change, or the error that
//! says why it cannot be made.
//!
//! **Invariant:** pure; nothing is written here.

use vasto_core::catalog::{Catalog, KeyspaceState, Placed};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{Epoch, PlanId, ReplicaId};
use vasto_core::operation::operation_id;
use vasto_core::plan::{Plan, PlanKind};
use vasto_core::reconcile::{
    EvictError, MoveError, PaceError, PlanError, Presence, abort, cancel_drain, cancel_move,
    cancel_moves, check_rate, drain_node, end_quarantines, evict_on_request, pace_drain,
    pace_moves, prefer, set_pace, start_moves, start_resize, transfer_leadership,
};
use vasto_shipping::Rebalance;

use crate::forecast::resize::resize;
use crate::forecast::time::Paces;
use crate::state::{CANCELLED, CatalogChange, ClusterState, Keyspace};

/// Returns the version that makes a change.
pub(crate) fn changed(
    state: &ClusterState,
    keyspace: &Keyspace,
    change: &CatalogChange,
    mono_us: u64,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let (catalog, reports) = (&*keyspace.catalog, &keyspace.reports);
    match *change {
        CatalogChange::Resize { to, max_rate } => {
            resized(state, keyspace, to, max_rate, now_us, nonce)
        }
        CatalogChange::EndQuarantines { to } => {
            let ended = end_quarantines(catalog, to, now_us, nonce).map_err(plan_error)?;
            ended.ok_or_else(|| {
                let message = format!("no quarantine of keyspace {} is in the way", catalog.name);
                VastoError::new(ErrorCode::NotFound, message)
            })
        }
        CatalogChange::Cancel { plan } => cancelled(keyspace, plan, now_us, nonce),
        CatalogChange::Pace { plan, pace } => {
            state.check_part(catalog, plan, pace).map_err(pace_error)?;
            set_pace(catalog, plan, pace, now_us, nonce).map_err(pace_error)
        }
        CatalogChange::PaceDrain { ref operation, pace } => {
            pace_drain(catalog, operation, pace, now_us, nonce).map_err(pace_error)
        }
        CatalogChange::PaceMoves { rebalance_us, pace } => {
            pace_moves(catalog, rebalance_us, pace, now_us, nonce)
                .ok_or_else(|| nothing_moves(catalog))
        }
        CatalogChange::TransferLeadership { from, to } => transfer_leadership(
            catalog, from, to, now_us, nonce,
        )
        .ok_or_else(|| {
            let message = format!(
                "replica {from} cannot hand over to replica {to} now; see `vasto keyspace describe`"
            );
            VastoError::new(ErrorCode::FailedPrecondition, message)
        }),
        CatalogChange::Evict { replica, accept_loss } => {
            evicted(state, keyspace, replica, accept_loss, mono_us, now_us, nonce)
        }
        CatalogChange::DrainNode(ref drain) => drain_node(catalog, drain.clone(), now_us, nonce)
            .ok_or_else(|| {
                let message =
                    format!("node {} has no replica of keyspace {}", drain.node, catalog.name);
                VastoError::new(ErrorCode::NotFound, message)
            }),
        CatalogChange::CancelDrain { ref operation } => {
            cancel_drain(catalog, operation, CANCELLED, reports, now_us, nonce)
                .ok_or_else(|| has_ended(operation))
        }
        CatalogChange::Move { ref orders, rebalance_us } => {
            check_rebalance(state, rebalance_us)?;
            let orders = state.orders_that_fit(keyspace, orders);
            start_moves(catalog, &orders, rebalance_us, now_us, nonce).map_err(move_error)
        }
        CatalogChange::Prefer { replica, rebalance_us } => {
            check_rebalance(state, rebalance_us)?;
            prefer(catalog, replica, rebalance_us, now_us, nonce).ok_or_else(|| {
                let message =
                    format!("replica {replica} of {} cannot be preferred now", catalog.name);
                VastoError::new(ErrorCode::FailedPrecondition, message)
            })
        }
        CatalogChange::CancelMoves => cancel_moves(catalog, CANCELLED, reports, now_us, nonce)
            .ok_or_else(|| nothing_moves(catalog)),
        CatalogChange::Delete => deleted(catalog, now_us, nonce),
    }
}

fn nothing_moves(catalog: &Catalog) -> VastoError {
    let message = format!("no replica of keyspace {} is on its way", catalog.name);
    VastoError::new(ErrorCode::NotFound, message)
}

/// Returns the version that starts a resize, with its estimate at this bound of its rate; refuses
/// one that a node has no disk for.
fn resized(
    state: &ClusterState,
    keyspace: &Keyspace,
    to: u32,
    max_rate: Option<u64>,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let max_rate = check_rate(max_rate).map_err(pace_error)?;
    let mut next = start(state, keyspace, to, now_us, nonce)?;
    let Keyspace { catalog, reports, .. } = keyspace;
    let paces = Paces::of(state).at_most(max_rate);
    let forecast = resize(catalog, reports, to, next.plan.as_ref(), &paces);
    forecast.check_room(state)?;
    if let Some(plan) = &mut next.plan {
        plan.max_rate = max_rate;
        plan.estimate = Some(forecast.estimate());
    }
    Ok(next)
}

/// Returns the version that starts a resize, whatever the disks of its nodes.
pub(crate) fn start(
    state: &ClusterState,
    keyspace: &Keyspace,
    to: u32,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let (targets, missing) = match state.grow_targets(keyspace, to) {
        Ok(targets) => (targets, None),
        Err(missing) => (Vec::new(), Some(missing)),
    };
    start_resize(&keyspace.catalog, to, &targets, now_us, nonce).map_err(|error| {
        match (error, missing) {
            // The error names live nodes that get no replica.
            (PlanError::NoNode(_), Some(missing)) => missing.into(),
            (error, _) => plan_error(error),
        }
    })
}

/// Checks that the rebalance runs: nothing begins for one that has ended or was paused meanwhile.
fn check_rebalance(state: &ClusterState, rebalance_us: u64) -> Result<(), VastoError> {
    let running = state.settings.running_rebalance();
    let running = running.filter(|running| running.since_us == rebalance_us);
    let asked = Rebalance { since_us: rebalance_us, ..Rebalance::default() };
    match running {
        Some(running) if running.paused => {
            let message = format!("operation {} is paused", running.operation_id());
            Err(VastoError::new(ErrorCode::FailedPrecondition, message))
        }
        Some(_) => Ok(()),
        None => Err(has_ended(&asked.operation_id())),
    }
}

fn cancelled(
    keyspace: &Keyspace,
    plan: PlanId,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let catalog = &keyspace.catalog;
    let id = operation_id(catalog.keyspace, plan);
    let committed = || {
        let message = format!(
            "operation {id} has changed ownership already and cannot be cancelled; it ends by itself"
        );
        VastoError::new(ErrorCode::FailedPrecondition, message)
    };
    if catalog.moves.iter().any(|moving| moving.id() == plan) {
        return cancel_move(catalog, plan, CANCELLED, &keyspace.reports, now_us, nonce)
            .ok_or_else(committed);
    }
    if catalog.plan.as_ref().is_none_or(|running| running.id != plan) {
        return Err(has_ended(&id));
    }
    abort(catalog, CANCELLED, &keyspace.reports, now_us, nonce).ok_or_else(committed)
}

fn evicted(
    state: &ClusterState,
    keyspace: &Keyspace,
    replica: ReplicaId,
    accept_loss: bool,
    mono_us: u64,
    now_us: u64,
    nonce: u64,
) -> Result<Catalog, VastoError> {
    let serves = |placed: &Placed| {
        let report = keyspace.reports.get(&placed.replica);
        matches!(state.presence(placed.node, mono_us), Presence::Here(_))
            && report.is_some_and(|report| report.replication.ready && !report.has_failed())
    };
    evict_on_request(&keyspace.catalog, replica, accept_loss, serves, now_us, nonce).map_err(
        |error| {
            let code = match &error {
                EvictError::NotThere(_) | EvictError::Deleted => ErrorCode::NotFound,
                EvictError::Draining(_)
                | EvictError::Retired(_)
                | EvictError::Last(..)
                | EvictError::OnlyOneServes(..)
                | EvictError::Busy(_) => ErrorCode::FailedPrecondition,
            };
            VastoError::new(code, error.to_string())
        },
    )
}

fn deleted(catalog: &Catalog, now_us: u64, nonce: u64) -> Result<Catalog, VastoError> {
    let ends = |plan: &&Plan| !matches!(plan.kind, PlanKind::Restore { .. });
    if let Some(plan) = catalog.plan.as_ref().filter(ends) {
        return Err(plan_error(PlanError::Busy(operation_id(catalog.keyspace, plan.id))));
    }
    if catalog.state == KeyspaceState::Deleted {
        return Err(plan_error(PlanError::Deleted));
    }
    let mut next = catalog.next(now_us, nonce);
    next.state = KeyspaceState::Deleted;
    next.epoch = Epoch(catalog.epoch.0 + 1);
    next.quarantines.clear();
    next.pins.clear();
    next.moves.clear();
    Ok(next)
}

pub(crate) fn has_ended(id: &str) -> VastoError {
    VastoError::new(ErrorCode::FailedPrecondition, format!("operation {id} has ended already"))
}

pub(crate) fn pace_error(error: PaceError) -> VastoError {
    let code = match &error {
        PaceError::TooSlow(_) => ErrorCode::InvalidArgument,
        PaceError::Ended(_)
        | PaceError::Sealed(_)
        | PaceError::Committed(_)
        | PaceError::PartOfPaused(..)
        | PaceError::PartOfBounded(..) => ErrorCode::FailedPrecondition,
    };
    VastoError::new(code, error.to_string())
}

fn move_error(error: MoveError) -> VastoError {
    let code = match &error {
        MoveError::Deleted => ErrorCode::NotFound,
        MoveError::Busy(_) | MoveError::Outdated => ErrorCode::FailedPrecondition,
    };
    VastoError::new(code, error.to_string())
}

fn plan_error(error: PlanError) -> VastoError {
    let code = match &error {
        PlanError::Count(_) | PlanError::SameCount(_) => ErrorCode::InvalidArgument,
        PlanError::Above64 | PlanError::Quarantined { .. } => ErrorCode::FailedPrecondition,
        PlanError::Busy(_) | PlanError::NoNode(_) | PlanError::DrainingReplica(..) => {
            ErrorCode::FailedPrecondition
        }
        PlanError::Deleted => ErrorCode::NotFound,
    };
    VastoError::new(code, error.to_string())
}
