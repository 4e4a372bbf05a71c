//! Serves peers the position of a replica, and its commit-time fences.
//!
//! **Invariant:** everything that a reply names is durable. Who asks for a seal is told what was held
//! then: writes of other keys have gone on since, and nobody waits for their sync.

use std::time::Duration;

use tonic::Status;
use vasto_core::ids::{CatalogVersion, KeyspaceId, ReplicaId};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::{status_of, vector_to_wire};
use vasto_proto::v1;

use crate::registry::NodeRegistry;
use crate::replica::command::{Control, Position};
use crate::replica::{Replica, View};

/// Longest wait that a caller may ask for.
const WAIT_MAX: Duration = Duration::from_secs(10);

// A gRPC status is large, and this is not a hot path.
#[allow(clippy::result_large_err)]
fn find(registry: &NodeRegistry, keyspace: u64, replica: u64) -> Result<Replica, Status> {
    registry.replica(KeyspaceId(keyspace), ReplicaId(replica)).ok_or_else(|| {
        let reason = format!("replica {replica} of keyspace {keyspace} is not open on this node");
        status_of(&VastoError::new(ErrorCode::Unavailable, reason))
    })
}

/// Answers `Position`: waits for the version and the seal that the caller asks for.
pub(super) async fn serve(
    registry: &NodeRegistry,
    request: v1::PositionRequest,
) -> Result<v1::PositionReply, Status> {
    let replica = find(registry, request.keyspace_id, request.replica_id)?;
    let mut changes = replica.changes();
    let deadline =
        tokio::time::Instant::now() + Duration::from_millis(request.wait_ms.into()).min(WAIT_MAX);
    loop {
        changes.borrow_and_update();
        let view = replica.view();
        let sealed = view
            .ranges
            .seal
            .is_some_and(|seal| seal.version == CatalogVersion(request.sealed_version));
        let applied = view.version >= CatalogVersion(request.min_version);
        let enough = applied && (request.sealed_version == 0 || sealed);
        if enough || tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
            let asked = CatalogVersion(request.sealed_version);
            return match replica.position_at_seal(asked).filter(|_| sealed) {
                Some(position) => Ok(reply(&view, position)),
                None => answer(&replica).await,
            };
        }
    }
}

/// Answers `Promise`.
pub(super) async fn promise(
    registry: &NodeRegistry,
    request: v1::PromiseRequest,
) -> Result<v1::PositionReply, Status> {
    let replica = find(registry, request.keyspace_id, request.replica_id)?;
    let order = Control::FenceCommitTime { commit_time: request.commit_time };
    replica.control(order).await.map_err(|error| status_of(&error.into()))?;
    answer(&replica).await
}

async fn answer(replica: &Replica) -> Result<v1::PositionReply, Status> {
    // The view is read first: its state held before the position was taken.
    let view = replica.view();
    let position = replica.position().await.map_err(|error| status_of(&error.into()))?;
    Ok(reply(&view, position))
}

fn reply(view: &View, position: Position) -> v1::PositionReply {
    v1::PositionReply {
        version: view.version.0,
        epoch: view.epoch.0,
        lsn: position.lsn.0,
        vector: vector_to_wire(&position.vector),
        sealed_version: view.ranges.seal.map_or(0, |seal| seal.version.0),
        floor: position.floor,
        incarnation: position.incarnation.0,
    }
}
