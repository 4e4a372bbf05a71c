//! A rebalance as administrators see it: planned, begun, shown, beside a resize, continued by the
//! next master, and cancelled.

use serde_json::Value;
use vasto_core::ErrorCode;
use vasto_core::plan::Step;
use vasto_proto::v1::{self, pace_operation_request::Pace};

use crate::harness::{TestMaster, code, eventually, json};
use crate::node::Crew;

const JOINED: &str = "n-0000000000000003";

async fn rebalance(master: &TestMaster, plan_only: bool) -> Result<Value, tonic::Status> {
    json(master.client.clone().rebalance(v1::RebalanceRequest { plan_only, max_rate: None }).await)
}

async fn pace(master: &TestMaster, id: &str, pace: Pace) -> Result<Value, tonic::Status> {
    let request = v1::PaceOperationRequest { id: id.into(), pace: Some(pace) };
    json(master.client.clone().pace_operation(request).await)
}

/// Waits until the running moves are in a state, each with this bound of its rate.
async fn moves_are(master: &TestMaster, state: &str, max_rate: Value) -> Vec<String> {
    eventually(&format!("moves that are {state} at {max_rate}"), async || {
        let listed = json(master.client.clone().list_operations(v1::Empty {}).await).unwrap();
        let all = listed.as_array()?.iter().filter(|one| one["kind"] == "move");
        let moves: Vec<&Value> = all.filter(|one| one["step"].is_string()).collect();
        let so = moves.iter().all(|one| one["state"] == state && one["max_rate"] == max_rate);
        let ids = moves.iter().filter_map(|one| Some(one["id"].as_str()?.to_owned()));
        (so && !moves.is_empty()).then(|| ids.collect())
    })
    .await
}

async fn cancel(master: &TestMaster, id: &str) -> Result<Value, tonic::Status> {
    let request = v1::OperationRequest { id: id.into() };
    json(master.client.clone().cancel_operation(request).await)
}

async fn live(master: &TestMaster, count: usize) {
    eventually("the nodes to be live", async || {
        let status = master.status().await;
        let nodes = status["nodes"].as_array()?;
        let live = nodes.iter().filter(|node| node["state"] == "live").count();
        (live == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_rebalance_is_planned_begun_continued_and_cancelled() {
    let url = "memory://rebalance";
    let master = TestMaster::start(url).await;
    let crew = Crew::start(&master.url, [1, 2]);
    live(&master, 2).await;
    master.create("ks1", 8).await.unwrap();
    let even = rebalance(&master, false).await.unwrap();
    assert_eq!((&even["state"], &even["balanced"]), (&"done".into(), &true.into()), "{even}");
    assert_eq!(code(cancel(&master, "rebalance-1").await).0, ErrorCode::NotFound);

    let joined = Crew::start(&master.url, [3]);
    live(&master, 3).await;
    // The checkpoints are not made yet.
    crew.hold_at(Some(Step::Prepare));
    let plan = rebalance(&master, true).await.unwrap();
    assert_eq!((&plan["kind"], &plan["balanced"]), (&"rebalance".into(), &false.into()));
    let moves = plan["moves"].as_array().unwrap();
    assert_eq!(moves.len(), 2, "{plan}");
    assert!(moves.iter().all(|one| one["to"] == JOINED && one["keyspace"] == "ks1"), "{plan}");
    assert_eq!(plan["bytes_moved"], 2 << 20, "{plan}");
    assert_eq!(plan["sources"].as_array().unwrap().len(), 2);
    assert_eq!(plan["disk_needed"][0]["bytes"], 2 << 20, "{plan}");
    assert!(master.describe("ks1").await.unwrap()["operation"].is_null());

    let begun = rebalance(&master, false).await.unwrap();
    let id = begun["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("rebalance-") && begun["state"] == "running", "{begun}");
    assert_eq!(rebalance(&master, false).await.unwrap()["id"], id.as_str(), "one runs at a time");
    let both = async |master: &TestMaster| {
        eventually("both replicas to be on their way", async || {
            let shown = master.operation(&id).await;
            let step = shown["step"].as_str()?;
            step.starts_with("2 replicas moving").then_some(shown)
        })
        .await
    };
    assert_eq!(both(&master).await["keyspace"], "ks1");
    let described = master.describe("ks1").await.unwrap();
    assert_eq!(described["operation"]["kind"], "move", "{described}");
    let (refused, text) = code(master.resize("ks1", 9, false).await);
    assert_eq!(refused, ErrorCode::FailedPrecondition, "{text}");

    // It is slowed down and paused as a whole.
    let slow = pace(&master, &id, Pace::MaxRate(1 << 20)).await.unwrap();
    assert_eq!((&slow["max_rate"], &slow["state"]), (&(1 << 20).into(), &"running".into()));
    moves_are(&master, "running", (1 << 19).into()).await;
    let paused = pace(&master, &id, Pace::Paused(true)).await.unwrap();
    assert_eq!((&paused["state"], &paused["trouble"]), (&"paused".into(), &Value::Null));
    let moves = moves_are(&master, "paused", (1 << 19).into()).await;
    for refused in [Pace::Paused(false), Pace::MaxRate(0)] {
        let (refused, text) = code(pace(&master, &moves[0], refused).await);
        assert_eq!(refused, ErrorCode::FailedPrecondition, "{text}");
        assert!(text.contains(&id), "{text}");
    }
    let (slow, text) = code(pace(&master, &id, Pace::MaxRate(1)).await);
    assert_eq!(slow, ErrorCode::InvalidArgument, "{text}");

    // The next master goes on with it.
    master.stop().await;
    let master = TestMaster::start(url).await;
    crew.follow(&master.url);
    joined.follow(&master.url);
    assert_eq!(both(&master).await["state"], "paused");
    moves_are(&master, "paused", (1 << 19).into()).await;
    assert_eq!(pace(&master, &id, Pace::MaxRate(0)).await.unwrap()["state"], "paused");
    moves_are(&master, "paused", Value::Null).await;
    assert_eq!(pace(&master, &id, Pace::Paused(false)).await.unwrap()["state"], "running");
    let moves = moves_are(&master, "running", Value::Null).await;
    // One of them alone.
    let alone = pace(&master, &moves[0], Pace::Paused(true)).await.unwrap();
    assert_eq!((&alone["state"], &alone["kind"]), (&"paused".into(), &"move".into()));
    assert_eq!(both(&master).await["state"], "running");
    let cancelled = cancel(&master, &id).await.unwrap();
    assert_eq!((&cancelled["state"], &cancelled["moves_failed"]), (&"aborted".into(), &2.into()));
    assert!(master.describe("ks1").await.unwrap()["operation"].is_null());
    assert_eq!(code(cancel(&master, &id).await).0, ErrorCode::FailedPrecondition);
    let placement = master.describe("ks1").await.unwrap()["placement"].to_string();
    assert!(!placement.contains(JOINED), "{placement}");
    crew.stop();
    joined.stop();
    master.stop().await;
}
