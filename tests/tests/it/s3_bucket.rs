//! Growth, loss of a node and of the master, and a restore, with the bucket on a real S3 server.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vasto_tests::{
    Cluster, History, Load, LoadSpec, Port, S3Kind, S3Server, preload, resized, verify,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_bucket_end_to_end() -> Result<()> {
    let s3 = S3Server::start(S3Kind::SeaweedFs).await?;
    let mut cluster = Cluster::builder().s3(&s3, "end/to/end").start().await?;
    cluster.create("s3", 2, &["--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("s3").await?, &history, "s:", 20_000).await?;
    let load = Load::start(
        &cluster.master(),
        "s3",
        &history,
        LoadSpec { writers: 4, ..LoadSpec::default() },
    )
    .await?;
    load.goes_on(20).await?;
    for shards in [3, 4] {
        let report = cluster.resize("s3", shards).await?;
        println!("{}", resized(&report));
        ensure!(
            report["bytes_from_bucket"].as_u64().unwrap() > 0
                && report["objects_read"].as_u64().unwrap() > 0
        );
    }
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(
        summary.refused + summary.unknown + summary.read_errors == 0,
        "clients saw errors: {summary:?}"
    );
    verify(&cluster.master(), "s3", &history).await?;
    // A new master reads its complete state from the bucket.
    cluster.kill9_master().await?;
    cluster.start_master(Port::Same).await?;
    verify(&cluster.master(), "s3", &history).await?;
    // A lost node, a garbage collection and a restore.
    cluster.json(&["keyspace", "checkpoint", "s3"]).await?;
    let described = cluster.json(&["keyspace", "describe", "s3"]).await?;
    let lost =
        described["placement"][0]["replicas"][0]["node_id"].as_str().context("no node")?.to_owned();
    let index = cluster.node_of(&lost)?;
    cluster.kill9_node(index).await?;
    std::fs::remove_dir_all(cluster.node_dir(index))?;
    let replaced = cluster.json(&["node", "replace", &lost]).await?;
    println!("{replaced}");
    ensure!(
        replaced["bytes_from_bucket"].as_u64() > Some(0) && replaced["bytes_from_peers"] == 0,
        "{replaced}"
    );
    verify(&cluster.master(), "s3", &history).await?;
    cluster.json(&["bucket", "gc"]).await?;
    cluster.fsck().await?;
    println!("{}", cluster.json(&["keyspace", "restore", "s3", "--into", "again"]).await?);
    verify(&cluster.master(), "again", &history).await?;
    cluster.finish().await?;
    s3.stop().await
}
