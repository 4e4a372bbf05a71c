//! The task that ships one replica: decides whether a chunk, a checkpoint or an acknowledgement is
//! due, and what follows from a failure.
//!
//! **Invariants**
//! - A write that waits for the bucket is acknowledged only after the bucket holds it: in a chunk,
//!   in a checkpoint or in the archive of another replica.
//! - A replica whose archive in the bucket holds another history closes before a request is
//!   answered.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vasto_core::limits::{CHUNK_BYTES_MAX, SHIP_INSTEAD_AFTER};
use vasto_shipping::due::{Replay, checkpoint_is_due};

use super::acks::{self, ACK_SOON};
use super::backoff::Backoff;
use super::checkpoint::{Checkpoints, Step};
use super::chunks::{ALL, Chunks, Progress};
use super::context::ShipContext;
use super::error::ShipError;
use super::handle::{ShipHandle, ShipRequest, ShipperEnds, handle};
use super::status::Duty;
use super::truncate::Truncation;
use crate::clock::with_others;
use crate::replica::Replica;
use crate::ship::old_copy::OLD_COPY;

/// Interval between two polls for pending work.
const TICK: Duration = Duration::from_millis(500);
/// The same while everything is shipped; growth of the log wakes the shipper.
const TICK_WHILE_IDLE: Duration = Duration::from_secs(10);
/// Minimum interval between checkpoints that are due by the number of chunks alone.
const CHECKPOINTS_APART: Duration = Duration::from_secs(600);

struct Shipper {
    context: Arc<ShipContext>,
    chunks: Chunks,
    checkpoints: Checkpoints,
    /// Delays unrequested work after failures.
    backoff: Backoff,
    /// Since when there is settled log that is not shipped.
    dirty_since: Option<Instant>,
    /// Pause before the next poll for writes that wait for the bucket.
    ack_pause: Duration,
    /// Since when it has been shipping without interruption.
    began: Option<Instant>,
    /// Number of ended outages of the bucket at the last poll.
    outages_ended: u64,
}

/// Starts a shipper; it ends when `cancel` fires, after it has shipped what is due.
pub(crate) fn start(
    context: ShipContext,
    cancel: CancellationToken,
) -> (ShipHandle, impl Future<Output = ()> + Send) {
    let (handle, ends) = handle();
    let shipper = async move {
        let ShipperEnds { requests, duty, status, uploads } = ends;
        let context = Arc::new(context);
        // Independent of all waits for the bucket: the log stays bounded whatever the bucket does.
        let truncation = Truncation::new(&context, duty.clone(), status.clone());
        let shipper = Shipper {
            chunks: Chunks::open(context.clone(), duty.clone(), status),
            checkpoints: Checkpoints::new(context.clone(), uploads),
            context,
            backoff: Backoff::new(),
            dirty_since: None,
            ack_pause: ACK_SOON,
            began: None,
            outages_ended: 0,
        };
        let _truncating = AbortOnDropHandle::new(tokio::spawn(truncation.run(TICK)));
        shipper.run(requests, duty, cancel).await;
    };
    (handle, shipper)
}

impl Shipper {
    async fn run(
        mut self,
        mut requests: mpsc::UnboundedReceiver<ShipRequest>,
        mut duty: watch::Receiver<Duty>,
        cancel: CancellationToken,
    ) {
        let mut due = Instant::now();
        let replica = self.context.replica.clone();
        let mut grown = replica.log().subscribe();
        loop {
            grown.mark_unchanged();
            let idle = self.is_idle();
            let ack_poll = self.ack_poll();
            tokio::select! {
                () = cancel.cancelled() => break,
                request = requests.recv() => match request {
                    Some(request) => self.take(request).await,
                    None => break,
                },
                step = self.checkpoints.next() => self.advance_checkpoint(step).await,
                () = acks_wanted(&replica, ack_poll) => {
                    self.chunks.ship_for_acks();
                    if self.backoff.is_over() {
                        let result = self.ship_for_acks().await;
                        self.conclude(result);
                    }
                }
                Ok(()) = duty.changed() => due = Instant::now(),
                _ = grown.changed(), if idle => {}
                () = tokio::time::sleep_until(if idle { with_others(due + TICK_WHILE_IDLE) } else { due }) => {
                    due = Instant::now() + TICK;
                    self.hurry_after_an_outage();
                    if self.backoff.is_over() {
                        let result = self.ship_what_is_due().await;
                        self.conclude(result);
                    }
                }
            }
            self.chunks.answer_requests();
        }
        self.end().await;
    }

