//! The control plane, pure: what a keyspace is to be (`spec`, `catalog`, `plan`), what replicas
//! report (`report`, `stored`), what was expected of operations (`estimate`) and how they ended
//! (`operation`), and the rules that make the next catalog version of these (`reconcile`). `balance`
//! decides which replicas move to even out the nodes. `retirement` tells retired shards from later
//! ones.
//!
//! **Invariant:** no data module depends on `reconcile`, which depends on all of them.

pub mod balance;
pub mod catalog;
pub mod estimate;
mod leaving;
mod members;
mod moving;
pub mod operation;
mod placement;
pub mod plan;
pub mod reconcile;
pub mod report;
mod retirement;
mod spec;
pub mod stored;
