//! The master: membership, placement and the driver of structural changes.
//!
//! The master owns liveness, the nodes' reports, and the writing of catalog versions; it serves the
//! `Master` service to people and clients and the `Membership` service to nodes.
//!
//! **Invariant:** all state here can be rebuilt from the catalog in the bucket and the nodes'
//! reports. A catalog version is shown to a node or a client only after its create-only write
//! has won, so any number of masters may run at once; the losers adopt.
//!
//! Where to start reading: [`Master::start`] in `server`, then `state` (known state, synchronous),
//! `driver` (one task per keyspace, the only writer of its catalog), `session` (nodes), `service`
//! and `admin` (people), `document` (the JSON for scripts), `cost` (the monthly cost), `loads` and
//! `placement` (which node gets which replica).

mod admin;
mod cluster;
mod cost;
mod document;
mod driver;
mod loads;
mod metrics;
mod placement;
mod relocation;
mod repair;
mod server;
mod service;
mod session;
mod shipped;
mod state;
mod upkeep;

pub use server::{Master, MasterConfig, MasterError, RunningMaster};
