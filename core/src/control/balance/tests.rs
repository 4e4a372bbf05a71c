//! The balance of clusters: examples, and that moves come to an end whatever the cluster.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};

const MIB: u64 = 1 << 20;

fn node(id: u64, zone: &str) -> BalanceNode {
    BalanceNode {
        node: NodeId(id),
        zone: zone.into(),
        capacity: 100 << 30,
        room: 50 << 30,
        places: 500,
        permits: 4,
        takes_part: true,
    }
}

/// A shard with replicas of `mib` on these nodes.
fn shard(number: u32, nodes: &[u64], mib: u64) -> BalanceShard {
    let replica = |(n, node): (usize, &u64)| BalanceReplica {
        replica: ReplicaId(u64::from(number) * 10 + n as u64 + 1),
        node: NodeId(*node),
        bytes: mib * MIB,
        load: 0,
    };
    BalanceShard {
        keyspace: KeyspaceId(1),
        shard: ShardId(number),
        replicas: nodes.iter().enumerate().map(replica).collect(),
        elsewhere: Vec::new(),
        moves: When::Now,
        prefers: When::Now,
    }
}

/// Begins moves and lets them end, which gives the permits of their nodes back.
fn made(cluster: &mut Balance, cap: usize) -> Vec<Move> {
    let permits: Vec<usize> = cluster.nodes.iter().map(|node| node.permits).collect();
    let moves = next_moves(cluster, cap);
    moves.iter().for_each(|one| cluster.apply(one));
    cluster.nodes.iter_mut().zip(permits).for_each(|(node, permits)| node.permits = permits);
    moves
}

fn counts(cluster: &Balance) -> Vec<usize> {
    let on = |node: &BalanceNode| {
        let replicas = cluster.shards.iter().flat_map(|shard| &shard.replicas);
        replicas.filter(|replica| replica.node == node.node).count()
    };
    cluster.nodes.iter().map(on).collect()
}

fn primaries(cluster: &Balance) -> Vec<usize> {
    let on = |node: &BalanceNode| {
        cluster.shards.iter().filter(|shard| shard.replicas[0].node == node.node).count()
    };
    cluster.nodes.iter().map(on).collect()
}

fn to(made: &Move) -> NodeId {
    match made {
        Move::Replica { to, .. } | Move::Primary { to, .. } => *to,
    }
}

/// Three nodes with 15 shards; nodes 4 and 5 are empty.
fn two_have_joined() -> Balance {
    Balance {
        nodes: (1..=5).map(|id| node(id, "")).collect(),
        shards: (0..15).map(|n| shard(n, &[u64::from(n % 3) + 1], 64)).collect(),
    }
}

#[test]
fn nodes_that_join_at_once_are_filled_side_by_side_to_their_part() {
    let mut cluster = two_have_joined();
    let first = next_moves(&cluster, 4);
    assert_eq!(first.iter().map(to).collect::<Vec<_>>(), [4, 5, 4, 5].map(NodeId));
    let all = all_moves(&cluster);
    assert_eq!(all.len(), 6, "no replica moves twice: {all:?}");
    assert_eq!(all[..4], first[..]);
    while !made(&mut cluster, 4).is_empty() {}
    assert_eq!(counts(&cluster), [3; 5]);
    assert!(all_moves(&cluster).is_empty());
}

#[test]
fn permits_and_room_bound_what_begins_and_a_cordoned_node_takes_and_gives_nothing() {
    let mut cluster = two_have_joined();
    cluster.nodes[3].permits = 1;
    cluster.nodes[4].permits = 0;
    assert_eq!(next_moves(&cluster, 9).iter().map(to).collect::<Vec<_>>(), [NodeId(4)]);
    assert_eq!(all_moves(&cluster).len(), 6, "the plan is not bounded by what begins now");
    cluster.nodes[3].room = 64 * MIB;
    assert!(next_moves(&cluster, 9).is_empty());
    let mut cluster = two_have_joined();
    cluster.nodes[0].takes_part = false;
    cluster.nodes[4].takes_part = false;
    let all = all_moves(&cluster);
    assert!(!all.is_empty());
    for one in all {
        let Move::Replica { from, to, .. } = one else { panic!("{one:?}") };
        assert!(from != NodeId(1) && to == NodeId(4), "{one:?}");
    }
    let mut busy = two_have_joined();
    busy.shards.iter_mut().for_each(|shard| shard.moves = When::Later);
    busy.shards[1].moves = When::Now;
    assert_eq!((next_moves(&busy, 9).len(), all_moves(&busy).len()), (1, 6));
    busy.shards.iter_mut().skip(2).for_each(|shard| shard.moves = When::Never);
    assert!(all_moves(&busy).len() <= 2 && !is_balanced(&busy));
    busy.shards[0].moves = When::Never;
    busy.shards[1].elsewhere = vec![NodeId(4), NodeId(5)];
    assert!(next_moves(&busy, 9).is_empty() && is_balanced(&busy));
}

