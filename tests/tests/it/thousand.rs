//! The master at scale: keyspaces of 4 shards with 3 replicas on 20 nodes, of which one is lost for
//! good. The master and its bucket are real; the nodes are a crowd without data, which speaks the
//! protocol of nodes.
//!
//! The suite creates 50 keyspaces; `VASTO_TEST_THOUSAND` sets another number (`make soak`: 1,000). All
//! measurements are printed; the times are judged at the full size only, with room for a busy machine.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use tonic::transport::Channel;
use vasto_core::catalog::{Catalog, OPERATIONS_KEPT, REMOVED_KEPT};
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
use vasto_core::limits::{COPIES_PER_NODE_MAX, MESSAGE_BYTES_MAX};
use vasto_proto::v1;
use vasto_proto::v1::master_client::MasterClient;
use vasto_tests::{Cluster, Crowd, DEADLINE, Port, Traffic, cpu_seconds, setting, until};

const NODES: usize = 20;
const SHARDS: u32 = 4;
const REPLICAS: u32 = 3;
/// The node that is lost.
const LOST: usize = 7;
/// Keyspaces that are deleted in the end.
const DELETED: usize = 5;
/// Bytes of the longest catalog version: what a keyspace remembers is bounded.
const CATALOG_BYTES_MAX: usize = 32 << 10;
/// The most warnings of a status, however much has been lost.
const WARNINGS_MAX: usize = 100;

fn keyspaces() -> usize {
    setting("VASTO_TEST_THOUSAND", 50)
}

fn is_full() -> bool {
    keyspaces() >= 1_000
}

/// Returns the memory that a process holds, MB.
fn memory_mb(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1_000.0)
}

/// What the master has used and sent by some moment.
struct Meter {
    pid: u32,
    at: Instant,
    cpu: f64,
    traffic: Traffic,
}

impl Meter {
    fn start(pid: u32, crowd: &Crowd) -> Result<Self> {
        let (at, cpu, traffic) = (Instant::now(), cpu_seconds(pid)?, crowd.traffic());
        Ok(Self { pid, at, cpu, traffic })
    }

    /// Prints what was used since the last time; returns the part of a core.
    fn lap(&mut self, what: &str, crowd: &Crowd) -> Result<f64> {
        let now = Self::start(self.pid, crowd)?;
        let seconds = now.at.duration_since(self.at).as_secs_f64();
        let part = (now.cpu - self.cpu) / seconds;
        let mb = |now: u64, before: u64| now.saturating_sub(before) as f64 / 1e6;
        println!(
            "{what}: {seconds:.1} s, {:.1} % of a core, {} versions ({:.1} MB) sent, {:.1} MB reported, {:.0} MB of \
             memory",
            part * 100.0,
            now.traffic.versions.saturating_sub(self.traffic.versions),
            mb(now.traffic.received, self.traffic.received),
            mb(now.traffic.sent, self.traffic.sent),
            memory_mb(self.pid)?,
        );
        *self = now;
        Ok(part)
    }
}

/// How long calls of `cluster status` took.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    /// Asks once; returns the document.
    async fn ask(&mut self, client: &MasterClient<Channel>) -> Result<Value> {
        let began = Instant::now();
        let reply = client.clone().cluster_status(v1::Empty {}).await?.into_inner();
        self.0.push(began.elapsed());
        Ok(serde_json::from_str(&reply.json)?)
    }

    /// Prints the times; returns the median.
    fn told(&self, when: &str) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        let longest = sorted.last().copied().unwrap_or_default();
        println!("cluster status {when}: {median:?} median, {longest:?} at most");
        median
    }
}

async fn connect(master: &str) -> Result<MasterClient<Channel>> {
    let client = MasterClient::connect(master.to_owned()).await?;
    Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX))
}

async fn create_all(client: &MasterClient<Channel>) -> Result<()> {
    let create = |n: usize| {
        let mut client = client.clone();
        async move {
            let request = v1::CreateKeyspaceRequest {
                name: format!("ks{n}"),
                shards: SHARDS,
                replicas: REPLICAS,
                ..v1::CreateKeyspaceRequest::default()
            };
            client.create_keyspace(request).await.with_context(|| format!("ks{n}"))?;
            anyhow::Ok(())
        }
    };
    let all = futures::stream::iter(0..keyspaces()).map(create);
    all.buffer_unordered(16).try_collect::<()>().await
}

