//! The catalog in the bucket: numbered create-only objects, of which the last is the truth.
//!
//! **Invariant:** a version, once there, is never changed or removed, and numbers have no gaps (a
//! version is only ever written after the one before it was seen). So "is number n there?" is
//! monotonic, and the tip is found by galloping upward from any version known to exist.
//!
//! What is in a version is decided by the master; who obeys it, by the nodes.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::limits::{BadKeyspaceName, check_keyspace_name};
use vasto_core::{CatalogVersion, KeyspaceId};

use crate::bucket::{Bucket, BucketError, Create};
use crate::envelope::{self, EnvelopeError};
use crate::layout;

const CATALOG: &str = "catalog";
const CLUSTER: &str = "cluster";
const NAME: &str = "name";

/// The layout of the prefix that this version writes, and the newest it uses.
pub const CLUSTER_FORMAT: u64 = 1;

/// Keyspaces that [`CatalogStore::load_all`] reads at once.
const LOADS_IN_FLIGHT: usize = 16;

/// Why the catalog could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// The bucket failed; the outcome of a write is unknown: read the tip before anything else.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// An object cannot be read.
    #[error("{key}: {source}")]
    Document {
        /// The object.
        key: String,
        /// What is wrong with it.
        source: EnvelopeError,
    },
    /// An object says that it is another one.
    #[error("{key} holds {found}: objects were moved by hand; put them back")]
    Misplaced {
        /// The object.
        key: String,
        /// What it says it is.
        found: String,
    },
    /// The prefix belongs to a newer version.
    #[error(
        "the bucket's layout has format {0}, newer than {CLUSTER_FORMAT}, the newest that this version uses; upgrade this server"
    )]
    NewerCluster(u64),
    /// A live keyspace has the name.
    #[error("a keyspace named `{0}` exists; choose another name, or delete that one first")]
    NameTaken(String),
    /// The name is not allowed.
    #[error(transparent)]
    BadName(#[from] BadKeyspaceName),
}

