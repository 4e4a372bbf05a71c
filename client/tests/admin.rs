//! Calls to the master: requests, answers, errors.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::Cluster;
use tonic::Status;
use vasto_client::{Ack, ErrorKind, KeyspaceSpec, OperationState, RestoreOptions};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;

fn refused(code: ErrorCode, message: &str) -> Result<&'static str, Status> {
    Err(status_of(&VastoError::new(code, message)))
}

#[tokio::test]
async fn documents_of_the_master_are_read_and_handed_on() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    let answers = [
        ("list_keyspaces", r#"[{"name":"ks1","shards":3,"keys_estimate":7,"later":1}]"#),
        (
            "describe_keyspace",
            r#"{"name":"ks1","ack":"os","placement":[{"shard":0,"replicas":[{"node_id":"n-1","lsn":null}]}]}"#,
        ),
        ("delete_keyspace", r#"{"name":"ks1","keyspace_id":4,"state":"deleted","shipped":true}"#),
        ("checkpoint_keyspace", r#"{"keyspace":"ks1","nodes":["n-1"]}"#),
        ("compact_keyspace", r#"{"keyspace":"ks1","nodes":["n-2"]}"#),
        ("evict_replica", r#"{"name":"ks1","replica_id":3,"state":"draining","version":9}"#),
        ("list_nodes", r#"[{"node_id":"n-1","state":"live","disk_free":5,"pid":null}]"#),
        ("cordon_node", r#"{"node_id":"n-1","cordoned":true}"#),
        (
            "cluster_status",
            r#"{"cluster_id":"c-1","warnings":["odd"],"bill":{"per_month":{"total":1.5}}}"#,
        ),
        ("list_operations", r#"[{"id":"op-1-1","state":"running","from":2,"to":3}]"#),
        (
            "check_bucket",
            r#"{"objects":2,"orphans":[{"key":"a","bytes":1,"age_s":2}],"missing":["b"]}"#,
        ),
        ("collect_garbage", r#"{"dry_run":true,"deleted":1,"keys":["a"]}"#),
        ("repair_bucket", r#"{"cluster_id":"c-1","claimed":true,"written":12}"#),
    ];
    for (call, json) in answers {
        cluster.answer(call, Ok(json));
    }
    let sent = |call: &str| answers.iter().find(|(name, _)| *name == call).unwrap().1;

    let keyspaces = vasto.list_keyspaces().await.unwrap();
    assert_eq!((keyspaces[0].shards, keyspaces[0].keys_estimate), (3, Some(7)));
    assert_eq!(keyspaces.json(), sent("list_keyspaces"));
    let keyspace = vasto.describe_keyspace("ks1").await.unwrap();
    assert_eq!((keyspace.ack.as_str(), keyspace.placement[0].replicas[0].lsn), ("os", None));
    assert_eq!(keyspace.json(), sent("describe_keyspace"));
    assert!(vasto.delete_keyspace("ks1").await.unwrap().shipped);
    assert_eq!(vasto.checkpoint_keyspace("ks1").await.unwrap().nodes, ["n-1"]);
    assert_eq!(vasto.compact_keyspace("ks1").await.unwrap().json(), sent("compact_keyspace"));
    assert_eq!(vasto.evict_replica("ks1", 3, false).await.unwrap().state, "draining");
    assert_eq!(vasto.list_nodes().await.unwrap()[0].disk_free, Some(5));
    assert!(vasto.cordon_node("n-1", true).await.unwrap().cordoned);
    let status = vasto.cluster_status().await.unwrap();
    assert_eq!(status.bill.as_ref().unwrap().per_month.total, Some(1.5));
    assert_eq!(
        (status.warnings.as_slice(), status.json()),
        (["odd".to_owned()].as_slice(), sent("cluster_status"))
    );
    assert_eq!(vasto.list_operations().await.unwrap()[0].state, OperationState::Running);
    assert_eq!(vasto.check_bucket(false).await.unwrap().orphans[0].age_s, 2);
    assert_eq!(vasto.collect_garbage(true).await.unwrap().into_document().keys, ["a"]);
    assert_eq!(vasto.repair_bucket(false).await.unwrap().written, 12);
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_unknown_only_if_the_call_changes_something() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    for call in ["delete_keyspace", "resize_keyspace", "show_operation", "describe_keyspace"] {
        cluster.answer(call, Ok("odd"));
    }
    assert_eq!(vasto.delete_keyspace("ks1").await.unwrap_err().kind(), ErrorKind::Unknown);
    assert_eq!(vasto.start_resize("ks1", 3).await.unwrap_err().kind(), ErrorKind::Unknown);
    assert_eq!(vasto.show_operation("op-1-1").await.unwrap_err().kind(), ErrorKind::Internal);
    let error = vasto.describe_keyspace("ks1").await.unwrap_err();
    assert!(
        error.kind() == ErrorKind::Internal && error.message().contains("of the same version"),
        "{error}"
    );
}

#[tokio::test]
async fn a_keyspace_is_created_as_asked() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    let spec =
        KeyspaceSpec::default().shards(3).replicas(2).ack(Ack::Os).ttl(Duration::from_secs(30));
    vasto.create_keyspace("ks1", spec).await.unwrap();
    let sent = cluster.state.lock().calls.pop().unwrap();
    for part in [
        "\"ks1\"",
        "shards: 3",
        "replicas: 2",
        "ack: Os",
        "ttl_ms: Some(30000)",
        "quarantine_ms: None",
    ] {
        assert!(sent.contains(part), "{part} in {sent}");
    }
    cluster.answer("create_keyspace", refused(ErrorCode::AlreadyExists, "`ks1` exists"));
    let error = vasto.create_keyspace("ks1", KeyspaceSpec::default()).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::AlreadyExists, "`ks1` exists"));
    let calls = cluster.state.lock().calls.len();
    for name in ["", "Ks", "../x"] {
        let error = vasto.create_keyspace(name, KeyspaceSpec::default()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let error =
        vasto.create_keyspace("ks2", KeyspaceSpec::default().shards(4097)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(cluster.state.lock().calls.len(), calls, "nothing was sent");
}

#[tokio::test]
async fn a_resize_is_waited_for() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    cluster.answer("resize_keyspace", Ok(r#"{"id":"op-1-1","state":"running"}"#));
    cluster.answer("show_operation", Ok(r#"{"id":"op-1-1","state":"running","bytes_done":5}"#));
    cluster.answer("show_operation", Err(Status::unavailable("restarting")));
    cluster.answer("show_operation", Ok(r#"{"id":"op-1-1","state":"done","keys_moved":7}"#));
    let done = vasto.resize_keyspace("ks1", 4).await.unwrap();
    assert_eq!(done.state, OperationState::Done);
    assert_eq!(done.keys_moved, Some(7));
    assert!(done.json().contains("\"keys_moved\":7"));
    cluster.answer("resize_keyspace", Ok(r#"{"id":"op-1-2","state":"running"}"#));
    cluster.answer(
        "show_operation",
        Ok(r#"{"id":"op-1-2","state":"aborted","reason":"cancelled by a user"}"#),
    );
    let error = vasto.resize_keyspace("ks1", 5).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.message().contains("cancelled by a user"), "{error}");
    // Down as well as up; a quarantine that is in the way ends when that is asked for.
    let refusal = refused(ErrorCode::FailedPrecondition, "try `--end-quarantine`");
    cluster.answer("resize_keyspace", refusal);
    let error = vasto.resize_keyspace("ks1", 2).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    cluster.answer(
        "end_quarantine",
        Ok(r#"{"quarantines":[{"dropping":true}],"waiting_for":"a manifest"}"#),
    );
    let left = vasto.end_quarantine("ks1", 2).await.unwrap();
    assert!(left.quarantines[0].dropping, "{left:?}");
    assert_eq!(left.waiting_for.as_deref(), Some("a manifest"));
    assert!(cluster.state.lock().calls.last().unwrap().contains("shards: 2"));
    cluster.answer("resize_keyspace", Ok(r#"{"id":"op-1-3","state":"done","kind":"shrink"}"#));
    let done = vasto.resize_keyspace("ks1", 2).await.unwrap();
    assert_eq!(done.kind.as_deref(), Some("shrink"));
    assert_eq!(
        vasto.end_quarantine("ks1", 0).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    cluster.answer("resize_keyspace", Ok(r#"{"moving_fraction":0.2}"#));
    let plan = vasto.plan_resize("ks1", 5).await.unwrap();
    assert!(plan.moving_fraction == 0.2 && plan.json().contains("moving_fraction"));
    assert!(cluster.state.lock().calls.last().unwrap().contains("plan_only: true"));
    cluster.answer("restore_keyspace", Ok(r#"{"kind":"restore","bytes_moved":7}"#));
    assert_eq!(vasto.plan_restore("ks1", "ks2", None, true).await.unwrap().bytes_moved, 7);
    cluster
        .answer("empty_node", Ok(r#"{"kind":"replace","from":"n-1","to":null,"refused":"full"}"#));
    cluster.answer("restore_keyspace", Ok(r#"{"kind":"restore","bytes_moved":7}"#));
    let restore = RestoreOptions { from_bucket: true, max_rate: Some(9_000), at_us: None };
    assert_eq!(vasto.plan_restore_with("ks1", "ks2", restore).await.unwrap().bytes_moved, 7);
    let said = |what: &str| cluster.state.lock().calls.last().unwrap().contains(what);
    assert!(said("max_rate: Some(9000)") && said("from_bucket: true") && said("plan_only: true"));
    let plan = vasto.plan_emptying_node("n-1", None, false).await.unwrap();
    assert_eq!((plan.refused.as_deref(), &plan.to), (Some("full"), &None));
    assert!(cluster.state.lock().calls.last().unwrap().contains("plan_only: true"));
    assert_eq!(vasto.plan_resize("ks1", 65).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn a_rebalance_is_planned_and_begun() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    cluster.answer(
        "rebalance",
        Ok(r#"{"balanced":false,"moves":[{"keyspace":"ks1","shard":2,"from":"n-1","to":"n-2","bytes":7}],
            "sources":[{"keyspace":"ks1","shard":2,"node_id":"n-1","bytes":7}],"bytes_moved":7,"requests":{"get":2}}"#),
    );
    let plan = vasto.plan_rebalance().await.unwrap();
    assert_eq!((plan.moves[0].shard, plan.moves[0].to.as_str(), plan.bytes_moved), (2, "n-2", 7));
    assert!(!plan.balanced && plan.primaries.is_empty());
    assert!(cluster.state.lock().calls.last().unwrap().contains("plan_only: true"));
    cluster.answer("rebalance", Ok(r#"{"id":"rebalance-9","state":"done","balanced":true}"#));
    let begun = vasto.start_rebalance().await.unwrap();
    assert_eq!((begun.id.as_str(), begun.balanced), ("rebalance-9", Some(true)));
    let said = |what: &str| cluster.state.lock().calls.last().unwrap().contains(what);
    assert!(said("plan_only: false") && said("max_rate: None"));
    cluster.answer("rebalance", Ok(r#"{"id":"rebalance-9","state":"running"}"#));
    vasto.start_rebalance_at(Some(9_000)).await.unwrap();
    assert!(said("plan_only: false") && said("max_rate: Some(9000)"));
}

#[tokio::test]
async fn a_call_without_an_answer_is_unknown_only_if_it_changes_something() {
    let mut cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    cluster.answer("delete_keyspace", Err(Status::unavailable("gone")));
    assert_eq!(vasto.delete_keyspace("ks1").await.unwrap_err().kind(), ErrorKind::Unknown);
    cluster.answer("describe_keyspace", Err(Status::unknown("gone")));
    assert_eq!(vasto.describe_keyspace("ks1").await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(vasto.keyspace("other").await.err().unwrap().kind(), ErrorKind::NotFound);
    cluster.stop_master().await;
    assert_eq!(vasto.list_nodes().await.unwrap_err().kind(), ErrorKind::Unavailable);
}

/// The port of a node, mistaken for the master's: a gRPC server that knows none of these calls.
#[tokio::test]
async fn a_port_that_is_no_masters_is_named_as_such() {
    let cluster = Cluster::start(1).await;
    let url = format!("http://{}", cluster.nodes[0].address);
    let vasto = vasto_client::Vasto::connect(&url).await.unwrap();
    for error in [
        vasto.list_nodes().await.unwrap_err(),
        vasto.keyspace("ks1").await.err().unwrap(),
        vasto.create_keyspace("ks1", KeyspaceSpec::default()).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(
            error.message().contains("the port of a node")
                && error.message().contains("give the URL"),
            "{error}"
        );
    }
}
