//! The archives of several replicas are merged into a new keyspace, or the restore names what is
//! missing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::task::block_in_place;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Ack, Catalog, GivenUp, KeyspaceSpec, Retirement};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, Lsn, NodeId, PlanId, ReplicaId, ShardId};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::TargetProgress;
use vasto_core::{Band, ErrorCode};
use vasto_shipping::gc::{Retention, collect, fsck};
use vasto_shipping::{Bucket, CatalogStore, CatalogWrite, Chunk, layout};
use vasto_testkit::faulty::Faulty;

use super::bucket_faults::impatient;
use super::dated::Dated;
use super::replication::{member, pull};
use super::shipping::{Shipping, bucket, fill_a_file, manifest};
use super::support::*;
use crate::build::sources::{self, Without};
use crate::build::{Adoption, Bootstrap, BuildError, Log};
use crate::bulk::{Bound, BulkGate};
use crate::registry::NodeRegistry;
use crate::replica::command::{Control, Role};
use crate::replica::{OpenOptions, Replica};
use crate::ship::{Assignment, LogNeed};
use crate::target_trace::TargetTrace;

const HOUR: Duration = Duration::from_secs(3_600);
const NEW: KeyspaceId = KeyspaceId(8);

/// A restored replica and where it lives.
pub(super) struct Restored {
    replica: Replica,
    dir: TempDir,
    progress: TargetProgress,
}

impl Restored {
    pub(super) fn get(&self, key: &str) -> Option<String> {
        block_in_place(|| get(&self.replica, key))
    }

    pub(super) async fn close(self) {
        self.replica.stop().await;
    }
}

pub(super) fn bootstrap_into(rig: &Rig, bucket: &Bucket, dir: &Path) -> Bootstrap {
    Bootstrap {
        bucket: bucket.clone(),
        engines: rig.shared.clone(),
        dir: dir.to_owned(),
        side: dir.join("side"),
        progress: Arc::new(Mutex::new(TargetProgress::new(PlanId(1)))),
        registry: Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone(), 1)),
        cancel: CancellationToken::new(),
        trace: TargetTrace::silent(),
        resized: Vec::new(),
    }
}

async fn restore(
    rig: &Rig,
    bucket: &Bucket,
    until_us: Option<u64>,
) -> Result<Restored, BuildError> {
    restore_from(rig, bucket, Without::default(), 1, until_us).await
}

pub(super) async fn restore_from(
    rig: &Rig,
    bucket: &Bucket,
    without: Without<'_>,
    shards: u32,
    until_us: Option<u64>,
) -> Result<Restored, BuildError> {
    let dir = memory_dir();
    let bootstrap = bootstrap_into(rig, bucket, dir.path());
    let candidates =
        sources::candidates(bucket, KEYSPACE, rig.shard, &[], without, until_us).await?;
    let owned: BandRange = Band::owned(shards).into();
    if let Some(base) = candidates.all.first().and_then(|source| source.base.as_ref()) {
        let (version, epoch) = (CatalogVersion(1), Epoch(1));
        let adoption = Adoption { keyspace: NEW, replica: ReplicaId(1), owned, version, epoch };
        bootstrap.take(base, adoption, Log::Fork { shards, until_us }).await?;
    }
    let replica = block_in_place(|| {
        Replica::open(OpenOptions {
            keyspace: NEW,
            replica: ReplicaId(1),
            initial: Some((CatalogVersion(1), owned, RangeState::Owned)),
            ..rig.options(dir.path(), true)
        })
    })
    .unwrap();
    match bootstrap.merge_all(&replica, &candidates, shards, until_us).await {
        Ok(()) => {
            let progress = bootstrap.progress.lock().clone();
            Ok(Restored { replica, dir, progress })
        }
        Err(error) => {
            replica.stop().await;
            Err(error)
        }
    }
}

/// Recovers a lost replica from the bucket alone; returns the new replica and the one whose
/// checkpoint it began with.
async fn take_the_place_of(
    replaced: ReplicaId,
    rig: &Rig,
    bucket: &Bucket,
    without: Without<'_>,
) -> (Replica, Option<ReplicaId>) {
    let candidates =
        sources::candidates(bucket, KEYSPACE, rig.shard, &[replaced], without, None).await.unwrap();
    let bootstrap = bootstrap_into(rig, bucket, &rig.path);
    let base = candidates.all[0].base.as_ref();
    if let Some(base) = base {
        let (version, epoch) = (CatalogVersion(1), Epoch(1));
        let owned: BandRange = Band::owned(1).into();
        let adoption = Adoption { keyspace: KEYSPACE, replica: rig.replica, owned, version, epoch };
        bootstrap.take(base, adoption, Log::Replicate).await.unwrap();
    }
    let replica = block_in_place(|| rig.open(&rig.path, true)).unwrap();
    bootstrap.join_all(&replica, &candidates, replaced, 1).await.unwrap();
    (replica, base.map(|base| base.manifest.replica))
}

/// Ships all settled records in one chunk.
async fn chunk(rig: &Rig, replica: &Replica, bucket: &Bucket) {
    Shipping::start(rig, &rig.path, replica, bucket, HOUR).stop().await;
}

