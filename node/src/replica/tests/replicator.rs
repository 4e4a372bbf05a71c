//! Replication duties of a replica, between nodes that reach each other over real connections.

use std::sync::Arc;
use std::time::Duration;

use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use vasto_core::catalog::{Ack, Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, Epoch, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::reconcile::evict;
use vasto_core::record::{BandRange, RangeState};
use vasto_core::topology::NodeAddress;
use vasto_core::{Band, ErrorCode};
use vasto_proto::v1::replication_server::ReplicationServer;

use super::support::*;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, OpKind, Role, WriteOp};
use crate::replica::throttle::Moving;
use crate::replication::ReplicationService;
use crate::replication::replicator::Replicator;

/// Returns the catalog of one shard on the nodes 1 to `nodes`, whose replicas have the same
/// numbers.
pub(crate) fn shard_on(nodes: u64) -> Catalog {
    let spec = KeyspaceSpec { replicas: nodes as u32, ..KeyspaceSpec::default() };
    Catalog::first(KEYSPACE, "ks", spec, &[(1..=nodes).map(NodeId).collect()], START_US, 1)
}

/// A node with the replica of the same number.
pub(crate) struct Member {
    pub rig: Rig,
    pub replica: Replica,
    pub registry: Arc<NodeRegistry>,
    pub replicator: Arc<Replicator>,
    pub cancel: CancellationToken,
}

impl Member {
    pub(crate) fn new(id: u64) -> Self {
        let rig = Rig::of(ShardId(0), ReplicaId(id), 1, RangeState::Owned);
        let replica = rig.create();
        Self::of(rig, replica)
    }

