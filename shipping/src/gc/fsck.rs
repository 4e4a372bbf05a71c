//! Checks whether every object that should be in the bucket is there and unaltered.
//!
//! **Invariant:** a missing object is one that others name: manifests, running plans, the log
//! itself, and the reports of the cluster's nodes. For a cluster that has shipped, an empty bucket is not a clean
//! one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use vasto_core::CatalogVersion;
use vasto_core::ids::{KeyspaceId, Lsn};
use vasto_core::report::{Continues, ShipsBehind};

use super::clocks::of_the_future;
use super::exports::{self, NamedExports};
use super::survey::{Found, Survey, read, survey};
use crate::archive::READS;
use crate::bucket::{Bucket, BucketError, ObjectInfo};
use crate::catalog::{CatalogError, CatalogStore};
use crate::chunk::{self, Chunk};
use crate::clock::now_us;
use crate::layout::{self, Owner, Shipped};

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
    /// Keys of missing objects that a manifest or a running plan names, or that the log after it
    /// needs.
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
    /// Whose archive its own one continues; `None` when its node does not say.
    pub behind: Option<ShipsBehind>,
}

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
pub async fn check(
    bucket: &Bucket,
    deep: bool,
    known: &Known,
    clock_us: u64,
) -> Result<Fsck, CatalogError> {
    let survey = survey(bucket, clock_us).await?;
    let exports = exports::named_by_plans(bucket, &survey).await?;
    let named = named(&survey, &exports);
    let warnings =
        survey.warnings.iter().cloned().chain(of_the_future(&survey.objects, clock_us)).collect();
    let corrupt = survey.corrupt.iter().chain(&exports.corrupt).cloned().collect();
    let missing = exports.missing.clone();
    let mut found = Fsck { corrupt, missing, warnings, ..Fsck::default() };
    find_missing(&survey, &named, known, &mut found);
    let needed = sort_objects(&survey, &named, &mut found);
    let logs = read_objects(bucket, needed, &named, deep, &mut found).await?;
    find_holes(&survey, &logs, known, &mut found);
    found.missing.sort_unstable();
    found.missing.dedup();
    found.corrupt.sort_unstable();
    found.corrupt.dedup();
    Ok(found)
}

/// Size and CRC-32C of each object that a manifest names, by its key.
type Named<'a> = BTreeMap<&'a str, (u64, u32)>;

fn named<'a>(survey: &'a Survey, exports: &'a NamedExports) -> Named<'a> {
    let mut named = BTreeMap::new();
    for table in exports.manifests.iter().flat_map(|manifest| &manifest.files) {
        named.insert(table.key.as_str(), (table.bytes, table.crc32c));
    }
    for manifest in survey.all_manifests() {
        named.extend(
            manifest.files.iter().map(|file| (file.key.as_str(), (file.bytes, file.crc32c))),
        );
        named.extend(
            manifest.database.iter().map(|list| (list.key.as_str(), (list.bytes, list.crc32c))),
        );
    }
    named
}

/// Finds the missing objects of the cluster, and the missing and misshapen ones that manifests
/// name.
fn find_missing(survey: &Survey, named: &Named<'_>, known: &Known, found: &mut Fsck) {
    let sizes: HashMap<&str, u64> =
        survey.objects.iter().map(|object| (object.key.as_str(), object.bytes)).collect();
    let is_there = |key: &str| sizes.contains_key(key);
    if !is_there(&layout::cluster()) && (!survey.objects.is_empty() || *known != Known::default()) {
        found.missing.push(layout::cluster());
    }
    let applied = known
        .catalogs
        .iter()
        .map(|(keyspace, version)| layout::catalog_version(*keyspace, *version));
    found.missing.extend(applied.filter(|key| !is_there(key)));
    for keyspace in &survey.unbound {
        let catalog = &survey.catalogs[keyspace];
        // A keyspace whose creation was cut off was never applied, and has no second version.
        if catalog.version > CatalogVersion(1)
            || known.catalogs.iter().any(|(applied, _)| applied == keyspace)
        {
            found.missing.push(layout::name_version(&catalog.name, 1));
        }
    }
    for (key, (bytes, _)) in named {
        match sizes.get(key) {
            None => found.missing.push((*key).to_owned()),
            Some(size) if size != bytes => found.corrupt.push((*key).to_owned()),
            Some(_) => {}
        }
    }
}

