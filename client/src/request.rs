//! The requests of a keyspace's handle, each beside the method of [`Keyspace`](crate::Keyspace)
//! that makes it.
//!
//! **Invariant:** nothing is sent before all checks of a request are made. Answers come in the
//! order of the request, whatever shards they came from.

mod get;
mod merge;
mod modify;
mod scan;
mod write;

pub use modify::Modify;
pub use scan::{Rows, Scan};
pub use write::{Delete, Put, WriteBatch};
