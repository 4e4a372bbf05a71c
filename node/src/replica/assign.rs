//! Assigns event times to operations, and decides which entries they store and supersede.
//!
//! **Invariants**
//! - An event time assigned here is above that of the entry stored under the key.
//! - A group holds one entry per stored key; the second write of a key sees the first.
//! - A group tracks the length of its record: stored bytes count, that is the whole value even when an operation brings
//!   only a byte of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;

use vasto_core::entry::{ENTRY_HEADER_BYTES_MAX, Entry, Payload, version_of};
use vasto_core::limits::{BATCH_BYTES_MAX, GROUP_BYTES_MAX, GROUP_OPS_MAX, LimitError};
use vasto_core::merge::supersedes;
use vasto_core::record::{KeyEntry, RangeState};
use vasto_core::stored_key::data_key;
use vasto_core::{ErrorCode, VastoError};

use super::apply::band_of;
use super::command::{Number, OpKind, OpOutcome, ReplicaError, WriteOp};
use super::rmw::{Content, Modified, modify};
use super::writer::Writer;

/// The entries of a group under construction, one per stored key.
#[derive(Default)]
pub(super) struct WriteGroup {
    index: HashMap<Vec<u8>, usize>,
    /// Bytes of keys and entries.
    bytes: usize,
    /// Operations that were assigned to the group, including those that stored nothing.
    ops: usize,
    pub entries: Vec<KeyEntry>,
    pub stored_keys: Vec<Vec<u8>>,
    /// Results of the read-modify-writes in the group.
    pub results: Vec<((u64, u64), Vec<OpOutcome>)>,
}

impl WriteGroup {
    pub fn get(&self, stored_key: &[u8]) -> Option<&[u8]> {
        self.index.get(stored_key).map(|at| self.entries[*at].entry.as_slice())
    }

    /// Returns true when the group takes no further request. Until then it has room for the largest.
    pub fn is_full(&self) -> bool {
        self.bytes >= GROUP_BYTES_MAX || self.ops >= GROUP_OPS_MAX
    }

    pub fn set(&mut self, stored_key: Vec<u8>, user_key: &[u8], entry: Vec<u8>) {
        self.bytes += entry.len();
        match self.index.entry(stored_key) {
            MapEntry::Occupied(at) => {
                let before = std::mem::replace(&mut self.entries[*at.get()].entry, entry);
                self.bytes -= before.len();
            }
            MapEntry::Vacant(slot) => {
                self.bytes += user_key.len();
                self.stored_keys.push(slot.key().clone());
                slot.insert(self.entries.len());
                self.entries.push(KeyEntry { key: user_key.to_vec(), entry });
            }
        }
    }
}

impl Writer {
    /// Adds the operations of one request to the group, with event times; on an error the group is unchanged.
    ///
    /// # Errors
    /// `InvalidArgument` also when the request would store more than the limit of a batch.
    pub(super) fn assign_all(
        &mut self,
        ops: &[WriteOp],
        group: &mut WriteGroup,
        commit_time: u64,
    ) -> Result<Vec<OpOutcome>, VastoError> {
        group.ops += ops.len();
        if let [op] = ops {
            return Ok(vec![self.assign(op, &[], group, commit_time)?]);
        }
        let mut staged = WriteGroup::default();
        let mut outcomes = Vec::with_capacity(ops.len());
        for op in ops {
            outcomes.push(self.assign(op, &[&*group], &mut staged, commit_time)?);
            // Entry headers do not count, as in the check of requests.
            let payload = staged.bytes.saturating_sub(staged.entries.len() * ENTRY_HEADER_BYTES_MAX);
            if payload > BATCH_BYTES_MAX {
                return Err(LimitError::BatchTooLong(payload).into());
            }
        }
        for (stored_key, one) in staged.stored_keys.into_iter().zip(staged.entries) {
            group.set(stored_key, &one.key, one.entry);
        }
        Ok(outcomes)
    }

