//! All keyspaces of a cluster: reading them at start-up, creating one, and restoring what the
//! bucket has lost of one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use futures::{StreamExt, TryStreamExt};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::limits::check_keyspace_name;
use vasto_core::{CatalogVersion, KeyspaceId};

use super::error::CatalogError;
use super::store::{CatalogStore, CatalogWrite};
use crate::layout;

/// Keyspaces that [`CatalogStore::load_all`] reads at once: of 1,000 keyspaces at 30 ms a request, two
/// requests for each take a second.
const LOADS_IN_FLIGHT: usize = 64;
/// Versions that [`CatalogStore::put_back`] writes at once.
const WRITES_IN_FLIGHT: usize = 16;

impl CatalogStore {
    /// Returns the tips (newest versions) of all keyspaces, in the order of their ids. For start-up
    /// only: it lists. The list is only a hint: each tip, and the highest keyspace id, are looked
    /// for from there on, number by number.
    ///
    /// An active keyspace whose name is not bound to it is left out: [`Self::create_keyspace`]
    /// ended between its two steps. Deleted keyspaces are included: nodes may still hold their
    /// replicas. An unreadable keyspace is logged and left out, unless a newer release wrote it;
    /// the others still load.
    pub async fn load_all(&self) -> Result<Vec<Catalog>, CatalogError> {
        Ok(self.load_all_with_warnings().await?.0)
    }

    /// Returns the same, with a warning for each unreadable keyspace that was left out.
    pub async fn load_all_with_warnings(
        &self,
    ) -> Result<(Vec<Catalog>, Vec<String>), CatalogError> {
        let mut hints = BTreeMap::<KeyspaceId, CatalogVersion>::new();
        for object in self.bucket().list(&layout::catalog_prefix()).await? {
            if let Some((keyspace, version)) = layout::parse_catalog_version(&object.key) {
                let hint = hints.entry(keyspace).or_default();
                *hint = (*hint).max(version);
            }
        }
        let listed = hints.last_key_value().map_or(0, |(keyspace, _)| keyspace.0);
        for id in listed.saturating_add(1)..=self.last(listed, first_version).await? {
            hints.entry(KeyspaceId(id)).or_insert(CatalogVersion(1));
        }
        let found: Vec<(KeyspaceId, Result<Option<Catalog>, CatalogError>)> =
            futures::stream::iter(hints)
                .map(|(keyspace, hint)| {
                    let store = self.clone();
                    async move { (keyspace, store.load_one(keyspace, hint).await) }
                })
                .buffered(LOADS_IN_FLIGHT)
                .collect()
                .await;
        let (mut catalogs, mut warnings) = (Vec::new(), Vec::new());
        for (keyspace, loaded) in found {
            match loaded {
                Ok(catalog) => {
                    self.note_used(
                        catalog.as_ref().map_or(KeyspaceId(0), |catalog| catalog.keyspace),
                    );
                    catalogs.extend(catalog);
                }
                Err(error) if error.is_of_one_object() => {
                    let text = format!(
                        "keyspace {keyspace} is left out, because its catalog cannot be read: {error}"
                    );
                    tracing::warn!(%keyspace, %error, "a keyspace is left out, because its catalog cannot be read");
                    warnings.push(text);
                }
                Err(error) => return Err(error),
            }
        }
        Ok((catalogs, warnings))
    }

    async fn load_one(
        self,
        keyspace: KeyspaceId,
        hint: CatalogVersion,
    ) -> Result<Option<Catalog>, CatalogError> {
        let Some(catalog) = self.tip_before_unreadable(keyspace, hint).await? else {
            return Ok(None);
        };
        // From version 2 on the name had been bound; should the binding have been deleted since, the
        // keyspace exists all the same.
        if catalog.state != KeyspaceState::Active || catalog.version > CatalogVersion(1) {
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
        if !bound {
            tracing::info!(%keyspace, name = catalog.name, "ignored: the name was never bound to this keyspace");
            return Ok(None);
        }
        Ok(Some(catalog))
    }

    /// Creates a keyspace: claims the next free id with version 1 of `build(id)`, then the name.
    ///
    /// A crash between the two leaves an id whose name was never bound: [`Self::load_all`] ignores
    /// it, the id stays used up, and the name stays free. `build` may be called several times, and
    /// must draw a new nonce in each process.
    ///
    /// # Errors
    /// `BadName`; `NameTaken` when a live keyspace has the name, also when it is the caller's own
    /// from an earlier call that ended in an error.
    pub async fn create_keyspace(
        &self,
        build: impl Fn(KeyspaceId) -> Catalog,
    ) -> Result<Catalog, CatalogError> {
        let name = build(KeyspaceId(1)).name;
        check_keyspace_name(&name)?;
        self.free_name_version(&name).await?;
        let mut id =
            self.last(self.used.load(Ordering::Acquire), first_version).await?.saturating_add(1);
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
        // Another writer took the number that was free under the name: the next one is tried.
        while !self.bind_name(&name, catalog.keyspace).await? {}
        Ok(catalog)
    }

    /// Restores what the bucket has lost of a keyspace, given the last version that any node
    /// remembers: the versions before it (of which only the numbers are left: each repeats the
    /// remembered version, without its plan), then that version, then the name. Returns the number
    /// of objects written.
    ///
    /// # Errors
    /// `NameTaken` when the name is bound to another live keyspace.
    pub async fn put_back(&self, remembered: &Catalog) -> Result<u64, CatalogError> {
        let keyspace = remembered.keyspace;
        self.note_used(keyspace);
        let folder = format!("{}{:020}/", layout::catalog_prefix(), keyspace.0);
        let listed = self.bucket().list(&folder).await?;
        let present: BTreeSet<CatalogVersion> = listed
            .iter()
            .filter_map(|object| Some(layout::parse_catalog_version(&object.key)?.1))
            .collect();
        let write = async |catalog: &Catalog| {
            let claimed = self.claim(catalog).await?;
            Ok::<_, CatalogError>(u64::from(matches!(claimed, CatalogWrite::Won)))
        };
        let earlier = (1..remembered.version.0)
            .map(CatalogVersion)
            .filter(|version| !present.contains(version))
            .map(|version| {
                let nonce = rand::random();
                Catalog { version, plan: None, nonce, ..remembered.clone() }
            });
        let written = futures::stream::iter(earlier).map(async |catalog| write(&catalog).await);
        let written = written.buffer_unordered(WRITES_IN_FLIGHT);
        let mut count = written.try_fold(0, async |all, new| Ok(all + new)).await?;
        // Last, after all others are there: a tip is found only by numbers without a gap.
        if !present.contains(&remembered.version) {
            count += write(remembered).await?;
        }
        let hint = present.last().copied().unwrap_or_default().max(remembered.version);
        let Some(tip) = self.tip(keyspace, hint).await? else { return Ok(count) };
        if tip.state == KeyspaceState::Active && !self.is_bound(&tip).await? {
            count += u64::from(self.bind_name(&tip.name, keyspace).await?);
        }
        Ok(count)
    }
}

fn first_version(id: u64) -> String {
    layout::catalog_version(KeyspaceId(id), CatalogVersion(1))
}
