//! The execution of one operation: route, send, learn from the failure, retry.
//!
//! **Invariant:** every attempt uses one table for routing and epoch; the result of an attempt (a
//! newer topology, that a write may have been applied) is kept for the next. [`crate::retry::decide`]
//! makes the decision itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use vasto_core::error::ErrorCode;
use vasto_core::ids::ShardId;
use vasto_core::limits::ATTEMPT_PATIENCE;
use vasto_proto::convert::{error_from_wire, topology_from_wire};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use crate::connection::NodeReply;
use crate::error::{Error, ErrorKind, closed};
use crate::node::Node;
use crate::retry::{
    Action, Budget, Failure, Fewer, Situation, decide, fewer_may_do, give_up, maybe_applied, with_jitter,
};
use crate::route::{ReadFrom, Routing, Source, Table, group_by_shard};
use crate::tuning::DEADLINE_MAX;

/// The progress of an operation.
#[derive(Clone)]
pub(crate) struct RequestProgress {
    pub write: bool,
    pub deadline: Instant,
    pub attempts: u32,
    /// Most keys that a request should hold: halved after each failure, so that values which exceeded
    /// one reply then fit.
    pub group_most: usize,
    /// The replica to ask first. Other than the primary: a request by choice, and its answers are eventual.
    pub from: ReadFrom,
    losses: u32,
    unreachable: u32,
    /// Nodes whose replicas of the shard are out of service; the nodes themselves are healthy.
    out_of_service: Vec<Arc<Node>>,
    maybe_applied: bool,
}

impl RequestProgress {
    /// Returns the progress of an operation that begins now and has `time`.
    pub fn new(write: bool, time: Duration) -> Self {
        let deadline = Instant::now() + time.min(DEADLINE_MAX);
        Self {
            write,
            deadline,
            attempts: 0,
            group_most: usize::MAX,
            from: ReadFrom::Primary,
            losses: 0,
            unreachable: 0,
            out_of_service: Vec::new(),
            maybe_applied: false,
        }
    }

    /// Sets the replica to ask first.
    pub fn from(mut self, from: ReadFrom) -> Self {
        self.from = from;
        self
    }
}

/// A failed attempt.
pub(crate) struct Failed {
    failure: Failure,
    message: String,
    retry_after: Duration,
    /// True when another replica can be asked.
    elsewhere: bool,
    /// The node whose replica is out of service.
    out_of_service: Option<Arc<Node>>,
}

impl Failed {
    /// How the attempt failed.
    pub fn failure(&self) -> Failure {
        self.failure
    }

    pub fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self { failure, message: message.into(), retry_after: Duration::ZERO, elsewhere: false, out_of_service: None }
    }
}

/// The result of one attempt of a group.
pub(crate) enum GroupResult {
    /// The answer for these positions.
    Done(Vec<usize>, Reply),
    /// The final error of the group.
    Failed(Error),
    /// Positions to group again, perhaps by a newer table.
    Again(Vec<usize>, RequestProgress),
}

/// State that the operations of a handle share.
pub(crate) struct Executor {
    pub routing: Arc<Routing>,
    budget: Budget,
    /// Distinguishes the read-modify-writes of this client from those of other clients.
    client_id: u64,
    sequence: AtomicU64,
}

impl Executor {
    pub fn new(routing: Arc<Routing>) -> Self {
        let client_id = rand::random_range(1..=u64::MAX);
        Self { routing, budget: Budget::default(), client_id, sequence: AtomicU64::new(1) }
    }

