//! Logs, metrics and traces of a Vasto process, and the small HTTP server that shows them.
//!
//! Owns: the one-time set-up of `tracing` and OpenTelemetry ([`Telemetry`]), the admin endpoints
//! `/healthz`, `/readyz` and `/metrics` ([`AdminServer`]), and the flag behind `/readyz`
//! ([`Readiness`]).
//!
//! Invariant: logs go to stderr and nothing else does the writing there; stdout belongs to the
//! commands (a server prints exactly one line on it). Whoever logs never waits for who reads.
//!
//! Leaves to others: the instruments themselves. Each crate makes its own through
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

/// The registry that `/metrics` is gathered from; re-exported so that callers need no edge of
/// their own to the `prometheus` crate.
pub use prometheus::Registry;
