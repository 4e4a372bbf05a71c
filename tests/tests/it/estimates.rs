//! Plans beside what then happens: bytes that move, and bytes that come from the bucket, for each
//! kind of structural change, straight after writes and after a compaction. Times are printed; they
//! are compared only where `VASTO_ESTIMATED_ROWS` sets how many rows a keyspace has (`make soak`: so
//! many that a change takes seconds), since otherwise the machine has other things to do. Before they
//! are, the nodes have learnt their rates from changes of as many rows.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde_json::Value;
use std::time::Duration;
use vasto_tests::{Cluster, DEADLINE, missing, put_each, records, until};

/// Rows of a keyspace, and the generated values that each of them holds.
const ROWS: u64 = 12_000;
const VALUES: u64 = 10;
/// How far an estimate of bytes may be from what happens.
const PART: f64 = 0.1;
/// How far an estimate of the time may be: this part of it, and never less than so many seconds.
const TIME: (f64, f64) = (0.3, 1.0);

/// Returns the rows that were asked for, when times are to be compared.
fn rows_asked() -> Option<u64> {
    std::env::var("VASTO_ESTIMATED_ROWS").ok()?.parse().ok()
}

fn rows() -> u64 {
    rows_asked().unwrap_or(ROWS)
}

fn value(index: u64) -> Bytes {
    let all: Vec<u8> =
        (0..VALUES).flat_map(|at| records::value(index * VALUES + at).to_vec()).collect();
    all.into()
}

/// Lets the nodes measure at what rates they read, rewrite, export and ship, when times are to be
/// compared: without that, assumed rates decide.
async fn learnt(cluster: &Cluster) -> Result<()> {
    if rows_asked().is_none() {
        return Ok(());
    }
    filled(cluster, "warm", 1, &["--quarantine", "1s"]).await?;
    for shards in [3, 1] {
        let report = cluster.resize("warm", shards).await?;
        println!("to {shards} shards, to learn: {} ms", report["duration_ms"]);
        cluster.settled("warm").await?;
    }
    cluster.json(&["keyspace", "delete", "warm", "--yes"]).await?;
    Ok(())
}

async fn filled(cluster: &Cluster, name: &str, shards: u32, more: &[&str]) -> Result<()> {
    cluster.create(name, shards, more).await?;
    put_each(&cluster.keyspace(name).await?, "r", rows(), value).await
}

/// Asks for a plan until the nodes have measured what they hold, and reported it.
async fn planned(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    let mut all = args.to_vec();
    all.push("--plan");
    let mut before = Value::Null;
    let measured = until("the plan to stay the same", DEADLINE, async || {
        let plan = cluster.json(&all).await.ok()?;
        let has_bytes = |source: &Value| {
            // A rebalance reads whole replicas.
            let bytes = source.get("bytes_to_read").unwrap_or(&source["bytes"]);
            bytes.as_u64() > Some(0)
        };
        let complete = plan["sources"].as_array()?.iter().all(has_bytes);
        let same = plan["bytes_moved"] == before["bytes_moved"]
            && plan["bytes_from_bucket"] == before["bytes_from_bucket"];
        before = plan.clone();
        tokio::time::sleep(Duration::from_secs(5)).await;
        (complete && same).then_some(plan)
    });
    let plan = measured.await.with_context(|| format!("{args:?}"))?;
    ensure!(plan["refused"].is_null(), "{plan}");
    Ok(plan)
}

fn number(document: &Value, name: &str) -> Result<f64> {
    document[name].as_f64().with_context(|| format!("no {name}: {document}"))
}

/// Compares a plan, and the estimate that the operation has kept, with what happened. A rebalance,
/// which chooses its moves one after the other, keeps none.
fn compare(what: &str, plan: &Value, report: &Value) -> Result<()> {
    let kept = report.get("estimate").unwrap_or(plan);
    ensure!(kept != plan || report["kind"] == "rebalance", "no estimate is kept: {report}");
    let (planned, took) = (number(plan, "seconds")?, number(report, "duration_ms")? / 1_000.0);
    println!("{what}: planned {planned} s, took {took} s");
    ensure!(
        rows_asked().is_none() || (planned - took).abs() <= (TIME.0 * took).max(TIME.1),
        "{what}: {plan}\n{report}"
    );
    for name in ["bytes_moved", "bytes_from_bucket"] {
        let happened = number(report, name)?;
        for (whose, estimated) in
            [("plan", number(plan, name)?), ("operation", number(kept, name)?)]
        {
            let part = estimated / happened - 1.0;
            println!(
                "{what}: {name} {happened}, of the {whose} {estimated}, {:+.1} %",
                part * 100.0
            );
            ensure!(part.abs() <= PART, "{what}: {name} of the {whose}: {plan}\n{report}");
        }
    }
    Ok(())
}

