//! The catalog in the bucket: numbered create-only objects, of which the last is in force.
//!
//! **Invariant:** a version, once written, is never changed or removed, and numbers have no gaps (a
//! version is only ever written after the version before it was seen). So "does number n exist?" is
//! monotonic, and the tip is found by galloping upward from any version known to exist.
//!
//! The master decides what a version contains; the nodes apply it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// The layout format of the prefix that this version writes, and the newest that it uses.
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
        /// The decoding error.
        source: EnvelopeError,
    },
    /// The content of an object names another key.
    #[error("{key} holds {found}: objects were moved by hand; put them back")]
    Misplaced {
        /// The object.
        key: String,
        /// The object that its content names.
        found: String,
    },
    /// The prefix belongs to a newer version.
    #[error(
        "the bucket's layout has format {0}, newer than {CLUSTER_FORMAT}, the newest that this version uses; upgrade this server"
    )]
    NewerCluster(u64),
    /// The prefix is not empty, and no `cluster.json` names its cluster.
    #[error(
        "the prefix {url} is not empty ({found}) but has no cluster.json, so it is not claimed; for a new cluster choose \
         an empty prefix, such as {url}/vasto; if this cluster's own cluster.json was deleted, `vasto bucket repair` \
         puts it back from what the nodes remember"
    )]
    Unclaimed {
        /// The prefix.
        url: String,
        /// An object in it.
        found: String,
    },
    /// Another cluster has claimed the prefix.
    #[error(
        "the prefix belongs to cluster {found}, which has keyspaces, and not to cluster {wanted}; start the master with \
         the bucket of its own cluster"
    )]
    OtherCluster {
        /// The cluster that claimed it.
        found: String,
        /// The cluster of the caller.
        wanted: String,
    },
    /// A live keyspace has the name.
    #[error("a keyspace named `{0}` exists; choose another name, or delete that one first")]
    NameTaken(String),
    /// The name is not allowed.
    #[error(transparent)]
    BadName(#[from] BadKeyspaceName),
}

impl CatalogError {
    /// Returns true when the error is about one unreadable object, and says nothing about others. An object
    /// of a newer version does not count: the reader must be upgraded first.
    pub fn is_of_one_object(&self) -> bool {
        match self {
            CatalogError::Document { source, .. } => !matches!(source, EnvelopeError::Newer { .. }),
            CatalogError::Misplaced { .. } => true,
            CatalogError::Bucket(error) => {
                matches!(error, BucketError::BadKey { .. } | BucketError::TooLarge { .. })
            }
            _ => false,
        }
    }
}

/// The outcome of writing a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogWrite {
    /// The version is the caller's, and the next version does not exist.
    Won,
    /// Another writer's version: plan again from the tip (which may be still further up).
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
    /// The greatest keyspace id ever seen, whatever the bucket still shows of it: a reused id would find the
    /// other keyspace's objects under its names.
    used: Arc<AtomicU64>,
}

impl CatalogStore {
    /// Opens the catalog in this bucket.
    pub fn new(bucket: Bucket) -> Self {
        Self { bucket, used: Arc::default() }
    }

    /// Records an id that no new keyspace may have.
    pub fn note_used(&self, keyspace: KeyspaceId) {
        self.used.fetch_max(keyspace.0, Ordering::AcqRel);
    }

    /// Returns the bucket that holds the catalog.
    pub fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    /// Claims the prefix for a cluster, once and for all; returns the id in force, which differs
    /// from `new_cluster_id` when the prefix was claimed before.
    ///
    /// # Errors
    /// `Unclaimed` when there is anything in the prefix but no claim; `NewerCluster` when a newer version
    /// claimed it.
    pub async fn claim_cluster(&self, new_cluster_id: String) -> Result<String, CatalogError> {
        // Read first: a start-up that claims nothing should not need a write.
        if let Some(id) = self.cluster_id().await? {
            return Ok(id);
        }
        if let Some(found) = self.bucket.any_object().await? {
            // Another master may have claimed it, and written more, since the first read.
            return match self.cluster_id().await? {
                Some(id) => Ok(id),
                None => Err(CatalogError::Unclaimed { url: self.bucket.url().to_owned(), found }),
            };
        }
        self.claim_for(new_cluster_id).await
    }

