//! Resizes while clients write to the moving keys alone, as fast as they can; with a bucket that
//! takes 300 ms for each request; and across a cutover that a client does not see.
//!
//! `VASTO_FULL_WRITES` sets how often a keyspace grows and shrinks (1).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use vasto_core::ErrorCode;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_core::plan::Step;
use vasto_proto::v1::reply::Result as Reply;
use vasto_testkit::http_store::HttpStore;
use vasto_tests::replicas::{Direct, converged};
use vasto_tests::{
    Cluster, DEADLINE, FULL_WRITES_SHARDS, FullWrites, History, Load, LoadSpec, Process, Resizing,
    percentile, preload, resized, setting, tool, until, verify,
};

/// What was measured in one resize.
struct Measured {
    p50_ms: f64,
    p99_ms: f64,
    writes_per_s: f64,
}

async fn resize(cluster: &Cluster, full: &FullWrites, to: u32) -> Result<Measured> {
    full.take_longest();
    let (before, began) = (full.acked(), Instant::now());
    let report = cluster.resize("full", to).await?;
    ensure!(report["state"] == "done", "{report}");
    let writes_per_s = (full.acked() - before) as f64 / began.elapsed().as_secs_f64();
    let pause = |name: &str| report["write_pause_ms"][name].as_f64().context("no pause");
    println!(
        "{}; {writes_per_s:.0} writes/s, the longest took {} ms",
        resized(&report),
        full.take_longest().as_millis()
    );
    Ok(Measured { p50_ms: pause("p50")?, p99_ms: pause("p99")?, writes_per_s })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resizes_under_full_writes_to_the_moving_keys_lose_nothing_and_fail_nobody() -> Result<()> {
    let repeats = setting("VASTO_FULL_WRITES", 1);
    let (few, many) = FULL_WRITES_SHARDS;
    let cluster = Cluster::builder().nodes(2).keeps_no_garbage().start().await?;
    cluster.create("full", few, &["--ack", "os", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("full").await?;
    let full = FullWrites::start(&keyspace);
    let mut measured = Vec::new();
    for repeat in 0..repeats {
        for to in [many, few] {
            full.goes_on(20_000).await?;
            let what = || format!("repeat {repeat}, to {to} shards");
            measured.push(resize(&cluster, &full, to).await.with_context(what)?);
            cluster.settled("full").await.with_context(what)?;
        }
        // The chunks of a long run would fill the disk.
        cluster.json(&["bucket", "gc"]).await?;
    }
    let written = full.stop().await;
    let figures = |figure: fn(&Measured) -> f64| measured.iter().map(figure).collect::<Vec<_>>();
    println!(
        "{} resizes: pause p50 {:.1} ms, p99 {:.1} ms, {:.0} writes/s to moving keys",
        measured.len(),
        percentile(figures(|one| one.p50_ms), 0.5),
        percentile(figures(|one| one.p99_ms), 0.99),
        percentile(figures(|one| one.writes_per_s), 0.5)
    );
    ensure!(written.failed == 0, "clients saw errors: {:?}", written.errors);
    ensure!(written.idle() == 0, "{} writers have written nothing", written.idle());
    let losses = written.losses(&keyspace).await?;
    ensure!(losses.lost + losses.strange == 0, "writes are lost: {losses:?}");
    converged(&cluster, "full").await?;
    cluster.finish().await
}

/// Writers wait for the commit, one request: each pause takes a little more than 300 ms.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_of_300_ms_a_request_grows_and_shrinks() -> Result<()> {
    let store = Arc::new(HttpStore::start().await);
    let cluster = Cluster::builder().nodes(2).http(&store).allow_warnings().start().await?;
    cluster.create("slow", 2, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("slow").await?, &history, "s:", 2_000).await?;
    let spec = LoadSpec { writers: 4, readers: 1, ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "slow", &history, spec).await?;
    store.answer_later(Duration::from_millis(300));
    for to in [3, 1] {
        load.goes_on(5).await?;
        let resizing = Resizing::start(&cluster, "slow", to).await?;
        let report = resizing.done().await?;
        println!("{}", resized(&serde_json::to_value(&report)?));
        let pause = report.write_pause_ms;
        ensure!(pause.max >= 300.0, "the bucket was not slow: {report:?}");
        ensure!(pause.p99 <= 2_500.0, "writers waited for too long: {report:?}");
        cluster.settled("slow").await?;
    }
    load.goes_on(5).await?;
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(summary.refused + summary.unknown == 0, "clients saw errors: {summary:?}");
    store.heal();
    verify(&cluster.master(), "slow", &history).await?;
    cluster.finish().await
}

/// The client is stopped while its writes wait for the outcome of a seal, or just before or after
/// that, and goes on with the topology of before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_was_stopped_across_a_cutover_writes_nothing_to_the_old_owner() -> Result<()>
{
    let cluster = Cluster::builder().nodes(2).start().await?;
    cluster.create("stopped", 1, &["--quarantine", "1h"]).await?;
    let args = [cluster.master(), "stopped".to_owned(), "t:".to_owned()];
    let logs = cluster.dir().join("logs");
    let mut client = Process::spawn("stopped", &tool("vasto-test-writer"), args, &[], &logs)?;
    let acked = || client.printed().matches('\n').count();
    until("the client to write", DEADLINE, async || (acked() >= 100).then_some(())).await?;
    let before = cluster.catalog("stopped").await?.tip()?;
    let owner = cluster.node_of(&before.placement[0].replicas[0].node.to_string())?;
    let address = format!("127.0.0.1:{}", cluster.port(owner));
    let mut direct = Direct::connect(&address, &before, ShardId(0)).await?;
    let grow = Resizing::start(&cluster, "stopped", 2).await?;
    grow.reaches(Step::Sealing).await?;
    client.signal(Signal::STOP);
    let at_the_stop = acked();
    println!("{}", resized(&serde_json::to_value(grow.done().await?)?));
    // What the client would send now, and what it may send with its old epoch.
    let is_moved = |key: &String| jump(partition_hash(key.as_bytes()), 2).shard.0 == 1;
    let names = || (0u64..).map(|n| format!("d:{n}"));
    let moved = names().find(is_moved).context("no key")?;
    let stays = names().find(|key| !is_moved(key)).context("no key")?;
    let refused = direct.put(&moved, "at the old owner").await?;
    let is_wrong =
        matches!(&refused, Reply::Error(error) if error.code == ErrorCode::WrongEpoch as u32);
    ensure!(is_wrong, "the old owner took a write of {moved}: {refused:?}");
    let taken = direct.put(&stays, "at the old owner").await?;
    ensure!(matches!(taken, Reply::Write(_)), "{taken:?}");
    client.signal(Signal::CONT);
    let goes_on = async || (acked() >= at_the_stop + 200).then_some(());
    until("the client to write again", DEADLINE, goes_on).await?;
    ensure!(client.is_running(), "{}", client.log_tail(5));
    client.kill9().await?;
    let count = client.printed().matches('\n').count();
    let names: Vec<String> = (0..count).map(|n| format!("t:{n}")).collect();
    let keyspace = cluster.keyspace("stopped").await?;
    for (n, value) in keyspace.get_many(&names).await?.into_iter().enumerate() {
        let value = value.map(|value| value.bytes());
        ensure!(
            value.as_deref() == Some(n.to_string().as_bytes()),
            "t:{n} was acknowledged and is {value:?}"
        );
    }
    println!("{at_the_stop} writes were acknowledged before the stop, {count} in the end");
    cluster.finish().await
}
