//! The bucket: check, garbage collection on command, and the repair, which writes objects that the
//! bucket has lost and the nodes still know.
//!
//! **Invariants**
//! - No existing object is changed: the repair writes only objects that were missing. The only
//!   object that it may delete is the claim of a cluster without keyspaces, made when the prefix
//!   was found empty.
//! - Catalogs that the nodes name are written only when all nodes that may know newer versions were
//!   asked, unless a loss was accepted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::limits::ADMIN_DEADLINE;
use vasto_proto::v1;
use vasto_shipping::{CatalogError, ClusterSettings, layout};

use super::answer::{Answer, refused};
use super::ask;
use crate::cluster::Cluster;
use crate::driver::adopt;
use crate::upkeep;
use crate::view::json;
use crate::view::outcome::RepairedDoc;

/// How long nodes have to come back and report what they hold.
const NODES_WAIT: Duration = Duration::from_secs(10);
/// The interval at which that is checked.
const POLL: Duration = Duration::from_millis(50);

fn not_now(error: &impl std::fmt::Display) -> VastoError {
    VastoError::new(
        ErrorCode::Unavailable,
        format!("the bucket cannot be repaired now: {error}; try again"),
    )
}

/// Checks for missing, damaged and orphaned objects; the cluster status shows the findings.
pub(crate) async fn check(cluster: &Cluster, deep: bool) -> Answer {
    let fsck = upkeep::check(cluster, deep).await?;
    cluster.note_findings(upkeep::findings(&fsck));
    Ok(json(&fsck))
}

/// Deletes objects that are not needed, or only lists them.
pub(crate) async fn collect(cluster: &Cluster, dry_run: bool) -> Answer {
    Ok(json(&upkeep::collect(cluster, dry_run).await?))
}

/// Asks the nodes for their catalogs, and writes those that are missing.
pub(crate) async fn repair(cluster: &Arc<Cluster>, accept_loss: bool) -> Answer {
    take_in_the_refused(cluster).await?;
    let (remembered, cluster_id) = ask_the_nodes(cluster).await?;
    let here: BTreeSet<NodeId> = live(cluster);
    let placed = remembered.values().filter(|catalog| catalog.state == KeyspaceState::Active);
    let placed = placed.flat_map(|catalog| &catalog.placement).flat_map(|shard| &shard.replicas);
    let away: BTreeSet<NodeId> =
        placed.map(|placed| placed.node).filter(|node| !here.contains(node)).collect();
    let lacking = cluster.is_restricted() || lacks_any(cluster, &remembered).await?;
    if lacking && !away.is_empty() && !accept_loss {
        let names: Vec<String> = away.iter().map(NodeId::to_string).collect();
        return Err(refused(format!(
            "{} may know newer versions of a catalog; start them first, or go on without what they know with \
             `vasto bucket repair --accept-loss`",
            names.join(", ")
        )));
    }
    let mut done = RepairedDoc {
        cluster_id: cluster_id.clone(),
        away: away.into_iter().collect(),
        ..RepairedDoc::default()
    };
    put_back(cluster, &remembered, &mut done).await?;
    load_anew(cluster, cluster_id, &mut done).await?;
    all_have_reported(cluster, &here).await;
    ship_what_is_missing(cluster, &mut done).await?;
    done.keyspaces =
        cluster.state().active().map(|keyspace| keyspace.catalog.name.clone()).collect();
    tracing::info!(
        cluster = done.cluster_id,
        written = done.written,
        missing = done.missing.len(),
        "repaired the bucket"
    );
    Ok(json(&done))
}

