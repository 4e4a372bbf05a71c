//! Chunks, checkpoints and truncation against a real object store in memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vasto_core::ids::Lsn;
use vasto_core::plan::PinnedManifest;
use vasto_core::record::Record;
use vasto_shipping::{Bucket, BucketOptions, Chunk, Manifest, layout};

use super::support::*;
use crate::bulk::{Bound, BulkGate};
use crate::replica::Replica;
use crate::ship::{self, Assignment, LogNeed, Pace, ShipContext, ShipHandle};

pub(super) fn bucket() -> Bucket {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "memory://replica-tests-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    Bucket::open(&name, &BucketOptions::default()).unwrap()
}

/// A running shipper.
pub(super) struct Shipping {
    pub handle: ShipHandle,
    pub pace: Arc<Pace>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
    _tmp: TempDir,
}

impl Shipping {
    /// Starts a shipper; with an hour between chunks it ships only on request and at the end.
    pub(super) fn start(
        rig: &Rig,
        dir: &Path,
        replica: &Replica,
        bucket: &Bucket,
        interval: Duration,
    ) -> Self {
        Self::with_cap(rig, dir, replica, bucket, interval, vasto_core::limits::BINLOG_BYTES_MAX)
    }

    /// Starts a shipper with a cap on the log.
    pub(super) fn with_cap(
        rig: &Rig,
        dir: &Path,
        replica: &Replica,
        bucket: &Bucket,
        interval: Duration,
        log_cap: u64,
    ) -> Self {
        let tmp = memory_dir();
        let pace = Arc::new(Pace::new(0));
        let context = ShipContext {
            replica: replica.clone(),
            bucket: bucket.clone(),
            dir: dir.to_owned(),
            tmp: tmp.path().to_owned(),
            engines: rig.shared.clone(),
            clock: rig.clock.clone(),
            interval,
            log_cap,
            pace: pace.clone(),
        };
        let cancel = CancellationToken::new();
        let (handle, shipper) = ship::start(context, cancel.clone());
        handle.assign(Assignment::Preferred);
        Self { handle, pace, cancel, task: tokio::spawn(shipper), _tmp: tmp }
    }

    pub(super) async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
    }

    /// Ends the shipper at once, as a crash does.
    pub(super) fn kill(self) {
        self.task.abort();
    }

    pub(super) fn shipped(&self) -> Lsn {
        self.handle.status().shipped
    }
}

const HOUR: Duration = Duration::from_secs(3600);
const AT_ONCE: Duration = Duration::ZERO;

pub(super) async fn manifest(bucket: &Bucket, pinned: &PinnedManifest) -> Manifest {
    Manifest::decode(&bucket.get(&pinned.key).await.unwrap().unwrap()).unwrap()
}

/// Returns all records behind an LSN, walked by name as a restore does.
async fn walk(bucket: &Bucket, replica: &Replica, after: Lsn) -> Vec<Record> {
    let mut out = Vec::new();
    let mut next = after.next();
    loop {
        let key = layout::chunk(replica.keyspace, replica.shard, replica.id, next);
        let Some(bytes) = bucket.get(&key).await.unwrap() else { return out };
        let chunk = Chunk::decode(&bytes).unwrap();
        assert_eq!(chunk.first_lsn, next);
        let records: Vec<Record> = chunk.records().map(Result::unwrap).collect();
        assert_eq!(records.last().unwrap().lsn, chunk.last_lsn);
        out.extend(records);
        next = chunk.last_lsn.next();
    }
}

fn assert_contiguous(records: &[Record], first: Lsn, last: Lsn) {
    let lsns: Vec<u64> = records.iter().map(|record| record.lsn.0).collect();
    assert_eq!(lsns, (first.0..=last.0).collect::<Vec<_>>());
}

fn put_many(replica: &Replica, prefix: &str, count: usize) {
    for i in 0..count {
        write_one(replica, put(&format!("{prefix}{i}"), "v"));
    }
}

