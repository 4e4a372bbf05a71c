//! A real S3 server for tests: SeaweedFS, which `make setup` installs.

use std::net::TcpStream;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{Process, free_port};
use crate::wait::{DEADLINE, until};

/// A running server with one empty bucket.
#[derive(Debug)]
pub struct S3Server {
    process: Process,
    port: u16,
    ports: Vec<u16>,
    _dir: TempDir,
}

const BUCKET: &str = "vasto-test";

impl S3Server {
    /// Starts the server; returns when the bucket exists.
    ///
    /// # Errors
    /// When SeaweedFS is not installed (the text says how to install it) or does not start.
    pub async fn start() -> Result<Self> {
        let weed = weed()?;
        let dir = tempfile::Builder::new().prefix("vasto-s3-").tempdir()?;
        let data = dir.path().join("data");
        std::fs::create_dir(&data)?;
        let port = free_port();
        let mut args = vec![
            "mini".to_owned(),
            format!("-dir={}", data.display()),
            "-ip=127.0.0.1".to_owned(),
            "-ip.bind=127.0.0.1".to_owned(),
            "-master.telemetry=false".to_owned(),
            "-admin.ui=false".to_owned(),
            "-webdav=false".to_owned(),
            format!("-s3.port={port}"),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            format!("-bucket={BUCKET}"),
        ];
        // Each of these services also opens the port 10,000 above.
        let mut ports = vec![port];
        for service in ["master", "volume", "filer", "admin"] {
            let port = free_port();
            args.push(format!("-{service}.port={port}"));
            ports.push(port);
        }
        let env =
            [("AWS_ACCESS_KEY_ID", "minioadmin"), ("AWS_SECRET_ACCESS_KEY", "minioadmin"), ("GOMEMLIMIT", "600MiB")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let process = Process::spawn("weed", &weed, &args, &env, dir.path())?;
        let server = Self { process, port, ports, _dir: dir };
        server.bucket_is_there().await?;
        Ok(server)
    }

    /// Returns the URL of the bucket for `vasto serve master --bucket`.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// Returns the address of the server: host:port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the environment variables that select the server.
    pub fn env(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", "minioadmin"),
            ("AWS_SECRET_ACCESS_KEY", "minioadmin"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", self.port)),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }

    async fn bucket_is_there(&self) -> Result<()> {
        let options = vasto_shipping::BucketOptions {
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            region: Some("us-east-1".to_owned()),
            access_key_id: Some("minioadmin".to_owned()),
            secret_access_key: Some("minioadmin".to_owned()),
            allow_http: true,
        };
        until("the S3 server to listen", DEADLINE, async || TcpStream::connect(("127.0.0.1", self.port)).ok())
            .await
            .with_context(|| crate::logs::tail(self.process.log(), 20))?;
        until("the S3 server to take an object", DEADLINE, async || {
            let bucket = vasto_shipping::Bucket::open(&self.url("probe"), &options).ok()?;
            bucket.probe().await.ok()
        })
        .await
        .with_context(|| crate::logs::tail(self.process.log(), 20))
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

impl Drop for S3Server {
    fn drop(&mut self) {
        // SeaweedFS leaves sockets behind, named after its ports and those of gRPC, 10,000 above.
        let numbers: Vec<String> =
            self.ports.iter().flat_map(|port| [*port, port + 10_000]).map(|p| p.to_string()).collect();
        for entry in std::fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = numbers.iter().any(|number| name.ends_with(&format!("-{number}.sock")));
            if name.starts_with("seaweedfs-") && ours {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

fn weed() -> Result<PathBuf> {
    let given = std::env::var_os("VASTO_TEST_WEED").map(PathBuf::from);
    let usual = std::env::home_dir().map(|home| home.join(".cache/vasto/venv/bin/weed"));
    given
        .into_iter()
        .chain(usual)
        .find(|path| path.is_file())
        .context("SeaweedFS is not installed; run `make setup`, or name its binary `weed` in VASTO_TEST_WEED")
}
