//! Exports: which of them a plan needs, and the tables that a running plan counts on.
//!
//! **Invariant:** an export is needed by its own plan alone, and no later plan has the id of one
//! that has ended. In doubt it is needed.

use std::collections::BTreeSet;

use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{KeyspaceId, PlanId};

use super::survey::{Found, Survey, read};
use crate::bucket::{Bucket, BucketError};
use crate::export::ExportManifest;

/// Returns true when a plan needs what it exported, or may: it runs, it began after the survey had
/// read the catalog, or the catalog is not known.
pub(super) fn is_needed(survey: &Survey, keyspace: KeyspaceId, plan: PlanId) -> bool {
    let Some(catalog) = survey.catalogs.get(&keyspace) else { return true };
    catalog.state == KeyspaceState::Active
        && (plan >= catalog.next_plan
            || catalog.plan.as_ref().is_some_and(|running| running.id == plan))
}

/// The exports that running plans name.
#[derive(Debug, Default)]
pub(super) struct NamedExports {
    /// The manifests that can be read.
    pub(super) manifests: Vec<ExportManifest>,
    /// Keys of the manifests that are not there.
    pub(super) missing: Vec<String>,
    /// Keys of the manifests that cannot be read, or are other ones.
    pub(super) corrupt: Vec<String>,
}

/// Reads the export manifests that the surveyed running plans name.
pub(super) async fn named_by_plans(
    bucket: &Bucket,
    survey: &Survey,
) -> Result<NamedExports, BucketError> {
    let mut named = NamedExports::default();
    let keys: Vec<(&Catalog, &String)> = survey
        .catalogs
        .values()
        .filter(|catalog| catalog.state == KeyspaceState::Active)
        .flat_map(|catalog| catalog.plan.iter().map(move |plan| (catalog, plan)))
        .flat_map(|(catalog, plan)| plan.sources.iter().map(move |source| (catalog, source)))
        .filter_map(|(catalog, source)| Some((catalog, source.export.as_ref()?)))
        .collect();
    if keys.is_empty() {
        return Ok(named);
    }
    let listed: BTreeSet<&str> = survey.objects.iter().map(|object| object.key.as_str()).collect();
    for (catalog, key) in keys {
        if !listed.contains(key.as_str()) {
            named.missing.push(key.clone());
            continue;
        }
        let manifest = match read(bucket, key).await? {
            Found::Gone => continue, // the plan has ended, and the export was collected meanwhile
            Found::Bytes(bytes) => ExportManifest::decode(&bytes).ok(),
            Found::Unreadable => None,
        };
        let is_of_the_plan = |manifest: &ExportManifest| {
            let plan = catalog.plan.as_ref().map(|plan| plan.id);
            manifest.is_at(key)
                && (manifest.keyspace, Some(manifest.plan)) == (catalog.keyspace, plan)
        };
        match manifest.filter(is_of_the_plan) {
            Some(manifest) => named.manifests.push(manifest),
            None => named.corrupt.push(key.clone()),
        }
    }
    Ok(named)
}
