//! A collector of metrics and traces by OTLP over gRPC, in the process of the test.
//!
//! **Invariant:** it forgets nothing that it has answered; it ends when it is dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Result;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// The code of a span's status that says that its work has failed.
const FAILED: i32 = 2;

/// A span that has arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectedSpan {
    /// `service.instance.id` of the process that sent it.
    pub instance: String,
    /// Its name.
    pub name: String,
    /// Its trace, hexadecimal.
    pub trace_id: String,
    /// Its own id, hexadecimal.
    pub span_id: String,
    /// Its parent, hexadecimal; empty for a root.
    pub parent_id: String,
    /// Start, nanoseconds since 1970.
    pub start_ns: u64,
    /// End, nanoseconds since 1970.
    pub end_ns: u64,
    /// Its attributes.
    pub attributes: BTreeMap<String, Value>,
    /// Why its work has failed.
    pub error: Option<String>,
    /// The traces that it is linked to, hexadecimal.
    pub links: Vec<String>,
}

impl CollectedSpan {
    /// Returns what an attribute counts; 0 without it.
    pub fn count(&self, key: &str) -> u64 {
        self.attributes.get(key).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Returns the text of an attribute; empty without it.
    pub fn text(&self, key: &str) -> &str {
        self.attributes.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// Returns true when the span has this attribute.
    pub fn has(&self, key: &str) -> bool {
        self.attributes.contains_key(key)
    }
}

#[derive(Debug, Default)]
struct Taken {
    metrics: BTreeSet<String>,
    spans: Vec<CollectedSpan>,
}

#[derive(Clone, Default)]
struct Taker(Arc<Mutex<Taken>>);

/// A running collector.
#[derive(Debug)]
pub struct Collector {
    endpoint: String,
    taken: Arc<Mutex<Taken>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Collector {
    /// Starts a collector on a free port of this machine.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let taker = Taker::default();
        let taken = taker.0.clone();
        let serving = tokio::spawn(
            Server::builder()
                .add_service(MetricsServiceServer::new(taker.clone()))
                .add_service(TraceServiceServer::new(taker))
                .serve_with_incoming(TcpIncoming::from(listener)),
        );
        Ok(Self { endpoint, taken, serving })
    }

    /// Returns its address, as `OTEL_EXPORTER_OTLP_ENDPOINT` names it.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Returns the names of the metrics that have arrived.
    pub fn metrics(&self) -> BTreeSet<String> {
        self.taken.lock().metrics.clone()
    }

    /// Returns the spans that have arrived, in the order of their arrival.
    pub fn spans(&self) -> Vec<CollectedSpan> {
        self.taken.lock().spans.clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[tonic::async_trait]
impl MetricsService for Taker {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let scopes = request.into_inner().resource_metrics;
        let scopes = scopes.into_iter().flat_map(|resource| resource.scope_metrics);
        let names = scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name);
        self.0.lock().metrics.extend(names);
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl TraceService for Taker {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|one| attributes(one.attributes));
            let instance = attributes
                .as_ref()
                .and_then(|all| all.get("service.instance.id")?.as_str())
                .unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().spans.extend(spans.map(|span| collected(instance, span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn collected(instance: &str, span: Span) -> CollectedSpan {
    CollectedSpan {
        instance: instance.to_owned(),
        name: span.name,
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent_id: hex(&span.parent_span_id),
        start_ns: span.start_time_unix_nano,
        end_ns: span.end_time_unix_nano,
        attributes: attributes(span.attributes),
        error: span.status.filter(|status| status.code == FAILED).map(|status| status.message),
        links: span.links.iter().map(|link| hex(&link.trace_id)).collect(),
    }
}

/// Returns the attributes; those that are no plain values are left out.
fn attributes(all: Vec<KeyValue>) -> BTreeMap<String, Value> {
    let plain = |one: KeyValue| {
        let value: Value = match one.value?.value? {
            Any::StringValue(text) => text.into(),
            Any::BoolValue(value) => value.into(),
            Any::IntValue(value) => value.into(),
            Any::DoubleValue(value) => value.into(),
            _ => return None,
        };
        Some((one.key, value))
    };
    all.into_iter().filter_map(plain).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
