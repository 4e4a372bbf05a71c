//! Replicas that leave their placement: drained, given up, and rebuilt from others.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vasto_client::{ErrorKind, Keyspace};
use vasto_tests::replicas::converged;
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, Port, missing, preload, put_all, until, verify,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_replica_is_drained_and_made_anew_under_load() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("evict", 2, &["--replicas", "3"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("evict").await?, &history, "s:", 20_000).await?;
    let spec = LoadSpec { readers: 0, ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "evict", &history, spec).await?;
    let before = cluster.catalog("evict").await?.tip()?;
    // A follower, then the primary of the other shard.
    let victims = [before.placement[0].replicas[1], before.placement[1].replicas[0]];
    for victim in victims {
        load.goes_on(50).await?;
        let answer = cluster
            .json(&["keyspace", "evict", "evict", "--replica", &victim.replica.to_string()])
            .await?;
        ensure!(answer["state"] == "draining", "{answer}");
        let tip = cluster.whole("evict").await?;
        ensure!(tip.removed.contains(&victim.replica) && !tip.is_placed(victim.replica), "{tip:?}");
        ensure!(
            !cluster
                .replica_dir(cluster.node_of(&victim.node.to_string())?, &tip, victim.replica)
                .exists()
        );
        println!("{:?}", tip.operations.last().context("no report")?);
    }
    load.goes_on(50).await?;
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(summary.refused + summary.unknown == 0, "{summary:?}");
    verify(&cluster.master(), "evict", &history).await?;
    converged(&cluster, "evict").await?;
    let refused = cluster.vasto(&["keyspace", "evict", "evict", "--replica", "999"]).await?;
    refused.refused(1, &["not placed"])?;
    cluster.finish().await
}

/// A replica that alone has acknowledged writes is evicted and returns: its writes are drained.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_an_evicted_replica_has_is_drained_when_it_returns() -> Result<()> {
    let (mut cluster, keyspace, alone) = one_alone("drain").await?;
    let left = cluster
        .json(&["keyspace", "evict", "drain", "--replica", &alone.replica.to_string()])
        .await?;
    ensure!(left["state"] == "draining", "{left}");
    let catalog = cluster.catalog("drain").await?;
    until("a copy to take its place", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        (tip.placement[0].replicas.len() == 2 && tip.plan.is_none()).then_some(())
    })
    .await?;
    ensure!(missing(&keyspace, "both", 100).await? == 0);
    ensure!(missing(&keyspace, "alone", 100).await? == 100, "nobody else can have them");
    let status = cluster.json(&["cluster", "status"]).await?;
    ensure!(
        status["warnings"].to_string().contains("may hold writes that nobody else has"),
        "{status}"
    );
    let grow = cluster.vasto(&["keyspace", "resize", "drain", "--shards", "2"]).await?;
    grow.refused(1, &["start its node so that it is drained"])?;
    let node = cluster.node_of(&alone.node.to_string())?;
    cluster.start_node(node, Port::Same).await?;
    let tip = cluster.whole("drain").await?;
    ensure!(tip.removed.contains(&alone.replica));
    ensure!(missing(&keyspace, "alone", 100).await? == 0, "acknowledged writes were not drained");
    until("its files to be removed", DEADLINE, async || {
        (!cluster.replica_dir(node, &tip, alone.replica).exists()).then_some(())
    })
    .await?;
    ensure!(converged(&cluster, "drain").await? == 200);
    cluster.finish().await
}

