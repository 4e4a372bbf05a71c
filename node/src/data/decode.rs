//! Decodes wire messages into checked operations.
//!
//! **Invariant:** an operation that leaves this module is within the limits of
//! [`vasto_core::limits`].

use vasto_core::catalog::{Ack, KeyspaceSpec};
use vasto_core::ids::ReplicaId;
use vasto_core::limits::{
    BATCH_BYTES_MAX, BATCH_OPS_MAX, LimitError, check_event_time, check_key, check_ttl_ms,
    check_value,
};
use vasto_core::{ErrorCode, VastoError};
use vasto_proto::convert::ack_from_wire;
use vasto_proto::v1;

use crate::replica::command::{Condition, OpId, OpKind, WriteOp};
use crate::replica::metrics::refused_event_time;
use crate::replica::read::KeyRef;

fn malformed(what: &str) -> VastoError {
    VastoError::new(ErrorCode::InvalidArgument, format!("the request is malformed: {what}"))
}

/// Returns the checked keys of a get.
pub(super) fn keys(request: v1::GetRequest) -> Result<Vec<KeyRef>, VastoError> {
    if request.keys.len() > BATCH_OPS_MAX {
        return Err(LimitError::BatchTooMany(request.keys.len()).into());
    }
    request
        .keys
        .into_iter()
        .map(|key| {
            check_key(&key.key)?;
            Ok(KeyRef { key: key.key, partition_hash: key.partition_hash })
        })
        .collect()
}

/// A checked write.
pub(super) struct Write {
    pub ops: Vec<WriteOp>,
    pub ack: Ack,
    pub bytes: usize,
    pub id: Option<OpId>,
}

/// Checks a write and fills in the keyspace's defaults.
pub(super) fn write(
    request: v1::WriteRequest,
    spec: &KeyspaceSpec,
    now_us: u64,
) -> Result<Write, VastoError> {
    if request.ops.len() > BATCH_OPS_MAX {
        return Err(LimitError::BatchTooMany(request.ops.len()).into());
    }
    let ack = ack_from_wire(request.ack).unwrap_or(spec.ack);
    // A request may raise the keyspace's acknowledgement level, never lower it.
    let ack = ack.max(spec.ack);
    if ack == Ack::Replica && spec.replicas < 2 {
        let message =
            "the acknowledgement level `replica` needs a second replica, and this keyspace has one";
        return Err(VastoError::new(ErrorCode::FailedPrecondition, message));
    }
    let id = (request.client_id != 0).then(|| OpId {
        client: request.client_id,
        sequence: request.sequence,
        tried: (request.tried_replica != 0).then_some(ReplicaId(request.tried_replica)),
        age_ms: request.age_ms.into(),
    });
    let mut bytes = 0;
    let mut ops = Vec::with_capacity(request.ops.len());
    for op in request.ops {
        let key = op.key.ok_or_else(|| malformed("an operation without a key"))?;
        check_key(&key.key)?;
        bytes += key.key.len();
        if let Some(event_time) = op.event_time {
            check_event_time(event_time, now_us).inspect_err(|_| refused_event_time())?;
        }
        let change = match op.op {
            Some(v1::write_op::Op::Put(put)) => {
                check_value(&put.value)?;
                bytes += put.value.len();
                let ttl_ms = put.ttl_ms.or(spec.ttl_ms);
                ttl_ms.map_or(Ok(()), check_ttl_ms)?;
                let condition = condition(put.if_absent, put.if_version)?;
                OpKind::Put { value: put.value, ttl_ms, condition }
            }
            Some(v1::write_op::Op::Delete(delete)) => {
                OpKind::Delete { condition: condition(false, delete.if_version)? }
            }
            Some(v1::write_op::Op::AddI64(addend)) => OpKind::AddI64(addend),
            Some(v1::write_op::Op::AddF64(addend)) => OpKind::AddF64(addend),
            Some(v1::write_op::Op::MaxF64(least)) => OpKind::MaxF64(least),
            Some(v1::write_op::Op::MinF64(most)) => OpKind::MinF64(most),
            Some(v1::write_op::Op::Append(more)) => {
                check_value(&more)?;
                bytes += more.len();
                OpKind::Append(more)
            }
            None => return Err(malformed("an operation that does not say what to do")),
        };
        if change.modifies() && op.event_time.is_some() {
            let message = "a read-modify-write is stamped by the primary; leave the event time out";
            return Err(VastoError::new(ErrorCode::InvalidArgument, message));
        }
        ops.push(WriteOp {
            key: key.key,
            partition_hash: key.partition_hash,
            event_time: op.event_time,
            change,
            created_ttl_ms: spec.ttl_ms,
        });
    }
    if bytes > BATCH_BYTES_MAX {
        return Err(LimitError::BatchTooLong(bytes).into());
    }
    if ops.is_empty() {
        return Err(malformed("a write without operations"));
    }
    Ok(Write { ops, ack, bytes, id })
}

