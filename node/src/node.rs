//! A whole node: directory, services, session, hosts, in their order of start and stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use vasto_core::address::{BadAddress, check_address};
use vasto_core::ids::NodeId;
use vasto_core::limits::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX};
use vasto_core::topology::NodeAddress;
use vasto_proto::v1::data_server::DataServer;
use vasto_proto::v1::replication_server::ReplicationServer;
use vasto_shipping::bucket::{Bucket, BucketError, BucketOptions};
use vasto_shipping::{RetryBudget, layout};

use crate::clock::{SharedClock, SystemClock};
use crate::core::NodeCore;
use crate::data::DataService;
use crate::engine::{EngineBudget, EngineShared};
use crate::flusher;
use crate::host::HostContext;
use crate::manager::Manager;
use crate::node_dir::{DirError, NodeDir, read_json};
use crate::open_files;
use crate::pause;
use crate::replication::ReplicationService;
use crate::session::{Joined, NODES_FILE, Session, SessionConfig, SessionContext, SessionError, join, keep};
use crate::ship::Pace;

/// How a node runs.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// `http://host:port` of the master.
    pub master: String,
    /// The data directory.
    pub dir: PathBuf,
    /// Where to listen; port 0 picks a free one.
    pub listen: SocketAddr,
    /// What others connect to, when it is not the listen address.
    pub advertise: Option<String>,
    /// Where the node stands.
    pub zone: String,
    /// Memory and background work.
    pub budget: EngineBudget,
    /// Between two uploads of log chunks.
    pub ship_interval: Duration,
    /// Reads that may block, at a time.
    pub read_threads: usize,
    /// Most replicas here.
    pub max_replicas: usize,
    /// Bytes of log that a replica keeps for others, at most.
    pub log_cap: u64,
    /// Bytes a second that all uploads of checkpoints together take at most; 0 sets no limit.
    pub ship_rate: u64,
    /// Added to the machine's clock, milliseconds: to try what wrong clocks do.
    pub clock_shift_ms: i64,
    /// Credentials and endpoint of the bucket.
    pub bucket_options: BucketOptions,
}

/// Why a node does not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The master.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The bucket is not the master's.
    #[error(
        "bucket {0} holds no cluster.json, so it is not the one that the master uses; let the URL and the endpoint \
         name the same bucket on both machines"
    )]
    OtherBucket(String),
    /// The address that others are told.
    #[error("{0}; say under which address others reach this node with --advertise HOST:PORT")]
    Advertise(#[from] BadAddress),
    /// The listen address.
    #[error(
        "cannot listen on {listen}: {source}; stop what uses the port, or choose another --listen (port 0 picks a free one)"
    )]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// How long a new node waits for its master, and a known one before it serves without it.
const FIRST_MASTER_WAIT: Duration = Duration::from_secs(10);

/// How long a node waits for its replicas to open before it says that it is ready.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);

/// Starts nodes.
pub struct Node;

/// A node that serves.
pub struct RunningNode {
    /// Its id.
    pub node_id: NodeId,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its cluster.
    pub cluster_id: String,
    task: JoinHandle<Result<(), NodeError>>,
}

impl RunningNode {
    /// Waits for its end: after `shutdown`, or when the master refuses it for good.
    pub async fn stopped(self) -> Result<(), NodeError> {
        self.task.await.unwrap_or(Ok(()))
    }
}