async fn checkpoint(
    rig: &Rig,
    replica: &Replica,
    bucket: &Bucket,
) -> vasto_core::plan::PinnedManifest {
    let shipping = Shipping::start(rig, &rig.path, replica, bucket, HOUR);
    let pinned = shipping.handle.checkpoint(None).await.unwrap();
    shipping.stop().await;
    pinned
}

fn put_now(replica: &Replica, key: &str, value: &str) {
    block_in_place(|| write_one(replica, put(key, value)));
}

async fn register(bucket: &Bucket) -> (CatalogStore, Catalog) {
    let store = CatalogStore::new(bucket.clone());
    store.claim_cluster("c".into()).await.unwrap();
    let first = Catalog::first(KEYSPACE, "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    assert_eq!(store.write(&first).await.unwrap(), CatalogWrite::Won);
    (store, first)
}

async fn chunks_of(bucket: &Bucket, replica: &Replica) -> Vec<String> {
    let prefix = layout::replica_prefix(replica.keyspace, replica.shard, replica.id);
    let mut chunks: Vec<String> =
        bucket.list(&prefix).await.unwrap().into_iter().map(|object| object.key).collect();
    chunks.retain(|key| key.ends_with(".chunk"));
    chunks.sort();
    chunks
}

/// Another replica's checkpoint covers all of a log, and has forgotten a delete since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_deleted_and_forgotten_does_not_come_back() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    checkpoint(&rig_a, &a, &bucket).await;
    put_now(&a, "gone", "v");
    put_now(&a, "stays", "v");
    chunk(&rig_a, &a, &bucket).await;
    block_in_place(|| {
        pull(&b, &a);
        rig_b.clock.set(START_US + 1_000_000);
        write_one(&b, delete("gone"));
        let floor = b.data_commit_time();
        control(&b, Control::FenceCommitTime { commit_time: floor }).unwrap();
        control(&b, Control::GcFloor { floor }).unwrap();
        b.engine().flush().unwrap();
        b.engine().compact_all();
    });
    checkpoint(&rig_b, &b, &bucket).await;
    let restored = restore(&rig_b, &bucket, None).await.unwrap();
    assert_eq!((restored.get("gone"), restored.get("stays")), (None, Some("v".into())));
    restored.close().await;
}

/// A missing chunk is reported, unless another replica has shipped the same records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hole_in_the_log_is_an_error_unless_another_log_fills_it() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    register(&bucket).await;
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    for n in 0..3 {
        put_now(&a, &format!("k{n}"), "v");
        chunk(&rig_a, &a, &bucket).await;
    }
    let chunks = chunks_of(&bucket, &a).await;
    assert_eq!(chunks.len(), 3);
    assert!(fsck(&bucket, false).await.unwrap().is_clean());
    bucket.delete(&chunks[1]).await.unwrap();
    let state = fsck(&bucket, false).await.unwrap();
    assert_eq!(state.missing, [chunks[1].clone()]);
    let refused = restore(&rig_a, &bucket, None).await.err().unwrap();
    assert!(matches!(&refused, BuildError::Gap { chunk, .. } if *chunk == chunks[2]), "{refused}");
    block_in_place(|| pull(&b, &a));
    chunk(&rig_b, &b, &bucket).await;
    let restored = restore(&rig_a, &bucket, None).await.unwrap();
    for n in 0..3 {
        assert_eq!(restored.get(&format!("k{n}")).as_deref(), Some("v"), "k{n}");
    }
    restored.close().await;
}

/// A point in time that the bucket does not hold record by record is refused, with the nearest ones
/// on both sides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moment_inside_of_a_hole_is_refused_and_those_around_it_are_not() {
    let (rig, bucket) = (member(1), bucket());
    let replica = block_in_place(|| rig.create());
    let mut times = Vec::new();
    for (second, key) in ["first", "second", "third"].iter().enumerate() {
        rig.clock.set(START_US + second as u64 * 1_000_000);
        put_now(&replica, key, "v");
        times.push(replica.data_commit_time());
        if second == 2 {
            checkpoint(&rig, &replica, &bucket).await;
        } else {
            chunk(&rig, &replica, &bucket).await;
        }
    }
    let chunks = chunks_of(&bucket, &replica).await;
    assert_eq!(chunks.len(), 3);
    let whole = restore(&rig, &bucket, Some(times[1])).await.unwrap();
    assert_eq!((whole.get("second").as_deref(), whole.get("third")), (Some("v"), None));
    whole.close().await;
    for chunk in &chunks[1..] {
        bucket.delete(chunk).await.unwrap();
    }
    let refused = restore(&rig, &bucket, Some(times[1])).await.err().unwrap();
    assert!(matches!(refused, BuildError::NotReached { .. }), "{refused}");
    let before = restore(&rig, &bucket, Some(times[0])).await.unwrap();
    assert_eq!((before.get("first").as_deref(), before.get("second")), (Some("v"), None));
    before.close().await;
    let after = restore(&rig, &bucket, Some(times[2])).await.unwrap();
    assert_eq!(after.get("second").as_deref(), Some("v"));
    after.close().await;
    // A collected archive is not taken for an empty one.
    bucket.delete(&chunks[0]).await.unwrap();
    let refused = restore(&rig, &bucket, Some(times[0])).await.err().unwrap();
    assert!(matches!(refused, BuildError::NotRetained { oldest_us: Some(_), .. }), "{refused}");
}

