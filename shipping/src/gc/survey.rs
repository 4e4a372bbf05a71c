//! A survey of the whole bucket: its objects, the last catalogs, and every manifest.
//!
//! **Invariant:** an unreadable or foreign object is reported and skipped.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use vasto_core::CatalogVersion;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, Lsn};

use crate::archive::READS;
use crate::bucket::{Bucket, BucketError, ObjectInfo, staged_for};
use crate::catalog::{CatalogError, CatalogStore};
use crate::layout::{self, Owner, Shipped};
use crate::manifest::Manifest;

/// The content of the bucket, with the manifests decoded.
pub(super) struct Survey {
    pub(super) objects: Vec<ObjectInfo>,
    /// Files that interrupted writes have left beside objects of Vasto.
    pub(super) staged: Vec<ObjectInfo>,
    pub(super) catalogs: BTreeMap<KeyspaceId, Catalog>,
    /// Every keyspace that has a version, also an unreadable one.
    pub(super) seen: BTreeSet<KeyspaceId>,
    /// Active keyspaces whose name is not bound to them: their creation is under way, or was cut
    /// off.
    pub(super) unbound: BTreeSet<KeyspaceId>,
    pub(super) manifests: BTreeMap<Owner, BTreeMap<Lsn, Manifest>>,
    pub(super) corrupt: Vec<String>,
    /// Microseconds since 1970, before the survey began.
    pub(super) now_us: u64,
    /// Warnings about foreign objects.
    pub(super) warnings: Vec<String>,
}

impl Survey {
    /// Returns every readable manifest.
    pub(super) fn all_manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.manifests.values().flat_map(BTreeMap::values)
    }
}

/// Indexes over the objects of a survey.
pub(super) struct Shipments<'a> {
    /// Write time of each object, by the store's clock.
    written: HashMap<&'a str, u64>,
    /// Write time of each replica's last object.
    pub(super) newest: BTreeMap<Owner, u64>,
    /// First LSNs of each replica's chunks, ascending; an entry for each replica that has shipped
    /// anything.
    pub(super) chunks: BTreeMap<Owner, Vec<Lsn>>,
}

impl<'a> Shipments<'a> {
    pub(super) fn of(survey: &'a Survey) -> Self {
        let mut of =
            Self { written: HashMap::new(), newest: BTreeMap::new(), chunks: BTreeMap::new() };
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

    /// Returns the write time of an object, by the store's clock.
    pub(super) fn written_us(&self, key: &str) -> Option<u64> {
        self.written.get(key).copied()
    }
}

/// The content of a key.
pub(super) enum Found {
    Gone,
    Bytes(Bytes),
    /// No retry can read the object.
    Unreadable,
}

/// Reads an object that a listing returned.
pub(super) async fn read(bucket: &Bucket, key: &str) -> Result<Found, BucketError> {
    match bucket.get(key).await {
        Ok(Some(bytes)) => Ok(Found::Bytes(bytes)),
        Ok(None) => Ok(Found::Gone),
        Err(BucketError::TooLarge { .. }) => Ok(Found::Unreadable),
        // One file of a local directory; a bucket that denies all access has failed before.
        Err(BucketError::AccessDenied { .. }) if bucket.url().starts_with("file:") => {
            Ok(Found::Unreadable)
        }
        Err(error) => Err(error),
    }
}

/// Surveys the whole bucket. `now_us` is the time by which ages are judged.
pub(super) async fn survey(bucket: &Bucket, now_us: u64) -> Result<Survey, CatalogError> {
    bucket.take_strangers();
    // Catalogs before objects: the list contains the objects of every plan that had ended by then.
    // Objects of younger keyspaces are not judged.
    let mut last: BTreeMap<KeyspaceId, CatalogVersion> = BTreeMap::new();
    for object in bucket.list(&layout::catalog_prefix()).await? {
        if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
            let newest = last.entry(keyspace).or_insert(version);
            *newest = version.max(*newest);
        }
    }
    let seen = last.keys().copied().collect();
    let (catalogs, unbound) = read_catalogs(bucket, last).await?;
    let listed = bucket.list_all("").await?;
    let objects = listed.objects;
    let is_ours = |file: &ObjectInfo| staged_for(&file.key).is_some_and(layout::is_known);
    let (staged, foreign): (Vec<_>, Vec<_>) = listed.staged.into_iter().partition(is_ours);
    let mut warnings = bucket.take_strangers();
    warnings.extend(
        foreign.into_iter().map(|file| format!("{}: it is not an object of Vasto", file.key)),
    );
    let (manifests, corrupt) = read_manifests(bucket, &objects).await?;
    Ok(Survey { objects, staged, catalogs, seen, unbound, manifests, corrupt, now_us, warnings })
}

/// Reads the last catalogs, given the last listed versions; also returns the keyspaces without a
/// bound name.
async fn read_catalogs(
    bucket: &Bucket,
    last: BTreeMap<KeyspaceId, CatalogVersion>,
) -> Result<(BTreeMap<KeyspaceId, Catalog>, BTreeSet<KeyspaceId>), CatalogError> {
    let store = CatalogStore::new(bucket.clone());
    let (mut catalogs, mut unbound) = (BTreeMap::new(), BTreeSet::new());
    for (keyspace, version) in last {
        let catalog = match store.tip_before_unreadable(keyspace, version).await {
            Ok(Some(catalog)) => catalog,
            Ok(None) | Err(CatalogError::Bucket(BucketError::TooLarge { .. })) => continue,
            Err(CatalogError::Bucket(error)) => return Err(error.into()),
            Err(_) => continue, // reported by `fsck`, which reads every version
        };
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
    Ok((catalogs, unbound))
}

/// Reads every manifest; also returns the keys of those that cannot be read.
async fn read_manifests(
    bucket: &Bucket,
    objects: &[ObjectInfo],
) -> Result<(BTreeMap<Owner, BTreeMap<Lsn, Manifest>>, Vec<String>), BucketError> {
    let wanted = objects.iter().filter_map(|object| match layout::parse_shipped(&object.key)? {
        (owner, Shipped::Manifest(lsn)) => Some((owner, lsn, object.key.clone())),
        _ => None,
    });
    let wanted: Vec<(Owner, Lsn, String)> = wanted.collect();
    let reads = futures::stream::iter(wanted).map(|(owner, lsn, key)| async move {
        let found = read(bucket, &key).await?;
        Ok::<_, BucketError>((owner, lsn, key, found))
    });
    let reads: Vec<_> = reads.buffer_unordered(READS).try_collect().await?;
    let mut corrupt = Vec::new();
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
    Ok((manifests, corrupt))
}
