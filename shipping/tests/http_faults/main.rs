//! Behaviour of a bucket when an S3 server answers wrongly, slowly, partially or not at all, over
//! real HTTP.
//!
//! A transient fault causes no error to the caller; a permanent fault is returned at once; a fault
//! that outlasts the budget is returned as what it is, and ends when the server recovers.
#![allow(clippy::unwrap_used)]

mod matrix;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio_util::sync::CancellationToken;
use vasto_shipping::{
    Bucket, BucketError, Create, DownloadError, DownloadProgress, RetryBudget, Wanted, download,
};
use vasto_testkit::http_store::{Ask, Fault, HttpStore, SESSION_TOKEN, Served};
use vasto_testkit::metadata::{Keys, Metadata};

/// A file of this size is uploaded in parts, of 16 MiB each.
const IN_PARTS: usize = (65 << 20) + 1;
const PARTS: usize = 5;

/// Sets short timeouts, so that a silent server costs little time.
fn impatient(bucket: &Bucket) -> Bucket {
    bucket.with_retry(RetryBudget {
        total: Duration::from_secs(10),
        attempt: Duration::from_millis(300),
        transfer: Duration::from_millis(300),
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
    })
}

/// Returns a budget of one second, in which there are at most [`ATTEMPTS_MAX`] attempts.
fn for_a_second() -> RetryBudget {
    RetryBudget {
        total: Duration::from_secs(1),
        attempt: Duration::from_millis(300),
        backoff_first: Duration::from_millis(20),
        backoff_max: Duration::from_millis(200),
        ..RetryBudget::default()
    }
}

const ATTEMPTS_MAX: usize = 1 + 1000 / 20;

/// Returns the error of a call with that budget.
async fn given_up(call: impl Future<Output = Result<(), BucketError>>) -> BucketError {
    tokio::time::timeout(Duration::from_secs(4), call)
        .await
        .expect("the budget is one second")
        .unwrap_err()
}

/// The calls that send a single request each.
const CALLS: [Ask; 5] = [Ask::Put, Ask::Get, Ask::Head, Ask::List, Ask::Delete];

/// Makes the call, for an object that holds `body` unless it is created; checks the result.
async fn call(bucket: &Bucket, ask: Ask, folder: &str, body: &Bytes) -> Result<(), BucketError> {
    let key = format!("{folder}/key");
    match ask {
        Ask::Put => assert_eq!(bucket.create(&key, body.clone()).await?, Create::Created),
        Ask::Get => assert_eq!(bucket.get(&key).await?.as_ref(), Some(body)),
        Ask::Head => assert_eq!(bucket.head(&key).await?, Some(body.len() as u64)),
        Ask::List => {
            let listed = bucket.list(&format!("{folder}/")).await?;
            assert_eq!(
                listed.iter().map(|object| (&object.key, object.bytes)).collect::<Vec<_>>(),
                [(&key, body.len() as u64)]
            );
        }
        Ask::Delete => bucket.delete(&key).await?,
        other => panic!("{other:?} is not one call"),
    }
    Ok(())
}

/// Creates the object that the call is about, unless the call creates it.
async fn prepare(bucket: &Bucket, ask: Ask, folder: &str, body: &Bytes) {
    if ask != Ask::Put {
        bucket.create(&format!("{folder}/key"), body.clone()).await.unwrap();
    }
}

