//! A shard that has a replica too many: which one leaves, and what comes before that.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::drain::{cancel_drain, drain_node};
use super::failover::{Presence, QUIET_US};
use super::members::{advance_members, is_incomplete};
use super::moves::{MoveOrder, start_moves};
use super::view::{Around, Site};
use crate::catalog::{Catalog, KeyspaceSpec, NodeDrain, Placed};
use crate::control::plan::Step;
use crate::control::report::{ReplicaPhase, ReplicaReport, ReplicationReport, Reports};
use crate::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};

const NOW: u64 = 1_000_000_000;
const LATER: u64 = NOW + QUIET_US;

/// One shard that is to have so many replicas, and has one on each of so many nodes.
fn shard_of(replicas: u32, nodes: u64) -> Catalog {
    let spec = KeyspaceSpec { replicas, ..KeyspaceSpec::default() };
    let nodes: Vec<NodeId> = (1..=nodes).map(NodeId).collect();
    Catalog::first(KeyspaceId(1), "ks", spec, &[nodes], NOW, 1)
}

/// All replicas serve; the primary has authority.
fn well(catalog: &Catalog) -> Reports {
    let members = catalog.members().into_iter();
    let report = |(shard, member, placed): (ShardId, Placed, bool)| {
        let serving = Some(catalog.is_primary(member.replica));
        let report = ReplicaReport {
            version: catalog.version,
            replication: ReplicationReport { ready: placed, serving, ..Default::default() },
            ..ReplicaReport::new(catalog.keyspace, shard, member.replica, ReplicaPhase::Serving)
        };
        (member.replica, report)
    };
    members.map(report).collect()
}

fn next(
    catalog: &Catalog,
    reports: &Reports,
    site: &dyn Fn(NodeId) -> Site,
    now_us: u64,
) -> Option<Catalog> {
    let around = Around {
        presence: &|_| Presence::Here(u64::MAX),
        long_gone: &|_| false,
        lost: &|_| false,
        room: &|_, _| None,
        site,
    };
    advance_members(catalog, reports, &around, now_us, 3)
}

fn ids(catalog: &Catalog) -> Vec<u64> {
    catalog.placement[0].replicas.iter().map(|member| member.replica.0).collect()
}

fn like(_: NodeId) -> Site {
    Site::default()
}

#[test]
fn the_last_one_leaves_is_drained_and_goes() {
    for (replicas, left) in [(1, vec![1]), (2, vec![1, 2])] {
        let three = shard_of(replicas, u64::from(replicas) + 1);
        assert!(is_incomplete(&three, |_| true), "it is looked at although nothing is reported");
        assert_eq!(next(&three, &well(&three), &like, LATER - 1), None, "it has just changed");
        let trimmed = next(&three, &well(&three), &like, LATER).unwrap();
        assert_eq!(ids(&trimmed), left);
        let gone = ReplicaId(u64::from(replicas) + 1);
        assert_eq!(trimmed.draining[0].replica, gone);
        assert!(trimmed.epoch > three.epoch && !trimmed.is_removed(gone), "its log is read first");
        let mut drained = well(&trimmed);
        drained.get_mut(&gone).unwrap().replication.drained = true;
        let ended = next(&trimmed, &drained, &like, LATER).unwrap();
        assert!(ended.is_removed(gone) && !is_incomplete(&ended, |_| true));
        assert_eq!(next(&ended, &well(&ended), &like, LATER + QUIET_US), None);
    }
}

#[test]
fn the_one_on_a_cordoned_node_leaves_then_the_neighbour_then_that_on_the_fullest_node() {
    let four = shard_of(3, 4);
    let leaves = |site: &dyn Fn(NodeId) -> Site| {
        next(&four, &well(&four), site, LATER).unwrap().draining[0].replica.0
    };
    let used = |node: NodeId| Site { used: 900 / node.0, ..Site::default() };
    assert_eq!(leaves(&used), 2, "replica 1 is the primary, whatever its node");
    // Nodes 2 and 4 are the only ones of their zones.
    let zones = |node: NodeId| {
        let zone = if node.0 % 2 == 1 { "a".to_owned() } else { format!("z{node}") };
        Site { zone, ..used(node) }
    };
    assert_eq!(leaves(&zones), 3);
    let cordoned = |node: NodeId| Site { cordoned: node == NodeId(4), ..zones(node) };
    assert_eq!(leaves(&cordoned), 4);
}

#[test]
fn neither_an_acting_primary_nor_the_one_that_ships_leaves() {
    let mut acting = shard_of(2, 3);
    acting.placement[0].primary = Some(ReplicaId(3));
    assert_eq!(ids(&next(&acting, &well(&acting), &like, LATER).unwrap()), [1, 3]);
    let mut two = shard_of(1, 2);
    two.placement[0].primary = Some(ReplicaId(2));
    assert_eq!(next(&two, &well(&two), &like, LATER), None, "it waits for the leadership");
    // Nobody but the one that would leave has answered strict requests under this version.
    let three = shard_of(2, 3);
    let mut reports = well(&three);
    for report in reports.values_mut() {
        report.replication.serving = Some(report.replica == ReplicaId(3));
    }
    assert_eq!(next(&three, &reports, &like, LATER), None, "it alone may hold something");
}

