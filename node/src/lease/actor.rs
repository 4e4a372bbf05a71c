//! The one owner of a node's leases: events in, decisions by [`vasto_core::lease`], messages out.
//!
//! **Invariants**
//! - A promise lasts [`LEASE_PROMISE`] from the last heartbeat of its link that was taken note of. It ends
//!   earlier only when its holder says so after it has seen it, when another process has taken the holder's
//!   place, or when the holder's process has ended (its link is closed and nobody listens at its address).
//! - A heartbeat is answered after everything that it brings has been decided, so that its echo renews only
//!   what still stands.
//! - Silence counts only while this node was listening: after its own threads stood still it begins anew.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_core::catalog::Placed;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId, Vector};
use vasto_core::lease::{Claim, Peer, Verdict, authority, best};
use vasto_core::limits::{
    LEASE_BEAT, LEASE_BELIEF, LEASE_DEAF_GAP, LEASE_EXCUSE, LEASE_OPENING, LEASE_PROMISE, LEASE_SILENCE,
};
use vasto_proto::convert::{vector_from_wire, vector_to_wire};
use vasto_proto::v1;
use vasto_proto::v1::lease_grant::State;

use super::link::{Link, News, Reach, reach};
use super::seat::{Basis, Named, Promise, Seat};
use crate::core::NodeCore;
use crate::replica::Replica;
use crate::replica::authority::{Belief, now_ms};
use crate::replication::duties::Duties;

/// Between two looks at everything.
const TICK: Duration = Duration::from_millis(50);
/// Between two looks at what only waits for records to arrive.
const PENDING_TICK: Duration = Duration::from_millis(2);
/// A writer that does not say within this time what it holds is not waited for.
const NAMING_TIMEOUT: Duration = Duration::from_millis(200);
/// A hand-over that was not taken by now is given up.
const HAND_OVER_MAX: Duration = Duration::from_millis(1_500);
/// Events that are taken before messages go out.
const BATCH: usize = 64;

pub(super) type Key = (KeyspaceId, ShardId);

/// What the actor hears of.
pub(super) enum Event {
    /// A replica was opened, or placed otherwise.
    Seat { replica: Replica, duties: Arc<Duties>, order: Vec<Placed>, primary_version: u64 },
    /// A replica is about to stop.
    HandOver { key: Key, replica: ReplicaId, done: oneshot::Sender<()> },
    /// A replica has stopped.
    Leave { key: Key, replica: ReplicaId },
    /// A replica said what it holds.
    Named { key: Key, replica: ReplicaId, turn: u64, named: Option<Named> },
    /// An incoming link was opened.
    Opened { id: u64, replies: mpsc::Sender<Result<v1::LeaseReply, Status>> },
    /// A heartbeat came.
    Request { id: u64, request: v1::LeaseRequest },
    /// An incoming link has ended.
    Closed { id: u64 },
    /// News of an outgoing link.
    Link { node: NodeId, news: News },
    /// A round of probes has ended; these nodes can be reached.
    Probed { key: Key, round: u64, reachable: Vec<NodeId> },
}

/// A claim that came over an incoming link.
#[derive(Debug, Clone, Copy)]
struct Claimed {
    replica: ReplicaId,
    claim: Claim,
    held_grant: u64,
    covered: bool,
}

/// An incoming link.
struct Incoming {
    replies: mpsc::Sender<Result<v1::LeaseReply, Status>>,
    node: NodeId,
    process: u64,
    heard_ms: u64,
    sent_ms: u64,
    seen_reply: u64,
    open: bool,
    claims: HashMap<Key, Claimed>,
    /// What it was told of its claims.
    told: HashMap<Key, (ReplicaId, State, u64)>,
    news: Vec<v1::LeaseGrant>,
    number: u64,
    /// The number of the last reply that denied a claim.
    denied: u64,
    /// Until when its replicas cannot serve without a promise from here, because they were just answered.
    subdued: Belief,
}

/// What another node has said of a claim.
struct Granted {
    claimant: ReplicaId,
    state: State,
    grant: u64,
    vector: Vector,
    served: bool,
    covered: bool,
    since_ms: u64,
}

/// An outgoing link.
struct Outgoing {
    cancel: CancellationToken,
    reset: Arc<Notify>,
    took_ms: Arc<AtomicU64>,
    beats: Option<mpsc::Sender<v1::LeaseRequest>>,
    /// How the last attempt to connect ended, while there is no stream.
    reach: Option<Reach>,
    /// It could not be reached since the last stream.
    cut: bool,
    /// Silence counts from here: it was heard, or has only become reachable.
    heard_ms: u64,
    /// When the stream was opened or brought a reply.
    replied_ms: u64,
    believed: Belief,
    /// Until when what the attempts to connect have shown excuses its replicas.
    excused: Belief,
    /// When the last attempt to connect that has ended began.
    tried_ms: u64,
    grants: HashMap<Key, Granted>,
    seen_reply: u64,
    sent: Option<Vec<v1::LeaseClaim>>,
}

