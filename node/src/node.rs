//! A whole node: directory, services, session and hosts, in their order of start and stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use vasto_core::address::{BadAddress, check_address};
use vasto_core::ids::NodeId;
use vasto_core::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_core::topology::NodeAddress;
use vasto_proto::incoming::Incoming;
use vasto_proto::v1::data_server::DataServer;
use vasto_proto::v1::replication_server::ReplicationServer;
use vasto_shipping::bucket::{Bucket, BucketError, BucketOptions};
use vasto_shipping::{RetryBudget, layout};

use crate::clock::{SharedClock, SystemClock};
use crate::data::DataService;
use crate::engine::{EngineBudget, EngineShared};
use crate::foreground::FOREGROUND;
use crate::host::HostContext;
use crate::lease::Leases;
use crate::manager::Manager;
use crate::node_dir::{DirError, NodeDir, NodeIdentity, read_json};
use crate::registry::NodeRegistry;
use crate::replication::ReplicationService;
use crate::session::{
    Joined, NODES_FILE, Session, SessionConfig, SessionContext, SessionError, join, keep,
};
use crate::ship::Pace;
use crate::yielding::{self, Yielding};
use crate::{caretaker, counting, flusher, open_files, stall, undecided};

/// Configuration of a node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// `http://host:port` of the master.
    pub master: String,
    /// The data directory.
    pub dir: PathBuf,
    /// Listen address; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Address that others connect to, when it is not the listen address.
    pub advertise: Option<String>,
    /// Zone of the node.
    pub zone: String,
    /// Memory and background work.
    pub budget: EngineBudget,
    /// Interval between two uploads of log chunks.
    pub ship_interval: Duration,
    /// Maximum number of concurrent blocking reads.
    pub read_threads: usize,
    /// Maximum number of hosted replicas.
    pub max_replicas: usize,
    /// Upper bound of the log bytes that a replica keeps for others.
    pub log_cap: u64,
    /// Upper bound of the upload rate of all checkpoints together, bytes a second; 0 sets no limit.
    pub ship_rate: u64,
    /// Upper bound of the bytes that all plans together read from the bucket and write to it on
    /// this node, bytes a second; 0 sets no limit.
    pub bulk_rate: u64,
    /// Times its calm, how long a request may take before bulk work yields; 0: bulk work takes all
    /// there is.
    pub background_latency_factor: f64,
    /// Offset added to the machine's clock, milliseconds: to test wrong clocks.
    pub clock_shift_ms: i64,
    /// Credentials and endpoint of the bucket.
    pub bucket_options: BucketOptions,
}

/// Why a node does not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory failed.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The session with the master failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The bucket is not the master's.
    #[error(
        "bucket {0} holds no cluster.json, so it is not the one that the master uses; let the URL and the endpoint \
         name the same bucket on both machines"
    )]
    OtherBucket(String),
    /// The advertised address is not usable.
    #[error("{0}; say under which address others reach this node with --advertise HOST:PORT")]
    Advertise(#[from] BadAddress),
    /// A thread could not be started.
    #[error(
        "a thread could not be started: {0}; raise the limit of processes (ulimit -u) and start again"
    )]
    Thread(std::io::Error),
    /// The listen address failed.
    #[error(
        "cannot listen on {listen}: {source}; stop what uses the port, or choose another --listen (port 0 picks a free one)"
    )]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The error.
        source: std::io::Error,
    },
}

/// How long a new node waits for its master, and a known one before it serves without it.
const FIRST_MASTER_WAIT: Duration = Duration::from_secs(10);

/// How long a node waits for its replicas to open before it reports ready.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);

/// Starts nodes.
pub struct Node;

/// A running node.
pub struct RunningNode {
    /// Its id.
    pub node_id: NodeId,
    /// Its listen address.
    pub listen: SocketAddr,
    /// Its cluster.
    pub cluster_id: String,
    /// The warning about what keeps the node from doing all of its work, as long as that lasts.
    pub trouble: watch::Receiver<Option<String>>,
    task: JoinHandle<Result<(), NodeError>>,
}

