//! A shrink at its replicas: what the retiring shard exports, what a survivor receives while it
//! serves, and what is left of it after crashes and undone plans.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{CatalogVersion, Epoch, Lsn, NodeId, OwnSeq, PlanId, ReplicaId, ShardId};
use vasto_core::plan::{Plan, PlanKind, Source, Step};
use vasto_core::record::{BandRange, Body, RangeState, Record};
use vasto_core::report::{TargetProgress, TargetStage};
use vasto_core::stored_key::data_key;
use vasto_shipping::export::ExportManifest;
use vasto_shipping::{Bucket, layout};
use vasto_trace::OperationTrace;

use super::restore::{bootstrap_into, restore_from};
use super::shipping::{Shipping, bucket};
use super::support::*;
use crate::build::resize::Build;
use crate::build::resize::export::Export;
use crate::build::sources::{self, Without};
use crate::build::{Adoption, BuildError, Log};
use crate::clock::SharedClock;
use crate::engine::TableSet;
use crate::host::clean_up;
use crate::registry::NodeRegistry;
use crate::replica::Replica;
use crate::replica::command::{Control, ReplicaError};
use crate::ship::Pace;
use crate::target_trace::TargetTrace;

const BEFORE: u32 = 3;
const AFTER: u32 = 2;
const HOUR: Duration = Duration::from_secs(3600);

fn arriving() -> BandRange {
    Band::leaving(AFTER, BEFORE).into()
}

fn rig(shard: u32) -> Rig {
    Rig::of(ShardId(shard), ReplicaId(u64::from(shard) + 1), BEFORE, RangeState::Owned)
}

/// Writes and deletes keys of the replica's shard, in two layers of files.
fn load(replica: &Replica, round: &str) {
    let mine: Vec<String> = (0..900)
        .map(|i| format!("key{i}"))
        .filter(|key| jump(partition_hash(key.as_bytes()), BEFORE).shard == replica.shard)
        .collect();
    write(replica, mine.iter().map(|key| put(key, round)).collect());
    replica.engine().flush().unwrap();
    write(replica, mine.iter().step_by(3).map(|key| put(key, "newer")).collect());
    write(replica, mine.iter().skip(1).step_by(4).map(|key| delete(key)).collect());
}

/// Returns the rows of a retiring replica under the keys that they have in a surviving shard.
fn moved_to(shard: ShardId, source: &Replica) -> Rows {
    let mut out = Rows::new();
    for (stored, entry) in data_rows(source) {
        let key = &stored[1..];
        let own = Entry::decode(&entry).unwrap().partition_hash;
        let to = jump(own.unwrap_or_else(|| partition_hash(key)), AFTER);
        if to.shard == shard {
            out.insert(data_key(Band::of_next_jump(to.next), key), entry);
        }
    }
    out
}

/// The retiring shard, which has exported.
struct Shrink {
    _rig: Rig,
    source: Replica,
    bucket: Bucket,
    plan: Plan,
}

impl Shrink {
    async fn prepare() -> Self {
        let (bucket, rig) = (bucket(), rig(AFTER));
        let source = rig.create();
        let loaded = source.clone();
        tokio::task::spawn_blocking(move || load(&loaded, "first")).await.unwrap();
        // The floor of the plan.
        source.control(Control::GcFloor { floor: 1 }).await.unwrap();
        let shipping = Shipping::start(&rig, &rig.path, &source, &bucket, HOUR);
        let pinned = shipping.handle.checkpoint(None).await.unwrap();
        shipping.stop().await;
        let mut plan = Plan {
            id: PlanId(4),
            kind: PlanKind::Shrink { from: BEFORE, to: AFTER },
            from_epoch: Epoch(1),
            started_at_us: START_US,
            step: Step::Tail,
            sources: Vec::new(),
            targets: Vec::new(),
            seals_undone: 0,
            floor: Some(1),
            paused: false,
            max_rate: None,
            estimate: None,
        };
        let export = Export {
            replica: source.clone(),
            bucket: bucket.clone(),
            pace: Arc::new(Pace::new(0)),
            tmp: rig.path.join("tmp"),
            cancel: CancellationToken::new(),
            trace: OperationTrace::silent(),
        };
        let key = export.run(&plan, pinned.lsn, &|_| ()).await.unwrap();
        let left = std::fs::read_dir(rig.path.join("tmp")).unwrap().count();
        assert_eq!(left, 0, "its tables are removed");
        plan.sources.push(Source {
            shard: source.shard,
            replica: source.id,
            node: NodeId(1),
            manifest: Some(pinned),
            export: Some(key),
        });
        Self { _rig: rig, source, bucket, plan }
    }

