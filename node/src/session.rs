//! The node's session with the master: sends reports, receives catalogs and commands.
//!
//! **Invariant:** losing the master changes nothing for readers and writers; the session is
//! re-established with jittered pauses, and both sides send everything again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use vasto_core::catalog::Catalog;
use vasto_core::error::ErrorCode;
use vasto_core::ids::NodeId;
use vasto_core::limits::{
    CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_BYTES_MAX, REPORT_INTERVAL,
};
use vasto_core::topology::NodeAddress;
use vasto_proto::v1;
use vasto_proto::v1::master_message::Message as FromMaster;
use vasto_proto::v1::membership_client::MembershipClient;
use vasto_proto::v1::node_message::Message as ToMaster;
use vasto_shipping::Usage;
use vasto_shipping::bucket::Bucket;

use crate::clock::Sparse;
use crate::clock::now_ms;
use crate::command;
use crate::manager::Manager;
use crate::node_dir::{DirError, NodeDir, write_json};
use crate::rates;
use crate::registry::NodeRegistry;
use crate::reported::Reported;

/// Longest pause between two attempts to reach the master.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// While the node is idle, one report in so many polls the replicas.
const POLLS_WHILE_IDLE: u32 = 8;
/// Minimum interval between reports, so that a busy tail does not flood the master.
const REPORT_GAP: Duration = Duration::from_millis(2);

/// File in the data directory with the last known addresses of the nodes.
pub(crate) const NODES_FILE: &str = "nodes.json";

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The master is not reachable; a retry can succeed.
    #[error(
        "the master at {master} is not reachable: {reason}; is it running? start one with `vasto serve master`"
    )]
    Unreachable {
        /// Its URL.
        master: String,
        /// The error.
        reason: String,
    },
    /// The master refuses this node.
    #[error("the master refused this node: {0}")]
    Rejected(String),
    /// The master does not know the cluster that this node has served in: it may have started with
    /// the wrong bucket, or its bucket may have been emptied. The node continues to serve, and
    /// retries.
    #[error("the master refused this node, which serves on from what it remembers: {0}")]
    OtherCluster(String),
    /// The URL is not valid.
    #[error("`{0}` is not a master URL; it looks like http://127.0.0.1:8278")]
    BadUrl(String),
    /// The data directory does not fit the cluster.
    #[error(transparent)]
    Dir(#[from] DirError),
}

impl SessionError {
    /// Returns true when the node must stop instead of retrying.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, SessionError::Unreachable { .. } | SessionError::OtherCluster(_))
    }
}

/// The master's answer to a join.
#[derive(Debug, Clone)]
pub(crate) struct Joined {
    /// The cluster.
    pub cluster_id: String,
    /// The bucket to ship to.
    pub bucket_url: String,
}

/// Parameters with which a node joins a master.
pub(crate) struct SessionConfig {
    /// `http://host:port` of the master.
    pub master: String,
    /// Address that clients and other nodes connect to.
    pub address: String,
    /// Zone of the node.
    pub zone: String,
    /// This node.
    pub node_id: NodeId,
    /// Maximum number of hosted replicas.
    pub max_replicas: usize,
}

/// The opened stream of a session.
pub(crate) struct Session {
    to_master: mpsc::Sender<v1::NodeMessage>,
    from_master: tonic::Streaming<v1::MasterMessage>,
    /// The master's answer to the join.
    pub joined: Joined,
}

async fn connect(master: &str) -> Result<Channel, SessionError> {
    let endpoint = Endpoint::from_shared(master.to_owned())
        .map_err(|_| SessionError::BadUrl(master.to_owned()))?;
    if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().port_u16().is_none() {
        return Err(SessionError::BadUrl(master.to_owned()));
    }
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .connect()
        .await
        .map_err(|error| unreachable(master, &error))
}

fn unreachable(master: &str, error: &dyn std::error::Error) -> SessionError {
    let cause = error.source().map_or_else(|| error.to_string(), |source| source.to_string());
    SessionError::Unreachable { master: master.to_owned(), reason: cause }
}

