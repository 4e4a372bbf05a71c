//! Replicas, nodes and keyspaces that are recovered from the bucket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vasto_client::ReadFrom;
use vasto_tests::replicas::converged;
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, Port, missing, preload, put_all, rows, same, until,
    verify,
};

fn node_id(cluster: &Cluster, index: usize) -> String {
    cluster.node_id(index).unwrap()
}

/// Returns the node that holds the first replica of a shard.
async fn holder(cluster: &Cluster, name: &str, shard: usize) -> Result<usize> {
    let tip = cluster.catalog(name).await?.tip()?;
    cluster.node_of(&tip.placement[shard].replicas[0].node.to_string())
}

fn check_report(report: &Value) -> Result<()> {
    for field in [
        "id",
        "kind",
        "keyspace",
        "from",
        "keys_moved",
        "bytes_moved",
        "bytes_from_bucket",
        "duration_ms",
    ] {
        ensure!(!report[field].is_null(), "{field} is missing: {report}");
    }
    ensure!(report["state"] == "done", "{report}");
    println!("{report}");
    Ok(())
}

/// A node with the only replica is lost for good with its disk: everything that was shipped is
/// recovered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_replaced_from_the_bucket_alone() -> Result<()> {
    for checkpoint in [true, false] {
        let mut cluster =
            Cluster::builder().nodes(2).set("node.ship_interval=200ms").start().await?;
        cluster.create("alone", 2, &[]).await?;
        let keyspace = cluster.keyspace("alone").await?;
        put_all(&keyspace, "a", 5_000).await?;
        if checkpoint {
            cluster.json(&["keyspace", "checkpoint", "alone"]).await?;
        }
        put_all(&keyspace, "b", 500).await?;
        cluster.shipped("alone").await?;
        let before = rows(&keyspace).await?;
        let lost = holder(&cluster, "alone", 0).await?;
        let id = node_id(&cluster, lost);
        cluster.kill9_node(lost).await?;
        std::fs::remove_dir_all(cluster.node_dir(lost))?;
        let drained = cluster.vasto(&["node", "drain", &id]).await?;
        drained.refused(1, &["is away", "vasto node replace"])?;
        let report = cluster.json(&["node", "replace", &id]).await?;
        check_report(&report)?;
        ensure!(report["bytes_from_peers"] == 0 && report["replicas_left"] == 0, "{report}");
        let reached = report["reached"].as_array().context("nothing says what was reached")?;
        ensure!(
            !reached.is_empty() && reached.iter().all(|one| one["lsn"].as_u64() > Some(1)),
            "{report}"
        );
        ensure!(rows(&keyspace).await? == before, "not everything that was shipped is back");
        keyspace.put("after", "the loss").await?;
        // The lost node may return with unshipped writes: that warning stays until the loss is
        // accepted.
        let status = cluster.json(&["cluster", "status"]).await?;
        ensure!(
            status["warnings"].to_string().contains("may hold writes that nobody else has"),
            "{status}"
        );
        let tip = cluster.catalog("alone").await?.tip()?;
        let gone = tip.draining[0].replica.to_string();
        cluster
            .json(&["keyspace", "evict", "alone", "--replica", &gone, "--accept-loss", "--yes"])
            .await?;
        // The replacement is complete: it can be lost too.
        cluster.shipped("alone").await?;
        let next = cluster.add_node().await?;
        let second = node_id(&cluster, 1 - lost);
        let before = rows(&keyspace).await?;
        cluster.kill9_node(1 - lost).await?;
        std::fs::remove_dir_all(cluster.node_dir(1 - lost))?;
        let report =
            cluster.json(&["node", "replace", &second, "--with", &node_id(&cluster, next)]).await?;
        check_report(&report)?;
        ensure!(rows(&keyspace).await? == before, "not everything survived the second loss");
        cluster.finish().await?;
    }
    Ok(())
}

