//! An object store that accepts every PUT, whatever its conditions: the kind that must not be used. It implements
//! just enough of HTTP and S3 to be accepted as a store.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

type Objects = Arc<Mutex<(BTreeMap<String, Vec<u8>>, usize)>>;

pub struct UnconditionalStore {
    address: SocketAddr,
    objects: Objects,
    server: JoinHandle<()>,
}

impl UnconditionalStore {
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let objects = Objects::default();
        let shared = Arc::clone(&objects);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Ok(Self { address, objects, server })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn puts(&self) -> usize {
        self.objects.lock().1
    }

    pub fn keys(&self) -> Vec<String> {
        self.objects.lock().0.keys().cloned().collect()
    }
}

impl Drop for UnconditionalStore {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Serves one connection until it ends.
async fn serve(stream: TcpStream, objects: Objects) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let method = words.next().context("no method")?.to_owned();
        let key = words.next().context("no path")?.split('?').next().unwrap_or_default().to_owned();
        let mut length = 0;
        loop {
            let mut header = String::new();
            stream.read_line(&mut header).await?;
            match header.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse()?,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let (status, answer) = answer(&method, &key, body, &objects);
        let length = answer.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: \"1\"\r\n\
             Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        if method != "HEAD" {
            stream.write_all(&answer).await?;
        }
    }
}

fn answer(method: &str, key: &str, body: Vec<u8>, objects: &Objects) -> (&'static str, Vec<u8>) {
    let mut objects = objects.lock();
    match method {
        "PUT" => {
            objects.0.insert(key.to_owned(), body);
            objects.1 += 1;
            ("200 OK", Vec::new())
        }
        "DELETE" => {
            objects.0.remove(key);
            ("204 No Content", Vec::new())
        }
        _ => match objects.0.get(key) {
            Some(object) => ("200 OK", object.clone()),
            None => ("404 Not Found", Vec::new()),
        },
    }
}
