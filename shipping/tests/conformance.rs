//! One suite for every object store: in memory, a local directory, and two real S3 servers.
//!
//! Checks what Vasto requires of a store, and how Vasto reacts when a store, a reply or a
//! body fails. The cases run one after the other on one store; each has its own prefix.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Catalog, KeyspaceSpec, KeyspaceState};
use vasto_core::{CatalogVersion, KeyspaceId, NodeId};
use vasto_shipping::{
    Bucket, BucketError, BucketOptions, CatalogError, CatalogStore, CatalogWrite, Create,
    DownloadError, DownloadProgress, RetryBudget, Wanted, download, layout,
};
use vasto_testkit::faulty::{Call, Fault, Faulty};
use vasto_testkit::http_store::HttpStore;
use vasto_testkit::{BUCKET, S3Kind, S3Server};

type Raw = Box<dyn Fn(&str) -> (Arc<dyn ObjectStore>, String)>;

/// A store under test: how to open a prefix of it, and how to bypass Vasto.
struct Subject {
    url: String,
    options: BucketOptions,
    /// Returns the store of a case, and the prefix of its keys.
    raw: Raw,
}

impl Subject {
    fn bucket(&self, case: &str) -> Bucket {
        Bucket::open(&format!("{}/{case}", self.url), &self.options).unwrap()
    }

    /// Writes an object without the bucket, over any object under the key.
    async fn overwrite(&self, case: &str, key: &str, body: &[u8]) {
        let (store, root) = (self.raw)(case);
        let path = object_store::path::Path::from(format!("{root}{key}"));
        store.put(&path, body.to_vec().into()).await.unwrap();
    }
}

