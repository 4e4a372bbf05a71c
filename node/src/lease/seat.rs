//! The lease state of one of the node's own replicas: its claim, its promise, its authority.
//!
//! **Invariant:** a replica that has promised itself serves nothing, and a replica that serves has promised nothing.

use std::sync::Arc;

use tokio::sync::oneshot;
use vasto_core::catalog::Placed;
use vasto_core::ids::{ReplicaId, Vector};
use vasto_core::lease::Claim;
use vasto_core::limits::{LEASE_EXCUSE, TAIL_LAG_LSNS_MAX, WRITER_RECOVERED, WRITER_STALL};

use crate::replica::Replica;
use crate::replica::authority::{Belief, Standing, Term};
use crate::replication::replicator::Replicator;

/// A promise to another replica.
#[derive(Debug, Clone)]
pub(super) struct Promise {
    pub holder: ReplicaId,
    /// The incoming link over which the promise was given; the promise lasts as long as that link brings heartbeats.
    pub link: u64,
    /// Number that names the promise.
    pub grant: u64,
    /// Number of the reply that carried the promise: claims that the holder sent before it had seen that reply say
    /// nothing of it.
    pub reply: u64,
    /// The term before the promise, when everything done in it was named, and whether authority had lasted until then.
    pub handed_term: Option<(u64, bool)>,
}

/// Position of a replica that has stopped serving.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub vector: Vector,
    /// The writer itself reported it: nothing that was admitted comes after it.
    pub complete: bool,
}

/// Reason why another replica does not serve.
#[derive(Debug, Clone)]
pub(super) enum Basis {
    /// The peer promised itself.
    Granted { grant: u64, belief: Belief },
    /// The peer is away by evidence, which must be found anew by then.
    Excused(Belief),
    /// The peer is silent, and no more is known.
    Silent,
}

/// The last term of authority.
#[derive(Debug, Clone, Default)]
pub(super) struct LastTerm {
    pub number: u64,
    pub basis: Vec<(ReplicaId, Basis)>,
    /// The term was given up: the next authority is another term.
    pub closed: bool,
    /// The term rested on the silence of peers alone, so each request waited for a probe.
    pub probing: bool,
}

impl LastTerm {
    /// Returns the promise of a peer on which the term rests.
    pub fn promise_of(&self, peer: ReplicaId) -> Option<(u64, Belief)> {
        self.basis.iter().find_map(|(id, basis)| match basis {
            Basis::Granted { grant, belief } if *id == peer => Some((*grant, belief.clone())),
            Basis::Granted { .. } | Basis::Excused(_) | Basis::Silent => None,
        })
    }

    /// Returns true when this peer cannot have served until now, although it promised nothing.
    pub fn excused(&self, peer: ReplicaId) -> bool {
        self.basis.iter().all(|(id, basis)| *id != peer || matches!(basis, Basis::Excused(_)))
    }

    /// Returns true when a peer was silent that is not silent by this basis.
    pub fn was_silent(&self, basis: &[(ReplicaId, Basis)]) -> bool {
        let silent = |of: &[(ReplicaId, Basis)], id: ReplicaId| {
            of.iter().any(|(one, basis)| *one == id && matches!(basis, Basis::Silent))
        };
        self.basis.iter().any(|(id, _)| silent(&self.basis, *id) && !silent(basis, *id))
    }

    /// Returns true when no other replica served in between: all the same promises stand, which exclude that.
    pub fn goes_on(&self, basis: &[(ReplicaId, Basis)]) -> bool {
        let same = |(id, basis): &(ReplicaId, Basis)| match basis {
            Basis::Granted { grant, .. } => self.promise_of(*id).is_some_and(|(before, _)| before == *grant),
            Basis::Excused(_) | Basis::Silent => false,
        };
        !self.closed && basis.len() == self.basis.len() && !basis.is_empty() && basis.iter().all(same)
    }
}

/// Lease state of one replica of this node.
pub(super) struct Seat {
    pub replica: Replica,
    pub replicator: Arc<Replicator>,
    /// The placed replicas in the order of preference.
    pub order: Vec<Placed>,
    /// Replicas that were placed while this one had authority: they have not served, and until the time given cannot
    /// begin to without its promise.
    newcomers: Vec<(ReplicaId, Belief)>,
    pub primary_version: u64,
    /// Deadline and waiters of the leadership transfer of a replica that is about to stop.
    pub stopping: Option<(u64, Vec<oneshot::Sender<()>>)>,
    /// Time when the writer was last seen stalled.
    pub stalled_ms: Option<u64>,
    pub promise: Option<Promise>,
    /// Counts the requests for the replica's position; an answer to an earlier one is out of date.
    pub turn: u64,
    pub naming: bool,
    pub named: Option<Named>,
    /// Replica that serves by this one's promise although another claim is better, and since when that is known.
    pub outranked: Option<(ReplicaId, u64)>,
    pub term: LastTerm,
    pub serving: bool,
    /// The replica had authority since its last promise, or the previous process may have had it.
    pub served: bool,
    /// The replica had authority since it was opened.
    pub served_here: bool,
    /// The replica's own claim is the best known.
    pub wants: bool,
    /// The replica waits for something that no message announces.
    pub pending: bool,
    pub claim: Option<Claim>,
    published: Option<Published>,
}

