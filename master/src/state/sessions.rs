//! Sessions of nodes: their begin and end, reports, commands and their results, and what a session
//! has still to send.
//!
//! **Invariant:** a session that was replaced can change nothing any more, and its commands end
//! with it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::KeyspaceState;
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId, ReplicaId};
use vasto_core::limits::NODE_REPLICAS_MAX;
use vasto_core::report::ReplicaReport;
use vasto_proto::v1::{self, master_message::Message};

use super::ClusterState;
use super::keyspace::Delivery;
use super::node::{Done, Node, Session};

/// The most commands that may wait for one node.
pub(super) const COMMANDS_MAX: usize = 64;

/// A session that has begun.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) session: u64,
    /// Cancelled when another session replaces it.
    pub(crate) replaced: CancellationToken,
    /// There is something to send.
    pub(crate) wake: Arc<Notify>,
}

/// A conflict: a session that may be alive has the node id.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) address: String,
    pub(crate) session: u64,
    /// When the last message of that session arrived.
    pub(crate) heard_us: u64,
}

/// Why a report was not accepted as it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Odd {
    /// The keyspace is not known: another master may have created it.
    UnknownKeyspace(KeyspaceId),
    /// The catalog places this replica on another node.
    NotItsReplica(KeyspaceId, ReplicaId),
}

/// The versions and addresses that a session has already sent.
#[derive(Default)]
pub(crate) struct Sent {
    versions: BTreeMap<KeyspaceId, CatalogVersion>,
    /// Nothing that changed up to this revision has to be looked at again.
    revision: u64,
    nodes_revision: Option<u64>,
}

impl ClusterState {
    /// Starts a session; replaces a session from the same address; a session from another address
    /// is a [`Conflict`] unless `replace`.
    pub(crate) fn connect(
        &mut self,
        hello: &v1::Hello,
        replace: bool,
        now_us: u64,
    ) -> Result<Registration, Conflict> {
        let id = NodeId(hello.node_id);
        if let Some((node, session)) =
            self.nodes.get(&id).and_then(|node| Some((node, node.session.as_ref()?)))
            && node.address != hello.address
            && !replace
        {
            return Err(Conflict {
                address: node.address.clone(),
                session: session.id,
                heard_us: node.heard_us,
            });
        }
        self.last_session += 1;
        let session = Session::new(self.last_session);
        let registration = Registration {
            session: session.id,
            replaced: session.replaced.clone(),
            wake: session.wake.clone(),
        };
        let node = self.nodes.entry(id).or_insert_with(|| Node::new(now_us));
        // A session that only replaces another does not restart the time here.
        if node.session.is_none() {
            node.here_since_us = now_us;
        }
        if let Some(old) = node.session.replace(session) {
            old.replaced.cancel();
        }
        let moved = node.address != hello.address;
        node.address = hello.address.clone();
        node.zone = hello.zone.clone();
        node.cluster_id = hello.cluster_id.clone();
        node.pid = hello.pid;
        node.max_replicas = match hello.max_replicas {
            0 => NODE_REPLICAS_MAX,
            most => most as usize,
        };
        node.heard_us = now_us;
        for keyspace in self.keyspaces.values_mut() {
            keyspace.forget_reports_of(id);
        }
        if moved {
            self.nodes_revision += 1;
            self.publish_addresses();
        }
        self.forget_nodes(now_us);
        Ok(registration)
    }

    /// Records whether the master could connect to the node; a session that was replaced can change
    /// nothing.
    pub(crate) fn reached(&mut self, node: NodeId, session: u64, unreachable: Option<String>) {
        if let Some(node) = self.served_by(node, session) {
            node.unreachable = unreachable;
        }
    }

    /// Ends a session, unless it was replaced already. Returns true when the node is away now.
    pub(crate) fn disconnect(&mut self, node: NodeId, session: u64, now_us: u64) -> bool {
        let Some(node) = self.served_by(node, session) else { return false };
        node.session = None;
        node.away_since_us = now_us;
        for keyspace in self.keyspaces.values() {
            keyspace.notify();
        }
        true
    }

    /// Ends every session; the nodes reconnect at once and report everything again.
    pub(crate) fn begin_sessions_anew(&self) {
        self.sessions().for_each(|session| session.replaced.cancel());
    }

    /// Wakes every session: there may be something to send.
    pub(super) fn wake_sessions(&self) {
        self.sessions().for_each(|session| session.wake.notify_one());
    }

