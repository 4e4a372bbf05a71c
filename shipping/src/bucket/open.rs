//! Builds an object store from a URL, options and the environment.
//!
//! **Invariant:** options win over environment variables, and no possible secret gets into an error
//! or the URL that is shown. Opening sends no request.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, OnceLock};

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder};
use object_store::list::PaginatedListStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use url::Url;
use vasto_core::limits::CONNECT_TIMEOUT;

use super::error::BucketError;
use super::handle::{Bucket, Opened, Source};
use super::options::BucketOptions;
use super::retry::RetryBudget;
use super::upload::SINGLE_PUT_BYTES_MAX;
use super::wire::{Connector, Learned};

/// The environment, as `std::env::vars_os` returns it; only S3 reads it through this.
pub(super) type Environment<'a> = &'a mut dyn Iterator<Item = (OsString, OsString)>;

impl Bucket {
    /// Opens the bucket that the URL names, without sending a request: `file:///path` (created if
    /// missing, every write synced), `s3://bucket/prefix`, `gs://…`, `az://…`, and for tests
    /// `memory://name`, one store per name in the process.
    ///
    /// # Errors
    /// `BadUrl`, `BadOptions`, `NoCredentials`; a local directory that cannot be created is
    /// `Store`.
    pub fn open(url: &str, options: &BucketOptions) -> Result<Bucket, BucketError> {
        Ok(Self::from_opened(open(url, options, &mut std::env::vars_os())?))
    }

    /// Checks the form of a bucket's URL; opens and creates nothing.
    ///
    /// # Errors
    /// [`BucketError::BadUrl`] with the reason.
    pub fn check_url(url: &str) -> Result<(), BucketError> {
        parse(url).map(|_| ())
    }

    /// Returns the URL of a bucket in a local directory, whatever characters and bytes its path
    /// holds; `None` for a path that is not absolute.
    pub fn url_of_directory(path: &std::path::Path) -> Option<String> {
        Url::from_file_path(path).ok().map(String::from)
    }

    /// Opens a bucket as [`Bucket::open`] does, for S3 with these variables instead of the
    /// process's own: for several roles in one process, as in tests.
    ///
    /// # Errors
    /// The errors of [`Bucket::open`].
    pub fn open_in(
        url: &str,
        options: &BucketOptions,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Bucket, BucketError> {
        Ok(Bucket::from_opened(open(url, options, &mut environment.into_iter())?))
    }
}

/// Parses a URL and checks that it has every part that its scheme needs.
fn parse(text: &str) -> Result<Url, BucketError> {
    let bad = |reason: &str| BucketError::BadUrl { url: shown(text), reason: reason.to_owned() };
    let url = Url::parse(text).map_err(|error| bad(&error.to_string()))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("credentials do not belong into the URL, where logs would show them"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("it has a query or fragment, which mean nothing here"));
    }
    let has_host = !url.host_str().unwrap_or_default().is_empty();
    match url.scheme() {
        "file" if url.to_file_path().is_err() => {
            Err(bad("a local directory has three slashes and a full path"))
        }
        "s3" | "gs" | "az" if !has_host => Err(bad("it names no bucket")),
        "file" | "memory" | "s3" | "gs" | "az" => Ok(url),
        other => Err(bad(&format!("the scheme `{other}` is unknown"))),
    }
}

pub(super) fn open(
    text: &str,
    options: &BucketOptions,
    environment: Environment<'_>,
) -> Result<Opened, BucketError> {
    let bad = |reason: &str| BucketError::BadUrl { url: shown(text), reason: reason.to_owned() };
    let url = parse(text)?;
    let host = url.host_str().unwrap_or_default();
    let root = url.path().trim_matches('/').to_owned();
    let shown = text.trim_end_matches('/').to_owned();
    let learned = Arc::<Learned>::default();
    let (store, source): (Arc<dyn ObjectStore>, Source) = match url.scheme() {
        "file" => {
            let path = url
                .to_file_path()
                .map_err(|()| bad("a local directory has three slashes and a full path"))?;
            let store = local(&path, &shown)?;
            return Ok(Opened {
                store,
                url: shown,
                root: String::new(),
                source: Source::Local(path),
                learned,
            });
        }
        "memory" => (memory(&shown), Source::Stream),
        "s3" => paged(s3(host, &shown, options, environment, &learned)?),
        "gs" => paged(gcs(host, &shown, options, &learned)?),
        "az" => paged(azure(host, &shown, options, &learned)?),
        other => return Err(bad(&format!("the scheme `{other}` is unknown"))),
    };
    let root = if url.scheme() == "memory" { String::new() } else { root };
    if !root.is_empty() && object_store::path::Path::parse(&root).is_err() {
        return Err(bad("its prefix cannot be part of an object's name"));
    }
    Ok(Opened { url: shown, store, root, source, learned })
}