    async fn export(&self) -> ExportManifest {
        let key = self.plan.sources[0].export.as_ref().unwrap();
        ExportManifest::decode(&self.bucket.get(key).await.unwrap().unwrap()).unwrap()
    }

    /// Builds until a survivor has loaded the exports, then cancels; returns the progress.
    async fn load_into(&self, rig: &Rig, survivor: &Replica) -> Result<TargetProgress, BuildError> {
        let shipping = Shipping::start(rig, &rig.path, survivor, &self.bucket, HOUR);
        let progress = Arc::new(Mutex::new(TargetProgress::new(self.plan.id)));
        let cancel = CancellationToken::new();
        let build = Build {
            replica: survivor.clone(),
            ship: shipping.handle.clone(),
            bucket: self.bucket.clone(),
            registry: Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone() as SharedClock, 1)),
            tmp: rig.path.join("tmp"),
            progress: progress.clone(),
            cancel: cancel.clone(),
            trace: TargetTrace::silent(),
        };
        let mut running = tokio::spawn(build.run(self.plan.clone()));
        let ended = loop {
            if progress.lock().stage == TargetStage::Tailing {
                break None;
            }
            tokio::select! {
                ended = &mut running => break Some(ended.unwrap()),
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
            }
        };
        cancel.cancel();
        if ended.is_none() {
            assert!(matches!(running.await.unwrap(), Err(BuildError::Cancelled)));
        }
        shipping.stop().await;
        match ended {
            Some(Err(error)) => Err(error),
            _ => Ok(progress.lock().clone()),
        }
    }
}

fn survivor(shard: u32) -> (Rig, Replica) {
    let rig = rig(shard);
    let replica = rig.create();
    load(&replica, "own");
    (rig, replica)
}

