//! Networks that are cut: both sides continue, and converge after the cut heals; a change of the number
//! of shards does not commit over a cut.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_client::Vasto;
use vasto_core::catalog::Placed;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_proto::v1::reply::Result as Reply;
use vasto_tests::netns::{SilentPort, available};
use vasto_tests::replicas::{Direct, converged_by};
use vasto_tests::{Cluster, DEADLINE, Hosts, Port, Process, put_all, setting, tool, until};

/// Starts a writer in the namespace of a host; its keys are the same as those of other writers, its
/// values differ.
fn writer(hosts: &Hosts, host: usize) -> Result<Process> {
    let mark = format!("side{host}:");
    hosts.spawn(
        host,
        &format!("writer-{host}"),
        &tool("vasto-test-writer"),
        &[&hosts.master, "split", "k", &mark],
    )
}

fn written(process: &Process) -> usize {
    process.printed().matches('\n').count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_of_a_partition_are_written_and_converge_byte_for_byte() -> Result<()> {
    let hosts = Hosts::start(&["default"; 3]).await?;
    hosts.vasto(&["keyspace", "create", "split", "--shards", "3", "--replicas", "3"]).await?;
    // Clients on both sides, which know all nodes.
    let mut writers = [writer(&hosts, 0)?, writer(&hosts, 1)?];
    for one in &writers {
        until("the clients to write", DEADLINE, async || (written(one) >= 100).then_some(()))
            .await?;
    }
    hosts.network.cut(0)?;
    let began = Instant::now();
    let before: Vec<usize> = writers.iter().map(written).collect();
    for (one, before) in writers.iter().zip(&before) {
        // Each side needs its patience for the shards whose primary is on the other side, and the
        // lone side two probes for each write: before it begins, and before it is acknowledged.
        let enough = async || (written(one) >= before + 100).then_some(());
        until("both sides to go on", DEADLINE, enough).await?;
    }
    // Long enough for the master to detect the silence and to replace the primaries.
    let catalog = hosts.catalog();
    until("the primaries to be replaced", DEADLINE, async || {
        catalog
            .tip()
            .ok()
            .filter(|tip| tip.placement.iter().any(|shard| shard.primary.is_some()))
            .map(|_| ())
    })
    .await?;
    println!(
        "cut for {:?}; both sides wrote meanwhile: {:?}",
        began.elapsed(),
        writers.iter().map(written).collect::<Vec<_>>()
    );
    let counts: Vec<usize> = writers.iter().map(written).collect();
    hosts.network.heal(0)?;
    for (one, before) in writers.iter().zip(&counts) {
        until("both to go on", DEADLINE, async || (written(one) >= before + 100).then_some(()))
            .await?;
    }
    for one in &mut writers {
        one.kill9().await?;
    }
    let keys = converged_by(&catalog, async || hosts.vasto(&["cluster", "status"]).await).await?;
    let most = writers.iter().map(written).max().unwrap_or_default();
    println!("{keys} keys are the same on all three replicas");
    ensure!(keys >= most, "{keys} keys, but {most} were acknowledged to one writer");
    // Every acknowledged key has one of the values that were written to it.
    let keyspace = Vasto::connect(&hosts.master).await?.keyspace("split").await?;
    let names: Vec<String> = (0..most).map(|n| format!("k{n}")).collect();
    for (n, value) in keyspace.get_many(&names).await?.into_iter().enumerate() {
        let value = value.with_context(|| format!("k{n} was acknowledged and is gone"))?.bytes();
        let sides = [format!("side0:{n}"), format!("side1:{n}")];
        ensure!(sides.iter().any(|side| side.as_bytes() == value), "k{n} holds {value:?}");
    }
    hosts.end().await
}

/// The source of a grow and its follower are cut from each other, and clients that chose the follower
/// are served there: nobody commits before the source holds what the follower took.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grow_does_not_commit_while_the_source_lacks_what_its_follower_took() -> Result<()> {
    let hosts = Hosts::start(&["default"; 4]).await?;
    hosts.vasto(&["keyspace", "create", "cut", "--shards", "1", "--replicas", "2"]).await?;
    let keyspace = Vasto::connect(&hosts.master).await?.keyspace("cut").await?;
    put_all(&keyspace, "before", 500).await?;
    let catalog = hosts.catalog();
    converged_by(&catalog, async || hosts.vasto(&["cluster", "status"]).await).await?;
    let before = catalog.tip()?;
    let host = |member: &Placed| hosts.host_of(&member.node.to_string());
    let replicas = &before.placement[0].replicas;
    let (source, follower) = (host(&replicas[0])?, host(&replicas[1])?);
    hosts.network.cut_between(source, follower)?;
    let address = format!("{}:7000", hosts.network.address(Some(follower)));
    let mut chosen = Direct::connect(&address, &before, ShardId(0)).await?;
    let moves = |name: &String| jump(partition_hash(name.as_bytes()), 2).shard == ShardId(1);
    let names: Vec<String> = (0..).map(|n| format!("chosen{n}")).filter(moves).take(50).collect();
    for name in &names {
        let taken = chosen.put(name, "by choice").await?;
        ensure!(matches!(taken, Reply::Write(_)), "the follower answers {taken:?}");
    }
    let grow = ["keyspace", "resize", "cut", "--shards", "2"];
    hosts.vasto(&[&grow[..], &["--no-wait"][..]].concat()).await?;
    let sealed = until("a seal that is undone, or a commit", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        let is_undone = tip.plan.as_ref().is_some_and(|plan| plan.seals_undone > 0);
        (is_undone || tip.spec.shards == 2).then_some(tip)
    })
    .await
    .with_context(|| format!("{:?}", catalog.tip().map(|tip| tip.plan)))?;
    ensure!(sealed.spec.shards == 1, "it committed: {:?}", sealed.plan);
    for host in [source, follower] {
        hosts.network.heal(host)?;
    }
    let ended = until("the end of the grow", DEADLINE, async || {
        catalog.tip().ok().filter(|tip| tip.plan.is_none())
    })
    .await
    .with_context(|| format!("{:?}", catalog.tip().map(|tip| tip.plan)))?;
    if ended.spec.shards == 1 {
        hosts.vasto(&grow).await?;
    }
    let lost = keyspace.get_many(&names).await?.iter().filter(|value| value.is_none()).count();
    ensure!(lost == 0, "{lost} of {} acknowledged writes are lost", names.len());
    hosts.end().await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Kill,
    Stop,
    Silence,
}

