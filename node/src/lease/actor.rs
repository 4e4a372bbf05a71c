//! The actor that owns a node's leases: events in, decisions by [`vasto_core::lease`], messages
//! out.
//!
//! **Invariants**
//! - A promise lasts [`LEASE_PROMISE`] from the last heartbeat of its link that the actor has
//!   processed. It ends earlier only when its holder releases it after having seen it, when another
//!   process has replaced the holder's, or when the holder's process has ended (its link is closed
//!   and nothing listens at its address).
//! - A heartbeat is answered after everything in it has been decided, so that its echo renews only
//!   what still stands.
//! - Silence of peers counts only while this node was listening: after a stall of its own threads
//!   the count restarts.

mod decide;
mod incoming;
mod outgoing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_core::ids::{NodeId, ReplicaId, Vector};
use vasto_core::lease::Claim;
use vasto_core::limits::{LEASE_BEAT, LEASE_DEAF_GAP, LEASE_PROMISE, LEASE_SILENCE};
use vasto_proto::v1;
use vasto_proto::v1::lease_grant::State;

use super::event::{Event, Key, Reach};
use super::replica_lease::ReplicaLease;
use crate::clock::now_ms;
use crate::registry::NodeRegistry;
use crate::replica::authority::Belief;

/// Interval between two checks of all links and replicas.
const TICK: Duration = Duration::from_millis(50);
/// Interval between two checks of the end condition while the actor is idle.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// Interval between two checks of replicas that only wait for records to arrive.
const PENDING_TICK: Duration = Duration::from_millis(2);
/// Longest wait for a writer to report what its replica holds.
const NAMING_TIMEOUT: Duration = Duration::from_millis(200);
/// Time after which a hand-over of authority that no successor has taken is given up.
const HAND_OVER_MAX: Duration = Duration::from_millis(1_500);
/// Events that are processed before messages are sent.
const BATCH: usize = 64;

/// A claim received over an incoming link.
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
    /// State that was last sent for each of its claims.
    last_sent: HashMap<Key, (ReplicaId, State, u64)>,
    news: Vec<v1::LeaseGrant>,
    number: u64,
    /// The number of the last reply that denied a claim.
    denied: u64,
    /// Time until which the peer's replicas cannot serve without a promise from here, because they
    /// were just answered.
    subdued: Belief,
}

impl Incoming {
    fn new(replies: mpsc::Sender<Result<v1::LeaseReply, Status>>, now: u64) -> Self {
        Self {
            replies,
            node: NodeId(0),
            process: 0,
            heard_ms: now,
            sent_ms: 0,
            seen_reply: 0,
            open: true,
            claims: HashMap::new(),
            last_sent: HashMap::new(),
            news: Vec::new(),
            number: 0,
            denied: 0,
            subdued: Arc::default(),
        }
    }
}

/// Answer of another node to a claim.
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
    /// Result of the last connection attempt, while there is no stream.
    reach: Option<Reach>,
    /// A connection attempt has failed since the last stream.
    cut: bool,
    /// Start of the peer's silence: its last message, or the time when it became reachable.
    heard_ms: u64,
    /// Time of the last reply, or of the opening of the stream.
    replied_ms: u64,
    believed: Belief,
    /// Time until which the results of connection attempts excuse its replicas.
    excused: Belief,
    /// Start of the last connection attempt that has ended.
    tried_ms: u64,
    grants: HashMap<Key, Granted>,
    seen_reply: u64,
    sent: Option<Vec<v1::LeaseClaim>>,
}

/// Owner of all lease state of a node.
pub(super) struct Actor {
    registry: Arc<NodeRegistry>,
    events: mpsc::Sender<Event>,
    receiver: mpsc::Receiver<Event>,
    process: u64,
    leases: HashMap<Key, ReplicaLease>,
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
    /// The actor is idle.
    idle: bool,
    /// Publishes whether the actor is idle.
    idle_changes: watch::Sender<bool>,
}

fn ms(time: Duration) -> u64 {
    time.as_millis() as u64
}

impl Actor {
    pub(super) fn new(
        registry: Arc<NodeRegistry>,
        events: mpsc::Sender<Event>,
        receiver: mpsc::Receiver<Event>,
        idle_changes: watch::Sender<bool>,
    ) -> Self {
        Self {
            registry,
            events,
            receiver,
            process: rand::random_range(1..=u64::MAX),
            leases: HashMap::new(),
            incoming: HashMap::new(),
            newest: HashMap::new(),
            outgoing: HashMap::new(),
            grants: 0,
            began_ms: now_ms(),
            ticked_ms: now_ms(),
            listening_ms: now_ms(),
            dirty: false,
            probing: BTreeSet::new(),
            idle: false,
            idle_changes,
        }
    }

    /// Returns true when no replica here has peers and no node has a link: only an event changes
    /// anything.
    fn is_idle(&self) -> bool {
        self.outgoing.is_empty()
            && self.incoming.is_empty()
            && self.leases.values().all(ReplicaLease::is_idle)
    }

