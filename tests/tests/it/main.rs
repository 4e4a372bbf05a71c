//! The end-to-end tests: one module for each subject, all in one program.
//!
//! **Invariant:** a test that starts processes runs alone on the machine, which
//! `.config/nextest.toml` ensures for all modules but [`architecture`] and [`programs`]; each takes
//! its ports, directories and networks from the harness, so that threads of one process
//! (`cargo test`) do not meet.
#![allow(clippy::unwrap_used)]

mod architecture;
mod bad_input;
mod bucket_kills;
mod conditions;
mod drains;
mod estimates;
mod examples;
mod full_writes;
mod grows;
mod held;
mod kills;
mod lag;
mod linearizable;
mod many_replicas;
mod matrix;
mod members;
mod original;
mod outage;
mod paced;
mod partition;
mod paused;
mod programs;
mod rebalances;
mod replication;
mod resizes;
mod s3_bucket;
mod shipped;
mod shortage;
mod shrink_faults;
mod shrinks;
mod storm;
mod thousand;
mod traces;
mod undone;
mod visibility;
