//! Drains of nodes and rebalances that are slowed down, paused and held up, with all that they move.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vasto_testkit::http_store::{Fault, HttpStore};
use vasto_tests::{Cluster, DEADLINE, Port, missing, until};

use super::paused::{load, show};

/// Time for which nothing may move in a pause.
const STILL: Duration = Duration::from_secs(2);
/// Time within which a node learns of a version and ends the pieces under way.
const REACHES_NODES: Duration = Duration::from_secs(1);
/// Time within which an operation says that it does not go on.
const TOLD_WITHIN: Duration = Duration::from_secs(10);
const ROWS: u64 = 6_000;
/// The bound of the rate, bytes a second.
const RATE: u64 = 256 << 10;

fn id_of(operation: &Value) -> Result<String> {
    Ok(operation["id"].as_str().context("no id")?.to_owned())
}

/// Waits until it is known how many bytes are to move. They may be few objects, the first of which
/// passes at once, so that an operation midway may never be seen.
async fn knows_its_bytes(cluster: &Cluster, id: &str) -> Result<()> {
    until("bytes to move", DEADLINE, async || {
        let shown = show(cluster, id).await.ok()?;
        (shown["bytes_total"].as_u64()? > 0).then_some(())
    })
    .await
}

/// Returns the operations that are parts of others and run: copies and moves.
async fn parts(cluster: &Cluster) -> Result<Vec<Value>> {
    let listed = cluster.json(&["operation", "list"]).await?;
    let all = listed.as_array().context("no list")?.iter();
    let parts = all.filter(|one| one["kind"] == "move" || one["kind"] == "replica");
    Ok(parts.filter(|one| one["step"].is_string()).cloned().collect())
}

/// Checks that the parts together have no greater rate than the whole.
async fn share_the_rate(cluster: &Cluster) -> Result<()> {
    until("the parts to share the rate", DEADLINE, async || {
        let parts = parts(cluster).await.ok()?;
        let rates: Option<Vec<u64>> = parts.iter().map(|one| one["max_rate"].as_u64()).collect();
        let rates = rates.filter(|rates| !rates.is_empty())?;
        (rates.iter().sum::<u64>() <= RATE).then_some(())
    })
    .await
}

/// Checks that the operation is paused and moves nothing.
async fn stands_still(cluster: &Cluster, id: &str) -> Result<()> {
    let before = show(cluster, id).await?;
    tokio::time::sleep(STILL).await;
    let after = show(cluster, id).await?;
    for shown in [&before, &after] {
        ensure!(shown["state"] == "paused" && shown["trouble"].is_null(), "{shown}");
        let waiting = shown["waiting_for"].as_str().unwrap_or_default();
        ensure!(waiting.contains(&format!("vasto operation resume {id}")), "{shown}");
    }
    ensure!(before["bytes_done"] == after["bytes_done"], "it moved: {before}\n{after}");
    for part in parts(cluster).await? {
        ensure!(part["state"] == "paused", "{part}");
    }
    Ok(())
}

