//! a replica whose network was silent serves before it has caught up.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vasto_client::{Ack, Keyspace, Vasto};
use vasto_tests::netns::{Network, available};
use vasto_tests::{CatalogDir, DEADLINE, Process, Ran, until, vasto_binary};

struct Net {
    network: Network,
    dir: tempfile::TempDir,
    _master: Process,
    nodes: Vec<(Process, Value)>,
    master: String,
    catalog: CatalogDir,
}

async fn server(
    network: &Network,
    host: Option<usize>,
    dir: &std::path::Path,
    args: &[&str],
) -> Result<(Process, Value)> {
    let name = host.map_or("master".to_owned(), |host| format!("node-{host}"));
    let namespace = host.map(|host| network.namespace(host));
    let binary = vasto_binary().display().to_string();
    let (program, mut all) = match &namespace {
        None => (binary.as_str(), Vec::new()),
        Some(namespace) => ("ip", vec!["netns", "exec", namespace, &binary]),
    };
    all.extend(args);
    let mut process = Process::spawn(&name, std::path::Path::new(program), all, &[], dir)?;
    let ready = process.ready_line(DEADLINE).await?;
    Ok((process, ready))
}

impl Net {
    async fn start(replicas: u32) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("bucket"))?;
        let network = Network::new(3)?;
        let bucket = format!("file://{}", dir.path().join("bucket").display());
        let listen = format!("{}:8278", network.address(None));
        let master = format!("http://{listen}");
        let args = ["serve", "master", "--bucket", &bucket, "--listen", &listen, "--insecure"];
        let (process, _) = server(&network, None, dir.path(), &args).await?;
        let mut nodes = Vec::new();
        for host in 0..3 {
            let (listen, data) =
                (format!("{}:7000", network.address(Some(host))), dir.path().join(format!("data-{host}")));
            let data = data.display().to_string();
            let args = ["serve", "node", "--master", &master, "--dir", &data, "--listen", &listen, "--insecure"];
            nodes.push(server(&network, Some(host), dir.path(), &args).await?);
        }
        let env = [("VASTO_MASTER".to_owned(), master.clone())];
        let replicas = replicas.to_string();
        let create = ["keyspace", "create", "split", "--shards", "1", "--replicas", &replicas, "--output", "json"];
        let created = Ran::of(&create, &env, DEADLINE).await?;
        ensure!(created.code == 0, "{created:?}");
        let catalog = CatalogDir::new(&dir.path().join("bucket"), 1);
        Ok(Self { network, dir, _master: process, nodes, master, catalog })
    }

    async fn keyspace(&self) -> Result<Keyspace> {
        Ok(Vasto::connect(&self.master).await?.keyspace("split").await?)
    }

    /// Hosts in the order of preference.
    fn hosts(&self) -> Result<Vec<usize>> {
        let tip = self.catalog.tip()?;
        tip.placement[0]
            .primary_first()
            .iter()
            .map(|one| {
                let id = one.node.to_string();
                self.nodes.iter().position(|(_, ready)| ready["node_id"] == id.as_str()).context("no such node")
            })
            .collect()
    }

    async fn home(&self) -> Result<()> {
        until("home and all serving", DEADLINE, async || {
            let tip = self.catalog.tip().ok()?;
            let home = tip.placement[0].primary.is_none() && tip.placement[0].handing_to.is_none();
            let env = [("VASTO_MASTER".to_owned(), self.master.clone())];
            let described =
                Ran::of(&["keyspace", "describe", "split", "--output", "json"], &env, DEADLINE).await.ok()?;
            let described: Value = serde_json::from_str(&described.stdout).ok()?;
            let replicas = described["placement"][0]["replicas"].as_array()?.clone();
            (home && replicas.iter().all(|one| one["state"] == "serving")).then_some(())
        })
        .await
    }

    async fn end(self) -> Result<()> {
        if std::env::var_os("REV_LOGS").is_some() {
            for host in 0..3 {
                let log = std::fs::read_to_string(self.dir.path().join(format!("node-{host}.log")))?;
                println!("--- node-{host}\n{}", log.lines().rev().take(60).collect::<Vec<_>>().join("\n"));
            }
        }
        for (mut process, _) in self.nodes {
            process.signal(Signal::KILL);
            process.ended(DEADLINE).await?;
        }
        Ok(())
    }
}

fn text(value: Option<vasto_client::Value>) -> String {
    value.map_or("(none)".into(), |value| value.to_string())
}

