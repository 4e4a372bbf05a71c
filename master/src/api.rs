//! Administrative calls, as functions that return a document or one error with the remedy.
//!
//! **Invariant:** nothing here writes a catalog version of an existing keyspace; that goes through
//! the keyspace's driver. A call that only plans changes nothing. These functions keep no state:
//! any master continues what a call has begun.

mod answer;
mod ask;
pub(crate) mod bucket;
pub(crate) mod drain;
pub(crate) mod evict;
pub(crate) mod keyspace;
pub(crate) mod node;
pub(crate) mod operation;
pub(crate) mod rebalance;
pub(crate) mod restore;
pub(crate) mod ship;

pub(crate) use self::answer::{Answer, STOPPED_MEANWHILE, find, stopping, unsure};
pub(crate) use self::ask::{change, command};
