//! The choice of the next moves.
//!
//! **Invariant:** the best move of the fullest node that has one comes first; of moves that are
//! equally good, the first by shard and node.

use std::collections::BTreeSet;

use super::cluster::{Balance, Move, When};
use super::tension::{Gain, HYSTERESIS, PRIMARY_HYSTERESIS, Tension};
use crate::ids::{KeyspaceId, NodeId, ShardId};

/// The most moves that a plan of all of them names.
pub const MOVES_PLANNED_MAX: usize = 2_000;

/// A move with its gain.
struct Candidate {
    made: Move,
    gain: Gain,
}

/// Returns the moves that are to begin now, at most `cap`, each of another shard: the best first.
/// Each is decided as if those before it had ended. The permits of the nodes bound the replicas that
/// are made on one of them at a time.
pub fn next_moves(cluster: &Balance, cap: usize) -> Vec<Move> {
    let mut cluster = cluster.clone();
    let mut made = Vec::new();
    let mut begun = BTreeSet::new();
    while made.len() < cap {
        let Some(next) = Search::new(&cluster, true, &begun).best() else { break };
        begun.insert(shard_of(&next));
        cluster.apply(&next);
        made.push(next);
    }
    made
}

/// Returns all moves until the cluster is in balance, at most [`MOVES_PLANNED_MAX`], in their order.
/// Empty when it is.
pub fn all_moves(cluster: &Balance) -> Vec<Move> {
    let mut cluster = cluster.clone();
    let mut made = Vec::new();
    let none = BTreeSet::new();
    while made.len() < MOVES_PLANNED_MAX {
        let Some(next) = Search::new(&cluster, false, &none).best() else { break };
        cluster.apply(&next);
        made.push(next);
    }
    made
}

/// Returns true when no move is left to be made.
pub fn is_balanced(cluster: &Balance) -> bool {
    Search::new(cluster, false, &BTreeSet::new()).best().is_none()
}

fn shard_of(made: &Move) -> (KeyspaceId, ShardId) {
    match *made {
        Move::Replica { keyspace, shard, .. } | Move::Primary { keyspace, shard, .. } => {
            (keyspace, shard)
        }
    }
}

/// The search for one move.
struct Search<'a> {
    cluster: &'a Balance,
    tension: Tension,
    /// Only moves that may begin now.
    now: bool,
    begun: &'a BTreeSet<(KeyspaceId, ShardId)>,
    /// By position of the node: the replicas that it has, by shard and place.
    of_nodes: Vec<Vec<(usize, usize)>>,
}

impl<'a> Search<'a> {
    fn new(cluster: &'a Balance, now: bool, begun: &'a BTreeSet<(KeyspaceId, ShardId)>) -> Self {
        let mut of_nodes = vec![Vec::new(); cluster.nodes.len()];
        for (at, shard) in cluster.shards.iter().enumerate() {
            for (place, replica) in shard.replicas.iter().enumerate() {
                if let Some(node) = cluster.position(replica.node) {
                    of_nodes[node].push((at, place));
                }
            }
        }
        Self { cluster, tension: Tension::of(cluster), now, begun, of_nodes }
    }

    fn best(&self) -> Option<Move> {
        if let Some(made) = self.better_zones() {
            return Some(made);
        }
        let mut givers: Vec<usize> =
            (0..self.cluster.nodes.len()).filter(|at| self.cluster.nodes[*at].takes_part).collect();
        givers.sort_by(|a, b| self.tension.fullness(*b).total_cmp(&self.tension.fullness(*a)));
        givers.into_iter().find_map(|giver| {
            let of_node = self.of_nodes[giver].iter();
            let all = of_node.flat_map(|(shard, place)| {
                let moves = self.moves_of(*shard, *place, giver);
                let moves = moves
                    .into_iter()
                    .filter(|(zones, one)| *zones == 0 && one.gain.average > HYSTERESIS);
                let primaries = self.primaries_of(*shard, *place, giver).into_iter();
                let primaries = primaries.filter(|one| one.gain.average > PRIMARY_HYSTERESIS);
                moves.map(|(_, one)| one).chain(primaries)
            });
            better_of(all).map(|best| best.made)
        })
    }

