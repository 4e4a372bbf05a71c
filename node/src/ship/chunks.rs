//! The log as chunks in the bucket: cuts settled records into objects, and owns the position that
//! they have reached.
//!
//! **Invariants**
//! - The position moves only after an object is durable; `ship.json` is written before the position
//!   is published.
//! - A chunk begins exactly after the object before it, or after what other replicas have shipped.
//! - A log that does not reach back to the beginning needs a checkpoint before the first chunk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;
use vasto_core::ids::Lsn;
use vasto_core::limits::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};
use vasto_core::plan::PinnedManifest;
use vasto_shipping::bucket::Create;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout;

use super::behind::{self, OwnLog};
use super::context::ShipContext;
use super::error::{ShipError, blocking};
use super::existing::take_existing;
use super::handle::Waiter;
use super::state::ShipState;
use super::status::{Duty, ShipStatus};
use crate::binlog::BinlogError;

/// No limit for a chunk but the settled log.
pub(super) const ALL: Lsn = Lsn(u64::MAX);

/// A checkpoint under way, as far as the chunks beside it depend on it.
#[derive(Clone)]
pub(super) struct UnderWay {
    /// True while its LSN is being fixed: no chunk may go beyond what was settled before.
    fixing: Arc<AtomicBool>,
    /// True when the checkpoint relies on no object that is in the bucket already.
    pub(super) anew: bool,
}

impl UnderWay {
    pub(super) fn new(anew: bool) -> Self {
        Self { fixing: Arc::default(), anew }
    }

    pub(super) fn set_fixing(&self, fixing: bool) {
        self.fixing.store(fixing, Ordering::SeqCst);
    }

    /// Returns true while its LSN is unknown. Records that were settled before this call are in it.
    fn is_fixing(&self) -> bool {
        self.fixing.load(Ordering::SeqCst)
    }
}

/// How far the log could be shipped.
#[derive(PartialEq, Eq)]
pub(super) enum Progress {
    /// As far as it is settled, or as the checkpoint under way allows.
    Shipped,
    /// No chunk is possible before a checkpoint.
    NeedsCheckpoint,
}

/// The chunks of one replica.
pub(super) struct Chunks {
    context: Arc<ShipContext>,
    duty: watch::Receiver<Duty>,
    status: watch::Sender<ShipStatus>,
    state: ShipState,
    /// Upper bound of the bytes of the next chunk: halved by failed attempts, doubled by successful
    /// ones.
    bytes_max: usize,
    /// The archives of the others were read when this replica began to ship.
    read_others: bool,
    /// Requests for the log up to an LSN to be in the bucket.
    requests: Vec<(Lsn, Waiter<()>)>,
}

impl Chunks {
    /// Continues at the position in `ship.json`, and publishes it.
    pub(super) fn open(
        context: Arc<ShipContext>,
        duty: watch::Receiver<Duty>,
        status: watch::Sender<ShipStatus>,
    ) -> Self {
        let state = ShipState::read(&context.dir);
        let chunks = Self {
            context,
            duty,
            status,
            state,
            bytes_max: CHUNK_BYTES_MAX,
            read_others: false,
            requests: Vec::new(),
        };
        chunks.publish();
        chunks
    }

    pub(super) fn state(&self) -> &ShipState {
        &self.state
    }

    pub(super) fn status(&self) -> ShipStatus {
        *self.status.borrow()
    }

    /// Returns true when this replica ships: for its shard, for clients, or on request.
    pub(super) fn ships(&self) -> bool {
        self.duty.borrow().ships() || self.status().for_acks || !self.requests.is_empty()
    }

    /// Returns true when this replica is not the one that ships while all are well.
    pub(super) fn stands_in(&self) -> bool {
        self.duty.borrow().stands_in()
    }

