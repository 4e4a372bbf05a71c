//! Shrinks while clients write and read: what they keep, what they move, what they leave behind,
//! and what they wait for.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use vasto_client::{Keyspace, Outcome, Rows};
use vasto_core::catalog::Catalog;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::operation::OperationKind;
use vasto_core::plan::Step;
use vasto_tests::replicas::{converged, floors_above};
use vasto_tests::{
    Cluster, DEADLINE, Kept, Port, Resizing, Stutter, missing, put_all, put_each, records, resized,
    rows, same, until,
};

/// Pause of each client between two operations: several keyspaces are under load at a time.
const PACE: Duration = Duration::from_millis(8);

/// Waits until a shrink is over completely: the survivors are placed as before, and no node has
/// files of a replica that has retired.
async fn is_shrunk(cluster: &Cluster, name: &str, before: &Catalog, to: u32) -> Result<()> {
    cluster.settled(name).await?;
    let tip = cluster.catalog(name).await?.tip()?;
    let (stay, retired) = before.placement.split_at(to as usize);
    let same = tip.placement.iter().map(|shard| &shard.replicas);
    let same = same.eq(stay.iter().map(|shard| &shard.replicas));
    ensure!(tip.spec.shards == to && same, "{:?} instead of {stay:?}", tip.placement);
    let described = cluster.json(&["keyspace", "describe", name]).await?;
    let shown = described["placement"].as_array().map(Vec::len);
    ensure!(described["shards"] == to && shown == Some(to as usize), "{described}");
    for one in retired.iter().flat_map(|shard| &shard.replicas) {
        let dir = cluster.replica_dir(cluster.node_of(&one.node.to_string())?, before, one.replica);
        let what = format!("{name}: the retired replica {} to be removed", one.replica);
        until(&what, DEADLINE, async || (!dir.exists()).then_some(())).await?;
    }
    Ok(())
}

async fn shrink_under_load(cluster: &Cluster, replicas: u32, from: u32, to: u32) -> Result<()> {
    let name = format!("from{from}to{to}by{replicas}");
    let count = replicas.to_string();
    cluster.create(&name, from, &["--replicas", &count, "--quarantine", "1s"]).await?;
    let kept = Kept::start(cluster, &name, 3_000, PACE).await?;
    kept.load().goes_on(5).await?;
    let before = cluster.catalog(&name).await?.tip()?;
    let report = cluster.resize(&name, to).await?;
    println!("{}", resized(&report));
    ensure!(
        report["kind"] == "shrink"
            && report["state"] == "done"
            && (&report["from"], &report["to"]) == (&from.into(), &to.into())
            && report["keys_moved"].as_u64() > Some(0),
        "{report}"
    );
    kept.load().goes_on(5).await?;
    is_shrunk(cluster, &name, &before, to).await?;
    kept.load().goes_on(5).await?;
    kept.end(cluster).await?.smoothly()
}