    pub(crate) fn of(rig: Rig, replica: Replica) -> Self {
        let registry = Arc::new(NodeRegistry::new(NodeId(replica.id.0), rig.clock.clone(), 2));
        registry.add_replica(replica.clone());
        let cancel = CancellationToken::new();
        let replicator =
            Replicator::new(registry.clone(), Arc::default(), replica.clone(), cancel.clone());
        Self { rig, replica, registry, replicator, cancel }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Serves requests of other nodes; ends with the test's runtime.
pub(crate) async fn serve(registry: &Arc<NodeRegistry>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = ReplicationServer::new(ReplicationService::new(registry.clone(), None));
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    address
}

/// Creates the nodes 1 to `count`, each of which knows the addresses of the others. No node pulls
/// yet.
pub(crate) async fn members(count: u64) -> Vec<Member> {
    let members: Vec<Member> = (1..=count).map(Member::new).collect();
    connect(&members).await;
    members
}

async fn connect(members: &[Member]) {
    let mut addresses = std::collections::HashMap::new();
    for member in members {
        let address = NodeAddress { address: serve(&member.registry).await, zone: String::new() };
        addresses.insert(member.registry.node_id, address);
    }
    for member in members {
        member.registry.set_addresses(addresses.clone());
    }
}

/// The process stalled, and before the replica is notified it has no peer left to wait for, or is
/// not placed yet.
#[tokio::test]
async fn after_a_pause_a_replica_that_has_nobody_to_wait_for_serves() {
    let member = Member::new(1);
    let catalog_of_two = shard_on(2);
    member.replicator.follow(&catalog_of_two);
    let alone = evict(&catalog_of_two, ReplicaId(2), true, START_US, 2).unwrap();
    let elsewhere = evict(&catalog_of_two, ReplicaId(1), false, START_US, 2).unwrap();
    for catalog in [alone, elsewhere] {
        member.replicator.follow(&catalog_of_two);
        member.registry.stop_serving_what_has_peers();
        assert!(!member.replica.is_ready());
        member.replicator.follow(&catalog);
        member.replicator.begin_to_catch_up(&catalog);
        assert!(member.replica.is_ready());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_member_catches_up_with_the_others() {
    let all = members(2).await;
    let (old, new) = (&all[0], &all[1]);
    for n in 0..50 {
        write_one(&old.replica, put(&format!("k{n}"), "v"));
    }
    let catalog = shard_on(2);
    new.replicator.begin_to_catch_up(&catalog);
    assert!(!new.replica.is_ready());
    new.replicator.follow(&catalog);
    until("the new member to serve", || new.replica.is_ready()).await;
    assert!(new.replica.covers(&old.replica.vector()));
}

fn add(key: &str, addend: i64) -> WriteOp {
    WriteOp { change: OpKind::AddI64(addend), ..put(key, "") }
}

fn apply_catalog(member: &Member, epoch: u64, role: Role) {
    let order = Control::ApplyCatalog { epoch: Epoch(epoch), version: CatalogVersion(epoch), role };
    control(&member.replica, order).unwrap();
}

/// The primary is cut off from the master but not from the next primary, and its clock is ahead:
/// its increments of the old value win over those of the next primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_increment_that_loses_at_the_one_who_confirms_it_is_not_acknowledged() {
    let all = members(2).await;
    let (cut_off, next) = (&all[0], &all[1]);
    let catalog = shard_on(2);
    apply_catalog(cut_off, 1, Role::Primary);
    apply_catalog(next, 2, Role::Primary);
    cut_off.rig.clock.set(START_US + 2_000_000);
    write_one(&cut_off.replica, add("c", 10));
    // The old primary follows the next one, which does not pull from the old one yet.
    next.replica.followers().expect([ReplicaId(1)], [ReplicaId(1)]);
    let loses = send(&next.replica, vec![add("c", 1)], Ack::Replica);
    cut_off.replicator.follow(&catalog);
    assert_eq!(loses.recv_timeout(DEADLINE).unwrap().unwrap_err().code, ErrorCode::Unknown);
    let stands = send(&next.replica, vec![add("other", 1)], Ack::Replica);
    assert!(stands.recv_timeout(DEADLINE).unwrap().is_ok());
    // A plain put that loses is simply superseded.
    let put = send(&next.replica, vec![put("c", "0")], Ack::Replica);
    assert!(put.recv_timeout(DEADLINE).unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hears_of_a_higher_epoch_modifies_nothing_before_it_has_applied_it() {
    let all = members(2).await;
    let (old, next) = (&all[0], &all[1]);
    apply_catalog(old, 1, Role::Primary);
    apply_catalog(next, 1, Role::Secondary);
    next.replicator.follow(&shard_on(2));
    let covered = || old.replica.followers().anybody_covers(old.replica.applied_lsn());
    old.replica.followers().expect([ReplicaId(2)], [ReplicaId(2)]);
    until("the next primary to have everything", covered).await;
    write_one(&old.replica, add("c", 1));
    apply_catalog(next, 2, Role::Primary);
    let refused = || {
        try_write(&old.replica, vec![add("c", 1)])
            .is_err_and(|error| error.code == ErrorCode::NotPrimary)
    };
    until("the old primary to have heard of the next epoch", refused).await;
    write_one(&old.replica, put("any", "replica takes puts"));
    apply_catalog(old, 2, Role::Primary);
    write_one(&old.replica, add("c", 1));
}

/// The targets of a resize read the log of the source up to its seal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_peer_took_before_its_own_seal_is_in_the_log_of_the_source_up_to_its_seal() {
    let all = members(2).await;
    let (source, peer) = (&all[0], &all[1]);
    let catalog = Arc::new(shard_on(2));
    apply_catalog(source, catalog.version.0, Role::Primary);
    apply_catalog(peer, catalog.version.0, Role::Secondary);
    let range = Band::owned(1).into();
    let seal = |member: &Member| {
        let (plan, version) = (PlanId(1), catalog.version);
        control(&member.replica, Control::Seal { plan, version, range }).unwrap()
    };
    write_one(&peer.replica, put("before", "v"));
    let own = seal(source);
    let waiting = tokio::spawn({
        let (replicator, catalog) = (source.replicator.clone(), catalog.clone());
        async move { replicator.sealed_by_all(&catalog).await }
    });
    write_one(&peer.replica, put("after the seal of the source", "v"));
    seal(peer);
    let waits = send(&peer.replica, vec![put("after its own", "v")], Ack::Fsync);
    source.replicator.follow(&catalog);
    let sealed = waiting.await.unwrap().unwrap();
    assert!(sealed > own);
    let all_records = records(&source.replica);
    let read = all_records.iter().filter(|record| record.lsn <= sealed);
    let keys: Vec<String> = read.flat_map(data_keys).collect();
    for key in ["before", "after the seal of the source"] {
        assert!(keys.iter().any(|read| read == key), "{key}: {keys:?}");
    }
    assert!(waits.recv_timeout(Duration::ZERO).is_err(), "a sealed replica takes nothing");
}

/// What is written to other keys behind the seals is synced by itself: nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_held_everything_at_its_seal_names_that_seal_and_waits_for_no_disk() {
    let all = members(2).await;
    let (source, peer) = (&all[0], &all[1]);
    let catalog = Arc::new(shard_on(2));
    apply_catalog(source, catalog.version.0, Role::Primary);
    apply_catalog(peer, catalog.version.0, Role::Secondary);
    write_one(&peer.replica, put("before", "v"));
    source.replicator.follow(&catalog);
    until("the source to have it", || source.replica.covers(&peer.replica.vector())).await;
    let range = BandRange { first: Band(1), last: Band(1) };
    let sealed = [peer, source].map(|member| {
        let (plan, version) = (PlanId(1), catalog.version);
        control(&member.replica, Control::Seal { plan, version, range }).unwrap()
    });
    let syncs = Some([peer, source].map(|member| member.replica.log().hold_syncs()));
    let staying = keys_in(Band(2), "s", 1).remove(0);
    for member in [peer, source] {
        let written = send(&member.replica, vec![put(&staying, "behind")], Ack::Os);
        written.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    let named = async {
        loop {
            // It gives up after a second, on a busy machine in vain.
            if let Some(lsn) = source.replicator.sealed_by_all(&catalog).await {
                return lsn;
            }
        }
    };
    let named = tokio::time::timeout(DEADLINE, named).await;
    drop(syncs);
    assert_eq!(named.unwrap(), sealed[1]);
}

/// Its writes come to the log of the source, and count there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_hears_how_far_the_source_slows_writers_down() {
    let all = members(2).await;
    let (source, other) = (&all[0], &all[1]);
    let catalog = shard_on(2);
    let moving = Moving { range: Band::owned(1).into(), bytes_per_s: Some(7_000_000) };
    source.replica.throttle().set(Some(moving));
    source.replicator.follow(&catalog);
    other.replicator.follow(&catalog);
    write_one(&source.replica, put("k", "v"));
    let rate = || other.replica.throttle().rate_of(source.replica.id);
    until("the rate to be heard", || rate() == moving.bytes_per_s).await;
    let taken = source.replica.throttle().taken();
    write_one(&other.replica, put("other", "v"));
    until("a write at the follower to count", || source.replica.throttle().taken() > taken).await;
    source.replica.throttle().set(None);
    write_one(&source.replica, put("k", "later"));
    until("the rate to be taken back", || rate().is_none()).await;
}

/// A replica serves replication in every state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_replica_is_pulled_and_drained() {
    let all = members(2).await;
    let (closed, other) = (&all[0], &all[1]);
    for n in 0..10 {
        write_one(&closed.replica, put(&format!("k{n}"), "v"));
    }
    let settled = closed.replica.vector();
    send(&closed.replica, vec![put("not synced", "v")], Ack::Os)
        .recv_timeout(DEADLINE)
        .unwrap()
        .unwrap();
    closed.replica.close("the disk is broken".into());
    let catalog = evict(&shard_on(2), ReplicaId(1), false, START_US, 2).unwrap();
    other.replicator.follow(&catalog);
    closed.replicator.follow(&catalog);
    closed.replicator.detach().await.unwrap();
    until("it to be drained", || closed.replicator.report().drained).await;
    assert!(other.replica.covers(&settled));
    assert!(!other.replicator.report().too_old);
}

#[tokio::test]
async fn the_lag_behind_a_peer_that_cannot_be_reached_grows() {
    let member = Member::new(1);
    member.replicator.follow(&shard_on(2));
    until("the lag to grow", || member.replicator.report().lag_ms > 50).await;
}

/// A directory was restored from a copy, and the peers were away when it was opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_that_learns_of_it_by_a_pull_closes() {
    let rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned);
    let first = rig.create();
    let (_dir, copy) = rig.crash(&first);
    rig.close(first);
    let real = rig.open(&rig.path, false).unwrap();
    assert_eq!(real.incarnation(), copy.incarnation());
    for n in 0..5 {
        write_one(&real, put(&format!("k{n}"), "v"));
    }
    let other = Member::new(2);
    let streamed: Vec<_> =
        records(&real).into_iter().filter(|record| record.body.is_streamed()).collect();
    let last = streamed.last().unwrap().lsn;
    other.replica.replicate(ReplicaId(1), streamed, last).await.unwrap();
    let all = [Member::of(rig, copy), other];
    connect(&all).await;
    all[0].replicator.follow(&shard_on(2));
    until("the copy to close", || all[0].replica.closed().is_some()).await;
    assert!(all[0].replica.closed().unwrap().contains("old copy"));
}