/// A bucket acknowledgement counts only while no version lets the shard go on without this replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_given_up_confirms_nothing_for_the_bucket() {
    let (rig, bucket) = (member(1), bucket());
    let (store, first) = register(&bucket).await;
    let replica = block_in_place(|| rig.create());
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, HOUR);
    let confirmed = send(&replica, vec![put("before", "v")], Ack::Bucket);
    block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
    // A version unknown to the replica: perhaps another replica was made from what the bucket held.
    assert_eq!(store.write(&first.next(2, 2)).await.unwrap(), CatalogWrite::Won);
    let unknown = send(&replica, vec![put("after", "v")], Ack::Bucket);
    let chunk = layout::chunk(KEYSPACE, ShardId(0), replica.id, replica.settled_lsn().next());
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while bucket.head(&chunk).await.unwrap().is_none()
        && chunks_of(&bucket, &replica).await.len() < 2
    {
        assert!(tokio::time::Instant::now() < deadline, "the second chunk is never shipped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(
        block_in_place(|| unknown.recv_timeout(Duration::from_millis(300))).is_err(),
        "the write was confirmed"
    );
    replica.bucket_acks().abandon();
    let answer = block_in_place(|| unknown.recv_timeout(DEADLINE)).unwrap();
    assert_eq!(answer.unwrap_err().code, ErrorCode::Unknown);
    // A replica that has applied the version confirms again.
    block_in_place(|| {
        let (epoch, version) = (Epoch(1), CatalogVersion(2));
        control(&replica, Control::ApplyCatalog { epoch, version, role: replica.view().role })
            .unwrap();
    });
    let confirmed = send(&replica, vec![put("later", "v")], Ack::Bucket);
    block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
    shipping.stop().await;
}

/// A restored keyspace names the objects of its source keyspace instead of uploading them again,
/// and garbage collection respects that, also when the source is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_shares_the_objects_and_keeps_them() {
    let (rig, bucket) = (member(1), bucket());
    let (store, first) = register(&bucket).await;
    let replica = block_in_place(|| rig.create());
    for n in 0..200 {
        put_now(&replica, &format!("k{n}"), "v");
    }
    let pinned = checkpoint(&rig, &replica, &bucket).await;
    let of_source: BTreeMap<String, u64> = manifest(&bucket, &pinned)
        .await
        .files
        .into_iter()
        .map(|file| (file.key, file.bytes))
        .collect();
    let restored = restore(&rig, &bucket, None).await.unwrap();
    let shipping = Shipping::start(&rig, restored.dir.path(), &restored.replica, &bucket, HOUR);
    let own = shipping.handle.checkpoint(None).await.unwrap();
    shipping.stop().await;
    let files = manifest(&bucket, &own).await.files;
    let shared = files.iter().filter(|file| of_source.contains_key(&file.key)).count();
    assert!(
        shared > 0 && shared >= of_source.len(),
        "{shared} of {} files are shared",
        of_source.len()
    );
    // The new keyspace is in the catalog, the old one is deleted, and all objects are old.
    let new = Catalog::first(NEW, "new", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 3);
    assert_eq!(store.write(&new).await.unwrap(), CatalogWrite::Won);
    let mut deleted = first.next(2, 2);
    deleted.state = vasto_core::catalog::KeyspaceState::Deleted;
    assert_eq!(store.write(&deleted).await.unwrap(), CatalogWrite::Won);
    let strict =
        Retention { keep_checkpoints: 1, keep_for: Duration::ZERO, min_age: Duration::ZERO };
    let collected = collect(&bucket, strict, false).await.unwrap();
    assert!(collected.deleted > 0, "{collected:?}");
    assert!(
        bucket.head(&pinned.key).await.unwrap().is_none(),
        "the manifest of the deleted keyspace stays"
    );
    for key in of_source.keys() {
        assert!(bucket.head(key).await.unwrap().is_some(), "{key} was collected");
    }
    assert!(fsck(&bucket, true).await.unwrap().is_clean());
    restored.close().await;
}

/// A checkpoint upload delays neither the log nor the writes that wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_shipped_while_a_checkpoint_is_uploaded() {
    let (rig, bucket) = (member(1), bucket());
    register(&bucket).await;
    let replica = block_in_place(|| rig.create());
    for n in 0..100 {
        put_now(&replica, &format!("k{n}"), "v");
    }
    // No upload gets a turn until the test releases them.
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, HOUR);
    let mut turns = Vec::new();
    for _ in 0..crate::ship::UPLOADS_MAX {
        turns.push(shipping.pace.turn(0).await.unwrap());
    }
    let handle = shipping.handle.clone();
    let waiting = tokio::spawn(async move { handle.checkpoint(None).await });
    for n in 0..20 {
        let confirmed = send(&replica, vec![put(&format!("meanwhile{n}"), "v")], Ack::Bucket);
        block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
    }
    assert!(!waiting.is_finished());
    let lsn = shipping.shipped();
    drop(turns);
    let pinned = waiting.await.unwrap().unwrap();
    shipping.stop().await;
    // The chunk after the manifest begins exactly after its LSN.
    let next = layout::chunk(KEYSPACE, ShardId(0), replica.id, pinned.lsn.next());
    assert!(
        pinned.lsn >= lsn || bucket.head(&next).await.unwrap().is_some(),
        "{next} is not there"
    );
}

