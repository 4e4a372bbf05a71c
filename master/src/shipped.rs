//! Shipping on command: checkpoints, and the log before a restore.
//!
//! **Invariant:** one live replica of each shard ships, whichever ships otherwise, and a shard without a live
//! replica is named. The command waits for a node as long as the node may still come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::error::{ErrorCode, VastoError};
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::plan::{Plan, PlanKind};
use vasto_core::reconcile::Presence;
use vasto_core::report::ReplicaReport;
use vasto_proto::v1::{self, command::Kind};

use crate::admin::find;
use crate::cluster::Cluster;
use crate::document;
use crate::state::{ClusterState, Done, Keyspace};

/// How long the nodes have to ship what they hold.
const SHIP_PATIENCE: Duration = Duration::from_secs(60);
/// The interval of checks whether a node has come.
const LOOK: Duration = Duration::from_millis(50);

/// Replicas that do not get the command.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Absent(BTreeMap<NodeId, Vec<(ShardId, ReplicaId)>>);

impl Absent {
    fn add(&mut self, shard: ShardId, one: Placed) {
        self.0.entry(one.node).or_default().push((shard, one.replica));
    }

    /// Returns the list for scripts and people.
    pub(crate) fn document(&self) -> Value {
        let one = |(node, replicas): (&NodeId, &Vec<(ShardId, ReplicaId)>)| {
            let shards: Vec<u32> = replicas.iter().map(|(shard, _)| shard.0).collect();
            json!({ "node_id": node.to_string(), "shards": shards })
        };
        Value::Array(self.0.iter().map(one).collect())
    }

    fn ids(&self) -> Vec<u64> {
        self.0.values().flatten().map(|(_, replica)| replica.0).collect()
    }
}

/// The replicas chosen to ship.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chosen {
    by_node: BTreeMap<NodeId, Vec<ReplicaId>>,
    absent: Absent,
    /// Shards without a live replica, with their nodes.
    lost: Vec<(ShardId, Vec<NodeId>)>,
}

impl Chosen {
    /// Chooses one replica of each shard: the preferred primary, else the acting primary, else any live replica.
    fn of(catalog: &Catalog, works: impl Fn(&Placed) -> bool) -> Self {
        let mut chosen = Self::default();
        for shard in &catalog.placement {
            let draining = catalog.draining.iter().filter(|one| one.shard == shard.shard);
            let draining = draining.map(|one| Placed { replica: one.replica, node: one.node });
            for one in shard.replicas.iter().copied().chain(draining).filter(|one| !works(one)) {
                chosen.absent.add(shard.shard, one);
            }
            let others = shard.primary().into_iter().chain(shard.replicas.iter().copied());
            match shard.shipper().into_iter().chain(others).find(|one| works(one)) {
                Some(one) => chosen.by_node.entry(one.node).or_default().push(one.replica),
                None => chosen.lost.push((shard.shard, shard.replicas.iter().map(|one| one.node).collect())),
            }
        }
        chosen
    }
}

/// The result of shipping.
pub(crate) enum Shipped {
    /// The bucket holds all that any replica held, except for these.
    All(Absent),
    /// No replica of the keyspace is live.
    NobodyIsThere,
}

fn error(code: ErrorCode, message: impl Into<String>) -> VastoError {
    VastoError::new(code, message)
}

fn works(state: &ClusterState, known: &Keyspace, one: &Placed) -> bool {
    let failed = known.reports.get(&one.replica).is_some_and(ReplicaReport::has_failed);
    state.away_us(one.node, u64::MAX) == 0 && !failed
}

/// Returns true while a node of the keyspace may still come back.
fn may_come(state: &ClusterState, catalog: &Catalog, mono_us: u64) -> bool {
    let mut nodes = catalog.placement.iter().flat_map(|shard| &shard.replicas).map(|one| one.node);
    nodes.any(|node| state.presence(node, mono_us) == Presence::Away)
}

type Waiting = Vec<(NodeId, oneshot::Receiver<Done>)>;

/// Sends the command to the chosen replicas.
async fn send(cluster: &Cluster, name: &str, kind: Kind) -> Result<(Chosen, Waiting), VastoError> {
    loop {
        {
            let mut state = cluster.state();
            let known = find(&state, name)?;
            let catalog = known.catalog.clone();
            if !may_come(&state, &catalog, cluster.mono_us()) {
                let chosen = Chosen::of(&catalog, |one| works(&state, known, one));
                let mut waiting = Vec::new();
                for (node, replicas) in &chosen.by_node {
                    let command = v1::Command {
                        id: 0,
                        kind: kind as i32,
                        keyspace_id: catalog.keyspace.0,
                        replica_ids: replicas.iter().map(|one| one.0).collect(),
                        version: catalog.version.0,
                        absent_replica_ids: chosen.absent.ids(),
                    };
                    let Some(done) = state.send_command(*node, command) else {
                        let message = format!("{node} has too many commands to do; try again later");
                        return Err(error(ErrorCode::Overloaded, message).retry_after_ms(1000));
                    };
                    waiting.push((*node, done));
                }
                return Ok((chosen, waiting));
            }
        }
        sleep(LOOK).await;
    }
}

/// Why the command failed.
enum Undone {
    /// The node was lost: another one may execute the command.
    Lost(NodeId),
    Failed(VastoError),
}

