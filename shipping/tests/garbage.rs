//! gc keeps needed objects and deletes the others; fsck finds missing and damaged objects.
#![allow(clippy::unwrap_used)]

#[path = "garbage/exports.rs"]
mod exports;
#[path = "garbage/retired.rs"]
mod retired;

use std::time::Duration;

use bytes::Bytes;
use vasto_core::Band;
use vasto_core::catalog::{Catalog, GivenUp, KeyspaceSpec, Quarantine, QuarantineSource};
use vasto_core::ids::Vector;
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{Body, Record};
use vasto_core::report::{Continues, ShipsBehind};
use vasto_core::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, Lsn, NodeId, Origin, OwnSeq, PlanId, ReplicaId,
    ShardId,
};
use vasto_shipping::gc::{
    Known, KnownReplica, Retention, check, collect, collect_at, fsck, interrupt,
};
use vasto_shipping::{
    Bucket, BucketOptions, CatalogStore, CatalogWrite, Chunk, Create, DatabaseFile, Manifest,
    ManifestFile, layout,
};
use vasto_testkit::faulty::{Call, Fault, Faulty};

/// Keeps only the objects that the last checkpoint needs.
const STRICT: Retention =
    Retention { keep_checkpoints: 1, keep_for: Duration::ZERO, min_age: Duration::ZERO };

const SHARD: ShardId = ShardId(0);
const REPLICA: ReplicaId = ReplicaId(1);

