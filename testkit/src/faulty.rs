//! An object store that wraps another one and injects faults into its calls.
//!
//! **Invariant:** a fault before the operation leaves the objects alone, a fault after it does not
//! undo it. A fault that alters a body counts as a hit only when the altered body was stored or
//! served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::*;
use parking_lot::Mutex;
use tokio::sync::Notify;
use vasto_shipping::Bucket;

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
    /// Of any number of objects.
    Delete,
    List,
}

impl Call {
    const ALL: [Call; 6] =
        [Call::Put, Call::Multipart, Call::Get, Call::Head, Call::Delete, Call::List];
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
    /// No reply follows the operation.
    Silence,
    /// 503 SlowDown; no effect.
    Throttle,
    /// 409 to a PUT; no effect.
    Conflict,
    /// The body of a GET ends early without an error.
    ShortBody,
    /// The body of a GET breaks off with an error.
    BrokenBody,
    /// One bit of the body of a PUT or a GET is flipped on its way.
    FlippedBody,
    /// The calling process dies before the operation: [`Faulty::died`].
    DeathBefore,
    /// The calling process dies after the operation.
    DeathAfter,
}

impl Fault {
    /// Returns true for a fault that has no effect on a call without a body.
    pub fn alters_a_body(self) -> bool {
        matches!(self, Fault::ShortBody | Fault::BrokenBody | Fault::FlippedBody)
    }
}

/// A read that returned another body than the stored one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misread {
    pub key: String,
    /// The object was read once more, unaltered.
    pub read_again: bool,
}

/// A store with faults, on top of a store without.
#[derive(Debug)]
pub struct Faulty {
    store: Arc<dyn ObjectStore>,
    /// Faults, and how many calls of their kind each of them is still to hit.
    planned: Mutex<Vec<(Call, Fault, u32)>>,
    /// The fault of the call with this number, counted from 1.
    numbered: Mutex<Option<(u64, Fault)>>,
    calls: AtomicU64,
    hit: AtomicU64,
    stored_altered: AtomicBool,
    misread: Mutex<Option<Misread>>,
    ignores_conditions: AtomicBool,
    died: Arc<Notify>,
}

impl Faulty {
    /// Creates a store in memory, without faults so far.
    pub fn in_memory() -> Arc<Self> {
        Arc::new(Self {
            store: Arc::new(InMemory::new()),
            planned: Mutex::default(),
            numbered: Mutex::default(),
            calls: AtomicU64::new(0),
            hit: AtomicU64::new(0),
            stored_altered: AtomicBool::new(false),
            misread: Mutex::default(),
            ignores_conditions: AtomicBool::new(false),
            died: Arc::default(),
        })
    }

    /// Returns a bucket over this store.
    pub fn bucket(self: &Arc<Self>) -> Bucket {
        Bucket::from_store("memory://faulty", self.clone())
    }

    /// Returns a bucket with the same content, without faults.
    pub fn without_faults(&self) -> Bucket {
        Bucket::from_store("memory://faulty", self.store.clone())
    }

    /// Injects the fault into the next `times` calls of the kind; `u32::MAX`: until
    /// [`Faulty::heal`].
    pub fn fail(&self, call: Call, fault: Fault, times: u32) {
        self.planned.lock().push((call, fault, times));
    }

    /// Injects the fault into the call with this number, counted from 1 over all kinds.
    pub fn fail_at(&self, number: u64, fault: Fault) {
        *self.numbered.lock() = Some((number, fault));
    }

    /// Breaks the connection of every call, until [`Faulty::heal`].
    pub fn go_down(&self) {
        Call::ALL.into_iter().for_each(|call| self.fail(call, Fault::ResetBefore, u32::MAX));
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.planned.lock().clear();
        *self.numbered.lock() = None;
    }

    /// Overwrites from now on, whatever the condition of a PUT says, and reports success.
    pub fn ignore_conditions(&self) {
        self.ignores_conditions.store(true, Ordering::SeqCst);
    }

    /// Returns the number of calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Returns the number of calls that a fault has hit.
    pub fn hit(&self) -> u64 {
        self.hit.load(Ordering::SeqCst)
    }

    /// Returns true when an object was stored altered: only its readers can detect that.
    pub fn has_stored_altered(&self) -> bool {
        self.stored_altered.load(Ordering::SeqCst)
    }

    /// Returns the last read that returned an altered body.
    pub fn misread(&self) -> Option<Misread> {
        self.misread.lock().clone()
    }

    /// Waits for the death of the calling process, whose call is never answered.
    pub async fn died(&self) {
        self.died.notified().await;
    }

