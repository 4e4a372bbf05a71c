//! The master: membership, placement and the driver of structural changes.
//!
//! It owns who is alive, what nodes report, and the writing of catalog versions; it serves the
//! `Master` service to people and clients and the `Membership` service to nodes.
//!
//! **Invariant:** nothing here is state that could not be rebuilt from the catalog in the bucket
//! and the nodes' reports. A catalog version is shown to a node or a client only after its
//! create-only write has won, so any number of masters may run at once; the losers adopt.
//!
//! A newcomer's path: [`Master::start`] in `server`, then `state` (what is known, synchronous),
//! `driver` (one task per keyspace, the only writer of its catalog), `session` (nodes), `service`
//! and `admin` (people), `document` (the JSON that scripts read), `bill` (what a month costs), `loads` and
//! `placement` (who gets what).

mod admin;
mod bill;
mod cluster;
mod document;
mod driver;
mod loads;
mod metrics;
mod moves;
mod placement;
mod repair;
mod server;
mod service;
mod session;
mod shipped;
mod state;
mod upkeep;

pub use server::{Master, MasterConfig, MasterError, RunningMaster};