/// The same, but the loss is accepted: none of the writes return.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accepted_loss_stays_lost() -> Result<()> {
    let (mut cluster, keyspace, alone) = one_alone("loss").await?;
    let id = alone.replica.to_string();
    let unsure =
        cluster.vasto(&["keyspace", "evict", "loss", "--replica", &id, "--accept-loss"]).await?;
    ensure!(unsure.code == 2, "{unsure:?}");
    let left = cluster
        .json(&["keyspace", "evict", "loss", "--replica", &id, "--accept-loss", "--yes"])
        .await?;
    ensure!(left["state"] == "removed", "{left}");
    let tip = cluster.whole("loss").await?;
    let node = cluster.node_of(&alone.node.to_string())?;
    cluster.start_node(node, Port::Same).await?;
    until("its files to be removed", DEADLINE, async || {
        (!cluster.replica_dir(node, &tip, alone.replica).exists()).then_some(())
    })
    .await?;
    ensure!(missing(&keyspace, "both", 100).await? == 0);
    ensure!(missing(&keyspace, "alone", 100).await? == 100, "what was given up came back");
    ensure!(converged(&cluster, "loss").await? == 100);
    cluster.finish().await
}

/// Creates three nodes and one shard with two replicas; the replica that alone has acknowledged
/// `alone*` is down.
async fn one_alone(name: &str) -> Result<(Cluster, Keyspace, vasto_core::catalog::Placed)> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create(name, 1, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace(name).await?;
    put_all(&keyspace, "both", 100).await?;
    converged(&cluster, name).await?;
    let tip = cluster.catalog(name).await?.tip()?;
    let [alone, other] = tip.placement[0].replicas[..] else { anyhow::bail!("{tip:?}") };
    let (first, second) =
        (cluster.node_of(&alone.node.to_string())?, cluster.node_of(&other.node.to_string())?);
    cluster.kill9_node(second).await?;
    put_all(&keyspace, "alone", 100).await?;
    cluster.kill9_node(first).await?;
    cluster.start_node(second, Port::Same).await?;
    until("the other replica to serve alone", DEADLINE, async || {
        keyspace.get("both1").await.ok().flatten()
    })
    .await?;
    let catalog = cluster.catalog(name).await?;
    until("the other replica to be primary", DEADLINE, async || {
        (catalog.tip().ok()?.placement[0].primary() == Some(other)).then_some(())
    })
    .await?;
    Ok((cluster, keyspace, alone))
}

/// A replica fails on a live node: the others continue at once, and a new replica takes its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_fails_on_a_live_node_is_replaced() -> Result<()> {
    for at_the_start in [false, true] {
        let mut cluster = Cluster::builder()
            .nodes(3)
            .allow("the log")
            .allow("shipping failed")
            .allow("log files are missing")
            .allow("could not be applied")
            .start()
            .await?;
        cluster.create("broken", 1, &["--replicas", "2"]).await?;
        let keyspace = cluster.keyspace("broken").await?;
        put_all(&keyspace, "before", 500).await?;
        converged(&cluster, "broken").await?;
        cluster.json(&["keyspace", "compact", "broken"]).await?;
        let catalog = cluster.catalog("broken").await?;
        let before = catalog.tip()?;
        let failed = before.placement[0].replicas[0];
        let node = cluster.node_of(&failed.node.to_string())?;
        let log = cluster.replica_dir(node, &before, failed.replica).join("log");
        if at_the_start {
            cluster.kill9_node(node).await?;
            std::fs::rename(&log, log.with_extension("away"))?;
            cluster.start_node(node, Port::Same).await?;
        } else {
            // The log cannot create its next file: it closes at 64 MiB.
            std::fs::rename(&log, log.with_extension("away"))?;
            let value = bytes::Bytes::from(vec![7u8; 4 << 20]);
            let mut unsure = 0;
            for n in 0..20 {
                // All writes are accepted by some replica, except for the write in progress at the
                // failure.
                match keyspace.put(format!("big{}", n % 4), value.clone()).await {
                    Err(error) if error.kind() == ErrorKind::Unknown && unsure == 0 => unsure += 1,
                    other => drop(other?),
                }
            }
            ensure!(unsure == 1, "the log did not fail");
        }
        put_all(&keyspace, "after", 500).await?;
        ensure!(
            missing(&keyspace, "before", 500).await? + missing(&keyspace, "after", 500).await? == 0
        );
        keyspace.add_i64("counter", 1).await?;
        let tip = until("a copy to take its place", DEADLINE, async || {
            let tip = catalog.tip().ok()?;
            (tip.placement[0].replicas.len() == 2
                && !tip.is_placed(failed.replica)
                && tip.plan.is_none())
            .then_some(tip)
        })
        .await?;
        converged(&cluster, "broken").await?;
        if at_the_start {
            // A replica that does not open cannot be drained: a warning reports it until it is
            // given up.
            ensure!(tip.draining.iter().any(|one| one.replica == failed.replica), "{tip:?}");
            let status = cluster.json(&["cluster", "status"]).await?;
            ensure!(status["warnings"].to_string().contains("--accept-loss"), "{status}");
            let id = failed.replica.to_string();
            cluster
                .json(&["keyspace", "evict", "broken", "--replica", &id, "--accept-loss", "--yes"])
                .await?;
        }
        // A closed replica is drained like any other, and removed automatically.
        let tip = cluster.whole("broken").await?;
        until("its files to be removed", DEADLINE, async || {
            (!cluster.replica_dir(node, &tip, failed.replica).exists()).then_some(())
        })
        .await?;
        put_all(&keyspace, "at last", 100).await?;
        converged(&cluster, "broken").await?;
        cluster.finish().await?;
    }
    Ok(())
}