/// Writes from the test's own thread while the runtime works.
async fn put_async(replica: &Replica, prefix: &'static str, count: usize) {
    let replica = replica.clone();
    tokio::task::spawn_blocking(move || put_many(&replica, prefix, count)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_says_what_its_checkpoint_holds_under_concurrent_writes() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, HOUR);
    put_async(&replica, "before", 50).await;
    let stop = Arc::new(AtomicU64::new(0));
    let writer = {
        let (replica, stop) = (replica.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut i = 0;
            while stop.load(Ordering::Relaxed) == 0 {
                write_one(&replica, put(&format!("during{i}"), "v"));
                i += 1;
            }
        })
    };
    for _ in 0..5 {
        let floor = replica.applied_lsn();
        let pinned = shipping.handle.checkpoint(None).await.unwrap();
        let manifest = manifest(&bucket, &pinned).await;
        assert_eq!(manifest.lsn, pinned.lsn);
        assert!(manifest.lsn >= floor && manifest.lsn <= replica.applied_lsn());
        // One incarnation: own_seq counts all but the one local record (the first range state).
        let vector: Vec<u64> = manifest.vector.values().map(|seq| seq.0).collect();
        assert_eq!(vector, vec![manifest.lsn.0 - 1]);
        // The rows of the checkpoint's files, read as an importer would, are the log up to its LSN
        // and no more.
        let dir = memory_dir();
        let import: Vec<_> = manifest
            .files
            .iter()
            .map(|file| crate::engine::ImportFile {
                name: format!("{:06}.sst", file.file_number),
                bytes: file.bytes,
                level: file.level,
                smallest_seqno: file.smallest_seqno,
                largest_seqno: file.largest_seqno,
                first_key: file.first_key.clone(),
                last_key: file.last_key.clone(),
                entries: file.entries,
            })
            .collect();
        for (file, to) in manifest.files.iter().zip(&import) {
            let bytes = bucket.get(&file.key).await.unwrap().unwrap();
            assert_eq!((bytes.len() as u64, crc32c::crc32c(&bytes)), (file.bytes, file.crc32c));
            std::fs::write(dir.path().join(&to.name), &bytes).unwrap();
        }
        let scratch =
            crate::engine::Scratch::import(&dir.path().join("scratch"), dir.path(), &import)
                .unwrap();
        let mut rows = 0;
        for band in vasto_core::Band::all() {
            let mut cursor = scratch.rows(band, 2 << 20);
            while cursor.current().unwrap().is_some() {
                rows += 1;
                cursor.advance();
            }
        }
        // Every record behind adopt and range state is one new key.
        assert_eq!(rows, manifest.lsn.0 - 2);
    }
    stop.store(1, Ordering::Relaxed);
    writer.join().unwrap();
    shipping.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_checkpoint_uploads_only_what_is_new() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, HOUR);
    put_async(&replica, "first", 200).await;
    let first = shipping.handle.checkpoint(None).await.unwrap();
    let again = shipping.handle.checkpoint(None).await.unwrap();
    assert_eq!(first, again, "nothing has changed: no new manifest");
    let first = manifest(&bucket, &first).await;
    put_async(&replica, "second", 5).await;
    let second = shipping.handle.checkpoint(None).await.unwrap();
    let second = manifest(&bucket, &second).await;
    let first_keys: Vec<&String> = first.files.iter().map(|file| &file.key).collect();
    let (kept, new): (Vec<_>, Vec<_>) =
        second.files.iter().partition(|file| first_keys.contains(&&file.key));
    assert_eq!(
        kept.len(),
        first.files.len(),
        "every SST of the first is named again, not uploaded again"
    );
    assert_eq!(new.len(), 1);
    let prefix =
        format!("{}sst/", layout::replica_prefix(replica.keyspace, replica.shard, replica.id));
    let stored = bucket.list(&prefix).await.unwrap();
    assert_eq!(stored.len(), first.files.len() + 1);
    shipping.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chunks_behind_a_manifest_are_contiguous_by_name() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    let mut pinned = vec![PinnedManifest { key: String::new(), lsn: Lsn(0) }];
    for round in ["a", "b", "c"] {
        put_async(&replica, round, 20).await;
        pinned.push(shipping.handle.checkpoint(None).await.unwrap());
        put_async(&replica, round, 20).await;
        let head = replica.settled_lsn();
        until("the chunk", || shipping.shipped() >= head).await;
    }
    shipping.stop().await;
    let last = replica.settled_lsn();
    for manifest in &pinned[3..] {
        assert_contiguous(&walk(&bucket, &replica, manifest.lsn).await, manifest.lsn.next(), last);
    }
    let all = walk(&bucket, &replica, pinned[3].lsn).await;
    let local = records(&replica);
    assert_eq!(all[..], local[pinned[3].lsn.0 as usize..], "the same records as in the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_stale_position_recovers_from_what_the_bucket_holds() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    put_async(&replica, "a", 20).await;
    let pinned = shipping.handle.checkpoint(None).await.unwrap();
    shipping.stop().await;
    let position = rig.path.join("ship.json");
    let stale = std::fs::read(&position).unwrap();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    put_async(&replica, "b", 20).await;
    shipping.stop().await;
    for lost in [true, false] {
        if lost {
            std::fs::remove_file(&position).unwrap();
        } else {
            std::fs::write(&position, &stale).unwrap();
        }
        let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
        put_async(&replica, "c", 20).await;
        let head = replica.settled_lsn();
        until("the chunk", || shipping.shipped() >= head).await;
        let manifest = shipping.handle.checkpoint(None).await.unwrap();
        assert!(manifest.lsn > pinned.lsn);
        shipping.stop().await;
        let walked = walk(&bucket, &replica, pinned.lsn).await;
        assert!(!walked.is_empty(), "lost {lost}");
    }
}

