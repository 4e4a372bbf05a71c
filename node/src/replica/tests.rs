//! What a replica promises, tried on a real engine and a real log.
//!
//! A crash is a copy of the directory that is taken while the replica is open: neither a flush nor
//! a close has happened there. What survives a power loss is judged by what was synced.

#![allow(clippy::unwrap_used)]

mod bucket_faults;
mod clean_up;
mod crashes;
pub(crate) mod duties;
mod failures;
mod grow;
mod hosts;
mod moments;
mod past;
mod replay;
mod replication;
mod rmw;
mod scans;
mod seals;
mod service;
mod shipping;
mod size;
pub mod support;
mod ties;
mod writes;
