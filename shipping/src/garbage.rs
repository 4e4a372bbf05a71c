//! Garbage collection: which objects of the bucket are needed, and which are deleted.
//!
//! **Invariants**
//! - An object is deleted only when no retained manifest, chunk, plan or keyspace needs it, when it is older
//!   than the minimum age, under a gc term that is still the last, and after the catalogs were read again. In
//!   doubt it stays. Catalog and name versions are never deleted.
//! - The archive of a replica that left its shard is deleted only when a checkpoint of the shard covers every
//!   record of it: another log may continue it.
//! - A manifest is deleted before the objects that it names, so that the remaining manifests stay readable.
//! - No object's time moves the age of another object. "Now" is the earlier of two times: the store time of an
//!   object of this very run, and the collector's own clock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn, Vector, covers, join};
use vasto_core::limits::{UNNAMED_AGE_MIN, UPLOAD_STALL_MAX};
use vasto_core::plan::PlanKind;

use crate::archive;
use crate::bucket::{Bucket, BucketError, Create, ObjectInfo};
use crate::catalog_store::{CatalogError, CatalogStore, now_us};
use crate::chunk::Chunk;
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;
use crate::survey::{Found, Survey, read, survey};

pub use crate::fsck::{Fsck, Known, KnownReplica, Orphan, check, fsck};

/// Objects in one deletion batch; before each batch the gc term and the keyspaces are checked.
const DELETED_AT_ONCE: usize = 100;
/// Difference between the store's clock and the collector's that raises a warning.
const CLOCKS_APART_MIN: Duration = Duration::from_secs(15 * 60);

/// Which objects stay although no replica serves from them any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Number of checkpoints of each replica that always stay.
    pub keep_checkpoints: usize,
    /// Period in which every point in time can be restored.
    pub keep_for: Duration,
    /// No younger object is deleted.
    pub min_age: Duration,
}

