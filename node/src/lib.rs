//! The serving process: local replicas, their data path, their shipping, and the node's part in
//! structural changes.

pub mod binlog;
pub mod bootstrap;
mod caretaker;
pub mod clock;
pub mod command;
pub mod core;
mod counting;
pub mod data;
pub mod engine;
pub mod flusher;
pub mod grow;
pub mod host;
pub mod lease;
pub mod manager;
pub mod node;
pub mod node_dir;
mod old_copy;
pub mod open_files;
pub mod past;
pub mod pause;
pub mod replica;
pub mod replication;
pub mod session;
pub mod ship;
mod shortage;
pub mod tail;

pub use engine::EngineBudget;
pub use node::{Node, NodeConfig, NodeError, RunningNode};
