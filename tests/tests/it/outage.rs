//! Outages of the bucket, recovery over a slow link, and a bucket that has lost its contents.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vasto_client::ErrorKind;
use vasto_core::limits::{LOG_MEMORY_MAX, UPLOAD_MEMORY_MAX};
use vasto_tests::{
    Cluster, DEADLINE, Link, Numbers, Port, S3Kind, S3Server, missing, put_all, put_each, setting,
    until,
};

const MIB: u64 = 1 << 20;
const LINK_BYTES_PER_SECOND: u64 = 8_000_000;
const CACHE_MIB: u64 = 64;
const WRITE_BUFFER_MIB: u64 = 64;

/// Parses the size: `VASTO_TEST_OUTAGE=24x48` is 24 shards with 48 MiB of log each.
fn size() -> (u32, u64) {
    let given = setting("VASTO_TEST_OUTAGE", "6x8".to_owned());
    let (shards, backlog) = given.split_once('x').expect("shards x MiB");
    (shards.parse().unwrap(), backlog.parse().unwrap())
}

/// Returns a memory figure of a process in MiB, as the kernel reports it.
fn memory_mib(pid: u32, figure: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(figure)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

/// Returns the number of log records that are not in the bucket.
async fn behind(cluster: &Cluster, name: &str) -> Option<u64> {
    let described = cluster.json(&["keyspace", "describe", name]).await.ok()?;
    let shards = described["placement"].as_array()?;
    shards.iter().try_fold(0, |sum, shard| {
        let replica = &shard["replicas"][0];
        Some(sum + replica["lsn"].as_u64()?.checked_sub(replica["shipped_lsn"].as_u64()?)?)
    })
}

async fn is_shipped(cluster: &Cluster, name: &str, within: Duration) -> Result<()> {
    until("everything to be shipped", within, async || {
        (behind(cluster, name).await? == 0).then_some(())
    })
    .await
}

async fn warns(cluster: &Cluster, text: &str) -> Option<()> {
    let status = cluster.json(&["cluster", "status"]).await.ok()?;
    status["warnings"].to_string().contains(text).then_some(())
}

/// A backlog is uploaded once, at the speed of the link, in memory that does not grow with the
/// number of shards. During the outage a warning is raised, and few requests are sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_goes_up_once_over_a_slow_link_in_bounded_memory() -> Result<()> {
    let (shards, per_shard) = size();
    let backlog = u64::from(shards) * per_shard * MIB;
    let s3 = S3Server::start(S3Kind::SeaweedFs).await?;
    let link = Link::start(&s3.address()).await?;
    let mut cluster = Cluster::builder()
        .nodes(1)
        .s3(&s3, "outage")
        .env("AWS_ENDPOINT_URL", &format!("http://{}", link.address()))
        .set(&format!("node.cache={CACHE_MIB}MiB"))
        .set(&format!("node.write_buffer={WRITE_BUFFER_MIB}MiB"))
        .set("node.ship_interval=1s")
        .allow("shipping failed")
        .start()
        .await?;
    cluster.create("ks", shards, &[]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    keyspace.put("first", "record").await?;
    is_shipped(&cluster, "ks", DEADLINE).await?;

    link.cut();
    const VALUE: usize = 64 << 10;
    let count = backlog / VALUE as u64;
    let body: bytes::Bytes = {
        let mut numbers = Numbers::new(7);
        (0..VALUE / 8).flat_map(|_| numbers.draw().to_le_bytes()).collect()
    };
    put_each(&keyspace, "k", count, |_| body.clone()).await?;
    until("the outage to be told", DEADLINE, async || {
        warns(&cluster, "does not ship: the bucket has not answered").await
    })
    .await?;
    // A check of the bucket fails soon.
    let looked = Instant::now();
    let checked = cluster.vasto(&["bucket", "fsck"]).await?;
    checked.refused(1, &["the bucket cannot be looked through"])?;
    ensure!(looked.elapsed() < Duration::from_secs(10), "{:?}", looked.elapsed());
    let (asked, since) = (link.refused(), Instant::now());
    tokio::time::sleep(Duration::from_secs(4)).await;
    let asked_per_second = (link.refused() - asked) as f64 / since.elapsed().as_secs_f64();
    let pid = cluster.node_process(0)?.pid();
    let before = memory_mib(pid, "VmRSS");

    link.mend(LINK_BYTES_PER_SECOND);
    let began = Instant::now();
    is_shipped(&cluster, "ks", Duration::from_secs(900)).await?;
    let (took, sent) = (began.elapsed(), link.sent());
    let (after, most) = (memory_mib(pid, "VmRSS"), memory_mib(pid, "VmHWM"));
    let ideal = Duration::from_secs_f64(backlog as f64 / LINK_BYTES_PER_SECOND as f64);
    println!(
        "{shards} shards, {} MiB of backlog: {:.1} requests/s during the outage; sent {} MiB in {:.1} s (the link alone: \
         {:.1} s); memory {before} MiB before, {after} after, {most} at most",
        backlog / MIB,
        asked_per_second,
        sent / MIB,
        took.as_secs_f64(),
        ideal.as_secs_f64(),
    );
    ensure!(asked_per_second < 5.0, "{asked_per_second} requests/s while nobody answers");
    ensure!(sent as f64 <= 1.2 * backlog as f64, "{sent} bytes were sent for {backlog}");
    // Time until a process has detected that the bucket is back.
    let noticed = Duration::from_secs(8);
    ensure!(took <= ideal.mul_f64(1.5) + noticed, "{took:?} instead of {ideal:?}");
    // The memory of uploads does not depend on the number of waiting shards.
    let budget = (LOG_MEMORY_MAX + UPLOAD_MEMORY_MAX) / MIB;
    let added = most.saturating_sub(before);
    ensure!(
        added as f64 <= 1.3 * budget as f64,
        "uploads added {added} MiB of memory, their budget is {budget}"
    );
    until("the warning to go", DEADLINE, async || {
        warns(&cluster, "does not ship").await.is_none().then_some(())
    })
    .await?;
    ensure!(cluster.json(&["bucket", "fsck"]).await?["missing"] == serde_json::json!([]));
    cluster.finish().await?;
    s3.stop().await
}

fn bucket_of(cluster: &Cluster) -> std::path::PathBuf {
    cluster.bucket().trim_start_matches("file://").into()
}

fn empty(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
    }
    Ok(())
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().map(|all| all.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

/// The claim is deleted, and the master restarts: it claims nothing, all nodes keep serving, and
/// one command repairs the bucket. Foreign objects in the prefix only cause a warning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_claim_stops_nobody_and_is_put_back() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(2)
        .set("node.ship_interval=200ms")
        .allow("has to be repaired before")
        .allow("is not an object of Vasto")
        .allow("a keyspace is left out")
        .allow("holds no cluster.json")
        .start()
        .await?;
    cluster.create("ks", 2, &["--replicas", "2"]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    put_all(&keyspace, "a", 500).await?;
    let bucket = bucket_of(&cluster);
    let claim = std::fs::read(bucket.join("cluster.json"))?;
    std::fs::remove_file(bucket.join("cluster.json"))?;
    // A lost+found directory of the file system, and a foreign object beside the catalog.
    std::fs::create_dir_all(bucket.join("lost+found"))?;
    std::os::unix::fs::symlink("..", bucket.join("lost+found/circle"))?;
    let other = bucket.join("catalog/00000000000000000009");
    std::fs::create_dir_all(&other)?;
    std::fs::write(other.join("00000000000000000001"), "notes")?;
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    warns(&cluster, "vasto bucket repair").await.context("the loss is not told")?;
    let refused = cluster.vasto(&["keyspace", "list"]).await?;
    refused.refused(1, &["cluster.json is missing", "vasto bucket repair"])?;
    cluster.vasto(&["keyspace", "create", "new"]).await?.refused(1, &["vasto bucket repair"])?;
    cluster.vasto(&["bucket", "gc"]).await?.refused(1, &["vasto bucket repair"])?;
    // Clients that know the placement continue.
    put_all(&keyspace, "b", 500).await?;
    // A node that restarts meanwhile continues too.
    cluster.stop_node(0).await?;
    cluster.start_node(0, Port::Same).await?;
    until("both nodes to be there", DEADLINE, async || {
        let nodes = cluster.json(&["node", "list"]).await.ok()?;
        nodes.as_array()?.iter().filter(|node| node["state"] == "live").nth(1).map(drop)
    })
    .await?;
    // The foreign object is not a catalog version, and stays reported as damaged.
    let ran = cluster.vasto(&["bucket", "repair", "--output", "json"]).await?;
    let repaired: Value = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
    ensure!(ran.code == 1 && names(&repaired["corrupt"]).len() == 1, "{repaired}");
    ensure!(
        repaired["claimed"] == true && repaired["missing"] == serde_json::json!([]),
        "{repaired}"
    );
    ensure!(names(&repaired["keyspaces"]) == ["ks"], "{repaired}");
    let now: Value = serde_json::from_slice(&std::fs::read(bucket.join("cluster.json"))?)?;
    let then: Value = serde_json::from_slice(&claim)?;
    let id = |claim: &Value| {
        let text = claim.to_string();
        let from = text.split_once("cluster_id")?.1.trim_start_matches(['\\', '"', ':']).to_owned();
        from.split(['\\', '"']).next().map(str::to_owned)
    };
    ensure!(id(&now).is_some() && id(&now) == id(&then), "{now} instead of {then}");
    put_all(&keyspace, "c", 500).await?;
    let again = cluster.keyspace("ks").await?;
    for prefix in ["a", "b", "c"] {
        ensure!(missing(&again, prefix, 500).await? == 0, "{prefix}");
    }
    cluster.create("next", 1, &[]).await?;
    let checked = cluster.vasto(&["bucket", "fsck"]).await?;
    let said = "0 objects are missing and 1 are damaged";
    ensure!(checked.code == 1 && checked.stderr.contains(said), "{checked:?}");
    cluster.json(&["bucket", "gc"]).await?;
    cluster.finish().await
}

/// The bucket is emptied: the loss is detected, no write is confirmed by the bucket, and the nodes
/// upload everything again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_bucket_is_found_and_filled_again_from_the_nodes() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(2)
        .set("node.ship_interval=200ms")
        .allow("has to be repaired before")
        .allow("shipping failed")
        .allow("could not be written")
        .allow("refused a node")
        .start()
        .await?;
    cluster.create("ks", 2, &["--ack", "bucket"]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    put_all(&keyspace, "a", 300).await?;
    cluster.json(&["keyspace", "checkpoint", "ks"]).await?;
    put_all(&keyspace, "b", 50).await?;
    empty(&bucket_of(&cluster))?;
    // Missing shipped objects are known as soon as the nodes have reported them.
    until("everything that is missing to be named", DEADLINE, async || {
        let checked = cluster.vasto(&["bucket", "fsck", "--output", "json"]).await.ok()?;
        let said: Value = serde_json::from_str(&checked.stdout).ok()?;
        let missing = names(&said["missing"]);
        let has = |part: &&str| missing.iter().any(|key| key.contains(part));
        (checked.code == 1 && ["cluster.json", "catalog/", "checkpoint/"].iter().all(has))
            .then_some(())
    })
    .await?;
    warns(&cluster, "objects of the bucket are missing")
        .await
        .context("what is missing is not told")?;
    // The catalog that places the data is missing.
    let refused = keyspace.put("unconfirmed", "v").await.unwrap_err();
    ensure!(refused.kind() == ErrorKind::Unknown, "{refused:?}");
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    until("both nodes to be there, or refused", DEADLINE, async || {
        let status = cluster.json(&["cluster", "status"]).await.ok()?;
        let live =
            status["nodes"].as_array()?.iter().filter(|node| node["state"] == "live").count();
        let told = status["warnings"]
            .as_array()?
            .iter()
            .filter(|text| text.to_string().contains("is not taken in"));
        (live + told.count() == 2).then_some(())
    })
    .await?;
    let repaired = cluster.json(&["bucket", "repair"]).await?;
    ensure!(
        repaired["missing"] == serde_json::json!([])
            && repaired["corrupt"] == serde_json::json!([]),
        "{repaired}"
    );
    ensure!(
        names(&repaired["keyspaces"]) == ["ks"] && repaired["written"].as_u64() >= Some(2),
        "{repaired}"
    );
    until("writes to be confirmed again", DEADLINE, async || {
        keyspace.put("confirmed", "v").await.ok().map(drop)
    })
    .await?;
    cluster.json(&["keyspace", "restore", "ks", "--into", "copy"]).await?;
    let copy = cluster.keyspace("copy").await?;
    ensure!(missing(&copy, "a", 300).await? == 0 && missing(&copy, "b", 50).await? == 0);
    ensure!(copy.get("confirmed").await?.is_some());
    ensure!(cluster.json(&["bucket", "fsck", "--deep"]).await?["missing"] == serde_json::json!([]));
    cluster.finish().await
}
