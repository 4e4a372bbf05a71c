//! Checks whether every object that should be in the bucket is there and unaltered.
//!
//! **Invariant:** a missing object is one that others name: manifests, the log itself, and the reports of the
//! cluster's nodes. For a cluster that has shipped, an empty bucket is not a clean one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use vasto_core::CatalogVersion;
use vasto_core::ids::{KeyspaceId, Lsn};

use crate::bucket::{Bucket, BucketError, ObjectInfo};
use crate::catalog_store::{CatalogError, CatalogStore, now_us};
use crate::chunk::{self, Chunk};
use crate::garbage::of_the_future;
use crate::layout::{self, Owner, Shipped};
use crate::survey::{Found, READS, read, survey};

/// Largest database file list that is read whole even when the check is not deep.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// An object that no other object needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Orphan {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// Seconds since the write.
    pub age_s: u64,
}

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fsck {
    /// Number of objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Number of objects that are needed.
    pub referenced: u64,
    /// The objects that are not needed.
    pub orphans: Vec<Orphan>,
    /// Keys of missing objects that a manifest names, or that the log behind it needs.
    pub missing: Vec<String>,
    /// Keys of objects that differ from what was written.
    pub corrupt: Vec<String>,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

impl Fsck {
    /// Returns true when no object is missing or damaged.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.corrupt.is_empty()
    }
}

/// Objects that the cluster knew to be written when the check began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Catalog versions that a node has applied.
    pub catalogs: Vec<(KeyspaceId, CatalogVersion)>,
    /// Reports of the placed replicas.
    pub replicas: Vec<KnownReplica>,
}

/// The shipping state that a replica reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownReplica {
    /// The replica.
    pub owner: Owner,
    /// LSN of its last checkpoint.
    pub manifest_lsn: Lsn,
    /// LSN up to which checkpoint and chunks cover its log.
    pub shipped_lsn: Lsn,
}

/// An object, whether it is unaltered, and for a chunk its owner, first and last LSN, and whether the log before
/// it may be in the archive of another replica.
type Judged = (String, bool, Option<(Owner, Lsn, Lsn, bool)>);

/// Checks that every named object exists, with the size and checksum that it should have. With
/// `deep` every byte of every object is read; else SSTs are judged by their size.
///
/// # Errors
/// When the bucket does not answer.
pub async fn fsck(bucket: &Bucket, deep: bool) -> Result<Fsck, CatalogError> {
    check(bucket, deep, &Known::default(), now_us()).await
}

