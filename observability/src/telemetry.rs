//! One-time set-up of logs, metrics and traces for the process.
//!
//! Logs: `tracing` events to stderr, as text on a terminal and JSON otherwise. Metrics: one
//! OpenTelemetry meter provider, always readable through the Prometheus registry, and pushed over
//! OTLP as well when an endpoint is given. Traces: only over OTLP.
//!
//! Invariant: `init` works once per process, because the subscriber and the providers are
//! process-wide; attributes distinguish the roles of one process.

use std::{
    io::IsTerminal,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry::{KeyValue, global, metrics::Meter, trace::TracerProvider as _};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource, metrics::SdkMeterProvider, propagation::TraceContextPropagator,
    trace::SdkTracerProvider,
};
use prometheus::Registry;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{self, FilterExt},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{LogFormat, delivery::CountedExporter, log_writer::LogWriter};

/// The log filter when none is set.
const DEFAULT_FILTER: &str = "info";

/// Time that the last export may take at shutdown. A collector that is down must not keep the
/// process from stopping within its 10 s.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// Time that the last log lines may take at shutdown, when stderr is read slowly.
const LOG_DEADLINE: Duration = Duration::from_millis(500);

/// The target of [`server_span`].
const SERVER_TARGET: &str = "server";

/// The targets of spans that name something in log lines, whatever the log filter.
const NAMES: [&str; 2] = [SERVER_TARGET, vasto_trace::LOG_TARGET];

/// Creates a span that names one of several servers of a process in every line that is logged
/// inside it, whatever the log filter. The span is not part of traces.
pub fn server_span(name: &str) -> tracing::Span {
    tracing::error_span!(target: SERVER_TARGET, "server", node = name)
}

static INITIALISED: AtomicBool = AtomicBool::new(false);

/// The settings of [`Telemetry::init`].
#[derive(Debug, Clone, Default)]
pub struct TelemetryConfig {
    /// `master`, `node`, `dev`, ...: becomes the service name `vasto-<role>`, unless
    /// `OTEL_SERVICE_NAME` is set.
    pub role: String,
    /// The `service.instance.id`: the node id or the address; `<role>-<pid>` when absent.
    pub instance: Option<String>,
    /// A `tracing` filter such as `info,vasto_node=debug`. When absent, the environment
    /// variables `VASTO_LOG`, then `RUST_LOG`, then `info`.
    pub filter: Option<String>,
    /// The form of log lines.
    pub format: LogFormat,
    /// Endpoint for metrics and traces by OTLP over gRPC, such as `http://127.0.0.1:4317`. When
    /// absent, `OTEL_EXPORTER_OTLP_ENDPOINT`; when that is not set either, nothing is exported.
    pub otlp_endpoint: Option<String>,
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Telemetry was set up before, here or by a foreign subscriber.
    #[error("telemetry is set up already; a process does it once, before its first server starts")]
    AlreadyInitialised,
    /// The filter does not parse.
    #[error(
        "the log filter {filter:?} is not valid: {reason}; \
         write for example `info` or `info,vasto_node=debug`"
    )]
    Filter {
        /// The filter as given.
        filter: String,
        /// Error of the parser.
        reason: String,
    },
    /// The OTLP exporter refused its settings.
    #[error(
        "cannot export telemetry to {endpoint}: {reason}; \
         correct OTEL_EXPORTER_OTLP_ENDPOINT (for example http://127.0.0.1:4317) or unset it"
    )]
    Otlp {
        /// The endpoint as given.
        endpoint: String,
        /// Error of the exporter.
        reason: String,
    },
    /// An endpoint with TLS, which this build does not support for collectors.
    #[error(
        "cannot export telemetry to {endpoint}: export with TLS is not supported; \
         set OTEL_EXPORTER_OTLP_ENDPOINT to the http:// address of a collector on this machine, \
         which can forward with TLS"
    )]
    OtlpTls {
        /// The endpoint as given.
        endpoint: String,
    },
    /// OTLP needs the runtime that drives its connection.
    #[error("OTLP export needs a Tokio runtime; set up telemetry from inside of it")]
    NoRuntime,
    /// The Prometheus reader could not be registered.
    #[error("cannot set up the Prometheus registry: {reason}; please report this as a bug")]
    Registry {
        /// Error of the exporter.
        reason: String,
    },
}