impl Retention {
    /// Returns the minimum age of an SST that no manifest names yet: the upload of its checkpoint may still
    /// run, which takes up to [`UPLOAD_STALL_MAX`]. A minimum age of zero protects nothing.
    fn unnamed_age(&self) -> Duration {
        const { assert!(UNNAMED_AGE_MIN.as_secs() > UPLOAD_STALL_MAX.as_secs()) };
        if self.min_age.is_zero() { Duration::ZERO } else { self.min_age.max(UNNAMED_AGE_MIN) }
    }
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

/// The result of a collection or a dry run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// True when nothing was deleted.
    pub dry_run: bool,
    /// Objects that were deleted, or would be.
    pub deleted: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that are not needed but too young.
    pub young: u64,
    /// Objects that stay.
    pub kept: u64,
    /// Bytes in the bucket at the end.
    pub stored_bytes: u64,
    /// Why the collection ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// The first of the deleted keys.
    pub keys: Vec<String>,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

/// Maximum number of keys in [`Collected`].
const KEYS_SHOWN: usize = 1_000;

/// Stops every running collection, at the latest after its next few deletions: for a caller that
/// is about to read what may be garbage.
///
/// # Errors
/// When the bucket does not answer.
pub async fn interrupt(bucket: &Bucket) -> Result<(), BucketError> {
    Term::take(bucket).await.map(drop)
}

/// The right to collect, until the next gc term is taken.
struct Term {
    bucket: Bucket,
    n: u64,
}

impl Term {
    async fn take(bucket: &Bucket) -> Result<Self, BucketError> {
        let taken = bucket.list("gc-term/").await?;
        let number = |key: &str| key.strip_prefix("gc-term/").and_then(|n| n.parse::<u64>().ok());
        // A foreign object beside the terms must not use up the numbers.
        let sane = |n: &u64| *n < u64::MAX / 2;
        let mut n = taken.iter().filter_map(|object| number(&object.key)).filter(sane).max().unwrap_or(0) + 1;
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

/// Returns the store's time: the modification time of an object that was just created.
async fn store_us(bucket: &Bucket, term: Option<&Term>) -> Result<u64, BucketError> {
    let probe = layout::probe(rand::random());
    let key = match term {
        Some(term) => layout::gc_term(term.n),
        None => {
            bucket.create(&probe, Bytes::from(format!("vasto looks at the time, {probe}"))).await?;
            probe.clone()
        }
    };
    let found = bucket.look_at(&key).await?;
    if term.is_none() {
        bucket.delete(&probe).await?;
    }
    // Another process deleted the object at once, whatever its age. Then no object counts as old.
    Ok(found.map_or(0, |found| found.modified_us))
}

/// Deletes objects that are not needed any more, by the machine's clock.
///
/// # Errors
/// See [`collect_at`].
pub async fn collect(bucket: &Bucket, retention: Retention, dry_run: bool) -> Result<Collected, CatalogError> {
    collect_at(bucket, retention, dry_run, now_us()).await
}

/// Deletes objects that are no longer needed. `clock_us` is the collector's clock, microseconds since 1970. A dry
/// run writes nothing but a probe, which it removes.
///
/// # Errors
/// When the bucket does not answer: the objects deleted until then were not needed.
pub async fn collect_at(
    bucket: &Bucket,
    retention: Retention,
    dry_run: bool,
    clock_us: u64,
) -> Result<Collected, CatalogError> {
    let term = if dry_run { None } else { Some(Term::take(bucket).await?) };
    let store_us = store_us(bucket, term.as_ref()).await?;
    let survey = survey(bucket, store_us.min(clock_us)).await?;
    let shipped = Shipments::of(&survey);
    let covered = covered_ones(bucket, &survey, &shipped, retention).await?;
    let garbage = judge(&survey, &shipped, &covered, retention);
    let mut out = Collected { dry_run, warnings: survey.warnings.clone(), ..Collected::default() };
    out.warnings.extend(clocks_apart(store_us, clock_us));
    out.warnings.extend(of_the_future(&survey.objects, store_us.max(clock_us)));
    if !survey.corrupt.is_empty() {
        let text = "it stays unknown what a manifest needs that cannot be read, so no SST is collected: ";
        out.warnings.push(format!("{text}{}", survey.corrupt.join(", ")));
    }
    let named: BTreeSet<&str> = survey.manifests.values().flat_map(BTreeMap::values).flat_map(Manifest::keys).collect();
    let before = |age: Duration| survey.now_us.saturating_sub(age.as_micros() as u64);
    let is_old = |object: &ObjectInfo| {
        let may_be_awaited = matches!(layout::parse_shipped(&object.key), Some((_, Shipped::Sst | Shipped::Database)))
            && !named.contains(object.key.as_str());
        object.modified_us <= before(if may_be_awaited { retention.unnamed_age() } else { retention.min_age })
    };
    let mut going: Vec<&ObjectInfo> = Vec::new();
    for object in &survey.objects {
        if !garbage.contains(object.key.as_str()) {
            out.kept += 1;
        } else if is_old(object) {
            going.push(object);
        } else {
            out.young += 1;
        }
    }
    let (staged, being_staged): (Vec<_>, Vec<_>) =
        survey.staged.iter().partition(|file| file.modified_us <= before(retention.unnamed_age()));
    out.young += being_staged.len() as u64;
    // Manifests first: no remaining manifest names a deleted object.
    going.sort_by_key(|object| !matches!(layout::parse_shipped(&object.key), Some((_, Shipped::Manifest(_)))));
    if let Some(term) = &term {
        let changed = changed_since(bucket, &survey).await?;
        going.retain(|object| match layout::parse_shipped(&object.key) {
            Some((owner, _)) => !changed.contains(&owner.keyspace),
            None => true,
        });
        let manifests = going.iter().take_while(|one| layout::parse_manifest_lsn(&one.key).is_some()).count();
        let (first, then) = going.split_at(manifests);
        for batch in first.chunks(DELETED_AT_ONCE).chain(then.chunks(DELETED_AT_ONCE)) {
            if !term.is_the_last().await? {
                out.stopped = Some("another collection, or a restore, has begun".into());
                break;
            }
            if let Some(why) = newcomer_may_read(bucket, &survey).await? {
                out.stopped = Some(why);
                break;
            }
            let keys: Vec<&str> = batch.iter().map(|object| object.key.as_str()).collect();
            bucket.delete_many(&keys).await?;
            batch.iter().for_each(|object| count(&mut out, object));
        }
        for file in staged {
            bucket.delete_staged(&file.key).await?;
            count(&mut out, file);
        }
    } else {
        going.into_iter().chain(staged).for_each(|object| count(&mut out, object));
    }
    let found: u64 = survey.objects.iter().chain(&survey.staged).map(|object| object.bytes).sum();
    out.stored_bytes = found - if dry_run { 0 } else { out.bytes };
    Ok(out)
}

/// Warns when two clocks are too far apart.
fn clocks_apart(store_us: u64, clock_us: u64) -> Option<String> {
    let apart = Duration::from_micros(store_us.abs_diff(clock_us));
    let (early, late) = if store_us < clock_us { ("bucket's", "master's") } else { ("master's", "bucket's") };
    (apart > CLOCKS_APART_MIN).then(|| {
        format!(
            "the {late} clock is {} s ahead of the {early}: set the one that is wrong; until then ages are counted by \
             the {early}",
            apart.as_secs()
        )
    })
}

/// Warns about objects whose time is in the future.
pub(crate) fn of_the_future(objects: &[ObjectInfo], now_us: u64) -> Option<String> {
    let from = now_us.saturating_add(CLOCKS_APART_MIN.as_micros() as u64);
    let future: Vec<&ObjectInfo> = objects.iter().filter(|object| object.modified_us > from).collect();
    let first = future.first()?;
    Some(format!(
        "{} objects are of a time in the future, {} by {} s: none of them is collected before it comes",
        future.len(),
        first.key,
        (first.modified_us - now_us) / 1_000_000
    ))
}

fn count(out: &mut Collected, object: &ObjectInfo) {
    out.deleted += 1;
    out.bytes += object.bytes;
    if out.keys.len() < KEYS_SHOWN {
        out.keys.push(object.key.clone());
    }
}

/// Returns the keyspaces that have changed since the survey: the next collection judges them.
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

/// Returns why a keyspace created since the survey may read objects that are to be deleted: it is restored from
/// another keyspace. `None` without such a keyspace.
async fn newcomer_may_read(bucket: &Bucket, survey: &Survey) -> Result<Option<String>, CatalogError> {
    let store = CatalogStore::new(bucket.clone());
    let first = survey.catalogs.keys().next_back().map_or(1, |last| last.0.saturating_add(1));
    for id in (first..u64::MAX).map(KeyspaceId) {
        if survey.seen.contains(&id) {
            continue; // in the survey, but unreadable
        }
        match store.tip(id, vasto_core::CatalogVersion(1)).await {
            Ok(None) => break,
            Ok(Some(new)) if new.plan.as_ref().is_some_and(|plan| matches!(plan.kind, PlanKind::Restore { .. })) => {
                return Ok(Some("a restore has begun".into()));
            }
            Ok(Some(_)) => {}
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(error) => return Ok(Some(format!("a keyspace was created that cannot be read: {error}"))),
        }
    }
    Ok(None)
}

/// Returns the begin of the retained archive, microseconds since 1970.
fn kept_from(survey: &Survey, retention: Retention) -> u64 {
    survey.now_us.saturating_sub(retention.keep_for.as_micros() as u64)
}

/// Indexes over the objects.
struct Shipments<'a> {
    /// Write time of each object, by the store's clock.
    written: HashMap<&'a str, u64>,
    /// Write time of each replica's last object.
    newest: BTreeMap<Owner, u64>,
    /// First LSNs of each replica's chunks, ascending; an entry for each replica that has shipped anything.
    chunks: BTreeMap<Owner, Vec<Lsn>>,
}

impl<'a> Shipments<'a> {
    fn of(survey: &'a Survey) -> Self {
        let mut of = Self { written: HashMap::new(), newest: BTreeMap::new(), chunks: BTreeMap::new() };
        for object in &survey.objects {
            of.written.insert(&object.key, object.modified_us);
            let Some((owner, shipped)) = layout::parse_shipped(&object.key) else { continue };
            let newest = of.newest.entry(owner).or_default();
            *newest = object.modified_us.max(*newest);
            let chunks = of.chunks.entry(owner).or_default();
            if let Shipped::Chunk(first) = shipped {
                chunks.push(first);
            }
        }
        of.chunks.values_mut().for_each(|firsts| firsts.sort_unstable());
        of
    }
}

/// Returns true when the replica is placed or draining.
fn is_member(catalog: &Catalog, owner: &Owner) -> bool {
    catalog.is_placed(owner.replica) || catalog.draining.iter().any(|one| one.replica == owner.replica)
}

/// Returns the checkpoints that restore what the shipper of a replica's shard held when the retained archive
/// began; `None` while the replica is a member of the shard.
fn succeeding<'a>(
    survey: &'a Survey,
    written: &HashMap<&str, u64>,
    keep_from: u64,
    owner: &Owner,
) -> Option<Vec<&'a Manifest>> {
    let catalog = survey.catalogs.get(&owner.keyspace).filter(|catalog| !is_member(catalog, owner))?;
    let shipper = catalog.shard(owner.shard).and_then(|shard| shard.shipper());
    let manifests = shipper.and_then(|one| survey.manifests.get(&Owner { replica: one.replica, ..*owner }));
    let is_from_before = |manifest: &&Manifest| {
        let key = layout::manifest(manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn);
        written.get(key.as_str()).is_some_and(|made| *made <= keep_from)
    };
    Some(manifests.into_iter().flat_map(BTreeMap::values).filter(is_from_before).collect())
}

