//! Counters of the requests sent to a bucket, and of the body bytes sent and received.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Requests sent and body bytes moved since the bucket was opened, every attempt counted.
/// A listing counts one request for each 1,000 objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// GET requests.
    pub get: u64,
    /// PUT requests, parts of multipart uploads and their begin and end included.
    pub put: u64,
    /// LIST requests.
    pub list: u64,
    /// HEAD requests.
    pub head: u64,
    /// DELETE requests.
    pub delete: u64,
    /// Body bytes received.
    pub bytes_read: u64,
    /// Body bytes sent.
    pub bytes_written: u64,
}

impl RequestCounts {
    /// Returns the requests, each with the name of its kind.
    pub fn by_kind(&self) -> [(&'static str, u64); 5] {
        [
            ("put", self.put),
            ("get", self.get),
            ("head", self.head),
            ("list", self.list),
            ("delete", self.delete),
        ]
    }
}

/// Requests of one process to the bucket, and the time in which it sent them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests and bytes since the process opened the bucket.
    pub counts: RequestCounts,
    /// The time since then; zero when unknown.
    pub elapsed: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    get: AtomicU64,
    put: AtomicU64,
    list: AtomicU64,
    head: AtomicU64,
    delete: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> RequestCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RequestCounts {
            get: read(&self.get),
            put: read(&self.put),
            list: read(&self.list),
            head: read(&self.head),
            delete: read(&self.delete),
            bytes_read: read(&self.bytes_read),
            bytes_written: read(&self.bytes_written),
        }
    }
    pub(super) fn get(&self) {
        self.get.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn list(&self, pages: u64) {
        self.list.fetch_add(pages, Ordering::Relaxed);
    }
    pub(super) fn head(&self) {
        self.head.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn delete(&self) {
        self.delete.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn put(&self) {
        self.put.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn sent(&self, bytes: u64) {
        self.bytes_written.fetch_add(bytes, Ordering::Relaxed);
    }
    pub(super) fn received(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }
}