    /// Runs until `ended` returns true.
    pub(super) async fn run(mut self, ended: impl Fn() -> bool) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beat_ms = 0;
        while !ended() {
            let (pending, idle) = (self.leases.values().any(|lease| lease.pending), self.is_idle());
            if self.idle && !idle {
                self.notice_gap(now_ms());
                self.registry.pulse.store(now_ms(), Ordering::Release);
            }
            self.idle = idle;
            self.idle_changes.send_if_modified(|before| std::mem::replace(before, idle) != idle);
            tokio::select! {
                _ = tick.tick(), if !idle => self.tick(now_ms()),
                () = tokio::time::sleep(IDLE_TICK), if idle => self.notice_gap(now_ms()),
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
        self.idle_changes.send_replace(true);
        for outgoing in self.outgoing.values() {
            outgoing.cancel.cancel();
        }
        for (_, mut lease) in self.leases.drain() {
            lease.step_back(false);
            lease.handed_over();
        }
    }

    fn take(&mut self, event: Event, now: u64) {
        match event {
            Event::Placed { replica, replicator, order, primary_version, served } => {
                self.notice_gap(now);
                let listened = now.saturating_sub(self.listening_ms) >= ms(LEASE_SILENCE);
                let key = (replica.keyspace, replica.shard);
                let lease = self.leases.remove(&key).filter(|lease| lease.replica.id == replica.id);
                let mut lease = lease.unwrap_or_else(|| {
                    ReplicaLease::new(replica.clone(), replicator.clone(), served)
                });
                (lease.replica, lease.replicator, lease.primary_version) =
                    (replica, replicator, primary_version);
                lease.place(order, listened, now);
                self.leases.insert(key, lease);
                self.connect();
                self.settle(key, now);
            }
            Event::HandOver { key, replica, done } => {
                let Some(lease) =
                    self.leases.get_mut(&key).filter(|lease| lease.replica.id == replica)
                else {
                    return;
                };
                let stopping =
                    lease.stopping.get_or_insert_with(|| (now + ms(HAND_OVER_MAX), Vec::new()));
                stopping.1.push(done);
                self.settle(key, now);
            }
            Event::Leave { key, replica } => {
                if self.leases.get(&key).is_none_or(|lease| lease.replica.id != replica) {
                    return;
                }
                if let Some(mut lease) = self.leases.remove(&key) {
                    lease.step_back(false);
                    lease.handed_over();
                }
                for incoming in self.incoming.values_mut() {
                    incoming.grant_absent(key);
                }
                self.connect();
                self.dirty = true;
            }
            Event::Named { key, replica, turn, named } => {
                if let Some(lease) =
                    self.leases.get_mut(&key).filter(|lease| lease.replica.id == replica)
                    && lease.turn == turn
                {
                    (lease.naming, lease.named) = (false, Some(named));
                    self.settle(key, now);
                }
            }
            Event::Opened { id, replies } => {
                self.incoming.insert(id, Incoming::new(replies, now));
            }
            Event::Request { id, request } => self.handle_request(id, request, now),
            Event::Closed { id } => {
                let Some(incoming) = self.incoming.get_mut(&id) else { return };
                incoming.open = false;
                let node = incoming.node;
                self.forget_the_dead(node);
                self.settle_all_of(node, now);
            }
            Event::Link { node, news } => self.handle_link(node, news, now),
            Event::Probed { key, replica, round, reachable } => {
                for node in reachable {
                    self.reached(node, Reach::Reachable, 0, now);
                    if let Some(outgoing) = self.outgoing.get(&node) {
                        outgoing.reset.notify_one();
                    }
                }
                self.settle(key, now);
                replica.authority().end_round(round);
                // Removed only now: a request that has waited for this round needs no further
                // round.
                self.probing.remove(&key);
            }
        }
    }

    /// Restarts the count of the peers' silence when this node has not listened; an idle actor
    /// checks less often.
    fn notice_gap(&mut self, now: u64) {
        let deaf = ms(LEASE_DEAF_GAP);
        let gap = now.saturating_sub(self.ticked_ms);
        let is_deaf = match self.idle {
            true => gap > deaf + ms(IDLE_TICK),
            false => {
                gap > deaf || now.saturating_sub(self.registry.pulse.load(Ordering::Acquire)) > deaf
            }
        };
        if is_deaf {
            self.listening_ms = now;
        }
        self.ticked_ms = now;
    }

    fn tick(&mut self, now: u64) {
        self.notice_gap(now);
        for outgoing in self.outgoing.values() {
            let heard = outgoing.replied_ms.max(self.listening_ms);
            if outgoing.beats.is_some() && now.saturating_sub(heard) >= ms(LEASE_SILENCE) {
                outgoing.reset.notify_one();
            }
        }
        // A closed link is dropped once its promises have ended.
        self.incoming.retain(|_, link| link.open || now < link.heard_ms + ms(LEASE_PROMISE));
        self.newest.retain(|_, id| self.incoming.contains_key(id));
        let keys: Vec<Key> =
            self.leases.iter().filter(|(_, lease)| !lease.is_idle()).map(|(key, _)| *key).collect();
        for key in keys {
            self.settle(key, now);
            let Some(lease) = self.leases.get_mut(&key) else { continue };
            lease.replica.authority().settle();
            if lease.stopping.as_ref().is_some_and(|(until, _)| now >= *until) {
                lease.handed_over();
            }
        }
        self.dirty = true;
    }

    fn settle_pending(&mut self, now: u64) {
        let keys: Vec<Key> =
            self.leases.iter().filter(|(_, lease)| lease.pending).map(|(key, _)| *key).collect();
        for key in keys {
            self.settle(key, now);
        }
    }

    fn settle_all_of(&mut self, node: NodeId, now: u64) {
        let of = |lease: &ReplicaLease| lease.order.iter().any(|member| member.node == node);
        let keys: Vec<Key> =
            self.leases.iter().filter(|(_, lease)| of(lease)).map(|(key, _)| *key).collect();
        for key in keys {
            self.settle(key, now);
        }
    }
}