/// Records that were not shipped when their node was replaced are not lost: the node is drained
/// when it returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_node_that_returns_is_drained_of_what_was_never_shipped() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).set("node.ship_interval=1h").start().await?;
    cluster.create("tail", 1, &[]).await?;
    let keyspace = cluster.keyspace("tail").await?;
    put_all(&keyspace, "shipped", 300).await?;
    cluster.json(&["keyspace", "checkpoint", "tail"]).await?;
    put_all(&keyspace, "tail", 300).await?;
    let lost = holder(&cluster, "tail", 0).await?;
    cluster.kill9_node(lost).await?;
    check_report(&cluster.json(&["node", "replace", &node_id(&cluster, lost)]).await?)?;
    ensure!(missing(&keyspace, "shipped", 300).await? == 0);
    ensure!(missing(&keyspace, "tail", 300).await? == 300, "nobody else can have it");
    keyspace.put("tail7", "newer").await?;
    cluster.start_node(lost, Port::Same).await?;
    until("the tail to be drained", DEADLINE, async || {
        (missing(&keyspace, "tail", 300).await.ok()? == 0).then_some(())
    })
    .await?;
    ensure!(keyspace.get("tail7").await?.unwrap().bytes() == "newer");
    let catalog = cluster.catalog("tail").await?;
    until("the drained replica to go", DEADLINE, async || {
        catalog.tip().ok()?.draining.is_empty().then_some(())
    })
    .await?;
    cluster.finish().await
}

/// Live nodes are drained under load; clients do not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_node_is_drained_under_load() -> Result<()> {
    for replicas in ["1", "2"] {
        let cluster = Cluster::builder().nodes(3).start().await?;
        cluster.create("drain", 3, &["--replicas", replicas]).await?;
        let history = Arc::new(History::default());
        preload(&cluster.keyspace("drain").await?, &history, "s:", 10_000).await?;
        let load = Load::start(&cluster.master(), "drain", &history, LoadSpec::default()).await?;
        load.goes_on(50).await?;
        let id = node_id(&cluster, 0);
        let report = cluster.json(&["node", "drain", &id]).await?;
        check_report(&report)?;
        ensure!(report["bytes_from_bucket"].as_u64() > Some(0), "{report}");
        load.goes_on(50).await?;
        let summary = load.stop().await?;
        println!("{summary:?}");
        ensure!(summary.refused + summary.unknown + summary.read_errors == 0, "{summary:?}");
        let tip = cluster.catalog("drain").await?.tip()?;
        ensure!(tip.members_on(id.parse()?).is_empty(), "{tip:?}");
        verify(&cluster.master(), "drain", &history).await?;
        converged(&cluster, "drain").await?;
        cluster.finish().await?;
    }
    Ok(())
}

/// Draining a node is an operation like any other: it is listed, shown, cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_emptying_of_a_node_is_listed_and_can_be_cancelled() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("stays", 1, &[]).await?;
    let keyspace = cluster.keyspace("stays").await?;
    put_all(&keyspace, "k", 100).await?;
    let full = holder(&cluster, "stays", 0).await?;
    let id = node_id(&cluster, full);
    // The replica under construction cannot finish while the other node is stalled.
    cluster.node_process(1 - full)?.signal(Signal::STOP);
    let started = cluster.json(&["node", "drain", &id, "--no-wait"]).await?;
    let operation = started["id"].as_str().context("no id")?.to_owned();
    let listed = async |state: &str| -> Result<bool> {
        let all = cluster.json(&["operation", "list"]).await?;
        let found =
            all.as_array().context("no list")?.iter().filter(|one| one["id"] == operation.as_str());
        Ok(found.map(|one| &one["state"]).collect::<Vec<_>>() == [state])
    };
    ensure!(listed("running").await?);
    let cancelled = cluster.json(&["operation", "cancel", &operation]).await?;
    ensure!(cancelled["state"] == "aborted" && cancelled["replicas_left"] == 0, "{cancelled}");
    ensure!(
        cluster.json(&["operation", "show", &operation]).await?["state"] == "aborted"
            && listed("aborted").await?
    );
    cluster
        .vasto(&["operation", "cancel", &operation])
        .await?
        .refused(1, &["has ended already"])?;
    cluster.node_process(1 - full)?.signal(Signal::CONT);
    let tip = cluster.catalog("stays").await?.tip()?;
    ensure!(
        tip.plan.is_none()
            && tip.draining_nodes.is_empty()
            && !tip.members_on(id.parse()?).is_empty(),
        "{tip:?}"
    );
    // Invented ids are unknown, whatever their number.
    for number in ["1", "99999999999999999"] {
        let invented = format!("node-{id}-{number}");
        cluster.vasto(&["operation", "show", &invented]).await?.refused(1, &["no operation"])?;
        cluster.vasto(&["operation", "cancel", &invented]).await?.refused(1, &["no operation"])?;
    }
    // The next drain is a separate operation, and stays listed.
    let done = cluster.json(&["node", "drain", &id]).await?;
    ensure!(done["state"] == "done" && done["replicas_moved"] == 1, "{done}");
    let shown = cluster.json(&["operation", "show", done["id"].as_str().context("no id")?]).await?;
    ensure!(shown == done, "{shown}");
    ensure!(missing(&keyspace, "k", 100).await? == 0);
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_for_long_is_replaced_without_being_asked() -> Result<()> {
    let mut cluster =
        Cluster::builder().nodes(3).env("VASTO_MASTER__REPLACE_AFTER", "2s").start().await?;
    cluster.create("auto", 1, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("auto").await?;
    put_all(&keyspace, "k", 1_000).await?;
    converged(&cluster, "auto").await?;
    let before = cluster.catalog("auto").await?.tip()?.placement[0].clone();
    let lost = cluster.node_of(&before.replicas[0].node.to_string())?;
    cluster.kill9_node(lost).await?;
    let catalog = cluster.catalog("auto").await?;
    until("a copy elsewhere", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        let placed = &tip.placement[0].replicas;
        (placed.len() == 2
            && tip.plan.is_none()
            && placed.iter().all(|one| one.node != before.replicas[0].node))
        .then_some(())
    })
    .await?;
    ensure!(missing(&keyspace, "k", 1_000).await? == 0);
    ensure!(converged(&cluster, "auto").await? == 1_000);
    cluster.start_node(lost, Port::Same).await?;
    until("the old replica to be drained and gone", DEADLINE, async || {
        catalog.tip().ok()?.draining.is_empty().then_some(())
    })
    .await?;
    cluster.finish().await
}

