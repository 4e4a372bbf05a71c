//! The losses of the system that this project re-creates: one scenario for each defect that was
//! proven by running it, with two replicas of each shard unless stated otherwise.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt};
use vasto_client::{ErrorKind, Keyspace};
use vasto_tests::replicas::converged;
use vasto_tests::{
    Cluster, ClusterBuilder, DEADLINE, History, Load, LoadSpec, Port, missing, preload, put_all,
    resized, until, verify,
};

fn three_nodes() -> ClusterBuilder {
    Cluster::builder().nodes(3)
}

async fn two_replicas(cluster: &Cluster, name: &str) -> Result<Keyspace> {
    cluster.create(name, 3, &["--replicas", "2", "--quarantine", "1s"]).await?;
    cluster.keyspace(name).await
}

/// #1: a restart wiped the database and copied another shard's rows: 1,015 of 3,000 keys were gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_01_a_restart_loses_nothing() -> Result<()> {
    let mut cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "restart").await?;
    put_all(&keyspace, "k", 3_000).await?;
    for round in 0..2 {
        for node in 0..3 {
            // Writes that one replica alone has acknowledged would return with it, and not before.
            converged(&cluster, "restart").await?;
            if (node + round) % 2 == 0 {
                cluster.kill9_node(node).await?;
            } else {
                cluster.stop_node(node).await?;
            }
            ensure!(
                missing(&keyspace, "k", 3_000).await? == 0,
                "keys are missing while node {node} is down"
            );
            cluster.start_node(node, if round == 0 { Port::Same } else { Port::New }).await?;
            ensure!(
                missing(&keyspace, "k", 3_000).await? == 0,
                "keys are missing after node {node} came back"
            );
        }
    }
    ensure!(converged(&cluster, "restart").await? == 3_000);
    cluster.finish().await
}

/// #2: replication stopped for good at the first rotation of the log, and a follower whose position was purged
/// received nothing any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_02_replication_goes_on_across_log_rotation_and_absence() -> Result<()> {
    let mut cluster = three_nodes().start().await?;
    cluster.create("rotate", 1, &["--replicas", "3", "--ack", "os"]).await?;
    let keyspace = cluster.keyspace("rotate").await?;
    cluster.stop_node(2).await?;
    // More than two log files of 64 MiB.
    let value = bytes::Bytes::from(vec![7u8; 1 << 20]);
    let put = |n: u64| {
        let (keyspace, value) = (&keyspace, value.clone());
        async move { keyspace.put(format!("big{}", n % 20), value).await.map(|_| ()) }
    };
    futures::stream::iter(0..150).map(put).buffer_unordered(4).try_collect::<()>().await?;
    put_all(&keyspace, "after", 500).await?;
    cluster.start_node(2, Port::Same).await?;
    put_all(&keyspace, "later", 500).await?;
    ensure!(converged(&cluster, "rotate").await? == 1_020);
    cluster.finish().await
}

/// #3: deletes were never replicated, counters only on shard 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_03_deletes_and_counters_are_on_every_replica() -> Result<()> {
    let mut cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "deletes").await?;
    put_all(&keyspace, "k", 200).await?;
    for n in 0..20 {
        keyspace.delete(format!("k{n}")).await?;
        for _ in 0..3 {
            keyspace.add_i64(format!("c{n}"), 1).await?;
        }
    }
    ensure!(converged(&cluster, "deletes").await? == 200);
    for node in 0..3 {
        cluster.kill9_node(node).await?;
        for n in 0..20 {
            ensure!(
                keyspace.get(format!("k{n}")).await?.is_none(),
                "k{n} came back after node {node} was lost"
            );
            let counter = keyspace.get(format!("c{n}")).await?.and_then(|value| value.as_i64());
            ensure!(counter == Some(3), "c{n} is {counter:?} after node {node} was lost");
        }
        cluster.start_node(node, Port::Same).await?;
        converged(&cluster, "deletes").await?;
    }
    cluster.finish().await
}