/// Only objects that this replica has shipped itself prove that the directory is an old copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_in_the_way_closes_nobody_and_another_history_does() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let key = |first: Lsn| layout::chunk(replica.keyspace, replica.shard, replica.id, first);
    let first = replica.settled_lsn().next();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    until("what is there already", || shipping.shipped().next() >= first).await;
    let next = shipping.shipped().next();
    bucket
        .create(&key(next), bytes::Bytes::from_static(b"VASTOCHK, and then noise"))
        .await
        .unwrap();
    put_async(&replica, "a", 5).await;
    until("the shipper to say what is in the way", || {
        shipping.pace.trouble().is_some_and(|trouble| trouble.contains("is in the way"))
    })
    .await;
    assert_eq!(replica.closed(), None);
    put_async(&replica, "b", 5).await;
    // A checkpoint makes shipping continue behind it.
    let head = replica.settled_lsn();
    shipping.handle.checkpoint(None).await.unwrap();
    assert!(shipping.shipped() >= head);
    shipping.stop().await;

    let lsn = replica.settled_lsn().next();
    let other = Record {
        lsn,
        synced_lsn: Lsn(lsn.0 - 1),
        commit_time: 1,
        floor: 0,
        epoch: vasto_core::ids::Epoch(1),
        origin: vasto_core::ids::Origin {
            replica: replica.id,
            incarnation: vasto_core::ids::Incarnation(1),
        },
        own_seq: vasto_core::ids::OwnSeq(lsn.0),
        body: vasto_core::record::Body::data(Vec::new()),
    };
    let chunk = Chunk {
        keyspace: replica.keyspace,
        shard: replica.shard,
        replica: replica.id,
        first_lsn: lsn,
        last_lsn: lsn,
        previous: None,
        records: other.encode(),
    };
    bucket.create(&key(lsn), chunk.encode()).await.unwrap();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    put_async(&replica, "c", 1).await;
    until("the replica to close", || replica.closed().is_some()).await;
    assert!(replica.closed().unwrap().contains("old copy"));
    shipping.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_that_the_log_no_longer_reaches_is_replaced_by_a_checkpoint() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let filler = replica.clone();
    tokio::task::spawn_blocking(move || fill_a_file(&filler)).await.unwrap();
    replica.engine().flush().unwrap();
    replica.log().truncate_to(replica.persisted_lsn().unwrap()).unwrap();
    assert!(replica.log().first_lsn() > Lsn(1), "the front of the log is gone");
    // Nothing was ever shipped, so the next chunk would begin at LSN 1.
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    let head = replica.settled_lsn();
    until("a checkpoint instead of the missing chunks", || shipping.shipped() >= head).await;
    put_async(&replica, "after", 5).await;
    let head = replica.settled_lsn();
    until("chunks behind it", || shipping.shipped() >= head).await;
    let lsn = shipping.handle.status().manifest;
    shipping.stop().await;
    assert_contiguous(&walk(&bucket, &replica, lsn).await, lsn.next(), head);
}

/// The chunk is in the bucket, and `ship.json` cannot be written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_that_is_not_recorded_is_not_published() {
    let (rig, bucket) = (Rig::new(), bucket());
    let replica = rig.create();
    put_async(&replica, "k", 1).await;
    let shipping =
        Shipping::start(&rig, &rig.path.join("no such directory"), &replica, &bucket, HOUR);
    shipping.handle.log().await.unwrap_err();
    assert_eq!(shipping.shipped(), Lsn(0));
    shipping.stop().await;
    assert!(!walk(&bucket, &replica, Lsn(0)).await.is_empty());
}

