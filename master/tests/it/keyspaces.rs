//! Keyspaces are created, described, watched, and deleted.

use serde_json::json;
use vasto_core::ErrorCode;
use vasto_proto::v1;

use crate::harness::{TestMaster, code, eventually, json as parse, within};
use crate::node::{Crew, Session, hello, reports};

#[tokio::test]
async fn a_keyspace_is_created_described_and_deleted() {
    let master = TestMaster::start("memory://keyspace-life").await;
    let _crew = Crew::start(&master.url, [1, 2]);
    eventually("two nodes", async || {
        (master.status().await["nodes"].as_array()?.len() == 2).then_some(())
    })
    .await;

    let created = master.create("ks1", 4).await.unwrap();
    assert_eq!(
        (&created["name"], &created["shards"], &created["epoch"]),
        (&json!("ks1"), &json!(4), &json!(1))
    );
    let on = |document: &serde_json::Value, node: &str| -> usize {
        let shards = document["placement"].as_array().unwrap();
        shards.iter().filter(|shard| shard["replicas"][0]["node_id"] == node).count()
    };
    assert_eq!(
        (on(&created, "n-0000000000000001"), on(&created, "n-0000000000000002")),
        (2, 2),
        "spread evenly"
    );
    for shard in created["placement"].as_array().unwrap() {
        assert_eq!(
            shard["replicas"][0]["state"], "serving",
            "create answers when every replica serves"
        );
    }
    assert_eq!(master.describe("ks1").await.unwrap()["keyspace_id"], created["keyspace_id"]);
    let list = parse(master.client.clone().list_keyspaces(v1::Empty {}).await).unwrap();
    assert_eq!((list[0]["name"].clone(), list[0]["keys"].clone()), (json!("ks1"), json!(4000)));
    assert_eq!(list[0]["keys_estimate"], 4000, "by its right name");
    assert_eq!(master.status().await["warnings"], json!([]));

    assert_eq!(code(master.create("ks1", 1).await).0, ErrorCode::AlreadyExists);
    let missing = code(master.describe("ks2").await);
    assert_eq!(missing.0, ErrorCode::NotFound);
    assert!(missing.1.contains("ks1"), "{}", missing.1);

    let mut topologies = master.watch("ks1").await;
    let topology = within("the topology", topologies.message()).await.unwrap().unwrap();
    assert!(topology.active && topology.shards.len() == 4);
    assert_eq!(topology.shards[0].replicas[0].address, "127.0.0.1:10001");

    let request = v1::KeyspaceRequest { name: "ks1".into() };
    let deleted =
        parse(within("a delete", master.client.clone().delete_keyspace(request.clone())).await)
            .unwrap();
    assert_eq!(deleted["state"], "deleted");
    let last = within("the last topology", topologies.message()).await.unwrap().unwrap();
    assert!(!last.active && last.epoch > topology.epoch);
    assert!(within("the end of the watch", topologies.message()).await.unwrap().is_none());
    assert_eq!(code(master.describe("ks1").await).0, ErrorCode::NotFound);
    let watched = master.client.clone().watch(v1::WatchRequest { keyspace: "ks1".into() }).await;
    assert!(watched.is_err());

    let again = master.create("ks1", 1).await.unwrap();
    assert_ne!(again["keyspace_id"], created["keyspace_id"], "ids are never used again");
    master.stop().await;
}

