//! What is needed stays, what is not goes, and what is missing or damaged is found.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::Vector;
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{Body, Record};
use vasto_core::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId, ReplicaId, ShardId,
};
use vasto_shipping::garbage::{Retention, collect, fsck, interrupt};
use vasto_shipping::{
    Bucket, BucketOptions, CatalogStore, CatalogWrite, Chunk, Create, DatabaseFile, Manifest, ManifestFile, layout,
};

/// Nothing but what the last checkpoint needs.
const STRICT: Retention = Retention { keep_checkpoints: 1, keep_for: Duration::ZERO, min_age: Duration::ZERO };

const SHARD: ShardId = ShardId(0);
const REPLICA: ReplicaId = ReplicaId(1);

struct Rig {
    bucket: Bucket,
    store: CatalogStore,
    catalog: Catalog,
}

impl Rig {
    async fn new(name: &str) -> Self {
        Self::at(&format!("memory://garbage-{name}")).await
    }

    async fn at(url: &str) -> Self {
        let bucket = Bucket::open(url, &BucketOptions::default()).unwrap();
        let store = CatalogStore::new(bucket.clone());
        store.claim_cluster("c".into()).await.unwrap();
        let first = |id| Catalog::first(id, "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
        let catalog = store.create_keyspace(first).await.unwrap();
        Self { bucket, store, catalog }
    }

    fn keyspace(&self) -> KeyspaceId {
        self.catalog.keyspace
    }

    async fn put(&self, key: &str, body: impl Into<Bytes>) {
        assert_eq!(self.bucket.create(key, body.into()).await.unwrap(), Create::Created);
    }

    fn sst(&self, number: u64) -> String {
        layout::sst(self.keyspace(), SHARD, REPLICA, number, "0000")
    }

    async fn chunk(&self, first: u64, last: u64) -> String {
        let records = (first..=last).flat_map(|lsn| {
            let origin = Origin { replica: REPLICA, incarnation: Incarnation(1) };
            let record = Record {
                lsn: Lsn(lsn),
                synced_lsn: Lsn(lsn - 1),
                origin,
                own_seq: OwnSeq(lsn),
                commit_time: lsn,
                epoch: Epoch(1),
                floor: 0,
                body: Body::Data { entries: Vec::new(), results: Vec::new(), progress: Vec::new() },
            };
            record.encode()
        });
        let chunk = Chunk {
            keyspace: self.keyspace(),
            shard: SHARD,
            replica: REPLICA,
            first_lsn: Lsn(first),
            last_lsn: Lsn(last),
            previous: None,
            records: records.collect(),
        };
        let key = layout::chunk(self.keyspace(), SHARD, REPLICA, Lsn(first));
        self.put(&key, chunk.encode()).await;
        key
    }

    /// A checkpoint of these SSTs; those that are not there yet are uploaded.
    async fn checkpoint(&self, lsn: u64, numbers: &[u64]) -> String {
        let body = |number: u64| Bytes::from(format!("the content of {number}"));
        let mut files = Vec::new();
        for number in numbers {
            let key = self.sst(*number);
            if self.bucket.head(&key).await.unwrap().is_none() {
                self.put(&key, body(*number)).await;
            }
            files.push(ManifestFile {
                key,
                file_number: *number,
                bytes: body(*number).len() as u64,
                crc32c: crc32c::crc32c(&body(*number)),
                level: 1,
                smallest_seqno: 1,
                largest_seqno: 2,
                first_key: vec![1],
                last_key: vec![2],
                entries: 1,
            });
        }
        let list = Bytes::from(format!("the files at {lsn}"));
        let database = DatabaseFile {
            key: layout::database(self.keyspace(), SHARD, REPLICA, Lsn(lsn), "0000"),
            name: "MANIFEST-000001".into(),
            bytes: list.len() as u64,
            crc32c: crc32c::crc32c(&list),
        };
        self.put(&database.key, list).await;
        let manifest = Manifest {
            keyspace: self.keyspace(),
            shard: SHARD,
            replica: REPLICA,
            incarnation: Incarnation(1),
            epoch: Epoch(1),
            version: CatalogVersion(1),
            lsn: Lsn(lsn),
            vector: Vector::new(),
            event_time_max: lsn,
            commit_time_max: lsn,
            floor: 0,
            created_at_us: lsn,
            nonce: lsn,
            previous: None,
            range_states: Vec::new(),
            files,
            database: Some(database),
        };
        let key = layout::manifest(self.keyspace(), SHARD, REPLICA, Lsn(lsn));
        self.put(&key, manifest.encode()).await;
        key
    }

    async fn write(&mut self, next: Catalog) {
        assert_eq!(self.store.write(&next).await.unwrap(), CatalogWrite::Won);
        self.catalog = next;
    }

    /// Three checkpoints with the log between them, and an SST that nothing names.
    async fn three_checkpoints(&self) {
        self.chunk(1, 10).await;
        self.checkpoint(10, &[1, 2]).await;
        self.chunk(11, 20).await;
        self.checkpoint(20, &[2, 3]).await;
        self.chunk(21, 30).await;
        self.checkpoint(30, &[3, 4]).await;
        self.chunk(31, 35).await;
        self.put(&self.sst(9), "of a checkpoint that never got its manifest").await;
    }

    async fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> =
            self.bucket.list("data/").await.unwrap().into_iter().map(|object| object.key).collect();
        keys.sort();
        keys
    }
}

