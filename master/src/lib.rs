//! The master: membership, placement and the driver of structural changes.
//!
//! The master owns liveness, the nodes' reports, and the writing of catalog versions; it serves the
//! `Master` service to people and clients and the `Membership` service to nodes.
//!
//! **Invariant:** all state here can be rebuilt from the catalog in the bucket and the nodes'
//! reports. A catalog version is shown to a node or a client only after its create-only write
//! has won, so any number of masters may run at once; a master whose write lost adopts the version
//! that won.
//!
//! Where to start reading: [`Master::start`] in `server`, then `state` (synchronous; what the
//! master knows and decides), `driver` (one task per keyspace, the only writer of its catalog),
//! `session` (nodes), `service` and `api` (people), `view` (the JSON for scripts), `loads` and
//! `placement` (which node gets which replica), `balancer` (moves until the nodes are even),
//! `forecast` (what a change moves and needs), `trace` (the spans of operations).
//!
//! Modules import downwards only: `placement`, `loads`, `metrics` < `state` < `trace`, `forecast`,
//! `cluster` < `driver`, `upkeep`, `observer`, `view` < `api` < `balancer`, `service`, `session`,
//! `gauges` < `server`.

mod api;
mod balancer;
mod cluster;
#[cfg(test)]
mod documents_tests;
mod driver;
mod forecast;
mod gauges;
mod loads;
mod metrics;
mod observer;
mod placement;
mod server;
mod service;
mod session;
mod state;
mod trace;
mod upkeep;
mod view;

pub use server::{Master, MasterConfig, MasterError, RunningMaster};
