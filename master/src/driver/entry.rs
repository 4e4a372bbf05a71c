//! Installation of catalog versions that are in the bucket: written here, by another master, or
//! found at the start.
//!
//! **Invariant:** only [`install`] installs a catalog version, and it starts the only driver of a
//! keyspace.

use std::sync::Arc;

use vasto_core::catalog::Catalog;
use vasto_core::ids::{CatalogVersion, KeyspaceId};
use vasto_core::plan::Step;

use super::KeyspaceDriver;
use crate::cluster::Cluster;
use crate::state::{ClusterState, Delivery};

/// Installs a catalog version that is in the bucket, shows it as `delivery` says, and starts the
/// driver of a new keyspace. Returns false when a higher version is known already.
pub(crate) fn install(cluster: &Arc<Cluster>, catalog: Catalog, delivery: Delivery) -> bool {
    install_and_look(cluster, catalog, delivery, |_| ()).0
}

/// Installs a version as [`install`] does, and looks at the state before anybody installs another
/// one: of several drivers only the last sees that all have ended.
pub(super) fn install_and_look<T>(
    cluster: &Arc<Cluster>,
    catalog: Catalog,
    delivery: Delivery,
    look: impl FnOnce(&ClusterState) -> T,
) -> (bool, T) {
    let keyspace = catalog.keyspace;
    cluster.store.note_used(keyspace);
    let mut state = cluster.state();
    let (taken, requests) = state.install(catalog, delivery);
    let seen = look(&state);
    if let Some(requests) = requests {
        let wake = state.keyspaces[&keyspace].wake.clone();
        drop(state);
        cluster.tasks.spawn(KeyspaceDriver::new(cluster.clone(), keyspace, wake, requests).run());
    }
    (taken, seen)
}

/// Adopts a version that another master wrote, or that was found at the start.
pub(crate) fn adopt(cluster: &Arc<Cluster>, catalog: Catalog) -> bool {
    let sealing = catalog.plan.as_ref().is_some_and(|plan| plan.step == Step::Sealing);
    install(cluster, catalog, if sealing { Delivery::Hold } else { Delivery::Push })
}

/// Adopts what other masters have created; lists the bucket, so only when something is known to be
/// missing.
pub(crate) async fn adopt_all(cluster: &Arc<Cluster>) {
    if cluster.is_restricted() {
        return;
    }
    match cluster.store.load_all().await {
        Ok(catalogs) => {
            for catalog in catalogs {
                adopt(cluster, catalog);
            }
        }
        Err(error) => tracing::warn!(%error, "cannot read the catalogs of other masters"),
    }
}

/// Looks up a keyspace that a node knows and this master does not: another master created it.
pub(crate) fn look_up(cluster: &Arc<Cluster>, keyspace: KeyspaceId) {
    if cluster.is_restricted() {
        return; // the bucket is not trusted yet
    }
    if !cluster.may_look_up(keyspace) {
        return;
    }
    let handle = cluster.clone();
    cluster.tasks.spawn(async move {
        let tip = handle.store.tip(keyspace, CatalogVersion(1));
        match handle.shutdown.run_until_cancelled(tip).await {
            None => {}
            Some(Ok(Some(catalog))) => {
                tracing::info!(%keyspace, name = catalog.name, version = %catalog.version, "learned of a keyspace from a node");
                adopt(&handle, catalog);
            }
            Some(Ok(None)) => {
                tracing::warn!(%keyspace, "a node reports a keyspace that the bucket does not know")
            }
            Some(Err(error)) => tracing::warn!(%keyspace, %error, "cannot look for a keyspace that a node reports"),
        }
    });
}
