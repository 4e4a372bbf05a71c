//! The cluster of several cells, one after the other: what each cell begins with, and the way of its
//! fault.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vasto_core::ids::NodeId;
use vasto_core::reconcile::nodes_to_avoid;
use vasto_failpoint::{Action, Directory, Order, Point};
use vasto_testkit::http_store::HttpStore;
use vasto_tests::netns::Network;
use vasto_tests::replicas::converged;
use vasto_tests::{
    CatalogDir, Cluster, History, Load, LoadSpec, Writer, preload, put_all, until, verify_beside,
};

use super::cells::{Cell, Change, Step, Victim};
use super::change::{DONE, KEYSPACE, Running};
use super::deletes::{self, Deletes};
use super::fault::{Field, Lasting, Struck};

pub(super) const NODES: usize = 3;
const REPLICAS: usize = 2;
/// Rows of the keyspace before the first cell.
const ROWS: u64 = 600;
/// Rows that are deleted before the first cell and never come back.
const DELETED: u64 = 200;
/// Pause of each client between two operations.
const PACE: Duration = Duration::from_millis(10);
/// Time from the end of a fault within which everything is as before it.
pub(super) const CALM_MAX: Duration = Duration::from_secs(30);
/// Time within which a change reaches its step.
const STEP_MAX: Duration = Duration::from_secs(45);

