//! Ships one replica to the bucket: chunks of its log, and checkpoints.
//!
//! Order: SSTs, verified, then the manifest. A checkpoint is made and uploaded in the background: the log
//! continues to be shipped and truncated meanwhile. Once its LSN is known a chunk ends there, so that the
//! next one begins exactly behind it.
//!
//! The preferred primary of a shard ships; an acting primary continues behind what that has shipped.
//!
//! **Invariants**
//! - Only settled records (synced and applied) are shipped; names are never reused: an object that exists
//!   under a chunk's name is compared, not overwritten.
//! - An SST is uploaded again unless the last manifest of this very replica names it, or, before there is
//!   one, the manifest that a restored keyspace was begun with.
//! - A bucket write is acknowledged only while no catalog version lets the shard continue without this
//!   replica: after the chunk, no version of the catalog exists that it has not applied.
//! - The log is truncated only behind what is persisted in the database **and** covered by the
//!   bucket **and** not needed by a running plan; at the byte cap the bucket's cover is given up.
//! - An outage of the bucket never stops serving. An idle replica makes no requests.
//!
//! Leaks: SSTs of a checkpoint that did not reach its manifest (removed by garbage collection).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vasto_core::CatalogVersion;
use vasto_core::ids::Lsn;
use vasto_core::limits::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, SHIP_INSTEAD_AFTER};
use vasto_core::plan::PinnedManifest;
use vasto_core::record::BandRange;
use vasto_shipping::bucket::{Bucket, BucketError, Create};
use vasto_shipping::chunk::Chunk;
use vasto_shipping::due::{Replay, checkpoint_is_due};
use vasto_shipping::layout;
use vasto_shipping::manifest::Manifest;

use crate::binlog::BinlogError;
use crate::clock::{SharedClock, with_others};
use crate::engine::{EngineError, EngineShared};
use crate::node_dir::{DirError, read_json, write_json};
use crate::old_copy::OLD_COPY;
use crate::replica::Replica;
use crate::replica::command::{ReplicaError, Role};

mod behind;
mod checkpoint;
mod cut;
mod pace;

pub use pace::Pace;
#[cfg(test)]
pub use pace::UPLOADS_MAX;

use checkpoint::{Making, Uploaded};

/// Interval between two polls for pending work.
const TICK: Duration = Duration::from_millis(500);
/// The same while everything is shipped; growth of the log wakes the shipper.
const LOOK_AT_REST: Duration = Duration::from_secs(10);
/// Maximum pause after failures.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Minimum interval between checkpoints that are due by the number of chunks alone.
const CHECKPOINTS_APART: Duration = Duration::from_secs(600);
/// Interval of polls while a write waits for the bucket: its record is about to be settled ...
const ACK_SOON: Duration = Duration::from_millis(1);
/// ... or the node is about to apply the version that blocks the acknowledgement.
const ACK_FENCED: Duration = Duration::from_millis(50);

/// Why shipping failed; it is retried.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The database failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] BinlogError),
    /// A local file failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// An object with other content is in the bucket under this replica's name.
    #[error(
        "object {0} exists with other content: does another process use a copy of this data directory? Stop one of them"
    )]
    Foreign(String),
    /// An object is in the way that says nothing about this replica.
    #[error(
        "object {key} is in the way and not what this replica ships: {what}; `vasto bucket fsck` names what else is \
         damaged, and `vasto keyspace checkpoint` goes on behind it"
    )]
    InTheWay {
        /// The object.
        key: String,
        /// Its content.
        what: String,
    },
    /// A file of the checkpoint cannot be interpreted.
    #[error("the checkpoint cannot be described: {0}")]
    Checkpoint(String),
    /// The replica refused a request.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica is still being filled.
    #[error("the replica is still being filled; it has a checkpoint once it is")]
    Filling,
    /// The upload stalled; its first objects may be garbage collected by now.
    #[error("the upload of a checkpoint took {} s, longer than garbage collection can be trusted to wait; it starts over", .0.as_secs())]
    Stalled(Duration),
    /// The bucket has lost objects that this replica has shipped.
    #[error(
        "object {0} is not in the bucket any more: what was shipped is shipped again; run `vasto bucket fsck` to see \
         what else is missing, and `vasto bucket repair`"
    )]
    Lost(String),
    /// The bucket has lost the catalog.
    #[error("object {0} is not in the bucket any more; run `vasto bucket repair` to put the catalog back")]
    NoCatalog(String),
    /// The shipper has ended.
    #[error("the node is stopping")]
    Stopped,
}

