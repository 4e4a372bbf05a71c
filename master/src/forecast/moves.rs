//! The forecast of a rebalance: what its moves take, for `cluster rebalance --plan`.
//!
//! **Invariant:** pure, from the moves and the rates of the nodes. A replica is read as its files are, so each byte that
//! moves is read once; what goes up is what a new shipper has not shipped yet. Moves begin in their order, so many at a
//! time; the replicas that a node gets meanwhile share its rate, and nothing else of a move waits for the other ones.

use std::collections::BTreeMap;

use vasto_core::balance::Move;
use vasto_core::ids::NodeId;

use super::Forecast;
use super::size::{gets, puts};
use super::time::{MOVE, Paces};

/// When moves begin and end, seconds from the beginning of the first.
struct Schedule {
    /// When each of the places becomes free.
    free: Vec<f64>,
    /// When each node has read what it was to read.
    read: BTreeMap<NodeId, f64>,
}

impl Schedule {
    fn new(at_once: usize) -> Self {
        Self { free: vec![0.0; at_once.max(1)], read: BTreeMap::new() }
    }

    /// Adds a move to a node, which works on it for so long, beside so much that waits for nobody.
    fn add(&mut self, to: NodeId, works: f64, waits: f64) {
        let Some(place) = self.free.iter_mut().min_by(|a, b| a.total_cmp(b)) else { return };
        let read = self.read.entry(to).or_default();
        *read = read.max(*place) + works;
        *place = *read + waits;
    }

    fn seconds(&self) -> f64 {
        self.free.iter().copied().fold(0.0, f64::max)
    }
}

/// Returns the forecast of a rebalance that makes these moves, so many at a time; it names no sources.
pub(crate) fn moves(moves: &[Move], at_once: usize, paces: &Paces) -> Forecast {
    let mut forecast = Forecast::default();
    let mut schedule = Schedule::new(at_once);
    for made in moves {
        match *made {
            Move::Replica { to, bytes, .. } => {
                forecast.bytes_moved += bytes;
                forecast.bytes_from_bucket += bytes;
                forecast.gets += 1 + gets(bytes);
                // The checkpoint that its source makes: a manifest and what is new.
                forecast.puts += 2;
                *forecast.disk.entry(to).or_default() += bytes;
                let reads = paces.downloads(paces.at(Some(to)), bytes as f64, 1 + gets(bytes));
                schedule.add(to, reads, paces.fixed(MOVE));
            }
            Move::Primary { to, bytes, .. } => {
                forecast.puts += 1 + puts(bytes);
                schedule.add(to, bytes as f64 / paces.at(Some(to)).upload, 0.0);
            }
        }
    }
    forecast.seconds = schedule.seconds();
    // All moves together have the rate.
    if let Some(max_rate) = paces.max_rate().filter(|_| forecast.bytes_from_bucket > 0) {
        let reading = forecast.bytes_from_bucket as f64 / max_rate;
        forecast.seconds = forecast.seconds.max(paces.fixed(MOVE) + reading);
    }
    forecast
}

#[cfg(test)]
mod tests {
    use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn moves_side_by_side_take_as_long_as_the_slowest_node() {
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
        let made = [to(4, 100), to(5, 50), to(4, 100), primary];
        let forecast = moves(&made, 4, &Paces::default());
        assert_eq!((forecast.bytes_moved, forecast.bytes_from_bucket), (250 * MIB, 250 * MIB));
        assert_eq!(forecast.gets, (1 + 13) + (1 + 7) + (1 + 13));
        assert_eq!(forecast.puts, 3 * 2 + (1 + 1));
        assert_eq!(forecast.disk[&NodeId(4)], 200 * MIB);
        // At the assumed 200 MiB a second: node 4 reads both of its replicas at that rate.
        assert_eq!(forecast.seconds, 1.0 + 3.0);
        let one = |at_once: usize| moves(&made, at_once, &Paces::default()).seconds;
        assert_eq!(one(1), (0.5 + 3.0) + (0.25 + 3.0) + (0.5 + 3.0) + 0.08, "one after the other");
        assert_eq!(one(2), 3.25 + 0.5 + 3.0, "the third begins when the second has ended");
        let at = |mib: u64| Paces::default().at_most(Some(mib * MIB));
        assert_eq!(moves(&made, 4, &at(10)).seconds, 3.0 + 25.0, "all of them share it");
        assert_eq!(moves(&made, 4, &at(1_000)).seconds, forecast.seconds);
        assert_eq!(moves(&[primary], 4, &at(1)).seconds, 16.0 / 200.0, "a checkpoint never waits");
        assert_eq!(moves(&[], 4, &at(1)).seconds, 0.0);
        assert_eq!(moves(&[], 4, &Paces::default()), Forecast::default());
    }
}