/// Writes more than one file of the log.
pub(super) fn fill_a_file(replica: &Replica) {
    use crate::replica::command::{OpKind, WriteOp};
    for i in 0..18 {
        let change =
            OpKind::Put { value: vec![3u8; 4 << 20].into(), ttl_ms: None, condition: None };
        write_one(replica, WriteOp { change, ..put(&format!("big{}", i % 2), "") });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_truncated_only_behind_what_is_persisted_shipped_and_not_needed() {
    let rig = Rig::new();
    let replica = rig.create();
    let bucket = bucket();
    let filler = replica.clone();
    tokio::task::spawn_blocking(move || fill_a_file(&filler)).await.unwrap();
    let first_file_end = replica.applied_lsn();
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    shipping.handle.set_need(LogNeed { after: Lsn(1), from_bucket: false });
    let head = replica.settled_lsn();
    until("the chunks", || shipping.shipped() >= head).await;
    replica.engine().flush().unwrap();
    // Rounds of the shipper pass; each would truncate if that were allowed.
    for round in ["x", "y"] {
        put_async(&replica, round, 1).await;
        let head = replica.settled_lsn();
        until("another round", || shipping.shipped() >= head).await;
        assert_eq!(replica.log().first_lsn(), Lsn(1), "a plan needs it");
    }
    shipping.handle.set_need(LogNeed::NONE);
    until("the truncation", || replica.log().first_lsn() > Lsn(1)).await;
    assert!(replica.log().first_lsn() <= first_file_end.next());
    assert!(replica.log().first_lsn() <= replica.persisted_lsn().unwrap().next());
    shipping.stop().await;
    let (_dir, again) = rig.crash(&replica);
    assert_eq!(data_rows(&again), data_rows(&replica));
}

/// The log that is cut behind a checkpoint must not fill up while the checkpoint yields.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_yields_only_until_the_log_is_half_full() {
    const CAP: u64 = 128 << 20;
    let rig = Rig::new();
    let replica = rig.create();
    put_async(&replica, "k", 50).await;
    let gate = Arc::new(BulkGate::default());
    gate.set_bound(Bound::Held, Instant::now());
    let bucket = bucket().with_pacer(gate.uploads_of(replica.keyspace, replica.id));
    let shipping = Shipping::with_cap(&rig, &rig.path, &replica, &bucket, HOUR, CAP);
    shipping.handle.set_need(LogNeed { after: Lsn(1), from_bucket: false });
    let handle = shipping.handle.clone();
    let waiting = tokio::spawn(async move { handle.checkpoint(None).await });
    until("the checkpoint to wait", || gate.look(Instant::now()).held_back).await;
    assert!(!waiting.is_finished());
    let filler = replica.clone();
    tokio::task::spawn_blocking(move || fill_a_file(&filler)).await.unwrap();
    tokio::time::timeout(DEADLINE, waiting).await.unwrap().unwrap().unwrap();
    shipping.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_only_in_the_memtable_or_not_shipped_keeps_its_log() {
    let rig = Rig::new();
    let replica = rig.create();
    let filler = replica.clone();
    tokio::task::spawn_blocking(move || fill_a_file(&filler)).await.unwrap();
    let bucket = bucket();
    // Shipped, not persisted (unless the size of the memtable caused a flush: then persisted up to
    // there).
    let shipping = Shipping::start(&rig, &rig.path, &replica, &bucket, AT_ONCE);
    let head = replica.settled_lsn();
    until("the chunks", || shipping.shipped() >= head).await;
    put_async(&replica, "x", 1).await;
    let head = replica.settled_lsn();
    until("another round", || shipping.shipped() >= head).await;
    assert!(replica.log().first_lsn() <= replica.persisted_lsn().unwrap().next());
    shipping.stop().await;
    let (_dir, again) = rig.crash(&replica);
    assert_eq!(data_rows(&again), data_rows(&replica));
    // Persisted, not shipped.
    replica.engine().flush().unwrap();
    std::fs::remove_file(rig.path.join("ship.json")).unwrap();
    let before = replica.log().first_lsn();
    let quiet = Shipping::start(&rig, &rig.path, &replica, &super::shipping::bucket(), HOUR);
    // The wait is longer than a tick of the shipper.
    let truncated = until("the log to be cut too early", || replica.log().first_lsn() != before);
    assert!(tokio::time::timeout(Duration::from_millis(700), truncated).await.is_err());
    quiet.stop().await;
}