/// While everything is uploaded anew, no chunk acknowledges a write: those who wait for the bucket
/// wait for the checkpoint, and that for no other request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_writes_wait_for_does_not_yield() {
    let (rig, bucket) = (member(1), bucket());
    register(&bucket).await;
    let replica = block_in_place(|| rig.create());
    put_now(&replica, "k", "v");
    let gate = Arc::new(BulkGate::default());
    gate.set_bound(Bound::Held, Instant::now());
    let paced = bucket.with_pacer(gate.uploads_of(KEYSPACE, replica.id));
    let shipping = Shipping::start(&rig, &rig.path, &replica, &paced, HOUR);
    let handle = shipping.handle.clone();
    let making = tokio::spawn(async move { handle.checkpoint_anew().await });
    until("the checkpoint to wait", || gate.look(Instant::now()).held_back).await;
    let confirmed = send(&replica, vec![put("wanted", "v")], Ack::Bucket);
    block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
    assert!(making.await.unwrap().unwrap().is_some());
    shipping.stop().await;
}

/// The bucket is away for longer than the log can be kept for it: writes go on, the log stays
/// bounded, one checkpoint replaces the records given up, and restores to the lost points in time
/// are refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_bucket_stops_nothing_and_costs_moments_only() {
    const CAP: u64 = 100 << 20;
    let (rig, store) = (Rig::new(), Faulty::in_memory());
    register(&store.without_faults()).await;
    let replica = block_in_place(|| rig.create());
    let shipping =
        Shipping::with_cap(&rig, &rig.path, &replica, &impatient(&store), Duration::ZERO, CAP);
    shipping.handle.set_need(LogNeed::NONE);
    put_now(&replica, "before", "v");
    let before = replica.data_commit_time();
    let head = replica.settled_lsn();
    until("the first chunk", || shipping.shipped() >= head).await;
    store.go_down();
    let mut during = 0;
    for round in 0..4 {
        rig.clock.set(START_US + 1_000_000 * (round + 1));
        put_now(&replica, &format!("during{round}"), "v");
        block_in_place(|| fill_a_file(&replica));
        if round == 1 {
            during = replica.data_commit_time();
        }
    }
    // Two files of the log may exist beyond the cap: the current one, and one that is about to be
    // deleted.
    until("the log to be cut", || replica.log().bytes() <= CAP + (128 << 20)).await;
    assert!(replica.log().first_lsn() > head, "nothing was given up");
    let unshipped = send(&replica, vec![put("wanted", "v")], Ack::Bucket);
    assert!(block_in_place(|| unshipped.recv_timeout(Duration::from_millis(200))).is_err());
    store.heal();
    let settled = replica.settled_lsn();
    until("the bucket to hold everything again", || shipping.shipped() >= settled).await;
    block_in_place(|| unshipped.recv_timeout(DEADLINE)).unwrap().unwrap();
    shipping.stop().await;
    let bucket = store.without_faults();
    let prefix = layout::checkpoint_prefix(KEYSPACE, rig.shard, replica.id);
    assert_eq!(bucket.list(&prefix).await.unwrap().len(), 1, "one checkpoint stands for all of it");
    assert!(fsck(&bucket, true).await.unwrap().is_clean());
    let now = restore(&rig, &bucket, None).await.unwrap();
    for key in ["before", "during0", "during3", "wanted"] {
        assert_eq!(now.get(key).as_deref(), Some("v"), "{key}");
    }
    now.close().await;
    let then = restore(&rig, &bucket, Some(before)).await.unwrap();
    assert_eq!((then.get("before").as_deref(), then.get("during0")), (Some("v"), None));
    then.close().await;
    let refused = restore(&rig, &bucket, Some(during)).await.err().unwrap();
    assert!(matches!(refused, BuildError::NotReached { .. }), "{refused}");
}

/// A replica that has left its placement confirms nothing either, however new the version that it
/// applies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_left_confirms_nothing_for_the_bucket() {
    let (rig, store) = (Rig::new(), Faulty::in_memory());
    register(&store.without_faults()).await;
    let replica = block_in_place(|| rig.create());
    let shipping = Shipping::start(&rig, &rig.path, &replica, &impatient(&store), HOUR);
    store.go_down();
    let waiting = send(&replica, vec![put("k", "v")], Ack::Bucket);
    until("the write to wait", || replica.bucket_acks().last().is_some()).await;
    block_in_place(|| {
        let (epoch, version) = (Epoch(1), CatalogVersion(2));
        control(&replica, Control::ApplyCatalog { epoch, version, role: Role::Detached }).unwrap();
    });
    store.heal();
    let answer = block_in_place(|| waiting.recv_timeout(DEADLINE)).unwrap();
    assert_eq!(answer.unwrap_err().code, ErrorCode::Unknown);
    shipping.stop().await;
}

const SECOND: u64 = 1_000_000;

