//! Invalid inputs through the real command line: each is refused with a message that states the
//! remedy and exit code 1 or 2, and nothing is written.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vasto_client::{Batch, ErrorKind};
use vasto_testkit::http_store::{Ask, HttpStore};
use vasto_tests::{Cluster, DEADLINE, Port, Ran, free_port};

/// Runs a command that must be refused with an error that contains all these texts.
async fn refused(args: &[&str], env: &[(&str, &str)], texts: &[&str]) -> Result<()> {
    let env: Vec<(String, String)> =
        env.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let ran = Ran::of(args, &env, DEADLINE).await.with_context(|| format!("vasto {args:?}"))?;
    check(&ran, texts).with_context(|| format!("vasto {}", shortened(args)))
}

fn check(ran: &Ran, texts: &[&str]) -> Result<()> {
    ensure!(ran.code == 1 || ran.code == 2, "the exit code is {}: {ran:?}", ran.code);
    ran.refused(ran.code, texts)
}

fn shortened(args: &[&str]) -> String {
    args.iter().map(|arg| arg.chars().take(60).collect::<String>()).collect::<Vec<_>>().join(" ")
}

/// Returns all files below a directory with their content, except for files that every start may
/// change.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if !path.ends_with("LOCK") {
                out.insert(
                    path.strip_prefix(dir).unwrap().display().to_string(),
                    std::fs::read(&path).unwrap(),
                );
            }
        }
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_say_what_to_do_and_change_nothing() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 2, &[]).await?;
    cluster.vasto(&["kv", "put", "ks", "here", "value"]).await?;
    let bucket = cluster.dir().join("bucket");
    let coordination = || (files(&bucket.join("catalog")), files(&bucket.join("names")));
    let before = coordination();
    let long_key = "k".repeat(65_537);
    let long_name = "n".repeat(64);
    let cases: &[(&[&str], &[&str])] = &[
        (&["kv", "get", "nope", "k"], &["nope"]),
        (&["kv", "put", "nope", "k", "v"], &["nope"]),
        (&["kv", "delete", "nope", "k"], &["nope"]),
        (&["kv", "scan", "nope"], &["nope"]),
        (&["keyspace", "describe", "nope"], &["nope"]),
        (&["keyspace", "delete", "nope", "--yes"], &["nope"]),
        (&["keyspace", "checkpoint", "nope"], &["nope"]),
        (&["keyspace", "compact", "nope"], &["nope"]),
        (&["keyspace", "resize", "nope", "--shards", "2"], &["nope"]),
        (&["kv", "put", "ks", &long_key, "v"], &["65537", "65536"]),
        (&["kv", "get", "ks", &long_key], &["65537", "65536"]),
        (&["kv", "put", "ks", "", "v"], &["empty"]),
        (
            &["kv", "put", "ks", "k", "v", "--event-time", "99999999999999999"],
            &["ahead of the clock"],
        ),
        (&["kv", "put", "ks", "k", "v", "--event-time", "0"], &["event-time"]),
        (&["kv", "put", "ks", "k", "v", "--ttl", "0s"], &["ttl"]),
        (&["keyspace", "create", "Bad"], &["`Bad` is not a keyspace name"]),
        (&["keyspace", "create", "a/b"], &["`a/b` is not a keyspace name"]),
        (&["keyspace", "create", ".."], &["is not a keyspace name"]),
        (&["keyspace", "create", &long_name], &["is not a keyspace name", "63"]),
        (&["keyspace", "create", "ks"], &["ks", "exists"]),
        (&["keyspace", "create", "new", "--shards", "5000"], &["5000", "4096"]),
        (&["keyspace", "create", "new", "--shards", "73"], &["73", "72 and 80"]),
        (&["keyspace", "create", "new", "--shards", "0"], &["shard"]),
        (&["keyspace", "create", "new", "--replicas", "8"], &["8"]),
        (&["keyspace", "create", "new", "--ack", "maybe"], &["maybe", "fsync"]),
        (&["keyspace", "create", "new", "--ack", "replica"], &["replica"]),
        (&["keyspace", "resize", "ks", "--shards", "5000"], &["5000", "4096"]),
        (&["keyspace", "resize", "ks", "--shards", "73"], &["73", "72 and 80"]),
        (&["keyspace", "resize", "ks", "--shards", "2"], &["already has 2 shards"]),
        (&["keyspace", "resize", "ks", "--shards", "0"], &["at least 1"]),
        (&["keyspace", "resize", "ks", "--shards", "72"], &["above 64"]),
        (&["keyspace", "delete", "ks"], &["--yes"]),
        (&["operation", "show", "op-9-9"], &["op-9-9"]),
        (&["operation", "cancel", "op-9-9"], &["op-9-9"]),
        (&["keyspace", "crate", "ks"], &["crate", "create"]),
        (&["kv", "get", "ks"], &["<KEY>"]),
    ];
    for (args, texts) in cases {
        let start = Instant::now();
        let ran = cluster.vasto(args).await?;
        check(&ran, texts).with_context(|| format!("vasto {}", shortened(args)))?;
        ensure!(
            start.elapsed() < Duration::from_secs(5),
            "vasto {} took {:?}",
            shortened(args),
            start.elapsed()
        );
    }
    ensure!(coordination() == before, "a refused request wrote to the bucket");

    // A value over the limit does not fit on a command line.
    let keyspace = cluster.keyspace("ks").await?;
    let error = keyspace.put("k", vec![0; (4 << 20) + 1]).await.unwrap_err();
    ensure!(
        error.kind() == ErrorKind::InvalidArgument && error.message().contains("4194304"),
        "{error:?}"
    );
    let many = (0..10_001).fold(Batch::new(), |batch, n| batch.put(format!("k{n}"), "v"));
    let error = keyspace.write(many).await.unwrap_err();
    ensure!(
        error.kind() == ErrorKind::InvalidArgument && error.message().contains("10000"),
        "{error:?}"
    );
    // A key and a value exactly at the limit are accepted.
    keyspace.put("k".repeat(65_536), vec![7; 4 << 20]).await?;
    ensure!(keyspace.get("k".repeat(65_536)).await?.unwrap().bytes().len() == 4 << 20);
    keyspace.delete("k".repeat(65_536)).await?;

    let rows = cluster.json(&["kv", "scan", "ks"]).await?;
    ensure!(rows.as_array().unwrap().len() == 1, "refused writes are there: {rows}");
    let ran = cluster.vasto(&["kv", "get", "ks", "missing"]).await?;
    ensure!(ran.code == 1 && ran.stdout.is_empty() && ran.stderr.contains("not found"), "{ran:?}");
    cluster.finish().await
}

