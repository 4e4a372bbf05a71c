//! What the replica would give to others, by band, for the master's forecasts.
//!
//! What a plan moves are rows, rewritten into fresh tables; what the database has are files: with
//! several versions of a key, with bands in quarantine, with another compression in the upper
//! levels, and memtables beside them. Two ways lead from one to the other:
//! 1. *The manifest in the bucket, when a forecast is asked for.* Its files say exactly what a reader
//!    would fetch, but only of the time of the last checkpoint: straight after writes most of the
//!    data is in no manifest, and each plan makes a new checkpoint first, often after a rewriting.
//! 2. *The live files and a trial.* The list of files says how entries divide among the bands; a
//!    few thousand rows, written to tables in memory, say how many of the entries are rows and what
//!    a row takes.
//!
//! The second: it holds at any time, and costs milliseconds when the data has changed by a
//! twentieth. What only the bucket knows (of a replica that is gone) is read there by the master.
//!
//! **Invariant:** an estimate. The entries in memtables and in files of several bands are divided
//! by the hash: where few partition keys have most of the rows, they are wrong until compacted.

use std::time::{Duration, Instant};

use vasto_core::band::Band;
use vasto_core::entry::Entry;
use vasto_core::merge::is_collected;
use vasto_core::stored::{BandSize, Stored};

use super::handle::Replica;
use super::shared::Trial;
use crate::engine::{Engine, EngineError, Files, Tables};

/// Rows of a trial, and their bytes.
const TRIED_ROWS: usize = 4_000;
const TRIED_BYTES: usize = 1 << 20;

/// The walk of a trial is over all of the data when there are no more entries than this, in files of
/// no more bytes: some ten milliseconds.
const WALKED_ENTRIES: u64 = 20_000;
const WALKED_BYTES: u64 = 32 << 20;

/// A trial serves while the number of entries has changed by less than this part.
const CHANGED_PART: u64 = 20;

/// It serves for no longer than this while anything is written.
const TRIAL_AGE: Duration = Duration::from_secs(60);

impl Replica {
    /// Returns true when records were applied, or files rewritten, since the last trial was checked.
    /// Cheap.
    pub(crate) fn may_have_outgrown_its_trial(&self) -> bool {
        let now = (self.applied_lsn(), self.shared.engine.files_version());
        self.closed().is_none() && self.shared.trials.lock().checked != Some(now)
    }

    /// Tries what the rows take in tables, unless the last trial still serves. Blocks on the disk.
    pub(crate) fn try_tables(&self) -> Result<(), EngineError> {
        let now = (self.applied_lsn(), self.shared.engine.files_version());
        let files = self.shared.engine.files_by_band()?;
        let entries = entries(&files, self.metadata_in_memory());
        let last = self.shared.trials.lock().last;
        let serves = |trial: &Trial| {
            trial.entries.abs_diff(entries) <= trial.entries / CHANGED_PART
                && trial.at.elapsed() < TRIAL_AGE
        };
        let mut tried = last;
        if !last.as_ref().is_some_and(serves) && entries > 0 {
            let everything = entries <= WALKED_ENTRIES && files.bytes <= WALKED_BYTES;
            tried = self.tried(entries, everything)?.or(last);
        }
        let mut trials = self.shared.trials.lock();
        (trials.last, trials.checked) = (tried, Some(now));
        Ok(())
    }

    fn tried(&self, entries: u64, everything: bool) -> Result<Option<Trial>, EngineError> {
        let floor = self.floor();
        let keeps =
            |_: &[u8], entry: &[u8]| Entry::decode(entry).is_ok() && !is_collected(entry, floor);
        let sample = self.shared.engine.sample(TRIED_ROWS, TRIED_BYTES, everything, keeps)?;
        if sample.rows.is_empty() {
            return Ok(None);
        }
        let tried = Engine::try_tables(&sample.rows)?;
        let each = |bytes: u64| bytes as f64 / sample.rows.len() as f64;
        let live = sample.walk.live as f64;
        let kept = match everything {
            true => live,
            false => entries as f64 * (live / sample.walk.entries.max(1) as f64).min(1.0),
        };
        Ok(Some(Trial {
            at: Instant::now(),
            entries,
            kept,
            table: tried.table,
            settled: each(tried.settled),
            flushed: each(tried.flushed),
        }))
    }

    /// Returns the contents by band, and what of them is not in the bucket, given the files that the
    /// last manifest names; `None` before the first trial. As cheap as a list of the files.
    pub(crate) fn stored_by_band(&self, named: Option<&Tables>) -> Option<Stored> {
        let trial = self.shared.trials.lock().last?;
        let files = self.shared.engine.files_by_band().ok()?;
        let in_memory = files.in_memory.saturating_sub(self.metadata_in_memory());
        let owned: Vec<Band> = self.ranges().owned().collect();
        let stored = by_band(&files, in_memory, &trial, &owned);
        let flushed = stored.checkpoint_bytes - files.bytes;
        let unshipped_bytes = named.map(|named| flushed + not_in(named, &files));
        Some(Stored { unshipped_bytes, ..stored })
    }
}

/// Returns the bytes of the SSTs that are not among these.
fn not_in(named: &Tables, files: &Files) -> u64 {
    let others = files.tables.iter().filter(|table| !named.contains(*table));
    others.map(|(_, bytes)| bytes).sum()
}

/// Returns the stored entries of data.
fn entries(files: &Files, metadata_in_memory: u64) -> u64 {
    let in_files: u64 = files.bands.values().map(|band| band.entries).sum();
    in_files + files.crossing_entries + files.in_memory.saturating_sub(metadata_in_memory)
}

