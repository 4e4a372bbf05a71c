//! A hosted replica and the catalog versions that it applies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{Epoch, NodeId, ReplicaId, ShardId};
use vasto_core::limits::BINLOG_BYTES_MAX;
use vasto_core::reconcile::evict;
use vasto_core::report::ReplicaPhase;

use super::replicator::shard_on;
use super::shipping::bucket;
use super::support::*;
use crate::caretaker::waits_for_disk;
use crate::clock::now_ms;
use crate::host::{Host, HostContext, ReplicaSpec};
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::Role;
use crate::ship::Pace;

/// A node that hosts replica 1 and cannot reach any peer.
pub(super) struct Hosted {
    rig: Rig,
    pub context: Arc<HostContext>,
    tmp: tempfile::TempDir,
}

impl Hosted {
    pub(super) fn new() -> Self {
        let rig = Rig::new();
        let registry = Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone(), 2));
        let context = HostContext {
            registry,
            engines: rig.shared.clone(),
            bucket: bucket(),
            ship_interval: Duration::from_secs(3600),
            clock: rig.clock.clone(),
            peers: Arc::default(),
            leases: None,
            log_cap: BINLOG_BYTES_MAX,
            pace: Arc::new(Pace::new(0)),
        };
        Self { rig, context: Arc::new(context), tmp: memory_dir() }
    }

    pub(super) fn start(&self, catalog: &Catalog) -> Host {
        self.start_as(catalog, ShardId(0), ReplicaId(1))
    }

    /// Hosts another replica instead.
    pub(super) fn start_as(&self, catalog: &Catalog, shard: ShardId, replica: ReplicaId) -> Host {
        let spec = ReplicaSpec {
            keyspace: KEYSPACE,
            shard,
            replica,
            dir: self.rig.path.clone(),
            tmp: self.tmp.path().to_owned(),
        };
        Host::start(self.context.clone(), spec, Arc::new(catalog.clone()))
    }

    pub(super) async fn replica(&self) -> Replica {
        self.opened(ReplicaId(1)).await
    }

    /// Waits until a replica is open.
    pub(super) async fn opened(&self, replica: ReplicaId) -> Replica {
        let opened = async {
            loop {
                match self.context.registry.replica(KEYSPACE, replica) {
                    Some(replica) => return replica,
                    // No pause: the replica is seen as early as others can see it.
                    None => tokio::task::yield_now().await,
                }
            }
        };
        tokio::time::timeout(DEADLINE, opened).await.unwrap()
    }
}

pub(super) fn left(catalog: &Catalog) -> Catalog {
    evict(catalog, ReplicaId(1), false, START_US, 2).unwrap()
}

