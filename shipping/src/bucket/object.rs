//! Objects as the bucket's operations name and return them.

use bytes::Bytes;
use object_store::ObjectMeta;

/// [`super::Bucket::get`] refuses larger objects, since it holds them in memory. Manifests and
/// chunks stay far below.
pub const GET_BYTES_MAX: u64 = 256 << 20;

/// The outcome of a create-if-absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Create {
    /// The caller's bytes are under the key.
    Created,
    /// These other bytes are under the key; nothing was written.
    Exists(Bytes),
}

/// An object as a listing reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Key, relative to the root.
    pub key: String,
    /// Size.
    pub bytes: u64,
    /// Microseconds since 1970, by the store's clock.
    pub modified_us: u64,
}

impl ObjectInfo {
    /// Returns what the store reports of the object under this key, which is relative to the root.
    pub(super) fn of(key: String, meta: &ObjectMeta) -> Self {
        let modified_us = u64::try_from(meta.last_modified.timestamp_micros()).unwrap_or(0);
        Self { key, bytes: meta.size, modified_us }
    }
}

/// An uploaded file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// Size.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}

/// The content of a prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// The objects.
    pub objects: Vec<ObjectInfo>,
    /// Files that an interrupted write has left beside the objects of a local directory.
    pub staged: Vec<ObjectInfo>,
}