/// Owns everything.
pub(super) struct Actor {
    core: Arc<NodeCore>,
    events: mpsc::Sender<Event>,
    receiver: mpsc::Receiver<Event>,
    process: u64,
    seats: HashMap<Key, Seat>,
    incoming: HashMap<u64, Incoming>,
    /// The newest incoming link of each node.
    newest: HashMap<NodeId, u64>,
    outgoing: HashMap<NodeId, Outgoing>,
    grants: u64,
    began_ms: u64,
    ticked_ms: u64,
    listening_ms: u64,
    /// A claim may have changed.
    dirty: bool,
    probing: BTreeSet<Key>,
}

fn ms(time: Duration) -> u64 {
    time.as_millis() as u64
}

impl Actor {
    pub fn new(core: Arc<NodeCore>, events: mpsc::Sender<Event>, receiver: mpsc::Receiver<Event>) -> Self {
        Self {
            core,
            events,
            receiver,
            process: rand::random_range(1..=u64::MAX),
            seats: HashMap::new(),
            incoming: HashMap::new(),
            newest: HashMap::new(),
            outgoing: HashMap::new(),
            grants: 0,
            began_ms: now_ms(),
            ticked_ms: now_ms(),
            listening_ms: now_ms(),
            dirty: false,
            probing: BTreeSet::new(),
        }
    }