/// The clock of an origin advances by a day between two records of one incarnation.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_was_idle_for_a_day_goes_on() {
    let all = members(3).await;
    let catalog = shard_on(3);
    all.iter().for_each(|member| member.replicator.follow(&catalog));
    let agree = || all.iter().all(|member| member.replica.vector() == all[0].replica.vector());
    for n in 0..20 {
        write_one(&all[n % 3].replica, put(&format!("k{n}"), "v"));
    }
    write_one(&all[1].replica, delete("k7"));
    until("all to hold the same", agree).await;
    let incarnations: Vec<_> = all.iter().map(|member| member.replica.incarnation()).collect();
    all.iter().for_each(|member| member.rig.clock.set(START_US + 86_400_000_000));
    write_one(&all[0].replica, put("k1", "a day later"));
    write_one(&all[2].replica, delete("k2"));
    until("all to hold the same", agree).await;
    for member in &all {
        assert_eq!(get(&member.replica, "k1").as_deref(), Some("a day later"));
        assert_eq!((get(&member.replica, "k2"), get(&member.replica, "k7")), (None, None));
        assert_eq!(get(&member.replica, "k3").as_deref(), Some("v"));
        assert_eq!(data_rows(&member.replica), data_rows(&all[0].replica));
    }
    assert_eq!(
        all.iter().map(|member| member.replica.incarnation()).collect::<Vec<_>>(),
        incarnations
    );
}

