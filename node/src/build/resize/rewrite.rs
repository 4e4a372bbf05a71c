//! Decodes moved rows, assigns their new bands, and writes SSTs that do not overlap.
//!
//! The rows of each band of each source arrive in key order; merged by key they feed one open table
//! per new band, each of which again receives its keys in order. One pass and a bounded amount of
//! memory therefore suffice for any size.
//!
//! **Invariant:** every row is written exactly once, to the band that its hash has in this shard; a
//! row of another shard stops the build.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::merge::merge;
use vasto_core::report::TargetProgress;
use vasto_core::{Band, ShardId};
use vasto_shipping::bucket::Bucket;

use super::Shape;
use crate::build::error::{BuildError, io};
use crate::bulk::wait_for_work;
use crate::engine::{BandRows, EngineError, ImportFile, Scratch, TableSet, WrittenTable};
use crate::replica::Replica;

/// The downloaded files of one source.
pub(super) struct SourceFiles {
    pub download_dir: PathBuf,
    pub scratch_dir: PathBuf,
    pub files: Files,
}

/// How the files of a source are read.
pub(super) enum Files {
    /// Files of its checkpoint.
    Checkpoint(Vec<ImportFile>),
    /// Names of the tables that it exported for this shard.
    Export(Vec<String>),
}

impl SourceFiles {
    fn open(&self) -> Result<Scratch, EngineError> {
        match &self.files {
            Files::Checkpoint(files) => {
                Scratch::import(&self.scratch_dir, &self.download_dir, files)
            }
            Files::Export(names) => {
                let tables: Vec<PathBuf> =
                    names.iter().map(|name| self.download_dir.join(name)).collect();
                Scratch::ingest(&self.scratch_dir, &tables)
            }
        }
    }
}

/// Memory for reading ahead, shared by the cursors of a rewrite.
const READAHEAD_ALL: usize = 64 << 20;
/// Most bytes that one cursor reads ahead, and the fewest.
const READAHEAD: (usize, usize) = (2 << 20, 32 << 10);

/// Keys, and bytes of rows, between two looks at the pause, the foreground and the cancellation.
const KEYS_AT_ONCE: u64 = 1024;
/// See [`KEYS_AT_ONCE`].
const BYTES_AT_ONCE: u64 = 1 << 20;

/// Whose rows are rewritten, where that is reported, and what holds it up or ends it.
pub(super) struct Rewriting {
    pub replica: Replica,
    pub bucket: Bucket,
    pub progress: Arc<Mutex<TargetProgress>>,
    pub cancel: CancellationToken,
}

/// The result of a rewrite.
pub(super) struct Rewritten {
    pub tables: Vec<WrittenTable>,
    pub rows: u64,
    pub event_time_max: u64,
}

impl Rewritten {
    /// Returns the bytes of all tables.
    pub(super) fn bytes(&self) -> u64 {
        self.tables.iter().map(|table| table.bytes).sum()
    }
}

/// Rewrites the rows of the sources; blocks on the disk. Stands still while the plan is paused, and
/// yields to the foreground.
pub(super) fn rewrite(
    build: &Rewriting,
    sources: &[SourceFiles],
    shape: Shape,
    floor: u64,
    out: &Path,
) -> Result<Rewritten, BuildError> {
    let replica = &build.replica;
    // Left over from an interrupted attempt; the scratch databases only link to the downloads, so
    // these are still there.
    for dir in sources.iter().map(|source| source.scratch_dir.as_path()).chain([out]) {
        if dir.exists() {
            std::fs::remove_dir_all(dir).map_err(io(dir))?;
        }
    }
    std::fs::create_dir_all(out).map_err(io(out))?;
    let scratches = sources.iter().map(SourceFiles::open).collect::<Result<Vec<_>, _>>()?;
    let count = (scratches.len() * shape.bands.bands().count()).max(1);
    let readahead = (READAHEAD_ALL / count).clamp(READAHEAD.1, READAHEAD.0);
    let cursors = scratches
        .iter()
        .flat_map(|scratch| shape.bands.bands().map(move |band| scratch.rows(band, readahead)));
    let mut rows = MergedRows::new(cursors.collect())?;
    let mut tables = TableSet::new(replica.engine(), out);
    let (mut event_time_max, mut keys, mut bytes) = (0, 0u64, 0u64);
    while let Some(winners) = rows.next_key(shape, replica.shard, floor)? {
        keys += 1;
        bytes +=
            winners.iter().map(|(_, key, entry)| (key.len() + entry.len()) as u64).sum::<u64>();
        if keys.is_multiple_of(KEYS_AT_ONCE) || bytes >= BYTES_AT_ONCE {
            build.progress.lock().rows_done = keys;
            wait_for_work(&build.bucket, &build.cancel, std::mem::take(&mut bytes));
            if build.cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
        }
        for (band, key, entry) in winners {
            event_time_max =
                event_time_max.max(vasto_core::entry::event_time_of(&entry).unwrap_or(0));
            tables.put(band, &key, &entry)?;
        }
    }
    let (tables, rows) = tables.finish()?;
    Ok(Rewritten { tables, rows, event_time_max })
}

