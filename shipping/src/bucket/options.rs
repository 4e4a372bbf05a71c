//! Credentials and endpoint of a bucket.
//!
//! **Invariant:** no secret is ever printed.

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
}
