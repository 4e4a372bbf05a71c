//! Write groups, event times and expiry on the write path.

use std::time::Duration;

use vasto_core::catalog::Ack;
use vasto_core::entry::Entry;
use vasto_core::hash::partition_hash;
use vasto_core::ids::{CatalogVersion, PlanId};
use vasto_core::limits::{BATCH_BYTES_MAX, GROUP_BYTES_MAX, RECORD_BYTES_MAX};
use vasto_core::record::{BandRange, Body};
use vasto_core::stored_key::data_key;
use vasto_core::{Band, ErrorCode};

use super::support::*;
use crate::clock::since_boot;
use crate::replica::Replica;
use crate::replica::command::{Control, OpKind, OpOutcome, ReplicaError, WriteContext, WriteOp};

fn stored(replica: &crate::replica::Replica, key: &str) -> Vec<u8> {
    replica.engine().get(&data_key(band(replica, key), key.as_bytes())).unwrap().unwrap()
}

#[test]
fn the_second_write_of_a_key_in_one_group_sees_the_first() {
    let rig = Rig::new();
    let replica = rig.create();
    let release = hold_writer(&replica);
    let before = replica.applied_lsn();
    let first = send(&replica, vec![put("k", "one")], Ack::Fsync);
    let second = send(&replica, vec![put("k", "two")], Ack::Fsync);
    // The write is as old as the first: it must lose against the first, which is visible only in
    // the group.
    let older = send(&replica, vec![at(START_US - 1, put("k", "older"))], Ack::Fsync);
    drop(release);
    let first_time = applied_at(first.recv_timeout(DEADLINE).unwrap().unwrap()[0]);
    let second_time = applied_at(second.recv_timeout(DEADLINE).unwrap().unwrap()[0]);
    assert!(second_time > first_time, "the second is stamped after the first");
    assert_eq!(
        older.recv_timeout(DEADLINE).unwrap().unwrap(),
        vec![OpOutcome::Superseded(second_time)]
    );
    assert_eq!(get(&replica, "k").as_deref(), Some("two"));
    let logged: Vec<_> =
        records(&replica).into_iter().filter(|record| record.lsn > before).collect();
    assert_eq!(logged.len(), 1, "it was one group");
    assert_eq!(data_keys(&logged[0]), vec!["k"], "one entry per key");
}

#[test]
fn put_delete_put_in_one_batch_leaves_the_last_and_logs_one_entry() {
    let rig = Rig::new();
    let replica = rig.create();
    let outcomes =
        write(&replica, vec![put("k", "one"), delete("k"), put("other", "x"), put("k", "three")]);
    let times: Vec<u64> = outcomes.into_iter().map(applied_at).collect();
    assert!(times[0] < times[1] && times[1] < times[3], "{times:?}");
    assert_eq!(get(&replica, "k").as_deref(), Some("three"));
    let last = records(&replica).pop().unwrap();
    assert_eq!(data_keys(&last), vec!["k", "other"]);
    // Event times of the caller inside one batch: the greatest wins, wherever it stands.
    let base = START_US + 1_000;
    let batch = vec![
        at(base + 2, put("e", "newest")),
        at(base + 1, delete("e")),
        at(base, put("e", "oldest")),
    ];
    let outcomes = write(&replica, batch);
    assert_eq!(
        outcomes,
        vec![
            OpOutcome::Applied(base + 2),
            OpOutcome::Superseded(base + 2),
            OpOutcome::Superseded(base + 2)
        ]
    );
    assert_eq!(get(&replica, "e").as_deref(), Some("newest"));
    let last = records(&replica).pop().unwrap();
    let Body::Data { entries, .. } = &last.body else { panic!("{last:?}") };
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].entry, stored(&replica, "e"));
}