/// Returns the replicas that left a shard and are covered: a checkpoint of the shipper holds every record that
/// they have shipped, so that no reader needs an archive that another log continues. For a replica whose loss
/// was accepted, its own last records need not be covered, unless another log continues its archive.
async fn covered_ones(
    bucket: &Bucket,
    survey: &Survey,
    Shipments { written, chunks, .. }: &Shipments<'_>,
    retention: Retention,
) -> Result<BTreeSet<Owner>, BucketError> {
    let keep_from = kept_from(survey, retention);
    let mut covered = BTreeSet::new();
    for (owner, firsts) in chunks {
        let successors = succeeding(survey, written, keep_from, owner).unwrap_or_default();
        if successors.is_empty() {
            continue;
        }
        let Some(reach) = reach(bucket, survey, *owner, firsts).await? else { continue };
        if successors.iter().any(|manifest| covers(&manifest.vector, &reach)) {
            covered.insert(*owner);
            continue;
        }
        let given_up = survey.catalogs.get(&owner.keyspace).and_then(|catalog| {
            catalog.given_up.iter().find(|lost| lost.replica == owner.replica).map(|lost| lost.version)
        });
        let Some(given_up) = given_up else { continue };
        let of_others: Vector = reach.into_iter().filter(|(origin, _)| origin.replica != owner.replica).collect();
        if !successors.iter().any(|one| one.version >= given_up && covers(&one.vector, &of_others)) {
            continue;
        }
        let mut is_leant_on = false;
        for (other, firsts) in chunks {
            if (other.keyspace, other.shard) == (owner.keyspace, owner.shard) && other != owner && !is_leant_on {
                is_leant_on = archive::goes_on_behind(bucket, *other, firsts).await?.contains(&owner.replica);
            }
        }
        if !is_leant_on {
            covered.insert(*owner);
        }
    }
    Ok(covered)
}

