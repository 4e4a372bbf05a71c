//! The connection to a cluster: keyspaces, and the administrative calls to the master.
//!
//! **Invariant:** only this module needs the master. A call that may have changed something and was
//! not answered is [`ErrorKind::Unknown`].

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::DropGuard;
use tonic::transport::{Channel, Uri};
use tonic::{Code, Response, Status};
use vasto_core::band::check_shard_count;
use vasto_core::limits::{ADMIN_DEADLINE, CONNECT_TIMEOUT, MESSAGE_BYTES_MAX, OPERATION_DEADLINE, check_keyspace_name};
use vasto_proto::convert::{ack_to_wire, error_of};
use vasto_proto::{CODE_HEADER, v1};

use crate::connection::{deepest, endpoint};
use crate::error::{Error, ErrorKind, closed};
use crate::execute::Executor;
use crate::keyspace::Keyspace;
use crate::node::{Pool, Tasks};
use crate::operation::{Operation, OperationState};
use crate::route::Routing;
use crate::spec::KeyspaceSpec;
use crate::tuning::OPERATION_POLL;
use crate::watch;

pub(crate) type MasterClient = v1::master_client::MasterClient<Channel>;

/// The longest wait for a checkpoint or a compaction of a keyspace.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3600);

/// State that all handles of a client share; dropping it ends the background tasks.
pub(crate) struct Client {
    url: String,
    master: MasterClient,
    pool: Arc<Pool>,
    tasks: Tasks,
    _cancel: DropGuard,
}

/// A Vasto cluster. Cheap to clone; handles made from it keep working when it is dropped.
#[derive(Clone)]
pub struct Vasto {
    client: Arc<Client>,
}

impl Vasto {
    /// Connects to the master at `http://host:port`.
    ///
    /// # Errors
    /// `InvalidArgument` for another kind of URL; `Unavailable`, within 2 s, when no master answers.
    pub async fn connect(url: &str) -> Result<Self, Error> {
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
        let master = MasterClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let tasks = Tasks::default();
        let cancel = tasks.cancel.clone().drop_guard();
        let pool = Arc::new(Pool::new(tasks.clone()));
        Ok(Self { client: Arc::new(Client { url, master, pool, tasks, _cancel: cancel }) })
    }

    /// Checks the form of a master's URL; does not connect.
    ///
    /// # Errors
    /// `InvalidArgument` with the defect.
    pub fn check_url(url: &str) -> Result<(), Error> {
        check_url(url).map(|_| ())
    }

    /// Returns the master's URL.
    pub fn url(&self) -> &str {
        &self.client.url
    }

    /// Returns a handle of a keyspace.
    ///
    /// # Errors
    /// `NotFound` if there is no keyspace of this name, `InvalidArgument` if the name is not legal,
    /// `Unavailable` when the master does not answer.
    pub async fn keyspace(&self, name: &str) -> Result<Keyspace, Error> {
        check_keyspace_name(name)?;
        let client = &self.client;
        let opened = client.tasks.cancel.run_until_cancelled(watch::open(client.master.clone(), name)).await;
        let (topology, stream) = opened.unwrap_or_else(|| Err(closed()))?;
        if !topology.active {
            return Err(Error::new(ErrorKind::NotFound, format!("the keyspace `{name}` was deleted")));
        }
        let routing = Arc::new(Routing::new(topology, client.pool.clone()));
        let cancel = client.tasks.cancel.child_token();
        let guard = cancel.clone().drop_guard();
        let follow = watch::follow(client.master.clone(), name.to_owned(), stream, routing.clone(), cancel);
        client.tasks.tracker.spawn(follow);
        Ok(Keyspace::new(Executor::new(routing), OPERATION_DEADLINE, guard, client.clone()))
    }

    /// Ends all connections and background tasks, also those of handles made from this client, and waits
    /// for them. Later calls of these handles return [`ErrorKind::Closed`] at once. Dropping all handles
    /// does the same without waiting.
    pub async fn close(self) {
        self.client.tasks.cancel.cancel();
        self.client.tasks.tracker.close();
        self.client.tasks.tracker.wait().await;
    }