async fn run_all(subject: &Subject) {
    let began = Instant::now();
    let done =
        |case: &str| println!("{:>6} ms  {} {case}", began.elapsed().as_millis(), subject.url);
    objects(subject).await;
    done("objects");
    create_race(subject).await;
    done("create race");
    probe(subject).await;
    done("probe");
    transfers(subject).await;
    done("transfers");
    corruption(subject).await;
    done("corruption");
    catalog_races(subject).await;
    done("catalog races");
    catalog_tips(subject).await;
    done("catalog tips");
    keyspaces(subject).await;
    done("keyspaces");
    cluster_claims(subject).await;
    done("cluster claims");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    // Opened by URL like any other store; each case is a store of its own, so its raw side is a
    // bucket too.
    let subject = Subject {
        url: "memory://conformance".into(),
        options: BucketOptions::default(),
        raw: Box::new(|case| {
            let bucket =
                Bucket::open(&format!("memory://conformance/{case}"), &BucketOptions::default())
                    .unwrap();
            (bucket.raw_store(), String::new())
        }),
    };
    run_all(&subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_directory() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("made when opened");
    let url = url::Url::from_directory_path(&root).unwrap().to_string();
    let raw_root = root.clone();
    let subject = Subject {
        url: url.trim_end_matches('/').to_owned(),
        options: BucketOptions::default(),
        raw: Box::new(move |case| {
            let store =
                object_store::local::LocalFileSystem::new_with_prefix(raw_root.join(case)).unwrap();
            (Arc::new(store), String::new())
        }),
    };
    run_all(&subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3() {
    let server = S3Server::start(S3Kind::SeaweedFs).await.unwrap();
    run_all(&on_server(&server)).await;
    signatures_of_s3(&server).await;
    missing_bucket_of_s3(&server).await;
}

/// A second implementation, so that no case relies on a peculiarity of the first. It accepts any
/// signature, so the first tests the refusal of wrong ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_of_another_make() {
    let server = S3Server::start(S3Kind::Moto).await.unwrap();
    run_all(&on_server(&server)).await;
    missing_bucket_of_s3(&server).await;
}

fn on_server(server: &S3Server) -> Subject {
    let raw = server.raw();
    Subject {
        url: format!("s3://{BUCKET}/conformance"),
        options: server.options(),
        raw: Box::new(move |case| (Arc::clone(&raw), format!("conformance/{case}/"))),
    }
}

async fn objects(subject: &Subject) {
    let bucket = subject.bucket("objects");
    assert_eq!(bucket.list("").await.unwrap(), []);
    assert_eq!(bucket.get("a/1").await.unwrap(), None);
    assert_eq!(bucket.head("a/1").await.unwrap(), None);
    bucket.delete("a/1").await.unwrap();
    let body = Bytes::from_static(b"one");
    assert_eq!(bucket.create("a/1", body.clone()).await.unwrap(), Create::Created);
    assert_eq!(
        bucket.create("a/1", Bytes::from_static(b"two")).await.unwrap(),
        Create::Exists(body.clone())
    );
    // The same bytes: an earlier attempt of the same caller whose reply was lost.
    assert_eq!(bucket.create("a/1", body.clone()).await.unwrap(), Create::Created);
    assert_eq!(bucket.get("a/1").await.unwrap(), Some(body));
    assert_eq!(bucket.head("a/1").await.unwrap(), Some(3));
    assert_eq!(bucket.create("a/empty", Bytes::new()).await.unwrap(), Create::Created);
    assert_eq!(bucket.get("a/empty").await.unwrap(), Some(Bytes::new()));
    assert_eq!(bucket.create("ab/1", Bytes::from_static(b"x")).await.unwrap(), Create::Created);
    let listed = |prefix: &'static str| {
        let bucket = bucket.clone();
        async move {
            let found = bucket.list(prefix).await.unwrap();
            assert!(
                found.iter().all(|object| object.modified_us > 1_600_000_000_000_000),
                "{found:?}"
            );
            let mut found: Vec<(String, u64)> =
                found.into_iter().map(|object| (object.key, object.bytes)).collect();
            found.sort();
            found
        }
    };
    assert_eq!(listed("a/").await, [("a/1".to_owned(), 3), ("a/empty".to_owned(), 0)]);
    assert_eq!(listed("").await.len(), 3);
    assert_eq!(listed("nothing/").await, []);
    bucket.delete("a/1").await.unwrap();
    assert_eq!(bucket.head("a/1").await.unwrap(), None);
    let counts = bucket.counts();
    assert_eq!((counts.put, counts.delete, counts.head, counts.list), (5, 2, 3, 4));
    // Three requested, of which one found nothing; three read back by creates that found the name
    // taken: two reads must agree on other bytes, one shows the same bytes.
    assert_eq!((counts.get, counts.bytes_written), (6, 3 * 3 + 1));
}

async fn create_race(subject: &Subject) {
    let bucket = subject.bucket("race");
    for round in 0..2 {
        let mut tasks = tokio::task::JoinSet::new();
        for racer in 0..16 {
            let (bucket, key) = (bucket.clone(), format!("race/{round}"));
            tasks.spawn(async move {
                (racer, bucket.create(&key, Bytes::from(format!("racer {racer}"))).await.unwrap())
            });
        }
        let outcomes = tasks.join_all().await;
        let winners: Vec<i32> = outcomes
            .iter()
            .filter(|(_, outcome)| *outcome == Create::Created)
            .map(|(racer, _)| *racer)
            .collect();
        let [winner] = winners[..] else { panic!("{} winners: {winners:?}", winners.len()) };
        let won = Bytes::from(format!("racer {winner}"));
        for (racer, outcome) in outcomes {
            assert!(
                racer == winner || outcome == Create::Exists(won.clone()),
                "racer {racer} saw {outcome:?}"
            );
        }
        assert_eq!(bucket.get(&format!("race/{round}")).await.unwrap(), Some(won));
    }
}

async fn probe(subject: &Subject) {
    let bucket = subject.bucket("probe");
    bucket.probe().await.unwrap();
    let counts = bucket.counts();
    assert!(counts.get + counts.put + counts.head + counts.delete <= 5, "cheap: {counts:?}");
    assert_eq!(bucket.list("").await.unwrap(), [], "the probe removes its object");
}

/// Returns bytes that differ at every place, so that a misplaced part cannot go unnoticed.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = length as u64 | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&state.to_be_bytes());
    }
    out.truncate(length);
    out
}

async fn fetch(
    bucket: &Bucket,
    wanted: &[Wanted],
    dir: &Path,
) -> (Result<(), DownloadError>, u64, u64) {
    let progress = DownloadProgress::default();
    let result = download(bucket, wanted, dir, 4, &progress, &CancellationToken::new()).await;
    (result, progress.requests.load(Ordering::Relaxed), progress.bytes.load(Ordering::Relaxed))
}

