//! The state of the master: nodes, their reports, and the last catalog version of each keyspace.
//!
//! **Invariant:** all state here is synchronous, soft, and rebuilt after a restart from the
//! catalog and the nodes. A catalog is replaced only by a higher version. A session that was
//! replaced can change nothing any more. Time is an argument: microseconds of a monotonic
//! clock, from the master's start.
//!
//! Other modules write versions (`driver`) and speak gRPC (`session`, `service`).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::{Catalog, KeyspaceState};
use vasto_core::ids::{CatalogVersion, KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::limits::{
    ACCEPTED_LOSS_AWAY, COPIES_PER_NODE_MAX, FAILOVER_AWAY, NODE_FORGOTTEN_AFTER, NODE_REPLICAS_MAX, NODE_SILENCE,
};
use vasto_core::plan::{Plan, SEALS_UNDONE_MAX, Step};
use vasto_core::reconcile::{
    Advance, Around, Presence, abort, advance, advance_members, advance_primaries, give_up_on, is_incomplete,
    is_unsettled, nodes_to_avoid, undo_seal, waits_for,
};
use vasto_core::report::{ReplicaReport, Reports};
use vasto_core::topology::{NodeAddress, Topology};
use vasto_proto::convert::topology_to_wire;
use vasto_proto::v1;
use vasto_shipping::ClusterSettings;

use crate::driver::Request;
use crate::loads::{Loads, shard_bytes};
use crate::placement::{Disk, NodeCandidate, PlacementError, place};

/// The most commands that may wait for one node.
const COMMANDS_MAX: usize = 64;

/// The whole state of the master.
#[derive(Default)]
pub(crate) struct ClusterState {
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) keyspaces: BTreeMap<KeyspaceId, Keyspace>,
    /// Raised when a node appears or its address changes.
    nodes_revision: u64,
    last_session: u64,
    last_command: u64,
    /// How long a node may be away before its replicas are replaced elsewhere, microseconds.
    pub(crate) replace_after_us: Option<u64>,
    /// How long a node that was placed before the master started may take to register; [`NODE_SILENCE`] when `None`.
    pub(crate) node_silence: Option<Duration>,
    /// The load of each node.
    pub(crate) loads: Loads,
    /// Decisions about nodes, not about keyspaces.
    pub(crate) settings: Arc<ClusterSettings>,
    /// Nodes examined for decisions, so that a test can count the work.
    #[cfg(test)]
    pub(crate) looks: std::cell::Cell<u64>,
}

/// A node that has registered since the master started.
pub(crate) struct Node {
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) pid: u32,
    /// The most replicas that the node takes.
    pub(crate) max_replicas: usize,
    pub(crate) disk_used: u64,
    pub(crate) disk_free: u64,
    pub(crate) bucket: v1::BucketRequests,
    /// The fault that keeps the node from shipping; empty when there is none.
    pub(crate) bucket_trouble: String,
    /// The cluster that the node says it belongs to; empty when there is none yet.
    pub(crate) cluster_id: String,
    /// When the last message of the node arrived.
    pub(crate) heard_us: u64,
    /// The live session; `None` means away.
    pub(crate) session: Option<Session>,
    /// When the session began, or when the node went away.
    pub(crate) away_since_us: u64,
    /// When the session began; meaningless while there is none.
    pub(crate) here_since_us: u64,
    /// Why the master cannot connect to the advertised address of the node.
    pub(crate) unreachable: Option<String>,
}

/// A live session of a node.
pub(crate) struct Session {
    pub(crate) id: u64,
    /// Cancelled when another session replaces it.
    pub(crate) replaced: CancellationToken,
    /// There is something to send.
    pub(crate) wake: Arc<Notify>,
    commands: VecDeque<v1::Command>,
    /// Callers that wait for a command; dropped with the session, so that they learn that the node was lost.
    waiting: HashMap<u64, oneshot::Sender<Done>>,
}

/// The result of a command: the catalogs that it asked for, or why it failed.
pub(crate) type Done = Result<Vec<String>, String>;

