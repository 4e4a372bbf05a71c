//! The forecast of a rebalance: what its moves take, for `cluster rebalance --plan`.
//!
//! **Invariant:** pure, from the moves and the rates of the nodes. A replica is read as its files are, so each byte that
//! moves is read once; what goes up is what a new shipper has not shipped yet.

use vasto_core::balance::Move;

use super::Forecast;
use super::size::{gets, puts};
use super::time::{MOVE, Paces, SideBySide};

/// Returns the forecast of a rebalance that makes these moves; it names no sources.
pub(crate) fn moves(moves: &[Move], paces: &Paces) -> Forecast {
    let mut forecast = Forecast::default();
    let mut at_nodes = SideBySide::default();
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
                let seconds = paces.fixed(MOVE) + reads;
                at_nodes.add(Some(to), seconds);
            }
            Move::Primary { to, bytes, .. } => {
                forecast.puts += 1 + puts(bytes);
                at_nodes.add(Some(to), bytes as f64 / paces.at(Some(to)).upload);
            }
        }
    }
    forecast.seconds = at_nodes.seconds();
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
        let made = [to(4, 100), to(5, 50), to(4, 100), primary];
        let forecast = moves(&made, &Paces::default());
        assert_eq!((forecast.bytes_moved, forecast.bytes_from_bucket), (250 * MIB, 250 * MIB));
        assert_eq!(forecast.gets, (1 + 13) + (1 + 7) + (1 + 13));
        assert_eq!(forecast.puts, 3 * 2 + (1 + 1));
        assert_eq!(forecast.disk[&NodeId(4)], 200 * MIB);
        // At the assumed 200 MiB a second.
        assert_eq!(forecast.seconds, 2.0 * 3.0 + 1.0);
        let at = |mib: u64| Paces::default().at_most(Some(mib * MIB));
        assert_eq!(moves(&made, &at(10)).seconds, 3.0 + 25.0, "all of them share it");
        assert_eq!(moves(&made, &at(1_000)).seconds, forecast.seconds);
        assert_eq!(moves(&[primary], &at(1)).seconds, 16.0 / 200.0, "a checkpoint never waits");
        assert_eq!(moves(&[], &at(1)).seconds, 0.0);
        assert_eq!(moves(&[], &Paces::default()), Forecast::default());
    }
}
