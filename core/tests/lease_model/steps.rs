//! The steps that can happen in a state of the model, and their results.
//!
//! **Invariant:** no step depends on the names of the replicas, except for a cut between the first
//! two.

use stateright::{Model, Property};
use vasto_core::lease::{Peer as Known, Verdict, authority};

use crate::rules::Rules;
use crate::state::{
    Back, Bad, Basis, FRESH, Faults, IDLE, NEVER, NEW, NOBODY, NODES, Node, NodeState, OPS, Op,
    Phase, Reach, Record, Run, SILENCE, Set, State, Term, bit,
};

/// Time for which a claimant believes in a promise, from its request.
const BELIEF: u8 = 2;
/// Time for which a granter keeps its promise, from the request.
const PROMISE: u8 = 2;
/// Time for which an excuse holds, from the attempt to connect on which it rests.
const EXCUSE: u8 = 1;
/// Time for which the master's report is fresh.
const WORD: u8 = 2;
/// Time after which the master considers a session lost.
const SESSION: u8 = 2;

/// Acknowledgement level of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ack {
    /// One replica holds the write; records that only a node that goes away held are not promised.
    Fsync,
    /// Two replicas hold the write.
    Replica,
}

/// Size and options of an exploration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leases {
    pub rules: Rules,
    pub nodes: usize,
    pub ack: Ack,
    /// Number of appends; there is one read.
    pub appends: usize,
    pub faults: Faults,
    /// Most nodes that may be away at a time.
    pub away: usize,
    /// Most answers to heartbeats that may be late at a time.
    pub late: usize,
    /// A write is checked, written and (when it may be) acknowledged in one step.
    pub quick: bool,
    /// A network may be back for less time than a probe takes.
    pub flaps: bool,
    /// Records that only an absent node held are promised again once it has promised itself to the
    /// serving node.
    pub returns: bool,
    /// Records that a replica received after it had promised itself count as held by it.
    pub late_copies: bool,
    /// The master reports which nodes have no session.
    pub master: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Tick,
    /// A request comes to a replica that can answer it only after a probe.
    Start(usize, Node),
    Check(usize, Node),
    Write(usize),
    Ack(usize),
    Read(Node),
    Pull {
        to: Node,
        from: Node,
        record: usize,
    },
    Grant {
        granter: Node,
        claimant: Node,
    },
    Deny {
        granter: Node,
        claimant: Node,
    },
    Deliver {
        claimant: Node,
        granter: Node,
    },
    Release {
        granter: Node,
        claimant: Node,
    },
    /// The claimant turns to another replica itself, and reports that it does not hold the promise
    /// any more.
    LetGo {
        granter: Node,
        claimant: Node,
    },
    /// The claimant reports that it covers what was named, and whether it serves.
    Report {
        granter: Node,
        claimant: Node,
    },
    /// An attempt to connect comes through, and nothing else yet.
    Connect(Node, Node),
    SeeDead(Node, Node),
    MasterTells(Node),
    Pause(Node),
    Wake(Node),
    Isolate(Node),
    Heal(Node),
    Kill(Node),
    Stop(Node),
    Restart(Node),
    BreakLink(Node, Node),
    CutPair,
    HealPair,
    MasterRestarts,
}

fn down(left: &mut u8) {
    *left = left.saturating_sub(1);
}

impl Leases {
    fn nodes(&self) -> std::ops::Range<Node> {
        0..self.nodes
    }

    fn others(&self, i: Node) -> impl Iterator<Item = Node> + use<> {
        (0..self.nodes).filter(move |j| *j != i)
    }

    /// Returns the acknowledged records that are promised to be seen, or will be again.
    fn promised(&self, state: &State) -> Set {
        if self.returns { state.acked } else { state.acked & !state.forgiven }
    }

    /// Returns the operation that is a read.
    fn read(&self) -> usize {
        self.appends
    }