/// Origin of the writes.
fn origin() -> Origin {
    Origin { replica: REPLICA, incarnation: Incarnation(1) }
}

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
        Self::over(Bucket::open(url, &BucketOptions::default()).unwrap()).await
    }

    async fn over(bucket: Bucket) -> Self {
        let store = CatalogStore::new(bucket.clone());
        store.claim_cluster("c".into()).await.unwrap();
        let first =
            |id| Catalog::first(id, "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
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
        self.chunk_of(REPLICA, first, last, None).await
    }

    /// Uploads a chunk that holds records of [`REPLICA`], whichever replica ships it.
    async fn chunk_of(
        &self,
        replica: ReplicaId,
        first: u64,
        last: u64,
        previous: Option<String>,
    ) -> String {
        let records = (first..=last).flat_map(|lsn| {
            let origin = origin();
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
            replica,
            first_lsn: Lsn(first),
            last_lsn: Lsn(last),
            previous,
            records: records.collect(),
        };
        let key = layout::chunk(self.keyspace(), SHARD, replica, Lsn(first));
        self.put(&key, chunk.encode()).await;
        key
    }

    /// Uploads a checkpoint of these SSTs, and the SSTs that are missing.
    async fn checkpoint(&self, lsn: u64, numbers: &[u64]) -> String {
        self.checkpoint_of(REPLICA, CatalogVersion(1), lsn, numbers).await
    }

    async fn checkpoint_of(
        &self,
        replica: ReplicaId,
        version: CatalogVersion,
        lsn: u64,
        numbers: &[u64],
    ) -> String {
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
            key: layout::database(self.keyspace(), SHARD, replica, Lsn(lsn), "0000"),
            name: "MANIFEST-000001".into(),
            bytes: list.len() as u64,
            crc32c: crc32c::crc32c(&list),
        };
        self.put(&database.key, list).await;
        let manifest = Manifest {
            keyspace: self.keyspace(),
            shard: SHARD,
            replica,
            incarnation: Incarnation(1),
            epoch: Epoch(1),
            version,
            lsn: Lsn(lsn),
            vector: Vector::from([(origin(), OwnSeq(lsn))]),
            event_time_max: lsn,
            commit_time_max: lsn,
            floor: 0,
            created_at_us: lsn,
            nonce: lsn,
            previous: None,
            range_states: Vec::new(),
            files,
            ingested: None,
            database: Some(database),
        };
        let key = layout::manifest(self.keyspace(), SHARD, replica, Lsn(lsn));
        self.put(&key, manifest.encode()).await;
        key
    }

    async fn write(&mut self, next: Catalog) {
        assert_eq!(self.store.write(&next).await.unwrap(), CatalogWrite::Won);
        self.catalog = next;
    }

    /// Uploads three checkpoints with the log between them, and an SST that no manifest names.
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
    assert_eq!(
        before.orphans.iter().map(|orphan| orphan.key.clone()).collect::<Vec<_>>(),
        [rig.sst(9)]
    );
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
    // Every object was written just now, whatever the clock of the node said: a day's archive keeps
    // them all.
    let all = rig.keys().await;
    let day = Retention { keep_for: Duration::from_secs(86_400), ..STRICT };
    collect(&rig.bucket, day, false).await.unwrap();
    assert_eq!(
        rig.keys().await,
        all.into_iter().filter(|key| *key != rig.sst(9)).collect::<Vec<_>>()
    );
    // The last two checkpoints and the objects that they need.
    let two = Retention { keep_checkpoints: 2, ..STRICT };
    collect(&rig.bucket, two, false).await.unwrap();
    let keys = rig.keys().await;
    let manifest = |lsn| layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    let chunk = |lsn| layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    for kept in
        [manifest(20), manifest(30), chunk(21), chunk(31), rig.sst(2), rig.sst(3), rig.sst(4)]
    {
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
    // A plan runs: every object that it reads stays.
    let plan = Plan {
        id: PlanId(1),
        kind: PlanKind::AddReplica { shard: SHARD },
        from_epoch: Epoch(1),
        started_at_us: 1,
        step: Step::Tail,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    };
    let mut next = rig.catalog.next(2, 2);
    next.plan = Some(plan.clone());
    rig.write(next).await;
    assert_eq!(collect(&rig.bucket, STRICT, false).await.unwrap().deleted, 0);
    let mut next = rig.catalog.next(3, 3);
    next.plan = None;
    rig.write(next).await;
    // Another keyspace is restored from this one.
    let source = rig.keyspace();
    let restoring = |id| {
        let mut catalog =
            Catalog::first(id, "copy", KeyspaceSpec::default(), &[vec![NodeId(1)]], 4, 4);
        let kind = PlanKind::Restore { keyspace: source, version: CatalogVersion(1), at_us: None };
        catalog.plan = Some(Plan { kind, ..plan.clone() });
        catalog
    };
    rig.store.create_keyspace(restoring).await.unwrap();
    assert_eq!(collect(&rig.bucket, STRICT, false).await.unwrap().deleted, 0);
    assert_eq!(rig.keys().await, all);
}

#[tokio::test]
async fn the_log_of_a_source_stays_while_what_it_gave_is_in_quarantine() {
    let mut rig = Rig::new("gave").await;
    rig.three_checkpoints().await;
    let mut next = rig.catalog.next(2, 2);
    next.quarantines.push(Quarantine {
        plan: PlanId(1),
        range: Band::leaving(1, 2).into(),
        replicas: vec![REPLICA],
        targets: vec![(ReplicaId(2), Lsn(7))],
        others: Vec::new(),
        sources: Vec::new(),
        until_us: u64::MAX,
        dropping: false,
    });
    rig.write(next).await;
    let keyspace = rig.keyspace();
    let chunks = |keys: Vec<String>| {
        let is_there =
            |first: &u64| keys.contains(&layout::chunk(keyspace, SHARD, REPLICA, Lsn(*first)));
        [1, 11, 21, 31].into_iter().filter(is_there).collect::<Vec<u64>>()
    };
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert_eq!(chunks(rig.keys().await), [1, 11, 21, 31]);
    // Another replica is in its place, which needs nothing of its archive.
    let mut next = rig.catalog.next(3, 3);
    next.placement[0].replicas[0].replica = ReplicaId(9);
    next.discarded = vec![REPLICA];
    next.quarantines[0].replicas.clear();
    next.quarantines[0].sources =
        vec![QuarantineSource { shard: SHARD, replica: REPLICA, sealed: Lsn(33) }];
    rig.write(next).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    rig.put("probe/later", "moves the store's clock").await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert_eq!(chunks(rig.keys().await), [1, 11, 21, 31]);
    let mut next = rig.catalog.next(4, 4);
    next.quarantines.clear();
    rig.write(next).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    rig.put("probe/still-later", "moves the store's clock").await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(chunks(rig.keys().await).is_empty());
}

/// A master that was killed between the two steps of creating the keyspace: no master continues the
/// restore.
#[tokio::test]
async fn a_restore_that_was_cut_off_does_not_keep_its_source_for_ever() {
    let rig = Rig::new("cut-off").await;
    rig.three_checkpoints().await;
    let mut copy =
        Catalog::first(KeyspaceId(2), "copy", KeyspaceSpec::default(), &[vec![NodeId(1)]], 2, 2);
    copy.plan = Some(Plan {
        id: PlanId(1),
        kind: PlanKind::Restore {
            keyspace: rig.keyspace(),
            version: CatalogVersion(1),
            at_us: None,
        },
        from_epoch: Epoch(1),
        started_at_us: 2,
        step: Step::Tail,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    assert_eq!(rig.store.write(&copy).await.unwrap(), CatalogWrite::Won);
    // The name may be about to be bound.
    let young = Retention { min_age: Duration::from_secs(3_600), ..STRICT };
    let planned = collect(&rig.bucket, young, true).await.unwrap();
    assert_eq!((planned.deleted, planned.young), (0, 0), "{planned:?}");
    let collected = collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(
        collected.keys.contains(&rig.sst(9)) && collected.keys.contains(&rig.sst(1)),
        "{collected:?}"
    );
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
    let export = layout::export_manifest(rig.keyspace(), PlanId(9), SHARD, "aa");
    rig.put(&export, "of a plan that never began").await;
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

/// Every missing, cut or altered object is named.
#[tokio::test]
async fn what_is_missing_or_damaged_is_found() {
    let rig = Rig::new("damage").await;
    rig.three_checkpoints().await;
    let raw = rig.bucket.raw_store();
    use object_store::{ObjectStoreExt, path::Path};
    rig.bucket.delete(&rig.sst(4)).await.unwrap();
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().missing, [rig.sst(4)]);
    raw.put(&Path::from(rig.sst(4)), Bytes::from("the content of 4").into()).await.unwrap();
    let keys: Vec<String> =
        rig.bucket.list("").await.unwrap().into_iter().map(|object| object.key).collect();
    let mut tried = 0;
    for key in keys.iter().filter(|key| key.starts_with("data/") || key.starts_with("catalog/")) {
        if *key == rig.sst(9) {
            continue; // no manifest names its content
        }
        let good = rig.bucket.get(key).await.unwrap().unwrap();
        for bit in (0..good.len() * 8).step_by(good.len() * 8 / 100 + 1) {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            raw.put(&Path::from(key.as_str()), Bytes::from(bad).into()).await.unwrap();
            let found = fsck(&rig.bucket, true).await.unwrap();
            assert!(found.corrupt.contains(key), "bit {bit} of {key} is not noticed: {found:?}");
            // An unreadable manifest never leads to a deletion.
            let gone = collect(&rig.bucket, STRICT, true).await.unwrap();
            if key.ends_with(".manifest") && key.contains("/checkpoint/") {
                assert_eq!(
                    gone.keys.iter().filter(|gone| gone.starts_with("data/")).count(),
                    0,
                    "{key}"
                );
            }
            tried += 1;
        }
        raw.put(&Path::from(key.as_str()), good[..good.len() - 1].to_vec().into()).await.unwrap();
        assert!(
            fsck(&rig.bucket, false).await.unwrap().corrupt.contains(key),
            "{key} is too short"
        );
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
    let (a, b) =
        tokio::join!(collect(&rig.bucket, STRICT, false), collect(&rig.bucket, STRICT, false));
    println!("{:?} {:?}", a.unwrap(), b.unwrap());
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
    assert!(rig.keys().await.contains(&rig.sst(4)));
}

/// A rig in a local directory, where object times can be set.
struct Dated {
    dir: tempfile::TempDir,
    rig: Rig,
}

const HOUR: Duration = Duration::from_secs(3_600);

impl Dated {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rig = Rig::at(&format!("file://{}", dir.path().display())).await;
        Self { dir, rig }
    }

    fn path(&self, key: &str) -> std::path::PathBuf {
        self.dir.path().join(key)
    }

    #[allow(clippy::disallowed_methods)]
    fn now() -> std::time::SystemTime {
        std::time::SystemTime::now()
    }

    fn set(&self, key: &str, time: std::time::SystemTime) {
        std::fs::File::open(self.path(key)).unwrap().set_modified(time).unwrap();
    }

    /// Sets the age of all objects.
    async fn age(&self, by: Duration) {
        for object in self.rig.bucket.list("").await.unwrap() {
            self.set(&object.key, Self::now() - by);
        }
    }

    /// Writes a foreign object with a time in the future.
    fn put_a_note_of_the_future(&self, by: Duration) {
        std::fs::write(self.path("notes.txt"), "not ours").unwrap();
        self.set("notes.txt", Self::now() + by);
    }
}

/// A checkpoint under upload, and one object with a time in the future.
#[tokio::test]
async fn one_object_of_the_future_ages_no_other() {
    let dated = Dated::new().await;
    let mut rig = Dated { dir: dated.dir, rig: dated.rig };
    rig.rig.three_checkpoints().await;
    let all = rig.rig.keys().await;
    rig.put_a_note_of_the_future(72 * HOUR);
    for dry_run in [true, false] {
        let collected = collect(&rig.rig.bucket, Retention::default(), dry_run).await.unwrap();
        assert_eq!(collected.deleted, 0, "{collected:?}");
        assert!(collected.young > 0, "{collected:?}");
        let warnings = collected.warnings.iter().filter(|text| text.contains("notes.txt")).count();
        assert_eq!(warnings, 1, "{collected:?}");
        assert_eq!(rig.rig.keys().await, all);
    }
    // A keyspace that was just deleted can be restored for a week.
    let mut next = rig.rig.catalog.next(now_us(), 2);
    next.state = vasto_core::catalog::KeyspaceState::Deleted;
    rig.rig.write(next).await;
    rig.put_a_note_of_the_future(8 * 24 * HOUR);
    let collected = collect(
        &rig.rig.bucket,
        Retention { min_age: Duration::ZERO, ..Retention::default() },
        false,
    )
    .await;
    assert_eq!(collected.unwrap().keys, [rig.rig.sst(9)]);
    let found = fsck(&rig.rig.bucket, false).await.unwrap();
    assert!(found.warnings.iter().any(|text| text.contains("notes.txt")), "{found:?}");
}

/// Of the collector's clock and the store's the earlier counts, and their difference is reported.
#[tokio::test]
async fn the_earlier_of_two_clocks_counts() {
    let rig = Dated::new().await;
    rig.rig.three_checkpoints().await;
    rig.age(48 * HOUR).await;
    // Every object is old, except a manifest that is younger than the day before yesterday.
    let all = rig.rig.keys().await;
    let day = 24 * HOUR.as_micros() as u64;
    let strict = Retention { min_age: 24 * HOUR, ..STRICT };
    let behind = collect_at(&rig.rig.bucket, strict, false, now_us() - 2 * day).await.unwrap();
    assert_eq!((behind.deleted, rig.rig.keys().await), (0, all.clone()));
    assert!(
        behind.warnings.iter().any(
            |text| text.contains("bucket's clock is") && text.contains("ahead of the master's")
        )
    );
    rig.age(HOUR).await;
    let ahead = collect_at(&rig.rig.bucket, strict, false, now_us() + 30 * day).await.unwrap();
    assert_eq!((ahead.deleted, rig.rig.keys().await), (0, all));
    assert!(
        ahead.warnings.iter().any(
            |text| text.contains("master's clock is") && text.contains("ahead of the bucket's")
        )
    );
    rig.age(48 * HOUR).await;
    let right = collect_at(&rig.rig.bucket, strict, false, now_us()).await.unwrap();
    assert!(right.deleted > 5 && right.warnings.is_empty(), "{right:?}");
}

/// An upload takes up to twelve hours, whatever minimum age other objects have.
#[tokio::test]
async fn what_may_be_of_an_upload_that_runs_stays_longer_than_that_may_take() {
    let rig = Dated::new().await;
    rig.rig.three_checkpoints().await;
    let strict = Retention { min_age: HOUR, ..STRICT };
    rig.age(11 * HOUR).await;
    let collected = collect(&rig.rig.bucket, strict, false).await.unwrap();
    assert!(collected.deleted > 5, "{collected:?}");
    assert!(
        rig.rig.keys().await.contains(&rig.rig.sst(9))
            && !rig.rig.keys().await.contains(&rig.rig.sst(1))
    );
    rig.age(14 * HOUR).await;
    assert_eq!(collect(&rig.rig.bucket, strict, false).await.unwrap().keys, [rig.rig.sst(9)]);
}

/// Each foreign object in the prefix costs one warning: the catalog loads, fsck and gc run.
#[tokio::test]
async fn strangers_cost_a_word_each_and_nothing_else() {
    use std::os::unix::ffi::OsStrExt;
    let rig = Dated::new().await;
    rig.rig.three_checkpoints().await;
    let put = |key: &str| {
        std::fs::create_dir_all(rig.path(key).parent().unwrap()).unwrap();
        std::fs::write(rig.path(key), "not ours").unwrap();
    };
    let not_utf8 = std::ffi::OsStr::from_bytes(b"odd-\xff\xfe");
    for folder in ["", "data", "catalog", "gc-term", "names"] {
        std::fs::create_dir_all(rig.path(folder)).unwrap();
        std::fs::write(rig.path(folder).join(not_utf8), "not ours").unwrap();
        std::os::unix::fs::symlink("..", rig.path(folder).join("circle")).unwrap();
        std::os::unix::fs::symlink("nowhere", rig.path(folder).join("dangling")).unwrap();
        std::os::unix::fs::symlink("itself", rig.path(folder).join("itself")).unwrap();
    }
    put("lost+found/x");
    put("catalog/x");
    put("catalog/00000000000000000009/00000000000000000001");
    put("catalog/18446744073709551615/00000000000000000001");
    put(&layout::catalog_version(rig.rig.keyspace(), CatalogVersion(99)));
    put(&layout::name_version("ks", 2));
    put("gc-term/18446744073709551615");
    put("data/x/y");
    // A staged file that a crash in the middle of a write has left.
    let staged = format!("{}#1", rig.rig.sst(77));
    std::fs::write(rig.path(&staged), vec![0; 1_000]).unwrap();
    let (loaded, warnings) = rig.rig.store.load_all_with_warnings().await.unwrap();
    assert_eq!(loaded, std::slice::from_ref(&rig.rig.catalog));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let next = |id| Catalog::first(id, "other", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    assert_eq!(rig.rig.store.create_keyspace(next).await.unwrap().keyspace, KeyspaceId(2));
    let found = fsck(&rig.rig.bucket, true).await.unwrap();
    assert_eq!(found.missing, Vec::<String>::new());
    for word in ["odd-", "circle", "dangling", "itself"] {
        assert_eq!(
            found.warnings.iter().filter(|text| text.contains(word)).count(),
            5,
            "{word}: {:?}",
            found.warnings
        );
    }
    let orphans: Vec<&str> = found.orphans.iter().map(|orphan| orphan.key.as_str()).collect();
    for key in [staged.as_str(), "lost+found/x", "catalog/x", "data/x/y"] {
        assert!(orphans.contains(&key), "{key}: {orphans:?}");
    }
    let collected = collect(&rig.rig.bucket, STRICT, false).await.unwrap();
    assert!(collected.stopped.is_none() && collected.deleted > 5, "{collected:?}");
    assert!(!rig.path(&staged).exists() && rig.path("lost+found/x").exists());
    assert!(rig.rig.keys().await.contains(&rig.rig.sst(4)));
}

/// An object that the cluster reports as written but is not there is missing, also in an empty
/// bucket.
#[tokio::test]
async fn what_is_known_to_be_there_is_looked_for() {
    let rig = Rig::new("known").await;
    rig.three_checkpoints().await;
    let owner = layout::Owner { keyspace: rig.keyspace(), shard: SHARD, replica: REPLICA };
    let known = Known {
        catalogs: vec![(rig.keyspace(), CatalogVersion(1))],
        replicas: vec![KnownReplica {
            owner,
            manifest_lsn: Lsn(30),
            shipped_lsn: Lsn(35),
            behind: Some(ShipsBehind::Nobody),
        }],
    };
    assert!(check(&rig.bucket, false, &known, now_us()).await.unwrap().is_clean());
    // Another replica has begun to ship behind this one, and has shipped nothing yet.
    let other = layout::Owner { replica: ReplicaId(REPLICA.0 + 1), ..owner };
    let mut begun = known.clone();
    begun.replicas.push(KnownReplica {
        owner: other,
        manifest_lsn: Lsn(0),
        shipped_lsn: Lsn(12),
        behind: None,
    });
    assert!(check(&rig.bucket, false, &begun, now_us()).await.unwrap().is_clean());
    let chunk = layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(31));
    let manifest = layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(30));
    let catalog = layout::catalog_version(rig.keyspace(), CatalogVersion(1));
    let name = layout::name_version("ks", 1);
    for key in [&chunk, &manifest, &catalog, &name, &layout::cluster()] {
        let body = rig.bucket.get(key).await.unwrap().unwrap();
        rig.bucket.delete(key).await.unwrap();
        let found = check(&rig.bucket, false, &known, now_us()).await.unwrap();
        assert_eq!(found.missing.first(), Some(key), "{found:?}");
        rig.put(key, body).await;
    }
    let all: Vec<String> =
        rig.bucket.list("").await.unwrap().into_iter().map(|object| object.key).collect();
    rig.bucket.delete_many(&all.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    assert!(fsck(&rig.bucket, false).await.unwrap().is_clean(), "nobody knows of anything");
    let found = check(&rig.bucket, false, &known, now_us()).await.unwrap();
    let first_chunk = layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(1));
    let mut missing = vec![catalog, layout::cluster(), first_chunk, manifest];
    missing.sort();
    assert_eq!(found.missing, missing);
}

/// Another replica of the shard has an archive; this one never made a checkpoint.
#[tokio::test]
async fn a_replica_that_has_lost_all_of_its_chunks_is_noticed_beside_another_archive() {
    let rig = Rig::new("behind").await;
    rig.three_checkpoints().await;
    let owner = layout::Owner { keyspace: rig.keyspace(), shard: SHARD, replica: REPLICA };
    let other = layout::Owner { replica: ReplicaId(REPLICA.0 + 1), ..owner };
    let missing = async |shipped_lsn: u64, behind: Option<ShipsBehind>| {
        let (manifest_lsn, shipped_lsn) = (Lsn(0), Lsn(shipped_lsn));
        let replicas = vec![KnownReplica { owner: other, manifest_lsn, shipped_lsn, behind }];
        let known = Known { replicas, ..Known::default() };
        check(&rig.bucket, false, &known, now_us()).await.unwrap().missing
    };
    let behind = |object: u64, lsn: u64| {
        let (replica, object, lsn) = (REPLICA, Lsn(object), Lsn(lsn));
        Some(ShipsBehind::Others(Continues { replica, object, lsn }))
    };
    let none: [String; 0] = [];
    // It has begun behind the other one's last chunk, checkpoint, or a chunk that a later checkpoint
    // has replaced, and has shipped nothing itself.
    for object in [31, 30, 15] {
        assert_eq!(missing(12, behind(object, 12)).await, none, "{object}");
    }
    // It has shipped, and its chunks are gone.
    assert_eq!(missing(20, behind(31, 12)).await, [other.chunk(Lsn(13))]);
    assert_eq!(missing(20, Some(ShipsBehind::Nobody)).await, [other.chunk(Lsn(1))]);
    // What it continues is gone.
    assert_eq!(missing(12, behind(36, 12)).await, [owner.chunk(Lsn(36))]);
    // Its node is of an older version, and does not say.
    assert_eq!(missing(20, None).await, none);
    // One chunk of its own is there, and the rest is gone.
    rig.chunk_of(other.replica, 13, 15, Some(owner.chunk(Lsn(31)))).await;
    assert_eq!(missing(15, behind(31, 12)).await, none);
    assert_eq!(missing(18, behind(31, 12)).await, [other.chunk(Lsn(16))]);
}

/// A check that is not deep reads small objects and checks the size of the others.
#[tokio::test]
async fn a_check_reads_every_byte_only_when_it_is_asked_to() {
    let rig = Rig::new("cheap").await;
    rig.three_checkpoints().await;
    let long: Vec<u8> = (36..=6_035u64)
        .flat_map(|lsn| {
            let origin = Origin { replica: REPLICA, incarnation: Incarnation(1) };
            let body = Body::data(vec![vasto_core::record::KeyEntry {
                key: vec![1; 100],
                entry: vec![2; 100],
            }]);
            let (lsn, synced_lsn) = (Lsn(lsn), Lsn(lsn - 1));
            Record {
                lsn,
                synced_lsn,
                origin,
                own_seq: OwnSeq(lsn.0),
                commit_time: 1,
                epoch: Epoch(1),
                floor: 0,
                body,
            }
            .encode()
        })
        .collect();
    let bytes = long.len() as u64;
    let chunk = Chunk {
        keyspace: rig.keyspace(),
        shard: SHARD,
        replica: REPLICA,
        first_lsn: Lsn(36),
        last_lsn: Lsn(6_035),
        previous: Some(rig.sst(4)),
        records: long,
    };
    let key = layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(36));
    rig.put(&key, chunk.encode()).await;
    let read_by = async |deep| {
        let before = rig.bucket.counts().bytes_read;
        assert!(fsck(&rig.bucket, deep).await.unwrap().is_clean());
        rig.bucket.counts().bytes_read - before
    };
    assert!(bytes > 1 << 20 && read_by(true).await > bytes);
    let read = read_by(false).await;
    assert!(read < 50_000, "{read} bytes");
    // The list of a database's files is small, and no checkpoint opens without it.
    let list = layout::database(rig.keyspace(), SHARD, REPLICA, Lsn(30), "0000");
    let mut bad = rig.bucket.get(&list).await.unwrap().unwrap().to_vec();
    bad[3] ^= 1;
    use object_store::{ObjectStoreExt, path::Path};
    rig.bucket.raw_store().put(&Path::from(list.as_str()), bad.into()).await.unwrap();
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().corrupt, [list]);
}

