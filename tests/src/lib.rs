//! The harness of the end-to-end tests: real processes, real files, real signals.
//!
//! A [`Cluster`] is a master and nodes as separate processes in a temporary directory; [`Load`] writes and reads
//! during a fault and records the promises in a [`History`]; [`verify`] compares the history with the contents of the
//! cluster afterwards.
//!
//! **Invariant:** no function here waits for time to pass: every wait is for a condition and has a deadline. Every
//! started process is ended, also when a test panics or is killed.

mod binary;
mod catalog;
mod cluster;
mod history;
mod hosts;
pub mod linear;
mod link;
mod load;
mod logs;
pub mod netns;
mod process;
mod proxy;
pub mod records;
mod relay;
pub mod replicas;
mod s3;
pub mod usage;
mod verify;
mod wait;
pub mod wordnet;

pub use binary::{tool, vasto_binary};
pub use catalog::CatalogDir;
pub use cluster::{Cluster, ClusterBuilder, Port, Ran, resized};
pub use history::{History, KeyHistory, Seen, is_delete, key_of, number_of, value_of};
pub use hosts::Hosts;
pub use link::Link;
pub use load::{Load, LoadSpec, LoadSummary, preload};
pub use process::{Process, free_port, run};
pub use proxy::Proxy;
pub use relay::{KillPoint, KillTime, Relay};
pub use s3::S3Server;
pub use verify::{Verified, verify};
pub use wait::{DEADLINE, until};

/// A small random number generator for tests: the same seed gives the same numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// Creates a generator from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Draws the next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Draws a number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}
