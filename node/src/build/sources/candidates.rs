//! Choice and order of the archives of a shard that a build reads.
//!
//! **Invariants**
//! - Archives that no longer reach back to the target time are an error, unless another one does.
//! - Among archives of equal rank the one that has purged the most tombstones comes first: what it
//!   has purged cannot come back.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use vasto_core::ids::{KeyspaceId, Lsn, ReplicaId, ShardId};
use vasto_shipping::archive::{self, ArchiveError, Newest, ReplicaArchive};
use vasto_shipping::bucket::{Bucket, BucketError};
use vasto_shipping::layout::Owner;

use super::{RestoreSource, RestoreSources, Without};
use crate::build::error::BuildError;

/// Everything that was shipped of a shard until the target time.
#[derive(Default)]
struct Shipped {
    /// The archives that can be read, alone or together with others.
    all: Vec<RestoreSource>,
    /// The ones among them that cannot be read without another replica's.
    dependent: BTreeSet<ReplicaId>,
    /// There are objects, whether they can be read or not.
    has_objects: bool,
    /// The greatest commit time in the oldest checkpoint that is newer than the target time,
    /// microseconds.
    later_us: Option<u64>,
}

/// Selects and orders the archives to restore from, among everything that was shipped of a shard.
/// `until_us` is the target time, microseconds; `None` selects everything.
///
/// # Errors
/// `NotRetained` when there are archives, but none that reaches back to the target time.
pub(crate) async fn candidates(
    bucket: &Bucket,
    keyspace: KeyspaceId,
    shard: ShardId,
    preferred: &[ReplicaId],
    without: Without<'_>,
    until_us: Option<u64>,
) -> Result<RestoreSources, BuildError> {
    let mut shipped = Shipped::default();
    for (replica, archived) in archive::archives(bucket, keyspace, shard).await? {
        let of_an_earlier_shard =
            without.retirements.iter().any(|retirement| retirement.concerns(shard, replica));
        if !without.discarded.contains(&replica) && !of_an_earlier_shard {
            shipped.add(bucket, Owner { keyspace, shard, replica }, archived, until_us).await?;
        }
    }
    let Shipped { mut all, dependent, has_objects, later_us } = shipped;
    // The archive can be read without any other: it has a checkpoint, or its log begins at LSN 1.
    let stands_alone = |source: &RestoreSource| !dependent.contains(&source.owner.replica);
    if has_objects && !all.iter().any(stands_alone) {
        return Err(BuildError::NotRetained { shard, oldest_us: later_us });
    }
    let chain = chain_of(bucket, preferred, &all).await?;
    let given_up = |source: &RestoreSource| {
        without.given_up.iter().find(|lost| lost.replica == source.owner.replica)
    };
    let rank = |source: &RestoreSource| {
        chain.iter().position(|id| *id == source.owner.replica).unwrap_or(chain.len())
    };
    // Sort order: archives that stand alone, then those of the chain in its order, then those with
    // a checkpoint, then those whose loss was not accepted, then the greatest gc floor. The first
    // checkpoint becomes the database. The one with the greatest floor has purged the most
    // tombstones, with the values under them; an older checkpoint may still hold such a value
    // without its tombstone. The rows of another checkpoint are merged only when the first lacks
    // some of its records (see `merge_base`), so a covered one cannot bring the deleted value back.
    // In the other order the old value would be in the database, and the rows of the newer one
    // would have no tombstone for it.
    let purged = |source: &RestoreSource| {
        source
            .base
            .as_ref()
            .map_or((0, 0), |base| (base.manifest.floor, base.manifest.commit_time_max))
    };
    all.sort_by_key(|source| {
        let last = Reverse(purged(source));
        (
            !stands_alone(source),
            rank(source),
            source.base.is_none(),
            given_up(source).is_some(),
            last,
        )
    });
    // An archive is set aside when the first checkpoint was made under the catalog version that
    // accepted the loss of its replica, or a later one: the checkpoint contains what was taken over
    // from that replica. The archive may also hold entries that were deleted since and whose
    // tombstones were purged.
    let first = all.first().map(|source| source.owner);
    let version =
        all.first().and_then(|source| source.base.as_ref()).map(|base| base.manifest.version);
    let is_over = |source: &RestoreSource| {
        let is_over =
            given_up(source).zip(version).is_some_and(|(lost, version)| lost.version <= version);
        Some(source.owner) != first && !chain.contains(&source.owner.replica) && is_over
    };
    let (set_aside, all) = all.into_iter().partition(is_over);
    Ok(RestoreSources { all, chain, set_aside, later_us })
}

impl Shipped {
    /// Adds the archive of a replica when it can be read, alone or together with others.
    async fn add(
        &mut self,
        bucket: &Bucket,
        owner: Owner,
        archived: ReplicaArchive,
        until_us: Option<u64>,
    ) -> Result<(), BuildError> {
        let newest = archive::newest_checkpoint(bucket, owner, &archived, until_us).await;
        if let Err(ArchiveError::Bucket(error)) = newest {
            return Err(error.into());
        }
        // A checkpoint covers the log before it. Without one, the log may lean on another archive:
        // the replica was made from what another one had shipped, and even its record with LSN 1
        // continues that archive.
        let has_base = newest.as_ref().is_ok_and(|newest| newest.base.is_some());
        let continues_another =
            !has_base && archive::begins_behind_another(bucket, owner, &archived).await?;
        let from_the_start =
            !has_base && !continues_another && archived.chunks.first() == Some(&Lsn(1));
        let newest = match newest {
            Err(error) if from_the_start => {
                tracing::warn!(%error, "no checkpoint can be read; the log is read from its beginning");
                Newest::default()
            }
            other => other?,
        };
        self.has_objects |= !archived.manifests.is_empty() || !archived.chunks.is_empty();
        let later_us = newest.later.first().map(|later| later.commit_time_max);
        self.later_us = self.later_us.into_iter().chain(later_us).min();
        if continues_another {
            self.dependent.insert(owner.replica);
        }
        // A log without its beginning is useless without a checkpoint, unless it continues another
        // replica's archive.
        if has_base || from_the_start || continues_another {
            let end = archived.manifests.last().into_iter().chain(archived.chunks.last()).max();
            self.all.push(RestoreSource {
                owner,
                base: newest.base,
                end: end.copied().unwrap_or_default(),
                chunks: archived.chunks,
                times: archived.times,
                later: newest.later,
            });
        }
        Ok(())
    }
}

/// Returns the preferred replicas and those whose archives they continue: the logs of preferred
/// replicas continue the archives of others, these again others, and so on.
async fn chain_of(
    bucket: &Bucket,
    preferred: &[ReplicaId],
    all: &[RestoreSource],
) -> Result<Vec<ReplicaId>, BucketError> {
    let mut chain = preferred.to_vec();
    let mut next = 0;
    while let Some(replica) = chain.get(next).copied() {
        next += 1;
        let Some(source) = all.iter().find(|source| source.owner.replica == replica) else {
            continue;
        };
        let unread = source.chunks.partition_point(|first| *first <= source.start());
        let unread = &source.chunks[unread..];
        for other in archive::continued_by(bucket, source.owner, unread).await?.replicas {
            if !chain.contains(&other) {
                chain.push(other);
            }
        }
    }
    Ok(chain)
}
