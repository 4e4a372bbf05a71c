//! Requests of the client to write, before they are sent: single writes and batches, with all limit
//! checks done here.
//!
//! **Invariant:** nothing over a limit leaves this module; the limits are those of
//! `vasto_core::limits`, the same as on the node.

use std::time::Duration;

use bytes::Bytes;
use vasto_core::limits::{
    BATCH_BYTES_MAX, BATCH_OPS_MAX, LimitError, check_event_time, check_ttl_ms, check_value,
};
use vasto_proto::v1;

use crate::key::{IntoBytes, Key};

/// Options of a put or a delete beside its key and value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteOptions {
    pub(crate) ttl: Option<Duration>,
    pub(crate) event_time: Option<u64>,
}

impl WriteOptions {
    /// Sets the time to live, at least 1 ms; the keyspace's default if not given. Has no effect on
    /// a delete.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Sets the event time in microseconds since 1970, not 0 and at most a minute ahead of the
    /// clock. The replica assigns one if not given. The later event time wins.
    pub fn event_time(mut self, micros: u64) -> Self {
        self.event_time = Some(micros);
        self
    }
}

/// A put or a delete.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    pub key: Key,
    /// `None` deletes.
    pub value: Option<Bytes>,
    pub options: WriteOptions,
}

impl Write {
    /// Checks the write against the limits; `now_us` is the clock, microseconds since 1970.
    pub(crate) fn check(&self, now_us: u64) -> Result<(), LimitError> {
        self.key.check()?;
        if let Some(value) = &self.value {
            check_value(value)?;
        }
        if let Some(event_time) = self.options.event_time {
            check_event_time(event_time, now_us)?;
        }
        if let Some(ttl) = self.options.ttl {
            check_ttl_ms(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))?;
        }
        Ok(())
    }

    /// Returns the bytes of key and value.
    pub(crate) fn bytes(&self) -> usize {
        self.key.key.len() + self.value.as_ref().map_or(0, Bytes::len)
    }

    pub(crate) fn to_wire(&self) -> v1::WriteOp {
        let op = match &self.value {
            Some(value) => v1::write_op::Op::Put(v1::Put {
                value: value.clone(),
                // `check` refuses a time to live that does not fit.
                ttl_ms: self
                    .options
                    .ttl
                    .map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
                ..Default::default()
            }),
            None => v1::write_op::Op::Delete(v1::Delete::default()),
        };
        v1::WriteOp {
            key: Some(self.key.to_wire()),
            event_time: self.options.event_time,
            op: Some(op),
        }
    }
}

/// Several writes that are sent together: atomic for each partition key, and the writes of one
/// shard become durable together. At most 16 MiB or 10,000 writes.
#[derive(Debug, Clone, Default)]
#[must_use = "a batch does nothing until it is given to `Keyspace::write`"]
pub struct Batch {
    pub(crate) writes: Vec<Write>,
}

impl Batch {
    /// Returns an empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a put.
    pub fn put(self, key: impl Into<Key>, value: impl IntoBytes) -> Self {
        self.put_with(key, value, WriteOptions::default())
    }

    /// Adds a put with a time to live or an event time.
    pub fn put_with(
        mut self,
        key: impl Into<Key>,
        value: impl IntoBytes,
        options: WriteOptions,
    ) -> Self {
        self.writes.push(Write { key: key.into(), value: Some(value.into_bytes()), options });
        self
    }

    /// Adds a delete.
    pub fn delete(self, key: impl Into<Key>) -> Self {
        self.delete_with(key, WriteOptions::default())
    }

    /// Adds a delete with an event time.
    pub fn delete_with(mut self, key: impl Into<Key>, options: WriteOptions) -> Self {
        self.writes.push(Write { key: key.into(), value: None, options });
        self
    }

    /// Returns the number of writes.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Returns true when the batch holds no write.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Returns the bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.writes.iter().map(Write::bytes).sum()
    }

    pub(crate) fn check(&self, now_us: u64) -> Result<(), LimitError> {
        if self.len() > BATCH_OPS_MAX {
            return Err(LimitError::BatchTooMany(self.len()));
        }
        let bytes = self.bytes();
        if bytes > BATCH_BYTES_MAX {
            return Err(LimitError::BatchTooLong(bytes));
        }
        self.writes.iter().try_for_each(|write| write.check(now_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_core::limits::TTL_MS_MAX;

    const NOW: u64 = 1_700_000_000_000_000;

    fn put(options: WriteOptions) -> Result<(), LimitError> {
        Batch::new().put_with("k", "v", options).check(NOW)
    }

    #[test]
    fn times_at_the_boundary() {
        let options = WriteOptions::default;
        assert_eq!(put(options().ttl(Duration::from_millis(1))), Ok(()));
        assert_eq!(put(options().ttl(Duration::from_micros(999))), Err(LimitError::BadTtl(0)));
        assert!(put(options().ttl(Duration::MAX)).is_err());
        assert_eq!(put(options().ttl(Duration::from_millis(TTL_MS_MAX))), Ok(()));
        assert!(put(options().ttl(Duration::from_millis(TTL_MS_MAX + 1))).is_err());
        assert_eq!(put(options().event_time(0)), Err(LimitError::EventTimeZero));
        assert_eq!(put(options().event_time(NOW + 60_000_000)), Ok(()));
        assert!(put(options().event_time(NOW + 60_000_001)).is_err());
    }

    #[test]
    fn sizes_at_the_boundary() {
        let many = |n: usize| (0..n).fold(Batch::new(), |batch, _| batch.delete("k"));
        assert_eq!(many(10_000).check(NOW), Ok(()));
        assert_eq!(many(10_001).check(NOW), Err(LimitError::BatchTooMany(10_001)));
        let value = Bytes::from(vec![0; 4 << 20]);
        let four = |key: &str| (0..4).fold(Batch::new(), |batch, _| batch.put(key, &value));
        assert!(matches!(four("k").check(NOW), Err(LimitError::BatchTooLong(_))));
        assert_eq!(Batch::new().put("k", &value).check(NOW), Ok(()));
        assert!(Batch::new().put("k", vec![0; (4 << 20) + 1]).check(NOW).is_err());
        assert!(Batch::new().put("k", "v").delete("").check(NOW).is_err());
    }
}
