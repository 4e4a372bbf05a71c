//! Scans of a shard, page by page.
//!
//! **Invariants**
//! - A page of a scan bounds the rows that it examines, not only those that it returns: it reports
//!   how far it got, and the next page continues there.
//! - Rows are ordered by user key and, for one user key, by the hashes of its partitions, each of
//!   which is a record of its own: a page may end between them, and the next page continues there.
//!
//! A page finds the first key of every owned band with one shared cursor. A band gets its own
//! cursor once its row is next, so that a short scan opens few cursors.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use bytes::Bytes;
use vasto_core::entry::Entry;
use vasto_core::hash::partition_hash;
use vasto_core::ids::Epoch;
use vasto_core::limits::{
    SCAN_PAGE_BYTES_MAX, SCAN_PAGE_EXAMINED_MAX, SCAN_PAGE_ROWS_MAX, SCAN_PAGE_TIME, SEALED_READS,
};
use vasto_core::record::RangeState;
use vasto_core::stored_key::data_key;
use vasto_core::{Band, VastoError};
use vasto_proto::v1;

use super::{node_behind, visible_value};
use crate::engine::{Cursor, EngineError, RowRef, View};
use crate::replica::command::wrong_epoch;
use crate::replica::handle::Replica;

/// One page of a scan of one shard.
#[derive(Debug, Clone, Default)]
pub(crate) struct ScanPage {
    /// Prefix of all keys.
    pub prefix: Bytes,
    /// User key after which to resume.
    pub after: Option<Bytes>,
    /// With `after`: resume after the row of that key and this partition, not after all rows of the
    /// key.
    pub after_partition_hash: Option<u64>,
    /// The only partition to scan.
    pub partition_hash: Option<u64>,
    /// Maximum number of rows; 0 means a full page.
    pub limit: usize,
    /// True to leave the values out.
    pub keys_only: bool,
}

impl Replica {
    /// Returns one page in the order of user keys. The request's epoch must be the one in force
    /// here: a scan of another epoch would miss or repeat moved rows. Blocks on the disk.
    pub(crate) fn scan(&self, epoch: Epoch, page: &ScanPage) -> Result<v1::ScanReply, VastoError> {
        let view = self.view();
        let before = &view.ranges;
        if epoch != view.epoch {
            return Err(if epoch > view.epoch { node_behind() } else { wrong_epoch() });
        }
        let bands: Vec<Band> = match page.partition_hash {
            None => before.owned().collect(),
            Some(hash) => {
                let band = Band::in_shard(hash, self.shard).ok_or_else(wrong_epoch)?;
                if before.state(band) != RangeState::Owned {
                    return Err(wrong_epoch());
                }
                vec![band]
            }
        };
        if bands.iter().any(|band| before.is_stale(*band, SEALED_READS)) {
            return Err(node_behind());
        }
        let reply = self.scan_bands(&bands, page)?;
        // The page is answered only if it shows a point in time at which every band was owned.
        let view = self.view();
        let after = &view.ranges;
        let still_owned = bands.iter().all(|band| after.state(*band) == RangeState::Owned);
        if epoch != view.epoch || !still_owned {
            return Err(wrong_epoch());
        }
        if bands.iter().any(|band| after.is_stale(*band, SEALED_READS)) {
            return Err(node_behind());
        }
        Ok(reply)
    }

