//! What of the bucket is needed, what is not, and what is missing or damaged.
//!
//! **Invariants**
//! - Deleted is only what no retained manifest, chunk, plan or keyspace needs, that is older than the
//!   minimum age, under a term that is still the last one, and after the catalogs were read again. In
//!   doubt it stays. Catalog and name versions are never deleted.
//! - A manifest goes before what it names, so that what is left can always be read.
//! - Times are compared within the store's own clock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn};
use vasto_core::plan::PlanKind;

use crate::bucket::{Bucket, BucketError, Create, ObjectInfo};
use crate::catalog_store::{CatalogError, CatalogStore};
use crate::chunk::Chunk;
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;

/// Reads at a time.
const READS: usize = 8;
/// The term and the keyspaces are looked at again after so many deletions.
const TERM_CHECK: usize = 20;

/// What stays although nothing serves from it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Checkpoints of each replica that always stay.
    pub keep_checkpoints: usize,
    /// Every moment of this long a past can be restored.
    pub keep_for: Duration,
    /// Nothing younger is deleted.
    pub min_age: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep_checkpoints: 2,
            keep_for: Duration::from_secs(7 * 24 * 3600),
            min_age: Duration::from_secs(24 * 3600),
        }
    }
}

/// An object that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Orphan {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// Seconds since it was written.
    pub age_s: u64,
}

/// The state of a bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fsck {
    /// Objects.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that something needs.
    pub referenced: u64,
    /// The others.
    pub orphans: Vec<Orphan>,
    /// Keys that a manifest names, or that the log behind it needs, and that are not there.
    pub missing: Vec<String>,
    /// Keys of objects that are not what was written.
    pub corrupt: Vec<String>,
}

impl Fsck {
    /// True when nothing is missing and nothing is damaged.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.corrupt.is_empty()
    }
}

/// What a collection did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// True when nothing was deleted.
    pub dry_run: bool,
    /// Objects that were deleted, or would be.
    pub deleted: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that nothing needs but that are too young.
    pub young: u64,
    /// Objects that stay.
    pub kept: u64,
    /// Bytes in the bucket when it was done.
    pub stored_bytes: u64,
    /// Why it ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The first of the keys.
    pub keys: Vec<String>,
}

/// Keys that [`Collected`] shows.
const KEYS_SHOWN: usize = 1_000;

/// Everything that is in the bucket, with the manifests read.
struct Survey {
    objects: Vec<ObjectInfo>,
    catalogs: BTreeMap<KeyspaceId, Catalog>,
    /// Active ones whose name does not lead to them: their creation is under way, or was cut off.
    unbound: BTreeSet<KeyspaceId>,
    manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>>,
    corrupt: Vec<String>,
    /// The store's time, microseconds since 1970: not before its newest object.
    now_us: u64,
}

