//! Test rig: directories for replicas, a clock that the test sets, and helpers for common
//! operations.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tempfile::TempDir;
use vasto_core::catalog::Ack;
use vasto_core::entry::{Entry, Payload};
use vasto_core::ids::{CatalogVersion, KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_core::record::{BandRange, Body, FeedProgress, KeyEntry, RangeState, Record};
use vasto_core::{Band, VastoError};
pub(crate) use vasto_testkit::{DEADLINE, memory_dir};

use crate::clock::{Clock, SharedClock};
use crate::engine::{EngineBudget, EngineShared};
use crate::host::{ReplicaSpec, open_or_begin_again};
use crate::replica::apply::band_of;
use crate::replica::command::{Control, OpKind, OpOutcome, ReplicaError, WriteOp};
use crate::replica::read::{GetResult, KeyRef, ScanPage};
use crate::replica::{OpenError, OpenOptions, Replica};

pub(crate) const START_US: u64 = 1_700_000_000_000_000;
pub(crate) const KEYSPACE: KeyspaceId = KeyspaceId(7);

/// A clock that stands still until the test sets it.
#[derive(Debug)]
pub(crate) struct TestClock(pub AtomicU64);

impl TestClock {
    pub(crate) fn set(&self, now_us: u64) {
        self.0.store(now_us, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now_us(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A directory, and the context that opens a replica in it.
///
/// Directories stay until every replica that the rig opened has stopped: a flush into a deleted
/// directory would hold up the flushes of all other databases in the process.
pub(crate) struct Rig {
    pub path: PathBuf,
    dirs: Mutex<Vec<TempDir>>,
    opened: Mutex<Vec<Replica>>,
    pub clock: Arc<TestClock>,
    pub shared: EngineShared,
    pub shard: ShardId,
    pub replica: ReplicaId,
    pub initial: (CatalogVersion, BandRange, RangeState),
}

pub(crate) fn small_engine() -> EngineShared {
    let budget = EngineBudget {
        cache_bytes: 16 << 20,
        write_buffer_bytes: 64 << 20,
        background_jobs: 2,
        rate_limit: 0,
    };
    EngineShared::new(budget)
}

impl Rig {
    /// Creates the only shard of a keyspace: it owns every band.
    pub(crate) fn new() -> Self {
        Self::of(ShardId(0), ReplicaId(1), 1, RangeState::Owned)
    }

    pub(crate) fn of(shard: ShardId, replica: ReplicaId, shards: u32, state: RangeState) -> Self {
        let dir = memory_dir();
        Self {
            path: dir.path().to_owned(),
            dirs: Mutex::new(vec![dir]),
            opened: Mutex::default(),
            clock: Arc::new(TestClock(AtomicU64::new(START_US))),
            shared: small_engine(),
            shard,
            replica,
            initial: (CatalogVersion(1), Band::owned(shards).into(), state),
        }
    }

    pub(crate) fn options(&self, dir: &Path, initial: bool) -> OpenOptions {
        OpenOptions {
            dir: dir.to_owned(),
            keyspace: KEYSPACE,
            shard: self.shard,
            replica: self.replica,
            shared: self.shared.clone(),
            clock: self.clock.clone(),
            initial: initial.then_some(self.initial),
        }
    }

    /// Opens the replica for the first time.
    pub(crate) fn create(&self) -> Replica {
        self.open(&self.path, true).unwrap()
    }

    pub(crate) fn open(&self, dir: &Path, initial: bool) -> Result<Replica, OpenError> {
        let replica = Replica::open(self.options(dir, initial))?;
        self.opened.lock().push(replica.clone());
        Ok(replica)
    }

    /// Stops a replica so that its directory can be opened again.
    pub(crate) fn close(&self, replica: Replica) {
        let _ = control(&replica, Control::Stop);
        // The thread releases the database only at its end.
        if let Some(writer) = replica.commands.take_thread() {
            let _ = writer.join();
        }
        self.opened.lock().retain(|open| !std::ptr::eq(open.engine(), replica.engine()));
    }

    /// Opens a copy of what a crash of the process would leave now.
    pub(crate) fn crash(&self, replica: &Replica) -> (PathBuf, Replica) {
        assert!(replica.applied_lsn() >= Lsn(1));
        // A file may be compacted away between its listing and its copy; then the copy is repeated.
        for _ in 0..20 {
            let copy = memory_dir();
            if copy_tree(&self.path, copy.path()).is_ok() {
                match self.open(copy.path(), false) {
                    Ok(opened) => {
                        let path = copy.path().to_owned();
                        self.dirs.lock().push(copy);
                        return (path, opened);
                    }
                    Err(OpenError::Engine(error)) => {
                        assert!(error.to_string().contains("No such file"), "{error}")
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
        panic!("the directory never stood still");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for replica in self.opened.lock().drain(..) {
            let _ = control(&replica, Control::Stop);
            // The thread releases the database only at its end, and RocksDB must not be closed
            // while the process exits.
            if let Some(writer) = replica.commands.take_thread() {
                let _ = writer.join();
            }
        }
    }
}

/// Copies the database first: a log that is copied later holds at least as much.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(from)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    names.sort();
    for path in names {
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            std::fs::create_dir_all(&target)?;
            copy_tree(&path, &target)?;
        } else if path.file_name().unwrap() != "LOCK" {
            std::fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

pub(crate) fn put(key: &str, value: &str) -> WriteOp {
    let change = OpKind::Put {
        value: Bytes::copy_from_slice(value.as_bytes()),
        ttl_ms: None,
        condition: None,
    };
    let key = Bytes::copy_from_slice(key.as_bytes());
    WriteOp { key, partition_hash: None, event_time: None, change, created_ttl_ms: None }
}

pub(crate) fn delete(key: &str) -> WriteOp {
    WriteOp { change: OpKind::Delete { condition: None }, ..put(key, "") }
}

pub(crate) fn at(event_time: u64, op: WriteOp) -> WriteOp {
    WriteOp { event_time: Some(event_time), ..op }
}

type WriteReply = Receiver<Result<Vec<OpOutcome>, VastoError>>;

/// Queues a write.
pub(crate) fn send(replica: &Replica, ops: Vec<WriteOp>, ack: Ack) -> WriteReply {
    let (done, answer) = channel();
    replica.write(ops, ack, 0, Box::new(move |result| drop(done.send(result))));
    answer
}

pub(crate) fn try_write(
    replica: &Replica,
    ops: Vec<WriteOp>,
) -> Result<Vec<OpOutcome>, VastoError> {
    send(replica, ops, Ack::Fsync).recv_timeout(DEADLINE).unwrap()
}

pub(crate) fn write(replica: &Replica, ops: Vec<WriteOp>) -> Vec<OpOutcome> {
    try_write(replica, ops).unwrap()
}

pub(crate) fn write_one(replica: &Replica, op: WriteOp) -> OpOutcome {
    write(replica, vec![op])[0]
}

pub(crate) fn applied_at(outcome: OpOutcome) -> u64 {
    match outcome {
        OpOutcome::Applied(event_time) => event_time,
        other @ (OpOutcome::Modified { .. } | OpOutcome::NotApplied { .. }) => {
            panic!("{other:?} is no plain write")
        }
        OpOutcome::Superseded(event_time) => panic!("superseded by {event_time}"),
    }
}

/// Keeps the writer busy, so that everything sent until the answer is dropped becomes one group.
pub(crate) fn hold_writer(replica: &Replica) -> Sender<()> {
    let (release, held) = channel::<()>();
    let (entered, inside) = channel();
    let done = move |_| {
        entered.send(()).unwrap();
        let _ = held.recv_timeout(DEADLINE);
    };
    replica.write(vec![put("the writer is held", "")], Ack::Os, 0, Box::new(done));
    inside.recv_timeout(DEADLINE).unwrap();
    release
}

pub(crate) fn control(replica: &Replica, order: Control) -> Result<Lsn, ReplicaError> {
    futures::executor::block_on(replica.control(order))
}

pub(crate) fn set_range(replica: &Replica, range: BandRange, state: RangeState) {
    control(
        replica,
        Control::SetRange { epoch: Default::default(), version: CatalogVersion(2), range, state },
    )
    .unwrap();
}

pub(crate) fn apply(
    replica: &Replica,
    entries: Vec<KeyEntry>,
    progress: Vec<FeedProgress>,
) -> Result<Lsn, ReplicaError> {
    futures::executor::block_on(replica.apply(entries, progress))
}

/// Returns an entry as another replica's log would bring it.
pub(crate) fn value_entry(key: &str, event_time: u64, value: &str) -> KeyEntry {
    let payload = Some(Payload::Bytes(value.as_bytes()));
    let entry =
        Entry { event_time, expires_at: None, partition_hash: None, commit_time: None, payload };
    KeyEntry { key: key.as_bytes().to_vec(), entry: entry.encode() }
}

pub(crate) fn tombstone_entry(key: &str, event_time: u64, commit_time: u64) -> KeyEntry {
    let entry = Entry {
        event_time,
        expires_at: None,
        partition_hash: None,
        commit_time: Some(commit_time),
        payload: None,
    };
    KeyEntry { key: key.as_bytes().to_vec(), entry: entry.encode() }
}

pub(crate) fn key_ref(key: &str) -> KeyRef {
    KeyRef { key: Bytes::copy_from_slice(key.as_bytes()), partition_hash: None }
}

pub(crate) fn try_get(replica: &Replica, key: &str) -> Result<Option<String>, VastoError> {
    let GetResult::Values(mut values) = replica.get_many(&[key_ref(key)], true)? else {
        panic!("it may block")
    };
    let text = |value: vasto_proto::v1::Value| match value.payload {
        Some(vasto_proto::v1::value::Payload::Data(bytes)) => {
            String::from_utf8(bytes.to_vec()).unwrap()
        }
        other => panic!("{other:?}"),
    };
    Ok(values.remove(0).map(text))
}

pub(crate) fn get(replica: &Replica, key: &str) -> Option<String> {
    try_get(replica, key).unwrap()
}

/// Returns all keys that a scan shows, page by page.
pub(crate) fn scan_keys(replica: &Replica, mut page: ScanPage) -> Vec<String> {
    let mut keys = Vec::new();
    loop {
        let reply = replica.scan(replica.epoch(), &page).unwrap();
        keys.extend(reply.rows.iter().map(|row| String::from_utf8(row.key.to_vec()).unwrap()));
        if !reply.more {
            return keys;
        }
        page.after = reply.resume_after.or_else(|| reply.rows.last().map(|row| row.key.clone()));
        assert!(page.after.is_some(), "a page with more behind it leads on");
    }
}

pub(crate) fn band(replica: &Replica, key: &str) -> Band {
    band_of(replica.shard, key.as_bytes(), None).unwrap()
}

/// Returns keys `<prefix>0…` that live in the band of shard 0.
pub(crate) fn keys_in(wanted: Band, prefix: &str, count: usize) -> Vec<String> {
    let keys = (0..).map(|i| format!("{prefix}{i:05}"));
    keys.filter(|key| band_of(ShardId(0), key.as_bytes(), None) == Some(wanted))
        .take(count)
        .collect()
}

/// Returns the records in the log, decoded.
pub(crate) fn records(replica: &Replica) -> Vec<Record> {
    control(replica, Control::Sync).unwrap();
    let first = replica.log().first_lsn();
    let mut reader = replica.log().reader(Lsn(first.0 - 1)).unwrap();
    let mut out: Vec<Record> = Vec::new();
    loop {
        let batch = reader.next_batch(1 << 20).unwrap();
        if batch.is_empty() {
            return out;
        }
        out.extend(batch.iter().map(|(_, bytes)| Record::decode(bytes).unwrap()));
    }
}

/// Returns the keys of a data record.
pub(crate) fn data_keys(record: &Record) -> Vec<String> {
    let Body::Data { entries, .. } = &record.body else { return Vec::new() };
    entries.iter().map(|entry| String::from_utf8(entry.key.clone()).unwrap()).collect()
}

/// Checks that LSNs are contiguous, and own_seq from 1 in every incarnation, which begins with
/// `adopt`.
pub(crate) fn assert_log_is_whole(records: &[Record]) {
    let mut previous: Option<&Record> = None;
    let mut own_seq = 0;
    for record in records {
        if let Some(before) = previous {
            assert_eq!(record.lsn, before.lsn.next());
            assert!(record.commit_time > before.commit_time, "commit times rise");
        }
        if previous.is_none_or(|before| before.origin != record.origin) {
            let Body::Adopt { previous: ended, head } = &record.body else {
                panic!("an incarnation begins with adopt")
            };
            assert_eq!(ended.0 + 1, record.origin.incarnation.0);
            if previous.is_some() {
                assert_eq!(head.0, own_seq, "it ends the previous one at its head");
            }
            own_seq = 0;
        }
        if record.body.is_streamed() {
            own_seq += 1;
            assert_eq!(record.own_seq.0, own_seq);
        } else {
            assert_eq!(record.own_seq.0, 0);
        }
        previous = Some(record);
    }
}

pub(crate) type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// Returns everything under data bands, as stored.
pub(crate) fn data_rows(replica: &Replica) -> Rows {
    Band::all().flat_map(|band| replica.engine().with_prefix(&[band.0]).unwrap()).collect()
}

pub(crate) fn meta_rows(replica: &Replica) -> Rows {
    replica.engine().with_prefix(&[0xFF]).unwrap().into_iter().collect()
}

/// Opens a replica as its host does after a crash.
pub(crate) async fn open_again(rig: &Rig, dir: &Path) -> Replica {
    let spec = ReplicaSpec {
        keyspace: KEYSPACE,
        shard: rig.shard,
        replica: rig.replica,
        dir: dir.to_owned(),
        tmp: dir.join("tmp"),
    };
    let (engines, clock, initial) =
        (rig.shared.clone(), rig.clock.clone() as SharedClock, rig.initial);
    let opened = tokio::task::spawn_blocking(move || {
        let mut opened = None;
        wait_for("the lock of the database", || {
            opened = open_or_begin_again(&spec, &engines, &clock, initial).ok();
            opened.is_some()
        });
        opened.unwrap()
    });
    opened.await.unwrap()
}

/// Waits for a condition, on a thread without a runtime.
pub(crate) fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "in vain: {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// Waits for a condition without holding up the runtime.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
