//! The regular look at the running plans: how fast they move, and what holds them up.
//!
//! **Invariant:** it decides nothing, and goes on while drivers wait for the bucket.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::cluster::Cluster;

/// Interval between two looks.
const INTERVAL: Duration = Duration::from_millis(500);

/// Looks until the master stops.
pub(crate) async fn observe_regularly(cluster: Arc<Cluster>) {
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while cluster.shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let outage = cluster.bucket.outage().map(|(_, why)| why);
        cluster.state().observe(cluster.mono_us(), outage.as_deref());
    }
}