/// Coverage of the log by the bucket, for reports and truncation.
#[derive(Debug, Default)]
pub struct Positions {
    /// LSN up to which chunks and manifests cover the log.
    pub shipped: AtomicU64,
    /// LSN up to which the last manifest covers the log.
    pub manifest: AtomicU64,
    /// LSN after which a running plan needs the log; `u64::MAX` when none does, 0 until that is known.
    pub needed_after: AtomicU64,
    /// The plan can read log that is not here any more from the bucket.
    pub needed_from_bucket: AtomicBool,
    /// LSN from which chunks cover the log without a gap, up to `shipped`.
    pub chained_from: AtomicU64,
    /// The log is at its cap and only a running plan keeps it: the plan has to end.
    pub over_cap: AtomicBool,
    /// The log is at its cap and only a follower keeps it: the follower has to be evicted.
    pub held_back: AtomicBool,
    /// This replica ships for its shard.
    pub ships: AtomicBool,
    /// This replica ships in place of the preferred primary, which is away.
    pub stands_in: AtomicBool,
    /// A client has requested a bucket acknowledgement here: from then on this replica ships too.
    pub for_acks: AtomicBool,
}

impl Positions {
    /// Returns true when truncation of the log waits for the bucket.
    fn does_ship(&self) -> bool {
        self.ships.load(Ordering::Acquire) || self.for_acks.load(Ordering::Acquire)
    }
}

/// Shipping state in `ship.json`; only a hint: the bucket decides.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct ShipState {
    shipped_lsn: Lsn,
    manifest: Option<PinnedManifest>,
    previous: Option<String>,
    /// The log does not hold the records that the replica began with: a checkpoint precedes the first chunk.
    #[serde(default)]
    began_full: bool,
    /// The manifest of another keyspace whose files the database began with: they need no second upload
    /// as long as the plan that restores this keyspace keeps them.
    #[serde(default)]
    inherited: Option<String>,
    /// Chunks behind the last manifest.
    #[serde(default)]
    chunks: u64,
    /// LSN from which chunks cover the log without a gap; unknown in files of older versions.
    #[serde(default)]
    chained_from: Option<Lsn>,
    /// LSN up to which archives of others covered the log when this replica continued behind them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    went_on_behind: Option<Lsn>,
}

impl ShipState {
    fn chained_from(&self) -> Lsn {
        self.chained_from.unwrap_or(self.shipped_lsn)
    }
}

/// Records, for a replica that is not open yet, that its log does not hold everything.
pub(crate) fn begin_with_a_checkpoint(dir: &Path) -> Result<(), DirError> {
    begin(dir, None)
}

/// Does the same for a database that begins with the files of another keyspace's checkpoint.
pub(crate) fn begin_with_files_of(dir: &Path, manifest: &str) -> Result<(), DirError> {
    begin(dir, Some(manifest.to_owned()))
}

/// Returns the LSN up to which a replica that is not open has shipped, by its own record.
pub(crate) fn shipped_by(dir: &Path) -> Lsn {
    let state: Option<ShipState> = read_json(&dir.join("ship.json")).ok().flatten();
    state.unwrap_or_default().shipped_lsn
}

fn begin(dir: &Path, inherited: Option<String>) -> Result<(), DirError> {
    std::fs::create_dir_all(dir).map_err(|source| DirError::Io { path: dir.to_owned(), source })?;
    write_json(&dir.join("ship.json"), &ShipState { began_full: true, inherited, ..ShipState::default() })
}

