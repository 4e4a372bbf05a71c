//! Admission and acknowledgement of strict requests: the leases decide, the data path asks.
//!
//! **Invariants**
//! - A strict request is admitted only under authority, and carries its term. The writer refuses
//!   the request once the term has changed.
//! - A write is acknowledged only while authority holds, or when the replica that took over holds
//!   the write. A completed write that may not be acknowledged yet waits here for a bounded time;
//!   then its outcome is unknown.
//! - The answering thread compares validity with the boot-time clock: a process that stalled has
//!   lost its authority before any of its code runs again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;
use vasto_core::limits::HELD_ACK_MAX;
use vasto_core::{ErrorCode, VastoError};

use crate::clock::{now_ms, since_boot};

/// Boot time in milliseconds until which a condition of authority is believed.
pub(crate) type Belief = Arc<AtomicU64>;

/// One uninterrupted period of authority.
#[derive(Debug, Clone, Default)]
pub(crate) struct Term {
    /// Number of the term, counted from this opening.
    pub number: u64,
    /// Conditions of the term; all must be believed.
    pub beliefs: Vec<Belief>,
    /// True when each request first waits for a probe of the silent peers.
    pub probing: bool,
}

impl Term {
    fn is_valid(&self) -> bool {
        let now = now_ms();
        self.beliefs.iter().all(|until| until.load(Ordering::Acquire) > now)
    }
}

/// State of authority that the leases have decided.
#[derive(Debug, Clone)]
pub(crate) enum Standing {
    /// No leases: no other replica serves.
    Alone,
    /// The replica serves.
    Serving(Term),
    /// The replica admits no more requests; admitted ones are finished for its successor.
    Yielding(Term),
    /// The replica does not serve.
    Out {
        /// True when another replica is known to serve.
        elsewhere: bool,
    },
}

/// Reason why a strict request is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Another replica serves.
    Elsewhere,
    /// This replica may have authority soon.
    Wait,
    /// This replica may be the isolated one: the request waits for a probe that begins now.
    Probe,
}

struct Held {
    term: u64,
    modifies: bool,
    /// Probe rounds that had begun when the write arrived.
    begun: u64,
    until: Duration,
    answer: Box<dyn FnOnce(Result<(), VastoError>) + Send>,
}

/// A term whose writes the replica that took over holds.
#[derive(Debug, Clone, Copy)]
struct HandedOver {
    term: u64,
    /// True when authority lasted until all of the writes were listed.
    lasted: bool,
}

/// The authority of one replica.
pub(crate) struct Authority {
    standing: ArcSwap<Standing>,
    changed: watch::Sender<u64>,
    /// Terms of which another replica holds all writes; the most recent ones.
    handed_over: Mutex<Vec<HandedOver>>,
    held: Mutex<Vec<Held>>,
    /// First term whose read-modify-writes may be acknowledged; those of transferred terms may be,
    /// too.
    first: AtomicU64,
    /// Probe rounds that have begun, and those that have ended.
    rounds: watch::Sender<(u64, u64)>,
    /// Boot time since which the replica serves in place of the primary, milliseconds; 0 when it is
    /// not.
    acting_since_ms: AtomicU64,
    /// True while the writer is stalled at the disk, and shortly afterwards.
    stalled: AtomicBool,
}

impl Default for Authority {
    fn default() -> Self {
        Self {
            standing: ArcSwap::from_pointee(Standing::Alone),
            changed: watch::channel(0).0,
            handed_over: Mutex::default(),
            held: Mutex::default(),
            first: AtomicU64::new(0),
            rounds: watch::channel((0, 0)).0,
            acting_since_ms: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
        }
    }
}

/// Maximum number of transferred terms that are remembered: an answer waits no longer than
/// [`HELD_ACK_MAX`].
const HANDED_OVER_MAX: usize = 64;

fn lapsed() -> VastoError {
    VastoError::new(
        ErrorCode::Unknown,
        "the write is durable here, but another replica may have taken over before it was acknowledged; read it back",
    )
}