/// All these keyspaces shrink at the same time: replicas, shards before and after.
async fn shrinks_under_load(shrinks: &[(u32, u32, u32)]) -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    let all =
        shrinks.iter().map(|(replicas, from, to)| {
            let shrink = shrink_under_load(&cluster, *replicas, *from, *to);
            async move {
                shrink.await.with_context(|| format!("{from} -> {to} with {replicas} replicas"))
            }
        });
    futures::future::try_join_all(all).await?;
    cluster.fsck().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shrinks_with_one_and_with_three_replicas_lose_nothing() -> Result<()> {
    let all = [(1, 8, 4), (1, 3, 1), (1, 16, 1), (1, 16, 10), (1, 5, 2), (3, 5, 2)];
    shrinks_under_load(&all).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shrinks_with_two_replicas_lose_nothing() -> Result<()> {
    shrinks_under_load(&[(2, 8, 4), (2, 3, 1), (2, 16, 1), (2, 16, 10), (2, 5, 2)]).await
}

/// The bytes of the retiring shards are read once from the bucket for each replica that takes them.
/// A survivor gets a new replica right afterwards, and the bucket keeps no export.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shrink_reads_each_moved_byte_once_and_leaves_nothing_in_the_bucket() -> Result<()> {
    const ROWS: u64 = 40_000;
    let cluster = Cluster::builder().keeps_no_garbage().start().await?;
    cluster.create("bytes", 8, &["--replicas", "2", "--quarantine", "3s"]).await?;
    let keyspace = cluster.keyspace("bytes").await?;
    put_each(&keyspace, "r", ROWS, records::value).await?;
    cluster.json(&["keyspace", "compact", "bytes"]).await?;
    let shrink = Resizing::start(&cluster, "bytes", 4).await?;
    let exports = shrink.exports().await?;
    let report = shrink.done().await?;
    println!("{}", resized(&serde_json::to_value(&report)?));
    let moves = |n: &u64| jump(partition_hash(format!("r{n}").as_bytes()), 8).shard.0 >= 4;
    let moving = (0..ROWS).filter(moves).count() as u64;
    ensure!(report.kind == OperationKind::Shrink && report.keys_moved == 2 * moving, "{report:?}");
    let ratio = report.bytes_from_bucket as f64 / report.bytes_moved as f64;
    ensure!(ratio <= 1.1, "{ratio:.3} bytes were read for each byte that moved: {report:?}");
    // Nobody writes: the log has the records of the shards themselves alone.
    ensure!(report.bytes_from_peers < report.bytes_moved / 10, "{report:?}");

    let follower = shrink.tip()?.placement[1].replicas[1].replica.to_string();
    cluster.json(&["keyspace", "evict", "bytes", "--replica", &follower]).await?;
    cluster.whole("bytes").await?;
    ensure!(converged(&cluster, "bytes").await? as u64 == ROWS, "the new replica lacks rows");

    cluster.exports_go(&[("bytes".to_owned(), exports)]).await?;
    cluster.json(&["keyspace", "restore", "bytes", "--into", "copy"]).await?;
    ensure!(missing(&cluster.keyspace("copy").await?, "r", ROWS).await? == 0);
    cluster.finish().await
}

/// The follower of a survivor runs a fifth of the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shrink_with_a_slow_follower_loses_nothing() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).allow_warnings().start().await?;
    let options = ["--replicas", "2", "--ack", "replica", "--quarantine", "1s"];
    cluster.create("slow", 4, &options).await?;
    let kept = Kept::start(&cluster, "slow", 4_000, PACE).await?;
    let before = cluster.catalog("slow").await?.tip()?;
    let follower = cluster.node_of(&before.placement[0].replicas[1].node.to_string())?;
    let pid = cluster.node_process(follower)?.pid();
    let slow = Stutter::start(pid, Duration::from_millis(160), Duration::from_millis(40));
    let shrink = Resizing::start(&cluster, "slow", 2).await?;
    let report = shrink.done().await?;
    println!("{}", resized(&serde_json::to_value(&report)?));
    drop(slow);
    is_shrunk(&cluster, "slow", &before, 2).await?;
    kept.load().goes_on(5).await?;
    kept.end(&cluster).await?.completely()?;
    cluster.finish().await
}

/// Takes the next rows of a scan.
async fn take(scan: &mut Rows, count: usize, into: &mut Vec<String>) -> Result<()> {
    for _ in 0..count {
        let Some(row) = scan.try_next().await? else { break };
        into.push(String::from_utf8(row.key.to_vec())?);
    }
    Ok(())
}

/// One scan is read across all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shrink_waits_for_the_quarantine_of_a_grow_and_a_scan_goes_on_across_both() -> Result<()>
{
    const ROWS: u64 = 40_000;
    let cluster = Cluster::builder().start().await?;
    cluster.create("both", 2, &["--quarantine", "3s"]).await?;
    let keyspace = cluster.keyspace("both").await?;
    put_all(&keyspace, "k", ROWS).await?;
    let mut found = Vec::new();
    let mut scan = keyspace.scan().prefix("k").keys_only().stream();
    take(&mut scan, 3_000, &mut found).await?;
    println!("{}", resized(&cluster.resize("both", 5).await?));
    let early = cluster.vasto(&["keyspace", "resize", "both", "--shards", "2"]).await?;
    early.refused(1, &["still keep rows that left them in an earlier grow", "--end-quarantine"])?;
    take(&mut scan, 9_000, &mut found).await?;
    cluster.settled("both").await?;
    for shards in [3, 1] {
        println!("{}", resized(&cluster.resize("both", shards).await?));
        take(&mut scan, 9_000, &mut found).await?;
    }
    take(&mut scan, usize::MAX, &mut found).await?;
    let wanted: BTreeSet<String> = (0..ROWS).map(|n| format!("k{n}")).collect();
    let differs = found.iter().zip(&wanted).position(|(found, wanted)| found != wanted);
    if let Some(at) = differs {
        let next = wanted.iter().nth(at);
        anyhow::bail!("row {at} of the scan is {}, {next:?} should follow", found[at]);
    }
    ensure!(found.len() == wanted.len(), "{} of {ROWS} rows were scanned", found.len());
    cluster.finish().await
}

