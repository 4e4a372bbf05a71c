//! Scans: rows of one partition or of a whole keyspace, page by page.
//!
//! **Invariant:** all pages of a scan in use were read at one epoch. When ownership changes, the
//! scan restarts every shard after the last row that it returned; [`merge`](super::merge) does the
//! rest.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered};
use futures::{FutureExt, Stream, StreamExt};
use vasto_core::hash::partition_hash;
use vasto_core::ids::ShardId;
use vasto_core::limits::{KEY_BYTES_MAX, LimitError, SCAN_PAGE_ROWS_MAX, check_key};
use vasto_proto::v1;
use vasto_proto::v1::reply::Result as Reply;
use vasto_proto::v1::request::Op;

use super::merge::{Merge, Page, Step, Wanted};
use crate::error::{Error, strange_reply};
use crate::key::IntoBytes;
use crate::keyspace::Keyspace;
use crate::route::Table;
use crate::tuning::SCAN_ROWS_MIN;
use crate::value::{Row, Value};

/// A scan before it starts; see [`Keyspace::scan`].
#[derive(Clone)]
#[must_use = "a scan does nothing until `stream` is called"]
pub struct Scan {
    keyspace: Keyspace,
    query: Query,
    limit: usize,
}

#[derive(Clone, Default)]
struct Query {
    partition: Option<Bytes>,
    prefix: Bytes,
    keys_only: bool,
}

impl Keyspace {
    /// Returns a scan in the order of user keys, of everything unless narrowed.
    pub fn scan(&self) -> Scan {
        Scan { keyspace: self.clone(), query: Query::default(), limit: usize::MAX }
    }
}

impl Scan {
    /// Restricts the scan to keys that were written with this partition key: one shard, one seek.
    pub fn partition(mut self, partition: impl IntoBytes) -> Self {
        self.query.partition = Some(partition.into_bytes());
        self
    }

    /// Restricts the scan to user keys that begin with `prefix`.
    pub fn prefix(mut self, prefix: impl IntoBytes) -> Self {
        self.query.prefix = prefix.into_bytes();
        self
    }

    /// Limits the number of rows.
    pub fn limit(mut self, rows: usize) -> Self {
        self.limit = rows;
        self
    }

    /// Leaves the values out: [`Row::value`] is `None`.
    pub fn keys_only(mut self) -> Self {
        self.query.keys_only = true;
        self
    }

    /// Starts the scan. Rows come in the order of user keys; the same user key under several
    /// partition keys is several rows, distinguished by [`Row::partition_hash`]. The rows are no
    /// snapshot: a row that is written or deleted during the scan may be seen or not; all others
    /// are seen exactly once, also while the keyspace changes its shards. Memory is bounded by two
    /// pages (1 MiB each) per shard. Each page has the operation deadline of the handle.
    ///
    /// After an error the stream ends.
    pub fn stream(self) -> Rows {
        let source = futures::stream::try_unfold(ScanState::New(self), |state| async move {
            let mut running = match state {
                ScanState::New(scan) => Box::new(Running::start(scan)?),
                ScanState::Running(running) => running,
            };
            let rows = running.next_rows().await?;
            Ok(rows.map(|rows| (rows, ScanState::Running(running))))
        });
        Rows { ready: VecDeque::new(), source: source.boxed() }
    }
}

/// The rows of a scan: a [`Stream`], or [`Rows::try_next`].
#[must_use = "rows are fetched as they are asked for"]
pub struct Rows {
    ready: VecDeque<Row>,
    source: BoxStream<'static, Result<VecDeque<Row>, Error>>,
}

impl Rows {
    /// Returns the next row; `None` after the last.
    ///
    /// # Errors
    /// As of [`Keyspace::get`]; the scan is then over.
    pub async fn try_next(&mut self) -> Result<Option<Row>, Error> {
        self.next().await.transpose()
    }
}

impl Stream for Rows {
    type Item = Result<Row, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(row) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(row)));
            }
            match self.source.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(rows))) => self.ready = rows,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

enum ScanState {
    New(Scan),
    Running(Box<Running>),
}

/// Why a page was not read.
enum Stop {
    /// The ownership of shards changed.
    Moved,
    /// A final error.
    Failed(Error),
}

struct Running {
    /// Also keeps the watch of the topology and the connections open until the scan ends.
    keyspace: Keyspace,
    query: Arc<Query>,
    table: Arc<Table>,
    shards: Vec<ShardId>,
    merge: Merge,
    pages: FuturesUnordered<BoxFuture<'static, (usize, Result<Page, Stop>)>>,
}

/// Returns the rows of one page, so that a scan over many shards holds no more than one over few.
fn page_rows(shards: usize) -> usize {
    (SCAN_PAGE_ROWS_MAX / shards.max(1)).max(SCAN_ROWS_MIN)
}

