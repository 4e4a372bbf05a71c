//! A survey of the whole bucket: its objects, the last catalogs, and every manifest.
//!
//! **Invariant:** an unreadable or foreign object is reported and skipped.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use vasto_core::CatalogVersion;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn};

use crate::bucket::{Bucket, BucketError, ObjectInfo};
use crate::catalog_store::{CatalogError, CatalogStore};
use crate::layout::{self, Owner, Shipped};
use crate::listing;
use crate::manifest::Manifest;

/// Reads in flight.
pub(crate) const READS: usize = 8;

/// The content of the bucket, with the manifests decoded.
pub(crate) struct Survey {
    pub(crate) objects: Vec<ObjectInfo>,
    /// Files that interrupted writes have left beside objects of Vasto.
    pub(crate) staged: Vec<ObjectInfo>,
    pub(crate) catalogs: BTreeMap<KeyspaceId, Catalog>,
    /// Every keyspace that has a version, also an unreadable one.
    pub(crate) seen: BTreeSet<KeyspaceId>,
    /// Active keyspaces whose name is not bound to them: their creation is under way, or was cut off.
    pub(crate) unbound: BTreeSet<KeyspaceId>,
    pub(crate) manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>>,
    pub(crate) corrupt: Vec<String>,
    /// Microseconds since 1970, before the survey began.
    pub(crate) now_us: u64,
    /// Warnings about foreign objects.
    pub(crate) warnings: Vec<String>,
}

/// The content of a key.
pub(crate) enum Found {
    Gone,
    Bytes(Bytes),
    /// No retry can read the object.
    Unreadable,
}

/// Reads an object that a listing returned.
pub(crate) async fn read(bucket: &Bucket, key: &str) -> Result<Found, BucketError> {
    match bucket.get(key).await {
        Ok(Some(bytes)) => Ok(Found::Bytes(bytes)),
        Ok(None) => Ok(Found::Gone),
        Err(BucketError::TooLarge { .. }) => Ok(Found::Unreadable),
        // One file of a local directory; a bucket that denies all access has failed before.
        Err(BucketError::AccessDenied { .. }) if bucket.url().starts_with("file:") => Ok(Found::Unreadable),
        Err(error) => Err(error),
    }
}

/// Surveys the whole bucket. `now_us` is the time by which ages are judged.
pub(crate) async fn survey(bucket: &Bucket, now_us: u64) -> Result<Survey, CatalogError> {
    let mut corrupt = Vec::new();
    let mut catalogs = BTreeMap::new();
    let mut unbound = BTreeSet::new();
    let store = CatalogStore::new(bucket.clone());
    bucket.take_strangers();
    // Catalogs before objects: the list contains the objects of every plan that had ended by then. Objects of
    // younger keyspaces are not judged.
    let mut last: BTreeMap<KeyspaceId, CatalogVersion> = BTreeMap::new();
    for object in bucket.list(&layout::catalog_prefix()).await? {
        if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
            let known = last.entry(keyspace).or_insert(version);
            *known = version.max(*known);
        }
    }
    let seen = last.keys().copied().collect();
    for (keyspace, version) in last {
        match store.tip_below_strangers(keyspace, version).await {
            Ok(Some(catalog)) => {
                if catalog.state == KeyspaceState::Active {
                    match store.is_bound(&catalog).await {
                        Ok(false) => {
                            unbound.insert(keyspace);
                        }
                        // Its name is no valid object name: Vasto did not write this catalog.
                        Err(CatalogError::Bucket(BucketError::BadKey { .. })) => {}
                        Err(CatalogError::Bucket(error)) => return Err(error.into()),
                        Ok(true) | Err(_) => {}
                    }
                }
                catalogs.insert(keyspace, catalog);
            }
            Ok(None) | Err(CatalogError::Bucket(BucketError::TooLarge { .. })) => {}
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(_) => {} // reported by `fsck`, which reads every version
        }
    }
    let listed = bucket.list_all("").await?;
    let objects = listed.objects;
    let is_ours = |file: &ObjectInfo| listing::staged_for(&file.key).is_some_and(layout::is_known);
    let (staged, foreign): (Vec<_>, Vec<_>) = listed.staged.into_iter().partition(is_ours);
    let mut warnings = bucket.take_strangers();
    warnings.extend(foreign.into_iter().map(|file| format!("{}: it is not an object of Vasto", file.key)));
    let wanted: Vec<(Owner, Lsn, String)> = objects
        .iter()
        .filter_map(|object| match layout::parse_shipped(&object.key)? {
            (owner, Shipped::Manifest(lsn)) => Some((owner, lsn, object.key.clone())),
            _ => None,
        })
        .collect();
    let reads = futures::stream::iter(wanted).map(|(owner, lsn, key)| async move {
        let found = read(bucket, &key).await?;
        Ok::<_, BucketError>((owner, lsn, key, found))
    });
    let reads: Vec<_> = reads.buffer_unordered(READS).try_collect().await?;
    let mut manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>> = BTreeMap::new();
    for (owner, lsn, key, found) in reads {
        let manifest = match found {
            Found::Gone => continue, // collected meanwhile
            Found::Bytes(bytes) => Manifest::decode(&bytes).ok(),
            Found::Unreadable => None,
        };
        match manifest {
            Some(manifest)
                if (manifest.keyspace, manifest.shard, manifest.replica, manifest.lsn)
                    == (owner.keyspace, owner.shard, owner.replica, lsn) =>
            {
                manifests.entry(owner).or_default().insert(lsn, manifest);
            }
            _ => corrupt.push(key),
        }
    }
    Ok(Survey { objects, staged, catalogs, seen, unbound, manifests, corrupt, now_us, warnings })
}
