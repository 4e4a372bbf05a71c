//! The target of a resize: rewrite, one ingest, the tail; its content equals a straightforward
//! model.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use vasto_core::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::plan::{PinnedManifest, Plan, PlanKind, Source, Step, Target};
use vasto_core::record::{Body, RangeState};
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_core::stored_key::data_key;
use vasto_core::topology::NodeAddress;
use vasto_proto::v1;
use vasto_proto::v1::replication_server::{Replication, ReplicationServer};
use vasto_shipping::{Bucket, Chunk, Create, layout};

use super::shipping::{Shipping, bucket};
use super::support::*;
use crate::build::BuildError;
use crate::build::resize::Build;
use crate::bulk::BulkGate;
use crate::clock::SharedClock;
use crate::engine::TableSet;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, WriteOp};
use crate::target_trace::TargetTrace;

const SHARDS: u32 = 3;
const HOUR: Duration = Duration::from_secs(3600);
/// Records of a source behind what the bucket has of it.
const BEHIND: u64 = 5;
/// Time in which a target that goes on would read another chunk.
const SETTLES: Duration = Duration::from_millis(300);

/// Returns the shard of a key at this number of shards.
fn home(key: &str, shards: u32) -> u32 {
    jump(partition_hash(key.as_bytes()), shards).shard.0
}

/// Writes the keys of this source: old versions at the bottom level, newer ones and tombstones in
/// L0; the same user key under one partition here and another one in the other source.
fn load(replica: &Replica, round: &str) {
    let mine: Vec<String> = (0..600)
        .map(|i| format!("key{i}"))
        .filter(|key| home(key, SHARDS - 1) == replica.shard.0)
        .collect();
    let put_all = |value: &str, step: usize| {
        write(
            replica,
            mine.iter().step_by(step).map(|key| put(key, &format!("{value} {round}"))).collect(),
        );
    };
    put_all("oldest", 1);
    replica.engine().flush().unwrap();
    replica.engine().compact_all();
    put_all("newer", 3);
    write(replica, mine.iter().skip(1).step_by(4).map(|key| delete(key)).collect());
    replica.engine().flush().unwrap();
    put_all("newest", 7);
    for i in 0..60u64 {
        // A partition that belongs to this shard now and moves.
        let hash = (0u64..).map(|n| partition_hash(&(i * 1_000_000 + n).to_le_bytes()));
        let moves = |hash: &u64| {
            jump(*hash, SHARDS - 1).shard == replica.shard
                && jump(*hash, SHARDS).shard.0 == SHARDS - 1
        };
        let hash = { hash }.find(moves);
        write_one(replica, WriteOp { partition_hash: hash, ..put(&format!("twice{i}"), round) });
    }
}

/// Returns the rows that must be in the target: every row that moves, in its new band, merged by
/// bytes.
fn model(sources: &[&Replica]) -> Rows {
    let mut out = BTreeMap::new();
    for (stored, entry) in sources.iter().flat_map(|source| data_rows(source)) {
        let key = &stored[1..];
        let hash =
            Entry::decode(&entry).unwrap().partition_hash.unwrap_or_else(|| partition_hash(key));
        let to = jump(hash, SHARDS);
        if to.shard.0 == SHARDS - 1 {
            let held: &mut Vec<u8> =
                out.entry(data_key(Band::of_next_jump(to.next), key)).or_default();
            *held = entry.max(held.clone());
        }
    }
    out
}

struct Grow {
    sources: [(Rig, Replica); 2],
    bucket: Bucket,
    plan: Plan,
    /// Where the nodes of the sources listen; empty while the target cannot reach them.
    addresses: HashMap<NodeId, NodeAddress>,
}

type Frames<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;
type Answer<T> = std::result::Result<Response<T>, Status>;

/// What a source sends, or why not.
type Sent = std::result::Result<Frames<v1::TailFrame>, Status>;

/// A node whose sources send what the test says, by the number of a source and what its target has.
struct Sends<F>(F);

