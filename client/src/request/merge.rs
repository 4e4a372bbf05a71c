//! Merging the pages of several shards into one sequence of rows, in the order of user keys and,
//! for one user key, of the hashes of its partitions.
//!
//! **Invariant:** rows are emitted in strictly rising order, each once. A row is emitted only when
//! the next row of every shard that could hold a smaller one is known. After a restart with other
//! shards nothing at or before the last emitted row is requested or emitted again, and nothing
//! after it is skipped, so rows that change shards meanwhile are neither lost nor doubled.
//!
//! A scan with a limit asks each shard for its likely share, and for more only where that was too
//! little: rows that are read and not returned cost the nodes as much as rows that are.

use std::cmp::Ordering;
use std::collections::VecDeque;

use bytes::Bytes;

use crate::error::{Error, ErrorKind};
use crate::tuning::PREFETCH_SHARDS_MAX;
use crate::value::{Place, Row};

/// The next step of the scan.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// The next row.
    Row(Row),
    /// A requested page must arrive first.
    Wait,
    /// There are no more rows.
    End,
}

/// A page to request.
#[derive(Debug, PartialEq)]
pub(crate) struct Wanted {
    /// The index of the shard.
    pub lane: usize,
    /// Only rows after this place.
    pub after: Option<Place>,
    /// The most rows in the page.
    pub rows: usize,
}

/// A page that has arrived.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// In the order of user keys and partitions.
    pub rows: Vec<Row>,
    /// There may be more rows after the page.
    pub more: bool,
    /// The shard has no more rows up to this key, which may come after the last row.
    pub resume_after: Option<Bytes>,
}

#[derive(Default)]
struct Lane {
    rows: VecDeque<Row>,
    /// Rows of the last page: once no others are left, the next page is due.
    last_page: usize,
    after: Option<Place>,
    /// Pages requested so far: a shard that holds more than its share is asked for more rows each
    /// time.
    pages: u32,
    exhausted: bool,
    /// Rows requested in the page that is in flight; 0 when there is none.
    asked: usize,
}

/// The state of a merged scan.
pub(crate) struct Merge {
    lanes: Vec<Lane>,
    last: Option<Place>,
    remaining: usize,
    page_rows: usize,
}

/// Returns the rows that one of `lanes` shards most likely has among the next `wanted` of all: its
/// share plus three standard deviations.
fn share_of(wanted: usize, lanes: usize) -> usize {
    if lanes <= 1 {
        return wanted;
    }
    let mean = wanted as f64 / lanes as f64;
    // Saturates for a scan without a limit.
    ((mean + 3.0 * mean.sqrt()).ceil() as usize).saturating_add(1).min(wanted)
}

impl Merge {
    /// Merges `lanes` shards, at most `limit` rows, pages of at most `page_rows`.
    pub(super) fn new(lanes: usize, limit: usize, page_rows: usize) -> Self {
        let mut merge = Self { lanes: Vec::new(), last: None, remaining: limit, page_rows };
        merge.restart(lanes, page_rows);
        merge
    }

    /// Restarts after the last emitted row, with other shards. Pages requested before must not be
    /// given to [`Merge::page`] any more.
    pub(super) fn restart(&mut self, lanes: usize, page_rows: usize) {
        let after = self.last.clone();
        self.lanes = std::iter::repeat_with(|| Lane { after: after.clone(), ..Lane::default() })
            .take(lanes)
            .collect();
        self.page_rows = page_rows;
    }

    /// Returns the pages to request now; each is returned once.
    pub(super) fn wanted(&mut self) -> Vec<Wanted> {
        let (remaining, page_rows) = (self.remaining, self.page_rows);
        // No prefetch where the rows at hand and in flight are most likely enough for the limit.
        let expected = self
            .lanes
            .iter()
            .fold(0usize, |all, lane| all.saturating_add(lane.rows.len() + lane.asked));
        let prefetch = self.lanes.len() <= PREFETCH_SHARDS_MAX && expected < remaining;
        let share = share_of(remaining, self.lanes.len());
        let mut wanted = Vec::new();
        for (lane, state) in self.lanes.iter_mut().enumerate() {
            let due = state.rows.is_empty() || (prefetch && state.rows.len() <= state.last_page);
            if !state.exhausted && state.asked == 0 && due && state.rows.len() < remaining {
                let share = share.saturating_mul(1 << (2 * state.pages).min(30));
                let rows = page_rows.min(share).min(remaining - state.rows.len());
                state.asked = rows;
                state.pages += 1;
                wanted.push(Wanted { lane, after: state.after.clone(), rows });
            }
        }
        wanted
    }