/// A request to a shipper.
pub enum ShipRequest {
    /// A checkpoint of the current state. The `compact` bands are rewritten first when that saves readers
    /// more than it costs.
    Checkpoint {
        /// Bands that a plan is about to read.
        compact: Option<BandRange>,
        /// Receives the manifest.
        done: oneshot::Sender<Result<PinnedManifest, ShipError>>,
    },
    /// The log up to its current end, whichever replica ships otherwise.
    Log {
        /// Notified once the bucket covers it.
        done: oneshot::Sender<Result<(), ShipError>>,
    },
    /// A checkpoint that trusts nothing in the bucket: everything is uploaded.
    Anew {
        /// Receives the manifest.
        done: oneshot::Sender<Result<PinnedManifest, ShipError>>,
    },
    /// A change of its role: the shipper checks whether it ships.
    Look,
}

/// A handle to a replica's shipper.
#[derive(Clone)]
pub struct ShipHandle {
    requests: mpsc::UnboundedSender<ShipRequest>,
    /// Coverage of the log by the bucket.
    pub positions: Arc<Positions>,
}

impl ShipHandle {
    /// Makes a checkpoint and waits for its manifest.
    pub async fn checkpoint(&self, compact: Option<BandRange>) -> Result<PinnedManifest, ShipError> {
        let (done, answer) = oneshot::channel();
        self.requests.send(ShipRequest::Checkpoint { compact, done }).map_err(|_| ShipError::Stopped)?;
        answer.await.map_err(|_| ShipError::Stopped)?
    }

    /// Waits until the bucket covers the log up to its current end; this replica ships it if no other does.
    pub async fn log(&self) -> Result<(), ShipError> {
        let (done, answer) = oneshot::channel();
        self.requests.send(ShipRequest::Log { done }).map_err(|_| ShipError::Stopped)?;
        answer.await.map_err(|_| ShipError::Stopped)?
    }

    /// Notifies the shipper that its role has changed.
    pub(crate) fn look(&self) {
        let _ = self.requests.send(ShipRequest::Look);
    }

    /// Uploads everything again, when this replica ships; `None` when it does not.
    pub async fn checkpoint_anew(&self) -> Result<Option<PinnedManifest>, ShipError> {
        if !self.positions.ships.load(Ordering::Acquire) {
            return Ok(None);
        }
        let (done, answer) = oneshot::channel();
        self.requests.send(ShipRequest::Anew { done }).map_err(|_| ShipError::Stopped)?;
        answer.await.map_err(|_| ShipError::Stopped)?.map(Some)
    }
}

/// Context of a shipper.
pub struct ShipContext {
    /// The replica.
    pub replica: Replica,
    /// The bucket to ship to.
    pub bucket: Bucket,
    /// Its directory, for `ship.json`.
    pub dir: PathBuf,
    /// Directory for checkpoints on the same file system.
    pub tmp: PathBuf,
    /// Shared engine state, to open checkpoints.
    pub engines: EngineShared,
    /// Clock for the time in manifests.
    pub clock: SharedClock,
    /// Interval between two chunks.
    pub interval: Duration,
    /// Upper bound of the log bytes that are kept.
    pub log_cap: u64,
    /// Limits that all uploads of the node share.
    pub pace: Arc<Pace>,
}

type Waiter = oneshot::Sender<Result<PinnedManifest, ShipError>>;

