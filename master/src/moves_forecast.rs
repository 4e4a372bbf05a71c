//! What the moves of a rebalance take: for `cluster rebalance --plan`.
//!
//! **Invariant:** pure, from the moves alone. A replica is read as its files are, so each byte that
//! moves is read once; what goes up is what a new shipper has not shipped yet.

use std::collections::BTreeMap;

use vasto_core::balance::Move;
use vasto_core::ids::NodeId;

use crate::forecast::{ASSUMED_BYTES_PER_SECOND, requests};

/// Fixed costs of a move: its checkpoint, the log behind it, the hand-over.
const ASSUMED_SECONDS: f64 = 3.0;

/// What moves take.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct MovesForecast {
    /// Bytes of the replicas that move; as many come from the bucket.
    pub(crate) bytes_moved: u64,
    /// Requests that read.
    pub(crate) gets: u64,
    /// Requests that write.
    pub(crate) puts: u64,
    /// Bytes that each node gets.
    pub(crate) disk_needed: BTreeMap<NodeId, u64>,
    /// How long it takes at the assumed rates: the nodes are filled side by side.
    pub(crate) seconds: f64,
}

impl MovesForecast {
    pub(crate) fn of(moves: &[Move]) -> Self {
        let mut forecast = Self::default();
        let mut seconds: BTreeMap<NodeId, f64> = BTreeMap::new();
        for made in moves {
            match *made {
                Move::Replica { to, bytes, .. } => {
                    forecast.bytes_moved += bytes;
                    forecast.gets += 1 + requests(bytes);
                    // The checkpoint that its source makes: a manifest and what is new.
                    forecast.puts += 2;
                    *forecast.disk_needed.entry(to).or_default() += bytes;
                    *seconds.entry(to).or_default() +=
                        ASSUMED_SECONDS + bytes as f64 / ASSUMED_BYTES_PER_SECOND as f64;
                }
                Move::Primary { to, bytes, .. } => {
                    forecast.puts += 1 + requests(bytes);
                    *seconds.entry(to).or_default() +=
                        bytes as f64 / ASSUMED_BYTES_PER_SECOND as f64;
                }
            }
        }
        forecast.seconds = seconds.into_values().fold(0.0, f64::max);
        forecast
    }
}

#[cfg(test)]
mod tests {
    use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn nodes_that_are_filled_side_by_side_take_as_long_as_the_slowest() {
        let (keyspace, shard, replica, from) = (KeyspaceId(1), ShardId(0), ReplicaId(1), NodeId(1));
        let to = |to: u64, mib: u64| Move::Replica {
            keyspace,
            shard,
            replica,
            from,
            to: NodeId(to),
            bytes: mib * MIB,
        };
        let primary =
            Move::Primary { keyspace, shard, replica, from, to: NodeId(2), bytes: 16 * MIB };
        let forecast = MovesForecast::of(&[to(4, 100), to(5, 50), to(4, 100), primary]);
        assert_eq!(forecast.bytes_moved, 250 * MIB);
        assert_eq!(forecast.gets, (1 + 13) + (1 + 7) + (1 + 13));
        assert_eq!(forecast.puts, 3 * 2 + (1 + 2));
        assert_eq!(forecast.disk_needed[&NodeId(4)], 200 * MIB);
        assert_eq!(forecast.seconds, 2.0 * 3.0 + 200.0 / 50.0);
        assert_eq!(MovesForecast::of(&[]), MovesForecast::default());
    }
}