/// Every node and its disk is lost; the bucket alone restores the keyspace, both its last state and
/// that before crashes, a change of the shipping replica, a resize and a bad delete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_is_restored_after_every_node_is_lost() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).set("node.ship_interval=200ms").start().await?;
    cluster.create("source", 2, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("source").await?;
    put_all(&keyspace, "a", 3_000).await?;
    cluster.json(&["keyspace", "checkpoint", "source"]).await?;
    put_all(&keyspace, "b", 1_000).await?;
    keyspace.put("ttl", "later").ttl(Duration::from_secs(3_600)).await?;
    keyspace.add_i64("n", 42).await?;
    let then = rows(&keyspace).await?;
    converged(&cluster, "source").await?;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let at = now();
    tokio::time::sleep(Duration::from_millis(50)).await;
    // Crashes, another shipper, another number of shards, and the bad delete.
    for node in 0..3 {
        cluster.kill9_node(node).await?;
        cluster.start_node(node, Port::Same).await?;
        until("the replicas to serve", DEADLINE, async || keyspace.get("a1").await.ok().flatten())
            .await?;
        put_all(&keyspace, &format!("after{node}"), 200).await?;
    }
    let tip = cluster.catalog("source").await?.tip()?;
    let shipper = tip.placement[0].replicas[0].replica.to_string();
    cluster.json(&["keyspace", "evict", "source", "--replica", &shipper]).await?;
    cluster.settled("source").await?;
    cluster.whole("source").await?;
    cluster.resize("source", 3).await?;
    cluster.settled("source").await?;
    for n in 0..3_000 {
        keyspace.delete(format!("a{n}")).await?;
    }
    put_all(&keyspace, "c", 500).await?;
    converged(&cluster, "source").await?;
    cluster.shipped("source").await?;
    let last = rows(&keyspace).await?;
    ensure!(last.len() == 1_000 + 2 + 600 + 500, "{}", last.len());
    for node in 0..3 {
        cluster.kill9_node(node).await?;
        std::fs::remove_dir_all(cluster.node_dir(node))?;
    }
    for _ in 0..2 {
        cluster.add_node().await?;
    }
    let report =
        cluster.json(&["keyspace", "restore", "source", "--into", "then", "--at", &at]).await?;
    check_report(&report)?;
    ensure!(
        report["kind"] == "restore" && report["bytes_from_bucket"].as_u64() > Some(0),
        "{report}"
    );
    same(&rows(&cluster.keyspace("then").await?).await?, &then, "then")?;
    check_report(&cluster.json(&["keyspace", "restore", "source", "--into", "last"]).await?)?;
    let restored = cluster.keyspace("last").await?;
    same(&rows(&restored).await?, &last, "last")?;
    ensure!(restored.add_i64("n", 1).await? == 43);
    // A restored keyspace is a keyspace like any other: it gets its second replicas, grows, and can
    // be lost.
    cluster.settled("last").await?;
    cluster.whole("last").await?;
    converged(&cluster, "last").await?;
    cluster.resize("last", 4).await?;
    cluster.shipped("last").await?;
    let again = rows(&restored).await?;
    cluster.json(&["keyspace", "delete", "last", "--yes"]).await?;
    check_report(&cluster.json(&["keyspace", "restore", "last", "--into", "undeleted"]).await?)?;
    let undeleted = cluster.keyspace("undeleted").await?;
    same(&rows(&undeleted).await?, &again, "undeleted")?;
    ensure!(missing(&undeleted.read_from(ReadFrom::Any), "b", 1_000).await? == 0);
    cluster.finish().await
}

