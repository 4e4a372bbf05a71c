//! The cluster of several cells, one after the other: what each cell begins with, and what must
//! hold after each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vasto_core::catalog::Catalog;
use vasto_core::ids::ReplicaId;
use vasto_core::operation::OperationOutcome;
use vasto_failpoint::{Action, Directory, Order, Point};
use vasto_testkit::http_store::HttpStore;
use vasto_tests::netns::Network;
use vasto_tests::replicas::converged;
use vasto_tests::{
    CatalogDir, Cluster, DEADLINE, History, KeyHistory, Load, LoadSpec, Seen, is_delete, key_of,
    number_of, preload, put_all, until, verify_beside,
};

use super::cells::{Cell, Change, Step, Victim};
use super::change::{KEYSPACE, Running};
use super::fault::{Field, Lasting, Struck};
use super::writer::{PREFIX, Writer};

const NODES: usize = 3;
const REPLICAS: usize = 2;
/// Rows of the keyspace before the first cell.
const ROWS: u64 = 600;
/// Rows that are deleted before the first cell and never come back.
const DELETED: u64 = 200;
/// Pause of each client between two operations.
const PACE: Duration = Duration::from_millis(10);
/// Time from the end of a fault within which everything is as before it.
const CALM_MAX: Duration = Duration::from_secs(30);
/// Time within which a change reaches its step.
const STEP_MAX: Duration = Duration::from_secs(45);
/// Texts of errors that a fault may cause.
const TOLD: [&str; 4] = [
    "could not be applied",
    "the target cannot be built",
    "the replica does not open",
    "shipping failed",
];

/// A cluster on a network of its own.
pub(super) struct Ground {
    cluster: Cluster,
    network: Arc<Network>,
    store: Arc<HttpStore>,
    catalog: CatalogDir,
    history: Arc<History>,
    failpoints: Directory,
    lasting: Lasting,
    cells: u64,
}

impl Ground {
    pub(super) async fn start(lasting: Lasting) -> Result<Self> {
        ensure!(
            vasto_tests::netns::available(),
            "networks cannot be cut here: run `scripts/setup.sh test`, and this test as root with the right to make \
             network namespaces"
        );
        // A host for each node, for the master and for clients.
        let network = Arc::new(Network::new(NODES + 2)?);
        let store = Arc::new(HttpStore::start_on(&network.address(None)).await);
        let mut builder = Cluster::builder().nodes(NODES).http(&store).on(&network);
        builder = builder.keeps_no_garbage().failpoints().keep_when_unfinished();
        for text in TOLD {
            builder = builder.allow(text);
        }
        let cluster = builder.allow_warnings().start().await?;
        let replicas = REPLICAS.to_string();
        let mut options = vec!["--replicas", &replicas, "--ack", "replica"];
        options.extend(["--quarantine", "1s", "--tombstone-grace", "1s"]);
        cluster.create(KEYSPACE, 2, &options).await?;
        let keyspace = cluster.keyspace(KEYSPACE).await?;
        let history = Arc::new(History::default());
        preload(&keyspace, &history, "s:", ROWS).await?;
        put_all(&keyspace, "gone:", DELETED).await?;
        for n in 0..DELETED {
            keyspace.delete(format!("gone:{n}")).await?;
        }
        let catalog = cluster.catalog(KEYSPACE).await?;
        let failpoints = cluster.failpoints();
        Ok(Self { cluster, network, store, catalog, history, failpoints, lasting, cells: 0 })
    }

