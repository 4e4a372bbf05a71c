//! Calls to the master: requests, answers, errors.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::Cluster;
use tonic::Status;
use vasto_client::{Ack, ErrorKind, KeyspaceSpec, OperationState};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_proto::convert::status_of;

fn refused(code: ErrorCode, message: &str) -> Result<&'static str, Status> {
    Err(status_of(&VastoError::new(code, message)))
}

#[tokio::test]
async fn documents_of_the_master_are_handed_on() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    for call in ["list_keyspaces", "describe_keyspace", "delete_keyspace", "checkpoint_keyspace", "compact_keyspace"] {
        cluster.answer(call, Ok(call));
    }
    for call in ["list_nodes", "cluster_status", "list_operations"] {
        cluster.answer(call, Ok(call));
    }
    assert_eq!(vasto.list_keyspaces().await.unwrap(), "list_keyspaces");
    assert_eq!(vasto.describe_keyspace("ks1").await.unwrap(), "describe_keyspace");
    assert_eq!(vasto.delete_keyspace("ks1").await.unwrap(), "delete_keyspace");
    assert_eq!(vasto.checkpoint_keyspace("ks1").await.unwrap(), "checkpoint_keyspace");
    assert_eq!(vasto.compact_keyspace("ks1").await.unwrap(), "compact_keyspace");
    assert_eq!(vasto.list_nodes().await.unwrap(), "list_nodes");
    assert_eq!(vasto.cluster_status().await.unwrap(), "cluster_status");
    assert_eq!(vasto.list_operations().await.unwrap(), "list_operations");
}

#[tokio::test]
async fn a_keyspace_is_created_as_asked() {
    let cluster = Cluster::start(0).await;
    let vasto = cluster.vasto().await;
    let spec = KeyspaceSpec::default().shards(3).replicas(2).ack(Ack::Os).ttl(Duration::from_secs(30));
    vasto.create_keyspace("ks1", spec).await.unwrap();
    let sent = cluster.state.lock().calls.pop().unwrap();
    for part in ["\"ks1\"", "shards: 3", "replicas: 2", "ack: Os", "ttl_ms: Some(30000)", "quarantine_ms: None"] {
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
    let error = vasto.create_keyspace("ks2", KeyspaceSpec::default().shards(4097)).await.unwrap_err();
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
    assert!(done.json.contains("\"keys_moved\":7"));
    cluster.answer("resize_keyspace", Ok(r#"{"id":"op-1-2","state":"running"}"#));
    cluster.answer("show_operation", Ok(r#"{"id":"op-1-2","state":"aborted","reason":"cancelled by a user"}"#));
    let error = vasto.resize_keyspace("ks1", 5).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.message().contains("cancelled by a user"), "{error}");
    cluster.answer("resize_keyspace", Ok(r#"{"moving_fraction":0.2}"#));
    assert!(vasto.plan_resize("ks1", 5).await.unwrap().contains("moving_fraction"));
    assert!(cluster.state.lock().calls.last().unwrap().contains("plan_only: true"));
    assert_eq!(vasto.plan_resize("ks1", 65).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
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
        assert!(error.message().contains("the port of a node") && error.message().contains("give the URL"), "{error}");
    }
}