#[tokio::test]
async fn impossible_specifications_are_refused_with_a_remedy() {
    let master = TestMaster::start("memory://keyspace-refused").await;
    let refused = code(master.create("ks1", 1).await);
    assert_eq!(refused.0, ErrorCode::FailedPrecondition, "no node");
    assert!(refused.1.contains("vasto serve node"), "{}", refused.1);
    let _crew = Crew::start(&master.url, [1]);
    eventually("a node", async || {
        (master.status().await["nodes"][0]["state"] == "live").then_some(())
    })
    .await;

    let base = v1::CreateKeyspaceRequest {
        name: "ks1".into(),
        shards: 1,
        replicas: 1,
        ..Default::default()
    };
    let with = |change: fn(&mut v1::CreateKeyspaceRequest)| {
        let mut request = base.clone();
        change(&mut request);
        request
    };
    use ErrorCode::{FailedPrecondition, InvalidArgument};
    let cases = [
        (with(|r| r.name = "../x".into()), InvalidArgument, "keyspace name"),
        (with(|r| r.shards = 0), InvalidArgument, "at least 1"),
        (with(|r| r.shards = 73), InvalidArgument, "72 and 80"),
        (with(|r| r.shards = 72), FailedPrecondition, "use 1 to 64"),
        (with(|r| r.shards = 4096), FailedPrecondition, "use 1 to 64"),
        (with(|r| r.replicas = 0), InvalidArgument, "1 to 7"),
        (with(|r| r.replicas = 8), InvalidArgument, "1 to 7"),
        (with(|r| r.replicas = 2), FailedPrecondition, "start more nodes"),
        (with(|r| r.ack = v1::Ack::Replica as i32), FailedPrecondition, "--ack"),
        (with(|r| r.ttl_ms = Some(0)), InvalidArgument, "time to live"),
        (
            with(|r| r.ttl_ms = Some(1_001 * 365 * 86_400_000)),
            InvalidArgument,
            "at most 365000 days",
        ),
        (with(|r| r.quarantine_ms = Some(u64::MAX)), InvalidArgument, "quarantine"),
    ];
    for (request, want, says) in cases {
        let (got, message) =
            code(parse(within("a refusal", master.client.clone().create_keyspace(request)).await));
        assert_eq!(got, want, "{message}");
        assert!(message.contains(says), "{message}");
    }
    assert_eq!(master.status().await["keyspaces"], json!([]), "nothing was created");
    master.stop().await;
}

#[tokio::test]
async fn a_create_answers_with_the_reason_when_a_replica_fails() {
    let master = TestMaster::start("memory://keyspace-failed").await;
    let node = Session::join(&master.url, hello(1)).await;
    let fail = async {
        let seen = node.until("the keyspace", |seen| !seen.catalogs.is_empty()).await;
        let mut reports = reports(seen.catalogs.values().next().unwrap(), node.node, None);
        reports[0].phase = vasto_core::report::ReplicaPhase::Failed("the disk is full".into());
        node.report(reports).await;
    };
    let (created, ()) = tokio::join!(master.create("ks1", 1), fail);
    let (got, message) = code(created);
    assert_eq!(got, ErrorCode::Unknown);
    assert!(message.contains("the disk is full"), "{message}");
    master.stop().await;
}

#[tokio::test]
async fn commands_reach_every_node_and_a_lost_node_is_an_error() {
    let master = TestMaster::start("memory://keyspace-commands").await;
    let crew = Crew::start(&master.url, [1, 2]);
    eventually("two nodes", async || {
        (master.status().await["nodes"].as_array()?.len() == 2).then_some(())
    })
    .await;
    master.create("ks1", 2).await.unwrap();
    let request = v1::KeyspaceRequest { name: "ks1".into() };
    let done = parse(
        within("a checkpoint", master.client.clone().checkpoint_keyspace(request.clone())).await,
    )
    .unwrap();
    assert_eq!(done["nodes"].as_array().unwrap().len(), 2);

    crew.stop();
    eventually("both to be away", async || {
        let nodes = master.status().await;
        nodes["nodes"].as_array()?.iter().all(|node| node["state"] == "away").then_some(())
    })
    .await;
    let away = code(parse(
        within("a refusal", master.client.clone().compact_keyspace(request.clone())).await,
    ));
    assert_eq!(away.0, ErrorCode::Unavailable);

    let (first, second) =
        (Session::join(&master.url, hello(1)).await, Session::join(&master.url, hello(2)).await);
    let lose = async {
        let seen = first.until("the command", |seen| !seen.commands.is_empty()).await;
        first.done(seen.commands[0].id, "").await;
        second.until("the command", |seen| !seen.commands.is_empty()).await;
        drop(second);
    };
    let mut client = master.client.clone();
    let (outcome, ()) =
        tokio::join!(within("the loss to be noticed", client.compact_keyspace(request)), lose);
    let (got, message) = code(parse(outcome));
    assert_eq!(got, ErrorCode::Unavailable);
    assert!(message.contains("n-0000000000000002 was lost"), "{message}");
    master.stop().await;
}
