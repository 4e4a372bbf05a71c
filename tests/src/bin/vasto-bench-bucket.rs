//! Costs and benefits of the bucket, in one run on one machine: the speed of replacing a lost node
//! compared with a plain download of the same objects, its effect on clients, the writes lost
//! without a second replica, and the number of requests.
//!
//! `VASTO_BENCH_GIB` (4) is the size of the replica, `VASTO_BENCH_SECONDS` (10) the length of each
//! phase, `VASTO_BENCH_IDLE_SECONDS` (60) that of the idle phase; with `VASTO_BENCH_S3=1` the
//! bucket is on a SeaweedFS server instead of in a local directory.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use vasto_client::{Ack, Batch, Keyspace};
use vasto_core::ids::{KeyspaceId, ReplicaId, ShardId};
use vasto_shipping::{Bucket, BucketOptions};
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, Numbers, RawDownload, S3Kind, S3Server, Seen,
    cpu_seconds, download_raw, key_of, newest_manifest, number_of, setting, until,
};

const VALUE_BYTES: usize = 16 << 10;
const BATCH: u64 = 64;
const PARALLEL: usize = 8;

const ABOUT: &str = "\
What the bucket costs and gives: how fast a lost node is replaced, what is lost without a second replica, and
how many requests it takes. Takes minutes and gigabytes of disk.

Usage: vasto-bench-bucket

It takes no arguments, and reads
  VASTO_BENCH_GIB           size of the replica [4]
  VASTO_BENCH_SECONDS       length of each phase [10]
  VASTO_BENCH_IDLE_SECONDS  length of the idle phase [60]
  VASTO_BENCH_S3=1          a bucket on a SeaweedFS server instead of a local directory";

#[tokio::main]
async fn main() -> Result<ExitCode> {
    match vasto_tests::usage::answered(ABOUT) {
        Some(code) => Ok(code),
        None => measure().await.map(|()| ExitCode::SUCCESS),
    }
}

async fn measure() -> Result<()> {
    let s3 = match setting("VASTO_BENCH_S3", 0) {
        0 => None,
        _ => Some(S3Server::start(S3Kind::SeaweedFs).await?),
    };
    println!(
        "bucket: {}\n",
        if s3.is_some() { "SeaweedFS on this machine" } else { "a local directory" }
    );
    replacement(s3.as_ref()).await?;
    for (interval, ack) in [("1s", Ack::Fsync), ("10s", Ack::Fsync), ("10s", Ack::Bucket)] {
        tail(s3.as_ref(), interval, ack).await?;
    }
    match s3 {
        Some(s3) => s3.stop().await,
        None => Ok(()),
    }
}

async fn cluster(s3: Option<&S3Server>, root: &str, interval: &str) -> Result<Cluster> {
    let mut builder = Cluster::builder().nodes(2).set(&format!("node.ship_interval={interval}"));
    if let Some(s3) = s3 {
        builder = builder.s3(s3, root);
    }
    builder.start().await
}

fn bucket(s3: Option<&S3Server>, cluster: &Cluster) -> Result<Bucket> {
    let options = s3.map_or_else(BucketOptions::default, S3Server::options);
    Ok(Bucket::open(cluster.bucket(), &options)?)
}

/// Returns 16 KiB that do not compress.
fn value(index: u64) -> bytes::Bytes {
    let mut numbers = Numbers::new(index);
    (0..VALUE_BYTES / 8).flat_map(|_| numbers.draw().to_le_bytes()).collect()
}

async fn fill(keyspace: &Keyspace, from: u64, to: u64) -> Result<()> {
    let batches: Vec<u64> = (from..to).step_by(BATCH as usize).collect();
    futures::stream::iter(batches)
        .map(|first| async move {
            let keys = first..(first + BATCH).min(to);
            let batch =
                keys.fold(Batch::new(), |batch, n| batch.put(format!("bulk{n:010}"), value(n)));
            keyspace.write(batch).await.map(|_| ())
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    Ok(())
}

/// Foreground load: mixed puts and gets by 8 clients until stopped; reports p50 and p99 of all
/// operations in milliseconds.
struct Front {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<Result<Vec<Duration>>>>,
}

impl Front {
    fn start(keyspace: &Keyspace) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |id: u64| {
            let (stop, keyspace) = (stop.clone(), keyspace.clone());
            tokio::spawn(async move {
                let (mut numbers, mut took) = (Numbers::new(id), Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("front{}", numbers.below(10_000));
                    let began = Instant::now();
                    match numbers.below(2) {
                        0 => drop(keyspace.put(key, "0123456789".repeat(10)).await?),
                        _ => drop(keyspace.get(key).await?),
                    }
                    took.push(began.elapsed());
                }
                Ok(took)
            })
        };
        let clients = (0..8).map(client).collect();
        Self { stop, clients }
    }

    async fn end(self) -> Result<(f64, f64)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for client in self.clients {
            all.extend(client.await??);
        }
        all.sort_unstable();
        ensure!(!all.is_empty(), "no operations");
        let at = |part: f64| all[((all.len() - 1) as f64 * part) as usize].as_secs_f64() * 1000.0;
        Ok((at(0.5), at(0.99)))
    }
}

