//! Shrinks during which nodes, the master or the bucket die, in each step; the nodes and the master
//! are started again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_core::limits::SEAL_TIMEOUT;
use vasto_core::operation::OperationOutcome;
use vasto_core::plan::Step;
use vasto_testkit::http_store::{Fault, HttpStore};
use vasto_tests::replicas::converged;
use vasto_tests::{Cluster, DEADLINE, Kept, Port, Resizing, missing, put_all, resized, until};

const PACE: Duration = Duration::from_millis(4);
const STEPS: [Step; 4] = [Step::Prepare, Step::Tail, Step::Sealing, Step::Committed];

/// The node that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Survivor,
    Source,
}

/// Kills a node as soon as a shrink by one shard is in a step, and starts it again.
async fn kill_in(cluster: &mut Cluster, name: &str, victim: Victim, step: Step) -> Result<()> {
    let shards = cluster.catalog(name).await?.tip()?.spec.shards;
    let shrink = Resizing::start(cluster, name, shards - 1).await?;
    let source = shrink.plan.sources[0].node;
    let node = match victim {
        Victim::Source => source,
        Victim::Survivor => {
            let elsewhere = shrink.plan.targets.iter().find(|target| target.node != source);
            elsewhere.context("every survivor is on the node of the source")?.node
        }
    };
    let node = cluster.node_of(&node.to_string())?;
    shrink.reaches(step).await?;
    cluster.kill9_node(node).await?;
    let left_in = shrink.step()?;
    cluster.start_node(node, Port::New).await?;
    let report = shrink.ended().await?;
    let done = report.outcome == OperationOutcome::Done;
    println!("{victim:?} left in {left_in:?}: {}", resized(&serde_json::to_value(&report)?));
    ensure!(done || left_in != Some(Step::Committed), "a committed shrink was undone: {report:?}");
    if !done {
        cluster.resize(name, shards - 1).await.context("asked again after it was undone")?;
    }
    Ok(())
}

async fn killed_in_each_step(victim: Victim) -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("victim", 5, &["--quarantine", "1s"]).await?;
    let kept = Kept::start(&cluster, "victim", 4_000, PACE).await?;
    for step in STEPS {
        kept.load().acks(30).await?;
        let context = || format!("{victim:?} killed in {step:?}");
        kill_in(&mut cluster, "victim", victim, step).await.with_context(context)?;
        kept.load().acks(30).await.with_context(context)?;
    }
    kept.load().goes_on(5).await?;
    kept.end(&cluster).await?.completely()?;
    cluster.settled("victim").await?;
    cluster.fsck().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_of_a_survivor_killed_in_each_step_of_a_shrink() -> Result<()> {
    killed_in_each_step(Victim::Survivor).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_of_a_source_killed_in_each_step_of_a_shrink() -> Result<()> {
    killed_in_each_step(Victim::Source).await
}

/// The bucket answers nobody from the sealing version on, for longer than a seal may last; then
/// once more, and the master is killed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_or_a_master_that_dies_between_seal_and_decision_is_waited_for() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(2).http(&store).allow_warnings().start().await?;
    for (name, master_too) in [("bucket", false), ("master", true)] {
        let options = ["--replicas", "2", "--ack", "replica", "--quarantine", "1s"];
        cluster.create(name, 3, &options).await?;
        let kept = Kept::start(&cluster, name, 2_000, PACE).await?;
        store.fail_everything_after("\"step\":\"sealing\"", Fault::ResetBefore);
        let shrink = Resizing::start(&cluster, name, 1).await?;
        until("the seal", DEADLINE, async || store.fails_everything().then_some(()))
            .await
            .with_context(|| format!("{name}: {:?}", shrink.tip()))?;
        // The time of the seal is over, which nobody can decide.
        tokio::time::sleep(SEAL_TIMEOUT * 2).await;
        ensure!(shrink.step()? == Some(Step::Sealing), "{name}: {:?}", shrink.tip());
        if master_too {
            cluster.kill9_master().await?;
        }
        store.heal();
        if master_too {
            ensure!(shrink.step()? == Some(Step::Sealing), "a dead master has decided");
            cluster.start_master(Port::Same).await?;
        }
        let report = shrink.ended().await.with_context(|| name.to_owned())?;
        println!("{name}: {:?}, {}", report.outcome, resized(&serde_json::to_value(&report)?));
        if report.outcome == OperationOutcome::Aborted {
            cluster.resize(name, 1).await?;
        }
        kept.load().goes_on(5).await?;
        kept.end(&cluster).await?.completely()?;
    }
    cluster.fsck().await?;
    cluster.finish().await
}

