//! The node process: local replicas, their data path, their shipping, and the node's part in plans.

mod binlog;
mod build;
mod bulk;
mod caretaker;
mod clock;
mod command;
mod counting;
mod data;
mod engine;
mod flusher;
mod foreground;
mod host;
mod lease;
mod manager;
mod node;
mod node_dir;
mod open_files;
mod rates;
mod registry;
mod reopen;
mod replica;
mod replication;
mod reported;
mod session;
mod ship;
mod shortage;
mod stall;
mod target_trace;
mod throttle;
mod undecided;
mod yielding;

pub use engine::EngineBudget;
pub use node::{Node, NodeConfig, NodeError, RunningNode};
