//! The eviction of a replica from its placement.

use std::sync::Arc;

use tokio::time::timeout;
use vasto_core::catalog::Placed;
use vasto_core::ids::{KeyspaceId, ReplicaId};
use vasto_core::limits::HANDOVER_TIMEOUT;
use vasto_core::reconcile::{Presence, successor};
use vasto_proto::v1;

use super::answer::{Answer, find};
use super::ask;
use crate::cluster::Cluster;
use crate::state::{CatalogChange, Keyspace};
use crate::view::json;
use crate::view::outcome::EvictedDoc;

/// Evicts a replica from its placement: it is drained when its node is there, or given up.
pub(crate) async fn evict(cluster: &Arc<Cluster>, request: v1::EvictRequest) -> Answer {
    let keyspace = find(&cluster.state(), &request.name)?.catalog.keyspace;
    let replica = ReplicaId(request.replica_id);
    transfer_leadership_first(cluster, keyspace, replica).await;
    let change = CatalogChange::Evict { replica, accept_loss: request.accept_loss };
    let catalog = ask::change(cluster, keyspace, change).await?;
    tracing::info!(keyspace = request.name, %replica, accept_loss = request.accept_loss, "evicted a replica");
    Ok(json(&EvictedDoc {
        name: request.name,
        replica_id: replica,
        state: if request.accept_loss { "removed" } else { "draining" },
        version: catalog.version,
    }))
}

/// Transfers leadership of a primary that is to be evicted, if there is a successor, and waits
/// until another replica has authority. Waits at most twice as long as a transfer may take: an
/// eviction may have its reason.
async fn transfer_leadership_first(
    cluster: &Arc<Cluster>,
    keyspace: KeyspaceId,
    replica: ReplicaId,
) {
    let (change, mut changes) = {
        let (state, mono_us) = (cluster.state(), cluster.mono_us());
        let Some(keyspace) = state.keyspaces.get(&keyspace) else { return };
        let here = |node| matches!(state.presence(node, mono_us), Presence::Here(_));
        let report = |placed: &Placed| keyspace.reports.get(&placed.replica);
        let ready = |placed: &Placed| report(placed).is_some_and(|report| report.replication.ready);
        let mut placement = keyspace.catalog.placement.iter();
        let to = placement.find_map(|shard| successor(shard, replica, here, ready));
        (to.map(|to| CatalogChange::TransferLeadership { from: replica, to }), keyspace.changes())
    };
    if let Some(change) = change
        && ask::change(cluster, keyspace, change).await.is_err()
    {
        return;
    }
    let ended = async {
        loop {
            changes.borrow_and_update();
            let hands_over = cluster
                .state()
                .keyspaces
                .get(&keyspace)
                .is_some_and(|keyspace| hands_over(keyspace, replica));
            if !hands_over || changes.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = timeout(HANDOVER_TIMEOUT * 2, ended).await;
}

/// Returns true while the leadership of the replica's shard is being transferred, or no other
/// replica has authority.
fn hands_over(keyspace: &Keyspace, replica: ReplicaId) -> bool {
    let version = keyspace.catalog.version;
    // The replica with authority holds what the evicted one has acknowledged.
    let has_authority = |placed: &Placed| {
        keyspace.reports.get(&placed.replica).is_some_and(|report| report.has_authority(version))
    };
    let mut shards = keyspace.catalog.placement.iter();
    let shard = shards.find(|shard| shard.replicas.iter().any(|placed| placed.replica == replica));
    shard.filter(|shard| shard.replicas.len() > 1).is_some_and(|shard| {
        let mut others = shard.replicas.iter().filter(|placed| placed.replica != replica);
        shard.transferring_to.is_some() || !others.any(has_authority)
    })
}
