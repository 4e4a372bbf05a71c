//! Nodes whose replicas are sealed while no master tells them anything: they find the decision in
//! the bucket, or undo the seal.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vasto_core::ErrorCode;
use vasto_core::catalog::{Ack, Catalog, KeyspaceSpec, Placed, ShardPlacement};
use vasto_core::ids::{CatalogVersion, Epoch, NodeId, ReplicaId, ShardId};
use vasto_core::limits::{BINLOG_BYTES_MAX, SEAL_UNDECIDED};
use vasto_core::plan::{Plan, Step};
use vasto_core::reconcile::{start_resize, undo_seal};
use vasto_core::record::RangeState;
use vasto_shipping::bucket::Bucket;
use vasto_shipping::{CatalogStore, CatalogWrite};
use vasto_testkit::faulty::{Call, Fault, Faulty};

use super::support::*;
use crate::clock::{SharedClock, SystemClock};
use crate::host::HostContext;
use crate::manager::Manager;
use crate::node_dir::{DirError, NodeDir};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::ship::Pace;
use crate::undecided;

/// A node without a session, which looks after its seals.
struct Member {
    registry: Arc<NodeRegistry>,
    manager: Arc<Manager>,
    cancel: CancellationToken,
    looks: JoinHandle<()>,
}

impl Member {
    /// Starts the node of a directory on what it remembers.
    async fn start(id: u64, path: &Path, bucket: Bucket) -> Self {
        let mut opened = None;
        until("the directory to be free", || match NodeDir::open(path, NodeId(id)) {
            Ok(dir) => opened.replace(dir).is_none(),
            Err(DirError::Locked(_)) => false,
            Err(error) => panic!("{error}"),
        })
        .await;
        let dir = Arc::new(Mutex::new(opened.unwrap()));
        let clock: SharedClock = Arc::new(SystemClock::default());
        let registry = Arc::new(NodeRegistry::new(NodeId(id), clock.clone(), 2));
        let context = HostContext {
            registry: registry.clone(),
            engines: small_engine(),
            bucket: bucket.clone(),
            ship_interval: Duration::from_secs(3600),
            clock,
            peers: Arc::default(),
            leases: None,
            log_cap: BINLOG_BYTES_MAX,
            pace: Arc::new(Pace::new(0)),
        };
        let manager = Arc::new(Manager::new(Arc::new(context), dir.clone(), 8));
        let (remembered, damaged) = dir.lock().catalogs().unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        for catalog in remembered {
            manager.apply_catalog(Arc::new(catalog), true).await.unwrap();
        }
        let cancel = CancellationToken::new();
        let looks = undecided::run(registry.clone(), manager.clone(), bucket, cancel.clone());
        Self { registry, manager, cancel, looks: tokio::spawn(looks) }
    }

    async fn apply(&self, catalog: &Catalog) {
        self.manager.apply_catalog(Arc::new(catalog.clone()), false).await.unwrap();
    }

    fn version(&self) -> u64 {
        self.registry.catalog(KEYSPACE).map_or(0, |catalog| catalog.version.0)
    }

    async fn replica(&self, id: u64) -> Replica {
        let find = || self.registry.replica(KEYSPACE, ReplicaId(id));
        until("the replica to serve", || find().is_some_and(|replica| replica.is_ready())).await;
        find().unwrap()
    }

    /// Applies the version that seals, and waits for the seal.
    async fn seal(&self, sealing: &Catalog, replica: &Replica) {
        self.apply(sealing).await;
        until("the seal", || replica.ranges().seal.is_some()).await;
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.looks.await.unwrap();
        self.manager.stop().await;
    }
}

/// Returns a keyspace with one shard on each of these nodes.
fn keyspace(nodes: u64) -> Catalog {
    let spec = KeyspaceSpec { shards: nodes as u32, ..KeyspaceSpec::default() };
    let nodes: Vec<Vec<NodeId>> = (1..=nodes).map(|node| vec![NodeId(node)]).collect();
    Catalog::first(KEYSPACE, "ks", spec, &nodes, START_US, 1)
}

/// Returns the version that seals for one shard more, on a node that is not there.
fn sealing(first: &Catalog) -> Catalog {
    let to = first.spec.shards + 1;
    let mut next = start_resize(first, to, &[vec![NodeId(9)]], START_US, 2).unwrap();
    next.plan.as_mut().unwrap().step = Step::Sealing;
    next
}

/// Returns the version that commits.
fn committed(sealing: &Catalog) -> Catalog {
    let mut next = sealing.next(START_US + 1, 3);
    let plan = next.plan.as_mut().unwrap();
    plan.step = Step::Committed;
    let target = plan.targets[0];
    next.epoch = Epoch(sealing.epoch.0 + 1);
    next.spec.shards += 1;
    let placed = Placed { replica: target.replica, node: target.node };
    next.placement.push(ShardPlacement::new(target.shard, vec![placed]));
    next
}