/// Changes the number of shards as planned.
async fn resized(cluster: &Cluster, name: &str, to: u32, compacts: bool) -> Result<()> {
    if compacts {
        cluster.json(&["keyspace", "compact", name]).await?;
    }
    let shards = to.to_string();
    let resize = ["keyspace", "resize", name, "--shards", &shards];
    let plan = planned(cluster, &resize).await?;
    let catalog = cluster.catalog(name).await?;
    let version = catalog.tip()?.version;
    ensure!(plan["disk_needed"].as_array().is_some_and(|all| !all.is_empty()), "{plan}");
    ensure!(catalog.tip()?.version == version, "a plan changed something");
    let report = cluster.json(&resize).await?;
    let when = if compacts { "compacted" } else { "straight after writes" };
    let from = &report["from"];
    compare(&format!("{from} -> {to}, {when}"), &plan, &report)?;
    ensure!(missing(&cluster.keyspace(name).await?, "r", rows()).await? == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resize_moves_the_bytes_that_its_plan_says() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).start().await?;
    learnt(&cluster).await?;
    for compacts in [false, true] {
        for (from, to) in [(4, 5), (1, 6), (6, 2)] {
            let name = format!("from{from}to{to}{}", if compacts { "c" } else { "w" });
            filled(&cluster, &name, from, &["--quarantine", "1s"]).await?;
            resized(&cluster, &name, to, compacts).await?;
        }
    }
    cluster.finish().await
}

/// Every key is written three times before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_versions_of_rows_do_not_count() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).start().await?;
    filled(&cluster, "again", 2, &["--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("again").await?;
    for _ in 0..2 {
        put_each(&keyspace, "r", rows(), value).await?;
    }
    resized(&cluster, "again", 3, false).await?;
    cluster.settled("again").await?;
    // What has left is not counted once more.
    resized(&cluster, "again", 5, true).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_and_a_replacement_read_the_bytes_that_their_plans_say() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(3)
        .set("node.ship_interval=200ms")
        .allow_warnings()
        .start()
        .await?;
    learnt(&cluster).await?;
    filled(&cluster, "moves", 3, &[]).await?;
    let node = cluster.node_id(0).context("node 0 has no id")?;
    let plan = planned(&cluster, &["node", "drain", &node]).await?;
    ensure!(plan["kind"] == "replace" && plan["from"] == node.as_str(), "{plan}");
    let listed = cluster.json(&["node", "list"]).await?;
    let cordoned = listed.as_array().context("no list")?.iter().any(|one| one["cordoned"] == true);
    ensure!(!cordoned, "a plan changed something: {listed}");
    let report = cluster.json(&["node", "drain", &node]).await?;
    compare("drain", &plan, &report)?;

    // The only replicas of their shards are lost with a node: the bucket has them.
    cluster.json(&["keyspace", "checkpoint", "moves"]).await?;
    put_each(&cluster.keyspace("moves").await?, "s", rows() / 4, value).await?;
    cluster.shipped("moves").await?;
    cluster.json(&["node", "uncordon", &node]).await?;
    let lost = cluster.node_id(1).context("node 1 has no id")?;
    cluster.kill9_node(1).await?;
    until("the node to be gone", DEADLINE, async || {
        let nodes = cluster.json(&["node", "list"]).await.ok()?;
        let is_away = |one: &Value| one["node_id"] == lost.as_str() && one["state"] == "away";
        nodes.as_array()?.iter().any(is_away).then_some(())
    })
    .await?;
    let plan = planned(&cluster, &["node", "replace", &lost]).await?;
    ensure!(plan["sources"][0]["node_id"].is_null(), "{plan}");
    let report = cluster.json(&["node", "replace", &lost]).await?;
    compare("replacement", &plan, &report)?;
    let keyspace = cluster.keyspace("moves").await?;
    ensure!(
        missing(&keyspace, "r", rows()).await? + missing(&keyspace, "s", rows() / 4).await? == 0
    );
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_reads_the_bytes_that_its_plan_says() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    learnt(&cluster).await?;
    filled(&cluster, "wide", 6, &[]).await?;
    for what in ["compact", "checkpoint"] {
        cluster.json(&["keyspace", what, "wide"]).await?;
    }
    cluster.add_node().await?;
    let rebalance = ["cluster", "rebalance"];
    let plan = planned(&cluster, &rebalance).await?;
    ensure!(plan["moves"].as_array().is_some_and(|moves| !moves.is_empty()), "{plan}");
    let report = cluster.json(&rebalance).await?;
    ensure!(report["state"] == "done" && report["moves_failed"] == 0, "{report}");
    compare("rebalance", &plan, &report)?;
    ensure!(missing(&cluster.keyspace("wide").await?, "r", rows()).await? == 0);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_reads_the_bytes_that_its_plan_says() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).set("node.ship_interval=200ms").start().await?;
    learnt(&cluster).await?;
    filled(&cluster, "old", 2, &[]).await?;
    let now = ["keyspace", "restore", "old", "--into", "now"];
    let plan = planned(&cluster, &now).await?;
    let none = cluster.vasto(&["keyspace", "describe", "now"]).await?;
    none.refused(1, &["no keyspace"])?;
    let report = cluster.json(&now).await?;
    compare("restore", &plan, &report)?;
    ensure!(missing(&cluster.keyspace("now").await?, "r", rows()).await? == 0);

    // A checkpoint and the log behind it, as they are in the bucket.
    put_each(&cluster.keyspace("old").await?, "s", rows() / 4, value).await?;
    cluster.shipped("old").await?;
    let then = ["keyspace", "restore", "old", "--into", "then", "--from-bucket"];
    let plan = planned(&cluster, &then).await?;
    let report = cluster.json(&then).await?;
    compare("restore from the bucket", &plan, &report)?;
    ensure!(missing(&cluster.keyspace("then").await?, "s", rows() / 4).await? == 0);
    cluster.finish().await
}
