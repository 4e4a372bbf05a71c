//! A link to one server that can be cut and throttled, and counts the bytes sent over it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Bytes that pass at once: a hundredth of a second of the slowest link in use.
const PIECE_BYTES: usize = 16 << 10;

#[derive(Debug)]
struct Shared {
    cut: watch::Sender<bool>,
    /// Bytes a second towards the server, of all connections together; 0: unlimited.
    rate: AtomicU64,
    /// Time at which the link is free again.
    free: Mutex<Instant>,
    sent: AtomicU64,
    refused: AtomicU64,
}

/// A link in front of one server.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Link {
    /// Listens on loopback, and passes every connection on to `server` (host:port).
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(server: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            cut: watch::Sender::new(false),
            rate: AtomicU64::new(0),
            free: Mutex::new(Instant::now()),
            sent: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let (server, of_task) = (server.to_owned(), shared.clone());
        let task = tokio::spawn(async move {
            // The connections end with the link.
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                if *of_task.cut.borrow() {
                    of_task.refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                connections.spawn(pass(client, server.clone(), of_task.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, shared, task })
    }

    /// Returns the address to connect to instead of the server's.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections and refuses new ones, until [`Link::mend`].
    pub fn cut(&self) {
        self.shared.cut.send_replace(true);
    }

    /// Passes connections again, with this many bytes a second towards the server (0: unlimited),
    /// and resets the count of bytes.
    pub fn mend(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
        self.shared.sent.store(0, Ordering::Relaxed);
        self.shared.cut.send_replace(false);
    }

    /// Returns the bytes sent to the server since the link was mended.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Returns the number of refused connections.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, server: String, shared: Arc<Shared>) {
    let Ok(upstream) = TcpStream::connect(server).await else { return };
    let mut cut = shared.cut.subscribe();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = upstream.into_split();
    tokio::select! {
        () = forth(from_client, to_server, &shared) => {}
        () = back(from_server, to_client) => {}
        _ = cut.wait_for(|cut| *cut) => {}
    }
}

async fn forth(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let rate = shared.rate.load(Ordering::Relaxed);
        if rate > 0 {
            let turn = {
                let mut free = shared.free.lock();
                let turn = (*free).max(Instant::now());
                *free = turn + Duration::from_secs_f64(count as f64 / rate as f64);
                turn
            };
            tokio::time::sleep_until(turn).await;
        }
        shared.sent.fetch_add(count as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn back(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
