//! The connection to the master: calls that are answered with a document, and their errors.
//!
//! **Invariant:** a call that may have changed something and was not answered, or whose answer
//! cannot be read, is [`ErrorKind::Unknown`]. An error that the master answered keeps its kind.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};
use vasto_core::limits::{ADMIN_DEADLINE, CONNECT_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_core::topology::Topology;
use vasto_proto::convert::{error_of, topology_from_wire};
use vasto_proto::{CODE_HEADER, v1};

use crate::answer::Answer;
use crate::error::{Error, ErrorKind, closed};
use crate::transport::{deepest, endpoint};

mod url;

use url::bad_url;
pub(crate) use url::check_url;

pub(crate) type MasterClient = v1::master_client::MasterClient<Channel>;

/// The longest wait for a command that nodes execute, or that reads the whole bucket.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3600);

/// The kind of a call: how long its answer may take, and what a lost answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// Asks the master; changes nothing.
    Ask,
    /// Has the whole bucket read; changes nothing.
    AskLong,
    /// Changes something.
    Change,
    /// Changes something that nodes execute, or that depends on the whole bucket.
    ChangeLong,
}

impl Call {
    fn changes(self) -> bool {
        matches!(self, Call::Change | Call::ChangeLong)
    }

    fn deadline(self) -> Duration {
        match self {
            Call::Ask => ADMIN_DEADLINE,
            // Slightly longer than the master itself waits, so that its own answer arrives.
            Call::Change => ADMIN_DEADLINE + CONNECT_TIMEOUT,
            Call::AskLong | Call::ChangeLong => COMMAND_DEADLINE,
        }
    }
}

/// The connection to the master. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Master {
    url: Arc<str>,
    client: MasterClient,
    /// Cancelled when the client is closed.
    closed: CancellationToken,
}

impl Master {
    /// Connects to the master at a URL.
    pub(crate) async fn connect(url: &str, closed: CancellationToken) -> Result<Self, Error> {
        let url = check_url(url)?;
        let unreachable = |why: String| {
            let message = format!(
                "no master answers at {url}: {why}; start one with `vasto serve master --bucket URL`, or a whole \
                 cluster with `vasto dev`"
            );
            Error::new(ErrorKind::Unavailable, message)
        };
        let endpoint = endpoint(url.clone()).map_err(|error| bad_url(&url, &deepest(&error)))?;
        let channel = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect())
            .await
            .map_err(|_| unreachable(format!("no answer within {CONNECT_TIMEOUT:?}")))?
            .map_err(|error| unreachable(deepest(&error)))?;
        let client = MasterClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { url: url.into(), client, closed })
    }

    /// Returns the URL, normalized.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Opens the stream of a keyspace's topologies and reads the first.
    pub(crate) async fn watch(
        &self,
        keyspace: &str,
    ) -> Result<(Topology, Streaming<v1::Topology>), Error> {
        let failed = |status: Status| error_of_status(&status, false);
        let opening = async {
            let request = v1::WatchRequest { keyspace: keyspace.to_owned() };
            let mut stream = self.client.clone().watch(request).await.map_err(failed)?.into_inner();
            match stream.message().await.map_err(failed)? {
                Some(first) => Ok((topology_from_wire(&first), stream)),
                None => {
                    Err(Error::new(ErrorKind::Unavailable, "the master is stopping; try again"))
                }
            }
        };
        tokio::time::timeout(CONNECT_TIMEOUT, opening).await.unwrap_or_else(|_| {
            let message = format!(
                "the master did not send the topology of `{keyspace}` within {CONNECT_TIMEOUT:?}"
            );
            Err(Error::new(ErrorKind::Unavailable, message))
        })
    }

    /// Makes a call and reads the document that answers it.
    pub(crate) async fn call<T, F>(
        &self,
        kind: Call,
        call: impl FnOnce(MasterClient) -> F,
    ) -> Result<Answer<T>, Error>
    where
        T: DeserializeOwned,
        F: Future<Output = Result<Response<v1::JsonReply>, Status>>,
    {
        let (time, changes) = (kind.deadline(), kind.changes());
        if self.closed.is_cancelled() {
            return Err(closed());
        }
        let answer = tokio::time::timeout(time, call(self.client.clone()));
        match self.closed.run_until_cancelled(answer).await {
            None if changes => {
                let message =
                    "this client was closed before the master answered; it may have been done";
                Err(Error::new(ErrorKind::Unknown, message))
            }
            None => Err(closed()),
            Some(Ok(Ok(reply))) => Answer::read(reply.into_inner().json, changes),
            Some(Ok(Err(status))) => Err(error_of_status(&status, changes)),
            Some(Err(_elapsed)) if changes => {
                let message = format!(
                    "the master did not answer within {time:?}; it may still do it: look before \
                     trying again"
                );
                Err(Error::new(ErrorKind::Unknown, message))
            }
            Some(Err(_elapsed)) => {
                let message = format!("the master at {} did not answer within {time:?}", self.url);
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }
}

/// Returns the error of a call to the master. Without the master's own code a call that `changes`
/// something may have been carried out, unless the connection could not even be made.
fn error_of_status(status: &Status, changes: bool) -> Error {
    let answered = status.metadata().get(CODE_HEADER).is_some();
    if answered {
        return error_of(status).into();
    }
    if status.code() == Code::Unimplemented {
        let message = "what answers there is no master that knows this call (the port of a node, another program, or a \
                       master of another version); give the URL that `vasto serve master` or `vasto dev` printed";
        return Error::new(ErrorKind::InvalidArgument, message);
    }
    let cause = match std::error::Error::source(status) {
        Some(source) => deepest(source),
        None if status.message().is_empty() => {
            format!("it answered `{}` and nothing else", status.code())
        }
        None => status.message().to_owned(),
    };
    if changes && !never_sent(status) {
        let message = format!(
            "the master went away ({cause}); it may have been done: look before trying again"
        );
        return Error::new(ErrorKind::Unknown, message);
    }
    let kind = match Error::from(error_of(status)).kind() {
        // A read changes nothing: it can be tried again, whatever the error.
        ErrorKind::Unknown => ErrorKind::Unavailable,
        kind => kind,
    };
    Error::new(kind, format!("the master could not be asked: {cause}"))
}

/// Returns true when the connection could not be made.
fn never_sent(status: &Status) -> bool {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_unanswered_change_is_unknown_and_an_unanswered_question_is_not() {
        let lost = Status::unavailable("broken pipe");
        assert_eq!(error_of_status(&lost, true).kind(), ErrorKind::Unknown);
        assert_eq!(error_of_status(&lost, false).kind(), ErrorKind::Unavailable);
        assert_eq!(error_of_status(&Status::unknown("?"), false).kind(), ErrorKind::Unavailable);
        let empty = error_of_status(&Status::internal(""), false);
        assert!(empty.message().contains("answered `"), "{empty}");
        let answered =
            vasto_core::VastoError::new(vasto_core::ErrorCode::NotFound, "no such keyspace");
        assert_eq!(
            error_of_status(&vasto_proto::convert::status_of(&answered), true).kind(),
            ErrorKind::NotFound
        );
    }
}