/// A keyspace that is not restored from another one reads no object that is deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_keyspace_does_not_end_a_collection_that_runs() {
    let rig = Dated::new().await;
    rig.rig.three_checkpoints().await;
    for n in 100..4_100 {
        std::fs::write(rig.path(&rig.rig.sst(n)), "of a checkpoint that never got its manifest")
            .unwrap();
    }
    let bucket = rig.rig.bucket.clone();
    let collecting = tokio::spawn(async move { collect(&bucket, STRICT, false).await });
    let manifest = layout::manifest(rig.rig.keyspace(), SHARD, REPLICA, Lsn(10));
    while rig.path(&manifest).exists() {
        tokio::task::yield_now().await;
    }
    let next = |id| Catalog::first(id, "other", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    rig.rig.store.create_keyspace(next).await.unwrap();
    let collected = collecting.await.unwrap().unwrap();
    assert!(collected.stopped.is_none() && collected.deleted > 4_000, "{collected:?}");
}

/// A master that finds a non-empty prefix without a claim does not claim it.
#[tokio::test]
async fn a_prefix_that_is_not_empty_is_never_claimed() {
    for (n, key) in ["notes.txt", "catalog/00000000000000000001/00000000000000000001", "data/x"]
        .into_iter()
        .enumerate()
    {
        let bucket =
            Bucket::open(&format!("memory://claim-{n}"), &BucketOptions::default()).unwrap();
        bucket.create("probe/1", Bytes::from_static(b"of a start that was cut off")).await.unwrap();
        bucket.create(key, Bytes::from_static(b"x")).await.unwrap();
        let store = CatalogStore::new(bucket.clone());
        let error = store.claim_cluster("new".into()).await.unwrap_err();
        assert!(
            matches!(&error, vasto_shipping::CatalogError::Unclaimed { found, .. } if found == key),
            "{error:?}"
        );
        assert!(error.to_string().contains("vasto bucket repair"), "{error}");
        assert_eq!(bucket.head(&layout::cluster()).await.unwrap(), None);
        bucket.delete(key).await.unwrap();
        assert_eq!(store.claim_cluster("new".into()).await.unwrap(), "new");
    }
}

