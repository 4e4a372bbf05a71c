//! Context of a shipper: the replica, the bucket, and the limits that all shippers of the node
//! share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vasto_shipping::bucket::Bucket;

use super::pace::Pace;
use crate::clock::SharedClock;
use crate::engine::EngineShared;
use crate::replica::Replica;

/// Context of a shipper.
pub(crate) struct ShipContext {
    /// The replica.
    pub(crate) replica: Replica,
    /// The bucket to ship to.
    pub(crate) bucket: Bucket,
    /// Its directory, for `ship.json`.
    pub(crate) dir: PathBuf,
    /// Directory for checkpoints on the same file system.
    pub(crate) tmp: PathBuf,
    /// Shared engine state, to open checkpoints.
    pub(crate) engines: EngineShared,
    /// Clock for the time in manifests.
    pub(crate) clock: SharedClock,
    /// Interval between two chunks.
    pub(crate) interval: Duration,
    /// Upper bound of the log bytes that are kept.
    pub(crate) log_cap: u64,
    /// Limits that all uploads of the node share.
    pub(crate) pace: Arc<Pace>,
}
