//! The harness of the end-to-end tests: real processes, real files, real signals.
//!
//! A [`Cluster`] is a master and nodes as processes of their own in a temporary directory;
//! [`Load`] writes and reads while something happens to them and remembers what was promised in a
//! [`History`]; [`verify`] compares the history with what the cluster holds afterwards.
//!
//! **Invariant:** nothing here waits for time to pass: every wait is for a condition and has a
//! deadline. Every process that is started is ended, also when a test panics or is killed.

mod binary;
mod catalog;
mod cluster;
mod history;
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
pub use history::{History, Kept, Seen, is_delete, key_of, number_of, value_of};
pub use link::Link;
pub use load::{Load, LoadSpec, LoadSummary, preload};
pub use process::{Process, free_port, run};
pub use proxy::Proxy;
pub use relay::{Moment, Relay, Strike};
pub use s3::S3Server;
pub use verify::{Verified, verify};
pub use wait::{DEADLINE, until};

/// A small generator of numbers for tests: the same seed, the same numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// A generator from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}
