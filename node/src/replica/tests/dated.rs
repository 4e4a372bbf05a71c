//! A store in memory whose objects carry the write times of a clock that the test sets.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path as ObjectPath;
use object_store::*;
use parking_lot::Mutex;
use vasto_shipping::Bucket;

use super::support::TestClock;
use crate::clock::Clock;

const YEARS_US: u64 = 50 * 365 * 86_400 * 1_000_000;

/// A store in memory with a clock of its own.
#[derive(Debug)]
pub(super) struct Dated {
    store: memory::InMemory,
    clock: Arc<TestClock>,
    written: Mutex<HashMap<ObjectPath, u64>>,
    /// Every object that is written gets a write time long after now.
    dates_after_now: AtomicBool,
}

impl std::fmt::Display for Dated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dated")
    }
}

impl Dated {
    pub(super) fn new(now_us: u64) -> Arc<Self> {
        let clock = Arc::new(TestClock(now_us.into()));
        Arc::new(Self {
            store: memory::InMemory::new(),
            clock,
            written: Mutex::default(),
            dates_after_now: AtomicBool::new(false),
        })
    }

    pub(super) fn set(&self, now_us: u64) {
        self.clock.set(now_us);
    }

    /// Dates what is written from now on by decades after now.
    pub(super) fn date_after_now(&self, far: bool) {
        self.dates_after_now.store(far, Ordering::SeqCst);
    }

    pub(super) fn bucket(self: &Arc<Self>) -> Bucket {
        Bucket::from_store("memory://dated", self.clone())
    }

    fn dated(&self) -> impl Fn(ObjectMeta) -> ObjectMeta + Send + 'static {
        let written = self.written.lock().clone();
        move |mut meta| {
            if let Some(at) = written.get(&meta.location) {
                meta.last_modified = time_of(*at).into();
            }
            meta
        }
    }
}

fn time_of(us: u64) -> std::time::SystemTime {
    std::time::UNIX_EPOCH + Duration::from_micros(us)
}

#[async_trait::async_trait]
impl ObjectStore for Dated {
    async fn put_opts(
        &self,
        location: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let result = self.store.put_opts(location, payload, options).await?;
        let now_us = self.clock.now_us()
            + if self.dates_after_now.load(Ordering::SeqCst) { YEARS_US } else { 0 };
        self.written.lock().insert(location.clone(), now_us);
        Ok(result)
    }

    async fn put_multipart_opts(
        &self,
        location: &ObjectPath,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &ObjectPath, options: GetOptions) -> Result<GetResult> {
        let mut result = self.store.get_opts(location, options).await?;
        result.meta = self.dated()(result.meta);
        Ok(result)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<ObjectPath>>,
    ) -> BoxStream<'static, Result<ObjectPath>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, Result<ObjectMeta>> {
        let dated = self.dated();
        self.store.list(prefix).map(move |meta| meta.map(&dated)).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &ObjectPath,
        to: &ObjectPath,
        options: CopyOptions,
    ) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}
