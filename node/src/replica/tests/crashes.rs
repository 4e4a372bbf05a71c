//! Crashes at particular points in time: around flushes, in the first records of a replica,
//! repeatedly.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use vasto_core::ids::{Lsn, ReplicaId};
use vasto_core::record::{Body, FeedProgress, RangeState};

use super::support::*;
use crate::replica::{OpenError, create_dirs, database_dir, log_dir};

#[test]
fn every_record_is_replayed_whatever_was_flushed() {
    // The database holds the log up to a different record in each round; nothing around it is lost.
    for flush_after in 0..6 {
        let rig = Rig::new();
        let replica = rig.create();
        for i in 0..6 {
            if i == flush_after {
                replica.engine().flush().unwrap();
                assert_eq!(replica.persisted_lsn().unwrap(), replica.applied_lsn());
            }
            write_one(&replica, put(&format!("k{i}"), "v"));
        }
        assert!(
            replica.persisted_lsn().unwrap() < replica.applied_lsn(),
            "the memtable does not count"
        );
        let (_dir, again) = rig.crash(&replica);
        for i in 0..6 {
            assert_eq!(
                get(&again, &format!("k{i}")).as_deref(),
                Some("v"),
                "k{i}, flushed before k{flush_after}"
            );
        }
        assert_eq!(data_rows(&again), data_rows(&replica));
        assert_log_is_whole(&records(&again));
    }
}

#[test]
fn a_flush_never_runs_ahead_of_the_synced_log() {
    let rig = Rig::new();
    let replica = rig.create();
    for i in 0..50 {
        let answer = send(&replica, vec![put(&format!("k{i}"), "v")], vasto_core::catalog::Ack::Os);
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
        if i % 7 == 0 {
            replica.engine().flush().unwrap();
            assert!(replica.log().synced_lsn() >= replica.persisted_lsn().unwrap());
        }
    }
}

#[test]
fn fifty_crashes_in_a_row_lose_nothing() {
    let rig = Rig::new();
    let mut replica = rig.create();
    let mut rig = rig;
    for round in 0..50u64 {
        write_one(&replica, put(&format!("k{round}"), &round.to_string()));
        if round % 9 == 0 {
            replica.engine().flush().unwrap();
        }
        let (dir, again) = rig.crash(&replica);
        (replica, rig.path) = (again, dir);
    }
    for round in 0..50u64 {
        assert_eq!(get(&replica, &format!("k{round}")), Some(round.to_string()));
    }
    let log = records(&replica);
    assert_log_is_whole(&log);
    assert_eq!(log.iter().filter(|record| matches!(record.body, Body::Adopt { .. })).count(), 51);
}

#[test]
fn cursors_are_as_durable_as_what_they_brought() {
    let rig = Rig::new();
    let replica = rig.create();
    let source = ReplicaId(44);
    let lsn = apply(
        &replica,
        vec![value_entry("k", START_US, "v")],
        vec![FeedProgress::Tail(source, Lsn(10))],
    )
    .unwrap();
    assert!(replica.log().synced_lsn() >= lsn, "answered once it is durable");
    // The record has no entries, but the position advances.
    apply(&replica, Vec::new(), vec![FeedProgress::Tail(source, Lsn(25))]).unwrap();
    let (_dir, again) = rig.crash(&replica);
    assert_eq!(again.tail_cursors().unwrap(), vec![(source, Lsn(25))]);
    assert_eq!(get(&again, "k").as_deref(), Some("v"));
}

#[test]
fn entries_of_a_band_that_is_not_held_are_refused_whole() {
    let rig = Rig::new();
    let replica = rig.create();
    let lost = band(&replica, "k");
    set_range(&replica, (lost..=lost).into(), RangeState::Leaving);
    let other =
        keys_in(if lost.0 == 1 { vasto_core::Band(2) } else { vasto_core::Band(1) }, "x", 1)
            .remove(0);
    let entries = vec![value_entry(&other, START_US, "v"), value_entry("k", START_US, "v")];
    let progress = vec![FeedProgress::Tail(ReplicaId(3), Lsn(5))];
    assert!(apply(&replica, entries, progress).is_err());
    assert!(data_rows(&replica).is_empty() && replica.tail_cursors().unwrap().is_empty());
}

#[test]
fn a_directory_of_another_replica_is_refused() {
    let rig = Rig::new();
    let replica = rig.create();
    let (dir, again) = rig.crash(&replica);
    rig.close(again);
    let mut stranger = Rig::new();
    stranger.replica = ReplicaId(2);
    let mut refused = None;
    wait_for("the lock of the database", || {
        refused = stranger.open(&dir, false).err();
        !matches!(refused, Some(OpenError::Engine(_)))
    });
    assert!(matches!(refused, Some(OpenError::Foreign { .. } | OpenError::Log(_))), "{refused:?}");
}

#[test]
fn the_names_of_a_replicas_directories_are_durable_before_it_opens() {
    let top = memory_dir();
    let dir = top.path().join("7-1");
    let (db, log) = (database_dir(&dir), log_dir(&dir));
    // The second round finds directories that exist but may never have been synced.
    for _ in 0..2 {
        let synced = RefCell::new(BTreeMap::new());
        let sync = |path: &Path| {
            let names: BTreeSet<_> =
                std::fs::read_dir(path)?.map(|entry| entry.unwrap().file_name()).collect();
            synced.borrow_mut().insert(path.to_owned(), names);
            Ok(())
        };
        create_dirs(&dir, [&db, &log], sync).unwrap();
        let names =
            |names: &[&str]| names.iter().map(Into::into).collect::<BTreeSet<std::ffi::OsString>>();
        let want = [(top.path().to_owned(), names(&["7-1"])), (dir.clone(), names(&["db", "log"]))];
        assert_eq!(synced.into_inner(), BTreeMap::from(want));
    }
    let failing = |_: &Path| Err(std::io::Error::other("no"));
    assert!(matches!(create_dirs(&dir, [&db, &log], failing), Err(OpenError::Io { .. })));
}