/// How nodes may receive a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Nodes receive it at once.
    Push,
    /// A `sealing` version that this master did not write just now (loaded at start, or another
    /// master's): it is decided or undone, but not sent to further nodes.
    Hold,
    /// A `sealing` version that took too long to write: it is undone at once and never shown.
    Undo,
}

/// The state of one keyspace.
pub(crate) struct Keyspace {
    pub(crate) catalog: Arc<Catalog>,
    /// When this master learned of this version.
    installed: Instant,
    pub(crate) delivery: Delivery,
    pub(crate) reports: Reports,
    reporters: BTreeMap<ReplicaId, NodeId>,
    /// A node has applied a version that this master does not know.
    pub(crate) behind: bool,
    /// The condition that the plan waits for.
    pub(crate) waiting_for: Option<String>,
    topology: watch::Sender<v1::Topology>,
    /// Raised by every change; for tasks that wait for a condition.
    changed: watch::Sender<u64>,
    /// Wakes the driver.
    pub(crate) wake: Arc<Notify>,
    pub(crate) requests: mpsc::Sender<Request>,
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
    nodes_revision: Option<u64>,
}

/// A conflict: a session that may be alive has the node id.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) address: String,
    pub(crate) session: u64,
    /// When the last message of that session arrived.
    pub(crate) heard_us: u64,
}

