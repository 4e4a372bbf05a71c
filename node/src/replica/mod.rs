//! One replica of a shard: its engine, log, writer, and the handle that other modules use.
//!
//! **Invariants**
//! - Only the writer changes a replica; readers see the state that it has published.
//! - The modules are layers: `state` and `apply` (what is stored), `shared` (what is published),
//!   `store` (log and database under one order), `assign`, `merge` and `replicate` (which entries
//!   win), `group` and `control` (commands), `writer` and `queue` (the thread), `handle` and
//!   `open`.

mod admission;
mod apply;
mod assign;
pub(crate) mod authority;
mod bucket_acks;
pub(crate) mod command;
mod control;
mod dedup;
mod followers;
mod group;
mod handle;
mod held;
mod max_event_times;
mod merge;
pub(crate) mod metrics;
mod open;
mod published;
mod queue;
pub(crate) mod read;
mod replicate;
mod rmw;
mod shared;
pub(crate) mod size;
mod slowed;
pub(crate) mod state;
mod store;
mod stored;
mod superseded;
pub(crate) mod tails;
pub(crate) mod throttle;
mod write_group;
mod writer;

pub(crate) use handle::Replica;
pub(crate) use held::Pause;
pub(crate) use open::{OpenOptions, database_dir};
pub(crate) use replicate::OLD_COPY;
pub(crate) use shared::View;
pub(crate) use state::parse_vector;

#[cfg(test)]
use open::{OpenError, create_dirs, log_dir};
#[cfg(test)]
pub(crate) mod tests;
