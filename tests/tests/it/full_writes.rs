//! Resizes while clients write to the moving keys alone, as fast as they can; with a bucket that
//! takes 300 ms for each request; and across a cutover that a client does not see.
//!
//! `VASTO_FULL_WRITES` sets how often a keyspace grows and shrinks (2).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::task::JoinSet;
use vasto_client::{Batch, Keyspace};
use vasto_core::ErrorCode;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::ShardId;
use vasto_core::plan::Step;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;
use vasto_proto::v1::{KeyRef, Put, WriteOp, WriteRequest, write_op};
use vasto_testkit::http_store::HttpStore;
use vasto_tests::replicas::{Direct, converged};
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, Process, Resizing, preload, resized, setting, tool,
    until, verify,
};

/// Shards of the keyspace while it is small, and while it is large.
const SHARDS: (u32, u32) = (2, 4);
/// Batches that are in flight at a time.
const WRITERS: u64 = 48;
/// Keys in a batch.
const BATCH: u64 = 200;
/// Bytes of a value.
const VALUE_BYTES: usize = 100;
/// Returns whether a key changes its shard whenever the keyspace changes its size.
fn moves(key: &str) -> bool {
    jump(partition_hash(key.as_bytes()), SHARDS.1).shard.0 >= SHARDS.0
}

/// Returns the moving keys of a writer, which writes them all in one batch.
fn keys_of(writer: u64) -> Vec<String> {
    let keys = (0u64..).map(|n| format!("full-{writer}-{n}"));
    keys.filter(|key| moves(key)).take(BATCH as usize).collect()
}

fn value_of(round: u64) -> String {
    format!("{round:0VALUE_BYTES$}")
}

/// Writers that overwrite their moving keys, all at once and again and again.
struct Full {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    longest_us: Arc<AtomicU64>,
    writers: JoinSet<Result<(u64, u64)>>,
}

impl Full {
    fn start(keyspace: &Keyspace) -> Self {
        let mut full = Self {
            stop: Arc::default(),
            acked: Arc::default(),
            longest_us: Arc::default(),
            writers: JoinSet::new(),
        };
        for writer in 0..WRITERS {
            let (keyspace, stop) = (keyspace.clone(), full.stop.clone());
            let (acked, longest_us) = (full.acked.clone(), full.longest_us.clone());
            full.writers.spawn(async move {
                let keys = keys_of(writer);
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let mut batch = Batch::new();
                    for key in &keys {
                        batch = batch.put(key.as_str(), value_of(round));
                    }
                    let began = Instant::now();
                    let written = keyspace.write(batch).await;
                    written.with_context(|| format!("batch {round} of writer {writer}"))?;
                    longest_us.fetch_max(began.elapsed().as_micros() as u64, Ordering::Relaxed);
                    acked.fetch_add(keys.len() as u64, Ordering::Relaxed);
                }
                Ok((writer, round))
            });
        }
        full
    }

    /// Waits until so many more keys were written.
    async fn goes_on(&self, keys: u64) -> Result<()> {
        let aim = self.acked.load(Ordering::Relaxed) + keys;
        let reached = async || (self.acked.load(Ordering::Relaxed) >= aim).then_some(());
        until("the writers to go on", DEADLINE, reached).await
    }

    /// Stops the writers, none of which has seen an error; returns the last round of each.
    async fn stop(self) -> Result<Vec<(u64, u64)>> {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.join_all().await.into_iter().collect()
    }
}

/// What was measured in one resize.
struct Measured {
    p50_ms: f64,
    p99_ms: f64,
    writes_per_s: f64,
}

async fn resize(cluster: &Cluster, full: &Full, to: u32) -> Result<Measured> {
    full.longest_us.store(0, Ordering::Relaxed);
    let (before, began) = (full.acked.load(Ordering::Relaxed), Instant::now());
    let report = cluster.resize("full", to).await?;
    ensure!(report["state"] == "done", "{report}");
    let written = full.acked.load(Ordering::Relaxed) - before;
    let writes_per_s = written as f64 / began.elapsed().as_secs_f64();
    let pause = |name: &str| report["write_pause_ms"][name].as_f64().context("no pause");
    println!(
        "{}; {writes_per_s:.0} writes/s, the longest took {} ms",
        resized(&report),
        full.longest_us.load(Ordering::Relaxed) / 1_000
    );
    Ok(Measured { p50_ms: pause("p50")?, p99_ms: pause("p99")?, writes_per_s })
}

/// Returns the smallest value that this part of all does not exceed.
fn at(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * part).ceil() as usize).clamp(1, values.len()) - 1]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resizes_under_full_writes_to_the_moving_keys_lose_nothing_and_fail_nobody() -> Result<()> {
    let repeats = setting("VASTO_FULL_WRITES", 1);
    let cluster = Cluster::builder().nodes(2).keeps_no_garbage().start().await?;
    cluster.create("full", SHARDS.0, &["--ack", "os", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("full").await?;
    let full = Full::start(&keyspace);
    let mut measured = Vec::new();
    for repeat in 0..repeats {
        for to in [SHARDS.1, SHARDS.0] {
            full.goes_on(20_000).await?;
            let what = || format!("repeat {repeat}, to {to} shards");
            measured.push(resize(&cluster, &full, to).await.with_context(what)?);
            cluster.settled("full").await.with_context(what)?;
        }
        // The chunks of a long run would fill the disk.
        cluster.json(&["bucket", "gc"]).await?;
    }
    let rounds = full.stop().await?;
    let figures = |figure: fn(&Measured) -> f64| measured.iter().map(figure).collect::<Vec<_>>();
    let (p50, p99) = (at(figures(|one| one.p50_ms), 0.5), at(figures(|one| one.p99_ms), 0.99));
    println!(
        "{} resizes: pause p50 {p50:.1} ms, p99 {p99:.1} ms, {:.0} writes/s to moving keys",
        measured.len(),
        at(figures(|one| one.writes_per_s), 0.5)
    );
    for (writer, round) in rounds {
        ensure!(round > 0, "writer {writer} has written nothing");
        let keys = keys_of(writer);
        for (key, value) in keys.iter().zip(keyspace.get_many(&keys).await?) {
            let value = value.with_context(|| format!("{key} is missing"))?.bytes();
            ensure!(value == value_of(round).as_bytes(), "{key} is {value:?}, not {round}");
        }
    }
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

fn put(key: &str) -> Op {
    let put = Put { value: "at the old owner".into(), ..Put::default() };
    let op = WriteOp {
        key: Some(KeyRef { key: key.to_owned().into(), partition_hash: None }),
        event_time: None,
        op: Some(write_op::Op::Put(put)),
    };
    Op::Write(WriteRequest { ops: vec![op], ..WriteRequest::default() })
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
    let refused = direct.ask(put(&moved)).await?;
    let is_wrong =
        matches!(&refused, Reply::Error(error) if error.code == ErrorCode::WrongEpoch as u32);
    ensure!(is_wrong, "the old owner took a write of {moved}: {refused:?}");
    let taken = direct.ask(put(&stays)).await?;
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
