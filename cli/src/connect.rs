//! The connection from `--master` to the cluster, and the mapping of client library errors to
//! messages and exit codes: 2 when the request itself is wrong, 1 for everything else.

use vasto_client::{Ack, Error, ErrorKind, Keyspace, Vasto};

use crate::{args, output::Failure};

/// Connects to the master.
///
/// # Errors
/// [`Failure`] when the URL is invalid, or no server answers there.
pub(crate) async fn connect(to: &args::Connect) -> Result<Vasto, Failure> {
    Vasto::connect(&to.master).await.map_err(failure)
}

/// Opens a handle on a keyspace.
///
/// # Errors
/// [`Failure`], also when the keyspace does not exist.
pub(crate) async fn keyspace(to: &args::Connect, name: &str) -> Result<Keyspace, Failure> {
    connect(to).await?.keyspace(name).await.map_err(failure)
}

/// Converts an error of the client library to a failure: with the advice in its message, or with
/// that of its kind.
pub(crate) fn failure(error: Error) -> Failure {
    let failure = Failure::with_advice(error.message());
    match error.kind() {
        ErrorKind::InvalidArgument => failure.into_usage(),
        ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::Overloaded => {
            failure.or_hint("try again; `vasto cluster status` shows which servers are away")
        }
        ErrorKind::Unknown => failure.or_hint("it may have been done: look before trying again"),
        ErrorKind::Corrupt => {
            failure.or_hint("the log of the node says more; do not delete its directory")
        }
        ErrorKind::Internal => failure.or_hint("this is a defect in Vasto: please report it"),
        _ => failure,
    }
}

/// Converts to the acknowledgement level of the client library.
pub(crate) fn ack(ack: args::Ack) -> Ack {
    match ack {
        args::Ack::Os => Ack::Os,
        args::Ack::Fsync => Ack::Fsync,
        args::Ack::Replica => Ack::Replica,
        args::Ack::Bucket => Ack::Bucket,
    }
}