    /// Runs a cell; returns what it was like, in one line.
    pub(super) async fn run(&mut self, cell: Cell) -> Result<String> {
        self.cells += 1;
        self.make_ready(cell.change).await.context("before the change")?;
        let spec = LoadSpec {
            name: format!("c{}", self.cells),
            writers: 3,
            readers: 0,
            pace: PACE,
            ..LoadSpec::default()
        };
        let load = Load::start(&self.cluster.master(), KEYSPACE, &self.history, spec).await?;
        let mut writer = Writer::new(self.cells);
        writer.start(&self.cluster)?;
        load.acks(20).await?;
        let promised = self.history.all();
        let (running, healed) = self.strike(cell, &mut writer).await?;
        self.rests(&running, healed).await?;
        if cell.change == Change::Drain {
            self.uncordon().await?;
        }
        writer.keep_running(&self.cluster)?;
        let acked = writer.acked();
        until("the client process to go on", CALM_MAX, async || {
            (writer.acked() > acked).then_some(())
        })
        .await?;
        load.goes_on(3).await.context("after the fault")?;
        let summary = load.stop().await?;
        let keyspace = self.cluster.keyspace(KEYSPACE).await?;
        let of_writer = writer.end(&keyspace).await?;
        let rows = converged(&self.cluster, KEYSPACE).await?;
        let calm = healed.elapsed();
        ensure!(calm <= CALM_MAX, "all was as before {calm:?} after the end of the fault");
        verify_beside(&self.cluster.master(), KEYSPACE, &self.history, &[PREFIX]).await?;
        let outcome = running.outcome(cell.change)?;
        if let Some(name) = &running.made {
            // One that was undone has left nothing to delete.
            if outcome == format!("{:?}", OperationOutcome::Done) {
                self.holds(name, &promised).await.with_context(|| name.clone())?;
                self.cluster.json(&["keyspace", "delete", name, "--yes"]).await?;
            }
        }
        self.leaves_nothing().await?;
        Ok(format!(
            "{outcome}, as before after {:.1} s, {} + {of_writer} writes acknowledged, {} unknown, {rows} rows",
            calm.as_secs_f64(),
            summary.acked,
            summary.unknown,
        ))
    }

    /// Gives the keyspace a count of shards that the change can begin with, and the bucket a
    /// checkpoint.
    async fn make_ready(&self, change: Change) -> Result<()> {
        let shards = self.catalog.tip()?.spec.shards;
        let wanted = match change {
            Change::GrowOne | Change::GrowMany if shards > 4 => Some(2),
            Change::Shrink if shards < 3 => Some(4),
            _ => None,
        };
        if let Some(wanted) = wanted {
            self.cluster.resize(KEYSPACE, wanted).await?;
            self.cluster.settled(KEYSPACE).await?;
        }
        if change == Change::Restore {
            self.cluster.json(&["keyspace", "checkpoint", KEYSPACE]).await?;
        }
        let _ = self.store.take_served();
        self.failpoints.disarm_all()?;
        Ok(())
    }

    /// Starts the change, holds it at the step, and lets the fault happen; returns when it ended.
    async fn strike(&mut self, cell: Cell, writer: &mut Writer) -> Result<(Running, Instant)> {
        let point = cell.change.point(cell.step).context("the change has no such step")?;
        let keyspace = self.catalog.tip()?.keyspace;
        let mut order = Order::from(Action::Pause);
        // What a restore makes is another keyspace.
        order.keyspace = (cell.change != Change::Restore).then_some(keyspace);
        self.failpoints.arm(point, order)?;
        let running = Running::start(&self.cluster, cell.change, self.cells).await?;
        let what = format!("{} to be reached", point.name());
        let held = until(&what, STEP_MAX, async || self.failpoints.reached(point).ok()?);
        let pid = held.await.with_context(|| format!("{:?}", running.catalog.tip()))?;
        let struck = self.struck(cell, point, pid, &running)?;
        let time = self.lasting.of(cell.fault);
        let Self { cluster, network, store, failpoints, .. } = self;
        let mut field = Field { cluster, network, store, writer };
        let begun = field.begin(struck, cell.fault).await;
        failpoints.release(point)?;
        begun?;
        tokio::time::sleep(time).await;
        field.end(struck, cell.fault).await.with_context(|| format!("the end for {struck:?}"))?;
        Ok((running, Instant::now()))
    }

    /// Finds the victim: who is held at the point, if that is meant, or else by the plan.
    fn struck(&self, cell: Cell, point: Point, pid: u32, running: &Running) -> Result<Struck> {
        let part = point.name().split('.').next().unwrap_or_default();
        let is_held = match cell.victim {
            Victim::Source => part == "source" && cell.step != Step::Seal,
            Victim::Target => part == "target" || part == "copy",
            _ => false,
        };
        if is_held && let Some(node) = self.cluster.node_of_pid(pid) {
            return Ok(Struck::Node(node));
        }
        Ok(match cell.victim {
            Victim::Master => Struck::Master,
            Victim::Client => Struck::Client,
            Victim::Bucket => Struck::Bucket,
            Victim::Source | Victim::Target | Victim::Follower => {
                let node = running.node(cell.victim)?.context("the victim is no node")?;
                Struck::Node(self.cluster.node_of(&node.to_string())?)
            }
        })
    }