struct Shipper {
    context: ShipContext,
    positions: Arc<Positions>,
    state: ShipState,
    last: Option<Manifest>,
    dirty_since: Option<Instant>,
    pause: Duration,
    not_before: Instant,
    /// The checkpoint under way.
    making: Option<Making>,
    /// Requests for the following checkpoint.
    wanted: Vec<(Option<BandRange>, Waiter)>,
    /// When the last checkpoint was published.
    published: Option<Instant>,
    /// Pause before the next unrequested checkpoint; grows with each failure.
    checkpoint_pause: Duration,
    checkpoint_not_before: Instant,
    /// Files uploaded by attempts that did not reach their manifest.
    uploaded: Arc<Uploaded>,
    ack_pause: Duration,
    /// Requests for the log up to an LSN to be in the bucket.
    log_wanted: Vec<(Lsn, oneshot::Sender<Result<(), ShipError>>)>,
    /// Since when it has been shipping without interruption.
    began: Option<Instant>,
    /// The archives of the others were read when it began to ship.
    looked: bool,
    /// Upper bound of the bytes of the next chunk: halved by failed attempts, doubled by successful ones.
    chunk_bytes: usize,
    /// The next checkpoint trusts nothing in the bucket.
    anew: bool,
    /// Why the last checkpoint failed.
    checkpoint_trouble: Option<String>,
    /// Number of ended outages of the bucket at the last failure.
    outages_ended: u64,
}

/// Starts a shipper; it ends when `cancel` fires, after it has shipped what is due.
pub fn start(context: ShipContext, cancel: CancellationToken) -> (ShipHandle, impl Future<Output = ()> + Send) {
    let positions = Arc::new(Positions::default());
    let (requests, receiver) = mpsc::unbounded_channel();
    let handle = ShipHandle { requests, positions: positions.clone() };
    let shipper = async move {
        let state: ShipState = match read_json(&context.dir.join("ship.json")) {
            Ok(state) => state.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "the shipping position is lost; the next checkpoint replaces it");
                ShipState { began_full: true, ..ShipState::default() }
            }
        };
        positions.chained_from.store(state.chained_from().0, Ordering::Release);
        positions.shipped.store(state.shipped_lsn.0, Ordering::Release);
        positions.manifest.store(state.manifest.as_ref().map_or(0, |manifest| manifest.lsn.0), Ordering::Release);
        let now = Instant::now();
        let shipper = Shipper {
            context,
            positions,
            state,
            last: None,
            dirty_since: None,
            pause: TICK,
            not_before: now,
            making: None,
            wanted: Vec::new(),
            published: None,
            checkpoint_pause: TICK,
            checkpoint_not_before: now,
            uploaded: Arc::default(),
            ack_pause: ACK_SOON,
            log_wanted: Vec::new(),
            began: None,
            looked: false,
            chunk_bytes: CHUNK_BYTES_MAX,
            anew: false,
            checkpoint_trouble: None,
            outages_ended: 0,
        };
        shipper.run(receiver, cancel).await;
    };
    (handle, shipper)
}

