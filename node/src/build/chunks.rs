//! Reads the log of one replica from the bucket, chunk by chunk.
//!
//! **Invariants**
//! - The next chunk is the one that holds the record directly after the position, and the object
//!   that its name says. A chunk that begins before the position is found by the listing: a crash
//!   between the upload of a chunk and its note leaves a checkpoint that ends inside a chunk.
//! - No chunk is passed over in silence: after a gap the log counts as incomplete, and a chunk that
//!   is listed as the next one but gone is an error.

use vasto_core::ids::Lsn;
use vasto_core::record::{KeyEntry, Record};
use vasto_shipping::archive;
use vasto_shipping::chunk::Chunk;
use vasto_shipping::layout::Owner;

use super::error::BuildError;
use super::filter::ShardFilter;
use super::reader::BucketReader;

/// A log that is being read.
pub(super) struct ChunkReader {
    /// The replica that owns the log.
    pub owner: Owner,
    /// First LSNs of the listed chunks, ascending; a log that is read by name alone has none.
    pub listed: Vec<Lsn>,
    /// LSN of the last record that was taken or skipped.
    pub at: Lsn,
    /// No chunk is missing before this position, except where the log continues another replica's
    /// archive.
    pub gapless: bool,
    /// The next chunk does not begin directly after the last one.
    jumped: bool,
}

impl ChunkReader {
    /// Creates a reader whose first record is the one after an LSN.
    pub(super) fn after(owner: Owner, listed: Vec<Lsn>, at: Lsn) -> Self {
        Self { owner, listed, at, gapless: true, jumped: false }
    }

    /// Returns the chunk that holds the next record; `None` at a gap and at the end of the log. The
    /// caller moves the position when it has taken the records.
    pub(super) async fn next(
        &self,
        bucket: &BucketReader<'_>,
    ) -> Result<Option<Chunk>, BuildError> {
        bucket.chunk_after(self.owner, &self.listed, self.at).await
    }

    /// Returns the next chunk, also after a gap; `None` at the end of the log.
    pub(super) async fn next_listed(
        &mut self,
        bucket: &BucketReader<'_>,
    ) -> Result<Option<Chunk>, BuildError> {
        loop {
            if let Some(chunk) = self.next(bucket).await? {
                if std::mem::take(&mut self.jumped) {
                    // The log continues another replica's archive here, or has a gap. Other logs
                    // may hold the records of the gap; the own sequences of the records after it
                    // will show whether they do.
                    self.gapless &= archive::goes_on_behind_another(&chunk);
                }
                return Ok(Some(chunk));
            }
            let index = self.listed.partition_point(|first| *first <= self.at);
            let Some(first) = self.listed.get(index).copied() else { return Ok(None) };
            if first == self.at.next() {
                return Err(BuildError::chunk_gone(self.owner, first));
            }
            (self.at, self.jumped) = (Lsn(first.0 - 1), true);
        }
    }