async fn done(waiting: Waiting) -> Result<Vec<NodeId>, Undone> {
    let mut nodes = Vec::new();
    for (node, done) in waiting {
        match done.await {
            Ok(Ok(_)) => nodes.push(node),
            Ok(Err(reason)) => {
                return Err(Undone::Failed(error(
                    ErrorCode::Unavailable,
                    format!("node {node} could not do it: {reason}"),
                )));
            }
            Err(_) => return Err(Undone::Lost(node)),
        }
    }
    Ok(nodes)
}

fn lost(name: &str, lost: &[(ShardId, Vec<NodeId>)]) -> VastoError {
    let one = |(shard, nodes): &(ShardId, Vec<NodeId>)| {
        let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
        format!("shard {shard} (node {})", nodes.join(", "))
    };
    let shards: Vec<String> = lost.iter().map(one).collect();
    error(ErrorCode::Unavailable, format!("no replica of {} of keyspace {name} is there", shards.join(", ")))
}

/// Makes a checkpoint of every shard.
pub(crate) async fn checkpoint(cluster: &Arc<Cluster>, name: &str) -> Result<String, VastoError> {
    let (chosen, waiting) = send(cluster, name, Kind::Checkpoint).await?;
    let nodes = match done(waiting).await {
        Ok(nodes) => nodes,
        Err(Undone::Failed(cause)) => return Err(cause),
        Err(Undone::Lost(node)) => {
            let message = format!("node {node} was lost before it was done; try again");
            return Err(error(ErrorCode::Unavailable, message));
        }
    };
    if !chosen.lost.is_empty() {
        let cause = lost(name, &chosen.lost);
        return Err(error(cause.code, format!("{}; start its node, then try again", cause.message)));
    }
    Ok(document::json(&json!({ "keyspace": name, "nodes": nodes })))
}

/// Has everything shipped that was acknowledged before the call.
///
/// # Errors
/// The writes that could not be shipped, and the replicas that hold them.
pub(crate) async fn everything(cluster: &Arc<Cluster>, name: &str) -> Result<Shipped, VastoError> {
    let deadline = Instant::now() + SHIP_PATIENCE;
    let is_restored = |plan: &Plan| matches!(plan.kind, PlanKind::Restore { .. });
    if find(&cluster.state(), name)?.catalog.plan.as_ref().is_some_and(is_restored) {
        return Ok(Shipped::NobodyIsThere); // no write was acknowledged yet
    }
    loop {
        let late = |_| {
            let patience = SHIP_PATIENCE.as_secs();
            error(
                ErrorCode::Unavailable,
                format!("the nodes of {name} did not ship what they hold within {patience} s"),
            )
        };
        let (chosen, waiting) = timeout_at(deadline, send(cluster, name, Kind::ShipLog)).await.map_err(late)??;
        if chosen.by_node.is_empty() && !chosen.lost.is_empty() {
            return Ok(Shipped::NobodyIsThere);
        }
        if !chosen.lost.is_empty() {
            return Err(lost(name, &chosen.lost));
        }
        match timeout_at(deadline, done(waiting)).await.map_err(late)? {
            Ok(_) => return Ok(Shipped::All(chosen.absent)),
            Err(Undone::Failed(cause)) => return Err(cause),
            Err(Undone::Lost(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vasto_core::catalog::{DrainingReplica, KeyspaceSpec};
    use vasto_core::ids::KeyspaceId;

    #[test]
    fn one_live_replica_of_each_shard_does_it_and_the_others_are_named() {
        let spec = KeyspaceSpec { shards: 2, replicas: 3, ..KeyspaceSpec::default() };
        let nodes = [vec![NodeId(1), NodeId(2), NodeId(3)], vec![NodeId(2), NodeId(3), NodeId(1)]];
        let mut catalog = Catalog::first(KeyspaceId(1), "ks", spec, &nodes, 1, 1);
        let all = Chosen::of(&catalog, |_| true);
        assert_eq!(all.by_node, [(NodeId(1), vec![ReplicaId(1)]), (NodeId(2), vec![ReplicaId(4)])].into());
        assert_eq!((all.absent, all.lost), (Absent::default(), Vec::new()));
        // The preferred primary is away: the acting primary comes before the others.
        catalog.placement[0].primary = Some(ReplicaId(3));
        let one = Chosen::of(&catalog, |one| one.node != NodeId(1));
        assert_eq!(one.by_node, [(NodeId(2), vec![ReplicaId(4)]), (NodeId(3), vec![ReplicaId(3)])].into());
        assert_eq!(
            one.absent.document().to_string(),
            r#"[{"node_id":"NODE","shards":[0,1]}]"#.replace("NODE", &NodeId(1).to_string())
        );
        // A replica that waits to be drained may hold something too.
        catalog.draining.push(DrainingReplica {
            shard: ShardId(1),
            replica: ReplicaId(9),
            node: NodeId(4),
            since_us: 1,
        });
        assert_eq!(Chosen::of(&catalog, |one| one.node != NodeId(4)).absent.ids(), [9]);
        let none = Chosen::of(&catalog, |_| false);
        assert!(none.by_node.is_empty());
        assert_eq!(none.lost.len(), 2);
        assert!(lost("ks", &none.lost).message.contains("shard 1"), "{:?}", lost("ks", &none.lost));
    }
}