/// #4: a reconnect applied counters again: 3 became 6 without a client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_04_a_reconnect_applies_nothing_twice() -> Result<()> {
    let mut cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "twice").await?;
    for n in 0..20 {
        for _ in 0..3 {
            keyspace.add_i64(format!("c{n}"), 1).await?;
        }
    }
    for round in 0..2 {
        for node in 0..3 {
            cluster.kill9_node(node).await?;
            cluster.start_node(node, Port::Same).await?;
        }
        converged(&cluster, "twice").await?;
        for n in 0..20 {
            let counter = keyspace.get(format!("c{n}")).await?.and_then(|value| value.as_i64());
            ensure!(counter == Some(3), "round {round}: c{n} is {counter:?}");
        }
    }
    // Replication continues from there.
    for n in 0..20 {
        ensure!(keyspace.add_i64(format!("c{n}"), 1).await? == 4);
    }
    cluster.finish().await
}

/// #5: the single-process server crashed on its first put.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_05_the_development_cluster_takes_a_put() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let port = vasto_tests::free_port();
    let (listen, at) = (format!("127.0.0.1:{port}"), dir.path().join("data").display().to_string());
    let args = ["dev", "--nodes", "2", "--dir", &at, "--master-listen", &listen];
    let mut process =
        vasto_tests::Process::spawn("dev", vasto_tests::vasto_binary(), args, &[], dir.path())?;
    let ready = process.ready_line(DEADLINE).await?;
    ensure!(ready["role"] == "dev", "{ready}");
    let vasto = vasto_client::Vasto::connect(&format!("http://{listen}")).await?;
    vasto
        .create_keyspace("ks", vasto_client::KeyspaceSpec::default().shards(2).replicas(2))
        .await?;
    let keyspace = vasto.keyspace("ks").await?;
    keyspace.put("k", "v").await?;
    ensure!(keyspace.get("k").await?.unwrap().bytes() == "v");
    process.signal(rustix::process::Signal::TERM);
    ensure!(process.ended(DEADLINE).await?.success());
    Ok(())
}

/// #6: an empty value, an empty prefix, a cursor after the last key, or a counter on other bytes crashed the store,
/// again after each restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_06_no_request_crashes_a_node() -> Result<()> {
    let cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "robust").await?;
    keyspace.put("empty", "").await?;
    ensure!(keyspace.get("empty").await?.unwrap().bytes().is_empty());
    keyspace.put("text", "seven b").await?;
    for outcome in [
        keyspace.add_f64("text", 1.0).await.map(|_| ()),
        keyspace.add_i64("text", 1).await.map(|_| ()),
        keyspace.max_f64("text", 1.0).await.map(|_| ()),
    ] {
        ensure!(outcome.unwrap_err().kind() == ErrorKind::WrongType);
    }
    ensure!(keyspace.add_f64("sum", f64::NAN).await.unwrap_err().kind() == ErrorKind::OutOfRange);
    let rows: Vec<_> = keyspace.scan().prefix("").stream().try_collect().await?;
    ensure!(rows.len() == 2, "{rows:?}");
    ensure!(keyspace.scan().prefix("zzzz").stream().count().await == 0);
    ensure!(converged(&cluster, "robust").await? == 2);
    ensure!(keyspace.get("text").await?.unwrap().bytes() == "seven b");
    cluster.finish().await
}

/// #7: a time to live above four seconds ended after a fraction of it, and expired entries were never purged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_07_a_time_to_live_is_what_was_asked_for() -> Result<()> {
    let cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "ttl").await?;
    let began = std::time::Instant::now();
    keyspace.put("five", "v").ttl(Duration::from_secs(5)).await?;
    keyspace.put("hour", "v").ttl(Duration::from_secs(3_600)).await?;
    let five = keyspace.get("five").await?.unwrap();
    let lives = five.expires_at.unwrap().abs_diff(five.event_time);
    ensure!(lives.abs_diff(5_000_000) < 100_000, "5 s have become {lives} us");
    until("the value to expire", DEADLINE, async || {
        keyspace.get("five").await.ok()?.is_none().then_some(())
    })
    .await?;
    ensure!(
        began.elapsed() >= Duration::from_millis(4_900),
        "it ended after {:?}",
        began.elapsed()
    );
    ensure!(keyspace.get("hour").await?.is_some());
    cluster.finish().await
}

/// #8: a batch get with a missing key crashed the client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_08_missing_keys_of_a_batch_are_none() -> Result<()> {
    let cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "batch").await?;
    keyspace.put("b", "v").await?;
    let values = keyspace.get_many(["a", "b", "c"]).await?;
    ensure!(values.iter().map(Option::is_some).collect::<Vec<_>>() == [false, true, false]);
    ensure!(keyspace.get_many(Vec::<String>::new()).await?.is_empty());
    cluster.finish().await
}

