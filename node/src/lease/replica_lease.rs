//! The lease state of one replica that this node hosts: its claim, its promise to a peer, its
//! authority. The actor owns these states and decides; this module keeps the state and publishes
//! the authority. All times are boot time in milliseconds; a [`Belief`] is such a time, shared with
//! the link that renews it.
//!
//! **Invariant:** while a replica's promise to another replica lasts, it answers no strict request;
//! a replica with authority has no promise outstanding. Enforced in `actor/decide.rs`: before a
//! promise is made, the replica stops admitting requests ([`ReplicaLease::begin_to_yield`]); only a
//! lease without a promise reaches [`ReplicaLease::serve`] or [`ReplicaLease::stand_alone`].

use std::sync::Arc;

use tokio::sync::oneshot;
use vasto_core::catalog::Placed;
use vasto_core::ids::{ReplicaId, Vector};
use vasto_core::lease::Claim;
use vasto_core::limits::{LEASE_EXCUSE, TAIL_LAG_LSNS_MAX, WRITER_RECOVERED, WRITER_STALL};

use crate::replica::Replica;
use crate::replica::authority::{Belief, Standing, Term};
use crate::replication::replicator::Replicator;

/// A promise of this replica not to serve, given to the replica with the best claim.
#[derive(Debug, Clone)]
pub(super) struct Promise {
    /// Replica that may serve by this promise.
    pub holder: ReplicaId,
    /// Number of the incoming link over which the promise was given: each heartbeat received on it
    /// renews the promise.
    pub link: u64,
    /// Number of the promise, counted per node: the holder's claims name it as long as the holder
    /// relies on it.
    pub grant: u64,
    /// Number, on the link, of the reply that carried the promise. A claim that does not name the
    /// promise releases it only when the holder had seen this reply.
    pub reply: u64,
    /// The term that ended with this promise, and whether its authority lasted until the vector was
    /// reported. Once the holder has everything in that vector, the held writes of the term may be
    /// acknowledged. `None` when the vector is not complete ([`Named::complete`]), or after that
    /// has happened.
    pub handed_term: Option<(u64, bool)>,
}

/// Final vector of a replica that has stopped serving. The promise carries it, and its holder
/// serves only after it has all of it ("named" in this module: listed in that vector).
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub vector: Vector,
    /// True when the writer itself reported the vector: no admitted request is committed after it.
    /// False when the writer did not answer in time; the vector then covers only what is durable
    /// and applied.
    pub complete: bool,
}

/// Reason why another placed replica (the peer) does not serve: a term is based on one for each
/// peer.
#[derive(Debug, Clone)]
pub(super) enum Basis {
    /// The peer promised this replica not to serve; `belief` is the time until which this replica
    /// relies on it.
    Granted { grant: u64, belief: Belief },
    /// The peer gave no promise that counts, but cannot serve: its address refuses connections, its
    /// process hangs, it reports the replica as not open or as not having served, its claim was
    /// denied here, or it was placed only just now. The evidence must be found anew before the
    /// given time, which is earlier than the peer could take over.
    Excused(Belief),
    /// The peer is silent. Silence has no expiry of its own: a majority of promises, the master's
    /// report, or a probe for each request must back it.
    Silent,
}

/// The current or last term of authority.
#[derive(Debug, Clone, Default)]
pub(super) struct LastTerm {
    /// Number of the term, counted since the replica was opened; 0 before the first.
    pub number: u64,
    /// Per peer the reason why it does not serve; empty when the replica was the only one.
    pub basis: Vec<(ReplicaId, Basis)>,
    /// The replica has begun to yield: the next authority is another term.
    pub closed: bool,
    /// The term was based on the silence of peers, without a majority of promises and without the
    /// master's report. Each request then waits until a probe of the silent peers that began after
    /// its arrival has failed. Were this node the one that was cut off, a request that arrives
    /// shows that its network is back; the probe then reaches the peer, and the term ends before
    /// the request is answered. Not covered: replicas that are cut from each other while clients
    /// reach both, and a network that is whole for less than a probe (ADR 21).
    pub probing: bool,
}

