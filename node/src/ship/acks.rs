//! Acknowledges writes that wait for the bucket.
//!
//! **Invariant:** a bucket write is acknowledged only while no catalog version lets the shard
//! continue without this replica: after the chunk, no version of the catalog exists that it has not
//! applied.

use std::time::Duration;

use vasto_core::CatalogVersion;
use vasto_core::ids::Lsn;
use vasto_shipping::layout;

use super::context::ShipContext;
use super::error::ShipError;
use crate::replica::command::Role;

/// Interval of polls while a write waits for the bucket: its record is about to be settled ...
pub(super) const ACK_SOON: Duration = Duration::from_millis(1);
/// ... or the node is about to apply the version that blocks the acknowledgement.
const ACK_FENCED: Duration = Duration::from_millis(50);

/// Acknowledges the writes up to `shipped`, which the bucket holds, unless another replica may have
/// taken over what the bucket held before; returns the pause before the next poll. `is_anew` says
/// that the objects that the log builds on are being uploaded again.
pub(super) async fn cover(
    context: &ShipContext,
    shipped: Lsn,
    is_anew: bool,
) -> Result<Duration, ShipError> {
    let replica = &context.replica;
    let shipped_write_waits = replica.bucket_acks().first().is_some_and(|first| first <= shipped);
    // A chunk is no acknowledgement while the objects that it builds on are being uploaded again.
    if !shipped_write_waits || is_anew {
        return Ok(ACK_SOON);
    }
    // A replica that left its placement acknowledges no more writes: its archive may have been read
    // already.
    if replica.view().role == Role::Detached {
        replica.bucket_acks().abandon();
        return Ok(ACK_SOON);
    }
    let applied = replica.version();
    let key = |version: u64| layout::catalog_version(replica.keyspace, CatalogVersion(version));
    let (next_key, applied_key) = (key(applied.0 + 1), key(applied.0));
    let (next, current) =
        tokio::try_join!(context.bucket.head(&next_key), context.bucket.head(&applied_key))?;
    // Readers find the data by the catalog.
    if next.is_none() && current.is_none() {
        return Err(ShipError::NoCatalog(applied_key));
    }
    let overtaken = next.is_some();
    if overtaken || replica.version() != applied || replica.view().role == Role::Detached {
        return Ok(ACK_FENCED);
    }
    replica.bucket_acks().covered(shipped);
    Ok(ACK_SOON)
}
