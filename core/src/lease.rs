//! Leases of a shard: the rules by which one replica serves strict requests (reads at the primary,
//! puts, deletes, conditional writes, counters). They rest on claims, promises and excuses.
//!
//! Every open replica sends its claim on the shard to every other placed replica. A replica
//! promises itself to the best claim it knows, its own included, and to no other; while a promise
//! lasts, the granter serves no strict requests. A claimant has *authority* when every other placed
//! replica has promised itself to it and it holds everything that they named, or when each replica
//! that did not promise is excused by evidence.
//!
//! **Invariants**
//! - Pure: no clock, no IO. Time and evidence are arguments.
//! - Two replicas of a shard never have authority at the same time, unless they are partitioned
//!   from each other while clients reach both.
//! - A claimant that gains authority holds everything that any earlier serving replica
//!   acknowledged, unless that replica is away.
//! - Silence is evidence only for a node that can show that it is not itself isolated.

use std::cmp::Reverse;

/// The claim that a replica sends to the others of its shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The replica has caught up, its writer runs, it is not about to stop, and it lags little
    /// behind the serving one.
    pub able: bool,
    /// The catalog version by which the replica is primary; 0 when it is not.
    pub primary_version: u64,
    /// The replica has authority now.
    pub serving: bool,
}

/// Order among claims: the greatest is the best.
pub type Rank = (bool, u64, Reverse<usize>);

impl Claim {
    /// Returns the rank of a claim of the replica at this place in the order of preference.
    pub fn rank(&self, order: usize) -> Rank {
        (self.able, self.primary_version, Reverse(order))
    }
}

/// Returns the place of the best claim in the order of preference.
pub fn best(claims: impl IntoIterator<Item = (usize, Claim)>) -> Option<usize> {
    claims.into_iter().max_by_key(|(order, claim)| claim.rank(*order)).map(|(order, _)| order)
}

/// State of one other placed replica (the peer), as the claimant knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The peer has promised itself to the claimant.
    Granted {
        /// The claimant believes in the promise at this point in time.
        believed: bool,
        /// The claimant holds everything that the peer named when it promised.
        covered: bool,
        /// The peer had authority since its previous promise.
        served: bool,
    },
    /// The peer answers, and has promised itself to another replica or to none.
    Denied,
    /// The peer's node answers and reports that the replica is not open.
    Absent {
        /// Absent for so long that the claimant does not wait for it any more.
        long: bool,
    },
    /// Nothing listens at the peer's address and its link is closed: its process has ended.
    Dead,
    /// The peer cannot be reached, but its own claims arrive: it knows that it was denied, and does
    /// not serve.
    Subdued,
    /// The peer's machine accepts connections, but sent nothing for
    /// [`crate::limits::LEASE_SILENCE`].
    Hung,
    /// The peer's machine cannot be reached, and nothing was received for as long.
    Silent {
        /// The master reports that the peer's node has no session.
        gone: bool,
    },
    /// Nothing is certain about the peer yet: it was placed only just now, is reachable again, or
    /// has not answered the claim.
    Unsettled {
        /// Until now the peer was excused by more than silence, or is new and says nothing else: it
        /// cannot have served meanwhile, and cannot begin to without a promise of the claimant or
        /// [`crate::limits::LEASE_SILENCE`] of the claimant's silence.
        excused: bool,
    },
}

/// Decision on a claimant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The claimant must not serve.
    Missing,
    /// The claimant serves.
    Authority {
        /// The authority relies on the master's report.
        by_master: bool,
        /// The claimant may be the isolated one: each request waits for a probe of the silent
        /// peers.
        probing: bool,
    },
}

