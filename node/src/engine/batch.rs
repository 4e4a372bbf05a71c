//! Batch of changes that becomes visible at once.

use vasto_core::record::BandRange;
use vasto_core::stored_key::MetaKey;

/// Changes of one log record.
#[derive(Default)]
pub(crate) struct Batch {
    pub(super) inner: rocksdb::WriteBatch,
}

impl Batch {
    /// Sets a stored data key (`[band][user key]`).
    pub(crate) fn put(&mut self, stored_key: &[u8], entry: &[u8]) {
        self.inner.put(stored_key, entry);
    }

    /// Sets a metadata value.
    pub(crate) fn put_meta(&mut self, key: MetaKey, value: &[u8]) {
        self.inner.put(key.encode(), value);
    }

    /// Removes a metadata value.
    pub(crate) fn delete_meta(&mut self, key: MetaKey) {
        self.inner.delete(key.encode());
    }

    /// Removes everything stored in the bands.
    pub(crate) fn delete_bands(&mut self, range: BandRange) {
        self.inner.delete_range([range.first.0], [range.last.0 + 1]);
    }
}
