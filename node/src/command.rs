//! What a person asked for that changes no ownership: checkpoints, compactions, and the log in the bucket.
//!
//! **Invariant:** "done" to [`ship_log`] means that the bucket holds everything that was acknowledged before,
//! by any replica of the shard that was not named as absent.

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

/// A replica that opens is waited for, and one that does not know the version yet.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// A peer says within this what it holds ...
const PEER_PATIENCE: Duration = Duration::from_secs(5);
/// ... and what it said is here within this.
const HOLD_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at either.
const LOOK: Duration = Duration::from_millis(10);

/// Carries it out; answers catalogs when these were asked for.
///
/// # Errors
/// What could not be done, for the one who asked.
pub async fn execute(manager: &Manager, command: &v1::Command) -> Result<Vec<String>, String> {
    use v1::command::Kind;
    let keyspace = KeyspaceId(command.keyspace_id);
    match Kind::try_from(command.kind).unwrap_or_default() {
        Kind::Checkpoint => {
            let ships = if command.replica_ids.is_empty() {
                manager.shippers(keyspace)
            } else {
                let named = command.replica_ids.iter().map(|id| open(manager, command, ReplicaId(*id)));
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
            for ship in manager.shippers(keyspace) {
                match ship.checkpoint_anew().await {
                    Ok(_) | Err(ShipError::Filling) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
            Ok(Vec::new())
        }
        Kind::Catalogs => {
            let known = manager.known_catalogs().await.map_err(|error| error.to_string())?;
            let json = |catalog: &Arc<Catalog>| serde_json::to_string(&**catalog).map_err(|error| error.to_string());
            known.iter().map(json).collect()
        }
        Kind::Compact => {
            let replicas = manager.context().core.replicas();
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
            let all = command.replica_ids.iter().map(|id| ship_log(manager, command, ReplicaId(*id)));
            try_join_all(all).await.map(|_| Vec::new())
        }
        Kind::Unspecified => Err("the command is not known to this version of the node".into()),
    }
}

/// Waits until the replica is open under the version that the command names.
async fn open(manager: &Manager, command: &v1::Command, id: ReplicaId) -> Result<(Replica, ShipHandle), String> {
    let (keyspace, version) = (KeyspaceId(command.keyspace_id), CatalogVersion(command.version));
    let began = Instant::now();
    loop {
        let replica = manager.context().core.replica(keyspace, id).filter(|replica| replica.version() >= version);
        if let Some(opened) = replica.zip(manager.any_shipper(keyspace, id)) {
            return Ok(opened);
        }
        if began.elapsed() > OPEN_PATIENCE {
            return Err(format!("replica {id} is not open yet"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Puts the log of a replica into the bucket, once it holds what the others of its shard hold.
async fn ship_log(manager: &Manager, command: &v1::Command, id: ReplicaId) -> Result<(), String> {
    let (replica, ship) = open(manager, command, id).await?;
    let context = manager.context();
    let catalog = context.core.catalog(replica.keyspace).ok_or("the keyspace is not known here")?;
    let named = |error: String| format!("shard {}: {error}", replica.shard);
    let absent: Vec<ReplicaId> = command.absent_replica_ids.iter().copied().map(ReplicaId).collect();
    hold_what_others_hold(context, &replica, &catalog, &absent).await.map_err(named)?;
    match ship.log().await {
        // Nobody has written to it yet.
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
    others.retain(|one| !absent.contains(&one.replica));
    let mut needed = Vector::new();
    for (one, vector) in others.iter().zip(join_all(others.iter().map(|one| held_by(context, replica, *one))).await) {
        let silent = || format!("its replica {} on node {} does not say what it holds", one.replica, one.node);
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
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// What another replica of the shard holds; `None` when it does not say in time.
async fn held_by(context: &HostContext, replica: &Replica, one: Placed) -> Option<Vector> {
    let began = Instant::now();
    while let Some(left) = PEER_PATIENCE.checked_sub(began.elapsed()) {
        let request = v1::PositionRequest {
            keyspace_id: replica.keyspace.0,
            replica_id: one.replica.0,
            wait_ms: left.as_millis() as u32,
            ..v1::PositionRequest::default()
        };
        let asked = context.peers.position(&context.core, one.node, request);
        match tokio::time::timeout(left, asked).await {
            Ok(Ok(reply)) => return Some(vector_from_wire(&reply.vector)),
            Ok(Err(_)) => tokio::time::sleep(LOOK.min(left)).await,
            Err(_) => return None,
        }
    }
    None
}
