//! Answers on their way: as bytes, altered, or fetched from a real server.
//!
//! **Invariant:** a forwarded request reaches the real server as it was received, so that its
//! signature stays valid.

use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Ask, HttpReply, Request};

/// Returns head and body of an answer as they are sent.
pub(super) fn encode(request: &Request, answer: &HttpReply) -> (Vec<u8>, Bytes) {
    let mut head = format!("HTTP/1.1 {} Some Reason\r\n", answer.status);
    // The real answer to a HEAD has a length, and no body.
    if !answer.headers.iter().any(|(name, _)| *name == "Content-Length") {
        head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    }
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let body = if request.ask == Ask::Head { Bytes::new() } else { answer.body.clone() };
    (head.into_bytes(), body)
}

/// Returns the body with one bit flipped.
pub(super) fn flipped(body: &Bytes) -> Bytes {
    let mut body = body.to_vec();
    let middle = body.len() / 2;
    if let Some(byte) = body.get_mut(middle) {
        *byte ^= 1;
    }
    body.into()
}

/// Lets the real server answer. HTTP/1.0, so that the answer ends with the connection, and is not
/// sent in chunks.
pub(super) async fn forward(server: SocketAddr, request: &Request) -> std::io::Result<HttpReply> {
    let mut stream = TcpStream::connect(server).await?;
    let mut head = format!("{} {} HTTP/1.0\r\n", request.method, request.target);
    for (name, value) in request.headers.iter().filter(|(name, _)| *name != "connection") {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).await?;
    stream.write_all(&request.body).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let mut lines = head.lines();
    let status =
        lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or_default();
    const KEPT: [&str; 6] =
        ["Content-Length", "Content-Range", "Content-Type", "Date", "ETag", "Last-Modified"];
    let headers = lines.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((*KEPT.iter().find(|kept| kept.eq_ignore_ascii_case(name))?, value.trim().to_owned()))
    });
    Ok(HttpReply { status, headers: headers.collect(), body: answer.split_off(end + 4).into() })
}
