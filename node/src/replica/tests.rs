//! Tests of a replica's guarantees on a real engine and a real log.
//!
//! A crash is a copy of the directory that is taken while the replica is open, without a flush or a
//! close. Survival of a power loss is judged by what was synced.

#![allow(clippy::unwrap_used)]

mod bucket_faults;
mod clean_up;
mod crashes;
mod cutover;
mod dated;
mod failures;
mod grow;
mod hosted_plans;
mod hosts;
mod lost_target;
mod moments;
mod replay;
mod replication;
pub(crate) mod replicator;
mod restore;
mod rmw;
mod scans;
mod seals;
mod service;
mod shipping;
mod shrink;
mod size;
mod slowed;
pub(crate) mod support;
mod ties;
mod undecided;
mod writes;
