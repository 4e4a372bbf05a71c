//! Shipping on command: checkpoints, and the log before a restore.
//!
//! **Invariant:** one live replica of each shard ships, whichever ships otherwise, and a shard
//! without a live replica is named. The command waits for a node as long as the node may still
//! come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use vasto_core::catalog::{Catalog, Placed};
use vasto_core::error::VastoError;
use vasto_core::ids::{NodeId, ReplicaId, ShardId};
use vasto_core::plan::{Plan, PlanKind};
use vasto_core::reconcile::Presence;
use vasto_core::report::ReplicaReport;
use vasto_proto::v1::{self, command::Kind};

use super::answer::{Answer, find, too_busy, unavailable};
use crate::cluster::Cluster;
use crate::state::{ClusterState, Done, Keyspace};
use crate::view::json;
use crate::view::outcome::{AbsentDoc, ExecutedDoc};

/// How long the nodes have to ship what they hold.
const SHIP_PATIENCE: Duration = Duration::from_secs(60);
/// The interval of checks whether a node has come.
const POLL: Duration = Duration::from_millis(50);

/// Replicas that do not get the command.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Absent(BTreeMap<NodeId, Vec<(ShardId, ReplicaId)>>);

impl Absent {
    fn add(&mut self, shard: ShardId, placed: Placed) {
        self.0.entry(placed.node).or_default().push((shard, placed.replica));
    }

    /// Returns the list for scripts and people.
    pub(super) fn document(&self) -> Vec<AbsentDoc> {
        let of_nodes = self.0.iter().map(|(node, replicas)| AbsentDoc {
            node_id: *node,
            shards: replicas.iter().map(|(shard, _)| *shard).collect(),
        });
        of_nodes.collect()
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
    /// Chooses one replica of each shard: the preferred primary, else the acting primary, else any
    /// live replica.
    fn of(catalog: &Catalog, works: impl Fn(&Placed) -> bool) -> Self {
        let mut chosen = Self::default();
        for shard in &catalog.placement {
            let draining = catalog.draining.iter().filter(|draining| draining.shard == shard.shard);
            let draining =
                draining.map(|draining| Placed { replica: draining.replica, node: draining.node });
            for placed in
                shard.replicas.iter().copied().chain(draining).filter(|placed| !works(placed))
            {
                chosen.absent.add(shard.shard, placed);
            }
            let others = shard.primary().into_iter().chain(shard.replicas.iter().copied());
            match shard.shipper().into_iter().chain(others).find(|placed| works(placed)) {
                Some(placed) => chosen.by_node.entry(placed.node).or_default().push(placed.replica),
                None => chosen
                    .lost
                    .push((shard.shard, shard.replicas.iter().map(|placed| placed.node).collect())),
            }
        }
        chosen
    }
}

/// The result of shipping.
pub(super) enum Shipped {
    /// The bucket holds all that any replica held, except for these.
    All(Absent),
    /// No replica of the keyspace is live.
    NoLiveReplica,
}

fn works(state: &ClusterState, keyspace: &Keyspace, placed: &Placed) -> bool {
    let failed = keyspace.reports.get(&placed.replica).is_some_and(ReplicaReport::has_failed);
    state.is_live(placed.node) && !failed
}

/// Returns true while a node of the keyspace may still come back.
fn may_come(state: &ClusterState, catalog: &Catalog, mono_us: u64) -> bool {
    let mut nodes =
        catalog.placement.iter().flat_map(|shard| &shard.replicas).map(|placed| placed.node);
    nodes.any(|node| state.presence(node, mono_us) == Presence::Away)
}

type Waiting = Vec<(NodeId, oneshot::Receiver<Done>)>;

/// Sends the command to the chosen replicas.
async fn send(cluster: &Cluster, name: &str, kind: Kind) -> Result<(Chosen, Waiting), VastoError> {
    loop {
        {
            let mut state = cluster.state();
            let keyspace = find(&state, name)?;
            let catalog = keyspace.catalog.clone();
            if !may_come(&state, &catalog, cluster.mono_us()) {
                let chosen = Chosen::of(&catalog, |placed| works(&state, keyspace, placed));
                let mut waiting = Vec::new();
                for (node, replicas) in &chosen.by_node {
                    let command = v1::Command {
                        id: 0,
                        kind: kind as i32,
                        keyspace_id: catalog.keyspace.0,
                        replica_ids: replicas.iter().map(|replica| replica.0).collect(),
                        version: catalog.version.0,
                        absent_replica_ids: chosen.absent.ids(),
                    };
                    let done = state.send_command(*node, command).ok_or_else(|| too_busy(*node))?;
                    waiting.push((*node, done));
                }
                return Ok((chosen, waiting));
            }
        }
        sleep(POLL).await;
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
                return Err(Undone::Failed(unavailable(format!(
                    "node {node} could not do it: {reason}"
                ))));
            }
            Err(_) => return Err(Undone::Lost(node)),
        }
    }
    Ok(nodes)
}