/// Sends the hello and waits for the master's answer.
pub(crate) async fn join(
    config: &SessionConfig,
    dir: &Mutex<NodeDir>,
) -> Result<Session, SessionError> {
    let channel = connect(&config.master).await?;
    let mut client = MembershipClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (to_master, receiver) = mpsc::channel(16);
    let hello = v1::Hello {
        node_id: config.node_id.0,
        cluster_id: dir.lock().identity().cluster_id.clone(),
        address: config.address.clone(),
        zone: config.zone.clone(),
        pid: std::process::id(),
        protocol: vasto_proto::PROTOCOL,
        max_replicas: u32::try_from(config.max_replicas).unwrap_or(u32::MAX),
    };
    let knows_its_cluster = !hello.cluster_id.is_empty();
    let lost = |reason: String| SessionError::Unreachable { master: config.master.clone(), reason };
    let first = v1::NodeMessage { message: Some(ToMaster::Hello(hello)) };
    to_master.send(first).await.map_err(|_| lost("the session ended at once".into()))?;
    let response = client
        .session(ReceiverStream::new(receiver))
        .await
        .map_err(|status| lost(status.to_string()))?;
    let mut from_master = response.into_inner();
    let joined = match from_master.message().await.map_err(|status| lost(status.to_string()))? {
        Some(v1::MasterMessage { message: Some(FromMaster::Welcome(welcome)) }) => {
            Joined { cluster_id: welcome.cluster_id, bucket_url: welcome.bucket_url }
        }
        Some(v1::MasterMessage { message: Some(FromMaster::Rejected(rejected)) }) => {
            let is = |code: ErrorCode| rejected.code == code as u32;
            return Err(match rejected.reason {
                reason if is(ErrorCode::Unavailable) => lost(reason),
                reason if is(ErrorCode::FailedPrecondition) && knows_its_cluster => {
                    SessionError::OtherCluster(reason)
                }
                reason => SessionError::Rejected(reason),
            });
        }
        _ => return Err(lost("it did not answer the hello".into())),
    };
    match dir.lock().join(&joined.cluster_id, &joined.bucket_url) {
        Err(error @ DirError::OtherCluster { .. }) => {
            return Err(SessionError::OtherCluster(error.to_string()));
        }
        taken => taken?,
    }
    Ok(Session { to_master, from_master, joined })
}

/// Context of a running session.
pub(crate) struct SessionContext {
    /// Shared state.
    pub registry: Arc<NodeRegistry>,
    /// Applies catalog versions.
    pub manager: Arc<Manager>,
    /// The bucket, for the request counts in reports.
    pub bucket: Bucket,
    /// The data directory, for the disk figures.
    pub dir: std::path::PathBuf,
}

/// Keeps a session with the master until `cancel` fires; rejoins whenever it is lost.
/// Returns early, through `fatal`, when the master refuses the node for good.
pub(crate) async fn keep(
    context: SessionContext,
    config: SessionConfig,
    dir: Arc<Mutex<NodeDir>>,
    first: Option<Session>,
    cancel: CancellationToken,
    fatal: oneshot::Sender<SessionError>,
) {
    let mut next = first;
    let mut pause = Duration::from_millis(50);
    let mut refused = String::new();
    loop {
        let session = match next.take() {
            Some(session) => Ok(session),
            None => tokio::select! {
                () = cancel.cancelled() => return,
                joined = join(&config, &dir) => joined,
            },
        };
        match session {
            Ok(session) => {
                pause = Duration::from_millis(50);
                refused.clear();
                tracing::info!(master = config.master, "joined the master");
                context.registry.set_joined(true);
                tokio::select! {
                    () = cancel.cancelled() => return,
                    reason = run(&context, session) => tracing::info!(reason, "the session with the master ended"),
                }
                context.registry.set_joined(false);
            }
            Err(error) if error.is_fatal() => {
                let _ = fatal.send(error);
                return;
            }
            Err(error @ SessionError::OtherCluster(_)) if error.to_string() != refused => {
                refused = error.to_string();
                tracing::error!(%error, "asking again until it is taken in");
            }
            Err(error) => tracing::debug!(%error, "no master"),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))) => {}
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}

