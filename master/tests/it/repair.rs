//! A master whose bucket has lost its claim, and the repair.

use serde_json::json;
use vasto_core::ErrorCode;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, KeyspaceId, Lsn};
use vasto_master::{Master, MasterError};
use vasto_proto::v1::{self, command::Kind};
use vasto_shipping::{Bucket, BucketOptions, CatalogError, CatalogStore, layout};

use crate::harness::{TestMaster, code, config, eventually, json};
use crate::node::{Session, hello, reports};

fn bucket(url: &str) -> Bucket {
    Bucket::open(url, &BucketOptions::default()).unwrap()
}

/// Starts a cluster with one keyspace on one node; returns its id and the node's catalog.
async fn a_cluster(url: &str) -> (String, Catalog) {
    let master = TestMaster::start(url).await;
    let node = Session::join(&master.url, hello(1)).await;
    let serve = async {
        let seen = node.until("the keyspace", |seen| !seen.catalogs.is_empty()).await;
        let catalog = seen.catalogs[&KeyspaceId(1)].clone();
        report(&node, &catalog).await;
        catalog
    };
    let (created, catalog) = tokio::join!(master.create("ks1", 1), serve);
    created.unwrap();
    let id = master.running.cluster_id.clone();
    master.stop().await;
    (id, catalog)
}

/// Reports the replicas of a node that has not shipped anything yet.
async fn report(node: &Session, catalog: &Catalog) {
    let mut replicas = reports(catalog, node.node, None);
    replicas
        .iter_mut()
        .for_each(|report| (report.shipped_lsn, report.manifest_lsn) = (Lsn(0), Lsn(0)));
    node.report(replicas).await;
}

async fn repair(
    master: &TestMaster,
    accept_loss: bool,
) -> Result<serde_json::Value, tonic::Status> {
    json(master.client.clone().repair_bucket(v1::RepairBucketRequest { accept_loss }).await)
}

/// Answers for a node with the catalog that it remembers; the node reconnects when asked to.
async fn remembers(master: &TestMaster, id: &str, node: Session, catalog: &Catalog) -> Session {
    let is_asked = |seen: &crate::node::Seen| {
        seen.commands.iter().any(|command| command.kind == Kind::Catalogs as i32)
    };
    let seen = node.until("the question", is_asked).await;
    node.names_catalogs(seen.commands.last().unwrap().id, &[catalog]).await;
    node.until("the end of the session", |seen| seen.ended).await;
    let back = Session::join(&master.url, v1::Hello { cluster_id: id.into(), ..hello(1) }).await;
    report(&back, catalog).await;
    back
}

#[tokio::test]
async fn a_master_without_a_claim_serves_its_repair_and_nothing_else() {
    let url = "memory://repair-claim";
    let (id, catalog) = a_cluster(url).await;
    let bucket = bucket(url);
    bucket.delete(&layout::cluster()).await.unwrap();
    let master = TestMaster::start(url).await;
    assert_eq!(master.running.cluster_id, "");
    assert_eq!(bucket.head(&layout::cluster()).await.unwrap(), None, "it is claimed by nobody");
    let trouble = master.running.trouble.clone();
    assert!(
        trouble.borrow().as_deref().is_some_and(|why| why.contains("cluster.json is missing")),
        "it is not ready"
    );
    let (refused, text) = code(master.create("new", 1).await);
    assert_eq!(refused, ErrorCode::FailedPrecondition);
    assert!(
        text.contains("cluster.json is missing") && text.contains("vasto bucket repair"),
        "{text}"
    );
    assert_eq!(code(master.describe("ks1").await).0, ErrorCode::FailedPrecondition);
    let status = master.status().await;
    assert!(status["warnings"][0].as_str().unwrap().contains("vasto bucket repair"), "{status}");
    // A node that knows nothing waits; a node of this cluster is welcome, whatever cluster it
    // names.
    let fresh = Session::open(&master.url, hello(2)).await.unwrap();
    let seen = fresh.until("the rejection", |seen| seen.rejected.is_some()).await;
    assert_eq!(seen.rejected.unwrap().code, ErrorCode::Unavailable as u32);
    let (refused, text) = code(repair(&master, false).await);
    assert!(
        refused == ErrorCode::FailedPrecondition && text.contains("start the nodes first"),
        "{text}"
    );
    let node = Session::join(&master.url, v1::Hello { cluster_id: id.clone(), ..hello(1) }).await;
    let (repaired, node) =
        tokio::join!(repair(&master, false), remembers(&master, &id, node, &catalog));
    let repaired = repaired.unwrap();
    assert_eq!(
        (&repaired["cluster_id"], &repaired["claimed"]),
        (&json!(id), &json!(true)),
        "{repaired}"
    );
    assert_eq!(
        (&repaired["missing"], &repaired["keyspaces"]),
        (&json!([]), &json!(["ks1"])),
        "{repaired}"
    );
    assert_eq!(*trouble.borrow(), None, "it is ready");
    assert_eq!(master.describe("ks1").await.unwrap()["state"], "active");
    assert_eq!(master.status().await["cluster_id"], json!(id));
    drop(node);
    master.stop().await;
    let master = TestMaster::start(url).await;
    assert_eq!(master.running.cluster_id, id);
    master.stop().await;
}