#[tonic::async_trait]
impl<F> Replication for Sends<F>
where
    F: Fn(u64, u64) -> Sent + Send + Sync + 'static,
{
    type TailStream = Frames<v1::TailFrame>;
    type PullStream = Frames<v1::PullFrame>;
    type LeaseStream = Frames<v1::LeaseReply>;

    async fn tail(&self, request: Request<v1::TailRequest>) -> Answer<Self::TailStream> {
        let request = request.get_ref();
        (self.0)(request.replica_id, request.after_lsn).map(Response::new)
    }

    async fn pull(&self, _: Request<Streaming<v1::PullMessage>>) -> Answer<Self::PullStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn lease(&self, _: Request<Streaming<v1::LeaseRequest>>) -> Answer<Self::LeaseStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn position(&self, _: Request<v1::PositionRequest>) -> Answer<v1::PositionReply> {
        Err(Status::unimplemented("not here"))
    }

    async fn promise(&self, _: Request<v1::PromiseRequest>) -> Answer<v1::PositionReply> {
        Err(Status::unimplemented("not here"))
    }
}

/// Returns a frame without rows of a source that has sent all it has.
fn frame(covered: u64, sealed: bool) -> v1::TailFrame {
    v1::TailFrame {
        records: Vec::new(),
        covered_lsn: covered,
        head_lsn: covered,
        lag_bytes: Some(0),
        sealed: Some(sealed),
    }
}