/// Leaves what an ingest leaves that was cut off before its record.
fn ingest_without_a_record(replica: &Replica) {
    let dir = memory_dir();
    let mut tables = TableSet::new(replica.engine(), dir.path());
    let entry = value_entry("left over", START_US, "x").entry;
    tables.put(arriving().first, b"left over", &entry).unwrap();
    let (tables, _) = tables.finish().unwrap();
    replica.engine().flush().unwrap();
    replica.engine().ingest(tables.into_iter().map(|table| table.path).collect()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_of_the_retiring_shard_arrives_at_one_survivor_beside_its_own() {
    let shrink = Shrink::prepare().await;
    let export = shrink.export().await;
    let exported: u64 = export.files.iter().map(|table| table.bytes).sum();
    let mut arrived = 0;
    let mut read = 0;
    for shard in 0..AFTER {
        let (rig, replica) = tokio::task::spawn_blocking(move || survivor(shard)).await.unwrap();
        let own = data_rows(&replica);
        set_range(&replica, arriving(), RangeState::Arriving);
        let shown = shrink.load_into(&rig, &replica).await.unwrap();
        let moved = moved_to(ShardId(shard), &shrink.source);
        assert!(moved.len() > 50, "{}", moved.len());
        assert_eq!(shown.keys_moved, moved.len() as u64);
        assert!(shown.manifest_shipped && shown.bytes_from_peers == 0);
        arrived += moved.len();
        read += shown.bytes_from_bucket;
        let expected: Rows = own.into_iter().chain(moved).collect();
        assert_eq!(data_rows(&replica), expected);
        // It serves its own keys all the time, and what arrives only once it owns it.
        let of_own =
            |key: &str| jump(partition_hash(key.as_bytes()), BEFORE).shard == replica.shard;
        let served = (0..900).map(|i| format!("key{i}")).find(|key| of_own(key)).unwrap();
        assert_eq!(get(&replica, &served).as_deref(), Some("newer"));
        let arrives = |key: &str| {
            jump(partition_hash(key.as_bytes()), AFTER).shard == replica.shard && !of_own(key)
        };
        let hidden = (0..900).map(|i| format!("key{i}")).find(|key| arrives(key)).unwrap();
        assert!(try_get(&replica, &hidden).is_err());
        set_range(&replica, arriving(), RangeState::Owned);
        assert_eq!(get(&replica, &hidden), get(&shrink.source, &hidden));
        let (_, again) = rig.crash(&replica);
        assert_eq!(data_rows(&again), expected);
    }
    assert_eq!(arrived, data_rows(&shrink.source).len());
    assert!(read < exported + 4096, "each byte is read once: {read} of {exported}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_survivor_that_crashes_while_bands_arrive_keeps_what_it_serves() {
    let (rig, replica) = tokio::task::spawn_blocking(|| survivor(0)).await.unwrap();
    let own = data_rows(&replica);
    set_range(&replica, arriving(), RangeState::Arriving);
    ingest_without_a_record(&replica);
    let (crashed, again) = rig.crash(&replica);
    rig.close(again);
    let opened = open_again(&rig, &crashed).await;
    assert!(opened.ranges().all_are(arriving(), RangeState::Arriving));
    assert_eq!(data_rows(&opened).len(), own.len() + 1, "nothing of its own was thrown away");
    // What the cut-off ingest has left is cleared, and only that.
    let shrink = Shrink::prepare().await;
    let mut restarted = self::rig(0);
    restarted.path = crashed;
    let refused = shrink.load_into(&restarted, &opened).await.unwrap_err();
    assert!(matches!(refused, BuildError::Replica(ReplicaError::Refused(_))), "{refused}");
    clean_up(&opened, arriving(), opened.version()).await.unwrap();
    assert_eq!(data_rows(&opened), own);
    set_range(&opened, arriving(), RangeState::Arriving);
    shrink.load_into(&restarted, &opened).await.unwrap();
    let moved = moved_to(ShardId(0), &shrink.source);
    assert_eq!(data_rows(&opened), own.into_iter().chain(moved).collect::<Rows>());
    opened.control(Control::Stop).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bands_that_arrive_anew_are_filled_anew() {
    let shrink = Shrink::prepare().await;
    let (rig, replica) = tokio::task::spawn_blocking(|| survivor(1)).await.unwrap();
    let own = data_rows(&replica);
    set_range(&replica, arriving(), RangeState::Arriving);
    shrink.load_into(&rig, &replica).await.unwrap();
    assert_eq!(replica.ranges().filled_by(), Some(PlanId(4)));
    // The plan is undone; the same bands arrive for the next one.
    clean_up(&replica, arriving(), replica.version()).await.unwrap();
    assert_eq!(data_rows(&replica), own);
    set_range(&replica, arriving(), RangeState::Arriving);
    assert_eq!(replica.ranges().filled_by(), None);
    assert_eq!(replica.ranges().ingested, Some(PlanId(4)), "its log holds that ingest");
    let (_, again) = rig.crash(&replica);
    assert_eq!(again.ranges(), replica.ranges(), "a replay knows it too");
    assert!(!replica.ranges().is_being_filled(), "it may never be thrown away");
}

/// Returns the next record of another replica of shard 0, with a value of a key.
fn record_of_a_peer(own_seq: u64, key: &str, value: &str) -> Record {
    Record {
        lsn: Lsn(own_seq),
        synced_lsn: Lsn(own_seq),
        commit_time: START_US + own_seq,
        floor: 0,
        epoch: Epoch(1),
        origin: vasto_core::ids::Origin {
            replica: ReplicaId(77),
            incarnation: vasto_core::ids::Incarnation(1),
        },
        own_seq: OwnSeq(own_seq),
        body: Body::data(vec![value_entry(key, START_US + own_seq, value)]),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_peers_for_arriving_bands_count_only_behind_the_ingest() {
    let shrink = Shrink::prepare().await;
    let (rig, replica) = tokio::task::spawn_blocking(|| survivor(0)).await.unwrap();
    let (before, behind) = {
        let mut arrive = (0..)
            .map(|i| format!("new{i}"))
            .filter(|key| band(&replica, key) == arriving().first)
            .filter(|key| jump(partition_hash(key.as_bytes()), AFTER).shard == replica.shard);
        (arrive.next().unwrap(), arrive.next().unwrap())
    };
    set_range(&replica, arriving(), RangeState::Arriving);
    let source = ReplicaId(77);
    replica.replicate(source, vec![record_of_a_peer(1, &before, "v")], Lsn(1)).await.unwrap();
    assert!(!replica.engine().any_in(arriving()).unwrap(), "rows below the ingest would be hidden");
    let early = apply(&replica, vec![value_entry(&before, START_US, "v")], Vec::new());
    assert!(matches!(early, Err(ReplicaError::Refused(_))), "{early:?}");
    shrink.load_into(&rig, &replica).await.unwrap();
    replica.replicate(source, vec![record_of_a_peer(2, &behind, "w")], Lsn(2)).await.unwrap();
    set_range(&replica, arriving(), RangeState::Owned);
    assert_eq!(get(&replica, &behind).as_deref(), Some("w"));
    assert_eq!(get(&replica, &before), None, "the tail of the source brings it, not the peer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_gave_everything_away_is_not_taken_for_a_new_one() {
    let rig = rig(AFTER);
    let replica = rig.create();
    load(&replica, "own");
    set_range(&replica, Band::owned(BEFORE).into(), RangeState::Leaving);
    let rows = data_rows(&replica);
    let (crashed, again) = rig.crash(&replica);
    rig.close(again);
    let opened = open_again(&rig, &crashed).await;
    assert!(opened.ranges().all_are(Band::owned(BEFORE).into(), RangeState::Leaving));
    assert_eq!(data_rows(&opened), rows);
    opened.control(Control::Stop).await.unwrap();
}

/// Ships the log of a survivor to its end, behind a checkpoint if one is asked for.
async fn ship(rig: &Rig, replica: &Replica, bucket: &Bucket, checkpoint: bool) {
    let shipping = Shipping::start(rig, &rig.path, replica, bucket, HOUR);
    if checkpoint {
        shipping.handle.checkpoint(None).await.unwrap();
    }
    shipping.stop().await;
}

async fn manifests(bucket: &Bucket, replica: &Replica) -> Vec<String> {
    let prefix = layout::replica_prefix(replica.keyspace, replica.shard, replica.id);
    let keys = bucket.list(&prefix).await.unwrap().into_iter().map(|object| object.key);
    keys.filter(|key| key.contains("/checkpoint/")).collect()
}

/// Makes a replica in the place of a lost survivor, from the bucket alone.
async fn recover(bucket: &Bucket, lost: ReplicaId) -> Result<(Rig, Replica), BuildError> {
    let rig = Rig::of(ShardId(0), ReplicaId(20), AFTER, RangeState::Owned);
    let candidates =
        sources::candidates(bucket, KEYSPACE, rig.shard, &[lost], Without::default(), None).await?;
    let bootstrap = bootstrap_into(&rig, bucket, &rig.path);
    let base = candidates.all[0].base.as_ref().unwrap();
    let adoption = Adoption {
        keyspace: KEYSPACE,
        replica: rig.replica,
        owned: Band::owned(AFTER).into(),
        version: CatalogVersion(1),
        epoch: Epoch(1),
    };
    bootstrap.take(base, adoption, Log::Replicate).await?;
    let replica = tokio::task::block_in_place(|| rig.open(&rig.path, true)).unwrap();
    bootstrap.join_all(&replica, &candidates, lost, AFTER).await?;
    Ok((rig, replica))
}

/// The rows of an ingest are in no record: a log that holds one behind the base of a reader gives
/// an error and not the shard without these rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_crosses_an_ingest_is_an_error_until_a_checkpoint_holds_it() {
    let shrink = Shrink::prepare().await;
    let (rig, replica) = tokio::task::spawn_blocking(|| survivor(0)).await.unwrap();
    let bucket = shrink.bucket.clone();
    ship(&rig, &replica, &bucket, true).await;
    let before = manifests(&bucket, &replica).await;
    assert_eq!(before.len(), 1);
    set_range(&replica, arriving(), RangeState::Arriving);
    shrink.load_into(&rig, &replica).await.unwrap();
    // The manifest that the survivor has shipped behind its ingest is lost.
    let behind = manifests(&bucket, &replica).await;
    assert_eq!(behind.len(), 2);
    for key in behind.iter().filter(|key| !before.contains(key)) {
        bucket.delete(key).await.unwrap();
    }
    let own = replica.clone();
    tokio::task::spawn_blocking(move || load(&own, "later")).await.unwrap();
    ship(&rig, &replica, &bucket, false).await;
    let refused = restore_from(&rig, &bucket, Without::default(), AFTER, None).await.err().unwrap();
    assert!(matches!(refused, BuildError::CrossesIngest { .. }), "{refused}");
    let refused = recover(&bucket, replica.id).await.err().unwrap();
    assert!(matches!(refused, BuildError::CrossesIngest { .. }), "{refused}");
    ship(&rig, &replica, &bucket, true).await;
    let rows = data_rows(&replica);
    restore_from(&rig, &bucket, Without::default(), AFTER, None).await.unwrap().close().await;
    let (_recovered, again) = recover(&bucket, replica.id).await.unwrap();
    assert_eq!(data_rows(&again), rows);
}