async fn survey(bucket: &Bucket) -> Result<Survey, CatalogError> {
    let mut corrupt = Vec::new();
    let mut catalogs = BTreeMap::new();
    let mut unbound = BTreeSet::new();
    let store = CatalogStore::new(bucket.clone());
    // Catalogs before objects: what a plan that is over by then has written is in the list. Objects of a
    // keyspace that is younger are not judged.
    let mut last: BTreeMap<KeyspaceId, vasto_core::CatalogVersion> = BTreeMap::new();
    for object in bucket.list(&layout::catalog_prefix()).await? {
        if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
            let known = last.entry(keyspace).or_insert(version);
            *known = version.max(*known);
        }
    }
    for (keyspace, version) in last {
        match store.tip(keyspace, version).await {
            Ok(Some(catalog)) => {
                if catalog.state == KeyspaceState::Active {
                    match store.is_bound(&catalog).await {
                        Ok(false) => {
                            unbound.insert(keyspace);
                        }
                        Err(CatalogError::Bucket(error)) => return Err(error.into()),
                        Ok(true) | Err(_) => {}
                    }
                }
                catalogs.insert(keyspace, catalog);
            }
            Ok(None) => {}
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(_) => {} // told by `fsck`, which reads every version
        }
    }
    let objects = bucket.list("").await?;
    let wanted: Vec<(Owner, Lsn, String)> = objects
        .iter()
        .filter_map(|object| match layout::parse_shipped(&object.key)? {
            (owner, Shipped::Manifest(lsn)) => Some((owner, lsn, object.key.clone())),
            _ => None,
        })
        .collect();
    let read = futures::stream::iter(wanted).map(|(owner, lsn, key)| async move {
        let bytes = bucket.get(&key).await?;
        let manifest = bytes.map(|bytes| Manifest::decode(&bytes));
        Ok::<_, BucketError>((owner, lsn, key, manifest))
    });
    let read: Vec<_> = read.buffer_unordered(READS).try_collect().await?;
    let mut manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>> = BTreeMap::new();
    for (owner, lsn, key, manifest) in read {
        match manifest {
            Some(Ok(manifest))
                if (manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn)
                    == (owner.keyspace, owner.shard, owner.replica, lsn) =>
            {
                manifests.entry(owner).or_default().insert(lsn, manifest);
            }
            Some(_) => corrupt.push(key),
            None => {} // collected meanwhile
        }
    }
    let newest = objects.iter().map(|object| object.modified_us).max().unwrap_or_default();
    Ok(Survey { objects, catalogs, unbound, manifests, corrupt, now_us: newest })
}

/// An object, whether it is what was written, and whose log it holds from where to where.
type Judged = (String, bool, Option<(Owner, Lsn, Lsn)>);

/// Checks that everything is there that is named, with the size and checksum it should have. With
/// `deep` every byte of every object is read; else SSTs are judged by their size.
///
/// # Errors
/// When the bucket does not answer.
pub async fn fsck(bucket: &Bucket, deep: bool) -> Result<Fsck, CatalogError> {
    let survey = survey(bucket).await?;
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
    let mut found = Fsck { corrupt: survey.corrupt.clone(), ..Fsck::default() };
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
            None => is_of_the_cluster(&object.key),
        };
        if needed {
            found.referenced += 1;
            to_read.push((object.clone(), named.get(object.key.as_str()).copied()));
        } else {
            found.orphans.push(orphan(object, survey.now_us));
        }
    }
    let judged = futures::stream::iter(to_read).map(|(object, named)| async move {
        let mut range = None;
        let good = match (layout::parse_shipped(&object.key), named) {
            (Some((owner, Shipped::Chunk(first))), _) => {
                let Some(bytes) = bucket.get(&object.key).await? else { return Ok(None) };
                Chunk::decode(&bytes).is_ok_and(|chunk| {
                    range = Some((owner, first, chunk.last_lsn));
                    (chunk.keyspace, chunk.shard, chunk.replica, chunk.first_lsn)
                        == (owner.keyspace, owner.shard, owner.replica, first)
                })
            }
            (Some((_, Shipped::Sst | Shipped::Database)), Some((size, crc))) if deep && size == object.bytes => {
                let Some(bytes) = bucket.get(&object.key).await? else { return Ok(None) };
                crc32c::crc32c(&bytes) == crc
            }
            (None, _) if object.key.starts_with("catalog/") => {
                let Some(bytes) = bucket.get(&object.key).await? else { return Ok(None) };
                CatalogStore::decode_version(&object.key, &bytes).is_ok()
            }
            _ => true,
        };
        Ok::<_, BucketError>(Some((object.key.clone(), good, range)))
    });
    let judged: Vec<Option<Judged>> = judged.buffer_unordered(READS).try_collect().await?;
    let mut logs: BTreeMap<Owner, BTreeMap<Lsn, Lsn>> = BTreeMap::new();
    for (key, good, range) in judged.into_iter().flatten() {
        if !good {
            found.corrupt.push(key);
        }
        if let Some((owner, first, last)) = range {
            logs.entry(owner).or_default().insert(first, last);
        }
    }
    for (owner, log) in logs {
        // What the newest checkpoint holds is not missed; without one the log has to begin at 1, unless
        // it belongs to somebody who is gone, and is on its way out.
        let newest = survey.manifests.get(&owner).and_then(|all| all.keys().next_back().copied());
        let Some(start) = newest.or(is_member(&owner).then_some(Lsn(0))) else { continue };
        let mut at = start;
        for (first, last) in log {
            if first > at.next() && last > start {
                found.missing.push(layout::chunk(owner.keyspace, owner.shard, owner.replica, at.next()));
            }
            at = at.max(last);
        }
    }
    found.corrupt.sort_unstable();
    found.corrupt.dedup();
    Ok(found)
}

