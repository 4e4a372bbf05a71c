//! A shrink completes, whatever restarts; a quarantine in its way can be ended.

use serde_json::{Value, json};
use vasto_core::ErrorCode;
use vasto_core::plan::Step;
use vasto_proto::v1;

use crate::harness::{TestMaster, code, eventually, json as parse, within};
use crate::node::Crew;

/// Starts a master with two nodes and a keyspace on them.
async fn cluster(bucket: &str, shards: u32, quarantine_ms: u64) -> (TestMaster, Crew) {
    let master = TestMaster::start(bucket).await;
    let crew = Crew::start(&master.url, [1, 2]);
    eventually("two nodes", async || {
        (master.status().await["nodes"].as_array()?.len() == 2).then_some(())
    })
    .await;
    let request = v1::CreateKeyspaceRequest {
        name: "ks1".into(),
        shards,
        replicas: 2,
        quarantine_ms: Some(quarantine_ms),
        ..v1::CreateKeyspaceRequest::default()
    };
    parse(within("a create", master.client.clone().create_keyspace(request)).await).unwrap();
    (master, crew)
}

/// Shrinks from 3 shards to 1 and replaces the master while the nodes are held at `step`.
async fn restart_at(step: Step, bucket: &str) {
    let (master, crew) = cluster(bucket, 3, 0).await;
    crew.hold_at(Some(step));
    let started = master.resize("ks1", 1, false).await.unwrap();
    assert_eq!(
        (&started["kind"], &started["from"], &started["to"]),
        (&json!("shrink"), &json!(3), &json!(1))
    );
    assert_eq!(started["targets"].as_array().unwrap().len(), 2, "both replicas of the survivor");
    let name = serde_json::to_value(step).unwrap();
    master.operation_until("op-1-1", "step", name.as_str().unwrap()).await;
    // An incomplete seal is undone and tried again.
    if step != Step::Sealing {
        eventually("what the plan waits for", async || {
            let operation = master.operation("op-1-1").await;
            operation["waiting_for"].as_str()?.contains("shard").then_some(())
        })
        .await;
    }
    master.stop().await;

    let master = TestMaster::start(bucket).await;
    crew.follow(&master.url);
    crew.hold_at(None);
    let done = master.operation_until("op-1-1", "state", "done").await;
    assert_eq!((&done["kind"], &done["to"]), (&json!("shrink"), &json!(1)));
    let described = master.describe("ks1").await.unwrap();
    assert_eq!(
        (&described["shards"], &described["placement"].as_array().unwrap().len()),
        (&json!(1), &1)
    );
    // The quarantine of this keyspace is 0: the retired replicas are removed at once.
    eventually("the end of the retired replicas", async || {
        let described = master.describe("ks1").await.unwrap();
        (described.get("retired").is_none() && described["quarantines"] == json!([])).then_some(())
    })
    .await;
    master.stop().await;
}

#[tokio::test]
async fn a_new_master_goes_on_with_a_shrink_from_prepare() {
    restart_at(Step::Prepare, "memory://shrink-restart-prepare").await;
}

#[tokio::test]
async fn a_new_master_goes_on_with_a_shrink_from_tail() {
    restart_at(Step::Tail, "memory://shrink-restart-tail").await;
}

#[tokio::test]
async fn a_new_master_goes_on_with_a_shrink_from_sealing() {
    restart_at(Step::Sealing, "memory://shrink-restart-sealing").await;
}

#[tokio::test]
async fn a_new_master_goes_on_with_a_shrink_from_committed() {
    let dir = tempfile::tempdir().unwrap();
    restart_at(Step::Committed, &format!("file://{}", dir.path().display())).await;
}

#[tokio::test]
async fn a_quarantine_in_the_way_is_named_ended_and_gone_before_the_shrink() {
    let (master, _crew) = cluster("memory://shrink-quarantine", 2, 3_600_000).await;
    master.resize("ks1", 3, false).await.unwrap();
    master.operation_until("op-1-1", "state", "done").await;

    let (refused, reason) = code(master.resize("ks1", 2, false).await);
    assert_eq!(refused, ErrorCode::FailedPrecondition);
    assert!(reason.contains("--end-quarantine"), "{reason}");
    let plan = master.resize("ks1", 2, true).await.unwrap();
    assert_eq!((&plan["kind"], &plan["bytes_moved"]), (&json!("shrink"), &json!(2 << 20)));
    let said = |text: &Value| text.as_str().unwrap().split(", for").next().unwrap().to_owned();
    assert_eq!(said(&plan["refused"]), said(&json!(reason)), "the plan says what the change says");
    assert!(code(master.resize("ks1", 3, true).await).1.contains("already has 3 shards"));

    let end = async || {
        let request = v1::EndQuarantineRequest { name: "ks1".into(), shards: 2 };
        parse(within("the end", master.client.clone().end_quarantine(request)).await).unwrap()
    };
    let first = end().await;
    assert_eq!((&first["keyspace"], &first["shards"]), (&json!("ks1"), &json!(2)));
    let version = master.describe("ks1").await.unwrap()["version"].as_u64().unwrap();
    eventually("the end of the quarantine", async || {
        (end().await["quarantines"] == json!([])).then_some(())
    })
    .await;
    let later = master.describe("ks1").await.unwrap()["version"].as_u64().unwrap();
    assert!(later <= version + 2, "asking again writes nothing: {version} to {later}");

    assert_eq!(master.resize("ks1", 2, true).await.unwrap()["refused"], Value::Null);
    master.resize("ks1", 2, false).await.unwrap();
    master.operation_until("op-1-2", "state", "done").await;
    let described = master.describe("ks1").await.unwrap();
    let retired = described["retired"].as_array().unwrap();
    assert_eq!((retired.len(), &retired[0]["shard"]), (2, &json!(2)), "{described}");
    for field in ["replica_id", "node_id", "until_us"] {
        assert!(!retired[0][field].is_null(), "{field} of {described}");
    }
    assert_eq!(master.status().await["keyspaces"][0]["retired_replicas"], 2);
    master.stop().await;
}