type Row = (Band, Vec<u8>, Vec<u8>);

/// The rows of several bands of several sources, in the order of their keys.
struct MergedRows<'a> {
    cursors: Vec<BandRows<'a>>,
    /// The key under each cursor that has one, and the cursor.
    least: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
}

impl<'a> MergedRows<'a> {
    fn new(cursors: Vec<BandRows<'a>>) -> Result<Self, BuildError> {
        let mut merged = Self { cursors, least: BinaryHeap::new() };
        for cursor in 0..merged.cursors.len() {
            merged.push(cursor, Vec::new())?;
        }
        Ok(merged)
    }

    /// Enters the key under a cursor; `buffer` is used for it.
    fn push(&mut self, cursor: usize, mut buffer: Vec<u8>) -> Result<(), BuildError> {
        if let Some((key, _)) = self.cursors[cursor].current()? {
            buffer.clear();
            buffer.extend_from_slice(key);
            self.least.push(Reverse((buffer, cursor)));
        }
        Ok(())
    }

    /// Takes the least key from all cursors; returns one winner per new band of the shard (several
    /// only when a key is stored under several partitions), or `None` at the end.
    fn next_key(
        &mut self,
        shape: Shape,
        shard: ShardId,
        floor: u64,
    ) -> Result<Option<Vec<Row>>, BuildError> {
        let Some(Reverse((key, _))) = self.least.peek() else { return Ok(None) };
        let key = key.clone();
        let mut winners: Vec<Row> = Vec::new();
        while self.least.peek().is_some_and(|Reverse((least, _))| *least == key) {
            let Some(Reverse((buffer, cursor))) = self.least.pop() else { break };
            let Some((_, entry)) = self.cursors[cursor].current()? else { continue };
            let band = new_band(shape, shard, &key, entry)?;
            match winners.iter_mut().find(|(winner, _, _)| *winner == band) {
                Some((_, _, held)) => {
                    if let Some(winner) =
                        merge(floor, Some(held.as_slice()), Some(entry)).map(<[u8]>::to_vec)
                    {
                        *held = winner;
                    }
                }
                None => winners.push((band, key.clone(), entry.to_vec())),
            }
            self.cursors[cursor].advance();
            self.push(cursor, buffer)?;
        }
        winners.retain(|(_, _, entry)| !vasto_core::merge::is_collected(entry, floor));
        Ok(Some(winners))
    }
}

/// Returns the band of a row in this shard.
fn new_band(shape: Shape, shard: ShardId, key: &[u8], entry: &[u8]) -> Result<Band, BuildError> {
    let decoded = Entry::decode(entry)
        .map_err(|error| BuildError::Mismatch(format!("a moved entry is damaged: {error}")))?;
    let hash = decoded.partition_hash.unwrap_or_else(|| partition_hash(key));
    let home = jump(hash, shape.shards);
    if home.shard != shard {
        return Err(BuildError::Mismatch(format!(
            "a key of the moving bands belongs to shard {}, not to {shard}",
            home.shard
        )));
    }
    Ok(Band::of_next_jump(home.next))
}