impl Running {
    fn start(scan: Scan) -> Result<Self, Error> {
        if let Some(partition) = &scan.query.partition {
            check_key(partition)?;
        }
        if scan.query.prefix.len() > KEY_BYTES_MAX {
            return Err(LimitError::KeyTooLong(scan.query.prefix.len()).into());
        }
        let keyspace = scan.keyspace;
        let table = keyspace.executor().table(&keyspace.begin_read())?;
        let shards = shards_of(&table, &scan.query);
        let merge = Merge::new(shards.len(), scan.limit, page_rows(shards.len()));
        let query = Arc::new(scan.query);
        Ok(Self { keyspace, query, table, shards, merge, pages: FuturesUnordered::new() })
    }

    /// Returns the rows that are known next, at least one; `None` at the end.
    async fn next_rows(&mut self) -> Result<Option<VecDeque<Row>>, Error> {
        let mut rows = VecDeque::new();
        loop {
            self.ask()?;
            while rows.len() < SCAN_PAGE_ROWS_MAX {
                match self.merge.step() {
                    Step::Row(row) => rows.push_back(row),
                    Step::Wait => break,
                    Step::End => return Ok((!rows.is_empty()).then_some(rows)),
                }
            }
            if !rows.is_empty() {
                return Ok(Some(rows));
            }
            if let Some((lane, page)) = self.pages.next().await {
                self.take(lane, page)?;
            }
        }
    }

    /// Requests the pages that are due, and polls the requests so that they are sent.
    fn ask(&mut self) -> Result<(), Error> {
        loop {
            let wanted = self.merge.wanted();
            if wanted.is_empty() {
                return Ok(());
            }
            for wanted in wanted {
                let lane = wanted.lane;
                let (keyspace, table, query) =
                    (self.keyspace.clone(), self.table.clone(), self.query.clone());
                let page = fetch(keyspace, table, self.shards[lane], query, wanted);
                self.pages.push(async move { (lane, page.await) }.boxed());
            }
            // Futures do nothing before their first poll.
            while let Some(Some((lane, page))) = self.pages.next().now_or_never() {
                self.take(lane, page)?;
            }
        }
    }

    fn take(&mut self, lane: usize, page: Result<Page, Stop>) -> Result<(), Error> {
        match page {
            Ok(page) => self.merge.page(lane, page),
            Err(Stop::Failed(error)) => Err(error),
            Err(Stop::Moved) => {
                self.pages.clear();
                self.table = self.keyspace.executor().table(&self.keyspace.begin_read())?;
                self.shards = shards_of(&self.table, &self.query);
                self.merge.restart(self.shards.len(), page_rows(self.shards.len()));
                Ok(())
            }
        }
    }
}

fn shards_of(table: &Table, query: &Query) -> Vec<ShardId> {
    match &query.partition {
        Some(partition) => vec![table.topology.shard_of(partition_hash(partition))],
        None => (0..table.topology.shards.len()).map(|shard| ShardId(shard as u32)).collect(),
    }
}

/// Reads one page at the epoch of `table`.
async fn fetch(
    keyspace: Keyspace,
    table: Arc<Table>,
    shard: ShardId,
    query: Arc<Query>,
    wanted: Wanted,
) -> Result<Page, Stop> {
    let (executor, mut progress) = (keyspace.executor(), keyspace.begin_read());
    let bytes = query.prefix.len() + wanted.after.as_ref().map_or(0, |(key, _)| key.len());
    loop {
        let now = executor.table(&progress).map_err(Stop::Failed)?;
        if !now.same_owners(&table) {
            return Err(Stop::Moved);
        }
        let op = Op::Scan(v1::ScanRequest {
            prefix: query.prefix.clone(),
            after: wanted.after.as_ref().map(|(key, _)| key.clone()),
            after_partition_hash: wanted
                .after
                .as_ref()
                .map(|(_, hash)| *hash)
                .filter(|hash| *hash != u64::MAX),
            partition_hash: query.partition.as_deref().map(partition_hash),
            limit: u32::try_from(wanted.rows).unwrap_or(u32::MAX),
            keys_only: query.keys_only,
        });
        match executor.attempt(&now, shard, &progress, op, bytes).await {
            Ok(Reply::Scan(reply)) => {
                let rows = reply.rows.into_iter().map(|row| {
                    let value =
                        row.value.filter(|_| !query.keys_only).map(Value::from_wire).transpose()?;
                    Ok(Row { key: row.key, partition_hash: row.partition_hash, value })
                });
                let rows = rows.collect::<Result<Vec<Row>, Error>>().map_err(Stop::Failed)?;
                return Ok(Page { rows, more: reply.more, resume_after: reply.resume_after });
            }
            Ok(_) => return Err(Stop::Failed(strange_reply(false))),
            Err(failed) => {
                executor.recover(&now, &mut progress, failed).await.map_err(Stop::Failed)?
            }
        }
    }
}