/// Writes the claim and the catalogs that the bucket has lost.
async fn put_back(
    cluster: &Cluster,
    remembered: &BTreeMap<KeyspaceId, Catalog>,
    done: &mut RepairedDoc,
) -> Result<(), VastoError> {
    done.claimed =
        cluster.store.claim_again(&done.cluster_id).await.map_err(|error| not_now(&error))?;
    for catalog in remembered.values() {
        match cluster.store.put_back(catalog).await {
            Ok(written) => done.written += written,
            Err(error @ CatalogError::NameTaken(_)) => {
                done.warnings.push(format!(
                    "the name of keyspace {} is not put back: {error}",
                    catalog.keyspace
                ));
            }
            Err(error) => return Err(not_now(&error)),
        }
    }
    Ok(())
}

/// Loads the bucket as at the start of a master, which serves again afterwards.
async fn load_anew(
    cluster: &Arc<Cluster>,
    cluster_id: String,
    done: &mut RepairedDoc,
) -> Result<(), VastoError> {
    // Names of objects that were used are never used again.
    let shipped = cluster.bucket.list("data/").await.map_err(|error| not_now(&error))?;
    let owners =
        shipped.iter().filter_map(|object| Some(layout::parse_shipped(&object.key)?.0.keyspace));
    let owners: BTreeSet<KeyspaceId> = owners.collect();
    owners.iter().for_each(|keyspace| cluster.store.note_used(*keyspace));
    let (catalogs, odd) =
        cluster.store.load_all_with_warnings().await.map_err(|error| not_now(&error))?;
    let loaded: BTreeSet<KeyspaceId> = catalogs.iter().map(|catalog| catalog.keyspace).collect();
    done.unknown_keyspaces = owners.difference(&loaded).copied().collect();
    let decided = cluster
        .store
        .settings(&ClusterSettings::default())
        .await
        .map_err(|error| not_now(&error))?;
    cluster.learn_settings(decided);
    let was_restricted = cluster.is_restricted();
    cluster.note_odd_catalogs(odd);
    cluster.owned_by(cluster_id);
    for catalog in catalogs {
        adopt(cluster, catalog);
    }
    if was_restricted {
        // The nodes have reported their replicas to a master that knew no catalog.
        cluster.state().begin_sessions_anew();
    }
    Ok(())
}

fn live(cluster: &Cluster) -> BTreeSet<NodeId> {
    cluster.state().live().map(|(id, _)| id).collect()
}

/// Takes in the refused nodes: the next master claims an emptied prefix anew, and refuses the
/// prefix's own nodes. While there is no keyspace in it, the refused nodes are trusted.
async fn take_in_the_refused(cluster: &Arc<Cluster>) -> Result<(), VastoError> {
    let refused = cluster.refused();
    if refused.is_empty() || cluster.is_restricted() || !cluster.state().keyspaces.is_empty() {
        return Ok(());
    }
    cluster.restrict("nodes of another cluster say that this prefix was theirs".into());
    let came = async {
        while !refused.keys().all(|node| live(cluster).contains(node)) {
            tokio::time::sleep(POLL).await;
        }
    };
    // Nodes that do not come are missed where their catalogs name them.
    let _ = timeout(NODES_WAIT, came).await;
    Ok(())
}

