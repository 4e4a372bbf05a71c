//! Hosted replicas as sources and targets of a plan: what they do, and do not do, before a version
//! says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use vasto_core::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec, Placed, ShardPlacement};
use vasto_core::ids::{Epoch, NodeId, ShardId};
use vasto_core::plan::Step;
use vasto_core::reconcile::start_resize;
use vasto_core::record::{BandRange, RangeState};
use vasto_failpoint::{Action, Order, points};
use vasto_proto::v1;

use super::hosts::{Hosted, left, placed_again};
use super::replicator::shard_on;
use super::support::*;
use crate::build::resize::tail;
use crate::manager::Manager;
use crate::node_dir::NodeDir;
use crate::replica::command::{Control, Role};

/// Long enough for a host to do what it should not.
const A_WHILE: Duration = Duration::from_millis(300);
/// Longer than a tail that does not catch up is watched before writers are slowed down.
const WATCHED: Duration = Duration::from_millis(2_500);
/// Interval of writes of a MiB each: more than the least rate to which writers are slowed down.
const WRITES: Duration = Duration::from_millis(50);

fn in_step(catalog: &Catalog, step: Step) -> Catalog {
    let mut next = catalog.next(START_US, 9);
    next.plan.as_mut().unwrap().step = step;
    next
}

/// Returns the commit of a plan that makes a second shard.
fn committed(sealing: &Catalog) -> Catalog {
    let mut next = in_step(sealing, Step::Committed);
    next.epoch = Epoch(sealing.epoch.0 + 1);
    next.spec.shards = 2;
    let targets = &sealing.plan.as_ref().unwrap().targets;
    let placed = targets.iter().map(|target| Placed { replica: target.replica, node: target.node });
    next.placement.push(ShardPlacement::new(ShardId(1), placed.collect()));
    next
}

