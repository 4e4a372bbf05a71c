//! The number of keys that a replica reports.

use vasto_core::Band;
use vasto_core::record::{BandRange, RangeState};

use super::support::*;
use crate::replica::Replica;

fn load(replica: &Replica, from: usize, to: usize) {
    let keys: Vec<String> = (from..to).map(|i| format!("k{i:06}")).collect();
    for chunk in keys.chunks(1_000) {
        write(replica, chunk.iter().map(|key| put(key, "0123456789")).collect());
    }
}

#[test]
fn a_small_replica_counts_its_keys_whatever_was_overwritten_and_deleted() {
    let rig = Rig::new();
    let replica = rig.create();
    for _ in 0..4 {
        load(&replica, 0, 1_000);
    }
    assert!(replica.size().0 >= 3_000, "RocksDB counts versions: {}", replica.size().0);
    replica.count_keys().unwrap();
    assert_eq!(replica.size().0, 1_000);
    write(&replica, (0..100).map(|i| delete(&format!("k{i:06}"))).collect());
    replica.count_keys().unwrap();
    assert_eq!(replica.size().0, 900);
    replica.engine().flush().unwrap();
    assert_eq!(replica.size().0, 900, "a flush is no change");
    load(&replica, 1_000, 1_200);
    let since = replica.size().0;
    assert!((900..=1_100).contains(&since), "what was stored since is added: {since}");
    // Keys that moved to another shard are not counted here.
    set_range(&replica, BandRange::from(Band(1)..=Band(1)), RangeState::Leaving);
    replica.count_keys().unwrap();
    assert!(replica.size().0 < 700, "{}", replica.size().0);
}

#[test]
fn a_large_replica_is_estimated_from_a_sample() {
    let rig = Rig::new();
    let replica = rig.create();
    load(&replica, 0, 30_000);
    replica.engine().flush().unwrap();
    for _ in 0..2 {
        load(&replica, 0, 30_000);
    }
    for first in (0..15_000).step_by(1_000) {
        write(
            &replica,
            (first..first + 1_000).map(|i| delete(&format!("k{:06}", 2 * i))).collect(),
        );
    }
    let before = replica.size().0;
    replica.count_keys().unwrap();
    let (keys, truth) = (replica.size().0 as f64, 15_000.0);
    assert!((keys / truth - 1.0).abs() < 0.25, "{keys} for {truth}, {before} before");
    assert!(before > 4 * 15_000, "{before}");
}

/// A node holds hundreds of replicas, most of them small.
#[test]
fn an_empty_replica_takes_little_disk() {
    fn allocated(dir: &std::path::Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        entries
            .map(|path| {
                if path.is_dir() {
                    allocated(&path)
                } else {
                    path.metadata().unwrap().blocks() * 512
                }
            })
            .sum()
    }
    let rig = Rig::new();
    let replica = rig.create();
    write_one(&replica, put("k", "v"));
    let bytes = allocated(&rig.path);
    assert!(bytes < 400 << 10, "{bytes} bytes");
}

/// Returns a value that compresses like text.
fn letters(n: usize) -> String {
    let mut state = n as u64 + 1;
    let letter = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b'0' + ((state >> 33) & 63) as u8)
    };
    (0..400).map(letter).collect()
}

fn load_letters(replica: &Replica, keys: std::ops::Range<usize>) {
    let keys: Vec<usize> = keys.collect();
    for chunk in keys.chunks(500) {
        write(replica, chunk.iter().map(|i| put(&format!("k{i:06}"), &letters(*i))).collect());
    }
}

/// Returns the rows that the replica would give, and their bands.
fn rows_by_band(replica: &Replica) -> (f64, usize) {
    replica.try_tables().unwrap();
    let stored = replica.stored_by_band(None).unwrap();
    (stored.bands.iter().map(|size| size.rows).sum::<u64>() as f64, stored.bands.len())
}

/// RocksDB has looked into twenty of the files that a compaction leaves, and says nothing of the rest.
#[test]
fn every_band_of_a_compacted_replica_counts() {
    let rig = Rig::new();
    let replica = rig.create();
    load_letters(&replica, 0..5_000);
    replica.engine().flush().unwrap();
    replica.engine().compact_all();
    let (rows, bands) = rows_by_band(&replica);
    assert!(bands > 60, "{bands} bands");
    assert!((rows / 5_000.0 - 1.0).abs() < 0.02, "{rows} rows");
    let bytes =
        replica.stored_by_band(None).unwrap().bands.iter().map(|size| size.bytes).sum::<u64>();
    let found = replica.size().1;
    assert!(bytes < found && bytes > found / 2, "{bytes} of {found}");
}

/// Keys that are neighbours were written at the same time.
#[test]
fn older_versions_are_found_where_they_are() {
    let rig = Rig::new();
    let replica = rig.create();
    load_letters(&replica, 0..6_000);
    replica.engine().flush().unwrap();
    load_letters(&replica, 3_000..6_000);
    let (rows, _) = rows_by_band(&replica);
    assert!((rows / 6_000.0 - 1.0).abs() < 0.02, "{rows} rows");
}

/// Each of many places gives a row, however long it is.
#[test]
fn a_trial_takes_a_bounded_number_of_bytes() {
    let rig = Rig::new();
    let replica = rig.create();
    let value = "v".repeat(100 << 10);
    for first in (0..400).step_by(10) {
        let rows = (first..first + 10).map(|i| put(&format!("k{i:06}"), &value));
        write(&replica, rows.collect());
    }
    let rows = |bytes| replica.engine().sample(4_000, bytes, false, |_, _| true).unwrap().rows;
    assert_eq!(rows(64 << 10).len(), 3, "256 KiB and the rest of a row");
    assert!(rows(8 << 20).len() > 10, "there are more places");
}
