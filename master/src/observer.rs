//! The regular look at the running plans: how fast they move, and what holds them up; and at the
//! nodes that are away: drivers are woken when rules have waited long enough for one.
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
        let (mut state, mono_us) = (cluster.state(), cluster.mono_us());
        state.note_absences(mono_us);
        state.observe(mono_us, outage.as_deref());
    }
}
