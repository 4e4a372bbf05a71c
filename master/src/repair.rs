//! The repair of the bucket: writes objects that it has lost and the nodes still know.
//!
//! **Invariants**
//! - No existing object is changed: the repair writes only objects that were missing. The only object that
//!   it may delete is the claim of a cluster without keyspaces, made when the prefix was found empty.
//! - Catalogs that the nodes name are written only when all nodes that may know newer versions were asked,
//!   unless a loss was accepted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_core::limits::ADMIN_DEADLINE;
use vasto_proto::v1;
use vasto_shipping::{ClusterSettings, layout};

use crate::cluster::Cluster;
use crate::{document, upkeep};

/// How long nodes have to come back and report what they hold.
const NODES_WAIT: Duration = Duration::from_secs(10);
/// The interval at which that is checked.
const LOOK: Duration = Duration::from_millis(50);

/// The result of a repair, and what is still missing.
#[derive(Debug, Default, Serialize)]
struct Repaired {
    cluster_id: String,
    /// `cluster.json` was written again.
    claimed: bool,
    /// Versions of catalogs, and names, that were written again.
    written: u64,
    /// Keyspaces that serve.
    keyspaces: Vec<String>,
    /// Keyspaces whose data was uploaded again.
    shipped_anew: Vec<String>,
    /// Keyspaces that have objects in the bucket, and of which nothing else is known.
    unknown_keyspaces: Vec<KeyspaceId>,
    /// Nodes that hold replicas and were not asked.
    away: Vec<NodeId>,
    missing: Vec<String>,
    corrupt: Vec<String>,
    warnings: Vec<String>,
}

fn refuse(message: impl Into<String>) -> VastoError {
    VastoError::new(ErrorCode::FailedPrecondition, message.into())
}

fn unavailable(error: &impl std::fmt::Display) -> VastoError {
    VastoError::new(ErrorCode::Unavailable, format!("the bucket cannot be repaired now: {error}; try again"))
}

/// Asks the nodes for their catalogs, and writes those that are missing.
pub(crate) async fn repair(cluster: &Arc<Cluster>, accept_loss: bool) -> Result<String, VastoError> {
    let mut done = Repaired::default();
    take_in_the_refused(cluster).await?;
    let (known, cluster_id) = ask_the_nodes(cluster).await?;
    let here: BTreeSet<NodeId> = live(cluster);
    let placed = known.values().filter(|catalog| catalog.state == KeyspaceState::Active);
    let placed = placed.flat_map(|catalog| &catalog.placement).flat_map(|shard| &shard.replicas);
    let away: BTreeSet<NodeId> = placed.map(|one| one.node).filter(|node| !here.contains(node)).collect();
    let lacking = cluster.is_lost() || lacks_any(cluster, &known).await?;
    if lacking && !away.is_empty() && !accept_loss {
        let names: Vec<String> = away.iter().map(NodeId::to_string).collect();
        return Err(refuse(format!(
            "{} may know newer versions of a catalog; start them first, or go on without what they know with \
             `vasto bucket repair --accept-loss`",
            names.join(", ")
        )));
    }
    done.away = away.into_iter().collect();
    done.claimed = cluster.store.claim_again(&cluster_id).await.map_err(|error| unavailable(&error))?;
    for catalog in known.values() {
        match cluster.store.put_back(catalog).await {
            Ok(written) => done.written += written,
            Err(error @ vasto_shipping::CatalogError::NameTaken(_)) => {
                done.warnings.push(format!("the name of keyspace {} is not put back: {error}", catalog.keyspace));
            }
            Err(error) => return Err(unavailable(&error)),
        }
    }
    // Names of objects that were used are never used again.
    let shipped = cluster.bucket.list("data/").await.map_err(|error| unavailable(&error))?;
    let owners = shipped.iter().filter_map(|object| Some(layout::parse_shipped(&object.key)?.0.keyspace));
    let owners: BTreeSet<KeyspaceId> = owners.collect();
    owners.iter().for_each(|keyspace| cluster.store.note_used(*keyspace));
    let (catalogs, odd) = cluster.store.load_all_told().await.map_err(|error| unavailable(&error))?;
    let loaded: BTreeSet<KeyspaceId> = catalogs.iter().map(|catalog| catalog.keyspace).collect();
    done.unknown_keyspaces = owners.difference(&loaded).copied().collect();
    done.cluster_id = cluster_id.clone();
    let decided = cluster.store.settings(&ClusterSettings::default()).await.map_err(|error| unavailable(&error))?;
    cluster.learn_settings(decided);
    let was_lost = cluster.is_lost();
    cluster.note_odd_catalogs(odd);
    cluster.found(cluster_id);
    for catalog in catalogs {
        cluster.adopt(catalog);
    }
    if was_lost {
        // The nodes have reported their replicas to a master that knew no catalog.
        cluster.state().begin_sessions_anew();
    }
    all_have_reported(cluster, &here).await;
    ship_what_is_missing(cluster, &mut done).await?;
    done.keyspaces = cluster.state().active().map(|known| known.catalog.name.clone()).collect();
    tracing::info!(
        cluster = done.cluster_id,
        written = done.written,
        missing = done.missing.len(),
        "repaired the bucket"
    );
    Ok(document::json(&done))
}

fn live(cluster: &Cluster) -> BTreeSet<NodeId> {
    let state = cluster.state();
    state.nodes.iter().filter(|(_, node)| node.session.is_some()).map(|(id, _)| *id).collect()
}

