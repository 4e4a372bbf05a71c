//! What a failed request means: object_store's errors, sorted by what to do about them.
//!
//! **Invariant:** "not found" is only ever about the object. A missing bucket, refused credentials
//! and an unreachable server are told apart here, once, because each asks something else of a person.

use std::error::Error;

use object_store::client::HttpError;

use crate::bucket::BucketError;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The object is not there.
    NotFound,
    /// The bucket or container is not there.
    NoBucket,
    /// The name is taken, or the store says so while two creates race (409).
    Taken,
    /// The store knows us and says no, or does not accept our signature.
    Denied,
    /// No credentials could be found.
    NoCredentials,
    /// The store does not implement what was asked.
    Unsupported,
    /// No answer, or an answer that asks to try again.
    Unreachable,
    /// Anything else.
    Other,
}

/// A failed attempt.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// A further attempt may succeed.
    pub(crate) transient: bool,
    pub(crate) detail: String,
}

/// Statuses that ask to try again. 501 does not: the store lacks the operation.
pub(crate) fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 429) || (status >= 500 && status != 501)
}

impl Failure {
    pub(crate) fn timed_out(after: std::time::Duration) -> Self {
        Self { kind: Kind::Unreachable, transient: true, detail: format!("no answer within {} s", after.as_secs_f32()) }
    }

    /// The store says that the name is taken, but nothing is there: two creates raced.
    pub(crate) fn contended() -> Self {
        Self {
            kind: Kind::Other,
            transient: true,
            detail: "the store reports a conflict on a name that holds no object".to_owned(),
        }
    }

    pub(crate) fn short_body(expected: u64, found: u64) -> Self {
        Self {
            kind: Kind::Unreachable,
            transient: true,
            detail: format!("the body ended after {found} of {expected} bytes"),
        }
    }

    pub(crate) fn into_error(self, url: &str, key: &str) -> BucketError {
        let (url, key, detail) = (url.to_owned(), key.to_owned(), self.detail);
        match self.kind {
            Kind::NoBucket => BucketError::UnknownBucket { url },
            Kind::Denied => BucketError::AccessDenied { url, detail },
            Kind::NoCredentials => BucketError::NoCredentials { url, detail },
            Kind::Unreachable => BucketError::Unreachable { url, detail },
            Kind::Unsupported => BucketError::Unsupported { url, detail },
            Kind::NotFound | Kind::Taken | Kind::Other => BucketError::Store { key, detail },
        }
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error as E;
        let detail = chain(&error);
        let status = status_in(&detail);
        let has = |words: &[&str]| words.iter().any(|word| detail.contains(word));
        let http = find::<HttpError>(&error).is_some();
        let (kind, transient) = if has(&["/latest/api/token", "/latest/meta-data", "169.254.170.", "computeMetadata"]) {
            (Kind::NoCredentials, http || status.is_none_or(is_transient_status))
        } else if has(&["NoSuchBucket", "The specified bucket does not exist", "ContainerNotFound"]) {
            (Kind::NoBucket, false)
        } else if has(&["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"]) {
            (Kind::Denied, false)
        } else {
            match &error {
                E::NotFound { .. } => (Kind::NotFound, false),
                E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => (Kind::Taken, true),
                E::PermissionDenied { .. } | E::Unauthenticated { .. } => (Kind::Denied, false),
                E::NotImplemented { .. } | E::NotSupported { .. } => (Kind::Unsupported, false),
                E::Generic { .. } if status == Some(501) => (Kind::Unsupported, false),
                E::Generic { .. } if http || status.is_some_and(is_transient_status) => (Kind::Unreachable, true),
                _ if find::<std::io::Error>(&error)
                    .is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied) =>
                {
                    (Kind::Denied, false)
                }
                _ => (Kind::Other, false),
            }
        };
        Failure { kind, transient, detail }
    }
}

fn sources<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    sources(error).find_map(|one| one.downcast_ref::<T>())
}

/// The texts of an error and its causes, each once, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut out = String::new();
    for one in sources(error) {
        let text = one.to_string();
        if !out.contains(&text) {
            if !out.is_empty() {
                out.push_str(": ");
            }
            out.push_str(&text);
        }
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// object_store keeps the type that holds the status to itself; its text is all there is.
fn status_in(detail: &str) -> Option<u16> {
    let (_, rest) = detail.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::client::HttpErrorKind;

    fn generic(text: &str) -> Failure {
        object_store::Error::Generic { store: "S3", source: text.to_owned().into() }.into()
    }

    #[test]
    fn each_cause_is_told_apart() {
        let busy = generic("Server returned non-2xx status code: 503 Service Unavailable: SlowDown");
        assert_eq!((busy.kind, busy.transient), (Kind::Unreachable, true));
        let odd = generic("Server returned non-2xx status code: 400 Bad Request: x");
        assert_eq!((odd.kind, odd.transient), (Kind::Other, false));
        let lacking = generic("Server returned non-2xx status code: 501 Not Implemented: A header");
        assert_eq!((lacking.kind, lacking.transient), (Kind::Unsupported, false));
        let missing: Failure = object_store::Error::NotFound {
            path: "x".into(),
            source: "Server returned non-2xx status code: 404 Not Found: <Code>NoSuchBucket</Code>".into(),
        }
        .into();
        assert_eq!(missing.kind, Kind::NoBucket);
        let expired = generic("Server returned non-2xx status code: 400 Bad Request: <Code>ExpiredToken</Code>");
        assert_eq!(expired.kind, Kind::Denied);
        let cut: Failure = object_store::Error::Generic {
            store: "S3",
            source: Box::new(HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other("reset"))),
        }
        .into();
        assert_eq!((cut.kind, cut.transient), (Kind::Unreachable, true));
        assert!(cut.detail.contains("reset"), "the cause is named: {}", cut.detail);
    }
}
