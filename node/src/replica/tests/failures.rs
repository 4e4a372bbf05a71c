//! The guarantee of an acknowledgement, and disk errors.

use std::sync::mpsc::channel;

use vasto_core::ErrorCode;
use vasto_core::catalog::Ack;

use super::support::*;
use crate::replica::command::{OpKind, WriteOp};
use crate::replica::{Replica, log_dir};

#[test]
fn an_fsync_write_is_answered_only_after_its_record_is_synced() {
    let rig = Rig::new();
    let replica = rig.create();
    for i in 0..20 {
        let (done, answer) = channel();
        let log = replica.log().clone();
        let seen = move |result: Result<_, _>| {
            // The writer itself calls this: nothing can be synced between its decision and this
            // check.
            done.send((result.is_ok(), log.synced_lsn(), log.appended_lsn())).unwrap();
        };
        replica.write(vec![put(&format!("k{i}"), "v")], Ack::Fsync, 0, Box::new(seen));
        let (ok, synced, appended) = answer.recv_timeout(DEADLINE).unwrap();
        assert!(ok && synced == appended, "answered with {synced} of {appended} synced");
    }
}

#[test]
fn an_fsync_answer_that_writes_nothing_still_waits_for_what_it_saw() {
    let rig = Rig::new();
    let replica = rig.create();
    let time = START_US + 1_000;
    // The write is in the log, but not synced yet; the same write again, now with `fsync`, changes
    // nothing.
    send(&replica, vec![at(time, put("k", "v"))], Ack::Os).recv_timeout(DEADLINE).unwrap().unwrap();
    let log = replica.log().clone();
    let (done, answer) = channel();
    let seen = move |_: Result<_, _>| done.send((log.synced_lsn(), log.appended_lsn())).unwrap();
    replica.write(vec![at(time, put("k", "v"))], Ack::Fsync, 0, Box::new(seen));
    let (synced, appended) = answer.recv_timeout(DEADLINE).unwrap();
    assert_eq!(synced, appended);
}

#[test]
fn os_and_fsync_acknowledgements_survive_a_crash_of_the_process() {
    let rig = Rig::new();
    let replica = rig.create();
    for i in 0..100 {
        let ack = if i % 2 == 0 { Ack::Os } else { Ack::Fsync };
        send(&replica, vec![put(&format!("k{i}"), &i.to_string())], ack)
            .recv_timeout(DEADLINE)
            .unwrap()
            .unwrap();
    }
    let (_dir, again) = rig.crash(&replica);
    for i in 0..100 {
        assert_eq!(get(&again, &format!("k{i}")), Some(i.to_string()));
    }
}

#[test]
fn unsynced_os_writes_are_synced_in_the_background_and_not_streamed_before() {
    let rig = Rig::new();
    let replica = rig.create();
    send(&replica, vec![put("k", "v")], Ack::Os).recv_timeout(DEADLINE).unwrap().unwrap();
    assert!(replica.settled_lsn() <= replica.log().synced_lsn());
    wait_for("the background sync", || replica.log().synced_lsn() == replica.log().appended_lsn());
}

fn fill(replica: &Replica, from: usize, count: usize) -> Vec<Result<String, ErrorCode>> {
    let big = |key: &str| WriteOp {
        change: OpKind::Put { value: vec![7u8; 4 << 20].into(), ttl_ms: None, condition: None },
        ..put(key, "")
    };
    (from..from + count)
        .map(|i| {
            let key = format!("big{i}");
            try_write(replica, vec![big(&key)]).map(|_| key).map_err(|error| error.code)
        })
        .collect()
}

#[test]
fn a_log_that_fails_closes_the_replica_and_the_outcome_is_unknown() {
    let rig = Rig::new();
    let replica = rig.create();
    write_one(&replica, put("before", "kept"));
    // The next file of the log cannot be created: its directory is gone.
    let (dir, away) = (log_dir(&rig.path), rig.path.join("away"));
    std::fs::rename(&dir, &away).unwrap();
    let answers = fill(&replica, 0, 18);
    let failed =
        answers.iter().position(Result::is_err).expect("a file of the log is full at 64 MiB");
    assert_eq!(answers[failed], Err(ErrorCode::Unknown), "in flight when it failed");
    assert!(
        answers[failed + 1..].iter().all(|answer| *answer == Err(ErrorCode::Unavailable)),
        "{answers:?}"
    );
    assert!(replica.closed().is_some());
    assert_eq!(
        try_write(&replica, vec![put("after", "x")]).unwrap_err().code,
        ErrorCode::Unavailable
    );
    assert!(apply(&replica, vec![value_entry("peer", START_US, "x")], Vec::new()).is_err());
    assert_eq!(get(&replica, "before").as_deref(), Some("kept"), "reads go on");
    // The reopened replica has all that was acknowledged and takes writes.
    std::fs::rename(&away, &dir).unwrap();
    let (_dir, again) = rig.crash(&replica);
    for key in answers.iter().flatten() {
        assert!(
            again
                .engine()
                .get(&vasto_core::stored_key::data_key(band(&again, key), key.as_bytes()))
                .unwrap()
                .is_some()
        );
    }
    write_one(&again, put("after", "x"));
    assert_log_is_whole(&records(&again));
}