    /// Assigns an event time to one operation and adds it to `into`; reads see the entries of `into` and `below`.
    fn assign(
        &mut self,
        op: &WriteOp,
        below: &[&WriteGroup],
        into: &mut WriteGroup,
        commit_time: u64,
    ) -> Result<OpOutcome, VastoError> {
        let band = band_of(self.meta.identity.shard, &op.key, op.partition_hash).expect("it was checked before");
        let stored_key = data_key(band, &op.key);
        let now_us = self.stamp_us;
        let stamp = op.event_time.unwrap_or_else(|| self.clock.stamp(now_us));
        // Above the event times of all keys of the slot: the write wins without a read.
        let modifies = op.change.modifies();
        let current = if !modifies && stamp > self.max_event_times.max_of(&op.key) {
            None
        } else {
            match into.get(&stored_key).or_else(|| below.iter().find_map(|group| group.get(&stored_key))) {
                Some(entry) => Some(entry.to_vec()),
                None => self.shared.engine.get(&stored_key).map_err(ReplicaError::from)?,
            }
        };
        let standing = match &current {
            Some(bytes) => Some(Entry::decode(bytes).map_err(damaged)?),
            None => None,
        };
        if standing.is_some_and(|entry| entry.payload.is_some() && entry.partition_hash != op.partition_hash) {
            return Err(VastoError::new(
                ErrorCode::InvalidArgument,
                "the key is stored under another partition key; a key's partition must be a function of the key",
            ));
        }
        let event_time = match (op.event_time, &standing) {
            (None, Some(entry)) => stamp.max(entry.event_time + 1),
            _ => stamp,
        };
        let live =
            standing.filter(|entry| entry.payload.is_some() && !entry.is_expired(now_us)).zip(current.as_deref());
        let (content, expires_at) = match modify(&op.change, live, op.created_ttl_ms, now_us)? {
            Modified::Store(content, expires_at) => (content, expires_at),
            Modified::NotApplied => {
                let (event_time, version) =
                    live.map_or((0, 0), |(entry, encoded)| (entry.event_time, version_of(encoded)));
                return Ok(OpOutcome::NotApplied { event_time, version });
            }
        };
        let entry = encode(op, &content, expires_at, event_time, commit_time);
        let applied = match (modifies, &content) {
            (false, _) => OpOutcome::Applied(event_time),
            (true, Content::Number(number)) => {
                OpOutcome::Modified { event_time, version: version_of(&entry), number: Some(*number) }
            }
            (true, _) => OpOutcome::Modified { event_time, version: version_of(&entry), number: None },
        };
        if supersedes(self.meta.head.floor, current.as_deref(), &entry) {
            self.max_event_times.raise(&op.key, event_time);
            into.set(stored_key, &op.key, entry);
            Ok(applied)
        } else if current.as_deref() == Some(entry.as_slice()) {
            Ok(applied)
        } else {
            Ok(OpOutcome::Superseded(standing.map_or(event_time, |entry| entry.event_time)))
        }
    }

    /// Merges entries of another log into the group.
    pub(super) fn merge_all(&mut self, entries: &[KeyEntry], group: &mut WriteGroup) -> Result<(), ReplicaError> {
        if let Some(reason) = self.shared.closed() {
            return Err(ReplicaError::Closed(reason));
        }
        let bytes: usize = entries.iter().map(|one| one.key.len() + one.entry.len()).sum();
        if bytes > BATCH_BYTES_MAX {
            return Err(ReplicaError::Refused(format!("{bytes} bytes of entries do not fit into one record")));
        }
        group.ops += entries.len() + 1;
        let mut winners = Vec::new();
        for one in entries {
            let entry = Entry::decode(&one.entry)
                .map_err(|error| ReplicaError::Refused(format!("a streamed entry is damaged: {error}")))?;
            let band = band_of(self.meta.identity.shard, &one.key, entry.partition_hash)
                .filter(|band| matches!(self.meta.ranges.state(*band), RangeState::Arriving | RangeState::Owned))
                .ok_or_else(|| ReplicaError::Refused("a streamed entry belongs to another shard".into()))?;
            winners.push((data_key(band, &one.key), one, entry.event_time));
        }
        for (stored_key, one, event_time) in winners {
            let blind = event_time > self.max_event_times.max_of(&one.key);
            let wins = blind || {
                let current = match group.get(&stored_key) {
                    Some(entry) => Some(entry.to_vec()),
                    None => self.shared.engine.get(&stored_key)?,
                };
                supersedes(self.meta.head.floor, current.as_deref(), &one.entry)
            };
            if wins {
                self.max_event_times.raise(&one.key, event_time);
                group.set(stored_key, &one.key, one.entry.clone());
            }
        }
        Ok(())
    }
}

/// Returns the bytes of keys and values of an operation.
pub(super) fn op_bytes(op: &WriteOp) -> usize {
    op.key.len()
        + match &op.change {
            OpKind::Put { value, .. } => value.len(),
            OpKind::Append(more) => more.len(),
            OpKind::Delete { .. } | OpKind::AddI64(_) | OpKind::AddF64(_) | OpKind::MaxF64(_) | OpKind::MinF64(_) => 8,
        }
}

fn damaged(error: vasto_core::codec::DecodeError) -> VastoError {
    VastoError::new(ErrorCode::Corrupt, format!("the stored entry is damaged: {error}"))
}

fn encode(op: &WriteOp, content: &Content, expires_at: Option<u64>, event_time: u64, commit_time: u64) -> Vec<u8> {
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