#[tokio::test]
async fn commands_without_a_master_fail_soon_and_say_how_to_start_one() -> Result<()> {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    for args in [&["cluster", "status"][..], &["kv", "get", "ks", "k"], &["keyspace", "list"]] {
        let start = Instant::now();
        let mut args = args.to_vec();
        args.extend(["--master", &nobody]);
        refused(&args, &[], &[nobody.trim_start_matches("http://"), "vasto"]).await?;
        ensure!(start.elapsed() < Duration::from_secs(8), "it took {:?}", start.elapsed());
    }
    refused(&["cluster", "status", "--master", "not a url"], &[], &["not a url"]).await
}

#[tokio::test]
async fn a_master_refuses_a_bucket_that_it_cannot_use() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let listen = format!("127.0.0.1:{}", free_port());
    let closed = format!("http://127.0.0.1:{}", free_port());
    let master = async |bucket: &str, env: &[(&str, &str)], texts: &[&str]| {
        refused(&["serve", "master", "--bucket", bucket, "--listen", &listen], env, texts).await
    };
    master("ftp://host/path", &[], &["ftp", "s3://"]).await?;
    master("nonsense", &[], &["nonsense", "s3://"]).await?;
    std::fs::write(dir.path().join("file"), "")?;
    let below_a_file = format!("file://{}/file/bucket", dir.path().display());
    master(&below_a_file, &[], &["bucket"]).await?;
    let store = HttpStore::without_conditions().await;
    let s3 = store.env();
    let mut env: Vec<(&str, &str)> = s3.iter().map(|(key, value)| (*key, value.as_str())).collect();
    // Of the same variable, the last one counts.
    env.push(("AWS_ENDPOINT_URL", &closed));
    let start = Instant::now();
    master(&store.url(), &env, &["cannot be reached", "AWS_ENDPOINT_URL"]).await?;
    ensure!(
        start.elapsed() < Duration::from_secs(20),
        "an unreachable bucket took {:?}",
        start.elapsed()
    );

    // A store that accepts every PUT, whatever its conditions, cannot coordinate.
    env.pop();
    master(&store.url(), &env, &["ignores create-if-absent", "use another store"]).await?;
    let puts = store
        .take_served()
        .iter()
        .filter(|served| served.ask == Ask::Put && served.status == 200)
        .count();
    ensure!(puts >= 2, "the store was not tried");
    ensure!(store.object("cluster.json").is_none(), "a refused store was claimed");

    refused(
        &["serve", "master", "--listen", &listen],
        &[("HOME", "/")],
        &["bucket.url", "--bucket"],
    )
    .await
}

