//! A sealed range: its writes wait, its reads go on for a while, all other requests go on
//! indefinitely.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Lsn, PlanId};
use vasto_core::record::{BandRange, Body, RangeState};
use vasto_core::{Band, ErrorCode};

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};

const MOVING: BandRange = BandRange { first: Band(1), last: Band(1) };

fn seal(replica: &Replica, plan: u64, version: u64) -> Result<Lsn, ReplicaError> {
    control(
        replica,
        Control::Seal { plan: PlanId(plan), version: CatalogVersion(version), range: MOVING },
    )
}

/// Returns a key that moves and one that stays.
fn keys() -> (String, String) {
    (keys_in(Band(1), "m", 1).remove(0), keys_in(Band(2), "s", 1).remove(0))
}

#[test]
fn writes_to_a_sealed_range_wait_and_an_unseal_applies_them() {
    let rig = Rig::new();
    let replica = rig.create();
    let (moving, staying) = keys();
    write_one(&replica, put(&moving, "before"));
    let sealed_at = seal(&replica, 1, 5).unwrap();
    assert!(replica.log().synced_lsn() >= sealed_at, "a seal is answered once it is durable");
    let waiting = send(&replica, vec![put(&moving, "during")], Ack::Fsync);
    // A batch that touches the range waits as a whole.
    let mixed = send(&replica, vec![put(&staying, "mixed"), put(&moving, "mixed")], Ack::Fsync);
    write_one(&replica, put(&staying, "goes on"));
    assert_eq!(waiting.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    assert_eq!(mixed.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    assert_eq!(get(&replica, &moving).as_deref(), Some("before"), "reads go on");
    assert_eq!(get(&replica, &staying).as_deref(), Some("goes on"));
    let touched = |record: &vasto_core::record::Record| data_keys(record).contains(&moving);
    assert!(
        records(&replica)
            .iter()
            .filter(|record| record.lsn > sealed_at)
            .all(|record| !touched(record))
    );
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
    waiting.recv_timeout(DEADLINE).unwrap().unwrap();
    mixed.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(get(&replica, &moving).as_deref(), Some("mixed"), "in the order they came");
    assert!(!replica.take_pauses().is_empty());
}

#[test]
fn giving_the_range_away_sends_the_waiting_writes_on() {
    let rig = Rig::new();
    let replica = rig.create();
    let (moving, staying) = keys();
    write_one(&replica, put(&moving, "before"));
    seal(&replica, 1, 5).unwrap();
    let waiting = send(&replica, vec![put(&moving, "late")], Ack::Fsync);
    control(
        &replica,
        Control::SetRange {
            epoch: Default::default(),
            version: CatalogVersion(6),
            range: MOVING,
            state: RangeState::Leaving,
        },
    )
    .unwrap();
    assert_eq!(waiting.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::WrongEpoch);
    assert_eq!(
        try_write(&replica, vec![put(&moving, "x")]).unwrap_err().code,
        ErrorCode::WrongEpoch
    );
    assert_eq!(try_get(&replica, &moving).unwrap_err().code, ErrorCode::WrongEpoch);
    write_one(&replica, put(&staying, "goes on"));
    assert_eq!(replica.ranges().seal, None);
    // A refused write is not applied later.
    let (_dir, again) = rig.crash(&replica);
    assert!(!records(&again).iter().any(|record| {
        let Body::Data { entries, .. } = &record.body else { return false };
        entries.iter().any(|entry| entry.entry.ends_with(b"late"))
    }));
}

#[test]
fn a_write_that_waits_too_long_is_sent_back_and_never_applied() {
    let rig = Rig::new();
    let replica = rig.create();
    let (moving, _) = keys();
    seal(&replica, 1, 5).unwrap();
    let waiting = send(&replica, vec![put(&moving, "overdue")], Ack::Fsync);
    assert_eq!(waiting.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::NodeBehind);
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
    assert_eq!(get(&replica, &moving), None);
}

#[test]
fn reads_of_a_sealed_range_end_with_the_patience_of_the_boot_clock() {
    let rig = Rig::new();
    let replica = rig.create();
    seal(&replica, 1, 5).unwrap();
    let ranges = replica.ranges();
    assert!(!ranges.is_stale(Band(1), Duration::from_secs(3600)));
    wait_for("the seal to age", || ranges.is_stale(Band(1), Duration::from_millis(1)));
    assert!(!ranges.is_stale(Band(2), Duration::ZERO), "other bands never");
    // With the real time-out: gets and scans alike are refused in the end, until the outcome is
    // known.
    let (moving, staying) = keys();
    wait_for(
        "reads to be refused",
        || matches!(try_get(&replica, &moving), Err(error) if error.code == ErrorCode::NodeBehind),
    );
    assert_eq!(
        replica.scan(replica.epoch(), &Default::default()).unwrap_err().code,
        ErrorCode::NodeBehind
    );
    assert_eq!(try_get(&replica, &staying).unwrap(), None);
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
    assert_eq!(try_get(&replica, &moving).unwrap(), None);
    replica.scan(replica.epoch(), &Default::default()).unwrap();
}

#[test]
fn a_replica_that_restarts_sealed_stays_sealed_and_reads_nothing_of_the_range() {
    let rig = Rig::new();
    let replica = rig.create();
    let (moving, staying) = keys();
    write(&replica, vec![put(&moving, "before"), put(&staying, "before")]);
    let lsn = seal(&replica, 3, 5).unwrap();
    for flushed in [false, true] {
        if flushed {
            replica.engine().flush().unwrap();
        }
        let (_dir, again) = rig.crash(&replica);
        let restored = again.ranges().seal.unwrap();
        assert_eq!(
            (restored.plan, restored.version, restored.range, restored.lsn),
            (PlanId(3), CatalogVersion(5), MOVING, lsn)
        );
        assert_eq!(try_get(&again, &moving).unwrap_err().code, ErrorCode::NodeBehind);
        assert_eq!(get(&again, &staying).as_deref(), Some("before"));
        let waiting = send(&again, vec![put(&moving, "after")], Ack::Fsync);
        write_one(&again, put(&staying, "after"));
        assert_eq!(waiting.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
        assert_eq!(
            seal(&again, 3, 5).unwrap(),
            lsn,
            "asked again after the restart, it answers the same"
        );
        assert_eq!(
            try_get(&again, &moving).unwrap_err().code,
            ErrorCode::NodeBehind,
            "asking again does not revive reads"
        );
        control(&again, Control::Unseal { version: CatalogVersion(6) }).unwrap();
        waiting.recv_timeout(DEADLINE).unwrap().unwrap();
        assert_eq!(get(&again, &moving).as_deref(), Some("after"));
    }
}

#[test]
fn the_same_seal_is_one_record_and_a_new_version_is_another() {
    let rig = Rig::new();
    let replica = rig.create();
    let first = seal(&replica, 1, 5).unwrap();
    assert_eq!(seal(&replica, 1, 5).unwrap(), first);
    assert_eq!(replica.applied_lsn(), first);
    control(&replica, Control::Unseal { version: CatalogVersion(6) }).unwrap();
    let again = seal(&replica, 1, 7).unwrap();
    assert!(again > first);
    assert_eq!(seal(&replica, 1, 7).unwrap(), again);
    let seals =
        records(&replica).iter().filter(|record| matches!(record.body, Body::Seal { .. })).count();
    assert_eq!(seals, 2);
}