fn lost(name: &str, lost: &[(ShardId, Vec<NodeId>)]) -> VastoError {
    let shards = lost.iter().map(|(shard, nodes)| {
        let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
        format!("shard {shard} (node {})", nodes.join(", "))
    });
    let shards: Vec<String> = shards.collect();
    unavailable(format!("no replica of {} of keyspace {name} is there", shards.join(", ")))
}

/// Makes a checkpoint of every shard.
pub(crate) async fn checkpoint(cluster: &Arc<Cluster>, name: &str) -> Answer {
    let (chosen, waiting) = send(cluster, name, Kind::Checkpoint).await?;
    let nodes = match done(waiting).await {
        Ok(nodes) => nodes,
        Err(Undone::Failed(cause)) => return Err(cause),
        Err(Undone::Lost(node)) => {
            let message = format!("node {node} was lost before it was done; try again");
            return Err(unavailable(message));
        }
    };
    if !chosen.lost.is_empty() {
        let cause = lost(name, &chosen.lost);
        return Err(unavailable(format!("{}; start its node, then try again", cause.message)));
    }
    Ok(json(&ExecutedDoc { keyspace: name.to_owned(), nodes }))
}

/// Has everything shipped that was acknowledged before the call.
///
/// # Errors
/// The writes that could not be shipped, and the replicas that hold them.
pub(super) async fn everything(cluster: &Arc<Cluster>, name: &str) -> Result<Shipped, VastoError> {
    let deadline = Instant::now() + SHIP_PATIENCE;
    let is_restored = |plan: &Plan| matches!(plan.kind, PlanKind::Restore { .. });
    if find(&cluster.state(), name)?.catalog.plan.as_ref().is_some_and(is_restored) {
        return Ok(Shipped::NoLiveReplica); // no write was acknowledged yet
    }
    loop {
        let late = |_| {
            let patience = SHIP_PATIENCE.as_secs();
            unavailable(format!(
                "the nodes of {name} did not ship what they hold within {patience} s"
            ))
        };
        let (chosen, waiting) =
            timeout_at(deadline, send(cluster, name, Kind::ShipLog)).await.map_err(late)??;
        if chosen.by_node.is_empty() && !chosen.lost.is_empty() {
            return Ok(Shipped::NoLiveReplica);
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
    fn one_live_replica_of_each_shard_ships_and_absent_replicas_are_named() {
        let spec = KeyspaceSpec { shards: 2, replicas: 3, ..KeyspaceSpec::default() };
        let nodes = [vec![NodeId(1), NodeId(2), NodeId(3)], vec![NodeId(2), NodeId(3), NodeId(1)]];
        let mut catalog = Catalog::first(KeyspaceId(1), "ks", spec, &nodes, 1, 1);
        let all = Chosen::of(&catalog, |_| true);
        assert_eq!(
            all.by_node,
            [(NodeId(1), vec![ReplicaId(1)]), (NodeId(2), vec![ReplicaId(4)])].into()
        );
        assert_eq!((all.absent, all.lost), (Absent::default(), Vec::new()));
        // The preferred primary is away: the acting primary comes before the others.
        catalog.placement[0].primary = Some(ReplicaId(3));
        let chosen = Chosen::of(&catalog, |placed| placed.node != NodeId(1));
        assert_eq!(
            chosen.by_node,
            [(NodeId(2), vec![ReplicaId(4)]), (NodeId(3), vec![ReplicaId(3)])].into()
        );
        assert_eq!(
            json(&chosen.absent.document()),
            r#"[{"node_id":"NODE","shards":[0,1]}]"#.replace("NODE", &NodeId(1).to_string())
        );
        // A replica that waits to be drained may hold something too.
        catalog.draining.push(DrainingReplica {
            shard: ShardId(1),
            replica: ReplicaId(9),
            node: NodeId(4),
            since_us: 1,
        });
        assert_eq!(Chosen::of(&catalog, |placed| placed.node != NodeId(4)).absent.ids(), [9]);
        let none = Chosen::of(&catalog, |_| false);
        assert!(none.by_node.is_empty());
        assert_eq!(none.lost.len(), 2);
        assert!(lost("ks", &none.lost).message.contains("shard 1"), "{:?}", lost("ks", &none.lost));
    }
}
