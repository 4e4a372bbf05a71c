//! Requests that a call makes: the first catalog version of a keyspace goes to the bucket, a change
//! to its driver, a command to its nodes.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::oneshot;
use tokio::time::timeout;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::error::VastoError;
use vasto_core::ids::{KeyspaceId, NodeId};
use vasto_proto::v1;
use vasto_shipping::CatalogError;

use super::answer::{
    ANSWER_WITHIN, Answer, STOPPED_MEANWHILE, find, stopping, taken, too_busy, unavailable, unsure,
};
use crate::cluster::{Cluster, Held};
use crate::driver::adopt_all;
use crate::placement::place;
use crate::state::{CatalogChange, ChangeRequest};
use crate::view::json;
use crate::view::outcome::ExecutedDoc;

/// Keyspaces that are changed at once by a call that concerns many: each is a write to the bucket, and
/// the caller waits for all.
const CHANGES_AT_ONCE: usize = 32;

/// Chooses the nodes for the replicas of a new keyspace, and holds the places until the guard is
/// dropped.
pub(super) fn places(
    cluster: &Arc<Cluster>,
    shards: u32,
    replicas: u32,
) -> Result<(Vec<Vec<NodeId>>, Held), VastoError> {
    let mut state = cluster.state();
    let nodes = place(shards, replicas, &state.candidates(None))?;
    let hold = state.loads.hold(nodes.iter().flatten().map(|node| (*node, 0)), false);
    Ok((nodes, cluster.hold_places(hold)))
}

/// Writes the first version of a keyspace, under an id that the bucket has free; `what` says what
/// that is for.
pub(super) async fn first_version(
    cluster: &Arc<Cluster>,
    name: &str,
    what: &str,
    within: Duration,
    build: impl Fn(KeyspaceId) -> Catalog,
) -> Result<Catalog, VastoError> {
    match timeout(within, cluster.store.create_keyspace(build)).await {
        Ok(Ok(catalog)) => Ok(catalog),
        Ok(Err(CatalogError::NameTaken { .. })) => {
            adopt_all(cluster).await;
            Err(taken(name))
        }
        Ok(Err(cause)) => Err(unsure(what, &cause.to_string())),
        Err(_) => Err(unsure(what, "the bucket did not answer in time")),
    }
}

/// Sends a change to the keyspace's driver and waits for its version.
pub(crate) async fn change(
    cluster: &Arc<Cluster>,
    keyspace: KeyspaceId,
    change: CatalogChange,
) -> Result<Arc<Catalog>, VastoError> {
    let requests =
        cluster.state().keyspaces.get(&keyspace).map(|keyspace| keyspace.requests.clone());
    let requests = requests.ok_or_else(stopping)?;
    let (reply, answer) = oneshot::channel();
    let asked = async {
        requests.send(ChangeRequest { change, reply }).await.map_err(|_| stopping())?;
        // The driver may have begun to write.
        answer.await.map_err(|_| unsure("writing the catalog", STOPPED_MEANWHILE))?
    };
    timeout(ANSWER_WITHIN, asked)
        .await
        .unwrap_or_else(|_| Err(unsure("writing the catalog", "the bucket did not answer in time")))
}

/// Makes changes of several keyspaces as [`change`] does; the first error ends it, and what was begun
/// may take effect all the same. A keyspace that the change does not concern any more is no error.
pub(super) async fn change_all(
    cluster: &Arc<Cluster>,
    changes: Vec<(KeyspaceId, CatalogChange)>,
    concerns: impl Fn(&Catalog) -> bool,
) -> Result<(), VastoError> {
    let mut asked = Vec::with_capacity(changes.len());
    for (keyspace, wanted) in changes {
        asked.push(change_if(cluster, keyspace, wanted, &concerns));
    }
    let mut asked = futures::stream::iter(asked).buffer_unordered(CHANGES_AT_ONCE);
    while let Some(changed) = asked.next().await {
        changed?;
    }
    Ok(())
}

/// Makes a change as [`change`] does. An error is none when the change does not concern the keyspace
/// any more, or it was deleted.
pub(super) async fn change_if(
    cluster: &Arc<Cluster>,
    keyspace: KeyspaceId,
    wanted: CatalogChange,
    concerns: impl Fn(&Catalog) -> bool,
) -> Result<(), VastoError> {
    let Err(error) = change(cluster, keyspace, wanted).await else { return Ok(()) };
    let state = cluster.state();
    let catalog = state.keyspaces.get(&keyspace).map(|keyspace| &*keyspace.catalog);
    match catalog.is_some_and(|now| now.state == KeyspaceState::Active && concerns(now)) {
        true => Err(error),
        false => Ok(()),
    }
}

/// Sends a command to every node with replicas of a keyspace and waits for all of them, as long as
/// their sessions live.
pub(crate) async fn command(cluster: &Arc<Cluster>, name: &str, kind: v1::command::Kind) -> Answer {
    let waiting: Vec<(NodeId, _)> = {
        let mut state = cluster.state();
        let keyspace = find(&state, name)?;
        let id = keyspace.catalog.keyspace;
        let placed = keyspace.catalog.placement.iter().flat_map(|shard| &shard.replicas);
        let mut nodes: Vec<NodeId> = placed.map(|placed| placed.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let away: Vec<String> =
            nodes.iter().filter(|node| !state.is_live(**node)).map(NodeId::to_string).collect();
        if !away.is_empty() {
            let away = away.join(", ");
            return Err(unavailable(format!(
                "{away} of keyspace {name} is away; start it, then try again"
            )));
        }
        let mut send =
            |node| Ok((node, state.command(node, kind, id).ok_or_else(|| too_busy(node))?));
        nodes.into_iter().map(&mut send).collect::<Result<_, VastoError>>()?
    };
    let mut nodes = Vec::new();
    for (node, done) in waiting {
        match done.await {
            Ok(Ok(_)) => nodes.push(node),
            Ok(Err(reason)) => {
                return Err(unavailable(format!("{node} could not do it: {reason}")));
            }
            Err(_) => {
                let message =
                    format!("{node} was lost before it was done; try again when it is back");
                return Err(unavailable(message));
            }
        }
    }
    Ok(json(&ExecutedDoc { keyspace: name.to_owned(), nodes }))
}
