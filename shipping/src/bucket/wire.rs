//! The HTTP layer between object_store and an S3 server, where object_store drops or rejects
//! answers.
//!
//! Reads the server's clock from the answers, and removes from listings the names that object_store
//! cannot parse, for which it would reject the whole page.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};

use crate::clock::now_us;

use super::page::without_strangers;
use super::strangers::Strangers;

/// Facts learned from the answers of the store.
#[derive(Debug, Default)]
pub(super) struct Learned {
    pub(super) strangers: Strangers,
    /// The store's clock minus this machine's, seconds; 0 before the first answer.
    ahead_s: AtomicI64,
}

impl Learned {
    /// Returns the seconds that the store's clock is ahead of this machine's.
    pub(super) fn ahead_s(&self) -> i64 {
        self.ahead_s.load(Ordering::Relaxed)
    }

    fn note_date(&self, date: &str) {
        if let Some(theirs) = http_date(date) {
            self.ahead_s.store(theirs - (now_us() / 1_000_000) as i64, Ordering::Relaxed);
        }
    }
}

/// Builds the HTTP clients of a store.
#[derive(Debug)]
pub(super) struct Connector(pub(crate) Arc<Learned>);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Wire { inner, learned: self.0.clone() }))
    }
}

#[derive(Debug)]
struct Wire {
    inner: HttpClient,
    learned: Arc<Learned>,
}

#[async_trait::async_trait]
impl HttpService for Wire {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let lists = request
            .uri()
            .query()
            .is_some_and(|query| query.split('&').any(|pair| pair == "list-type=2"));
        let response = self.inner.execute(request).await?;
        if let Some(date) = response.headers().get("date").and_then(|date| date.to_str().ok()) {
            self.learned.note_date(date);
        }
        if !lists || !response.status().is_success() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let bytes = body.bytes().await?;
        let undecodable = |error| HttpError::new(HttpErrorKind::Decode, error);
        let page = std::str::from_utf8(&bytes).map_err(undecodable)?;
        let kept = without_strangers(page, |name, why| self.learned.strangers.add(name, &why));
        let body = kept.map_or(bytes, Bytes::from);
        Ok(HttpResponse::from_parts(parts, body.into()))
    }
}

/// Parses an HTTP date, `Thu, 01 Jan 2026 00:00:00 GMT`, into seconds since 1970.
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: i64 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? as i64 + 1;
    let year: i64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if !(1970..10_000).contains(&year) {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, the year beginning with March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_answers_are_read() {
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199));
        for bad in [
            "",
            "Thu",
            "Thu, 01 Foo 1970 00:00:00 GMT",
            "Thu, 01 Jan 1970",
            "Thu, 01 Jan 99999999 00:00:00",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }
}
