//! Tests of the binary itself: exit codes, help, configuration. These tests also make cargo build
//! the binary, next to which the end-to-end tests expect it.
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "these tests wait for processes without a runtime")]

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
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
    for command in
        ["dev", "serve", "keyspace", "node", "cluster", "operation", "kv", "bench", "config"]
    {
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

/// A whole cluster in one process, which is killed when this is dropped.
struct Dev {
    process: Child,
    ready: Value,
    dir: tempfile::TempDir,
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
        let mut command = Command::new(env!("CARGO_BIN_EXE_vasto"));
        command.stderr(Stdio::null());
        let data = dir.path().to_owned();
        Dev::run(command, data, flags, dir)
    }

    /// Runs the command as `vasto dev` with its data in `data`.
    fn run(mut command: Command, data: PathBuf, flags: &[&str], dir: tempfile::TempDir) -> Dev {
        command
            .args(["dev", "--nodes", "2", "--master-listen", "127.0.0.1:0", "--dir"])
            .arg(data)
            .args(flags);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Dev {
            ready: serde_json::from_str(&line).expect("the line that says it is ready"),
            process,
            dir,
        }
    }

    /// Sends SIGTERM; returns the exit code if the process ends within the promised time.
    fn terminate(&mut self) -> Option<i32> {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.process.try_wait().unwrap() {
                Some(status) => return status.code(),
                None if Instant::now() > deadline => return None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
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

/// Returns the value of the series with this name that has these labels, among others.
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

    // Each server of this process has its own series.
    let nodes: Vec<&str> = dev.ready["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["node_id"].as_str().unwrap())
        .collect();
    let metrics = dev.metrics();
    for kind in ["put", "get", "head", "list", "delete"] {
        for node in &nodes {
            let labels = [("role", "node"), ("node", *node), ("kind", kind)];
            assert!(
                series(&metrics, "vasto_bucket_requests_total", &labels).is_some(),
                "{labels:?} in:\n{metrics}"
            );
        }
    }
    let master = [("role", "master"), ("kind", "put")];
    assert!(series(&metrics, "vasto_bucket_requests_total", &master).unwrap() > 0.0, "{metrics}");
    for node in &nodes {
        let labels = [("role", "node"), ("node", *node)];
        assert!(
            series(&metrics, "vasto_bucket_sent_bytes_total", &labels).unwrap() > 0.0,
            "{metrics}"
        );
        assert!(
            series(&metrics, "vasto_bucket_received_bytes_total", &labels).is_some(),
            "{metrics}"
        );
        let puts = [("role", "node"), ("node", *node), ("kind", "put")];
        assert!(series(&metrics, "vasto_bucket_requests_total", &puts).unwrap() > 0.0, "{metrics}");
    }

    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        let status = dev.status();
        if status["bill"]["processes"] == 3
            && status["nodes"][0]["bucket_requests"]["put"].as_u64() > Some(0)
        {
            break status;
        }
        assert!(Instant::now() < deadline, "not all servers were measured: {status}");
    };
    let bill = &status["bill"];
    assert_eq!(bill["currency"], "EUR");
    assert!(bill["per_month"]["requests"].as_f64().unwrap() > 0.0, "{bill}");
    assert_eq!(
        (&bill["per_month"]["storage"], &bill["per_month"]["total"]),
        (&Value::Null, &Value::Null),
        "{bill}"
    );
    assert!(bill["note"].as_str().unwrap().contains("vasto bucket gc --dry-run"), "{bill}");
    // A status query makes no bucket requests.
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

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vasto"))
}

/// Returns every file and directory below `dir`.
fn all_below(dir: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut next = vec![dir.to_owned()];
    while let Some(path) = next.pop() {
        // RocksDB may remove files at any time.
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                next.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths
}

#[test]
fn files_of_a_server_are_its_users_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    // The usual umask of a shell, independent of the umask of this test.
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"umask 022; exec "$0" "$@""#, env!("CARGO_BIN_EXE_vasto")])
        .stderr(Stdio::null());
    let dev = Dev::run(shell, data.clone(), &[], dir);
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "2"]);
    dev.vasto(&["kv", "put", "ks1", "a", "1"]);
    dev.vasto(&["keyspace", "checkpoint", "ks1"]);
    let all = all_below(&data);
    for part in ["bucket", "node-1/LOCK", "node-1/node.json"] {
        assert!(all.contains(&data.join(part)), "{part} is missing");
    }
    assert!(
        all.iter().any(|path| path.extension().is_some_and(|extension| extension == "manifest")),
        "{all:?}"
    );
    let wide: Vec<_> = std::iter::once(&data)
        .chain(&all)
        .filter(|path| {
            path.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
        })
        .collect();
    assert!(wide.is_empty(), "others can read {wide:?}");
}