impl ClusterState {
    /// Starts a session; replaces a session from the same address; a session from another address is
    /// a [`Conflict`] unless `replace`.
    pub(crate) fn connect(
        &mut self,
        hello: &v1::Hello,
        replace: bool,
        now_us: u64,
    ) -> Result<(u64, CancellationToken, Arc<Notify>), Conflict> {
        let id = NodeId(hello.node_id);
        if let Some((node, session)) = self.nodes.get(&id).and_then(|node| Some((node, node.session.as_ref()?)))
            && node.address != hello.address
            && !replace
        {
            return Err(Conflict { address: node.address.clone(), session: session.id, heard_us: node.heard_us });
        }
        self.last_session += 1;
        let session = Session {
            id: self.last_session,
            replaced: CancellationToken::new(),
            wake: Arc::new(Notify::new()),
            commands: VecDeque::new(),
            waiting: HashMap::new(),
        };
        let handles = (session.id, session.replaced.clone(), session.wake.clone());
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            address: String::new(),
            zone: String::new(),
            pid: 0,
            max_replicas: NODE_REPLICAS_MAX,
            disk_used: 0,
            disk_free: 0,
            bucket: v1::BucketRequests::default(),
            bucket_trouble: String::new(),
            cluster_id: String::new(),
            heard_us: now_us,
            session: None,
            away_since_us: now_us,
            here_since_us: now_us,
            unreachable: None,
        });
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
        Ok(handles)
    }

    /// Records whether the master could connect to the node; a session that was replaced can change nothing.
    pub(crate) fn reached(&mut self, node: NodeId, session: u64, unreachable: Option<String>) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|node| node.session_id() == Some(session)) {
            node.unreachable = unreachable;
        }
    }

    /// Ends a session, unless it was replaced already. Returns true when the node is away now.
    pub(crate) fn disconnect(&mut self, node: NodeId, session: u64, now_us: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&node).filter(|node| node.session_id() == Some(session)) else {
            return false;
        };
        node.session = None;
        node.away_since_us = now_us;
        for keyspace in self.keyspaces.values() {
            keyspace.notify();
        }
        true
    }

    /// Ends every session; the nodes reconnect at once and report everything again.
    pub(crate) fn begin_sessions_anew(&self) {
        for session in self.nodes.values().filter_map(|node| node.session.as_ref()) {
            session.replaced.cancel();
        }
    }

    /// Returns how long a node has been unreachable, microseconds; 0 for a live node. The time of a node
    /// that has not come back since the master started counts from that start.
    pub(crate) fn away_us(&self, node: NodeId, now_us: u64) -> u64 {
        match self.nodes.get(&node) {
            Some(node) if node.session.is_some() => 0,
            Some(node) => now_us.saturating_sub(node.away_since_us).max(1),
            None => now_us.max(1),
        }
    }

    /// Returns the presence of a node. A node that has not registered since the master started may still
    /// come: it counts as gone only after `master.node_silence`.
    pub(crate) fn presence(&self, node: NodeId, now_us: u64) -> Presence {
        let (away_us, patience) = match self.nodes.get(&node) {
            Some(node) if node.session.is_some() => {
                return Presence::Here(now_us.saturating_sub(node.here_since_us));
            }
            Some(node) => (now_us.saturating_sub(node.away_since_us), FAILOVER_AWAY),
            None => (now_us, self.node_silence.unwrap_or(NODE_SILENCE)),
        };
        if away_us >= patience.as_micros() as u64 { Presence::Gone } else { Presence::Away }
    }

    /// Returns the nodes without a session among those that share a keyspace with this node.
    pub(crate) fn gone_beside(&self, node: NodeId, now_us: u64) -> Vec<NodeId> {
        let concerned = self.keyspaces.values().filter(|keyspace| keyspace.concerns(node));
        let placed = concerned.flat_map(|keyspace| &keyspace.catalog.placement).flat_map(|shard| &shard.replicas);
        let others: BTreeSet<NodeId> = placed.map(|one| one.node).filter(|other| *other != node).collect();
        others.into_iter().filter(|other| self.presence(*other, now_us) == Presence::Gone).collect()
    }

    /// Returns true when the primaries of the keyspace must be checked soon.
    pub(crate) fn is_unsettled(&self, keyspace: KeyspaceId, now_us: u64) -> bool {
        let known = self.keyspaces.get(&keyspace);
        known.is_some_and(|known| is_unsettled(&known.catalog, |node| self.presence(node, now_us)))
    }

    /// Returns true when its members must be checked although nothing is reported.
    pub(crate) fn is_incomplete(&self, keyspace: KeyspaceId) -> bool {
        self.keyspaces.get(&keyspace).is_some_and(|known| is_incomplete(&known.catalog))
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
        let Some(node) = self.nodes.get_mut(&node_id).filter(|node| node.session_id() == Some(session)) else {
            return Vec::new();
        };
        node.heard_us = now_us;
        node.disk_used = report.disk_used;
        node.disk_free = report.disk_free;
        node.bucket_trouble = report.bucket_trouble.clone();
        if let Some(bucket) = &report.bucket {
            node.bucket = *bucket;
        }
        let mut odd = Vec::new();
        let mut touched = Vec::new();
        for one in replicas {
            let id = one.keyspace;
            match self.keyspaces.get_mut(&id) {
                None => odd.push(Odd::UnknownKeyspace(id)),
                Some(keyspace) => match keyspace.take(node_id, one) {
                    Ok(()) => touched.push(id),
                    Err(replica) => odd.push(Odd::NotItsReplica(id, replica)),
                },
            }
        }
        touched.dedup();
        for keyspace in touched {
            self.keyspaces[&keyspace].notify();
        }
        odd
    }

    /// Takes the result of a command; a session that was replaced can answer nothing.
    pub(crate) fn command_done(&mut self, node: NodeId, session: u64, done: &v1::CommandDone, now_us: u64) {
        let Some(node) = self.nodes.get_mut(&node).filter(|node| node.session_id() == Some(session)) else { return };
        node.heard_us = now_us;
        if let Some(waiter) = node.session.as_mut().and_then(|session| session.waiting.remove(&done.id)) {
            let result = if done.error.is_empty() { Ok(done.catalogs.clone()) } else { Err(done.error.clone()) };
            // The caller may be gone and need no result.
            let _ = waiter.send(result);
        }
    }

    /// Queues a command for all replicas of a keyspace on the node.
    pub(crate) fn command(
        &mut self,
        node: NodeId,
        kind: v1::command::Kind,
        keyspace: KeyspaceId,
    ) -> Option<oneshot::Receiver<Done>> {
        let command = v1::Command { kind: kind as i32, keyspace_id: keyspace.0, ..v1::Command::default() };
        self.send_command(node, command)
    }

    /// Queues a command. Returns `None` when the node is away, or has too many commands already.
    pub(crate) fn send_command(&mut self, node: NodeId, command: v1::Command) -> Option<oneshot::Receiver<Done>> {
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

    /// Returns everything that this session has not been sent: addresses, then versions, then commands.
    pub(crate) fn outstanding(&mut self, node_id: NodeId, session: u64, sent: &mut Sent) -> Vec<v1::MasterMessage> {
        use v1::master_message::Message;
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
        for (id, keyspace) in &self.keyspaces {
            let version = keyspace.catalog.version;
            if keyspace.delivery != Delivery::Push
                || sent.versions.get(id).is_some_and(|sent| *sent >= version)
                || !keyspace.concerns(node_id)
            {
                continue;
            }
            sent.versions.insert(*id, version);
            out.push(Message::Keyspace(v1::KeyspaceVersion {
                keyspace_id: id.0,
                version: version.0,
                catalog_json: serde_json::to_string(&*keyspace.catalog)
                    .expect("a catalog has only string keys and finite numbers"),
            }));
        }
        let commands = self.nodes.get_mut(&node_id).and_then(|node| node.session.as_mut());
        if let Some(session) = commands.filter(|live| live.id == session) {
            out.extend(session.commands.drain(..).map(Message::Command));
        }
        out.into_iter().map(|message| v1::MasterMessage { message: Some(message) }).collect()
    }

    /// Installs a catalog version; returns false when a higher one is known already. For a new keyspace
    /// also returns the receiver of its requests, which its driver must own.
    pub(crate) fn install(&mut self, catalog: Catalog, delivery: Delivery) -> (bool, Option<mpsc::Receiver<Request>>) {
        let catalog = Arc::new(catalog);
        let topology = self.topology_of(&catalog);
        let mut receiver = None;
        match self.keyspaces.get_mut(&catalog.keyspace) {
            Some(known) if known.catalog.version >= catalog.version => return (false, None),
            Some(known) => {
                self.loads.count(&catalog, &known.reports);
                known.forget_reports_of_removed(&catalog);
                known.catalog = catalog;
                known.installed = Instant::now();
                known.delivery = delivery;
                known.behind = false;
                known.waiting_for = None;
                known.topology.send_replace(topology);
                known.notify();
            }
            None => {
                let (requests, waiting) = mpsc::channel(16);
                receiver = Some(waiting);
                self.loads.count(&catalog, &Reports::new());
                let keyspace = Keyspace {
                    installed: Instant::now(),
                    delivery,
                    reports: Reports::new(),
                    reporters: BTreeMap::new(),
                    behind: false,
                    waiting_for: None,
                    topology: watch::Sender::new(topology),
                    changed: watch::Sender::new(0),
                    wake: Arc::new(Notify::new()),
                    requests,
                    catalog,
                };
                self.keyspaces.insert(keyspace.catalog.keyspace, keyspace);
            }
        }
        self.wake_sessions();
        (true, receiver)
    }

    /// Returns the next action of a keyspace's driver. Without any live node it waits: a master without
    /// sessions knows nothing, and another master may be driving.
    pub(crate) fn decide(&self, keyspace: KeyspaceId, mono_us: u64, now_us: u64, nonce: u64) -> Advance {
        let Some(known) = self.keyspaces.get(&keyspace) else { return Advance::Idle };
        let catalog = &known.catalog;
        if catalog.state == KeyspaceState::Deleted {
            return Advance::Idle;
        }
        // A wall clock that was set back must not stretch a seal: from the version's own time on, time
        // passes at least as fast as it has passed here since.
        let in_force_us = u64::try_from(known.installed.elapsed().as_micros()).unwrap_or(u64::MAX);
        let now_us = now_us.max(catalog.written_at_us.saturating_add(in_force_us));
        if known.delivery == Delivery::Undo
            && let Some(plan) = catalog.plan.as_ref().filter(|plan| plan.step == Step::Sealing)
        {
            let too_often = plan.seals_undone >= SEALS_UNDONE_MAX;
            let reason = "the bucket was too slow to seal, too many times";
            let next = match abort(catalog, reason, &known.reports, now_us, nonce).filter(|_| too_often) {
                Some(next) => next,
                None => undo_seal(catalog, plan, now_us, nonce),
            };
            return Advance::Write(Box::new(next));
        }
        if !self.nodes.values().any(|node| node.session.is_some()) {
            return match catalog.plan {
                Some(_) => Advance::Wait("a node to report to this master".into()),
                None => Advance::Idle,
            };
        }
        let presence = |node| self.presence(node, mono_us);
        if let Some((next, _)) = advance_primaries(catalog, &known.reports, presence, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        if let Some(next) = self.without_disk(known, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        let candidates = std::cell::OnceCell::new();
        let around = Around {
            presence: &presence,
            long_gone: &|node| self.away_us(node, mono_us) > ACCEPTED_LOSS_AWAY.as_micros() as u64,
            lost: &|node| self.replace_after_us.is_some_and(|after| self.away_us(node, mono_us) > after),
            room: &|catalog, shard| {
                let candidates = candidates.get_or_init(|| self.candidates(Some(catalog)));
                let not_busy = candidates.iter().filter(|one| one.copying < COPIES_PER_NODE_MAX);
                self.best(not_busy, catalog, shard, now_us)
            },
        };
        if let Some(next) = advance_members(catalog, &known.reports, &around, now_us, nonce) {
            return Advance::Write(Box::new(next));
        }
        let here_us = |node| match presence(node) {
            Presence::Here(since_us) => since_us,
            Presence::Away | Presence::Gone => 0,
        };
        match advance(catalog, &known.reports, |node| self.away_us(node, mono_us), here_us, now_us, nonce) {
            Advance::Idle => waits_for(catalog, &known.reports, &around, now_us).map_or(Advance::Idle, Advance::Wait),
            other => other,
        }
    }

    /// Returns the version that aborts a plan whose target has no disk left for it. A restore from the
    /// bucket is not aborted for that: the keyspace that it makes would be lost.
    fn without_disk(&self, known: &Keyspace, now_us: u64, nonce: u64) -> Option<Catalog> {
        let goes_on = |plan: &&Plan| {
            (plan.adds_member() || plan.growth().is_some()) && matches!(plan.step, Step::Prepare | Step::Tail)
        };
        let plan = known.catalog.plan.as_ref().filter(goes_on)?;
        let full = |node: NodeId| self.nodes.get(&node).is_some_and(|node| node.disk().is_exhausted());
        let target = plan.targets.iter().find(|target| full(target.node))?;
        let reason = format!("{} has no disk left for it; free some, or add a node", target.node);
        give_up_on(&known.catalog, &reason, target.node, &known.reports, now_us, nonce)
    }

    /// Returns the live nodes as candidates for a replica, of that keyspace if there is one.
    pub(crate) fn candidates(&self, catalog: Option<&Catalog>) -> Vec<NodeCandidate> {
        let mut of_keyspace: HashMap<NodeId, usize> = HashMap::new();
        for (_, one, _) in catalog.map(Catalog::members).unwrap_or_default() {
            *of_keyspace.entry(one.node).or_default() += 1;
        }
        let live = self.nodes.iter().filter(|(_, node)| node.session.is_some() && node.unreachable.is_none());
        let candidates = live.map(|(id, node)| {
            let load = self.loads.of(*id);
            NodeCandidate {
                node: *id,
                zone: node.zone.clone(),
                replicas: load.replicas,
                replicas_max: node.max_replicas,
                of_keyspace: of_keyspace.get(id).copied().unwrap_or_default(),
                copying: load.copying,
                cordoned: self.settings.is_cordoned(*id),
                disk: Disk { promised: load.promised, ..node.disk() },
            }
        });
        let candidates: Vec<NodeCandidate> = candidates.collect();
        #[cfg(test)]
        self.looks.set(self.looks.get() + candidates.len() as u64);
        candidates
    }

    /// Returns the live node that could take one more replica of a shard, even if other copies to it come first.
    pub(crate) fn copy_target(&self, catalog: &Catalog, shard: ShardId, now_us: u64) -> Option<NodeId> {
        self.best(self.candidates(Some(catalog)).iter(), catalog, shard, now_us)
    }

    /// Returns the best candidate for one more replica of a shard: a node that has none of it, has room for its
    /// files, did not fail at it lately, and is in a zone that has none if possible.
    fn best<'a>(
        &self,
        candidates: impl Iterator<Item = &'a NodeCandidate>,
        catalog: &Catalog,
        shard: ShardId,
        now_us: u64,
    ) -> Option<NodeId> {
        let leaves = |node: NodeId| catalog.draining_nodes.iter().any(|leaving| leaving.node == node);
        let asked = |node: NodeId| catalog.draining_nodes.iter().any(|leaving| leaving.to == Some(node));
        let members = catalog.members();
        let has = |node: NodeId| members.iter().any(|(of, one, _)| *of == shard && one.node == node);
        let zone_of = |node: NodeId| self.nodes.get(&node).map(|node| node.zone.as_str());
        let placed = catalog.shard(shard).map(|one| one.replicas.as_slice()).unwrap_or_default();
        let reports = self.keyspaces.get(&catalog.keyspace).map(|known| &known.reports);
        let bytes = reports.map(|reports| shard_bytes(catalog, shard, reports)).unwrap_or_default();
        let avoided = nodes_to_avoid(catalog, now_us);
        candidates
            .filter(|one| one.room() > 0 && !has(one.node) && !leaves(one.node) && one.disk.room() > bytes)
            .min_by_key(|one| {
                let zone_used = placed.iter().any(|other| zone_of(other.node) == Some(one.zone.as_str()));
                let failed = avoided.contains(&one.node);
                (failed, !asked(one.node), zone_used, one.of_keyspace, one.replicas, one.node)
            })
            .map(|one| one.node)
    }

    /// Returns the nodes for the replicas of one more shard; an error when there are too few.
    pub(crate) fn grow_targets(&self, keyspace: &Keyspace) -> Result<Vec<NodeId>, PlacementError> {
        let placed = place(1, keyspace.catalog.spec.replicas, &self.candidates(Some(&keyspace.catalog)))?;
        Ok(placed.into_iter().next().unwrap_or_default())
    }

    /// Holds the places that the next version assigns: until its write is known, other decisions must not
    /// count on them. Returns `None` when it assigns none.
    pub(crate) fn hold_places(&mut self, next: &Catalog) -> Option<u64> {
        let known = self.keyspaces.get(&next.keyspace)?;
        let before: Vec<ReplicaId> = known.catalog.members().iter().map(|(_, one, _)| one.replica).collect();
        let new: Vec<_> = next.members().into_iter().filter(|(_, one, _)| !before.contains(&one.replica)).collect();
        let (shard, ..) = *new.first()?;
        let copying = next.plan.as_ref().is_some_and(Plan::adds_member);
        let promised = if copying { shard_bytes(next, shard, &known.reports) } else { 0 };
        Some(self.loads.hold(new.iter().map(|(_, one, _)| one.node), copying, promised))
    }

    /// Forgets a keyspace that was deleted `kept_us` ago and whose deletion was sent to the nodes for `told_for`. Its
    /// catalog stays in the bucket: when a node names the keyspace, it is looked up and the deletion sent again.
    pub(crate) fn forget_deleted(
        &mut self,
        keyspace: KeyspaceId,
        now_us: u64,
        kept_us: u64,
        told_for: Duration,
    ) -> bool {
        let over = self.keyspaces.get(&keyspace).is_some_and(|known| {
            known.catalog.state == KeyspaceState::Deleted
                && known.installed.elapsed() >= told_for
                && now_us >= known.catalog.written_at_us.saturating_add(kept_us)
        });
        if over {
            self.keyspaces.remove(&keyspace);
            self.loads.forget(keyspace);
        }
        over
    }

    /// Forgets nodes that have been away for long and that nothing names.
    fn forget_nodes(&mut self, now_us: u64) {
        let patience = NODE_FORGOTTEN_AFTER.as_micros() as u64;
        let named = |id: NodeId| {
            self.loads.of(id).replicas > 0
                || self.active().any(|known| known.catalog.draining_nodes.iter().any(|one| one.node == id))
        };
        let forgotten: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.session.is_none() && now_us.saturating_sub(node.away_since_us) >= patience)
            .map(|(id, _)| *id)
            .filter(|id| !named(*id))
            .collect();
        for id in forgotten {
            self.nodes.remove(&id);
            for keyspace in self.keyspaces.values_mut() {
                keyspace.forget_reports_of(id);
            }
            self.nodes_revision += 1;
        }
    }

    /// Returns the serving keyspace of that name.
    pub(crate) fn named(&self, name: &str) -> Option<&Keyspace> {
        self.active().find(|keyspace| keyspace.catalog.name == name)
    }

    /// Returns the serving keyspaces.
    pub(crate) fn active(&self) -> impl Iterator<Item = &Keyspace> {
        self.keyspaces.values().filter(|keyspace| keyspace.catalog.state == KeyspaceState::Active)
    }

    fn topology_of(&self, catalog: &Catalog) -> v1::Topology {
        let address = |node| {
            let known = self.nodes.get(&node)?;
            Some(NodeAddress { address: known.address.clone(), zone: known.zone.clone() })
        };
        topology_to_wire(&Topology::derive(catalog, address))
    }

    /// Publishes the current addresses of nodes to nodes and clients.
    fn publish_addresses(&self) {
        for keyspace in self.keyspaces.values() {
            let topology = self.topology_of(&keyspace.catalog);
            keyspace.topology.send_if_modified(|known| {
                let changed = *known != topology;
                *known = topology;
                changed
            });
        }
        self.wake_sessions();
    }

    fn wake_sessions(&self) {
        for session in self.nodes.values().filter_map(|node| node.session.as_ref()) {
            session.wake.notify_one();
        }
    }
}