/// A shard of two replicas grows. The other one cannot be reached, so that nobody knows what it has
/// accepted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_reports_no_seal_before_its_peers_have_sealed_and_keeps_its_bands_until_the_commit()
 {
    for peers in [false, true] {
        let (hosted, catalog) = (Hosted::new(), shard_on(if peers { 2 } else { 1 }));
        let host = hosted.start(&catalog);
        let replica = hosted.replica().await;
        let targets = [NodeId(3), NodeId(4)][..catalog.spec.replicas as usize].to_vec();
        let growing = start_resize(&catalog, 2, &[targets], START_US, 2).unwrap();
        let sealing = in_step(&growing, Step::Sealing);
        host.apply_catalog(Arc::new(sealing.clone()));
        until("the seal", || {
            replica.ranges().seal.is_some() && replica.version() == sealing.version
        })
        .await;
        let sealed = || host.report().source.is_some_and(|source| source.sealed.is_some());
        if peers {
            tokio::time::sleep(A_WHILE).await;
            assert!(!sealed(), "the peer may have accepted more");
        } else {
            until("the seal to be reported", sealed).await;
        }
        let owned: BandRange = Band::owned(1).into();
        assert!(replica.ranges().all_are(owned, RangeState::Owned), "nobody has committed");
        host.apply_catalog(Arc::new(committed(&sealing)));
        let leaving: BandRange = Band::leaving(1, 2).into();
        until("the bands to be given away", || {
            replica.ranges().all_are(leaving, RangeState::Leaving)
        })
        .await;
        until("the release", || host.report().source.is_some_and(|source| source.released)).await;
        host.stop_to_discard().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_opens_under_the_commit_and_only_what_it_has_received() {
    for filled in [true, false] {
        let hosted = Hosted::new();
        let spec = KeyspaceSpec::default();
        let one = Catalog::first(KEYSPACE, "ks", spec, &[vec![NodeId(2)]], START_US, 1);
        let growing = start_resize(&one, 2, &[vec![NodeId(1)]], START_US, 2).unwrap();
        let plan = growing.plan.clone().unwrap();
        let host = hosted.start_as(&growing, plan.targets[0].shard, plan.targets[0].replica);
        let replica = hosted.opened(plan.targets[0].replica).await;
        let arriving = plan.arriving().unwrap();
        if filled {
            let order = Control::Ingest {
                plan: plan.id,
                range: arriving,
                files: Vec::new(),
                objects: Vec::new(),
                event_time_max: 0,
                progress: Vec::new(),
            };
            replica.control(order).await.unwrap();
        }
        let mut last = growing;
        for step in [Step::Prepare, Step::Tail, Step::Sealing] {
            last = in_step(&last, step);
            host.apply_catalog(Arc::new(last.clone()));
            until("the version to be applied", || replica.version() == last.version).await;
            tokio::time::sleep(A_WHILE / 3).await;
            assert!(replica.ranges().all_are(arriving, RangeState::Arriving), "{step:?}");
            assert_eq!(replica.view().role, Role::Detached, "{step:?}");
            assert_eq!(replica.closed(), None, "{step:?}");
        }
        host.apply_catalog(Arc::new(committed(&last)));
        if filled {
            until("it to open", || replica.ranges().all_are(arriving, RangeState::Owned)).await;
        } else {
            until("it to refuse", || replica.closed().is_some()).await;
            assert_eq!(replica.ranges().owned().count(), 0);
        }
        host.stop_to_discard().await;
    }
}

/// An old master still sends what a newer version has overtaken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lower_version_changes_nothing_at_a_replica() {
    let (hosted, first) = (Hosted::new(), shard_on(2));
    let host = hosted.start(&first);
    let replica = hosted.replica().await;
    let outside = left(&first);
    host.apply_catalog(Arc::new(outside.clone()));
    until("it to leave", || {
        replica.view().role == Role::Detached && replica.version() == outside.version
    })
    .await;
    host.apply_catalog(Arc::new(first));
    tokio::time::sleep(A_WHILE).await;
    assert_eq!((replica.view().role, replica.version()), (Role::Detached, outside.version));
    let inside = placed_again(&outside);
    host.apply_catalog(Arc::new(inside.clone()));
    until("a higher one to be applied", || replica.version() == inside.version).await;
    host.stop_to_discard().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lower_version_is_not_remembered_by_a_node() {
    let hosted = Hosted::new();
    let place = memory_dir();
    let dir = Arc::new(Mutex::new(NodeDir::open(place.path(), NodeId(1)).unwrap()));
    let manager = Manager::new(hosted.context.clone(), dir.clone(), 8);
    let first = shard_on(1);
    let second = first.next(START_US, 5);
    let remembered = || dir.lock().catalogs().unwrap().0;
    for catalog in [&second, &first] {
        manager.apply_catalog(Arc::new(catalog.clone()), false).await.unwrap();
        assert_eq!(remembered(), std::slice::from_ref(&second));
    }
    manager.opened().await;
    manager.stop().await;
}

/// A step that fails at a failpoint is repeated; one that is held there goes on when it is released.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_held_before_its_seal_has_not_sealed_and_seals_when_it_is_released() {
    let (hosted, catalog) = (Hosted::new(), shard_on(1));
    let host = hosted.start(&catalog);
    let replica = hosted.replica().await;
    let order = |action: Action| Order {
        keyspace: Some(KEYSPACE),
        replica: Some(replica.id),
        ..Order::from(action)
    };
    let fails = vasto_failpoint::arm(points::SOURCE_SEAL_BEFORE, order(Action::Error));
    let growing = start_resize(&catalog, 2, &[vec![NodeId(3)]], START_US, 2).unwrap();
    host.apply_catalog(Arc::new(in_step(&growing, Step::Sealing)));
    until("the failure", || fails.is_reached()).await;
    let holds = vasto_failpoint::arm(points::SOURCE_SEAL_BEFORE, order(Action::Pause));
    tokio::time::timeout(DEADLINE, holds.reached()).await.unwrap();
    assert!(replica.ranges().seal.is_none());
    holds.release();
    until("the seal to be reported", || {
        host.report().source.is_some_and(|source| source.sealed.is_some())
    })
    .await;
    host.stop_to_discard().await;
}

/// The reader of a tail takes nothing, and moving keys are written: their writers wait for it. Nobody
/// does in a pause, nor once the keys are sealed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_are_slowed_down_for_the_tails_of_a_plan_that_is_neither_paused_nor_sealed() {
    let (hosted, catalog) = (Hosted::new(), shard_on(1));
    let host = hosted.start(&catalog);
    let replica = hosted.replica().await;
    let growing = start_resize(&catalog, 2, &[vec![NodeId(3)]], START_US, 2).unwrap();
    let mut paused = in_step(&growing, Step::Tail);
    paused.plan.as_mut().unwrap().paused = true;
    host.apply_catalog(Arc::new(paused.clone()));
    until("the version to be applied", || replica.version() == paused.version).await;
    let request = v1::TailRequest {
        keyspace_id: KEYSPACE.0,
        replica_id: replica.id.0,
        after_lsn: replica.settled_lsn().0,
        final_shard: 1,
        final_shards: 2,
    };
    let _frames = tail::serve(&hosted.context.registry, &request).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::task::spawn_blocking({
        let (replica, stop, value) = (replica.clone(), stop.clone(), "v".repeat(64 << 10));
        let keys = keys_in(BandRange::from(Band::leaving(1, 2)).first, "m", 16);
        move || {
            while !stop.load(Ordering::Relaxed) {
                write(&replica, keys.iter().map(|key| put(key, &value)).collect());
                std::thread::park_timeout(WRITES);
            }
        }
    });
    let slowed = || host.report().source.is_some_and(|source| source.throttle.is_some());
    tokio::time::sleep(WATCHED).await;
    assert!(!slowed() && !replica.throttle().slows(), "the plan is paused");
    let mut running = paused.next(START_US, 10);
    running.plan.as_mut().unwrap().paused = false;
    host.apply_catalog(Arc::new(running.clone()));
    until("writers to be slowed down", || slowed() && replica.throttle().slows()).await;
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    assert!(replica.throttle().slows(), "the reader has still taken nothing");
    host.apply_catalog(Arc::new(in_step(&running, Step::Sealing)));
    until("writers to be let go", || !slowed() && !replica.throttle().slows()).await;
    host.stop_to_discard().await;
}
