//! Requests as the HTTP servers of tests read them, named by the operation of S3.
//!
//! **Invariant:** a request is read whole, with its body, before a server answers it.

use std::collections::HashMap;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    Put,
    Get,
    Head,
    List,
    Delete,
    Begin,
    Part,
    Complete,
    Abort,
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Bytes,
}

impl Request {
    pub(crate) fn key_id(&self) -> &str {
        let credential =
            self.headers.get("authorization").and_then(|text| text.split_once("Credential="));
        credential.and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default()
    }
}

/// Reads the next request; `None` when the client has disconnected.
pub(crate) async fn read(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let (method, target) =
        (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Some(Request { ask: ask(&method, &target), method, target, headers, body: body.into() }))
}

fn ask(method: &str, target: &str) -> Ask {
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    match method {
        "PUT" if has("partNumber") => Ask::Part,
        "PUT" => Ask::Put,
        "POST" if has("uploads") => Ask::Begin,
        "POST" if has("uploadId") => Ask::Complete,
        "POST" | "DELETE" if !has("uploadId") => Ask::Delete,
        "DELETE" => Ask::Abort,
        "HEAD" => Ask::Head,
        _ if has("list-type") => Ask::List,
        _ => Ask::Get,
    }
}
