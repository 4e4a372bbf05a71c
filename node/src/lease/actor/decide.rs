//! Decides whether a replica of this node serves, promises itself to another replica, or waits.
//!
//! **Invariant:** a replica stops serving before it names what it holds, and names that before it
//! promises itself.

use vasto_core::catalog::Placed;
use vasto_core::ids::{Origin, ReplicaId};
use vasto_core::lease::{Peer, Verdict, authority, best};
use vasto_core::limits::{LEASE_BEAT, LEASE_PROMISE};
use vasto_proto::v1::lease_grant::State;

use super::{Actor, Claimed, NAMING_TIMEOUT, ms};
use crate::lease::event::{Event, Key};
use crate::lease::replica_lease::{Basis, Named, Promise, ReplicaLease};

impl Actor {
    pub(super) fn settle(&mut self, key: Key, now: u64) {
        let Some(mut lease) = self.leases.remove(&key) else { return };
        self.decide(key, &mut lease, now);
        self.leases.insert(key, lease);
    }

    pub(super) fn decide(&mut self, key: Key, lease: &mut ReplicaLease, now: u64) {
        let me = lease.replica.id;
        lease.pending = false;
        let settled_in = now.saturating_sub(self.began_ms) >= ms(LEASE_PROMISE);
        let Some(my_order) = lease
            .order
            .iter()
            .position(|member| member.replica == me)
            .filter(|_| settled_in || lease.order.len() == 1)
        else {
            // The replica is not placed, or a promise of the previous process may still be
            // believed.
            lease.step_back(settled_in);
            (lease.promise, lease.claim, lease.wants) = (None, None, false);
            for incoming in self.incoming.values_mut() {
                incoming.grant_absent(key);
            }
            return lease.handed_over();
        };
        if lease.promise.as_ref().is_some_and(|promise| !self.binds(key, promise, now)) {
            lease.promise = None;
        }
        if lease.order.len() == 1 {
            (lease.claim, lease.wants) = (None, false);
            lease.unname();
            match lease.promise.clone() {
                // A former peer may still believe in the promise.
                Some(promise) => {
                    self.send(promise.link, key, promise.holder, State::Denied, None);
                    lease.step_back(true);
                }
                None => lease.stand_alone(),
            }
            return lease.handed_over();
        }
        let claims = self.claims(key, lease, now);
        let server = claims
            .iter()
            .find(|(_, _, claimed)| claimed.claim.serving)
            .map(|(_, _, claimed)| claimed.replica);
        let claim = lease.own_claim(server, now);
        self.dirty |= claim != lease.claim;
        lease.claim = claim;
        let all = claims
            .iter()
            .map(|(order, _, claimed)| (*order, claimed.claim))
            .chain(claim.map(|claim| (my_order, claim)));
        let best = best(all);
        let wants = best == Some(my_order);
        self.dirty |= wants != lease.wants;
        lease.wants = wants;
        match best.filter(|order| *order != my_order) {
            Some(order) => {
                let to = claims.iter().find(|(at, _, _)| *at == order).copied();
                if let Some((_, link, claimed)) = to {
                    self.grant(key, lease, link, claimed, now);
                }
            }
            None => {
                lease.unname();
                match (&lease.promise, wants) {
                    (Some(promise), _) => {
                        let fresh = self.is_fresh(promise.link, now);
                        lease.step_back(fresh);
                    }
                    (None, true) => self.claim(key, lease, &claims, now),
                    (None, false) => lease.step_back(false),
                }
            }
        }
        self.answer_the_others(key, lease, &claims, best, now);
        let is_over =
            !lease.serving && !lease.naming && (claims.is_empty() || is_taken(lease, &claims));
        let nobody = claims.is_empty()
            && lease.order.iter().all(|member| member.replica == me || self.is_away(member.node));
        if lease.stopping.is_some() && (is_over || nobody) {
            lease.handed_over();
        }
    }

