//! The pulls of one replica: one from each of its sources, and the lag behind them.
//!
//! **Invariant:** one task pulls from a source; a source that is not named any more is not pulled
//! from.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use opentelemetry::KeyValue;
use opentelemetry::metrics::Gauge;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Placed;
use vasto_core::ids::{NodeId, ReplicaId};

use super::peers::Peers;
use super::pull_state::PullState;
use super::puller::Puller;
use crate::registry::NodeRegistry;
use crate::replica::Replica;

/// Returns the gauges of the lag, in records and in milliseconds.
fn gauges() -> &'static (Gauge<u64>, Gauge<u64>) {
    static GAUGES: OnceLock<(Gauge<u64>, Gauge<u64>)> = OnceLock::new();
    GAUGES.get_or_init(|| {
        let meter = opentelemetry::global::meter("vasto-node");
        let lsns = meter
            .u64_gauge("vasto_replication_lag_lsns")
            .with_description("Synced records of a peer that a replica has not applied");
        let ms = meter.u64_gauge("vasto_replication_lag").with_unit("ms").with_description(
            "Age of the last record that came, while there are more; time without a connection",
        );
        (lsns.build(), ms.build())
    })
}

struct Pull {
    node: NodeId,
    cancel: CancellationToken,
    state: Arc<PullState>,
}

/// The pulls of one replica.
pub(super) struct Pullers {
    registry: Arc<NodeRegistry>,
    peers: Arc<Peers>,
    replica: Replica,
    cancel: CancellationToken,
    pulls: Mutex<HashMap<ReplicaId, Pull>>,
}

/// The largest lag of a replica behind its peers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lag {
    /// Records.
    pub lsns: u64,
    /// Milliseconds.
    pub ms: u64,
}

impl Pullers {
    /// Creates the state without pulls; all pulls end with `cancel`.
    pub(super) fn new(
        registry: Arc<NodeRegistry>,
        peers: Arc<Peers>,
        replica: Replica,
        cancel: CancellationToken,
    ) -> Self {
        Self { registry, peers, replica, cancel, pulls: Mutex::default() }
    }

    /// Pulls from exactly these sources.
    pub(super) fn follow(&self, sources: &[Placed]) {
        let mut pulls = self.pulls.lock();
        pulls.retain(|id, pull| {
            let keep =
                sources.iter().any(|source| source.replica == *id && source.node == pull.node);
            if !keep {
                pull.cancel.cancel();
            }
            keep
        });
        for source in sources {
            pulls.entry(source.replica).or_insert_with(|| {
                let cancel = self.cancel.child_token();
                let state = Arc::new(PullState::default());
                state.broken();
                let task = Puller {
                    registry: self.registry.clone(),
                    peers: self.peers.clone(),
                    replica: self.replica.clone(),
                    source: *source,
                    state: state.clone(),
                };
                let ended = cancel.clone();
                // Ends with its token.
                tokio::spawn(async move { ended.run_until_cancelled(task.run()).await });
                Pull { node: source.node, cancel, state }
            });
        }
    }

    /// Returns the largest lag behind a peer; records are counted for connected peers only, because
    /// the positions of the others are unknown.
    pub(super) fn lag(&self) -> Lag {
        let pulls = self.pulls.lock();
        let connected = pulls.values().filter(|pull| pull.state.connected.load(Ordering::Acquire));
        Lag {
            lsns: connected
                .map(|pull| pull.state.lag_lsns.load(Ordering::Acquire))
                .max()
                .unwrap_or(0),
            ms: pulls.values().map(|pull| pull.state.lag_ms()).max().unwrap_or(0),
        }
    }

    /// Returns the lag behind one peer, in records; `None` while that is unknown.
    pub(super) fn lag_behind(&self, peer: ReplicaId) -> Option<u64> {
        let pulls = self.pulls.lock();
        let pull = pulls.get(&peer).filter(|pull| pull.state.connected.load(Ordering::Acquire))?;
        Some(pull.state.lag_lsns.load(Ordering::Acquire))
    }

    /// Returns true while a stream from the peer is open.
    pub(super) fn is_connected(&self, peer: ReplicaId) -> bool {
        self.pulls
            .lock()
            .get(&peer)
            .is_some_and(|pull| pull.state.connected.load(Ordering::Acquire))
    }

    /// Records the progress of each pull in the metrics.
    pub(super) fn measure(&self) {
        let (keyspace, replica) = (self.replica.keyspace.0 as i64, self.replica.id.0 as i64);
        for (peer, pull) in &*self.pulls.lock() {
            let labels = [
                KeyValue::new("keyspace", keyspace),
                KeyValue::new("replica", replica),
                KeyValue::new("peer", peer.0 as i64),
            ];
            gauges().0.record(pull.state.lag_lsns.load(Ordering::Acquire), &labels);
            gauges().1.record(pull.state.lag_ms(), &labels);
        }
    }

    /// Returns true when a peer's log cannot bring this replica up to date, and no connected peer's
    /// log can.
    pub(super) fn is_too_old(&self) -> bool {
        let pulls = self.pulls.lock();
        let too_old = |pull: &Pull| pull.state.too_old.load(Ordering::Acquire);
        pulls.values().any(too_old)
            && !pulls
                .values()
                .any(|pull| !too_old(pull) && pull.state.connected.load(Ordering::Acquire))
    }
}
