//! Errors of the bucket, with texts that say how to resolve them.
//!
//! `failure` maps object_store's errors to these.

use super::object::GET_BYTES_MAX;

/// Why a request to the bucket failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BucketError {
    /// The URL names no bucket.
    #[error(
        "`{url}` is not a bucket URL: {reason}; use file:///path, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or memory://name"
    )]
    BadUrl {
        /// The URL as given, without anything that may be a secret.
        url: String,
        /// The reason.
        reason: String,
    },
    /// Options or environment variables do not fit together.
    #[error("the settings for bucket {url} are not usable: {reason}")]
    BadOptions {
        /// The bucket.
        url: String,
        /// The reason, and what to set.
        reason: String,
    },
    /// No answer within the retry budget.
    #[error(
        "bucket {url} cannot be reached; check the endpoint (AWS_ENDPOINT_URL), the network and that the server runs: {detail}"
    )]
    Unreachable {
        /// The bucket.
        url: String,
        /// The last attempt's error.
        detail: String,
    },
    /// No credentials were found.
    #[error(
        "no credentials for bucket {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the GOOGLE_… / AZURE_… variables) or give the machine a role: {detail}"
    )]
    NoCredentials {
        /// The bucket.
        url: String,
        /// The places that were searched.
        detail: String,
    },
    /// The credentials have expired, and no newer ones were provided within the retry budget.
    #[error(
        "the credentials for bucket {url} have expired; each attempt asks for them anew, so those of a machine's role recover by themselves; a session token from the environment (AWS_SESSION_TOKEN) does not: set a new one and restart: {detail}"
    )]
    ExpiredCredentials {
        /// The bucket.
        url: String,
        /// The store's error.
        detail: String,
    },
    /// The machine's clock and the store's are too far apart.
    #[error(
        "bucket {url} refuses every request because this machine's clock is wrong: {detail}; set this machine's clock (NTP), nothing else needs to be done"
    )]
    ClockSkewed {
        /// The bucket.
        url: String,
        /// The difference, and the store's error.
        detail: String,
    },
    /// The store refuses the credentials or the operation.
    #[error(
        "access to bucket {url} was denied; check the credentials, the machine's clock and that they may get, put and list here: {detail}"
    )]
    AccessDenied {
        /// The bucket.
        url: String,
        /// The store's error.
        detail: String,
    },
    /// The bucket or container does not exist.
    #[error("bucket {url} does not exist; create it, or correct the URL or region")]
    UnknownBucket {
        /// The bucket.
        url: String,
    },
    /// Two creates of one name both succeeded.
    #[error(
        "the store behind {url} ignores create-if-absent (If-None-Match), on which all coordination rests; use another store: S3, GCS, Azure, MinIO, SeaweedFS or a local directory: {detail}"
    )]
    IgnoresConditions {
        /// The bucket.
        url: String,
        /// The observed behaviour.
        detail: String,
    },
    /// The store lacks an operation.
    #[error(
        "the store behind {url} lacks an operation that Vasto needs; use another store: {detail}"
    )]
    Unsupported {
        /// The bucket.
        url: String,
        /// The store's error.
        detail: String,
    },
    /// The key cannot be an object name.
    #[error("`{key}` cannot be the name of an object: {reason}")]
    BadKey {
        /// The key.
        key: String,
        /// The reason.
        reason: String,
    },
    /// An upload found another object under its name.
    #[error(
        "object {key} exists already with other content; upload again under a new attempt name"
    )]
    Exists {
        /// The key.
        key: String,
    },
    /// The object has another size than was written, or is too large for what was requested.
    #[error(
        "object {key} has {found} bytes instead of {expected}; do not use it, upload again under a new attempt name"
    )]
    WrongSize {
        /// The key.
        key: String,
        /// The size that it should have.
        expected: u64,
        /// The size that it has.
        found: u64,
    },
    /// The object does not fit into memory.
    #[error(
        "object {key} has {bytes} bytes, over the limit of {GET_BYTES_MAX} for reading at once; it is not one of ours"
    )]
    TooLarge {
        /// The key.
        key: String,
        /// Its size.
        bytes: u64,
    },
    /// A local file could not be read.
    #[error("{path} cannot be read for the upload: {detail}")]
    LocalFile {
        /// The file.
        path: String,
        /// The system's error.
        detail: String,
    },
    /// Any other error.
    #[error("the bucket failed on object `{key}`: {detail}")]
    Store {
        /// The key, or the prefix of a list.
        key: String,
        /// The store's error.
        detail: String,
    },
}

impl BucketError {
    /// Returns true when the same call may succeed later without any change to the configuration.
    pub fn is_transient(&self) -> bool {
        match self {
            BucketError::Unreachable { .. }
            | BucketError::ClockSkewed { .. }
            | BucketError::NoCredentials { .. }
            | BucketError::ExpiredCredentials { .. } => true,
            BucketError::BadUrl { .. }
            | BucketError::BadOptions { .. }
            | BucketError::AccessDenied { .. }
            | BucketError::UnknownBucket { .. }
            | BucketError::IgnoresConditions { .. }
            | BucketError::Unsupported { .. }
            | BucketError::BadKey { .. }
            | BucketError::Exists { .. }
            | BucketError::WrongSize { .. }
            | BucketError::TooLarge { .. }
            | BucketError::LocalFile { .. }
            | BucketError::Store { .. } => false,
        }
    }
}