async fn delete_all(keyspace: &Keyspace, prefix: &str, count: u64) -> Result<u64> {
    let delete = |n: u64| {
        let key = format!("{prefix}{n}");
        async move {
            match keyspace.delete(key).await? {
                Outcome::Applied { event_time } => anyhow::Ok(event_time),
                other => anyhow::bail!("{other:?}"),
            }
        }
    };
    let times = futures::stream::iter(0..count).map(delete).buffer_unordered(64);
    Ok(times.try_collect::<Vec<u64>>().await?.into_iter().max().unwrap_or_default())
}

/// Shrinks are cancelled in each step, when the survivors hold copies of the rows. The rows are
/// deleted then, and the deletes forgotten, before a shrink takes effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_deleted_after_a_cancelled_shrink_stays_deleted_after_the_next() -> Result<()> {
    const ROWS: u64 = 600;
    let mut cluster = Cluster::builder().nodes(3).keeps_no_garbage().start().await?;
    let options = ["--replicas", "2", "--quarantine", "1s", "--tombstone-grace", "1s"];
    cluster.create("gone", 1, &options).await?;
    let keyspace = cluster.keyspace("gone").await?;
    let steps = [Step::Prepare, Step::Tail, Step::Sealing];
    for step in steps {
        put_all(&keyspace, &format!("{step:?}"), ROWS).await?;
    }
    println!("{}", resized(&cluster.resize("gone", 4).await?));
    cluster.settled("gone").await?;
    let mut last = 0;
    for step in steps {
        let before = cluster.catalog("gone").await?.tip()?;
        let shrink = Resizing::start(&cluster, "gone", 1).await?;
        shrink.reaches(step).await?;
        if shrink.cancelled(&cluster).await? {
            let tip = shrink.tip()?;
            ensure!(tip.placement == before.placement && tip.retired.is_empty(), "{tip:?}");
        } else {
            println!("{step:?}: the cancellation came too late");
            cluster.settled("gone").await?;
            cluster.resize("gone", 4).await?;
            cluster.settled("gone").await?;
        }
        ensure!(converged(&cluster, "gone").await? > 0, "{step:?}");
        last = delete_all(&keyspace, &format!("{step:?}"), ROWS).await?.max(last);
    }
    // Every shard has something newer than the deletes, so that its floor rises above them.
    put_all(&keyspace, "stays", 500).await?;
    floors_above(&cluster, "gone", last).await?;
    cluster.json(&["keyspace", "compact", "gone"]).await?;
    let before = cluster.catalog("gone").await?.tip()?;
    println!("{}", resized(&cluster.resize("gone", 1).await?));
    let only_the_rest = async |when: &str| -> Result<()> {
        let keys = converged(&cluster, "gone").await?;
        for step in steps {
            let back = ROWS as usize - missing(&keyspace, &format!("{step:?}"), ROWS).await?;
            ensure!(back == 0, "{when}: {back} rows deleted after {step:?} are back");
        }
        ensure!(keys == 500, "{when}: {keys} rows");
        ensure!(missing(&keyspace, "stays", 500).await? == 0, "{when}");
        Ok(())
    };
    only_the_rest("after the shrink").await?;
    is_shrunk(&cluster, "gone", &before, 1).await?;
    cluster.json(&["keyspace", "compact", "gone"]).await?;
    only_the_rest("after the quarantine").await?;
    cluster.shipped("gone").await?;
    cluster.collect().await?;
    for node in 0..cluster.nodes() {
        cluster.kill9_node(node).await?;
        cluster.start_node(node, Port::Same).await?;
    }
    let keyspace = cluster.keyspace("gone").await?;
    ensure!(missing(&keyspace, "stays", 500).await? == 0, "after a restart");
    ensure!(converged(&cluster, "gone").await? == 500, "after a restart");
    cluster.finish().await
}

