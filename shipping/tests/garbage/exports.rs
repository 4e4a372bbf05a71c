//! Exports stay while their plan runs, or may; gc deletes them afterwards, and fsck checks those
//! that a running plan names.

use object_store::{ObjectStoreExt, path::Path};
use vasto_core::catalog::Catalog;
use vasto_core::plan::{Plan, PlanKind, Source, Step};
use vasto_shipping::gc::Fsck;
use vasto_shipping::{ExportManifest, ExportedTable, RetryBudget};

use super::*;

/// The source's shard.
const FROM: ShardId = ShardId(1);

/// Returns the catalog after this one, in which the next plan runs: a shrink with this export.
fn running(catalog: &Catalog, export: Option<&str>) -> Catalog {
    let mut next = catalog.next(catalog.written_at_us + 1, catalog.nonce + 1);
    let source = Source {
        shard: FROM,
        replica: ReplicaId(2),
        node: NodeId(1),
        manifest: None,
        export: export.map(str::to_owned),
    };
    next.plan = Some(Plan {
        id: catalog.next_plan,
        kind: PlanKind::Shrink { from: 2, to: 1 },
        from_epoch: Epoch(1),
        started_at_us: 1,
        step: Step::Tail,
        sources: vec![source],
        targets: Vec::new(),
        seals_undone: 0,
        floor: None,
        paused: false,
        max_rate: None,
        estimate: None,
    });
    next.next_plan = PlanId(catalog.next_plan.0 + 1);
    next
}

/// Returns the catalog after this one, without a plan.
fn ended(catalog: &Catalog) -> Catalog {
    let mut next = catalog.next(catalog.written_at_us + 1, catalog.nonce + 1);
    next.plan = None;
    next
}

/// Uploads an export of two tables; returns its keys, the manifest first.
async fn export(bucket: &Bucket, keyspace: KeyspaceId, plan: PlanId, attempt: &str) -> Vec<String> {
    let table = |n: u64| {
        let body = Bytes::from(format!("the rows of {n} in attempt {attempt}"));
        let key = layout::export_table(keyspace, plan, FROM, SHARD, n, attempt);
        let (bytes, crc32c) = (body.len() as u64, crc32c::crc32c(&body));
        (ExportedTable { to: SHARD, key, bytes, crc32c, rows: n }, body)
    };
    let tables = [table(1), table(2)];
    let manifest = ExportManifest {
        keyspace,
        plan,
        shard: FROM,
        replica: ReplicaId(2),
        lsn: Lsn(7),
        floor: 1,
        event_time_max: 2,
        files: tables.iter().map(|(table, _)| table.clone()).collect(),
    };
    let mut keys = vec![layout::export_manifest(keyspace, plan, FROM, attempt)];
    for (table, body) in tables {
        bucket.create(&table.key, body).await.unwrap();
        keys.push(table.key);
    }
    bucket.create(&keys[0], manifest.encode()).await.unwrap();
    keys
}

async fn exported(bucket: &Bucket) -> Vec<String> {
    let all = bucket.list("data/").await.unwrap().into_iter().map(|object| object.key);
    all.filter(|key| layout::parse_export(key).is_some()).collect()
}

fn sorted(mut keys: Vec<String>) -> Vec<String> {
    keys.sort();
    keys
}

/// An attempt that a crash has cut off stays with the others: only the end of the plan tells that
/// nobody needs it.
#[tokio::test]
async fn exports_stay_while_their_plan_runs_and_go_when_they_are_old_enough() {
    let mut dated = Dated::new().await;
    let (keyspace, bucket) = (dated.rig.keyspace(), dated.rig.bucket.clone());
    dated.rig.three_checkpoints().await;
    let cut_off = export(&bucket, keyspace, PlanId(1), "aa").await;
    let named = export(&bucket, keyspace, PlanId(1), "bb").await;
    dated.rig.write(running(&dated.rig.catalog, Some(&named[0]))).await;
    let first = sorted([cut_off, named].concat());
    dated.age(1_000 * HOUR).await;
    collect(&bucket, STRICT, false).await.unwrap();
    assert_eq!(sorted(exported(&bucket).await), first);
    let found = fsck(&bucket, true).await.unwrap();
    assert!(found.is_clean(), "{found:?}");
    let unneeded = |found: &Fsck| {
        let orphans = found.orphans.iter().map(|orphan| orphan.key.clone());
        sorted(orphans.filter(|key| layout::parse_export(key).is_some()).collect())
    };
    assert_eq!(unneeded(&found), Vec::<String>::new());
    // The next plan runs: everything else of the keyspace stays.
    dated.rig.write(ended(&dated.rig.catalog)).await;
    let second = sorted(export(&bucket, keyspace, PlanId(2), "cc").await);
    dated.rig.write(running(&dated.rig.catalog, None)).await;
    let found = fsck(&bucket, true).await.unwrap();
    assert!(found.is_clean() && found.warnings.is_empty(), "{found:?}");
    assert_eq!(unneeded(&found), first, "they are counted as not needed");
    let hour = Retention { min_age: HOUR, ..STRICT };
    let all = sorted([first.clone(), second.clone()].concat());
    dated.age(12 * HOUR).await;
    let young = collect(&bucket, hour, false).await.unwrap();
    assert_eq!((sorted(exported(&bucket).await), young.young), (all, 6));
    dated.age(14 * HOUR).await;
    let collected = collect(&bucket, hour, false).await.unwrap();
    assert_eq!(sorted(exported(&bucket).await), second);
    assert_eq!(sorted(collected.keys.clone()), first);
    let manifests = collected.keys.iter().take_while(|key| key.ends_with(".manifest")).count();
    assert_eq!(manifests, 2, "no remaining manifest names a deleted table: {collected:?}");
    // The plan ends, and no other runs.
    dated.rig.write(ended(&dated.rig.catalog)).await;
    dated.age(14 * HOUR).await;
    collect(&bucket, hour, false).await.unwrap();
    assert_eq!(exported(&bucket).await, Vec::<String>::new());
    assert!(dated.rig.keys().await.contains(&dated.rig.sst(4)));
}

