//! A cluster of separate processes in a temporary directory, and the operations of tests on it.
//!
//! **Invariant:** a test ends with [`Cluster::finish`], which stops every process gracefully within
//! the promised 10 s and fails on any log line of level WARN or above that the test did not allow.

mod builder;
mod look;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use vasto_client::{Keyspace, Vasto};
use vasto_core::limits::SHUTDOWN_DEADLINE;
use vasto_failpoint::Directory;
use vasto_testkit::http_store::HttpStore;
use vasto_testkit::{DEADLINE, Process, free_port, tail};

use crate::binary::vasto_binary;
use crate::command::Ran;
use crate::front::Front;
use crate::logs;
use crate::netns::Network;

pub use builder::ClusterBuilder;

/// The directory in which failpoints are armed, below that of the cluster.
const FAILPOINTS: &str = "failpoints";

/// A host of a network.
type Place<'a> = (&'a Network, usize);

/// Starts a program, on a host if one is named.
fn spawn(
    place: Option<Place<'_>>,
    name: &str,
    program: &Path,
    args: &[&str],
    env: &[(String, String)],
    dir: &Path,
) -> Result<Process> {
    let Some((network, host)) = place else {
        return Process::spawn(name, program, args, env, dir);
    };
    let (namespace, path) = (network.namespace(host), program.display().to_string());
    let before = ["netns", "exec", &namespace, &path];
    let all = before.into_iter().chain(args.iter().copied());
    Process::spawn(name, Path::new("ip"), all, env, dir)
}

/// The port of a restarted server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The port before the restart.
    Same,
    /// Another port.
    New,
}

#[derive(Debug)]
struct Server {
    name: String,
    starts: u32,
    port: u16,
    node_id: Option<String>,
    process: Option<Process>,
    settings: Vec<String>,
}

impl Server {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            starts: 0,
            port: 0,
            node_id: None,
            process: None,
            settings: Vec::new(),
        }
    }
}

/// A running cluster. Processes that still run are killed when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    bucket: String,
    /// The bucket, when it is a store of this process.
    store: Option<Arc<HttpStore>>,
    env: Vec<(String, String)>,
    settings: Vec<String>,
    allowed: Vec<String>,
    logs: Vec<PathBuf>,
    master: Server,
    /// Another master of the same cluster.
    second: Server,
    /// Where nodes and clients find the master, when that may change.
    front: Option<Arc<Front>>,
    nodes: Vec<Server>,
    network: Option<Arc<Network>>,
    /// The directory outlives a cluster that was not finished.
    keep: bool,
    /// Where the logs of a cluster that was not finished go, instead of their last lines to stderr.
    logs_into: Option<PathBuf>,
    finished: bool,
    // Last field: removed after the processes have ended.
    dir: TempDir,
}

