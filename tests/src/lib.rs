//! The harness of the end-to-end tests: real processes, real files, real signals.
//!
//! A [`Cluster`] is a master and nodes as separate processes in a temporary directory; [`Load`]
//! writes and reads during a fault and records the promises in a [`History`]; [`verify`] compares
//! the history with the contents of the cluster afterwards.
//!
//! **Invariant:** no function here waits for time to pass: every wait is for a condition and has a
//! deadline. Every started process is ended, also when a test panics or is killed.

pub mod bench;
mod binary;
mod catalog;
mod cluster;
mod command;
mod counters;
mod crowd;
mod figures;
mod front;
mod full_writes;
mod history;
mod hosts;
mod kept;
mod keys;
pub mod linear;
mod link;
mod load;
mod logs;
pub mod netns;
mod proxy;
mod raw;
pub mod records;
mod relay;
pub mod replicas;
mod resizing;
mod rows;
mod stutter;
pub mod usage;
mod verify;
pub mod wordnet;
mod writer;

pub use binary::{tool, vasto_binary};
pub use catalog::CatalogDir;
pub use cluster::{Cluster, ClusterBuilder, Port};
pub use command::{Ran, resized};
pub use counters::{Compared, Counters, Increments};
pub use crowd::{Crowd, Traffic};
pub use figures::{median, percentile};
pub use front::Front;
pub use full_writes::{
    FullLoad, FullLosses, FullWrites, FullWritten, SHARDS as FULL_WRITES_SHARDS,
};
pub use history::{History, KeyHistory, Seen, is_delete, key_of, number_of, value_of};
pub use hosts::Hosts;
pub use kept::{Ended, Kept};
pub use keys::{missing, put_all, put_each};
pub use link::Link;
pub use load::{Load, LoadSpec, LoadSummary, preload};
pub use proxy::Proxy;
pub use raw::{RawDownload, download_raw, newest_manifest};
pub use relay::{KillPoint, KillTime, Relay};
pub use resizing::Resizing;
pub use rows::{Rows, rows, same};
pub use stutter::Stutter;
pub use vasto_testkit::{
    DEADLINE, Numbers, Process, S3Kind, S3Server, cpu_seconds, free_port, run, setting, until,
};
pub use verify::{Verified, verify, verify_beside};
pub use writer::Writer;
