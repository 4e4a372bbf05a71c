//! Shortages that pass: a disk that is full for a while, descriptors that run out for a while. Whoever asks is told
//! so, and nothing has to be restarted.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vasto_client::{ErrorKind, Keyspace};
use vasto_proto::v1;
use vasto_proto::v1::data_client::DataClient;
use vasto_proto::v1::request::Op;
use vasto_tests::{Cluster, DEADLINE, Port, free_port};

/// A small file system; unmounted when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, and the reason printed, where nothing can be mounted.
    fn mount(dir: &Path, mib: u64) -> Result<Option<Self>> {
        std::fs::create_dir_all(dir)?;
        let size = format!("size={mib}m,nr_inodes=10000");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir).output()?;
        if !mounted.status.success() {
            println!("skipped: nothing can be mounted here: {}", String::from_utf8_lossy(&mounted.stderr).trim());
            return Ok(None);
        }
        Ok(Some(Self(dir.to_owned())))
    }

    /// Takes all room but so much.
    fn fill(&self, leave: u64) -> Result<()> {
        let free = free_bytes(&self.0)?;
        let file = std::fs::File::create(self.0.join("filler"))?;
        let taken = Command::new("fallocate")
            .args(["-l", &free.saturating_sub(leave).to_string()])
            .arg(self.0.join("filler"))
            .status()?;
        ensure!(taken.success(), "the disk could not be filled");
        drop(file);
        Ok(())
    }

    fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.0.join("filler"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn free_bytes(dir: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail * found.f_frsize)
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) -> Result<()> {
    vasto_tests::until(what, DEADLINE, async || condition().await.then_some(())).await
}

/// What `/readyz` answers: the status line and the body.
async fn readyz(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn ready(port: u16) -> bool {
    readyz(port).await.is_ok_and(|answer| answer.contains("200 OK"))
}

async fn unready_because(port: u16, why: &str) -> bool {
    readyz(port).await.is_ok_and(|answer| answer.contains("503") && answer.contains(why))
}

async fn put(keyspace: &Keyspace, key: &str) -> Option<ErrorKind> {
    keyspace.put(key, "v").await.err().map(|error| error.kind())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_passes_by_itself() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(0)
        .set("node.write_buffer=4MiB")
        .allow("the disk is almost full")
        .allow("No space left on device")
        .allow("no space left")
        .start()
        .await?;
    let Some(disk) = SmallDisk::mount(&cluster.node_dir(0), 192)? else { return cluster.finish().await };
    let admin = free_port();
    let node = cluster.add_node_with(&format!("node.admin_listen=127.0.0.1:{admin}")).await?;
    ensure!(node == 0);
    cluster.create("full", 1, &[]).await?;
    let keyspace = cluster.keyspace("full").await?;
    keyspace.put("before", "v").await?;
    ensure!(ready(admin).await);

    disk.fill(4 << 20)?;
    until("writes to be refused", async || put(&keyspace, "k").await == Some(ErrorKind::NoSpace)).await?;
    let told = keyspace.put("k", "v").await.unwrap_err();
    ensure!(told.message().contains("no space left"), "{told}");
    ensure!(keyspace.get("before").await?.is_some(), "reads go on");
    until("the node to say so", async || unready_because(admin, "almost full").await).await?;
    disk.free()?;
    until("writes to be taken again", async || put(&keyspace, "after").await.is_none()).await?;
    until("the node to be ready", async || ready(admin).await).await?;

    // One that starts while nothing at all is left opens its replica once there is room.
    cluster.kill9_node(0).await?;
    disk.fill(0)?;
    cluster.start_node(0, Port::Same).await?;
    until("the replica to fail to open", async || unready_because(admin, "No space left").await).await?;
    let began = std::time::Instant::now();
    let told = keyspace.get("before").await.unwrap_err();
    ensure!(told.kind() == ErrorKind::NoSpace && told.message().contains("No space left"), "{:?} {told}", told.kind());
    ensure!(began.elapsed().as_secs() < 5, "at once, not at the deadline: {:?}", began.elapsed());
    disk.free()?;
    until("the replica to open by itself", async || keyspace.get("after").await.is_ok_and(|found| found.is_some()))
        .await?;
    until("the node to be ready", async || ready(admin).await).await?;
    ensure!(put(&keyspace, "last").await.is_none());
    cluster.stop_node(0).await?;
    drop(disk);
    cluster.finish().await
}

/// Sets the limit of open files of a running process.
fn limit_files(pid: u32, files: u64) -> Result<()> {
    let set = Command::new("prlimit").arg(format!("--nofile={files}")).arg("--pid").arg(pid.to_string()).status()?;
    ensure!(set.success(), "the limit could not be set");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_run_out_for_a_while_stop_nothing_for_good() -> Result<()> {
    let mut cluster = Cluster::builder()
        .nodes(0)
        .allow("Too many open files")
        .allow("cannot reach")
        .allow("could not be obeyed")
        .start()
        .await?;
    let admin = free_port();
    cluster.add_node_with(&format!("node.admin_listen=127.0.0.1:{admin}")).await?;
    cluster.create("first", 1, &[]).await?;
    let first = cluster.keyspace("first").await?;
    first.put("k", "v").await?;
    let pid = cluster.node_process(0)?.pid();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
    limit_files(pid, open + 8)?;
    // It needs more than that.
    let late = cluster.vasto(&["keyspace", "create", "second"]).await?;
    ensure!(late.code != 0 || late.stdout.contains("created"), "{late:?}");
    until("the replica to fail to open", async || {
        let status = cluster.vasto(&["cluster", "status"]).await;
        status.is_ok_and(|status| status.stdout.contains("Too many open files"))
    })
    .await?;
    ensure!(first.get("k").await?.is_some(), "what is open serves");
    limit_files(pid, 4_096)?;
    until("the replica to open by itself", async || match cluster.keyspace("second").await {
        Ok(second) => second.put("k", "v").await.is_ok(),
        Err(_) => false,
    })
    .await?;
    until("the node to be ready", async || ready(admin).await).await?;
    cluster.finish().await
}

/// Peers that connect and say nothing used up all descriptors; they get a share, and are closed.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_do_not_use_a_node_up() -> Result<()> {
    let mut cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 1, &[]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    keyspace.put("k", "v").await?;
    let (pid, port) = (cluster.node_process(0)?.pid(), cluster.port(0));
    let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
    let before = open()?;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(("127.0.0.1", port)).await?);
    }
    keyspace.put("k", "w").await?;
    until("silent connections to be closed", async || open().is_ok_and(|now| now < before + 30)).await?;
    drop(silent);
    cluster.finish().await
}

