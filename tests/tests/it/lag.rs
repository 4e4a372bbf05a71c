//! Replication lag under load, and the time that a stalled follower takes to catch up.
//!
//! `VASTO_LAG_SECONDS` sets how long the load runs and how long the follower is stalled (3 s by
//! default, to keep the suite short).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use vasto_core::ids::ShardId;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_proto::v1::{GetRequest, KeyRef};
use vasto_tests::replicas::{Direct, converged};
use vasto_tests::{Cluster, History, Load, LoadSpec, setting, until};

/// Returns the LSNs of the primary and of a follower of the only shard.
async fn look(cluster: &Cluster, node: &str) -> Result<(u64, u64)> {
    let described = cluster.json(&["keyspace", "describe", "lag"]).await?;
    let replicas = described["placement"][0]["replicas"].as_array().context("no replicas")?.clone();
    let primary = replicas.iter().find(|one| one["role"] == "primary").context("no primary")?;
    let follower =
        replicas.iter().find(|one| one["node_id"] == node).context("no such follower")?;
    let number = |one: &serde_json::Value, field: &str| one[field].as_u64().unwrap_or_default();
    Ok((number(primary, "lsn"), number(follower, "lsn")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_stood_still_catches_up_under_load() -> Result<()> {
    let seconds = setting("VASTO_LAG_SECONDS", 3);
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("lag", 1, &["--replicas", "2"]).await?;
    let tip = cluster.catalog("lag").await?.tip()?;
    let follower = tip.placement[0].replicas[1].node.to_string();
    let index = cluster.node_of(&follower)?;
    let history = Arc::new(History::default());
    let spec = LoadSpec { writers: 64, readers: 0, ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "lag", &history, spec).await?;
    load.goes_on(20).await?;
    // Measures from the acknowledgement of a write at the primary until the follower returns it.
    let keyspace = cluster.keyspace("lag").await?;
    let mut direct =
        Direct::connect(&format!("127.0.0.1:{}", cluster.port(index)), &tip, ShardId(0)).await?;
    let mut lags = Vec::new();
    let began = Instant::now();
    let before = load.summary().acked;
    while began.elapsed() < Duration::from_secs(seconds) {
        let key = format!("lag-probe-{}", lags.len());
        keyspace.put(key.as_str(), "").await?;
        let acked = Instant::now();
        loop {
            let keys = vec![KeyRef { key: key.clone().into(), partition_hash: None }];
            let reply = direct.ask(Op::Get(GetRequest { keys })).await?;
            let Reply::Get(values) = reply else { bail!("{reply:?}") };
            if values.values.iter().any(|value| value.value.is_some()) {
                break;
            }
        }
        lags.push(acked.elapsed());
    }
    let rate = (load.summary().acked - before) as f64 / began.elapsed().as_secs_f64();
    lags.sort_unstable();
    println!(
        "under {rate:.0} writes/s: a write is at the follower {:?} (median), {:?} (p99) after its acknowledgement, of {}",
        lags[lags.len() / 2],
        lags[(lags.len() * 99).div_ceil(100) - 1],
        lags.len()
    );
    let (_, at) = look(&cluster, &follower).await?;
    cluster.node_process(index)?.signal(Signal::STOP);
    let stood = load.summary().acked;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let missed = load.summary().acked - stood;
    cluster.node_process(index)?.signal(Signal::CONT);
    let began = Instant::now();
    until("the follower to catch up under load", Duration::from_secs(60 + seconds), async || {
        let (primary, follower) = look(&cluster, &follower).await.ok()?;
        (follower + 200 > primary).then_some(())
    })
    .await?;
    let took = began.elapsed();
    let (_, now) = look(&cluster, &follower).await?;
    println!(
        "stood for {seconds} s and missed {missed} writes; caught up in {took:?}: {:.0} records (group commits) a second \
         beside the load",
        (now - at) as f64 / took.as_secs_f64()
    );
    let summary = load.stop().await?;
    ensure!(summary.refused + summary.unknown == 0, "{summary:?}");
    converged(&cluster, "lag").await?;
    cluster.finish().await
}
