//! Writes of moving keys that are slowed down: they wait a moment, none fails, all others pass; and
//! the tails for whose sake that is done.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use futures::StreamExt;
use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::limits::{TAIL_BACKLOG_BYTES, THROTTLED_WRITE_MAX, WRITE_QUEUE_BYTES_MAX};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::{Band, ErrorCode, VastoError};
use vasto_proto::v1;

use super::support::*;
use crate::build::resize::tail;
use crate::clock::since_boot;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, OpOutcome, WriteContext, WriteOp};
use crate::replica::throttle::Moving;

const MOVING: BandRange = BandRange { first: Band(1), last: Band(1) };

/// Slows the moving keys down to a rate at which the writes of a test would take minutes.
fn slow_down(replica: &Replica) {
    replica.throttle().set(Some(Moving { range: MOVING, bytes_per_s: Some(1) }));
}

fn let_go(replica: &Replica) {
    replica.throttle().set(Some(Moving { range: MOVING, bytes_per_s: None }));
}

fn moving(count: usize) -> Vec<String> {
    keys_in(Band(1), "m", count)
}

fn staying() -> String {
    keys_in(Band(2), "s", 1).remove(0)
}

/// Returns replies of one write of each key.
fn send_each(
    replica: &Replica,
    keys: &[String],
) -> Vec<Receiver<Result<Vec<OpOutcome>, VastoError>>> {
    keys.iter().map(|key| send(replica, vec![put(key, "v")], Ack::Fsync)).collect()
}