#[test]
fn a_refused_batch_leaves_nothing_of_itself_in_its_group() {
    let rig = Rig::new();
    let replica = rig.create();
    // Two partitions for one key that share a band: the second is refused at the write path.
    let key = "shared";
    let own = band(&replica, key);
    let same_band: Vec<u64> = (0u64..100_000)
        .map(|i| partition_hash(&i.to_le_bytes()))
        .filter(|hash| vasto_core::Band::in_shard(*hash, replica.shard) == Some(own))
        .take(1)
        .collect();
    let time = applied_at(write_one(&replica, put(key, "mine")));
    let mut foreign = at(time + 1, put(key, "another partition's"));
    foreign.partition_hash = Some(same_band[0]);
    // An event time above the slot's maximum would be blind; an equal one needs a read.
    foreign.event_time = Some(time);
    let release = hold_writer(&replica);
    let good = send(&replica, vec![put("a", "1")], Ack::Fsync);
    let bad = send(&replica, vec![put("b", "2"), foreign], Ack::Fsync);
    drop(release);
    good.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(
        bad.recv_timeout(DEADLINE).unwrap().unwrap_err().code,
        vasto_core::ErrorCode::InvalidArgument
    );
    assert_eq!((get(&replica, "a").as_deref(), get(&replica, "b")), (Some("1"), None));
    assert_eq!(get(&replica, key).as_deref(), Some("mine"));
    assert!(records(&replica).iter().all(|record| !data_keys(record).contains(&"b".to_owned())));
}

#[test]
fn a_write_that_nobody_waits_for_any_more_is_not_done() {
    let rig = Rig::new();
    let replica = rig.create();
    let release = hold_writer(&replica);
    let ask = |key: &str, time: Duration| {
        let (done, answer) = std::sync::mpsc::channel();
        let context = WriteContext { until: Some(since_boot() + time), ..WriteContext::default() };
        replica.write_as(
            vec![put(key, "v")],
            Ack::Fsync,
            0,
            context,
            Box::new(move |result| drop(done.send(result))),
        );
        answer
    };
    let (late, in_time) = (ask("late", Duration::ZERO), ask("in time", DEADLINE));
    drop(release);
    assert_eq!(late.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::DeadlineExceeded);
    in_time.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!((get(&replica, "late"), get(&replica, "in time").as_deref()), (None, Some("v")));
}

#[test]
fn stamps_rise_while_the_clock_goes_back() {
    let rig = Rig::new();
    let replica = rig.create();
    let first = applied_at(write_one(&replica, put("k", "before")));
    rig.clock.set(START_US - 3_600_000_000);
    let second = applied_at(write_one(&replica, put("k", "after")));
    assert!(second > first);
    assert_eq!(get(&replica, "k").as_deref(), Some("after"));
    write_one(&replica, delete("k"));
    assert_eq!(get(&replica, "k"), None);
    assert_log_is_whole(&records(&replica));
}

#[test]
fn a_stamped_write_wins_over_an_event_time_in_the_future() {
    let rig = Rig::new();
    let replica = rig.create();
    let ahead = START_US + 50_000_000;
    assert_eq!(
        write_one(&replica, at(ahead, put("k", "from the future"))),
        OpOutcome::Applied(ahead)
    );
    let stamped = applied_at(write_one(&replica, put("k", "stamped")));
    assert!(stamped > ahead);
    assert_eq!(get(&replica, "k").as_deref(), Some("stamped"));
    // The same through a restart, when the table knows only the maximum; and for a delete.
    let ahead = stamped + 20_000_000;
    write_one(&replica, at(ahead, put("k", "again from the future")));
    let (_dir, again) = rig.crash(&replica);
    assert!(applied_at(write_one(&again, delete("k"))) > ahead);
    assert_eq!(get(&again, "k"), None);
}

#[test]
fn after_a_restart_older_event_times_still_lose_and_newer_ones_still_win() {
    let rig = Rig::new();
    let replica = rig.create();
    let base = START_US + 1_000_000;
    for i in 0..200 {
        write_one(&replica, at(base + i, put(&format!("k{i}"), "kept")));
    }
    let (_dir, again) = rig.crash(&replica);
    for i in 0..200 {
        let key = format!("k{i}");
        assert_eq!(
            write_one(&again, at(base + i - 1, put(&key, "older"))),
            OpOutcome::Superseded(base + i)
        );
        assert_eq!(get(&again, &key).as_deref(), Some("kept"));
        assert!(
            matches!(write_one(&again, put(&key, "newer")), OpOutcome::Applied(time) if time > base + i)
        );
        assert_eq!(get(&again, &key).as_deref(), Some("newer"));
    }
}