fn is_of_the_cluster(key: &str) -> bool {
    key == layout::cluster()
        || ["catalog/", "cluster/", "names/", "gc-term/"].iter().any(|folder| key.starts_with(folder))
}

fn orphan(object: &ObjectInfo, now_us: u64) -> Orphan {
    let age_s = now_us.saturating_sub(object.modified_us) / 1_000_000;
    Orphan { key: object.key.clone(), bytes: object.bytes, age_s }
}

/// Ends every collection that is under way, at the latest after its next few deletions: for somebody who
/// is about to read what may be garbage.
///
/// # Errors
/// When the bucket does not answer.
pub async fn interrupt(bucket: &Bucket) -> Result<(), BucketError> {
    Term::take(bucket).await.map(drop)
}

/// The right to collect, until somebody takes the next term.
struct Term {
    bucket: Bucket,
    n: u64,
}

impl Term {
    async fn take(bucket: &Bucket) -> Result<Self, BucketError> {
        let taken = bucket.list("gc-term/").await?;
        let number = |key: &str| key.strip_prefix("gc-term/").and_then(|n| n.parse::<u64>().ok());
        let mut n = taken.iter().filter_map(|object| number(&object.key)).max().unwrap_or(0) + 1;
        loop {
            let body = Bytes::from(format!("vasto garbage collection, nonce {:032x}", rand::random::<u128>()));
            match bucket.create(&layout::gc_term(n), body).await? {
                Create::Created => return Ok(Self { bucket: bucket.clone(), n }),
                Create::Exists(_) => n += 1,
            }
        }
    }

    async fn is_the_last(&self) -> Result<bool, BucketError> {
        Ok(self.bucket.head(&layout::gc_term(self.n + 1)).await?.is_none())
    }
}

/// Deletes what is not needed any more.
///
/// # Errors
/// When the bucket does not answer: what was deleted until then was not needed.
pub async fn collect(bucket: &Bucket, retention: Retention, dry_run: bool) -> Result<Collected, CatalogError> {
    let term = if dry_run { None } else { Some(Term::take(bucket).await?) };
    let survey = survey(bucket).await?;
    let garbage = judge(&survey, retention);
    let mut out = Collected { dry_run, ..Collected::default() };
    let old_enough = survey.now_us.saturating_sub(retention.min_age.as_micros() as u64);
    let mut going: Vec<&ObjectInfo> = Vec::new();
    for object in &survey.objects {
        if !garbage.contains(object.key.as_str()) {
            out.kept += 1;
        } else if object.modified_us > old_enough {
            out.young += 1;
        } else {
            going.push(object);
        }
    }
    // First the manifests: nothing is left that names what is gone.
    going.sort_by_key(|object| !matches!(layout::parse_shipped(&object.key), Some((_, Shipped::Manifest(_)))));
    if let Some(term) = &term {
        let changed = changed_since(bucket, &survey).await?;
        going.retain(|object| match layout::parse_shipped(&object.key) {
            Some((owner, _)) => !changed.contains(&owner.keyspace),
            None => true,
        });
        for (index, object) in going.iter().enumerate() {
            if index % TERM_CHECK == 0 {
                if !term.is_the_last().await? {
                    out.stopped = Some("another collection, or a restore, has begun".into());
                    break;
                }
                if has_grown(bucket, &survey).await? {
                    out.stopped = Some("a keyspace was created meanwhile".into());
                    break;
                }
            }
            bucket.delete(&object.key).await?;
            count(&mut out, object);
        }
    } else {
        for object in going {
            count(&mut out, object);
        }
    }
    let found: u64 = survey.objects.iter().map(|object| object.bytes).sum();
    out.stored_bytes = found - if dry_run { 0 } else { out.bytes };
    Ok(out)
}

