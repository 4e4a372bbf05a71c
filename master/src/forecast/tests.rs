//! Forecasts of small clusters, by hand and against the placement of real keys.

#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use proptest::prelude::*;
use vasto_core::band::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec, NodeDrain, Quarantine};
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::reconcile::start_resize;
use vasto_core::report::{ReplicaReport, Reports};
use vasto_core::stored::{BandSize, Stored};
use vasto_proto::v1;
use vasto_shipping::Weight;

use super::copies::{DrainForecast, Weighed, drain, from_the_bucket};
use super::resize::resize;
use super::restore::{Restored, restore};
use super::time::Paces;
use super::*;
use crate::state::tests::{hello, replica_report};
use crate::state::{ClusterState, Delivery};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Returns a keyspace with its replicas on nodes 1, 2, ...; each holds 120 MiB, all of it in the
/// bucket, and has not measured its bands.
fn keyspace(shards: u32, replicas: u32) -> (Catalog, Reports) {
    let spec = KeyspaceSpec { shards, replicas, ..KeyspaceSpec::default() };
    let node = |shard: u32, copy: u32| NodeId(u64::from(shard * replicas + copy + 1));
    let nodes: Vec<Vec<NodeId>> =
        (0..shards).map(|shard| (0..replicas).map(|copy| node(shard, copy)).collect()).collect();
    let catalog = Catalog::first(KeyspaceId(1), "ks1", spec, &nodes, 1_000, 1);
    let ids = (1..=u64::from(shards * replicas)).map(ReplicaId);
    let report = |id: ReplicaId| ReplicaReport {
        bytes: 120 * MIB,
        manifest_lsn: Lsn(100),
        ..replica_report(id.0, 1)
    };
    (catalog, ids.map(|id| (id, report(id))).collect())
}

fn moves(forecast: &Forecast) -> Vec<u64> {
    forecast.sources.iter().map(|source| source.moves / MIB).collect()
}

fn disk(forecast: &Forecast) -> Vec<(u64, u64)> {
    forecast.disk.iter().map(|(node, bytes)| (node.0, bytes / MIB)).collect()
}

#[test]
fn a_shrink_moves_all_of_its_retiring_shards_to_every_replica_of_the_others() {
    let (catalog, reports) = keyspace(3, 2);
    let forecast = resize(&catalog, &reports, 2, None, &Paces::default());
    assert_eq!(moves(&forecast), [120]);
    let source = &forecast.sources[0];
    assert_eq!((source.shard, source.node), (ShardId(2), Some(NodeId(5))));
    assert_eq!(forecast.bytes_moved, 240 * MIB, "each of two replicas takes its half");
    assert_eq!(forecast.bytes_from_bucket, 240 * MIB);
    assert_eq!(forecast.gets, 4 * (1 + 8));
    // A checkpoint without new files, an export of 3 whole tables and a smaller one; two targets
    // that ship 32 and 28 MiB.
    assert_eq!(forecast.puts, (2 + 1 + 4 * 4) + 2 * (2 + 2 * 4));
    assert_eq!(disk(&forecast), [(1, 120), (2, 120), (3, 120), (4, 120), (5, 120)]);
    assert_eq!(forecast.moving_fraction, Some(1.0 / 3.0));
    // 120 MiB are exported at 100 MiB/s; 60 are read at 200, rewritten at 80 and shipped at 200.
    assert!((forecast.seconds - (0.6 + 1.2 + 0.3 + 0.75 + 0.3)).abs() < 0.01, "{forecast:?}");
    // One node exports at 20 MiB/s; four nodes read at 5 each, and ship as always.
    let paces = Paces::default().at_most(Some(20 * MIB));
    let slow = resize(&catalog, &reports, 2, None, &paces);
    assert!((slow.seconds - (0.6 + 6.0 + 12.0 + 0.75 + 0.3)).abs() < 0.01, "{slow:?}");
    assert_eq!(Forecast { seconds: 0.0, ..slow }, Forecast { seconds: 0.0, ..forecast });
}

