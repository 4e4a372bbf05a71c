//! Nodes that are killed repeatedly under load, with two and three replicas.
//!
//! `VASTO_STORM_KILLS` sets the number of kills (12 by default, to keep the suite short).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use vasto_tests::replicas::converged;
use vasto_tests::{
    CatalogDir, Cluster, Compared, Counters, DEADLINE, History, Load, LoadSpec, Numbers, Port,
    setting, until, verify,
};

async fn primaries_are_home(cluster: &Cluster, name: &str) -> Result<()> {
    let catalog = cluster.catalog(name).await?;
    until("the primaries to be at home", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        tip.placement
            .iter()
            .all(|shard| shard.primary.is_none() && shard.transferring_to.is_none())
            .then_some(())
    })
    .await
}

async fn storm(ack: &str, replicas: &str) -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("storm", 3, &["--replicas", replicas, "--ack", ack]).await?;
    cluster.create("counts", 3, &["--replicas", replicas, "--ack", ack]).await?;
    let history = Arc::new(History::default());
    // No readers: after a failover a read may be stale for a short time.
    let spec = LoadSpec { writers: 6, readers: 0, ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "storm", &history, spec).await?;
    let counters = Counters::start(&cluster.keyspace("counts").await?, 4, Duration::ZERO);
    let mut numbers = Numbers::new(200);
    // With one of two nodes gone, no peer can confirm the other's writes.
    let alone_is_not_enough = ack == "replica" && replicas == "2";
    let kills = setting("VASTO_STORM_KILLS", 12);
    for kill in 0..kills {
        load.acks(200 + numbers.below(1_500)).await?;
        let node = numbers.below(3) as usize;
        cluster.kill9_node(node).await?;
        // In some rounds the node is back at once, in others another replica has become primary.
        if numbers.below(2) == 0 {
            if alone_is_not_enough {
                tokio::time::sleep(Duration::from_millis(300 + numbers.below(700))).await;
            } else {
                load.acks(300 + numbers.below(3_000)).await?;
            }
        }
        cluster.start_node(node, if kill % 2 == 0 { Port::Same } else { Port::New }).await?;
        // One failure at a time: the other replicas must have all writes that this replica alone
        // has acknowledged.
        converged_in_role(&cluster, "storm").await?;
        converged_in_role(&cluster, "counts").await?;
    }
    let summary = load.stop().await?;
    let counted = counters.stop().await?;
    println!("{ack}, {replicas} replicas, {kills} kills: {summary:?}");
    println!("{:?}", verify(&cluster.master(), "storm", &history).await?);
    converged(&cluster, "storm").await?;
    primaries_are_home(&cluster, "counts").await?;
    converged(&cluster, "counts").await?;
    let compared = counted.compare(&cluster.keyspace("counts").await?).await?;
    let Compared { acked, unknown, lost, over, ref wrong } = compared;
    println!(
        "{ack}, {replicas} replicas: {acked} increments acknowledged, {unknown} unknown, {lost} lost, {over} too many"
    );
    ensure!(acked > 0 && over == 0, "increments were applied twice");
    if ack == "replica" && replicas == "2" {
        ensure!(lost == 0, "{lost} acknowledged increments are lost: {wrong:?}");
    }
    cluster.finish().await
}

