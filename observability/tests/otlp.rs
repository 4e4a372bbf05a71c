//! Metrics and traces reach a real OTLP collector over gRPC before `shutdown` returns.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use opentelemetry::global;
use opentelemetry_proto::tonic::collector::{
    metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
};
use tokio::{net::TcpListener, time::timeout};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};
use vasto_observability::{Telemetry, TelemetryConfig};

/// Records the names that arrived.
#[derive(Clone, Default)]
struct Collector {
    names: Arc<std::sync::Mutex<BTreeSet<String>>>,
}

impl Collector {
    fn saw(&self, name: String) {
        self.names.lock().unwrap().insert(name);
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for resource in request.into_inner().resource_metrics {
            for metric in resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics) {
                self.saw(metric.name);
            }
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.saw(span.name);
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_and_a_span_arrive_at_the_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let collector = Collector::default();
    let serving = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(MetricsServiceServer::new(collector.clone()))
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpIncoming::from(listener)),
    );

    let telemetry = Telemetry::init(TelemetryConfig {
        role: "node".to_owned(),
        otlp_endpoint: Some(format!("http://{addr}")),
        ..TelemetryConfig::default()
    })
    .unwrap();
    global::meter("vasto-node").u64_counter("vasto.node.ops").build().add(1, &[]);
    tracing::info_span!(target: "vasto_node::writer", "group_commit").in_scope(|| {});
    tracing::info_span!(target: "somebody_else", "their_span").in_scope(|| {});
    vasto_observability::server_span("node-1").in_scope(|| {});
    timeout(Duration::from_secs(20), telemetry.shutdown()).await.unwrap();

    let names = collector.names.lock().unwrap().clone();
    assert!(names.contains("vasto.node.ops"), "{names:?}");
    assert!(names.contains("group_commit"), "{names:?}");
    assert!(!names.contains("their_span"), "{names:?}");
    assert!(!names.contains("server"), "what names a server in log lines is no trace: {names:?}");
    serving.abort();
}