/// Returns the last version of each keyspace that any node knows, and the cluster that all nodes
/// name.
async fn ask_the_nodes(
    cluster: &Arc<Cluster>,
) -> Result<(BTreeMap<KeyspaceId, Catalog>, String), VastoError> {
    let mut waiting = Vec::new();
    let mut ids = BTreeSet::new();
    {
        let mut state = cluster.state();
        let nodes: Vec<(NodeId, String)> =
            state.live().map(|(id, node)| (id, node.cluster_id.clone())).collect();
        for (node, cluster_id) in nodes {
            // A new node knows nothing, and named no cluster.
            ids.extend(Some(cluster_id).filter(|id| !id.is_empty()));
            if let Some(done) = state.command(node, v1::command::Kind::Catalogs, KeyspaceId(0)) {
                waiting.push((node, done));
            }
        }
    }
    if !cluster.is_restricted() {
        ids.insert(cluster.cluster_id());
    }
    let cluster_id = match (ids.pop_first(), ids.pop_first()) {
        (Some(id), None) => id,
        (None, _) => return Err(refused("no node of the cluster is here; start the nodes first")),
        (Some(first), Some(second)) => {
            let message = format!(
                "there are nodes of clusters {first} and {second}; stop those that do not belong here"
            );
            return Err(refused(message));
        }
    };
    let mut newest: BTreeMap<KeyspaceId, Catalog> = BTreeMap::new();
    for (node, done) in waiting {
        let catalogs = match timeout(ADMIN_DEADLINE, done).await {
            Ok(Ok(Ok(catalogs))) => catalogs,
            Ok(Ok(Err(reason))) => {
                return Err(refused(format!(
                    "{node} cannot say what it remembers: {reason}; restart it, then try again"
                )));
            }
            Ok(Err(_)) | Err(_) => {
                return Err(refused(format!(
                    "{node} was lost before it said what it remembers; try again when it is back"
                )));
            }
        };
        for json in catalogs {
            let catalog: Catalog = serde_json::from_str(&json).map_err(|error| {
                refused(format!("{node} remembers a catalog that cannot be read: {error}"))
            })?;
            if newest.get(&catalog.keyspace).is_none_or(|best| best.version < catalog.version) {
                newest.insert(catalog.keyspace, catalog);
            }
        }
    }
    Ok((newest, cluster_id))
}

/// Returns true when the bucket has lost a version that a node remembers.
async fn lacks_any(
    cluster: &Cluster,
    remembered: &BTreeMap<KeyspaceId, Catalog>,
) -> Result<bool, VastoError> {
    for catalog in remembered.values() {
        let key = layout::catalog_version(catalog.keyspace, catalog.version);
        if cluster.bucket.head(&key).await.map_err(|error| not_now(&error))?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Waits until these nodes are back and have reported what they hold.
async fn all_have_reported(cluster: &Cluster, nodes: &BTreeSet<NodeId>) {
    let reported = |cluster: &Cluster| {
        let state = cluster.state();
        state.active().all(|keyspace| {
            let placed = keyspace.catalog.placement.iter().flat_map(|shard| &shard.replicas);
            let mut of_these = placed.filter(|placed| nodes.contains(&placed.node));
            of_these.all(|placed| keyspace.reports.contains_key(&placed.replica))
        })
    };
    let all = async {
        while !(nodes.is_subset(&live(cluster)) && reported(cluster)) {
            tokio::time::sleep(POLL).await;
        }
    };
    if timeout(NODES_WAIT, all).await.is_err() {
        tracing::warn!("not every node has come back; what it holds is not looked for");
    }
}

/// Has every keyspace upload its data again that lacks some of it, then checks once more.
async fn ship_what_is_missing(
    cluster: &Arc<Cluster>,
    done: &mut RepairedDoc,
) -> Result<(), VastoError> {
    let mut fsck = upkeep::check(cluster, false).await?;
    let broken = fsck.missing.iter().chain(&fsck.corrupt);
    let broken: BTreeSet<KeyspaceId> =
        broken.filter_map(|key| Some(layout::parse_shipped(key)?.0.keyspace)).collect();
    let names: Vec<String> = {
        let state = cluster.state();
        broken
            .iter()
            .filter_map(|id| state.keyspaces.get(id))
            .map(|keyspace| keyspace.catalog.name.clone())
            .collect()
    };
    for name in &names {
        match ask::command(cluster, name, v1::command::Kind::ShipAnew).await {
            Ok(_) => done.shipped_anew.push(name.clone()),
            Err(error) => done
                .warnings
                .push(format!("keyspace {name} was not uploaded again: {}", error.message)),
        }
    }
    if !names.is_empty() {
        fsck = upkeep::check(cluster, false).await?;
    }
    cluster.note_findings(upkeep::findings(&fsck));
    done.warnings.extend(fsck.warnings);
    (done.missing, done.corrupt) = (fsck.missing, fsck.corrupt);
    Ok(())
}