#[test]
fn a_grow_by_one_reads_files_and_one_by_several_exports() {
    let (catalog, reports) = keyspace(2, 1);
    let one = resize(&catalog, &reports, 3, None, &Paces::default());
    assert_eq!((moves(&one), one.bytes_moved), (vec![40, 40], 80 * MIB));
    assert_eq!((one.gets, one.puts), (2 * (1 + 5), 2 * 2 + (2 + 2 * 4 + 1)));
    assert!(one.disk.is_empty(), "no node is chosen yet, and no source exports");
    let nodes = [vec![NodeId(8)], vec![NodeId(9)]];
    let next = start_resize(&catalog, 4, &nodes, 9, 9).unwrap();
    let two = resize(&catalog, &reports, 4, next.plan.as_ref(), &Paces::default());
    assert_eq!((moves(&two), two.bytes_moved), (vec![60, 60], 120 * MIB));
    assert_eq!(disk(&two), [(1, 60), (2, 60), (8, 120), (9, 120)]);
    // Two nodes export 60 MiB each at 5 MiB/s each; two read and ship as much at the same rate.
    let paces = Paces::default().at_most(Some(10 * MIB));
    let slow = resize(&catalog, &reports, 4, next.plan.as_ref(), &paces);
    assert!((slow.seconds - (0.6 + 12.0 + 12.0 + 0.75 + 12.0)).abs() < 0.01, "{slow:?}");
}

#[test]
fn bands_in_quarantine_do_not_move() {
    let (mut catalog, reports) = keyspace(3, 1);
    // Shards 0 and 1 keep what left them when there were two; shard 2 is new.
    catalog.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: Band::leaving(2, 3).into(),
        replicas: vec![ReplicaId(1), ReplicaId(2)],
        targets: Vec::new(),
        others: Vec::new(),
        sources: Vec::new(),
        until_us: u64::MAX,
        dropping: false,
    });
    // A third of their 120 MiB is in quarantine; of the other 80 MiB a quarter moves.
    let to = |to| moves(&resize(&catalog, &reports, to, None, &Paces::default()));
    assert_eq!(to(4), [20, 20, 30]);
    assert_eq!(to(2), [120]);
}

/// Returns the contents of a replica whose `rows` rows take 1,000 bytes each, divided by the hash,
/// all of it in files of the bands.
fn measured(shards: u32, rows: f64, crossing_bytes: u64) -> Stored {
    let size = |band: Band| {
        let rows = (rows * band.share(shards)).round() as u64;
        BandSize { band, rows, bytes: 1_000 * rows, file_bytes: 1_000 * rows + 900 }
    };
    let bands: Vec<BandSize> = Band::all().map(size).filter(|size| size.rows > 0).collect();
    Stored {
        checkpoint_bytes: bands.iter().map(|size| size.file_bytes).sum::<u64>() + crossing_bytes,
        checkpoint_files: bands.len() as u64,
        crossing_bytes,
        table_bytes: 900,
        unshipped_bytes: None,
        bands,
    }
}

fn near(found: u64, wanted: f64, part: f64) {
    assert!((found as f64 / wanted - 1.0).abs() < part, "{found} instead of {wanted}");
}

#[test]
fn measured_bands_count_as_they_are_with_the_tables_and_lists_around_them() {
    let (catalog, mut reports) = keyspace(4, 1);
    for report in reports.values_mut() {
        report.stored = Some(measured(4, 10_000.0, 0));
    }
    let grow = resize(&catalog, &reports, 5, None, &Paces::default());
    assert_eq!(grow.sources[0].moves, 2_000_000, "a fifth");
    assert_eq!(grow.sources[0].bytes, 120 * MIB, "the sum of the files says something else");
    // The target has a table for each of its bands; it reads a file and a manifest of each source.
    let tables = (5..=98).count() as f64;
    near(grow.bytes_moved, 8e6 + 900.0 * tables, 0.002);
    let manifest =
        1_100.0 + 310.0 * reports[&ReplicaId(1)].stored.as_ref().unwrap().bands.len() as f64;
    near(grow.bytes_from_bucket, 8e6 + 4.0 * (900.0 + manifest), 0.002);
    let shrink = resize(&catalog, &reports, 2, None, &Paces::default());
    near(shrink.bytes_moved, 20e6, 0.01);
    near(shrink.bytes_from_bucket, 20e6, 0.01);
}

