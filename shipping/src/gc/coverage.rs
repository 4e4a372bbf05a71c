//! Coverage: which archives of replicas that left their shard no reader needs any more.
//!
//! **Invariant:** the archive of a replica that left its shard is deleted only when a checkpoint of
//! the shard covers every record of it: another log may continue it.

use std::collections::BTreeSet;

use vasto_core::ids::{Lsn, Vector, covers, join};

use super::retention::{Retention, is_member};
use super::survey::{Found, Shipments, Survey, read};
use crate::archive;
use crate::bucket::{Bucket, BucketError};
use crate::chunk::Chunk;
use crate::layout::Owner;
use crate::manifest::Manifest;

/// Returns the replicas that left a shard and are covered: a checkpoint of the shipper holds every
/// record that they have shipped, so that no reader needs an archive that another log continues.
/// For a replica whose loss was accepted, its own last records need not be covered, unless another
/// log continues its archive.
pub(super) async fn covered(
    bucket: &Bucket,
    survey: &Survey,
    shipments: &Shipments<'_>,
    retention: Retention,
) -> Result<BTreeSet<Owner>, BucketError> {
    let keep_from = retention.keep_from(survey.now_us);
    let mut covered = BTreeSet::new();
    for (owner, firsts) in &shipments.chunks {
        let successors = succeeding(survey, shipments, keep_from, owner);
        if successors.is_empty() {
            continue;
        }
        let Some(reach) = reach(bucket, survey, *owner, firsts).await? else { continue };
        if successors.iter().any(|manifest| covers(&manifest.vector, &reach)) {
            covered.insert(*owner);
            continue;
        }
        let given_up = survey.catalogs.get(&owner.keyspace).and_then(|catalog| {
            catalog
                .given_up
                .iter()
                .find(|lost| lost.replica == owner.replica)
                .map(|lost| lost.version)
        });
        let Some(given_up) = given_up else { continue };
        let of_others: Vector =
            reach.into_iter().filter(|(origin, _)| origin.replica != owner.replica).collect();
        let covers_others = |manifest: &&Manifest| {
            manifest.version >= given_up && covers(&manifest.vector, &of_others)
        };
        if successors.iter().any(covers_others) && !is_leant_on(bucket, shipments, *owner).await? {
            covered.insert(*owner);
        }
    }
    Ok(covered)
}

/// Returns the checkpoints that restore what the shipper of a replica's shard held when the
/// retained archive began; none while the replica is a member of the shard.
fn succeeding<'a>(
    survey: &'a Survey,
    shipments: &Shipments<'_>,
    keep_from: u64,
    owner: &Owner,
) -> Vec<&'a Manifest> {
    let catalog = survey.catalogs.get(&owner.keyspace).filter(|catalog| !is_member(catalog, owner));
    let shipper = catalog.and_then(|catalog| catalog.shard(owner.shard)?.shipper());
    let Some(shipper) = shipper.map(|shipper| Owner { replica: shipper.replica, ..*owner }) else {
        return Vec::new();
    };
    let is_from_before =
        |lsn: &Lsn| shipments.written_us(&shipper.manifest(*lsn)).is_some_and(|at| at <= keep_from);
    let manifests = survey.manifests.get(&shipper).into_iter().flatten();
    manifests.filter(|(lsn, _)| is_from_before(lsn)).map(|(_, manifest)| manifest).collect()
}

/// Returns true when the log of another replica of the shard continues this replica's archive, or
/// may: a chunk of that log cannot be read.
async fn is_leant_on(
    bucket: &Bucket,
    shipments: &Shipments<'_>,
    owner: Owner,
) -> Result<bool, BucketError> {
    for (other, firsts) in &shipments.chunks {
        let is_other =
            (other.keyspace, other.shard) == (owner.keyspace, owner.shard) && *other != owner;
        if !is_other {
            continue;
        }
        let continued = archive::continued_by(bucket, *other, firsts).await?;
        if continued.unreadable > 0 || continued.replicas.contains(&owner.replica) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns, per origin, the last record that a replica has shipped; `None` when an object is
/// unreadable.
async fn reach(
    bucket: &Bucket,
    survey: &Survey,
    owner: Owner,
    chunks: &[Lsn],
) -> Result<Option<Vector>, BucketError> {
    let newest = survey.manifests.get(&owner).and_then(|all| all.values().next_back());
    let mut vector = newest.map(|manifest| manifest.vector.clone()).unwrap_or_default();
    let behind = |first: &&Lsn| newest.is_none_or(|newest| **first > newest.lsn);
    for first in chunks.iter().filter(behind) {
        let key = owner.chunk(*first);
        let Found::Bytes(bytes) = read(bucket, &key).await? else { return Ok(None) };
        let Ok(chunk) = Chunk::decode(&bytes) else { return Ok(None) };
        vector = join(&vector, &chunk.vector());
    }
    Ok(Some(vector))
}
