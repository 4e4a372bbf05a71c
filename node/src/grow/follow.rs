//! Follows the log of every source: chunks from the bucket first, then the live stream; chunks again when
//! the source no longer holds log that was not read in time.
//!
//! **Invariant:** the durable cursor of a source never passes a record that concerns this shard and
//! is not stored here; the master receives the durable cursor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use tonic::transport::Endpoint;
use vasto_core::ids::{Lsn, ReplicaId};
use vasto_core::limits::{CONNECT_TIMEOUT, GROUP_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_core::plan::{Plan, Source};
use vasto_core::record::{Body, FeedProgress, KeyEntry, Record};
use vasto_proto::v1;
use vasto_proto::v1::replication_client::ReplicationClient;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout;

use super::{Build, BuildError, Shape};
use crate::tail::Filter;

/// Pause between two attempts to reach a source.
const RETRY: Duration = Duration::from_millis(100);

/// Runs until the plan is over.
pub(super) async fn follow_all(build: &Build, plan: &Plan) -> Result<(), BuildError> {
    let cursors: BTreeMap<ReplicaId, Lsn> = build.replica.tail_cursors()?.into_iter().collect();
    build.progress.lock().cursors = cursors.clone();
    let filter = Filter { shard: build.replica.shard, shards: Shape::of(plan)?.shards };
    let lags =
        Arc::new(parking_lot::Mutex::new(plan.sources.iter().map(|source| (source.replica, u64::MAX)).collect()));
    let followers = plan.sources.iter().map(|source| {
        let cursor = cursors.get(&source.replica).copied();
        let pinned = source.manifest.as_ref().map(|manifest| manifest.lsn);
        let follower = Follower {
            build,
            source,
            filter,
            lags: Arc::clone(&lags),
            cursor: cursor.unwrap_or_default(),
            chunks: pinned.unwrap_or_default(),
        };
        async move {
            let known = pinned.zip(cursor);
            match known {
                Some((pinned, cursor)) if cursor >= pinned => follower.run().await,
                _ => Err(BuildError::Bad(format!("the target has no cursor for shard {}", source.shard))),
            }
        }
    });
    try_join_all(followers).await.map(|_| ())
}

struct Follower<'a> {
    build: &'a Build,
    source: &'a Source,
    filter: Filter,
    lags: Arc<parking_lot::Mutex<BTreeMap<ReplicaId, u64>>>,
    cursor: Lsn,
    /// Chunks up to here are read, or hold no unread record of this shard; a chunk begins behind it.
    chunks: Lsn,
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
                tracing::info!(shard = self.source.shard.0, reason, "the tail is interrupted; it goes on");
                self.set_lag(u64::MAX);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Walks the chunks by name: the next one begins behind the last record of this one.
    async fn read_chunks(&mut self) -> Result<(), BuildError> {
        loop {
            let key =
                layout::chunk(self.build.replica.keyspace, self.source.shard, self.source.replica, self.chunks.next());
            let Some(bytes) = self.build.bucket.get(&key).await? else { return Ok(()) };
            {
                let mut shown = self.build.progress.lock();
                shown.bytes_from_bucket += bytes.len() as u64;
                shown.objects_read += 1;
            }
            let chunk = Chunk::decode(&bytes).map_err(|error| BuildError::Bad(format!("{key}: {error}")))?;
            self.chunks = chunk.last_lsn;
            if chunk.last_lsn <= self.cursor {
                continue; // the stream was faster
            }
            let mut entries = Vec::new();
            for record in chunk.records() {
                let record = record.map_err(|error| BuildError::Bad(format!("{key}: {error}")))?;
                entries.extend(self.filter.pick(record));
            }
            drop(bytes);
            self.apply(entries, chunk.last_lsn).await?;
        }
    }

    async fn apply(&mut self, entries: Vec<KeyEntry>, covered: Lsn) -> Result<(), BuildError> {
        if covered <= self.cursor {
            return Ok(());
        }
        // In slices that fit into a record; the cursor moves with the last one. Slices that a crash leaves behind
        // are merged again, which changes nothing.
        let mut slice = Vec::new();
        let mut bytes = 0;
        for one in entries {
            bytes += one.key.len() + one.entry.len();
            slice.push(one);
            if bytes >= GROUP_BYTES_MAX {
                self.build.replica.apply(std::mem::take(&mut slice), Vec::new()).await?;
                bytes = 0;
            }
        }
        self.build.replica.apply(slice, vec![FeedProgress::Tail(self.source.replica, covered)]).await?;
        self.cursor = covered;
        self.build.progress.lock().cursors.insert(self.source.replica, covered);
        Ok(())
    }

    fn set_lag(&self, lag: u64) {
        let total = {
            let mut lags = self.lags.lock();
            lags.insert(self.source.replica, lag);
            lags.values().fold(0u64, |sum, lag| sum.saturating_add(*lag))
        };
        self.build.progress.lock().lag_lsns = total;
        self.build.registry.report.notify_one();
    }

    /// Reads the live stream. The outer error ends the build; the inner one is a reason to reconnect.
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
        let mut client = ReplicationClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
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
                let before = self.cursor;
                self.read_chunks().await?;
                if self.cursor > before {
                    return Ok(Err("the source has cut its log; going on from the bucket".into()));
                }
                return Err(BuildError::Bad(format!(
                    "the tail of shard {} is lost: {}",
                    self.source.shard,
                    status.message()
                )));
            }
            Err(status) => return Ok(Err(status.to_string())),
        };
        loop {
            match frames.message().await {
                Ok(Some(frame)) => self.take(frame).await?,
                Ok(None) => return Ok(Err("the source ended the stream".into())),
                Err(status) => return Ok(Err(status.to_string())),
            }
        }
    }

    async fn take(&mut self, frame: v1::TailFrame) -> Result<(), BuildError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for encoded in &frame.records {
            bytes += encoded.len() as u64;
            let record = Record::decode(encoded)
                .map_err(|error| BuildError::Bad(format!("a streamed record is damaged: {error}")))?;
            if let Body::Data { entries: more, .. } = record.body {
                entries.extend(more);
            }
        }
        self.apply(entries, Lsn(frame.covered_lsn)).await?;
        self.build.progress.lock().bytes_from_peers += bytes;
        self.set_lag(frame.head_lsn.saturating_sub(self.cursor.0));
        Ok(())
    }
}
