//! Outcomes of commands: the answers of `keyspace compact|checkpoint|delete|evict|restore` and
//! `bucket repair`.

use serde::Serialize;
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId, ReplicaId, ShardId};

use super::plan::RunningDoc;

/// `keyspace compact`, `keyspace checkpoint`: the nodes that have executed the command.
#[derive(Serialize)]
pub(crate) struct ExecutedDoc {
    pub(crate) keyspace: String,
    pub(crate) nodes: Vec<NodeId>,
}

/// `keyspace delete`.
#[derive(Serialize)]
pub(crate) struct DeletedDoc {
    pub(crate) keyspace_id: KeyspaceId,
    pub(crate) name: String,
    /// The bucket holds everything that was acknowledged.
    pub(crate) shipped: bool,
    pub(crate) state: &'static str,
    pub(crate) version: CatalogVersion,
}

/// `keyspace evict`.
#[derive(Serialize)]
pub(crate) struct EvictedDoc {
    pub(crate) name: String,
    pub(crate) replica_id: ReplicaId,
    /// `removed` or `draining`.
    pub(crate) state: &'static str,
    pub(crate) version: CatalogVersion,
}

/// `keyspace restore`: the operation as it begins.
#[derive(Serialize)]
pub(crate) struct RestoreDoc {
    #[serde(flatten)]
    pub(crate) operation: Option<RunningDoc>,
    /// Replicas that have not shipped what they hold.
    pub(crate) without: Vec<AbsentDoc>,
}

/// The replicas of one node that did not get a command.
#[derive(Serialize)]
pub(crate) struct AbsentDoc {
    pub(crate) node_id: NodeId,
    pub(crate) shards: Vec<ShardId>,
}

/// `bucket repair`: what was done, and what is still missing.
#[derive(Debug, Default, Serialize)]
pub(crate) struct RepairedDoc {
    pub(crate) cluster_id: String,
    /// `cluster.json` was written again.
    pub(crate) claimed: bool,
    /// Versions of catalogs, and names, that were written again.
    pub(crate) written: u64,
    /// Keyspaces that serve.
    pub(crate) keyspaces: Vec<String>,
    /// Keyspaces whose data was uploaded again.
    pub(crate) shipped_anew: Vec<String>,
    /// Keyspaces that have objects in the bucket, and of which nothing else is known.
    pub(crate) unknown_keyspaces: Vec<KeyspaceId>,
    /// Nodes that hold replicas and were not asked.
    pub(crate) away: Vec<NodeId>,
    pub(crate) missing: Vec<String>,
    pub(crate) corrupt: Vec<String>,
    pub(crate) warnings: Vec<String>,
}