    /// Returns the cluster that has claimed the prefix; `None` when it is unclaimed.
    pub async fn cluster_id(&self) -> Result<Option<String>, CatalogError> {
        let found = self.bucket.get(&layout::cluster()).await?;
        found.map(|found| Self::cluster_id_in(&found)).transpose()
    }

    /// Writes the claim, whatever else is in the prefix; returns the cluster whose claim is in force.
    pub(crate) async fn claim_for(&self, cluster_id: String) -> Result<String, CatalogError> {
        let cluster = Cluster { cluster_id: cluster_id.clone(), format: CLUSTER_FORMAT, created_at_us: now_us() };
        match self.bucket.create(&layout::cluster(), envelope::encode(CLUSTER, &cluster)).await? {
            Create::Created => Ok(cluster_id),
            Create::Exists(found) => Self::cluster_id_in(&found),
        }
    }

    fn cluster_id_in(found: &[u8]) -> Result<String, CatalogError> {
        let key = layout::cluster();
        let cluster: Cluster = decode(CLUSTER, &key, found).map_err(|error| match error {
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
    /// After an error the outcome is unknown: find the tip and compare its nonce.
    pub async fn write(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        match self.claim(catalog).await? {
            CatalogWrite::Won => {}
            lost => return Ok(lost),
        }
        // An earlier call whose reply was lost may have written this version, and another master may
        // have written the next one since.
        let next = CatalogVersion(catalog.version.0 + 1);
        Ok(match self.read(catalog.keyspace, next).await? {
            Some(next) => CatalogWrite::Lost(Box::new(next)),
            None => CatalogWrite::Won,
        })
    }

    /// Reads one version of a keyspace; `None` when it has not been written.
    pub async fn version(
        &self,
        keyspace: KeyspaceId,
        version: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        self.read(keyspace, version).await
    }

    /// Returns the version of a keyspace that was in force at a time, microseconds since 1970; `None` when it
    /// did not exist yet. `tip` is a version that is known to exist, and to be the last before now.
    pub async fn at(&self, tip: &Catalog, at_us: u64) -> Result<Option<Catalog>, CatalogError> {
        if tip.written_at_us <= at_us {
            return Ok(Some(tip.clone()));
        }
        // Versions up to `low` were written by then, versions from `high` on were not.
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

    /// Returns the last version of a keyspace, found upward from one that is known to exist (or from 1 when
    /// the hint is too high). `None`: no such keyspace. Sends two requests when the hint is the tip.
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

    /// Returns the same from a hint that a listing gave, ignoring foreign objects under higher numbers.
    pub(crate) async fn tip_below_strangers(
        &self,
        keyspace: KeyspaceId,
        listed: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        match self.tip(keyspace, listed).await {
            Err(error) if error.is_of_one_object() => self.tip(keyspace, CatalogVersion(1)).await,
            found => found,
        }
    }

    /// Returns the tips of all keyspaces, in the order of their ids; for start-up, since it lists. The list
    /// is only a hint: each tip, and the last keyspace, are found upward from it.
    ///
    /// An active keyspace whose name is not bound to it is left out: [`Self::create_keyspace`] ended
    /// between its two steps. Deleted keyspaces are included: nodes may still hold their replicas.
    /// An unreadable keyspace is logged and left out, unless a newer version wrote it; the others still load.
    pub async fn load_all(&self) -> Result<Vec<Catalog>, CatalogError> {
        Ok(self.load_all_told().await?.0)
    }

    /// Returns the same, with a warning for each unreadable keyspace that was left out.
    pub async fn load_all_told(&self) -> Result<(Vec<Catalog>, Vec<String>), CatalogError> {
        let mut hints = BTreeMap::<KeyspaceId, CatalogVersion>::new();
        for object in self.bucket.list(&layout::catalog_prefix()).await? {
            if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
                let hint = hints.entry(keyspace).or_default();
                *hint = (*hint).max(version);
            }
        }
        let listed = hints.last_key_value().map_or(0, |(keyspace, _)| keyspace.0);
        for id in listed.saturating_add(1)..=self.last(listed, first_version).await? {
            hints.entry(KeyspaceId(id)).or_insert(CatalogVersion(1));
        }
        let found: Vec<(KeyspaceId, Result<Option<Catalog>, CatalogError>)> = futures::stream::iter(hints)
            .map(|(keyspace, hint)| {
                let store = self.clone();
                async move { (keyspace, store.load_one(keyspace, hint).await) }
            })
            .buffered(LOADS_IN_FLIGHT)
            .collect()
            .await;
        let (mut catalogs, mut odd) = (Vec::new(), Vec::new());
        for (keyspace, loaded) in found {
            match loaded {
                Ok(catalog) => {
                    self.note_used(catalog.as_ref().map_or(KeyspaceId(0), |catalog| catalog.keyspace));
                    catalogs.extend(catalog);
                }
                Err(error) if error.is_of_one_object() => {
                    let text = format!("keyspace {keyspace} is left out, because its catalog cannot be read: {error}");
                    tracing::warn!(%keyspace, %error, "a keyspace is left out, because its catalog cannot be read");
                    odd.push(text);
                }
                Err(error) => return Err(error),
            }
        }
        Ok((catalogs, odd))
    }

    async fn load_one(self, keyspace: KeyspaceId, hint: CatalogVersion) -> Result<Option<Catalog>, CatalogError> {
        let Some(catalog) = self.tip_below_strangers(keyspace, hint).await? else { return Ok(None) };
        if catalog.state != KeyspaceState::Active {
            return Ok(Some(catalog));
        }
        let bound = match self.is_bound(&catalog).await {
            // A foreign object lies under the name: the keyspace exists all the same.
            Err(error) if error.is_of_one_object() => {
                tracing::warn!(%keyspace, name = catalog.name, %error, "the name of a keyspace cannot be looked up");
                true
            }
            bound => bound?,
        };
        // Version 2 is written only after the name was seen bound: the binding was deleted since.
        if !bound && catalog.version == CatalogVersion(1) {
            tracing::info!(%keyspace, name = catalog.name, "ignored: the name was never bound to this keyspace");
            return Ok(None);
        }
        Ok(Some(catalog))
    }

    /// Returns true when the name is bound to the keyspace; it is not when its creation was cut off or is under way.
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
        let mut id = self.last(self.used.load(Ordering::Acquire), first_version).await?.saturating_add(1);
        let catalog = loop {
            let catalog = build(KeyspaceId(id));
            assert_eq!(
                (catalog.keyspace, catalog.version, &catalog.name),
                (KeyspaceId(id), CatalogVersion(1), &name),
                "a keyspace begins with version 1 under the id it was given"
            );
            match self.claim(&catalog).await {
                Ok(CatalogWrite::Won) => break catalog,
                Ok(CatalogWrite::Lost(_)) => id += 1,
                // A foreign object lies under the id.
                Err(error) if error.is_of_one_object() => id += 1,
                Err(error) => return Err(error),
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

    /// Restores what the bucket has lost of a keyspace, given the last version that any node remembers: that
    /// version, the versions before it (of which only the numbers are left: each repeats the remembered version,
    /// without its plan), and the name. Returns the number of objects written.
    ///
    /// # Errors
    /// `NameTaken` when the name is bound to another live keyspace.
    pub async fn put_back(&self, remembered: &Catalog) -> Result<u64, CatalogError> {
        let keyspace = remembered.keyspace;
        self.note_used(keyspace);
        let folder = format!("{}{:020}/", layout::catalog_prefix(), keyspace.0);
        let listed = self.bucket.list(&folder).await?;
        let there: BTreeSet<CatalogVersion> =
            listed.iter().filter_map(|object| Some(layout::parse_catalog_version(&object.key)?.1)).collect();
        let lost: Vec<u64> =
            (1..=remembered.version.0).filter(|version| !there.contains(&CatalogVersion(*version))).collect();
        // The remembered version is written last: a tip is found only by numbers without a gap.
        let written = futures::stream::iter(lost).map(|version| async move {
            let mut catalog = remembered.clone();
            if version < remembered.version.0 {
                catalog.version = CatalogVersion(version);
                catalog.plan = None;
                catalog.nonce = rand::random();
            }
            let claimed = self.claim(&catalog).await?;
            Ok::<_, CatalogError>(u64::from(matches!(claimed, CatalogWrite::Won)))
        });
        let mut count = written.buffered(LOADS_IN_FLIGHT).try_fold(0, async |all, one| Ok(all + one)).await?;
        let hint = there.last().copied().unwrap_or_default().max(remembered.version);
        let Some(tip) = self.tip(keyspace, hint).await? else { return Ok(count) };
        if tip.state == KeyspaceState::Active && !self.is_bound(&tip).await? {
            let n = self.free_name_version(&tip.name).await?;
            let binding = NameBinding { keyspace_id: keyspace, deleted: false };
            count += u64::from(self.create(&layout::name_version(&tip.name, n), NAME, &binding).await?.is_none());
        }
        Ok(count)
    }

    /// Writes the lost claim again, for the cluster that the nodes belong to. A claim of another cluster
    /// without a keyspace is deleted: it was made when the prefix was found empty.
    ///
    /// # Errors
    /// `OtherCluster` when that cluster has keyspaces.
    pub async fn claim_again(&self, cluster_id: &str) -> Result<bool, CatalogError> {
        match self.cluster_id().await? {
            Some(found) if found == cluster_id => return Ok(false),
            Some(found) => {
                let any = self.bucket.list(&layout::catalog_prefix()).await?;
                if any.iter().any(|object| layout::parse_catalog_version(&object.key).is_some()) {
                    let (found, wanted) = (found, cluster_id.to_owned());
                    return Err(CatalogError::OtherCluster { found, wanted });
                }
                self.bucket.delete(&layout::cluster()).await?;
            }
            None => {}
        }
        match self.claim_for(cluster_id.to_owned()).await? {
            found if found == cluster_id => Ok(true),
            found => Err(CatalogError::OtherCluster { found, wanted: cluster_id.to_owned() }),
        }
    }

    /// Frees the name of a deleted keyspace for reuse; does nothing when the name is not bound to it
    /// (any more).
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

    /// Returns the number under which the name can be bound now.
    async fn free_name_version(&self, name: &str) -> Result<u64, CatalogError> {
        let Some((n, bound)) = self.name_tip(name).await? else { return Ok(1) };
        if !bound.deleted {
            // A crash between the delete of a keyspace and the release of its name must not keep the name taken.
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

    /// Creates the version; the nonce decides whether an existing object is the caller's.
    async fn claim(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        let key = layout::catalog_version(catalog.keyspace, catalog.version);
        let Some(found) = self.create(&key, CATALOG, catalog).await? else { return Ok(CatalogWrite::Won) };
        let found = read_catalog(&key, &found, catalog.keyspace, catalog.version)?;
        let ours = found.nonce == catalog.nonce;
        Ok(if ours { CatalogWrite::Won } else { CatalogWrite::Lost(Box::new(found)) })
    }

    /// Creates a document; `None` when the caller's bytes are there, else the bytes found instead.
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

    /// Returns the greatest number that exists, given that all up to `known` do: doubling steps up, then
    /// halving steps back. Sends one request when `known` is the last.
    pub(crate) async fn last(&self, known: u64, key: impl Fn(u64) -> String) -> Result<u64, CatalogError> {
        let (mut known, mut step) = (known, 1u64);
        // No number exists beyond the range of `u64`.
        let there = async |known: u64, step: u64| match known.checked_add(step) {
            Some(n) => Ok::<_, CatalogError>(self.bucket.head(&key(n)).await?.is_some()),
            None => Ok(false),
        };
        while there(known, step).await? {
            known += step;
            step = step.saturating_mul(2);
        }
        while step > 1 {
            step /= 2;
            if there(known, step).await? {
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

/// Encodes one version as an object; for tools and tests.
pub fn encode_catalog(catalog: &Catalog) -> Bytes {
    envelope::encode(CATALOG, catalog)
}

/// Decodes an object of [`encode_catalog`].
///
/// # Errors
/// Damage, another kind of document, or one of a newer version.
pub fn decode_catalog(bytes: &[u8]) -> Result<Catalog, EnvelopeError> {
    envelope::decode(CATALOG, bytes)
}

#[expect(clippy::disallowed_methods, reason = "the clock of whoever asks without giving a time of its own")]
pub(crate) fn now_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
