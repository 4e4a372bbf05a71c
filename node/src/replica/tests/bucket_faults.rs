//! Every request to the bucket fails in every way, and the process dies before and after each:
//! afterwards the objects in the bucket restore everything, or the restore names what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::Band;
use vasto_core::catalog::{Catalog, KeyspaceSpec};
use vasto_core::ids::{CatalogVersion, Epoch, KeyspaceId, NodeId, PlanId, ReplicaId};
use vasto_core::plan::{Plan, PlanKind, Step};
use vasto_core::record::{BandRange, RangeState};
use vasto_core::report::TargetProgress;
use vasto_shipping::gc::{Retention, collect, fsck};
use vasto_shipping::{Bucket, CatalogStore, CatalogWrite, RetryBudget};
use vasto_testkit::faulty::{Fault, Faulty, Misread};

use super::shipping::Shipping;
use super::support::*;
use crate::build::sources::{self, Without};
use crate::build::{Adoption, Bootstrap, Log};
use crate::registry::NodeRegistry;
use crate::replica::{OpenOptions, Replica};
use crate::target_trace::TargetTrace;

/// Returns a bucket over the store that gives up soon.
pub(crate) fn impatient(store: &Arc<Faulty>) -> Bucket {
    store.bucket().with_retry(RetryBudget {
        total: Duration::from_secs(2),
        attempt: Duration::from_millis(100),
        transfer: Duration::from_millis(100),
        backoff_first: Duration::from_millis(1),
        backoff_max: Duration::from_millis(4),
    })
}

type Contents = BTreeMap<String, String>;

const KEYS: usize = 30;

fn contents(replica: &Replica, rounds: usize) -> Contents {
    let keys = (0..rounds).flat_map(|round| (0..KEYS).map(move |n| format!("r{round}-{n}")));
    let all_keys = keys.chain((0..KEYS).map(|n| format!("same{n}")));
    all_keys.filter_map(|key| Some((key.clone(), get(replica, &key)?))).collect()
}