pub(super) fn placed_again(catalog: &Catalog) -> Catalog {
    let mut next = catalog.next(START_US, 3);
    next.epoch = Epoch(catalog.epoch.0 + 1);
    next.draining.clear();
    next.placement[0].replicas.push(Placed { replica: ReplicaId(1), node: NodeId(1) });
    next
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_becomes_a_member_catches_up_before_it_serves() {
    let hosted = Hosted::new();
    let catalog = shard_on(2);
    let host = hosted.start(&catalog);
    let replica = hosted.replica().await;
    until("the replica to serve", || replica.is_ready() && replica.version() == catalog.version)
        .await;
    let outside = left(&catalog);
    host.apply_catalog(Arc::new(outside.clone()));
    until("it to leave", || replica.view().role == Role::Detached).await;
    let inside = placed_again(&outside);
    host.apply_catalog(Arc::new(inside.clone()));
    until("it to be a member", || replica.version() == inside.version).await;
    assert!(!replica.is_ready(), "its peer has not said what it holds");
    until("the silent peer to be skipped", || replica.is_ready()).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_left_is_at_no_moment_taken_for_the_primary() {
    for (catalog, role) in [(shard_on(2), Role::Primary), (left(&shard_on(2)), Role::Detached)] {
        let hosted = Hosted::new();
        let host = hosted.start(&catalog);
        assert_eq!(hosted.replica().await.view().role, role, "before it has applied anything");
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_stops_takes_nothing_more_and_waits_until_another_has_its_log() {
    let (hosted, catalog) = (Hosted::new(), shard_on(2));
    let host = hosted.start(&catalog);
    let replica = hosted.replica().await;
    until("the replica to serve", || replica.is_ready() && replica.version() == catalog.version)
        .await;
    write_one(&replica, put("k", "v"));
    let began = Instant::now();
    let stopping = tokio::spawn(host.stop());
    until("it to refuse requests", || !replica.is_ready()).await;
    assert!(replica.closed().is_none(), "others can read its log");
    stopping.await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1), "nobody had it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_stops_waits_no_longer_than_it_must() {
    for confirmed in [true, false] {
        let (hosted, catalog) = (Hosted::new(), shard_on(2));
        let host = hosted.start(&catalog);
        let replica = hosted.replica().await;
        until("the replica to serve", || {
            replica.is_ready() && replica.version() == catalog.version
        })
        .await;
        write_one(&replica, put("k", "v"));
        let (lsn, own_seq) = (replica.applied_lsn(), *replica.vector().values().last().unwrap());
        if confirmed {
            replica.followers().progress(ReplicaId(2), lsn, own_seq, Epoch(1));
            let stopping = tokio::spawn(host.stop());
            until("it to end", || replica.closed().is_some()).await;
            stopping.await.unwrap();
        } else {
            // The replica's files will be removed: it was drained, or given up.
            host.stop_to_discard().await;
            assert!(replica.is_ready());
        }
    }
}

/// The preferred primary is away: the acting primary ships as soon as a version names it, however
/// new that version is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_acts_for_the_home_ships_at_once() {
    let hosted = Hosted::new();
    let mut catalog = shard_on(2);
    catalog.placement[0].replicas.reverse();
    let host = hosted.start(&catalog);
    let replica = hosted.replica().await;
    until("the version to be applied", || replica.version() == catalog.version).await;
    assert!(host.shipper().is_none(), "the home does");
    catalog.placement[0].primary = Some(ReplicaId(1));
    catalog.version = vasto_core::ids::CatalogVersion(2);
    host.apply_catalog(Arc::new(catalog));
    until("it to ship", || host.shipper().is_some()).await;
    host.stop_to_discard().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarts_opens_its_replicas_a_few_at_a_time() {
    let hosted = Hosted::new();
    let turns = hosted.context.engines.opening.clone();
    let all = turns.clone().acquire_many_owned(turns.available_permits() as u32).await.unwrap();
    let host = hosted.start(&shard_on(1));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(host.report().phase, ReplicaPhase::Opening, "others have their turn");
    drop(all);
    let replica = hosted.replica().await;
    until("the turn to be given back", || turns.available_permits() > 0).await;
    drop(replica);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_nothing_to_do_has_no_thread() {
    let hosted = Hosted::new();
    let host = hosted.start(&shard_on(1));
    let replica = hosted.replica().await;
    until("its writer to give its thread back", || replica.commands.is_parked()).await;
    let wrote = tokio::task::spawn_blocking({
        let replica = replica.clone();
        move || write_one(&replica, put("k", "v"))
    });
    wrote.await.unwrap();
    assert_eq!(get(&replica, "k").as_deref(), Some("v"));
    until("its writer to give its thread back again", || replica.commands.is_parked()).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_does_not_answer_says_so() {
    let hosted = Hosted::new();
    let host = hosted.start(&shard_on(1));
    let replica = hosted.replica().await;
    until("its writer to give its thread back", || replica.commands.is_parked()).await;
    let reported = || waits_for_disk(&hosted.context.registry, now_ms()).collect::<Vec<_>>();
    assert_eq!(reported(), Vec::<String>::new());
    replica.shared.busy_since_ms.store(now_ms() - 2_000, Ordering::Release);
    assert_eq!(reported(), ["shard 0 of keyspace 7 waits for its disk"]);
    replica.shared.busy_since_ms.store(0, Ordering::Release);
    assert_eq!(reported(), Vec::<String>::new());
    host.stop().await;
}