impl Cluster {
    /// Returns a builder with three nodes on a local directory.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::default()
    }

    /// Returns the URL of the master: of the front, when there is one.
    pub fn master(&self) -> String {
        match &self.front {
            Some(front) => format!("http://{}", front.address()),
            None => {
                format!("http://{}:{}", self.address(Some(self.master_host())), self.master.port)
            }
        }
    }

    /// Returns the host of the master, of a cluster on a network.
    pub fn master_host(&self) -> usize {
        self.network.as_ref().map_or(0, |network| network.hosts() - 2)
    }

    /// Returns the host of clients, of a cluster on a network.
    pub fn client_host(&self) -> usize {
        self.master_host() + 1
    }

    /// Returns the address of a host, or loopback without a network.
    fn address(&self, host: Option<usize>) -> String {
        match &self.network {
            Some(network) => network.address(host),
            None => "127.0.0.1".to_owned(),
        }
    }

    /// Returns where failpoints of the servers are armed.
    pub fn failpoints(&self) -> Directory {
        Directory::new(&self.dir.path().join(FAILPOINTS))
    }

    /// Returns the index of the node that runs as this process.
    pub fn node_of_pid(&self, pid: u32) -> Option<usize> {
        let is_it = |node: &Server| node.process.as_ref().is_some_and(|one| one.pid() == pid);
        self.nodes.iter().position(is_it)
    }

    /// Starts a program on the host of clients, with its output beside the logs of the servers.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_client(&self, name: &str, program: &Path, args: &[&str]) -> Result<Process> {
        let place = self.network.as_deref().map(|network| (network, self.client_host()));
        spawn(place, name, program, args, &self.env, &self.dir.path().join("logs"))
    }

    /// Returns the URL of the bucket.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Returns the temporary directory: `bucket`, `logs`, `node-<index>`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the data directory of a node.
    pub fn node_dir(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("node-{index}"))
    }

    /// Returns the number of nodes that were started.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Returns the id of a node, once the node has been up.
    pub fn node_id(&self, index: usize) -> Option<String> {
        self.nodes[index].node_id.clone()
    }

    /// Returns the port of a node's data service.
    pub fn port(&self, index: usize) -> u16 {
        self.nodes[index].port
    }

    /// Returns the index of a node by its id.
    ///
    /// # Errors
    /// When no node of this cluster has the id.
    pub fn node_of(&self, id: &str) -> Result<usize> {
        let found = self.nodes.iter().position(|node| node.node_id.as_deref() == Some(id));
        found.with_context(|| format!("no node is {id}"))
    }

    /// Returns the process of the master.
    ///
    /// # Errors
    /// When the master does not run.
    pub fn master_process(&mut self) -> Result<&mut Process> {
        self.master.process.as_mut().context("the master does not run")
    }

    /// Returns the process of a node.
    ///
    /// # Errors
    /// When the node does not run.
    pub fn node_process(&mut self, index: usize) -> Result<&mut Process> {
        self.nodes[index].process.as_mut().with_context(|| format!("node {index} does not run"))
    }

    // ------------------------------------------------------------------ starting, stopping

    /// Starts the master.
    ///
    /// # Errors
    /// When the master does not start.
    pub async fn start_master(&mut self, port: Port) -> Result<()> {
        let port = if port == Port::New { free_port() } else { self.master.port };
        let host = self.master_host();
        let listen = format!("{}:{port}", self.address(Some(host)));
        let mut args = vec!["serve", "master", "--bucket", &self.bucket, "--listen", &listen];
        let place = self.network.as_deref().map(|network| (network, host));
        args.extend(place.map(|_| "--insecure"));
        let at = (self.dir.path(), place);
        let ready = Self::launch(&mut self.master, &args, &self.env, at, &mut self.logs).await?;
        ensure!(
            ready["role"] == "master" && ready["listen"] == listen.as_str(),
            "the ready line is {ready}"
        );
        self.master.port = port;
        if let Some(front) = &self.front {
            front.lead_to(port);
        }
        Ok(())
    }

    /// Starts a second master of the same cluster, which nobody is led to.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start_second_master(&mut self) -> Result<()> {
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let args = ["serve", "master", "--bucket", &self.bucket, "--listen", &listen];
        let at = (self.dir.path(), None);
        Self::launch(&mut self.second, &args, &self.env, at, &mut self.logs).await?;
        self.second.port = port;
        Ok(())
    }

    /// Leads nodes and clients to the second master, or back to the first.
    ///
    /// # Errors
    /// Without a front.
    pub fn lead_to_second(&self, second: bool) -> Result<()> {
        let master = if second { &self.second } else { &self.master };
        self.front.as_ref().context("the cluster has no front")?.lead_to(master.port);
        Ok(())
    }

    /// Adds a node with an empty data directory; returns its index.
    ///
    /// # Errors
    /// When the node does not start.
    pub async fn add_node(&mut self) -> Result<usize> {
        let index = self.nodes.len();
        self.nodes.push(Server::new(&format!("node-{index}")));
        self.start_node(index, Port::New).await?;
        Ok(index)
    }

    /// Adds a node as [`Self::add_node`] does, with a setting of its own.
    ///
    /// # Errors
    /// When the node does not start.
    pub async fn add_node_with(&mut self, setting: &str) -> Result<usize> {
        let index = self.nodes.len();
        self.nodes.push(Server::new(&format!("node-{index}")));
        self.set_node(index, setting);
        self.start_node(index, Port::New).await?;
        Ok(index)
    }

    /// Sets `section.field=value` for one node, from its next start on.
    pub fn set_node(&mut self, index: usize, setting: &str) {
        self.nodes[index].settings.push(setting.to_owned());
    }

    /// Starts a node on its data directory.
    ///
    /// # Errors
    /// When the node does not start.
    pub async fn start_node(&mut self, index: usize, port: Port) -> Result<()> {
        let master = self.master();
        let dir = self.node_dir(index).display().to_string();
        let ip = self.address(Some(index));
        let place = self.network.as_deref().map(|network| (network, index));
        let node = &mut self.nodes[index];
        let port = if port == Port::New { free_port() } else { node.port };
        let listen = format!("{ip}:{port}");
        let mut args =
            vec!["serve", "node", "--master", &master, "--dir", &dir, "--listen", &listen];
        let own = node.settings.clone();
        args.extend(self.settings.iter().chain(&own).flat_map(|setting| ["--set", setting]));
        args.extend(place.map(|_| "--insecure"));
        let at = (self.dir.path(), place);
        let ready = Self::launch(node, &args, &self.env, at, &mut self.logs).await?;
        ensure!(
            ready["role"] == "node" && ready["listen"] == listen.as_str(),
            "the ready line is {ready}"
        );
        let id = ready["node_id"].as_str().context("the ready line has no node_id")?.to_owned();
        ensure!(
            node.node_id.as_ref().is_none_or(|before| *before == id),
            "node {index} came back as {id}"
        );
        node.node_id = Some(id);
        node.port = port;
        Ok(())
    }

    async fn launch(
        server: &mut Server,
        args: &[&str],
        env: &[(String, String)],
        (dir, place): (&Path, Option<Place<'_>>),
        all_logs: &mut Vec<PathBuf>,
    ) -> Result<Value> {
        ensure!(server.process.is_none(), "{} runs already", server.name);
        server.starts += 1;
        let name = format!("{}.{}", server.name, server.starts);
        let mut process = spawn(place, &name, vasto_binary(), args, env, &dir.join("logs"))?;
        all_logs.push(process.log().to_owned());
        let ready = process.ready_line(DEADLINE).await?;
        server.process = Some(process);
        ensure!(ready["ready"] == true, "the ready line of {name} is {ready}");
        Ok(ready)
    }

    /// Kills the master with `kill -9`.
    ///
    /// # Errors
    /// When the master does not run.
    pub async fn kill9_master(&mut self) -> Result<()> {
        self.master.process.take().context("the master does not run")?.kill9().await
    }

    /// Kills a node with `kill -9`.
    ///
    /// # Errors
    /// When the node does not run.
    pub async fn kill9_node(&mut self, index: usize) -> Result<()> {
        self.nodes[index]
            .process
            .take()
            .with_context(|| format!("node {index} does not run"))?
            .kill9()
            .await
    }

    /// Stops the master with SIGTERM; it must end with exit code 0 within 10 s.
    ///
    /// # Errors
    /// When the master does not end so.
    pub async fn stop_master(&mut self) -> Result<()> {
        Self::stop(self.master.process.take().context("the master does not run")?).await
    }

    /// Stops a node with SIGTERM; it must end with exit code 0 within 10 s.
    ///
    /// # Errors
    /// When the node does not end so.
    pub async fn stop_node(&mut self, index: usize) -> Result<()> {
        Self::stop(
            self.nodes[index]
                .process
                .take()
                .with_context(|| format!("node {index} does not run"))?,
        )
        .await
    }

    async fn stop(mut process: Process) -> Result<()> {
        process.signal(Signal::TERM);
        let status = process.ended(SHUTDOWN_DEADLINE).await?;
        ensure!(status.success(), "{} ended with {status} after SIGTERM", process.name());
        Ok(())
    }

    // ------------------------------------------------------------------------ commands and clients

    /// Runs `vasto <args>` against this cluster.
    ///
    /// # Errors
    /// When the command does not end in time.
    pub async fn vasto(&self, args: &[&str]) -> Result<Ran> {
        let mut env = self.env.clone();
        env.push(("VASTO_MASTER".to_owned(), self.master()));
        Ran::of(args, &env, Duration::from_secs(120)).await
    }

    /// Runs `vasto <args> --output json`, which must succeed; returns the document.
    ///
    /// # Errors
    /// When the command fails, or does not print JSON.
    pub async fn json(&self, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.extend(["--output", "json"]);
        let ran = self.vasto(&all).await?;
        ensure!(ran.code == 0, "vasto {args:?} ended with {}: {}", ran.code, ran.stderr);
        serde_json::from_str(&ran.stdout)
            .with_context(|| format!("vasto {args:?} printed {:?}", ran.stdout))
    }

    /// Opens the keyspace with a new client.
    ///
    /// # Errors
    /// When the cluster cannot be reached.
    pub async fn keyspace(&self, name: &str) -> Result<Keyspace> {
        Ok(Vasto::connect(&self.master()).await?.keyspace(name).await?)
    }

    /// Creates a keyspace.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn create(&self, name: &str, shards: u32, more: &[&str]) -> Result<()> {
        let shards = shards.to_string();
        let mut args = vec!["keyspace", "create", name, "--shards", &shards];
        args.extend(more);
        self.json(&args).await.map(|_| ())
    }

    /// Runs `vasto keyspace resize` to its end; returns the report.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn resize(&self, name: &str, shards: u32) -> Result<Value> {
        self.json(&["keyspace", "resize", name, "--shards", &shards.to_string()]).await
    }

    // ------------------------------------------------------------------------- finish

    /// Stops all processes gracefully and checks all logs.
    ///
    /// # Errors
    /// When a process does not stop as promised, or a log holds a line that is not allowed.
    pub async fn finish(mut self) -> Result<()> {
        for index in 0..self.nodes.len() {
            if self.nodes[index].process.is_some() {
                self.stop_node(index).await?;
            }
        }
        if self.master.process.is_some() {
            self.stop_master().await?;
        }
        if let Some(second) = self.second.process.take() {
            Self::stop(second).await?;
        }
        let mut found = Vec::new();
        for log in &self.logs {
            let text = std::fs::read_to_string(log)?;
            let name = log.file_stem().unwrap_or_default().to_string_lossy();
            found.extend(
                logs::unexpected(&text, &self.allowed)
                    .into_iter()
                    .map(|line| format!("{name}: {line}")),
            );
        }
        if !found.is_empty() {
            let count = found.len();
            found.truncate(20);
            bail!("{count} log lines that the test does not allow:\n{}", found.join("\n"));
        }
        self.finished = true;
        Ok(())
    }
}

impl Cluster {
    /// Tells what the servers of a cluster that was not finished have logged.
    fn tell_logs(&self) {
        if let Some(into) = &self.logs_into {
            match logs::gather(&self.logs, into) {
                Ok(()) => eprintln!("the logs of the servers are in {}", into.display()),
                Err(error) => {
                    eprintln!("the logs of the servers are lost: {}: {error}", into.display());
                }
            }
            return;
        }
        eprintln!("the cluster was dropped before its end; the last lines of its logs:");
        for log in &self.logs {
            eprintln!("--- {}\n{}", log.display(), tail(log, 25));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.tell_logs();
        if self.keep || std::env::var_os("VASTO_TEST_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("kept: {}", self.dir.path().display());
        }
    }
}
