//! The background task that follows a keyspace's topology at the master.
//!
//! **Invariant:** losing the master changes nothing: the last topology stays in force, and the
//! watch reconnects by itself, with jittered pauses so that thousands of clients do not reconnect
//! at once.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use vasto_proto::convert::topology_from_wire;
use vasto_proto::v1;

use crate::master::Master;
use crate::retry::{backoff, with_jitter};
use crate::route::{Routing, Source};
use crate::tuning::WATCH_BACKOFF_MAX;

/// Offers every change to `routing` until cancelled or the keyspace is deleted.
pub(crate) async fn follow(
    master: Master,
    name: String,
    stream: Streaming<v1::Topology>,
    routing: Arc<Routing>,
    cancel: CancellationToken,
) {
    let _ = cancel.run_until_cancelled(follow_forever(master, name, stream, routing)).await;
}

async fn follow_forever(
    master: Master,
    name: String,
    mut stream: Streaming<v1::Topology>,
    routing: Arc<Routing>,
) {
    let mut failures = 0u32;
    loop {
        while let Ok(Some(topology)) = stream.message().await {
            failures = 0;
            routing.offer(topology_from_wire(&topology), Source::Master);
            if !routing.table().topology.active {
                return;
            }
        }
        tracing::debug!(keyspace = %name, "watch of the topology ended; opening it again");
        stream = loop {
            failures = failures.saturating_add(1);
            tokio::time::sleep(with_jitter(pause(failures), false, rand::random())).await;
            match master.watch(&name).await {
                Ok((topology, stream)) => {
                    routing.offer(topology, Source::Master);
                    break stream;
                }
                Err(error) => {
                    tracing::debug!(keyspace = %name, %error, failures, "no watch of the topology")
                }
            }
        };
    }
}

fn pause(failures: u32) -> Duration {
    backoff(failures.saturating_add(3)).saturating_mul(4).min(WATCH_BACKOFF_MAX)
}