fn condition(if_absent: bool, if_version: Option<u64>) -> Result<Option<Condition>, VastoError> {
    match (if_absent, if_version) {
        (false, None) => Ok(None),
        (true, None) => Ok(Some(Condition::Absent)),
        (false, Some(version)) => Ok(Some(Condition::Version(version))),
        (true, Some(_)) => Err(malformed("a put with two conditions")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

    const NOW: u64 = 1_000_000_000;

    fn put(key: Vec<u8>, value: Vec<u8>) -> v1::WriteOp {
        v1::WriteOp {
            key: Some(v1::KeyRef { key: key.into(), partition_hash: None }),
            event_time: None,
            op: Some(v1::write_op::Op::Put(v1::Put { value: value.into(), ..Default::default() })),
        }
    }

    fn check(ops: Vec<v1::WriteOp>) -> Result<Write, VastoError> {
        write(v1::WriteRequest { ops, ..Default::default() }, &KeyspaceSpec::default(), NOW)
    }

    #[test]
    fn limits_hold_at_the_boundary() {
        assert!(check(vec![put(vec![1; KEY_BYTES_MAX], vec![])]).is_ok());
        assert!(check(vec![put(vec![1; KEY_BYTES_MAX + 1], vec![])]).is_err());
        assert!(check(vec![put(vec![1], vec![0; VALUE_BYTES_MAX])]).is_ok());
        assert!(check(vec![put(vec![1], vec![0; VALUE_BYTES_MAX + 1])]).is_err());
        assert!(check(vec![put(vec![], vec![])]).is_err());
        assert!(check(vec![]).is_err());
        assert!(check((0..BATCH_OPS_MAX + 1).map(|_| put(vec![1], vec![])).collect()).is_err());
        assert!(check((0..5).map(|i| put(vec![i], vec![0; VALUE_BYTES_MAX])).collect()).is_err());
    }

    #[test]
    fn malformed_requests_and_unavailable_levels_are_typed() {
        let mut no_key = put(vec![1], vec![]);
        no_key.key = None;
        let mut no_op = put(vec![1], vec![]);
        no_op.op = None;
        let mut ahead = put(vec![1], vec![]);
        ahead.event_time = Some(NOW + 61_000_000);
        for bad in [no_key, no_op, ahead] {
            assert_eq!(check(vec![bad]).map(|_| ()).unwrap_err().code, ErrorCode::InvalidArgument);
        }
        let refused = write(
            v1::WriteRequest { ops: vec![put(vec![1], vec![])], ack: 3, ..Default::default() },
            &KeyspaceSpec::default(),
            NOW,
        );
        assert_eq!(refused.map(|_| ()).unwrap_err().code, ErrorCode::FailedPrecondition);
    }

    #[test]
    fn the_keyspace_gives_its_defaults() {
        let spec = KeyspaceSpec { ttl_ms: Some(5_000), ack: Ack::Os, ..KeyspaceSpec::default() };
        let checked = write(
            v1::WriteRequest { ops: vec![put(vec![1], vec![])], ..Default::default() },
            &spec,
            NOW,
        )
        .unwrap();
        assert_eq!(checked.ack, Ack::Os);
        assert!(matches!(checked.ops[0].change, OpKind::Put { ttl_ms: Some(5_000), .. }));
        assert_eq!(checked.ops[0].created_ttl_ms, Some(5_000));
    }
}
