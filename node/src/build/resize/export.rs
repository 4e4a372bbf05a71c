//! The export of a source: its leaving rows, in SSTs for each shard that they belong to afterwards.
//!
//! The rows keep their stored keys, and so their order: one pass over the leaving bands writes one
//! table after the other for each shard. While the plan is paused the pass stands still, with the
//! view of the database that it reads: files that are compacted meanwhile stay until it goes on.
//!
//! **Invariants**
//! - An export holds every row that the source held at the LSN of its checkpoint. What it holds
//!   beyond that is in the log after that LSN, and synced.
//! - Everything that its manifest names is in the bucket before the manifest.
//!
//! Leaks: tables of an export that did not reach its manifest (removed by garbage collection).

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::ShardId;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{Lsn, PlanId};
use vasto_core::merge::is_collected;
use vasto_core::plan::Plan;
use vasto_failpoint::{Injected, Point, points};
use vasto_shipping::bucket::{Bucket, Create};
use vasto_shipping::export::{ExportManifest, ExportedTable};
use vasto_shipping::layout;
use vasto_trace::OperationTrace;

use super::Shape;
use crate::build::error::{BuildError, io};
use crate::bulk::wait_for_work;
use crate::engine::{TableRun, WrittenTable};
use crate::rates;
use crate::replica::Replica;
use crate::ship::Pace;

/// Tables of one export that wait for an upload turn concurrently.
const UPLOADS: usize = 4;
/// Interval at which the log is asked whether it has synced what was exported.
const POLL: Duration = Duration::from_millis(20);
/// Interval at which the rows that were written are reported.
const REPORT: Duration = Duration::from_millis(200);
/// Rows, and their bytes, between two looks at the pause, the foreground and the cancellation.
const ROWS_AT_ONCE: u64 = 1024;
/// See [`ROWS_AT_ONCE`].
const BYTES_AT_ONCE: u64 = 1 << 20;

/// The inputs of an export.
pub(crate) struct Export {
    /// The source.
    pub replica: Replica,
    /// The bucket to write to.
    pub bucket: Bucket,
    /// Limits that all uploads of the node share.
    pub pace: Arc<Pace>,
    /// Directory for the tables on the data file system.
    pub tmp: PathBuf,
    /// Fires when the plan is over.
    pub cancel: CancellationToken,
    /// The trace of the plan at the source.
    pub trace: OperationTrace,
}

/// How far an export is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Exported {
    /// Rows written to local tables.
    pub rows: u64,
    /// Bytes of all tables; 0 before they are written.
    pub bytes_total: u64,
    /// Bytes of the tables in the bucket.
    pub bytes_done: u64,
}

impl Exported {
    /// Returns the state of an export whose tables are written, and none is in the bucket.
    fn written(tables: &[(ShardId, WrittenTable)]) -> Self {
        Self {
            rows: tables.iter().map(|(_, table)| table.rows).sum(),
            bytes_total: tables.iter().map(|(_, table)| table.bytes).sum(),
            bytes_done: 0,
        }
    }
}

/// What the uploads of an export count, for its span.
#[derive(Clone, Copy)]
struct Calls<'a> {
    /// Time that the slowest upload of a table took, its repetitions included, microseconds.
    slowest_us: &'a AtomicU64,
    /// Bytes of the tables that were uploaded.
    bytes: &'a AtomicU64,
}

/// Receives how far an export is.
type Report<'a> = &'a (dyn Fn(Exported) + Sync);

/// The tables of an export on the local disk.
struct Written {
    tables: Vec<(ShardId, WrittenTable)>,
    event_time_max: u64,
    /// End of the log behind everything that was read.
    end: Lsn,
}

impl Export {
    /// Exports the leaving rows of a plan; returns the key of the export's manifest. `lsn`: the LSN
    /// of the checkpoint that the plan pins. `report` is told how far it is.
    ///
    /// # Errors
    /// `Cancelled` when the plan is over; `Bucket` when the bucket fails, then it can be repeated.
    pub(crate) async fn run(
        &self,
        plan: &Plan,
        lsn: Lsn,
        report: Report<'_>,
    ) -> Result<String, BuildError> {
        // Drawn for every attempt: one that was cancelled may still be writing.
        let attempt = format!("{:08x}", rand::random::<u32>());
        let Replica { keyspace, id, .. } = self.replica;
        let dir = self.tmp.join(format!("export-{keyspace}-{id}-{}-{attempt}", plan.id));
        let run = self.run_in(plan, lsn, &attempt, &dir, report);
        let result = match self.cancel.run_until_cancelled(run).await {
            Some(result) => result,
            None => Err(BuildError::Cancelled),
        };
        let _ = tokio::fs::remove_dir_all(&dir).await;
        result
    }

