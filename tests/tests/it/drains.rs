//! Nodes that are drained, replaced, cordoned and given up, while other nodes are stalled, failed
//! or gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vasto_client::Keyspace;
use vasto_core::catalog::Placed;
use vasto_core::operation::{OperationKind, OperationOutcome};
use vasto_core::plan::{PlanKind, Step};
use vasto_tests::{CatalogDir, Cluster, DEADLINE, Port, missing, put_all, put_each, until};

fn index_of(cluster: &Cluster, one: Placed) -> Result<usize> {
    cluster.node_of(&one.node.to_string())
}

async fn shown(cluster: &Cluster, operation: &str) -> Result<Value> {
    cluster.json(&["operation", "show", operation]).await
}

async fn ended(cluster: &Cluster, operation: &str) -> Result<Value> {
    let outcome = until("the operation to end", DEADLINE, async || {
        let shown = shown(cluster, operation).await.ok()?;
        (shown["state"] != "running").then_some(shown)
    });
    let ended = outcome.await;
    ended.with_context(|| format!("{operation} does not end"))
}

fn id(operation: &Value) -> Result<String> {
    Ok(operation["id"].as_str().context("no id")?.to_owned())
}

/// The target node stalls just when the new replica is placed: the only replica that serves stays
/// placed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_goes_on_only_when_the_copy_serves() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("still", 1, &[]).await?;
    let keyspace = cluster.keyspace("still").await?;
    put_all(&keyspace, "k", 200).await?;
    let catalog = cluster.catalog("still").await?;
    let home = catalog.tip()?.placement[0].replicas[0];
    let (from, to) = (index_of(&cluster, home)?, 1 - index_of(&cluster, home)?);
    let node = cluster.node_id(from).unwrap();
    let operation = id(&cluster.json(&["node", "drain", &node, "--no-wait"]).await?)?;
    until("the copy to be placed", DEADLINE, async || {
        (catalog.tip().ok()?.placement[0].replicas.len() == 2).then_some(())
    })
    .await?;
    cluster.node_process(to)?.signal(Signal::STOP);
    // Long enough for leadership transfers to be undone, and for the silent node to count as gone.
    let gone = until("the node that stands still to be gone", DEADLINE, async || {
        ensure_read(&keyspace).await;
        let status = cluster.json(&["cluster", "status"]).await.ok()?;
        status["nodes"].as_array()?.iter().any(|one| one["state"] == "away").then_some(())
    });
    gone.await?;
    let tip = catalog.tip()?;
    ensure!(
        tip.placement[0].replicas.contains(&home),
        "the only replica that serves was taken out: {tip:?}"
    );
    ensure!(missing(&keyspace, "k", 200).await? == 0);
    let waits = shown(&cluster, &operation).await?;
    // The new replica is still under construction, or the drain waits for it to serve.
    let says =
        |text: &str| ["shard 0 to open", "to serve shard 0"].iter().any(|what| text.contains(what));
    ensure!(waits["waiting_for"].as_str().is_some_and(says), "{waits}");
    cluster.node_process(to)?.signal(Signal::CONT);
    ensure!(ended(&cluster, &operation).await?["state"] == "done");
    let tip = catalog.tip()?;
    ensure!(tip.placement[0].replicas.iter().all(|one| one.node != home.node), "{tip:?}");
    ensure!(missing(&keyspace, "k", 200).await? == 0);
    cluster.finish().await
}

async fn ensure_read(keyspace: &Keyspace) {
    assert!(keyspace.get("k7").await.unwrap().is_some(), "an acknowledged key is not found");
}

/// The only replica of a shard has lost its log; the drain's message names the command that
/// replaces the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_only_replica_that_has_failed_on_a_live_node_is_taken_over() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(2)
        .set("node.ship_interval=200ms")
        .allow("the log")
        .allow("log files are missing")
        .allow("could not be applied")
        .allow("shipping failed")
        .start()
        .await?;
    cluster.create("rot", 1, &[]).await?;
    let keyspace = cluster.keyspace("rot").await?;
    put_all(&keyspace, "k", 300).await?;
    cluster.json(&["keyspace", "checkpoint", "rot"]).await?;
    let catalog = cluster.catalog("rot").await?;
    let before = catalog.tip()?;
    let failed = before.placement[0].replicas[0];
    let node = index_of(&cluster, failed)?;
    cluster.stop_node(node).await?;
    let log = cluster.replica_dir(node, &before, failed.replica).join("log");
    std::fs::remove_dir_all(&log)?;
    cluster.start_node(node, Port::Same).await?;
    let name = cluster.node_id(node).unwrap();
    let drain = id(&cluster.json(&["node", "drain", &name, "--no-wait"]).await?)?;
    // A drain waits for a replica that cannot be copied, and names the remedy.
    let waits = until("the drain to say what it waits for", DEADLINE, async || {
        let shown = shown(&cluster, &drain).await.ok()?;
        shown["waiting_for"].as_str().filter(|what| what.contains("has failed")).map(str::to_owned)
    });
    let waits = waits.await?;
    ensure!(waits.contains(&format!("vasto node replace {name}")), "{waits}");
    let report = cluster.json(&["node", "replace", &name]).await?;
    ensure!(report["state"] == "done" && report["replicas_moved"] == 1, "{report}");
    ensure!(missing(&keyspace, "k", 300).await? == 0);
    keyspace.add_i64("counter", 1).await?;
    let tip = catalog.tip()?;
    ensure!(
        tip.operations.iter().all(
            |one| one.outcome == OperationOutcome::Done || one.kind == OperationKind::DrainNode
        ),
        "{tip:?}"
    );
    cluster.finish().await
}