/// Rows are deleted, and the deletes forgotten, while the shard that they left still keeps them; it
/// gets the rows of the others back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_deleted_within_the_quarantine_of_a_grow_stays_deleted_after_a_shrink()
-> Result<()> {
    const ROWS: u64 = 600;
    let cluster = Cluster::builder().nodes(3).keeps_no_garbage().start().await?;
    let options = ["--replicas", "2", "--quarantine", "1h", "--tombstone-grace", "1s"];
    cluster.create("kept", 1, &options).await?;
    let keyspace = cluster.keyspace("kept").await?;
    put_all(&keyspace, "goes", ROWS).await?;
    println!("{}", resized(&cluster.resize("kept", 3).await?));
    let last = delete_all(&keyspace, "goes", ROWS).await?;
    // Every shard has something newer than the deletes, so that its floor rises above them.
    put_all(&keyspace, "stays", 500).await?;
    floors_above(&cluster, "kept", last).await?;
    cluster.json(&["keyspace", "compact", "kept"]).await?;
    cluster.json(&["bucket", "gc"]).await?;
    let tip = cluster.catalog("kept").await?.tip()?;
    ensure!(!tip.quarantines.is_empty(), "nothing is kept: this shows nothing");
    let early = cluster.vasto(&["keyspace", "resize", "kept", "--shards", "1"]).await?;
    early.refused(1, &["still keep rows that left them in an earlier grow", "--end-quarantine"])?;
    let shrink = ["keyspace", "resize", "kept", "--shards", "1", "--end-quarantine"];
    println!("{}", resized(&cluster.json(&shrink).await?));
    for when in ["after the shrink", "after a compaction"] {
        let back = ROWS as usize - missing(&keyspace, "goes", ROWS).await?;
        ensure!(back == 0, "{when}: {back} deleted rows are back");
        ensure!(missing(&keyspace, "stays", 500).await? == 0, "{when}");
        let keys = converged(&cluster, "kept").await?;
        ensure!(keys == 500, "{when}: {keys} rows");
        cluster.json(&["keyspace", "compact", "kept"]).await?;
    }
    cluster.finish().await
}

fn now() -> String {
    #[allow(clippy::disallowed_methods)]
    jiff::Timestamp::now().to_string()
}

/// Moments before, between and after a grow and two shrinks, each restored byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_goes_back_across_resizes() -> Result<()> {
    let cluster = Cluster::builder().set("node.ship_interval=200ms").start().await?;
    cluster.create("then", 2, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("then").await?;
    put_all(&keyspace, "k", 2_000).await?;
    let mut moments = Vec::new();
    for (round, shards) in [5, 3, 1, 1].into_iter().enumerate() {
        put_all(&keyspace, &format!("r{round}:"), 300).await?;
        for n in (0..2_000).skip(round).step_by(7) {
            keyspace.delete(format!("k{n}")).await?;
        }
        keyspace.add_i64("counter", 1).await?;
        let held = rows(&keyspace).await?;
        // The moment lies between the writes before it and those after it, by any node's clock.
        tokio::time::sleep(Duration::from_millis(50)).await;
        moments.push((now(), held));
        tokio::time::sleep(Duration::from_millis(50)).await;
        if round < 3 {
            println!("{}", resized(&cluster.resize("then", shards).await?));
            cluster.settled("then").await?;
        }
    }
    converged(&cluster, "then").await?;
    cluster.shipped("then").await?;
    for (number, (at, held)) in moments.iter().enumerate() {
        let name = format!("at{number}");
        cluster
            .json(&["keyspace", "restore", "then", "--into", &name, "--at", at])
            .await
            .with_context(|| format!("moment {number}"))?;
        same(&rows(&cluster.keyspace(&name).await?).await?, held, &name)?;
    }
    cluster.finish().await
}