#[test]
fn a_delete_with_an_old_event_time_does_not_hide_a_newer_value() {
    let rig = Rig::new();
    let replica = rig.create();
    let time = applied_at(write_one(&replica, put("k", "newer")));
    let logged = records(&replica).len();
    assert_eq!(write_one(&replica, at(time - 1, delete("k"))), OpOutcome::Superseded(time));
    assert_eq!(get(&replica, "k").as_deref(), Some("newer"));
    assert_eq!(records(&replica).len(), logged, "a superseded write is not logged");
}

#[test]
fn expired_values_are_not_visible_and_keep_their_commit_time() {
    let rig = Rig::new();
    let replica = rig.create();
    let mut op = put("k", "short lived");
    op.change = OpKind::Put { value: "short lived".into(), ttl_ms: Some(1_000), condition: None };
    write_one(&replica, op);
    let bytes = stored(&replica, "k");
    let entry = Entry::decode(&bytes).unwrap();
    assert_eq!(entry.expires_at, Some(START_US + 1_000_000), "counted from the clock");
    assert_eq!(entry.commit_time, Some(records(&replica).last().unwrap().commit_time));
    rig.clock.set(START_US + 999_999);
    assert_eq!(get(&replica, "k").as_deref(), Some("short lived"));
    rig.clock.set(START_US + 1_000_000);
    assert_eq!(get(&replica, "k"), None);
    assert!(scan_keys(&replica, Default::default()).is_empty());
    // An expired value still counts in the merge: an older write does not come back from behind it.
    assert!(matches!(
        write_one(&replica, at(START_US - 1, put("k", "old"))),
        OpOutcome::Superseded(_)
    ));
    assert_eq!(get(&replica, "k"), None);
    // Values without an expiry carry no commit time; tombstones do.
    write_one(&replica, put("plain", "x"));
    assert_eq!(Entry::decode(&stored(&replica, "plain")).unwrap().commit_time, None);
    write_one(&replica, delete("plain"));
    let commit_time = Entry::decode(&stored(&replica, "plain")).unwrap().commit_time;
    assert_eq!(commit_time, Some(records(&replica).last().unwrap().commit_time));
}

/// Value size of which seven exceed a record.
const LONG: usize = 3_900 << 10;

/// Writes seven keys with long values.
fn long_values(replica: &Replica) -> Vec<String> {
    let keys: Vec<String> = (0..7).map(|i| format!("long{i}")).collect();
    let value = "v".repeat(LONG);
    for key in &keys {
        write_one(replica, put(key, &value));
    }
    keys
}

fn append(key: &str) -> WriteOp {
    WriteOp { change: OpKind::Append("x".into()), ..put(key, "") }
}

fn assert_records_fit(replica: &Replica) {
    let longest = records(replica).iter().map(|record| record.encode().len()).max().unwrap();
    assert!(longest < RECORD_BYTES_MAX, "{longest}");
}

/// An append of one byte makes an entry of the whole value.
#[test]
fn short_appends_to_long_values_do_not_outgrow_a_record() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = long_values(&replica);
    let release = hold_writer(&replica);
    let answers: Vec<_> =
        keys.iter().map(|key| send(&replica, vec![append(key)], Ack::Fsync)).collect();
    drop(release);
    for answer in answers {
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    for key in &keys {
        assert_eq!(get(&replica, key).unwrap().len(), LONG + 1);
    }
    assert_records_fit(&replica);
    // Writes that wait for the outcome of a seal are executed in one go, too.
    let range = BandRange { first: Band::FIRST, last: Band::LAST };
    control(&replica, Control::Seal { plan: PlanId(1), version: CatalogVersion(5), range })
        .unwrap();
    let answers: Vec<_> =
        keys.iter().map(|key| send(&replica, vec![append(key)], Ack::Fsync)).collect();
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
    for answer in answers {
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    assert_records_fit(&replica);
    assert_eq!(replica.closed(), None);
}

#[test]
fn one_request_that_would_store_more_than_a_batch_is_refused_as_a_whole() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = long_values(&replica);
    let refused = try_write(&replica, keys.iter().map(|key| append(key)).collect()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidArgument, "{refused}");
    assert!(
        keys.iter().all(|key| get(&replica, key).unwrap().len() == LONG),
        "nothing of it is stored"
    );
    write(&replica, keys[..4].iter().map(|key| append(key)).collect());
    // Repeated writes of one key are one entry.
    write(&replica, (0..20).map(|_| append(&keys[0])).collect());
    assert_eq!(get(&replica, &keys[0]).unwrap().len(), LONG + 21);
    assert_records_fit(&replica);
}

