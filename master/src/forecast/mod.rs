//! What a structural change will move, and the disk and the time that it takes: for `--plan`, for the
//! refusal of a change that a node has no room for, and for the report, which shows what was
//! estimated beside what happened.
//!
//! `resize`, `copies` (drain and replacement of a node), `restore` and `moves` (a rebalance) each
//! make a [`Forecast`]; `size` knows tables and requests, `time` rates and durations.
//!
//! **Invariant:** pure, from the catalog, the reports of the nodes, and what the caller has read of
//! the bucket. What no node has reported counts as nothing, so a master that has just started
//! refuses nothing for lack of disk.

pub(crate) mod copies;
pub(crate) mod moves;
pub(crate) mod resize;
pub(crate) mod restore;
mod size;
#[cfg(test)]
mod tests;
pub(crate) mod time;

use std::collections::BTreeMap;

use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::estimate::{DiskNeed, Estimate};
use vasto_core::ids::{NodeId, ShardId};

use crate::state::ClusterState;

/// What a structural change will move and take.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Forecast {
    /// The share of all keys that moves, of a resize.
    pub(crate) moving_fraction: Option<f64>,
    pub(crate) sources: Vec<Source>,
    /// The bytes that all targets hold of what moves.
    pub(crate) bytes_moved: u64,
    /// The bytes that the targets read from the bucket.
    pub(crate) bytes_from_bucket: u64,
    /// The requests of the targets that read.
    pub(crate) gets: u64,
    /// The requests of sources and targets that write.
    pub(crate) puts: u64,
    pub(crate) seconds: f64,
    /// The bytes of disk that each node needs meanwhile.
    pub(crate) disk: BTreeMap<NodeId, u64>,
}

/// A shard of which bytes move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) keyspace: String,
    pub(crate) shard: ShardId,
    /// The node that gives them; `None` when they come from the bucket alone.
    pub(crate) node: Option<NodeId>,
    /// Its keys and its bytes on disk.
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
    /// The bytes that move, once.
    pub(crate) moves: u64,
}

/// A node lacks the disk that a change takes while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{node} needs about {} MiB of disk while this runs, and can give {} MiB of the {} MiB that are free; free \
     some there, or move replicas away from it with `vasto node drain {node}`", needed >> 20, usable >> 20, free >> 20
)]
pub(crate) struct NoRoom {
    node: NodeId,
    needed: u64,
    free: u64,
    /// The part of `free` that is neither promised nor reserved.
    usable: u64,
}

impl From<NoRoom> for VastoError {
    fn from(error: NoRoom) -> Self {
        VastoError::new(ErrorCode::FailedPrecondition, error.to_string())
    }
}

impl Forecast {
    /// Adds the part of an operation that runs beside this one.
    pub(crate) fn add(&mut self, other: Forecast) {
        self.moving_fraction = self.moving_fraction.or(other.moving_fraction);
        self.sources.extend(other.sources);
        self.bytes_moved += other.bytes_moved;
        self.bytes_from_bucket += other.bytes_from_bucket;
        self.gets += other.gets;
        self.puts += other.puts;
        self.seconds = self.seconds.max(other.seconds);
        for (node, bytes) in other.disk {
            *self.disk.entry(node).or_default() += bytes;
        }
    }

    /// Returns the estimate that the plan and the report keep.
    pub(crate) fn estimate(&self) -> Estimate {
        Estimate {
            bytes_moved: self.bytes_moved,
            bytes_from_bucket: self.bytes_from_bucket,
            objects_read: self.gets,
            objects_written: self.puts,
            duration_ms: (self.seconds * 1000.0).round() as u64,
            disk: self
                .disk
                .iter()
                .map(|(node, bytes)| DiskNeed { node: *node, bytes: *bytes })
                .collect(),
        }
    }

    /// Refuses the change when a node lacks the disk that it needs meanwhile. What running plans
    /// have been promised is not free.
    pub(crate) fn check_room(&self, state: &ClusterState) -> Result<(), NoRoom> {
        let short = self.disk.iter().find_map(|(node, needed)| {
            let (node, needed) = (*node, *needed);
            let disk = state.disk_of(node)?;
            let usable = disk.room();
            (needed > usable).then_some(NoRoom { node, needed, free: disk.free, usable })
        });
        short.map_or(Ok(()), Err)
    }
}
