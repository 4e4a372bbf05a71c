//! Scans: key order over all bands, pages, and rows that must stay hidden.

use bytes::Bytes;
use vasto_core::hash::partition_hash;
use vasto_core::ids::{CatalogVersion, Epoch};
use vasto_core::limits::{SCAN_PAGE_BYTES_MAX, SCAN_PAGE_EXAMINED_MAX, SCAN_PAGE_ROWS_MAX};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::{Band, ErrorCode};

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{Control, OpKind, Role, WriteOp};
use crate::replica::read::ScanPage;

fn load(replica: &Replica, prefix: &str, count: usize) -> Vec<String> {
    let mut keys: Vec<String> = (0..count).map(|i| format!("{prefix}{i:05}")).collect();
    for chunk in keys.chunks(500) {
        write(replica, chunk.iter().map(|key| put(key, key)).collect());
    }
    keys.sort();
    keys
}

#[test]
fn pages_over_many_bands_come_in_key_order_and_complete() {
    let rig = Rig::new();
    let replica = rig.create();
    let mut keys = load(&replica, "a", 700);
    replica.engine().flush().unwrap();
    keys.extend(load(&replica, "b", 700));
    let bands: std::collections::BTreeSet<_> = keys.iter().map(|key| band(&replica, key)).collect();
    assert!(bands.len() > 20, "{bands:?}");
    for limit in [0, 1, 7, 100, 1400] {
        assert_eq!(
            scan_keys(&replica, ScanPage { limit, ..ScanPage::default() }),
            keys,
            "limit {limit}"
        );
    }
    let page = ScanPage { prefix: Bytes::from_static(b"b000"), limit: 13, ..ScanPage::default() };
    let with_prefix: Vec<_> = keys.iter().filter(|key| key.starts_with("b000")).cloned().collect();
    assert_eq!(scan_keys(&replica, page.clone()), with_prefix);
    // A cursor before, inside and behind the prefix.
    for (after, expected) in
        [("a", with_prefix.clone()), ("b00049", with_prefix[50..].to_vec()), ("c", vec![])]
    {
        let page =
            ScanPage { after: Some(Bytes::copy_from_slice(after.as_bytes())), ..page.clone() };
        assert_eq!(scan_keys(&replica, page), expected, "after {after}");
    }
}

#[test]
fn a_page_says_whether_more_follows_and_holds_at_most_its_limits() {
    let rig = Rig::new();
    let replica = rig.create();
    load(&replica, "k", 10);
    let page = |limit| replica.scan(Epoch(0), &ScanPage { limit, ..ScanPage::default() }).unwrap();
    assert_eq!((page(9).rows.len(), page(9).more), (9, true));
    assert_eq!((page(10).rows.len(), page(10).more), (10, false), "no empty page behind the last");
    let keys_only =
        replica.scan(Epoch(0), &ScanPage { keys_only: true, ..ScanPage::default() }).unwrap();
    assert!(
        keys_only
            .rows
            .iter()
            .all(|row| row.value.as_ref().is_some_and(|value| value.payload.is_none()))
    );
    load(&replica, "many", SCAN_PAGE_ROWS_MAX + 5);
    let largest = page(0);
    assert!(largest.more && largest.rows.len() <= SCAN_PAGE_ROWS_MAX);
    assert!(
        largest.rows.len() == SCAN_PAGE_ROWS_MAX || largest.resume_after.is_some(),
        "full, or out of time"
    );
}

