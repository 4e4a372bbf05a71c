//! The build of a replica: its bulk bytes are a checkpoint and the log after it, both from the
//! bucket, never from a node that serves.
//!
//! | file | owns |
//! |---|---|
//! | `sources` | the archives of a shard: which one a replica begins with, which others its logs need |
//! | `reader`, `chunks` | the bucket as a build reads it: downloads, manifests, the chunks of a log |
//! | `checkpoint`, `adopt` | a checkpoint becomes the database of a replica, or its rows are merged |
//! | `resized`, `followed` | what the sources of a resize have shipped and the shard has not |
//! | `join` | the log is taken as it is: the replica becomes a member of its shard |
//! | `restore`, `taken` | the logs are merged up to a target time: the replica begins a new keyspace |
//! | `files`, `groups`, `filter` | a file of a checkpoint, groups that fit into a record, the entries of one shard |
//! | `resize` | the rows that change shards: exports of the sources, what targets load, the tails of the logs |
//!
//! **Invariant:** a replica under construction serves nothing; a transient error keeps the
//! downloaded files for the next attempt.

mod adopt;
mod bootstrap;
mod checkpoint;
mod chunks;
mod error;
mod files;
mod filter;
mod followed;
mod groups;
mod join;
mod reader;
pub(crate) mod resize;
mod resized;
mod restore;
pub(crate) mod sources;
mod taken;

pub(crate) use bootstrap::{Adoption, Bootstrap, Log};
pub(crate) use error::BuildError;
pub(crate) use resized::Resized;