#[tokio::test]
async fn an_emptied_prefix_is_given_back_to_the_nodes_that_knock() {
    let url = "memory://repair-emptied";
    let (id, mut catalog) = a_cluster(url).await;
    // The catalog has been through a few versions.
    catalog.version = CatalogVersion(5);
    let bucket = bucket(url);
    let all: Vec<String> =
        bucket.list("").await.unwrap().into_iter().map(|object| object.key).collect();
    bucket.delete_many(&all.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    let master = TestMaster::start(url).await;
    assert_ne!(master.running.cluster_id, id, "an empty prefix is free");
    let own = v1::Hello { cluster_id: id.clone(), ..hello(1) };
    let refused = Session::open(&master.url, own.clone()).await.unwrap();
    refused.until("the rejection", |seen| seen.rejected.is_some()).await;
    let warnings = master.status().await["warnings"].to_string();
    assert!(warnings.contains(&id) && warnings.contains("vasto bucket repair"), "{warnings}");
    let node = async {
        // A node retries like this every other second.
        let node = eventually("the node to be taken in", async || {
            let session = Session::open(&master.url, own.clone()).await.ok()?;
            let seen = session
                .until("an answer", |seen| seen.welcome.is_some() || seen.rejected.is_some())
                .await;
            seen.welcome.is_some().then_some(session)
        });
        remembers(&master, &id, node.await, &catalog).await
    };
    let (repaired, node) = tokio::join!(repair(&master, false), node);
    let repaired = repaired.unwrap();
    // Five versions and a name.
    assert_eq!(
        (&repaired["claimed"], &repaired["written"]),
        (&json!(true), &json!(6)),
        "{repaired}"
    );
    assert_eq!(master.status().await["cluster_id"], json!(id));
    let store = CatalogStore::new(bucket.clone());
    for hint in [1, 3, 5] {
        let tip = store.tip(KeyspaceId(1), CatalogVersion(hint)).await.unwrap().unwrap();
        assert_eq!((tip.version, tip.nonce), (CatalogVersion(5), catalog.nonce));
    }
    assert_eq!(store.load_all().await.unwrap().len(), 1);
    drop(node);
    master.stop().await;
}

#[tokio::test]
async fn a_prefix_with_somebody_elses_objects_is_refused_at_the_start() {
    let url = "memory://repair-foreign";
    bucket(url).create("photos/1.jpg", "not ours".into()).await.unwrap();
    let error = Master::start(config(url), Default::default()).await.map(drop).unwrap_err();
    assert!(matches!(&error, MasterError::Catalog(CatalogError::Unclaimed { .. })), "{error}");
    assert!(error.to_string().contains("choose an empty prefix"), "{error}");
}
