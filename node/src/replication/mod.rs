//! Replication between the replicas of a shard: every replica pulls every record that it lacks.

pub(crate) mod gc_floor;
pub(crate) mod peers;
mod position;
mod pull;
mod pull_state;
mod puller;
mod pullers;
pub(crate) mod replicator;
mod service;

pub(crate) use service::ReplicationService;
