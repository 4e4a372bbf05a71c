//! Read-modify-writes on a real replica: executed once, however often they are repeated.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Epoch, ReplicaId};
use vasto_core::stored_key::MetaKey;
use vasto_core::{Band, ErrorCode, VastoError};

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{
    Condition, Control, Number, OpId, OpKind, OpOutcome, Role, WriteContext, WriteOp,
};
use crate::replica::read::GetResult;

fn add(key: &str, addend: i64) -> WriteOp {
    WriteOp { change: OpKind::AddI64(addend), ..put(key, "") }
}

fn id(sequence: u64, tried: Option<u64>) -> OpId {
    OpId {
        client: 77,
        sequence,
        tried: tried.map(ReplicaId),
        age_ms: if tried.is_some() { 10 } else { 0 },
    }
}

type WriteReply = Receiver<Result<Vec<OpOutcome>, VastoError>>;

fn ask(replica: &Replica, op: WriteOp, id: OpId) -> WriteReply {
    ask_for(Ack::Fsync, replica, op, id)
}

fn ask_for(ack: Ack, replica: &Replica, op: WriteOp, id: OpId) -> WriteReply {
    let (done, answer) = channel();
    replica.write_as(
        vec![op],
        ack,
        0,
        WriteContext { id: Some(id), ..WriteContext::default() },
        Box::new(move |result| drop(done.send(result))),
    );
    answer
}

fn answered(answer: WriteReply) -> Result<OpOutcome, VastoError> {
    answer.recv_timeout(DEADLINE).unwrap().map(|mut outcomes| outcomes.remove(0))
}

fn number(outcome: Result<OpOutcome, VastoError>) -> i64 {
    match outcome.unwrap() {
        OpOutcome::Modified { number: Some(Number::I64(number)), .. } => number,
        other => panic!("{other:?}"),
    }
}