/// A node's clock was an hour ahead and was corrected: writes accepted then, and since, have commit
/// times in the future. Writes that the bucket had by a point in time belong to it all the same;
/// later ones may or may not, and that is reported.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_was_ahead_hides_nothing_from_a_moment() {
    let (rig, store) = (member(1), Dated::new(START_US));
    let bucket = store.bucket();
    rig.clock.set(START_US + 3_600 * SECOND);
    let replica = block_in_place(|| rig.create());
    put_now(&replica, "first", "v");
    let at = |seconds: u64| {
        store.set(START_US + seconds * SECOND);
        rig.clock.set(START_US + seconds * SECOND);
    };
    at(60);
    chunk(&rig, &replica, &bucket).await;
    for n in 0..20 {
        put_now(&replica, &format!("after{n}"), "v");
    }
    at(70);
    chunk(&rig, &replica, &bucket).await;
    at(600);
    let moment = |seconds: u64| Some(START_US + seconds * SECOND);
    let all = restore(&rig, &bucket, moment(120)).await.unwrap();
    assert_eq!(
        (all.get("first").as_deref(), all.get("after19").as_deref()),
        (Some("v"), Some("v"))
    );
    all.close().await;
    let refused = restore(&rig, &bucket, moment(61)).await.err().unwrap();
    let BuildError::ClockAhead { shard, replica: ahead, ahead_s, .. } = &refused else {
        panic!("{refused}")
    };
    assert_eq!((*shard, *ahead), (ShardId(0), replica.id));
    assert!((3_500..=3_600).contains(ahead_s), "{refused}");
    let from = humantime::format_rfc3339_micros(
        std::time::UNIX_EPOCH + Duration::from_micros(START_US + 71 * SECOND),
    );
    assert!(
        refused.to_string().contains(&from.to_string()),
        "the error names the first possible time: {refused}"
    );
    assert!(matches!(
        restore(&rig, &bucket, moment(30)).await.err(),
        Some(BuildError::ClockAhead { .. })
    ));
    let from = restore(&rig, &bucket, moment(71)).await.unwrap();
    assert_eq!(from.get("after19").as_deref(), Some("v"));
    from.close().await;
    // A checkpoint that the bucket had by then is a valid base, whatever times are stored in it.
    at(700);
    checkpoint(&rig, &replica, &bucket).await;
    for key in chunks_of(&bucket, &replica).await {
        bucket.delete(&key).await.unwrap();
    }
    let begun = restore(&rig, &bucket, moment(800)).await.unwrap();
    assert_eq!(
        (begun.get("first").as_deref(), begun.get("after19").as_deref()),
        (Some("v"), Some("v"))
    );
    begun.close().await;
    // Without a checkpoint and without the log the state before is unknown.
    assert!(matches!(
        restore(&rig, &bucket, moment(650)).await.err(),
        Some(BuildError::NotRetained { .. })
    ));
}

/// Good clocks differ a little from the store's: no restore is refused for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_a_little_ahead_is_believed() {
    let (rig, store) = (member(1), Dated::new(START_US));
    let bucket = store.bucket();
    let replica = block_in_place(|| rig.create());
    for second in [10, 20, 30] {
        rig.clock.set(START_US + (second + 2) * SECOND);
        store.set(START_US + second * SECOND);
        put_now(&replica, &format!("k{second}"), "v");
        chunk(&rig, &replica, &bucket).await;
    }
    let restored = restore(&rig, &bucket, Some(START_US + 25 * SECOND)).await.unwrap();
    assert_eq!((restored.get("k20").as_deref(), restored.get("k30")), (Some("v"), None));
    restored.close().await;
}

/// A restore to a point in time reads the objects around it, not everything that was written since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_to_a_moment_does_not_read_what_came_long_after() {
    let (rig_a, rig_b, store) = (member(1), member(2), Dated::new(START_US));
    let bucket = store.bucket();
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    let at = |seconds: u64| {
        store.set(START_US + seconds * SECOND);
        rig_a.clock.set(START_US + seconds * SECOND);
        rig_b.clock.set(START_US + seconds * SECOND);
    };
    put_now(&a, "k", "before");
    // The first replica pulls from another one, which is idle.
    block_in_place(|| pull(&a, &b));
    at(1);
    checkpoint(&rig_a, &a, &bucket).await;
    at(10);
    put_now(&a, "k", "then");
    chunk(&rig_a, &a, &bucket).await;
    let big = "x".repeat(100_000);
    for round in 0..40u64 {
        at(100 + round * 10);
        put_now(&a, "k", &big);
        if round % 8 == 7 {
            checkpoint(&rig_a, &a, &bucket).await;
        } else {
            chunk(&rig_a, &a, &bucket).await;
        }
    }
    let restored = restore(&rig_a, &bucket, Some(START_US + 50 * SECOND)).await.unwrap();
    assert_eq!(restored.get("k").as_deref(), Some("then"));
    let read = restored.progress.bytes_from_bucket;
    assert!(
        read < 300_000,
        "{read} bytes of 4 MB were read, in {} objects",
        restored.progress.objects_read
    );
    restored.close().await;
    // A write that another replica accepted before that time, and that this one received later, is
    // not omitted.
    let late = restore(&rig_a, &bucket, Some(START_US + 500 * SECOND)).await.unwrap();
    late.close().await;
    rig_b.clock.set(START_US + 20 * SECOND);
    put_now(&b, "late", "v");
    at(600);
    block_in_place(|| pull(&a, &b));
    put_now(&a, "k", "end");
    checkpoint(&rig_a, &a, &bucket).await;
    let restored = restore(&rig_a, &bucket, Some(START_US + 50 * SECOND)).await.unwrap();
    assert_eq!(
        (restored.get("k").as_deref(), restored.get("late").as_deref()),
        (Some("then"), Some("v"))
    );
    restored.close().await;
}

