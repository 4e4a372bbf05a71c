//! A version that follows another one, written by a program that may not know all of its fields.
//!
//! **Invariant:** what a version in the bucket has and this program does not know is in the next
//! version, too: a node may be older than the master that wrote it.

use serde_json::Value;
use vasto_core::catalog::Catalog;
use vasto_core::{CatalogVersion, KeyspaceId};

use super::error::CatalogError;
use super::store::{CATALOG, CatalogStore, CatalogWrite, decode, read_catalog};
use crate::{envelope, layout};

/// A version as it stands in the bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredCatalog {
    catalog: Catalog,
    body: Value,
}

impl StoredCatalog {
    /// Returns the version.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Returns the document of the next version: `next`, and what only the stored one has.
    fn followed_by(&self, next: &Catalog) -> Value {
        carried(self.body.clone(), &document(&self.catalog), document(next))
    }
}

impl CatalogStore {
    /// Reads one version with all of its fields; `None` when it has not been written.
    ///
    /// # Errors
    /// When the bucket fails or the object cannot be read.
    pub async fn stored(
        &self,
        keyspace: KeyspaceId,
        version: CatalogVersion,
    ) -> Result<Option<StoredCatalog>, CatalogError> {
        let key = layout::catalog_version(keyspace, version);
        let Some(bytes) = self.bucket().get(&key).await? else { return Ok(None) };
        let catalog = read_catalog(&key, &bytes, keyspace, version)?;
        Ok(Some(StoredCatalog { catalog, body: decode(CATALOG, &key, &bytes)? }))
    }

    /// Returns the last version, when it is a later one than this one, which exists. Sends one
    /// request when there is none.
    ///
    /// # Errors
    /// When the bucket fails or the object cannot be read.
    pub async fn later_than(&self, known: &Catalog) -> Result<Option<Catalog>, CatalogError> {
        let keyspace = known.keyspace;
        let key = |n| layout::catalog_version(keyspace, CatalogVersion(n));
        let last = self.last(known.version.0, key).await?;
        match last == known.version.0 {
            true => Ok(None),
            false => self.version(keyspace, CatalogVersion(last)).await,
        }
    }

    /// Writes the version behind a stored one, as [`CatalogStore::write`] does.
    ///
    /// # Errors
    /// After an error the outcome is unknown: find the tip and compare its nonce.
    pub async fn write_behind(
        &self,
        stored: &StoredCatalog,
        next: &Catalog,
    ) -> Result<CatalogWrite, CatalogError> {
        self.write_body(next, envelope::encode(CATALOG, &stored.followed_by(next))).await
    }
}

fn document(catalog: &Catalog) -> Value {
    serde_json::to_value(catalog).expect("a catalog has only string keys and finite numbers")
}

/// Returns `after` with everything that `stored` has and `before`, which was read from it, has not.
fn carried(stored: Value, before: &Value, after: Value) -> Value {
    if *before == after {
        return stored;
    }
    match (stored, before, after) {
        (Value::Object(stored), Value::Object(before), Value::Object(mut after)) => {
            for (name, value) in stored {
                match (before.get(&name), after.remove(&name)) {
                    (Some(was), Some(is)) => drop(after.insert(name, carried(value, was, is))),
                    (None, Some(is)) => drop(after.insert(name, is)),
                    (None, None) => drop(after.insert(name, value)),
                    // A field that the next version has no more.
                    (Some(_), None) => {}
                }
            }
            Value::Object(after)
        }
        (_, _, after) => after,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use vasto_core::catalog::KeyspaceSpec;
    use vasto_core::ids::NodeId;
    use vasto_core::plan::Step;
    use vasto_core::reconcile::{start_resize, undo_undecided};

    fn sealing() -> Catalog {
        let nodes = [vec![NodeId(1)]];
        let spec = KeyspaceSpec::default();
        let first = Catalog::first(KeyspaceId(1), "ks1", spec, &nodes, 1_000, u64::MAX);
        let mut next = start_resize(&first, 2, &nodes, 2_000, u64::MAX - 1).unwrap();
        next.plan.as_mut().unwrap().step = Step::Sealing;
        next
    }

    #[test]
    fn what_a_newer_master_wrote_is_in_the_next_version_too() {
        let catalog = sealing();
        let mut body = document(&catalog);
        body["paused_by"] = json!({"who": "operator", "at": 7});
        body["plan"]["rate"] = json!(1.5);
        body["plan"]["sources"][0]["weight"] = json!([1, 2]);
        body["placement"][0]["cold"] = json!(null);
        body["quarantines"] = json!([]);
        let read: Catalog = serde_json::from_value(body.clone()).unwrap();
        assert_eq!(read, catalog, "this program knows none of these fields");
        let stored = StoredCatalog { catalog: read, body: body.clone() };
        let sealing = (catalog.plan.as_ref().unwrap().id, catalog.version);
        let undone = undo_undecided(&catalog, sealing, Default::default(), 77).unwrap();
        let written = stored.followed_by(&undone);
        assert_eq!(serde_json::from_value::<Catalog>(written.clone()).unwrap(), undone);
        let mut wanted = body;
        wanted["version"] = json!(undone.version);
        wanted["nonce"] = json!(77);
        wanted["plan"]["step"] = json!("tail");
        wanted["plan"]["seals_undone"] = json!(1);
        assert_eq!(written, wanted, "and nothing else differs");
    }

    #[test]
    fn fields_that_come_and_go_are_those_of_the_next_version() {
        let case = |stored: Value, before: Value, after: Value| carried(stored, &before, after);
        assert_eq!(
            case(json!({"a": 1, "x": 9}), json!({"a": 1}), json!({"b": 2})),
            json!({"b": 2, "x": 9})
        );
        assert_eq!(
            case(json!({"a": [1, 2]}), json!({"a": [1, 2]}), json!({"a": [2]})),
            json!({"a": [2]})
        );
        // A field with its default that is not written out.
        assert_eq!(
            case(json!({"a": 0, "b": 1}), json!({"b": 1}), json!({"a": 5, "b": 1})),
            json!({"a": 5, "b": 1})
        );
    }
}