#[test]
fn directories_may_be_called_anything() {
    let dir = tempfile::tempdir().unwrap();
    let strange = OsStr::from_bytes(b"data #1?x=%41 '");
    let mut shell = command();
    shell.stderr(Stdio::null()).current_dir(dir.path());
    let parent = dir.path().to_owned();
    let mut dev = Dev::run(shell, PathBuf::from(strange), &[], dir);
    dev.vasto(&["keyspace", "create", "ks1"]);
    dev.vasto(&["kv", "put", "ks1", "a", "1"]);
    dev.vasto(&["keyspace", "checkpoint", "ks1"]);
    let names: Vec<_> =
        std::fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [strange], "nothing is made elsewhere");
    assert!(parent.join(strange).join("bucket/cluster.json").is_file());
    assert_eq!(
        dev.vasto(&["bucket", "fsck", "--output", "json"]).matches("\"missing\": []").count(),
        1
    );
    assert_eq!(dev.terminate(), Some(0));
}

/// An unread pipe is full after 64 KiB; at this log level that takes a short while.
#[test]
fn silent_peers_and_unread_logs_hold_up_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut unread = command();
    unread.stderr(Stdio::piped());
    let mut dev = Dev::run(unread, data, &["--set", "log.filter=trace"], dir);
    let _unread = dev.process.stderr.take().unwrap();
    let addresses =
        [&dev.ready["listen"], &dev.ready["admin_listen"], &dev.ready["nodes"][0]["listen"]];
    let _silent: Vec<_> = addresses
        .iter()
        .map(|address| TcpStream::connect(address.as_str().unwrap()).unwrap())
        .collect();
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "2"]);
    dev.vasto(&["bench", "ks1", "--workload", "mixed", "--requests", "2000", "--keys", "100"]);
    let dropped = |dev: &Dev| {
        let metrics = dev.metrics();
        let line = metrics.lines().find(|line| line.starts_with("vasto_log_dropped_total"));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or_default()
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while dropped(&dev) == 0.0 {
        assert!(Instant::now() < deadline, "the logs never filled pipe and queue");
        dev.vasto(&["bench", "ks1", "--workload", "mixed", "--requests", "5000", "--keys", "100"]);
    }
    assert_eq!(dev.vasto(&["kv", "put", "ks1", "a", "1"]), "ok\n");
    assert_eq!(dev.terminate(), Some(0));
}

#[test]
fn log_lines_of_dev_name_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let log = dir.path().join("log");
    let mut logged = command();
    logged.stderr(std::fs::File::create(&log).unwrap());
    let mut dev = Dev::run(logged, data, &["--set", "log.filter=warn,vasto_node=debug"], dir);
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "2", "--replicas", "2"]);
    dev.vasto(&["kv", "put", "ks1", "k", "v"]);
    dev.vasto(&["keyspace", "checkpoint", "ks1"]);
    dev.vasto(&["keyspace", "delete", "ks1", "--yes"]);
    assert_eq!(dev.terminate(), Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let of_nodes: Vec<_> = lines
        .iter()
        .filter(|line| {
            line["target"].as_str().is_some_and(|target| target.starts_with("vasto_node"))
        })
        .collect();
    assert!(of_nodes.len() > 5, "{text}");
    for line in of_nodes {
        let spans = line["spans"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert!(spans.iter().any(|span| span["node"].is_string()), "it names no node: {line}");
    }
    for node in ["node-1", "node-2"] {
        assert!(text.contains(node), "{node} never spoke: {text}");
    }
}

#[test]
fn a_benchmark_leaves_nothing_behind_unless_told_to() {
    let dev = Dev::start(&[]);
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "3"]);
    for mine in ["bench", "bench:", "bench:7", "bench:000000000x", "mine"] {
        dev.vasto(&["kv", "put", "ks1", mine, "1"]);
    }
    let keys = || {
        let rows: Value =
            serde_json::from_str(&dev.vasto(&["kv", "scan", "ks1", "--output", "json"])).unwrap();
        rows.as_array().unwrap().len()
    };
    for workload in ["put", "ycsb-d", "get"] {
        dev.vasto(&[
            "bench",
            "ks1",
            "--workload",
            workload,
            "--requests",
            "300",
            "--keys",
            "1200",
            "--clients",
            "4",
        ]);
        assert_eq!(keys(), 5, "after {workload}");
    }
    dev.vasto(&[
        "bench",
        "ks1",
        "--workload",
        "get",
        "--requests",
        "10",
        "--keys",
        "1200",
        "--keep",
    ]);
    assert_eq!(keys(), 1_205);
}