    /// Creates a keyspace and waits until it serves; returns its description, a JSON document as of
    /// [`Vasto::describe_keyspace`].
    ///
    /// # Errors
    /// `InvalidArgument` for a bad name or specification, `AlreadyExists`, `FailedPrecondition` when
    /// there are too few nodes, `Unknown` when the master went away.
    pub async fn create_keyspace(&self, name: &str, spec: KeyspaceSpec) -> Result<String, Error> {
        check_keyspace_name(name)?;
        spec.check()?;
        let request = v1::CreateKeyspaceRequest {
            name: name.to_owned(),
            shards: spec.shards,
            replicas: spec.replicas,
            ack: ack_to_wire(Some(spec.ack)),
            ttl_ms: spec.ttl_ms,
            quarantine_ms: spec.quarantine_ms,
            tombstone_grace_ms: spec.tombstone_grace_ms,
        };
        self.change(|mut master| async move { master.create_keyspace(request).await }).await
    }

    /// Returns the keyspaces, a JSON array.
    ///
    /// # Errors
    /// `Unavailable` or `DeadlineExceeded` when the master does not answer, as of all calls below.
    pub async fn list_keyspaces(&self) -> Result<String, Error> {
        self.ask(|mut master| async move { master.list_keyspaces(v1::Empty {}).await }).await
    }