/// A cluster on a network of its own.
pub(super) struct Ground {
    pub(super) cluster: Cluster,
    network: Arc<Network>,
    store: Arc<HttpStore>,
    pub(super) catalog: CatalogDir,
    pub(super) history: Arc<History>,
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
        let builder = Cluster::builder().nodes(NODES).http(&store).on(&network);
        let builder = builder.keeps_no_garbage().failpoints().keep_when_unfinished();
        let cluster = builder.tells_of_faults().start().await?;
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
            // Few, so that each has its deletes.
            overwritten: 5,
        };
        let load = Load::start(&self.cluster.master(), KEYSPACE, &self.history, spec).await?;
        let keyspace = self.cluster.keyspace(KEYSPACE).await?;
        let deletes = Deletes::start(&keyspace, self.cells, self.lasting).await?;
        let mut writer = Writer::new(&self.cells.to_string(), KEYSPACE);
        writer.start(&self.cluster)?;
        load.acks(20).await?;
        let (promised, gone) = (self.history.all(), deletes.acknowledged());
        let (running, healed) = self.strike(cell, &mut writer).await?;
        self.rests(&running, healed).await?;
        running.is_carried_out(cell.change)?;
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
        let deleted = deletes.stop().await?;
        writer.kill9().await?;
        let rows = converged(&self.cluster, KEYSPACE).await?;
        let calm = healed.elapsed();
        ensure!(calm <= CALM_MAX, "all was as before {calm:?} after the end of the fault");
        let others = [Writer::PREFIX, deletes::PREFIX];
        verify_beside(&self.cluster.master(), KEYSPACE, &self.history, &others).await?;
        let of_writer = writer.end(&keyspace).await?;
        let deleted = deleted.is_kept(&keyspace).await?;
        let outcome = running.outcome(&self.cluster, cell.change).await?;
        let is_done = outcome == DONE;
        ensure!(is_done || cell.victim != Victim::Client, "a client has undone the change");
        if let Some(name) = running.made.as_ref().filter(|_| is_done) {
            // One that was undone has left nothing to delete.
            self.holds(name, &promised, &gone).await.with_context(|| name.clone())?;
            self.cluster.json(&["keyspace", "delete", name, "--yes"]).await?;
        }
        self.leaves_nothing().await?;
        Ok(format!(
            "{outcome}, as before after {:.1} s, {} + {of_writer} writes acknowledged, {} unknown, {deleted} deletes \
             kept, {rows} rows",
            calm.as_secs_f64(),
            summary.acked,
            summary.unknown,
        ))
    }

    /// Gives the keyspace a count of shards that the change can begin with, the bucket a checkpoint,
    /// and a rebalance a node to fill.
    async fn make_ready(&self, change: Change) -> Result<()> {
        let shards = self.catalog.tip()?.spec.shards;
        let wanted = match change {
            Change::GrowOne | Change::GrowMany if shards > 4 => Some(2),
            Change::Shrink if shards < 3 => Some(4),
            Change::Rebalance if shards < 4 => Some(4),
            _ => None,
        };
        if let Some(wanted) = wanted {
            self.cluster.resize(KEYSPACE, wanted).await?;
            self.cluster.settled(KEYSPACE).await?;
        }
        if change == Change::Restore {
            self.cluster.json(&["keyspace", "checkpoint", KEYSPACE]).await?;
        }
        if change == Change::Rebalance {
            self.empty_a_node().await?;
        }
        // Nothing of before passes a failpoint of the change.
        self.nothing_is_left_on_nodes().await?;
        self.failpoints.disarm_all()?;
        Ok(())
    }

    /// Empties a node, to which replicas can move then: the nodes take turns, but for those that a
    /// rebalance avoids since a move to them has failed.
    async fn empty_a_node(&self) -> Result<()> {
        let tip = self.catalog.tip()?;
        let avoided: BTreeSet<NodeId> =
            nodes_to_avoid(&tip, tip.written_at_us).into_iter().collect();
        let turns = (0..NODES).map(|turn| (self.cells as usize + turn) % NODES);
        let ids: Vec<String> = turns.filter_map(|node| self.cluster.node_id(node)).collect();
        let may = |id: &&String| id.parse::<NodeId>().is_ok_and(|id| !avoided.contains(&id));
        let id = ids.iter().find(may).context("moves to all nodes have failed lately")?;
        if !tip.members_on(id.parse()?).is_empty() {
            let drained = self.cluster.json(&["node", "drain", id]).await?;
            ensure!(drained["state"] == "done", "{drained}");
        }
        self.cluster.whole(KEYSPACE).await?;
        self.cluster.json(&["node", "uncordon", id]).await.map(drop)
    }

    /// Starts the change, holds it at the step, and lets the fault happen; returns when its end
    /// began.
    async fn strike(&mut self, cell: Cell, writer: &mut Writer) -> Result<(Running, Instant)> {
        let point = cell.change.point(cell.step).context("the change has no such step")?;
        let keyspace = self.catalog.tip()?.keyspace;
        let mut order = Order::from(Action::Pause);
        // What a restore makes is another keyspace.
        order.keyspace = (cell.change != Change::Restore).then_some(keyspace);
        self.failpoints.arm(point, order)?;
        let mut running = Running::start(&self.cluster, cell.change, self.cells).await?;
        let what = format!("{} to be reached", point.name());
        let held = until(&what, STEP_MAX, async || self.failpoints.reached(point).ok()?);
        let pid = held.await.with_context(|| format!("{:?}", running.catalog.tip()))?;
        let on_node = self.cluster.node_of_pid(pid).and_then(|node| self.cluster.node_id(node));
        if let Some(id) = on_node {
            running.turn_to(id.parse()?)?;
        }
        running.is_at(cell.change, cell.step)?;
        let struck = self.struck(cell, point, pid, &running)?;
        let time = self.lasting.of(cell.fault);
        let Self { cluster, network, store, failpoints, .. } = self;
        let mut field = Field { cluster, network, store, writer };
        let begun = field.begin(struck, cell.fault).await;
        failpoints.release(point)?;
        begun.with_context(|| format!("the fault of {struck:?}"))?;
        tokio::time::sleep(time).await;
        let strikes = field.strikes(struck, cell.fault);
        // The start of what was killed is a part of the way back.
        let healed = Instant::now();
        field.end(struck, cell.fault).await.with_context(|| format!("the end for {struck:?}"))?;
        strikes?;
        Ok((running, healed))
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

    /// Lets every node get replicas again: the next cells need them.
    async fn uncordon(&self) -> Result<()> {
        for node in 0..NODES {
            let id = self.cluster.node_id(node).context("the node was never up")?;
            self.cluster.json(&["node", "uncordon", &id]).await?;
        }
        Ok(())
    }

    /// Stops the cluster and checks its logs.
    pub(super) async fn end(self) -> Result<()> {
        self.cluster.finish().await
    }
}
