//! Many small keyspaces: the cost of hundreds of idle replicas for a node.
//!
//! The suite creates 60 keyspaces; `VASTO_TEST_KEYSPACES` sets another number (`make soak`: 300).
//! All measurements are printed; those that do not depend on the load of the machine are checked.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::{StreamExt, TryStreamExt};
use vasto_tests::{Cluster, Port, cpu_seconds, setting};

const NODES: usize = 3;
const SHARDS: usize = 4;
const IDLE: Duration = Duration::from_secs(10);

/// Returns the disk usage below a directory in MiB, counted in blocks.
fn disk_mib(dir: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            // A file may be renamed during the listing.
            let Ok(found) = entry.metadata() else { continue };
            blocks += found.blocks();
            if found.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok((blocks * 512) as f64 / f64::from(1 << 20))
}

fn threads(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?.count())
}

fn keyspaces() -> usize {
    setting("VASTO_TEST_KEYSPACES", 60)
}

async fn idle(cluster: &mut Cluster, when: &str) -> Result<()> {
    let pids = (0..NODES)
        .map(|node| Ok(cluster.node_process(node)?.pid()))
        .collect::<Result<Vec<u32>>>()?;
    // Threads that were needed temporarily end within seconds.
    let few = async || pids.iter().all(|pid| threads(*pid).unwrap() < 150).then_some(());
    vasto_tests::until("the threads to go", Duration::from_secs(60), few).await?;
    let before = pids.iter().map(|pid| cpu_seconds(*pid)).collect::<Result<Vec<f64>>>()?;
    tokio::time::sleep(IDLE).await;
    for (node, pid) in pids.iter().enumerate() {
        let (threads, disk) = (threads(*pid)?, disk_mib(&cluster.node_dir(node))?);
        let cpu = (cpu_seconds(*pid)? - before[node]) / IDLE.as_secs_f64() * 100.0;
        println!(
            "{when}, node {node}: {threads} threads, {disk:.1} MiB of disk, {cpu:.2} % of a core"
        );
        ensure!(threads < 150, "{threads} threads");
        let replicas = keyspaces() * SHARDS / NODES;
        ensure!(disk < replicas as f64 / 4.0, "{disk} MiB of disk for {replicas} empty replicas");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_replicas_take_few_threads_and_little_disk() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(NODES).start().await?;
    let names: Vec<String> = (0..keyspaces()).map(|n| format!("ks{n}")).collect();
    let create = |name: &String| {
        let (cluster, name) = (&cluster, name.clone());
        async move { cluster.create(&name, SHARDS as u32, &[]).await }
    };
    let began = Instant::now();
    futures::stream::iter(&names).map(create).buffer_unordered(4).try_collect::<()>().await?;
    println!(
        "{} keyspaces of {SHARDS} shards created in {:.1} s",
        names.len(),
        began.elapsed().as_secs_f64()
    );
    idle(&mut cluster, "new").await?;

    // After a restart all replicas serve, and become idle again.
    cluster.stop_node(0).await?;
    let began = Instant::now();
    cluster.start_node(0, Port::Same).await?;
    println!("node 0 is ready {:.2} s after its start", began.elapsed().as_secs_f64());
    let write = |name: &String| {
        let (cluster, name) = (&cluster, name.clone());
        async move {
            let keyspace = cluster.keyspace(&name).await?;
            for key in 0..8 {
                keyspace.put(format!("key{key}"), name.clone()).await?;
            }
            let value = keyspace.get("key3").await?;
            ensure!(value.is_some_and(|value| value.bytes() == name.as_bytes()));
            anyhow::Ok(())
        }
    };
    futures::stream::iter(&names).map(write).buffer_unordered(4).try_collect::<()>().await?;
    idle(&mut cluster, "written to").await?;
    cluster.finish().await
}