/// Who won a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogWrite {
    /// The version is ours and nobody has written the next one.
    Won,
    /// Somebody else's version: plan again from the tip (which may be still further up).
    Lost(Box<Catalog>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Cluster {
    cluster_id: String,
    format: u64,
    created_at_us: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct NameBinding {
    keyspace_id: KeyspaceId,
    deleted: bool,
}

/// Reads and writes catalogs; cheap to clone.
#[derive(Debug, Clone)]
pub struct CatalogStore {
    bucket: Bucket,
}

impl CatalogStore {
    /// The catalog in this bucket.
    pub fn new(bucket: Bucket) -> Self {
        Self { bucket }
    }

    /// The bucket that it is in.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    /// Claims the prefix for a cluster, once and for all; answers the id in force, which is another
    /// than `new_cluster_id` when the prefix was claimed before.
    ///
    /// # Errors
    /// `NewerCluster` when a newer version claimed it.
    pub async fn claim_cluster(&self, new_cluster_id: String) -> Result<String, CatalogError> {
        let key = layout::cluster();
        // Read first: a start-up that claims nothing should not need a write.
        let found = match self.bucket.get(&key).await? {
            Some(found) => found,
            None => {
                let cluster =
                    Cluster { cluster_id: new_cluster_id.clone(), format: CLUSTER_FORMAT, created_at_us: now_us() };
                match self.bucket.create(&key, envelope::encode(CLUSTER, &cluster)).await? {
                    Create::Created => return Ok(new_cluster_id),
                    Create::Exists(found) => found,
                }
            }
        };
        let cluster: Cluster = decode(CLUSTER, &key, &found).map_err(|error| match error {
            CatalogError::Document { source: EnvelopeError::Newer { format, .. }, .. } => {
                CatalogError::NewerCluster(format)
            }
            other => other,
        })?;
        if cluster.format > CLUSTER_FORMAT {
            return Err(CatalogError::NewerCluster(cluster.format));
        }
        Ok(cluster.cluster_id)
    }

    /// Writes one version. The caller has seen the version before it.
    ///
    /// # Errors
    /// After an error the outcome is unknown: find the tip and look at its nonce.
    pub async fn write(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        match self.claim(catalog).await? {
            CatalogWrite::Won => {}
            lost => return Ok(lost),
        }
        // Ours may have been written by an earlier call whose reply was lost, and another master may
        // have gone on from it since.
        let next = CatalogVersion(catalog.version.0 + 1);
        Ok(match self.read(catalog.keyspace, next).await? {
            Some(next) => CatalogWrite::Lost(Box::new(next)),
            None => CatalogWrite::Won,
        })
    }

    /// One version of a keyspace; `None`: it has not been written.
    pub async fn version(
        &self,
        keyspace: KeyspaceId,
        version: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        self.read(keyspace, version).await
    }

    /// The version of a keyspace that was in force at a time, microseconds since 1970; `None` when it
    /// did not exist yet. `tip` is a version that is known to exist, and to be the last before now.
    pub async fn at(&self, tip: &Catalog, at_us: u64) -> Result<Option<Catalog>, CatalogError> {
        if tip.written_at_us <= at_us {
            return Ok(Some(tip.clone()));
        }
        // Versions below `low` were written by then, those from `high` on were not.
        let (mut low, mut high) = (0, tip.version.0);
        let mut found = None;
        while low + 1 < high {
            let middle = low.midpoint(high);
            match self.read(tip.keyspace, CatalogVersion(middle)).await? {
                Some(version) if version.written_at_us <= at_us => {
                    low = middle;
                    found = Some(version);
                }
                _ => high = middle,
            }
        }
        Ok(found)
    }

    /// The last version of a keyspace, found upward from one that is known to exist (or from 1 when
    /// the hint is too high). `None`: there is no such keyspace. Two requests when the hint is the tip.
    pub async fn tip(&self, keyspace: KeyspaceId, hint: CatalogVersion) -> Result<Option<Catalog>, CatalogError> {
        let mut known = self.read(keyspace, CatalogVersion(hint.0.max(1))).await?;
        if known.is_none() && hint.0 > 1 {
            known = self.read(keyspace, CatalogVersion(1)).await?;
        }
        let Some(known) = known else { return Ok(None) };
        let last = self.last(known.version.0, |n| layout::catalog_version(keyspace, CatalogVersion(n))).await?;
        if last == known.version.0 {
            return Ok(Some(known));
        }
        self.read(keyspace, CatalogVersion(last)).await
    }

    /// The tips of all keyspaces, in the order of their ids; for start-up, since it lists. The list
    /// is only a hint: each tip, and the last keyspace, are found upward from it.
    ///
    /// An active keyspace whose name is not bound to it is left out: [`Self::create_keyspace`] ended
    /// between its two steps. Deleted keyspaces are in it: nodes may still hold their replicas.
    pub async fn load_all(&self) -> Result<Vec<Catalog>, CatalogError> {
        let mut hints = std::collections::BTreeMap::<KeyspaceId, CatalogVersion>::new();
        for object in self.bucket.list(&layout::catalog_prefix()).await? {
            if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
                let hint = hints.entry(keyspace).or_default();
                *hint = (*hint).max(version);
            }
        }
        let listed = hints.last_key_value().map_or(0, |(keyspace, _)| keyspace.0);
        for id in listed + 1..=self.last(listed, first_version).await? {
            hints.insert(KeyspaceId(id), CatalogVersion(1));
        }
        let found: Vec<Option<Catalog>> = futures::stream::iter(hints)
            .map(|(keyspace, hint)| self.clone().load_one(keyspace, hint))
            .buffered(LOADS_IN_FLIGHT)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    async fn load_one(self, keyspace: KeyspaceId, hint: CatalogVersion) -> Result<Option<Catalog>, CatalogError> {
        let Some(catalog) = self.tip(keyspace, hint).await? else { return Ok(None) };
        if catalog.state == KeyspaceState::Active && !self.is_bound(&catalog).await? {
            tracing::info!(%keyspace, name = catalog.name, "ignored: the name was never bound to this keyspace");
            return Ok(None);
        }
        Ok(Some(catalog))
    }

    /// Does its name lead to it? That of a keyspace whose creation was cut off, or is under way, does not.
    pub(crate) async fn is_bound(&self, catalog: &Catalog) -> Result<bool, CatalogError> {
        let bound = self.name_tip(&catalog.name).await?;
        Ok(bound.is_some_and(|(_, bound)| bound.keyspace_id == catalog.keyspace && !bound.deleted))
    }

    /// Creates a keyspace: claims the next free id with version 1 of `build(id)`, then the name.
    ///
    /// A crash between the two leaves an id whose name was never bound: [`Self::load_all`] ignores
    /// it, the id stays used up, and the name stays free. `build` may be called several times, and
    /// must draw a new nonce in each process.
    ///
    /// # Errors
    /// `BadName`; `NameTaken` when a live keyspace has the name, also when it is the caller's own from
    /// an earlier call that ended in an error.
    pub async fn create_keyspace(&self, build: impl Fn(KeyspaceId) -> Catalog) -> Result<Catalog, CatalogError> {
        let name = build(KeyspaceId(1)).name;
        check_keyspace_name(&name)?;
        self.free_name_version(&name).await?;
        let mut id = self.last(0, first_version).await? + 1;
        let catalog = loop {
            let catalog = build(KeyspaceId(id));
            assert_eq!(
                (catalog.keyspace, catalog.version, &catalog.name),
                (KeyspaceId(id), CatalogVersion(1), &name),
                "a keyspace begins with version 1 under the id it was given"
            );
            match self.claim(&catalog).await? {
                CatalogWrite::Won => break catalog,
                CatalogWrite::Lost(_) => id += 1,
            }
        };
        loop {
            let n = self.free_name_version(&name).await?;
            let binding = NameBinding { keyspace_id: catalog.keyspace, deleted: false };
            if self.create(&layout::name_version(&name, n), NAME, &binding).await?.is_none() {
                return Ok(catalog);
            }
        }
    }

    /// Frees the name of a deleted keyspace, so that it can be used again; does nothing when the name
    /// is not bound to it (any more).
    pub async fn release_name(&self, name: &str, keyspace: KeyspaceId) -> Result<(), CatalogError> {
        check_keyspace_name(name)?;
        loop {
            let Some((n, bound)) = self.name_tip(name).await? else { return Ok(()) };
            if bound.keyspace_id != keyspace || bound.deleted {
                return Ok(());
            }
            let binding = NameBinding { keyspace_id: keyspace, deleted: true };
            if self.create(&layout::name_version(name, n + 1), NAME, &binding).await?.is_none() {
                return Ok(());
            }
        }
    }

    /// The number under which the name can be bound now.
    async fn free_name_version(&self, name: &str) -> Result<u64, CatalogError> {
        let Some((n, bound)) = self.name_tip(name).await? else { return Ok(1) };
        if !bound.deleted {
            // A crash between the delete of a keyspace and the release of its name must not keep it.
            let owner = self.tip(bound.keyspace_id, CatalogVersion(1)).await?;
            if owner.is_some_and(|owner| owner.state == KeyspaceState::Active) {
                return Err(CatalogError::NameTaken(name.to_owned()));
            }
        }
        Ok(n + 1)
    }

    async fn name_tip(&self, name: &str) -> Result<Option<(u64, NameBinding)>, CatalogError> {
        let last = self.last(0, |n| layout::name_version(name, n)).await?;
        if last == 0 {
            return Ok(None);
        }
        let key = layout::name_version(name, last);
        match self.bucket.get(&key).await? {
            Some(bytes) => Ok(Some((last, decode(NAME, &key, &bytes)?))),
            None => Ok(None),
        }
    }

    /// Create-only; the nonce decides whether an object that is there is ours.
    async fn claim(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        let key = layout::catalog_version(catalog.keyspace, catalog.version);
        let Some(found) = self.create(&key, CATALOG, catalog).await? else { return Ok(CatalogWrite::Won) };
        let found = read_catalog(&key, &found, catalog.keyspace, catalog.version)?;
        let ours = found.nonce == catalog.nonce;
        Ok(if ours { CatalogWrite::Won } else { CatalogWrite::Lost(Box::new(found)) })
    }

    /// `None`: our bytes are there; else what is there instead.
    pub(crate) async fn create<T: Serialize>(
        &self,
        key: &str,
        kind: &'static str,
        body: &T,
    ) -> Result<Option<Bytes>, CatalogError> {
        Ok(match self.bucket.create(key, envelope::encode(kind, body)).await? {
            Create::Created => None,
            Create::Exists(found) => Some(found),
        })
    }

    /// Checks the bytes of a version under its key.
    pub(crate) fn decode_version(key: &str, bytes: &[u8]) -> Result<Catalog, CatalogError> {
        let misplaced = || CatalogError::Misplaced { key: key.to_owned(), found: "no version of a catalog".into() };
        let (keyspace, version) = layout::parse_catalog_version(key).ok_or_else(misplaced)?;
        read_catalog(key, bytes, keyspace, version)
    }

    async fn read(&self, keyspace: KeyspaceId, version: CatalogVersion) -> Result<Option<Catalog>, CatalogError> {
        let key = layout::catalog_version(keyspace, version);
        let bytes = self.bucket.get(&key).await?;
        bytes.map(|bytes| read_catalog(&key, &bytes, keyspace, version)).transpose()
    }

    /// The greatest number that is there, given that all up to `known` are: doubling steps up, then
    /// halving steps back. One request when `known` is the last.
    pub(crate) async fn last(&self, known: u64, key: impl Fn(u64) -> String) -> Result<u64, CatalogError> {
        let (mut known, mut step) = (known, 1);
        while self.bucket.head(&key(known + step)).await?.is_some() {
            known += step;
            step *= 2;
        }
        while step > 1 {
            step /= 2;
            if self.bucket.head(&key(known + step)).await?.is_some() {
                known += step;
            }
        }
        Ok(known)
    }
}

fn first_version(id: u64) -> String {
    layout::catalog_version(KeyspaceId(id), CatalogVersion(1))
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(
    kind: &'static str,
    key: &str,
    bytes: &[u8],
) -> Result<T, CatalogError> {
    envelope::decode(kind, bytes).map_err(|source| CatalogError::Document { key: key.to_owned(), source })
}

fn read_catalog(
    key: &str,
    bytes: &[u8],
    keyspace: KeyspaceId,
    version: CatalogVersion,
) -> Result<Catalog, CatalogError> {
    let catalog: Catalog = decode(CATALOG, key, bytes)?;
    if (catalog.keyspace, catalog.version) != (keyspace, version) {
        let found = format!("version {} of keyspace {}", catalog.version, catalog.keyspace);
        return Err(CatalogError::Misplaced { key: key.to_owned(), found });
    }
    Ok(catalog)
}

/// The object's bytes of one version; for tools and tests.
pub fn encode_catalog(catalog: &Catalog) -> Bytes {
    envelope::encode(CATALOG, catalog)
}

/// Reads what [`encode_catalog`] wrote.
///
/// # Errors
/// Damage, another kind of document, or one of a newer version.
pub fn decode_catalog(bytes: &[u8]) -> Result<Catalog, EnvelopeError> {
    envelope::decode(CATALOG, bytes)
}

#[expect(clippy::disallowed_methods, reason = "stamps cluster.json once, for people to read; nothing depends on it")]
fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
