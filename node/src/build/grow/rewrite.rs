//! Decodes moved rows, assigns their new bands, and writes SSTs that do not overlap.
//!
//! The rows of one old band arrive in key order from every source; merged by key they feed one open
//! table per new band, each of which again receives its keys in order. One pass and a bounded
//! amount of memory therefore suffice for any size.
//!
//! **Invariant:** every row of the moving bands is written exactly once, to the band that its hash
//! has in this shard; a row that does not belong here stops the build.

use std::path::{Path, PathBuf};

use vasto_core::Band;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::merge::merge;
use vasto_core::record::BandRange;

use crate::build::error::{BuildError, io};
use crate::engine::{BandRows, ImportFile, Scratch, TableSet, WrittenTable};
use crate::replica::Replica;

/// The downloaded files of one source.
pub(super) struct SourceFiles {
    pub download_dir: PathBuf,
    pub scratch_dir: PathBuf,
    pub files: Vec<ImportFile>,
}

/// The result of a rewrite.
pub(super) struct Rewritten {
    pub tables: Vec<WrittenTable>,
    pub rows: u64,
    pub event_time_max: u64,
}

pub(super) fn rewrite(
    replica: &Replica,
    sources: &[SourceFiles],
    moving: BandRange,
    shards: u32,
    floor: u64,
    out: &Path,
) -> Result<Rewritten, BuildError> {
    // Left over from an interrupted attempt; the scratch databases only link to the downloads, so
    // these are still there.
    for dir in sources.iter().map(|source| source.scratch_dir.as_path()).chain([out]) {
        if dir.exists() {
            std::fs::remove_dir_all(dir).map_err(io(dir))?;
        }
    }
    std::fs::create_dir_all(out).map_err(io(out))?;
    let scratches = sources
        .iter()
        .map(|source| Scratch::import(&source.scratch_dir, &source.download_dir, &source.files))
        .collect::<Result<Vec<_>, _>>()?;
    let mut tables = TableSet::new(replica.engine(), out);
    let mut event_time_max = 0;
    for band in moving.bands() {
        let mut rows: Vec<BandRows<'_>> =
            scratches.iter().map(|scratch| scratch.rows(band)).collect();
        while let Some(winners) = next_key(&mut rows, replica, shards, floor)? {
            for (band, key, entry) in winners {
                event_time_max =
                    event_time_max.max(vasto_core::entry::event_time_of(&entry).unwrap_or(0));
                tables.put(band, &key, &entry)?;
            }
        }
    }
    let (tables, rows) = tables.finish()?;
    Ok(Rewritten { tables, rows, event_time_max })
}

type Row = (Band, Vec<u8>, Vec<u8>);

/// Takes the least key from all sources; returns one winner per new band (several only when a key
/// is stored under several partitions), or `None` at the end.
fn next_key(
    rows: &mut [BandRows<'_>],
    replica: &Replica,
    shards: u32,
    floor: u64,
) -> Result<Option<Vec<Row>>, BuildError> {
    let mut least: Option<Vec<u8>> = None;
    for source in rows.iter() {
        if let Some((key, _)) = source.current()?
            && least.as_deref().is_none_or(|least| key < least)
        {
            least = Some(key.to_vec());
        }
    }
    let Some(key) = least else { return Ok(None) };
    let mut winners: Vec<Row> = Vec::new();
    for source in rows.iter_mut() {
        let Some((_, entry)) = source.current()?.filter(|(current, _)| *current == key.as_slice())
        else {
            continue;
        };
        let band = new_band(replica, &key, entry, shards)?;
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
        source.advance();
    }
    winners.retain(|(_, _, entry)| !vasto_core::merge::is_collected(entry, floor));
    Ok(Some(winners))
}

fn new_band(replica: &Replica, key: &[u8], entry: &[u8], shards: u32) -> Result<Band, BuildError> {
    let decoded = Entry::decode(entry)
        .map_err(|error| BuildError::Mismatch(format!("a moved entry is damaged: {error}")))?;
    let hash = decoded.partition_hash.unwrap_or_else(|| partition_hash(key));
    let home = jump(hash, shards);
    if home.shard != replica.shard {
        return Err(BuildError::Mismatch(format!(
            "a key of the moving bands belongs to shard {}, not to {}",
            home.shard, replica.shard
        )));
    }
    Ok(Band::of_next_jump(home.next))
}