#[tokio::test]
async fn exports_stay_while_it_is_not_known_whether_their_plan_runs() {
    let rig = Rig::new("unknown-plan").await;
    let bucket = &rig.bucket;
    // Catalogs are read before objects are listed: this plan began in between.
    let mut kept = export(bucket, rig.keyspace(), rig.catalog.next_plan, "aa").await;
    // This keyspace is just being created, and that one's catalog cannot be read.
    kept.extend(export(bucket, KeyspaceId(8), PlanId(1), "aa").await);
    kept.extend(export(bucket, KeyspaceId(9), PlanId(1), "aa").await);
    rig.put(&layout::catalog_version(KeyspaceId(9), CatalogVersion(1)), "damaged").await;
    // A plan with this id was before the first.
    export(bucket, rig.keyspace(), PlanId(0), "aa").await;
    collect(bucket, STRICT, false).await.unwrap();
    assert_eq!(sorted(exported(bucket).await), sorted(kept));
}

/// A plan begins, and its source exports, at each request that a collection makes.
#[tokio::test]
async fn what_a_plan_exports_that_begins_during_a_collection_stays() {
    let (mut at, mut spared, mut collected_old) = (0, 0, 0);
    loop {
        at += 1;
        let store = Faulty::in_memory();
        let mut rig = Rig::over(store.without_faults()).await;
        let keyspace = rig.keyspace();
        let old = export(&rig.bucket, keyspace, PlanId(1), "aa").await;
        rig.write(running(&rig.catalog, Some(&old[0]))).await;
        rig.write(ended(&rig.catalog)).await;
        store.fail_at(store.calls() + at, Fault::DeathBefore);
        let impatient = store.bucket().with_retry(RetryBudget {
            total: Duration::from_secs(10),
            attempt: Duration::from_millis(200),
            transfer: Duration::from_millis(200),
            backoff_first: Duration::from_millis(1),
            backoff_max: Duration::from_millis(4),
        });
        let mut collecting =
            tokio::spawn(async move { collect(&impatient, STRICT, false).await.unwrap() });
        tokio::select! {
            collected = &mut collecting => {
                assert!(at > 10, "{collected:?}");
                assert_eq!(exported(&rig.bucket).await, Vec::<String>::new());
                break;
            }
            () = store.died() => {}
        }
        rig.write(running(&rig.catalog, None)).await;
        let new = export(&rig.bucket, keyspace, PlanId(2), "bb").await;
        collecting.await.unwrap();
        let left = exported(&rig.bucket).await;
        assert!(new.iter().all(|key| left.contains(key)), "request {at}: {left:?}");
        let is_spared = old.iter().all(|key| left.contains(key));
        spared += usize::from(is_spared);
        collected_old += usize::from(!is_spared);
    }
    // Where the catalog had changed since it was surveyed, nothing of the keyspace was deleted.
    println!("{at} requests: spared at {spared}, collected at {collected_old}");
    assert!(spared > 0 && collected_old > 0, "{spared} {collected_old}");
}

#[tokio::test]
async fn a_check_finds_what_is_missing_or_damaged_of_the_export_that_a_plan_names() {
    let mut rig = Rig::new("export-check").await;
    let (keyspace, bucket) = (rig.keyspace(), rig.bucket.clone());
    let keys = export(&bucket, keyspace, PlanId(1), "aa").await;
    export(&bucket, keyspace, PlanId(1), "bb").await;
    rig.write(running(&rig.catalog, Some(&keys[0]))).await;
    assert!(fsck(&bucket, true).await.unwrap().is_clean());
    let raw = bucket.raw_store();
    let put = async |key: &str, body: Vec<u8>| {
        raw.put(&Path::from(key), body.into()).await.unwrap();
    };
    for key in &keys {
        let sound = bucket.get(key).await.unwrap().unwrap().to_vec();
        bucket.delete(key).await.unwrap();
        let found = fsck(&bucket, false).await.unwrap();
        assert_eq!((&found.missing, found.corrupt.len()), (&vec![key.clone()], 0), "{found:?}");
        put(key, sound[..sound.len() - 1].to_vec()).await;
        let found = fsck(&bucket, false).await.unwrap();
        assert_eq!((found.missing.len(), &found.corrupt), (0, &vec![key.clone()]), "{found:?}");
        for byte in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[byte] ^= 1;
            put(key, damaged).await;
            let found = fsck(&bucket, true).await.unwrap();
            assert_eq!(found.corrupt, std::slice::from_ref(key), "byte {byte}: {found:?}");
        }
        put(key, sound).await;
    }
    // The tables are large: without a deep check their size decides.
    let sound = bucket.get(&keys[1]).await.unwrap().unwrap().to_vec();
    put(&keys[1], vec![b'x'; sound.len()]).await;
    assert!(fsck(&bucket, false).await.unwrap().is_clean());
    put(&keys[1], sound).await;
    // A sound manifest under the name of another one.
    let other = export(&bucket, keyspace, PlanId(2), "aa").await;
    let misplaced = bucket.get(&other[0]).await.unwrap().unwrap().to_vec();
    put(&keys[0], misplaced).await;
    assert_eq!(fsck(&bucket, false).await.unwrap().corrupt, [keys[0].clone()]);
    // When the plan has ended, nobody counts on its export.
    rig.write(ended(&rig.catalog)).await;
    assert!(fsck(&bucket, true).await.unwrap().is_clean());
}
