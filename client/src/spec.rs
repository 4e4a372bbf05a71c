//! The specification of a keyspace to create.

use std::time::Duration;

use vasto_core::band::check_shard_count;
use vasto_core::catalog::Ack;
use vasto_core::limits::{REPLICAS_MAX, check_ttl_ms};

use crate::error::{Error, ErrorKind};

/// The specification of a keyspace: one shard, one replica and synced acknowledgements unless set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyspaceSpec {
    pub(crate) shards: u32,
    pub(crate) replicas: u32,
    pub(crate) ack: Ack,
    pub(crate) ttl_ms: Option<u64>,
    pub(crate) quarantine_ms: Option<u64>,
    pub(crate) tombstone_grace_ms: Option<u64>,
}

impl Default for KeyspaceSpec {
    fn default() -> Self {
        Self {
            shards: 1,
            replicas: 1,
            ack: Ack::Fsync,
            ttl_ms: None,
            quarantine_ms: None,
            tombstone_grace_ms: None,
        }
    }
}

impl KeyspaceSpec {
    /// Sets the number of shards: 1 to 64.
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = shards;
        self
    }

    /// Sets the number of replicas of each shard, 1 to 7.
    pub fn replicas(mut self, replicas: u32) -> Self {
        self.replicas = replicas;
        self
    }

    /// Sets when writes are acknowledged; a request may ask for more.
    pub fn ack(mut self, ack: Ack) -> Self {
        self.ack = ack;
        self
    }

    /// Sets the time to live of values that are put without their own, or that a counter, a
    /// maximum, a minimum or an append creates; at least 1 ms. An update of a value keeps its
    /// expiry.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl_ms = Some(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Sets how long keys that moved to another shard are kept on their old one, unserved; 24 h if
    /// not given.
    pub fn quarantine(mut self, time: Duration) -> Self {
        self.quarantine_ms = Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Sets how long deletes are remembered at least, so that a replica that was away cannot bring
    /// a deleted key back; at least 1 s, 24 h if not given.
    pub fn tombstone_grace(mut self, time: Duration) -> Self {
        self.tombstone_grace_ms = Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        check_shard_count(self.shards)?;
        if !(1..=REPLICAS_MAX).contains(&self.replicas) {
            let message =
                format!("{} replicas are not possible; use 1 to {REPLICAS_MAX}", self.replicas);
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.ttl_ms.map_or(Ok(()), check_ttl_ms)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications_that_cannot_be() {
        let spec = KeyspaceSpec::default;
        assert!(spec().shards(64).replicas(7).ttl(Duration::from_secs(1)).check().is_ok());
        assert!(
            spec().ttl(Duration::from_secs(100 * 365 * 86_400)).check().is_ok(),
            "a hundred years"
        );
        for bad in [
            spec().shards(0),
            spec().shards(65),
            spec().shards(5000),
            spec().replicas(0),
            spec().replicas(8),
            spec().ttl(Duration::ZERO),
            spec().ttl(Duration::MAX),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
