//! Replay equals live: after any history, a crash and a restart yield the same replica.

use proptest::prelude::*;
use vasto_core::Band;
use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Lsn, Origin, OwnSeq, PlanId, ReplicaId};
use vasto_core::record::{BandRange, Body, FeedProgress, KeyEntry, RangeState};
use vasto_core::stored_key::MetaKey;

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{Control, OpKind, Role, WriteOp};
use crate::replica::state::{Head, Identity};

#[derive(Debug, Clone)]
enum Step {
    Batch(Vec<(u8, u8, Option<u16>, Option<u16>)>, bool),
    Apply(Vec<(u8, u16, bool)>, u64),
    Seal(u8),
    Unseal,
    Range(u8, bool),
    Flush,
    Compact,
    Clock(i32),
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let op = (
        0u8..24,
        any::<u8>(),
        proptest::option::of(any::<u16>()),
        proptest::option::of(1u16..2000),
    );
    prop_oneof![
        8 => (proptest::collection::vec(op, 1..6), any::<bool>()).prop_map(|(ops, synced)| Step::Batch(ops, synced)),
        3 => (proptest::collection::vec((0u8..24, any::<u16>(), any::<bool>()), 0..5), 1u64..100).prop_map(|(e, lsn)| Step::Apply(e, lsn)),
        1 => (1u8..6).prop_map(Step::Seal),
        1 => Just(Step::Unseal),
        1 => (1u8..4, any::<bool>()).prop_map(|(band, clear)| Step::Range(band, clear)),
        1 => Just(Step::Flush),
        1 => Just(Step::Compact),
        2 => any::<i32>().prop_map(Step::Clock),
        1 => Just(Step::Crash),
    ]
}

fn key(number: u8) -> String {
    format!("key-{number}")
}

fn op((number, value, event_time, ttl): (u8, u8, Option<u16>, Option<u16>)) -> WriteOp {
    let change = match value % 4 {
        0 => OpKind::Delete { condition: None },
        _ => OpKind::Put {
            value: vec![value; usize::from(value)].into(),
            ttl_ms: ttl.map(u64::from),
            condition: None,
        },
    };
    let event_time = event_time.map(|time| START_US + u64::from(time));
    WriteOp {
        key: key(number).into_bytes().into(),
        partition_hash: None,
        event_time,
        change,
        created_ttl_ms: None,
    }
}

fn entry((number, time, tombstone): (u8, u16, bool)) -> KeyEntry {
    let time_us = START_US + u64::from(time);
    if tombstone {
        tombstone_entry(&key(number), time_us, START_US)
    } else {
        value_entry(&key(number), time_us, &time.to_string())
    }
}

fn one_band(band: u8) -> BandRange {
    BandRange { first: Band(band), last: Band(band) }
}

/// Executes a step; an answer other than success is one that the state allows.
fn take(rig: &Rig, replica: &Replica, step: &Step) {
    match step {
        Step::Batch(ops, synced) => {
            let ack = if *synced { Ack::Fsync } else { Ack::Os };
            let answer = send(replica, ops.iter().copied().map(op).collect(), ack);
            // A write to a sealed band is answered later; the writer executes this command after
            // everything before it.
            control(
                replica,
                Control::ApplyCatalog {
                    epoch: Default::default(),
                    version: Default::default(),
                    role: Role::Primary,
                },
            )
            .unwrap();
            drop(answer);
        }
        Step::Apply(entries, lsn) => {
            let progress = vec![FeedProgress::Tail(ReplicaId(9), Lsn(*lsn))];
            let _ = apply(replica, entries.iter().copied().map(entry).collect(), progress);
        }
        Step::Seal(band) => {
            let order = Control::Seal {
                plan: PlanId(u64::from(*band)),
                version: CatalogVersion(u64::from(*band)),
                range: one_band(*band),
            };
            control(replica, order).unwrap();
        }
        Step::Unseal => {
            control(replica, Control::Unseal { version: CatalogVersion(9) }).unwrap();
        }
        Step::Range(band, clear) => {
            set_range(
                replica,
                one_band(*band),
                if *clear { RangeState::Clearing } else { RangeState::Leaving },
            );
            if !clear {
                set_range(replica, one_band(*band), RangeState::Owned);
            }
        }
        Step::Flush => replica.engine().flush().unwrap(),
        Step::Compact => replica.engine().compact_all(),
        Step::Clock(by) => {
            let now = rig.clock.0.load(std::sync::atomic::Ordering::SeqCst);
            rig.clock.set(now.saturating_add_signed(i64::from(*by) / 1000).max(START_US / 2));
        }
        Step::Crash => {}
    }
}