/// #9: growing with two replicas lost half the keys when idle, and acknowledged writes under load.
/// Shrinking is in `shrinks`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_09_growing_with_two_replicas_loses_nothing() -> Result<()> {
    let cluster = three_nodes().start().await?;
    cluster.create("idle", 2, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let keyspace = cluster.keyspace("idle").await?;
    put_all(&keyspace, "k", 3_000).await?;
    println!("idle: {}", resized(&cluster.resize("idle", 3).await?));
    ensure!(missing(&keyspace, "k", 3_000).await? == 0);
    ensure!(converged(&cluster, "idle").await? == 3_000);
    cluster.settled("idle").await?;
    ensure!(converged(&cluster, "idle").await? == 3_000, "after the clean-up");

    cluster.create("busy", 2, &["--replicas", "2", "--quarantine", "1s"]).await?;
    let history = Arc::new(History::default());
    preload(&cluster.keyspace("busy").await?, &history, "s:", 10_000).await?;
    let load = Load::start(&cluster.master(), "busy", &history, LoadSpec::default()).await?;
    for shards in 3..=5 {
        println!("busy: {}", resized(&cluster.resize("busy", shards).await?));
        load.goes_on(20).await?;
    }
    let summary = load.stop().await?;
    println!("{summary:?}");
    ensure!(
        summary.refused + summary.unknown + summary.read_errors == 0,
        "clients saw errors: {summary:?}"
    );
    println!("{:?}", verify(&cluster.master(), "busy", &history).await?);
    converged(&cluster, "busy").await?;
    cluster.finish().await
}

/// #10: the primary took an older write over a newer one, the replica did not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_10_the_last_event_time_wins_everywhere() -> Result<()> {
    let cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "order").await?;
    for n in 0..50u64 {
        let key = format!("k{n}");
        keyspace.put(&*key, "newer").event_time(2_000_000 + n).await?;
        keyspace.put(&*key, "older").event_time(1_000_000 + n).await?;
        keyspace.delete(&*key).event_time(1_500_000 + n).await?;
    }
    ensure!(converged(&cluster, "order").await? == 50);
    for n in 0..50 {
        ensure!(keyspace.get(format!("k{n}")).await?.unwrap().bytes() == "newer");
    }
    cluster.finish().await
}

/// #11: a dead node could not be replaced, and the attempt blocked all later changes. (Replacement comes with
/// shipping: here the keyspace must continue, and change, without the node.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_11_a_dead_node_blocks_nothing() -> Result<()> {
    let mut cluster = three_nodes().allow("away").start().await?;
    let keyspace = two_replicas(&cluster, "dead").await?;
    put_all(&keyspace, "k", 1_000).await?;
    converged(&cluster, "dead").await?;
    cluster.kill9_node(1).await?;
    ensure!(missing(&keyspace, "k", 1_000).await? == 0);
    put_all(&keyspace, "while", 1_000).await?;
    // Counters need a primary: another replica has become primary.
    for n in 0..20 {
        ensure!(keyspace.add_i64(format!("c{n}"), 2).await? == 2);
    }
    cluster.create("other", 2, &["--replicas", "2"]).await?;
    put_all(&cluster.keyspace("other").await?, "k", 100).await?;
    cluster.start_node(1, Port::New).await?;
    ensure!(converged(&cluster, "dead").await? == 2_020);
    println!("{}", resized(&cluster.resize("dead", 4).await?));
    ensure!(missing(&keyspace, "k", 1_000).await? + missing(&keyspace, "while", 1_000).await? == 0);
    cluster.finish().await
}

/// #12: after a crash every call used the dead connection again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn original_12_a_dead_connection_is_met_once() -> Result<()> {
    let mut cluster = three_nodes().start().await?;
    let keyspace = two_replicas(&cluster, "sockets").await?;
    put_all(&keyspace, "k", 300).await?;
    for round in 0..3 {
        converged(&cluster, "sockets").await?;
        cluster.kill9_node(round).await?;
        for _ in 0..5 {
            ensure!(missing(&keyspace, "k", 300).await? == 0);
            put_all(&keyspace, "k", 300).await?;
        }
        cluster.start_node(round, Port::Same).await?;
        for _ in 0..5 {
            ensure!(missing(&keyspace, "k", 300).await? == 0);
        }
    }
    cluster.finish().await
}