async fn transfers(subject: &Subject) {
    const MIB: usize = 1 << 20;
    let bucket = subject.bucket("transfers");
    let dir = tempfile::tempdir().unwrap();
    let mut wanted = Vec::new();
    let mut contents = Vec::new();
    // Empty, small, one part exactly, several parts, and above the size of a single PUT.
    for (n, length) in [0, 1, 4_000, 8 * MIB, 17 * MIB + 3, 65 * MIB].into_iter().enumerate() {
        let source = dir.path().join(format!("source{n}"));
        let body = pattern(length);
        std::fs::write(&source, &body).unwrap();
        let key = format!("data/{n}.sst");
        let uploaded = bucket.upload_file(&key, &source).await.unwrap();
        assert_eq!((uploaded.bytes, uploaded.crc32c), (length as u64, crc32c::crc32c(&body)));
        wanted.push(Wanted {
            key,
            bytes: uploaded.bytes,
            crc32c: uploaded.crc32c,
            file_name: format!("{n:06}.sst"),
        });
        contents.push(body);
    }
    // No upload overwrites an object, neither a small one nor a large one.
    for n in [1, 5] {
        let other = dir.path().join("other");
        std::fs::write(&other, vec![7; contents[n].len()]).unwrap();
        let error = bucket.upload_file(&wanted[n].key, &other).await.unwrap_err();
        assert_eq!(error, BucketError::Exists { key: wanted[n].key.clone() });
    }
    let missing = bucket.upload_file("data/x", &dir.path().join("no such file")).await.unwrap_err();
    assert!(matches!(missing, BucketError::LocalFile { .. }), "{missing:?}");

    let target = dir.path().join("made/when/needed");
    let total: u64 = wanted.iter().map(|file| file.bytes).sum();
    let (result, requests, bytes) = fetch(&bucket, &wanted, &target).await;
    result.unwrap();
    assert_eq!((requests, bytes), (1 + 1 + 1 + 1 + 3 + 9, total), "big objects in parts of 8 MiB");
    let files = || {
        let mut names: Vec<String> = std::fs::read_dir(&target)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(files(), wanted.iter().map(|file| file.file_name.clone()).collect::<Vec<_>>());
    for (file, body) in wanted.iter().zip(&contents) {
        assert!(
            std::fs::read(target.join(&file.file_name)).unwrap() == *body,
            "{}",
            file.file_name
        );
    }
    // Resumed: whole files are not fetched again; a damaged file and a leftover part are replaced.
    let (result, requests, _) = fetch(&bucket, &wanted, &target).await;
    assert_eq!((result, requests), (Ok(()), 0));
    let mut damaged = contents[2].clone();
    damaged[1_000] ^= 1;
    std::fs::write(target.join(&wanted[2].file_name), damaged).unwrap();
    std::fs::write(target.join(format!("{}.part", wanted[2].file_name)), b"left by a crash")
        .unwrap();
    let (result, requests, _) = fetch(&bucket, &wanted, &target).await;
    assert_eq!((result, requests), (Ok(()), 1));
    assert!(std::fs::read(target.join(&wanted[2].file_name)).unwrap() == contents[2]);
    assert_eq!(files().len(), wanted.len());

    let cancel = CancellationToken::new();
    cancel.cancel();
    let progress = DownloadProgress::default();
    let cancelled = download(&bucket, &wanted, &dir.path().join("c"), 4, &progress, &cancel).await;
    assert_eq!(cancelled, Err(DownloadError::Cancelled));
}

async fn corruption(subject: &Subject) {
    let bucket = subject.bucket("corruption");
    let dir = tempfile::tempdir().unwrap();
    // Once within a single request, once over several.
    for (n, length) in [(0, 5_000usize), (1, (17 << 20) + 3)] {
        let source = dir.path().join(format!("source{n}"));
        let body = pattern(length);
        std::fs::write(&source, &body).unwrap();
        let key = format!("data/{n}.sst");
        let uploaded = bucket.upload_file(&key, &source).await.unwrap();
        let wanted = Wanted {
            key,
            bytes: uploaded.bytes,
            crc32c: uploaded.crc32c,
            file_name: "1.sst".into(),
        };
        let mut flipped = body.clone();
        flipped[length - 2] ^= 0x10;
        let longer: Vec<u8> = body.iter().copied().chain([0]).collect();
        for (what, bad) in [
            ("flipped", flipped),
            ("one short", body[..length - 1].to_vec()),
            ("empty", vec![]),
            ("long", longer),
        ] {
            subject.overwrite("corruption", &wanted.key, &bad).await;
            let target = dir.path().join(format!("{n} {what}"));
            let (result, _, _) = fetch(&bucket, std::slice::from_ref(&wanted), &target).await;
            match result {
                Err(DownloadError::Corrupt { key, .. }) => assert_eq!(key, wanted.key, "{what}"),
                other => panic!("{what}: {other:?}"),
            }
            assert!(
                !target.join("1.sst").exists(),
                "{what}: a bad file must not get its final name"
            );
        }
        bucket.delete(&wanted.key).await.unwrap();
        let (result, _, _) =
            fetch(&bucket, std::slice::from_ref(&wanted), &dir.path().join("gone")).await;
        assert_eq!(result, Err(DownloadError::Missing { key: wanted.key.clone() }));
    }
}

fn catalog(keyspace: u64, name: &str, nonce: u64) -> Catalog {
    Catalog::first(
        KeyspaceId(keyspace),
        name,
        KeyspaceSpec::default(),
        &[vec![NodeId(1)]],
        1,
        nonce,
    )
}

async fn catalog_races(subject: &Subject) {
    let bucket = subject.bucket("races");
    let store = CatalogStore::new(bucket.clone());
    let first = catalog(1, "ks", 1);
    assert_eq!(store.write(&first).await.unwrap(), CatalogWrite::Won);
    let (left, right) = (first.next(2, 100), first.next(2, 200));
    let tasks = [left.clone(), right.clone()].map(|mine| {
        let store = store.clone();
        tokio::spawn(async move { store.write(&mine).await.unwrap() })
    });
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    let winner = match &outcomes[..] {
        [CatalogWrite::Won, CatalogWrite::Lost(other)] => (&left, other),
        [CatalogWrite::Lost(other), CatalogWrite::Won] => (&right, other),
        other => panic!("{other:?}"),
    };
    assert_eq!(winner.0, winner.1.as_ref(), "the loser is shown the winner's version");
    // A lost reply: the object is there, and is the caller's.
    assert_eq!(store.write(winner.0).await.unwrap(), CatalogWrite::Won);
    // The nonce decides, not the bytes: an older build may have encoded the same version
    // differently.
    let third = winner.0.next(3, 300);
    bucket
        .create(&layout::catalog_version(KeyspaceId(1), CatalogVersion(3)), reencoded(&third))
        .await
        .unwrap();
    assert_eq!(store.write(&third).await.unwrap(), CatalogWrite::Won);
    // The reply came so late that another master has written the next version since.
    let fourth = third.next(4, 400);
    assert_eq!(store.write(&fourth).await.unwrap(), CatalogWrite::Won);
    assert_eq!(store.write(&third).await.unwrap(), CatalogWrite::Lost(Box::new(fourth)));
    // An object under another's name is refused.
    let moved = vasto_shipping::catalog::encode_catalog(&first);
    subject
        .overwrite("races", &layout::catalog_version(KeyspaceId(1), CatalogVersion(5)), &moved)
        .await;
    let error = store.tip(KeyspaceId(1), CatalogVersion(4)).await.unwrap_err();
    assert!(matches!(error, CatalogError::Misplaced { .. }), "{error}");
}

/// Encodes the same version in other bytes: with a field that this version does not know.
fn reencoded(catalog: &Catalog) -> Bytes {
    let mut body = serde_json::to_value(catalog).unwrap();
    body["added_later"] = serde_json::json!({"x": 1});
    vasto_shipping::envelope::encode("catalog", &body)
}

async fn catalog_tips(subject: &Subject) {
    let bucket = subject.bucket("tips");
    let store = CatalogStore::new(bucket.clone());
    assert_eq!(store.tip(KeyspaceId(1), CatalogVersion(0)).await.unwrap(), None);
    assert_eq!(store.load_all().await.unwrap(), []);
    let mut last = store.create_keyspace(|id| catalog(id.0, "ks", 7)).await.unwrap();
    for version in 2..=13u64 {
        last = last.next(version, version);
        assert_eq!(store.write(&last).await.unwrap(), CatalogWrite::Won);
    }
    for hint in [0, 1, 2, 5, 12, 13, 14, 1_000] {
        let tip = store.tip(KeyspaceId(1), CatalogVersion(hint)).await.unwrap();
        assert_eq!(tip.as_ref(), Some(&last), "hint {hint}");
    }
    let before = bucket.counts();
    store.tip(KeyspaceId(1), CatalogVersion(13)).await.unwrap();
    let after = bucket.counts();
    assert_eq!((after.get - before.get, after.head - before.head, after.list), (1, 1, before.list));
    assert_eq!(store.load_all().await.unwrap(), [last]);
}

async fn keyspaces(subject: &Subject) {
    let bucket = subject.bucket("keyspaces");
    let store = CatalogStore::new(bucket.clone());
    let nonces = Arc::new(AtomicU32::new(1));
    let create = |name: &str| {
        let (store, nonces, name) = (store.clone(), Arc::clone(&nonces), name.to_owned());
        let nonce = u64::from(nonces.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(async move { store.create_keyspace(|id| catalog(id.0, &name, nonce)).await })
    };
    // Four names at once: four ids. The same name four times: one keyspace.
    let tasks: Vec<_> = ["a", "b", "c", "d"].map(create).into_iter().collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await.unwrap().unwrap().keyspace.0);
    }
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3, 4]);
    let tasks: Vec<_> = (0..4).map(|_| create("same")).collect();
    let mut made = Vec::new();
    for task in tasks {
        match task.await.unwrap() {
            Ok(catalog) => made.push(catalog),
            Err(error) => assert_eq!(error, CatalogError::NameTaken("same".into())),
        }
    }
    assert_eq!(made.len(), 1);
    let names = |all: &[Catalog]| {
        let mut names: Vec<String> = all.iter().map(|catalog| catalog.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&store.load_all().await.unwrap()), ["a", "b", "c", "d", "same"]);

    // A crash after the id was claimed: the id is used up, the keyspace does not exist, the name is
    // free.
    let orphan = 1 + store.load_all().await.unwrap().last().unwrap().keyspace.0.max(8);
    let orphan = {
        let mut id = orphan;
        while bucket
            .head(&layout::catalog_version(KeyspaceId(id - 1), CatalogVersion(1)))
            .await
            .unwrap()
            .is_none()
        {
            id -= 1;
        }
        id
    };
    assert_eq!(store.write(&catalog(orphan, "orphan", 9_000)).await.unwrap(), CatalogWrite::Won);
    assert_eq!(names(&store.load_all().await.unwrap()), ["a", "b", "c", "d", "same"]);
    let real = create("orphan").await.unwrap().unwrap();
    assert_eq!(real.keyspace.0, orphan + 1);

    // Deleted, its name released and reused; a second release, or one for another keyspace, does
    // nothing.
    let same = &made[0];
    let mut gone = same.next(5, 9_001);
    gone.state = KeyspaceState::Deleted;
    assert_eq!(store.write(&gone).await.unwrap(), CatalogWrite::Won);
    store.release_name("same", KeyspaceId(999)).await.unwrap();
    store.release_name("same", same.keyspace).await.unwrap();
    store.release_name("same", same.keyspace).await.unwrap();
    let again = create("same").await.unwrap().unwrap();
    assert!(again.keyspace > real.keyspace, "ids are never reused");
    assert_eq!(bucket.list(&format!("{}same/", layout::names_prefix())).await.unwrap().len(), 3);
    // A crash between the delete and the release of the name does not keep the name taken.
    let mut gone = again.next(6, 9_002);
    gone.state = KeyspaceState::Deleted;
    assert_eq!(store.write(&gone).await.unwrap(), CatalogWrite::Won);
    let third = create("same").await.unwrap().unwrap();
    store.release_name("same", again.keyspace).await.unwrap();
    assert_eq!(create("same").await.unwrap().unwrap_err(), CatalogError::NameTaken("same".into()));
    // Deleted keyspaces are loaded too, since nodes may still hold their replicas; the order is by
    // id.
    let all = store.load_all().await.unwrap();
    assert!(all.windows(2).all(|pair| pair[0].keyspace < pair[1].keyspace));
    assert_eq!(all.iter().filter(|catalog| catalog.state == KeyspaceState::Deleted).count(), 2);
    assert!(all.contains(&third));
    let error = store.create_keyspace(|id| catalog(id.0, "../x", 1)).await.unwrap_err();
    assert!(matches!(error, CatalogError::BadName(_)));
}