    /// Returns a keyspace with its placement, a JSON object `{name, shards, replicas, epoch, ack, state,
    /// placement, operation, …}`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn describe_keyspace(&self, name: &str) -> Result<String, Error> {
        let request = keyspace_request(name)?;
        self.ask(|mut master| async move { master.describe_keyspace(request).await }).await
    }

    /// Evicts a replica from its placement. The replica is drained when its node is there, and a new replica is made
    /// on a node without one; with `accept_loss` the data that only it holds is given up. Returns a JSON object.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for the last replica of a shard, or while the keyspace changes.
    pub async fn evict_replica(&self, name: &str, replica: u64, accept_loss: bool) -> Result<String, Error> {
        let request = v1::EvictRequest { name: name.to_owned(), replica_id: replica, accept_loss };
        self.change(|mut master| async move { master.evict_replica(request).await }).await
    }

    /// Starts to restore the new keyspace `into` from the archive of another one, which may be deleted, and
    /// whose nodes may all be lost: everything, or the state at a time, microseconds since 1970. Returns the
    /// running operation at once.
    ///
    /// # Errors
    /// `NotFound` when there is no such keyspace, or was none at that time; `AlreadyExists`;
    /// `FailedPrecondition` without nodes to hold it; `Unavailable` when a shard that serves cannot ship the
    /// acknowledged writes, or has no live replica while other shards have.
    pub async fn start_restore(&self, name: &str, into: &str, at_us: Option<u64>) -> Result<Operation, Error> {
        self.restore(v1::RestoreRequest { name: name.to_owned(), into: into.to_owned(), at_us, from_bucket: false })
            .await
    }

    /// Starts a restore without asking nodes to ship what they hold first: the bucket alone is used.
    ///
    /// # Errors
    /// As of [`Vasto::start_restore`].
    pub async fn start_restore_from_bucket(
        &self,
        name: &str,
        into: &str,
        at_us: Option<u64>,
    ) -> Result<Operation, Error> {
        self.restore(v1::RestoreRequest { name: name.to_owned(), into: into.to_owned(), at_us, from_bucket: true })
            .await
    }

    async fn restore(&self, request: v1::RestoreRequest) -> Result<Operation, Error> {
        let call = |mut master: MasterClient| async move { master.restore_keyspace(request).await };
        Operation::from_json(self.call(COMMAND_DEADLINE, true, call).await?)
    }

    /// Starts to move all replicas of a node elsewhere: to node `to`, or to any node with room. With
    /// `replace` the node may be lost: data that it alone held comes from the bucket. Returns the running
    /// operation at once.
    ///
    /// # Errors
    /// `NotFound` when the node has no replicas; `FailedPrecondition` when the node is away and not to be
    /// replaced, or no node has room.
    pub async fn start_emptying_node(&self, node: &str, to: Option<&str>, replace: bool) -> Result<Operation, Error> {
        self.start_moving(node, to, replace, false).await
    }

    /// As [`Self::start_emptying_node`] with `replace`, for a node that is lost for good: data that is not even
    /// in the bucket is given up, and nothing waits for the node any more.
    ///
    /// # Errors
    /// As [`Self::start_emptying_node`].
    pub async fn start_giving_up_node(&self, node: &str, to: Option<&str>) -> Result<Operation, Error> {
        self.start_moving(node, to, true, true).await
    }

    async fn start_moving(
        &self,
        node: &str,
        to: Option<&str>,
        replace: bool,
        accept_loss: bool,
    ) -> Result<Operation, Error> {
        let to_node_id = to.unwrap_or_default().to_owned();
        let request = v1::EmptyNodeRequest { node_id: node.to_owned(), to_node_id, replace, accept_loss };
        let json = self.change(|mut master| async move { master.empty_node(request).await }).await?;
        Operation::from_json(json)
    }

    /// Cordons a node, so that it gets no new replicas, or uncordons it; its present replicas stay. Returns the
    /// node as a JSON object.
    ///
    /// # Errors
    /// `NotFound` when no such node is known.
    pub async fn cordon_node(&self, node: &str, cordoned: bool) -> Result<String, Error> {
        let request = v1::CordonNodeRequest { node_id: node.to_owned(), cordoned };
        self.change(|mut master| async move { master.cordon_node(request).await }).await
    }

    /// Checks the bucket for objects that are missing, damaged, or orphaned: a JSON object `{objects, bytes,
    /// referenced, orphans, missing, corrupt}`. With `deep` every byte in the bucket is read.
    ///
    /// # Errors
    /// When the bucket does not answer.
    pub async fn check_bucket(&self, deep: bool) -> Result<String, Error> {
        let request = v1::CheckBucketRequest { deep };
        let call = |mut master: MasterClient| async move { master.check_bucket(request).await };
        self.call(COMMAND_DEADLINE, false, call).await
    }

    /// Deletes the objects that are not needed any more, or only lists them: a JSON object `{dry_run,
    /// deleted, bytes, young, kept, keys}`.
    ///
    /// # Errors
    /// When the bucket does not answer; objects deleted until then were not needed.
    pub async fn collect_garbage(&self, dry_run: bool) -> Result<String, Error> {
        let request = v1::CollectGarbageRequest { dry_run };
        let call = |mut master: MasterClient| async move { master.collect_garbage(request).await };
        self.call(COMMAND_DEADLINE, true, call).await
    }

    /// Writes objects that the bucket has lost and the nodes still know: a JSON object `{cluster_id, claimed, written,
    /// keyspaces, shipped_anew, unknown_keyspaces, away, missing, corrupt, warnings}`. With `accept_loss` also when
    /// nodes are away that may know more.
    ///
    /// # Errors
    /// `FailedPrecondition` when nodes are away, or belong to several clusters; when the bucket does not answer.
    pub async fn repair_bucket(&self, accept_loss: bool) -> Result<String, Error> {
        let request = v1::RepairBucketRequest { accept_loss };
        let call = |mut master: MasterClient| async move { master.repair_bucket(request).await };
        self.call(COMMAND_DEADLINE, true, call).await
    }

    /// Deletes a keyspace and its data on the nodes; returns a JSON object.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while the keyspace changes its shards.
    pub async fn delete_keyspace(&self, name: &str) -> Result<String, Error> {
        let request = keyspace_request(name)?;
        self.change(|mut master| async move { master.delete_keyspace(request).await }).await
    }

    /// Has every shard ship a checkpoint to the bucket now and waits for it (an hour at most);
    /// returns a JSON object.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when a node is away.
    pub async fn checkpoint_keyspace(&self, name: &str) -> Result<String, Error> {
        let request = keyspace_request(name)?;
        let call = |mut master: MasterClient| async move { master.checkpoint_keyspace(request).await };
        self.call(COMMAND_DEADLINE, true, call).await
    }

    /// Compacts every shard on its nodes now and waits for it (an hour at most); returns a JSON
    /// object.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when a node is away.
    pub async fn compact_keyspace(&self, name: &str) -> Result<String, Error> {
        let request = keyspace_request(name)?;
        let call = |mut master: MasterClient| async move { master.compact_keyspace(request).await };
        self.call(COMMAND_DEADLINE, true, call).await
    }

    /// Changes the number of shards while reads and writes go on, and waits until the operation is done,
    /// however long that takes. Dropping the future does not stop the operation.
    ///
    /// # Errors
    /// As of [`Vasto::start_resize`]; `FailedPrecondition` with the reason when it was aborted.
    pub async fn resize_keyspace(&self, name: &str, shards: u32) -> Result<Operation, Error> {
        let started = self.start_resize(name, shards).await?;
        self.wait_operation(started).await
    }

    /// Starts to change the number of shards and returns the running operation at once.
    ///
    /// # Errors
    /// `InvalidArgument` for an illegal count (the message names legal ones), `NotFound`,
    /// `FailedPrecondition` while another change runs or when a node is missing.
    pub async fn start_resize(&self, name: &str, shards: u32) -> Result<Operation, Error> {
        let request = resize_request(name, shards, false)?;
        let json = self.change(|mut master| async move { master.resize_keyspace(request).await }).await?;
        Operation::from_json(json)
    }

    /// Returns the cost of a resize without starting it: a JSON object `{keyspace, from, to,
    /// moving_fraction, sources, requests, seconds}`.
    ///
    /// # Errors
    /// As of [`Vasto::start_resize`].
    pub async fn plan_resize(&self, name: &str, shards: u32) -> Result<String, Error> {
        let request = resize_request(name, shards, true)?;
        self.ask(|mut master| async move { master.resize_keyspace(request).await }).await
    }

    /// Waits until an operation is finished. Tolerates a master that is away for less than 30 s.
    ///
    /// # Errors
    /// `FailedPrecondition` with the reason when it was aborted; `NotFound` when the master has forgotten it.
    pub async fn wait_operation(&self, mut operation: Operation) -> Result<Operation, Error> {
        let mut heard = tokio::time::Instant::now();
        while operation.state == OperationState::Running {
            tokio::time::sleep(OPERATION_POLL).await;
            match self.show_operation(&operation.id).await {
                Ok(now) => {
                    operation = now;
                    heard = tokio::time::Instant::now();
                }
                Err(error) if error.kind() == ErrorKind::Unavailable && heard.elapsed() < ADMIN_DEADLINE => {}
                Err(error) => return Err(error),
            }
        }
        match operation.state {
            OperationState::Aborted => {
                let why = operation.reason.as_deref().unwrap_or("no reason is recorded");
                let message = format!("the operation {} was aborted: {why}", operation.id);
                Err(Error::new(ErrorKind::FailedPrecondition, message))
            }
            OperationState::Running | OperationState::Done => Ok(operation),
        }
    }

    /// Returns running and recent operations, a JSON array.
    ///
    /// # Errors
    /// When the master does not answer.
    pub async fn list_operations(&self) -> Result<String, Error> {
        self.ask(|mut master| async move { master.list_operations(v1::Empty {}).await }).await
    }

    /// Returns the progress of an operation, or its result.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn show_operation(&self, id: &str) -> Result<Operation, Error> {
        let request = v1::OperationRequest { id: id.to_owned() };
        let json = self.ask(|mut master| async move { master.show_operation(request).await }).await?;
        Operation::from_json(json)
    }

    /// Aborts a running operation.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` once the operation is committed.
    pub async fn cancel_operation(&self, id: &str) -> Result<Operation, Error> {
        let request = v1::OperationRequest { id: id.to_owned() };
        let json = self.change(|mut master| async move { master.cancel_operation(request).await }).await?;
        Operation::from_json(json)
    }

    /// Returns the nodes, a JSON array.
    ///
    /// # Errors
    /// When the master does not answer.
    pub async fn list_nodes(&self) -> Result<String, Error> {
        self.ask(|mut master| async move { master.list_nodes(v1::Empty {}).await }).await
    }

    /// Returns the state of the cluster, a JSON object `{cluster_id, term, nodes, keyspaces, warnings, …}`.
    ///
    /// # Errors
    /// When the master does not answer.
    pub async fn cluster_status(&self) -> Result<String, Error> {
        self.ask(|mut master| async move { master.cluster_status(v1::Empty {}).await }).await
    }

    async fn ask<F>(&self, call: impl FnOnce(MasterClient) -> F) -> Result<String, Error>
    where
        F: Future<Output = Result<Response<v1::JsonReply>, Status>>,
    {
        self.call(ADMIN_DEADLINE, false, call).await
    }

    async fn change<F>(&self, call: impl FnOnce(MasterClient) -> F) -> Result<String, Error>
    where
        F: Future<Output = Result<Response<v1::JsonReply>, Status>>,
    {
        // Slightly longer than the master itself waits, so that its own answer arrives.
        self.call(ADMIN_DEADLINE + CONNECT_TIMEOUT, true, call).await
    }

    async fn call<F>(
        &self,
        time: Duration,
        changes: bool,
        call: impl FnOnce(MasterClient) -> F,
    ) -> Result<String, Error>
    where
        F: Future<Output = Result<Response<v1::JsonReply>, Status>>,
    {
        if self.client.tasks.cancel.is_cancelled() {
            return Err(closed());
        }
        let answer = tokio::time::timeout(time, call(self.client.master.clone()));
        match self.client.tasks.cancel.run_until_cancelled(answer).await {
            None if changes => {
                let message = "this client was closed before the master answered; it may have been done";
                Err(Error::new(ErrorKind::Unknown, message))
            }
            None => Err(closed()),
            Some(Ok(Ok(reply))) => Ok(reply.into_inner().json),
            Some(Ok(Err(status))) => Err(error_of_status(&status, changes)),
            Some(Err(_elapsed)) if changes => {
                let message = format!(
                    "the master did not answer within {time:?}; it may still do it: look before \
                     trying again"
                );
                Err(Error::new(ErrorKind::Unknown, message))
            }
            Some(Err(_elapsed)) => {
                let message = format!("the master at {} did not answer within {time:?}", self.client.url);
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }
}

/// Returns the error of a call to the master. Without the master's own code a call that `changes`
/// something may have been carried out, unless the connection could not even be made.
pub(crate) fn error_of_status(status: &Status, changes: bool) -> Error {
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
        None if status.message().is_empty() => format!("it answered `{}` and nothing else", status.code()),
        None => status.message().to_owned(),
    };
    if changes && !never_sent(status) {
        let message = format!("the master went away ({cause}); it may have been done: look before trying again");
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

fn keyspace_request(name: &str) -> Result<v1::KeyspaceRequest, Error> {
    check_keyspace_name(name)?;
    Ok(v1::KeyspaceRequest { name: name.to_owned() })
}

fn resize_request(name: &str, shards: u32, plan_only: bool) -> Result<v1::ResizeRequest, Error> {
    check_keyspace_name(name)?;
    check_shard_count(shards)?;
    Ok(v1::ResizeRequest { name: name.to_owned(), shards, plan_only })
}

fn bad_url(url: &str, why: &str) -> Error {
    let message = format!("`{url}` is not the URL of a master: {why}; it looks like http://127.0.0.1:8278");
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Checks and normalizes the URL of a master.
fn check_url(url: &str) -> Result<String, Error> {
    let uri: Uri = url.trim().parse().map_err(|error| bad_url(url, &format!("{error}")))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(bad_url(url, "TLS is not available in this version")),
        Some(_) => return Err(bad_url(url, "the scheme must be http")),
        None => return Err(bad_url(url, "the scheme http:// is missing")),
    }
    let authority = uri.authority().ok_or_else(|| bad_url(url, "the host is missing"))?;
    if authority.host().is_empty() || authority.as_str().contains('@') {
        return Err(bad_url(url, "it must hold a host and a port and nothing else"));
    }
    if authority.port_u16().is_none_or(|port| port == 0) {
        return Err(bad_url(url, "the port is missing"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(bad_url(url, "it must end after the port"));
    }
    Ok(format!("http://{authority}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(check_url("http://127.0.0.1:8278/").unwrap(), "http://127.0.0.1:8278");
        assert_eq!(check_url("http://[::1]:8278").unwrap(), "http://[::1]:8278");
        for bad in [
            "",
            "127.0.0.1:8278",
            "localhost",
            "https://a:1",
            "ftp://a:1",
            "http://a",
            "http://a:0",
            "http://:1",
            "http://a:99999",
            "http://a:1/path",
            "http://a:1?x",
            "http://u:p@a:1",
            "http://",
            "http:// a:1",
        ] {
            let error = check_url(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad}");
            assert!(error.message().contains("http://127.0.0.1:8278"), "{error}");
        }
    }

    #[test]
    fn an_unanswered_change_is_unknown_and_an_unanswered_question_is_not() {
        let lost = Status::unavailable("broken pipe");
        assert_eq!(error_of_status(&lost, true).kind(), ErrorKind::Unknown);
        assert_eq!(error_of_status(&lost, false).kind(), ErrorKind::Unavailable);
        assert_eq!(error_of_status(&Status::unknown("?"), false).kind(), ErrorKind::Unavailable);
        let empty = error_of_status(&Status::internal(""), false);
        assert!(empty.message().contains("answered `"), "{empty}");
        let told = vasto_core::VastoError::new(vasto_core::ErrorCode::NotFound, "no such keyspace");
        assert_eq!(error_of_status(&vasto_proto::convert::status_of(&told), true).kind(), ErrorKind::NotFound);
    }
}
