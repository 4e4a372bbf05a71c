//! Starts and stops a master.
//!
//! **Invariant:** nothing is served before the bucket was probed, the cluster claimed and every
//! catalog loaded. To stop: cancel the token, drain the tasks, with a final deadline.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vasto_core::limits::{
    KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MASTER_CONNECTIONS_MAX, MASTER_DRAIN, MESSAGE_BYTES_MAX,
    SHUTDOWN_DEADLINE,
};
use vasto_proto::incoming::Incoming;
use vasto_proto::v1::master_server::MasterServer;
use vasto_proto::v1::membership_server::MembershipServer;
use vasto_shipping::gc::Retention;
use vasto_shipping::{Bucket, BucketError, BucketOptions, CatalogError, ClusterSettings, Prices};

use crate::cluster::{Cluster, Settings};
use crate::driver::adopt;
use crate::service::MasterService;
use crate::session::MembershipService;
use crate::{balancer, gauges, observer, upkeep};

/// The configuration of a master.
#[derive(Debug, Clone)]
pub struct MasterConfig {
    /// Where the cluster keeps its catalog and data: `file:///path`, `s3://bucket/prefix`, …
    pub bucket_url: String,
    /// Endpoint and credentials; the default takes them from the environment.
    pub bucket_options: BucketOptions,
    /// Where to listen; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The silence after which a node is away; [`NODE_SILENCE`](vasto_core::limits::NODE_SILENCE)
    /// unless there is a reason.
    pub node_silence: Duration,
    /// Whether to connect to the advertised address of a node that joins, and refuse it when
    /// nothing answers there.
    pub dial_back: bool,
    /// How long a node may be away before its replicas are replaced on others, when others serve
    /// and there is room; never when it is zero.
    pub replace_after: Duration,
    /// The retention of objects that nothing serves from any more.
    pub retention: Retention,
    /// The interval between garbage collections; zero disables them.
    pub gc_interval: Duration,
    /// The prices of the bucket's provider, to estimate the cost.
    pub prices: Prices,
    /// Whether replicas move without a request when the cluster is out of balance.
    pub rebalance: bool,
    /// The most replicas that a rebalance moves at a time; at least one.
    pub moves_at_once: usize,
}

/// Why a master does not start.
#[derive(Debug, thiserror::Error)]
pub enum MasterError {
    /// The bucket cannot be used.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The catalog in the bucket cannot be used.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The port is in use already.
    #[error("{0} is in use; stop what listens there, or choose another port with --listen")]
    PortInUse(SocketAddr),
    /// The address cannot be bound.
    #[error(
        "cannot listen on {address}: {source}; choose an address of this machine with --listen"
    )]
    Listen {
        /// The requested address.
        address: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
}

/// The coordinating process of a cluster.
pub struct Master;

/// A master that serves.
#[derive(Debug)]
pub struct RunningMaster {
    /// The address that it listens on, with the port that was picked.
    pub listen: SocketAddr,
    /// The cluster that owns the bucket's prefix.
    pub cluster_id: String,
    /// The fault that keeps it from serving more than the repair of its bucket, if there is one.
    pub trouble: watch::Receiver<Option<String>>,
    supervisor: JoinHandle<()>,
}

impl RunningMaster {
    /// Waits until the token that [`Master::start`] got is cancelled and everything is drained, at
    /// most [`SHUTDOWN_DEADLINE`] after that.
    pub async fn stopped(self) {
        if let Err(error) = self.supervisor.await {
            tracing::error!(%error, "the master's supervisor panicked");
        }
    }
}