    /// Returns a claimant's knowledge of a peer, as the real decision takes it, and the basis that
    /// it would be.
    fn known(&self, state: &State, i: Node, j: Node, had: bool) -> (Known, Basis) {
        let peer = &state.peers[i][j];
        let found = peer.found > 0 || !self.rules.excuses_end;
        let quiet = peer.quiet >= SILENCE;
        match peer.reach {
            Reach::Refused if found => return (Known::Dead, Basis::Excuse),
            Reach::Reachable if quiet && found => return (Known::Hung, Basis::Excuse),
            Reach::Unreachable if quiet => {
                let gone = peer.word > 0 && (peer.tried || !self.rules.connect_after_evidence);
                return (Known::Silent { gone }, Basis::Silence);
            }
            Reach::Unknown | Reach::Refused | Reach::Reachable | Reach::Unreachable => {}
        }
        if had && state.nodes[j].young > 0 && self.rules.young_waits && state.linked(i, j) {
            return (Known::Absent { long: false }, Basis::Excuse);
        }
        if peer.belief > 0 {
            let covered = !self.rules.cover || peer.named & !state.nodes[i].have == 0;
            return (
                Known::Granted { believed: true, covered, served: peer.served },
                Basis::Promise,
            );
        }
        let before = had && peer.basis == Basis::Excuse;
        (Known::Unsettled { excused: before }, if before { Basis::Excuse } else { Basis::Silence })
    }

    /// Returns true when the node has firm authority that is valid up to now.
    fn had(&self, state: &State, i: Node) -> bool {
        state.nodes[i].term == Term::Firm
            && self.others(i).all(|j| match state.peers[i][j].basis {
                Basis::Promise => state.peers[i][j].belief > 0,
                Basis::Excuse => state.peers[i][j].found > 0 || !self.rules.excuses_end,
                Basis::Silence => true,
            })
    }

    /// Returns the verdict on a claim from everything that is known.
    fn verdict(&self, state: &State, i: Node) -> Verdict {
        let node = &state.nodes[i];
        let free = Verdict::Authority { by_master: false, probing: false };
        if !self.rules.leases {
            return free;
        }
        let excused = node.promise != NOBODY && state.peers[i][usize::from(node.promise)].is_away();
        let promised = node.promise != NOBODY
            && self.rules.stop_before_grant
            && (self.rules.own_promise_ended || !excused);
        if promised || node.run == Run::Dead || (node.young > 0 && self.rules.young_waits) {
            return Verdict::Missing;
        }
        let had = self.had(state, i);
        let mut known = [Known::Denied; NODES];
        let mut count = 0;
        for j in self.others(i) {
            known[count] = self.known(state, i, j, had).0;
            count += 1;
        }
        match authority(&known[..count], had) {
            Verdict::Authority { .. } if !self.rules.evidence => free,
            verdict => verdict,
        }
    }

    /// Returns true when the node may serve a request after whose arrival connects to `probed`
    /// failed.
    fn serves(&self, state: &State, i: Node, probed: Set) -> bool {
        state.up(i)
            && match self.verdict(state, i) {
                Verdict::Missing => false,
                Verdict::Authority { probing: false, .. } => true,
                Verdict::Authority { probing: true, .. } => self.others(i).all(|j| {
                    let silent = matches!(self.known(state, i, j, false).0, Known::Silent { .. });
                    !silent || probed & bit(j) != 0
                }),
            }
    }

