//! Keyspace names: numbered create-only bindings, of which the last is in force.
//!
//! **Invariant:** a name is bound to one live keyspace at most.

use serde::{Deserialize, Serialize};
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::limits::check_keyspace_name;
use vasto_core::{CatalogVersion, KeyspaceId};

use super::error::CatalogError;
use super::store::{CatalogStore, decode};
use crate::layout;

const NAME: &str = "name";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct NameBinding {
    keyspace_id: KeyspaceId,
    deleted: bool,
}

impl CatalogStore {
    /// Returns true when the name is bound to the keyspace; it is not when its creation was cut off
    /// or is under way.
    pub(crate) async fn is_bound(&self, catalog: &Catalog) -> Result<bool, CatalogError> {
        let bound = self.name_tip(&catalog.name).await?;
        Ok(bound.is_some_and(|(_, bound)| bound.keyspace_id == catalog.keyspace && !bound.deleted))
    }

    /// Binds the name to the keyspace; returns false when another binding was written first.
    ///
    /// # Errors
    /// `NameTaken` when the name is bound to a live keyspace.
    pub(super) async fn bind_name(
        &self,
        name: &str,
        keyspace_id: KeyspaceId,
    ) -> Result<bool, CatalogError> {
        let n = self.free_name_version(name).await?;
        let binding = NameBinding { keyspace_id, deleted: false };
        Ok(self.create(&layout::name_version(name, n), NAME, &binding).await?.is_none())
    }

    /// Frees the name of a deleted keyspace for reuse; does nothing when the name is not bound to
    /// it (any more).
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
    pub(super) async fn free_name_version(&self, name: &str) -> Result<u64, CatalogError> {
        let Some((n, bound)) = self.name_tip(name).await? else { return Ok(1) };
        if !bound.deleted {
            // A crash between the delete of a keyspace and the release of its name must not keep
            // the name taken.
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
        match self.bucket().get(&key).await? {
            Some(bytes) => Ok(Some((last, decode(NAME, &key, &bytes)?))),
            None => Ok(None),
        }
    }
}
