//! Records of one replica taken by another, on real engines and logs.

use futures::executor::block_on;
use vasto_core::catalog::Ack;
use vasto_core::ids::{Incarnation, Lsn, Origin, OwnSeq, ReplicaId, ShardId};
use vasto_core::record::{Body, RangeState, Record};
use vasto_core::{Band, ErrorCode};

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};

pub(super) fn member(id: u64) -> Rig {
    Rig::of(ShardId(0), ReplicaId(id), 1, RangeState::Owned)
}

fn streamed(from: &Replica) -> Vec<Record> {
    records(from).into_iter().filter(|record| record.body.is_streamed()).collect()
}

fn take(to: &Replica, from: &Replica, records: Vec<Record>) -> Result<(), ReplicaError> {
    let covered = records.last().map_or(Lsn(0), |record| record.lsn);
    block_on(to.replicate(from.id, records, covered))
}

pub(super) fn pull(to: &Replica, from: &Replica) {
    take(to, from, streamed(from)).unwrap();
}

/// Returns everything that is stored, as bytes.
fn rows(replica: &Replica) -> Vec<(Vec<u8>, Vec<u8>)> {
    let data = Band::all().flat_map(|band| replica.engine().with_prefix(&[band.0]).unwrap());
    data.collect()
}

#[test]
fn two_replicas_that_take_writes_hold_the_same_bytes() {
    let (rig_a, rig_b) = (member(1), member(2));
    let (a, b) = (rig_a.create(), rig_b.create());
    for n in 0..50 {
        write_one(&a, put(&format!("k{}", n % 20), &format!("a{n}")));
        write_one(
            &b,
            if n % 7 == 0 {
                delete(&format!("k{}", n % 20))
            } else {
                put(&format!("k{}", n % 20), &format!("b{n}"))
            },
        );
        // Both sides get the same event time with different bytes.
        write_one(&a, at(START_US + 1, put("tie", "a")));
        write_one(&b, at(START_US + 1, put("tie", "b")));
    }
    pull(&a, &b);
    pull(&b, &a);
    pull(&a, &b);
    assert_eq!(rows(&a), rows(&b));
    assert_eq!(get(&a, "tie").as_deref(), Some("b"));
    assert_eq!(a.vector(), b.vector());
    for (rig, replica) in [(&rig_a, &a), (&rig_b, &b)] {
        let (_dir, again) = rig.crash(replica);
        assert_eq!(rows(&again), rows(replica), "a replay gives the same");
        let old: Vec<Origin> = replica.vector().keys().copied().collect();
        assert!(old.iter().all(|origin| again.vector()[origin] == replica.vector()[origin]));
    }
}

/// Hazards 6, 10, 14: a gap is an error, progress and data are atomic.
#[test]
fn a_record_that_comes_too_early_is_refused_and_one_that_is_there_is_skipped() {
    let (rig_a, rig_b) = (member(1), member(2));
    let (a, b) = (rig_a.create(), rig_b.create());
    for n in 0..5 {
        write_one(&a, put(&format!("k{n}"), "v"));
    }
    let all = streamed(&a);
    let mut holed = all.clone();
    holed.remove(2);
    let refused = take(&b, &a, holed).unwrap_err();
    assert!(
        matches!(refused, ReplicaError::Gap { next: OwnSeq(3), got: OwnSeq(4), .. }),
        "{refused}"
    );
    let origin = all[0].origin;
    assert_eq!(b.vector()[&origin], OwnSeq(2), "what came before the hole is here");
    assert_eq!(get(&b, "k2"), None);
    let logged = b.log().appended_lsn();
    take(&b, &a, all[..2].to_vec()).unwrap();
    assert_eq!(b.log().appended_lsn(), logged, "a repetition is not logged again");
    take(&b, &a, all.clone()).unwrap();
    assert_eq!(rows(&a), rows(&b));
    // Of an unknown origin only the first record is taken.
    let stranger = Origin { replica: ReplicaId(9), incarnation: Incarnation(1) };
    let unknown = Record { origin: stranger, own_seq: OwnSeq(2), ..all[1].clone() };
    assert!(matches!(take(&b, &a, vec![unknown]), Err(ReplicaError::Gap { .. })));
}