/// The target of an undone grow shipped copies of bands that others own: its archive is deleted
/// without a successor.
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

/// A replica is lost; another replica, with an old checkpoint, continues its archive. That archive
/// stays until a checkpoint covers it.
#[tokio::test]
async fn what_another_log_goes_on_behind_stays_until_a_checkpoint_covers_it() {
    for accepted in [false, true] {
        let mut rig = Rig::new(&format!("behind-{accepted}")).await;
        let (lost, next) = (REPLICA, ReplicaId(2));
        rig.checkpoint_of(next, CatalogVersion(9), 5, &[7]).await;
        rig.checkpoint_of(lost, CatalogVersion(1), 10, &[1]).await;
        let before = rig.chunk_of(lost, 11, 20, None).await;
        let behind = rig.chunk_of(next, 21, 30, Some(before.clone())).await;
        let mut catalog = rig.catalog.next(2, 2);
        catalog.placement[0].replicas[0].replica = next;
        if accepted {
            catalog.given_up.push(GivenUp { replica: lost, version: catalog.version });
        }
        rig.write(catalog).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        collect(&rig.bucket, STRICT, false).await.unwrap();
        let keys = rig.keys().await;
        assert!(
            keys.contains(&before) && keys.contains(&rig.sst(1)) && keys.contains(&behind),
            "{accepted}: {keys:?}"
        );
        // The checkpoint covers the archive that its log continues, and so all that the lost
        // replica has shipped.
        rig.checkpoint_of(next, CatalogVersion(9), 30, &[8]).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        collect(&rig.bucket, STRICT, false).await.unwrap();
        let keys = rig.keys().await;
        assert!(
            !keys.contains(&before) && !keys.contains(&rig.sst(1)) && keys.contains(&rig.sst(8)),
            "{keys:?}"
        );
    }
}