fn plan(catalog: &Catalog) -> &Plan {
    catalog.plan.as_ref().unwrap()
}

/// Returns a key that moves from shard 0.
fn moving(sealing: &Catalog) -> String {
    keys_in(plan(sealing).leaving().unwrap().first, "m", 1).remove(0)
}

async fn write_all(store: &CatalogStore, versions: &[&Catalog]) {
    for version in versions {
        assert_eq!(store.write(version).await.unwrap(), CatalogWrite::Won);
    }
}

async fn version(store: &CatalogStore, number: u64) -> Option<Catalog> {
    store.version(KEYSPACE, CatalogVersion(number)).await.unwrap()
}

/// A node that serves the only shard of a keyspace, and the bucket, which knows more than the node.
struct Scene {
    bucket: Arc<Faulty>,
    store: CatalogStore,
    /// The version that seals; the node has not heard of it.
    sealed: Catalog,
    node: Member,
    replica: Replica,
    // Last: the node is in it.
    dir: TempDir,
}

impl Scene {
    /// The bucket holds the version that seals.
    async fn start() -> Self {
        Self::with_stored(|sealed| vec![sealed.clone()]).await
    }

    /// The bucket holds these versions behind the first one, given the version that seals.
    async fn with_stored(stored: impl FnOnce(&Catalog) -> Vec<Catalog>) -> Self {
        let (bucket, dir) = (Faulty::in_memory(), memory_dir());
        let store = CatalogStore::new(bucket.without_faults());
        let first = keyspace(1);
        let sealed = sealing(&first);
        let stored = stored(&sealed);
        let versions: Vec<&Catalog> = std::iter::once(&first).chain(&stored).collect();
        write_all(&store, &versions).await;
        let node = Member::start(1, dir.path(), bucket.bucket()).await;
        node.apply(&first).await;
        let replica = node.replica(1).await;
        Self { bucket, store, sealed, node, replica, dir }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seal_that_nobody_decides_is_undone_by_the_node_and_waiting_writes_go_on() {
    // The version in the bucket counts, not the one that the node was told.
    let kept = |told: &Catalog| Catalog { pins: vec!["kept".into()], ..told.clone() };
    let scene = Scene::with_stored(|told| vec![kept(told)]).await;
    let Scene { store, sealed: told, node, replica, .. } = scene;
    let (stored, key) = (kept(&told), moving(&told));
    let began = Instant::now();
    node.seal(&told, &replica).await;
    let waiting = send(&replica, vec![put(&key, "waited")], Ack::Fsync);
    tokio::time::sleep(SEAL_UNDECIDED - Duration::from_millis(300)).await;
    if began.elapsed() < SEAL_UNDECIDED {
        assert_eq!(version(&store, 3).await, None, "a master still has time");
    }
    until("the seal to be undone", || replica.ranges().seal.is_none()).await;
    let answer = tokio::task::spawn_blocking(move || waiting.recv_timeout(DEADLINE));
    match answer.await.unwrap().unwrap() {
        Ok(_) => assert_eq!(get(&replica, &key).as_deref(), Some("waited")),
        Err(error) => assert_eq!(error.code, ErrorCode::NodeBehind, "on a busy machine"),
    }
    let undone = version(&store, 3).await.unwrap();
    assert!(undone.written_at_us >= stored.written_at_us + SEAL_UNDECIDED.as_micros() as u64);
    assert_eq!(undone, undo_seal(&stored, plan(&stored), undone.written_at_us, undone.nonce));
    assert_eq!(*node.registry.catalog(KEYSPACE).unwrap(), undone);
    let again = replica.clone();
    tokio::task::spawn_blocking(move || write_one(&again, put(&key, "v"))).await.unwrap();
    assert_eq!(version(&store, 4).await, None);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_no_master_tells_of_is_found_and_never_undone() {
    let scene = Scene::with_stored(|sealed| vec![sealed.clone(), committed(sealed)]).await;
    let Scene { store, sealed, node, replica, .. } = scene;
    node.seal(&sealed, &replica).await;
    let range = plan(&sealed).leaving().unwrap();
    until("the keys to be given away", || replica.ranges().all_are(range, RangeState::Leaving))
        .await;
    let late = replica.clone();
    let key = moving(&sealed);
    let answer = tokio::task::spawn_blocking(move || try_write(&late, vec![put(&key, "late")]));
    assert_eq!(answer.await.unwrap().unwrap_err().code, ErrorCode::WrongEpoch);
    assert_eq!((node.version(), version(&store, 4).await), (3, None));
    node.stop().await;
}

/// Writers wait for the decision, not for the disk that is to remember it; and a crash in between
/// leaves a node that finds it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_writes_are_sent_on_before_the_node_remembers_the_commit() {
    let (bucket, dir) = (Faulty::in_memory(), memory_dir());
    let store = CatalogStore::new(bucket.without_faults());
    let first = keyspace(1);
    let sealed = sealing(&first);
    let decided = committed(&sealed);
    let range = plan(&sealed).leaving().unwrap();
    write_all(&store, &[&first, &sealed, &decided]).await;
    let node = Member::start(1, dir.path(), bucket.bucket()).await;
    node.apply(&first).await;
    let replica = node.replica(1).await;
    node.seal(&sealed, &replica).await;
    let key = moving(&sealed);
    let waiting = send(&replica, vec![put(&key, "waited")], Ack::Fsync);
    let in_the_way = dir.path().join("catalog").join(format!("{KEYSPACE}.json.part"));
    std::fs::create_dir(&in_the_way).unwrap();
    let told = node.manager.apply_catalog(Arc::new(decided.clone()), false).await;
    assert!(matches!(told, Err(DirError::Io { .. })), "{told:?}");
    let answer = tokio::task::spawn_blocking(move || waiting.recv_timeout(DEADLINE));
    assert_eq!(answer.await.unwrap().unwrap().unwrap_err().code, ErrorCode::WrongEpoch);
    assert_eq!(
        node.registry.topology(KEYSPACE).unwrap().epoch,
        decided.epoch,
        "they hear where to"
    );
    until("the keys to be given away", || replica.ranges().all_are(range, RangeState::Leaving))
        .await;
    drop(replica);
    node.stop().await;
    std::fs::remove_dir(&in_the_way).unwrap();
    let node = Member::start(1, dir.path(), bucket.bucket()).await;
    let replica = node.replica(1).await;
    until("the commit to be found", || node.version() == decided.version.0).await;
    assert!(
        replica.ranges().all_are(range, RangeState::Leaving) && replica.ranges().seal.is_none()
    );
    let late = tokio::task::spawn_blocking(move || try_write(&replica, vec![put(&key, "late")]));
    assert_eq!(late.await.unwrap().unwrap_err().code, ErrorCode::WrongEpoch);
    node.stop().await;
}

/// A version that moves nothing of a replica waits for the disk as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sealed_before_the_node_remembers_why() {
    let (bucket, dir) = (Faulty::in_memory(), memory_dir());
    let first = keyspace(1);
    let node = Member::start(1, dir.path(), bucket.bucket()).await;
    node.apply(&first).await;
    let replica = node.replica(1).await;
    let in_the_way = dir.path().join("catalog").join(format!("{KEYSPACE}.json.part"));
    std::fs::create_dir(&in_the_way).unwrap();
    let sealed = sealing(&first);
    let told = node.manager.apply_catalog(Arc::new(sealed.clone()), false).await;
    assert!(told.is_err());
    // Its host has heard of the version meanwhile.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let key = moving(&sealed);
    let writer = replica.clone();
    tokio::task::spawn_blocking(move || write_one(&writer, put(&key, "v"))).await.unwrap();
    assert!(replica.ranges().seal.is_none());
    std::fs::remove_dir(&in_the_way).unwrap();
    drop(replica);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sealed_nodes_write_one_version_and_both_apply_it() {
    let (bucket, dirs) = (Faulty::in_memory(), [memory_dir(), memory_dir()]);
    let store = CatalogStore::new(bucket.without_faults());
    let first = keyspace(2);
    let sealed = sealing(&first);
    write_all(&store, &[&first, &sealed]).await;
    let mut members = Vec::new();
    for (id, dir) in (1..).zip(&dirs) {
        let node = Member::start(id, dir.path(), bucket.bucket()).await;
        node.apply(&first).await;
        let replica = node.replica(id).await;
        members.push((node, replica));
    }
    for (node, replica) in &members {
        node.seal(&sealed, replica).await;
    }
    for (node, replica) in &members {
        until("the seal to be undone", || replica.ranges().seal.is_none()).await;
        assert_eq!(*node.registry.catalog(KEYSPACE).unwrap(), version(&store, 3).await.unwrap());
    }
    assert_eq!(version(&store, 4).await, None);
    for (node, _) in members {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_bucket_is_away_the_seal_stays_and_the_node_says_so() {
    let scene = Scene::start().await;
    let Scene { bucket, store, sealed, node, replica, .. } = scene;
    bucket.go_down();
    node.seal(&sealed, &replica).await;
    until("a warning", || !node.registry.undecided().is_empty()).await;
    let warning = node.registry.undecided().join("\n");
    for part in ["keyspace ks", "version 2", "not served"] {
        assert!(warning.contains(part), "{warning}");
    }
    assert!(replica.ranges().seal.is_some(), "nothing is opened on a guess");
    assert_eq!(version(&store, 3).await, None);
    bucket.heal();
    until("the seal to be undone", || replica.ranges().seal.is_none()).await;
    until("the warning to end", || node.registry.undecided().is_empty()).await;
    assert_eq!(plan(&version(&store, 3).await.unwrap()).step, Step::Tail);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_with_another_history_is_not_believed() {
    // The same number and plan, written by somebody else, who has gone on.
    let foreign = |sealed: &Catalog| Catalog { nonce: 77, ..sealed.clone() };
    let scene = Scene::with_stored(|told| vec![foreign(told), committed(&foreign(told))]).await;
    let Scene { store, sealed, node, replica, .. } = scene;
    node.seal(&sealed, &replica).await;
    until("a warning", || !node.registry.undecided().is_empty()).await;
    assert_eq!(node.version(), 2);
    assert!(replica.ranges().seal.is_some(), "nothing is opened on a guess");
    assert_eq!(version(&store, 4).await, None);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undo_with_an_unknown_outcome_is_settled_by_the_bucket() {
    for fault in [Fault::UnknownAfter, Fault::UnknownBefore, Fault::ResetAfter] {
        let scene = Scene::start().await;
        let Scene { bucket, store, sealed, node, replica, .. } = scene;
        node.seal(&sealed, &replica).await;
        let hit = bucket.hit();
        bucket.fail(Call::Put, fault, 2);
        until("the seal to be undone", || replica.ranges().seal.is_none()).await;
        assert!(bucket.hit() > hit, "{fault:?} has not happened");
        assert_eq!(
            *node.registry.catalog(KEYSPACE).unwrap(),
            version(&store, 3).await.unwrap(),
            "{fault:?}"
        );
        assert_eq!(version(&store, 4).await, None, "{fault:?}");
        node.stop().await;
    }
}

/// The bucket answers reads and takes no write: an undoing that failed may never have arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undo_that_may_not_have_been_written_is_not_applied() {
    let scene = Scene::start().await;
    let Scene { bucket, store, sealed, node, replica, .. } = scene;
    bucket.fail(Call::Put, Fault::UnknownBefore, u32::MAX);
    node.seal(&sealed, &replica).await;
    until("the write to fail", || {
        !node.registry.undecided().is_empty() || node.version() > sealed.version.0
    })
    .await;
    assert_eq!((node.version(), version(&store, 3).await), (2, None));
    assert!(replica.ranges().seal.is_some(), "nothing is opened on a guess");
    bucket.heal();
    until("the seal to be undone", || replica.ranges().seal.is_none()).await;
    assert_eq!(*node.registry.catalog(KEYSPACE).unwrap(), version(&store, 3).await.unwrap());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarts_sealed_looks_at_once_and_undoes_no_sooner() {
    for decided in [true, false] {
        let Scene { bucket, store, sealed, node, replica, dir } = Scene::start().await;
        node.seal(&sealed, &replica).await;
        drop(replica);
        node.stop().await;
        if decided {
            write_all(&store, &[&undo_seal(&sealed, plan(&sealed), START_US + 5, 9)]).await;
        }
        let began = Instant::now();
        let node = Member::start(1, dir.path(), bucket.bucket()).await;
        until("the next version", || node.version() == 3).await;
        assert_eq!(began.elapsed() < SEAL_UNDECIDED, decided, "{:?}", began.elapsed());
        let replica = node.replica(1).await;
        until("the seal to be undone", || replica.ranges().seal.is_none()).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_sealed_reads_the_decision_and_writes_none() {
    let (bucket, dir) = (Faulty::in_memory(), memory_dir());
    let store = CatalogStore::new(bucket.without_faults());
    let first = keyspace(2);
    let sealed = sealing(&first);
    let mut tail = sealed.clone();
    tail.plan.as_mut().unwrap().step = Step::Tail;
    // This node is to hold the new shard, and has not heard of the seal.
    let target = |catalog: &Catalog| {
        let mut catalog = catalog.clone();
        catalog.plan.as_mut().unwrap().targets[0].node = NodeId(3);
        catalog
    };
    let (tail, sealed) = (target(&tail), target(&sealed).next(START_US, 4));
    write_all(&store, &[&first, &tail, &sealed]).await;
    let node = Member::start(3, dir.path(), bucket.bucket()).await;
    node.apply(&tail).await;
    tokio::time::sleep(SEAL_UNDECIDED + Duration::from_secs(1)).await;
    assert_eq!((node.version(), version(&store, 4).await), (2, None), "it waits for the sources");
    let decided = committed(&sealed);
    write_all(&store, &[&decided]).await;
    until("the commit", || node.version() == 4).await;
    assert_eq!(decided.shard(ShardId(2)).unwrap().replicas[0].node, NodeId(3));
    node.stop().await;
}