#[tokio::test]
async fn only_what_the_retained_checkpoints_need_stays() {
    let rig = Rig::new("stays").await;
    rig.three_checkpoints().await;
    let before = fsck(&rig.bucket, true).await.unwrap();
    assert!(before.is_clean(), "{before:?}");
    assert_eq!(before.orphans.iter().map(|one| one.key.clone()).collect::<Vec<_>>(), [rig.sst(9)]);
    let all = rig.keys().await;
    let planned = collect(&rig.bucket, STRICT, true).await.unwrap();
    assert_eq!(rig.keys().await, all, "a dry run deletes nothing");
    let done = collect(&rig.bucket, STRICT, false).await.unwrap();
    assert_eq!((done.deleted, &done.keys), (planned.deleted, &planned.keys));
    let mut kept = vec![rig.sst(3), rig.sst(4)];
    kept.push(layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(31)));
    kept.push(layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(30)));
    kept.push(layout::database(rig.keyspace(), SHARD, REPLICA, Lsn(30), "0000"));
    kept.sort();
    assert_eq!(rig.keys().await, kept);
    let after = fsck(&rig.bucket, true).await.unwrap();
    assert!(after.is_clean() && after.orphans.is_empty(), "{after:?}");
    let again = collect(&rig.bucket, STRICT, false).await.unwrap();
    assert_eq!(again.deleted, 0);
}

#[tokio::test]
async fn the_past_that_is_kept_begins_with_a_checkpoint_and_its_log() {
    let rig = Rig::new("past").await;
    rig.three_checkpoints().await;
    // Everything was made just now, whatever the clock of the node said: all of a day's past is there.
    let all = rig.keys().await;
    let day = Retention { keep_for: Duration::from_secs(86_400), ..STRICT };
    collect(&rig.bucket, day, false).await.unwrap();
    assert_eq!(rig.keys().await, all.into_iter().filter(|key| *key != rig.sst(9)).collect::<Vec<_>>());
    // The last two and what they need.
    let two = Retention { keep_checkpoints: 2, ..STRICT };
    collect(&rig.bucket, two, false).await.unwrap();
    let keys = rig.keys().await;
    let manifest = |lsn| layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    let chunk = |lsn| layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    for kept in [manifest(20), manifest(30), chunk(21), chunk(31), rig.sst(2), rig.sst(3), rig.sst(4)] {
        assert!(keys.contains(&kept), "{kept}");
    }
    for gone in [manifest(10), chunk(1), chunk(11), rig.sst(1), rig.sst(9)] {
        assert!(!keys.contains(&gone), "{gone}");
    }
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}