impl Shipper {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<ShipRequest>, cancel: CancellationToken) {
        let mut due = Instant::now();
        let replica = self.context.replica.clone();
        // Independent of all waits for the bucket: the log stays bounded whatever the bucket does.
        let cut = cut::Cut::new(replica.clone(), self.positions.clone(), self.context.log_cap, self.context.interval);
        let _cutting = AbortOnDropHandle::new(tokio::spawn(cut.run(TICK)));
        let mut grown = replica.log().subscribe();
        loop {
            grown.mark_unchanged();
            let rests = self.is_at_rest();
            let now = Instant::now();
            let for_acks = self.positions.for_acks.load(Ordering::Acquire);
            let acks_wait = for_acks && now >= self.not_before && replica.bucket_acks().last().is_some();
            let pause = self.ack_pause;
            let acks = async {
                match acks_wait {
                    true => tokio::time::sleep(pause).await,
                    false => replica.bucket_acks().wanted().await,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => break,
                request = requests.recv() => match request {
                    Some(ShipRequest::Checkpoint { compact, done }) => {
                        self.wanted.push((compact, done));
                        self.make_what_is_wanted();
                    }
                    Some(ShipRequest::Log { done }) => {
                        self.log_wanted.push((replica.settled_lsn(), done));
                        if let Err(error) = self.ship_log().await {
                            self.fail(&error);
                        }
                    }
                    Some(ShipRequest::Anew { done }) => {
                        self.distrust();
                        self.wanted.push((None, done));
                        self.make_what_is_wanted();
                    }
                    Some(ShipRequest::Look) => due = Instant::now(),
                    None => break,
                },
                made = checkpoint::made(&mut self.making) => self.go_on(made).await,
                () = acks => {
                    self.positions.for_acks.store(true, Ordering::Release);
                    if Instant::now() >= self.not_before
                        && let Err(error) = self.ship_for_acks().await
                    {
                        self.fail(&error);
                    }
                }
                _ = grown.changed(), if rests => {}
                () = tokio::time::sleep_until(if rests { with_others(due + LOOK_AT_REST) } else { due }) => {
                    due = Instant::now() + TICK;
                    self.hurry_after_an_outage();
                    if Instant::now() >= self.not_before
                        && let Err(error) = self.ship_what_is_due().await
                    {
                        self.fail(&error);
                    }
                }
            }
            self.answer_for_the_log();
        }
        self.making = None;
        // The rest of the log is shipped before the node stops, if the bucket answers.
        let mut goes_on = self.ships();
        if goes_on && let Err(error) = self.go_on_behind_others().await {
            tracing::warn!(%error, "what others have shipped is not known; the last chunk is not shipped");
            goes_on = false;
        }
        while goes_on
            && self.context.bucket.outage().is_none()
            && !self.context.replica.ranges().is_being_filled()
            && self.may_ship_chunks()
            && self.state.shipped_lsn < self.context.replica.settled_lsn()
        {
            if let Err(error) = self.ship_chunk(Lsn(u64::MAX)).await {
                tracing::warn!(%error, "the last chunk was not shipped");
                break;
            }
        }
        if let Err(error) = self.cover().await {
            tracing::warn!(%error, "the last writes that wait for the bucket are not confirmed");
        }
        self.checkpoint_trouble = None;
        self.note(None);
    }

    /// Publishes the fault that keeps this shard from being shipped.
    fn note(&self, trouble: Option<&ShipError>) {
        let replica = &self.context.replica;
        let trouble = trouble.map(ToString::to_string).or_else(|| self.checkpoint_trouble.clone());
        self.context.pace.note((replica.keyspace, replica.shard), trouble);
    }

    /// Returns true when there is no work before the log grows or a request arrives.
    fn is_at_rest(&self) -> bool {
        let replica = &self.context.replica;
        let ships = self.ships();
        let is_shipped = replica.log().appended_lsn() <= self.state.shipped_lsn && self.may_ship_chunks();
        (is_shipped || !ships)
            && self.began.is_some() == ships
            && self.pause == TICK
            && self.making.is_none()
            && !self.anew
            && self.checkpoint_trouble.is_none()
            && !replica.ranges().is_being_filled()
    }

    /// Cancels the pauses of failed work when an outage has ended.
    fn hurry_after_an_outage(&mut self) {
        let ended = self.context.bucket.outages_ended();
        if ended != self.outages_ended {
            self.outages_ended = ended;
            (self.not_before, self.pause) = (Instant::now(), TICK);
            (self.checkpoint_not_before, self.checkpoint_pause) = (Instant::now(), TICK);
        }
    }

    /// Makes the next checkpoint upload everything.
    fn distrust(&mut self) {
        self.anew = true;
        self.uploaded.forget();
    }

    /// Handles a failure: each further attempt is delayed a little more.
    fn fail(&mut self, error: &ShipError) {
        self.note(Some(error));
        match error {
            ShipError::Foreign(key) => self.give_up(key),
            ShipError::Lost(_) => {
                self.distrust();
                self.begin_checkpoint();
            }
            _ => {}
        }
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        self.not_before = Instant::now() + self.pause.mul_f64(rand::random_range(0.5..1.0));
        for (_, waiter) in self.log_wanted.drain(..) {
            let _ = waiter.send(Err(ShipError::Checkpoint(error.to_string())));
        }
        tracing::warn!(
            %error,
            keyspace = self.context.replica.keyspace.0,
            shard = self.context.replica.shard.0,
            retry_in_ms = self.pause.as_millis() as u64,
            "shipping failed"
        );
    }

