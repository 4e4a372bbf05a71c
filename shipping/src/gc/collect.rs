//! The collection: deletes the objects that are not needed.
//!
//! **Invariants**
//! - An object is deleted only when no retained manifest, chunk, plan or keyspace needs it, when it
//!   is older than the minimum age, under a gc term that is still the last, and after the catalogs
//!   were read again. In doubt it stays. Catalog and name versions are never deleted.
//! - A manifest is deleted before the objects that it names, so that the remaining manifests stay
//!   readable.
//! - No object's time moves the age of another object. "Now" is the earlier of two times: the store
//!   time of an object of this very run, and the collector's own clock.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use vasto_core::ids::KeyspaceId;
use vasto_core::plan::PlanKind;

use super::clocks;
use super::coverage::covered;
use super::retention::{Retention, garbage};
use super::survey::{Shipments, Survey, survey};
use super::term::Term;
use crate::bucket::{Bucket, BucketError, ObjectInfo};
use crate::catalog::{CatalogError, CatalogStore};
use crate::clock::now_us;
use crate::layout::{self, Exported, Shipped};
use crate::manifest::Manifest;

/// Objects in one deletion batch; before each batch the gc term and the keyspaces are checked.
const DELETED_AT_ONCE: usize = 100;
/// Maximum number of keys in [`Collected`].
const KEYS_SHOWN: usize = 1_000;

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

impl Collected {
    fn count(&mut self, object: &ObjectInfo) {
        self.deleted += 1;
        self.bytes += object.bytes;
        if self.keys.len() < KEYS_SHOWN {
            self.keys.push(object.key.clone());
        }
    }
}

/// Deletes objects that are not needed any more, by the machine's clock.
///
/// # Errors
/// See [`collect_at`].
pub async fn collect(
    bucket: &Bucket,
    retention: Retention,
    dry_run: bool,
) -> Result<Collected, CatalogError> {
    collect_at(bucket, retention, dry_run, now_us()).await
}

/// Deletes objects that are no longer needed. `clock_us` is the collector's clock, microseconds
/// since 1970. A dry run writes nothing but a probe, which it removes.
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
    let covered = covered(bucket, &survey, &shipped, retention).await?;
    let garbage = garbage(&survey, &shipped, &covered, retention);
    let deletable = Deletable::of(&survey, &garbage, retention);
    let mut out = Collected {
        dry_run,
        young: deletable.young,
        kept: deletable.kept,
        warnings: warnings(&survey, store_us, clock_us),
        ..Collected::default()
    };
    match &term {
        Some(term) => delete(bucket, &survey, term, deletable, &mut out).await?,
        None => deletable
            .objects
            .into_iter()
            .chain(deletable.staged)
            .for_each(|object| out.count(object)),
    }
    let surveyed: u64 =
        survey.objects.iter().chain(&survey.staged).map(|object| object.bytes).sum();
    out.stored_bytes = surveyed - if dry_run { 0 } else { out.bytes };
    Ok(out)
}