fn head(rows: &Rows) -> Head {
    Head::decode(&rows[&MetaKey::Head.encode()]).unwrap()
}

/// Checks that the reopened replica is the live one plus one `adopt` record.
fn assert_same(live: &Replica, again: &Replica) {
    assert_eq!(data_rows(live), data_rows(again));
    let (before, mut after) = (meta_rows(live), meta_rows(again));
    let (was, is) = (head(&before), head(&after));
    assert_eq!(is.applied_lsn, was.applied_lsn.next());
    assert_eq!(is.own_seq, OwnSeq(1));
    assert!(is.commit_time > was.commit_time);
    assert_eq!(
        (is.event_time_max, is.floor, is.epoch, is.version),
        (was.event_time_max, was.floor, was.epoch, was.version)
    );
    let incarnation = live.incarnation().0 + 1;
    assert_eq!(again.incarnation().0, incarnation);
    let identity = Identity::decode(&after[&MetaKey::Identity.encode()]).unwrap();
    assert_eq!(identity.incarnation.0, incarnation);
    let origin = Origin { replica: again.id, incarnation: identity.incarnation };
    assert_eq!(after.remove(&MetaKey::Vector(origin).encode()), Some(1u64.to_le_bytes().to_vec()));
    for key in [MetaKey::Head.encode(), MetaKey::Identity.encode()] {
        after.remove(&key);
    }
    let rest: Rows = before
        .into_iter()
        .filter(|(key, _)| *key != MetaKey::Head.encode() && *key != MetaKey::Identity.encode())
        .collect();
    assert_eq!(rest, after, "vector, cursors, range states and seal");
    assert_eq!(live.tail_cursors().unwrap(), again.tail_cursors().unwrap());
    let log = records(again);
    assert_log_is_whole(&log);
    assert!(matches!(log.last().unwrap().body, Body::Adopt { .. }));
    assert_eq!(log.last().unwrap().lsn, again.applied_lsn());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_crashed_replica_opens_with_every_key_and_all_metadata(steps in proptest::collection::vec(step(), 1..40)) {
        let rig = Rig::new();
        let mut replica = rig.create();
        let mut rig = rig;
        for step in &steps {
            take(&rig, &replica, step);
            if matches!(step, Step::Crash) {
                let (dir, again) = rig.crash(&replica);
                assert_same(&replica, &again);
                replica = again;
                rig.path = dir;
            }
        }
        let (_dir, again) = rig.crash(&replica);
        assert_same(&replica, &again);
    }
}

#[test]
fn a_stop_and_a_start_are_one_more_incarnation_and_nothing_else() {
    let rig = Rig::new();
    let mut opened = Some(rig.create());
    for round in 1..=4u64 {
        let replica = opened.take().unwrap();
        write_one(&replica, put(&format!("round {round}"), "x"));
        assert_eq!(replica.incarnation().0, round);
        let rows = data_rows(&replica);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(replica.stop());
        assert_eq!(
            try_write(&replica, vec![put("late", "x")]).unwrap_err().code,
            vasto_core::ErrorCode::Unavailable
        );
        rig.close(replica);
        let mut again = None;
        // The writer's thread releases the database shortly after it has reported its end.
        wait_for("the lock of the database", || {
            again = rig.open(&rig.path, false).ok();
            again.is_some()
        });
        let again = again.unwrap();
        assert_eq!(data_rows(&again), rows);
        assert_log_is_whole(&records(&again));
        opened = Some(again);
    }
}

#[test]
fn a_log_that_was_cut_short_or_beheaded_stops_the_replica_with_a_named_error() {
    use crate::replica::OpenError;
    let rig = Rig::new();
    let replica = rig.create();
    write_one(&replica, put("k", "v"));
    replica.engine().flush().unwrap();
    let (dir, again) = rig.crash(&replica);
    rig.close(again);
    let log = crate::replica::log_dir(&dir);
    for file in std::fs::read_dir(&log).unwrap() {
        std::fs::remove_file(file.unwrap().path()).unwrap();
    }
    let mut refused = None;
    wait_for("the lock of the database", || {
        refused = rig.open(&dir, false).err();
        !matches!(refused, Some(OpenError::Engine(_)))
    });
    assert!(matches!(refused, Some(OpenError::LogBehind { .. })), "{refused:?}");
}