impl LastTerm {
    /// Returns the promise of a peer on which the term is based: its number, and until when it is
    /// believed.
    pub(super) fn promise_of(&self, peer: ReplicaId) -> Option<(u64, Belief)> {
        self.basis.iter().find_map(|(id, basis)| match basis {
            Basis::Granted { grant, belief } if *id == peer => Some((*grant, belief.clone())),
            Basis::Granted { .. } | Basis::Excused(_) | Basis::Silent => None,
        })
    }

    /// Returns true when this peer cannot have served during the term, although it gave no promise:
    /// it was excused, or was not yet placed.
    pub(super) fn excused(&self, peer: ReplicaId) -> bool {
        self.basis.iter().all(|(id, basis)| *id != peer || matches!(basis, Basis::Excused(_)))
    }

    /// Returns true when a peer on whose silence the term was based is not silent by this new
    /// basis: it may have served meanwhile, so the term must not continue.
    pub(super) fn was_silent(&self, basis: &[(ReplicaId, Basis)]) -> bool {
        let silent = |of: &[(ReplicaId, Basis)], id: ReplicaId| {
            of.iter().any(|(peer, basis)| *peer == id && matches!(basis, Basis::Silent))
        };
        self.basis.iter().any(|(id, _)| silent(&self.basis, *id) && !silent(basis, *id))
    }

    /// Returns true when the term may continue after a gap (a heartbeat late): the new basis
    /// consists of the very same promises of all peers, so no other replica served in the gap.
    pub(super) fn goes_on(&self, basis: &[(ReplicaId, Basis)]) -> bool {
        let same = |(id, basis): &(ReplicaId, Basis)| match basis {
            Basis::Granted { grant, .. } => {
                self.promise_of(*id).is_some_and(|(before, _)| before == *grant)
            }
            Basis::Excused(_) | Basis::Silent => false,
        };
        !self.closed
            && basis.len() == self.basis.len()
            && !basis.is_empty()
            && basis.iter().all(same)
    }
}

/// Lease state of one replica that this node hosts.
pub(super) struct ReplicaLease {
    pub replica: Replica,
    pub replicator: Arc<Replicator>,
    /// The placed replicas in the order of preference.
    pub order: Vec<Placed>,
    /// Replicas that were placed while this one had authority that was not based on silence: they
    /// have not served, and cannot begin to without its promise before the time given.
    newcomers: Vec<(ReplicaId, Belief)>,
    /// Catalog version by which this replica is primary; 0 when it is not primary by the catalog.
    pub primary_version: u64,
    /// Set while the replica is about to stop and transfers its authority: deadline, and the
    /// callers that wait.
    pub stopping: Option<(u64, Vec<oneshot::Sender<()>>)>,
    /// Time when the writer was last seen stalled.
    pub stalled_ms: Option<u64>,
    /// The promise that this replica has given and that still binds it.
    pub promise: Option<Promise>,
    /// Raised by each request to the writer for the final vector, and when one is discarded: an
    /// answer to an earlier number is ignored.
    pub turn: u64,
    /// Such a request is running.
    pub naming: bool,
    /// Its answer, until a promise carries it.
    pub named: Option<Named>,
    /// Replica that serves by this one's promise although another claim is better, and the time
    /// when this node found that out. For a few heartbeats it is not denied, so that it can
    /// transfer leadership itself.
    pub outranked: Option<(ReplicaId, u64)>,
    pub term: LastTerm,
    /// The last decision granted authority; it may have expired since ([`Self::has_authority`]).
    pub serving: bool,
    /// Acknowledged writes may be held here alone: the replica, or perhaps the process before this
    /// one, has had authority, and no holder of a promise has confirmed since that it holds
    /// everything named.
    pub served: bool,
    /// The replica had authority since it was opened. If not, its promises need not name records of
    /// this incarnation.
    pub served_here: bool,
    /// The replica's own claim is the best known: it names the promises that it holds, and serves
    /// when they suffice.
    pub wants: bool,
    /// The actor polls this replica at short intervals, because no event announces what it waits
    /// for: records that a peer named, or requests that need a probe.
    pub pending: bool,
    /// The claim that is sent to the peers; `None` without peers, when not placed, or closed.
    pub claim: Option<Claim>,
    published: Option<Published>,
}