    /// Returns true when there is no work before the log grows or a request arrives.
    fn is_idle(&self) -> bool {
        let replica = &self.context.replica;
        let ships = self.chunks.ships();
        let is_shipped = replica.log().appended_lsn() <= self.chunks.state().shipped_lsn
            && self.chunks.are_usable();
        (is_shipped || !ships)
            && self.began.is_some() == ships
            && !self.backoff.is_failing()
            && self.checkpoints.is_idle()
            && !replica.ranges().is_being_filled()
    }

    /// Returns the pause before the next poll for writes that wait for the bucket, while there are
    /// any to ship.
    fn ack_poll(&self) -> Option<Duration> {
        let wait = self.chunks.status().for_acks
            && self.backoff.is_over()
            && self.context.replica.bucket_acks().last().is_some();
        wait.then_some(self.ack_pause)
    }

    async fn take(&mut self, request: ShipRequest) {
        match request {
            ShipRequest::Checkpoint { compact, anew, done } => {
                if anew {
                    self.checkpoints.distrust();
                }
                self.checkpoints.request(compact, done);
                self.checkpoints.begin_requested(&self.chunks);
            }
            ShipRequest::Log { done } => {
                self.chunks.request(done);
                if let Err(error) = self.ship_what_is_due().await {
                    self.fail(&error);
                }
            }
        }
    }

    async fn advance_checkpoint(&mut self, step: Step) {
        let Some(ended) = self.checkpoints.advance(step, &mut self.chunks).await else { return };
        if let Err(error) = &ended.result {
            if let ShipError::Foreign(key) = error {
                self.give_up(key);
            }
            if !ended.is_waited_for() {
                self.fail(error);
            }
        }
        ended.answer();
        if let Err(error) = self.cover().await {
            self.fail(&error);
        }
        self.checkpoints.begin_requested(&self.chunks);
    }

    /// Ships the log for writes that wait for the bucket.
    async fn ship_for_acks(&mut self) -> Result<(), ShipError> {
        if self
            .context
            .replica
            .bucket_acks()
            .last()
            .is_some_and(|wanted| self.chunks.state().shipped_lsn < wanted)
        {
            self.ship_the_log().await?;
        }
        self.cover().await
    }

    /// Acknowledges shipped writes.
    async fn cover(&mut self) -> Result<(), ShipError> {
        let shipped = self.chunks.state().shipped_lsn;
        self.ack_pause = acks::cover(&self.context, shipped, self.checkpoints.is_anew()).await?;
        Ok(())
    }

    /// Ships chunks and begins a checkpoint, as far as they are due.
    async fn ship_what_is_due(&mut self) -> Result<(), ShipError> {
        if !self.chunks.ships() {
            self.began = None;
            self.chunks.pause();
            return Ok(()); // another replica of the shard does
        }
        self.began.get_or_insert_with(Instant::now);
        if self.context.replica.ranges().is_being_filled() {
            self.chunks.refuse_requests(|| ShipError::Filling);
            return Ok(()); // it may be begun again, under the same names
        }
        if self.checkpoints.is_anew_next() {
            self.checkpoints.begin(&self.chunks);
        }
        if self.chunk_is_due() {
            self.ship_the_log().await?;
            self.dirty_since = None;
        }
        if self.checkpoint_is_due() {
            self.checkpoints.begin(&self.chunks);
        }
        Ok(())
    }

    fn chunk_is_due(&mut self) -> bool {
        let replica = &self.context.replica;
        let shipped = self.chunks.state().shipped_lsn;
        if replica.settled_lsn() <= shipped {
            return false;
        }
        let since = *self.dirty_since.get_or_insert_with(Instant::now);
        since.elapsed() >= self.context.interval
            || replica.log().bytes_after(shipped) >= CHUNK_BYTES_MAX as u64
            || self.chunks.is_waited_for()
    }

    fn checkpoint_is_due(&self) -> bool {
        let replica = &self.context.replica;
        let state = self.chunks.state();
        if !self.chunks.are_usable() {
            return false; // a checkpoint is needed rather than due, or not yet
        }
        let manifest = self.chunks.status().manifest.max(state.went_on_behind.unwrap_or_default());
        let since = Replay {
            bytes: replica.log().bytes_after(manifest),
            records: replica.settled_lsn().0.saturating_sub(manifest.0),
            chunks: state.chunks,
        };
        // A checkpoint that is due only by its many chunks, which waiting bucket writes cause, can
        // wait a little.
        let by_chunks_alone = !checkpoint_is_due(Replay { chunks: 0, ..since });
        checkpoint_is_due(since)
            && !(by_chunks_alone && self.checkpoints.is_recent(CHECKPOINTS_APART))
    }