    /// Begins, continues or ends authority.
    fn settle(&self, state: &mut State) {
        for i in self.nodes() {
            if state.up(i) && state.nodes[i].promise == NOBODY {
                for j in self.others(i) {
                    let peer = &mut state.peers[i][j];
                    peer.covered |= peer.belief > 0 && peer.named & !state.nodes[i].have == 0;
                }
            }
            let verdict = self.verdict(state, i);
            let Verdict::Authority { probing, .. } = verdict else {
                state.nodes[i].term = Term::None;
                continue;
            };
            let had = self.had(state, i);
            let mut by_promises = true;
            // A silent peer for which each request was probed is only heard before it promises
            // itself.
            let mut interrupted = false;
            for j in self.others(i) {
                let (known, basis) = self.known(state, i, j, had);
                by_promises &= matches!(known, Known::Granted { covered: true, .. });
                let is_silent = matches!(known, Known::Silent { .. });
                let peer = &mut state.peers[i][j];
                interrupted |= state.nodes[i].term == Term::Probing
                    && peer.basis == Basis::Silence
                    && !is_silent;
                peer.basis = basis;
                if matches!(known, Known::Absent { .. }) {
                    peer.found = EXCUSE;
                }
            }
            let node = &mut state.nodes[i];
            let goes_on = (node.term != Term::None && !interrupted) || (node.intact && by_promises);
            node.term = if probing { Term::Probing } else { Term::Firm };
            node.intact = by_promises;
            node.served |= node.run == Run::Up;
            if !goes_on {
                for op in state.ops.iter_mut().filter(|op| usize::from(op.at) == i) {
                    op.lapsed |= matches!(op.phase, Phase::Checked | Phase::Written);
                }
            }
        }
    }

    /// Handles a peer that can be reached again: the failed attempts to connect say nothing of the
    /// other peers.
    fn network_is_back(&self, state: &mut State, i: Node, from: Node) {
        if state.peers[i][from].reach != Reach::Unreachable {
            return;
        }
        for j in self.others(i) {
            let peer = &mut state.peers[i][j];
            if peer.reach == Reach::Unreachable && (self.rules.connect_after_evidence || j == from)
            {
                peer.reach = Reach::Unknown;
                if self.rules.hung_is_connected {
                    peer.quiet = 0;
                }
            }
        }
    }

    fn hear(&self, state: &mut State, i: Node, from: Node) {
        self.network_is_back(state, i, from);
        if self.rules.heard_ends_excuse {
            let peer = &mut state.peers[i][from];
            (peer.quiet, peer.reach) = (0, Reach::Unknown);
        }
    }

    fn dead(&self, state: &mut State, i: Node, j: Node) {
        self.network_is_back(state, i, j);
        (state.peers[i][j].reach, state.peers[i][j].found) = (Reach::Refused, EXCUSE);
        if state.nodes[i].promise == j as u8 {
            state.end_promise(i);
        }
    }

    fn tick(&self, state: &mut State) {
        for i in self.nodes() {
            down(&mut state.nodes[i].young);
            down(&mut state.nodes[i].left);
            if state.nodes[i].left == 0 {
                state.end_promise(i);
            }
            for j in self.others(i) {
                let peer = &mut state.peers[i][j];
                down(&mut peer.belief);
                down(&mut peer.found);
                down(&mut peer.word);
                if let Back::Grant { left, .. } = &mut peer.back
                    && self.rules.belief_from_sending
                {
                    down(left);
                    if *left == 0 {
                        peer.back = Back::Nothing;
                    }
                }
            }
            match state.nodes[i].run {
                Run::Up => self.listen(state, i),
                Run::Paused if !self.rules.own_gap => {
                    for j in self.others(i) {
                        state.peers[i][j].quiet = SILENCE;
                    }
                }
                Run::Paused | Run::Dead | Run::Unused => {}
            }
            if self.master {
                let node = &mut state.nodes[i];
                node.missing = match node.missing {
                    _ if node.run == Run::Up && !node.cut => 0,
                    NEVER => NEVER,
                    ticks => SESSION.min(ticks + 1),
                };
            }
        }
        state.changed = false;
    }

