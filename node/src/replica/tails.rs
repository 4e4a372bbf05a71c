//! The open tails of a replica's log: how far each reader of another shard has been sent it.
//!
//! **Invariant:** a tail is listed from its opening until it is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vasto_core::ids::Lsn;

/// Time for which a reader that came too late for the log counts as one that has been sent nothing:
/// it reads the bucket meanwhile, and comes back.
const LATE_FOR: Duration = Duration::from_secs(60);

/// The tails of one replica.
#[derive(Default)]
pub(crate) struct Tails(Mutex<State>);

#[derive(Default)]
struct State {
    next: u64,
    /// Per tail, the last record that was sent.
    sent: BTreeMap<u64, Lsn>,
    late: Option<Instant>,
}

/// An open tail.
pub(crate) struct OpenTail {
    tails: Arc<Tails>,
    id: u64,
}

impl Tails {
    /// Opens a tail of a reader that has everything up to this LSN.
    pub(crate) fn open(self: &Arc<Self>, at: Lsn) -> OpenTail {
        let mut state = self.0.lock();
        let id = state.next;
        state.next += 1;
        state.sent.insert(id, at);
        state.late = None;
        OpenTail { tails: self.clone(), id }
    }

    /// Notes a reader that wants log which is not here any more.
    pub(crate) fn came_late(&self) {
        self.0.lock().late = Some(Instant::now());
    }

    /// Forgets such a reader: the plan for which it came has ended.
    pub(crate) fn forget_late(&self) {
        self.0.lock().late = None;
    }

    /// Returns the last record that the slowest reader has been sent; `None` without a reader.
    pub(crate) fn slowest(&self) -> Option<Lsn> {
        let state = self.0.lock();
        let late = state.late.filter(|at| at.elapsed() < LATE_FOR).map(|_| Lsn(0));
        late.or_else(|| state.sent.values().min().copied())
    }
}

impl OpenTail {
    /// Notes that everything up to this LSN was sent.
    pub(crate) fn sent(&self, up_to: Lsn) {
        self.tails.0.lock().sent.insert(self.id, up_to);
    }
}

impl Drop for OpenTail {
    fn drop(&mut self) {
        self.tails.0.lock().sent.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_reader_counts_until_it_has_left() {
        let tails = Arc::new(Tails::default());
        assert_eq!(tails.slowest(), None);
        let (one, other) = (tails.open(Lsn(5)), tails.open(Lsn(3)));
        assert_eq!(tails.slowest(), Some(Lsn(3)));
        other.sent(Lsn(9));
        assert_eq!(tails.slowest(), Some(Lsn(5)));
        drop(one);
        assert_eq!(tails.slowest(), Some(Lsn(9)));
        drop(other);
        assert_eq!(tails.slowest(), None);
    }

    #[test]
    fn a_reader_that_came_too_late_is_behind_everything_until_it_is_back() {
        let tails = Arc::new(Tails::default());
        let other = tails.open(Lsn(7));
        tails.came_late();
        assert_eq!(tails.slowest(), Some(Lsn(0)));
        let back = tails.open(Lsn(6));
        assert_eq!(tails.slowest(), Some(Lsn(6)));
        drop((other, back));
    }
}
