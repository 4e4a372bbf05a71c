//! The control plane, pure: what a keyspace is to be (`spec`, `catalog`, `plan`), what replicas
//! report (`report`), how operations ended (`operation`), and the rules that make the next catalog
//! version of these (`reconcile`).
//!
//! **Invariant:** data knows no rule; rules know all data.

pub mod catalog;
pub mod operation;
pub mod plan;
pub mod reconcile;
pub mod report;
mod spec;