#[tokio::test]
async fn what_is_young_or_in_use_is_never_deleted() {
    let mut rig = Rig::new("use").await;
    rig.three_checkpoints().await;
    let all = rig.keys().await;
    let young = Retention { min_age: Duration::from_secs(3_600), ..STRICT };
    let collected = collect(&rig.bucket, young, false).await.unwrap();
    assert_eq!((collected.deleted, rig.keys().await), (0, all.clone()));
    assert!(collected.young > 0);
    // A plan runs: whatever it reads is there.
    let plan = Plan {
        id: PlanId(1),
        kind: PlanKind::Replica { shard: SHARD },
        from_epoch: Epoch(1),
        started_at_us: 1,
        step: Step::Tail,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
    };
    let mut next = rig.catalog.next(2, 2);
    next.plan = Some(plan.clone());
    rig.write(next).await;
    assert_eq!(collect(&rig.bucket, STRICT, false).await.unwrap().deleted, 0);
    let mut next = rig.catalog.next(3, 3);
    next.plan = None;
    rig.write(next).await;
    // Another keyspace is made out of this one.
    let source = rig.keyspace();
    let restoring = |id| {
        let mut catalog = Catalog::first(id, "copy", KeyspaceSpec::default(), &[vec![NodeId(1)]], 4, 4);
        let kind = PlanKind::Restore { keyspace: source, version: CatalogVersion(1), at_us: None };
        catalog.plan = Some(Plan { kind, ..plan.clone() });
        catalog
    };
    rig.store.create_keyspace(restoring).await.unwrap();
    assert_eq!(collect(&rig.bucket, STRICT, false).await.unwrap().deleted, 0);
    assert_eq!(rig.keys().await, all);
}

/// A master that was killed between the two steps of creating the copy: nobody goes on with it.
#[tokio::test]
async fn a_restore_that_was_cut_off_does_not_keep_its_source_for_ever() {
    let rig = Rig::new("cut-off").await;
    rig.three_checkpoints().await;
    let mut copy = Catalog::first(KeyspaceId(2), "copy", KeyspaceSpec::default(), &[vec![NodeId(1)]], 2, 2);
    copy.plan = Some(Plan {
        id: PlanId(1),
        kind: PlanKind::Restore { keyspace: rig.keyspace(), version: CatalogVersion(1), at_us: None },
        from_epoch: Epoch(1),
        started_at_us: 2,
        step: Step::Tail,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
    });
    assert_eq!(rig.store.write(&copy).await.unwrap(), CatalogWrite::Won);
    // The name may be about to be bound.
    let young = Retention { min_age: Duration::from_secs(3_600), ..STRICT };
    let planned = collect(&rig.bucket, young, true).await.unwrap();
    assert_eq!((planned.deleted, planned.young), (0, 0), "{planned:?}");
    let collected = collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(collected.keys.contains(&rig.sst(9)) && collected.keys.contains(&rig.sst(1)), "{collected:?}");
    assert!(fsck(&rig.bucket, true).await.unwrap().orphans.is_empty());
}

#[tokio::test]
async fn a_deleted_keyspace_stays_for_its_time_and_a_pinned_manifest_too() {
    let mut rig = Rig::new("deleted").await;
    rig.three_checkpoints().await;
    let pinned = layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(10));
    let mut next = rig.catalog.next(2, 2);
    next.pins = vec![pinned.clone()];
    rig.write(next).await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(rig.keys().await.contains(&pinned) && rig.keys().await.contains(&rig.sst(1)));
    let mut next = rig.catalog.next(now_us(), 3);
    next.state = vasto_core::catalog::KeyspaceState::Deleted;
    rig.write(next).await;
    let day = Retention { keep_for: Duration::from_secs(86_400), ..STRICT };
    collect(&rig.bucket, day, false).await.unwrap();
    assert!(rig.keys().await.contains(&rig.sst(4)), "it can still be restored");
    tokio::time::sleep(Duration::from_millis(5)).await;
    rig.put("probe/later", "moves the store's clock").await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(rig.keys().await.is_empty(), "{:?}", rig.keys().await);
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}

fn now_us() -> u64 {
    #[allow(clippy::disallowed_methods)]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64
}