#[test]
fn a_third_replica_gets_everything_through_the_second() {
    let rigs = [member(1), member(2), member(3)];
    let [a, b, c] = [&rigs[0], &rigs[1], &rigs[2]].map(Rig::create);
    write_one(&b, at(START_US + 100, put("k", "newer")));
    write_one(&a, at(START_US + 50, put("k", "older")));
    write_one(&a, put("other", "v"));
    pull(&b, &a);
    // The first replica dies: the third receives its records only through the second.
    pull(&c, &b);
    assert_eq!(rows(&c), rows(&b));
    assert_eq!(get(&c, "k").as_deref(), Some("newer"));
    assert!(vasto_core::ids::covers(&c.vector(), &a.vector()));
}

/// Hazard 12, and the power loss that an `os` acknowledgement allows: a peer that kept it returns
/// the tail of an incarnation that the disk lost.
#[test]
fn what_this_disk_lost_of_an_earlier_incarnation_is_pulled_back() {
    let (rig_a, rig_b) = (member(1), member(2));
    let (a, b) = (rig_a.create(), rig_b.create());
    write_one(&a, put("kept", "v"));
    let (_dir, restarted) = rig_a.crash(&a);
    for n in 0..10 {
        write_one(&a, put(&format!("lost{n}"), "v"));
    }
    pull(&b, &a);
    rig_a.close(a);
    assert_eq!(get(&restarted, "lost3"), None);
    for n in 0..10 {
        write_one(&restarted, put(&format!("new{n}"), "v"));
    }
    pull(&restarted, &b);
    pull(&b, &restarted);
    assert_eq!(get(&restarted, "lost3").as_deref(), Some("v"));
    assert_eq!(rows(&restarted), rows(&b));
    assert_eq!(restarted.incarnation(), Incarnation(2), "its own old adopt changes nothing");
}

/// Hazards 25, 42: a directory that was restored from a copy must not continue its numbering.
#[test]
fn a_directory_that_is_an_old_copy_closes() {
    let (rig_a, rig_b) = (member(1), member(2));
    let a = rig_a.create();
    let (_dir, copy) = rig_a.crash(&a);
    let b = rig_b.create();
    // The original continues with the same incarnation as the copy, and writes.
    rig_a.close(a);
    let real = rig_a.open(&rig_a.path, false).unwrap();
    assert_eq!(real.incarnation(), copy.incarnation());
    write_one(&real, put("k", "v"));
    pull(&b, &real);
    let refused = take(&copy, &b, streamed(&b)).unwrap_err();
    assert!(refused.to_string().contains("old copy"), "{refused}");
    assert!(try_write(&copy, vec![put("k", "other")]).is_err());
}

#[test]
fn a_floor_comes_with_the_records_and_hides_what_it_covers() {
    let (rig_a, rig_b) = (member(1), member(2));
    let (a, b) = (rig_a.create(), rig_b.create());
    write_one(&a, put("k", "v"));
    write_one(&a, delete("k"));
    let floor = a.data_commit_time();
    control(&a, Control::FenceCommitTime { commit_time: floor }).unwrap();
    control(&a, Control::GcFloor { floor }).unwrap();
    assert_eq!(a.floor(), floor);
    pull(&b, &a);
    assert_eq!(b.floor(), floor);
    assert_eq!(rows(&b).len(), 1, "the delete came before the floor");
    a.engine().flush().unwrap();
    a.engine().compact_all();
    assert_eq!(rows(&a), [], "compaction removes it");
    // A replica that receives the delete after the floor does not take it at all.
    let rig_c = member(3);
    let c = rig_c.create();
    let (floors, others): (Vec<Record>, Vec<Record>) =
        streamed(&a).into_iter().partition(|record| matches!(record.body, Body::GcFloor { .. }));
    let late = Record { floor, ..others.last().unwrap().clone() };
    assert!(matches!(late.body, Body::Data { .. }) && floors.len() == 1);
    take(&c, &a, others[..others.len() - 1].to_vec()).unwrap();
    take(&c, &a, vec![late]).unwrap();
    // An older write has the same effect on replicas that have compacted and on those that have
    // not.
    for replica in [&a, &b, &c] {
        write_one(replica, at(START_US - 5, put("k", "revived")));
        assert_eq!(get(replica, "k").as_deref(), Some("revived"));
    }
    let (_dir, again) = rig_a.crash(&a);
    assert_eq!(again.floor(), floor, "it survives a restart");
}

