//! `vasto dev`: a master and its nodes in one process, to try things out.
//!
//! Each node has its own directory below `--dir`, and so has the bucket unless `--bucket` is given;
//! a second start finds all data again. The nodes share the memory that the configuration gives to
//! one node. Each node runs on its own threads, whose log lines name it.

use std::{
    future::Future,
    path::{Path, PathBuf},
};

use anyhow::Context;
use bytesize::ByteSize;
use futures::future::{join_all, try_join_all};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use vasto_master::{Master, RunningMaster};
use vasto_node::{Node, NodeError, RunningNode};
use vasto_shipping::Bucket;

use super::{Ready, ReadyNode, Server, advice, master_config, node_config};
use crate::{
    args::Dev,
    config::{self, Config},
    output::Failure,
};

/// Minimum share of the memory for a node.
const SHARE_MIN: ByteSize = ByteSize::mib(16);

/// `vasto dev`.
///
/// # Errors
/// A configuration that cannot be used, or the error that keeps a server from starting.
pub(crate) async fn dev(args: &Dev, file: Option<&Path>) -> anyhow::Result<()> {
    super::keep_files_private();
    let mut config = config::load(file, args.overrides())?.config;
    if config.bucket.url.is_none() {
        let bucket = directory(&args.dir.join("bucket"))?;
        config.bucket.url = Bucket::url_of_directory(&bucket);
    }
    let settings = master_config(&config)?;
    if !config.node.listen.ip().is_loopback() || config.node.listen.port() != 0 {
        let failure =
            Failure::usage("the nodes of `vasto dev` listen on free ports of 127.0.0.1 only");
        return Err(failure
            .hint("leave node.listen out, or run separate servers with `vasto serve`")
            .into());
    }
    let server = Server::start("dev", &config, config.master.admin_listen).await?;
    // The nodes stop first, then the master, which receives their reports.
    let stop_master = CancellationToken::new();
    let started =
        server.starting(start(&config, args, settings, stop_master.clone(), &server)).await;
    let Some(cluster) = started.inspect_err(|_| stop_master.cancel())? else {
        stop_master.cancel();
        return server.end().await;
    };
    let cluster_id = cluster.master.cluster_id.clone();
    let nodes = cluster.nodes.iter().map(|dev_node| &dev_node.node);
    let nodes =
        nodes.map(|node| ReadyNode { node_id: node.node_id.to_string(), listen: node.listen });
    let ready = Ready {
        ready: true,
        role: "dev",
        node_id: None,
        listen: cluster.master.listen,
        master: format!("http://{}", cluster.master.listen),
        admin_listen: server.admin.addr(),
        cluster_id: &cluster_id,
        nodes: Some(nodes.collect()),
        pid: std::process::id(),
    };
    let of_nodes = cluster.nodes.iter().map(|dev_node| dev_node.node.trouble.clone());
    let trouble = of_nodes.chain([cluster.master.trouble.clone()]).collect();
    server.serve(&ready, trouble, cluster.stopped(stop_master)).await
}

struct Cluster {
    master: RunningMaster,
    nodes: Vec<DevNode>,
}

/// A node and its threads.
struct DevNode {
    node: RunningNode,
    threads: Threads,
}

/// A runtime that may be dropped from inside another runtime.
struct Threads(Option<Runtime>);

impl Threads {
    /// Starts as many threads as the machine has cores; every line that they log names the node.
    fn start(name: &str) -> Result<Threads, Failure> {
        let span = vasto_observability::server_span(name);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .thread_name(name)
            // Entered for the life of the thread.
            .on_thread_start(move || std::mem::forget(span.clone().entered()))
            .build();
        match runtime {
            Ok(runtime) => Ok(Threads(Some(runtime))),
            Err(error) => Err(Failure::new(format!("cannot start the threads of {name}: {error}"))),
        }
    }

    /// Runs the start of a server on these threads.
    async fn run<T: Send + 'static>(
        &self,
        start: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Failure> {
        let runtime = self.0.as_ref().expect("it is taken when it is dropped");
        runtime
            .spawn(start)
            .await
            .map_err(|error| Failure::new(format!("a node did not start: {error}")))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // The tasks of the runtime have ended, or are abandoned.
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl DevNode {
    async fn stopped(self) -> Result<(), NodeError> {
        let ended = self.node.stopped().await;
        drop(self.threads);
        ended
    }
}

impl Cluster {
    /// Waits for all nodes, then stops the master; returns the first failure of a node.
    async fn stopped(self, stop_master: CancellationToken) -> Result<(), Failure> {
        let ended = join_all(self.nodes.into_iter().map(DevNode::stopped)).await;
        stop_master.cancel();
        self.master.stopped().await;
        ended.into_iter().collect::<Result<(), _>>().map_err(advice)
    }
}

async fn start(
    config: &Config,
    args: &Dev,
    settings: vasto_master::MasterConfig,
    stop_master: CancellationToken,
    server: &Server,
) -> Result<Cluster, Failure> {
    let master = Master::start(settings, stop_master).await.map_err(advice)?;
    let share =
        |whole: ByteSize| ByteSize::b(whole.as_u64() / u64::from(args.nodes)).max(SHARE_MIN);
    let mut config = config.clone();
    config.node.master = format!("http://{}", master.listen);
    config.node.cache = share(config.node.cache);
    config.node.write_buffer = share(config.node.write_buffer);
    let starts = (1..=args.nodes).map(|number| {
        let mut config = config.clone();
        config.node.zone.get_or_insert_with(|| format!("zone-{number}"));
        let stop = server.stop.clone();
        async move {
            let dir = directory(&args.dir.join(format!("node-{number}"))).map_err(|error| {
                Failure::new(format!("{error:#}"))
                    .hint("choose a directory that you may write to with --dir")
            })?;
            let threads = Threads::start(&format!("node-{number}"))?;
            let node = threads
                .run(Node::start(node_config(&config, &dir), stop))
                .await?
                .map_err(advice)?;
            Ok::<_, Failure>(DevNode { node, threads })
        }
    });
    let nodes = try_join_all(starts).await?;
    Ok(Cluster { master, nodes })
}

/// Creates the directory and returns its absolute path, which a `file://` URL needs.
fn directory(dir: &Path) -> anyhow::Result<PathBuf> {
    let cannot = || format!("cannot make the directory {}", dir.display());
    std::fs::create_dir_all(dir).with_context(cannot)?;
    dir.canonicalize().with_context(cannot)
}