/// Last published standing, to publish only changes. `beliefs` holds addresses: a renewal keeps the
/// shared time in place and is no change.
#[derive(PartialEq, Eq)]
enum Published {
    Alone(u64),
    Serving { number: u64, beliefs: Vec<usize>, probing: bool },
    Yielding(u64),
    Out { elsewhere: bool },
}

impl ReplicaLease {
    /// Creates the lease state of a replica; `served` means that the previous process may have had
    /// authority.
    pub(super) fn new(replica: Replica, replicator: Arc<Replicator>, served: bool) -> Self {
        Self {
            replica,
            replicator,
            order: Vec::new(),
            newcomers: Vec::new(),
            primary_version: 0,
            stopping: None,
            stalled_ms: None,
            promise: None,
            turn: 0,
            naming: false,
            named: None,
            outranked: None,
            term: LastTerm::default(),
            serving: false,
            served,
            served_here: false,
            wants: false,
            pending: false,
            claim: None,
            published: None,
        }
    }

    /// Discards the final vector that was requested or reported for a promise: the promise is not
    /// made.
    pub(super) fn unname(&mut self) {
        self.turn += u64::from(self.naming || self.named.is_some());
        (self.naming, self.named) = (false, None);
    }

    /// Sets the placed replicas of the shard. `listened` means that this node has been running
    /// without a gap for [`LEASE_SILENCE`](vasto_core::limits::LEASE_SILENCE). A newcomer serves
    /// without this replica's promise only after as long a silence of this node, so none serves
    /// yet: the term continues, and each newcomer is excused for [`LEASE_EXCUSE`], which is
    /// shorter. After a stall a newcomer may have counted the silence already.
    pub(super) fn place(&mut self, order: Vec<Placed>, listened: bool, now: u64) {
        self.newcomers.retain(|(id, _)| order.iter().any(|member| member.replica == *id));
        if listened && self.has_authority() && !self.term.probing {
            let is_new = |member: &&Placed| {
                !self.order.iter().any(|before| before.replica == member.replica)
            };
            let until = now + LEASE_EXCUSE.as_millis() as u64;
            self.newcomers.extend(
                order.iter().filter(is_new).map(|member| (member.replica, Arc::new(until.into()))),
            );
        }
        self.order = order;
    }

    /// Returns the time until which a replica is excused because it was placed only just now.
    pub(super) fn newcomer(&self, replica: ReplicaId) -> Option<Belief> {
        self.newcomers.iter().find(|(id, _)| *id == replica).map(|(_, until)| until.clone())
    }

    /// Returns true when the last decision granted authority and no belief that it is based on has
    /// expired.
    pub(super) fn has_authority(&self) -> bool {
        self.serving && self.replica.authority().is_serving()
    }

    /// Returns the replica's claim; `None` once the replica is closed (accepts no more writes).
    /// `server` is the peer that serves now. The claim is able when the replica has caught up, lags
    /// at most [`TAIL_LAG_LSNS_MAX`] records behind `server`, has had no writer stall for
    /// [`WRITER_RECOVERED`], and is not about to stop. A serving replica counts as caught up.
    pub(super) fn own_claim(&mut self, server: Option<ReplicaId>, now: u64) -> Option<Claim> {
        if self.replica.is_closed() {
            return None;
        }
        if self.replica.busy_ms(now) >= WRITER_STALL.as_millis() as u64 {
            self.stalled_ms = Some(now);
        }
        let recovering = self
            .stalled_ms
            .is_some_and(|at| now.saturating_sub(at) < WRITER_RECOVERED.as_millis() as u64);
        let serving = self.has_authority();
        let near = serving
            || server.is_none_or(|server| {
                self.replicator.lag_behind(server).is_some_and(|lag| lag <= TAIL_LAG_LSNS_MAX)
            });
        let ready = serving || self.replica.is_ready();
        let able = ready && near && !recovering && self.stopping.is_none();
        self.replica.authority().set_stalled(recovering);
        Some(Claim { able, primary_version: self.primary_version, serving })
    }