    /// Runs until `ended` says so.
    pub async fn run(mut self, ended: impl Fn() -> bool) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beat_ms = 0;
        while !ended() {
            let pending = self.seats.values().any(|seat| seat.pending);
            tokio::select! {
                _ = tick.tick() => self.tick(now_ms()),
                () = tokio::time::sleep(PENDING_TICK), if pending => self.settle_pending(now_ms()),
                event = self.receiver.recv() => {
                    let mut next = event;
                    for _ in 0..BATCH {
                        let Some(event) = next else { break };
                        self.take(event, now_ms());
                        next = self.receiver.try_recv().ok();
                    }
                    if let Some(event) = next {
                        self.take(event, now_ms());
                    }
                }
            }
            let now = now_ms();
            let due = now.saturating_sub(beat_ms) >= ms(LEASE_BEAT);
            if due || self.dirty {
                self.beat(due, now);
                if due {
                    beat_ms = now;
                }
            }
            self.flush();
        }
        for outgoing in self.outgoing.values() {
            outgoing.cancel.cancel();
        }
        for (_, mut seat) in self.seats.drain() {
            seat.step_back(false);
            seat.handed_over();
        }
    }

    fn take(&mut self, event: Event, now: u64) {
        match event {
            Event::Seat { replica, duties, order, primary_version } => {
                let key = (replica.keyspace, replica.shard);
                let seat = self.seats.remove(&key).filter(|seat| seat.replica.id == replica.id);
                let mut seat = seat.unwrap_or_else(|| Seat::new(replica.clone(), duties.clone()));
                (seat.replica, seat.duties) = (replica, duties);
                (seat.order, seat.primary_version) = (order, primary_version);
                self.seats.insert(key, seat);
                self.connect();
                self.settle(key, now);
            }
            Event::HandOver { key, replica, done } => {
                let Some(seat) = self.seats.get_mut(&key).filter(|seat| seat.replica.id == replica) else { return };
                let stopping = seat.stopping.get_or_insert_with(|| (now + ms(HAND_OVER_MAX), Vec::new()));
                stopping.1.push(done);
                self.settle(key, now);
            }
            Event::Leave { key, replica } => {
                if self.seats.get(&key).is_none_or(|seat| seat.replica.id != replica) {
                    return;
                }
                if let Some(mut seat) = self.seats.remove(&key) {
                    seat.step_back(false);
                    seat.handed_over();
                }
                for incoming in self.incoming.values_mut() {
                    incoming.tell_absent(key);
                }
                self.connect();
                self.dirty = true;
            }
            Event::Named { key, replica, turn, named } => {
                if let Some(seat) = self.seats.get_mut(&key).filter(|seat| seat.replica.id == replica)
                    && seat.turn == turn
                {
                    (seat.naming, seat.named) = (false, named);
                    self.settle(key, now);
                }
            }
            Event::Opened { id, replies } => {
                let incoming = Incoming {
                    replies,
                    node: NodeId(0),
                    process: 0,
                    heard_ms: now,
                    sent_ms: 0,
                    seen_reply: 0,
                    open: true,
                    claims: HashMap::new(),
                    told: HashMap::new(),
                    news: Vec::new(),
                    number: 0,
                    denied: 0,
                    subdued: Arc::default(),
                };
                self.incoming.insert(id, incoming);
            }
            Event::Request { id, request } => self.hear(id, request, now),
            Event::Closed { id } => {
                let Some(incoming) = self.incoming.get_mut(&id) else { return };
                incoming.open = false;
                let node = incoming.node;
                self.forget_the_dead(node);
                self.settle_all_of(node, now);
            }
            Event::Link { node, news } => self.hear_of_link(node, news, now),
            Event::Probed { key, round, reachable } => {
                self.probing.remove(&key);
                for node in reachable {
                    self.reached(node, Reach::Reachable, 0, now);
                    if let Some(outgoing) = self.outgoing.get(&node) {
                        outgoing.reset.notify_one();
                    }
                }
                self.settle(key, now);
                if let Some(seat) = self.seats.get(&key) {
                    seat.replica.authority().end_round(round);
                }
            }
        }
    }

    // ---- incoming

    /// Takes note of a heartbeat, decides what follows from it, and answers it.
    fn hear(&mut self, id: u64, request: v1::LeaseRequest, now: u64) {
        let node = NodeId(request.node_id);
        let Some(incoming) = self.incoming.get_mut(&id) else { return };
        let first = incoming.process == 0;
        if first {
            (incoming.node, incoming.process) = (node, request.process);
            let process = request.process;
            // A new process knows nothing of what was promised to the one before it.
            self.incoming.retain(|other, link| *other == id || link.node != node || link.process == process);
            self.newest.insert(node, id);
        }
        let lapsed = {
            let Some(incoming) = self.incoming.get_mut(&id) else { return };
            now.saturating_sub(incoming.heard_ms) >= ms(LEASE_PROMISE)
        };
        let mut changed: BTreeSet<Key> = BTreeSet::new();
        if lapsed {
            // Its promises have ended, and what it was told of them is void.
            for (key, seat) in &mut self.seats {
                if seat.promise.as_ref().is_some_and(|promise| promise.link == id) {
                    seat.promise = None;
                    changed.insert(*key);
                }
            }
        }
        let Some(incoming) = self.incoming.get_mut(&id) else { return };
        if lapsed {
            // Said before the echo, which would renew what has ended.
            for (key, (claimant, state, _)) in std::mem::take(&mut incoming.told) {
                if state == State::Granted {
                    incoming.news.push(v1::LeaseGrant {
                        keyspace_id: key.0.0,
                        shard: key.1.0,
                        replica_id: claimant.0,
                        state: State::Denied as i32,
                        ..v1::LeaseGrant::default()
                    });
                }
            }
            changed.extend(incoming.claims.keys());
        }
        incoming.heard_ms = now;
        incoming.sent_ms = request.sent_ms;
        let seen_before = std::mem::replace(&mut incoming.seen_reply, request.seen_reply);
        if !request.unchanged {
            let before = std::mem::take(&mut incoming.claims);
            changed.extend(before.keys());
            for one in &request.claims {
                let key = (KeyspaceId(one.keyspace_id), ShardId(one.shard));
                let claimed = Claimed {
                    replica: ReplicaId(one.replica_id),
                    claim: Claim { able: one.able, primary_version: one.primary_version, serving: one.serving },
                    held_grant: one.held_grant,
                    covered: one.covered,
                };
                incoming.claims.insert(key, claimed);
                changed.insert(key);
            }
            incoming.told.retain(|key, _| incoming.claims.contains_key(key));
        } else if seen_before != request.seen_reply {
            changed.extend(incoming.claims.keys());
        }
        if first || lapsed {
            self.network_is_back(node, now);
        }
        if let Some(outgoing) = self.outgoing.get_mut(&node) {
            outgoing.heard_ms = now;
        }
        for key in changed {
            match self.seats.contains_key(&key) {
                true => self.settle(key, now),
                false => {
                    if let Some(incoming) = self.incoming.get_mut(&id) {
                        incoming.tell_absent(key);
                    }
                }
            }
        }
        if let Some(incoming) = self.incoming.get_mut(&id) {
            incoming.reply(self.process);
        }
    }

    /// Sends what was decided outside of a heartbeat.
    fn flush(&mut self) {
        let process = self.process;
        for incoming in self.incoming.values_mut().filter(|one| one.open && !one.news.is_empty()) {
            incoming.reply(process);
        }
    }

    /// Links of a process that has ended promise and claim nothing any more.
    fn forget_the_dead(&mut self, node: NodeId) {
        let dead = self.outgoing.get(&node).is_some_and(|one| one.beats.is_none() && one.reach == Some(Reach::Refused));
        if dead {
            self.incoming.retain(|_, link| link.node != node || link.open);
            if self.newest.get(&node).is_some_and(|id| !self.incoming.contains_key(id)) {
                self.newest.remove(&node);
            }
        }
    }

    /// The live claims of the others for a shard, with their place in the order and their link.
    fn claims(&self, key: Key, seat: &Seat, now: u64) -> Vec<(usize, u64, Claimed)> {
        let others = seat.order.iter().enumerate().filter(|(_, one)| one.replica != seat.replica.id);
        others
            .filter_map(|(order, placed)| {
                let id = *self.newest.get(&placed.node)?;
                let link = self.incoming.get(&id).filter(|link| now < link.heard_ms + ms(LEASE_PROMISE))?;
                let mut claimed = *link.claims.get(&key).filter(|one| one.replica == placed.replica)?;
                // It reaches this node, but this node does not reach it, and clients will not either.
                claimed.claim.able &= !self.is_out_of_reach(placed.node);
                Some((order, id, claimed))
            })
            .collect()
    }

    fn is_out_of_reach(&self, node: NodeId) -> bool {
        self.outgoing.get(&node).is_some_and(|one| one.beats.is_none() && one.reach == Some(Reach::Unreachable))
    }

    /// Until when a replica that is out of reach cannot serve: it has taken note that its claim was denied here,
    /// and does not take this node for silent while it is answered.
    fn subdued(&self, key: Key, placed: &Placed) -> Option<Belief> {
        let id = self.newest.get(&placed.node)?;
        let link = self.incoming.get(id).filter(|link| link.open && link.seen_reply >= link.denied)?;
        let claimed = link.claims.get(&key).filter(|one| one.replica == placed.replica)?;
        let denied = matches!(link.told.get(&key), Some((_, State::Denied, _)));
        (denied && !claimed.claim.serving && claimed.held_grant == 0).then(|| link.subdued.clone())
    }

    /// Does a promise still bind?
    fn binds(&self, key: Key, promise: &Promise, now: u64) -> bool {
        let Some(link) = self.incoming.get(&promise.link) else { return false };
        if now >= link.heard_ms + ms(LEASE_PROMISE) {
            return false;
        }
        let released = link.seen_reply >= promise.reply
            && link.claims.get(&key).is_none_or(|one| one.replica != promise.holder || one.held_grant != promise.grant);
        !released
    }

    /// Is the holder of a promise heard? One that may be silent is not named to clients: they would ask it in
    /// vain, and this replica may serve in a moment.
    fn is_fresh(&self, link: u64, now: u64) -> bool {
        self.incoming.get(&link).is_some_and(|link| now.saturating_sub(link.heard_ms) < ms(LEASE_BEAT) * 3)
    }

    // ---- outgoing

    /// Holds a link to each node that holds another replica of a shard of this one.
    fn connect(&mut self) {
        let me = self.core.node_id;
        let wanted: BTreeSet<NodeId> = self
            .seats
            .values()
            .filter(|seat| seat.order.iter().any(|one| one.replica == seat.replica.id))
            .flat_map(|seat| seat.order.iter().map(|one| one.node))
            .filter(|node| *node != me)
            .collect();
        self.outgoing.retain(|node, outgoing| {
            let keep = wanted.contains(node);
            if !keep {
                outgoing.cancel.cancel();
            }
            keep
        });
        for node in wanted {
            if self.outgoing.contains_key(&node) {
                continue;
            }
            let (cancel, reset) = (CancellationToken::new(), Arc::new(Notify::new()));
            let took_ms: Arc<AtomicU64> = Arc::default();
            let link = Link {
                core: self.core.clone(),
                node,
                events: self.events.clone(),
                reset: reset.clone(),
                took_ms: took_ms.clone(),
            };
            // Ends with its token.
            tokio::spawn(link.run(cancel.clone()));
            let outgoing = Outgoing {
                cancel,
                reset,
                took_ms,
                beats: None,
                reach: None,
                cut: false,
                heard_ms: now_ms(),
                replied_ms: now_ms(),
                believed: Arc::default(),
                excused: Arc::default(),
                tried_ms: 0,
                grants: HashMap::new(),
                seen_reply: 0,
                sent: None,
            };
            self.outgoing.insert(node, outgoing);
        }
    }

    /// Somebody is heard again who could not be reached: the attempts that have failed until now say nothing of
    /// the others, because this node was the one that was cut off.
    fn network_is_back(&mut self, node: NodeId, now: u64) {
        if self.outgoing.get(&node).is_none_or(|one| one.reach != Some(Reach::Unreachable)) {
            return;
        }
        for outgoing in self.outgoing.values_mut().filter(|one| one.reach == Some(Reach::Unreachable)) {
            (outgoing.reach, outgoing.heard_ms) = (None, now);
        }
    }

    fn reached(&mut self, node: NodeId, reach: Reach, began: u64, now: u64) {
        if reach != Reach::Unreachable {
            self.network_is_back(node, now);
        }
        let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
        if reach == Reach::Reachable && outgoing.reach == Some(Reach::Refused) {
            // Its silence until now was another process's.
            outgoing.heard_ms = now;
        }
        outgoing.cut |= reach != Reach::Reachable;
        outgoing.tried_ms = began;
        if reach != Reach::Unreachable {
            outgoing.excused.fetch_max(began + ms(LEASE_EXCUSE), Ordering::AcqRel);
        }
        outgoing.reach = Some(reach);
    }

    fn hear_of_link(&mut self, node: NodeId, news: News, now: u64) {
        match news {
            News::Reach(reach, began) => {
                self.reached(node, reach, began, now);
                self.forget_the_dead(node);
            }
            News::Up(beats) => {
                let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
                outgoing.beats = Some(beats);
                outgoing.replied_ms = now;
                // Promises over the link before are believed as long as they were, and not longer.
                outgoing.believed = Arc::default();
                outgoing.grants.clear();
                outgoing.seen_reply = 0;
                outgoing.sent = None;
                if std::mem::take(&mut outgoing.cut) {
                    self.core.link_is_up(node);
                }
                self.dirty = true;
            }
            News::Lost => {
                let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
                outgoing.beats = None;
                outgoing.reach = None;
            }
            News::Reply(reply) => {
                let keys = self.hear_reply(node, reply, now);
                for key in keys {
                    self.settle(key, now);
                }
                return;
            }
        }
        self.settle_all_of(node, now);
    }

    /// Takes note of a reply; answers the shards for which it changes something.
    fn hear_reply(&mut self, node: NodeId, reply: v1::LeaseReply, now: u64) -> Vec<Key> {
        let Some(outgoing) = self.outgoing.get_mut(&node) else { return Vec::new() };
        let mut keys: Vec<Key> = Vec::new();
        for grant in reply.grants {
            let key = (KeyspaceId(grant.keyspace_id), ShardId(grant.shard));
            let state = grant.state();
            let before = outgoing.grants.get(&key).filter(|before| before.state == state);
            let since_ms = before.map_or(now, |before| before.since_ms);
            let granted = Granted {
                claimant: ReplicaId(grant.replica_id),
                state,
                grant: grant.grant,
                vector: vector_from_wire(&grant.vector),
                served: grant.served,
                covered: false,
                since_ms,
            };
            outgoing.grants.insert(key, granted);
            keys.push(key);
        }
        (outgoing.heard_ms, outgoing.replied_ms) = (now, now);
        outgoing.seen_reply = outgoing.seen_reply.max(reply.number);
        let was_believed = outgoing.believed.load(Ordering::Acquire) > now;
        outgoing.believed.fetch_max(reply.sent_ms + ms(LEASE_BELIEF), Ordering::AcqRel);
        if !was_believed {
            keys.extend(outgoing.grants.keys());
        }
        self.dirty |= !keys.is_empty();
        keys
    }

    /// Sends claims that changed, and heartbeats when they are due.
    fn beat(&mut self, due: bool, now: u64) {
        self.dirty = false;
        for (node, outgoing) in &mut self.outgoing {
            let Some(beats) = &outgoing.beats else { continue };
            let mut claims: Vec<v1::LeaseClaim> = self
                .seats
                .iter()
                .filter(|(_, seat)| seat.order.iter().any(|one| one.node == *node))
                .filter_map(|(key, seat)| {
                    let claim = seat.claim?;
                    let held = outgoing
                        .grants
                        .get(key)
                        .filter(|one| seat.wants && one.state == State::Granted && one.claimant == seat.replica.id);
                    Some(v1::LeaseClaim {
                        keyspace_id: key.0.0,
                        shard: key.1.0,
                        replica_id: seat.replica.id.0,
                        able: claim.able,
                        primary_version: claim.primary_version,
                        serving: claim.serving,
                        held_grant: held.map_or(0, |one| one.grant),
                        covered: held.is_some_and(|one| one.covered),
                    })
                })
                .collect();
            claims.sort_unstable_by_key(|one| (one.keyspace_id, one.shard));
            let unchanged = outgoing.sent.as_ref() == Some(&claims);
            if unchanged && !due {
                continue;
            }
            let request = v1::LeaseRequest {
                node_id: self.core.node_id.0,
                process: self.process,
                sent_ms: now,
                seen_reply: outgoing.seen_reply,
                unchanged,
                claims: if unchanged { Vec::new() } else { claims.clone() },
            };
            // A transport that is full is slow: the next heartbeat says it all again.
            if beats.try_send(request).is_ok() {
                outgoing.sent = Some(claims);
            }
        }
    }

    /// What is known of a peer, and the promise on which that stands.
    fn peer(&self, key: Key, seat: &Seat, placed: &Placed, had: bool, now: u64) -> (Peer, Option<(u64, Belief)>) {
        let before = seat.term.promise_of(placed.replica).filter(|_| had);
        let earlier = || match before.clone() {
            Some((grant, belief)) => {
                let believed = belief.load(Ordering::Acquire) > now;
                (Peer::Granted { believed, covered: true, served: false }, Some((grant, belief)))
            }
            None => (Peer::Unsettled { excused: had && seat.term.excused(placed.replica) }, None),
        };
        let Some(outgoing) = self.outgoing.get(&placed.node) else { return earlier() };
        if outgoing.beats.is_some() {
            let said = outgoing.grants.get(&key).filter(|one| one.claimant == seat.replica.id);
            let Some(said) = said else { return earlier() };
            return match said.state {
                State::Granted => {
                    let believed = outgoing.believed.load(Ordering::Acquire) > now;
                    let peer = Peer::Granted { believed, covered: said.covered, served: said.served };
                    (peer, Some((said.grant, outgoing.believed.clone())))
                }
                State::Denied => (Peer::Denied, None),
                State::Absent => (Peer::Absent { long: now.saturating_sub(said.since_ms) >= ms(LEASE_OPENING) }, None),
                State::Unspecified => earlier(),
            };
        }
        let heard = outgoing.heard_ms.max(self.listening_ms);
        let quiet = now.saturating_sub(heard) >= ms(LEASE_SILENCE);
        let linked = self.newest.get(&placed.node).and_then(|id| self.incoming.get(id)).is_some_and(|link| link.open);
        // Not only once: each attempt to connect must find it anew.
        let found = outgoing.excused.load(Ordering::Acquire) > now;
        match outgoing.reach {
            Some(Reach::Refused) if !linked && found => (Peer::Dead, None),
            Some(Reach::Reachable) if quiet && found => (Peer::Hung, None),
            Some(Reach::Unreachable) if quiet => {
                // Tried again since the master said so.
                let gone = self.core.master_says_gone(placed.node, now).is_some_and(|since| since <= outgoing.tried_ms);
                (Peer::Silent { gone }, None)
            }
            Some(Reach::Unreachable) if self.subdued(key, placed).is_some() => (Peer::Subdued, None),
            _ => earlier(),
        }
    }

    // ---- decisions

    fn tick(&mut self, now: u64) {
        let deaf = ms(LEASE_DEAF_GAP);
        if now.saturating_sub(self.ticked_ms) > deaf
            || now.saturating_sub(self.core.pulse.load(Ordering::Acquire)) > deaf
        {
            self.listening_ms = now;
        }
        self.ticked_ms = now;
        for outgoing in self.outgoing.values() {
            let heard = outgoing.replied_ms.max(self.listening_ms);
            if outgoing.beats.is_some() && now.saturating_sub(heard) >= ms(LEASE_SILENCE) {
                outgoing.reset.notify_one();
            }
        }
        // Of a closed link nothing is left once its promises have ended.
        self.incoming.retain(|_, link| link.open || now < link.heard_ms + ms(LEASE_PROMISE));
        self.newest.retain(|_, id| self.incoming.contains_key(id));
        let keys: Vec<Key> = self.seats.keys().copied().collect();
        for key in keys {
            self.settle(key, now);
            let Some(seat) = self.seats.get_mut(&key) else { continue };
            seat.replica.authority().settle();
            if seat.stopping.as_ref().is_some_and(|(until, _)| now >= *until) {
                seat.handed_over();
            }
        }
        self.dirty = true;
    }

    fn settle_pending(&mut self, now: u64) {
        let keys: Vec<Key> = self.seats.iter().filter(|(_, seat)| seat.pending).map(|(key, _)| *key).collect();
        for key in keys {
            self.settle(key, now);
        }
    }

    fn settle_all_of(&mut self, node: NodeId, now: u64) {
        let of = |seat: &Seat| seat.order.iter().any(|one| one.node == node);
        let keys: Vec<Key> = self.seats.iter().filter(|(_, seat)| of(seat)).map(|(key, _)| *key).collect();
        for key in keys {
            self.settle(key, now);
        }
    }

    fn settle(&mut self, key: Key, now: u64) {
        let Some(mut seat) = self.seats.remove(&key) else { return };
        self.decide(key, &mut seat, now);
        self.seats.insert(key, seat);
    }

    fn decide(&mut self, key: Key, seat: &mut Seat, now: u64) {
        let me = seat.replica.id;
        seat.pending = false;
        let settled_in = now.saturating_sub(self.began_ms) >= ms(LEASE_PROMISE);
        let Some(my_order) =
            seat.order.iter().position(|one| one.replica == me).filter(|_| settled_in || seat.order.len() == 1)
        else {
            // Not placed; or the process before this one may have promised something that is still believed.
            seat.step_back(settled_in);
            (seat.promise, seat.claim, seat.wants) = (None, None, false);
            for incoming in self.incoming.values_mut() {
                incoming.tell_absent(key);
            }
            return seat.handed_over();
        };
        if seat.promise.as_ref().is_some_and(|promise| !self.binds(key, promise, now)) {
            seat.promise = None;
        }
        if seat.order.len() == 1 {
            (seat.claim, seat.wants) = (None, false);
            match seat.promise.clone() {
                // Whoever was placed beside it may still believe in what was promised.
                Some(promise) => {
                    self.tell(promise.link, key, promise.holder, State::Denied, None);
                    seat.step_back(true);
                }
                None => seat.stand_alone(),
            }
            return seat.handed_over();
        }
        let claims = self.claims(key, seat, now);
        let server = claims.iter().find(|(_, _, one)| one.claim.serving).map(|(_, _, one)| one.replica);
        let claim = seat.own_claim(server, now);
        self.dirty |= claim != seat.claim;
        seat.claim = claim;
        let all = claims.iter().map(|(order, _, one)| (*order, one.claim)).chain(claim.map(|claim| (my_order, claim)));
        let best = best(all);
        let wants = best == Some(my_order);
        self.dirty |= wants != seat.wants;
        seat.wants = wants;
        match best.filter(|order| *order != my_order) {
            Some(order) => {
                let to = claims.iter().find(|(at, _, _)| *at == order).copied();
                if let Some((_, link, claimed)) = to {
                    self.grant(key, seat, link, claimed, now);
                }
            }
            None => {
                // What it said when it was about to promise itself is out of date.
                seat.turn += u64::from(seat.naming || seat.named.is_some());
                (seat.naming, seat.named) = (false, None);
                match (&seat.promise, wants) {
                    (Some(promise), _) => {
                        let fresh = self.is_fresh(promise.link, now);
                        seat.step_back(fresh);
                    }
                    (None, true) => self.claim(key, seat, now),
                    (None, false) => seat.step_back(false),
                }
            }
        }
        for (order, link, one) in &claims {
            if best != Some(*order) {
                self.tell(*link, key, one.replica, State::Denied, None);
            }
        }
        let placed = |promise: &Promise| seat.order.iter().any(|one| one.replica == promise.holder);
        if let Some(promise) = seat.promise.clone().filter(|promise| !placed(promise)) {
            self.tell(promise.link, key, promise.holder, State::Denied, None);
        }
        if seat.stopping.is_some() && !seat.serving && !seat.naming && (claims.is_empty() || is_taken(seat, &claims)) {
            seat.handed_over();
        }
    }

    /// Promises the replica to another one, once it serves nothing any more.
    fn grant(&mut self, key: Key, seat: &mut Seat, link: u64, to: Claimed, now: u64) {
        if let Some(promise) = &mut seat.promise {
            let steady = promise.holder == to.replica && promise.link == link;
            if steady
                && to.held_grant == promise.grant
                && to.covered
                && let Some(term) = promise.handed_term.take()
            {
                seat.replica.authority().handed_over(term);
            }
            if steady || promise.holder != to.replica {
                // To another one it is promised once the holder has let go.
                let fresh = self.is_fresh(promise.link, now);
                return seat.step_back(fresh);
            }
        }
        let Some(named) = seat.named.take() else {
            if !seat.naming {
                if seat.promise.is_none() {
                    seat.begin_to_yield();
                }
                self.name(key, seat);
            }
            return;
        };
        self.grants += 1;
        let grant = self.grants;
        let number = self.incoming.get(&link).map_or(0, |one| one.number + 1);
        // Authority lasted until everything was named: nobody else had it in between.
        let lasted = named.complete && seat.replica.authority().holds(seat.term.number);
        let handed_term = lasted.then_some(seat.term.number);
        seat.promise = Some(Promise { holder: to.replica, link, grant, reply: number, handed_term });
        let served = std::mem::take(&mut seat.served);
        seat.step_back(true);
        self.tell(link, key, to.replica, State::Granted, Some((grant, &named.vector, served)));
    }

    /// Asks the replica what it holds.
    fn name(&mut self, key: Key, seat: &mut Seat) {
        seat.turn += 1;
        seat.naming = true;
        let (replica, turn, events) = (seat.replica.clone(), seat.turn, self.events.clone());
        // Ends within NAMING_TIMEOUT.
        tokio::spawn(async move {
            let position = tokio::time::timeout(NAMING_TIMEOUT, replica.position()).await;
            let named = match position {
                Ok(Ok(position)) => Named { vector: position.vector, complete: true },
                // Its writer stands still: what was acknowledged is applied and synced.
                Ok(Err(_)) | Err(_) => Named { vector: replica.settled().vector, complete: false },
            };
            let _ = events.send(Event::Named { key, replica: replica.id, turn, named: Some(named) }).await;
        });
    }

    /// Finds out whether this replica, whose claim is the best, has authority.
    fn claim(&mut self, key: Key, seat: &mut Seat, now: u64) {
        let had = seat.has_authority();
        let me = seat.replica.id;
        let others: Vec<Placed> = seat.order.iter().filter(|one| one.replica != me).copied().collect();
        for placed in &others {
            if let Some(said) = self.outgoing.get_mut(&placed.node).and_then(|one| one.grants.get_mut(&key))
                && said.state == State::Granted
                && !said.covered
            {
                said.covered = seat.replica.covers(&said.vector);
                self.dirty |= said.covered;
                seat.pending |= !said.covered;
            }
        }
        let mut peers = Vec::with_capacity(others.len());
        let mut basis = Vec::with_capacity(others.len());
        for placed in &others {
            let (peer, promise) = self.peer(key, seat, placed, had, now);
            let link = self.outgoing.get(&placed.node);
            let stands = match (peer, promise) {
                (Peer::Granted { believed: true, covered: true, .. }, Some((grant, belief))) => {
                    Basis::Granted { grant, belief }
                }
                (Peer::Silent { .. }, _) => Basis::Silent,
                // Over a majority, silence that is about to end is still silence.
                (Peer::Unsettled { excused: false }, _) => Basis::Silent,
                (Peer::Granted { .. } | Peer::Absent { .. }, _) => {
                    Basis::Excused(link.map(|link| link.believed.clone()).unwrap_or_default())
                }
                (Peer::Subdued, _) => Basis::Excused(self.subdued(key, placed).unwrap_or_default()),
                _ => Basis::Excused(link.map(|link| link.excused.clone()).unwrap_or_default()),
            };
            peers.push(peer);
            basis.push((placed.replica, stands));
        }
        match authority(&peers, had) {
            Verdict::Missing => seat.step_back(false),
            Verdict::Authority { by_master, probing } => {
                let number = match had || seat.term.goes_on(&basis) {
                    true => seat.term.number,
                    false => seat.term.number + 1,
                };
                let master = by_master.then(|| self.core.master_word());
                if by_master {
                    // Its word is needed often.
                    self.core.report.notify_one();
                }
                seat.serve(number, basis, master, probing);
                if probing && seat.replica.authority().wants_probe() && self.probing.insert(key) {
                    self.probe(key, seat);
                }
                seat.pending |= probing;
            }
        }
    }

    /// Finds out whether the silent peers can be reached now.
    fn probe(&self, key: Key, seat: &Seat) {
        let silent = seat.order.iter().filter(|one| {
            self.outgoing
                .get(&one.node)
                .is_some_and(|link| link.beats.is_none() && link.reach == Some(Reach::Unreachable))
        });
        let targets: Vec<(NodeId, Option<String>, u64)> = silent
            .map(|one| {
                let took_ms = self.outgoing.get(&one.node).map_or(0, |link| link.took_ms.load(Ordering::Relaxed));
                (one.node, self.core.address(one.node), took_ms)
            })
            .collect();
        let round = seat.replica.authority().begin_round();
        let events = self.events.clone();
        // Ends with the patience of each attempt.
        tokio::spawn(async move {
            let tries = targets.into_iter().map(|(node, address, took_ms)| async move {
                (reach(&address?, took_ms).await != Reach::Unreachable).then_some(node)
            });
            let reachable = futures::future::join_all(tries).await.into_iter().flatten().collect();
            let _ = events.send(Event::Probed { key, round, reachable }).await;
        });
    }

    /// Tells a claimant what became of its claim, unless it knows.
    fn tell(&mut self, link: u64, key: Key, claimant: ReplicaId, state: State, promise: Option<(u64, &Vector, bool)>) {
        let Some(incoming) = self.incoming.get_mut(&link) else { return };
        let grant = promise.map_or(0, |(grant, _, _)| grant);
        if incoming.told.insert(key, (claimant, state, grant)) == Some((claimant, state, grant)) {
            return;
        }
        if state == State::Denied {
            incoming.denied = incoming.number + 1;
        }
        incoming.news.push(v1::LeaseGrant {
            keyspace_id: key.0.0,
            shard: key.1.0,
            replica_id: claimant.0,
            state: state as i32,
            grant,
            vector: promise.map(|(_, vector, _)| vector_to_wire(vector)).unwrap_or_default(),
            served: promise.is_some_and(|(_, _, served)| served),
        });
    }
}

