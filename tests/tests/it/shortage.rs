//! Temporary shortages: a full disk, silent peers, readers that do not read. Clients receive an
//! error that names the shortage, and no process has to be restarted.

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
use vasto_tests::{Cluster, DEADLINE, free_port};

/// A small file system; unmounted when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts the file system; an error where that is not possible.
    fn mount(dir: &Path, mib: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let size = format!("size={mib}m,nr_inodes=10000");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir).output()?;
        let why = String::from_utf8_lossy(&mounted.stderr);
        ensure!(
            mounted.status.success(),
            "no small file system can be mounted here, which takes root: {}",
            why.trim()
        );
        Ok(Self(dir.to_owned()))
    }

    /// Fills the disk except for `leave` bytes.
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

/// Returns the answer of `/readyz`: the status line and the body.
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
    let disk = SmallDisk::mount(&cluster.node_dir(0), 192)?;
    let admin = free_port();
    let node = cluster.add_node_with(&format!("node.admin_listen=127.0.0.1:{admin}")).await?;
    ensure!(node == 0);
    cluster.create("full", 1, &[]).await?;
    let keyspace = cluster.keyspace("full").await?;
    keyspace.put("before", "v").await?;
    ensure!(ready(admin).await);

    disk.fill(4 << 20)?;
    until("writes to be refused", async || put(&keyspace, "k").await == Some(ErrorKind::NoSpace))
        .await?;
    let told = keyspace.put("k", "v").await.unwrap_err();
    ensure!(told.message().contains("no space left"), "{told}");
    ensure!(keyspace.get("before").await?.is_some(), "reads go on");
    until("the node to say so", async || unready_because(admin, "almost full").await).await?;
    disk.free()?;
    until("writes to be taken again", async || put(&keyspace, "after").await.is_none()).await?;
    until("the node to be ready", async || ready(admin).await).await?;

    cluster.stop_node(0).await?;
    drop(disk);
    cluster.finish().await
}

/// Silent connections used up all descriptors; now they get a share of them, and are closed.
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
    until("silent connections to be closed", async || open().is_ok_and(|now| now < before + 30))
        .await?;
    drop(silent);
    cluster.finish().await
}

/// Returns the resident memory of a process in bytes.
fn resident(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no number")?.parse::<u64>()? << 10)
}

/// Forty connections requested 4 MiB values and read nothing: 3 GiB were used, and never released.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_read_nothing_share_one_budget_and_are_ended() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let mut cluster = Cluster::builder().nodes(1).start().await?;
    cluster.create("ks", 1, &[]).await?;
    let keyspace = cluster.keyspace("ks").await?;
    keyspace.put("large", vec![7; 4 << 20]).await?;
    let described = cluster.json(&["keyspace", "describe", "ks"]).await?;
    let number =
        |name: &str| described[name].as_u64().with_context(|| format!("no {name} in {described}"));
    let (keyspace_id, epoch) = (number("keyspace_id")?, number("epoch")?);
    let pid = cluster.node_process(0)?.pid();
    let before = resident(pid)?;
    let mut ignored = Vec::new();
    for _ in 0..40 {
        let mut client =
            DataClient::connect(format!("http://127.0.0.1:{}", cluster.port(0))).await?;
        let keys = vec![v1::KeyRef { key: "large".into(), partition_hash: None }];
        let get = Op::Get(v1::GetRequest { keys });
        let request = |id| v1::Request {
            id,
            keyspace_id,
            epoch,
            op: Some(get.clone()),
            ..v1::Request::default()
        };
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
    // A client that reads is served all the while.
    ensure!(keyspace.get("large").await?.is_some());
    drop(ignored);
    cluster.finish().await
}
