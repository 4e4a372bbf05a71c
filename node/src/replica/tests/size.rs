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
