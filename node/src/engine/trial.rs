//! What rows take in tables, tried out on some of them in memory, and how the SSTs divide among the
//! bands.
//!
//! **Invariant:** nothing is written to the disk, and the block cache stays as it is.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};

use rocksdb::{Cache, DBCompressionType, Env, Options, SstFileWriter};
use vasto_core::Band;
use vasto_core::stored_key::META_PREFIX;

use super::entries::{EntryBytes, is_settled};
use super::sample::Walk;
use super::{Engine, EngineError, Row, failed, first_byte, table_format};

/// Some rows of a database, in the order of their keys, and the walk that took them.
pub(crate) struct Sample {
    pub(crate) rows: Vec<Row>,
    pub(crate) walk: Walk,
}

/// Bytes of rows in tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tried {
    /// Of a table beside its rows.
    pub(crate) table: u64,
    /// Of the rows in a table of the bottom level, which are those of ingests and exports too.
    pub(crate) settled: u64,
    /// Of the rows in a table that a flush writes.
    pub(crate) flushed: u64,
}

/// The SSTs that hold rows of one band alone, except for those of the first level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BandFiles {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// Those of the bottom level among them.
    pub(crate) settled_entries: u64,
    pub(crate) settled_bytes: u64,
    pub(crate) settled_files: u64,
}

/// SSTs by number and size.
pub(crate) type Tables = HashSet<(u64, u64)>;

/// The contents of a database by where they are. An entry counts once for each version that is not
/// compacted away yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) bands: BTreeMap<Band, BandFiles>,
    /// In SSTs that hold data of several bands, or are of the first level.
    pub(crate) crossing_entries: u64,
    pub(crate) crossing_bytes: u64,
    /// In memtables, metadata included.
    pub(crate) in_memory: u64,
    /// All SSTs.
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// The number and the size of each.
    pub(crate) tables: Vec<(u64, u64)>,
}

/// Returns the number of an SST by its name in the list of live files.
fn number_of(name: &str) -> Option<u64> {
    name.trim_start_matches('/').strip_suffix(".sst")?.parse().ok()
}

fn row_bytes((key, value): &Row) -> u64 {
    (key.len() + value.len()) as u64
}

impl Engine {
    /// Takes rows that `keeps` accepts at places spread over the data: about `rows` of them, and
    /// about `bytes`; of long rows up to four times as many bytes, and one row more. The walk is over
    /// these places, or over `everything`. Reads from the disk.
    pub(crate) fn sample(
        &self,
        rows: usize,
        bytes: usize,
        everything: bool,
        keeps: impl Fn(&[u8], &[u8]) -> bool,
    ) -> Result<Sample, EngineError> {
        let taken: RefCell<Vec<Row>> = RefCell::default();
        // Each place gives a row, however long it is.
        let left = Cell::new(bytes.saturating_mul(4));
        let take = |key: &[u8], value: &[u8]| {
            let keeps = keeps(key, value);
            let mut taken = taken.borrow_mut();
            // The end of one place may lie beyond the beginning of the next one.
            let ascends = taken.last().is_none_or(|(last, _)| last.as_slice() < key);
            if keeps && ascends && left.get() > 0 {
                left.set(left.get().saturating_sub(key.len() + value.len()));
                taken.push((key.to_vec(), value.to_vec()));
            }
            keeps
        };
        // The beginning too: all of the data may lie before the second place.
        let spots: Vec<Vec<u8>> = std::iter::once(Vec::new()).chain(self.spots()?).collect();
        let each = |all: usize| all.div_ceil(spots.len());
        let (walk, _) = self.walk_at(&spots, each(rows), each(bytes), take)?;
        let walk = match everything {
            true => self.walk_at(&[Vec::new()], usize::MAX, usize::MAX, &keeps)?.0,
            false => walk,
        };
        Ok(Sample { rows: taken.into_inner(), walk })
    }

    /// Writes rows, which ascend, to tables as this database writes them, in memory.
    pub(crate) fn try_tables(rows: &[Row]) -> Result<Tried, EngineError> {
        let Some(least) = rows.iter().min_by_key(|row| row_bytes(row)) else {
            return Ok(Tried::default());
        };
        let all = table_bytes(rows, DBCompressionType::Zstd)?;
        let one = table_bytes(std::slice::from_ref(least), DBCompressionType::Zstd)?;
        // The row takes the part of its bytes that all of them take. It is the shortest one, so that
        // little depends on that.
        let raw: u64 = rows.iter().map(row_bytes).sum();
        let row = row_bytes(least) as f64 * (all as f64 / raw.max(1) as f64).min(1.0);
        let table = one.saturating_sub(row.round() as u64);
        let settled = all.saturating_sub(table);
        let flushed = table_bytes(rows, DBCompressionType::Lz4)?.saturating_sub(table);
        Ok(Tried { table, settled, flushed })
    }