fn now() -> String {
    #[allow(clippy::disallowed_methods)]
    jiff::Timestamp::now().to_string()
}

/// A node is away, and no write acknowledged since is in the bucket yet: a restore contains all of
/// them, or names the node whose writes it cannot contain. So does a restore of a keyspace that was
/// just deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_while_a_node_is_away_holds_what_was_acknowledged_or_is_refused() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).set("node.ship_interval=1h").start().await?;
    cluster.create("two", 4, &["--replicas", "2"]).await?;
    cluster.create("alone", 3, &[]).await?;
    let (two, alone) = (cluster.keyspace("two").await?, cluster.keyspace("alone").await?);
    put_all(&two, "a", 200).await?;
    put_all(&alone, "a", 200).await?;
    converged(&cluster, "two").await?;
    let lost = holder(&cluster, "two", 0).await?;
    let id = node_id(&cluster, lost);
    let tip = cluster.catalog("alone").await?.tip()?;
    let shards = tip
        .placement
        .iter()
        .filter(|shard| shard.replicas.iter().any(|one| one.node.to_string() == id));
    let shards: Vec<String> = shards.map(|shard| format!("shard {}", shard.shard)).collect();
    ensure!(!shards.is_empty(), "the node holds nothing of the keyspace without copies: {tip:?}");
    cluster.kill9_node(lost).await?;
    put_all(&two, "b", 200).await?;
    let began = Instant::now();
    cluster.json(&["kv", "put", "two", "k", "v", "--ack", "bucket"]).await?;
    println!("confirmed by the bucket after {:?}", began.elapsed());
    check_report(&cluster.json(&["keyspace", "restore", "two", "--into", "clone"]).await?)?;
    let clone = cluster.keyspace("clone").await?;
    ensure!(missing(&clone, "a", 200).await? == 0 && missing(&clone, "b", 200).await? == 0);
    ensure!(clone.get("k").await?.is_some());
    let ran = cluster.vasto(&["keyspace", "restore", "two", "--into", "named"]).await?;
    ensure!(
        ran.code == 0 && ran.stderr.contains(&id),
        "the node that is away is not named: {ran:?}"
    );
    // No other node has the writes of the lost node.
    let ran = cluster.vasto(&["keyspace", "restore", "alone", "--into", "part"]).await?;
    let mut texts: Vec<&str> = shards.iter().map(String::as_str).collect();
    texts.extend([id.as_str(), "--from-bucket"]);
    ran.refused(1, &texts)?;
    check_report(
        &cluster.json(&["keyspace", "restore", "alone", "--into", "part", "--from-bucket"]).await?,
    )?;
    cluster.json(&["keyspace", "checkpoint", "two"]).await?;
    put_all(&two, "c", 200).await?;
    cluster.json(&["keyspace", "delete", "two", "--yes"]).await?;
    check_report(&cluster.json(&["keyspace", "restore", "two", "--into", "undeleted"]).await?)?;
    let undeleted = cluster.keyspace("undeleted").await?;
    for prefix in ["a", "b", "c"] {
        ensure!(missing(&undeleted, prefix, 200).await? == 0, "{prefix}");
    }
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_restored_or_replaced_is_said_and_changes_nothing() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("one", 1, &["--replicas", "2"]).await?;
    cluster.create("two", 1, &[]).await?;
    let id = node_id(&cluster, 0);
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["keyspace", "restore", "nothing", "--into", "x"], 1, &["no keyspace `nothing`", "one"]),
        (&["keyspace", "restore", "one", "--into", "two"], 1, &["two exists"]),
        (&["keyspace", "restore", "one", "--into", "No!"], 2, &["is not a keyspace name"]),
        (
            &["keyspace", "restore", "one", "--into", "x", "--at", "2999-01-01T00:00:00Z"],
            2,
            &["in the future"],
        ),
        (
            &["keyspace", "restore", "one", "--into", "x", "--at", "1999-01-01T00:00:00Z"],
            1,
            &["did not exist"],
        ),
        (&["keyspace", "restore", "one", "--into", "x", "--at", "yesterday"], 2, &["--at"]),
        (&["node", "drain", &id], 1, &["no other live node has room", "vasto serve node"]),
        (&["node", "replace", "n-zzz"], 2, &["not a node id", "vasto node list"]),
    ];
    for (args, code, texts) in cases {
        let ran = cluster.vasto(args).await?;
        ran.refused(code, texts).with_context(|| format!("{args:?}"))?;
    }
    let free = cluster.add_node().await?;
    let nothing = cluster.vasto(&["node", "drain", &node_id(&cluster, free)]).await?;
    nothing.refused(1, &["has no replicas"])?;
    let same = cluster.vasto(&["node", "replace", &id, "--with", &id]).await?;
    same.refused(1, &["the same"])?;
    let listed = cluster.json(&["keyspace", "list"]).await?;
    ensure!(listed.as_array().map(Vec::len) == Some(2), "{listed}");
    // An empty keyspace is restored empty.
    check_report(&cluster.json(&["keyspace", "restore", "two", "--into", "empty"]).await?)?;
    ensure!(rows(&cluster.keyspace("empty").await?).await?.is_empty());
    cluster.keyspace("empty").await?.put("k", "v").await?;
    cluster.finish().await
}

