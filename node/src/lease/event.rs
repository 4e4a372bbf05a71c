//! Events that concern the leases of a node: the input of the actor.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use vasto_core::catalog::Placed;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_proto::v1;

use super::replica_lease::Named;
use crate::replica::Replica;
use crate::replication::replicator::Replicator;

/// A shard: of one shard, a node holds one replica.
pub(super) type Key = (KeyspaceId, ShardId);

/// Events that the actor receives.
pub(super) enum Event {
    /// A replica was opened, or its placement changed; `served`: the previous process may have
    /// served it.
    Placed {
        replica: Replica,
        replicator: Arc<Replicator>,
        order: Vec<Placed>,
        primary_version: u64,
        served: bool,
    },
    /// A replica is about to stop and hands its authority over.
    HandOver { key: Key, replica: ReplicaId, done: oneshot::Sender<()> },
    /// A replica has stopped.
    Leave { key: Key, replica: ReplicaId },
    /// A replica has reported what it holds.
    Named { key: Key, replica: ReplicaId, turn: u64, named: Named },
    /// An incoming link was opened.
    Opened { id: u64, replies: mpsc::Sender<Result<v1::LeaseReply, Status>> },
    /// A heartbeat has arrived.
    Request { id: u64, request: v1::LeaseRequest },
    /// An incoming link has ended.
    Closed { id: u64 },
    /// Report of an outgoing link.
    Link { node: NodeId, news: News },
    /// A round of probes has ended and found these nodes reachable.
    Probed { key: Key, replica: Replica, round: u64, reachable: Vec<NodeId> },
}

/// Result of a connection attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Nothing listens there.
    Refused,
    /// The machine accepts connections.
    Reachable,
    /// The machine does not answer, or there is no route to it.
    Unreachable,
}

/// Reports of a link's task.
pub(super) enum News {
    /// A connection attempt, begun at this time (milliseconds since boot), has ended.
    Reach(Reach, u64),
    /// The stream is open; heartbeats go here.
    Up(mpsc::Sender<v1::LeaseRequest>),
    /// The node has answered a heartbeat.
    Reply(v1::LeaseReply),
    /// The stream has ended.
    Lost,
}