async fn cluster_claims(subject: &Subject) {
    let bucket = subject.bucket("cluster");
    let tasks: Vec<_> = (0..2)
        .map(|n| {
            let store = CatalogStore::new(bucket.clone());
            tokio::spawn(async move { store.claim_cluster(format!("cluster {n}")).await.unwrap() })
        })
        .collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await.unwrap());
    }
    assert_eq!(ids[0], ids[1], "both obey the one that came first");
    let store = CatalogStore::new(bucket.clone());
    assert_eq!(store.claim_cluster("late".into()).await.unwrap(), ids[0]);
    let newer = vasto_shipping::envelope::encode(
        "cluster",
        &serde_json::json!({"cluster_id": "x", "format": 2, "created_at_us": 1}),
    );
    subject.overwrite("cluster", &layout::cluster(), &newer).await;
    assert_eq!(
        store.claim_cluster("late".into()).await.unwrap_err(),
        CatalogError::NewerCluster(2)
    );
}

async fn signatures_of_s3(server: &S3Server) {
    let wrong = BucketOptions { secret_access_key: Some("wrong".into()), ..server.options() };
    let bucket = Bucket::open(&format!("s3://{BUCKET}/x"), &wrong).unwrap();
    let error = bucket.probe().await.unwrap_err();
    assert!(matches!(error, BucketError::AccessDenied { .. }), "{error:?}");
    assert!(!format!("{error:?} {error}").contains("wrong"), "{error:?}");
}