    /// Returns the move that lets a shard be in one more zone, if one can.
    fn better_zones(&self) -> Option<Move> {
        let zones = self.cluster.zones(self.cluster.nodes.iter().map(|node| node.node));
        let shards = self.cluster.shards.iter().enumerate();
        let crowded = shards.filter(|(_, shard)| {
            let nodes = shard.replicas.iter().map(|replica| replica.node);
            self.cluster.zones(nodes) < shard.replicas.len().min(zones)
        });
        let all = crowded.flat_map(|(at, shard)| {
            let places = shard.replicas.iter().enumerate();
            places.flat_map(move |(place, replica)| {
                let giver = self.cluster.position(replica.node);
                let giver = giver.filter(|giver| self.cluster.nodes[*giver].takes_part);
                giver.into_iter().flat_map(move |giver| self.moves_of(at, place, giver))
            })
        });
        let better = all.filter(|(zones, _)| *zones > 0).map(|(_, one)| one);
        better_of(better).map(|best| best.made)
    }

    /// Returns the moves of one replica to each node that may have it, with the number of zones that
    /// the shard gains; none by which it loses one.
    fn moves_of(&self, at: usize, place: usize, giver: usize) -> Vec<(usize, Candidate)> {
        let cluster = self.cluster;
        let shard = &cluster.shards[at];
        if !self.may(at, shard.moves) {
            return Vec::new();
        }
        let replica = shard.replicas[place];
        let others = shard.replicas.iter().enumerate().filter(|(other, _)| *other != place);
        let zones: Vec<&str> = others.filter_map(|(_, other)| cluster.zone(other.node)).collect();
        let is_further =
            |node: NodeId| cluster.zone(node).is_none_or(|zone| !zones.contains(&zone));
        let before = usize::from(is_further(replica.node));
        let heir = shard.replicas.get(1).filter(|_| place == 0);
        let heir = heir.and_then(|heir| cluster.position(heir.node));
        let takers = cluster.nodes.iter().enumerate().filter(|(_, node)| {
            node.takes_part
                && node.room > replica.bytes
                && node.places > 0
                && (!self.now || node.permits > 0)
                && !shard.replicas.iter().any(|other| other.node == node.node)
                && !shard.elsewhere.contains(&node.node)
        });
        let moves = takers.filter_map(|(taker, node)| {
            let gained = usize::from(is_further(node.node)).checked_sub(before)?;
            let changes = self.tension.of_move(shard, place, (giver, taker), heir);
            let made = Move::Replica {
                keyspace: shard.keyspace,
                shard: shard.shard,
                replica: replica.replica,
                from: replica.node,
                to: node.node,
                bytes: replica.bytes,
            };
            let gain = self.tension.gain(&changes);
            Some((gained, Candidate { made, gain }))
        });
        moves.collect()
    }

    /// Returns the other replicas that could be the preferred primary in the place of this one.
    fn primaries_of(&self, at: usize, place: usize, giver: usize) -> Vec<Candidate> {
        let shard = &self.cluster.shards[at];
        if place != 0 || !self.may(at, shard.prefers) {
            return Vec::new();
        }
        let others = shard.replicas.iter().enumerate().skip(1);
        let candidates = others.filter_map(|(other, replica)| {
            let taker = self.cluster.position(replica.node)?;
            self.cluster.nodes[taker].takes_part.then_some(())?;
            let changes = self.tension.of_primary(shard, other, (giver, taker));
            let made = Move::Primary {
                keyspace: shard.keyspace,
                shard: shard.shard,
                replica: replica.replica,
                from: shard.replicas[0].node,
                to: replica.node,
                bytes: replica.bytes,
            };
            let gain = self.tension.gain(&changes);
            Some(Candidate { made, gain })
        });
        candidates.collect()
    }

    /// Returns true when something of the shard may begin.
    fn may(&self, at: usize, when: When) -> bool {
        let shard = &self.cluster.shards[at];
        match when {
            When::Now => !self.now || !self.begun.contains(&(shard.keyspace, shard.shard)),
            When::Later => !self.now,
            When::Never => false,
        }
    }
}

/// Returns the candidate that gains most, the first of several.
fn better_of(all: impl Iterator<Item = Candidate>) -> Option<Candidate> {
    all.fold(None, |best: Option<Candidate>, one| match best {
        Some(best) if best.gain.whole >= one.gain.whole => Some(best),
        _ => Some(one),
    })
}
