//! A cluster whose nodes each have their own network, which can be cut.
//!
//! **Invariant:** the master and the clients are outside; [`Hosts::catalog`] shows the first
//! keyspace that is created.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use vasto_testkit::{DEADLINE, Process};

use crate::netns::{Network, available};
use crate::{CatalogDir, Ran, vasto_binary};

/// A master, and nodes in namespaces.
#[derive(Debug)]
pub struct Hosts {
    /// The network, which can be cut.
    pub network: Network,
    /// The nodes, each with its readiness line.
    pub nodes: Vec<(Process, Value)>,
    /// URL of the master.
    pub master: String,
    /// The bucket, logs and data.
    pub dir: tempfile::TempDir,
    _master_process: Process,
}

impl Hosts {
    /// Starts a master, and a node for each of these zones.
    ///
    /// # Errors
    /// When networks cannot be made or cut here, or a server does not start.
    pub async fn start(zones: &[&str]) -> Result<Self> {
        ensure!(
            available(),
            "networks cannot be cut here: run `scripts/setup.sh test`, and this test as root with the right to make \
             network namespaces"
        );
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("bucket"))?;
        let network = Network::new(zones.len())?;
        let bucket = format!("file://{}", dir.path().join("bucket").display());
        let listen = format!("{}:8278", network.address(None));
        let master = format!("http://{listen}");
        let args = ["serve", "master", "--bucket", &bucket, "--listen", &listen, "--insecure"];
        let (master_process, _) = server(&network, None, dir.path(), &args).await?;
        let mut nodes = Vec::new();
        for (host, zone) in zones.iter().enumerate() {
            let listen = format!("{}:7000", network.address(Some(host)));
            let data = dir.path().join(format!("data-{host}")).display().to_string();
            let place = [
                "--master",
                &master,
                "--dir",
                &data,
                "--listen",
                &listen,
                "--zone",
                zone,
                "--insecure",
            ];
            let args: Vec<&str> = ["serve", "node"].into_iter().chain(place).collect();
            nodes.push(server(&network, Some(host), dir.path(), &args).await?);
        }
        Ok(Self { network, nodes, master, dir, _master_process: master_process })
    }

    /// Runs a command of `vasto` and returns its JSON.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn vasto(&self, args: &[&str]) -> Result<Value> {
        let all: Vec<&str> = args.iter().copied().chain(["--output", "json"]).collect();
        let ran =
            Ran::of(&all, &[("VASTO_MASTER".to_owned(), self.master.clone())], DEADLINE).await?;
        ensure!(ran.code == 0, "vasto {args:?}: {ran:?}");
        Ok(serde_json::from_str(&ran.stdout)?)
    }

    /// Returns the catalog of the first keyspace.
    pub fn catalog(&self) -> CatalogDir {
        CatalogDir::new(&self.dir.path().join("bucket"), 1)
    }

    /// Returns the host on which a node runs.
    ///
    /// # Errors
    /// When no host runs the node.
    pub fn host_of(&self, node_id: &str) -> Result<usize> {
        self.nodes.iter().position(|(_, ready)| ready["node_id"] == node_id).context("no such node")
    }

    /// Starts a program in the namespace of a host.
    ///
    /// # Errors
    /// When the program does not start.
    pub fn spawn(&self, host: usize, name: &str, program: &Path, args: &[&str]) -> Result<Process> {
        spawn(&self.network, Some(host), name, program, self.dir.path(), args)
    }

    /// Kills the nodes.
    ///
    /// # Errors
    /// When a node does not end.
    pub async fn end(self) -> Result<()> {
        for (mut process, _) in self.nodes {
            process.signal(Signal::KILL);
            process.ended(DEADLINE).await?;
        }
        Ok(())
    }
}

fn spawn(
    network: &Network,
    host: Option<usize>,
    name: &str,
    program: &Path,
    dir: &Path,
    args: &[&str],
) -> Result<Process> {
    let namespace = host.map(|host| network.namespace(host));
    let path = program.display().to_string();
    match &namespace {
        None => Process::spawn(name, program, args.to_vec(), &[], dir),
        Some(namespace) => {
            let before = ["netns", "exec", namespace, &path];
            Process::spawn(
                name,
                Path::new("ip"),
                before.into_iter().chain(args.iter().copied()),
                &[],
                dir,
            )
        }
    }
}

async fn server(
    network: &Network,
    host: Option<usize>,
    dir: &Path,
    args: &[&str],
) -> Result<(Process, Value)> {
    let name = host.map_or("master".to_owned(), |host| format!("node-{host}"));
    let mut process = spawn(network, host, &name, vasto_binary(), dir, args)?;
    let ready = process.ready_line(DEADLINE).await?;
    Ok((process, ready))
}
