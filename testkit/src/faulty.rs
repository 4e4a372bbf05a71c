//! An object store that wraps another one and injects faults into its calls.
//!
//! **Invariant:** a fault before the operation leaves the objects alone, a fault after it does not undo it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::*;
use parking_lot::Mutex;

/// The kind of a call that can fail; all other calls pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Put,
    /// The begin of an upload in parts.
    Multipart,
    /// Of an object or a part of it.
    Get,
    /// Of the metadata of an object.
    Head,
}

/// The fault injected into a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection breaks; no effect.
    ResetBefore,
    /// The connection breaks after the operation, so that its outcome stays hidden.
    ResetAfter,
    /// An error that does not name a cause; no effect.
    UnknownBefore,
    /// An error that does not name a cause hides the outcome of the operation.
    UnknownAfter,
    /// 409; no effect.
    Conflict,
    /// The body ends early without an error.
    ShortBody,
    /// The body breaks off with an error.
    BrokenBody,
}

/// A store with faults, on top of a store without.
#[derive(Debug)]
pub struct Faulty {
    store: Arc<dyn ObjectStore>,
    /// Faults, and how many calls of their kind each of them is still to hit.
    planned: Mutex<Vec<(Call, Fault, u32)>>,
    hit: AtomicU64,
    ignores_conditions: AtomicBool,
}

impl Faulty {
    /// Creates a store in memory, without faults so far.
    pub fn in_memory() -> Arc<Self> {
        Arc::new(Self {
            store: Arc::new(InMemory::new()),
            planned: Mutex::default(),
            hit: AtomicU64::new(0),
            ignores_conditions: AtomicBool::new(false),
        })
    }

    /// Injects the fault into the next `times` calls of the kind; `u32::MAX`: until [`Faulty::heal`].
    pub fn fail(&self, call: Call, fault: Fault, times: u32) {
        self.planned.lock().push((call, fault, times));
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.planned.lock().clear();
    }

    /// Returns the number of calls that a fault has hit.
    pub fn hit(&self) -> u64 {
        self.hit.load(Ordering::SeqCst)
    }

    /// Overwrites from now on, whatever the condition of a PUT says, and reports success.
    pub fn ignore_conditions(&self) {
        self.ignores_conditions.store(true, Ordering::SeqCst);
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        let mut planned = self.planned.lock();
        let at = planned.iter().position(|(of, _, times)| *of == call && *times > 0)?;
        let (_, fault, times) = &mut planned[at];
        if *times != u32::MAX {
            *times -= 1;
        }
        self.hit.fetch_add(1, Ordering::SeqCst);
        Some(*fault)
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faulty")
    }
}

fn broken() -> Error {
    let source = HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other("connection reset"));
    Error::Generic { store: "faulty", source: Box::new(source) }
}

fn unknown() -> Error {
    Error::Generic { store: "faulty", source: "something failed".into() }
}

fn before(fault: Option<Fault>, location: &Path) -> Result<()> {
    match fault {
        Some(Fault::ResetBefore) => Err(broken()),
        Some(Fault::UnknownBefore) => Err(unknown()),
        Some(Fault::Conflict) => {
            Err(Error::AlreadyExists { path: location.to_string(), source: "409 Conflict".into() })
        }
        _ => Ok(()),
    }
}

fn after(fault: Option<Fault>) -> Result<()> {
    match fault {
        Some(Fault::ResetAfter) => Err(broken()),
        Some(Fault::UnknownAfter) => Err(unknown()),
        _ => Ok(()),
    }
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        if self.ignores_conditions.load(Ordering::SeqCst) {
            options.mode = PutMode::Overwrite;
        }
        let fault = self.fault(Call::Put);
        before(fault, location)?;
        let result = self.store.put_opts(location, payload, options).await;
        after(fault).and(result)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let fault = self.fault(Call::Multipart);
        before(fault, location)?;
        let upload = self.store.put_multipart_opts(location, options).await;
        after(fault).and(upload)
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let fault = self.fault(if head { Call::Head } else { Call::Get });
        before(fault, location)?;
        let result = self.store.get_opts(location, options).await;
        let mut result = after(fault).and(result)?;
        if !head && matches!(fault, Some(Fault::ShortBody | Fault::BrokenBody)) {
            let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
            let body = result.bytes().await?;
            let mut parts = vec![Ok(body.slice(..body.len() / 2))];
            if fault == Some(Fault::BrokenBody) {
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
