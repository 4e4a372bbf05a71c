//! Every request to the bucket fails in every way, and the process dies before and after each: afterwards the objects
//! in the bucket restore everything, or the restore names what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path as ObjectPath;
use object_store::*;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, NodeId, PlanId, ReplicaId};
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::TargetProgress;
use vasto_shipping::gc::{Retention, collect, fsck};
use vasto_shipping::{Bucket, CatalogStore, CatalogWrite, RetryBudget};

use super::shipping::Shipping;
use super::support::*;
use crate::build::sources::{self, Without};
use crate::build::{Adoption, Bootstrap, Log};
use crate::registry::NodeRegistry;
use crate::replica::{OpenOptions, Replica};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The request is not executed, and an error is returned.
    Before,
    /// The request is executed, and an error is returned.
    After,
    /// The request may or may not be executed; no response is returned.
    Silence,
    /// 503 SlowDown.
    Throttle,
    /// A body ends early without an error.
    Short,
    /// One bit of a body is flipped.
    Flip,
    /// The process dies before the request.
    DieBefore,
    /// The process dies after the request.
    DieAfter,
}

/// A store that fails in one way, at one call.
#[derive(Debug)]
pub struct Scripted {
    store: Arc<dyn ObjectStore>,
    calls: AtomicU64,
    at: AtomicU64,
    fault: Mutex<Option<Fault>>,
    /// Every request is answered with an error.
    pub down: AtomicBool,
    /// A stored body was altered: only a read can detect that.
    altered: AtomicBool,
    /// The planned fault has happened.
    fired: AtomicBool,
    /// A body was read that was altered or cut short on its way.
    misread: AtomicBool,
    died: Arc<Notify>,
}

impl std::fmt::Display for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

fn broken(what: &str) -> Error {
    let source = client::HttpError::new(client::HttpErrorKind::Interrupted, std::io::Error::other(what.to_owned()));
    Error::Generic { store: "scripted", source: Box::new(source) }
}

impl Scripted {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            store: Arc::new(memory::InMemory::new()),
            calls: AtomicU64::new(0),
            at: AtomicU64::new(0),
            fault: Mutex::new(None),
            down: AtomicBool::new(false),
            altered: AtomicBool::new(false),
            fired: AtomicBool::new(false),
            misread: AtomicBool::new(false),
            died: Arc::default(),
        })
    }

    /// Returns the fault of this call.
    fn turn(&self) -> Option<Fault> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        if self.down.load(Ordering::SeqCst) {
            return Some(Fault::Before);
        }
        let fault = (call == self.at.load(Ordering::SeqCst)).then(|| self.fault.lock().take()).flatten();
        self.fired.fetch_or(fault.is_some(), Ordering::SeqCst);
        fault
    }

    fn plan(&self, at: u64, fault: Fault) {
        self.at.store(at, Ordering::SeqCst);
        *self.fault.lock() = Some(fault);
    }

    pub fn bucket(self: &Arc<Self>) -> Bucket {
        let budget = RetryBudget {
            total: Duration::from_secs(2),
            attempt: Duration::from_millis(100),
            transfer: Duration::from_millis(100),
            backoff_first: Duration::from_millis(1),
            backoff_max: Duration::from_millis(4),
        };
        Bucket::from_store("memory://scripted", self.clone()).with_retry(budget)
    }

    /// Returns a bucket with the same content, without faults.
    pub fn good(&self) -> Bucket {
        Bucket::from_store("memory://scripted", self.store.clone())
    }

    async fn before(&self, fault: Option<Fault>) -> Result<()> {
        match fault {
            Some(Fault::Before) => Err(broken("connection reset before")),
            Some(Fault::Throttle) => Err(broken("503 Slow Down: please reduce your request rate")),
            Some(Fault::DieBefore) => self.die().await,
            _ => Ok(()),
        }
    }

    async fn after(&self, fault: Option<Fault>) -> Result<()> {
        match fault {
            Some(Fault::After) => Err(broken("connection reset after")),
            Some(Fault::Silence) => std::future::pending().await,
            Some(Fault::DieAfter) => self.die().await,
            _ => Ok(()),
        }
    }

    async fn die(&self) -> Result<()> {
        self.died.notify_one();
        std::future::pending().await
    }
}