fn of(served: &[Served], ask: Ask) -> Vec<&Served> {
    served.iter().filter(|request| request.ask == ask).collect()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_gets_over_what_passes() {
    let store = HttpStore::start().await;
    let bucket = impatient(&store.bucket());
    let body = Bytes::from(pattern(10_000));
    let passing = [
        Fault::SlowDown,
        Fault::InternalError,
        Fault::ExpiredToken,
        Fault::ResetBefore,
        Fault::ResetAfter,
        Fault::SilentAfter,
        Fault::EndsEarly,
    ];
    let mut cells: Vec<(Ask, Fault)> =
        CALLS.iter().flat_map(|ask| passing.iter().map(move |fault| (*ask, *fault))).collect();
    // S3 can report for one object in a batch, under 200, what it reports for a request under 500.
    cells.push((Ask::Delete, Fault::ErrorInBody));
    for (n, (ask, fault)) in cells.into_iter().enumerate() {
        // Keys do not contain the name of a fault: a batch of deletes that names one counts as
        // failed.
        let folder = n.to_string();
        prepare(&bucket, ask, &folder, &body).await;
        store.take_served();
        store.fail(ask, fault, 2);
        call(&bucket, ask, &folder, &body)
            .await
            .unwrap_or_else(|error| panic!("{ask:?} {fault:?}: {error}"));
        let served = store.take_served();
        let faults: Vec<Option<Fault>> =
            of(&served, ask).iter().map(|request| request.fault).collect();
        assert_eq!(faults, [Some(fault), Some(fault), None], "{ask:?} {fault:?}");
        let kept = store.object(&format!("{folder}/key"));
        assert_eq!(kept, (ask != Ask::Delete).then(|| body.clone()), "{ask:?} {fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_reported_at_once() {
    let store = HttpStore::start().await;
    let bucket = impatient(&store.bucket());
    let body = Bytes::from_static(b"body");
    for ask in CALLS {
        let folder = format!("{ask:?}");
        prepare(&bucket, ask, &folder, &body).await;
        store.take_served();
        // One fault only: an attempt too many would succeed.
        store.fail(ask, Fault::AccessDenied, 1);
        let error = call(&bucket, ask, &folder, &body).await.unwrap_err();
        let served = store.take_served();
        assert_eq!(served.len(), 1, "{ask:?}: {served:?}");
        assert!(
            matches!(error, BucketError::AccessDenied { .. }) && !error.is_transient(),
            "{ask:?}: {error:?}"
        );
        let text = error.to_string();
        assert!(text.contains("check the credentials"), "{text}");
        // The answer to a HEAD has no body.
        assert!(ask == Ask::Head || text.contains("AccessDenied"), "{text}");
    }
}

/// A wrong clock is an outage that ends when the clock is set, and is reported as a wrong clock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_clock_is_reported_and_passes() {
    let store = HttpStore::start().await;
    let body = Bytes::from_static(b"body");
    for ask in CALLS {
        let bucket = store.bucket();
        let folder = format!("{ask:?}");
        prepare(&bucket, ask, &folder, &body).await;
        store.fail_everything(Some(Fault::TimeTooSkewed));
        let error = given_up(call(&bucket.with_retry(for_a_second()), ask, &folder, &body)).await;
        assert!(
            matches!(error, BucketError::ClockSkewed { .. }) && error.is_transient(),
            "{ask:?}: {error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains("s ahead of the store's") && text.contains("set this machine's clock"),
            "{ask:?}: {text}"
        );
        store.fail_everything(None);
        call(&bucket, ask, &folder, &body).await.unwrap();
    }
}

/// A foreign object costs one warning, wherever it lies; a page that fails is requested again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_passes_by_what_it_cannot_name() {
    let store = HttpStore::start().await;
    let bucket = impatient(&store.bucket());
    for n in 0..25 {
        bucket.create(&format!("data/{n:02}"), Bytes::from_static(b"x")).await.unwrap();
    }
    for foreign in ["catalog//x", "data/..", "data/05/", "data/&#1;", "zz//"] {
        store.put_foreign(foreign);
    }
    store.list_in_pages_of(10);
    store.take_served();
    store.fail(Ask::List, Fault::ResetAfter, 2);
    let found = bucket.list("").await.unwrap();
    assert_eq!(
        found.iter().filter(|object| object.key.starts_with("data/")).count(),
        25,
        "{found:?}"
    );
    assert_eq!(found.len(), 25);
    assert_eq!(
        of(&store.take_served(), Ask::List).len(),
        3 + 2,
        "three pages, one of them asked for three times"
    );
    let strangers = bucket.take_strangers().join("\n");
    for name in ["catalog//x", "data/..", "zz//"] {
        assert!(strangers.contains(name), "{name}: {strangers}");
    }
    assert_eq!(bucket.list("catalog/").await.unwrap(), []);
}

/// Deletes are sent in batches of up to a thousand, and again after a failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_are_deleted_at_once() {
    let store = HttpStore::start().await;
    let bucket = impatient(&store.bucket());
    let keys: Vec<String> = (0..250).map(|n| format!("data/{n}")).collect();
    for key in &keys {
        bucket.create(key, Bytes::from_static(b"x")).await.unwrap();
    }
    store.fail(Ask::Delete, Fault::SlowDown, 2);
    store.take_served();
    bucket.delete_many(&keys.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(of(&store.take_served(), Ask::Delete).len(), 3);
    assert_eq!(bucket.list("data/").await.unwrap(), []);
}

/// During an outage all requests wait together; the first answer releases all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_looked_at_by_one_for_all() {
    let store = HttpStore::start().await;
    let bucket = store.bucket();
    store.fail_everything(Some(Fault::SlowDown));
    let large = Bytes::from(vec![7; 1 << 20]);
    let work: Vec<_> = (0..40)
        .map(|n| {
            let (bucket, large) = (bucket.clone(), large.clone());
            tokio::spawn(async move { bucket.create(&format!("data/{n}"), large).await })
        })
        .collect();
    let begun = Instant::now();
    while bucket.outage().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody noticed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Requests that were under way already have failed.
    tokio::time::sleep(Duration::from_millis(500)).await;
    store.take_served();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let served = store.take_served();
    assert!((1..=10).contains(&served.len()), "{} requests in 3 s", served.len());
    assert_eq!(
        of(&served, Ask::Put).len(),
        0,
        "a large body is no way to ask whether anybody is there"
    );
    store.fail_everything(None);
    for task in work {
        task.await.unwrap().unwrap();
    }
    assert!(bucket.outage().is_none());
}

