//! The admin HTTP server: `/healthz`, `/readyz` and `/metrics` for probes and for Prometheus.
//!
//! Invariant: the server holds no state of its own and changes nothing, so it may be queried at any
//! time, also while the process starts and while it stops. The server has no authentication; the
//! address it is bound to decides which clients can reach it.

use std::{io, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::Readiness;

/// Time that open connections may continue after the stop. A scrape takes milliseconds; a client
/// that never finishes its request must not hold up the process, which promises to end within 10 s.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// Why the admin server could not start.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Another process uses the port.
    #[error(
        "the admin address {listen} is in use by another process; \
         stop that process, or choose another port with --admin-listen (port 0 picks a free one)"
    )]
    InUse {
        /// The requested address.
        listen: SocketAddr,
    },
    /// The operating system reported another error.
    #[error(
        "cannot listen on the admin address {listen}: {source}; \
         check that this machine has the address and that you may use the port, \
         or choose another with --admin-listen"
    )]
    Bind {
        /// The requested address.
        listen: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// A running admin server. It stops when the token passed to [`AdminServer::start`] is cancelled.
#[derive(Debug)]
pub struct AdminServer {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Sources {
    registry: Registry,
    readiness: Readiness,
}

impl AdminServer {
    /// Binds `listen` (port 0 picks a free port) and serves until `stop` is cancelled.
    ///
    /// # Errors
    /// [`AdminError`] when the address cannot be bound.
    pub async fn start(
        listen: SocketAddr,
        registry: Registry,
        readiness: Readiness,
        stop: CancellationToken,
    ) -> Result<AdminServer, AdminError> {
        let refused = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => AdminError::InUse { listen },
            _ => AdminError::Bind { listen, source },
        };
        let listener = TcpListener::bind(listen).await.map_err(refused)?;
        let addr = listener.local_addr().map_err(refused)?;
        let router = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(Sources { registry, readiness });
        let task = tokio::spawn(serve(listener, router, stop));
        Ok(AdminServer { addr, task })
    }

    /// Returns the bound address, with the real port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until the server has stopped, at most a second after the token was cancelled.
    pub async fn join(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the admin server ended abnormally");
        }
    }
}

async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let graceful = stop.clone().cancelled_owned();
    let server = axum::serve(listener, router).with_graceful_shutdown(graceful);
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_DEADLINE).await;
    };
    tokio::select! {
        result = server => {
            if let Err(error) = result {
                tracing::error!(%error, "the admin server failed; /healthz and /metrics are gone");
            }
        }
        () = overdue => {
            tracing::debug!("admin connections were still open at the deadline and are dropped");
        }
    }
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(sources): State<Sources>) -> Response {
    match sources.readiness.reason() {
        None => "ready\n".into_response(),
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
        }
    }
}

async fn metrics(State(sources): State<Sources>) -> Response {
    // Gathering runs the callbacks of observable instruments; a callback that waits for a lock must
    // not block a thread that serves requests.
    let gathered = tokio::task::spawn_blocking(move || encode(&sources.registry)).await;
    match gathered {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => {
            tracing::error!(%error, "the metrics could not be written as text");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "a callback of a metric panicked");
            (StatusCode::INTERNAL_SERVER_ERROR, "a callback of a metric panicked\n").into_response()
        }
    }
}

fn encode(registry: &Registry) -> prometheus::Result<Vec<u8>> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}