/// Pauses the operation, kills the master, and resumes it under the next one; waits for its end.
async fn through_a_pause(cluster: &mut Cluster, id: &str) -> Result<()> {
    share_the_rate(cluster).await?;
    let paused = cluster.json(&["operation", "pause", id]).await?;
    ensure!(paused["state"] == "paused" && paused["max_rate"] == RATE, "{paused}");
    tokio::time::sleep(REACHES_NODES).await;
    stands_still(cluster, id).await?;
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    until("the nodes to report to the new master", DEADLINE, async || {
        let shown = show(cluster, id).await.ok()?;
        (shown["bytes_total"].as_u64()? > 0).then_some(())
    })
    .await?;
    stands_still(cluster, id).await?;
    for part in parts(cluster).await? {
        let part = id_of(&part)?;
        let refused = cluster.vasto(&["operation", "resume", &part]).await?;
        refused.refused(1, &["is a part of", id])?;
        let refused = cluster.vasto(&["operation", "rate", &part, "none"]).await?;
        refused.refused(1, &["is a part of", id])?;
    }
    let free = cluster.json(&["operation", "rate", id, "none"]).await?;
    ensure!(free["state"] == "paused" && free["max_rate"].is_null(), "{free}");
    let resumed = cluster.json(&["operation", "resume", id]).await?;
    ensure!(resumed["state"] == "running", "{resumed}");
    let ended = until("the operation to end", DEADLINE * 3, async || {
        let shown = show(cluster, id).await.ok()?;
        (shown["state"] != "running").then_some(shown)
    });
    let ended = ended.await?;
    ensure!(ended["state"] == "done", "{ended}");
    for change in [&["pause", id][..], &["rate", id, "1MiB"]] {
        let args = [&["operation"][..], change].concat();
        cluster.vasto(&args).await?.refused(1, &["has ended already"])?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_is_slowed_down_and_paused_with_its_copies_and_goes_on_under_the_next_master()
-> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    for name in ["one", "two"] {
        cluster.create(name, 2, &[]).await?;
        load(&cluster, name, ROWS).await?;
        cluster.json(&["keyspace", "checkpoint", name]).await?;
    }
    let node = cluster.node_id(0).context("no node")?;
    let rate = RATE.to_string();
    let plan = cluster.json(&["node", "drain", &node, "--plan", "--max-rate", &rate]).await?;
    let least = plan["bytes_from_bucket"].as_u64().unwrap_or_default() as f64 / RATE as f64;
    ensure!(least > 1.0 && plan["seconds"].as_f64() >= Some(least), "{plan}");
    let begun = cluster.json(&["node", "drain", &node, "--max-rate", &rate, "--no-wait"]).await?;
    let id = id_of(&begun)?;
    knows_its_bytes(&cluster, &id).await?;
    through_a_pause(&mut cluster, &id).await?;
    for name in ["one", "two"] {
        ensure!(missing(&cluster.keyspace(name).await?, "bulk", ROWS).await? == 0);
        let tip = cluster.whole(name).await?;
        ensure!(tip.members_on(node.parse()?).is_empty(), "{tip:?}");
    }
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_is_slowed_down_and_paused_with_its_moves_and_goes_on_under_the_next_master()
-> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).allow_warnings().start().await?;
    cluster.create("wide", 6, &[]).await?;
    load(&cluster, "wide", 2 * ROWS).await?;
    cluster.json(&["keyspace", "checkpoint", "wide"]).await?;
    let joined = cluster.add_node().await?;
    let joined = cluster.node_id(joined).context("no node")?;
    let rate = RATE.to_string();
    // The sizes are in the next report after the checkpoints.
    let free = until("a plan that knows the sizes", DEADLINE, async || {
        let plan = cluster.json(&["cluster", "rebalance", "--plan"]).await.ok()?;
        (plan["bytes_moved"].as_u64() > Some(0)).then_some(plan)
    });
    let free = free.await?;
    let plan = cluster.json(&["cluster", "rebalance", "--plan", "--max-rate", &rate]).await?;
    ensure!(plan["seconds"].as_f64() > free["seconds"].as_f64(), "{plan} instead of {free}");
    let begun = cluster.json(&["cluster", "rebalance", "--max-rate", &rate, "--no-wait"]).await?;
    let id = id_of(&begun)?;
    knows_its_bytes(&cluster, &id).await?;
    through_a_pause(&mut cluster, &id).await?;
    ensure!(missing(&cluster.keyspace("wide").await?, "bulk", 2 * ROWS).await? == 0);
    let tip = cluster.whole("wide").await?;
    ensure!(!tip.members_on(joined.parse()?).is_empty(), "{tip:?}");
    cluster.fsck().await?;
    cluster.finish().await
}

/// The bucket answers nobody any more, from the moment at which replicas begin to move.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_does_not_go_on_is_told_within_ten_seconds() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(2).http(&store).allow_warnings().start().await?;
    cluster.create("wide", 6, &[]).await?;
    load(&cluster, "wide", 500).await?;
    cluster.json(&["keyspace", "checkpoint", "wide"]).await?;
    cluster.add_node().await?;
    store.fail_everything_after("\"step\":\"tail\"", Fault::ResetBefore);
    let id = id_of(&cluster.json(&["cluster", "rebalance", "--no-wait"]).await?)?;
    until("the outage", DEADLINE, async || store.fails_everything().then_some(())).await?;
    let began = Instant::now();
    let shown = until("the trouble to be told", TOLD_WITHIN, async || {
        let shown = show(&cluster, &id).await.ok()?;
        (!shown["trouble"].is_null()).then_some(shown)
    })
    .await?;
    println!("told after {:?}: {}", began.elapsed(), shown["trouble"]);
    ensure!(shown["trouble"]["what"].to_string().contains("bucket"), "{shown}");
    let moves = parts(&cluster).await?;
    let stuck = moves.iter().find(|one| !one["trouble"].is_null()).context("no move is stuck")?;
    let stuck = id_of(stuck)?;
    let check = cluster.vasto(&["cluster", "check"]).await?;
    ensure!(check.code == 1 && check.stdout.contains(&stuck), "{check:?}");
    store.heal();
    let done = until("the rebalance to end", DEADLINE * 4, async || {
        let shown = show(&cluster, &id).await.ok()?;
        (shown["state"] != "running").then_some(shown)
    });
    let done = done.await?;
    ensure!(done["state"] == "done", "{done}");
    ensure!(missing(&cluster.keyspace("wide").await?, "bulk", 500).await? == 0);
    cluster.finish().await
}
