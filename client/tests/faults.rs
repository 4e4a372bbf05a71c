//! The client under refusals, lost connections, silence and moved nodes.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use support::{Cluster, Fault, topology};
use vasto_client::{ErrorKind, Outcome, Vasto};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::NodeId;

fn applied(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Applied { .. })
}

#[tokio::test]
async fn a_refusal_with_a_newer_topology_redirects_at_once() {
    let mut cluster = Cluster::start(1).await;
    cluster.add_node();
    let ks = cluster.keyspace().await;
    // The master does not publish it.
    cluster.set_topology(topology(2, &[(NodeId(2), Some(cluster.nodes[1].address.to_string()))]));
    assert!(applied(ks.put("k", "v").await.unwrap()));
    assert_eq!(ks.epoch(), 2);
    let requests = |node| cluster.state.lock().nodes[&NodeId(node)].requests;
    assert_eq!((requests(1), requests(2)), (1, 1));
    ks.get("k").await.unwrap().unwrap();
    assert_eq!((requests(1), requests(2)), (1, 2));
}

#[tokio::test]
async fn a_batch_is_split_anew_when_its_shard_was_split() {
    let mut cluster = Cluster::start(1).await;
    cluster.add_node();
    cluster.add_node();
    let ks = cluster.keyspace().await;
    cluster.set_topology(cluster.topology(2, 3));
    let keys: Vec<String> = (0..300).map(|at| format!("{at}")).collect();
    let batch = keys.iter().fold(vasto_client::Batch::new(), |batch, key| batch.put(key, key));
    assert_eq!(ks.write(batch).await.unwrap().len(), 300);
    cluster.set_topology(cluster.topology(3, 2));
    let values = ks.get_many(&keys).await.unwrap();
    assert!(values.into_iter().zip(keys).all(|(value, key)| value.unwrap().to_string() == key));
}

#[tokio::test]
async fn a_refusal_without_a_topology_waits_for_the_master() {
    let mut cluster = Cluster::start(1).await;
    cluster.add_node();
    let ks = cluster.keyspace().await;
    cluster.always(1, Fault::Refuse(VastoError::new(ErrorCode::WrongEpoch, "not mine")));
    let put = tokio::spawn({
        let ks = ks.clone();
        async move { ks.put("k", "v").await }
    });
    cluster.until("the node was asked twice", |state| state.nodes[&NodeId(1)].requests >= 2).await;
    let next = topology(2, &[(NodeId(2), Some(cluster.nodes[1].address.to_string()))]);
    cluster.set_topology(next.clone());
    cluster.tell(next);
    assert!(applied(put.await.unwrap().unwrap()));
    assert_eq!(ks.get("k").await.unwrap().unwrap().to_string(), "v");
}

#[tokio::test]
async fn a_node_that_is_behind_is_asked_again() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    for code in [ErrorCode::NodeBehind, ErrorCode::Unavailable, ErrorCode::NodeBehind] {
        cluster.fault(1, Fault::Refuse(VastoError::new(code, "not yet")));
    }
    assert!(applied(ks.put("k", "v").await.unwrap()));
    assert_eq!(cluster.requests(), 4);
}

#[tokio::test]
async fn a_write_whose_reply_was_lost_is_sent_again() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    cluster.fault(1, Fault::DropAfter);
    assert!(applied(ks.put("k", "v").await.unwrap()));
    let state = cluster.state.lock();
    assert_eq!(state.nodes[&NodeId(1)].requests, 2);
    assert_eq!(state.nodes[&NodeId(1)].streams, 2);
}