    /// Applies what a running node receives within a tick, and the results of its attempts to
    /// connect.
    fn listen(&self, state: &mut State, i: Node) {
        let before = state.peers[i].map(|peer| peer.reach);
        for j in self.others(i).filter(|j| !state.cut(i, *j)).collect::<Vec<_>>() {
            self.network_is_back(state, i, j);
        }
        for j in self.others(i) {
            let begins_anew =
                before[j] == Reach::Unreachable && state.peers[i][j].reach != Reach::Unreachable;
            let dead = state.nodes[j].run == Run::Dead;
            if state.cut(i, j) {
                let peer = &mut state.peers[i][j];
                if !begins_anew {
                    (peer.quiet, peer.reach, peer.tried) = (SILENCE, Reach::Unreachable, true);
                }
            } else if dead {
                state.peers[i][j].quiet = SILENCE;
                self.dead(state, i, j);
            } else {
                let heard = state.up(j);
                let peer = &mut state.peers[i][j];
                peer.found = EXCUSE;
                if heard {
                    (peer.quiet, peer.reach) = (0, Reach::Unknown);
                } else {
                    // The silence of a dead process was that of another process.
                    let anew = peer.reach == Reach::Refused
                        || (begins_anew && self.rules.hung_is_connected);
                    (peer.quiet, peer.reach) = (if anew { 0 } else { SILENCE }, Reach::Reachable);
                }
            }
        }
        let failed = self.others(i).filter(|j| state.peers[i][*j].reach == Reach::Unreachable);
        let failed = failed.fold(0, |all, j| all | bit(j));
        for op in &mut state.ops {
            if usize::from(op.at) == i && matches!(op.phase, Phase::Waiting | Phase::Written) {
                op.silent &= failed;
                op.probed = op.silent;
            }
        }
    }

    fn grant(&self, state: &mut State, granter: Node, claimant: Node) -> bool {
        if !state.linked(granter, claimant)
            || (self.rules.young_waits && state.nodes[granter].young > 0)
        {
            return false;
        }
        let promise = state.nodes[granter].promise;
        let again = promise == claimant as u8;
        if promise != NOBODY && !again && self.rules.exclusive {
            return false;
        }
        // After silence the promise comes over another link, and is another promise.
        let steady = again && state.peers[claimant][granter].quiet < SILENCE;
        if steady {
            if state.nodes[granter].denying {
                return false;
            }
        } else {
            for op in 0..self.appends {
                let one = state.ops[op];
                if one.phase == Phase::Written && usize::from(one.at) == granter && !one.handed {
                    let lasts = self.is_in_term(state, one);
                    state.ops[op].to = if lasts { claimant as u8 } else { NOBODY };
                }
            }
            state.nodes[claimant].intact = false;
            let peer = &mut state.peers[claimant][granter];
            (peer.released, peer.covered) = (false, false);
            let node = &mut state.nodes[granter];
            (node.intact, node.denying, node.taken) = (false, false, false);
            (node.promise, node.named, node.said_served) = (claimant as u8, node.have, node.served);
            node.served &= self.rules.served_until_covered;
        }
        self.hear(state, granter, claimant);
        if self.returns
            && state.nodes[claimant].term != Term::None
            && state.is_back(granter, granter)
        {
            state.forgiven &= !state.nodes[granter].named;
        }
        let node = &mut state.nodes[granter];
        node.left = PROMISE;
        let back = Back::Grant { left: BELIEF, named: node.named, served: node.said_served };
        let peer = &mut state.peers[claimant][granter];
        if peer.back == Back::Denied {
            return false;
        }
        peer.back = back;
        self.hurry(state, claimant, granter);
        true
    }

    /// Delivers an answer at once when too many are late.
    fn hurry(&self, state: &mut State, claimant: Node, granter: Node) {
        let late = state.peers.iter().flatten().filter(|peer| peer.back != Back::Nothing).count();
        if late > self.late {
            self.deliver(state, claimant, granter);
        }
    }

