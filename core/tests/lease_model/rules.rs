//! The rules of the design, and what is explored.

/// The rules. Each can be taken out.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Whoever serves has, from every other one, a promise or an excuse.
    pub leases: bool,
    /// A promise is made to one at a time.
    pub exclusive: bool,
    /// Whoever promises itself to another one has stopped to serve.
    pub stop_before_grant: bool,
    /// Belief counts from when the heartbeat was sent, not from when its answer came.
    pub belief_from_sending: bool,
    /// A replica serves only when it holds what the granter named.
    pub cover: bool,
    /// Dead is a process whose port refuses connections, not one whose connection broke.
    pub dead_is_refused: bool,
    /// An excuse holds as long as a belief from what it was seen by, and not until further notice.
    pub excuses_end: bool,
    /// Silence counts only while one listened oneself.
    pub own_gap: bool,
    /// The silence of one that could not be reached begins anew once it can be.
    pub hung_is_connected: bool,
    /// A silent one is excused by evidence only.
    pub evidence: bool,
    /// Evidence counts with a connect that began after it came, and failed.
    pub connect_after_evidence: bool,
    /// One's own promise to the excused one must have ended.
    pub own_promise_ended: bool,
    /// That a granter has served is said until the claimant covers what it named.
    pub served_until_covered: bool,
    /// A process that has just started says that it has served: the one before it may have.
    pub predecessor_served: bool,
    /// A denied claimant stops before it says that it has.
    pub stop_before_release: bool,
    /// A claimant that has let go of a promise does not rely on it again.
    pub let_go_for_good: bool,
    /// The writer looks at the authority, not only who admits the request.
    pub writer_checks: bool,
    /// A record's stamp is taken before that look.
    pub stamp_first: bool,
    /// A write is acknowledged only while the authority lasts that it was checked under ...
    pub ack_in_term: bool,
    /// (and, when that rests on silence, after a probe that began once it was written) ...
    pub ack_after_probe: bool,
    /// ... or after a clean hand-over, once the one handed to says that it covers what was named.
    pub ack_when_taken_over: bool,
    /// A planned stop ends when the holder of the promise serves and covers what was named.
    pub stop_when_covered: bool,
    /// A process that has just started serves and grants nobody until its predecessor's promises have ended.
    pub young_waits: bool,
    /// Whoever is heard is no longer excused, at once.
    pub heard_ends_excuse: bool,
    /// A request shows that clients come through only if the others were silent before it came.
    pub came_after_silence: bool,
}

pub const ALL: Rules = Rules {
    leases: true,
    exclusive: true,
    stop_before_grant: true,
    belief_from_sending: true,
    cover: true,
    dead_is_refused: true,
    excuses_end: true,
    own_gap: true,
    hung_is_connected: true,
    evidence: true,
    connect_after_evidence: true,
    own_promise_ended: true,
    served_until_covered: true,
    predecessor_served: true,
    stop_before_release: true,
    let_go_for_good: true,
    writer_checks: true,
    stamp_first: true,
    ack_in_term: true,
    ack_after_probe: true,
    ack_when_taken_over: true,
    stop_when_covered: true,
    young_waits: true,
    heard_ends_excuse: true,
    came_after_silence: true,
};
