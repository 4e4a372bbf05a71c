//! Classification of failed requests: object_store's errors, sorted by the reaction that each
//! needs.
//!
//! **Invariant:** "not found" is only ever about the object. A missing bucket, refused credentials
//! and an unreachable server are distinguished here, once, because each asks something else of a
//! person. No error text keeps a secret: S3 repeats a refused session token in its answer.

use std::error::Error;

use object_store::client::HttpError;

use super::error::BucketError;

/// The class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The object does not exist.
    NotFound,
    /// The bucket or container does not exist.
    NoBucket,
    /// The name is taken, or the store reports so while two creates race (409).
    Taken,
    /// The store refuses the operation, or does not accept the signature.
    Denied,
    /// The store refuses the time that the request was signed with.
    Skewed,
    /// The credentials have just expired; every attempt asks for new ones.
    Expired,
    /// No credentials were found.
    NoCredentials,
    /// The store does not implement the request.
    Unsupported,
    /// No answer.
    Unreachable,
    /// An answer that asks for a retry.
    Busy,
    /// Any other failure.
    Other,
}

/// A failed attempt.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// A further attempt may succeed.
    pub(super) transient: bool,
    pub(super) detail: String,
}

/// Codes of S3, STS and batch deletes for expired credentials.
const EXPIRED: [&str; 3] = ["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"];
/// Codes for a request time that is off by more than 15 minutes.
const SKEWED: [&str; 1] = ["RequestTimeTooSkewed"];
/// Clock difference from which a refusal is attributed to the clock; S3 accepts a smaller one.
const SKEW_MIN_S: u64 = 14 * 60;
/// Codes that ask for a retry, also under a status that does not say so: `RequestTimeout` and
/// `Throttling` come with 400, errors of a batch or of a long request with 200.
const AGAIN: [&str; 5] =
    ["SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling"];

/// Returns true for a status that asks for a retry. 501 does not: the store lacks the operation.
pub(super) fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 429) || (status >= 500 && status != 501)
}

impl Failure {
    pub(super) fn timed_out(after: std::time::Duration) -> Self {
        Self {
            kind: Kind::Unreachable,
            transient: true,
            detail: format!("no answer within {} s", after.as_secs_f32()),
        }
    }

    /// The store reports that the name is taken, but no object is there: two creates raced.
    pub(super) fn contended() -> Self {
        Self {
            kind: Kind::Other,
            transient: true,
            detail: "the store reports a conflict on a name that holds no object".to_owned(),
        }
    }

    /// No two reads of an object returned the same bytes.
    pub(super) fn disagreeing_reads() -> Self {
        Self {
            kind: Kind::Other,
            transient: true,
            detail: "each read of the object returned other bytes".to_owned(),
        }
    }

    pub(super) fn short_body(expected: u64, found: u64) -> Self {
        Self {
            kind: Kind::Unreachable,
            transient: true,
            detail: format!("the body ended after {found} of {expected} bytes"),
        }
    }

    /// A local directory failed.
    pub(super) fn of_disk(error: &std::io::Error) -> Self {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        let kind = if denied { Kind::Denied } else { Kind::Other };
        Self { kind, transient: false, detail: error.to_string() }
    }

    /// A name that Vasto built is no valid object name.
    pub(super) fn of_name(error: &BucketError) -> Self {
        Self { kind: Kind::Other, transient: false, detail: error.to_string() }
    }

    /// Adds which clock is off, given how far the store's is ahead. A refused HEAD has no body that
    /// would distinguish a wrong clock from wrong credentials.
    pub(super) fn with_clock(mut self, ahead_s: i64) -> Self {
        if self.kind == Kind::Denied && ahead_s.unsigned_abs() >= SKEW_MIN_S {
            (self.kind, self.transient) = (Kind::Skewed, true);
        }
        if self.kind == Kind::Skewed && ahead_s != 0 {
            let way = if ahead_s > 0 { "behind" } else { "ahead of" };
            self.detail =
                format!("it is {} s {way} the store's: {}", ahead_s.unsigned_abs(), self.detail);
        }
        self
    }

