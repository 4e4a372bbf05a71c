//! Resizes that are paused, slowed down and held up while they run: what moves meanwhile, what they
//! tell, and that they end with everything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde_json::Value;
use vasto_core::plan::Step;
use vasto_testkit::http_store::{Fault, HttpStore};
use vasto_tests::replicas::converged;
use vasto_tests::{
    Cluster, DEADLINE, Kept, Numbers, Port, Resizing, missing, put_each, resized, until,
};

const PACE: Duration = Duration::from_millis(10);
const VALUE: usize = 4 << 10;
/// Time for which nothing may move in a pause.
const STILL: Duration = Duration::from_secs(2);
/// Time within which a node learns of a version and ends the pieces under way.
const REACHES_NODES: Duration = Duration::from_secs(1);
/// Time within which an operation says that it does not go on.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

/// Writes values that no compression makes smaller.
pub(super) async fn load(cluster: &Cluster, name: &str, count: u64) -> Result<()> {
    let value = |n: u64| {
        let mut numbers = Numbers::new(n);
        (0..VALUE / 8).flat_map(|_| numbers.draw().to_le_bytes()).collect::<Bytes>()
    };
    put_each(&cluster.keyspace(name).await?, "bulk", count, value).await
}

pub(super) async fn show(cluster: &Cluster, id: &str) -> Result<Value> {
    cluster.json(&["operation", "show", id]).await
}

/// Waits until the targets have taken some of their bytes, and not all.
async fn midway(cluster: &Cluster, id: &str) -> Result<Value> {
    until("bytes to move", DEADLINE, async || {
        let shown = show(cluster, id).await.ok()?;
        let (done, total) = (shown["bytes_done"].as_u64()?, shown["bytes_total"].as_u64()?);
        (shown["step"] == "tail" && done > 0 && done < total).then_some(shown)
    })
    .await
}

/// Checks that the operation is paused and moves nothing; returns what it has moved.
async fn stands_still(cluster: &Cluster, id: &str) -> Result<u64> {
    let before = show(cluster, id).await?;
    tokio::time::sleep(STILL).await;
    let after = show(cluster, id).await?;
    for shown in [&before, &after] {
        ensure!(shown["state"] == "paused" && shown["step"] == "tail", "{shown}");
        ensure!(shown["trouble"].is_null(), "a pause is no trouble: {shown}");
        let waiting = shown["waiting_for"].as_str().unwrap_or_default();
        ensure!(waiting.contains(&format!("vasto operation resume {id}")), "{shown}");
    }
    let done = |shown: &Value| shown["bytes_done"].as_u64().context("no bytes_done");
    ensure!(done(&before)? == done(&after)?, "it moved in a pause: {before}\n{after}");
    done(&after)
}

/// A grow is paused midway. The master is killed and started again meanwhile; nothing moves before
/// somebody resumes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_grow_stands_still_outlives_its_master_and_ends_when_it_is_resumed() -> Result<()>
{
    let mut cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("ks", 2, &["--quarantine", "1s"]).await?;
    load(&cluster, "ks", 4_000).await?;
    let kept = Kept::start(&cluster, "ks", 500, PACE).await?.beside("bulk");
    let grow = Resizing::start_with(&cluster, "ks", 3, &["--max-rate", "512KiB"]).await?;
    let id = grow.id.as_str();
    let shown = midway(&cluster, id).await?;
    ensure!(shown["state"] == "running" && shown["max_rate"] == 512 << 10, "{shown}");
    let paused = cluster.json(&["operation", "pause", id]).await?;
    ensure!(paused["state"] == "paused", "{paused}");
    let again = cluster.json(&["operation", "pause", id]).await?;
    ensure!(again["state"] == "paused", "a pause is asked for twice: {again}");
    tokio::time::sleep(REACHES_NODES).await;
    let done = stands_still(&cluster, id).await?;
    kept.load().goes_on(20).await.context("writes in a pause")?;

    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    until("the nodes to report to the new master", DEADLINE, async || {
        let shown = show(&cluster, id).await.ok()?;
        let waiting = shown["waiting_for"].as_str()?;
        (shown["bytes_total"].as_u64()? > 0 && waiting.contains("is paused")).then_some(())
    })
    .await?;
    ensure!(stands_still(&cluster, id).await? == done, "it moved under the new master");
    let limited = cluster.json(&["operation", "rate", id, "none"]).await?;
    ensure!(limited["state"] == "paused" && limited["max_rate"].is_null(), "{limited}");
    ensure!(grow.step()? == Some(Step::Tail) && grow.tip()?.spec.shards == 2);

    let resumed = cluster.json(&["operation", "resume", id]).await?;
    ensure!(resumed["state"] == "running", "{resumed}");
    let report = grow.done().await?;
    println!("{}", resized(&serde_json::to_value(&report)?));
    kept.load().goes_on(20).await?;
    kept.end(&cluster).await?.completely()?;
    ensure!(missing(&cluster.keyspace("ks").await?, "bulk", 4_000).await? == 0);
    for change in [&["pause", id][..], &["resume", id], &["rate", id, "1MiB"]] {
        let args = [&["operation"][..], change].concat();
        cluster.vasto(&args).await?.refused(1, &["has ended already"])?;
    }
    cluster.finish().await
}

