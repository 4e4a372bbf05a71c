//! Reads, which never pass through the writer.
//!
//! **Invariant:** a read sees owned bands only, and checks the range states again afterwards: an
//! answer given after a seal has aged, or after the bands have moved, is refused instead of stale.

mod scan;

use bytes::Bytes;
use vasto_core::entry::{Entry, Payload, version_of};
use vasto_core::limits::{BATCH_BYTES_MAX, SEALED_READS};
use vasto_core::record::RangeState;
use vasto_core::stored_key::data_key;
use vasto_core::{Band, ErrorCode, VastoError};
use vasto_proto::v1;

pub(crate) use scan::ScanPage;

use super::apply::band_of;
use super::command::wrong_epoch;
use super::handle::Replica;
use crate::engine::{EngineError, Lookup};

/// Result of a lookup.
pub(crate) enum GetResult {
    /// Values in the order of the keys.
    Values(Vec<Option<v1::Value>>),
    /// A key is not in memory; retry from a thread that may block.
    WouldBlock,
}

/// A key to look up.
pub(crate) struct KeyRef {
    /// The user key.
    pub key: Bytes,
    /// Hash of its partition key when that is not the key itself.
    pub partition_hash: Option<u64>,
}

fn node_behind() -> VastoError {
    VastoError::new(
        ErrorCode::NodeBehind,
        "the key is changing its shard and the outcome is not known here yet; try again",
    )
    .retry_after_ms(50)
}

impl From<EngineError> for VastoError {
    fn from(error: EngineError) -> Self {
        VastoError::new(ErrorCode::Unavailable, error.to_string())
    }
}

/// Returns the value of an encoded entry as clients see it; `None` for tombstones and expired
/// values.
pub(crate) fn visible_value(
    encoded: &[u8],
    now_us: u64,
    keys_only: bool,
) -> Result<Option<v1::Value>, VastoError> {
    let entry = Entry::decode(encoded).map_err(|error| {
        VastoError::new(ErrorCode::Corrupt, format!("a stored entry is damaged: {error}"))
    })?;
    let Some(payload) = entry.payload.filter(|_| !entry.is_expired(now_us)) else {
        return Ok(None);
    };
    let payload = match payload {
        Payload::Bytes(_) if keys_only => None,
        Payload::Bytes(bytes) => Some(v1::value::Payload::Data(Bytes::copy_from_slice(bytes))),
        Payload::I64(number) => Some(v1::value::Payload::I64(number)),
        Payload::F64(number) => Some(v1::value::Payload::F64(number)),
    };
    Ok(Some(v1::Value {
        payload,
        event_time: entry.event_time,
        expires_at: entry.expires_at,
        version: version_of(encoded),
    }))
}

impl Replica {
    /// Returns the owned band of a key, or why it cannot be read here.
    fn readable_band(&self, key: &KeyRef) -> Result<Band, VastoError> {
        let band = band_of(self.shard, &key.key, key.partition_hash).ok_or_else(wrong_epoch)?;
        let view = self.shared.view.load();
        let ranges = &view.ranges;
        if ranges.state(band) != RangeState::Owned {
            return Err(wrong_epoch());
        }
        if ranges.is_stale(band, SEALED_READS) {
            return Err(node_behind());
        }
        Ok(band)
    }

    /// Reads keys. With `may_block` false it answers only from memory.
    pub(crate) fn get_many(
        &self,
        keys: &[KeyRef],
        may_block: bool,
    ) -> Result<GetResult, VastoError> {
        let now_us = self.shared.clock.now_us();
        let mut values = Vec::with_capacity(keys.len());
        let mut bytes = 0;
        for key in keys {
            let stored_key = data_key(self.readable_band(key)?, &key.key);
            let stored = if may_block {
                self.shared.engine.get(&stored_key)?
            } else {
                match self.shared.engine.get_cached(&stored_key)? {
                    Lookup::Found(bytes) => Some(bytes),
                    Lookup::Missing => None,
                    Lookup::NotCached => return Ok(GetResult::WouldBlock),
                }
            };
            bytes += stored.as_ref().map_or(0, Vec::len);
            if bytes > BATCH_BYTES_MAX {
                let message = format!(
                    "the values have more than {BATCH_BYTES_MAX} bytes together; ask for fewer keys at once"
                );
                return Err(VastoError::new(ErrorCode::InvalidArgument, message));
            }
            values.push(match stored {
                Some(bytes) => visible_value(&bytes, now_us, false)?,
                None => None,
            });
        }
        for key in keys {
            self.readable_band(key)?;
        }
        Ok(GetResult::Values(values))
    }
}
