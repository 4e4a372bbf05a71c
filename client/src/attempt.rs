//! One attempt of a request: sent once, to one node.
//!
//! **Invariant:** an attempt ends with the reply, or with a [`Failed`] that says whether the node
//! may have received the request. A node that cannot be reached or is silent becomes suspect; when
//! another replica can be asked, the attempt does not wait for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vasto_core::ids::ShardId;
use vasto_core::limits::ATTEMPT_PATIENCE;
use vasto_proto::convert::{error_from_wire, topology_from_wire};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use crate::connection::{Connection, NodeReply};
use crate::node::Node;
use crate::retry::Failure;
use crate::route::{Routing, Source, Table};

/// A failed attempt.
pub(crate) struct Failed {
    /// How the attempt failed.
    pub failure: Failure,
    pub message: String,
    /// The pause that the node asked for, zero if none.
    pub retry_after: Duration,
    /// True when another replica can be asked.
    pub elsewhere: bool,
    /// The node whose replica is out of service.
    pub out_of_service: Option<Arc<Node>>,
}

impl Failed {
    pub(crate) fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self {
            failure,
            message: message.into(),
            retry_after: Duration::ZERO,
            elsewhere: false,
            out_of_service: None,
        }
    }
}

/// The node of an attempt, and the topology under which it is asked.
#[derive(Clone, Copy)]
pub(crate) struct Attempt<'a> {
    pub table: &'a Table,
    pub shard: ShardId,
    pub node: &'a Arc<Node>,
    pub deadline: Instant,
    /// Only the replica that has authority over the shard answers a strict request.
    pub strict: bool,
}

impl Attempt<'_> {
    /// Sends a request of about `bytes`. A topology that comes with a refusal is offered to
    /// `routing`.
    pub(crate) async fn send(
        self,
        routing: &Routing,
        op: Op,
        bytes: usize,
    ) -> Result<Reply, Failed> {
        let connection = self.connect(routing).await?;
        let write = matches!(op, Op::Write(_));
        let call = connection.call(self.request(op, self.strict), bytes, self.deadline);
        match self.answer_of(call, &connection, write).await? {
            NodeReply::Reply(Reply::Error(error)) => Err(refused(routing, &error)),
            NodeReply::Reply(reply) => Ok(reply),
            NodeReply::Lost { sent } => {
                self.node.suspect(self.probe());
                let message = format!(
                    "the connection to the node at {} ended before the reply",
                    self.node.address()
                );
                Err(Failed::new(Failure::Lost { sent }, message))
            }
            NodeReply::Expired { sent } => {
                let message = format!(
                    "the node at {} did not answer before the deadline",
                    self.node.address()
                );
                Err(Failed::new(Failure::Expired { sent }, message))
            }
        }
    }

    /// Returns true when another replica can be asked.
    fn is_impatient(&self) -> bool {
        self.table.topology.routes(self.shard).len() > 1
    }

    fn request(&self, op: Op, strict: bool) -> v1::Request {
        v1::Request {
            id: 0,
            keyspace_id: self.table.topology.keyspace.0,
            epoch: self.table.topology.epoch.0,
            shard: self.shard.0,
            deadline_ms: 0,
            strict,
            op: Some(op),
        }
    }

    /// Returns a request that any healthy node answers.
    fn probe(&self) -> v1::Request {
        self.request(Op::Get(v1::GetRequest::default()), false)
    }

    async fn connect(&self, routing: &Routing) -> Result<Arc<Connection>, Failed> {
        let by = match self.is_impatient() {
            true => self.deadline.min(Instant::now() + ATTEMPT_PATIENCE),
            false => self.deadline,
        };
        match routing.closed().run_until_cancelled(self.node.connection(by)).await {
            Some(Ok(connection)) => Ok(connection),
            None => Err(Failed::new(Failure::Unreachable, "this client was closed")),
            Some(Err(message)) => {
                self.node.suspect(self.probe());
                Err(Failed::new(Failure::Unreachable, message))
            }
        }
    }

    /// Waits for the answer as long as the node answers anything at all, or there is no other
    /// replica.
    async fn answer_of(
        &self,
        call: impl Future<Output = NodeReply>,
        connection: &Connection,
        write: bool,
    ) -> Result<NodeReply, Failed> {
        tokio::pin!(call);
        let impatient = self.is_impatient();
        // A request that waits for another replica, the bucket or a change of shards takes seconds
        // even at a healthy node; repeating it costs more than waiting. So a write is repeated only
        // after an easy probe got no answer.
        let before_asking =
            if write && impatient { ATTEMPT_PATIENCE / 2 } else { ATTEMPT_PATIENCE };
        loop {
            if let Ok(answer) = tokio::time::timeout(before_asking, &mut call).await {
                return Ok(answer);
            }
            // The node answers other requests: this request is only slow.
            if !impatient || !connection.is_silent_for(before_asking) {
                continue;
            }
            if write {
                let asked = connection.call(
                    self.probe(),
                    0,
                    Instant::now() + (ATTEMPT_PATIENCE - before_asking),
                );
                tokio::select! {
                    biased;
                    answer = &mut call => return Ok(answer),
                    heard = asked => {
                        if !matches!(heard, NodeReply::Expired { .. }) || !connection.is_silent_for(ATTEMPT_PATIENCE) {
                            continue;
                        }
                    }
                }
            }
            self.node.suspect(self.probe());
            let message = format!("the node at {} is silent", self.node.address());
            return Err(Failed::new(Failure::Lost { sent: true }, message));
        }
    }
}

/// Reads an error reply and adopts the topology that came with it.
fn refused(routing: &Routing, error: &v1::Error) -> Failed {
    if let Some(topology) = &error.topology {
        routing.offer(topology_from_wire(topology), Source::Node);
    }
    let error = error_from_wire(error);
    let retry_after = Duration::from_millis(error.retry_after_ms.into());
    let failure = Failure::Refused { code: error.code, retry_after };
    Failed { retry_after, ..Failed::new(failure, error.message) }
}
