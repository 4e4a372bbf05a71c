//! A relay between one process and the bucket, which kills the process at a chosen request.
//!
//! Requests are read whole and forwarded unchanged, including the `Host` header: signatures stay
//! valid.
//!
//! **Invariant:** a process that was killed *before* a request is dead without the server having
//! received that request; a process that was killed *after* it is dead once the server has
//! answered, and has not read a byte of the answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Maximum bytes of the head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Whether the kill is before or after the server's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KillTime {
    /// The request never reaches the server.
    Before,
    /// The answer never reaches the process.
    After,
}

/// The process to kill, and the request at which to kill it.
#[derive(Debug, Clone, Copy)]
pub struct KillPoint {
    /// The process behind this relay; its owner must not have waited for it yet.
    pub pid: u32,
    /// Number of the request from now on, the first being 1.
    pub call: u64,
    /// Text that the first line of a counted request contains; when empty, all requests count.
    pub of: &'static str,
    /// Before or after the request.
    pub moment: KillTime,
}

#[derive(Debug)]
struct Armed {
    strike: KillPoint,
    /// Distinguishes this kill point from earlier ones.
    number: u64,
    left: u64,
}

#[derive(Debug)]
struct Shared {
    armed: Mutex<Option<Armed>>,
    numbers: AtomicU64,
    /// Requests that counted since the relay was armed.
    counted: AtomicU64,
    /// The first line of the request at which the process was killed.
    killed: watch::Sender<Option<String>>,
}

