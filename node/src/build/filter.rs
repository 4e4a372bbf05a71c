//! The entries of another shard's log that belong to a shard.

use vasto_core::Band;
use vasto_core::entry::Entry;
use vasto_core::hash::{jump, partition_hash};
use vasto_core::ids::{PlanId, ShardId};
use vasto_core::record::{BandRange, Body, KeyEntry, Record};

use super::error::BuildError;

/// The shard whose entries are taken from a log.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShardFilter {
    /// The shard ...
    pub shard: ShardId,
    /// ... of this many.
    pub shards: u32,
}

impl ShardFilter {
    /// Checks that a record is no ingest of rows that the shard is to have, unless a checkpoint
    /// contains them: that of the plan `held`, or of an earlier one. The log names the ingested
    /// objects, not their rows.
    pub(super) fn check_ingest(
        &self,
        record: &Record,
        held: Option<PlanId>,
    ) -> Result<(), BuildError> {
        let Body::Ingest { plan, range, .. } = &record.body else { return Ok(()) };
        let owned: BandRange = Band::owned(self.shards).into();
        if Some(*plan) <= held || !range.overlaps(owned) {
            return Ok(());
        }
        let (shard, replica) = (self.shard, record.origin.replica);
        Err(BuildError::CrossesIngest { shard, replica, at_us: record.commit_time })
    }

    /// Returns the entries of a record that belong to the shard.
    pub(super) fn pick(&self, record: Record) -> Vec<KeyEntry> {
        let Body::Data { entries, .. } = record.body else { return Vec::new() };
        entries
            .into_iter()
            .filter(|row| {
                let own = Entry::decode(&row.entry).ok().and_then(|entry| entry.partition_hash);
                jump(own.unwrap_or_else(|| partition_hash(&row.key)), self.shards).shard
                    == self.shard
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vasto_core::ids::{Epoch, Incarnation, Lsn, Origin, OwnSeq, ReplicaId};

    use super::*;

    #[test]
    fn an_ingest_of_owned_bands_needs_a_checkpoint_that_holds_it() {
        let record = Record {
            lsn: Lsn(9),
            synced_lsn: Lsn(8),
            commit_time: 1_000_000,
            floor: 0,
            epoch: Epoch(1),
            origin: Origin { replica: ReplicaId(7), incarnation: Incarnation(1) },
            own_seq: OwnSeq(0),
            body: Body::Ingest {
                plan: PlanId(4),
                range: Band::leaving(2, 3).into(),
                objects: Vec::new(),
                event_time_max: 0,
                progress: Vec::new(),
            },
        };
        let of = |shards| ShardFilter { shard: ShardId(0), shards };
        for held in [None, Some(PlanId(3))] {
            let error = of(2).check_ingest(&record, held).unwrap_err();
            assert!(matches!(error, BuildError::CrossesIngest { .. }), "{error}");
            // The shard as it was before the shrink has none of these bands.
            of(3).check_ingest(&record, held).unwrap();
        }
        for held in [PlanId(4), PlanId(5)] {
            of(2).check_ingest(&record, Some(held)).unwrap();
        }
    }
}
