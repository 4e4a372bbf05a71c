//! Removal of a range that was given away: nothing of it stays, nothing else is touched, and a
//! crash between any two steps is recovered.

use vasto_core::Band;
use vasto_core::ids::CatalogVersion;
use vasto_core::record::{BandRange, RangeState};

use super::support::*;
use crate::host::clean_up;
use crate::replica::Replica;
use crate::replica::command::Control;

const RANGE: BandRange = BandRange { first: Band(2), last: Band(3) };
const VERSION: CatalogVersion = CatalogVersion(8);

/// Creates old versions at the bottom level, newer ones and tombstones in an L0 file that spans all
/// bands, the newest versions in the memtable; then gives the range away.
fn given_away() -> (Rig, Replica) {
    let rig = Rig::new();
    let replica = rig.create();
    let keys: Vec<String> = (1..=5).flat_map(|band| keys_in(Band(band), "k", 40)).collect();
    let write_all = |value: &str, step: usize| {
        let ops = keys.iter().step_by(step).map(|key| put(key, value)).collect();
        write(&replica, ops);
    };
    write_all("oldest", 1);
    replica.engine().flush().unwrap();
    replica.engine().compact_all();
    write_all("newer", 2);
    write(&replica, keys.iter().skip(1).step_by(4).map(|key| delete(key)).collect());
    replica.engine().flush().unwrap();
    write_all("newest", 5);
    set_range(&replica, RANGE, RangeState::Leaving);
    let levels: Vec<_> =
        replica.engine().live_files().unwrap().iter().map(|file| file.level).collect();
    assert!(levels.contains(&0) && levels.iter().any(|level| *level > 0), "{levels:?}");
    (rig, replica)
}

fn outside(rows: &Rows) -> Rows {
    rows.iter()
        .filter(|(key, _)| !RANGE.contains(Band(key[0])))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn anything_visible(replica: &Replica) -> bool {
    replica.engine().any_in(RANGE).unwrap()
}

/// Returns true when an SST overlaps the range, also when a range delete hides its keys.
fn anything_on_disk(replica: &Replica) -> bool {
    replica.engine().live_files().unwrap().iter().any(|file| {
        let (first, last) =
            (file.start_key.as_ref().unwrap()[0], file.end_key.as_ref().unwrap()[0]);
        first <= RANGE.last.0 && last >= RANGE.first.0
    })
}

fn clean(replica: &Replica) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    runtime.block_on(clean_up(replica, RANGE, VERSION)).unwrap();
}

fn assert_clean(replica: &Replica, neighbours: &Rows, when: &str) {
    assert!(!anything_visible(replica), "{when}");
    // The check also detects a file that spans the range but holds nothing of it.
    assert!(!anything_on_disk(replica), "{when}: {:?}", replica.engine().live_files());
    assert_eq!(
        outside(&data_rows(replica)),
        *neighbours,
        "{when}: the neighbours are as they were"
    );
    assert!(replica.ranges().all_are(RANGE, RangeState::Empty), "{when}");
}

#[test]
fn a_clean_up_leaves_nothing_of_the_range_and_all_of_its_neighbours() {
    let (rig, replica) = given_away();
    let neighbours = outside(&data_rows(&replica));
    assert!(anything_visible(&replica) && !neighbours.is_empty());
    clean(&replica);
    assert_clean(&replica, &neighbours, "cleaned");
    clean(&replica);
    assert_clean(&replica, &neighbours, "cleaned twice");
    let (_dir, again) = rig.crash(&replica);
    assert_clean(&again, &neighbours, "after a restart");
    // The range can be filled again, and no old value becomes visible.
    set_range(&again, RANGE, RangeState::Owned);
    for band in RANGE.bands() {
        for key in keys_in(band, "k", 40) {
            assert_eq!(get(&again, &key), None, "{key}");
        }
    }
}

#[test]
fn dropping_files_alone_is_not_a_clean_up() {
    // Control of the test above: that test must detect what this leaves behind.
    let (_rig, replica) = given_away();
    let before = data_rows(&replica);
    replica.engine().delete_files_in(RANGE).unwrap();
    assert!(anything_visible(&replica), "memtable and L0 are still there");
    assert!(anything_on_disk(&replica));
    let left = data_rows(&replica);
    assert!(left.len() < before.len(), "whole files of the bottom level are gone");
    assert!(left.keys().any(|key| RANGE.contains(Band(key[0]))));
}

#[test]
fn a_clean_up_that_a_crash_interrupts_is_finished_by_the_next() {
    for steps in 0..=4 {
        let (rig, replica) = given_away();
        let neighbours = outside(&data_rows(&replica));
        let engine = replica.engine();
        let set = |state| {
            let _ = control(
                &replica,
                Control::SetRange {
                    epoch: Default::default(),
                    version: VERSION,
                    range: RANGE,
                    state,
                },
            )
            .unwrap();
        };
        if steps >= 1 {
            engine.delete_files_in(RANGE).unwrap();
        }
        if steps >= 2 {
            set(RangeState::Clearing);
        }
        if steps >= 3 {
            engine.flush().unwrap();
        }
        if steps >= 4 {
            engine.compact_bands(RANGE);
        }
        let (_dir, again) = rig.crash(&replica);
        let when = format!("crashed behind step {steps}");
        assert_eq!(outside(&data_rows(&again)), neighbours, "{when}");
        assert_eq!(anything_visible(&again), steps < 2, "{when}");
        assert!(
            !again.ranges().all_are(RANGE, RangeState::Empty),
            "{when}: it is not said to be empty too early"
        );
        clean(&again);
        assert_clean(&again, &neighbours, &when);
    }
}

#[test]
fn a_range_that_is_still_owned_is_never_removed() {
    let rig = Rig::new();
    let replica = rig.create();
    let keys = keys_in(Band(2), "k", 5);
    write(&replica, keys.iter().map(|key| put(key, "v")).collect());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    assert!(runtime.block_on(clean_up(&replica, RANGE, VERSION)).is_err());
    for key in keys {
        assert_eq!(get(&replica, &key).as_deref(), Some("v"));
    }
}
