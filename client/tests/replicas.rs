//! Shards with several replicas: which is asked, which is skipped, and what is repeated elsewhere.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use support::{Cluster, Fault};
use vasto_client::{ErrorKind, Keyspace, ReadFrom};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::NodeId;
use vasto_core::limits::ATTEMPT_PATIENCE;

/// Starts three nodes and one shard with a replica on each; the first is primary.
async fn three() -> (Cluster, Keyspace) {
    let cluster = Cluster::start(3).await;
    cluster.publish(cluster.replicated(2, &[1, 2, 3]));
    let keyspace = cluster.keyspace().await;
    (cluster, keyspace)
}

fn requests(cluster: &Cluster) -> [u64; 3] {
    let state = cluster.state.lock();
    [1, 2, 3].map(|id| state.nodes[&NodeId(id)].requests)
}

fn heal(cluster: &Cluster, node: u64) {
    let mut state = cluster.state.lock();
    let node = state.nodes.get_mut(&NodeId(node)).unwrap();
    node.faults.clear();
    node.sticky = false;
}

/// Waits until the primary is asked again.
async fn at_home(cluster: &Cluster, keyspace: &Keyspace) {
    let began = Instant::now();
    loop {
        let before = requests(cluster);
        keyspace.put("k", "v").await.unwrap();
        let after = requests(cluster);
        if after[0] > before[0] && after[1] == before[1] {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "the primary is never asked again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_silent_primary_is_passed_by_until_it_answers_a_probe() {
    let (cluster, keyspace) = three().await;
    keyspace.put("k", "v").await.unwrap();
    assert_eq!(requests(&cluster), [1, 0, 0]);
    cluster.always(1, Fault::Silent);
    let began = Instant::now();
    keyspace.put("k", "v").await.unwrap();
    let first = began.elapsed();
    assert!(first >= ATTEMPT_PATIENCE && first < ATTEMPT_PATIENCE * 3, "{first:?}");
    let elsewhere = requests(&cluster)[1];
    for _ in 0..50 {
        keyspace.put("k", "v").await.unwrap();
    }
    assert_eq!(
        requests(&cluster)[1],
        elsewhere + 50,
        "the outage costs only the operation that met it"
    );
    heal(&cluster, 1);
    at_home(&cluster, &keyspace).await;
}

#[tokio::test]
async fn a_dead_primary_costs_no_pause_and_the_next_dead_one_neither() {
    let (mut cluster, keyspace) = three().await;
    keyspace.put("k", "v").await.unwrap();
    for dead in 0..2 {
        cluster.nodes.remove(0).stop().await;
        let began = Instant::now();
        keyspace.put("k", "v").await.unwrap();
        assert!(began.elapsed() < ATTEMPT_PATIENCE, "{dead}: {:?}", began.elapsed());
    }
    assert!(requests(&cluster)[2] > 0);
    cluster.nodes.remove(0).stop().await;
    let error = keyspace.with_deadline(Duration::from_millis(400)).put("k", "v").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_replica_that_catches_up_sends_its_callers_elsewhere() {
    let (cluster, keyspace) = three().await;
    let behind = VastoError::new(ErrorCode::CatchingUp, "catching up").retry_after_ms(50);
    cluster.always(1, Fault::Refuse(behind));
    for n in 0..20 {
        keyspace.put(format!("k{n}"), "v").await.unwrap();
        assert!(keyspace.get(format!("k{n}")).await.unwrap().is_some());
    }
    assert!(requests(&cluster)[1] >= 40, "{:?}", requests(&cluster));
    heal(&cluster, 1);
    at_home(&cluster, &keyspace).await;
}

#[tokio::test]
async fn a_replica_out_of_service_sends_its_callers_elsewhere_and_its_node_is_not_suspect() {
    let (cluster, keyspace) = three().await;
    let closed = || {
        Fault::Refuse(VastoError::new(ErrorCode::NotPrimary, "the disk failed").retry_after_ms(20))
    };
    cluster.always(1, closed());
    let began = Instant::now();
    for n in 0..20 {
        keyspace.put(format!("k{n}"), "v").await.unwrap();
        assert!(keyspace.get(format!("k{n}")).await.unwrap().is_some());
    }
    assert_eq!(keyspace.get_many(["k1", "k2"]).await.unwrap().len(), 2);
    assert_eq!(
        requests(&cluster),
        [41, 41, 0],
        "each asks the next one, and the node is not suspect"
    );
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // An operation that only the primary executes waits for a new primary.
    let error = keyspace
        .clone()
        .with_deadline(Duration::from_millis(200))
        .add_i64("n", 1)
        .await
        .unwrap_err();
    assert_eq!((error.kind(), requests(&cluster)[1]), (ErrorKind::Unavailable, 41), "{error}");
    // With all replicas out of service they are asked in turn until one is back.
    cluster.always(2, closed());
    cluster.always(3, closed());
    let put = tokio::spawn({
        let keyspace = keyspace.clone();
        async move { keyspace.put("late", "v").await }
    });
    cluster.until("all to be asked", |state| state.nodes[&NodeId(3)].requests > 1).await;
    heal(&cluster, 3);
    put.await.unwrap().unwrap();
}

#[tokio::test]
async fn reads_go_to_the_zone_or_to_anybody_and_writes_to_the_primary() {
    let (cluster, keyspace) = three().await;
    keyspace.put("k", "v").await.unwrap();
    let near = keyspace.clone().read_from(ReadFrom::Zone("zone-3".into()));
    for _ in 0..10 {
        assert!(near.get("k").await.unwrap().is_some());
    }
    assert_eq!(requests(&cluster), [1, 0, 10]);
    near.put("k", "v").await.unwrap();
    assert_eq!(requests(&cluster), [2, 0, 10]);
    let any = keyspace.clone().read_from(ReadFrom::Any);
    for _ in 0..90 {
        assert!(any.get("k").await.unwrap().is_some());
    }
    let spread = requests(&cluster);
    assert!(spread[0] > 2 && spread[1] > 0 && spread[2] > 10, "{spread:?}");
}

#[tokio::test]
async fn a_modification_follows_the_primary_and_is_never_repeated_elsewhere() {
    let (cluster, keyspace) = three().await;
    assert_eq!(keyspace.add_i64("n", 5).await.unwrap(), 5);
    // The client's topology is old: the node returns the new primary.
    cluster.set_topology(cluster.replicated(3, &[2, 1, 3]));
    assert_eq!(keyspace.add_i64("n", 2).await.unwrap(), 7);
    assert_eq!(requests(&cluster), [2, 1, 0]);
    // Executed, but the answer is lost: the same replica is asked again under the same number.
    cluster.fault(2, Fault::DropAfter);
    keyspace.add_i64("n", 1).await.unwrap();
    {
        let state = cluster.state.lock();
        let [.., first, again] = &state.nodes[&NodeId(2)].writes[..] else {
            panic!("no two attempts")
        };
        assert_eq!(
            (first.client_id, first.sequence, first.tried_replica),
            (again.client_id, again.sequence, 0)
        );
        assert_eq!(again.tried_replica, 2);
    }
    // Executed, and then another replica becomes primary: the outcome is unknown.
    cluster.always(2, Fault::DropAfter);
    let asks = tokio::spawn({
        let keyspace = keyspace.clone();
        async move { keyspace.add_i64("n", 1).await }
    });
    cluster.until("an attempt", |state| state.nodes[&NodeId(2)].writes.len() >= 4).await;
    cluster.publish(cluster.replicated(4, &[3, 1, 2]));
    let error = asks.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    assert!(error.message().contains("read the value back"), "{error}");
    assert_eq!(requests(&cluster)[2], 0);
}

/// A wait for another replica's sync takes seconds at times, and no other answer shows meanwhile
/// that the node is healthy.
#[tokio::test]
async fn a_write_that_a_healthy_primary_answers_late_is_not_repeated_elsewhere() {
    let (cluster, keyspace) = three().await;
    keyspace.put("k", "v").await.unwrap();
    cluster.fault(1, Fault::Silent);
    let waits =
        keyspace.clone().with_deadline(ATTEMPT_PATIENCE * 5 / 2).put("k", "w").await.unwrap_err();
    assert_eq!(waits.kind(), ErrorKind::Unknown, "{waits}");
    let [first, second, third] = requests(&cluster);
    assert!(first > 2, "it is asked whether it is well");
    assert_eq!((second, third), (0, 0));
    assert_eq!(cluster.state.lock().nodes[&NodeId(1)].writes.len(), 2);
    keyspace.put("k", "v").await.unwrap();
    assert_eq!(requests(&cluster)[1], 0, "it is not passed by either");
}
