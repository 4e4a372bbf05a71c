//! The serving process: local replicas, their data path, their shipping, and the node's part in
//! structural changes.

mod binlog;
mod bootstrap;
mod caretaker;
mod clock;
mod command;
mod core;
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
mod past;
mod pause;
mod replica;
mod replication;
mod session;
mod ship;
mod shortage;
mod tail;

pub use engine::EngineBudget;
pub use node::{Node, NodeConfig, NodeError, RunningNode};
