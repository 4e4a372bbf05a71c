//! The main use case end to end, unattended: a cluster of separate processes starts on a local
//! directory as its bucket, is loaded with real and generated data, and grows from two shards to
//! three while clients write and read. A node is lost with its disk and replaced from the bucket,
//! and records removed by a bad delete are restored. Every record is verified after each step.
//!
//! Exit code 0 only when nothing was lost or stale and all bulk bytes came from the bucket.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use vasto_client::{Batch, Keyspace};
use vasto_tests::wordnet::{self, Synset};
use vasto_tests::{
    Cluster, DEADLINE, History, Load, LoadSpec, LoadSummary, Seen, key_of, number_of, records,
    until,
};

/// Generated records.
const RECORDS: u64 = 1_000_000;
/// Writes in a batch, keys in a get.
const BATCH: usize = 500;
/// Batches in flight.
const PARALLEL: usize = 8;
/// Maximum ratio of bytes read from the bucket to bytes moved.
const READ_RATIO_MAX: f64 = 1.25;

const ABOUT: &str = "\
The main job from end to end: a cluster takes data, grows under load, loses a node and is restored from the
bucket; every record is verified.

Usage: vasto-demo

It takes no arguments. Exit code 0 only when nothing was lost or stale.";

#[tokio::main]
async fn main() -> ExitCode {
    if let Some(code) = vasto_tests::usage::answered(ABOUT) {
        return code;
    }
    let done = tokio::select! {
        done = demo() => done,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("stopped; everything is cleaned up")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    println!(
        "Vasto demo: a keyspace grows, loses a node and is restored while clients write and read"
    );
    let start = Instant::now();
    let synsets = wordnet::load(Path::new(wordnet::DIR))?;
    step("data");
    note(&format!("{} synsets: {}", count(synsets.len() as u64), wordnet::ABOUT));
    note(&format!(
        "{} generated records with values of {} bytes",
        count(RECORDS),
        records::VALUE_BYTES
    ));

    let began = Instant::now();
    let mut cluster = Cluster::builder()
        .set("node.cache=128MiB")
        .set("node.write_buffer=64MiB")
        .set("node.ship_interval=1s")
        .start()
        .await?;
    step("cluster");
    note(&format!(
        "1 master and {} nodes as processes of their own, up in {}",
        cluster.nodes(),
        secs(began)
    ));
    note(&format!("bucket {}", cluster.bucket()));
    vasto(&cluster, &["keyspace", "create", "demo", "--shards", "2", "--quarantine", "5s"]).await?;
    let keyspace = cluster.keyspace("demo").await?;

    step("load");
    load(
        &keyspace,
        "synsets",
        synsets.iter().map(|one| (one.key.clone(), one.value.clone().into())),
    )
    .await?;
    load(
        &keyspace,
        "records",
        (0..RECORDS).map(|index| (records::key(index), records::value(index))),
    )
    .await?;
    vasto(&cluster, &["keyspace", "compact", "demo"]).await?;
    shards(&cluster).await?;

    let history = Arc::new(History::default());
    let (report, clients) = grow(&cluster, &history).await?;
    shards(&cluster).await?;

    step("clean-up");
    let began = Instant::now();
    cluster.settled("demo").await?;
    note(&format!(
        "the quarantine has ended and the sources have removed what moved, after {}",
        secs(began)
    ));
    shards(&cluster).await?;

    step("verify");
    let mut wrong = verify(&keyspace, &synsets, &history).await?;

    let lost = lose_a_node(&mut cluster).await?;
    step("verify");
    wrong.add(&verify(&keyspace, &synsets, &history).await?);

    let restored = undo_a_bad_delete(&cluster, &keyspace).await?;
    step("verify what was restored");
    wrong.add(&verify(&restored, &synsets, &history).await?);

    step("result");
    let bytes = |name: &str| report[name].as_u64().unwrap_or_default();
    let ratio = bytes("bytes_from_bucket") as f64 / bytes("bytes_moved").max(1) as f64;
    note(&format!(
        "lost {}, stale {}, strange rows {}",
        count(wrong.lost),
        count(wrong.stale),
        count(wrong.strange)
    ));
    note(&format!("bytes_from_bucket / bytes_moved = {ratio:.3} (at most {READ_RATIO_MAX})"));
    note(&format!("all in {}", secs(start)));
    ensure!(
        wrong.lost + wrong.stale + wrong.strange == 0,
        "the data is not what was written: {wrong:?}"
    );
    ensure!(bytes("bytes_moved") > 0, "nothing moved: {report}");
    ensure!(
        ratio <= READ_RATIO_MAX,
        "the grow read {ratio:.3} times what it moved from the bucket"
    );
    for (when, clients) in [("the grow", clients), ("the loss of a node", lost)] {
        ensure!(
            clients.refused + clients.unknown + clients.read_errors + clients.stale_reads == 0,
            "clients saw errors during {when}: {:?}",
            clients.errors
        );
    }
    cluster.finish().await?;
    note("the processes have stopped and the temporary directory is removed");
    Ok(())
}

/// Grows 2 -> 3 under client load; returns the report and the clients' summary.
async fn grow(cluster: &Cluster, history: &Arc<History>) -> Result<(Value, LoadSummary)> {
    step("grow");
    let spec = LoadSpec {
        name: "live".to_owned(),
        writers: 8,
        readers: 4,
        overwritten: 200,
        pace: Duration::from_millis(1),
    };
    let clients = Load::start(&cluster.master(), "demo", history, spec).await?;
    clients.goes_on(50).await?;
    clients.reset_longest();
    let (before, began) = (clients.summary(), Instant::now());
    let report = vasto(cluster, &["keyspace", "resize", "demo", "--shards", "3"]).await?;
    let during = began.elapsed().as_secs_f64();
    let after = clients.summary();
    clients.goes_on(50).await?;
    let summary = clients.stop().await?;
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    let pause = |name: &str| report["write_pause_ms"][name].as_f64().unwrap_or_default();
    note(&format!(
        "{} keys moved in {:.1} s",
        count(number("keys_moved")),
        number("duration_ms") as f64 / 1000.0
    ));
    note(&format!(
        "bytes_moved {}, bytes_from_bucket {} in {} objects, bytes_from_peers {} (log only)",
        count(number("bytes_moved")),
        count(number("bytes_from_bucket")),
        count(number("objects_read")),
        count(number("bytes_from_peers")),
    ));
    note(&format!(
        "write_pause_ms of moving keys: p50 {:.1}, p99 {:.1}, max {:.1}",
        pause("p50"),
        pause("p99"),
        pause("max")
    ));
    note(&format!(
        "12 paced clients meanwhile: {:.0} writes/s, {:.0} reads/s, {} errors, longest write {:.1} ms, longest read {:.1} ms",
        (after.acked - before.acked) as f64 / during,
        (after.reads - before.reads) as f64 / during,
        summary.refused + summary.unknown + summary.read_errors,
        after.longest_write.as_secs_f64() * 1000.0,
        after.longest_read.as_secs_f64() * 1000.0,
    ));
    Ok((report, summary))
}

/// Loses a node with its disk while clients work on a keyspace with two replicas; the shards of
/// `demo` that only this node held are replaced from the bucket.
async fn lose_a_node(cluster: &mut Cluster) -> Result<LoadSummary> {
    step("node loss");
    // Its disk is lost too: only writes that two replicas synced before the answer survive that.
    let orders =
        ["keyspace", "create", "orders", "--shards", "2", "--replicas", "2", "--ack", "replica"];
    vasto(cluster, &orders).await?;
    let history = Arc::new(History::default());
    let spec = LoadSpec {
        name: "order".to_owned(),
        writers: 4,
        readers: 2,
        overwritten: 200,
        pace: Duration::from_millis(1),
    };
    let clients = Load::start(&cluster.master(), "orders", &history, spec).await?;
    vasto(cluster, &["keyspace", "checkpoint", "demo"]).await?;
    until("everything to be in the bucket", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", "demo"]).await.ok()?;
        let shipped =
            |shard: &Value| shard["replicas"][0]["lsn"] == shard["replicas"][0]["shipped_lsn"];
        described["placement"].as_array()?.iter().all(shipped).then_some(())
    })
    .await?;
    clients.goes_on(50).await?;
    clients.reset_longest();
    let described = cluster.json(&["keyspace", "describe", "demo"]).await?;
    let id =
        described["placement"][0]["replicas"][0]["node_id"].as_str().context("no node")?.to_owned();
    let index = cluster.node_of(&id)?;
    cluster.kill9_node(index).await?;
    std::fs::remove_dir_all(cluster.node_dir(index))?;
    note(&format!("kill -9 of node {id}, and its data directory is gone"));
    let report = vasto(cluster, &["node", "replace", &id]).await?;
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    note(&format!(
        "{} replicas are back after {:.1} s: {} keys, bytes_from_bucket {} in {} objects, bytes_from_peers {}",
        number("replicas_moved"),
        number("duration_ms") as f64 / 1000.0,
        count(number("keys_moved")),
        count(number("bytes_from_bucket")),
        count(number("objects_read")),
        count(number("bytes_from_peers")),
    ));
    clients.goes_on(50).await?;
    let summary = clients.stop().await?;
    note(&format!(
        "6 paced clients of `orders` meanwhile: {} writes, {} reads, {} errors, longest write {:.1} ms, longest read {:.1} ms",
        count(summary.acked),
        count(summary.reads),
        summary.refused + summary.unknown + summary.read_errors,
        summary.longest_write.as_secs_f64() * 1000.0,
        summary.longest_read.as_secs_f64() * 1000.0,
    ));
    let verified = vasto_tests::verify(&cluster.master(), "orders", &history).await?;
    note(&format!("{} keys of `orders` hold what was acknowledged", count(verified.keys as u64)));
    ensure!(number("bytes_from_bucket") > 0 && number("bytes_from_peers") == 0, "{report}");
    Ok(summary)
}

