//! Estimate of how many stored entries are rows that a reader would see, from a walk over some of
//! them.
//!
//! RocksDB counts entries: one for each version that is not compacted away yet, tombstones and
//! expired values included. A walk examines the entries, and RocksDB reports how many versions it
//! passed over.

use rocksdb::ReadOptions;
use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};
use vasto_core::band::Band;
use vasto_core::stored_key::META_PREFIX;

use super::{Engine, EngineError, failed};

/// Number of places in the database that a walk samples.
const SPOTS: usize = 48;

/// Steps of this part of a range come close to every part of it, however many there are: the golden
/// ratio.
const STEP_PART: f64 = 0.618_033_988_75;

/// Result of a walk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    /// Rows that a reader would see.
    pub live: u64,
    /// Entries that were passed: those rows, hidden rows, and older versions.
    pub entries: u64,
    /// True when the walk saw everything: `live` is exact.
    pub complete: bool,
}

impl Engine {
    /// Walks over the data from its beginning; when that does not end within `rows` stored rows,
    /// over as many at places spread over all of it. `is_live` receives the stored key and value.
    /// Reads from the disk, and leaves the block cache unchanged.
    pub(crate) fn walk(
        &self,
        rows: usize,
        is_live: impl Fn(&[u8], &[u8]) -> bool,
    ) -> Result<Walk, EngineError> {
        let (walk, at_end) = self.walk_at(&[Vec::new()], rows, usize::MAX, &is_live)?;
        if at_end {
            return Ok(Walk { complete: true, ..walk });
        }
        let spots = self.spots()?;
        let each = rows.div_ceil(spots.len().max(1));
        Ok(self.walk_at(&spots, each, usize::MAX, &is_live)?.0)
    }

    /// Walks over `each` rows from each of these keys, and over not many more than `bytes_each`
    /// bytes; also returns whether the last walk reached the end.
    pub(super) fn walk_at(
        &self,
        spots: &[Vec<u8>],
        each: usize,
        bytes_each: usize,
        is_live: impl Fn(&[u8], &[u8]) -> bool,
    ) -> Result<(Walk, bool), EngineError> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound([META_PREFIX]);
        let mut cursor = self.db.raw_iterator_opt(options);
        let counting = Counting::start();
        let mut walk = Walk::default();
        let mut passed = 0;
        for spot in spots {
            cursor.seek(spot);
            let mut bytes = 0;
            for _ in 0..each {
                let Some((key, value)) = cursor.item() else { break };
                bytes += key.len() + value.len();
                walk.live += u64::from(is_live(key, value));
                passed += 1;
                cursor.next();
                if bytes >= bytes_each {
                    break;
                }
            }
            cursor.status().map_err(failed("walk over the rows"))?;
        }
        // Each step passes the row that it leaves; further passed entries are older versions.
        walk.entries = passed + counting.skipped().saturating_sub(passed);
        Ok((walk, !cursor.valid()))
    }

    /// Returns places spread over the data, as the SSTs divide it. The place in each part differs:
    /// neighbours in the order of keys were often written at the same time, and so have as many older
    /// versions.
    pub(super) fn spots(&self) -> Result<Vec<Vec<u8>>, EngineError> {
        let files = self.live_files()?;
        let mut starts: Vec<Vec<u8>> =
            files.into_iter().filter_map(|file| file.start_key).collect();
        starts.retain(|start| start.first().is_some_and(|first| *first < META_PREFIX));
        // With few files: bands.
        if starts.len() < SPOTS {
            starts.extend(Band::all().map(|band| vec![band.0]));
        }
        starts.sort_unstable();
        starts.dedup();
        let step = starts.len().div_ceil(SPOTS).max(1);
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound([META_PREFIX]);
        let mut cursor = self.db.raw_iterator_opt(options);
        let mut spots = Vec::new();
        for at in (0..starts.len()).step_by(step) {
            let end = starts.get(at + step).cloned().unwrap_or_else(|| vec![META_PREFIX]);
            cursor.seek(&starts[at]);
            let Some(first) = cursor.key().map(<[u8]>::to_vec) else { break };
            if first >= end {
                continue;
            }
            cursor.seek_for_prev(&end);
            let last = cursor.key().map_or_else(|| first.clone(), <[u8]>::to_vec);
            let part = (spots.len() as f64 * STEP_PART).fract();
            spots.push(between(&first, &last, part));
        }
        cursor.status().map_err(failed("look for places in the data"))?;
        Ok(spots)
    }
}

/// Returns a key that lies about this part of the way from one key to another.
fn between(first: &[u8], last: &[u8], part: f64) -> Vec<u8> {
    let common = first.iter().zip(last).take_while(|(a, b)| a == b).count();
    let number = |key: &[u8]| {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(&key[common..]) {
            *to = *from;
        }
        u64::from_be_bytes(bytes)
    };
    let (low, high) = (number(first), number(last));
    let at = low.saturating_add((high.saturating_sub(low) as f64 * part) as u64);
    [&first[..common], &at.to_be_bytes()].concat()
}

/// Guard: RocksDB counts on this thread as long as this lives.
struct Counting(PerfContext);

impl Counting {
    fn start() -> Self {
        set_perf_stats(PerfStatsLevel::EnableCount);
        let mut context = PerfContext::default();
        context.reset();
        Self(context)
    }

    fn skipped(&self) -> u64 {
        self.0.metric(PerfMetric::InternalKeySkippedCount)
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        set_perf_stats(PerfStatsLevel::Disable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_between_two_keys_lies_between_them() {
        let (first, last) = (b"\x05key1", b"\x05key9zz");
        let mut before = Vec::new();
        for part in [0.0, 0.1, 0.5, 0.9, 0.999] {
            let at = between(first, last, part);
            assert!(at > before && at.as_slice() <= last.as_slice(), "{part}: {at:?}");
            assert!(at.starts_with(b"\x05key"), "{at:?}");
            before = at;
        }
        // Equal keys, a key that begins the other one, and a wrong order.
        let cases: [(&[u8], &[u8], &[u8]); 4] =
            [(b"ab", b"ab", b"ab"), (b"ab", b"abc", b"ab"), (b"b", b"a", b""), (b"", b"", b"")];
        for (first, last, common) in cases {
            assert!(between(first, last, 0.7).starts_with(common), "{first:?} {last:?}");
        }
    }
}
