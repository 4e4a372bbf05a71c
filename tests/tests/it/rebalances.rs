//! Rebalances: nodes that join are filled from the bucket while clients write, through faults; what
//! is cordoned gets nothing; a plan changes nothing; a cancelled one leaves what has moved.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde_json::Value;
use vasto_client::Keyspace;
use vasto_core::catalog::Catalog;
use vasto_core::ids::NodeId;
use vasto_core::operation::OperationKind;
use vasto_core::plan::Step;
use vasto_testkit::http_store::HttpStore;
use vasto_tests::{Cluster, DEADLINE, Kept, Numbers, Port, missing, put_each, until};

/// Pause of each client between two operations.
const PACE: Duration = Duration::from_millis(8);
/// Rows with values that no compression makes smaller.
const ROWS: u64 = 6_000;
const VALUE: usize = 4 << 10;

async fn fill(keyspace: &Keyspace) -> Result<()> {
    let body = |n: u64| -> Bytes {
        let mut numbers = Numbers::new(n);
        (0..VALUE / 8).flat_map(|_| numbers.below(u64::MAX).to_le_bytes()).collect()
    };
    put_each(keyspace, "row", ROWS, body).await
}

/// Returns the number of placed replicas on each node.
fn replicas_on(catalog: &Catalog) -> BTreeMap<NodeId, usize> {
    let mut on = BTreeMap::new();
    for member in catalog.placement.iter().flat_map(|shard| &shard.replicas) {
        *on.entry(member.node).or_default() += 1;
    }
    on
}

/// Returns the bytes on each node, by the description of the keyspace.
async fn bytes_on(cluster: &Cluster, name: &str) -> Result<BTreeMap<String, u64>> {
    let described = cluster.json(&["keyspace", "describe", name]).await?;
    let mut on: BTreeMap<String, u64> = BTreeMap::new();
    let shards = described["placement"].as_array().context("no placement")?;
    for replica in shards.iter().flat_map(|shard| shard["replicas"].as_array()).flatten() {
        let node = replica["node_id"].as_str().context("no node")?;
        *on.entry(node.to_owned()).or_default() += replica["bytes"].as_u64().unwrap_or_default();
    }
    Ok(on)
}

async fn shown(cluster: &Cluster, operation: &str) -> Result<Value> {
    cluster.json(&["operation", "show", operation]).await
}

/// Waits until the operation has ended; returns its document.
async fn ended(cluster: &Cluster, operation: &str) -> Result<Value> {
    let outcome = until("the rebalance to end", DEADLINE * 4, async || {
        let shown = shown(cluster, operation).await.ok()?;
        (shown["state"] != "running").then_some(shown)
    });
    let ended = outcome.await;
    ended.with_context(|| format!("{operation} does not end"))
}

/// Rebalances until nothing is left, which the second time is at once.
async fn until_balanced(cluster: &Cluster) -> Result<()> {
    for _ in 0..3 {
        let done = cluster.json(&["cluster", "rebalance"]).await?;
        ensure!(done["state"] == "done", "{done}");
        if done["balanced"] == true {
            ensure!(done["replicas_moved"] == 0, "{done}");
            let said = cluster.vasto(&["cluster", "rebalance"]).await?;
            ensure!(said.stdout.contains("the cluster is balanced"), "{said:?}");
            let plan = cluster.json(&["cluster", "rebalance", "--plan"]).await?;
            ensure!(plan["balanced"] == true && plan["bytes_moved"] == 0, "{plan}");
            return Ok(());
        }
    }
    anyhow::bail!("something is always left")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_join_are_filled_evenly_while_clients_write() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("wide", 15, &[]).await?;
    let keyspace = cluster.keyspace("wide").await?;
    fill(&keyspace).await?;
    let kept = Kept::start(&cluster, "wide", 1_000, PACE).await?.beside("row");
    cluster.json(&["keyspace", "checkpoint", "wide"]).await?;
    for _ in 0..2 {
        cluster.add_node().await?;
    }
    let catalog = cluster.catalog("wide").await?;
    let before = catalog.tip()?;
    ensure!(replicas_on(&before).len() == 3);
    let plan = cluster.json(&["cluster", "rebalance", "--plan"]).await?;
    let planned = plan["bytes_moved"].as_u64().unwrap_or_default();
    let moves = plan["moves"].as_array().context("no moves")?;
    ensure!(moves.len() >= 4 && planned > 0 && plan["seconds"].as_f64() > Some(0.0), "{plan}");
    ensure!(plan["refused"].is_null() && plan["requests"]["get"].as_u64() > Some(0), "{plan}");
    ensure!(catalog.tip()?.placement == before.placement, "a plan has changed something");

    let report = cluster.json(&["cluster", "rebalance"]).await?;
    println!("{report}");
    ensure!(report["state"] == "done" && report["kind"] == "rebalance", "{report}");
    ensure!(report["moves_failed"] == 0 && report["replicas_left"] == 0, "{report}");
    let moved = report["replicas_moved"].as_u64().unwrap_or_default();
    ensure!((4..=9).contains(&moved), "{report}");
    ensure!(report["bytes_from_peers"] == 0, "bulk bytes came from peers: {report}");
    let bytes = report["bytes_from_bucket"].as_u64().unwrap_or_default();
    ensure!(bytes >= planned / 2, "{report} instead of {plan}");

    kept.load().goes_on(3).await?;
    let after = cluster.whole("wide").await?;
    let on = replicas_on(&after);
    ensure!(on.len() == 5 && on.values().all(|count| (2..=4).contains(count)), "{on:?}");
    let bytes = bytes_on(&cluster, "wide").await?;
    let (most, least) = (bytes.values().max().unwrap(), bytes.values().min().unwrap());
    ensure!(*most <= 2 * least, "{bytes:?}");
    ensure!(missing(&keyspace, "row", ROWS).await? == 0);
    // Each move is an operation of its own, too.
    let moves = after.operations.iter().filter(|one| one.kind == OperationKind::Move);
    ensure!(moves.count() as u64 >= moved.min(4), "{:?}", after.operations);
    kept.end(&cluster).await?.smoothly()?;
    until_balanced(&cluster).await?;
    cluster.fsck().await?;
    cluster.finish().await
}