    pub(super) fn into_error(self, url: &str, key: &str) -> BucketError {
        let (url, key, detail) = (url.to_owned(), key.to_owned(), self.detail);
        match self.kind {
            Kind::NoBucket => BucketError::UnknownBucket { url },
            Kind::Skewed => BucketError::ClockSkewed { url, detail },
            Kind::Denied => BucketError::AccessDenied { url, detail },
            Kind::Expired => BucketError::ExpiredCredentials { url, detail },
            Kind::NoCredentials => BucketError::NoCredentials { url, detail },
            Kind::Unreachable | Kind::Busy => BucketError::Unreachable { url, detail },
            Kind::Unsupported => BucketError::Unsupported { url, detail },
            Kind::NotFound | Kind::Taken | Kind::Other => BucketError::Store { key, detail },
        }
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error as E;
        let detail = without_token(chain(&error));
        let status = status_in(&detail);
        let has = |words: &[&str]| words.iter().any(|word| detail.contains(word));
        let code = |codes: &[&str]| codes.iter().any(|code| names(&detail, code));
        let http = find::<HttpError>(&error).is_some();
        let (kind, transient) = if has(&[
            "/latest/api/token",
            "/latest/meta-data",
            "169.254.170.",
            "computeMetadata",
        ]) {
            (Kind::NoCredentials, http || status.is_none_or(is_transient_status))
        } else if has(&["NoSuchBucket", "The specified bucket does not exist", "ContainerNotFound"])
        {
            (Kind::NoBucket, false)
        } else if code(&EXPIRED) || (status == Some(400) && has(&["performing HEAD "])) {
            // The answer to a HEAD has no body with the code. Other causes of a 400 on every
            // request were reported when the bucket was probed, with a PUT and a GET.
            (Kind::Expired, true)
        } else if code(&SKEWED) {
            (Kind::Skewed, true)
        } else if has(&["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"])
            || code(&["AccessDenied"])
        {
            (Kind::Denied, false)
        } else if code(&AGAIN) {
            (Kind::Busy, true)
        } else {
            match &error {
                E::NotFound { .. } => (Kind::NotFound, false),
                E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => {
                    (Kind::Taken, true)
                }
                E::PermissionDenied { .. } | E::Unauthenticated { .. } => (Kind::Denied, false),
                E::NotImplemented { .. } | E::NotSupported { .. } => (Kind::Unsupported, false),
                E::Generic { .. } if status == Some(501) => (Kind::Unsupported, false),
                // A refused LIST.
                E::Generic { .. } if matches!(status, Some(401 | 403)) => (Kind::Denied, false),
                E::Generic { .. } if status.is_some_and(is_transient_status) => (Kind::Busy, true),
                E::Generic { .. } if http => (Kind::Unreachable, true),
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

fn sources<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    sources(error).find_map(|cause| cause.downcast_ref::<T>())
}

/// Joins the texts of an error and its causes, each once, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut out = String::new();
    for cause in sources(error) {
        let text = cause.to_string();
        if !out.contains(&text) {
            if !out.is_empty() {
                out.push_str(": ");
            }
            out.push_str(&text);
        }
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns true when the store gives this code, in a whole answer or for one object of a batch.
fn names(detail: &str, code: &str) -> bool {
    detail.contains(&format!("<Code>{code}</Code>")) || detail.contains(&format!("(code: {code})"))
}

/// Removes the session token that S3 repeats when it refuses one.
fn without_token(detail: String) -> String {
    const TAGS: (&str, &str) = ("<Token-0>", "</Token-0>");
    match detail.split_once(TAGS.0) {
        Some((before, rest)) => {
            let after = rest.split_once(TAGS.1).map_or("", |(_, after)| after);
            format!("{before}{}…{}{after}", TAGS.0, TAGS.1)
        }
        None => detail,
    }
}

/// Parses the status from the text: object_store keeps the type that holds it private.
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
        let busy =
            generic("Server returned non-2xx status code: 503 Service Unavailable: SlowDown");
        assert_eq!((busy.kind, busy.transient), (Kind::Busy, true));
        let odd = generic("Server returned non-2xx status code: 400 Bad Request: x");
        assert_eq!((odd.kind, odd.transient), (Kind::Other, false));
        let lacking = generic("Server returned non-2xx status code: 501 Not Implemented: A header");
        assert_eq!((lacking.kind, lacking.transient), (Kind::Unsupported, false));
        let missing: Failure = object_store::Error::NotFound {
            path: "x".into(),
            source: "Server returned non-2xx status code: 404 Not Found: <Code>NoSuchBucket</Code>"
                .into(),
        }
        .into();
        assert_eq!(missing.kind, Kind::NoBucket);
        let expired = generic(
            "Error performing PUT http://x/b/k in 1ms - Server returned non-2xx status code: 400 Bad Request: \
             <Error><Code>ExpiredToken</Code><Token-0>canary</Token-0><RequestId>1</RequestId></Error>",
        );
        assert_eq!((expired.kind, expired.transient), (Kind::Expired, true));
        assert!(
            !expired.detail.contains("canary") && expired.detail.contains("<RequestId>1"),
            "{}",
            expired.detail
        );
        // A code in an object name does not count.
        let named = generic(
            "Error performing PUT http://x/b/ExpiredToken - status code: 400 Bad Request: x",
        );
        assert_eq!((named.kind, named.transient), (Kind::Other, false));
        let bodiless =
            generic("Error performing HEAD http://x/b/k in 1ms - status code: 400 Bad Request: ");
        assert_eq!((bodiless.kind, bodiless.transient), (Kind::Expired, true));
        let unread = generic("status code: 400 Bad Request: <Code>RequestTimeout</Code>");
        assert_eq!((unread.kind, unread.transient), (Kind::Busy, true));
        let in_a_batch =
            generic("DeleteObjects request failed for key k: slow down (code: SlowDown)");
        assert_eq!((in_a_batch.kind, in_a_batch.transient), (Kind::Busy, true));
        let refused =
            generic("DeleteObjects request failed for key k: Access Denied (code: AccessDenied)");
        assert_eq!((refused.kind, refused.transient), (Kind::Denied, false));
        let listing = generic(
            "Error performing list request: status code: 403 Forbidden: <Code>AllAccessDisabled</Code>",
        );
        assert_eq!((listing.kind, listing.transient), (Kind::Denied, false));
        let cut: Failure = object_store::Error::Generic {
            store: "S3",
            source: Box::new(HttpError::new(
                HttpErrorKind::Interrupted,
                std::io::Error::other("reset"),
            )),
        }
        .into();
        assert_eq!((cut.kind, cut.transient), (Kind::Unreachable, true));
        assert!(cut.detail.contains("reset"), "the cause is named: {}", cut.detail);
    }
}