/// Keys that are deleted by mistake.
const DELETED: u64 = 100_000;

/// Deletes records by mistake, and restores the state before the delete into a separate keyspace.
async fn undo_a_bad_delete(cluster: &Cluster, keyspace: &Keyspace) -> Result<Keyspace> {
    step("restore");
    tokio::time::sleep(Duration::from_millis(20)).await;
    #[allow(clippy::disallowed_methods)]
    let at = jiff::Timestamp::now().to_string();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let began = Instant::now();
    let keys: Vec<String> = (0..DELETED).map(records::key).collect();
    futures::stream::iter(keys.chunks(BATCH))
        .map(|keys| {
            keyspace
                .write(keys.iter().fold(Batch::new(), |writes, key| writes.delete(key.as_str())))
                .into_future()
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<_>>()
        .await?;
    note(&rate("records deleted by mistake", DELETED, began));
    ensure!(keyspace.get(records::key(7)).await?.is_none(), "the delete has not happened");
    let report =
        vasto(cluster, &["keyspace", "restore", "demo", "--into", "before", "--at", &at]).await?;
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    note(&format!(
        "restored in {:.1} s: bytes_from_bucket {} in {} objects, bytes_from_peers {}",
        number("duration_ms") as f64 / 1000.0,
        count(number("bytes_from_bucket")),
        count(number("objects_read")),
        count(number("bytes_from_peers")),
    ));
    ensure!(number("bytes_from_bucket") > 0 && number("bytes_from_peers") == 0, "{report}");
    cluster.keyspace("before").await
}

/// Counts of wrong records.
#[derive(Debug, Default)]
struct Wrong {
    lost: u64,
    stale: u64,
    strange: u64,
}

impl Wrong {
    fn add(&mut self, other: &Wrong) {
        self.lost += other.lost;
        self.stale += other.stale;
        self.strange += other.strange;
    }
}

/// Verifies all records by get, then all records by scan.
async fn verify(keyspace: &Keyspace, synsets: &[Synset], history: &History) -> Result<Wrong> {
    let mut wrong = Wrong::default();
    get_loaded(keyspace, synsets, &mut wrong).await?;
    let present = get_written(keyspace, history, &mut wrong).await?;
    let scanned = scan(keyspace, synsets, history, &mut wrong).await?;
    let found = synsets.len() as u64 + RECORDS + present;
    ensure!(scanned == found, "the scan gives {scanned} rows, gets find {found}");
    Ok(wrong)
}

async fn get_loaded(keyspace: &Keyspace, synsets: &[Synset], wrong: &mut Wrong) -> Result<()> {
    let began = Instant::now();
    let loaded = synsets
        .iter()
        .map(|one| (one.key.clone(), one.value.clone().into()))
        .chain((0..RECORDS).map(|index| (records::key(index), records::value(index))));
    let found: Vec<Wrong> = batches(loaded)
        .map(|batch| async move {
            let mut wrong = Wrong::default();
            let values = keyspace.get_many(batch.iter().map(|(key, _)| key)).await?;
            for ((_, wanted), value) in batch.iter().zip(values) {
                match value {
                    None => wrong.lost += 1,
                    Some(value) => wrong.stale += u64::from(value.bytes() != *wanted),
                }
            }
            anyhow::Ok(wrong)
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    found.iter().for_each(|one| wrong.add(one));
    note(&rate("gets of all loaded records", synsets.len() as u64 + RECORDS, began));
    Ok(())
}

/// Returns how many of the keys written during the grow exist.
async fn get_written(keyspace: &Keyspace, history: &History, wrong: &mut Wrong) -> Result<u64> {
    let began = Instant::now();
    let written = history.all();
    let names: Vec<&String> = written.keys().collect();
    let mut present = 0;
    for names in names.chunks(BATCH) {
        let values = keyspace.get_many(names.iter().map(|name| key_of(name))).await?;
        for (name, value) in names.iter().zip(values) {
            let seen = value.as_ref().map_or(Seen::Absent, |value| {
                Seen::Number(number_of(name, &value.bytes()).unwrap_or(u64::MAX))
            });
            present += u64::from(seen != Seen::Absent);
            if !written[*name].allows(seen) {
                *(if seen == Seen::Absent { &mut wrong.lost } else { &mut wrong.stale }) += 1;
            }
        }
    }
    let (keys, acked) = history.counts();
    note(&rate(
        &format!("gets of the keys of the {} writes during the grow", count(acked)),
        keys as u64,
        began,
    ));
    Ok(present)
}

/// Returns the number of rows.
async fn scan(
    keyspace: &Keyspace,
    synsets: &[Synset],
    history: &History,
    wrong: &mut Wrong,
) -> Result<u64> {
    let began = Instant::now();
    let synsets: HashMap<&[u8], &[u8]> =
        synsets.iter().map(|one| (one.key.as_bytes(), one.value.as_bytes())).collect();
    let mut rows = std::pin::pin!(keyspace.scan().stream());
    let mut last = bytes::Bytes::new();
    let mut scanned = 0;
    while let Some(row) = rows.next().await {
        let row = row.context("scanning")?;
        ensure!(row.key > last, "the scan gives {:?} after {last:?}", row.key);
        let value = row.value.map(|value| value.bytes()).unwrap_or_default();
        let name = String::from_utf8_lossy(&row.key);
        let good = if let Some(index) = name.strip_prefix("record:") {
            index.parse().is_ok_and(|index| index < RECORDS && records::value(index) == value)
        } else if let Some(wanted) = synsets.get(&row.key[..]) {
            *wanted == value
        } else {
            number_of(&name, &value)
                .is_some_and(|number| history.get(&name).allows(Seen::Number(number)))
        };
        wrong.strange += u64::from(!good);
        last = row.key;
        scanned += 1;
    }
    note(&rate("rows of one scan of everything", scanned, began));
    Ok(scanned)
}

type Record = (String, bytes::Bytes);

fn batches(records: impl Iterator<Item = Record>) -> impl futures::Stream<Item = Vec<Record>> {
    let mut records = records.peekable();
    futures::stream::iter(std::iter::from_fn(move || {
        records.peek()?;
        Some(records.by_ref().take(BATCH).collect())
    }))
}

async fn load(
    keyspace: &Keyspace,
    what: &str,
    records: impl Iterator<Item = Record>,
) -> Result<()> {
    let began = Instant::now();
    let sizes: Vec<u64> = batches(records)
        .map(|batch| async move {
            let size = batch.len() as u64;
            let writes =
                batch.into_iter().fold(Batch::new(), |writes, (key, value)| writes.put(key, value));
            keyspace.write(writes).await?;
            anyhow::Ok(size)
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await
        .with_context(|| format!("loading the {what}"))?;
    note(&rate(
        &format!("{what} in batches of {BATCH}, each answered when synced to disk"),
        sizes.iter().sum(),
        began,
    ));
    Ok(())
}

/// Runs a command of `vasto` and prints it.
async fn vasto(cluster: &Cluster, args: &[&str]) -> Result<Value> {
    let began = Instant::now();
    let answer = cluster.json(args).await?;
    note(&format!("$ vasto {}   ({})", args.join(" "), secs(began)));
    Ok(answer)
}

/// Prints the contents of each shard.
async fn shards(cluster: &Cluster) -> Result<()> {
    let described = cluster.json(&["keyspace", "describe", "demo"]).await?;
    let of = |shard: &Value, name: &str| shard["replicas"][0][name].as_u64().unwrap_or_default();
    let placement = described["placement"].as_array().context("no placement")?;
    let text: Vec<String> = placement
        .iter()
        .map(|shard| format!("shard {}: {} bytes", shard["shard"], count(of(shard, "bytes"))))
        .collect();
    note(&text.join(", "));
    Ok(())
}

fn step(name: &str) {
    println!("\n{name}");
}

fn note(text: &str) {
    println!("  {text}");
}

fn secs(began: Instant) -> String {
    format!("{:.1} s", began.elapsed().as_secs_f64())
}

fn rate(what: &str, number: u64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!(
        "{} {what}: {seconds:.1} s, {}/s",
        count(number),
        count((number as f64 / seconds.max(0.001)) as u64)
    )
}

/// Formats `1234567` as `1,234,567`.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