/// The second of three replicas keeps taking writes: its records prove nothing about the third.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_peer_named_is_given_up_although_others_write() {
    let all = members(3).await;
    let (restarted, writing, dying) = (&all[0], &all[1], &all[2]);
    write_one(&dying.replica, put("only here", "v"));
    let catalog = shard_on(3);
    restarted.replicator.begin_to_catch_up(&catalog);
    // Both peers have answered once the replica waits for what the third one named.
    until("the catch-up to begin", || !restarted.replica.is_ready()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // The third replica dies: nothing listens at its address any more.
    let mut addresses = std::collections::HashMap::new();
    for member in &all[..2] {
        addresses.insert(
            member.registry.node_id,
            NodeAddress { address: serve(&member.registry).await, zone: String::new() },
        );
    }
    addresses.insert(NodeId(3), NodeAddress { address: "127.0.0.1:1".into(), zone: String::new() });
    all.iter().for_each(|member| member.registry.set_addresses(addresses.clone()));
    restarted.replicator.follow(&catalog);
    let began = std::time::Instant::now();
    let mut n = 0;
    while began.elapsed() < Duration::from_secs(15) && !restarted.replica.is_ready() {
        n += 1;
        write_one(&writing.replica, put(&format!("k{n}"), "v"));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(restarted.replica.is_ready(), "it does not serve as long as others write");
}

/// A record is streamed as soon as it is synced, and applied after that: a peer may be ahead of its
/// origin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_database_stalls_is_no_old_copy() {
    let mut rig = Rig::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned);
    rig.shared = crate::engine::EngineShared::new(crate::engine::EngineBudget {
        cache_bytes: 8 << 20,
        write_buffer_bytes: 2 << 20,
        background_jobs: 2,
        rate_limit: 256 << 10,
    });
    let replica = rig.create();
    let all = [Member::of(rig, replica), Member::new(2)];
    connect(&all).await;
    let (slow, other) = (&all[0], &all[1]);
    let catalog = shard_on(2);
    other.replicator.follow(&catalog);
    let mut seed = 88_172_645_463_325_252u64;
    let answers: Vec<_> = (0..200)
        .map(|n| {
            let noise: String = (0..64 << 10)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    char::from(b'0' + (seed >> 32) as u8 % 64)
                })
                .collect();
            send(&slow.replica, vec![put(&format!("k{n}"), &noise)], Ack::Fsync)
        })
        .collect();
    until("a record to be synced and sent that is not applied", || {
        let own = vasto_core::ids::Origin {
            replica: ReplicaId(1),
            incarnation: slow.replica.incarnation(),
        };
        let have = |member: &Member| member.replica.vector().get(&own).copied().unwrap_or_default();
        have(other) > have(slow)
    })
    .await;
    // The slow replica catches up again.
    slow.replicator.begin_to_catch_up(&catalog);
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) && slow.replica.closed().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(answers);
    assert_eq!(slow.replica.closed(), None);
}