/// Everything that can be missing, cut short or altered is named.
#[tokio::test]
async fn what_is_missing_or_damaged_is_found() {
    let rig = Rig::new("damage").await;
    rig.three_checkpoints().await;
    let raw = rig.bucket.raw_store();
    use object_store::{ObjectStoreExt, path::Path};
    rig.bucket.delete(&rig.sst(4)).await.unwrap();
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().missing, [rig.sst(4)]);
    raw.put(&Path::from(rig.sst(4)), Bytes::from("the content of 4").into()).await.unwrap();
    let keys: Vec<String> = rig.bucket.list("").await.unwrap().into_iter().map(|object| object.key).collect();
    let mut tried = 0;
    for key in keys.iter().filter(|key| key.starts_with("data/") || key.starts_with("catalog/")) {
        if *key == rig.sst(9) {
            continue; // nothing says what it should hold
        }
        let good = rig.bucket.get(key).await.unwrap().unwrap();
        for bit in (0..good.len() * 8).step_by(good.len() * 8 / 100 + 1) {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            raw.put(&Path::from(key.as_str()), Bytes::from(bad).into()).await.unwrap();
            let found = fsck(&rig.bucket, true).await.unwrap();
            assert!(found.corrupt.contains(key), "bit {bit} of {key} is not noticed: {found:?}");
            // Nothing is deleted on the strength of what cannot be read.
            let gone = collect(&rig.bucket, STRICT, true).await.unwrap();
            if key.ends_with(".manifest") && key.contains("/checkpoint/") {
                assert_eq!(gone.keys.iter().filter(|gone| gone.starts_with("data/")).count(), 0, "{key}");
            }
            tried += 1;
        }
        raw.put(&Path::from(key.as_str()), good[..good.len() - 1].to_vec().into()).await.unwrap();
        assert!(fsck(&rig.bucket, false).await.unwrap().corrupt.contains(key), "{key} is too short");
        raw.put(&Path::from(key.as_str()), good.into()).await.unwrap();
    }
    println!("{tried} flipped bits, all found");
    assert!(tried >= 1_000, "{tried}");
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}

#[tokio::test]
async fn two_collections_at_once_leave_what_is_needed() {
    let rig = Rig::new("two").await;
    rig.three_checkpoints().await;
    let (a, b) = tokio::join!(collect(&rig.bucket, STRICT, false), collect(&rig.bucket, STRICT, false));
    println!("{:?} {:?}", a.unwrap(), b.unwrap());
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
    assert!(rig.keys().await.contains(&rig.sst(4)));
}

/// The target of a grow that was undone shipped copies of what others own: it goes without a successor.
#[tokio::test]
async fn what_an_undone_plan_left_behind_goes() {
    let mut rig = Rig::new("undone").await;
    rig.three_checkpoints().await;
    let mut next = rig.catalog.next(2, 2);
    next.placement[0].replicas[0].replica = ReplicaId(2);
    rig.write(next.clone()).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    rig.put("probe/later", "moves the store's clock").await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(rig.keys().await.contains(&rig.sst(4)), "its successor has nothing yet");
    let mut next = rig.catalog.next(3, 3);
    next.discarded = vec![REPLICA];
    rig.write(next).await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(rig.keys().await.is_empty(), "{:?}", rig.keys().await);
}

/// A hole in the log behind the last checkpoint is something missing; before it, it is not.
#[tokio::test]
async fn a_hole_in_the_log_is_found() {
    let rig = Rig::new("hole").await;
    rig.three_checkpoints().await;
    rig.chunk(36, 40).await;
    rig.chunk(41, 45).await;
    let chunk = |lsn| layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    rig.bucket.delete(&chunk(11)).await.unwrap();
    assert!(fsck(&rig.bucket, false).await.unwrap().is_clean(), "the checkpoint at 30 holds what was in it");
    rig.bucket.delete(&chunk(36)).await.unwrap();
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().missing, [chunk(36)]);
}

/// Whoever is about to read what may be garbage ends the collections that run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_ends_a_collection_that_runs() {
    const GARBAGE: u64 = 400;
    // Deleting from a disk takes its time.
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::at(&format!("file://{}", dir.path().display())).await;
    rig.three_checkpoints().await;
    for n in 100..100 + GARBAGE {
        rig.put(&rig.sst(n), "of a checkpoint that never got its manifest").await;
    }
    let bucket = rig.bucket.clone();
    let collecting = tokio::spawn(async move { collect(&bucket, STRICT, false).await });
    // Once it has begun to delete.
    let manifest = layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(10));
    while rig.bucket.head(&manifest).await.unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    interrupt(&rig.bucket).await.unwrap();
    let collected = collecting.await.unwrap().unwrap();
    assert!(collected.stopped.is_some() && collected.deleted < GARBAGE, "{} deleted", collected.deleted);
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}