/// The follower of a retiring shard stands still while the shipper accepts writes, dies, and comes
/// back as another incarnation, which seals.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seal_covers_what_a_former_incarnation_has_not_replicated() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("tail", 3, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("tail").await?;
    put_all(&keyspace, "both", 2_000).await?;
    converged(&cluster, "tail").await?;
    let shrink = Resizing::start(&cluster, "tail", 1).await?;
    let retiring = shrink.before.shard(ShardId(2)).context("no shard 2")?.clone();
    let [shipper, follower] = retiring.replicas[..] else { anyhow::bail!("{retiring:?}") };
    let shipper = cluster.node_of(&shipper.node.to_string())?;
    let follower = cluster.node_of(&follower.node.to_string())?;
    shrink.reaches(Step::Tail).await?;
    cluster.node_process(follower)?.signal(Signal::STOP);
    let names = (0..).map(|n| format!("alone{n}"));
    let of_shard = |name: &String| jump(partition_hash(name.as_bytes()), 3).shard == ShardId(2);
    let alone: Vec<String> = names.filter(of_shard).take(100).collect();
    let wrote = futures::future::try_join_all(
        alone.iter().map(|name| async { keyspace.put(name.as_str(), "v").await }),
    )
    .await;
    println!("the shrink is in {:?}", shrink.step()?);
    if wrote.is_ok() {
        cluster.kill9_node(shipper).await?;
        cluster.start_node(shipper, Port::Same).await?;
    }
    cluster.node_process(follower)?.signal(Signal::CONT);
    wrote.context("the shipper accepts nothing alone")?;
    let report = shrink.ended().await?;
    println!("{:?}", report.outcome);
    if report.outcome == OperationOutcome::Aborted {
        cluster.resize("tail", 1).await?;
    }
    let lost = keyspace.get_many(&alone).await?.iter().filter(|value| value.is_none()).count();
    ensure!(lost == 0, "{lost} of {} acknowledged writes are lost", alone.len());
    ensure!(missing(&keyspace, "both", 2_000).await? == 0);
    ensure!(converged(&cluster, "tail").await? == 2_000 + alone.len());
    cluster.finish().await
}

/// A node is away from the middle of a shrink on. Meanwhile the shrink is cancelled, the keyspace
/// deleted, and another one of its name created.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_made_again_while_a_node_is_away_during_a_shrink_is_new() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).allow_warnings().start().await?;
    let options = ["--replicas", "2", "--quarantine", "1s"];
    cluster.create("again", 3, &options).await?;
    let old = cluster.keyspace("again").await?;
    put_all(&old, "old", 2_000).await?;
    converged(&cluster, "again").await?;
    let shrink = Resizing::start(&cluster, "again", 1).await?;
    let away = shrink.plan.targets[0].node;
    shrink.reaches(Step::Tail).await?;
    let node = cluster.node_of(&away.to_string())?;
    cluster.kill9_node(node).await?;
    println!("cancelled: {}", shrink.cancelled(&cluster).await?);
    cluster.json(&["keyspace", "delete", "again", "--yes"]).await?;
    cluster.create("again", 2, &options).await?;
    let new = cluster.keyspace("again").await?;
    put_all(&new, "new", 500).await?;
    cluster.start_node(node, Port::Same).await?;
    for (_, replica, _) in shrink.began.members_on(away) {
        let dir = cluster.replica_dir(node, &shrink.began, replica);
        let what = format!("the files of replica {replica} of the deleted keyspace to go");
        until(&what, DEADLINE, async || (!dir.exists()).then_some(())).await?;
    }
    for shards in [3, 1] {
        cluster.settled("again").await?;
        println!("{}", resized(&cluster.resize("again", shards).await?));
        ensure!(missing(&new, "new", 500).await? == 0, "with {shards} shards");
        ensure!(
            missing(&new, "old", 2_000).await? == 2_000,
            "a row of the deleted keyspace is back"
        );
        ensure!(converged(&cluster, "again").await? == 500, "with {shards} shards");
    }
    cluster.finish().await
}
