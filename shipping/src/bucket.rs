//! The bucket: the only access to object storage.
//!
//! **Invariant:** no operation overwrites an object. [`Bucket::create`] returns `Created` only when the bytes
//! under the key are the caller's own, also when the reply to an earlier attempt was lost.
//!
//! `open` turns URLs into stores, `failure` and [`crate::error`] classify errors, `upload` sends large
//! objects, [`mod@crate::download`] checks downloads.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

pub use crate::counts::RequestCounts;
pub use crate::error::BucketError;

use crate::breaker::{Breaker, PROBE_BYTES_MAX};
use crate::cost::Usage;
use crate::counts::Counters;
use crate::failure::{Failure, Kind};
use crate::layout;
use crate::listing::{self, Listing, Source};
use crate::open::Opened;
use crate::retry::{Retry, RetryBudget};
use crate::upload::blocking;
use crate::wire::Learned;

/// [`Bucket::get`] refuses larger objects, since it holds them in memory. Manifests and chunks stay far below.
pub const GET_BYTES_MAX: u64 = 256 << 20;

/// Objects in one page of a listing, on every store; used to count requests.
const LIST_PAGE: u64 = 1000;

/// Credentials and endpoint; the standard AWS, GCP or Azure environment variables replace a field
/// that is `None` or `false`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct BucketOptions {
    /// Base URL of an S3-compatible server, e.g. `http://127.0.0.1:9000`.
    pub endpoint: Option<String>,
    /// The region of the bucket.
    pub region: Option<String>,
    /// Key id (the account name for `az://`).
    pub access_key_id: Option<String>,
    /// Secret (the account key for `az://`).
    pub secret_access_key: Option<String>,
    /// Allows an `http://` endpoint.
    pub allow_http: bool,
}

impl std::fmt::Debug for BucketOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hidden = |secret: &Option<String>| secret.as_ref().map(|_| "…");
        f.debug_struct("BucketOptions")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("access_key_id", &hidden(&self.access_key_id))
            .field("secret_access_key", &hidden(&self.secret_access_key))
            .field("allow_http", &self.allow_http)
            .finish()
    }
}

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

/// An uploaded file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// Size.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}

/// A handle to one bucket prefix; cheap to clone, all clones share the counts.
#[derive(Clone)]
pub struct Bucket {
    inner: Arc<Inner>,
    budget: RetryBudget,
}

struct Inner {
    url: String,
    store: Arc<dyn ObjectStore>,
    /// Without slashes at the ends; may be empty.
    root: String,
    counters: Arc<Counters>,
    opened: Instant,
    source: Source,
    learned: Arc<Learned>,
    breaker: Breaker,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Bucket").field(&self.inner.url).finish()
    }
}

impl Bucket {
    /// Opens the bucket that the URL names, without sending a request: `file:///path` (created if
    /// missing, every write synced), `s3://bucket/prefix`, `gs://…`, `az://…`, and for tests
    /// `memory://name`, one store per name in the process.
    ///
    /// # Errors
    /// `BadUrl`, `BadOptions`, `NoCredentials`; a local directory that cannot be created is `Store`.
    pub fn open(url: &str, options: &BucketOptions) -> Result<Bucket, BucketError> {
        Ok(Self::from_opened(crate::open::open(url, options, &mut std::env::vars_os())?))
    }

    /// A bucket over any object store, its root at the store's own; for stores that wrap another.
    pub fn from_store(url: &str, store: Arc<dyn ObjectStore>) -> Bucket {
        Self::over(url.to_owned(), store, String::new())
    }

    pub(crate) fn over(url: String, store: Arc<dyn ObjectStore>, root: String) -> Bucket {
        Self::from_opened(Opened { url, store, root, source: Source::Stream, learned: Arc::default() })
    }

    pub(crate) fn from_opened(opened: Opened) -> Bucket {
        let Opened { url, store, root, source, learned } = opened;
        let (counters, breaker) = (Arc::default(), Breaker::default());
        let inner = Inner { url, store, root, counters, opened: Instant::now(), source, learned, breaker };
        Bucket { inner: Arc::new(inner), budget: RetryBudget::default() }
    }

    /// Returns the same bucket (and counts) with another retry budget.
    pub fn with_retry(&self, budget: RetryBudget) -> Bucket {
        Bucket { inner: Arc::clone(&self.inner), budget }
    }