/// Two replicas of each shard: they stay apart, and the primaries are spread too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joins_gets_its_part_of_replicas_and_primaries() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("two", 6, &["--replicas", "2", "--ack", "replica"]).await?;
    let kept = Kept::start(&cluster, "two", 500, PACE).await?;
    cluster.add_node().await?;
    until_balanced(&cluster).await?;
    let after = cluster.whole("two").await?;
    let on = replicas_on(&after);
    ensure!(on.len() == 3 && on.values().all(|count| (3..=5).contains(count)), "{on:?}");
    for shard in &after.placement {
        ensure!(shard.replicas.len() == 2 && shard.replicas[0].node != shard.replicas[1].node);
    }
    let mut primaries: BTreeMap<NodeId, usize> = BTreeMap::new();
    for home in after.placement.iter().filter_map(|shard| shard.shipper()) {
        *primaries.entry(home.node).or_default() += 1;
    }
    ensure!(primaries.len() == 3, "{primaries:?}");
    let catalog = cluster.catalog("two").await?;
    until("the preferred primaries to be primaries", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        tip.placement.iter().all(|shard| shard.primary.is_none()).then_some(())
    })
    .await?;
    kept.load().goes_on(3).await?;
    kept.end(&cluster).await?.smoothly()?;
    cluster.finish().await
}

/// The node that a replica moves to is killed while it is filled, and the master too: both come
/// back, and the rebalance ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebalance_survives_the_kill_of_a_target_and_of_the_master() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder()
        .nodes(3)
        .http(&store)
        .keeps_no_garbage()
        .allow_warnings()
        .start()
        .await?;
    cluster.create("wide", 9, &[]).await?;
    let keyspace = cluster.keyspace("wide").await?;
    fill(&keyspace).await?;
    cluster.json(&["keyspace", "checkpoint", "wide"]).await?;
    let kept = Kept::start(&cluster, "wide", 500, PACE).await?.beside("row");
    for _ in 0..2 {
        cluster.add_node().await?;
    }
    // Each request takes a while, so that a move does not end before it is seen.
    store.answer_later(Duration::from_millis(100));
    let begun = cluster.json(&["cluster", "rebalance", "--no-wait"]).await?;
    let id = begun["id"].as_str().context("no id")?.to_owned();
    ensure!(begun["state"] == "running", "{begun}");
    let catalog = cluster.catalog("wide").await?;
    let target = until("a replica to be filled", DEADLINE, async || {
        let tip = catalog.tip().ok()?;
        let mut filled = tip.moves.iter().filter(|one| one.plan.step == Step::Tail);
        filled.next().and_then(|one| one.to())
    })
    .await?;
    let target = cluster.node_of(&target.to_string())?;
    cluster.kill9_node(target).await?;
    cluster.kill9_master().await?;
    store.heal();
    cluster.start_master(Port::Same).await?;
    // Whoever asks again gets the one that runs.
    let again = until("the rebalance to be shown", DEADLINE, async || {
        cluster.json(&["cluster", "rebalance", "--no-wait"]).await.ok()
    });
    ensure!(again.await?["id"] == id.as_str());
    cluster.start_node(target, Port::Same).await?;
    let done = ended(&cluster, &id).await?;
    ensure!(done["state"] == "done", "{done}");
    let on = replicas_on(&cluster.whole("wide").await?);
    ensure!(on.len() == 5 && on.values().all(|count| (1..=3).contains(count)), "{on:?}");
    kept.load().goes_on(3).await?;
    kept.end(&cluster).await?.completely()?;
    ensure!(missing(&keyspace, "row", ROWS).await? == 0);
    cluster.shipped("wide").await?;
    cluster.collect().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordoned_node_receives_nothing_and_a_cancelled_rebalance_leaves_what_has_moved()
-> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder().nodes(2).http(&store).allow_warnings().start().await?;
    cluster.create("wide", 8, &[]).await?;
    let keyspace = cluster.keyspace("wide").await?;
    fill(&keyspace).await?;
    cluster.json(&["keyspace", "checkpoint", "wide"]).await?;
    let (cordoned, free) = (cluster.add_node().await?, cluster.add_node().await?);
    let cordoned = cluster.node_id(cordoned).unwrap();
    let free = cluster.node_id(free).unwrap();
    cluster.json(&["node", "cordon", &cordoned]).await?;
    let plan = cluster.json(&["cluster", "rebalance", "--plan"]).await?;
    let moves = plan["moves"].as_array().context("no moves")?;
    ensure!(!moves.is_empty() && moves.iter().all(|one| one["to"] == free.as_str()), "{plan}");

    // Cancelled while the first replicas are on their way.
    store.answer_later(Duration::from_millis(100));
    let begun = cluster.json(&["cluster", "rebalance", "--no-wait"]).await?;
    let id = begun["id"].as_str().context("no id")?.to_owned();
    let catalog = cluster.catalog("wide").await?;
    until("a replica to be on its way", DEADLINE, async || {
        (!catalog.tip().ok()?.moves.is_empty()).then_some(())
    })
    .await?;
    let refused = cluster.vasto(&["keyspace", "resize", "wide", "--shards", "9"]).await?;
    refused.refused(1, &["is running on this keyspace"])?;
    let cancelled = cluster.json(&["operation", "cancel", &id]).await?;
    ensure!(cancelled["state"] == "aborted", "{cancelled}");
    store.heal();
    let whole = cluster.whole("wide").await?;
    ensure!(whole.moves.is_empty() && whole.members_on(cordoned.parse()?).is_empty());
    let late = cluster.vasto(&["operation", "cancel", &id]).await?;
    late.refused(1, &["has ended already"])?;

    // Moves that failed are put off for a while; those of other shards begin at once.
    let done = cluster.json(&["cluster", "rebalance"]).await?;
    ensure!(done["state"] == "done" && done["id"] != id.as_str(), "{done}");
    let after = cluster.whole("wide").await?;
    ensure!(after.members_on(cordoned.parse()?).is_empty(), "{after:?}");
    ensure!(!after.members_on(free.parse()?).is_empty(), "{after:?}");
    ensure!(missing(&keyspace, "row", ROWS).await? == 0);
    cluster.json(&["node", "uncordon", &cordoned]).await?;
    until_balanced(&cluster).await?;
    let on = replicas_on(&cluster.whole("wide").await?);
    ensure!(on.len() == 4 && on.values().all(|count| *count == 2), "{on:?}");
    let listed = cluster.json(&["operation", "list"]).await?;
    let last = listed.as_array().into_iter().flatten().find(|one| one["kind"] == "rebalance");
    ensure!(last.is_some_and(|last| last["state"] == "done"), "{listed}");
    cluster.finish().await
}

/// Without a request, once that is switched on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_rebalances_by_itself_fills_a_node_that_joins() -> Result<()> {
    let mut cluster =
        Cluster::builder().nodes(2).env("VASTO_MASTER__REBALANCE", "on").start().await?;
    cluster.create("wide", 6, &[]).await?;
    let catalog = cluster.catalog("wide").await?;
    let joined: NodeId = {
        let index = cluster.add_node().await?;
        cluster.node_id(index).unwrap().parse()?
    };
    until("the node to get its part", DEADLINE * 3, async || {
        let tip = catalog.tip().ok()?;
        let settled = tip.moves.is_empty() && tip.draining.is_empty();
        (settled && tip.members_on(joined).len() == 2).then_some(())
    })
    .await?;
    cluster.finish().await
}