    /// Closes the replica: the bucket holds another history of it. Writes accepted here would never get there, and
    /// that history is not served; no write must be acknowledged on top of it.
    fn give_up(&self, key: &str) {
        let replica = &self.context.replica;
        if replica.closed().is_none() {
            let reason = format!(
                "{OLD_COPY}, or another process uses a copy of it: {key} in the bucket was shipped by this replica and \
                 holds other records; stop whatever uses a copy and put the newer data directory back, or have another \
                 node take over what the bucket holds with `vasto node replace`"
            );
            tracing::error!(keyspace = replica.keyspace.0, shard = replica.shard.0, reason, "the replica closes");
            replica.close(reason);
        }
    }

    /// Ships the log for writes that wait for the bucket.
    async fn ship_for_acks(&mut self) -> Result<(), ShipError> {
        if let Some(wanted) = self.context.replica.bucket_acks().last()
            && self.state.shipped_lsn < wanted
        {
            self.ship_the_log().await?;
        }
        self.cover().await?;
        self.pause = TICK;
        self.note(None);
        Ok(())
    }

    /// Acknowledges shipped writes: no other replica may have taken over what the bucket held before.
    async fn cover(&mut self) -> Result<(), ShipError> {
        let replica = &self.context.replica;
        let waits_for_what_is_there =
            replica.bucket_acks().first().is_some_and(|first| first <= self.state.shipped_lsn);
        // A chunk is no acknowledgement while the objects that it builds on are being uploaded again.
        if !waits_for_what_is_there || self.is_anew() {
            self.ack_pause = ACK_SOON;
            return Ok(());
        }
        // A replica that left its placement acknowledges no more writes: its archive may have been read already.
        if replica.view().role == Role::Detached {
            replica.bucket_acks().abandon();
            return Ok(());
        }
        let known = replica.version();
        let version = |n: u64| layout::catalog_version(replica.keyspace, CatalogVersion(n));
        let (next, this) = (version(known.0 + 1), version(known.0));
        let bucket = &self.context.bucket;
        let (next, found) = tokio::try_join!(bucket.head(&next), bucket.head(&this))?;
        // Readers find the data by the catalog.
        if next.is_none() && found.is_none() {
            return Err(ShipError::NoCatalog(this));
        }
        let overtaken = next.is_some();
        if overtaken || replica.version() != known || replica.view().role == Role::Detached {
            self.ack_pause = ACK_FENCED;
            return Ok(());
        }
        self.ack_pause = ACK_SOON;
        replica.bucket_acks().covered(self.state.shipped_lsn);
        Ok(())
    }

    async fn ship_what_is_due(&mut self) -> Result<(), ShipError> {
        self.ship_log().await?;
        self.pause = TICK;
        self.note(None);
        Ok(())
    }

    /// Returns true when the replica began with more than its log holds.
    fn began_full(&self) -> bool {
        self.state.began_full || self.context.replica.ranges().ingested.is_some()
    }

    /// Returns true when chunks are usable: a log that does not reach back to the beginning needs a checkpoint,
    /// or another replica's archive that it follows.
    fn may_ship_chunks(&self) -> bool {
        self.state.manifest.is_some() || self.state.went_on_behind.is_some() || !self.began_full()
    }

    fn ships(&self) -> bool {
        self.positions.does_ship() || !self.log_wanted.is_empty()
    }

    /// Returns true when this replica is not the one that ships while all are well.
    fn stands_in(&self) -> bool {
        self.positions.stands_in.load(Ordering::Acquire) || !self.positions.ships.load(Ordering::Acquire)
    }

    /// Returns true when a request or a write waits until the bucket covers the log.
    fn is_waited_for(&self) -> bool {
        !self.log_wanted.is_empty() || self.context.replica.bucket_acks().last().is_some()
    }

