//! A crowd of nodes without data in one process, which speak to a master as nodes do.
//!
//! **Invariant:** a node of the crowd reports what a healthy one would, in the same order: a replica
//! opens, then serves; one that a plan makes loads for a while, then follows, then opens. It refuses
//! lower versions, and has a replica until a version takes it away. A node that is lost goes silent and
//! keeps its connection, as one that hangs.

mod member;
mod reports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::sync::watch;
use vasto_core::catalog::Catalog;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId};
use vasto_testkit::{DEADLINE, until};

use self::member::Member;

/// What the nodes of a crowd share.
#[derive(Debug)]
struct Shared {
    /// URL of the master.
    master: String,
    /// Time for which a new replica loads.
    copy_takes: Duration,
    /// The nodes that are lost.
    lost: watch::Sender<BTreeSet<NodeId>>,
    /// The last version of each keyspace that one of them was sent, decoded once for all.
    decoded: Mutex<BTreeMap<KeyspaceId, Arc<Catalog>>>,
}

impl Shared {
    /// Decodes a version, unless another node has just done so.
    fn decode(&self, keyspace: KeyspaceId, version: u64, json: &str) -> Result<Arc<Catalog>> {
        let known = self.decoded.lock().get(&keyspace).cloned();
        if let Some(known) = known.filter(|known| known.version.0 == version) {
            return Ok(known);
        }
        let catalog: Arc<Catalog> =
            Arc::new(serde_json::from_str(json).context("a catalog version cannot be read")?);
        self.decoded.lock().insert(keyspace, Arc::clone(&catalog));
        Ok(catalog)
    }

    fn is_lost(&self, node: NodeId) -> bool {
        self.lost.borrow().contains(&node)
    }
}

/// What went between the nodes and the master: bytes of catalogs and reports, without framing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of catalog versions that nodes were sent.
    pub received: u64,
    /// Versions that nodes were sent.
    pub versions: u64,
    /// Bytes of reports of replicas.
    pub sent: u64,
}

/// The nodes. They end when it is dropped.
#[derive(Debug)]
pub struct Crowd {
    shared: Arc<Shared>,
    members: Vec<Member>,
}

impl Crowd {
    /// Lets so many nodes join a master; a replica that a plan makes loads for `copy_takes`.
    ///
    /// # Errors
    /// When they are not taken in.
    pub async fn join(master: &str, nodes: usize, copy_takes: Duration) -> Result<Self> {
        let shared = Arc::new(Shared {
            master: master.to_owned(),
            copy_takes,
            lost: watch::Sender::new(BTreeSet::new()),
            decoded: Mutex::default(),
        });
        let mut members = Vec::new();
        for index in 0..nodes {
            members.push(Member::start(&shared, NodeId(index as u64 + 1)).await?);
        }
        let crowd = Self { shared, members };
        until("all nodes to join", DEADLINE, async || {
            crowd.members.iter().all(Member::has_joined).then_some(())
        })
        .await?;
        Ok(crowd)
    }

    /// Returns the id of a node.
    pub fn node_id(&self, index: usize) -> NodeId {
        self.members[index].node()
    }

    /// Returns the number of nodes.
    pub fn nodes(&self) -> usize {
        self.members.len()
    }

    /// Lets a node go silent for good. The others find that they cannot reach it, and act.
    pub fn lose(&self, index: usize) {
        let node = self.node_id(index);
        self.shared.lost.send_modify(|lost| {
            lost.insert(node);
        });
    }

    /// Starts a lost node again, with the replicas and the versions that it remembers.
    ///
    /// # Errors
    /// When it is not taken in.
    pub async fn come_back(&mut self, index: usize) -> Result<()> {
        let node = self.node_id(index);
        self.shared.lost.send_modify(|lost| {
            lost.remove(&node);
        });
        self.members[index].restart(&self.shared);
        let member = &self.members[index];
        until("the node to join again", DEADLINE, async || member.has_joined().then_some(())).await
    }

    /// Returns the last version of each keyspace that a node knows.
    pub fn catalogs(&self, index: usize) -> Vec<Arc<Catalog>> {
        self.members[index].catalogs()
    }

    /// Returns the replicas that a node has.
    pub fn replicas(&self, index: usize) -> BTreeSet<(KeyspaceId, ReplicaId)> {
        self.members[index].replicas()
    }

    /// Returns the most replicas that plans made on a node at the same time.
    pub fn most_copies(&self, index: usize) -> usize {
        self.members[index].most_copies()
    }

    /// Returns what has gone between all nodes and the master so far.
    pub fn traffic(&self) -> Traffic {
        let all = self.members.iter().map(Member::traffic);
        all.fold(Traffic::default(), |sum, one| Traffic {
            received: sum.received + one.received,
            versions: sum.versions + one.versions,
            sent: sum.sent + one.sent,
        })
    }
}
