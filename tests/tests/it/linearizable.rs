//! Whatever happens to the servers, except for a cut between replicas that clients reach on both
//! sides: each read at the primary sees every write that was acknowledged before it, and
//! conditional writes and counters build on it. Histories of single keys are checked for
//! linearizability.
//!
//! Each test runs rounds for `VASTO_LINEAR_SECONDS` (20 s) in all. A round has its own keys and one
//! event, drawn from the seed that is printed; `VASTO_LINEAR_SEED` repeats the rounds of a seed
//! (the same events, but not the same interleaving with the operations). `VASTO_LINEAR_EVENT`
//! restricts the events to one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tokio::task::JoinSet;
use vasto_client::{Ack, Keyspace, Vasto};
use vasto_tests::linear::{Judge, Judgement, Workload};
use vasto_tests::{CatalogDir, Cluster, DEADLINE, Hosts, Numbers, Port, setting, until};

const KEYSPACE: &str = "linear";
/// Clients, each with its own connections, and the operations that each has in flight.
const CLIENTS: u32 = 3;
const TASKS: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happens {
    Nothing,
    /// SIGSTOP and SIGCONT, too short for a failover.
    ShortPause,
    /// SIGSTOP and SIGCONT.
    Pause,
    Kill,
    /// SIGTERM and a restart.
    Stop,
    MasterKill,
    MasterPause,
    /// A node is cut off from all others.
    Isolation,
}

impl Happens {
    fn takes_a_node_away(self) -> bool {
        matches!(self, Self::Pause | Self::Kill | Self::Isolation)
    }
}

fn seconds() -> Duration {
    Duration::from_secs(setting("VASTO_LINEAR_SECONDS", 20))
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    setting(
        "VASTO_LINEAR_SEED",
        std::collections::hash_map::RandomState::new().build_hasher().finish(),
    )
}

fn named_event(events: &[Happens]) -> Vec<Happens> {
    let only = setting("VASTO_LINEAR_EVENT", String::new());
    events.iter().copied().filter(|event| only.is_empty() || format!("{event:?}") == only).collect()
}

/// Results of all rounds of a test.
#[derive(Debug, Default)]
struct Tally {
    rounds: u64,
    operations: u64,
    keys: u64,
    too_long: u64,
    /// Rounds by event, and their keys that no order explains.
    by_event: BTreeMap<Happens, (u64, u64)>,
    violations: Vec<String>,
}

impl Tally {
    fn judge(&mut self, event: Happens, workload: &Workload) {
        self.rounds += 1;
        let of_event = self.by_event.entry(event).or_default();
        of_event.0 += 1;
        let judge = Judge { dirty: event.takes_a_node_away() };
        for (key, entries) in workload.recorder.take() {
            self.keys += 1;
            self.operations += entries.len() as u64;
            match judge.judge(&entries) {
                Judgement::Explained => {}
                Judgement::TooLong => self.too_long += 1,
                Judgement::Violated(shown) => {
                    of_event.1 += 1;
                    self.violations.push(format!("{event:?}, key {key}:\n{shown}"));
                }
            }
        }
    }

    /// Prints the results, and fails on any violation.
    fn end(self, what: &str, seed: u64) -> Result<()> {
        let Self { rounds, operations, keys, too_long, by_event, violations } = self;
        println!(
            "{what}, VASTO_LINEAR_SEED={seed}: {rounds} rounds, {operations} operations on {keys} keys, \
             {too_long} not decided; (rounds, violations) by event: {by_event:?}"
        );
        for one in violations.iter().take(3) {
            println!("{one}");
        }
        ensure!(
            violations.is_empty(),
            "{} histories that no order explains, seed {seed}",
            violations.len()
        );
        ensure!(operations > 100 && too_long * 5 <= keys, "too little was decided");
        Ok(())
    }
}

