//! An object store that wraps a real one and injects faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::*;

#[derive(Debug, Default)]
pub struct Faults {
    /// Every create overwrites, and succeeds.
    pub ignore_conditions: bool,
    /// Number of creates that are carried out, but whose replies are lost.
    pub lost_replies: AtomicU32,
    /// Number of creates that answer 409 and do nothing.
    pub conflicts: AtomicU32,
    /// Number of bodies that end early without an error.
    pub short_bodies: AtomicU32,
    /// Number of bodies that break off with an error.
    pub broken_bodies: AtomicU32,
}

#[derive(Debug)]
pub struct Faulty {
    pub store: Arc<dyn ObjectStore>,
    pub faults: Arc<Faults>,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faulty")
    }
}

fn take(count: &AtomicU32) -> bool {
    count.try_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn broken() -> Error {
    let source = HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other("connection reset"));
    Error::Generic { store: "faulty", source: Box::new(source) }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        if self.faults.ignore_conditions {
            options.mode = PutMode::Overwrite;
        }
        if take(&self.faults.conflicts) {
            return Err(Error::AlreadyExists { path: location.to_string(), source: "409 Conflict".into() });
        }
        let lost = take(&self.faults.lost_replies);
        let result = self.store.put_opts(location, payload, options).await?;
        if lost { Err(broken()) } else { Ok(result) }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let mut result = self.store.get_opts(location, options).await?;
        if head {
            return Ok(result);
        }
        let (short, breaks) = (take(&self.faults.short_bodies), take(&self.faults.broken_bodies));
        if short || breaks {
            let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
            let body = result.bytes().await?;
            let mut parts = vec![Ok(body.slice(..body.len() / 2))];
            if breaks {
                parts.push(Err(broken()));
            }
            let payload = GetResultPayload::Stream(futures::stream::iter(parts).boxed());
            result = GetResult { payload, meta, range, attributes, extensions: Default::default() };
        }
        Ok(result)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}
