//! Resizes that are held at a failpoint, or whose servers die at one: the side of a step that
//! polling cannot hit.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vasto_core::operation::OperationOutcome;
use vasto_core::plan::Step;
use vasto_failpoint::{Action, Point, points};
use vasto_tests::replicas::converged;
use vasto_tests::{Cluster, DEADLINE, Kept, Port, Resizing, missing, put_all, resized, until};

const PACE: Duration = Duration::from_millis(4);

async fn started(nodes: usize) -> Result<Cluster> {
    Cluster::builder().nodes(nodes).failpoints().allow_warnings().start().await
}

/// Waits until a server has fired at a point; returns its process.
async fn fired(cluster: &Cluster, point: Point) -> Result<u32> {
    let what = format!("{} to be reached", point.name());
    until(&what, DEADLINE, async || cluster.failpoints().reached(point).ok()?).await
}

/// Waits until a node has died at a point, and starts it again, unless it was started since it died
/// at another one.
async fn dies_at(cluster: &mut Cluster, point: Point) -> Result<()> {
    let pid = fired(cluster, point).await?;
    if let Some(node) = cluster.node_of_pid(pid) {
        // It has killed itself, or is about to.
        cluster.kill9_node(node).await?;
        cluster.start_node(node, Port::New).await?;
        println!("node {node} died at {}", point.name());
    }
    Ok(())
}

/// Four shards become eight. A target dies before its ingest, then one dies behind it, before its
/// manifest: the first is prepared again, the second goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_of_several_that_dies_around_its_ingest_is_prepared_again() -> Result<()> {
    let mut cluster = started(3).await?;
    let options = ["--replicas", "2", "--ack", "replica", "--quarantine", "1s"];
    cluster.create("again", 4, &options).await?;
    let kept = Kept::start(&cluster, "again", 4_000, PACE).await?;
    for point in [points::TARGET_INGEST_BEFORE, points::TARGET_INGEST_AFTER] {
        cluster.failpoints().arm(point, Action::Exit)?;
    }
    let grow = Resizing::start(&cluster, "again", 8).await?;
    for point in [points::TARGET_INGEST_BEFORE, points::TARGET_INGEST_AFTER] {
        dies_at(&mut cluster, point).await?;
    }
    let report = grow.ended().await?;
    println!("{:?}, {}", report.outcome, resized(&serde_json::to_value(&report)?));
    if report.outcome != OperationOutcome::Done {
        cluster.resize("again", 8).await.context("asked again after it was undone")?;
    }
    kept.load().goes_on(5).await?;
    kept.end(&cluster).await?.completely()?;
    cluster.settled("again").await?;
    cluster.fsck().await?;
    cluster.finish().await
}

/// The master dies right behind the write of the commit, which nobody has seen: the next one carries
/// it out. Before the write, nothing is decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_nobody_has_seen_is_carried_out_by_the_next_master() -> Result<()> {
    let mut cluster = started(2).await?;
    cluster.create("unseen", 2, &["--quarantine", "1s"]).await?;
    let kept = Kept::start(&cluster, "unseen", 2_000, PACE).await?;
    for (point, to) in [(points::MASTER_COMMITTED_AFTER, 3), (points::MASTER_COMMITTED_BEFORE, 5)] {
        cluster.failpoints().arm(point, Action::Exit)?;
        let grow = Resizing::start(&cluster, "unseen", to).await?;
        fired(&cluster, point).await?;
        cluster.kill9_master().await?;
        let left_in = grow.step()?;
        let decided = point == points::MASTER_COMMITTED_AFTER;
        ensure!((left_in == Some(Step::Committed)) == decided, "{}: {left_in:?}", point.name());
        cluster.start_master(Port::Same).await?;
        let report = grow.ended().await?;
        println!("{}: {:?}", point.name(), report.outcome);
        ensure!(!decided || report.outcome == OperationOutcome::Done, "a commit was undone");
        kept.load().goes_on(5).await?;
    }
    kept.end(&cluster).await?.completely()?;
    cluster.finish().await
}