/// The telemetry of this process. Keep it until the end and then call [`Telemetry::shutdown`].
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Installs the log subscriber and the OpenTelemetry providers of the process.
    ///
    /// # Errors
    /// [`TelemetryError`]; nothing is installed in that case, except when another subscriber was
    /// installed before.
    pub fn init(config: TelemetryConfig) -> Result<Telemetry, TelemetryError> {
        let filter = parse_filter(config.filter.as_deref())?;
        let endpoint = config.otlp_endpoint.clone().or_else(endpoint_from_environment);
        if let Some(endpoint) = &endpoint {
            if endpoint.starts_with("https:") {
                return Err(TelemetryError::OtlpTls { endpoint: endpoint.clone() });
            }
            if tokio::runtime::Handle::try_current().is_err() {
                return Err(TelemetryError::NoRuntime);
            }
        }
        let resource = resource(&config.role, config.instance.as_deref());
        let registry = Registry::new();
        let meters = meter_provider(&registry, resource.clone(), endpoint.as_deref())?;
        let tracers = match &endpoint {
            Some(endpoint) => Some(tracer_provider(resource, endpoint)?),
            None => None,
        };
        if INITIALISED.swap(true, Ordering::SeqCst) {
            return Err(TelemetryError::AlreadyInitialised);
        }

        // Before the subscriber: each provider logs an event when it is set.
        global::set_meter_provider(meters.clone());
        if let Some(tracers) = &tracers {
            global::set_text_map_propagator(TraceContextPropagator::new());
            global::set_tracer_provider(tracers.clone());
            vasto_trace::enable();
        }
        // The exporter's own connection would trace itself endlessly, so only Vasto's spans are
        // exported.
        let spans = tracers.as_ref().map(|tracers| {
            tracing_opentelemetry::layer()
                .with_tracer(tracers.tracer("vasto"))
                .with_filter(filter::filter_fn(|metadata| metadata.target().starts_with("vasto")))
        });
        let log = LogWriter::stderr();
        let names = filter::filter_fn(|metadata| NAMES.contains(&metadata.target()));
        tracing_subscriber::registry()
            .with(stderr_layer(config.format, log.clone()).with_filter(filter.or(names)))
            .with(spans)
            .try_init()
            .map_err(|_| TelemetryError::AlreadyInitialised)?;
        count_dropped(&log);
        let panicked = log.clone();
        // The default hook writes to stderr directly, and may block there for ever.
        std::panic::set_hook(Box::new(move |panic| {
            let backtrace = std::backtrace::Backtrace::capture();
            let backtrace = match backtrace.status() {
                std::backtrace::BacktraceStatus::Captured => format!("{backtrace}\n"),
                _ => String::new(),
            };
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("<unnamed>");
            panicked.line(format!("thread '{name}' {panic}\n{backtrace}").as_bytes());
        }));
        Ok(Telemetry { registry, meters, tracers })
    }

    /// Checks a `tracing` filter without setting anything up.
    ///
    /// # Errors
    /// [`TelemetryError::Filter`] with the problem.
    pub fn check_filter(filter: &str) -> Result<(), TelemetryError> {
        parse_filter(Some(filter)).map(|_| ())
    }

    /// Returns the registry for [`crate::AdminServer::start`].
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// Returns a meter of this process; the same as `opentelemetry::global::meter(name)`.
    pub fn meter(&self, name: &'static str) -> Meter {
        global::meter(name)
    }

    /// Sends buffered telemetry and ends the exporters, within about two seconds. A collector that
    /// cannot be reached is logged and is not an error: the work is done by now.
    pub async fn shutdown(self) {
        let Telemetry { meters, tracers, .. } = self;
        let ended = tokio::task::spawn_blocking(move || {
            let traces = tracers.map(|tracers| tracers.shutdown_with_timeout(SHUTDOWN_DEADLINE));
            let metrics = meters.shutdown_with_timeout(SHUTDOWN_DEADLINE);
            for error in traces.into_iter().chain([metrics]).filter_map(Result::err) {
                tracing::info!(%error, "the last telemetry was not delivered");
            }
        });
        if tokio::time::timeout(2 * SHUTDOWN_DEADLINE, ended).await.is_err() {
            tracing::info!("the last telemetry was not delivered in time");
        }
        // Stderr may have no reader.
        let _ = tokio::task::spawn_blocking(|| LogWriter::stderr().flush(LOG_DEADLINE)).await;
    }
}

fn count_dropped(log: &LogWriter) {
    let log = log.clone();
    global::meter("vasto-observability")
        .u64_observable_counter("vasto.log.dropped")
        .with_description("Log lines that were dropped because nobody read stderr.")
        .with_callback(move |observer| observer.observe(log.dropped(), &[]))
        .build();
}