/// Measures the time from the last success at the primary to the first success elsewhere, as seen
/// by one client that reads and writes without a pause: median and worst.
async fn failover(loss: Loss) -> Result<()> {
    let rounds: usize = setting("VASTO_FAILOVERS", 3);
    ensure!(
        loss != Loss::Silence || available(),
        "ports cannot be silenced here: it takes root, ip and iptables"
    );
    // A node that is silent for its peers is reported.
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("failover", 1, &["--replicas", "3"]).await?;
    let catalog = cluster.catalog("failover").await?;
    let mut gaps = Vec::new();
    for round in 0..rounds {
        until("the primary to be at home, and all to have caught up", DEADLINE, async || {
            let described = cluster.json(&["keyspace", "describe", "failover"]).await.ok()?;
            let replicas = described["placement"][0]["replicas"].as_array()?.clone();
            let tip = catalog.tip().ok()?;
            let home =
                tip.placement[0].primary.is_none() && tip.placement[0].transferring_to.is_none();
            (home && replicas.iter().all(|one| one["state"] == "serving")).then_some(())
        })
        .await?;
        // A client that has not bypassed any node yet.
        let keyspace = cluster.keyspace("failover").await?;
        let primary =
            cluster.node_of(&catalog.tip()?.placement[0].primary().unwrap().node.to_string())?;
        for n in 0..200 {
            keyspace.put("k", format!("{round}:{n}")).await?;
        }
        let last = Instant::now();
        let silence = match loss {
            Loss::Kill => {
                cluster.kill9_node(primary).await?;
                None
            }
            Loss::Stop => {
                cluster.node_process(primary)?.signal(Signal::STOP);
                None
            }
            Loss::Silence => Some(SilentPort::new(cluster.port(primary))?),
        };
        keyspace.put("k", format!("{round}:elsewhere")).await?;
        gaps.push(last.elapsed());
        // The next operation is served at once.
        let next = Instant::now();
        ensure!(keyspace.get("k").await?.unwrap().bytes() == format!("{round}:elsewhere"));
        ensure!(next.elapsed() < Duration::from_millis(900), "the second operation waited too");
        match loss {
            Loss::Kill => cluster.start_node(primary, Port::Same).await?,
            Loss::Stop => cluster.node_process(primary)?.signal(Signal::CONT),
            Loss::Silence => drop(silence),
        }
        let stands = until("the node to answer again", DEADLINE, async || {
            keyspace.get("k").await.ok().flatten()
        })
        .await?;
        ensure!(stands.bytes() == format!("{round}:elsewhere"), "round {round}: {stands:?}");
    }
    gaps.sort_unstable();
    println!(
        "{loss:?}: median {:?}, worst {:?} of {rounds}",
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_after_a_kill() -> Result<()> {
    failover(Loss::Kill).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_when_the_primary_stands_still() -> Result<()> {
    failover(Loss::Stop).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_when_the_network_falls_silent() -> Result<()> {
    failover(Loss::Silence).await
}
