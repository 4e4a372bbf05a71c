//! The binary itself: exit codes, help, configuration. Having these tests also makes cargo build
//! the binary, beside which the end-to-end tests look for it.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

fn vasto(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vasto"));
    command.env_remove("VASTO_MASTER").args(args).output().unwrap()
}

#[test]
fn help_shows_every_command_of_the_contract() {
    let shown = vasto(&["--help"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.status.success());
    for command in ["dev", "serve", "keyspace", "node", "cluster", "operation", "kv", "bench", "config"] {
        assert!(text.contains(command), "{command} is missing in:\n{text}");
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_wrong() {
    let refused = vasto(&["keyspace", "resize"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--shards"));
}

#[test]
fn the_configuration_in_force_is_shown_with_its_sources() {
    let shown = vasto(&["config", "show", "--output", "json"]);
    assert!(shown.status.success());
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(text.contains("node.ship_interval") && text.contains("default"), "{text}");
}

/// A whole cluster in one process; it dies with this.
struct Dev {
    process: Child,
    ready: Value,
    _dir: tempfile::TempDir,
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Dev {
    fn start(flags: &[&str]) -> Dev {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_vasto"))
            .args(["dev", "--nodes", "2", "--master-listen", "127.0.0.1:0", "--dir"])
            .arg(dir.path())
            .args(flags)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Dev { ready: serde_json::from_str(&line).expect("the line that says it is ready"), process, _dir: dir }
    }

    fn vasto(&self, args: &[&str]) -> String {
        let done = vasto(&[args, &["--master", self.ready["master"].as_str().unwrap()]].concat());
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.vasto(&["cluster", "status", "--output", "json"])).unwrap()
    }

    fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(self.ready["admin_listen"].as_str().unwrap()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// The value of the series with this name and, among others, these labels.
fn series(metrics: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let of = |line: &&str| {
        line.starts_with(&format!("{name}{{"))
            && labels.iter().all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
    };
    metrics.lines().find(of)?.rsplit(' ').next()?.parse().ok()
}

#[test]
fn requests_are_counted_by_kind_and_the_bill_is_estimated_from_them() {
    let dev = Dev::start(&["--set", "prices.currency=EUR", "--set", "prices.gib_month=1000"]);
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "2"]);
    dev.vasto(&["kv", "put", "ks1", "a", "1"]);
    dev.vasto(&["keyspace", "checkpoint", "ks1"]);

    // Each of the servers of this process has series of its own.
    let nodes: Vec<&str> =
        dev.ready["nodes"].as_array().unwrap().iter().map(|node| node["node_id"].as_str().unwrap()).collect();
    let metrics = dev.metrics();
    for kind in ["put", "get", "head", "list", "delete"] {
        for node in &nodes {
            let labels = [("role", "node"), ("node", *node), ("kind", kind)];
            assert!(series(&metrics, "vasto_bucket_requests_total", &labels).is_some(), "{labels:?} in:\n{metrics}");
        }
    }
    let master = [("role", "master"), ("kind", "put")];
    assert!(series(&metrics, "vasto_bucket_requests_total", &master).unwrap() > 0.0, "{metrics}");
    for node in &nodes {
        let labels = [("role", "node"), ("node", *node)];
        assert!(series(&metrics, "vasto_bucket_sent_bytes_total", &labels).unwrap() > 0.0, "{metrics}");
        assert!(series(&metrics, "vasto_bucket_received_bytes_total", &labels).is_some(), "{metrics}");
        let puts = [("role", "node"), ("node", *node), ("kind", "put")];
        assert!(series(&metrics, "vasto_bucket_requests_total", &puts).unwrap() > 0.0, "{metrics}");
    }

    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        let status = dev.status();
        if status["bill"]["processes"] == 3 && status["nodes"][0]["bucket_requests"]["put"].as_u64() > Some(0) {
            break status;
        }
        assert!(Instant::now() < deadline, "not all servers were measured: {status}");
    };
    let bill = &status["bill"];
    assert_eq!(bill["currency"], "EUR");
    assert!(bill["per_month"]["requests"].as_f64().unwrap() > 0.0, "{bill}");
    assert_eq!((&bill["per_month"]["storage"], &bill["per_month"]["total"]), (&Value::Null, &Value::Null), "{bill}");
    assert!(bill["note"].as_str().unwrap().contains("vasto bucket gc --dry-run"), "{bill}");
    // Asking costs nothing.
    let master_requests = |status: &Value| {
        let requests = &status["master"]["bucket_requests"];
        ["get", "put", "list", "head", "delete"].map(|kind| requests[kind].as_u64().unwrap())
    };
    assert_eq!(master_requests(&status), master_requests(&dev.status()));

    dev.vasto(&["bucket", "gc", "--dry-run"]);
    let bill = &dev.status()["bill"];
    let stored = bill["stored_bytes"].as_u64().unwrap();
    assert!(stored > 0 && bill["stored_age_s"].as_u64() < Some(20), "{bill}");
    let storage = stored as f64 / f64::from(1 << 30) * 1000.0;
    assert!((bill["per_month"]["storage"].as_f64().unwrap() - storage).abs() < 1e-4, "{bill}");
    assert!(bill["per_month"]["total"].as_f64().unwrap() > storage, "{bill}");
    let shown = dev.vasto(&["cluster", "status", "--output", "table"]);
    assert!(shown.contains("estimated bill of the bucket, EUR a month: "), "{shown}");
}
