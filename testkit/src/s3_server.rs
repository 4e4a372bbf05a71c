//! Real S3 servers on loopback, ended with the value that owns them, also by a panic.
//!
//! Two unrelated implementations: SeaweedFS, in Go, and moto, in Python, which answers with the
//! codes and texts of AWS. `make setup` installs both.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use object_store::ObjectStore;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vasto_shipping::BucketOptions;

use crate::process::{Process, free_port};
use crate::wait::DEADLINE;

/// The bucket of every server.
pub const BUCKET: &str = "vasto-test";
const KEY: &str = "vastotest";
const SECRET: &str = "vastotestsecret";
/// Time in which a server begins to accept requests.
const START_MAX: Duration = Duration::from_secs(40);

/// The implementation of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum S3Kind {
    SeaweedFs,
    /// Keeps its objects in memory.
    Moto,
}

/// A running server with one bucket.
#[derive(Debug)]
pub struct S3Server {
    process: Process,
    port: u16,
    kind: S3Kind,
    _dir: tempfile::TempDir,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.process.signal(Signal::KILL);
        // Its directory is removed next, and must stay removed.
        for _ in 0..5_000 {
            if !self.process.is_running() {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

impl S3Server {
    /// Starts the server and waits until it accepts a PUT. Retries, since another process may take
    /// a port first.
    ///
    /// # Errors
    /// When the server is not installed (the text says how to install it) or does not start.
    pub async fn start(kind: S3Kind) -> Result<Self> {
        let mut last = None;
        for _ in 0..3 {
            let mut server = Self::launch(kind)?;
            match server.serves().await {
                Ok(()) => return Ok(server),
                Err(error) => last = Some(error.context(server.process.log_tail(20))),
            }
        }
        Err(last.context("no attempt was made")?)
    }

    fn launch(kind: S3Kind) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vasto-s3-").tempdir()?;
        let port = free_port();
        let (name, variable, args) = match kind {
            S3Kind::SeaweedFs => ("weed", "VASTO_TEST_WEED", seaweedfs(dir.path(), port)),
            S3Kind::Moto => ("moto_server", "VASTO_TEST_MOTO", moto(port)),
        };
        let env = [
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("GOMEMLIMIT", "600MiB"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let process = Process::spawn(name, &program(name, variable)?, args, &env, dir.path())?;
        Ok(Self { process, port, kind, _dir: dir })
    }

    async fn serves(&mut self) -> Result<()> {
        let store = self.raw();
        let began = Instant::now();
        let path = object_store::path::Path::from("ready");
        while began.elapsed() < START_MAX {
            if !self.process.is_running() {
                bail!("the S3 server ended before it was ready");
            }
            let has_bucket = self.kind == S3Kind::SeaweedFs || self.make_bucket().await.is_ok();
            if has_bucket && store.put_opts(&path, "ready".into(), Default::default()).await.is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("the S3 server takes no PUT")
    }

    /// Creates the bucket, which object_store cannot. An existing bucket is no error; the PUT that
    /// follows checks it.
    async fn make_bucket(&self) -> std::io::Result<()> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request = format!(
            "PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut Vec::new()).await?;
        Ok(())
    }

    /// Returns the URL of a prefix of the bucket, for `vasto serve master --bucket`.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// Returns the address of the server: host:port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the environment variables that select the server.
    pub fn env(&self) -> [(&'static str, String); 5] {
        env(&format!("http://{}", self.address()), KEY, SECRET)
    }

    /// Returns the options that select the server.
    pub fn options(&self) -> BucketOptions {
        BucketOptions {
            endpoint: Some(format!("http://{}", self.address())),
            region: Some("us-east-1".into()),
            access_key_id: Some(KEY.into()),
            secret_access_key: Some(SECRET.into()),
            allow_http: true,
        }
    }

    /// Returns the same bucket without any layer of Vasto.
    pub fn raw(&self) -> Arc<dyn ObjectStore> {
        let store = object_store::aws::AmazonS3Builder::new()
            .with_endpoint(format!("http://{}", self.address()))
            .with_region("us-east-1")
            .with_access_key_id(KEY)
            .with_secret_access_key(SECRET)
            .with_bucket_name(BUCKET)
            .with_allow_http(true)
            .with_retry(object_store::RetryConfig { max_retries: 0, ..Default::default() })
            .build()
            .unwrap();
        Arc::new(store)
    }

    /// Stops the server.
    ///
    /// # Errors
    /// When the server does not end.
    pub async fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        self.process.ended(DEADLINE).await.map(|_| ())
    }
}

/// Returns the environment variables that select a server and its keys.
pub(crate) fn env(endpoint: &str, key: &str, secret: &str) -> [(&'static str, String); 5] {
    [
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", key.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", secret.to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ]
}

/// Finds a program: where the variable says, on the path, or where `make setup` installs it.
fn program(name: &str, variable: &str) -> Result<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join(name));
    let installed = std::env::home_dir().map(|home| home.join(".cache/vasto/venv/bin").join(name));
    let found = named.into_iter().chain(on_path).chain(installed).find(|place| place.is_file());
    found.with_context(|| {
        format!("the S3 server `{name}` for the tests is missing; run `make setup`, or name it in {variable}")
    })
}

fn seaweedfs(dir: &Path, port: u16) -> Vec<String> {
    let mut args: Vec<String> = [
        "mini",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
    ]
    .map(str::to_owned)
    .into();
    args.extend(["-s3.port.iceberg=0", "-s3.port.lance=0"].map(str::to_owned));
    args.extend([
        format!("-dir={}", dir.display()),
        format!("-bucket={BUCKET}"),
        format!("-s3.port={port}"),
    ]);
    args.push(format!("-s3.port.grpc={}", free_port()));
    for service in ["master", "volume", "filer", "admin"] {
        args.extend([
            format!("-{service}.port={}", free_port()),
            format!("-{service}.port.grpc={}", free_port()),
        ]);
    }
    // By default SeaweedFS leaves its sockets in /tmp.
    args.extend(
        ["s3", "filer"]
            .map(|of| format!("-{of}.localSocket={}", dir.join(format!("{of}.sock")).display())),
    );
    args
}

fn moto(port: u16) -> Vec<String> {
    ["-H", "127.0.0.1", "-p"].map(str::to_owned).into_iter().chain([port.to_string()]).collect()
}
