//! Ships one replica to the bucket: chunks of its log, and checkpoints.
//!
//! Order: SSTs, verified, then the manifest. A checkpoint is made and uploaded in the background:
//! the log continues to be shipped and truncated meanwhile. Once its LSN is known a chunk ends
//! there, so that the next one begins exactly after it.
//!
//! The preferred primary of a shard ships; an acting primary continues after the last object that
//! the preferred primary has shipped.
//!
//! - `handle`: the requests to a shipper; `status`: the duty that the host sets, and the
//!   status that the shipper publishes.
//! - `shipper`: the task that decides what to do next. It directs `chunks`, `checkpoint` and
//!   `acks`; `truncate` runs beside it, independent of all waits for the bucket.
//! - `state`: the position in `ship.json`; `behind`: where a replica that begins to ship continues.
//!
//! **Invariants**
//! - Only settled records (synced and applied) are shipped; names are never reused: an object that
//!   exists under a chunk's name is compared, not overwritten.
//! - The log is truncated only up to what is persisted in the database **and** covered by the
//!   bucket **and** not needed by a running plan **and** read by every follower; at the byte cap
//!   the bucket's cover is given up.
//! - An outage of the bucket never stops serving. An idle replica makes no requests.

mod acks;
mod backoff;
mod behind;
mod checkpoint;
mod chunks;
mod context;
mod error;
mod existing;
mod handle;
pub(crate) mod old_copy;
mod pace;
mod shipper;
mod state;
mod status;
mod truncate;

pub(crate) use context::ShipContext;
pub(crate) use error::{ShipError, blocking};
pub(crate) use handle::ShipHandle;
pub(crate) use pace::Pace;
#[cfg(test)]
pub(crate) use pace::UPLOADS_MAX;
pub(crate) use shipper::start;
pub(crate) use state::{begin_with_a_checkpoint, begin_with_files_of, shipped_by};
pub(crate) use status::{Assignment, LogNeed};
