//! Assigns event times to operations, and decides which entries they store and supersede.
//!
//! **Invariant:** an event time assigned here is above that of the entry stored under the key; the
//! second write of a key in a group sees the first.

use vasto_core::codec::DecodeError;
use vasto_core::entry::{Entry, Payload, version_of};
use vasto_core::limits::{BATCH_BYTES_MAX, LimitError};
use vasto_core::merge::supersedes;
use vasto_core::stored_key::data_key;
use vasto_core::{ErrorCode, VastoError};

use super::apply::band_of;
use super::command::{Number, OpOutcome, ReplicaError, WriteOp};
use super::rmw::{Content, Modified, modify};
use super::store::Store;
use super::write_group::WriteGroup;

/// Clock readings that the assignment of a request uses, microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Clock reading just before the request was checked: an assigned time belongs to a point in
    /// time at which authority held, however long the thread then stalls.
    pub now_us: u64,
    /// Commit time of the group.
    pub commit_time: u64,
}

impl Store {
    /// Adds the operations of one request to the group, with event times; on an error the group is
    /// unchanged.
    ///
    /// # Errors
    /// `InvalidArgument` also when the request would store more than the limit of a batch.
    pub(super) fn assign_all(
        &mut self,
        ops: &[WriteOp],
        group: &mut WriteGroup,
        times: Times,
    ) -> Result<Vec<OpOutcome>, VastoError> {
        group.ops += ops.len();
        if let [op] = ops {
            return Ok(vec![self.assign(op, None, group, times)?]);
        }
        let mut staged = WriteGroup::default();
        let mut outcomes = Vec::with_capacity(ops.len());
        for op in ops {
            outcomes.push(self.assign(op, Some(group), &mut staged, times)?);
            let payload = staged.payload_bytes();
            if payload > BATCH_BYTES_MAX {
                return Err(LimitError::BatchTooLong(payload).into());
            }
        }
        group.set_all(staged);
        Ok(outcomes)
    }

    /// Assigns an event time to one operation and adds it to `into`; reads see the entries of
    /// `into`, then of `below`.
    fn assign(
        &mut self,
        op: &WriteOp,
        below: Option<&WriteGroup>,
        into: &mut WriteGroup,
        times: Times,
    ) -> Result<OpOutcome, VastoError> {
        let band = band_of(self.meta.identity.shard, &op.key, op.partition_hash)
            .expect("it was checked before");
        let stored_key = data_key(band, &op.key);
        let stamp = op.event_time.unwrap_or_else(|| self.clock.stamp(times.now_us));
        let modifies = op.change.modifies();
        let current = if !modifies && self.is_blind(&op.key, stamp) {
            None
        } else {
            self.current_entry(&stored_key, std::iter::once(&*into).chain(below))
                .map_err(ReplicaError::from)?
        };
        let decoded = current.as_deref().map(Entry::decode).transpose().map_err(damaged)?;
        let stored = decoded.filter(|entry| entry.payload.is_some());
        if stored.is_some_and(|entry| entry.partition_hash != op.partition_hash) {
            return Err(VastoError::new(
                ErrorCode::InvalidArgument,
                "the key is stored under another partition key; a key's partition must be a function of the key",
            ));
        }
        let event_time = match (op.event_time, &decoded) {
            (None, Some(entry)) => stamp.max(entry.event_time + 1),
            _ => stamp,
        };
        let live = stored.filter(|entry| !entry.is_expired(times.now_us)).zip(current.as_deref());
        let (content, expires_at) = match modify(&op.change, live, op.created_ttl_ms, times.now_us)?
        {
            Modified::Store(content, expires_at) => (content, expires_at),
            Modified::NotApplied => {
                let (event_time, version) =
                    live.map_or((0, 0), |(entry, encoded)| (entry.event_time, version_of(encoded)));
                return Ok(OpOutcome::NotApplied { event_time, version });
            }
        };
        let entry = encode(op, &content, expires_at, event_time, times.commit_time);
        let applied = match (modifies, &content) {
            (false, _) => OpOutcome::Applied(event_time),
            (true, Content::Number(number)) => OpOutcome::Modified {
                event_time,
                version: version_of(&entry),
                number: Some(*number),
            },
            (true, _) => {
                OpOutcome::Modified { event_time, version: version_of(&entry), number: None }
            }
        };
        if supersedes(self.meta.head.floor, current.as_deref(), &entry) {
            self.keep(stored_key, &op.key, event_time, entry, into);
            Ok(applied)
        } else if current.as_deref() == Some(entry.as_slice()) {
            Ok(applied)
        } else {
            Ok(OpOutcome::Superseded(decoded.map_or(event_time, |entry| entry.event_time)))
        }
    }
}

fn damaged(error: DecodeError) -> VastoError {
    VastoError::new(ErrorCode::Corrupt, format!("the stored entry is damaged: {error}"))
}

fn encode(
    op: &WriteOp,
    content: &Content,
    expires_at: Option<u64>,
    event_time: u64,
    commit_time: u64,
) -> Vec<u8> {
    let payload = match content {
        Content::Bytes(bytes) => Some(Payload::Bytes(bytes)),
        Content::Number(Number::I64(number)) => Some(Payload::I64(*number)),
        Content::Number(Number::F64(bits)) => Some(Payload::F64(f64::from_bits(*bits))),
        Content::Nothing => None,
    };
    Entry {
        event_time,
        expires_at,
        partition_hash: op.partition_hash,
        commit_time: (payload.is_none() || expires_at.is_some()).then_some(commit_time),
        payload,
    }
    .encode()
}
