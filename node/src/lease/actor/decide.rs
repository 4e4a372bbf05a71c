//! Decides whether a replica of this node serves, promises itself to another replica, or waits.
//!
//! **Invariant:** a replica stops serving before it names what it holds, and names that before it promises itself.

use vasto_core::catalog::Placed;
use vasto_core::ids::{Origin, ReplicaId};
use vasto_core::lease::{Peer, Verdict, authority, best};
use vasto_core::limits::{LEASE_BEAT, LEASE_PROMISE};
use vasto_proto::v1::lease_grant::State;

use super::{Actor, Claimed, NAMING_TIMEOUT, ms};
use crate::lease::event::{Event, Key};
use crate::lease::seat::{Basis, Named, Promise, Seat};

impl Actor {
    pub(super) fn settle(&mut self, key: Key, now: u64) {
        let Some(mut seat) = self.seats.remove(&key) else { return };
        self.decide(key, &mut seat, now);
        self.seats.insert(key, seat);
    }

    pub(super) fn decide(&mut self, key: Key, seat: &mut Seat, now: u64) {
        let me = seat.replica.id;
        seat.pending = false;
        let settled_in = now.saturating_sub(self.began_ms) >= ms(LEASE_PROMISE);
        let Some(my_order) =
            seat.order.iter().position(|one| one.replica == me).filter(|_| settled_in || seat.order.len() == 1)
        else {
            // The replica is not placed, or a promise of the previous process may still be believed.
            seat.step_back(settled_in);
            (seat.promise, seat.claim, seat.wants) = (None, None, false);
            for incoming in self.incoming.values_mut() {
                incoming.grant_absent(key);
            }
            return seat.handed_over();
        };
        if seat.promise.as_ref().is_some_and(|promise| !self.binds(key, promise, now)) {
            seat.promise = None;
        }
        if seat.order.len() == 1 {
            (seat.claim, seat.wants) = (None, false);
            seat.unname();
            match seat.promise.clone() {
                // A former peer may still believe in the promise.
                Some(promise) => {
                    self.send(promise.link, key, promise.holder, State::Denied, None);
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
                seat.unname();
                match (&seat.promise, wants) {
                    (Some(promise), _) => {
                        let fresh = self.is_fresh(promise.link, now);
                        seat.step_back(fresh);
                    }
                    (None, true) => self.claim(key, seat, &claims, now),
                    (None, false) => seat.step_back(false),
                }
            }
        }
        self.answer_the_others(key, seat, &claims, best, now);
        let is_over = !seat.serving && !seat.naming && (claims.is_empty() || is_taken(seat, &claims));
        let nobody = claims.is_empty() && seat.order.iter().all(|one| one.replica == me || self.is_away(one.node));
        if seat.stopping.is_some() && (is_over || nobody) {
            seat.handed_over();
        }
    }

    /// Denies the claims that are not the best one (`best`: the order of its replica), and promises to replicas that
    /// are not placed any more.
    fn answer_the_others(
        &mut self,
        key: Key,
        seat: &mut Seat,
        claims: &[(usize, u64, Claimed)],
        best: Option<usize>,
        now: u64,
    ) {
        let serves_by_promise = claims.iter().find(|(_, link, one)| {
            one.claim.serving
                && seat.promise.as_ref().is_some_and(|promise| {
                    (promise.holder, promise.link, promise.grant) == (one.replica, *link, one.held_grant)
                })
        });
        let outranked = serves_by_promise.filter(|(order, ..)| best != Some(*order)).map(|(_, _, one)| one.replica);
        seat.outranked =
            outranked.map(|one| (one, seat.outranked.filter(|(id, _)| *id == one).map_or(now, |(_, at)| at)));
        for (order, link, one) in claims {
            if best != Some(*order) && !self.hands_over_by_itself(seat, one, now) {
                self.send(*link, key, one.replica, State::Denied, None);
            }
        }
        let placed = |promise: &Promise| seat.order.iter().any(|one| one.replica == promise.holder);
        if let Some(promise) = seat.promise.clone().filter(|promise| !placed(promise)) {
            self.send(promise.link, key, promise.holder, State::Denied, None);
        }
    }

    /// Returns whether a replica that serves by this one's promise is receiving the better claim. It then transfers
    /// leadership by itself, and names what it holds; if it were denied before, all its unacknowledged writes would end
    /// with an unknown outcome. Bounded in time: the claim may have been lost on its way.
    fn hands_over_by_itself(&self, seat: &Seat, one: &Claimed, now: u64) -> bool {
        let is_new = |(id, at): (ReplicaId, u64)| id == one.replica && now.saturating_sub(at) < ms(LEASE_BEAT) * 3;
        let node = seat.order.iter().find(|placed| placed.replica == one.replica).map(|placed| placed.node);
        let is_linked = node.and_then(|node| self.outgoing.get(&node)).is_some_and(|link| link.beats.is_some());
        seat.outranked.is_some_and(is_new) && (is_linked || !seat.wants)
    }

    /// Promises the replica to a claimant, once the replica serves nothing any more.
    pub(super) fn grant(&mut self, key: Key, seat: &mut Seat, link: u64, to: Claimed, now: u64) {
        if let Some(promise) = &mut seat.promise {
            let steady = promise.holder == to.replica && promise.link == link;
            if steady && to.held_grant == promise.grant && to.covered {
                // Only now is the holder known to hold everything that was acknowledged here.
                seat.served = false;
                if let Some((term, lasted)) = promise.handed_term.take() {
                    seat.replica.authority().handed_over(term, lasted);
                }
            }
            if steady || promise.holder != to.replica {
                // A promise to another claimant waits until the holder has released this one.
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
        // If authority lasted until everything was named, no other replica had it in between.
        let lasted = seat.replica.authority().holds(seat.term.number);
        let handed_term = named.complete.then_some((seat.term.number, lasted));
        let mut named = named;
        if !seat.served_here {
            // No strict request was acknowledged in this incarnation: the serving replica need not wait for its first
            // record.
            let own = Origin { replica: seat.replica.id, incarnation: seat.replica.incarnation() };
            named.vector.remove(&own);
        }
        seat.promise = Some(Promise { holder: to.replica, link, grant, reply: number, handed_term });
        let served = seat.served;
        seat.step_back(true);
        self.send(link, key, to.replica, State::Granted, Some((grant, &named.vector, served)));
    }

    /// Asks the replica for its position.
    pub(super) fn name(&mut self, key: Key, seat: &mut Seat) {
        seat.turn += 1;
        seat.naming = true;
        let (replica, turn, events) = (seat.replica.clone(), seat.turn, self.events.clone());
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
    fn claim(&mut self, key: Key, seat: &mut Seat, claims: &[(usize, u64, Claimed)], now: u64) {
        let goes_on = seat.has_authority();
        // Authority that rested on silence alone does not excuse a peer that sends messages again.
        let had = goes_on && !seat.term.probing;
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
                // With a majority of promises, a peer whose silence is about to end still counts as silent.
                (Peer::Unsettled { excused: false }, _) => Basis::Silent,
                (Peer::Granted { .. } | Peer::Absent { .. }, _) => {
                    Basis::Excused(link.map(|link| link.believed.clone()).unwrap_or_default())
                }
                (Peer::Subdued, _) => Basis::Excused(self.subdued(key, placed).unwrap_or_default()),
                (Peer::Unsettled { .. }, _)
                    if let Some(until) = seat.newcomer(placed.replica)
                        && !claims.iter().any(|(_, _, one)| one.replica == placed.replica && one.claim.serving) =>
                {
                    Basis::Excused(until)
                }
                _ => Basis::Excused(link.map(|link| link.excused.clone()).unwrap_or_default()),
            };
            peers.push(peer);
            basis.push((placed.replica, stands));
        }
        // A peer that was only silent, and is not any more, may have served.
        let goes_on = goes_on && !(seat.term.probing && seat.term.was_silent(&basis));
        match authority(&peers, had) {
            Verdict::Missing => seat.step_back(false),
            Verdict::Authority { by_master, probing } => {
                let number = match goes_on || seat.term.goes_on(&basis) {
                    true => seat.term.number,
                    false => seat.term.number + 1,
                };
                let master = by_master.then(|| self.registry.master_word());
                if by_master {
                    // The master's statement must be renewed often.
                    self.registry.report.notify_one();
                }
                seat.serve(number, basis, master, probing);
                if probing && seat.replica.authority().wants_probe() && self.probing.insert(key) {
                    self.probe(key, seat);
                }
                seat.pending |= probing;
            }
        }
    }
}

/// Returns whether the replica to which this one is promised serves and holds everything.
fn is_taken(seat: &Seat, claims: &[(usize, u64, Claimed)]) -> bool {
    let Some(promise) = &seat.promise else { return false };
    claims.iter().any(|(_, _, one)| {
        one.replica == promise.holder && one.held_grant == promise.grant && one.covered && one.claim.serving
    })
}