fn count(out: &mut Collected, object: &ObjectInfo) {
    out.deleted += 1;
    out.bytes += object.bytes;
    if out.keys.len() < KEYS_SHOWN {
        out.keys.push(object.key.clone());
    }
}

/// Keyspaces that have changed since the survey, or that appeared: their turn is the next time.
async fn changed_since(bucket: &Bucket, survey: &Survey) -> Result<BTreeSet<KeyspaceId>, CatalogError> {
    let store = CatalogStore::new(bucket.clone());
    let mut changed = BTreeSet::new();
    for (keyspace, known) in &survey.catalogs {
        let tip = store.tip(*keyspace, known.version).await?;
        if tip.is_none_or(|tip| tip.version != known.version) {
            changed.insert(*keyspace);
        }
    }
    Ok(changed)
}

/// A keyspace was created since the survey: it may be a restore, which reads what another one has shipped.
async fn has_grown(bucket: &Bucket, survey: &Survey) -> Result<bool, CatalogError> {
    let next = survey.catalogs.keys().next_back().map_or(1, |last| last.0 + 1);
    let first = layout::catalog_version(KeyspaceId(next), vasto_core::CatalogVersion(1));
    Ok(bucket.head(&first).await?.is_some())
}

/// Keys that nothing needs, whatever their age.
fn judge(survey: &Survey, retention: Retention) -> BTreeSet<&str> {
    let keep_from = survey.now_us.saturating_sub(retention.keep_for.as_micros() as u64);
    // When an object was written, by the store's clock.
    let written: HashMap<&str, u64> =
        survey.objects.iter().map(|object| (object.key.as_str(), object.modified_us)).collect();
    let written_us = |key: &str| written.get(key).copied();
    // No master goes on with a creation that was cut off: its plan, a restore, would keep what it was to read
    // for ever.
    let old = survey.now_us.saturating_sub(retention.min_age.as_micros() as u64);
    let is_cut_off = |catalog: &Catalog| {
        let tip = layout::catalog_version(catalog.keyspace, catalog.version);
        survey.unbound.contains(&catalog.keyspace) && written_us(&tip).is_some_and(|written| written <= old)
    };
    let busy: BTreeSet<KeyspaceId> = survey
        .catalogs
        .values()
        .filter(|catalog| catalog.state == KeyspaceState::Active && !is_cut_off(catalog))
        .filter_map(|catalog| Some((catalog.keyspace, catalog.plan.as_ref()?.kind)))
        .flat_map(|(keyspace, kind)| match kind {
            PlanKind::Restore { keyspace: source, .. } => vec![keyspace, source],
            _ => vec![keyspace],
        })
        .collect();
    let mut newest: BTreeMap<Owner, u64> = BTreeMap::new();
    let mut chunks: BTreeMap<Owner, Vec<Lsn>> = BTreeMap::new();
    for object in &survey.objects {
        if let Some((owner, shipped)) = layout::parse_shipped(&object.key) {
            let known = newest.entry(owner).or_default();
            *known = object.modified_us.max(*known);
            if let Shipped::Chunk(first) = shipped {
                chunks.entry(owner).or_default().push(first);
            }
        }
    }
    for firsts in chunks.values_mut() {
        firsts.sort_unstable();
    }
    let made_us = |owner: &Owner, lsn: Lsn| {
        written_us(&layout::manifest(owner.keyspace, owner.shard, owner.replica, lsn)).unwrap_or(survey.now_us)
    };
    let none = BTreeMap::new();
    let manifests_of = |owner: &Owner| survey.manifests.get(owner).unwrap_or(&none);
    // A replica that ships no more is needed as long as its successor cannot bring back the whole past.
    let is_over = |catalog: &Catalog, owner: &Owner| {
        let member =
            catalog.is_placed(owner.replica) || catalog.unsealed.iter().any(|one| one.replica == owner.replica);
        let successor = catalog.shard(owner.shard).and_then(|shard| shard.shipper());
        let covered = successor.is_some_and(|one| {
            let successor = Owner { replica: one.replica, ..*owner };
            manifests_of(&successor).keys().any(|lsn| made_us(&successor, *lsn) <= keep_from)
        });
        let discarded = catalog.discarded.contains(&owner.replica);
        !member && (covered || discarded) && newest.get(owner).is_none_or(|newest| *newest <= keep_from)
    };
    let mut retained: BTreeMap<Owner, BTreeSet<Lsn>> = BTreeMap::new();
    let mut over: BTreeSet<Owner> = BTreeSet::new();
    for owner in newest.keys() {
        let Some(catalog) = survey.catalogs.get(&owner.keyspace) else { continue };
        let tip = layout::catalog_version(catalog.keyspace, catalog.version);
        let deleted_long_ago =
            catalog.state == KeyspaceState::Deleted && written_us(&tip).is_some_and(|written| written <= keep_from);
        if deleted_long_ago || is_over(catalog, owner) {
            over.insert(*owner);
            continue;
        }
        let all = manifests_of(owner);
        let last = all.keys().rev().take(retention.keep_checkpoints.max(1)).copied();
        let recent = all.keys().filter(|lsn| made_us(owner, **lsn) > keep_from).copied();
        // The one from which the oldest moment is reached.
        let first = all.keys().rev().find(|lsn| made_us(owner, **lsn) <= keep_from).copied();
        let pinned = all.keys().copied().filter(|lsn| {
            let key = layout::manifest(owner.keyspace, owner.shard, owner.replica, *lsn);
            catalog.pins.contains(&key)
        });
        retained.insert(*owner, last.chain(recent).chain(first).chain(pinned).collect());
    }
    let mut named: BTreeSet<&str> = BTreeSet::new();
    for (owner, lsns) in &retained {
        for manifest in manifests_of(owner).iter().filter(|(lsn, _)| lsns.contains(lsn)).map(|(_, one)| one) {
            named.extend(manifest.files.iter().map(|file| file.key.as_str()));
            named.extend(manifest.database.iter().map(|database| database.key.as_str()));
        }
    }
    let is_garbage = |object: &&ObjectInfo| match layout::parse_shipped(&object.key) {
        // Names of a keyspace that is not known could be of one that is being created.
        Some((owner, _)) if !survey.catalogs.contains_key(&owner.keyspace) || busy.contains(&owner.keyspace) => false,
        // A manifest of this shard cannot be read: what it needs is not known.
        Some((owner, _))
            if survey.corrupt.iter().any(|key| key.starts_with(&layout::shard_prefix(owner.keyspace, owner.shard))) =>
        {
            false
        }
        // Also by manifests of other keyspaces, which were restored from this one.
        Some((_, Shipped::Sst | Shipped::Database)) if named.contains(object.key.as_str()) => false,
        Some((_, Shipped::Sst | Shipped::Database)) if !survey.corrupt.is_empty() => false,
        Some((owner, _)) if over.contains(&owner) => true,
        Some((owner, Shipped::Manifest(lsn))) => !retained.get(&owner).is_some_and(|lsns| lsns.contains(&lsn)),
        Some((_, Shipped::Sst | Shipped::Database)) => true,
        Some((owner, Shipped::Chunk(first))) => {
            // Without a checkpoint from before the past that is kept, that past begins with the log.
            let reaches_back = |lsns: &&BTreeSet<Lsn>| lsns.iter().any(|lsn| made_us(&owner, *lsn) <= keep_from);
            let oldest = retained.get(&owner).filter(reaches_back).and_then(|lsns| lsns.first().copied());
            let next = chunks.get(&owner).and_then(|firsts| firsts.iter().find(|next| **next > first));
            // All of it lies before the oldest checkpoint that stays.
            oldest.zip(next).is_some_and(|(oldest, next)| next.0 <= oldest.0 + 1)
        }
        None => object.key.starts_with("probe/"),
    };
    survey.objects.iter().filter(is_garbage).map(|object| object.key.as_str()).collect()
}