#[tokio::test]
async fn a_write_whose_reply_never_comes_is_unknown() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await.with_deadline(Duration::from_millis(300));
    for fault in [Fault::DropAfter, Fault::DropBefore, Fault::Silent] {
        cluster.always(1, fault);
        let begun = Instant::now();
        let error = ks.put("k", "v").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
        assert!(error.message().contains("read it back"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    // A later error that would be a plain failure does not hide that the first try may have been
    // applied.
    let mut faults = vec![Fault::DropAfter];
    faults.push(Fault::Refuse(VastoError::new(ErrorCode::FailedPrecondition, "the disk is full")));
    cluster.state.lock().nodes.get_mut(&NodeId(1)).unwrap().faults = faults.into();
    assert_eq!(ks.put("k", "v").await.unwrap_err().kind(), ErrorKind::Unknown);
    cluster.always(1, Fault::Refuse(VastoError::new(ErrorCode::Unknown, "the sync failed")));
    assert_eq!(ks.put("k", "v").await.unwrap_err().kind(), ErrorKind::Unknown);
}

#[tokio::test]
async fn a_read_without_an_answer_is_a_plain_failure() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await.with_deadline(Duration::from_millis(300));
    cluster.always(1, Fault::Silent);
    assert_eq!(ks.get("k").await.unwrap_err().kind(), ErrorKind::DeadlineExceeded);
    cluster.always(1, Fault::DropAfter);
    let kind = ks.get("k").await.unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::DeadlineExceeded), "{kind:?}");
    cluster.always(1, Fault::Refuse(VastoError::new(ErrorCode::Corrupt, "replica 1 stopped")));
    assert_eq!(ks.get("k").await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn an_overloaded_node_is_given_the_time_it_asks_for() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    let overloaded =
        |ms| Fault::Refuse(VastoError::new(ErrorCode::Overloaded, "queue full").retry_after_ms(ms));
    cluster.fault(1, overloaded(150));
    let begun = Instant::now();
    assert!(applied(ks.put("k", "v").await.unwrap()));
    assert!(begun.elapsed() >= Duration::from_millis(150));
    cluster.always(1, overloaded(60_000));
    let error = ks.put("k", "v").await.unwrap_err();
    assert_eq!(
        (error.kind(), error.retry_after()),
        (ErrorKind::Overloaded, Some(Duration::from_secs(60)))
    );
}

#[tokio::test]
async fn a_stalled_node_makes_writers_wait_instead_of_filling_memory() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await.with_deadline(Duration::from_secs(2));
    cluster.always(1, Fault::Silent);
    let puts: Vec<_> = (0..64)
        .map(|at| {
            let ks = ks.clone();
            tokio::spawn(async move { ks.put(format!("{at}"), vec![0u8; 1 << 20]).await })
        })
        .collect();
    let mut kinds = Vec::new();
    for put in puts {
        kinds.push(put.await.unwrap().unwrap_err().kind());
    }
    let bytes = cluster.state.lock().nodes[&NodeId(1)].bytes;
    assert!(bytes <= 32 << 20, "{bytes}");
    let count = |kind| kinds.iter().filter(|seen| **seen == kind).count();
    // Writes that never got permits are known not to be written.
    assert!(count(ErrorKind::DeadlineExceeded) >= 32, "{kinds:?}");
    assert!(count(ErrorKind::Unknown) >= 1, "{kinds:?}");
}

#[tokio::test]
async fn a_node_that_comes_back_elsewhere_is_found_through_the_master() {
    let mut cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    ks.put("a", "1").await.unwrap();
    cluster.nodes.pop().unwrap().stop().await;
    let put = tokio::spawn({
        let ks = ks.clone();
        async move { ks.put("b", "2").await }
    });
    // The master forgets the address, then publishes the new one; the version stays.
    cluster.tell(topology(1, &[(NodeId(1), None)]));
    let node = cluster.serve_node(NodeId(1));
    cluster.nodes.push(node);
    cluster.tell(cluster.topology(1, 1));
    assert!(applied(put.await.unwrap().unwrap()));
    assert_eq!(ks.get("a").await.unwrap().unwrap().to_string(), "1");
}

#[tokio::test]
async fn an_unreachable_node_is_unavailable_and_nothing_is_unknown() {
    let mut cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await.with_deadline(Duration::from_millis(300));
    cluster.nodes.pop().unwrap().stop().await;
    let error = ks.put("k", "v").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.message().contains("cannot reach the node"), "{error}");
    let nowhere = Cluster::start(1).await;
    nowhere.tell(topology(1, &[(NodeId(1), None)]));
    let ks = nowhere.keyspace().await.with_deadline(Duration::from_millis(300));
    let error = ks.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("vasto node list"), "{error}");
}

