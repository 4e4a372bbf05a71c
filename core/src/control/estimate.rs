//! What was estimated of an operation before it began: it is kept with the plan and with the report,
//! so that both can be compared.
//!
//! **Invariant:** the JSON of an estimate is persisted in the catalog: its names never change. A
//! figure has the name of that of the report which it estimates.

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;

/// The estimate of an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Estimate {
    /// Compressed bytes of the SSTs that the targets will hold for what moves.
    pub bytes_moved: u64,
    /// Body bytes of all GETs of the targets.
    pub bytes_from_bucket: u64,
    /// GETs of the targets.
    pub objects_read: u64,
    /// PUTs of sources and targets.
    pub objects_written: u64,
    /// Time from start to finish, milliseconds.
    pub duration_ms: u64,
    /// Disk that nodes need meanwhile, in the order of their ids. It is promised until the plan has
    /// committed: no other decision counts on it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskNeed>,
}

/// Disk that a node needs while an operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNeed {
    /// The node.
    #[serde(rename = "node_id")]
    pub node: NodeId,
    /// Bytes.
    pub bytes: u64,
}
