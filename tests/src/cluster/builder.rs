//! Settings with which a cluster is started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use vasto_failpoint::DIRECTORY_VARIABLE;
use vasto_testkit::S3Server;
use vasto_testkit::http_store::HttpStore;

use super::{Cluster, FAILPOINTS, Port, Server};
use crate::front::Front;
use crate::netns::Network;

/// Errors that servers tell of when anything at all fails around them.
const TOLD: [&str; 4] = [
    "could not be applied",
    "the target cannot be built",
    "the replica does not open",
    "shipping failed",
];

/// Settings of a cluster to start.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    nodes: usize,
    bucket: Option<String>,
    store: Option<Arc<HttpStore>>,
    env: Vec<(String, String)>,
    settings: Vec<String>,
    allowed: Vec<String>,
    front: Option<Arc<Front>>,
    dir: Option<PathBuf>,
    network: Option<Arc<Network>>,
    failpoints: bool,
    keep: bool,
    logs_into: Option<PathBuf>,
}

impl Default for ClusterBuilder {
    /// Three nodes on a local directory.
    fn default() -> Self {
        Self {
            nodes: 3,
            bucket: None,
            store: None,
            env: Vec::new(),
            settings: ["node.cache=64MiB", "node.write_buffer=32MiB", "node.ship_interval=1s"]
                .map(str::to_owned)
                .to_vec(),
            allowed: Vec::new(),
            front: None,
            dir: None,
            network: None,
            failpoints: false,
            keep: false,
            logs_into: None,
        }
    }
}

impl ClusterBuilder {
    /// Sets the number of nodes; 3 by default.
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// Uses this bucket instead of a local directory.
    pub fn bucket(mut self, url: &str) -> Self {
        self.bucket = Some(url.to_owned());
        self
    }

    /// Uses a prefix of the bucket of a server.
    pub fn s3(mut self, server: &S3Server, prefix: &str) -> Self {
        self.env.extend(server.env().map(|(key, value)| (key.to_owned(), value)));
        self.bucket(&server.url(prefix))
    }

    /// Uses a store of this process, whose faults the test decides.
    pub fn http(mut self, store: &Arc<HttpStore>) -> Self {
        self.env.extend(store.env().map(|(key, value)| (key.to_owned(), value)));
        self.store = Some(Arc::clone(store));
        self.bucket(&store.url())
    }

    /// Lets a collection of garbage delete every object that nothing needs, whatever its age.
    pub fn keeps_no_garbage(mut self) -> Self {
        for (setting, value) in [("MIN_AGE", "0s"), ("KEEP_FOR", "0s"), ("KEEP_CHECKPOINTS", "1")] {
            self = self.env(&format!("VASTO_BUCKET__{setting}"), value);
        }
        self
    }

    /// Adds an environment variable for all processes; of the same variable, the last one counts.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Adds `section.field=value` for the nodes.
    pub fn set(mut self, setting: &str) -> Self {
        self.settings.push(setting.to_owned());
        self
    }

    /// Allows log lines of level WARN and above that contain this text.
    pub fn allow(mut self, text: &str) -> Self {
        self.allowed.push(text.to_owned());
        self
    }

    /// Allows all log lines of level WARN: the test injects faults that processes have to tell of.
    pub fn allow_warnings(self) -> Self {
        self.allow("\"level\":\"WARN\"")
    }

    /// Allows what servers tell of when anything at all fails around them: all warnings, and some
    /// errors.
    pub fn tells_of_faults(mut self) -> Self {
        self.allowed.extend(TOLD.map(str::to_owned));
        self.allow_warnings()
    }

    /// Lets nodes and clients find the master behind this front.
    pub fn behind(mut self, front: &Arc<Front>) -> Self {
        self.front = Some(Arc::clone(front));
        self
    }

    /// Starts every process on a host of this network: the nodes on the first ones, the master on
    /// the last but one, clients on the last.
    pub fn on(mut self, network: &Arc<Network>) -> Self {
        self.network = Some(Arc::clone(network));
        self.allow("--insecure")
    }

    /// Lets the test arm failpoints in all servers: see [`Cluster::failpoints`].
    pub fn failpoints(mut self) -> Self {
        self.failpoints = true;
        self.allow("failpoint")
    }

    /// Keeps the directory of a cluster that was not finished, with its logs.
    pub fn keep_when_unfinished(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Appends the logs of a cluster that was not finished to a file, instead of their last lines to
    /// stderr.
    pub fn logs_into(mut self, file: &Path) -> Self {
        self.logs_into = Some(file.to_owned());
        self
    }

    /// Creates the temporary directory inside `dir`.
    pub fn inside(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// Starts the master, then the nodes, and returns when all serve.
    ///
    /// # Errors
    /// When a process does not start.
    pub async fn start(mut self) -> Result<Cluster> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("vasto-");
        let dir = match &self.dir {
            Some(dir) => builder.tempdir_in(dir)?,
            None => builder.tempdir()?,
        };
        for part in ["bucket", "logs", FAILPOINTS] {
            std::fs::create_dir(dir.path().join(part))?;
        }
        if self.failpoints {
            let watched = dir.path().join(FAILPOINTS).display().to_string();
            self.env.push((DIRECTORY_VARIABLE.to_owned(), watched));
        }
        let bucket = self
            .bucket
            .unwrap_or_else(|| format!("file://{}", dir.path().join("bucket").display()));
        let mut cluster = Cluster {
            bucket,
            store: self.store,
            env: self.env,
            settings: self.settings,
            allowed: self.allowed,
            logs: Vec::new(),
            master: Server::new("master"),
            second: Server::new("second"),
            front: self.front,
            nodes: Vec::new(),
            network: self.network,
            keep: self.keep,
            logs_into: self.logs_into,
            finished: false,
            dir,
        };
        cluster.start_master(Port::New).await?;
        for _ in 0..self.nodes {
            cluster.add_node().await?;
        }
        Ok(cluster)
    }
}