    fn fault(&self, call: Call) -> Option<Fault> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let numbered =
            self.numbered.lock().take_if(|(at, _)| *at == number).map(|(_, fault)| fault);
        let fault = numbered.or_else(|| self.planned_for(call))?;
        if !fault.alters_a_body() {
            self.count_hit();
        }
        Some(fault)
    }

    fn planned_for(&self, call: Call) -> Option<Fault> {
        let mut planned = self.planned.lock();
        let (_, fault, times) =
            planned.iter_mut().find(|(of, _, times)| *of == call && *times > 0)?;
        if *times != u32::MAX {
            *times -= 1;
        }
        Some(*fault)
    }

    fn count_hit(&self) {
        self.hit.fetch_add(1, Ordering::SeqCst);
    }

    /// Answers a call that returns a stream.
    fn answer<T: Send + 'static>(
        &self,
        call: Call,
        answers: BoxStream<'static, Result<T>>,
    ) -> BoxStream<'static, Result<T>> {
        let (fault, died) = (self.fault(call), Arc::clone(&self.died));
        let all = async move {
            if let Err(error) = before(fault, &died).await {
                return vec![Err(error)];
            }
            let answers: Vec<Result<T>> = answers.collect().await;
            match after(fault, &died).await {
                Ok(()) => answers,
                Err(error) => vec![Err(error)],
            }
        };
        futures::stream::once(all).flat_map(futures::stream::iter).boxed()
    }

    /// Serves the body of an object under a fault that alters it.
    async fn altered(&self, location: &Path, fault: Fault, result: GetResult) -> Result<GetResult> {
        let (meta, range, attributes) =
            (result.meta.clone(), result.range.clone(), result.attributes.clone());
        let body = result.bytes().await?;
        if !body.is_empty() {
            self.count_hit();
            *self.misread.lock() = Some(Misread { key: location.to_string(), read_again: false });
        }
        let parts = match fault {
            Fault::FlippedBody => vec![Ok(flipped(&body))],
            Fault::BrokenBody => vec![Ok(body.slice(..body.len() / 2)), Err(broken())],
            _ => vec![Ok(body.slice(..body.len() / 2))],
        };
        let payload = GetResultPayload::Stream(futures::stream::iter(parts).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faulty")
    }
}

fn broken() -> Error {
    let source =
        HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other("connection reset"));
    Error::Generic { store: "faulty", source: Box::new(source) }
}

fn unknown() -> Error {
    Error::Generic { store: "faulty", source: "something failed".into() }
}

fn throttled() -> Error {
    let answer = "status code: 503 Service Unavailable: <Error><Code>SlowDown</Code></Error>";
    Error::Generic { store: "faulty", source: answer.into() }
}

fn flipped(body: &[u8]) -> Bytes {
    let mut body = body.to_vec();
    let middle = body.len() / 2;
    if let Some(byte) = body.get_mut(middle) {
        *byte ^= 1;
    }
    body.into()
}

async fn before(fault: Option<Fault>, died: &Notify) -> Result<()> {
    match fault {
        Some(Fault::ResetBefore) => Err(broken()),
        Some(Fault::UnknownBefore) => Err(unknown()),
        Some(Fault::Throttle) => Err(throttled()),
        Some(Fault::DeathBefore) => die(died).await,
        _ => Ok(()),
    }
}

async fn after(fault: Option<Fault>, died: &Notify) -> Result<()> {
    match fault {
        Some(Fault::ResetAfter) => Err(broken()),
        Some(Fault::UnknownAfter) => Err(unknown()),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::DeathAfter) => die(died).await,
        _ => Ok(()),
    }
}

async fn die(died: &Notify) -> Result<()> {
    died.notify_one();
    std::future::pending().await
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        if self.ignores_conditions.load(Ordering::SeqCst) {
            options.mode = PutMode::Overwrite;
        }
        let fault = self.fault(Call::Put);
        before(fault, &self.died).await?;
        if fault == Some(Fault::Conflict) {
            return Err(Error::AlreadyExists {
                path: location.to_string(),
                source: "409 Conflict".into(),
            });
        }
        let is_flipped = fault == Some(Fault::FlippedBody) && payload.content_length() > 0;
        let payload = if is_flipped { flipped(&Bytes::from(payload)).into() } else { payload };
        let result = self.store.put_opts(location, payload, options).await;
        if is_flipped && result.is_ok() {
            self.count_hit();
            self.stored_altered.store(true, Ordering::SeqCst);
        }
        after(fault, &self.died).await.and(result)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let fault = self.fault(Call::Multipart);
        before(fault, &self.died).await?;
        let upload = self.store.put_multipart_opts(location, options).await;
        after(fault, &self.died).await.and(upload)
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let fault = self.fault(if head { Call::Head } else { Call::Get });
        before(fault, &self.died).await?;
        let result = self.store.get_opts(location, options).await;
        let result = after(fault, &self.died).await.and(result)?;
        if head {
            return Ok(result);
        }
        if let Some(fault) = fault.filter(|fault| fault.alters_a_body()) {
            return self.altered(location, fault, result).await;
        }
        if let Some(misread) =
            self.misread.lock().as_mut().filter(|misread| misread.key == location.as_ref())
        {
            misread.read_again = true;
        }
        Ok(result)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.answer(Call::Delete, self.store.delete_stream(locations))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.answer(Call::List, self.store.list(prefix))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let fault = self.fault(Call::List);
        before(fault, &self.died).await?;
        let result = self.store.list_with_delimiter(prefix).await;
        after(fault, &self.died).await.and(result)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}