    fn deliver(&self, state: &mut State, claimant: Node, granter: Node) -> bool {
        let peer = &mut state.peers[claimant][granter];
        match std::mem::replace(&mut peer.back, Back::Nothing) {
            Back::Nothing => return false,
            Back::Grant { left, named, served } => {
                (peer.belief, peer.named, peer.served) = (left, named, served)
            }
            Back::Denied => {
                if self.rules.stop_before_release {
                    peer.belief = 0;
                }
                peer.released = true;
            }
        }
        self.hear(state, claimant, granter);
        true
    }

    /// Returns true when the authority lasts under which a write was checked.
    fn is_in_term(&self, state: &State, op: Op) -> bool {
        let probed = if self.rules.ack_after_probe { op.probed } else { Set::MAX };
        !op.lapsed && self.serves(state, usize::from(op.at), probed)
    }

    fn silent(&self, state: &State, i: Node) -> Set {
        let silent = |j: &Node| matches!(self.known(state, i, *j, false).0, Known::Silent { .. });
        self.others(i).filter(silent).fold(0, |all, j| all | bit(j))
    }

    /// Returns what an operation that comes now, or came just before the replica was cut off, must
    /// see.
    fn must(&self, state: &State, at: Node) -> Set {
        if state.nodes[at].cut { state.nodes[at].must } else { state.acked }
    }

