//! Every kind of request under every kind of fault, in a store in memory and in front of two real
//! S3 servers.
//!
//! **Invariant:** each cell checks that its fault was injected, and reads what the bucket holds
//! afterwards without faults. A fault that alters a body counts only when the altered bytes were
//! read.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio_util::sync::CancellationToken;
use vasto_core::Lsn;
use vasto_shipping::archive::{ArchiveError, chunk_after, manifest_at};
use vasto_shipping::layout::{self, Owner};
use vasto_shipping::{
    Bucket, BucketError, CatalogError, CatalogStore, Chunk, Create, DownloadError,
    DownloadProgress, Manifest, RetryBudget, Wanted, catalog, download,
};

use super::{CALLS, IN_PARTS, PARTS, call, file, of, pattern, prepare};
use vasto_testkit::http_store::{Ask, Fault, HttpStore, Served};
use vasto_testkit::{BUCKET, S3Kind, S3Server};

/// Faults of an answer after which the same request succeeds.
const PASSING: [Fault; 6] = [
    Fault::SlowDown,
    Fault::InternalError,
    Fault::ExpiredToken,
    Fault::ResetBefore,
    Fault::ResetAfter,
    Fault::EndsEarly,
];

/// Longest time of an upload whose abort is not answered; the HTTP client alone would wait for nine
/// minutes.
const ABORTED_WITHIN: Duration = Duration::from_secs(60);

/// A store under test.
struct Place {
    store: HttpStore,
    /// Through the faults.
    bucket: Bucket,
    /// The same bucket without them.
    direct: Bucket,
    server: Option<S3Server>,
}

impl Place {
    async fn in_memory() -> Self {
        let store = HttpStore::start().await;
        // Pages as large as those of the real servers.
        store.list_in_pages_of(1_000);
        let (bucket, direct) = (store.bucket(), store.bucket());
        let patience = Duration::from_secs(1);
        Self { bucket: patient(&bucket, patience), direct, store, server: None }
    }

    async fn before(kind: S3Kind) -> Self {
        let server = S3Server::start(kind).await.unwrap();
        let url = format!("s3://{BUCKET}/root");
        let (store, bucket) = HttpStore::before(&server.options(), &url).await;
        let direct = Bucket::open(&url, &server.options()).unwrap();
        // A real server on a busy machine answers late: such a request would be repeated too.
        let patience = Duration::from_secs(3);
        Self { bucket: patient(&bucket, patience), direct, store, server: Some(server) }
    }

    /// Returns the requests of a kind since the last call; every planned fault must have been
    /// injected.
    fn served(&self, ask: Ask) -> Vec<Served> {
        self.store.assert_all_fired();
        of(&self.store.take_served(), ask).into_iter().cloned().collect()
    }
}

/// Sets timeouts that the server keeps on a busy machine, and that cost a silent one little.
fn patient(bucket: &Bucket, patience: Duration) -> Bucket {
    bucket.with_retry(RetryBudget {
        total: patience * 20,
        attempt: patience,
        transfer: patience * 3,
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
    })
}

