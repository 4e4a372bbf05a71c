//! The bucket: the only door to object storage.
//!
//! **Invariant:** nothing here overwrites. [`Bucket::create`] answers `Created` only when the bytes
//! under the key are the caller's own, also when the reply to an earlier attempt was lost.
//!
//! How URLs become stores is in `open`, what errors mean in `failure` and [`crate::error`], large
//! uploads in `upload`, checked downloads in [`mod@crate::download`].

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

pub use crate::counts::RequestCounts;
pub use crate::error::BucketError;

use crate::bill::Usage;
use crate::counts::Counters;
use crate::failure::{Failure, Kind};
use crate::layout;
use crate::retry::{Retry, RetryBudget};

/// [`Bucket::get`] refuses larger objects: it holds them in memory. Manifests and chunks stay far below.
pub const GET_BYTES_MAX: u64 = 256 << 20;

/// Objects that one page of a listing holds on every store; used to count requests.
const LIST_PAGE: u64 = 1000;

/// Where credentials and endpoint come from; what is `None` or `false` comes from the standard
/// AWS, GCP or Azure environment variables.
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

/// What a create-if-absent found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Create {
    /// The caller's bytes are under the key.
    Created,
    /// These other bytes are under the key; nothing was written.
    Exists(Bytes),
}