/// One client, one key. It puts v1, the primary's network is silent for a while, it puts v2 (acknowledged
/// by a second replica), the network is whole again: what does the very same client read?
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_own_acknowledged_write_is_read_back() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let net = Net::start(3).await?;
    let mut stale_total = 0;
    for (round, cut_ms) in [1_700u64, 2_200, 2_800, 3_400, 4_000, 4_600].into_iter().enumerate() {
        net.home().await?;
        let version = net.catalog.tip()?.version;
        let primary = net.hosts()?[0];
        let keyspace = net.keyspace().await?;
        keyspace.put("k", format!("{round}:v1")).await?;
        ensure!(text(keyspace.get("k").await?) == format!("{round}:v1"));
        net.network.cut(primary)?;
        let cut = Instant::now();
        keyspace.put("k", format!("{round}:v2")).ack(Ack::Replica).await?;
        let acked = cut.elapsed();
        ensure!(text(keyspace.get("k").await?) == format!("{round}:v2"), "before the heal");
        tokio::time::sleep(Duration::from_millis(cut_ms).saturating_sub(cut.elapsed())).await;
        net.network.heal(primary)?;
        let healed = Instant::now();
        let (mut stale, mut first, mut last) = (0u32, None, Duration::ZERO);
        while healed.elapsed() < Duration::from_secs(8) {
            let read = text(keyspace.get("k").await?);
            if read != format!("{round}:v2") {
                stale += 1;
                first.get_or_insert((healed.elapsed(), read));
                last = healed.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let unchanged = net.catalog.tip()?.version == version;
        println!(
            "cut {cut_ms} ms: v2 acknowledged by `replica` after {acked:?}; stale reads after the heal: {stale}, first {first:?}, last at {last:?}; catalog unchanged: {unchanged}"
        );
        stale_total += stale;
    }
    net.end().await?;
    ensure!(stale_total == 0, "the client did not see its own acknowledged write {stale_total} times");
    Ok(())
}

/// The same, and then a conditional put on the version that was read before the cut, and an increment of
/// a counter that was deleted meanwhile, both with acknowledgement by a second replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_conditions_hold_on_what_was_acknowledged() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let net = Net::start(3).await?;
    let mut wrong = Vec::new();
    for (round, cut_ms) in [2_200u64, 2_800].into_iter().enumerate() {
        net.home().await?;
        let version = net.catalog.tip()?.version;
        let primary = net.hosts()?[0];
        let keyspace = net.keyspace().await?;
        let (k, c) = (format!("k{round}"), format!("c{round}"));
        keyspace.put(k.as_str(), "v1").await?;
        keyspace.add_i64(c.as_str(), 5).await?;
        let v1 = keyspace.get(k.as_str()).await?.unwrap();
        net.network.cut(primary)?;
        let cut = Instant::now();
        keyspace.put(k.as_str(), "v2").ack(Ack::Replica).await?;
        keyspace.delete(c.as_str()).ack(Ack::Replica).await?;
        tokio::time::sleep(Duration::from_millis(cut_ms).saturating_sub(cut.elapsed())).await;
        net.network.heal(primary)?;
        let swapped = keyspace.put(k.as_str(), "v3").if_version(v1.version).ack(Ack::Replica).await;
        let counted = keyspace.add_i64(c.as_str(), 1).ack(Ack::Replica).await;
        let unchanged = net.catalog.tip()?.version == version;
        tokio::time::sleep(Duration::from_secs(8)).await;
        let (k_now, c_now) = (text(keyspace.get(k.as_str()).await?), text(keyspace.get(c.as_str()).await?));
        println!(
            "cut {cut_ms} ms: if_version(v1) after v2 was acknowledged: {swapped:?}, add_i64(1) after the delete was acknowledged: {counted:?}; at the end k = {k_now}, c = {c_now}; catalog unchanged: {unchanged}"
        );
        if k_now != "v2" {
            wrong.push(format!("{k} = {k_now}"));
        }
        if c_now != "1" && c_now != "(none)" {
            wrong.push(format!("{c} = {c_now}"));
        }
    }
    net.end().await?;
    ensure!(wrong.is_empty(), "acknowledged by two replicas and gone: {wrong:?}");
    Ok(())
}

/// The next replica in the order of preference was cut off while the primary and the third one took writes
/// with `replica`; its network comes back and the primary dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rev_who_follows_a_dead_primary_has_what_two_replicas_acknowledged() -> Result<()> {
    if !available() {
        return Ok(());
    }
    let mut wrong = Vec::new();
    for cut_ms in [2_200u64, 3_400, 4_600, 8_000] {
        let mut net = Net::start(3).await?;
        net.home().await?;
        let hosts = net.hosts()?;
        let (primary, next) = (hosts[0], hosts[1]);
        let keyspace = net.keyspace().await?;
        keyspace.put("k", "v1").await?;
        keyspace.add_i64("c", 1).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        net.network.cut(next)?;
        let cut = Instant::now();
        keyspace.put("k", "v2").ack(Ack::Replica).await?;
        for _ in 0..9 {
            keyspace.add_i64("c", 1).ack(Ack::Replica).await?;
        }
        tokio::time::sleep(Duration::from_millis(cut_ms).saturating_sub(cut.elapsed())).await;
        net.network.heal(next)?;
        net.nodes[primary].0.signal(Signal::KILL);
        let healed = Instant::now();
        let (mut stale, mut last) = (0, Duration::ZERO);
        let counted = keyspace.add_i64("c", 1).ack(Ack::Replica).await;
        let counted_at = healed.elapsed();
        while healed.elapsed() < Duration::from_secs(8) {
            if text(keyspace.get("k").await?) != "v2" {
                stale += 1;
                last = healed.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let c_now = text(keyspace.get("c").await?);
        println!(
            "cut {cut_ms} ms: stale reads of a `replica` write: {stale}, last at {last:?}; the 11th increment {counted:?} after {counted_at:?}; c = {c_now}"
        );
        if stale > 0 || c_now != "11" {
            wrong.push(format!("{cut_ms}: {stale} stale, c = {c_now}"));
        }
        net.end().await?;
    }
    ensure!(wrong.is_empty(), "{wrong:?}");
    Ok(())
}
