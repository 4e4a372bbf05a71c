//! Replication between the replicas of a shard: every replica pulls every record that it lacks.

pub mod gc_floor;
pub mod peers;
mod position;
mod pull;
mod pull_state;
mod puller;
mod pullers;
pub mod replicator;
mod service;

pub use service::ReplicationService;