async fn missing_bucket_of_s3(server: &S3Server) {
    let bucket = Bucket::open("s3://no-such-bucket/x", &server.options()).unwrap();
    let error = bucket.get("x").await.unwrap_err();
    assert!(matches!(error, BucketError::UnknownBucket { .. }), "{error:?}");
}

fn faulty() -> (Bucket, Arc<Faulty>) {
    let store = Faulty::in_memory();
    (store.bucket(), store)
}

#[tokio::test]
async fn a_store_that_ignores_conditions_is_refused() {
    let (in_memory, store) = faulty();
    store.ignore_conditions();
    let server = HttpStore::without_conditions().await;
    for bucket in [in_memory, server.bucket()] {
        let error = bucket.probe().await.unwrap_err();
        assert!(matches!(error, BucketError::IgnoresConditions { .. }), "{error:?}");
        assert!(error.to_string().contains("use another store"), "{error}");
        assert_eq!(bucket.list("").await.unwrap(), [], "the probe removes its object");
    }
}

#[tokio::test]
async fn lost_replies_and_conflicts_are_resolved_by_reading_back() {
    let (bucket, store) = faulty();
    store.fail(Call::Put, Fault::ResetAfter, 3);
    let mine = Bytes::from_static(b"mine");
    assert_eq!(bucket.create("k", mine.clone()).await.unwrap(), Create::Created);
    assert_eq!(
        bucket.counts().put,
        4,
        "three attempts whose replies were lost, and the one that found it"
    );
    // 409 without an object has no winner: the create is retried.
    store.fail(Call::Put, Fault::Conflict, 2);
    assert_eq!(bucket.create("j", mine.clone()).await.unwrap(), Create::Created);
    assert_eq!(bucket.counts().put, 7);
    // A rival's object is never taken for the caller's, also after a lost reply of another attempt.
    store.fail(Call::Put, Fault::Conflict, 1);
    assert_eq!(
        bucket.create("k", Bytes::from_static(b"rival")).await.unwrap(),
        Create::Exists(mine)
    );
    // Endless conflicts are an error that leaves the outcome unknown, within the budget.
    store.fail(Call::Put, Fault::Conflict, u32::MAX);
    let budget = RetryBudget { total: Duration::from_millis(300), ..RetryBudget::default() };
    let error = bucket.with_retry(budget).create("l", Bytes::new()).await.unwrap_err();
    assert!(matches!(error, BucketError::Store { .. }), "{error:?}");
}