/// A paused shrink is cancelled: its exports and builds end, and nothing has changed. A pause that
/// comes before the export is one too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_shrink_is_cancelled_and_leaves_nothing() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("ks", 3, &["--replicas", "2", "--quarantine", "1s"]).await?;
    load(&cluster, "ks", 1_000).await?;
    for pause_in in [Step::Prepare, Step::Tail] {
        let shrink = Resizing::start_with(&cluster, "ks", 1, &["--max-rate", "256KiB"]).await?;
        if pause_in == Step::Tail {
            cluster.json(&["operation", "rate", &shrink.id, "none"]).await?;
            shrink.reaches(Step::Tail).await?;
            let _ = cluster.vasto(&["operation", "rate", &shrink.id, "64KiB"]).await?;
        }
        let paused = cluster.vasto(&["operation", "pause", &shrink.id]).await?;
        println!("paused in {:?}: {}", shrink.step()?, paused.code == 0);
        let cancelled = shrink.cancelled(&cluster).await?;
        ensure!(cancelled || paused.code != 0, "a paused shrink went on");
        if !cancelled {
            cluster.settled("ks").await?;
            cluster.resize("ks", 3).await?;
        }
        cluster.settled("ks").await?;
        ensure!(missing(&cluster.keyspace("ks").await?, "bulk", 1_000).await? == 0);
    }
    ensure!(converged(&cluster, "ks").await? == 1_000);
    cluster.fsck().await?;
    cluster.finish().await
}

/// The bytes that all nodes together move are bounded; the bound is lifted while it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_bounds_what_all_nodes_of_a_grow_move_together() -> Result<()> {
    const RATE: u64 = 1 << 20;
    /// Each of two targets may have one piece ahead of the rate; and some is not reported yet.
    const AHEAD: u64 = 17 << 20;
    const ROWS: u64 = 12_000;
    /// Shortest time over which the bytes are counted.
    const WATCHED: Duration = Duration::from_secs(4);
    let cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("ks", 1, &["--replicas", "2", "--quarantine", "1s"]).await?;
    load(&cluster, "ks", ROWS).await?;
    let grow = Resizing::start_with(&cluster, "ks", 2, &["--max-rate", "1MiB"]).await?;
    let first = midway(&cluster, &grow.id).await?;
    let began = Instant::now();
    // A piece that came at once is paid for by the time after it, so bytes arrive in steps.
    let (second, moved) = until("more bytes to move", DEADLINE, async || {
        let second = show(&cluster, &grow.id).await.ok()?;
        let before = first["bytes_done"].as_u64()?;
        let moved = second["bytes_done"].as_u64()?.checked_sub(before)?;
        let is_told = second["rate"].as_u64()? > 0;
        (moved > 0 && is_told && began.elapsed() >= WATCHED).then_some((second, moved))
    })
    .await?;
    let most = (RATE as f64 * began.elapsed().as_secs_f64()) as u64 + AHEAD;
    println!("{moved} bytes of at most {most}, reported {} a second", second["rate"]);
    ensure!(moved <= most, "{moved} bytes moved, at most {most} were allowed: {second}");
    ensure!(second["seconds_left"].as_u64().is_some(), "{second}");
    ensure!(second["targets"].as_array().is_some_and(|targets| targets.len() == 2), "{second}");
    cluster
        .vasto(&["operation", "rate", &grow.id, "1"])
        .await?
        .refused(2, &["vasto operation pause"])?;
    let free = cluster.json(&["operation", "rate", &grow.id, "none"]).await?;
    ensure!(free["max_rate"].is_null(), "{free}");
    grow.done().await?;
    ensure!(missing(&cluster.keyspace("ks").await?, "bulk", ROWS).await? == 0);
    cluster
        .vasto(&["operation", "pause", "op-9-9"])
        .await?
        .refused(1, &["no operation `op-9-9`"])?;
    cluster.vasto(&["operation", "rate", "op-9-9", "fast"]).await?.refused(2, &["20MiB"])?;
    cluster.finish().await
}

/// The bucket answers nobody any more, from the moment at which the targets begin to load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_is_away_is_told_within_ten_seconds_and_no_longer_than_it_is() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let cluster = Cluster::builder().nodes(2).http(&store).allow_warnings().start().await?;
    cluster.create("ks", 2, &["--quarantine", "1s"]).await?;
    load(&cluster, "ks", 500).await?;
    until("nothing to warn of", DEADLINE, async || {
        let check = cluster.vasto(&["cluster", "check"]).await.ok()?;
        (check.code == 0 && !check.stdout.contains("NOT OK")).then_some(())
    })
    .await?;
    store.fail_everything_after("\"step\":\"tail\"", Fault::ResetBefore);
    let grow = Resizing::start(&cluster, "ks", 3).await?;
    until("the outage", DEADLINE, async || store.fails_everything().then_some(())).await?;
    let began = Instant::now();
    let shown = until("the trouble to be told", TOLD_WITHIN, async || {
        let shown = show(&cluster, &grow.id).await.ok()?;
        (!shown["trouble"].is_null()).then_some(shown)
    })
    .await
    .with_context(|| format!("{:?}", grow.tip()))?;
    println!("told after {:?}: {}", began.elapsed(), shown["trouble"]);
    let told = shown["trouble"].to_string();
    ensure!(told.contains("the bucket") && told.contains("goes on by itself"), "{told}");
    let status = cluster.json(&["cluster", "status"]).await?;
    ensure!(status["warnings"].to_string().contains(&grow.id), "{status}");
    let check = cluster.vasto(&["cluster", "check"]).await?;
    ensure!(check.code == 1 && check.stdout.contains(&grow.id), "{check:?}");
    store.heal();
    let report = grow.done().await?;
    println!("{}", resized(&serde_json::to_value(&report)?));
    until("nothing to be told any more", DEADLINE, async || {
        let check = cluster.vasto(&["cluster", "check"]).await.ok()?;
        (!check.stdout.contains(&grow.id)).then_some(())
    })
    .await?;
    ensure!(missing(&cluster.keyspace("ks").await?, "bulk", 500).await? == 0);
    cluster.finish().await
}