impl Node {
    /// Starts a node: opens its directory, joins the master, hosts its replicas, serves; answers when
    /// those that it remembers are open. A node that has been in a cluster before also starts without its
    /// master, from what it remembers.
    pub async fn start(config: NodeConfig, shutdown: CancellationToken) -> Result<RunningNode, NodeError> {
        // A start that cannot serve leaves no trace.
        if let Some(address) = &config.advertise {
            check_address(address)?;
        }
        let listen_failed = |source| NodeError::Listen { listen: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen_failed)?;
        let listen = listener.local_addr().map_err(listen_failed)?;
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
            first_session(&session_config, &dir, identity.cluster_id.clone(), identity.bucket_url.clone()).await?;
        let bucket = Bucket::open(&joined.bucket_url, &config.bucket_options)?;
        let labels = [KeyValue::new("role", "node"), KeyValue::new("node", node_id.to_string())];
        vasto_shipping::metrics::observe(&bucket, &labels);
        if first.is_some() && holds_replicas {
            // What is here is served whatever the bucket says. Ends within the patience of a probe.
            let bucket = bucket.clone();
            tokio::spawn(async move {
                if let Err(error) = look_at(&bucket).await {
                    tracing::warn!(%error, "the bucket cannot be used now; this node serves, and ships when it can");
                }
            });
        } else if first.is_some() {
            match look_at(&bucket).await {
                Err(NodeError::Bucket(error @ BucketError::Unreachable { .. })) => {
                    tracing::warn!(%error, "the bucket cannot be reached now; this node ships when it can");
                }
                looked => looked?,
            }
        }
        let clock: SharedClock = Arc::new(SystemClock { shift_ms: config.clock_shift_ms });
        let core = Arc::new(NodeCore::new(node_id, clock.clone(), config.read_threads));
        let limit = open_files::raise();
        let tables_each = open_files::tables_each(limit, config.max_replicas);
        tracing::info!(limit, tables_each, "open files");
        let engines = EngineShared::new(config.budget).with_tables_open(tables_each);
        let host_context = Arc::new(HostContext {
            core: core.clone(),
            engines: engines.clone(),
            bucket: bucket.clone(),
            ship_interval: config.ship_interval,
            clock,
            peers: Arc::default(),
            log_cap: config.log_cap,
            pace: Arc::new(Pace::new(config.ship_rate)),
        });
        let manager = Arc::new(Manager::new(host_context, dir.clone(), config.max_replicas));
        let known: Option<Vec<(NodeId, String, String)>> = read_json(&config.dir.join(NODES_FILE)).unwrap_or_default();
        let known = known.unwrap_or_default().into_iter();
        core.set_addresses(known.map(|(id, address, zone)| (id, NodeAddress { address, zone })).collect());
        let remembered = dir.lock().catalogs()?;
        for catalog in remembered {
            manager.obey(Arc::new(catalog), true).await?;
        }
        let opening = manager.clone();
        let task = tokio::spawn(serve(Running {
            core,
            engines,
            manager,
            bucket,
            dir,
            session_config,
            first,
            listener,
            data_dir: config.dir,
            shutdown: shutdown.clone(),
        }));
        // Whoever is told that it is ready finds its replicas open, unless that takes very long.
        let opened = tokio::time::timeout(OPEN_PATIENCE, opening.opened());
        if let Some(Err(_)) = shutdown.run_until_cancelled(opened).await {
            tracing::warn!("some replicas are still being opened; they serve as soon as they are");
        }
        Ok(RunningNode { node_id, listen, cluster_id: joined.cluster_id, task })
    }
}

async fn first_session(
    config: &SessionConfig,
    dir: &Mutex<NodeDir>,
    known_cluster: String,
    known_bucket: String,
) -> Result<(Option<Session>, Joined), NodeError> {
    let deadline = tokio::time::Instant::now() + FIRST_MASTER_WAIT;
    loop {
        match join(config, dir).await {
            Ok(session) => {
                let joined = session.joined.clone();
                return Ok((Some(session), joined));
            }
            Err(error) if error.is_fatal() => return Err(error.into()),
            Err(_) if !known_cluster.is_empty() => {
                tracing::info!("the master is not reachable; serving from what this node remembers");
                return Ok((None, Joined { cluster_id: known_cluster, bucket_url: known_bucket }));
            }
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Finds out that this node sees the bucket of its cluster, and may.
async fn look_at(bucket: &Bucket) -> Result<(), NodeError> {
    match bucket.with_retry(RetryBudget::probe()).head(&layout::cluster()).await? {
        Some(_) => Ok(()),
        None => Err(NodeError::OtherBucket(bucket.url().to_owned())),
    }
}

struct Running {
    core: Arc<NodeCore>,
    engines: EngineShared,
    manager: Arc<Manager>,
    bucket: Bucket,
    dir: Arc<Mutex<NodeDir>>,
    session_config: SessionConfig,
    first: Option<Session>,
    listener: TcpListener,
    data_dir: PathBuf,
    shutdown: CancellationToken,
}

async fn serve(running: Running) -> Result<(), NodeError> {
    let Running { core, engines, manager, bucket, dir, session_config, first, listener, data_dir, shutdown } = running;
    let stop_serving = CancellationToken::new();
    let data = DataServer::new(DataService::new(core.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let tails = ReplicationServer::new(ReplicationService::new(core.clone()))
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
            // The builder's own option does not reach sockets that are accepted here.
            let serving = server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
            tokio::select! {
                () = stop.cancelled() => {}
                result = serving => if let Err(error) = result {
                    tracing::error!(%error, "the data service ended");
                }
            }
        }
    });
    let flusher = tokio::spawn(flusher::run(core.clone(), engines, stop_serving.clone()));
    let watched = (core.clone(), stop_serving.clone());
    // Ends with the service; a thread of its own, because tasks may all be busy.
    std::thread::spawn(move || {
        let (core, stop) = watched;
        let after_pause = |pause: Duration| {
            tracing::info!(ms = pause.as_millis() as u64, "the process stood still");
            core.stop_serving_what_has_peers();
        };
        pause::watch(&core.pause, after_pause, || stop.is_cancelled());
    });
    let (fatal_sender, fatal) = oneshot::channel();
    let session_cancel = CancellationToken::new();
    let context = SessionContext { core, manager: manager.clone(), bucket, dir: data_dir };
    let session = tokio::spawn(keep(context, session_config, dir, first, session_cancel.clone(), fatal_sender));
    let end = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        Ok(error) = fatal => {
            tracing::error!(%error, "the node stops");
            Err(NodeError::Session(error))
        }
    };
    // Stop taking work, then ship what is due and flush, then leave.
    stop_serving.cancel();
    let _ = server.await;
    let _ = flusher.await;
    manager.stop().await;
    session_cancel.cancel();
    let _ = session.await;
    end
}