    async fn run_in(
        &self,
        plan: &Plan,
        lsn: Lsn,
        attempt: &str,
        dir: &Path,
        report: Report<'_>,
    ) -> Result<String, BuildError> {
        let shape = Shape::of(plan)?;
        let floor = self.replica.floor();
        self.passes(points::SOURCE_EXPORT_BEGUN).await?;
        let work = rates::EXPORTS.begin();
        let mut span = self.trace.begin("source export");
        let written = self.write(shape, floor, dir, report).await;
        if let Ok(Written { tables, .. }) = &written {
            let done = Exported::written(tables);
            span.count("vasto.keys_moved", done.rows);
            span.count("vasto.bytes_moved", done.bytes_total);
        }
        span.end(&written);
        let Written { tables, event_time_max, end } = written?;
        while self.replica.log().synced_lsn() < end {
            if let Some(reason) = self.replica.closed() {
                return Err(BuildError::Mismatch(reason));
            }
            tokio::time::sleep(POLL).await;
        }
        self.passes(points::SOURCE_EXPORT_WRITTEN).await?;
        let mut span = self.trace.begin("bucket put");
        span.set("vasto.what", "tables");
        span.count("vasto.objects", tables.len() as u64);
        let (slowest_us, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        let calls = Calls { slowest_us: &slowest_us, bytes: &bytes };
        let files = self.upload_all(plan.id, attempt, &tables, report, calls).await;
        span.count("vasto.bytes_to_bucket", bytes.load(Ordering::Relaxed));
        span.count("vasto.slowest_ms", slowest_us.load(Ordering::Relaxed) / 1_000);
        span.end(&files);
        let files = files?;
        work.end(files.iter().map(|table| table.bytes).sum());
        let manifest = ExportManifest {
            keyspace: self.replica.keyspace,
            plan: plan.id,
            shard: self.replica.shard,
            replica: self.replica.id,
            lsn,
            floor,
            event_time_max,
            files,
        };
        self.publish(manifest, attempt).await
    }

    /// Uploads the tables of an attempt.
    async fn upload_all(
        &self,
        plan: PlanId,
        attempt: &str,
        tables: &[(ShardId, WrittenTable)],
        report: Report<'_>,
        calls: Calls<'_>,
    ) -> Result<Vec<ExportedTable>, BuildError> {
        let Replica { keyspace, shard, .. } = self.replica;
        let progress = Mutex::new(Exported::written(tables));
        let written = *progress.lock();
        report(written);
        let mut uploads = Vec::with_capacity(tables.len());
        for ((to, table), n) in tables.iter().zip(1..) {
            let key = layout::export_table(keyspace, plan, shard, *to, n, attempt);
            let (progress, upload) = (&progress, self.upload(*to, table, key, calls));
            uploads.push(async move {
                let uploaded = upload.await?;
                let now = {
                    let mut progress = progress.lock();
                    progress.bytes_done += table.bytes;
                    *progress
                };
                report(now);
                Ok::<_, BuildError>(uploaded)
            });
        }
        let rest = uploads.split_off(uploads.len() / 2);
        let mut files: Vec<ExportedTable> =
            futures::stream::iter(uploads).buffered(UPLOADS).try_collect().await?;
        self.passes(points::SOURCE_EXPORT_HALF).await?;
        let rest: Vec<ExportedTable> =
            futures::stream::iter(rest).buffered(UPLOADS).try_collect().await?;
        files.extend(rest);
        self.passes(points::SOURCE_EXPORT_UPLOADED).await?;
        Ok(files)
    }

    /// Writes the manifest of an export whose tables are in the bucket; returns its key.
    async fn publish(&self, manifest: ExportManifest, attempt: &str) -> Result<String, BuildError> {
        let key =
            layout::export_manifest(manifest.keyspace, manifest.plan, manifest.shard, attempt);
        let body = manifest.encode();
        let mut span = self.trace.begin("bucket put");
        span.set("vasto.what", "manifest");
        span.count("vasto.objects", 1);
        span.count("vasto.bytes_to_bucket", body.len() as u64);
        let created = self.bucket.create(&key, body).await;
        span.end(&created);
        match created? {
            Create::Created => Ok(key),
            Create::Exists(_) => {
                let reason = "another export has its name; start the resize again".to_owned();
                Err(BuildError::Unusable { key, reason })
            }
        }
    }

    async fn passes(&self, point: Point) -> Result<(), Injected> {
        vasto_failpoint::at(point, self.replica.keyspace, self.replica.id).await
    }

    /// Writes the tables on the local disk.
    async fn write(
        &self,
        shape: Shape,
        floor: u64,
        dir: &Path,
        report: Report<'_>,
    ) -> Result<Written, BuildError> {
        let work = Work {
            replica: self.replica.clone(),
            bucket: self.bucket.clone(),
            cancel: self.cancel.clone(),
            rows: Arc::default(),
        };
        let (rows, out) = (work.rows.clone(), dir.to_owned());
        let mut written =
            tokio::task::spawn_blocking(move || write_tables(&work, shape, floor, &out));
        let mut tick = tokio::time::interval(REPORT);
        loop {
            tokio::select! {
                written = &mut written => return written?,
                _ = tick.tick() => {
                    report(Exported { rows: rows.load(Ordering::Relaxed), ..Exported::default() });
                }
            }
        }
    }

    async fn upload(
        &self,
        to: ShardId,
        table: &WrittenTable,
        key: String,
        calls: Calls<'_>,
    ) -> Result<ExportedTable, BuildError> {
        // Whoever waits here has no turn yet: others go on.
        self.bucket.pass(table.bytes).await;
        let _turn = self.pace.turn(table.bytes).await;
        let began = Instant::now();
        let uploaded = self.bucket.upload_file(&key, &table.path).await;
        let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        calls.slowest_us.fetch_max(took_us, Ordering::Relaxed);
        let uploaded = uploaded?;
        calls.bytes.fetch_add(uploaded.bytes, Ordering::Relaxed);
        // The space is needed for nothing else.
        let _ = tokio::fs::remove_file(&table.path).await;
        let (bytes, crc32c) = (uploaded.bytes, uploaded.crc32c);
        Ok(ExportedTable { to, key, bytes, crc32c, rows: table.rows })
    }
}

/// The source of the rows, what holds the work up or ends it, and the rows that are done.
struct Work {
    replica: Replica,
    bucket: Bucket,
    cancel: CancellationToken,
    rows: Arc<AtomicU64>,
}

/// Writes the leaving rows to tables. Blocks on the disk; stands still while the plan is paused, and
/// yields to the foreground.
fn write_tables(work: &Work, shape: Shape, floor: u64, out: &Path) -> Result<Written, BuildError> {
    let Work { replica, bucket, cancel, rows: done } = work;
    if out.exists() {
        std::fs::remove_dir_all(out).map_err(io(out))?;
    }
    let engine = replica.engine();
    let view = engine.view();
    // Everything in the view was logged before this.
    let end = replica.log().appended_lsn();
    let mut rows = view.bulk(shape.bands);
    let mut runs: BTreeMap<ShardId, TableRun<'_>> = BTreeMap::new();
    let (mut event_time_max, mut count, mut bytes) = (0, 0u64, 0u64);
    while let Some((stored_key, entry)) = rows.current()? {
        bytes += (stored_key.len() + entry.len()) as u64;
        if !is_collected(entry, floor) {
            let (to, event_time) = place(stored_key, entry, shape.shards)?;
            event_time_max = event_time_max.max(event_time);
            let run = match runs.entry(to) {
                btree_map::Entry::Occupied(run) => run.into_mut(),
                btree_map::Entry::Vacant(slot) => {
                    let dir = out.join(format!("to-{to}"));
                    std::fs::create_dir_all(&dir).map_err(io(&dir))?;
                    slot.insert(TableRun::new(engine, dir))
                }
            };
            run.put(stored_key, entry)?;
        }
        rows.advance();
        count += 1;
        if count.is_multiple_of(ROWS_AT_ONCE) || bytes >= BYTES_AT_ONCE {
            done.store(count, Ordering::Relaxed);
            wait_for_work(bucket, cancel, std::mem::take(&mut bytes));
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
        }
    }
    let mut tables = Vec::new();
    for (to, run) in runs {
        tables.extend(run.finish()?.into_iter().map(|table| (to, table)));
    }
    Ok(Written { tables, event_time_max, end })
}

/// Returns the shard of a row afterwards, and its event time.
fn place(stored_key: &[u8], entry: &[u8], shards: u32) -> Result<(ShardId, u64), BuildError> {
    let damaged = |reason: String| BuildError::Mismatch(format!("a row to export {reason}"));
    let user_key = stored_key.get(1..).ok_or_else(|| damaged("has no key".into()))?;
    let decoded =
        Entry::decode(entry).map_err(|error| damaged(format!("cannot be read: {error}")))?;
    let hash = decoded.partition_hash.unwrap_or_else(|| partition_hash(user_key));
    Ok((jump(hash, shards).shard, decoded.event_time))
}
