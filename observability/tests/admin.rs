//! The admin server as seen by a probe and a scraper, over TCP.
#![allow(clippy::unwrap_used)]

use std::{net::SocketAddr, time::Duration};

use opentelemetry::{KeyValue, global};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use vasto_observability::{
    AdminError, AdminServer, Readiness, Registry, Telemetry, TelemetryConfig, TelemetryError,
};

const DEADLINE: Duration = Duration::from_secs(10);

/// Returns the status line with the headers, and the body.
async fn get(addr: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_three_endpoints_answer_and_a_counter_shows() {
    let telemetry =
        Telemetry::init(TelemetryConfig { role: "node".to_owned(), ..TelemetryConfig::default() })
            .unwrap();
    let again = Telemetry::init(TelemetryConfig::default());
    assert!(matches!(again, Err(TelemetryError::AlreadyInitialised)));

    let readiness = Readiness::new();
    let stop = CancellationToken::new();
    let server =
        AdminServer::start(any_port(), telemetry.registry(), readiness.clone(), stop.clone())
            .await
            .unwrap();

    let (head, body) = get(server.addr(), "/healthz").await;
    assert!(head.starts_with("HTTP/1.1 200") && body == "ok\n", "{head} {body}");

    readiness.set_not_ready("waiting for the master");
    let (head, body) = get(server.addr(), "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    assert_eq!(body, "not ready: waiting for the master\n");
    readiness.set_ready();
    let (head, body) = get(server.addr(), "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 200") && body == "ready\n", "{head} {body}");

    // Two roles of one process share an instrument; an attribute distinguishes them.
    let counter = global::meter("vasto-node").u64_counter("vasto.node.ops").build();
    counter.add(3, &[KeyValue::new("node_id", "n-1")]);
    counter.add(4, &[KeyValue::new("node_id", "n-2")]);
    let (head, body) = get(server.addr(), "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("vasto_node_ops_total{node_id=\"n-1\"} 3\n"), "{body}");
    assert!(body.contains("vasto_node_ops_total{node_id=\"n-2\"} 4\n"), "{body}");
    assert!(body.contains("target_info{") && body.contains("vasto-node"), "{body}");

    let (head, _) = get(server.addr(), "/nothing").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");

    stop.cancel();
    timeout(DEADLINE, server.join()).await.unwrap();
    timeout(DEADLINE, telemetry.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_a_typed_error_that_says_what_to_do() {
    let taken = TcpListener::bind(any_port()).await.unwrap();
    let addr = taken.local_addr().unwrap();
    let error =
        AdminServer::start(addr, Registry::new(), Readiness::new(), CancellationToken::new())
            .await
            .unwrap_err();
    assert!(matches!(error, AdminError::InUse { listen } if listen == addr), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&addr.to_string()) && text.contains("--admin-listen"), "{text}");
}

#[tokio::test]
async fn a_client_that_never_finishes_its_request_does_not_hold_up_the_stop() {
    let stop = CancellationToken::new();
    let server = AdminServer::start(any_port(), Registry::new(), Readiness::new(), stop.clone())
        .await
        .unwrap();
    let mut slow = TcpStream::connect(server.addr()).await.unwrap();
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost:").await.unwrap();
    // A complete request afterwards shows that the accept loop has accepted the slow connection.
    get(server.addr(), "/healthz").await;
    stop.cancel();
    timeout(DEADLINE, server.join()).await.unwrap();
}