/// Both nodes of a shard are gone for good: the bucket's contents are served again once both are
/// given up, and warnings name the missing data until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_whose_nodes_are_all_lost_comes_back_from_the_bucket() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).set("node.ship_interval=200ms").start().await?;
    cluster.create("both", 2, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("both").await?;
    put_all(&keyspace, "k", 300).await?;
    cluster.json(&["keyspace", "checkpoint", "both"]).await?;
    let lost = [0, 1].map(|index| cluster.node_id(index).unwrap());
    for index in 0..2 {
        cluster.kill9_node(index).await?;
        std::fs::remove_dir_all(cluster.node_dir(index))?;
    }
    for _ in 0..2 {
        cluster.add_node().await?;
    }
    let status = cluster.json(&["cluster", "status"]).await?;
    let warned = status["warnings"].to_string();
    ensure!(warned.contains("shard 0 of both, shard 1 of both can be read"), "{warned}");
    ensure!(warned.contains("vasto node replace"), "{warned}");
    let first = id(&cluster.json(&["node", "replace", &lost[0], "--no-wait"]).await?)?;
    let waits = until("the operation to say what it waits for", DEADLINE, async || {
        let shown = shown(&cluster, &first).await.ok()?;
        shown["waiting_for"].as_str().filter(|what| what.contains("that serves")).map(str::to_owned)
    });
    let waits = waits.await?;
    ensure!(waits.contains(&format!("vasto node replace {}", lost[1])), "{waits}");
    let second = id(&cluster.json(&["node", "replace", &lost[1], "--no-wait"]).await?)?;
    for operation in [&first, &second] {
        ensure!(ended(&cluster, operation).await?["state"] == "done");
    }
    ensure!(missing(&keyspace, "k", 300).await? == 0);
    let tip = cluster.catalog("both").await?.tip()?;
    ensure!(tip.placement.iter().all(|shard| shard.replicas.len() == 2), "{tip:?}");
    // After one command for each node, no operation waits for the lost nodes.
    let refused = cluster.vasto(&["keyspace", "resize", "both", "--shards", "3"]).await?;
    refused.refused(1, &["--accept-loss --yes"])?;
    for node in &lost {
        let unsure = cluster.vasto(&["node", "replace", node, "--accept-loss"]).await?;
        ensure!(unsure.code == 2, "{unsure:?}");
        let report = cluster.json(&["node", "replace", node, "--accept-loss", "--yes"]).await?;
        ensure!(report["state"] == "done", "{report}");
    }
    ensure!(cluster.catalog("both").await?.tip()?.draining.is_empty());
    cluster.resize("both", 3).await?;
    ensure!(missing(&keyspace, "k", 300).await? == 0);
    cluster.finish().await
}

