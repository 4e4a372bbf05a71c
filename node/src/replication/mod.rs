//! Replication between the replicas of a shard: every replica pulls every record that it lacks.

pub mod duties;
pub mod floor;
pub mod peers;
mod position;
mod pull;
pub mod puller;
mod service;

pub use service::ReplicationService;