impl Authority {
    /// Returns the term under which a strict request may begin now; 0 without leases.
    ///
    /// # Errors
    /// The reason for the refusal.
    pub(crate) fn admit(&self) -> Result<u64, Refusal> {
        match &**self.standing.load() {
            Standing::Alone => Ok(0),
            Standing::Serving(term) if !term.is_valid() => Err(Refusal::Wait),
            Standing::Serving(term) if term.probing => Err(Refusal::Probe),
            Standing::Serving(term) => Ok(term.number),
            Standing::Yielding(_) => Err(Refusal::Wait),
            Standing::Out { elsewhere: true } => Err(Refusal::Elsewhere),
            Standing::Out { elsewhere: false } => Err(Refusal::Wait),
        }
    }

    /// Like [`Self::admit`], after a probe round that began after the request arrived.
    ///
    /// # Errors
    /// The reason for the refusal.
    pub(crate) fn admit_probed(&self) -> Result<u64, Refusal> {
        match &**self.standing.load() {
            Standing::Serving(term) if term.probing && term.is_valid() => Ok(term.number),
            _ => self.admit(),
        }
    }

    /// Returns whether the term holds now: a read under it is then not stale.
    pub(crate) fn holds(&self, number: u64) -> bool {
        match &**self.standing.load() {
            Standing::Alone => true,
            Standing::Serving(term) | Standing::Yielding(term) => {
                term.number == number && term.is_valid()
            }
            Standing::Out { .. } => false,
        }
    }

    /// Returns the current term while its authority is valid; 0 without leases.
    pub(crate) fn term(&self) -> Option<u64> {
        match &**self.standing.load() {
            Standing::Alone => Some(0),
            Standing::Serving(term) if term.is_valid() => Some(term.number),
            Standing::Serving(_) | Standing::Yielding(_) | Standing::Out { .. } => None,
        }
    }

    /// Returns true while the replica serves, also without other replicas.
    pub(crate) fn is_serving(&self) -> bool {
        self.term().is_some()
    }

    /// Publishes the decision of the leases.
    pub(crate) fn publish(&self, standing: Standing) {
        if let Standing::Serving(term) = &standing {
            // Promises for earlier terms were taken back.
            self.first.fetch_max(term.number, Ordering::AcqRel);
        }
        self.standing.store(Arc::new(standing));
        self.changed.send_modify(|count| *count += 1);
        self.settle();
    }

    /// Subscribes to changes of the published state.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Records that the replica that took over holds all writes of the term and of earlier ones;
    /// `lasted` means that authority lasted until all of them were listed, so that no other replica
    /// served in between.
    pub(crate) fn handed_over(&self, term: u64, lasted: bool) {
        {
            let mut terms = self.handed_over.lock();
            terms.push(HandedOver { term, lasted });
            let surplus = terms.len().saturating_sub(HANDED_OVER_MAX);
            terms.drain(..surplus);
        }
        self.settle();
    }

    /// Sets whether the replica serves in place of the primary.
    pub(crate) fn set_acting(&self, acting: bool) {
        if !acting {
            self.acting_since_ms.store(0, Ordering::Release);
        } else if self.acting_since_ms.load(Ordering::Acquire) == 0 {
            self.acting_since_ms.store(now_ms().max(1), Ordering::Release);
        }
    }

    /// Returns for how long the replica has served in place of the primary, milliseconds.
    pub(crate) fn acting_ms(&self) -> u64 {
        match self.acting_since_ms.load(Ordering::Acquire) {
            0 => 0,
            since => now_ms().saturating_sub(since).max(1),
        }
    }