    fn act(&self, state: &mut State, action: Action) -> bool {
        match action {
            Action::Tick => self.tick(state),
            Action::Start(op, at) => {
                if state.ops[op].phase != Phase::Idle || !state.up(at) || state.nodes[at].cut {
                    return false;
                }
                let silent =
                    if self.rules.came_after_silence { self.silent(state, at) } else { Set::MAX };
                // Another operation comes later and must see no less.
                if silent == 0 || (op == self.read() && self.promised(state) == 0) {
                    return false;
                }
                state.ops[op] =
                    Op { phase: Phase::Waiting, at: at as u8, must: state.acked, silent, ..IDLE };
            }
            Action::Check(op, at) => {
                let one = state.ops[op];
                match one.phase {
                    Phase::Idle => {
                        let must = self.must(state, at);
                        state.ops[op] = Op { at: at as u8, must, ..IDLE };
                    }
                    Phase::Waiting if usize::from(one.at) == at => {}
                    _ => return false,
                }
                // A replica has one writer.
                if !self.serves(state, at, one.probed)
                    || (self.rules.writer_checks && state.is_busy(at))
                {
                    return false;
                }
                state.clock += 1;
                let one = &mut state.ops[op];
                (one.phase, one.stamp, one.silent, one.probed) =
                    (Phase::Checked, state.clock, 0, 0);
                if self.quick {
                    self.act(state, Action::Write(op));
                    self.act(state, Action::Ack(op));
                }
            }
            Action::Write(op) => {
                let one = state.ops[op];
                let at = usize::from(one.at);
                if one.phase != Phase::Checked || !state.up(at) {
                    return false;
                }
                let mut stamp = one.stamp;
                if !self.rules.stamp_first || !self.rules.writer_checks {
                    state.clock += 1;
                    stamp = state.clock;
                }
                let list = state.list(at) | bit(op);
                state.records[op] = Some(Record { list, stamp, origin: at as u8 });
                state.nodes[at].have |= bit(op);
                let silent = self.silent(state, at);
                let one = &mut state.ops[op];
                (one.phase, one.stamp, one.silent) = (Phase::Written, 0, silent);
                if state.nodes[at].cut {
                    state.forgive(at, self.late_copies);
                }
            }
            Action::Ack(op) => {
                let one = state.ops[op];
                let at = usize::from(one.at);
                if one.phase != Phase::Written || !state.up(at) {
                    return false;
                }
                let in_term = self.is_in_term(state, one);
                let handed = one.to != NOBODY && (one.handed || !self.rules.ack_when_taken_over);
                if self.rules.ack_in_term && !in_term && !handed {
                    return false;
                }
                if self.ack == Ack::Replica && state.holders(op) < 2 {
                    return false;
                }
                state.ops[op].phase = Phase::Done;
                state.acked |= bit(op);
                let list = state.records[op].map_or(0, |record| record.list);
                if one.must & !state.forgiven & !list != 0 {
                    state.bad = Some(Bad::LostWrite);
                }
            }
            // A read that sees all it must see changes nothing.
            Action::Read(at) => {
                let one = state.ops[self.read()];
                let waited = one.phase == Phase::Waiting && usize::from(one.at) == at;
                let missing = |must: Set| must & !state.forgiven & !state.list(at) != 0;
                let stale = missing(self.must(state, at)) && self.serves(state, at, 0);
                let stale =
                    stale || (waited && missing(one.must) && self.serves(state, at, one.probed));
                if !stale {
                    return false;
                }
                state.bad = Some(Bad::StaleRead);
            }
            Action::Pull { to, from, record } => {
                let missing = state.nodes[from].have & !state.nodes[to].have;
                let origin = |id: usize| state.records[id].map(|one| (one.origin, one.stamp));
                // Records of one origin come in their order.
                let earlier =
                    (0..state.records.len()).filter(|id| missing & bit(*id) != 0).any(|id| {
                        origin(id).zip(origin(record)).is_some_and(|(a, b)| a.0 == b.0 && a.1 < b.1)
                    });
                if missing & bit(record) == 0 || earlier || !state.linked(to, from) {
                    return false;
                }
                state.nodes[to].have |= bit(record);
            }
            Action::Grant { granter, claimant } => return self.grant(state, granter, claimant),
            Action::Deny { granter, claimant } => {
                let node = &state.nodes[granter];
                if !state.linked(granter, claimant)
                    || node.promise != claimant as u8
                    || node.denying
                {
                    return false;
                }
                state.nodes[granter].denying = true;
                state.peers[claimant][granter].back = Back::Denied;
                self.hurry(state, claimant, granter);
            }
            Action::Deliver { claimant, granter } => {
                return state.linked(claimant, granter) && self.deliver(state, claimant, granter);
            }
            Action::Release { granter, claimant } => {
                if !state.linked(granter, claimant)
                    || !state.nodes[granter].denying
                    || state.nodes[granter].promise != claimant as u8
                    || !state.peers[claimant][granter].released
                {
                    return false;
                }
                state.end_promise(granter);
                self.hear(state, granter, claimant);
            }
            Action::LetGo { granter, claimant } => {
                let held = state.nodes[granter].promise == claimant as u8
                    && state.peers[claimant][granter].belief > 0;
                if !state.linked(granter, claimant) || !held {
                    return false;
                }
                if self.rules.let_go_for_good {
                    let peer = &mut state.peers[claimant][granter];
                    (peer.belief, peer.back) = (0, Back::Nothing);
                }
                state.end_promise(granter);
                self.hear(state, granter, claimant);
            }
            Action::Report { granter, claimant } => {
                let said = &state.peers[claimant][granter];
                if !state.linked(granter, claimant)
                    || state.nodes[granter].promise != claimant as u8
                    || !said.covered
                {
                    return false;
                }
                state.nodes[granter].served = false;
                state.nodes[granter].taken |=
                    self.faults.stop > 0 && self.serves(state, claimant, Set::MAX);
                for op in state.ops.iter_mut().filter(|op| usize::from(op.at) == granter) {
                    op.handed |= op.to == claimant as u8;
                }
            }
            Action::Connect(i, j) => {
                let peer = &state.peers[i][j];
                let met = state.nodes[j].run != Run::Dead && !state.cut(i, j);
                if !state.up(i) || !met || (peer.quiet < SILENCE && peer.reach == Reach::Unknown) {
                    return false;
                }
                self.network_is_back(state, i, j);
                let peer = &mut state.peers[i][j];
                if peer.reach == Reach::Refused {
                    peer.quiet = 0;
                }
                (peer.reach, peer.found) = (Reach::Reachable, EXCUSE);
            }
            Action::SeeDead(i, j) => {
                if !state.up(i) || state.nodes[j].run != Run::Dead || state.cut(i, j) {
                    return false;
                }
                self.dead(state, i, j);
            }
            Action::MasterTells(i) => {
                if !state.up(i) || state.nodes[i].cut {
                    return false;
                }
                let mut told = false;
                for j in self.others(i) {
                    let peer = &mut state.peers[i][j];
                    if state.nodes[j].missing >= SESSION
                        && peer.word < WORD
                        && peer.quiet >= SILENCE
                    {
                        peer.tried &= peer.word > 0;
                        peer.word = WORD;
                        told = true;
                    }
                }
                return told;
            }
            _ => return self.fault(state, action),
        }
        true
    }

