//! The sections of the configuration, and the default of every field.
//!
//! Invariant: the field list in `field` names the same fields; a test compares them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use vasto_observability::LogFormat;
use vasto_shipping::Prices;

use super::values::{self, OnOff, Secret};

/// All configuration sections.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// `[bucket]`
    pub bucket: BucketSection,
    /// `[master]`
    pub master: MasterSection,
    /// `[node]`
    pub node: NodeSection,
    /// `[log]`
    pub log: LogSection,
    /// `[security]`
    pub security: SecuritySection,
    /// `[prices]`
    pub prices: PricesSection,
}

/// The object store. Values that are not set come from the standard variables of the cloud.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct BucketSection {
    /// `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`
    pub url: Option<String>,
    /// The address of an S3-compatible server.
    pub endpoint: Option<String>,
    /// The region of the bucket.
    pub region: Option<String>,
    /// The id of the access key.
    pub access_key_id: Option<Secret<String>>,
    /// The access key.
    pub secret_access_key: Option<Secret<String>>,
    /// Whether the endpoint may be reached without TLS.
    pub allow_http: bool,
    /// Checkpoints of each replica that are always kept.
    #[serde(with = "values::count")]
    pub keep_checkpoints: usize,
    /// Length of the window in which every point in time can be restored.
    #[serde(with = "values::period")]
    pub keep_for: Duration,
    /// Objects younger than this are never deleted.
    #[serde(with = "values::period")]
    pub min_age: Duration,
    /// Interval between two garbage collections; 0s: never.
    #[serde(with = "values::period")]
    pub gc_interval: Duration,
}

impl Default for BucketSection {
    fn default() -> BucketSection {
        let day = Duration::from_secs(24 * 3600);
        BucketSection {
            url: None,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            allow_http: false,
            keep_checkpoints: 2,
            keep_for: 7 * day,
            min_age: day,
            gc_interval: day,
        }
    }
}

/// The master.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct MasterSection {
    /// Address on which the master serves.
    pub listen: SocketAddr,
    /// Address of `/healthz`, `/readyz` and `/metrics`.
    pub admin_listen: SocketAddr,
    /// Silence after which a node counts as dead.
    #[serde(with = "values::duration")]
    pub node_silence: Duration,
    /// Absence of a node after which other nodes rebuild its replicas; 0s: never.
    #[serde(with = "values::period")]
    pub replace_after: Duration,
    /// Whether replicas move between nodes without a request while the cluster is out of balance.
    #[serde(with = "values::word")]
    pub rebalance: OnOff,
    /// Maximum number of replicas that a rebalance moves at a time.
    #[serde(with = "values::count")]
    pub moves_at_once: usize,
}