    /// Takes a node's report; a report of a session that was replaced is ignored.
    pub(crate) fn report(
        &mut self,
        node_id: NodeId,
        session: u64,
        report: &v1::Report,
        replicas: Vec<ReplicaReport>,
        now_us: u64,
    ) -> Vec<Odd> {
        let Some(node) = self.served_by(node_id, session) else { return Vec::new() };
        node.heard_us = now_us;
        node.disk_used = report.disk_used;
        node.disk_free = report.disk_free;
        node.bucket_trouble = report.bucket_trouble.clone();
        node.yields = report.held_back_to > 0;
        if let Some(bucket) = &report.bucket {
            node.bucket = *bucket;
        }
        if let Some(rates) = &report.rates {
            node.rates = *rates;
        }
        let mut odd = Vec::new();
        // The keyspaces of which something was reported, and whether that is news to their drivers.
        let mut touched: BTreeMap<KeyspaceId, bool> = BTreeMap::new();
        for replica in replicas {
            let id = replica.keyspace;
            match self.keyspaces.get_mut(&id) {
                None => odd.push(Odd::UnknownKeyspace(id)),
                Some(keyspace) => match keyspace.take(node_id, replica) {
                    Ok(is_news) => *touched.entry(id).or_default() |= is_news,
                    Err(replica) => odd.push(Odd::NotItsReplica(id, replica)),
                },
            }
        }
        for (id, is_news) in touched {
            let keyspace = &self.keyspaces[&id];
            match is_news {
                true => keyspace.notify(),
                false => keyspace.tell(),
            }
            // Whoever has replicas of a deleted keyspace is told so, wherever it was placed.
            if is_news && keyspace.catalog.state == KeyspaceState::Deleted {
                self.revisions.touch(id);
                self.wake_sessions();
            }
        }
        odd
    }

    /// Queues a command for all replicas of a keyspace on the node.
    pub(crate) fn command(
        &mut self,
        node: NodeId,
        kind: v1::command::Kind,
        keyspace: KeyspaceId,
    ) -> Option<oneshot::Receiver<Done>> {
        let command =
            v1::Command { kind: kind as i32, keyspace_id: keyspace.0, ..v1::Command::default() };
        self.send_command(node, command)
    }

    /// Queues a command. Returns `None` when the node is away, or has too many commands already.
    pub(crate) fn send_command(
        &mut self,
        node: NodeId,
        command: v1::Command,
    ) -> Option<oneshot::Receiver<Done>> {
        self.last_command += 1;
        let id = self.last_command;
        let session = self.nodes.get_mut(&node)?.session.as_mut()?;
        session.waiting.retain(|_, waiter| !waiter.is_closed());
        if session.waiting.len() >= COMMANDS_MAX || session.commands.len() >= COMMANDS_MAX {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        session.waiting.insert(id, sender);
        session.commands.push_back(v1::Command { id, ..command });
        session.wake.notify_one();
        Some(receiver)
    }

    /// Takes the result of a command; a session that was replaced can answer nothing.
    pub(crate) fn command_done(
        &mut self,
        node: NodeId,
        session: u64,
        done: &v1::CommandDone,
        now_us: u64,
    ) {
        let Some(node) = self.served_by(node, session) else { return };
        node.heard_us = now_us;
        if let Some(waiter) =
            node.session.as_mut().and_then(|session| session.waiting.remove(&done.id))
        {
            let result = if done.error.is_empty() {
                Ok(done.catalogs.clone())
            } else {
                Err(done.error.clone())
            };
            // The caller may be gone and need no result.
            let _ = waiter.send(result);
        }
    }

    /// Returns everything that this session has not been sent: addresses, then versions, then
    /// commands.
    pub(crate) fn outstanding(
        &mut self,
        node_id: NodeId,
        session: u64,
        sent: &mut Sent,
    ) -> Vec<v1::MasterMessage> {
        let mut out = Vec::new();
        if sent.nodes_revision != Some(self.nodes_revision) {
            sent.nodes_revision = Some(self.nodes_revision);
            let nodes = self.nodes.iter();
            let nodes = nodes.map(|(id, node)| v1::NodeAddress {
                node_id: id.0,
                address: node.address.clone(),
                zone: node.zone.clone(),
            });
            out.push(Message::Nodes(v1::Nodes { nodes: nodes.collect() }));
        }
        for id in self.revisions.after(sent.revision) {
            #[cfg(test)]
            self.offered.set(self.offered.get() + 1);
            let Some(keyspace) = self.keyspaces.get(&id) else { continue };
            let version = keyspace.catalog.version;
            if keyspace.delivery != Delivery::Push
                || sent.versions.get(&id).is_some_and(|sent| *sent >= version)
                || !keyspace.concerns(node_id)
            {
                continue;
            }
            sent.versions.insert(id, version);
            out.push(Message::Keyspace(v1::KeyspaceVersion {
                keyspace_id: id.0,
                version: version.0,
                catalog_json: keyspace.text().to_owned(),
            }));
        }
        sent.revision = self.revisions.last();
        // Of those that are forgotten, most have been sent.
        if sent.versions.len() > 2 * self.keyspaces.len() {
            sent.versions.retain(|id, _| self.keyspaces.contains_key(id));
        }
        if let Some(live) = self.served_by(node_id, session).and_then(|node| node.session.as_mut())
        {
            out.extend(live.commands.drain(..).map(Message::Command));
        }
        out.into_iter().map(|message| v1::MasterMessage { message: Some(message) }).collect()
    }

    /// Returns the node while this session of it is the live one.
    fn served_by(&mut self, node: NodeId, session: u64) -> Option<&mut Node> {
        self.nodes.get_mut(&node).filter(|node| node.is_served_by(session))
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.nodes.values().filter_map(|node| node.session.as_ref())
    }
}