/// An object as a listing shows it.
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
    /// CRC-32C of the whole.
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
        let opened = crate::open::open(url, options, &mut std::env::vars_os())?;
        Ok(Self::over(opened.url, opened.store, opened.root))
    }

    /// A bucket over any object store, its root at the store's own; for stores that wrap another.
    pub fn from_store(url: &str, store: Arc<dyn ObjectStore>) -> Bucket {
        Self::over(url.to_owned(), store, String::new())
    }

    pub(crate) fn over(url: String, store: Arc<dyn ObjectStore>, root: String) -> Bucket {
        let inner = Inner { url, store, root, counters: Arc::default(), opened: Instant::now() };
        Bucket { inner: Arc::new(inner), budget: RetryBudget::default() }
    }

    /// The same bucket (and counts), with another patience.
    pub fn with_retry(&self, budget: RetryBudget) -> Bucket {
        Bucket { inner: Arc::clone(&self.inner), budget }
    }

    /// The store beneath, past all checks and counts, with the prefix still to be put before each
    /// key; for tests that damage objects.
    pub fn raw_store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner.store)
    }

    /// The URL it was opened with; it holds no secrets.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Requests and bytes so far.
    pub fn counts(&self) -> RequestCounts {
        self.inner.counters.snapshot()
    }

    /// The same, with the time since the bucket was opened.
    pub fn usage(&self) -> Usage {
        Usage { counts: self.counts(), elapsed: self.inner.opened.elapsed() }
    }

    /// Answers the counts as long as anybody holds the bucket, and does not hold it.
    pub(crate) fn counts_while_open(&self) -> impl Fn() -> Option<RequestCounts> + Send + Sync + use<> {
        let inner = Arc::downgrade(&self.inner);
        move || inner.upgrade().map(|inner| inner.counters.snapshot())
    }

    /// Finds out, with five small requests, that the bucket can be reached, read and written, and
    /// that it honours create-if-absent. Answers within about 5 s, also when nobody is there.
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
        // Whoever may write need not be allowed to delete; a probe that stays behind is collected.
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
    /// When the store says that it is taken (also 409 and 412), the object is read back: the same
    /// bytes mean that an earlier attempt of this call succeeded and its reply was lost. So bodies
    /// that decide something must carry a nonce.
    ///
    /// # Errors
    /// After an error the outcome is unknown: read before deciding anything.
    pub async fn create(&self, key: &str, body: Bytes) -> Result<Create, BucketError> {
        self.create_within(key, body, self.budget.attempt).await
    }

    pub(crate) async fn create_within(&self, key: &str, body: Bytes, limit: Duration) -> Result<Create, BucketError> {
        let path = self.path(key)?;
        let mut retry = Retry::new(self.budget);
        loop {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            self.inner.counters.put();
            self.inner.counters.sent(body.len() as u64);
            let put = self.inner.store.put_opts(&path, PutPayload::from(body.clone()), options);
            let mut failure = match within(limit, put).await {
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

    /// The whole object, or `None` when there is none.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, BucketError> {
        let path = self.path(key)?;
        let read = || async {
            let result = self.get_once(&path, None).await?;
            let size = result.meta.size;
            if size > GET_BYTES_MAX {
                return Ok(Err(size));
            }
            let body = result.bytes().await?;
            self.inner.counters.received(body.len() as u64);
            if body.len() as u64 != size {
                return Err(Failure::short_body(size, body.len() as u64));
            }
            Ok(Ok(body))
        };
        match self.retrying(self.budget.transfer, read).await {
            Ok(Ok(body)) => Ok(Some(body)),
            Ok(Err(bytes)) => Err(BucketError::TooLarge { key: key.to_owned(), bytes }),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// The object's size, or `None` when there is none.
    pub async fn head(&self, key: &str) -> Result<Option<u64>, BucketError> {
        let path = self.path(key)?;
        let head = || async {
            self.inner.counters.head();
            Ok(self.inner.store.head(&path).await?.size)
        };
        match self.retrying(self.budget.attempt, head).await {
            Ok(size) => Ok(Some(size)),
            Err(failure) if failure.kind == Kind::NotFound => Ok(None),
            Err(failure) => Err(failure.into_error(self.url(), key)),
        }
    }

    /// All objects in the folder `prefix` (which ends with `/`; the empty prefix is everything), in
    /// no particular order. For start-up and fsck only: no decision rests on a listing.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, BucketError> {
        let folder = match (self.inner.root.as_str(), prefix.trim_end_matches('/')) {
            ("", "") => None,
            (root, "") => Some(root.to_owned()),
            ("", folder) => Some(folder.to_owned()),
            (root, folder) => Some(format!("{root}/{folder}")),
        };
        let folder = folder.map(|folder| parse_path(&folder)).transpose()?;
        let list = || async {
            self.inner.counters.list(1);
            let found: Vec<_> = self.inner.store.list(folder.as_ref()).try_collect().await?;
            self.inner.counters.list((found.len() as u64).div_ceil(LIST_PAGE).saturating_sub(1));
            Ok(found)
        };
        let outcome = self.retrying(Duration::from_secs(600), list).await;
        let found = outcome.map_err(|failure| failure.into_error(self.url(), prefix))?;
        let skip = if self.inner.root.is_empty() { 0 } else { self.inner.root.len() + 1 };
        Ok(found
            .into_iter()
            .filter_map(|meta| {
                Some(ObjectInfo {
                    key: meta.location.as_ref().get(skip..)?.to_owned(),
                    bytes: meta.size,
                    modified_us: u64::try_from(meta.last_modified.timestamp_micros()).unwrap_or(0),
                })
            })
            .collect())
    }

    /// Removes the object; one that is not there is fine.
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        let path = self.path(key)?;
        let delete = || async {
            self.inner.counters.delete();
            Ok(self.inner.store.delete(&path).await?)
        };
        match self.retrying(self.budget.attempt, delete).await {
            Err(failure) if failure.kind != Kind::NotFound => Err(failure.into_error(self.url(), key)),
            _ => Ok(()),
        }
    }

    /// One GET, counted, not retried; the caller counts the body.
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

    /// Attempts until one succeeds, one fails for good, or the budget is used up.
    async fn retrying<T, F, Fut>(&self, limit: Duration, attempt: F) -> Result<T, Failure>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let mut retry = Retry::new(self.budget);
        loop {
            let failure = match within(limit, attempt()).await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !failure.transient || !retry.pause().await {
                return Err(failure);
            }
        }
    }
}

/// One attempt, cut off after `limit`.
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