#[tokio::test]
async fn servers_refuse_addresses_that_they_should_not_or_cannot_use() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let bucket = format!("file://{}", dir.path().join("bucket").display());
    let data = dir.path().join("data").display().to_string();
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let taken = taken.local_addr()?.to_string();
    refused(
        &["serve", "master", "--bucket", &bucket, "--listen", "0.0.0.0:0"],
        &[],
        &["TLS", "--insecure"],
    )
    .await?;
    refused(
        &["serve", "node", "--dir", &data, "--listen", "0.0.0.0:7000"],
        &[],
        &["TLS", "--insecure"],
    )
    .await?;
    ensure!(!dir.path().join("data").exists(), "a refused node made its directory");
    ensure!(!dir.path().join("bucket").exists(), "a refused master made its bucket");
    refused(
        &["serve", "master", "--bucket", &bucket, "--listen", &taken],
        &[],
        &[&taken, "in use"],
    )
    .await?;
    ensure!(
        !dir.path().join("bucket").exists(),
        "a master without a port made or claimed its bucket"
    );
    let cluster = Cluster::builder().nodes(0).start().await?;
    let args = ["serve", "node", "--dir", &data, "--listen", &taken, "--master", &cluster.master()];
    refused(&args, &[], &[&taken, "in use"]).await?;
    ensure!(!dir.path().join("data").exists(), "a node without a port made its directory");
    let args = ["serve", "master", "--bucket", &bucket, "--listen", "somewhere"];
    refused(&args, &[], &["somewhere"]).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_refuses_a_directory_that_is_not_its_own() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 1, &[]).await?;
    cluster.vasto(&["kv", "put", "ks", "k", "v"]).await?;
    let dir = cluster.node_dir(0);
    let data = dir.display().to_string();

    // Another process uses the directory.
    let args = ["serve", "node", "--dir", &data, "--master", &cluster.master()];
    refused(&args, &[], &[&data, "in use by another process"]).await?;
    ensure!(
        cluster.json(&["kv", "get", "ks", "k"]).await.is_ok(),
        "the refused start disturbed the running node"
    );
    // The master serves another cluster, and this node holds no data that would be missed.
    let idle = cluster.add_node().await?;
    cluster.stop_node(idle).await?;
    let (idle, other) = (
        cluster.node_dir(idle),
        Cluster::builder().nodes(0).allow("refused a node").start().await?,
    );
    let before = files(&idle);
    let args = ["serve", "node", "--dir", &idle.display().to_string(), "--master", &other.master()];
    refused(&args, &[], &["belongs to cluster", "--dir"]).await?;
    ensure!(files(&idle) == before, "a refused start changed the directory");
    cluster.stop_node(0).await?;

    // The file was written by a newer version.
    let identity = dir.join("node.json");
    let ours = std::fs::read_to_string(&identity)?;
    let mut newer: serde_json::Value = serde_json::from_str(&ours)?;
    newer["format"] = 999.into();
    newer["unheard_of"] = "thing".into();
    std::fs::write(&identity, newer.to_string())?;
    let changed = files(&dir);
    let args = ["serve", "node", "--dir", &data, "--master", &cluster.master()];
    refused(&args, &[], &["format 999", "newer vasto"]).await?;
    ensure!(files(&dir) == changed, "a refused start changed the directory");
    std::fs::write(&identity, "{")?;
    refused(&args, &[], &["node.json", "damaged"]).await?;
    std::fs::write(&identity, ours)?;

    // After all refusals the node restarts with its data.
    cluster.start_node(0, Port::New).await?;
    let got = cluster.vasto(&["kv", "get", "ks", "k"]).await?;
    ensure!(got.code == 0 && got.stdout.trim_end() == "v", "{got:?}");
    other.finish().await?;
    cluster.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_node_refuses_a_bucket_that_is_not_its_masters_and_an_old_one_serves() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(1).allow("holds no cluster.json").start().await?;
    cluster.create("ks", 1, &[]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    keyspace.put("k", "v").await?;
    // The view of a node whose URL names another disk, or another endpoint.
    let claim = cluster.dir().join("bucket/cluster.json");
    let ours = std::fs::read(&claim)?;
    std::fs::remove_file(&claim)?;
    let data = cluster.dir().join("another").display().to_string();
    let args =
        ["serve", "node", "--dir", &data, "--listen", "127.0.0.1:0", "--master", &cluster.master()];
    refused(&args, &[], &["holds no cluster.json", "same bucket"]).await?;
    cluster.stop_node(0).await?;
    cluster.start_node(0, Port::Same).await?;
    ensure!(
        keyspace.get("k").await?.is_some(),
        "what a node holds is served whatever the bucket says"
    );
    std::fs::write(&claim, ours)?;
    cluster.finish().await
}