impl Default for MasterSection {
    fn default() -> MasterSection {
        MasterSection {
            listen: loopback(8278),
            admin_listen: loopback(0),
            node_silence: Duration::from_secs(10),
            replace_after: Duration::from_secs(600),
            rebalance: OnOff::Off,
            moves_at_once: vasto_core::limits::MOVES_AT_ONCE,
        }
    }
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NodeSection {
    /// The URL of the master.
    pub master: String,
    /// The data directory.
    pub dir: Option<PathBuf>,
    /// Address on which the node serves.
    pub listen: SocketAddr,
    /// HOST:PORT under which other servers reach the node, when that is not `listen`.
    pub advertise: Option<String>,
    /// The failure domain; replicas of a shard go to distinct zones.
    pub zone: Option<String>,
    /// Address of `/healthz`, `/readyz` and `/metrics`.
    pub admin_listen: SocketAddr,
    /// The block cache that all replicas share.
    #[serde(with = "values::size")]
    pub cache: ByteSize,
    /// The memory for unflushed writes that all replicas share.
    #[serde(with = "values::size")]
    pub write_buffer: ByteSize,
    /// Flushes and compactions that run concurrently.
    #[serde(with = "values::count")]
    pub background_jobs: usize,
    /// Bytes a second that background work may write; 0 sets no limit.
    #[serde(with = "values::size")]
    pub rate_limit: ByteSize,
    /// Interval at which new log records are shipped to the bucket.
    #[serde(with = "values::duration")]
    pub ship_interval: Duration,
    /// Bytes a second that uploads of checkpoints take, all replicas of the node together; 0 sets
    /// no limit.
    #[serde(with = "values::size")]
    pub ship_rate: ByteSize,
    /// Bytes a second that structural changes read from the bucket and write to it, all of the node
    /// together; 0 sets no limit.
    #[serde(with = "values::size")]
    pub bulk_rate: ByteSize,
    /// How many times as long as without bulk work 99 of 100 requests may take before that yields:
    /// structural changes and uploads of checkpoints; 0 lets them take all there is.
    #[serde(with = "values::factor")]
    pub background_latency_factor: f64,
    /// Threads for reads that wait for the disk.
    #[serde(with = "values::count")]
    pub read_threads: usize,
    /// Maximum number of replicas on the node.
    #[serde(with = "values::count")]
    pub max_replicas: usize,
    /// Maximum bytes of log that a replica keeps for peers that have not read it.
    #[serde(with = "values::size")]
    pub max_log: ByteSize,
    /// Milliseconds added to the machine's clock, to test wrong clocks; 0 otherwise.
    pub clock_shift_ms: i64,
}

impl Default for NodeSection {
    fn default() -> NodeSection {
        NodeSection {
            master: "http://127.0.0.1:8278".to_owned(),
            dir: None,
            listen: loopback(0),
            advertise: None,
            zone: None,
            admin_listen: loopback(0),
            cache: ByteSize::mib(256),
            write_buffer: ByteSize::mib(128),
            background_jobs: 2,
            rate_limit: ByteSize::b(0),
            ship_interval: Duration::from_secs(10),
            ship_rate: ByteSize::b(0),
            bulk_rate: ByteSize::b(0),
            background_latency_factor: 2.0,
            read_threads: 4,
            max_replicas: vasto_core::limits::NODE_REPLICAS_MAX,
            max_log: ByteSize::b(vasto_core::limits::BINLOG_BYTES_MAX),
            clock_shift_ms: 0,
        }
    }
}

/// Logs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogSection {
    /// A filter such as `info,vasto_node=debug`.
    pub filter: String,
    /// The form of log lines.
    #[serde(with = "values::word")]
    pub format: LogFormat,
}

impl Default for LogSection {
    fn default() -> LogSection {
        LogSection { filter: "info".to_owned(), format: LogFormat::Auto }
    }
}

/// Permissions.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SecuritySection {
    /// Serve on other addresses than loopback without TLS and authentication.
    pub insecure: bool,
}

/// Prices of the bucket's provider; `vasto cluster status` estimates the bill from these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct PricesSection {
    /// The currency of all prices.
    pub currency: String,
    /// Price of 1,000 PUT requests.
    #[serde(with = "values::price")]
    pub put_per_1000: f64,
    /// Price of 1,000 GET or HEAD requests.
    #[serde(with = "values::price")]
    pub get_per_1000: f64,
    /// Price of 1,000 LIST requests.
    #[serde(with = "values::price")]
    pub list_per_1000: f64,
    /// Price of one GiB stored for a month.
    #[serde(with = "values::price")]
    pub gib_month: f64,
    /// Price of one GiB read from the bucket.
    #[serde(with = "values::price")]
    pub egress_gib: f64,
}

impl Default for PricesSection {
    fn default() -> PricesSection {
        let prices = Prices::default();
        PricesSection {
            currency: prices.currency,
            put_per_1000: prices.put_per_1000,
            get_per_1000: prices.get_per_1000,
            list_per_1000: prices.list_per_1000,
            gib_month: prices.gib_month,
            egress_gib: prices.egress_gib,
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
