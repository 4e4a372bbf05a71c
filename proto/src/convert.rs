//! Conversions between the wire and `vasto-core`.

use tonic::{Code, Status};
use vasto_core::catalog::Ack;
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{
    CatalogVersion, Epoch, Incarnation, KeyspaceId, NodeId, Origin, OwnSeq, ReplicaId, Vector,
};
use vasto_core::topology::{Route, Topology};

use crate::{CODE_HEADER, v1};

/// Reads an acknowledgement level; `None` is the keyspace's own.
pub fn ack_from_wire(ack: i32) -> Option<Ack> {
    match v1::Ack::try_from(ack).unwrap_or_default() {
        v1::Ack::Unspecified => None,
        v1::Ack::Os => Some(Ack::Os),
        v1::Ack::Fsync => Some(Ack::Fsync),
        v1::Ack::Replica => Some(Ack::Replica),
        v1::Ack::Bucket => Some(Ack::Bucket),
    }
}

/// Returns the wire number of a level.
pub fn ack_to_wire(ack: Option<Ack>) -> i32 {
    let ack = match ack {
        None => v1::Ack::Unspecified,
        Some(Ack::Os) => v1::Ack::Os,
        Some(Ack::Fsync) => v1::Ack::Fsync,
        Some(Ack::Replica) => v1::Ack::Replica,
        Some(Ack::Bucket) => v1::Ack::Bucket,
    };
    ack as i32
}

/// Converts an error for a reply.
pub fn error_to_wire(error: &VastoError, topology: Option<&Topology>) -> v1::Error {
    v1::Error {
        code: error.code as u32,
        message: error.message.clone(),
        retry_after_ms: error.retry_after_ms,
        topology: topology.map(topology_to_wire),
    }
}

/// Reads the error of a reply.
pub fn error_from_wire(error: &v1::Error) -> VastoError {
    VastoError::new(ErrorCode::from_number(error.code), error.message.clone())
        .retry_after_ms(error.retry_after_ms)
}

/// Converts an error to a gRPC status whose metadata carries the code.
pub fn status_of(error: &VastoError) -> Status {
    let code = match error.code {
        ErrorCode::InvalidArgument | ErrorCode::WrongType | ErrorCode::OutOfRange => {
            Code::InvalidArgument
        }
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::WrongEpoch | ErrorCode::FailedPrecondition | ErrorCode::NotPrimary => {
            Code::FailedPrecondition
        }
        ErrorCode::NodeBehind | ErrorCode::Unavailable | ErrorCode::CatchingUp => Code::Unavailable,
        ErrorCode::Overloaded | ErrorCode::NoSpace => Code::ResourceExhausted,
        ErrorCode::Unknown => Code::Unknown,
        ErrorCode::Corrupt => Code::DataLoss,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Internal => Code::Internal,
    };
    let mut status = Status::new(code, error.message.clone());
    status.metadata_mut().insert(CODE_HEADER, (error.code as u32).into());
    status
}

/// Reads the error behind a gRPC status. A status that no Vasto server made says that the server
/// was not reached (`Unavailable`), that the deadline passed, or that the outcome is not known
/// (`Unknown`).
pub fn error_of(status: &Status) -> VastoError {
    let number = status
        .metadata()
        .get(CODE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let code = match (number, status.code()) {
        (Some(number), _) => ErrorCode::from_number(number),
        (None, Code::Unavailable) => ErrorCode::Unavailable,
        (None, Code::DeadlineExceeded) => ErrorCode::DeadlineExceeded,
        (None, Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented) => {
            ErrorCode::InvalidArgument
        }
        (None, Code::ResourceExhausted) => ErrorCode::Overloaded,
        (None, _) => ErrorCode::Unknown,
    };
    VastoError::new(code, status.message())
}

/// Converts a vector, or the changed part of one.
pub fn vector_to_wire<'a>(
    vector: impl IntoIterator<Item = (&'a Origin, &'a OwnSeq)>,
) -> Vec<v1::VectorEntry> {
    let entry = |(origin, own_seq): (&Origin, &OwnSeq)| v1::VectorEntry {
        replica_id: origin.replica.0,
        incarnation: origin.incarnation.0,
        own_seq: own_seq.0,
    };
    vector.into_iter().map(entry).collect()
}

/// Reads a vector.
pub fn vector_from_wire(wire: &[v1::VectorEntry]) -> Vector {
    let entry = |one: &v1::VectorEntry| {
        let origin = Origin {
            replica: ReplicaId(one.replica_id),
            incarnation: Incarnation(one.incarnation),
        };
        (origin, OwnSeq(one.own_seq))
    };
    wire.iter().map(entry).collect()
}

/// Converts a topology to the form that clients and nodes exchange.
pub fn topology_to_wire(topology: &Topology) -> v1::Topology {
    v1::Topology {
        keyspace_id: topology.keyspace.0,
        name: topology.name.clone(),
        version: topology.version.0,
        epoch: topology.epoch.0,
        active: topology.active,
        ack: ack_to_wire(Some(topology.ack)),
        ttl_ms: topology.ttl_ms,
        shards: topology
            .shards
            .iter()
            .map(|routes| v1::Shard {
                replicas: routes
                    .iter()
                    .map(|route| v1::Route {
                        replica_id: route.replica.0,
                        node_id: route.node.0,
                        address: route.address.clone().unwrap_or_default(),
                        zone: route.zone.clone(),
                    })
                    .collect(),
            })
            .collect(),
    }
}

/// Reads a topology.
pub fn topology_from_wire(wire: &v1::Topology) -> Topology {
    Topology {
        keyspace: KeyspaceId(wire.keyspace_id),
        name: wire.name.clone(),
        version: CatalogVersion(wire.version),
        epoch: Epoch(wire.epoch),
        active: wire.active,
        ack: ack_from_wire(wire.ack).unwrap_or_default(),
        ttl_ms: wire.ttl_ms,
        shards: wire
            .shards
            .iter()
            .map(|shard| {
                shard
                    .replicas
                    .iter()
                    .map(|route| Route {
                        replica: ReplicaId(route.replica_id),
                        node: NodeId(route.node_id),
                        address: (!route.address.is_empty()).then(|| route.address.clone()),
                        zone: route.zone.clone(),
                    })
                    .collect()
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_a_status() {
        for code in ErrorCode::ALL {
            let error = VastoError::new(code, "what to do");
            assert_eq!(error_of(&status_of(&error)), error);
        }
        assert_eq!(error_of(&Status::internal("proxy")).code, ErrorCode::Unknown);
        assert_eq!(error_of(&Status::unavailable("refused")).code, ErrorCode::Unavailable);
    }

    #[test]
    fn topologies_round_trip() {
        let topology = Topology {
            keyspace: KeyspaceId(1),
            name: "ks".into(),
            version: CatalogVersion(2),
            epoch: Epoch(3),
            active: true,
            ack: Ack::Os,
            ttl_ms: Some(5),
            shards: vec![
                vec![Route {
                    replica: ReplicaId(1),
                    node: NodeId(2),
                    address: Some("127.0.0.1:1".into()),
                    zone: "a".into(),
                }],
                vec![Route {
                    replica: ReplicaId(2),
                    node: NodeId(3),
                    address: None,
                    zone: String::new(),
                }],
            ],
        };
        assert_eq!(topology_from_wire(&topology_to_wire(&topology)), topology);
    }
}