#[test]
fn a_source_with_few_loose_files_gives_its_files_as_they_are() {
    let (catalog, reports) = keyspace(1, 1);
    let bytes = |crossing: u64, twice: bool| {
        let mut stored = measured(1, 10_000.0, crossing);
        if twice {
            // Older versions of all keys lie in other levels.
            stored.bands.iter_mut().for_each(|size| size.file_bytes *= 2);
        }
        let mut reports = reports.clone();
        reports.get_mut(&ReplicaId(1)).unwrap().stored = Some(stored);
        resize(&catalog, &reports, 2, None, &Paces::default()).bytes_from_bucket
    };
    near(bytes(0, false), 5e6, 0.01);
    near(bytes(0, true), 10e6, 0.01);
    near(bytes(400_000, true), 10.4e6, 0.01);
    // More than a tenth: the source rewrites the band first.
    near(bytes(2_000_000, true), 5e6, 0.01);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Rows divide among the targets as real keys do.
    #[test]
    fn each_target_takes_what_its_keys_take(from in 1u32..12, to in 1u32..12) {
        prop_assume!(from != to);
        let keys: Vec<u64> = (0..20_000u32).map(|n| partition_hash(&n.to_le_bytes())).collect();
        let (catalog, mut reports) = keyspace(from, 1);
        for shard in 0..from {
            let mut rows: BTreeMap<Band, u64> = BTreeMap::new();
            for key in keys.iter().filter(|key| jump(**key, from).shard.0 == shard) {
                *rows.entry(Band::of_next_jump(jump(*key, from).next)).or_default() += 1;
            }
            let bands = rows.into_iter().map(|(band, rows)| BandSize {
                band, rows, bytes: 100 * rows, file_bytes: 100 * rows,
            });
            let stored = Stored { bands: bands.collect(), ..Stored::default() };
            reports.get_mut(&ReplicaId(u64::from(shard) + 1)).unwrap().stored = Some(stored);
        }
        let nodes: Vec<Vec<NodeId>> = (from..to).map(|shard| vec![NodeId(100 + u64::from(shard))]).collect();
        let next = start_resize(&catalog, to, &nodes, 9, 9).unwrap();
        let forecast = resize(&catalog, &reports, to, next.plan.as_ref(), &Paces::default());
        for target in &next.plan.as_ref().unwrap().targets {
            let takes = |key: &&u64| {
                jump(**key, to).shard == target.shard && jump(**key, from).shard != target.shard
            };
            let moved = 100 * keys.iter().filter(takes).count() as u64;
            let needed = forecast.disk[&target.node];
            // Twice on its disk, and as a source of a shrink nothing more.
            let differs = needed.abs_diff(2 * moved) as f64;
            prop_assert!(differs < 0.1 * 2.0 * moved as f64 + 20_000.0, "{} for {}", needed, 2 * moved);
        }
        let moved = 100 * keys.iter().filter(|key| jump(**key, from).shard != jump(**key, to).shard).count();
        prop_assert!((forecast.bytes_moved as f64 / moved as f64 - 1.0).abs() < 0.001);
    }
}

/// Returns a state with nodes 1 to `nodes`, each with so much free disk, and the keyspace; and the
/// sessions of the nodes.
fn state(catalog: &Catalog, reports: &Reports, nodes: u64, free: u64) -> (ClusterState, Vec<u64>) {
    let mut state = ClusterState::default();
    let sessions: Vec<u64> = (1..=nodes)
        .map(|node| state.connect(&hello(node, &format!("a:{node}")), false, 10).unwrap().session)
        .collect();
    state.install(catalog.clone(), Delivery::Push);
    for (session, node) in sessions.iter().zip((1..).map(NodeId)) {
        let own = |report: &&ReplicaReport| catalog.node_of(report.replica) == Some(node);
        let own: Vec<ReplicaReport> = reports.values().filter(own).cloned().collect();
        state.report(node, *session, &free_disk(free), own, 20);
    }
    (state, sessions)
}

fn free_disk(free: u64) -> v1::Report {
    v1::Report { disk_used: 100 * GIB - free, disk_free: free, ..v1::Report::default() }
}

/// Returns the reports with the shards that the catalog places.
fn placed(catalog: &Catalog, reports: Reports) -> Reports {
    let shard_of = |replica: ReplicaId| {
        catalog.placement.iter().find(|shard| shard.replicas.iter().any(|of| of.replica == replica))
    };
    reports
        .into_iter()
        .map(|(id, report)| (id, ReplicaReport { shard: shard_of(id).unwrap().shard, ..report }))
        .collect()
}

