//! Follows the log of every source: chunks from the bucket first, then the live stream; chunks
//! again when the source no longer holds log that was not read in time.
//!
//! **Invariant:** the durable cursor of a source never passes a record that concerns this shard and
//! is not stored here; the master receives the durable cursor, though frames are applied before they
//! are synced.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use parking_lot::Mutex;
use tonic::transport::Endpoint;
use vasto_core::ids::{Lsn, ReplicaId};
use vasto_core::limits::{
    CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX, TAIL_LAG_BYTES_MAX,
    TAIL_LAG_LSNS_MAX,
};
use vasto_core::plan::{Plan, Source};
use vasto_core::record::{Body, FeedProgress, KeyEntry, Record};
use vasto_failpoint::points;
use vasto_proto::v1;
use vasto_proto::v1::replication_client::ReplicationClient;
use vasto_shipping::archive;
use vasto_shipping::layout::Owner;

use super::syncs::Syncs;
use super::{Build, Shape};
use crate::build::chunks::ChunkReader;
use crate::build::error::BuildError;
use crate::build::filter::ShardFilter;
use crate::build::groups::{apply_in_groups, apply_visibly};
use crate::replica::command::ReplicaError;
use crate::target_trace::TargetSpan;

/// Pause between two attempts to reach a source.
const RETRY: Duration = Duration::from_millis(100);
/// Age below which a chunk, when reading began, is left to the live stream: a source that ships as
/// fast as the bucket is read would never be caught up with.
const CHASED: Duration = Duration::from_secs(1);

/// Runs until the plan is over.
pub(super) async fn follow_all(build: &Build, plan: &Plan) -> Result<(), BuildError> {
    // What an earlier attempt has applied need not be durable yet.
    build.replica.position().await?;
    if let Some(reason) = build.replica.closed() {
        return Err(ReplicaError::Closed(reason).into());
    }
    let cursors: BTreeMap<ReplicaId, Lsn> = build.replica.tail_cursors()?.into_iter().collect();
    build.progress.lock().cursors = cursors.clone();
    let filter = ShardFilter { shard: build.replica.shard, shards: Shape::of(plan)?.shards };
    let lags = Arc::new(Mutex::new(
        plan.sources.iter().map(|source| (source.replica, Lag::UNKNOWN)).collect(),
    ));
    let syncs = Arc::new(Mutex::new(Syncs::default()));
    let mut tail = build.trace.begin("target tail");
    let catching_up = Arc::new(Mutex::new(Some(build.trace.begin("target catch up"))));
    let followers = plan.sources.iter().map(|source| {
        let cursor = cursors.get(&source.replica).copied();
        let pinned = source.manifest.as_ref().map(|manifest| manifest.lsn);
        let owner = Owner {
            keyspace: build.replica.keyspace,
            shard: source.shard,
            replica: source.replica,
        };
        let follower = Follower {
            build,
            source,
            filter,
            lags: Arc::clone(&lags),
            catching_up: Arc::clone(&catching_up),
            syncs: Arc::clone(&syncs),
            cursor: cursor.unwrap_or_default(),
            unsynced: VecDeque::new(),
            failed: None,
            chunks: ChunkReader::after(owner, Vec::new(), pinned.unwrap_or_default()),
        };
        async move {
            match pinned.zip(cursor) {
                Some((pinned, cursor)) if cursor >= pinned => follower.run().await,
                _ => Err(BuildError::Mismatch(format!(
                    "the target has no cursor for shard {}",
                    source.shard
                ))),
            }
        }
    });
    let followed = try_join_all(followers).await.map(|_| ());
    let caught_up = catching_up.lock().take().is_none();
    tail.set("vasto.caught_up", caught_up);
    match &followed {
        // A tail has no other end than that of the plan.
        Err(BuildError::Cancelled) => tail.done(),
        ended => tail.end(ended),
    }
    followed
}

/// How far a source was ahead, at the last frame.
#[derive(Debug, Clone, Copy)]
struct Lag {
    lsns: u64,
    /// `None` when the source does not tell.
    bytes: Option<u64>,
}

impl Lag {
    const UNKNOWN: Self = Self { lsns: u64::MAX, bytes: None };

    /// Returns true when the plan may seal with this lag behind so many sources.
    fn is_close(self, sources: u64) -> bool {
        match self.bytes {
            Some(bytes) => self.lsns != u64::MAX && bytes <= TAIL_LAG_BYTES_MAX * sources,
            None => self.lsns <= TAIL_LAG_LSNS_MAX,
        }
    }

