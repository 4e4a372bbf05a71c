//! One replica of a shard: its engine, log, writer, and the handle that other modules use.
//!
//! **Invariants**
//! - Only the writer changes a replica; readers see the state that it has published.
//! - The modules are layers: `state` and `apply` (what is stored), `shared` (what is published), `store` (log and
//!   database under one order), `assign`, `merge` and `replicate` (which entries win), `group` and `control` (commands),
//!   `writer` and `queue` (the thread), `handle` and `open`.

mod admission;
mod apply;
mod assign;
pub mod authority;
mod bucket_acks;
pub mod command;
mod control;
mod dedup;
mod followers;
mod group;
mod handle;
mod held;
mod max_event_times;
mod merge;
pub mod metrics;
mod open;
mod published;
mod queue;
pub mod read;
mod replicate;
mod rmw;
mod shared;
pub mod size;
pub mod state;
mod store;
mod superseded;
mod write_group;
mod writer;

pub use handle::Replica;
pub use open::{OpenOptions, database_dir};
pub use replicate::OLD_COPY;
pub use state::parse_vector;

#[cfg(test)]
use open::{OpenError, create_dirs, log_dir};
#[cfg(test)]
pub(crate) mod tests;