    /// Ships all settled records, or begins the checkpoint that has to come first.
    async fn ship_the_log(&mut self) -> Result<(), ShipError> {
        if self.chunks.ship_all(self.checkpoints.under_way()).await? == Progress::NeedsCheckpoint {
            self.begin_checkpoint_instead();
        }
        Ok(())
    }

    /// Begins a checkpoint because chunks are not possible. In place of the preferred primary,
    /// which may be back at once, only when a request waits or that has been away for long: the
    /// whole shard is uploaded.
    fn begin_checkpoint_instead(&mut self) {
        let for_long = self.began.is_some_and(|began| began.elapsed() >= SHIP_INSTEAD_AFTER);
        if for_long || !self.chunks.stands_in() || self.chunks.is_waited_for() {
            self.checkpoints.begin(&self.chunks);
        }
    }

    /// Cancels the pauses of failed work when an outage has ended.
    fn hurry_after_an_outage(&mut self) {
        let ended = self.context.bucket.outages_ended();
        if ended != self.outages_ended {
            self.outages_ended = ended;
            self.backoff = Backoff::new();
            self.checkpoints.backoff = Backoff::new();
        }
    }

    /// Handles the result of unrequested work.
    fn conclude(&mut self, result: Result<(), ShipError>) {
        match result {
            Ok(()) => {
                self.backoff.succeeded();
                self.note(None);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Handles a failure: each further attempt is delayed a little more.
    fn fail(&mut self, error: &ShipError) {
        self.note(Some(error));
        match error {
            ShipError::Foreign(key) => self.give_up(key),
            ShipError::Lost(_) => {
                self.checkpoints.distrust();
                self.checkpoints.begin(&self.chunks);
            }
            _ => {}
        }
        self.backoff.failed(rand::random_range(0.5..1.0));
        self.chunks.refuse_requests(|| ShipError::Checkpoint(error.to_string()));
        tracing::warn!(
            %error,
            keyspace = self.context.replica.keyspace.0,
            shard = self.context.replica.shard.0,
            retry_in_ms = self.backoff.pause().as_millis() as u64,
            "shipping failed"
        );
    }

    /// Closes the replica: the bucket holds another history of it. Writes accepted here would never
    /// get there, and that history is not served; no write must be acknowledged on top of it.
    fn give_up(&self, key: &str) {
        let replica = &self.context.replica;
        if replica.closed().is_none() {
            let reason = format!(
                "{OLD_COPY}, or another process uses a copy of it: {key} in the bucket was shipped by this replica and \
                 holds other records; stop whatever uses a copy and put the newer data directory back, or have another \
                 node take over what the bucket holds with `vasto node replace`"
            );
            tracing::error!(
                keyspace = replica.keyspace.0,
                shard = replica.shard.0,
                reason,
                "the replica closes"
            );
            replica.close(reason);
        }
    }

    /// Publishes the fault that keeps this shard from being shipped.
    fn note(&self, trouble: Option<&ShipError>) {
        let replica = &self.context.replica;
        let trouble =
            trouble.map(ToString::to_string).or_else(|| self.checkpoints.trouble().cloned());
        self.context.pace.note((replica.keyspace, replica.shard), trouble);
    }

    /// Ships the rest of the log before the node stops, if the bucket answers.
    async fn end(mut self) {
        self.checkpoints.end();
        if self.chunks.ships() {
            match self.chunks.continue_after_others().await {
                Ok(()) => self.ship_the_rest().await,
                Err(error) => {
                    tracing::warn!(%error, "what others have shipped is not known; the last chunk is not shipped");
                }
            }
        }
        if let Err(error) = self.cover().await {
            tracing::warn!(%error, "the last writes that wait for the bucket are not confirmed");
        }
        self.note(None);
    }

    async fn ship_the_rest(&mut self) {
        while self.context.bucket.outage().is_none()
            && !self.context.replica.ranges().is_being_filled()
            && self.chunks.are_usable()
        {
            match self.chunks.ship_chunk(ALL, None).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(%error, "the last chunk was not shipped");
                    return;
                }
            }
        }
    }
}

/// Waits until a write waits for the bucket; while one does already, for the pause before the next
/// poll.
async fn acks_wanted(replica: &Replica, poll: Option<Duration>) {
    match poll {
        Some(pause) => tokio::time::sleep(pause).await,
        None => replica.bucket_acks().wanted().await,
    }
}