/// Serves requests of other nodes; ends with the test's runtime.
async fn listen(service: impl Replication) -> NodeAddress {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(
        Server::builder()
            .add_service(ReplicationServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    NodeAddress { address, zone: String::new() }
}

fn target_rig() -> Rig {
    Rig::of(ShardId(SHARDS - 1), ReplicaId(3), SHARDS, RangeState::Arriving)
}

impl Grow {
    async fn prepare() -> Self {
        let bucket = bucket();
        let node = NodeId(1);
        let sources = [0, 1].map(|shard| {
            let rig = Rig::of(
                ShardId(shard),
                ReplicaId(u64::from(shard) + 1),
                SHARDS - 1,
                RangeState::Owned,
            );
            let replica = rig.create();
            (rig, replica)
        });
        let mut listed = Vec::new();
        for (rig, replica) in &sources {
            let loaded = replica.clone();
            tokio::task::spawn_blocking(move || load(&loaded, "round")).await.unwrap();
            let manifest = checkpoint(rig, replica, &bucket).await;
            listed.push(Source {
                shard: replica.shard,
                replica: replica.id,
                node,
                export: None,
                manifest: Some(manifest),
            });
        }
        let plan = Plan {
            id: PlanId(4),
            kind: PlanKind::Grow { from: SHARDS - 1, to: SHARDS },
            from_epoch: Epoch(1),
            started_at_us: START_US,
            step: Step::Tail,
            sources: listed,
            targets: vec![Target { shard: ShardId(SHARDS - 1), replica: ReplicaId(3), node }],
            seals_undone: 0,
            floor: None,
            paused: false,
            max_rate: None,
            estimate: None,
        };
        Self { sources, bucket, plan, addresses: HashMap::new() }
    }

    fn model(&self) -> Rows {
        model(&[&self.sources[0].1, &self.sources[1].1])
    }

    /// Builds until the tails have taken what the bucket holds, then cancels; returns the progress.
    async fn build(
        &self,
        rig: &Rig,
        replica: &Replica,
        mut reached: impl FnMut(&TargetProgress) -> bool,
    ) -> TargetProgress {
        let shipping = Shipping::start(rig, &rig.path, replica, &self.bucket, HOUR);
        let tmp = memory_dir();
        let progress = Arc::new(Mutex::new(TargetProgress::new(self.plan.id)));
        let clock: SharedClock = rig.clock.clone();
        let cancel = CancellationToken::new();
        let registry = Arc::new(NodeRegistry::new(NodeId(1), clock, 1));
        registry.set_addresses(self.addresses.clone());
        let build = Build {
            replica: replica.clone(),
            ship: shipping.handle.clone(),
            bucket: self.bucket.clone(),
            registry,
            tmp: tmp.path().to_owned(),
            progress: progress.clone(),
            cancel: cancel.clone(),
            trace: TargetTrace::silent(),
        };
        let mut running = tokio::spawn(build.run(self.plan.clone()));
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !reached(&progress.lock()) {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", progress.lock());
            tokio::select! {
                ended = &mut running => panic!("the build ended: {:?}", ended.unwrap()),
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
            }
        }
        cancel.cancel();
        assert!(matches!(running.await.unwrap(), Err(BuildError::Cancelled)));
        shipping.stop().await;
        progress.lock().clone()
    }
}

async fn checkpoint(rig: &Rig, replica: &Replica, bucket: &Bucket) -> PinnedManifest {
    let shipping = Shipping::start(rig, &rig.path, replica, bucket, HOUR);
    let pinned = shipping.handle.checkpoint(None).await.unwrap();
    shipping.stop().await;
    pinned
}

fn tailing(progress: &TargetProgress) -> bool {
    progress.stage == TargetStage::Tailing
}

fn ingests(replica: &Replica) -> Vec<Lsn> {
    let of_ingest =
        |record: &vasto_core::record::Record| matches!(record.body, Body::Ingest { .. });
    records(replica).iter().filter(|record| of_ingest(record)).map(|record| record.lsn).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_holds_what_the_model_says() {
    let grow = Grow::prepare().await;
    let expected = grow.model();
    assert!(expected.len() > 200);
    let rig = target_rig();
    let target = rig.create();
    let shown = grow.build(&rig, &target, tailing).await;
    assert_eq!(data_rows(&target), expected);
    assert_eq!(shown.keys_moved, expected.len() as u64);
    assert!(shown.manifest_shipped && shown.bytes_from_bucket > 0 && shown.bytes_from_peers == 0);
    let cursors = target.tail_cursors().unwrap();
    let pinned: Vec<_> = grow
        .plan
        .sources
        .iter()
        .map(|source| (source.replica, source.manifest.clone().unwrap().lsn))
        .collect();
    assert_eq!(cursors, pinned, "the tails begin at the pinned manifests");
    // Before it owns the bands the target serves nothing: no read, no write.
    let key = String::from_utf8(expected.keys().next().unwrap()[1..].to_vec()).unwrap();
    assert!(try_get(&target, &key).is_err() && try_write(&target, vec![put(&key, "x")]).is_err());
    // The event time of a write after the opening is above those of all moved entries.
    set_range(&target, Band::owned(SHARDS).into(), RangeState::Owned);
    for stored in expected.keys().filter(|stored| stored[1..].starts_with(b"key")) {
        let key = std::str::from_utf8(&stored[1..]).unwrap();
        write_one(&target, put(key, "after"));
        assert_eq!(get(&target, key).as_deref(), Some("after"), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_of_a_paused_plan_downloads_nothing_before_it_is_resumed() {
    let mut grow = Grow::prepare().await;
    let expected = grow.model();
    let gate = BulkGate::default();
    let spec = KeyspaceSpec { shards: SHARDS - 1, ..KeyspaceSpec::default() };
    let nodes = [vec![NodeId(1)], vec![NodeId(1)]];
    let mut catalog = Catalog::first(KEYSPACE, "ks", spec, &nodes, START_US, 1);
    catalog.plan = Some(Plan { paused: true, ..grow.plan.clone() });
    gate.apply(&catalog);
    grow.bucket = grow.bucket.with_pacer(gate.of(KEYSPACE, grow.plan.id));
    let rig = target_rig();
    let target = rig.create();
    let resume = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(data_rows(&target).is_empty(), "it went on in a pause");
        catalog.plan = Some(grow.plan.clone());
        gate.apply(&catalog);
    };
    tokio::join!(grow.build(&rig, &target, tailing), resume);
    assert_eq!(data_rows(&target), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tail_brings_what_was_written_behind_the_manifest() {
    let grow = Grow::prepare().await;
    let mut heads = BTreeMap::new();
    for (rig, replica) in &grow.sources {
        let loaded = replica.clone();
        tokio::task::spawn_blocking(move || load(&loaded, "later")).await.unwrap();
        let shipping = Shipping::start(rig, &rig.path, replica, &grow.bucket, Duration::ZERO);
        shipping.stop().await; // ships the chunks that are due
        heads.insert(replica.id, replica.settled_lsn());
    }
    let rig = target_rig();
    let target = rig.create();
    grow.build(&rig, &target, |progress| tailing(progress) && progress.cursors == heads).await;
    assert_eq!(data_rows(&target), grow.model());
    let (_dir, again) = rig.crash(&target);
    assert_eq!(again.tail_cursors().unwrap(), heads.into_iter().collect::<Vec<_>>());
    assert_eq!(data_rows(&again), grow.model());
}

/// A source that ships as fast as its chunks are read is not chased through the bucket for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_are_written_while_a_target_reads_are_left_to_the_live_log() {
    let grow = Grow::prepare().await;
    let mut reached = BTreeMap::new();
    for (rig, replica) in &grow.sources {
        // To the target, whose clock stands still, both chunks are of the future.
        rig.clock.set(START_US + 10_000_000);
        for round in ["first", "second"] {
            let loaded = replica.clone();
            tokio::task::spawn_blocking(move || load(&loaded, round)).await.unwrap();
            let shipping = Shipping::start(rig, &rig.path, replica, &grow.bucket, Duration::ZERO);
            shipping.stop().await; // ships the chunk that is due
            reached.entry(replica.id).or_insert(replica.settled_lsn());
        }
    }
    let rig = target_rig();
    let target = rig.create();
    let mut since = None;
    let shown = grow
        .build(&rig, &target, |progress| {
            let is_there = tailing(progress) && progress.cursors >= reached;
            is_there && since.get_or_insert_with(Instant::now).elapsed() > SETTLES
        })
        .await;
    assert_eq!(shown.cursors, reached, "the second chunks were read too");
}

/// A crash between the upload of a chunk and its note has left a manifest that ends inside a chunk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_whose_log_is_cut_goes_on_inside_a_chunk() {
    let mut grow = Grow::prepare().await;
    let mut heads = BTreeMap::new();
    for ((_, replica), source) in grow.sources.iter().zip(&grow.plan.sources) {
        let loaded = replica.clone();
        tokio::task::spawn_blocking(move || load(&loaded, "later")).await.unwrap();
        let pinned = source.manifest.as_ref().unwrap().lsn;
        let read = replica.clone();
        let all = tokio::task::spawn_blocking(move || records(&read)).await.unwrap();
        let last_lsn = all.last().unwrap().lsn;
        let chunk = Chunk {
            keyspace: KEYSPACE,
            shard: replica.shard,
            replica: replica.id,
            first_lsn: pinned,
            last_lsn,
            previous: None,
            records: all
                .iter()
                .filter(|record| record.lsn >= pinned)
                .flat_map(|record| record.encode())
                .collect(),
        };
        let key = layout::chunk(KEYSPACE, replica.shard, replica.id, pinned);
        assert_eq!(grow.bucket.create(&key, chunk.encode()).await.unwrap(), Create::Created);
        heads.insert(replica.id, last_lsn);
    }
    // Each refuses its first tail, and has nothing to say in those after it.
    let met = Mutex::new(HashSet::new());
    let node = Sends(move |source: u64, _after: u64| -> Sent {
        if met.lock().insert(source) {
            return Err(Status::failed_precondition("the log is cut"));
        }
        Ok(Box::pin(futures::stream::pending()))
    });
    grow.addresses.insert(NodeId(1), listen(node).await);
    let rig = target_rig();
    let target = rig.create();
    grow.build(&rig, &target, |progress| tailing(progress) && progress.cursors == heads).await;
    assert_eq!(data_rows(&target), grow.model());
}

/// The master commits by the cursors: what they cover must be there after a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_counts_once_what_it_covers_is_durable() {
    let mut grow = Grow::prepare().await;
    let (may, allowed) = watch::channel(0);
    // A source is sealed right behind what the target has, once it may.
    let node = Sends(move |source: u64, after: u64| -> Sent {
        let mut may = allowed.clone();
        let sealed = async move {
            while *may.borrow_and_update() < source {
                may.changed().await.map_err(|error| Status::internal(error.to_string()))?;
            }
            Ok::<_, Status>(frame(after + BEHIND, true))
        };
        let open = futures::stream::iter([Ok(frame(after, false))]);
        let frames = open.chain(futures::stream::once(sealed)).chain(futures::stream::pending());
        Ok(Box::pin(frames))
    });
    grow.addresses.insert(NodeId(1), listen(node).await);
    let pinned = |at: usize| grow.plan.sources[at].manifest.as_ref().unwrap().lsn;
    let pinned = [pinned(0), pinned(1)];
    let rig = target_rig();
    let target = rig.create();
    let (mut syncs, mut since) = (None, None);
    let mut counts = false;
    let cursor = |progress: &TargetProgress, source: u64| {
        progress.cursors.get(&ReplicaId(source)).copied().unwrap_or_default()
    };
    grow.build(&rig, &target, |progress| {
        // Both have said that they are open: the one that seals first waits for the other.
        if !tailing(progress) || progress.lag_lsns == u64::MAX {
            return false;
        }
        let (before, applied) = *since.get_or_insert_with(|| {
            syncs = Some(target.log().hold_syncs());
            may.send_replace(1);
            (Instant::now(), target.applied_lsn())
        });
        if syncs.is_some() {
            assert_eq!(cursor(progress, 1), pinned[0], "it counts before it is durable");
            if target.applied_lsn() > applied && before.elapsed() > SETTLES {
                syncs = None;
            }
            return false;
        }
        if !counts && cursor(progress, 1) == Lsn(pinned[0].0 + BEHIND) {
            assert_eq!(cursor(progress, 2), pinned[1]);
            counts = true;
            may.send_replace(2);
        }
        counts && cursor(progress, 2) == Lsn(pinned[1].0 + BEHIND)
    })
    .await;
}

/// It may have sealed, and told so, with its last frame: the plan needs nothing more of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_source_has_sent_counts_though_it_is_gone() {
    let mut grow = Grow::prepare().await;
    let met = Mutex::new(HashSet::new());
    let node = Sends(move |source: u64, after: u64| -> Sent {
        if !met.lock().insert(source) {
            return Err(Status::unavailable("it is gone"));
        }
        // So many that not each of them is due to be synced.
        let sent = (1..=BEHIND).map(move |more| frame(after + more, false));
        let dies = futures::stream::iter([Err(Status::unavailable("it dies"))]);
        Ok(Box::pin(futures::stream::iter(sent).map(Ok::<_, Status>).chain(dies)))
    });
    grow.addresses.insert(NodeId(1), listen(node).await);
    let sent = grow.plan.sources.iter().map(|source| {
        let pinned = source.manifest.as_ref().unwrap().lsn;
        (source.replica, Lsn(pinned.0 + BEHIND))
    });
    let sent: BTreeMap<ReplicaId, Lsn> = sent.collect();
    let rig = target_rig();
    let target = rig.create();
    grow.build(&rig, &target, |progress| tailing(progress) && progress.cursors == sent).await;
    assert!(target.settled_lsn() >= target.applied_lsn(), "they count once they are durable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_its_record_an_ingest_is_not_made_again() {
    let grow = Grow::prepare().await;
    let rig = target_rig();
    let target = rig.create();
    grow.build(&rig, &target, tailing).await;
    assert_eq!(ingests(&target).len(), 1);
    let (dir, again) = rig.crash(&target);
    let mut restarted = target_rig();
    restarted.path = dir;
    let shown = grow.build(&restarted, &again, tailing).await;
    assert_eq!(shown.objects_read, 0, "nothing is loaded a second time");
    assert_eq!(ingests(&again).len(), 1);
    assert_eq!(data_rows(&again), grow.model());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_died_between_ingest_and_record_begins_again() {
    let grow = Grow::prepare().await;
    let rig = target_rig();
    let target = rig.create();
    // Same state as the ingest leaves at the crash: files are in the database, the log does not
    // name them.
    let dir = memory_dir();
    let mut tables = TableSet::new(target.engine(), dir.path());
    tables.put(Band(90), b"left over", &value_entry("left over", START_US, "x").entry).unwrap();
    let (tables, _) = tables.finish().unwrap();
    target.engine().flush().unwrap();
    target.engine().ingest(tables.into_iter().map(|table| table.path).collect()).unwrap();
    assert_eq!(data_rows(&target).len(), 1);
    let (crashed, again) = rig.crash(&target);
    assert_eq!(data_rows(&again).len(), 1, "the ingested file is durable at once");
    rig.close(again);
    let fresh = open_again(&rig, &crashed).await;
    assert!(data_rows(&fresh).is_empty(), "it was thrown away");
    let mut restarted = target_rig();
    restarted.path = crashed;
    grow.build(&restarted, &fresh, tailing).await;
    assert_eq!(data_rows(&fresh), grow.model());
    fresh.control(Control::Stop).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_that_is_not_arriving_is_never_ingested_into() {
    let rig = Rig::new();
    let replica = rig.create();
    let order = || Control::Ingest {
        plan: PlanId(1),
        range: Band::owned(1).into(),
        files: Vec::new(),
        objects: Vec::new(),
        event_time_max: u64::MAX / 4,
        progress: Vec::new(),
    };
    // Whether there is a row in it or not.
    assert!(replica.control(order()).await.is_err());
    write_one(&replica, put("k", "v"));
    assert!(replica.control(order()).await.is_err());
    assert!(ingests(&replica).is_empty());
    assert_eq!(replica.version(), CatalogVersion(1));
}