/// The rows are in the tables that a target has written when their time ends; it is held before its
/// ingest until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_whose_time_ends_while_they_move_are_gone_at_their_new_place() -> Result<()> {
    const ROWS: u64 = 400;
    let cluster = started(2).await?;
    cluster.create("passing", 1, &["--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("passing").await?;
    put_all(&keyspace, "stays", ROWS).await?;
    cluster.failpoints().arm(points::TARGET_INGEST_BEFORE, Action::Pause)?;
    let passes = Duration::from_secs(6);
    for n in 0..ROWS {
        keyspace.put(format!("passing{n}"), "v").ttl(passes).await?;
    }
    let grow = Resizing::start(&cluster, "passing", 2).await?;
    fired(&cluster, points::TARGET_INGEST_BEFORE).await?;
    ensure!(
        missing(&keyspace, "passing", ROWS).await? < ROWS as usize,
        "their time was over before they moved: this shows nothing"
    );
    until("their time to be over", DEADLINE, async || {
        (missing(&keyspace, "passing", ROWS).await.ok()? == ROWS as usize).then_some(())
    })
    .await?;
    cluster.failpoints().release(points::TARGET_INGEST_BEFORE)?;
    grow.done().await?;
    ensure!(missing(&keyspace, "passing", ROWS).await? == ROWS as usize, "an ended row is back");
    ensure!(missing(&keyspace, "stays", ROWS).await? == 0);
    ensure!(converged(&cluster, "passing").await? == ROWS as usize);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_bucket_has_of_a_source_outlives_the_target_that_dies_at_the_commit() -> Result<()>
{
    target_dies_at_the_commit(2).await
}

/// The shard of the source is made again first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_bucket_has_of_a_source_outlives_both_when_they_die_at_the_commit() -> Result<()> {
    target_dies_at_the_commit(1).await
}

/// While a target follows, its source acknowledges writes because the bucket has them. The target
/// dies at the commit, with its disk, before it has shipped what it had taken; on an only node its
/// source does, too.
async fn target_dies_at_the_commit(nodes: usize) -> Result<()> {
    const ROWS: u64 = 300;
    let started = Cluster::builder().nodes(nodes).set("node.ship_interval=1h").failpoints();
    let mut cluster = started.allow_warnings().start().await?;
    cluster.create("behind", 1, &["--ack", "bucket"]).await?;
    let keyspace = cluster.keyspace("behind").await?;
    put_all(&keyspace, "before", ROWS).await?;
    cluster.failpoints().arm(points::MASTER_SEALING_BEFORE, Action::Pause)?;
    cluster.failpoints().arm(points::TARGET_OPEN_BEFORE, Action::Exit)?;
    let grow = Resizing::start(&cluster, "behind", 2).await?;
    fired(&cluster, points::MASTER_SEALING_BEFORE).await?;
    put_all(&keyspace, "followed", ROWS).await?;
    cluster.failpoints().release(points::MASTER_SEALING_BEFORE)?;
    let pid = fired(&cluster, points::TARGET_OPEN_BEFORE).await?;
    let lost = cluster.node_of_pid(pid).context("no node has died")?;
    let id = cluster.node_id(lost).context("it has no id")?;
    cluster.kill9_node(lost).await?;
    std::fs::remove_dir_all(cluster.node_dir(lost))?;
    // A master that hears no node at all decides nothing.
    cluster.add_node().await?;
    // It ends without the target, once that has been away for a minute.
    let report = grow.ended().await?;
    ensure!(report.outcome == OperationOutcome::Done, "{report:?}");
    let replaced = cluster.json(&["node", "replace", &id]).await?;
    ensure!(replaced["state"] == "done", "{replaced}");
    let keyspace = cluster.keyspace("behind").await?;
    for prefix in ["before", "followed"] {
        let gone = missing(&keyspace, prefix, ROWS).await?;
        ensure!(gone == 0, "{gone} acknowledged writes of {prefix} are lost");
    }
    cluster.finish().await
}
