//! The balance of a cluster: which replicas move, and which become preferred primaries, so that the
//! nodes hold and do alike.
//!
//! A node's *share* of bytes, load and preferred primaries is compared with its part of the capacity
//! of all nodes. The *tension* of a cluster is the sum of the squares of what each node has of each,
//! over its capacity: it is least when every node has its part. A move is made when it lowers the
//! tension by more than a part of what it moves ([`HYSTERESIS`]), or lets a shard be in one more
//! zone.
//!
//! **Invariants**
//! - Pure and deterministic. Two replicas of a shard are never on one node; no move leaves a shard
//!   in fewer zones; a node that takes nothing gets nothing.
//! - Every move raises the number of zones of a shard, or leaves all of them and lowers the tension
//!   by a margin. Both have bounds, so that moves that are made one after the other come to an end,
//!   and none takes back what an earlier one has done.

mod cluster;
mod decide;
mod tension;
#[cfg(test)]
mod tests;

pub use cluster::{Balance, BalanceNode, BalanceReplica, BalanceShard, Move, When};
pub use decide::{MOVES_PLANNED_MAX, all_moves, is_balanced, next_moves};
pub use tension::{HYSTERESIS, PRIMARY_HYSTERESIS};
