//! Grows while clients write and read.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use rustix::process::Signal;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::operation::OperationOutcome;
use vasto_core::plan::Step;
use vasto_testkit::http_store::{Ask, Fault, HttpStore};
use vasto_tests::replicas::converged;
use vasto_tests::{
    Cluster, DEADLINE, History, Kept, Load, LoadSpec, Port, Process, Proxy, Resizing, key_of,
    missing, number_of, preload, put_each, records, resized, setting, tool, until, verify,
};

/// `VASTO_GROWS` sets the shard count that is reached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_step_grows_lose_nothing() -> Result<()> {
    let last: u32 = setting("VASTO_GROWS", 9);
    let cluster = Cluster::builder().start().await?;
    cluster.create("grows", 1, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("grows").await?, &history, "s:", 20_000).await?;
    let spec = LoadSpec { writers: 6, pace: Duration::from_millis(2), ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "grows", &history, spec).await?;
    let mut peers = 0;
    for shards in 2..=last {
        load.goes_on(3).await?;
        let report = cluster.resize("grows", shards).await?;
        println!("{}", resized(&report));
        ensure!(report["to"] == shards && report["keys_moved"].as_u64() > Some(0), "{report}");
        peers += report["bytes_from_peers"].as_u64().unwrap();
    }
    load.goes_on(10).await?;
    let summary = load.stop().await?;
    println!("{summary:?}; bytes from peers in all: {peers}");
    ensure!(
        summary.refused + summary.unknown + summary.read_errors == 0,
        "clients saw errors: {summary:?}"
    );
    println!("{:?}", verify(&cluster.master(), "grows", &history).await?);
    let described = cluster.json(&["keyspace", "describe", "grows"]).await?;
    ensure!(
        described["shards"] == last
            && described["placement"].as_array().unwrap().len() == last as usize,
        "{described}"
    );
    cluster.finish().await
}

/// Several shards are added in one plan with one cutover, with two replicas each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grows_by_several_shards_lose_nothing() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    cluster.create("leaps", 1, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("leaps").await?, &history, "s:", 20_000).await?;
    let spec = LoadSpec { writers: 4, pace: Duration::from_millis(2), ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "leaps", &history, spec).await?;
    for shards in [4, 5, 16] {
        load.goes_on(3).await?;
        let report = cluster.resize("leaps", shards).await?;
        println!("{}", resized(&report));
        ensure!(report["to"] == shards && report["keys_moved"].as_u64() > Some(0), "{report}");
    }
    load.goes_on(10).await?;
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(
        summary.refused + summary.unknown + summary.read_errors == 0,
        "clients saw errors: {summary:?}"
    );
    println!("{:?}", verify(&cluster.master(), "leaps", &history).await?);
    cluster.settled("leaps").await?;
    converged(&cluster, "leaps").await?;
    cluster.finish().await
}

