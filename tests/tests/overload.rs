//! two replicas, default settings, nothing but load.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vasto_client::Outcome;
use vasto_tests::Cluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_conditions_hold_under_load() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).allow("").start().await?;
    cluster.create("ks", 1, &["--replicas", "2"]).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let mut load = Vec::new();
    for handle in 0..3u64 {
        let keyspace = cluster.keyspace("ks").await?;
        for client in 0..384u64 {
            let (keyspace, stop, done) = (keyspace.clone(), stop.clone(), done.clone());
            load.push(tokio::spawn(async move {
                let value: Vec<u8> =
                    (0..65_536u64).map(|n| (n * (client * 7 + 13) >> 3) as u8 ^ (n >> 5) as u8).collect();
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let key = format!("load{handle}:{client}:{}", n % 20);
                    if keyspace.put(key, value.clone()).await.is_ok() {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
    }
    let keyspace = cluster.keyspace("ks").await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let began = Instant::now();
    let (mut rounds, mut stale, mut wrong_cas, mut wrong_add) = (0, 0, 0, 0);
    while began.elapsed() < Duration::from_secs(70) {
        let (k, c) = (format!("k{rounds}"), format!("c{rounds}"));
        if keyspace.put(k.as_str(), "v1").await.is_err() || keyspace.add_i64(c.as_str(), 5).await.is_err() {
            continue;
        }
        let Ok(Some(v1)) = keyspace.get(k.as_str()).await else {
            stale += 1;
            continue;
        };
        rounds += 1;
        if keyspace.put(k.as_str(), "v2").await.is_ok() {
            let read = keyspace.get(k.as_str()).await.ok().flatten();
            if read.is_some_and(|read| read.bytes() != "v2") {
                stale += 1;
            }
            if let Ok(Outcome::Applied { .. }) = keyspace.put(k.as_str(), "v3").if_version(v1.version).await {
                wrong_cas += 1;
            }
        }
        if keyspace.delete(c.as_str()).await.is_ok()
            && let Ok(sum) = keyspace.add_i64(c.as_str(), 1).await
            && sum != 1
        {
            wrong_add += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for one in load {
        let _ = one.await;
    }
    println!(
        "{} puts of load; {rounds} rounds: {stale} stale reads, {wrong_cas} conditional puts on a version that an acknowledged put had replaced, {wrong_add} increments of a counter whose delete was acknowledged",
        done.load(Ordering::Relaxed)
    );
    ensure!(stale + wrong_cas + wrong_add == 0);
    Ok(())
}