    /// Publishes authority under the term `number`, whether new or continued. It ends by itself
    /// when any belief of the basis expires, or `master`: the time until which the master's report
    /// that a silent peer has no session counts, `None` when authority does not rely on such a
    /// report.
    pub(super) fn serve(
        &mut self,
        number: u64,
        basis: Vec<(ReplicaId, Basis)>,
        master: Option<Belief>,
        probing: bool,
    ) {
        let granted = basis.iter().filter_map(|(_, basis)| match basis {
            Basis::Granted { belief, .. } | Basis::Excused(belief) => Some(belief.clone()),
            Basis::Silent => None,
        });
        let beliefs: Vec<Belief> = granted.chain(master).collect();
        if !self.serving {
            tracing::info!(
                keyspace = self.replica.keyspace.0,
                shard = self.replica.shard.0,
                replica = self.replica.id.0,
                term = number,
                "this replica serves its shard"
            );
        }
        self.term = LastTerm { number, basis, closed: false, probing };
        (self.serving, self.served, self.served_here) = (true, true, true);
        let of = beliefs.iter().map(|belief| Arc::as_ptr(belief) as usize).collect();
        let acting = self.primary_version == 0;
        self.replica.authority().set_acting(acting);
        self.publish(
            Published::Serving { number, beliefs: of, probing },
            Standing::Serving(Term { number, beliefs, probing }),
        );
    }

    /// Stops admitting requests. Admitted requests are finished under the term as long as its
    /// beliefs last. Not when the term is based on silence: the silent peer may have taken over
    /// without a message that would end the term, so the replica steps back at once.
    pub(super) fn begin_to_yield(&mut self) {
        if !self.has_authority() || self.term.probing {
            return self.step_back(false);
        }
        let beliefs = self.term.basis.iter().filter_map(|(_, basis)| match basis {
            Basis::Granted { belief, .. } | Basis::Excused(belief) => Some(belief.clone()),
            Basis::Silent => None,
        });
        let term = Term { number: self.term.number, beliefs: beliefs.collect(), probing: false };
        (self.serving, self.term.closed) = (false, true);
        self.replica.authority().set_acting(false);
        self.publish(Published::Yielding(term.number), Standing::Yielding(term));
    }

    /// Publishes that the replica does not serve; `elsewhere` means that clients are sent to
    /// another replica.
    pub(super) fn step_back(&mut self, elsewhere: bool) {
        if self.serving && self.term.number > 0 {
            tracing::info!(
                keyspace = self.replica.keyspace.0,
                shard = self.replica.shard.0,
                replica = self.replica.id.0,
                term = self.term.number,
                elsewhere,
                "this replica serves its shard no more"
            );
        }
        self.serving = false;
        self.replica.authority().set_acting(false);
        self.publish(Published::Out { elsewhere }, Standing::Out { elsewhere });
        if self.term.probing {
            // A silent peer may have served meanwhile: read-modify-writes of this term are never
            // acknowledged.
            self.replica.authority().lapse(self.term.number);
        }
    }

    /// Publishes the authority of a shard's only replica.
    pub(super) fn stand_alone(&mut self) {
        // The term continues only when no former peer can have had authority since it began.
        let goes_on = self.has_authority() && !self.term.probing;
        let number = if goes_on { self.term.number } else { self.term.number + 1 };
        self.term = LastTerm { number, ..LastTerm::default() };
        (self.serving, self.served, self.served_here) = (true, true, true);
        self.replica.authority().set_acting(false);
        self.publish(
            Published::Alone(number),
            Standing::Serving(Term { number, ..Term::default() }),
        );
    }

    /// Returns true when nothing is due here: the replica is the only one of its shard and serves,
    /// has no promise outstanding, and is not about to stop. The actor then skips it until an event
    /// arrives.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.published, Some(Published::Alone(_)))
            && self.order.len() == 1
            && self.order[0].replica == self.replica.id
            && self.promise.is_none()
            && self.stopping.is_none()
    }

    fn publish(&mut self, what: Published, standing: Standing) {
        if self.published.as_ref() != Some(&what) {
            self.published = Some(what);
            self.replica.authority().publish(standing);
        }
    }

    /// Releases the callers that wait for the transfer of authority, whether it succeeded or was
    /// given up.
    pub(super) fn handed_over(&mut self) {
        if let Some((_, waiting)) = &mut self.stopping {
            for caller in waiting.drain(..) {
                let _ = caller.send(());
            }
        }
    }
}