    /// Begins a checkpoint because chunks are not possible. In place of the preferred primary, which may be back at
    /// once, only when a request waits or that has been away for long: the whole shard is uploaded.
    fn begin_checkpoint_instead(&mut self) {
        let for_long = self.began.is_some_and(|began| began.elapsed() >= SHIP_INSTEAD_AFTER);
        if for_long || !self.stands_in() || self.is_waited_for() {
            self.begin_checkpoint();
        }
    }

    /// Completes the requests whose log is shipped.
    fn answer_for_the_log(&mut self) {
        let shipped = self.state.shipped_lsn;
        for (_, waiter) in self.log_wanted.extract_if(.., |(lsn, _)| *lsn <= shipped) {
            let _ = waiter.send(Ok(()));
        }
    }

    async fn ship_log(&mut self) -> Result<(), ShipError> {
        let replica = self.context.replica.clone();
        if !self.ships() {
            (self.began, self.looked) = (None, false);
            return Ok(()); // another replica of the shard does
        }
        self.began.get_or_insert_with(Instant::now);
        if replica.ranges().is_being_filled() {
            for (_, waiter) in self.log_wanted.drain(..) {
                let _ = waiter.send(Err(ShipError::Filling));
            }
            return Ok(()); // it may be begun again, under the same names
        }
        if self.anew {
            self.begin_checkpoint();
        }
        let settled = replica.settled_lsn();
        if settled > self.state.shipped_lsn {
            let since = *self.dirty_since.get_or_insert_with(Instant::now);
            let backlog = replica.log().bytes_after(self.state.shipped_lsn);
            let waited_for = self.is_waited_for();
            if since.elapsed() >= self.context.interval || backlog >= CHUNK_BYTES_MAX as u64 || waited_for {
                self.ship_the_log().await?;
                self.dirty_since = None;
            }
        }
        let manifest = Lsn(self.positions.manifest.load(Ordering::Acquire));
        let manifest = self.state.went_on_behind.unwrap_or_default().max(manifest);
        if !self.may_ship_chunks() {
            return Ok(()); // a checkpoint is needed rather than due, or not yet
        }
        let since = Replay {
            bytes: replica.log().bytes_after(manifest),
            records: settled.0.saturating_sub(manifest.0),
            chunks: self.state.chunks,
        };
        // A checkpoint that is due only by its many chunks, which waiting bucket writes cause, can wait a little.
        let by_chunks_alone = !checkpoint_is_due(Replay { chunks: 0, ..since });
        let lately = self.published.is_some_and(|at| at.elapsed() < CHECKPOINTS_APART);
        if checkpoint_is_due(since) && !(by_chunks_alone && lately) {
            self.begin_checkpoint();
        }
        Ok(())
    }

