//! Metrics and traces reach a real OTLP collector over gRPC before `shutdown` returns, whatever the
//! log filter.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, time::Duration};

use opentelemetry::global;
use tokio::time::timeout;
use vasto_observability::{Telemetry, TelemetryConfig};
use vasto_testkit::otlp::Collector;
use vasto_trace::{OperationTrace, Past};

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_and_spans_arrive_at_the_collector() {
    let collector = Collector::start().await.unwrap();
    let telemetry = Telemetry::init(TelemetryConfig {
        role: "node".to_owned(),
        instance: Some("n-7".to_owned()),
        filter: Some("off".to_owned()),
        otlp_endpoint: Some(collector.endpoint().to_owned()),
        ..TelemetryConfig::default()
    })
    .unwrap();
    global::meter("vasto-node").u64_counter("vasto.node.ops").build().add(1, &[]);
    tracing::info_span!(target: "vasto_node::writer", "group_commit").in_scope(|| {});
    tracing::info_span!(target: "somebody_else", "their_span").in_scope(|| {});
    vasto_observability::server_span("node-1").in_scope(|| {});
    let trace = OperationTrace::new("c-1", "op-1-1");
    trace.log_span().in_scope(|| trace.begin("bucket get").done());
    let past = Past {
        name: "operation grow".into(),
        from_us: 1_000_000,
        to_us: 3_000_000,
        attributes: Vec::new(),
        error: Some("cancelled by an administrator".to_owned()),
    };
    trace.end(past, &[OperationTrace::new("c-1", "rebalance-1")]);
    timeout(Duration::from_secs(20), telemetry.shutdown()).await.unwrap();

    let metrics = collector.metrics();
    assert!(metrics.contains("vasto.node.ops"), "{metrics:?}");
    let spans = collector.spans();
    let names: BTreeSet<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    // What names servers and operations in log lines is no part of traces.
    assert_eq!(names, BTreeSet::from(["bucket get", "group_commit", "operation grow"]));
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (part, whole) = (named("bucket get"), named("operation grow"));
    assert_eq!((part.trace_id.clone(), part.instance.as_str()), (trace.trace_id(), "n-7"));
    assert_eq!((&part.parent_id, &part.trace_id), (&whole.span_id, &whole.trace_id));
    assert_eq!((whole.parent_id.as_str(), whole.attributes.len()), ("", 1), "{whole:?}");
    assert_eq!((whole.start_ns, whole.end_ns), (1_000_000_000, 3_000_000_000));
    assert_eq!(whole.error.as_deref(), Some("cancelled by an administrator"));
    assert_eq!(whole.links, [OperationTrace::new("c-1", "rebalance-1").trace_id()]);
}
