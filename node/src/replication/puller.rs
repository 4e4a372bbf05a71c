//! The follower's side of a pull: pulls every record that this replica lacks from one of its peers.
//!
//! **Invariants**
//! - Everything that is acknowledged to a source is durable here.
//! - A pull resumes from a durable cursor; the vector skips repeated records. A missing record is
//!   never skipped: the peer is then of no use as a source any more (`too_old`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use vasto_core::catalog::Placed;
use vasto_core::ids::{Epoch, Lsn, Vector, covers};
use vasto_core::record::Record;
use vasto_proto::convert::{vector_from_wire, vector_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::pull_message::Message;

use super::peers::Peers;
use super::pull_state::PullState;
use crate::registry::NodeRegistry;
use crate::replica::command::ReplicaError;
use crate::replica::{OLD_COPY, Replica};

/// Pause between two attempts to reach a peer.
const RETRY: Duration = Duration::from_millis(100);
/// Interval at which records from other sources are reported to each source.
const REPORT_INTERVAL: Duration = Duration::from_millis(20);

/// The task that pulls from one source.
pub(super) struct Puller {
    pub registry: Arc<NodeRegistry>,
    pub peers: Arc<Peers>,
    pub replica: Replica,
    pub source: Placed,
    pub state: Arc<PullState>,
}

/// Position of this replica that was last reported to the source.
struct Reported {
    vector: Vector,
    /// Number of the last superseded record of the source that was reported.
    losses: u64,
    epoch: Epoch,
}

/// Reason why a stream ended.
enum Ended {
    /// The pull is tried again.
    Interrupted(String),
    /// The peer's log begins too late.
    TooOld(String),
    /// This replica cannot continue.
    Closed(String),
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Ended::Interrupted(status.message().to_owned())
    }
}

impl From<ReplicaError> for Ended {
    fn from(error: ReplicaError) -> Self {
        match error {
            ReplicaError::Gap { .. } => Ended::TooOld(error.to_string()),
            other => Ended::Closed(other.to_string()),
        }
    }
}

/// Returns the covered LSN: zero until it is proven that nothing is missing.
fn covered(unproven: &Option<(Lsn, Vector)>, cursor: Lsn) -> Lsn {
    if unproven.is_none() { cursor } else { Lsn(0) }
}

impl Puller {
    /// Pulls until the task is cancelled.
    pub(super) async fn run(self) {
        // A rescan begins at the start of the peer's log instead of at the cursor: the vector skips
        // records that are here already.
        let mut rescan = false;
        let (keyspace, shard, peer) =
            (self.replica.keyspace.0, self.replica.shard.0, self.source.replica.0);
        let mut last_logged = String::new();
        loop {
            let links = self.registry.links_of(self.source.node);
            let again = self.registry.linked_again(self.source.node, links);
            let ended = tokio::select! {
                Err(ended) = self.pull(rescan) => ended,
                () = again => Ended::Interrupted("the peer could be reached again".into()),
            };
            if self.state.connected.load(Ordering::Acquire) {
                self.state.broken();
            }
            let mut pause = RETRY;
            let reason = match ended {
                Ended::Interrupted(reason) => reason,
                // A peer whose disk lost records that it had reported as synced has begun its log
                // anew below the cursor.
                Ended::TooOld(reason) if !rescan => {
                    rescan = true;
                    reason
                }
                Ended::TooOld(reason) => {
                    if !self.state.too_old.swap(true, Ordering::AcqRel) {
                        tracing::warn!(
                            keyspace,
                            shard,
                            peer,
                            reason,
                            "this replica cannot be brought up to date from a peer's log"
                        );
                    }
                    pause = Duration::from_secs(2);
                    reason
                }
                Ended::Closed(reason) => {
                    pause = Duration::from_secs(1);
                    reason
                }
            };
            self.registry.report.notify_one();
            if last_logged != reason {
                tracing::info!(keyspace, shard, peer, reason, "a pull is interrupted; it goes on");
                last_logged = reason;
            }
            // A peer that can be reached again is tried at once.
            let again = self.registry.linked_again(self.source.node, links);
            let _ = tokio::time::timeout(pause.mul_f64(rand::random_range(0.5..1.5)), again).await;
        }
    }

