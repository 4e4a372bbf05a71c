//! Serving leases: which replica of a shard answers strict requests. The rules are in
//! [`vasto_core::lease`].
//!
//! A node has one link to every node that holds another replica of one of its shards. A dedicated
//! thread owns all state (`actor`), so that heartbeats do not wait for the data path.
//!
//! **Invariants**
//! - A replica with peers has no authority before the leases grant it.
//! - Every change of a replica's authority is published by the one actor, in order.

mod actor;
mod event;
mod link;
mod replica_lease;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use vasto_core::catalog::Catalog;
use vasto_core::ids::{Incarnation, KeyspaceId, ReplicaId, ShardId};
use vasto_proto::v1;

use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replication::replicator::Replicator;
use actor::Actor;
use event::Event;

/// Events that may wait for the actor; further senders wait.
const EVENTS_MAX: usize = 1_024;
/// Replies that may wait for the transport of an incoming link.
const REPLIES_AHEAD: usize = 8;
/// Interval at which the main runtime proves that it runs.
const PULSE: Duration = Duration::from_millis(50);

/// The handle of a node's leases.
#[derive(Clone)]
pub(crate) struct Leases {
    events: mpsc::Sender<Event>,
}

/// Returns whether the previous process may have served the replica. Not when the replica was not
/// placed yet; a catalog older than the one that the replica has applied proves nothing.
fn may_have_served(replica: &Replica, catalog: &Catalog) -> bool {
    let may_be_placed = catalog.is_placed(replica.id) || replica.version() > catalog.version;
    may_be_placed && replica.incarnation() > Incarnation(1)
}

impl Leases {
    /// Starts the leases of a node on a dedicated thread; they end when `ended` returns true.
    ///
    /// # Errors
    /// When there are no threads left.
    pub(crate) fn start(
        registry: &Arc<NodeRegistry>,
        ended: impl Fn() -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let pulse = registry.pulse.clone();
        let (idle_changes, mut idle) = watch::channel(false);
        // Ends with the leases.
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(PULSE);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                // While the actor is idle it counts no silence, and needs no proof that this node
                // listens.
                if idle.wait_for(|idle| !idle).await.is_err() {
                    break;
                }
                tick.tick().await;
                pulse.store(crate::clock::now_ms(), std::sync::atomic::Ordering::Release);
            }
        });
        let actor = Actor::new(registry.clone(), events.clone(), receiver, idle_changes);
        // The span names the node where several share a process.
        let span = tracing::Span::current();
        std::thread::Builder::new().name("leases".into()).spawn(move || {
            let _node = span.enter();
            runtime.block_on(actor.run(ended));
        })?;
        Ok(Self { events })
    }

    async fn send(&self, event: Event) {
        // The actor is gone once the node has stopped; nothing is served then.
        let _ = self.events.send(event).await;
    }

    /// Reports a replica that was opened, or a new version of its catalog.
    pub(crate) async fn seat(
        &self,
        replica: &Replica,
        replicator: &Arc<Replicator>,
        catalog: &Catalog,
    ) {
        let shard = catalog.shard(replica.shard).filter(|_| catalog.is_placed(replica.id));
        let order = shard.map(|shard| shard.replicas.clone()).unwrap_or_default();
        let primary = shard
            .and_then(|shard| shard.primary())
            .is_some_and(|primary| primary.replica == replica.id);
        let event = Event::Placed {
            replica: replica.clone(),
            replicator: replicator.clone(),
            order,
            primary_version: if primary { catalog.version.0 } else { 0 },
            served: may_have_served(replica, catalog),
        };
        self.send(event).await;
    }

    /// Hands authority of a replica that is about to stop over to a successor that holds
    /// everything. Returns when that is done, or when there is no successor.
    pub(crate) async fn hand_over_authority(&self, replica: &Replica) {
        let (done, over) = oneshot::channel();
        self.send(Event::HandOver {
            key: (replica.keyspace, replica.shard),
            replica: replica.id,
            done,
        })
        .await;
        let _ = over.await;
    }

    /// Reports that the replica has stopped.
    pub(crate) async fn leave(&self, keyspace: KeyspaceId, shard: ShardId, replica: ReplicaId) {
        self.send(Event::Leave { key: (keyspace, shard), replica }).await;
    }

    /// Serves an incoming link.
    pub(crate) async fn serve(
        &self,
        mut requests: Streaming<v1::LeaseRequest>,
    ) -> ReceiverStream<Result<v1::LeaseReply, Status>> {
        let (replies, receiver) = mpsc::channel(REPLIES_AHEAD);
        let (events, id) = (self.events.clone(), rand::random());
        // Ends with the link.
        tokio::spawn(async move {
            if events.send(Event::Opened { id, replies: replies.clone() }).await.is_err() {
                return;
            }
            loop {
                let request = tokio::select! {
                    request = requests.message() => request,
                    () = replies.closed() => break,
                };
                let Ok(Some(request)) = request else { break };
                if events.send(Event::Request { id, request }).await.is_err() {
                    return;
                }
            }
            let _ = events.send(Event::Closed { id }).await;
        });
        ReceiverStream::new(receiver)
    }
}