/// Checks the same, and that the objects in `known` exist. `clock_us` is the time for the ages.
///
/// # Errors
/// When the bucket does not answer.
pub async fn check(bucket: &Bucket, deep: bool, known: &Known, clock_us: u64) -> Result<Fsck, CatalogError> {
    let survey = survey(bucket, clock_us).await?;
    let sizes: HashMap<&str, u64> = survey.objects.iter().map(|object| (object.key.as_str(), object.bytes)).collect();
    let mut named: BTreeMap<&str, (u64, u32)> = BTreeMap::new();
    for manifest in survey.manifests.values().flat_map(BTreeMap::values) {
        for file in &manifest.files {
            named.insert(&file.key, (file.bytes, file.crc32c));
        }
        if let Some(database) = &manifest.database {
            named.insert(&database.key, (database.bytes, database.crc32c));
        }
    }
    let warnings = survey.warnings.iter().cloned().chain(of_the_future(&survey.objects, clock_us)).collect();
    let mut found = Fsck { corrupt: survey.corrupt.clone(), warnings, ..Fsck::default() };
    let is_there = |key: &str| sizes.contains_key(key);
    if !is_there(&layout::cluster()) && (!survey.objects.is_empty() || *known != Known::default()) {
        found.missing.push(layout::cluster());
    }
    for (keyspace, version) in &known.catalogs {
        let key = layout::catalog_version(*keyspace, *version);
        if !is_there(&key) {
            found.missing.push(key);
        }
    }
    for keyspace in &survey.unbound {
        let catalog = &survey.catalogs[keyspace];
        // A keyspace whose creation was cut off was never applied, and has no second version.
        if catalog.version > CatalogVersion(1) || known.catalogs.iter().any(|(one, _)| one == keyspace) {
            found.missing.push(layout::name_version(&catalog.name, 1));
        }
    }
    for (key, (bytes, _)) in &named {
        match sizes.get(key) {
            None => found.missing.push((*key).to_owned()),
            Some(size) if size != bytes => found.corrupt.push((*key).to_owned()),
            Some(_) => {}
        }
    }
    let known_owner = |owner: &Owner| survey.catalogs.contains_key(&owner.keyspace);
    let is_member =
        |owner: &Owner| survey.catalogs.get(&owner.keyspace).is_some_and(|catalog| catalog.is_placed(owner.replica));
    let mut to_read = Vec::new();
    for object in &survey.objects {
        found.objects += 1;
        found.bytes += object.bytes;
        let needed = match layout::parse_shipped(&object.key) {
            Some((owner, Shipped::Chunk(_) | Shipped::Manifest(_))) => known_owner(&owner),
            Some((_, Shipped::Sst | Shipped::Database)) => named.contains_key(object.key.as_str()),
            None => layout::is_of_the_cluster(&object.key),
        };
        if needed {
            found.referenced += 1;
            to_read.push((object.clone(), named.get(object.key.as_str()).copied()));
        } else {
            found.orphans.push(orphan(object, survey.now_us));
        }
    }
    for file in &survey.staged {
        found.objects += 1;
        found.bytes += file.bytes;
        found.orphans.push(orphan(file, survey.now_us));
    }
    let judged = futures::stream::iter(to_read).map(|(object, named)| async move {
        let mut range = None;
        let key = object.key.as_str();
        let good = match (layout::parse_shipped(key), named) {
            (Some((owner, Shipped::Chunk(first))), _) => {
                let says = match deep {
                    true => match read(bucket, key).await? {
                        Found::Gone => return Ok(None),
                        Found::Bytes(bytes) => Chunk::decode(&bytes).ok().map(|chunk| chunk.says()),
                        Found::Unreadable => None,
                    },
                    false => match bucket.beginning(key, chunk::BEGINNING_BYTES).await? {
                        None => return Ok(None),
                        Some((bytes, size)) => chunk::peek(&bytes).ok().filter(|one| one.bytes == size),
                    },
                };
                says.is_some_and(|says| {
                    range = Some((owner, first, says.last_lsn, says.behind.is_some()));
                    (says.keyspace, says.shard, says.replica, says.first_lsn)
                        == (owner.keyspace, owner.shard, owner.replica, first)
                })
            }
            (Some((_, kind @ (Shipped::Sst | Shipped::Database))), Some((size, crc)))
                if size == object.bytes && (deep || (kind == Shipped::Database && size <= LIST_BYTES_MAX)) =>
            {
                match read(bucket, key).await? {
                    Found::Gone => return Ok(None),
                    Found::Bytes(bytes) => crc32c::crc32c(&bytes) == crc,
                    Found::Unreadable => false,
                }
            }
            (None, _) if layout::parse_catalog_version(key).is_some() => match read(bucket, key).await? {
                Found::Gone => return Ok(None),
                Found::Bytes(bytes) => CatalogStore::decode_version(key, &bytes).is_ok(),
                Found::Unreadable => false,
            },
            _ => true,
        };
        Ok::<_, BucketError>(Some((object.key.clone(), good, range)))
    });
    let judged: Vec<Option<Judged>> = judged.buffer_unordered(READS).try_collect().await?;
    let mut logs: BTreeMap<Owner, BTreeMap<Lsn, (Lsn, bool)>> = BTreeMap::new();
    for (key, good, range) in judged.into_iter().flatten() {
        if !good {
            found.corrupt.push(key);
        }
        if let Some((owner, first, last, behind_another)) = range {
            logs.entry(owner).or_default().insert(first, (last, behind_another));
        }
    }
    let owners: BTreeSet<Owner> = logs.keys().copied().chain(known.replicas.iter().map(|one| one.owner)).collect();
    for owner in owners {
        // Chunks that the newest checkpoint covers may be missing; without a checkpoint the log has to begin at 1,
        // unless its replica has left the shard and gc is removing its archive.
        let newest = survey.manifests.get(&owner).and_then(|all| all.keys().next_back().copied());
        let says = known.replicas.iter().find(|one| one.owner == owner);
        if let Some(says) = says.filter(|says| newest.unwrap_or_default() < says.manifest_lsn) {
            found.missing.push(layout::manifest(owner.keyspace, owner.shard, owner.replica, says.manifest_lsn));
        }
        let Some(start) = newest.or((is_member(&owner) || says.is_some()).then_some(Lsn(0))) else { continue };
        let missing = |at: Lsn| layout::chunk(owner.keyspace, owner.shard, owner.replica, at.next());
        let mut at = start;
        for (first, (last, behind_another)) in logs.get(&owner).into_iter().flatten() {
            if *first > at.next() && *last > start && !behind_another {
                found.missing.push(missing(at));
            }
            at = at.max(*last);
        }
        if says.is_some_and(|says| at < says.shipped_lsn) {
            found.missing.push(missing(at));
        }
    }
    found.missing.sort_unstable();
    found.missing.dedup();
    found.corrupt.sort_unstable();
    found.corrupt.dedup();
    Ok(found)
}

fn orphan(object: &ObjectInfo, now_us: u64) -> Orphan {
    let age_s = now_us.saturating_sub(object.modified_us) / 1_000_000;
    Orphan { key: object.key.clone(), bytes: object.bytes, age_s }
}