/// Counts the objects and finds the orphans; returns the objects that are needed.
fn sort_objects<'a>(
    survey: &'a Survey,
    named: &Named<'_>,
    found: &mut Fsck,
) -> Vec<&'a ObjectInfo> {
    let mut needed = Vec::new();
    for object in &survey.objects {
        let is_needed = match layout::parse_shipped(&object.key) {
            Some((owner, Shipped::Chunk(_) | Shipped::Manifest(_))) => {
                survey.catalogs.contains_key(&owner.keyspace)
            }
            Some((_, Shipped::Sst | Shipped::Database)) => named.contains_key(object.key.as_str()),
            None => match layout::parse_export(&object.key) {
                // An attempt that its running plan does not name may still be uploaded.
                Some((keyspace, plan)) => {
                    survey.catalogs.contains_key(&keyspace)
                        && exports::is_needed(survey, keyspace, plan)
                }
                None => layout::is_of_the_cluster(&object.key),
            },
        };
        if is_needed {
            needed.push(object);
        } else {
            found.orphans.push(orphan(object, survey.now_us));
        }
    }
    found.referenced = needed.len() as u64;
    found.orphans.extend(survey.staged.iter().map(|file| orphan(file, survey.now_us)));
    let all = || survey.objects.iter().chain(&survey.staged);
    (found.objects, found.bytes) = (all().count() as u64, all().map(|object| object.bytes).sum());
    needed
}

fn orphan(object: &ObjectInfo, now_us: u64) -> Orphan {
    let age_s = now_us.saturating_sub(object.modified_us) / 1_000_000;
    Orphan { key: object.key.clone(), bytes: object.bytes, age_s }
}

/// The records of a readable chunk.
#[derive(Debug, Clone, Copy)]
struct Range {
    owner: Owner,
    first: Lsn,
    last: Lsn,
    /// The log before it may be in the archive of another replica.
    behind_another: bool,
}

/// The chunks of each replica, by their first LSNs.
type Logs = BTreeMap<Owner, BTreeMap<Lsn, Range>>;

/// Reads the objects, finds the altered ones, and returns the records of the chunks.
async fn read_objects(
    bucket: &Bucket,
    objects: Vec<&ObjectInfo>,
    named: &Named<'_>,
    deep: bool,
    found: &mut Fsck,
) -> Result<Logs, BucketError> {
    let reads =
        objects.into_iter().map(|object| (object.clone(), named.get(object.key.as_str()).copied()));
    let reads: Vec<_> = reads.collect();
    let reads = futures::stream::iter(reads).map(|(object, named)| async move {
        let read = read_object(bucket, &object, named, deep).await?;
        Ok::<_, BucketError>((object.key, read))
    });
    let reads: Vec<(String, Read)> = reads.buffer_unordered(READS).try_collect().await?;
    let mut logs = Logs::new();
    for (key, read) in reads {
        match read {
            Read::Good => {}
            Read::Altered => found.corrupt.push(key),
            Read::Chunk { range, good } => {
                if !good {
                    found.corrupt.push(key);
                }
                logs.entry(range.owner).or_default().insert(range.first, range);
            }
        }
    }
    Ok(logs)
}

/// Result of reading an object.
enum Read {
    /// Unaltered, not to be read, or deleted meanwhile.
    Good,
    Altered,
    /// A readable chunk; not good when it is another one's under this key.
    Chunk {
        range: Range,
        good: bool,
    },
}

async fn read_object(
    bucket: &Bucket,
    object: &ObjectInfo,
    named: Option<(u64, u32)>,
    deep: bool,
) -> Result<Read, BucketError> {
    let key = object.key.as_str();
    let is_read = |kind: Shipped, size: u64| {
        size == object.bytes && (deep || (kind == Shipped::Database && size <= LIST_BYTES_MAX))
    };
    let checksum = match (layout::parse_shipped(key), named) {
        (Some((owner, Shipped::Chunk(first))), _) => {
            return read_chunk(bucket, key, owner, first, deep).await;
        }
        (Some((_, kind @ (Shipped::Sst | Shipped::Database))), Some((size, crc)))
            if is_read(kind, size) =>
        {
            Some(crc)
        }
        (None, Some((size, crc)))
            if deep && size == object.bytes && layout::parse_export(key).is_some() =>
        {
            Some(crc)
        }
        (None, _) if layout::parse_catalog_version(key).is_some() => None,
        _ => return Ok(Read::Good),
    };
    let is_good = |bytes: &[u8]| match checksum {
        Some(checksum) => crc32c::crc32c(bytes) == checksum,
        None => CatalogStore::decode_version(key, bytes).is_ok(),
    };
    Ok(match read(bucket, key).await? {
        Found::Gone => Read::Good,
        Found::Bytes(bytes) if is_good(&bytes) => Read::Good,
        Found::Bytes(_) | Found::Unreadable => Read::Altered,
    })
}

