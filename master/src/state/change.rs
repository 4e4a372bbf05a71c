//! The changes that an administrator can request of a keyspace, as its driver receives them.

use std::sync::Arc;

use tokio::sync::oneshot;
use vasto_core::catalog::{Catalog, NodeDrain};
use vasto_core::error::VastoError;
use vasto_core::ids::{PlanId, ReplicaId};
use vasto_core::reconcile::{MoveOrder, Pace};

/// The reason of an operation that an administrator cancelled.
pub(crate) const CANCELLED: &str = "cancelled by an administrator";

/// A change that an administrator can request of a keyspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CatalogChange {
    /// Change the number of shards, up or down, at most at this rate, bytes a second.
    Resize { to: u32, max_rate: Option<u64> },
    /// End the quarantines that keep the keyspace from shrinking to so many shards.
    EndQuarantines { to: u32 },
    /// Undo the running plan.
    Cancel { plan: PlanId },
    /// Pause, resume or slow down a running plan, or that of a move.
    Pace { plan: PlanId, pace: Pace },
    /// Pause, resume or slow down the operation that drains a node.
    PaceDrain { operation: String, pace: Pace },
    /// Pause, resume or slow down the moves of that rebalance, as it was itself.
    PaceMoves { rebalance_us: u64, pace: Pace },
    /// Transfer leadership to another replica of the shard.
    TransferLeadership { from: ReplicaId, to: ReplicaId },
    /// Evict a replica from its placement; with `accept_loss`, for good.
    Evict { replica: ReplicaId, accept_loss: bool },
    /// Move a node's replicas elsewhere.
    DrainNode(NodeDrain),
    /// Cancel the operation that drains a node: the node keeps the replicas that it still has.
    CancelDrain { operation: String },
    /// Move replicas to other nodes, for the rebalance that began then.
    Move { orders: Vec<MoveOrder>, rebalance_us: u64 },
    /// Make another replica of its shard the preferred primary, for that rebalance.
    Prefer { replica: ReplicaId, rebalance_us: u64 },
    /// Undo the moves whose new replicas are not placed yet.
    CancelMoves,
    /// Drop the keyspace.
    Delete,
}

impl CatalogChange {
    /// Returns true for what was decided by a picture of the whole cluster, the newest settings
    /// included: once another master has changed the keyspace, it is decided anew.
    pub(crate) fn is_of_rebalance(&self) -> bool {
        matches!(self, Self::Move { .. } | Self::Prefer { .. })
    }
}

/// A change, and the channel that waits for its version.
pub(crate) struct ChangeRequest {
    pub(crate) change: CatalogChange,
    pub(crate) reply: oneshot::Sender<Result<Arc<Catalog>, VastoError>>,
}
