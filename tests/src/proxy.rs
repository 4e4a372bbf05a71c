//! A connection that can be made deaf: bytes pass between a client and a server until
//! [`Proxy::make_deaf`], and then neither side receives anything from the other, not even its
//! close.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A proxy in front of one server.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    deaf: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens, and passes every connection on to `server` (host:port).
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(server: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (deaf, hears) = watch::channel(false);
        let server = server.to_owned();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(upstream) = TcpStream::connect(&server).await else { continue };
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = upstream.into_split();
                tokio::spawn(pass(from_client, to_server, hears.clone()));
                tokio::spawn(pass(from_server, to_client, hears.clone()));
            }
        });
        Ok(Self { address, deaf, task })
    }

    /// Returns the address to connect to instead of the server's.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Passes and closes nothing from now on.
    pub fn make_deaf(&self) {
        self.deaf.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut deaf: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = tokio::select! {
            biased;
            _ = deaf.wait_for(|deaf| *deaf) => break,
            read = from.read(&mut buffer) => read,
        };
        match read {
            Ok(count) if count > 0 => {
                if to.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
    // Both ends stay open until the proxy is dropped.
    while deaf.changed().await.is_ok() {}
}
