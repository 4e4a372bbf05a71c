//! The rules of the design, each of which an exploration can leave out.

/// Rules of the design. Each can be taken out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// A serving replica has, from every other one, a promise or an excuse.
    pub leases: bool,
    /// A replica promises itself to one claimant at a time.
    pub exclusive: bool,
    /// A replica that promises itself to another one has stopped serving.
    pub stop_before_grant: bool,
    /// Belief counts from the sending of the heartbeat, not from the arrival of its answer.
    pub belief_from_sending: bool,
    /// A replica serves only when it holds what the granter named.
    pub cover: bool,
    /// A process is dead when its port refuses connections, not when its connection broke.
    pub dead_is_refused: bool,
    /// An excuse holds as long as a belief, from the evidence on which it rests, and not until
    /// further notice.
    pub excuses_end: bool,
    /// Silence counts only while the replica itself was listening.
    pub own_gap: bool,
    /// The silence of a peer that could not be reached begins anew once it can be.
    pub hung_is_connected: bool,
    /// A silent peer is excused by evidence only.
    pub evidence: bool,
    /// Evidence counts with a connect that began after the evidence arrived, and failed.
    pub connect_after_evidence: bool,
    /// The replica's own promise to the excused peer must have ended.
    pub own_promise_ended: bool,
    /// A granter reports that it has served until the claimant covers what the granter named.
    pub served_until_covered: bool,
    /// A process that has just started reports that it has served: its predecessor may have.
    pub predecessor_served: bool,
    /// A denied claimant stops before it reports that it has stopped.
    pub stop_before_release: bool,
    /// A claimant that has let go of a promise does not rely on it again.
    pub let_go_for_good: bool,
    /// The writer checks the authority, not only the admission of the request.
    pub writer_checks: bool,
    /// A record's stamp is taken before that check.
    pub stamp_first: bool,
    /// A write is acknowledged only while the authority lasts under which it was checked ...
    pub ack_in_term: bool,
    /// (and, when the authority rests on silence, after a probe that began once the record was
    /// written) ...
    pub ack_after_probe: bool,
    /// ... or after a clean transfer, once the successor reports that it covers what was named.
    pub ack_when_taken_over: bool,
    /// A planned stop ends when the holder of the promise serves and covers what was named.
    pub stop_when_covered: bool,
    /// A process that has just started neither serves nor grants until its predecessor's promises
    /// have ended.
    pub young_waits: bool,
    /// As soon as something is received from a peer, it is no longer excused.
    pub heard_ends_excuse: bool,
    /// A request shows that clients get through only if the peers were silent before it arrived.
    pub came_after_silence: bool,
}

pub(crate) const ALL: Rules = Rules {
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