/// Waits until every replica serves, has little lag, and has every record that any replica of its
/// shard had when all served: the logs hold the same records, in any order.
async fn converged_in_role(cluster: &Cluster, name: &str) -> Result<()> {
    let mut needed: Option<Vec<u64>> = None;
    until("all replicas to have caught up", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", name]).await.ok()?;
        let mut lsns: Vec<Vec<u64>> = Vec::new();
        for shard in described["placement"].as_array()? {
            let replicas = shard["replicas"].as_array()?;
            let serves = |one: &serde_json::Value| {
                one["state"] == "serving" && one["lag_ms"].as_u64().is_some_and(|lag| lag < 1_000)
            };
            if !replicas.iter().all(serves) {
                return None;
            }
            lsns.push(replicas.iter().map(|one| one["lsn"].as_u64()).collect::<Option<_>>()?);
        }
        let last = |shard: &Vec<u64>| shard.iter().copied().max().unwrap_or(0);
        let needed = needed.get_or_insert_with(|| lsns.iter().map(last).collect());
        lsns.iter()
            .zip(needed)
            .all(|(shard, needed)| shard.iter().all(|lsn| lsn >= needed))
            .then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storm_with_two_replicas_and_replica_acknowledgement() -> Result<()> {
    storm("replica", "2").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storm_with_three_replicas_and_replica_acknowledgement() -> Result<()> {
    storm("replica", "3").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storm_with_two_replicas_and_fsync_acknowledgement() -> Result<()> {
    storm("fsync", "2").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storm_with_three_replicas_and_fsync_acknowledgement() -> Result<()> {
    storm("fsync", "3").await
}

/// Waits until a shard has an acting primary.
async fn another_acts(catalog: &CatalogDir) -> Result<()> {
    until("another replica to act as primary", DEADLINE, async || {
        catalog.tip().ok()?.placement.iter().any(|shard| shard.primary.is_some()).then_some(())
    })
    .await
}

/// Counters are exact across graceful restarts and the leadership transfers that follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_are_exact_through_restarts_and_planned_hand_overs() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("exact", 3, &["--replicas", "2", "--ack", "replica"]).await?;
    let (keyspace, catalog) = (cluster.keyspace("exact").await?, cluster.catalog("exact").await?);
    let counters = Counters::start(&keyspace, 4, Duration::ZERO);
    for node in 0..3 {
        cluster.stop_node(node).await?;
        another_acts(&catalog).await?;
        cluster.start_node(node, Port::Same).await?;
        converged_in_role(&cluster, "exact").await?;
        primaries_are_home(&cluster, "exact").await?;
    }
    let counted = counters.stop().await?;
    converged(&cluster, "exact").await?;
    let Compared { acked, unknown, lost, over, wrong } = counted.compare(&keyspace).await?;
    println!("{acked} increments acknowledged, {unknown} unknown, {lost} lost, {over} too many");
    ensure!(acked > 100 && lost == 0 && over == 0, "{wrong:?}");
    cluster.finish().await
}

/// The same with `fsync`: before a primary stops, or is evicted, another replica has its
/// increments.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_are_exact_with_fsync_when_primaries_stop_and_leave() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("calm", 3, &["--replicas", "2", "--ack", "fsync"]).await?;
    let (keyspace, catalog) = (cluster.keyspace("calm").await?, cluster.catalog("calm").await?);
    let counters = Counters::start(&keyspace, 4, Duration::ZERO);
    for node in 0..3 {
        cluster.stop_node(node).await?;
        another_acts(&catalog).await?;
        cluster.start_node(node, Port::Same).await?;
        converged_in_role(&cluster, "calm").await?;
        primaries_are_home(&cluster, "calm").await?;
    }
    for shard in 0..3 {
        let primary = catalog.tip()?.placement[shard].primary().map(|one| one.replica.to_string());
        let evict = ["keyspace", "evict", "calm", "--replica", &primary.unwrap_or_default()];
        cluster.json(&evict).await?;
        until("a copy to take its place", DEADLINE, async || {
            let tip = catalog.tip().ok()?;
            let whole = tip.placement.iter().all(|shard| shard.replicas.len() == 2);
            (whole && tip.draining.is_empty() && tip.plan.is_none()).then_some(())
        })
        .await?;
    }
    let counted = counters.stop().await?;
    converged(&cluster, "calm").await?;
    let Compared { acked, unknown, lost, over, wrong } = counted.compare(&keyspace).await?;
    println!("{acked} increments acknowledged, {unknown} unknown, {lost} lost, {over} too many");
    ensure!(acked > 100 && lost == 0 && over == 0, "{wrong:?}");
    cluster.finish().await
}