/// Without a checkpoint that names them, keys and bytes are counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_from_the_log_alone_is_counted() {
    let (rig, bucket) = (member(1), bucket());
    let replica = block_in_place(|| rig.create());
    for n in 0..500 {
        put_now(&replica, &format!("k{}", n % 400), &format!("v{n}"));
    }
    put_now(&replica, "gone", "v");
    block_in_place(|| write_one(&replica, delete("gone")));
    chunk(&rig, &replica, &bucket).await;
    let restored = restore(&rig, &bucket, None).await.unwrap();
    assert_eq!(restored.progress.keys_moved, 400);
    assert!(restored.progress.bytes_moved > 400, "{:?}", restored.progress);
    restored.close().await;
}

/// A replica is lost for good. Another one takes over what it had shipped, deletes are forgotten
/// since: a restore does not bring back what its checkpoint holds, and a restore to a point in time
/// before that still does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_over_from_a_lost_replica_is_not_taken_again() {
    let (rig_a, rig_b, store) = (member(1), member(2), Dated::new(START_US));
    let bucket = store.bucket();
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    for n in 0..10 {
        put_now(&a, &format!("old{n}"), "v");
    }
    block_in_place(|| pull(&b, &a));
    // The other replica has a write that no third one has, and ships a checkpoint.
    put_now(&b, "only here", "v");
    checkpoint(&rig_b, &b, &bucket).await;
    store.set(START_US + 10 * SECOND);
    let before = checkpoint(&rig_a, &a, &bucket).await;
    // The other replica is lost, its checkpoint is taken over, and its loss accepted.
    let dir = memory_dir();
    let bootstrap = bootstrap_into(&rig_a, &bucket, dir.path());
    bootstrap.join_what_was_shipped(&a, b.id, 1).await.unwrap();
    assert_eq!(block_in_place(|| get(&a, "only here")).as_deref(), Some("v"));
    let version = CatalogVersion(5);
    block_in_place(|| {
        control(&a, Control::ApplyCatalog { epoch: Epoch(2), version, role: a.view().role })
    })
    .unwrap();
    rig_a.clock.set(START_US + 60 * SECOND);
    block_in_place(|| {
        for n in 0..10 {
            write_one(&a, delete(&format!("old{n}")));
        }
        let floor = a.data_commit_time();
        control(&a, Control::FenceCommitTime { commit_time: floor }).unwrap();
        control(&a, Control::GcFloor { floor }).unwrap();
        a.engine().flush().unwrap();
        a.engine().compact_all();
    });
    store.set(START_US + 60 * SECOND);
    checkpoint(&rig_a, &a, &bucket).await;
    let given_up = [GivenUp { replica: b.id, version }];
    let without = Without { given_up: &given_up, ..Without::default() };
    let restored = restore_from(&rig_a, &bucket, without, 1, None).await.unwrap();
    for n in 0..10 {
        assert_eq!(restored.get(&format!("old{n}")), None, "old{n} is back");
    }
    assert_eq!(restored.get("only here").as_deref(), Some("v"));
    restored.close().await;
    let then =
        restore_from(&rig_a, &bucket, without, 1, Some(START_US + 20 * SECOND)).await.unwrap();
    assert_eq!(
        (then.get("old3").as_deref(), then.get("only here").as_deref()),
        (Some("v"), Some("v"))
    );
    then.close().await;
    assert!(bucket.head(&before.key).await.unwrap().is_some());
}

/// A shard has retired and exists again: what the replicas of the earlier one shipped was deleted
/// elsewhere since. A restore to a time before the retirement still reads it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_shard_with_the_same_number_shipped_is_not_read() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    put_now(&a, "of the earlier shard", "v");
    put_now(&b, "of the later shard", "v");
    checkpoint(&rig_a, &a, &bucket).await;
    checkpoint(&rig_b, &b, &bucket).await;
    let retirements = [Retirement {
        first: ShardId(0),
        below: ReplicaId(2),
        version: CatalogVersion(5),
        at_us: START_US,
    }];
    for (retirements, earlier) in [(&retirements[..], None), (&[], Some("v"))] {
        let without = Without { retirements, ..Without::default() };
        let restored = restore_from(&rig_a, &bucket, without, 1, None).await.unwrap();
        assert_eq!(restored.get("of the earlier shard").as_deref(), earlier);
        assert_eq!(restored.get("of the later shard").as_deref(), Some("v"));
        restored.close().await;
    }
}

/// Commit times do not decide which checkpoint is the newest: the checkpoint of a clock that was
/// ahead would bring back what another one has forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checkpoint_that_has_forgotten_most_comes_first() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    put_now(&a, "old", "v");
    block_in_place(|| pull(&b, &a));
    rig_b.clock.set(START_US + 3_600 * SECOND);
    put_now(&b, "ahead", "v");
    checkpoint(&rig_b, &b, &bucket).await;
    block_in_place(|| {
        pull(&a, &b);
        rig_a.clock.set(START_US + SECOND);
        write_one(&a, delete("old"));
        let floor = START_US + 2 * SECOND;
        control(&a, Control::FenceCommitTime { commit_time: floor }).unwrap();
        control(&a, Control::GcFloor { floor }).unwrap();
        a.engine().flush().unwrap();
        a.engine().compact_all();
    });
    put_now(&a, "new", "v");
    checkpoint(&rig_a, &a, &bucket).await;
    let restored = restore(&rig_a, &bucket, None).await.unwrap();
    assert_eq!((restored.get("old"), restored.get("ahead").as_deref()), (None, Some("v")));
    restored.close().await;
}

