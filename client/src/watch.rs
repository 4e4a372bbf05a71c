//! The watch of a keyspace's topology at the master.
//!
//! **Invariant:** losing the master changes nothing: the last topology stays in force, and the watch
//! reconnects by itself, with jittered pauses so that thousands of clients do not reconnect at once.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use vasto_core::limits::CONNECT_TIMEOUT;
use vasto_core::topology::Topology;
use vasto_proto::convert::topology_from_wire;
use vasto_proto::v1;

use crate::error::{Error, ErrorKind};
use crate::retry::{backoff, with_jitter};
use crate::route::{Routing, Source};
use crate::tuning::WATCH_BACKOFF_MAX;
use crate::vasto::{MasterClient, error_of_status};

/// Opens the watch and reads the first topology.
pub(crate) async fn open(mut master: MasterClient, name: &str) -> Result<(Topology, Streaming<v1::Topology>), Error> {
    let opening = async {
        let request = v1::WatchRequest { keyspace: name.to_owned() };
        let mut stream = master.watch(request).await.map_err(|status| error_of_status(&status, false))?.into_inner();
        match stream.message().await.map_err(|status| error_of_status(&status, false))? {
            Some(first) => Ok((topology_from_wire(&first), stream)),
            None => Err(Error::new(ErrorKind::Unavailable, "the master is stopping; try again")),
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, opening).await.unwrap_or_else(|_| {
        let message = format!("the master did not send the topology of `{name}` within {CONNECT_TIMEOUT:?}");
        Err(Error::new(ErrorKind::Unavailable, message))
    })
}

/// Offers every change to `routing` until cancelled or the keyspace is deleted.
pub(crate) async fn follow(
    master: MasterClient,
    name: String,
    stream: Streaming<v1::Topology>,
    routing: Arc<Routing>,
    cancel: CancellationToken,
) {
    let _ = cancel.run_until_cancelled(follow_forever(master, name, stream, routing)).await;
}

async fn follow_forever(
    master: MasterClient,
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
            match open(master.clone(), &name).await {
                Ok((topology, stream)) => {
                    routing.offer(topology, Source::Master);
                    break stream;
                }
                Err(error) => tracing::debug!(keyspace = %name, %error, failures, "no watch of the topology"),
            }
        };
    }
}

fn pause(failures: u32) -> Duration {
    backoff(failures.saturating_add(3)).saturating_mul(4).min(WATCH_BACKOFF_MAX)
}