fn stderr_layer<S>(format: LogFormat, log: LogWriter) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let terminal = std::io::stderr().is_terminal();
    let layer = tracing_subscriber::fmt::layer().with_writer(log);
    if format.is_json(terminal) {
        layer.json().flatten_event(true).with_current_span(false).with_span_list(true).boxed()
    } else {
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        layer.with_ansi(colour).boxed()
    }
}

fn parse_filter(given: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    let from_environment = || ["VASTO_LOG", "RUST_LOG"].into_iter().find_map(non_empty_variable);
    let filter = given
        .map(str::to_owned)
        .or_else(from_environment)
        .unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    EnvFilter::try_new(&filter)
        .map_err(|error| TelemetryError::Filter { filter, reason: error.to_string() })
}

fn endpoint_from_environment() -> Option<String> {
    non_empty_variable("OTEL_EXPORTER_OTLP_ENDPOINT")
}

fn non_empty_variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// Builds the resource; the builder has read `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME`,
/// which win.
fn resource(role: &str, instance: Option<&str>) -> Resource {
    let instance = match instance {
        Some(instance) => instance.to_owned(),
        None => format!("{role}-{}", std::process::id()),
    };
    let builder = Resource::builder().with_attributes([
        KeyValue::new("service.instance.id", instance),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
    ]);
    match non_empty_variable("OTEL_SERVICE_NAME") {
        Some(_) => builder.build(),
        None => builder.with_service_name(format!("vasto-{role}")).build(),
    }
}

fn meter_provider(
    registry: &Registry,
    resource: Resource,
    otlp: Option<&str>,
) -> Result<SdkMeterProvider, TelemetryError> {
    // The scope would add a label to every series that repeats its name.
    let reader = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .scope_info_enabled(false)
        .build()
        .map_err(|error| TelemetryError::Registry { reason: error.to_string() })?;
    let mut builder = SdkMeterProvider::builder().with_resource(resource).with_reader(reader);
    if let Some(endpoint) = otlp {
        let exporter = opentelemetry_otlp::MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| otlp_error(endpoint, error))?;
        builder =
            builder.with_periodic_exporter(CountedExporter::new(exporter, "metrics", endpoint));
    }
    Ok(builder.build())
}

fn tracer_provider(
    resource: Resource,
    endpoint: &str,
) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| otlp_error(endpoint, error))?;
    Ok(SdkTracerProvider::builder()
        .with_resource(resource)
        .with_batch_exporter(CountedExporter::new(exporter, "traces", endpoint))
        .build())
}

fn otlp_error(endpoint: &str, error: impl std::fmt::Display) -> TelemetryError {
    TelemetryError::Otlp { endpoint: endpoint.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_bad_filter_is_named_and_says_what_to_write() {
        let error = parse_filter(Some("vasto_node=loud")).unwrap_err().to_string();
        assert!(error.contains("vasto_node=loud") && error.contains("info,vasto_node=debug"));
        parse_filter(Some("info,vasto_node=debug")).unwrap();
    }

    #[test]
    fn otlp_outside_a_runtime_is_refused() {
        let config = TelemetryConfig {
            role: "node".to_owned(),
            otlp_endpoint: Some("http://127.0.0.1:4317".to_owned()),
            ..TelemetryConfig::default()
        };
        assert!(matches!(Telemetry::init(config), Err(TelemetryError::NoRuntime)));
    }

    #[test]
    fn an_endpoint_with_tls_is_refused_with_the_way_out() {
        let config = TelemetryConfig {
            otlp_endpoint: Some("https://collector:4317".to_owned()),
            ..TelemetryConfig::default()
        };
        let error = Telemetry::init(config).unwrap_err().to_string();
        assert!(error.contains("https://collector:4317") && error.contains("http://"), "{error}");
    }

    #[tokio::test]
    async fn a_bad_endpoint_is_named() {
        let error = tracer_provider(resource("node", None), "not a url").unwrap_err().to_string();
        assert!(error.contains("not a url") && error.contains("OTEL_EXPORTER_OTLP_ENDPOINT"));
    }

    #[test]
    fn the_resource_names_role_and_instance() {
        let resource = resource("node", Some("n-1"));
        assert_eq!(resource.get(&"service.name".into()).unwrap().to_string(), "vasto-node");
        assert_eq!(resource.get(&"service.instance.id".into()).unwrap().to_string(), "n-1");
    }
}
