//! Makes a checkpoint on the local disk and reads what its manifest says.
//!
//! **Invariant:** everything in a manifest is read from the checkpoint, not from the live database.

use std::path::{Path, PathBuf};

use vasto_core::ids::{Lsn, Vector};
use vasto_core::record::{BandRange, FeedProgress};
use vasto_core::stored_key::MetaKey;
use vasto_shipping::manifest::{DatabaseFile, Manifest, ManifestFile};

use super::super::chunks::UnderWay;
use super::super::context::ShipContext;
use super::super::error::{ShipError, blocking};
use crate::engine::{CheckpointView, EngineError, EngineShared};
use crate::replica::state::{Head, Ranges};
use crate::replica::{Replica, parse_vector};

/// A directory that is removed with its owner.
pub(in crate::ship) struct Folder(PathBuf);

impl Folder {
    /// Names a new directory in `tmp`.
    pub(super) fn new_in(tmp: &Path) -> Self {
        Self(tmp.join(format!("checkpoint-{:016x}", rand::random::<u64>())))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Contents of a checkpoint, read from the checkpoint itself.
pub(in crate::ship) struct Described {
    pub(super) head: Head,
    ranges: Ranges,
    vector: Vector,
    /// Its SSTs, without keys and checksums.
    pub(super) files: Vec<ManifestFile>,
}

impl Described {
    /// Returns the manifest over the uploaded files.
    pub(super) fn manifest(
        self,
        context: &ShipContext,
        files: Vec<ManifestFile>,
        database: DatabaseFile,
        previous: Option<String>,
    ) -> Manifest {
        let replica = &context.replica;
        Manifest {
            keyspace: replica.keyspace,
            shard: replica.shard,
            replica: replica.id,
            incarnation: replica.incarnation(),
            epoch: self.head.epoch,
            version: self.head.version,
            lsn: self.head.applied_lsn,
            vector: self.vector,
            event_time_max: self.head.event_time_max,
            commit_time_max: self.head.commit_time_max,
            floor: self.head.floor,
            created_at_us: context.clock.now_us(),
            nonce: rand::random(),
            previous,
            range_states: self.ranges.runs(),
            ingested: self.ranges.ingested,
            files,
            database: Some(database),
        }
    }
}

/// Parameters of a checkpoint to make.
pub(super) struct Order {
    /// Bands that plans are about to read.
    pub(super) compact: Vec<BandRange>,
    /// LSN of the last manifest.
    pub(super) last: Option<Lsn>,
    /// Says whether the LSN is being fixed.
    pub(super) under_way: UnderWay,
}

/// Makes the checkpoint, after rewriting the bands that a plan is about to read.
pub(super) async fn make(
    replica: Replica,
    engines: EngineShared,
    dir: &Path,
    order: Order,
) -> Result<Described, ShipError> {
    if replica.ranges().is_being_filled() {
        return Err(ShipError::Filling); // it may be begun again, under the same names
    }
    let mut compacted = false;
    for range in order.compact {
        let replica = replica.clone();
        compacted |= blocking(move || compact_if_it_pays(&replica, range)).await?;
    }
    if (compacted && order.last == Some(replica.settled_lsn())) || order.under_way.anew {
        // The same records in other files, or under other names: a manifest of their own needs an
        // LSN of its own.
        replica
            .apply(Vec::new(), vec![FeedProgress::Tail(replica.id, replica.settled_lsn())])
            .await?;
    }
    let path = dir.to_owned();
    order.under_way.set_fixing(true);
    blocking(move || {
        replica.engine().checkpoint(&path)?;
        describe(&engines, &path)
    })
    .await
}

/// Rewrites the bands if that pays. A reader of the bands must fetch every file that touches them:
/// when files that reach beyond the bands are more than a tenth of it, rewriting the bands first is
/// cheaper than shipping them.
fn compact_if_it_pays(replica: &Replica, range: BandRange) -> Result<bool, EngineError> {
    let engine = replica.engine();
    engine.flush()?;
    let (inside, crossing) = engine.band_bytes(range)?;
    let pays = crossing > inside / 10;
    if pays {
        engine.compact_bands(range);
    }
    Ok(pays)
}

fn describe(engines: &EngineShared, dir: &Path) -> Result<Described, ShipError> {
    let odd = |what: &str| ShipError::Checkpoint(what.to_owned());
    let view = CheckpointView::open(engines, dir)?;
    let head = view.get(&MetaKey::Head.encode())?.ok_or_else(|| odd("it has no head"))?;
    let ranges =
        view.get(&MetaKey::RangeStates.encode())?.ok_or_else(|| odd("it has no range states"))?;
    let files = view
        .files()?
        .into_iter()
        .map(|file| {
            let number = file.name.trim_start_matches('/').trim_end_matches(".sst");
            Ok(ManifestFile {
                key: String::new(),
                file_number: number
                    .parse()
                    .map_err(|_| odd(&format!("{} is not an SST", file.name)))?,
                bytes: file.size as u64,
                crc32c: 0,
                level: file.level,
                smallest_seqno: file.smallest_seqno,
                largest_seqno: file.largest_seqno,
                first_key: file.start_key.ok_or_else(|| odd("an SST without a first key"))?,
                last_key: file.end_key.ok_or_else(|| odd("an SST without a last key"))?,
                entries: file.num_entries,
            })
        })
        .collect::<Result<Vec<_>, ShipError>>()?;
    Ok(Described {
        head: Head::decode(&head).map_err(|error| odd(&error.to_string()))?,
        ranges: Ranges::decode(&ranges).map_err(|error| odd(&error.to_string()))?,
        vector: parse_vector(&view.with_prefix(&MetaKey::vector_prefix())?),
        files,
    })
}