#[tokio::test]
async fn a_master_refuses_a_bucket_of_a_newer_version() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 1, &[]).await?;
    cluster.stop_node(0).await?;
    cluster.stop_master().await?;
    let bucket = cluster.dir().join("bucket");
    let claim = bucket.join("cluster.json");
    let ours = std::fs::read_to_string(&claim)?;
    let mut newer: serde_json::Value = serde_json::from_str(&ours)?;
    newer["format"] = 999.into();
    std::fs::write(&claim, newer.to_string())?;
    let before = files(&bucket);
    let listen = format!("127.0.0.1:{}", free_port());
    let args = ["serve", "master", "--bucket", cluster.bucket(), "--listen", &listen];
    refused(&args, &[], &["format 999", "upgrade"]).await?;
    ensure!(files(&bucket) == before, "a refused start changed the bucket");
    std::fs::write(&claim, ours)?;
    cluster.start_master(Port::Same).await?;
    cluster.start_node(0, Port::Same).await?;
    cluster.json(&["keyspace", "describe", "ks"]).await?;
    cluster.finish().await
}

#[tokio::test]
async fn unknown_fields_of_the_configuration_are_named_with_the_nearest_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("vasto.toml");
    let path = file.display().to_string();
    let data = dir.path().join("data").display().to_string();
    std::fs::write(&file, "[node]\ncahce = \"1GiB\"\n")?;
    refused(&["config", "check", &path], &[], &["node.cahce", "node.cache"]).await?;
    refused(
        &["serve", "node", "--config", &path, "--dir", &data],
        &[],
        &["node.cahce", "node.cache"],
    )
    .await?;
    refused(
        &["serve", "node", "--dir", &data, "--set", "node.cahce=1GiB"],
        &[],
        &["node.cahce", "node.cache"],
    )
    .await?;
    let env = [("VASTO_NODE__CAHCE", "1GiB")];
    refused(&["serve", "node", "--dir", &data], &env, &["VASTO_NODE__CAHCE", "VASTO_NODE__CACHE"])
        .await?;
    std::fs::write(&file, "[node]\ncache = \"much\"\n")?;
    refused(&["config", "check", &path], &[], &["node.cache", "much"]).await?;
    std::fs::write(&file, "[node\n")?;
    refused(&["config", "check", &path], &[], &["vasto.toml:1"]).await?;
    refused(&["config", "check", "/nowhere/vasto.toml"], &[], &["/nowhere/vasto.toml"]).await?;
    ensure!(!dir.path().join("data").exists(), "a refused node made its directory");
    Ok(())
}