#[test]
fn a_drain_copies_each_replica_of_the_node_and_chooses_nodes_with_what_is_taken_before() {
    let (catalog, reports) = keyspace(2, 1);
    // Both shards are on node 1, which is drained; nodes 2 and 3 could take them.
    let nodes = [vec![NodeId(1)], vec![NodeId(1)]];
    let catalog = Catalog::first(KeyspaceId(1), "ks1", catalog.spec, &nodes, 1_000, 1);
    let reports = placed(&catalog, reports);
    let leaving = NodeDrain::new(NodeId(1), false, 5_000);
    let (roomy, _) = state(&catalog, &reports, 3, 50 * GIB);
    assert_eq!(from_the_bucket(&roomy, &leaving), []);
    let forecast =
        |state: &ClusterState| drain(state, &leaving, &Weighed::new(), 9_000, &Paces::default());
    let DrainForecast { parts, refused } = forecast(&roomy);
    let part = &parts[&KeyspaceId(1)];
    assert_eq!(refused, None);
    assert_eq!(
        (moves(part), part.bytes_moved, part.bytes_from_bucket),
        (vec![120, 120], 240 * MIB, 240 * MIB)
    );
    assert_eq!(disk(part), [(2, 120), (3, 120)], "{part:?}");
    // One after the other: a copy, at 200 MiB/s, and a replica that leaves.
    assert!((part.seconds - 2.0 * (1.0 + 1.0 + 0.6)).abs() < 0.01, "{part:?}");
    // At 24 MiB/s, 240 MiB take 10 s instead of 1.2.
    let bounded = Paces::default().at_most(Some(24 * MIB));
    let slow = drain(&roomy, &leaving, &Weighed::new(), 9_000, &bounded);
    let slow = &slow.parts[&KeyspaceId(1)];
    assert!((slow.seconds - (2.0 * (1.0 + 1.0) + 10.0)).abs() < 0.01, "{slow:?}");
    // There is room for one of them on each node; a single node has not enough for both.
    let tight = GIB + 200 * MIB;
    assert_eq!(forecast(&state(&catalog, &reports, 3, tight).0).refused, None);
    let short = forecast(&state(&catalog, &reports, 2, tight).0).refused.unwrap();
    assert!(short.message.contains("room for shard 1 of ks1"), "{short}");
}

#[test]
fn the_keyspaces_of_a_drain_share_its_rate() {
    let mut state = ClusterState::default();
    let session = state.connect(&hello(1, "a:1"), false, 10).unwrap().session;
    state.connect(&hello(2, "a:2"), false, 10).unwrap();
    for (id, mib) in [(1, 100), (2, 300)] {
        let spec = KeyspaceSpec::default();
        let nodes = [vec![NodeId(1)]];
        let first = Catalog::first(KeyspaceId(id), &format!("ks{id}"), spec, &nodes, 1_000, 1);
        state.install(first, Delivery::Push);
        let report = ReplicaReport {
            keyspace: KeyspaceId(id),
            bytes: mib * MIB,
            manifest_lsn: Lsn(100),
            ..replica_report(1, 1)
        };
        state.report(NodeId(1), session, &free_disk(50 * GIB), vec![report], 20);
    }
    let leaving = NodeDrain::new(NodeId(1), false, 5_000);
    let seconds = |max_rate: Option<u64>| {
        let paces = Paces::default().at_most(max_rate);
        let parts = drain(&state, &leaving, &Weighed::new(), 9_000, &paces).parts;
        [1, 2].map(|id| parts[&KeyspaceId(id)].seconds)
    };
    let near = |found: [f64; 2], wanted: [f64; 2]| {
        let off = |at: usize| (found[at] - wanted[at]).abs();
        assert!(off(0) < 0.01 && off(1) < 0.01, "{found:?} instead of {wanted:?}");
    };
    // By themselves 0.5 and 1.5 s of reading, at one node, beside 2 s of other things.
    near(seconds(None), [2.0 + 1.0, 2.0 + 2.0]);
    // At 20 MiB/s both have read 100 MiB after 10 s, and all of 400 is read after 20.
    near(seconds(Some(20 * MIB)), [12.0, 22.0]);
    near(seconds(Some(10_000 * MIB)), [3.0, 4.0]);
}

