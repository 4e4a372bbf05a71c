//! Replication between the replicas of a shard: every replica pulls every record that it lacks.

pub mod gc_floor;
pub mod peers;
mod position;
mod pull;
pub mod puller;
pub mod replicator;
mod service;

pub use service::ReplicationService;
