//! A role with short-lived keys, and the instance-metadata service that provides them.
//!
//! **Invariant:** the service returns an expired key once more before it has a new one, like a
//! service with a stale cache. So every change of keys causes a refusal at the store.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::http_request::read;

#[derive(Debug)]
pub struct Keys {
    life: Duration,
    /// All keys so far; the last is current.
    keys: Mutex<Vec<Key>>,
}

#[derive(Debug)]
struct Key {
    /// Time at which the key was first returned.
    born: Instant,
    /// True when the key was returned again after it expired.
    late: bool,
}

impl Keys {
    pub fn living(life: Duration) -> Arc<Keys> {
        Arc::new(Keys { life, keys: Mutex::default() })
    }

    /// Returns the number of keys so far.
    pub fn count(&self) -> usize {
        self.keys.lock().unwrap().len()
    }

    /// Returns true when the store accepts a request that was signed with this key.
    pub fn are_good(&self, key_id: &str) -> bool {
        let keys = self.keys.lock().unwrap();
        let number = key_id.strip_prefix("ASIA").and_then(|number| number.parse::<usize>().ok());
        number.and_then(|number| keys.get(number)).is_some_and(|key| key.born.elapsed() < self.life)
    }

    /// Returns the number of the current key, and its remaining lifetime.
    fn hand_out(&self) -> (usize, Duration) {
        let mut keys = self.keys.lock().unwrap();
        let left =
            keys.last().map_or(Duration::ZERO, |key| self.life.saturating_sub(key.born.elapsed()));
        if left.is_zero() {
            match keys.last_mut() {
                Some(key) if !key.late => key.late = true,
                _ => {
                    keys.push(Key { born: Instant::now(), late: false });
                    return (keys.len() - 1, self.life);
                }
            }
        }
        (keys.len() - 1, left)
    }
}

pub struct Metadata {
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Metadata {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Metadata {
    pub async fn start(keys: &Arc<Keys>) -> Metadata {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let keys = Arc::clone(keys);
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, Arc::clone(&keys)));
            }
        });
        Metadata { address, server }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

async fn connection(stream: TcpStream, keys: Arc<Keys>) -> std::io::Result<()> {
    const ROLE: &str = "/latest/meta-data/iam/security-credentials/";
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await? {
        let has_token =
            request.headers.get("x-aws-ec2-metadata-token").is_some_and(|token| token == "session");
        let (status, body) = match (request.method.as_str(), request.target.strip_prefix(ROLE)) {
            ("PUT", None) if request.target == "/latest/api/token" => (200, "session".to_owned()),
            ("GET", Some("")) if has_token => (200, "vasto".to_owned()),
            ("GET", Some("vasto")) if has_token => (200, credentials(&keys)),
            _ => (401, String::new()),
        };
        let answer = format!(
            "HTTP/1.1 {status} Some Reason\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

fn credentials(keys: &Keys) -> String {
    let (number, left) = keys.hand_out();
    #[allow(clippy::disallowed_methods, reason = "the service tells its clients an absolute time")]
    let expiration = jiff::Timestamp::now() + left;
    serde_json::json!({
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": format!("ASIA{number}"),
        "SecretAccessKey": format!("secret-{number}"),
        "Token": format!("token-{number}"),
        "Expiration": expiration.to_string(),
    })
    .to_string()
}