    fn fault(&self, state: &mut State, action: Action) -> bool {
        fn take(left: &mut u8) -> bool {
            let any = *left > 0;
            *left = left.saturating_sub(1);
            any
        }
        let room = state.away() < self.away;
        let still = self.flaps || !state.changed;
        match action {
            Action::Pause(i) => {
                if !room || !state.up(i) || !take(&mut state.faults.pause) {
                    return false;
                }
                state.forgive(i, self.late_copies);
                state.nodes[i].run = Run::Paused;
            }
            Action::Wake(i) => {
                if state.nodes[i].run != Run::Paused {
                    return false;
                }
                state.nodes[i].run = Run::Up;
                if self.rules.own_gap {
                    for j in self.others(i) {
                        state.peers[i][j].quiet = 0;
                    }
                }
            }
            Action::Isolate(i) => {
                if !room
                    || !still
                    || state.nodes[i].cut
                    || !state.up(i)
                    || !take(&mut state.faults.isolate)
                {
                    return false;
                }
                state.forgive(i, self.late_copies);
                let acked = state.acked;
                (state.nodes[i].cut, state.nodes[i].must) = (true, acked);
                state.changed = true;
            }
            Action::Heal(i) => {
                if !still || !state.nodes[i].cut {
                    return false;
                }
                (state.nodes[i].cut, state.nodes[i].must) = (false, 0);
                state.changed = true;
            }
            Action::Kill(i) => {
                if !room || !state.up(i) || !take(&mut state.faults.kill) {
                    return false;
                }
                state.forgive(i, self.late_copies);
                state.nodes[i].run = Run::Dead;
                state.forget(i);
            }
            Action::Stop(i) => {
                let node = &state.nodes[i];
                let over = node.promise != NOBODY && (node.taken || !self.rules.stop_when_covered);
                if !room || !state.up(i) || !over || !take(&mut state.faults.stop) {
                    return false;
                }
                // The stop loses nothing by itself, but the node may be the second one that goes
                // away.
                if !self.others(i).all(|j| state.is_back(j, i)) {
                    state.forgive(i, self.late_copies);
                }
                state.nodes[i].run = Run::Dead;
                state.forget(i);
            }
            Action::Restart(i) => {
                if state.nodes[i].run != Run::Dead || !take(&mut state.faults.restart) {
                    return false;
                }
                state.nodes[i].run = Run::Up;
                (state.nodes[i].young, state.nodes[i].served) =
                    (PROMISE, self.rules.predecessor_served);
            }
            Action::BreakLink(i, j) => {
                if self.rules.dead_is_refused
                    || !state.linked(i, j)
                    || !take(&mut state.faults.break_link)
                {
                    return false;
                }
                self.dead(state, i, j);
            }
            Action::CutPair => {
                if state.pair_cut || !still || !take(&mut state.faults.cut_pair) {
                    return false;
                }
                state.pair_cut = true;
                state.changed = true;
            }
            Action::HealPair => {
                if !state.pair_cut || !still {
                    return false;
                }
                state.pair_cut = false;
                state.changed = true;
            }
            Action::MasterRestarts => {
                if !self.master || !take(&mut state.faults.master_restart) {
                    return false;
                }
                for i in self.nodes() {
                    state.nodes[i].missing = NEVER;
                }
            }
            _ => return false,
        }
        true
    }