/// Deletes, expired values and other partitions may outnumber the visible rows of a scan by any
/// factor.
#[test]
fn a_page_ends_also_when_it_shows_nothing() {
    let rig = Rig::new();
    let replica = rig.create();
    let count = SCAN_PAGE_EXAMINED_MAX * 5 / 2;
    let keys: Vec<String> = (0..count).map(|i| format!("k{i:06}")).collect();
    for chunk in keys.chunks(2_000) {
        write(&replica, chunk.iter().map(|key| delete(key)).collect());
    }
    let alive: Vec<String> = [0, 1, count / 2, count - 1].map(|i| keys[i].clone()).to_vec();
    let hash = partition_hash(b"rare");
    for key in &alive {
        write_one(&replica, put(key, "v"));
    }
    let rare = "k0999 of a partition".to_owned();
    write_one(&replica, WriteOp { partition_hash: Some(hash), ..put(&rare, "v") });
    let pages = |page: ScanPage| {
        let mut after: Option<Bytes> = None;
        let (mut pages, mut seen) = (0, Vec::new());
        loop {
            let reply =
                replica.scan(Epoch(0), &ScanPage { after: after.clone(), ..page.clone() }).unwrap();
            pages += 1;
            seen.extend(reply.rows.iter().map(|row| String::from_utf8(row.key.to_vec()).unwrap()));
            if !reply.more {
                return (pages, seen);
            }
            let next = reply.resume_after.or_else(|| reply.rows.last().map(|row| row.key.clone()));
            assert!(next > after, "the scan gets on");
            after = next;
        }
    };
    let (read, seen) = pages(ScanPage::default());
    let mut all = alive.clone();
    all.push(rare.clone());
    all.sort();
    assert_eq!(seen, all);
    assert!(read >= 3, "{read} pages");
    assert_eq!(pages(ScanPage { limit: 1, ..ScanPage::default() }).1, all);
    let (_, seen) = pages(ScanPage { partition_hash: Some(hash), ..ScanPage::default() });
    assert_eq!(seen, [rare]);
    // Rows behind the prefix are not read.
    assert_eq!(
        pages(ScanPage { prefix: Bytes::from_static(b"k00000"), ..ScanPage::default() }),
        (1, alive[..2].to_vec())
    );
}

#[test]
fn the_bytes_of_a_page_are_bounded_and_a_larger_row_still_comes() {
    let rig = Rig::new();
    let replica = rig.create();
    let big = |key: &str, bytes: usize| WriteOp {
        change: OpKind::Put { value: vec![1; bytes].into(), ttl_ms: None, condition: None },
        ..put(key, "")
    };
    for i in 0..8 {
        write_one(&replica, big(&format!("k{i}"), SCAN_PAGE_BYTES_MAX / 3));
    }
    write_one(&replica, big("k9", SCAN_PAGE_BYTES_MAX * 3));
    let mut after = None;
    let mut seen = 0;
    loop {
        let reply = replica.scan(Epoch(0), &ScanPage { after, ..ScanPage::default() }).unwrap();
        let bytes: usize = reply.rows.iter().map(prost::Message::encoded_len).sum();
        assert!(
            bytes <= SCAN_PAGE_BYTES_MAX || reply.rows.len() == 1,
            "{bytes} bytes in {} rows",
            reply.rows.len()
        );
        seen += reply.rows.len();
        if !reply.more {
            break;
        }
        after = reply.resume_after.or_else(|| reply.rows.last().map(|row| row.key.clone()));
    }
    assert_eq!(seen, 9);
}

#[test]
fn tombstones_and_expired_values_are_skipped() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = load(&replica, "k", 90);
    for (i, key) in keys.iter().enumerate() {
        match i % 3 {
            0 => drop(write_one(&replica, delete(key))),
            1 => drop(write_one(
                &replica,
                WriteOp {
                    change: OpKind::Put { value: "x".into(), ttl_ms: Some(5), condition: None },
                    ..put(key, "")
                },
            )),
            _ => {}
        }
    }
    rig.clock.set(START_US + 5_000);
    let alive: Vec<_> = keys.iter().skip(2).step_by(3).cloned().collect();
    for limit in [0, 1, 30, 31] {
        assert_eq!(scan_keys(&replica, ScanPage { limit, ..ScanPage::default() }), alive);
    }
}

#[test]
fn a_partition_scan_shows_that_partition_only() {
    let rig = Rig::new();
    let replica = rig.create();
    let hash = partition_hash(b"user:1");
    let here = Band::in_shard(hash, replica.shard).unwrap();
    for i in 0..20 {
        write_one(
            &replica,
            WriteOp { partition_hash: Some(hash), ..put(&format!("user:1:{i:02}"), "x") },
        );
    }
    // Neighbours in the same band, and between them in key order.
    for key in keys_in(here, "user:1:0", 20) {
        write_one(&replica, put(&key, "another partition"));
    }
    let page = ScanPage { partition_hash: Some(hash), limit: 3, ..ScanPage::default() };
    let expected: Vec<_> = (0..20).map(|i| format!("user:1:{i:02}")).collect();
    assert_eq!(scan_keys(&replica, page.clone()), expected);
    let prefixed = ScanPage { prefix: Bytes::from_static(b"user:1:1"), ..page };
    assert_eq!(scan_keys(&replica, prefixed), expected[10..].to_vec());
}