    /// Returns how the contents divide among the bands.
    pub(crate) fn files_by_band(&self) -> Result<Files, EngineError> {
        let mut all = Files { in_memory: self.entries_in_memory(), ..Files::default() };
        let files = self.live_files()?;
        let each = EntryBytes::of(&files);
        for file in &files {
            let bytes = file.size as u64;
            all.files += 1;
            all.bytes += bytes;
            all.tables.extend(number_of(&file.name).map(|number| (number, bytes)));
            let (Some(first), Some(last)) =
                (first_byte(file.start_key.as_deref()), first_byte(file.end_key.as_deref()))
            else {
                continue;
            };
            if first == META_PREFIX {
                continue;
            }
            let entries = each.entries(file);
            if first != last || file.level == 0 {
                all.crossing_entries += entries;
                all.crossing_bytes += bytes;
                continue;
            }
            let band = all.bands.entry(Band(first)).or_default();
            band.entries += entries;
            band.bytes += bytes;
            if is_settled(file) {
                band.settled_entries += entries;
                band.settled_bytes += bytes;
                band.settled_files += 1;
            }
        }
        Ok(all)
    }

    /// Returns a number that changes with every flush and every compaction.
    pub(crate) fn files_version(&self) -> u64 {
        self.number("rocksdb.current-super-version-number")
    }
}

/// Returns the size of a table with these rows.
fn table_bytes(rows: &[Row], compression: DBCompressionType) -> Result<u64, EngineError> {
    let env = Env::mem_env().map_err(failed("try a table in memory"))?;
    let mut options = Options::default();
    options.set_env(&env);
    options.set_compression_type(compression);
    let mut format = table_format();
    // Not used: nothing is read.
    format.set_block_cache(&Cache::new_lru_cache(0));
    options.set_block_based_table_factory(&format);
    let mut writer = SstFileWriter::create(&options);
    writer.open("/tried.sst").map_err(failed("try a table in memory"))?;
    for (key, value) in rows {
        writer.put(key, value).map_err(failed("try a table in memory"))?;
    }
    writer.finish().map_err(failed("try a table in memory"))?;
    Ok(writer.file_size())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn rows(count: usize, value: impl Fn(usize) -> Vec<u8>) -> Vec<Row> {
        (0..count).map(|n| (format!("\u{5}key{n:06}").into_bytes(), value(n))).collect()
    }

    /// Returns a value of 1,000 letters, which take three quarters of a byte each.
    fn letters(n: usize) -> Vec<u8> {
        let mut state = n as u64 + 1;
        let letter = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            b' ' + ((state >> 33) & 63) as u8
        };
        (0..1_000).map(letter).collect()
    }

    #[test]
    fn small_tables_take_what_many_rows_and_one_row_tell() {
        let all = rows(1_000, letters);
        let tried = Engine::try_tables(&all).unwrap();
        let each = tried.settled as f64 / all.len() as f64;
        for count in [1, 3, 10, 40, 200] {
            let found = table_bytes(&all[500..500 + count], DBCompressionType::Zstd).unwrap();
            let estimated = tried.table as f64 + count as f64 * each;
            let part = estimated / found as f64 - 1.0;
            assert!(part.abs() < 0.06, "{count} rows take {found}, not {estimated}: {tried:?}");
        }
        // The shortest row is the measure, wherever it is.
        let mut uneven = all;
        uneven[0].1 = vec![0x5A; 3 << 20];
        let tried = Engine::try_tables(&uneven).unwrap();
        assert!(tried.table < 4_000, "{tried:?}");
    }

    #[test]
    fn tables_that_are_tried_take_what_compression_leaves() {
        assert_eq!(Engine::try_tables(&[]).unwrap(), Tried::default());
        let same = Engine::try_tables(&rows(2_000, |_| vec![b'a'; 100])).unwrap();
        assert!((300..4_000).contains(&same.table), "{same:?}");
        assert!(same.settled < 40_000 && same.flushed < 60_000, "{same:?}");
        // A generator whose output does not compress.
        let noise = |n: usize| {
            let mut state = n as u64 + 1;
            let byte = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            };
            (0..100).map(byte).collect()
        };
        let noise = Engine::try_tables(&rows(2_000, noise)).unwrap();
        for bytes in [noise.settled, noise.flushed] {
            assert!((200_000..240_000).contains(&bytes), "{noise:?}");
        }
    }
}