/// Grows a compacted keyspace at rest and checks how much was read for what moved; returns its name
/// and the exports.
async fn grow_at_rest(
    cluster: &Cluster,
    replicas: u64,
    from: u32,
    to: u32,
) -> Result<(String, Vec<String>)> {
    const ROWS: u64 = 20_000;
    let name = format!("from{from}to{to}by{replicas}");
    let count = replicas.to_string();
    cluster.create(&name, from, &["--replicas", &count, "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace(&name).await?;
    put_each(&keyspace, "r", ROWS, records::value).await?;
    cluster.json(&["keyspace", "compact", &name]).await?;
    let grow = Resizing::start(cluster, &name, to).await?;
    let exports = grow.exports().await?;
    let report = grow.done().await?;
    println!("{replicas} replicas: {}", resized(&serde_json::to_value(&report)?));
    let moves = |n: &u64| jump(partition_hash(format!("r{n}").as_bytes()), to).shard.0 >= from;
    let moving = (0..ROWS).filter(moves).count() as u64;
    ensure!(report.keys_moved == replicas * moving, "{moving} keys move: {report:?}");
    let ratio = report.bytes_from_bucket as f64 / report.bytes_moved as f64;
    ensure!(ratio <= 1.2, "{ratio:.3} bytes were read for each byte that moved: {report:?}");
    ensure!(converged(cluster, &name).await? as u64 == ROWS, "{name}");
    ensure!(missing(&keyspace, "r", ROWS).await? == 0, "{name}");
    Ok((name, exports))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grows_by_several_shards_read_little_more_than_what_moves() -> Result<()> {
    let cluster = Cluster::builder().keeps_no_garbage().start().await?;
    let all = [(1, 1, 16), (1, 3, 11), (1, 4, 8), (2, 4, 8)].map(|(replicas, from, to)| {
        let grow = grow_at_rest(&cluster, replicas, from, to);
        async move {
            grow.await.with_context(|| format!("{from} -> {to} with {replicas} replicas"))
        }
    });
    cluster.exports_go(&futures::future::try_join_all(all).await?).await?;
    cluster.finish().await
}

/// The bucket refuses uploads of the first export, the node of a target, which begins again with the
/// same exports, is killed during the second, and that of a source during the third.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_go_on_when_uploads_fail_and_nodes_are_killed() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let mut cluster = Cluster::builder()
        .nodes(2)
        .http(&store)
        .allow_warnings()
        .allow("the target cannot be built")
        .start()
        .await?;
    cluster.create("export", 2, &["--quarantine", "1s"]).await?;
    let kept = Kept::start(&cluster, "export", 10_000, Duration::from_millis(4)).await?;
    for (kill, to) in [(None, 4), (Some(Step::Tail), 8), (Some(Step::Prepare), 12)] {
        let mut grow = Resizing::start(&cluster, "export", to).await?;
        // A fault may undo the grow, which is asked for again then.
        for _ in 0..3 {
            match kill {
                None => store.fail(Ask::Put, Fault::SlowDown, 8),
                Some(step) => {
                    let plan = grow.reaches(step).await?.plan.context("no plan")?;
                    let source = step == Step::Prepare;
                    let node = if source { plan.sources[1].node } else { plan.targets[0].node };
                    let node = cluster.node_of(&node.to_string())?;
                    cluster.kill9_node(node).await?;
                    cluster.start_node(node, Port::New).await?;
                }
            }
            let report = grow.ended().await.with_context(|| format!("{kill:?}"))?;
            println!(
                "{kill:?}: {:?}, {}",
                report.outcome,
                resized(&serde_json::to_value(&report)?)
            );
            if report.outcome == OperationOutcome::Done {
                break;
            }
            grow = Resizing::start(&cluster, "export", to).await?;
        }
        ensure!(grow.tip()?.spec.shards == to, "{kill:?}: undone again and again");
        store.assert_all_fired();
        kept.load().goes_on(5).await?;
    }
    kept.end(&cluster).await?.completely()?;
    cluster.settled("export").await?;
    cluster.fsck().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scans_are_complete_during_a_grow() -> Result<()> {
    const STABLE: u64 = 5_000;
    let cluster = Cluster::builder().start().await?;
    cluster.create("scans", 1, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("scans").await?, &history, "stable:", STABLE).await?;
    let load = Load::start(
        &cluster.master(),
        "scans",
        &history,
        LoadSpec { writers: 2, ..LoadSpec::default() },
    )
    .await?;
    let scanning = cluster.keyspace("scans").await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let scans = tokio::spawn(async move {
        let mut rounds = 0;
        while !*stopped.borrow() {
            let mut rows = std::pin::pin!(scanning.scan().prefix("stable:").stream());
            let mut next = 0;
            while let Some(row) = rows.next().await {
                let row = row?;
                let name = format!("stable:{next:07}");
                ensure!(
                    row.key == name,
                    "round {rounds}: {name} should follow, the scan gives {:?}",
                    row.key
                );
                let value = row.value.map(|value| value.bytes()).unwrap_or_default();
                ensure!(
                    number_of(&name, &value) == Some(1),
                    "round {rounds}: {name} holds {value:?}"
                );
                next += 1;
            }
            ensure!(next == STABLE, "round {rounds}: the scan ended after {next} of {STABLE} keys");
            rounds += 1;
        }
        Ok(rounds)
    });
    for shards in [2, 3, 8, 16] {
        println!("{}", resized(&cluster.resize("scans", shards).await?));
    }
    cluster.settled("scans").await?;
    // A scanner that has failed no longer receives; its error is returned next.
    let _ = stop.send(true);
    let rounds: u64 = scans.await??;
    println!("{rounds} complete scans; {:?}", load.stop().await?);
    ensure!(rounds >= 4, "only {rounds} scans were made");
    verify(&cluster.master(), "scans", &history).await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quarantine_then_clean_up() -> Result<()> {
    const KEYS: u64 = 100_000;
    let mut cluster = Cluster::builder().start().await?;
    cluster.create("clean", 2, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    let keyspace = cluster.keyspace("clean").await?;
    preload(&keyspace, &history, "s:", KEYS).await?;
    let before = compacted(&cluster, "clean").await?;
    // The newest versions of many keys are in the memtable and in level 0: the clean-up must not
    // expose older versions.
    let spec = LoadSpec { pace: Duration::from_millis(2), ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "clean", &history, spec).await?;
    load.goes_on(100).await?;
    println!("{}", resized(&cluster.resize("clean", 3).await?));
    load.goes_on(20).await?;
    println!("{:?}", load.stop().await?);
    cluster.settled("clean").await?;
    verify(&cluster.master(), "clean", &history).await?;
    // A third of the keys has left each source; the clients have added a few.
    let after = compacted(&cluster, "clean").await?;
    println!("bytes of each shard: {before:?} -> {after:?}");
    for shard in 0..2 {
        ensure!(
            after[shard] < before[shard] * 85 / 100,
            "shard {shard} still holds what moved: {before:?} -> {after:?}"
        );
    }
    // After a restart, removed keys stay removed, and no older version reappears.
    for node in 0..cluster.nodes() {
        cluster.kill9_node(node).await?;
        cluster.start_node(node, Port::New).await?;
    }
    verify(&cluster.master(), "clean", &history).await?;
    cluster.finish().await
}

/// Returns the bytes of each shard after a full compaction. A report that includes the checkpoint
/// after the compaction was made after both.
async fn compacted(cluster: &Cluster, keyspace: &str) -> Result<Vec<u64>> {
    cluster.json(&["keyspace", "compact", keyspace]).await?;
    cluster.json(&["keyspace", "checkpoint", keyspace]).await?;
    until("reports of the compacted shards", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", keyspace]).await.ok()?;
        let replicas = described["placement"].as_array()?.iter().map(|shard| &shard["replicas"][0]);
        replicas
            .map(|one| (one["lsn"] == one["shipped_lsn"]).then(|| one["bytes"].as_u64())?)
            .collect()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oldest_stale_client() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    // While the sources still hold the moved keys, and after their removal.
    stale_client(&cluster, "held", "1h").await?;
    stale_client(&cluster, "removed", "1s").await?;
    cluster.finish().await
}

async fn stale_client(cluster: &Cluster, name: &str, quarantine: &str) -> Result<()> {
    cluster.create(name, 2, &["--quarantine", quarantine]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace(name).await?, &history, "s:", 2_000).await?;
    // From its stop on, the client never reaches the master again: it continues with the oldest
    // topology.
    let master = Proxy::start(cluster.master().trim_start_matches("http://")).await?;
    let args = [format!("http://{}", master.address()), name.to_owned(), "t:".to_owned()];
    let client =
        Process::spawn(name, &tool("vasto-test-writer"), args, &[], &cluster.dir().join("logs"))?;
    // Whole lines only: the last line may be incomplete.
    let acked = || client.printed().matches('\n').count();
    until("the client to write", DEADLINE, async || (acked() >= 100).then_some(())).await?;
    client.signal(Signal::STOP);
    master.make_deaf();
    let before = acked();
    // The client misses two cutovers.
    for shards in [3, 4] {
        println!("{}", resized(&cluster.resize(name, shards).await?));
    }
    if quarantine == "1s" {
        cluster.settled(name).await?;
    }
    client.signal(Signal::CONT);
    until("the client to write again", DEADLINE, async || (acked() >= before + 200).then_some(()))
        .await?;
    let mut client = client;
    client.kill9().await?;
    let count = client.printed().matches('\n').count() as u64;
    let keyspace = cluster.keyspace(name).await?;
    let names: Vec<String> = (0..count).map(|n| format!("t:{n}")).collect();
    for (n, value) in keyspace.get_many(&names).await?.into_iter().enumerate() {
        let value = value.map(|value| value.bytes());
        ensure!(
            value.as_deref() == Some(n.to_string().as_bytes()),
            "t:{n} was acknowledged and is {value:?}"
        );
    }
    println!("{before} writes acknowledged before the cutovers, {} after", count - before as u64);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ttl_and_tombstones_survive_restart_and_grow() -> Result<()> {
    const KEYS: u64 = 2_000;
    let mut cluster = Cluster::builder().start().await?;
    cluster.create("ttl", 1, &["--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("ttl").await?;
    let name = |kind: &str, n: u64| format!("{kind}:{n}");
    let write = async |n: u64| -> Result<()> {
        keyspace.put(name("kept", n), "v").await?;
        keyspace.put(name("deleted", n), "v").await?;
        keyspace.delete(name("deleted", n)).await?;
        keyspace.put(name("short", n), "v").ttl(Duration::from_secs(5)).await?;
        keyspace.put(name("long", n), "v").ttl(Duration::from_secs(3_600)).await?;
        Ok(())
    };
    use futures::TryStreamExt;
    futures::stream::iter(0..KEYS).map(write).buffer_unordered(64).try_collect::<()>().await?;
    cluster.kill9_node(0).await?;
    cluster.start_node(0, Port::New).await?;
    for shards in [2, 3] {
        println!("{}", resized(&cluster.resize("ttl", shards).await?));
        for node in 0..cluster.nodes() {
            cluster.kill9_node(node).await?;
            cluster.start_node(node, Port::Same).await?;
        }
    }
    let keyspace = cluster.keyspace("ttl").await?;
    let present = async |kind: &str| -> Result<(usize, usize)> {
        let names: Vec<String> = (0..KEYS).map(|n| name(kind, n)).collect();
        let got = keyspace.get_many(&names).await?.into_iter().flatten().count();
        let scanned = keyspace.scan().prefix(format!("{kind}:")).stream().count().await;
        Ok((got, scanned))
    };
    let all = (KEYS as usize, KEYS as usize);
    ensure!(present("kept").await? == all, "kept: {:?}", present("kept").await?);
    ensure!(present("long").await? == all, "long: {:?}", present("long").await?);
    ensure!(present("deleted").await? == (0, 0), "deleted: {:?}", present("deleted").await?);
    until("short-lived values to end", DEADLINE, async || {
        present("short").await.ok().filter(|found| *found == (0, 0))
    })
    .await?;
    let one = keyspace.get(name("long", 7)).await?.unwrap();
    let left = Duration::from_micros(one.expires_at.unwrap() - one.event_time);
    // The assigned event time may be slightly later than the clock that the time to live counts
    // from.
    let lost = Duration::from_secs(3_600).abs_diff(left);
    ensure!(lost < Duration::from_millis(100), "the time to live has become {left:?}");
    // An older write does not bring a deleted key back on its new shard.
    let deleted_at = one.event_time - 60_000_000;
    keyspace.put(name("deleted", 7), "older").event_time(deleted_at).await?;
    ensure!(keyspace.get(name("deleted", 7)).await?.is_none(), "an older write undid a delete");
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_grow_changes_nothing() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    cluster.create("cancel", 1, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("cancel").await?, &history, "s:", 50_000).await?;
    let load = Load::start(&cluster.master(), "cancel", &history, LoadSpec::default()).await?;
    let catalog = cluster.catalog("cancel").await?;
    let before = catalog.tip()?;
    let started =
        cluster.json(&["keyspace", "resize", "cancel", "--shards", "2", "--no-wait"]).await?;
    let id = started["id"].as_str().unwrap();
    catalog.step(&before, Step::Prepare, DEADLINE).await?.unwrap();
    let cancelled = cluster.vasto(&["operation", "cancel", id]).await?;
    let tip = until("the plan to end", DEADLINE, async || {
        catalog.tip().ok().filter(|tip| tip.plan.is_none())
    })
    .await?;
    // The cancellation may lose the race against the commit; then it must have failed.
    ensure!(
        (cancelled.code == 0) == (tip.spec.shards == 1),
        "{cancelled:?}, yet {} shards",
        tip.spec.shards
    );
    load.goes_on(20).await?;
    let report = cluster.json(&["operation", "show", id]).await?;
    ensure!(report["state"] == if tip.spec.shards == 1 { "aborted" } else { "done" }, "{report}");
    if tip.spec.shards == 1 {
        println!("{}", resized(&cluster.resize("cancel", 2).await?));
    }
    load.stop().await?;
    verify(&cluster.master(), "cancel", &history).await?;
    ensure!(cluster.keyspace("cancel").await?.get(key_of("s:0000001")).await?.is_some());
    cluster.finish().await
}
