//! Test support for several crates: stores that inject faults, real S3 servers, a collector of
//! telemetry, processes under test, directories, waiting, random numbers, settings of a run, and
//! the sources of the workspace.
//!
//! **Invariant:** the kit depends on `core` and `shipping` alone, so that tests that use it compile
//! no RocksDB; other crates use it in their tests only.
#![allow(clippy::unwrap_used, reason = "a test ends at the first thing that it did not expect")]

mod directory;
pub mod faulty;
mod http_request;
pub mod http_store;
pub mod metadata;
mod numbers;
pub mod otlp;
mod process;
mod s3_server;
mod setting;
pub mod sources;
mod wait;

pub use directory::memory_dir;
pub use numbers::Numbers;
pub use process::{Process, cpu_seconds, free_port, run, tail};
pub use s3_server::{BUCKET, S3Kind, S3Server};
pub use setting::setting;
pub use wait::{DEADLINE, until};
