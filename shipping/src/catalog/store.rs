//! Reads and writes the versions of catalogs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use serde::Serialize;
use vasto_core::catalog::Catalog;
use vasto_core::{CatalogVersion, KeyspaceId};

use super::error::CatalogError;
use crate::bucket::{Bucket, Create};
use crate::envelope::{self, EnvelopeError};
use crate::layout;

pub(super) const CATALOG: &str = "catalog";

/// The outcome of writing a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogWrite {
    /// The version is the caller's, and the next version does not exist.
    Won,
    /// Another writer's version: plan again from the tip (which may be still further up).
    Lost(Box<Catalog>),
}

/// Reads and writes catalogs; cheap to clone.
#[derive(Debug, Clone)]
pub struct CatalogStore {
    bucket: Bucket,
    /// The greatest keyspace id ever seen, whatever the bucket still shows of it: a reused id would
    /// find the other keyspace's objects under its names.
    pub(super) used: Arc<AtomicU64>,
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

    /// Writes one version. The caller has seen the version before it.
    ///
    /// # Errors
    /// After an error the outcome is unknown: find the tip and compare its nonce.
    pub async fn write(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        self.write_body(catalog, encode_catalog(catalog)).await
    }

    /// Writes one version as [`Self::write`] does, whose body the caller has made (`encode_catalog`).
    ///
    /// # Errors
    /// As of [`Self::write`].
    pub async fn write_body(
        &self,
        catalog: &Catalog,
        body: Bytes,
    ) -> Result<CatalogWrite, CatalogError> {
        match self.claim_or_find(catalog, body).await? {
            // Nobody writes a version before the one before it is there.
            (CatalogWrite::Won, true) => return Ok(CatalogWrite::Won),
            (CatalogWrite::Won, false) => {}
            (lost, _) => return Ok(lost),
        }
        // An earlier call whose reply was lost has written this version, and another master may
        // have written the next one since.
        let next = CatalogVersion(catalog.version.0 + 1);
        Ok(match self.version(catalog.keyspace, next).await? {
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
        let key = layout::catalog_version(keyspace, version);
        let bytes = self.bucket.get(&key).await?;
        bytes.map(|bytes| read_catalog(&key, &bytes, keyspace, version)).transpose()
    }

    /// Returns the version of a keyspace that was in force at a time, microseconds since 1970;
    /// `None` when it did not exist yet. `tip` is a version that is known to exist, and to be the
    /// last before now.
    pub async fn at(&self, tip: &Catalog, at_us: u64) -> Result<Option<Catalog>, CatalogError> {
        if tip.written_at_us <= at_us {
            return Ok(Some(tip.clone()));
        }
        // Versions up to `low` were written by then, versions from `high` on were not.
        let (mut low, mut high) = (0, tip.version.0);
        let mut found = None;
        while low + 1 < high {
            let middle = low.midpoint(high);
            match self.version(tip.keyspace, CatalogVersion(middle)).await? {
                Some(version) if version.written_at_us <= at_us => {
                    low = middle;
                    found = Some(version);
                }
                _ => high = middle,
            }
        }
        Ok(found)
    }

    /// Returns the last version of a keyspace, found upward from one that is known to exist (or
    /// from 1 when the hint is too high). `None`: no such keyspace. Sends two requests when the
    /// hint is the tip.
    pub async fn tip(
        &self,
        keyspace: KeyspaceId,
        hint: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        let mut found = self.version(keyspace, CatalogVersion(hint.0.max(1))).await?;
        if found.is_none() && hint.0 > 1 {
            found = self.version(keyspace, CatalogVersion(1)).await?;
        }
        let Some(found) = found else { return Ok(None) };
        let last = self
            .last(found.version.0, |n| layout::catalog_version(keyspace, CatalogVersion(n)))
            .await?;
        if last == found.version.0 {
            return Ok(Some(found));
        }
        self.version(keyspace, CatalogVersion(last)).await
    }

    /// Returns the same from a hint that a listing gave, ignoring foreign objects under higher
    /// numbers.
    pub(crate) async fn tip_before_unreadable(
        &self,
        keyspace: KeyspaceId,
        listed: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        match self.tip(keyspace, listed).await {
            Err(error) if error.is_of_one_object() => self.tip(keyspace, CatalogVersion(1)).await,
            found => found,
        }
    }

    /// Creates the version; the nonce decides whether an existing object is the caller's.
    pub(super) async fn claim(&self, catalog: &Catalog) -> Result<CatalogWrite, CatalogError> {
        let claimed = self.claim_or_find(catalog, encode_catalog(catalog)).await;
        claimed.map(|(written, _)| written)
    }

    /// Does the same as [`Self::claim`] with this body, and returns true when the version was
    /// not there before this call.
    async fn claim_or_find(
        &self,
        catalog: &Catalog,
        body: Bytes,
    ) -> Result<(CatalogWrite, bool), CatalogError> {
        let key = layout::catalog_version(catalog.keyspace, catalog.version);
        let (created, is_new) = self.bucket.create_or_find(&key, body).await?;
        let Create::Exists(existing) = created else { return Ok((CatalogWrite::Won, is_new)) };
        let existing = read_catalog(&key, &existing, catalog.keyspace, catalog.version)?;
        let ours = existing.nonce == catalog.nonce;
        let written = if ours { CatalogWrite::Won } else { CatalogWrite::Lost(Box::new(existing)) };
        Ok((written, false))
    }

    /// Creates a document; `None` when the caller's bytes are there, else the bytes found instead.
    pub(super) async fn create<T: Serialize>(
        &self,
        key: &str,
        kind: &'static str,
        body: &T,
    ) -> Result<Option<Bytes>, CatalogError> {
        Ok(match self.bucket.create(key, envelope::encode(kind, body)).await? {
            Create::Created => None,
            Create::Exists(existing) => Some(existing),
        })
    }

    /// Checks the bytes of a version under its key.
    pub(crate) fn decode_version(key: &str, bytes: &[u8]) -> Result<Catalog, CatalogError> {
        let misplaced = || CatalogError::Misplaced {
            key: key.to_owned(),
            found: "no version of a catalog".into(),
        };
        let (keyspace, version) = layout::parse_catalog_version(key).ok_or_else(misplaced)?;
        read_catalog(key, bytes, keyspace, version)
    }

    /// Returns the greatest number that exists, given that all up to `from` do: doubling steps up,
    /// then halving steps back. Sends one request when `from` is the last.
    pub(super) async fn last(
        &self,
        from: u64,
        key: impl Fn(u64) -> String,
    ) -> Result<u64, CatalogError> {
        let (mut last, mut step) = (from, 1u64);
        // No number exists beyond the range of `u64`.
        let there = async |last: u64, step: u64| match last.checked_add(step) {
            Some(n) => Ok::<_, CatalogError>(self.bucket.head(&key(n)).await?.is_some()),
            None => Ok(false),
        };
        while there(last, step).await? {
            last += step;
            step = step.saturating_mul(2);
        }
        while step > 1 {
            step /= 2;
            if there(last, step).await? {
                last += step;
            }
        }
        Ok(last)
    }
}

pub(super) fn decode<T: serde::de::DeserializeOwned>(
    kind: &'static str,
    key: &str,
    bytes: &[u8],
) -> Result<T, CatalogError> {
    envelope::decode(kind, bytes)
        .map_err(|source| CatalogError::Document { key: key.to_owned(), source })
}

pub(super) fn read_catalog(
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

/// Encodes one version as an object.
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
