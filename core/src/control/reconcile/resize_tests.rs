//! Grows and shrinks of one keyspace in any order: what holds of every version.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::outcome::abort;
use super::progress::Advance;
use super::quarantine::{end_quarantines, in_the_way};
use super::shrink_tests::{QUARANTINE_US, decided, done, keyspace, placed, resized};
use crate::catalog::{Catalog, Quarantine};
use crate::control::plan::Step;
use crate::ids::ReplicaId;

/// What a keyspace goes through in the property test.
#[derive(Debug, Clone)]
enum Event {
    /// Somebody asks for this many shards.
    Resize(u32),
    /// Somebody ends the quarantines that keep it from shrinking to this many.
    EndQuarantines(u32),
    /// Somebody cancels the running plan.
    Cancel,
    /// Time passes; then the master decides, by the reports of all replicas, or of all but those
    /// whose id leaves 1 when it is divided by `silent`.
    Decide { silent: Option<u64>, micros: u64 },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0u32..10).prop_map(Event::Resize),
        1 => (1u32..10).prop_map(Event::EndQuarantines),
        1 => Just(Event::Cancel),
        12 => (2u64..9, 1u64..400_000)
            .prop_map(|(silent, micros)| Event::Decide { silent: Some(silent), micros }),
        12 => (1u64..50).prop_map(|micros| Event::Decide { silent: None, micros }),
    ]
}

fn check_version(before: &Catalog, next: &Catalog) {
    assert_eq!(next.version.0, before.version.0 + 1);
    assert!(next.epoch >= before.epoch && next.next_replica >= before.next_replica);
    let shards: Vec<u32> = next.placement.iter().map(|shard| shard.shard.0).collect();
    assert_eq!(shards, (0..next.spec.shards).collect::<Vec<_>>(), "in order, each once");
    assert_eq!(next.epoch > before.epoch, next.placement != before.placement);
    let plan = next.plan.iter().filter(|plan| !plan.shrinks() && plan.step != Step::Committed);
    let mut ids: Vec<u64> = placed(next);
    ids.extend(plan.flat_map(|plan| &plan.targets).map(|target| target.replica.0));
    ids.extend(next.draining.iter().map(|draining| draining.replica.0));
    ids.extend(next.retired.iter().map(|retired| retired.replica.0));
    ids.extend(next.removed.iter().map(|removed| removed.0));
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "a replica has one part");
    assert!(ids.iter().all(|id| *id < next.next_replica.0));
    for Quarantine { plan, replicas, targets, others, .. } in &next.quarantines {
        let is_there = |id: &ReplicaId| next.is_placed(*id) || next.is_retired(*id);
        assert!(replicas.iter().all(is_there), "{plan} waits for a replica that has gone");
        let covers = targets.iter().chain(others).map(|(id, _)| *id);
        assert!(covers.into_iter().all(|id| next.is_placed(id)), "{plan} can never end");
    }
    let kept = |plan| next.quarantines.iter().any(|quarantine| quarantine.plan == plan);
    assert!(next.retired.iter().all(|retired| kept(retired.plan)), "{:?}", next.retired);
}

/// Returns the version that an event leads to, if any.
fn after(catalog: &Catalog, event: &Event, now_us: u64) -> Option<Catalog> {
    match *event {
        Event::Resize(to) => {
            let next = resized(catalog, to, now_us).ok()?;
            let shrinks = to < catalog.spec.shards;
            assert!(
                !shrinks || in_the_way(catalog, to).next().is_none(),
                "the bands are not empty"
            );
            Some(next)
        }
        Event::EndQuarantines(to) => end_quarantines(catalog, to, now_us, now_us).ok()?,
        Event::Cancel => abort(catalog, "cancelled", &done(catalog), now_us, now_us),
        Event::Decide { silent, .. } => {
            let mut reports = done(catalog);
            reports.retain(|replica, _| silent.is_none_or(|silent| replica.0 % silent != 1));
            match decided(catalog, &reports, now_us) {
                Advance::Write(next) => Some(*next),
                Advance::Wait(_) | Advance::Idle => None,
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn grows_and_shrinks_in_any_order_keep_the_catalog_sound_and_come_to_an_end(
        shards in 1u32..9,
        replicas in 1u32..4,
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut catalog = keyspace(shards, replicas);
        let mut now_us = 2_000;
        for event in &events {
            now_us += if let Event::Decide { micros, .. } = event { *micros } else { 1 };
            if let Some(next) = after(&catalog, event, now_us) {
                check_version(&catalog, &next);
                catalog = next;
            }
        }
        // All nodes report, and the quarantines end.
        for _ in 0..100 {
            now_us += QUARANTINE_US;
            let all = Event::Decide { silent: None, micros: 0 };
            let Some(next) = after(&catalog, &all, now_us) else { break };
            check_version(&catalog, &next);
            catalog = next;
        }
        prop_assert_eq!(&catalog.plan, &None);
        prop_assert!(catalog.quarantines.is_empty() && catalog.retired.is_empty());
    }
}