#[test]
fn a_node_that_is_lost_is_replaced_from_what_the_bucket_weighs() {
    let (catalog, reports) = keyspace(1, 1);
    let (mut state, sessions) = state(&catalog, &reports, 2, 50 * GIB);
    state.disconnect(NodeId(1), sessions[0], 40);
    let leaving = NodeDrain::new(NodeId(1), true, 5_000);
    let lost = from_the_bucket(&state, &leaving);
    assert_eq!(lost.len(), 1);
    let weight = Weight { files: 9, file_bytes: 30 * MIB, chunks: 4, chunk_bytes: 2 * MIB };
    let weighed: Weighed = [((KeyspaceId(1), ShardId(0)), weight)].into();
    let DrainForecast { parts, .. } = drain(&state, &leaving, &weighed, 9_000, &Paces::default());
    let part = &parts[&KeyspaceId(1)];
    assert_eq!((part.bytes_moved, part.bytes_from_bucket, part.gets), (30 * MIB, 32 * MIB, 13));
    assert_eq!((part.sources[0].node, part.sources[0].moves), (None, 32 * MIB));
}

#[test]
fn a_restore_reads_what_its_nodes_ship_first_or_what_the_bucket_holds() {
    let (catalog, mut reports) = keyspace(2, 1);
    let stored = Stored { checkpoint_bytes: 60 * MIB, checkpoint_files: 10, ..Stored::default() };
    reports.get_mut(&ReplicaId(1)).unwrap().stored = Some(stored);
    let reports = placed(&catalog, reports);
    let (state, _) = state(&catalog, &reports, 3, 50 * GIB);
    let nodes = [vec![NodeId(3)], vec![NodeId(2)]];
    let restored = |as_it_is| Restored { tip: &catalog, then: &catalog, nodes: &nodes, as_it_is };
    assert_eq!(restored(false).known_by_the_bucket(&state), []);
    let now = restore(&state, &restored(false), &Weighed::new(), &Paces::default());
    let list = 2_000 + 10 * 150;
    assert_eq!(now.bytes_moved, 60 * MIB + list + 120 * MIB);
    assert_eq!((now.bytes_from_bucket, now.sources.len()), (now.bytes_moved, 2));
    assert_eq!(now.disk[&NodeId(3)], 60 * MIB + list);
    // Two nodes read at 6 MiB/s each; the larger shard has 120 MiB. What a node ships first is not
    // held back.
    let paces = Paces::default().at_most(Some(12 * MIB));
    let slow = restore(&state, &restored(false), &Weighed::new(), &paces);
    assert!((slow.seconds - now.seconds - (20.0 - 0.6)).abs() < 0.01, "{slow:?} {now:?}");

    assert_eq!(restored(true).known_by_the_bucket(&state), [ShardId(0), ShardId(1)]);
    let weight = Weight { files: 3, file_bytes: 10 * MIB, chunks: 5, chunk_bytes: MIB };
    let weighed: Weighed = [((KeyspaceId(1), ShardId(1)), weight)].into();
    let then = restore(&state, &restored(true), &weighed, &Paces::default());
    assert_eq!((then.bytes_moved, then.bytes_from_bucket), (10 * MIB, 11 * MIB));
}

#[test]
fn two_changes_are_not_promised_the_same_disk() {
    let (catalog, reports) = keyspace(2, 1);
    let placed = placed(&catalog, reports.clone());
    let (mut state, sessions) = state(&catalog, &placed, 2, GIB + 200 * MIB);
    let shrink = |state: &ClusterState| {
        let forecast = resize(&catalog, &reports, 1, None, &Paces::default());
        forecast.check_room(state).map(|()| forecast.estimate())
    };
    // Twice 120 MiB on node 1: more than its 200.
    assert!(shrink(&state).unwrap_err().to_string().contains("needs about 240 MiB"));
    state.report(NodeId(1), sessions[0], &free_disk(GIB + 300 * MIB), Vec::new(), 40);
    let estimate = shrink(&state).unwrap();
    state.loads.hold_with_disk([], false, &estimate.disk);
    let refused = shrink(&state).unwrap_err().to_string();
    assert!(refused.contains("can give 60 MiB of the 1324 MiB that are free"), "{refused}");
}