#[test]
fn only_owned_bands_are_read_and_only_at_the_epoch_in_force() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = load(&replica, "k", 300);
    let moved: BandRange = (Band(1)..=Band(3)).into();
    set_range(&replica, moved, RangeState::Leaving);
    let staying: Vec<_> =
        keys.iter().filter(|key| !moved.contains(band(&replica, key))).cloned().collect();
    assert!(staying.len() < keys.len());
    assert_eq!(scan_keys(&replica, ScanPage::default()), staying);
    let gone = keys.iter().find(|key| moved.contains(band(&replica, key))).unwrap();
    let page =
        ScanPage { partition_hash: Some(partition_hash(gone.as_bytes())), ..ScanPage::default() };
    assert_eq!(replica.scan(Epoch(0), &page).unwrap_err().code, ErrorCode::WrongEpoch);
    control(
        &replica,
        Control::ApplyCatalog { epoch: Epoch(4), version: CatalogVersion(9), role: Role::Primary },
    )
    .unwrap();
    assert_eq!(
        replica.scan(Epoch(3), &ScanPage::default()).unwrap_err().code,
        ErrorCode::WrongEpoch
    );
    assert_eq!(
        replica.scan(Epoch(5), &ScanPage::default()).unwrap_err().code,
        ErrorCode::NodeBehind
    );
    assert_eq!(replica.scan(Epoch(4), &ScanPage::default()).unwrap().rows.len(), staying.len());
}

/// Each partition's row is an entry of its own, wherever a page ends.
#[test]
fn one_key_under_several_partitions_is_a_row_for_each() {
    let rig = Rig::new();
    let replica = rig.create();
    load(&replica, "k", 20);
    // In one band the rows would be one entry.
    let own = Band::in_shard(partition_hash(b"k00007"), replica.shard).unwrap();
    let mut bands = std::collections::BTreeSet::from([own]);
    let mut hashes: Vec<u64> = (0..)
        .map(|i: u32| partition_hash(format!("p{i}").as_bytes()))
        .filter(|hash| bands.insert(Band::in_shard(*hash, replica.shard).unwrap()))
        .take(6)
        .collect();
    for hash in &hashes {
        write_one(
            &replica,
            WriteOp { partition_hash: Some(*hash), ..put("k00007", &format!("{hash:x}")) },
        );
    }
    hashes.push(partition_hash(b"k00007"));
    hashes.sort_unstable();
    for limit in [1, 2, 3, 100] {
        let mut page = ScanPage { limit, ..ScanPage::default() };
        let mut rows = Vec::new();
        loop {
            let reply = replica.scan(Epoch(0), &page).unwrap();
            let more = reply.more;
            let last = reply.rows.last().map(|row| (row.key.clone(), row.partition_hash));
            rows.extend(reply.rows);
            if !more {
                break;
            }
            let (key, hash) = last.unwrap();
            page.after_partition_hash = Some(hash.unwrap_or_else(|| partition_hash(&key)));
            page.after = Some(key);
        }
        assert_eq!(rows.len(), 26, "limit {limit}");
        let of_key = rows.iter().filter(|row| row.key == "k00007");
        let seen: Vec<u64> = of_key
            .map(|row| row.partition_hash.unwrap_or_else(|| partition_hash(b"k00007")))
            .collect();
        assert_eq!(seen, hashes, "limit {limit}");
    }
}

/// Opening a cursor costs more than a seek: a short scan opens cursors only for the bands that it
/// shows.
#[test]
fn a_short_scan_opens_few_cursors() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = load(&replica, "k", 2_000);
    replica.engine().flush().unwrap();
    let opened = |limit| {
        let before = crate::engine::cursors_opened();
        let reply = replica.scan(Epoch(0), &ScanPage { limit, ..ScanPage::default() }).unwrap();
        assert_eq!(reply.rows.len(), limit);
        crate::engine::cursors_opened() - before
    };
    let bands: std::collections::BTreeSet<_> = keys.iter().map(|key| band(&replica, key)).collect();
    assert!(bands.len() > 40, "{}", bands.len());
    assert!(opened(5) <= 7, "one for all, and one for each row and the next");
}