fn paged<S: ObjectStore + PaginatedListStore>(store: S) -> (Arc<dyn ObjectStore>, Source) {
    let store = Arc::new(store);
    (Arc::<S>::clone(&store), Source::Pages(store))
}

/// Returns the URL as errors may show it: without the part before an `@`.
fn shown(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => {
            format!("{}…{}", &text[..scheme + 3], &text[at..])
        }
        (None, Some(at)) => format!("…{}", &text[at..]),
        _ => text.to_owned(),
    }
}

fn local(path: &std::path::Path, url: &str) -> Result<Arc<dyn ObjectStore>, BucketError> {
    let failed = |detail: String| BucketError::BadOptions {
        url: url.to_owned(),
        reason: format!(
            "the directory {} cannot be used: {detail}; create it, or give another one",
            path.display()
        ),
    };
    if path.to_str().is_none() {
        return Err(failed("its name is not UTF-8, which objects cannot be named under".into()));
    }
    std::fs::create_dir_all(path).map_err(|error| failed(error.to_string()))?;
    let store =
        LocalFileSystem::new_with_prefix(path).map_err(|error| failed(error.to_string()))?;
    Ok(Arc::new(store.with_fsync(true)))
}

/// Returns one store per URL and process, so that every handle of a test sees the same objects.
fn memory(url: &str) -> Arc<dyn ObjectStore> {
    type Stores = std::sync::Mutex<HashMap<String, Arc<InMemory>>>;
    static STORES: OnceLock<Stores> = OnceLock::new();
    let mut stores =
        STORES.get_or_init(Stores::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    Arc::<InMemory>::clone(stores.entry(url.to_owned()).or_default())
}

fn client_options(allow_http: bool) -> ClientOptions {
    // Each request has a limit of its own, by its size; this limit is for the largest.
    let longest = RetryBudget::default().limit_for(SINGLE_PUT_BYTES_MAX);
    ClientOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(longest)
        .with_allow_http(allow_http)
}

/// No retries in object_store: all are in [`super::retry`].
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn s3(
    bucket: &str,
    url: &str,
    options: &BucketOptions,
    environment: Environment<'_>,
    learned: &Arc<Learned>,
) -> Result<AmazonS3, BucketError> {
    let mut builder = AmazonS3Builder::new();
    let mut allow_http = options.allow_http;
    let mut has_identity = false;
    for (name, value) in environment {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        let Some(key) =
            name.strip_prefix("AWS_").and_then(|_| name.to_ascii_lowercase().parse().ok())
        else {
            continue;
        };
        has_identity |= matches!(
            key,
            AmazonS3ConfigKey::WebIdentityTokenFile
                | AmazonS3ConfigKey::ContainerCredentialsRelativeUri
                | AmazonS3ConfigKey::ContainerCredentialsFullUri
                | AmazonS3ConfigKey::MetadataEndpoint
                | AmazonS3ConfigKey::SkipSignature
        );
        if name == "AWS_ALLOW_HTTP" {
            allow_http |=
                matches!(value.to_ascii_lowercase().as_str(), "true" | "1" | "yes" | "on");
            continue;
        }
        builder = builder.with_config(key, value);
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(key) = &options.access_key_id {
        builder = builder.with_access_key_id(key);
    }
    if let Some(secret) = &options.secret_access_key {
        builder = builder.with_secret_access_key(secret);
    }
    let config = |key: AmazonS3ConfigKey| builder.get_config_value(&key);
    let endpoint =
        config(AmazonS3ConfigKey::S3Endpoint).or_else(|| config(AmazonS3ConfigKey::Endpoint));
    let has_id = config(AmazonS3ConfigKey::AccessKeyId).is_some();
    let has_secret = config(AmazonS3ConfigKey::SecretAccessKey).is_some();
    if has_id != has_secret {
        let missing = if has_id { "AWS_SECRET_ACCESS_KEY" } else { "AWS_ACCESS_KEY_ID" };
        return Err(BucketError::NoCredentials {
            url: url.to_owned(),
            detail: format!("{missing} is not set"),
        });
    }
    if let Some(endpoint) = endpoint.filter(|endpoint| endpoint.starts_with("http://")) {
        if !allow_http {
            let reason = format!(
                "the endpoint {endpoint} is not encrypted; use https, or set AWS_ALLOW_HTTP=true"
            );
            return Err(BucketError::BadOptions { url: url.to_owned(), reason });
        }
        // A plain local server is not AWS: asking the machine's metadata service would only hang.
        if !has_id && !has_identity {
            let detail = "neither the options nor the environment name any".to_owned();
            return Err(BucketError::NoCredentials { url: url.to_owned(), detail });
        }
    }
    builder
        .with_bucket_name(bucket)
        .with_client_options(client_options(allow_http))
        .with_retry(no_retries())
        .with_http_connector(Connector(learned.clone()))
        .build()
        .map_err(|error| bad_options(url, &error))
}

fn gcs(
    bucket: &str,
    url: &str,
    options: &BucketOptions,
    learned: &Arc<Learned>,
) -> Result<GoogleCloudStorage, BucketError> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    builder
        .with_client_options(client_options(options.allow_http))
        .with_retry(no_retries())
        .with_http_connector(Connector(learned.clone()))
        .build()
        .map_err(|error| bad_options(url, &error))
}

fn azure(
    container: &str,
    url: &str,
    options: &BucketOptions,
    learned: &Arc<Learned>,
) -> Result<MicrosoftAzure, BucketError> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(container);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(account) = &options.access_key_id {
        builder = builder.with_account(account);
    }
    if let Some(key) = &options.secret_access_key {
        builder = builder.with_access_key(key);
    }
    builder
        .with_client_options(client_options(options.allow_http))
        .with_retry(no_retries())
        .with_http_connector(Connector(learned.clone()))
        .build()
        .map_err(|error| bad_options(url, &error))
}