async fn run(context: &SessionContext, session: Session) -> String {
    let Session { to_master, mut from_master, .. } = session;
    let reporter = report(context, to_master.clone());
    let listener = async {
        loop {
            match from_master.message().await {
                Ok(Some(v1::MasterMessage { message: Some(message) })) => {
                    if let Err(reason) = handle(context, message, &to_master).await {
                        return reason;
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => return "the master closed it".to_owned(),
                Err(status) => return status.to_string(),
            }
        }
    };
    tokio::select! {
        reason = reporter => reason,
        reason = listener => reason,
    }
}

async fn handle(
    context: &SessionContext,
    message: FromMaster,
    to_master: &mpsc::Sender<v1::NodeMessage>,
) -> Result<(), String> {
    match message {
        FromMaster::Keyspace(version) => {
            let catalog: Catalog = serde_json::from_str(&version.catalog_json)
                .map_err(|error| format!("a catalog version cannot be read: {error}"))?;
            let manager = context.manager.clone();
            // The manager applies the versions of a keyspace one at a time and refuses lower ones,
            // so the next message need not wait for this one's disk.
            tokio::spawn(async move { manager.apply_catalog_at_last(Arc::new(catalog)).await });
            Ok(())
        }
        FromMaster::Nodes(nodes) => {
            let decoded = |node: v1::NodeAddress| {
                (NodeId(node.node_id), NodeAddress { address: node.address, zone: node.zone })
            };
            let nodes: Vec<(NodeId, NodeAddress)> = nodes.nodes.into_iter().map(decoded).collect();
            let list: Vec<_> = nodes
                .iter()
                .map(|(id, node)| (*id, node.address.clone(), node.zone.clone()))
                .collect();
            context.registry.set_addresses(nodes.into_iter().collect());
            // A hint for a start without the master; the next list replaces it.
            let path = context.dir.join(NODES_FILE);
            let written = tokio::task::spawn_blocking(move || write_json(&path, &list)).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(%error, "the addresses of the other nodes could not be remembered");
            }
            Ok(())
        }
        FromMaster::Command(command) => {
            let (manager, to_master) = (context.manager.clone(), to_master.clone());
            let registry = context.registry.clone();
            // Ends with the command; a stopping node answers through its shippers.
            tokio::spawn(async move {
                let (catalogs, error) = match command::execute(&manager, &command).await {
                    Ok(catalogs) => (catalogs, String::new()),
                    Err(error) => (Vec::new(), error),
                };
                // Sizes and positions are others now; a node at rest reports them seldom.
                registry.report.notify_one();
                let done = v1::CommandDone { id: command.id, error, catalogs };
                let _ =
                    to_master.send(v1::NodeMessage { message: Some(ToMaster::Done(done)) }).await;
            });
            Ok(())
        }
        FromMaster::Presence(presence) => {
            context
                .registry
                .set_presence(presence.sent_ms, presence.gone.into_iter().map(NodeId).collect());
            Ok(())
        }
        FromMaster::Rejected(rejected) => {
            Err(format!("the master refused this node: {}", rejected.reason))
        }
        FromMaster::Welcome(_) => Ok(()),
    }
}

/// Reports changes, at once when something that the master waits for has happened.
async fn report(context: &SessionContext, to_master: mpsc::Sender<v1::NodeMessage>) -> String {
    let mut reported = Reported::new(Instant::now());
    let mut sparse = Sparse::one_in(POLLS_WHILE_IDLE);
    loop {
        let is_polled = !sparse.skips(context.registry.is_at_rest());
        let replicas = match is_polled {
            true => reported.due(context.manager.reports(), Instant::now()),
            false => Vec::new(),
        };
        let (disk_used, disk_free) = disk(&context.dir);
        let Usage { counts, elapsed } = context.bucket.usage();
        let bucket = v1::BucketRequests {
            get: counts.get,
            put: counts.put,
            list: counts.list,
            head: counts.head,
            delete: counts.delete,
            bytes_read: counts.bytes_read,
            bytes_written: counts.bytes_written,
            elapsed_ms: elapsed.as_millis() as u64,
        };
        let outage = context.bucket.outage();
        let outage = outage.map(|(since, why)| {
            format!("the bucket has not answered for {} s: {why}", since.as_secs())
        });
        let bucket_trouble =
            outage.or_else(|| context.manager.shipping_trouble()).unwrap_or_default();
        let report = v1::Report {
            replicas,
            disk_used,
            disk_free,
            bucket: Some(bucket),
            bucket_trouble,
            sent_ms: now_ms(),
            rates: Some(v1::Rates {
                download: rates::DOWNLOADS.rate(),
                rewrite: rates::REWRITES.rate(),
                export: rates::EXPORTS.rate(),
                upload: rates::UPLOADS.rate(),
            }),
            held_back_to: context.registry.bulk.held_back_to().unwrap_or_default(),
        };
        if to_master
            .send(v1::NodeMessage { message: Some(ToMaster::Report(report)) })
            .await
            .is_err()
        {
            return "the master is gone".into();
        }
        tokio::time::sleep(REPORT_GAP).await;
        tokio::select! {
            () = context.registry.report.notified() => sparse.wake(),
            () = tokio::time::sleep(REPORT_INTERVAL) => {}
        }
    }
}

/// Returns the `(used, free)` bytes of the file system that holds the directory.
fn disk(dir: &Path) -> (u64, u64) {
    match rustix::fs::statvfs(dir) {
        Ok(stat) => (
            stat.f_blocks.saturating_sub(stat.f_bfree) * stat.f_frsize,
            stat.f_bavail * stat.f_frsize,
        ),
        Err(_) => (0, 0),
    }
}