/// A drained node gets no replicas, from this master or the next, until it is uncordoned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_stays_empty_until_it_is_uncordoned() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("one", 3, &[]).await?;
    let node = cluster.node_id(0).unwrap();
    let report = cluster.json(&["node", "drain", &node]).await?;
    ensure!(report["state"] == "done", "{report}");
    let on_it = |catalog: &CatalogDir| -> Result<usize> {
        Ok(catalog.tip()?.members_on(node.parse()?).len())
    };
    cluster.create("two", 3, &["--replicas", "2"]).await?;
    cluster.resize("one", 4).await?;
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    let nodes = until("the nodes to be back", DEADLINE, async || {
        let nodes = cluster.json(&["node", "list"]).await.ok()?;
        let live = nodes.as_array()?.iter().filter(|one| one["state"] == "live").count();
        (live == 3).then_some(nodes)
    });
    let nodes = nodes.await?;
    let cordoned = |nodes: &Value| {
        let all = nodes.as_array().into_iter().flatten();
        all.filter(|one| one["cordoned"] == true)
            .map(|one| one["node_id"].clone())
            .collect::<Vec<_>>()
    };
    ensure!(cordoned(&nodes) == [node.as_str()], "{nodes}");
    cluster.create("three", 2, &["--replicas", "2"]).await?;
    for name in ["one", "two", "three"] {
        ensure!(on_it(&cluster.catalog(name).await?)? == 0, "{name} is on the drained node");
    }
    // The next drain finds no target, and names the cordoned node.
    let other = cluster.node_id(1).unwrap();
    let refused = cluster.vasto(&["node", "drain", &other]).await?;
    refused.refused(1, &["no other live node has room", &format!("vasto node uncordon {node}")])?;
    let freed = cluster.json(&["node", "uncordon", &node]).await?;
    ensure!(freed["cordoned"] == false && freed["node_id"] == node.as_str(), "{freed}");
    cluster.create("four", 3, &[]).await?;
    ensure!(on_it(&cluster.catalog("four").await?)? == 1, "it gets nothing");
    let again = cluster.json(&["node", "cordon", &node]).await?;
    ensure!(again["cordoned"] == true, "{again}");
    ensure!(on_it(&cluster.catalog("four").await?)? == 1, "what is there stays there");
    let unknown = cluster.vasto(&["node", "cordon", "n-0000000000000001"]).await?;
    unknown.refused(1, &["no node n-0000000000000001", "vasto node list"])?;
    cluster.finish().await
}

/// The target of a grow stalls while the sources write more log than they keep; the bucket has the
/// log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grow_goes_on_although_the_sources_have_cut_their_log() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(2)
        .set("node.max_log=32MiB")
        .set("node.ship_interval=200ms")
        // The target writes as much at once when it resumes.
        .allow("the log is at its cap")
        .start()
        .await?;
    cluster.create("cap", 1, &[]).await?;
    let keyspace = cluster.keyspace("cap").await?;
    put_all(&keyspace, "k", 300).await?;
    let catalog = cluster.catalog("cap").await?;
    let before = catalog.tip()?;
    let operation =
        id(&cluster.json(&["keyspace", "resize", "cap", "--shards", "2", "--no-wait"]).await?)?;
    let tail = catalog.step(&before, Step::Tail, DEADLINE).await?.context("no tail")?;
    let plan = tail.plan.as_ref().context("no plan")?;
    ensure!(plan.kind == PlanKind::Grow { from: 1, to: 2 });
    let target = cluster.node_of(&plan.targets[0].node.to_string())?;
    ensure!(target != cluster.node_of(&plan.sources[0].node.to_string())?, "both are on one node");
    cluster.node_process(target)?.signal(Signal::STOP);
    let log = cluster.replica_dir(1 - target, &tail, plan.sources[0].replica).join("log");
    let files = || -> Result<Vec<std::ffi::OsString>> {
        Ok(std::fs::read_dir(&log)?
            .map(|entry| entry.map(|one| one.file_name()))
            .collect::<Result<_, _>>()?)
    };
    let first = files()?.into_iter().min().context("no log")?;
    // A log file is deleted only once it is full, so more than one is written.
    let body = bytes::Bytes::from(vec![7u8; 1 << 20]);
    let (mut sent, mut reported) = (0, 0);
    while files()?.contains(&first) {
        put_each(&keyspace, &format!("w{sent}:"), 8, |_| body.clone()).await?;
        sent += 1;
        reported = until("the bucket to hold the log", DEADLINE, async || {
            let described = cluster.json(&["keyspace", "describe", "cap"]).await.ok()?;
            let source = &described["placement"][0]["replicas"][0];
            let (shipped, lsn) = (source["shipped_lsn"].as_u64()?, source["lsn"].as_u64()?);
            // A report from before this round does not cover its writes.
            (lsn > reported && shipped >= lsn).then_some(lsn)
        })
        .await?;
        ensure!(sent < 60, "the log is not cut");
        let shown = shown(&cluster, &operation).await?;
        ensure!(shown["state"] == "running", "{shown}");
    }
    cluster.node_process(target)?.signal(Signal::CONT);
    let done = ended(&cluster, &operation).await?;
    ensure!(done["state"] == "done", "{done}");
    ensure!(missing(&keyspace, "k", 300).await? == 0);
    for n in 0..sent {
        ensure!(missing(&keyspace, &format!("w{n}:"), 8).await? == 0, "of round {n}");
    }
    cluster.finish().await
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_dir(&entry.path(), &to)?,
            false => drop(std::fs::copy(entry.path(), to)?),
        }
    }
    Ok(())
}