impl Master {
    /// Binds the address, opens and probes the bucket, claims the cluster, loads every catalog, and
    /// serves until `shutdown` is cancelled.
    ///
    /// # Errors
    /// [`MasterError`]: the bucket cannot be used, or the address cannot be bound.
    pub async fn start(
        config: MasterConfig,
        shutdown: CancellationToken,
    ) -> Result<RunningMaster, MasterError> {
        // Bind first: a start that cannot serve leaves no objects in the bucket.
        let (listener, listen) = bind(config.listen).await?;
        let bucket = Bucket::open(&config.bucket_url, &config.bucket_options)?;
        bucket.probe().await?;
        let store = vasto_shipping::CatalogStore::new(bucket.clone());
        let claimed = store.claim_cluster(format!("c-{:016x}", rand::random::<u64>())).await;
        let (cluster_id, restricted) = match claimed {
            Ok(id) => (id, None),
            // The objects belong to a cluster: its nodes know which, and an administrator has to
            // confirm it.
            Err(CatalogError::Unclaimed { url, .. }) if is_of_a_cluster(&bucket).await? => (
                String::new(),
                Some(format!("{url} holds a cluster's objects, but its cluster.json is missing")),
            ),
            Err(error) => return Err(error.into()),
        };
        let ((catalogs, odd), decided) = match restricted {
            None => (
                store.load_all_with_warnings().await?,
                store.settings(&ClusterSettings::default()).await?,
            ),
            Some(_) => Default::default(),
        };

        let settings = Settings {
            dial_back: config.dial_back,
            node_silence: config.node_silence,
            retention: config.retention,
            prices: config.prices,
            rebalance: config.rebalance,
            moves_at_once: config.moves_at_once.max(1),
        };
        let cluster = Cluster::new(cluster_id.clone(), bucket, settings, shutdown.clone());
        restricted.into_iter().for_each(|why| cluster.restrict(why));
        cluster.note_odd_catalogs(odd);
        cluster.state().node_silence = Some(config.node_silence);
        cluster.state().replace_after_us =
            Some(config.replace_after.as_micros() as u64).filter(|after| *after > 0);
        cluster.learn_settings(decided);
        let loaded = catalogs.len();
        for catalog in catalogs {
            adopt(&cluster, catalog);
        }
        gauges::observe(&cluster);
        tracing::info!(%listen, cluster = cluster_id, bucket = cluster.bucket.url(), keyspaces = loaded, "master serves");

        cluster.tasks.spawn(observer::observe_regularly(cluster.clone()));
        if !config.gc_interval.is_zero() {
            cluster.tasks.spawn(upkeep::collect_regularly(cluster.clone(), config.gc_interval));
        }
        cluster.tasks.spawn(balancer::rebalance_always(cluster.clone()));
        let trouble = cluster.trouble();
        let supervisor = tokio::spawn(supervise(cluster, listener, shutdown));
        Ok(RunningMaster { listen, cluster_id, trouble, supervisor })
    }
}

/// Returns true when the prefix holds anything that only a cluster writes.
async fn is_of_a_cluster(bucket: &Bucket) -> Result<bool, BucketError> {
    for folder in ["catalog/", "names/", "gc-term/", "cluster/", "data/"] {
        if bucket
            .list(folder)
            .await?
            .iter()
            .any(|object| vasto_shipping::layout::is_known(&object.key))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), MasterError> {
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => MasterError::PortInUse(address),
        _ => MasterError::Listen { address, source },
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let listen = listener.local_addr().map_err(refused)?;
    Ok((listener, listen))
}

/// Serves until the token is cancelled, then drains.
async fn supervise(
    cluster: std::sync::Arc<Cluster>,
    listener: TcpListener,
    shutdown: CancellationToken,
) {
    let master = MasterServer::new(MasterService { cluster: cluster.clone() })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let membership = MembershipServer::new(MembershipService { cluster: cluster.clone() })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let mut serving = tokio::spawn(
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(master)
            .add_service(membership)
            .serve_with_incoming_shutdown(
                Incoming::new(listener, MASTER_CONNECTIONS_MAX),
                shutdown.clone().cancelled_owned(),
            ),
    );
    tokio::select! {
        // Both are ready when an idle server is stopped: the end of serving is no failure then.
        biased;
        () = shutdown.cancelled() => {
            if timeout(MASTER_DRAIN, &mut serving).await.is_err() {
                tracing::info!("peers that say nothing had connections open; closing them");
                serving.abort();
            }
        }
        ended = &mut serving => {
            tracing::error!(?ended, "the master's server ended by itself");
            shutdown.cancelled().await;
        }
    }
    cluster.tasks.close();
    if timeout(SHUTDOWN_DEADLINE, cluster.tasks.wait()).await.is_err() {
        tracing::warn!("tasks of the master were still running at the deadline");
    }
    tracing::info!("master stopped");
}
