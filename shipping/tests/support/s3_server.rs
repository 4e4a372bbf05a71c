//! Real S3 servers on loopback, stopped when the value is dropped, also by a panic.
//!
//! Two unrelated implementations: SeaweedFS, in Go, and moto, in Python, which answers with the
//! codes and texts of AWS.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vasto_shipping::BucketOptions;

pub const BUCKET: &str = "vasto-test";
const KEY: &str = "vastotest";
const SECRET: &str = "vastotestsecret";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    SeaweedFs,
    Moto,
}

pub struct S3Server {
    child: Child,
    port: u16,
    kind: Kind,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Finds a program: where the variable says, on the path, or where `make setup` installs it.
fn program(name: &str, variable: &str) -> PathBuf {
    let on_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).map(|dir| dir.join(name)).collect::<Vec<_>>());
    let named = std::env::var_os(variable).map(PathBuf::from);
    let installed = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/vasto/venv/bin").join(name));
    let mut places = named.into_iter().chain(on_path).chain(installed);
    places.find(|place| place.is_file()).unwrap_or_else(|| {
        panic!("the S3 server `{name}` for the tests is missing; run `make setup`, or name it in {variable}")
    })
}

/// Returns ports that are free now, all different, below the system's ephemeral range.
fn free_ports<const N: usize>() -> [u16; N] {
    let mut held = Vec::new();
    let mut next = 10_000 + (std::process::id() % 1_000) as u16 * 10;
    while held.len() < N {
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", next)) {
            held.push((next, listener));
        }
        next += 1;
    }
    std::array::from_fn(|n| held[n].0)
}

impl S3Server {
    /// Starts the server and waits until it accepts a PUT. Retries, since another process may take a port first.
    pub async fn start(kind: Kind) -> S3Server {
        for _ in 0..3 {
            let mut server = Self::launch(kind);
            if server.serves().await {
                return server;
            }
        }
        panic!("the S3 server did not start");
    }

    fn launch(kind: Kind) -> S3Server {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let output = std::fs::File::create(&log).unwrap();
        let (mut command, port) = match kind {
            Kind::SeaweedFs => seaweedfs(dir.path()),
            Kind::Moto => moto(),
        };
        let child = command
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        S3Server { child, port, kind, log, _dir: dir }
    }

    async fn serves(&mut self) -> bool {
        let store = self.raw();
        let deadline = Instant::now() + Duration::from_secs(40);
        let path = object_store::path::Path::from("ready");
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                eprintln!("the S3 server ended with {status}: {}", self.tail());
                return false;
            }
            let has_bucket = self.kind == Kind::SeaweedFs || self.make_bucket().await.is_ok();
            if has_bucket && store.put_opts(&path, "ready".into(), Default::default()).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        eprintln!("the S3 server takes no PUT: {}", self.tail());
        false
    }

    /// Creates the bucket, which object_store cannot. An existing bucket is no error; the PUT that follows checks it.
    async fn make_bucket(&self) -> std::io::Result<()> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request =
            format!("PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut Vec::new()).await?;
        Ok(())
    }

    fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(10).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    pub fn options(&self) -> BucketOptions {
        BucketOptions {
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            region: Some("us-east-1".into()),
            access_key_id: Some(KEY.into()),
            secret_access_key: Some(SECRET.into()),
            allow_http: true,
        }
    }

    /// Returns the same bucket without any layer of Vasto.
    pub fn raw(&self) -> Arc<dyn ObjectStore> {
        let store = object_store::aws::AmazonS3Builder::new()
            .with_endpoint(format!("http://127.0.0.1:{}", self.port))
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
}

/// Returns the command, and the port on which it will accept requests.
fn seaweedfs(dir: &Path) -> (Command, u16) {
    let [s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, admin_grpc] =
        free_ports::<10>();
    let mut command = Command::new(program("weed", "VASTO_TEST_WEED"));
    command
        .arg("mini")
        .arg(format!("-dir={}", dir.display()))
        .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"])
        .args(["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"])
        .args([format!("-s3.port={s3}"), format!("-s3.port.grpc={s3_grpc}")])
        .args([format!("-master.port={master}"), format!("-master.port.grpc={master_grpc}")])
        .args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_grpc}")])
        .args([format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_grpc}")])
        .args([format!("-admin.port={admin}"), format!("-admin.port.grpc={admin_grpc}")])
        .arg(format!("-s3.localSocket={}", dir.join("s3.sock").display()))
        .arg(format!("-filer.localSocket={}", dir.join("filer.sock").display()))
        .arg(format!("-bucket={BUCKET}"))
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env("GOMEMLIMIT", "600MiB");
    (command, s3)
}

/// Returns the same for moto, which keeps its objects in memory.
fn moto() -> (Command, u16) {
    let [port] = free_ports::<1>();
    let mut command = Command::new(program("moto_server", "VASTO_TEST_MOTO"));
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
    (command, port)
}
