//! The number of entries of each SST.
//!
//! RocksDB knows it of the files that it has looked into: with each change of the files that is
//! twenty more of them, the upper levels first. Of the others it says 0, and a database that has just
//! been compacted consists of such files: one for each band, and up to 98 bands.
//!
//! **Invariant:** nothing is read from the disk. A file that RocksDB has not looked into is taken to
//! hold rows like those of the files that it has.

use rocksdb::LiveFile;
use vasto_core::stored_key::META_PREFIX;

use super::first_byte;

/// Bytes of a table beside its rows: properties, an index, a filter and a footer.
const TABLE_BYTES: f64 = 1_500.0;

/// The bottom level: RocksDB's default of seven levels, filled from below.
const BOTTOM_LEVEL: i32 = 6;

/// Returns true when a file is of the bottom level.
pub(super) fn is_settled(file: &LiveFile) -> bool {
    file.level >= BOTTOM_LEVEL
}

/// Bytes of an entry in the files of data that RocksDB has looked into.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct EntryBytes {
    /// Of the bottom level, and of the levels above it, which are compressed differently.
    settled: Option<f64>,
    others: Option<f64>,
}

/// Bytes and entries of some files.
#[derive(Default)]
struct Sum {
    bytes: f64,
    entries: f64,
}

impl Sum {
    fn add(&mut self, file: &LiveFile) {
        self.bytes += rows_bytes(file);
        self.entries += file.num_entries as f64;
    }

    fn each(&self) -> Option<f64> {
        (self.entries > 0.0 && self.bytes > 0.0).then(|| self.bytes / self.entries)
    }
}

/// Returns the bytes of a file without those that every table has.
fn rows_bytes(file: &LiveFile) -> f64 {
    (file.size as f64 - TABLE_BYTES).max(0.0)
}

impl EntryBytes {
    /// Learns from the files that RocksDB has looked into.
    pub(super) fn of(files: &[LiveFile]) -> Self {
        let (mut settled, mut others) = (Sum::default(), Sum::default());
        let is_data = |file: &&LiveFile| {
            first_byte(file.start_key.as_deref()).is_some_and(|first| first < META_PREFIX)
        };
        for file in files.iter().filter(is_data).filter(|file| file.num_entries > 0) {
            match is_settled(file) {
                true => settled.add(file),
                false => others.add(file),
            }
        }
        Self { settled: settled.each(), others: others.each() }
    }

    /// Returns the entries of a file of data, without deletions and what these hide.
    pub(super) fn entries(self, file: &LiveFile) -> u64 {
        if file.num_entries > 0 {
            return file.num_entries.saturating_sub(2 * file.num_deletions);
        }
        let each = match is_settled(file) {
            true => self.settled.or(self.others),
            false => self.others.or(self.settled),
        };
        each.map_or(0, |each| (rows_bytes(file) / each).round().max(1.0) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(level: i32, size: usize, entries: u64) -> LiveFile {
        LiveFile {
            column_family_name: "default".into(),
            name: "/000007.sst".into(),
            directory: String::new(),
            size,
            level,
            start_key: Some(vec![7, b'a']),
            end_key: Some(vec![7, b'z']),
            smallest_seqno: 0,
            largest_seqno: 0,
            num_entries: entries,
            num_deletions: 0,
        }
    }

    #[test]
    fn a_file_that_nobody_has_looked_into_holds_rows_like_the_others_of_its_kind() {
        let known = [file(6, 101_500, 1_000), file(6, 11_500, 100), file(0, 201_500, 1_000)];
        let each = EntryBytes::of(&known);
        assert_eq!(each.entries(&known[0]), 1_000);
        assert_eq!(each.entries(&file(6, 3_500, 0)), 20);
        assert_eq!(each.entries(&file(6, 900, 0)), 1, "every file holds something");
        assert_eq!(each.entries(&file(1, 3_500, 0)), 10);
        // Only files of another kind are known.
        assert_eq!(EntryBytes::of(&known[2..]).entries(&file(6, 3_500, 0)), 10);
        assert_eq!(EntryBytes::of(&[]).entries(&file(6, 3_500, 0)), 0);
        // Metadata are no rows.
        let metadata = LiveFile { start_key: Some(vec![META_PREFIX]), ..file(6, 1_600, 90) };
        assert_eq!(EntryBytes::of(&[metadata]), EntryBytes::default());
        let deleted = LiveFile { num_deletions: 5, ..file(6, 101_500, 1_000) };
        assert_eq!(each.entries(&deleted), 990);
    }
}
