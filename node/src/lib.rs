//! The node process: local replicas, their data path, their shipping, and the node's part in plans.

mod binlog;
mod bootstrap;
mod caretaker;
mod clock;
mod command;
mod counting;
mod data;
mod engine;
mod flusher;
mod grow;
mod host;
mod lease;
mod manager;
mod node;
mod node_dir;
mod old_copy;
mod open_files;
mod registry;
mod replica;
mod replication;
mod restore;
mod session;
mod ship;
mod shortage;
mod stall;
mod tail;

pub use engine::EngineBudget;
pub use node::{Node, NodeConfig, NodeError, RunningNode};