    /// Returns the id of this client and the number of its next read-modify-write.
    pub fn next_operation(&self) -> (u64, u64) {
        (self.client_id, self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the table in force, unless the keyspace is gone or the client was closed.
    pub fn table(&self, progress: &RequestProgress) -> Result<Arc<Table>, Error> {
        if self.routing.closed().is_cancelled() {
            return Err(match progress.maybe_applied {
                true => Error::new(
                    ErrorKind::Unknown,
                    "this client was closed before the reply came: the write may or may not have taken effect",
                ),
                false => closed(),
            });
        }
        let table = self.routing.table();
        if table.topology.active {
            return Ok(table);
        }
        let kind = if progress.maybe_applied { ErrorKind::Unknown } else { ErrorKind::NotFound };
        Err(Error::new(kind, format!("the keyspace `{}` was deleted", table.topology.name)))
    }

    /// Runs one operation on one partition.
    pub async fn run(
        &self,
        hash: u64,
        mut progress: RequestProgress,
        bytes: usize,
        op: impl Fn() -> Op,
    ) -> Result<Reply, Error> {
        loop {
            let table = self.table(&progress)?;
            let shard = table.topology.shard_of(hash);
            match self.attempt(&table, shard, &progress, op(), bytes).await {
                Ok(reply) => return Ok(reply),
                Err(failed) => self.recover(&table, &mut progress, failed).await?,
            }
        }
    }

    /// Runs one operation on many partitions: `split` cuts the positions of a shard into requests, `op`
    /// makes a request and returns its size in bytes. Answers come for groups, in any order.
    pub async fn run_many(
        &self,
        count: usize,
        progress: RequestProgress,
        hash_of: impl Fn(usize) -> u64,
        split: impl Fn(Vec<usize>, &RequestProgress) -> Vec<Vec<usize>>,
        op: impl Fn(&[usize]) -> (Op, usize),
        mut done: impl FnMut(GroupResult),
    ) {
        let mut running = FuturesUnordered::new();
        let mut to_group = vec![((0..count).collect::<Vec<usize>>(), progress)];
        loop {
            for (positions, progress) in to_group.drain(..) {
                let table = match self.table(&progress) {
                    Ok(table) => table,
                    Err(error) => {
                        done(GroupResult::Failed(error));
                        continue;
                    }
                };
                for (shard, positions) in group_by_shard(&table.topology, &positions, &hash_of) {
                    for positions in split(positions, &progress) {
                        let (op, bytes) = op(&positions);
                        running.push(self.one_group(table.clone(), shard, positions, progress.clone(), op, bytes));
                    }
                }
            }
            match running.next().await {
                None => return,
                Some(GroupResult::Again(positions, progress)) => to_group.push((positions, progress)),
                Some(finished) => done(finished),
            }
        }
    }

    async fn one_group(
        &self,
        table: Arc<Table>,
        shard: ShardId,
        positions: Vec<usize>,
        mut progress: RequestProgress,
        op: Op,
        bytes: usize,
    ) -> GroupResult {
        let failed = match self.attempt(&table, shard, &progress, op, bytes).await {
            Ok(reply) => return GroupResult::Done(positions, reply),
            Err(failed) => failed,
        };
        match fewer_may_do(failed.failure, progress.write, positions.len()) {
            Fewer::No => {}
            Fewer::AfterPause => progress.group_most = positions.len().div_ceil(2),
            Fewer::Now => {
                progress.group_most = positions.len().div_ceil(2);
                return GroupResult::Again(positions, progress);
            }
        }
        match self.recover(&table, &mut progress, failed).await {
            Ok(()) => GroupResult::Again(positions, progress),
            Err(error) => GroupResult::Failed(error),
        }
    }

    /// Sends a request once.
    pub async fn attempt(
        &self,
        table: &Table,
        shard: ShardId,
        progress: &RequestProgress,
        op: Op,
        bytes: usize,
    ) -> Result<Reply, Failed> {
        let but = &progress.out_of_service;
        let Some(node) = table.node(shard, progress.from.clone(), progress.unreachable, but) else {
            let message = format!(
                "no running node is known for shard {shard} of `{}`; see `vasto node list`",
                table.topology.name
            );
            return Err(Failed::new(Failure::Unreachable, message));
        };
        let strict = progress.from == ReadFrom::Primary;
        let result = self.attempt_at(table, shard, node, progress.deadline, op, bytes, strict).await;
        result.map_err(|failed| {
            let unable = [ErrorCode::NotPrimary, ErrorCode::CatchingUp, ErrorCode::NoSpace];
            let refused = matches!(failed.failure, Failure::Refused { code, .. } if unable.contains(&code));
            let out_of_service = refused.then(|| node.clone());
            Failed { elsewhere: table.has_other(shard, node, but), out_of_service, ..failed }
        })
    }

    /// Sends a request once, to this node. A node that cannot be reached or is silent becomes suspect; when
    /// another replica can be asked, the attempt does not wait for it. Only the replica that has authority over
    /// the shard answers a strict request.
    #[expect(clippy::too_many_arguments, reason = "one attempt, named once")]
    pub async fn attempt_at(
        &self,
        table: &Table,
        shard: ShardId,
        node: &Arc<Node>,
        deadline: Instant,
        op: Op,
        bytes: usize,
        strict: bool,
    ) -> Result<Reply, Failed> {
        let probe = || v1::Request {
            keyspace_id: table.topology.keyspace.0,
            epoch: table.topology.epoch.0,
            shard: shard.0,
            op: Some(Op::Get(v1::GetRequest::default())),
            ..v1::Request::default()
        };
        let impatient = table.topology.routes(shard).len() > 1;
        let connect_by = if impatient { deadline.min(Instant::now() + ATTEMPT_PATIENCE) } else { deadline };
        let connecting = self.routing.closed().run_until_cancelled(node.connection(connect_by)).await;
        let connection = match connecting {
            Some(Ok(connection)) => connection,
            None => return Err(Failed::new(Failure::Unreachable, "this client was closed")),
            Some(Err(message)) => {
                node.suspect(probe());
                return Err(Failed::new(Failure::Unreachable, message));
            }
        };
        let write = matches!(op, Op::Write(_));
        let request = v1::Request {
            id: 0,
            keyspace_id: table.topology.keyspace.0,
            epoch: table.topology.epoch.0,
            shard: shard.0,
            deadline_ms: 0,
            strict,
            op: Some(op),
        };
        let call = connection.call(request, bytes, deadline);
        tokio::pin!(call);
        // A request that waits for another replica, the bucket or a change of shards takes seconds even at a healthy
        // node; repeating it costs more than waiting. So a write is repeated only after an easy probe got no answer.
        let before_asking = if write && impatient { ATTEMPT_PATIENCE / 2 } else { ATTEMPT_PATIENCE };
        let answer = loop {
            if let Ok(answer) = tokio::time::timeout(before_asking, &mut call).await {
                break answer;
            }
            // The node answers other requests: this request is only slow.
            if !impatient || !connection.is_silent_for(before_asking) {
                continue;
            }
            if write {
                let asked = connection.call(probe(), 0, Instant::now() + (ATTEMPT_PATIENCE - before_asking));
                tokio::select! {
                    biased;
                    answer = &mut call => break answer,
                    heard = asked => {
                        if !matches!(heard, NodeReply::Expired { .. }) || !connection.is_silent_for(ATTEMPT_PATIENCE) {
                            continue;
                        }
                    }
                }
            }
            node.suspect(probe());
            let message = format!("the node at {} is silent", node.address());
            return Err(Failed::new(Failure::Lost { sent: true }, message));
        };
        match answer {
            NodeReply::Reply(Reply::Error(error)) => Err(self.refused(&error)),
            NodeReply::Reply(reply) => {
                self.budget.succeeded();
                Ok(reply)
            }
            NodeReply::Lost { sent } => {
                node.suspect(probe());
                let message = format!("the connection to the node at {} ended before the reply", node.address());
                Err(Failed::new(Failure::Lost { sent }, message))
            }
            NodeReply::Expired { sent } => {
                let message = format!("the node at {} did not answer before the deadline", node.address());
                Err(Failed::new(Failure::Expired { sent }, message))
            }
        }
    }

    /// Reads an error reply and adopts the topology that came with it.
    fn refused(&self, error: &v1::Error) -> Failed {
        if let Some(topology) = &error.topology {
            self.routing.offer(topology_from_wire(topology), Source::Node);
        }
        let error = error_from_wire(error);
        let retry_after = Duration::from_millis(error.retry_after_ms.into());
        let failure = Failure::Refused { code: error.code, retry_after };
        Failed { failure, message: error.message, retry_after, elsewhere: false, out_of_service: None }
    }

    /// Waits as [`decide`] says, or returns why there is no further attempt.
    pub async fn recover(&self, table: &Table, progress: &mut RequestProgress, failed: Failed) -> Result<(), Error> {
        progress.attempts = progress.attempts.saturating_add(1);
        match failed.failure {
            Failure::Lost { sent } => {
                progress.losses += u32::from(sent);
                progress.unreachable += 1;
            }
            Failure::Unreachable => progress.unreachable += 1,
            Failure::Expired { .. } | Failure::Refused { .. } => {}
        }
        match failed.out_of_service {
            Some(node) if failed.elsewhere => progress.out_of_service.push(node),
            // All replicas have been asked: ask them again.
            Some(_) => progress.out_of_service.clear(),
            // A replica that reported another one as serving may serve now that this one does not answer.
            None if matches!(failed.failure, Failure::Lost { .. } | Failure::Unreachable) => {
                progress.out_of_service.clear();
            }
            None => {}
        }
        let now = self.routing.table();
        let version = |table: &Table| (table.topology.version, table.topology.epoch);
        let situation = Situation {
            write: progress.write,
            maybe_applied: progress.maybe_applied,
            attempts: progress.attempts,
            losses: progress.losses,
            time_left: progress.deadline.saturating_duration_since(Instant::now()),
            newer_topology: version(&now) > version(table),
            elsewhere: failed.elsewhere,
        };
        progress.maybe_applied |= progress.write && maybe_applied(failed.failure);
        let kind = match decide(failed.failure, situation) {
            Action::Now => return Ok(()),
            Action::After { paid: true, .. } if !self.budget.take() => give_up(failed.failure, situation),
            Action::After { pause, at_least, .. } => {
                let pause = with_jitter(pause, at_least, rand::random()).min(situation.time_left);
                let news = async {
                    if at_least {
                        std::future::pending().await
                    } else {
                        self.routing.newer_than(table.generation).await
                    }
                };
                // Whatever ended the wait, the next attempt finds out.
                let waiting = tokio::time::timeout(pause, news);
                let _ = self.routing.closed().run_until_cancelled(waiting).await;
                if Instant::now() < progress.deadline {
                    return Ok(());
                }
                give_up(failed.failure, situation)
            }
            Action::Fail(kind) => kind,
        };
        let message = match kind {
            ErrorKind::Unknown => format!(
                "the write may or may not have taken effect ({}); read it back, or repeat it if that does no harm",
                failed.message
            ),
            _ if progress.attempts > 1 => format!("{} (gave up after {} attempts)", failed.message, progress.attempts),
            _ => failed.message,
        };
        Err(Error::new(kind, message).with_retry_after(failed.retry_after))
    }
}

/// Returns the error for a reply of another type than the request's.
pub(crate) fn strange_reply(write: bool) -> Error {
    let kind = if write { ErrorKind::Unknown } else { ErrorKind::Internal };
    Error::new(kind, "the node answered with something else than was asked; please report it")
}