/// Decides whether the best claimant of a shard has authority. `had` means that it has had
/// authority up to now without a gap: a peer that comes back and did not serve meanwhile does not
/// interrupt it.
pub fn authority(peers: &[Peer], had: bool) -> Verdict {
    let placed = peers.len() + 1;
    let promises = peers
        .iter()
        .filter(|peer| matches!(peer, Peer::Granted { believed: true, covered: true, .. }));
    let majority = (promises.count() + 1) * 2 > placed;
    let mut silent = false;
    let mut unexplained = false;
    for peer in peers {
        match *peer {
            Peer::Granted { believed: true, covered: true, .. }
            | Peer::Dead
            | Peer::Subdued
            | Peer::Hung => {}
            Peer::Granted { believed: true, covered: false, served: false } if had => {}
            Peer::Unsettled { excused } if had && (excused || majority) => {}
            Peer::Absent { long } if long || had => {}
            Peer::Silent { gone } => {
                silent = true;
                unexplained |= !gone;
            }
            Peer::Granted { .. } | Peer::Denied | Peer::Absent { .. } | Peer::Unsettled { .. } => {
                return Verdict::Missing;
            }
        }
    }
    Verdict::Authority {
        by_master: silent && !majority && !unexplained,
        probing: unexplained && !majority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTED: Peer = Peer::Granted { believed: true, covered: true, served: false };
    const SERVES: Verdict = Verdict::Authority { by_master: false, probing: false };

    #[test]
    fn the_best_claim_is_able_then_primary_then_preferred() {
        let claim = |able, primary_version| Claim { able, primary_version, serving: false };
        assert_eq!(best([(0, claim(true, 0)), (1, claim(true, 0))]), Some(0));
        assert_eq!(
            best([(0, claim(true, 3)), (1, claim(true, 4))]),
            Some(1),
            "the newer catalog version"
        );
        assert_eq!(best([(0, claim(false, 4)), (1, claim(true, 0))]), Some(1), "the able one");
        assert_eq!(best([]), None);
    }

    #[test]
    fn every_peer_has_promised_or_is_excused() {
        assert_eq!(authority(&[], false), SERVES);
        assert_eq!(authority(&[GRANTED, GRANTED], false), SERVES);
        for excused in [Peer::Dead, Peer::Subdued, Peer::Hung, Peer::Absent { long: true }] {
            assert_eq!(authority(&[excused], false), SERVES, "{excused:?}");
        }
        for missing in [
            Peer::Denied,
            Peer::Unsettled { excused: true },
            Peer::Absent { long: false },
            Peer::Granted { believed: false, covered: true, served: false },
            Peer::Granted { believed: true, covered: false, served: false },
        ] {
            assert_eq!(authority(&[GRANTED, missing], false), Verdict::Missing, "{missing:?}");
        }
    }

    #[test]
    fn a_peer_that_returns_interrupts_only_when_it_served_meanwhile() {
        let back = |served| Peer::Granted { believed: true, covered: false, served };
        assert_eq!(authority(&[back(false)], true), SERVES);
        assert_eq!(authority(&[back(true)], true), Verdict::Missing);
        assert_eq!(authority(&[Peer::Unsettled { excused: true }], true), SERVES);
        let after_silence = Peer::Unsettled { excused: false };
        assert_eq!(
            authority(&[after_silence], true),
            Verdict::Missing,
            "it may have served while it was silent"
        );
        assert_eq!(authority(&[GRANTED, after_silence], true), SERVES, "not against a majority");
        assert_eq!(authority(&[Peer::Denied], true), Verdict::Missing);
        let lapsed = Peer::Granted { believed: false, covered: true, served: false };
        assert_eq!(authority(&[lapsed], true), Verdict::Missing);
    }

    #[test]
    fn silence_excuses_a_majority_or_with_the_masters_word_and_else_each_request_probes() {
        let silent = Peer::Silent { gone: false };
        let gone = Peer::Silent { gone: true };
        assert_eq!(authority(&[GRANTED, silent], false), SERVES, "two of three");
        assert_eq!(
            authority(&[silent], false),
            Verdict::Authority { by_master: false, probing: true }
        );
        assert_eq!(
            authority(&[silent, silent], false),
            Verdict::Authority { by_master: false, probing: true }
        );
        assert_eq!(
            authority(&[gone], false),
            Verdict::Authority { by_master: true, probing: false }
        );
        assert_eq!(
            authority(&[gone, silent], false),
            Verdict::Authority { by_master: false, probing: true }
        );
    }
}