impl RunningNode {
    /// Waits until the node stops: after `shutdown`, or when the master refuses it for good.
    pub async fn stopped(self) -> Result<(), NodeError> {
        self.task.await.unwrap_or(Ok(()))
    }
}

impl Node {
    /// Starts a node: opens its directory, joins the master, hosts its replicas, serves; returns
    /// when the replicas that it remembers are open. A node that has been in a cluster before also
    /// starts without its master, from the catalogs that it remembers.
    pub async fn start(
        config: NodeConfig,
        shutdown: CancellationToken,
    ) -> Result<RunningNode, NodeError> {
        // A start that fails here leaves no trace.
        if let Some(address) = &config.advertise {
            check_address(address)?;
        }
        let (listener, listen) = listen(config.listen).await?;
        let fresh_id = NodeId(rand::random());
        let path = config.dir.clone();
        let dir = tokio::task::spawn_blocking(move || NodeDir::open(&path, fresh_id))
            .await
            .unwrap_or_else(|_| Err(DirError::Locked(config.dir.clone())))?;
        let identity = dir.identity().clone();
        let node_id = identity.node_id;
        let holds_replicas = !dir.replicas().is_empty();
        let dir = Arc::new(Mutex::new(dir));
        let session_config = SessionConfig {
            master: config.master.clone(),
            address: config.advertise.clone().unwrap_or_else(|| listen.to_string()),
            zone: config.zone.clone(),
            node_id,
            max_replicas: config.max_replicas,
        };
        let (first, joined) =
            first_session(&session_config, &dir, &identity, holds_replicas).await?;
        let bucket = Bucket::open(&joined.bucket_url, &config.bucket_options)?;
        let labels = [KeyValue::new("role", "node"), KeyValue::new("node", node_id.to_string())];
        vasto_shipping::metrics::observe(&bucket, &labels);
        if first.is_some() {
            check_bucket(&bucket, holds_replicas).await?;
        }
        let clock: SharedClock = Arc::new(SystemClock { shift_ms: config.clock_shift_ms });
        let registry = Arc::new(NodeRegistry::new(node_id, clock.clone(), config.read_threads));
        registry.set_cluster(&joined.cluster_id);
        registry.bulk.set_budget(config.bulk_rate);
        registry.bulk.observe(&labels);
        let factor = config.background_latency_factor;
        let yielding = Yielding::new(registry.bulk.clone(), &FOREGROUND, factor);
        yielding.iter().for_each(|yielding| yielding.observe(&labels));
        let leases_end = CancellationToken::new();
        let ended = leases_end.clone();
        let leases =
            Leases::start(&registry, move || ended.is_cancelled()).map_err(NodeError::Thread)?;
        let (engines, connections) = share_open_files(config.budget, config.max_replicas);
        let host_context = Arc::new(HostContext {
            registry: registry.clone(),
            engines: engines.clone(),
            bucket: bucket.clone(),
            ship_interval: config.ship_interval,
            clock,
            peers: Arc::default(),
            leases: Some(leases.clone()),
            log_cap: config.log_cap,
            pace: Arc::new(Pace::new(config.ship_rate)),
        });
        let manager = Arc::new(Manager::new(host_context, dir.clone(), config.max_replicas));
        remember(&config.dir, &dir, &registry, &manager).await?;
        let opening = manager.clone();
        let trouble = registry.trouble();
        let task = tokio::spawn(serve(Running {
            registry,
            engines,
            manager,
            bucket,
            dir,
            session_config,
            first,
            listener,
            connections,
            data_dir: config.dir,
            shutdown: shutdown.clone(),
            leases,
            leases_end,
            yielding,
        }));
        // A node that reports ready has its replicas open, unless that takes very long.
        let opened = tokio::time::timeout(OPEN_PATIENCE, opening.opened());
        if let Some(Err(_)) = shutdown.run_until_cancelled(opened).await {
            tracing::warn!("some replicas are still being opened; they serve as soon as they are");
        }
        Ok(RunningNode { node_id, listen, cluster_id: joined.cluster_id, trouble, task })
    }
}

