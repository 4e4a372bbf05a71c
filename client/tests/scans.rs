//! Scans over real gRPC: order, paging, limits, and shards that change under a scan.

#![allow(clippy::unwrap_used)]

mod support;

use futures::StreamExt;
use support::{Cluster, Fault};
use vasto_client::{Batch, Key, Keyspace, Rows};

async fn fill(ks: &Keyspace, count: usize) -> Vec<String> {
    let keys: Vec<String> = (0..count).map(|at| format!("key-{at:05}")).collect();
    let batch = keys.iter().fold(Batch::new(), |batch, key| batch.put(key, format!("v-{key}")));
    ks.write(batch).await.unwrap();
    keys
}

async fn keys_of(mut rows: Rows) -> Vec<String> {
    let mut keys = Vec::new();
    while let Some(row) = rows.try_next().await.unwrap() {
        keys.push(String::from_utf8(row.key.to_vec()).unwrap());
    }
    keys
}

#[tokio::test]
async fn all_shards_are_merged_in_the_order_of_keys() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    let keys = fill(&ks, 500).await;
    cluster.state.lock().page_rows = 7;
    assert_eq!(keys_of(ks.scan().stream()).await, keys);
    assert_eq!(keys_of(ks.scan().prefix("key-0012").stream()).await, keys[120..130]);
    assert_eq!(keys_of(ks.scan().limit(33).stream()).await, keys[..33]);
    assert_eq!(keys_of(ks.scan().limit(0).stream()).await, Vec::<String>::new());
    assert_eq!(keys_of(ks.scan().prefix("none").stream()).await, Vec::<String>::new());
    let rows: Vec<_> = ks.scan().limit(2).stream().collect().await;
    assert_eq!(rows[1].as_ref().unwrap().value.as_ref().unwrap().to_string(), "v-key-00001");
    let row = ks.scan().keys_only().stream().try_next().await.unwrap().unwrap();
    assert_eq!((row.key.as_ref(), row.value), (b"key-00000".as_slice(), None));
}

#[tokio::test]
async fn pages_that_show_nothing_are_passed() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    let keys = fill(&ks, 500).await;
    ks.put(Key::new("key-00444x").partition("rare"), "x").await.unwrap();
    cluster.state.lock().page_examined = 2;
    assert_eq!(keys_of(ks.scan().partition("rare").stream()).await, ["key-00444x"]);
    let mut all = keys.clone();
    all.insert(445, "key-00444x".to_owned());
    assert_eq!(keys_of(ks.scan().stream()).await, all);
    assert_eq!(keys_of(ks.scan().prefix("key-0012").limit(7).stream()).await, keys[120..127]);
}

#[tokio::test]
async fn a_partition_is_read_from_one_shard() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    fill(&ks, 50).await;
    for user in 0..5 {
        for field in 0..20 {
            let key = format!("user:{user}:{field:02}");
            ks.put(Key::new(key).partition(format!("user:{user}")), "x").await.unwrap();
        }
    }
    cluster.state.lock().page_rows = 3;
    let before = cluster.requests();
    let rows = keys_of(ks.scan().partition("user:3").prefix("user:3:").limit(10).stream()).await;
    assert_eq!(rows, (0..10).map(|field| format!("user:3:{field:02}")).collect::<Vec<_>>());
    assert!(cluster.requests() - before <= 5, "one shard, pages of three");
    assert_eq!(keys_of(ks.scan().partition("user:4").stream()).await.len(), 20);
}

#[tokio::test]
async fn shards_that_change_during_a_scan_lose_and_double_nothing() {
    let mut cluster = Cluster::start(2).await;
    for _ in 0..3 {
        cluster.add_node();
    }
    let ks = cluster.keyspace().await;
    let keys = fill(&ks, 400).await;
    cluster.state.lock().page_rows = 5;
    let mut rows = ks.scan().stream();
    let mut seen = Vec::new();
    for shards in 3..=5 {
        for _ in 0..73 {
            let row = rows.try_next().await.unwrap().unwrap();
            seen.push(String::from_utf8(row.key.to_vec()).unwrap());
        }
        // The nodes apply the change first; the scan learns of it from a refusal.
        cluster.set_topology(cluster.topology(shards as u64, shards));
    }
    seen.extend(keys_of(rows).await);
    assert_eq!(seen, keys);
    assert_eq!(ks.shards(), 5);
}

#[tokio::test]
async fn pages_are_asked_for_again_after_a_lost_connection() {
    let cluster = Cluster::start(2).await;
    let ks = cluster.keyspace().await;
    let keys = fill(&ks, 60).await;
    cluster.state.lock().page_rows = 4;
    for node in [1, 2, 1] {
        cluster.fault(node, Fault::DropBefore);
    }
    assert_eq!(keys_of(ks.scan().stream()).await, keys);
}

#[tokio::test]
async fn a_scan_outlives_the_handles_that_it_was_made_from() {
    let cluster = Cluster::start(2).await;
    let vasto = cluster.vasto().await;
    let ks = vasto.keyspace("ks1").await.unwrap();
    let keys = fill(&ks, 60).await;
    cluster.state.lock().page_rows = 4;
    let mut rows = ks.scan().stream();
    assert_eq!(rows.try_next().await.unwrap().unwrap().key, keys[0]);
    drop((ks, vasto));
    assert_eq!(keys_of(rows).await, keys[1..]);
}

#[tokio::test]
async fn one_key_under_two_partitions_is_two_rows_that_name_their_record() {
    let cluster = Cluster::start(3).await;
    let ks = cluster.keyspace().await;
    fill(&ks, 40).await;
    let partitions = ["p0", "p1", "p2", "p3", "p4"];
    for partition in partitions {
        ks.put(Key::new("key-00007").partition(partition), partition).await.unwrap();
    }
    for rows in [1, 2, 1_000] {
        cluster.state.lock().page_rows = rows;
        let rows: Vec<_> =
            ks.scan().prefix("key-00007").stream().map(Result::unwrap).collect().await;
        let mut values: Vec<String> =
            rows.iter().map(|row| row.value.as_ref().unwrap().to_string()).collect();
        values.sort();
        assert_eq!(values, ["p0", "p1", "p2", "p3", "p4", "v-key-00007"]);
        for row in &rows {
            let read = ks.get(row).await.unwrap().unwrap();
            assert_eq!(Some(read), row.value, "a get of what the scan showed");
        }
        assert_eq!(rows.iter().filter(|row| row.partition_hash.is_none()).count(), 1);
    }
    let row = ks.scan().partition("p3").stream().try_next().await.unwrap().unwrap();
    ks.delete(&row).await.unwrap();
    assert_eq!(
        keys_of(ks.scan().prefix("key-00007").stream()).await.len(),
        5,
        "only that record is gone"
    );
}

#[tokio::test]
async fn a_short_scan_reads_about_as_many_rows_as_it_shows() {
    let cluster = Cluster::start(8).await;
    let ks = cluster.keyspace().await;
    let keys = fill(&ks, 4_000).await;
    let before = cluster.requests();
    assert_eq!(keys_of(ks.scan().limit(10).stream()).await, keys[..10]);
    assert!(
        cluster.requests() - before <= 10,
        "hardly a second page: {}",
        cluster.requests() - before
    );
    let asked: u32 = cluster.state.lock().scans.iter().map(|scan| scan.limit).sum();
    assert!(asked <= 8 * 7, "{asked} rows for ten");
}