/// Resident memory of a process, bytes.
fn resident(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse::<u64>()? << 10)
}

/// Forty connections asked for 4 MiB values and read nothing: 3 GiB, and never given back.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_share_one_budget_and_are_ended() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let mut cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 1, &[]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    keyspace.put("large", vec![7; 4 << 20]).await?;
    let described = cluster.json(&["keyspace", "describe", "ks"]).await?;
    let number = |name: &str| described[name].as_u64().with_context(|| format!("no {name} in {described}"));
    let (keyspace_id, epoch) = (number("keyspace_id")?, number("epoch")?);
    let pid = cluster.node_process(0)?.pid();
    let before = resident(pid)?;
    let mut ignored = Vec::new();
    for _ in 0..40 {
        let mut client = DataClient::connect(format!("http://127.0.0.1:{}", cluster.port(0))).await?;
        let keys = vec![v1::KeyRef { key: "large".into(), partition_hash: None }];
        let get = Op::Get(v1::GetRequest { keys });
        let request = |id| v1::Request { id, keyspace_id, epoch, op: Some(get.clone()), ..v1::Request::default() };
        let frame = v1::RequestFrame { requests: (1..=16).map(request).collect(), sent_us: 0 };
        let frames = futures::stream::iter([frame]).chain(futures::stream::pending());
        ignored.push(client.stream(frames).await?);
    }
    let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
    let (connected, mut most) = (open()?, 0);
    until("those that hold the memory to be ended", async || {
        most = most.max(resident(pid).unwrap_or_default());
        open().is_ok_and(|now| now + 10 < connected)
    })
    .await?;
    ensure!(most < before + 900 * MIB, "{} MiB after {} MiB", most / MIB, before / MIB);
    // Whoever reads is served all the while.
    ensure!(keyspace.get("large").await?.is_some());
    drop(ignored);
    cluster.finish().await
}