fn bad_options(url: &str, error: &object_store::Error) -> BucketError {
    BucketError::BadOptions { url: url.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    fn open_with(
        url: &str,
        options: &BucketOptions,
        environment: &[(&str, &str)],
    ) -> Result<Opened, BucketError> {
        open(url, options, &mut environment.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn bad_urls_are_refused_with_the_list_of_schemes() {
        for bad in [
            "",
            "x",
            "/tmp/bucket",
            "ftp://x/y",
            "s3://",
            "s3:///prefix",
            "file://host/path",
            "s3://b/p?x=1",
        ] {
            let error = open_with(bad, &BucketOptions::default(), &[]).unwrap_err();
            assert!(matches!(error, BucketError::BadUrl { .. }), "{bad}: {error:?}");
            assert!(error.to_string().contains("s3://bucket/prefix"), "{error}");
        }
    }

    #[test]
    fn secrets_in_a_url_are_refused_and_not_repeated() {
        let error =
            open_with("s3://key:canary@bucket/p", &BucketOptions::default(), &[]).unwrap_err();
        assert!(matches!(error, BucketError::BadUrl { .. }));
        assert!(!error.to_string().contains("canary"), "{error}");
    }

    #[test]
    fn plain_endpoints_need_permission_and_credentials() {
        let endpoint = ("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
        let none = BucketOptions::default();
        let error = open_with("s3://b/p", &none, &[endpoint]).unwrap_err();
        assert!(error.to_string().contains("AWS_ALLOW_HTTP"), "{error}");
        let allowed = ("AWS_ALLOW_HTTP", "true");
        let error = open_with("s3://b/p", &none, &[endpoint, allowed]).unwrap_err();
        assert!(matches!(error, BucketError::NoCredentials { .. }), "{error}");
        let half = ("AWS_ACCESS_KEY_ID", "a");
        let error = open_with("s3://b/p", &none, &[endpoint, allowed, half]).unwrap_err();
        assert!(error.to_string().contains("AWS_SECRET_ACCESS_KEY"), "{error}");
        let whole = ("AWS_SECRET_ACCESS_KEY", "b");
        let opened = open_with("s3://b/p/", &none, &[endpoint, allowed, half, whole]).unwrap();
        assert_eq!((opened.url.as_str(), opened.root.as_str()), ("s3://b/p", "p"));
    }

    // A machine without a role: no metadata service answers with credentials.
    #[tokio::test]
    async fn a_machine_without_a_role_gets_an_error_within_seconds() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let metadata = format!("http://{closed}");
        let opened = open_with(
            "s3://b/p",
            &BucketOptions::default(),
            &[("AWS_METADATA_ENDPOINT", &metadata)],
        )
        .unwrap();
        let began = std::time::Instant::now();
        let error = crate::Bucket::from_opened(opened).probe().await.unwrap_err();
        assert!(matches!(error, BucketError::NoCredentials { .. }), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    }
}