#[test]
fn nothing_leaves_while_somebody_else_is_about_to_end_the_surplus() {
    let three = shard_of(2, 3);
    let whole = shard_of(2, 2);
    let order = MoveOrder { shard: ShardId(0), replica: ReplicaId(1), to: NodeId(3) };
    let mut moving = start_moves(&whole, &[order], 7, NOW, 2).unwrap();
    let new = moving.moves[0].plan.targets[0];
    moving.moves[0].plan.step = Step::Committed;
    moving.placement[0].replicas.push(Placed { replica: new.replica, node: new.node });
    assert_eq!(next(&moving, &well(&moving), &like, LATER), None, "a move replaces one of them");
    // The version of a master that does not know of moves.
    let dropped = Catalog { moves: Vec::new(), ..moving };
    assert_eq!(ids(&next(&dropped, &well(&dropped), &like, LATER).unwrap()), [1, 2]);

    // A drain takes its own replica out, the primary first; a paused one takes none.
    let drain = NodeDrain::new(NodeId(1), false, NOW);
    let drains = drain_node(&three, drain.clone(), NOW, 2).unwrap();
    let handed = next(&drains, &well(&drains), &like, LATER).unwrap();
    assert!(handed.placement[0].transferring_to.is_some() && ids(&handed) == [1, 2, 3]);
    assert_eq!(next(&handed, &well(&handed), &like, LATER + QUIET_US), None);
    let mut paused = drains.clone();
    paused.draining_nodes[0].paused = true;
    assert_eq!(next(&paused, &well(&paused), &like, LATER), None);
    // Once it is cancelled, the copy that it had placed is one too many.
    let id = drain.operation_id();
    let stays = cancel_drain(&drains, &id, "cancelled", &Reports::new(), NOW, 3).unwrap();
    assert_eq!(ids(&next(&stays, &well(&stays), &like, LATER).unwrap()), [1, 2]);
}

#[test]
fn a_shard_of_which_a_replica_does_not_serve_keeps_all() {
    let three = shard_of(2, 3);
    type Ill = fn(&mut ReplicaReport);
    let ills: [Ill; 3] = [
        |report| report.replication.ready = false,
        |report| report.version.0 -= 1,
        |report| {
            report.phase = ReplicaPhase::Failed("the disk hangs".into());
            report.replication.passing = true;
        },
    ];
    for ill in ills {
        for replica in 1..=3 {
            let mut reports = well(&three);
            ill(reports.get_mut(&ReplicaId(replica)).unwrap());
            assert_eq!(next(&three, &reports, &like, LATER), None, "replica {replica}");
        }
    }
}

proptest! {
    // Whatever the nodes are like: shards shrink to their replicas one by one, and the primary and
    // the one that ships stay.
    #[test]
    fn a_shard_keeps_its_primary_its_shipper_and_its_replicas(
        replicas in 1u32..4,
        more in 1u64..4,
        acting in 0usize..7,
        sites in proptest::collection::vec((any::<bool>(), 0u8..3, 0u64..1000), 7),
    ) {
        let mut catalog = shard_of(replicas, u64::from(replicas) + more);
        let count = catalog.placement[0].replicas.len();
        catalog.placement[0].primary =
            catalog.placement[0].replicas.get(acting % count).map(|member| member.replica);
        let primary = catalog.placement[0].primary();
        let shipper = catalog.placement[0].shipper();
        let site = |node: NodeId| {
            let (cordoned, zone, used) = sites[node.0 as usize % 7];
            Site { cordoned, zone: zone.to_string(), used }
        };
        let mut now_us = NOW;
        for _ in 0..16 {
            now_us += QUIET_US;
            let mut reports = well(&catalog);
            for draining in &catalog.draining {
                reports.get_mut(&draining.replica).unwrap().replication.drained = true;
            }
            let Some(next) = next(&catalog, &reports, &site, now_us) else { break };
            let shard = &next.placement[0];
            prop_assert!(shard.replicas.len() + 1 >= catalog.placement[0].replicas.len());
            prop_assert!(shard.replicas.len() >= replicas as usize);
            prop_assert_eq!((shard.primary(), shard.shipper()), (primary, shipper));
            catalog = next;
        }
        // An acting primary of a shard with one replica waits for the leadership to return.
        let left = if primary == shipper { replicas } else { replicas.max(2) };
        prop_assert_eq!(catalog.placement[0].replicas.len(), left as usize);
        prop_assert!(catalog.draining.is_empty());
    }
}
