//! The tension of a cluster, and by how much a move changes it.
//!
//! **Invariant:** the parts of all nodes in each quantity add up to 1, so that bytes, load and
//! primaries can be weighed against each other.

use super::cluster::{Balance, BalanceNode, BalanceReplica, BalanceShard};

/// The part of what a move moves by which it must lower the tension: of two nodes the fuller one
/// must still be above the other by a tenth of the mean, once the replica has left it and before the
/// other has it. Sizes that change a little, and copies that turn out smaller, move nothing back.
pub const HYSTERESIS: f64 = 0.1;

/// The same for another preferred primary: it uploads a checkpoint, which a small gain is not worth.
pub const PRIMARY_HYSTERESIS: f64 = 0.25;

/// Bytes that every replica counts for at least, on top of its own: files, logs and memory of its
/// own make an empty one cost something too, and differences of less than this move nothing.
const REPLICA_BYTES: u64 = 1 << 20;

/// Load that every replica and every primary counts for at least, on top of its own, requests a
/// second: an idle cluster is spread by numbers.
const REPLICA_LOAD: u64 = 16;

/// Bytes, load, preferred primaries.
const QUANTITIES: usize = 3;
const WEIGHTS: [f64; QUANTITIES] = [1.0, 0.25, 0.25];

/// An amount of each quantity, as parts of that of the whole cluster.
pub(super) type Parts = [f64; QUANTITIES];

/// By how much a change lowers the tension.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gain {
    /// In all.
    pub(super) whole: f64,
    /// Over twice the parts that the change moves.
    pub(super) average: f64,
}

/// What each node has.
pub(super) struct Tension {
    /// By position of the node.
    has: Vec<Parts>,
    /// The part of each node in the capacity of all; their sum is 1.
    capacity: Vec<f64>,
    totals: Parts,
}

impl Tension {
    pub(super) fn of(cluster: &Balance) -> Self {
        let nodes = cluster.nodes.len();
        // One whose disk is not known counts as an average one, so the parts of the others do not
        // change because of it.
        let known: Vec<f64> = cluster
            .nodes
            .iter()
            .filter(|node| node.capacity > 0)
            .map(|node| node.capacity as f64)
            .collect();
        let mean =
            if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
        let capacity = |node: &BalanceNode| match node.capacity {
            0 => mean,
            bytes => bytes as f64,
        };
        let whole: f64 = cluster.nodes.iter().map(capacity).sum();
        let mut tension = Self {
            has: vec![[0.0; QUANTITIES]; nodes],
            capacity: cluster.nodes.iter().map(|node| capacity(node) / whole).collect(),
            totals: [0.0; QUANTITIES],
        };
        let mut amounts: Vec<(usize, Parts)> = Vec::new();
        for shard in &cluster.shards {
            for (place, replica) in shard.replicas.iter().enumerate() {
                let Some(at) = cluster.position(replica.node) else { continue };
                let primary = if place == 0 { weight_of_primary(shard) } else { 0.0 };
                amounts.push((at, [bytes_of(replica), load_of(replica), primary]));
            }
        }
        for (_, amount) in &amounts {
            (0..QUANTITIES).for_each(|q| tension.totals[q] += amount[q]);
        }
        for (at, amount) in amounts {
            let parts = tension.parts(amount);
            (0..QUANTITIES).for_each(|q| tension.has[at][q] += parts[q]);
        }
        tension
    }

    /// Returns an amount as parts of the whole.
    fn parts(&self, amount: Parts) -> Parts {
        std::array::from_fn(|q| match self.totals[q] > 0.0 {
            true => amount[q] / self.totals[q],
            false => 0.0,
        })
    }

    /// Returns how full a node is: 1 for one that has exactly its part.
    pub(super) fn fullness(&self, at: usize) -> f64 {
        let weighed: f64 = (0..QUANTITIES).map(|q| WEIGHTS[q] * self.has[at][q]).sum();
        weighed / self.capacity[at] / WEIGHTS.iter().sum::<f64>()
    }

    /// Returns by how much a change lowers the tension, as a whole and over twice what it moves:
    /// the latter is the average difference of the fullness of the nodes between which it moves.
    /// `changes` are the parts that nodes gain (or lose, below 0).
    pub(super) fn gain(&self, changes: &[(usize, Parts)]) -> Gain {
        let (mut lower, mut moved) = (0.0, 0.0);
        let mut nodes: Vec<usize> = changes.iter().map(|(at, _)| *at).collect();
        nodes.sort_unstable();
        nodes.dedup();
        for at in nodes {
            let of_node = || changes.iter().filter(|(node, _)| *node == at);
            let change: Parts = std::array::from_fn(|q| of_node().map(|(_, parts)| parts[q]).sum());
            for ((weight, change), before) in WEIGHTS.iter().zip(change).zip(self.has[at]) {
                lower -= weight * change * (2.0 * before + change) / self.capacity[at];
                moved += weight * change.max(0.0);
            }
        }
        Gain { whole: lower, average: if moved > 0.0 { lower / (2.0 * moved) } else { 0.0 } }
    }

    /// Returns what changes when the replica at a place of a shard moves from one node to another;
    /// `heir` is the node of the one that becomes the preferred primary in the place of the first.
    pub(super) fn of_move(
        &self,
        shard: &BalanceShard,
        place: usize,
        (from, to): (usize, usize),
        heir: Option<usize>,
    ) -> Vec<(usize, Parts)> {
        let replica = &shard.replicas[place];
        let (bytes, load) = (bytes_of(replica), load_of(replica));
        let role = if place == 0 { weight_of_primary(shard) } else { 0.0 };
        let leaves = (from, negative(self.parts([bytes, load, role])));
        match heir.zip(shard.replicas.get(1)) {
            Some((heir, next)) if place == 0 => {
                let left = load_of(next);
                let gets = (to, self.parts([bytes, left, 0.0]));
                vec![leaves, gets, (heir, self.parts([0.0, load - left, role]))]
            }
            _ => vec![leaves, (to, self.parts([bytes, load, role]))],
        }
    }

    /// Returns what changes when the replica at a place of a shard becomes the preferred primary.
    pub(super) fn of_primary(
        &self,
        shard: &BalanceShard,
        place: usize,
        (from, to): (usize, usize),
    ) -> Vec<(usize, Parts)> {
        let more = load_of(&shard.replicas[0]) - load_of(&shard.replicas[place]);
        let parts = self.parts([0.0, more, weight_of_primary(shard)]);
        vec![(from, negative(parts)), (to, parts)]
    }
}

fn negative(parts: Parts) -> Parts {
    parts.map(|part| -part)
}

fn bytes_of(replica: &BalanceReplica) -> f64 {
    replica.bytes.saturating_add(REPLICA_BYTES) as f64
}

fn load_of(replica: &BalanceReplica) -> f64 {
    replica.load.saturating_add(REPLICA_LOAD) as f64
}

/// Returns what the role of the preferred primary of a shard weighs, whichever replica has it.
fn weight_of_primary(shard: &BalanceShard) -> f64 {
    shard.replicas.iter().map(load_of).fold(0.0, f64::max)
}
