//! Administrative calls to the master. Each answers a document of [`crate::answer`].
//!
//! **Invariant:** a call that may have changed something and was not answered is
//! [`ErrorKind::Unknown`](crate::ErrorKind::Unknown). Names and counts are checked before anything
//! is sent.

mod cluster;
mod keyspace;
mod operation;
mod relocate;

pub use self::relocate::{EmptyOptions, RestoreOptions};
