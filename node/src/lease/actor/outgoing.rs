//! Outgoing links: this node's claims, the answers to them, and the evidence about silent nodes.
//!
//! **Invariant:** the result of a connection attempt counts for a bounded time from its start, and
//! failures from before any peer was reached again count for nothing: this node was the one that
//! was cut off.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vasto_core::catalog::Placed;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};
use vasto_core::lease::Peer;
use vasto_core::limits::{LEASE_BELIEF, LEASE_EXCUSE, LEASE_OPENING, LEASE_SILENCE};
use vasto_proto::convert::vector_from_wire;
use vasto_proto::v1;
use vasto_proto::v1::lease_grant::State;

use super::{Actor, Granted, Outgoing, ms};
use crate::clock::now_ms;
use crate::lease::event::{Event, Key, News, Reach};
use crate::lease::link::{Link, reach};
use crate::lease::replica_lease::ReplicaLease;
use crate::replica::authority::Belief;

impl Actor {
    /// Keeps a link to each node that holds another replica of a shard of this node.
    pub(super) fn connect(&mut self) {
        let me = self.registry.node_id;
        let wanted: BTreeSet<NodeId> = self
            .leases
            .values()
            .filter(|lease| lease.order.iter().any(|member| member.replica == lease.replica.id))
            .flat_map(|lease| lease.order.iter().map(|member| member.node))
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
                registry: self.registry.clone(),
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

    /// Returns true when the last attempt to reach a node has failed.
    pub(super) fn is_away(&self, node: NodeId) -> bool {
        let failed = |link: &Outgoing| {
            link.beats.is_none() && matches!(link.reach, Some(Reach::Refused | Reach::Unreachable))
        };
        self.outgoing.get(&node).is_some_and(failed)
    }

    /// Voids failed connection attempts when an unreachable node is reached again or sends a
    /// message: this node was the one that was cut off, so the failures until now prove nothing
    /// about the others.
    pub(super) fn network_is_back(&mut self, node: NodeId, now: u64) {
        if self
            .outgoing
            .get(&node)
            .is_none_or(|outgoing| outgoing.reach != Some(Reach::Unreachable))
        {
            return;
        }
        for outgoing in
            self.outgoing.values_mut().filter(|outgoing| outgoing.reach == Some(Reach::Unreachable))
        {
            (outgoing.reach, outgoing.heard_ms) = (None, now);
        }
    }

    pub(super) fn reached(&mut self, node: NodeId, reach: Reach, began: u64, now: u64) {
        if reach != Reach::Unreachable {
            self.network_is_back(node, now);
        }
        let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
        if reach == Reach::Reachable && outgoing.reach == Some(Reach::Refused) {
            // The silence until now was that of another process.
            outgoing.heard_ms = now;
        }
        outgoing.cut |= reach != Reach::Reachable;
        outgoing.tried_ms = began;
        if reach != Reach::Unreachable {
            outgoing.excused.fetch_max(began + ms(LEASE_EXCUSE), Ordering::AcqRel);
        }
        outgoing.reach = Some(reach);
    }

    pub(super) fn handle_link(&mut self, node: NodeId, news: News, now: u64) {
        match news {
            News::Reach(reach, began) => {
                self.reached(node, reach, began, now);
                self.forget_the_dead(node);
            }
            News::Up(beats) => {
                let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
                outgoing.beats = Some(beats);
                outgoing.replied_ms = now;
                // Promises over the previous link are believed as long as before, and not longer.
                outgoing.believed = Arc::default();
                outgoing.grants.clear();
                outgoing.seen_reply = 0;
                outgoing.sent = None;
                if std::mem::take(&mut outgoing.cut) {
                    self.registry.link_is_up(node);
                }
                self.dirty = true;
            }
            News::Lost => {
                let Some(outgoing) = self.outgoing.get_mut(&node) else { return };
                outgoing.beats = None;
                outgoing.reach = None;
            }
            News::Reply(reply) => {
                let keys = self.handle_reply(node, reply, now);
                for key in keys {
                    self.settle(key, now);
                }
                return;
            }
        }
        self.settle_all_of(node, now);
    }

    /// Records a reply; returns the shards that it changes.
    pub(super) fn handle_reply(
        &mut self,
        node: NodeId,
        reply: v1::LeaseReply,
        now: u64,
    ) -> Vec<Key> {
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
        let until = reply.sent_ms + ms(LEASE_BELIEF);
        if was_believed {
            outgoing.believed.fetch_max(until, Ordering::AcqRel);
        } else {
            // A lapsed term is not valid again before everything in the reply has been decided.
            outgoing.believed = Arc::new(until.into());
            keys.extend(outgoing.grants.keys());
        }
        self.dirty |= !keys.is_empty();
        keys
    }

    /// Sends changed claims, and heartbeats when they are due.
    pub(super) fn beat(&mut self, due: bool, now: u64) {
        self.dirty = false;
        for (node, outgoing) in &mut self.outgoing {
            let Some(beats) = &outgoing.beats else { continue };
            let mut claims: Vec<v1::LeaseClaim> = self
                .leases
                .iter()
                .filter(|(_, lease)| lease.order.iter().any(|member| member.node == *node))
                .filter_map(|(key, lease)| {
                    let claim = lease.claim?;
                    let held = outgoing.grants.get(key).filter(|granted| {
                        lease.wants
                            && granted.state == State::Granted
                            && granted.claimant == lease.replica.id
                    });
                    Some(v1::LeaseClaim {
                        keyspace_id: key.0.0,
                        shard: key.1.0,
                        replica_id: lease.replica.id.0,
                        able: claim.able,
                        primary_version: claim.primary_version,
                        serving: claim.serving,
                        held_grant: held.map_or(0, |granted| granted.grant),
                        covered: held.is_some_and(|granted| granted.covered),
                    })
                })
                .collect();
            claims.sort_unstable_by_key(|claim| (claim.keyspace_id, claim.shard));
            let unchanged = outgoing.sent.as_ref() == Some(&claims);
            if unchanged && !due {
                continue;
            }
            let request = v1::LeaseRequest {
                node_id: self.registry.node_id.0,
                process: self.process,
                sent_ms: now,
                seen_reply: outgoing.seen_reply,
                unchanged,
                claims: if unchanged { Vec::new() } else { claims.clone() },
            };
            // A full transport is slow: the next heartbeat repeats everything.
            if beats.try_send(request).is_ok() {
                // A promise that the heartbeat does not name ends with it, and is not relied on
                // again.
                outgoing.grants.retain(|key, granted| {
                    let is_of_key = |claim: &v1::LeaseClaim| {
                        (claim.keyspace_id, claim.shard) == (key.0.0, key.1.0)
                    };
                    let held = claims
                        .iter()
                        .find(|claim| is_of_key(claim))
                        .map_or(0, |claim| claim.held_grant);
                    granted.state != State::Granted || granted.grant == held
                });
                outgoing.sent = Some(claims);
            }
        }
    }

    /// Returns what is known of a peer, and the promise on which that is based.
    pub(super) fn peer(
        &self,
        key: Key,
        lease: &ReplicaLease,
        placed: &Placed,
        had: bool,
        now: u64,
    ) -> (Peer, Option<(u64, Belief)>) {
        let before = lease.term.promise_of(placed.replica).filter(|_| had);
        let earlier = || match before.clone() {
            Some((grant, belief)) => {
                let believed = belief.load(Ordering::Acquire) > now;
                (Peer::Granted { believed, covered: true, served: false }, Some((grant, belief)))
            }
            None => (Peer::Unsettled { excused: had && lease.term.excused(placed.replica) }, None),
        };
        let Some(outgoing) = self.outgoing.get(&placed.node) else { return earlier() };
        if outgoing.beats.is_some() {
            let granted =
                outgoing.grants.get(&key).filter(|granted| granted.claimant == lease.replica.id);
            let Some(granted) = granted else { return earlier() };
            return match granted.state {
                State::Granted => {
                    let believed = outgoing.believed.load(Ordering::Acquire) > now;
                    let peer = Peer::Granted {
                        believed,
                        covered: granted.covered,
                        served: granted.served,
                    };
                    (peer, Some((granted.grant, outgoing.believed.clone())))
                }
                State::Denied => (Peer::Denied, None),
                State::Absent => (
                    Peer::Absent {
                        long: now.saturating_sub(granted.since_ms) >= ms(LEASE_OPENING),
                    },
                    None,
                ),
                State::Unspecified => earlier(),
            };
        }
        let heard = outgoing.heard_ms.max(self.listening_ms);
        let quiet = now.saturating_sub(heard) >= ms(LEASE_SILENCE);
        let linked = self
            .newest
            .get(&placed.node)
            .and_then(|id| self.incoming.get(id))
            .is_some_and(|link| link.open);
        // Evidence expires: each connection attempt must find it anew.
        let evident = outgoing.excused.load(Ordering::Acquire) > now;
        match outgoing.reach {
            Some(Reach::Refused) if !linked && evident => (Peer::Dead, None),
            Some(Reach::Reachable) if quiet && evident => (Peer::Hung, None),
            Some(Reach::Unreachable) if quiet => {
                // The last attempt began after the master had reported the node gone.
                let gone = self
                    .registry
                    .master_says_gone(placed.node, now)
                    .is_some_and(|since| since <= outgoing.tried_ms);
                (Peer::Silent { gone }, None)
            }
            Some(Reach::Unreachable) if self.subdued(key, placed).is_some() => {
                (Peer::Subdued, None)
            }
            _ => earlier(),
        }
    }

    /// Probes whether the silent peers can be reached now.
    pub(super) fn probe(&self, key: Key, lease: &ReplicaLease) {
        let silent = lease.order.iter().filter(|member| {
            self.outgoing
                .get(&member.node)
                .is_some_and(|link| link.beats.is_none() && link.reach == Some(Reach::Unreachable))
        });
        let targets: Vec<(NodeId, Option<String>, u64)> = silent
            .map(|member| {
                let took_ms = self
                    .outgoing
                    .get(&member.node)
                    .map_or(0, |link| link.took_ms.load(Ordering::Relaxed));
                (member.node, self.registry.address(member.node), took_ms)
            })
            .collect();
        let round = lease.replica.authority().begin_round();
        let (replica, events) = (lease.replica.clone(), self.events.clone());
        // Ends with the time-outs of the attempts.
        tokio::spawn(async move {
            let tries = targets.into_iter().map(|(node, address, took_ms)| async move {
                (reach(&address?, took_ms).await != Reach::Unreachable).then_some(node)
            });
            let reachable = futures::future::join_all(tries).await.into_iter().flatten().collect();
            let _ = events.send(Event::Probed { key, replica, round, reachable }).await;
        });
    }
}