fn file(dir: &Path, name: &str, body: &[u8]) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, body).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_in_parts_get_over_what_passes() {
    let store = HttpStore::start().await;
    let bucket = store.bucket().with_retry(RetryBudget {
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        ..RetryBudget::default()
    });
    let dir = tempfile::tempdir().unwrap();
    let body = pattern(IN_PARTS);
    let path = file(dir.path(), "file", &body);
    for (ask, fault, times) in [
        (Ask::Begin, Fault::SlowDown, 1),
        (Ask::Begin, Fault::ExpiredToken, 1),
        (Ask::Begin, Fault::ResetBefore, 1),
        (Ask::Part, Fault::ExpiredToken, 2),
        (Ask::Part, Fault::SlowDown, 3),
        (Ask::Part, Fault::ResetBefore, 2),
        (Ask::Part, Fault::EndsEarly, 1),
        (Ask::Complete, Fault::ErrorInBody, 1),
        (Ask::Complete, Fault::ExpiredToken, 1),
    ] {
        store.fail(ask, fault, times);
    }
    bucket.upload_file("many", &path).await.unwrap();
    assert!(store.object("many").unwrap() == body);
    let served = store.take_served();
    let counted = |ask| of(&served, ask).len();
    // A failed complete is followed by the whole upload once more.
    assert_eq!(
        (counted(Ask::Begin), counted(Ask::Part), counted(Ask::Complete)),
        (3 + 3, 3 * PARTS + 8, 3)
    );
    assert_eq!(store.open_uploads(), 0, "what did not become an object is removed");

    // Completed, but the answer is lost: the object is found, no part is sent again.
    for (key, fault) in [("reset", Fault::ResetAfter), ("cut", Fault::EndsEarly)] {
        store.fail(Ask::Complete, fault, 1);
        bucket.upload_file(key, &path).await.unwrap();
        let served = store.take_served();
        assert_eq!(
            (of(&served, Ask::Part).len(), of(&served, Ask::Complete).len()),
            (PARTS, 1),
            "{fault:?}"
        );
        assert!(store.object(key).unwrap() == body);
    }

    for ask in [Ask::Begin, Ask::Part, Ask::Complete] {
        store.fail(ask, Fault::AccessDenied, 1);
        let error = bucket.upload_file("refused", &path).await.unwrap_err();
        assert!(matches!(error, BucketError::AccessDenied { .. }), "{ask:?}: {error:?}");
        assert_eq!((store.open_uploads(), store.object("refused")), (0, None), "{ask:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_all_requests_are_throttled_and_all_uploads_are_done() {
    const FILES: usize = 300;
    let store = HttpStore::start().await;
    let bucket = store.bucket();
    let dir = tempfile::tempdir().unwrap();
    let mut files: Vec<(String, Vec<u8>)> =
        (0..FILES).map(|n| (format!("data/{n}"), pattern(1_000 + n))).collect();
    files.push(("data/large".to_owned(), pattern(IN_PARTS)));
    store.throttle_half();
    let uploads = futures::stream::iter(files.iter().enumerate()).map(|(n, (key, body))| {
        let path = file(dir.path(), &n.to_string(), body);
        let bucket = &bucket;
        async move {
            bucket
                .upload_file(key, &path)
                .await
                .map(|uploaded| assert_eq!(uploaded.bytes, body.len() as u64))
        }
    });
    uploads.buffer_unordered(16).try_collect::<()>().await.unwrap();
    assert_eq!(
        (bucket.outages_ended(), bucket.outage()),
        (0, None),
        "a store that serves half is not away"
    );
    for (key, body) in &files {
        assert!(store.object(key).unwrap() == *body, "{key}");
    }
    let served = store.take_served();
    let throttled = served.iter().filter(|request| request.fault.is_some()).count();
    assert!(
        (40..60).contains(&(100 * throttled / served.len())),
        "{throttled} of {} throttled",
        served.len()
    );
    let mut attempts: HashMap<(Ask, &str), usize> = HashMap::new();
    for request in &served {
        *attempts.entry((request.ask, &request.target)).or_default() += 1;
    }
    let most = attempts.values().max().unwrap();
    println!("{} requests, {throttled} throttled, at most {most} attempts for one", served.len());
    assert!(
        *most <= 20 && served.len() < 3 * 2 * files.len(),
        "{} requests, up to {most} for one",
        served.len()
    );
    // Every attempt is counted, since the provider bills each.
    let counts = bucket.counts();
    assert_eq!((counts.put + counts.head + counts.delete) as usize, served.len(), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_token_that_has_expired_is_an_outage() {
    let store = HttpStore::start().await;
    let bucket = store.bucket().with_retry(for_a_second());
    let body = Bytes::from_static(b"body");
    for ask in CALLS {
        let folder = format!("{ask:?}");
        prepare(&bucket, ask, &folder, &body).await;
        store.take_served();
        store.fail_everything(Some(Fault::ExpiredToken));
        let error = given_up(call(&bucket, ask, &folder, &body)).await;
        assert!(
            matches!(error, BucketError::ExpiredCredentials { .. }) && error.is_transient(),
            "{ask:?}: {error:?}"
        );
        let text = format!("{error} {error:?}");
        assert!(text.contains("AWS_SESSION_TOKEN") && !text.contains(SESSION_TOKEN), "{text}");
        let attempts = store.take_served().len();
        assert!((3..=ATTEMPTS_MAX).contains(&attempts), "{ask:?}: {attempts} attempts");
        store.fail_everything(None);
        call(&bucket, ask, &folder, &body).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_go_on_while_the_keys_of_a_role_expire() {
    const CHANGES: usize = 4;
    let keys = Keys::living(Duration::from_secs(1));
    let metadata = Metadata::start(&keys).await;
    let store = HttpStore::with_keys(&keys).await;
    let bucket = store.bucket_of_role(&metadata.endpoint());
    let dir = tempfile::tempdir().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut uploaded = 0;
    // First a file in parts, then small files until the keys have changed often enough.
    let body = pattern(IN_PARTS);
    bucket.upload_file("large", &file(dir.path(), "large", &body)).await.unwrap();
    assert!(store.object("large").unwrap() == body);
    while keys.count() <= CHANGES {
        assert!(Instant::now() < deadline, "{} keys only", keys.count());
        let uploads = futures::stream::iter(uploaded..uploaded + 8).map(|n: usize| {
            let path = file(dir.path(), &n.to_string(), &pattern(n));
            let bucket = &bucket;
            async move { bucket.upload_file(&format!("data/{n}"), &path).await.map(|_| ()) }
        });
        uploads.buffer_unordered(4).try_collect::<()>().await.unwrap();
        uploaded += 8;
    }
    for n in 0..uploaded {
        assert!(store.object(&format!("data/{n}")).unwrap() == pattern(n), "{n}");
    }
    let served = store.take_served();
    let refused: Vec<&Served> = served.iter().filter(|request| request.status == 400).collect();
    println!("{uploaded} uploads, {} keys, {} requests refused", keys.count(), refused.len());
    assert!(refused.len() >= CHANGES, "each change shows at the store: {refused:?}");
    for request in refused {
        let later = served
            .iter()
            .rfind(|later| (later.ask, &later.target) == (request.ask, &request.target))
            .unwrap();
        assert!(
            later.status < 300 && later.key_id != request.key_id,
            "{request:?} was not repeated with other keys: {later:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_longer_than_the_budget_is_reported_and_passes() {
    let store = HttpStore::start().await;
    let bucket = store.bucket().with_retry(for_a_second());
    let body = Bytes::from_static(b"body");
    for (n, fault) in [Fault::SlowDown, Fault::ResetBefore].into_iter().enumerate() {
        for ask in CALLS {
            let folder = format!("{ask:?}/{n}");
            prepare(&bucket, ask, &folder, &body).await;
            store.take_served();
            store.fail_everything(Some(fault));
            let error = given_up(call(&bucket, ask, &folder, &body)).await;
            assert!(
                matches!(error, BucketError::Unreachable { .. }) && error.is_transient(),
                "{ask:?}: {error:?}"
            );
            let attempts = store.take_served().len();
            assert!((3..=ATTEMPTS_MAX).contains(&attempts), "{ask:?}: {attempts} attempts");
            store.fail_everything(None);
            call(&bucket, ask, &folder, &body).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_get_over_cut_bodies_and_outlive_an_outage() {
    let store = HttpStore::start().await;
    let bucket = store.bucket();
    let body = Bytes::from(pattern(20_000_000));
    bucket.create("k", body.clone()).await.unwrap();
    let wanted = [Wanted {
        key: "k".into(),
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(&body),
        file_name: "1.sst".into(),
    }];
    let dir = tempfile::tempdir().unwrap();
    let cancel = CancellationToken::new();
    for fault in [Fault::EndsEarly, Fault::ResetAfter, Fault::SlowDown, Fault::ExpiredToken] {
        store.take_served();
        store.fail(Ask::Get, fault, 3);
        let target = dir.path().join(format!("{fault:?}"));
        download(&bucket, &wanted, &target, 4, &DownloadProgress::default(), &cancel)
            .await
            .unwrap();
        assert!(std::fs::read(target.join("1.sst")).unwrap() == body, "{fault:?}");
        assert_eq!(
            of(&store.take_served(), Ask::Get).len(),
            3 + 3,
            "{fault:?}: each request is repeated alone"
        );
    }
    store.fail_everything(Some(Fault::SlowDown));
    let target = dir.path().join("outage");
    let hasty = bucket.with_retry(for_a_second());
    let progress = DownloadProgress::default();
    let failing = async {
        match download(&hasty, &wanted, &target, 4, &progress, &cancel).await {
            Err(DownloadError::Bucket(error)) => Err(error),
            other => panic!("{other:?}"),
        }
    };
    let error = given_up(failing).await;
    assert!(matches!(error, BucketError::Unreachable { .. }), "{error:?}");
    store.fail_everything(None);
    download(&hasty, &wanted, &target, 4, &DownloadProgress::default(), &cancel).await.unwrap();
    assert!(std::fs::read(target.join("1.sst")).unwrap() == body);
}