    /// Returns the underlying store, which bypasses all checks and counts and expects the prefix before each
    /// key; for tests that damage objects.
    pub fn raw_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner.store)
    }

    /// Returns the URL it was opened with; it holds no secrets.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Returns the requests and bytes so far.
    pub fn counts(&self) -> RequestCounts {
        self.inner.counters.snapshot()
    }

    /// Returns the same counts, with the time since the bucket was opened.
    pub fn usage(&self) -> Usage {
        Usage { counts: self.counts(), elapsed: self.inner.opened.elapsed() }
    }

    /// Returns the duration of the current outage and the last error; `None` while the bucket answers.
    pub fn outage(&self) -> Option<(Duration, String)> {
        self.inner.breaker.outage()
    }

    /// Returns the number of outages that have ended: when it rises, a caller in backoff may retry at once.
    pub fn outages_ended(&self) -> u64 {
        self.inner.breaker.ended()
    }

    /// Returns the foreign objects that listings have found since the last call.
    pub fn take_strangers(&self) -> Vec<String> {
        self.inner.learned.strangers.take()
    }

    /// Returns the seconds that the store's clock is ahead of this machine's; 0 while that is unknown.
    pub fn clock_ahead_s(&self) -> i64 {
        self.inner.learned.ahead_s()
    }

    /// Returns a source of the counts that works while the bucket is open, and does not keep it open.
    pub(crate) fn counts_while_open(&self) -> impl Fn() -> Option<RequestCounts> + Send + Sync + use<> {
        let inner = Arc::downgrade(&self.inner);
        move || inner.upgrade().map(|inner| inner.counters.snapshot())
    }

    /// Checks, with five small requests, that the bucket can be reached, read and written, and
    /// that it honours create-if-absent. Returns within about 5 s, also when the bucket does not answer.
    ///
    /// # Errors
    /// `Unreachable`, `NoCredentials`, `AccessDenied`, `UnknownBucket`, `IgnoresConditions`.
    pub async fn probe(&self) -> Result<(), BucketError> {
        let budget = RetryBudget::probe();
        let deadline = budget.total + Duration::from_secs(2);
        let probe = self.with_retry(budget);
        match tokio::time::timeout(deadline, probe.probe_now()).await {
            Ok(result) => result,
            Err(_) => Err(Failure::timed_out(deadline).into_error(self.url(), "probe")),
        }
    }

    async fn probe_now(&self) -> Result<(), BucketError> {
        let nonce: u128 = rand::random();
        let key = layout::probe(nonce);
        let first = Bytes::from(format!("vasto probe {nonce:032x}, first"));
        let second = Bytes::from(format!("vasto probe {nonce:032x}, second"));
        let refuse = |detail: &str| {
            Err(BucketError::IgnoresConditions { url: self.url().to_owned(), detail: detail.to_owned() })
        };
        let written = match self.create(&key, first.clone()).await {
            Err(BucketError::Unsupported { detail, .. }) => return refuse(&detail),
            other => other?,
        };
        if written != Create::Created {
            return refuse("a fresh name held an object");
        }
        let again = self.create(&key, second).await;
        // Write permission need not include delete; gc removes a probe that stays behind.
        if let Err(error) = self.delete(&key).await {
            tracing::debug!(%error, key, "the probe could not be removed");
        }
        match again? {
            Create::Exists(found) if found == first => Ok(()),
            Create::Exists(_) => refuse("the second create of a name altered the object"),
            Create::Created => refuse("the second create of a name succeeded"),
        }
    }

    /// Writes the object unless the key is taken.
    ///
    /// When the store reports that the key is taken (also 409 and 412), the object is read back: the same
    /// bytes mean that an earlier attempt of this call succeeded and its reply was lost. So bodies
    /// that decide something must carry a nonce.
    ///
    /// # Errors
    /// After an error the outcome is unknown: read before deciding anything.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<Create, BucketError> {
        let path = self.path(key)?;
        let bytes = body.len() as u64;
        let limit = self.budget.limit_for(bytes);
        let mut retry = Retry::new(self.budget);
        loop {
            let put = async {
                let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                self.inner.counters.put();
                self.inner.counters.sent(bytes);
                self.inner.store.put_opts(&path, PutPayload::from(body.clone()), options).await
            };
            let mut failure = match self.once(&retry, limit, bytes, put).await {
                Ok(_) => return Ok(Create::Created),
                Err(failure) => failure,
            };
            if failure.kind == Kind::Taken {
                match self.get(key).await? {
                    Some(found) if found == body => return Ok(Create::Created),
                    Some(found) => return Ok(Create::Exists(found)),
                    None => failure = Failure::contended(),
                }
            }
            if !failure.transient || !retry.pause().await {
                return Err(failure.into_error(self.url(), key));
            }
        }
    }

    /// Returns the whole object, or `None` when there is none.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, BucketError> {
        let path = self.path(key)?;
        let read = || async {
            let result = within(self.budget.attempt, self.get_once(&path, None)).await?;
            let size = result.meta.size;
            if size > GET_BYTES_MAX {
                return Ok(Err(size));
            }
            let mut body = BytesMut::with_capacity(size as usize);
            let mut stream = result.into_stream();
            // The body may be slow, but must not stall.
            while let Some(part) = within(self.budget.attempt, async { stream.next().await.transpose() }).await? {
                self.inner.counters.received(part.len() as u64);
                body.extend_from_slice(&part);
            }
            let body = body.freeze();
            if body.len() as u64 != size {
                return Err(Failure::short_body(size, body.len() as u64));
            }
            Ok(Ok(body))
        };
        let limit = self.budget.transfer.max(self.budget.limit_for(GET_BYTES_MAX));
        match self.retrying(limit, read).await {
            Ok(Ok(body)) => Ok(Some(body)),
            Ok(Err(bytes)) => Err(BucketError::TooLarge { key: key.to_owned(), bytes }),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Returns up to `bytes` bytes of the object's beginning and the size of the whole; `None` without an object.
    pub(crate) async fn beginning(&self, key: &str, bytes: u64) -> Result<Option<(Bytes, u64)>, BucketError> {
        let path = self.path(key)?;
        let read = || async {
            let result = self.get_once(&path, Some(0..bytes)).await?;
            let size = result.meta.size;
            let body = result.bytes().await?;
            self.inner.counters.received(body.len() as u64);
            Ok((body, size))
        };
        match self.retrying(self.budget.attempt, read).await {
            Ok(found) => Ok(Some(found)),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Returns the object's size, or `None` when there is none.
    pub async fn head(&self, key: &str) -> Result<Option<u64>, BucketError> {
        Ok(self.look_at(key).await?.map(|found| found.bytes))
    }

    /// Returns what a listing would report of the object, or `None` when there is none.
    pub async fn look_at(&self, key: &str) -> Result<Option<ObjectInfo>, BucketError> {
        let path = self.path(key)?;
        let head = || async {
            self.inner.counters.head();
            Ok(self.inner.store.head(&path).await?)
        };
        match self.retrying(self.budget.attempt, head).await {
            Ok(found) => Ok(Some(info(key.to_owned(), &found))),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// Lists all objects in the folder `prefix` (which ends with `/`; the empty prefix is everything), in
    /// no particular order. For start-up and fsck only: no decision rests on a listing. Foreign objects, whose
    /// names Vasto cannot use, are skipped; [`Bucket::take_strangers`] returns them.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, BucketError> {
        Ok(self.list_all(prefix).await?.objects)
    }

    /// Lists the same, with the files that interrupted writes have left beside the objects.
    pub async fn list_all(&self, prefix: &str) -> Result<Listing, BucketError> {
        let mut all = Listing::default();
        self.list_until(prefix, &mut all, |_| false).await?;
        Ok(all)
    }

    /// Returns the first object other than a start-up probe; `None` when nothing was ever written here.
    pub async fn any_object(&self) -> Result<Option<String>, BucketError> {
        let mut all = Listing::default();
        let is_other = |object: &ObjectInfo| !object.key.starts_with("probe/");
        self.list_until("", &mut all, |page| page.iter().any(is_other)).await?;
        Ok(all.objects.into_iter().find(is_other).map(|object| object.key))
    }

    /// Lists page by page until `will_do` accepts a page. A page that fails is requested again.
    async fn list_until(
        &self,
        prefix: &str,
        all: &mut Listing,
        will_do: impl Fn(&[ObjectInfo]) -> bool,
    ) -> Result<(), BucketError> {
        let folder = match (self.inner.root.as_str(), prefix.trim_end_matches('/')) {
            ("", folder) => folder.to_owned(),
            (root, "") => root.to_owned(),
            (root, folder) => format!("{root}/{folder}"),
        };
        let path = (!folder.is_empty()).then(|| parse_path(&folder)).transpose()?;
        let failed = |failure: Failure| failure.into_error(self.url(), prefix);
        let of_page = |page: Vec<object_store::ObjectMeta>| {
            let skip = if self.inner.root.is_empty() { 0 } else { self.inner.root.len() + 1 };
            let key = |meta: &object_store::ObjectMeta| Some(meta.location.as_ref().get(skip..)?.to_owned());
            page.iter().filter_map(|meta| Some(info(key(meta)?, meta))).collect::<Vec<_>>()
        };
        match &self.inner.source {
            Source::Local(root) => {
                let (root, learned) = (root.clone(), self.inner.learned.clone());
                let walked = blocking(move || listing::walk(&root, &folder, &learned.strangers)).await;
                *all = walked.map_err(|error| failed(Failure::of_disk(&error)))?;
                self.inner.counters.list((all.objects.len() as u64).div_ceil(LIST_PAGE).max(1));
            }
            Source::Stream => {
                let list = || async {
                    self.inner.counters.list(1);
                    Ok(self.inner.store.list(path.as_ref()).try_collect::<Vec<_>>().await?)
                };
                let found = self.retrying(self.budget.transfer, list).await.map_err(failed)?;
                self.inner.counters.list((found.len() as u64).div_ceil(LIST_PAGE).saturating_sub(1));
                all.objects = of_page(found);
            }
            Source::Pages(store) => {
                let prefix = if folder.is_empty() { folder } else { format!("{folder}/") };
                let mut token: Option<String> = None;
                loop {
                    let list = || async {
                        self.inner.counters.list(1);
                        Ok(listing::page(store.as_ref(), &prefix, token.clone()).await?)
                    };
                    let (page, next) = self.retrying(self.budget.transfer, list).await.map_err(failed)?;
                    let page = of_page(page);
                    let enough = will_do(&page);
                    all.objects.extend(page);
                    token = next;
                    if enough || token.is_none() {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the object; a missing object is no error.
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        self.delete_many(&[key]).await
    }

    /// Removes these objects, on S3 in one request for up to a thousand of them; missing objects are
    /// no error. After an error some of them may be gone.
    pub async fn delete_many(&self, keys: &[&str]) -> Result<(), BucketError> {
        let mut left = Vec::with_capacity(keys.len());
        for key in keys {
            left.push((*key, self.path(key)?));
        }
        let mut retry = Retry::new(self.budget);
        while !left.is_empty() {
            let delete = async {
                let batches = matches!(self.inner.source, Source::Pages(_));
                (0..if batches { 1 } else { left.len() }).for_each(|_| self.inner.counters.delete());
                let paths: Vec<_> = left.iter().map(|(_, path)| Ok(path.clone())).collect();
                let stream = self.inner.store.delete_stream(futures::stream::iter(paths).boxed());
                // The store returns an answer for each key, in order; for a batch that fails whole it returns one.
                let answers: Vec<object_store::Result<ObjectPath>> = stream.collect().await;
                let whole = answers.len() != left.len();
                let mut first = None;
                let mut again = Vec::new();
                for (at, answer) in answers.into_iter().enumerate() {
                    match answer.map_err(Failure::from) {
                        Ok(_) => {}
                        Err(failure) if failure.kind == Kind::NotFound => {}
                        Err(failure) => {
                            again.push(at);
                            first.get_or_insert(failure);
                        }
                    }
                }
                match first {
                    None => Ok(Vec::new()),
                    Some(failure) if whole || again.len() == left.len() => Err(failure),
                    Some(failure) => Ok(again.into_iter().map(|at| (at, failure.clone())).collect()),
                }
            };
            let limit = self.budget.attempt.max(self.budget.transfer.min(self.budget.attempt * left.len() as u32));
            let (again, failure) = match self.once(&retry, limit, 0, delete).await {
                Ok(again) => {
                    let failure = again.first().map(|(_, failure)| failure.clone());
                    (Some(again), failure)
                }
                Err(failure) => (None, Some(failure)),
            };
            let Some(failure) = failure else { return Ok(()) };
            if let Some(again) = again {
                let mut at = 0;
                left.retain(|_| {
                    at += 1;
                    again.iter().any(|(index, _)| *index == at - 1)
                });
            }
            if !failure.transient || !retry.pause().await {
                let key = left.first().map_or("", |(key, _)| *key);
                return Err(failure.into_error(self.url(), key));
            }
        }
        Ok(())
    }

    /// Removes a file that an interrupted write has left in a local directory.
    pub(crate) async fn delete_staged(&self, key: &str) -> Result<(), BucketError> {
        self.path(key)?;
        let Source::Local(root) = &self.inner.source else { return Ok(()) };
        if listing::staged_for(key).is_none() {
            return Err(BucketError::BadKey { key: key.to_owned(), reason: "it is no staged file".to_owned() });
        }
        let path = root.join(key);
        match blocking(move || std::fs::remove_file(path)).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::of_disk(&error).into_error(self.url(), key))
            }
            _ => Ok(()),
        }
    }

    /// Sends one GET, counted, not retried; the caller counts the body.
    pub(crate) async fn get_once(&self, path: &ObjectPath, range: Option<Range<u64>>) -> Result<GetResult, Failure> {
        self.inner.counters.get();
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        Ok(self.inner.store.get_opts(path, options).await?)
    }

    pub(crate) fn path(&self, key: &str) -> Result<ObjectPath, BucketError> {
        match (self.inner.root.as_str(), key) {
            (_, "") => Err(BucketError::BadKey { key: String::new(), reason: "it is empty".to_owned() }),
            ("", key) => parse_path(key),
            (root, key) => parse_path(&format!("{root}/{key}")),
        }
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        self.inner.store.as_ref()
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.inner.counters
    }

    pub(crate) fn budget(&self) -> RetryBudget {
        self.budget
    }

    /// Makes one attempt, cut off after `limit`, behind the breaker. `sends` is its upload size: large uploads
    /// are not used as trial requests, and a slow large upload says nothing about other requests.
    pub(crate) async fn once<T, E: Into<Failure>>(
        &self,
        retry: &Retry,
        limit: Duration,
        sends: u64,
        attempt: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        let breaker = &self.inner.breaker;
        let is_large = sends > PROBE_BYTES_MAX;
        while is_large && breaker.is_open() {
            let pass = breaker.pass(retry.left()).await?;
            self.inner.counters.head();
            let path = self.path(&layout::cluster()).map_err(|error| Failure::of_name(&error))?;
            let looked = within(self.budget.attempt, self.inner.store.head(&path)).await;
            pass.tell(looked.err().map(|failure| failure.with_clock(self.clock_ahead_s())).as_ref());
        }
        let pass = breaker.pass(retry.left()).await?;
        match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(value)) => {
                pass.tell(None);
                Ok(value)
            }
            Ok(Err(error)) => {
                let failure = error.into().with_clock(self.clock_ahead_s());
                pass.tell(Some(&failure));
                Err(failure)
            }
            Err(_) => {
                let failure = Failure::timed_out(limit);
                if is_large {
                    pass.say_nothing()
                } else {
                    pass.tell(Some(&failure))
                }
                Err(failure)
            }
        }
    }

    /// Repeats attempts until one succeeds, one fails for good, or the budget is used up.
    async fn retrying<T, F, Fut>(&self, limit: Duration, attempt: F) -> Result<T, Failure>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let mut retry = Retry::new(self.budget);
        loop {
            let failure = match self.once(&retry, limit, 0, attempt()).await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !failure.transient || !retry.pause().await {
                return Err(failure);
            }
        }
    }
}

fn info(key: String, meta: &object_store::ObjectMeta) -> ObjectInfo {
    let modified_us = u64::try_from(meta.last_modified.timestamp_micros()).unwrap_or(0);
    ObjectInfo { key, bytes: meta.size, modified_us }
}

/// Makes one attempt, cut off after `limit`.
pub(crate) async fn within<T, E: Into<Failure>>(
    limit: Duration,
    attempt: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, attempt).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Failure::timed_out(limit)),
    }
}