/// Divides what a database holds among the bands. `in_memory` are the entries of data in memtables,
/// `owned` the bands that the replica owns, ascending.
fn by_band(files: &Files, in_memory: u64, trial: &Trial, owned: &[Band]) -> Stored {
    let in_files: u64 = files.bands.values().map(|band| band.entries).sum();
    let loose = files.crossing_entries + in_memory;
    let all = in_files + loose;
    // What was written since the trial counts as new; what has gone was of no use.
    let rows = (trial.kept + all.saturating_sub(trial.entries) as f64).min(all as f64);
    let kept = rows / all.max(1) as f64;
    let shards = owned.first().map_or(1, |first| first.low_edge());
    let weight = |band: Band| {
        let in_files = files.bands.get(&band).map_or(0, |band| band.entries);
        in_files as f64 + band.share(shards) * loose as f64
    };
    let weights: f64 = owned.iter().map(|band| weight(*band)).sum();
    let size_of = |band: Band| {
        let part = if owned.contains(&band) { weight(band) / weights.max(1.0) } else { 0.0 };
        let loose = loose as f64 * part;
        let here = files.bands.get(&band).copied().unwrap_or_default();
        let tables = here.settled_files * trial.table;
        let settled = here.settled_bytes.saturating_sub(tables) as f64;
        let others = (here.entries - here.settled_entries) as f64 + loose;
        BandSize {
            band,
            rows: (kept * (here.entries as f64 + loose)).round() as u64,
            bytes: (kept * (settled + others * trial.settled)).round() as u64,
            file_bytes: here.bytes,
        }
    };
    let flushed = match in_memory {
        0 => 0,
        entries => trial.table + (entries as f64 * kept * trial.flushed).round() as u64,
    };
    Stored {
        checkpoint_bytes: files.bytes + flushed,
        checkpoint_files: files.files + u64::from(in_memory > 0),
        unshipped_bytes: None,
        crossing_bytes: files.crossing_bytes + flushed,
        table_bytes: trial.table,
        bands: Band::all().map(size_of).filter(|size| size.rows > 0).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BandFiles;

    fn trial(entries: u64, kept: f64) -> Trial {
        Trial { at: Instant::now(), entries, kept, table: 1_000, settled: 50.0, flushed: 80.0 }
    }

    fn owned(first: u8) -> Vec<Band> {
        Band::all().filter(|band| band.0 >= first).collect()
    }

    fn settled(entries: u64, bytes: u64) -> BandFiles {
        BandFiles {
            entries,
            bytes,
            settled_entries: entries,
            settled_bytes: bytes,
            settled_files: 1,
        }
    }

    #[test]
    fn compacted_bands_have_their_files_and_memtables_are_divided_by_the_hash() {
        let compacted = Files {
            bands: [(Band(2), settled(1_000, 51_000)), (Band(3), settled(300, 16_000))].into(),
            files: 3,
            bytes: 68_000,
            ..Files::default()
        };
        let stored = by_band(&compacted, 0, &trial(1_300, 1_300.0), &owned(2));
        let size =
            |band, rows, bytes, file_bytes| BandSize { band: Band(band), rows, bytes, file_bytes };
        assert_eq!(stored.bands, [size(2, 1_000, 50_000, 51_000), size(3, 300, 15_000, 16_000)]);
        assert_eq!((stored.checkpoint_bytes, stored.checkpoint_files), (68_000, 3));
        assert_eq!((stored.crossing_bytes, stored.table_bytes), (0, 1_000));

        // A third of the keys of a shard of two leaves it for the third shard.
        let fresh = by_band(&Files::default(), 9_000, &trial(9_000, 9_000.0), &owned(2));
        assert_eq!(fresh.bands[0], size(2, 3_000, 150_000, 0));
        let rows: u64 = fresh.bands.iter().map(|size| size.rows).sum();
        assert!((8_950..=9_050).contains(&rows), "{rows}");
        assert_eq!((fresh.checkpoint_bytes, fresh.crossing_bytes), (721_000, 721_000));
    }

    #[test]
    fn older_versions_are_no_rows_and_leave_with_compaction() {
        let twice = Files { crossing_entries: 2_000, crossing_bytes: 160_000, ..Files::default() };
        let trial = trial(2_000, 1_000.0);
        let rows = |files: &Files, in_memory| {
            let stored = by_band(files, in_memory, &trial, &owned(1));
            stored.bands.iter().map(|size| size.rows).sum::<u64>()
        };
        assert!(rows(&twice, 0).abs_diff(1_000) < 30, "{}", rows(&twice, 0));
        assert!(rows(&twice, 500).abs_diff(1_500) < 30, "what came since is new");
        let once = Files { bands: [(Band(1), settled(1_000, 51_000))].into(), ..Files::default() };
        assert_eq!(rows(&once, 0), 1_000);
    }

    #[test]
    fn a_file_that_the_manifest_does_not_name_or_with_another_size_is_not_in_the_bucket() {
        let files = Files { tables: vec![(3, 100), (4, 20), (9, 7)], ..Files::default() };
        assert_eq!(not_in(&[(3, 100), (4, 21), (5, 1_000)].into(), &files), 27);
        assert_eq!(not_in(&Tables::new(), &files), 127);
    }

    #[test]
    fn what_is_in_quarantine_stays_apart_and_gets_nothing_of_what_is_new() {
        let files = Files {
            bands: [(Band(2), settled(400, 21_000)), (Band(3), settled(600, 31_000))].into(),
            ..Files::default()
        };
        let stored = by_band(&files, 1_000, &trial(2_000, 2_000.0), &owned(3));
        assert_eq!((stored.bands[0].band, stored.bands[0].rows), (Band(2), 400));
        let others: u64 = stored.bands[1..].iter().map(|size| size.rows).sum();
        assert!(others.abs_diff(1_600) < 40, "{others}");
    }
}