/// A catalog version that cannot be persisted is not applied, and not lost either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_could_not_be_remembered_is_applied_when_it_can() -> Result<()> {
    let cluster =
        Cluster::builder().nodes(1).allow("could not be applied; trying again").start().await?;
    let versions = cluster.node_dir(0).join("catalog");
    let away = versions.with_extension("away");
    std::fs::rename(&versions, &away)?;
    let creating = cluster.create("late", 1, &[]);
    let healed = async {
        let log = cluster.dir().join("logs/node-0.1.log");
        until("the node to fail", DEADLINE, async || {
            std::fs::read_to_string(&log).ok()?.contains("could not be applied").then_some(())
        })
        .await?;
        std::fs::rename(&away, &versions).context("the directory cannot be put back")
    };
    let (created, healed) = futures::join!(creating, healed);
    healed?;
    created.context("the version was lost")?;
    cluster.keyspace("late").await?.put("k", "v").await?;
    cluster.finish().await
}

/// A replica that does not read lets the others' logs fill up: at the cap it leaves the placement
/// by itself, and returns as a new replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_away_until_the_log_is_full_is_replaced_by_a_copy() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(3)
        .set("node.max_log=1MiB")
        .allow("the log is at its cap")
        .start()
        .await?;
    cluster.create("full", 1, &["--replicas", "3"]).await?;
    let keyspace = cluster.keyspace("full").await?;
    put_all(&keyspace, "k", 500).await?;
    converged(&cluster, "full").await?;
    let away = cluster.catalog("full").await?.tip()?.placement[0].replicas[2];
    let node = cluster.node_of(&away.node.to_string())?;
    cluster.kill9_node(node).await?;
    let value = bytes::Bytes::from(vec![5u8; 64 << 10]);
    for n in 0..40 {
        keyspace.put(format!("big{n}"), value.clone()).await?;
    }
    let catalog = cluster.catalog("full").await?;
    until("the member that is away to leave", DEADLINE, async || {
        catalog.tip().ok()?.draining.iter().any(|one| one.replica == away.replica).then_some(())
    })
    .await?;
    put_all(&keyspace, "later", 500).await?;
    cluster.start_node(node, Port::Same).await?;
    let tip = cluster.whole("full").await?;
    ensure!(tip.removed.contains(&away.replica));
    ensure!(tip.placement[0].replicas.iter().any(|one| one.node == away.node), "{tip:?}");
    ensure!(converged(&cluster, "full").await? == 1_040);
    cluster.finish().await
}