fn parse_path(key: &str) -> Result<ObjectPath, BucketError> {
    ObjectPath::parse(key).map_err(|error| BucketError::BadKey { key: key.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_never_print_secrets() {
        let options = BucketOptions {
            access_key_id: Some("AKIACANARY".into()),
            secret_access_key: Some("s3cr3tcanary".into()),
            ..BucketOptions::default()
        };
        let text = format!("{options:?} {options:#?}").to_lowercase();
        assert!(!text.contains("canary"), "{text}");
    }

    #[tokio::test]
    async fn a_listing_counts_its_pages() {
        let store = Arc::new(object_store::memory::InMemory::new());
        for n in 0..2_001 {
            store.put(&ObjectPath::from(format!("some/{n}")), PutPayload::default()).await.expect("memory takes all");
        }
        let bucket = Bucket::from_store("memory://pages", store);
        for (folder, objects, pages) in [("none/", 0, 1), ("some/", 2_001, 3)] {
            let before = bucket.counts().list;
            assert_eq!(bucket.list(folder).await.expect("memory answers").len(), objects);
            assert_eq!(bucket.counts().list - before, pages, "{folder}");
        }
    }

    #[test]
    fn keys_cannot_leave_the_root() {
        let store = Arc::new(object_store::memory::InMemory::new());
        let bucket = Bucket::over("memory://x/root".into(), store, "root".into());
        for bad in ["", "..", "a/../b", "a//b", "./a"] {
            assert!(matches!(bucket.path(bad), Err(BucketError::BadKey { .. })), "{bad}");
        }
        assert!(bucket.path("names/a/1").is_ok_and(|path| path.as_ref() == "root/names/a/1"));
    }
}
