//! Incoming links: the claims of other nodes, and the replies to them.
//!
//! **Invariant:** a heartbeat is answered after everything in it has been decided; the end of a
//! promise is sent before the echo.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use vasto_core::catalog::Placed;
use vasto_core::ids::{KeyspaceId, NodeId, ReplicaId, ShardId, Vector};
use vasto_core::lease::Claim;
use vasto_core::limits::{LEASE_BEAT, LEASE_EXCUSE, LEASE_PROMISE};
use vasto_proto::convert::vector_to_wire;
use vasto_proto::v1;
use vasto_proto::v1::lease_grant::State;

use super::{Actor, Claimed, Incoming, ms};
use crate::clock::now_ms;
use crate::lease::event::{Key, Reach};
use crate::lease::replica_lease::{Promise, ReplicaLease};
use crate::replica::authority::Belief;

impl Actor {
    /// Records a heartbeat, decides what follows from it, and answers it.
    pub(super) fn handle_request(&mut self, id: u64, request: v1::LeaseRequest, now: u64) {
        let node = NodeId(request.node_id);
        let Some(incoming) = self.incoming.get_mut(&id) else { return };
        let first = incoming.process == 0;
        if first {
            (incoming.node, incoming.process) = (node, request.process);
            let process = request.process;
            // A new process does not know the promises made to its predecessor.
            self.incoming
                .retain(|other, link| *other == id || link.node != node || link.process == process);
            self.newest.insert(node, id);
        }
        let lapsed = {
            let Some(incoming) = self.incoming.get_mut(&id) else { return };
            now.saturating_sub(incoming.heard_ms) >= ms(LEASE_PROMISE)
        };
        let mut changed = if lapsed { self.lapse(id) } else { BTreeSet::new() };
        let Some(incoming) = self.incoming.get_mut(&id) else { return };
        incoming.heard_ms = now;
        incoming.sent_ms = request.sent_ms;
        let seen_before = std::mem::replace(&mut incoming.seen_reply, request.seen_reply);
        if !request.unchanged {
            let before = std::mem::take(&mut incoming.claims);
            changed.extend(before.keys());
            for claim in &request.claims {
                let key = (KeyspaceId(claim.keyspace_id), ShardId(claim.shard));
                let claimed = Claimed {
                    replica: ReplicaId(claim.replica_id),
                    claim: Claim {
                        able: claim.able,
                        primary_version: claim.primary_version,
                        serving: claim.serving,
                    },
                    held_grant: claim.held_grant,
                    covered: claim.covered,
                };
                incoming.claims.insert(key, claimed);
                changed.insert(key);
            }
            incoming.last_sent.retain(|key, _| incoming.claims.contains_key(key));
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
            match self.leases.contains_key(&key) {
                true => self.settle(key, now),
                false => {
                    if let Some(incoming) = self.incoming.get_mut(&id) {
                        incoming.grant_absent(key);
                    }
                }
            }
        }
        if let Some(incoming) = self.incoming.get_mut(&id) {
            incoming.reply(self.process);
        }
    }

    /// Ends the promises of a link that was silent for too long; the states sent for them are void.
    /// Returns the shards that this concerns.
    fn lapse(&mut self, id: u64) -> BTreeSet<Key> {
        let mut changed: BTreeSet<Key> = BTreeSet::new();
        for (key, lease) in &mut self.leases {
            if lease.promise.as_ref().is_some_and(|promise| promise.link == id) {
                lease.promise = None;
                changed.insert(*key);
            }
        }
        // Sent before the echo, which would renew the ended promises.
        let last_sent =
            self.incoming.get_mut(&id).map(|incoming| std::mem::take(&mut incoming.last_sent));
        for (key, (claimant, state, _)) in last_sent.into_iter().flatten() {
            if state == State::Granted {
                self.send(id, key, claimant, State::Denied, None);
            }
        }
        changed
            .extend(self.incoming.get(&id).into_iter().flat_map(|incoming| incoming.claims.keys()));
        changed
    }

    /// Sends decisions that were made outside of a heartbeat.
    pub(super) fn flush(&mut self) {
        let process = self.process;
        for incoming in self.incoming.values_mut().filter(|link| link.open && !link.news.is_empty())
        {
            incoming.reply(process);
        }
    }