    /// Sets whether the writer is stalled.
    pub(crate) fn set_stalled(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Release);
    }

    /// Returns true while the writer is stalled at the disk, and for a while afterwards.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Acquire)
    }

    /// Returns whether a write of this term may be acknowledged.
    ///
    /// `begun` is the last probe round that had begun at the write; `ended` is the last that has
    /// ended, read before the standing: the findings of a round are published before it ends.
    fn may_acknowledge(&self, number: u64, modifies: bool, begun: u64, ended: u64) -> bool {
        // Authority that depends on a peer's silence may have ended unnoticed: only a probe begun
        // after the write proves that it has not.
        let lasts = |term: &Term| term.is_valid() && (!term.probing || ended > begun);
        let valid = match &**self.standing.load() {
            Standing::Alone => true,
            // A read-modify-write depends on the value of its own term; a put or delete is only
            // ordered.
            Standing::Serving(term) => lasts(term) && (term.number == number || !modifies),
            Standing::Yielding(term) => lasts(term) && term.number == number,
            Standing::Out { .. } => false,
        };
        // Otherwise another replica may have changed the value that a read-modify-write was based
        // on.
        let counts = |over: &HandedOver| {
            if modifies { over.lasted && over.term == number } else { over.term >= number }
        };
        valid || self.handed_over.lock().iter().any(counts)
    }

    /// Calls `answer` with success once a write of this term may be acknowledged, or with an
    /// unknown outcome.
    pub(crate) fn acknowledge(
        &self,
        term: u64,
        modifies: bool,
        answer: impl FnOnce(Result<(), VastoError>) + Send + 'static,
    ) {
        let (begun, ended) = *self.rounds.borrow();
        if self.may_acknowledge(term, modifies, begun, ended) {
            return answer(Ok(()));
        }
        let until = since_boot() + HELD_ACK_MAX;
        self.held.lock().push(Held { term, modifies, begun, until, answer: Box::new(answer) });
        // The standing may have been published in between.
        self.settle();
    }

    /// Answers the held writes that may be acknowledged now, and those that have waited too long.
    pub(crate) fn settle(&self) {
        if self.held.lock().is_empty() {
            return;
        }
        let (now, first) = (since_boot(), self.first.load(Ordering::Acquire));
        let ended = self.rounds.borrow().1;
        let mut done = Vec::new();
        {
            let mut held = self.held.lock();
            let mut at = 0;
            while at < held.len() {
                let write = &held[at];
                let verdict =
                    match self.may_acknowledge(write.term, write.modifies, write.begun, ended) {
                        true => Some(Ok(())),
                        false if write.until <= now || (write.modifies && write.term < first) => {
                            Some(Err(lapsed()))
                        }
                        false => None,
                    };
                match verdict {
                    Some(verdict) => done.push((held.swap_remove(at), verdict)),
                    None => at += 1,
                }
            }
        }
        for (write, verdict) in done {
            (write.answer)(verdict);
        }
    }

    /// Ends a term of which it is unknown whether it lasted: none of its read-modify-writes is
    /// acknowledged.
    pub(crate) fn lapse(&self, term: u64) {
        self.first.fetch_max(term + 1, Ordering::AcqRel);
        self.settle();
    }

    /// Gives up all held writes, because the replica stops: none is acknowledged any more.
    pub(crate) fn abandon(&self) {
        let held = std::mem::take(&mut *self.held.lock());
        for write in held {
            (write.answer)(Err(lapsed()));
        }
    }

    /// Waits for a probe round that begins after this call.
    pub(crate) async fn probed(&self) {
        let mut rounds = self.rounds.subscribe();
        let wanted = rounds.borrow_and_update().0 + 1;
        // An error would mean that the sender is gone, but `self` owns it.
        let _ = rounds.wait_for(|(_, ended)| *ended >= wanted).await;
    }

    /// Returns true when a request or an acknowledgement waits for a probe.
    pub(crate) fn wants_probe(&self) -> bool {
        self.rounds.receiver_count() > 0 || !self.held.lock().is_empty()
    }

    /// Begins a probe round and returns its number.
    pub(crate) fn begin_round(&self) -> u64 {
        let mut number = 0;
        self.rounds.send_modify(|(begun, _)| {
            *begun += 1;
            number = *begun;
        });
        number
    }

    /// Ends a probe round, whose findings were published before.
    pub(crate) fn end_round(&self, number: u64) {
        self.rounds.send_modify(|(_, ended)| *ended = (*ended).max(number));
        self.settle();
    }
}

#[cfg(test)]
mod tests;