    /// Waits until the change and all that it brings have ended, and all nodes are back.
    async fn rests(&self, running: &Running, healed: Instant) -> Result<()> {
        let mut why = String::new();
        let rested = until("the cluster to be at rest", CALM_MAX, async || {
            match self.unrest(running).await {
                Ok(None) => Some(()),
                Ok(Some(what)) => {
                    why = what;
                    None
                }
                Err(error) => {
                    why = format!("{error:#}");
                    None
                }
            }
        });
        rested.await.with_context(|| format!("{:?} after the fault: {why}", healed.elapsed()))
    }

    /// Lets every node get replicas again: the next cells need them.
    async fn uncordon(&self) -> Result<()> {
        for node in 0..NODES {
            let id = self.cluster.node_id(node).context("the node was never up")?;
            self.cluster.json(&["node", "uncordon", &id]).await?;
        }
        Ok(())
    }

    /// Returns what is not at rest.
    async fn unrest(&self, running: &Running) -> Result<Option<String>> {
        for catalog in [&self.catalog, &running.catalog] {
            let tip = catalog.tip()?;
            let leaving = tip.draining.len() + tip.draining_nodes.len() + tip.retired.len();
            let rests = tip.plan.is_none() && tip.quarantines.is_empty() && leaving == 0;
            let wanted = tip.spec.replicas as usize;
            let whole = tip.placement.iter().all(|shard| shard.replicas.len() == wanted);
            if !(rests && whole) {
                return Ok(Some(format!("{tip:?}")));
            }
        }
        let status = self.cluster.json(&["cluster", "status"]).await?;
        let nodes = status["nodes"].as_array().context("no nodes")?;
        let live = nodes.iter().all(|node| node["state"] != "away");
        Ok((!live).then(|| format!("{status}")))
    }

    /// Checks that a restored keyspace holds what was acknowledged before the restore began.
    async fn holds(&self, name: &str, promised: &BTreeMap<String, KeyHistory>) -> Result<()> {
        let keyspace = self.cluster.keyspace(name).await?;
        let names: Vec<&String> = promised.keys().collect();
        for names in names.chunks(500) {
            let values = keyspace.get_many(names.iter().map(|name| key_of(name))).await?;
            for (name, value) in names.iter().zip(values) {
                let (then, now) = (&promised[*name], self.history.get(name));
                let number = value.map(|value| number_of(name, &value.bytes()).unwrap_or(u64::MAX));
                let holds = match number {
                    Some(number) => {
                        then.allows(Seen::Number(number))
                            || (number >= then.acked && number <= now.tried)
                    }
                    None => then.allows(Seen::Absent) || (then.acked..=now.tried).any(is_delete),
                };
                ensure!(holds, "{name} is {number:?}; promised then {then:?}, now {now:?}");
            }
        }
        Ok(())
    }

    /// Checks that the cells so far have left nothing on nodes and in the bucket that nothing
    /// needs.
    async fn leaves_nothing(&self) -> Result<()> {
        let tip = self.catalog.tip()?;
        let mut last = Vec::new();
        let gone = until("what nothing needs to go from the nodes", DEADLINE, async || {
            last = self.left_on_nodes(&tip).ok()?;
            last.is_empty().then_some(())
        });
        gone.await.with_context(|| format!("{last:?}"))?;
        self.cluster.shipped(KEYSPACE).await?;
        self.cluster.collect().await.map(drop)
    }

    /// Returns directories on nodes that no replica of the keyspace has any more.
    fn left_on_nodes(&self, tip: &Catalog) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for node in 0..NODES {
            let id = self.cluster.node_id(node).context("the node was never up")?;
            let placed = tip.placement.iter().flat_map(|shard| &shard.replicas);
            let here: BTreeSet<ReplicaId> =
                placed.filter(|one| one.node.to_string() == id).map(|one| one.replica).collect();
            let needed: BTreeSet<String> =
                here.iter().map(|replica| format!("{}-{replica}", tip.keyspace)).collect();
            let dir = self.cluster.node_dir(node);
            for (part, any) in [("replicas", true), ("tmp", false)] {
                for entry in std::fs::read_dir(dir.join(part))? {
                    let name = entry?.file_name().to_string_lossy().into_owned();
                    let is_work = ["build-", "export-"].iter().any(|work| name.starts_with(work));
                    let is_needed = name.starts_with('.') || needed.contains(&name);
                    if (any && !is_needed) || is_work {
                        left.push(format!("node {node}: {part}/{name}"));
                    }
                }
            }
        }
        Ok(left)
    }

    /// Stops the cluster and checks its logs.
    pub(super) async fn end(self) -> Result<()> {
        self.cluster.finish().await
    }
}
