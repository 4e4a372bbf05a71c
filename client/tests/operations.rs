//! Reads and writes over real gRPC: routing, order, wire format, limits.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::{Cluster, Fault};
use vasto_client::{Ack, Batch, ErrorKind, Key, Outcome, WriteOptions};
use vasto_core::error::ErrorCode;
use vasto_core::hash::partition_hash;

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|at| format!("key-{at:05}")).collect()
}

#[tokio::test]
async fn what_is_put_is_read_until_it_is_deleted() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    assert_eq!((ks.name().as_str(), ks.shards(), ks.epoch()), ("ks1", 3, 1));
    for key in keys(50) {
        assert!(matches!(
            ks.put(&key, format!("v-{key}")).await.unwrap(),
            Outcome::Applied { event_time: 1_001.. }
        ));
    }
    let value = ks.get("key-00007").await.unwrap().unwrap();
    assert_eq!(
        (value.bytes().as_ref(), value.version, value.expires_at),
        (b"v-key-00007".as_slice(), 99, None)
    );
    ks.delete("key-00007").await.unwrap();
    assert_eq!(ks.get("key-00007").await.unwrap(), None);
    ks.put("empty", "").await.unwrap();
    assert_eq!(ks.get("empty").await.unwrap().unwrap().bytes(), "");
    let state = cluster.state.lock();
    assert!(
        state.nodes.values().all(|node| node.requests > 5 && node.streams == 1),
        "all nodes, one stream each"
    );
}

#[tokio::test]
async fn options_reach_the_node() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    let put = ks.put(Key::new("user:1:name").partition("user:1"), "Ada");
    let outcome =
        put.ttl(Duration::from_secs(60)).event_time(5_000_000).ack(Ack::Os).await.unwrap();
    assert_eq!(outcome, Outcome::Applied { event_time: 5_000_000 });
    let sent = cluster.state.lock().nodes.values().next().unwrap().writes.last().cloned().unwrap();
    assert_eq!(sent.ack, vasto_proto::v1::Ack::Os as i32);
    assert_eq!(sent.ops[0].event_time, Some(5_000_000));
    assert_eq!(sent.ops[0].key.as_ref().unwrap().partition_hash, Some(partition_hash(b"user:1")));
    let stored =
        cluster.state.lock().store[&("user:1:name".into(), partition_hash(b"user:1"))].clone();
    assert_eq!(stored.ttl_ms, Some(60_000));
    let older =
        ks.delete(Key::new("user:1:name").partition("user:1")).event_time(4_000_000).await.unwrap();
    assert_eq!(older, Outcome::Superseded);
    ks.put("plain", "v").await.unwrap();
    let sent = cluster.state.lock().nodes.values().next().unwrap().writes.last().cloned().unwrap();
    assert_eq!((sent.ack, sent.ops[0].event_time), (0, None));
    assert_eq!(
        cluster.state.lock().store[&("plain".into(), partition_hash(b"plain"))].ttl_ms,
        None
    );
}

#[tokio::test]
async fn many_keys_and_batches_are_answered_in_order() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    let all = keys(2_000);
    let batch = all.iter().enumerate().fold(Batch::new(), |batch, (at, key)| {
        if at % 3 == 0 { batch.delete(key) } else { batch.put(key, format!("{at}")) }
    });
    let outcomes = ks.write(batch).await.unwrap();
    assert_eq!(outcomes.len(), 2_000);
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied { .. })));
    for (at, value) in ks.get_many(&all).await.unwrap().into_iter().enumerate() {
        let want = (at % 3 != 0).then(|| at.to_string());
        assert_eq!(value.map(|value| value.to_string()), want);
    }
    let newer = WriteOptions::default().event_time(9_000_000);
    let older = WriteOptions::default().event_time(8_000_000);
    let batch = Batch::new().put_with("a", "1", newer).put("b", "1").put_with("a", "2", older);
    let outcomes = ks.write(batch).await.unwrap();
    assert_eq!(
        (outcomes[0], outcomes[2]),
        (Outcome::Applied { event_time: 9_000_000 }, Outcome::Superseded)
    );
    assert_eq!(ks.write(Batch::new()).await.unwrap(), []);
    assert_eq!(ks.get_many(Vec::<&str>::new()).await.unwrap(), []);
}

#[tokio::test]
async fn concurrent_single_writes_share_frames() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    let tasks: Vec<_> = (0..256)
        .map(|task| {
            let ks = ks.clone();
            tokio::spawn(async move {
                for at in 0..20 {
                    ks.put(format!("{task}-{at}"), "v").await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let state = cluster.state.lock();
    let node = state.nodes.values().next().unwrap();
    assert_eq!((node.requests, state.store.len()), (5_120, 5_120));
    assert!(
        node.frames * 4 < node.requests,
        "{} frames for {} requests",
        node.frames,
        node.requests
    );
}

#[tokio::test]
async fn values_too_large_for_one_reply_are_asked_for_in_parts() {
    let cluster = Cluster::start(1).await;
    let ks = cluster.keyspace().await;
    let all = keys(100);
    for key in &all {
        ks.put(key, key).await.unwrap();
    }
    for code in [ErrorCode::InvalidArgument, ErrorCode::Overloaded] {
        cluster.always(1, Fault::KeysAtMost(3, code));
        let values = ks.get_many(&all).await.unwrap();
        assert!(
            values.into_iter().zip(&all).all(|(value, key)| value.unwrap().to_string() == *key)
        );
    }
    cluster.always(1, Fault::KeysAtMost(0, ErrorCode::InvalidArgument));
    assert_eq!(ks.get_many(&all).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn over_a_limit_nothing_is_sent() {
    let cluster = Cluster::start(2).await;
    let ks = cluster.keyspace().await;
    let long = vec![b'k'; 65_537];
    let mut errors = vec![
        ks.put("", "v").await.unwrap_err(),
        ks.put(&long, "v").await.unwrap_err(),
        ks.put(Key::new("k").partition(""), "v").await.unwrap_err(),
        ks.put("k", vec![0; (4 << 20) + 1]).await.unwrap_err(),
        ks.put("k", "v").ttl(Duration::ZERO).await.unwrap_err(),
        ks.put("k", "v").event_time(u64::MAX).await.unwrap_err(),
        ks.delete("k").event_time(0).await.unwrap_err(),
        ks.get("").await.unwrap_err(),
        ks.get_many(["a", ""]).await.unwrap_err(),
        ks.write(Batch::new().put("a", "1").put("", "2")).await.unwrap_err(),
    ];
    errors.push(ks.scan().prefix(&long).stream().try_next().await.unwrap_err());
    errors.push(ks.scan().partition("").stream().try_next().await.unwrap_err());
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    assert_eq!(cluster.requests(), 0);
    ks.put(vec![b'k'; 65_536], vec![0; 4 << 20]).await.unwrap();
}

#[tokio::test]
async fn a_batch_that_fails_on_one_shard_is_unknown_and_names_the_cause() {
    let cluster = Cluster::start(2).await;
    let ks = cluster.keyspace().await;
    let full = vasto_core::VastoError::new(ErrorCode::FailedPrecondition, "the disk is full");
    cluster.always(2, Fault::Refuse(full));
    let batch = keys(100).iter().fold(Batch::new(), |batch, key| batch.put(key, "v"));
    let error = ks.write(batch).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    assert!(
        error.message().contains("in part") && error.message().contains("the disk is full"),
        "{error}"
    );
}