/// Takes in the refused nodes: the next master claims an emptied prefix anew, and refuses the prefix's own
/// nodes. While there is no keyspace in it, the refused nodes are trusted.
async fn take_in_the_refused(cluster: &Arc<Cluster>) -> Result<(), VastoError> {
    let refused = cluster.refused();
    if refused.is_empty() || cluster.is_lost() || !cluster.state().keyspaces.is_empty() {
        return Ok(());
    }
    cluster.lose("nodes of another cluster say that this prefix was theirs".into());
    let came = async {
        while !refused.keys().all(|node| live(cluster).contains(node)) {
            tokio::time::sleep(LOOK).await;
        }
    };
    // Nodes that do not come are missed where their catalogs name them.
    let _ = timeout(NODES_WAIT, came).await;
    Ok(())
}

/// Returns the last version of each keyspace that any node knows, and the cluster that all nodes name.
async fn ask_the_nodes(cluster: &Arc<Cluster>) -> Result<(BTreeMap<KeyspaceId, Catalog>, String), VastoError> {
    let mut waiting = Vec::new();
    let mut ids = BTreeSet::new();
    {
        let mut state = cluster.state();
        let nodes: Vec<(NodeId, String)> = state
            .nodes
            .iter()
            .filter(|(_, node)| node.session.is_some())
            .map(|(id, node)| (*id, node.cluster_id.clone()))
            .collect();
        for (node, cluster_id) in nodes {
            // A new node knows nothing, and named no cluster.
            ids.extend(Some(cluster_id).filter(|id| !id.is_empty()));
            if let Some(done) = state.command(node, v1::command::Kind::Catalogs, KeyspaceId(0)) {
                waiting.push((node, done));
            }
        }
    }
    if !cluster.is_lost() {
        ids.insert(cluster.cluster_id());
    }
    let cluster_id = match (ids.pop_first(), ids.pop_first()) {
        (Some(id), None) => id,
        (None, _) => return Err(refuse("no node of the cluster is here; start the nodes first")),
        (Some(one), Some(other)) => {
            let message = format!("there are nodes of clusters {one} and {other}; stop those that do not belong here");
            return Err(refuse(message));
        }
    };
    let mut known: BTreeMap<KeyspaceId, Catalog> = BTreeMap::new();
    for (node, done) in waiting {
        let said = match timeout(ADMIN_DEADLINE, done).await {
            Ok(Ok(Ok(said))) => said,
            Ok(Ok(Err(reason))) => {
                return Err(refuse(format!(
                    "{node} cannot say what it remembers: {reason}; restart it, then try again"
                )));
            }
            Ok(Err(_)) | Err(_) => {
                return Err(refuse(format!(
                    "{node} was lost before it said what it remembers; try again when it is back"
                )));
            }
        };
        for json in said {
            let catalog: Catalog = serde_json::from_str(&json)
                .map_err(|error| refuse(format!("{node} remembers a catalog that cannot be read: {error}")))?;
            if known.get(&catalog.keyspace).is_none_or(|best| best.version < catalog.version) {
                known.insert(catalog.keyspace, catalog);
            }
        }
    }
    Ok((known, cluster_id))
}

/// Returns true when the bucket has lost a version that a node remembers.
async fn lacks_any(cluster: &Cluster, known: &BTreeMap<KeyspaceId, Catalog>) -> Result<bool, VastoError> {
    for catalog in known.values() {
        let key = layout::catalog_version(catalog.keyspace, catalog.version);
        if cluster.bucket.head(&key).await.map_err(|error| unavailable(&error))?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Waits until these nodes are back and have reported what they hold.
async fn all_have_reported(cluster: &Cluster, nodes: &BTreeSet<NodeId>) {
    let reported = |cluster: &Cluster| {
        let state = cluster.state();
        let mut placed = state.active().flat_map(|known| {
            let replicas = known.catalog.placement.iter().flat_map(|shard| &shard.replicas);
            replicas.filter(|one| nodes.contains(&one.node)).map(|one| known.reports.contains_key(&one.replica))
        });
        placed.all(|one| one)
    };
    let all = async {
        while !(nodes.is_subset(&live(cluster)) && reported(cluster)) {
            tokio::time::sleep(LOOK).await;
        }
    };
    if timeout(NODES_WAIT, all).await.is_err() {
        tracing::warn!("not every node has come back; what it holds is not looked for");
    }
}

/// Has every keyspace upload its data again that lacks some of it, then checks once more.
async fn ship_what_is_missing(cluster: &Arc<Cluster>, done: &mut Repaired) -> Result<(), VastoError> {
    let mut found = upkeep::look(cluster, false).await?;
    let broken = found.missing.iter().chain(&found.corrupt);
    let broken: BTreeSet<KeyspaceId> = broken.filter_map(|key| Some(layout::parse_shipped(key)?.0.keyspace)).collect();
    let names: Vec<String> = {
        let state = cluster.state();
        broken.iter().filter_map(|id| state.keyspaces.get(id)).map(|known| known.catalog.name.clone()).collect()
    };
    for name in &names {
        match crate::admin::command(cluster, name, v1::command::Kind::ShipAnew).await {
            Ok(_) => done.shipped_anew.push(name.clone()),
            Err(error) => done.warnings.push(format!("keyspace {name} was not uploaded again: {}", error.message)),
        }
    }
    if !names.is_empty() {
        found = upkeep::look(cluster, false).await?;
    }
    cluster.note_findings(upkeep::findings(&found));
    done.warnings.extend(found.warnings);
    (done.missing, done.corrupt) = (found.missing, found.corrupt);
    Ok(())
}
