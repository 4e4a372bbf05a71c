//! The execution of one operation: route, attempt, learn from the failure, retry.
//!
//! **Invariant:** every attempt uses one table for routing and epoch; the result of an attempt (a
//! newer topology, that a write may have been applied) is kept for the next.
//! [`crate::retry::decide`] makes the decision itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use vasto_core::error::ErrorCode;
use vasto_core::ids::ShardId;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use crate::attempt::{Attempt, Failed};
use crate::error::{Error, ErrorKind, closed};
use crate::node::Node;
use crate::retry::{
    Action, Budget, Failure, Fewer, Situation, decide, fewer_may_do, give_up, maybe_applied,
    with_jitter,
};
use crate::route::{ReadFrom, Routing, Table, group_by_shard};
use crate::tuning::DEADLINE_MAX;

/// The progress of an operation.
#[derive(Clone)]
pub(crate) struct RequestProgress {
    pub write: bool,
    pub deadline: Instant,
    pub attempts: u32,
    /// Most keys that a request should hold: halved after each failure, so that values which
    /// exceeded one reply then fit.
    pub group_most: usize,
    /// The replica to ask first. Other than the primary: a request by choice, and its answers are
    /// eventual.
    pub from: ReadFrom,
    losses: u32,
    unreachable: u32,
    /// Nodes whose replicas of the shard are out of service; the nodes themselves are healthy.
    out_of_service: Vec<Arc<Node>>,
    maybe_applied: bool,
}

impl RequestProgress {
    /// Returns the progress of an operation that begins now and has `time`.
    pub(crate) fn new(write: bool, time: Duration) -> Self {
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
    pub(crate) fn from(mut self, from: ReadFrom) -> Self {
        self.from = from;
        self
    }
}

/// The answer for the positions of a group, or its final error.
pub(crate) type GroupResult = Result<(Vec<usize>, Reply), Error>;

/// The end of one attempt of a group.
enum GroupAttempt {
    Finished(GroupResult),
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
    pub(crate) fn new(routing: Arc<Routing>) -> Self {
        let client_id = rand::random_range(1..=u64::MAX);
        Self { routing, budget: Budget::default(), client_id, sequence: AtomicU64::new(1) }
    }

    /// Returns the id of this client and the number of its next read-modify-write.
    pub(crate) fn next_operation(&self) -> (u64, u64) {
        (self.client_id, self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the table in force, unless the keyspace is gone or the client was closed.
    pub(crate) fn table(&self, progress: &RequestProgress) -> Result<Arc<Table>, Error> {
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
    pub(crate) async fn run(
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

    /// Runs one operation on many partitions: `split` cuts the positions of a shard into requests,
    /// `op` makes a request and returns its size in bytes. Answers come for groups, in any order.
    pub(crate) async fn run_many(
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
                        done(Err(error));
                        continue;
                    }
                };
                for (shard, positions) in group_by_shard(&table.topology, &positions, &hash_of) {
                    for positions in split(positions, &progress) {
                        let (op, bytes) = op(&positions);
                        running.push(self.attempt_group(
                            table.clone(),
                            shard,
                            positions,
                            progress.clone(),
                            op,
                            bytes,
                        ));
                    }
                }
            }
            match running.next().await {
                None => return,
                Some(GroupAttempt::Again(positions, progress)) => {
                    to_group.push((positions, progress))
                }
                Some(GroupAttempt::Finished(result)) => done(result),
            }
        }
    }

    async fn attempt_group(
        &self,
        table: Arc<Table>,
        shard: ShardId,
        positions: Vec<usize>,
        mut progress: RequestProgress,
        op: Op,
        bytes: usize,
    ) -> GroupAttempt {
        let failed = match self.attempt(&table, shard, &progress, op, bytes).await {
            Ok(reply) => return GroupAttempt::Finished(Ok((positions, reply))),
            Err(failed) => failed,
        };
        match fewer_may_do(failed.failure, progress.write, positions.len()) {
            Fewer::No => {}
            Fewer::AfterPause => progress.group_most = positions.len().div_ceil(2),
            Fewer::Now => {
                progress.group_most = positions.len().div_ceil(2);
                return GroupAttempt::Again(positions, progress);
            }
        }
        match self.recover(&table, &mut progress, failed).await {
            Ok(()) => GroupAttempt::Again(positions, progress),
            Err(error) => GroupAttempt::Finished(Err(error)),
        }
    }

    /// Sends a request once, to the node that the topology and the progress name.
    pub(crate) async fn attempt(
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
        let attempt = Attempt { table, shard, node, deadline: progress.deadline, strict };
        self.attempt_at(attempt, op, bytes).await.map_err(|failed| {
            let unable = [ErrorCode::NotPrimary, ErrorCode::CatchingUp, ErrorCode::NoSpace];
            let refused =
                matches!(failed.failure, Failure::Refused { code, .. } if unable.contains(&code));
            let out_of_service = refused.then(|| node.clone());
            Failed { elsewhere: table.has_other(shard, node, but), out_of_service, ..failed }
        })
    }

    /// Sends a request once, to the node of the attempt.
    pub(crate) async fn attempt_at(
        &self,
        attempt: Attempt<'_>,
        op: Op,
        bytes: usize,
    ) -> Result<Reply, Failed> {
        let reply = attempt.send(&self.routing, op, bytes).await?;
        self.budget.succeeded();
        Ok(reply)
    }

    /// Waits as [`decide`] says, or returns why there is no further attempt.
    pub(crate) async fn recover(
        &self,
        table: &Table,
        progress: &mut RequestProgress,
        failed: Failed,
    ) -> Result<(), Error> {
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
            // A replica that reported another one as serving may serve now that this one does not
            // answer.
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
            Action::After { paid: true, .. } if !self.budget.take() => {
                give_up(failed.failure, situation)
            }
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
            _ if progress.attempts > 1 => {
                format!("{} (gave up after {} attempts)", failed.message, progress.attempts)
            }
            _ => failed.message,
        };
        Err(Error::new(kind, message).with_retry_after(failed.retry_after))
    }
}
