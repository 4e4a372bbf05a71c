//! The URL of a master.

use tonic::transport::Uri;

use crate::error::{Error, ErrorKind};

/// Checks and normalizes the URL of a master.
///
/// # Errors
/// `InvalidArgument` with the defect.
pub(crate) fn check_url(url: &str) -> Result<String, Error> {
    let uri: Uri = url.trim().parse().map_err(|error| bad_url(url, &format!("{error}")))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(bad_url(url, "TLS is not available in this version")),
        Some(_) => return Err(bad_url(url, "the scheme must be http")),
        None => return Err(bad_url(url, "the scheme http:// is missing")),
    }
    let authority = uri.authority().ok_or_else(|| bad_url(url, "the host is missing"))?;
    if authority.host().is_empty() || authority.as_str().contains('@') {
        return Err(bad_url(url, "it must hold a host and a port and nothing else"));
    }
    if authority.port_u16().is_none_or(|port| port == 0) {
        return Err(bad_url(url, "the port is missing"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(bad_url(url, "it must end after the port"));
    }
    Ok(format!("http://{authority}"))
}

pub(super) fn bad_url(url: &str, why: &str) -> Error {
    let message =
        format!("`{url}` is not the URL of a master: {why}; it looks like http://127.0.0.1:8278");
    Error::new(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(check_url("http://127.0.0.1:8278/").unwrap(), "http://127.0.0.1:8278");
        assert_eq!(check_url("http://[::1]:8278").unwrap(), "http://[::1]:8278");
        for bad in [
            "",
            "127.0.0.1:8278",
            "localhost",
            "https://a:1",
            "ftp://a:1",
            "http://a",
            "http://a:0",
            "http://:1",
            "http://a:99999",
            "http://a:1/path",
            "http://a:1?x",
            "http://u:p@a:1",
            "http://",
            "http:// a:1",
        ] {
            let error = check_url(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad}");
            assert!(error.message().contains("http://127.0.0.1:8278"), "{error}");
        }
    }
}