/// Returns the store's time: the modification time of an object that was just created.
async fn store_us(bucket: &Bucket, term: Option<&Term>) -> Result<u64, BucketError> {
    let probe = layout::probe(rand::random());
    let key = match term {
        Some(term) => term.key(),
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

fn warnings(survey: &Survey, store_us: u64, clock_us: u64) -> Vec<String> {
    let mut out = survey.warnings.clone();
    out.extend(clocks::apart(store_us, clock_us));
    out.extend(clocks::of_the_future(&survey.objects, store_us.max(clock_us)));
    if !survey.corrupt.is_empty() {
        let text =
            "it stays unknown what a manifest needs that cannot be read, so no SST is collected: ";
        out.push(format!("{text}{}", survey.corrupt.join(", ")));
    }
    out
}

/// Objects that a collection deletes, and counts of the others.
struct Deletable<'a> {
    /// Manifests first: no remaining manifest names a deleted object.
    objects: Vec<&'a ObjectInfo>,
    /// Files of interrupted writes.
    staged: Vec<&'a ObjectInfo>,
    /// Objects that are not needed but too young.
    young: u64,
    /// Objects that stay.
    kept: u64,
}

impl<'a> Deletable<'a> {
    fn of(survey: &'a Survey, garbage: &BTreeSet<&str>, retention: Retention) -> Self {
        let named: BTreeSet<&str> = survey.all_manifests().flat_map(Manifest::keys).collect();
        let before = |age: Duration| survey.now_us.saturating_sub(age.as_micros() as u64);
        let is_old = |object: &ObjectInfo| {
            let may_be_awaited = layout::parse_export(&object.key).is_some()
                || (matches!(
                    layout::parse_shipped(&object.key),
                    Some((_, Shipped::Sst | Shipped::Database))
                ) && !named.contains(object.key.as_str()));
            object.modified_us
                <= before(if may_be_awaited { retention.unnamed_age() } else { retention.min_age })
        };
        let mut deletable = Self { objects: Vec::new(), staged: Vec::new(), young: 0, kept: 0 };
        for object in &survey.objects {
            if !garbage.contains(object.key.as_str()) {
                deletable.kept += 1;
            } else if is_old(object) {
                deletable.objects.push(object);
            } else {
                deletable.young += 1;
            }
        }
        for file in &survey.staged {
            if file.modified_us <= before(retention.unnamed_age()) {
                deletable.staged.push(file);
            } else {
                deletable.young += 1;
            }
        }
        deletable.objects.sort_by_key(|object| !is_manifest(object));
        deletable
    }
}

fn is_manifest(object: &ObjectInfo) -> bool {
    matches!(layout::parse_shipped(&object.key), Some((_, Shipped::Manifest(_))))
        || matches!(layout::parse_exported(&object.key), Some((.., Exported::Manifest { .. })))
}

/// Deletes in batches, until the term is not the last any more or another keyspace may need the
/// objects.
async fn delete(
    bucket: &Bucket,
    survey: &Survey,
    term: &Term,
    mut deletable: Deletable<'_>,
    out: &mut Collected,
) -> Result<(), CatalogError> {
    let changed = changed_since(bucket, survey).await?;
    deletable.objects.retain(|object| {
        layout::keyspace_of(&object.key).is_none_or(|keyspace| !changed.contains(&keyspace))
    });
    let manifests = deletable.objects.iter().take_while(|object| is_manifest(object)).count();
    let (first, then) = deletable.objects.split_at(manifests);
    for batch in first.chunks(DELETED_AT_ONCE).chain(then.chunks(DELETED_AT_ONCE)) {
        if !term.is_the_last().await? {
            out.stopped = Some("another collection, or a restore, has begun".into());
            break;
        }
        if let Some(why) = newcomer_may_read(bucket, survey).await? {
            out.stopped = Some(why);
            break;
        }
        let keys: Vec<&str> = batch.iter().map(|object| object.key.as_str()).collect();
        bucket.delete_many(&keys).await?;
        batch.iter().for_each(|object| out.count(object));
    }
    for file in deletable.staged {
        bucket.delete_staged(&file.key).await?;
        out.count(file);
    }
    Ok(())
}

/// Returns the keyspaces that have changed since the survey: the next collection judges them.
async fn changed_since(
    bucket: &Bucket,
    survey: &Survey,
) -> Result<BTreeSet<KeyspaceId>, CatalogError> {
    let store = CatalogStore::new(bucket.clone());
    let mut changed = BTreeSet::new();
    for (keyspace, surveyed) in &survey.catalogs {
        let tip = store.tip(*keyspace, surveyed.version).await?;
        if tip.is_none_or(|tip| tip.version != surveyed.version) {
            changed.insert(*keyspace);
        }
    }
    Ok(changed)
}

/// Returns why a keyspace created since the survey may read objects that are to be deleted: it is
/// restored from another keyspace. `None` without such a keyspace.
async fn newcomer_may_read(
    bucket: &Bucket,
    survey: &Survey,
) -> Result<Option<String>, CatalogError> {
    let store = CatalogStore::new(bucket.clone());
    let first = survey.catalogs.keys().next_back().map_or(1, |last| last.0.saturating_add(1));
    for id in (first..u64::MAX).map(KeyspaceId) {
        if survey.seen.contains(&id) {
            continue; // in the survey, but unreadable
        }
        match store.tip(id, vasto_core::CatalogVersion(1)).await {
            Ok(None) => break,
            Ok(Some(new))
                if new
                    .plan
                    .as_ref()
                    .is_some_and(|plan| matches!(plan.kind, PlanKind::Restore { .. })) =>
            {
                return Ok(Some("a restore has begun".into()));
            }
            Ok(Some(_)) => {}
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(error) => {
                return Ok(Some(format!("a keyspace was created that cannot be read: {error}")));
            }
        }
    }
    Ok(None)
}