/// Registers keyspace 7 with one shard on two nodes.
async fn register_two(bucket: &Bucket) {
    let store = CatalogStore::new(bucket.clone());
    store.claim_cluster("c".into()).await.unwrap();
    let spec = KeyspaceSpec { replicas: 2, ..KeyspaceSpec::default() };
    let first = Catalog::first(KEYSPACE, "ks", spec, &[vec![NodeId(1), NodeId(2)]], 1, 1);
    assert_eq!(store.write(&first).await.unwrap(), CatalogWrite::Won);
}

/// Starts the shipper of an acting primary.
fn standing_in(rig: &Rig, replica: &Replica, bucket: &Bucket) -> Shipping {
    let shipping = Shipping::start(rig, &rig.path, replica, bucket, HOUR);
    shipping.handle.assign(Assignment::StandIn);
    shipping
}

async fn files_of(bucket: &Bucket, replica: &Replica) -> usize {
    let prefix = layout::replica_prefix(replica.keyspace, replica.shard, replica.id);
    bucket.list(&prefix).await.unwrap().iter().filter(|object| object.key.ends_with(".sst")).count()
}

/// The preferred primary is lost. The acting primary confirms for the bucket at once, without
/// uploading the shard again, and the archives of both are one log: for a restore, for the recovery
/// of the second replica when that is lost too, and for a check of the bucket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acting_primary_continues_the_archive_of_the_preferred_one() {
    for checkpointed in [true, false] {
        let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
        register_two(&bucket).await;
        let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
        for n in 0..20 {
            put_now(&a, &format!("k{n}"), "v");
        }
        block_in_place(|| pull(&b, &a));
        if checkpointed {
            // Same as for a replica made from another one.
            crate::ship::begin_with_a_checkpoint(&rig_b.path).unwrap();
            checkpoint(&rig_a, &a, &bucket).await;
        }
        block_in_place(|| pull(&a, &b));
        put_now(&a, "shipped", "v");
        chunk(&rig_a, &a, &bucket).await;
        put_now(&a, "not shipped", "v");
        block_in_place(|| pull(&b, &a));
        let shipping = standing_in(&rig_b, &b, &bucket);
        let confirmed = send(&b, vec![put("acted", "v")], Ack::Bucket);
        block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
        assert_eq!(files_of(&bucket, &b).await, 0, "the shard was sent again");
        let chunks = chunks_of(&bucket, &b).await;
        assert_eq!(chunks.len(), 1);
        let sent = bucket.get(&chunks[0]).await.unwrap().unwrap();
        let sent = Chunk::decode(&sent).unwrap();
        assert!(sent.records().count() <= 3, "{} records were sent again", sent.records().count());
        put_now(&b, "later", "v");
        shipping.stop().await;
        assert!(fsck(&bucket, false).await.unwrap().is_clean());
        let restored = restore(&rig_a, &bucket, None).await.unwrap();
        for key in ["k0", "k19", "shipped", "not shipped", "acted", "later"] {
            assert_eq!(restored.get(key).as_deref(), Some("v"), "{key}");
        }
        restored.close().await;
        // The second replica is lost too: the recovered one holds the same.
        let rig_c = member(3);
        let (c, _) = take_the_place_of(b.id, &rig_c, &bucket, Without::default()).await;
        assert!(vasto_core::ids::covers(&c.vector(), &b.vector()));
        assert_eq!(block_in_place(|| get(&c, "later")).as_deref(), Some("v"));
        // Without the archive of the preferred primary the second archive is useless, and the
        // restore fails.
        let prefix = layout::replica_prefix(KEYSPACE, a.shard, a.id);
        for object in bucket.list(&prefix).await.unwrap() {
            bucket.delete(&object.key).await.unwrap();
        }
        assert!(restore(&rig_a, &bucket, None).await.is_err());
    }
}

/// Records that the preferred primary had not shipped are not in the log any more: then everything
/// is uploaded, and nothing is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acting_primary_that_lacks_log_begins_with_a_checkpoint() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    register_two(&bucket).await;
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    put_now(&a, "shipped", "v");
    chunk(&rig_a, &a, &bucket).await;
    put_now(&a, "not shipped", "v");
    block_in_place(|| {
        pull(&b, &a);
        fill_a_file(&b);
        b.engine().flush().unwrap();
        b.log().truncate_to(b.persisted_lsn().unwrap()).unwrap();
    });
    assert!(b.log().first_lsn() > Lsn(10));
    let shipping = standing_in(&rig_b, &b, &bucket);
    let confirmed = send(&b, vec![put("acted", "v")], Ack::Bucket);
    block_in_place(|| confirmed.recv_timeout(DEADLINE)).unwrap().unwrap();
    shipping.stop().await;
    assert!(files_of(&bucket, &b).await > 0);
    let restored = restore(&rig_a, &bucket, None).await.unwrap();
    for key in ["shipped", "not shipped", "acted"] {
        assert_eq!(restored.get(key).as_deref(), Some("v"), "{key}");
    }
    restored.close().await;
}