#[test]
fn writes_of_moving_keys_wait_a_moment_and_all_others_pass() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = moving(8);
    write_one(&replica, put(&keys[0], "free"));
    assert_eq!(replica.throttle().taken(), 0, "no plan moves keys");
    slow_down(&replica);
    let began = Instant::now();
    let replies = send_each(&replica, &keys);
    // The first uses up what may be taken in its time.
    replies[0].recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(replies[7].recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    write_one(&replica, put(&staying(), "passes"));
    assert!(began.elapsed() < THROTTLED_WRITE_MAX, "a key that stays has waited");
    assert_eq!(replies[7].recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    for reply in &replies[1..] {
        reply.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    assert!(began.elapsed() > THROTTLED_WRITE_MAX / 2, "{:?}", began.elapsed());
    let held_back = replica.throttle().held_back();
    assert!(held_back >= THROTTLED_WRITE_MAX * 5, "{held_back:?}");
    let bytes: usize = keys.iter().map(|key| put(key, "v").bytes()).sum();
    assert_eq!(replica.throttle().taken(), bytes as u64, "each is counted once");
    assert!(keys.iter().all(|key| get(&replica, key).as_deref() == Some("v")));
}

#[test]
fn writes_that_are_held_back_are_let_go_with_the_throttle() {
    let rig = Rig::new();
    let replica = rig.create();
    slow_down(&replica);
    let keys = moving(4);
    let began = Instant::now();
    let replies = send_each(&replica, &keys);
    replies[0].recv_timeout(DEADLINE).unwrap().unwrap();
    let_go(&replica);
    for reply in &replies[1..] {
        reply.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    assert!(began.elapsed() < THROTTLED_WRITE_MAX, "{:?}", began.elapsed());
}

#[test]
fn a_write_whose_sender_waits_for_a_short_time_does_not_fail() {
    let rig = Rig::new();
    let replica = rig.create();
    slow_down(&replica);
    let keys = moving(20);
    let others = send_each(&replica, &keys);
    let (done, answer) = channel();
    let context = WriteContext {
        until: Some(since_boot() + THROTTLED_WRITE_MAX / 2),
        ..WriteContext::default()
    };
    let done = Box::new(move |result| drop(done.send(result)));
    replica.write_as(vec![put(&keys[0], "short")], Ack::Os, 0, context, done);
    answer.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(
        others[19].recv_timeout(Duration::ZERO),
        Err(RecvTimeoutError::Timeout),
        "it overtook writes whose senders wait longer"
    );
}

#[test]
fn a_seal_takes_over_the_writes_that_are_held_back_and_its_outcome_decides_on_them() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = moving(6);
    for commits in [false, true] {
        slow_down(&replica);
        let replies = send_each(&replica, &keys);
        replies[0].recv_timeout(DEADLINE).unwrap().unwrap();
        let version = CatalogVersion(if commits { 7 } else { 5 });
        let sealed =
            control(&replica, Control::Seal { plan: PlanId(1), version, range: MOVING }).unwrap();
        let_go(&replica);
        write_one(&replica, put(&staying(), "passes"));
        assert_eq!(replies[5].recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
        let written = records(&replica);
        let mut after = written.iter().filter(|record| record.lsn > sealed);
        assert!(!after.any(|record| data_keys(record).contains(&keys[5])));
        if commits {
            set_range(&replica, MOVING, RangeState::Leaving);
        } else {
            control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
        }
        for reply in &replies[1..] {
            match reply.recv_timeout(DEADLINE).unwrap() {
                Ok(_) => assert!(!commits),
                Err(error) => assert!(commits && error.code == ErrorCode::WrongEpoch, "{error}"),
            }
        }
    }
}

/// A client pays for another attempt after `Overloaded` and gives up in the end; a change of shards
/// is no load of its making.
#[test]
fn a_queue_that_is_full_because_of_a_change_of_shards_asks_for_patience() {
    let rig = Rig::new();
    let replica = rig.create();
    let key = moving(1).remove(0);
    let fill = |replica: &Replica| {
        // The write that holds the writer takes a little of the room.
        let half = WRITE_QUEUE_BYTES_MAX / 2 - 1_024;
        let writes: Vec<_> = (0..3)
            .map(|_| {
                let (done, answer) = channel();
                let done = Box::new(move |result| drop(done.send(result)));
                replica.write(vec![put(&key, "v")], Ack::Os, half, done);
                answer
            })
            .collect();
        (writes[2].recv_timeout(DEADLINE).unwrap().unwrap_err().code, writes)
    };
    let held = hold_writer(&replica);
    let (code, writes) = fill(&replica);
    assert_eq!(code, ErrorCode::Overloaded);
    drop(held);
    for answer in &writes[..2] {
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    let seal = Control::Seal { plan: PlanId(1), version: CatalogVersion(5), range: MOVING };
    control(&replica, seal).unwrap();
    assert_eq!(fill(&replica).0, ErrorCode::NodeBehind);
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
}

fn tail_of(replica: &Replica, after: Lsn) -> v1::TailRequest {
    v1::TailRequest {
        keyspace_id: replica.keyspace.0,
        replica_id: replica.id.0,
        after_lsn: after.0,
        final_shard: 1,
        final_shards: 2,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_knows_how_far_its_slowest_reader_is_behind() {
    let rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned);
    let replica = rig.create();
    let registry = Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone(), 1));
    registry.add_replica(replica.clone());
    let begin = replica.settled_lsn();
    let value = "v".repeat(64 << 10);
    let written = replica.clone();
    let write_all = move || {
        let ops = |n: u64| -> Vec<WriteOp> {
            (0..16).map(|i| put(&format!("k{n}-{i}"), &value)).collect()
        };
        for n in 0..10 {
            write(&written, ops(n));
        }
    };
    tokio::task::spawn_blocking(write_all).await.unwrap();
    let unread = || replica.tails().slowest().map(|sent| replica.log().synced_bytes_after(sent));
    assert_eq!(unread(), None, "nobody reads");
    let mut frames = tail::serve(&registry, &tail_of(&replica, begin)).unwrap();
    // Nobody takes the frames: few are read ahead.
    wait_for("frames to be read ahead", || replica.tails().slowest() > Some(begin));
    let head = replica.settled_lsn();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(unread() > Some(4 * TAIL_BACKLOG_BYTES), "{:?} of 10 MiB are unread", unread());
    let mut lags = Vec::new();
    loop {
        let frame = frames.next().await.unwrap().unwrap();
        lags.push(frame.lag_bytes.unwrap());
        if frame.covered_lsn >= head.0 {
            break;
        }
    }
    assert!(lags.is_sorted_by(|one, next| one >= next), "{lags:?}");
    assert!(lags[0] > 9 * TAIL_BACKLOG_BYTES && lags.last() == Some(&0), "{lags:?}");
    wait_for("the reader to be sent everything", || unread() == Some(0));
    drop(frames);
    wait_for("the reader to leave", || unread().is_none());
}

/// A tail without rows for its reader pauses between its frames. Writers wait for the reader to reach
/// a seal: it must not come a pause later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seal_does_not_wait_for_the_next_quiet_frame() {
    let rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned);
    let replica = rig.create();
    let registry = Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone(), 1));
    registry.add_replica(replica.clone());
    let begin = replica.settled_lsn();
    let mut frames = tail::serve(&registry, &tail_of(&replica, begin)).unwrap();
    let mut quick = 0;
    for round in 0..100u64 {
        let written = replica.clone();
        let write = move || write_one(&written, put(&staying(), &round.to_string()));
        tokio::task::spawn_blocking(write).await.unwrap();
        let quiet = replica.settled_lsn();
        while frames.next().await.unwrap().unwrap().covered_lsn < quiet.0 {}
        let began = Instant::now();
        let version = CatalogVersion(5 + 2 * round);
        let seal = Control::Seal { plan: PlanId(1), version, range: MOVING };
        let sealed = replica.control(seal).await.unwrap();
        let sealed_after = began.elapsed();
        while frames.next().await.unwrap().unwrap().covered_lsn < sealed.0 {}
        // The pause is 10 ms. A round in which the machine had other things to do says nothing.
        let told = sealed_after < Duration::from_millis(2);
        quick += u32::from(told && began.elapsed() < Duration::from_millis(5));
        if quick == 5 {
            return;
        }
        let version = CatalogVersion(6 + 2 * round);
        replica.control(Control::Unseal { version }).await.unwrap();
    }
    panic!("the reader was sent a seal at once only {quick} times of 100");
}