impl Node {
    /// Returns the disk by the node's last report.
    pub(crate) fn disk(&self) -> Disk {
        Disk { bytes: self.disk_used.saturating_add(self.disk_free), free: self.disk_free, promised: 0 }
    }

    pub(crate) fn session_id(&self) -> Option<u64> {
        self.session.as_ref().map(|session| session.id)
    }
}

impl Keyspace {
    /// Subscribes to the newest topology, and every later one.
    pub(crate) fn topology(&self) -> watch::Receiver<v1::Topology> {
        self.topology.subscribe()
    }

    /// Subscribes to changes: every report and every version.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Wakes the driver and the tasks that wait for a condition.
    pub(crate) fn notify(&self) {
        self.wake.notify_one();
        self.changed.send_modify(|count| *count += 1);
    }

    /// Returns true when the keyspace concerns the node. A serving keyspace concerns every node (routing
    /// and tails need it); a deleted one only the nodes that had a part in it.
    fn concerns(&self, node: NodeId) -> bool {
        self.catalog.state == KeyspaceState::Active
            || self.catalog.node_has_part(node)
            || self.reporters.values().any(|reporter| *reporter == node)
    }

    fn take(&mut self, node: NodeId, report: ReplicaReport) -> Result<(), ReplicaId> {
        let replica = report.replica;
        if self.catalog.node_of(replica).is_some_and(|placed| placed != node) {
            return Err(replica);
        }
        self.behind |= report.version > self.catalog.version;
        self.reporters.insert(replica, node);
        self.reports.insert(replica, report);
        Ok(())
    }

    /// Forgets the reports of removed replicas, which no node reports again.
    fn forget_reports_of_removed(&mut self, next: &Catalog) {
        let is_gone = |replica: &ReplicaId| next.is_removed(*replica);
        self.reports.retain(|replica, _| !is_gone(replica));
        self.reporters.retain(|replica, _| !is_gone(replica));
    }

    fn forget_reports_of(&mut self, node: NodeId) {
        let reports = &mut self.reports;
        self.reporters.retain(|replica, reporter| {
            let keep = *reporter != node;
            if !keep {
                reports.remove(replica);
            }
            keep
        });
    }
}

/// Membership of the last placement, also of a deleted keyspace.
trait HasPart {
    fn node_has_part(&self, node: NodeId) -> bool;
}

impl HasPart for Catalog {
    fn node_has_part(&self, node: NodeId) -> bool {
        self.placement.iter().flat_map(|shard| &shard.replicas).any(|one| one.node == node)
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(crate) mod tests;