    /// Returns the records of a chunk after the position. What lies before it may have been deleted
    /// since, and its tombstones purged: taken again, it would come back.
    pub(super) fn records<'c>(&self, chunk: &'c Chunk) -> impl Iterator<Item = Record> + 'c {
        let at = self.at;
        // A decoded chunk holds whole records only.
        chunk.records().map_while(Result::ok).filter(move |record| record.lsn > at)
    }

    /// Returns the entries of these records that belong to a shard.
    pub(super) fn entries(&self, chunk: &Chunk, filter: ShardFilter) -> Vec<KeyEntry> {
        self.records(chunk).flat_map(|record| filter.pick(record)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio_util::sync::CancellationToken;
    use vasto_core::ids::{
        Epoch, Incarnation, KeyspaceId, NodeId, Origin, OwnSeq, PlanId, ReplicaId, ShardId,
    };
    use vasto_core::record::Body;
    use vasto_core::report::TargetProgress;
    use vasto_shipping::archive::ArchiveError;
    use vasto_shipping::{Bucket, BucketOptions, layout};

    use super::*;
    use crate::clock::{Clock, SharedClock};
    use crate::registry::NodeRegistry;
    use crate::target_trace::TargetTrace;

    const OWNER: Owner =
        Owner { keyspace: KeyspaceId(1), shard: ShardId(0), replica: ReplicaId(7) };
    const FILTER: ShardFilter = ShardFilter { shard: ShardId(0), shards: 1 };

    #[derive(Debug)]
    struct Still;

    impl Clock for Still {
        fn now_us(&self) -> u64 {
            1
        }
    }

    struct Shipped {
        bucket: Bucket,
        progress: Mutex<TargetProgress>,
        registry: NodeRegistry,
        cancel: CancellationToken,
        trace: TargetTrace,
        _dir: tempfile::TempDir,
    }

    impl Shipped {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let url = format!("file://{}", dir.path().display());
            let clock: SharedClock = Arc::new(Still);
            Self {
                bucket: Bucket::open(&url, &BucketOptions::default()).unwrap(),
                progress: Mutex::new(TargetProgress::new(PlanId(1))),
                registry: NodeRegistry::new(NodeId(1), clock, 1),
                cancel: CancellationToken::new(),
                trace: TargetTrace::silent(),
                _dir: dir,
            }
        }

        fn reader(&self) -> BucketReader<'_> {
            BucketReader {
                bucket: &self.bucket,
                progress: &self.progress,
                registry: &self.registry,
                cancel: &self.cancel,
                trace: &self.trace,
            }
        }

        /// Ships the records under the name of the chunk that begins with `name`.
        async fn ship(&self, name: u64, first: u64, last: u64) {
            let record = |lsn: u64| Record {
                lsn: Lsn(lsn),
                synced_lsn: Lsn(lsn - 1),
                commit_time: 1_000 + lsn,
                floor: 0,
                epoch: Epoch(1),
                origin: Origin { replica: OWNER.replica, incarnation: Incarnation(1) },
                own_seq: OwnSeq(lsn),
                body: Body::data(vec![KeyEntry {
                    key: lsn.to_le_bytes().to_vec(),
                    entry: vec![1, 2],
                }]),
            };
            let chunk = Chunk {
                keyspace: OWNER.keyspace,
                shard: OWNER.shard,
                replica: OWNER.replica,
                first_lsn: Lsn(first),
                last_lsn: Lsn(last),
                previous: None,
                records: (first..=last).flat_map(|lsn| record(lsn).encode()).collect(),
            };
            let key = layout::chunk(OWNER.keyspace, OWNER.shard, OWNER.replica, Lsn(name));
            self.bucket.create(&key, chunk.encode()).await.unwrap();
        }
    }

    fn lsns(log: &ChunkReader, chunk: &Chunk) -> Vec<u64> {
        log.records(chunk).map(|record| record.lsn.0).collect()
    }

    #[tokio::test]
    async fn a_position_inside_a_chunk_continues_with_the_rest_of_it() {
        let shipped = Shipped::new();
        shipped.ship(1, 1, 5).await;
        shipped.ship(6, 6, 9).await;
        let by_name = ChunkReader::after(OWNER, Vec::new(), Lsn(3));
        assert!(
            by_name.next(&shipped.reader()).await.unwrap().is_none(),
            "no chunk begins after the position"
        );
        let mut log = ChunkReader::after(OWNER, vec![Lsn(1), Lsn(6)], Lsn(3));
        let chunk = log.next(&shipped.reader()).await.unwrap().unwrap();
        assert_eq!(lsns(&log, &chunk), [4, 5]);
        assert_eq!(log.entries(&chunk, FILTER).len(), 2);
        log.at = chunk.last_lsn;
        let chunk = log.next(&shipped.reader()).await.unwrap().unwrap();
        assert_eq!(lsns(&log, &chunk), [6, 7, 8, 9]);
        log.at = chunk.last_lsn;
        assert!(log.next(&shipped.reader()).await.unwrap().is_none());
        let read = shipped.progress.lock().clone();
        assert!(read.objects_read == 2 && read.bytes_from_bucket > 0, "{read:?}");
    }

    #[tokio::test]
    async fn a_log_after_a_gap_is_not_gapless() {
        let shipped = Shipped::new();
        shipped.ship(1, 1, 5).await;
        shipped.ship(8, 8, 9).await;
        let mut log = ChunkReader::after(OWNER, vec![Lsn(1), Lsn(8)], Lsn(0));
        log.at = log.next_listed(&shipped.reader()).await.unwrap().unwrap().last_lsn;
        assert!(log.gapless);
        let chunk = log.next_listed(&shipped.reader()).await.unwrap().unwrap();
        assert!(!log.gapless && lsns(&log, &chunk) == [8, 9]);
    }

    #[tokio::test]
    async fn a_listed_chunk_that_is_gone_and_one_that_is_misplaced_are_errors() {
        let shipped = Shipped::new();
        shipped.ship(1, 1, 5).await;
        shipped.ship(9, 6, 7).await;
        for (at, listed) in [(5, 6), (4, 6), (3, 20)] {
            let mut log = ChunkReader::after(OWNER, vec![Lsn(listed)], Lsn(at));
            let error = log.next_listed(&shipped.reader()).await.unwrap_err();
            assert!(matches!(error, BuildError::Archive(ArchiveError::Missing(_))), "{error}");
        }
        let log = ChunkReader::after(OWNER, Vec::new(), Lsn(8));
        let error = log.next(&shipped.reader()).await.unwrap_err();
        assert!(matches!(error, BuildError::Archive(ArchiveError::Misplaced(_))), "{error}");
    }
}