/// No write waits for the bucket: in place of a preferred primary that may be back shortly the
/// shard is not uploaded whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_explicit_request_is_shipped_by_any_replica() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    register_two(&bucket).await;
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    put_now(&a, "k", "v");
    chunk(&rig_a, &a, &bucket).await;
    put_now(&a, "not shipped", "v");
    block_in_place(|| pull(&b, &a));
    let shipping = Shipping::start(&rig_b, &rig_b.path, &b, &bucket, HOUR);
    shipping.handle.assign(Assignment::Idle);
    shipping.handle.log().await.unwrap();
    assert_eq!((chunks_of(&bucket, &b).await.len(), files_of(&bucket, &b).await), (1, 0));
    shipping.stop().await;
    let restored = restore(&rig_a, &bucket, None).await.unwrap();
    assert_eq!(restored.get("not shipped").as_deref(), Some("v"));
    restored.close().await;
}

/// The preferred primary is lost; the acting primary continues its archive. The loss is accepted,
/// and another replica makes a checkpoint before it holds all of that archive: a restore still
/// needs it, and so does the recovery of the second replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_another_log_continues_is_read_although_its_loss_was_accepted() {
    let (rig_a, rig_b, rig_c, bucket) = (member(1), member(2), member(3), bucket());
    register_two(&bucket).await;
    let (a, b) = block_in_place(|| (rig_a.create(), rig_b.create()));
    put_now(&a, "old", "v");
    let c = block_in_place(|| rig_c.create());
    block_in_place(|| {
        pull(&b, &a);
        pull(&c, &a);
    });
    put_now(&a, "shipped", "v");
    block_in_place(|| pull(&b, &a));
    put_now(&b, "of the second", "v");
    block_in_place(|| pull(&a, &b));
    chunk(&rig_a, &a, &bucket).await;
    let shipping = standing_in(&rig_b, &b, &bucket);
    put_now(&b, "behind", "v");
    shipping.handle.log().await.unwrap();
    shipping.stop().await;
    // The preferred primary is given up. The third replica has applied that version, but lacks some
    // records.
    let version = CatalogVersion(5);
    block_in_place(|| {
        control(&c, Control::ApplyCatalog { epoch: Epoch(2), version, role: c.view().role })
    })
    .unwrap();
    checkpoint(&rig_c, &c, &bucket).await;
    let given_up = [GivenUp { replica: a.id, version }];
    let without = Without { given_up: &given_up, ..Without::default() };
    let restored = restore_from(&rig_a, &bucket, without, 1, None).await.unwrap();
    for key in ["old", "shipped", "of the second", "behind"] {
        assert_eq!(restored.get(key).as_deref(), Some("v"), "{key}");
    }
    restored.close().await;
    let four = member(4);
    let (d, _) = take_the_place_of(b.id, &four, &bucket, without).await;
    for key in ["old", "shipped", "of the second", "behind"] {
        assert_eq!(block_in_place(|| get(&d, key)).as_deref(), Some("v"), "{key}");
    }
    assert!(vasto_core::ids::covers(&d.vector(), &b.vector()));
}

/// A recovered replica ships from the first record of its own log, which continues the archive of
/// the lost one. Its log is not the whole shard: the recovery of that replica in turn begins with
/// the checkpoint of the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_continues_another_archive_is_not_the_whole_shard() {
    let (rig_a, rig_b, bucket) = (member(1), member(2), bucket());
    register_two(&bucket).await;
    let a = block_in_place(|| rig_a.create());
    for n in 0..20 {
        put_now(&a, &format!("k{n}"), "v");
    }
    checkpoint(&rig_a, &a, &bucket).await;
    let (b, began_with) = take_the_place_of(a.id, &rig_b, &bucket, Without::default()).await;
    assert_eq!(began_with, Some(a.id), "the checkpoint that the replica begins with");
    put_now(&b, "of the second", "v");
    chunk(&rig_b, &b, &bucket).await;
    assert_eq!(chunks_of(&bucket, &b).await, [layout::chunk(KEYSPACE, b.shard, b.id, Lsn(1))]);
    let rig_c = member(3);
    let (c, began_with) = take_the_place_of(b.id, &rig_c, &bucket, Without::default()).await;
    assert_eq!(began_with, Some(a.id), "the checkpoint that the replica begins with");
    for key in ["k0", "k19", "of the second"] {
        assert_eq!(block_in_place(|| get(&c, key)).as_deref(), Some("v"), "{key}");
    }
    let restored = restore(&rig_a, &bucket, None).await.unwrap();
    assert_eq!(
        (restored.get("k7").as_deref(), restored.get("of the second").as_deref()),
        (Some("v"), Some("v"))
    );
    restored.close().await;
}

/// Chunks that a checkpoint covers need not be readable any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_chunk_before_the_checkpoint_keeps_nobody_from_restoring() {
    let (rig, bucket) = (member(1), bucket());
    let replica = block_in_place(|| rig.create());
    for key in ["k", "later"] {
        put_now(&replica, key, "v");
        chunk(&rig, &replica, &bucket).await;
    }
    checkpoint(&rig, &replica, &bucket).await;
    let first = chunks_of(&bucket, &replica).await.remove(0);
    bucket.delete(&first).await.unwrap();
    bucket.create(&first, bytes::Bytes::from_static(b"noise")).await.unwrap();
    let restored = restore(&rig, &bucket, None).await.unwrap();
    assert_eq!(restored.get("k").as_deref(), Some("v"));
    restored.close().await;
}
