//! A look through the whole bucket: its objects, the last catalogs, and every manifest.
//!
//! **Invariant:** one object that cannot be read, or is none of Vasto's, is told and passed by.

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

/// Reads at a time.
pub(crate) const READS: usize = 8;

/// Everything that is in the bucket, with the manifests read.
pub(crate) struct Survey {
    pub(crate) objects: Vec<ObjectInfo>,
    /// What interrupted writes have left beside objects of Vasto.
    pub(crate) staged: Vec<ObjectInfo>,
    pub(crate) catalogs: BTreeMap<KeyspaceId, Catalog>,
    /// Every keyspace that has a version, also one that cannot be read.
    pub(crate) seen: BTreeSet<KeyspaceId>,
    /// Active ones whose name does not lead to them: their creation is under way, or was cut off.
    pub(crate) unbound: BTreeSet<KeyspaceId>,
    pub(crate) manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>>,
    pub(crate) corrupt: Vec<String>,
    /// Microseconds since 1970, before the look began.
    pub(crate) now_us: u64,
    /// What lies there and is not of Vasto.
    pub(crate) warnings: Vec<String>,
}

/// What is under a key.
pub(crate) enum Found {
    Gone,
    Bytes(Bytes),
    /// Nobody can read it, now or later.
    Unreadable,
}

/// Reads an object that a listing has shown.
pub(crate) async fn read(bucket: &Bucket, key: &str) -> Result<Found, BucketError> {
    match bucket.get(key).await {
        Ok(Some(bytes)) => Ok(Found::Bytes(bytes)),
        Ok(None) => Ok(Found::Gone),
        Err(BucketError::TooLarge { .. }) => Ok(Found::Unreadable),
        // One file of a local directory; a bucket that refuses us as a whole has said so before.
        Err(BucketError::AccessDenied { .. }) if bucket.url().starts_with("file:") => Ok(Found::Unreadable),
        Err(error) => Err(error),
    }
}

/// Looks through everything. `now_us` is the time for whoever judges ages.
pub(crate) async fn survey(bucket: &Bucket, now_us: u64) -> Result<Survey, CatalogError> {
    let mut corrupt = Vec::new();
    let mut catalogs = BTreeMap::new();
    let mut unbound = BTreeSet::new();
    let store = CatalogStore::new(bucket.clone());
    bucket.take_strangers();
    // Catalogs before objects: what a plan that is over by then has written is in the list. Objects of a
    // keyspace that is younger are not judged.
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
                        // Its name can be no object's: somebody else wrote this.
                        Err(CatalogError::Bucket(BucketError::BadKey { .. })) => {}
                        Err(CatalogError::Bucket(error)) => return Err(error.into()),
                        Ok(true) | Err(_) => {}
                    }
                }
                catalogs.insert(keyspace, catalog);
            }
            Ok(None) | Err(CatalogError::Bucket(BucketError::TooLarge { .. })) => {}
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(_) => {} // told by `fsck`, which reads every version
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