    /// Denies the claims that are not the best one (`best`: the order of its replica), and promises
    /// to replicas that are not placed any more.
    fn answer_the_others(
        &mut self,
        key: Key,
        lease: &mut ReplicaLease,
        claims: &[(usize, u64, Claimed)],
        best: Option<usize>,
        now: u64,
    ) {
        let serves_by_promise = claims.iter().find(|(_, link, claimed)| {
            claimed.claim.serving
                && lease.promise.as_ref().is_some_and(|promise| {
                    (promise.holder, promise.link, promise.grant)
                        == (claimed.replica, *link, claimed.held_grant)
                })
        });
        let outranked = serves_by_promise
            .filter(|(order, ..)| best != Some(*order))
            .map(|(_, _, claimed)| claimed.replica);
        lease.outranked = outranked.map(|holder| {
            (holder, lease.outranked.filter(|(id, _)| *id == holder).map_or(now, |(_, at)| at))
        });
        for (order, link, claimed) in claims {
            if best != Some(*order) && !self.hands_over_by_itself(lease, claimed, now) {
                self.send(*link, key, claimed.replica, State::Denied, None);
            }
        }
        let placed =
            |promise: &Promise| lease.order.iter().any(|member| member.replica == promise.holder);
        if let Some(promise) = lease.promise.clone().filter(|promise| !placed(promise)) {
            self.send(promise.link, key, promise.holder, State::Denied, None);
        }
    }

    /// Returns whether a replica that serves by this one's promise is receiving the better claim.
    /// It then transfers leadership by itself, and names what it holds; if it were denied before,
    /// all its unacknowledged writes would end with an unknown outcome. Bounded in time: the claim
    /// may have been lost on its way.
    fn hands_over_by_itself(&self, lease: &ReplicaLease, claimed: &Claimed, now: u64) -> bool {
        let is_new = |(id, at): (ReplicaId, u64)| {
            id == claimed.replica && now.saturating_sub(at) < ms(LEASE_BEAT) * 3
        };
        let node = lease
            .order
            .iter()
            .find(|placed| placed.replica == claimed.replica)
            .map(|placed| placed.node);
        let is_linked =
            node.and_then(|node| self.outgoing.get(&node)).is_some_and(|link| link.beats.is_some());
        lease.outranked.is_some_and(is_new) && (is_linked || !lease.wants)
    }

    /// Promises the replica to a claimant, once the replica serves nothing any more.
    pub(super) fn grant(
        &mut self,
        key: Key,
        lease: &mut ReplicaLease,
        link: u64,
        to: Claimed,
        now: u64,
    ) {
        if let Some(promise) = &mut lease.promise {
            let steady = promise.holder == to.replica && promise.link == link;
            if steady && to.held_grant == promise.grant && to.covered {
                // Only now is the holder known to hold everything that was acknowledged here.
                lease.served = false;
                if let Some((term, lasted)) = promise.handed_term.take() {
                    lease.replica.authority().handed_over(term, lasted);
                }
            }
            if steady || promise.holder != to.replica {
                // A promise to another claimant waits until the holder has released this one.
                let fresh = self.is_fresh(promise.link, now);
                return lease.step_back(fresh);
            }
        }
        let Some(named) = lease.named.take() else {
            if !lease.naming {
                if lease.promise.is_none() {
                    lease.begin_to_yield();
                }
                self.name(key, lease);
            }
            return;
        };
        self.grants += 1;
        let grant = self.grants;
        let number = self.incoming.get(&link).map_or(0, |incoming| incoming.number + 1);
        // If authority lasted until everything was named, no other replica had it in between.
        let lasted = lease.replica.authority().holds(lease.term.number);
        let handed_term = named.complete.then_some((lease.term.number, lasted));
        let mut named = named;
        if !lease.served_here {
            // No strict request was acknowledged in this incarnation: the serving replica need not
            // wait for its first record.
            let own =
                Origin { replica: lease.replica.id, incarnation: lease.replica.incarnation() };
            named.vector.remove(&own);
        }
        lease.promise =
            Some(Promise { holder: to.replica, link, grant, reply: number, handed_term });
        let served = lease.served;
        lease.step_back(true);
        self.send(link, key, to.replica, State::Granted, Some((grant, &named.vector, served)));
    }