async fn fill(replica: &Replica, round: usize) {
    let replica = replica.clone();
    let work = move || {
        let new =
            (0..KEYS).map(|n| put(&format!("r{round}-{n}"), &format!("value {n} of {round}")));
        write(&replica, new.collect());
        write(
            &replica,
            (0..KEYS).map(|n| put(&format!("same{n}"), &format!("as of {round}"))).collect(),
        );
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

const STRICT: Retention =
    Retention { keep_checkpoints: 1, keep_for: Duration::ZERO, min_age: Duration::ZERO };

/// Restores what the bucket holds of the replica as a keyspace of its own; retries as a node does,
/// also when `died` ends.
async fn restored<F: Future<Output = ()>>(
    rig: &Rig,
    bucket: &Bucket,
    rounds: usize,
    died: impl Fn() -> F,
) -> Result<Contents, String> {
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
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
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
            trace: TargetTrace::silent(),
            resized: Vec::new(),
        };
        let running = Mutex::new(None::<Replica>);
        let attempt = async {
            let text = |error: crate::build::BuildError| error.to_string();
            let choose =
                sources::candidates(bucket, KEYSPACE, rig.shard, &[], Without::default(), None);
            let candidates = sources::chosen(bucket, &dir.path().join("sources.json"), choose)
                .await
                .map_err(text)?;
            let is_new = !crate::replica::database_dir(dir.path()).join("CURRENT").exists();
            if let Some(base) =
                candidates.all.first().and_then(|source| source.base.as_ref()).filter(|_| is_new)
            {
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
            *running.lock() = Some(replica.clone());
            let merged = bootstrap.merge_all(&replica, &candidates, 1, None).await.map_err(text);
            merged.map(|()| contents(&replica, rounds))
        };
        let result = tokio::select! {
            result = attempt => result,
            () = died() => Err("the process died".into()),
        };
        // A process that dies leaves no lock.
        let replica = running.lock().take();
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

/// Runs three rounds of writes and checkpoints, a tail of log, a garbage collection; after a crash
/// the next process runs on what the crash left of the directory. Returns what was written, and
/// what the collections refused.
async fn life(rig: &Rig, store: &Arc<Faulty>) -> (Contents, Vec<String>) {
    let bucket = impatient(store);
    let mut path = rig.path.clone();
    let mut replica = tokio::task::block_in_place(|| rig.create());
    for round in 0..3 {
        fill(&replica, round).await;
        for attempt in 0.. {
            assert!(attempt < 20, "the checkpoint never gets through");
            let shipping =
                Shipping::start(rig, &path, &replica, &bucket, Duration::from_secs(3_600));
            let died = tokio::select! {
                done = shipping.handle.checkpoint(None) => { if done.is_ok() { shipping.stop().await; break } false }
                () = store.died() => true,
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
            () = store.died() => {}
        }
        if handle.status().shipped >= replica.settled_lsn() {
            break;
        }
    }
    let mut refusals = Vec::new();
    for _ in 0..5 {
        tokio::select! {
            done = collect(&bucket, STRICT, false) => match done {
                Ok(collected) => {
                    refusals.extend(collected.warnings);
                    break;
                }
                Err(error) => refusals.push(error.to_string()),
            },
            () = store.died() => {}
        }
    }
    let wanted = contents(&replica, 4);
    assert_eq!(wanted.len(), 5 * KEYS - 1);
    (wanted, refusals)
}

struct Cell {
    calls: u64,
    /// The fault had an effect: one that alters a body has none on a call without a body.
    is_hit: bool,
    /// An object was stored altered.
    stored_altered: bool,
    misread: Option<Misread>,
    refused: Option<String>,
}

async fn run(at: u64, fault: Option<Fault>) -> Cell {
    let cell = format!("{fault:?} at call {at}");
    let rig = Rig::new();
    let store = Faulty::in_memory();
    register(&store.without_faults()).await;
    if let Some(fault) = fault {
        store.fail_at(at, fault);
    }
    let (wanted, refusals) = life(&rig, &store).await;
    let contents = restored(&rig, &impatient(&store), 4, || store.died()).await;
    let (calls, is_hit, misread) = (store.calls(), store.hit() > 0, store.misread());
    let stored_altered = store.has_stored_altered();
    assert_eq!(
        is_hit,
        fault.is_some_and(|fault| !fault.alters_a_body()) || stored_altered || misread.is_some(),
        "{cell}"
    );
    if let Some(misread) = &misread {
        let is_refused = refusals.iter().any(|refusal| refusal.contains(&misread.key));
        assert!(
            misread.read_again || is_refused,
            "{cell}: {} was neither read again nor refused",
            misread.key
        );
    }
    let state = fsck(&store.without_faults(), true).await.unwrap();
    let mut refused = None;
    match contents {
        Ok(contents) => {
            assert_eq!(contents, wanted, "{cell}: something else was restored");
            assert!(stored_altered || state.is_clean(), "{cell}: {state:?}");
        }
        Err(error) => {
            assert!(stored_altered, "{cell}: nothing was restored: {error}");
            assert!(!state.is_clean(), "{cell}: fsck does not see why {error}");
            refused = Some(error);
        }
    }
    // Leftovers of a fault do not block the next attempt.
    if !stored_altered {
        let afterwards = restored(&rig, &store.without_faults(), 4, std::future::pending).await;
        assert_eq!(afterwards.as_ref(), Ok(&wanted), "{cell}: afterwards");
    }
    Cell { calls, is_hit, stored_altered, misread, refused }
}

async fn matrix(faults: &[Fault]) {
    let calm = run(0, None).await;
    assert!(calm.calls > 20, "{}", calm.calls);
    for fault in faults {
        let mut cells = Vec::new();
        for at in 1..=calm.calls {
            cells.push(run(at, Some(*fault)).await);
        }
        let count =
            |is_counted: fn(&Cell) -> bool| cells.iter().filter(|cell| is_counted(cell)).count();
        let (hit, misread) = (count(|cell| cell.is_hit), count(|cell| cell.misread.is_some()));
        let (altered, refused) =
            (count(|cell| cell.stored_altered), count(|cell| cell.refused.is_some()));
        assert_eq!(
            misread > 0,
            fault.alters_a_body(),
            "{fault:?}: {misread} reads returned what is not stored"
        );
        assert_eq!(
            altered > 0,
            *fault == Fault::FlippedBody,
            "{fault:?}: {altered} objects were stored altered"
        );
        println!(
            "{fault:?}: {hit} of {} calls hit; {misread} bodies read altered, each read again or refused; {altered} \
             stored altered, {refused} of them refused by a restore; 0 dangling references, 0 wrong reads",
            cells.len()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_fails_in_every_way_and_nothing_wrong_is_read() {
    matrix(&[
        Fault::ResetBefore,
        Fault::ResetAfter,
        Fault::Throttle,
        Fault::ShortBody,
        Fault::FlippedBody,
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_never_answered_once_and_nothing_is_lost() {
    matrix(&[Fault::Silence]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_and_after_every_request_loses_nothing() {
    matrix(&[Fault::DeathBefore, Fault::DeathAfter]).await;
}