/// Returns the sums over all nodes: puts, other requests, bytes sent.
async fn requests(cluster: &Cluster) -> Result<(u64, u64, u64)> {
    let status = cluster.json(&["cluster", "status"]).await?;
    let nodes = status["nodes"].as_array().context("no nodes")?.clone();
    let sum = |name: &str| {
        nodes.iter().map(|node| node["bucket_requests"][name].as_u64().unwrap_or(0)).sum::<u64>()
    };
    let others = ["get", "head", "list", "delete"].iter().map(|name| sum(name)).sum();
    Ok((sum("put"), others, sum("bytes_written")))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn holder(cluster: &Cluster, name: &str) -> Result<usize> {
    let described = cluster.json(&["keyspace", "describe", name]).await?;
    cluster
        .node_of(described["placement"][0]["replicas"][0]["node_id"].as_str().context("no node")?)
}

/// Loads the records; prints how long it takes until the bucket has them, and the requests of that
/// and of idle time.
async fn load(cluster: &Cluster, bulk: &Keyspace, gib: u64, records: u64) -> Result<()> {
    let before = requests(cluster).await?;
    let began = Instant::now();
    fill(bulk, 0, records).await?;
    println!("loaded {gib} GiB in {:.1} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    cluster.json(&["keyspace", "checkpoint", "bulk"]).await?;
    println!("and the rest of it is in the bucket {:.1} s later", began.elapsed().as_secs_f64());
    let after = requests(cluster).await?;
    println!(
        "requests for it: {} PUT, {} others; {:.2} bytes sent per byte written (log and SSTs)\n",
        after.0 - before.0,
        after.1 - before.1,
        (after.2 - before.2) as f64 / (gib << 30) as f64
    );
    let idle = Duration::from_secs(setting("VASTO_BENCH_IDLE_SECONDS", 60));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = requests(cluster).await?;
    tokio::time::sleep(idle).await;
    let after = requests(cluster).await?;
    println!(
        "{} requests in {} idle seconds\n",
        after.0 + after.1 - before.0 - before.1,
        idle.as_secs()
    );
    Ok(())
}

async fn replacement(s3: Option<&S3Server>) -> Result<()> {
    let gib = setting("VASTO_BENCH_GIB", 4);
    let phase = Duration::from_secs(setting("VASTO_BENCH_SECONDS", 10));
    let records = (gib << 30) / VALUE_BYTES as u64;
    let mut cluster = cluster(s3, "bench", "1s").await?;
    cluster.create("bulk", 1, &[]).await?;
    cluster.create("front", 1, &[]).await?;
    let (bulk, front) = (cluster.keyspace("bulk").await?, cluster.keyspace("front").await?);
    load(&cluster, &bulk, gib, records).await?;

    let running = Front::start(&front);
    tokio::time::sleep(phase).await;
    let calm = running.end().await?;
    fill(&bulk, 0, records / 8).await?;
    let running = Front::start(&front);
    let began = Instant::now();
    cluster.json(&["keyspace", "checkpoint", "bulk"]).await?;
    let took = began.elapsed();
    let checkpoint = running.end().await?;

    let lost = holder(&cluster, "bulk").await?;
    let other = 1 - lost;
    ensure!(holder(&cluster, "front").await? == other, "both keyspaces are on one node");
    let id = cluster.node_id(lost).context("no id")?;
    until("everything to be shipped", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", "bulk"]).await.ok()?;
        let replica = described["placement"][0]["replicas"][0].clone();
        (replica["lsn"] == replica["shipped_lsn"]).then_some(())
    })
    .await?;
    cluster.kill9_node(lost).await?;
    std::fs::remove_dir_all(cluster.node_dir(lost))?;
    let dead = Instant::now();
    let pid = cluster.node_process(other)?.pid();
    let (running, cpu) = (Front::start(&front), cpu_seconds(pid)?);
    let report: Value = cluster.json(&["node", "replace", &id]).await?;
    let (bootstrap, cpu) = (running.end().await?, cpu_seconds(pid)? - cpu);
    let serves = until("the replacement to serve", DEADLINE, async || {
        bulk.get("bulk0000000001").await.ok().flatten()
    })
    .await?;
    let serves_after = dead.elapsed();
    ensure!(serves.bytes() == value(1), "another value came back");
    let bytes = report["bytes_from_bucket"].as_u64().context("no bytes")?;
    let seconds = report["duration_ms"].as_u64().context("no duration")? as f64 / 1000.0;

    // The baseline: a download of the same checkpoint's objects to files, synced, with the same
    // number of concurrent requests.
    let bucket = bucket(s3, &cluster)?;
    let dir = tempfile::tempdir()?;
    let raw = download(&bucket, &cluster, dir.path()).await?;
    let (ours, plain) = (mib(bytes) / seconds, mib(raw.bytes) / raw.seconds);
    println!(
        "replacement of a dead node, {:.0} MiB from the bucket in {seconds:.1} s: {ours:.0} MiB/s",
        mib(bytes)
    );
    println!(
        "the same objects to files with object_store alone: {plain:.0} MiB/s; ratio {:.2}",
        ours / plain
    );
    println!("from kill -9 to the first read: {:.1} s", serves_after.as_secs_f64());
    println!(
        "CPU of the node meanwhile: {:.1} s per GiB (clients' work included)",
        cpu / (mib(bytes) / 1024.0)
    );
    println!("\nclients, p50 / p99 in ms: calm {:.2} / {:.2}", calm.0, calm.1);
    let ratio = |one: (f64, f64)| {
        format!("{:.2} / {:.2}, {:.1} x / {:.1} x", one.0, one.1, one.0 / calm.0, one.1 / calm.1)
    };
    println!("  during a checkpoint of {:.1} s: {}", took.as_secs_f64(), ratio(checkpoint));
    println!("  during the replacement, on the same node: {}\n", ratio(bootstrap));
    for n in (0..records).step_by(997) {
        let found = bulk
            .get(format!("bulk{n:010}"))
            .await?
            .with_context(|| format!("record {n} is gone"))?;
        ensure!(found.bytes() == value(n), "record {n} is not what was written");
    }
    cluster.finish().await
}

/// Downloads the SSTs of the shard's newest checkpoint, from the replica that was replaced.
async fn download(bucket: &Bucket, cluster: &Cluster, dir: &Path) -> Result<RawDownload> {
    let described = cluster.json(&["keyspace", "describe", "bulk"]).await?;
    let keyspace = described["keyspace_id"].as_u64().context("no keyspace_id")?;
    let all = described["placement"][0]["replicas"].as_array().context("no replicas")?.clone();
    let left = all.iter().find(|one| one["state"] == "draining").context("nobody has left")?;
    let source = ReplicaId(left["replica_id"].as_u64().context("no replica_id")?);
    let manifest = newest_manifest(bucket, KeyspaceId(keyspace), ShardId(0), source).await?;
    let keys: Vec<String> = manifest.files.into_iter().map(|file| file.key).collect();
    download_raw(bucket, &keys, dir).await
}

/// Measures the writes lost with the only node while clients write.
async fn tail(s3: Option<&S3Server>, interval: &str, ack: Ack) -> Result<()> {
    let name = format!("tail-{interval}-{ack}");
    let mut cluster = cluster(s3, &name, interval).await?;
    cluster.create("tail", 1, &["--ack", &ack.to_string()]).await?;
    let history = Arc::new(History::default());
    let spec = LoadSpec { readers: 0, ..LoadSpec::default() };
    let load = Load::start(&cluster.master(), "tail", &history, spec).await?;
    tokio::time::sleep(Duration::from_secs(14)).await;
    let described = cluster.json(&["keyspace", "describe", "tail"]).await?;
    let replica = &described["placement"][0]["replicas"][0];
    let behind =
        replica["lsn"].as_u64().unwrap_or(0) - replica["shipped_lsn"].as_u64().unwrap_or(0);
    let lost = holder(&cluster, "tail").await?;
    cluster.kill9_node(lost).await?;
    #[allow(clippy::disallowed_methods)]
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_micros() as u64;
    std::fs::remove_dir_all(cluster.node_dir(lost))?;
    let id = cluster.node_id(lost).context("no id")?;
    let summary = load.stop().await?;
    cluster.json(&["node", "replace", &id]).await?;
    let keyspace = cluster.keyspace("tail").await?;
    let (mut missing, mut newest) = (0, 0);
    for (name, kept) in history.all() {
        let found = keyspace.get(key_of(&name)).await?;
        newest = newest.max(found.as_ref().map_or(0, |value| value.event_time));
        let seen = found.map_or(Seen::Absent, |value| {
            Seen::Number(number_of(&name, &value.bytes()).unwrap_or(0))
        });
        missing += u64::from(!kept.allows(seen));
    }
    println!(
        "the only node is lost under load, ship_interval {interval}, ack {ack}: {} writes acknowledged, {missing} keys \
         without their last acknowledged write; log {behind} records ahead of the bucket shortly before; the newest \
         write that survived is {} ms old",
        summary.acked,
        now.saturating_sub(newest) / 1000,
    );
    cluster.finish().await
}