    /// Returns the lag behind both sources.
    fn and(self, other: Self) -> Self {
        let bytes = self.bytes.zip(other.bytes).map(|(one, other)| one.saturating_add(other));
        Self { lsns: self.lsns.saturating_add(other.lsns), bytes }
    }
}

struct Follower<'a> {
    build: &'a Build,
    source: &'a Source,
    filter: ShardFilter,
    lags: Arc<Mutex<BTreeMap<ReplicaId, Lag>>>,
    /// The span until all tails are close for the first time.
    catching_up: Arc<Mutex<Option<TargetSpan>>>,
    syncs: Arc<Mutex<Syncs>>,
    /// The source's log up to here is applied.
    cursor: Lsn,
    /// What is applied and not known to be durable: the LSN of the own log that covers it, and how
    /// far that is in the source's.
    unsynced: VecDeque<(Lsn, Lsn)>,
    /// Why the stream was interrupted, until it goes on.
    failed: Option<String>,
    /// The source's log in the bucket. Its position is after the pinned manifest or a chunk, where
    /// the next chunk begins; the cursor may be further.
    chunks: ChunkReader,
}

impl Follower<'_> {
    async fn run(mut self) -> Result<(), BuildError> {
        let cancel = self.build.cancel.clone();
        tokio::select! {
            () = cancel.cancelled() => Err(BuildError::Cancelled),
            result = self.follow() => result,
        }
    }

    async fn follow(&mut self) -> Result<(), BuildError> {
        self.read_chunks().await?;
        loop {
            if let Err(reason) = self.read_stream().await? {
                tracing::info!(
                    shard = self.source.shard.0,
                    reason,
                    "the tail is interrupted; the source is asked again"
                );
                self.build.progress.lock().failed_for_now(&reason);
                self.failed = Some(reason);
                self.syncs.lock().note(self.source.replica, None);
                self.settle().await?;
                self.set_lag(Lag::UNKNOWN);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Applies the chunks after the position of `chunks`, as far as they were written when it
    /// begins; what the stream has brought meanwhile is skipped.
    async fn read_chunks(&mut self) -> Result<(), BuildError> {
        let began_us = self.build.registry.clock.now_us();
        let chased_us = began_us + CHASED.as_micros() as u64;
        while let Some(chunk) = self.chunks.next(&self.build.reader()).await? {
            self.chunks.at = self.chunks.at.max(self.cursor);
            let mut written_us = 0;
            let records = self.chunks.records(&chunk).inspect(|record| {
                written_us = written_us.max(record.commit_time);
            });
            let entries = records.flat_map(|record| self.filter.pick(record)).collect();
            self.chunks.at = chunk.last_lsn;
            self.apply(entries, chunk.last_lsn).await?;
            if written_us > chased_us {
                break;
            }
        }
        Ok(())
    }

    /// Reads on in the bucket when the source has cut its log. The cursor may lie inside a chunk,
    /// which only a listing finds. Returns true when the bucket had more.
    async fn read_listed_chunks(&mut self) -> Result<bool, BuildError> {
        let before = self.cursor;
        let mut archives =
            archive::archives(&self.build.bucket, self.build.replica.keyspace, self.source.shard)
                .await?;
        self.chunks.listed = archives.remove(&self.source.replica).unwrap_or_default().chunks;
        self.chunks.at = self.cursor;
        self.read_chunks().await?;
        Ok(self.cursor > before)
    }

    async fn apply(&mut self, entries: Vec<KeyEntry>, covered: Lsn) -> Result<(), BuildError> {
        if covered <= self.cursor {
            return Ok(());
        }
        let cursor = FeedProgress::Tail(self.source.replica, covered);
        apply_in_groups(&self.build.replica, entries, vec![cursor]).await?;
        self.cursor = covered;
        // With it everything before is durable.
        self.unsynced.clear();
        self.build.progress.lock().cursors.insert(self.source.replica, covered);
        Ok(())
    }

    /// Applies what a frame has brought. It counts once it is durable, which may be later.
    async fn apply_frame(
        &mut self,
        entries: Vec<KeyEntry>,
        covered: Lsn,
        sealed: Option<bool>,
    ) -> Result<(), BuildError> {
        let (source, syncs) = (self.source.replica, Arc::clone(&self.syncs));
        if covered <= self.cursor {
            syncs.lock().note(source, sealed);
            return Ok(());
        }
        let sync = move || syncs.lock().wants(source, sealed, Instant::now());
        let cursor = FeedProgress::Tail(source, covered);
        let lsn = apply_visibly(&self.build.replica, entries, vec![cursor], sync).await?;
        self.cursor = covered;
        self.unsynced.push_back((lsn, covered));
        self.note_durable();
        Ok(())
    }

    /// Makes durable, and counts, what a source has sent that may not come back: it may have sealed.
    async fn settle(&mut self) -> Result<(), BuildError> {
        if !self.unsynced.is_empty() {
            self.build.replica.position().await?;
            self.note_durable();
        }
        Ok(())
    }

    /// Takes over how far the source's log is durable here.
    fn note_durable(&mut self) {
        let synced = self.build.replica.log().synced_lsn();
        let mut durable = None;
        while self.unsynced.front().is_some_and(|(lsn, _)| *lsn <= synced) {
            durable = self.unsynced.pop_front();
        }
        if let Some((_, covered)) = durable {
            self.build.progress.lock().cursors.insert(self.source.replica, covered);
            self.build.registry.report.notify_one();
        }
    }

    fn set_lag(&self, lag: Lag) {
        let (total, close) = {
            let mut lags = self.lags.lock();
            lags.insert(self.source.replica, lag);
            let none = Lag { lsns: 0, bytes: Some(0) };
            let total = lags.values().fold(none, |sum, lag| sum.and(*lag));
            (total, total.is_close(lags.len() as u64))
        };
        if close && let Some(span) = self.catching_up.lock().take() {
            span.done();
        }
        {
            let mut progress = self.build.progress.lock();
            (progress.lag_lsns, progress.lag_bytes) = (total.lsns, total.bytes);
        }
        self.build.registry.report.notify_one();
    }

    /// Reads the live stream. The outer error ends the build; the inner one is a reason to
    /// reconnect.
    async fn read_stream(&mut self) -> Result<Result<(), String>, BuildError> {
        let Some(address) = self.build.registry.address(self.source.node) else {
            return Ok(Err(format!("node {} has no known address", self.source.node)));
        };
        let endpoint = match Endpoint::from_shared(format!("http://{address}")) {
            Ok(endpoint) => endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .tcp_nodelay(true),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut client =
            ReplicationClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let request = v1::TailRequest {
            keyspace_id: self.build.replica.keyspace.0,
            replica_id: self.source.replica.0,
            after_lsn: self.cursor.0,
            final_shard: self.filter.shard.0,
            final_shards: self.filter.shards,
        };
        let mut frames = match client.tail(request).await {
            Ok(response) => response.into_inner(),
            // The log no longer reaches back: the missing part is in the bucket, or lost.
            Err(status) if status.code() == tonic::Code::FailedPrecondition => {
                if self.read_listed_chunks().await? {
                    return Ok(Err("the source has cut its log; going on from the bucket".into()));
                }
                let reason = status.message().to_owned();
                return Err(BuildError::TailLost { shard: self.source.shard, reason });
            }
            Err(status) => return Ok(Err(status.to_string())),
        };
        let mut synced = self.build.replica.log().subscribe();
        loop {
            synced.borrow_and_update();
            self.note_durable();
            tokio::select! {
                frame = frames.message() => match frame {
                    Ok(Some(frame)) => self.take(frame).await?,
                    Ok(None) => return Ok(Err("the source ended the stream".into())),
                    Err(status) => return Ok(Err(status.to_string())),
                },
                changed = synced.changed(), if !self.unsynced.is_empty() => {
                    if changed.is_err() {
                        return Ok(Err("the log of this replica is closed".into()));
                    }
                }
            }
        }
    }

    async fn take(&mut self, frame: v1::TailFrame) -> Result<(), BuildError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for encoded in &frame.records {
            bytes += encoded.len() as u64;
            let record = Record::decode(encoded).map_err(|error| {
                BuildError::Mismatch(format!("a streamed record is damaged: {error}"))
            })?;
            if let Body::Data { entries: more, .. } = record.body {
                entries.extend(more);
            }
        }
        self.apply_frame(entries, Lsn(frame.covered_lsn), frame.sealed).await?;
        {
            let mut progress = self.build.progress.lock();
            progress.bytes_from_peers += bytes;
            // Another source may have failed since.
            if let Some(failed) = self.failed.take()
                && progress.last_error.as_ref() == Some(&failed)
            {
                progress.last_error = None;
            }
        }
        if frame.head_lsn <= self.cursor.0 {
            self.build.passes(points::TARGET_CAUGHT_UP).await?;
        }
        let lsns = frame.head_lsn.saturating_sub(self.cursor.0);
        self.set_lag(Lag { lsns, bytes: frame.lag_bytes });
        Ok(())
    }
}