/// A tip is found by numbers without a gap: while an earlier version is on its way, the newest one
/// is not written.
#[tokio::test]
async fn a_repaired_catalog_gets_its_newest_version_last() {
    let faulty = Faulty::in_memory();
    let store = CatalogStore::new(Bucket::from_store("memory://faulty", faulty.clone()));
    let first =
        Catalog::first(KeyspaceId(1), "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    let remembered = Catalog { version: CatalogVersion(9), ..first };
    faulty.fail(Call::Put, Fault::Silence, 1);
    let repair = store.put_back(&remembered);
    assert!(tokio::time::timeout(Duration::from_millis(300), repair).await.is_err());
    let written = faulty.without_faults().list("").await.unwrap();
    let newest = layout::catalog_version(KeyspaceId(1), CatalogVersion(9));
    assert!(!written.is_empty() && written.iter().all(|object| object.key != newest));
    faulty.heal();
    store.put_back(&remembered).await.unwrap();
    assert_eq!(store.tip(KeyspaceId(1), CatalogVersion(1)).await.unwrap(), Some(remembered));
}

/// A flipped bit in the key of the chunk before, or in the magic, makes it unknown which archive a
/// log continues: none of the shard goes before that chunk can be read.
#[tokio::test]
async fn an_archive_stays_while_a_chunk_that_may_continue_it_cannot_be_read() {
    let mut rig = Rig::new("doubt").await;
    let (lost, next) = (REPLICA, ReplicaId(2));
    rig.checkpoint_of(next, CatalogVersion(9), 5, &[7]).await;
    rig.checkpoint_of(lost, CatalogVersion(1), 10, &[1]).await;
    let before = rig.chunk_of(lost, 11, 20, None).await;
    let after = rig.chunk_of(next, 21, 30, Some(before.clone())).await;
    let mut catalog = rig.catalog.next(2, 2);
    catalog.placement[0].replicas[0].replica = next;
    catalog.given_up.push(GivenUp { replica: lost, version: catalog.version });
    rig.write(catalog).await;
    use object_store::{ObjectStoreExt, path::Path};
    let path = Path::from(after.as_str());
    let sound = rig.bucket.get(&after).await.unwrap().unwrap();
    let key_at = sound.windows(before.len()).position(|part| part == before.as_bytes()).unwrap();
    for flipped in [0, key_at] {
        let mut damaged = sound.to_vec();
        damaged[flipped] ^= 1;
        rig.bucket.raw_store().put(&path, damaged.into()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        collect(&rig.bucket, STRICT, false).await.unwrap();
        assert!(rig.keys().await.contains(&before), "byte {flipped}");
    }
}

/// The last records of a replica whose loss was accepted, which no replica took over, are deleted.
#[tokio::test]
async fn what_was_given_up_goes_when_nothing_leans_on_it() {
    let mut rig = Rig::new("given-up").await;
    let next = ReplicaId(2);
    rig.checkpoint(10, &[1]).await;
    let given_up = rig.chunk(11, 20).await;
    rig.checkpoint_of(next, CatalogVersion(9), 15, &[7]).await;
    let mut catalog = rig.catalog.next(2, 2);
    catalog.placement[0].replicas[0].replica = next;
    rig.write(catalog).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    assert!(rig.keys().await.contains(&given_up), "its loss is not accepted");
    let mut catalog = rig.catalog.next(3, 3);
    catalog.given_up.push(GivenUp { replica: REPLICA, version: catalog.version });
    rig.write(catalog).await;
    collect(&rig.bucket, STRICT, false).await.unwrap();
    let keys = rig.keys().await;
    assert!(
        !keys.contains(&given_up) && !keys.contains(&rig.sst(1)) && keys.contains(&rig.sst(7)),
        "{keys:?}"
    );
}

/// A hole in the log after the last checkpoint is reported as missing; a hole before it is not.
#[tokio::test]
async fn a_hole_in_the_log_is_found() {
    let rig = Rig::new("hole").await;
    rig.three_checkpoints().await;
    rig.chunk(36, 40).await;
    rig.chunk(41, 45).await;
    let chunk = |lsn| layout::chunk(rig.keyspace(), SHARD, REPLICA, Lsn(lsn));
    rig.bucket.delete(&chunk(11)).await.unwrap();
    assert!(
        fsck(&rig.bucket, false).await.unwrap().is_clean(),
        "the checkpoint at 30 holds what was in it"
    );
    rig.bucket.delete(&chunk(36)).await.unwrap();
    assert_eq!(fsck(&rig.bucket, false).await.unwrap().missing, [chunk(36)]);
}

/// A restore, about to read what may be garbage, stops running collections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_ends_a_collection_that_runs() {
    const GARBAGE: u64 = 4_000;
    // Deleting from a disk takes long enough to be interrupted.
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::at(&format!("file://{}", dir.path().display())).await;
    rig.three_checkpoints().await;
    for n in 100..100 + GARBAGE {
        std::fs::write(dir.path().join(rig.sst(n)), "of a checkpoint that never got its manifest")
            .unwrap();
    }
    let bucket = rig.bucket.clone();
    let collecting = tokio::spawn(async move { collect(&bucket, STRICT, false).await });
    // Waits until the collection has begun to delete.
    let manifest = layout::manifest(rig.keyspace(), SHARD, REPLICA, Lsn(10));
    while rig.bucket.head(&manifest).await.unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    interrupt(&rig.bucket).await.unwrap();
    let collected = collecting.await.unwrap().unwrap();
    assert!(
        collected.stopped.is_some() && collected.deleted < GARBAGE,
        "{} deleted",
        collected.deleted
    );
    assert!(fsck(&rig.bucket, true).await.unwrap().is_clean());
}