#[tokio::test]
async fn the_keyspace_works_without_the_master_and_follows_it_when_it_is_back() {
    let mut cluster = Cluster::start(1).await;
    cluster.add_node();
    let ks = cluster.keyspace().await;
    let address = cluster.stop_master().await;
    for at in 0..20 {
        ks.put(format!("{at}"), "v").await.unwrap();
    }
    cluster.master_back(address);
    let next = cluster.topology(2, 2);
    cluster.set_topology(next.clone());
    cluster.tell(next);
    let follow = async {
        while ks.epoch() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), follow).await.expect("the watch came back");
    ks.put("k", "v").await.unwrap();
}

#[tokio::test]
async fn a_deleted_keyspace_is_not_found() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    ks.put("k", "v").await.unwrap();
    let mut gone = cluster.topology(2, 1);
    gone.active = false;
    cluster.tell(gone);
    let error = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Err(error) = ks.get("k").await {
                return error;
            }
        }
    });
    assert_eq!(error.await.unwrap().kind(), ErrorKind::NotFound);
    let error = cluster.vasto().await.keyspace("ks1").await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn closing_ends_everything() {
    let cluster = Cluster::start(2).await;
    let vasto = cluster.vasto().await;
    let ks = vasto.keyspace("ks1").await.unwrap().with_deadline(Duration::from_millis(300));
    ks.put("k", "v").await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), vasto.close()).await.expect("all tasks end");
    assert!(ks.put("k", "v").await.is_err());
}

#[tokio::test]
async fn an_absent_master_is_reported_in_time_with_a_remedy() {
    let cluster = Cluster::start(0).await;
    let url = cluster.url();
    cluster.master.stop().await;
    let begun = Instant::now();
    let error = Vasto::connect(&url).await.err().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4));
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.message().contains("vasto serve master") && error.message().contains(&url),
        "{error}"
    );
}

#[tokio::test]
async fn after_close_every_handle_answers_at_once_that_it_is_closed() {
    let cluster = Cluster::start(1).await;
    let vasto = cluster.vasto().await;
    let (other, ks) = (vasto.clone(), vasto.keyspace("ks1").await.unwrap());
    ks.put("k", "v").await.unwrap();
    cluster.always(1, Fault::Silent);
    let (reading, writing) = (ks.clone(), ks.clone());
    let reading = tokio::spawn(async move { reading.get("k").await });
    let writing = tokio::spawn(async move { writing.put("k", "v2").await });
    cluster.until("both are under way", |state| state.nodes[&NodeId(1)].requests >= 3).await;
    let began = Instant::now();
    vasto.close().await;
    assert_eq!(reading.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(
        writing.await.unwrap().unwrap_err().kind(),
        ErrorKind::Unknown,
        "the node may have done it"
    );
    assert_eq!(ks.put("k", "v").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(ks.get("k").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(ks.add_i64("n", 1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(ks.scan().stream().try_next().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(other.keyspace("ks1").await.err().unwrap().kind(), ErrorKind::Closed);
    assert_eq!(other.list_nodes().await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_deadline_without_end_is_no_overflow() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await.with_deadline(Duration::MAX);
    assert!(applied(ks.put("k", "v").await.unwrap()));
    assert_eq!(ks.get("k").await.unwrap().unwrap().bytes(), "v");
    assert_eq!(ks.add_i64("n", 2).await.unwrap(), 2);
    assert!(ks.scan().limit(1).stream().try_next().await.unwrap().is_some());
}

#[tokio::test]
async fn a_full_disk_is_told_at_once_and_another_replica_is_asked_first() {
    let mut cluster = Cluster::start(1).await;
    let full = VastoError::new(ErrorCode::NoSpace, "no space left on the disk of node 1");
    cluster.always(1, Fault::Refuse(full));
    let ks = cluster.keyspace().await;
    let error = ks.put("k", "v").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.message().contains("no space left"), "{error}");
    cluster.add_node();
    cluster.publish(cluster.replicated(2, &[1, 2]));
    let knows = async {
        while ks.epoch() != 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), knows)
        .await
        .expect("the client hears of the second replica");
    assert!(applied(ks.put("k", "v").await.unwrap()));
}