    /// Takes a page that arrived. Refuses a page that breaks the order, since rows would be lost,
    /// and a page that makes no progress.
    pub(super) fn page(&mut self, lane: usize, page: Page) -> Result<(), Error> {
        let Some(lane) = self.lanes.get_mut(lane) else { return Ok(()) };
        let Page { rows, more, resume_after } = page;
        let rising = rows.is_sorted_by(|a, b| a.order(b) != Ordering::Greater);
        let behind = lane
            .after
            .as_ref()
            .is_none_or(|after| rows.first().is_none_or(|row| row.place() > *after));
        let last = rows.last().map(Row::place);
        let resume_after = resume_after.map(|key| (key, u64::MAX));
        let passes_rows = resume_after.is_none() || last <= resume_after;
        let after = resume_after.or(last);
        if !rising || !behind || !passes_rows || (more && after <= lane.after) {
            return Err(Error::new(
                ErrorKind::Internal,
                "a node sent a scan page out of order; please report it",
            ));
        }
        lane.asked = 0;
        lane.exhausted = !more;
        if !rows.is_empty() {
            lane.last_page = rows.len();
        }
        lane.after = after.or(lane.after.take());
        lane.rows.extend(rows);
        Ok(())
    }

    /// Returns the next row, if it is known.
    pub(super) fn step(&mut self) -> Step {
        loop {
            if self.remaining == 0 {
                return Step::End;
            }
            let mut least: Option<usize> = None;
            for (index, lane) in self.lanes.iter().enumerate() {
                match lane.rows.front() {
                    None if !lane.exhausted => return Step::Wait,
                    None => {}
                    Some(row) => {
                        let best = least.and_then(|at| self.lanes[at].rows.front());
                        if best.is_none_or(|best| row.order(best) == Ordering::Less) {
                            least = Some(index);
                        }
                    }
                }
            }
            let Some(row) = least.and_then(|at| self.lanes[at].rows.pop_front()) else {
                return Step::End;
            };
            let place = row.place();
            if self.last.as_ref().is_some_and(|last| place <= *last) {
                continue;
            }
            self.last = Some(place);
            self.remaining -= 1;
            return Step::Row(row);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    fn row(key: u16) -> Row {
        Row { key: Bytes::copy_from_slice(&key.to_be_bytes()), partition_hash: None, value: None }
    }

    fn rows(keys: &[u16]) -> Vec<Row> {
        keys.iter().copied().map(row).collect()
    }

    fn page(keys: &[u16], more: bool) -> Page {
        Page { rows: rows(keys), more, resume_after: None }
    }

    /// Returns the place after all rows of the key.
    fn behind(key: u16) -> Option<Place> {
        Some((row(key).key, u64::MAX))
    }

    fn page_up_to(keys: &[u16], resume_after: u16) -> Page {
        Page { resume_after: Some(row(resume_after).key), ..page(keys, true) }
    }

    /// Answers one wanted page from the keys of a shard. Examines `examined` stored keys, of which
    /// the odd ones are deleted.
    fn answer(merge: &mut Merge, shards: &[BTreeSet<u16>], wanted: Wanted, examined: usize) {
        let after = wanted.after.map(|(key, _)| u16::from_be_bytes([key[0], key[1]]));
        let mut left = shards[wanted.lane]
            .iter()
            .copied()
            .filter(|key| after.is_none_or(|after| *key > after));
        let looked_at: Vec<u16> = left.by_ref().take(examined.min(wanted.rows)).collect();
        let alive: Vec<u16> = looked_at.iter().copied().filter(|key| key % 2 == 0).collect();
        let page = match (left.next().is_some(), looked_at.last()) {
            (true, Some(last)) if alive.last() != Some(last) => page_up_to(&alive, *last),
            (more, _) => page(&alive, more),
        };
        merge.page(wanted.lane, page).unwrap();
    }

    fn split(keys: &BTreeSet<u16>, shards: usize) -> Vec<BTreeSet<u16>> {
        let mut out = vec![BTreeSet::new(); shards];
        for key in keys {
            let hash = vasto_core::hash::partition_hash(&key.to_be_bytes());
            out[vasto_core::hash::jump(hash, shards as u32).shard.0 as usize].insert(*key);
        }
        out
    }

    #[test]
    fn pages_out_of_order_are_refused() {
        let mut merge = Merge::new(1, 10, 10);
        assert!(merge.page(0, page(&[2, 1], false)).is_err());
        assert!(merge.page(0, page(&[], true)).is_err());
        assert!(merge.page(0, page_up_to(&[3, 4], 3)).is_err());
        merge.page(0, page(&[5], true)).unwrap();
        assert!(merge.page(0, page(&[5], false)).is_err());
        // Accepted once, for other records of the key; a second time would loop for ever.
        merge.page(0, page_up_to(&[], 5)).unwrap();
        assert!(merge.page(0, page_up_to(&[], 5)).is_err());
    }

    #[test]
    fn a_page_without_rows_moves_the_scan_on() {
        let mut merge = Merge::new(1, usize::MAX, 10);
        merge.wanted();
        merge.page(0, page_up_to(&[1], 4)).unwrap();
        assert_eq!(merge.wanted(), [Wanted { lane: 0, after: behind(4), rows: 10 }]);
        merge.page(0, page_up_to(&[], 7)).unwrap();
        assert_eq!(merge.wanted()[0].after, behind(7), "also while a row is still there");
        assert_eq!((merge.step(), merge.step()), (Step::Row(row(1)), Step::Wait));
        merge.page(0, page(&[], false)).unwrap();
        assert_eq!(merge.step(), Step::End);
    }

    #[test]
    fn a_key_that_two_shards_show_is_given_out_once() {
        let mut merge = Merge::new(2, 10, 10);
        merge.page(0, page(&[1, 2], false)).unwrap();
        merge.page(1, page(&[1, 1, 3], false)).unwrap();
        let steps: Vec<Step> = (0..4).map(|_| merge.step()).collect();
        assert_eq!(steps, [Step::Row(row(1)), Step::Row(row(2)), Step::Row(row(3)), Step::End]);
    }

    /// One user key under three partitions is three records, wherever they are stored.
    #[test]
    fn one_key_under_several_partitions_is_several_rows() {
        let of = |key: u16, hash: u64| Row { partition_hash: Some(hash), ..row(key) };
        let mut merge = Merge::new(2, 10, 10);
        merge
            .page(0, Page { rows: vec![of(1, 3), of(1, 9)], more: true, resume_after: None })
            .unwrap();
        merge
            .page(1, Page { rows: vec![of(1, 5), of(2, 1)], more: false, resume_after: None })
            .unwrap();
        let steps: Vec<Step> = (0..4).map(|_| merge.step()).collect();
        assert_eq!(
            steps,
            [Step::Row(of(1, 3)), Step::Row(of(1, 5)), Step::Row(of(1, 9)), Step::Wait]
        );
        assert_eq!(
            merge.wanted()[0].after,
            Some(of(1, 9).place()),
            "the page goes on inside of the key"
        );
        merge.page(0, Page { rows: vec![of(1, 10)], more: false, resume_after: None }).unwrap();
        merge.restart(1, 10);
        assert_eq!(
            merge.wanted()[0].after,
            Some(of(1, 9).place()),
            "so does a scan that starts anew"
        );
        merge
            .page(0, Page { rows: vec![of(1, 10), of(2, 1)], more: false, resume_after: None })
            .unwrap();
        assert_eq!(
            [merge.step(), merge.step(), merge.step()],
            [Step::Row(of(1, 10)), Step::Row(of(2, 1)), Step::End]
        );
    }

    #[test]
    fn a_short_scan_of_many_shards_asks_each_for_its_share() {
        let asked = |lanes, limit| {
            Merge::new(lanes, limit, 1_000).wanted().iter().map(|page| page.rows).sum::<usize>()
        };
        assert_eq!(asked(1, 100), 100);
        assert_eq!(asked(64, 1), 64);
        assert!(asked(64, 10) <= 64 * 3, "{}", asked(64, 10));
        assert!(asked(64, 100) <= 64 * 7, "{}", asked(64, 100));
        assert_eq!(asked(4, usize::MAX), 4 * 1_000);
        // The rows at hand suffice: no prefetch.
        let mut merge = Merge::new(2, 4, 100);
        assert_eq!(merge.wanted().len(), 2);
        merge.page(0, page(&[1, 3], true)).unwrap();
        assert_eq!(merge.wanted(), []);
        merge.page(1, page(&[2, 4], true)).unwrap();
        assert_eq!(merge.wanted(), []);
        // All rows are in one shard: each request asks for more rows.
        let mut merge = Merge::new(64, 500, 1_000);
        let first = merge.wanted()[0].rows;
        for lane in 1..64 {
            merge.page(lane, page(&[], false)).unwrap();
        }
        merge.page(0, page(&(0..first as u16).collect::<Vec<_>>(), true)).unwrap();
        assert!(merge.wanted()[0].rows >= 3 * first);
    }

    #[test]
    fn a_limit_asks_for_no_more_than_it_needs() {
        let mut merge = Merge::new(1, 3, 100);
        assert_eq!(merge.wanted(), [Wanted { lane: 0, after: None, rows: 3 }]);
        assert_eq!(merge.wanted(), []);
        merge.page(0, page(&[1, 2, 3], true)).unwrap();
        assert_eq!(merge.wanted(), []);
        assert_eq!(Merge::new(3, 0, 100).step(), Step::End);
    }

    #[test]
    fn one_page_is_fetched_ahead_and_no_more() {
        let mut merge = Merge::new(1, usize::MAX, 2);
        merge.wanted();
        merge.page(0, page(&[1, 2], true)).unwrap();
        assert_eq!(merge.wanted().len(), 1);
        merge.page(0, page(&[3, 4], true)).unwrap();
        assert_eq!(merge.wanted(), []);
        assert_eq!((merge.step(), merge.step()), (Step::Row(row(1)), Step::Row(row(2))));
        assert_eq!(merge.wanted().len(), 1);
    }

    proptest! {
        /// The shards change at random points; pages arrive in any order.
        #[test]
        fn every_row_once_in_order_across_restarts(
            keys in proptest::collection::btree_set(0u16..500, 0..200),
            mut shards in 1usize..5,
            limit in prop_oneof![Just(usize::MAX), 0usize..250],
            pages in proptest::collection::vec((1usize..20, 0usize..8, 0u8..10), 1..50),
        ) {
            let mut held = split(&keys, shards);
            let mut merge = Merge::new(shards, limit, 10);
            let mut open: Vec<Wanted> = Vec::new();
            let mut seen = Vec::new();
            let mut turns = pages.into_iter().cycle();
            let mut restarts = 0;
            loop {
                match merge.step() {
                    Step::Row(row) => seen.push(u16::from_be_bytes([row.key[0], row.key[1]])),
                    Step::End => break,
                    Step::Wait => {
                        let (page, pick, chance) = turns.next().unwrap();
                        open.extend(merge.wanted());
                        if chance == 0 && restarts < 20 {
                            restarts += 1;
                            shards += 1;
                            held = split(&keys, shards);
                            merge.restart(shards, 10);
                            open.clear();
                            continue;
                        }
                        prop_assert!(!open.is_empty(), "waits for nothing");
                        let wanted = open.swap_remove(pick % open.len());
                        answer(&mut merge, &held, wanted, page);
                    }
                }
            }
            let want: Vec<u16> = keys.into_iter().filter(|key| key % 2 == 0).take(limit).collect();
            prop_assert_eq!(seen, want);
        }
    }
}
