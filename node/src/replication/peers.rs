//! Connections to other nodes, one for each, shared by everything that replicates.
//!
//! **Invariant:** both ends notice a stalled connection within seconds (keepalive, also while
//! idle), and every unary call has a deadline.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use vasto_core::catalog::Placed;
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId};
use vasto_core::limits::{
    CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX,
};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;
use vasto_proto::v1;
use vasto_proto::v1::replication_client::ReplicationClient;

use crate::registry::NodeRegistry;

/// Flow-control windows of a stream and of a connection, bytes.
const WINDOWS: (u32, u32) = (4 << 20, 16 << 20);

/// Pause before a peer that did not answer is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The connections of a node to its peers, by address.
#[derive(Default)]
pub(crate) struct Peers {
    channels: Mutex<HashMap<String, (Channel, u64)>>,
}

fn unreachable(reason: String) -> Status {
    status_of(&VastoError::new(ErrorCode::Unavailable, reason))
}

impl Peers {
    /// Returns a client of the node's replication service; the first call connects.
    // A gRPC status is large, and this is not a hot path.
    #[allow(clippy::result_large_err)]
    pub(crate) fn client(
        &self,
        registry: &NodeRegistry,
        node: NodeId,
    ) -> Result<ReplicationClient<Channel>, Status> {
        let address = registry
            .address(node)
            .ok_or_else(|| unreachable(format!("where node {node} listens is not known")))?;
        let mut channels = self.channels.lock();
        // A connection from before the node was cut off hangs until its transport tries again.
        let links = registry.links_of(node);
        let channel = match channels.get(&address) {
            Some((channel, made)) if *made == links => channel.clone(),
            _ => {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|error| unreachable(format!("{address}: {error}")))?
                    .connect_timeout(CONNECT_TIMEOUT)
                    .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                    .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                    .keep_alive_while_idle(true)
                    .initial_stream_window_size(WINDOWS.0)
                    .initial_connection_window_size(WINDOWS.1)
                    .tcp_nodelay(true);
                let channel = endpoint.connect_lazy();
                // Connections to addresses that no node has any more are dropped.
                channels.retain(|cached, _| registry.is_address(cached));
                channels.insert(address, (channel.clone(), links));
                channel
            }
        };
        Ok(ReplicationClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// Returns the position of a replica of another node; waits there as long as the request
    /// allows.
    pub(crate) async fn position(
        &self,
        registry: &NodeRegistry,
        node: NodeId,
        request: v1::PositionRequest,
    ) -> Result<v1::PositionReply, Status> {
        let mut client = self.client(registry, node)?;
        let patience = CONNECT_TIMEOUT + Duration::from_millis(request.wait_ms.into());
        answered(node, patience, client.position(request)).await
    }

    /// Asks a replica of another node to promise a commit-time fence.
    pub(crate) async fn promise(
        &self,
        registry: &NodeRegistry,
        node: NodeId,
        request: v1::PromiseRequest,
    ) -> Result<v1::PositionReply, Status> {
        let mut client = self.client(registry, node)?;
        answered(node, CONNECT_TIMEOUT, client.promise(request)).await
    }

    /// Returns the position that a peer has once it has applied `min_version` and, unless that is
    /// 0, sealed under `sealed`; asks again until then. `None` when `patience` is over.
    pub(crate) async fn position_under(
        &self,
        registry: &NodeRegistry,
        keyspace: KeyspaceId,
        peer: Placed,
        min_version: CatalogVersion,
        sealed: CatalogVersion,
        patience: Duration,
    ) -> Option<v1::PositionReply> {
        let began = Instant::now();
        loop {
            let left = patience.checked_sub(began.elapsed())?;
            let request = v1::PositionRequest {
                keyspace_id: keyspace.0,
                replica_id: peer.replica.0,
                min_version: min_version.0,
                sealed_version: sealed.0,
                wait_ms: left.as_millis() as u32,
            };
            let asked =
                tokio::time::timeout(left, self.position(registry, peer.node, request)).await;
            match asked {
                Ok(Ok(reply))
                    if reply.version >= min_version.0
                        && (sealed.0 == 0 || reply.sealed_version == sealed.0) =>
                {
                    return Some(reply);
                }
                Ok(_) => tokio::time::sleep(RETRY_PAUSE.min(left)).await,
                Err(_) => return None,
            }
        }
    }
}

/// Bounds a call by a deadline.
async fn answered<T>(
    node: NodeId,
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(patience, call).await {
        Ok(reply) => Ok(reply?.into_inner()),
        Err(_) => Err(unreachable(format!("node {node} did not answer within {patience:?}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use vasto_core::topology::NodeAddress;

    use super::*;
    use crate::clock::SystemClock;

    #[tokio::test]
    async fn connections_to_addresses_without_a_node_are_dropped() {
        let registry = NodeRegistry::new(NodeId(1), Arc::new(SystemClock::default()), 1);
        let peers = Peers::default();
        for port in 1..5 {
            let at = |address: String| NodeAddress { address, zone: String::new() };
            let moves = (NodeId(2), at(format!("127.0.0.1:{port}")));
            registry.set_addresses([moves, (NodeId(3), at("127.0.0.1:9".into()))].into());
            peers.client(&registry, NodeId(3)).unwrap();
            peers.client(&registry, NodeId(2)).unwrap();
        }
        assert_eq!(peers.channels.lock().len(), 2);
    }
}
