//! The outgoing half of a lease link: connects to one node, reports the results, carries
//! heartbeats.
//!
//! **Invariant:** the result of a connection attempt is reported as the kernel gave it: refused
//! (nothing listens there), reachable, or unreachable. Conclusions are drawn elsewhere.

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
use vasto_proto::v1::replication_client::ReplicationClient;

use super::event::{Event, News, Reach};
use crate::clock::now_ms;
use crate::registry::NodeRegistry;

/// Heartbeats that may wait for the transport.
const BEATS_AHEAD: usize = 8;
/// First and longest pause between two connection attempts.
const AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(100));
/// Pause between two attempts while the node's address is unknown.
const NO_ADDRESS: Duration = Duration::from_millis(200);
/// Time after which a stream that is not open is tried again.
const OPEN_TIMEOUT: Duration = Duration::from_millis(300);

/// The task of a link.
pub(super) struct Link {
    pub registry: Arc<NodeRegistry>,
    pub node: NodeId,
    pub events: mpsc::Sender<Event>,
    /// Makes the task connect anew.
    pub reset: Arc<Notify>,
    /// Duration of the last successful connection attempt, milliseconds.
    pub took_ms: Arc<AtomicU64>,
}

impl Link {
    /// Runs until `cancel` fires.
    pub(super) async fn run(self, cancel: CancellationToken) {
        let _ = cancel.run_until_cancelled(self.serve()).await;
    }

    async fn send(&self, news: News) {
        // The actor ends after its links.
        let _ = self.events.send(Event::Link { node: self.node, news }).await;
    }

    async fn serve(&self) {
        let mut pause = AGAIN.0;
        loop {
            let Some(address) = self.registry.address(self.node) else {
                tokio::time::sleep(NO_ADDRESS).await;
                continue;
            };
            let began = now_ms();
            let reach = reach(&address, self.took_ms.load(Ordering::Relaxed)).await;
            if reach == Reach::Reachable {
                self.took_ms.store(now_ms().saturating_sub(began).max(1), Ordering::Relaxed);
            }
            self.send(News::Reach(reach, began)).await;
            if reach == Reach::Reachable {
                if self.hold(&address).await {
                    pause = AGAIN.0;
                }
                self.send(News::Lost).await;
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }

    /// Holds a stream as long as it lives; returns whether a stream was opened.
    async fn hold(&self, address: &str) -> bool {
        let Ok(endpoint) = Endpoint::from_shared(format!("http://{address}")) else { return false };
        let endpoint = endpoint.connect_timeout(LEASE_SILENCE).tcp_nodelay(true);
        let (beats, outgoing) = mpsc::channel(BEATS_AHEAD);
        let opening = async {
            let channel = endpoint.connect().await.ok()?;
            let client = ReplicationClient::new(channel);
            let mut client = client
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            Some(client.lease(ReceiverStream::new(outgoing)).await.ok()?.into_inner())
        };
        let reset = self.reset.notified();
        tokio::pin!(reset);
        let opened = tokio::select! {
            opened = tokio::time::timeout(OPEN_TIMEOUT, opening) => opened,
            () = &mut reset => return false,
        };
        let Ok(Some(mut replies)) = opened else { return false };
        self.send(News::Up(beats)).await;
        loop {
            tokio::select! {
                reply = replies.message() => match reply {
                    Ok(Some(reply)) => self.send(News::Reply(reply)).await,
                    Ok(None) | Err(_) => return true,
                },
                () = &mut reset => return true,
            }
        }
    }
}

/// Tries to connect to an address; `took_ms` is the duration of the last successful attempt, 0 for
/// none.
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