#[test]
fn a_promise_holds_also_for_a_clock_that_is_a_day_slow() {
    let rig = member(1);
    let replica = rig.create();
    write_one(&replica, put("k", "v"));
    let day_us = 86_400_000_000;
    control(&replica, Control::FenceCommitTime { commit_time: START_US + day_us }).unwrap();
    let (_dir, again) = rig.crash(&replica);
    write_one(&again, delete("k"));
    let last = records(&again).pop().unwrap();
    assert!(last.commit_time > START_US + day_us, "{}", last.commit_time);
    let logged = again.log().appended_lsn();
    control(&again, Control::FenceCommitTime { commit_time: START_US }).unwrap();
    assert_eq!(again.log().appended_lsn(), logged, "what holds already costs nothing");
}

#[test]
fn a_write_that_wants_a_second_copy_is_answered_when_there_is_one() {
    let rig = member(1);
    let replica = rig.create();
    replica.followers().expect([ReplicaId(2)], [ReplicaId(2)]);
    let answer = send(&replica, vec![put("k", "v")], Ack::Replica);
    // The write is durable and visible here, and not acknowledged yet.
    while get(&replica, "k").is_none() {}
    assert!(answer.try_recv().is_err());
    let own = Origin { replica: replica.id, incarnation: replica.incarnation() };
    let (lsn, own_seq) = (replica.applied_lsn(), replica.vector()[&own]);
    replica.followers().progress(ReplicaId(2), lsn, own_seq, replica.epoch());
    assert!(answer.recv_timeout(DEADLINE).unwrap().is_ok());
    // No replica confirms the write once the replica stops.
    let answer = send(&replica, vec![put("k", "w")], Ack::Replica);
    while get(&replica, "k").as_deref() != Some("w") {}
    rig.close(replica);
    assert_eq!(answer.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::Unknown);
}

#[test]
fn records_keep_what_their_origin_said() {
    let (rig_a, rig_b) = (member(1), member(2));
    rig_b.clock.set(START_US + 3_600_000_000);
    let (a, b) = (rig_a.create(), rig_b.create());
    write_one(&a, put("k", "v"));
    pull(&b, &a);
    let theirs: Vec<Record> =
        streamed(&b).into_iter().filter(|record| record.origin.replica == a.id).collect();
    for (here, there) in theirs.iter().zip(streamed(&a)) {
        assert_eq!(
            (here.origin, here.own_seq, here.commit_time, here.floor, here.epoch),
            (there.origin, there.own_seq, there.commit_time, there.floor, there.epoch)
        );
        if let (Body::Data { entries, .. }, Body::Data { entries: sent, .. }) =
            (&here.body, &there.body)
        {
            assert_eq!(entries, sent);
        }
    }
    assert_eq!(theirs.len(), streamed(&a).len());
}

/// Before the bands were given away, their new owner had every write that any replica of the shard
/// had taken; what comes later by replication is one of these.
#[test]
fn an_entry_of_bands_that_were_given_away_is_passed_over_and_a_writer_is_sent_on() {
    let (rig_a, rig_b) = (member(1), member(2));
    let (a, b) = (rig_a.create(), rig_b.create());
    let key = keys_in(Band(1), "k", 1).remove(0);
    write_one(&b, put(&key, "late"));
    set_range(&a, (Band(1)..=Band(1)).into(), RangeState::Leaving);
    pull(&a, &b);
    assert!(rows(&a).is_empty(), "the entry was stored at the old owner");
    assert!(vasto_core::ids::covers(&a.vector(), &b.vector()), "its record is not asked for again");
    let refused = try_write(&a, vec![put(&key, "later")]).unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongEpoch);
}
