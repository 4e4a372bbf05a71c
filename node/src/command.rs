//! Operator commands that change no ownership: checkpoints, compactions, and shipping the log.
//!
//! **Invariant:** [`ship_log`] succeeds only when the bucket holds everything that was acknowledged
//! before, by any replica of the shard that was not named as absent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::ids::{CatalogVersion, KeyspaceId, ReplicaId, Vector, join};
use vasto_proto::convert::vector_from_wire;
use vasto_proto::v1;

use crate::engine::EngineError;
use crate::host::HostContext;
use crate::manager::Manager;
use crate::replica::Replica;
use crate::ship::{ShipError, ShipHandle, blocking};

/// Time-out for a replica that is opening, or does not know the version yet.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// Time-out for a peer to report the vector that it holds ...
const PEER_PATIENCE: Duration = Duration::from_secs(5);
/// ... and for this replica to hold it too.
const HOLD_PATIENCE: Duration = Duration::from_secs(20);
/// Interval between two polls of either.
const POLL: Duration = Duration::from_millis(10);

/// Executes the command; returns catalogs when it asks for them.
///
/// # Errors
/// The reason of the failure, for the operator.
pub(crate) async fn execute(
    manager: &Manager,
    command: &v1::Command,
) -> Result<Vec<String>, String> {
    use v1::command::Kind;
    let keyspace = KeyspaceId(command.keyspace_id);
    match Kind::try_from(command.kind).unwrap_or_default() {
        Kind::Checkpoint => {
            let ships = if command.replica_ids.is_empty() {
                manager.shippers(keyspace)
            } else {
                let named =
                    command.replica_ids.iter().map(|id| open(manager, command, ReplicaId(*id)));
                try_join_all(named).await?.into_iter().map(|(_, ship)| ship).collect()
            };
            for ship in ships {
                match ship.checkpoint(None).await {
                    Ok(_) | Err(ShipError::Filling) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(Vec::new())
        }
        Kind::ShipAnew => {
            // What one shipped that does not ship now may be what is missing.
            for ship in manager.all_shippers(keyspace) {
                match ship.checkpoint_anew().await {
                    Ok(_) | Err(ShipError::Filling) => {}
                    // The one that ships has all that this one had.
                    Err(error) if !ship.ships() => {
                        tracing::warn!(%error, "a replica that has shipped does not do so again");
                    }
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(Vec::new())
        }
        Kind::Catalogs => {
            let catalogs = manager.known_catalogs().await.map_err(|error| error.to_string())?;
            let json = |catalog: &Arc<Catalog>| {
                serde_json::to_string(&**catalog).map_err(|error| error.to_string())
            };
            catalogs.iter().map(json).collect()
        }
        Kind::Compact => {
            let replicas = manager.context().registry.replicas();
            for replica in replicas.into_iter().filter(|replica| replica.keyspace == keyspace) {
                let work = move || {
                    replica.engine().flush()?;
                    replica.engine().compact_all();
                    Ok::<(), EngineError>(())
                };
                blocking(work).await.map_err(|error| error.to_string())?;
            }
            Ok(Vec::new())
        }
        Kind::ShipLog => {
            let all =
                command.replica_ids.iter().map(|id| ship_log(manager, command, ReplicaId(*id)));
            try_join_all(all).await.map(|_| Vec::new())
        }
        Kind::Unspecified => Err("the command is not known to this version of the node".into()),
    }
}

/// Waits until the replica is open under the version that the command names.
async fn open(
    manager: &Manager,
    command: &v1::Command,
    id: ReplicaId,
) -> Result<(Replica, ShipHandle), String> {
    let (keyspace, version) = (KeyspaceId(command.keyspace_id), CatalogVersion(command.version));
    let began = Instant::now();
    loop {
        let replica = manager
            .context()
            .registry
            .replica(keyspace, id)
            .filter(|replica| replica.version() >= version);
        if let Some(opened) = replica.zip(manager.any_shipper(keyspace, id)) {
            return Ok(opened);
        }
        if began.elapsed() > OPEN_PATIENCE {
            return Err(format!("replica {id} is not open yet"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Ships the log of a replica, once it holds everything that the other replicas of its shard hold.
async fn ship_log(manager: &Manager, command: &v1::Command, id: ReplicaId) -> Result<(), String> {
    let (replica, ship) = open(manager, command, id).await?;
    let context = manager.context();
    let catalog =
        context.registry.catalog(replica.keyspace).ok_or("the keyspace is not known here")?;
    let named = |error: String| format!("shard {}: {error}", replica.shard);
    let absent: Vec<ReplicaId> =
        command.absent_replica_ids.iter().copied().map(ReplicaId).collect();
    hold_what_others_hold(context, &replica, &catalog, &absent).await.map_err(named)?;
    match ship.log().await {
        // The replica has no writes yet.
        Ok(()) | Err(ShipError::Filling) => Ok(()),
        Err(error) => Err(named(error.to_string())),
    }
}

async fn hold_what_others_hold(
    context: &HostContext,
    replica: &Replica,
    catalog: &Catalog,
    absent: &[ReplicaId],
) -> Result<(), String> {
    let mut others = catalog.sources_of(replica.shard, replica.id);
    others.retain(|peer| !absent.contains(&peer.replica));
    let mut needed = Vector::new();
    for (peer, vector) in others
        .iter()
        .zip(join_all(others.iter().map(|peer| held_by(context, replica, *peer))).await)
    {
        let silent = || {
            format!("its replica {} on node {} does not say what it holds", peer.replica, peer.node)
        };
        needed = join(&needed, &vector.ok_or_else(silent)?);
    }
    let began = Instant::now();
    while !replica.covers(&needed) {
        if let Some(reason) = replica.closed() {
            return Err(reason);
        }
        if began.elapsed() > HOLD_PATIENCE {
            return Err(format!("replica {} does not hold yet what the others hold", replica.id));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Returns the vector of another replica of the shard; `None` when it does not answer in time.
async fn held_by(context: &HostContext, replica: &Replica, peer: Placed) -> Option<Vector> {
    let (keyspace, any) = (replica.keyspace, CatalogVersion(0));
    let reply = context
        .peers
        .position_under(&context.registry, keyspace, peer, any, any, PEER_PATIENCE)
        .await?;
    Some(vector_from_wire(&reply.vector))
}
