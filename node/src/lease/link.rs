//! The outgoing half of a lease link: connects to one node, tells how that went, carries heartbeats.
//!
//! **Invariant:** how an attempt to connect ended is told as the kernel said it: refused (nobody listens there),
//! reachable, or unreachable. What follows from that is decided elsewhere.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use vasto_core::ids::NodeId;
use vasto_core::limits::{LEASE_SILENCE, MESSAGE_BYTES_MAX, PROBE_TIMEOUT};
use vasto_proto::v1;
use vasto_proto::v1::replication_client::ReplicationClient;

use super::actor::Event;
use crate::core::NodeCore;
use crate::replica::authority::now_ms;

/// Heartbeats that may wait for the transport.
const BEATS_AHEAD: usize = 8;
/// First and longest pause between two attempts to connect.
const AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(100));
/// Between two attempts while it is not known where the node listens.
const NO_ADDRESS: Duration = Duration::from_millis(200);
/// A stream that is not open by now is tried again.
const OPEN_TIMEOUT: Duration = Duration::from_millis(300);

/// How an attempt to connect ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Nobody listens there.
    Refused,
    /// The machine accepts connections.
    Reachable,
    /// It does not answer, or there is no way to it.
    Unreachable,
}

/// What the task of a link tells.
pub(super) enum News {
    /// An attempt to connect, begun at this time (milliseconds since boot), has ended.
    Reach(Reach, u64),
    /// The stream is open; heartbeats go here.
    Up(mpsc::Sender<v1::LeaseRequest>),
    /// The node has answered a heartbeat.
    Reply(v1::LeaseReply),
    /// The stream has ended.
    Lost,
}

/// The task of a link.
pub(super) struct Link {
    pub core: Arc<NodeCore>,
    pub node: NodeId,
    pub events: mpsc::Sender<Event>,
    /// Makes it begin anew.
    pub reset: Arc<Notify>,
    /// How long connecting took last, milliseconds.
    pub took_ms: Arc<AtomicU64>,
}

impl Link {
    /// Runs until `cancel` fires.
    pub async fn run(self, cancel: CancellationToken) {
        let _ = cancel.run_until_cancelled(self.serve()).await;
    }

    async fn tell(&self, news: News) {
        // The actor ends after its links.
        let _ = self.events.send(Event::Link { node: self.node, news }).await;
    }

    async fn serve(&self) {
        let mut pause = AGAIN.0;
        loop {
            let Some(address) = self.core.address(self.node) else {
                tokio::time::sleep(NO_ADDRESS).await;
                continue;
            };
            let began = now_ms();
            let reach = reach(&address, self.took_ms.load(Ordering::Relaxed)).await;
            if reach == Reach::Reachable {
                self.took_ms.store(now_ms().saturating_sub(began).max(1), Ordering::Relaxed);
            }
            self.tell(News::Reach(reach, began)).await;
            if reach == Reach::Reachable {
                if self.hold(&address).await {
                    pause = AGAIN.0;
                }
                self.tell(News::Lost).await;
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    /// Holds a stream as long as it lives; answers whether there was one.
    async fn hold(&self, address: &str) -> bool {
        let Ok(endpoint) = Endpoint::from_shared(format!("http://{address}")) else { return false };
        let endpoint = endpoint.connect_timeout(LEASE_SILENCE).tcp_nodelay(true);
        let (beats, outgoing) = mpsc::channel(BEATS_AHEAD);
        let opening = async {
            let channel = endpoint.connect().await.ok()?;
            let client = ReplicationClient::new(channel);
            let mut client =
                client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
            Some(client.lease(ReceiverStream::new(outgoing)).await.ok()?.into_inner())
        };
        let reset = self.reset.notified();
        tokio::pin!(reset);
        let opened = tokio::select! {
            opened = tokio::time::timeout(OPEN_TIMEOUT, opening) => opened,
            () = &mut reset => return false,
        };
        let Ok(Some(mut replies)) = opened else { return false };
        self.tell(News::Up(beats)).await;
        loop {
            tokio::select! {
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => self.tell(News::Reply(reply)).await,
                    Ok(None) | Err(_) => return true,
                },
                () = &mut reset => return true,
            }
        }
    }
}

/// Tries to connect to an address; `took_ms` is how long that took before, 0 if it never did.
pub(super) async fn reach(address: &str, took_ms: u64) -> Reach {
    let patience = match took_ms {
        0 => PROBE_TIMEOUT.1,
        took_ms => Duration::from_millis(took_ms * 4).clamp(PROBE_TIMEOUT.0, PROBE_TIMEOUT.1),
    };
    match tokio::time::timeout(patience, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Reach::Reachable,
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Reach::Refused,
        Ok(Err(_)) | Err(_) => Reach::Unreachable,
    }
}
