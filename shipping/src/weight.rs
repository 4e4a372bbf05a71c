//! What a build of a shard reads out of its archive, before it does: for forecasts.
//!
//! **Invariant:** reads names, sizes and manifests only, and decides nothing. A build chooses its
//! archives by itself; this follows the same order of preference, and is wrong where archives have
//! gaps.

use std::collections::BTreeMap;

use vasto_core::catalog::Retirement;
use vasto_core::ids::covers;
use vasto_core::{KeyspaceId, Lsn, ReplicaId, ShardId};

use crate::archive::{self, ArchiveError, ArchivedCheckpoint, ReplicaArchive};
use crate::bucket::{Bucket, ObjectInfo};
use crate::layout::{self, Owner, Shipped};

/// The objects that a build of one shard reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weight {
    /// SSTs of checkpoints, and lists of their databases.
    pub files: u64,
    /// Their bytes.
    pub file_bytes: u64,
    /// Chunks of the log behind the checkpoints.
    pub chunks: u64,
    /// Their bytes.
    pub chunk_bytes: u64,
}

/// Which archives of a shard a build reads, and up to which time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading<'a> {
    /// The replica whose archive comes first: the one that is recovered.
    pub preferred: Option<ReplicaId>,
    /// Replicas whose archives are never part of the keyspace.
    pub discarded: &'a [ReplicaId],
    /// Retirements before the target time, whose replicas belonged to other shards of that number.
    pub retirements: &'a [Retirement],
    /// The target time, microseconds since 1970; `None` is everything.
    pub until_us: Option<u64>,
}

/// Weighs the archives of a shard. Lists, and reads a manifest or two of each replica.
///
/// # Errors
/// When the bucket fails, or no checkpoint of a replica can be read.
pub async fn weigh(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
    reading: Reading<'_>,
) -> Result<Weight, ArchiveError> {
    let objects = bucket.list(&layout::shard_prefix(keyspace, shard)).await?;
    let mut archives = archive::by_replica(&objects);
    let is_other = |replica: ReplicaId| {
        reading.discarded.contains(&replica)
            || reading.retirements.iter().any(|retired| retired.concerns(shard, replica))
    };
    archives.retain(|replica, _| !is_other(*replica));
    let sizes = chunk_sizes(&objects);
    let mut bases: BTreeMap<ReplicaId, ArchivedCheckpoint> = BTreeMap::new();
    for (replica, archived) in &archives {
        let owner = Owner { keyspace, shard, replica: *replica };
        let newest = archive::newest_checkpoint(bucket, owner, archived, reading.until_us).await?;
        bases.extend(newest.base.map(|base| (*replica, base)));
    }
    // The archive of the recovered replica is enough when it has a beginning.
    let alone = reading.preferred.filter(|replica| {
        let begins = |archived: &ReplicaArchive| archived.chunks.first() == Some(&Lsn(1));
        bases.contains_key(replica) || archives.get(replica).is_some_and(begins)
    });
    if let Some(replica) = alone {
        archives.retain(|other, _| *other == replica);
        bases.retain(|other, _| *other == replica);
    }
    let purged = |base: &ArchivedCheckpoint| (base.manifest.floor, base.manifest.commit_time_max);
    let first = bases.iter().max_by_key(|(_, base)| purged(base)).map(|(replica, _)| *replica);
    let mut weight = Weight::default();
    for (replica, archived) in &archives {
        let base = bases.get(replica);
        let held = first.and_then(|first| bases.get(&first));
        let is_read = |base: &&ArchivedCheckpoint| {
            let covered =
                |held: &ArchivedCheckpoint| covers(&held.manifest.vector, &base.manifest.vector);
            first == Some(*replica) || !held.is_some_and(covered)
        };
        if let Some(base) = base.filter(is_read) {
            let database = base.manifest.database.as_ref();
            weight.files += base.manifest.files.len() as u64 + u64::from(database.is_some());
            weight.file_bytes += base.manifest.bytes() + database.map_or(0, |list| list.bytes);
        }
        let after = base.map_or(Lsn(0), |base| base.manifest.lsn);
        for first in behind(archived, after, reading.until_us) {
            weight.chunks += 1;
            weight.chunk_bytes += sizes.get(&(*replica, first)).copied().unwrap_or_default();
        }
    }
    Ok(weight)
}

/// Returns the first LSNs of the chunks that are read behind a checkpoint: up to the first one that
/// the store received after the target time.
fn behind(
    archived: &ReplicaArchive,
    after: Lsn,
    until_us: Option<u64>,
) -> impl Iterator<Item = Lsn> + '_ {
    let mut over = false;
    let chunks = archived.chunks.iter().copied().filter(move |first| *first > after);
    chunks.take_while(move |first| {
        let received_us = archived.times.chunks.get(first).copied().unwrap_or_default();
        let was_over = over;
        over = until_us.is_some_and(|until| received_us > until);
        !was_over
    })
}

fn chunk_sizes(objects: &[ObjectInfo]) -> BTreeMap<(ReplicaId, Lsn), u64> {
    let size = |object: &ObjectInfo| match layout::parse_shipped(&object.key)? {
        (owner, Shipped::Chunk(first)) => Some(((owner.replica, first), object.bytes)),
        _ => None,
    };
    objects.iter().filter_map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Times;

    #[test]
    fn the_chunk_that_reaches_the_time_is_the_last_one() {
        let firsts = [1, 11, 21, 31].map(Lsn);
        let times = Times {
            chunks: firsts.into_iter().zip([100, 200, 300, 400]).collect(),
            ..Times::default()
        };
        let archived = ReplicaArchive { chunks: firsts.to_vec(), times, ..Default::default() };
        let read = |after, until| behind(&archived, Lsn(after), until).collect::<Vec<_>>();
        assert_eq!(read(0, None), firsts);
        assert_eq!(read(10, None), firsts[1..]);
        assert_eq!(read(10, Some(250)), firsts[1..3]);
        assert_eq!(read(40, None), []);
    }
}
