//! An S3 server on loopback that injects faults into its answers, or ignores the conditions of
//! PUTs.
//!
//! **Invariant:** a fault before the operation leaves the objects alone, a fault after it
//! does not undo it. The server records the request and the answer of every call for the test.
//!
//! Correct answers come from memory ([`objects`]; [`Keys`] decides which keys are accepted), or
//! from a real S3 server that this one stands before.

mod objects;
mod wire;

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use vasto_shipping::{Bucket, BucketOptions};

pub use crate::http_request::Ask;
use crate::http_request::{Request, read};
use crate::metadata::Keys;
use objects::Objects;
use wire::{encode, flipped, forward};

const BUCKET: &str = "faults";
/// The client's configured keys when no role provides them.
const KEY: &str = "AKIAFIXED";
const SECRET: &str = "fixed-secret";
pub const SESSION_TOKEN: &str = "session-token-canary";

/// The fault injected into an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// 503; no effect.
    SlowDown,
    /// 500; no effect.
    InternalError,
    /// 200 with an error in its body, as S3 does for long requests and batches; no effect.
    ErrorInBody,
    /// 400; no effect.
    ExpiredToken,
    /// 403; no effect.
    AccessDenied,
    /// 403; no effect.
    TimeTooSkewed,
    /// The connection is reset; no effect.
    ResetBefore,
    /// The connection is reset after the operation.
    ResetAfter,
    /// No answer is sent after the operation.
    SilentAfter,
    /// Half of the answer is sent after the operation.
    EndsEarly,
    /// One bit of the answer's body is flipped.
    Flip,
    /// Half of the answer's body is sent as if it were the whole.
    Shorten,
    /// One bit of the request's body is flipped before the operation.
    FlipSent,
}

#[derive(Debug, Clone)]
pub struct HttpReply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
}

/// A recorded request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub ask: Ask,
    pub target: String,
    pub key_id: String,
    /// The status that was sent, or would have been.
    pub status: u16,
    pub fault: Option<Fault>,
    /// The body arrived with other bytes than were sent: the answer's, or for [`Fault::FlipSent`]
    /// the request's.
    pub altered: bool,
}

/// Requests of a kind that are to fail.
struct Script {
    ask: Ask,
    /// Requests that succeed before.
    skip: u32,
    fault: Fault,
    /// Requests that are still to fail.
    times: u32,
}

#[derive(Default)]
struct Shared {
    keys: Option<Arc<Keys>>,
    /// The address of the real server; without one, `objects` answers.
    server: Option<SocketAddr>,
    objects: Mutex<Objects>,
    faults: Mutex<Vec<Script>>,
    everything: Mutex<Option<Fault>>,
    throttled: Mutex<Option<HashMap<(Ask, String), u32>>>,
    /// The fault of every request that follows a PUT of a body that contains the text.
    awaited: Mutex<Option<(String, Fault)>>,
    /// The fault of every PUT of a body that contains the text.
    unwanted: Mutex<Option<(String, Fault)>>,
    /// Such a PUT has failed.
    met: AtomicBool,
    /// Time by which every answer is sent later.
    late: Mutex<Duration>,
    served: Mutex<Vec<Served>>,
}

pub struct HttpStore {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl fmt::Debug for HttpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpStore").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for HttpStore {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl HttpStore {
    /// Starts a store that accepts one fixed key.
    pub async fn start() -> HttpStore {
        Self::serve(Shared::default()).await
    }

    /// Starts such a store on an address of this machine, for processes in other networks.
    pub async fn start_on(ip: &str) -> HttpStore {
        Self::serve_on(ip, Shared::default()).await
    }

    /// Starts a store that accepts the keys of a role until they expire.
    pub async fn with_keys(keys: &Arc<Keys>) -> HttpStore {
        Self::serve(Shared { keys: Some(Arc::clone(keys)), ..Shared::default() }).await
    }

    /// Starts a store that stands before the real server of these options, and opens a bucket
    /// through it.
    pub async fn before(options: &BucketOptions, url: &str) -> (HttpStore, Bucket) {
        let server =
            options.endpoint.as_ref().and_then(|url| url.strip_prefix("http://")?.parse().ok());
        assert!(server.is_some(), "{options:?}");
        let store = Self::serve(Shared { server, ..Shared::default() }).await;
        let options = BucketOptions { endpoint: Some(store.endpoint()), ..options.clone() };
        let bucket = Bucket::open_in(url, &options, []).unwrap();
        (store, bucket)
    }

