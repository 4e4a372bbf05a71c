//! What the services of a node share: hosted replicas, known catalogs, other nodes' addresses.
//!
//! **Invariant:** a catalog is in [`NodeCore::catalog`] before any replica acts on it, so whoever
//! is sent away with `WrongEpoch` is told where to go.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use vasto_core::catalog::Catalog;
use vasto_core::ids::{Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::limits::MASTER_WORD;
use vasto_core::topology::{NodeAddress, Topology};

use crate::clock::SharedClock;
use crate::lease::Leases;
use crate::pause::PauseDetector;
use crate::replica::Replica;
use crate::replica::authority::{Belief, now_ms};

type Routes = HashMap<(KeyspaceId, ShardId), Replica>;

/// Shared state; everything in it is cheap to read on the data path.
pub struct NodeCore {
    /// This node.
    pub node_id: NodeId,
    /// For stamps and expiry.
    pub clock: SharedClock,
    /// Reads that may block run at most this many at a time.
    pub readers: Arc<Semaphore>,
    /// Wakes the reporter: something the master waits for has happened.
    pub report: Notify,
    /// Notices that the process stood still.
    pub pause: PauseDetector,
    /// Boot time when the runtime of the services was last seen to run, milliseconds.
    pub pulse: Arc<AtomicU64>,
    /// Which replicas serve; set once the node has started.
    pub leases: OnceLock<Leases>,
    /// The nodes without a session at the master, and since when it says so (milliseconds since boot).
    master_word: ArcSwap<HashMap<NodeId, u64>>,
    master_believed: Belief,
    /// How often each node could be reached again.
    links: watch::Sender<HashMap<NodeId, u64>>,
    routes: ArcSwap<Routes>,
    catalogs: ArcSwap<HashMap<KeyspaceId, Arc<Catalog>>>,
    addresses: ArcSwap<HashMap<NodeId, NodeAddress>>,
    /// Why the replica of a shard is not open.
    not_open: ArcSwap<HashMap<(KeyspaceId, ShardId), String>>,
    /// What is free is needed for what is written already.
    disk_low: AtomicBool,
    /// What somebody should know who sends work here.
    trouble: watch::Sender<Option<String>>,
    /// Counts the replicas with which something is going on.
    active: Arc<()>,
    update: Mutex<()>,
    changed: watch::Sender<u64>,
}

impl NodeCore {
    /// A node that hosts nothing yet.
    pub fn new(node_id: NodeId, clock: SharedClock, read_threads: usize) -> Self {
        Self {
            node_id,
            clock,
            readers: Arc::new(Semaphore::new(read_threads.max(1))),
            report: Notify::new(),
            pause: PauseDetector::default(),
            pulse: Arc::new(AtomicU64::new(now_ms())),
            leases: OnceLock::new(),
            active: Arc::default(),
            master_word: ArcSwap::default(),
            master_believed: Belief::default(),
            links: watch::channel(HashMap::new()).0,
            routes: ArcSwap::default(),
            catalogs: ArcSwap::default(),
            addresses: ArcSwap::default(),
            not_open: ArcSwap::default(),
            disk_low: AtomicBool::new(false),
            trouble: watch::Sender::new(None),
            update: Mutex::new(()),
            changed: watch::channel(0).0,
        }
    }

    /// The replica that serves a shard here.
    pub fn replica_of(&self, keyspace: KeyspaceId, shard: ShardId) -> Option<Replica> {
        self.routes.load().get(&(keyspace, shard)).cloned()
    }

    /// A hosted replica by its id.
    pub fn replica(&self, keyspace: KeyspaceId, id: ReplicaId) -> Option<Replica> {
        self.routes.load().values().find(|one| one.keyspace == keyspace && one.id == id).cloned()
    }

    /// All hosted replicas.
    pub fn replicas(&self) -> Vec<Replica> {
        self.routes.load().values().cloned().collect()
    }

    /// The process stood still: what has peers must catch up before it serves again.
    pub fn stop_serving_what_has_peers(&self) {
        for replica in self.replicas().into_iter().filter(|replica| replica.followers().has_peers()) {
            replica.set_ready(false);
        }
    }

    /// Hosts a replica.
    pub fn add_replica(&self, replica: Replica) {
        let _guard = self.update.lock();
        let mut routes = Routes::clone(&self.routes.load());
        routes.insert((replica.keyspace, replica.shard), replica);
        self.routes.store(Arc::new(routes));
        self.bump();
    }

    /// Stops hosting a replica; answers its handle.
    pub fn remove_replica(&self, keyspace: KeyspaceId, id: ReplicaId) -> Option<Replica> {
        let _guard = self.update.lock();
        let mut routes = Routes::clone(&self.routes.load());
        let key = routes.iter().find(|(_, one)| one.keyspace == keyspace && one.id == id).map(|(key, _)| *key)?;
        let replica = routes.remove(&key);
        self.routes.store(Arc::new(routes));
        self.bump();
        replica
    }

    /// Takes note of which nodes the master had no session with, when this was asked at `sent_ms`.
    pub fn hear_presence(&self, sent_ms: u64, gone: HashSet<NodeId>) {
        let (before, now) = (self.master_word.load(), now_ms());
        let since = |node: NodeId| (node, before.get(&node).copied().unwrap_or(now));
        self.master_word.store(Arc::new(gone.into_iter().map(since).collect()));
        self.master_believed.fetch_max(sent_ms + MASTER_WORD.as_millis() as u64, Ordering::AcqRel);
    }

    /// Until when the master's word is believed.
    pub fn master_word(&self) -> Belief {
        self.master_believed.clone()
    }

    /// Since when the master says that the node has no session, milliseconds since boot; `None` when it does not,
    /// or has not been heard of late.
    pub fn master_says_gone(&self, node: NodeId, now_ms: u64) -> Option<u64> {
        let believed = self.master_believed.load(Ordering::Acquire) > now_ms;
        self.master_word.load().get(&node).copied().filter(|_| believed)
    }

    /// The node can be reached again: connections from before stand still until their transport tries again.
    pub fn link_is_up(&self, node: NodeId) {
        self.links.send_modify(|links| *links.entry(node).or_default() += 1);
    }

    /// How often the node could be reached again.
    pub fn links_of(&self, node: NodeId) -> u64 {
        self.links.borrow().get(&node).copied().unwrap_or(0)
    }

    /// Waits until the node could be reached again, once more than `before`.
    pub async fn linked_again(&self, node: NodeId, before: u64) {
        let mut links = self.links.subscribe();
        // An error would mean that the sender is gone, and it is in `self`.
        let _ = links.wait_for(|links| links.get(&node).copied().unwrap_or(0) > before).await;
    }

    /// The last version known of a keyspace.
    pub fn catalog(&self, keyspace: KeyspaceId) -> Option<Arc<Catalog>> {
        self.catalogs.load().get(&keyspace).cloned()
    }

    /// The last version known of every keyspace.
    pub fn catalogs(&self) -> HashMap<KeyspaceId, Arc<Catalog>> {
        HashMap::clone(&self.catalogs.load())
    }

    /// Takes note of a version; false when it is not newer than the known one.
    pub fn set_catalog(&self, catalog: Arc<Catalog>) -> bool {
        let _guard = self.update.lock();
        let catalogs = self.catalogs.load();
        if catalogs.get(&catalog.keyspace).is_some_and(|known| known.version >= catalog.version) {
            return false;
        }
        let mut next = HashMap::clone(&catalogs);
        next.insert(catalog.keyspace, catalog);
        self.catalogs.store(Arc::new(next));
        self.bump();
        true
    }

    /// Where the nodes listen.
    pub fn set_addresses(&self, addresses: HashMap<NodeId, NodeAddress>) {
        self.addresses.store(Arc::new(addresses));
        self.bump();
    }

    /// Where a node listens.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.addresses.load().get(&node).map(|known| known.address.clone())
    }

    /// True when a node listens at the address.
    pub fn is_address(&self, address: &str) -> bool {
        self.addresses.load().values().any(|known| known.address == address)
    }

    /// The topology of a keyspace as this node knows it.
    pub fn topology(&self, keyspace: KeyspaceId) -> Option<Topology> {
        let catalog = self.catalog(keyspace)?;
        let addresses = self.addresses.load();
        Some(Topology::derive(&catalog, |node| addresses.get(&node).cloned()))
    }

    /// The epoch of a keyspace as this node knows it.
    pub fn known_epoch(&self, keyspace: KeyspaceId) -> Epoch {
        self.catalogs.load().get(&keyspace).map(|catalog| catalog.epoch).unwrap_or_default()
    }

    /// True when the shard has a replica on this node by the known catalog, open or not.
    pub fn is_placed_here(&self, keyspace: KeyspaceId, shard: ShardId) -> bool {
        self.catalogs.load().get(&keyspace).is_some_and(|catalog| {
            catalog.members_on(self.node_id).iter().any(|(member, _, placed)| *member == shard && *placed)
        })
    }

    /// True when no other replica of the shard is placed by the known catalog.
    pub fn is_the_only_one(&self, keyspace: KeyspaceId, shard: ShardId) -> bool {
        let catalogs = self.catalogs.load();
        catalogs.get(&keyspace).and_then(|catalog| catalog.shard(shard)).is_none_or(|one| one.replicas.len() < 2)
    }

    /// Why the replica of the shard is not open here, if an attempt has failed.
    pub fn not_open(&self, keyspace: KeyspaceId, shard: ShardId) -> Option<String> {
        self.not_open.load().get(&(keyspace, shard)).cloned()
    }

    /// Notes why the replica of a shard is not open, or that it is to be tried again.
    pub fn set_not_open(&self, keyspace: KeyspaceId, shard: ShardId, reason: Option<String>) {
        let _one_at_a_time = self.update.lock();
        let mut next = HashMap::clone(&self.not_open.load());
        match reason {
            Some(reason) => drop(next.insert((keyspace, shard), reason)),
            None => drop(next.remove(&(keyspace, shard))),
        }
        self.not_open.store(Arc::new(next));
        self.bump();
    }

    /// True while clients' writes are refused for want of disk.
    pub fn is_disk_low(&self) -> bool {
        self.disk_low.load(Ordering::Relaxed)
    }

    /// Something goes on with a replica, as long as the answer lives.
    pub fn activity(&self) -> Arc<()> {
        self.active.clone()
    }

    /// True when nothing goes on with any replica.
    pub fn is_at_rest(&self) -> bool {
        Arc::strong_count(&self.active) == 1
    }

    /// Refuses clients' writes for want of disk, or takes them again.
    pub fn set_disk_low(&self, low: bool) {
        self.disk_low.store(low, Ordering::Relaxed);
    }

    /// What keeps the node from doing all of its work; nothing when all is well.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Tells it.
    pub fn set_trouble(&self, trouble: Option<String>) {
        self.trouble.send_if_modified(|told| {
            let news = *told != trouble;
            *told = trouble;
            news
        });
    }

    /// Changes of anything above.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}
