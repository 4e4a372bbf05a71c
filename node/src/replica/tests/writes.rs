//! Groups, stamps and expiry on the write path.

use vasto_core::catalog::Ack;
use vasto_core::entry::Entry;
use vasto_core::hash::partition_hash;
use vasto_core::record::Body;
use vasto_core::stored_key::data_key;

use super::support::*;
use crate::replica::job::{Change, Outcome};

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
    // As old as the first: it must lose against it, which it can only see in the group.
    let older = send(&replica, vec![at(START_US - 1, put("k", "older"))], Ack::Fsync);
    drop(release);
    let one = applied_at(first.recv_timeout(DEADLINE).unwrap().unwrap()[0]);
    let two = applied_at(second.recv_timeout(DEADLINE).unwrap().unwrap()[0]);
    assert!(two > one, "the second is stamped behind the first");
    assert_eq!(older.recv_timeout(DEADLINE).unwrap().unwrap(), vec![Outcome::Superseded(two)]);
    assert_eq!(get(&replica, "k").as_deref(), Some("two"));
    let logged: Vec<_> = records(&replica).into_iter().filter(|record| record.lsn > before).collect();
    assert_eq!(logged.len(), 1, "it was one group");
    assert_eq!(data_keys(&logged[0]), vec!["k"], "one entry per key");
}

#[test]
fn put_delete_put_in_one_batch_leaves_the_last_and_logs_one_entry() {
    let rig = Rig::new();
    let replica = rig.create();
    let outcomes = write(&replica, vec![put("k", "one"), delete("k"), put("other", "x"), put("k", "three")]);
    let times: Vec<u64> = outcomes.into_iter().map(applied_at).collect();
    assert!(times[0] < times[1] && times[1] < times[3], "{times:?}");
    assert_eq!(get(&replica, "k").as_deref(), Some("three"));
    let last = records(&replica).pop().unwrap();
    assert_eq!(data_keys(&last), vec!["k", "other"]);
    // Event times of the caller inside one batch: the greatest wins, wherever it stands.
    let base = START_US + 1_000;
    let batch = vec![at(base + 2, put("e", "newest")), at(base + 1, delete("e")), at(base, put("e", "oldest"))];
    let outcomes = write(&replica, batch);
    assert_eq!(
        outcomes,
        vec![Outcome::Applied(base + 2), Outcome::Superseded(base + 2), Outcome::Superseded(base + 2)]
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
    // A stamp above the slot's maximum would be blind; an equal one reads.
    foreign.event_time = Some(time);
    let release = hold_writer(&replica);
    let good = send(&replica, vec![put("a", "1")], Ack::Fsync);
    let bad = send(&replica, vec![put("b", "2"), foreign], Ack::Fsync);
    drop(release);
    good.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(bad.recv_timeout(DEADLINE).unwrap().unwrap_err().code, vasto_core::ErrorCode::InvalidArgument);
    assert_eq!((get(&replica, "a").as_deref(), get(&replica, "b")), (Some("1"), None));
    assert_eq!(get(&replica, key).as_deref(), Some("mine"));
    assert!(records(&replica).iter().all(|record| !data_keys(record).contains(&"b".to_owned())));
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
    assert_eq!(write_one(&replica, at(ahead, put("k", "from the future"))), Outcome::Applied(ahead));
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
        assert_eq!(write_one(&again, at(base + i - 1, put(&key, "older"))), Outcome::Superseded(base + i));
        assert_eq!(get(&again, &key).as_deref(), Some("kept"));
        assert!(matches!(write_one(&again, put(&key, "newer")), Outcome::Applied(time) if time > base + i));
        assert_eq!(get(&again, &key).as_deref(), Some("newer"));
    }
}

#[test]
fn a_delete_with_an_old_event_time_does_not_hide_a_newer_value() {
    let rig = Rig::new();
    let replica = rig.create();
    let time = applied_at(write_one(&replica, put("k", "newer")));
    let logged = records(&replica).len();
    assert_eq!(write_one(&replica, at(time - 1, delete("k"))), Outcome::Superseded(time));
    assert_eq!(get(&replica, "k").as_deref(), Some("newer"));
    assert_eq!(records(&replica).len(), logged, "a superseded write is not logged");
}

#[test]
fn expired_values_are_not_visible_and_keep_their_commit_time() {
    let rig = Rig::new();
    let replica = rig.create();
    let mut op = put("k", "short lived");
    op.change = Change::Put { value: "short lived".into(), ttl_ms: Some(1_000), condition: None };
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
    assert!(matches!(write_one(&replica, at(START_US - 1, put("k", "old"))), Outcome::Superseded(_)));
    assert_eq!(get(&replica, "k"), None);
    // Values without an expiry carry no commit time; tombstones do.
    write_one(&replica, put("plain", "x"));
    assert_eq!(Entry::decode(&stored(&replica, "plain")).unwrap().commit_time, None);
    write_one(&replica, delete("plain"));
    let commit_time = Entry::decode(&stored(&replica, "plain")).unwrap().commit_time;
    assert_eq!(commit_time, Some(records(&replica).last().unwrap().commit_time));
}

/// An event time from the future concerns its own key alone: other keys, and other replicas, go by their clocks.
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
    assert_eq!(applied_at(write_one(&again, put("c", "now"))), START_US + 10, "also after a restart");
    assert_eq!(applied_at(write_one(&again, put("a", "again"))), ahead + 2);
    assert_eq!(applied_at(write_one(&again, put("b", "again"))), START_US + 12);
}