    async fn serve(shared: Shared) -> HttpStore {
        Self::serve_on("127.0.0.1", shared).await
    }

    async fn serve_on(ip: &str, shared: Shared) -> HttpStore {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(shared);
        let of_server = Arc::clone(&shared);
        let server = tokio::spawn(async move {
            // Dropping the set ends its connections.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, Arc::clone(&of_server)));
            }
        });
        HttpStore { address, shared, server }
    }

    /// Starts a store that accepts every PUT, whatever its condition: the kind that must not be
    /// used.
    pub async fn without_conditions() -> HttpStore {
        let store = Self::start().await;
        store.shared.objects.lock().unwrap().ignores_conditions = true;
        store
    }

    /// Returns the URL of the bucket that [`HttpStore::bucket`] opens.
    pub fn url(&self) -> String {
        format!("s3://{BUCKET}/root")
    }

    /// Returns the environment variables that select the server, with the fixed keys.
    pub fn env(&self) -> [(&'static str, String); 5] {
        crate::s3_server::env(&format!("http://{}", self.address), KEY, SECRET)
    }

    /// Opens the bucket with fixed keys.
    pub fn bucket(&self) -> Bucket {
        let options = BucketOptions {
            access_key_id: Some(KEY.into()),
            secret_access_key: Some(SECRET.into()),
            ..self.options()
        };
        let environment = [("AWS_SESSION_TOKEN".into(), SESSION_TOKEN.into())];
        Bucket::open_in(&self.url(), &options, environment).unwrap()
    }

    /// Opens the bucket with the keys of the role that this metadata service provides.
    pub fn bucket_of_role(&self, metadata_endpoint: &str) -> Bucket {
        let environment = [("AWS_METADATA_ENDPOINT".into(), metadata_endpoint.into())];
        Bucket::open_in(&self.url(), &self.options(), environment).unwrap()
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn options(&self) -> BucketOptions {
        BucketOptions {
            endpoint: Some(self.endpoint()),
            region: Some("us-east-1".into()),
            allow_http: true,
            ..BucketOptions::default()
        }
    }

    /// Injects the fault into the next `times` requests of the kind.
    pub fn fail(&self, ask: Ask, fault: Fault, times: u32) {
        self.fail_after(ask, 0, fault, times);
    }

    /// Injects the fault into the `times` requests of the kind that follow the next `skip`.
    pub fn fail_after(&self, ask: Ask, skip: u32, fault: Fault, times: u32) {
        self.shared.faults.lock().unwrap().push(Script { ask, skip, fault, times });
    }

    /// Checks that every planned fault was injected; a cell whose fault never happened has shown
    /// nothing.
    pub fn assert_all_fired(&self) {
        for script in self.shared.faults.lock().unwrap().drain(..) {
            let Script { ask, fault, times, .. } = script;
            assert_eq!(times, 0, "{ask:?} {fault:?} was not injected {times} times more");
        }
    }

    /// Injects the fault into every request; `None` ends it.
    pub fn fail_everything(&self, fault: Option<Fault>) {
        *self.shared.everything.lock().unwrap() = fault;
    }

    /// Injects the fault into every request that follows the next PUT of a body that contains the
    /// text.
    pub fn fail_everything_after(&self, text: &str, fault: Fault) {
        *self.shared.awaited.lock().unwrap() = Some((text.to_owned(), fault));
    }

    /// Injects the fault into every PUT of a body that contains the text.
    pub fn fail_puts_of(&self, text: &str, fault: Fault) {
        self.shared.met.store(false, Ordering::SeqCst);
        *self.shared.unwanted.lock().unwrap() = Some((text.to_owned(), fault));
    }

    /// Returns true once such a PUT has failed; what it did to the objects is done.
    pub fn has_failed_a_put(&self) -> bool {
        self.shared.met.load(Ordering::SeqCst)
    }

    /// Returns true while every request fails.
    pub fn fails_everything(&self) -> bool {
        self.shared.everything.lock().unwrap().is_some()
    }

    /// Sends every answer this much later from now on.
    pub fn answer_later(&self, by: Duration) {
        *self.shared.late.lock().unwrap() = by;
    }

    /// Ends all faults, and forgets those that are still to come.
    pub fn heal(&self) {
        self.shared.faults.lock().unwrap().clear();
        *self.shared.awaited.lock().unwrap() = None;
        *self.shared.unwanted.lock().unwrap() = None;
        *self.shared.throttled.lock().unwrap() = None;
        *self.shared.everything.lock().unwrap() = None;
        self.answer_later(Duration::ZERO);
    }

    /// Throttles half of all requests from now on. The choice depends on the requested target and
    /// the number of its requests so far, not on the order of arrival.
    pub fn throttle_half(&self) {
        *self.shared.throttled.lock().unwrap() = Some(HashMap::new());
    }

    /// Returns the requests since the last call.
    pub fn take_served(&self) -> Vec<Served> {
        std::mem::take(&mut self.shared.served.lock().unwrap())
    }

    /// Returns the object under the key.
    pub fn object(&self, key: &str) -> Option<Bytes> {
        self.shared.objects.lock().unwrap().object(&format!("root/{key}"))
    }

    /// Returns the keys that begin with the prefix, without it.
    pub fn keys_below(&self, prefix: &str) -> Vec<String> {
        self.shared.objects.lock().unwrap().keys_below(&format!("root/{prefix}"))
    }

    /// Inserts an object under a foreign name.
    pub fn put_foreign(&self, key: &str) {
        self.shared
            .objects
            .lock()
            .unwrap()
            .insert(&format!("root/{key}"), Bytes::from_static(b"not ours"));
    }

    /// Sets the number of objects in a page of a listing.
    pub fn list_in_pages_of(&self, objects: usize) {
        self.shared.objects.lock().unwrap().page = objects;
    }

    /// Returns the number of multipart uploads that were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        self.shared.objects.lock().unwrap().open_uploads()
    }
}