    /// Asks the replica for its position.
    pub(super) fn name(&mut self, key: Key, lease: &mut ReplicaLease) {
        lease.turn += 1;
        lease.naming = true;
        let (replica, turn, events) = (lease.replica.clone(), lease.turn, self.events.clone());
        // Ends within NAMING_TIMEOUT.
        tokio::spawn(async move {
            let position = tokio::time::timeout(NAMING_TIMEOUT, replica.position()).await;
            let named = match position {
                Ok(Ok(position)) => Named { vector: position.vector, complete: true },
                // The writer is stalled: everything acknowledged is applied and synced.
                Ok(Err(_)) | Err(_) => Named { vector: replica.settled().vector, complete: false },
            };
            let _ = events.send(Event::Named { key, replica: replica.id, turn, named }).await;
        });
    }

    /// Decides whether this replica, whose claim is the best, has authority.
    fn claim(
        &mut self,
        key: Key,
        lease: &mut ReplicaLease,
        claims: &[(usize, u64, Claimed)],
        now: u64,
    ) {
        let goes_on = lease.has_authority();
        // Authority that was based on silence alone does not excuse a peer that sends messages
        // again.
        let had = goes_on && !lease.term.probing;
        let me = lease.replica.id;
        let others: Vec<Placed> =
            lease.order.iter().filter(|member| member.replica != me).copied().collect();
        for placed in &others {
            if let Some(granted) = self
                .outgoing
                .get_mut(&placed.node)
                .and_then(|outgoing| outgoing.grants.get_mut(&key))
                && granted.state == State::Granted
                && !granted.covered
            {
                granted.covered = lease.replica.covers(&granted.vector);
                self.dirty |= granted.covered;
                lease.pending |= !granted.covered;
            }
        }
        let mut peers = Vec::with_capacity(others.len());
        let mut basis = Vec::with_capacity(others.len());
        for placed in &others {
            let (peer, promise) = self.peer(key, lease, placed, had, now);
            let link = self.outgoing.get(&placed.node);
            let stands = match (peer, promise) {
                (Peer::Granted { believed: true, covered: true, .. }, Some((grant, belief))) => {
                    Basis::Granted { grant, belief }
                }
                (Peer::Silent { .. }, _) => Basis::Silent,
                // With a majority of promises, a peer whose silence is about to end still counts as
                // silent.
                (Peer::Unsettled { excused: false }, _) => Basis::Silent,
                (Peer::Granted { .. } | Peer::Absent { .. }, _) => {
                    Basis::Excused(link.map(|link| link.believed.clone()).unwrap_or_default())
                }
                (Peer::Subdued, _) => Basis::Excused(self.subdued(key, placed).unwrap_or_default()),
                (Peer::Unsettled { .. }, _)
                    if let Some(until) = lease.newcomer(placed.replica)
                        && !claims.iter().any(|(_, _, claimed)| {
                            claimed.replica == placed.replica && claimed.claim.serving
                        }) =>
                {
                    Basis::Excused(until)
                }
                _ => Basis::Excused(link.map(|link| link.excused.clone()).unwrap_or_default()),
            };
            peers.push(peer);
            basis.push((placed.replica, stands));
        }
        // A peer that was only silent, and is not any more, may have served.
        let goes_on = goes_on && !(lease.term.probing && lease.term.was_silent(&basis));
        match authority(&peers, had) {
            Verdict::Missing => lease.step_back(false),
            Verdict::Authority { by_master, probing } => {
                let number = match goes_on || lease.term.goes_on(&basis) {
                    true => lease.term.number,
                    false => lease.term.number + 1,
                };
                let master = by_master.then(|| self.registry.master_word());
                if by_master {
                    // The master's statement must be renewed often.
                    self.registry.report.notify_one();
                }
                lease.serve(number, basis, master, probing);
                if probing && lease.replica.authority().wants_probe() && self.probing.insert(key) {
                    self.probe(key, lease);
                }
                lease.pending |= probing;
            }
        }
    }
}

/// Returns whether the replica to which this one is promised serves and holds everything.
fn is_taken(lease: &ReplicaLease, claims: &[(usize, u64, Claimed)]) -> bool {
    let Some(promise) = &lease.promise else { return false };
    claims.iter().any(|(_, _, claimed)| {
        claimed.replica == promise.holder
            && claimed.held_grant == promise.grant
            && claimed.covered
            && claimed.claim.serving
    })
}