    async fn pull(&self, rescan: bool) -> Result<std::convert::Infallible, Ended> {
        let mut client = self.peers.client(&self.registry, self.source.node)?;
        let cursors =
            self.replica.tail_cursors().map_err(|error| Ended::Closed(error.to_string()))?;
        let cursor = cursors
            .into_iter()
            .find(|(id, _)| *id == self.source.replica)
            .map_or(Lsn(0), |(_, lsn)| lsn);
        let mut cursor = if rescan { Lsn(0) } else { cursor };
        let (mut changes, mut views) = (self.replica.vector_changes(), self.replica.changes());
        let mut reported = Reported { vector: self.replica.vector(), losses: 0, epoch: Epoch(0) };
        let (messages, outgoing) = mpsc::channel(8);
        let start = v1::PullStart {
            keyspace_id: self.replica.keyspace.0,
            replica_id: self.source.replica.0,
            follower_id: self.replica.id.0,
            after_lsn: cursor.0,
            vector: vector_to_wire(&reported.vector),
        };
        let closed = |_| Ended::Interrupted("the stream ended".into());
        messages
            .send(v1::PullMessage { message: Some(Message::Start(start)) })
            .await
            .map_err(closed)?;
        let mut frames = client.pull(ReceiverStream::new(outgoing)).await?.into_inner();
        let hello =
            frames.message().await?.ok_or_else(|| Ended::Interrupted("the stream ended".into()))?;
        let (head, needed) = (Lsn(hello.head_lsn), vector_from_wire(&hello.vector));
        self.state.connected.store(true, Ordering::Release);
        cursor = Lsn(hello.from_lsn);
        self.state.lag_lsns.store(hello.head_lsn.saturating_sub(cursor.0), Ordering::Release);
        let mut unproven = Some((head, needed));
        let mut tick = tokio::time::interval(REPORT_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut has_news = true;
        loop {
            if let Some((head, needed)) = &unproven
                && cursor >= *head
            {
                self.prove(needed)?;
                (unproven, has_news) = (None, true);
                self.state.too_old.store(false, Ordering::Release);
                self.registry.report.notify_one();
            }
            tokio::select! {
                frame = frames.message() => {
                    let frame = frame?.ok_or_else(|| Ended::Interrupted("the peer ended the stream".into()))?;
                    self.take(frame, &mut cursor).await?;
                }
                _ = changes.changed(), if !has_news => {
                    has_news = true;
                    continue;
                }
                _ = views.changed(), if !has_news => {
                    has_news = self.replica.epoch() != reported.epoch;
                    continue;
                }
                _ = tick.tick(), if has_news => {}
            }
            has_news = false;
            changes.mark_unchanged();
            let progress = self.progress(&mut reported, covered(&unproven, cursor));
            messages
                .send(v1::PullMessage { message: Some(Message::Progress(progress)) })
                .await
                .map_err(closed)?;
        }
    }

    /// Returns what changed since the last report to the source.
    fn progress(&self, reported: &mut Reported, covered: Lsn) -> v1::PullProgress {
        let vector = self.replica.vector();
        let news = vector.iter().filter(|(origin, seq)| reported.vector.get(origin) != Some(*seq));
        // Read after the vector: the superseded records that the vector covers are among them.
        let (lost, losses) = self.replica.losses_of(self.source.replica, reported.losses);
        // Read after the records were taken: a newer epoch only makes the source more careful.
        let epoch = self.replica.epoch();
        let progress = v1::PullProgress {
            covered_lsn: covered.0,
            vector: vector_to_wire(news),
            epoch: epoch.0,
            lost: vector_to_wire(lost.iter().map(|(origin, seq)| (origin, seq))),
        };
        *reported = Reported { vector, losses, epoch };
        progress
    }

    /// Checks, once the log that the peer had at the beginning has been read, that this replica
    /// holds what the peer held then; if not, the peer's log began too late.
    fn prove(&self, needed: &Vector) -> Result<(), Ended> {
        let have = self.replica.vector();
        if covers(&have, needed) {
            return Ok(());
        }
        if self.replica.is_behind_itself(needed) {
            self.replica.close(OLD_COPY.into());
            return Err(Ended::Closed(OLD_COPY.into()));
        }
        // Records that this replica is about to apply are in its log.
        let mut missing = needed.iter().filter(|(origin, seq)| {
            let own = origin.replica == self.replica.id
                && origin.incarnation == self.replica.incarnation();
            !own && have.get(origin).is_none_or(|have| have < *seq)
        });
        let missing = missing.next();
        let missing =
            missing.map(|(origin, seq)| format!("{origin} up to {seq}")).unwrap_or_default();
        Err(Ended::TooOld(format!("the peer's log no longer holds records of {missing}")))
    }

    async fn take(&self, frame: v1::PullFrame, cursor: &mut Lsn) -> Result<(), Ended> {
        let covered = Lsn(frame.covered_lsn);
        self.replica.throttle().heard(self.source.replica, frame.moving_bytes_per_s);
        let mut records = Vec::with_capacity(frame.records.len());
        for bytes in &frame.records {
            let record = Record::decode(bytes).map_err(|error| {
                Ended::Interrupted(format!("a streamed record is damaged: {error}"))
            })?;
            records.push(record);
        }
        let last = records.last().map(|record| record.commit_time);
        if !records.is_empty() {
            self.replica.replicate(self.source.replica, records, covered).await?;
        }
        *cursor = (*cursor).max(covered);
        let lag = frame.head_lsn.saturating_sub(cursor.0);
        let lag_ms = match last {
            Some(commit_time) if lag > 0 => {
                self.registry.clock.now_us().saturating_sub(commit_time) / 1000
            }
            _ if lag == 0 => 0,
            _ => self.state.lag_ms.load(Ordering::Acquire),
        };
        self.state.lag_lsns.store(lag, Ordering::Release);
        self.state.lag_ms.store(lag_ms, Ordering::Release);
        Ok(())
    }
}
