//! The export of a source: its leaving rows, in SSTs for each shard that they belong to afterwards.
//!
//! The rows keep their stored keys, and so their order: one pass over the leaving bands writes one
//! table after the other for each shard.
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
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio_util::sync::CancellationToken;
use vasto_core::ShardId;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::Lsn;
use vasto_core::merge::is_collected;
use vasto_core::plan::Plan;
use vasto_shipping::bucket::{Bucket, Create};
use vasto_shipping::export::{ExportManifest, ExportedTable};
use vasto_shipping::layout;

use super::Shape;
use crate::build::error::{BuildError, io};
use crate::engine::{TableRun, WrittenTable};
use crate::rates;
use crate::replica::Replica;
use crate::ship::Pace;

/// Tables of one export that wait for an upload turn concurrently.
const UPLOADS: usize = 4;
/// Interval at which the log is asked whether it has synced what was exported.
const POLL: Duration = Duration::from_millis(20);
/// Rows between two looks at the cancellation.
const ROWS_AT_ONCE: u64 = 1024;

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
}

/// The tables of an export on the local disk.
struct Written {
    tables: Vec<(ShardId, WrittenTable)>,
    event_time_max: u64,
    /// End of the log behind everything that was read.
    end: Lsn,
}

impl Export {
    /// Exports the leaving rows of a plan; returns the key of the export's manifest. `lsn`: the LSN
    /// of the checkpoint that the plan pins.
    ///
    /// # Errors
    /// `Cancelled` when the plan is over; `Bucket` when the bucket fails, then it can be repeated.
    pub(crate) async fn run(&self, plan: &Plan, lsn: Lsn) -> Result<String, BuildError> {
        // Drawn for every attempt: one that was cancelled may still be writing.
        let attempt = format!("{:08x}", rand::random::<u32>());
        let Replica { keyspace, id, .. } = self.replica;
        let dir = self.tmp.join(format!("export-{keyspace}-{id}-{}-{attempt}", plan.id));
        let run = self.run_in(plan, lsn, &attempt, &dir);
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
    ) -> Result<String, BuildError> {
        let shape = Shape::of(plan)?;
        let floor = self.replica.floor();
        let work = rates::EXPORTS.begin();
        let (replica, cancel, out) = (self.replica.clone(), self.cancel.clone(), dir.to_owned());
        let write = move || write_tables(&replica, shape, floor, &out, &cancel);
        let Written { tables, event_time_max, end } = tokio::task::spawn_blocking(write).await??;
        while self.replica.log().synced_lsn() < end {
            if let Some(reason) = self.replica.closed() {
                return Err(BuildError::Mismatch(reason));
            }
            tokio::time::sleep(POLL).await;
        }
        let Replica { keyspace, shard, .. } = self.replica;
        let mut uploads = Vec::with_capacity(tables.len());
        for ((to, table), n) in tables.iter().zip(1..) {
            let key = layout::export_table(keyspace, plan.id, shard, *to, n, attempt);
            uploads.push(self.upload(*to, table, key));
        }
        let files: Vec<ExportedTable> =
            futures::stream::iter(uploads).buffered(UPLOADS).try_collect().await?;
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
        let key =
            layout::export_manifest(manifest.keyspace, manifest.plan, manifest.shard, attempt);
        match self.bucket.create(&key, manifest.encode()).await? {
            Create::Created => Ok(key),
            Create::Exists(_) => {
                let reason = "another export has its name; start the resize again".to_owned();
                Err(BuildError::Unusable { key, reason })
            }
        }
    }

    async fn upload(
        &self,
        to: ShardId,
        table: &WrittenTable,
        key: String,
    ) -> Result<ExportedTable, BuildError> {
        let _turn = self.pace.turn(table.bytes).await;
        let uploaded = self.bucket.upload_file(&key, &table.path).await?;
        // The space is needed for nothing else.
        let _ = tokio::fs::remove_file(&table.path).await;
        let (bytes, crc32c) = (uploaded.bytes, uploaded.crc32c);
        Ok(ExportedTable { to, key, bytes, crc32c, rows: table.rows })
    }
}

/// Writes the leaving rows to tables. Blocks on the disk.
fn write_tables(
    replica: &Replica,
    shape: Shape,
    floor: u64,
    out: &Path,
    cancel: &CancellationToken,
) -> Result<Written, BuildError> {
    if out.exists() {
        std::fs::remove_dir_all(out).map_err(io(out))?;
    }
    let engine = replica.engine();
    let view = engine.view();
    // Everything in the view was logged before this.
    let end = replica.log().appended_lsn();
    let mut rows = view.bulk(shape.bands);
    let mut runs: BTreeMap<ShardId, TableRun<'_>> = BTreeMap::new();
    let (mut event_time_max, mut count) = (0, 0u64);
    while let Some((stored_key, entry)) = rows.current()? {
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
        if count.is_multiple_of(ROWS_AT_ONCE) && cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
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