async fn read_chunk(
    bucket: &Bucket,
    key: &str,
    owner: Owner,
    first: Lsn,
    deep: bool,
) -> Result<Read, BucketError> {
    let header = if deep {
        match read(bucket, key).await? {
            Found::Gone => return Ok(Read::Good),
            Found::Bytes(bytes) => Chunk::decode(&bytes).ok().map(|chunk| chunk.says()),
            Found::Unreadable => None,
        }
    } else {
        match bucket.beginning(key, chunk::BEGINNING_BYTES).await? {
            None => return Ok(Read::Good),
            Some((bytes, size)) => chunk::peek(&bytes).ok().filter(|header| header.bytes == size),
        }
    };
    let Some(header) = header else { return Ok(Read::Altered) };
    let range =
        Range { owner, first, last: header.last_lsn, behind_another: header.behind.is_some() };
    let good = (header.keyspace, header.shard, header.replica, header.first_lsn)
        == (owner.keyspace, owner.shard, owner.replica, first);
    Ok(Read::Chunk { range, good })
}

/// Returns true when another replica of the shard has an archive.
fn others_have_shipped(survey: &Survey, logs: &Logs, owner: &Owner) -> bool {
    let is_other = |other: &Owner| {
        (other.keyspace, other.shard) == (owner.keyspace, owner.shard) && other != owner
    };
    let manifests = survey.manifests.iter().filter(|(_, all)| !all.is_empty());
    let chunks = logs.iter().filter(|(_, all)| !all.is_empty());
    manifests.map(|(other, _)| other).chain(chunks.map(|(other, _)| other)).any(is_other)
}

/// Finds the missing checkpoints and chunks of each replica.
fn find_holes(survey: &Survey, logs: &Logs, known: &Known, found: &mut Fsck) {
    let is_kept = |owner: &Owner| {
        survey.catalogs.get(&owner.keyspace).is_some_and(|catalog| {
            catalog.is_placed(owner.replica) || catalog.is_retired(owner.replica)
        })
    };
    let reported = known.replicas.iter().map(|report| report.owner);
    for owner in logs.keys().copied().chain(reported).collect::<BTreeSet<Owner>>() {
        // Chunks that the newest checkpoint covers may be missing; without a checkpoint the log has
        // to begin at 1, unless its replica has left the shard and gc is removing its archive.
        let newest = survey.manifests.get(&owner).and_then(|all| all.keys().next_back().copied());
        let report = known.replicas.iter().find(|report| report.owner == owner);
        if let Some(report) =
            report.filter(|report| newest.unwrap_or_default() < report.manifest_lsn)
        {
            found.missing.push(owner.manifest(report.manifest_lsn));
        }
        let Some(start) = newest.or((is_kept(&owner) || report.is_some()).then_some(Lsn(0))) else {
            continue;
        };
        let mut at = start;
        for (first, range) in logs.get(&owner).into_iter().flatten() {
            if *first > at.next() && range.last > start && !range.behind_another {
                found.missing.push(owner.chunk(at.next()));
            }
            at = at.max(range.last);
        }
        let Some(report) = report else { continue };
        match report.behind {
            // What is before its own objects, and counts as shipped, is in the archives of others.
            Some(ShipsBehind::Others(continues)) => {
                if continues.lsn > start {
                    found
                        .missing
                        .extend(lost_predecessor(survey, logs, &owner, continues, is_kept));
                }
                at = at.max(continues.lsn);
            }
            Some(ShipsBehind::Nobody) => {}
            // Its node does not say whether it has an object of its own yet.
            None => {
                let begins = newest.is_none() && logs.get(&owner).is_none_or(BTreeMap::is_empty);
                if begins && others_have_shipped(survey, logs, &owner) {
                    continue;
                }
            }
        }
        if at < report.shipped_lsn {
            found.missing.push(owner.chunk(at.next()));
        }
    }
}

/// Returns the key of the object that a replica's archive continues, when it is lost: it is not
/// there, no later checkpoint of its replica stands for it, and that replica still counts.
fn lost_predecessor(
    survey: &Survey,
    logs: &Logs,
    owner: &Owner,
    continues: Continues,
    is_kept: impl Fn(&Owner) -> bool,
) -> Option<String> {
    let other = Owner { replica: continues.replica, ..*owner };
    let later = survey
        .manifests
        .get(&other)
        .is_some_and(|all| all.range(continues.object..).next().is_some());
    let is_read = logs.get(&other).is_some_and(|log| log.contains_key(&continues.object));
    if !is_kept(&other) || later || is_read {
        return None;
    }
    let (chunk, manifest) = (other.chunk(continues.object), other.manifest(continues.object));
    // One that cannot be read is listed all the same, and told as damaged.
    let is_there =
        survey.objects.iter().any(|object| object.key == chunk || object.key == manifest);
    (!is_there).then_some(chunk)
}