#[test]
fn bytes_count_more_than_numbers_and_larger_disks_get_more() {
    // One shard is as large as three others together.
    let mut cluster = Balance {
        nodes: vec![node(1, ""), node(2, "")],
        shards: vec![
            shard(0, &[1], 900),
            shard(1, &[1], 300),
            shard(2, &[1], 300),
            shard(3, &[1], 300),
        ],
    };
    while !made(&mut cluster, 1).is_empty() {}
    let mut of_one: Vec<u64> = cluster
        .shards
        .iter()
        .flat_map(|shard| &shard.replicas)
        .filter(|replica| replica.node == NodeId(1))
        .map(|replica| replica.bytes / MIB)
        .collect();
    of_one.sort_unstable();
    assert!(of_one == [900] || of_one == [300, 300, 300], "{of_one:?}");
    let mut cluster = two_have_joined();
    cluster.nodes[4].capacity *= 3;
    while !made(&mut cluster, 4).is_empty() {}
    let counts = counts(&cluster);
    assert!(
        counts[4] >= 5 && counts[..4].iter().all(|count| (2..=3).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn a_node_whose_disk_is_not_known_does_not_change_what_the_others_are_to_have() {
    let mut cluster = two_have_joined();
    cluster.nodes[4].capacity *= 3;
    while !made(&mut cluster, 4).is_empty() {}
    // Another one is away, and this master has not heard of it.
    let unknown = BalanceNode { capacity: 0, takes_part: false, ..node(6, "") };
    cluster.nodes.push(unknown);
    assert_eq!(all_moves(&cluster), [], "the large disk keeps its part");
}

#[test]
fn what_is_small_or_nearly_even_stays() {
    let nodes = || vec![node(1, ""), node(2, "")];
    let even = |first: u64, second: u64| Balance {
        nodes: nodes(),
        shards: vec![shard(0, &[1], first), shard(1, &[2], second), shard(2, &[1], 0)],
    };
    assert!(all_moves(&even(0, 0)).is_empty(), "it would only change sides");
    assert!(all_moves(&even(1000, 980)).is_empty());
    assert!(
        !all_moves(&Balance { shards: vec![shard(0, &[1], 9), shard(1, &[1], 9)], nodes: nodes() })
            .is_empty()
    );
    assert!(all_moves(&Balance::default()).is_empty());
    assert!(all_moves(&Balance { shards: Vec::new(), nodes: nodes() }).is_empty());
    // What has moved does not move back because the copy is smaller.
    let mut cluster = two_have_joined();
    while !made(&mut cluster, 4).is_empty() {}
    for shard in &mut cluster.shards {
        if shard.replicas[0].node > NodeId(3) {
            shard.replicas[0].bytes -= shard.replicas[0].bytes / 10;
        }
    }
    assert!(all_moves(&cluster).is_empty());
}

#[test]
fn primaries_are_spread_by_what_they_do() {
    let replicas = [1, 2, 3];
    let mut cluster = Balance {
        nodes: (1..=3).map(|id| node(id, "")).collect(),
        shards: (0..6).map(|n| shard(n, &replicas, 10)).collect(),
    };
    let moves = all_moves(&cluster);
    assert!(moves.iter().all(|one| matches!(one, Move::Primary { .. })), "{moves:?}");
    while !made(&mut cluster, 2).is_empty() {}
    assert_eq!(primaries(&cluster), [2, 2, 2]);
    // One of the shards does as much as all others together.
    cluster.shards.iter_mut().for_each(|shard| shard.replicas[0].load = 1_000);
    cluster.shards[0].replicas[0].load = 5_000;
    let busy = cluster.shards[0].replicas[0].node;
    while !made(&mut cluster, 2).is_empty() {}
    let at = cluster.position(busy).unwrap();
    assert_eq!((primaries(&cluster)[at], primaries(&cluster).iter().sum::<usize>()), (1, 6));
}

#[test]
fn a_zone_that_is_new_gets_a_replica_of_each_shard_and_no_shard_loses_one() {
    let mut cluster = Balance {
        nodes: vec![node(1, "a"), node(2, "a"), node(3, "a"), node(4, "b")],
        shards: (0..4).map(|n| shard(n, &[1, 2], 10)).collect(),
    };
    while !made(&mut cluster, 2).is_empty() {}
    for shard in &cluster.shards {
        let nodes: Vec<NodeId> = shard.replicas.iter().map(|replica| replica.node).collect();
        assert!(nodes.contains(&NodeId(4)), "{nodes:?}");
    }
    // Node 4 has twice its part, and keeps it: it is the only one in its zone.
    assert_eq!(counts(&cluster)[3], 4);
}

#[test]
fn twenty_nodes_with_a_thousand_keyspaces_are_decided_in_a_moment() {
    let mut cluster = Balance {
        nodes: (1..=20).map(|id| node(id, ["a", "b", "c"][id as usize % 3])).collect(),
        shards: Vec::new(),
    };
    for n in 0..4_000u64 {
        let nodes = [0, 1, 2].map(|k| (n * 7 + k * 5) % 18 + 1);
        let one = shard(n as u32, &nodes, n % 97);
        cluster.shards.push(BalanceShard { keyspace: KeyspaceId(n / 4), ..one });
    }
    let moves = next_moves(&cluster, 4);
    assert_eq!(moves.len(), 4);
    assert!(moves.iter().all(|one| to(one) >= NodeId(19)), "{moves:?}");
}

prop_compose! {
    fn any_cluster()(
        nodes in 1u64..9,
        zones in 1usize..4,
        cordoned in prop::collection::vec(prop::bool::weighted(0.15), 9),
        sizes in prop::collection::vec((0u64..4_000, 0u64..5_000, 1usize..4, any::<u64>()), 1..40),
    ) -> Balance {
        let names = ["a", "b", "c"];
        let all = (1..=nodes).map(|id| BalanceNode {
            takes_part: !cordoned[id as usize - 1],
            ..node(id, names[id as usize % zones])
        });
        let shards = sizes.into_iter().enumerate().map(|(number, (mib, load, replicas, seed))| {
            // Most of it is on the first nodes.
            let spread = 1 + seed % nodes;
            let on: BTreeSet<u64> =
                (0..replicas as u64).map(|n| 1 + (seed / 7 + n * (1 + seed % 3)) % spread).collect();
            let mut one = shard(number as u32, &on.into_iter().collect::<Vec<_>>(), mib);
            one.replicas.iter_mut().enumerate().for_each(|(place, replica)| {
                replica.load = if place == 0 { load } else { load / 4 };
            });
            one
        });
        Balance { nodes: all.collect(), shards: shards.collect() }
    }
}

proptest! {
    #[test]
    fn moves_come_to_an_end_and_then_there_are_none(cluster in any_cluster(), cap in 1usize..6) {
        let mut cluster = cluster;
        let mut total = 0;
        loop {
            cluster.nodes.iter_mut().for_each(|node| node.permits = 4);
            let before = cluster.clone();
            let moves = made(&mut cluster, cap);
            prop_assert!(moves.len() <= cap);
            if moves.is_empty() {
                break;
            }
            total += moves.len();
            prop_assert!(total < 2_000, "it does not end: {moves:?}");
            let mut per_node: BTreeMap<NodeId, usize> = BTreeMap::new();
            for one in &moves {
                let position = cluster.position(to(one)).unwrap();
                prop_assert!(cluster.nodes[position].takes_part, "{one:?}");
                if let Move::Replica { from, .. } = one {
                    *per_node.entry(to(one)).or_default() += 1;
                    let position = cluster.position(*from).unwrap();
                    prop_assert!(cluster.nodes[position].takes_part, "{one:?}");
                }
            }
            prop_assert!(per_node.values().all(|begun| *begun <= 4), "{per_node:?}");
            for (was, is) in before.shards.iter().zip(&cluster.shards) {
                let nodes = |shard: &BalanceShard| -> Vec<NodeId> {
                    shard.replicas.iter().map(|replica| replica.node).collect()
                };
                let distinct: BTreeSet<NodeId> = nodes(is).into_iter().collect();
                prop_assert_eq!(distinct.len(), is.replicas.len(), "{:?}", is);
                let zones = |shard| cluster.zones(nodes(shard).into_iter());
                prop_assert!(zones(is) >= zones(was), "{was:?} {is:?}");
                let bytes = |shard: &BalanceShard| shard.replicas.iter().map(|one| one.bytes).sum::<u64>();
                prop_assert_eq!(bytes(is), bytes(was));
                let load = |shard: &BalanceShard| shard.replicas.iter().map(|one| one.load).sum::<u64>();
                prop_assert_eq!(load(is), load(was));
            }
        }
        prop_assert!(next_moves(&cluster, cap).is_empty());
        prop_assert!(all_moves(&cluster).is_empty());
    }

    #[test]
    fn equal_replicas_end_up_in_equal_numbers(nodes in 2u64..9, shards in 1u32..60, on in 1u64..3) {
        let mut cluster = Balance {
            nodes: (1..=nodes).map(|id| node(id, "")).collect(),
            shards: (0..shards).map(|n| shard(n, &[1 + u64::from(n) % on.min(nodes)], 64)).collect(),
        };
        for _ in 0..200 {
            cluster.nodes.iter_mut().for_each(|node| node.permits = 4);
            if made(&mut cluster, 4).is_empty() {
                break;
            }
        }
        let counts = counts(&cluster);
        let apart = counts.iter().max().unwrap() - counts.iter().min().unwrap();
        // One replica more or less, or what the hysteresis leaves where there are many.
        let most = 1.0 + HYSTERESIS * f64::from(shards) / nodes as f64;
        prop_assert!(apart as f64 <= most + 1e-9, "{counts:?}");
    }
}
