//! The transport settings of every connection of the client.

use tonic::transport::{Endpoint, Error};
use vasto_core::limits::{CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};

use crate::tuning::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};

/// Returns a URL with the settings of every connection.
pub(crate) fn endpoint(url: String) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(url)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// Returns the innermost cause: "Connection refused" rather than "transport error".
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