/// Returns, per origin, the last record that a replica has shipped; `None` when an object is unreadable.
async fn reach(bucket: &Bucket, survey: &Survey, owner: Owner, chunks: &[Lsn]) -> Result<Option<Vector>, BucketError> {
    let newest = survey.manifests.get(&owner).and_then(|all| all.values().next_back());
    let mut vector = newest.map(|manifest| manifest.vector.clone()).unwrap_or_default();
    let behind = |first: &&Lsn| newest.is_none_or(|newest| **first > newest.lsn);
    for first in chunks.iter().filter(behind) {
        let key = layout::chunk(owner.keyspace, owner.shard, owner.replica, *first);
        let Found::Bytes(bytes) = read(bucket, &key).await? else { return Ok(None) };
        let Ok(chunk) = Chunk::decode(&bytes) else { return Ok(None) };
        vector = join(&vector, &chunk.vector());
    }
    Ok(Some(vector))
}

/// Returns the keys that are not needed, whatever their age. `covered`: see [`covered_ones`].
fn judge<'a>(
    survey: &'a Survey,
    Shipments { written, newest, chunks }: &Shipments<'_>,
    covered: &BTreeSet<Owner>,
    retention: Retention,
) -> BTreeSet<&'a str> {
    let keep_from = kept_from(survey, retention);
    let written_us = |key: &str| written.get(key).copied();
    // No master continues a creation that was cut off: its plan, a restore, would keep the objects of its source
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
    let made_us = |owner: &Owner, lsn: Lsn| {
        written_us(&layout::manifest(owner.keyspace, owner.shard, owner.replica, lsn)).unwrap_or(survey.now_us)
    };
    let none = BTreeMap::new();
    let manifests_of = |owner: &Owner| survey.manifests.get(owner).unwrap_or(&none);
    // A replica that ships no more is needed until its successor can restore the whole retained archive, and all
    // that the replica has shipped.
    let is_over = |catalog: &Catalog, owner: &Owner| {
        let discarded = catalog.discarded.contains(&owner.replica);
        !is_member(catalog, owner)
            && (covered.contains(owner) || discarded)
            && newest.get(owner).is_none_or(|newest| *newest <= keep_from)
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
        // The checkpoint from which the oldest point in time is restored.
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
        // Objects of an unknown keyspace may belong to one that is being created.
        Some((owner, _)) if !survey.catalogs.contains_key(&owner.keyspace) || busy.contains(&owner.keyspace) => false,
        // A manifest of this shard is unreadable: the objects that it names are unknown.
        Some((owner, _))
            if survey.corrupt.iter().any(|key| key.starts_with(&layout::shard_prefix(owner.keyspace, owner.shard))) =>
        {
            false
        }
        // Named also by manifests of other keyspaces, which were restored from this one.
        Some((_, Shipped::Sst | Shipped::Database)) if named.contains(object.key.as_str()) => false,
        Some((_, Shipped::Sst | Shipped::Database)) if !survey.corrupt.is_empty() => false,
        Some((owner, _)) if over.contains(&owner) => true,
        Some((owner, Shipped::Manifest(lsn))) => !retained.get(&owner).is_some_and(|lsns| lsns.contains(&lsn)),
        Some((_, Shipped::Sst | Shipped::Database)) => true,
        Some((owner, Shipped::Chunk(first))) => {
            // Without a checkpoint older than the retained archive, that archive begins with the log.
            let reaches_back = |lsns: &&BTreeSet<Lsn>| lsns.iter().any(|lsn| made_us(&owner, *lsn) <= keep_from);
            let oldest = retained.get(&owner).filter(reaches_back).and_then(|lsns| lsns.first().copied());
            let next = chunks.get(&owner).and_then(|firsts| firsts.iter().find(|next| **next > first));
            // The whole chunk lies before the oldest retained checkpoint.
            oldest.zip(next).is_some_and(|(oldest, next)| next.0 <= oldest.0 + 1)
        }
        None => object.key.starts_with("probe/"),
    };
    survey.objects.iter().filter(is_garbage).map(|object| object.key.as_str()).collect()
}