/// Returns how many replicas are placed on each node, by what the first node knows.
fn placed(crowd: &Crowd) -> BTreeMap<NodeId, usize> {
    let mut placed: BTreeMap<NodeId, usize> = BTreeMap::new();
    for catalog in crowd.catalogs(0) {
        for member in catalog.placement.iter().flat_map(|shard| &shard.replicas) {
            *placed.entry(member.node).or_default() += 1;
        }
    }
    placed
}

/// Returns true when a keyspace has all its replicas, none on this node, and nothing runs.
fn is_whole(catalog: &Catalog, without: NodeId) -> bool {
    let whole = catalog.placement.iter().all(|shard| {
        shard.replicas.len() == REPLICAS as usize
            && shard.replicas.iter().all(|member| member.node != without)
    });
    whole && catalog.plans().next().is_none()
}

/// Waits until every keyspace is repaired; asks for the status meanwhile.
async fn repaired(
    crowd: &Crowd,
    lost: NodeId,
    client: &MasterClient<Channel>,
    times: &mut Times,
) -> Result<()> {
    let (began, limit) = (Instant::now(), Duration::from_secs(if is_full() { 900 } else { 60 }));
    loop {
        let left = crowd.catalogs(0).iter().filter(|catalog| !is_whole(catalog, lost)).count();
        if left == 0 {
            return Ok(());
        }
        ensure!(began.elapsed() < limit, "{left} keyspaces are not repaired after {limit:?}");
        let status = times.ask(client).await?;
        let warnings = status["warnings"].as_array().context("no warnings")?.len();
        ensure!(warnings <= WARNINGS_MAX, "{warnings} warnings");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Checks that no node got more copies at a time than it may make, and none many more than the others.
fn no_herd(crowd: &Crowd, before: &BTreeMap<NodeId, usize>) -> Result<()> {
    let after = placed(crowd);
    let others = (0..crowd.nodes()).filter(|index| *index != LOST);
    let gained: Vec<usize> = others
        .clone()
        .map(|index| {
            let of = |placed: &BTreeMap<NodeId, usize>| {
                placed.get(&crowd.node_id(index)).copied().unwrap_or_default()
            };
            of(&after).saturating_sub(of(before))
        })
        .collect();
    let most: Vec<usize> = others.map(|index| crowd.most_copies(index)).collect();
    println!("replicas that each node got: {gained:?}; at the same time: {most:?}");
    // A node may learn that a copy has begun before it learns that an earlier one has ended: versions
    // of keyspaces that have changed again meanwhile come later.
    ensure!(most.iter().all(|most| *most <= 2 * COPIES_PER_NODE_MAX), "a herd: {most:?}");
    let mean = gained.iter().sum::<usize>() / gained.len().max(1);
    let bound = 2 * mean + COPIES_PER_NODE_MAX;
    ensure!(gained.iter().all(|gained| *gained <= bound), "above {bound}: {gained:?}");
    Ok(())
}

fn bounded(crowd: &Crowd) -> Result<()> {
    for catalog in crowd.catalogs(0) {
        let bytes = serde_json::to_string(&*catalog)?.len();
        let (operations, removed) = (catalog.operations.len(), catalog.removed.len());
        ensure!(
            bytes <= CATALOG_BYTES_MAX && operations <= OPERATIONS_KEPT && removed <= REMOVED_KEPT,
            "{}: {bytes} bytes, {operations} operations, {removed} removed",
            catalog.name
        );
    }
    Ok(())
}

fn is_drained(catalog: &Catalog) -> bool {
    catalog.draining.is_empty() && catalog.draining_nodes.is_empty()
}

/// Gives up what the lost node alone held: afterwards its replicas are removed for good, and it has
/// none of them once it is back.
async fn given_up(
    crowd: &mut Crowd,
    had: &BTreeSet<(KeyspaceId, ReplicaId)>,
    client: &MasterClient<Channel>,
) -> Result<()> {
    let request = v1::EmptyNodeRequest {
        node_id: crowd.node_id(LOST).to_string(),
        replace: true,
        accept_loss: true,
        ..v1::EmptyNodeRequest::default()
    };
    client.clone().empty_node(request).await?;
    until("nothing to be drained", Duration::from_secs(120), async || {
        crowd.catalogs(0).iter().all(|catalog| is_drained(catalog)).then_some(())
    })
    .await?;
    let removed: BTreeMap<KeyspaceId, _> =
        crowd.catalogs(0).into_iter().map(|catalog| (catalog.keyspace, catalog)).collect();
    for (keyspace, replica) in had {
        ensure!(removed[keyspace].is_removed(*replica), "{keyspace}/{replica} may come back");
    }
    bounded(crowd)?;
    crowd.come_back(LOST).await?;
    until("the node that is back to have nothing", DEADLINE, async || {
        crowd.replicas(LOST).is_disjoint(had).then_some(())
    })
    .await
}

/// Deletes some keyspaces: their replicas go from all nodes.
async fn deleted(crowd: &Crowd, client: &MasterClient<Channel>) -> Result<()> {
    let names: Vec<String> = (0..DELETED).map(|n| format!("ks{n}")).collect();
    let known = crowd.catalogs(0).into_iter().filter(|catalog| names.contains(&catalog.name));
    let gone: BTreeSet<KeyspaceId> = known.map(|catalog| catalog.keyspace).collect();
    ensure!(gone.len() == DELETED, "the keyspaces to delete are {gone:?}");
    for name in names {
        client.clone().delete_keyspace(v1::KeyspaceRequest { name }).await?;
    }
    until("the replicas of deleted keyspaces to go", DEADLINE, async || {
        let has = |index: usize| crowd.replicas(index).iter().any(|(id, _)| gone.contains(id));
        (!(0..NODES).any(has)).then_some(())
    })
    .await
}

/// Restarts the master; returns when every node is back.
async fn restarted(cluster: &mut Cluster) -> Result<()> {
    cluster.stop_master().await?;
    let began = Instant::now();
    cluster.start_master(Port::Same).await?;
    println!("a restarted master is ready after {:?}", began.elapsed());
    let client = connect(&cluster.master()).await?;
    let mut times = Times::default();
    until("all nodes to be back", DEADLINE, async || {
        let status = times.ask(&client).await.ok()?;
        let live = status["nodes"].as_array()?.iter().filter(|node| node["state"] == "live");
        let whole = status["warnings"].as_array()?.is_empty();
        (live.count() == NODES && whole).then_some(())
    })
    .await?;
    println!("all nodes have reported to it after {:?}", began.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_node_of_twenty_is_replaced_without_a_herd_and_nothing_grows() -> Result<()> {
    let silence = if is_full() { "10s" } else { "5s" };
    let mut cluster = Cluster::builder()
        .nodes(0)
        .env("VASTO_MASTER__NODE_SILENCE", silence)
        .env("VASTO_MASTER__REPLACE_AFTER", "1s")
        .start()
        .await?;
    let pid = cluster.master_process()?.pid();
    let copy_takes = Duration::from_millis(if is_full() { 3_000 } else { 300 });
    let calm = Duration::from_secs(if is_full() { 10 } else { 2 });
    let mut crowd = Crowd::join(&cluster.master(), NODES, copy_takes).await?;
    let client = connect(&cluster.master()).await?;

    let mut meter = Meter::start(pid, &crowd)?;
    create_all(&client).await?;
    meter.lap(&format!("creating {} keyspaces", keyspaces()), &crowd)?;
    tokio::time::sleep(calm).await;
    let idle = meter.lap("in the calm", &crowd)?;
    let mut times = Times::default();
    for _ in 0..20 {
        times.ask(&client).await?;
    }
    let in_the_calm = times.told("in the calm");

    let (before, had, lost) = (placed(&crowd), crowd.replicas(LOST), crowd.node_id(LOST));
    ensure!(!had.is_empty(), "the node that is to be lost has nothing");
    meter.lap("asking for the status", &crowd)?;
    let began = Instant::now();
    crowd.lose(LOST);
    let mut times = Times::default();
    repaired(&crowd, lost, &client, &mut times).await?;
    println!("{} replicas are replaced {:?} after the loss", had.len(), began.elapsed());
    let repair = meter.lap("the loss and the repair", &crowd)?;
    let in_the_repair = times.told("meanwhile");
    no_herd(&crowd, &before)?;
    bounded(&crowd)?;
    tokio::time::sleep(calm).await;
    let after = meter.lap("in the calm after it", &crowd)?;
    if is_full() {
        for (what, part, most) in
            [("calm", idle, 0.1), ("repair", repair, 0.6), ("calm after it", after, 0.1)]
        {
            ensure!(part < most, "{what}: {:.1} % of a core", part * 100.0);
        }
        for median in [in_the_calm, in_the_repair] {
            ensure!(median < Duration::from_millis(500), "a status takes {median:?}");
        }
    }

    given_up(&mut crowd, &had, &client).await?;
    deleted(&crowd, &client).await?;
    meter.lap("giving up what is lost, and the deletes", &crowd)?;
    restarted(&mut cluster).await?;
    drop(crowd);
    cluster.finish().await
}