#[tokio::test]
async fn a_body_altered_on_its_way_back_is_not_taken_for_another_writers() {
    let (bucket, store) = faulty();
    let mine = Bytes::from_static(b"mine");
    let flip_next = || store.fail(Call::Get, Fault::FlippedBody, 1);
    store.fail(Call::Put, Fault::ResetAfter, 1);
    flip_next();
    assert_eq!(bucket.create("k", mine.clone()).await.unwrap(), Create::Created);
    assert_eq!(store.hit(), 2, "the reply was lost, and the object was read altered");
    flip_next();
    assert_eq!(
        bucket.create("k", Bytes::from_static(b"rival")).await.unwrap(),
        Create::Exists(mine)
    );
    assert_eq!(store.hit(), 3);
}

#[tokio::test]
async fn short_and_broken_bodies_are_fetched_again() {
    let (bucket, store) = faulty();
    let body = Bytes::from(pattern(20_000_000));
    bucket.create("k", body.clone()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let wanted = [Wanted {
        key: "k".into(),
        bytes: body.len() as u64,
        crc32c: crc32c::crc32c(&body),
        file_name: "1.sst".into(),
    }];
    store.fail(Call::Get, Fault::BrokenBody, 3);
    let (result, requests, _) = fetch(&bucket, &wanted, &dir.path().join("broken")).await;
    assert_eq!((result, requests), (Ok(()), 3 + 3), "each broken request is repeated alone");
    store.fail(Call::Get, Fault::ShortBody, 1);
    let (result, _, _) = fetch(&bucket, &wanted, &dir.path().join("short")).await;
    assert_eq!(result, Ok(()), "a short body is fetched once more");
    assert!(std::fs::read(dir.path().join("short/1.sst")).unwrap() == body);
    store.fail(Call::Get, Fault::ShortBody, u32::MAX);
    let (result, _, _) = fetch(&bucket, &wanted, &dir.path().join("always short")).await;
    // The cause is reported before any checksum is checked.
    let named = |key: &str, detail: &str| key == "k" && detail.contains("ends at");
    assert!(
        matches!(&result, Err(DownloadError::Corrupt { key, detail }) if named(key, detail)),
        "{result:?}"
    );
    store.heal();
    store.fail(Call::Get, Fault::ShortBody, 1);
    assert_eq!(bucket.get("k").await.unwrap(), Some(body), "a whole get is repeated as well");
}

#[tokio::test]
async fn an_unreachable_endpoint_is_reported_within_seconds() {
    // Bound, then closed: no server answers here.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = BucketOptions {
        endpoint: Some(format!("http://{closed}")),
        access_key_id: Some("a".into()),
        secret_access_key: Some("b".into()),
        allow_http: true,
        ..BucketOptions::default()
    };
    let began = Instant::now();
    let error = Bucket::open("s3://b/p", &options).unwrap().probe().await.unwrap_err();
    assert!(matches!(error, BucketError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("AWS_ENDPOINT_URL"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    // A server that accepts the connection and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let options = BucketOptions {
        endpoint: Some(format!("http://{}", silent.local_addr().unwrap())),
        ..options
    };
    let began = Instant::now();
    let error = Bucket::open("s3://b/p", &options).unwrap().probe().await.unwrap_err();
    assert!(matches!(error, BucketError::Unreachable { .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}

#[test]
fn missing_credentials_and_bad_urls_are_reported_at_once() {
    let options = BucketOptions {
        endpoint: Some("http://127.0.0.1:9".into()),
        access_key_id: Some("a".into()),
        allow_http: true,
        ..BucketOptions::default()
    };
    if std::env::var_os("AWS_SECRET_ACCESS_KEY").is_none() {
        let error = Bucket::open("s3://b/p", &options).unwrap_err();
        assert!(matches!(error, BucketError::NoCredentials { .. }), "{error:?}");
        assert!(error.to_string().contains("AWS_SECRET_ACCESS_KEY"), "{error}");
    }
    let error = Bucket::open("http://b/p", &options).unwrap_err();
    assert!(error.to_string().contains("file:///path"), "{error}");
}