/// The only replica's directory is restored to a state before its last writes: the replica does not
/// serve without them, raises a warning, and is rebuilt completely on another node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_that_was_put_back_from_an_old_copy_is_recognised() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(2)
        .set("node.ship_interval=200ms")
        .allow("the data directory is an old copy")
        .start()
        .await?;
    cluster.create("old", 1, &[]).await?;
    let keyspace = cluster.keyspace("old").await?;
    let catalog = cluster.catalog("old").await?;
    let one = catalog.tip()?.placement[0].replicas[0];
    let node = index_of(&cluster, one)?;
    let name = cluster.node_id(node).unwrap();
    put_all(&keyspace, "before", 100).await?;
    cluster.stop_node(node).await?;
    let kept = cluster.dir().join("kept");
    copy_dir(&cluster.node_dir(node), &kept)?;
    // Unchanged, the node restarts as usual.
    cluster.start_node(node, Port::Same).await?;
    keyspace.put("after0", vec![7u8; 100]).await?;
    cluster.stop_node(node).await?;
    std::fs::remove_dir_all(cluster.node_dir(node))?;
    copy_dir(&kept, &cluster.node_dir(node))?;
    cluster.start_node(node, Port::Same).await?;
    // Each opening adds a record to the log; the log must not count as caught up with the missing
    // records because of that.
    for _ in 0..4 {
        cluster.stop_node(node).await?;
        cluster.start_node(node, Port::Same).await?;
    }
    let status = cluster.json(&["cluster", "status"]).await?;
    let warned = status["warnings"].to_string();
    ensure!(
        warned.contains("the data directory is an old copy")
            && warned.contains("vasto node replace"),
        "{warned}"
    );
    let read = tokio::time::timeout(Duration::from_secs(1), keyspace.get("after0")).await;
    ensure!(!matches!(read, Ok(Ok(_))), "it serves what it lacks: {read:?}");
    let report = cluster.json(&["node", "replace", &name]).await?;
    ensure!(report["state"] == "done", "{report}");
    ensure!(missing(&keyspace, "before", 100).await? + missing(&keyspace, "after", 1).await? == 0);
    cluster.finish().await
}

/// The data directory is older than the keyspace: the replica is not created again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_from_before_a_keyspace_does_not_begin_it_again() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(1)
        .set("node.ship_interval=200ms")
        .allow("the data directory is an old copy")
        .start()
        .await?;
    cluster.stop_node(0).await?;
    let (kept, newer) = (cluster.dir().join("kept"), cluster.dir().join("newer"));
    copy_dir(&cluster.node_dir(0), &kept)?;
    cluster.start_node(0, Port::Same).await?;
    cluster.create("old", 1, &[]).await?;
    let keyspace = cluster.keyspace("old").await?;
    put_all(&keyspace, "k", 100).await?;
    cluster.stop_node(0).await?;
    std::fs::rename(cluster.node_dir(0), &newer)?;
    std::fs::rename(&kept, cluster.node_dir(0))?;
    cluster.start_node(0, Port::Same).await?;
    until("the warning", DEADLINE, async || {
        let status = cluster.json(&["cluster", "status"]).await.ok()?;
        status["warnings"].to_string().contains("there is nothing of it here").then_some(())
    })
    .await?;
    // With the newer directory the node serves again.
    cluster.stop_node(0).await?;
    std::fs::remove_dir_all(cluster.node_dir(0))?;
    std::fs::rename(&newer, cluster.node_dir(0))?;
    cluster.start_node(0, Port::Same).await?;
    ensure!(missing(&keyspace, "k", 100).await? == 0);
    cluster.finish().await
}

/// An advertised address that cannot be reached is detected when the node starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_under_which_address_others_reach_it_or_does_not_start() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).allow("refused a node").start().await?;
    let dir = cluster.dir().join("another").display().to_string();
    let unused = vasto_tests::free_port();
    let nobody = format!("127.0.0.1:{unused}");
    for (address, says) in [
        ("localhost", "has no port"),
        ("a b:1", "has no usable host"),
        ("127.0.0.1:0", "has no usable port"),
        (nobody.as_str(), "the master cannot connect to"),
        ("no-such-host.invalid:7000", "the master cannot connect to"),
    ] {
        let master = cluster.master();
        let ran = cluster
            .vasto(&["serve", "node", "--master", &master, "--dir", &dir, "--advertise", address])
            .await?;
        ran.refused(1, &[says, "--advertise"]).with_context(|| address.to_owned())?;
    }
    cluster.finish().await
}