/// Runs clients during `during` and a little longer; then reads every key once more.
async fn round<T>(
    clients: &[Keyspace],
    workload: &Arc<Workload>,
    numbers: &mut Numbers,
    lead: Duration,
    during: impl Future<Output = Result<T>>,
) -> Result<T> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for client in 0..CLIENTS * TASKS {
        let (keyspace, workload, stop) =
            (clients[(client / TASKS) as usize].clone(), workload.clone(), stop.clone());
        let mut numbers = Numbers::new(numbers.draw());
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                workload.act(client, &keyspace, &mut numbers).await;
                // Few operations per key keep the search for an order short.
                tokio::time::sleep(Duration::from_millis(2 + numbers.below(18))).await;
            }
        });
    }
    // The lead time before the event and the time after it set the size of the round.
    tokio::time::sleep(lead).await;
    let done = during.await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended?;
    }
    for (client, keyspace) in clients.iter().enumerate() {
        for key in &workload.keys {
            workload.get(100 + client as u32, keyspace, key).await;
        }
    }
    done
}

fn workload(round: u64, ack: Ack) -> Arc<Workload> {
    Arc::new(Workload::new(
        vec![format!("r{round}a"), format!("r{round}b"), format!("r{round}c")],
        ack,
    ))
}

fn impatient(keyspace: Keyspace) -> Keyspace {
    keyspace.with_deadline(Duration::from_secs(4))
}

/// Returns whether all replicas serve and the preferred primaries are primary.
fn is_whole(catalog: &CatalogDir, described: &Value) -> bool {
    let home = catalog.tip().is_ok_and(|tip| {
        tip.placement.iter().all(|shard| shard.primary.is_none() && shard.transferring_to.is_none())
    });
    let serving = |shard: &Value| {
        shard["replicas"]
            .as_array()
            .is_some_and(|all| all.iter().all(|one| one["state"] == "serving"))
    };
    home && described["placement"].as_array().is_some_and(|shards| shards.iter().all(serving))
}

// ---------------------------------------------------------------------------- processes on
// loopback

async fn whole(cluster: &Cluster, catalog: &CatalogDir) -> Result<()> {
    until("all replicas to serve, with the primary at home", DEADLINE, async || {
        let described = cluster.json(&["keyspace", "describe", KEYSPACE]).await.ok()?;
        is_whole(catalog, &described).then_some(())
    })
    .await
}

async fn clients_of(cluster: &Cluster) -> Result<Vec<Keyspace>> {
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(impatient(cluster.keyspace(KEYSPACE).await?));
    }
    Ok(clients)
}

fn home_of(cluster: &Cluster, catalog: &CatalogDir) -> Result<usize> {
    let tip = catalog.tip()?;
    cluster.node_of(&tip.placement[0].primary().context("no primary")?.node.to_string())
}

async fn happen(cluster: &mut Cluster, node: usize, event: Happens, lasts: Duration) -> Result<()> {
    match event {
        Happens::Nothing => tokio::time::sleep(lasts).await,
        Happens::ShortPause | Happens::Pause => {
            cluster.node_process(node)?.signal(Signal::STOP);
            tokio::time::sleep(lasts).await;
            cluster.node_process(node)?.signal(Signal::CONT);
        }
        Happens::Kill => {
            cluster.kill9_node(node).await?;
            tokio::time::sleep(lasts).await;
            cluster.start_node(node, Port::Same).await?;
        }
        Happens::Stop => {
            cluster.stop_node(node).await?;
            tokio::time::sleep(lasts).await;
            cluster.start_node(node, Port::Same).await?;
        }
        Happens::MasterKill => {
            cluster.kill9_master().await?;
            tokio::time::sleep(lasts).await;
            cluster.start_master(Port::Same).await?;
        }
        Happens::MasterPause => {
            cluster.master_process()?.signal(Signal::STOP);
            tokio::time::sleep(lasts).await;
            cluster.master_process()?.signal(Signal::CONT);
        }
        Happens::Isolation => anyhow::bail!("networks are cut in namespaces"),
    }
    Ok(())
}

