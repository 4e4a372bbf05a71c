//! Ranges of bands and their states, as records name them.

use crate::band::Band;
use crate::codec::DecodeError;

/// State of a range of bands in a replica. Persisted: never reuse a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RangeState {
    /// Nothing is stored or served.
    Empty = 0,
    /// Served.
    Owned = 1,
    /// Being filled; not served yet.
    Arriving = 2,
    /// Given away; kept for the quarantine, not served.
    Leaving = 3,
    /// Logically removed: a range delete is applied and its compaction is still to come. Becomes
    /// `Empty` only once nothing of it is left in any file.
    Clearing = 4,
}

impl RangeState {
    /// Reads the persisted number.
    pub fn from_u8(value: u8) -> Result<Self, DecodeError> {
        Ok(match value {
            0 => RangeState::Empty,
            1 => RangeState::Owned,
            2 => RangeState::Arriving,
            3 => RangeState::Leaving,
            4 => RangeState::Clearing,
            other => return Err(DecodeError::Unknown { what: "range state", value: other.into() }),
        })
    }
}

/// An inclusive range of bands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct BandRange {
    /// First band.
    pub first: Band,
    /// Last band.
    pub last: Band,
}

impl BandRange {
    /// Iterates over the bands.
    pub fn bands(self) -> impl Iterator<Item = Band> {
        (self.first.0..=self.last.0).map(Band)
    }

    /// Returns true when the band lies in the range.
    pub fn contains(self, band: Band) -> bool {
        (self.first..=self.last).contains(&band)
    }

    /// Returns true when the two ranges share a band.
    pub fn overlaps(self, other: BandRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl From<std::ops::RangeInclusive<Band>> for BandRange {
    fn from(range: std::ops::RangeInclusive<Band>) -> Self {
        Self { first: *range.start(), last: *range.end() }
    }
}
