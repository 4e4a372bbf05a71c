//! What a replica would give to others, as its node measures it: the base of all forecasts.
//!
//! **Invariant:** estimates only; nothing but forecasts depends on them. Older nodes report none.

use serde::{Deserialize, Serialize};

use crate::band::Band;
use crate::record::BandRange;

/// The contents of a replica, by the bands that would move.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stored {
    /// Bytes of the SSTs of a checkpoint made now.
    pub checkpoint_bytes: u64,
    /// Number of these SSTs.
    pub checkpoint_files: u64,
    /// Bytes of these SSTs that are not in the bucket, as the last manifest there names its files;
    /// `None` while that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unshipped_bytes: Option<u64>,
    /// Bytes of what no band has in files of its own: memtables, and SSTs of several bands, of
    /// which a reader of one band has to take all.
    pub crossing_bytes: u64,
    /// Bytes of a table beside those of its rows.
    pub table_bytes: u64,
    /// The bands that hold rows, ascending.
    pub bands: Vec<BandSize>,
}

/// The contents of one band; in JSON a list `[band, rows, bytes, file_bytes]`, since there are up
/// to 98 of them in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Band, u64, u64, u64)", into = "(Band, u64, u64, u64)")]
pub struct BandSize {
    /// The band.
    pub band: Band,
    /// Rows that an export would hold: one for each key, tombstones included.
    pub rows: u64,
    /// Bytes of these rows in freshly written tables, without [`Stored::table_bytes`].
    pub bytes: u64,
    /// Bytes of the SSTs that hold rows of this band alone, as they are.
    pub file_bytes: u64,
}

impl From<(Band, u64, u64, u64)> for BandSize {
    fn from((band, rows, bytes, file_bytes): (Band, u64, u64, u64)) -> Self {
        Self { band, rows, bytes, file_bytes }
    }
}

impl From<BandSize> for (Band, u64, u64, u64) {
    fn from(size: BandSize) -> Self {
        (size.band, size.rows, size.bytes, size.file_bytes)
    }
}

impl Stored {
    /// Iterates over the bands of a range that hold rows.
    pub fn in_range(&self, range: BandRange) -> impl Iterator<Item = &BandSize> {
        self.bands.iter().filter(move |size| range.contains(size.band))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_band_is_a_short_list_and_an_old_report_has_none() {
        let size = |band, rows| BandSize { band: Band(band), rows, bytes: 20, file_bytes: 30 };
        let stored =
            Stored { table_bytes: 9, bands: vec![size(4, 10), size(7, 11)], ..Stored::default() };
        let text = serde_json::to_string(&stored).unwrap();
        assert!(
            text.ends_with(r#""table_bytes":9,"bands":[[4,10,20,30],[7,11,20,30]]}"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Stored>(&text).unwrap(), stored);
        assert_eq!(serde_json::from_str::<Stored>("{}").unwrap(), Stored::default());
        let range = BandRange { first: Band(5), last: Band(9) };
        assert_eq!(stored.in_range(range).map(|size| size.rows).collect::<Vec<_>>(), [11]);
    }
}