    /// Returns true when a request or a write waits until the bucket covers the log.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.requests.is_empty() || self.context.replica.bucket_acks().last().is_some()
    }

    /// Returns true when the replica began with more than its log holds.
    fn began_full(&self) -> bool {
        self.state.began_full || self.context.replica.ranges().ingested.is_some()
    }

    /// Returns true when chunks are usable: a log that does not reach back to the beginning needs a
    /// checkpoint, or another replica's archive that it follows.
    pub(super) fn are_usable(&self) -> bool {
        self.state.manifest.is_some() || self.state.went_on_behind.is_some() || !self.began_full()
    }

    /// Ships from now on, because a client has requested a bucket acknowledgement here.
    pub(super) fn ship_for_acks(&self) {
        self.status.send_modify(|status| status.for_acks = true);
    }

    /// Adds a request for the log up to its current end.
    pub(super) fn request(&mut self, done: Waiter<()>) {
        self.requests.push((self.context.replica.settled_lsn(), done));
    }

    /// Completes the requests whose log is shipped.
    pub(super) fn answer_requests(&mut self) {
        let shipped = self.state.shipped_lsn;
        for (_, waiter) in self.requests.extract_if(.., |(lsn, _)| *lsn <= shipped) {
            let _ = waiter.send(Ok(()));
        }
    }

    /// Fails all requests.
    pub(super) fn refuse_requests(&mut self, error: impl Fn() -> ShipError) {
        for (_, waiter) in self.requests.drain(..) {
            let _ = waiter.send(Err(error()));
        }
    }

    /// Makes the next beginning read the archives of the others once more.
    pub(super) fn pause(&mut self) {
        self.read_others = false;
    }

    /// Reads the archives of the others, once, when this replica begins to ship, and continues
    /// after them.
    pub(super) async fn continue_after_others(&mut self) -> Result<(), ShipError> {
        let shipped = self.state.shipped_lsn;
        let reaches = self.are_usable() && self.context.replica.log().first_lsn() <= shipped.next();
        if self.read_others || (!self.stands_in() && reaches) {
            return Ok(());
        }
        let own = match reaches {
            true => OwnLog::Behind(shipped),
            false => OwnLog::Cut { began_full: self.began_full() },
        };
        let place = match behind::find(&self.context, own).await {
            Err(ShipError::Log(BinlogError::TooOld { .. })) => return Ok(()), // cut meanwhile
            place => place?,
        };
        if let Some(place) = place {
            self.state.continue_after(place.covered, place.previous, place.chunks);
            self.save()?;
        }
        self.read_others = true;
        Ok(())
    }

    /// Ships all settled records, as far as that is possible before a checkpoint.
    pub(super) async fn ship_all(
        &mut self,
        checkpoint: Option<&UnderWay>,
    ) -> Result<Progress, ShipError> {
        self.continue_after_others().await?;
        if !self.are_usable() {
            return Ok(Progress::NeedsCheckpoint);
        }
        let settled = self.context.replica.settled_lsn();
        while self.state.shipped_lsn < settled {
            match self.ship_chunk(ALL, checkpoint).await {
                // The log was truncated here at its cap: a checkpoint supersedes the missing part.
                Err(ShipError::Log(BinlogError::TooOld { .. })) => {
                    return Ok(Progress::NeedsCheckpoint);
                }
                Ok(false) => break,
                shipped => shipped?,
            };
        }
        Ok(Progress::Shipped)
    }

    /// Ships the next chunk, with no record after `limit`; returns false when there is none now.
    #[tracing::instrument(name = "ship a chunk", skip_all, fields(keyspace = self.context.replica.keyspace.0, shard = self.context.replica.shard.0))]
    pub(super) async fn ship_chunk(
        &mut self,
        limit: Lsn,
        checkpoint: Option<&UnderWay>,
    ) -> Result<bool, ShipError> {
        let context = self.context.clone();
        let after = self.state.shipped_lsn;
        let settled = context.replica.settled_lsn().min(limit);
        // Asked after the settled LSN is read: the chunk would reach into what the checkpoint does
        // not hold.
        if checkpoint.is_some_and(UnderWay::is_fixing) || settled <= after {
            return Ok(false);
        }
        // The bytes are held twice: as records and as the object.
        let memory = 2 * context.replica.log().bytes_after(after).min(self.bytes_max as u64);
        let _turn = context.pace.log_turn(memory).await.ok_or(ShipError::Stopped)?;
        self.check_previous(checkpoint).await?;
        let Some(chunk) = self.read_chunk(after, settled).await? else { return Ok(false) };
        let key = layout::chunk(chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn);
        let last = self.create(&key, chunk).await?;
        self.state.add_chunk(key, last);
        self.bytes_max = (self.bytes_max * 2).min(CHUNK_BYTES_MAX);
        self.save()?;
        Ok(true)
    }

    /// Records a published manifest, which supersedes so many chunks.
    pub(super) fn add_manifest(
        &mut self,
        manifest: PinnedManifest,
        superseded: u64,
    ) -> Result<(), ShipError> {
        self.state.add_manifest(manifest, superseded);
        self.save()
    }

    /// While clients wait for the bucket, checks that it still holds the object that the next chunk
    /// builds on.
    async fn check_previous(&mut self, checkpoint: Option<&UnderWay>) -> Result<(), ShipError> {
        if let Some(previous) = self.state.previous.clone().filter(|_| self.status().for_acks)
            && self.context.bucket.head(&previous).await?.is_none()
        {
            self.state.previous = None;
            // The checkpoint that uploads everything anew ships the log up to it as well.
            if !checkpoint.is_some_and(|checkpoint| checkpoint.anew) {
                return Err(ShipError::Lost(previous));
            }
        }
        Ok(())
    }

    /// Reads the records of the next chunk; `None` when the log has none up to `settled`.
    async fn read_chunk(&self, after: Lsn, settled: Lsn) -> Result<Option<Chunk>, ShipError> {
        let replica = &self.context.replica;
        let (log, bytes_max) = (replica.log().clone(), self.bytes_max);
        let records = blocking(move || log.reader(after)?.next_batch(bytes_max)).await?;
        let mut body = Vec::with_capacity(records.iter().map(|(_, bytes)| bytes.len()).sum());
        let mut last = after;
        for (lsn, bytes) in records.into_iter().take_while(|(lsn, _)| *lsn <= settled) {
            body.extend_from_slice(&bytes);
            last = lsn;
        }
        Ok((last > after).then(|| Chunk {
            keyspace: replica.keyspace,
            shard: replica.shard,
            replica: replica.id,
            first_lsn: after.next(),
            last_lsn: last,
            previous: self.state.previous.clone(),
            records: body,
        }))
    }

    /// Creates the object of a chunk; returns the last LSN that it covers. An object of an earlier
    /// attempt may hold fewer or more of the same records.
    async fn create(&mut self, key: &str, chunk: Chunk) -> Result<Lsn, ShipError> {
        let last = chunk.last_lsn;
        let encoded = chunk.encode();
        drop(chunk);
        match self.context.bucket.create(key, encoded.clone()).await {
            Ok(Create::Created) => Ok(last),
            Ok(Create::Exists(existing)) => {
                let ours = Chunk::decode(&encoded).map_err(|error| ShipError::InTheWay {
                    key: key.to_owned(),
                    what: format!("what is here: {error}"),
                })?;
                let place =
                    |chunk: &Chunk| (chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn);
                Ok(take_existing(key, Chunk::decode(&existing), &ours, place, begin_alike)?
                    .last_lsn)
            }
            Err(error) => {
                // An upload that takes too long as a whole may succeed in parts.
                self.bytes_max = (self.bytes_max / 2).max(CHUNK_BYTES_MIN);
                Err(error.into())
            }
        }
    }

    fn save(&self) -> Result<(), ShipError> {
        self.state.write(&self.context.dir)?;
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        self.status.send_modify(|status| {
            // The status never claims more than is covered without a gap.
            status.chained_from = self.state.chained_from();
            status.shipped = self.state.shipped_lsn;
            status.behind = self.state.ships_behind();
            status.manifest = self.state.manifest_lsn().unwrap_or(status.manifest);
        });
    }
}

/// Returns true when two chunks hold the same records as far as both reach.
fn begin_alike(a: &Chunk, b: &Chunk) -> bool {
    let common = a.records.len().min(b.records.len());
    a.records[..common] == b.records[..common]
}