    fn scan_bands(&self, bands: &[Band], page: &ScanPage) -> Result<v1::ScanReply, VastoError> {
        let now_us = self.shared.clock.now_us();
        let limit =
            if page.limit == 0 { SCAN_PAGE_ROWS_MAX } else { page.limit.min(SCAN_PAGE_ROWS_MAX) };
        let after = page.after.as_ref().filter(|after| after.as_ref() >= page.prefix.as_ref());
        let start = match (after, page.after_partition_hash) {
            // An immediate successor of `after` is `after` with a zero byte.
            (Some(after), None) => [after.as_ref(), &[0]].concat(),
            (Some(after), Some(_)) => after.to_vec(),
            (None, _) => page.prefix.to_vec(),
        };
        let is_after = |at: &Place| match (after, page.after_partition_hash) {
            (Some(after), Some(hash)) => at.key != after.as_ref() || at.hash > hash,
            _ => true,
        };
        let view = self.shared.engine.view();
        // Next row of each band.
        let mut heap = first_rows(&view, bands, &start, &page.prefix)?;
        let mut cursors: Vec<Option<Cursor<'_>>> = Vec::new();
        cursors.resize_with(1 + usize::from(u8::MAX), || None);
        let mut reply = v1::ScanReply::default();
        let mut bytes = 0;
        // Measured from here, not before the seeks: a page makes progress however slow they were.
        let (started, mut examined) = (Instant::now(), 0);
        while let Some(Reverse(at)) = heap.pop() {
            let cursor = cursors[usize::from(at.band.0)].get_or_insert_with(|| {
                view.cursor(&data_key(at.band, &at.key), upper_bound(at.band, &page.prefix))
            });
            let Some((_, encoded)) = cursor.current()? else { continue };
            examined += 1;
            let is_last = examined >= SCAN_PAGE_EXAMINED_MAX || started.elapsed() >= SCAN_PAGE_TIME;
            let resume_after = is_last.then(|| Bytes::copy_from_slice(&at.key));
            let in_partition = page.partition_hash.is_none_or(|hash| at.hash == hash);
            if in_partition
                && is_after(&at)
                && let Some(value) = visible_value(encoded, now_us, page.keys_only)?
            {
                let weight = at.key.len() + 64 + value_bytes(&value);
                if reply.rows.len() >= limit
                    || (!reply.rows.is_empty() && bytes + weight > SCAN_PAGE_BYTES_MAX)
                {
                    reply.more = true;
                    return Ok(reply);
                }
                bytes += weight;
                let partition_hash = at.other_partition.then_some(at.hash);
                reply.rows.push(v1::Row { key: at.key.into(), partition_hash, value: Some(value) });
            }
            cursor.advance();
            if let Some(row) = cursor.current()? {
                heap.push(Reverse(Place::of(at.band, row)));
            }
            // A page that ends at the examination limit ends after all rows of a key.
            let next = heap.peek().map(|Reverse(next)| next.key.as_slice());
            if resume_after.as_deref().zip(next).is_some_and(|(last, next)| last != next) {
                reply.more = true;
                reply.resume_after = resume_after;
                return Ok(reply);
            }
        }
        Ok(reply)
    }
}

/// Position of a stored row among all rows.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    key: Vec<u8>,
    /// Hash of its partition key.
    hash: u64,
    band: Band,
    /// True when the partition key is not the user key itself.
    other_partition: bool,
}

impl Place {
    fn of(band: Band, (stored, encoded): RowRef<'_>) -> Self {
        let key = stored[1..].to_vec();
        // The reader of a damaged entry reports it.
        let named = Entry::decode(encoded).ok().and_then(|entry| entry.partition_hash);
        let hash = named.unwrap_or_else(|| partition_hash(&key));
        Self { key, hash, band, other_partition: named.is_some() }
    }
}

/// Returns the first row at or after `start` of each band that has one with the prefix. One cursor
/// seeks them all: its position also shows which bands are empty.
fn first_rows(
    view: &View<'_>,
    bands: &[Band],
    start: &[u8],
    prefix: &[u8],
) -> Result<BinaryHeap<Reverse<Place>>, EngineError> {
    let mut heap = BinaryHeap::new();
    let (Some(first), Some(last)) = (bands.iter().min(), bands.iter().max()) else {
        return Ok(heap);
    };
    let mut cursor = view.cursor(&data_key(*first, start), vec![last.0 + 1]);
    let mut bands = bands.to_vec();
    bands.sort_unstable();
    for band in bands {
        let wanted = data_key(band, start);
        match cursor.current()? {
            None => break,
            Some((stored, _)) if stored < wanted.as_slice() => cursor.seek(&wanted),
            Some(_) => {}
        }
        if let Some(row) = cursor.current()?
            && row.0[0] == band.0
            && row.0[1..].starts_with(prefix)
        {
            heap.push(Reverse(Place::of(band, row)));
        }
    }
    Ok(heap)
}

fn value_bytes(value: &v1::Value) -> usize {
    match &value.payload {
        Some(v1::value::Payload::Data(bytes)) => bytes.len(),
        _ => 8,
    }
}

/// Returns the first stored key after all keys of the band that begin with the prefix.
fn upper_bound(band: Band, prefix: &[u8]) -> Vec<u8> {
    let mut bound = data_key(band, prefix);
    while let Some(last) = bound.pop() {
        if last < 0xFF {
            bound.push(last + 1);
            return bound;
        }
    }
    unreachable!("the band byte is below 0xFF")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upper_bound_is_after_the_prefix_and_inside_the_band() {
        assert_eq!(upper_bound(Band(3), b"ab"), vec![3, b'a', b'c']);
        assert_eq!(upper_bound(Band(3), &[0xFF, 0xFF]), vec![4]);
        assert_eq!(upper_bound(Band(98), b""), vec![99]);
    }
}