/// Last published standing, for comparison.
#[derive(PartialEq, Eq)]
enum Published {
    Alone(u64),
    Serving { number: u64, beliefs: Vec<usize>, probing: bool },
    Yielding(u64),
    Out { elsewhere: bool },
}

impl Seat {
    /// Creates the state of a replica; `served`: the previous process may have served it.
    pub fn new(replica: Replica, replicator: Arc<Replicator>, served: bool) -> Self {
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

    /// Discards the position that was reported for a promise.
    pub fn unname(&mut self) {
        self.turn += u64::from(self.naming || self.named.is_some());
        (self.naming, self.named) = (false, None);
    }

    /// Sets the placed replicas of the shard; `listened`: this node has listened without a gap for so long that none of
    /// them can have taken it for silent.
    pub fn place(&mut self, order: Vec<Placed>, listened: bool, now: u64) {
        self.newcomers.retain(|(id, _)| order.iter().any(|one| one.replica == *id));
        if listened && self.has_authority() && !self.term.probing {
            let is_new = |one: &&Placed| !self.order.iter().any(|before| before.replica == one.replica);
            let until = now + LEASE_EXCUSE.as_millis() as u64;
            self.newcomers.extend(order.iter().filter(is_new).map(|one| (one.replica, Arc::new(until.into()))));
        }
        self.order = order;
    }

    /// Returns until when a replica is excused because it has only just been placed.
    pub fn newcomer(&self, replica: ReplicaId) -> Option<Belief> {
        self.newcomers.iter().find(|(id, _)| *id == replica).map(|(_, until)| until.clone())
    }

    /// Returns whether the replica has valid authority now.
    pub fn has_authority(&self) -> bool {
        self.serving && self.replica.authority().is_serving()
    }

    /// Returns the replica's claim, given the replica that serves now; `None` once this one is closed.
    pub fn own_claim(&mut self, server: Option<ReplicaId>, now: u64) -> Option<Claim> {
        if self.replica.is_closed() {
            return None;
        }
        if self.replica.busy_ms(now) >= WRITER_STALL.as_millis() as u64 {
            self.stalled_ms = Some(now);
        }
        let recovering = self.stalled_ms.is_some_and(|at| now.saturating_sub(at) < WRITER_RECOVERED.as_millis() as u64);
        let serving = self.has_authority();
        let near = serving
            || server
                .is_none_or(|server| self.replicator.lag_behind(server).is_some_and(|lag| lag <= TAIL_LAG_LSNS_MAX));
        let ready = serving || self.replica.is_ready();
        let able = ready && near && !recovering && self.stopping.is_none();
        self.replica.authority().set_stalled(recovering);
        Some(Claim { able, primary_version: self.primary_version, serving })
    }

    /// Publishes authority, whether new or continued.
    pub fn serve(&mut self, number: u64, basis: Vec<(ReplicaId, Basis)>, master: Option<Belief>, probing: bool) {
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

    /// Stops admitting requests. Admitted requests are finished, unless authority rests on silence, which ends without
    /// a sign.
    pub fn begin_to_yield(&mut self) {
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

    /// Publishes that the replica does not serve; `elsewhere`: another replica is known to serve.
    pub fn step_back(&mut self, elsewhere: bool) {
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
            // A term that rests on silence is not continued.
            self.replica.authority().lapse(self.term.number);
        }
    }

    /// Publishes the authority of a shard's only replica.
    pub fn stand_alone(&mut self) {
        // Requests done while others had authority, or may have had it, belong to another term.
        let goes_on = self.has_authority() && !self.term.probing;
        let number = if goes_on { self.term.number } else { self.term.number + 1 };
        self.term = LastTerm { number, ..LastTerm::default() };
        (self.serving, self.served, self.served_here) = (true, true, true);
        self.replica.authority().set_acting(false);
        self.publish(Published::Alone(number), Standing::Serving(Term { number, ..Term::default() }));
    }

    /// Returns true when only the catalog or a request can change anything: the replica stands alone, and no caller
    /// waits.
    pub fn rests(&self) -> bool {
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

    /// Releases the callers that wait for the leadership transfer.
    pub fn handed_over(&mut self) {
        if let Some((_, waiting)) = &mut self.stopping {
            for one in waiting.drain(..) {
                let _ = one.send(());
            }
        }
    }
}