/// A relay in front of one server, for one process.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Listens on loopback, for requests to `server` (host:port).
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(server: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            armed: Mutex::default(),
            numbers: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            killed: watch::Sender::new(None),
        });
        let (server, of_task) = (server.to_owned(), Arc::clone(&shared));
        let task = tokio::spawn(async move {
            // Dropping the set ends the connections.
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let (server, shared) = (server.clone(), Arc::clone(&of_task));
                // The client handles a broken connection.
                connections
                    .spawn(async move { connection(client, &server, &shared).await.is_ok() });
            }
        });
        Ok(Self { address, shared, task })
    }

    /// Returns the endpoint to use instead of the server's.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Arms the relay to kill the process at a future request.
    pub fn kill_at(&self, strike: KillPoint) {
        let number = self.shared.numbers.fetch_add(1, Ordering::Relaxed) + 1;
        let mut armed = self.shared.armed.lock();
        self.shared.counted.store(0, Ordering::Relaxed);
        self.shared.killed.send_replace(None);
        *armed = Some(Armed { strike, number, left: strike.call.max(1) });
    }

    /// Waits for the kill; returns the first line of the request.
    pub async fn killed(&self) -> String {
        let mut killed = self.shared.killed.subscribe();
        match killed.wait_for(Option::is_some).await {
            Ok(line) => line.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Disarms the relay. Returns the first line of the request at which the process was killed
    /// since the relay was armed, or the number of requests.
    ///
    /// # Errors
    /// The number of requests that counted, when there was no kill.
    pub fn disarm(&self) -> Result<String, u64> {
        let mut armed = self.shared.armed.lock();
        *armed = None;
        self.shared
            .killed
            .borrow()
            .clone()
            .ok_or_else(|| self.shared.counted.load(Ordering::Relaxed))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    /// Counts a request. At the chosen request, kills before it, or returns the number for the kill
    /// after it.
    fn count(&self, line: &str) -> Fate {
        let mut slot = self.armed.lock();
        let Some(armed) =
            slot.as_mut().filter(|armed| armed.left > 0 && line.contains(armed.strike.of))
        else {
            return Fate::Pass;
        };
        self.counted.fetch_add(1, Ordering::Relaxed);
        armed.left -= 1;
        match (armed.left, armed.strike.moment) {
            (0, KillTime::Before) => {
                self.kill(&mut slot, line);
                Fate::End
            }
            (0, KillTime::After) => Fate::EndAfter(armed.number),
            _ => Fate::Pass,
        }
    }

    /// Handles an answer of the server; returns true when the process is dead.
    fn answered(&self, number: u64, line: &str) -> bool {
        let mut slot = self.armed.lock();
        let is_it = slot.as_ref().is_some_and(|armed| armed.number == number);
        if is_it {
            self.kill(&mut slot, line);
        }
        is_it
    }

    fn kill(&self, slot: &mut Option<Armed>, line: &str) {
        let Some(armed) = slot.take() else { return };
        if let Some(pid) = i32::try_from(armed.strike.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.killed.send_replace(Some(line.to_owned()));
    }
}

enum Fate {
    Pass,
    End,
    EndAfter(u64),
}

async fn connection(client: TcpStream, server: &str, shared: &Shared) -> Result<()> {
    let upstream = TcpStream::connect(server).await?;
    for stream in [&client, &upstream] {
        stream.set_nodelay(true)?;
    }
    let (from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = upstream.into_split();
    // The kill that the next byte from the server triggers, and its request line.
    let last: Mutex<Option<(u64, String)>> = Mutex::default();
    let requests = async {
        let mut from_client = BufReader::new(from_client);
        while let Some((line, bytes)) = read(&mut from_client).await? {
            match shared.count(&line) {
                Fate::Pass => {}
                Fate::End => return Ok(()),
                Fate::EndAfter(number) => *last.lock() = Some((number, line)),
            }
            to_server.write_all(&bytes).await?;
        }
        anyhow::Ok(())
    };
    let answers = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = from_server.read(&mut buffer).await?;
            if count == 0 {
                return anyhow::Ok(());
            }
            if let Some((number, line)) = last.lock().take()
                && shared.answered(number, &line)
            {
                return Ok(());
            }
            to_client.write_all(&buffer[..count]).await?;
        }
    };
    // When one side ends, both streams are dropped, so that the other side notices.
    tokio::select! {
        ended = requests => ended,
        ended = answers => ended,
    }
}

/// Reads the first line and all bytes of the next request; `None` when the client is gone.
async fn read(stream: &mut BufReader<OwnedReadHalf>) -> Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut length = 0;
    let mut first = String::new();
    loop {
        let start = bytes.len();
        if stream.read_until(b'\n', &mut bytes).await? == 0 {
            return Ok(None);
        }
        ensure!(bytes.len() <= HEAD_BYTES_MAX, "the head of a request is too long");
        let line = std::str::from_utf8(&bytes[start..])?.trim_end();
        if start == 0 {
            line.clone_into(&mut first);
        } else if line.is_empty() {
            break;
        } else if let Some((name, value)) = line.split_once(':') {
            ensure!(!name.eq_ignore_ascii_case("transfer-encoding"), "a body without a length");
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
        }
    }
    let head = bytes.len();
    bytes.resize(head + length, 0);
    stream.read_exact(&mut bytes[head..]).await?;
    Ok(Some((first, bytes)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Starts a server that answers every request, and records it.
    async fn server() -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let of_task = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (from, mut to) = stream.into_split();
                let mut from = BufReader::new(from);
                while let Ok(Some((line, bytes))) = read(&mut from).await {
                    assert!(
                        bytes.ends_with(b"\r\n\r\nbody") || line.starts_with("GET"),
                        "{bytes:?}"
                    );
                    of_task.lock().push(line);
                    to.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                }
            }
        });
        (address, seen)
    }

    async fn ask(stream: &mut TcpStream, request: &str) -> String {
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 1000];
        let count = stream.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..count]).into_owned()
    }

    #[tokio::test]
    async fn it_kills_on_the_right_side_of_the_right_request() {
        const PUT: &str = "PUT /b/k HTTP/1.1\r\nHost: h\r\ncontent-length: 4\r\n\r\nbody";
        const GET: &str = "GET /b/k HTTP/1.1\r\nHost: h\r\n\r\n";
        for moment in [KillTime::Before, KillTime::After] {
            let (address, seen) = server().await;
            let relay = Relay::start(&address).await.unwrap();
            let mut victim = tokio::process::Command::new("sleep")
                .arg("600")
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let mut stream = TcpStream::connect(relay.address).await.unwrap();
            assert!(ask(&mut stream, PUT).await.starts_with("HTTP/1.1 200"));
            relay.kill_at(KillPoint { pid: victim.id().unwrap(), call: 2, of: "PUT", moment });
            assert!(ask(&mut stream, GET).await.starts_with("HTTP/1.1 200"));
            assert!(ask(&mut stream, PUT).await.starts_with("HTTP/1.1 200"));
            assert!(victim.try_wait().unwrap().is_none());
            assert_eq!(ask(&mut stream, PUT).await, "", "the victim reads no answer");
            assert_eq!(relay.killed().await, "PUT /b/k HTTP/1.1");
            assert!(!victim.wait().await.unwrap().success());
            assert_eq!(seen.lock().len(), if moment == KillTime::Before { 3 } else { 4 });
            assert_eq!(relay.disarm().unwrap(), "PUT /b/k HTTP/1.1");
        }
    }

    #[tokio::test]
    async fn it_kills_nobody_once_it_is_disarmed() {
        let (address, _) = server().await;
        let relay = Relay::start(&address).await.unwrap();
        let mut victim =
            tokio::process::Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap();
        relay.kill_at(KillPoint {
            pid: victim.id().unwrap(),
            call: 2,
            of: "",
            moment: KillTime::Before,
        });
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        let get = "GET /b/k HTTP/1.1\r\n\r\n";
        assert!(ask(&mut stream, get).await.starts_with("HTTP/1.1 200"));
        assert_eq!(relay.disarm(), Err(1));
        assert!(ask(&mut stream, get).await.starts_with("HTTP/1.1 200"));
        assert!(victim.try_wait().unwrap().is_none());
    }
}