impl Shared {
    /// Returns the fault of a PUT of a body that is to fail.
    fn fault_of_body(&self, request: &Request) -> Option<Fault> {
        let unwanted = self.unwanted.lock().unwrap();
        let is_it = |text: &str| request.ask == Ask::Put && contains(&request.body, text);
        unwanted.as_ref().filter(|(text, _)| is_it(text)).map(|(_, fault)| *fault)
    }

    /// Returns the fault to inject into this request.
    fn fault(&self, request: &Request) -> Option<Fault> {
        if let Some(fault) = *self.everything.lock().unwrap() {
            return Some(fault);
        }
        let mut faults = self.faults.lock().unwrap();
        if let Some(script) =
            faults.iter_mut().find(|script| script.ask == request.ask && script.times > 0)
        {
            if script.skip == 0 {
                script.times -= 1;
                return Some(script.fault);
            }
            script.skip -= 1;
        }
        let mut throttled = self.throttled.lock().unwrap();
        let asked = throttled.as_mut()?.entry((request.ask, request.target.clone())).or_default();
        *asked += 1;
        let mut hasher = DefaultHasher::new();
        (request.ask, &request.target, *asked).hash(&mut hasher);
        hasher.finish().is_multiple_of(2).then_some(Fault::SlowDown)
    }

    /// Begins the outage that waits for this body.
    fn notice(&self, body: &[u8]) {
        let mut awaited = self.awaited.lock().unwrap();
        if let Some((_, fault)) = awaited.take_if(|(text, _)| contains(body, text)) {
            *self.everything.lock().unwrap() = Some(fault);
        }
    }