async fn listen(on: SocketAddr) -> Result<(TcpListener, SocketAddr), NodeError> {
    let failed = |source| NodeError::Listen { listen: on, source };
    let listener = TcpListener::bind(on).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Divides the files that this process may open; returns the engines' share, and the number of
/// connections.
fn share_open_files(budget: EngineBudget, max_replicas: usize) -> (EngineShared, usize) {
    let limit = open_files::raise();
    let tables_each = open_files::tables_each(limit, max_replicas);
    let connections = open_files::connections(limit);
    tracing::info!(limit, tables_each, connections, "open files");
    (EngineShared::new(budget).with_tables_open(tables_each), connections)
}

async fn first_session(
    config: &SessionConfig,
    dir: &Mutex<NodeDir>,
    identity: &NodeIdentity,
    holds_replicas: bool,
) -> Result<(Option<Session>, Joined), NodeError> {
    let deadline = tokio::time::Instant::now() + FIRST_MASTER_WAIT;
    loop {
        match join(config, dir).await {
            Ok(session) => {
                let joined = session.joined.clone();
                return Ok((Some(session), joined));
            }
            Err(error) if error.is_fatal() => return Err(error.into()),
            // Nothing would be served: the operator has named the master of another cluster.
            Err(error @ SessionError::OtherCluster(_)) if !holds_replicas => {
                return Err(error.into());
            }
            Err(error) if !identity.cluster_id.is_empty() => {
                tracing::info!(%error, "serving from what this node remembers");
                let (cluster_id, bucket_url) =
                    (identity.cluster_id.clone(), identity.bucket_url.clone());
                return Ok((None, Joined { cluster_id, bucket_url }));
            }
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Applies what the directory remembers of the cluster: the addresses of the nodes and the catalog
/// versions.
async fn remember(
    path: &Path,
    dir: &Mutex<NodeDir>,
    registry: &NodeRegistry,
    manager: &Arc<Manager>,
) -> Result<(), NodeError> {
    let addresses: Option<Vec<(NodeId, String, String)>> =
        read_json(&path.join(NODES_FILE)).unwrap_or_default();
    let addresses = addresses.unwrap_or_default().into_iter();
    registry.set_addresses(
        addresses.map(|(id, address, zone)| (id, NodeAddress { address, zone })).collect(),
    );
    let (remembered, damaged) = dir.lock().catalogs()?;
    for error in damaged {
        tracing::error!(%error, "a keyspace's catalog version is not known until the master sends it");
    }
    for catalog in remembered {
        let catalog = Arc::new(catalog);
        if let Err(error) = manager.apply_catalog(catalog.clone(), true).await {
            // A fault of one keyspace does not affect the others.
            tracing::error!(%error, keyspace = catalog.keyspace.0, "a remembered catalog version cannot be applied yet");
            let manager = manager.clone();
            tokio::spawn(async move { manager.apply_catalog_at_last(catalog).await });
        }
    }
    Ok(())
}

/// Checks the bucket of a node that has a session. Replicas on this node are served whatever the
/// bucket answers; without any, a bucket that cannot be reached now does not matter either, but
/// another cluster's bucket does.
async fn check_bucket(bucket: &Bucket, holds_replicas: bool) -> Result<(), NodeError> {
    if holds_replicas {
        let bucket = bucket.clone();
        // Ends within the time-out of a probe.
        tokio::spawn(async move {
            if let Err(error) = probe(&bucket).await {
                tracing::warn!(%error, "the bucket cannot be used now; this node serves, and ships when it can");
            }
        });
        return Ok(());
    }
    match probe(bucket).await {
        Err(NodeError::Bucket(
            error @ (BucketError::Unreachable { .. } | BucketError::ClockSkewed { .. }),
        )) => {
            tracing::warn!(%error, "the bucket cannot be reached now; this node ships when it can");
            Ok(())
        }
        result => result,
    }
}

/// Checks that this node reaches the bucket of its cluster and has access.
async fn probe(bucket: &Bucket) -> Result<(), NodeError> {
    match bucket.with_retry(RetryBudget::probe()).head(&layout::cluster()).await? {
        Some(_) => Ok(()),
        None => Err(NodeError::OtherBucket(bucket.url().to_owned())),
    }
}

struct Running {
    registry: Arc<NodeRegistry>,
    engines: EngineShared,
    manager: Arc<Manager>,
    bucket: Bucket,
    dir: Arc<Mutex<NodeDir>>,
    session_config: SessionConfig,
    first: Option<Session>,
    listener: TcpListener,
    connections: usize,
    data_dir: PathBuf,
    shutdown: CancellationToken,
    leases: Leases,
    leases_end: CancellationToken,
    yielding: Option<Yielding>,
}

async fn serve(running: Running) -> Result<(), NodeError> {
    let Running { registry, engines, manager, bucket, dir, session_config, first, .. } = running;
    let Running { listener, connections, data_dir, shutdown, leases, leases_end, .. } = running;
    let Running { yielding, .. } = running;
    let stop_serving = CancellationToken::new();
    let data = DataServer::new(DataService::new(registry.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let tails = ReplicationServer::new(ReplicationService::new(registry.clone(), Some(leases)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .add_service(data)
        .add_service(tails);
    let server = tokio::spawn({
        let stop = stop_serving.clone();
        async move {
            let serving = server.serve_with_incoming(Incoming::new(listener, connections));
            tokio::select! {
                () = stop.cancelled() => {}
                result = serving => if let Err(error) = result {
                    tracing::error!(%error, "the data service ended");
                }
            }
        }
    });
    let flusher = tokio::spawn(flusher::run(registry.clone(), engines, stop_serving.clone()));
    let caretaker =
        caretaker::run(registry.clone(), manager.clone(), data_dir.clone(), stop_serving.clone());
    let caretaker = tokio::spawn(caretaker);
    let counting = tokio::spawn(counting::run(registry.clone(), stop_serving.clone()));
    let yielding = yielding::run(yielding, registry.clone(), stop_serving.clone());
    let yielding = tokio::spawn(yielding);
    let undecided =
        undecided::run(registry.clone(), manager.clone(), bucket.clone(), stop_serving.clone());
    let undecided = tokio::spawn(undecided);
    let watched = (registry.clone(), stop_serving.clone());
    let span = tracing::Span::current();
    // Ends with the service; runs on its own thread, because all tasks may be busy.
    std::thread::spawn(move || {
        let _named = span.entered();
        let (registry, stop) = watched;
        let after_pause = |pause: Duration| {
            tracing::info!(ms = pause.as_millis() as u64, "the process stood still");
            registry.stop_serving_what_has_peers();
        };
        stall::watch(&registry.stall, after_pause, || stop.is_cancelled());
    });
    let (fatal_sender, fatal) = oneshot::channel();
    let session_cancel = CancellationToken::new();
    let context = SessionContext { registry, manager: manager.clone(), bucket, dir: data_dir };
    let session = tokio::spawn(keep(
        context,
        session_config,
        dir,
        first,
        session_cancel.clone(),
        fatal_sender,
    ));
    let end = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        Ok(error) = fatal => {
            tracing::error!(%error, "the node stops");
            Err(NodeError::Session(error))
        }
    };
    // Hand authority over, stop accepting requests, ship the pending log and flush, then leave.
    manager.hand_over_authority().await;
    stop_serving.cancel();
    let _ = server.await;
    let _ = flusher.await;
    let _ = counting.await;
    let _ = yielding.await;
    let _ = caretaker.await;
    let _ = undecided.await;
    manager.stop().await;
    leases_end.cancel();
    session_cancel.cancel();
    let _ = session.await;
    end
}
