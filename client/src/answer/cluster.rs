//! Documents of `vasto cluster` and `vasto node`.

use serde::Deserialize;

use super::keyspace::KeyspaceSummary;

/// The state of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClusterStatus {
    /// The id of the cluster.
    pub cluster_id: String,
    /// The term of the master.
    pub term: u64,
    /// The nodes.
    pub nodes: Vec<NodeStatus>,
    /// The keyspaces.
    pub keyspaces: Vec<KeyspaceSummary>,
    /// Sentences for the operator, each with a remedy.
    pub warnings: Vec<String>,
    /// The master that answered.
    pub master: Option<MasterStatus>,
    /// Estimated cost of the bucket.
    pub bill: Option<Bill>,
}

/// The result of a check of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ClusterCheck {
    /// There is nothing to warn of.
    pub ok: bool,
    /// Every warning, and every check without one.
    pub findings: Vec<Finding>,
}

/// One finding of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Finding {
    /// What was checked: `bucket`, `nodes`, `shards`, `shipping`, `replicas`, `operations`.
    pub check: String,
    /// There was nothing to warn of.
    pub ok: bool,
    /// The warning, with a remedy.
    pub message: String,
}

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its id, `n-…`.
    pub node_id: String,
    /// Where it listens, `host:port`; `None` before it has registered with this master.
    pub address: Option<String>,
    /// Its zone, empty if it has none.
    pub zone: Option<String>,
    /// `live` or `away`.
    pub state: String,
    /// Bytes of its disk that are in use.
    pub disk_used: Option<u64>,
    /// Bytes of its disk that are free.
    pub disk_free: Option<u64>,
    /// Id of its process.
    pub pid: Option<u32>,
    /// Number of replicas on it.
    pub replicas: u64,
    /// Milliseconds since it was heard of last, 0 while it is live.
    pub away_ms: u64,
    /// True when the node gets no new replicas.
    pub cordoned: bool,
    /// Why its address does not answer the master, while it has a session.
    pub unreachable: Option<String>,
    /// The fault that keeps it from shipping to the bucket.
    pub bucket_trouble: Option<String>,
}

/// A master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct MasterStatus {
    /// Id of its process.
    pub pid: u32,
    /// URL of the bucket.
    pub bucket: Option<String>,
}

/// The estimated cost of the bucket.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Bill {
    /// The currency of the configured prices.
    pub currency: String,
    /// The estimate, in the currency.
    pub per_month: BillPerMonth,
    /// Number of processes that were measured.
    pub processes: u64,
    /// The shortest measured time of these processes, seconds.
    pub measured_s: u64,
    /// Bytes in the bucket.
    pub stored_bytes: Option<u64>,
    /// The age of `stored_bytes`, seconds.
    pub stored_age_s: Option<u64>,
    /// Parts that the estimate leaves out, and how to learn them.
    pub note: Option<String>,
}

/// The parts of a monthly bill; `None` where the figures for an estimate are missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct BillPerMonth {
    /// For requests.
    pub requests: Option<f64>,
    /// For stored bytes.
    pub storage: Option<f64>,
    /// For bytes that leave the provider.
    pub egress: Option<f64>,
    /// In all.
    pub total: Option<f64>,
}
