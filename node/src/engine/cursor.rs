//! Cursors over one consistent view of the database.

use rocksdb::{DBRawIterator, ReadOptions, Snapshot};
use vasto_core::record::BandRange;

use super::{Engine, EngineError, RowRef, failed};

/// The database at one point in time.
pub(crate) struct View<'a> {
    snapshot: Snapshot<'a>,
}

/// A position in a [`View`].
pub(crate) struct Cursor<'a> {
    inner: DBRawIterator<'a>,
}

#[cfg(test)]
thread_local! {
    static OPENED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Returns the number of cursors that this thread has opened.
#[cfg(test)]
pub(crate) fn cursors_opened() -> usize {
    OPENED.with(std::cell::Cell::get)
}

impl Engine {
    /// Pins the present state for several cursors.
    pub(crate) fn view(&self) -> View<'_> {
        View { snapshot: self.db.snapshot() }
    }
}

impl View<'_> {
    /// Opens a cursor at the first stored key of `[from, to)`.
    pub(crate) fn cursor(&self, from: &[u8], to: Vec<u8>) -> Cursor<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        let mut inner = self.snapshot.raw_iterator_opt(options);
        #[cfg(test)]
        OPENED.with(|opened| opened.set(opened.get() + 1));
        inner.seek(from);
        Cursor { inner }
    }
}

impl View<'_> {
    /// Opens a cursor over whole bands, for a long read in the background: it is read ahead, and
    /// leaves the block cache to the others.
    pub(crate) fn bulk(&self, range: BandRange) -> Cursor<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(vec![range.last.0 + 1]);
        options.set_verify_checksums(true);
        options.set_readahead_size(2 << 20);
        options.fill_cache(false);
        let mut inner = self.snapshot.raw_iterator_opt(options);
        inner.seek([range.first.0]);
        Cursor { inner }
    }
}

impl Cursor<'_> {
    /// Returns the stored key and value here; `None` at the end. A damaged file is an error, not an
    /// end.
    pub(crate) fn current(&self) -> Result<Option<RowRef<'_>>, EngineError> {
        match self.inner.item() {
            Some(item) => Ok(Some(item)),
            None => self.inner.status().map(|()| None).map_err(failed("scan")),
        }
    }

    /// Moves to the first stored key at or after this one.
    pub(crate) fn seek(&mut self, to: &[u8]) {
        self.inner.seek(to);
    }

    /// Moves to the next stored key.
    pub(crate) fn advance(&mut self) {
        self.inner.next();
    }
}
