//! The connection back to the advertised address of a node.
//!
//! **Invariant:** a node that was accepted before is never refused because it cannot be reached.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use vasto_core::ids::NodeId;
use vasto_core::limits::CONNECT_TIMEOUT;
use vasto_proto::v1;

use crate::cluster::Cluster;

/// Attempts to connect to the advertised address of a node, and the pause between them.
const DIALS: (usize, Duration) = (2, Duration::from_millis(200));
/// The interval of attempts for a node that was taken in although nothing answers at its address.
const DIAL_AGAIN: Duration = Duration::from_secs(5);

/// Returns true for a node that was taken in before. A failure to reach it says as much about the
/// network around this master as about its address, and its data must be served: it is never
/// refused for that.
pub(super) fn is_member(hello: &v1::Hello) -> bool {
    !hello.cluster_id.is_empty()
}

/// Connects to the advertised address of a new node. When nothing answers there, a node without
/// data is refused; a node with data continues to serve it, gets no more replicas, and is reported
/// in the status: `Ok(Some(why))`.
pub(super) async fn dial_back(
    cluster: &Cluster,
    hello: &v1::Hello,
) -> Result<Option<String>, String> {
    if !cluster.settings.dial_back || is_member(hello) {
        return Ok(None);
    }
    let Err(cause) = dial(&hello.address).await else { return Ok(None) };
    if cluster.state().loads.of(NodeId(hello.node_id)).replicas > 0 {
        tracing::warn!(node = %NodeId(hello.node_id), address = hello.address, cause, "a node cannot be reached where it says");
        return Ok(Some(cause));
    }
    Err(format!(
        "the master cannot connect to {}, where this node says that clients and other nodes reach it: {cause}; start \
         the node with --advertise HOST:PORT that they can connect to",
        hello.address
    ))
}

/// Connects with more than one attempt: a connection that was just lost proves nothing.
async fn dial(address: &str) -> Result<(), String> {
    let (attempts, pause) = DIALS;
    let mut cause = String::new();
    for attempt in 0..attempts {
        if attempt > 0 {
            tokio::time::sleep(pause).await;
        }
        cause = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
        };
    }
    Err(cause)
}

/// Retries until the node is reached; never ends. A member is taken in before the first attempt, so
/// that nothing waits for an address that does not answer.
pub(super) async fn dial_until_reached(
    cluster: &Cluster,
    node: NodeId,
    session: u64,
    hello: &v1::Hello,
    mut unreachable: Option<String>,
) {
    let mut untried = cluster.settings.dial_back && is_member(hello);
    while untried || unreachable.is_some() {
        if !untried {
            tokio::time::sleep(DIAL_AGAIN).await;
        }
        let before = unreachable.take();
        unreachable = dial(&hello.address).await.err();
        if let (Some(cause), None) = (&unreachable, &before) {
            tracing::warn!(%node, address = hello.address, cause, "a node cannot be reached where it says");
        }
        cluster.state().reached(node, session, unreachable.clone());
        untried = false;
    }
    std::future::pending().await
}
