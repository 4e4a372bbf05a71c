//! The estimated cost: the size of the bucket comes with a listing of all of it, never by itself.

use std::time::Duration;

use serde_json::Value;
use vasto_master::MasterConfig;
use vasto_proto::v1;
use vasto_shipping::gc::Retention;
use vasto_shipping::{Bucket, BucketOptions, Prices};

use crate::harness::{TestMaster, config, json};

#[tokio::test]
async fn the_stored_bytes_are_known_after_every_listing_of_the_bucket() {
    let url = "memory://bill-stored";
    let prices = Prices { currency: "EUR".into(), gib_month: 1e9, ..Prices::default() };
    let retention = Retention { min_age: Duration::ZERO, ..Retention::default() };
    let master = TestMaster::with(MasterConfig { prices, retention, ..config(url) }).await;
    let bucket = Bucket::open(url, &BucketOptions::default()).unwrap();
    let in_bucket =
        async || bucket.list("").await.unwrap().iter().map(|object| object.bytes).sum::<u64>();
    bucket.create("probe/left-behind", vec![7; 5_000].into()).await.unwrap();

    let status = master.status().await;
    let bill = &status["bill"];
    assert_eq!((&bill["currency"], &bill["processes"]), (&"EUR".into(), &1.into()), "{bill}");
    assert_eq!(
        (&bill["stored_bytes"], &bill["per_month"]["total"]),
        (&Value::Null, &Value::Null),
        "{bill}"
    );
    assert_eq!(
        master.status().await["master"]["bucket_requests"]["list"],
        status["master"]["bucket_requests"]["list"],
        "an estimate lists nothing"
    );

    let client = || master.client.clone();
    let stored = async || master.status().await["bill"]["stored_bytes"].as_u64().unwrap();
    json(client().collect_garbage(v1::CollectGarbageRequest { dry_run: true }).await).unwrap();
    let before = in_bucket().await;
    assert_eq!(stored().await, before, "nothing was deleted");
    let collected =
        json(client().collect_garbage(v1::CollectGarbageRequest { dry_run: false }).await).unwrap();
    assert_eq!(
        (&collected["deleted"], &collected["bytes"]),
        (&1.into(), &5_000.into()),
        "{collected}"
    );
    assert_eq!(collected["stored_bytes"], in_bucket().await);
    assert_eq!(stored().await, in_bucket().await, "what was deleted is not stored any more");
    assert!(in_bucket().await < before);
    bucket.create("probe/another", vec![7; 100].into()).await.unwrap();
    json(client().check_bucket(v1::CheckBucketRequest { deep: false }).await).unwrap();
    assert_eq!(stored().await, in_bucket().await);

    let bill = &master.status().await["bill"]["per_month"];
    let wanted = stored().await as f64 / f64::from(1 << 30) * 1e9;
    assert!((bill["storage"].as_f64().unwrap() - wanted).abs() < 1e-3, "{bill}");
    assert!(bill["total"].as_f64() >= bill["storage"].as_f64(), "{bill}");
    master.stop().await;
}
