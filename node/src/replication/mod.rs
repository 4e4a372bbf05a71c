//! Replication between the replicas of a shard: every replica pulls every record that it lacks.

mod service;

pub use service::ReplicationService;
