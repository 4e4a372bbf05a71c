//! The commands that run servers: `vasto dev` and `vasto serve`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};

use super::parse::parse_assignment;
use crate::config::Overrides;

/// Flags that all servers take.
#[derive(Debug, Args)]
pub(crate) struct Server {
    /// Serve /healthz, /readyz and /metrics here [default: 127.0.0.1:0, a free port]
    #[arg(long, value_name = "IP:PORT")]
    pub admin_listen: Option<SocketAddr>,
    /// Allow other addresses than loopback without TLS and authentication
    #[arg(long)]
    pub insecure: bool,
    /// Set any field of the configuration, for example node.cache=1GiB (repeatable)
    #[arg(long, value_name = "SECTION.FIELD=VALUE", value_parser = parse_assignment)]
    pub set: Vec<(String, String)>,
}

impl Server {
    fn overrides(&self, section: &str) -> Overrides {
        Overrides::new()
            .assign(&self.set)
            .set(&format!("{section}.admin_listen"), "--admin-listen", self.admin_listen)
            .switch("security.insecure", "--insecure", self.insecure)
    }
}

/// `vasto dev`
#[derive(Debug, Args)]
#[command(after_help = "Prints one line of JSON when the cluster serves; stop it with Ctrl-C.\n\n\
    Examples:\n  \
    vasto dev\n  \
    vasto dev --nodes 5 --dir /tmp/vasto\n  \
    vasto dev --bucket s3://my-bucket/dev")]
pub(crate) struct Dev {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub nodes: u16,
    /// Keep the data of all nodes under this directory
    #[arg(long, default_value = "./vasto-data")]
    pub dir: PathBuf,
    /// Ship to this bucket [default: a directory below --dir]
    #[arg(long, value_name = "URL")]
    pub bucket: Option<String>,
    /// Where the master serves [default: 127.0.0.1:8278]
    #[arg(long, value_name = "IP:PORT")]
    pub master_listen: Option<SocketAddr>,
    #[command(flatten)]
    pub server: Server,
}

impl Dev {
    /// Converts the flags to configuration; the admin address becomes that of the master section.
    pub(crate) fn overrides(&self) -> Overrides {
        self.server.overrides("master").set("bucket.url", "--bucket", self.bucket.as_ref()).set(
            "master.listen",
            "--master-listen",
            self.master_listen,
        )
    }
}

/// `vasto serve`
#[derive(Debug, Subcommand)]
pub(crate) enum Serve {
    /// Run a master: it places shards, drives changes and publishes the topology
    Master(ServeMaster),
    /// Run a node: it holds replicas of shards and serves reads and writes
    Node(ServeNode),
}

/// `vasto serve master`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    vasto serve master --bucket file:///var/lib/vasto/bucket\n  \
    vasto serve master --bucket s3://my-bucket/prod --listen 10.0.0.1:8278 --insecure")]
pub(crate) struct ServeMaster {
    /// The bucket of the cluster: file:///path, s3://bucket/prefix, gs://…, az://…
    #[arg(long, value_name = "URL")]
    pub bucket: Option<String>,
    /// Where to serve [default: 127.0.0.1:8278]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    #[command(flatten)]
    pub server: Server,
}

impl ServeMaster {
    /// Converts the flags to configuration.
    pub(crate) fn overrides(&self) -> Overrides {
        self.server.overrides("master").set("bucket.url", "--bucket", self.bucket.as_ref()).set(
            "master.listen",
            "--listen",
            self.listen,
        )
    }
}

/// `vasto serve node`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    vasto serve node --dir /var/lib/vasto\n  \
    vasto serve node --master http://10.0.0.1:8278 --dir /data --listen 0.0.0.0:8279 \
    --advertise node-1:8279 --zone a --insecure\n  \
    vasto serve node --dir /data --set node.cache=4GiB")]
pub(crate) struct ServeNode {
    /// The master [default: http://127.0.0.1:8278, or VASTO_MASTER]
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Keep the data in this directory
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Where to serve [default: 127.0.0.1:0, a free port]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// The address that others reach this node under, when it is not --listen
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// The failure domain; replicas of a shard go to distinct zones while there are enough
    #[arg(long)]
    pub zone: Option<String>,
    #[command(flatten)]
    pub server: Server,
}

impl ServeNode {
    /// Converts the flags to configuration.
    pub(crate) fn overrides(&self) -> Overrides {
        self.server
            .overrides("node")
            .set("node.master", "--master", self.master.as_ref())
            .set("node.dir", "--dir", self.dir.as_ref().map(|dir| dir.display()))
            .set("node.listen", "--listen", self.listen)
            .set("node.advertise", "--advertise", self.advertise.as_ref())
            .set("node.zone", "--zone", self.zone.as_ref())
    }
}