/// Does the replica to which this one is promised serve, and hold everything?
fn is_taken(seat: &Seat, claims: &[(usize, u64, Claimed)]) -> bool {
    let Some(promise) = &seat.promise else { return false };
    claims.iter().any(|(_, _, one)| {
        one.replica == promise.holder && one.held_grant == promise.grant && one.covered && one.claim.serving
    })
}

impl Incoming {
    fn tell_absent(&mut self, key: Key) {
        let Some(claimed) = self.claims.get(&key) else { return };
        let told = (claimed.replica, State::Absent, 0);
        if self.told.insert(key, told) == Some(told) {
            return;
        }
        self.news.push(v1::LeaseGrant {
            keyspace_id: key.0.0,
            shard: key.1.0,
            replica_id: claimed.replica.0,
            state: State::Absent as i32,
            ..v1::LeaseGrant::default()
        });
    }

    /// Sends the echo of the last heartbeat, with what changed since the last reply.
    fn reply(&mut self, process: u64) {
        let number = self.number + 1;
        let reply = v1::LeaseReply { process, sent_ms: self.sent_ms, number, grants: self.news.clone() };
        // A transport that is full is slow: what was not sent goes with the next reply.
        if self.replies.try_send(Ok(reply)).is_ok() {
            self.number = number;
            self.news.clear();
            // It cannot take this node for silent before then.
            self.subdued.store(now_ms() + ms(LEASE_EXCUSE), Ordering::Release);
        }
    }
}