    /// Returns true when nothing bad can follow any more: all is written, and every node that may
    /// come back holds it, or nothing is promised.
    fn is_over(&self, state: &State) -> bool {
        let ended = state.ops[..self.appends].iter().all(|op| op.phase == Phase::Done);
        let all =
            (0..OPS).filter(|id| state.records[*id].is_some()).fold(0, |all, id| all | bit(id));
        let gone = |node: &NodeState| {
            node.run == Run::Unused || (node.run == Run::Dead && state.faults.restart == 0)
        };
        ended
            && (self.promised(state) == 0
                || state.nodes.iter().all(|node| gone(node) || all & !node.have == 0))
    }
}

impl Model for Leases {
    type State = State;
    type Action = Action;

    /// Returns the one initial state: node 0 serves.
    fn init_states(&self) -> Vec<State> {
        let mut state = State {
            nodes: [NEW; NODES],
            peers: [[FRESH; NODES]; NODES],
            ops: [IDLE; OPS],
            records: [None; OPS],
            acked: 0,
            forgiven: 0,
            clock: 0,
            faults: self.faults,
            pair_cut: false,
            changed: false,
            bad: None,
        };
        for node in &mut state.nodes[self.nodes..] {
            node.run = Run::Unused;
        }
        for j in self.others(0) {
            (state.nodes[j].promise, state.nodes[j].left) = (0, PROMISE);
            state.peers[0][j].belief = BELIEF;
        }
        (state.nodes[0].term, state.nodes[0].served) = (Term::Firm, true);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.bad.is_some() || self.is_over(state) {
            return;
        }
        actions.push(Action::Tick);
        for op in 0..self.appends {
            match state.ops[op].phase {
                // The first append begins first.
                Phase::Idle if op > 0 && state.ops[op - 1].phase == Phase::Idle => {}
                Phase::Idle => {
                    actions.extend(
                        self.nodes().flat_map(|at| [Action::Start(op, at), Action::Check(op, at)]),
                    );
                }
                Phase::Waiting => actions.push(Action::Check(op, usize::from(state.ops[op].at))),
                Phase::Checked => actions.push(Action::Write(op)),
                Phase::Written => actions.push(Action::Ack(op)),
                Phase::Done => {}
            }
        }
        for i in self.nodes() {
            actions.extend([Action::Start(self.read(), i), Action::Read(i)]);
            for j in self.others(i) {
                let records = (0..self.appends).filter(|id| state.records[*id].is_some());
                actions.extend(records.map(|record| Action::Pull { to: i, from: j, record }));
                actions.push(Action::Grant { granter: i, claimant: j });
                actions.push(Action::Deny { granter: i, claimant: j });
                if self.late > 0 {
                    actions.push(Action::Deliver { claimant: i, granter: j });
                }
                actions.push(Action::Release { granter: i, claimant: j });
                actions.push(Action::LetGo { granter: i, claimant: j });
                actions.push(Action::Report { granter: i, claimant: j });
                actions.push(Action::Connect(i, j));
                actions.push(Action::SeeDead(i, j));
                actions.push(Action::BreakLink(i, j));
            }
            if self.master {
                actions.push(Action::MasterTells(i));
            }
            actions.extend([
                Action::Pause(i),
                Action::Wake(i),
                Action::Isolate(i),
                Action::Heal(i),
                Action::Kill(i),
                Action::Stop(i),
                Action::Restart(i),
            ]);
        }
        actions.extend([Action::CutPair, Action::HealPair, Action::MasterRestarts]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        if !self.act(&mut state, action) {
            return None;
        }
        self.settle(&mut state);
        state.forget_what_is_done();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no stale read", |_, state: &State| state.bad != Some(Bad::StaleRead)),
            Property::always("no lost write", |_, state: &State| state.bad != Some(Bad::LostWrite)),
        ]
    }
}
