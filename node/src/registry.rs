//! State that the services of a node share: hosted replicas, known catalogs, other nodes'
//! addresses.
//!
//! **Invariant:** a catalog is in [`NodeRegistry::catalog`] before any replica acts on it, so a
//! `WrongEpoch` reply carries the topology whenever that of the caller is older.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use vasto_core::catalog::Catalog;
use vasto_core::ids::{Epoch, KeyspaceId, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::limits::MASTER_WORD;
use vasto_core::plan::{Plan, Step};
use vasto_core::topology::{NodeAddress, Topology};
use vasto_trace::OperationTrace;

use crate::bulk::BulkGate;
use crate::clock::{SharedClock, now_ms};
use crate::replica::Replica;
use crate::replica::authority::Belief;
use crate::stall::StallDetector;

type Routes = HashMap<(KeyspaceId, ShardId), Replica>;

/// Shared state; everything in it is cheap to read on the data path.
pub(crate) struct NodeRegistry {
    /// This node.
    pub node_id: NodeId,
    /// The cluster, once it is known: traces of operations are derived from it.
    cluster: OnceLock<String>,
    /// Clock for event and commit times and expiry.
    pub clock: SharedClock,
    /// Limit of concurrent blocking reads.
    pub readers: Arc<Semaphore>,
    /// The gate of bulk work; it follows the catalogs.
    pub bulk: Arc<BulkGate>,
    /// Wakes the reporter when something that the master waits for has happened.
    pub report: Notify,
    /// Detects that the process stood still.
    pub stall: StallDetector,
    /// Boot time when the runtime of the services was last seen to run, milliseconds.
    pub pulse: Arc<AtomicU64>,
    /// Nodes without a session at the master, and since when it reports that (milliseconds since
    /// boot).
    master_word: ArcSwap<HashMap<NodeId, u64>>,
    master_believed: Belief,
    /// How often each node became reachable again.
    links: watch::Sender<HashMap<NodeId, u64>>,
    routes: ArcSwap<Routes>,
    catalogs: ArcSwap<HashMap<KeyspaceId, Arc<Catalog>>>,
    addresses: ArcSwap<HashMap<NodeId, NodeAddress>>,
    /// Why the replica of a shard is not open.
    not_open: ArcSwap<HashMap<(KeyspaceId, ShardId), String>>,
    /// The free space is needed for data that is written already.
    disk_low: AtomicBool,
    /// Boot time since which the node has had no session with a master, milliseconds; 0 while it
    /// has one.
    alone_since_ms: AtomicU64,
    /// Keyspaces with a seal here whose decision cannot be found out, and why.
    undecided: Mutex<BTreeMap<KeyspaceId, String>>,
    /// Warning for clients and operators of this node.
    trouble: watch::Sender<Option<String>>,
    /// Counts the replicas that are not idle.
    active: Arc<()>,
    update: Mutex<()>,
    changed: watch::Sender<u64>,
}

impl NodeRegistry {
    /// Creates the registry of a node that hosts nothing yet.
    pub(crate) fn new(node_id: NodeId, clock: SharedClock, read_threads: usize) -> Self {
        Self {
            node_id,
            cluster: OnceLock::new(),
            clock,
            readers: Arc::new(Semaphore::new(read_threads.max(1))),
            bulk: Arc::default(),
            report: Notify::new(),
            stall: StallDetector::default(),
            pulse: Arc::new(AtomicU64::new(now_ms())),
            active: Arc::default(),
            master_word: ArcSwap::default(),
            master_believed: Belief::default(),
            links: watch::channel(HashMap::new()).0,
            routes: ArcSwap::default(),
            catalogs: ArcSwap::default(),
            addresses: ArcSwap::default(),
            not_open: ArcSwap::default(),
            disk_low: AtomicBool::new(false),
            alone_since_ms: AtomicU64::new(now_ms()),
            undecided: Mutex::default(),
            trouble: watch::Sender::new(None),
            update: Mutex::new(()),
            changed: watch::channel(0).0,
        }
    }

    /// Records the cluster that this node belongs to, which never changes.
    pub(crate) fn set_cluster(&self, cluster_id: &str) {
        let _ = self.cluster.set(cluster_id.to_owned());
    }

    /// Returns the trace of a plan, for the spans of this node.
    pub(crate) fn trace(&self, keyspace: KeyspaceId, plan: PlanId) -> OperationTrace {
        let cluster = self.cluster.get().map_or("", String::as_str);
        let trace = OperationTrace::of_plan(cluster, keyspace, plan);
        trace.with("vasto.node", self.node_id.to_string())
    }

    /// Returns the replica that serves a shard on this node.
    pub(crate) fn replica_of(&self, keyspace: KeyspaceId, shard: ShardId) -> Option<Replica> {
        self.routes.load().get(&(keyspace, shard)).cloned()
    }

    /// Returns a hosted replica by its id.
    pub(crate) fn replica(&self, keyspace: KeyspaceId, id: ReplicaId) -> Option<Replica> {
        self.routes
            .load()
            .values()
            .find(|replica| replica.keyspace == keyspace && replica.id == id)
            .cloned()
    }

    /// Returns all hosted replicas.
    pub(crate) fn replicas(&self) -> Vec<Replica> {
        self.routes.load().values().cloned().collect()
    }

    /// Stops replicas with peers from serving until they have caught up, because the process stood
    /// still.
    pub(crate) fn stop_serving_what_has_peers(&self) {
        for replica in self.replicas().into_iter().filter(|replica| replica.followers().has_peers())
        {
            replica.set_ready(false);
        }
    }

    /// Hosts a replica.
    pub(crate) fn add_replica(&self, replica: Replica) {
        let _guard = self.update.lock();
        let mut routes = Routes::clone(&self.routes.load());
        routes.insert((replica.keyspace, replica.shard), replica);
        self.routes.store(Arc::new(routes));
        self.bump();
    }

    /// Stops hosting a replica; returns its handle.
    pub(crate) fn remove_replica(&self, keyspace: KeyspaceId, id: ReplicaId) -> Option<Replica> {
        let _guard = self.update.lock();
        let mut routes = Routes::clone(&self.routes.load());
        let key = routes
            .iter()
            .find(|(_, replica)| replica.keyspace == keyspace && replica.id == id)
            .map(|(key, _)| *key)?;
        let replica = routes.remove(&key);
        self.routes.store(Arc::new(routes));
        self.bump();
        replica
    }

    /// Records the nodes that had no session with the master, as of a question sent at `sent_ms`.
    pub(crate) fn set_presence(&self, sent_ms: u64, gone: HashSet<NodeId>) {
        let (before, now) = (self.master_word.load(), now_ms());
        let since = |node: NodeId| (node, before.get(&node).copied().unwrap_or(now));
        self.master_word.store(Arc::new(gone.into_iter().map(since).collect()));
        self.master_believed.fetch_max(sent_ms + MASTER_WORD.as_millis() as u64, Ordering::AcqRel);
    }

    /// Returns until when the master's presence answer is valid.
    pub(crate) fn master_word(&self) -> Belief {
        self.master_believed.clone()
    }

    /// Returns since when the master reports the node without a session, milliseconds since boot;
    /// `None` when it does not, or when its last answer is too old.
    pub(crate) fn master_says_gone(&self, node: NodeId, now_ms: u64) -> Option<u64> {
        let believed = self.master_believed.load(Ordering::Acquire) > now_ms;
        self.master_word.load().get(&node).copied().filter(|_| believed)
    }

    /// Announces that the node is reachable again: older connections are stuck until their
    /// transport retries.
    pub(crate) fn link_is_up(&self, node: NodeId) {
        self.links.send_modify(|links| *links.entry(node).or_default() += 1);
    }

    /// Returns how often the node became reachable again.
    pub(crate) fn links_of(&self, node: NodeId) -> u64 {
        self.links.borrow().get(&node).copied().unwrap_or(0)
    }

    /// Waits until the node has become reachable again, once more than `before`.
    pub(crate) async fn linked_again(&self, node: NodeId, before: u64) {
        let mut links = self.links.subscribe();
        // An error would mean that the sender is dropped, and `self` owns it.
        let _ = links.wait_for(|links| links.get(&node).copied().unwrap_or(0) > before).await;
    }

    /// Returns the last version known of a keyspace.
    pub(crate) fn catalog(&self, keyspace: KeyspaceId) -> Option<Arc<Catalog>> {
        self.catalogs.load().get(&keyspace).cloned()
    }

    /// Returns the last version known of every keyspace.
    pub(crate) fn catalogs(&self) -> HashMap<KeyspaceId, Arc<Catalog>> {
        HashMap::clone(&self.catalogs.load())
    }

    /// Returns the last version known of every keyspace that changes its number of shards, in a step
    /// in which this node may wait for the decision.
    pub(crate) fn resizing(&self) -> Vec<Arc<Catalog>> {
        let waits = |plan: &Plan| {
            plan.resize().is_some() && matches!(plan.step, Step::Tail | Step::Sealing)
        };
        let catalogs = self.catalogs.load();
        catalogs
            .values()
            .filter(|catalog| catalog.plan.as_ref().is_some_and(waits))
            .cloned()
            .collect()
    }

    /// Records whether the node has a session with a master.
    pub(crate) fn set_joined(&self, joined: bool) {
        let since_ms = if joined { 0 } else { now_ms() };
        self.alone_since_ms.store(since_ms, Ordering::Release);
    }

    /// Returns for how long the node has had no session with a master; `None` while it has one.
    pub(crate) fn without_master(&self) -> Option<Duration> {
        match self.alone_since_ms.load(Ordering::Acquire) {
            0 => None,
            since_ms => Some(Duration::from_millis(now_ms().saturating_sub(since_ms))),
        }
    }

    /// Records why the decision of a seal cannot be found out; `None` when it can, or is known.
    pub(crate) fn set_undecided(&self, keyspace: KeyspaceId, why: Option<String>) {
        let mut undecided = self.undecided.lock();
        match why {
            Some(why) => drop(undecided.insert(keyspace, why)),
            None => drop(undecided.remove(&keyspace)),
        }
    }

    /// Returns why decisions of seals cannot be found out.
    pub(crate) fn undecided(&self) -> Vec<String> {
        self.undecided.lock().values().cloned().collect()
    }

    /// Stores a version; false when it is not newer than the known one.
    pub(crate) fn set_catalog(&self, catalog: Arc<Catalog>) -> bool {
        let _guard = self.update.lock();
        let catalogs = self.catalogs.load();
        if catalogs.get(&catalog.keyspace).is_some_and(|current| current.version >= catalog.version)
        {
            return false;
        }
        self.bulk.apply(&catalog);
        let mut next = HashMap::clone(&catalogs);
        next.insert(catalog.keyspace, catalog);
        self.catalogs.store(Arc::new(next));
        self.bump();
        true
    }

    /// Replaces the addresses of the nodes.
    pub(crate) fn set_addresses(&self, addresses: HashMap<NodeId, NodeAddress>) {
        self.addresses.store(Arc::new(addresses));
        self.bump();
    }

    /// Returns the address of a node.
    pub(crate) fn address(&self, node: NodeId) -> Option<String> {
        self.addresses.load().get(&node).map(|node| node.address.clone())
    }

    /// Returns true when a node listens at the address.
    pub(crate) fn is_address(&self, address: &str) -> bool {
        self.addresses.load().values().any(|node| node.address == address)
    }

    /// Returns the topology of a keyspace as this node knows it.
    pub(crate) fn topology(&self, keyspace: KeyspaceId) -> Option<Topology> {
        let catalog = self.catalog(keyspace)?;
        let addresses = self.addresses.load();
        Some(Topology::derive(&catalog, |node| addresses.get(&node).cloned()))
    }

    /// Returns the epoch of a keyspace as this node knows it.
    pub(crate) fn known_epoch(&self, keyspace: KeyspaceId) -> Epoch {
        self.catalogs.load().get(&keyspace).map(|catalog| catalog.epoch).unwrap_or_default()
    }

    /// Returns true when the known catalog places a replica of the shard on this node, open or not.
    pub(crate) fn is_placed_here(&self, keyspace: KeyspaceId, shard: ShardId) -> bool {
        self.catalogs.load().get(&keyspace).is_some_and(|catalog| {
            catalog
                .members_on(self.node_id)
                .iter()
                .any(|(member, _, placed)| *member == shard && *placed)
        })
    }

    /// Returns true when the known catalog places no other replica of the shard.
    pub(crate) fn is_the_only_one(&self, keyspace: KeyspaceId, shard: ShardId) -> bool {
        let catalogs = self.catalogs.load();
        catalogs
            .get(&keyspace)
            .and_then(|catalog| catalog.shard(shard))
            .is_none_or(|shard| shard.replicas.len() < 2)
    }

    /// Returns why the replica of the shard is not open here, if an attempt has failed.
    pub(crate) fn not_open(&self, keyspace: KeyspaceId, shard: ShardId) -> Option<String> {
        self.not_open.load().get(&(keyspace, shard)).cloned()
    }

    /// Records why the replica of a shard is not open; `None` means that it is retried.
    pub(crate) fn set_not_open(
        &self,
        keyspace: KeyspaceId,
        shard: ShardId,
        reason: Option<String>,
    ) {
        let _one_at_a_time = self.update.lock();
        let mut next = HashMap::clone(&self.not_open.load());
        match reason {
            Some(reason) => drop(next.insert((keyspace, shard), reason)),
            None => drop(next.remove(&(keyspace, shard))),
        }
        self.not_open.store(Arc::new(next));
        self.bump();
    }

    /// Returns true while client writes are refused because the disk is almost full.
    pub(crate) fn is_disk_low(&self) -> bool {
        self.disk_low.load(Ordering::Relaxed)
    }

    /// Marks a replica as active for as long as the returned guard lives.
    pub(crate) fn activity(&self) -> Arc<()> {
        self.active.clone()
    }

    /// Returns true when all replicas are idle.
    pub(crate) fn is_at_rest(&self) -> bool {
        Arc::strong_count(&self.active) == 1
    }

    /// Refuses client writes because the disk is almost full, or accepts them again.
    pub(crate) fn set_disk_low(&self, low: bool) {
        self.disk_low.store(low, Ordering::Relaxed);
    }

    /// Returns the warning about what keeps the node from doing all of its work; `None` when there
    /// is none.
    pub(crate) fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Publishes the warning.
    pub(crate) fn set_trouble(&self, trouble: Option<String>) {
        self.trouble.send_if_modified(|warning| {
            let is_new = *warning != trouble;
            *warning = trouble;
            is_new
        });
    }

    /// Returns a receiver of changes of the state above.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}