async fn rounds(replicas: usize, ack: Ack, events: &[Happens]) -> Result<()> {
    let (seed, began) = (seed(), Instant::now());
    let what = format!("{replicas} replicas, {ack:?}");
    println!("{what}: VASTO_LINEAR_SEED={seed}");
    let events = named_event(events);
    if events.is_empty() {
        println!("none of the events of this test is the one that was asked for");
        return Ok(());
    }
    let mut numbers = Numbers::new(seed);
    // Warnings are not the subject here.
    let mut cluster = Cluster::builder().nodes(replicas).allow("").start().await?;
    cluster.create(KEYSPACE, 1, &["--replicas", &replicas.to_string()]).await?;
    let catalog = cluster.catalog(KEYSPACE).await?;
    let mut tally = Tally::default();
    while began.elapsed() < seconds() {
        whole(&cluster, &catalog).await?;
        let event = events[numbers.below(events.len() as u64) as usize];
        let ms = match event {
            Happens::ShortPause => 100 + numbers.below(350),
            Happens::Pause | Happens::MasterPause => 300 + numbers.below(3_500),
            _ => numbers.below(1_500),
        };
        let home = home_of(&cluster, &catalog)?;
        // Mostly the primary.
        let node =
            if numbers.below(3) > 0 { home } else { numbers.below(replicas as u64) as usize };
        let lead = Duration::from_millis(200 + numbers.below(300));
        let workload = workload(tally.rounds, ack);
        let clients = clients_of(&cluster).await?;
        let during = happen(&mut cluster, node, event, Duration::from_millis(ms));
        round(&clients, &workload, &mut numbers, lead, during).await?;
        tally.judge(event, &workload);
    }
    cluster.finish().await?;
    tally.end(&what, seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_with_fsync() -> Result<()> {
    rounds(
        2,
        Ack::Fsync,
        &[
            Happens::Stop,
            Happens::Stop,
            Happens::ShortPause,
            Happens::MasterKill,
            Happens::MasterPause,
        ],
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_with_fsync() -> Result<()> {
    rounds(3, Ack::Fsync, &[Happens::Stop, Happens::Stop, Happens::ShortPause, Happens::MasterKill])
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_with_replica() -> Result<()> {
    rounds(2, Ack::Replica, &[Happens::Pause, Happens::Kill, Happens::Stop]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_with_replica() -> Result<()> {
    rounds(
        3,
        Ack::Replica,
        &[Happens::Pause, Happens::Pause, Happens::Kill, Happens::Stop, Happens::MasterPause],
    )
    .await
}

// ------------------------------------------------------------------------------- slow and
// overloaded

/// Writers besides the checked clients, until dropped.
struct Pressure {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: JoinSet<()>,
}

impl Pressure {
    async fn start(cluster: &Cluster, handles: u64, tasks_each: u64, bytes: u64) -> Result<Self> {
        let (stop, done, mut tasks) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), JoinSet::new());
        for handle in 0..handles {
            let keyspace = cluster.keyspace(KEYSPACE).await?;
            for task in 0..tasks_each {
                let (keyspace, stop, done) = (keyspace.clone(), stop.clone(), done.clone());
                tasks.spawn(async move {
                    // Bytes that compress badly.
                    let mut numbers = Numbers::new(handle * 1_000 + task);
                    let value: Vec<u8> =
                        (0..bytes / 8).flat_map(|_| numbers.draw().to_le_bytes()).collect();
                    let mut n = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        n += 1;
                        let key = format!("load{handle}:{task}:{}", n % 20);
                        done.fetch_add(
                            u64::from(keyspace.put(key, value.clone()).await.is_ok()),
                            Ordering::Relaxed,
                        );
                    }
                });
            }
        }
        Ok(Self { stop, done, tasks })
    }

    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        self.done.load(Ordering::Relaxed)
    }
}

/// Runs rounds without an event, under this pressure.
async fn under(what: &str, mut cluster: Cluster, pressure: (u64, u64, u64)) -> Result<()> {
    let seed = seed();
    println!("{what}: VASTO_LINEAR_SEED={seed}");
    let mut numbers = Numbers::new(seed);
    let mut tally = Tally::default();
    let load = Pressure::start(&cluster, pressure.0, pressure.1, pressure.2).await?;
    // Queues and disks take some seconds to fill.
    until("the load to have begun", DEADLINE, async || {
        (load.done.load(Ordering::Relaxed) >= pressure.0 * pressure.1).then_some(())
    })
    .await?;
    let began = Instant::now();
    while began.elapsed() < seconds() {
        let workload = workload(tally.rounds, Ack::Fsync);
        // Under pressure an operation waits for seconds.
        let clients: Vec<Keyspace> = clients_of(&cluster)
            .await?
            .into_iter()
            .map(|one| one.with_deadline(Duration::from_secs(10)))
            .collect();
        round(&clients, &workload, &mut numbers, Duration::from_secs(6), async { Ok(()) }).await?;
        tally.judge(Happens::Nothing, &workload);
    }
    println!("{} puts of load", load.end().await);
    // Flushing the queue of such a disk takes longer than a stop may take.
    for node in 0..cluster.nodes() {
        cluster.kill9_node(node).await?;
    }
    cluster.finish().await?;
    tally.end(what, seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_overload() -> Result<()> {
    let cluster = Cluster::builder().nodes(2).allow("").start().await?;
    cluster.create(KEYSPACE, 1, &["--replicas", "2"]).await?;
    under("overload, 2 replicas, Fsync", cluster, (3, 384, 65_536)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_slow_disk() -> Result<()> {
    let mut cluster =
        Cluster::builder().nodes(2).set("node.ship_interval=600s").allow("").start().await?;
    cluster.create(KEYSPACE, 1, &["--replicas", "2"]).await?;
    let catalog = cluster.catalog(KEYSPACE).await?;
    let primary = home_of(&cluster, &catalog)?;
    cluster.stop_node(primary).await?;
    for setting in ["node.write_buffer=2MiB", "node.rate_limit=200KiB"] {
        cluster.set_node(primary, setting);
    }
    cluster.start_node(primary, Port::Same).await?;
    whole(&cluster, &catalog).await?;
    under("a slow disk of the primary, 2 replicas, Fsync", cluster, (1, 64, 16_384)).await
}

// --------------------------------------------------------------------------------- cut off and
// healed

/// Nodes that each have their own network; the master and the clients are outside.
struct Net {
    hosts: Hosts,
    catalog: CatalogDir,
}

impl Net {
    async fn start(replicas: usize) -> Result<Self> {
        let hosts = Hosts::start(&vec!["default"; replicas]).await?;
        let replicas = replicas.to_string();
        hosts
            .vasto(&["keyspace", "create", KEYSPACE, "--shards", "1", "--replicas", &replicas])
            .await?;
        Ok(Self { catalog: hosts.catalog(), hosts })
    }

    async fn whole(&self) -> Result<()> {
        until("all replicas to serve, with the primary at home", DEADLINE * 2, async || {
            let described = self.hosts.vasto(&["keyspace", "describe", KEYSPACE]).await.ok()?;
            is_whole(&self.catalog, &described).then_some(())
        })
        .await
    }

    fn home(&self) -> Result<usize> {
        let id = self.catalog.tip()?.placement[0].primary().context("no primary")?.node.to_string();
        self.hosts.host_of(&id)
    }
}

async fn isolated(replicas: usize) -> Result<()> {
    let (seed, what) = (seed(), format!("isolation, {replicas} replicas, Replica"));
    println!("{what}: VASTO_LINEAR_SEED={seed}");
    let mut numbers = Numbers::new(seed);
    let mut net = Net::start(replicas).await?;
    let mut tally = Tally::default();
    let began = Instant::now();
    while began.elapsed() < seconds() {
        net.whole().await?;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(impatient(
                Vasto::connect(&net.hosts.master).await?.keyspace(KEYSPACE).await?,
            ));
        }
        let home = net.home()?;
        let node =
            if numbers.below(3) > 0 { home } else { numbers.below(replicas as u64) as usize };
        let lasts = Duration::from_millis(500 + numbers.below(5_000));
        // In some rounds the primary dies just as the isolated node returns.
        let kills = replicas > 2 && node != home && numbers.below(2) == 0;
        let lead = Duration::from_millis(200 + numbers.below(300));
        let workload = workload(tally.rounds, Ack::Replica);
        let during = async {
            net.hosts.network.cut(node)?;
            tokio::time::sleep(lasts).await;
            net.hosts.network.heal(node)?;
            if kills {
                net.hosts.nodes[home].0.signal(Signal::STOP);
                tokio::time::sleep(Duration::from_millis(1_500)).await;
                net.hosts.nodes[home].0.signal(Signal::CONT);
            }
            Ok(())
        };
        round(&clients, &workload, &mut numbers, lead, during).await?;
        tally.judge(Happens::Isolation, &workload);
    }
    for (process, _) in &mut net.hosts.nodes {
        process.kill9().await?;
    }
    tally.end(&what, seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_one_cut_off_and_healed() -> Result<()> {
    isolated(2).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_one_cut_off_and_healed() -> Result<()> {
    isolated(3).await
}