#[test]
fn what_a_scan_shows_can_be_read_whatever_its_bytes_and_partition() {
    let dev = Dev::start(&[]);
    dev.vasto(&["keyspace", "create", "ks1", "--shards", "3"]);
    dev.vasto(&["kv", "put", "ks1", r"\xff\x00\\\x1b[31m", "bytes"]);
    dev.vasto(&["kv", "put", "ks1", "k", "own"]);
    for partition in ["p", r"q\xfe"] {
        dev.vasto(&["kv", "put", "ks1", "k", partition, "--partition", partition]);
    }
    let shown = dev.vasto(&["kv", "scan", "ks1"]);
    assert!(!shown.contains('\u{1b}'), "{shown:?}");
    let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(lines.len(), 4, "{shown}");
    for line in lines {
        let found = dev.vasto(&[&["kv", "get", "ks1", line[0]], &line[2..]].concat());
        // A scanned row has its value escaped; `get` prints it unescaped.
        assert_eq!(found.trim_end().replace('\\', r"\\"), line[1], "{line:?}");
    }
    assert_eq!(dev.vasto(&["kv", "get", "ks1", "k", "--partition", "p"]), "p\n");
    assert_eq!(dev.vasto(&["kv", "scan", "ks1", "--partition", "p"]).lines().count(), 1);
}

/// The request holds the name of a span as text; the rest of the protocol does not matter here.
#[test]
fn spans_reach_a_collector_and_one_that_is_gone_is_told() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut traced = command();
    traced
        .stderr(std::fs::File::create(&log).unwrap())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .env("OTEL_BSP_SCHEDULE_DELAY", "200")
        .env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
        .env("OTEL_METRIC_EXPORT_INTERVAL", "500");
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let (collected, stop) =
        (seen.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let stopped = stop.clone();
    let collecting = std::thread::spawn(move || {
        for stream in collector.incoming() {
            if stopped.load(std::sync::atomic::Ordering::Acquire) {
                return;
            }
            let (mut stream, collected) = (stream.unwrap(), collected.clone());
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    collected.lock().unwrap().extend_from_slice(&bytes[..read]);
                }
            });
        }
    });
    let data = dir.path().join("data");
    let dev = Dev::run(traced, data, &[], dir);
    dev.vasto(&["keyspace", "create", "ks1"]);
    let deadline = Instant::now() + Duration::from_secs(30);
    let has = |name: &[u8]| seen.lock().unwrap().windows(name.len()).any(|window| window == name);
    for span in [&b"call of the master"[..], b"open a replica"] {
        while !has(span) {
            assert!(Instant::now() < deadline, "{} was never sent", String::from_utf8_lossy(span));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    // The collector never answers, and is then gone.
    stop.store(true, std::sync::atomic::Ordering::Release);
    drop(TcpStream::connect(endpoint.trim_start_matches("http://")));
    collecting.join().unwrap();
    while !std::fs::read_to_string(&log).unwrap().contains("do not reach the OTLP collector") {
        assert!(
            Instant::now() < deadline + Duration::from_secs(30),
            "{}",
            std::fs::read_to_string(&log).unwrap()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(dev.dir.path().exists());
}

/// Directories and bucket as an earlier version stored them: see `testdata/v1/README.md`.
#[test]
fn a_cluster_that_an_earlier_version_stored_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/v1/cluster.tar.gz");
    assert!(
        Command::new("tar")
            .arg("xzf")
            .arg(stored)
            .arg("-C")
            .arg(dir.path())
            .status()
            .unwrap()
            .success()
    );
    let data = dir.path().join("data");
    let mut dev = Dev::run(command(), data, &[], dir);
    let rows = |keyspace: &str| -> Vec<Value> {
        let shown = dev.vasto(&["kv", "scan", keyspace, "--output", "json"]);
        let rows: Vec<Value> = serde_json::from_str(&shown).unwrap();
        rows.iter().for_each(|row| {
            assert!(row["value"].is_string() && row["event_time"].is_u64(), "{row}")
        });
        rows
    };
    let before = rows("first");
    assert_eq!(before.len(), 59);
    for (key, value) in [
        ("key:1", "value 1\n"),
        ("key:40", "value 40\n"),
        ("key:60", "value 60\n"),
        ("long", "x\n"),
    ] {
        assert_eq!(dev.vasto(&["kv", "get", "first", key]), value, "{key}");
    }
    let described: Value =
        serde_json::from_str(&dev.vasto(&["keyspace", "describe", "first", "--output", "json"]))
            .unwrap();
    assert_eq!(described["placement"].as_array().unwrap().len(), 2, "{described}");
    let operations = dev.vasto(&["operation", "list", "--output", "json"]);
    assert!(operations.contains("\"op-1-1\"") && operations.contains("\"grow\""), "{operations}");

    // Also its bucket, and changes of it.
    dev.vasto(&["keyspace", "restore", "first", "--into", "again"]);
    assert_eq!(rows("again"), before);
    dev.vasto(&["keyspace", "resize", "first", "--shards", "3"]);
    assert_eq!(rows("first"), before);
    dev.vasto(&["bucket", "fsck", "--deep"]);
    assert_eq!(dev.terminate(), Some(0));
}