/// Writes confirmed by the bucket survive the loss of the only node at any point in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_bucket_has_acknowledged_survives_the_loss_of_the_only_node() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).set("node.ship_interval=1h").start().await?;
    cluster.create("sure", 2, &["--ack", "bucket"]).await?;
    let history = Arc::new(History::default());
    let load = Load::start(
        &cluster.master(),
        "sure",
        &history,
        LoadSpec { readers: 0, ..LoadSpec::default() },
    )
    .await?;
    for _ in 0..2 {
        load.goes_on(100).await?;
        let lost = holder(&cluster, "sure", 0).await?;
        let id = node_id(&cluster, lost);
        cluster.kill9_node(lost).await?;
        std::fs::remove_dir_all(cluster.node_dir(lost))?;
        cluster.add_node().await?;
        check_report(&cluster.json(&["node", "replace", &id]).await?)?;
        load.goes_on(100).await?;
    }
    let summary = load.stop().await?;
    println!("{summary:?}");
    println!("{:?}", verify(&cluster.master(), "sure", &history).await?);
    cluster.finish().await
}

/// The lifecycle of a bucket: no object is ever missing, and unneeded objects are deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bucket_is_clean_and_garbage_goes() -> Result<()> {
    let cluster = Cluster::builder()
        .nodes(3)
        .set("node.ship_interval=200ms")
        .keeps_no_garbage()
        .start()
        .await?;
    cluster.create("clean", 2, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("clean").await?;
    for round in 0..4 {
        put_all(&keyspace, &format!("r{round}-"), 2_000).await?;
        put_all(&keyspace, "same", 2_000).await?;
        cluster.json(&["keyspace", "compact", "clean"]).await?;
        cluster.json(&["keyspace", "checkpoint", "clean"]).await?;
    }
    cluster.resize("clean", 3).await?;
    cluster.settled("clean").await?;
    cluster.shipped("clean").await?;
    let before = rows(&keyspace).await?;
    let checked = cluster.fsck().await?;
    let planned = cluster.json(&["bucket", "gc", "--dry-run"]).await?;
    let done = cluster.json(&["bucket", "gc"]).await?;
    println!(
        "before: {} objects; collected {} of {} bytes",
        checked["objects"], done["deleted"], done["bytes"]
    );
    ensure!(
        planned["deleted"] == done["deleted"] && done["deleted"].as_u64() > Some(4),
        "{planned} {done}"
    );
    cluster.fsck().await?;
    check_report(&cluster.json(&["keyspace", "restore", "clean", "--into", "copy"]).await?)?;
    same(&rows(&cluster.keyspace("copy").await?).await?, &before, "after a collection")?;
    // Damage is found, named, and reported with an exit code.
    let bucket = std::path::Path::new(cluster.bucket().trim_start_matches("file://")).to_owned();
    let checked = cluster.json(&["bucket", "fsck"]).await?;
    ensure!(checked["orphans"].as_array().is_some(), "{checked}");
    let sst = find(&bucket.join("data"), "sst")?.context("no SST in the bucket")?;
    std::fs::remove_file(&sst)?;
    let missing = cluster.vasto(&["bucket", "fsck"]).await?;
    ensure!(missing.code == 1 && missing.stderr.contains("1 objects are missing"), "{missing:?}");
    cluster.finish().await
}

/// Returns some file below a directory with this extension.
fn find(dir: &std::path::Path, extension: &str) -> Result<Option<std::path::PathBuf>> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, extension)? {
                return Ok(Some(found));
            }
        } else if path.extension().is_some_and(|one| one == extension) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