#[test]
fn the_largest_batch_is_stored_also_behind_a_full_group() {
    let rig = Rig::new();
    let replica = rig.create();
    // Exactly the limit at the ingress: many small operations, whose entries have headers.
    let value = "v".repeat(BATCH_BYTES_MAX / 8_192 - 5);
    let batch: Vec<WriteOp> = (0..8_192).map(|i| put(&format!("k{i:04}"), &value)).collect();
    let release = hold_writer(&replica);
    let first = send(&replica, vec![put("first", &"v".repeat(GROUP_BYTES_MAX - 100))], Ack::Fsync);
    let largest = send(&replica, batch, Ack::Fsync);
    let behind = send(&replica, vec![put("behind", "v")], Ack::Fsync);
    drop(release);
    for answer in [first, largest, behind] {
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    assert_records_fit(&replica);
}

#[test]
fn entries_of_other_logs_do_not_outgrow_a_record_either() {
    let rig = Rig::new();
    let replica = rig.create();
    let value = "v".repeat(LONG);
    let slice = |name: &str, count: usize| -> Vec<_> {
        (0..count).map(|i| value_entry(&format!("{name}{i}"), START_US, &value)).collect()
    };
    let release = hold_writer(&replica);
    let write = send(
        &replica,
        vec![put("w", &value), put("x", &value), put("y", &value), put("z", &value)],
        Ack::Fsync,
    );
    let applies: Vec<_> = (0..4)
        .map(|n| {
            let (replica, entries) = (replica.clone(), slice(&format!("a{n}"), 4));
            std::thread::spawn(move || apply(&replica, entries, Vec::new()))
        })
        .collect();
    drop(release);
    write.recv_timeout(DEADLINE).unwrap().unwrap();
    for apply in applies {
        apply.join().unwrap().unwrap();
    }
    let too_much = apply(&replica, slice("b", 7), Vec::new()).unwrap_err();
    assert!(matches!(too_much, ReplicaError::Refused(_)), "{too_much}");
    assert_eq!(get(&replica, "b0"), None);
    assert_eq!(replica.closed(), None);
    assert_records_fit(&replica);
}

/// An event time from the future affects its own key alone: other keys, and other replicas, use
/// their clocks.
#[test]
fn an_event_time_from_the_future_shifts_the_stamps_of_no_other_key() {
    let rig = Rig::new();
    let replica = rig.create();
    let ahead = START_US + 59_000_000;
    write_one(&replica, at(ahead, put("a", "future")));
    assert_eq!(applied_at(write_one(&replica, put("a", "after it"))), ahead + 1);
    assert_eq!(applied_at(write_one(&replica, put("b", "now"))), START_US + 1);
    let (_dir, again) = rig.crash(&replica);
    rig.clock.set(START_US + 10);
    assert_eq!(
        applied_at(write_one(&again, put("c", "now"))),
        START_US + 10,
        "also after a restart"
    );
    assert_eq!(applied_at(write_one(&again, put("a", "again"))), ahead + 2);
    assert_eq!(applied_at(write_one(&again, put("b", "again"))), START_US + 12);
}

#[test]
// The threads have nothing else to do.
#[allow(clippy::disallowed_methods)]
fn a_writer_that_is_about_to_rest_takes_every_job() {
    let rig = Rig::new();
    let replica = rig.create();
    let parked = std::sync::atomic::AtomicUsize::new(0);
    // The interval of the writes is about the time that a writer waits before it becomes idle.
    std::thread::scope(|scope| {
        for client in 0..2 {
            let (replica, parked) = (&replica, &parked);
            scope.spawn(move || {
                for n in 0..60 {
                    std::thread::sleep(Duration::from_micros(19_000 + 97 * n));
                    parked.fetch_add(
                        usize::from(replica.commands.is_parked()),
                        std::sync::atomic::Ordering::Relaxed,
                    );
                    write_one(replica, put(&format!("{client}-{n}"), "v"));
                }
            });
        }
    });
    for client in 0..2 {
        for n in 0..60 {
            assert_eq!(get(&replica, &format!("{client}-{n}")).as_deref(), Some("v"));
        }
    }
    assert!(parked.into_inner() > 0, "the writer never gave its thread back");
}
