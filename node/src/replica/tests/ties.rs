//! Equal event times: kind, then bytes decide, whichever write comes first and on whatever path.

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{OpOutcome, WriteOp};

const T: u64 = START_US + 5_000_000;

/// Returns pairs of writes with one event time; the second of a pair wins.
fn pairs() -> Vec<(&'static str, WriteOp, WriteOp)> {
    vec![
        ("bytes", put("bytes", "aaa"), put("bytes", "bbb")),
        ("longer", put("longer", "a"), put("longer", "ab")),
        ("kind", put("kind", "zzz"), delete("kind")),
    ]
}

fn expected(key: &str) -> Option<&'static str> {
    match key {
        "bytes" => Some("bbb"),
        "longer" => Some("ab"),
        _ => None,
    }
}

fn check(replica: &Replica, path: &str) {
    for (key, _, _) in pairs() {
        assert_eq!(get(replica, key).as_deref(), expected(key), "{key}, {path}");
    }
}

#[test]
fn ties_on_the_write_path_are_decided_by_kind_then_bytes_in_both_orders() {
    for loser_first in [true, false] {
        let rig = Rig::new();
        let replica = rig.create();
        for (key, loser, winner) in pairs() {
            let (loser, winner) = (at(T, loser), at(T, winner));
            if loser_first {
                assert_eq!(write_one(&replica, loser), OpOutcome::Applied(T), "{key}");
                assert_eq!(write_one(&replica, winner), OpOutcome::Applied(T), "{key}");
            } else {
                assert_eq!(write_one(&replica, winner), OpOutcome::Applied(T), "{key}");
                let logged = replica.log().appended_lsn();
                assert_eq!(write_one(&replica, loser), OpOutcome::Superseded(T), "{key}");
                assert_eq!(
                    replica.log().appended_lsn(),
                    logged,
                    "a superseded write is not logged"
                );
            }
        }
        check(&replica, "live");
        let (_dir, again) = rig.crash(&replica);
        check(&again, "replayed");
    }
}

#[test]
fn ties_inside_one_group_are_decided_alike() {
    for loser_first in [true, false] {
        let rig = Rig::new();
        let replica = rig.create();
        let ops = pairs().into_iter().flat_map(|(_, loser, winner)| {
            let (loser, winner) = (at(T, loser), at(T, winner));
            if loser_first { [loser, winner] } else { [winner, loser] }
        });
        write(&replica, ops.collect());
        check(&replica, "one batch");
        let (_dir, again) = rig.crash(&replica);
        check(&again, "one batch, replayed");
    }
}

#[test]
fn ties_on_the_apply_path_are_decided_alike_and_repetition_changes_nothing() {
    let entries = vec![
        (value_entry("bytes", T, "aaa"), value_entry("bytes", T, "bbb")),
        (value_entry("longer", T, "a"), value_entry("longer", T, "ab")),
        (value_entry("kind", T, "zzz"), tombstone_entry("kind", T, START_US)),
    ];
    for loser_first in [true, false] {
        let rig = Rig::new();
        let replica = rig.create();
        for (loser, winner) in entries.clone() {
            let order = if loser_first { [loser, winner] } else { [winner, loser] };
            for entry in order {
                apply(&replica, vec![entry], Vec::new()).unwrap();
            }
        }
        check(&replica, "applied");
        let before = data_rows(&replica);
        let all = entries.iter().flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
        let logged = replica.log().appended_lsn();
        apply(&replica, all, Vec::new()).unwrap();
        assert_eq!(data_rows(&replica), before);
        assert_eq!(replica.log().appended_lsn(), logged, "what loses is not logged");
        let (_dir, again) = rig.crash(&replica);
        check(&again, "applied, replayed");
    }
}

#[test]
fn replicas_that_get_the_same_writes_in_any_order_hold_the_same_bytes() {
    let (rig_a, rig_b) = (Rig::new(), Rig::new());
    let (first, second) = (rig_a.create(), rig_b.create());
    let entries: Vec<_> = (0..60)
        .map(|i| match i % 3 {
            0 => tombstone_entry(&format!("k{}", i % 7), T + i / 20, START_US + i),
            _ => value_entry(&format!("k{}", i % 7), T + i / 20, &format!("{i}")),
        })
        .collect();
    for entry in &entries {
        apply(&first, vec![entry.clone()], Vec::new()).unwrap();
    }
    apply(&second, entries.into_iter().rev().collect(), Vec::new()).unwrap();
    assert_eq!(data_rows(&first), data_rows(&second));
}