    /// Drops the links of a process that has ended: they promise and claim nothing any more.
    pub(super) fn forget_the_dead(&mut self, node: NodeId) {
        let dead = self.outgoing.get(&node).is_some_and(|outgoing| {
            outgoing.beats.is_none() && outgoing.reach == Some(Reach::Refused)
        });
        if dead {
            self.incoming.retain(|_, link| link.node != node || link.open);
            if self.newest.get(&node).is_some_and(|id| !self.incoming.contains_key(id)) {
                self.newest.remove(&node);
            }
        }
    }

    /// Returns the live claims of a shard's other replicas, with their place in the order of
    /// preference and their link.
    pub(super) fn claims(
        &self,
        key: Key,
        lease: &ReplicaLease,
        now: u64,
    ) -> Vec<(usize, u64, Claimed)> {
        let others =
            lease.order.iter().enumerate().filter(|(_, member)| member.replica != lease.replica.id);
        others
            .filter_map(|(order, placed)| {
                let id = *self.newest.get(&placed.node)?;
                let link = self
                    .incoming
                    .get(&id)
                    .filter(|link| now < link.heard_ms + ms(LEASE_PROMISE))?;
                let mut claimed =
                    *link.claims.get(&key).filter(|claimed| claimed.replica == placed.replica)?;
                // The peer reaches this node, but this node does not reach it, and clients will not
                // either.
                claimed.claim.able &= !self.is_out_of_reach(placed.node);
                Some((order, id, claimed))
            })
            .collect()
    }

    pub(super) fn is_out_of_reach(&self, node: NodeId) -> bool {
        self.outgoing.get(&node).is_some_and(|outgoing| {
            outgoing.beats.is_none() && outgoing.reach == Some(Reach::Unreachable)
        })
    }

    /// Returns until when an unreachable replica cannot serve: the replica has seen that its claim
    /// was denied here, and does not take this node for silent while it is answered.
    pub(super) fn subdued(&self, key: Key, placed: &Placed) -> Option<Belief> {
        let id = self.newest.get(&placed.node)?;
        let link =
            self.incoming.get(id).filter(|link| link.open && link.seen_reply >= link.denied)?;
        let claimed = link.claims.get(&key).filter(|claimed| claimed.replica == placed.replica)?;
        let denied = matches!(link.last_sent.get(&key), Some((_, State::Denied, _)));
        (denied && !claimed.claim.serving && claimed.held_grant == 0).then(|| link.subdued.clone())
    }

    /// Returns whether a promise still binds.
    pub(super) fn binds(&self, key: Key, promise: &Promise, now: u64) -> bool {
        let Some(link) = self.incoming.get(&promise.link) else { return false };
        if now >= link.heard_ms + ms(LEASE_PROMISE) {
            return false;
        }
        let released = link.seen_reply >= promise.reply
            && link.claims.get(&key).is_none_or(|claimed| {
                claimed.replica != promise.holder || claimed.held_grant != promise.grant
            });
        !released
    }

    /// Returns whether the holder of a promise still sends heartbeats. A holder that may be silent
    /// is not named to clients: they would ask it in vain, and this replica may serve shortly.
    pub(super) fn is_fresh(&self, link: u64, now: u64) -> bool {
        self.incoming
            .get(&link)
            .is_some_and(|link| now.saturating_sub(link.heard_ms) < ms(LEASE_BEAT) * 3)
    }

    /// Sends a claimant the state of its claim, unless that was sent already.
    pub(super) fn send(
        &mut self,
        link: u64,
        key: Key,
        claimant: ReplicaId,
        state: State,
        promise: Option<(u64, &Vector, bool)>,
    ) {
        let Some(incoming) = self.incoming.get_mut(&link) else { return };
        let grant = promise.map_or(0, |(grant, _, _)| grant);
        if incoming.last_sent.insert(key, (claimant, state, grant))
            == Some((claimant, state, grant))
        {
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

impl Incoming {
    pub(super) fn grant_absent(&mut self, key: Key) {
        let Some(claimed) = self.claims.get(&key) else { return };
        let answer = (claimed.replica, State::Absent, 0);
        if self.last_sent.insert(key, answer) == Some(answer) {
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

    /// Sends the echo of the last heartbeat, with the changes since the last reply.
    pub(super) fn reply(&mut self, process: u64) {
        let number = self.number + 1;
        let reply =
            v1::LeaseReply { process, sent_ms: self.sent_ms, number, grants: self.news.clone() };
        // A full transport is slow: unsent changes go with the next reply.
        if self.replies.try_send(Ok(reply)).is_ok() {
            self.number = number;
            self.news.clear();
            // The peer cannot take this node for silent before then.
            self.subdued.store(now_ms() + ms(LEASE_EXCUSE), Ordering::Release);
        }
    }
}