fn faults(served: &[Served]) -> Vec<Fault> {
    served.iter().filter_map(|request| request.fault).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_memory() {
    run_all(&Place::in_memory().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_seaweedfs() {
    run_all(&Place::before(S3Kind::SeaweedFs).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_moto() {
    run_all(&Place::before(S3Kind::Moto).await).await;
}

async fn run_all(place: &Place) {
    let began = Instant::now();
    let done = |case: &str| println!("{:>6} ms  {case}", began.elapsed().as_millis());
    single_requests(place).await;
    done("single requests");
    parts(place).await;
    done("parts");
    refused_parts(place).await;
    done("refused parts");
    aborts(place).await;
    done("aborts");
    listings(place).await;
    done("listings");
    altered_downloads(place).await;
    done("altered downloads");
    altered_documents(place).await;
    done("altered documents");
    altered_uploads(place).await;
    done("altered uploads");
}

async fn single_requests(place: &Place) {
    let body = Bytes::from(pattern(10_000));
    let passing = PASSING.into_iter().chain([Fault::SilentAfter]);
    let cells: Vec<(Ask, Fault)> = passing
        .flat_map(|fault| CALLS.map(|ask| (ask, fault)))
        .chain([(Ask::Delete, Fault::ErrorInBody)])
        .collect();
    for (n, (ask, fault)) in cells.into_iter().enumerate() {
        let folder = format!("single/{n}");
        prepare(&place.direct, ask, &folder, &body).await;
        place.store.take_served();
        // Each silence costs a timeout.
        let times = if fault == Fault::SilentAfter { 1 } else { 2 };
        place.store.fail(ask, fault, times);
        call(&place.bucket, ask, &folder, &body)
            .await
            .unwrap_or_else(|error| panic!("{ask:?} {fault:?}: {error}"));
        let served = place.served(ask);
        assert_eq!(faults(&served), vec![fault; times as usize], "{ask:?}");
        assert_eq!(served.last().unwrap().fault, None, "{ask:?} {fault:?}");
        let kept = place.direct.get(&format!("{folder}/key")).await.unwrap();
        assert_eq!(kept, (ask != Ask::Delete).then(|| body.clone()), "{ask:?} {fault:?}");
    }
}

async fn upload(place: &Place, dir: &Path, key: &str) -> Result<(), BucketError> {
    place.store.take_served();
    place.bucket.upload_file(key, &dir.join("file")).await.map(|_| ())
}

/// Downloads the uploaded object without faults, and compares.
async fn assert_whole(place: &Place, dir: &Path, key: &str, body: &[u8]) {
    let wanted = Wanted {
        key: key.into(),
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(body),
        file_name: "copy".into(),
    };
    let (progress, cancel) = (DownloadProgress::default(), CancellationToken::new());
    download(&place.direct, &[wanted], dir, 4, &progress, &cancel).await.unwrap();
    assert!(std::fs::read(dir.join("copy")).unwrap() == body, "{key}");
    std::fs::remove_file(dir.join("copy")).unwrap();
}

async fn parts(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let body = pattern(IN_PARTS);
    file(dir.path(), "file", &body);
    // A part without an answer may be on a slow link: it is not given up before minutes have
    // passed.
    for (ask, silent) in [(Ask::Begin, Some(Fault::SilentAfter)), (Ask::Part, None)] {
        let planned: Vec<Fault> = PASSING.into_iter().chain(silent).collect();
        planned.iter().for_each(|fault| place.store.fail(ask, *fault, 1));
        let key = format!("parts/{ask:?}");
        upload(place, dir.path(), &key).await.unwrap_or_else(|error| panic!("{ask:?}: {error}"));
        let served = place.served(ask);
        // Parts go up side by side: what they meet has no order.
        let injected = faults(&served);
        assert!(
            injected.len() == planned.len() && planned.iter().all(|fault| injected.contains(fault)),
            "{ask:?}: {injected:?} of {planned:?}"
        );
        assert_eq!(
            served.len(),
            planned.len() + if ask == Ask::Begin { 1 } else { PARTS },
            "each is repeated alone"
        );
        assert_whole(place, dir.path(), &key, &body).await;
    }

    // Not completed: object_store discards the parts, and all are sent again.
    let undone = [
        Fault::SlowDown,
        Fault::InternalError,
        Fault::ErrorInBody,
        Fault::ExpiredToken,
        Fault::ResetBefore,
    ];
    undone.into_iter().for_each(|fault| place.store.fail(Ask::Complete, fault, 1));
    upload(place, dir.path(), "parts/undone").await.unwrap();
    place.store.assert_all_fired();
    let served = place.store.take_served();
    let counted = |ask| of(&served, ask).len();
    let rounds = undone.len() + 1;
    assert_eq!(
        (counted(Ask::Begin), counted(Ask::Part), counted(Ask::Complete), counted(Ask::Abort)),
        (rounds, rounds * PARTS, rounds, undone.len())
    );
    assert_whole(place, dir.path(), "parts/undone", &body).await;

    // Completed, but the answer is lost: the object is found, no part is sent again.
    for fault in [Fault::ResetAfter, Fault::EndsEarly, Fault::SilentAfter, Fault::Shorten] {
        place.store.fail(Ask::Complete, fault, 1);
        let key = format!("parts/done-{fault:?}");
        upload(place, dir.path(), &key).await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        place.store.assert_all_fired();
        let served = place.store.take_served();
        assert_eq!(
            (of(&served, Ask::Part).len(), of(&served, Ask::Complete).len()),
            (PARTS, 1),
            "{fault:?}"
        );
        assert_whole(place, dir.path(), &key, &body).await;
    }
    assert!(
        place.server.is_some() || place.store.open_uploads() == 3,
        "only begins without an answer leave uploads"
    );
}

/// A refusal for good is returned at once; nothing is under the key, and what was begun is aborted.
async fn refused_parts(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    file(dir.path(), "file", &pattern(IN_PARTS));
    for ask in [Ask::Begin, Ask::Part, Ask::Complete] {
        let key = format!("refused/{ask:?}");
        place.store.fail(ask, Fault::AccessDenied, 1);
        let error = upload(place, dir.path(), &key).await.unwrap_err();
        assert!(matches!(error, BucketError::AccessDenied { .. }), "{ask:?}: {error:?}");
        let aborts = place.served(Ask::Abort);
        assert_eq!(
            aborts.iter().map(|request| request.status).collect::<Vec<_>>(),
            aborted(ask),
            "{ask:?}"
        );
        assert_eq!(place.direct.head(&key).await.unwrap(), None, "{ask:?}");
    }
}

/// Returns the answers to the abort of an upload that failed at this request.
fn aborted(ask: Ask) -> &'static [u16] {
    if ask == Ask::Begin { &[] } else { &[204] }
}

/// An abort that fails neither hides the error of the upload nor delays it.
async fn aborts(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let body = pattern(IN_PARTS);
    file(dir.path(), "file", &body);
    for fault in PASSING.into_iter().chain([Fault::SilentAfter, Fault::AccessDenied]) {
        // Not a part: others would still be on their way to the store.
        place.store.fail(Ask::Complete, Fault::AccessDenied, 1);
        place.store.fail(Ask::Abort, fault, 1);
        let uploaded =
            tokio::time::timeout(ABORTED_WITHIN, upload(place, dir.path(), "aborted")).await;
        let error =
            uploaded.unwrap_or_else(|_| panic!("{fault:?}: the abort has no end")).unwrap_err();
        assert!(matches!(error, BucketError::AccessDenied { .. }), "{fault:?}: {error:?}");
        assert_eq!(faults(&place.served(Ask::Abort)), [fault]);
        assert_eq!(place.direct.head("aborted").await.unwrap(), None, "{fault:?}");
    }
    upload(place, dir.path(), "aborted").await.unwrap();
    assert_whole(place, dir.path(), "aborted", &body).await;
}

/// A page that fails is requested again, the pages before it are not; no listing is ever a part of
/// one.
async fn listings(place: &Place) {
    const OBJECTS: usize = 2_100;
    let keys: BTreeSet<String> = (0..OBJECTS).map(|n| format!("listed/{n:04}")).collect();
    futures::stream::iter(&keys)
        .map(|key| place.direct.create(key, Bytes::from_static(b"x")))
        .buffer_unordered(32)
        .try_collect::<Vec<Create>>()
        .await
        .unwrap();
    let list = async || {
        place.store.take_served();
        let found = place.bucket.list("listed/").await?;
        Ok::<BTreeSet<String>, BucketError>(found.into_iter().map(|object| object.key).collect())
    };
    assert!(list().await.unwrap() == keys);
    let pages = place.served(Ask::List).len();
    assert!(pages >= 3, "{pages} pages");
    for at in [0, 1, pages - 1] {
        // A page that is silent costs its timeout, so the last one stands for the others.
        let silent = (at == pages - 1).then_some(Fault::SilentAfter);
        for fault in PASSING.into_iter().chain(silent) {
            let times = if fault == Fault::SilentAfter { 1 } else { 2 };
            place.store.fail_after(Ask::List, at as u32, fault, times as u32);
            let found =
                list().await.unwrap_or_else(|error| panic!("{fault:?} on page {at}: {error}"));
            assert!(found == keys, "{fault:?} on page {at}: {} objects", found.len());
            let served = place.served(Ask::List);
            let at_fault: Vec<Option<Fault>> = served.iter().map(|request| request.fault).collect();
            let mut wanted = vec![None; pages + times];
            wanted[at..at + times].fill(Some(fault));
            assert_eq!(at_fault, wanted, "{fault:?} on page {at}");
            let targets: Vec<&String> = served.iter().map(|request| &request.target).collect();
            assert!((at..at + times).all(|n| targets[n] == targets[n + 1]), "{targets:?}");
            assert_eq!(targets.iter().collect::<BTreeSet<_>>().len(), pages, "{targets:?}");
        }
        for fault in [Fault::AccessDenied, Fault::Shorten] {
            place.store.fail_after(Ask::List, at as u32, fault, 1);
            let error = list().await.expect_err("a listing without one of its pages");
            assert_eq!(
                matches!(error, BucketError::AccessDenied { .. }),
                fault == Fault::AccessDenied,
                "{error:?}"
            );
            assert_eq!(place.served(Ask::List).len(), at + 1, "{fault:?} on page {at}");
        }
    }
}

/// An altered body is read, detected and fetched once more; one that is altered again is an error.
async fn altered_downloads(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let (cancel, target) = (CancellationToken::new(), dir.path().join("target"));
    // A body is given time: one that is not read would be requested once more.
    let bucket = place.bucket.with_retry(RetryBudget::default());
    // In one request, and in three ranges.
    for (length, requests) in [(10_000, 1), ((17 << 20) + 3, 3)] {
        let body = pattern(length);
        let key = format!("altered/{length}.sst");
        place.direct.upload_file(&key, &file(dir.path(), "file", &body)).await.unwrap();
        let wanted = [Wanted {
            key,
            bytes: length as u64,
            crc32c: crc32c::crc32c(&body),
            file_name: length.to_string(),
        }];
        let fetched = target.join(length.to_string());
        for (fault, times) in [(Fault::Flip, 1), (Fault::Flip, 2 * requests), (Fault::Shorten, 1)] {
            place.store.take_served();
            place.store.fail(Ask::Get, fault, times);
            let progress = DownloadProgress::default();
            let result = download(&bucket, &wanted, &target, 4, &progress, &cancel).await;
            let served = place.served(Ask::Get);
            let altered = served.iter().filter(|request| request.altered).count();
            assert_eq!(altered, times as usize, "{fault:?}: {served:?}");
            if fault == Fault::Flip {
                // Every byte arrived twice, the altered ones too.
                let bytes = progress.bytes.load(Ordering::Relaxed);
                assert_eq!(
                    (served.len(), bytes),
                    (2 * requests as usize, 2 * length as u64),
                    "{served:?}"
                );
            }
            if times == 1 {
                result.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
                assert!(std::fs::read(&fetched).unwrap() == body, "{fault:?}");
                std::fs::remove_file(&fetched).unwrap();
            } else {
                assert!(matches!(result, Err(DownloadError::Corrupt { .. })), "{result:?}");
                assert!(!fetched.exists(), "a bad file must not get its final name");
            }
        }
    }
}

/// A manifest, a chunk and a catalog say so when a bit of them was flipped on the way, and are
/// whole the next time.
async fn altered_documents(place: &Place) {
    let manifest_bytes = include_bytes!("../../testdata/v1/manifest.json").as_slice();
    let chunk_bytes = include_bytes!("../../testdata/v1/chunk.bin").as_slice();
    let catalog_bytes = include_bytes!("../../testdata/v1/catalog.json").as_slice();
    let manifest = Manifest::decode(manifest_bytes).unwrap();
    let chunk = Chunk::decode(chunk_bytes).unwrap();
    let catalog = catalog::decode_catalog(catalog_bytes).unwrap();
    let owner = Owner { keyspace: chunk.keyspace, shard: chunk.shard, replica: chunk.replica };
    let manifest_key =
        layout::manifest(manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn);
    let catalog_key = layout::catalog_version(catalog.keyspace, catalog.version);
    for (key, bytes) in [
        (&manifest_key, manifest_bytes),
        (&owner.chunk(chunk.first_lsn), chunk_bytes),
        (&catalog_key, catalog_bytes),
    ] {
        assert_eq!(
            place.direct.create(key, Bytes::from_static(bytes)).await.unwrap(),
            Create::Created
        );
    }
    let store = CatalogStore::new(place.bucket.clone());
    let before = Lsn(chunk.first_lsn.0 - 1);
    for is_flipped in [true, false] {
        let flip = || {
            place.store.take_served();
            place.store.fail(Ask::Get, Fault::Flip, u32::from(is_flipped));
        };
        let was_read = || {
            let altered = place.served(Ask::Get).iter().any(|request| request.altered);
            assert_eq!(altered, is_flipped, "what was altered was not read");
        };
        flip();
        let found = manifest_at(&place.bucket, &manifest_key).await;
        was_read();
        assert_eq!(matches!(found, Err(ArchiveError::Manifest { .. })), is_flipped, "{found:?}");
        assert!(is_flipped || found.unwrap().manifest == manifest);

        flip();
        let found = chunk_after(&place.bucket, owner, &[], before).await;
        was_read();
        assert_eq!(matches!(found, Err(ArchiveError::Chunk { .. })), is_flipped, "{found:?}");
        assert!(is_flipped || found.unwrap().unwrap().0 == chunk);

        flip();
        let found = store.version(catalog.keyspace, catalog.version).await;
        was_read();
        assert_eq!(matches!(found, Err(CatalogError::Document { .. })), is_flipped, "{found:?}");
        assert!(is_flipped || found.unwrap().unwrap() == catalog);
    }
}

/// Uploads that are altered on their way are refused by the store, or detected when they are read.
async fn altered_uploads(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let body = pattern(10_000);
    let path = file(dir.path(), "file", &body);
    place.store.take_served();
    place.store.fail(Ask::Put, Fault::FlipSent, 1);
    let uploaded = place.bucket.upload_file("sent.sst", &path).await;
    let served = place.served(Ask::Put);
    assert!(served.iter().any(|request| request.altered), "{served:?}");
    let wanted = [Wanted {
        key: "sent.sst".into(),
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(&body),
        file_name: "copy".into(),
    }];
    let (progress, cancel) = (DownloadProgress::default(), CancellationToken::new());
    let read = download(&place.direct, &wanted, dir.path(), 4, &progress, &cancel).await;
    match (&uploaded, &read) {
        // The store took it as it arrived ...
        (Ok(_), Err(DownloadError::Corrupt { .. })) => {}
        // ... or refused it, and it was sent again or not.
        (Ok(_), Ok(())) if served.len() > 1 => {}
        (Err(_), Err(DownloadError::Missing { .. })) => {}
        _ => panic!("{uploaded:?}, then {read:?}, after {served:?}"),
    }
}