fn flipped(body: &[u8]) -> bytes::Bytes {
    let mut body = body.to_vec();
    let middle = body.len() / 2;
    if let Some(byte) = body.get_mut(middle) {
        *byte ^= 1;
    }
    body.into()
}

#[async_trait::async_trait]
impl ObjectStore for Scripted {
    async fn put_opts(&self, location: &ObjectPath, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let fault = self.turn();
        self.before(fault).await?;
        let payload = match fault {
            Some(Fault::Flip) => {
                self.altered.store(true, Ordering::SeqCst);
                flipped(&bytes::Bytes::from(payload)).into()
            }
            _ => payload,
        };
        let result = self.store.put_opts(location, payload, options).await;
        self.after(fault).await?;
        result
    }

    async fn put_multipart_opts(
        &self,
        location: &ObjectPath,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &ObjectPath, options: GetOptions) -> Result<GetResult> {
        let fault = self.turn();
        self.before(fault).await?;
        let head = options.head;
        let result = self.store.get_opts(location, options).await;
        self.after(fault).await?;
        let result = result?;
        if head || !matches!(fault, Some(Fault::Short | Fault::Flip)) {
            return Ok(result);
        }
        self.misread.store(true, Ordering::SeqCst);
        let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
        let body = result.bytes().await?;
        let body = if fault == Some(Fault::Flip) { flipped(&body) } else { body.slice(..body.len() / 2) };
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(body)]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<ObjectPath>>,
    ) -> BoxStream<'static, Result<ObjectPath>> {
        let fault = self.turn();
        match fault {
            Some(Fault::DieBefore) => {
                self.died.notify_one();
                futures::stream::pending().boxed()
            }
            Some(Fault::Before | Fault::Throttle) => futures::stream::iter([Err(broken("delete"))]).boxed(),
            Some(Fault::After) => {
                let done = self.store.delete_stream(locations);
                done.map(|_| Err(broken("after the delete"))).boxed()
            }
            Some(Fault::Silence) => futures::stream::pending().boxed(),
            Some(Fault::DieAfter) => {
                let (done, died) = (self.store.delete_stream(locations), self.died.clone());
                let end = async move {
                    let _: Vec<_> = done.collect().await;
                    died.notify_one();
                    std::future::pending().await
                };
                futures::stream::once(end).boxed()
            }
            _ => self.store.delete_stream(locations),
        }
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.turn() {
            // A listing without a response is ended by the time-out of the HTTP client.
            Some(Fault::Before | Fault::After | Fault::Throttle | Fault::Silence) => {
                futures::stream::iter([Err(broken("list"))]).boxed()
            }
            Some(Fault::DieBefore | Fault::DieAfter) => {
                self.died.notify_one();
                futures::stream::pending().boxed()
            }
            _ => self.store.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> Result<ListResult> {
        let fault = self.turn();
        self.before(fault).await?;
        let result = self.store.list_with_delimiter(prefix).await;
        self.after(fault).await?;
        result
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}

type Contents = BTreeMap<String, String>;

const KEYS: usize = 30;

fn contents(replica: &Replica, rounds: usize) -> Contents {
    let keys = (0..rounds).flat_map(|round| (0..KEYS).map(move |n| format!("r{round}-{n}")));
    let found = keys.chain((0..KEYS).map(|n| format!("same{n}")));
    found.filter_map(|key| Some((key.clone(), get(replica, &key)?))).collect()
}

async fn fill(replica: &Replica, round: usize) {
    let replica = replica.clone();
    let work = move || {
        let new = (0..KEYS).map(|n| put(&format!("r{round}-{n}"), &format!("value {n} of {round}")));
        write(&replica, new.collect());
        write(&replica, (0..KEYS).map(|n| put(&format!("same{n}"), &format!("as of {round}"))).collect());
        write_one(&replica, delete(&format!("same{round}")));
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

/// Registers the keyspace in the catalog: without that none of its data is judged.
async fn register(bucket: &Bucket) {
    let store = CatalogStore::new(bucket.clone());
    store.claim_cluster("c".into()).await.unwrap();
    let first = Catalog::first(KEYSPACE, "ks", KeyspaceSpec::default(), &[vec![NodeId(1)]], 1, 1);
    assert_eq!(store.write(&first).await.unwrap(), CatalogWrite::Won);
}

const STRICT: Retention = Retention { keep_checkpoints: 1, keep_for: Duration::ZERO, min_age: Duration::ZERO };

/// Restores what the bucket holds of the replica as a keyspace of its own; retries as a node does.
async fn restored(rig: &Rig, bucket: &Bucket, rounds: usize, died: &Notify) -> std::result::Result<Contents, String> {
    let dir = memory_dir();
    let plan = Plan {
        id: PlanId(1),
        kind: PlanKind::Restore { keyspace: KEYSPACE, version: CatalogVersion(1), at_us: None },
        from_epoch: Epoch(1),
        started_at_us: 1,
        step: Step::Tail,
        sources: Vec::new(),
        targets: Vec::new(),
        seals_undone: 0,
    };
    let log = Log::Fork { shards: 1, until_us: None };
    let owned: BandRange = Band::owned(1).into();
    let mut last = String::new();
    for _ in 0..10 {
        let bootstrap = Bootstrap {
            bucket: bucket.clone(),
            engines: rig.shared.clone(),
            dir: dir.path().to_owned(),
            side: dir.path().join("side"),
            progress: Arc::new(Mutex::new(TargetProgress::new(plan.id))),
            registry: Arc::new(NodeRegistry::new(NodeId(1), rig.clock.clone(), 1)),
            cancel: CancellationToken::new(),
        };
        let kept = Mutex::new(None::<Replica>);
        let attempt = async {
            let text = |error: crate::build::BuildError| error.to_string();
            let choose = sources::candidates(bucket, KEYSPACE, rig.shard, &[], Without::default(), None);
            let found = sources::chosen(bucket, &dir.path().join("sources.json"), choose).await.map_err(text)?;
            let is_new = !crate::replica::database_dir(dir.path()).join("CURRENT").exists();
            if let Some(base) = found.all.first().and_then(|one| one.base.as_ref()).filter(|_| is_new) {
                let adoption = Adoption {
                    keyspace: KeyspaceId(8),
                    replica: ReplicaId(1),
                    owned,
                    version: CatalogVersion(1),
                    epoch: Epoch(1),
                };
                bootstrap.take(base, adoption, log).await.map_err(text)?;
            }
            let opened = tokio::task::block_in_place(|| {
                Replica::open(OpenOptions {
                    keyspace: KeyspaceId(8),
                    replica: ReplicaId(1),
                    initial: Some((CatalogVersion(1), owned, RangeState::Owned)),
                    ..rig.options(dir.path(), true)
                })
            });
            let replica = opened.map_err(|error| error.to_string())?;
            *kept.lock() = Some(replica.clone());
            let merged = bootstrap.merge_all(&replica, &found, 1, None).await.map_err(text);
            merged.map(|()| contents(&replica, rounds))
        };
        let result = tokio::select! {
            result = attempt => result,
            () = died.notified() => Err("it died".into()),
        };
        // A process that dies leaves no lock behind.
        let replica = kept.lock().take();
        if let Some(replica) = replica {
            replica.stop().await;
        }
        match result {
            Ok(contents) => return Ok(contents),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Runs three rounds of writes and checkpoints, a tail of log, a garbage collection; after a crash the next process
/// runs on what the crash left of the directory.
async fn life(rig: &Rig, script: &Arc<Scripted>) -> Contents {
    let bucket = script.bucket();
    let mut path = rig.path.clone();
    let mut replica = tokio::task::block_in_place(|| rig.create());
    for round in 0..3 {
        fill(&replica, round).await;
        for attempt in 0.. {
            assert!(attempt < 20, "the checkpoint never gets through");
            let shipping = Shipping::start(rig, &path, &replica, &bucket, Duration::from_secs(3_600));
            let died = tokio::select! {
                done = shipping.handle.checkpoint(None) => { if done.is_ok() { shipping.stop().await; break } false }
                () = script.died.notified() => true,
            };
            shipping.kill();
            if died {
                (path, replica) = tokio::task::block_in_place(|| rig.crash(&replica));
            }
        }
    }
    fill(&replica, 3).await;
    for _ in 0..5 {
        // The shipper ships the rest of the log when it ends.
        let shipping = Shipping::start(rig, &path, &replica, &bucket, Duration::from_secs(3_600));
        let handle = shipping.handle.clone();
        tokio::select! {
            () = shipping.stop() => {}
            () = script.died.notified() => {}
        }
        if handle.status().shipped >= replica.settled_lsn() {
            break;
        }
    }
    for _ in 0..5 {
        tokio::select! {
            done = collect(&bucket, STRICT, false) => if done.is_ok() { break },
            () = script.died.notified() => {}
        }
    }
    let wanted = contents(&replica, 4);
    assert_eq!(wanted.len(), 5 * KEYS - 1);
    wanted
}

struct Cell {
    calls: u64,
    altered: bool,
    misread: bool,
    refused: Option<String>,
}

async fn run(at: u64, fault: Option<Fault>) -> Cell {
    let cell = format!("{fault:?} at call {at}");
    let rig = Rig::new();
    let script = Scripted::new();
    register(&script.good()).await;
    if let Some(fault) = fault {
        script.plan(at, fault);
    }
    let wanted = life(&rig, &script).await;
    let found = restored(&rig, &script.bucket(), 4, &script.died).await;
    let calls = script.calls.load(Ordering::SeqCst);
    let altered = script.altered.load(Ordering::SeqCst);
    let misread = script.misread.load(Ordering::SeqCst);
    assert!(fault.is_none() || script.fired.load(Ordering::SeqCst), "{cell}: it never happened");
    let state = fsck(&script.good(), true).await.unwrap();
    let mut refused = None;
    match found {
        Ok(found) => {
            assert_eq!(found, wanted, "{cell}: something else was restored");
            assert!(altered || state.is_clean(), "{cell}: {state:?}");
        }
        Err(error) => {
            assert!(altered, "{cell}: nothing was restored: {error}");
            assert!(!state.is_clean(), "{cell}: fsck does not see why {error}");
            refused = Some(error);
        }
    }
    // Leftovers of a fault do not block the next attempt.
    if !altered {
        assert_eq!(restored(&rig, &script.good(), 4, &Notify::new()).await.as_ref(), Ok(&wanted), "{cell}: afterwards");
    }
    Cell { calls, altered, misread, refused }
}

async fn matrix(faults: &[Fault]) {
    let calm = run(0, None).await;
    assert!(calm.calls > 20, "{}", calm.calls);
    let (mut cells, mut altered, mut refused) = (0, 0, 0);
    for fault in faults {
        let mut misread = 0;
        for at in 1..=calm.calls {
            let cell = run(at, Some(*fault)).await;
            cells += 1;
            altered += u64::from(cell.altered);
            refused += u64::from(cell.refused.is_some());
            misread += u64::from(cell.misread);
        }
        let alters = matches!(fault, Fault::Short | Fault::Flip);
        assert_eq!(misread > 0, alters, "{fault:?}: {misread} bodies were read that were not what is stored");
    }
    println!(
        "{} calls x {faults:?}: {cells} cells; in {altered} a stored object was altered, in {refused} of them a restore \
         refused it; 0 dangling references, 0 wrong reads",
        calm.calls
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_fails_in_every_way_and_nothing_wrong_is_read() {
    matrix(&[Fault::Before, Fault::After, Fault::Throttle, Fault::Short, Fault::Flip]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_never_answered_once_and_nothing_is_lost() {
    matrix(&[Fault::Silence]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_and_after_every_request_loses_nothing() {
    matrix(&[Fault::DieBefore, Fault::DieAfter]).await;
}
