//! The upkeep of the bucket: what is missing, what is not needed any more.
//!
//! **Invariant:** several masters may try at once; the last term goes on, the others stop.

use std::sync::Arc;
use std::time::Duration;

use vasto_core::error::{ErrorCode, VastoError};
use vasto_shipping::CatalogError;
use vasto_shipping::garbage;

use crate::cluster::Cluster;
use crate::document;

type Answer = Result<String, VastoError>;

fn unavailable(error: &CatalogError) -> VastoError {
    VastoError::new(ErrorCode::Unavailable, format!("the bucket cannot be looked through: {error}; try again"))
}

/// Looks for missing, damaged and needless objects.
pub(crate) async fn check(cluster: &Cluster, deep: bool) -> Answer {
    let found = garbage::fsck(&cluster.bucket, deep).await.map_err(|error| unavailable(&error))?;
    cluster.bucket_holds(found.bytes);
    Ok(document::json(&found))
}

/// Deletes what is not needed, or only tells what that is.
pub(crate) async fn collect(cluster: &Cluster, dry_run: bool) -> Answer {
    let collected = garbage::collect(&cluster.bucket, cluster.settings.retention, dry_run).await;
    let collected = collected.map_err(|error| unavailable(&error))?;
    cluster.bucket_holds(collected.stored_bytes);
    tracing::info!(dry_run, deleted = collected.deleted, bytes = collected.bytes, "collected garbage");
    Ok(document::json(&collected))
}

/// Collects again and again until the master stops.
pub(crate) async fn collect_regularly(cluster: Arc<Cluster>, interval: Duration) {
    loop {
        // Masters that started together do not collect together.
        let pause = tokio::time::sleep(interval.mul_f64(rand::random_range(0.9..1.1)));
        if cluster.shutdown.run_until_cancelled(pause).await.is_none() {
            return;
        }
        let collected = cluster.shutdown.clone();
        match collected.run_until_cancelled(collect(&cluster, false)).await {
            Some(Err(error)) => tracing::warn!(%error, "garbage was not collected; it is tried again"),
            Some(Ok(_)) => {}
            None => return,
        }
    }
}