    /// Ships all settled records, as far as that is possible before a checkpoint.
    async fn ship_the_log(&mut self) -> Result<(), ShipError> {
        self.go_on_behind_others().await?;
        if !self.may_ship_chunks() {
            self.begin_checkpoint_instead();
            return Ok(());
        }
        let settled = self.context.replica.settled_lsn();
        while self.state.shipped_lsn < settled {
            let before = self.state.shipped_lsn;
            match self.ship_chunk(Lsn(u64::MAX)).await {
                Err(ShipError::Log(BinlogError::TooOld { .. })) => {
                    // The log was truncated here at its cap: a checkpoint supersedes the missing part.
                    self.begin_checkpoint_instead();
                    return Ok(());
                }
                other => other?,
            }
            if self.state.shipped_lsn == before {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Ships the next chunk, with no record behind `limit`.
    #[tracing::instrument(name = "ship a chunk", skip_all, fields(keyspace = self.context.replica.keyspace.0, shard = self.context.replica.shard.0))]
    async fn ship_chunk(&mut self, limit: Lsn) -> Result<(), ShipError> {
        let replica = self.context.replica.clone();
        let after = self.state.shipped_lsn;
        let settled = replica.settled_lsn().min(limit);
        if self.is_fixing() {
            return Ok(()); // the chunk would reach into what the checkpoint does not hold
        }
        let (log, bytes_max) = (replica.log().clone(), self.chunk_bytes);
        if settled <= after {
            return Ok(());
        }
        // The bytes are held twice: as records and as the object.
        let memory = 2 * log.bytes_after(after).min(bytes_max as u64);
        let pace = self.context.pace.clone();
        let _turn = pace.log_turn(memory).await.ok_or(ShipError::Stopped)?;
        if let Some(previous) = self.state.previous.clone().filter(|_| self.positions.for_acks.load(Ordering::Acquire))
            && self.context.bucket.head(&previous).await?.is_none()
        {
            self.state.previous = None;
            // The checkpoint that uploads everything anew ships the log up to it as well.
            if !self.making.as_ref().is_some_and(Making::is_anew) {
                return Err(ShipError::Lost(previous));
            }
        }
        let records = blocking(move || log.reader(after)?.next_batch(bytes_max)).await?;
        let mut body = Vec::with_capacity(records.iter().map(|(_, bytes)| bytes.len()).sum());
        let mut last = after;
        for (lsn, bytes) in records {
            if lsn > settled {
                break;
            }
            body.extend_from_slice(&bytes);
            last = lsn;
        }
        if last == after {
            return Ok(());
        }
        let chunk = Chunk {
            keyspace: replica.keyspace,
            shard: replica.shard,
            replica: replica.id,
            first_lsn: after.next(),
            last_lsn: last,
            previous: self.state.previous.clone(),
            records: body,
        };
        let key = layout::chunk(replica.keyspace, replica.shard, replica.id, after.next());
        let encoded = chunk.encode();
        drop(chunk);
        match self.context.bucket.create(&key, encoded.clone()).await {
            Ok(Create::Created) => {}
            Ok(Create::Exists(found)) => {
                // Shipped before a crash that preceded ship.json, or by an attempt whose answer was lost: the
                // same records, perhaps fewer or more.
                let in_the_way = |what: String| ShipError::InTheWay { key: key.clone(), what };
                let found = Chunk::decode(&found).map_err(|error| in_the_way(error.to_string()))?;
                let ours = Chunk::decode(&encoded).map_err(|error| in_the_way(format!("what is here: {error}")))?;
                let place = |chunk: &Chunk| (chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn);
                if place(&found) != place(&ours) {
                    return Err(in_the_way("it belongs elsewhere".to_owned()));
                }
                let common = found.records.len().min(ours.records.len());
                if found.records[..common] != ours.records[..common] {
                    return Err(ShipError::Foreign(key));
                }
                last = found.last_lsn;
            }
            Err(error) => {
                // An upload that takes too long as a whole may succeed in parts.
                self.chunk_bytes = (self.chunk_bytes / 2).max(CHUNK_BYTES_MIN);
                return Err(error.into());
            }
        }
        self.state.chained_from = Some(self.state.chained_from());
        self.chunk_bytes = (self.chunk_bytes * 2).min(CHUNK_BYTES_MAX);
        self.state.shipped_lsn = last;
        self.state.previous = Some(key);
        self.state.chunks += 1;
        self.save()
    }

    fn save(&self) -> Result<(), ShipError> {
        write_json(&self.context.dir.join("ship.json"), &self.state)?;
        // The positions never claim more than is covered without a gap.
        self.positions.chained_from.store(self.state.chained_from().0, Ordering::Release);
        self.positions.shipped.store(self.state.shipped_lsn.0, Ordering::Release);
        if let Some(manifest) = &self.state.manifest {
            self.positions.manifest.store(manifest.lsn.0, Ordering::Release);
        }
        Ok(())
    }
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ShipError>
where
    T: Send + 'static,
    E: Send + 'static,
    ShipError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ShipError::Checkpoint(format!("a background task failed: {error}"))),
    }
}