fn counter(replica: &Replica, key: &str) -> Option<i64> {
    let GetResult::Values(mut values) = replica.get_many(&[key_ref(key)], true).unwrap() else {
        panic!("it may block")
    };
    match values.remove(0)?.payload {
        Some(vasto_proto::v1::value::Payload::I64(number)) => Some(number),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_counter_is_exact_through_crashes_and_replays() {
    let rig = Rig::new();
    let mut replica = rig.create();
    let mut expected = 0;
    for round in 0..5 {
        for n in 0..20 {
            expected += n;
            assert_eq!(
                number(answered(ask(&replica, add("c", n), id(round * 100 + n as u64, None)))),
                expected
            );
        }
        let (_dir, again) = rig.crash(&replica);
        assert_eq!(counter(&again, "c"), Some(expected));
        rig.close(again);
        rig.close(replica);
        replica = rig.open(&rig.path, false).unwrap();
        assert_eq!(counter(&replica, "c"), Some(expected));
    }
}

/// Hazard 11: a retry gets the first result, in the same group, later, and after a restart.
#[test]
fn a_repetition_at_the_same_replica_counts_once() {
    let rig = Rig::new();
    let replica = rig.create();
    let release = hold_writer(&replica);
    let (first, again) =
        (ask(&replica, add("c", 5), id(1, None)), ask(&replica, add("c", 5), id(1, Some(1))));
    drop(release);
    assert_eq!((number(answered(first)), number(answered(again))), (5, 5));
    assert_eq!(number(answered(ask(&replica, add("c", 1), id(2, None)))), 6);
    assert_eq!(number(answered(ask(&replica, add("c", 5), id(1, Some(1))))), 5, "the first result");
    let (_dir, restarted) = rig.crash(&replica);
    assert_eq!(
        number(answered(ask(&restarted, add("c", 5), id(1, Some(1))))),
        5,
        "also after a restart"
    );
    assert_eq!(counter(&restarted, "c"), Some(6));
    // A request that never arrived is executed now.
    assert_eq!(number(answered(ask(&restarted, add("c", 1), id(3, Some(1))))), 7);
}

#[test]
fn a_repetition_elsewhere_or_after_too_long_is_unknown() {
    let rig = Rig::new();
    let replica = rig.create();
    let elsewhere = answered(ask(&replica, add("c", 5), id(1, Some(9)))).unwrap_err();
    assert_eq!(elsewhere.code, ErrorCode::Unknown);
    let late = OpId { age_ms: 700_000, ..id(2, Some(1)) };
    assert_eq!(answered(ask(&replica, add("c", 5), late)).unwrap_err().code, ErrorCode::Unknown);
    assert_eq!(counter(&replica, "c"), None, "nothing was done");
    // A result older than ten minutes is gone, and that is detected.
    number(answered(ask(&replica, add("c", 5), id(3, None))));
    rig.clock.set(START_US + 601_000_000);
    number(answered(ask(&replica, add("c", 1), id(4, None))));
    let forgotten = OpId { age_ms: 590_000, ..id(3, Some(1)) };
    rig.clock.set(START_US + 590_000_000);
    assert_eq!(
        answered(ask(&replica, add("c", 5), forgotten)).unwrap_err().code,
        ErrorCode::Unknown
    );
    assert_eq!(counter(&replica, "c"), Some(6));
}

#[test]
fn two_modifications_in_one_group_see_each_other() {
    let rig = Rig::new();
    let replica = rig.create();
    let release = hold_writer(&replica);
    let answers: Vec<WriteReply> =
        (0..50).map(|n| ask(&replica, add("c", 1), id(n, None))).collect();
    let put_if_absent = || WriteOp {
        change: OpKind::Put { value: "x".into(), ttl_ms: None, condition: Some(Condition::Absent) },
        ..put("once", "")
    };
    let races: Vec<WriteReply> =
        (100..110).map(|n| ask(&replica, put_if_absent(), id(n, None))).collect();
    drop(release);
    let sums: Vec<i64> = answers.into_iter().map(|answer| number(answered(answer))).collect();
    assert_eq!(sums, (1..=50).collect::<Vec<i64>>());
    let outcomes: Vec<OpOutcome> =
        races.into_iter().map(|answer| answered(answer).unwrap()).collect();
    let won =
        outcomes.iter().filter(|outcome| matches!(outcome, OpOutcome::Modified { .. })).count();
    assert_eq!(won, 1, "{outcomes:?}");
}

#[test]
fn a_modification_that_fails_changes_nothing() {
    let rig = Rig::new();
    let replica = rig.create();
    write_one(&replica, put("text", "abc"));
    let logged = replica.log().appended_lsn();
    let refused = answered(ask(&replica, add("text", 1), id(1, None))).unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongType);
    assert_eq!(replica.log().appended_lsn(), logged);
    assert_eq!(get(&replica, "text").as_deref(), Some("abc"));
}

#[test]
fn only_the_primary_does_it_and_one_that_hands_over_lets_it_wait() {
    let rig = Rig::new();
    let replica = rig.create();
    let apply_catalog = |version, role| {
        control(
            &replica,
            Control::ApplyCatalog { epoch: Epoch(version), version: CatalogVersion(version), role },
        )
        .unwrap();
    };
    apply_catalog(2, Role::Secondary);
    assert_eq!(
        answered(ask(&replica, add("c", 1), id(1, None))).unwrap_err().code,
        ErrorCode::NotPrimary
    );
    write_one(&replica, put("any", "replica takes puts"));
    apply_catalog(3, Role::TransferringLeadership);
    let waits = ask(&replica, add("c", 1), id(2, None));
    write_one(&replica, put("any", "also now"));
    assert!(waits.try_recv().is_err());
    apply_catalog(4, Role::Secondary);
    assert_eq!(answered(waits).unwrap_err().code, ErrorCode::NotPrimary);
    apply_catalog(5, Role::TransferringLeadership);
    let waits = ask(&replica, add("c", 1), id(3, None));
    apply_catalog(6, Role::Primary);
    assert_eq!(number(answered(waits)), 1, "a hand-over that was undone");
    // A primary that was replaced while it was away does nothing before it has applied that
    // version.
    replica.primary_from(CatalogVersion(9));
    assert_eq!(
        answered(ask(&replica, add("c", 1), id(4, None))).unwrap_err().code,
        ErrorCode::NotPrimary
    );
    apply_catalog(9, Role::Primary);
    assert_eq!(number(answered(ask(&replica, add("c", 1), id(5, None)))), 2);
    apply_catalog(10, Role::Detached);
    assert_eq!(try_write(&replica, vec![put("k", "v")]).unwrap_err().code, ErrorCode::WrongEpoch);
}

/// The report counts the keys: results, origins and the replica's own rows are none.
#[test]
fn results_kept_for_repetitions_do_not_count_as_keys() {
    let rig = Rig::new();
    let replica = rig.create();
    let kept = |replica: &Replica| {
        replica.engine().with_prefix(&MetaKey::result_prefix()).unwrap().len() as u64
    };
    let counted = |replica: &Replica| replica.shared.results.load(Ordering::Relaxed);
    // Few bands: RocksDB counts the entries of a few new tables at a time.
    let keys: Vec<String> =
        [1, 2].into_iter().flat_map(|band| keys_in(Band(band), "c", 150)).collect();
    for (n, key) in keys.iter().enumerate() {
        number(answered(ask(&replica, add(key, 1), id(n as u64, None))));
    }
    assert_eq!((kept(&replica), counted(&replica)), (300, 300));
    replica.engine().flush().unwrap();
    assert_eq!(replica.size().0, 300);
    replica.engine().compact_all();
    assert_eq!(replica.size().0, 300, "also when they have tables of their own");
    // Expired results are removed with the next request.
    rig.clock.set(START_US + 601_000_000);
    number(answered(ask(&replica, add("c", 1), id(300, None))));
    assert_eq!((kept(&replica), counted(&replica)), (1, 1));
    // A replay restores results whose removal was not flushed; the next request removes them again.
    let (_dir, again) = rig.crash(&replica);
    assert_eq!(counted(&again), kept(&again));
}

#[test]
fn a_counter_ends_with_the_time_to_live_it_began_with() {
    let rig = Rig::new();
    let replica = rig.create();
    let add = || WriteOp { created_ttl_ms: Some(1_000), ..add("c", 1) };
    assert_eq!(number(answered(ask(&replica, add(), id(1, None)))), 1);
    rig.clock.set(START_US + 900_000);
    assert_eq!(number(answered(ask(&replica, add(), id(2, None)))), 2);
    assert_eq!(counter(&replica, "c"), Some(2));
    rig.clock.set(START_US + 1_000_000);
    assert_eq!(counter(&replica, "c"), None, "counted from the first addition");
    assert_eq!(number(answered(ask(&replica, add(), id(3, None)))), 1, "and it begins anew");
}

/// Between the two epochs another replica may have been primary without this result.
#[test]
fn a_result_that_was_kept_under_an_earlier_epoch_counts_as_replicated_no_more() {
    let rig = Rig::new();
    let replica = rig.create();
    let apply_catalog = |epoch| {
        let order = Control::ApplyCatalog {
            epoch: Epoch(epoch),
            version: CatalogVersion(epoch),
            role: Role::Primary,
        };
        control(&replica, order).unwrap();
    };
    apply_catalog(1);
    replica.followers().expect([ReplicaId(2)], [ReplicaId(2)]);
    let first = ask_for(Ack::Replica, &replica, add("c", 5), id(1, None));
    let confirm = |epoch| {
        let Some(own_seq) = replica.vector().values().last().copied() else { return };
        replica.followers().progress(ReplicaId(2), replica.applied_lsn(), own_seq, Epoch(epoch));
    };
    // A row can be read a moment before the vector names its record.
    let first = loop {
        confirm(1);
        if let Ok(answer) = first.recv_timeout(Duration::from_millis(5)) {
            break answer.map(|mut outcomes| outcomes.remove(0));
        }
    };
    assert_eq!(number(first), 5);
    assert_eq!(number(answered(ask_for(Ack::Replica, &replica, add("c", 5), id(1, Some(1))))), 5);
    apply_catalog(2);
    let again = ask_for(Ack::Replica, &replica, add("c", 5), id(1, Some(1)));
    write_one(&replica, put("another", "write"));
    confirm(2);
    assert_eq!(answered(again).unwrap_err().code, ErrorCode::Unknown);
    // The same holds after a restart; a request for a lower level gets the result of this replica.
    let (_dir, restarted) = rig.crash(&replica);
    restarted.followers().expect([ReplicaId(2)], [ReplicaId(2)]);
    let again = ask_for(Ack::Replica, &restarted, add("c", 5), id(1, Some(1)));
    assert_eq!(answered(again).unwrap_err().code, ErrorCode::Unknown);
    assert_eq!(number(answered(ask(&restarted, add("c", 5), id(1, Some(1))))), 5);
}
