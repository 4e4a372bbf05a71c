//! Logs, metrics and traces of a Vasto process, and the small HTTP server that exposes them.
//!
//! Owns: the one-time set-up of `tracing` and OpenTelemetry ([`Telemetry`]), the admin endpoints
//! `/healthz`, `/readyz` and `/metrics` ([`AdminServer`]), and the flag behind `/readyz`
//! ([`Readiness`]).
//!
//! Invariant: logs go to stderr, and only logs do; stdout belongs to the commands (a server prints
//! exactly one line on it). A thread that logs never waits for the reader of stderr.
//!
//! Not here: the instruments. Each crate creates its own through
//! `opentelemetry::global::meter("vasto-node")` and gives its measurements attributes such as
//! `node_id`, because `vasto dev` runs several roles in one process over one registry.

mod admin;
mod delivery;
mod log_format;
mod log_writer;
mod readiness;
mod telemetry;

pub use admin::{AdminError, AdminServer};
pub use log_format::{LogFormat, UnknownLogFormat};
pub use log_writer::flush_logs;
pub use readiness::Readiness;
pub use telemetry::{Telemetry, TelemetryConfig, TelemetryError, server_span};

/// The registry that `/metrics` is gathered from; re-exported so that callers need no dependency on
/// the `prometheus` crate.
pub use prometheus::Registry;