    /// Returns the answer, and the fault to inject into it.
    async fn answer(&self, request: &mut Request) -> std::io::Result<(HttpReply, Option<Fault>)> {
        let of_body = self.fault_of_body(request);
        let fault = of_body.or_else(|| self.fault(request));
        let sent = request.body.clone();
        if fault == Some(Fault::FlipSent) {
            request.body = flipped(&sent);
        }
        let refused = match fault {
            Some(Fault::SlowDown) => {
                Some(error(503, "SlowDown", "Please reduce your request rate.", ""))
            }
            Some(Fault::InternalError) => Some(error(
                500,
                "InternalError",
                "We encountered an internal error. Please try again.",
                "",
            )),
            Some(Fault::ErrorInBody) => Some(error(
                200,
                "InternalError",
                "We encountered an internal error. Please try again.",
                "",
            )),
            Some(Fault::ExpiredToken) => Some(expired(request)),
            Some(Fault::AccessDenied) => Some(error(403, "AccessDenied", "Access Denied", "")),
            Some(Fault::TimeTooSkewed) => {
                let mut refused = error(
                    403,
                    "RequestTimeTooSkewed",
                    "The difference between the request time and the current time is too large.",
                    "<MaxAllowedSkewMilliseconds>900000</MaxAllowedSkewMilliseconds>",
                );
                // The store's date lies far back: the client is ahead.
                refused.headers.push(("Date", "Thu, 01 Jan 2026 00:00:00 GMT".to_owned()));
                Some(refused)
            }
            Some(Fault::ResetBefore) => Some(error(0, "Unanswered", "", "")),
            _ => match &self.keys {
                Some(keys) if !keys.are_good(request.key_id()) => Some(expired(request)),
                None if self.server.is_none() && request.key_id() != KEY => {
                    Some(error(403, "InvalidAccessKeyId", "It does not exist.", ""))
                }
                _ => None,
            },
        };
        let mut answer = match (refused, self.server) {
            (Some(refused), _) => refused,
            (None, Some(server)) => forward(server, request).await?,
            (None, None) => self.objects.lock().unwrap().answer(request),
        };
        if request.ask == Ask::Put && answer.status == 200 {
            self.notice(&request.body);
        }
        if of_body.is_some() {
            self.met.store(true, Ordering::SeqCst);
        }
        let whole = answer.body.clone();
        match fault {
            Some(Fault::Flip) => answer.body = flipped(&whole),
            Some(Fault::Shorten) => {
                answer.body = whole.slice(..whole.len() / 2);
                answer.headers.retain(|(name, _)| *name != "Content-Length");
            }
            _ => {}
        }
        self.served.lock().unwrap().push(Served {
            ask: request.ask,
            target: request.target.clone(),
            key_id: request.key_id().to_owned(),
            status: answer.status,
            fault,
            altered: answer.body != whole || request.body != sent,
        });
        Ok((answer, fault))
    }
}

fn contains(body: &[u8], text: &str) -> bool {
    body.windows(text.len()).any(|part| part == text.as_bytes())
}

/// Returns an error in S3's format.
pub fn error(status: u16, code: &str, message: &str, more: &str) -> HttpReply {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}\
         <RequestId>1234567890ABCDEF</RequestId><HostId>aG9zdA==</HostId></Error>"
    );
    HttpReply {
        status,
        headers: vec![("Content-Type", "application/xml".to_owned())],
        body: body.into(),
    }
}

/// Returns the refusal of an expired token; S3 repeats the token in it.
fn expired(request: &Request) -> HttpReply {
    let token = request.headers.get("x-amz-security-token").map_or("", String::as_str);
    error(
        400,
        "ExpiredToken",
        "The provided token has expired.",
        &format!("<Token-0>{token}</Token-0>"),
    )
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(mut request) = read(&mut stream).await? {
        let (answer, fault) = shared.answer(&mut request).await?;
        let late = *shared.late.lock().unwrap();
        if !late.is_zero() {
            tokio::time::sleep(late).await;
        }
        match fault {
            Some(Fault::ResetBefore | Fault::ResetAfter) => {
                return stream.get_ref().set_zero_linger();
            }
            Some(Fault::SilentAfter) => std::future::pending().await,
            _ => {}
        }
        let (head, body) = encode(&request, &answer);
        if fault == Some(Fault::EndsEarly) {
            let cut = if body.is_empty() { &head[..head.len() / 2] } else { &head[..] };
            stream.write_all(cut).await?;
            stream.write_all(&body[..body.len() / 2]).await?;
            return stream.shutdown().await;
        }
        stream.write_all(&head).await?;
        stream.write_all(&body).await?;
        stream.flush().await?;
    }
    Ok(())
}
