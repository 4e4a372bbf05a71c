//! What is durable before writers go on at a cutover, and what is durable behind it.

use std::thread::JoinHandle;
use std::time::Duration;

use vasto_core::catalog::Ack;
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, PlanId, ReplicaId, ShardId, covers};
use vasto_core::record::{BandRange, FeedProgress, RangeState};
use vasto_core::{Band, ErrorCode};

use super::support::*;
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};

const MOVING: BandRange = BandRange { first: Band(1), last: Band(1) };
const SEALING: CatalogVersion = CatalogVersion(5);
/// Long enough for a writer to show what it should not.
const A_MOMENT: Duration = Duration::from_millis(50);

fn seal() -> Control {
    Control::Seal { plan: PlanId(1), version: SEALING, range: MOVING }
}

fn becomes(state: RangeState) -> Control {
    Control::SetRange { epoch: Epoch(2), version: CatalogVersion(6), range: MOVING, state }
}

/// Gives an order without waiting for its answer.
fn begin(replica: &Replica, order: Control) -> JoinHandle<Result<Lsn, ReplicaError>> {
    let replica = replica.clone();
    std::thread::spawn(move || control(&replica, order))
}

fn moving_key() -> String {
    keys_in(Band(1), "m", 1).remove(0)
}

/// The version in the bucket has decided; the record is for after a crash.
#[test]
fn waiting_writes_are_sent_on_before_the_record_that_gives_their_range_away_is_durable() {
    let rig = Rig::new();
    let replica = rig.create();
    let key = moving_key();
    write_one(&replica, put(&key, "before"));
    control(&replica, seal()).unwrap();
    let waiting = send(&replica, vec![put(&key, "late")], Ack::Fsync);
    let (synced, held) = (replica.log().synced_lsn(), replica.vector());
    let syncs = replica.log().hold_syncs();
    let giving = begin(&replica, becomes(RangeState::Leaving));
    assert_eq!(waiting.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::WrongEpoch);
    assert_eq!(try_get(&replica, &key).unwrap_err().code, ErrorCode::WrongEpoch, "nor are reads");
    assert_eq!(replica.log().synced_lsn(), synced);
    assert!(!giving.is_finished(), "the order is answered once it is durable");
    // Its disk hangs, and another replica takes over: it is told all that was acknowledged.
    assert_eq!(replica.settled().vector, held);
    drop(syncs);
    let lsn = giving.join().unwrap().unwrap();
    assert!(replica.log().synced_lsn() >= lsn);
    let pause = replica.take_pause().unwrap();
    assert!(pause.began <= pause.sealed && pause.sealed <= pause.released);
    assert!(replica.take_pause().is_none());
}

/// A write that is acknowledged as durable comes behind the record, and makes it durable, too.
#[test]
fn a_range_is_opened_before_its_record_is_durable() {
    let rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Arriving);
    let replica = rig.create();
    let key = moving_key();
    assert!(try_get(&replica, &key).is_err());
    let syncs = replica.log().hold_syncs();
    let opening = begin(&replica, becomes(RangeState::Owned));
    wait_for("the range to be served", || try_get(&replica, &key).is_ok());
    assert_eq!(replica.epoch(), Epoch(2), "it is published with the range");
    let written = send(&replica, vec![put(&key, "v")], Ack::Fsync);
    assert!(!opening.is_finished());
    drop(syncs);
    let lsn = opening.join().unwrap().unwrap();
    written.recv_timeout(DEADLINE).unwrap().unwrap();
    assert!(replica.log().synced_lsn() > lsn);
}

/// What was taken before it is what the new owner gets: after a crash the seal must be there.
#[test]
fn a_seal_is_seen_by_nobody_before_it_is_durable() {
    let rig = Rig::new();
    let replica = rig.create();
    let appended = replica.log().appended_lsn();
    let syncs = replica.log().hold_syncs();
    let sealing = begin(&replica, seal());
    wait_for("the seal to be logged", || replica.log().appended_lsn() > appended);
    std::thread::park_timeout(A_MOMENT);
    assert!(replica.ranges().seal.is_none() && replica.position_at_seal(SEALING).is_none());
    assert!(!sealing.is_finished());
    drop(syncs);
    let lsn = sealing.join().unwrap().unwrap();
    assert_eq!(replica.ranges().seal.unwrap().lsn, lsn);
}

#[test]
fn a_seal_names_what_the_replica_held_then_whatever_comes_later() {
    let rig = Rig::new();
    let replica = rig.create();
    let staying = keys_in(Band(2), "s", 1).remove(0);
    // Acknowledged before it is durable: the sync of the seal is its own, too.
    send(&replica, vec![put(&staying, "before")], Ack::Os).recv_timeout(DEADLINE).unwrap().unwrap();
    let before = replica.vector();
    let lsn = control(&replica, seal()).unwrap();
    write_one(&replica, put(&staying, "after"));
    let held = replica.position_at_seal(SEALING).unwrap();
    assert_eq!((held.lsn, &held.vector), (lsn, &before));
    assert!(!covers(&held.vector, &replica.vector()));
    assert!(replica.position_at_seal(CatalogVersion(6)).is_none(), "another seal");
    let (_dir, again) = rig.crash(&replica);
    assert!(again.position_at_seal(SEALING).is_none(), "it is asked for what it holds now");
}

#[test]
fn entries_of_a_tail_are_visible_before_they_are_durable_and_become_so_by_themselves() {
    let rig = Rig::new();
    let replica = rig.create();
    let syncs = replica.log().hold_syncs();
    let (entries, source) = (vec![value_entry("k", START_US, "v")], ReplicaId(9));
    let progress = vec![FeedProgress::Tail(source, Lsn(4))];
    let applied = replica.apply_as(entries, progress, false);
    let lsn = futures::executor::block_on(applied).unwrap();
    assert_eq!(get(&replica, "k").as_deref(), Some("v"));
    assert!(replica.log().synced_lsn() < lsn && replica.settled_lsn() < lsn);
    drop(syncs);
    wait_for("the log to be synced", || replica.log().synced_lsn() >= lsn);
    assert_eq!(replica.tail_cursors().unwrap(), [(source, Lsn(4))]);
}
